"""Damages and forges checkpoints and IDX files by the thousand, and reads each of them.

    python benchmarks/fuzz.py --seconds 60

Each has to end in a UserError of one line, or in exactly what was written (for IDX files without known MD5s: in digits
that are well-formed). Another exception, more than 5 s, a gigabyte of memory or any side effect is a failure, and the
exit status is then 1.
"""

import argparse
import contextlib
import faulthandler
import gzip
import hashlib
import io
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint  # noqa: E402
import dataset  # noqa: E402
from config import UserError  # noqa: E402
from dataset import Digits  # noqa: E402

HANG_SECONDS = 5
MEMORY_LIMIT = 1 << 30  # bytes beyond what was needed at the start
State = dict[str, Any]
Failures = list[str]


class Hang(BaseException):
    """Not an Exception, so that no broad handler of the code under test swallows it."""


# Damage to bytes, of any kind of file


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def set_bytes(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    value = rng.choice((b"\0", b"\xff", b"\xff\xff\xff\xff", b"\0\0\0\x80", rng.randbytes(4)))
    return data[:at] + value + data[at + len(value):]


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[:rng.randrange(len(data))]


def delete(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.choice((1, 1, 2, 4, 64)):]


def insert(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 1, 2, 4, 64))) + data[at:]


def extend(rng: random.Random, data: bytes) -> bytes:
    more = rng.choice((rng.randbytes(rng.randrange(1, 100)), data))
    return rng.choice((data + more, more + data))


def splice(rng: random.Random, data: bytes) -> bytes:
    start, target, length = rng.randrange(len(data)), rng.randrange(len(data)), rng.randrange(1, 300)
    piece = data[start:start + length]
    return data[:target] + piece + data[target + len(piece):]


DAMAGES = (flip_bits, set_bytes, truncate, delete, insert, extend, splice)


# Forged checkpoints


