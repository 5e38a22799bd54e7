"""Draws the data set dataset/generated/: 10,000 labelled digits, 1,000 of each, as four compressed IDX files.

    python benchmarks/generate_digits.py [--steps 10]

Prints the MD5s of the unpacked files, which belong into GENERATED_MD5 in dataset.py. The last 1,000 images are the
test split. Drawn from checkpoints/pretrained.safetensors unless --checkpoint is given.
"""

import gzip
import hashlib
import struct
from operator import methodcaller
from pathlib import Path

import numpy as np
from common import Parser, config_of, run_script

import dataset
from config import SampleConfig
from drawing import Order, draw, load_trained
from support import checkpoint, runtime
from support.files import make_folder, write_atomically

COUNT, TEST = 10_000, 1_000


def idx(array: np.ndarray) -> bytes:
    """The bytes of an IDX file of uint8."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def main(argv: list[str]) -> None:
    parser = Parser(__doc__, "--device", "--seed")
    parser.set_defaults(seed=1)
    parser.add_argument("--checkpoint", default=str(checkpoint.PRETRAINED))
    parser.add_argument("--sampler", default=SampleConfig.sampler)
    parser.add_argument("--steps", default=str(SampleConfig.steps))
    parser.add_argument("--out", type=Path, default=dataset.GENERATED, help="folder of the four files")
    options = parser.parse(argv)
    config = config_of(options, *(f"--{name}={getattr(options, name)}" for name in ("checkpoint", "sampler", "steps")))
    with runtime.start(config) as here:
        trained = load_trained(config, here)
        labels = trained.labels("0123456789", config.seed, COUNT)
        order = Order(config.sample, config.seed, range(COUNT), labels)
        images = runtime.to_uint8(draw(trained, order, here, progress=True))
    make_folder(options.out)
    for split, part in (("train", slice(0, COUNT - TEST)), ("test", slice(COUNT - TEST, COUNT))):
        for name, array in zip(dataset.FILES[split], (images[part, 0].numpy(), labels[part].numpy())):
            content = idx(array)
            packed = gzip.compress(content, 9, mtime=0)
            write_atomically(options.out / f"{name}.gz", methodcaller("write", packed))
            print(f'"{name}": "{hashlib.md5(content).hexdigest()}",  # {len(packed) / 1e6:.2f} MB packed')


if __name__ == "__main__":
    run_script(main)
