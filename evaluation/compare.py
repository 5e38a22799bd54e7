"""mode compare: did a change help? Two sides sample the same seeds and labels, and each metric's difference is given.

A side is one network or several trainings of one recipe. One network a side tells these two networks apart; about a
recipe only several trainings of each say something, since trainings that differ by their seed alone differ.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from operator import methodcaller
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, cast

from torch import Tensor

from config import Config, UserError
from dataset import CLASSES, describe, to_uint8
from evaluation import statistics
from evaluation.evaluate import image_count, require_its_images
from evaluation.reference import DECIDING, METRICS, Baseline, Measurement, Metric, Reference, make_reference, rows
from sample import LoadedModel, SampleRequest, load_checkpoint, make_request, provenance, sample_images, warn_if_broken
from support import loading, plots, selection, settings
from support.files import make_folder, write_atomically, write_results
from support.runtime import Runtime

SHOWN = 12  # pairs of images in compare.png
ALIKE = 0.1  # relative difference in images seen, or in time, from which it is pointed out


class Side(NamedTuple):
    """One side: how it was named, and each of its networks with what is sampled from it."""

    name: str
    models: list[LoadedModel]
    requests: list[SampleRequest]


class Difference(NamedTuple):
    """One metric of both sides, and the 95% interval of the change: relative for distances, else absolute."""

    metric: Metric
    a: float
    b: float
    change: float
    low: float
    high: float
    error: float  # standard error of b - a; with several trainings a side, of that of the logarithms
    freedom: float  # its degrees of freedom

    def show(self, value: float) -> str:
        """A change as a text: per cent for distances, percentage points for shares."""
        return f"{100 * value:+.1f}%" if self.metric.distance else f"{100 * value:+.2f} pt"


def main(config: Config, runtime: Runtime) -> None:
    """Samples both sides, measures them alike, and says by how much b differs from a."""
    if config.runs is None:
        raise UserError("--mode compare: it needs two sides; add --runs A B, such as --runs pretrained mine")
    a, b = sides = [load_side(text, config, runtime) for text in config.runs]
    first = require_same_images(sides)
    known = selection.data_name(first.path) if config.dataset == "auto" else None
    config = selection.settle(replace(config, dataset=cast(Any, known or config.dataset)), runtime)
    train, test = loading.load_both(config, runtime)
    require_its_images(first, describe(train, config.dataset), explicit=False)
    if len(train.labels.unique()) == 1:
        raise UserError(f"--dataset {config.dataset}: all images are of one class, and the metric that decides needs a "
                        "classifier of classes; look at --mode evaluate instead")
    runtime.say("\n".join(settings_differences(a, b)))
    made: list[Reference] = []
    runtime.on_rank0(lambda: made.append(make_reference(config, train, test, a.requests[0].labels)))
    images = [[to_uint8(sample_images(model, request, progress=f"sampling {letter}: {name(model)}")[0])
               for model, request in zip(side.models, side.requests)] for letter, side in zip("ab", sides)]

    def measure() -> list[Path]:
        for side, sampled in zip(sides, images):
            for model, each in zip(side.models, sampled):
                warn_if_broken(each, model)
        measured = [[made[0].measure(each, a.requests[0].labels)[0] for each in sampled] for sampled in images]
        return report(sides, measured, made[0].baseline, [sampled[0] for sampled in images])

    for path in runtime.on_rank0(measure):
        runtime.say(f"  {path}")


def name(model: LoadedModel) -> str:
    """Of its run or file, as its results folder has it."""
    return selection.results_folder(model.path, model.digest).name


def load_side(text: str, config: Config, runtime: Runtime) -> Side:
    """A side such as `mine`, `mine,mine-s1`, `path/to/last.safetensors` or `pretrained --guidance 1.3`."""
    names, dashes, flags = text.partition(" --")
    words = (dashes + flags).split()
    own = settings.parse([*words, "--mode", "compare"], config)
    if not {*settings.given(words)} <= {*settings.SAMPLING}:
        raise UserError(f"--runs '{text}': only how it is sampled can be a side's own "
                        f"({', '.join(settings.SAMPLING)}); give other flags for both, outside the quotes")
    names = names.strip()
    whole = os.path.exists(names) or os.path.exists(selection.run_path(names))  # a name may have a comma
    models = [load_checkpoint(selection.resolve(name.strip(), "--runs"), runtime)
              for name in ([names] if whole else names.split(","))]
    counts = [image_count(own.sample.num_images, model, statistics.FEWEST_FOR_ERRORS) for model in models]
    requests = [make_request(model, own.sample, config.seed, count) for model, count in zip(models, counts)]
    if len({model.digest for model in models}) < len(models):
        raise UserError(f"--runs '{text}': the same weights twice are not two trainings; name each run once")
    if any(int(request.labels.max()) >= CLASSES for request in requests):
        raise UserError(f"--runs '{text}': it samples without labels, and the class-wise distance decides; leave out "
                        "--digits none, and networks of --label-dropout 1")
    return Side(text, models, requests)


def require_same_images(sides: Sequence[Side]) -> LoadedModel:
    """The first model; raises UserError unless all were trained on the same images."""
    first, *others = (model for side in sides for model in side.models)
    for model in others:
        if model.data.get("digest") != first.data.get("digest"):
            raise UserError(f"--runs: {first.path} and {model.path} were trained on different images "
                            f"({first.data.get('name')} and {model.data.get('name')}); name runs of one data set")
    return first


def settings_differences(a: Side, b: Side) -> list[str]:
    """In which settings, code and effort the sides differ, a line each."""
    one, other = a.models[0], b.models[0]
    stored = (side.models[0].settings | {"sample": asdict(side.requests[0].options)} for side in (a, b))
    changed = [f"{name} {before} / {now}" for name, before, now in settings.differences(*stored)]
    code = [model.history.get("code", {}) for model in (one, other)]
    files = [name for name in {**code[0], **code[1]} if code[0].get(name) != code[1].get(name)]
    efforts = [(fmean(model.step * model.settings["train"].get("batch_size", 64) for model in side.models),
                fmean(model.history.get("seconds", 0.0) for model in side.models)) for side in (a, b)]
    lines = []
    for letter, side, (images, seconds) in zip("ab", (a, b), efforts):
        many = f"{len(side.models)} trainings of " if len(side.models) > 1 else ""
        lines.append(f"{letter}: {side.name} ({many}{images:,.0f} images, {seconds / 60:.1f} minutes). "
                     f"{side.requests[0].note}".rstrip())
    lines.append(f"Settings in which they differ, a / b: {'; '.join(changed) or 'none'}.")
    if files:
        lines.append(f"Code in which they differ: {', '.join(files) if all(code) else 'not recorded for one of them'}.")
    for what, own, its in zip(("see as many images", "train for as long"), *efforts):
        ratio = its / max(own, 1e-9)
        if abs(ratio - 1) > ALIKE and one.digest != other.digest:
            lines.append(f"note: they did not {what}: b has {ratio:.2f} times a's.")
    return lines


def differences(a: Sequence[dict[str, Measurement]], b: Sequence[dict[str, Measurement]],
                baseline: Baseline) -> list[Difference]:
    """Of each metric that both sides have: those of one network each, or of several trainings, for the same labels.

    One network a side: the error is a jackknife over blocks, paired, since both have the same seeds. Several: each
    training's logarithm is one number, with the variance between trainings (`between_trainings`).
    """
    found, several = [], len(a) + len(b) > 2
    for metric in (m for m in METRICS if all(m.key in row for row in (*a, *b))):
        one, other = ([row[metric.key] for row in side] for side in (a, b))
        if several:
            logs = [[math.log(max(each.value, 1e-9)) for each in side] for side in (one, other)]
            mean_a, mean_b = (math.exp(fmean(side)) for side in logs)
            error, freedom = statistics.between_trainings(logs, metric.key)
            centre, scale = fmean(logs[1]) - fmean(logs[0]), 1.0 if metric.distance else mean_a
        else:
            mean_a, mean_b = one[0].value, other[0].value
            before, after = one[0].replicates, other[0].replicates
            if before is None or after is None:
                error, freedom = math.sqrt(2) * (baseline.found[metric.key].error or 0.0), len(baseline.sets) - 1.0
            else:
                error, freedom = statistics.jackknife_error(after - before), len(before) - 1.0
            centre, scale = mean_b - mean_a, 1 / max(mean_a, 1e-9) if metric.distance else 1.0
        half = statistics.student_quantile(freedom) * error
        change, low, high = (scale * (math.expm1(value) if several else value)
                             for value in (centre, centre - half, centre + half))
        found.append(Difference(metric, mean_a, mean_b, change, low, high, error, freedom))
    return found


def table(found: Sequence[Difference], baseline: Baseline) -> str:
    """Each metric's values, the change with its 95% interval, and the baseline."""
    lines = [[f"N = {len(baseline.labels):,}", "a", "b", "change", "95% interval", "baseline"]]
    for each in found:
        key, heading, form, _ = each.metric
        lines.append([heading + " (decides)" * (key == DECIDING), form.format(each.a), form.format(each.b),
                      each.show(each.change), f"{each.show(each.low)} to {each.show(each.high)}",
                      form.format(baseline.found[key].value)])
    return statistics.aligned(lines)


