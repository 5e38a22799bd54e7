"""The command line: bad input gets one line and status 2, at once; --help lists every field; defaults can be edited."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

import config as configs
from config import Config, UserError
from run import main
from tests.conftest import ROOT

# Flags, and a piece of the one line that answers them.
BAD_FLAGS = [
    (["--mode", "sampel"], "--mode"),
    (["--mode"], "--mode"),
    (["--mode", ""], "--mode"),
    (["train"], "train"),
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
    (["--refiner", "-1"], "--refiner -1"),
    (["--refiner", "1000"], "--refiner 1000"),
    (["--refiner", "40", "--refiner-share", "0"], "--refiner-share 0"),
    (["--refiner", "40", "--refiner-share", "1.1"], "--refiner-share 1.1"),
    (["--refiner-share", "0.3"], "there is no refiner"),
    (["--optimizer", "sgd"], "--optimizer"),
    (["--preview", "-1"], "--preview -1"),
    (["--channels", "0", "32", "64"], "--channels 0 32 64"),
    (["--channels", "16", "32"], "--channels 16 32"),
    (["--channels", "16", "30", "64"], "GroupNorm"),
    (["--channels", "a", "b", "c"], "--channels"),
    (["--blocks", "0", "1", "1"], "--blocks 0 1 1"),
    (["--blocks", "1"], "--blocks 1"),
    (["--attention", "8"], "--attention 8"),
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
    (["--digits", "12a"], "--digits 12a"),
    (["--digits", ""], "--digits"),
    (["--digits", "1 2"], "--digits 1 2"),
    (["--write", "3.14"], "--write 3.14"),
    (["--write", ""], "--write"),
    (["--write", "1" * 65], "--write"),
    (["--num-images", "0"], "--num-images 0"),
    (["--num-images", "many"], "--num-images"),
    (["--seeds", "0"], "--seeds 0"),
    (["--seed", "-1"], "--seed -1"),
    (["--seed", str(2**63)], "--seed"),
    (["--seed", "x"], "--seed"),
    (["--name", "a/b"], "--name a/b"),
    (["--name", ".."], "--name .."),
    (["--name", ""], "--name"),
    (["--name", "a" * 101], "--name"),
    (["--device", "tpu"], "--device tpu"),
    (["--device", "cuda:x"], "--device cuda:x"),
    (["--precision", "fp8"], "--precision"),
    (["--compile", "maybe"], "--compile"),
    (["--dataset", "cifar"], "--dataset"),
    (["--fresh", "maybe"], "maybe"),
    (["--sweep=3"], "Unrecognized options: 3"),
]


def one_line(text: str) -> str:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    return lines[0]


@pytest.mark.parametrize("flags, said", BAD_FLAGS, ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "")
def test_bad_flag_is_answered_in_one_line(flags: list[str], said: str, own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_help_lists_every_field_with_its_default() -> None:
    process = subprocess.run([sys.executable, "run.py", "--help"], cwd=ROOT, capture_output=True, text=True,
                             env={**os.environ, "COLUMNS": "200"})
    assert process.returncode == 0
    for group in (Config, *(f.default_factory for f in dataclasses.fields(Config) if f.default_factory is not dataclasses.MISSING)):
        for field in dataclasses.fields(group):
            if not dataclasses.is_dataclass(field.type) and field.default is not dataclasses.MISSING:
                assert f"--{field.name.replace('_', '-')}" in process.stdout


def test_flags_override_defaults_and_keep_the_rest() -> None:
    config = configs.parse(["--mode", "sample", "--num-images", "64", "--seed", "3", "--channels", "8", "16", "24", "--attention"])
    assert (config.mode, config.sample.num_images, config.seed) == ("sample", 64, 3)
    assert config.model.channels == (8, 16, 24) and config.model.attention == ()
    assert config.train == Config().train


def test_an_edited_default_is_checked_too() -> None:
    for edited in (dataclasses.replace(Config(), mode="sampel"), dataclasses.replace(Config(), seed="0"),
                   dataclasses.replace(Config(), model=dataclasses.replace(Config().model, channels=[16, 32, 64]))):
        with pytest.raises(UserError):
            configs.validate(edited)


def test_config_survives_the_checkpoint_form() -> None:
    config = configs.parse(["--minutes", "3", "--checkpoint", "a/b.pt", "--attention", "14", "7"])
    assert configs.from_dict(Config, configs.to_dict(config)) == config


@pytest.mark.parametrize("damage", [lambda d: d.pop("seed"), lambda d: d.update(extra=1), lambda d: d.update(seed="0"),
                                    lambda d: d["model"].update(channels="all"), lambda d: d.update(model=3)])
def test_a_damaged_stored_config_is_named(damage) -> None:
    stored = configs.to_dict(Config())
    damage(stored)
    with pytest.raises(UserError):
        configs.from_dict(Config, stored)


@pytest.mark.parametrize("mode", ["sample", "evaluate"])
@pytest.mark.parametrize("flags, said", [
    (["--checkpoint", "missing.pt"], "missing.pt"), (["--checkpoint", "."], "."), (["--name", "nobody"], "nobody"),
    (["--device", "cuda:99"], "cuda:99"), (["--num-images", "10", "--mode", "evaluate"], "--num-images 10")])
def test_what_is_not_there_is_named(mode: str, flags: list[str], said: str, own_folder: Path, capsys) -> None:
    assert main(["--mode", mode, *flags]) == 2
    line = one_line(capsys.readouterr().err)
    assert line.startswith("error: ") and said in line


@pytest.mark.parametrize("flags, said", [
    (["--dataset", "idx", "--data-dir", "nowhere"], "nowhere"),
    (["--batch-size", "1", "--dataset", "idx", "--data-dir", "file"], "file")])
def test_missing_data_is_named(flags: list[str], said: str, own_folder: Path, capsys) -> None:
    (own_folder / "file").write_text("not a folder")
    assert main(flags) == 2
    assert said in one_line(capsys.readouterr().err)


def test_a_file_where_a_folder_should_be(own_folder: Path, idx_folder: Path, capsys) -> None:
    (own_folder / "checkpoints").write_text("")
    assert main(["--dataset", "idx", "--data-dir", str(idx_folder)]) == 2
    assert "checkpoints" in one_line(capsys.readouterr().err)
