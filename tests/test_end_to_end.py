"""The whole program as a user runs it: real processes on a small IDX set, killed, stopped and continued."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
from tests.conftest import ROOT, TINY

RUN = ["--dataset", "idx", "--batch-size", "32", "--epochs", "4", "--timesteps", "100", "--preview", "4", "--device", "cpu", *TINY]
DRAW = ["--steps", "3", "--num-images", "16"]


def start(folder: Path, flags: list[str], threads: int = 1, **environment: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / "run.py"), *flags], cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": str(threads), **environment})


def finish(process: subprocess.Popen, status: int = 0) -> tuple[str, str]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == status, (process.returncode, output[-2000:], errors[-2000:])
    assert "Traceback" not in errors
    return output, errors


def run(folder: Path, *flags: str, status: int = 0) -> tuple[str, str]:
    return finish(start(folder, list(flags)), status)


def learned(folder: Path) -> dict:
    """What must be the same after a run, however often it was interrupted."""
    state = checkpoint.load(folder / "checkpoints/idx/last.pt")
    rows = list(csv.DictReader((folder / "results/idx/metrics.csv").open()))
    times = {"seconds"}
    flat = {f"{group}.{name}": value for group in ("model", "ema") for name, value in state[group].items()}
    for part, inner in state["optimizer"].items():
        flat |= {f"{part}.{i}.{name}": value for i, values in inner["state"].items() for name, value in values.items()}
    pictures = {path.name: path.read_bytes() for path in (folder / "results/idx").glob("preview-*.png")}
    return {"tensors": flat, "step": state["step"], "pictures": pictures,
            "rows": [{name: value for name, value in row.items() if name not in times} for row in rows]}


def assert_same(one: dict, other: dict) -> None:
    assert one["step"] == other["step"] and one["rows"] == other["rows"] and one["pictures"] == other["pictures"]
    assert one["tensors"].keys() == other["tensors"].keys()
    for name, tensor in one["tensors"].items():
        assert torch.equal(tensor, other["tensors"][name]), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, idx_folder: Path) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    output, _ = run(folder, *RUN, *DRAW, "--data-dir", str(idx_folder))
    return folder, output


def test_training_writes_its_pictures_and_says_where(uninterrupted) -> None:
    folder, output = uninterrupted
    for name in ("sample.png", "process.png", "process.gif", "samples.npz", "loss.png", "metrics.csv"):
        assert (folder / "results/idx" / name).stat().st_size > 100
        assert f"results/idx/{name}" in output
    assert "M parameters" in output and "GFLOP per image" in output
    state = checkpoint.load(folder / "checkpoints/idx/last.pt")
    assert set(state) == {"config", "model", "ema", "optimizer", "step", "history", "version", "digest"}
    assert state["step"] == 32  # 4 epochs of 256 images, 32 in a batch
    rows = list(csv.DictReader((folder / "results/idx/metrics.csv").open()))
    assert float(rows[-1]["epoch"]) == 4 and float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_samples_have_their_convention_and_origin(uninterrupted, idx_folder: Path) -> None:
    folder, _ = uninterrupted
    output, _ = run(folder, "--mode", "sample", "--dataset", "idx", *DRAW, "--digits", "37", "--seed", "5")
    arrays = np.load(folder / "results/idx/samples.npz")
    assert arrays["arr_0"].shape == (16, 28, 28, 1) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [3, 7] * 8
    text = Image.open(folder / "results/idx/sample.png").text
    weights = checkpoint.weights_digest(checkpoint.load(folder / "checkpoints/idx/last.pt")["ema"])
    assert text["weights"] == weights and text["seed"] == "5" and text["sampler"] == "dpmpp" and text["steps"] == "3"
    assert "Time:" in output


def test_number_is_written(uninterrupted) -> None:
    folder, _ = uninterrupted
    run(folder, "--mode", "sample", "--dataset", "idx", "--steps", "3", "--write", "2026")
    picture = Image.open(folder / "results/idx/number.png")
    assert picture.width > picture.height


def test_more_steps_than_noise_levels(uninterrupted) -> None:
    folder, _ = uninterrupted
    _, errors = run(folder, "--mode", "sample", "--dataset", "idx", "--steps", "101", status=2)
    assert len(errors.strip().splitlines()) == 1 and "--steps 101" in errors


def test_a_finished_run_says_what_to_do(uninterrupted, idx_folder: Path) -> None:
    folder, _ = uninterrupted
    before = (folder / "checkpoints/idx/last.pt").read_bytes()
    output, _ = run(folder, *RUN, "--data-dir", str(idx_folder))
    assert "finished" in output and "--fresh" in output
    assert (folder / "checkpoints/idx/last.pt").read_bytes() == before


def test_changed_settings_are_listed_and_nothing_happens(uninterrupted, idx_folder: Path) -> None:
    folder, _ = uninterrupted
    before = (folder / "checkpoints/idx/last.pt").read_bytes()
    _, errors = run(folder, *RUN, "--data-dir", str(idx_folder), "--lr", "0.5", "--seed", "9", status=2)
    assert "lr was 0.002, now 0.5" in errors and "seed was 0, now 9" in errors
    assert (folder / "checkpoints/idx/last.pt").read_bytes() == before


def test_killed_runs_continue_bit_for_bit(uninterrupted, idx_folder: Path, tmp_path: Path) -> None:
    """kill -9 at arbitrary moments, with a save after every step so that some kills fall into one."""
    kills = 0
    for delay in (0.05, 0.4, 0.9, None):
        process = start(tmp_path, [*RUN, *DRAW, "--data-dir", str(idx_folder)], SAVE_SECONDS="0")
        if delay is None:
            finish(process)
            break
        wait_for(lambda: (tmp_path / "checkpoints/idx/last.pt").exists() or process.poll() is not None)
        time.sleep(delay)
        kills += process.poll() is None
        process.kill()
        process.communicate()
    assert kills
    assert_same(learned(uninterrupted[0]), learned(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_saves_and_says_how_to_go_on(number: signal.Signals, uninterrupted, idx_folder: Path, tmp_path: Path) -> None:
    flags = [*RUN, *DRAW, "--data-dir", str(idx_folder)]
    process = start(tmp_path, flags, SAVE_SECONDS="0")
    wait_for(lambda: (tmp_path / "checkpoints/idx/last.pt").exists())
    process.send_signal(number)
    output, _ = finish(process, 128 + number)
    assert "same command again" in output
    output, _ = run(tmp_path, *flags)
    assert "Going on" in output
    assert_same(learned(uninterrupted[0]), learned(tmp_path))


def test_a_second_run_of_one_name_refuses(idx_folder: Path, tmp_path: Path) -> None:
    flags = [*RUN, "--data-dir", str(idx_folder), "--epochs", "1000"]
    first = start(tmp_path, flags, SAVE_SECONDS="0")
    wait_for(lambda: (tmp_path / "checkpoints/idx/last.pt").exists())
    _, errors = run(tmp_path, *flags, status=2)
    assert "--name" in errors
    first.kill()
    first.communicate()
    process = start(tmp_path, flags)  # the kill left no lock behind
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    finish(process, 130)


def test_two_processes_learn_what_one_does(uninterrupted, idx_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517",
               str(ROOT / "run.py"), *RUN, *DRAW, "--data-dir", str(idx_folder)]
    process = subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    finish(process)
    one, two = learned(uninterrupted[0]), learned(tmp_path)
    assert one["step"] == two["step"]
    for row, other in zip(one["rows"], two["rows"], strict=True):
        assert float(row["train_loss"]) == pytest.approx(float(other["train_loss"]), rel=1e-2)
    # The same weights give the same images, whatever the number of processes.
    copy = tmp_path / "checkpoints/idx/last.pt"
    copy.write_bytes((uninterrupted[0] / "checkpoints/idx/last.pt").read_bytes())
    draw = ["--mode", "sample", "--dataset", "idx", "--steps", "3", "--num-images", "130"]
    run(uninterrupted[0], *draw)
    finish(subprocess.Popen([*command[:7], str(ROOT / "run.py"), *draw], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}))
    assert np.array_equal(np.load(uninterrupted[0] / "results/idx/samples.npz")["arr_0"],
                          np.load(tmp_path / "results/idx/samples.npz")["arr_0"])


def test_minutes_end_on_time(idx_folder: Path, tmp_path: Path) -> None:
    began = time.time()
    output, _ = run(tmp_path, *RUN, *DRAW, "--data-dir", str(idx_folder), "--minutes", "0.05")
    assert time.time() - began < 40 and "minutes" in output
    history = checkpoint.load(tmp_path / "checkpoints/idx/last.pt")["history"]
    assert 2.9 <= history["seconds"] < 10


def wait_for(condition, seconds: float = 60) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.01)
