"""From a checkpoint and seeds to images: the trained network, labels, noise, chunks, processes.

An image and all its noise follow from (seed, image index) alone: every image is drawn in a slot of a chunk of one
fixed size, so that it comes out the same alone, among many, and on any number of processes. The line that a reader of
the reverse process looks for is the loop over SAMPLERS in `_draw_chunk`.
"""

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

import config as configs
from config import CLASSES, NO_LABEL, Config, SampleConfig, UserError
from dataset import NOTICE
from diffusion import Network, NoiseSchedule, make_denoiser
from model import UNet
from samplers import SAMPLERS, spaced_timesteps, timesteps_of
from support import checkpoint
from support.runtime import Captured, Runtime, generator, to_uint8

NOISE_STREAM, DIGIT_STREAM = 2, 3  # of random numbers; train.py owns stream 1
SHOWN = 6  # images in the pictures of the process
BLOCK = 100  # images whose labels are a design together
GOLDEN = (5**0.5 - 1) / 2
_GRAPHS: weakref.WeakKeyDictionary[Network, dict[Any, Network]] = weakref.WeakKeyDictionary()  # by size and precision


@dataclass(frozen=True)
class Trained:
    """What draws: a network with its averaged weights, its schedule, and where both came from."""

    network: Network
    schedule: NoiseSchedule
    config: Config
    history: dict[str, Any]  # of its training: "data" (of the images: name, digest, class counts, ...), seconds, code
    digest: str = ""
    step: int = 0
    path: Path = Path()

    @property
    def data(self) -> dict[str, Any]:
        data = self.history.get("data")
        return data if isinstance(data, dict) else {}

    def labels(self, digits: str | None, seed: int, count: int) -> Tensor:
        digits = "none" if self.config.train.label_dropout == 1 else digits  # it never learned one
        return choose_labels(digits, seed, range(count), self.data.get("classes", ()))


@dataclass(frozen=True)
class Order:
    """What is to be drawn, and how: image i and all its noise follow from (seed, i)."""

    options: SampleConfig
    seed: int
    indices: Sequence[int]
    labels: Tensor  # int64 [N], one for each index

    def part(self, positions: Sequence[int]) -> "Order":
        return replace(self, indices=[self.indices[p] for p in positions], labels=self.labels[positions])


@dataclass
class Trace:
    """What `draw` saw on the way, in the chunk of image 0: the first images' states."""

    timesteps: list[int] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)  # uint8 [SHOWN, 1, 28, 28] each, from pure noise on

    def see(self, t: int, x: Tensor) -> None:
        self.timesteps.append(t)
        self.states.append(to_uint8(x[:SHOWN]).cpu())


