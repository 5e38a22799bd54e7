"""Checkpoints: saved whole or not at all, and loaded without running any code of theirs.

A file is safetensors: tensors by flat name, and all else (config, step, history, format version) as JSON in its
metadata, with a digest of both. Loading ends in the state that was saved, or in a UserError that names the file.
last.safetensors is never absent once it was there, and previous.safetensors is the one before it.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from config import UserError
from support.files import file_exists, write_atomically

FORMAT_VERSION = 2
KEYS = {"config": (dict,), "model": (dict, type(None)), "ema": (dict,), "optimizer": (dict, type(None)), "step": (int,),
        "history": (dict,), "version": (int,), "digest": (str,)}  # what a checkpoint holds, and of which types
LAST, PREVIOUS = "last.safetensors", "previous.safetensors"
ADVICE = "use another file, or train again"


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a state: nested dicts, lists and tuples of tensors and plain values; its keys are KEYS but the last two.

    Raises WriteError if it can't be written; the file that was there stays. An old last.safetensors becomes previous.*.
    """
    content = {key: state[key] for key in KEYS if key not in ("version", "digest")} | {"version": FORMAT_VERSION}
    tensors: dict[str, Tensor] = {}
    outline = _outline(content, "", tensors)
    metadata = {"content": json.dumps(outline), "digest": _digest(outline, tensors)}
    data = safetensors.torch.save(tensors, metadata)
    with contextlib.suppress(OSError):
        for stale in path.parent.glob(f".{path.name}.*.part"):  # left by a kill in the middle of a save
            stale.unlink()
    write_atomically(path, lambda file: file.write(data), _keep_previous if path.name == LAST else None)


def _keep_previous(path: Path) -> None:
    """Copies last.* to previous.*, so that neither is ever absent or half written."""
    if path.exists():
        spare = path.with_name(f".{path.name}.previous.part")
        shutil.copyfile(path, spare)
        os.replace(spare, path.with_name(PREVIOUS))


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
    return value  # json.dumps refuses what it has no form for


def _restored(node: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """What an object of that JSON stands for; the objects in it are restored already."""
    if "$tensor" in node:
        return tensors[node["$tensor"]]
    if "$tuple" in node:
        return tuple(node["$tuple"])
    if "$numbered" in node:
        return {int(key): item for key, item in node["$numbered"].items()}
    return node


def _digest(outline: Any, tensors: Mapping[str, Tensor]) -> str:
    text = json.dumps(outline, sort_keys=True)
    return hashlib.sha256(f"{len(text)} {text}".encode() + _hash(tensors).digest()).hexdigest()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """First 16 hex digits of the SHA-256 over names, dtypes, shapes and values: what names weights everywhere."""
    return _hash(weights).hexdigest()[:16]


def _hash(tensors: Mapping[str, Tensor]) -> Any:
    sha = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha


def load(path: Path) -> dict[str, Any]:
    """The state that was saved, with its tensors on the CPU; raises UserError for a file that is anything else."""
    try:
        return _load(path)
    except UserError as error:
        problem, previous = str(error), path.with_name(PREVIOUS)
    if path.name == LAST:
        with contextlib.suppress(UserError):
            _load(previous)
            problem += (f"; the one before it, {previous}, is whole: sample with --checkpoint {previous}, or rename it "
                        f"to {LAST} to resume the run from there")
    raise UserError(problem)


def _load(path: Path) -> dict[str, Any]:
    tensors, metadata = read_tensors(path, ADVICE)
    try:
        digest = _digest(json.loads(metadata["content"]), tensors)
        state = json.loads(metadata["content"], object_hook=partial(_restored, tensors=tensors))
        state |= {"digest": metadata["digest"]}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: not a checkpoint of this project (other metadata); {ADVICE}") from None
    if type(version := state.get("version")) is int and version > FORMAT_VERSION:
        raise UserError(f"{path}: written by a later version of the project (format {version}); update the project")
    wrong = [key for key in {**KEYS, **state} if type(state.get(key, ...)) not in KEYS.get(key, ())]
    wrong = wrong or [f"{part}.{name}" for part in ("model", "ema") for name, value in (state[part] or {}).items()
                      if type(name) is not str or not isinstance(value, Tensor)]
    if wrong or state["step"] < 0:
        raise UserError(f"{path}: not a checkpoint of this project (missing, unknown or not of the right type: "
                        f"{', '.join(f'{key!r:.40}' for key in wrong[:8] or ['step'])}); {ADVICE}")
    if digest != state["digest"]:
        raise UserError(f"{path}: its content is not what was saved, by its digest: damaged or changed; {ADVICE}")
    return state


def read_tensors(path: Path, advice: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, by name, and its metadata; raises UserError, which ends with the advice."""
    if not file_exists(path):
        raise UserError(f"{path}: there is no such file; {advice}")
    try:
        data = path.read_bytes()  # at once, since a run may replace the file; safe_open opens it twice
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}): make it readable, or {advice}") from None
    try:
        header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])  # which the library has no call for
        return safetensors.torch.load(data), header.get("__metadata__", {})
    except (ValueError, RuntimeError, AttributeError, RecursionError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: damaged, or not a safetensors file ({str(error)!r:.120}); {advice}") from None


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copies weights into a network, strictly; raises UserError for any that do not fit it or are not finite."""
    try:
        network.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise UserError(f"{path}: its weights don't fit the network that its config describes and model.py makes "
                        f"({' '.join(str(error).split()):.300}); {ADVICE}") from None
    for name, value in network.state_dict().items():
        if not torch.isfinite(value).all():
            raise UserError(f"{path}: the weight {name} is not finite; {ADVICE}")
