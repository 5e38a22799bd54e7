"""Files that appear whole or not at all, the folders they lie in, and the lock on a run's folder. Imports no torch."""

import contextlib
import errno
import json
import os
import platform
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from config import UserError
from support.console import say

LOCK, HOLDER = "lock", "lock-holder"  # in a run's folder; the second says which process holds the first


class WriteError(UserError):
    """A file can't be written now. On a network drive or a full disk, or while others read it, this may pass."""


def write_atomically(path: Path, write: Callable[[BinaryIO], Any], before: Callable[[Path], Any] | None = None) -> None:
    """Calls write(binary file) on a file beside path, and before(path); then the file takes the place of path.

    A link stays, and its target is replaced. Raises WriteError if path can't be written, and leaves it as it was.
    """
    target = Path(os.path.realpath(path)) if os.path.islink(path) else path  # os.path raises no error of a drive
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if before is not None:
            before(path)
        os.replace(part, target)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # so that it survives a power cut,
            descriptor = os.open(target.parent, os.O_RDONLY)  # where a folder can be synchronized
            stack.callback(os.close, descriptor)
            os.fsync(descriptor)
    except OSError as error:
        advice = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some space",
                  errno.ENOENT: "make its folder first"}.get(error.errno or 0, "make it writable, or check the disk")
        kept = "; the file that was there is untouched" if os.path.isfile(path) else ""
        raise WriteError(f"{path}: can't be written ({error.strerror or error}): {advice}{kept}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes plain values, nested in dicts and lists, as indented JSON."""
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def write_results(folder: Path, writers: Mapping[str, Callable[[Path], None]]) -> list[Path]:
    """Calls each writer of a picture or table with its path, and returns those written; others only cause a warning."""
    written = []
    for name, write in writers.items():
        try:
            write(folder / name)
            written.append(folder / name)
        except (UserError, ImportError, OSError, ValueError) as error:  # a full disk, a matplotlib that can't be loaded
            problem = error if isinstance(error, UserError) else f"{folder / name}: {type(error).__name__}: {error}"
            say(f"WARNING: {problem}")
    return written


def make_folder(path: Path) -> Path:
    """Makes a folder and those above it; raises UserError, which names the one that is in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        obstacle = next((part for part in (*reversed(path.parents), path) if not os.path.isdir(part)), path)
        advice = f"make {obstacle.absolute().parent} writable, or run this in a folder that is"
        if os.path.lexists(obstacle):
            advice = dead_link(obstacle) or f"{obstacle} is a file: move it away"
        elif error.errno == errno.ENAMETOOLONG:
            advice = "choose another --name"
        raise UserError(f"{path}: can't be made ({error.strerror}): {advice}") from None
    return path


def dead_link(path: Path) -> str | None:
    """What to do about a link that leads nowhere, as where a disk is not mounted; None for anything else."""
    if not path.is_symlink() or path.exists():
        return None
    return f"{path} is a link to {os.readlink(path)}, which is not there: mount or make that, or remove the link"


def file_exists(path: Path) -> bool:
    """Whether there is such a file; raises UserError where that can't be seen, as without permission."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError) as error:  # also a name that is no file's
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE):
            raise UserError(f"{path}: can't be read ({error.strerror}): make its folder readable, or check the disk"
                            ) from None
        return False


def set_aside(paths: list[Path], folder: Path) -> Path:
    """Moves files to the first of folder/old1, folder/old2, ... that is free, and returns it; raises UserError."""
    old = next(old for n in range(1, 10**6) if not (old := folder / f"old{n}").exists())
    try:
        for path in paths:
            old.mkdir(parents=True, exist_ok=True)
            path.rename(old / path.name)
    except OSError as error:
        raise UserError(f"{folder}: can't set aside what it holds ({error.strerror}); choose another --name") from None
    return old


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds a run's folder; raises UserError if another process does. The system frees it when a process dies."""
    path, holder = folder / LOCK, folder / HOLDER
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(filelock.FileLock(path, timeout=0).acquire())
        except filelock.Timeout:
            owner = "an unknown process"
            with contextlib.suppress(OSError):
                owner = holder.read_text("utf-8").strip()
            raise UserError(f"another run of this name is going on ({owner}, {folder}): wait for it, or stop "
                            f"it; if that process has ended, delete {path}") from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
                raise UserError(f"{folder}: {error}; make it writable") from None
            say(f"WARNING: {folder} can't be locked ({error}); don't start a second run of this name.")
        else:
            with contextlib.suppress(OSError):
                holder.write_text(f"process {os.getpid()} on {platform.node()}", "utf-8")
                held.callback(holder.unlink, missing_ok=True)
        yield
