"""mode compare: its sides, differences and intervals, what it says, the files it writes, and what it refuses."""

import dataclasses
import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import compare
from evaluation.compare import (
    Difference,
    Side,
    conclusion,
    differences,
    load_side,
    results_folder,
    settings_differences,
)
from evaluation.reference import METRICS, OVERLAP, Baseline, Measurement
from evaluation.statistics import between_trainings, jackknife_error, student_quantile
from run import main
from support import settings
from support.console import progress_bar
from support.runtime import Runtime
from tests.measuring import load_few, save_network

CPU = Runtime(torch.device("cpu"), bf16=False, compile=False)
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def two(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags that compare a run with another, which is its twin but for its weights, its rate and its code."""
    load_few(monkeypatch)
    monkeypatch.setattr("evaluation.reference.FEWEST_BLOCKS", 10)
    monkeypatch.setattr("evaluation.statistics.FEWEST_FOR_ERRORS", 1000)
    save_network(Path("checkpoints/one/last.safetensors"), code={"model.py": "a", "train.py": "b"})
    save_network(Path("checkpoints/two/last.safetensors"), 1, ("--lr", "0.1"), code={"model.py": "c", "train.py": "b"},
                 seconds=120.0)
    return ["--mode", "compare", "--num-images", "1000", "--steps", "2", "--device", "cpu"]


def test_a_comparison_end_to_end(two: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    bars: list[str] = []
    monkeypatch.setattr("sample.progress_bar", lambda shown, desc, **options: (
        bars.append(desc), progress_bar(shown, desc=desc, **options))[1])
    assert main([*two, "--runs", "one", "two"]) == 0
    output = capsys.readouterr().out
    for said in ("lr 0.002 / 0.1", "Code in which they differ: model.py.", "b has 2.00 times a's", "95% interval",
                 "class-wise (decides)", "about these two networks", "all else is best where the baseline is"):
        assert said in output, said
    assert "they did not see as many images" not in output
    assert output.count("note: the images are still static: the network has seen 6,400,") == 2  # as mode sample says
    assert bars == ["sampling a: one", "sampling b: two"]
    assert output.index("Measuring the real images") < output.index("note: the images")
    folder, = Path("results/compare").iterdir()
    assert folder.name.startswith("one-vs-two-")
    found = json.loads((folder / "compare.json").read_text())
    assert [side["name"] for side in found["sides"]] == ["one", "two"]
    deciding = found["differences"]["class_frechet"]
    assert deciding["interval"][0] < deciding["change"] < deciding["interval"][1]
    assert deciding["change"] == pytest.approx(deciding["b"] / deciding["a"] - 1)
    assert Image.open(folder / "compare.png").width > 500

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main([*two, "--runs", "one", "one --sampler ddim"]) == 0
    assert "Both sides are the same network" in capsys.readouterr().out
    assert len([*Path("results/compare").iterdir()]) == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("runs, said", [
    (["one", "three"], "Runs in checkpoints/: one, two"),
    (["one", "old.pt"], "old.pt: there is no such checkpoint"),
    (["one", "two --seed 3"], "only how it is sampled"),
    (["one", "two --num-images 300"], "only how it is sampled"),
    (["one", "two --steps 7"], "--steps 7"),
    (["one", "two --stepps 7"], "--stepps"),
    (["one", "two --lr 7"], "--mode compare does not use it"),
    (["one", "pretrained"], "were trained on different images"),
    (["one", "two,two"], "the same weights twice"),
    (["one", "it's"], "it's: there is no such checkpoint"),
    (["one", ""], "there is no such checkpoint"),
    (["one", "checkpoints\\two\\last.safetensors"], "checkpoints\\two\\last.safetensors: there is no such"),
    (["one", "two\nand --more"], "--more"),
])
def test_what_does_not_compare_is_refused(runs: list[str], said: str, two: list[str], capsys: Capture) -> None:
    assert main([*two, "--runs", *runs]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and said in error, error


def test_comparing_takes_two_sides_enough_images_and_labels(two: list[str], capsys: Capture) -> None:
    assert main(two) == 2 and "add --runs A B" in capsys.readouterr().err
    assert main([*two, "--runs", "one", "two", "--digits", "none", "--guidance", "1"]) == 2
    assert "samples without labels" in capsys.readouterr().err
    assert main([*two, "--runs", "one", "two", "--num-images", "999"]) == 2
    assert "at least 1,000" in capsys.readouterr().err


# Sides


def test_a_side_has_its_own_way_of_sampling_or_several_runs(two: list[str]) -> None:
    config = settings.parse(two)
    plain, own = (load_side(text, config, CPU) for text in (
        "one", "one --guidance 1.4 --sampler ddim --eta 0.5 --guidance-interval 0.2 0.9"))
    assert plain.requests[0].options == config.sample and own.requests[0].options.guidance == 1.4
    assert own.requests[0].options.guidance_interval == (0.2, 0.9)
    assert torch.equal(plain.requests[0].labels, own.requests[0].labels)
    said = " ".join(settings_differences(plain, own))
    assert "guidance 2.1 / 1.4" in said and "sampler sa / ddim" in said and "Code" not in said
    save_network(Path("checkpoints/three/last.safetensors"), 2)
    several = load_side("one, two,checkpoints/three/last.safetensors", config, CPU)
    assert [model.step for model in several.models] == [100] * 3
    assert "3 trainings" in settings_differences(plain, several)[1]


@pytest.mark.parametrize("name", ["checkpoints\\mine\\last.safetensors", "a file, of mine.safetensors",
                                  "it's the \"best\".safetensors", "folder of mine/last.safetensors"])
@pytest.mark.parametrize("flags", ["", " --steps 3"])
def test_a_side_is_named_as_its_file_is(name: str, flags: str, two: list[str]) -> None:
    """A backslash is no escape, as on Windows; spaces, commas and quotes are part of a name that is there."""
    save_network(Path(name), 3)
    side = load_side(name + flags, settings.parse(two), CPU)
    assert [model.path for model in side.models] == [Path(name)]
    assert side.requests[0].options.steps == (3 if flags else 2)


def test_the_folder_follows_from_the_two_sides(two: list[str]) -> None:
    """Another pair, order, seed, number of images or way to sample has another; the same has the same."""
    config = settings.parse(two)

    def sides(a: str, b: str, seed: int = 0) -> list[Side]:
        return [load_side(text, dataclasses.replace(config, seed=seed), CPU) for text in (a, b)]

    others = [results_folder(sides("one", "two"), 1000), results_folder(sides("two", "one"), 1000),
              results_folder(sides("one", "two"), 2000), results_folder(sides("one", "two", 1), 1000),
              results_folder(sides("one", "two --steps 3"), 1000), results_folder(sides("one,two", "two"), 1000),
              results_folder(sides("one", "./checkpoints/two/last.safetensors"), 1000)]
    assert len(set(others)) == len(others) and {path.parent for path in others} == {Path("results/compare")}
    assert results_folder(sides("one", "two"), 1000) == others[0]
    save_network(Path("checkpoints/two/last.safetensors"), 2)  # the name is the same, the weights are not
    assert results_folder(sides("one", "two"), 1000) not in others
    save_network(Path("né, 数" + 60 * "x" + ".safetensors"), 3)
    strange = results_folder(sides("one", "né, 数" + 60 * "x" + ".safetensors --steps 3"), 1000)
    assert len(strange.name) < 100 and not set(strange.name) & set(' ,:*?"<>|\\/')


# Differences


def row(blocks: int = 20, **values: float) -> dict[str, Measurement]:
    """Measurements whose replicates, where there are any, scatter in a fixed way, by 0.01 each."""
    noise = torch.linspace(-1, 1, blocks, dtype=torch.float64) * 0.01
    return {key: Measurement(value, 0.01, None if key in OVERLAP else value + noise) for key, value in values.items()}


def scattered(seed: int, size: float, **values: float) -> dict[str, Measurement]:
    noise = torch.randn(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
    return {key: dataclasses.replace(one, replicates=one.replicates + noise) for key, one in row(**values).items()}


BASELINE = Baseline(torch.zeros(2000), [torch.zeros(0)] * 5, [], row(**{metric.key: 0.9 for metric in METRICS}), {})


def difference(a: list[dict[str, Measurement]], b: list[dict[str, Measurement]]) -> Difference:
    found, = differences(a, b, BASELINE)
    return found


def is_significant(each: Difference) -> bool:
    return not each.low <= 0 <= each.high


def test_one_network_a_side_is_paired_block_by_block() -> None:
    a = row(class_frechet=0.30)
    same = difference([a], [a])
    assert (same.change, same.low, same.high) == (0, 0, 0)
    b = scattered(1, 1e-4, class_frechet=0.29)  # each without its block moves with the other, so little noise is left
    found = difference([a], [b])
    error = jackknife_error(b["class_frechet"].replicates - a["class_frechet"].replicates)
    assert found.change == pytest.approx(0.29 / 0.30 - 1) and is_significant(found)
    assert (found.high - found.low) / 2 == pytest.approx(student_quantile(19) * error / 0.30)
    assert (found.high + found.low) / 2 == pytest.approx(found.change)
    flipped = {key: dataclasses.replace(one, replicates=one.replicates.flip(0)) for key, one in b.items()}
    assert not is_significant(difference([a], [flipped]))


def test_changes_of_distances_are_relative_and_of_shares_absolute() -> None:
    keys = ("class_frechet", "confident", "precision")
    a, b = (row(**dict(zip(keys, values))) for values in ((0.2, 0.90, 0.93), (0.3, 0.95, 0.91)))
    found = {each.metric.key: each for each in differences([a], [b], BASELINE)}
    changes = {key: each.change for key, each in found.items()}
    assert changes == pytest.approx({"class_frechet": 0.5, "confident": 0.05, "precision": -0.02})
    assert found["class_frechet"].show(0.5) == "+50.0%" and found["confident"].show(0.05) == "+5.00 pt"
    half = student_quantile(4) * math.sqrt(2) * 0.01  # of precision there are no replicates, only the baseline's spread
    assert (found["precision"].high - found["precision"].low) / 2 == pytest.approx(half)


def test_several_trainings_a_side_are_compared_by_the_spread_between_them() -> None:
    a, b = ([row(class_frechet=value) for value in values] for values in ((0.30, 0.33, 0.31, 0.36), (0.20, 0.26, 0.22)))
    found = difference(a, b)
    logs = [[math.log(one["class_frechet"].value) for one in side] for side in (a, b)]
    error, freedom = between_trainings(logs, "class_frechet")
    half, change = student_quantile(freedom) * error, fmean(logs[1]) - fmean(logs[0])
    assert found.a == pytest.approx(math.exp(fmean(logs[0]))) and found.change == pytest.approx(found.b / found.a - 1)
    assert [found.low, found.high] == pytest.approx([math.expm1(change - half), math.expm1(change + half)])
    absolute = difference([row(confident=0.9), row(confident=0.92)], [row(confident=0.95)])
    assert absolute.change == pytest.approx(absolute.b - absolute.a)


# What it says


def says(two: list[str], a: str, b: str, values: tuple[list[float], list[float]]) -> str:
    config = settings.parse(two)
    sides = [load_side(text, config, CPU) for text in (a, b)]
    measured = [[scattered(i, 1e-4, class_frechet=value) for i, value in enumerate(side)] for side in values]
    return conclusion(sides, differences(*measured, BASELINE))


def test_the_conclusion_says_the_verdict_the_rule_and_what_it_is_about(two: list[str]) -> None:
    said = says(two, "one", "two", ([0.3], [0.2]))
    assert "-33.3%" in said and "b is significantly closer to the training images" in said
    assert "Lower distances are closer; all else is best where the baseline is." in said
    assert "One in twenty" in said and "Train three a side" in said
    assert "b is significantly further" in says(two, "one", "two", ([0.2], [0.3]))
    assert "no significant difference" in says(two, "one", "two", ([0.2], [0.2]))
    for word in ("better", "worse"):
        assert word not in said


def test_several_trainings_are_told_which_change_they_would_find(two: list[str]) -> None:
    save_network(Path("checkpoints/three/last.safetensors"), 2)
    save_network(Path("checkpoints/four/last.safetensors"), 3)
    values = ([0.30, 0.33], [0.29, 0.31])
    said = says(two, "one,two", "three,four", values)
    error, freedom = between_trainings([[*map(math.log, side)] for side in values], "class_frechet")
    found = math.expm1((student_quantile(freedom) + student_quantile(freedom, 0.6)) * error)
    assert "no significant difference" in said and "9 degrees of freedom" in said
    assert f"Four of five such comparisons find a true difference of {found:.0%}." in said


def test_the_picture_shows_the_pairs_that_differ_most(two: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("support.plots.save_comparison", lambda path, pairs, names, intervals, metadata: seen.update(
        pairs=pairs, names=names, intervals=intervals))
    config = settings.parse(two)
    sides = [load_side(text, config, CPU) for text in ("one", "two")]
    images = torch.zeros(2, 50, 1, 28, 28, dtype=torch.uint8)
    images[1, 20:] = torch.arange(30, dtype=torch.uint8)[:, None, None, None]
    measured = [[row(class_frechet=0.2)], [row(class_frechet=0.3)]]
    written = compare.report(sides, measured, BASELINE, [*images])
    assert [path.name for path in written] == ["compare.json", "compare.png"]
    assert np.asarray(seen["pairs"][1])[:, 0, 0, 0].tolist() == [*range(29, 17, -1)]
    assert seen["names"] == ("one", "two") and seen["intervals"][0][:2] == ("class-wise", True)
