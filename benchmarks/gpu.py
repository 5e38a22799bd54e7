"""The GPU table: what this project does on a GPU, every row of it, in under eight minutes and without a network.

    python benchmarks/gpu.py --data-dir FOLDER
    python benchmarks/gpu.py --device cpu --quick        (tries the script itself where there is no GPU)

Prints a Markdown table and a line of JSON. A row that fails says why, and the others go on. Without a GPU it says so,
and its exit status is 2.
"""

import contextlib
import io
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import Operations, Parser, Trainee, config_of, machine, run_script, table
from torch.profiler import ProfilerActivity, profile

import dataset
import drawing
from config import ROOT, Config, UserError
from support import checkpoint
from support.runtime import Runtime, start, to_uint8

MODES = ("fp32", "TF32", "bf16")
AGREED = 0.99  # share of the pixels that have to agree between devices


class Bench:
    """What the rows share: the device, the data, and how long each may take."""

    def __init__(self, config: Config, device: torch.device, data: list[str], quick: bool) -> None:
        self.config, self.device, self.data, self.quick = config, device, data, quick
        self.digits, self.test = (dataset.load(config, split).to(device) for split in ("train", "test"))
        self.cuda = device.type == "cuda"
        self.found: dict[str, Any] = {}

    def trainee(self, mode: str = "bf16", compile: bool = False, batch: int = 64) -> Trainee:
        torch.compiler.reset()  # it gives up after eight networks
        runtime = Runtime(self.device, mode == "bf16", compile)
        config = config_of(None, *self.data, "--batch-size", str(batch),
                           *(["--channels", "8", "8", "16", "--groups", "4"] if self.quick else []))
        return Trainee(config, runtime, self.digits, self.test)

    def wait(self) -> None:
        torch.get_device_module(self.device).synchronize()

    def timed(self, work: Callable[[], Any], seconds: float) -> float:
        """Seconds a call, after some to warm up and capture, over about so many seconds."""
        for _ in range(5):
            work()
        self.wait()
        began, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - began < (0 if self.quick else seconds):
            for _ in range(1 if self.quick else 10):
                work()
            self.wait()
            calls += 1 if self.quick else 10
        return (time.perf_counter() - began) / calls


@contextlib.contextmanager
def precision(mode: str) -> Iterator[None]:
    """TF32 in matrix products and convolutions, or plain float32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest" if mode == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = mode != "fp32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def training(bench: Bench, mode: str, compile: bool, batch: int) -> str:
    with precision(mode):
        trainee = bench.trainee(mode, compile, batch)
        rate = batch / bench.timed(lambda: trainee.step(0.5), 2.0)
    bench.found[f"images_per_s {mode} {'compiled' if compile else 'eager'} {batch}"] = round(rate)
    return f"{rate:,.0f} images/s"


def epochs(bench: Bench) -> str:
    """Of 60,000 images, at the best of each batch's rates."""
    best: dict[str, tuple[float, str]] = {}
    for name, rate in bench.found.items():
        _, mode, how, batch = name.split()
        best[batch] = max(best.get(batch, (0.0, "")), (rate, f"{mode} {how}"))
    return "; ".join(f"batch {batch}: {60_000 / rate:.2f} s, {6e6 / rate:.0f} s for 100 ({how})"
                     for batch, (rate, how) in best.items())


def launches(bench: Bench, compile: bool) -> str:
    """Of one training step at the default batch."""
    trainee = bench.trainee(compile=compile)
    for _ in range(5):
        trainee.step(0.5)
    said = []
    if not compile:  # under whose eyes nothing is compiled
        with Operations() as operations:
            trainee.step(0.5)
        said.append(f"{operations.count:,} operations")
    if bench.cuda:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            began = time.perf_counter()
            for _ in range(10):
                trainee.step(0.5)
            bench.wait()
            took = time.perf_counter() - began
        kernels = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        busy, end = 0.0, 0.0  # of some, in streams beside each other, the time counts once
        for span in sorted((event.time_range.start, event.time_range.end) for event in kernels):
            busy += max(0.0, span[1] - max(end, span[0])) / 1e6 / took
            end = max(end, span[1])
        said.append(f"{len(kernels) / 10:,.0f} kernels, the GPU busy {busy:.0%} of the time")
    return ", ".join(said) or "told by a GPU alone"


