"""A folder of pictures of any size and mode -> grey levels of 28x28 pixels, their classes, and which are held out.

Files are read once: what they held is kept in checkpoints/picture-cache/, until a name, size or time changes.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from config import UserError
from support import code
from support.console import progress_bar, say
from support.files import make_folder, write_atomically
from support.idx import SIZE

KEPT = Path("checkpoints") / "picture-cache"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
UNREADABLE = 0.01  # share of files that may be no pictures
HELD_OUT = 10  # one picture in so many is a test image
BRIGHT = 128  # grey level from which a border is bright
SHOWN = 10  # names in a message
CODE = code.digest("support/pictures.py")  # as it was imported


class Pictures(NamedTuple):
    """Pictures of up to `classes` classes, by the split "train" or "test"."""

    splits: dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]  # images [N, 28, 28] and labels [N]
    class_names: list[str]  # empty where the folder has no classes
    inverted: bool


def read_folder(folder: Path, invert: bool | None, classes: int) -> Pictures:
    """The pictures in folder/CLASS/, or in folder/train/CLASS/ and folder/test/CLASS/; raises UserError.

    invert: whether dark becomes light; None: if most borders are bright. Without a test folder some are held out.
    """
    with _readable():
        files, class_names = _find(folder, classes)
        images, digests, borders = _read_once(folder, [path for path, _, _ in files])
    unreadable = [str(path) for (path, _, _), border in zip(files, borders) if border < 0]
    if len(unreadable) > UNREADABLE * len(files):
        raise UserError(f"{unreadable[0]}: it can't be read as a picture; repair or remove it, and all such files "
                        f"({len(unreadable)} of {len(files):,}; up to 1% would be left out)")
    if unreadable:
        more = f" and {len(unreadable) - SHOWN} more" if len(unreadable) > SHOWN else ""
        say(f"note: left out, since they can't be read as pictures: {', '.join(unreadable[:SHOWN])}{more}")
    readable, labels = borders >= 0, np.array([label for _, label, _ in files])
    test = np.array([split == "test" for _, _, split in files])
    if files[0][2] == "":
        for k in range(max(1, len(class_names))):
            test[readable & (labels == k)] = held_out(digests[readable & (labels == k)])
    for k, name in enumerate(class_names or [""]):
        if not (readable & ~test & (labels == k)).any():
            raise UserError(f"{folder / name}: no picture is left to train on when one is held out to test on; add "
                            "different ones")
    inverted = bool((borders[readable] >= BRIGHT).mean() > 0.5) if invert is None else invert
    if inverted:
        images = 255 - images
    chosen = {"train": readable & ~test, "test": readable & test}
    named = ", ".join(f"{k} ({name})" for k, name in enumerate(class_names))
    say(f"{folder}: {chosen['train'].sum():,} pictures to train on and {chosen['test'].sum():,} to test on"
        f"{'; classes: ' * bool(named)}{named}.")
    if inverted and invert is None:
        say("Most of them have bright borders, so they are taken to be dark on light and are inverted; --no-invert "
            "leaves them as they are.")
    return Pictures({split: (images[which], labels[which]) for split, which in chosen.items()}, class_names, inverted)


def held_out(digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which pictures of a class [N] are test images: those that stay so when others are added; one at least, not all.
    """
    chosen = digests % HELD_OUT == 0
    return chosen if chosen.any() and not chosen.all() else digests == digests.min()


