"""Every picture and animation, as functions of arrays: images are uint8, 28x28, on the CPU (numpy or torch).

Plain grids of pixels are drawn with Pillow alone, so that mode sample pays for no matplotlib; curves and bars are drawn
by matplotlib's object API. Every file appears whole or not at all and carries `metadata` as PNG text or GIF comment;
one that can't be written is a `UserError`. Knows nothing of networks, configs or measures.
"""

import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont, PngImagePlugin

from config import UserError

Pixels = NDArray[np.uint8]
History = Mapping[str, Any]

PAPER, INK, FAINT = 255, 40, 100  # grey levels of the page, its text and its small print
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#8a8a8a"  # colour-blind-safe (Okabe and Ito)
INK_COLOUR = "#404040"
COLOURS = (BLUE, ORANGE, GREEN, "#cc79a7", "#e69f00", "#56b4e9", GREY)
STYLE: Any = {
    "figure.dpi": 150, "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titlepad": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#606060", "axes.linewidth": 0.8,
    "xtick.color": "#404040", "ytick.color": "#404040", "axes.labelcolor": "#404040", "lines.linewidth": 1.6,
    "legend.frameon": False, "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "axes.axisbelow": True,
}
FLAT_LOSS = ("A curve that soon looks flat is normal: most of the loss is noise that no network can predict.\n"
             "Pictures go on improving while it falls by a few per cent, so judge a run by them and by mode evaluate.")
INK_LEVEL = 100  # a pixel at least this bright is part of a stroke
GAP = 5.0  # columns from one digit's stroke to the next one's, where they come closest: 4 stay empty
OVERLAP = 4  # pixels by which one digit may reach over its neighbour, as a 7 over a 4


# Grids, strips and animations: Pillow alone


def to_grid(images: ArrayLike, columns: int, gap: int = 2, background: int = 0) -> Pixels:
    """Images [N, 1, h, w] or [N, h, w] row by row in a grid with `gap` pixels around each -> uint8 [H, W]."""
    tiles = _tiles(images)  # [N, h, w]
    count, height, width = tiles.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    cells = np.full((rows * columns, height + gap, width + gap), background, np.uint8)
    cells[:count, :height, :width] = tiles
    grid = cells.reshape(rows, columns, height + gap, width + gap).swapaxes(1, 2)
    grid = grid.reshape(rows * (height + gap), columns * (width + gap))
    return np.pad(grid, ((gap, 0), (gap, 0)), constant_values=background)


def save_grid(path: Path, images: ArrayLike, columns: int, metadata: Mapping[str, str]) -> None:
    """PNG of images [N, 1, 28, 28] in a grid, twice their size."""
    _save_png(path, Image.fromarray(_enlarge(to_grid(images, columns), 2)), metadata)


def save_process(path: Path, states: ArrayLike, timesteps: Sequence[int], metadata: Mapping[str, str]) -> None:
    """PNG of how images come to be: states [K, n, 1, 28, 28], a row per image, a column per timestep, headed by it."""
    columns = np.asarray(states).reshape(len(timesteps), -1, 28, 28)  # [K, n, 28, 28]
    scale, gap, header = 3, 4, 30
    grid = to_grid(_enlarge(columns.swapaxes(0, 1).reshape(-1, 28, 28), scale), len(timesteps), gap, PAPER)
    page, draw = _page(grid.shape[1], header + grid.shape[0] - gap)
    page.paste(Image.fromarray(grid), (0, header - gap))
    cell = 28 * scale + gap
    titles = [f"t = {t}" for t in timesteps]
    size = min(19, 19 * (cell - 8) // max(_text_width(title, 19) for title in titles))
    for k, title in enumerate(titles):
        _write_text(draw, (gap / 2 + (k + 0.5) * cell, header / 2 + 1), title, size, "mm")
    _save_png(path, page, metadata)


def save_animation(path: Path, states: ArrayLike, metadata: Mapping[str, str]) -> None:
    """GIF of states [F, n, 1, 28, 28]: n images in one row, about 3 s of motion, the last frame for 1.5 s; loops.

    All frames share one palette, grey level i at index i, so nothing flickers and no level is changed.
    """
    frames = [Image.fromarray(to_grid(_enlarge(_tiles(state), 4), len(state), 8)) for state in np.asarray(states)]
    step = 10 * max(3, min(30, round(300 / len(frames))))  # ms; players mistreat less than 30
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=[step] * (len(frames) - 1) + [1500],
                   loop=0, optimize=False, palette=np.arange(256, dtype=np.uint8).repeat(3).tobytes(),
                   comment="\n".join(f"{key}: {value}" for key, value in metadata.items()))
    _write(path, buffer.getvalue())


