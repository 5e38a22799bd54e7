"""The offline default: generated digits that ship, verified, under their own name, with a notice no one can miss."""

import contextlib
import gzip
import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import dataset
from config import Config, UserError
from evaluation import evaluate
from evaluation.classifier import CONFIDENT, extract, load_classifier
from run import main
from support import checkpoint, idx, loading, selection, settings
from support.loading import NOTICE
from support.runtime import Runtime
from tests.conftest import TINY

CPU = Runtime(torch.device("cpu"), bf16=False, compile=False)
QUICK = ["--steps", "2", "--device", "cpu"]
RUN = ["--mode", "train", *TINY, *QUICK, "--minutes", "0.01", "--preview", "0", "--num-images", "4",
       "--timesteps", "10"]


def no_download(source: idx.Source, folder: Path) -> None:
    raise UserError(f"{source.kind} is not in {folder} and can't be downloaded (no network)")


@pytest.fixture
def offline(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(idx, "download", no_download)
    return own_folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of an offline run, and what the run said."""
    folder, output = tmp_path_factory.mktemp("offline"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(idx, "download", no_download)
        patch.chdir(folder)
        assert main(RUN) == 0
    return folder, output.getvalue()


@pytest.fixture
def own_run(trained: tuple[Path, str], offline: Path) -> Path:
    """A folder with nothing but that run's checkpoint."""
    shutil.copytree(trained[0] / "checkpoints", offline / "checkpoints")
    return offline


def generated(split: str) -> dataset.LabelledImages:
    return loading.load_split(Config(dataset="generated"), split)


def test_generated_digits_are_whole_and_balanced() -> None:
    train, test = generated("train"), generated("test")
    assert len(train) == 9000 and len(test) == 1000
    assert torch.bincount(train.labels).tolist() == [900] * 10 and torch.bincount(test.labels).tolist() == [100] * 10
    assert 0.09 < train.images.float().mean() / 255 < 0.17  # MNIST: 0.1307
    assert set(idx.GENERATED_MD5) == set(idx.MNIST_MD5)
    assert sum(path.stat().st_size for path in loading.GENERATED.iterdir()) < 3e6


def test_a_changed_generated_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in loading.GENERATED.glob("*.gz"):
        content = bytearray(gzip.decompress(path.read_bytes()))
        if "t10k-images" in path.name:
            content[5000] ^= 1
        (tmp_path / path.name).write_bytes(gzip.compress(bytes(content), 1))
    monkeypatch.setattr(loading, "GENERATED", tmp_path)
    generated("train")
    with pytest.raises(UserError, match="t10k-images"):
        generated("test")


def test_auto_prefers_mnist_that_is_there(own_folder: Path) -> None:
    raw = own_folder / "dataset/mnist/MNIST/raw"
    raw.mkdir(parents=True)
    for name in idx.MNIST_MD5:
        (raw / name).write_bytes(b"")
    settled = selection.settle(settings.parse(["--mode", "train"]), CPU)
    assert settled.dataset == "mnist" and settled.name == "mnist"
    with pytest.raises(UserError, match="damaged"):  # damaged is not absent: no silent fall back
        loading.load_split(settled, "train")


def test_insisting_on_mnist_is_an_error_without_it(offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--mode", "train", "--dataset", "mnist"]) == 2
    assert "can't be downloaded" in capsys.readouterr().err


def test_an_offline_run_bears_its_name_and_its_notice(trained: tuple[Path, str]) -> None:
    folder, output = trained
    assert output.count(NOTICE) >= 2 and "results/generated/sample.png" in output and "no network" in output
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["generated"]


@pytest.mark.parametrize("flags", [[], ["--name", "generated"], ["--dataset", "generated"]])
def test_every_mode_finds_an_offline_run(flags: list[str], own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it is the only run: by the same rule, and before any data set is looked for."""
    config = settings.parse(["--mode", "evaluate", *flags])
    settled = selection.settle(config, CPU)
    assert settled.sample.checkpoint == selection.run_path("generated") and settled.dataset == "generated"
    assert selection.settle(replace(config, mode="sample"), CPU).sample.checkpoint == settled.sample.checkpoint
    assert "run of your own" not in capsys.readouterr().out


def test_an_offline_run_is_sampled_and_measured(own_run: Path, capsys: pytest.CaptureFixture[str],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    digest = checkpoint.weights_digest(checkpoint.load(selection.run_path("generated"))["ema"])

    def enough(_config: Config, train: dataset.LabelledImages, *_: object) -> None:
        raise UserError(f"{len(train)} images")  # what comes next takes long, and is the same for all runs

    monkeypatch.setattr(evaluate, "make_reference", enough)
    for flags, status in ((["sample", "--num-images", "4"], 0), (["evaluate", "--num-images", "200"], 2)):
        assert main(["--mode", *flags, *QUICK]) == status
        output, errors = capsys.readouterr()
        assert "NOT MNIST" in output and f"weights {digest}" in output and "checkpoints/generated/last" in output
    assert errors == "error: 9000 images\n"  # those that it was trained on
    assert [path.name for path in Path("results").iterdir()] == ["generated"]


def test_a_run_with_a_name_is_found_by_it_and_remembers_its_data(own_run: Path) -> None:
    selection.run_path("generated").parent.rename("checkpoints/mine")
    for mode in ("train", "evaluate"):
        settled = selection.settle(settings.parse(["--mode", mode, "--name", "mine"]), CPU)
        assert (settled.name, settled.dataset) == ("mine", "generated")
    assert selection.settle(settings.parse(["--mode", "sample"]), CPU).sample.checkpoint == selection.PRETRAINED


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_a_folder_that_was_asked_for_is_never_passed_over(mode: str, own_run: Path, idx_folder: Path) -> None:
    """Not even where the run of that name is one of generated digits."""
    config = settings.parse(["--mode", mode, "--name", "generated", "--data-dir", str(idx_folder)])
    with pytest.raises(UserError, match="MNIST is not in .*can't be downloaded"):
        selection.settle(config, CPU)


def test_a_damaged_run_can_be_started_over(own_run: Path) -> None:
    selection.run_path("generated").write_bytes(b"junk")
    command = ["--mode", "train", "--name", "generated"]
    with pytest.raises(UserError, match="damaged"):
        selection.settle(settings.parse(command), CPU)
    assert selection.settle(settings.parse([*command, "--fresh"]), CPU).dataset == "generated"


def test_an_offline_run_is_never_continued_with_other_data(own_run: Path, idx_folder: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--name", "generated", "--dataset", "idx", "--data-dir", str(idx_folder)]) == 2
    assert "dataset was generated, now idx" in capsys.readouterr().err


def test_the_shipped_weights_sample_the_digits_asked_for(own_folder: Path) -> None:
    path = selection.PRETRAINED
    state = checkpoint.load(path)
    assert path.stat().st_size < 10e6 and state["model"] is None and state["optimizer"] is None
    assert sum(weight.numel() for weight in state["ema"].values()) <= 2.3e6 and state["history"]["columns"]
    assert main(["--mode", "sample", "--checkpoint", str(path), "--num-images", "50", "--digits", "0123456789",
                 "--device", "cpu"]) == 0
    sampled = np.load(next(own_folder.glob("results/pretrained-*/samples.npz")))
    images = torch.from_numpy(sampled["images"])[:, None]
    _, probabilities = extract(load_classifier(), images)
    likeliest = probabilities.max(1)
    assert (likeliest.indices == torch.from_numpy(sampled["labels"])).double().mean() >= 0.94
    assert (likeliest.values > CONFIDENT).double().mean() >= 0.88
