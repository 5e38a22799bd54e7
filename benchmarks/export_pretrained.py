"""Makes checkpoints/pretrained.pt of a finished run: averaged weights, configs and loss curve, nothing to train on.

python benchmarks/export_pretrained.py checkpoints/mnist/last.pt [--full]
Weights are rounded to half precision unless --full is given; mode evaluate shows whether that costs anything.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
import config as configs
from config import Config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--target", type=Path, default=Path("checkpoints/pretrained.pt"))
    parser.add_argument("--full", action="store_true", help="keep float32")
    options = parser.parse_args()

    state = checkpoint.load(options.source)
    ema = state["ema"] if options.full else {name: value.half() for name, value in state["ema"].items()}
    # Where the data lay and what was drawn afterwards are the trainer's own affair.
    stored = replace(configs.from_dict(Config, state["config"]), data_dir=Config().data_dir, sample=Config().sample, mode="train")
    checkpoint.save(options.target, {**state, "config": configs.to_dict(stored), "ema": ema, "model": None, "optimizer": None})
    print(f"{options.target}: {options.target.stat().st_size / 1e6:.1f} MB, step {state['step']:,}, "
          f"weights {checkpoint.weights_digest(ema)}")


if __name__ == "__main__":
    main()