def save_number(path: Path, digits: ArrayLike, metadata: Mapping[str, str]) -> None:
    """PNG of digits [N, 1, 28, 28] as one handwritten number, dark on white paper, four times their size."""
    line = Image.fromarray(set_in_line(digits))
    line = line.resize((4 * line.width, 4 * line.height), Image.Resampling.BICUBIC)
    line = line.filter(ImageFilter.GaussianBlur(2.0))  # the stairs of pixels vanish; contrast comes back below
    contrast = np.clip((np.arange(256) / 255 - 0.22) / 0.5, 0, 1)
    page = line.point((255 - 235 * contrast).round().astype(int).tolist())
    _save_png(path, page, metadata)


def set_in_line(digits: ArrayLike, margin: int = 6) -> Pixels:
    """Digits [N, 1, 28, 28] on one baseline, GAP apart where they come closest -> uint8 [H, W].

    White on black as they come, with `margin` pixels around the ink. A digit without any ink leaves a space.
    """
    tiles = _tiles(digits)
    line = np.zeros((2 * margin + 56, 36 * (len(tiles) + 2)), np.uint8)
    base = margin + 27  # row of every digit's lowest ink
    edge = np.full(len(line), -np.inf)  # rightmost ink so far, by row
    end = 28 + OVERLAP  # column where the ink of the last digit ends
    for tile in tiles:
        rows, cols = np.nonzero(tile >= INK_LEVEL)
        if len(rows) == 0:
            edge, end = edge + 12, end + 12
            continue
        drop = base - rows.max()
        left, right = np.full(len(line), np.inf), np.full(len(line), -np.inf)  # this digit's ink, by row
        np.minimum.at(left, rows + drop, cols)
        np.maximum.at(right, rows + drop, cols)
        # Distances are Euclidean: strokes d rows apart need only sqrt(GAP^2 - d^2) columns between them.
        near = range(-int(GAP), int(GAP) + 1)
        x = max((np.roll(edge, d) - left).max() + math.sqrt(GAP**2 - d**2) for d in near)
        x = math.ceil(max(x, end - OVERLAP - cols.min()))
        np.maximum(line[drop:drop + 28, x:x + 28], tile, out=line[drop:drop + 28, x:x + 28])
        edge, end = np.maximum(edge, right + x), x + cols.max()
    inked = line >= INK_LEVEL
    if not inked.any():
        return np.zeros((2 * margin + 20, end), np.uint8)
    rows, cols = (np.flatnonzero(inked.any(axis)) for axis in (1, 0))
    return line[rows[0] - margin:rows[-1] + margin + 1, cols[0] - margin:cols[-1] + margin + 1]


def save_sweep(path: Path, cells: Mapping[tuple[str, int], ArrayLike], seconds: Mapping[tuple[str, int], float],
               quality: Mapping[tuple[str, int], float] | None, metadata: Mapping[str, str]) -> None:
    """PNG table of samplers (rows) and steps (columns); a missing cell stays blank.

    Each cell shows the same few digits [n, 1, 28, 28]; below them, seconds per 256 images and, in `quality`, a distance
    to real digits over its floor.
    """
    samplers = list(dict.fromkeys(sampler for sampler, _ in cells))
    steps = sorted({step for _, step in cells})
    grids = {key: _enlarge(to_grid(images, min(4, len(_tiles(images)))), 2) for key, images in cells.items()}
    height, width = np.max([grid.shape for grid in grids.values()], axis=0)
    note = "Same seeds in every cell. Below: seconds per 256 images"
    note += " and distance to real digits (1x: as close as other real ones)" if quality else ""
    top, gap, line = 104, 14, 42
    left = 2 * gap + max(_text_width(sampler, 30) for sampler in samplers)
    page, draw = _page(max(left + len(steps) * (width + gap), 2 * gap + _text_width(note, 28)),
                       top + len(samplers) * (height + line + gap))
    _write_text(draw, (gap, 26), note, 28)
    for row, sampler in enumerate(samplers):
        _write_text(draw, (gap, top + row * (height + line + gap) + height / 2), sampler, 30)
    for column, step in enumerate(steps):
        x = left + column * (width + gap)
        _write_text(draw, (x + width / 2, top - 26), f"{step} steps" if step > 1 else "1 step", 30, "mm")
        for row, sampler in enumerate(samplers):
            y = top + row * (height + line + gap)
            if (sampler, step) not in cells:
                continue
            page.paste(Image.fromarray(grids[sampler, step]), (x, y))
            if (sampler, step) in seconds:
                _write_text(draw, (x, y + height + line / 2), f"{_short(seconds[sampler, step])} s", 28, "lm", FAINT)
            if quality and (sampler, step) in quality:
                _write_text(draw, (x + width, y + height + line / 2), f"{_short(quality[sampler, step])}x", 28, "rm")
    _save_png(path, page, metadata)


