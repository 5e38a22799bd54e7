"""Every knob on one line: type, limits, default, help. Edit a default here, or pass the flag of the same name.

Owns the frozen config dataclasses, the few rules between knobs, the part of a config that a checkpoint keeps, and
`UserError`. Imports no torch, so that a wrong flag is answered at once. `python run.py --help` lists every knob.
"""

import contextlib
import functools
import io
import json
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic import StringConstraints, TypeAdapter, ValidationError

ROOT = Path(__file__).resolve().parent  # where the code and what ships with it lie


class UserError(Exception):
    """A failure that the user can fix: one line that names the thing, what is wrong with it, and what to do."""

    def __str__(self) -> str:  # names in a damaged file may hold anything, line ends too
        return "".join(letter if letter.isprintable() else "?" for letter in super().__str__())


UNSET: Any = tyro.conf.arg(help_behavior_hint="")  # no "(default: None)" in --help
Channels = Annotated[int, Ge(1), Le(4096)]
Blocks = Annotated[int, Ge(1), Le(64)]
Share = Annotated[float, Ge(0), Le(1)]
Labels = Annotated[Annotated[str, StringConstraints(pattern="^(none|[0-9]{1,10000})$")] | None, UNSET]
Number = Annotated[Annotated[str, StringConstraints(pattern="^[0-9]{1,64}$")] | None, UNSET]
RunName = Annotated[Annotated[str, StringConstraints(pattern=r"^\w[\w.-]{0,99}$")] | None, UNSET]
OptionalPath = Annotated[Path | None, UNSET]
Device = Annotated[str, StringConstraints(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
Precision = Literal["auto", "fp32", "bf16"]
EXAMPLES = """examples:
  python run.py --minutes 10 --name mine              trains for ten minutes, then samples
  python run.py --mode sample --name mine --digits 7  samples 256 sevens from that run"""
PATTERNS = {"digits": "give classes, such as 7 or 0123456789, or none", "write": "give a number of 1 to 64 digits",
            "name": "use up to 100 letters, digits, dots, dashes and underscores, not starting with a dot or dash",
            "device": "use auto, cpu, mps, cuda or cuda:N"}


@dataclass(frozen=True)
class ModelConfig:
    """For mode train (other modes take them from the checkpoint): the U-Net, with stages at 28, 14 and 7 pixels."""

    channels: tuple[Channels, Channels, Channels] = (16, 32, 64)  # channels at 28, 14 and 7 pixels
    blocks: tuple[Blocks, Blocks, Blocks] = (1, 2, 2)  # residual blocks per stage, down and again up
    attention: Annotated[tuple[Literal[28, 14, 7], ...], UNSET] = ()  # resolutions with self-attention; unset: none
    embedding: Annotated[int, Ge(2), Le(65536), MultipleOf(2)] = 128  # width of the embedding of time and label
    groups: Annotated[int, Ge(1), Le(4096)] = 4  # groups of each GroupNorm; has to divide every channel count
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0  # share of activations dropped inside residual blocks


@dataclass(frozen=True)
class DiffusionConfig:
    """For mode train (other modes take them from the checkpoint): noise schedule, prediction target and loss."""

    timesteps: Annotated[int, Ge(2), Le(100_000)] = 1000  # T: number of noise levels
    schedule: Literal["cosine", "linear"] = "cosine"  # cosine (arXiv 2102.09672) or linear (2006.11239)
    prediction: Literal["v", "noise", "x0"] = "v"  # what the network predicts
    weighting: Literal["none", "min-snr", "snr"] = "none"  # x0's error times SNR or min(SNR, 5); none: plain


@dataclass(frozen=True)
class TrainConfig:
    """For mode train: the length of a run and how the weights are learned."""

    epochs: Annotated[int, Ge(1), Le(10**7)] = 100  # passes over the training images
    minutes: Annotated[float | None, Gt(0), Le(10**6), UNSET] = None  # minutes of training steps, in place of epochs
    batch_size: Annotated[int, Ge(1), Le(10**5)] = 64  # images per step, over all processes together
    lr: Annotated[float, Gt(0), Le(10)] = 2e-3  # peak learning rate
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"  # decay to zero over the run, or none
    warmup: Annotated[int, Ge(0), Le(10**7)] = 100  # steps over which the learning rate rises from zero
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: Muon for inner convolutions, AdamW for the rest
    weight_decay: Annotated[float, Ge(0), Le(10)] = 0.05  # decoupled weight decay, times the learning rate
    grad_clip: Annotated[float, Gt(0)] = 1.0  # largest norm of the gradient; inf: no clipping
    ema: Annotated[float, Ge(0), Lt(1)] = 0.999  # decay of the averaged weights per step, warmed up; 0: no averaging
    clip_loss: bool = True  # no loss where the predicted x0 overshoots black or white
    focus: Annotated[float, Ge(0), Lt(1)] = 0.7  # share of a batch drawn from alpha_bar 0.1 to 0.65
    label_dropout: Share = 0.05  # share of images trained without their label
    preview: Annotated[int, Ge(0), Le(1024)] = 64  # images in each preview grid during training; 0: none
    deterministic: bool = True  # on a GPU too, a seed gives the same weights, bit for bit; it may cost some speed
    fresh: bool = False  # start over; old checkpoints and results are kept in old1/, old2/, ...
    same_code: bool = False  # continue a run although the code changed: safe for comments and renames


@dataclass(frozen=True)
class SampleConfig:
    """For modes sample, evaluate and compare, and for train at its end: how images are sampled."""

    num_images: Annotated[int | None, Ge(1), Le(10**6), UNSET] = None  # unset: 256; to measure: up to 10000
    sampler: Literal["ddpm", "ddim", "dpmpp", "sa"] = "sa"  # DDPM, DDIM, DPM-Solver++ or SA-Solver
    steps: Annotated[int, Ge(1), Le(100_000)] = 13  # sampling steps; one network evaluation each, two where guided
    spacing: Literal["trailing", "eased"] = "eased"  # of the timesteps: even, or closer together at both ends
    eta: Share = 0.0  # ddim: noise added in each step, 0 (none) to 1 (as ddpm)
    variance: Literal["posterior", "upper"] = "posterior"  # ddpm: beta-tilde or beta (2006.11239, section 3.2)
    guidance: Annotated[float, Ge(0), Le(100)] = 2.1  # x0 = free + guidance * (labelled - free) (2207.12598); 1: off
    guidance_interval: tuple[Share, Share] = (0.34, 0.57)  # alpha_bar where guidance acts (2404.07724); 0 1: all
    digits: Labels = None  # classes to sample, cycled ("7", "0123456789"), or none; unset: all, equally often
    write: Number = None  # a number, such as 20261123, written in one row of digits to number.png
    checkpoint: OptionalPath = None  # file to sample from, or pretrained; unset: the run mnist, else pretrained


@dataclass(frozen=True)
class Config:
    """Train a small diffusion model of handwritten digits, sample from it, and measure it."""

    mode: Literal["train", "sample", "evaluate", "compare"] = "train"  # what `python run.py` does
    name: RunName = None  # name of the run, in checkpoints/ and results/; unset, in training: the data set's name
    # auto: the checkpoint's data set, else mnist, or offline the generated digits; idx: four files in --data-dir
    dataset: Literal["auto", "mnist", "fashion-mnist", "kmnist", "generated", "idx"] = "auto"
    data_dir: OptionalPath = None  # folder that holds mnist/MNIST/raw, or the four IDX files; unset: dataset/
    # compare: two sides, each a run, a file, pretrained, or trainings a,b,c; its own sampling flags in its quotes
    runs: Annotated[tuple[str, str] | None, tyro.conf.arg(metavar="A B", help_behavior_hint="")] = None
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0  # every random number follows from it
    device: Device = "auto"  # cuda, cuda:1, mps, cpu, or auto: the first of these that is available
    precision: Precision = "auto"  # auto: bf16 on GPUs, and in training steps on CPUs that are fast at it; else fp32
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile, and CUDA graphs; auto: only on CUDA
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)


ADAPTER = TypeAdapter(Config)
GROUPS = {part.name: part.type for part in fields(Config) if is_dataclass(part.type)}
KNOBS = {name: "" for name in Config.__dataclass_fields__ if name not in GROUPS} | {
    name: group for group, kind in GROUPS.items() for name in kind.__dataclass_fields__}  # name -> group
STORED = ("dataset", "seed", "precision", "model", "diffusion", "train")  # what a checkpoint keeps of its config
# What the code did before a knob existed: its value for a checkpoint that lacks the knob, in place of the default.
LEGACY = {"model": {}, "diffusion": {}, "train": {"clip_loss": False, "focus": 0.0}}
FREE = ("epochs", "minutes", "preview", "deterministic", "fresh", "same_code")  # may differ when a run is continued
SAMPLING = ("sampler", "steps", "spacing", "eta", "variance", "guidance", "guidance_interval")  # sampling options
RESERVED = ("pretrained", "shipped", "compare", "classifiers")  # folders of the project, not names for runs
EXCLUSIVE = (("name", "checkpoint"), ("digits", "write"), ("num_images", "write"), ("epochs", "minutes"))  # one decides
# Knobs whose edited defaults yield, to these values, if one of these flags is given.
YIELDING = (("checkpoint", None, ("name", "dataset")), ("write", None, ("digits", "num_images")),
            ("eta", 0.0, ("sampler",)), ("variance", "posterior", ("sampler",)), ("minutes", None, ("epochs",)))
# The modes that use a knob, or all knobs of a group; what is not listed, all modes use.
USED_BY = {"model": ("train",), "diffusion": ("train",), "train": ("train",), "runs": ("compare",),
           "name": ("train", "sample", "evaluate"), "write": ("sample",), "checkpoint": ("sample", "evaluate")}


def parse(argv: list[str], defaults: Config | None = None) -> Config:
    """Config from the flags; a knob without a flag has the default given here, else the one above.

    Raises UserError for a bad flag and for one that the mode does not use, SystemExit(0) after --help.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            config = tyro.cli(tyro.conf.OmitArgPrefixes[tyro.conf.DisallowNone[Config]], args=argv, prog="run.py",
                              description=Config.__doc__, default=defaults or Config())
    except SystemExit as stop:
        if stop.code == 0:  # --help
            print(EXAMPLES)
            raise
        raise UserError(_one_line(box.getvalue())) from None
    names = given(argv)
    for name, other in EXCLUSIVE:
        if name in names and other in names:
            raise UserError(f"{_flag(name)}: it has no effect beside {_flag(other)}; leave one of the two out")
    for name in names:
        modes = USED_BY.get(name, USED_BY.get(KNOBS[name], (config.mode,)))
        if config.mode not in modes:
            why = ("the checkpoint's own settings decide it" if modes == ("train",) and name not in FREE else
                   f"it is for --mode {' and '.join(modes)}")
            raise UserError(f"{_flag(name)}: --mode {config.mode} does not use it, since {why}; leave it out")
    yielding: Any = {name: value for name, value, flags in YIELDING if name not in names and set(names) & set(flags)}
    parts = {group: replace(getattr(config, group), **{
        name: value for name, value in yielding.items() if KNOBS[name] == group}) for group in GROUPS}
    return validate(replace(config, **parts))


def given(argv: list[str]) -> list[str]:
    """Names of the knobs whose flags are in argv; edited defaults are not flags."""
    flags = {match[1].replace("-", "_") for word in argv if (match := re.match("--([a-z][a-z_-]*)(=|$)", word))}
    return [name for name in KNOBS if name in flags or f"no_{name}" in flags]


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
    low, high = sample.guidance_interval
    require(low < high, "--guidance-interval", sample.guidance_interval, "the first has to be below the second")
    require(sample.digits != "none" or sample.guidance in (1, SampleConfig.guidance), "--guidance", sample.guidance,
            "guidance needs labels, and --digits none has none; leave one of the two out")
    require(sample.guidance_interval == SampleConfig.guidance_interval or sample.guidance != 1 and
            sample.digits != "none", "--guidance-interval", sample.guidance_interval, "nothing is guided; leave it out")
    require((config.name or "").casefold() not in RESERVED, "--name", config.name,
            "the project itself uses this name for a folder; choose another")
    return config


def stored(config: Config) -> dict[str, Any]:
    """What a checkpoint keeps: the settings that decide training and the network, as plain values."""
    return {name: value for name, value in _plain(config).items() if name in STORED}


def training_settings(values: Any) -> tuple[Config, list[str]]:
    """Inverse of `stored`: the config, and a list of the knobs that an older checkpoint lacks, with their values.

    A missing knob has its LEGACY value, else its default. Raises UserError for anything but such settings.
    """
    theirs, ours = flat(values), flat(stored(Config()))
    if unknown := sorted(theirs.keys() - ours.keys()):
        raise UserError(f"it has settings that this version does not know ({', '.join(map(repr, unknown)):.200}): "
                        "use the version that wrote it, or train again")
    config = validate(_checked(values | {group: LEGACY[group] | values.get(group, {}) for group in LEGACY}))
    now = flat(stored(config))
    return config, [f"{name.replace('_', '-')} {_show(now[name])}" for name in ours
                    if name not in theirs and name not in FREE]


def network_settings(values: Any) -> tuple[ModelConfig, str]:
    """What sampling needs of stored settings: those of the network and the prediction type; raises UserError."""
    flat(values)  # raises unless they are settings
    network = LEGACY["model"] | values.get("model", {})
    if unknown := sorted(network.keys() - ModelConfig.__dataclass_fields__.keys()):
        raise UserError("its network has settings that this version does not know "
                        f"({', '.join(map(repr, unknown)):.200}): use the version that wrote it, or train again")
    prediction = values.get("diffusion", {}).get("prediction", "v")
    config = validate(_checked({"model": network, "diffusion": {"prediction": prediction}}))
    return config.model, config.diffusion.prediction


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The stored settings that decide training and differ: name, value before, value now."""
    one, other = flat(before), flat(now)
    return [(name.replace("_", "-"), _show(one.get(name, "unknown")), _show(other.get(name, "unknown")))
            for name in {**one, **other} if name not in FREE and one.get(name) != other.get(name)]


def flat(values: Any) -> dict[str, Any]:
    """Values by knob, without the groups, since all names differ. Raises UserError for anything but settings."""
    if not isinstance(values, dict) or not all(isinstance(values.get(name, {}), dict) for name in GROUPS):
        raise UserError("its settings are not as this project stores them; use another file, or train again")
    inner = {name: value for group in GROUPS for name, value in values.get(group, {}).items()}
    return {name: value for name, value in values.items() if name not in GROUPS} | inner


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _plain(config: Config) -> dict[str, Any]:
    """Nested dict of the plain values that JSON has; inf stays."""
    return json.loads(json.dumps(asdict(config), default=str))


def _checked(values: dict[str, Any]) -> Config:
    """A Config of plain values, checked strictly against its annotations: "3" is not a number, and True is not 1."""
    try:
        return ADAPTER.validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":  # a file name with bytes that are not UTF-8
            name, value = next((name, value) for name, value in flat(values).items()
                               if re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)))
            raise UserError(f"{_flag(name)} {_show(value)}: this is not UTF-8 text; rename it") from None
        names = [part for part in first["loc"] if isinstance(part, str)][:2 if first["loc"][0] in GROUPS else 1]
        value = functools.reduce(lambda inner, name: inner[name], names, values)
        problem = PATTERNS.get(names[-1], f"{first['msg'][:1].lower()}{first['msg'][1:]}; see python run.py --help")
        raise UserError(f"{_flag(names[-1])} {_show(value)}: {problem}") from None


def _show(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if text and text.isprintable() and len(text) < 200 else f"{text!r:.200}"


def _one_line(box: str) -> str:
    """The message in tyro's box, which holds a title, the message and advice, between rules or, in ASCII, dashes."""
    lines = [line.strip("│| ") for line in box.splitlines()[1:]]
    text = "\n".join(line if set(line) - set("─-╰╯") else "" for line in lines).strip()
    message, *advice = (" ".join(part.split()) for part in text.split("\n\n"))
    message = message.rstrip(".")
    options = re.findall("--(?!help)[a-z-]+", " ".join(advice))
    if mode := re.fullmatch("Unrecognized options: (train|sample|evaluate|compare)", message):
        return f"{message}. Perhaps you meant --mode {mode[1]}. See python run.py --help"
    hint = f" Perhaps you meant {options[0]}." if message.startswith("Unrecognized") and options else ""
    return f"{message}.{hint} See python run.py --help"
