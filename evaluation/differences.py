"""By how much two sides differ in each metric, with a 95% interval: of two networks, or of several trainings a side."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from evaluation import statistics
from evaluation.reference import METRICS, Baseline, Estimates, Metric


class Difference(NamedTuple):
    """One metric of both sides, and the 95% interval of the change: relative for distances, else absolute."""

    metric: Metric
    a: float
    b: float
    change: float
    low: float
    high: float
    detectable: float  # the true change that four of five such comparisons would find significant
    dof: float  # degrees of freedom of the interval

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0."""
        return not self.low <= 0 <= self.high

    def show(self, value: float) -> str:
        """A change as a text: per cent for distances, percentage points for shares."""
        return f"{100 * value:+.1f}%" if self.metric.distance else f"{100 * value:+.2f} pt"


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
        differences.append(Difference(metric, value_a, value_b, change, low, high,
                                      scale * statistics.detectable(error, dof), dof))
    return differences


def compare_trainings(a: Sequence[Estimates], b: Sequence[Estimates]) -> list[Difference]:
    """Of each metric that all trainings have: an interval of the mean logarithms.

    A training is one number, and the error follows from the variance between trainings.
    """
    differences = []
    for metric in common_metrics([*a, *b]):
        logs = [[math.log(max(training[metric.key].value, 1e-9)) for training in side] for side in (a, b)]
        mean_a, mean_b = map(fmean, logs)
        error, dof = statistics.between_trainings(logs, metric.key)
        scale = 1.0 if metric.distance else math.exp(mean_a)
        half = statistics.student_quantile(dof) * error
        change, low, high, detectable = (scale * math.expm1(log_change) for log_change in (
            mean_b - mean_a, mean_b - mean_a - half, mean_b - mean_a + half, statistics.detectable(error, dof)))
        differences.append(Difference(metric, math.exp(mean_a), math.exp(mean_b), change, low, high, detectable, dof))
    return differences


def common_metrics(measured: Sequence[Estimates]) -> list[Metric]:
    """The metrics that all of these have."""
    return [metric for metric in METRICS if all(metric.key in estimates for estimates in measured)]
