"""What the program says: lines, progress bars, streams that may be closed, torchrun's process that speaks. No torch."""

import contextlib
import os
import shutil
import sys
import textwrap
import warnings
from collections import namedtuple
from collections.abc import Iterator
from typing import Any, cast

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
Place = namedtuple("Place", "rank world local_rank local_world", defaults=(0, 1, 0, 1))


def place() -> Place:
    """This process's place, from torchrun's environment; alone unless all of it is there and makes sense."""
    try:
        rank, world, local_rank, local_world = numbers = Place(*(int(os.environ[name]) for name in TORCHRUN[:4]))
        sensible = 0 <= local_rank <= rank < world and local_rank < local_world
        return numbers if sensible and all(os.environ[name] for name in TORCHRUN) else Place()
    except (KeyError, ValueError):
        return Place()


def say(text: str, file: Any = None) -> None:
    """Prints lines at once, above a progress bar if there is one; folds prose to the width of a terminal."""
    from tqdm import tqdm

    stream = file or sys.stdout
    if stream.isatty():
        width = shutil.get_terminal_size().columns
        text = "\n".join(_fold(line, width) for line in text.split("\n"))
    with tqdm.external_write_mode():
        print(text, file=stream, flush=True)


def _fold(line: str, width: int) -> str:
    """The line in lines of that width, with its words whole; as it is where two spaces make it part of a table."""
    return line if "  " in line else textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)


def progress_bar(shown: bool = True, **options: Any) -> Any:
    """A bar of tqdm in a terminal, a widget in a notebook; none, which its `disable` says, into a file or a pipe.

    tqdm's environment variables (TQDM_DISABLE, TQDM_MININTERVAL, ...) go before the options.
    """
    with warnings.catch_warnings():  # of a notebook without ipywidgets, where there is no bar either
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
    # dynamic_ncols: else each refresh leaves a line after the window was narrowed
    options = {"disable": None, "dynamic_ncols": True, "mininterval": 0.5, "smoothing": 0.05} | options
    if "TQDM_NCOLS" in os.environ:
        del options["dynamic_ncols"]
    options = {name: value for name, value in options.items() if f"TQDM_{name.upper()}" not in os.environ}
    return tqdm(**options | ({} if shown else {"disable": True}))


class Guarded:
    """A console stream whose write and flush never raise: a closed console must not end or change a run."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def isatty(self) -> bool:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            return self._stream.isatty()
        return False

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """Within the block sys.stdout and sys.stderr are Guarded; a missing one takes what is written and drops it."""
    with contextlib.ExitStack() as stack:
        while (null := os.open(os.devnull, os.O_RDWR)) <= 2:  # in place of standard streams that are closed,
            os.set_inheritable(null, True)  # else the next file, perhaps a checkpoint, would become "standard error"
        stack.callback(os.close, null)
        for redirect, before in ((contextlib.redirect_stdout, sys.stdout), (contextlib.redirect_stderr, sys.stderr)):
            stream: Any = before or stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            with contextlib.suppress(AttributeError, ValueError, OSError):  # in a notebook it is something else
                stream.reconfigure(errors="replace")  # for a console that lacks a letter
            stack.enter_context(redirect(cast(Any, Guarded(stream))))
            stack.callback(_drain, stream, null)
        yield


def _drain(stream: Any, null: int) -> None:
    """Flushes a stream, into nothing if its reader is gone: the interpreter would complain of it at its end."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(null, stream.fileno())
            stream.flush()
