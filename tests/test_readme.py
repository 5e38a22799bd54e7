"""The readme's worked examples do what it says."""

import re

import numpy as np
import pytest
import torch

import config as configs
import dataset
from samplers import SAMPLERS, spaced_timesteps
from tests.conftest import ROOT

README = (ROOT / "readme.md").read_text()


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setattr("samplers.SAMPLERS", dict(SAMPLERS))
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, names)
    return names


def test_schedule_example(examples) -> None:
    schedule = examples["sigmoid_schedule"](1000)
    assert schedule.alpha_bar.shape == (1001,) and schedule.alpha_bar[0] == 1 and schedule.alpha_bar[-1] < 2e-4
    assert (schedule.alpha_bar.diff() < 0).all()


def test_sampler_example(examples) -> None:
    schedule = examples["sigmoid_schedule"](100)
    point = torch.full((2, 1, 4, 4), 0.3, dtype=torch.float64)
    random = torch.Generator().manual_seed(0)

    def randn() -> torch.Tensor:
        return torch.randn(point.shape, generator=random, dtype=torch.float64)

    *_, (s, x, _) = examples["SAMPLERS"]["restart"](lambda x, t: point, schedule, randn(), spaced_timesteps(100, 7), randn)
    assert s == 0 and torch.allclose(x, point)


def test_data_set_example(examples, tmp_path) -> None:
    random = np.random.default_rng(0)
    for name in ("train", "t10k"):
        examples["write_idx"](tmp_path / f"{name}-images-idx3-ubyte", random.integers(0, 256, (20, 28, 28), np.uint8))
        examples["write_idx"](tmp_path / f"{name}-labels-idx1-ubyte", np.arange(20, dtype=np.uint8) % 10)
    assert len(dataset.load_idx(tmp_path, "train")) == 20


def test_flags_in_the_readme_exist() -> None:
    commands = re.findall(r"python run\.py((?: --[\w-]+(?: (?!-)[\w./-]+)*)+)", README)
    assert len(commands) >= 4
    for command in set(commands) - {" --help"}:
        configs.parse(command.split())


def test_pictures_in_the_readme_exist() -> None:
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file(), path


def test_no_figure_is_left_open() -> None:
    assert "@@" not in README
