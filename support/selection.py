"""Which checkpoint, run, data set and results folder are meant: decided here alone, before a mode does anything."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from config import ROOT, Config, UserError
from dataset import SOURCES
from support import checkpoint, idx
from support.checkpoint import LAST, PREVIOUS
from support.console import say
from support.files import dead_link, file_exists, set_aside
from support.loading import NOTICE, data_folder
from support.runtime import Runtime
from support.settings import RESERVED

RUNS = Path("checkpoints")  # the folder of the user's runs
PRETRAINED = ROOT / "checkpoints" / "pretrained.safetensors"


def settle(config: Config, runtime: Runtime, data: Mapping[str, Any] | None = None) -> Config:
    """The config with its checkpoint, name and data set decided, which is the first step of every mode.

    In modes sample and evaluate, `sample.checkpoint` becomes a file. Unless --dataset is given, the data set is the
    checkpoint's own; for a new run it is MNIST or, where MNIST is unavailable and no --data-dir was given, generated
    digits. Pictures are inverted as the checkpoint's were. `data`: what a checkpoint that is loaded already
    stores of its images. Raises UserError for a run that does not exist and for unavailable data.
    """
    path = None
    if config.mode in ("sample", "evaluate"):
        path = find(config)
        if path == PRETRAINED and config.sample.checkpoint is None:
            missing, hint = "There is no run of your own yet", ""
            if run_names():
                missing, hint = "There is no run named mnist", f"{list_runs()} Choose one with --name."
            runtime.say(f"{missing}, so this uses the pretrained weights, which come with the project.{hint}")
        config = replace(config, sample=replace(config.sample, checkpoint=path))
    elif config.mode == "train" and (config.name or config.dataset != "auto") and not config.train.fresh:
        path = run_path(config.name or config.dataset)
    if config.mode == "sample":
        return config
    if config.dataset == "auto" or config.dataset == "folder" and config.invert is None:
        known = runtime.on_rank0(lambda: stored_data(path) if data is None else data)
        if config.dataset == "auto":
            name = data_name(known, config) or runtime.on_rank0(lambda: _mnist_or_generated(config))
            config = replace(config, dataset=name)
        if config.dataset == "folder" and config.invert is None:
            config = replace(config, invert=known.get("inverted"))
    if config.dataset != "folder" and config.invert is not None:
        raise UserError("--invert, --no-invert: only pictures of --dataset folder are inverted; leave it out")
    if config.dataset in ("folder", "idx") and config.data_dir is None:
        files = "the pictures" if config.dataset == "folder" else "its four IDX files"
        raise UserError(f"--dataset {config.dataset}: say with --data-dir in which folder {files} are")
    return replace(config, name=config.name or config.dataset) if config.mode == "train" else config


def stored_data(path: Path | None) -> dict[str, Any]:
    """What a checkpoint, if there is one, stores of the images that it was trained on (`dataset.describe`)."""
    data = checkpoint.load(path)["history"].get("data") if path and file_exists(path) else None
    return data if isinstance(data, dict) else {}


def data_name(data: Mapping[str, Any], config: Config) -> Any:
    """The --dataset of the training images that are so described; None if this version does not have it.

    Also None for the generated digits where --data-dir, which they don't use, was given: it is never ignored.
    """
    name, usable = data.get("name"), (*SOURCES, "folder", "idx")
    return name if name in usable or name == "generated" and config.data_dir is None else None


def _mnist_or_generated(config: Config) -> str:
    source = SOURCES["mnist"]
    folder = source.folder(data_folder(config, "mnist"), "mnist")
    if not idx.is_complete(folder, source.digests):
        try:
            idx.download(source, folder)
        except UserError as error:
            if config.data_dir is not None:
                raise
            say(f"{error}\n{NOTICE}")
            return "generated"
    return "mnist"


def run_path(name: str) -> Path:
    """The checkpoint of the run of that name."""
    return RUNS / name / LAST


def run_exists(name: str) -> bool:
    """Whether a run has a checkpoint, be it only the previous one, to which the error of `checkpoint.load` points.

    Raises UserError where that can't be seen: an unreadable folder is not an empty one.
    """
    return any(file_exists(RUNS / name / file) for file in (LAST, PREVIOUS))


def run_names() -> list[str]:
    """The user's runs; raises UserError if they can't be listed."""
    try:
        return sorted(name for name in os.listdir(RUNS) if os.path.isfile(run_path(name)))
    except FileNotFoundError:
        if advice := dead_link(RUNS):
            raise UserError(advice) from None
        return []
    except OSError as error:
        raise UserError(f"{RUNS}: can't be listed ({error.strerror}): make it a readable folder") from None


def list_runs() -> str:
    """A sentence that lists the user's runs."""
    return f" Runs in {RUNS}/: {', '.join(run_names()) or 'none'}."


def find(config: Config) -> Path:
    """The checkpoint of --checkpoint, --name or --dataset; else of the run mnist or generated; else the pretrained one.

    Raises UserError if the one that was asked for is not there.
    """
    if config.sample.checkpoint is not None:
        return resolve(str(config.sample.checkpoint), "--checkpoint")
    if config.name is not None or config.dataset != "auto":
        flag, name = ("--dataset", str(config.dataset)) if config.name is None else ("--name", config.name)
        if not run_exists(name):
            raise UserError(f"{flag} {name}: there is no run of that name ({run_path(name)}).{list_runs()} Train it "
                            "first, name another, or use --checkpoint pretrained")
        return run_path(name)
    return next((run_path(name) for name in ("mnist", "generated") if run_exists(name)), PRETRAINED)


def resolve(text: str, flag: str) -> Path:
    """The checkpoint that a text names: "pretrained", a file, a folder of a run, or a run; raises UserError."""
    if text.casefold() == RESERVED[0]:
        return PRETRAINED
    path = Path(os.path.expanduser(text))
    for candidate in (path, path / LAST, run_path(text)):
        if file_exists(candidate):
            return candidate
    raise UserError(f"{flag} {text:.200}: there is no such checkpoint, nor a run of that name.{list_runs()} Name one "
                    "of these, a file, or pretrained")


def results_folder(path: Path, digest: str) -> Path:
    """Where results go: results/NAME for a run, else results/FILE-DIGEST, such as results/pretrained-19fdf787."""
    path = Path(os.path.abspath(path))
    name = path.parent.name
    if path == Path(os.path.abspath(run_path(name))) and name.casefold() not in RESERVED:
        return Path("results", name)
    stem = {LAST: name, PREVIOUS: f"{name}-previous"}.get(path.name, path.stem)
    return Path("results", f"{stem[:100]}-{digest[:8]}")


def keep_old(folder: Path, results: Path) -> None:
    """Keeps what an earlier run left: its checkpoints in checkpoints/NAME/old1/, its results in results/NAME/old1/."""
    set_aside([*folder.glob("last.*"), *folder.glob("previous.*")], folder)
    set_aside([path for path in results.iterdir() if path.is_file()], results)
