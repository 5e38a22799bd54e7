"""Trains, draws or evaluates: does what the `mode` flag in config.py says. `python run.py --help` lists every flag."""

import importlib
import os
import sys

import config as configs
from config import UserError


def main(argv: list[str] | None = None) -> int:
    """Runs one mode and returns the exit status: 0, 2 for what the user can mend, 128 + n after signal n."""
    try:
        config = configs.parse(sys.argv[1:] if argv is None else argv)
        import runtime  # torch is imported from here on: a wrong flag was answered before

        mode = importlib.import_module(config.mode)
        with runtime.start(config) as here:
            return mode.run(config, here) or 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
