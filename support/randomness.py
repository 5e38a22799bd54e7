"""Every seed and every random stream: a random number is a function of the seed, the stream and its place in it."""

import numpy as np
import torch

from support import code

code.register(__file__)

# The number of a stream never changes its meaning, since the images of a seed would change. 5 and 6 are retired.
BATCH_STREAM = 1  # noise, timesteps and label dropout of a training batch, by step
NOISE_STREAM = 2  # noise of a sampled image, by its index
LABEL_STREAM = 3  # order of the labels, by block
TEST_STREAM = 4  # the test loss
BASELINE_STREAM = 7  # which real images make up the baseline, by class
ORDER_STREAM = 8  # order of the training images, by epoch
DROPOUT_STREAM = 9  # dropout inside the network, by step


def seed_of(*parts: int) -> int:
    """63-bit hash of non-negative integers below 2**64; no two tuples of them share a stream."""
    words = [word for part in parts for word in (part & 0xFFFFFFFF, part >> 32)]
    sequence = np.random.SeedSequence([len(parts), *words])  # the length, since SeedSequence pads with zeros
    return int(sequence.generate_state(1, np.uint64)[0]) & (2**63 - 1)


def generator(device: torch.device | str, *parts: int) -> torch.Generator:
    """A random generator on a device whose stream is a function of the given integers."""
    return torch.Generator(device).manual_seed(seed_of(*parts))
