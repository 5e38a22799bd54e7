"""Standard errors, intervals, and what can be said of the difference between two sides."""

import functools
import math
from collections.abc import Sequence
from statistics import variance

import numpy as np
from torch import Tensor

BLOCK = 100  # images in a jackknife block, at least
FEWEST_BLOCKS, MOST_BLOCKS = 20, 100  # below, a jackknife says nothing; above, it takes longer and gains nothing
FEWEST_FOR_ERRORS = BLOCK * FEWEST_BLOCKS  # images
MANY = 10_000  # degrees of freedom from which on Student's t is as good as normal
# Standard deviation of the logarithm between 8 trainings that differ by their seed alone (benchmarks/README.md).
SPREAD = {"class_frechet": 0.101, "frechet": 0.104, "texture": 0.242, "mean_intensity": 0.0092, "precision": 0.0058,
          "recall": 0.0064, "coverage": 0.0141, "confident": 0.0085, "label_accuracy": 0.0067, "zeros": 0.0027}
SPREAD_FREEDOM = 7


def jackknife_error(replicates: Tensor) -> float:
    """Standard error of a value from its B values without one block each, float64 [B] (Efron and Stein 1981).

    Near the baseline it is too large rather than too small, since a distance can't fall below what N images give.
    """
    blocks = len(replicates)
    return ((replicates - replicates.mean()).square().sum() * (blocks - 1) / blocks).sqrt().item()


@functools.cache
def student_quantile(freedom: float, coverage: float = 0.95) -> float:
    """The |t| below which this share of Student's t distribution lies; many degrees of freedom: the normal one."""
    freedom = min(freedom, MANY)
    angle = np.linspace(0, math.pi / 2, 20_001)  # t = tan(angle) sqrt(freedom)
    density = np.cos(angle) ** (freedom - 1)
    below = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(np.interp(coverage, below / below[-1], angle))


def between_trainings(sides: Sequence[Sequence[float]], key: str) -> tuple[float, float]:
    """Standard error of the difference of two sides' means of logarithms, and its degrees of freedom.

    sides: for each the logarithm of a metric, one for each training. Their variance is pooled with SPREAD's.
    """
    known = [(len(side) - 1, variance(side)) for side in sides if len(side) > 1]
    known += [(SPREAD_FREEDOM, SPREAD[key] ** 2)] if key in SPREAD else []
    freedom = sum(count for count, _ in known)
    pooled = sum(count * value for count, value in known) / freedom
    return math.sqrt(pooled * sum(1 / len(side) for side in sides)), freedom


def detectable(error: float, freedom: float) -> float:
    """The smallest true difference that is found significant in 80% of comparisons, given its standard error."""
    return error * (student_quantile(freedom) + student_quantile(freedom, 0.6))  # 0.6: 80% lie below it, one-sided


def aligned(lines: list[list[str]]) -> str:
    """A table for the terminal: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) if i else cell.ljust(width)
                               for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines)
