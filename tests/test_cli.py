"""The command line: bad input gets one line and status 2, at once; --help lists every field; defaults can be edited."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch

import config as configs
from config import Config, SampleConfig, TrainConfig, UserError
from run import main
from sample import load_checkpoint, make_request, sample_images
from support import checkpoint, idx, loading, selection, settings
from support.runtime import Runtime
from tests.conftest import ROOT

CPU = Runtime(torch.device("cpu"), bf16=False, compile=False)

# Flags, and a piece of the one line that answers them.
BAD_FLAGS = [
    (["--mode", "sampel"], "--mode"),
    (["--mode"], "--mode"),
    (["--mode", ""], "--mode"),
    (["train"], "Perhaps you meant --mode train."),
    (["sample"], "Perhaps you meant --mode sample."),
    (["--moode", "train"], "--mode"),
    (["--epochs", "ten"], "--epochs"),
    (["--epochs", "1.5"], "--epochs"),
    (["--epochs", "0"], "--epochs 0"),
    (["--epochs", "-3"], "--epochs -3"),
    (["--minutes", "0"], "--minutes 0"),
    (["--minutes", "-1"], "--minutes -1"),
    (["--minutes", "nan"], "--minutes"),
    (["--minutes", "soon"], "--minutes"),
    (["--batch-size", "0"], "--batch-size 0"),
    (["--batch-size", "1000000"], "--batch-size"),
    (["--lr", "0"], "--lr 0"),
    (["--lr", "-1e-3"], "--lr"),
    (["--lr", "nan"], "--lr"),
    (["--lr", "inf"], "--lr inf"),
    (["--lr-schedule", "step"], "--lr-schedule"),
    (["--warmup", "-1"], "--warmup -1"),
    (["--weight-decay", "-0.1"], "--weight-decay"),
    (["--grad-clip", "0"], "--grad-clip 0"),
    (["--ema", "1"], "--ema 1"),
    (["--ema", "-0.1"], "--ema -0.1"),
    (["--label-dropout", "1.1"], "--label-dropout 1.1"),
    (["--focus", "-0.1"], "--focus -0.1"),
    (["--optimizer", "sgd"], "--optimizer"),
    (["--preview", "-1"], "--preview -1"),
    (["--channels", "0", "32", "64"], "--channels 0 32 64"),
    (["--channels", "16", "32"], "--channels"),
    (["--channels", "16", "30", "64"], "GroupNorm"),
    (["--channels", "a", "b", "c"], "--channels"),
    (["--blocks", "0", "1", "1"], "--blocks 0 1 1"),
    (["--blocks", "1"], "--blocks"),
    (["--attention", "8"], "--attention"),
    (["--embedding", "0"], "--embedding 0"),
    (["--embedding", "33"], "--embedding 33"),
    (["--groups", "0"], "--groups 0"),
    (["--groups", "7"], "--channels"),
    (["--dropout", "1"], "--dropout 1"),
    (["--timesteps", "0"], "--timesteps 0"),
    (["--timesteps", "20", "--schedule", "linear"], "--timesteps 20"),
    (["--timesteps", "1000000"], "--timesteps 1000000"),
    (["--schedule", "quadratic"], "--schedule"),
    (["--prediction", "epsilon"], "--prediction"),
    (["--weighting", "p2"], "--weighting"),
    (["--steps", "0"], "--steps 0"),
    (["--steps", "-5"], "--steps -5"),
    (["--steps", "1e1"], "--steps"),
    (["--sampler", "euler"], "--sampler"),
    (["--eta", "0.5"], "only ddim"),
    (["--sampler", "ddim", "--eta", "1.5"], "--eta 1.5"),
    (["--variance", "upper"], "only ddpm"),
    (["--guidance", "-1"], "--guidance -1"),
    (["--guidance", "2", "--digits", "none"], "--guidance 2"),
    (["--guidance-interval", "450", "600"], "--guidance-interval 450.0 600.0"),
    (["--guidance-interval", "0.6", "0.3"], "--guidance-interval 0.6 0.3"),
    (["--spacing", "even"], "--spacing"),
    (["--digits", "12a"], "--digits 12a: give classes, such as 7 or 0123456789, or none"),
    (["--digits", ""], "--digits"),
    (["--digits", "1 2"], "--digits 1 2"),
    (["--mode", "sample", "--write", "3.14"], "--write 3.14: give a number of 1 to 64 digits"),
    (["--mode", "sample", "--write", ""], "--write"),
    (["--mode", "sample", "--write", "1" * 65], "--write"),
    (["--num-images", "0"], "--num-images 0"),
    (["--num-images", "many"], "--num-images"),
    (["--seed", "-1"], "--seed -1"),
    (["--seed", str(2**63)], "--seed"),
    (["--seed", "x"], "--seed"),
    (["--name", "a/b"], "--name a/b"),
    (["--name", ".."], "--name .."),
    (["--name", ""], "--name"),
    (["--name", "a" * 101], "--name"),
    (["--name", "pretrained"], "--name pretrained"),
    (["--name", "Pretrained"], "--name Pretrained"),
    (["--name", "experiment"], "--name experiment"),
    (["--name", os.fsdecode(b"a\xff")], "is not UTF-8"),
    (["--mode", "sample", "--checkpoint", os.fsdecode(b"a\xff")], "is not UTF-8"),
    (["--mode", "compare", "--runs", "a", os.fsdecode(b"\xff")], "is not UTF-8"),
    (["--data-dir", os.fsdecode(b"\xff")], "is not UTF-8"),
    (["--grad-clip", "nan"], "--grad-clip nan"),
    (["--device", "tpu"], "--device tpu"),
    (["--device", "cuda:x"], "--device cuda:x"),
    (["--device", "cuda:01"], "--device cuda:01: use auto, cpu, mps, cuda or cuda:N"),
    (["--device", "cuda:128"], "--device cuda:128"),
    (["--precision", "fp8"], "--precision"),
    (["--compile", "maybe"], "--compile"),
    (["--dataset", "cifar"], "--dataset"),
    (["--fresh", "maybe"], "maybe"),
    (["--fresh=maybe"], "--fresh=maybe: write --fresh or --no-fresh"),
    (["--no_clip_loss=True"], "--no_clip_loss=True: write --clip-loss or --no-clip-loss"),
    (["--sweep=3"], "Unrecognized options: --sweep=3. See"),
    (["--name", "a" * 300, "stray" * 60], f"Unrecognized options: {'stray' * 60}. See"),
    (["--runs", "a"], "--runs: it takes A B. See"),
    (["--checkpoint", "pretrained", "--name", "ft"], "--init says which weights training starts from"),
    (["--dataset", "generated", "--data-dir", "x"], "--data-dir: it has no effect"),
]


def one_line(text: str) -> str:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    return lines[0]


@pytest.mark.parametrize("flags, said", BAD_FLAGS,
                         ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "")
def test_bad_flag_is_answered_in_one_line(flags: list[str], said: str, own_folder: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    output = capsys.readouterr()
    line = one_line(output.err)
    assert line.startswith("error: ") and said in line
    assert not output.out and not list(own_folder.iterdir())


def test_bad_flag_is_answered_before_torch_is_imported() -> None:
    code = "import sys, run; status = run.main(['--steps', '0']); sys.exit(status if 'torch' not in sys.modules else 3)"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2 and "--steps 0" in one_line(process.stderr)


def test_real_process_gives_status_2_and_no_traceback() -> None:
    process = subprocess.run([sys.executable, "run.py", "--mode", "sampel"], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2 and one_line(process.stderr).startswith("error: ") and not process.stdout


def in_terminal(flags: list[str], columns: int, **environment: str) -> tuple[int, str]:
    """The exit status, and what is seen in a terminal of that width, where standard output is one too."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen([sys.executable, "run.py", *flags], cwd=ROOT, stdin=end, stdout=end, stderr=end,
                               env={**inherited, "TERM": "xterm-256color", **environment})
    os.close(end)
    output, watchdog = b"", threading.Timer(60, process.kill)
    watchdog.start()
    with contextlib.suppress(OSError):  # of a terminal whose last process is gone
        while piece := os.read(terminal, 1 << 16):
            output += piece
    os.close(terminal)
    status = process.wait()
    watchdog.cancel()
    return status, output.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("flags, line", [
    (["--sampler", "heun"], "error: invalid choice 'heun' for argument '--sampler'. Expected one of "
                            "('ddpm', 'ddim', 'dpmpp', 'sa'). See python run.py --help\n"),
    (["--moode", "train"], "error: Unrecognized options: --moode, train. Perhaps you meant --mode. See python run.py "
                           "--help\n"),
    (["--mode"], "error: Missing value for argument '--mode'. Expected 1 values. See python run.py --help\n"),
    (["sample"], "error: Unrecognized options: sample. Perhaps you meant --mode sample. See python run.py --help\n"),
    (["--steps", "ten"], "error: Error parsing --steps: it takes INT. See python run.py --help\n")])
