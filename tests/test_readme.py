"""The readme's worked examples do what it says."""

import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import config as configs
import dataset
from config import DiffusionConfig
from diffusion import make_schedule
from samplers import SAMPLERS, spaced_timesteps
from support import checkpoint
from tests.conftest import ROOT, TINY

README = (ROOT / "readme.md").read_text()


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setattr("samplers.SAMPLERS", dict(SAMPLERS))
    names: dict = {}
    for block in BLOCKS[1:]:
        exec(block, names)
    return names


def test_schedule_example(tmp_path) -> None:
    """Both edits, as the readme says, in a copy of the project; then the command, with a tiny network."""
    shutil.copytree(ROOT / "support", tmp_path / "support", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "dataset" / "generated", tmp_path / "dataset" / "generated")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    knob = re.search(r'schedule: Literal\["cosine", "linear", "sigmoid"\] = "cosine"', README)
    for name, before, after in (
            ("diffusion.py", "    else:\n        raise UserError", f"{BLOCKS[0]}    else:\n        raise UserError"),
            ("config.py", 'schedule: Literal["cosine", "linear"] = "cosine"', knob[0])):
        content = (tmp_path / name).read_text()
        assert content.count(before) == 1
        (tmp_path / name).write_text(content.replace(before, after))
    flags = ["--schedule", "sigmoid", "--minutes", "0.02", "--name", "mine-0", "--dataset", "generated",
             "--preview", "0", "--steps", "3", "--num-images", "4", *TINY]
    process = subprocess.run([sys.executable, "run.py", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    alpha_bar = checkpoint.load(tmp_path / "checkpoints/mine-0/last.safetensors")["history"]["alpha_bar"]
    assert alpha_bar.shape == (1001,) and alpha_bar[0] == 1 and alpha_bar[-1] < 2e-4 and (alpha_bar.diff() < 0).all()
    steps = (alpha_bar[1:] / (1 - alpha_bar[1:])).log().diff()
    torch.testing.assert_close(steps, torch.full((999,), -18 / 999, dtype=torch.float64))


def test_sampler_example(examples) -> None:
    schedule = make_schedule(DiffusionConfig(timesteps=100))
    point = torch.full((2, 1, 4, 4), 0.3, dtype=torch.float64)
    random = torch.Generator().manual_seed(0)

    def randn() -> torch.Tensor:
        return torch.randn(point.shape, generator=random, dtype=torch.float64)

    *_, (s, x, _) = examples["SAMPLERS"]["restart"](lambda x, t: point, schedule, randn(), spaced_timesteps(100, 7),
                                                    randn)
    assert s == 0 and torch.allclose(x, point)


def test_data_set_example(examples, tmp_path) -> None:
    random = np.random.default_rng(0)
    for name in ("train", "t10k"):
        examples["write_idx"](tmp_path / f"{name}-images-idx3-ubyte", random.integers(0, 256, (20, 28, 28), np.uint8))
        examples["write_idx"](tmp_path / f"{name}-labels-idx1-ubyte", np.arange(20, dtype=np.uint8) % 10)
    assert len(dataset.load_idx(tmp_path, "train")) == 20


def test_flags_in_the_readme_exist() -> None:
    commands = re.findall(r"python run\.py (-[^`\n;#]+)", README.replace("$s", "0"))
    assert len(commands) >= 8
    for command in set(commands) - {"--help"}:
        configs.parse(shlex.split(command.replace("--schedule sigmoid", "")))  # which the reader adds


def test_pictures_in_the_readme_exist() -> None:
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file(), path


def test_the_pictures_are_of_the_weights_that_ship() -> None:
    digest = checkpoint.weights_digest(checkpoint.load(checkpoint.PRETRAINED)["ema"])
    for path in (ROOT / "results" / "pretrained").iterdir():
        assert digest in str(Image.open(path).info), path


def test_no_figure_is_left_open() -> None:
    assert "@@" not in README
