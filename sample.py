"""From a checkpoint, labels and a seed to images; mode sample; and the API for scripts: load_model, LoadedModel.sample.

An image and all its noise follow from (seed, image index) alone: every image is sampled in a slot of a chunk of one
fixed size, so that it comes out the same alone, among many, and on any number of processes.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from config import Config, SampleConfig, UserError
from dataset import CLASSES, NO_LABEL, to_uint8
from diffusion import Denoiser, Network, NoiseSchedule, make_denoiser
from model import UNet
from samplers import SAMPLERS, spaced_timesteps
from support import checkpoint, plots, selection
from support.console import progress_bar, say
from support.files import make_folder, write_atomically, write_results
from support.loading import NOTICE
from support.precision import autocast
from support.randomness import LABEL_STREAM, NOISE_STREAM, generator
from support.runtime import Runtime, make_runtime
from support.settings import SAMPLER_OF, SAMPLING, network_settings, validate

SHOWN = 6  # images in the pictures of the process
COLUMNS, FRAMES = 15, 60  # states in process.png and in process.gif, at most
FEW_SEEN = 20_000  # images, a minute on two CPU cores: what was trained with fewer can't be expected to sample well
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
        trained_on = self.data.get("name", "unknown images")
        return (f"LoadedModel({str(self.path)!r}, trained on {trained_on}, step {self.step:,}, weights {self.digest}, "
                f"on {self.runtime.name()})")

    @property
    def data(self) -> dict[str, Any]:
        data = self.history.get("data")
        return data if isinstance(data, dict) else {}

    @property
    def label_dropout(self) -> float:
        share = self.settings.get("train", {}).get("label_dropout")
        return float(share) if isinstance(share, (int, float)) else 0.1  # the first default

    @property
    def classes(self) -> list[int]:
        """The classes that the network was trained on."""
        counts = self.data.get("classes") or [1] * CLASSES
        return [k for k, count in enumerate(counts) if count]

    def sample(self, labels: str | Sequence[int] | None = "0123456789", num_images: int | None = None, seed: int = 0, *,
               trajectory: bool = False, **options: Any) -> Any:
        """Samples images: uint8 numpy [N, 28, 28], the same as `--mode sample` with the same flags writes.

        labels: classes as a digit string or integers, None for images without labels; cycled to num_images (unset: as
        many as labels, or one). options: sampler, steps, spacing, eta, variance, guidance, guidance_interval, as the
        flags. With trajectory, returns (images, Trajectory). Raises UserError for what the flags would not accept.
        """
        try:
            classes = [int(label) if isinstance(label, str) else operator.index(label)
                       for label in (() if labels is None else labels)]
        except (TypeError, ValueError):  # neither a digit nor an integer
            classes = [-1]
        if labels is not None and not classes or any(not 0 <= k < CLASSES for k in classes):
            raise UserError(f"labels {labels!r:.100}: give classes from 0 to {CLASSES - 1}, or None for no labels")
        if unknown := options.keys() - {*SAMPLING}:
            raise UserError(f"{', '.join(sorted(unknown))}: no option of sampling; there are {', '.join(SAMPLING)}")
        wanted = SampleConfig(digits="none" if labels is None else "".join(map(str, classes)),
                              num_images=len(classes) or 1 if num_images is None else num_images, **options)
        wanted = validate(Config(seed=seed, sample=wanted)).sample
        request = make_request(self, wanted, seed, cast(int, wanted.num_images))
        images, states = sample_images(self, request, shown=len(request.indices) if trajectory else 0)
        arrays = to_uint8(images)[:, 0].numpy()
        return (arrays, Trajectory(request.timesteps, states[:, :, 0].numpy())) if trajectory else arrays

    def denoiser(self, labels: Sequence[int] | Tensor, guidance: float = 1.0,
                 interval: tuple[float, float] | None = None) -> Denoiser:
        """`diffusion.make_denoiser` for this network: denoise(x [N, 1, 28, 28], t) -> x0_hat; labels [N], 10: none."""
        return make_denoiser(self.network, self.schedule, torch.as_tensor(labels, device=self.runtime.device), guidance,
                             interval)


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
    evaluations: int  # of the network, for an image: one a step, two where it is guided


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
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    alpha_bar = state["history"].get("alpha_bar")
    if not isinstance(alpha_bar, Tensor) or alpha_bar.ndim != 1 or len(alpha_bar) < 3:
        raise UserError(f"{path}: it does not hold its noise schedule; {checkpoint.ADVICE}")
    network = UNet(settings)
    checkpoint.load_weights(network, state["ema"], path)
    network = network.eval().requires_grad_(False).to(runtime.device).to(memory_format=runtime.memory_format)
    return LoadedModel(network, NoiseSchedule(alpha_bar.double(), prediction), runtime, state["config"],
                       state["history"], checkpoint.weights_digest(state["ema"]), state["step"], path)


def make_request(model: LoadedModel, options: SampleConfig, seed: int, count: int) -> SampleRequest:
    """The request for images 0 to count - 1: only here are labels, timesteps and guidance decided.

    If no step lies in the guidance interval, the step nearest to it is guided. Raises UserError for labels that the
    network has not learned, guidance that it does not support, and an impossible number of steps.
    """
    timesteps = spaced_timesteps(model.schedule.timesteps, options.steps, options.spacing)
    digits = "none" if model.label_dropout == 1 and options.digits is None else options.digits
    flag = "--digits" if options.write is None else "--write"
    if unlearned := sorted({int(digit) for digit in digits or "" if digits != "none"} - set(model.classes)):
        raise UserError(f"{flag} {digits}: this network was not trained on class "
                        f"{', '.join(map(str, unlearned))}; choose from {''.join(map(str, model.classes))}")
    if model.label_dropout == (0 if digits == "none" else 1):
        knows = "images only with their labels" if digits == "none" else "no labels"
        raise UserError(f"{flag} {digits}: this network was trained with --label-dropout {model.label_dropout:g}, so "
                        f"it knows {knows}; leave it out")
    labels = choose_labels(digits, seed, range(count), model.classes)
    guidance, interval, guided, note = options.guidance, options.guidance_interval, 0, ""
    if guidance != 1 and (digits == "none" or model.label_dropout == 0):
        if guidance != SampleConfig.guidance:
            raise UserError(f"--guidance {guidance:g}: this network can't be guided, since it was trained with "
                            f"--label-dropout {model.label_dropout:g}; leave --guidance out")
        guidance, note = 1.0, "No guidance: it compares images with and without labels."
    elif guidance != 1:
        low, high = interval
        levels = [model.schedule.alpha_bar[t].item() for t in timesteps[:-1]]
        guided, where = sum(low <= level <= high for level in levels), ""
        if guided == 0:
            nearest = min(levels, key=lambda level: max(low - level, level - high))
            guided, interval = 1, (nearest, nearest)
            where = f", the one nearest to the interval (alpha_bar {low:g} to {high:g})"
        note = f"Guidance {guidance:g} acts in {guided} of {options.steps} steps{where}."
    return SampleRequest(options, seed, range(count), labels, timesteps, guidance, interval, note,
                         options.steps + guided)


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
    knobs = {name: str(getattr(request.options, name)) for name in (*SAMPLING, "digits")
             if not name.startswith("guidance")}
    return {"weights": model.digest, "trained_on": str(model.data.get("name", "unknown")), "step": str(model.step),
            "seed": str(request.seed), "guidance": f"{request.guidance:g}",
            "guidance_interval": "{:g} {:g}".format(*request.interval), **knobs}


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
    mine = list(chunks.values())[runtime.rank::runtime.world]

    def work() -> tuple[Tensor, Tensor]:
        images = torch.zeros(len(request.indices), 1, 28, 28)
        states = torch.zeros(len(request.timesteps), min(shown, len(images)), 1, 28, 28, dtype=torch.uint8)
        bar = progress_bar(progress != "" and runtime.rank == 0, total=len(images), desc=progress, unit=" images",
                           leave=False)
        with bar, torch.inference_mode(), autocast(runtime.device, runtime.bf16):
            for chunk, positions in enumerate(mine):
                seen = positions[:sum(position < states.shape[1] for position in positions)]  # positions ascend
                part = request._replace(indices=[request.indices[position] for position in positions],
                                        labels=request.labels[positions])
                for number, x in enumerate(_chunk_states(model, part)):
                    states[number, seen] = to_uint8(x[:len(seen)]).cpu()
                    done = (chunk + number / request.options.steps) / len(mine)  # by all processes, as by this one
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
        noise = torch.stack([torch.randn(1, 28, 28, generator=g) for g in generators])
        return torch.zeros(runtime.chunk, 1, 28, 28).index_copy(0, slots, noise).to(runtime.device)

    options = request.options
    denoise = make_denoiser(model.network, model.schedule, labels, request.guidance, request.interval)
    own_options = {name: getattr(options, name) for name, sampler in SAMPLER_OF.items() if sampler == options.sampler}
    x = randn()
    yield x[slots]
    for s, x, _ in SAMPLERS[options.sampler](denoise, model.schedule, x, request.timesteps, randn, **own_options):
        if not torch.isfinite(x).all():
            raise UserError(f"the images stopped being finite at t = {s} of {request.timesteps[0]} ({options.sampler}, "
                            f"{options.steps} steps): try --precision fp32, a lower --guidance or another checkpoint")
        yield x[slots]


def main(config: Config, runtime: Runtime) -> None:
    """Samples from a checkpoint as config.sample says, and writes pictures and arrays to its results folder."""
    config = selection.settle(config, runtime)
    model = load_checkpoint(cast(Path, config.sample.checkpoint), runtime)
    options = replace(config.sample, digits=config.sample.write or config.sample.digits)
    count = len(config.sample.write or "") or options.num_images or 256
    request = make_request(model, options, config.seed, count)
    announce(model, request)
    folder = selection.results_folder(model.path, model.digest)
    runtime.on_rank0(lambda: make_folder(folder) and None)
    images, states = sample_images(model, request, SHOWN, progress="sampling")
    for path in runtime.on_rank0(lambda: write_images(folder, to_uint8(images), model, request, states)):
        runtime.say(f"  {path}")


def announce(model: LoadedModel, request: SampleRequest) -> None:
    """Prints which weights are sampled from, in how many network evaluations, and how they are guided."""
    name, notice = model.data.get("name", "unknown images"), f"\n{NOTICE}"
    model.runtime.say(f"Sampling from {model.path} (trained on {name}, step {model.step:,}, weights {model.digest}) on "
                      f"{model.runtime.name()}: {request.evaluations} network evaluations an image. "
                      f"{request.note}".rstrip() + notice * (name == "generated"))


def write_images(folder: Path, images: Tensor, model: LoadedModel, request: SampleRequest,
                 states: Tensor) -> list[Path]:
    """Writes pictures and arrays, and returns their paths. Warns if the images don't look like the training images."""
    warn_if_broken(images, model)
    options, source = request.options, provenance(model, request)
    arrays = images.permute(0, 2, 3, 1).numpy(), request.labels.numpy()  # in the convention of OpenAI's evaluators
    # Evenly spaced states, with both ends.
    shown, frames = (np.linspace(0, len(states) - 1, min(len(states), most)).round().astype(int).tolist()
                     for most in (COLUMNS, FRAMES))
    columns = 10 if options.digits == "0123456789" else max(1, round(len(images) ** 0.5))
    writers: dict[str, Callable[[Path], None]] = {
        "sample.png": lambda path: plots.save_grid(path, images, columns, source),
        "process.png": lambda path: plots.save_process(path, states[shown], [request.timesteps[i] for i in shown],
                                                       source),
        "process.gif": lambda path: plots.save_animation(path, states[frames], source),
        "samples.npz": lambda path: write_atomically(path, lambda file: np.savez(file, *arrays))}
    if options.write is not None:
        writers = {"number.png": lambda path: plots.save_number(path, images, source)}
    return write_results(folder, writers)


def warn_if_broken(images: Tensor, model: LoadedModel) -> None:
    """Warns if images look nothing like the data that the network was trained on, unless it had no time to learn it."""
    data, seen = model.data, model.step * model.settings.get("train", {}).get("batch_size", 64)
    if problem := plots.looks_broken(images, **{key: data[key] for key in ("mean", "std") if key in data}):
        say(f"note: the images are still {problem}: the network has seen {seen:,}, and it takes tens of thousands."
            if seen < FEW_SEEN else
            f"WARNING: these images do not look like {data.get('name', 'the training images')} ({problem}). Was the "
            "network trained long enough, with a falling loss?")
