"""Side by side with what one would pick instead, diffusers, in one run on one machine.

    pip install -r benchmarks/requirements.txt
    python benchmarks/peers.py --minutes 10 --threads 2
    python benchmarks/peers.py --minutes 10 --threads 1 --clock cpu        (a shared machine)

Every finished run is kept in peers.json, and the same command again goes on with what is missing.

Settings, meant to be fair. All: the same images on the device, gradient norm clipped at 1, the averaged weights sampled
with 15 network evaluations and no guidance, --images images with the same labels, measured against the same reference.
All compute in the precision of --precision auto.
  ours         the defaults of config.py
  diffusers    UNet2DModel with widths 16-32-64 and attention at 7x7, one layer a block: about as many parameters as
               ours; given the label (num_class_embeds); DDPMScheduler squaredcos_cap_v2, noise prediction, T = 1000;
               batches of 64, AdamW at 1e-3 and its EMAModel with warm-up (inv_gamma 1, power 3/4, as its unconditional
               example); sampled by DPMSolverMultistepScheduler with lambda_min_clipped -5.1, which its documentation
               asks for with this schedule, and thresholding, which it advises in pixel space
  diffusers v  the same with its v_prediction, which suits few steps better, though it is not what it does by itself
"""

import json
import os
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars

import common
import torch
from torch import Tensor, nn

from config import UserError
from dataset import CLASSES, LabelledImages, to_uint8, to_unit
from sample import choose_labels
from support import loading
from support.cuda_graphs import compiled
from support.precision import autocast
from support.runtime import Runtime, start

STEPS, TIMESTEPS = 15, 1000  # network evaluations of an image; noise levels
BATCH, CHUNK = 64, 250  # images in a training step of the peers, and in a call of their networks when they sample


@dataclass(frozen=True)
class Contender:
    """One way to train and sample: `step(progress)` trains once, `sample(count)` gives uint8 images and labels."""

    network: nn.Module
    batch: int  # images in a training step
    step: Callable[[float], Any]
    sample: Callable[[int], tuple[Tensor, Tensor]]


def ours(images: LabelledImages, runtime: Runtime, options: Namespace) -> Contender:
    config = common.config_of(options)
    trainee = common.Trainee(config, runtime, images, images)  # as test images, too, whose loss nobody asks for
    return Contender(trainee.state.learner.network, config.train.batch_size, trainee.step,
                     partial(trainee.sample, steps=STEPS, guidance=1.0))


def diffusers(images: LabelledImages, runtime: Runtime, options: Namespace, prediction: str = "epsilon") -> Contender:
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    device = runtime.device
    network = UNet2DModel(
        sample_size=28, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32, 64),
        norm_num_groups=8, num_class_embeds=10, down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")).to(device).train()
    noising = DDPMScheduler(TIMESTEPS, beta_schedule="squaredcos_cap_v2", prediction_type=prediction)
    solver = DPMSolverMultistepScheduler.from_config(noising.config, lambda_min_clipped=-5.1, thresholding=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    forward = compiled(lambda x, t, labels: network(x, t, class_labels=labels).sample, runtime)

    def step(progress: float) -> None:
        chosen = torch.randint(len(images), (BATCH,), device=device)
        x0, labels = to_unit(images.images[chosen]), images.labels[chosen]
        noise, t = torch.randn_like(x0), torch.randint(TIMESTEPS, (BATCH,), device=device)
        with autocast(runtime.device, runtime.bf16):
            answer = forward(noising.add_noise(x0, noise, t), t, labels)
        target = noise if prediction == "epsilon" else noising.get_velocity(x0, noise, t)
        nn.functional.mse_loss(answer.float(), target).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())

    def sample(count: int) -> tuple[Tensor, Tensor]:
        labels = choose_labels(None, options.seed, range(count), range(CLASSES)).to(device)  # as ours
        chunks = []
        average.store(network.parameters())
        average.copy_to(network.parameters())
        network.eval()
        with torch.inference_mode(), autocast(runtime.device, runtime.bf16):
            for chunk in labels.split(CHUNK):
                solver.set_timesteps(STEPS, device=device)
                x = torch.randn(len(chunk), 1, 28, 28, device=device)
                for t in solver.timesteps:
                    x = solver.step(network(x, t, class_labels=chunk).sample.float(), t, x).prev_sample
                chunks.append(to_uint8(x).cpu())
        average.restore(network.parameters())
        network.train()
        return torch.cat(chunks), labels.cpu()

    return Contender(network, BATCH, step, sample)


