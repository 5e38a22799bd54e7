"""Where and how it runs: device, precision, memory, torchrun's processes and stop signals."""

import contextlib
import ctypes
import functools
import getpass
import importlib
import os
import platform
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from config import Config, Precision, UserError
from support import console


@dataclass(frozen=True)
class Runtime:
    """The device of this process, how numbers are held on it, and its place among torchrun's processes."""

    device: torch.device
    bf16: bool  # in sampling, test losses and a run that begins here; one that goes on keeps its precision
    compile: bool
    rank: int = 0
    world: int = 1

    @property
    def chunk(self) -> int:
        """Images per network call when sampling: one fixed size, since convolutions round differently at others."""
        return 64 if self.device.type == "cpu" else 256

    def say(self, text: str) -> None:
        """Prints in the first process alone."""
        if self.rank == 0:
            console.say(text)

    @property
    def precision(self) -> Precision:
        """That of convolutions and linear layers."""
        return "bf16" if self.bf16 else "fp32"

    @property
    def memory_format(self) -> torch.memory_format:
        """Of a network's weights. Convolutions with channels_last weights have given wrong results on Apple GPUs."""
        return torch.contiguous_format if self.device.type == "mps" else torch.channels_last

    def on_rank0(self, work: Callable[[], Any]) -> Any:
        """Runs work in the first process; every one returns its result, or raises its UserError."""
        return self.gather(lambda: work() if self.rank == 0 else None)[0]

    def gather(self, work: Callable[[], Any]) -> list[Any]:
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

    def all_reduce_max(self, *values: float) -> list[float]:
        """The highest that any process has of each value, in every process."""
        box = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(box, dist.ReduceOp.MAX)
        return box.tolist()

    def name(self) -> str:
        """The device in words, for messages."""
        if self.device.type == "cpu":
            threads = torch.get_num_threads()
            return f"CPU ({threads} thread{'s' * (threads != 1)})"
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "Apple GPU"


@contextlib.contextmanager
def start(config: Config) -> Iterator[Runtime]:
    """Chooses device, precision and memory, and joins torchrun's other processes (gloo on CPUs, NCCL on GPUs)."""
    place = console.place()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it as it starts; unset, runs may differ
    keep_freed_memory()
    usable_compiler_cache()
    runtime = make_runtime(config, *place)
    if runtime.device.type == "cuda":
        torch.cuda.set_device(runtime.device)
        torch.set_float32_matmul_precision("high")  # TF32, where float32 is asked for
    if config.device == "auto" and runtime.device.type == "cpu" and torch.cuda.is_available():
        runtime.say(f"note: torch {torch.__version__} can't use this GPU ({kernel_error('cuda')}), so this runs on the "
                    "CPU.")
    if place.world == 1 and os.environ.get("WORLD_SIZE", "1") != "1":
        runtime.say("note: WORLD_SIZE is set, but not all that torchrun sets, so this is a process of its own.")
    if place.world > 1:
        # Imported while there is a process group, this would keep that alive by its default arguments, and a thread of
        # gloo that outlives Python aborts the process.
        importlib.import_module("torch.distributed.nn")
        # NCCL moves tensors on GPUs; gloo carries the small Python objects, and everything on CPUs.
        backend = "cuda:nccl,cpu:gloo" if runtime.device.type == "cuda" else "gloo"
        # Not torch's minutes: the others wait while the first one trains a classifier, measures, or tries to save.
        dist.init_process_group(backend, timeout=timedelta(hours=24))
        dist.all_reduce(torch.zeros(1))  # all are connected before one of them may leave with an error
        runtime = replace(runtime, bf16=runtime.on_rank0(lambda: runtime.bf16))  # images of one precision
    try:
        yield runtime
    finally:
        if place.world > 1:
            dist.destroy_process_group()


def make_runtime(config: Config, rank: int = 0, world: int = 1, local_rank: int = 0, local_world: int = 1) -> Runtime:
    """The runtime of this process; joins no others. Raises UserError for a device that is not there."""
    device = choose_device(config.device, local_rank, local_world)
    bf16 = config.precision == "bf16" or config.precision == "auto" and fast_bf16(device)
    # On a CPU compiling takes minutes to gain 11% (benchmarks/README.md), so only on request.
    compiles = config.compile == "on" or config.compile == "auto" and device.type == "cuda"
    return Runtime(device, bf16, compiles, rank, world)


