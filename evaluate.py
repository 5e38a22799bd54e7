"""mode evaluate: which numbers, against which control rows; and the sweep over samplers and steps.

Drawn images are measured by `yardstick`, beside as many real training images (the floor), the test set and noise.
"""

import csv
import io
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import config as configs
import dataset
from config import Config, UserError
from drawing import Order, Trained, announce, draw, guided, load_trained, origin
from likelihood import Likelihood, bound, bound_images
from samplers import SAMPLERS
from support import plots
from support.files import make_folder, write_atomically
from support.runtime import Clock, Runtime, to_uint8
from support.statistics import aligned
from yardstick import FEWEST, FEWEST_BLOCKS, MEASURES, Row, Yardstick, judge

SWEEP_STEPS = (5, 8, 10, 15, 25, 50)
SWEEP_IMAGES = 2000
PAIRS = 8  # in neighbours.png
COPIES = 0.03  # share of images nearer than the test set's nearest 1%, from which copying is called out


def run(config: Config, runtime: Runtime) -> None:
    """Measures a checkpoint, or sweeps over samplers and steps; writes tables and pictures to results/<name>/."""
    count = config.sample.num_images or (SWEEP_IMAGES if config.evaluate.sweep else 10_000)
    if count < FEWEST:
        raise UserError(f"--num-images {count}: the measures need at least {FEWEST} images; draw more")
    clock = Clock(runtime)
    trained = load_trained(config, runtime)
    options = replace(config.sample, steps=1) if config.evaluate.sweep else config.sample  # which has steps of its own
    options = guided(options, trained, runtime)
    config = dataset.resolve(config, runtime)
    train, test = (dataset.load_shared(config, split, runtime) for split in ("train", "test"))
    folder = make_folder(Path("results") / configs.run_name(config))
    announce(trained, config, runtime)
    if trained.data.get("digest") != dataset.describe(train, "")["digest"]:
        runtime.say(f"note: this checkpoint was trained on other images ({trained.data.get('name')}) than it is "
                    f"compared with ({config.dataset}).")
    order = Order(options, config.seed, range(count), trained.labels(options.digits, config.seed, count))
    clock.lap("load")
    made: list[Yardstick] = []
    labels = order.labels
    runtime.only_first(lambda: made.append(Yardstick(train, test, labels, judge(config, train, test, labels))))
    clock.lap("look at real images")
    yardstick = made[0] if runtime.first else None
    if config.evaluate.sweep:
        paths = sweep(trained, order, yardstick, folder, runtime)
        clock.lap("sweep")
    else:
        likelihood = None
        if config.evaluate.bound:
            likelihood = bound(trained, train, test, runtime)
            clock.lap("bound")
        paths = measure_all(trained, order, yardstick, likelihood, folder, runtime, clock)
    for path in paths:
        runtime.say(f"  {path}")
    runtime.say(clock)


def measure_all(trained: Trained, order: Order, yardstick: Yardstick | None, likelihood: Likelihood | None,
                folder: Path, runtime: Runtime, clock: Clock) -> list[Path]:
    """The table of the model and its control rows, metrics.json, evaluation.png and neighbours.png."""
    images = to_uint8(draw(trained, order, runtime, progress=True))
    clock.lap(f"draw {len(images)}")
    if yardstick is None:
        runtime.barrier()
        return []
    row = yardstick.measure(images, order.labels)
    clock.lap("measure")
    print(table(row, yardstick, len(images)))
    clock.lap("measure controls")
    print(explain(row, yardstick, trained.data.get("name", "")))
    source = origin(trained, order)
    report: dict[str, Any] = {
        "drawn_with": source, "images": len(images), "model": public(row),
        "extractor": yardstick.extractor and yardstick.extractor.digest,
        "over_floor": {key: yardstick.over_floor(key, row) for key in ("within", "frechet", "texture")
                       if key in row.values},
        "controls": {name: public(row) for name, row in controls(yardstick).items()}}
    if likelihood is not None:
        print(explain_bound(likelihood, len(bound_images(yardstick.test))))
        report["bound"] = asdict(likelihood)
    write_atomically(folder / "metrics.json", lambda file: file.write(json.dumps(report, indent=1).encode()))
    save_pictures(folder, images, row, yardstick, likelihood, source)
    runtime.barrier()
    pictures = ["evaluation.png", "neighbours.png"] if yardstick.extractor else ["neighbours.png"]
    return [folder / name for name in ("metrics.json", *pictures)]


