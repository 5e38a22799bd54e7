"""The images: the available data sets, a data set as two tensors on the device, and the random batch of a step.

How a file is read, verified and downloaded is in support/idx.py.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import ROOT, Config, UserError
from support import checkpoint, idx
from support.idx import Source
from support.randomness import BATCH_STREAM, ORDER_STREAM, generator
from support.runtime import Runtime

CLASSES = 10
NO_LABEL = CLASSES  # stands for the label of an image that is sampled, or trained on, without one
SOURCES = {"mnist": Source("MNIST", idx.MNIST_MD5, 12), "fashion-mnist": Source("FashionMNIST", idx.FASHION_MD5, 31),
           "kmnist": Source("KMNIST", idx.KMNIST_MD5, 21)}
CLASS_NAMES = {"fashion-mnist": ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                                 "Ankle boot"),
               "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")}
MNIST_DIGEST = "d18cfd466eb143ac"  # of MNIST's training images and labels, as `describe` gives it
GENERATED = ROOT / "dataset" / "generated"  # digits sampled by benchmarks/ship.py
NOTICE = """
NOT MNIST: these are the generated digits that ship with the project, sampled from its own model. The run is named
"generated" unless you named it. For the real data set, put MNIST's four files into its folder, or run again online.
"""


@dataclass(frozen=True)
class LabelledImages:
    """Images and their labels, in the same order."""

    images: Tensor  # uint8 [N, 1, 28, 28]
    labels: Tensor  # int64 [N], 0 to 9

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor) -> "LabelledImages":
        return LabelledImages(self.images[chosen], self.labels[chosen])

    def to(self, device: torch.device | str) -> "LabelledImages":
        return LabelledImages(self.images.to(device), self.labels.to(device))


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


def settle(config: Config, runtime: Runtime) -> Config:
    """The config with its checkpoint, name and data set decided, which is the first step of every mode.

    In modes sample and evaluate, `sample.checkpoint` becomes a file. Unless --dataset is given, the data set is the
    checkpoint's own; for a new run it is MNIST or, where MNIST is unavailable and no --data-dir was given, generated
    digits. Raises UserError for a run that does not exist and for unavailable data.
    """
    path = None
    if config.mode in ("sample", "evaluate"):
        path = checkpoint.find(config)
        if path == checkpoint.PRETRAINED and config.sample.checkpoint is None:
            runtime.say("There is no run of your own yet (checkpoints/mnist/), so this uses the weights that ship with "
                        "the project." + checkpoint.other_runs())
        config = replace(config, sample=replace(config.sample, checkpoint=path))
    elif config.mode == "train" and config.name is not None and not config.train.fresh:
        path = checkpoint.own(config.name)
    if config.dataset == "auto" and config.mode != "sample":
        known = runtime.on_rank0(lambda: data_name(path)) if path is not None and os.path.isfile(path) else None
        if known == "generated" and config.mode == "train" and config.data_dir is not None:
            known = None  # a folder that was asked for is never ignored
        config = replace(config, dataset=known or runtime.on_rank0(lambda: _mnist_or_generated(config)))
    if config.dataset == "idx" and config.data_dir is None and config.mode != "sample":
        raise UserError("--dataset idx: say with --data-dir in which folder its four IDX files are")
    return replace(config, name=config.name or config.dataset) if config.mode == "train" else config


def data_name(path: Path) -> str | None:
    """The --dataset on which a checkpoint was trained, None if this version does not have it."""
    data = checkpoint.load(path)["history"].get("data")
    name = data.get("name") if isinstance(data, dict) else None
    return name if name in (*SOURCES, "generated", "idx") else None


def _mnist_or_generated(config: Config) -> str:
    source = SOURCES["mnist"]
    folder = source.folder(data_folder(config, "mnist"), "mnist")
    if not idx.is_there(folder, source.digests):
        try:
            idx.download(source, folder)
        except UserError as error:
            if config.data_dir is not None:
                raise
            print(f"{error}\n{NOTICE}", flush=True)
            return "generated"
    return "mnist"


def data_folder(config: Config, name: str) -> Path:
    """--data-dir; unset, the dataset/ of the current folder, or the one beside the code if only that has the data."""
    if config.data_dir is not None:
        try:
            return config.data_dir.expanduser()
        except RuntimeError:
            raise UserError(f"--data-dir {config.data_dir}: no such home folder; give the whole path") from None
    source, roots = SOURCES[name], (Path("dataset"), ROOT / "dataset")
    return next((root for root in roots if idx.is_there(source.folder(root, name), source.digests)), roots[0])


def load(config: Config, split: str) -> LabelledImages:
    """The split "train" or "test" of the data set of a settled config; raises UserError."""
    name, digests, advice = config.dataset, idx.GENERATED_MD5, "get it again from the project's repository"
    folder = GENERATED
    if name == "idx":
        folder, digests, advice = data_folder(config, name), {}, "replace it, or choose another --data-dir"
        if os.path.isdir(folder / "MNIST" / "raw"):
            folder = folder / "MNIST" / "raw"
    elif name in SOURCES:
        digests, advice = dict(SOURCES[name].digests), "delete it to have it downloaded again, or replace it"
        folder = SOURCES[name].folder(data_folder(config, name), name)
        if not idx.is_there(folder, digests):
            idx.download(SOURCES[name], folder)
    images, labels = idx.read_split(folder, split, digests, CLASSES, advice)
    return LabelledImages(torch.from_numpy(images)[:, None], torch.from_numpy(labels.astype(np.int64)))


def load_both(config: Config, runtime: Runtime) -> tuple[LabelledImages, LabelledImages]:
    """Training and test images, on the device of every process; the first one reads or downloads them."""
    train, test = runtime.on_rank0(lambda: [load(config, split) for split in idx.FILES])
    return train.to(runtime.device), test.to(runtime.device)


def describe(data: LabelledImages, name: str) -> dict[str, Any]:
    """What a checkpoint stores about its training images; mean and standard deviation are of pixels in [0, 1]."""
    pixels = data.images.float() / 255
    content = hashlib.sha256(data.images.cpu().numpy().tobytes() + data.labels.cpu().numpy().tobytes())
    return {"name": name, "images": len(data), "digest": content.hexdigest()[:16],
            "mean": round(pixels.mean().item(), 4), "std": round(pixels.std().item(), 4),
            "classes": torch.bincount(data.labels, minlength=CLASSES).tolist()}


def class_name(data: str, k: int) -> str:
    """The number of a class of that data set, with its name if it has one."""
    return f"{k} ({CLASS_NAMES[data][k]})" if data in CLASS_NAMES else str(k)