def conclusion(sides: Sequence[Side], found: Sequence[Difference]) -> str:
    """What the deciding metric says, and what it can't say."""
    a, b = sides
    deciding = next(each for each in found if each.metric.key == DECIDING)
    significance = ("no significant difference" if deciding.low <= 0 <= deciding.high else
                    "b is significantly closer to the training images" if deciding.high < 0 else
                    "b is significantly further from the training images")
    lines = [f"Class-wise distance, which decides: {deciding.show(deciding.change)} ({deciding.show(deciding.low)} to "
             f"{deciding.show(deciding.high)}): {significance}.",
             "Lower distances are closer; all else is best where the baseline is. One in twenty of the other intervals "
             "misses the true change by chance."]
    if len(a.models) + len(b.models) > 2:
        change = math.expm1(statistics.detectable(deciding.error, deciding.freedom))
        lines.append("The spread between trainings is estimated from these and from 8 of the default recipe "
                     f"({deciding.freedom:.0f} degrees of freedom). Four of five such comparisons find a true "
                     f"difference of {change:.0%}.")
    elif a.models[0].digest == b.models[0].digest:
        lines.append("Both sides are the same network, sampled in two ways.")
    else:
        lines.append("This is about these two networks, not about their recipes: trainings that differ by their seed "
                     f"alone differ by {statistics.SPREAD[DECIDING]:.0%} (standard deviation). Train three a side to "
                     "compare recipes.")
    return "\n".join(lines)


