"""Do the intervals of mode compare hold? Two checkpoints are drawn with many seeds, and every comparison is counted.

    python benchmarks/verdicts.py checkpoints/a/last.safetensors checkpoints/b/last.safetensors --seeds 20

How often the 95% interval of one seed covers the mean difference over all seeds; how often the same weights with other
seeds are called different; and how far real images are from real images that no reference holds. Each in the headline.
"""

from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from common import Parser, config_of, load_digits, machine, run_script

from config import CLASSES
from dataset import Digits
from drawing import Order, Trained, choose_labels, draw, load_trained
from support.extractor import load_extractor
from support.runtime import Runtime, to_uint8
from verdict import HEADLINE, Verdict, verdicts
from yardstick import Row, Yardstick


def headline(a: Row, b: Row, yardstick: Yardstick) -> Verdict:
    found = verdicts([a], [b], yardstick.floor, len(yardstick.sets))
    return next(verdict for verdict in found if verdict.measure.key == HEADLINE)


def real_images(digits: Digits, count: int, seed: int) -> tuple[float, float]:
    """Real images out of one half of the training set, judged by the other: ratio to the floor, and its error."""
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    judged, rest = (Digits(digits.images[part], digits.labels[part]) for part in order.chunk(2))
    labels = choose_labels(None, seed, range(count), torch.bincount(digits.labels, minlength=CLASSES).tolist())
    images = torch.empty(count, *digits.images.shape[1:], dtype=torch.uint8)
    for k in range(CLASSES):
        images[labels == k] = judged.images[judged.labels == k][:int((labels == k).sum())]
    yardstick = Yardstick(rest, judged, labels, load_extractor())
    ratio, error = yardstick.over_floor(HEADLINE, yardstick.measure(images, labels, overlap=False, neighbours=False))
    return ratio, error or float("nan")


def main(argv: list[str]) -> None:
    parser = Parser(__doc__, "--data-dir", "--threads", "--images", "--seed")
    parser.add_argument("checkpoints", nargs=2, type=Path, metavar="CHECKPOINT")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--halves", type=int, default=5, help="of the training set, for real against real")
    options = parser.parse(argv)
    runtime, config = Runtime(torch.device("cpu"), bf16=False, compile=False), config_of(options, "--guidance", "1")
    train, test = load_digits(config, runtime.device)
    networks = [load_trained(replace(config, sample=replace(config.sample, checkpoint=path)), runtime)
                for path in options.checkpoints]
    yardstick = Yardstick(train, test, networks[0].labels(None, 0, options.images), load_extractor())

    def row(trained: Trained, seed: int) -> Row:
        labels = trained.labels(None, seed, options.images)
        images = draw(trained, Order(config.sample, seed, range(options.images), labels), runtime)
        return yardstick.measure(to_uint8(images), labels, overlap=False, neighbours=False)

    seeds = range(options.seed, options.seed + options.seeds)
    a, again, b = ([row(trained, seed + shift) for seed in seeds]
                   for trained, shift in ((networks[0], 0), (networks[0], 10_000), (networks[1], 0)))
    pairs = [headline(one, other, yardstick) for one, other in zip(a, b)]
    difference = mean(pair.b - pair.a for pair in pairs)
    covered = sum((pair.low or 0) <= difference <= (pair.high or 0) for pair in pairs)
    width = mean((pair.high or 0) - (pair.low or 0) for pair in pairs)
    called = sum(pair.word == "better" or pair.word == "worse" for pair in pairs)
    different = sum(headline(one, other, yardstick).word != "no difference shown" for one, other in zip(a, again))
    print(f"{machine(runtime.device)}; N = {options.images:,}, {options.seeds} seeds, {HEADLINE}\n"
          f"two networks: {mean(pair.a for pair in pairs):.4f} and {mean(pair.b for pair in pairs):.4f}; the mean "
          f"difference {difference:+.4f} lies in {covered} of {options.seeds} intervals (mean width {width:.4f}); "
          f"{called} called different\n"
          f"the same weights with other seeds: {different} of {options.seeds} called different", flush=True)
    found = [real_images(train, options.images, seed) for seed in range(options.halves)]
    print("real against real, times the floor: " + ", ".join(f"{ratio:.2f} ± {error:.2f}" for ratio, error in found))


if __name__ == "__main__":
    run_script(main)