def test_a_bad_flag_is_answered_in_plain_text_in_a_terminal(flags: list[str], line: str) -> None:
    """However wide the terminal is, and whether colours are forced or not."""
    for columns, forced in ((80, {}), (9, {"FORCE_COLOR": "1", "CLICOLOR_FORCE": "1"})):
        status, said = in_terminal(flags, columns, **forced)
        assert (status, " ".join(said.split())) == (2, line.strip())


def test_help_ends_in_a_terminal_of_any_width() -> None:
    """In up to five columns tyro's text had no end, and filled the memory."""
    for columns in (1, 5, 80):
        status, text = in_terminal(["--help"], columns)
        assert status == 0 and "--guidance-interval" in text and text.endswith("from that run\n")


@pytest.mark.parametrize("flags, expected", [
    (["--clip_loss=False", "--fresh=true"], (False, True)), (["--clip-loss", "False", "--steps", "3"], (False, False)),
    (["--clip_loss=True", "--fresh", "FALSE"], (True, False)), (["--no-clip-loss", "--fresh"], (False, True))])
def test_switches_as_sweep_tools_write_them(flags: list[str], expected: tuple[bool, bool]) -> None:
    train = settings.parse(flags).train
    assert (train.clip_loss, train.fresh) == expected


def test_help_lists_every_field_with_its_default() -> None:
    process = subprocess.run([sys.executable, "run.py", "--help"], cwd=ROOT, capture_output=True, text=True,
                             env={**os.environ, "COLUMNS": "200"})
    assert process.returncode == 0
    for group in (Config, *(f.default_factory for f in dataclasses.fields(Config)
                            if f.default_factory is not dataclasses.MISSING)):
        for field in dataclasses.fields(group):
            if not dataclasses.is_dataclass(field.type) and field.default is not dataclasses.MISSING:
                assert f"--{field.name.replace('_', '-')}" in process.stdout
    for unclear in ("None", "(default: )", "{STR"):
        assert unclear not in process.stdout
    for group in settings.GROUPS.values():
        assert " ".join(group.__doc__.split())[:50] in " ".join(process.stdout.split())
    examples = re.findall("^  python run.py (.*)$", process.stdout.split("examples:")[1], re.MULTILINE)
    assert len(examples) == 2
    for example in examples:
        settings.parse(example.split())


