"""Checkpoints: saved whole or not at all, loaded without running any code of theirs, and found.

A file is safetensors: tensors by flat name, and all else (config, step, history, format version) as JSON in its
metadata, with a digest of both. Loading ends in the state that was saved, or in a UserError that names the file.
last.safetensors is never absent once it was there, and previous.safetensors is the one before it.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from config import ROOT, UserError
from support.files import write_atomically

FORMAT_VERSION = 2  # 1 was torch.save's .pt
KEYS = ("config", "model", "ema", "optimizer", "step", "history", "version", "digest")
LAST, PREVIOUS, FIRST_VERSION = "last.safetensors", "previous.safetensors", "last.pt"
PRETRAINED = ROOT / "checkpoints" / "pretrained.safetensors"
ADVICE = "use another file, or train again with --fresh"


# Writing


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a state with the keys of KEYS but for version and digest; model and optimizer may be None.

    It holds nested dicts, lists and tuples of tensors and plain values. Raises UserError if the file can't be written;
    the one that was there stays. The last.safetensors before becomes previous.safetensors.
    """
    if set(state) - {"version", "digest"} != set(KEYS) - {"version", "digest"}:
        raise KeyError(f"a checkpoint has the keys {', '.join(KEYS)}, not {', '.join(state)}")
    content = {key: value for key, value in state.items() if key != "digest"} | {"version": FORMAT_VERSION}
    for part in ("model", "ema"):
        content[part] = content[part] and {clean_name(name): value for name, value in content[part].items()}
    tensors: dict[str, Tensor] = {}
    outline = _outline(content, "", tensors)
    metadata = {"content": json.dumps(outline), "digest": _digest(outline, tensors)}
    data = safetensors.torch.save(tensors, metadata)
    for stale in path.parent.glob(f".{path.name}.*.part"):  # left by a kill in the middle of a save
        with contextlib.suppress(OSError):
            stale.unlink()
    write_atomically(path, lambda file: file.write(data), _keep_previous if path.name == LAST else None)


def _keep_previous(path: Path) -> None:
    """Makes previous.* of last.*, by giving it a second name, so that neither is ever absent or half written."""
    if not path.is_file():
        return
    spare, previous = path.with_name(f".{PREVIOUS}.part"), path.with_name(PREVIOUS)
    spare.unlink(missing_ok=True)
    try:
        os.link(path, spare)
    except OSError:  # a file system without hard links
        with open(path, "rb") as source, open(spare, "wb") as target:
            shutil.copyfileobj(source, target)
            target.flush()
            os.fsync(target.fileno())
    os.replace(spare, previous)
    spare.unlink(missing_ok=True)  # a rename does nothing where both names were the same file already


def clean_name(name: str) -> str:
    """A weight's name without the prefixes that torch.compile and DistributedDataParallel add."""
    return re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", ""))