CONTENDERS: dict[str, Callable[..., Contender]] = {
    "ours": ours, "diffusers": diffusers, "diffusers v": partial(diffusers, prediction="v_prediction")}


def train(contender: Contender, minutes: float, clock: str) -> int:
    """Trains a new contender for these minutes; returns the number of steps."""
    def now() -> float:
        return time.perf_counter() if clock == "wall" else time.process_time() / torch.get_num_threads()

    began, steps = now(), 0
    while (progress := (now() - began) / (60 * minutes)) < 1:
        contender.step(progress)
        steps += 1
    return steps


def show(report: dict[str, Any]) -> str:
    """peers.json as a Markdown table."""
    rows = [(row["name"], f"{row['parameters'] / 1e6:.2f} M", f"{row['gflop']:.3f}",
             f"{row['images_seen'] / report['settings']['minutes'] / 60:,.0f}", *common.quality(row))
            for row in report["quality"]]
    settings = ", ".join(f"{key} {value}" for key, value in report["settings"].items())
    headings = ("", "parameters", "GFLOP per image", "images/s", *common.QUALITY)
    return f"{report['machine']}; {settings}\n\n{common.table(headings, rows)}"


def compare(options: Namespace, runtime: Runtime) -> dict[str, Any]:
    """Measures what the report in options.out lacks, saves it there after each measurement, and returns it."""
    images, test = loading.load_both(common.config_of(options), runtime)
    reference = common.make_reference(images, test, options.images)
    settings = {"steps": STEPS, "minutes": options.minutes, "clock": options.clock,
                "images": options.images, "seed": options.seed,
                "classifier": reference.classifier and reference.classifier.digest,
                "precision": runtime.precision}
    machine = common.machine(runtime.device)
    report: dict[str, Any] = {"machine": machine, "settings": settings, "quality": []}
    if options.out.exists():
        report = json.loads(options.out.read_text())
        if (report["settings"], report["machine"]) != (settings, machine):
            raise UserError(f"{options.out} was measured with other settings or on another machine: delete it, or "
                            "choose another --out")

    for name in options.only:
        if any(row["name"] == name for row in report["quality"]):
            continue
        torch.manual_seed(options.seed)
        contender = CONTENDERS[name](images, runtime, options)
        parameters, gflop = common.count(contender.network)
        steps = train(contender, options.minutes, options.clock)
        row = {"name": name, "images_seen": steps * contender.batch, "parameters": parameters, "gflop": gflop,
               **common.measured(reference, *contender.sample(options.images))}
        print(f"{name}: Fréchet {row['frechet']:.2f} x baseline", flush=True)
        report["quality"].append(row)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def main(argv: list[str]) -> None:
    parser = common.Parser(__doc__, "--data-dir", "--device", "--seed", "--threads", "--images")
    parser.add_argument("--minutes", type=float, default=10, help="of training for each")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: the process's, over threads")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="train these alone")
    parser.add_argument("--out", type=Path, default=common.HERE / "peers.json", help="what is measured already is kept")
    options = parser.parse(argv)
    with start(common.config_of(options)) as runtime:
        if runtime.device.type == "cuda" and options.clock == "cpu":
            raise UserError("--clock cpu: a GPU's work takes no CPU time; leave it out")
        try:
            report = compare(options, runtime)
        except ImportError as error:
            raise UserError(f"{error}: pip install -r benchmarks/requirements.txt, or --only ours") from None
    print(f"{show(report)}\n\n{options.out}")


if __name__ == "__main__":
    common.run_script(main)
