"""Every picture and animation, as functions of arrays: images are uint8, 28x28, on the CPU (numpy or torch).

Pillow alone lays out images, so that mode sample need not load matplotlib. Knows nothing of networks or configs. Files
appear whole or not at all, in folders that are there, and carry `metadata` as PNG text or GIF comment.
"""

import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps, PngImagePlugin

from support.console import say
from support.files import write_atomically

DPI = 128  # of figures; a power of two, so that none of their sizes in pixels is rounded
PAPER, TEXT = 255, 40  # grey levels
BLUE, GREEN, GREY = "#0072b2", "#009e73", "#8a8a8a"  # safe for the colour-blind (Okabe and Ito)
STYLE: Any = {  # min_exponent: plain numbers on log axes, such as 0.01
    "figure.dpi": DPI, "figure.labelsize": "medium", "font.size": 12, "legend.frameon": False, "axes.axisbelow": True,
    "axes.titlelocation": "left", "axes.titlesize": 13, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#e6e6e6", "axes.formatter.min_exponent": 6,
}
BASELINE = "baseline (real images)"
LANDMARK: Any = {"color": "black", "linewidth": 1, "linestyle": (0, (4, 3))}  # a line at the value to compare with
TRAINING_LOSS = "training loss (mostly of middle noise levels)"  # as --focus says
FLAT_LOSS = ("A curve that soon looks flat is normal: most of the loss is noise that no network can predict.\n"
             "Pictures go on improving while it falls by a few per cent, so judge a run by them and by mode evaluate.")
FEW_SEEN = 20_000  # images, a minute on two CPU cores: who has seen fewer can't be expected to sample well
COLOURS = ("Lines are 95% intervals of the change. Blue: the interval excludes 0.\n"
           "Grey: it includes 0, so the change may be due to chance.")
STROKE_LEVEL = 100  # a pixel at least this bright is part of a stroke
GAP = 5  # columns from one digit's stroke to the next one's, where they come closest: 4 stay empty
OVERLAP = 4  # pixels by which one digit may reach over its neighbour, as a 7 over a 4


def to_grid(images: ArrayLike, columns: int, gap: int = 2) -> np.ndarray:
    """Images [N, 1, h, w] or [N, h, w] row by row in a grid with `gap` black pixels around each -> uint8 [H, W]."""
    tiles = _tiles(images)
    return _page([tiles[start:start + columns] for start in range(0, len(tiles), columns)], gap, paper=0)


def save_grid(path: Path, images: ArrayLike, columns: int, metadata: Mapping[str, str]) -> None:
    """PNG of images [N, 1, 28, 28] in a grid, twice their size."""
    _save_png(path, _tiles(to_grid(images, columns), 2)[0], metadata)


def labelled_grid(images: ArrayLike, columns: int, titles: Iterable[str] = (),
                  names: Iterable[str] = ()) -> Image.Image:
    """Images [N, 1, 28, 28] row by row, three times their size: titles above the columns, names left of the rows."""
    tiles, header = _tiles(images, 3), [_text(title, 84, 28) for title in titles]
    rows: list[Any] = [tiles[start:start + columns] for start in range(0, len(tiles), columns)]
    if margin := [_text(name, 120, 84, right=True) for name in names]:
        rows = [[name, *row] for name, row in zip(margin, rows, strict=True)]
        header = [_text("", 120, 28), *header]
    return Image.fromarray(_page([header, *rows] if titles else rows, 4))


def save_labelled(path: Path, images: ArrayLike, labels: Sequence[str], metadata: Mapping[str, str]) -> None:
    """PNG of images [N, 1, 28, 28] in rows of eight, three times their size, each above its label."""
    tiles, texts = _tiles(images, 3), [_text(label, 84, 18) for label in labels]
    rows = [row for start in range(0, len(texts), 8) for row in (tiles[start:start + 8], texts[start:start + 8])]
    _save_png(path, _page(rows, 4), metadata)


def save_process(path: Path, states: ArrayLike, timesteps: Sequence[int], metadata: Mapping[str, str]) -> None:
    """PNG of the denoising process: states [K, n, 1, 28, 28], a row per image, a column per timestep, headed by it."""
    images = np.swapaxes(np.asarray(states), 0, 1)  # [n, K, 1, 28, 28]
    _save_png(path, np.asarray(labelled_grid(images, len(timesteps), [f"t = {t}" for t in timesteps])), metadata)


