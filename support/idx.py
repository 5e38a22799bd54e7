"""Data sets as IDX files: known by their MD5, downloaded where they are missing, verified before they are used.

Header and size are checked always, the MD5 where it is known. A download takes its place only once it is verified.
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
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from config import UserError
from support.console import say

FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
         "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}
NAMES = [name for names in FILES.values() for name in names]
GZ_NAMES = [f"{name}.gz" for name in NAMES]
SIZE = 28  # pixels a side
MAX_IMAGES = 1_000_000  # so that a header, or a small .gz file, can't ask for all the memory there is
TIMEOUT = 20.0  # seconds without an answer after which a download gives up

MNIST_MD5 = dict(zip(NAMES, ("6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624",
                             "2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637")))
FASHION_MD5 = dict(zip(GZ_NAMES, ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
                                  "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310")))
KMNIST_MD5 = dict(zip(GZ_NAMES, ("bdb82020997e1d708af4cf47b453dcf7", "e144d726b3acfaa3e44228e80efcd344",
                                 "5c965bf0a639b31b8f53240b1b52f4d7", "7320c461ea6c1c855c0b718fb2a4b134")))
GENERATED_MD5 = dict(zip(NAMES, ("a2a0218f526d1dbb991b911ddf06d4fe", "39fc248b2bcfd018df20ef93690f4ec3",
                                 "801c3f246ce4f4215315e64a6b58b421", "25a4ce62dcd2602d01c1eebf4701d637")))


class Source(NamedTuple):
    """A data set that torchvision downloads: MNIST's files are kept unpacked, those of the others as .gz files."""

    kind: str  # its class in torchvision.datasets, and the folder that torchvision makes
    digests: Mapping[str, str]  # file -> MD5
    megabytes: int  # to download

    def folder(self, root: Path, name: str) -> Path:
        """Where its files are: torchvision's folder in root/name or in root itself; root/name where there are none."""
        usual = root / name / self.kind / "raw"
        return next((folder for folder in (usual, root / self.kind / "raw")
                     if is_complete(folder, self.digests)), usual)


def is_complete(folder: Path, digests: Mapping[str, str]) -> bool:
    """Whether all four files are in the folder, whatever they hold."""
    return all(_files(folder, name, digests) for name in NAMES)


def read_split(folder: Path, split: str, digests: Mapping[str, str], classes: int,
               advice: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images uint8 [N, 28, 28] and labels uint8 [N] below `classes`; raises UserError unless all of it is right."""
    images, labels = (_read_idx(folder, name, digests, advice) for name in FILES[split])
    if len(images) != len(labels):
        raise UserError(f"{folder}: {FILES[split][0]} holds {len(images):,} images, but {FILES[split][1]} "
                        f"{len(labels):,} labels; use two files that belong together")
    if labels.max() >= classes:
        raise UserError(f"{folder / FILES[split][1]}: it holds the label {labels.max()}, but only the classes 0 to "
                        f"{classes - 1} are possible; {advice}")
    return images, labels


def _files(folder: Path, name: str, digests: Mapping[str, str]) -> list[Path]:
    """Where that file is, packed or not, under MNIST's name or Kaggle's; the newest first if no MD5 is known."""
    names = [f"{name}.gz"]
    if f"{name}.gz" not in digests:
        names = [f"{base}{end}" for end in ("", ".gz") for base in (name, name.replace("-idx", ".idx"))]
    paths = [path for path in (folder / name for name in names) if os.path.isfile(path)]
    return paths if digests else sorted(paths, key=os.path.getmtime, reverse=True)


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else open(path, "rb"))


def _read_idx(folder: Path, name: str, digests: Mapping[str, str], advice: str) -> NDArray[np.uint8]:
    """One IDX file: images uint8 [N, 28, 28] or labels uint8 [N]."""
    paths = _files(folder, name, digests)
    if not paths:
        raise UserError(f"{folder / name}: there is no such file that can be read; put {', '.join(digests or NAMES)} "
                        "into that folder, or choose another --data-dir")

    path = paths[0]

    def bad(problem: str) -> UserError:
        return UserError(f"{path}: {problem}; {advice}")

    # What a file holds, the number that it starts with, and the shape of one item.
    kind, expected, item = ("images", 0x803, [SIZE, SIZE]) if "images" in name else ("labels", 0x801, [])
    try:
        with _open(path) as file:
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
    packed = f"{name}.gz" in digests
    digest = hashlib.md5(path.read_bytes() if packed else header + body, usedforsecurity=False).hexdigest()
    if digest != digests.get(path.name if packed else name, digest):
        origin = next((file for file, value in digests.items() if value == digest), "no file of this set")
        raise bad(f"wrong content: that of {origin} (MD5 {digest})")
    for older in paths[1:] if not digests else []:
        with contextlib.suppress(OSError, EOFError, zlib.error), _open(older) as file:
            if file.read(len(header) + size + 1) != header + body:
                say(f"note: {path} is read; {older.name}, which is no newer, holds something else")
    return np.frombuffer(body, np.uint8).reshape((count, *shape)).copy()


def download(source: Source, folder: Path) -> None:
    """Downloads a data set and adds the files that the folder lacks; raises UserError, and adds none, if it can't."""
    say(f"{source.kind} is not in {folder}: downloading it ({source.megabytes} MB).")
    nearest = next(parent for parent in folder.parents if os.path.exists(parent))
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        import torchvision

        with tempfile.TemporaryDirectory(prefix="download-", dir=nearest) as temporary:
            with contextlib.redirect_stderr(io.StringIO()):  # torchvision's progress bars
                getattr(torchvision.datasets, source.kind)(temporary, download=True)
            arrived = Path(temporary) / source.kind / "raw"
            for name in NAMES:
                _read_idx(arrived, name, source.digests, "try again, or put the four files there")
            folder.mkdir(parents=True, exist_ok=True)
            for name in source.digests:
                if not _files(folder, name.removesuffix(".gz"), source.digests):
                    os.replace(arrived / name, folder / name)
    except (ImportError, OSError, HTTPException, RuntimeError) as error:  # no torchvision, network, room or permission
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{source.kind} is not in {folder} and can't be downloaded ({reason}): put "
                        f"{', '.join(source.digests)} there, or choose another --data-dir or --dataset") from None
    finally:
        socket.setdefaulttimeout(previous_timeout)
