"""Shared fixtures: a small IDX set of drawn shapes, and a folder of one's own to run in."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from config import Config
from evaluation.metrics import frechet_from_moments
from support import loading

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--channels", "8", "8", "16", "--blocks", "1", "1", "1", "--embedding", "16", "--groups", "4"]

# The default mode, which is the first field, is there to be edited; the tests are of the mode that ships.
Config.__init__.__defaults__ = ("train", *Config.__init__.__defaults__[1:])
torch.set_num_threads(1)  # on busy cores, two threads mostly wait on each other


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_set(folder: Path, train: int = 256, test: int = 64) -> Path:
    """Bars whose place and direction tell the label, with a little noise in their strength."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for name, count in (("train", train), ("t10k", test)):
        labels = random.integers(0, 10, count)
        images = np.zeros((count, 28, 28), np.uint8)
        for image, label in zip(images, labels):
            place = 5 + 4 * (label % 5)
            rows, columns = ((slice(place, place + 3), slice(4, 24)) if label < 5 else
                             (slice(4, 24), slice(place, place + 3)))
            image[rows, columns] = random.integers(180, 256)
        write_idx(folder / f"{name}-images-idx3-ubyte", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte", labels)
    return folder


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Of the Gaussians fitted to features a [N, D] and b [M, D]."""
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(dim=0), x.T.cov()) for x in (a.double(), b.double()))
    return frechet_from_moments(mean_a, cov_a, mean_b, cov_b).item()


@pytest.fixture(scope="session", autouse=True)
def new_clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither data nor runs of whoever runs the tests are found: not beside the code, not in the current folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "ROOT", tmp_path_factory.mktemp("clone"))
        patch.chdir(tmp_path_factory.mktemp("current"))
        yield


@pytest.fixture(scope="session")
def idx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("idx"))


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, so that checkpoints/ and results/ are the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_root(own_folder: Path) -> Iterator[None]:
    """Within the test, permissions hold for root too, in the current folder by relative paths."""
    if os.name == "nt":
        pytest.skip("permissions are not those of POSIX")
    if (root := os.geteuid() == 0):
        os.chown(own_folder, 65534, -1)
        os.seteuid(65534)
    yield
    if root:
        os.seteuid(0)