def test_flags_override_defaults_and_keep_the_rest() -> None:
    config = settings.parse(["--num-images", "64", "--seed", "3", "--channels", "8", "16", "24", "--attention"])
    assert (config.mode, config.sample.num_images, config.seed) == ("train", 64, 3)
    assert config.model.channels == (8, 16, 24) and config.model.attention == ()
    assert config.train == Config().train


# Which mode uses which flag

A_FLAG_OF_EACH_GROUP = {"--channels": ["8", "8", "8"], "--schedule": ["linear"], "--prediction": ["noise"],
                        "--weighting": ["snr"], "--lr": ["0.1"], "--no-clip-loss": [], "--epochs": ["3"],
                        "--fresh": [], "--same-code": [], "--steps": ["3"], "--guidance": ["2"], "--digits": ["7"],
                        "--num-images": ["9"], "--write": ["7"], "--checkpoint": ["x"], "--runs": ["a", "b"],
                        "--name": ["x"], "--dataset": ["kmnist"], "--data-dir": ["x"], "--seed": ["1"],
                        "--device": ["cpu"], "--precision": ["fp32"], "--compile": ["off"]}
TRAINING = {"--channels", "--schedule", "--prediction", "--weighting", "--lr", "--no-clip-loss", "--epochs", "--fresh",
            "--same-code", "--compile"}
