"""Do the intervals of mode compare hold? Two checkpoints are sampled with many seeds, and every comparison is counted.

    python benchmarks/intervals.py checkpoints/a/last.safetensors checkpoints/b/last.safetensors --seeds 20
    python benchmarks/intervals.py

How often the 95% interval of one seed covers the mean difference of all other seeds; how often the same weights with
other seeds differ significantly; and the distance of real images from others, of which the reference holds none. All in
the deciding metric.

Without checkpoints, false alarms and power of several trainings a side are simulated.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from common import Parser, config_of, machine, make_reference, run_script, table

from dataset import CLASSES, LabelledImages, to_uint8
from evaluation import statistics
from evaluation.differences import Difference, compare_networks
from evaluation.reference import DECIDING, Estimates, Reference
from sample import LoadedModel, load_checkpoint, make_request, sample_images
from support import loading
from support.runtime import Runtime


def deciding(a: Estimates, b: Estimates, reference: Reference) -> Difference:
    differences = compare_networks(a, b, reference.baseline)
    return next(difference for difference in differences if difference.metric.key == DECIDING)


def simulate(spread: float, trainings: int, power: bool = False, repeats: int = 40_000) -> float:
    """Share of comparisons that are significant, of so many trainings a side whose logarithm has this deviation.

    The two recipes are equal (false alarms) or, for the power, differ by what four of five comparisons should find.
    """
    random = np.random.default_rng([round(1000 * spread), trainings])
    a, b = random.normal(0, spread, (2, repeats, trainings))
    dof = 2 * (trainings - 1)
    shift = statistics.detectable(spread * math.sqrt(2 / trainings), dof) if power else 0.0
    change, error, dof = statistics.two_sample(a, b + shift)
    return float((np.abs(change) > statistics.student_quantile(dof) * error).mean())


def covers_the_rest(pairs: Sequence[Difference]) -> int:
    """In how many pairs the interval holds the mean difference of all others; intervals are relative to a.

    That mean scatters too, so a few more than one in twenty miss it: with 20 seeds 5.6%.
    """
    changes = [pair.b.value - pair.a.value for pair in pairs]
    means = [(sum(changes) - change) / (len(pairs) - 1) for change in changes]  # of all others
    return sum(pair.low <= mean_of_others / pair.a.value <= pair.high for pair, mean_of_others in zip(pairs, means))


def real_images(train: LabelledImages, count: int, seed: int) -> tuple[float, float]:
    """Images of one half of the training set, measured against the other: multiple of the baseline, and its error."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    half, rest = (train[part] for part in order.chunk(2))
    reference = make_reference(rest, half, count)
    labels = reference.baseline.labels
    images = torch.empty(count, *train.images.shape[1:], dtype=torch.uint8)
    for k in range(CLASSES):
        images[labels == k] = half.images[half.labels == k][:int((labels == k).sum())]
    ratio, error = reference.baseline.ratio(DECIDING, reference.measure(images, labels).estimates[DECIDING])
    return ratio, float("nan") if error is None else error


def main(argv: list[str]) -> None:
    parser = Parser(__doc__, "--data-dir", "--threads", "--images", "--seed")
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--halves", type=int, default=5, help="of the training set, for real against real")
    options = parser.parse(argv)
    if not options.checkpoints:
        sizes = (3, 4, 5)
        print(table(["deviation", *(f"{size} a side" for size in sizes), *(f"power, {size} a side" for size in sizes)],
                    [[spread, *(f"{simulate(spread, size, power):.1%}" for power in (False, True) for size in sizes)]
                     for spread in (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)]))
        return
    if len(options.checkpoints) != 2:
        parser.error("give two checkpoints, or none")
    runtime, config = Runtime(torch.device("cpu"), bf16=False, compile=False), config_of(options, "--guidance", "1")
    train, test = loading.load_both(config, runtime)
    models = [load_checkpoint(path, runtime) for path in options.checkpoints]
    reference = make_reference(train, test, options.images)

    def measure(model: LoadedModel, seed: int) -> Estimates:
        request = make_request(model, config.sample, seed, options.images)
        images = to_uint8(sample_images(model, request)[0])
        return reference.measure(images, request.labels).estimates

    seeds = range(options.seed, options.seed + options.seeds)
    a, again, b = ([measure(model, seed + shift) for seed in seeds]
                   for model, shift in ((models[0], 0), (models[0], 10_000), (models[1], 0)))
    pairs = [deciding(estimates_a, estimates_b, reference) for estimates_a, estimates_b in zip(a, b)]
    difference = mean(pair.b.value - pair.a.value for pair in pairs)
    width = mean((pair.high - pair.low) * pair.a.value for pair in pairs)
    significant = sum(pair.significant for pair in pairs)
    false_alarms = sum(deciding(first, second, reference).significant for first, second in zip(a, again))
    print(f"{machine(runtime.device)}; N = {options.images:,}, {options.seeds} seeds, {DECIDING}\n"
          f"two networks: {mean(pair.a.value for pair in pairs):.4f} and {mean(pair.b.value for pair in pairs):.4f}; "
          f"the mean difference is {difference:+.4f}; {covers_the_rest(pairs)} of {options.seeds} intervals (mean "
          f"width {width:.4f}) hold that of all other seeds; {significant} differ significantly\n"
          f"the same weights with other seeds: {false_alarms} of {options.seeds} differ significantly", flush=True)
    real = [real_images(train, options.images, seed) for seed in range(options.halves)]
    print("real against real, times the baseline: " + ", ".join(f"{ratio:.2f} ± {error:.2f}" for ratio, error in real))


if __name__ == "__main__":
    run_script(main)