def waits(bench: Bench) -> str:
    trainee = bench.trainee()
    trainee.step(0.5)
    if bench.cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        with Operations() as operations:
            trainee.step(0.5)
    finally:
        if bench.cuda:
            torch.cuda.set_sync_debug_mode("default")
    return f"none ({operations.waits} of the operations wait)"


def drawing_time(bench: Bench, graph: bool) -> str:
    trainee, count = bench.trainee(compile=graph), 16 if bench.quick else 256
    return f"{1000 * bench.timed(lambda: trainee.draw(count), 2.0):,.0f} ms for {count} digits"


def whole_process(bench: Bench) -> str:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        run(folder, "--mode", "sample", "--device", bench.device.type, *(["--steps", "2"] if bench.quick else []))
        return f"{time.perf_counter() - began:.1f} s, start to end"


def previews(bench: Bench) -> str:
    """A captured graph has to see the weights as they are when it is replayed."""
    trainee = bench.trainee(compile=True)
    for _ in range(2):
        trainee.draw(8, steps=3)
        for _ in range(5):
            trainee.step(0.1)
    replayed = trainee.draw(8, steps=3)[0].int()
    trainee.run.runtime = replace(trainee.run.runtime, compile=False)
    eager = trainee.draw(8, steps=3)[0].int()
    return f"at most {(replayed - eager).abs().max().item()} grey levels apart"


