"""Every knob on one line: type, limits, default, help. Edit a default here, or pass the flag of the same name.

Owns the frozen config dataclasses and `UserError`. A knob's comment is its text in `python run.py --help`. How flags
are parsed, checked and stored is in support/settings.py. Imports no torch, so that a wrong flag is answered at once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic import StringConstraints

ROOT = Path(__file__).resolve().parent  # where the code and what ships with it lie


class UserError(Exception):
    """A failure that the user can fix: one line that names the thing, what is wrong with it, and what to do."""

    def __str__(self) -> str:  # names in a damaged file may hold anything, line ends too
        return "".join(letter if letter.isprintable() else "?" for letter in super().__str__())

    def _render_traceback_(self) -> list[str]:  # what a notebook shows: the line alone
        return [f"error: {self}"]


class OnlyFor(NamedTuple):
    """Marks an option of one sampler, which its function in samplers.py takes by the same name."""

    sampler: str


UNSET: Any = tyro.conf.arg(help_behavior_hint="")  # no "(default: None)" in --help
Channels = Annotated[int, Ge(1), Le(4096)]
Blocks = Annotated[int, Ge(1), Le(64)]
Share = Annotated[float, Ge(0), Le(1)]
Labels = Annotated[Annotated[str, StringConstraints(pattern="^(none|[0-9]+)$")] | None, UNSET]
Number = Annotated[Annotated[str, StringConstraints(pattern="^[0-9]{1,64}$")] | None, UNSET]
RunName = Annotated[Annotated[str, StringConstraints(pattern=r"^\w[\w.-]{0,99}$")] | None, UNSET]
OptionalPath = Annotated[Path | None, UNSET]
Device = Annotated[str, StringConstraints(pattern=r"^(auto|cpu|mps|cuda(:(0|[1-9][0-9]?))?)$")]
Precision = Literal["auto", "fp32", "bf16"]
Changes = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FLAGS", help_behavior_hint="")]


@dataclass(frozen=True)
class ModelConfig:
    """For training (other modes take them from the checkpoint): the U-Net, with stages at 28, 14 and 7 pixels."""

    channels: tuple[Channels, Channels, Channels] = (16, 32, 64)  # channels at 28, 14 and 7 pixels
    blocks: tuple[Blocks, Blocks, Blocks] = (1, 2, 2)  # residual blocks per stage, down and again up
    attention: Annotated[tuple[Literal[28, 14, 7], ...], UNSET] = ()  # resolutions with self-attention; unset: none
    embedding: Annotated[int, Ge(2), Le(65536), MultipleOf(2)] = 128  # width of the embedding of time and label
    groups: Annotated[int, Ge(1), Le(4096)] = 4  # groups of each GroupNorm; has to divide every channel count
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0  # share of activations dropped inside residual blocks


@dataclass(frozen=True)
class DiffusionConfig:
    """For training (other modes take them from the checkpoint): noise schedule, prediction target and loss."""

    timesteps: Annotated[int, Ge(2), Le(100_000)] = 1000  # T: number of noise levels
    schedule: Literal["cosine", "linear"] = "cosine"  # cosine (arXiv 2102.09672) or linear (2006.11239)
    prediction: Literal["v", "noise", "x0"] = "v"  # what the network predicts
    # weight of x0's squared error: snr, or min-snr = min(SNR, 5); none: plain error of the prediction
    weighting: Literal["none", "min-snr", "snr"] = "none"


@dataclass(frozen=True)
class TrainConfig:
    """For modes train and experiment: the length of a run and how the weights are learned."""

    # weights to start from: pretrained, a run or a file, with its network's settings; unset: random weights
    init: Annotated[str | None, UNSET] = None
    epochs: Annotated[int, Ge(1), Le(10**7)] = 100  # passes over the training images
    minutes: Annotated[float | None, Gt(0), Le(10**6), UNSET] = None  # minutes of training steps, in place of epochs
    batch_size: Annotated[int, Ge(1), Le(10**5)] = 256  # images per step, over all processes together
    lr: Annotated[float, Gt(0), Le(10)] = 4e-3  # peak learning rate
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"  # decay to zero over the run, or none
    warmup: Annotated[int, Ge(0), Le(10**7)] = 100  # steps over which the learning rate rises from zero
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: Muon for inner convolutions, AdamW for the rest
    weight_decay: Annotated[float, Ge(0), Le(10)] = 0.05  # decoupled weight decay, times the learning rate
    grad_clip: Annotated[float, Gt(0)] = 1.0  # largest norm of the gradient; inf: no clipping
    ema: Annotated[float, Ge(0), Lt(1)] = 0.996  # decay of the averaged weights per step, warmed up; 0: no averaging
    clip_loss: bool = True  # no loss where the predicted x0 overshoots black or white
    focus: Annotated[float, Ge(0), Lt(1)] = 0.7  # share of a batch drawn from alpha_bar 0.1 to 0.65
    label_dropout: Share = 0.05  # share of images trained without their label
    preview: Annotated[int, Ge(0), Le(1024)] = 60  # images in each preview grid during training; 0: none
    deterministic: bool = True  # on a GPU too, a seed gives the same weights, bit for bit; it may cost some speed
    fresh: bool = False  # start over; old checkpoints and results are kept in old1/, old2/, ...
    same_code: bool = False  # continue a run although the code changed: safe for comments and renames


@dataclass(frozen=True)
class SampleConfig:
    """How images are sampled: in modes sample, evaluate, compare and experiment, and at the end of mode train."""

    num_images: Annotated[int | None, Ge(1), Le(10**6), UNSET] = None  # unset: 256 to look at, 10000 to measure
    sampler: Literal["ddpm", "ddim", "dpmpp", "sa"] = "sa"  # DDPM, DDIM, DPM-Solver++ or SA-Solver
    steps: Annotated[int, Ge(1), Le(100_000)] = 25  # sampling steps; one network evaluation each, two where guided
    spacing: Literal["trailing", "eased"] = "eased"  # of the timesteps: even, or closer together at both ends
    eta: Annotated[Share, OnlyFor("ddim")] = 0.0  # ddim: noise added in each step, 0 (none) to 1 (as ddpm)
    # ddpm: beta-tilde or beta (2006.11239, section 3.2)
    variance: Annotated[Literal["posterior", "upper"], OnlyFor("ddpm")] = "posterior"
    # x0 = unconditional + guidance * (labelled - unconditional) (2207.12598); 1: off
    guidance: Annotated[float, Ge(0), Le(100)] = 3.0
    guidance_interval: tuple[Share, Share] = (0.34, 0.57)  # alpha_bar where guidance acts (2404.07724); 0 1: all
    digits: Labels = None  # classes to sample, cycled ("7", "0123456789"), or none; unset: all, equally often
    write: Number = None  # a number, such as 20261123, written in one row of digits to number.png
    checkpoint: OptionalPath = None  # file to sample from, or pretrained; unset: the run mnist, else pretrained


@dataclass(frozen=True)
class Config:
    """Train a small diffusion model of handwritten digits, sample from it, and measure it."""

    mode: Literal["train", "sample", "evaluate", "compare", "experiment"] = "train"  # what `python run.py` does
    name: RunName = None  # name of the run, in checkpoints/ and results/; unset, in training: the data set's name
    # auto: the checkpoint's data set, else mnist, or offline the generated digits; of your own, in --data-dir: folder
    # (pictures in CLASS/, or in train/CLASS/ and test/CLASS/) or idx (four IDX files)
    dataset: Literal["auto", "mnist", "fashion-mnist", "kmnist", "generated", "folder", "idx"] = "auto"
    data_dir: OptionalPath = None  # folder of the pictures, of the IDX files, or of mnist/MNIST/raw; unset: dataset/
    invert: Annotated[bool | None, UNSET] = None  # folder: dark becomes light; unset: if most borders are bright
    # compare: two sides, each a run, a file, pretrained, or trainings a,b,c; quote a side to give it its
    # own flags: "mine --steps 13"
    runs: Annotated[tuple[str, str] | None, tyro.conf.arg(metavar="A B", help_behavior_hint="")] = None
    # experiment: the flags of each change, such as "--schedule linear" or "--focus 0" "--focus 0.35"
    change: Changes = ()
    trainings: Annotated[int, Ge(2), Le(100)] = 4  # experiment: of each recipe, the unchanged one too, from --seed on
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0  # every random number follows from it
    device: Device = "auto"  # cuda, cuda:1, mps, cpu, or auto: the first of these that is available
    precision: Precision = "auto"  # auto: bf16 where the device is fast at it; a resumed run trains on as it began
    compile: Literal["auto", "on", "off"] = "auto"  # training only: torch.compile, and CUDA graphs; auto: only on CUDA
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