def _find(folder: Path, classes: int) -> tuple[list[tuple[Path, int, str]], list[str]]:
    """All pictures, each with its label and its split ("": yet to be chosen), and the names of the classes."""
    roots, names = {"": folder}, _folders(folder)
    if "train" in names and {*names} <= {"train", "test"}:
        roots = {name: folder / name for name in reversed(names)} if "test" in names else {"": folder / "train"}
    elif {"train", "test"} < {*names}:
        extra = ", ".join(name for name in names if name not in ("train", "test"))
        raise UserError(f"{folder}: beside train and test it has {extra}; move these away, or put all classes into it")
    class_names = _folders(next(iter(roots.values())))
    if len(class_names) > classes:
        raise UserError(f"{folder}: it has {len(class_names)} folders of classes ({', '.join(class_names):.200}), and "
                        f"{classes} are possible; leave {len(class_names) - classes} out, or merge some")
    files: list[tuple[Path, int, str]] = []
    for split, root in roots.items():
        if unknown := sorted({*_folders(root)} - {*class_names}):
            raise UserError(f"{root / unknown[0]}: {folder / 'train'} has no such class; add it there, or remove it")
        if class_names and (loose := [name for name in os.listdir(root) if _is_picture(Path(name))]):
            say(f"note: left out, since they lie beside the folders of classes: {', '.join(loose[:SHOWN])}")
        paths = {name: _pictures(root / name) if (root / name).exists() else [] for name in class_names or [""]}
        empty = [root / name for name, inside in paths.items() if not inside]
        if split != "test" and empty or len(empty) == len(paths):  # a class may lack test images, but not all may
            raise UserError(f"{empty[0]}: there are no pictures in it ({', '.join(SUFFIXES)}); add some, or remove it")
        files += [(path, label, split) for label, inside in enumerate(paths.values()) for path in inside]
    return files, class_names


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path)
                  if entry.is_dir() and not entry.name.startswith((".", "__")))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.parts)


def _pictures(folder: Path) -> list[Path]:
    """The pictures in a folder and in those below it, in the order of their names."""
    def fail(error: OSError) -> None:
        raise error

    return sorted(path for place, _, names in os.walk(folder, onerror=fail, followlinks=True) for name in names
                  if _is_picture((path := Path(place, name)).relative_to(folder)))


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """In the block, a folder that can't be read is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename}: can't be read ({error.strerror}); choose another --data-dir, or make it "
                        "readable") from None


def _read_once(folder: Path, paths: list[Path]) -> tuple[NDArray[np.uint8], NDArray[np.uint64], NDArray[np.int16]]:
    """What `_read` gives of each file, from the cache if no file has changed since; a border of -1: unreadable."""
    listing = [(path.relative_to(folder).as_posix(), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in paths]
    key = hashlib.sha256(json.dumps([CODE, listing]).encode()).hexdigest()
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]
    kept = KEPT / f"{re.sub(r'[^a-zA-Z0-9]+', '-', folder.name)[:40]}-{place}.npz"
    with contextlib.suppress(OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile), np.load(kept) as saved:
        if saved["key"].item() == key:
            return saved["images"], saved["digests"], saved["borders"]
    images = np.zeros((len(paths), SIZE, SIZE), np.uint8)
    digests, borders = np.zeros(len(paths), np.uint64), np.full(len(paths), -1, np.int16)
    for i, path in enumerate(progress_bar(iterable=paths, desc="reading pictures", unit=" pictures", leave=False)):
        with contextlib.suppress(Exception):  # of a damaged file, Pillow's readers raise anything
            images[i], digests[i], borders[i] = _read(path)
    try:
        make_folder(KEPT)
        write_atomically(kept, lambda file: np.savez(file, key=key, images=images, digests=digests, borders=borders))
    except UserError as error:
        say(f"note: the pictures will be read again next time: {error}")
    return images, digests, borders


def _read(path: Path) -> tuple[NDArray[np.uint8], int, int]:
    """A picture made square and small [28, 28], a hash of the file's content, and the median grey of its border."""
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        image.draft(None, (4 * SIZE, 4 * SIZE))  # a large JPEG is decoded at a part of its size
        grey = _to_grey(ImageOps.exif_transpose(image))
    pixels = np.asarray(grey)
    border = int(np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])))
    square = ImageOps.pad(grey, (SIZE, SIZE), Image.Resampling.HAMMING, border)  # antialiased, and without halos
    return np.asarray(square), int.from_bytes(hashlib.sha256(content).digest()[:8], "big"), border


def _to_grey(image: Image.Image) -> Image.Image:
    """Any picture in 8 bits of grey, on white where it is transparent; of an animation the first frame."""
    if image.mode.startswith("I"):  # 16 bits
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L")
