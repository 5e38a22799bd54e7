"""Settings: parsed from flags, checked against the limits in config.py, and stored in a checkpoint.

A knob that an older checkpoint lacks has its LEGACY value. Imports no torch, so that a wrong flag is answered at once.
"""

import contextlib
import functools
import io
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any, get_type_hints
from unittest import mock

import tyro
from pydantic import TypeAdapter, ValidationError

from config import Config, ModelConfig, OnlyFor, SampleConfig, UserError

EXAMPLES = """examples:
  python run.py --minutes 10 --name mine
      trains for ten minutes, then samples
  python run.py --mode sample --name mine --digits 7
      samples 256 sevens from that run"""
PATTERNS = {"digits": "give classes, such as 7 or 0123456789, or none", "write": "give a number of 1 to 64 digits",
            "name": "use up to 100 letters, digits, dots, dashes and underscores, not starting with a dot or dash",
            "device": "use auto, cpu, mps, cuda or cuda:N"}
ADAPTER = TypeAdapter(Config)
GROUPS = {part.name: part.type for part in fields(Config) if is_dataclass(part.type)}
KNOBS = {name: "" for name in Config.__dataclass_fields__ if name not in GROUPS} | {
    name: group for group, kind in GROUPS.items() for name in kind.__dataclass_fields__}  # name -> group
SWITCHES = {knob.name for group in GROUPS.values() for knob in fields(group) if knob.type is bool} | {"invert"}
STORED = ("dataset", "seed", "precision", "model", "diffusion", "train")  # what a checkpoint keeps of its config
# What the code did before a knob existed: its value for a checkpoint that lacks the knob, in place of the default.
LEGACY = {"model": {}, "diffusion": {}, "train": {"clip_loss": False, "focus": 0.0, "init": None}}
CHANGEABLE_ON_RESUME = ("epochs", "minutes", "preview", "deterministic", "fresh", "same_code", "precision")
NO_RECIPE = ("preview", "fresh", "same_code")  # settings that are no part of how a network is trained
# Which sampler has an option that not all have: knob -> sampler, as config.py marks it.
SAMPLER_OF = {name: mark.sampler for name, kind in get_type_hints(SampleConfig, include_extras=True).items()
              for mark in getattr(kind, "__metadata__", ()) if isinstance(mark, OnlyFor)}
# How images are sampled; the other fields of SampleConfig say which images.
SAMPLING = tuple(name for name in SampleConfig.__dataclass_fields__
                 if name not in ("num_images", "digits", "write", "checkpoint"))
# Folders of the project, no names of runs.
RESERVED = ("pretrained", "compare", "classifiers", "experiment", "picture-cache")
TRAINING = ("train", "experiment")  # the modes that train
# A flag that has no effect beside the second one, and in which modes.
EXCLUSIVE = (("name", "checkpoint", ("sample", "evaluate")), ("dataset", "checkpoint", ("sample",)),
             ("dataset", "name", ("sample",)), ("digits", "write", ("sample",)), ("num_images", "write", ("sample",)),
             ("epochs", "minutes", TRAINING))
# Knobs whose edited defaults yield, to these values, if one of these flags is given.
YIELDING = (("checkpoint", None, ("name", "dataset")), ("write", None, ("digits", "num_images")),
            ("minutes", None, ("epochs",)),
            *((name, getattr(SampleConfig, name), ("sampler",)) for name in SAMPLER_OF))
# The modes that use a knob, or all knobs of a group; what is not listed, all modes use.
USED_BY = {"model": TRAINING, "diffusion": TRAINING, "train": TRAINING, "preview": ("train",), "fresh": ("train",),
           "same_code": ("train",), "runs": ("compare",), "change": ("experiment",), "trainings": ("experiment",),
           "name": ("train", "sample", "evaluate"), "write": ("sample",), "checkpoint": ("sample", "evaluate"),
           **dict.fromkeys(("data_dir", "invert"), ("train", "evaluate", "compare", "experiment")), "compile": TRAINING}


