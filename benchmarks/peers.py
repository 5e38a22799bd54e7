"""Side by side with what one would pick instead: ours, diffusers, denoising-diffusion-pytorch, in one run on one machine.

    pip install -r benchmarks/requirements.txt
    python benchmarks/peers.py --minutes 10 --threads 2
    python benchmarks/peers.py --minutes 10 --threads 1 --clock cpu        (a shared machine)

Speed is measured in turn (A B C A B C ...), quality after the same minutes of training for each. Every finished run is
kept in peers.json, and the same command again goes on with what is missing. The libraries download nothing; MNIST
itself is fetched only where --data-dir lacks it.

Settings, meant to be fair. All: the same images on the device, batch 64, gradient norm clipped at 1, the averaged weights
drawn with 10 network evaluations and no guidance, 2,000 images judged as in mode evaluate (but with a floor that is the
mean of five sets); the clock stops while images are judged.
  ours         the defaults of config.py; each length of training is a run of its own, since the rate decays over a run
  diffusers    UNet2DModel with widths 16-32-64 and attention at 7x7, one layer a block: about as many parameters as ours;
               told the digit (num_class_embeds); DDPMScheduler squaredcos_cap_v2, noise prediction, T = 1000; AdamW at
               1e-3 and its EMAModel with warm-up (inv_gamma 1, power 3/4, as its unconditional example);
               drawn by DPMSolverMultistepScheduler with lambda_min_clipped -5.1, which its documentation asks for with
               this schedule, and thresholding, which it advises in pixel space
  diffusers v  the same with its v_prediction, which suits few steps better, though it is not what it does by itself
  ddp          denoising-diffusion-pytorch's Unet(dim=16, dim_mults=(1, 2, 4)), about as many parameters, unconditional as
               it comes; GaussianDiffusion's defaults (v, sigmoid schedule, T = 1000); Adam at 8e-5 with betas 0.9, 0.99 and
               EMA 0.995 every 10 steps, as its readme; drawn by its DDIM
  ddp 1e-3     the same with Adam at 1e-3, since 8e-5 is meant for far longer runs
"""

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars

import torch
from common import QUALITY_IMAGES, Judge, interleaved, load_digits, machine, make_judge, synchronize, table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import config as configs
import plots
import sample
import train
from config import UserError
from dataset import Digits
from diffusion import make_schedule
from runtime import Runtime, choose_device, compiled, to_uint8, to_unit

try:
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel
    from ema_pytorch import EMA
except ImportError as error:
    sys.exit(f"peers: {error}; pip install -r benchmarks/requirements.txt")

HERE = Path(__file__).resolve().parent
STEPS, LONG = 10, 1000  # network evaluations: of everyone's quality, and of ancestral sampling
FRACTIONS = (0.25, 0.5, 1.0)  # of the minutes, at which quality is measured
CHUNK = 250  # images drawn at a time by the peers


@dataclass(frozen=True)
class Contender:
    """One way to train and draw: `step(progress)` trains once, `draw(count, steps)` gives uint8 images and what was asked."""

    network: nn.Module
    step: Callable[[float], None]
    draw: Callable[[int, int], tuple[Tensor, Tensor | None]]
    inputs: tuple[Tensor, ...]  # of the network, for one image, to count its operations


def ours(digits: Digits, runtime: Runtime, options: argparse.Namespace) -> Contender:
    config = configs.parse(["--batch-size", str(options.batch_size), "--seed", str(options.seed), "--device", options.device])
    schedule = make_schedule(config.diffusion)
    state = train.new_state(config, runtime, {})
    state.network.train()
    forward = compiled(state.network, runtime)

    def step(progress: float) -> None:
        state.optimizer.set_rate(train.learning_rate(config.train, state.step, progress))
        train.training_step(forward, state, schedule, digits, config, runtime)
        state.step += 1

    def draw(count: int, steps: int) -> tuple[Tensor, Tensor | None]:
        how = replace(config.sample, steps=steps, guidance=1.0)
        labels = sample.choose_labels(None, options.seed, range(count))
        network = state.average.module.eval()
        return to_uint8(sample.draw(network, schedule, how, options.seed, range(count), labels, runtime)), labels

    return Contender(state.network, step, draw, _inputs(runtime, labelled=True))


