"""mode evaluate, end to end on generated digits: the table, its baselines, the files, own data, and what it refuses."""

import contextlib
import io
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import config as configs
from config import SampleConfig, UserError
from dataset import LabelledImages, describe
from evaluation import evaluate
from evaluation.classifier import load_classifier, train_classifier
from evaluation.metrics import nearest, share_closer
from evaluation.reference import Reference, baseline_sets
from run import main
from sample import choose_labels
from support import checkpoint, loading, plots, selection, settings
from tests.conftest import TINY, write_set
from tests.measuring import FEW, load_few, save_network, write_images

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def untrained(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    load_few(monkeypatch)
    save_network(Path("some.safetensors"))
    return ["--mode", "evaluate", "--checkpoint", "some.safetensors", "--num-images", "200", "--steps", "2", "--device",
            "cpu"]


def results() -> Path:
    """The one folder of results."""
    folder, = Path("results").iterdir()
    return folder


def test_the_table_has_its_baselines_and_a_report_is_replaced_by_its_like_alone(untrained: list[str],
                                                                                capsys: Capture) -> None:
    assert main(untrained) == 0
    output = capsys.readouterr().out
    for word in ("sampled", "baseline", "the spread of its 5 sets", "The test set (200 images)", "Copying: ",
                 "of samples lie suspiciously near a training image (1% of test images do).", "Classifier",
                 "Errors need at least 2,000 images",
                 "No class-wise distance: too few images of a class (400 of each are enough)."):
        assert word in output
    heading, *rows = output[output.index("N = 200"):].split("Distances are")[0].splitlines()
    assert max(map(len, (heading, *rows))) <= 80
    assert [re.split("  +", line)[0] for line in rows] == [
        "Fréchet", "texture", "intensity", "precision", "recall", "coverage", "confident", "label accuracy", "zeros"]
    multiples = re.split("  +", rows[0])[1:]
    assert all(re.fullmatch(r"[\d.]+(±[\d.]+)?x", cell) for cell in multiples) and multiples[1].startswith("1.00±")
    assert "trained on other images" not in output and "digits" not in output.lower().replace("generated digits", "")
    found = json.loads((results() / "metrics.json").read_text())
    assert found["images"] == 200 and found["classifier"] == load_classifier().digest
    assert results().name == f"some-{found['sampled_with']['weights'][:8]}"
    model, base = found["metrics"], found["baseline"]
    assert base["frechet"]["value"] < model["frechet"]["value"] and base["recall"]["value"] > model["recall"]["value"]
    assert model["frechet"]["ratio"] == pytest.approx(model["frechet"]["value"] / base["frechet"]["value"])
    assert found["test_set"]["frechet"]["ratio"] < 3
    for name in ("evaluation.png", "neighbours.png"):
        with Image.open(results() / name) as picture:
            assert picture.width > 300 and picture.text["sampler"] == configs.SampleConfig().sampler

    assert main(untrained) == 0
    assert sorted(path.name for path in results().iterdir()) == ["evaluation.png", "metrics.json", "neighbours.png"]
    assert json.loads((results() / "metrics.json").read_text()) == found
    assert main([*untrained, "--seed", "1"]) == 0
    assert "that was there is now in" in capsys.readouterr().out
    assert sorted(path.name for path in (results() / "old1").iterdir()) == sorted(evaluate.REPORT)
    assert json.loads((results() / "old1" / "metrics.json").read_text()) == found
    assert json.loads((results() / "metrics.json").read_text())["sampled_with"]["seed"] == "1"


def test_any_difference_in_where_a_report_came_from_keeps_it(tmp_path: Path) -> None:
    identity = {"sampled_with": {"weights": "a", "steps": "13"}, "images": 200, "compared_with": "b", "classifier": "c"}
    assert evaluate.keep_other_report(tmp_path, identity) is None  # there is none
    others = [{**identity, "images": 10_000}, {**identity, "compared_with": "d"}, {**identity, "classifier": None},
              {**identity, "sampled_with": {"weights": "a", "steps": "5"}}]
    for number, other in enumerate(others, 1):
        (tmp_path / "metrics.json").write_text(json.dumps({**identity, "metrics": {}}))
        (tmp_path / "sample.png").write_bytes(b"of mode sample")
        assert evaluate.keep_other_report(tmp_path, identity) is None
        assert evaluate.keep_other_report(tmp_path, other) == tmp_path / f"old{number}"
        assert [path.name for path in (tmp_path / f"old{number}").iterdir()] == ["metrics.json"]
    assert (tmp_path / "sample.png").exists() and not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("path, folder", [
    (selection.run_path("mine"), "mine"), (selection.PRETRAINED, "pretrained-01234567"),
    ("other/last.safetensors", "other-01234567"),
    ("checkpoints/mine/previous.safetensors", "mine-previous-01234567"), ("mine.safetensors", "mine-01234567")])
def test_the_results_of_each_checkpoint_have_a_folder_of_their_own(path: Path | str, folder: str) -> None:
    assert selection.results_folder(Path(path), "0123456789abcdef") == Path("results") / folder


@pytest.mark.parametrize("encoding", ["ascii", "cp932"])
def test_a_console_that_lacks_letters_ends_no_evaluation(encoding: str, untrained: list[str],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has letters that neither ASCII nor the code page of a Japanese Windows knows."""
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", console)
        patch.setattr("evaluation.metrics.precision_recall_coverage", lambda *_: (0.5, 0.5, 0.5))
        assert main(untrained) == 0
    console.flush()
    said = console.buffer.getvalue()  # type: ignore[attr-defined]
    assert b"Fr?chet" in said and b"evaluation.png" in said


@pytest.mark.parametrize("flags, said", [
    (["--num-images", "199"], "--num-images 199"),
    (["--num-images", "5000"], "use at most 1500"),
    (["--steps", "7"], "--steps 7"),
    (["--checkpoint", "other.safetensors"], "other.safetensors"),
])
def test_what_can_not_be_measured_is_refused(flags: list[str], said: str, untrained: list[str],
                                             capsys: Capture) -> None:
    assert main([*untrained, *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and said in error


@pytest.mark.parametrize("classes, fewest, expected", [
    ([6000] * 10, 200, 10_000), ([900] * 10, 200, 4500), ([0, 300, 250, 0], 200, 240), ([0, 900, 850], 200, 840),
    ([900, 100] + [900] * 8, 200, 500), ([900] * 10, 2000, 4500),
    ([400] * 10, 2000, 2000), ([151] * 3, 200, 210), ([433] * 7, 200, 1470), ([7000] * 3, 200, 10_000)])
def test_unless_told_as_many_images_are_measured_as_the_data_allow(classes: list[int], fewest: int,
                                                                   expected: int) -> None:
    """All that the baseline accepts, up to 10,000."""
    model = Mock(data={"classes": classes}, classes=[k for k, count in enumerate(classes) if count])
    assert evaluate.image_count(SampleConfig(), model, fewest) == expected
    assert evaluate.image_count(SampleConfig(num_images=fewest + 1), model, fewest) == fewest + 1
    with pytest.raises(UserError, match=f"--num-images 9: too few to measure; use at least {fewest:,}"):
        evaluate.image_count(SampleConfig(num_images=9), model, fewest)
    real = torch.arange(len(classes)).repeat_interleave(torch.tensor(classes))
    for count, fits in ((expected, True), (expected + 100, expected == 10_000)):
        labels = choose_labels(None, 0, range(count), model.classes)
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="too few real images"):
            assert len(baseline_sets(real, labels)) >= 2


@pytest.mark.parametrize("classes, fewest, needed", [([200] * 10, 2000, 400), ([30] * 10, 200, 40),
                                                     ([139] * 3, 200, 140), ([399, 500] * 5, 2000, 400)])
def test_data_that_are_too_few_to_measure_are_named(classes: list[int], fewest: int, needed: int) -> None:
    for smallest in (min(classes), needed):
        model = Mock(data={"classes": [max(count, smallest) for count in classes]}, classes=[*range(len(classes))])
        expected = pytest.raises(UserError, match=f"class . has {smallest}, and {needed} are needed")
        with expected if smallest < needed else contextlib.nullcontext():
            assert evaluate.image_count(SampleConfig(), model, fewest) >= fewest


@pytest.mark.parametrize("digits, expected", [("012", 1350), ("1", 450), ("0012", 900), ("9", 15), ("029", 45),
                                              ("none", 100), (None, 100)])
def test_only_the_classes_that_are_sampled_count(digits: str | None, expected: int) -> None:
    """Class 9 is rare; a class that is asked for twice as often needs twice the images."""
    classes = [900] * 9 + [30]
    model, options = Mock(data={"classes": classes}, classes=[*range(10)]), SampleConfig(digits=digits)
    assert evaluate.image_count(options, model, fewest=1) == expected
    real = torch.arange(10).repeat_interleave(torch.tensor(classes))
    labels = choose_labels(None if digits == "none" else digits, 0, range(expected), model.classes)
    assert len(baseline_sets(real, labels)) >= 2
    if expected < 200:
        with pytest.raises(UserError, match="class 9 has 30, and"):
            evaluate.image_count(options, model)


def test_weights_of_another_network_are_refused(untrained: list[str], capsys: Capture) -> None:
    state = checkpoint.load(Path("some.safetensors"))
    state["ema"]["stem.weight"] = torch.zeros(8, 3, 3, 3)  # colour images
    checkpoint.save(Path("some.safetensors"), state)
    assert main(untrained) == 2
    assert "stem.weight" in capsys.readouterr().err


# Other data


def test_own_data_are_measured_against_themselves_by_a_classifier_of_their_own(
        own_folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint knows its data set; a classifier is trained once, named by its images and used for them alone."""
    monkeypatch.setattr("evaluation.classifier.train_classifier", partial(train_classifier, epochs=2))
    monkeypatch.setattr("evaluation.classifier.FEWEST_STEPS", 1)
    folder = write_set(own_folder / "Mes données à moi", 3000, 250)
    data = describe(loading.load_split(settings.parse(["--dataset", "idx", "--data-dir", str(folder)]), "train"), "idx")
    save_network(Path("checkpoints/own/last.safetensors"), data=data)
    command = ["--mode", "evaluate", "--name", "own", "--num-images", "200", "--steps", "2", "--device", "cpu"]
    assert main(command) == 2
    assert "say with --data-dir in which folder" in capsys.readouterr().err  # not MNIST
    command += ["--data-dir", str(folder)]
    digests = []
    for said in ("need a classifier of their own", "Classifier: "):
        assert main(command) == 0
        assert said in capsys.readouterr().out
        found = json.loads(Path("results/own/metrics.json").read_text())
        assert found["compared_with"] == data["digest"]
        digests.append(found["classifier"])
    kept, = Path("checkpoints/classifiers").iterdir()
    own = load_classifier(kept)
    assert digests == [own.digest] * 2 and own.digest != load_classifier().digest and own.meta["accuracy"] > 0.9
    assert data["digest"] in kept.name
    write_set(folder, 3000, 150)  # the same training images
    kept.unlink()
    assert main(command) == 2 and "150 test images" in capsys.readouterr().err
    write_set(folder, 2999, 250)  # others under the same name
    for flags in ([], ["--dataset", "idx"]):
        assert main([*command, *flags]) == 2
        assert f"digest {data['digest']}" in capsys.readouterr().err


def test_images_of_one_class_are_measured_without_a_classifier(untrained: list[str], capsys: Capture) -> None:
    sevens = FEW["train"].images[FEW["train"].labels == 7]
    sevens = torch.cat([sevens.roll(shift, 3) for shift in (-1, 0, 1)])
    write_images(Path("data"), *(LabelledImages(part, torch.full((len(part),), 7)) for part in sevens.split(600)))
    data = ["--dataset", "idx", "--data-dir", "data"]
    assert main([*untrained, *data, "--digits", "7"]) == 0
    output = capsys.readouterr().out
    assert "all of one class" in output and "near a training image" in output and "Classifier" not in output
    assert "note: this checkpoint was trained on other images (generated)" in output
    found = json.loads((results() / "metrics.json").read_text())
    assert found["metrics"].keys() == {"texture", "zeros", "mean_intensity"} and found["classifier"] is None
    save_network(Path("some.safetensors"), data=describe(loading.load_split(settings.parse(data), "train"), "idx"))
    assert main(["--mode", "compare", *data, "--num-images", "2000", "--steps", "2", "--runs", "some.safetensors",
                 "some.safetensors --steps 3"]) == 2
    assert "all images are of one class" in capsys.readouterr().err


@pytest.mark.parametrize("counts", [[1] * 5, [90, 6, 1]], ids=["five images", "unequal shares"])
def test_odd_data_train_and_are_sampled_and_measured_or_told_why_not(counts: list[int], own_folder: Path,
                                                                     capsys: Capture) -> None:
    images = FEW["train"]
    chosen = torch.cat([(images.labels == k).nonzero()[:1].repeat(count, 1) for k, count in enumerate(counts)])[:, 0]
    write_images(Path("odd"), images[chosen], images[chosen])
    common = ["--dataset", "idx", "--data-dir", "odd", "--device", "cpu", "--steps", "2"]
    assert main([*common, *TINY, "--timesteps", "6", "--epochs", "1", "--preview", "4", "--num-images", "150"]) == 0
    labels = np.load("results/idx/samples.npz")["labels"]
    assert np.bincount(labels).tolist() == [150 // len(counts)] * len(counts)  # each class equally often
    capsys.readouterr()
    assert main([*common, "--mode", "evaluate", "--num-images", "200"]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and "too few real images for a baseline" in said


def test_a_rare_class_that_is_not_sampled_is_no_hindrance(own_folder: Path, capsys: Capture,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Class 9 has 30 training images: it is refused, and classes 0, 1 and 2 are measured and compared."""
    monkeypatch.setattr("evaluation.reference.dataset_classifier", lambda *_: load_classifier())
    train = FEW["train"]
    kept = torch.cat([(train.labels == k).nonzero().flatten()[:30 if k == 9 else 300] for k in range(10)])
    write_images(Path("rare"), train[kept], FEW["test"])
    data = ["--dataset", "idx", "--data-dir", "rare", "--device", "cpu", "--steps", "2"]
    stored = describe(loading.load_split(settings.parse(data), "train"), "idx")
    for seed, name in enumerate(("one", "two")):
        save_network(Path(f"checkpoints/{name}/last.safetensors"), seed, data=stored)
    assert main(["--mode", "evaluate", "--name", "one", *data]) == 2
    assert "class 9 has 30, and 40 are needed" in capsys.readouterr().err
    assert main(["--mode", "evaluate", "--name", "one", *data, "--digits", "012"]) == 0
    assert json.loads(Path("results/one/metrics.json").read_text())["images"] == 450
    monkeypatch.setattr("evaluation.statistics.FEWEST_FOR_ERRORS", 300)
    monkeypatch.setattr("evaluation.reference.FEWEST", 100)
    assert main(["--mode", "compare", "--runs", "one", "two", *data, "--digits", "012"]) == 0
    assert "N = 450" in capsys.readouterr().out


# What is said and shown


@pytest.fixture(scope="module")
def four_classes() -> Reference:
    """On four classes, with too few test images of class 3."""
    test = FEW["test"]
    kept = torch.cat([(test.labels == k).nonzero().flatten()[:60 if k == 3 else 100] for k in range(10)])
    return Reference(FEW["train"], test[kept], choose_labels("4301", 0, range(400), range(10)), load_classifier())


def test_copying_is_said(four_classes: Reference) -> None:
    base = four_classes.baseline
    for images, copied in ((four_classes.train.images[base.sets[0]], True),
                           (four_classes.test_subset.images.repeat(2, 1, 1, 1)[:400], False)):
        measured = four_classes.measure(images, base.labels)
        closer = share_closer(*(nearest(each, four_classes.train.images)[0]
                                for each in (images, four_classes.test_subset.images)))
        said = evaluate.explain(measured, four_classes, closer, {})
        assert f"Copying: {closer:.2%} of samples" in said and ("That is far too many." in said) == copied


def test_classes_are_shown_in_order_and_only_those_that_are_there(four_classes: Reference, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """A class with too few test images gets a word, in the text and in its place in the picture."""
    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    base = four_classes.baseline
    measured = four_classes.measure(four_classes.train.images[base.sets[0]], base.labels)
    assert "Too few test images for a class-wise distance of class 3." in evaluate.explain(
        measured, four_classes, 0.0, {})
    assert "class 3 (Dress)." in evaluate.explain(measured, four_classes, 0.0, {"name": "fashion-mnist"})
    shown = evaluate.pictured(measured, four_classes, torch.rand(400), torch.rand(360), {})
    assert [*shown["ratios"]] == ["class-wise Fréchet", "Fréchet", "texture", "0", "1", "3", "4"]
    assert [*shown["test_ratios"]] == ["class-wise Fréchet", "Fréchet", "texture", "0", "1", "4"]
    assert shown["classes"] == sorted(shown["classes"]) and {*"0134"} <= {*shown["classes"]} < {*"0123456789"}
    assert shown["histogram"]["asked"] == [100 if k in "0134" else 0 for k in shown["classes"]]
    plots.save_evaluation(tmp_path / "evaluation.png", shown, {})
    distances, classes, *_ = figures[0].axes
    text, = distances.texts
    assert text.get_text() == "too few test images" and text.get_position()[1] == [*shown["ratios"]].index("3")
    assert [label.get_text() for label in classes.get_xticklabels()] == shown["classes"]


def test_a_distance_that_is_missing_has_its_reason(four_classes: Reference) -> None:
    few = FEW["train"].images[:200], FEW["train"].labels[:200]
    assert "No class-wise distance: too few images of a class" in evaluate.explain(
        four_classes.measure(*few), four_classes, 0.0, {})


def test_neighbours_are_the_nearest_pair_of_each_class(four_classes: Reference, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(plots, "save_neighbours", lambda path, sampled, nearest, distances, metadata: seen.update(
        sampled=sampled, nearest=nearest, distances=distances))
    images, labels = FEW["test"].images[:400], four_classes.baseline.labels
    neighbours = distances, indices = nearest(images, four_classes.train.images)
    evaluate.save_neighbours(tmp_path / "neighbours.png", images, labels, neighbours, four_classes, {})
    assert len(seen["sampled"]) == 4
    for place, k in enumerate((0, 1, 3, 4)):
        own = torch.where(labels == k, distances, torch.inf)
        closest = own.argmin()
        assert seen["distances"][place] == own.min()
        assert torch.equal(seen["sampled"][place], images[closest])
        assert torch.equal(seen["nearest"][place], four_classes.train.images[indices[closest]])
