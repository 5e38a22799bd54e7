"""Where the time goes, counted before it is measured: two floors, and each phase's distance from them.

    python benchmarks/speed.py --threads 2 > speed.md
    python benchmarks/speed.py --device cuda

Whatever is compared is measured in turn (A B A B ...) and given as a median, so a busy machine is unfair to none.
The reference network is a re-creation, from its public description, of the one this project grew out of: matched in
parameters and operations, not in every layer. No trained weights are needed: time does not depend on them.
"""

import contextlib
import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from common import Parser, Trainee, config_of, count, interleaved, load_digits, machine, peak_memory, run_script, table
from torch import Tensor, nn

import drawing
import train
from config import RESOLUTIONS
from diffusion import diffusion_loss, make_schedule
from model import UNet, time_features
from support import runtime as runtimes
from support.optimizer import Optimizer
from support.runtime import Clock, to_unit

# The calls of train.training_step that make up its time.
PHASES: dict[str, tuple[Any, str]] = {
    "batch selection": (train, "batch"), "forward and loss": (train, "diffusion_loss"),
    "backward": (Tensor, "backward"), "clip": (nn.utils, "clip_grad_norm_"), "optimizer": (Optimizer, "step"),
    "average": (train, "update_average"), "clear gradients": (UNet, "zero_grad")}
BARE = ("batch selection", "forward and loss", "backward", "clear gradients")  # no training can do without these
REFERENCE_BATCH, REFERENCE_STEPS = 128, 300
FEW = 10  # steps of ancestral sampling, from which all of them are extrapolated


class ReferenceBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and ReLU, added to the input."""

    def __init__(self, channels_in: int, channels: int, width: int) -> None:
        super().__init__()
        self.one, self.norm_one = nn.Conv2d(channels_in, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.two, self.norm_two = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.time = nn.Linear(width, channels)
        self.skip = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = F.relu(self.norm_one(self.one(x))) + self.time(embedding)[:, :, None, None]
        return self.skip(x) + F.relu(self.norm_two(self.two(h)))


class Reference(nn.Module):
    """A residual U-Net with BatchNorm and ReLU at 28, 14, 7 and 3 pixels: (x, t, label) -> noise; no use for labels."""

    def __init__(self, channels: tuple[int, ...] = (64, 64, 128, 256), width: int = 128) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.down = nn.ModuleList(ReferenceBlock(before, here, width) for before, here in pairwise((1, *channels)))
        self.up = nn.ModuleList(ReferenceBlock(here + below, here, width) for here, below in pairwise(channels))
        self.head = nn.Conv2d(channels[0], 1, 1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        embedding = self.time(time_features(t, self.width))
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x, embedding)
            skips.append(x)
        x = skips.pop()
        for block, skip in zip(reversed(self.up), reversed(skips)):
            x = block(torch.cat([F.interpolate(x, size=skip.shape[-2:]), skip], dim=1), embedding)
        return self.head(x)


# What is timed


def reference_step(ours: train.Run) -> Callable[[], None]:
    """One step of the reference recipe: Adam at 1e-4, linear steps, noise prediction, uniform t, no average."""
    network = Reference().to(ours.runtime.device).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    schedule = make_schedule(replace(ours.config.diffusion, timesteps=REFERENCE_STEPS, schedule="linear",
                                     prediction="noise", weighting="none"))
    digits, size, device = ours.train, (REFERENCE_BATCH,), ours.runtime.device

    def step() -> None:
        chosen = torch.randint(len(digits), size, device=device)
        t = torch.randint(1, REFERENCE_STEPS + 1, size, device=device)
        x0, labels = to_unit(digits.images[chosen]), digits.labels[chosen]
        loss = diffusion_loss(network, schedule, x0, labels, t, torch.randn_like(x0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def convolution(run: train.Run, resolution: int, channels: int) -> Callable[[], None]:
    """A plain 3x3 convolution, forward and backward, at one of the model's shapes."""
    shape = run.config.train.batch_size, channels, resolution, resolution
    layer = nn.Conv2d(channels, channels, 3, padding=1).to(run.runtime.device).to(memory_format=torch.channels_last)
    x = torch.randn(shape, device=run.runtime.device).to(memory_format=torch.channels_last).requires_grad_()

    def both() -> None:
        with run.runtime.autocast():
            y = layer(x)
        y.backward(torch.ones_like(y))
        layer.zero_grad()
        x.grad = None

    return both


