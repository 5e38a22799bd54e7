"""mode evaluate: which numbers, against which control rows; and the sweep over samplers and steps.

Drawn images are compared with the 10,000 test images. The same code measures as many real training images (the
floor: no model can be expected to do better) and pure noise, so every figure stands beside its control.
"""

import csv
import io
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import config as configs
from config import Config, SampleConfig, UserError
from dataset import Digits, data_folder, load_shared, resolve
from drawing import Order, Trained, announce, choose_labels, draw, guided, load_trained, origin
from likelihood import Likelihood, bound, bound_images
from samplers import SAMPLERS, spaced_timesteps
from support import metrics, plots
from support.files import make_folder, write_atomically
from support.runtime import Clock, Runtime, generator, to_uint8

FLOOR_STREAM = 7  # of random numbers; see train.py, drawing.py and likelihood.py for others
FEWEST = 200  # images, below which the features' covariance says nothing
SWEEP_STEPS = (5, 8, 10, 15, 25, 50)
SWEEP_IMAGES = 2000
PAIRS = 8  # in neighbours.png

# Key, heading, format, and whether a ratio to the floor means something.
COLUMNS = (("frechet", "Fréchet", "{:.3f}", True), ("texture", "texture", "{:.3f}", True), ("precision", "prec.", "{:.3f}", True),
           ("recall", "recall", "{:.3f}", True), ("coverage", "cover.", "{:.3f}", True), ("sure", "sure", "{:.2%}", True),
           ("asked", "as asked", "{:.2%}", False), ("zeros", "zeros", "{:.2%}", True), ("chi_square", "chi²(9)", "{:.1f}", False),
           ("nearest_pixels", "nn pixel", "{:.2f}", True), ("nearest_features", "nn feat.", "{:.2f}", True))


@dataclass(frozen=True)
class Reference:
    """What drawn images are compared with, on the CPU."""

    extractor: metrics.Extractor
    train: Digits
    test: Digits
    train_features: Tensor
    test_features: metrics.Features
    test_texture: Tensor
    test_distances: dict[str, Tensor]  # "pixels", "features": of test images to their nearest training image


def run(config: Config, runtime: Runtime) -> None:
    """Measures a checkpoint, or sweeps over samplers and steps; writes tables and pictures to results/<name>/."""
    count = config.sample.num_images or (SWEEP_IMAGES if config.evaluate.sweep else 10_000)
    if count < FEWEST:
        raise UserError(f"--num-images {count}: the measures need at least {FEWEST} images; draw more")
    clock, name = Clock(runtime), configs.run_name(config)
    extractor = metrics.load_extractor()
    trained = load_trained(config, runtime)
    config = replace(config, sample=guided(config.sample, trained, runtime))
    if not config.evaluate.sweep:
        spaced_timesteps(trained.schedule.timesteps, config.sample.steps)  # an impossible number is answered now
    config = resolve(config, runtime)
    train, test = load_shared(config, "train", runtime), load_shared(config, "test", runtime)
    if min(len(train), len(test)) < FEWEST:
        raise UserError(f"{data_folder(config)}: {min(len(train), len(test))} real images are too few to compare with; at "
                        f"least {FEWEST} are needed")
    folder = make_folder(Path("results") / name)
    announce(trained, config, runtime)
    if trained.data.get("name") != config.dataset:
        runtime.say(f"note: this checkpoint was trained on {trained.data.get('name')}, and is compared with {config.dataset}.")
    clock.lap("load")
    reference = make_reference(extractor, train, test) if runtime.first else None
    clock.lap("reference")
    if config.evaluate.sweep:
        paths = sweep(trained, config, reference, count, folder, runtime)
        clock.lap("sweep")
    else:
        paths = measure_all(trained, config, reference, count, folder, runtime, clock)
    for path in paths:
        runtime.say(f"  {path}")
    runtime.say(clock)


def make_reference(extractor: metrics.Extractor, train: Digits, test: Digits) -> Reference:
    train_features = metrics.extract(extractor, train.images).features
    test_features = metrics.extract(extractor, test.images)
    distances = {"pixels": metrics.nearest(test.images, train.images)[0] / 255,  # intensities in [0, 1]
                 "features": metrics.nearest(test_features.features, train_features)[0]}
    return Reference(extractor, train, test, train_features, test_features, metrics.texture_features(test.images), distances)


