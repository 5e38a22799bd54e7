"""Where the time goes, counted before it is measured: two floors, each phase's distance from them, and the levers.

    python benchmarks/speed.py --threads 2 --markdown speed.md
    python benchmarks/speed.py --device cuda --compile

Whatever is compared is measured in turn (A B A B ...) and given as a median, so a busy machine is unfair to none.
The reference network is a re-creation, from its public description, of the one this project grew out of: matched in
parameters and operations, not in every layer. No trained weights are needed: time does not depend on them.
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import interleaved, load_digits, machine, synchronize, table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import config as configs
import dataset
import runtime as runtimes
import sample
import train
from config import Config, UserError
from diffusion import NoiseSchedule, diffusion_loss, make_schedule
from model import UNet, gflop_per_image, time_features
from runtime import Runtime, to_unit

PHASES = ("batch selection", "forward and loss", "backward", "clip", "optimizer", "average", "clear gradients")
FLOOR_SHARE = {"forward and loss": 1 / 3, "backward": 2 / 3}  # of the operations
CALLS = 5  # of a convolution in one measurement


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


def count(network: nn.Module) -> tuple[int, float, dict[int, float], float]:
    """Parameters; GFLOP of one image; those of its convolutions at each resolution; and 10^6 values that layers put out."""
    by_resolution: dict[int, float] = {}
    values = 0.0

    def look(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal values
        convolutions = (nn.Conv2d, nn.ConvTranspose2d)
        if isinstance(layer, (*convolutions, nn.Linear, nn.GroupNorm, nn.BatchNorm2d)):
            values += output.numel() / 1e6
        if isinstance(layer, convolutions):
            size = output.shape[-1]
            places = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output  # where a whole kernel is used
            gflop = 2 * layer.weight.numel() * places.shape[-1]**2 / 1e9
            by_resolution[size] = by_resolution.get(size, 0.0) + gflop

    hooks = [layer.register_forward_hook(look) for layer in network.modules() if not list(layer.children())]
    home = next(network.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 1, 28, 28, device=home), torch.ones(1, device=home),
                       torch.zeros(1, dtype=torch.long, device=home))
    network.train()
    for hook in hooks:
        hook.remove()
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops() / 1e9, by_resolution, values


def convolution(config: Config, runtime: Runtime, resolution: int, channels: int) -> tuple[Callable[[], None], float]:
    """A plain 3x3 convolution, forward and backward, at one of the model's shapes, and its GFLOP."""
    batch = config.train.batch_size
    layer = nn.Conv2d(channels, channels, 3, padding=1).to(runtime.device, memory_format=torch.channels_last)
    x = torch.randn(batch, channels, resolution, resolution, device=runtime.device).to(memory_format=torch.channels_last)
    x.requires_grad_()

    def both() -> None:
        for _ in range(CALLS):
            with runtime.autocast():
                y = layer(x)
            y.backward(torch.ones_like(y))
            layer.zero_grad()
            x.grad = None

    return both, CALLS * 3 * 2 * 9 * channels**2 * resolution**2 * batch / 1e9


def bandwidth(device: torch.device, repeats: int) -> float:
    """GB/s of copying 256 MB, which reads and writes each byte."""
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, repeats, device)["copy"]
    return 2 * source.numel() * 4 / seconds / 1e9


def measure_phases(state: train.State, config: Config, schedule: NoiseSchedule, digits: dataset.Digits, forward: nn.Module,
                   runtime: Runtime, steps: int) -> dict[str, float]:
    """Median seconds of each phase of a step: the parts of train.training_step, with a wait for the device after each."""
    laps: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for _ in range(steps):
        times = [_now(runtime)]
        images, labels, t, noise = train.batch(config, state.step, digits, schedule, runtime)
        times.append(_now(runtime))
        with runtime.autocast():
            loss = diffusion_loss(forward, schedule, images, labels, t, noise, config.train.clip_loss).mean()
        times.append(_now(runtime))
        loss.backward()
        times.append(_now(runtime))
        nn.utils.clip_grad_norm_(state.network.parameters(), config.train.grad_clip)
        times.append(_now(runtime))
        state.optimizer.step()
        times.append(_now(runtime))
        state.average.update_parameters(state.network)
        times.append(_now(runtime))
        state.network.zero_grad()
        times.append(_now(runtime))
        state.step += 1
        for phase, before, after in zip(PHASES, times, times[1:]):
            laps[phase].append(after - before)
    return {phase: statistics.median(values) for phase, values in laps.items()}