def measure_phases(trainee: Trainee, steps: int) -> dict[str, float]:
    """Median seconds of each phase of train.training_step, with a wait for the device before and after each."""
    clock = Clock(trainee.run.runtime)

    def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            clock.lap("between")
            result = function(*args, **options)
            clock.lap(phase)
            return result

        return call

    with contextlib.ExitStack() as patches:
        for phase, (owner, name) in PHASES.items():
            patches.enter_context(mock.patch.object(owner, name, timed(phase, getattr(owner, name))))
        for _ in range(steps):
            trainee.step(progress=1)
    return {phase: statistics.median(took for name, took in clock.laps if name == phase) for phase in PHASES}


# What is counted, and told


def show(title: str, headings: tuple[str, ...], rows: list[tuple[Any, ...]], note: str = "") -> None:
    print(f"\n## {title}\n\n{table(headings, rows)}")
    if note:
        print(f"\n{note}")


def count_layers(network: nn.Module) -> tuple[dict[int, float], float]:
    """GFLOP of an image's convolutions at each resolution, and the number of values that all layers put out."""
    by_resolution: dict[int, float] = {}
    values = 0

    def look(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal values
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.GroupNorm, nn.BatchNorm2d)):
            values += output.numel()
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            size = output.shape[-1]
            places = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output  # where a whole kernel is used
            gflop = 2 * layer.weight.numel() * places.shape[-1]**2 / 1e9
            by_resolution[size] = by_resolution.get(size, 0.0) + gflop

    for layer in network.modules():
        layer.register_forward_hook(look)
    count(network)
    return by_resolution, values


def show_floors(run: train.Run, rates: dict[int, float], repeats: int) -> float:
    """Counts operations and bytes, and returns the seconds per training image below which no step can come."""
    runtime, width = run.runtime, 2 if run.runtime.bf16 else 4
    source = torch.ones(64 * 2**20, device=runtime.device)
    target = torch.empty_like(source)
    copied = 2e-9 * source.nbytes / interleaved({"copy": lambda: target.copy_(source)}, repeats, runtime)["copy"]

    parameters, gflop = count(UNet(run.config.model))
    by_resolution, values = count_layers(UNet(run.config.model))
    rest = gflop - sum(by_resolution.values())  # linear layers and attention, at the rate of the smallest images
    operations = sum(3 * part / rates[size] for size, part in by_resolution.items()) + 3 * rest / rates[7]
    # Forward writes and reads each layer's output; backward reads it again, and writes and reads its gradient.
    activations = 5 * width * values / 1e6
    # Weights read twice and their gradients written once; optimizer and average read and write five tensors like them.
    weights = (3 + 10) * 4 * parameters / run.config.train.batch_size / 1e6
    moving = (activations + weights) / (1e3 * copied)

    where = ", ".join(f"{by_resolution[size]:.3f} at {size}x{size}" for size in RESOLUTIONS)
    speeds = ", ".join(f"{rates[size]:,.0f}" for size in RESOLUTIONS)
    show("Floors, counted", ("floor", "count per training image", "at the rate of", "images/s"), [
        ("operations", f"{3 * gflop:.3f} GFLOP (forward {where}, {rest:.3f} else)",
         f"{speeds} GFLOP/s: 3x3 convolutions at {', '.join(map(str, RESOLUTIONS))} pixels", f"{1 / operations:,.0f}"),
        ("bytes", f"{activations + weights:.1f} MB ({activations:.1f} activations, {weights:.1f} weights)",
         f"{copied:,.0f} GB/s: a copy", f"{1 / moving:,.0f}")])
    return max(operations, moving)


