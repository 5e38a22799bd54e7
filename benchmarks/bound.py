"""What the bound on the likelihood owes to the variances of the reverse process, and what to the refiner.

python benchmarks/bound.py [checkpoints/pretrained.pt]
Four rows: without and with the checkpoint's refiner, each with DDPM's variances (2006.11239; the decoder has that of the
step 2 -> 1) and with those that metrics.calibrate finds on 1,000 training images. Without labels, on 2,000 test images. Then
the squared error times SNR at some noise levels, 1 where a pixel's own noisy value is all that is known.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from common import load_digits
from torch import Tensor

import metrics
import sample
from config import Config
from diffusion import NO_LABEL, Denoiser, NoiseSchedule, make_denoiser
from evaluate import bound_images
from runtime import Runtime, to_unit

BATCH = 100
LEVELS = (1, 2, 5, 12, 27, 40, 60, 130, 300)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=Path("checkpoints/pretrained.pt"))
    parser.add_argument("--data-dir", type=Path, default=Path("dataset"))
    options = parser.parse_args()

    config = Config()
    config = replace(config, sample=replace(config.sample, checkpoint=options.checkpoint))
    trained = sample.load_trained(config, Runtime(torch.device("cpu"), bf16=False, compile=False))
    train, test = load_digits(options.data_dir)
    labels, images = torch.full((BATCH,), NO_LABEL), bound_images(test)
    networks = {"U-Net": trained.network.coarse}
    if trained.config.model.refiner:
        networks[f"U-Net, refiner up to t = {trained.config.model.refiner}"] = trained.network
    print(f"{options.checkpoint}, weights {trained.digest}\n\n| | L_T | KL | L_0 | bits/dim |\n| --- | --: | --: | --: | --: |")
    with torch.inference_mode():
        for name, network in networks.items():
            denoise = make_denoiser(network, trained.schedule, labels)
            found = metrics.calibrate(denoise, trained.schedule, train.images[:1000], BATCH)
            for variances, uncertainty in (("DDPM's variances", None), ("calibrated variances", found)):
                bound = metrics.bits_per_dim(denoise, trained.schedule, images, batch=BATCH, uncertainty=uncertainty)
                print(f"| {name}, {variances} | {bound.L_T:.4f} | {bound.L_kl:.3f} | {bound.L_0:.3f} | {bound.bits_per_dim:.3f} ± "
                      f"{bound.standard_error:.3f} |", flush=True)
        images = images[:300]
        kinds = {"all": images >= 0, "black": images == 0, "grey": (images > 0) & (images < 250), "white": images >= 250}
        print("\n| SNR x squared error | t = " + " | ".join(map(str, LEVELS)) + " |\n| --- |" + " --: |" * len(LEVELS))
        for name, network in networks.items():
            denoise = make_denoiser(network, trained.schedule, torch.full((len(images),), NO_LABEL))
            errors = [squared_error(denoise, trained.schedule, to_unit(images), t) for t in LEVELS]
            for kind, chosen in kinds.items():
                print(f"| {name}: {kind} | " + " | ".join(f"{error[chosen].mean().item():.4f}" for error in errors) + " |", flush=True)


def squared_error(denoise: Denoiser, schedule: NoiseSchedule, x0: Tensor, t: int) -> Tensor:
    x0_hat = metrics.estimate_x0(denoise, schedule, x0, t, torch.Generator().manual_seed(t))
    return (x0_hat - x0).square() * schedule.snr[t].item()


if __name__ == "__main__":
    main()