def save_neighbours(path: Path, generated: ArrayLike, nearest: ArrayLike, distances: Sequence[float],
                    metadata: Mapping[str, str]) -> None:
    """PNG of pairs: generated images [n, 1, 28, 28] above their nearest training images, with distances [n] below."""
    left, gap, line, scale = 132, 6, 28, 4
    pairs = np.concatenate([_tiles(generated), _tiles(nearest)])
    grid = to_grid(_enlarge(pairs, scale), len(pairs) // 2, gap, PAPER)
    page, draw = _page(left + grid.shape[1], grid.shape[0] + line)
    page.paste(Image.fromarray(grid), (left, 0))
    cell = 28 * scale + gap
    below = grid.shape[0] + line / 2 - 3
    for y, text in ((0.5 * cell, "generated"), (1.5 * cell - 22, "nearest"), (1.5 * cell, "training"),
                    (1.5 * cell + 22, "image"), (below, "distance")):
        _write_text(draw, (left - 8, y + (gap / 2 if y < below else 0)), text, 19, "rm")
    for k, distance in enumerate(distances):
        _write_text(draw, (left + gap / 2 + (k + 0.5) * cell, below), f"{distance:.2f}", 19, "mm")
    _save_png(path, page, metadata)


# Curves and bars: matplotlib


def save_losses(path: Path, history: History, reference: History | None = None,
                metadata: Mapping[str, str] | None = None, epoch_size: int | None = None) -> None:
    """PNG that answers "is my loss normal?": loss over images seen, and loss by noise level, first and last.

    `history` has images and train_loss (smoothed), test_images and test_loss, and by_level, a dict from the name of a
    noise level to its losses at test_images; any may be missing or empty. `reference`, of the same kind, is the run of
    pretrained.pt, drawn in grey. epoch_size: images in an epoch, for a second axis.
    """
    from matplotlib.ticker import EngFormatter

    with _figure(path, 10, 4.4, metadata) as figure:
        curve, levels = figure.subplots(1, 2, width_ratios=(1.25, 1))
        above = 38 if epoch_size else 8  # points, so that both titles clear the axis of epochs
        curve.set_title("Loss while training", y=1, pad=above)
        curve.set(xlabel="training images seen", xscale="log", yscale="log")
        curve.plot(history.get("images", []), history.get("train_loss", []), color=BLUE, linewidth=1, label="training")
        if history.get("test_images"):
            curve.plot(history["test_images"], history["test_loss"], ".-", color=ORANGE, label="test")
        if reference:
            curve.plot(reference["images"], reference["train_loss"], color=GREY, alpha=0.5, linewidth=1, zorder=1)
            curve.plot(reference["test_images"], reference["test_loss"], ".-", color=GREY, zorder=1,
                       label="test, pretrained.pt")
        _number_axis(curve.xaxis)
        curve.xaxis.set_major_formatter(EngFormatter(sep=""))  # 10k, 1M
        _number_axis(curve.yaxis)
        if epoch_size:
            epochs = curve.secondary_xaxis("top", functions=(lambda x: x / epoch_size, lambda x: x * epoch_size))
            epochs.set_xlabel("epochs")
            _number_axis(epochs.xaxis, curve.xaxis)
            epochs.spines["top"].set_visible(False)
        curve.legend(loc="upper right")

        names = list(history.get("by_level", {}))
        levels.set_title("Test loss by noise level", y=1, pad=above)
        levels.set(xlabel="timestep t (0: clean, T: noise)", yscale="log")
        losses = np.array([history["by_level"][name] for name in names], float)  # [levels, evaluations]
        places = np.arange(len(names))
        if losses.size:
            seen = history["test_images"]
            between = np.unique(np.linspace(0, losses.shape[1] - 1, 8).round().astype(int))[1:-1]
            levels.plot(places, losses[:, between], color=BLUE, alpha=0.25, linewidth=1)
            if losses.shape[1] > 1:
                levels.plot(places, losses[:, 0], ".-", color=ORANGE, label=f"first (after {seen[0]:,} images)")
            levels.plot(places, losses[:, -1], ".-", color=BLUE, label=f"last (after {seen[-1]:,} images)")
            if reference and list(reference.get("by_level", {})) == names:
                levels.plot(places, [reference["by_level"][name][-1] for name in names], color=GREY, linewidth=2.2,
                            zorder=1, label="pretrained.pt, last")
            levels.set_xticks(places, names, rotation=0 if sum(map(len, map(str, names))) < 45 else 35)
            levels.legend(loc="best")
            _number_axis(levels.yaxis)
        else:
            _leave_blank(levels, "no test loss yet")
        figure.supxlabel(FLAT_LOSS, x=0.01, ha="left", fontsize=9, color=INK_COLOUR)


def save_evaluation(path: Path, report: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """PNG of one page with four panels; one whose key is missing from the report says "not measured".

    histogram: {"model": [10], "test": [10], "asked": [10] (optional)} counts; by_timestep: {"t": [n], "bits": [n]};
    manifold: row name -> {"precision", "recall", "coverage"}; distances: {"model": [N], "test": [M]}.
    """
    with _figure(path, 10, 7, metadata) as figure:
        classes, bits, manifold, distances = figure.subplots(2, 2).flat
        classes.set(title="Digits drawn", xlabel="digit, as the classifier reads it", ylabel="share (%)")
        if found := report.get("histogram"):
            share = {name: 100 * np.asarray(counts) / max(1, np.sum(counts)) for name, counts in found.items()}
            digits = np.arange(len(share["model"]))
            classes.bar(digits - 0.2, share["model"], 0.4, color=BLUE, label="generated")
            classes.bar(digits + 0.2, share["test"], 0.4, color=GREY, label="test images")
            asked = share.get("asked", np.full(len(digits), 100 / len(digits)))
            classes.hlines(asked, digits - 0.45, digits + 0.45, color=INK_COLOUR, linewidth=1.2,
                           label="asked for" if "asked" in share else "uniform")
            classes.set_xticks(digits)
            classes.set_ylim(0, 1.25 * max(share["model"].max(), share["test"].max(), asked.max()))
            classes.legend(loc="upper center", ncols=3)
            classes.grid(axis="x", visible=False)

        bits.set(title="Where the bits go", xlabel="timestep t", ylabel="bits/dim of each timestep",
                 xscale="log", yscale="log")
        if found := report.get("by_timestep"):
            bits.plot(found["t"], found["bits"], ".-", color=BLUE)
            _number_axis(bits.xaxis)

        manifold.set(title="Fidelity and variety", ylabel="share", ylim=(0, 1.12))
        if found := report.get("manifold"):
            measures = ("precision", "recall", "coverage")
            colours = dict(zip(found, (BLUE, GREY, ORANGE, GREEN, *COLOURS)))
            width = 0.8 / len(found)
            for k, (name, row) in enumerate(found.items()):
                x = np.arange(3) + (k - (len(found) - 1) / 2) * width
                bars = manifold.bar(x, [row.get(measure, np.nan) for measure in measures], 0.92 * width, label=name,
                                    color=colours[name])
                manifold.bar_label(bars, fmt="%.2f", fontsize=7.5, padding=1)
            manifold.set_xticks(range(3), measures)
            manifold.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4)
            manifold.grid(axis="x", visible=False)

        distances.set(title="Distance to the nearest training image", xlabel="distance", ylabel="share of images (%)")
        if found := report.get("distances"):
            values = {name: np.asarray(found[name], float) for name in ("test", "model")}
            edges = np.linspace(0, max(v.max() for v in values.values()), 41)
            for name, label, colour in (("test", "test images", GREY), ("model", "generated", BLUE)):
                weights = np.full(len(values[name]), 100 / len(values[name]))
                distances.hist(values[name], edges, weights=weights, histtype="stepfilled", color=colour, alpha=0.25)
                distances.hist(values[name], edges, weights=weights, histtype="step", color=colour, linewidth=1.6)
                distances.plot([], [], color=colour, label=f"{label} (median {np.median(values[name]):.3g})")
            distances.set_ylim(0, distances.get_ylim()[1] * 1.25)  # room for the legend
            distances.legend(loc="best")

        for panel, key in zip(figure.axes, ("histogram", "by_timestep", "manifold", "distances")):
            if not report.get(key):
                _leave_blank(panel, "not measured")


def save_frontier(path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], metadata: Mapping[str, str]) -> None:
    """PNG of quality against time: a curve of (minutes of training, Frechet distance over its floor) for each name."""
    with _figure(path, 7.5, 4.6, metadata) as figure:
        axes = figure.subplots()
        axes.set(title="Quality against training time", xlabel="minutes of training",
                 ylabel="Fréchet distance, ratio to real images", xscale="log", yscale="log")
        axes.axhline(1, color=INK_COLOUR, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate("real images", (0, 1), (4, 3), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
                      fontsize=8, color=INK_COLOUR)
        for (name, points), colour in zip(curves.items(), COLOURS * len(curves)):
            minutes, ratio = np.array(sorted(points), float).reshape(-1, 2).T
            axes.plot(minutes, ratio, color=colour, marker="o", markersize=4, label=name)
        measured = sorted({minutes for points in curves.values() for minutes, _ in points})
        axes.set_xticks(measured, [f"{minutes:g}" for minutes in measured])
        axes.set_xticks([], minor=True)
        _number_axis(axes.yaxis)
        _label_ends(figure, axes)


# What the pictures say


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
    if correlation < 0.5:
        return "static"
    return "washed out" if pixels.mean() > mean + std else None


# Shared by all of the above


def _tiles(images: ArrayLike) -> Pixels:
    """[..., h, w] -> [N, h, w]."""
    array = np.asarray(images)
    return array.reshape(-1, *array.shape[-2:])


def _enlarge(images: Pixels, scale: int) -> Pixels:
    return images.repeat(scale, axis=-2).repeat(scale, axis=-1)


def _page(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    page = Image.new("L", (int(width), int(height)), PAPER)
    return page, ImageDraw.Draw(page)


def _write_text(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, anchor: str = "lm",
                level: int = INK) -> None:
    """Text in Pillow's own font, which has only ASCII."""
    draw.text(at, text, fill=level, font=ImageFont.load_default(size), anchor=anchor)


def _text_width(text: str, size: int) -> int:
    return math.ceil(ImageFont.load_default(size).getlength(text))


def _short(value: float) -> str:
    """Three digits at most, and no exponent: 0.042, 1.23, 12.3, 1230."""
    return f"{value:.2g}" if value < 1 else f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


@contextmanager
def _figure(path: Path, width: float, height: float, metadata: Mapping[str, str] | None) -> Iterator[Any]:
    """A matplotlib figure (inches) in the project's style, written to `path` when the block ends."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure((width, height), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        yield figure
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    _save_png(path, picture, metadata or {})


def _leave_blank(panel: Any, reason: str) -> None:
    panel.set(xscale="linear", yscale="linear", xticks=[], yticks=[], xlabel="", ylabel="")
    panel.text(0.5, 0.5, reason, transform=panel.transAxes, ha="center", va="center", color=GREY)


def _number_axis(axis: Any, host: Any = None) -> None:
    """Plain numbers on a log axis, at 1, 2 and 5 of each decade where there are few decades (on its host's axis)."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = (host or axis).get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _label_ends(figure: Any, axes: Any) -> None:
    """Names each line at its right end, moved up where two names would overlap."""
    figure.canvas.draw()  # fixes the layout, and with it the heights in points
    ends = [(axes.transData.transform((line.get_xdata()[-1], line.get_ydata()[-1]))[1] * 72 / figure.dpi, line)
            for line in axes.lines if not line.get_label().startswith("_")]
    last = -math.inf
    for y, line in sorted(ends, key=lambda end: end[0]):
        last = max(y, last + 13)
        axes.annotate(line.get_label(), (line.get_xdata()[-1], line.get_ydata()[-1]), (8, last - y),
                      textcoords="offset points", va="center", color=line.get_color())


def _save_png(path: Path, picture: Image.Image, metadata: Mapping[str, str]) -> None:
    text = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        text.add_text(key, value)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=text)
    _write(path, buffer.getvalue())


def _write(path: Path, data: bytes) -> None:
    """The file appears whole or not at all, its folder too; what can't be written is a UserError."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(beside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: the picture can't be written ({error.strerror or error}); "
                        "make room or free this path, and run again") from error