def show_training(trainee: Trainee, took: dict[Any, float], floor: float, steps: int) -> None:
    """The phases of a step, and our steps beside the reference's; `took`: the seconds of whole steps of both."""
    batch, laps = trainee.run.config.train.batch_size, measure_phases(trainee, steps)
    shares = {phase: lap / sum(laps.values()) for phase, lap in laps.items()} | {"all": 1.0}
    floor_shares = {"forward and loss": 1 / 3, "backward": 2 / 3, "all": 1.0}  # of the operations
    show("Training, measured", ("phase", f"ms a step of {batch}", "share", "times the floor"), [
        (phase, f"{1e3 * share * took['ours']:.2f}", f"{share:.1%}",
         f"{share * took['ours'] / (floor * batch * floor_shares[phase]):.2f}" if phase in floor_shares else "")
        for phase, share in shares.items()])

    ours, theirs = batch / took["ours"], REFERENCE_BATCH / took["reference"]
    bare = ours / sum(shares[phase] for phase in BARE)
    sizes = [(f"{parameters / 1e6:.2f} M", f"{gflop:.3f}")
             for parameters, gflop in (count(UNet(trainee.run.config.model)), count(Reference()))]
    show("Training, compared", ("training", "parameters", "GFLOP", "images/s", "times the reference"), [
        ("default model, train.training_step", *sizes[0], f"{ours:,.0f}", f"{ours / theirs:.2f}"),
        ("the same without clip, optimizer and average", *sizes[0], f"{bare:,.0f}", ""),
        (f"reference, re-created, batch {REFERENCE_BATCH}", *sizes[1], f"{theirs:,.0f}", "1.00")])


def show_drawing(trainee: Trainee, repeats: int) -> None:
    """The default sampler against ancestral sampling over all noise levels."""
    options, timesteps = trainee.run.config.sample, trainee.run.schedule.timesteps
    took = interleaved({"guided": lambda: trainee.draw(256), "plain": lambda: trainee.draw(256, guidance=1.0),
                        "ancestral": lambda: trainee.draw(256, guidance=1.0, sampler="ddpm", steps=FEW)},
                       max(3, repeats // 2), trainee.run.runtime)
    default, ancestral = f"{options.sampler}, {options.steps} steps", took["ancestral"] * timesteps / FEW
    show("Drawing 256 images", ("sampler", "network evaluations", "seconds"), [
        (f"{default} (default)", drawing.evaluations(trainee.run.schedule, options), f"{took['guided']:.2f}"),
        (f"{default}, --guidance 1", f"{options.steps:,}", f"{took['plain']:.2f}"),
        (f"ddpm, ancestral, extrapolated from {FEW} steps", f"{timesteps:,}", f"{ancestral:.1f}")])


def main(argv: list[str]) -> None:
    parser = Parser(__doc__, "--data-dir", "--device", "--precision", "--threads", "--repeats")
    parser.add_argument("--calls", type=int, default=3, help="training steps in one measurement")
    parser.add_argument("--steps", type=int, default=20, help="training steps in the table of phases")
    options = parser.parse(argv)
    config = config_of(options, "--compile", "off")
    with runtimes.start(config) as runtime:
        trainee = Trainee(config, runtime, *load_digits(config, runtime.device))
        for _ in range(10):
            trainee.step(progress=1)
        memory = peak_memory(runtime.device)  # before anything else is held
        # Rates and steps are measured in turn, so that the distance from the floor is of one and the same moment.
        work: dict[Any, Callable[[], Any]] = {"ours": lambda: trainee.step(progress=1)}
        work |= {"reference": reference_step(trainee.run)}
        work |= {size: convolution(trainee.run, size, width) for size, width in zip(RESOLUTIONS, config.model.channels)}
        took = interleaved(work, options.repeats, runtime, options.calls)
        rates = {size: 3 * 2 * 9 * width**2 * size**2 * config.train.batch_size / took[size] / 1e9
                 for size, width in zip(RESOLUTIONS, config.model.channels)}
        print(f"{machine(runtime.device)}, {'bf16' if runtime.bf16 else 'fp32'}")
        floor = show_floors(trainee.run, rates, options.repeats)
        show_training(trainee, took, floor, options.steps)
        print(f"\nPeak memory of training: {memory / 1e9:.2f} GB.")
        show_drawing(trainee, options.repeats)


if __name__ == "__main__":
    run_script(main)