def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32: a GPU that has it, some CPUs.

    CPUs with AMX do, and AMD's with AVX512-BF16. On Intel's with that alone, as on a virtual machine that hides AMX,
    it takes 1.4 times as long as float32.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    amx, avx512 = (getattr(torch.cpu, name, bool)()  # torch's public names are of 2.14
                   for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return device.type == "cpu" and (amx or avx512 and made_by_amd())


def made_by_amd() -> bool:
    """Whether AMD made this computer's CPU."""
    with contextlib.suppress(OSError):
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text("utf-8", "replace")
    return "AuthenticAMD" in platform.processor()  # on Windows


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory: else a training step may get 100 MB anew, page by page, a tenth of its time."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # where there is no glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD, by malloc.h
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: the highest that it accepts


def usable_compiler_cache() -> None:
    """Gives torch's compiler, which optimizers import too, a cache folder where it has none that can be written."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with contextlib.suppress(OSError, KeyError, ImportError):  # a user without a name, or a folder that can't be made
        if folder is None:
            getpass.getuser()  # after whom torch names the folder
            return
        os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK):
            return
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="torchinductor-")


def choose_device(wanted: str, local_rank: int, local_world: int) -> torch.device:
    """CUDA, then MPS, then CPU for "auto"; of several processes the first one gets cuda:N, the next one cuda:N+1.

    A GPU may be too old for the installed torch, which shows in the first kernel: then "auto" is the CPU. Raises
    UserError for a device that can't be used.
    """
    counts = {"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
              "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    device = torch.device(next(kind for kind in counts if counts[kind]) if wanted == "auto" else wanted)
    number = device.index or 0
    needed = number + local_world if device.type == "cuda" else 1
    if needed > counts[device.type]:
        raise UserError(f"--device {wanted}: torch {torch.__version__} finds {counts[device.type]} such devices here, "
                        f"not {needed}; leave --device out, start fewer processes, or install a driver that fits")
    device = torch.device("cuda", number + local_rank) if device.type == "cuda" else device
    if device.type == "cpu" or not (problem := kernel_error(str(device))):
        return device
    if wanted == "auto" and local_world == 1:
        return torch.device("cpu")
    raise UserError(f"--device {wanted}: torch {torch.__version__} can't use this GPU ({problem}); use --device cpu, "
                    "or install a torch made for it")


@functools.cache
def kernel_error(device: str) -> str:
    """Why a device can't compute, the first line of it; "" if it can."""
    try:
        torch.zeros(1, device=device).add(1).item()  # item() waits for the kernel
    except RuntimeError as error:
        return str(error).strip().splitlines()[0][:120]
    return ""


@contextlib.contextmanager
def memory_errors(config: Config, runtime: Runtime) -> Iterator[None]:
    """In the block, an error of torch, on any device, or of Python that says that memory is used up is a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search(
                "not enough memory|can't allocate memory|out of memory|ALLOC_FAILED|bad_alloc", str(error))):
            raise
        size = re.search(r"allocate (\d[\d.]*) (\w+)", str(error))
        amount = "" if size is None else (f" ({int(size[1]) / 1e9:.1f} GB more" if size[2] == "bytes" else
                                          f" ({size[1]} {size[2]} more") + " were asked for)"
        advice = (f"a smaller --batch-size (now {config.train.batch_size}) or network (--channels, --blocks); what the "
                  "run has saved is kept" if config.mode in ("train", "experiment") else "a smaller --num-images")
        problem = f"not enough memory on {runtime.name()}{amount}: use {advice}"
        if runtime.rank > 0:  # of which the first process, which says the errors of all, may not know
            console.say(f"error: process {runtime.rank}: {problem}", sys.stderr)
        raise UserError(problem) from None


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Within the block Ctrl-C, SIGTERM, a closed terminal or Slurm's warning (--signal=USR1@60) is noted in the list.

    A second one ends the process.
    """
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        if received:
            os._exit(128 + number)  # saves are atomic, so nothing is lost
        received.append(number)

    optional = [getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGBREAK") if hasattr(signal, name)]
    numbers = [signal.SIGINT, signal.SIGTERM,
               *(number for number in optional if signal.getsignal(number) is not signal.SIG_IGN)]  # as under nohup
    main_thread = threading.current_thread() is threading.main_thread()  # which alone gets signals
    before = {number: signal.signal(number, note) for number in numbers if main_thread}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
