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
LOG_SD_BETWEEN_SEEDS = {
    "class_frechet": 0.101, "frechet": 0.104, "texture": 0.242, "mean_intensity": 0.0092, "precision": 0.0058,
    "recall": 0.0064, "coverage": 0.0141, "confident": 0.0085, "label_accuracy": 0.0067, "zeros": 0.0027}
DOF_BETWEEN_SEEDS = 7


def jackknife_error(replicates: Tensor) -> float:
    """Standard error of a value from its B values without one block each, float64 [B] (Efron and Stein 1981).

    Near the baseline it is too large rather than too small, since a distance can't fall below what N images give.
    """
    blocks = len(replicates)
    return ((replicates - replicates.mean()).square().sum() * (blocks - 1) / blocks).sqrt().item()


@functools.cache
def student_quantile(dof: float, coverage: float = 0.95) -> float:
    """The |t| below which this share of Student's t distribution lies; many degrees of freedom: the normal one."""
    dof = min(dof, MANY)
    angle = np.linspace(0, math.pi / 2, 20_001)  # t = tan(angle) sqrt(dof)
    density = np.cos(angle) ** (dof - 1)
    below = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(dof) * math.tan(np.interp(coverage, below / below[-1], angle))


def between_trainings(sides: Sequence[Sequence[float]], key: str) -> tuple[float, float]:
    """Standard error of the difference of two sides' means of logarithms, and its degrees of freedom.

    sides: of each side the logarithm of a metric, one for each training; their variance is pooled with that of
    LOG_SD_BETWEEN_SEEDS.
    """
    variances = [(len(side) - 1, variance(side)) for side in sides if len(side) > 1]
    variances += [(DOF_BETWEEN_SEEDS, LOG_SD_BETWEEN_SEEDS[key] ** 2)] if key in LOG_SD_BETWEEN_SEEDS else []
    dof = sum(count for count, _ in variances)
    pooled = sum(count * value for count, value in variances) / dof
    return math.sqrt(pooled * sum(1 / len(side) for side in sides)), dof


def detectable(error: float, dof: float) -> float:
    """The smallest true difference that is found significant in 80% of comparisons, given its standard error."""
    return error * (student_quantile(dof) + student_quantile(dof, 0.6))  # 0.6: 80% lie below it, one-sided