def report(sides: Sequence[Side], measured: Sequence[list[dict[str, Measurement]]], baseline: Baseline,
           pictures: Sequence[Tensor]) -> list[Path]:
    """Prints the table and writes compare.json and compare.png: where the two sides differ most, and the intervals."""
    found = differences(measured[0], measured[1], baseline)
    print(table(found, baseline))
    print(conclusion(sides, found))
    content = {"images": len(baseline.labels),
               "sides": [{"name": side.name, "networks": [
                   {**provenance(model, request), "metrics": rows(row)}
                   for model, request, row in zip(side.models, side.requests, own)]}
                   for side, own in zip(sides, measured)],
               "differences": {each.metric.key: {"a": each.a, "b": each.b, "change": each.change,
                                                 "interval": [each.low, each.high]} for each in found}}
    folder = make_folder(results_folder(sides, len(baseline.labels)))
    apart = (pictures[0].float() - pictures[1].float()).square().flatten(1).sum(1)
    first = apart.argsort(descending=True)[:SHOWN]
    names = sides[0].name, sides[1].name
    intervals = [(each.metric.heading, each.metric.distance, each.change, each.low, each.high) for each in found]
    writers = {
        "compare.json": lambda path: write_atomically(
            path, methodcaller("write", json.dumps(content, indent=1).encode())),
        "compare.png": lambda path: plots.save_comparison(path, (pictures[0][first], pictures[1][first]), names,
                                                          intervals, {"a": names[0], "b": names[1]})}
    return write_results(folder, writers)


def results_folder(sides: Sequence[Side], count: int) -> Path:
    """results/compare/A-vs-B-DIGEST: another pair, number of images, seed or way to sample has another folder."""
    short = (re.sub(r"[^\w.-]+", "-", side.name)[:40].strip("-.") for side in sides)
    key = json.dumps([count, *(provenance(*pair) for side in sides for pair in zip(side.models, side.requests))])
    return Path("results", "compare", f"{'-vs-'.join(short)}-{hashlib.sha256(key.encode()).hexdigest()[:8]}")
