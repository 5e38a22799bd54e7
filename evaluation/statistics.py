"""Standard errors, intervals, and what can be said of the difference between two sides."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK = 100  # images in a jackknife block, at least
FEWEST_BLOCKS, MOST_BLOCKS = 20, 100  # below, a jackknife says nothing; above, it takes longer and gains nothing
FEWEST_FOR_ERRORS = BLOCK * FEWEST_BLOCKS  # images
MANY = 10_000  # degrees of freedom from which on Student's t is as good as normal


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


def two_sample(a: np.ndarray, b: np.ndarray) -> tuple[Any, Any, int]:
    """Mean of b [..., m] minus mean of a [..., n], its standard error, and the n + m - 2 degrees of freedom.

    The variance is pooled over both samples, and nothing else is known of it (Student 1908).
    """
    dof = a.shape[-1] + b.shape[-1] - 2
    squares = sum(np.square(x - x.mean(-1, keepdims=True)).sum(-1) for x in (a, b))
    return b.mean(-1) - a.mean(-1), np.sqrt(squares / dof * (1 / a.shape[-1] + 1 / b.shape[-1])), dof


def sampling_variance(sides: Sequence[Sequence[Tensor]]) -> float:
    """The part of the variance that `two_sample` pools which is due to the images that were sampled, not to training.

    sides: of each side the jackknife replicates [B] of its networks. All sample the same seeds, so part of their errors
    is common and cancels in the deviations from the side's mean.
    """
    deviations = [side - side.mean(0) for side in (torch.stack([*side]) for side in sides)]  # [n, B]
    dof = sum(len(side) for side in sides) - len(sides)
    return sum(jackknife_error(replicates) ** 2 for side in deviations for replicates in side) / dof


def detectable(error: float, dof: float) -> float:
    """The true difference that 80% of comparisons find significant, given its standard error."""
    return error * (student_quantile(dof) + student_quantile(dof, 0.6))  # 0.6: 80% lie below it, one-sided
