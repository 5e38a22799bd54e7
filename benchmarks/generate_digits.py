"""Draws the data set dataset/generated/: 10,000 labelled digits, 1,000 of each, as four compressed IDX files.

python benchmarks/generate_digits.py [--steps 10]
Prints the MD5s of the unpacked files, which belong into GENERATED_MD5 in dataset.py. The last 1,000 images are the
test split. Runs from checkpoints/pretrained.pt unless --checkpoint is given.
"""

import argparse
import gzip
import hashlib
import struct
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
import config as configs
import dataset
import runtime
import sample

COUNT, TEST = 10_000, 1_000


def idx(array: np.ndarray) -> bytes:
    """The bytes of an IDX file of uint8."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/pretrained.pt")
    parser.add_argument("--sampler", default=configs.SampleConfig().sampler)
    parser.add_argument("--steps", default="10")
    parser.add_argument("--seed", default="1")
    options = parser.parse_args()

    config = configs.parse(["--checkpoint", options.checkpoint, "--digits", "0123456789", "--sampler", options.sampler,
                            "--steps", options.steps, "--seed", options.seed])
    with runtime.start(config) as here:
        trained = sample.load_trained(config, here)
        labels = sample.choose_labels(config.sample.digits, config.seed, range(COUNT))
        x = sample.draw(trained.network, trained.schedule, config.sample, config.seed, range(COUNT), labels, here, progress=True)
        images = runtime.to_uint8(x)[:, 0].numpy()
    dataset.GENERATED.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", slice(0, COUNT - TEST)), ("test", slice(COUNT - TEST, COUNT))):
        for name, array in zip(dataset.FILES[split], (images[part], labels.numpy()[part])):
            content = idx(array)
            packed = gzip.compress(content, 9, mtime=0)
            checkpoint.write_atomically(dataset.GENERATED / f"{name}.gz", lambda file, packed=packed: file.write(packed))
            print(f'"{name}": "{hashlib.md5(content).hexdigest()}",  # {len(packed) / 1e6:.2f} MB packed')


if __name__ == "__main__":
    main()
