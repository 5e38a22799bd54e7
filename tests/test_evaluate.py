"""modes evaluate and compare, end to end on generated digits: tables, controls, files, the sweep, what they refuse."""

import csv
import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import config as configs
import dataset
import evaluate
import likelihood
from compare import differences, load_side
from dataset import Digits
from diffusion import make_schedule
from model import UNet
from run import main
from support import checkpoint
from support.extractor import load_extractor
from support.runtime import Runtime
from tests.conftest import TINY, write_idx, write_set
from yardstick import Yardstick

CPU = Runtime(torch.device("cpu"), bf16=False, compile=False)
Capture = pytest.CaptureFixture[str]


def save_network(path: Path, seed: int = 0, flags: tuple[str, ...] = (), **history: Any) -> None:
    """A checkpoint of random weights."""
    config = configs.parse(["--dataset", "generated", "--timesteps", "6", *TINY, *flags])
    torch.manual_seed(seed)
    network = UNet(config.model)
    torch.nn.init.normal_(network.head.weight, std=0.05)
    data = dataset.describe(FEW["train"], "generated")
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, {
        "config": configs.stored(config), "model": None, "ema": network.state_dict(), "optimizer": None, "step": 100,
        "history": {"data": data, "alpha_bar": make_schedule(config.diffusion).alpha_bar, "seconds": 60.0, **history}})


FEW = {split: Digits(digits.images[:3000], digits.labels[:3000])
       for split, digits in ((split, dataset.load_generated(split)) for split in ("train", "test"))}


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the generated digits, and few of them in the bound, for speed."""
    monkeypatch.setattr(likelihood, "BOUND_IMAGES", 200)
    monkeypatch.setattr(likelihood, "CALIBRATION_IMAGES", 100)
    monkeypatch.setattr(dataset, "load_generated", FEW.__getitem__)


@pytest.fixture
def untrained(own_folder: Path, few_digits: None) -> list[str]:
    save_network(own_folder / "some.safetensors")
    return ["--mode", "evaluate", "--dataset", "generated", "--checkpoint", "some.safetensors", "--num-images", "200",
            "--steps", "2", "--device", "cpu"]


def test_the_table_has_its_controls(untrained: list[str], own_folder: Path, capsys: Capture) -> None:
    assert main([*untrained, "--bound"]) == 0
    output = capsys.readouterr().out
    for word in ("model", "times the floor", "real (floor)", "spread of 5 sets",
                 "other writers", "noise", "bits/dim", "upper bound", "Extractor", "Memorisation",
                 "are given below 2,000 images"):
        assert word in output
    assert "trained on other images" not in output
    found = json.loads((own_folder / "results/generated/metrics.json").read_text())
    assert found["images"] == 200 and found["extractor"] == load_extractor().digest
    floor, noise = (found["controls"][name]["values"] for name in ("real (floor)", "noise"))
    assert floor["frechet"] < noise["frechet"] and floor["texture"] < noise["texture"]
    assert floor["recall"] > noise["recall"]
    assert found["over_floor"]["frechet"][0] == pytest.approx(found["model"]["values"]["frechet"] / floor["frechet"])
    bound = found["bound"]
    assert bound["bits_per_dim"] == pytest.approx(bound["L_T"] + bound["L_kl"] + bound["L_0"])
    for name in ("evaluation.png", "neighbours.png"):
        with Image.open(own_folder / "results/generated" / name) as picture:
            assert picture.width > 300 and picture.text["sampler"] == configs.SampleConfig().sampler


def test_the_sweep_has_a_row_for_each_cell(untrained: list[str], own_folder: Path) -> None:
    assert main([*untrained, "--sweep"]) == 0
    rows = list(csv.DictReader((own_folder / "results/generated/sweep.csv").open()))
    samplers = [*evaluate.SAMPLERS]
    assert [(row["sampler"], row["steps"]) for row in rows] == [*((name, "5") for name in samplers), ("ddpm", "6")]
    assert all(float(row["seconds_per_256"]) > 0 and float(row["frechet"]) > 1 for row in rows)
    assert Image.open(own_folder / "results/generated/sweep.png").width > 300


@pytest.mark.parametrize("encoding", ["ascii", "cp932"])
def test_a_console_that_lacks_letters_ends_no_evaluation(encoding: str, untrained: list[str],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has letters that neither ASCII nor the code page of a Japanese Windows knows."""
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", console)
        assert main(untrained) == 0
    console.flush()
    said = console.buffer.getvalue()  # type: ignore[attr-defined]
    assert b"Fr?chet" in said and b"evaluation.png" in said