class Network(nn.Module):
    """Small, with a weight of each kind that checkpoints hold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.linear = nn.Linear(3, 2)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("count", torch.arange(3))


def sample_states() -> list[State]:
    torch.manual_seed(0)
    network = Network()
    optimizer = torch.optim.AdamW(network.parameters())
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    weights = network.state_dict()
    full = {"config": {"seed": 3, "model": {"channels": [2, 3], "name": None}, "lr": 1e-3, "deep": {"on": True}},
            "model": weights, "ema": weights, "optimizer": {"adamw": optimizer.state_dict()}, "step": 7,
            "history": {"loss": [0.5, float("nan"), -0.0], "rows": [(1, "é"), (2, "")], "seen": torch.arange(4)}}
    half = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    return [full, {**full, "model": None, "optimizer": None, "ema": half, "history": {}}]


def written(state: State) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "a.pt", state)
        return (Path(folder) / "a.pt").read_bytes()


def torch_saved(state: Any, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, pickle_protocol=protocol)
    return file.getvalue()


def records_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def zipped(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return file.getvalue()


def forge_records(rng: random.Random, data: bytes) -> bytes:
    """Changes one record of the archive, whose own checksums are then right."""
    records = records_of(data)
    pickled = next(name for name in records if name.endswith("data.pkl"))
    name = rng.choice([pickled] * 3 + [name for name in records if records[name]])
    kind = rng.randrange(10)
    if kind < 6:
        records[name] = rng.choice(DAMAGES)(rng, records[name])
    elif kind == 6:
        del records[name]
    elif kind == 7:
        other = rng.choice(list(records))
        records[name], records[other] = records[other], records[name]
    elif kind == 8:
        records = {rng.choice((key.replace("archive", ""), key.replace("archive/", "../../"), key)): value
                   for key, value in records.items()}
    else:
        records[name.replace("data.pkl", "byteorder")] = rng.choice((b"big", b"little", b"\xff", b""))
    return zipped(records)


def compress(rng: random.Random, data: bytes) -> bytes:
    """A zip bomb, or the same content merely compressed."""
    records = records_of(data)
    if rng.random() < 0.7:
        records[rng.choice(list(records))] = bytes(rng.choice((10**4, 10**4, 10**6)))
    return zipped(records, rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)))


def overlap(rng: random.Random, data: bytes) -> bytes:
    """An archive whose directory lists one record many times, or claims another size or place for it."""
    end = data.rindex(b"PK\5\6")
    count, size, start = struct.unpack("<HII", data[end + 10:end + 20])
    directory = data[start:start + size]
    times = rng.choice((1, 2, 100))
    forged = bytearray(directory * times)
    at = rng.choice([i for i in range(len(forged)) if forged[i:i + 4] == b"PK\1\2"])
    field = rng.choice((20, 24, 42))  # compressed size, size, offset
    value = rng.choice((0, 1, 10**6, 2**31, 2**32 - 1, rng.randrange(len(data))))
    forged[at + field:at + field + 4] = struct.pack("<I", value)
    tail = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count * times, count * times, len(forged), start, 0)
    return data[:start] + bytes(forged) + tail


class Calls:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def hostile_values(marker: Path) -> list[Any]:
    """What a checkpoint never holds: calls, containers that unfold without end, and odd tensors and values."""
    code = f"open({str(marker)!r}, 'w')"
    storage = torch.zeros(4)
    loop: list[Any] = []
    loop.append(loop)
    laugh: Any = [0]
    for _ in range(40):
        laugh = [laugh, laugh]
    deep: Any = None
    for _ in range(400):
        deep = [deep]
    return [
        Calls(os.system, f"touch {marker}"), Calls(eval, code), Calls(exec, code), Calls(open, str(marker), "w"),
        Calls(os.mkdir, str(marker)), Calls(subprocess.Popen, ["touch", str(marker)]), Calls(getattr, os, "system"),
        Calls(torch.save, 1, str(marker)), Calls(pickle.loads, b"N."), Calls(bytearray, 10**11),
        Calls(torch.empty, 10**6), Calls(torch.FloatStorage, 10**6), Calls(torch._utils._rebuild_tensor_v2, 1, 2, 3),
        Calls(OrderedDict, [("a", 1)]), Network(), Path("x"), loop, laugh, deep,
        {1, 2}, b"bytes", bytearray(3), 1j, 10**400, "\udc80", {(1, 2): 3}, {1.5: 2}, Counter("aab"),
        torch.float32, torch.Size([1]), torch.device("cpu"), nn.Parameter(storage), storage.expand(10**6, 4),
        storage[1:2], storage.to_sparse(), torch.zeros(2, dtype=torch.complex64), torch.zeros(3, requires_grad=True),
        torch.empty(10**9, device="meta"), [storage] * 10**4]


RAW_PICKLES = (
    b"cos\nsystem\n(S'touch {}'\ntR.", b"(S'touch {}'\nios\nsystem\n.",
    b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x09touch {}\x85R.",
    b"\x80\x02}r\xff\xff\xff\x7f.", b"\x80\x02K\x01.", b"\x80\x02]q\0h\0a.", b".",  # first: a memo of 2^31 places
    b"\x80\x04\x8e\xff\xff\xff\xff\xff\0\0\0.", b"\x80\x02ctorch\nFloatStorage\n.",
    b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuJ\xff\xff\xff\x7ftQ.")


def forge_pickle(rng: random.Random, data: bytes, marker: Path) -> tuple[bytes, State | None]:
    """A hostile pickle: by itself, in place of a checkpoint's, or as one value of an otherwise right state."""
    if rng.random() < 0.3:
        raw = rng.choice(RAW_PICKLES).replace(b"{}", str(marker).encode())
        if rng.random() < 0.3:
            return raw, None
        records = {name: raw if name.endswith("data.pkl") else old for name, old in records_of(data).items()}
        return zipped(records), None
    value, protocol = rng.choice(hostile_values(marker)), rng.choice((2, 2, 3, 4, 5))
    state = plain_load(data)
    key = rng.choice(checkpoint.KEYS[:-1])
    if isinstance(state[key], dict) and state[key] and rng.random() < 0.7:
        state[key][rng.choice(list(state[key]))] = value
    else:
        state[key] = value
    if isinstance(value, (Tensor, str, int, bytes, set)) and rng.random() < 0.5:
        with contextlib.suppress(Exception):  # some have none
            state["digest"] = checkpoint.digest(state)
    allowed = state if isinstance(value, (str, int)) else None  # odd, but no harm in it
    try:
        if rng.random() < 0.1:
            return pickle.dumps(value, protocol), None
        return torch_saved(rng.choice((state, state, value, [state])), protocol), allowed
    except Exception:  # some of them pickle in some protocols only
        return b"", None


