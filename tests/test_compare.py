"""mode compare: its sides, differences and intervals, what it says, the files it writes, and what it refuses."""

import dataclasses
import json
import math
import re
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from config import TrainConfig
from evaluation import compare
from evaluation.compare import (
    Side,
    conclusion,
    load_side,
    results_folder,
    settings_differences,
)
from evaluation.differences import Difference, compare_networks, compare_trainings
from evaluation.reference import METRICS, OVERLAP, Baseline, Estimate, Estimates
from evaluation.statistics import detectable, jackknife_error, student_quantile, two_sample
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
    for said in (f"lr {TrainConfig().lr} / 0.1", "Code in which they differ: model.py.", "b has 2.00 times a's",
                 "95% interval", "Class-wise distance, which decides", "about these two networks", "four times in five",
                 "all else is best where the baseline is", "*: the interval excludes 0"):
        assert said in output, said
    assert "they did not see as many images" not in output
    assert output.count("note: the images are still static: the network has seen 6,400,") == 2  # as mode sample says
    assert bars == ["sampling one", "sampling two"]
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
    assert "The baseline has" not in output
    more = [*two, "--num-images", "1600", "--runs", "one", "one --sampler ddim"]
    assert main(more) == 2  # two sets of 150 of each class leave 150 outside each
    assert "too few images of a class for the class-wise distance" in capsys.readouterr().err
    monkeypatch.setattr("evaluation.reference.FEWEST", 100)
    assert main(more) == 0
    output = capsys.readouterr().out
    assert "Both sides are the same network" in output and "N = 1,600" in output
    assert "The baseline has 1,500 images" in output
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
    assert f"guidance {config.sample.guidance} / 1.4" in said and "sampler sa / ddim" in said and "Code" not in said
    everywhere = settings.parse([*two, "--guidance-interval", "0", "1"])
    guided, unguided = (load_side(f"one --guidance {guidance}", everywhere, CPU).requests[0] for guidance in (3, 1))
    assert guided.interval == (0, 1) and guided.guidance == 3 and unguided.guidance == 1
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
    assert others[4].name.startswith("one-vs-two-steps-3-")
    assert len(set(others)) == len(others) and {path.parent for path in others} == {Path("results/compare")}
    assert results_folder(sides("one", "two"), 1000) == others[0]
    save_network(Path("checkpoints/two/last.safetensors"), 2)  # the name is the same, the weights are not
    assert results_folder(sides("one", "two"), 1000) not in others
    save_network(Path("né, 数" + 60 * "x" + ".safetensors"), 3)
    strange = results_folder(sides("one", "né, 数" + 60 * "x" + ".safetensors --steps 3"), 1000)
    assert len(strange.name) < 100 and not set(strange.name) & set(' ,:*?"<>|\\/')
    many = [side._replace(name=f"--lr 0.{i:040}") for i, side in enumerate(sides("one", "two") * 10)]
    assert len(results_folder(many, 1000).name) < 100


# Differences


def row(blocks: int = 20, **values: float) -> Estimates:
    """Measurements whose replicates, where there are any, scatter in a fixed way, by 0.01 each."""
    noise = torch.linspace(-1, 1, blocks, dtype=torch.float64) * 0.01
    return {key: Estimate(value, 0.01, None if key in OVERLAP else value + noise) for key, value in values.items()}