def _outline(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON has it, its tensors put aside under their flat names: the inverse of `_restored`."""
    if isinstance(value, Tensor):
        if name in tensors:
            raise ValueError(f"two tensors have the name {name}")
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"$tensor": name}
    if isinstance(value, Mapping):
        inner = {key: _outline(item, f"{name}.{key}" if name else str(key), tensors) for key, item in value.items()}
        if inner and all(type(key) is int for key in inner):
            return {"$numbered": {str(key): item for key, item in inner.items()}}
        if not all(type(key) is str and not key.startswith("$") for key in inner):
            raise TypeError(f"a checkpoint can't hold the keys {list(inner)!r:.80}")
        return inner
    if isinstance(value, (list, tuple)):
        items = [_outline(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"a checkpoint can't hold a {type(value).__name__}: {value!r}")


def _restored(outline: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(outline, list):
        return [_restored(item, tensors) for item in outline]
    if not isinstance(outline, dict):
        return outline
    if "$tensor" in outline:
        return tensors[outline["$tensor"]]
    if "$tuple" in outline:
        return tuple(_restored(item, tensors) for item in outline["$tuple"])
    if "$numbered" in outline:
        return {int(key): _restored(item, tensors) for key, item in outline["$numbered"].items()}
    return {key: _restored(item, tensors) for key, item in outline.items()}


# Digests


def digest(state: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over all of a state but its digest, whatever the order of its dicts and the layout in memory."""
    tensors: dict[str, Tensor] = {}
    return _digest(_outline({key: value for key, value in state.items() if key != "digest"}, "", tensors), tensors)


def _digest(outline: Any, tensors: Mapping[str, Tensor]) -> str:
    text = json.dumps(outline, sort_keys=True)
    return hashlib.sha256(f"{len(text)} {text}".encode() + _hash(tensors).digest()).hexdigest()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """First 16 hex digits of the SHA-256 over names, dtypes, shapes and values: what names weights everywhere."""
    return _hash({clean_name(name): value for name, value in weights.items()}).hexdigest()[:16]


def _hash(tensors: Mapping[str, Tensor]) -> Any:
    sha = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha


# Reading


def load(path: Path) -> dict[str, Any]:
    """The state that was saved, with its tensors on the CPU; raises UserError for a file that is anything else."""
    try:
        return _load(path)
    except UserError as error:
        previous = path.with_name(PREVIOUS)
        if path.name == LAST and _loads(previous):
            raise UserError(f"{error}; the one before it, {previous}, is whole: draw with --checkpoint {previous}, or "
                            f"rename it to {LAST} to train on from there") from None
        raise


def _loads(path: Path) -> bool:
    with contextlib.suppress(UserError):
        return bool(_load(path))
    return False


def _load(path: Path) -> dict[str, Any]:
    tensors, metadata = read_tensors(path, ADVICE)
    try:
        outline = json.loads(metadata["content"])
        state = _restored(outline, tensors) | {"digest": metadata["digest"]}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: not a checkpoint of this project (other metadata); {ADVICE}") from None
    problem = _problem(state)
    if problem is None and _digest(outline, tensors) != state["digest"]:
        problem = f"its content is not what was saved, by its digest: it was damaged or changed; {ADVICE}"
    if problem is not None:
        raise UserError(f"{path}: {problem}")
    return state


def read_tensors(path: Path, advice: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, by name, and its metadata; raises UserError, which ends with the advice."""
    refuse_first_version(path)
    if not path.is_file():
        what = "this is a folder, not a file" if path.is_dir() else "there is no such file"
        raise UserError(f"{path}: {what}; {advice}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            # Copied, since the file may be replaced while they are in use.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        reason = "".join(filter(str.isprintable, getattr(error, "strerror", None) or str(error)))[:120]
        raise UserError(f"{path}: damaged, or not a safetensors file ({reason}); {advice}") from None


def _problem(state: Mapping[str, Any]) -> str | None:
    """What keeps plain values from being a checkpoint that this version wrote, and what to do about it; or None."""
    version = state.get("version")
    if type(version) is int and version > FORMAT_VERSION:
        return f"written by a later version of the project (format {version}, not {FORMAT_VERSION}); update the project"
    missing = [f"{key} missing" for key in KEYS if key not in state]
    extra = [f"{key!r:.40} unknown" for key in state if key not in KEYS]
    if missing or extra:
        return f"not a checkpoint of this project ({', '.join((missing + extra)[:8])}); {ADVICE}"

    def is_weights(value: Any) -> bool:
        return isinstance(value, dict) and all(type(k) is str and isinstance(v, Tensor) for k, v in value.items())

    right = {"config": isinstance(state["config"], dict), "history": isinstance(state["history"], dict),
             "model": state["model"] is None or is_weights(state["model"]), "ema": is_weights(state["ema"]),
             "optimizer": state["optimizer"] is None or isinstance(state["optimizer"], dict),
             "step": type(state["step"]) is int and state["step"] >= 0, "version": type(version) is int and version > 0}
    wrong = [key for key, ok in right.items() if not ok]
    return f"not a checkpoint of this project (not of the right type: {', '.join(wrong)}); {ADVICE}" if wrong else None


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copies weights into a network, strictly; raises UserError naming the first one that does not fit it."""
    own = network.state_dict()
    for name in [*own, *weights]:
        if name not in weights or name not in own:
            word = "missing" if name in own else "unknown"
            raise UserError(f"{path}: the weight {name!r:.80} is {word}, for the network that its config describes and "
                            f"model.py makes; {ADVICE}")
        value, target = weights[name], own[name]
        if value.shape != target.shape:
            raise UserError(f"{path}: the weight {name} has the shape {tuple(value.shape)}, where the network that its "
                            f"config describes has {tuple(target.shape)}; {ADVICE}")
        if value.is_floating_point() != target.is_floating_point():
            raise UserError(f"{path}: the weight {name} is {value.dtype}, the network's {target.dtype}; {ADVICE}")
        if not torch.isfinite(value.to(target.dtype)).all():
            raise UserError(f"{path}: the weight {name} is not finite; {ADVICE}")
    network.load_state_dict(dict(weights))


# Which file


def find(name: str, explicit: Path | None) -> Path:
    """The checkpoint that is meant: explicit, or the run's own, or the project's own; raises UserError without one."""
    if explicit is not None:
        refuse_first_version(explicit)
        if explicit.is_dir():
            raise UserError(f"{explicit}: this is a folder; name a file, such as {explicit / LAST}")
        if not explicit.is_file():
            raise UserError(f"{explicit}: there is no such checkpoint; give --checkpoint another path, or leave it out")
        return explicit
    own = Path("checkpoints") / name / LAST
    if own.exists():
        return own
    if own.with_name(FIRST_VERSION).exists():
        refuse_first_version(own.with_name(FIRST_VERSION))
    if PRETRAINED.exists():
        return PRETRAINED
    raise UserError(f"{own}: there is no checkpoint yet, nor {PRETRAINED}; train first with --mode train, or name "
                    "another with --checkpoint")


def refuse_first_version(path: Path) -> None:
    if path.suffix == ".pt":
        raise UserError(f"{path}: a checkpoint of the project's first version, which this one does not read; "
                        "train again with --fresh or another --name, or use the version that wrote it")


def is_there(folder: Path) -> bool:
    """Whether a run has a checkpoint to go on from; raises UserError where it had one that is gone or too old."""
    last, previous = folder / LAST, folder / PREVIOUS
    if not last.exists() and previous.exists():
        raise UserError(f"{last}: it is gone, but {previous} is there: rename it to {last.name} to go on from there, "
                        "or use --fresh")
    if not last.exists() and (folder / FIRST_VERSION).exists():
        refuse_first_version(folder / FIRST_VERSION)
    return last.exists()


def set_aside(folder: Path, results: Path) -> None:
    """Keeps what an earlier run left under new names: checkpoints/NAME/old1-last.safetensors, results/NAME/old1/."""
    number = next(n for n in itertools.count(1)
                  if not (list(folder.glob(f"old{n}-*")) or (results / f"old{n}").exists()))
    new = {path: results / f"old{number}" / path.name for path in results.iterdir() if path.is_file()}
    new |= {path: folder / f"old{number}-{path.name}" for path in [*folder.glob("last.*"), *folder.glob("previous.*")]}
    try:
        for old_path, new_path in new.items():
            new_path.parent.mkdir(exist_ok=True)
            old_path.rename(new_path)
    except OSError as error:
        raise UserError(f"{folder}: its checkpoint can't be renamed for --fresh ({error.strerror}); make it writable, "
                        "or choose another --name") from None
