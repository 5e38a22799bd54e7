"""mode sample: from a checkpoint to pictures and arrays.

An image and all its noise follow from (seed, image index) alone: every image is drawn in a slot of a chunk of one
fixed size, so that it comes out the same alone, among many, and on any number of processes.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import config as configs
import plots
from config import Config, SampleConfig, UserError
from dataset import NOTICE
from diffusion import NO_LABEL, Network, NoiseSchedule, make_denoiser, make_schedule
from model import UNet
from runtime import Runtime, generator, seed_of, to_uint8
from samplers import SAMPLERS, spaced_timesteps

NOISE_STREAM, DIGIT_STREAM = 2, 3  # train.py owns stream 1
SHOWN = 6  # images in the pictures of the process
COLUMNS = 15  # states in process.png
FRAMES = 60  # states in process.gif


@dataclass(frozen=True)
class Trained:
    """A checkpoint made ready to draw: the averaged weights in a network, its schedule, and where both came from."""

    network: torch.nn.Module
    schedule: NoiseSchedule
    config: Config
    digest: str
    step: int
    path: Path
    data: dict[str, Any]  # name, digest, and pixel mean and standard deviation of what it was trained on


@dataclass
class Trace:
    """What `draw` saw on the way, in the chunk of image 0: the first images' states, and each step's verdict."""

    timesteps: list[int]
    states: list[Tensor]  # uint8 [SHOWN, 1, 28, 28] each, from pure noise on
    problems: list[str | None]  # of x0_hat after each step; None: looks like data


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


def load_trained(config: Config, runtime: Runtime) -> Trained:
    """The network of the checkpoint that config means; its own stored config decides everything about it."""
    path = checkpoint.find(configs.run_name(config), config.sample.checkpoint)
    state: dict[str, Any] = {}
    digests = runtime.everywhere(lambda: state.update(checkpoint.load(path)) or state["digest"])
    if len(set(digests)) > 1:
        raise UserError(f"{path}: a training run wrote it while the processes read it; try again")
    try:
        stored = configs.from_dict(Config, state["config"])
        configs.validate(replace(stored, sample=SampleConfig()))  # how its trainer drew is of no matter
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    network = UNet(stored.model)
    checkpoint.load_weights(network, state["ema"], path)
    network = network.eval().requires_grad_(False).to(runtime.device).to(memory_format=torch.channels_last)
    data = state["history"].get("data", {})
    return Trained(network, make_schedule(stored.diffusion), stored, checkpoint.weights_digest(state["ema"]),
                   state["step"], path, data)


def announce(trained: Trained, config: Config, runtime: Runtime) -> None:
    runtime.say(f"Drawing from {trained.path} ({trained.data.get('name', trained.config.dataset)}, step {trained.step:,}, "
                f"weights {trained.digest}) on {runtime.name()}.")
    if config.sample.checkpoint is None and trained.path.name == "pretrained.pt":
        runtime.say(f"There is no checkpoint of your own in checkpoints/{configs.run_name(config)}/ yet, so these are the "
                    "weights that come with the project.")
    if trained.data.get("name") == "generated":
        runtime.say(NOTICE)


def guided(options: SampleConfig, trained: Trained, runtime: Runtime) -> SampleConfig:
    """The options, with guidance 1 where there is nothing to guide, and 0, which ignores labels, where none was ever learned."""
    dropout = trained.config.train.label_dropout
    if dropout == 1:
        runtime.say("This network was trained with --label-dropout 1, so it knows images only without labels, and draws any digit.")
        return replace(options, guidance=0.0)
    if options.guidance != 1 and dropout == 0:
        runtime.say("Guidance is off: this network was trained with --label-dropout 0, so it knows images only with their labels.")
    return replace(options, guidance=1.0) if options.digits == "none" or dropout == 0 else options


def write_samples(trained: Trained, config: Config, runtime: Runtime, clock: "Clock") -> list[Path]:
    """Draws what config.sample asks for and writes the pictures; prints and returns their paths."""
    options = config.sample
    if options.write is not None:
        options = replace(options, digits=options.write)
    options = guided(options, trained, runtime)
    spaced_timesteps(trained.schedule.timesteps, options.steps)  # an impossible number is answered before any work
    folder = Path("results") / configs.run_name(config)
    runtime.only_first(lambda: make_folder(folder))
    count = len(options.write) if options.write is not None else options.num_images or 256
    indices = range(count)
    labels = choose_labels(options.digits, config.seed, indices)
    trace = Trace([], [], [])
    x = draw(trained.network, trained.schedule, options, config.seed, indices, labels, runtime, trace, progress=True)
    clock.lap(f"draw {count} images in {options.steps} steps ({options.sampler})")
    paths = runtime.only_first(lambda: write_pictures(folder, to_uint8(x), labels, trace, metadata(trained, options, config.seed),
                                                      options, trained))
    for path in paths:
        runtime.say(f"  {path}")
    clock.lap("write")
    return paths


def write_pictures(folder: Path, images: Tensor, labels: Tensor, trace: Trace, origin: dict[str, str],
                   options: SampleConfig, trained: Trained) -> list[Path]:
    """The pictures and arrays of one drawing; says so where they don't look like the data."""
    warn_if_broken(images, trace, trained.data)
    if options.write is not None:
        plots.save_number(folder / "number.png", images, origin)
        return [folder / "number.png"]
    columns = 10 if options.digits == "0123456789" else max(1, round(len(images) ** 0.5))
    plots.save_grid(folder / "sample.png", images, columns, origin)
    kept = spread_out(len(trace.states), COLUMNS)
    plots.save_process(folder / "process.png", torch.stack([trace.states[i] for i in kept]),
                       [trace.timesteps[i] for i in kept], origin)
    frames = spread_out(len(trace.states), FRAMES)
    plots.save_animation(folder / "process.gif", torch.stack([trace.states[i] for i in frames]), origin)
    save_arrays(folder / "samples.npz", images, labels)
    return [folder / name for name in ("sample.png", "process.png", "process.gif", "samples.npz")]


