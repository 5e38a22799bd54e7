"""Which code decides a training step: the files that say so, each with a digest of its text when it was imported."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from config import ROOT

IMPORTED: dict[str, str] = {}  # file, relative to ROOT -> digest


def register(path: str) -> None:
    """Called by a file that decides what a training step does, as it is imported; its digest is kept with each run.

    config.py is not among them: its values are stored and compared one by one.
    """
    name = Path(path).resolve().relative_to(ROOT).as_posix()
    IMPORTED[name] = digest(name)


def digest(name: str) -> str:
    """16 hex digits of a file as it is now, which in a notebook may not be what was imported."""
    return hashlib.sha256((ROOT / name).read_text("utf-8").encode()).hexdigest()[:16]


def note_edits(say: Callable[[str], None]) -> None:
    """Says which files are no longer what was imported, as in a notebook that goes on after an edit."""
    imported = {**IMPORTED, "config.py": CONFIG}
    if edited := [name for name, text in imported.items() if not (ROOT / name).is_file() or digest(name) != text]:
        say(f"note: {', '.join(edited)} changed since Python imported it, and training goes by what was imported. To "
            "use the change, restart the notebook's kernel or the program.")


CONFIG = digest("config.py")
