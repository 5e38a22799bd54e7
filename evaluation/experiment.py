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
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from config import Config, UserError
from evaluation.compare import Side, compare, make_side, measuring_request, results_folder, settings_differences
from evaluation.differences import Difference
from evaluation.tables import aligned
from support import checkpoint, code, loading, plots, selection, settings
from support.console import say
from support.files import make_folder, write_json, write_results
from support.runtime import Runtime
from training.log import current_model
from training.loop import run_training
from training.optimizer import progress
from training.state import Diverged, new_state

UNCHANGED = "unchanged"  # the recipe of the flags outside --change
BUSY = 0.9  # of the images a second of the fastest training of a side; below, something else took the machine's time


class Training(NamedTuple):
    """One training of an experiment."""

    recipe: str  # "unchanged", or the flags of a change
    config: Config  # with its seed and its name
    done: float  # the part that is done as the experiment starts, 0 to 1


def main(config: Config, runtime: Runtime) -> int:
    """Trains what is missing, compares each change with the unchanged recipe, and returns 128 + n after signal n."""
    if not config.change:
        raise UserError('--mode experiment: say what to change, such as --change "--schedule linear"')
    code.note_edits(runtime.say)
    config = selection.settle(config, runtime)
    config = replace(config, precision=runtime.precision,
                     train=replace(config.train, preview=0, fresh=False, same_code=False))
    recipes = {UNCHANGED: config}
    for flags in config.change:
        recipe = changed(flags, config)
        if same := [name for name in recipes if settings.stored(recipes[name]) == settings.stored(recipe)]:
            recipe_name = "the unchanged recipe" if same[0] == UNCHANGED else same[0]
            raise UserError(f"--change '{flags}': {recipe_name} has these values already; change something")
        recipes[flags] = recipe
    data = loading.load_both(config, runtime)
    starts = {}
    for name, recipe in recipes.items():  # what would fail after hours of training fails now
        state = new_state(recipe, runtime, *data)
        measuring_request(name, current_model(state), recipe)
        speed = [runtime.device.type, runtime.world, runtime.compile] if recipe.train.minutes else None
        starts[name] = json.dumps([state.history["data"]["digest"], state.history.get("init"), speed])
    plan = make_plan(recipes, runtime, starts, len(data[0]))
    missing = [training for training in plan if training.done < 1]
    finished = f"; {len(plan) - len(missing)} of {len(plan)} are finished" if len(missing) < len(plan) else ""
    runtime.say(f"{len(recipes)} recipes, {config.trainings} trainings of each{finished}{minutes_left(missing, [])}.")
    failed, seconds = set[str](), list[float]()  # names of trainings, seconds of trainings
    for number, training in enumerate(missing):
        runtime.say(f"Training {number + 1} of {len(missing)}: {training.recipe}, seed {training.config.seed}"
                    f"{minutes_left(missing[number:], seconds)}.")
        state = new_state(training.config, runtime, *data)
        try:
            if signal_number := run_training(state, training.config.precision, quiet=True):
                runtime.say("Stopped. Run the same command again to resume the experiment.")
                return 128 + signal_number
            seconds.append(state.history["seconds"])
            runtime.say(f"  {current_model(state).images_seen:,} images in {seconds[-1] / 60:.1f} minutes, test loss "
                        f"{state.history['columns']['test_loss'][-1]:.4f}")
        except Diverged as error:
            failed.add(str(training.config.name))
            runtime.say(f"  It failed: {error}.")
    sides = load_sides([training for training in plan if training.config.name not in failed], recipes, runtime)
    if len(sides) < 2:
        raise UserError("nothing is left to compare: that takes two finished trainings of the unchanged recipe and of "
                        "a change; try a lower --lr, or --precision fp32")
    deciding = compare(sides, config, runtime, *data, introduction=lambda a, b: [
        "", *settings_differences(a, b), *fairness(a, b)])
    for path in runtime.on_rank0(lambda: summarize(sides, deciding) if len(deciding) > 1 else []):
        runtime.say(f"  {path}")
    return 0


def changed(flags: str, config: Config) -> Config:
    """The config with the flags of a change; raises UserError for any but flags of a recipe."""
    try:
        words = shlex.split(flags, posix=os.name == "posix")  # Windows' paths have backslashes
        recipe = settings.parse([*words, "--mode", "experiment"], config)
    except (UserError, ValueError) as error:  # ValueError: a quote that does not end
        raise UserError(f"--change '{flags}': {error}") from None
    groups = {name: settings.KNOBS[name] for name in settings.given(words)}
    if refused := [name for name, group in groups.items() if group not in ("model", "diffusion", "train")]:
        raise UserError(f"--change '{flags}': {', '.join(refused)} is no part of a recipe; a change takes flags of the "
                        "model, the diffusion and the training")
    return recipe


