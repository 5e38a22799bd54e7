"""mode evaluate, end to end on a small IDX set: the table, its controls, the files, the sweep, and what it refuses."""

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import config as configs
import evaluate
from dataset import load_idx
from model import UNet
from run import main
from support import checkpoint, metrics
from tests.conftest import TINY, write_set


@pytest.fixture
def untrained(own_folder: Path) -> list[str]:
    """Flags for a checkpoint of random weights beside 400 training and 250 test images."""
    write_set(own_folder / "data", 400, 250)
    config = configs.parse(["--dataset", "idx", "--timesteps", "6", *TINY])
    torch.manual_seed(0)
    network = UNet(config.model)
    torch.nn.init.normal_(network.head.weight, std=0.05)
    state = {"config": configs.to_dict(config), "model": None, "ema": network.state_dict(), "optimizer": None, "step": 1,
             "history": {"data": {"name": "idx", "mean": 0.1, "std": 0.3}}}
    checkpoint.save(own_folder / "some.pt", state)
    return ["--mode", "evaluate", "--dataset", "idx", "--data-dir", "data", "--checkpoint", "some.pt", "--num-images", "200", "--steps", "2", "--device", "cpu"]


def test_the_table_has_its_controls(untrained: list[str], own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*untrained, "--seeds", "2"]) == 0
    output = capsys.readouterr().out
    for word in ("model", "spread", "ratio to floor", "real (floor)", "noise", "bits/dim", "upper bound", "Extractor", "Memorisation"):
        assert word in output
    found = json.loads((own_folder / "results/idx/metrics.json").read_text())
    assert found["images"] == 200 and len(found["seeds"]) == 2 and found["extractor"] == metrics.load_extractor().digest
    floor, noise = found["controls"]["floor"], found["controls"]["noise"]
    assert floor["frechet"] < noise["frechet"] and floor["texture"] < noise["texture"] and floor["coverage"] > noise["coverage"]
    assert found["ratio_to_floor"]["frechet"] == pytest.approx(found["mean"]["frechet"] / floor["frechet"])
    values = [row["frechet"] for row in found["seeds"]]
    assert values[0] != values[1] and found["mean"]["frechet"] == pytest.approx(sum(values) / 2)
    assert found["spread"]["frechet"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    bound = found["bound"]
    assert bound["bits_per_dim"] == pytest.approx(bound["L_T"] + bound["L_kl"] + bound["L_0"])
    for name in ("evaluation.png", "neighbours.png"):
        with Image.open(own_folder / "results/idx" / name) as picture:
            assert picture.width > 300 and picture.text["sampler"] == configs.SampleConfig().sampler


def test_the_sweep_has_a_row_for_each_cell(untrained: list[str], own_folder: Path) -> None:
    assert main([*untrained, "--sweep"]) == 0
    rows = list(csv.DictReader((own_folder / "results/idx/sweep.csv").open()))
    assert [(row["sampler"], row["steps"]) for row in rows] == [("ddpm", "5"), ("ddim", "5"), ("dpmpp", "5"), ("dpmpp-sde", "5"), ("unipc", "5"),
                                                              ("ddpm", "6")]
    assert all(float(row["seconds_per_256"]) > 0 and float(row["frechet_over_floor"]) > 1 for row in rows)
    assert Image.open(own_folder / "results/idx/sweep.png").width > 300


def test_real_images_measure_as_the_floor(idx_folder: Path) -> None:
    """The floor row is nothing but the measures of training images."""
    train, test = load_idx(idx_folder, "train"), load_idx(idx_folder, "test")
    reference = evaluate.make_reference(metrics.load_extractor(), train, test)
    itself = evaluate.measure(test.images, reference, test.labels)
    assert itself["frechet"] == pytest.approx(0, abs=1e-6) and itself["texture"] == pytest.approx(0, abs=1e-6)
    assert itself["precision"] == itself["recall"] == itself["coverage"] == 1
    copied = evaluate.measure(train.images, reference)
    assert copied["nearest_pixels"] == 0 and copied["nearest_features"] == pytest.approx(0, abs=1e-5)  # a copier is seen
    assert "asked" not in copied


def test_asking_for_some_digits_only(idx_folder: Path) -> None:
    train, test = load_idx(idx_folder, "train"), load_idx(idx_folder, "test")
    reference = evaluate.make_reference(metrics.load_extractor(), train, test)
    row = evaluate.measure(test.images, reference, torch.full((len(test),), 7), quick=True)
    assert 0 <= row["asked"] <= 1 and row["chi_square"] >= 0


@pytest.mark.parametrize("flags, said", [
    (["--num-images", "199"], "--num-images 199"),
    (["--steps", "7"], "--steps 7"),
    (["--data-dir", "nowhere"], "nowhere"),
    (["--checkpoint", "other.pt"], "other.pt"),
])
def test_what_can_not_be_measured_is_refused(flags: list[str], said: str, untrained: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*untrained, *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and said in error


def test_too_few_real_images(untrained: list[str], own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_set(own_folder / "data", 400, 100)
    assert main(untrained) == 2
    assert "too few" in capsys.readouterr().err


def test_weights_of_another_network_are_refused(untrained: list[str], own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = checkpoint.load(own_folder / "some.pt")
    state["ema"]["stem.weight"] = torch.zeros(8, 3, 3, 3)  # colour images
    checkpoint.save(own_folder / "some.pt", state)
    assert main(untrained) == 2
    assert "stem.weight" in capsys.readouterr().err
