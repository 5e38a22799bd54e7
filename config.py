"""Every knob: its default, its unit and one line of help. Edit a default here, or pass the flag of the same name.

Owns the frozen config dataclasses, their validation, and `UserError`, the failure that a user can mend.
Imports no torch, so that a wrong flag is answered at once. `python run.py --help` lists everything below.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints


class UserError(Exception):
    """A failure that the user can mend: one line that names the thing, what is wrong with it, and what to do."""


@dataclass(frozen=True)
class ModelConfig:
    """model: the U-Net (its stages are named by their resolution: 28, 14 and 7 pixels)"""

    channels: tuple[int, ...] = (16, 32, 96)  # channels at 28, 14 and 7 pixels
    blocks: tuple[int, ...] = (1, 1, 1)  # residual blocks at 28, 14 and 7 pixels, on the way down and up again
    attention: tuple[int, ...] = (7,)  # resolutions with self-attention, out of 28, 14 and 7; give none for no attention
    embedding: int = 128  # width of the embedding of time and digit
    groups: int = 8  # groups of each GroupNorm; has to divide every channel count
    dropout: float = 0.0  # share of activations dropped inside residual blocks
    refiner: int = 0  # noise levels, from t = 1 up, that a small network of their own takes, for better bits/dim; 0: none


@dataclass(frozen=True)
class DiffusionConfig:
    """diffusion: the noise schedule, what the network predicts, and how the loss is weighted"""

    timesteps: int = 1000  # T: number of noise levels
    schedule: Literal["cosine", "linear"] = "cosine"  # cosine (arXiv 2102.09672) or linear (2006.11239)
    prediction: Literal["v", "noise", "x0"] = "v"  # what the network predicts
    weighting: Literal["none", "min-snr", "snr"] = "none"  # of the prediction's squared error


@dataclass(frozen=True)
class TrainConfig:
    """train: the length of a run and how the weights are learned"""

    epochs: int = 100  # passes over the training images
    minutes: float | None = None  # train for this many minutes of wall-clock instead
    batch_size: int = 64  # images per step, over all processes together
    lr: float = 2e-3  # peak learning rate
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"  # decay to zero after the warm-up, or none
    warmup: int = 100  # steps over which the learning rate rises from zero
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: Muon for weight matrices, AdamW for the rest
    weight_decay: float = 0.01  # decoupled weight decay, times the learning rate
    grad_clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.999  # decay of the averaged weights per step, warmed up; 0: no averaging
    clip_loss: bool = True  # blacker than a black pixel, or whiter than a white one, costs nothing, as drawing clips it
    label_dropout: float = 0.1  # share of images trained without their label
    refiner_share: float = 0.5  # share of images trained at the noise levels of --refiner; 1: the refiner alone
    preview: int = 64  # images in each preview grid during training; 0: none
    fresh: bool = False  # start over; the old checkpoint is kept under another name


@dataclass(frozen=True)
class SampleConfig:
    """sample: how images are drawn (also by evaluate)"""

    num_images: int | None = None  # images to draw; unset: 256 in sample, 10000 in evaluate
    sampler: Literal["ddpm", "ddim", "dpmpp", "dpmpp-sde", "unipc"] = "dpmpp-sde"  # reverse process
    steps: int = 10  # each evaluates the network once, with guidance twice
    eta: float = 0.0  # ddim: noise added in each step, 0 (none) to 1 (as ddpm)
    variance: Literal["posterior", "upper"] = "posterior"  # ddpm: beta-tilde or beta (2006.11239, section 3.2)
    guidance: float = 1.14  # classifier-free guidance (2207.12598), x0 = free + guidance * (labelled - free); 1: off
    digits: str | None = None  # digits to draw, cycled ("7", "0123456789"), or "none" for no label; unset: at random
    write: str | None = None  # a number to write in one line, such as 20261123, into number.png
    checkpoint: Path | None = None  # file to draw from; unset: checkpoints/<name>/last.pt, else pretrained.pt


@dataclass(frozen=True)
class EvaluateConfig:
    """evaluate: what is measured"""

    seeds: int = 1  # repeat with this many seeds (seed, seed + 1, ...) for mean and spread
    sweep: bool = False  # every sampler at several step counts instead: sweep.png and sweep.csv


@dataclass(frozen=True)
class Config:
    """Train a small diffusion model of handwritten digits, draw with it, and measure it."""

    mode: Literal["train", "sample", "evaluate"] = "train"  # what `python run.py` does
    name: str | None = None  # name of the run, in checkpoints/ and results/; unset: the data set's name
    dataset: Literal["auto", "mnist", "generated", "idx"] = "auto"  # auto: mnist, else, offline, the generated digits
    data_dir: Path = Path("dataset")  # MNIST goes to <data-dir>/mnist/MNIST/raw; idx: folder of the four IDX files
    seed: int = 0  # every random number follows from it
    device: str = "auto"  # cuda, mps, cpu, or auto: the first of these that is there
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA, fp32 elsewhere
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on CUDA where a compiler is found
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


RESOLUTIONS = (28, 14, 7)
MAX_WRITTEN = 64  # digits in one number.png


def validate(config: Config) -> None:
    """Checks every field against its type and range, and the combinations; raises UserError naming the first field."""
    groups = (config, config.model, config.diffusion, config.train, config.sample, config.evaluate)
    for group in groups:
        for name, hint in get_type_hints(type(group)).items():
            _check_type(_flag(name), getattr(group, name), hint)
    model, diffusion, train, sample = config.model, config.diffusion, config.train, config.sample

    def require(ok: bool, name: str, problem: str, advice: str) -> None:
        if not ok:
            owner = next(group for group in groups if hasattr(group, name))
            raise UserError(f"{_flag(name)} {_show(getattr(owner, name))}: {problem}; {advice}")

    for name in ("channels", "blocks"):
        require(len(getattr(model, name)) == 3, name, "one value for each of 28, 14 and 7 pixels is needed",
                f"give three, such as {_flag(name)} {_show(getattr(ModelConfig(), name))}")
    require(all(1 <= c <= 4096 for c in model.channels), "channels", "a stage has at least 1 and at most 4096 channels",
            "give positive numbers")
    require(all(1 <= b <= 64 for b in model.blocks), "blocks", "a stage has at least 1 and at most 64 blocks",
            "give positive numbers")
    require(1 <= model.groups <= 4096, "groups", "at least one group is needed", "give a positive number")
    require(all(c % model.groups == 0 for c in model.channels), "channels",
            f"GroupNorm can't divide them into {model.groups} groups", f"use multiples of {model.groups}, or other --groups")
    require(set(model.attention) <= set(RESOLUTIONS), "attention", "attention is possible at 28, 14 and 7 pixels",
            "choose among these, or give no value for none")
    require(2 <= model.embedding <= 65536 and model.embedding % 2 == 0, "embedding", "it has to be even, 2 to 65536",
            "choose an even width such as 128")
    require(0 <= model.dropout < 1, "dropout", "it is a share of activations", "choose from 0 up to, not including, 1")

    lowest = 21 if diffusion.schedule == "linear" else 2
    require(lowest <= diffusion.timesteps <= 100_000, "timesteps",
            f"the {diffusion.schedule} schedule needs {lowest} to 100000 noise levels", "choose one in that range")

    require(0 <= model.refiner < diffusion.timesteps, "refiner", f"it takes noise levels below the last, {diffusion.timesteps}",
            "choose a smaller one, or 0 for none")

    require(1 <= train.epochs <= 10**7, "epochs", "a run has at least one epoch", "choose a positive number")
    require(train.minutes is None or 0 < train.minutes <= 10**6, "minutes", "a run takes a positive time",
            "choose a number above 0")
    require(1 <= train.batch_size <= 10**5, "batch_size", "a step has 1 to 100000 images", "choose one in that range")
    require(0 < train.lr <= 10, "lr", "a rate is above 0 and at most 10", f"try {TrainConfig().lr:g}")
    require(0 <= train.warmup <= 10**7, "warmup", "a number of steps can't be negative", "choose 0 or more")
    require(0 <= train.weight_decay <= 10, "weight_decay", "a decay is 0 to 10", "choose one in that range")
    require(train.grad_clip > 0, "grad_clip", "a norm is positive", "choose a number above 0, or inf for no clipping")
    require(0 <= train.ema < 1, "ema", "a decay is at least 0 and below 1", "choose 0 for no averaging")
    require(0 <= train.label_dropout <= 1, "label_dropout", "it is a share of images", "choose from 0 to 1")
    require(0 < train.refiner_share <= 1, "refiner_share", "it is a share of images", "choose one above 0, up to 1")
    require(model.refiner > 0 or train.refiner_share == TrainConfig.refiner_share, "refiner_share", "there is no refiner",
            "leave it out, or add --refiner 40")
    require(0 <= train.preview <= 1024, "preview", "a grid has 0 to 1024 images", "choose one in that range")

    require(sample.num_images is None or 1 <= sample.num_images <= 10**6, "num_images", "1 to 1000000 can be drawn",
            "choose one in that range")
    require(1 <= sample.steps <= 100_000, "steps", "at least one network evaluation is needed", "choose a positive number")
    require(0 <= sample.eta <= 1, "eta", "it is a share of DDPM's noise", "choose from 0 to 1")
    require(sample.eta == 0 or sample.sampler == "ddim", "eta", f"only ddim has it, not {sample.sampler}",
            "leave it out, or add --sampler ddim")
    require(sample.variance == "posterior" or sample.sampler == "ddpm", "variance",
            f"only ddpm has it, not {sample.sampler}", "leave it out, or add --sampler ddpm")
    require(0 <= sample.guidance <= 100, "guidance", "a scale is 0 to 100", "choose one in that range; 1 is off")
    digits = sample.digits
    require(digits is None or digits == "none" or re.fullmatch("[0-9]{1,10000}", digits) is not None, "digits",
            "only the digits 0 to 9 can be drawn", "write them without spaces, such as 0123456789, or none")
    require(digits != "none" or sample.guidance in (1, SampleConfig.guidance), "guidance",
            "guidance needs labels, and --digits none has none", "leave one of the two out")
    write = sample.write
    require(write is None or re.fullmatch(f"[0-9]{{1,{MAX_WRITTEN}}}", write) is not None, "write",
            f"only 1 to {MAX_WRITTEN} of the digits 0 to 9 can be written", "leave out all other characters")

    require(1 <= config.evaluate.seeds <= 1000, "seeds", "1 to 1000 seeds are possible", "choose one in that range")
    require(0 <= config.seed < 2**63, "seed", "a seed is 0 or more and below 2**63", "choose one in that range")
    name_ok = config.name is None or re.fullmatch(r"[\w][\w.-]{0,99}", config.name) is not None
    require(name_ok, "name", "a run is named by letters, digits, '_', '-' and '.', at most 100, first a letter or digit",
            "choose such a name")
    require(re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", config.device) is not None, "device", "there is no such device",
            "choose auto, cuda, cuda:1, mps or cpu")


def run_name(config: Config) -> str:
    """Name of the run's folders in checkpoints/ and results/."""
    return config.name or ("mnist" if config.dataset == "auto" else config.dataset)


