"""The command line: bad input gets one line and status 2, at once; --help lists every field; defaults can be edited."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import config as configs
import dataset
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
    (["--guidance-interval", "750", "250"], "--guidance-interval 750 250"),
    (["--spacing", "even"], "--spacing"),
    (["--digits", "12a"], "--digits 12a"),
    (["--digits", ""], "--digits"),
    (["--digits", "1 2"], "--digits 1 2"),
    (["--write", "3.14"], "--write 3.14"),
    (["--write", ""], "--write"),
    (["--write", "1" * 65], "--write"),
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
    (["--grad-clip", "nan"], "--grad-clip nan"),
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


def test_help_lists_every_field_with_its_default() -> None:
    process = subprocess.run([sys.executable, "run.py", "--help"], cwd=ROOT, capture_output=True, text=True,
                             env={**os.environ, "COLUMNS": "200"})
    assert process.returncode == 0
    for group in (Config, *(f.default_factory for f in dataclasses.fields(Config)
                            if f.default_factory is not dataclasses.MISSING)):
        for field in dataclasses.fields(group):
            if not dataclasses.is_dataclass(field.type) and field.default is not dataclasses.MISSING:
                assert f"--{field.name.replace('_', '-')}" in process.stdout


def test_flags_override_defaults_and_keep_the_rest() -> None:
    config = configs.parse(["--mode", "sample", "--num-images", "64", "--seed", "3", "--channels", "8", "16", "24",
                            "--attention"])
    assert (config.mode, config.sample.num_images, config.seed) == ("sample", 64, 3)
    assert config.model.channels == (8, 16, 24) and config.model.attention == ()
    assert config.train == Config().train


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
        configs.validate(edited)


def test_defaults_that_are_edited_well_are_taken() -> None:
    edited = dataclasses.replace(Config(), data_dir=Path("a b/é"), train=dataclasses.replace(
        Config().train, grad_clip=float("inf"), minutes=3, lr=1))
    assert configs.validate(edited) == edited


def test_what_a_checkpoint_keeps_survives() -> None:
    config = configs.parse(["--minutes", "3", "--checkpoint", "a/b.safetensors", "--attention", "14", "7",
                            "--grad-clip", "inf", "--dataset", "idx", "--steps", "7"])
    again, lacking = configs.from_stored(json.loads(json.dumps(configs.stored(config))))
    assert not lacking and again.sample == Config().sample  # how was drawn is not kept
    assert dataclasses.replace(again, sample=config.sample) == config


def test_knobs_that_are_newer_than_a_checkpoint_have_their_defaults() -> None:
    stored = configs.stored(configs.parse(["--embedding", "64", "--lr", "0.1"]))
    for group, name in (("model", "dropout"), ("train", "ema")):
        del stored[group][name]
    del stored["seed"], stored["diffusion"], stored["train"]["same_code"]  # which no run depends on
    config, lacking = configs.from_stored(stored)
    assert sorted(lacking) == ["dropout", "ema", "prediction", "schedule", "seed", "timesteps", "weighting"]
    assert config.model == dataclasses.replace(Config().model, embedding=64) and config.train.lr == 0.1


@pytest.mark.parametrize("damage, said", [
    (lambda d: d.update(extra=1), "extra"), (lambda d: d["model"].update(refiner=40), "refiner"),
    (lambda d: d.update(seed="0"), "--seed 0"), (lambda d: d["model"].update(channels="all"), "--channels all"),
    (lambda d: d.update({f"a\n{i}": 1 for i in range(999)}), "a.n0"), (lambda d: d.update(device="x"), "device"),
    (lambda d: d.update(dataset="\x1b[31m\n" * 99), "--dataset"), (lambda d: d.update(model=3), "not as this project"),
    (lambda d: d["train"].update(lr=-1), "--lr -1")])
def test_a_damaged_stored_config_is_named(damage, said: str) -> None:
    stored = configs.stored(Config())
    damage(stored)
    with pytest.raises(UserError, match=said) as caught:
        configs.from_stored(stored)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_differences_are_those_that_matter() -> None:
    base = configs.parse([])
    assert configs.differences(base, configs.parse(["--minutes", "3", "--fresh", "--name", "x", "--steps", "3"])) == []
    assert configs.differences(base, configs.parse(["--lr", "0.1", "--blocks", "1", "1", "2"])) == [
        "blocks was [1, 2, 2], now [1, 1, 2]", "lr was 0.002, now 0.1"]


@pytest.mark.parametrize("mode", ["sample", "evaluate"])
@pytest.mark.parametrize("flags, said", [
    (["--checkpoint", "missing.safetensors"], "missing.safetensors"), (["--checkpoint", "old.pt"], "first version"),
    (["--checkpoint", "."], "."),
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


def test_what_ships_draws_from_any_folder_for_a_name_without_a_run(own_folder: Path, capsys) -> None:
    assert main(["--mode", "sample", "--name", "nobody", "--num-images", "1", "--steps", "1", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "no checkpoint of your own in checkpoints/nobody" in output and "results/nobody/sample.png" in output
    assert str(ROOT / "checkpoints/pretrained.safetensors") in output


def test_mnist_is_looked_for_here_and_then_beside_the_code(own_folder: Path, monkeypatch) -> None:
    code = own_folder / "code"
    monkeypatch.setattr(dataset, "ROOT", code)

    def put(root: Path) -> None:
        (root / "mnist/MNIST/raw").mkdir(parents=True)
        for name in dataset.MNIST_MD5:
            (root / "mnist/MNIST/raw" / name).touch()

    assert dataset.data_folder(Config()) == Path("dataset")  # where it would be downloaded to
    put(code / "dataset")
    assert dataset.data_folder(Config()) == code / "dataset"
    put(Path("dataset"))
    assert dataset.data_folder(Config()) == Path("dataset")
    assert dataset.data_folder(Config(data_dir=Path("else"))) == Path("else")