REFUSED = {"train": {"--write", "--checkpoint", "--runs"}, "sample": TRAINING | {"--runs", "--data-dir"},
           "evaluate": TRAINING | {"--write", "--runs"},
           "compare": TRAINING | {"--name", "--write", "--checkpoint"}}


@pytest.mark.parametrize("mode", REFUSED)
def test_a_flag_that_the_mode_does_not_use_is_refused(mode: str) -> None:
    for flag, values in A_FLAG_OF_EACH_GROUP.items():
        arguments = ["--mode", mode, flag, *values]
        if flag in REFUSED[mode]:
            knob = flag.replace("--no-", "--")
            with pytest.raises(UserError, match=f"^{knob}: --mode {mode} does not use it, since .*; leave it out$"):
                settings.parse(arguments)
        else:
            assert settings.parse(arguments) == settings.validate(settings.parse(arguments))


def test_the_reason_names_the_checkpoint_or_the_mode() -> None:
    for flags, reason in ((["--schedule=linear"], "the checkpoint's own settings decide it"),
                          (["--grad_clip", "inf"], "the checkpoint's own settings decide it"),
                          (["--fresh"], "it is for --mode train"), (["--minutes=3"], "it is for --mode train"),
                          (["--compile", "on"], "it is for --mode train"),
                          (["--data-dir", "x"], "it is for --mode train, evaluate, compare and experiment"),
                          (["--runs", "a", "b"], "it is for --mode compare")):
        with pytest.raises(UserError, match=f"since {reason}"):
            settings.parse(["--mode", "sample", *flags])


def test_edited_defaults_are_not_flags() -> None:
    edited = dataclasses.replace(
        Config(), mode="sample", diffusion=dataclasses.replace(Config().diffusion, schedule="linear"),
        train=dataclasses.replace(Config().train, fresh=True))
    assert settings.parse(["--steps", "3"], edited).sample.steps == 3
    with pytest.raises(UserError, match="--schedule: --mode sample"):  # given, though it is the default
        settings.parse(["--schedule", "linear"], edited)
    assert settings.given(["--runs", "a", "b --steps 3", "--no-fresh", "--num_images=3"]) == [
        "runs", "fresh", "num_images"]


def test_a_refused_flag_is_the_answer_of_the_process_too(own_folder: Path, capsys) -> None:
    assert main(["--mode", "sample", "--schedule", "linear", "--prediction", "noise"]) == 2
    assert "--schedule: --mode sample does not use it" in one_line(capsys.readouterr().err)
    assert not list(own_folder.iterdir())


# Defaults that were edited


@pytest.mark.parametrize("group, field, value", [
    (None, "mode", "sampel"), (None, "seed", "0"), (None, "seed", True), (None, "name", 3), (None, "model", 3),
    ("model", "channels", (16, 32)), ("model", "channels", (16, 32, 64, 96)), ("model", "channels", (16, 32.5, 96)),
    ("model", "channels", 16), ("model", "attention", (8,)), ("train", "lr", float("nan")), ("train", "lr", "0.1"),
    ("train", "epochs", 1.5), ("train", "fresh", 1), ("train", "minutes", True), ("diffusion", "schedule", None),
    ("sample", "steps", None), ("sample", "guidance", -1.0), ("sample", "checkpoint", 7)])
def test_an_edited_default_is_checked_too(group: str | None, field: str, value: Any) -> None:
    config = Config()
    edited = dataclasses.replace(config, **(
        {field: value} if group is None else {group: dataclasses.replace(getattr(config, group), **{field: value})}))
    with pytest.raises(UserError, match=f"^--{field} "):
        settings.validate(edited)


def test_defaults_that_are_edited_well_are_taken() -> None:
    edited = dataclasses.replace(Config(), data_dir=Path("a b/é"), train=dataclasses.replace(
        Config().train, grad_clip=float("inf"), minutes=3, lr=1))
    assert settings.validate(edited) == edited


# What a checkpoint keeps of its config


