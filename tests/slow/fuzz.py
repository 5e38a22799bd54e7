"""Damages and forges checkpoints by the thousand, and reads each of them.

    python tests/slow/fuzz.py --seconds 60

Each has to end in a UserError of one line, or in what the file holds by its digest. Another exception, more than 5 s or
any side effect is a failure, and the exit status is then 1.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import SampleConfig, UserError
from dataset import LabelledImages
from sample import load_checkpoint, make_request
from support import checkpoint, settings
from support.runtime import Runtime
from tests.conftest import TINY
from training.state import new_state, save

HANG_SECONDS = 5
CPU = Runtime(torch.device("cpu"), bf16=False, compile=False)
ODD: list[Any] = [None, True, 0, 1, -1, 2**63, 10**30, 1.5, float("nan"), float("inf"), "", "7", "a\nb\x1b[31m", "F16",
                  [], {}, {"": 1}, {"a\nb": {}}, {"$tensor": 3}, {"$tensor": ""}, {"$tuple": 5}, {"$numbered": {"": 1}}]


class Hang(BaseException):
    """Not an Exception, so that no broad handler of the code under test swallows it."""


def damage(data: bytes) -> bytes:
    """Some bytes flipped, set, cut off, left out, put in, or copied over others."""
    at, other, length = random.randrange(len(data)), random.randrange(len(data)), random.choice((1, 2, 4, 64, 300))
    return random.choice((
        data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1:],
        data[:at] + b"\xff" * length + data[at + length:],
        data[:at],
        data[:at] + data[at + length:],
        data[:at] + random.randbytes(length) + data[at:],
        data[:at] + data[other:other + length] + data[at + length:]))


def forge_header(data: bytes) -> bytes:
    """The header, which tells types, shapes and places of the tensors, is not right, or not as long as it says."""
    header, body = split(data)
    size = random.choice((0, 1, len(header) - 1, len(header) + 1, len(data), 10**8, 2**31, 2**63, 2**64 - 1))
    return random.choice((struct.pack("<Q", size) + data[8:], joined(damaged_text(header.decode()), body),
                          joined(json.dumps(changed(json.loads(header))), body)))


def forge_content(data: bytes) -> bytes:
    """Tensors have other values, or all else is not as it was; half of the files have the digest of what they hold."""
    text, body = split(data)
    header = json.loads(text)
    metadata = header["__metadata__"]
    kind, at = random.choice(("tensors", "text", "config", "any")), random.randrange(len(body) - 64)
    if kind == "tensors":
        body = body[:at] + random.choice((b"\xff" * 64, body[:64], body[at + 1:at + 65])) + body[at + 64:]  # \xff: NaN
    elif kind == "text":
        metadata["content"] = damaged_text(metadata["content"])
    else:
        content = json.loads(metadata["content"])
        new = content | {"config": changed(content["config"])} if kind == "config" else changed(content)
        metadata["content"] = json.dumps(new)
    if random.random() < 0.5:
        with contextlib.suppress(Exception):  # then it has none, and can't be read
            tensors = safetensors.torch.load(joined(json.dumps(header), body))
            metadata["digest"] = checkpoint._digest(json.loads(metadata["content"]), tensors)
    return joined(json.dumps(header), body)


def changed(node: Any) -> Any:
    """The JSON value with one place in it, at any depth, replaced, left out, or copied to another."""
    if not isinstance(node, (dict, list)) or not node or random.random() < 0.02:
        return random.choice((*ODD, [node], {"a": node}))
    copy: Any = node.copy()
    places: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
    here, other = random.choice(places), random.choice(places)
    copy[here] = random.choice((changed(node[here]), changed(node[here]), node[other]))
    if random.random() < 0.2:
        del copy[here]
    elif random.random() < 0.1 and isinstance(node, dict):
        copy[random.choice(("more", "a\nb", "$tensor"))] = node[here]
    return copy


def damaged_text(text: str) -> str:
    """Damaged, or nested so deeply that a reader may run out of stack, or with a number too long to be one."""
    deep = "[" * (depth := random.choice((100, 2000, 10**5))) + "]" * depth
    return random.choice((damage(text.encode()).decode(errors="replace"), deep, text + "1" * 5000,
                          text.replace("{", '{"deep": ' + deep + ", ", 1)))


def split(data: bytes) -> tuple[bytes, bytes]:
    """The header of a safetensors file, JSON, and the bytes of its tensors."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return data[8:end], data[end:]


def joined(header: str, body: bytes) -> bytes:
    return struct.pack("<Q", len(header.encode())) + header.encode() + body


def holds(data: bytes, state: Any) -> bool:
    """Whether what was read is what the file holds, by its digest: saved again it has that of the file."""
    metadata = json.loads(split(data)[0])["__metadata__"]
    outline, tensors = json.loads(metadata["content"]), safetensors.torch.load(data)
    return state["digest"] == metadata["digest"] == checkpoint._digest(outline, tensors)


def written() -> list[bytes]:
    """A run's checkpoint, and one that holds averaged weights alone, in half precision."""
    images = LabelledImages(torch.randint(256, (50, 1, 28, 28), dtype=torch.uint8), torch.arange(50) % 10)
    config = settings.parse(["--dataset", "mnist", "--name", "mnist", "--batch-size", "8", *TINY])
    training = new_state(config, CPU, images, images)
    training.learner.step(0, lr=1e-3)
    path = training.path
    path.parent.mkdir(parents=True)
    save(training)
    full, state = path.read_bytes(), checkpoint.load(path)
    ema = {name: value.half() for name, value in state["ema"].items()}
    checkpoint.save(path, {**state, "ema": ema, "model": None, "optimizer": None})
    return [full, path.read_bytes()]


def problem_with(path: Path, data: bytes) -> str:
    """Of reading it: that has to end in a UserError of one line or in what it holds, and in no change of the folder."""
    listing = sorted(path.parent.iterdir())
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        make_request(load_checkpoint(path, CPU), SampleConfig(), 0, 1)
        state = checkpoint.load(path)
        try:
            settings.training_settings(state["config"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from None  # as where a run is resumed
        signal.setitimer(signal.ITIMER_REAL, 0)
        COUNTS["read"] += 1
        if not holds(data, state):
            return "it was read, but is not what was written"
    except UserError as error:
        COUNTS["refused"] += 1
        said = str(error)
        if not said.isprintable() or len(said) > 1200 or str(path.parent) not in said:
            return f"an odd message: {said!r}"
    except (Hang, Exception):
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "" if sorted(path.parent.iterdir()) == listing and path.read_bytes() == data else "a side effect"


COUNTS: Counter[str] = Counter()


def give_up(*_: Any) -> None:
    raise Hang


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="every random number follows from it")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGALRM, give_up)
    torch.set_num_threads(1)
    random.seed(options.seed)
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        files, path = written(), Path(folder) / checkpoint.LAST
        while time.monotonic() < end:
            data = random.choice((damage, forge_header, forge_content, forge_content))(random.choice(files))
            path.write_bytes(data)
            if problem := problem_with(path, data):
                COUNTS["failed"] += 1
                kept = Path(tempfile.gettempdir()) / f"fuzz-failure-{COUNTS['failed']}"
                kept.write_bytes(data)
                print(f"FAILED: {problem}\n  the file is kept in {kept}", flush=True)
    print(f"{COUNTS['read']:,} files read as they are, {COUNTS['refused']:,} refused, {COUNTS['failed']} failures")
    return int(COUNTS["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
