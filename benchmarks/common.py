"""What the benchmarks share: the machine in words, fair timing, the quality of drawn images, and Markdown tables.

Importing it puts the project's root on the path, so every script here runs as `python benchmarks/NAME.py`.
"""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import metrics  # noqa: E402
from dataset import Digits, load_mnist  # noqa: E402

QUALITY_IMAGES = 2000  # drawn images in each Fréchet distance


def machine(device: torch.device) -> str:
    """Processor and threads, or GPU, and the version of torch, in one line."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    elif sys.platform == "darwin":
        processor = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True).stdout.strip()
    threads = torch.get_num_threads()
    text = f"{processor}, {threads} thread{'s' * (threads != 1)} on {os.cpu_count()} cores"
    if device.type == "cuda":
        text = f"{torch.cuda.get_device_name(device)}, {text}"
    return f"{text}, torch {torch.__version__}, Python {platform.python_version()}"


def synchronize(device: torch.device) -> None:
    """Waits until the device is done with what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def interleaved(work: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device,
                calls: int = 1) -> dict[str, float]:
    """Median seconds a call of each, measured in turn (A B C A B C ...), so that a busy machine is unfair to none.

    Each is warmed up once; `calls` of them make one measurement.
    """
    for function in work.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, function in work.items():
            synchronize(device)
            began = time.perf_counter()
            for _ in range(calls):
                function()
            synchronize(device)
            seconds[name].append((time.perf_counter() - began) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


@dataclass(frozen=True)
class Judge:
    """Measures drawn images against the test images, as mode evaluate does; `floor` is the distance of real images."""

    extractor: metrics.Extractor
    test_features: Tensor
    floor: float
    device: torch.device

    def __call__(self, images: Tensor, asked: Tensor | None = None) -> dict[str, float]:
        """Fréchet distance over the floor and the share that the classifier is sure of, for uint8 images [N, 1, 28, 28]."""
        found = metrics.extract(self.extractor, images, device=self.device)
        distance = metrics.frechet_distance(found.features, self.test_features)
        row = {"frechet": distance, "over_floor": distance / self.floor, "sure": metrics.sure_share(found.probabilities)}
        if asked is not None:
            row["asked"] = metrics.drawn_as_asked(found.probabilities, asked)
        return {name: round(value, 4) for name, value in row.items()}


def make_judge(train: Digits, test: Digits, count: int = QUALITY_IMAGES, device: torch.device | str = "cpu") -> Judge:
    """A judge whose floor is the mean distance of five random sets of `count` real training images."""
    extractor = metrics.load_extractor()
    test_features = metrics.extract(extractor, test.images, device=device).features
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    sets = [metrics.extract(extractor, train.images[chosen], device=device).features for chosen in order.split(count)[:5]]
    floor = statistics.mean(metrics.frechet_distance(features, test_features) for features in sets)
    return Judge(extractor, test_features, floor, torch.device(device))


def load_digits(root: Path) -> tuple[Digits, Digits]:
    """MNIST's training and test images."""
    return load_mnist(root, "train"), load_mnist(root, "test")


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table whose columns are aligned, so that a terminal shows it as well; numbers to the right."""
    cells = [list(headings)] + [[str(cell) for cell in row] for row in rows]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(headings))]
    right = [bool(rows) and all(row[i][:1].isdigit() or row[i] in ("", "-") for row in cells[1:]) for i in range(len(headings))]
    lines = ["| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)) + " |" for row in cells]
    rule = "| " + " | ".join("-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right)) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])