def scattered(seed: int, size: float, **values: float) -> Estimates:
    noise = torch.randn(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
    return {key: dataclasses.replace(estimate, replicates=estimate.replicates + noise)
            for key, estimate in row(**values).items()}


BASELINE = Baseline(torch.zeros(2000), [torch.zeros(0)] * 5, [], row(**{metric.key: 0.9 for metric in METRICS}), {})


def difference(a: list[Estimates], b: list[Estimates]) -> Difference:
    single, = compare_networks(a[0], b[0], BASELINE) if len(a) == len(b) == 1 else compare_trainings(a, b)
    return single


def test_one_network_a_side_is_paired_block_by_block() -> None:
    a = row(class_frechet=0.30)
    same = difference([a], [a])
    assert (same.change, same.low, same.high) == (0, 0, 0)
    b = scattered(1, 1e-4, class_frechet=0.29)  # each without its block moves with the other, so little noise is left
    found = difference([a], [b])
    error = jackknife_error(b["class_frechet"].replicates - a["class_frechet"].replicates)
    assert found.change == pytest.approx(0.29 / 0.30 - 1) and found.significant
    assert (found.high - found.low) / 2 == pytest.approx(student_quantile(19) * error / 0.30)
    assert (found.high + found.low) / 2 == pytest.approx(found.change)
    flipped = {key: dataclasses.replace(one, replicates=one.replicates.flip(0)) for key, one in b.items()}
    assert not difference([a], [flipped]).significant


def test_changes_of_distances_are_relative_and_of_shares_absolute() -> None:
    keys = ("class_frechet", "confident", "precision")
    a, b = (row(**dict(zip(keys, values))) for values in ((0.2, 0.90, 0.93), (0.3, 0.95, 0.91)))
    found = {each.metric.key: each for each in compare_networks(a, b, BASELINE)}
    changes = {key: each.change for key, each in found.items()}
    assert changes == pytest.approx({"class_frechet": 0.5, "confident": 0.05, "precision": -0.02})
    assert found["class_frechet"].show(0.5) == "+50%" and found["confident"].show(0.05) == "+5.00"
    assert found["class_frechet"].show(-0.0934) == "-9.3%" and found["class_frechet"].show(12.5) == "+1,250%"
    half = student_quantile(4) * math.sqrt(2) * 0.01  # of precision there are no replicates, only the baseline's spread
    assert (found["precision"].high - found["precision"].low) / 2 == pytest.approx(half)


def test_several_trainings_a_side_are_compared_by_the_spread_between_them() -> None:
    a, b = ([row(class_frechet=value) for value in values] for values in ((0.30, 0.33, 0.31, 0.36), (0.20, 0.26, 0.22)))
    found = difference(a, b)
    logs = [np.log([training["class_frechet"].value for training in side]) for side in (a, b)]
    change, error, dof = two_sample(*logs)
    half = student_quantile(dof) * error
    assert found.a.value == pytest.approx(math.exp(fmean(logs[0])))
    assert found.change == pytest.approx(found.b.value / found.a.value - 1)
    assert [found.low, found.high] == pytest.approx([math.expm1(change - half), math.expm1(change + half)])
    absolute = difference([row(confident=0.9), row(confident=0.92)], [row(confident=0.95)])
    assert absolute.change == pytest.approx(absolute.b.value - absolute.a.value)


# What it says


def test_the_table_marks_what_differs_and_fits_a_terminal() -> None:
    """Distances are multiples of the baseline at the same number of images, and plain numbers at another."""
    keys = [metric.key for metric in METRICS]
    a = row(**{key: 12.3 if "frechet" in key else 0.5 for key in keys})
    b = row(**{key: 3.4 if "frechet" in key else 0.5 for key in keys})
    differences = compare_networks(a, b, BASELINE)
    heading, deciding, *others = compare.table(differences, BASELINE, 2000).splitlines()
    assert max(map(len, (heading, deciding, *others))) <= 80 and len(others) == 9
    assert re.split("  +", deciding) == ["class-wise Fréchet", "13.7±0.1x", "3.78±0.02x", "-72%", "-72% to -72%*", "1x"]
    assert not any("*" in line for line in others[1:]) and "percentage points" not in heading
    static = row(**{key: 66_000.0 if "frechet" in key else 0.5 for key in keys})
    lines = compare.table(compare_networks(static, static, BASELINE), BASELINE, 2000).splitlines()
    assert max(map(len, lines)) <= 80 and re.split("  +", lines[1])[1:3] == [">999x", ">999x"]
    heading, deciding, *_ = compare.table(differences, BASELINE, 60_000).splitlines()
    assert heading.endswith("baseline (2,000)") and max(map(len, (heading, deciding))) <= 80
    assert re.split("  +", deciding)[1:3] == ["12.3000", "3.4000"] and deciding.endswith("  0.9000")


def says(two: list[str], a: str, b: str, values: tuple[list[float], list[float]]) -> str:
    config = settings.parse(two)
    sides = [load_side(text, config, CPU) for text in (a, b)]
    measured = [[scattered(i, 1e-4, class_frechet=value) for i, value in enumerate(side)] for side in values]
    return conclusion(sides, [difference(*measured)], 2000)


def test_the_conclusion_says_the_significance_the_rule_and_what_it_is_about(two: list[str]) -> None:
    said = says(two, "one", "two", ([0.3], [0.2]))
    assert "-33%" in said and "b is significantly closer to the training images" in said
    assert "A true difference of" in said and "Train three a side" in said
    assert "b is significantly further" in says(two, "one", "two", ([0.2], [0.3]))
    assert "no significant difference" in says(two, "one", "two", ([0.2], [0.2]))
    for word in ("better", "worse"):
        assert word not in said


def test_several_trainings_are_told_which_change_they_would_find(two: list[str]) -> None:
    save_network(Path("checkpoints/three/last.safetensors"), 2)
    save_network(Path("checkpoints/four/last.safetensors"), 3)
    values = ([0.30, 0.33], [0.29, 0.31])
    said = says(two, "one,two", "three,four", values)
    _, error, dof = two_sample(*map(np.log, values))
    change = math.expm1(detectable(error, dof))
    assert "no significant difference" in said
    assert f"A true difference of {change:.0%} would be found four times in five, a smaller one more rarely." in said
    assert "Trainings of one side differ by 6% (standard deviation)." in said and "more trainings narrow" in said
    assert re.search("About [1-9]% of this variance comes from sampling 2,000 images", said), said
    noisy = [[scattered(10 * side + i, 0.02, class_frechet=value) for i, value in enumerate(values[side])]
             for side in (0, 1)]
    said = conclusion([load_side(text, settings.parse(two), CPU) for text in ("one,two", "three,four")],
                      [difference(*noisy)], 2000)
    assert "more images (--num-images) narrow the interval more than more trainings" in said


def test_bars_say_which_training_of_a_side_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[str] = []
    monkeypatch.setattr(compare, "sample_images", lambda model, request, progress: (
        bars.append(progress), [torch.zeros(1, 1, 28, 28)])[1])
    compare.sample_side(compare.Side("mine", [cast(Any, None)] * 2, [cast(Any, None)] * 2), "b")
    assert bars == ["sampling b (1 of 2)", "sampling b (2 of 2)"]


def test_the_picture_shows_the_pairs_that_differ_most(two: list[str], monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("support.plots.save_comparison", lambda path, pairs, names, intervals, metadata: seen.update(
        pairs=pairs, names=names, intervals=intervals))
    config = settings.parse(two)
    sides = [load_side(text, config, CPU) for text in ("one", "two")]
    images = torch.zeros(2, 50, 1, 28, 28, dtype=torch.uint8)
    images[1, 20:] = torch.arange(30, dtype=torch.uint8)[:, None, None, None]
    measured = [[row(class_frechet=0.2)], [row(class_frechet=0.3)]]
    _, written = compare.report(sides, measured, BASELINE, [*images])
    said = capsys.readouterr().out
    assert "Lower distances are closer; all else is best where the baseline is.\n" in said
    assert "The other metrics' intervals are each wrong one time in twenty.\n" in said
    compare.report(sides, measured, BASELINE, [*images], legend=False)
    assert said.startswith(capsys.readouterr().out), "less by what an experiment says once, under its last table"
    assert [path.name for path in written] == ["compare.json", "compare.png"]
    assert np.asarray(seen["pairs"][1])[:, 0, 0, 0].tolist() == [*range(29, 17, -1)]
    assert seen["names"] == ("one", "two") and seen["intervals"][0][:2] == ("class-wise Fréchet", True)
