"""Pictures: pixels where they should be, metadata that survive, files that appear whole or not at all."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from config import UserError
from support import plots
from support.files import write_results

METADATA = {"weights": "0f3a", "sampler": "dpmpp", "steps": "10"}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Those that would have been rendered, to be asked what they show: quicker, and more is known of them."""
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    return saved


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def strokes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Digit-like images [count, 1, 28, 28]: a slanted stroke and a foot, of any height, place and slant."""
    images = np.zeros((count, 1, 28, 28), np.uint8)
    for image in images[:, 0]:
        top, bottom, x, slant = rng.integers(2, 8), rng.integers(15, 26), rng.integers(9, 16), rng.uniform(-0.4, 0.4)
        for row in range(top, bottom + 1):
            column = int(x + slant * (row - top))
            image[row, column:column + 2] = 255
            image[row, column + 2] = 90  # below STROKE_LEVEL: the soft edge of a stroke
        image[bottom, column:column + rng.integers(3, 8)] = 255
    return images


# Grids


def test_grid_holds_every_image_in_its_place(rng):
    images = noise(rng, 256, 1, 28, 28)
    grid = plots.to_grid(images, 16)
    assert grid.shape == (16 * 30 + 2, 16 * 30 + 2) and grid.dtype == np.uint8
    for i in (0, 1, 15, 16, 255):
        row, column = divmod(i, 16)
        np.testing.assert_array_equal(grid[30 * row + 2:30 * row + 30, 30 * column + 2:30 * column + 30], images[i, 0])
    assert not grid[::30].any() and not grid[1::30].any() and not grid[:, ::30].any() and not grid[:, 1::30].any()


def test_grid_with_an_unfinished_row_and_with_few_images(rng):
    grid = plots.to_grid(255 - 0 * noise(rng, 5, 1, 28, 28), 3)
    assert grid.shape == (62, 92) and not grid[32:, 62:].any() and grid[32:60, 32:60].all()
    assert plots.to_grid(noise(rng, 2, 28, 28), 16).shape == (32, 62)


def test_grid_takes_a_tensor_and_is_saved_at_twice_the_size(tmp_path, rng):
    torch = pytest.importorskip("torch")
    images = noise(rng, 6, 1, 28, 28)
    plots.save_grid(tmp_path / "sample.png", torch.from_numpy(images), 3, METADATA)
    picture = np.asarray(Image.open(tmp_path / "sample.png"))
    np.testing.assert_array_equal(picture[::2, ::2], plots.to_grid(images, 3))
    np.testing.assert_array_equal(picture[1::2, 1::2], plots.to_grid(images, 3))


@pytest.mark.parametrize("columns", [1, 4, 15])
def test_process_has_a_row_per_image_and_a_headed_column_per_timestep(tmp_path, rng, columns):
    states = noise(rng, columns, 6, 1, 28, 28)
    timesteps = [round(1000 * (1 - k / columns)) for k in range(columns)]
    plots.save_process(tmp_path / "process.png", states, timesteps, METADATA)
    picture = np.asarray(Image.open(tmp_path / "process.png"))
    header = picture.shape[0] - 6 * 88
    assert picture.shape[1] == columns * 88 + 4
    for k in range(columns):
        assert picture[:header, 4 + 88 * k:88 * (k + 1)].min() < 100  # text above each column
        for i in range(6):
            tile = picture[header + 88 * i:header + 88 * i + 84:3, 4 + 88 * k:88 * (k + 1):3]
            np.testing.assert_array_equal(tile, states[k, i, 0])
    np.testing.assert_array_equal(picture[:header, :2], 255)  # no header is cut off
    np.testing.assert_array_equal(picture[:header, -2:], 255)


def test_labelled_grid_has_titles_above_its_columns_and_names_beside_its_rows(rng):
    images = noise(rng, 6, 1, 28, 28)
    picture = np.asarray(plots.labelled_grid(images, 3, titles="123", names=["noisy", "guess"]))
    assert picture.shape == (4 + 28 + 2 * 88 + 4, 4 + 120 + 3 * 88 + 4)
    np.testing.assert_array_equal(picture[:36, :124], 255)  # no column has the names
    for i, image in enumerate(images[:, 0]):
        y, x = 36 + 88 * (i // 3), 128 + 88 * (i % 3)
        np.testing.assert_array_equal(picture[y:y + 84:3, x:x + 84:3], image)
        assert picture[:36, x:x + 84].min() < 100 and picture[y:y + 84, 4:124].min() < 100
    plain = np.asarray(plots.labelled_grid(images, 3))
    np.testing.assert_array_equal(plain, picture[32:, 124:])


def test_process_shrinks_headers_that_are_too_wide(tmp_path, rng):
    plots.save_process(tmp_path / "p.png", noise(rng, 3, 6, 28, 28), [100_000, 50_000, 0], METADATA)
    picture = np.asarray(Image.open(tmp_path / "p.png"))[:26]
    assert (picture[:, 88:92] == 255).all() and (picture[:, :2] == 255).all()


def test_animation_keeps_every_frame_and_grey_level(tmp_path, rng):
    states = noise(rng, 11, 6, 1, 28, 28)
    states[5] = states[5] // 8 + 40  # a frame of low contrast stays one
    path = tmp_path / "process.gif"
    plots.save_animation(path, states, METADATA)
    with Image.open(path) as film:
        assert film.n_frames == 11 and film.info["loop"] == 0
        assert b"sampler: dpmpp" in film.info["comment"]
        durations = []
        for k in range(11):
            film.seek(k)
            durations.append(film.info["duration"])
            frame = np.asarray(film.convert("L"))
            np.testing.assert_array_equal(frame, plots.to_grid(states[k].repeat(4, -1).repeat(4, -2), 6, 8))
        assert durations[-1] == 1500 and len(set(durations[:-1])) == 1 and durations[0] >= 30
    data = path.read_bytes()
    assert data[10] & 0x87 == 0x87 and data[13:13 + 768] == bytes(level for level in range(256) for _ in range(3))
    assert local_palettes(data) == [False] * 11


def local_palettes(data: bytes) -> list[bool]:
    """Whether each image of a GIF brings its own palette, by walking the blocks of the file (GIF89a, section 20)."""
    at, found = 13 + 3 * 2 ** ((data[10] & 7) + 1), []
    while data[at] != 0x3B:
        if data[at] == 0x2C:
            flags = data[at + 9]
            found.append(bool(flags & 0x80))
            at += 10 + (3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0) + 1
        else:
            at += 2
        while data[at]:
            at += data[at] + 1
        at += 1
    return found


# Whole numbers


def places(line: np.ndarray, digits: np.ndarray) -> list[tuple[int, int]]:
    """(row, column) of each digit's strokes in the line, by looking for its exact pixels."""
    found, start = [], 0
    for digit in digits[:, 0]:
        rows, cols = np.nonzero(digit >= plots.STROKE_LEVEL)
        spots = np.argwhere([[all(line[rows - rows.min() + y, cols - cols.min() + x] == digit[rows, cols])
                              for x in range(start, line.shape[1] - np.ptp(cols))]
                             for y in range(line.shape[0] - np.ptp(rows))])
        assert len(spots), "a digit is missing or was overdrawn"
        y, x = min(spots, key=lambda spot: spot[1])
        found.append((int(y), int(x + start)))
        start += int(x)
    return found


