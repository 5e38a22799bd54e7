"""The whole program as a user runs it, on a small IDX set.

It is trained, sampled from, killed, stopped, resumed, and run on two processes.
"""

import csv
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import training.step
from config import Config
from run import main
from support import checkpoint, plots, precision
from tests.conftest import ROOT, TINY
from tests.processes import assert_close, assert_same, learned, nothing, start, start_ranks, wait_for

RUN = ["--mode", "train", "--dataset", "idx", "--batch-size", "32", "--epochs", "2", "--timesteps", "100", "--preview",
       "4", "--device", "cpu", *TINY]
SAMPLING = ["--steps", "3", "--num-images", "16"]
# A save after every step, so that some kills fall into one.
OFTEN = {"training.loop.SAVE_SECONDS": 0.0, "support.plots.save_losses": nothing}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@dataclass(frozen=True)
class Done:
    """A run that nothing interrupted."""

    folder: Path
    output: str
    learned: dict[str, Any]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, idx_folder: Path) -> Done:
    folder = tmp_path_factory.mktemp("uninterrupted")
    output = start(folder, *RUN, *SAMPLING, "--data-dir", str(idx_folder)).finish()
    return Done(folder, output, learned(folder))


@pytest.fixture
def there(uninterrupted: Done, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished run's folder as the current one, for what needs no process of its own."""
    monkeypatch.chdir(uninterrupted.folder)
    return uninterrupted.folder


def test_training_writes_its_pictures_and_says_where(uninterrupted: Done) -> None:
    folder, output = uninterrupted.folder, uninterrupted.output
    for name in ("sample.png", "process.png", "process.gif", "samples.npz", "loss.png", "metrics.csv"):
        assert (folder / "results/idx" / name).stat().st_size > 100
        assert f"results/idx/{name}" in output
    assert "M parameters" in output and "Training is finished" in output
    state = checkpoint.load(folder / "checkpoints/idx/last.safetensors")
    assert set(state) == {"config", "model", "ema", "optimizer", "step", "history", "version", "digest"}
    assert state["step"] == 16  # 2 epochs of 256 images, 32 in a batch
    rows = list(csv.DictReader((folder / "results/idx/metrics.csv").open()))
    assert float(rows[-1]["epoch"]) == 2 and float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert not list(folder.rglob(".*"))  # no half-written files


def test_samples_have_their_convention_and_origin(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--mode", "sample", "--dataset", "idx", *SAMPLING, "--sampler", "ddim", "--digits", "37",
                 "--seed", "5"]) == 0
    arrays = np.load(there / "results/idx/samples.npz")
    assert arrays["images"].shape == (16, 28, 28) and arrays["images"].dtype == np.uint8
    assert arrays["labels"].tolist() == [3, 7] * 8
    text = Image.open(there / "results/idx/sample.png").text
    weights = checkpoint.weights_digest(checkpoint.load(there / "checkpoints/idx/last.safetensors")["ema"])
    assert text["weights"] == weights and text["seed"] == "5" and text["sampler"] == "ddim" and text["steps"] == "3"
    output = capsys.readouterr().out
    assert f": 4 network evaluations an image. Guidance {Config().sample.guidance:g} acts in 1 of 3 steps" in output


