"""MNIST and its like, or any 28x28 IDX files, as two tensors (uint8 images, labels) that live on the device.

Each file is verified before it is used: header and size always, the MD5 where it is known. A missing data set is
downloaded; what arrives takes its place only once it is verified. Also the batch of a step.
"""

import contextlib
import gzip
import hashlib
import io
import math
import os
import socket
import struct
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from config import CLASSES, ROOT, Config, UserError
from support.runtime import Runtime, generator

FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
         "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}
RAW = Path("mnist", "MNIST", "raw")  # where torchvision keeps it in its root, which is our root/mnist
MNIST_MD5 = {"train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
             "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
             "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
             "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637"}
FASHION_MD5 = {"train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
               "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
               "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
               "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310"}
KMNIST_MD5 = {"train-images-idx3-ubyte.gz": "bdb82020997e1d708af4cf47b453dcf7",
              "train-labels-idx1-ubyte.gz": "e144d726b3acfaa3e44228e80efcd344",
              "t10k-images-idx3-ubyte.gz": "5c965bf0a639b31b8f53240b1b52f4d7",
              "t10k-labels-idx1-ubyte.gz": "7320c461ea6c1c855c0b718fb2a4b134"}
MNIST_DIGEST = "d18cfd466eb143ac"  # of its training images and labels, as `describe` gives it
GENERATED = ROOT / "dataset" / "generated"  # drawn by benchmarks/ship.py
GENERATED_MD5 = {"train-images-idx3-ubyte": "22ca59223106ec3a2326554310c3970b",
                 "train-labels-idx1-ubyte": "39fc248b2bcfd018df20ef93690f4ec3",
                 "t10k-images-idx3-ubyte": "1b8a8c9e1ba0697d26826fcaf449ceae",
                 "t10k-labels-idx1-ubyte": "25a4ce62dcd2602d01c1eebf4701d637"}
NOTICE = """
==============================================================================
 NOT MNIST: these are the generated digits that come with the project, drawn
 by its own model. Results are named "generated". For the real data set, put
 MNIST's four files into its folder, or run again with a network.
==============================================================================
"""
CLASS_NAMES = {"fashion-mnist": ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                                 "Ankle boot"),
               "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")}
SIZE = 28
HEADERS = {"images": (0x803, [SIZE, SIZE]), "labels": (0x801, [])}  # of IDX files: first number, shape of one item
MAX_IMAGES = 1_000_000  # so that a header, or a small .gz file, can't ask for all the memory there is
TIMEOUT = 20.0  # seconds without an answer after which a download gives up
ORDER_STREAM = 8  # of random numbers; see train.py, drawing.py, likelihood.py and evaluate.py for the others


class Source(NamedTuple):
    """A data set that torchvision fetches.

    MNIST's files are known by their content; of the others' only the .gz that arrive, which are kept and read.
    """

    kind: str  # its class in torchvision.datasets
    folder: Path  # where torchvision keeps it, if it is given our root/<name>
    digests: dict[str, str]  # file -> MD5
    megabytes: int  # to fetch


SOURCES = {"mnist": Source("MNIST", RAW, MNIST_MD5, 12),
           "fashion-mnist": Source("FashionMNIST", Path("fashion-mnist", "FashionMNIST", "raw"), FASHION_MD5, 31),
           "kmnist": Source("KMNIST", Path("kmnist", "KMNIST", "raw"), KMNIST_MD5, 21)}


@dataclass(frozen=True)
class Digits:
    """Images and their labels, at the same place in both."""

    images: Tensor  # uint8 [N, 1, 28, 28]
    labels: Tensor  # int64 [N], 0 to 9

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Digits":
        return Digits(self.images.to(device), self.labels.to(device))


def resolve(config: Config, runtime: Runtime) -> Config:
    """The config with "auto" settled: MNIST if there or fetched, else, with a notice, the generated digits."""
    if config.dataset != "auto":
        return config

    def choose() -> str:
        root = data_folder(config)
        if not _has(root, "mnist"):
            try:
                download("mnist", root)
            except UserError as error:
                print(f"{error}\n{NOTICE}", flush=True)
                return "generated"
        return "mnist"

    return replace(config, dataset=runtime.only_first(choose))


