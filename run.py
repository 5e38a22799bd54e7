"""Trains, draws or evaluates: does what the `mode` flag in config.py says. `python run.py --help` lists every flag."""

import contextlib
import importlib
import os
import sys

import config as configs
from config import UserError


def main(argv: list[str] | None = None) -> int:
    """Runs one mode and returns the exit status: 0, 2 for what the user can mend, 128 + n after signal n."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # in a notebook they are something else
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a console that lacks a letter ends no run
    try:
        config = configs.parse(sys.argv[1:] if argv is None else argv)
        from support import runtime  # torch is imported from here on: a wrong flag was answered before

        with runtime.start(config) as here:
            status = 0
            if config.mode == "train":
                status, trained = importlib.import_module("train").run(config, here)
                if trained is not None:
                    importlib.import_module("sample").run(trained, here)
            else:
                importlib.import_module(config.mode).run(config, here)
            return status
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
