"""The GPU table: what this project does on a GPU, in a few minutes, and the largest kernels of a training step.

    python benchmarks/gpu.py --data-dir FOLDER
    python benchmarks/gpu.py --device cpu --quick        (tries the script itself where there is no GPU)

A row that fails says why, and the others go on. Without a GPU its exit status is 2.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import Operations, Parser, Trainee, config_of, machine, run_script, table
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from config import ROOT, UserError
from dataset import to_uint8
from sample import load_checkpoint, make_request, sample_images
from support import checkpoint, loading, selection
from support.runtime import Runtime, start
from training import step as training_step

os.environ.setdefault("TEARDOWN_CUPTI", "0")  # else profiles that follow each other closely may see no kernels
TINY = ("--channels", "8", "8", "16", "--groups", "4")  # the network of --quick
PROFILED, LISTED = 10, 20  # steps; kernels


class Bench:
    """What the rows share: the device, the data, and how long each may take."""

    def __init__(self, runtime: Runtime, data: list[str], quick: bool) -> None:
        self.device, self.data, self.quick = runtime.device, data, quick
        self.train, self.test = loading.load_both(config_of(None, *data), runtime)
        self.cuda = self.device.type == "cuda"

    def trainee(self, bf16: bool = True, compile: bool = False, batch: int = 256,
                deterministic: bool = True) -> Trainee:
        torch.compiler.reset()  # it gives up after eight networks
        flags = ("--batch-size", str(batch), "--precision", "bf16" if bf16 else "fp32", *(TINY if self.quick else ()))
        config = config_of(None, *self.data, *flags, "--deterministic" if deterministic else "--no-deterministic")
        return Trainee(config, Runtime(self.device, bf16, compile), self.train, self.test)

    def timed(self, work: Callable[[], Any]) -> float:
        """Median of the seconds of a call, after some to warm up and capture."""
        for _ in range(5):
            work()
        timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=2).median


def kernels(seen: profile) -> list[Any]:
    return [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def training(bench: Bench, **options: Any) -> str:
    trainee = bench.trainee(**options)
    rate = options["batch"] / bench.timed(lambda: trainee.step(0.5))
    return f"{rate:,.0f} images/s, an epoch of 60,000 in {60_000 / rate:.2f} s"


def origins(bench: Bench, compile: bool) -> str:
    """Kernels of a step that is not captured, by where they come from; on a CPU, operations."""
    trainee, counts = bench.trainee(compile=compile), dict[str, int]()
    trainee.step(0.5)
    learner = trainee.state.learner

    def counting(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*inputs: Any) -> Any:
            with profile(activities=[ProfilerActivity.CUDA]) if bench.cuda else Operations() as seen:
                result = work(*inputs)
                torch.get_device_module(bench.device).synchronize()
            counts[name] = len(kernels(seen)) if bench.cuda else seen.count
            return result

        return counted

    parts = ((name, part, "step") for name, part in learner.optimizer.parts.items())
    with contextlib.ExitStack() as patched:
        for name, owner, attribute in (
                ("random numbers", training_step, "random_batch"), ("forward", learner, "compiled_loss"),
                ("backward", torch.Tensor, "backward"), ("clipping", torch.nn.utils, "clip_grad_norm_"), *parts,
                ("average", training_step, "update_average")):
            work = counting(name, getattr(owner, attribute))
            patched.enter_context(mock.patch.object(owner, attribute, work))
        patched.enter_context(mock.patch.object(learner, "graph", None))
        trainee.step(0.5)
    return f"{sum(counts.values()):,}: " + ", ".join(f"{name} {count}" for name, count in counts.items())


def captured(bench: Bench) -> str:
    """All kernels of steps as training launches them; prints the largest."""
    trainee = bench.trainee(compile=True)
    for _ in range(2):  # the first time to warm up and capture
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(PROFILED):
                trainee.step(0.5)
            torch.cuda.synchronize()
    spent, times = Counter[str](), Counter[str]()
    for event in kernels(seen):
        spent[event.name] += event.time_range.elapsed_us() / PROFILED
        times[event.name] += 1
    largest = [(name[:70].replace("|", "/"), f"{times[name] / PROFILED:g}", f"{microseconds:.1f}")
               for name, microseconds in spent.most_common(LISTED)]
    print(f"{table(('kernel', 'launches a step', 'us a step'), largest)}\n")
    return f"{times.total() / PROFILED:,.0f} kernels, {spent.total() / 1000:.2f} ms if one ran after the other"


def sampling(bench: Bench) -> str:
    trainee, count = bench.trainee(), 16 if bench.quick else 256
    return f"{1000 * bench.timed(lambda: trainee.sample(count)):,.0f} ms for {count} images"


def devices(bench: Bench, bf16: bool) -> str:
    """The pretrained weights, the same seeds, here and on the CPU: pixels that are not 0 in both."""
    images = []
    for device in (torch.device("cpu"), bench.device):
        model = load_checkpoint(selection.PRETRAINED, Runtime(device, bf16 and device.type != "cpu", compile=False))
        request = make_request(model, config_of(None).sample, 0, 4 if bench.quick else 64)
        images.append(to_uint8(sample_images(model, request)[0]).int())
    alike = (images[0] - images[1]).abs()[(images[0] > 0) | (images[1] > 0)] <= 1
    return f"{alike.double().mean().item():.2%} of the pixels that are not black within a grey level"


def reproduced(bench: Bench) -> str:
    """Digests of the weights of two runs of run.py and of a third one that was stopped and resumed."""
    flags = ["--dataset", "generated", "--device", bench.device.type, "--preview", "0", "--epochs", "2",
             "--num-images", "1", *(("--batch-size", "512", *TINY) if bench.quick else ())]

    def run(folder: str, stop: bool = False) -> None:
        process = subprocess.Popen([sys.executable, str(ROOT / "run.py"), *flags], cwd=folder, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while stop and process.poll() is None and not (Path(folder) / "results/generated/metrics.csv").exists():
            time.sleep(0.01)
        if stop:
            process.send_signal(signal.SIGTERM)
        output = process.communicate()[0]
        if process.returncode not in (0, 143):
            raise RuntimeError((output.strip().splitlines() or ["no output"])[-1])

    states = []
    for stops in ((False,), (False,), (True, False)):
        with tempfile.TemporaryDirectory() as folder:
            for stop in stops:
                run(folder, stop)
                states.append(checkpoint.load(Path(folder) / "checkpoints/generated" / checkpoint.LAST))
    *digests, _, resumed = (checkpoint.weights_digest(state["model"]) for state in states)
    return f"{', '.join(digests)}, and {resumed} after a stop at step {states[2]['step']} of {states[3]['step']}"


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
    rows: dict[str, Callable[[Bench], str]] = {"training, batch 256, bf16, eager": partial(training, batch=256)}
    if bench.cuda:
        kinds: dict[str, Any] = {"bf16": {}, "bf16, any order": {"deterministic": False}, "fp32": {"bf16": False}}
        rows |= {f"training, batch {batch}, {kind}": partial(training, batch=batch, compile=True, **options)
                 for batch in (64, 256, 2048) for kind, options in kinds.items()}
    rows |= {"sampling": sampling, "the CPU's images, fp32 (TF32)": partial(devices, bf16=False),
             "the CPU's images, bf16": partial(devices, bf16=True), "weights of two runs and a stopped one": reproduced,
             "launches, eager": partial(origins, compile=False)}  # a profile may slow down what comes after it
    if bench.cuda:
        rows |= {"launches, compiled": partial(origins, compile=True), "launches, captured": captured}
    said: dict[str, str] = {}
    began = time.perf_counter()
    for name, work in rows.items():
        try:
            said[name] = work(bench)
        except Exception as error:  # whatever it is, it belongs into the table
            said[name] = f"FAILED: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
        print(f"  {name}: {said[name]}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - began
    print(f"{machine(bench.device)}; {seconds:.0f} s in all.\n\n{table(('what', 'found'), list(said.items()))}")


if __name__ == "__main__":
    run_script(main)