def load(config: Config, split: str) -> Digits:
    """The split, "train" or "test", of the data set that config means; raises UserError."""
    if config.dataset == "generated":
        return load_generated(split)
    root = data_folder(config)
    return load_idx(root, split) if config.dataset == "idx" else load_known(config.dataset, root, split)


def data_folder(config: Config) -> Path:
    """--data-dir; unset, the dataset/ of the current folder, or the one beside the code if only that has the data."""
    here, ours, name = Path("dataset"), ROOT / "dataset", "mnist" if config.dataset == "auto" else config.dataset
    return config.data_dir or (ours if _has(ours, name) and not _has(here, name) else here)


def describe(digits: "Digits", name: str) -> dict[str, Any]:
    """What a checkpoint says of its training images: name, number, digest, mean and spread in [0, 1], class counts."""
    pixels = digits.images.float() / 255
    content = hashlib.sha256(digits.images.cpu().numpy().tobytes() + digits.labels.cpu().numpy().tobytes())
    return {"name": name, "images": len(digits), "digest": content.hexdigest()[:16],
            "mean": round(pixels.mean().item(), 4), "std": round(pixels.std().item(), 4),
            "classes": torch.bincount(digits.labels, minlength=CLASSES).tolist()}


def load_generated(split: str) -> Digits:
    """The digits that come with the project, 9,000 to train, 1,000 to test, known by their MD5s; raises UserError."""
    return _read_split(GENERATED, split, GENERATED_MD5, "get it again from the project's repository")


def load_shared(config: Config, split: str, runtime: Runtime) -> Digits:
    """`load` in every process, on its device; the first process goes ahead, since it may have to download."""
    ahead: list[Digits] = []
    runtime.only_first(lambda: ahead.append(load(config, split)))
    return (ahead[0] if ahead else load(config, split)).to(runtime.device)


def load_mnist(root: Path, split: str) -> Digits:
    """The MNIST of root/mnist/MNIST/raw, known by its MD5s, downloaded if it is not there; raises UserError."""
    return load_known("mnist", root, split)


def load_known(name: str, root: Path, split: str) -> Digits:
    """Likewise for any of the SOURCES, each in its folder of the root."""
    source = SOURCES[name]
    if not all(_find(root / source.folder, file, source.digests) for file in FILES[split]):
        download(name, root)
    return _read_split(root / source.folder, split, source.digests,
                       "delete it to have it downloaded again, or replace it")


def class_name(data: str, k: int) -> str:
    """What a class of that data set is called: its number, and its name if it has one."""
    return f"{k} ({CLASS_NAMES[data][k]})" if data in CLASS_NAMES else str(k)


def load_idx(folder: Path, split: str) -> Digits:
    """Any IDX files with MNIST's names (.gz too) and up to 10 classes, in folder or its MNIST/raw; raises UserError."""
    raw = folder / "MNIST" / "raw"
    return _read_split(raw if os.path.isdir(raw) else folder, split, {}, "replace it, or choose another --data-dir")


def _has(root: Path, name: str) -> bool:
    return name in SOURCES and all(_find(root / SOURCES[name].folder, file, SOURCES[name].digests)
                                   for files in FILES.values() for file in files)


def _find(folder: Path, name: str, digests: Mapping[str, str]) -> Path | None:
    names = (f"{name}.gz",) if f"{name}.gz" in digests else (name, f"{name}.gz")
    return next((folder / name for name in names if os.path.isfile(folder / name)), None)


def _read_split(folder: Path, split: str, digests: Mapping[str, str], advice: str) -> Digits:
    images, labels = (_read_idx(folder, name, digests, advice) for name in FILES[split])
    if len(images) != len(labels):
        raise UserError(f"{folder}: {FILES[split][0]} holds {len(images):,} images, but {FILES[split][1]} "
                        f"{len(labels):,} labels; use two files that belong together")
    return Digits(torch.from_numpy(images).view(-1, 1, SIZE, SIZE), torch.from_numpy(labels.astype(np.int64)))


