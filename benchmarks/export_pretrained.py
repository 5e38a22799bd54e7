"""Makes checkpoints/pretrained.pt of a finished run: averaged weights, configs and loss curve, nothing to train on.

python benchmarks/export_pretrained.py checkpoints/mnist/last.pt [--refiner checkpoints/refiner/last.pt] [--full]
A refiner trained alone (--refiner N --refiner-share 1) is put into the network of the first run. Weights are rounded
to half precision unless --full is given; mode evaluate shows whether that costs anything.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
import config as configs
from config import Config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--refiner", type=Path, help="a run with --refiner, whose refiner is taken")
    parser.add_argument("--target", type=Path, default=Path("checkpoints/pretrained.pt"))
    parser.add_argument("--full", action="store_true", help="keep float32")
    options = parser.parse_args()

    state = checkpoint.load(options.source)
    config, weights = configs.from_dict(Config, state["config"]), state["ema"]
    if options.refiner is not None:
        theirs = checkpoint.load(options.refiner)
        donor = configs.from_dict(Config, theirs["config"])

        def fitting(c: Config, state: dict[str, Any]) -> tuple[Any, ...]:
            return c.diffusion, c.model.embedding, c.model.groups, state["history"]["data"].get("digest")

        if not donor.model.refiner or fitting(donor, theirs) != fitting(config, state):
            raise SystemExit(f"{options.refiner}: it has no refiner, or one for another diffusion, embedding, groups or data than {options.source}")
        config = replace(config, model=replace(config.model, refiner=donor.model.refiner))
        weights = {name: value for name, value in weights.items() if not name.startswith("refiner.")}
        weights |= {name: value for name, value in theirs["ema"].items() if name.startswith("refiner.")}
    ema = weights if options.full else {name: value.half() for name, value in weights.items()}
    # Where the data lay and what was drawn afterwards are the trainer's own affair.
    stored = replace(config, data_dir=Config().data_dir, sample=Config().sample, mode="train")
    checkpoint.save(options.target, {**state, "config": configs.to_dict(stored), "ema": ema, "model": None, "optimizer": None})
    print(f"{options.target}: {options.target.stat().st_size / 1e6:.1f} MB, step {state['step']:,}, "
          f"weights {checkpoint.weights_digest(ema)}")


if __name__ == "__main__":
    main()