def parse(argv: list[str], defaults: Config | None = None) -> Config:
    """Config from the flags; a knob without a flag has the default given here, else the one above.

    Raises UserError for a bad flag and for one that has no effect, SystemExit(0) after --help.
    """
    argv = _changes(_switches(argv))
    cli = functools.partial(tyro.cli, tyro.conf.OmitArgPrefixes[tyro.conf.DisallowNone[Config]], args=argv,
                            prog="run.py", description=Config.__doc__, default=defaults or Config())
    output = io.StringIO()  # no terminal, for which tyro would colour its text; COLUMNS: nor fold it
    try:
        with mock.patch.dict(os.environ, COLUMNS="10000"), contextlib.redirect_stdout(output), \
                contextlib.redirect_stderr(output):
            config = cli()
    except SystemExit as stop:
        if stop.code != 0:
            raise UserError(_message(output.getvalue())) from None
        width = max(40, shutil.get_terminal_size().columns)  # in five columns tyro's text has no end
        with mock.patch.dict(os.environ, COLUMNS=str(width)), contextlib.suppress(SystemExit):
            cli()  # --help, as this terminal shows it
        print(EXAMPLES)
        raise
    names = given(argv)
    for name in names:
        modes = USED_BY.get(name, USED_BY.get(KNOBS[name], (config.mode,)))
        if config.mode not in modes:
            decided = KNOBS[name] in STORED and name not in CHANGEABLE_ON_RESUME
            why = "the checkpoint's own settings decide it" if decided else f"it is for --mode {_and(modes)}"
            if (name, config.mode) == ("checkpoint", "train"):
                why = f"--init says which weights training starts from; {why}"
            raise UserError(f"{_flag(name)}: --mode {config.mode} does not use it, since {why}; leave it out")
    for name, deciding, modes in EXCLUSIVE:
        if name in names and deciding in names and config.mode in modes:
            raise UserError(f"{_flag(name)}: it has no effect beside {_flag(deciding)}; leave one of the two out")
    network = next((name for name in names if KNOBS[name] == "model"), None)
    if network and config.train.init is not None:
        raise UserError(f"{_flag(network)}: it has no effect beside --init, whose checkpoint decides the network; "
                        "leave one of the two out")
    if "data_dir" in names and config.dataset == "generated":
        raise UserError("--data-dir: it has no effect, since the generated digits ship with the project; leave it out, "
                        "or choose another --dataset")
    yielding: Any = {name: value for name, value, flags in YIELDING if name not in names and set(names) & set(flags)}
    if config.mode == "experiment" and defaults is None and "guidance" not in names:
        yielding["guidance"] = 1.0  # it is about the networks; guidance hides a part of how they differ
    if config.sample.guidance == 1 and "guidance" in names and "guidance_interval" not in names:
        yielding["guidance_interval"] = SampleConfig.guidance_interval  # given for all, and of no use to this one
    parts = {group: replace(getattr(config, group), **{
        name: value for name, value in yielding.items() if KNOBS[name] == group}) for group in GROUPS}
    return validate(replace(config, **parts))


def _switches(argv: list[str]) -> list[str]:
    """The flags with --fresh=False, or --fresh False, as sweep tools write it, as --no-fresh."""
    words: list[str] = []
    for word in argv:
        if word.lower() in ("true", "false") and words and _knob(words[-1]) in SWITCHES:
            word = f"{words.pop()}={word}"
        flag, equals, value = word.partition("=")
        if equals and (name := _knob(flag).removeprefix("no_")) in SWITCHES:
            on, off = _flag(name), _flag(f"no_{name}")
            if _knob(flag) != name or value.lower() not in ("true", "false"):
                raise UserError(f"{word}: write {on} or {off}")
            word = on if value.lower() == "true" else off
        words.append(word)
    return words


