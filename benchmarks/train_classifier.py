"""Trains checkpoints/classifier.safetensors, whose features the distances are between.

    python benchmarks/train_classifier.py            (a few minutes on two CPU cores)
    python benchmarks/train_classifier.py --verify   (measures the shipped file again)

A new file has a new digest, and figures compare only under one digest: train it again only to change it.
"""

from dataclasses import replace
from pathlib import Path

import torch
from common import Parser, config_of, run_script

from config import UserError
from evaluation.classifier import EPOCHS, SHIPPED, load_classifier, save_classifier, score, train_classifier
from support import loading


def main(argv: list[str]) -> None:
    parser = Parser(__doc__, "--data-dir", "--seed")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="file to write, or to verify")
    parser.add_argument("--verify", action="store_true", help="only measure the file on the test images")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--generated", action="store_true", help="train on dataset/generated/ instead; needs --out")
    options = parser.parse(argv)
    if options.generated and options.out == SHIPPED:
        raise UserError("--generated: name another file with --out, so that the shipped classifier stays what it is")

    config = config_of(options)
    test = loading.load_split(config, "test")
    if not options.verify:
        train = loading.load_split(replace(config, dataset="generated") if options.generated else config, "train")
        classifier = train_classifier(train.images, train.labels, options.seed, options.epochs)
        command = (f"python benchmarks/train_classifier.py --epochs {options.epochs} --seed {options.seed}"
                   f"{' --generated' * options.generated}")
        save_classifier(options.out, classifier, {"command": command, "torch": torch.__version__,
                                                  **score(classifier, test.images, test.labels)})

    classifier = load_classifier(options.out)
    scores, recorded = score(classifier, test.images, test.labels), classifier.meta["accuracy"]
    print(f"{options.out}  digest {classifier.digest}  {options.out.stat().st_size / 1e6:.2f} MB\n"
          f"trained by: {classifier.meta['command']}\n"
          f"{len(test)} test images: accuracy {scores['accuracy']:.2%}, confident of {scores['confident']:.2%}, "
          f"negative log-likelihood {scores['nll']:.4f} nats")
    if abs(scores["accuracy"] - recorded) > 2e-4:
        raise UserError(f"{options.out}: it records an accuracy of {recorded:.2%}, but {scores['accuracy']:.2%} was "
                        "measured; check --data-dir, or train it again")


if __name__ == "__main__":
    run_script(main)
