"""From a checkpoint, labels and a seed to images; mode sample; and the API for scripts: load_model, LoadedModel.sample.

An image and all its noise follow from (seed, image index) alone: every image is sampled in a slot of a chunk of one
fixed size, so that it comes out the same alone, among many, and on any number of processes.
"""

import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

import support  # noqa: F401 (first, since it checks which modules these are)
from config import Config, SampleConfig, UserError
from dataset import CLASSES, NO_LABEL, to_uint8
from diffusion import Denoiser, Network, NoiseSchedule, make_denoiser
from model import UNet
from samplers import SAMPLERS, Randn, Steps, spaced_timesteps
from support import checkpoint, plots, selection
from support.console import progress_bar, say
from support.files import make_folder, write_atomically, write_results
from support.loading import NOTICE
from support.precision import autocast
from support.randomness import LABEL_STREAM, NOISE_STREAM, generator
from support.runtime import Runtime, make_runtime
from support.settings import SAMPLING, network_settings, validate

SHOWN, COLUMNS, FRAMES = 6, 15, 60  # images in pictures of the process; states in process.png and .gif, at most
MOST_IN_GRID = 1024  # images in sample.png; Pillow refuses pictures of tens of thousands
LABELS_PER_CLASS = 10  # of each class in a block of labels


class Trajectory(NamedTuple):
    """The states of images from pure noise to the result."""

    timesteps: list[int]  # [K+1], from T down to 0
    states: Any  # uint8 [K+1, N, 28, 28]


@dataclass(frozen=True, repr=False)
class LoadedModel:
    """A trained network that can be sampled from, and where it came from."""

    network: Network
    schedule: NoiseSchedule
    runtime: Runtime
    settings: dict[str, Any]  # of its training, as the checkpoint stores them
    history: dict[str, Any]  # of its training: "data" (`dataset.describe`), seconds, code digests, ...
    digest: str = ""  # of its weights
    step: int = 0
    path: Path = Path()

    def __repr__(self) -> str:
        return (f"LoadedModel({str(self.path)!r}, trained on {self.data.get('name', 'unknown images')}, "
                f"step {self.step:,}, weights {self.digest}, on {self.runtime.name()})")

    @property
    def data(self) -> dict[str, Any]:
        return self.history.get("data", {})

    @property
    def images_seen(self) -> int:
        """Training images that the network has seen, each as often as it was in a batch."""
        return self.step * self.settings.get("train", {}).get("batch_size", 64)

    @property
    def label_dropout(self) -> float:
        return self.settings.get("train", {}).get("label_dropout", 0.1)  # the first default

    @property
    def classes(self) -> list[int]:
        """The classes that the network was trained on."""
        return [k for k, count in enumerate(self.data.get("classes") or [1] * CLASSES) if count]

    def sample(self, labels: str | int | Sequence[int] | None = "0123456789", num_images: int | None = None,
               seed: int = 0, *, trajectory: bool = False, **options: Any) -> Any:
        """Samples images: uint8 numpy [N, 28, 28], the same as `--mode sample` with the same flags writes.

        labels: classes as a digit string or integers, None for images without labels; cycled to num_images (unset: as
        many as labels, or one). options: sampler, steps, spacing, eta, variance, guidance, guidance_interval, as the
        flags. With trajectory, returns (images, Trajectory). Raises UserError for what the flags would not accept.
        """
        sequence: Any = () if labels is None else labels if hasattr(labels, "__iter__") else [labels]
        try:
            classes = [int(label) if isinstance(label, str) else operator.index(label) for label in sequence]
        except (TypeError, ValueError):  # neither a digit nor an integer
            classes = [-1]
        if labels is not None and not classes or any(not 0 <= k < CLASSES for k in classes):
            raise UserError(f"labels {labels!r:.100}: give classes from 0 to {CLASSES - 1}, or None for no labels")
        if unknown := options.keys() - {*SAMPLING}:
            raise UserError(f"{', '.join(sorted(unknown))}: no option of sampling; there are {', '.join(SAMPLING)}")
        wanted = SampleConfig(write=None, digits="none" if labels is None else "".join(map(str, classes)),
                              num_images=len(classes) or 1 if num_images is None else num_images, **options)
        with torch.device("cpu"):  # whatever the host program's default device is
            request = request_of(self, validate(Config(seed=seed, sample=wanted)))
            images, states = sample_images(self, request, shown=len(request.indices) if trajectory else 0)
        arrays = to_uint8(images)[:, 0].numpy()
        return (arrays, Trajectory(request.timesteps, states[:, :, 0].numpy())) if trajectory else arrays

    def denoiser(self, labels: Sequence[int] | Tensor, guidance: float = 1.0,
                 interval: tuple[float, float] | None = None) -> Denoiser:
        """`diffusion.make_denoiser` for this network: denoise(x [N, 1, 28, 28], t) -> x0_hat; labels [N], 10: none."""
        labels = torch.as_tensor(labels, device=self.runtime.device)
        if wrong := {*labels.flatten().tolist()} - {*range(NO_LABEL + 1)}:
            raise UserError(f"label {min(wrong)}: give classes from 0 to {CLASSES - 1}, or {NO_LABEL} for no label")
        return make_denoiser(self.network, self.schedule, labels, guidance, interval)


