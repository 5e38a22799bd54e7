"""By how much two sides differ in each metric, with a 95% interval: two networks, or trainings of two recipes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from config import UserError
from evaluation import statistics
from evaluation.reference import METRICS, Baseline, Estimate, Estimates, Metric


class Difference(NamedTuple):
    """One metric of both sides, and the 95% interval of the change: relative for distances, else absolute."""

    metric: Metric
    a: Estimate  # of several trainings the geometric mean
    b: Estimate
    change: float
    low: float
    high: float
    detectable: float  # the true change that four of five such comparisons find significant
    spread: float | None = None  # standard deviation of the logarithm between trainings of one side
    sampling_share: float | None = None  # of that variance: what is due to the images that were sampled

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0."""
        return not self.low <= 0 <= self.high

    def show(self, value: float) -> str:
        """A change as a text: in per cent for distances, in percentage points for all else."""
        if not self.metric.distance:
            return f"{round(100 * value, 2) + 0:+.2f}"  # + 0: no "-0.00"
        return f"{round(100 * value, 1) + 0:+.1f}%" if abs(value) < 0.0995 else f"{100 * value:+,.0f}%"


def compare_networks(a: Estimates, b: Estimates, baseline: Baseline) -> list[Difference]:
    """Of each metric that both networks have, measured with images of the same seeds and labels.

    The error is that of a jackknife over blocks, paired, since block by block the seeds are the same. A metric without
    replicates has the spread of the baseline's sets as its error.
    """
    differences = []
    for metric in common_metrics([a, b]):
        value_a, value_b = a[metric.key].value, b[metric.key].value
        replicates_a, replicates_b = a[metric.key].replicates, b[metric.key].replicates
        if replicates_a is None or replicates_b is None:
            error, dof = math.sqrt(2) * (baseline.estimates[metric.key].error or 0.0), len(baseline.sets) - 1
        else:
            error, dof = statistics.jackknife_error(replicates_b - replicates_a), len(replicates_a) - 1
        scale = 1 / max(value_a, 1e-9) if metric.distance else 1.0
        half = statistics.student_quantile(dof) * error
        change, low, high = (scale * (value_b - value_a + shift) for shift in (0, -half, half))
        differences.append(Difference(metric, a[metric.key], b[metric.key], change, low, high,
                                      scale * statistics.detectable(error, dof)))
    return differences


def compare_trainings(a: Sequence[Estimates], b: Sequence[Estimates]) -> list[Difference]:
    """Of each metric that all trainings have: a two-sample t interval of its logarithms, one number for a training.

    Raises UserError for a single training a side, whose spread is unknown.
    """
    if len(a) + len(b) < 3:
        raise UserError("one training a side says nothing about the spread between trainings; train one recipe twice, "
                        "better both")
    differences = []
    for metric in common_metrics([*a, *b]):
        sides = [[training[metric.key] for training in side] for side in (a, b)]
        logs = [np.log([max(estimate.value, 1e-9) for estimate in side]) for side in sides]
        change, error, dof = statistics.two_sample(*logs)
        half = statistics.student_quantile(dof) * error
        mean_a, mean_b = (math.exp(side.mean()) for side in logs)
        scale = 1.0 if metric.distance else mean_a
        spread = error / math.sqrt(1 / len(a) + 1 / len(b))
        estimate_a, estimate_b = (Estimate(mean, mean * spread / math.sqrt(len(side)))
                                  for mean, side in zip((mean_a, mean_b), sides))
        change, low, high, detectable = (scale * math.expm1(value) for value in (
            change, change - half, change + half, statistics.detectable(error, dof)))
        differences.append(Difference(metric, estimate_a, estimate_b, change, low, high, detectable, spread,
                                      sampling_share(sides, spread)))
    return differences


def sampling_share(sides: Sequence[Sequence[Estimate]], spread: float) -> float | None:
    """The share of the variance between trainings that is due to the sampled images; None without replicates."""
    replicates = [[estimate.replicates.clamp(min=1e-9).log() for estimate in side if estimate.replicates is not None]
                  for side in sides]
    if [*map(len, replicates)] != [*map(len, sides)]:
        return None
    return min(1.0, statistics.sampling_variance(replicates) / max(spread, 1e-9) ** 2)


def common_metrics(measured: Sequence[Estimates]) -> list[Metric]:
    """The metrics that all of these have."""
    return [metric for metric in METRICS if all(metric.key in estimates for estimates in measured)]