def test_number_has_one_baseline_and_even_gaps(rng):
    digits = strokes(rng, 12)
    line = plots.set_in_line(digits)
    strokes_at = []  # points of each digit's strokes in the line
    for (y, x), digit in zip(places(line, digits), digits[:, 0], strict=True):
        rows, cols = np.nonzero(digit >= plots.STROKE_LEVEL)
        strokes_at.append(np.stack([rows - rows.min() + y, cols - cols.min() + x], 1))
    assert len({points[:, 0].max() for points in strokes_at}) == 1, "one baseline"
    for left, right in itertools.pairwise(strokes_at):
        distance = np.sqrt(np.square(left[:, None] - right[None]).sum(-1)).min()
        shared = np.intersect1d(left[:, 0], right[:, 0])
        gap = min(right[right[:, 0] == row, 1].min() - left[left[:, 0] == row, 1].max() for row in shared)
        assert plots.GAP <= distance < plots.GAP + 1 and plots.GAP <= gap < plots.GAP + 3
    assert min(p[:, 1].min() for p in strokes_at) == line.shape[1] - 1 - max(p[:, 1].max() for p in strokes_at) == 6


def test_number_of_one_digit_of_sixty_four_and_of_nothing(rng):
    one, many = plots.set_in_line(strokes(rng, 1)), plots.set_in_line(strokes(rng, 64))
    assert one.max() == 255 and many.shape[1] > 20 * one.shape[1]
    assert abs(many.shape[0] - one.shape[0]) < 20, "still a single line"
    assert not plots.set_in_line(np.zeros((3, 1, 28, 28), np.uint8)).any()
    full = plots.set_in_line(np.full((3, 1, 28, 28), 255, np.uint8))  # tiles that are all stroke stay apart
    assert full.shape == (28 + 2 * 6, 3 * 28 + 2 * (plots.GAP - 1) + 2 * 6)