def save_neighbours(path: Path, sampled: ArrayLike, nearest: ArrayLike, distances: Sequence[float],
                    metadata: Mapping[str, str]) -> None:
    """PNG of pairs: sampled images [n, 1, 28, 28] above their nearest training images, with distances [n] below."""
    rows = [[_text("sampled", 100, 112, right=True), *_tiles(sampled, 4)],
            [_text("nearest\ntraining\nimage", 100, 112, right=True), *_tiles(nearest, 4)],
            [_text("distance", 100, 28, right=True), *(_text(f"{distance:,.0f}", 112, 28) for distance in distances)]]
    _save_png(path, _page(rows, 6), metadata)


def save_animation(path: Path, states: ArrayLike, metadata: Mapping[str, str]) -> None:
    """GIF of states [F, n, 1, 28, 28]: n images in one row, about 3 s of motion, the last frame for 1.5 s; loops.

    All frames share one palette, grey level i at index i, so nothing flickers and no level is changed.
    """
    frames = [Image.fromarray(to_grid(_tiles(state, 4), len(state), 8)) for state in np.asarray(states)]
    step = 10 * max(3, min(30, round(300 / len(frames))))  # ms; many players slow down less than 30
    comment = "\n".join(f"{key}: {value}" for key, value in metadata.items())
    write_atomically(path, lambda file: frames[0].save(
        file, "GIF", save_all=True, append_images=frames[1:], duration=[step] * (len(frames) - 1) + [1500], loop=0,
        optimize=False, palette=bytes(np.arange(256, dtype=np.uint8).repeat(3)), comment=comment))


def save_number(path: Path, digits: ArrayLike, metadata: Mapping[str, str]) -> None:
    """PNG of digits [N, 1, 28, 28] as one handwritten number, dark on white paper, four times their size."""
    line = ImageOps.scale(Image.fromarray(set_in_line(digits)), 4)
    line = line.filter(ImageFilter.GaussianBlur(2.0))  # the stairs of pixels vanish; contrast comes back below
    _save_png(path, 255 - 235 * np.clip((np.asarray(line) / 255 - 0.22) / 0.5, 0, 1), metadata)


def set_in_line(digits: ArrayLike, margin: int = 6) -> np.ndarray:
    """Digits [N, 1, 28, 28] on one baseline, GAP apart where they come closest -> uint8 [H, W].

    White on black as they come, with `margin` pixels around the strokes. A digit without any stroke leaves a space.
    """
    tiles = _tiles(digits)
    line = np.zeros((2 * margin + 56, 36 * (len(tiles) + 2)), np.uint8)
    near = np.argwhere(np.hypot(*np.ogrid[-GAP:GAP + 1, -GAP:GAP + 1]) < GAP).T[:, None] - GAP  # a disc [2, 1, n]
    taken = np.zeros(line.shape, bool)  # pixels nearer than GAP to the strokes so far
    base, end = margin + 27, 28 + OVERLAP  # row of every digit's lowest stroke, column of the last digit's rightmost
    for tile in tiles:
        rows, cols = np.nonzero(tile >= STROKE_LEVEL)
        if len(rows) == 0:
            taken, end = np.roll(taken, 12, axis=1), end + 12
            continue
        y, x = base - rows.max(), end - OVERLAP - cols.min()
        while taken[rows + y, cols + x].any():
            x += 1
        np.maximum(line[y:y + 28, x:x + 28], tile, out=line[y:y + 28, x:x + 28])
        taken[rows[:, None] + y + near[0], cols[:, None] + x + near[1]] = True
        end = x + cols.max()
    strokes = Image.fromarray(line >= STROKE_LEVEL).getbbox()
    left, top, right, bottom = strokes or (margin, margin, end - margin, len(line) - margin)
    return line[top - margin:bottom + margin, left - margin:right + margin]


