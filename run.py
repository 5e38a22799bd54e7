"""Does what the `mode` flag in config.py says: trains, samples, or measures. `python run.py --help` lists all flags."""

import builtins
import importlib
import os
import sys

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which PYTHONSAFEPATH leaves out

import support  # noqa: F401 (first, since it checks which modules these are)
from config import UserError
from support import console, settings

MODULES = {"train": "training.loop", "sample": "sample", "evaluate": "evaluation.evaluate",
           "compare": "evaluation.compare", "experiment": "evaluation.experiment"}


def main(argv: list[str] | None = None) -> int | None:
    """Runs one mode and returns the exit status: 0, 2 for what the user can mend, 128 + n after signal n.

    In a notebook there is no status: nothing is returned, and an error or a stop is raised, so that later cells wait.
    """
    notebook = "get_ipython" in vars(builtins)
    with console.guarded_streams():
        try:
            status = _run(sys.argv[1:] if argv is None else argv)
        except UserError as error:
            if notebook:
                raise
            if console.place().rank == 0:
                console.say(f"error: {error}", sys.stderr)
            status = 2
        except KeyboardInterrupt:
            status = 130
    if notebook and status > 128:
        raise KeyboardInterrupt
    return None if notebook else status


def _run(argv: list[str]) -> int:
    config = settings.parse(argv)
    from support import runtime as runtimes  # torch is imported from here on: a wrong flag was answered before

    with runtimes.start(config) as runtime, runtimes.memory_errors(config, runtime):
        return importlib.import_module(MODULES[config.mode]).main(config, runtime) or 0


if __name__ == "__main__":
    sys.exit(main())
