"""Where and how it runs: device, precision, compilation, CUDA graphs, torchrun's processes, stop signals, clock.

Also `seed_of`, from which every random number follows (design: randomness is a function). Knows nothing of diffusion.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
    def graphs(self) -> bool:
        """Whether what is launched again and again is captured as a CUDA graph."""
        return self.compile and self.device.type == "cuda"

    @property
    def chunk(self) -> int:
        """Images per network call when drawing: one fixed size, since convolutions round differently at others."""
        return 64 if self.device.type == "cpu" else 256

    def say(self, *words: Any) -> None:
        if self.first:
            print(*words, flush=True)

    def autocast(self) -> torch.autocast:
        # Without its cache of cast weights, which a captured graph would go on reading after it was freed.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def only_first(self, work: Callable[[], Any]) -> Any:
        """Runs work in the first process; every one returns its result, or raises its UserError."""
        return self.everywhere(lambda: work() if self.first else None)[0]

    def everywhere(self, work: Callable[[], Any]) -> list[Any]:
        """Runs work in every process and returns all results, by rank; a UserError in one is raised in every one."""
        outcomes: list[Any] = [None] * self.world
        try:
            outcomes[self.rank] = work()
        except UserError as error:
            outcomes[self.rank] = error
        if self.world > 1:
            dist.all_gather_object(outcomes, outcomes[self.rank])
        for outcome in outcomes:
            if isinstance(outcome, UserError):
                raise outcome
        return outcomes

    def highest(self, *values: float) -> list[float]:
        """The highest that any process has of each value, in every process."""
        box = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(box, dist.ReduceOp.MAX)
        return box.tolist()

    def synchronize(self) -> None:
        """Waits for the device, before a clock is read."""
        torch.get_device_module(self.device).synchronize()

    def name(self) -> str:
        """The device in words, for messages."""
        if self.device.type == "cpu":
            return f"CPU ({torch.get_num_threads()} threads)"
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "Apple GPU"


@contextlib.contextmanager
def start(config: Config) -> Iterator[Runtime]:
    """Chooses device and precision, and joins torchrun's other processes if any (gloo on CPUs, NCCL on GPUs)."""
    rank, world, local_rank, local_world = (int(os.environ.get(name, default)) for name, default in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    device = choose_device(config.device, local_rank, local_world)
    gpu = device.type == "cuda"
    bf16 = config.precision == "bf16" or config.precision == "auto" and gpu and torch.cuda.is_bf16_supported()
    # On a CPU compiling takes a minute and gains nothing for this model (benchmarks/README.md), so only on request.
    runtime = Runtime(device, bf16, config.compile == "on" or config.compile == "auto" and gpu, rank, world)
    if gpu:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, where float32 is asked for
    if world > 1:
        # NCCL moves tensors on GPUs; gloo carries the small Python objects, and everything on CPUs.
        dist.init_process_group("cuda:nccl,cpu:gloo" if gpu else "gloo", timeout=timedelta(minutes=10))
    try:
        yield runtime
    finally:
        if world > 1:
            dist.destroy_process_group()


def choose_device(wanted: str, local_rank: int, local_world: int) -> torch.device:
    """CUDA, then MPS, then CPU for "auto"; cuda:N is the first process's. Raises UserError, in all of them alike."""
    found = {"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
             "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    device = torch.device(next(kind for kind in found if found[kind]) if wanted == "auto" else wanted)
    number = device.index or 0
    needed = number + local_world if device.type == "cuda" else 1
    if needed > found[device.type]:
        raise UserError(f"--device {wanted}: torch {torch.__version__} finds {found[device.type]} such devices here, "
                        f"not {needed}; leave --device out, start fewer processes, or install a driver that fits")
    return torch.device("cuda", number + local_rank) if device.type == "cuda" else device


def compiled(function: Callable[..., Any], runtime: Runtime) -> Callable[..., Any]:
    """torch.compile(function); or function itself, where compiling is off or, with a line, where it fails."""
    if not runtime.compile:
        return function
    chosen: Callable[..., Any] = torch.compile(function)

    def call(*args: Any) -> Any:
        nonlocal chosen
        try:
            return chosen(*args)
        except Exception as error:  # a compiler fails in many ways; none of them should end a run
            if chosen is function or torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise
            first_line = "".join(str(error).strip().splitlines()[:1])[:120]
            runtime.say(f"note: torch.compile failed ({type(error).__name__}: {first_line}); going on without")
            chosen = function
        return function(*args)

    return call


class Captured:
    """A function of tensors as a CUDA graph: many small kernels cost more to launch than to compute.

    Its first calls run as they are, in which libraries choose their kernels and compilers compile; then it is captured,
    and replayed with copies of the arguments, whose shapes stay. No Python of it runs any more, so what changes from
    call to call has to be an argument, or a tensor that is read where it lies, such as weights. The graph's memory is
    freed with it.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.warm_ups, self.inputs = function, 3, list[Tensor]()
        self.stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def __call__(self, *arguments: Tensor) -> Tensor:
        if self.warm_ups > 0:
            self.warm_ups -= 1
            here = torch.cuda.current_stream()
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                output = self.function(*arguments)
            here.wait_stream(self.stream)
            return output
        if not self.inputs:
            self._capture([argument.clone() for argument in arguments])
        torch._foreach_copy_(self.inputs, arguments)
        self.graph.replay()
        return self.output.clone()

    def _capture(self, inputs: list[Tensor]) -> None:
        here = torch.cuda.current_stream()
        try:  # "thread_local": other threads, as NCCL's, go on
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.output = self.function(*inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.set_stream(here)  # which torch leaves as it was in the capture
            first_line = "".join(str(error.__context__ or error).strip().splitlines()[:1])[:120]
            raise UserError(f"the network can't be captured as a CUDA graph ({first_line}): it must not wait for the "
                            "GPU, as .item() does; mend it, or use --compile off") from None
        self.inputs = inputs


def side_by_side(works: Sequence[Callable[[], Any]], device: torch.device) -> None:
    """Does all of it; in a CUDA graph on a stream each, since small kernels leave a GPU idle."""
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        for work in works:
            work()
        return
    here, streams = torch.cuda.current_stream(), [torch.cuda.Stream() for _ in works]
    for work, stream in zip(works, streams):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            work()
    for stream in streams:
        here.wait_stream(stream)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Within the block, Ctrl-C or SIGTERM is only noted in the list; a second one ends the process at once."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        if received:
            os._exit(128 + number)  # saves are atomic, so nothing is lost
        received.append(number)
        os.write(sys.stderr.fileno(), b"\nstopping after this step (once more: at once)\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Clock:
    """The time of each phase, for one line at the end."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.latest = runtime, time.perf_counter()
        self.laps: list[tuple[str, float]] = []

    def lap(self, phase: str) -> None:
        self.runtime.synchronize()
        before, self.latest = self.latest, time.perf_counter()
        self.laps.append((phase, self.latest - before))

    def __str__(self) -> str:
        return "Time: " + ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in self.laps) + "."


def seed_of(*parts: int) -> int:
    """63-bit hash of non-negative integers below 2**64, so that no two tuples of them share a stream."""
    words = [word for part in parts for word in (part & 0xFFFFFFFF, part >> 32)]
    sequence = np.random.SeedSequence([len(parts), *words])  # the length, since it pads with zeros
    return int(sequence.generate_state(1, np.uint64)[0]) & (2**63 - 1)


def generator(device: torch.device | str, *parts: int) -> torch.Generator:
    """A random generator on a device whose stream is a function of the given integers."""
    return torch.Generator(device).manual_seed(seed_of(*parts))


def to_unit(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8, rounded to the nearest level."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
