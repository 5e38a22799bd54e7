"""A long run that can't be lost: saves that fail, memory that is used up, waits of other processes, Slurm's warning."""

import errno
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import training.loop
from config import TrainConfig, UserError
from evaluation.classifier import Classifier
from run import main
from support import checkpoint, plots, runtime, settings
from tests.conftest import ROOT, TINY, write_set
from tests.processes import assert_same, learned, nothing, start, start_ranks
from training.step import Learner

RUN = ["--dataset", "idx", "--batch-size", "8", "--epochs", "2", "--timesteps", "100", "--preview", "0",
       "--device", "cpu", *TINY, "--steps", "3", "--num-images", "16"]  # 16 steps
LAST = Path("checkpoints/idx/last.safetensors")
REPLACE, INIT = os.replace, torch.distributed.init_process_group
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save_losses", nothing)
        yield


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*RUN, "--data-dir", str(write_set(tmp_path_factory.mktemp("idx"), train=64, test=32))]


def stale(source: Any, target: Any) -> None:
    """os.replace on a network drive that lost the checkpoint's folder."""
    if Path(target).name == LAST.name:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    REPLACE(source, target)


def fail(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [times]

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == LAST.name and left[0]:
            left[0] -= 1
            stale(source, target)
        REPLACE(source, target)

    monkeypatch.setattr(os, "replace", replace)


def test_a_save_that_fails_once_is_a_warning_and_is_tried_again(own_folder: Path, flags: list[str],
                                                                monkeypatch: pytest.MonkeyPatch,
                                                                capsys: Capture) -> None:
    assert main([*flags, "--name", "calm"]) == 0
    monkeypatch.setattr(training.loop, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training.loop, "RETRY_SECONDS", 0.0)
    fail(3, monkeypatch)
    capsys.readouterr()
    assert main(flags) == 0
    said = capsys.readouterr()
    assert said.out.count("WARNING: ") == 1 and not said.err
    assert re.search(r"WARNING: checkpoints/idx/last.safetensors: can't be written \(Stale file handle\)", said.out)
    assert "The run is saved again, after step 4." in said.out
    assert_same(learned(own_folder, "calm"), learned(own_folder))


def test_saves_that_go_on_failing_end_the_run(own_folder: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch,
                                              capsys: Capture) -> None:
    assert main([*flags, "--epochs", "1"]) == 0
    before = LAST.read_bytes()
    for name, value in {"SAVE_SECONDS": 0.0, "RETRY_SECONDS": 0.0, "FAILING_SECONDS": 0.0}.items():
        monkeypatch.setattr(training.loop, name, value)
    fail(1000, monkeypatch)
    capsys.readouterr()
    assert main([*flags, "--epochs", "1000"]) == 2
    said = capsys.readouterr()
    assert said.out.count("WARNING: ") == 1 and said.err.count("\n") == 1
    assert said.err.startswith(f"error: {LAST}: can't be written (Stale") and "untouched" in said.err
    assert LAST.read_bytes() == before


@pytest.mark.parametrize("times, status", [(2, 0), (1000, 2)])
def test_the_last_save_is_tried_several_times(times: int, status: int, own_folder: Path, flags: list[str],
                                              monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(training.loop, "LAST_PAUSES", (0.0, 0.0))
    fail(times, monkeypatch)
    assert main(flags) == status and LAST.exists() == (status == 0)
    assert capsys.readouterr().out.count("WARNING: ") == 1


def test_a_second_signal_ends_the_tries_of_the_last_save(own_folder: Path, flags: list[str]) -> None:
    program = start(own_folder, *flags, "--epochs", "1000", changes={"os.replace": stale,
                                                                     "support.plots.save_losses": nothing})
    program.wait_for(lambda: "images/s" in program.output)
    program.signal(2)
    program.wait_for(lambda: "Trying again for 15 seconds" in program.output)
    program.signal(2)
    program.finish(130, seconds=10)


def test_all_processes_end_together_when_saves_go_on_failing(own_folder: Path, flags: list[str]) -> None:
    programs = start_ranks(own_folder, 2, *flags, "--epochs", "1000", changes={
        "os.replace": stale, "support.plots.save_losses": nothing, "training.loop.SAVE_SECONDS": 0.0,
        "training.loop.RETRY_SECONDS": 0.0, "training.loop.FAILING_SECONDS": 0.2})
    for program in programs:
        program.finish(2, seconds=60)
    assert [len(program.lines()) for program in programs] == [1, 0]


# Memory

LIMITED = """
import resource, sys
import training.loop, sample, matplotlib.figure, torch
torch.set_num_threads(1)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30), size + (1 << 30)))
import run
sys.exit(run.main(sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the process's size is read in /proc")
@pytest.mark.parametrize("arguments, advice", [
    (["--batch-size", "20000"], "smaller --batch-size (now 20000) or network (--channels, --blocks)"),
    (["--mode", "sample", "--checkpoint", "pretrained", "--num-images", "1000000"], "smaller --num-images")])
def test_memory_that_is_used_up_is_one_line(arguments: list[str], advice: str, tmp_path: Path) -> None:
    flags = arguments if "sample" in arguments else [*arguments, "--mode", "train", "--dataset", "generated",
                                                               "--name", "large"]
    process = subprocess.run([sys.executable, "-c", LIMITED, *flags, "--device", "cpu"], cwd=tmp_path, text=True,
                             capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
    assert process.returncode == 2, process.stderr[-2000:]
    assert re.fullmatch(r"error: not enough memory on CPU \(1 thread\) \(\d+\.\d GB more were asked for\): use a "
                        f"{re.escape(advice)}.*\n", process.stderr)


@pytest.mark.parametrize("error, said", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), "(2.50 GiB more were asked"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)."), "not enough memory on CPU"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "smaller"),
    (MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000,)"), "(7.45 GiB more"),
    (MemoryError(), "smaller"), (RuntimeError("mat1 and mat2 must have the same dtype"), None)])
def test_all_kinds_of_used_up_memory(error: Exception, said: str | None, own_folder: Path, flags: list[str],
                                     monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def step(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Learner, "step", step)
    if said is None:
        with pytest.raises(RuntimeError, match="mat1"):
            main(flags)
    else:
        assert main(flags) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: not enough memory") and said in line and line.count("\n") == 1


@pytest.mark.parametrize("mode, advice", [(["train"], "--batch-size"), (["evaluate"], "--num-images"),
                                          (["experiment", "--change", "--focus 0"], "--batch-size")])
def test_what_to_do_about_used_up_memory_depends_on_what_takes_it(mode: list[str], advice: str) -> None:
    config = settings.parse(["--mode", *mode])
    with pytest.raises(UserError, match=f"use a smaller {advice}"), runtime.memory_errors(
            config, runtime.make_runtime(config)):
        raise MemoryError


# Waiting, and thin logs


def patiently(*arguments: Any, timeout: timedelta, **options: Any) -> None:
    assert timeout >= timedelta(hours=12)
    INIT(*arguments, timeout=timeout, **options)


def untrained(*_: Any) -> Classifier:
    time.sleep(1)
    return Classifier().eval()


def test_processes_wait_for_the_first_one_to_train_a_classifier(own_folder: Path) -> None:
    data = ["--dataset", "idx", "--data-dir", str(write_set(own_folder / "data", train=2000, test=300))]
    common = [*data, "--device", "cpu", "--steps", "2", "--num-images", "200"]
    start(own_folder, *common, *TINY, "--minutes", "0.001", "--preview", "0").finish()
    for program in start_ranks(own_folder, 2, "--mode", "evaluate", *common, changes={
            "evaluation.classifier.train_classifier": untrained,
            "torch.distributed.init_process_group": patiently}):
        program.finish(seconds=120)
    assert list(Path("checkpoints/classifiers").glob("idx-*")) and Path("results/idx/metrics.json").exists()


@pytest.mark.parametrize("length, logged", [(["--minutes", "1"], 3), (["--epochs", "8"], 16)])
def test_logs_take_a_tenth_of_the_minutes_and_come_at_all_epochs(length: list[str], logged: int, own_folder: Path,
                                                                 flags: list[str],
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock by which a step takes a second and a log point five: 8 steps an epoch."""
    clock, step, log_point, previews = SimpleNamespace(seconds=0.0), Learner.step, training.loop.log_point, list[bool]()

    def timed_step(*arguments: Any) -> torch.Tensor:
        clock.seconds += 1
        return step(*arguments)

    def timed_log(state: Any, preview: bool) -> None:
        clock.seconds += 5
        previews.append(preview)
        log_point(state, preview)

    monkeypatch.setattr(Learner, "step", timed_step)
    monkeypatch.setattr(training.loop, "log_point", timed_log)
    monkeypatch.setattr(training.loop, "time", SimpleNamespace(perf_counter=lambda: clock.seconds))
    epochs = flags.index("--epochs")
    assert main([*flags[:epochs], *flags[epochs + 2:], *length]) == 0
    assert len(previews) == logged and previews[0] and previews[-1]
    state = checkpoint.load(LAST)
    assert state["history"]["columns"]["step"][-1] == state["step"] == (60 if "--minutes" in length else 64)


# The device


def test_a_gpu_too_old_for_torch_is_left_alone(own_folder: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: Capture) -> None:
    error = "CUDA error: no kernel image is available for execution on the device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(runtime, "kernel_error", lambda device: error)
    sample = ["--mode", "sample", "--checkpoint", "pretrained", "--steps", "1", "--num-images", "1"]
    assert main(sample) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"note: torch {torch.__version__} can't use this GPU ({error}), so this runs on the CPU.\n")
    assert "on CPU" in out
    assert main([*sample, "--device", "cuda"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: --device cuda: ") and error in line and "--device cpu" in line


def test_a_device_is_tried_with_one_kernel() -> None:
    assert runtime.kernel_error("cpu") == ""
    assert "\n" not in runtime.kernel_error("meta") != ""  # a device that computes nothing


# At its end


@pytest.mark.parametrize("step, said", [(100, "note: the images are still static: the network has seen 6,400,"),
                                        (1000, "WARNING: these images do not look like mnist (static)")])
def test_static_is_a_warning_only_where_more_could_be_expected(step: int, said: str, capsys: Capture) -> None:
    noise = torch.randint(0, 256, (16, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plots.warn_if_broken(noise, {"name": "mnist"}, 64 * step)
    assert capsys.readouterr().out.startswith(said)


def test_previews_have_whole_rows() -> None:
    assert TrainConfig().preview % 10 == 0  # ten columns: one of each digit
