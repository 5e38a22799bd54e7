"""Trains, samples, evaluates or compares, as the `mode` flag in config.py says. `python run.py --help` lists all."""

import importlib
import sys

import support  # noqa: F401 (first, since it checks which modules these are)
from config import UserError
from support import console, settings

MODULES = {"train": "training.loop", "sample": "sample", "evaluate": "evaluation.evaluate",
           "compare": "evaluation.compare", "experiment": "evaluation.experiment"}


def main(argv: list[str] | None = None) -> int:
    """Runs one mode and returns the exit status: 0, 2 for what the user can mend, 128 + n after signal n."""
    with console.guarded_streams():
        try:
            config = settings.parse(sys.argv[1:] if argv is None else argv)
            from support import runtime as runtimes  # torch is imported from here on: a wrong flag was answered before

            with runtimes.start(config) as runtime:
                return importlib.import_module(MODULES[config.mode]).main(config, runtime) or 0
        except UserError as error:
            if console.place().rank == 0:
                print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main())
