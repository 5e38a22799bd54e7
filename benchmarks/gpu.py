"""The GPU table: what this project does on a GPU, every row of it, in a few minutes and without a network.

    python benchmarks/gpu.py --data-dir FOLDER
    python benchmarks/gpu.py --device cpu --quick        (tries the script itself where there is no GPU)

Prints a Markdown table and a line of JSON. A row that fails says why, and the others go on. Without a GPU it says so,
and its exit status is 2.
"""

import itertools
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Operations, Parser, Trainee, config_of, machine, run_script, table
from torch.profiler import ProfilerActivity, profile

import dataset
from config import ROOT, UserError
from dataset import to_uint8
from sample import load_checkpoint, make_request, sample_images
from support import checkpoint
from support.runtime import Runtime, start

TINY = ("--channels", "8", "8", "16", "--groups", "4")  # the network of --quick


class Bench:
    """What the rows share: the device, the data, and how long each may take."""

    def __init__(self, runtime: Runtime, data: list[str], quick: bool) -> None:
        self.runtime, self.device, self.data, self.quick = runtime, runtime.device, data, quick
        self.train, self.test = dataset.load_both(config_of(None, *data), runtime)
        self.cuda = self.device.type == "cuda"

    def trainee(self, bf16: bool = True, compile: bool = False, batch: int = 64) -> Trainee:
        torch.compiler.reset()  # it gives up after eight networks
        flags = ("--batch-size", str(batch), "--precision", "bf16" if bf16 else "fp32", *(TINY if self.quick else ()))
        config = config_of(None, *self.data, *flags)
        return Trainee(config, Runtime(self.device, bf16, compile), self.train, self.test)

    def timed(self, work: Callable[[], Any]) -> float:
        """Seconds a call, after some to warm up and capture, over about two seconds."""
        for _ in range(5):
            work()
        torch.get_device_module(self.device).synchronize()
        began, calls, group = time.perf_counter(), 0, 1 if self.quick else 10
        while calls == 0 or not self.quick and time.perf_counter() - began < 2:
            for _ in range(group):
                work()
            torch.get_device_module(self.device).synchronize()
            calls += group
        return (time.perf_counter() - began) / calls


def training(bench: Bench, bf16: bool, compile: bool, batch: int) -> str:
    trainee = bench.trainee(bf16, compile, batch)
    rate = batch / bench.timed(lambda: trainee.step(0.5))
    return f"{rate:,.0f} images/s, an epoch of 60,000 in {60_000 / rate:.2f} s"


def launches(bench: Bench, compile: bool) -> str:
    """Of one training step at the default batch; eager, it fails if the host waits for the GPU."""
    trainee = bench.trainee(compile=compile)
    for _ in range(5):
        trainee.step(0.5)
    said = []
    if not compile:  # nothing can be compiled under Operations
        on_wait: Any = torch.cuda.set_sync_debug_mode if bench.cuda else lambda _: None
        on_wait("error")
        try:
            with Operations() as operations:
                trainee.step(0.5)
        finally:
            on_wait("default")
        said.append(f"{operations.count:,} operations, {operations.waits} of which wait")
    if bench.cuda:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            began = time.perf_counter()
            for _ in range(10):
                trainee.step(0.5)
            torch.get_device_module(bench.device).synchronize()
            took = time.perf_counter() - began
        kernels = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        busy, end = 0.0, 0.0  # time in which kernels of several streams run counts once
        for span in sorted((event.time_range.start, event.time_range.end) for event in kernels):
            busy += max(0.0, span[1] - max(end, span[0])) / 1e6 / took
            end = max(end, span[1])
        said.append(f"{len(kernels) / 10:,.0f} kernels, the GPU busy {busy:.0%} of the time")
    return ", ".join(said) or "only a GPU can tell"


def sampling(bench: Bench) -> str:
    trainee, (count, steps) = bench.trainee(compile=False), (16, 2) if bench.quick else (256, 13)
    return f"{1000 * bench.timed(lambda: trainee.sample(count, steps=steps)):,.0f} ms for {count} images"