def test_a_digit_without_a_stroke_leaves_a_space(rng):
    digits = strokes(rng, 2)
    gap = np.concatenate([digits[:1], np.zeros_like(digits[:1]), digits[1:]])
    assert plots.set_in_line(gap).shape[1] >= plots.set_in_line(digits).shape[1] + 5


def test_number_is_dark_on_white_paper(tmp_path, rng):
    digits = strokes(rng, 8)
    plots.save_number(tmp_path / "number.png", digits, METADATA)
    with Image.open(tmp_path / "number.png") as picture:
        pixels = np.asarray(picture)
        assert picture.text == METADATA
    line = plots.set_in_line(digits)
    assert pixels.shape == (4 * line.shape[0], 4 * line.shape[1])
    assert (pixels[:16] == 255).all() and (pixels[:, :16] == 255).all() and pixels.min() < 60
    small = pixels.reshape(line.shape[0], 4, line.shape[1], 4).mean((1, 3))
    assert np.corrcoef(small.ravel(), line.ravel())[0, 1] < -0.8


# Plots


COLUMNS: dict[str, Any] = {
    "step": [1, 10, 100, 1000], "images": [64, 640, 6400, 64000], "train_loss": [1.0, 0.5, 0.1, 0.06],
    "test_loss": [0.9, 0.4, 0.1, 0.05], "skipped": [0, 0, 0, 0], "test_loss_t1-500": [0.8, 0.5, 0.2, 0.1],
    "test_loss_t501-1000": [0.4, 0.1, 0.03, 0.01], "seconds": [1.0, 2.0, 5.0, 30.0]}
NAMES = ["class-wise Fréchet", "texture", "0", "1", "9"]
CLASSES = [0, 1, 4, 9]
REPORT: dict[str, Any] = {
    "ratios": {name: (3.0 + k, 0.5 * k or None) for k, name in enumerate(NAMES)},
    "test_ratios": {**dict.fromkeys(["1", "texture", "class-wise Fréchet"], (2.0, None)), "7": (9.0, 1.0)},
    "classes": CLASSES, "histogram": {"model": [12] * 4, "asked": [9, 11] * 2},
    "overlap": {row: {"precision": p, "recall": p, "coverage": p}
                for row, p in (("sampled", 0.9), (plots.BASELINE, 0.95))},
    "neighbours": {"model": np.linspace(2, 8, 50), "test": np.linspace(1, 9, 40)},
}
# Name, whether it is a distance, change, and the ends of its interval.
ROWS = [("Frechet distance", True, -0.1, -0.15, -0.05), ("texture", True, 0.02, -0.04, 0.1),
        ("precision", False, -0.01, -0.02, -0.005), ("confident", False, 0.02, -0.01, 0.05)]


