"""A data set from its files: in which folder they lie, and both splits, read and verified, on the device."""

import os
from pathlib import Path

import numpy as np
import torch

from config import ROOT, Config, UserError
from dataset import CLASSES, SOURCES, LabelledImages
from support import idx, pictures
from support.runtime import Runtime

GENERATED = ROOT / "dataset" / "generated"  # digits sampled by benchmarks/ship.py
DARK = 128  # images none of whose pixels is this bright were hardly meant to be
NOTICE = """
NOT MNIST: these are the generated digits that ship with the project, sampled from its own model. \
The run is named "generated" unless you named it. \
For the real data set, put MNIST's four files into its folder, or run again online.
"""


def data_folder(config: Config, name: str) -> Path:
    """--data-dir; unset, the dataset/ of the current folder, or the one beside the code if only that has the data."""
    if config.data_dir is not None:
        try:
            return config.data_dir.expanduser()
        except RuntimeError:
            raise UserError(f"--data-dir {config.data_dir}: no such home folder; give the whole path") from None
    source, roots = SOURCES[name], (Path("dataset"), ROOT / "dataset")
    return next((root for root in roots if idx.is_complete(source.folder(root, name), source.digests)), roots[0])


def load_folder(config: Config) -> dict[str, LabelledImages]:
    """Both splits, "train" and "test", of a folder of pictures; raises UserError."""
    splits, class_names, inverted = pictures.read_folder(data_folder(config, "folder"), config.invert, CLASSES)
    about = {"class_names": class_names, "inverted": inverted}
    return {split: LabelledImages(torch.from_numpy(images)[:, None], torch.from_numpy(labels), about)
            for split, (images, labels) in splits.items()}


def load_split(config: Config, split: str) -> LabelledImages:
    """The split "train" or "test" of the data set of a settled config; raises UserError."""
    if config.dataset == "folder":
        return load_folder(config)[split]
    name = config.dataset
    if name == "generated":
        folder, digests, advice = GENERATED, idx.GENERATED_MD5, "get it again from the project's repository"
    elif name == "idx":
        folder, digests, advice = data_folder(config, name), {}, "replace it, or choose another --data-dir"
        if os.path.isdir(folder / "MNIST" / "raw"):
            folder = folder / "MNIST" / "raw"
    else:
        digests, advice = dict(SOURCES[name].digests), "delete it to have it downloaded again, or replace it"
        folder = SOURCES[name].folder(data_folder(config, name), name)
        if not idx.is_complete(folder, digests):
            idx.download(SOURCES[name], folder)
    images, labels = idx.read_split(folder, split, digests, CLASSES, advice)
    return LabelledImages(torch.from_numpy(images)[:, None], torch.from_numpy(labels.astype(np.int64)))


def load_both(config: Config, runtime: Runtime) -> tuple[LabelledImages, LabelledImages]:
    """Training and test images, on the device of every process; the first one reads or downloads them."""
    train, test = runtime.on_rank0(lambda: [*load_folder(config).values()] if config.dataset == "folder" else
                                   [load_split(config, split) for split in idx.FILES])
    if (brightest := train.images.max().item()) < DARK:
        runtime.say(f"note: the brightest pixel of the training images is {brightest}, not 255, so they look black: "
                    "scale them to 0 to 255 before they become bytes, and write the files again")
    return train.to(runtime.device), test.to(runtime.device)
