"""What the benchmarks share: their options, our network in training, measured images, machine and tables.

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

from config import Config, UserError
from dataset import CLASSES, LabelledImages, to_uint8
from evaluation.classifier import load_classifier
from evaluation.reference import Reference
from sample import choose_labels, make_request, sample_images
from support import settings
from support.runtime import Runtime
from training.log import current_model
from training.optimizer import learning_rate
from training.state import new_state

HERE = Path(__file__).resolve().parent
QUALITY_IMAGES = 2000  # sampled images in each Fréchet distance
QUALITY = ("class-wise / baseline", "Fréchet / baseline", "mean intensity", "confident", "label accuracy")
OPTIONS: dict[str, dict[str, Any]] = {
    "--data-dir": {"metavar": "FOLDER", "help": "of the data, as for run.py"},
    "--device": {"default": "auto", "help": "cuda, mps, cpu or auto"},
    "--seed": {"type": int, "default": 0, "help": "every random number follows from it"},
    "--threads": {"type": int, "help": "of the CPU; unset: torch's choice"},
    "--images": {"type": int, "default": QUALITY_IMAGES, "help": "sampled for each Fréchet distance"},
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
    return settings.parse([*shared, *flags])


def run_script(main: Callable[[list[str]], None]) -> None:
    """main(arguments); a UserError is one line and exit status 2, as in run.py."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)


# Our network in training


class Trainee:
    """A new run of ours, trained a step at a time and sampled from as the modes do it, but without their saves."""

    def __init__(self, config: Config, runtime: Runtime, train: LabelledImages, test: LabelledImages) -> None:
        self.state = new_state(config, runtime, train, test)

    def step(self, progress: float) -> Tensor:
        """The loss of one step, `progress` (0 to 1) into the run; at 1 the learning rate is zero."""
        state = self.state
        loss = state.learner.step(state.step, learning_rate(state.config.train, state.step, progress))
        state.step += 1
        return loss

    def sample(self, count: int, **changes: Any) -> tuple[Tensor, Tensor]:
        """uint8 images [count, 1, 28, 28] by the averaged weights, and their labels; changes: knobs of sampling."""
        config, model = self.state.config, current_model(self.state)
        request = make_request(model, replace(config.sample, **changes), config.seed, count)
        return to_uint8(sample_images(model, request)[0]), request.labels


def count(network: nn.Module) -> tuple[int, float]:
    """Parameters, and 10^9 operations of one forward of one image, a multiply-add counted as two."""
    device = next(network.parameters()).device
    t = label = torch.ones(1, dtype=torch.long, device=device)
    # Attention as plain matrix products, since not every fused kernel is counted.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network.eval()(torch.zeros(1, 1, 28, 28, device=device), t, label)
    return sum(p.numel() for p in network.train().parameters()), counter.get_total_flops() / 1e9


# Measuring


def make_reference(train: LabelledImages, test: LabelledImages, images: int) -> Reference:
    """For so many images with the labels that a trained network is given by default, in the shipped classifier."""
    return Reference(train, test, choose_labels(None, 0, range(images), range(CLASSES)), load_classifier())


def measured(reference: Reference, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Distances as multiples of the baseline, with errors, and shares, of uint8 images [N, 1, 28, 28]."""
    found, _ = reference.measure(images, labels)
    row = {key: round(found[key].value, 4) for key in ("mean_intensity", "confident", "label_accuracy")}
    for key in ("class_frechet", "frechet", "texture"):
        if key in found:
            ratio, error = reference.baseline.ratio(key, found[key])
            row |= {key: round(ratio, 3), f"{key}_error": round(math.nan if error is None else error, 3)}
    return row


def quality(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Cells for QUALITY of what was measured."""
    distances = (f"{row[key]:.2f} ± {row[f'{key}_error']:.2f}" if key in row else "-"
                 for key in ("class_frechet", "frechet"))
    return *distances, f"{row['mean_intensity']:.3f}", f"{row['confident']:.1%}", f"{row['label_accuracy']:.1%}"


class Operations(TorchDispatchMode):
    """Counts the operations within the block that launch something, and those for whose result the host waits."""

    count = waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or "empty" in func.name() or "_record_function" in func.name())
        self.waits += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


# Telling


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