def draw(network: Network, schedule: NoiseSchedule, options: SampleConfig, seed: int, indices: Sequence[int],
         labels: Tensor, runtime: Runtime, trace: Trace | None = None, progress: bool = False) -> Tensor:
    """Images [N, 1, 28, 28] in [-1, 1] on the CPU, the same in every process; labels int64 [N] go with indices.

    Image i takes slot i % chunk of a chunk whose other slots may be empty. Chunks are shared out among processes.
    Raises UserError if a state stops being finite.
    """
    timesteps = spaced_timesteps(schedule.timesteps, options.steps)
    chunks: dict[int, list[int]] = {}  # chunk number -> positions in indices
    for position, index in enumerate(indices):
        chunks.setdefault(index // runtime.chunk, []).append(position)
    mine = list(chunks.values())[runtime.rank::runtime.world]
    images = torch.zeros(len(indices), 1, 28, 28)
    bar = tqdm(total=len(mine) * options.steps, desc="drawing", unit="step", leave=False,
               disable=not (progress and runtime.first))
    predict = _graphed(network, options, runtime) if runtime.device.type == "cuda" else network

    def draw_mine() -> list[tuple[list[int], Any]]:
        with bar, torch.inference_mode(), runtime.autocast():
            for number, positions in enumerate(mine):
                watched = trace if number == 0 and runtime.first else None
                numbers = [indices[position] for position in positions]
                images[positions] = _draw_chunk(predict, schedule, options, seed, numbers, labels[positions], timesteps,
                                                runtime, watched, bar)
        return [(positions, images[positions].numpy()) for positions in mine]

    for positions, values in itertools.chain(*runtime.everywhere(draw_mine)):
        images[positions] = torch.from_numpy(values)
    return images


def _draw_chunk(network: Network, schedule: NoiseSchedule, options: SampleConfig, seed: int, numbers: list[int],
                labels: Tensor, timesteps: list[int], runtime: Runtime, trace: Trace | None, bar: tqdm) -> Tensor:
    generators = [generator("cpu", seed, NOISE_STREAM, number) for number in numbers]
    slots = torch.tensor([number % runtime.chunk for number in numbers])
    slot_labels = torch.full((runtime.chunk,), NO_LABEL).index_copy(0, slots, labels).to(runtime.device)

    def randn() -> Tensor:
        noise = torch.zeros(runtime.chunk, 1, 28, 28)
        noise[slots] = torch.stack([torch.randn(1, 28, 28, generator=g) for g in generators])
        return noise.to(runtime.device)

    denoise = make_denoiser(network, schedule, slot_labels, options.guidance)
    x = randn()
    if trace is not None:
        _look(trace, timesteps[0], x[slots])
    for s, x, x0_hat in SAMPLERS[options.sampler](denoise, schedule, x, timesteps, randn, **solver_options(options)):
        if not torch.isfinite(x).all():
            raise UserError(f"the images stopped being finite at t = {s} of {timesteps[0]} ({options.sampler}, "
                            f"{options.steps} steps): try --precision fp32, a lower --guidance or another checkpoint")
        if trace is not None:
            _look(trace, s, x[slots])
            trace.problems.append(plots.looks_broken(to_uint8(x0_hat[slots]).cpu()))
        bar.update()
    return x[slots.to(x.device)].float().cpu()


def _look(trace: Trace, t: int, x: Tensor) -> None:
    trace.timesteps.append(t)
    trace.states.append(to_uint8(x[:SHOWN]).cpu())


def _graphed(network: Network, options: SampleConfig, runtime: Runtime) -> Network:
    """The network at the chunk's size as one captured CUDA graph: at this size, launching costs more than computing.

    A refiner, which few of the steps need, stays outside it.
    """
    refined, captured = getattr(network, "refined", 0), getattr(network, "coarse", network)
    batch = runtime.chunk * (1 if options.guidance == 1 else 2)
    inputs = (torch.zeros(batch, 1, 28, 28, device=runtime.device), torch.ones(batch, device=runtime.device, dtype=torch.long),
              torch.zeros(batch, device=runtime.device, dtype=torch.long))
    with torch.inference_mode(), runtime.autocast():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # the libraries choose their kernels before the capture
                captured(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = captured(*inputs)

    def replay(*arguments: Tensor) -> Tensor:
        if refined and int(arguments[1][0]) <= refined:
            return network(*arguments)
        for static, argument in zip(inputs, arguments):
            static.copy_(argument)
        graph.replay()
        return output.clone()

    return replay


def solver_options(options: SampleConfig) -> dict[str, Any]:
    """The keywords that only one sampler has."""
    own: dict[str, dict[str, Any]] = {"ddim": {"eta": options.eta}, "ddpm": {"variance": options.variance}}
    return own.get(options.sampler, {})


def choose_labels(digits: str | None, seed: int, indices: Sequence[int]) -> Tensor:
    """Labels int64 [N]: each image's own at random, or `digits` cycled over the image indices; 10 for "none"."""
    if digits is None:
        return torch.tensor([seed_of(seed, DIGIT_STREAM, index) % 10 for index in indices])
    if digits == "none":
        return torch.full((len(indices),), NO_LABEL)
    return torch.tensor([int(digits[index % len(digits)]) for index in indices])


def spread_out(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the indices 0..count-1, evenly spaced, with both ends."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, wanted))})


def warn_if_broken(images: Tensor, trace: Trace, data: dict[str, Any]) -> None:
    """Calls out images that are nothing like the data, with the first step from which x0_hat was bad too."""
    statistics = {key: data[key] for key in ("mean", "std") if key in data}
    problem = plots.looks_broken(images, **statistics)
    if problem is None:
        return
    good = [i for i, seen in enumerate(trace.problems) if seen is None]
    first_bad = trace.timesteps[good[-1] + 1 if good else 0] if trace.timesteps else None
    print(f"WARNING: these images do not look like digits ({problem}; the estimate of x0 is bad from t = {first_bad} on). "
          "Has the network been trained long enough, with a loss that fell?")


def metadata(trained: Trained, options: SampleConfig, seed: int) -> dict[str, str]:
    """Where a picture came from, for its PNG text."""
    return {"weights": trained.digest, "trained_on": str(trained.data.get("name", trained.config.dataset)),
            "step": str(trained.step), "sampler": options.sampler, "steps": str(options.steps), "eta": f"{options.eta:g}",
            "guidance": f"{options.guidance:g}", "digits": str(options.digits), "seed": str(seed)}


def save_arrays(path: Path, images: Tensor, labels: Tensor) -> None:
    """samples.npz in the convention of OpenAI's evaluators: arr_0 uint8 [N, 28, 28, 1], arr_1 labels."""
    def write(file: Any) -> None:
        np.savez(file, images.permute(0, 2, 3, 1).numpy(), labels.numpy())

    checkpoint.write_atomically(path, write)


def make_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: can't make this folder ({error.strerror}); choose another --name, or free the place") from None
    return path


class Clock:
    """The time of each phase, for one line at the end."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.latest = runtime, time.perf_counter()
        self.laps: list[tuple[str, float]] = []

    def lap(self, phase: str) -> None:
        self.runtime.synchronize()
        now = time.perf_counter()
        self.laps.append((phase, now - self.latest))
        self.latest = now

    def __str__(self) -> str:
        return "Time: " + ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in self.laps) + "."