def diffusers(digits: Digits, runtime: Runtime, options: argparse.Namespace, prediction: str = "epsilon") -> Contender:
    device, size = runtime.device, options.batch_size
    network = UNet2DModel(
        sample_size=28, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32, 64), norm_num_groups=8,
        num_class_embeds=10, down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")).to(device).train()
    noising = DDPMScheduler(num_train_timesteps=LONG, beta_schedule="squaredcos_cap_v2", prediction_type=prediction)
    solver = DPMSolverMultistepScheduler.from_config(noising.config, lambda_min_clipped=-5.1, thresholding=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    forward = compiled(lambda x, t, labels: network(x, t, class_labels=labels).sample, runtime)

    def step(progress: float) -> None:
        x0, labels = _some(digits, size, device)
        noise, t = torch.randn_like(x0), torch.randint(LONG, (size,), device=device)
        with runtime.autocast():
            answer = forward(noising.add_noise(x0, noise, t), t, labels)
        target = noise if prediction == "epsilon" else noising.get_velocity(x0, noise, t)
        nn.functional.mse_loss(answer.float(), target).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())

    def draw(count: int, steps: int) -> tuple[Tensor, Tensor | None]:
        labels = (torch.arange(count) % 10).to(device)
        chunks = []
        average.store(network.parameters())
        average.copy_to(network.parameters())
        network.eval()
        with torch.inference_mode(), runtime.autocast():
            for asked in labels.split(CHUNK):
                solver.set_timesteps(steps, device=device)
                x = torch.randn(len(asked), 1, 28, 28, device=device)
                for t in solver.timesteps:
                    x = solver.step(network(x, t, class_labels=asked).sample.float(), t, x).prev_sample
                chunks.append(to_uint8(x).cpu())
        average.restore(network.parameters())
        network.train()
        return torch.cat(chunks), labels.cpu()

    return Contender(network, step, draw, _inputs(runtime, labelled=True))


def denoising_diffusion(digits: Digits, runtime: Runtime, options: argparse.Namespace, lr: float = 8e-5) -> Contender:
    device, size = runtime.device, options.batch_size
    network = Unet(dim=16, dim_mults=(1, 2, 4), channels=1)
    diffusion = GaussianDiffusion(network, image_size=28, timesteps=LONG, sampling_timesteps=STEPS).to(device).train()
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=lr, betas=(0.9, 0.99))
    average = EMA(diffusion, beta=0.995, update_every=10).to(device)
    forward = compiled(diffusion, runtime)

    def step(progress: float) -> None:
        x0, _ = _some(digits, size, device)
        with runtime.autocast():
            loss = forward((x0 + 1) / 2)
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()

    def draw(count: int, steps: int) -> tuple[Tensor, Tensor | None]:
        model = average.ema_model.eval()
        model.sampling_timesteps, model.is_ddim_sampling = steps, steps < LONG
        with torch.inference_mode(), runtime.autocast():
            chunks = [model.sample(batch_size=min(CHUNK, count - done)) for done in range(0, count, CHUNK)]
        return to_uint8(torch.cat(chunks).float() * 2 - 1).cpu(), None

    return Contender(network, step, draw, _inputs(runtime, labelled=False))


CONTENDERS: dict[str, Callable[..., Contender]] = {
    "ours": ours, "diffusers": diffusers, "diffusers v": lambda *arguments: diffusers(*arguments, prediction="v_prediction"),
    "ddp": denoising_diffusion, "ddp 1e-3": lambda *arguments: denoising_diffusion(*arguments, lr=1e-3)}
SAME_SPEED = ("diffusers v", "ddp 1e-3")  # as those before them


def _inputs(runtime: Runtime, labelled: bool) -> tuple[Tensor, ...]:
    times = torch.ones(1, dtype=torch.long, device=runtime.device)
    return (torch.zeros(1, 1, 28, 28, device=runtime.device), times, *([times] if labelled else []))


