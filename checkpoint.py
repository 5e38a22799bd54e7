"""Checkpoints: saved whole or not at all, loaded without trusting them, and found.

A file is what torch.save writes of plain values and tensors, with a format version and a digest of all of it. Whoever
made it, loading runs none of its code, reads no more than the file's own size, and ends in the state that was saved or
in a UserError that names the file. last.pt is never absent once it was there, and previous.pt is the one before it.
"""

import contextlib
import errno
import hashlib
import io
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import numpy as np
import torch
from torch import Tensor, nn

from config import UserError

FORMAT_VERSION = 1
KEYS = ("config", "model", "ema", "optimizer", "step", "history", "version", "digest")
LAST, PREVIOUS, PRETRAINED = "last.pt", "previous.pt", "pretrained.pt"
DTYPES = {"FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
          "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
          "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool}
MAX_DEPTH = 16  # of containers within containers
ADVICE = "use another file, or train again with --fresh"

no_lock = contextlib.nullcontext  # for the processes of a run that write nothing


# Writing


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a state with the keys of KEYS but for version and digest; model and optimizer may be None.

    Raises UserError if the file can't be written; the one that was there stays. The last.pt before becomes previous.pt.
    """
    if set(state) - {"version", "digest"} != set(KEYS) - {"version", "digest"}:
        raise KeyError(f"a checkpoint has the keys {', '.join(KEYS)}, not {', '.join(state)}")
    path = Path(path)
    content = _plain({**state, "version": FORMAT_VERSION, "digest": ""})
    for part in ("model", "ema"):
        content[part] = _clean_names(content[part])
    content["digest"] = digest(content)
    buffer = io.BytesIO()  # torch.save into a file that fills up its disk does not fail as an OSError
    torch.save(content, buffer)
    _check_values(content, [buffer.tell()])  # what is written can be read
    for stale in path.parent.glob(f".{path.name}.*.part"):  # left by a kill in the middle of a save
        with contextlib.suppress(OSError):
            stale.unlink()
    keep = _keep_previous if path.name == LAST else None
    write_atomically(path, lambda file: file.write(buffer.getbuffer()), keep)


def write_atomically(path: Path, write: Callable[[Any], Any], before: Callable[[Path], None] | None = None) -> None:
    """Calls write(binary file) on a file beside path, which then takes its place.

    Just before that, calls before(path). Raises UserError if it can't be written, and leaves path as it was.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if before is not None:
            before(path)
        os.replace(part, path)
        _sync_folder(path.parent)
    except OSError as error:
        advice = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some space", errno.EACCES: "make it writable",
                  errno.EPERM: "make it writable", errno.EROFS: "use a folder that is writable",
                  errno.ENOENT: "make its folder first"}.get(error.errno or 0, "check the disk")
        kept = "; the file that was there is untouched" if path.is_file() else ""
        raise UserError(f"{path}: can't be written ({error.strerror or error}): {advice}{kept}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _keep_previous(path: Path) -> None:
    """Makes previous.pt of last.pt, by giving it a second name, so that neither is ever absent or half written."""
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


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _plain(value: Any) -> Any:
    """A copy of nested containers, plain values and tensors, in which no tensor shares or drags along memory."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(_plain(item) for item in value)
    if isinstance(value, np.generic):
        return value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"a checkpoint can't hold a {type(value).__name__}: {value!r}")


def _clean_names(weights: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Names without the prefixes that torch.compile and DistributedDataParallel add; ValueError if two become one."""
    if weights is None:
        return None
    cleaned = {re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")): value for name, value in weights.items()}
    if len(cleaned) != len(weights):
        raise ValueError("it holds the same weight twice, with and without a prefix")
    return cleaned


# Digests


def digest(state: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over all of a state but its digest, whatever the order of its dicts and the layout in memory."""
    content = {key: value for key, value in state.items() if key != "digest"}
    content |= {part: _clean_names(content[part]) for part in ("model", "ema") if part in content}
    sha = hashlib.sha256()
    _feed(sha, content)
    return sha.hexdigest()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """First 16 hex digits of the SHA-256 over names, dtypes, shapes and values: what pictures call their weights."""
    sha = hashlib.sha256()
    _feed(sha, _clean_names(weights))
    return sha.hexdigest()[:16]


def _feed(sha: Any, value: Any) -> None:
    """Every value goes in as a tag with its length, then its content, so that no two different ones look the same."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        sha.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        sha.update(value.flatten().view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        sha.update(f"dict {len(value)};".encode())
        for key in sorted(value, key=lambda key: (type(key).__name__, repr(key))):
            _feed(sha, key)
            _feed(sha, value[key])
    elif isinstance(value, (list, tuple)):
        sha.update(f"{'list' if isinstance(value, list) else 'tuple'} {len(value)};".encode())
        for item in value:
            _feed(sha, item)
    else:
        text = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else repr(value).encode()
        sha.update(f"{type(value).__name__} {len(text)};".encode() + text)


# Reading


def load(path: Path) -> dict[str, Any]:
    """The state that was saved, with its tensors on the CPU; raises UserError for a file that is anything else."""
    path = Path(path)
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
    if not os.path.isfile(path):
        what = "this is a folder, not a checkpoint" if os.path.isdir(path) else "there is no such checkpoint"
        raise UserError(f"{path}: {what}; {ADVICE}")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            archive = _read_archive(file, size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(archive, map_location="cpu", weights_only=True)
        _check_values(state, [size])
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error}); {ADVICE}") from None
    except _Hostile as error:
        raise UserError(f"{path}: {error}, as no checkpoint of this project does; it was not run; {ADVICE}") from None
    except Exception as error:  # there is no end to what a strange file makes zipfile, pickle and torch raise
        reason = "".join(filter(str.isprintable, (str(error).strip().splitlines() or [type(error).__name__])[0]))[:120]
        raise UserError(f"{path}: damaged, or not a checkpoint of this project ({reason}); {ADVICE}") from None
    problem = _problem(state)
    if problem is not None:
        raise UserError(f"{path}: {problem}")
    return state | {part: _clean_names(state[part]) for part in ("model", "ema")}


class _Hostile(Exception):
    """A pickle that wants more than to hold values and tensors."""


def _read_archive(file: BinaryIO, size: int) -> io.BytesIO:
    """The records of a checkpoint that matter, verified and put into an archive of our own.

    Torch gets to see this archive only, because two readers of one odd zip file may find different things in it.
    """
    archive = io.BytesIO()
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(archive, "w") as target:
        entries = source.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > size:
            raise ValueError("it is compressed, or unpacks to more than its own size")
        names = {entry.filename.partition("/")[2]: entry for entry in entries}
        if len(names) != len(entries) or "data.pkl" not in names:
            raise ValueError("not written by torch.save")
        _check_pickle(source.read(names["data.pkl"]), {name: entry.file_size for name, entry in names.items()})
        target.writestr("checkpoint/version", "3\n")
        for name, entry in names.items():
            if name in ("data.pkl", "byteorder") or name.startswith("data/"):
                target.writestr(f"checkpoint/{name}", source.read(entry))
    archive.seek(0)
    return archive


def _check_pickle(data: bytes, sizes: Mapping[str, int]) -> None:
    """Runs a pickle with stand-ins for all that it may name, before torch does it for real; raises any error."""

    # The C unpickler allocates as many memo slots as a file asks for; this one has a dict.
    class Guard(pickle._Unpickler):  # type: ignore[name-defined]
        def find_class(self, module: str, name: str) -> Any:
            if module == "torch" and name in DTYPES:
                return DTYPES[name]
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return lambda *_: None
            if (module, name) == ("collections", "OrderedDict"):
                return OrderedDict
            raise _Hostile(f"it asks to run {f'{module}.{name}'!r:.80}")

        def persistent_load(self, identity: Any) -> None:
            kind, dtype, key, _, count = identity
            # Not every torch compares the two, and it would read beyond the end of the record.
            if kind != "storage" or type(count) is not int or count * dtype.itemsize != sizes[f"data/{key}"]:
                raise ValueError(f"tensor {key} has another size than its record")

    Guard(io.BytesIO(data)).load()


def _check_values(value: Any, allowance: list[int], depth: int = 0) -> None:
    """ValueError unless all is plain values and dense tensors that fit, each thing counted as often as it is used.

    So a list that holds itself, or the same one many times over, and tensors that share their memory, end here.
    """
    allowance[0] -= 1 + (value.nbytes if isinstance(value, Tensor) else 0)
    if allowance[0] < 0 or depth > MAX_DEPTH:
        raise ValueError("it unfolds to more than its own size")
    if isinstance(value, Tensor):
        if type(value) is not Tensor or value.dtype not in DTYPES.values() or value.requires_grad or (
                value.layout is not torch.strided or value.untyped_storage().nbytes() != value.nbytes):
            raise ValueError("a tensor of an odd kind")
    elif isinstance(value, (dict, list, tuple)):
        if isinstance(value, dict) and not all(type(key) in (str, int) for key in value):
            raise ValueError("a dict with odd keys")
        for item in value.values() if isinstance(value, dict) else value:
            _check_values(item, allowance, depth + 1)
    elif value is not None and type(value) not in (bool, int, float, str):
        raise ValueError(f"a {type(value).__name__}")


def _problem(state: Any) -> str | None:
    """What keeps plain values from being a checkpoint that this version wrote, and what to do about it; or None."""
    if not isinstance(state, dict):
        return f"not a checkpoint of this project; {ADVICE}"
    version = state.get("version")
    if type(version) is int and version > FORMAT_VERSION:
        return f"written by a later version of the project (format {version}, not {FORMAT_VERSION}); update the project"
    missing = [f"{key} missing" for key in KEYS if key not in state]
    extra = [f"{key!r:.40} unknown" for key in state if key not in KEYS]
    if missing or extra:
        said = ", ".join((missing + extra)[:8])
        return f"not a checkpoint of this project ({said}); {ADVICE}"

    def is_weights(value: Any) -> bool:
        return isinstance(value, dict) and all(type(k) is str and isinstance(v, Tensor) for k, v in value.items())

    right = {"config": isinstance(state["config"], dict), "history": isinstance(state["history"], dict),
             "model": state["model"] is None or is_weights(state["model"]), "ema": is_weights(state["ema"]),
             "optimizer": state["optimizer"] is None or isinstance(state["optimizer"], dict),
             "step": type(state["step"]) is int and state["step"] >= 0,
             "version": type(version) is int and version > 0, "digest": type(state["digest"]) is str}
    wrong = [key for key, ok in right.items() if not ok]
    if wrong:
        return f"not a checkpoint of this project (not of the right type: {', '.join(wrong)}); {ADVICE}"
    try:
        if digest(state) != state["digest"]:
            return f"its content is not what was saved, by its digest: it was damaged or changed; {ADVICE}"
    except ValueError as error:  # from _clean_names
        return f"{error}; {ADVICE}"
    return None


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copies weights into a network, strictly; raises UserError naming the first one that does not fit it."""
    own = network.state_dict()
    for name in [*own, *weights]:
        if name not in weights or name not in own:
            word = "missing" if name in own else "unknown"
            raise UserError(f"{path}: the weight {name!r:.80} is {word}, for the network that its config describes; "
                            f"{ADVICE}")
        value, target = weights[name], own[name]
        if value.shape != target.shape:
            raise UserError(f"{path}: the weight {name} has the shape {tuple(value.shape)}, where the network that its "
                            f"config describes has {tuple(target.shape)}; {ADVICE}")
        if value.is_floating_point() != target.is_floating_point():
            raise UserError(f"{path}: the weight {name} is {value.dtype}, the network's {target.dtype}; {ADVICE}")
        if not torch.isfinite(value.to(target.dtype)).all():
            raise UserError(f"{path}: the weight {name} is not finite; {ADVICE}")
    network.load_state_dict(dict(weights))


# Which file, and whose


def find(name: str, explicit: Path | None, root: Path = Path("checkpoints")) -> Path:
    """The checkpoint that is meant: explicit, or the run's own, or the project's own; raises UserError without one."""
    if explicit is not None:
        if os.path.isdir(explicit):
            raise UserError(f"{explicit}: this is a folder; name a file, such as {explicit / LAST}")
        if not os.path.isfile(explicit):
            raise UserError(f"{explicit}: there is no such checkpoint; give --checkpoint another path, or leave it out")
        return explicit
    for path in (root / name / LAST, root / PRETRAINED):
        if os.path.exists(path):
            return path
    raise UserError(f"{root / name / LAST}: there is no checkpoint yet, nor {root / PRETRAINED}; train first with "
                    "--mode train, or name another with --checkpoint")


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds a run's folder; raises UserError if another process does. The system frees it, however a process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(folder / "lock", timeout=0)
        held.acquire()
    except filelock.Timeout:
        raise UserError(f"another run of this name is going on ({folder}): wait, or choose another --name") from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: can't be locked ({reason}); make it writable, or choose another --name") from None
    try:
        yield
    finally:
        held.release()