def parse(argv: list[str]) -> Config:
    """Config from flags over the defaults above; raises UserError for a bad flag, SystemExit(0) after --help."""
    import contextlib
    import io

    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(tyro.conf.OmitArgPrefixes[Config], args=argv, prog="run.py", description=Config.__doc__)
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
        raise UserError(_one_line(said.getvalue())) from None
    validate(config)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dict of plain values, as checkpoints hold it."""
    return {f.name: _plain(getattr(config, f.name)) for f in fields(config)}


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """Inverse of `to_dict` for a config dataclass; raises UserError for an unknown, missing or mistyped field."""
    known = {f.name for f in fields(kind)}
    if not isinstance(values, dict) or set(values) != known:
        odd = sorted(map(str, known ^ set(values))) if isinstance(values, dict) else ["all"]
        raise UserError(f"the stored {kind.__name__} has missing or unknown fields ({', '.join(odd)}): "
                        "it was written by another version; use that version, or train again")
    hints, made = get_type_hints(kind), {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(hints[name], value)  # type: ignore[arg-type]
        elif get_origin(hints[name]) is tuple and isinstance(value, (list, tuple)):
            value = tuple(value)
        elif Path in (hints[name], *get_args(hints[name])) and isinstance(value, str):
            value = Path(value)
        _check_type(_flag(name), value, hints[name])
        made[name] = value
    return kind(**made)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else repr(value) if value == "" else str(value)


def _check_type(flag: str, value: Any, hint: Any) -> None:
    """A default edited in place passes no parser, so types are checked here too."""
    if dataclasses.is_dataclass(hint):
        ok = isinstance(value, hint)  # type: ignore[arg-type]
    elif get_origin(hint) is Literal:
        ok = value in get_args(hint)
    elif get_origin(hint) is tuple:
        ok = isinstance(value, tuple) and all(type(item) is int for item in value)
    else:
        kinds = get_args(hint) or (hint,)
        ok = any(type(value) is kind or isinstance(value, kind) and kind is Path for kind in kinds)
        if float in kinds and type(value) in (int, float):
            ok = not math.isnan(value)
    if not ok:
        wanted = "one of " + ", ".join(map(str, get_args(hint))) if get_origin(hint) is Literal else _type_name(hint)
        raise UserError(f"{flag} {value!r}: {wanted} is needed; see python run.py --help")


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "text", Path: "a path",
             type(None): "None"}
    if get_origin(hint) is tuple:
        return "a tuple of whole numbers"
    return " or ".join(names.get(kind, str(kind)) for kind in (get_args(hint) or (hint,)))


def _one_line(box: str) -> str:
    """The message out of tyro's box: title, message, advice; drawn with rules, or with dashes where there is no Unicode."""
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
