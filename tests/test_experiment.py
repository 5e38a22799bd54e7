"""mode experiment: what it trains, what it reuses, and what it says."""

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import training.loop
from config import Config
from dataset import LabelledImages
from evaluation import experiment
from evaluation.compare import Side
from evaluation.experiment import Training, changed, fairness, make_plan, minutes_left, run_name
from run import main
from support import code, settings
from support.runtime import Runtime
from tests.conftest import TINY
from tests.measuring import FEW, load_few
from tests.processes import start, start_ranks
from training.loop import train
from training.state import Diverged

CPU = Runtime(torch.device("cpu"), bf16=False, compile=False)
RUNS = Path("checkpoints/experiment")
EXPERIMENT = ["--mode", "experiment", "--dataset", "generated", "--device", "cpu", "--precision", "fp32", *TINY,
              "--timesteps", "20", "--steps", "2", "--num-images", "1000", "--trainings", "2"]
ADAMW = ["--change", "--optimizer adamw"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def flags(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of an experiment of a few steps on few images."""
    load_few(monkeypatch)
    monkeypatch.setattr("evaluation.reference.FEWEST_BLOCKS", 10)
    monkeypatch.setattr("evaluation.statistics.FEWEST_FOR_ERRORS", 1000)
    monkeypatch.setattr("support.plots.save_losses", lambda *_, **__: None)
    monkeypatch.setattr("training.log.TEST_IMAGES", 20)
    return [*EXPERIMENT, "--batch-size", "512", "--epochs", "1"]


def config_of(*flags: str) -> Config:
    return replace(settings.parse([*EXPERIMENT, *flags]), precision="fp32")


def few(_config: Config, split: str) -> LabelledImages:
    return FEW[split]


def no_comparison(sides: list[Side], *_: Any, **__: Any) -> list[Any]:
    """In place of minutes of sampling and measuring."""
    print("compared:", *(f"{side.name} ({len(side.models)})" for side in sides))
    return []


def test_an_experiment_end_to_end(flags: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "compare", no_comparison)
        assert main([*flags, *ADAMW]) == 0
    output = capsys.readouterr().out
    assert "2 recipes, 2 trainings of each; the first training shows" in output
    order = re.findall(r"Training \d of 4: (.*), seed (\d)", output)
    assert order == [("unchanged", "0"), ("--optimizer adamw", "0"), ("--optimizer adamw", "1"),
                     ("unchanged", "1")]
    assert "compared: unchanged (2) --optimizer adamw (2)" in output and len(list(RUNS.iterdir())) == 4

    assert main([*flags, "--change", "--optimizer adamw", "--focus 0"]) == 0  # it reuses four trainings of six
    output = capsys.readouterr().out
    assert "4 of 6 are finished" in output and len(list(RUNS.iterdir())) == 6
    assert re.findall(r"Training \d of 2: (.*), seed (\d)", output) == [("--focus 0", "0"), ("--focus 0", "1")]
    assert "optimizer muon / adamw" in output and "focus 0.7 / 0.0" in output and "Guidance" not in output
    assert output.count("Class-wise distance, which decides") == 2
    assert sorted(path.name for path in Path("results/compare").glob("*/*.json")) == [
        "compare.json", "compare.json", "experiment.json"]
    summary = json.loads(next(Path("results/compare").glob("*/experiment.json")).read_text())
    assert summary.keys() == {"--optimizer adamw", "--focus 0"}
    table = output.split("class-wise distance  change")[1].splitlines()
    for line, (name, values) in zip(table[1:], summary.items()):
        assert line.startswith(name) and f"{100 * values['change']:+.1f}%"[:4] in line


def test_an_interrupted_experiment_goes_on_where_it_stopped(own_folder: Path) -> None:
    flags = [*EXPERIMENT, "--batch-size", "64", "--epochs", "1", *ADAMW]
    quick = {"support.loading.load_split": few, "training.log.TEST_IMAGES": 20,
             "evaluation.statistics.FEWEST_FOR_ERRORS": 1000, "evaluation.experiment.compare": no_comparison}
    program = start(own_folder, *flags, changes=quick)
    program.wait_for(lambda: re.search("Training 2 of 4.*\n.*epoch", program.output))
    program.signal(signal.SIGINT)
    output = program.finish(128 + signal.SIGINT)
    assert "Stopped. Run the same command again to resume the experiment." in output
    output = start(own_folder, *flags, changes=quick).finish()
    assert "1 of 4 are finished" in output and "compared: unchanged (2) --optimizer adamw (2)" in output
    assert len(list((own_folder / RUNS).iterdir())) == 4


def test_two_processes_make_one_experiment(own_folder: Path) -> None:
    first, second = start_ranks(own_folder, 2, *EXPERIMENT, "--batch-size", "512", "--epochs", "1", *ADAMW, changes={
        "support.loading.load_split": few, "training.log.TEST_IMAGES": 20,
        "evaluation.statistics.FEWEST_FOR_ERRORS": 1000, "evaluation.reference.FEWEST_BLOCKS": 10})
    assert "Class-wise distance, which decides" in first.finish()
    assert not second.finish()


@pytest.mark.parametrize("change, said", [
    ([], 'say what to change, such as --change "--schedule linear"'),
    (["--change"], "--change"),
    (["--change", "--sheddule linear"], "--change '--sheddule linear': Unrecognized options: --sheddule"),
    (["--change", "--schedule"], "--change '--schedule'"),
    (["--change", "schedule linear"], "--change 'schedule linear': Unrecognized options"),
    (["--change", f"--lr {Config().train.lr}"], "': the unchanged recipe has these values already"),
    (["--change", "--focus 0", "--focus 0.0"], "--change '--focus 0.0': --focus 0 has these values already"),
    (["--change", "--lr '2"], "--change '--lr '2': No closing quotation"),
    (["--change", "--steps 5"], "--change '--steps 5': steps is no part of a recipe"),
    (["--change", "--seed 5"], "--change '--seed 5': seed is no part of a recipe"),
    (["--change", "--fresh"], "--fresh: --mode experiment does not use it"),
    (["--change", "--focus 0", "--no-clip-loss"], "--no-clip-loss: write --change before it if it is a change"),
    (["--change", "--label-dropout 1"], "samples without labels"),
    (["--change", "--channels 9 9 9"], "--change '--channels 9 9 9': --channels 9 9 9: GroupNorm"),
    (["--change", "--focus 0", "--trainings", "1"], "--trainings 1"),
    (["--change", "--focus 0", "--name", "x"], "--name: --mode experiment does not use it"),
    (["--change", "--focus 0", "--preview", "9"], "--preview: --mode experiment does not use it"),
    (["--change", "--focus 0", "--num-images", "100"], "--num-images 100: too few to measure"),
    (["--change", "--focus 0", "--digits", "none"], "samples without labels")])
def test_what_is_no_experiment_is_refused_before_anything_is_trained(change: list[str], said: str, flags: list[str],
                                                                     capsys: Capture) -> None:
    assert main([*flags, *change]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not os.listdir()


@pytest.mark.parametrize("words, changes", [
    (["--change", "--schedule linear", "--minutes", "5"], ("--schedule linear",)),
    (["--change", "--focus 0", "--focus 0.35", "--lr", "1e-3"], ("--focus 0", "--focus 0.35")),
    (["--change=--focus 0", "--change=--lr 1e-3"], ("--focus 0", "--lr 1e-3")),
    (["--no-clip-loss", "--change", "--no-deterministic", "--focus 0"], ("--no-deterministic", "--focus 0"))])
def test_changes_are_told_from_flags_for_all(words: list[str], changes: tuple[str, ...]) -> None:
    config = config_of(*words)
    assert config.change == changes
    assert config.train.clip_loss == ("--no-clip-loss" not in words) and config.train.deterministic


def test_guidance_is_off_unless_it_is_asked_for() -> None:
    assert config_of(*ADAMW).sample.guidance == 1
    asked = config_of(*ADAMW, "--guidance", "1.7")
    assert asked.sample.guidance == changed("--optimizer adamw", asked).sample.guidance == 1.7


def test_a_name_follows_from_settings_code_and_images(monkeypatch: pytest.MonkeyPatch) -> None:
    config, default = config_of(*ADAMW), config_of(*ADAMW, "--channels", "16", "32", "64", "--blocks", "1", "2", "2",
                                                   "--embedding", "128", "--timesteps", "1000")
    assert re.fullmatch("experiment/default-[0-9a-f]{8}-s0", run_name(default, "data"))
    names = [run_name(config, "data"), run_name(config, "others"), *(run_name(
        replace(config, **change), "data") for change in (
            {"seed": 1}, {"precision": "bf16"}, {"train": replace(config.train, minutes=5.0)},
            {"train": replace(config.train, focus=0.0)}))]
    monkeypatch.setattr(code, "IMPORTED", code.IMPORTED | {"model.py": "0" * 16})
    names.append(run_name(config, "data"))
    assert len(set(names)) == len(names)
    assert run_name(replace(config, device="cuda", sample=replace(config.sample, steps=5)), "data") == names[-1]


def test_the_sides_take_turns(own_folder: Path) -> None:
    config = config_of("--trainings", "4", "--seed", "7", *ADAMW)
    recipes = {"unchanged": config, "b": changed("--optimizer adamw", config)}
    plan = make_plan(recipes, CPU, {"unchanged": "data", "b": "data"}, len(FEW["train"]))
    assert "".join(training.recipe[-1] for training in plan) == "dbbddbbd"  # the end of "unchanged", and b
    assert [training.config.seed for training in plan] == [7, 7, 8, 8, 9, 9, 10, 10]
    assert len({training.config.name for training in plan}) == 8 and {training.done for training in plan} == {0.0}


def test_the_time_that_is_left() -> None:
    timed, counted = (replace(config_of(*ADAMW), train=replace(Config().train, minutes=minutes))
                      for minutes in (5, None))
    plan = [Training("unchanged", timed, 0.0), Training("b", timed, 0.4)]
    assert "about 8 minutes" in minutes_left(plan, [])
    plan = [Training("unchanged", counted, 0.0)] * 3
    assert "the first training shows" in minutes_left(plan, []) and "about 6 minutes" in minutes_left(plan, [60, 180])
    assert minutes_left([], [60]) == ""


def test_a_training_that_fails_is_a_result(flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def fails(state: Any) -> int:
        if state.config.train.optimizer == "adamw" or (state.config.train.focus, state.config.seed) == (0, 1):
            raise Diverged("the loss was not finite")
        return train(state)

    monkeypatch.setattr(training.loop, "train", fails)
    monkeypatch.setattr(experiment, "compare", no_comparison)
    assert main([*flags, "--trainings", "3", "--change", "--optimizer adamw", "--focus 0"]) == 0
    output = capsys.readouterr().out
    assert output.count("It failed: the loss was not finite.") == 4
    assert "--optimizer adamw: 3 of 3 trainings failed, so it is not compared." in output
    assert "--focus 0: 1 of 3 trainings failed.\n" in output
    assert "compared: unchanged (3) --focus 0 (2)\n" in output
    assert main([*flags, *ADAMW]) == 2
    assert "error: nothing is left to compare" in capsys.readouterr().err


@pytest.mark.parametrize("rates, busy", [((1000, 950), False), ((1000, 850), True)])
def test_equal_time_on_a_busy_machine_is_said(rates: tuple[int, int], busy: bool) -> None:
    def side(minutes: float | None, *rates: float) -> Side:
        return Side("x", [SimpleNamespace(images_seen=60 * rate, history={"seconds": 60.0},  # type: ignore[list-item]
                                          settings={"train": {"minutes": minutes}}) for rate in rates], [])

    lines = fairness(side(1.0, 500, 500), side(1.0, *rates))
    assert lines[0].startswith("In equal time a saw 30,000 images, and b 5") and "times as many" in lines[0]
    assert len(lines) == 1 + busy and all("a training of b saw 15% fewer" in line for line in lines[1:])
    assert fairness(side(None, 500, 500), side(None, *rates)) == []
    assert experiment.BUSY == 0.9


def test_minutes_that_differ_are_no_equal_time_and_are_named_as_a_difference() -> None:
    def side(minutes: float) -> Side:
        return Side("x", [SimpleNamespace(images_seen=600, history={"seconds": 60.0},  # type: ignore[list-item]
                                          settings={"train": {"minutes": minutes}})], [])

    assert fairness(side(1.0), side(2.0)) == [] and len(fairness(side(1.0), side(1.0))) == 1
    config = config_of("--minutes", "1", *ADAMW)
    longer = settings.stored(changed("--minutes 2", config))
    assert settings.differences(settings.stored(config), longer, settings.NO_RECIPE) == [("minutes", "1.0", "2.0")]
    assert not settings.differences(settings.stored(config), longer)  # a run may go on for longer
