"""mode evaluate: a table of all metrics beside the baseline and the test set, metrics.json and two pictures."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from config import Config, SampleConfig, UserError
from dataset import CLASSES, class_name, describe, to_uint8
from evaluation.metrics import nearest, share_closer
from evaluation.reference import FEWEST, METRICS, Measurement, Reference, make_reference, rows
from evaluation.statistics import FEWEST_FOR_ERRORS
from evaluation.tables import aligned, baseline_cell, metric_cell
from sample import (
    LABELS_PER_CLASS,
    LoadedModel,
    SampleRequest,
    announce,
    load_checkpoint,
    make_request,
    provenance,
    sample_images,
)
from support import loading, plots, selection
from support.console import say
from support.files import make_folder, set_aside, write_json, write_results
from support.runtime import Runtime

COPIES = 0.03  # share of images nearer than the test set's nearest 1% from which copying is reported
REPORT = ("metrics.json", "evaluation.png", "neighbours.png")


def main(config: Config, runtime: Runtime) -> None:
    """Measures a checkpoint and writes a table, a report and pictures to its results folder."""
    explicit = config.dataset != "auto"
    config = selection.settle(config, runtime)
    model = load_checkpoint(cast(Path, config.sample.checkpoint), runtime)
    request = make_request(model, config.sample, config.seed, image_count(config.sample, model))
    train, test = loading.load_both(config, runtime)
    require_training_images(model, describe(train, config.dataset), explicit=explicit)
    announce(model, request)
    references: list[Reference] = []  # the first process has one
    runtime.on_rank0(lambda: references.append(make_reference(config, train, test, request.labels)))
    images = to_uint8(sample_images(model, request, progress="sampling")[0])
    for path in runtime.on_rank0(lambda: report(images, model, request, references[0])):
        runtime.say(f"  {path}")


def image_count(options: SampleConfig, model: LoadedModel, fewest: int = FEWEST) -> int:
    """The number of images to measure: --num-images, else 10,000 or what two sets of training images allow.

    Only the classes that are sampled count. Raises UserError for fewer than `fewest`.
    """
    # The labels repeat after so many, or are shuffled within so many.
    period = (model.classes * LABELS_PER_CLASS if options.digits in (None, "none") else [*map(int, options.digits)])
    available = {k: count for k, count in enumerate(model.data.get("classes", [])) if count and k in period}
    smallest = min(available, key=lambda k: available[k] // period.count(k), default=None)
    most = 10_000
    if smallest is not None:
        needed = 2 * period.count(smallest)
        most = min(most, available[smallest] // needed * len(period))
        if options.num_images is None and most < fewest:
            raise UserError(f"{model.path}: trained on too few images to measure it: class {smallest} has "
                            f"{available[smallest]:,}, and {needed * math.ceil(fewest / len(period)):,} are needed")
    count = options.num_images or most
    if count < fewest:
        raise UserError(f"--num-images {count}: too few to measure; use at least {fewest:,}")
    return count


def require_training_images(model: LoadedModel, data: dict[str, Any], *, explicit: bool) -> None:
    """Checks that a model is measured on the images that it was trained on; another --dataset is only pointed out.

    data: of the images to measure with (`describe`); explicit: --dataset was given.
    """
    if model.data.get("digest") == data["digest"]:
        return
    trained_on = model.data.get("name", "unknown images")
    if not explicit or trained_on == data["name"]:
        raise UserError(f"--data-dir: these are not the images that {model.path} was trained on ({trained_on}, digest "
                        f"{model.data.get('digest')}, not {data['digest']}); name their folder, or another --dataset")
    model.runtime.say(f"note: this checkpoint was trained on other images ({trained_on}) than it is compared with "
                      f"({data['name']}).")


def report(images: Tensor, model: LoadedModel, request: SampleRequest, reference: Reference) -> list[Path]:
    """Prints the table, writes the report and the pictures, and returns their paths.

    A report of other weights, settings or images that is there already is moved aside first.
    """
    measurement = reference.measure(images, request.labels)
    test_measurement, test_baseline = reference.test_set
    neighbours = distances, _ = nearest(images, reference.train.images)
    test_distances, _ = nearest(reference.test_subset.images, reference.train.images)
    closer = share_closer(distances, test_distances)
    source, baseline = provenance(model, request), reference.baseline
    identity = {"sampled_with": source, "images": len(images),
                "compared_with": describe(reference.train, "")["digest"],
                "classifier": reference.classifier and reference.classifier.digest}
    content = {**identity, "metrics": rows(measurement.estimates, baseline), "baseline": rows(baseline.estimates),
               "test_set": rows(test_measurement.estimates, test_baseline), "test_images": len(reference.test_subset),
               "class_distances": {k: {"value": value, "baseline": baseline.class_distances[k]}
                                   for k, value in measurement.class_distances.items()},
               "closer_than_test": closer}
    say(table(measurement, reference))
    say(explain(measurement, reference, closer, model.data))
    folder = make_folder(selection.results_folder(model.path, model.digest))
    if (old := keep_other_report(folder, identity)) is not None:
        say(f"The report of other settings or weights that was there is now in {old}.")
    writers = {
        "metrics.json": lambda path: write_json(path, content),
        "neighbours.png": lambda path: save_neighbours(path, images, request.labels, neighbours, reference, source)}
    if reference.classifier is not None:
        writers["evaluation.png"] = lambda path: plots.save_evaluation(
            path, pictured(measurement, reference, distances, test_distances, model.data), source)
    return write_results(folder, writers)


def keep_other_report(folder: Path, identity: dict[str, Any]) -> Path | None:
    """Moves a report aside unless it is of the same weights, settings and images; returns where it is now."""
    stored, files = None, [path for name in REPORT if (path := folder / name).exists()]
    with contextlib.suppress(OSError, ValueError):  # one that can't be read is kept as well
        stored = json.loads((folder / REPORT[0]).read_text("utf-8"))
    if not files or isinstance(stored, dict) and {key: stored.get(key) for key in identity} == identity:
        return None
    return set_aside(files, folder)


def table(measurement: Measurement, reference: Reference) -> str:
    """The table for the terminal, a row for each metric: the sampled images, the baseline and the test set."""
    test, test_baseline = reference.test_set
    lines = [[f"N = {len(reference.baseline.labels):,}", "sampled", "baseline", "test set"]]
    for metric in METRICS:
        if estimate := measurement.estimates.get(metric.key):
            lines.append([metric.heading, metric_cell(metric, estimate, reference.baseline),
                          baseline_cell(metric, reference.baseline),
                          metric_cell(metric, test.estimates.get(metric.key), test_baseline)])
    return aligned(lines)


def explain(measurement: Measurement, reference: Reference, closer: float, data: dict[str, Any]) -> str:
    """What the table's numbers don't say by themselves."""
    baseline, classifier = reference.baseline, reference.classifier
    lines = ["Distances are multiples (x) of the baseline, the distance of real training images from the rest.",
             "Lower distances are closer; all else is best where the baseline is.",
             f"±: standard errors; of the baseline, the spread of its {len(baseline.sets)} sets. The test set "
             f"({len(reference.test_subset):,} images) has a baseline of as many."]
    if len(baseline.labels) < FEWEST_FOR_ERRORS:
        lines.append(f"Errors need at least {FEWEST_FOR_ERRORS:,} images.")
    if ratios := [(value / baseline.class_distances[k], k) for k, value in measurement.class_distances.items()]:
        (low, best), (high, worst) = min(ratios), max(ratios)
        lines.append(f"Class-wise distance: largest for {class_name(data, worst)} ({high:.1f}x its baseline), smallest "
                     f"for {class_name(data, best)} ({low:.1f}x).")
    elif classifier is not None:
        lines.append("No class-wise distance: too few images of a class (400 of each are enough).")
    test, _ = reference.test_set
    if few := [class_name(data, k) for k in baseline.class_distances if k not in test.class_distances]:
        lines.append(f"Too few test images for a class-wise distance of class {', '.join(few)}.")
    lines.append(f"Copying: {closer:.2%} of samples lie suspiciously near a training image (1% of test images do)."
                 + " That is far too many." * (closer > COPIES))
    if classifier is not None:
        lines.append(f"Classifier {classifier.digest}.")
    return "\n".join(lines)


def save_neighbours(path: Path, images: Tensor, labels: Tensor, neighbours: tuple[Tensor, Tensor],
                    reference: Reference, source: dict[str, str]) -> None:
    """For each class (without labels: of all) the image that is nearest to a training image, beside that one."""
    distances, indices = neighbours
    chosen = torch.stack([distances.where(labels == k, torch.inf).argmin() for k in labels.unique()])
    plots.save_neighbours(path, images[chosen], reference.train.images[indices[chosen]], distances[chosen].tolist(),
                          source)


def pictured(measurement: Measurement, reference: Reference, nearest_distances: Tensor, test_distances: Tensor,
             data: dict[str, Any]) -> dict[str, Any]:
    """What evaluation.png shows. The distances [N] are those to the nearest training images; data: `describe`'s."""
    ratios = []
    for images, baseline in ((measurement, reference.baseline), reference.test_set):
        classes = {class_name(data, k): (value / baseline.class_distances[k], None)
                   for k, value in images.class_distances.items()}
        distances = {metric.heading: baseline.ratio(metric.key, images.estimates[metric.key])
                     for metric in METRICS if metric.distance and metric.key in images.estimates}
        ratios.append({**distances, **classes})
    expected = torch.bincount(reference.baseline.labels, minlength=CLASSES).tolist()
    counts = measurement.class_counts
    shown = [k for k in range(CLASSES) if expected[k] or counts[k]]
    overlap = {name: {key: estimate.value for key, estimate in images.estimates.items()}
               for name, images in (("sampled", measurement), (plots.BASELINE, reference.baseline))}
    return {"classes": [class_name(data, k) for k in shown],
            "histogram": {"model": [counts[k] for k in shown], "asked": [expected[k] for k in shown]},
            "ratios": ratios[0], "test_ratios": ratios[1], "overlap": overlap,
            "neighbours": {"model": nearest_distances.numpy(), "test": test_distances.numpy()}}