def measure(images: Tensor, reference: Reference, asked: Tensor | None = None, quick: bool = False) -> dict[str, Any]:
    """Every measure of uint8 images [N, 1, 28, 28] against the test set; `quick` leaves out the nearest neighbours."""
    found = metrics.extract(reference.extractor, images)
    features, probabilities = found.features, found.probabilities
    test = reference.test_features
    histogram = metrics.class_histogram(probabilities)
    wanted = torch.bincount(asked, minlength=11)[:10] if asked is not None and int(asked.max()) < 10 else None
    expected = metrics.class_histogram(test.probabilities).double() if wanted is None else wanted.double()
    overlap = metrics.precision_recall_coverage(test.features, features)
    # A digit that was never asked for can't be in a chi-square sum.
    present = expected > 0
    statistic, p_value = metrics.chi_square(histogram[present], expected[present] / expected.sum() * len(images))
    row: dict[str, Any] = {
        "frechet": metrics.frechet_distance(features, test.features),
        "texture": metrics.frechet_distance(metrics.texture_features(images), reference.test_texture),
        "precision": overlap.precision, "recall": overlap.recall, "density": overlap.density, "coverage": overlap.coverage,
        "sure": metrics.sure_share(probabilities), "zeros": metrics.zero_share(images),
        "chi_square": statistic, "chi_square_p": p_value, "histogram": histogram.tolist()}
    if asked is not None and wanted is not None:
        row["asked"] = metrics.drawn_as_asked(probabilities, asked)
    if not quick:
        for space, queries, train in (("pixels", images, reference.train.images), ("features", features, reference.train_features)):
            distances, indices = metrics.nearest(queries, train)
            distances = distances / 255 if space == "pixels" else distances
            row |= {f"nearest_{space}": distances.median().item(), f"memorisation_{space}":
                    metrics.memorisation(distances, reference.test_distances[space]), f"_{space}": (distances, indices)}
    return row