def test_what_a_checkpoint_keeps_survives() -> None:
    config = settings.parse(["--minutes", "3", "--attention", "14", "7", "--grad-clip", "inf", "--dataset", "idx",
                            "--steps", "7"])
    again, assumed = settings.training_settings(json.loads(json.dumps(settings.stored(config))))
    assert not assumed and again.sample == Config().sample  # how images were sampled is not kept
    assert dataclasses.replace(again, mode=config.mode, sample=config.sample) == config


def test_knobs_that_are_newer_than_a_checkpoint_have_their_legacy_values() -> None:
    stored = settings.stored(settings.parse(["--embedding", "64", "--lr", "0.1"]))
    for group, name in (("model", "dropout"), ("train", "ema"), ("train", "focus"), ("train", "clip_loss")):
        del stored[group][name]
    del stored["seed"], stored["diffusion"], stored["train"]["same_code"]  # which no run depends on
    config, assumed = settings.training_settings(stored)
    assert sorted(assumed) == ["clip-loss False", "dropout 0.0", f"ema {Config().train.ema}", "focus 0.0",
                               "prediction v", "schedule cosine", "seed 0", "timesteps 1000", "weighting none"]
    assert config.model == dataclasses.replace(Config().model, embedding=64) and config.train.lr == 0.1
    assert (config.train.focus, config.train.clip_loss) == (0.0, False)
    now = settings.stored(settings.parse(["--embedding", "64", "--lr", "0.1"]))  # so today's defaults don't continue it
    changed = settings.differences(settings.stored(config), now)
    assert changed == [("clip-loss", "False", "True"), ("focus", "0.0", "0.7")]


@pytest.mark.parametrize("change", [
    lambda d: d["train"].update(momentum=0.9), lambda d: d["train"].pop("lr_schedule"), lambda d: d.pop("train"),
    lambda d: d["diffusion"].update(offset=3, schedule="squared"), lambda d: d.update(extra=1, seed="0"),
    lambda d: d["model"].pop("dropout"), lambda d: d["train"].update(label_dropout="some")],
    ids=["train +", "train -", "no train", "diffusion", "top", "model", "type"])
def test_sampling_needs_only_the_network_and_the_prediction(change, own_folder: Path) -> None:
    """A knob that this version lacks, or that the checkpoint lacks, leaves the images as they are."""
    state = checkpoint.load(selection.PRETRAINED)
    whole = load_checkpoint(selection.PRETRAINED, CPU)
    change(state["config"])
    checkpoint.save(Path("changed.safetensors"), state)
    changed = load_checkpoint(Path("changed.safetensors"), CPU)
    assert changed.digest == whole.digest and changed.schedule.prediction == whole.schedule.prediction
    for model in (changed, whole):
        request = make_request(model, SampleConfig(), 0, 1)
        assert request.guidance == Config().sample.guidance and request.labels.shape == (1,)


def test_sampling_after_a_knob_was_deleted_from_the_code(own_folder: Path, monkeypatch) -> None:
    """As if `lr_schedule` were no longer in config.py: the shipped weights give the same images."""
    wanted = SampleConfig(steps=1, digits="7")
    before = sample_images(model := load_checkpoint(selection.PRETRAINED, CPU), make_request(model, wanted, 0, 1))[0]
    fields = [(field.name, field.type, field) for field in dataclasses.fields(configs.TrainConfig)
              if field.name != "lr_schedule"]
    smaller = dataclasses.make_dataclass("TrainConfig", fields, frozen=True)
    monkeypatch.setitem(settings.GROUPS, "train", smaller)
    kinds = dataclasses.make_dataclass("Config", [
        (f.name, smaller, dataclasses.field(default_factory=smaller)) if f.name == "train" else (f.name, f.type, f)
        for f in dataclasses.fields(Config)], frozen=True)
    monkeypatch.setattr(settings, "ADAPTER", pydantic.TypeAdapter(kinds))
    model = load_checkpoint(selection.PRETRAINED, CPU)
    assert sample_images(model, make_request(model, wanted, 0, 1))[0].equal(before)
    monkeypatch.setattr(settings, "Config", kinds)
    with pytest.raises(UserError, match="'lr_schedule'.*use the version that wrote it, or train again"):
        settings.training_settings(model.settings)


