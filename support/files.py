"""Files that appear whole or not at all, the folders they lie in, and the lock on a run's folder. Imports no torch."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from config import UserError


def write_atomically(path: Path, write: Callable[[BinaryIO], Any],
                     before: Callable[[Path], None] | None = None) -> None:
    """Calls write(binary file) on a file beside path, which then takes its place.

    Just before that, calls before(path). Raises UserError if it can't be written, and leaves path as it was.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if before is not None:
            before(path)
        os.replace(part, path)
        _sync_folder(path.parent)
    except OSError as error:
        advice = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some space",
                  errno.ENOENT: "make its folder first"}.get(error.errno or 0, "make it writable, or check the disk")
        kept = "; the file that was there is untouched" if path.is_file() else ""
        raise UserError(f"{path}: can't be written ({error.strerror or error}): {advice}{kept}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: can't be made ({error.strerror}); choose another --name, or free the place") from None
    return path


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds a run's folder; raises UserError if another process does. The system frees it, however a process ends."""
    try:
        held = filelock.FileLock(folder / "lock", timeout=0).acquire()
    except filelock.Timeout:
        raise UserError(f"another run of this name is going on ({folder}): wait, or choose another --name") from None
    except (OSError, NotImplementedError) as error:
        raise UserError(f"{folder}: can't be locked ({error}); make it writable, or choose another --name") from None
    with held:
        yield
