"""Trains checkpoints/extractor.pt, the digit classifier whose features every quality figure of this project rests on.

    python benchmarks/train_extractor.py            (a few minutes on two CPU cores)
    python benchmarks/train_extractor.py --verify   (measures the shipped file again)

A new file has a new digest, and figures compare only under one digest: train it again only to change it.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import metrics  # noqa: E402
from checkpoint import write_atomically  # noqa: E402
from config import UserError  # noqa: E402
from dataset import load_generated, load_mnist  # noqa: E402
from runtime import to_unit  # noqa: E402

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


def train(images: Tensor, labels: Tensor, args: argparse.Namespace) -> metrics.Extractor:
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    network = metrics.Extractor().to(memory_format=torch.channels_last)
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.995), use_buffers=True)
    steps = args.epochs * (len(images) // args.batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.2)
    started = time.perf_counter()
    for epoch in range(args.epochs):
        total = 0.0
        order = torch.randperm(len(images), generator=generator)
        for index in order[:len(order) // args.batch_size * args.batch_size].split(args.batch_size):
            x = augment(to_unit(images[index]), generator).to(memory_format=torch.channels_last)
            loss = F.cross_entropy(network(x)[1], labels[index], label_smoothing=args.smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            averaged.update_parameters(network)
            total += loss.item() * len(index)
        print(f"epoch {epoch + 1}/{args.epochs}  loss {total / len(order):.4f}  "
              f"{time.perf_counter() - started:.0f} s", flush=True)
    return averaged.module.eval()


def score(extractor: metrics.Extractor, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, share of digits it is sure of, and mean negative log-likelihood in nats."""
    probabilities = metrics.extract(extractor, images).probabilities
    return {"accuracy": metrics.drawn_as_asked(probabilities, labels), "sure": metrics.sure_share(probabilities),
            "nll": F.nll_loss(probabilities.log(), labels).item()}


def save(path: Path, extractor: metrics.Extractor, meta: dict[str, object]) -> None:
    state = {name: tensor.clone().contiguous() for name, tensor in extractor.state_dict().items()}
    stored = {"state": state, "digest": metrics.digest_of(state), "meta": meta}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: torch.save(stored, file))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("dataset"), help="folder of the data, as for run.py")
    parser.add_argument("--out", type=Path, default=metrics.EXTRACTOR, help="file to write, or to verify")
    parser.add_argument("--verify", action="store_true", help="only measure the file on the test images")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--smoothing", type=float, default=0.03, help="of the labels; more makes it less sure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generated", action="store_true", help="train on dataset/generated/ instead; needs --out")
    args = parser.parse_args(argv)
    if args.generated and args.out == metrics.EXTRACTOR:
        raise UserError("--generated: name another file with --out, so that the extractor stays what it is")

    test = load_mnist(args.data_dir, "test")
    if not args.verify:
        digits = load_generated("train") if args.generated else load_mnist(args.data_dir, "train")
        extractor = train(digits.images, digits.labels, args)
        settings = f"--epochs {args.epochs} --batch-size {args.batch_size} --lr {args.lr:g}"
        settings += " --generated" * args.generated
        command = f"python benchmarks/train_extractor.py {settings} --smoothing {args.smoothing:g} --seed {args.seed}"
        save(args.out, extractor, {"command": command, "torch": str(torch.__version__),
                                   **score(extractor, test.images, test.labels)})

    extractor = metrics.load_extractor(args.out)
    found = score(extractor, test.images, test.labels)
    print(f"{args.out}  digest {extractor.digest}  {args.out.stat().st_size / 1e6:.2f} MB\n"
          f"trained by: {extractor.meta['command']}\n"
          f"{len(test.images)} test images: accuracy {found['accuracy']:.2%}, sure (p > 0.9) of {found['sure']:.2%}, "
          f"negative log-likelihood {found['nll']:.4f} nats")
    recorded = extractor.meta["accuracy"]
    if abs(found["accuracy"] - recorded) > 2e-4:
        raise UserError(f"{args.out}: it records an accuracy of {recorded:.2%}, but {found['accuracy']:.2%} was "
                        "measured; check --data-dir, or train it again")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"train_extractor: {error}", file=sys.stderr)
        sys.exit(2)
