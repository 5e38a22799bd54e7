"""Makes what ships of a finished run: its averaged weights, and digits and pictures for the readme made with them.

    python benchmarks/ship.py weights checkpoints/mnist/last.safetensors
    python benchmarks/ship.py digits
    python benchmarks/ship.py pictures

Weights are rounded to half precision (mode evaluate shows whether that costs anything) and hold nothing to train on.
The digits are 1,000 of each, as four compressed IDX files, the last 1,000 for testing; the MD5s of the unpacked files
are printed, and belong into GENERATED_MD5 in support/idx.py. The pictures are the run's loss.png, and levels.png: x_t
and x0_hat at six noise levels. The others in results/pretrained/ are those of modes sample and evaluate.
"""

import gzip
import hashlib
import struct
from dataclasses import replace
from operator import methodcaller
from pathlib import Path

import numpy as np
import torch
from common import Parser, config_of, run_script

from config import ROOT
from dataset import to_uint8, to_unit
from diffusion import add_noise
from sample import load_checkpoint, make_request, sample_images
from support import checkpoint, idx, loading, plots, selection
from support.files import make_folder, write_atomically
from support.randomness import NOISE_STREAM, generator
from support.runtime import start

COUNT, TEST, SEED = 10_000, 1_000, 1
LEVELS, DIGIT = (50, 200, 400, 600, 800, 950), 5  # timesteps, and the digit that the picture shows


def ship_weights(source: Path) -> None:
    state = checkpoint.load(source)
    ema = {name: value.half() for name, value in state["ema"].items()}
    checkpoint.save(selection.PRETRAINED, {**state, "ema": ema, "model": None, "optimizer": None})
    print(f"{selection.PRETRAINED}: {selection.PRETRAINED.stat().st_size / 1e6:.1f} MB, step {state['step']:,}, "
          f"weights {checkpoint.weights_digest(ema)}")


def ship_digits() -> None:
    config = config_of(None, "--mode", "sample")
    with start(config) as runtime:
        model = load_checkpoint(selection.PRETRAINED, runtime)
        request = make_request(model, replace(config.sample, digits="0123456789"), SEED, COUNT)
        images, labels = to_uint8(sample_images(model, request, progress="sampling")[0])[:, 0], request.labels
    make_folder(loading.GENERATED)
    for split, part in (("train", slice(0, COUNT - TEST)), ("test", slice(COUNT - TEST, COUNT))):
        for name, array in zip(idx.FILES[split], (images[part].numpy(), labels[part].numpy().astype(np.uint8))):
            content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
            packed = gzip.compress(content, 9, mtime=0)
            write_atomically(loading.GENERATED / f"{name}.gz", methodcaller("write", packed))
            print(f'"{name}": "{hashlib.md5(content).hexdigest()}",  # {len(packed) / 1e6:.2f} MB packed')


def make_pictures() -> None:
    config = config_of(None, "--dataset", "generated")
    with start(config) as runtime:
        model = load_checkpoint(selection.PRETRAINED, runtime)
        digits = loading.load_split(config, "test")
        digit = digits[torch.tensor([int((digits.labels == DIGIT).nonzero()[0])])]
        x0, denoise = to_unit(digit.images), model.denoiser(digit.labels)
        noise = torch.randn(x0.shape, generator=generator("cpu", SEED, NOISE_STREAM))
        rows = []
        with torch.inference_mode():
            for t in LEVELS:
                x_t = add_noise(model.schedule, x0, torch.tensor([t]), noise)
                rows.append(to_uint8(torch.cat([x_t, denoise(x_t.to(runtime.device), t).cpu()])))
    folder, metadata = ROOT / "results" / "pretrained", {"weights": model.digest}
    plots.save_process(folder / "levels.png", torch.stack(rows).numpy(), LEVELS, metadata)
    plots.save_losses(folder / "loss.png", model.history["columns"], None, metadata, model.data["images"])
    print(folder)


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("what", choices=("weights", "digits", "pictures"))
    parser.add_argument("source", type=Path, nargs="?", help="the run's checkpoint, of which the weights are shipped")
    options = parser.parse(argv)
    if options.what == "weights" and options.source is None:
        parser.error("weights: of which checkpoint?")
    {"weights": lambda: ship_weights(options.source), "digits": ship_digits, "pictures": make_pictures}[options.what]()


if __name__ == "__main__":
    run_script(main)
