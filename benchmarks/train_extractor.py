"""Trains checkpoints/extractor.safetensors, the digit classifier on whose features every quality figure rests.

    python benchmarks/train_extractor.py            (a few minutes on two CPU cores)
    python benchmarks/train_extractor.py --verify   (measures the shipped file again)

A new file has a new digest, and figures compare only under one digest: train it again only to change it.
"""

import json
import math
import time
from argparse import Namespace
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
import torch.nn.functional as F
from common import Parser, config_of, run_script
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dataset
from config import UserError
from support import metrics
from support.checkpoint import weights_digest
from support.files import make_folder, write_atomically
from support.runtime import to_unit

ROTATION, SCALE, SHIFT, SHEAR = 12.0, 0.12, 2.0, 0.15  # largest change: degrees, share, pixels, share


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each of the images x [B, 1, 28, 28] in [-1, 1] rotated, scaled, sheared and shifted by its own random amounts."""
    angle, wide, high, shear, right, down = torch.rand(6, len(x), generator=generator) * 2 - 1  # each [B]
    cos, sin = (angle * math.radians(ROTATION)).cos(), (angle * math.radians(ROTATION)).sin()
    wide, high, shift = 1 + SCALE * wide, 1 + SCALE * high, SHIFT * 2 / 28
    rows = [torch.stack([cos * wide, SHEAR * shear - sin * wide, shift * right], dim=1),
            torch.stack([sin * high, cos * high, shift * down], dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(x.shape), align_corners=False)  # [B, 28, 28, 2]
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # black outside


def train(images: Tensor, labels: Tensor, options: Namespace) -> metrics.Extractor:
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    network = metrics.Extractor().to(memory_format=torch.channels_last)
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.995), use_buffers=True)
    steps = options.epochs * (len(images) // options.batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps, pct_start=0.2)
    started = time.perf_counter()
    for epoch in range(options.epochs):
        total = 0.0
        order = torch.randperm(len(images), generator=generator)
        for index in order[:len(order) // options.batch_size * options.batch_size].split(options.batch_size):
            x = augment(to_unit(images[index]), generator).to(memory_format=torch.channels_last)
            loss = F.cross_entropy(network(x)[1], labels[index], label_smoothing=options.smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            averaged.update_parameters(network)
            total += loss.item() * len(index)
        seconds = time.perf_counter() - started
        print(f"epoch {epoch + 1}/{options.epochs}  loss {total / len(order):.4f}  {seconds:.0f} s", flush=True)
    return cast(metrics.Extractor, averaged.module.eval())


def score(extractor: metrics.Extractor, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, share of digits it is sure of, and mean negative log-likelihood in nats."""
    probabilities = metrics.extract(extractor, images).probabilities
    likeliest = probabilities.max(1)
    return {"accuracy": (likeliest.indices == labels).double().mean().item(),
            "sure": (likeliest.values > metrics.SURE).double().mean().item(),
            "nll": F.nll_loss(probabilities.log(), labels).item()}


def save(path: Path, extractor: metrics.Extractor, meta: dict[str, object]) -> None:
    state = {name: tensor.contiguous() for name, tensor in extractor.state_dict().items()}
    data = safetensors.torch.save(state, {"digest": weights_digest(state), "meta": json.dumps(meta)})
    make_folder(path.parent)
    write_atomically(path, lambda file: file.write(data))


def main(argv: list[str]) -> None:
    parser = Parser(__doc__, "--data-dir", "--seed")
    parser.add_argument("--out", type=Path, default=metrics.EXTRACTOR, help="file to write, or to verify")
    parser.add_argument("--verify", action="store_true", help="only measure the file on the test images")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--smoothing", type=float, default=0.03, help="of the labels; more makes it less sure")
    parser.add_argument("--generated", action="store_true", help="train on dataset/generated/ instead; needs --out")
    options = parser.parse(argv)
    if options.generated and options.out == metrics.EXTRACTOR:
        raise UserError("--generated: name another file with --out, so that the extractor stays what it is")

    config = config_of(options)
    test = dataset.load(config, "test")
    if not options.verify:
        digits = dataset.load_generated("train") if options.generated else dataset.load(config, "train")
        extractor = train(digits.images, digits.labels, options)
        command = (f"python benchmarks/train_extractor.py --epochs {options.epochs} --batch-size {options.batch_size} "
                   f"--lr {options.lr:g}{' --generated' * options.generated} --smoothing {options.smoothing:g} "
                   f"--seed {options.seed}")
        measured = score(extractor, test.images, test.labels)
        save(options.out, extractor, {"command": command, "torch": torch.__version__, **measured})

    extractor = metrics.load_extractor(options.out)
    found, recorded = score(extractor, test.images, test.labels), extractor.meta["accuracy"]
    print(f"{options.out}  digest {extractor.digest}  {options.out.stat().st_size / 1e6:.2f} MB\n"
          f"trained by: {extractor.meta['command']}\n"
          f"{len(test)} test images: accuracy {found['accuracy']:.2%}, sure (p > 0.9) of {found['sure']:.2%}, "
          f"negative log-likelihood {found['nll']:.4f} nats")
    if abs(found["accuracy"] - recorded) > 2e-4:
        raise UserError(f"{options.out}: it records an accuracy of {recorded:.2%}, but {found['accuracy']:.2%} was "
                        "measured; check --data-dir, or train it again")


if __name__ == "__main__":
    run_script(main)
