"""mode experiment: did an idea help? Trains the recipe of the flags and each change of it, several times, and compares.

Each training is a run in checkpoints/experiment/ that is named after its settings, code and images. So the same command
resumes an interrupted experiment, and experiments share the trainings that they have in common.
"""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from operator import methodcaller
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from config import Config, UserError
from dataset import LabelledImages, describe
from evaluation.compare import (
    Side,
    make_side,
    measure_side,
    report,
    results_folder,
    sample_side,
    settings_differences,
    side_request,
)
from evaluation.differences import Difference
from evaluation.reference import DECIDING, Reference, make_reference
from evaluation.tables import aligned
from support import checkpoint, code, loading, plots, selection, settings
from support.files import make_folder, write_atomically, write_results
from support.runtime import Runtime
from training.log import current_model
from training.loop import run_training
from training.optimizer import progress
from training.state import Diverged, new_state

BUSY = 0.9  # of the rate of the fastest training of a side; below, the machine was busy with something else


class Training(NamedTuple):
    """One training of one recipe, of which there may be a part already."""

    recipe: int  # 0: the baseline; k: the k-th change
    config: Config  # with its seed and its name
    done: float  # the part that is done before the experiment starts, 0 to 1


def main(config: Config, runtime: Runtime) -> int:
    """Trains what is missing and compares each change with the baseline; returns 128 + n after stop signal n."""
    if not config.change:
        raise UserError('--mode experiment: say what to change, such as --change "--schedule linear"')
    config = selection.settle(config, runtime)
    data = loading.load_both(config, runtime)
    recipes = [config, *(changed(flags, config) for flags in config.change)]
    for recipe in recipes:  # what would fail after hours of training fails now
        side_request(current_model(new_state(recipe, runtime, *data)), recipe)
    plan = make_plan(recipes, runtime, *data)
    finished = sum(training.done >= 1 for training in plan)
    runtime.say(f"{len(recipes)} recipes, {config.trainings} trainings of each: {len(plan)} trainings, of which "
                f"{finished} are finished already{time_left(plan, [])}.")
    paths: list[list[Path]] = [[] for _ in recipes]
    seconds: list[float] = []  # that each training took
    for number, training in enumerate(plan):
        name, path = "abcdefghijklmnopqrstuvwxyz"[training.recipe % 26], selection.run_path(str(training.config.name))
        if training.done < 1:
            left = time_left(plan[number:], seconds)
            runtime.say(f"Training {number + 1} of {len(plan)}: {name}, seed {training.config.seed}{left}.")
            state = new_state(training.config, runtime, *data)
            try:
                if signal_number := run_training(state):
                    runtime.say("Stopped. Run the same command again to resume the experiment.")
                    return 128 + signal_number
            except Diverged as error:
                runtime.say(f"  This training failed: {error}.")
                continue
            seconds.append(state.history["seconds"])
            runtime.say(f"  {state.step * training.config.train.batch_size:,} images in {seconds[-1] / 60:.1f} "
                        f"minutes, test loss {state.history['columns']['test_loss'][-1]:.4f}")
        paths[training.recipe].append(path)
    compare(recipes, paths, runtime, *data)
    return 0


def changed(flags: str, config: Config) -> Config:
    """The config with the flags of a change; raises UserError for any but flags of a recipe, and for no change."""
    try:
        words = shlex.split(flags)
        recipe = settings.parse([*words, "--mode", "experiment"], config)
    except (UserError, ValueError) as error:  # ValueError: a quote that does not end
        raise UserError(f"--change '{flags}': {error}") from None
    if refused := [name for name in settings.given(words) if settings.KNOBS[name] not in ("model", "diffusion", "train")]:
        raise UserError(f"--change '{flags}': {', '.join(refused)} is no part of a recipe; a change takes flags of the "
                        "model, the diffusion and the training")
    if settings.stored(recipe) == settings.stored(config):
        raise UserError(f"--change '{flags}': the recipe has these values without it; change something")
    return recipe


def make_plan(recipes: Sequence[Config], runtime: Runtime, train: LabelledImages,
              test: LabelledImages) -> list[Training]:
    """All trainings: with each seed all recipes, in turns forwards and backwards, so that a busy hour hits all alike."""
    digest, plan = describe(train, "")["digest"], []
    for turn in range(recipes[0].trainings):
        order = range(len(recipes)) if turn % 2 == 0 else reversed(range(len(recipes)))
        for number in order:
            config = replace(recipes[number], seed=recipes[number].seed + turn,
                             precision=new_precision(recipes[number], runtime),
                             train=replace(recipes[number].train, preview=0))
            config = replace(config, name=run_name(config, digest))
            plan.append(Training(number, config, runtime.on_rank0(lambda config=config: part_done(config, len(train)))))
    return plan


def new_precision(config: Config, runtime: Runtime) -> str:
    return runtime.on_rank0(lambda: runtime.training_precision(config.precision))


def run_name(config: Config, data: str) -> str:
    """experiment/CHANGES-DIGEST-sSEED: other settings, other code or images with another digest have another name."""
    recipe = {name: value for name, value in settings.stored(config).items() if name != "seed"}
    identity = json.dumps([recipe, code.IMPORTED, data], sort_keys=True)
    default = replace(Config(), dataset=config.dataset, seed=config.seed, precision=config.precision)
    changes = [f"{name}-{value}" for name, _, value in
               settings.differences(settings.stored(default), settings.stored(config))]
    words = re.sub(r"[^\w.]+", "-", "-".join(changes))[:40].strip("-.") or "default"
    return f"experiment/{words}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}-s{config.seed}"