WRITERS = {
    "grid": lambda path, metadata: plots.save_grid(path, np.zeros((4, 1, 28, 28), np.uint8), 2, metadata),
    "process": lambda path, metadata: plots.save_process(path, np.zeros((2, 6, 1, 28, 28), np.uint8), [9, 0], metadata),
    "number": lambda path, metadata: plots.save_number(path, strokes(np.random.default_rng(0), 3), metadata),
    "losses": lambda path, metadata: plots.save_losses(path, COLUMNS, COLUMNS, metadata, 60_000),
    "evaluation": lambda path, metadata: plots.save_evaluation(path, REPORT, metadata),
    "neighbours": lambda path, metadata: plots.save_neighbours(
        path, np.zeros((8, 1, 28, 28), np.uint8), np.ones((8, 1, 28, 28), np.uint8), [1.5] * 8, metadata),
    "comparison": lambda path, metadata: plots.save_comparison(
        path, (np.zeros((3, 1, 28, 28), np.uint8),) * 2, ("before", "after"), ROWS, metadata),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", WRITERS)
def test_png_is_written_whole_with_its_metadata(tmp_path, name):
    path = tmp_path / "picture.png"
    metadata = {**METADATA, "remark": "an ü outside ASCII, and 数"}
    WRITERS[name](path, metadata)
    with Image.open(path) as picture:
        picture.load()
        assert picture.text == metadata
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"], "nothing is left beside it"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reference", [None, COLUMNS])
def test_losses_of_a_run_that_has_just_begun(tmp_path, reference):
    columns = {name: values[:1] for name, values in COLUMNS.items()} | {"train_loss": [float("nan")]}
    plots.save_losses(tmp_path / "loss.png", columns, reference, METADATA, 60_000)


@pytest.mark.parametrize("reference, shipped", [(None, False), (COLUMNS, True)])
def test_losses_show_the_first_and_the_last_of_each_noise_level(tmp_path, figures, reference, shipped):
    for rows, last in ((3, "6,400"), (4, "64,000")):
        columns = {name: values[:rows] for name, values in COLUMNS.items()}
        plots.save_losses(tmp_path / "loss.png", columns, reference, METADATA, 60_000)
        curve, levels = figures.pop().axes
        assert legend(curve) == ["test loss, pretrained weights"] * shipped + [plots.TRAINING_LOSS, "test loss"]
        assert legend(levels) == ["pretrained weights"] * shipped + ["after 64 images", f"after {last} images"]


def test_losses_show_the_columns_of_metrics_csv(tmp_path, figures):
    plots.save_losses(tmp_path / "loss.png", COLUMNS, {**COLUMNS, "test_loss_t1-500": [9.0]}, METADATA, 60_000)
    curve, levels = figures[0].axes
    lines = {line.get_label(): line for line in (*curve.lines, *levels.lines)}
    training = lines[plots.TRAINING_LOSS].get_xydata().T
    np.testing.assert_array_equal(training, [COLUMNS["images"], COLUMNS["train_loss"]])
    np.testing.assert_array_equal(lines["test loss"].get_ydata(), COLUMNS["test_loss"])
    np.testing.assert_array_equal(lines["after 64 images"].get_ydata(), [0.8, 0.4])
    np.testing.assert_array_equal(lines["after 64,000 images"].get_ydata(), [0.1, 0.01])
    np.testing.assert_array_equal(lines["pretrained weights"].get_ydata(), [9.0, 0.01])
    assert [label.get_text() for label in levels.get_xticklabels()] == ["1-500", "501-1000"]
    (epochs,) = curve.child_axes
    figures[0].draw_without_rendering()
    assert epochs.get_xlabel() == "epochs" and np.allclose(epochs.get_xlim(), np.divide(curve.get_xlim(), 60_000))


def test_one_colour_means_one_thing_in_both_panels_of_the_losses(tmp_path, figures):
    plots.save_losses(tmp_path / "loss.png", COLUMNS, COLUMNS, METADATA, 60_000)
    curve, levels = figures[0].axes
    for axes in (curve, levels):  # this run's test loss, what comes from the shipped weights, the training loss
        meanings = {line.get_color(): "pretrained" if "pretrained" in line.get_label() else
                    "training" if "training" in line.get_label() else "test" for line in axes.lines}
        assert meanings == {plots.GREY: "pretrained", plots.BLUE: "test"} | (
            {plots.GREEN: "training"} if axes is curve else {})
    assert len({line.get_linestyle() for line in levels.lines if line.get_color() == plots.BLUE}) == 2


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_evaluation_has_four_panels(tmp_path, figures):
    plots.save_evaluation(tmp_path / "e.png", REPORT, METADATA)
    titles = ["Distance to the training images", "Classes", "Fidelity and variety", "Nearest training image"]
    assert [axes.get_title("left") for axes in figures[0].axes] == titles
    assert list(figures[0].get_size_inches() * figures[0].dpi) == [1320, 1080]