@pytest.mark.parametrize("flags, said", [
    (["--num-images", "199"], "--num-images 199"),
    (["--num-images", "5000"], "draw at most 1500"),
    (["--steps", "7"], "--steps 7"),
    (["--checkpoint", "other.safetensors"], "other.safetensors"),
])
def test_what_can_not_be_measured_is_refused(flags: list[str], said: str, untrained: list[str],
                                             capsys: Capture) -> None:
    assert main([*untrained, *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and said in error


def test_other_data_have_a_judge_of_their_own(untrained: list[str], own_folder: Path, capsys: Capture,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained once, named by the data, and used for those alone."""
    monkeypatch.setattr("support.extractor.EPOCHS", 2)
    monkeypatch.setattr("support.extractor.FEWEST_STEPS", 1)
    data = write_set(own_folder / "Mes données à moi", 3000, 250)
    command = [*untrained, "--dataset", "idx", "--data-dir", str(data)]
    digests = []
    for said in ("need a judge of their own", "Judge: "):
        assert main(command) == 0
        assert said in capsys.readouterr().out
        digests.append(json.loads((own_folder / "results/idx/metrics.json").read_text())["extractor"])
    kept, = (own_folder / "checkpoints/extractors").iterdir()
    own = load_extractor(kept)
    assert digests == [own.digest] * 2 and own.digest != load_extractor().digest and own.meta["accuracy"] > 0.9
    assert dataset.describe(dataset.load_idx(data, "train"), "")["digest"] in kept.name
    write_set(data, 3000, 150)
    kept.unlink()
    assert main(command) == 2 and "150 test images" in capsys.readouterr().err


def test_images_of_one_class_are_measured_without_a_judge(untrained: list[str], own_folder: Path,
                                                          capsys: Capture) -> None:
    sevens = FEW["train"].images[FEW["train"].labels == 7]
    sevens = torch.cat([sevens.roll(shift, 3) for shift in (-1, 0, 1)])
    (own_folder / "data").mkdir()
    for split, images in (("train", sevens[:600]), ("test", sevens[600:])):
        for name, values in zip(dataset.FILES[split], (images[:, 0].numpy(), np.full(len(images), 7))):
            write_idx(own_folder / "data" / name, values)
    assert main([*untrained, "--dataset", "idx", "--data-dir", "data", "--digits", "7"]) == 0
    output = capsys.readouterr().out
    assert "all of one class" in output and "Memorisation" in output and "Extractor" not in output
    found = json.loads((own_folder / "results/idx/metrics.json").read_text())["model"]["values"]
    assert set(found) == {"texture", "zeros", "ink", "nearest_pixels"}
    assert main([*untrained, "--mode", "compare", "--dataset", "idx", "--data-dir", "data", "--num-images", "2000",
                 "--runs", "some.safetensors", "some.safetensors"]) == 2


@pytest.mark.parametrize("counts", [[1] * 5, [90, 6, 1]], ids=["five images", "unequal shares"])
def test_odd_data_train_and_draw_and_are_measured_or_told_why_not(counts: list[int], own_folder: Path,
                                                                  capsys: Capture) -> None:
    digits = FEW["train"]
    chosen = torch.cat([(digits.labels == k).nonzero()[:1].repeat(count, 1) for k, count in enumerate(counts)])[:, 0]
    (own_folder / "odd").mkdir()
    for names in dataset.FILES.values():
        for name, values in zip(names, (digits.images[chosen, 0].numpy(), digits.labels[chosen].numpy())):
            write_idx(own_folder / "odd" / name, values)
    common = ["--dataset", "idx", "--data-dir", "odd", "--device", "cpu", "--steps", "2"]
    assert main([*common, *TINY, "--timesteps", "6", "--epochs", "1", "--preview", "4", "--num-images", "100"]) == 0
    drawn = np.load(own_folder / "results/idx/samples.npz")["arr_1"]
    wanted = np.array(counts) * 100 / sum(counts)
    assert np.abs(np.bincount(drawn, minlength=len(counts)) - wanted).max() <= 1
    capsys.readouterr()
    assert main([*common, "--mode", "evaluate", "--num-images", "200"]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and "too few real images for a floor" in said


def test_weights_of_another_network_are_refused(untrained: list[str], own_folder: Path, capsys: Capture) -> None:
    state = checkpoint.load(own_folder / "some.safetensors")
    state["ema"]["stem.weight"] = torch.zeros(8, 3, 3, 3)  # colour images
    checkpoint.save(own_folder / "some.safetensors", state)
    assert main(untrained) == 2
    assert "stem.weight" in capsys.readouterr().err


def test_copying_is_said(few_digits: None) -> None:
    train = dataset.load_generated("train")
    yardstick = Yardstick(train, dataset.load_generated("test"), torch.arange(200) % 10, load_extractor())
    copies = yardstick.measure(train.images[yardstick.sets[0]], yardstick.labels)
    assert "COPIES" in evaluate.explain(copies, yardstick, "mnist")
    new = yardstick.measure(dataset.load_generated("test").images[:200], yardstick.labels)
    assert "no sign of copying" in evaluate.explain(new, yardstick, "mnist")


# Compare


@pytest.fixture
def two(own_folder: Path, few_digits: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags that compare a run with another, which is its twin but for its weights, its rate and its code."""
    for module in ("yardstick", "compare"):
        monkeypatch.setattr(f"{module}.FEWEST_BLOCKS", 10)
    monkeypatch.setattr("yardstick.FEWEST_DRAWN", 80)
    save_network(Path("checkpoints/one/last.safetensors"), code={"model.py": "a", "train.py": "b"})
    save_network(Path("checkpoints/two/last.safetensors"), 1, ("--lr", "0.1"), code={"model.py": "c", "train.py": "b"},
                 seconds=120.0)
    return ["--mode", "compare", "--dataset", "generated", "--num-images", "1000", "--steps", "2", "--device", "cpu"]


def test_a_comparison_end_to_end(two: list[str], own_folder: Path, capsys: Capture) -> None:
    assert main([*two, "--runs", "one", "two"]) == 0
    output = capsys.readouterr().out
    for said in ("lr was 0.002, now 0.1", "Code in which they differ: model.py.", "b has 2.00 times a's",
                 "in class (decides)", "95% interval", "about these two networks", "compare.png"):
        assert said in output, said
    assert "they did not see as many images" not in output
    found = json.loads(Path("results/generated/compare.json").read_text())
    assert [side["name"] for side in found["sides"]] == ["one", "two"]
    verdict = found["verdicts"]["within"]
    assert verdict["interval"][0] < verdict["b"] - verdict["a"] < verdict["interval"][1]
    assert verdict["verdict"] in ("better", "worse", "no difference shown")
    assert Image.open("results/generated/compare.png").width > 500


@pytest.mark.parametrize("runs, said", [
    (["one", "three"], "there is no checkpoints/three/last.safetensors"),
    (["one", "old.pt"], "there is no old.pt"),
    (["one", "two --seed 3"], "only how it is drawn"),
    (["one", "two --num-images 300"], "only how it is drawn"),
    (["one", "two --steps 7"], "--steps 7"),
    (["one", "two --stepps 7"], "--stepps"),
    (["one", "pretrained"], "were trained on other images"),
    (["one", "two,two"], "the same weights twice"),
    (["one", "it's"], "quotes don't match"),
    (["one", ""], "there is no"),
])
def test_what_does_not_compare_is_refused(runs: list[str], said: str, two: list[str], capsys: Capture) -> None:
    assert main([*two, "--runs", *runs]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and said in error, error


def test_comparing_takes_two_sides_and_enough_images(two: list[str], capsys: Capture) -> None:
    assert main(two) == 2 and "add --runs A B" in capsys.readouterr().err
    assert main([*two, "--runs", "one", "two", "--digits", "none", "--guidance", "1"]) == 2
    assert "draws without labels" in capsys.readouterr().err
    assert main([*two, "--runs", "one", "two", "--num-images", "999"]) == 2
    assert "at least 1,000" in capsys.readouterr().err


def test_a_side_has_its_own_way_of_drawing_or_several_runs(two: list[str]) -> None:
    config = configs.parse(two)
    plain, own = (load_side(text, config, 2000, CPU) for text in ("one", "one --guidance 1.4 --sampler ddim --eta 0.5"))
    expected = dataclasses.replace(config.sample, guidance_interval=(3, 4))  # of 6 noise levels
    assert plain.orders[0].options == expected and own.orders[0].options.guidance == 1.4
    assert torch.equal(plain.orders[0].labels, own.orders[0].labels)
    said = " ".join(differences(plain, own))
    assert "guidance is" in said and "sampler is sa, and ddim" in said and "Code" not in said
    save_network(Path("checkpoints/three/last.safetensors"), 2)
    several = load_side("one,two,checkpoints/three/last.safetensors", config, 2000, CPU)
    assert [trained.step for trained in several.trained] == [100] * 3
    assert "3 trainings" in differences(plain, several)[1]