class SampleRequest(NamedTuple):
    """What is sampled and how: image i and all its noise follow from (seed, i)."""

    options: SampleConfig
    seed: int
    indices: Sequence[int]
    labels: Tensor  # int64 [N], one for each index
    timesteps: list[int]  # descending, from T to 0
    guidance: float  # 1: none
    interval: tuple[float, float]  # of alpha_bar, where guided
    note: str  # what a user should know about guidance
    evaluations: int = 0  # of the network, for an image, as `count_evaluations` counts them


def load_model(name: str | Path = "pretrained", device: str = "auto", precision: str = "auto") -> LoadedModel:
    """A trained model, to be used in a script: "pretrained", a run's name, or the path of a checkpoint.

    Prints nothing and joins no process group. Raises UserError for a file or a device that is not there.
    """
    config = validate(Config(device=device, precision=cast(Any, precision), compile="off"))
    return load_checkpoint(selection.resolve(str(name), "load_model:"), make_runtime(config))


def load_checkpoint(path: Path, runtime: Runtime) -> LoadedModel:
    """The model in a checkpoint, built from what that file stores alone. Raises UserError."""
    state = runtime.on_rank0(lambda: checkpoint.load(path) | {"model": None, "optimizer": None})
    try:
        settings, prediction = network_settings(state["config"])
        schedule = NoiseSchedule(state["history"]["alpha_bar"], prediction)
    except (UserError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: {error}") from None
    with torch.device("cpu"):
        network = UNet(settings).float()  # whatever the host program's default device and dtype are
    checkpoint.load_weights(network, state["ema"], path)
    network = network.eval().requires_grad_(False).to(runtime.device).to(memory_format=runtime.memory_format)
    return LoadedModel(network, schedule, runtime, state["config"], state["history"],
                       checkpoint.weights_digest(state["ema"]), state["step"], path)


def make_request(model: LoadedModel, options: SampleConfig, seed: int, count: int) -> SampleRequest:
    """The request for images 0 to count - 1: only here are labels, timesteps and guidance decided.

    Raises UserError for labels that the network has not learned, guidance that it does not support, and an impossible
    number of steps.
    """
    timesteps = spaced_timesteps(model.schedule.timesteps, options.steps, options.spacing)
    digits = "none" if model.label_dropout == 1 and options.digits is None else options.digits
    flag = "--digits" if options.write is None else "--write"
    if unlearned := sorted({int(digit) for digit in digits or "" if digits != "none"} - set(model.classes)):
        raise UserError(f"{flag} {digits:.100}: this network was not trained on class "
                        f"{', '.join(map(str, unlearned))}; choose from {''.join(map(str, model.classes))}")
    if model.label_dropout == (0 if digits == "none" else 1):
        knows = "images only with their labels" if digits == "none" else "no labels"
        raise UserError(f"{flag} {digits:.100}: this network was trained with --label-dropout {model.label_dropout:g}, "
                        f"so it knows {knows}; leave it out")
    guidance, interval, note = choose_guidance(model, options, timesteps, labelled=digits != "none")
    labels = choose_labels(digits, seed, range(count), model.classes)
    request = SampleRequest(options, seed, range(count), labels, timesteps, guidance, interval, note)
    return request._replace(evaluations=count_evaluations(model.schedule, request))


def choose_guidance(model: LoadedModel, options: SampleConfig, timesteps: list[int],
                    labelled: bool) -> tuple[float, tuple[float, float], str]:
    """Guidance, the interval of alpha_bar where it acts, and what a user should know about both.

    If no step lies in the interval, the step nearest to it is guided. Raises UserError for guidance that was asked for
    and that the network does not support.
    """
    guidance, interval = options.guidance, options.guidance_interval
    if guidance == 1:
        return guidance, interval, ""
    if not labelled or model.label_dropout == 0:
        if guidance != SampleConfig.guidance:
            raise UserError(f"--guidance {guidance:g}: this network can't be guided, since it was trained with "
                            f"--label-dropout {model.label_dropout:g}; leave --guidance out")
        return 1.0, interval, "No guidance: it compares images with and without labels."
    low, high = interval
    levels = [model.schedule.alpha_bar[t].item() for t in timesteps[:-1]]
    guided, where = sum(low <= level <= high for level in levels), ""
    if guided == 0:
        nearest = min(levels, key=lambda level: max(low - level, level - high))
        guided, interval = 1, (nearest, nearest)
        where = f", the one nearest to the interval (alpha_bar {low:g} to {high:g})"
    return guidance, interval, f"Guidance {guidance:g} acts in {guided} of {options.steps} steps{where}."


def count_evaluations(schedule: NoiseSchedule, request: SampleRequest) -> int:
    """Evaluations of the network for an image, counted by sampling one pixel with a network that predicts zeros."""
    batches: list[int] = []

    def network(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        batches.append(len(x))
        return torch.zeros_like(x)

    pixel = torch.zeros(1, 1, 1, 1, dtype=torch.float32)
    for _ in run_sampler(network, schedule, torch.tensor([0]), request, pixel, lambda: pixel):
        pass
    return sum(batches)


def run_sampler(network: Network, schedule: NoiseSchedule, labels: Tensor, request: SampleRequest, x: Tensor,
                randn: Randn) -> Steps:
    """The request's sampler, with its own options and guidance, from x [N, 1, H, W] on; labels int64 [N]."""
    sampler = SAMPLERS[request.options.sampler]
    knobs = {name: getattr(request.options, name) for name in inspect.signature(sampler).parameters if name in SAMPLING}
    denoise = make_denoiser(network, schedule, labels, request.guidance, request.interval)
    return sampler(denoise, schedule, x, request.timesteps, randn, **knobs)


def choose_labels(digits: str | None, seed: int, indices: Sequence[int], classes: Sequence[int]) -> Tensor:
    """Labels int64 [N] of the images with these indices: `digits` cycled over the indices, or 10 for "none".

    Unset: each block of 10 indices per class has each of the `classes` 10 times, shuffled by (seed, block).
    """
    if digits == "none":
        return torch.full((len(indices),), NO_LABEL)
    if digits is not None:
        return torch.tensor([int(digits[index % len(digits)]) for index in indices])
    block = torch.tensor(classes).repeat_interleave(LABELS_PER_CLASS)
    blocks = [block[torch.randperm(len(block), generator=generator("cpu", seed, LABEL_STREAM, number))]
              for number in range(max(indices) // len(block) + 1)]
    return torch.cat(blocks)[list(indices)]


def provenance(model: LoadedModel, request: SampleRequest) -> dict[str, str]:
    """Where images came from, for the metadata of a PNG and for reports."""
    knobs = {name: str(getattr(request.options, name)) for name in (*SAMPLING, "digits") if "guidance" not in name}
    return {"weights": model.digest, "trained_on": str(model.data.get("name", "unknown")), "step": str(model.step),
            "seed": str(request.seed), "images": str(len(request.indices)), "guidance": f"{request.guidance:g}",
            "guidance_interval": "{:g} {:g}".format(*request.interval), **knobs,
            "precision": model.runtime.precision}


def sample_images(model: LoadedModel, request: SampleRequest, shown: int = 0,
                  progress: str = "") -> tuple[Tensor, Tensor]:
    """Images [N, 1, 28, 28] in [-1, 1], and the states uint8 [K+1, shown, 1, 28, 28] of the first ones from T to 0.

    Both are on the CPU and the same in every process. Image i takes slot i % chunk of a chunk whose other slots may be
    empty; chunks are shared out among processes. `progress`: words before a progress bar, "" for none. Raises UserError
    if a state stops being finite.
    """
    runtime = model.runtime
    chunks: dict[int, list[int]] = {}  # chunk number -> positions in request.indices
    for position, index in enumerate(request.indices):
        chunks.setdefault(index // runtime.chunk, []).append(position)
    local = list(chunks.values())[runtime.rank::runtime.world]

    def work() -> tuple[Tensor, Tensor]:
        images = torch.zeros(len(request.indices), 1, 28, 28, dtype=torch.float32)
        states = torch.zeros(len(request.timesteps), min(shown, len(images)), 1, 28, 28, dtype=torch.uint8)
        bar = progress_bar(progress != "" and runtime.rank == 0, total=len(images), desc=progress, unit=" images",
                           leave=False)
        with bar, torch.inference_mode(), autocast(runtime.device, runtime.bf16):
            for chunk, positions in enumerate(local):
                seen = positions[:sum(position < states.shape[1] for position in positions)]  # positions ascend
                part = request._replace(indices=[request.indices[position] for position in positions],
                                        labels=request.labels[positions])
                for number, x in enumerate(_chunk_states(model, part)):
                    states[number, seen] = to_uint8(x[:len(seen)]).cpu()
                    done = (chunk + number / request.options.steps) / len(local)  # as if all processes were as far
                    bar.update(int(done * len(images)) - bar.n)
                images[positions] = x.float().cpu()
        return images, states

    images, states = (sum(parts) for parts in zip(*runtime.gather(work)))  # zero in all processes but one
    return images, states


def _chunk_states(model: LoadedModel, request: SampleRequest) -> Iterator[Tensor]:
    """The states [N, 1, 28, 28] of one chunk's images: pure noise, and after each step."""
    runtime = model.runtime
    generators = [generator("cpu", request.seed, NOISE_STREAM, index) for index in request.indices]
    slots = torch.tensor([index % runtime.chunk for index in request.indices])
    labels = torch.full((runtime.chunk,), NO_LABEL).index_copy(0, slots, request.labels).to(runtime.device)

    def randn() -> Tensor:
        noise = torch.stack([torch.randn(1, 28, 28, generator=g, dtype=torch.float32) for g in generators])
        return noise.new_zeros(runtime.chunk, 1, 28, 28).index_copy(0, slots, noise).to(runtime.device)

    x = randn()
    yield x[slots]
    for s, x, _ in run_sampler(model.network, model.schedule, labels, request, x, randn):
        if not torch.isfinite(x).all():
            raise UserError(f"the images stopped being finite at t = {s} of {request.timesteps[0]} ("
                            f"{request.options.sampler}, {request.options.steps} steps): try --precision fp32, a lower "
                            "--guidance or another checkpoint")
        yield x[slots]


def main(config: Config, runtime: Runtime) -> None:
    """Samples from a checkpoint as config.sample says, and writes pictures and arrays to its results folder."""
    config = selection.settle(config, runtime)
    model = load_checkpoint(cast(Path, config.sample.checkpoint), runtime)
    request = request_of(model, config)
    announce(model, request)
    folder = selection.results_folder(model.path, model.digest)
    runtime.on_rank0(lambda: make_folder(folder) and None)
    images, states = sample_images(model, request, SHOWN, progress="sampling")
    for path in runtime.on_rank0(lambda: write_images(folder, to_uint8(images), model, request, states)):
        runtime.say(f"  {path}")


def request_of(model: LoadedModel, config: Config) -> SampleRequest:
    """What mode sample samples."""
    options = replace(config.sample, digits=config.sample.write or config.sample.digits)
    return make_request(model, options, config.seed, len(config.sample.write or "") or options.num_images or 256)


def announce(model: LoadedModel, request: SampleRequest) -> None:
    """Prints which weights are sampled from, in how many network evaluations, and how they are guided."""
    name, notice = model.data.get("name", "unknown images"), f"\n{NOTICE}"
    model.runtime.say(f"Sampling from {model.path} (trained on {name}, step {model.step:,}, weights {model.digest}) on "
                      f"{model.runtime.name()}: {request.evaluations} network evaluations an image. "
                      f"{request.note}".rstrip() + notice * (name == "generated"))


def write_images(folder: Path, images: Tensor, model: LoadedModel, request: SampleRequest,
                 states: Tensor) -> list[Path]:
    """Writes pictures and arrays, and returns their paths. Warns if the images don't look like the training images."""
    plots.warn_if_broken(images, model.data, model.images_seen)
    options, source = request.options, provenance(model, request)
    grid = images[:MOST_IN_GRID]
    shown, frames = (np.linspace(0, len(states) - 1, min(len(states), most)).round().astype(int).tolist()
                     for most in (COLUMNS, FRAMES))  # evenly spaced, with both ends
    columns = 10 if options.digits == "0123456789" else max(1, round(len(grid) ** 0.5))
    writers: dict[str, Callable[[Path], None]] = {
        "process.png": lambda path: plots.save_process(path, states[shown], [request.timesteps[i] for i in shown],
                                                       source),
        "process.gif": lambda path: plots.save_animation(path, states[frames], source),
        "samples.npz": lambda path: write_atomically(path, lambda file: np.savez(
            file, images=images[:, 0].numpy(), labels=request.labels.numpy())),  # uint8 [N, 28, 28], int64 [N]
        "sample.png": lambda path: plots.save_grid(path, grid, columns, source)}  # last: then all are there
    if len(grid) < len(images):
        say(f"sample.png shows the first {len(grid):,} of {len(images):,} images; samples.npz holds all.")
    if options.write is not None:
        writers = {"number.png": lambda path: plots.save_number(path, images, source)}
    return write_results(folder, writers)