def save_losses(path: Path, columns: Mapping[str, Any], reference: Mapping[str, Any] | None,
                metadata: Mapping[str, str], epoch_size: int) -> None:
    """PNG that answers "is my loss normal?": loss over images seen, and test loss by noise level, first and last.

    `columns` are those of metrics.csv: images, train_loss, test_loss, and test_loss_tA-B for timesteps A to B.
    `reference`: those of the run of the pretrained weights, drawn in grey. epoch_size: images in an epoch.
    """
    names = [name for name in columns if name.startswith("test_loss_t")]
    seen, losses = columns["images"], np.array([columns[name] for name in names], float)  # [levels, rows]
    with open_figure(path, 1500, 720, metadata) as figure:
        curve, levels = figure.subplots(1, 2)
        curve.set(title="Loss while training", xlabel="training images seen")
        if reference:
            curve.loglog(reference["images"], reference["test_loss"], color=GREY, label="test loss, pretrained weights")
        curve.loglog(seen, columns["train_loss"], color=GREEN, linewidth=1, label=TRAINING_LOSS)
        curve.loglog(seen, columns["test_loss"], ".-" if len(seen) < 30 else "-", color=BLUE, label="test loss")
        curve.xaxis.set_major_formatter(
            lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x >= 1e4 else f"{x:g}")
        curve.secondary_xaxis(-0.2, functions=(lambda x: x / epoch_size, lambda x: x * epoch_size), xlabel="epochs")
        curve.legend()
        levels.set(title="Test loss by noise level", xlabel="timestep t (0: clean, T: noise)")
        ranges = [name.removeprefix("test_loss_t") for name in names]
        if reference and all(name in reference for name in names):
            levels.semilogy(ranges, [reference[name][-1] for name in names], color=GREY, label="pretrained weights")
        for row, style in ((0, ":"), (-1, ".-")):  # the first and the last
            levels.semilogy(ranges, losses[:, row], style, color=BLUE, label=f"after {seen[row]:,} images")
        levels.tick_params(axis="x", rotation=35)
        levels.legend()
        figure.supxlabel(FLAT_LOSS, x=0.01, ha="left")