def losses(bench: Bench) -> str:
    """bf16 against fp32, over the same batches."""
    count = 6 if bench.quick else 300
    last = {}
    for mode in ("fp32", "bf16"):
        with precision(mode):
            trainee = bench.trainee(mode)
            found = [trainee.step(0.1) for _ in range(count)]
            last[mode] = statistics.mean(torch.stack(found).tolist()[-count // 3:])
    return f"{last['bf16']:.4f} and {last['fp32']:.4f} in the last third of {count} steps"


def devices(bench: Bench, mode: str) -> str:
    """The shipped weights, the same seeds, here and on the CPU: pixels that are not 0 in both."""
    drawn = []
    for device in (torch.device("cpu"), bench.device):
        here = Runtime(device, mode == "bf16" and device.type != "cpu", device.type == "cuda")
        with precision(mode), contextlib.redirect_stdout(io.StringIO()):
            trained = drawing.load_trained(config_of(None, "--name", "none-of-this-name"), here)
            order = drawing.Order(bench.config.sample, 0, range(4 if bench.quick else 64),
                                  trained.labels(None, 0, 4 if bench.quick else 64))
            drawn.append(to_uint8(drawing.draw(trained, order, here)).int())
    ink = (drawn[0] > 0) | (drawn[1] > 0)
    share = ((drawn[0] - drawn[1]).abs()[ink] <= 1).double().mean().item()
    verdict = "" if mode == "bf16" else " (as promised)" if share >= AGREED else f" (FEWER than {AGREED:.0%})"
    return f"{share:.2%} of the inked pixels within a grey level{verdict}"


def run(folder: str, *flags: str, launcher: tuple[str, ...] = (), wait: bool = True) -> Any:
    """run.py in a process of its own in that folder; raises RuntimeError with its last line if it fails."""
    process = subprocess.Popen([sys.executable, *launcher, str(ROOT / "run.py"), *flags], cwd=folder, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if not wait:
        return process
    output = process.communicate()[0]
    if process.returncode not in (0, 143):
        raise RuntimeError((output.strip().splitlines() or ["no output"])[-1])
    return output


def learned(folder: str, name: str) -> dict[str, Any]:
    return checkpoint.load(Path(folder) / "checkpoints" / name / checkpoint.LAST)


def resume(bench: Bench) -> str:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--dataset", "generated", "--device", bench.device.type, "--preview", "0", "--epochs", "2",
                 "--num-images", "1", *(["--batch-size", "512", "--channels", "8", "8", "16", "--groups", "4"]
                                        if bench.quick else [])]
        run(folder, *flags, "--name", "straight")
        stopped = run(folder, *flags, "--name", "stopped", wait=False)
        rows = Path(folder) / "results" / "stopped" / "metrics.csv"
        while stopped.poll() is None and not rows.exists():
            time.sleep(0.01)
        stopped.send_signal(signal.SIGTERM)
        stopped.communicate()
        at = learned(folder, "stopped")["step"]
        run(folder, *flags, "--name", "stopped")
        one, other = learned(folder, "straight"), learned(folder, "stopped")
    apart = max((one["model"][name] - other["model"][name]).abs().max().item() for name in one["model"])
    ends = [state["history"]["columns"]["test_loss"][-1] for state in (one, other)]
    return (f"stopped at step {at} of {one['step']}: test loss {ends[1]:.4f}, unstopped {ends[0]:.4f}; "
            + (f"weights at most {apart:.1g} apart" if apart else "the same bits"))


def two_cards(bench: Bench) -> str:
    if not bench.cuda or torch.cuda.device_count() < 2:
        return "not tried: there are no two cards"
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--dataset", "generated", "--preview", "0", "--epochs", "1", "--num-images", "1"]
        run(folder, *flags, "--name", "one", "--device", "cuda:0")
        run(folder, *flags, "--name", "two",
            launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"))
        ends = [learned(folder, name)["history"]["columns"]["test_loss"][-1] for name in ("one", "two")]
    return f"test loss {ends[1]:.4f}, with one card {ends[0]:.4f}"


def driver() -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return "driver " + subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    return "no driver found"


def main(argv: list[str]) -> None:
    parser = Parser(__doc__, "--data-dir")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny network and few steps, to try the script itself")
    options = parser.parse(argv)
    data = ["--dataset", "generated"] if options.quick else ["--dataset", "mnist"]
    data += ["--data-dir", options.data_dir] if options.data_dir else []
    config = config_of(None, *data, "--device", options.device)
    with start(config) as runtime:
        if runtime.device.type == "cpu" and not options.quick:
            raise UserError("--device cpu: this measures GPUs; add --quick to try the script itself")
        fill_table(Bench(config, runtime.device, data, options.quick))


def fill_table(bench: Bench) -> None:
    rows: dict[str, Callable[[], str]] = {}
    batches = (16,) if bench.quick else (64, 256, 2048)
    for batch, mode, compile in itertools.product(batches, MODES, (False, True)):
        if not bench.quick or (mode, compile) in (("bf16", False), ("fp32", True)):
            rows[f"training, batch {batch}, {mode}, {'compiled' if compile else 'eager'}"] = (
                lambda mode=mode, compile=compile, batch=batch: training(bench, mode, compile, batch))  # type: ignore
    rows |= {"an epoch": lambda: epochs(bench)} if not bench.quick else {}
    rows |= {"launches of a step, eager": lambda: launches(bench, False),
             "launches of a step, compiled": lambda: launches(bench, True), "waits in a step": lambda: waits(bench),
             "peak memory": lambda: f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if bench.cuda else "-",
             "drawing, captured graph": lambda: drawing_time(bench, True),
             "drawing, without it": lambda: drawing_time(bench, False),
             "drawing, the whole process": lambda: whole_process(bench),
             "previews in training": lambda: previews(bench), "loss in bf16 and fp32": lambda: losses(bench),
             "the CPU's pictures, fp32": lambda: devices(bench, "fp32"),
             "the CPU's pictures, bf16": lambda: devices(bench, "bf16"), "stop and resume": lambda: resume(bench),
             "two cards, NCCL": lambda: two_cards(bench)}
    said: dict[str, str] = {}
    began = time.perf_counter()
    for name, work in rows.items():
        try:
            said[name] = work()
        except Exception as error:  # whatever it is, it belongs into the table
            said[name] = f"FAILED: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
        print(f"  {name}: {said[name]}", file=sys.stderr, flush=True)
    seconds = round(time.perf_counter() - began)
    where = f"{machine(bench.device)}, {driver()}"
    print(f"{where}; {seconds} s in all.\n\n{table(('what', 'found'), list(said.items()))}\n")
    print(json.dumps({"machine": where, "seconds": seconds, **bench.found, **said}))


if __name__ == "__main__":
    run_script(main)
