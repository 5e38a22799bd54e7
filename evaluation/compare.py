"""mode compare: did a change help? Two sides sample the same seeds and labels, and each metric's difference is given.

A side is one network or several trainings of one recipe. One network a side tells these two networks apart; about a
recipe only several trainings of each say something, since trainings that differ by their seed alone differ.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from torch import Tensor

from config import Config, UserError
from dataset import CLASSES, LabelledImages, describe, to_uint8
from evaluation import statistics
from evaluation.differences import Difference, compare_networks, compare_trainings
from evaluation.evaluate import image_count, require_training_images
from evaluation.reference import DECIDING, FEWEST, Baseline, Estimates, Reference, baseline_size, make_reference, rows
from evaluation.tables import aligned, metric_cell
from sample import LoadedModel, SampleRequest, load_checkpoint, make_request, provenance, sample_images
from support import loading, plots, selection, settings
from support.console import say
from support.files import make_folder, write_json, write_results
from support.runtime import Runtime

SHOWN = 12  # pairs of images in compare.png
ALIKE = 0.1  # relative difference in images seen, or in time, from which it is pointed out


class Side(NamedTuple):
    """One side: how it was named, and each of its networks with what is sampled from it."""

    name: str
    models: list[LoadedModel]
    requests: list[SampleRequest]


def main(config: Config, runtime: Runtime) -> None:
    """Samples both sides, measures them alike, and says by how much b differs from a."""
    if config.runs is None:
        raise UserError("--mode compare: it needs two sides; add --runs A B, such as --runs pretrained mine")
    sides = [load_side(text, config, runtime) for text in config.runs]
    config, train, test = load_images(sides, config, runtime)
    runtime.say("\n".join(settings_differences(*sides)))
    compare(sides, config, runtime, train, test)


def compare(sides: Sequence[Side], config: Config, runtime: Runtime, train: LabelledImages, test: LabelledImages,
            introduction: Callable[[Side, Side], list[str]] | None = None) -> list[Difference]:
    """Samples all sides, measures them alike, and reports by how much each differs from the first.

    introduction: the lines above a report, if any. Returns the deciding metric's difference of each later side.
    """
    references: list[Reference] = []  # the first process has one
    runtime.on_rank0(lambda: references.append(make_common_reference(sides, config, train, test)))
    images = [sample_side(side, side.name[:30]) for side in sides]

    def measure() -> tuple[list[Difference], list[Path]]:
        measured = [measure_side(side, side_images, references[0]) for side, side_images in zip(sides, images)]
        deciding, paths = list[Difference](), list[Path]()
        for side, side_images, estimates in zip(sides[1:], images[1:], measured[1:]):
            if introduction:
                say("\n".join(introduction(sides[0], side)))
            differences, written = report([sides[0], side], [measured[0], estimates], references[0].baseline,
                                          [images[0][0], side_images[0]], legend=side is sides[-1])
            deciding += [difference for difference in differences if difference.metric.key == DECIDING]
            paths += written
        return deciding, paths

    deciding, paths = runtime.on_rank0(measure)
    for path in paths:
        runtime.say(f"  {path}")
    return deciding


def load_side(text: str, config: Config, runtime: Runtime) -> Side:
    """A side such as `mine`, `mine,mine-s1`, `path/to/last.safetensors` or `pretrained --guidance 1.3`."""
    names, dashes, flags = text.partition(" --")
    words = (dashes + flags).split()
    side_config = settings.parse([*words, "--mode", "compare"], config)
    if not {*settings.given(words)} <= {*settings.SAMPLING}:
        raise UserError(f"--runs '{text}': only how it is sampled can be a side's own "
                        f"({', '.join(settings.SAMPLING)}); give other flags for both, outside the quotes")
    names = names.strip()
    whole = os.path.exists(names) or os.path.exists(selection.run_path(names))  # a name may have a comma
    paths = [selection.resolve(name.strip(), "--runs") for name in ([names] if whole else names.split(","))]
    return make_side(text, paths, side_config, runtime)


def make_side(name: str, paths: Sequence[Path], config: Config, runtime: Runtime) -> Side:
    """The side of these checkpoints, sampled as the config says; raises UserError where it can't be compared."""
    models = [load_checkpoint(path, runtime) for path in paths]
    if len({model.digest for model in models}) < len(models):
        raise UserError(f"--runs '{name}': the same weights twice are not two trainings; name each run once")
    return Side(name, models, [measuring_request(name, model, config) for model in models])


def measuring_request(name: str, model: LoadedModel, config: Config) -> SampleRequest:
    """What a network of the side of that name samples to be compared; raises UserError for what can't be."""
    request = make_request(model, config.sample, config.seed,
                           image_count(config.sample, model, statistics.FEWEST_FOR_ERRORS))
    if int(request.labels.max()) >= CLASSES:
        raise UserError(f"'{name}': it samples without labels, and the class-wise distance decides; leave out "
                        "--digits none, and networks of --label-dropout 1")
    return request


