"""Real processes of the program at little cost: forked from a server that has imported torch, so each starts at once.

They can be killed, sent signals and joined as ranks of one run, like `python run.py`. Their output goes to files, or
into pipes whose reader goes away.
"""

import atexit
import csv
import functools
import importlib
import multiprocessing
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from support import checkpoint
from tests.conftest import ROOT

PRELOADED = ["run", "training.loop", "evaluation.compare", "torch._dynamo", "matplotlib.figure",
             "matplotlib.backends.backend_agg"]


class Program:
    """One process of `python run.py FLAGS` in a folder."""

    def __init__(self, folder: Path, flags: list[str], changes: dict[str, Any], environment: dict[str, str],
                 piped: bool = False) -> None:
        self.said = Path(tempfile.mkdtemp(prefix="said-"))
        self.readers: list[int] = []
        for name in ("output", "errors") if piped else ():
            os.mkfifo(self.said / name)
            self.readers.append(os.open(self.said / name, os.O_RDONLY | os.O_NONBLOCK))
        self.process = context().Process(target=_main, args=(folder, flags, changes, environment, self.said),
                                         daemon=True)
        self.process.start()
        atexit.register(self.process.kill)  # whatever a failed test leaves behind

    @property
    def output(self) -> str:
        return self._read("output")

    @property
    def errors(self) -> str:
        return self._read("errors")

    def _read(self, name: str) -> str:
        text = (self.said / name).read_text() if (self.said / name).is_file() else ""
        lines = text.splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith("[Gloo] "))  # torch 2.9 says it's connected

    def running(self) -> bool:
        return self.process.is_alive()

    def signal(self, number: int) -> None:
        if self.running():
            os.kill(self.process.pid, number)

    def hang_up(self) -> None:
        """Ends the reader of its output, as of `| tee log`: from then on whatever it writes fails."""
        for reader in self.readers:
            os.close(reader)
        self.readers.clear()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def wait_for(self, condition: Callable[[], Any], seconds: float = 100) -> None:
        """Waits until the condition holds, which has to be before the process ends."""
        met: list[Any] = []
        wait_for(lambda: met.append(condition()) or met[-1] or not self.running(), seconds)
        assert met[-1], (self.process.exitcode, self.output[-2000:], self.errors[-2000:])

    def finish(self, status: int = 0, seconds: float = 300) -> str:
        """Waits for the end, which has to come with that status and without a traceback; returns the output."""
        self.process.join(seconds)
        if self.running():
            self.kill()
            raise AssertionError(f"it did not end:\n{self.output[-2000:]}\n{self.errors[-2000:]}")
        assert self.process.exitcode == status, (self.process.exitcode, self.output[-2000:], self.errors[-2000:])
        assert "Traceback" not in self.errors, self.errors[-2000:]
        return self.output

    def lines(self) -> list[str]:
        """The lines in which it named what was wrong."""
        return [line for line in self.errors.splitlines() if line.startswith("error: ")]


def start(folder: Path, *flags: str, changes: dict[str, Any] | None = None, piped: bool = False,
          **environment: str) -> Program:
    """`changes` are set before it runs, as {"training.loop.SAVE_SECONDS": 0.0}; piped: it writes into pipes, unread."""
    return Program(folder, list(flags), changes or {}, environment, piped)


def start_ranks(folder: Path, world: int, *flags: str, changes: dict[str, Any] | None = None) -> list[Program]:
    """The processes that torchrun would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(folder, *flags, changes=changes, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                  LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) for rank in range(world)]


@functools.cache
def context() -> Any:
    """The server is started with one thread a process, and before any of its modules have computed anything."""
    method = multiprocessing.get_context("forkserver")
    method.set_forkserver_preload([*PRELOADED, __name__])
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)):
        forkserver.ensure_running()
    return method


def _main(folder: Path, flags: list[str], changes: dict[str, Any], environment: dict[str, str], said: Path) -> None:
    for name, descriptor in (("output", 1), ("errors", 2)):
        os.dup2(os.open(said / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and what nohup starts ignores this one
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    for name, value in {"support.loading.ROOT": said, **changes}.items():  # no data that lie beside the code
        module, attribute = name.rsplit(".", 1)
        setattr(importlib.import_module(module), attribute, value)
    import run

    raise SystemExit(run.main(flags))


def nothing(*_: Any, **__: Any) -> None:
    """In place of what takes time and is not the point of a test."""


def wait_for(condition: Callable[[], Any], seconds: float = 200, pause: float = 0.005) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(pause)


def learned(folder: Path, name: str = "idx") -> dict[str, Any]:
    """What must be the same after a run, however often it was interrupted: all but the times."""
    state = checkpoint.load(folder / "checkpoints" / name / "last.safetensors")
    results = folder / "results" / name
    rows = [{key: value for key, value in row.items() if key != "seconds"}
            for row in csv.DictReader((results / "metrics.csv").open())]
    flat = {f"{group}.{key}": value for group in ("model", "ema") for key, value in state[group].items()}
    for part, inner in state["optimizer"].items():
        flat |= {f"{part}.{i}.{key}": value for i, values in inner["state"].items() for key, value in values.items()}
    return {"tensors": flat, "step": state["step"], "rows": rows,
            "pictures": {path.name: path.read_bytes() for path in results.iterdir()
                         if path.suffix in (".png", ".gif", ".npz")}}


def assert_same(one: dict[str, Any], other: dict[str, Any], but: str = "") -> None:
    """Bit for bit; `but` names a picture that may be missing."""
    assert one["step"] == other["step"] and one["rows"] == other["rows"]
    assert (one["tensors"].keys() == other["tensors"].keys()
            and one["pictures"].keys() - {but} == other["pictures"].keys() - {but})
    for name, tensor in one["tensors"].items():
        assert torch.equal(tensor, other["tensors"][name]), name
    for name in one["pictures"].keys() - {but}:
        assert one["pictures"][name] == other["pictures"][name], name


def assert_close(one: dict[str, Any], other: dict[str, Any], tolerance: float = 5e-4) -> float:
    """The same losses to rounding; returns the largest relative difference.

    Sums over processes round differently, and Muon's iteration is in bfloat16, so rounding errors grow with the steps.
    """
    assert one["step"] == other["step"] and len(one["rows"]) == len(other["rows"])
    pairs = [(float(row[name]), float(other_row[name]))
             for row, other_row in zip(one["rows"], other["rows"]) for name in row]
    largest = max(abs(a - b) / max(abs(a), 1e-9) for a, b in pairs)
    assert largest <= tolerance, f"the losses differ by {largest:.1e}"
    return largest
