"""Errors of what was measured, what of a difference is chance, and tables for the terminal."""

import functools
import math
from typing import Any

import numpy as np
from torch import Tensor

MANY = 10_000  # degrees of freedom, from which on Student's t is as good as normal


def jackknife_error(left_out: Tensor) -> float:
    """Standard error of a value from those without one of B blocks each, float64 [B] (Efron and Stein 1981).

    Near the floor it is on the wide side, since a distance can't fall below what N images give.
    """
    blocks = len(left_out)
    return ((left_out - left_out.mean()).square().sum() * (blocks - 1) / blocks).sqrt().item()


def student_p(t: float, freedom: float) -> float:
    """Two-sided p-value of Student's t; inf degrees of freedom: the normal distribution."""
    angle, below = _student(freedom)
    return float(1 - np.interp(math.atan(abs(t) / math.sqrt(min(freedom, MANY))), angle, below))


def student_limit(freedom: float) -> float:
    """The |t| that 95% of the draws stay below."""
    angle, below = _student(freedom)
    return math.sqrt(min(freedom, MANY)) * math.tan(np.interp(0.95, below, angle))


@functools.cache
def _student(freedom: float) -> tuple[Any, Any]:
    """P(|t| < tan(angle) sqrt(freedom)): with that substitution the density is a power of the cosine."""
    angle = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(angle) ** (min(freedom, MANY) - 1)
    below = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return angle, below / below[-1]


def holm(p_values: list[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): at most one in twenty families has one below 0.05 by chance."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def aligned(lines: list[list[str]]) -> str:
    """A table for the terminal: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) if i else cell.ljust(width)
                               for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines)