def load_images(sides: Sequence[Side], config: Config,
                runtime: Runtime) -> tuple[Config, LabelledImages, LabelledImages]:
    """The config with its data set decided, and the training and test images; raises UserError if they don't fit."""
    first, *later = (model for side in sides for model in side.models)
    for model in later:
        if model.data.get("digest") != first.data.get("digest"):
            raise UserError(f"--runs: {first.path} and {model.path} were trained on different images "
                            f"({first.data.get('name')} and {model.data.get('name')}); name runs of one data set")
    config = selection.settle(config, runtime, first.data)
    train, test = loading.load_both(config, runtime)
    require_training_images(first, describe(train, config.dataset), explicit=False)
    if len(train.labels.unique()) == 1:
        raise UserError(f"--dataset {config.dataset}: all images are of one class, and the metric that decides needs a "
                        "classifier of classes; look at --mode evaluate instead")
    return config, train, test


def make_common_reference(sides: Sequence[Side], config: Config, train: LabelledImages,
                          test: LabelledImages) -> Reference:
    """The reference of all sides, whose baseline has as many of the labels, from the first on, as the images allow.

    Raises UserError where these are too few for the class-wise distance.
    """
    labels = sides[0].requests[0].labels
    size = baseline_size(train.labels.cpu(), labels)
    reference = make_reference(config, train, test, labels[:size] if size >= FEWEST else labels)  # which it refuses
    if DECIDING not in reference.baseline.estimates:
        raise UserError(f"--dataset {config.dataset}: too few images of a class for the class-wise distance, which "
                        "decides (400 of each are enough); try a smaller --num-images")
    return reference


def settings_differences(a: Side, b: Side) -> list[str]:
    """In which settings, code and effort the sides differ, a line each."""
    model_a, model_b = a.models[0], b.models[0]
    stored_a, stored_b = (side.models[0].settings | {"sample": asdict(side.requests[0].options)} for side in (a, b))
    changed = [f"{name} {value_a} / {value_b}"
               for name, value_a, value_b in settings.differences(stored_a, stored_b, settings.NO_RECIPE)]
    code = [model.history.get("code", {}) for model in (model_a, model_b)]
    files = [name for name in {**code[0], **code[1]} if code[0].get(name) != code[1].get(name)]
    efforts = [(fmean(model.images_seen for model in side.models),
                fmean(model.history.get("seconds", 0.0) for model in side.models)) for side in (a, b)]
    lines = []
    for letter, side, (images, seconds) in zip("ab", (a, b), efforts):
        trainings = f"{len(side.models)} trainings of " if len(side.models) > 1 else ""
        lines.append(f"{letter}: {side.name} ({trainings}{images:,.0f} images, {seconds / 60:.1f} minutes). "
                     f"{side.requests[0].note}".rstrip())
    lines.append(f"Settings in which they differ, a / b: {'; '.join(changed) or 'none'}.")
    if files:
        lines.append(f"Code in which they differ: {', '.join(files) if all(code) else 'not recorded for one of them'}.")
    for effort, effort_a, effort_b in zip(("see as many images", "train for as long"), *efforts):
        ratio = effort_b / max(effort_a, 1e-9)
        if abs(ratio - 1) > ALIKE and model_a.digest != model_b.digest:
            lines.append(f"note: they did not {effort}: b has {ratio:.2f} times a's.")
    return lines


def sample_side(side: Side, name: str) -> list[Tensor]:
    """The images uint8 [N, 1, 28, 28] of each of its networks, the same in every process."""
    count = len(side.models)
    numbers = [f" ({i + 1} of {count})" * (count > 1) for i in range(count)]
    return [to_uint8(sample_images(model, request, progress=f"sampling {name}{number}")[0])
            for model, request, number in zip(side.models, side.requests, numbers)]


def measure_side(side: Side, images: Sequence[Tensor], reference: Reference) -> list[Estimates]:
    """The metrics of each of its networks; warns of images that are plainly broken."""
    for model, sampled in zip(side.models, images):
        plots.warn_if_broken(sampled, model.data, model.images_seen)
    return [reference.measure(sampled, request.labels).estimates for sampled, request in zip(images, side.requests)]


def table(differences: Sequence[Difference], baseline: Baseline, images: int) -> str:
    """Each metric's values of so many images, the change with its 95% interval, and the baseline.

    Distances are multiples of the baseline, if that has as many images.
    """
    size = len(baseline.labels)
    alike = size == images
    lines = [[f"N = {images:,}", "a", "b", "change", "95% interval", "baseline" if alike else f"baseline ({size:,})"]]
    for difference in differences:
        metric = difference.metric
        values = [metric_cell(metric, estimate, baseline) if alike and metric.distance
                  else metric.form.format(estimate.value) for estimate in (difference.a, difference.b)]
        interval = f"{difference.show(difference.low)} to {difference.show(difference.high)}"
        lines.append([metric.heading, *values, difference.show(difference.change),
                      interval + " *"[difference.significant], "1x" if alike and metric.distance
                      else metric.form.format(baseline.estimates[metric.key].value)])
    return aligned(lines)


