"""mode sample: pictures and arrays of what `drawing` draws from a checkpoint, in results/<name>/."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import config as configs
from config import Config
from drawing import Order, Trace, Trained, announce, draw, evaluations, guided, load_trained, origin
from support import checkpoint, plots
from support.files import make_folder, write_atomically
from support.runtime import Clock, Runtime, to_uint8

COLUMNS = 15  # states in process.png
FRAMES = 60  # states in process.gif


def run(config: Config, runtime: Runtime) -> None:
    """Draws images from a checkpoint and writes them to results/<name>/."""
    clock = Clock(runtime)
    config = own_run(config)
    trained = load_trained(config, runtime)
    clock.lap("load")
    announce(trained, config, runtime)
    write_samples(trained, config, runtime, clock)
    runtime.say(clock)


def own_run(config: Config) -> Config:
    """The config with the data set "auto" settled by which run there is, so that an offline run's name is found."""
    runs = [name for name in ("mnist", "generated") if (Path("checkpoints") / name / checkpoint.LAST).exists()]
    return replace(config, dataset="generated") if config.dataset == "auto" and runs == ["generated"] else config


def write_samples(trained: Trained, config: Config, runtime: Runtime, clock: Clock) -> None:
    """Draws what config.sample asks for, writes the pictures, and says where they are."""
    options = config.sample
    if options.write is not None:
        options = replace(options, digits=options.write)
    options = guided(options, trained, runtime)
    folder = Path("results") / configs.run_name(config)
    runtime.only_first(lambda: make_folder(folder))
    indices = range(len(options.write) if options.write is not None else options.num_images or 256)
    order = Order(options, config.seed, indices, trained.labels(options.digits, config.seed, len(indices)))
    trace = Trace()
    x = draw(trained, order, runtime, trace, progress=True)
    clock.lap(f"draw {len(indices)} images in {options.steps} steps, "
              f"{evaluations(trained.schedule, options)} evaluations each ({options.sampler})")
    paths = runtime.only_first(lambda: write_pictures(folder, to_uint8(x), order, trace, trained))
    for path in paths:
        runtime.say(f"  {path}")
    clock.lap("write")


def write_pictures(folder: Path, images: Tensor, order: Order, trace: Trace, trained: Trained) -> list[Path]:
    """The pictures and arrays of one drawing; says so where they don't look like the data."""
    warn_if_broken(images, trained.data)
    options, source = order.options, origin(trained, order)
    if options.write is not None:
        plots.save_number(folder / "number.png", images, source)
        return [folder / "number.png"]
    columns = 10 if options.digits == "0123456789" else max(1, round(len(images) ** 0.5))
    plots.save_grid(folder / "sample.png", images, columns, source)
    kept = spread_out(len(trace.states), COLUMNS)
    plots.save_process(folder / "process.png", torch.stack([trace.states[i] for i in kept]),
                       [trace.timesteps[i] for i in kept], source)
    frames = spread_out(len(trace.states), FRAMES)
    plots.save_animation(folder / "process.gif", torch.stack([trace.states[i] for i in frames]), source)
    arrays = images.permute(0, 2, 3, 1).numpy(), order.labels.numpy()  # in the convention of OpenAI's evaluators
    write_atomically(folder / "samples.npz", lambda file: np.savez(file, *arrays))
    return [folder / name for name in ("sample.png", "process.png", "process.gif", "samples.npz")]


def spread_out(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the indices 0..count-1, evenly spaced, with both ends."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, wanted))})


def warn_if_broken(images: Tensor, data: dict[str, Any]) -> None:
    """Calls out images that are nothing like the data."""
    statistics = {key: data[key] for key in ("mean", "std") if key in data}
    problem = plots.looks_broken(images, **statistics)
    if problem is None:
        return
    print(f"WARNING: these images do not look like digits ({problem}). Has the network been trained long enough, with "
          "a loss that fell?")