def _some(digits: Digits, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random training images in [-1, 1] and their labels."""
    chosen = torch.randint(len(digits), (size,), device=device)
    return to_unit(digits.images[chosen]), digits.labels[chosen]


def gflop(contender: Contender) -> float:
    """10^9 operations of one forward of one image, a multiply-add counted as two."""
    home = contender.inputs[0].device
    network = copy.deepcopy(contender.network).to(home).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*contender.inputs)
    return counter.get_total_flops() / 1e9


def measure_speed(digits: Digits, runtime: Runtime, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Parameters, operations, training images/s and seconds per 256 images of every contender, measured in turn."""
    contenders = {name: make(digits, runtime, options) for name, make in CONTENDERS.items() if name not in SAME_SPEED}
    training = interleaved({name: lambda c=c: c.step(0.5) for name, c in contenders.items()}, options.repeats, runtime.device, calls=3)
    drawing = interleaved({name: lambda c=c: c.draw(256, STEPS) for name, c in contenders.items()}, max(3, options.repeats // 2),
                          runtime.device)
    return {name: {"parameters": sum(p.numel() for p in c.network.parameters()), "gflop": round(gflop(c), 4),
                   "images_per_s": round(options.batch_size / training[name], 1), "seconds_per_256": round(drawing[name], 4)}
            for name, c in contenders.items()}


def runs(options: argparse.Namespace) -> Iterator[tuple[str, float, list[float]]]:
    """(name, minutes, minutes at which to judge) of every training run; only our rate decays with the run's length."""
    points = [options.minutes * fraction for fraction in FRACTIONS]
    for name in options.only:
        if name == "ours":
            yield from ((name, minutes, [minutes]) for minutes in points)
        else:
            yield name, points[-1], points


def measure_quality(name: str, minutes: float, points: Sequence[float], digits: Digits, judge: Judge, runtime: Runtime,
                    options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Trains one contender from scratch; yields its quality at each of the points, in minutes of training."""
    torch.manual_seed(options.seed)
    contender = CONTENDERS[name](digits, runtime, options)
    threads = torch.get_num_threads()
    clock: Callable[[], float] = time.perf_counter
    if options.clock == "cpu":
        def clock() -> float:
            return time.process_time() / threads

    spent, steps, waiting = 0.0, 0, list(points)
    while waiting:
        began = clock()
        while spent + clock() - began < 60 * waiting[0]:
            contender.step((spent + clock() - began) / (60 * minutes))
            steps += 1
        synchronize(runtime.device)
        spent += clock() - began
        point = waiting.pop(0)
        row = {"name": name, "minutes": point, "steps": steps, **judge(*contender.draw(options.images, STEPS))}
        if not waiting and point == options.minutes and options.long_steps:
            row |= {f"long_{key}": value for key, value in judge(*contender.draw(options.images, options.long_steps)).items()}
            row["long_steps"] = options.long_steps
        yield row


def show(report: dict[str, Any]) -> str:
    """Both tables of peers.json in Markdown."""
    ours_speed = report["speed"]["ours"]
    speed = table(
        ("", "parameters", "GFLOP per image", "training images/s", "ours is faster", f"s per 256 images, {STEPS} steps",
         f"{LONG} steps (extrapolated)"),
        [(name, f"{row['parameters'] / 1e6:.2f} M", f"{row['gflop']:.3f}", f"{row['images_per_s']:,.0f}",
          f"{ours_speed['images_per_s'] / row['images_per_s']:.2f}x", f"{row['seconds_per_256']:.2f}",
          f"{row['seconds_per_256'] * LONG / STEPS:,.0f}") for name, row in report["speed"].items()])
    quality = table(
        ("", "minutes", "steps", f"Fréchet / floor, {STEPS} steps", "sure", "as asked", "with more steps"),
        [(row["name"], f"{row['minutes']:g}", f"{row['steps']:,}", f"{row['over_floor']:.2f}", f"{row['sure']:.1%}",
          f"{row['asked']:.1%}" if "asked" in row else "-",
          f"{row['long_over_floor']:.2f} ({row['long_steps']} steps)" if "long_steps" in row else "") for row in report["quality"]])
    settings = ", ".join(f"{key} {value}" for key, value in report["settings"].items())
    return f"{report['machine']}; {settings}\n\n{speed}\n\n{quality}"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("dataset"), help="folder of the data, as for run.py")
    parser.add_argument("--minutes", type=float, default=10, help="of training for each; quality also at a quarter and a half")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="of the minutes; cpu: this process's share, over the threads")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="train these alone")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=QUALITY_IMAGES, help="drawn for each Fréchet distance")
    parser.add_argument("--long-steps", type=int, default=50, help="steps of a second look at the end of each run; 0: none")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each speed, in turn")
    parser.add_argument("--threads", type=int, help="of the CPU; unset: torch's choice")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "peers.json", help="results; the picture lies beside it")
    parser.add_argument("--fresh", action="store_true", help="start over")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    if device.type == "cuda" and options.clock == "cpu":
        raise UserError("--clock cpu: a GPU's work takes no CPU time; leave it out")
    runtime = Runtime(device, bf16=device.type == "cuda", compile=device.type == "cuda")

    settings: dict[str, Any] = {"minutes": options.minutes, "clock": options.clock, "batch": options.batch_size, "images": options.images, "seed": options.seed}
    digits, test = (part.to(device) for part in load_digits(options.data_dir))
    judge = make_judge(digits, test, options.images, device)
    settings["extractor"] = judge.extractor.digest
    report: dict[str, Any] = {"machine": machine(device), "settings": settings, "speed": {}, "quality": []}
    if options.out.exists() and not options.fresh:
        found = json.loads(options.out.read_text())
        if (found["settings"], found["machine"]) != (settings, report["machine"]):
            raise UserError(f"{options.out} was measured with other settings or on another machine; choose another --out, or --fresh")
        report = found

    def save() -> None:
        text = json.dumps(report, indent=1) + "\n"
        checkpoint.write_atomically(options.out, lambda file: file.write(text.encode()))
        curves = {name: [(row["minutes"], row["over_floor"]) for row in report["quality"] if row["name"] == name] for name in CONTENDERS}
        curves = {name: points for name, points in curves.items() if points}
        if curves:
            plots.save_frontier(options.out.with_suffix(".png"), curves, {"machine": report["machine"]})

    if not report["speed"]:
        report["speed"] = measure_speed(digits, runtime, options)
        save()
    for name, minutes, points in runs(options):
        done = {row["minutes"] for row in report["quality"] if row["name"] == name}
        if minutes in done:
            continue
        report["quality"] = [row for row in report["quality"] if row["name"] != name or row["minutes"] not in points]
        for row in measure_quality(name, minutes, points, digits, judge, runtime, options):
            print(f"{name}, {row['minutes']:g} minutes: {row['over_floor']:.2f} x floor, {row['sure']:.1%} sure", flush=True)
            report["quality"].append(row)
            save()
    print(show(report))
    print(f"\n{options.out}\n{options.out.with_suffix('.png')}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"peers: {error}", file=sys.stderr)
        sys.exit(2)