def conclusion(sides: Sequence[Side], differences: Sequence[Difference], images: int) -> str:
    """What the deciding metric says, and what it can't say."""
    a, b = sides
    deciding = next(difference for difference in differences if difference.metric.key == DECIDING)
    significance = ("no significant difference" if not deciding.significant else
                    "b is significantly closer to the training images" if deciding.high < 0 else
                    "b is significantly further from the training images")
    lines = [f"Class-wise distance, which decides: {deciding.show(deciding.change)} ({deciding.show(deciding.low)} to "
             f"{deciding.show(deciding.high)}): {significance}.",
             f"A true difference of {deciding.show(deciding.detectable)[1:]} would be found four times in five, a "
             "smaller one more rarely."]
    if deciding.spread is not None and deciding.sampling_share is not None:
        means = ("images (--num-images) narrow the interval more than more trainings"
                 if deciding.sampling_share > 0.5 else "trainings narrow the interval more than more images")
        lines.append(f"Trainings of one side differ by {deciding.spread:.0%} (standard deviation). About "
                     f"{deciding.sampling_share:.0%} of this variance comes from sampling {images:,} images: more "
                     f"{means}.")
    elif a.models[0].digest == b.models[0].digest:
        lines.append("Both sides are the same network, sampled in two ways.")
    else:
        lines.append("This is about these two networks, not about their recipes: trainings of the default recipe that "
                     "differ by their seed alone differ by 10% (standard deviation). Train three a side to compare "
                     "recipes.")
    return "\n".join(lines)


def explain(baseline: Baseline, images: int) -> list[str]:
    """What the table's numbers don't say by themselves, a line each."""
    lines = ["*: the interval excludes 0. The other metrics' intervals are each wrong one time in twenty.",
             "Lower distances are closer; all else is best where the baseline is.",
             "Changes of distances are in per cent, all others in percentage points."]
    if (size := len(baseline.labels)) < images:
        lines.append(f"The baseline has {size:,} images, as many as two disjoint sets of real images allow. Distances "
                     "fall with the number of images, so these are no multiples of it.")
    return lines


def report(sides: Sequence[Side], measured: Sequence[list[Estimates]], baseline: Baseline,
           pictures: Sequence[Tensor], *, legend: bool = True) -> tuple[list[Difference], list[Path]]:
    """Prints the table, with what its numbers mean if `legend`, and writes compare.json and compare.png.

    The picture shows where the two sides differ most, and the intervals.
    """
    a, b = measured
    differences = compare_networks(a[0], b[0], baseline) if len(a) == len(b) == 1 else compare_trainings(a, b)
    images = len(pictures[0])
    say(table(differences, baseline, images))
    say("\n".join([conclusion(sides, differences, images), *(explain(baseline, images) if legend else ())]))
    content = {"images": images,
               "sides": [{"name": side.name, "networks": [
                   {**provenance(model, request), "metrics": rows(estimates)}
                   for model, request, estimates in zip(side.models, side.requests, networks)]}
                   for side, networks in zip(sides, measured)],
               "differences": {difference.metric.key: {
                   "a": difference.a.value, "b": difference.b.value, "change": difference.change,
                   "interval": [difference.low, difference.high]} for difference in differences}}
    folder = make_folder(results_folder(sides, images))
    pixel_distance = (pictures[0].float() - pictures[1].float()).square().flatten(1).sum(1)
    shown = pixel_distance.argsort(descending=True)[:SHOWN]
    names = sides[0].name, sides[1].name
    intervals = [(difference.metric.heading, difference.metric.distance, difference.change, difference.low,
                  difference.high) for difference in differences]
    writers = {
        "compare.json": lambda path: write_json(path, content),
        "compare.png": lambda path: plots.save_comparison(path, (pictures[0][shown], pictures[1][shown]), names,
                                                          intervals, {"a": names[0], "b": names[1]})}
    return differences, write_results(folder, writers)


def results_folder(sides: Sequence[Side], count: int) -> Path:
    """results/compare/A-vs-B-DIGEST: another pair, number of images, seed or way to sample has another folder."""
    names = "-vs-".join(re.sub(r"[^\w.]+", "-", side.name)[:40].strip("-.") for side in sides)[:90]
    key = json.dumps([count, *(provenance(*pair) for side in sides for pair in zip(side.models, side.requests))])
    return Path("results", "compare", f"{names}-{hashlib.sha256(key.encode()).hexdigest()[:8]}")