def part_done(config: Config, images: int) -> float:
    """The part of a training that is done, 0 to 1; raises UserError for a damaged checkpoint."""
    path = selection.run_path(str(config.name))
    if not os.path.isfile(path):
        return 0.0
    state = checkpoint.load(path)
    return progress(config.train, images, state["step"], state["history"]["seconds"])


def time_left(plan: Sequence[Training], seconds: Sequence[float]) -> str:
    """A part of a sentence: how long these trainings take, if that is known; seconds: of trainings so far."""
    lengths = [60 * training.config.train.minutes if training.config.train.minutes is not None else
               fmean(seconds) if seconds else None for training in plan]
    if not (left := sum(training.done < 1 for training in plan)):
        return ""
    if None in lengths:
        return f"; how long {'one takes' if left > 1 else 'it takes'} is known after the first"
    minutes = sum((length or 0) * (1 - training.done) for length, training in zip(lengths, plan)) / 60
    return f"; about {minutes:.0f} minutes of training are left, then images are sampled and measured"


def compare(recipes: Sequence[Config], paths: Sequence[Sequence[Path]], runtime: Runtime, train: LabelledImages,
            test: LabelledImages) -> None:
    """Compares the trainings of each change with those of the baseline; too few of a side are a result as well."""
    names = ["baseline", *recipes[0].change]
    for name, side_paths in zip(names, paths):
        if len(side_paths) < recipes[0].trainings:
            runtime.say(f"{name}: {recipes[0].trainings - len(side_paths)} of {recipes[0].trainings} trainings failed.")
    if len(paths[0]) < 2:
        raise UserError("the baseline: fewer than two of its trainings came to an end, so nothing can be compared; "
                        "use a lower --lr, or --precision fp32")
    sides = [make_side(name, side_paths, recipes[0], runtime) for name, side_paths in zip(names, paths)
             if len(side_paths) > 1]
    for name, side_paths in zip(names, paths):
        if len(side_paths) < 2:
            runtime.say(f"{name}: fewer than two trainings came to an end, so it is not compared.")
    references: list[Reference] = []  # the first process has one
    runtime.on_rank0(lambda: references.append(make_reference(recipes[0], train, test, sides[0].requests[0].labels)))
    images = [sample_side(side) for side in sides]

    def measure() -> list[Path]:
        measured = [measure_side(side, side_images, references[0]) for side, side_images in zip(sides, images)]
        written, deciding = [], list[Difference]()
        for side, side_images, estimates in zip(sides[1:], images[1:], measured[1:]):
            print("\n".join(["", *settings_differences(sides[0], side), *fairness(sides[0], side)]))
            differences, files = report([sides[0], side], [measured[0], estimates], references[0].baseline,
                                        [images[0][0], side_images[0]])
            deciding += [difference for difference in differences if difference.metric.key == DECIDING]
            written += files
        return written + (summarize(sides, deciding) if len(sides) > 2 else [])

    for path in runtime.on_rank0(measure):
        runtime.say(f"  {path}")


def fairness(a: Side, b: Side) -> list[str]:
    """Whether equal minutes were equal work: the images that each side saw, and trainings that a busy machine slowed."""
    images = [[model.step * model.settings["train"]["batch_size"] for model in side.models] for side in (a, b)]
    rates = [[seen / model.history["seconds"] for seen, model in zip(counts, side.models)]
             for counts, side in zip(images, (a, b))]
    if any(model.settings["train"]["minutes"] is None for side in (a, b) for model in side.models):
        return []
    seen_a, seen_b = map(fmean, images)
    lines = [f"In these minutes a saw {seen_a:,.0f} images and b {seen_b:,.0f}, {seen_b / seen_a:.2f} times as many."]
    for letter, side_rates in zip("ab", rates):
        if min(side_rates) < BUSY * max(side_rates):
            lines.append(f"WARNING: one training of {letter} saw {1 - min(side_rates) / max(side_rates):.0%} fewer "
                         "images a second than another, so the machine was busy: --epochs gives all as many images.")
    return lines


def summarize(sides: Sequence[Side], deciding: Sequence[Difference]) -> list[Path]:
    """Prints and writes the deciding metric of all changes: experiment.json and experiment.png."""
    lines = [["Class-wise distance", "change", "95% interval"]]
    rows = []
    for side, difference in zip(sides[1:], deciding):
        low, high = map(difference.show, (difference.low, difference.high))
        lines.append([side.name, difference.show(difference.change),
                      f"{low} to {high}{'*' if difference.significant else ' '}"])
        rows.append((side.name, difference.change, difference.low, difference.high))
    print(f"\n{aligned(lines)}\n* the interval excludes 0")
    content = {name: {"change": change, "interval": [low, high]} for name, change, low, high in rows}
    folder = make_folder(results_folder(sides, len(sides[0].requests[0].labels)))
    return write_results(folder, {
        "experiment.json": lambda path: write_atomically(
            path, methodcaller("write", json.dumps(content, indent=1).encode())),
        "experiment.png": lambda path: plots.save_intervals(path, rows, {"baseline": sides[0].models[0].digest})})