def load_trained(config: Config, runtime: Runtime) -> Trained:
    """The network of the checkpoint that config means; what that file says of itself decides everything about it."""
    path = checkpoint.find(configs.run_name(config), config.sample.checkpoint)
    state = runtime.only_first(lambda: checkpoint.load(path) | {"model": None, "optimizer": None})
    try:
        stored, lacking = configs.from_stored(state["config"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if lacking:
        runtime.say(f"note: {path} is older than these settings, which have their defaults: {', '.join(lacking)}")
    alpha_bar = state["history"].get("alpha_bar")
    if not isinstance(alpha_bar, Tensor) or alpha_bar.shape != (stored.diffusion.timesteps + 1,):
        raise UserError(f"{path}: it does not hold its noise schedule; {checkpoint.ADVICE}")
    network = UNet(stored.model)
    checkpoint.load_weights(network, state["ema"], path)
    network = network.eval().requires_grad_(False).to(runtime.device).to(memory_format=torch.channels_last)
    schedule = NoiseSchedule(alpha_bar, stored.diffusion.prediction, stored.diffusion.weighting)
    return Trained(network, schedule, stored, state["history"], checkpoint.weights_digest(state["ema"]),
                   state["step"], path)


def announce(trained: Trained, config: Config, runtime: Runtime) -> None:
    """Says what draws, and where it is not what the user may think."""
    runtime.say(f"Drawing from {trained.path} ({trained.data.get('name', trained.config.dataset)}, step "
                f"{trained.step:,}, weights {trained.digest}) on {runtime.name()}.")
    if config.sample.checkpoint is None and trained.path == checkpoint.PRETRAINED:
        runtime.say(f"There is no checkpoint of your own in checkpoints/{configs.run_name(config)}/ yet, so these are "
                    "the weights that come with the project.")
    if trained.data.get("name") == "generated":
        runtime.say(NOTICE)


def guided(options: SampleConfig, trained: Trained, runtime: Runtime) -> SampleConfig:
    """The options, with guidance 1 where there is nothing to guide, and 0, without labels, where none was learned.

    The default interval is that of 1,000 noise levels, and scaled to others. Raises UserError for an impossible number
    of steps.
    """
    spaced_timesteps(trained.schedule.timesteps, options.steps)
    dropout, default = trained.config.train.label_dropout, SampleConfig.guidance_interval
    if default is not None and options.guidance_interval == default:
        low, high = (round(t * trained.schedule.timesteps / 1000) for t in default)
        options = replace(options, guidance_interval=(low, high))
    if dropout == 1:
        runtime.say("This network was trained with --label-dropout 1, so it knows images only without labels, and "
                    "draws any digit.")
        return replace(options, guidance=0.0, guidance_interval=None)
    if options.guidance != 1 and dropout == 0:
        runtime.say("Guidance is off: this network was trained with --label-dropout 0, so it knows images only with "
                    "their labels.")
    return replace(options, guidance=1.0) if options.digits == "none" or dropout == 0 else options


def choose_labels(digits: str | None, seed: int, indices: Sequence[int], classes: Sequence[int] = ()) -> Tensor:
    """Labels int64 [N] of images: a design, no luck. `digits` cycled over the image indices; 10 for "none".

    Unset: images 100b .. 100b+99 have labels in the shares of the training images' `classes` (their counts; unknown:
    all alike), to within one, in an order that follows from (seed, b). Which classes are rounded up changes from block
    to block, so that many blocks have the shares to within two.
    """
    if digits == "none":
        return torch.full((len(indices),), NO_LABEL)
    if digits is not None:
        return torch.tensor([int(digits[index % len(digits)]) for index in indices])
    shares = torch.tensor(classes or [1] * CLASSES, dtype=torch.float64)
    edges = shares.cumsum(0) / shares.sum()
    blocks: dict[int, Tensor] = {}
    for block in {index // BLOCK for index in indices}:
        offset = (block + 0.5) * GOLDEN % 1  # a sequence that fills [0, 1) evenly, wherever it ends
        grid = (torch.arange(BLOCK, dtype=torch.float64) + offset) / BLOCK
        labels = torch.searchsorted(edges, grid, right=True).clamp(max=int(shares.nonzero().max()))
        blocks[block] = labels[torch.randperm(BLOCK, generator=generator("cpu", seed, DIGIT_STREAM, block))]
    return torch.stack([blocks[index // BLOCK][index % BLOCK] for index in indices])


def origin(trained: Trained, order: Order) -> dict[str, str]:
    """Where a picture came from, for its PNG text."""
    options = order.options
    return {"weights": trained.digest, "trained_on": str(trained.data.get("name", trained.config.dataset)),
            "step": str(trained.step), "sampler": options.sampler, "steps": str(options.steps),
            "spacing": options.spacing, "eta": f"{options.eta:g}", "guidance": f"{options.guidance:g}",
            "guidance_interval": str(options.guidance_interval), "digits": str(options.digits), "seed": str(order.seed)}


def draw(trained: Trained, order: Order, runtime: Runtime, trace: Trace | None = None,
         progress: bool = False) -> Tensor:
    """Images [N, 1, 28, 28] in [-1, 1] on the CPU, the same in every process.

    Image i takes slot i % chunk of a chunk whose other slots may be empty. Chunks are shared out among processes.
    Raises UserError for a number of steps that the schedule doesn't have, and if a state stops being finite.
    """
    chunks: dict[int, list[int]] = {}  # chunk number -> positions in order.indices
    for position, index in enumerate(order.indices):
        chunks.setdefault(index // runtime.chunk, []).append(position)
    mine = list(chunks.items())[runtime.rank::runtime.world]
    images = torch.zeros(len(order.indices), 1, 28, 28)
    if runtime.graphs:
        trained = replace(trained, network=_graphed(trained.network))

    def draw_mine() -> list[tuple[list[int], Any]]:
        bar = tqdm(total=len(mine) * (1 + order.options.steps), desc="drawing", unit="step", leave=False,
                   disable=not (progress and runtime.first))
        with bar, torch.inference_mode(), runtime.autocast():
            for number, positions in mine:
                def watch(t: int, x: Tensor, traced: bool = number == 0) -> None:
                    if trace is not None and traced:
                        trace.see(t, x)
                    bar.update()

                images[positions] = _draw_chunk(trained, order.part(positions), runtime, watch)
        return [(positions, images[positions].numpy()) for _, positions in mine]

    for positions, values in itertools.chain(*runtime.everywhere(draw_mine)):
        images[positions] = torch.from_numpy(values)
    return images


def _draw_chunk(trained: Trained, order: Order, runtime: Runtime,
                watch: Callable[[int, Tensor], None]) -> Tensor:
    """The images of one chunk [N, 1, 28, 28]; watch(t, x) sees them at the start and after each step."""
    generators = [generator("cpu", order.seed, NOISE_STREAM, index) for index in order.indices]
    slots = torch.tensor([index % runtime.chunk for index in order.indices])
    labels = torch.full((runtime.chunk,), NO_LABEL).index_copy(0, slots, order.labels).to(runtime.device)

    def randn() -> Tensor:
        noise = torch.zeros(runtime.chunk, 1, 28, 28)
        noise[slots] = torch.stack([torch.randn(1, 28, 28, generator=g) for g in generators])
        return noise.to(runtime.device)

    options, schedule = order.options, trained.schedule
    timesteps = timesteps_of(schedule, options.steps, options.spacing)
    denoise = make_denoiser(trained.network, schedule, labels, options.guidance, options.guidance_interval)
    own: dict[str, dict[str, Any]] = {"ddim": {"eta": options.eta}, "ddpm": {"variance": options.variance}}
    x = randn()
    watch(timesteps[0], x[slots])
    for s, x, _ in SAMPLERS[options.sampler](denoise, schedule, x, timesteps, randn, **own.get(options.sampler, {})):
        if not torch.isfinite(x).all():
            raise UserError(f"the images stopped being finite at t = {s} of {timesteps[0]} ({options.sampler}, "
                            f"{options.steps} steps): try --precision fp32, a lower --guidance or another checkpoint")
        watch(s, x[slots])
    return x[slots].float().cpu()


def _graphed(network: Network) -> Network:
    """The network as captured CUDA graphs: at a chunk's size, launching costs more than computing.

    Captured once for each network, size of batch (with guidance it is twice the chunk) and precision, and freed with
    the network, whose weights a graph reads where they lie: in training, previews see them as they are by then.
    """
    graphs, itself = _GRAPHS.setdefault(network, {}), weakref.ref(network)  # a graph that held it would keep both

    def call(*arguments: Tensor) -> Tensor:
        kind = len(arguments[0]), torch.is_autocast_enabled("cuda")
        if kind not in graphs:
            graphs[kind] = Captured(lambda *inputs: cast(Network, itself())(*inputs))
        return graphs[kind](*arguments)

    return call


def evaluations(schedule: NoiseSchedule, options: SampleConfig) -> int:
    """How often the network is evaluated for an image: once a step, twice where it is guided."""
    low, high = options.guidance_interval or (0, schedule.timesteps)
    times = timesteps_of(schedule, options.steps, options.spacing)[:-1]
    return len(times) + (sum(low < t <= high for t in times) if options.guidance != 1 else 0)
