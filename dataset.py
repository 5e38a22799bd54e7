"""The images: which data sets there are, a data set as two tensors on the device, and the random batch of a step.

How a data set is found and read is in support/loading.py.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from support import code, idx
from support.idx import Source
from support.randomness import BATCH_STREAM, ORDER_STREAM, generator

code.register(__file__)

CLASSES = 10
NO_LABEL = CLASSES  # stands for the label of an image that is sampled, or trained on, without one
SOURCES = {"mnist": Source("MNIST", idx.MNIST_MD5, 12), "fashion-mnist": Source("FashionMNIST", idx.FASHION_MD5, 31),
           "kmnist": Source("KMNIST", idx.KMNIST_MD5, 21)}
CLASS_NAMES = {"fashion-mnist": ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                                 "Ankle boot"),
               "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")}
MNIST_DIGEST = "d18cfd466eb143ac"  # of MNIST's training images and labels, as `describe` gives it


@dataclass(frozen=True)
class LabelledImages:
    """Images and their labels, in the same order."""

    images: Tensor  # uint8 [N, 1, 28, 28]
    labels: Tensor  # int64 [N], 0 to 9
    about: Mapping[str, Any] = field(default_factory=dict)  # what else a checkpoint stores of a folder of pictures

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor) -> "LabelledImages":
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def to(self, device: torch.device | str) -> "LabelledImages":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


def to_unit(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8, rounded to the nearest level."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def random_batch(seed: int, step: int, batch_size: int, n: int,
                 device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """All that is random in a training step, as a function of (seed, step), on the device.

    Indices int64 [B] into n images; uniform numbers [1 + B] for timesteps and label dropout; noise [B, 1, 28, 28]. The
    batches cut a stream of permutations, one for each epoch, so an epoch sees every image exactly once.
    """
    parts, position, end = [], step * batch_size, (step + 1) * batch_size
    while position < end:
        epoch, offset = divmod(position, n)
        parts.append(_permutation(seed, epoch, n, device)[offset:offset + end - position])
        position += len(parts[-1])
    random = generator(device, seed, BATCH_STREAM, step)
    uniform = torch.rand(1 + batch_size, generator=random, device=device)
    noise = torch.randn(batch_size, 1, idx.SIZE, idx.SIZE, generator=random, device=device)
    return torch.cat(parts), uniform, noise


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int, device: torch.device | str) -> Tensor:
    order = torch.randperm(n, generator=generator("cpu", seed, ORDER_STREAM, epoch))
    return order.to(device, non_blocking=torch.device(device).type == "cuda")  # elsewhere it may read freed memory


def describe(data: LabelledImages, name: str) -> dict[str, Any]:
    """What a checkpoint stores about its training images; mean and standard deviation are of pixels in [0, 1]."""
    pixels = data.images.float() / 255
    content = hashlib.sha256(data.images.cpu().numpy().tobytes() + data.labels.cpu().numpy().tobytes())
    return {"name": name, "images": len(data), "digest": content.hexdigest()[:16],
            "mean": round(pixels.mean().item(), 4), "std": round(pixels.std().item(), 4),
            "classes": torch.bincount(data.labels, minlength=CLASSES).tolist(), **data.about}


def class_name(data: Mapping[str, Any], k: int) -> str:
    """The number of a class of a data set that `describe` described, with its name if it has one."""
    names: Any = data.get("class_names") or CLASS_NAMES.get(data.get("name", ""), ())
    return f"{k} ({names[k]})" if k < len(names) else str(k)
