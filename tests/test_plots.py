"""Pictures: pixels where they should be, metadata that survive, files that appear whole or not at all."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import plots
import pytest
from PIL import Image

from config import UserError

METADATA = {"weights": "0f3a", "sampler": "dpmpp", "steps": "10"}


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
            image[row, column + 2] = 90  # below the level of ink: the soft edge of a stroke
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
    """(row, column) of each digit's ink in the line, by looking for its exact pixels."""
    found, start = [], 0
    for digit in digits[:, 0]:
        rows, cols = np.nonzero(digit >= plots.INK_LEVEL)
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
    ink = []  # points of each digit's ink in the line
    for (y, x), digit in zip(places(line, digits), digits[:, 0]):
        rows, cols = np.nonzero(digit >= plots.INK_LEVEL)
        ink.append(np.stack([rows - rows.min() + y, cols - cols.min() + x], 1))
    assert len({points[:, 0].max() for points in ink}) == 1, "one baseline"
    for left, right in zip(ink, ink[1:]):
        distance = np.sqrt(np.square(left[:, None] - right[None]).sum(-1)).min()
        shared = np.intersect1d(left[:, 0], right[:, 0])
        gap = min(right[right[:, 0] == row, 1].min() - left[left[:, 0] == row, 1].max() for row in shared)
        assert plots.GAP <= distance < plots.GAP + 1 and plots.GAP <= gap < plots.GAP + 3
    assert min(p[:, 1].min() for p in ink) == line.shape[1] - 1 - max(p[:, 1].max() for p in ink) == 6


def test_number_of_one_digit_of_sixty_four_and_of_nothing(rng):
    one, many = plots.set_in_line(strokes(rng, 1)), plots.set_in_line(strokes(rng, 64))
    assert one.max() == 255 and many.shape[1] > 20 * one.shape[1]
    assert abs(many.shape[0] - one.shape[0]) < 20, "still a single line"
    assert not plots.set_in_line(np.zeros((3, 1, 28, 28), np.uint8)).any()
    full = plots.set_in_line(np.full((3, 1, 28, 28), 255, np.uint8))  # tiles that are all ink stay apart
    assert full.shape == (28 + 2 * 6, 3 * 28 + 2 * (plots.GAP - 1) + 2 * 6)


def test_a_digit_without_ink_leaves_a_space(rng):
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


HISTORY = {
    "images": [64, 640, 6400, 64000], "train_loss": [1.0, 0.5, 0.1, 0.06],
    "test_images": [6400, 64000], "test_loss": [0.1, 0.06],
    "by_level": {"1-500": [0.2, 0.1], "501-1000": [0.03, 0.01]},
}
REPORT = {
    "histogram": {"model": [12] * 10, "test": [9, 11] * 5},
    "by_timestep": {"t": [1, 10, 100, 1000], "bits": [0.3, 0.01, 1e-3, 1e-5]},
    "manifold": {row: {"precision": p, "recall": p, "coverage": p} for row, p in
                 (("model", 0.9), ("floor", 0.95), ("noise", 0.0))},
    "distances": {"model": np.linspace(2, 8, 50), "test": np.linspace(1, 9, 40)},
}


def sweep(path: Path, metadata: dict[str, str]) -> None:
    digits = noise(np.random.default_rng(1), 8, 1, 28, 28)
    cells = {("ddpm", 5): digits, ("ddpm", 1000): digits, ("dpmpp", 5): digits}
    plots.save_sweep(path, cells, dict.fromkeys(cells, 1.5), {("ddpm", 5): 361.2}, metadata)


