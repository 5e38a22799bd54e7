"""Evaluates one checkpoint with several samplers, step counts and guidance scales.

    python benchmarks/sweep.py --sampler sa ddim --steps 5 13 --guidance 1 1.7 --checkpoint pretrained --seed 100

All other flags are those of run.py. Each row is written to the CSV file as soon as it is measured, and a row that is
there already, of the same weights, images and settings, is skipped: the same command again goes on where it stopped.
"""

import csv
import io
import itertools
from operator import methodcaller
from pathlib import Path
from typing import Any

from common import HERE, Parser, run_script

import config as configs
import dataset
from evaluation.evaluate import require_its_images
from evaluation.reference import make_reference, rows
from sample import load_checkpoint, make_request, provenance, sample_images
from support import runtime
from support.files import write_atomically


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    for flag, default in (("--sampler", "sa dpmpp ddim ddpm"), ("--steps", "5 8 10 15 25 50"), ("--guidance", "1.7")):
        parser.add_argument(flag, nargs="+", default=default.split(), help=f"unset: {default}")
    parser.add_argument("--out", type=Path, default=HERE / "sweep.csv", help="the CSV file")
    options, flags = parser.parse_known_args(argv)
    settings = [configs.parse(["--mode", "evaluate", "--sampler", sampler, "--steps", steps, "--guidance", w, *flags])
                for sampler, steps, w in itertools.product(options.sampler, options.steps, options.guidance)]
    table: list[Any] = [*csv.DictReader(options.out.open(encoding="utf-8"))] if options.out.exists() else []
    with runtime.start(settings[0]) as here:
        config = dataset.settle(settings[0], here)
        model, data = load_checkpoint(Path(str(config.sample.checkpoint)), here), dataset.load_both(config, here)
        require_its_images(model, images := dataset.describe(data[0], config.dataset), settings[0].dataset != "auto")
        requests = [make_request(model, each.sample, each.seed, each.sample.num_images or 10_000) for each in settings]
        reference = make_reference(config, *data, requests[0].labels)
        for request in requests:
            row = provenance(model, request) | {
                "images": str(len(request.labels)), "compared_with": images["digest"],
                "classifier": reference.classifier.digest if reference.classifier else ""}
            if any({key: other.get(key) for key in row} == row for other in table):
                continue
            sampled = dataset.to_uint8(sample_images(model, request, progress=True)[0])
            found = rows(reference.measure(sampled, request.labels)[0], reference.baseline)
            table.append(row | {"evaluations": request.evaluations} | {
                f"{key}_{part}".removesuffix("_value"): n for key, one in found.items() for part, n in one.items()})
            writer = csv.DictWriter(text := io.StringIO(), list(dict.fromkeys(key for each in table for key in each)))
            writer.writeheader()
            writer.writerows(table)
            write_atomically(options.out, methodcaller("write", text.getvalue().encode()))
            print(row["sampler"], row["steps"], row["guidance"], {key: one["value"] for key, one in found.items()})


if __name__ == "__main__":
    run_script(main)
