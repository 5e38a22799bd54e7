"""Evaluates one checkpoint with several settings of sampling, on the pooled images of several seeds.

    python benchmarks/sweep.py --checkpoint pretrained --seeds 100 101 -- "" "--guidance 2" "--sampler ddim --steps 25"
    python benchmarks/sweep.py --num-images 1000 -- "--sampler "{sa,dpmpp,ddim,ddpm}" --steps "{5,8,10,15,25,50}

Each setting is one word: sampling flags of run.py. All flags before -- are run.py's as well, for all settings;
--num-images is for each seed. Each row is written to the CSV file as soon as it is measured, and a row that is there
already, of the same weights, images and settings, is skipped: the same command again goes on where it stopped.
"""

import csv
import io
import shlex
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch
from common import HERE, Parser, run_script

import dataset
from config import UserError
from evaluation.evaluate import require_training_images
from evaluation.reference import make_reference, rows
from sample import load_checkpoint, make_request, provenance, sample_images
from support import loading, selection, settings
from support.files import write_atomically
from support.runtime import start


def main(argv: list[str]) -> None:
    cut = argv.index("--") if "--" in argv else len(argv)
    flags_for_all, words = argv[:cut], argv[cut + 1:]
    parser = Parser(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="whose images are pooled")
    parser.add_argument("--out", type=Path, default=HERE / "sweep.csv", help="the CSV file")
    options, flags = parser.parse_known_args(flags_for_all)
    if not words:
        raise UserError('give settings after --, one word each, such as "--guidance 2"; see --help')
    for word in words:
        if shared := {*settings.given(shlex.split(word))} - {*settings.SAMPLING}:
            raise UserError(f"'{word}': a setting is how it is sampled ({', '.join(settings.SAMPLING)}); give "
                            f"{', '.join(sorted(shared))} before --, for all of them")
    common = settings.parse(["--mode", "evaluate", *flags])
    configs = [settings.parse(["--mode", "evaluate", *shlex.split(word)], common) for word in words]
    if "seed" in settings.given(flags):
        raise UserError("--seed: give --seeds, whose images are pooled")
    seeds = options.seeds
    table: list[Any] = [*csv.DictReader(options.out.read_text("utf-8").splitlines())] if options.out.exists() else []
    with start(configs[0]) as runtime:
        config = selection.settle(configs[0], runtime)
        model, data = load_checkpoint(Path(str(config.sample.checkpoint)), runtime), loading.load_both(config, runtime)
        images = dataset.describe(data[0], config.dataset)
        require_training_images(model, images, explicit=configs[0].dataset != "auto")
        reference = None
        for setting in configs:
            count = setting.sample.num_images or 10_000
            requests = [make_request(model, setting.sample, seed, count) for seed in seeds]
            labels = torch.cat([request.labels for request in requests])
            reference = reference or make_reference(config, *data, labels)
            row = provenance(model, requests[0]) | {
                "seed": " ".join(map(str, seeds)), "images": str(len(labels)), "compared_with": images["digest"],
                "classifier": reference.classifier.digest if reference.classifier else ""}
            if any({key: line.get(key) for key in row} == row for line in table):
                continue
            sampled = torch.cat([sample_images(model, request, progress="sampling")[0] for request in requests])
            metrics = rows(reference.measure(dataset.to_uint8(sampled), labels).estimates, reference.baseline)
            table.append(row | {"evaluations": requests[0].evaluations} | {
                f"{key}_{part}".removesuffix("_value"): number
                for key, metric in metrics.items() for part, number in metric.items()})
            writer = csv.DictWriter(text := io.StringIO(), list(dict.fromkeys(key for line in table for key in line)))
            writer.writeheader()
            writer.writerows(table)
            write_atomically(options.out, methodcaller("write", text.getvalue().encode()))
            print(" ".join(row[key] for key in ("sampler", "steps", "spacing", "guidance", "guidance_interval")),
                  {key: round(metric.get("ratio", metric["value"]), 3) for key, metric in metrics.items()}, flush=True)


if __name__ == "__main__":
    run_script(main)
