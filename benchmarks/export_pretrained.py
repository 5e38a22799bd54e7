"""Makes checkpoints/pretrained.safetensors of a finished run: averaged weights and losses, nothing to train on.

    python benchmarks/export_pretrained.py checkpoints/mnist/last.safetensors

Weights are rounded to half precision unless --full is given; mode evaluate shows whether that costs anything.
"""

from pathlib import Path

from common import Parser, run_script

from support import checkpoint


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--target", type=Path, default=checkpoint.PRETRAINED)
    parser.add_argument("--full", action="store_true", help="keep float32")
    options = parser.parse(argv)
    state = checkpoint.load(options.source)
    ema = state["ema"] if options.full else {name: value.half() for name, value in state["ema"].items()}
    checkpoint.save(options.target, {**state, "ema": ema, "model": None, "optimizer": None})
    print(f"{options.target}: {options.target.stat().st_size / 1e6:.1f} MB, step {state['step']:,}, "
          f"weights {checkpoint.weights_digest(ema)}")


if __name__ == "__main__":
    run_script(main)
