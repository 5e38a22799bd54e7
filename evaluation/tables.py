"""Tables for the terminal: their layout, and the numbers in them."""

from collections.abc import Sequence

from evaluation.reference import Baseline, Estimate, Metric


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) if i else cell.ljust(width)
                               for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines)


def metric_cell(metric: Metric, estimate: Estimate | None, baseline: Baseline) -> str:
    """A metric with its error: of distances multiples of the baseline, such as 2.25±0.20x; empty if there is none."""
    if estimate is None:
        return ""
    if not metric.distance:
        return _with_error(metric.form, estimate.value, estimate.error)
    return multiple(*baseline.ratio(metric.key, estimate))


def baseline_cell(metric: Metric, baseline: Baseline) -> str:
    """The baseline itself, with the standard deviation over its sets."""
    estimate = baseline.estimates[metric.key]
    if metric.distance:
        return multiple(1.0, (estimate.error or 0.0) / estimate.value)
    return metric_cell(metric, estimate, baseline)


def multiple(value: float, error: float | None) -> str:
    """Three digits of a multiple of the baseline, fewer decimals for larger ones; what needs more is hopeless."""
    if value >= 999.5:
        return ">999x"
    return _with_error(f"{{:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}}", value, error) + "x"


def _with_error(form: str, value: float, error: float | None) -> str:
    return form.format(value) + ("" if error is None else f"±{form.format(error)}")