def test_a_picture_of_many_images_shows_the_first(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--mode", "sample", "--dataset", "idx", "--steps", "1", "--num-images", "1030"]) == 0
    assert "sample.png shows the first 1,024 of 1,030 images; samples.npz holds all." in capsys.readouterr().out
    assert Image.open(there / "results/idx/sample.png").size == (2 * (32 * 30 + 2),) * 2
    assert np.load(there / "results/idx/samples.npz")["images"].shape == (1030, 28, 28)


def test_number_is_written(there: Path) -> None:
    assert main(["--mode", "sample", "--dataset", "idx", "--steps", "3", "--write", "2026"]) == 0
    picture = Image.open(there / "results/idx/number.png")
    assert picture.width > picture.height


def test_a_finished_run_says_what_to_do(there: Path, idx_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (there / "checkpoints/idx/last.safetensors").read_bytes()
    assert main([*RUN, *SAMPLING, "--data-dir", str(idx_folder)]) == 0  # samples if others have been sampled since
    capsys.readouterr()
    for epochs in ("2", "1"):
        assert main([*RUN, *SAMPLING, "--data-dir", str(idx_folder), "--epochs", epochs]) == 0
        output = capsys.readouterr().out
        assert "finished" in output and "--fresh" in output and "larger --epochs" in output
    assert (there / "checkpoints/idx/last.safetensors").read_bytes() == before


def test_changed_settings_are_listed_and_nothing_happens(there: Path, idx_folder: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    before = (there / "checkpoints/idx/last.safetensors").read_bytes()
    assert main([*RUN, "--data-dir", str(idx_folder), "--epochs", "9", "--lr", "0.5", "--seed", "9",
                 "--blocks", "1", "1", "2", "--schedule", "linear"]) == 2
    errors = capsys.readouterr().err
    for said in (f"lr was {Config().train.lr}, now 0.5", "seed was 0, now 9",
                 "schedule was cosine, now linear", "blocks was 1 1 1, now 1 1 2"):
        assert said in errors
    assert "epochs was" not in errors and len(errors.strip().splitlines()) == 1
    assert (there / "checkpoints/idx/last.safetensors").read_bytes() == before


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("began, continued, end", [
    ("bf16", "auto", "bf16"), ("fp32", "auto", "fp32"), ("bf16", "bf16", "bf16"), ("auto", "auto", "fp32"),
    ("auto", "fp32", "fp32"), ("bf16", "fp32", "fp32"), ("auto", "bf16", "bf16")])
def test_a_run_keeps_its_precision_until_told_another(began: str, continued: str, end: str, fast: bool, there: Path,
                                                      idx_folder: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    """Also where this CPU is slow at it, which is said. Older files store "auto", which was fp32 on CPUs."""
    monkeypatch.setattr("support.runtime.fast_bf16", lambda device: fast)
    monkeypatch.chdir(tmp_path)
    state = checkpoint.load(there / "checkpoints/idx/last.safetensors")
    state["config"]["precision"] = began
    path = Path("checkpoints/idx/last.safetensors")
    path.parent.mkdir(parents=True)
    checkpoint.save(path, state)
    monkeypatch.setattr(plots, "save_losses", nothing)
    used: list[bool] = []  # the argument of autocast in each training step
    monkeypatch.setattr(training.step, "autocast",
                        lambda device, bf16: (used.append(bf16), precision.autocast(device, bf16))[1])
    assert main([*RUN, "--steps", "1", "--num-images", "1", "--preview", "0", "--data-dir", str(idx_folder),
                 "--epochs", "3", "--precision", continued]) == 0
    said = capsys.readouterr().out
    assert f", {end}: " in said and checkpoint.load(path)["config"]["precision"] == end
    assert {*used} == {end == "bf16"}
    assert ("trained in" in said) == (end != began.replace("auto", "fp32"))
    assert ("--precision fp32 is faster" in said) == (end == "bf16" and continued == "auto" and not fast)
    other = {"fp32": "bf16", "bf16": "fp32"}[end]
    assert main([*RUN, "--steps", "1", "--num-images", "1", "--data-dir", str(idx_folder), "--epochs", "3",
                 "--precision", other]) == 0  # finished: nothing is trained, so nothing is said
    assert "goes on in" not in capsys.readouterr().out


def test_killed_runs_resume_bit_for_bit(uninterrupted: Done, idx_folder: Path, tmp_path: Path) -> None:
    """kill -9 inside a save, between two, and while sampling; tests/slow/stress.py does the same a few dozen times."""
    flags = [*RUN, *SAMPLING, "--data-dir", str(idx_folder)]
    checkpoints, results = tmp_path / "checkpoints/idx", tmp_path / "results/idx"
    moments = [lambda: list(checkpoints.glob(".last.safetensors.*.part")),
               lambda: (results / "preview-0000004.png").exists(), lambda: (results / "sample.png").exists()]
    for moment in moments:
        program = start(tmp_path, *flags, changes=OFTEN)
        wait_for(lambda moment=moment, program=program: moment() or not program.running(), pause=0.001)
        assert program.running() or moment()  # the last moment comes shortly before the end
        program.kill()
        for path in checkpoints.glob("*.safetensors"):  # whole, whenever it was
            checkpoint.load(path)
    output = start(tmp_path, *flags, changes=OFTEN).finish()
    assert "Resuming the run" not in output  # only the images were left to sample
    assert_same(uninterrupted.learned, learned(tmp_path), but="loss.png")
    assert not list(checkpoints.glob(".*"))  # no litter of the killed ones


def test_ctrl_c_saves_and_says_how_to_resume(uninterrupted: Done, idx_folder: Path, tmp_path: Path) -> None:
    """A real process, without stderr, and in an environment with leftovers that must not matter."""
    flags = [*RUN, *SAMPLING, "--data-dir", str(idx_folder), "--compile", "off"]
    leftovers = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": "/dev/null/cache", "RANK": "", "WORLD_SIZE": "2"}
    process = subprocess.Popen(["sh", "-c", 'exec "$0" "$@" 2>&-', sys.executable, str(ROOT / "run.py"), *flags],
                               cwd=tmp_path, text=True, stdout=subprocess.PIPE, env={**os.environ, **leftovers})
    wait_for(lambda: (tmp_path / "results/idx/preview-0000001.png").exists() or process.poll() is not None)
    place = Path(f"/proc/{process.pid}/fd/2")  # where the next file would have been opened
    assert not place.parent.exists() or os.readlink(place) == os.devnull
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    step = checkpoint.load(tmp_path / "checkpoints/idx/last.safetensors")["step"]
    assert f"Stopped after step {step:,}" in output and "the same command again" in output
    assert "Resuming the run" in start(tmp_path, *flags).finish()
    assert_same(uninterrupted.learned, learned(tmp_path))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it takes a GPU")
@pytest.mark.parametrize("flags", [(), ("--precision", "fp32", "--compile", "off"),
                                   ("--attention", "7", "--dropout", "0.1", "--optimizer", "adamw")])
def test_a_gpu_gives_the_same_bits_in_every_run_and_after_a_stop(flags: tuple[str, ...], idx_folder: Path,
                                                                 tmp_path: Path) -> None:
    command = [*(flag.replace("cpu", "cuda") for flag in RUN), *SAMPLING, "--data-dir", str(idx_folder), *flags]
    folders = [tmp_path / name for name in ("one", "other", "stopped")]
    for folder in folders:
        folder.mkdir()
    stopped = start(folders[2], *command, changes={"support.plots.save_losses": nothing})
    stopped.wait_for((folders[2] / "results/idx/preview-0000001.png").exists, seconds=300)
    stopped.signal(signal.SIGTERM)
    stopped.finish(143)
    for folder in folders:
        start(folder, *command).finish()
    one, *others = (learned(folder)["tensors"] for folder in folders)
    assert all(torch.equal(one[name], other[name]) for other in others for name in one)


def test_a_second_run_of_one_name_refuses(idx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*RUN, "--data-dir", str(idx_folder), "--epochs", "1000"]
    first = start(tmp_path, *flags, changes=OFTEN)
    first.wait_for((tmp_path / "checkpoints/idx/last.safetensors").exists)
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    errors = capsys.readouterr().err
    assert "wait for it, or stop it" in errors and len(errors.strip().splitlines()) == 1
    assert (f"process {first.process.pid} on {socket.gethostname()}" in errors
            and f"delete {Path('checkpoints/idx/lock')}" in errors)
    first.kill()
    again = start(tmp_path, *flags)  # the kill left no lock behind
    again.wait_for(lambda: "Resuming the run" in again.output and "images/s" in again.output)
    again.signal(signal.SIGINT)
    again.finish(130)


def test_two_processes_learn_what_one_does(uninterrupted: Done, idx_folder: Path, tmp_path: Path) -> None:
    process = subprocess.run([*TORCHRUN, str(ROOT / "run.py"), *RUN, *SAMPLING, "--data-dir", str(idx_folder)],
                             cwd=tmp_path, text=True, capture_output=True, timeout=300,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("Training is finished") == 1 and "2 processes" in process.stdout
    assert_close(uninterrupted.learned, learned(tmp_path))


THREADS = """
from pathlib import Path
from support import runtime, settings
with runtime.start(settings.parse(["--device", "cpu"])):
    import torch._dynamo  # as training does
print([(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()])
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed otherwise")
def test_no_thread_of_the_connection_is_left_to_abort_a_process_that_ends(tmp_path: Path) -> None:
    (tmp_path / "threads.py").write_text(THREADS)
    output = subprocess.check_output([*TORCHRUN, str(tmp_path / "threads.py")], text=True, timeout=100,
                                     env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert output.count("[") == 2 and "gloo" not in output, output


def test_two_processes_sample_what_one_does(uninterrupted: Done, tmp_path: Path) -> None:
    flags = ["--mode", "sample", "--steps", "3", "--num-images", "130", "--device", "cpu",
             "--checkpoint", str(uninterrupted.folder / "checkpoints/idx/last.safetensors")]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    for program in [start(tmp_path / "one", *flags), *start_ranks(tmp_path / "two", 2, *flags)]:
        program.finish()
    one, two = (np.load(next((tmp_path / name / "results").glob("idx-*/samples.npz"))) for name in ("one", "two"))
    assert (len(one["images"]) == 130 and np.array_equal(one["images"], two["images"])
            and np.array_equal(one["labels"], two["labels"]))