DAMAGES = [
    (lambda d: d.update(extra=1), "extra"), (lambda d: d["model"].update({"refiner\n": 40}), "refiner"),
    (lambda d: d.update(seed="0"), "--seed 0"), (lambda d: d["model"].update(channels="all"), "--channels all"),
    (lambda d: d.update({f"a\n{i}": 1 for i in range(999)}), "a.n0"), (lambda d: d.update(device="x"), "device"),
    (lambda d: d.update(dataset="\x1b[31m\n" * 99), "--dataset"), (lambda d: d.update(model=3), "not as this project"),
    (lambda d: d["train"].update(lr=-1), "--lr -1"), (lambda d: d.update(dataset="\ud800"), "not UTF-8"),
    (lambda d: d["model"].update(channels=["\ud800"]), "--channels .*not UTF-8")]


@pytest.mark.parametrize("damage, said", DAMAGES)
def test_a_damaged_stored_config_is_named(damage, said: str) -> None:
    stored = settings.stored(Config())
    damage(stored)
    with pytest.raises(UserError, match=said) as caught:
        settings.training_settings(stored)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


@pytest.mark.parametrize("damage, said", [damage for damage in DAMAGES if damage[1] in (
    "refiner", "--channels all", "not as this project", "--channels .*not UTF-8")])
def test_a_damaged_config_of_the_network_is_named_when_sampling(damage, said: str) -> None:
    stored = settings.stored(Config())
    damage(stored)
    with pytest.raises(UserError, match=said) as caught:
        settings.network_settings(stored)
    assert str(caught.value).isprintable()


def test_differences_are_those_that_matter() -> None:
    def differences(flags: list[str]) -> list[tuple[str, str, str]]:
        return settings.differences(settings.stored(Config()), settings.stored(settings.parse(flags)))

    assert differences(["--minutes", "3", "--fresh", "--name", "x", "--steps", "3"]) == []
    assert differences(["--lr", "0.1", "--blocks", "1", "1", "2"]) == [
        ("blocks", "1 2 2", "1 1 2"), ("lr", str(Config().train.lr), "0.1")]


# Which checkpoint and which data

@pytest.mark.parametrize("mode", ["sample", "evaluate"])
@pytest.mark.parametrize("flags, said", [
    (["--checkpoint", "missing.safetensors"], "missing.safetensors"), (["--checkpoint", "."], "."),
    (["--checkpoint", "nofile"], "--checkpoint nofile: there is no such checkpoint"),
    (["--checkpoint", "a" * 300], "no such checkpoint"),
    (["--checkpoint", "~nobody-of-this-name/x"], "no such checkpoint"),
    (["--name", "数" * 100], "there is no run of that name"),
    (["--dataset", "kmnist"], "--dataset kmnist: there is no"),
    (["--device", "cuda:99"], "cuda:99"), (["--num-images", "10", "--mode", "evaluate"], "--num-images 10")])
def test_what_is_not_there_is_named(mode: str, flags: list[str], said: str, own_folder: Path, capsys) -> None:
    assert main(["--mode", mode, *flags]) == 2
    line = one_line(capsys.readouterr().err)
    assert line.startswith("error: ") and said in line and "--fresh" not in line


@pytest.mark.parametrize("flags, said", [
    (["--dataset", "idx", "--data-dir", "nowhere"], "nowhere"),
    (["--dataset", "idx", "--data-dir", "a" * 300], "no such file"),
    (["--dataset", "generated", "--name", "数" * 100], "File name too long"),
    (["--dataset", "idx"], "--data-dir"),
    (["--batch-size", "1", "--dataset", "idx", "--data-dir", "file"], "file")])
def test_missing_data_is_named(flags: list[str], said: str, own_folder: Path, capsys) -> None:
    (own_folder / "file").write_text("not a folder")
    assert main(flags) == 2
    assert said in one_line(capsys.readouterr().err)


def test_a_file_where_a_folder_should_be(own_folder: Path, idx_folder: Path, capsys) -> None:
    (own_folder / "checkpoints").write_text("")
    assert main(["--dataset", "idx", "--data-dir", str(idx_folder)]) == 2
    assert "checkpoints" in one_line(capsys.readouterr().err)