def test_evaluation_sets_distances_against_real_images(tmp_path, figures):
    plots.save_evaluation(tmp_path / "e.png", REPORT, METADATA)
    axes = figures[0].axes[0]
    assert set(legend(axes)) == {"sampled", plots.BASELINE, "test set"}
    assert legend(figures[0].axes[2]) == ["sampled", plots.BASELINE], "one name for the baseline"
    assert axes.get_xscale() == "log" and any(list(line.get_xdata()) == [1, 1] for line in axes.lines)
    assert [label.get_text() for label in axes.get_yticklabels()] == NAMES
    low, high = axes.get_ylim()
    assert low > len(NAMES) - 1 and high < 0, "the first name is on top"
    test_set, ours = axes.containers
    np.testing.assert_array_equal(ours.lines[0].get_xydata(), [(3.0 + k, k) for k in range(len(NAMES))])
    (bars,) = ours.lines[2]
    spans = [(y, x0, x1) for (x0, y), (x1, _) in filter(len, bars.get_segments())]
    assert spans == [(k, 3 + 0.5 * k, 3 + 1.5 * k) for k in range(1, len(NAMES))], "the first has no error"
    # Each test value stands in its name's row, whatever their order; a class that was not measured has none.
    np.testing.assert_array_equal([y for x, y in test_set.lines[0].get_xydata() if x == 2], [0, 1, 3])
    assert np.isnan(test_set.lines[0].get_xdata()).sum() == 2
    assert [(text.get_text(), text.get_position()[1]) for text in axes.texts] == [
        ("too few test images", 2), ("too few test images", 4)]


def test_evaluation_shows_the_classes_that_there_are_in_order(tmp_path, figures):
    plots.save_evaluation(tmp_path / "e.png", REPORT, METADATA)
    axes = figures[0].axes[1]
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    np.testing.assert_allclose(heights["sampled"], [25] * 4)
    np.testing.assert_allclose(heights["asked for"], [22.5, 27.5] * 2)
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(k) for k in CLASSES]


# Comparisons


