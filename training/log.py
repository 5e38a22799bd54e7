"""The training log: metrics.csv with the test loss by noise level, loss.png, previews, and what a terminal shows.

In a run of --epochs log points follow from the step alone, so that a resumed run has the same ones. In one of --minutes
they take at most LOG_SHARE of the time, and what is due earlier waits: an epoch of a few images lasts a second.
"""

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import Config, SampleConfig, TrainConfig, UserError
from dataset import class_name, random_batch, to_uint8, to_unit
from diffusion import diffusion_loss, stratified_timesteps
from sample import LoadedModel, make_request, sample_images
from support import checkpoint, plots
from support.console import progress_bar
from support.files import write_atomically, write_results
from support.precision import autocast
from support.randomness import TEST_STREAM, generator
from support.selection import PRETRAINED
from support.settings import stored, training_settings
from training.optimizer import learning_rate
from training.state import TrainingState

TEST_IMAGES = 1000  # of the test loss
LEVELS = 10  # bins of t
PREVIEW_STEPS = 10
SHOWN_IMAGES = 64  # in data.png
LOG_SHARE = 0.1  # of the training time
MEASURED = 400, 200  # training images of each class, and test images, that all metrics of mode evaluate take


def announce(state: TrainingState, before: TrainConfig | None) -> None:
    """Prints what will be trained; `before`: the options with which a resumed run was saved."""
    options, runtime, name = state.config.train, state.runtime, state.config.name
    parameters = sum(weight.numel() for weight in state.learner.network.parameters())
    processes = f", {runtime.world} processes" if runtime.world > 1 else ""
    previews = f"Previews (preview-*.png) and the loss (loss.png) appear in {state.results}/ as it trains."
    runtime.say(f"Training {name} for {length(options)} on {runtime.name()}{processes}, {state.config.precision}: "
                f"{parameters / 1e6:.2f} M parameters.")
    if before is None:
        if init := state.history.get("init"):
            learned = "" if init["same_classes"] else " Its images are others, so the classes are learned anew."
            runtime.say(f"It starts from the averaged weights of {options.init} ({init['weights']}).{learned}")
        if runtime.device.type == "cpu" and options.minutes is None:
            runtime.say("The time remaining is shown below; --minutes 10 gives a first result on a CPU.")
        show_data(state)
        runtime.say(previews)
        fewest, test = min(count for count in state.history["data"]["classes"] if count), len(state.test)
        if fewest < MEASURED[0] or test < MEASURED[1]:
            runtime.say("note: all metrics of --mode evaluate take {} training images of each class and {} test "
                        "images; here are {} and {}.".format(*MEASURED, fewest, test))
        return
    was, now = (learning_rate(o, state.step, state.progress(o)) for o in (before, options))
    runtime.say(f"Resuming the run in checkpoints/{name} ({state.effort()}) at a learning rate of {now:.2g}.")
    if length(before) != length(options):
        end = "stays there" if options.lr_schedule == "constant" else "falls to zero at the new end"
        runtime.say(f"Its length is now {length(options)} instead of {length(before)}: the learning rate changes from "
                    f"{was:.2g} to {now:.2g}, as if that had been its length from the start, and {end}.")
    runtime.say(previews)


def show_data(state: TrainingState) -> None:
    """Writes data.png: the first images of the first epoch, in the order of training, and their labels."""
    train, data = state.train.to("cpu"), state.history["data"]
    chosen = random_batch(state.config.seed, 0, min(SHOWN_IMAGES, len(train)), len(train))[0]
    labels = [class_name(data, k) for k in train.labels[chosen].tolist()]
    writers = {"data.png": lambda file: plots.save_labelled(file, train.images[chosen], labels,
                                                            {"digest": data["digest"]})}
    for path in state.runtime.on_rank0(lambda: write_results(state.results, writers)):
        state.runtime.say(f"The first {len(chosen)} images, as the network sees them: {path}")


class Display:
    """What a person sees of a training: a progress bar or, where there is none, a line at each log point."""

    def __init__(self, state: TrainingState) -> None:
        self.state, self.began, self.first = state, time.perf_counter(), state.progress(state.config.train)
        self.seconds, self.steps = state.history["seconds"], 0  # of training before this process; steps timed in it
        self.bar = progress_bar(state.runtime.rank == 0, total=1.0, initial=self.first,
                                bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}")

    def show(self, loss: float | None, log_now: bool) -> None:
        """Shows the training loss, the mean since the last log point, and the speed of this process's steps."""
        state = self.state
        seconds = max(state.history["seconds"] - self.seconds, 1e-9)
        speed = self.steps * state.config.train.batch_size / seconds
        text = (f"epoch {state.epoch(state.step):.1f}, {speed:,.0f} images/s" +
                ("" if loss is None else f", loss {loss:.4f}"))  # None: the steps were skipped
        self.bar.set_postfix_str(text, refresh=False)
        if log_now and self.bar.disable:
            progress = state.progress(state.config.train)
            remaining = (time.perf_counter() - self.began) * (1 - progress) / max(progress - self.first, 1e-9)
            state.runtime.say(f"{text}, {self.bar.format_interval(round(remaining))} remaining")


