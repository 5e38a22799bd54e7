"""What becomes of the ink? The mean grey level of x0_hat, by the network alone and along the sampler.

    python benchmarks/ink.py --data-dir FOLDER
    python benchmarks/ink.py --checkpoint checkpoints/mnist/last.safetensors --steps 10 15 25

First, real training images noised to t: x0_hat's mean over that of x0, before and after clipping; a network trained on
the right loss has a ratio of 1 at every t. Then drawn images, step by step: x0_hat's mean over that of training images
with the same labels. What the second loses and the first does not is lost by the steps, and where shows which ones.
"""

from pathlib import Path
from typing import Any

import torch
from common import Parser, config_of, load_digits, machine, run_script, table

from diffusion import add_noise, make_denoiser, predicted_x0
from drawing import load_trained
from samplers import SAMPLERS, timesteps_of
from support import runtime
from support.runtime import generator, to_unit

TIMESTEPS = (1, 25, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000)
BATCH = 250


def main(argv: list[str]) -> None:
    parser = Parser(__doc__, "--data-dir", "--device", "--images")
    parser.add_argument("--checkpoint", type=Path, default=None, help="unset: the weights that ship")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 15, 25])
    parser.add_argument("--sampler", default="sa")
    options = parser.parse(argv)
    flags = ["--checkpoint", str(options.checkpoint)] if options.checkpoint else ["--name", "none-of-this-name"]
    config = config_of(options, *flags, "--sampler", options.sampler)
    with runtime.start(config) as here, torch.inference_mode():
        trained = load_trained(config, here)
        schedule, (digits, _) = trained.schedule, load_digits(config, here.device)
        chosen = torch.randperm(len(digits), generator=generator("cpu", 0))[:options.images].to(here.device)
        parts = [(to_unit(digits.images[part]), digits.labels[part]) for part in chosen.split(BATCH)]
        rows: list[list[Any]] = []
        for t in (t for t in TIMESTEPS if t <= schedule.timesteps):
            sums = torch.zeros(3, dtype=torch.float64)
            for number, (x0, labels) in enumerate(parts):
                noise = torch.randn(x0.shape, generator=generator("cpu", t, number)).to(here.device)
                times = torch.full_like(labels, t)
                x_t = add_noise(schedule, x0, times, noise)
                x0_hat = predicted_x0(schedule, trained.network(x_t, times, labels), x_t, t)
                sums += torch.stack([ink(x0), ink(x0_hat), ink(x0_hat.clamp(-1, 1))]).cpu()
            rows.append([t, f"{sums[1] / sums[0]:.4f}", f"{sums[2] / sums[0]:.4f}"])
        print(f"{machine(here.device)}; {len(chosen):,} images\n\n"
              f"{table(('t', 'x0_hat / x0, unclipped', 'clipped'), rows)}\n")

        grey = digits.images.double().mean((1, 2, 3)) / 255
        of_class = torch.stack([grey[digits.labels == k].mean() for k in range(10)])
        labels = trained.labels(None, 0, options.images).to(here.device)
        for spacing in ("trailing", "eased", "edm"):
            for steps in options.steps:
                timesteps = timesteps_of(schedule, steps, spacing)
                found = torch.zeros(steps, dtype=torch.float64)
                for number, asked in enumerate(labels.split(BATCH)):
                    random, shape = generator("cpu", 1, number), (len(asked), 1, 28, 28)

                    def randn(shape: tuple[int, ...] = shape, random: torch.Generator = random) -> torch.Tensor:
                        return torch.randn(shape, generator=random).to(here.device)

                    denoise = make_denoiser(trained.network, schedule, asked)
                    states = SAMPLERS[config.sample.sampler](denoise, schedule, randn(), timesteps, randn)
                    found += torch.stack([ink(x0_hat).cpu() for _, _, x0_hat in states])
                ratio = found / (of_class[labels].sum().item() * 28**2)
                told = "  ".join(f"{t}: {value:.3f}" for t, value in zip(timesteps, ratio.tolist()))
                print(f"{config.sample.sampler}, {spacing}, {steps} steps:  {told}", flush=True)


def ink(x: torch.Tensor) -> torch.Tensor:
    """Sum of the grey levels, each from 0 to 1."""
    return (x.double() + 1).sum() / 2


if __name__ == "__main__":
    run_script(main)
