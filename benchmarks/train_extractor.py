"""Trains checkpoints/extractor.safetensors, the classifier on whose features the figures of digits rest.

    python benchmarks/train_extractor.py            (a few minutes on two CPU cores)
    python benchmarks/train_extractor.py --verify   (measures the shipped file again)

A new file has a new digest, and figures compare only under one digest: train it again only to change it.
"""

from pathlib import Path

import torch
from common import Parser, config_of, run_script

import dataset
from config import UserError
from support.extractor import EPOCHS, EXTRACTOR, load_extractor, save_extractor, score, train_extractor


def main(argv: list[str]) -> None:
    parser = Parser(__doc__, "--data-dir", "--seed")
    parser.add_argument("--out", type=Path, default=EXTRACTOR, help="file to write, or to verify")
    parser.add_argument("--verify", action="store_true", help="only measure the file on the test images")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--generated", action="store_true", help="train on dataset/generated/ instead; needs --out")
    options = parser.parse(argv)
    if options.generated and options.out == EXTRACTOR:
        raise UserError("--generated: name another file with --out, so that the extractor stays what it is")

    config = config_of(options)
    test = dataset.load(config, "test")
    if not options.verify:
        digits = dataset.load_generated("train") if options.generated else dataset.load(config, "train")
        extractor = train_extractor(digits.images, digits.labels, options.seed, options.epochs)
        command = (f"python benchmarks/train_extractor.py --epochs {options.epochs} --seed {options.seed}"
                   f"{' --generated' * options.generated}")
        save_extractor(options.out, extractor, {"command": command, "torch": torch.__version__,
                                                **score(extractor, test.images, test.labels)})

    extractor = load_extractor(options.out)
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
