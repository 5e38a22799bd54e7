"""Verdicts: is the difference between two sides, each of one network or of several trainings, more than luck?"""

import math
from statistics import fmean, stdev
from typing import Any, NamedTuple

from support.statistics import holm, jackknife_error, student_limit, student_p
from yardstick import MEASURES, OVERLAP, Measure, Row

HEADLINE = "within"  # the one measure that decides a comparison
FEWEST_RUNS = 3  # of a recipe, below which their own spread says nothing
# Deviation of the logarithm between 8 trainings of an earlier default (five minutes of one thread; 10,000 images each).
SPREAD = {"within": 0.101, "frechet": 0.104, "texture": 0.242, "ink": 0.0092, "precision": 0.0058, "recall": 0.0064,
          "coverage": 0.0141, "sure": 0.0085, "asked": 0.0067, "zeros": 0.0027}


class Verdict(NamedTuple):
    """On one measure of two sides; low and high: the 95% interval of b - a, None where there is none."""

    measure: Measure
    a: float
    b: float
    low: float | None
    high: float | None
    p: float | None  # that the true values are equally good, corrected for the number of measures but for the headline
    word: str  # "better", "worse", "no difference shown", or ""


def verdicts(a: list[Row], b: list[Row], floor: Row, sets: int) -> list[Verdict]:
    """Of side b against side a: rows of one network each, or of several that one recipe trained, for the same labels.

    One network a side: the difference's jackknife over blocks, which pairs what has the same seeds. Several: each row's
    logarithm is one number, with the pooled variance between trainings, or SPREAD where a side has under three.
    """
    several = len(a) + len(b) > 2
    scale, unscale = (math.log, math.exp) if several else (float, float)
    found: list[tuple[Verdict, float | None]] = []
    for measure in (m for m in MEASURES if all(m.key in row.values for row in (*a, *b))):
        points = [[scale(max(row.values[measure.key], 1e-9)) for row in side] for side in (a, b)]
        mean_a, mean_b = map(fmean, points)
        if several:
            error, freedom = _between_trainings(points, measure.key)
        else:
            error, freedom = _paired_error(a[0], b[0], measure.key, floor, sets)
        real = scale(max(floor.values[measure.key], 1e-9)) if measure.key in floor.values else None
        gain = _gain(measure, mean_a, mean_b, real)
        low = high = p = None
        if error is not None:
            half = student_limit(freedom) * error
            low, high = mean_b - mean_a - half, mean_b - mean_a + half
            if several:
                low, high = (math.exp(mean_a) * math.expm1(change) for change in (low, high))
            if not several and measure.key not in OVERLAP and gain is not None:
                error = jackknife_error(_gain(measure, a[0].left_out[measure.key], b[0].left_out[measure.key], real))
            if real is not None and measure.good == "floor" and (mean_a - real) * (mean_b - real) < 0:
                own = floor.errors[measure.key] / (max(floor.values[measure.key], 1e-9) if several else 1)
                error = math.hypot(error, 2 * own / math.sqrt(sets))  # on both sides of the floor, its error counts
            p = None if gain is None else student_p(gain / error if error else 0.0, freedom)
        found.append((Verdict(measure, unscale(mean_a), unscale(mean_b), low, high, p, ""), gain))
    others = [i for i, (verdict, _) in enumerate(found) if verdict.measure.key != HEADLINE and verdict.p is not None]
    corrected = dict(zip(others, holm([found[i][0].p or 0.0 for i in others])))
    judged = []
    for i, (verdict, gain) in enumerate(found):
        p = corrected.get(i, verdict.p)
        word = ""
        if p is not None and gain is not None:
            word = "no difference shown" if p >= 0.05 else "better" if gain > 0 else "worse"
        judged.append(verdict._replace(p=p, word=word))
    return judged


def _gain(measure: Measure, a: Any, b: Any, floor: float | None) -> Any:
    """By how much b is better than a: lower, or nearer to the floor's value."""
    if measure.good == "low":
        return a - b
    return abs(a - floor) - abs(b - floor) if measure.good == "floor" and floor is not None else None


def _paired_error(a: Row, b: Row, key: str, floor: Row, sets: int) -> tuple[float | None, float]:
    """Standard error of the difference of two networks, and its degrees of freedom."""
    if key in OVERLAP:
        return math.sqrt(2) * floor.errors[key], sets - 1
    if key in a.left_out and key in b.left_out:
        return jackknife_error(b.left_out[key] - a.left_out[key]), len(a.left_out[key]) - 1
    return None, 0


def _between_trainings(points: list[list[float]], key: str) -> tuple[float | None, float]:
    """The same for the means of the logarithms of several trainings a side."""
    pairs = math.sqrt(sum(1 / len(side) for side in points))
    if min(map(len, points)) < FEWEST_RUNS:
        return (SPREAD[key] * pairs if key in SPREAD else None), math.inf
    freedom = sum(len(side) - 1 for side in points)
    return math.sqrt(sum(stdev(side) ** 2 * (len(side) - 1) for side in points) / freedom) * pairs, freedom


def smallest_shown(a: list[Row], b: list[Row]) -> float:
    """The least relative difference in the headline that so many trainings would call one."""
    error, freedom = _between_trainings([[math.log(row.values[HEADLINE]) for row in side] for side in (a, b)], HEADLINE)
    return math.expm1(student_limit(freedom) * (error or math.nan))