WRITERS = {
    "grid": lambda path, metadata: plots.save_grid(path, np.zeros((4, 1, 28, 28), np.uint8), 2, metadata),
    "process": lambda path, metadata: plots.save_process(path, np.zeros((2, 6, 1, 28, 28), np.uint8), [9, 0], metadata),
    "number": lambda path, metadata: plots.save_number(path, strokes(np.random.default_rng(0), 3), metadata),
    "losses": lambda path, metadata: plots.save_losses(path, HISTORY, HISTORY, metadata, 60_000),
    "sweep": sweep,
    "evaluation": lambda path, metadata: plots.save_evaluation(path, REPORT, metadata),
    "neighbours": lambda path, metadata: plots.save_neighbours(
        path, np.zeros((8, 1, 28, 28), np.uint8), np.ones((8, 1, 28, 28), np.uint8), [1.5] * 8, metadata),
    "frontier": lambda path, metadata: plots.save_frontier(path, {"ours": [(1, 9), (10, 2)], "b": [(5, 60)]}, metadata),
}


@pytest.mark.parametrize("name", WRITERS)
def test_png_is_written_whole_with_its_metadata(tmp_path, name):
    path = tmp_path / "results" / "run" / "picture.png"  # folders are made
    metadata = {**METADATA, "remark": "an ü outside ASCII, and 数"}
    WRITERS[name](path, metadata)
    with Image.open(path) as picture:
        picture.load()
        assert picture.text == metadata
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"], "nothing is left beside it"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("cut", [
    {"test_images": [], "test_loss": [], "by_level": {}},  # before the first evaluation
    {"test_images": [6400], "test_loss": [0.1], "by_level": {"1-500": [0.2], "501-1000": [0.03]}},
    {"images": [], "train_loss": [], "test_images": [], "test_loss": [], "by_level": {}},
    {"train_loss": [1.0, float("nan"), 0.1, 0.06]},
])
def test_losses_of_a_run_that_has_just_begun(tmp_path, cut):
    plots.save_losses(tmp_path / "loss.png", {**HISTORY, **cut}, HISTORY, METADATA, 60_000)
    plots.save_losses(tmp_path / "loss.png", {**HISTORY, **cut}, None, METADATA)


@pytest.mark.filterwarnings("error")
def test_evaluation_takes_what_was_measured(tmp_path):
    sizes = set()
    for keys in (["histogram", "manifold"], ["by_timestep", "distances"], []):
        plots.save_evaluation(tmp_path / "e.png", {key: REPORT[key] for key in keys}, METADATA)
        with Image.open(tmp_path / "e.png") as picture:
            sizes.add(picture.size)
    assert len(sizes) == 1


def test_sweep_leaves_missing_cells_blank(tmp_path):
    sweep(tmp_path / "sweep.png", METADATA)
    picture = np.asarray(Image.open(tmp_path / "sweep.png"))
    first, second = picture[104:228], picture[104 + 180:228 + 180]  # the cells of both samplers
    left = int(np.flatnonzero((first == 0).all(0))[0])
    assert (first[:, left + 244 + 14:left + 2 * 244 + 14] < 255).any(), "ddpm at 1000 steps"
    assert (second[:, left:left + 244] < 255).any(), "dpmpp at 5 steps"
    assert (picture[104 + 180:, left + 244:] == 255).all(), "dpmpp at 1000 steps was not drawn"
    assert (picture[104 + 124:104 + 166, left:left + 244] < 120).any(), "seconds below the cell"


# Files


@pytest.mark.parametrize("name", ["grid", "losses"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, name):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots.os, "fsync", full)
    with pytest.raises(UserError, match=r"picture\.png.*No space left"):
        WRITERS[name](path, METADATA)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_a_user_error(tmp_path):
    (tmp_path / "results").write_text("not a folder")
    with pytest.raises(UserError, match="results") as caught:
        WRITERS["grid"](tmp_path / "results" / "sample.png", METADATA)
    assert "\n" not in str(caught.value)


def test_drawing_digits_imports_neither_matplotlib_nor_torch(tmp_path):
    code = ("import sys, numpy as np, plots; from pathlib import Path; x = np.zeros((6, 1, 28, 28), np.uint8); "
            "m = {}; p = Path(sys.argv[1]); plots.save_grid(p, x, 3, m); plots.save_process(p, x[None], [0], m); "
            "plots.save_animation(p, x[None], m); plots.save_number(p, x, m); "
            "sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)")
    folder = Path(plots.__file__).parent
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.png")], cwd=folder).returncode == 0


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