def controls(yardstick: Yardstick) -> dict[str, Row]:
    return {"real (floor)": yardstick.floor, "other writers": yardstick.other_writers, "noise": yardstick.noise}


def public(row: Row) -> dict[str, Any]:
    return {"values": row.values, "errors": row.errors, "within_classes": row.classes, "memorisation": row.memorisation}


def table(row: Row, yardstick: Yardstick, count: int) -> str:
    """The aligned table for the terminal: the model, its errors, and the controls."""
    def cells(values: dict[str, float]) -> list[str]:
        return [m.form.format(values[m.key]) if m.key in values else "" for m in MEASURES]

    lines = [[f"N = {count:,}", *(m.heading for m in MEASURES)], ["model", *cells(row.values)]]
    if row.errors:
        lines.append(["  ± standard error", *cells(row.errors)])
    ratios = {m.key: yardstick.over_floor(m.key, row) for m in MEASURES if m.good == "low" and m.key in row.values}
    lines.append(["  times the floor", *(times(ratios.get(m.key)) for m in MEASURES)])
    for name, control in controls(yardstick).items():
        lines.append([name, *cells(control.values)])
        if control is yardstick.floor:
            lines.append([f"  spread of {len(yardstick.sets)} sets", *cells(control.errors)])
    return aligned(lines)


def times(ratio: tuple[float, float | None] | None) -> str:
    """A ratio to the floor with its error, such as 5.1±0.2x."""
    if ratio is None:
        return ""
    digits = 2 if ratio[0] < 10 else 1
    return f"{ratio[0]:.{digits}f}x" if ratio[1] is None else f"{ratio[0]:.{digits}f}±{ratio[1]:.{digits}f}x"


def explain(row: Row, yardstick: Yardstick, data: str) -> str:
    """What the table's numbers don't say by themselves."""
    lines = ["Distances are to the training images, lower is better; all else is best where real images are. Other "
             "writers: the test set."]
    if row.left_out:
        lines.append("Errors are by jackknife over blocks of labels; near the floor they are on the wide side.")
    else:
        lines.append(f"No errors of distances are given below {100 * FEWEST_BLOCKS:,} images.")
    if row.classes:
        over = {k: value / yardstick.floor.classes[k] for k, value in row.classes.items()}
        worst, best = max(over, key=lambda k: over[k]), min(over, key=lambda k: over[k])
        lines.append(f"Within classes: worst {dataset.class_name(data, worst)} ({row.classes[worst]:.3f}, "
                     f"{over[worst]:.1f}x its floor), best {dataset.class_name(data, best)} ({row.classes[best]:.3f}, "
                     f"{over[best]:.1f}x).")
    shares = {space: found["share_closer"] for space, found in row.memorisation.items()}
    nearer = max(shares.values())
    verdict = "COPIES: far more than unseen digits lie that near" if nearer > COPIES else "no sign of copying"
    where = ", ".join(f"{share:.2%} of the images in {space}" for space, share in shares.items())
    lines.append(f"Memorisation: {where} lie nearer to a training image than the nearest 1% of test images: {verdict}.")
    return "\n".join([*lines, *([f"Extractor {yardstick.extractor.digest}."] if yardstick.extractor else [])])


def explain_bound(likelihood: Likelihood, images: int) -> str:
    return (f"Bound: {likelihood.bits_per_dim:.3f} ± {likelihood.standard_error:.3f} bits/dim on {images:,} test images"
            f" (L_T {likelihood.L_T:.5f} + KL {likelihood.L_kl:.3f} + L_0 {likelihood.L_0:.3f}): an upper bound,\n"
            "for 8-bit 28x28 images, unpadded, without labels; its variances were chosen on training images.")