def plain_load(data: bytes) -> State:
    return torch.load(io.BytesIO(data), weights_only=True)


def forge_state(rng: random.Random, data: bytes) -> tuple[bytes, State | None]:
    """A state of another making, half of them with the right digest, and what may come of it besides a UserError."""
    state = plain_load(data)
    original = {**state}
    ema: dict[str, Any] = dict(state["ema"])
    name = rng.choice(list(ema))
    tensor, good = ema[name], False
    kind = rng.randrange(16)
    if kind == 0:
        ema[name] = rng.choice((tensor[None], tensor.flatten()[:-1], torch.zeros(5), tensor.new_zeros(0)))
    elif kind == 1:
        ema[name] = tensor.long() if tensor.is_floating_point() else tensor.float()
    elif kind == 2:
        ema[name] = torch.full_like(tensor.float(), rng.choice((float("nan"), float("inf"), -float("inf"))))
    elif kind == 3:
        del ema[name]
    elif kind == 4:
        ema["more\n\x1b[31m"] = torch.zeros(1)
    elif kind == 5:
        prefix = rng.choice(("_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "module.module."))
        ema, good = {prefix + key: value for key, value in ema.items()}, True
        if state["model"] is not None:
            state["model"] = {prefix + key: value for key, value in state["model"].items()}
    elif kind == 6:
        ema["module." + name] = tensor
    elif kind == 7:
        del state[rng.choice(checkpoint.KEYS[:-1])]
    elif kind == 8:
        state[rng.choice(("more", "a\nb", 5, ""))] = 1
    elif kind == 9:
        state["version"] = rng.choice((2, 10**30, 0, -1, 1.0, True, "1", None))
    elif kind == 10:
        state["step"] = rng.choice((-1, 1.5, None, "7", True, [7]))
    elif kind == 11:
        key = rng.choice(("config", "history", "model", "ema", "optimizer"))
        state[key] = rng.choice(([], 3, "x", {3: 4}, {"a": 1}, tensor))
    elif kind == 12:
        ema[name] = tensor.double() if tensor.is_floating_point() else tensor.int()
    elif kind == 13:
        state["config"] = {**state["config"], "seed": 4}
    elif kind == 14:
        bits = tensor.clone().contiguous().flatten().view(torch.uint8)
        bits[rng.randrange(len(bits))] ^= 1
        ema[name] = bits.view(tensor.dtype).view(tensor.shape)
    else:
        state["digest"] = rng.choice(("", "0" * 64, None, 5))
    if state.get("ema") is original["ema"] and "ema" in state:
        state["ema"] = ema
    allowed = original if good else None
    if rng.random() < 0.5 and kind not in (9, 15):
        try:
            state["digest"] = checkpoint.digest(state)
        except Exception:  # it has no digest then
            return torch_saved(state), None
        allowed = original if good else state if kind in (11, 12, 13, 14) else None
    return torch_saved(state), allowed


# What has to come of it


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of states, by other means than the digest that is being tested."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.contiguous().flatten().view(torch.uint8).equal(
            b.contiguous().flatten().view(torch.uint8))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return struct.pack("d", a) == struct.pack("d", b) if isinstance(a, float) else bool(a == b)


def outcome_of(read: Callable[[], Any]) -> tuple[str, Any]:
    """("refused", message), ("read", result) or ("failed", why)."""
    def too_slow(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, too_slow)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        return "read", read()
    except UserError as error:
        return "refused", str(error)
    except Hang:
        return "failed", f"took more than {HANG_SECONDS} s\n{traceback.format_exc()}"
    except Exception:
        return "failed", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def in_one_line(message: str) -> bool:
    return message.isprintable() and len(message) < 1200


def fuzz_checkpoints(rng: random.Random, folder: Path, seconds: float, failures: Failures) -> Counter[str]:
    counts: Counter[str] = Counter()
    files = [written(state) for state in sample_states()]
    originals = [plain_load(data) for data in files]
    path, marker = folder / "last.pt", folder / "marker"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        which = rng.randrange(len(files))
        data, allowed = files[which], [originals[which]]
        kind = rng.choice(("bytes", "records", "pickle", "state") * 4 + ("compressed", "directory"))
        if kind == "bytes":
            data = rng.choice(DAMAGES)(rng, data)
        elif kind == "records":
            data = forge_records(rng, data)
        elif kind in ("pickle", "state"):
            data, result = forge_pickle(rng, data, marker) if kind == "pickle" else forge_state(rng, data)
            allowed = [] if result is None else [result]
        elif kind == "compressed":
            data, allowed = compress(rng, data), []
        else:
            data = overlap(rng, data)
        path.write_bytes(data)
        before = path.stat().st_mtime_ns

        def read() -> State:
            state = checkpoint.load(path)
            checkpoint.load_weights(Network(), state["ema"], path)
            return state

        outcome, value = outcome_of(read)
        if outcome == "read" and not any(same(value, other) for other in allowed):
            outcome, value = "failed", "it was read, but is not what was written"
        if outcome == "refused" and not (in_one_line(value) and str(path) in value):
            outcome, value = "failed", f"an odd message: {value!r}"
        if sorted(folder.iterdir()) != [path] or path.stat().st_mtime_ns != before or path.read_bytes() != data:
            outcome, value = "failed", f"a side effect: {sorted(folder.iterdir())}"
            marker.unlink(missing_ok=True)
        counts[f"checkpoint, {kind}: {outcome}"] += 1
        if outcome == "failed":
            report(failures, f"checkpoint, {kind}: {value}", data)
    path.unlink()
    return counts


def tiny_set(count: int) -> dict[str, bytes]:
    random_bytes = random.Random(1).randbytes
    images = {name: struct.pack(">4I", 0x803, n, 28, 28) + random_bytes(n * 784)
              for name, n in (("train-images-idx3-ubyte", count), ("t10k-images-idx3-ubyte", count + 1))}
    labels = {name: struct.pack(">2I", 0x801, n) + bytes(i % 10 for i in range(n))
              for name, n in (("train-labels-idx1-ubyte", count), ("t10k-labels-idx1-ubyte", count + 1))}
    return images | labels


def forge_header(rng: random.Random, data: bytes) -> bytes:
    at = 4 * rng.randrange(4 if data[3] == 3 else 2)
    value = rng.choice((0, 1, 11, 27, 28, 29, 784, 0x801, 0x803, 10**6, 2**31, 2**32 - 1, rng.randrange(20)))
    return data[:at] + struct.pack(">I", value) + data[at + 4:]


def forge_label(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(8, len(data))
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1:]


def well_formed(digits: Digits) -> bool:
    n = len(digits)
    right = n > 0 and digits.images.shape == (n, 1, 28, 28) and digits.labels.shape == (n,)
    right = right and (digits.images.dtype, digits.labels.dtype) == (torch.uint8, torch.int64)
    return right and 0 <= digits.labels.min() and digits.labels.max() < 10


def fuzz_idx(rng: random.Random, folder: Path, seconds: float, failures: Failures) -> Counter[str]:
    """Both readers of IDX files; load_mnist is told the MD5s of a tiny set, so that it never downloads."""
    counts: Counter[str] = Counter()
    files = tiny_set(11)
    dataset.MNIST_MD5.update({name: hashlib.md5(data).hexdigest() for name, data in files.items()})
    place = folder / "mnist" / "MNIST" / "raw"
    place.mkdir(parents=True)
    for name, data in files.items():
        (place / name).write_bytes(data)
    bomb = gzip.compress(files["train-images-idx3-ubyte"] + bytes(10**8))
    originals = {split: dataset.load_idx(place, split) for split in dataset.FILES}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        name, split = rng.choice([(name, split) for split, names in dataset.FILES.items() for name in names])
        data = files[name]
        kind = rng.choice(("bytes", "header", "label", "swap", "gz", "gz bytes", "bomb"))
        if kind == "bytes":
            data = rng.choice(DAMAGES)(rng, data)
        elif kind == "header":
            data = forge_header(rng, data)
        elif kind == "label":
            data = forge_label(rng, data)
        elif kind == "swap":
            data = files[rng.choice(list(files))]
        elif kind == "gz":
            data = gzip.compress(rng.choice((*DAMAGES, forge_header))(rng, data))
        elif kind == "gz bytes":
            data = rng.choice(DAMAGES)(rng, gzip.compress(data))
        else:
            data = bomb
        target = place / (f"{name}.gz" if kind in ("gz", "gz bytes", "bomb") else name)
        (place / name).unlink()
        target.write_bytes(data)
        listing = sorted(place.iterdir())
        for reader in ("load_mnist", "load_idx"):
            where = folder if reader == "load_mnist" else place
            outcome, value = outcome_of(partial(getattr(dataset, reader), where, split))
            if outcome == "read":
                exact = value.images.equal(originals[split].images) and value.labels.equal(originals[split].labels)
                if not (exact if reader == "load_mnist" else well_formed(value)):
                    outcome, value = "failed", "it was read, but is not what was written"
            if outcome == "refused" and not (in_one_line(value) and str(place) in value):
                outcome, value = "failed", f"an odd message: {value!r}"
            if sorted(place.iterdir()) != listing or target.read_bytes() != data:
                outcome, value = "failed", "a side effect"
            counts[f"{reader}, {kind}: {outcome}"] += 1
            if outcome == "failed":
                report(failures, f"{reader}, {name}, {kind}: {value}", data)
        target.unlink()
        (place / name).write_bytes(files[name])
    return counts


def report(failures: Failures, what: str, data: bytes) -> None:
    failures.append(what)
    if len(failures) <= 5:
        kept = Path(tempfile.gettempdir()) / f"fuzz-failure-{len(failures)}"
        kept.write_bytes(data)
        print(f"FAILED: {what.strip()}\n  the file is kept in {kept}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long; a quarter of it for IDX files")
    parser.add_argument("--seed", type=int, default=0, help="of the damage")
    options = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    unit = 1 if sys.platform == "darwin" else 1024
    failures: Failures = []
    counts: Counter[str] = Counter()
    rng = random.Random(options.seed)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    for fuzz, share in ((fuzz_checkpoints, 0.75), (fuzz_idx, 0.25)):
        with tempfile.TemporaryDirectory() as folder:
            counts += fuzz(rng, Path(folder), share * options.seconds, failures)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - memory
    if grown > MEMORY_LIMIT:
        failures.append(f"memory grew by {grown / 1e6:.0f} MB")
    for what, count in sorted(counts.items()):
        print(f"{what:40} {count:7,}")
    print(f"{counts.total():,} files read, {len(failures)} failures, memory grew by {grown / 1e6:.0f} MB")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
