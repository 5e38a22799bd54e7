"""The offline default: generated digits that ship, verified, under their own name, with a notice no one can miss."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

import config as configs
import dataset
from config import UserError
from dataset import NOTICE
from run import main
from support import checkpoint
from support.extractor import SURE, extract, load_extractor
from support.runtime import Runtime
from tests.conftest import TINY

CPU = Runtime(torch.device("cpu"), bf16=False, compile=False)


@pytest.fixture
def offline(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def fail(name: str, root: Path) -> None:
        raise UserError("MNIST can't be downloaded (no network)")

    monkeypatch.setattr(dataset, "download", fail)
    return own_folder


def test_generated_digits_are_whole_and_balanced() -> None:
    train, test = dataset.load_generated("train"), dataset.load_generated("test")
    assert len(train) == 9000 and len(test) == 1000
    assert torch.bincount(train.labels).tolist() == [900] * 10 and torch.bincount(test.labels).tolist() == [100] * 10
    assert 0.09 < train.images.float().mean() / 255 < 0.17  # MNIST: 0.1307
    assert set(dataset.GENERATED_MD5) == set(dataset.MNIST_MD5)
    assert sum(path.stat().st_size for path in dataset.GENERATED.iterdir()) < 3e6


def test_a_changed_generated_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in dataset.GENERATED.glob("*.gz"):
        content = bytearray(gzip.decompress(path.read_bytes()))
        if "t10k-images" in path.name:
            content[5000] ^= 1
        (tmp_path / path.name).write_bytes(gzip.compress(bytes(content), 1))
    monkeypatch.setattr(dataset, "GENERATED", tmp_path)
    dataset.load_generated("train")
    with pytest.raises(UserError, match="t10k-images"):
        dataset.load_generated("test")


def test_auto_prefers_mnist_that_is_there(own_folder: Path) -> None:
    raw = own_folder / "dataset/mnist/MNIST/raw"
    raw.mkdir(parents=True)
    for name in dataset.MNIST_MD5:
        (raw / name).write_bytes(b"")
    resolved = dataset.resolve(configs.parse([]), CPU)
    assert resolved.dataset == "mnist" and configs.run_name(resolved) == "mnist"
    with pytest.raises(UserError, match="damaged"):  # damaged is not absent: no silent fall back
        dataset.load(resolved, "train")


def test_insisting_on_mnist_is_an_error_without_it(offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dataset", "mnist"]) == 2
    assert "can't be downloaded" in capsys.readouterr().err


def test_an_offline_run_bears_its_name_and_its_notice(offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*TINY, "--minutes", "0.02", "--preview", "0", "--num-images", "4", "--steps", "2", "--timesteps", "10",
             "--device", "cpu"]
    assert main(flags) == 0
    output = capsys.readouterr().out
    assert output.count(NOTICE) >= 2 and "results/generated/sample.png" in output and "no network" in output
    assert ((offline / "checkpoints/generated/last.safetensors").exists()
            and not (offline / "checkpoints/mnist").exists())
    assert main(["--mode", "sample", "--num-images", "4", "--steps", "2", "--device", "cpu"]) == 0  # finds that run
    assert "NOT MNIST" in capsys.readouterr().out


def test_an_offline_run_is_never_continued_with_other_data(offline: Path, idx_folder: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*TINY, "--minutes", "0.02", "--preview", "0", "--num-images", "4", "--steps", "2", "--timesteps", "10",
             "--device", "cpu", "--name", "mine"]
    assert main(flags) == 0
    capsys.readouterr()
    assert main([*flags, "--dataset", "idx", "--data-dir", str(idx_folder)]) == 2
    assert "dataset was generated, now idx" in capsys.readouterr().err


def test_the_weights_that_ship_draw_the_digits_asked_for(own_folder: Path) -> None:
    path = checkpoint.PRETRAINED
    state = checkpoint.load(path)
    assert path.stat().st_size < 10e6 and state["model"] is None and state["optimizer"] is None
    assert sum(weight.numel() for weight in state["ema"].values()) <= 2.3e6 and state["history"]["columns"]
    assert main(["--mode", "sample", "--checkpoint", str(path), "--num-images", "50", "--digits", "0123456789",
                 "--device", "cpu"]) == 0
    drawn = np.load("results/mnist/samples.npz")
    images = torch.from_numpy(drawn["arr_0"]).permute(0, 3, 1, 2)
    _, probabilities = extract(load_extractor(), images)
    likeliest = probabilities.max(1)
    assert (likeliest.indices == torch.from_numpy(drawn["arr_1"])).double().mean() >= 0.94
    assert (likeliest.values > SURE).double().mean() >= 0.88