def save_pictures(folder: Path, images: Tensor, row: Row, yardstick: Yardstick, likelihood: Likelihood | None,
                  source: dict[str, str]) -> None:
    floor, test = yardstick.floor, yardstick.other_writers
    distances, indices = row.neighbours["pixels"]
    closest = distances.argsort()[:PAIRS]
    plots.save_neighbours(folder / "neighbours.png", images[closest], yardstick.train.images[indices[closest]],
                          distances[closest].tolist(), source)
    if yardstick.extractor is None:
        return

    def over_floor(row: Row) -> dict[str, tuple[float, float | None]]:
        named = {"all": "frechet", "texture": "texture"}
        within = {str(k): (row.classes[k] / floor.classes[k], None) for k in row.classes if k in floor.classes}
        return {name: yardstick.over_floor(key, row) for name, key in named.items()} | within

    pictured: dict[str, Any] = {
        "histogram": {"model": row.histogram, "asked": torch.bincount(yardstick.labels, minlength=10).tolist()},
        "distances_over_floor": over_floor(row), "other_writers": over_floor(test),
        "manifold": {"model": row.values, "real (floor)": floor.values, "noise": yardstick.noise.values},
        "neighbours": {"model": row.neighbours["pixels"][0].numpy(),
                       "test": yardstick.test_neighbours["pixels"][0].numpy()}}
    if likelihood is not None:
        pictured["by_timestep"] = {"t": list(likelihood.by_timestep), "bits": list(likelihood.by_timestep.values())}
    plots.save_evaluation(folder / "evaluation.png", pictured, source)


def sweep(trained: Trained, order: Order, yardstick: Yardstick | None, folder: Path, runtime: Runtime) -> list[Path]:
    """The same seeds with each sampler at several step counts: pictures, seconds per 256 images, and measures."""
    longest, count = trained.schedule.timesteps, len(order.indices)
    plan = [(sampler, steps) for sampler in SAMPLERS for steps in SWEEP_STEPS if steps < longest]
    plan.append(("ddpm", longest))
    cells: dict[tuple[str, int], Tensor] = {}
    seconds: dict[tuple[str, int], float] = {}
    quality: dict[tuple[str, int], float] = {}
    lines: list[dict[str, Any]] = []
    for sampler, steps in plan:
        options = replace(order.options, sampler=sampler, steps=steps, eta=0.0)  # type: ignore[arg-type]
        began = time.perf_counter()
        images = to_uint8(draw(trained, replace(order, options=options), runtime, progress=True))
        took = (time.perf_counter() - began) * 256 / count
        if yardstick is None:
            continue
        row = yardstick.measure(images, order.labels, neighbours=False)
        key = sampler, steps
        told = "frechet" if "frechet" in row.values else "texture"  # which takes no classifier
        cells[key], seconds[key], quality[key] = images[:8], took, yardstick.over_floor(told, row)[0]
        lines.append({"sampler": sampler, "steps": steps, "seconds_per_256": round(took, 3)})
        for measure in MEASURES:
            if measure.key in row.values:
                value, error = row.values[measure.key], row.errors.get(measure.key)
                if measure.good == "low":
                    value, error = yardstick.over_floor(measure.key, row)
                lines[-1] |= {measure.key: round(value, 4), f"{measure.key}_error": error and round(error, 4)}
        said = (f"{name} {value}" for name, value in lines[-1].items() if not name.endswith("error"))
        print("  ".join(said), flush=True)
    if yardstick is not None:
        text = io.StringIO()
        writer = csv.DictWriter(text, lines[0])
        writer.writeheader()
        writer.writerows(lines)
        write_atomically(folder / "sweep.csv", lambda file: file.write(text.getvalue().encode()))
        plots.save_sweep(folder / "sweep.png", cells, seconds, quality, origin(trained, order))
    runtime.barrier()
    return [folder / "sweep.png", folder / "sweep.csv"]