def make_plan(recipes: dict[str, Config], runtime: Runtime, starts: dict[str, str], images: int) -> list[Training]:
    """All trainings, each seed of all recipes in turn, forwards and backwards, so that a busy hour hits all alike.

    starts: what names a recipe's training images, of which there are so many, its initial weights and, where minutes
    count, what it runs on.
    """
    plan = []
    for turn in range(recipes[UNCHANGED].trainings):
        for recipe in list(recipes) if turn % 2 == 0 else reversed(recipes):
            config = replace(recipes[recipe], seed=recipes[recipe].seed + turn)
            config = replace(config, name=run_name(config, starts[recipe]))
            plan.append(Training(recipe, config, runtime.on_rank0(partial(part_done, config, images))))
    return plan


def run_name(config: Config, start: str) -> str:
    """experiment/CHANGES-DIGEST-sSEED: other settings, code, images or initial weights have another name."""
    recipe = {name: value for name, value in settings.stored(config).items() if name != "seed"}
    identity = json.dumps([recipe, code.IMPORTED, start], sort_keys=True)
    default = replace(Config(), dataset=config.dataset, seed=config.seed, precision=config.precision)
    changes = settings.differences(settings.stored(default), settings.stored(config), settings.NO_RECIPE)
    words = re.sub(r"[^\w.]+", "-", "-".join(f"{name}-{value}" for name, _, value in changes))[:40].strip("-.")
    return f"experiment/{words or 'default'}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}-s{config.seed}"


def part_done(config: Config, images: int) -> float:
    """The part of a training that is done, 0 to 1; raises UserError for a damaged checkpoint."""
    path = selection.run_path(str(config.name))
    if not os.path.isfile(path):
        return 0.0
    state = checkpoint.load(path)
    return progress(config.train, images, state["step"], state["history"]["seconds"])


def minutes_left(missing: Sequence[Training], seconds: Sequence[float]) -> str:
    """The end of a sentence: the minutes that these trainings take, if known; seconds: those of trainings so far."""
    minutes = [training.config.train.minutes or (fmean(seconds) / 60 if seconds else None) for training in missing]
    if not missing:
        return ""
    if None in minutes:
        return "; the first training shows how long one takes"
    left = max(1, round(sum((length or 0) * (1 - training.done) for length, training in zip(minutes, missing))))
    return f"; about {left} minute{'s' * (left > 1)} of training to go"


def load_sides(trainings: Sequence[Training], recipes: dict[str, Config], runtime: Runtime) -> list[Side]:
    """The unchanged recipe, and the changes of which two trainings or more came to an end; says what failed."""
    sides, most = [], recipes[UNCHANGED].trainings
    for name in recipes:
        paths = [selection.run_path(str(training.config.name)) for training in trainings if training.recipe == name]
        if len(paths) < most:
            runtime.say(f"{name}: {most - len(paths)} of {most} trainings failed"
                        f"{', so it is not compared' * (len(paths) < 2)}.")
        if len(paths) > 1:
            sides.append(make_side(name, paths, recipes[UNCHANGED], runtime))
    return sides if sides and sides[0].name == UNCHANGED else []


def fairness(a: Side, b: Side) -> list[str]:
    """Whether equal minutes were equal work: the images that each side saw, and trainings on a busy machine."""
    if len({model.settings["train"]["minutes"] for side in (a, b) for model in side.models} | {None}) != 2:
        return []  # epochs, or other minutes
    seen_a, seen_b = (fmean(model.images_seen for model in side.models) for side in (a, b))
    lines = [f"In equal time a saw {seen_a:,.0f} images, and b {seen_b:,.0f}: {seen_b / seen_a:.2f} times as many."]
    for letter, side in zip("ab", (a, b)):
        rates = [model.images_seen / model.history["seconds"] for model in side.models]
        if min(rates) < BUSY * max(rates):
            lines.append(f"WARNING: a training of {letter} saw {1 - min(rates) / max(rates):.0%} fewer images a second "
                         "than another one, so the machine was busy. With --epochs all see as many images.")
    return lines


def summarize(sides: Sequence[Side], deciding: Sequence[Difference]) -> list[Path]:
    """Prints and writes the deciding metric of all changes: experiment.json and experiment.png."""
    rows = [(side.name, difference.change, difference.low, difference.high)
            for side, difference in zip(sides[1:], deciding)]
    lines = [["class-wise distance", "change", "95% interval"]]
    for (name, *numbers), difference in zip(rows, deciding):
        change, low, high = map(difference.show, numbers)
        lines.append([name, change, f"{low} to {high} {'*' if difference.significant else ' '}"])
    say(f"\n{aligned(lines)}\n*: the interval excludes 0.")
    content = {name: {"change": change, "interval": [low, high]} for name, change, low, high in rows}
    folder = make_folder(results_folder(sides, len(sides[0].requests[0].labels)))
    return write_results(folder, {
        "experiment.json": lambda path: write_json(path, content),
        "experiment.png": lambda path: plots.save_intervals(path, rows, {UNCHANGED: sides[0].models[0].digest})})