def test_the_shipped_weights_are_sampled_where_there_is_no_run(own_folder: Path, capsys) -> None:
    quick = ["--mode", "sample", "--num-images", "1", "--steps", "1", "--device", "cpu"]
    assert main(quick) == 0
    output = capsys.readouterr().out
    assert "There is no run of your own yet" in output and "results/pretrained-19fdf787/sample.png" in output
    assert str(selection.PRETRAINED) in output and os.listdir("results") == ["pretrained-19fdf787"]


@pytest.mark.parametrize("mode", ["sample", "evaluate"])
@pytest.mark.parametrize("flags", [["--name", "base0"], ["--dataset", "fashion-mnist"], ["--checkpoint", "base0"]])
def test_a_mistyped_run_is_an_error_that_lists_the_runs(mode: str, flags: list[str], own_folder: Path, capsys) -> None:
    for name in ("base-0", "other"):
        Path("checkpoints", name).mkdir(parents=True)
        shutil.copy(selection.PRETRAINED, selection.run_path(name))
    assert main(["--mode", mode, *flags, "--device", "cpu"]) == 2
    line = one_line(capsys.readouterr().err)
    assert f"{' '.join(flags)}: there is no" in line and "Runs in checkpoints/: base-0, other." in line
    assert not Path("results").exists()


def test_pretrained_always_means_the_shipped_weights(own_folder: Path) -> None:
    Path("checkpoints/mnist").mkdir(parents=True)
    for decoy in (selection.run_path("mnist"), Path("pretrained")):
        shutil.copy(selection.PRETRAINED, decoy)
    for text in ("pretrained", "Pretrained"):
        settled = selection.settle(settings.parse(["--mode", "sample", "--checkpoint", text]), CPU)
        assert settled.sample.checkpoint == selection.PRETRAINED
    assert selection.resolve("pretrained", "--runs") == selection.PRETRAINED


def test_mnist_is_looked_for_here_and_then_beside_the_code(own_folder: Path, monkeypatch) -> None:
    code = own_folder / "code"
    monkeypatch.setattr(loading, "ROOT", code)

    def put(root: Path) -> None:
        (root / "mnist/MNIST/raw").mkdir(parents=True)
        for name in idx.NAMES:
            (root / "mnist/MNIST/raw" / name).touch()

    assert loading.data_folder(Config(), "mnist") == Path("dataset")  # where it would be downloaded to
    put(code / "dataset")
    assert loading.data_folder(Config(), "mnist") == code / "dataset"
    put(Path("dataset"))
    assert loading.data_folder(Config(), "mnist") == Path("dataset")
    assert loading.data_folder(Config(data_dir=Path("else")), "mnist") == Path("else")


@pytest.mark.parametrize("flags", [
    ["--name", "mine", "--checkpoint", "pretrained"], ["--dataset", "kmnist", "--checkpoint", "pretrained"],
    ["--dataset", "kmnist", "--name", "mine"], ["--write", "12", "--digits", "7"],
    ["--write", "12", "--num-images", "9"], ["--guidance", "1", "--guidance-interval", "0", "1"],
    ["--digits", "none", "--guidance-interval", "0", "1"], ["--minutes", "5", "--epochs", "3"]])
def test_a_flag_that_another_one_makes_useless_is_refused(flags: list[str]) -> None:
    with pytest.raises(UserError, match="leave"):
        settings.parse(["--mode", "train" if "--epochs" in flags else "sample", *flags])


def test_an_edited_default_yields_to_a_flag() -> None:
    edited = Config(mode="sample", sample=SampleConfig(
        checkpoint=Path("pretrained"), write="12", sampler="ddim", eta=0.5))
    assert settings.parse(["--name", "mine"], edited).sample.checkpoint is None
    assert settings.parse(["--digits", "7"], edited).sample.write is None
    assert settings.parse(["--sampler", "sa"], edited).sample.eta == 0
    timed = Config(train=TrainConfig(minutes=5))
    assert settings.parse(["--epochs", "3"], timed).train == TrainConfig(epochs=3)
    assert settings.parse([], timed).train.minutes == 5
    assert settings.parse(["--steps", "3"], edited).sample == dataclasses.replace(edited.sample, steps=3)