def length(options: TrainConfig) -> str:
    number, unit = (options.minutes, "minute") if options.minutes else (options.epochs, "epoch")
    return f"{number:g} {unit}{'s' * (number != 1)}"


def preview_number(epoch: float) -> int:
    """Number of previews due by then: at 1/16, 0.09, 1/8, ... epochs, each sqrt(2) times the last; each 10th epoch."""
    return max(0, math.floor(2 * math.log2(max(epoch, 1e-9) * 16) + 1e-9) + 1) + math.floor(epoch / 10 + 1e-9)


def log_number(epoch: float) -> int:
    """Number of log points passed: where a preview is due, and at each epoch from the third on."""
    return preview_number(epoch) + math.floor(max(epoch, 2.0) + 1e-9)


def due(state: TrainingState) -> tuple[bool, bool]:
    """Whether a log point is due after the steps done, and whether a preview is, since the last log point."""
    now, last = state.epoch(state.step), state.epoch(state.history["columns"].get("step", [0])[-1])
    return log_number(now) != log_number(last), preview_number(now) != preview_number(last)


def log_point(state: TrainingState, preview: bool) -> None:
    """Adds a row to metrics.csv; with `preview` also draws loss.png and a preview by the averaged weights."""
    options = state.config.train
    levels = test_loss(state)
    total, steps = state.history["running"]
    size = state.learner.schedule.timesteps / LEVELS
    row = {"step": state.step, "epoch": round(state.epoch(state.step), 6), "images": state.step * options.batch_size,
           "train_loss": total / max(1, steps), "test_loss": float(np.nanmean(levels)),
           "skipped": state.history["skipped"],
           **{f"test_loss_t{round(i * size) + 1}-{round((i + 1) * size)}": level for i, level in enumerate(levels)},
           "seconds": round(state.history["seconds"], 1)}
    columns = state.history["columns"]
    before = max(map(len, columns.values()), default=0)
    for name in {**columns, **row}:  # a run begun by another version may have other columns
        columns.setdefault(name, [math.nan] * before).append(row.get(name, math.nan))
    state.history["running"] = [0.0, 0]
    table = np.array(list(columns.values()), float).T
    writers: dict[str, Callable[[Path], None]] = {"metrics.csv": lambda path: write_atomically(
        path, lambda file: np.savetxt(file, table, "%.10g", ",", header=",".join(columns), comments=""))}
    if preview and options.preview:
        model = current_model(state)
        digits = "".join(map(str, model.classes)) if model.label_dropout < 1 else None  # all classes in turn
        drawn = SampleConfig(steps=min(PREVIEW_STEPS, model.schedule.timesteps), guidance=1.0, digits=digits)
        images = to_uint8(sample_images(model, make_request(model, drawn, state.config.seed, options.preview))[0])
        writers[f"preview-{state.step:07d}.png"] = lambda path: plots.save_grid(
            path, images, len(digits or "0123456789"), {"step": str(state.step)})
    if preview and before > 1:  # two points would make an almost empty picture
        writers["loss.png"] = lambda path: plots.save_losses(
            path, columns, pretrained_losses(state.config), {"config": str(state.config.diffusion)},
            epoch_size=state.history["data"]["images"])
    state.runtime.on_rank0(lambda: write_results(state.results, writers))


def current_model(state: TrainingState) -> LoadedModel:
    """The current averaged weights, to sample from."""
    return LoadedModel(state.learner.average, state.learner.schedule, state.runtime, stored(state.config),
                       state.history, step=state.step, path=state.path)


def test_loss(state: TrainingState) -> list[float]:
    """Mean loss in each tenth of the noise levels, over fixed images, timesteps and noise, so that runs compare."""
    test, learner, device = state.test, state.learner, state.runtime.device
    number, timesteps = min(TEST_IMAGES, len(test)), learner.schedule.timesteps
    random = generator("cpu", TEST_STREAM)
    t = stratified_timesteps(timesteps, number, torch.tensor(0.5))[torch.randperm(number, generator=random)]
    noise = torch.randn(number, 1, 28, 28, generator=random)
    chosen = test[(torch.arange(number) * len(test) // number).to(device)]  # evenly: MNIST's first half is easier
    parts = zip(*(tensor.to(device).split(250) for tensor in (to_unit(chosen.images), chosen.labels, t, noise)))
    with torch.inference_mode(), autocast(device, state.runtime.bf16):
        losses = [diffusion_loss(learner.average, learner.schedule, x0, labels, times, noises,
                                 state.config.train.clip_loss) for x0, labels, times, noises in parts]
    loss, level = torch.cat(losses).cpu().double(), (t - 1) * LEVELS // timesteps
    return [loss[level == i].mean().item() if (level == i).any() else math.nan for i in range(LEVELS)]


@functools.lru_cache
def pretrained_losses(config: Config) -> dict[str, Any] | None:
    """The columns of metrics.csv of the pretrained weights; None unless measured in the same way on the same data."""
    try:
        pretrained = checkpoint.load(PRETRAINED)
        settings = training_settings(pretrained["config"])[0]
    except UserError:
        return None
    history = pretrained["history"]
    same_loss = (settings.diffusion, settings.train.clip_loss) == (config.diffusion, config.train.clip_loss)
    same_images = history.get("data", {}).get("name") == config.dataset
    return history.get("columns") if same_loss and same_images else None