def _now(runtime: Runtime) -> float:
    synchronize(runtime.device)
    return time.perf_counter()


def reference_step(digits: dataset.Digits, config: Config, runtime: Runtime) -> Callable[[], None]:
    """One step of the reference recipe: batch 128, Adam at 1e-4, 300 linear steps, noise prediction, uniform t, no average."""
    network = Reference().to(runtime.device).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    schedule = make_schedule(replace(config.diffusion, timesteps=300, schedule="linear", prediction="noise", weighting="none"))
    size, device = 128, runtime.device

    def step() -> None:
        chosen = torch.randint(len(digits), (size,), device=device)
        t = torch.randint(1, 301, (size,), device=device)
        x0, labels = to_unit(digits.images[chosen]), digits.labels[chosen]
        loss = diffusion_loss(network, schedule, x0, labels, t, torch.randn_like(x0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def our_step(state: train.State, config: Config, schedule: NoiseSchedule, digits: dataset.Digits, forward: nn.Module,
             runtime: Runtime) -> Callable[[], None]:
    """The real train.training_step, at a rate so low that the weights stay what they are."""
    def step() -> None:
        state.optimizer.set_rate(1e-12)
        train.training_step(forward, state, schedule, digits, config, runtime)
        state.step += 1

    return step


def gradient_step(config: Config, schedule: NoiseSchedule, digits: dataset.Digits, runtime: Runtime,
                  memory_format: torch.memory_format) -> Callable[[], None]:
    """Forward, loss and backward alone, in one precision and memory layout."""
    network = UNet(config.model).to(runtime.device, memory_format=memory_format).train()
    images, labels, t, noise = train.batch(config, 0, digits, schedule, runtime)
    forward = runtimes.compiled(network, runtime)

    def step() -> None:
        with runtime.autocast():
            loss = diffusion_loss(forward, schedule, images, labels, t, noise, config.train.clip_loss).mean()
        loss.backward()
        network.zero_grad()

    return step


def compile_times(config: Config, schedule: NoiseSchedule, digits: dataset.Digits, runtime: Runtime) -> tuple[float, float]:
    """Seconds of the first compiled step with an empty cache, and again with the cache that it left."""
    seconds = []
    with tempfile.TemporaryDirectory() as cache:
        with torch._inductor.utils.fresh_cache(dir=cache) if hasattr(torch._inductor.utils, "fresh_cache") else \
                torch._inductor.utils.fresh_inductor_cache(dir=cache):
            for _ in range(2):
                torch._dynamo.reset()
                began = _now(runtime)
                gradient_step(config, schedule, digits, replace(runtime, compile=True), torch.channels_last)()
                seconds.append(_now(runtime) - began)
    return seconds[0], seconds[1]


def peak_memory(device: torch.device) -> str:
    """The most memory that this process has held so far, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB of the GPU's"
    if platform.system() == "Windows":
        return "not known on Windows"
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"


def run(options: argparse.Namespace, say: Callable[..., None]) -> None:
    flags = ["--data-dir", str(options.data_dir), "--device", options.device, "--precision", options.precision,
             "--compile", "on" if options.compile else "auto"]
    config = configs.parse(flags)
    repeats = options.repeats
    with runtimes.start(config) as runtime:
        device, batch = runtime.device, config.train.batch_size
        digits = load_digits(config.data_dir)[0].to(device)
        schedule = make_schedule(config.diffusion)
        state = train.new_state(config, runtime, {})
        forward = runtimes.compiled(state.network, runtime)
        state.network.train()
        step = our_step(state, config, schedule, digits, forward, runtime)
        for _ in range(10):
            step()
        memory = peak_memory(device)  # before anything else is held

        gflop = gflop_per_image(config.model)
        parameters, _, by_resolution, values = count(UNet(config.model))
        # Rates and steps are measured in turn, so that the distance from the floor is of one and the same moment.
        plain_convolutions = {size: convolution(config, runtime, size, channels)
                              for size, channels in zip(configs.RESOLUTIONS, config.model.channels)}
        work: dict[Any, Callable[[], Any]] = {size: both for size, (both, _) in plain_convolutions.items()}
        work |= {"ours": step, "reference": reference_step(digits, config, runtime)}
        took = interleaved(work, repeats, device, calls=options.calls)
        rate_at = {size: flops / took[size] for size, (_, flops) in plain_convolutions.items()}
        copied = bandwidth(device, repeats)
        square = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16 if runtime.bf16 else torch.float32)
        product = interleaved({"matmul": lambda: square @ square}, repeats, device)["matmul"]
        precision = "bf16" if runtime.bf16 else "fp32"
        say("## Machine\n")
        say(table(("what", "value"), [
            ("machine", machine(device)),
            *[(f"3x3 convolution, {channels} channels at {size}x{size}, forward and backward, batch {batch}, {precision}",
               f"{rate_at[size]:,.0f} GFLOP/s") for size, channels in zip(configs.RESOLUTIONS, config.model.channels)],
            (f"matrix product 2048, {precision}", f"{2 * 2048**3 / product / 1e9:,.0f} GFLOP/s"),
            ("copying 256 MB, read and written", f"{copied:,.1f} GB/s")]))

        say("\n## Floors, counted\n")
        rest = gflop - sum(by_resolution.values())  # linear layers and attention, at the rate of the smallest images
        seconds = sum(3 * part / rate_at[size] for size, part in by_resolution.items()) + 3 * rest / rate_at[7]
        # Forward writes and reads each layer's output; backward reads it again, and writes and reads its gradient.
        width = 2 if runtime.bf16 else 4
        activations = 5 * width * values * 1e6
        # Weights read twice and their gradients written once; optimizer and average read and write five tensors like them.
        weights = (3 + 10) * 4 * parameters / batch
        bytes_floor = (activations + weights) / copied / 1e9
        floor = max(seconds, bytes_floor)
        say(table(("what", "count per image", "floor, images/s"), [
            ("operations, forward", f"{gflop:.4f} GFLOP ({', '.join(f'{v:.3f} at {k}' for k, v in sorted(by_resolution.items(), reverse=True))}"
                                    f", {rest:.3f} else)", ""),
            ("operations of training: three times as many, at the rates above", f"{3 * gflop:.3f} GFLOP", f"{1 / seconds:,.0f}"),
            (f"bytes of activations: {values * 1e6:,.0f} values, moved 5 times, {width} bytes each", f"{activations / 1e6:.2f} MB", ""),
            (f"bytes of {parameters:,} weights: 13 times 4 bytes, over the batch", f"{weights / 1e6:.2f} MB", ""),
            ("bytes of training, at the bandwidth above", f"{(activations + weights) / 1e6:.2f} MB", f"{1 / bytes_floor:,.0f}")]))

        say("\n## Training, measured\n")
        laps = measure_phases(state, config, schedule, digits, forward, runtime, options.steps)
        step_seconds = took["ours"]
        shares = {phase: lap / sum(laps.values()) for phase, lap in laps.items()}
        say(table(("phase", "ms a step", "share", "times the floor"), [
            *[(phase, f"{1e3 * share * step_seconds:.2f}", f"{share:.1%}",
               f"{share * step_seconds / floor / batch / FLOOR_SHARE[phase]:.2f}" if phase in FLOOR_SHARE else "")
              for phase, share in shares.items()],
            ("all", f"{1e3 * step_seconds:.2f}", "100%", f"{step_seconds / (floor * batch):.2f}")]))

        reference = Reference()
        reference_parameters, reference_gflop, _, _ = count(reference)
        bare = sum(shares[phase] for phase in ("batch selection", "forward and loss", "backward", "clear gradients"))
        ours, theirs = batch / took["ours"], 128 / took["reference"]
        say("\n")
        say(table(("training", "parameters", "GFLOP", "images/s", "s an epoch", "times the floor", "times the reference"), [
            ("default model, train.training_step", f"{parameters / 1e6:.2f} M", f"{gflop:.3f}", f"{ours:,.0f}",
             f"{60000 / ours:,.1f}", f"{1 / floor / ours:.2f}", f"{ours / theirs:.2f}"),
            ("the same without clip, optimizer and average", "", "", f"{ours / bare:,.0f}",
             f"{60000 * bare / ours:,.1f}", f"{bare / floor / ours:.2f}", ""),
            ("reference re-created (BatchNorm, ReLU, Adam, batch 128)", f"{reference_parameters / 1e6:.2f} M", f"{reference_gflop:.3f}",
             f"{theirs:,.0f}", f"{60000 / theirs:,.1f}", "", "1.00")]))
        say(f"\nPeak memory of training: {memory}.")

        levers(config, schedule, digits, runtime, options, say)
        drawing(state, config, schedule, runtime, options, say)


def levers(config: Config, schedule: NoiseSchedule, digits: dataset.Digits, runtime: Runtime, options: argparse.Namespace,
           say: Callable[..., None]) -> None:
    """Forward and backward alone: precision, memory layout, torch.compile."""
    batch, precision = config.train.batch_size, "bf16" if runtime.bf16 else "fp32"
    say("\n## Levers: forward and backward alone\n")
    plain = replace(runtime, bf16=False, compile=False)
    variants = {
        "fp32, channels_last": (plain, torch.channels_last), "fp32, contiguous": (plain, torch.contiguous_format),
        "bf16 autocast, channels_last": (replace(plain, bf16=True), torch.channels_last)}
    cold = warm = None
    if options.compile:
        cold, warm = compile_times(config, schedule, digits, runtime)
        variants[f"{precision}, channels_last, compiled"] = (replace(runtime, compile=True), torch.channels_last)
    if runtime.device.type == "mps":
        del variants["bf16 autocast, channels_last"]
    work = {name: gradient_step(config, schedule, digits, how, layout) for name, (how, layout) in variants.items()}
    seconds_of = interleaved(work, options.repeats, runtime.device, calls=options.calls)
    base = seconds_of["fp32, channels_last"]
    say(table(("variant", "images/s", "times fp32 channels_last"),
              [(name, f"{batch / value:,.0f}", f"{base / value:.2f}") for name, value in seconds_of.items()]))
    say(f"\nCompiling takes {cold:.1f} s with an empty cache and {warm:.1f} s with a full one." if cold is not None else
        "\ntorch.compile: not measured here (--compile measures it).")


def drawing(state: train.State, config: Config, schedule: NoiseSchedule, runtime: Runtime, options: argparse.Namespace,
            say: Callable[..., None]) -> None:
    """The default sampler against ancestral sampling over all noise levels."""
    say("\n## Drawing 256 images\n")
    network = state.average.module.eval()
    few = 10
    plain = replace(config.sample, guidance=1.0)
    ancestral = replace(plain, sampler="ddpm", steps=few)
    labels = sample.choose_labels(None, 0, range(256))

    def draw(how: configs.SampleConfig) -> Callable[[], Tensor]:
        return lambda: sample.draw(network, schedule, how, 0, range(256), labels, runtime)

    drawn = interleaved({"default": draw(config.sample), "plain": draw(plain), "ancestral": draw(ancestral)}, max(3, options.repeats // 2),
                        runtime.device)
    scale = schedule.timesteps / few
    say(table(("sampler", "network evaluations", "seconds", "images/s"), [
        (f"{config.sample.sampler}, guided (default)", 2 * config.sample.steps, f"{drawn['default']:.3f}", f"{256 / drawn['default']:,.1f}"),
        (f"{config.sample.sampler}", config.sample.steps, f"{drawn['plain']:.3f}", f"{256 / drawn['plain']:,.1f}"),
        (f"ddpm, ancestral: extrapolated from {few} steps", schedule.timesteps, f"{drawn['ancestral'] * scale:,.1f}",
         f"{256 / drawn['ancestral'] / scale:,.2f}"),
        ("ratio of the last two", "", f"{drawn['ancestral'] * scale / drawn['plain']:.0f}", "")]))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("dataset"), help="folder of the data, as for run.py")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="of training and drawing")
    parser.add_argument("--threads", type=int, help="of the CPU; unset: torch's choice")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each, in turn")
    parser.add_argument("--calls", type=int, default=3, help="training steps in one measurement")
    parser.add_argument("--steps", type=int, default=20, help="training steps in the table of phases")
    parser.add_argument("--compile", action="store_true", help="use torch.compile, and measure how long it takes, cold and warm")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file as well")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    lines: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)
        if options.markdown is not None:
            options.markdown.write_text("\n".join(lines) + "\n")

    run(options, say)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"speed: {error}", file=sys.stderr)
        sys.exit(2)