def compare(path: Path, count: int, rows: list[Any] = ROWS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both models' images, and the picture's pixels."""
    pairs = noise(np.random.default_rng(1), 2, count, 1, 28, 28)
    plots.save_comparison(path, (pairs[0], pairs[1]), ("before", "a rather long name after it"), rows, METADATA)
    with Image.open(path) as picture:
        return pairs[0], pairs[1], np.asarray(picture.convert("L"))


@pytest.mark.parametrize("count", [1, 12])
def test_comparison_shows_pairs_pixel_by_pixel_in_two_rows(tmp_path, count):
    before, after, picture = compare(tmp_path / "c.png", count)
    assert picture.shape[1] >= 216 + 92 * count
    for i in range(count):
        x = 216 + 92 * i
        for top, images in ((52, before), (144, after)):
            np.testing.assert_array_equal(picture[top:top + 84, x:x + 84], images[i, 0].repeat(3, 0).repeat(3, 1))
        assert (picture[136:144, x:x + 84] == 255).all(), "a gap between the rows"
    assert picture[8:44, 8:608].min() < 100, "a title"
    for top in (52, 144):
        assert picture[top:top + 80, 8:208].min() < 100, "each row is named"
        assert (picture[top:top + 80, 208:216] == 255).all() and (picture[top:top + 80, :8] == 255).all()


def test_comparison_draws_the_interval_of_each_change(tmp_path, rng, figures):
    images = noise(rng, 2, 28, 28)
    plots.save_comparison(tmp_path / "c.png", (images, images), ("a", "b"), ROWS, METADATA)
    distances, shares = figures[0].axes
    assert "decides" in distances.get_title("left") and "best where the baseline is" in shares.get_title("left")
    assert "Blue: the interval excludes 0.\nGrey: it includes 0" in figures[0].get_supxlabel()
    units = "left of 0, b is closer", "(percentage points)"
    for axes, part, unit in zip((distances, shares), (ROWS[:2], ROWS[2:]), units):
        assert [label.get_text() for label in axes.get_yticklabels()] == [row[0] for row in part]
        assert axes.yaxis_inverted() and unit in axes.get_xlabel(), "the first row is on top"
        intervals = [line for line in axes.lines if len(line.get_xdata()) == 3]
        for line, (_, _, change, low, high) in zip(intervals, part, strict=True):
            np.testing.assert_allclose(line.get_xdata(), [100 * low, 100 * change, 100 * high])
            assert line.get_color() == (plots.GREY if low < 0 < high else plots.BLUE), "coloured where it is clear of 0"
        low, high = axes.get_xlim()
        assert low == -high and all(high > abs(end) for line in intervals for end in line.get_xdata())
        assert any(list(line.get_xdata()) == [0, 0] for line in axes.lines), "a line at no change"


def test_an_experiment_shows_the_interval_of_each_change_and_keeps_flags_whole(tmp_path, figures):
    rows = [("--spacing trailing --guidance-interval 0.3 0.5", -0.1, -0.2, -0.05), ("--focus 0", 0.1, -0.1, 0.2)]
    plots.save_intervals(tmp_path / "e.png", rows, METADATA)
    axes, = figures[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "--spacing trailing\n--guidance-interval 0.3 0.5", "--focus 0"]
    assert [line.get_color() for line in axes.lines[:2]] == [plots.BLUE, plots.GREY]


def test_comparison_with_static_does_not_flatten_everything_else(tmp_path, rng, figures):
    """Recall and coverage near 0 once drew an axis to 1e9: what is far off leaves the picture."""
    rows = [("all", True, 3e9, 2e9, 4e9), ("texture", True, 0.3, 0.2, 0.4), ("class-wise", True, -0.1, -0.3, 1.4),
            ("recall", False, -0.95, -0.96, -0.94), ("coverage", False, -0.4, -0.5, -0.3)]
    images = noise(rng, 2, 28, 28)
    plots.save_comparison(tmp_path / "c.png", (images, images), ("a", "b"), rows, METADATA)
    for axes in figures[0].axes:
        low, high = axes.get_xlim()
        assert -106 < low < -90 and 90 < high < 106
    lines = [line for line in figures[0].axes[0].lines if len(line.get_xdata()) == 3]
    assert [line.get_marker() for line in lines] == [">", "o", "o"] and list(lines[0].get_xdata()) == [106, 100, 106]
    np.testing.assert_allclose(lines[2].get_xdata(), [-30, -10, 106])
    assert lines[2].get_xdata()[2] > figures[0].axes[0].get_xlim()[1]
    ends = figures[0].axes[0].transData.transform([(x, 0) for x in lines[1].get_xdata()])[:, 0]
    assert np.ptp(ends) > figures[0].axes[0].bbox.width / 20


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows", [[], [("texture", True, 0.0, 0.0, 0.0)]])
def test_comparison_without_a_difference_or_without_metrics(tmp_path, rows):
    compare(tmp_path / "c.png", 3, rows)


# Files


ANIMATION = {"animation": lambda path, metadata: plots.save_animation(
    path, np.zeros((2, 1, 28, 28), np.uint8), metadata)}


@pytest.mark.parametrize("name", ["grid", "losses", "animation"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, name):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("support.files.os.fsync", full)
    with pytest.raises(UserError, match=r"picture\.png.*No space left"):
        (WRITERS | ANIMATION)[name](path, METADATA)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_or_missing_is_a_user_error(tmp_path):
    (tmp_path / "results").write_text("not a folder")
    for folder in ("results", "missing"):
        with pytest.raises(UserError, match=folder) as caught:
            WRITERS["grid"](tmp_path / folder / "sample.png", METADATA)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["results"], "folders are for others to make"


def test_laying_out_images_imports_neither_matplotlib_nor_torch(tmp_path):
    code = ("import sys, numpy as np; from pathlib import Path; from support import plots; "
            "x = np.zeros((6, 1, 28, 28), np.uint8); m = {}; p = Path(sys.argv[1]); plots.save_grid(p, x, 3, m); "
            "plots.save_process(p, x[None], [0], m); plots.save_animation(p, x[None], m); plots.save_number(p, x, m); "
            "sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)")
    folder = Path(plots.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.png")], cwd=folder).returncode == 0


@pytest.fixture(scope="module")
def losses_picture(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("losses") / "loss.png"
    plots.save_losses(path, COLUMNS, COLUMNS, METADATA, 60_000)
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["notebook", "matplotlibrc"])
def test_the_users_own_matplotlib_settings_stay_out_of_it(tmp_path, losses_picture, kind):
    """A notebook sets its backend for all its child processes; a matplotlibrc may say anything."""
    settings = tmp_path / "matplotlibrc"
    settings.write_text("savefig.format: svg\nsavefig.bbox: tight\nsavefig.dpi: 30\nfont.size: 30\nlines.marker: x\n"
                        "axes.facecolor: red\ntext.usetex: True\nbackend: module://nowhere.to_be_found\n")
    environment = {"notebook": {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
                   "matplotlibrc": {"MATPLOTLIBRC": str(settings)}}[kind]
    code = ("import sys, json; from pathlib import Path; from support import plots; "
            "columns, metadata = json.loads(sys.argv[2]); "
            "plots.save_losses(Path(sys.argv[1]), columns, columns, metadata, 60_000)")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "loss.png"), json.dumps([COLUMNS, METADATA])],
                   cwd=Path(plots.__file__).parent.parent, env={**os.environ, **environment}, check=True)
    assert (tmp_path / "loss.png").read_bytes() == losses_picture


def test_settings_made_in_the_process_stay_out_of_it_too(tmp_path, losses_picture):
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"savefig.format": "svg", "font.size": 30, "savefig.bbox": "tight"}):
        plots.save_losses(tmp_path / "loss.png", COLUMNS, COLUMNS, METADATA, 60_000)
        assert matplotlib.rcParams["font.size"] == 30, "they are the user's again"
    assert (tmp_path / "loss.png").read_bytes() == losses_picture


def test_a_picture_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    """The others are written, and training goes on."""
    (tmp_path / "loss.png").mkdir()  # as on Windows a file that another program holds
    writers = {"loss.png": lambda path: WRITERS["losses"](path, METADATA),
               "grid.png": lambda path: WRITERS["grid"](path, METADATA)}
    assert write_results(tmp_path, writers) == [tmp_path / "grid.png"]
    out = capsys.readouterr().out
    assert out.startswith("WARNING: ") and "loss.png: can't be written" in out and out.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "loss.png"], "no unfinished file stays"
    with pytest.raises(ZeroDivisionError):  # a bug stays one
        write_results(tmp_path, {"bug.png": lambda path: 1 / 0})


# What the pictures say


def test_looks_broken(rng):
    good = strokes(rng, 64)
    clean = good / 127.5 - 1

    def as_pixels(x: np.ndarray) -> np.ndarray:
        return ((x.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)

    assert plots.looks_broken(good) is None
    assert plots.looks_broken(np.zeros((16, 1, 28, 28), np.uint8)) == "all black"
    assert plots.looks_broken(good // 8) == "all black"
    assert plots.looks_broken(np.full((16, 1, 28, 28), 255, np.uint8)) == "washed out"
    assert plots.looks_broken(np.full((16, 1, 28, 28), 128, np.uint8)) == "washed out"
    assert plots.looks_broken(255 - good) == "washed out"
    assert plots.looks_broken(noise(rng, 16, 1, 28, 28)) == "static"
    assert plots.looks_broken(as_pixels(rng.standard_normal((16, 1, 28, 28)))) == "static"
    assert plots.looks_broken(as_pixels(0.6 * clean + 0.8 * rng.standard_normal(clean.shape))) == "static"
    patches = np.full((16, 1, 28, 28), 0, np.uint8)  # as clothes: large bright shapes
    patches[:, :, 6:22, 7:21] = 240
    assert plots.looks_broken(patches, mean=0.286, std=0.353) is None


def test_no_failure_of_a_picture_ends_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such as a matplotlib that can't be imported."""
    def broken(path: Path) -> None:
        raise ImportError("numpy has another ABI")

    written = write_results(tmp_path, {"loss.png": broken, "table.csv": lambda path: path.touch()})
    assert written == [tmp_path / "table.csv"] and "numpy has another ABI" in capsys.readouterr().out


def test_log_axes_show_numbers_and_names_keep_their_dollars(tmp_path):
    """Matplotlib writes the numbers of log axes as mathematics, so mathematics stays on."""
    with plots.open_figure(tmp_path / "x.png", 400, 300, {}) as figure:
        axes = figure.subplots()
        assert axes.text(0, 0, "").get_parse_math()
        axes.set_xticks([0, 1], plots._without_math(["$a$", 5]))
    assert [label.get_text() for label in axes.get_xticklabels()] == [r"\$a\$", "5"]
