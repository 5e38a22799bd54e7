"""The search for the default recipe: named sets of flags, each trained for the same seconds and scored by what it draws.

    python benchmarks/search.py --list
    python benchmarks/search.py --seconds 300 --only default adamw --jobs 2
    python benchmarks/search.py --table                       (only the table of what search.jsonl holds)

A run has one thread and its time is CPU time, so that others on the machine cost a run little of it; on a GPU it is
wall-clock. The learning rate decays over those seconds. The score is the Fréchet distance of 2,000 images drawn by the
averaged weights with the default sampler, without guidance, over that of as many real ones. Each run adds one line to
search.jsonl. Runs compare only under one extractor; test losses only under one prediction, weighting and clip_loss.
"""

import argparse
import json
import multiprocessing
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import QUALITY_IMAGES, load_digits, machine, make_judge, table

import config as configs
import sample
import train
from config import UserError
from diffusion import make_schedule
from model import count_parameters, gflop_per_image
from runtime import Runtime, choose_device, compiled, to_uint8

RESULTS = Path(__file__).resolve().parent / "search.jsonl"

# In order of how much each was expected to tell.
RECIPES: dict[str, str] = {
    "default": "",
    "adamw": "--optimizer adamw",
    "muon lr 5e-3": "--lr 5e-3",
    "plain loss": "--no-clip-loss",
    "blocks 1-2-2": "--blocks 1 2 2",
    "wide 16-48-128": "--channels 16 48 128",
    "batch 32": "--batch-size 32",
    "min-snr": "--weighting min-snr",
    "noise": "--prediction noise",
    "ddpm": "--prediction noise --schedule linear --no-clip-loss",
    "no attention": "--attention",
    "muon lr 1e-3": "--lr 1e-3",
    "batch 128": "--batch-size 128",
    "adamw lr 1e-3": "--optimizer adamw --lr 1e-3",
    "adamw lr 5e-3": "--optimizer adamw --lr 5e-3",
    "x0": "--prediction x0",
    "linear v": "--schedule linear",
    "ema 0.998": "--ema 0.998",
    "ema 0.9995": "--ema 0.9995",
    "ema off": "--ema 0",
    "lr cosine": "--lr-schedule cosine",
    "lr constant": "--lr-schedule constant",
    "muon lr 1e-2": "--lr 1e-2",
    "batch 32 lr 1e-3": "--batch-size 32 --lr 1e-3",
    "no weight decay": "--weight-decay 0",
    "narrow 8-32-96": "--channels 8 32 96",
    "blocks 2-1-1": "--blocks 2 1 1",
    "original": "--no-clip-loss --prediction noise --schedule linear --optimizer adamw --lr 1e-4 --lr-schedule constant --batch-size 128",
}


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Trains one recipe for `options.seconds`, draws and scores; returns the line for search.jsonl."""
    torch.set_num_threads(1)
    config = configs.parse([*RECIPES[name].split(), "--data-dir", str(options.data_dir), "--seed", str(options.seed),
                            "--device", options.device])
    device = choose_device(config.device)
    runtime = Runtime(device, bf16=device.type == "cuda", compile=device.type == "cuda")
    digits, test = (part.to(device) for part in load_digits(config.data_dir))
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    schedule = make_schedule(config.diffusion)
    state = train.new_state(config, runtime, {})
    forward = compiled(state.network, runtime)
    state.network.train()
    losses: list[float] = []
    began, began_wall = clock(), time.perf_counter()
    while (progress := (clock() - began) / options.seconds) < 1:
        state.optimizer.set_rate(train.learning_rate(config.train, state.step, progress))
        loss = train.training_step(forward, state, schedule, digits, config, runtime)
        state.step += 1
        if loss is not None:
            losses.append(float(loss))
    seconds, wall = clock() - began, time.perf_counter() - began_wall

    network = state.average.module.eval()
    test_loss = train.test_loss(network, schedule, test, config, runtime)
    labels = sample.choose_labels(None, options.seed, range(options.images))
    drawing = replace(config.sample, guidance=1.0)
    images = sample.draw(network, schedule, drawing, options.seed, range(options.images), labels, runtime)
    judge = make_judge(digits, test, options.images, device)
    quality = judge(to_uint8(images), labels)
    seen = state.step * config.train.batch_size
    return {"recipe": name, "flags": RECIPES[name], "seconds": options.seconds, "wall": round(wall), "seed": options.seed,
            "steps": state.step, "epochs": round(seen / len(digits), 3), "images_per_s": round(seen / seconds, 1),
            "parameters": count_parameters(state.network), "gflop": round(gflop_per_image(config.model), 4),
            "train_loss": round(sum(losses[-100:]) / max(1, len(losses[-100:])), 5),
            "test_loss": round(sum(test_loss) / len(test_loss), 5), **quality, "judged_on": options.images,
            "extractor": judge.extractor.digest, "machine": machine(device)}


def _run(task: tuple[str, argparse.Namespace]) -> dict[str, Any]:
    return run(*task)


def show(path: Path) -> str:
    """The tables of all runs in a file, the best first within each length of training; one for each way of judging."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows.sort(key=lambda row: (row["seconds"], row["over_floor"]))
    judges = dict.fromkeys((row["extractor"], row["judged_on"]) for row in rows)
    return "\n\n".join(f"Judged by extractor {extractor} on {count:,} images:\n\n" + table(
        ("seconds", "recipe", "flags", "images/s", "steps", "epochs", "test loss", "Fréchet / floor", "sure", "as asked"),
        [(f"{row['seconds']:g}", row["recipe"], f"`{row['flags']}`" if row["flags"] else "", f"{row['images_per_s']:.0f}",
          f"{row['steps']:,}", f"{row['epochs']:.2f}", f"{row['test_loss']:.4f}", f"{row['over_floor']:.2f}",
          f"{row['sure']:.1%}", f"{row['asked']:.1%}") for row in rows if (row["extractor"], row["judged_on"]) == (extractor, count)])
        for extractor, count in judges)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("dataset"), help="folder of the data, as for run.py")
    parser.add_argument("--only", nargs="+", choices=RECIPES, metavar="RECIPE", default=list(RECIPES), help="these recipes alone")
    parser.add_argument("--seconds", type=float, default=300, help="of training, in each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--images", type=int, default=QUALITY_IMAGES, help="drawn for each Fréchet distance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto; give a GPU one job")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file to which each run adds a line")
    parser.add_argument("--list", action="store_true", help="only list the recipes")
    parser.add_argument("--table", action="store_true", help="only print the table of the file")
    options = parser.parse_args(argv)
    if options.list:
        print(table(("recipe", "flags"), list(RECIPES.items())))
        return
    if not options.table:
        # Each run has a process of its own, whose CPU time is then the run's.
        with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
            for row in pool.imap_unordered(_run, [(name, options) for name in options.only], chunksize=1):
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{row['recipe']}: {row['over_floor']:.2f} x floor, {row['sure']:.1%} sure", flush=True)
    print(show(options.out))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"search: {error}", file=sys.stderr)
        sys.exit(2)
