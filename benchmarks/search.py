"""The search for the default recipe: sets of flags, each trained for the same seconds and scored by its samples.

    python benchmarks/search.py --seconds 300 --only default adamw --seeds 3 --jobs 2 --keep FOLDER
    python benchmarks/search.py --table                       (only the table of what search.jsonl holds)

A run has one thread and its time is CPU time, so that others on the machine cost a run little of it; on a GPU it is
wall-clock. The learning rate decays over those seconds. The score is the Fréchet distance of 2,000 images, sampled from
the averaged weights with the default sampler and without guidance, as a multiple of the baseline. Each run adds a line
to search.jsonl; with --keep its averaged weights become FOLDER/RECIPE-sSEED.safetensors, for run.py's --checkpoint.
Runs compare only under one classifier and precision; test losses only under one prediction, weighting and clip_loss.
"""

import argparse
import json
import math
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
from common import (
    HERE,
    QUALITY,
    Parser,
    Trainee,
    config_of,
    count,
    machine,
    make_reference,
    measured,
    quality,
    run_script,
    table,
)

from support import checkpoint, loading, settings
from support.files import make_folder
from support.runtime import start
from training.log import test_loss

# One knob at a time, and what the original paper has.
RECIPES: dict[str, str] = {
    "default": "",
    "batch 64": "--batch-size 64 --lr 2e-3 --ema 0.999",
    "batch 1024": "--batch-size 1024 --lr 8e-3 --ema 0.984",
    "warmup 25": "--warmup 25",
    "adamw": "--optimizer adamw",
    "lr 2e-3": "--lr 2e-3",
    "lr 8e-3": "--lr 8e-3",
    "lr cosine": "--lr-schedule cosine",
    "lr constant": "--lr-schedule constant",
    "ema 0.998": "--ema 0.998",
    "weight decay 0.1": "--weight-decay 0.1",
    "label dropout 0.1": "--label-dropout 0.1",
    "focus 0": "--focus 0",
    "focus 0.5": "--focus 0.5",
    "focus 0.85": "--focus 0.85",
    "plain loss": "--no-clip-loss",
    "min-snr": "--weighting min-snr",
    "noise": "--prediction noise",
    "x0": "--prediction x0",
    "linear v": "--schedule linear",
    "ddpm": "--schedule linear --prediction noise --no-clip-loss --focus 0 --lr-schedule constant --optimizer adamw "
            "--batch-size 128 --lr 2e-4 --ema 0.9999",
    "blocks 1-1-1": "--blocks 1 1 1",
    "blocks 1-1-2": "--blocks 1 1 2",
    "16-32-96": "--channels 16 32 96",
    "24-48-64": "--channels 24 48 64",
    "blocks 1-2-3": "--blocks 1 2 3",
    "attention": "--attention 7",
    "groups 8": "--groups 8",
    "groups 1": "--groups 1",
}


def train_and_measure(task: tuple[str, int, argparse.Namespace]) -> dict[str, Any]:
    """Trains one recipe with one seed for `options.seconds` and measures it; returns the line for search.jsonl."""
    name, seed, options = task
    torch.set_num_threads(1)
    config = config_of(options, "--seed", str(seed), *RECIPES[name].split())
    with start(config) as runtime:
        train, test = loading.load_both(config, runtime)
        trainee = Trainee(config, runtime, train, test)
        clock = time.process_time if runtime.device.type == "cpu" else time.perf_counter
        losses = []
        began, began_wall = clock(), time.perf_counter()
        while (progress := (clock() - began) / options.seconds) < 1:
            losses.append(trainee.step(progress).item())
        seconds, wall = clock() - began, time.perf_counter() - began_wall
        state, reference = trainee.state, make_reference(train, test, options.images)
        state.history["seconds"] = seconds
        levels = test_loss(state)
        metrics = measured(reference, *trainee.sample(options.images, guidance=1.0))
    if options.keep is not None:
        path = options.keep / f"{name.replace(' ', '-')}-s{seed}.safetensors"
        checkpoint.save(path, {"config": settings.stored(state.config), "model": None, "optimizer": None,
                               "ema": state.learner.average.state_dict(), "step": state.step, "history": state.history})
    parameters, gflop = count(state.learner.network)
    seen, last = state.step * config.train.batch_size, [loss for loss in losses[-100:] if math.isfinite(loss)]
    return {"recipe": name, "flags": RECIPES[name], "precision": state.config.precision, "seconds": options.seconds,
            "wall": round(wall), "seed": seed,
            "steps": state.step, "epochs": round(state.epoch(state.step), 3), "images_per_s": round(seen / seconds, 1),
            "parameters": parameters, "gflop": round(gflop, 4),
            "train_loss": round(sum(last) / max(1, len(last)), 5),
            "test_loss": round(sum(levels) / len(levels), 5), **metrics, "images": options.images,
            "classifier": reference.classifier and reference.classifier.digest, "machine": machine(runtime.device)}


def show(path: Path) -> str:
    """The table of all runs in a file, the best first within each length of training."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows.sort(key=lambda row: (row["seconds"], row["frechet"]))
    headings = ("seconds", "recipe", "flags", "seed", "images/s", "steps", "epochs", "test loss", *QUALITY)
    return table(headings, [
        (f"{row['seconds']:g}", row["recipe"], f"`{row['flags']}`" if row["flags"] else "", f"{row['seed']}",
         f"{row['images_per_s']:.0f}", f"{row['steps']:,}", f"{row['epochs']:.2f}", f"{row['test_loss']:.4f}",
         *quality(row)) for row in rows])


def main(argv: list[str]) -> None:
    parser = Parser(__doc__, "--data-dir", "--device", "--seed", "--images")
    parser.set_defaults(device="cpu")  # where runs have the same time beside each other; give a GPU one job
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--seconds", type=float, default=300, help="of training, in each run")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each recipe, from --seed on")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for each run's averaged weights")
    parser.add_argument("--out", type=Path, default=HERE / "search.jsonl", help="file to which each run adds a line")
    parser.add_argument("--table", action="store_true", help="only print the table of the file")
    options = parser.parse(argv)
    if options.keep is not None:
        make_folder(options.keep)
    if not options.table:
        tasks = [(name, options.seed + i, options) for i in range(options.seeds) for name in options.only]
        # Each run has a process of its own, whose CPU time is then the run's.
        with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
            for row in pool.imap_unordered(train_and_measure, tasks, chunksize=1):
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                run = f"{row['recipe']}, seed {row['seed']}"
                print(f"{run}: Fréchet {row['frechet']:.2f} x baseline, {row['confident']:.1%} confident", flush=True)
    print(show(options.out))


if __name__ == "__main__":
    run_script(main)
