"""Where and how the computation runs: device, precision, compilation, torchrun's processes, stop signals.

Also `seed_of`, through which every random number of the project is derived (design: randomness is a function).
Knows nothing of diffusion.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from config import Config, UserError


@dataclass(frozen=True)
class Runtime:
    """The device of this process, how numbers are held on it, and its place among torchrun's processes."""

    device: torch.device
    bf16: bool
    compile: bool
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """True in the one process that prints and writes files."""
        return self.rank == 0

    @property
    def chunk(self) -> int:
        """Images per network call when drawing: one fixed size, since convolutions round differently at others."""
        return 64 if self.device.type == "cpu" else 256

    def say(self, *words: Any) -> None:
        if self.first:
            print(*words, flush=True)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def from_first(self, value: Any) -> Any:
        """The first process's value, in every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def only_first(self, work: Callable[[], Any]) -> Any:
        """Runs work in the first process; every one returns its result, or raises its UserError."""
        value, problem = self.from_first(_attempt(work) if self.first else None)
        if problem is not None:
            raise UserError(problem)
        return value

    def everywhere(self, work: Callable[[], Any]) -> list[Any]:
        """Runs work in every process and returns all results, by rank; a UserError in one is raised in every one."""
        outcomes: list[Any] = [_attempt(work)]
        if self.world > 1:
            mine, outcomes = outcomes[0], [None] * self.world
            dist.all_gather_object(outcomes, mine)
        problem = next((said for _, said in outcomes if said is not None), None)
        if problem is not None:
            raise UserError(problem)
        return [value for value, _ in outcomes]

    def highest(self, *values: float) -> list[float]:
        """The highest that any process has of each value, in every process."""
        if self.world == 1:
            return list(values)
        box = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return box.tolist()

    def synchronize(self) -> None:
        """Waits for the device, before a clock is read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def name(self) -> str:
        """The device in words, for messages."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        if self.device.type == "mps":
            return "Apple GPU"
        return f"CPU ({torch.get_num_threads()} threads)"


def _attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What work returns, or the text of its UserError."""
    try:
        return work(), None
    except UserError as error:
        return None, str(error)


@contextlib.contextmanager
def start(config: Config) -> Iterator[Runtime]:
    """Chooses device and precision, and joins torchrun's other processes if any (gloo on CPUs, NCCL on GPUs)."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    choose_device(config.device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)  # too few devices: all processes raise
    device = choose_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    runtime = Runtime(device, _use_bf16(config.precision, device), _use_compile(config.compile, device), rank, world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, where float32 is asked for
    if config.compile == "on" and not runtime.compile:
        runtime.say("note: torch.compile needs a C++ compiler (CPU) or Triton (CUDA), and none was found; going on "
                    "without")
    if world > 1:
        # NCCL moves tensors on GPUs; gloo carries the small Python objects, and everything on CPUs.
        backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    try:
        yield runtime
    finally:
        if world > 1:
            dist.destroy_process_group()


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """CUDA, then MPS, then CPU for "auto"; raises UserError if the one asked for is not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "auto":
        wanted = "cuda" if cuda else "mps" if mps else "cpu"
    if wanted.startswith("cuda") and not cuda:
        raise UserError(f"--device {wanted}: torch {torch.__version__} finds no CUDA device here; leave --device out, "
                        "or install a driver that fits it")
    if wanted == "mps" and not mps:
        raise UserError("--device mps: there is no Apple GPU here; leave --device out")
    device = torch.device(wanted)
    if device.type == "cuda":
        if device.index is not None and local_rank > 0:
            raise UserError(f"--device {wanted}: several processes can't share one device; leave the number out")
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UserError(f"--device cuda:{index}: only {torch.cuda.device_count()} CUDA devices are here; choose a "
                            "lower number, or start no more processes than devices")
        device = torch.device("cuda", index)
    return device


def _use_bf16(precision: str, device: torch.device) -> bool:
    if precision == "bf16" and device.type == "mps":
        raise UserError("--precision bf16: not supported on MPS; use fp32")
    return precision == "bf16" or precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()


def _use_compile(wanted: str, device: torch.device) -> bool:
    if wanted == "off" or device.type == "mps":
        return False
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    # On a CPU it takes a minute and gains nothing for this model (benchmarks/README.md), so only on request.
    return wanted == "on" and any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++", "cl"))


def compiled(function: Callable[..., Any], runtime: Runtime, **options: Any) -> Callable[..., Any]:
    """torch.compile(function); or function itself, where compiling is off or, with a line, where it fails."""
    if not runtime.compile:
        return function
    chosen: Callable[..., Any] | None = None
    fast = torch.compile(function, **options)

    def call(*args: Any) -> Any:
        nonlocal chosen
        if chosen is not None:
            return chosen(*args)
        try:
            result = fast(*args)
            chosen = fast
        except Exception as error:  # a compiler fails in many ways; none of them should end a run
            first_line = "".join(str(error).strip().splitlines()[:1])[:120]
            runtime.say(f"note: torch.compile failed ({type(error).__name__}: {first_line}); going on without")
            chosen = function
            result = function(*args)
        return result

    return call


class StopSignals:
    """Within the block, Ctrl-C and SIGTERM only set `received`; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: object) -> None:
        if self.received is not None:
            os._exit(128 + number)  # saves are atomic, so nothing is lost
        self.received = number
        os.write(sys.stderr.fileno(), b"\nstopping after this step (once more: at once)\n")


class Clock:
    """The time of each phase, for one line at the end."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.latest = runtime, time.perf_counter()
        self.laps: list[tuple[str, float]] = []

    def lap(self, phase: str) -> None:
        self.runtime.synchronize()
        now = time.perf_counter()
        self.laps.append((phase, now - self.latest))
        self.latest = now

    def __str__(self) -> str:
        return "Time: " + ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in self.laps) + "."


def seed_of(*parts: int) -> int:
    """63-bit seed that is a hash of non-negative integers below 2**64, so that no two tuples, such as (seed, step) and
    (seed, image), share a stream."""
    words = [word for part in parts for word in (part & 0xFFFFFFFF, part >> 32)]
    low, high = np.random.SeedSequence([len(parts), *words]).generate_state(2)  # the length, since it pads with zeros
    return int(low) | (int(high) & 0x7FFFFFFF) << 32


def generator(device: torch.device | str, *parts: int) -> torch.Generator:
    """A random generator on a device whose stream is a function of the given integers."""
    return torch.Generator(device).manual_seed(seed_of(*parts))


def to_unit(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8, rounded to the nearest level."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