def measure_all(trained: Trained, config: Config, reference: Reference | None, count: int, folder: Path, runtime: Runtime,
                clock: Clock) -> list[Path]:
    """The table of the model and its control rows, the bound, metrics.json, evaluation.png and neighbours.png."""
    options = config.sample
    rows: list[dict[str, Any]] = []
    drawn: Tensor | None = None
    for seed in range(config.seed, config.seed + config.evaluate.seeds):
        labels = choose_labels(options.digits, seed, range(count))
        began = time.perf_counter()
        x = draw(trained, Order(options, seed, range(count), labels), runtime, progress=True)
        seconds = time.perf_counter() - began
        clock.lap(f"draw {count}")
        if reference is not None:
            drawn = to_uint8(x) if drawn is None else drawn
            rows.append(measure(to_uint8(x), reference, labels) | {"seed": seed, "seconds": round(seconds, 1)})
            clock.lap("measure")
    if reference is None or drawn is None:
        runtime.barrier()
        return []
    controls = control_rows(reference, count, config.seed)
    clock.lap("measure controls")
    likelihood = None
    if config.evaluate.bound:
        likelihood = bound(trained, reference.train, reference.test, runtime)
        clock.lap("bound")

    average = {key: mean([row[key] for row in rows]) for key, *_ in COLUMNS if key in rows[0]}
    spread = {key: deviation([row[key] for row in rows]) for key in average} if len(rows) > 1 else {}
    print(table(average, spread, controls, count))
    print(explain(rows[0], likelihood, reference))
    source = origin(trained, Order(options, config.seed, [], torch.tensor([])))
    public = [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
    report: dict[str, Any] = {"drawn_with": source, "images": count, "extractor": reference.extractor.digest, "mean": average, "spread": spread,
              "seeds": public, "controls": {name: {k: v for k, v in row.items() if not k.startswith("_")} for name, row in controls.items()},
              "ratio_to_floor": {key: average[key] / controls["floor"][key] for key, _, _, ratio in COLUMNS
                                 if ratio and key in average and controls["floor"].get(key)}}
    if likelihood is not None:
        report["bound"] = asdict(likelihood) | {"by_timestep": {str(t): v for t, v in likelihood.by_timestep.items()}}
    text = json.dumps(report, indent=1)
    write_atomically(folder / "metrics.json", lambda file: file.write(text.encode()))
    floor = controls["floor"]
    ratios = {"all": (average["frechet"] / floor["frechet"], None), "texture": (average["texture"] / floor["texture"], None)}
    pictured: dict[str, Any] = {
        "histogram": {"model": rows[0]["histogram"], "asked": torch.bincount(labels, minlength=11)[:10].tolist()},
        "distances_over_floor": ratios,
        "manifold": {"model": average, "real (floor)": floor, "noise": controls["noise"]},
        "neighbours": {"model": rows[0]["_pixels"][0].numpy(), "test": reference.test_distances["pixels"].numpy()}}
    if likelihood is not None:
        pictured["by_timestep"] = {"t": list(likelihood.by_timestep), "bits": list(likelihood.by_timestep.values())}
    plots.save_evaluation(folder / "evaluation.png", pictured, source)
    distances, indices = rows[0]["_pixels"]
    closest = distances.argsort()[:PAIRS]
    plots.save_neighbours(folder / "neighbours.png", drawn[closest], reference.train.images[indices[closest]],
                          distances[closest].tolist(), source)
    runtime.barrier()
    return [folder / name for name in ("metrics.json", "evaluation.png", "neighbours.png")]


def control_rows(reference: Reference, count: int, seed: int, quick: bool = False) -> dict[str, dict[str, Any]]:
    """"floor": as many real training images, at random; "noise": pixels of a standard normal distribution."""
    random = generator("cpu", seed, FLOOR_STREAM)
    chosen = torch.randperm(len(reference.train), generator=random)[:count]
    noise = to_uint8(torch.randn(count, 1, 28, 28, generator=random))
    floor = measure(reference.train.images[chosen], reference, quick=True)  # a training image's nearest is itself
    rows = {"floor": floor, "noise": measure(noise, reference, quick=quick)}
    if not quick:
        for space, distances in reference.test_distances.items():
            floor[f"nearest_{space}"] = distances.median().item()  # of test images instead
    return rows


def table(average: dict[str, float], spread: dict[str, float], controls: dict[str, dict[str, Any]], count: int) -> str:
    """The aligned table for the terminal: the model, its spread over seeds, the controls, and the ratio to the floor."""
    def cells(row: dict[str, Any]) -> list[str]:
        return [form.format(row[key]) if key in row else "-" for key, _, form, _ in COLUMNS]

    floor = controls["floor"]
    ratios = [f"{average[key] / floor[key]:.2f}x" if ratio and key in average and floor.get(key) else "" for key, _, _, ratio in COLUMNS]
    lines = [[f"N = {count:,}", *(heading for _, heading, _, _ in COLUMNS)], ["model", *cells(average)]]
    if spread:
        lines.append(["  spread", *cells(spread)])
    lines += [["  ratio to floor", *ratios], ["real (floor)", *cells(floor)], ["noise", *cells(controls["noise"])]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
                     for line in lines)


def explain(row: dict[str, Any], likelihood: Likelihood | None, reference: Reference) -> str:
    pixels, features = row["memorisation_pixels"], row["memorisation_features"]
    said = (
        f"Memorisation: median distance to the nearest training image {pixels['ratio']:.2f}x that of test images in pixels, "
        f"{features['ratio']:.2f}x in features;\n  closer than the closest 1% of test images: {pixels['share_closer']:.2%} "
        f"and {features['share_closer']:.2%} (1% is what unseen real digits give).\n"
        f"Class histogram against what was asked: chi-square(9) = {row['chi_square']:.1f}, p = {row['chi_square_p']:.3f}. "
        f"Extractor {reference.extractor.digest}.")
    if likelihood is None:
        return said
    return (
        f"Bound: {likelihood.bits_per_dim:.3f} ± {likelihood.standard_error:.3f} bits/dim on "
        f"{len(bound_images(reference.test)):,} test images (L_T {likelihood.L_T:.5f} + KL {likelihood.L_kl:.3f} + L_0 "
        f"{likelihood.L_0:.3f}): an upper bound, for 8-bit 28x28 images, unpadded, without labels;\n"
        f"  the variances of the reverse process were chosen on training images.\n{said}")


def sweep(trained: Trained, config: Config, reference: Reference | None, count: int, folder: Path, runtime: Runtime) -> list[Path]:
    """The same seeds with each sampler at several step counts: pictures, seconds per 256 images, and measures."""
    longest = trained.schedule.timesteps
    plan = [(sampler, steps) for sampler in SAMPLERS for steps in SWEEP_STEPS if steps < longest]
    plan.append(("ddpm", longest))
    indices = range(count)
    labels = choose_labels(config.sample.digits, config.seed, indices)
    floor = control_rows(reference, count, config.seed, quick=True)["floor"] if reference is not None else {}
    cells: dict[tuple[str, int], Tensor] = {}
    seconds: dict[tuple[str, int], float] = {}
    quality: dict[tuple[str, int], float] = {}
    lines: list[dict[str, Any]] = []
    for sampler, steps in plan:
        options = SampleConfig(sampler=sampler, steps=steps, guidance=config.sample.guidance)  # type: ignore[arg-type]
        began = time.perf_counter()
        x = draw(trained, Order(options, config.seed, indices, labels), runtime, progress=True)
        took = (time.perf_counter() - began) * 256 / count
        if reference is None:
            continue
        images = to_uint8(x)
        row = measure(images, reference, labels, quick=True)
        key = sampler, steps
        cells[key], seconds[key], quality[key] = images[:8], took, row["frechet"] / floor["frechet"]
        lines.append({"sampler": sampler, "steps": steps, "seconds_per_256": round(took, 3), "frechet_over_floor": round(quality[key], 3),
                      "texture_over_floor": round(row["texture"] / floor["texture"], 3),
                      **{name: round(row[name], 4) for name in ("precision", "recall", "coverage", "sure", "asked", "zeros") if name in row}})
        line = "  ".join(f"{name} {value}" for name, value in lines[-1].items())
        print(line, flush=True)
    if reference is not None:
        text = io.StringIO()
        writer = csv.DictWriter(text, lines[0])
        writer.writeheader()
        writer.writerows(lines)
        write_atomically(folder / "sweep.csv", lambda file: file.write(text.getvalue().encode()))
        plots.save_sweep(folder / "sweep.png", cells, seconds, quality, origin(trained, Order(config.sample, config.seed, [], labels)))
    runtime.barrier()
    return [folder / "sweep.png", folder / "sweep.csv"]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def deviation(values: list[float]) -> float:
    return math.sqrt(sum((value - mean(values)) ** 2 for value in values) / (len(values) - 1))
