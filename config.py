"""Every knob on one line: its type and limits, its default, its help. Edit a default, or pass the flag of that name.

Owns the frozen config dataclasses, the few rules between knobs, the part of a config that a checkpoint keeps, and
`UserError`. Imports no torch, so that a wrong flag is answered at once. `python run.py --help` lists everything below.
"""

import contextlib
import dataclasses
import functools
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic import StringConstraints, TypeAdapter, ValidationError

ROOT = Path(__file__).resolve().parent  # where the code and what ships with it lie
RESOLUTIONS = (28, 14, 7)  # pixels at the three stages of the U-Net
CLASSES = 10  # kinds of images
NO_LABEL = CLASSES  # the label of an image that is drawn, or trained on, without one

Channels = Annotated[int, Ge(1), Le(4096)]
Blocks = Annotated[int, Ge(1), Le(64)]
Timestep = Annotated[int, Ge(0), Le(100_000)]
Share = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Ge(1), Le(10**7)]
Asked = Annotated[str, StringConstraints(pattern="^(none|[0-9]{1,10000})$")]
Written = Annotated[str, StringConstraints(pattern="^[0-9]{1,64}$")]
RunName = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]{0,99}$")]
Device = Annotated[str, StringConstraints(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]


class UserError(Exception):
    """A failure that the user can mend: one line that names the thing, what is wrong with it, and what to do."""


@dataclass(frozen=True)
class ModelConfig:
    """model: the U-Net (its stages are named by their resolution: 28, 14 and 7 pixels)"""

    channels: tuple[Channels, Channels, Channels] = (16, 32, 64)  # channels at 28, 14 and 7 pixels
    blocks: tuple[Blocks, Blocks, Blocks] = (1, 2, 2)  # residual blocks at each, on the way down and up again
    attention: tuple[Literal[28, 14, 7], ...] = ()  # resolutions with self-attention; give none for no attention
    embedding: Annotated[int, Ge(2), Le(65536), MultipleOf(2)] = 128  # width of the embedding of time and digit
    groups: Annotated[int, Ge(1), Le(4096)] = 4  # groups of each GroupNorm; has to divide every channel count
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0  # share of activations dropped inside residual blocks


@dataclass(frozen=True)
class DiffusionConfig:
    """diffusion: the noise schedule, what the network predicts, and how the loss is weighted"""

    timesteps: Annotated[int, Ge(2), Le(100_000)] = 1000  # T: number of noise levels
    schedule: Literal["cosine", "linear"] = "cosine"  # cosine (arXiv 2102.09672) or linear (2006.11239)
    prediction: Literal["v", "noise", "x0"] = "v"  # what the network predicts
    weighting: Literal["none", "min-snr", "snr"] = "none"  # of the prediction's squared error


@dataclass(frozen=True)
class TrainConfig:
    """train: the length of a run and how the weights are learned"""

    epochs: Count = 100  # passes over the training images
    minutes: Annotated[float, Gt(0), Le(10**6)] | None = None  # train for this many minutes of wall-clock instead
    batch_size: Annotated[int, Ge(1), Le(10**5)] = 64  # images per step, over all processes together
    lr: Annotated[float, Gt(0), Le(10)] = 2e-3  # peak learning rate
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"  # decay to zero after the warm-up, or none
    warmup: Annotated[int, Ge(0), Le(10**7)] = 100  # steps over which the learning rate rises from zero
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: Muon for weight matrices, AdamW for the rest
    weight_decay: Annotated[float, Ge(0), Le(10)] = 0.05  # decoupled weight decay, times the learning rate
    grad_clip: Annotated[float, Gt(0)] = 1.0  # largest norm of the gradient; inf: no clipping
    ema: Annotated[float, Ge(0), Lt(1)] = 0.999  # decay of the averaged weights per step, warmed up; 0: no averaging
    clip_loss: bool = True  # blacker than black or whiter than white costs nothing, as drawing clips it
    # Share of each batch from the noise levels alone where a digit takes shape, the rest from all; 0: as 2006.11239.
    focus: Annotated[float, Ge(0), Lt(1)] = 0.7
    label_dropout: Share = 0.05  # share of images trained without their label
    preview: Annotated[int, Ge(0), Le(1024)] = 64  # images in each preview grid during training; 0: none
    fresh: bool = False  # start over; the old checkpoint is kept under another name
    same_code: bool = False  # go on with a run although the code was edited since: a comment, a rename


@dataclass(frozen=True)
class SampleConfig:
    """sample: how images are drawn (also by evaluate and compare)"""

    num_images: Annotated[int, Ge(1), Le(10**6)] | None = None  # unset: 256, or 10000 where they are measured
    sampler: Literal["ddpm", "ddim", "dpmpp", "sa", "unipc"] = "sa"  # reverse process
    steps: Annotated[int, Ge(1), Le(100_000)] = 13  # each evaluates the network once, with guidance twice
    spacing: Literal["trailing", "eased", "edm"] = "eased"  # of the steps: evenly, closer at both ends, or EDM's
    eta: Share = 0.0  # ddim: noise added in each step, 0 (none) to 1 (as ddpm)
    variance: Literal["posterior", "upper"] = "posterior"  # ddpm: beta-tilde or beta (2006.11239, section 3.2)
    guidance: Annotated[float, Ge(0), Le(100)] = 1.7  # x0 = free + guidance * (labelled - free) (2207.12598); 1: off
    guidance_interval: tuple[Timestep, Timestep] | None = (450, 600)  # where guided, first < t <= second (2404.07724)
    digits: Asked | None = None  # digits to draw, cycled ("7", "0123456789"), or "none"; unset: as in the data
    write: Written | None = None  # a number to write in one line, such as 20261123, into number.png
    checkpoint: Path | None = None  # file to draw from; unset: checkpoints/<name>/last.safetensors, else what ships


@dataclass(frozen=True)
class EvaluateConfig:
    """evaluate and compare: what is measured"""

    bound: bool = False  # also the variational bound on the likelihood, in bits per pixel
    sweep: bool = False  # every sampler at several step counts instead: sweep.png and sweep.csv
    # compare: two sides, each a run's name, a checkpoint, "pretrained", or runs a,b,c; with drawing flags in quotes
    runs: tuple[str, str] | None = None


@dataclass(frozen=True)
class Config:
    """Train a small diffusion model of handwritten digits, draw with it, and measure it."""

    mode: Literal["train", "sample", "evaluate", "compare"] = "train"  # what `python run.py` does
    name: RunName | None = None  # name of the run, in checkpoints/ and results/; unset: the data set's name
    # auto: mnist, else, offline, the generated digits that ship; idx: four files of your own in --data-dir
    dataset: Literal["auto", "mnist", "fashion-mnist", "kmnist", "generated", "idx"] = "auto"
    data_dir: Path | None = None  # folder of mnist/MNIST/raw and others, or of IDX files; unset: dataset/
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0  # every random number follows from it
    device: Device = "auto"  # cuda, cuda:1, mps, cpu, or auto: the first of these that is there
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA, fp32 elsewhere
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile, and CUDA graphs; auto: on CUDA alone
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


ADAPTER = TypeAdapter(Config)
GROUPS = ("model", "diffusion", "train", "sample", "evaluate")
STORED = ("dataset", "seed", "precision", "model", "diffusion", "train")  # what a checkpoint keeps of its config
# Training does not depend on these, so a run that is continued may have others.
FREE = ("epochs", "minutes", "preview", "fresh", "same_code")
RESERVED = "pretrained"  # the name of what ships


def parse(argv: list[str], defaults: Config | None = None) -> Config:
    """Config from flags over the defaults, those above unless others are given.

    Raises UserError for a bad flag, SystemExit(0) after --help.
    """
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(tyro.conf.OmitArgPrefixes[Config], args=argv, prog="run.py", description=Config.__doc__,
                              default=defaults or Config())
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
        raise UserError(_one_line(said.getvalue())) from None
    return validate(config)


def validate(config: Config) -> Config:
    """The config, each knob checked against its type and limits, and the rules between them; raises UserError."""
    config = _checked(_plain(config))
    model, sample = config.model, config.sample

    def require(ok: bool, flag: str, value: Any, problem: str) -> None:
        if not ok:
            raise UserError(f"{flag} {_show(value)}: {problem}")

    require(all(c % model.groups == 0 for c in model.channels), "--channels", model.channels,
            f"GroupNorm can't divide them into {model.groups} groups; use multiples of it, or other --groups")
    require(config.diffusion.schedule != "linear" or config.diffusion.timesteps > 20, "--timesteps",
            config.diffusion.timesteps, "the linear schedule's last beta, 20 / T, reaches 1; use at least 21")
    require(sample.eta == 0 or sample.sampler == "ddim", "--eta", sample.eta,
            f"only ddim has it, not {sample.sampler}; leave it out, or add --sampler ddim")
    require(sample.variance == "posterior" or sample.sampler == "ddpm", "--variance", sample.variance,
            f"only ddpm has it, not {sample.sampler}; leave it out, or add --sampler ddpm")
    low, high = sample.guidance_interval or (0, 1)
    require(low < high, "--guidance-interval", sample.guidance_interval, "the first has to be below the second")
    require(sample.digits != "none" or sample.guidance in (1, SampleConfig.guidance), "--guidance", sample.guidance,
            "guidance needs labels, and --digits none has none; leave one of the two out")
    require(config.name != RESERVED, "--name", config.name, "the pictures that come with the project have this name; "
            "choose another")
    return config


def run_name(config: Config) -> str:
    """Name of the run's folders in checkpoints/ and results/."""
    return config.name or ("mnist" if config.dataset == "auto" else config.dataset)


def stored(config: Config) -> dict[str, Any]:
    """What a checkpoint keeps: the settings that decide training and the network, as plain values."""
    return {name: value for name, value in _plain(config).items() if name in STORED}


def from_stored(values: Any) -> tuple[Config, list[str]]:
    """Inverse of `stored`, and the knobs that it lacks, being older than they are: these have their defaults.

    Raises UserError for anything else than the settings of such a run.
    """
    if not isinstance(values, dict) or not all(isinstance(values.get(name, {}), dict) for name in GROUPS):
        raise UserError("its settings are not as this project stores them; use another file, or train again")
    theirs, ours = _flat(values), _flat(stored(Config()))
    if unknown := sorted(theirs.keys() - ours.keys()):
        raise UserError(f"it has settings that this version does not know ({', '.join(map(repr, unknown)):.200}): "
                        "use the version that wrote it, or train again")
    return validate(_checked(values)), [name for name in ours if name not in theirs and name not in FREE]


def differences(saved: Config, wanted: Config) -> list[str]:
    """The settings on which training depends and that are not the same, each with both values."""
    before, now = _flat(stored(saved)), _flat(stored(wanted))
    return [f"{name.replace('_', '-')} was {before[name]}, now {now[name]}" for name in now
            if name not in FREE and before[name] != now[name]]


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Knobs by name, without their groups: no two have the same."""
    inner = {name: value for group in GROUPS for name, value in values.get(group, {}).items()}
    return {name: value for name, value in values.items() if name not in GROUPS} | inner


def _plain(config: Config) -> dict[str, Any]:
    """Nested dict of the plain values that JSON has; inf stays."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _checked(values: dict[str, Any]) -> Config:
    """A Config of plain values, by its annotations alone, strictly: "3" is no number, and True is no 1."""
    try:
        return ADAPTER.validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        names = [part for part in first["loc"] if isinstance(part, str)][:2 if first["loc"][0] in GROUPS else 1]
        value = functools.reduce(lambda inner, name: inner[name], names, values)
        flag = "--" + names[-1].replace("_", "-")
        raise UserError(f"{flag} {_show(value)}: {first['msg'][:1].lower()}{first['msg'][1:]}; "
                        "see python run.py --help") from None


def _show(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if text and text.isprintable() and len(text) < 200 else f"{text!r:.200}"


def _one_line(box: str) -> str:
    """The message out of tyro's box: title, message, advice; drawn with rules, or with dashes without Unicode."""
    sections: list[list[str]] = [[]]
    for line in (line.strip("│| ") for line in box.splitlines()):
        if line.startswith("╭") or line and set(line) <= {"─", "-"}:
            sections.append([])
        elif line and not line.startswith("╰"):
            sections[-1].append(line)
    message = " ".join(sections[1] if len(sections) > 1 else sections[0])
    options = re.findall("--[a-z-]+", " ".join(sections[2])) if len(sections) > 2 else []
    hint = f" Perhaps you meant {options[0]}." if message.startswith("Unrecognized") and options else ""
    return f"{message.rstrip('.')}.{hint} See python run.py --help"
