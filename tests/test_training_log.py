"""What a training run writes down, and when: log points and previews follow from the step alone."""

import csv
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import training.log
from config import Config, TrainConfig
from dataset import LabelledImages
from diffusion import make_schedule
from support import settings
from support.runtime import Runtime
from training.log import log_number, preview_number

CPU = Runtime(torch.device("cpu"), bf16=False, compile=False)


def points(number, epochs, steps_per_epoch):
    """The epochs at which a training loop writes: after each step in which the number grows."""
    steps = range(1, round(epochs * steps_per_epoch) + 1)
    return [step / steps_per_epoch for step in steps
            if number(step / steps_per_epoch) != number((step - 1) / steps_per_epoch)]


@pytest.mark.parametrize("steps_per_epoch", [60_000 / 64, 60_000 / 128, 1_000 / 64])
def test_log_points_come_soon_and_then_with_every_epoch(steps_per_epoch):
    step, rows = 1 / steps_per_epoch, points(log_number, 60, steps_per_epoch)
    assert 1 / 16 <= rows[0] < 1 / 16 + step
    for epoch in range(3, 61):
        assert any(epoch <= row < epoch + step for row in rows), epoch
    for row, following in zip(rows, rows[1:]):
        assert following - row <= 1 + step and (row >= 3 or following / row < 1.5 + step / row)
    assert len(rows) < 60 + 20, "not many more than one an epoch"


@pytest.mark.parametrize("steps_per_epoch", [60_000 / 64, 1_000 / 64])
def test_a_preview_is_never_more_than_ten_epochs_old(steps_per_epoch):
    step, previews = 1 / steps_per_epoch, points(preview_number, 400, steps_per_epoch)
    assert 1 / 16 <= previews[0] < 1 / 16 + step
    for preview, following in zip(previews, previews[1:]):
        assert following - preview <= 10 + step
        assert preview > 10 or following / preview < 1.5 + step / preview
    for epoch in range(10, 401, 10):
        assert any(epoch <= preview < epoch + step for preview in previews), epoch
    assert set(previews) <= set(points(log_number, 400, steps_per_epoch)), "each is a log point too"


def test_log_points_do_not_depend_on_where_a_run_was_interrupted():
    """The number is a function of the epoch that never falls, so that a resumed run passes the same ones."""
    epochs = torch.linspace(0, 50, 5001).tolist()
    for number in (log_number, preview_number):
        values = [number(epoch) for epoch in epochs]
        assert values == sorted(values) and number(0.0) == number(1 / 17) and number(1 / 16) == number(0.0) + 1


@pytest.mark.parametrize("count", [2500, 1000, 999, 60])
def test_the_test_loss_takes_test_images_from_everywhere(monkeypatch, count):
    """The first half of MNIST's test set is the easier one."""
    images = torch.arange(count).div(10).to(torch.uint8)[:, None, None, None].expand(-1, 1, 28, 28)
    labels = torch.arange(count)  # so that a label says which image it is
    config = Config()
    learner = SimpleNamespace(average=None, schedule=make_schedule(config.diffusion))
    state = SimpleNamespace(config=config, runtime=CPU, test=LabelledImages(images, labels), learner=learner)
    chosen, levels = [], []

    def loss(network, schedule, x0, labels, t, noise, clip):
        assert torch.equal(((x0[:, 0, 0, 0] + 1) * 127.5).round().long(), labels // 10), "an image and its own label"
        chosen.extend(labels.tolist())
        levels.extend(t.tolist())
        return t.float()

    monkeypatch.setattr(training.log, "diffusion_loss", loss)
    first = training.log.test_loss(state)
    number = min(1000, count)
    assert len(set(chosen)) == len(chosen) == number
    assert sum(index < count / 2 for index in chosen) in (number // 2, (number + 1) // 2)
    assert max(after - before for before, after in zip(chosen, chosen[1:])) <= -(-count // number)
    assert max(chosen) >= count - 3
    assert abs(torch.corrcoef(torch.tensor([chosen, levels]).float())[0, 1]) < 0.3, "noise levels are dealt at random"
    assert first == pytest.approx([50.5 + 100 * level for level in range(10)], abs=10), "by tenths of the noise levels"
    assert training.log.test_loss(state) == first


def test_a_log_point_adds_a_row_and_draws_losses_from_the_third_on(own_folder, monkeypatch, capsys):
    """A picture of two points would be almost empty; a table that can't be written is a warning and no more."""
    drawn = []
    monkeypatch.setattr(training.log, "test_loss", lambda state: [0.5] * 10)
    monkeypatch.setattr(training.log, "pretrained_losses", lambda config: None)
    monkeypatch.setattr(training.log.plots, "save_losses", lambda path, columns, *_, **__: drawn.append(
        (path.name, len(columns["step"]))))
    config = Config(train=TrainConfig(preview=0, batch_size=64))
    history = {"columns": {}, "running": [3.0, 6], "skipped": 1, "seconds": 2.0, "data": {"images": 640}}
    learner = SimpleNamespace(schedule=make_schedule(config.diffusion))
    state = SimpleNamespace(config=config, runtime=CPU, history=history, results=own_folder, step=0, learner=learner,
                            epoch=lambda step: step / 10)
    for state.step in (1, 2, 3, 4):
        if state.step == 4:
            (own_folder / "metrics.csv").unlink()
            (own_folder / "metrics.csv").mkdir()
        training.log.log_point(state, preview=state.step != 4)
        if state.step == 3:
            rows = list(csv.DictReader((own_folder / "metrics.csv").open()))
    assert drawn == [("loss.png", 3)]
    assert [(row["step"], row["epoch"], row["images"], row["test_loss"]) for row in rows] == [
        ("1", "0.1", "64", "0.5"), ("2", "0.2", "128", "0.5"), ("3", "0.3", "192", "0.5")]
    assert rows[0]["train_loss"] == "0.5" and "test_loss_t901-1000" in rows[0] and history["running"] == [0.0, 0]
    out = capsys.readouterr().out
    assert out.startswith("WARNING: ") and "metrics.csv: can't be written" in out and out.count("\n") == 1


@pytest.mark.parametrize("dataset, diffusion, shown", [
    ("mnist", {}, True), ("kmnist", {}, False), ("mnist", {"prediction": "x0"}, False)])
def test_the_shipped_weights_are_compared_only_where_they_were_measured_alike(monkeypatch, dataset, diffusion, shown):
    config, columns = Config(dataset="mnist"), {"test_loss": [0.1]}
    history = {"data": {"name": "mnist"}, "columns": columns}
    monkeypatch.setattr(training.log.checkpoint, "load", lambda path: {"config": settings.stored(config),
                                                                       "history": history})
    training.log.pretrained_losses.cache_clear()
    found = training.log.pretrained_losses(replace(config, dataset=dataset,
                                                diffusion=replace(config.diffusion, **diffusion)))
    training.log.pretrained_losses.cache_clear()
    assert found == (columns if shown else None)