def _changes(argv: list[str]) -> list[str]:
    """The flags with `--change A B` as `--change=A --change=B`, since tyro takes what has dashes for a flag.

    The word after --change is a change, and so is each further one that has dashes and a space. Raises UserError for a
    switch after them, which may be a change or a flag for all.
    """
    words: list[str] = []
    before = ""
    for word in argv:
        changes = before.startswith("--change=") and not word.startswith("--change")
        if before == "--change" or changes and word.startswith("--") and " " in word:
            word = f"--change={word}"
        elif changes and _knob(word).removeprefix("no_") in SWITCHES:
            raise UserError(f"{word}: write --change before it if it is a change; if it is for all trainings, put it "
                            "before --change")
        words += [word] if word != "--change" else []
        before = word
    return words + ["--change"] * (before == "--change")  # without a value, which tyro says


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
    for name, sampler in SAMPLER_OF.items():
        value = getattr(sample, name)
        require(value == getattr(SampleConfig, name) or sample.sampler == sampler, _flag(name), value,
                f"only {sampler} has it, not {sample.sampler}; leave it out, or add --sampler {sampler}")
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
    saved, known = flat(values), flat(stored(Config()))
    if unknown := sorted(saved.keys() - known.keys()):
        raise UserError(f"it has settings that this version does not know ({', '.join(map(repr, unknown)):.200}): "
                        "use the version that wrote it, or train again")
    config = validate(_checked(values | {group: LEGACY[group] | values.get(group, {}) for group in LEGACY}))
    now = flat(stored(config))
    return config, [f"{name.replace('_', '-')} {_show(now[name])}" for name in known
                    if name not in saved and name not in CHANGEABLE_ON_RESUME]


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


def differences(before: dict[str, Any], now: dict[str, Any],
                skipped: Sequence[str] = CHANGEABLE_ON_RESUME) -> list[tuple[str, str, str]]:
    """The stored settings that differ, but for the skipped ones: name, value before, value now."""
    before, now = flat(before), flat(now)
    return [(name.replace("_", "-"), _show(before.get(name, "unknown")), _show(now.get(name, "unknown")))
            for name in {**before, **now} if name not in skipped and before.get(name) != now.get(name)]


def flat(values: Any) -> dict[str, Any]:
    """Values by knob, without the groups, since all names differ. Raises UserError for anything but settings."""
    if not isinstance(values, dict) or not all(isinstance(values.get(name, {}), dict) for name in GROUPS):
        raise UserError("its settings are not as this project stores them; use another file, or train again")
    inner = {name: value for group in GROUPS for name, value in values.get(group, {}).items()}
    return {name: value for name, value in values.items() if name not in GROUPS} | inner


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _and(words: tuple[str, ...]) -> str:
    return " and ".join(", ".join(words).rsplit(", ", 1))


def _knob(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _plain(config: Config) -> dict[str, Any]:
    """Nested dict of the plain values that JSON has; inf stays."""
    return json.loads(json.dumps(asdict(config), default=lambda value: value.tolist() if hasattr(value, "tolist") else
                                 str(value)))  # numpy's numbers, from a script, and paths


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


def _message(text: str) -> str:
    """The message in tyro's plain text, which has a title, the message, advice and a footer between rules of dashes."""
    _, message, *advice, _ = (part.strip() for part in re.split("(?m)^ *-+ *$", text))
    options = re.findall("(?m)^ *(--[a-z-]+)(.*)", "\n".join(advice))
    message = message.split("\n")[0].rstrip(".")
    hint = ""
    if mode := re.fullmatch("Unrecognized options: (train|sample|evaluate|compare|experiment)", message):
        hint = f" Perhaps you meant --mode {mode[1]}."
    elif options and message.startswith("Unrecognized"):
        hint = f" Perhaps you meant {options[0][0]}."
    elif options and message.startswith("Error parsing"):  # what follows is Python's, about types
        message = f"Error parsing {options[0][0]}: it takes{options[0][1]}".rstrip()
    return f"{message}.{hint} See python run.py --help"
