"""What a run says and writes down on its way: metrics.csv, the test loss by noise level, loss.png, previews."""

import functools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import config as configs
from config import Config, TrainConfig, UserError
from diffusion import diffusion_loss, stratified_timesteps
from drawing import Order, Trained, choose_labels, draw
from model import count_parameters, gflop_per_image
from support import checkpoint, plots
from support.files import write_atomically
from support.optimizer import learning_rate
from support.runtime import generator, to_uint8, to_unit

if TYPE_CHECKING:
    from train import Run

TEST_STREAM = 4  # of random numbers
TEST_IMAGES = 1000  # in the fixed-noise test loss
LEVELS = 10  # bins of t in the loss by noise level


def say_what_comes(run: "Run", before: TrainConfig | None) -> None:
    """Before a run; `before`: the options of a run that goes on, as they were when it was saved."""
    options, runtime, name = run.config.train, run.runtime, configs.run_name(run.config)
    processes = f", {runtime.world} processes" if runtime.world > 1 else ""
    runtime.say(f"Training {name} for {aim(options)} on {runtime.name()}{processes}, "
                f"{'bf16' if runtime.bf16 else 'fp32'}: {count_parameters(run.network) / 1e6:.2f} M parameters, "
                f"{gflop_per_image(run.config.model):.3f} GFLOP per image.")
    if before is None:
        if runtime.device.type == "cpu" and options.minutes is None:
            runtime.say("The bar tells how long that takes; on a CPU, --minutes 10 gives a first result.")
        return
    was, now = (learning_rate(o, run.step, run.progress(o)) for o in (before, options))
    runtime.say(f"Going on with the run in checkpoints/{name} ({run.done()}), at a learning rate of {now:.2g}.")
    if aim(before) != aim(options):
        end = "stays there" if options.lr_schedule == "constant" else "falls to zero at the new end"
        runtime.say(f"Its length is now {aim(options)}, no longer {aim(before)}: the learning rate goes from {was:.2g} "
                    f"to {now:.2g}, as if that had been its length from the start, and {end}.")


def aim(options: TrainConfig) -> str:
    if options.minutes is not None:
        return f"{options.minutes:g} minutes"
    return f"{options.epochs} epoch{'s' * (options.epochs != 1)}"


def milestone(epoch: float) -> int:
    """Number of the last point of record passed: 1/16, ..., 1/2, 0.7, 1, 1.4, 2, ... epochs."""
    return math.floor(2 * math.log2(max(epoch, 1 / 16)) + 1e-9)


def record(run: "Run") -> None:
    """Adds a row to metrics.csv, and draws loss.png and a preview, with the averaged weights."""
    options, count = run.config.train, len(run.train)
    levels = test_loss(run)
    total, steps = run.history["running"]
    size = run.schedule.timesteps / LEVELS
    row = {"step": run.step, "epoch": round(run.step * options.batch_size / count, 6),
           "images": run.step * options.batch_size, "train_loss": total / max(1, steps),
           "test_loss": float(np.nanmean(levels)), "skipped": run.history["skipped"],
           **{f"test_loss_t{round(i * size) + 1}-{round((i + 1) * size)}": level for i, level in enumerate(levels)},
           "seconds": round(run.history["seconds"], 1)}
    columns = run.history["columns"]
    before = max(map(len, columns.values()), default=0)
    for name in {**columns, **row}:  # a run begun by another version may have other columns
        columns.setdefault(name, [math.nan] * before).append(row.get(name, math.nan))
    run.history["running"] = [0.0, 0]
    if options.preview:
        draw_preview(run)

    def write() -> None:
        table = np.array(list(columns.values()), float).T
        write_atomically(run.results / "metrics.csv", lambda file: np.savetxt(
            file, table, "%.10g", ",", header=",".join(columns), comments=""))
        plots.save_losses(run.results / "loss.png", columns, shipped_losses(run.config),
                          {"config": str(run.config.diffusion)}, epoch_size=count)

    run.runtime.only_first(write)


def draw_preview(run: "Run") -> None:
    options = replace(run.config.sample, sampler="sa", steps=min(10, run.schedule.timesteps), eta=0.0,
                      variance="posterior", guidance=float(run.config.train.label_dropout < 1), guidance_interval=None)
    indices = range(run.config.train.preview)
    order = Order(options, run.config.seed, indices, choose_labels("0123456789", run.config.seed, indices))
    x = draw(Trained(run.average, run.schedule, run.config, run.history), order, run.runtime)
    run.runtime.only_first(lambda: plots.save_grid(run.results / f"preview-{run.step:07d}.png", to_uint8(x),
                                                   max(1, round(len(indices) ** 0.5)), {"step": str(run.step)}))


def test_loss(run: "Run") -> list[float]:
    """Mean loss in each tenth of the noise levels, over fixed images, timesteps and noise, so that runs compare."""
    number, timesteps, device = min(TEST_IMAGES, len(run.test)), run.schedule.timesteps, run.runtime.device
    random = generator("cpu", TEST_STREAM)
    t = stratified_timesteps(timesteps, number, torch.tensor(0.5))[torch.randperm(number, generator=random)]
    noise = torch.randn(number, 1, 28, 28, generator=random)
    losses = []
    with torch.inference_mode(), run.runtime.autocast():
        for part in torch.arange(number).split(250):
            x0, labels = to_unit(run.test.images[part.to(device)]), run.test.labels[part.to(device)]
            losses.append(diffusion_loss(run.average, run.schedule, x0, labels, t[part].to(device),
                                         noise[part].to(device), run.config.train.clip_loss))
    loss, level = torch.cat(losses).double().cpu(), (t - 1) * LEVELS // timesteps
    return [loss[level == i].mean().item() if (level == i).any() else math.nan for i in range(LEVELS)]


@functools.lru_cache
def shipped_losses(config: Config) -> dict[str, Any] | None:
    """The columns of metrics.csv of the weights that come with the project, where they measure the same thing."""
    try:
        shipped = checkpoint.load(checkpoint.PRETRAINED)
        theirs = configs.from_stored(shipped["config"])[0]
    except UserError:
        return None
    same = (theirs.diffusion, theirs.train.clip_loss) == (config.diffusion, config.train.clip_loss)
    of_this_data = shipped["history"].get("data", {}).get("name") == config.dataset
    return shipped["history"].get("columns") if same and of_this_data else None