def devices(bench: Bench, bf16: bool) -> str:
    """The shipped weights, the same seeds, here and on the CPU: pixels that are not 0 in both."""
    images = []
    for device in (torch.device("cpu"), bench.device):
        runtime = Runtime(device, bf16 and device.type != "cpu", device.type == "cuda")
        model = load_checkpoint(checkpoint.PRETRAINED, runtime)
        request = make_request(model, config_of(None).sample, 0, 4 if bench.quick else 64)
        images.append(to_uint8(sample_images(model, request)[0]).int())
    bright = (images[0] > 0) | (images[1] > 0)
    share = ((images[0] - images[1]).abs()[bright] <= 1).double().mean().item()
    return f"{share:.2%} of the pixels that are not black within a grey level"


def run(folder: str, *flags: str, wait: bool = True) -> Any:
    """run.py in a process of its own in that folder; raises RuntimeError with its last line if it fails."""
    process = subprocess.Popen([sys.executable, str(ROOT / "run.py"), *flags], cwd=folder, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = process.communicate()[0] if wait else ""
    if wait and process.returncode != 0:
        raise RuntimeError((output.strip().splitlines() or ["no output"])[-1])
    return process


def trained(folder: str, name: str) -> dict[str, Any]:
    return checkpoint.load(Path(folder) / "checkpoints" / name / checkpoint.LAST)


def resume(bench: Bench) -> str:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--dataset", "generated", "--device", bench.device.type, "--preview", "0", "--epochs", "2",
                 "--num-images", "1", *(("--batch-size", "512", *TINY) if bench.quick else ())]
        run(folder, *flags, "--name", "straight")
        stopped = run(folder, *flags, "--name", "stopped", wait=False)
        rows = Path(folder) / "results" / "stopped" / "metrics.csv"
        while stopped.poll() is None and not rows.exists():
            time.sleep(0.01)
        stopped.send_signal(signal.SIGTERM)
        stopped.communicate()
        at = trained(folder, "stopped")["step"]
        run(folder, *flags, "--name", "stopped")
        one, other = trained(folder, "straight"), trained(folder, "stopped")
    apart = max((one["model"][name] - other["model"][name]).abs().max().item() for name in one["model"])
    ends = [state["history"]["columns"]["test_loss"][-1] for state in (one, other)]
    return (f"stopped at step {at} of {one['step']}: test loss {ends[1]:.4f}, unstopped {ends[0]:.4f}; "
            + (f"weights at most {apart:.1g} apart" if apart else "the same bits"))


def main(argv: list[str]) -> None:
    parser = Parser(__doc__, "--data-dir")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny network and few steps, to try the script itself")
    options = parser.parse(argv)
    data = ["--dataset", "generated"] if options.quick else ["--dataset", "mnist"]
    data += ["--data-dir", options.data_dir] if options.data_dir else []
    with start(config_of(None, *data, "--device", options.device)) as runtime:
        if runtime.device.type == "cpu" and not options.quick:
            raise UserError("--device cpu: this measures GPUs; add --quick to try the script itself")
        fill_table(Bench(runtime, data, options.quick))


def fill_table(bench: Bench) -> None:
    rows: dict[str, Callable[[Bench], str]] = {}
    kinds = {"bf16, eager": (True, False), "bf16, compiled": (True, True), "fp32 (TF32), compiled": (False, True)}
    for batch, (kind, (bf16, compile)) in itertools.product((64, 256, 2048), kinds.items()):
        if not bench.quick or batch == 64 and not compile:
            rows[f"training, batch {batch}, {kind}"] = partial(training, bf16=bf16, compile=compile, batch=batch)
    rows |= {"launches of a step, eager": partial(launches, compile=False),
             "launches of a step, compiled": partial(launches, compile=True),
             "peak memory": lambda _: f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if bench.cuda else "-",
             "sampling": sampling,
             "the CPU's images, fp32 (TF32)": partial(devices, bf16=False),
             "the CPU's images, bf16": partial(devices, bf16=True), "stop and resume": resume}
    said: dict[str, str] = {}
    began = time.perf_counter()
    for name, work in rows.items():
        try:
            said[name] = work(bench)
        except Exception as error:  # whatever it is, it belongs into the table
            said[name] = f"FAILED: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
        print(f"  {name}: {said[name]}", file=sys.stderr, flush=True)
    seconds = round(time.perf_counter() - began)
    where = machine(bench.device)
    print(f"{where}; {seconds} s in all.\n\n{table(('what', 'found'), list(said.items()))}\n")
    print(json.dumps({"machine": where, "seconds": seconds, **said}))


if __name__ == "__main__":
    run_script(main)
