"""What the benchmarks share: their options, our network in training, judged images, machine and tables.

Importing it puts the project's root on the path, so every script here runs as `python benchmarks/NAME.py`.
"""

import argparse
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config as configs
import dataset
import drawing
import train
from config import CLASSES, NO_LABEL, Config, UserError
from dataset import Digits
from support.extractor import load_extractor
from support.runtime import Runtime, to_uint8
from yardstick import Yardstick

HERE = Path(__file__).resolve().parent
QUALITY_IMAGES = 2000  # drawn images in each Fréchet distance
OPTIONS: dict[str, dict[str, Any]] = {
    "--data-dir": {"metavar": "FOLDER", "help": "of the data, as for run.py"},
    "--device": {"default": "auto", "help": "cuda, mps, cpu or auto"},
    "--seed": {"type": int, "default": 0, "help": "every random number follows from it"},
    "--threads": {"type": int, "help": "of the CPU; unset: torch's choice"},
    "--images": {"type": int, "default": QUALITY_IMAGES, "help": "drawn for each Fréchet distance"},
}


# The command line


class Parser(argparse.ArgumentParser):
    """Options of a script, some of them shared; its docstring is the help, and what is wrong with them a UserError."""

    def __init__(self, doc: str | None, *shared: str) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        for flag in shared:
            self.add_argument(flag, **OPTIONS[flag])

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        options = self.parse_args(argv)
        if getattr(options, "threads", None):
            torch.set_num_threads(options.threads)
        return options


def config_of(options: argparse.Namespace | None, *flags: str) -> Config:
    """The config of run.py with these flags, and with those of the shared options that run.py has too."""
    shared = ["--dataset", "mnist"]
    for flag in ("--data-dir", "--device", "--seed"):
        value = getattr(options, flag[2:].replace("-", "_"), None)
        shared += [] if value is None else [flag, str(value)]
    return configs.parse([*shared, *flags])


def run_script(main: Callable[[list[str]], int | None]) -> None:
    """main(arguments), which returns the exit status; a UserError is one line and status 2, as in run.py."""
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        status = 2
    if status:
        sys.exit(status)


# Our network in training


def load_digits(config: Config, device: torch.device) -> tuple[Digits, Digits]:
    """Training and test images, on the device."""
    return dataset.load(config, "train").to(device), dataset.load(config, "test").to(device)


class Trainee:
    """A new run of ours, trained a step at a time and drawn from as the modes do it, but without their saves."""

    def __init__(self, config: Config, runtime: Runtime, digits: Digits, test: Digits) -> None:
        self.run = train.new_run(config, runtime, digits, test)
        self.run.network.train()
        self.learn = train.learner(self.run)

    def step(self, progress: float) -> Tensor:
        """train.training_step, `progress` (0 to 1) into the run; at 1 the rate is zero, and the weights stay."""
        self.run.optimizer.set_rate(train.learning_rate(self.run.config.train, self.run.step, progress))
        loss = train.training_step(self.learn, self.run)
        self.run.step += 1
        return loss

    def draw(self, count: int, **changes: Any) -> tuple[Tensor, Tensor]:
        """uint8 images [count, 1, 28, 28] by the averaged weights, and the labels that were asked for."""
        run = self.run
        trained = drawing.Trained(run.average, run.schedule, run.config, run.history)
        labels = trained.labels(None, run.config.seed, count)
        order = drawing.Order(replace(run.config.sample, **changes), run.config.seed, range(count), labels)
        return to_uint8(drawing.draw(trained, order, run.runtime)), labels


def count(network: nn.Module) -> tuple[int, float]:
    """Parameters, and 10^9 operations of one forward of one image, a multiply-add counted as two."""
    home = next(network.parameters()).device
    one = torch.ones(1, dtype=torch.long, device=home)
    # Attention as plain matrix products, since not every fused kernel is counted.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network.eval()(torch.zeros(1, 1, 28, 28, device=home), one, one)
    return sum(p.numel() for p in network.train().parameters()), counter.get_total_flops() / 1e9


# Measuring


class Judge:
    """The project's yardstick, for so many images with the labels that every contender is given."""

    def __init__(self, digits: Digits, test: Digits, images: int) -> None:
        classes = torch.bincount(digits.labels, minlength=CLASSES).tolist()
        self.yardstick = Yardstick(digits, test, drawing.choose_labels(None, 0, range(images), classes),
                                   load_extractor())
        self.extractor = load_extractor().digest

    def __call__(self, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        """Distances over their floors, with errors, and shares, of uint8 images [N, 1, 28, 28]; labels [N], if any."""
        labels = torch.full((len(images),), NO_LABEL) if labels is None else labels
        row = self.yardstick.measure(images, labels, overlap=False, neighbours=False)
        found: dict[str, float] = {}
        for key in ("ink", "sure", "asked"):
            found |= {key: round(row.values[key], 4)} if key in row.values else {}
        for key in ("within", "frechet", "texture"):
            if key in row.values:
                ratio, error = self.yardstick.over_floor(key, row)
                found |= {key: round(ratio, 3), f"{key}_error": round(error or math.nan, 3)}
        return found


def quality(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Cells for QUALITY of what a judge found."""
    distances = (f"{row[key]:.2f} ± {row[f'{key}_error']:.2f}" if key in row else "-" for key in ("within", "frechet"))
    return *distances, f"{row['ink']:.3f}", f"{row['sure']:.1%}", f"{row['asked']:.1%}" if "asked" in row else "-"


class Operations(TorchDispatchMode):
    """Counts the operations that are launched within the block, and those for whose result the host waits."""

    count = waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        self.waits += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


# Telling


QUALITY = ("in class / floor", "Fréchet / floor", "ink", "sure", "as asked")


def machine(device: torch.device) -> str:
    """Processor and threads, or GPU, and the version of torch, in one line."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    threads = torch.get_num_threads()
    text = f"{processor}, {threads} thread{'s' * (threads != 1)} on {os.cpu_count()} cores"
    if device.type == "cuda":
        text = f"{torch.cuda.get_device_name(device)}, {text}"
    return f"{text}, torch {torch.__version__}, Python {platform.python_version()}"


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table whose columns are aligned, so that a terminal shows it as well; numbers to the right."""
    cells = [list(headings)] + [[str(cell) for cell in row] for row in rows]
    lines: list[list[str]] = [[] for _ in cells]
    rule = []
    for heading, *column in zip(*cells):
        width = max(3, *map(len, (heading, *column)))
        right = bool(column) and all(cell[:1].isdigit() or cell in ("", "-") for cell in column)
        for line, cell in zip(lines, (heading, *column)):
            line.append(cell.rjust(width) if right else cell.ljust(width))
        rule.append("-" * (width - 1) + (":" if right else "-"))
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))