def save_evaluation(path: Path, report: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """PNG of one page, with a panel for each part of the report.

    ratios and test_ratios (in one): name -> (multiple of the baseline, error or None); histogram: model, asked ->
    counts of the classes; overlap: row -> precision, recall, coverage; neighbours: model, test -> distances [N].
    """
    with open_figure(path, 1320, 1080, metadata) as figure:
        panels = figure.subplot_mosaic([["distances", "classes"], ["overlap", "neighbours"]])
        axes, names = panels["distances"], [*report["ratios"]]
        for key, label, colour, marker in (("test_ratios", "test set", GREY, "D"), ("ratios", "sampled", BLUE, "o")):
            values, errors = np.array([report[key].get(name, (None, None)) for name in names], float).T  # None: nan
            axes.errorbar(values, range(len(names)), xerr=errors, fmt=marker, color=colour, capsize=2, label=label)
        for place, name in enumerate(names):
            if name not in report["test_ratios"]:
                axes.text(0.99, place, "too few test images", color=GREY, fontsize="small", ha="right", va="center",
                          transform=axes.get_yaxis_transform())
        axes.axvline(1, label=BASELINE, **LANDMARK)
        axes.set(title="Distance to the training images", xlabel="times the baseline", xscale="log",
                 yticks=range(len(names)), yticklabels=_without_math(names),
                 ylim=(len(names) - 0.4, -0.42 * len(names)))  # downwards, with room for the legend
        axes.legend(loc="upper right", frameon=True, framealpha=1, edgecolor="none")  # over the landmark
        axes, histogram = panels["classes"], report["histogram"]
        _draw_bars(axes, {label: 100 * np.asarray(histogram[key]) / np.sum(histogram[key])
                          for label, key in (("sampled", "model"), ("asked for", "asked"))}, report["classes"])
        axes.tick_params(axis="x", rotation=35 * (max(len(str(name)) for name in report["classes"]) > 2))
        axes.set(title="Classes", xlabel="class, as the classifier reads it", ylabel="share (%)")
        axes, shares = panels["overlap"], ("precision", "recall", "coverage")
        _draw_bars(axes, {name: [row[share] for share in shares] for name, row in report["overlap"].items()}, shares,
                   "%.2f")
        axes.set(title="Fidelity and variety", ylabel="share", yticks=np.linspace(0, 1, 6))
        axes, values = panels["neighbours"], [np.asarray(report["neighbours"][key]) for key in ("model", "test")]
        labels = [*map("{} (median {:.4g})".format, ("sampled", "test images"), map(np.median, values))]
        axes.hist(values, 40, weights=[np.full(len(v), 100 / len(v)) for v in values], histtype="stepfilled",
                  alpha=0.5, color=(BLUE, GREY), label=labels)
        axes.margins(y=0.3)  # room for the legend
        axes.set(title="Nearest training image", xlabel="distance", ylabel="share of images (%)")
        axes.legend()


def save_comparison(path: Path, pairs: tuple[ArrayLike, ArrayLike], names: tuple[str, str],
                    rows: Sequence[tuple[str, bool, float, float, float]], metadata: Mapping[str, str]) -> None:
    """PNG for "did a change help?": images of two sides from the same seeds, and how far each metric moved.

    pairs: both sides' images [n, 1, 28, 28]; rows: (label, whether it is a distance, change, low, high) with the 95%
    interval low..high of the change, which is relative for distances and absolute for shares.
    """
    heads = [_text(_fold(f"{letter}: {name}", 18), 200, 84, right=True) for letter, name in zip("ab", names)]
    title = _text("Where a and b differ most: images from the same seeds", 600, 36)
    page = _page([[title], *([head, *_tiles(images, 3)] for head, images in zip(heads, pairs))], 8)
    parts = [[row for row in rows if row[1] == distance] for distance in (True, False)]
    height = len(page) + 210 + 55 * max(map(len, parts))
    with open_figure(path, max(1200, page.shape[1]), height, metadata) as figure:
        figure.figimage(np.dstack([page] * 3), 0, height - len(page))  # RGB, so that each grey level stays
        figure.get_layout_engine().set(rect=(0, 0, 1, 1 - len(page) / height))
        figure.supxlabel(COLOURS, x=0.01, ha="left", fontsize="medium")
        for axes, part, heading, unit in zip(figure.subplots(1, 2), parts, (
                "Distances to the real images (class-wise decides)", "All else (best where the baseline is)"), (
                "change from a to b (%); left of 0, b is closer", "change from a to b (percentage points)")):
            _draw_intervals(axes, [(name, change, low, high) for name, _, change, low, high in part])
            axes.set(title=heading, xlabel=unit)


def save_intervals(path: Path, rows: Sequence[tuple[str, float, float, float]], metadata: Mapping[str, str]) -> None:
    """PNG of how several changes move the class-wise distance: rows (name, change, low, high), relative ones."""
    with open_figure(path, 1200, 260 + 55 * len(rows), metadata) as figure:
        axes = figure.subplots()
        _draw_intervals(axes, [(_fold(name, 30), change, low, high) for name, change, low, high in rows])
        axes.set(title="Which change brings the samples closer to real images?",
                 xlabel="change of the class-wise distance (%); left of 0 is closer")
        figure.supxlabel(COLOURS, x=0.01, ha="left", fontsize="medium")


def looks_broken(images: ArrayLike, mean: float = 0.1307, std: float = 0.3081) -> str | None:
    """What is plainly wrong with images [N, 1, 28, 28]: "all black", "static" or "washed out"; None if nothing is.

    mean and std are those of the data's pixels in [0, 1] (defaults: MNIST). The margins are wide: of 16 or more images,
    the lightest and the heaviest 16 of MNIST's 60,000 pass too.
    """
    pixels = _tiles(images) / 255.0
    spread = pixels.std()
    if spread < 0.4 * std:
        return "all black" if pixels.mean() < mean else "washed out"
    steps = (np.square(np.diff(pixels, axis=1)).mean() + np.square(np.diff(pixels, axis=2)).mean()) / 2
    correlation = 1 - steps / (2 * spread**2)  # of neighbouring pixels: 0.72 to 0.85 in 16 real digits, 0 in noise
    return "static" if correlation < 0.5 else "washed out" if pixels.mean() > mean + std else None


def warn_if_broken(images: ArrayLike, data: Mapping[str, Any], images_seen: int) -> None:
    """Warns if images look nothing like the data that the network was trained on, unless it had no time to learn it."""
    if problem := looks_broken(images, **{key: data[key] for key in ("mean", "std") if key in data}):
        say(f"note: the images are still {problem}: the network has seen {images_seen:,}, and it takes tens of "
            "thousands." if images_seen < FEW_SEEN else
            f"WARNING: these images do not look like {data.get('name', 'the training images')} ({problem}). Was the "
            "network trained long enough, with a falling loss?")


def _tiles(images: ArrayLike, scale: int = 1) -> np.ndarray:
    """[..., h, w] -> [N, scale * h, scale * w]."""
    array = np.asarray(images)
    return array.reshape(-1, *array.shape[-2:]).repeat(scale, axis=-2).repeat(scale, axis=-1)


def _fold(name: str, width: int) -> str:
    """The name in lines, with its flags whole."""
    return textwrap.fill(name, width, break_on_hyphens=False)


def _text(text: str, width: int, height: int, right: bool = False) -> np.ndarray:
    """A tile [height, width] with text (ASCII), centred or at the right edge, smaller where it has to be."""
    page = Image.new("L", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    _, _, wide, high = draw.textbbox((0, 0), text, font=ImageFont.load_default(20))
    font = ImageFont.load_default(20 * min(1, (width - 4) / max(1, wide), height / max(1, high)))
    place, anchor = ((width, height / 2), "rm") if right else ((width / 2, height / 2), "mm")
    draw.text(place, text, TEXT, font, anchor, align="right")
    return np.asarray(page)


def _page(rows: Sequence[Sequence[np.ndarray] | np.ndarray], gap: int, paper: int = PAPER) -> np.ndarray:
    """Rows of tiles [h, w] with `gap` pixels of paper around each -> uint8 [H, W]; a row may be shorter than others."""
    lines = [np.hstack([np.pad(tile, ((gap, 0), (gap, 0)), constant_values=paper) for tile in row]) for row in rows]
    width = max(line.shape[1] for line in lines)
    page = np.vstack([np.pad(line, ((0, 0), (0, width - line.shape[1])), constant_values=paper) for line in lines])
    return np.pad(page, ((0, gap), (0, gap)), constant_values=paper)


def _without_math(names: Sequence[Any]) -> list[str]:
    """Names for matplotlib, which takes what stands between two dollars for mathematics, as its own log axes need."""
    return [str(name).replace("$", r"\$") for name in names]


def _draw_intervals(axes: Any, rows: Sequence[tuple[str, float, float, float]]) -> None:
    """A line for each row (name, change, low, high), from low to high, in per cent."""
    for name, change, low, high in rows:  # beyond 100 an interval leaves the picture, and a change is an arrow
        marker = ">" if change > 1 else "<" if change < -1 else "o"
        axes.plot(100 * np.clip([low, change, high], (-1.06, -1, -1.06), (1.06, 1, 1.06)), [name] * 3, f"{marker}-",
                  markevery=[1], color=BLUE if low > 0 or high < 0 else GREY, linewidth=3)
    axes.axvline(0, **LANDMARK)
    limit = min(105, max([1, *(110 * abs(end) for row in rows for end in row[1:])]))
    axes.set(xlim=(-limit, limit), ylim=(len(rows) - 0.4, -0.6))


def _draw_bars(axes: Any, rows: Mapping[str, ArrayLike], names: Sequence[Any], numbers: str = "") -> None:
    """Groups of bars, one for each name: two rows, label -> heights; `numbers`: format of the number above a bar."""
    for k, (label, heights) in enumerate(rows.items()):
        places = np.arange(len(names)) + 0.8 * ((k + 0.5) / len(rows) - 0.5)
        bars = axes.bar(places, heights, 0.74 / len(rows), color=(BLUE, GREY)[k], label=label)
        axes.bar_label(bars, fmt=numbers, fontsize="small", padding=2)
    axes.set_xticks(range(len(names)), _without_math(names))
    axes.margins(y=0.35)  # room for the legend
    axes.legend(ncols=2, loc="upper center")


@contextmanager
def open_figure(path: Path, width: int, height: int, metadata: Mapping[str, str]) -> Iterator[Any]:
    """A matplotlib figure (sizes in pixels) without the user's own settings, written to `path` when the block ends."""
    with mock.patch.dict(os.environ):
        os.environ.pop("MPLBACKEND", None)  # of a notebook, say: one that is not there would end the import
        import matplotlib.figure
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "agg", **STYLE}):
        figure = matplotlib.figure.Figure((width / DPI, height / DPI), layout="constrained")
        yield figure
        write_atomically(path, lambda file: figure.savefig(file, metadata={"Software": None, **metadata}))


def metadata_of(path: Path) -> dict[str, str] | None:
    """The metadata of a PNG that was saved here; None for a file that is no such picture."""
    with suppress(OSError, SyntaxError, ValueError), Image.open(path) as image:
        return getattr(image, "text", None)
    return None


def _save_png(path: Path, pixels: ArrayLike, metadata: Mapping[str, str]) -> None:
    text = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        text.add_text(key, value.encode("utf-8", "replace").decode())  # a file name need not be valid Unicode
    write_atomically(path, lambda file: Image.fromarray(np.asarray(pixels, np.uint8)).save(file, "PNG", pnginfo=text))
