"""What the tests of the modes evaluate and compare share: few generated digits, and checkpoints of random weights."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from config import Config
from dataset import LabelledImages, describe
from diffusion import make_schedule
from model import UNet
from support import checkpoint, idx, loading, settings
from tests.conftest import TINY, write_idx

GENERATED = {split: loading.load_split(dataclasses.replace(Config(), dataset="generated"), split)
             for split in ("train", "test")}  # 900 and 100 of each class, in turn
FEW = {split: images[torch.arange(min(3000, len(images)))] for split, images in GENERATED.items()}


def load_few(patch: pytest.MonkeyPatch) -> None:
    """A third of the generated digits, for speed."""
    load = loading.load_split
    patch.setattr(loading, "load_split", lambda config, split: FEW[split] if config.dataset == "generated" else
                  load(config, split))


def save_network(path: Path, seed: int = 0, flags: tuple[str, ...] = (), **history: Any) -> None:
    """A checkpoint of random weights, which says that it was trained on FEW unless `history` says otherwise."""
    config = settings.parse(["--mode", "train", "--dataset", "generated", "--timesteps", "6", "--batch-size",
                             "64", *TINY, *flags])
    torch.manual_seed(seed)
    network = UNet(config.model)
    torch.nn.init.normal_(network.head.weight, std=0.05)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, {
        "config": settings.stored(config), "model": None, "ema": network.state_dict(), "optimizer": None, "step": 100,
        "history": {"data": describe(FEW["train"], "generated"), "seconds": 60.0,
                    "alpha_bar": make_schedule(config.diffusion).alpha_bar, **history}})


def write_images(folder: Path, train: LabelledImages, test: LabelledImages) -> Path:
    """The four IDX files of --dataset idx."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, images in (("train", train), ("test", test)):
        for name, values in zip(idx.FILES[split], (images.images[:, 0].numpy(), images.labels.numpy())):
            write_idx(folder / name, np.asarray(values))
    return folder