def _read_idx(folder: Path, name: str, digests: Mapping[str, str], advice: str) -> NDArray[np.uint8]:
    """Images uint8 [N, 28, 28] or labels uint8 [N] of one IDX file; raises UserError unless all of it is right."""
    path = _find(folder, name, digests)
    if path is None:
        raise UserError(f"{folder / name}: there is no such file that can be read; put "
                        f"{', '.join(digests or MNIST_MD5)} into that folder, or choose another --data-dir")

    def bad(problem: str) -> UserError:
        return UserError(f"{path}: {problem}; {advice}")

    kind = "images" if "images" in name else "labels"
    expected, item = HEADERS[kind]
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(8 + 4 * len(item))
            magic, count, *shape = struct.unpack(f">{2 + len(item)}I", header)
            if magic != expected:
                raise bad(f"not an IDX file of {kind}: it starts with {magic:08x}, not {expected:08x} (swapped?)")
            if shape != item:
                raise bad(f"its images have {shape[0]}x{shape[1]} pixels, not {SIZE}x{SIZE}")
            if not 1 <= count <= MAX_IMAGES:
                raise bad(f"its header promises {count:,} {kind}, but 1 to {MAX_IMAGES:,} are possible")
            size = count * math.prod(item)
            body = file.read(size + 1)  # one more than expected, so that a file too long is seen
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise bad(f"damaged, or can't be read ({error})") from None
    if len(body) != size:
        raise bad(f"{'too long' if len(body) > size else 'truncated'}: not the {len(header) + size:,} bytes that its "
                  "header promises")
    if kind == "labels" and max(body) >= CLASSES:
        raise bad(f"it holds the label {max(body)}, but only the classes 0 to {CLASSES - 1} are possible")
    packed = f"{name}.gz" in digests
    digest = hashlib.md5(path.read_bytes() if packed else header + body, usedforsecurity=False).hexdigest()
    if digest != digests.get(path.name if packed else name, digest):
        other = next((known for known, value in digests.items() if value == digest), "no file of this set")
        raise bad(f"wrong content: that of {other} (MD5 {digest})")
    return np.frombuffer(body, np.uint8).reshape((count, *shape)).copy()


def download(name: str, root: Path) -> None:
    """Fetches one of the SOURCES and puts those files that are missing in place; raises UserError if it can't."""
    source = SOURCES[name]
    folder = root / source.folder
    if os.environ.get("RANK", "0") != "0":
        raise UserError(f"{folder}: {source.kind} is not there, and only the first process downloads it; run one "
                        "process first")
    print(f"{source.kind} is not in {folder}: downloading it ({source.megabytes} MB).", flush=True)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        import torchvision

        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=folder.parent) as place:
            with contextlib.redirect_stderr(io.StringIO()):  # torchvision's progress bars
                getattr(torchvision.datasets, source.kind)(place, download=True)
            fetched = Path(place) / source.kind / "raw"
            for file in MNIST_MD5:
                _read_idx(fetched, file, source.digests, "try again, or put the four files there")
            for file in source.digests:
                if _find(folder, file.removesuffix(".gz"), source.digests) is None:
                    os.replace(fetched / file, folder / file)
    except (ImportError, OSError, HTTPException, RuntimeError) as error:  # no torchvision, network, room or permission
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{source.kind} can't be downloaded into {folder} ({reason}): put "
                        f"{', '.join(source.digests)} there, choose another --data-dir, or train on IDX files of your "
                        "own with --dataset idx") from None
    finally:
        socket.setdefaulttimeout(patience)


def batch_indices(seed: int, step: int, batch_size: int, n: int, device: torch.device | str = "cpu") -> Tensor:
    """Indices int64 [batch_size] into n images, on the device: the batch of a step, as a function of (seed, step).

    The batches cut a stream of permutations, one for each epoch, so an epoch sees every image exactly once.
    """
    parts, position, end = [], step * batch_size, (step + 1) * batch_size
    while position < end:
        epoch, offset = divmod(position, n)
        parts.append(_permutation(seed, epoch, n, device)[offset:offset + end - position])
        position += len(parts[-1])
    return torch.cat(parts)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int, device: torch.device | str) -> Tensor:
    order = torch.randperm(n, generator=generator("cpu", seed, ORDER_STREAM, epoch))
    return order.to(device, non_blocking=torch.device(device).type == "cuda")  # elsewhere it may read freed memory
