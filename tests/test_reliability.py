"""A run that cannot be lost: bad numbers, full disks, damaged files, changed settings, signals and several processes.

Most of it runs in this process through `main(argv)`; kills of real processes are in test_end_to_end.py and, by the
dozen, in tests/slow/stress.py.
"""

import contextlib
import csv
import errno
import itertools
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import training.loop
import training.state
import training.step
from config import Config, UserError
from diffusion import NoiseSchedule, diffusion_loss
from run import main
from support import checkpoint, code, console, files, loading, plots, runtime, settings
from support.cuda_graphs import compiled
from support.runtime import Runtime, choose_device
from tests.conftest import ROOT, TINY, write_set
from tests.processes import Program, assert_close, assert_same, learned, nothing, start, start_ranks
from training.optimizer import Optimizer, learning_rate, progress
from training.step import Learner

RUN = ["--mode", "train", "--dataset", "idx", "--batch-size", "8", "--epochs", "2", "--timesteps", "100", "--preview",
       "0", "--device", "cpu", *TINY, "--steps", "3", "--num-images", "16"]  # 16 steps
SAMPLE = ["--mode", "sample", "--dataset", "idx", "--device", "cpu", "--steps", "3", "--num-images", "16"]
LAST, PREVIOUS = Path("checkpoints/idx/last.safetensors"), Path("checkpoints/idx/previous.safetensors")
CPU = Runtime(torch.device("cpu"), bf16=False, compile=False)
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """One thread, as the processes that runs are compared with have, and no loss.png, which takes longer than a run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save_losses", nothing)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def idx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller set than the other tests have, for 8 steps of 8 images in an epoch."""
    return write_set(tmp_path_factory.mktemp("idx"), train=64, test=32)


@pytest.fixture
def flags(idx_folder: Path) -> list[str]:
    return [*RUN, "--data-dir", str(idx_folder)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, idx_folder: Path) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(training.loop, "SAVE_SECONDS", 0.0)
        assert main([*RUN, "--data-dir", str(idx_folder)]) == 0
    return folder


@pytest.fixture
def there(finished: Path, own_folder: Path) -> Path:
    """A copy of it as the current folder."""
    shutil.copytree(finished, own_folder, dirs_exist_ok=True)
    return own_folder


def refused(arguments: list[str], capsys: Capture) -> str:
    """The one line of a run that ended with status 2."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Saves a checkpoint again with a change, and the digest that goes with it."""
    state = checkpoint.load(path)
    edit(state)
    checkpoint.save(path, {key: value for key, value in state.items() if key not in ("version", "digest")})


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in that step of the run, and in none after it."""
    taken = Learner.step

    def with_signal(learner: Learner, number: int, lr: float) -> torch.Tensor:
        if number == step - 1:
            monkeypatch.setattr(Learner, "step", taken)
            os.kill(os.getpid(), signal.SIGINT)
        return taken(learner, number, lr)

    monkeypatch.setattr(Learner, "step", with_signal)


def poison(steps: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the loss of these training steps (counted from 1) not finite."""
    count = itertools.count(1)

    def poisoned(*arguments: Any) -> torch.Tensor:
        return diffusion_loss(*arguments) * (torch.nan if next(count) in steps else 1)

    monkeypatch.setattr(training.step, "diffusion_loss", poisoned)


# Numbers


@pytest.mark.parametrize("broken", [
    lambda loss: loss * torch.tensor([1.0] * 7 + [torch.nan]),
    lambda loss: loss + torch.inf,
    lambda loss: 1 + (0 * loss).sqrt(),  # the loss is 1, but its gradient is not a number
], ids=["one nan", "inf", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(broken: Callable[[torch.Tensor], torch.Tensor], flags: list[str],
                                                   tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings.parse(flags)
    learner = Learner(config, loading.load_split(config, "train"), CPU)

    def step() -> bool:
        """Whether it was taken."""
        return math.isfinite(learner.step(0, lr=1e-3).item())

    def everything() -> str:
        path = tmp_path / "all.safetensors"
        checkpoint.save(path, {"model": learner.network.state_dict(), "ema": learner.average.state_dict(),
                               "optimizer": learner.optimizer.state_dict(), "config": {}, "step": 0, "history": {}})
        return checkpoint.load(path)["digest"]

    assert step()
    before = everything()
    monkeypatch.setattr(training.step, "diffusion_loss", lambda *arguments: broken(diffusion_loss(*arguments)))
    assert not step() and everything() == before
    monkeypatch.setattr(training.step, "diffusion_loss", diffusion_loss)
    assert step() and everything() != before


def test_skipped_steps_are_counted(own_folder: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch,
                                   capsys: Capture) -> None:
    poison(range(3, 5), monkeypatch)
    assert main(flags) == 0
    assert "16 steps" in (output := capsys.readouterr().out) and "2 steps skipped" in output
    rows = list(csv.DictReader(Path("results/idx/metrics.csv").open()))
    assert [row["skipped"] for row in rows if row["step"] in ("2", "3", "4", "16")] == ["0", "1", "2", "2"]


def test_many_skipped_steps_in_a_row_end_the_run_and_leave_the_checkpoint(own_folder: Path, flags: list[str],
                                                                      monkeypatch: pytest.MonkeyPatch,
                                                                      capsys: Capture) -> None:
    flags = [*flags, "--epochs", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(training.loop, "SAVE_SECONDS", 0.0)
        poison(range(4, 1000), patch)
        line = refused(flags, capsys)
    assert "not finite in 20 steps in a row" in line and "step 23" in line and "--lr" in line and str(LAST) in line
    state = checkpoint.load(LAST)
    assert state["step"] == 3 and state["history"]["skipped"] == 0
    # Where the numbers are finite again, it resumes.
    assert main(flags) == 0 and "3 steps, 0.4 epochs" in capsys.readouterr().out


def test_a_run_without_a_finite_step_has_no_checkpoint(own_folder: Path, flags: list[str],
                                                     monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    poison(range(1000), monkeypatch)
    monkeypatch.setattr(training.state, "BAD_STEPS", 3)
    assert "last.safetensors" not in refused([*flags, "--epochs", "3"], capsys) and not LAST.exists()


def test_weights_that_are_not_finite_are_not_saved(there: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch,
                                                   capsys: Capture) -> None:
    before = checkpoint.load(LAST)
    monkeypatch.setattr(training.loop, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(Optimizer, "step",
                        lambda self, finite: self.parts["muon"].param_groups[0]["params"][0].data.fill_(torch.nan))
    line = refused([*flags, "--epochs", "3"], capsys)
    assert "not finite after step 17" in line and str(LAST) in line
    after = checkpoint.load(LAST)
    assert after["step"] == 16 and all(torch.equal(after["model"][name], weight)
                                       for name, weight in before["model"].items())


def test_weights_that_sample_nonsense_are_called_out(there: Path, capsys: Capture) -> None:
    weights = checkpoint.load(LAST)["ema"]

    def sample_with(prediction: str, **filled: float) -> None:
        def edit(state: dict[str, Any]) -> None:
            state["config"]["diffusion"]["prediction"] = prediction
            state["ema"] = {name: torch.full_like(value, filled.get(name.replace(".", "_"), 0))
                            for name, value in weights.items()}

        change(LAST, edit)

    def said() -> str:
        capsys.readouterr()
        assert main(SAMPLE) == 0
        return capsys.readouterr().out

    sample_with("x0", head_bias=-1)
    assert "all black" in said()
    sample_with("v")  # x0_hat = alpha x_t
    assert "static" in said()
    pictures = {path: path.read_bytes() for path in Path("results/idx").iterdir()}
    sample_with("x0", stem_weight=3e38, norm_weight=1, head_weight=1)
    line = refused(SAMPLE, capsys)
    assert ("stopped being finite at t = " in line
            and pictures == {path: path.read_bytes() for path in Path("results/idx").iterdir()})
    sample_with("x0", head_weight=torch.nan)
    assert "head.weight is not finite" in refused(SAMPLE, capsys)


# Resuming


def test_dropout_is_the_same_after_a_stop(own_folder: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*flags, "--dropout", "0.5", "--epochs", "1"]
    assert main([*flags, "--seed", "3", "--name", "straight"]) == 0
    stop_at(3, monkeypatch)
    assert main([*flags, "--seed", "3", "--name", "stopped"]) == 130
    assert checkpoint.load(Path("checkpoints/stopped/last.safetensors"))["step"] == 3
    torch.manual_seed(99)
    assert main([*flags, "--seed", "3", "--name", "stopped"]) == 0
    assert_same(learned(own_folder, "straight"), learned(own_folder, "stopped"))


def test_a_stop_in_the_last_step_loses_neither_its_row_nor_the_pictures(finished: Path, own_folder: Path,
                                                                        flags: list[str],
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(16, monkeypatch)
    assert main(flags) == 130 and not Path("results/idx/sample.png").exists()
    assert main(flags) == 0
    assert_same(learned(finished), learned(own_folder))


def test_a_stop_in_the_last_step_between_two_rows_loses_no_row(own_folder: Path, flags: list[str],
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*flags, "--epochs", "3"]
    stop_at(24, monkeypatch)
    assert main(flags) == 130 and not Path("results/idx/sample.png").exists()
    assert main(flags) == 0 and Path("results/idx/sample.png").exists()
    assert [row["step"] for row in learned(own_folder)["rows"]][-2:] == ["23", "24"]


def test_a_run_that_was_killed_while_sampling_samples(there: Path, flags: list[str], capsys: Capture) -> None:
    before, samples = LAST.read_bytes(), Path("results/idx/samples.npz")
    pictures = learned(there)["pictures"]
    samples.unlink()
    assert main(flags) == 0 and samples.exists()
    picture = Path("results/idx/sample.png")  # written last, so a kill before leaves samples.npz without it
    picture.unlink()
    assert main(flags) == 0 and picture.exists()
    assert main(flags) == 0 and "is finished" in capsys.readouterr().out
    assert LAST.read_bytes() == before and learned(there)["pictures"] == pictures


def test_a_finished_run_samples_what_is_asked_for_next(there: Path, flags: list[str], capsys: Capture) -> None:
    """And only if these images are not there already."""
    before, samples = LAST.read_bytes(), Path("results/idx/samples.npz")
    for change in (["--digits", "7", "--num-images", "9"], ["--digits", "7", "--num-images", "4"], ["--spacing",
                   "trailing"]):
        capsys.readouterr()
        assert main([*flags, *change]) == 0 and str(samples) in capsys.readouterr().out
        if "--digits" in change:
            assert np.load(samples)["labels"].tolist() == [7] * int(change[-1])
        assert main([*flags, *change]) == 0
        assert "is finished" in (output := capsys.readouterr().out) and str(samples) not in output
    assert LAST.read_bytes() == before


def test_a_run_of_code_that_was_edited_after_its_import_says_so(own_folder: Path, flags: list[str]) -> None:
    """As in a notebook, which imports once and trains again after an edit."""
    copy = own_folder / "copy"
    shutil.copytree(ROOT, copy, ignore=lambda _, names: {*names} - {"support", "training"} - {
        name for name in names if name.endswith(".py")})
    cells = f"""
import pathlib, run, support.plots
support.plots.save_losses = lambda *_, **__: None
flags = {[*flags, "--epochs", "1", "--steps", "1", "--num-images", "1"]!r}
run.main(flags)
for name in ("config.py", "training/optimizer.py"):
    with pathlib.Path({str(copy)!r}, name).open("a") as file:
        file.write("# edited")
print("EDITED", run.main([*flags, "--fresh"]))
"""
    process = subprocess.run([sys.executable, "-c", cells], cwd=own_folder, capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"})
    notes = [line for line in process.stdout.splitlines() if "imported" in line]
    assert process.stdout.endswith("EDITED 0\n") and notes == [
        "note: training/optimizer.py, config.py changed since Python imported it, and training goes by what was "
        "imported. To use the change, restart the notebook's kernel or the program."]


@pytest.mark.parametrize("schedule, end", [("linear", "falls to zero"), ("constant", "stays there")])
def test_more_epochs_extend_a_run_and_say_what_the_rate_does(schedule: str, end: str, own_folder: Path,
                                                             flags: list[str], capsys: Capture) -> None:
    flags = [*flags, "--lr-schedule", schedule, "--warmup", "0", "--lr", "0.01"]
    assert main([*flags, "--epochs", "1"]) == 0
    short = learned(own_folder)["rows"]
    capsys.readouterr()
    assert main([*flags, "--epochs", "2"]) == 0
    output = capsys.readouterr().out
    assert "Its length is now 2 epochs instead of 1 epoch:" in output and end in output
    assert ("changes from 0 to 0.005" if schedule == "linear" else "changes from 0.01 to 0.01") in output
    rows = learned(own_folder)["rows"]
    assert rows[:len(short)] == short and rows[-1]["step"] == "16"


def test_minutes_used_are_remembered(own_folder: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch,
                                     capsys: Capture) -> None:
    """With a clock that a step moves on by a second."""
    clock, taken = SimpleNamespace(seconds=0.0), Learner.step

    def step(*arguments: Any) -> torch.Tensor:
        clock.seconds += 1
        if clock.seconds == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return taken(*arguments)

    monkeypatch.setattr(Learner, "step", step)
    monkeypatch.setattr(training.loop, "time", SimpleNamespace(perf_counter=lambda: clock.seconds))
    epochs = flags.index("--epochs")
    flags = [*flags[:epochs], *flags[epochs + 2:], "--minutes", "0.2"]
    assert main(flags) == 130 and checkpoint.load(LAST)["history"]["seconds"] == 4
    clock.seconds += 1000
    assert main(flags) == 0 and "Training is finished (12 steps, 1.5 epochs, 0.2 minutes)" in capsys.readouterr().out
    assert checkpoint.load(LAST)["step"] == 12 and checkpoint.load(LAST)["history"]["seconds"] == 12


def test_fresh_keeps_what_was_there(there: Path, flags: list[str], idx_folder: Path, capsys: Capture) -> None:
    flags = [*flags, "--epochs", "1", "--fresh"]
    old, pictures = LAST.read_bytes(), learned(there)["pictures"]
    assert "nowhere" in refused([*flags, "--data-dir", "nowhere"], capsys) and LAST.read_bytes() == old  # not yet
    for number in (1, 2):
        assert main([*flags, "--lr", "0.1"]) == 0
        assert checkpoint.load(LAST)["step"] == 8
        kept = Path(f"results/idx/old{number}")
        assert (kept / "metrics.csv").exists() and {path.name for path in kept.iterdir()} >= pictures.keys()
    assert Path("checkpoints/idx/old1/last.safetensors").read_bytes() == old
    assert checkpoint.load(Path("checkpoints/idx/old2/last.safetensors"))["config"]["train"]["lr"] == 0.1
    assert {path.name: path.read_bytes() for path in Path("results/idx/old1").iterdir()
            if path.name in pictures} == pictures


# What is not this run


def test_other_images_under_the_same_name(there: Path, flags: list[str], tmp_path: Path, idx_folder: Path,
                                          capsys: Capture) -> None:
    before = LAST.read_bytes()
    other = shutil.copytree(idx_folder, tmp_path / "other")
    images = other / "train-images-idx3-ubyte"
    content = bytearray(images.read_bytes())
    content[-1] ^= 1
    images.write_bytes(content)
    smaller = write_set(tmp_path / "smaller", train=32)
    for folder in (other, smaller):
        line = refused([*flags, "--data-dir", str(folder), "--epochs", "3"], capsys)
        assert "other images" in line and "64, digest" in line and "--fresh" in line
    assert LAST.read_bytes() == before


@pytest.mark.parametrize("edit, said", [
    (lambda state: state["history"].pop("running"), "history"),
    (lambda state: state["history"].update(skipped="0"), "history"),
    (lambda state: state["history"].update(alpha_bar=state["history"]["alpha_bar"].square()), "noise schedule"),
    (lambda state: state["config"].update(refiner=40), "refiner"),
    (lambda state: state["config"].update(train=7), "settings"),
    (lambda state: state["optimizer"].pop("muon"), "optimizer"),
    (lambda state: state["optimizer"]["adamw"].update(param_groups=[]), "optimizer"),
    (lambda state: state.update(optimizer=None), "only averaged weights"),
])
def test_a_whole_checkpoint_of_another_making(edit: Callable[[dict[str, Any]], Any], said: str, there: Path,
                                              flags: list[str], capsys: Capture) -> None:
    change(LAST, edit)
    before = LAST.read_bytes()
    line = refused([*flags, "--epochs", "3"], capsys)
    assert str(LAST) in line and said in line and LAST.read_bytes() == before


@pytest.mark.parametrize("mode", ["train", "sample"])
def test_a_damaged_checkpoint_is_named_kept_and_the_one_before_offered(mode: str, there: Path, flags: list[str],
                                                                       capsys: Capture) -> None:
    arguments = SAMPLE if mode == "sample" else [*flags, "--epochs", "3"]
    LAST.write_bytes(LAST.read_bytes()[:9000])
    files = {path: path.read_bytes() for path in LAST.parent.iterdir()}
    line = refused(arguments, capsys)
    assert str(LAST) in line and str(PREVIOUS) in line
    assert files == {path: path.read_bytes() for path in LAST.parent.iterdir()}
    if mode == "sample":
        assert main(["--checkpoint" if word == "--dataset" else str(PREVIOUS) if word == "idx" else word
                     for word in arguments]) == 0
    else:
        LAST.unlink()
        assert str(PREVIOUS) in refused(arguments, capsys)  # not a silent start from nothing
        PREVIOUS.rename(LAST)
        assert main(arguments) == 0 and "Resuming the run" in capsys.readouterr().out


def test_what_the_end_needs_is_checked_at_the_start(own_folder: Path, flags: list[str], capsys: Capture) -> None:
    assert "--steps 3" in refused([*flags, "--timesteps", "2"], capsys)
    assert not list(own_folder.iterdir())


def test_code_that_was_edited_since_is_named(there: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch,
                                             capsys: Capture) -> None:
    """An edit of model.py and of the optimizer, as the run that goes on would find it."""
    edited = {"model.py": "0" * 16, "training/optimizer.py": "1" * 16}
    monkeypatch.setattr(code, "IMPORTED", code.IMPORTED | edited)
    before, flags = LAST.read_bytes(), [*flags, "--epochs", "3"]
    line = refused(flags, capsys)
    assert "(model.py, training/optimizer.py edited since)" in line and "--fresh" in line and "--same-code" in line
    assert LAST.read_bytes() == before
    assert main([*flags, "--same-code"]) == 0
    assert checkpoint.load(LAST)["history"]["code"] == code.IMPORTED
    assert main(flags) == 0  # which it is from now on


def test_the_code_of_a_step_is_what_a_step_runs() -> None:
    """The files of the project in which a step calls anything, but for what only reads settings, compiles or tells."""
    called: set[str] = set()
    files = {str(path): path.relative_to(ROOT).as_posix()  # not those of a .venv in the project's folder
             for path in (*ROOT.glob("*.py"), *(ROOT / "training").glob("*.py"), *(ROOT / "support").glob("*.py"))}

    def note(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code.co_filename in files:
            called.add(files[frame.f_code.co_filename])

    data = loading.load_split(replace(Config(), dataset="generated"), "train")
    learner = Learner(settings.parse(["--mode", "train", *TINY, "--dropout", "0.1", "--attention", "7"]), data,
                      Runtime(torch.device("cpu"), bf16=False, compile=False))
    sys.setprofile(note)
    try:
        learner.step(0, learning_rate(learner.config.train, 0, progress(learner.config.train, len(data), 0, 0.0)))
    finally:
        sys.setprofile(None)
    assert called == code.IMPORTED.keys()


def test_digests_are_of_the_code_that_was_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its text, whatever its line ends; an edit after the import changes nothing."""
    for name, value in (("ROOT", tmp_path), ("IMPORTED", {})):
        monkeypatch.setattr(code, name, value)
    for name, text in (("unix", b"a = 1\n"), ("windows", b"a = 1\r\n"), ("edited", b"a = 1\n# edited\n")):
        (tmp_path / f"{name}.py").write_bytes(text)
        code.register(str(tmp_path / f"{name}.py"))
    (tmp_path / "unix.py").write_text("# edited again")
    imported = code.IMPORTED
    assert imported["unix.py"] == imported["windows.py"] and imported["edited.py"] != imported["unix.py"]
    assert code.digest("unix.py") not in imported.values()


def test_sampling_takes_the_schedule_of_the_checkpoint_not_of_the_code(there: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(SAMPLE) == 0
    images = np.load("results/idx/samples.npz")["images"]
    for module in ("diffusion", "training.step"):
        monkeypatch.setattr(f"{module}.make_schedule",
                            lambda config: NoiseSchedule(torch.linspace(1, 0.5, 101).double()))
    assert main(SAMPLE) == 0
    assert np.array_equal(np.load("results/idx/samples.npz")["images"], images)


@pytest.mark.parametrize("group, knob, value", [("model", "dropout", "0.0"), ("train", "label_dropout", "0.05")])
def test_a_checkpoint_from_before_a_knob_was_added_is_read(group: str, knob: str, value: str, there: Path,
                                                           flags: list[str], capsys: Capture) -> None:
    change(LAST, lambda state: state["config"][group].pop(knob))
    assert not {"sample", "evaluate", "steps"} & checkpoint.load(LAST)["config"].keys()  # nor any of sampling
    assert main(SAMPLE) == 0
    assert main([*flags, "--epochs", "3"]) == 0
    assert f"is continued with {knob.replace('_', '-')} {value}" in capsys.readouterr().out


# The disk


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_for_a_checkpoint(there: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch,
                                  capsys: Capture) -> None:
    before = LAST.read_bytes()
    monkeypatch.setattr(training.loop, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training.loop, "LAST_PAUSES", ())
    with file_size_limit(len(before) // 2):
        line = refused([*flags, "--epochs", "3"], capsys)
    assert str(LAST) in line and LAST.read_bytes() == before
    assert sorted(path.name for path in LAST.parent.iterdir()) == ["last.safetensors", "lock", "previous.safetensors"]
    assert main([*flags, "--epochs", "3"]) == 0 and "16 steps" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("name", ["preview-0000024.png", "metrics.csv", "sample.png", "samples.npz"])
def test_no_room_for_a_picture(name: str, there: Path, flags: list[str], capsys: Capture) -> None:
    """It costs a line and no training. The file is written beside its place first: there lies a full device."""
    beside = Path(f"results/idx/.{name}.{os.getpid()}.part")
    beside.symlink_to("/dev/full")
    before = Path("results/idx", name).read_bytes() if not name.startswith("preview") else None
    assert main([*flags, "--epochs", "3", "--preview", "4"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "can't be written" in line]
    assert line.startswith("WARNING: ") and name in line and "No space left" in line
    assert checkpoint.load(LAST)["step"] == 24 and not beside.exists()
    if name == "metrics.csv":  # written again at the next log point
        assert learned(there)["rows"][-1]["step"] == "24"
    else:
        assert (Path("results/idx", name).read_bytes() if Path("results/idx", name).exists() else None) == before


@pytest.mark.parametrize("place", ["results", "results/idx", "checkpoints/idx"])
def test_a_place_that_is_taken(place: str, own_folder: Path, flags: list[str], capsys: Capture) -> None:
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Path(place).write_text("")
    assert place in refused(flags, capsys)
    assert not LAST.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_cannot_lock(number: int, own_folder: Path, flags: list[str],
                                        monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert main([*flags, "--epochs", "1"]) == 0 and LAST.exists()
    assert f"WARNING: {LAST.parent} can't be locked" in capsys.readouterr().out


def test_a_lock_whose_holder_is_gone(own_folder: Path, flags: list[str], capsys: Capture) -> None:
    """As after a requeue on another host: the line says whose it was, and which file to delete."""
    LAST.parent.mkdir(parents=True)
    with files.lock(LAST.parent):
        (LAST.parent / files.HOLDER).write_text("process 7 on elsewhere")
        line = refused(flags, capsys)
        lock = LAST.parent / files.LOCK
        assert f"process 7 on elsewhere, {LAST.parent}" in line and line.endswith(f"delete {lock}")
        lock.unlink()
        assert main([*flags, "--epochs", "1"]) == 0 and LAST.exists()


# Time and environment


def test_suspended_time_is_no_training_time() -> None:
    """Ctrl-Z for an hour counts as one usual step, and so does the next; steps that are just slow count in full."""
    durations: deque[float] = deque(maxlen=101)
    steps = [30.0, *[0.4] * 20, 9.9, 3600.0, 0.4, 7200.0, 0.4]
    counted = [training.loop.step_seconds(step, durations) for step in steps]
    assert counted == [30.0, *[0.4] * 20, 9.9, 0.4, 0.4, 0.4, 0.4]
    slow: deque[float] = deque(maxlen=101)
    assert [training.loop.step_seconds(step, slow) for step in (15.0, 60.0, 200.0)] == [15.0, 60.0, 200.0]


@pytest.mark.parametrize("left_over", [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": ""}, {"RANK": "x"},
                                       {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
                                       dict.fromkeys(console.TORCHRUN, "1"), dict.fromkeys(console.TORCHRUN, "")])
def test_variables_left_over_from_torchrun(left_over: dict[str, str], there: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: Capture) -> None:
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    assert main([*SAMPLE, "--steps", "1"]) == 0 and "results/idx/samples.npz" in capsys.readouterr().out
    assert "--steps 1000" in refused([*SAMPLE, "--steps", "1000"], capsys)


def test_a_compiler_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor a user without a name, after whom torch calls the folder; one that can be written stays."""
    def cache() -> str | None:
        runtime.usable_compiler_cache()
        return os.environ.get("TORCHINDUCTOR_CACHE_DIR")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/dev/null/cache")
    assert os.access(other := cache() or "", os.W_OK)
    shutil.rmtree(other)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    assert cache() == str(tmp_path / "mine")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert cache() is None
    monkeypatch.setattr("getpass.getuser", lambda: {}["uid"])
    assert os.access(other := cache() or "", os.W_OK)
    shutil.rmtree(other)


# The device


def raiser(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error
    return fail


def test_a_compiler_that_fails_at_any_call_ends_no_run(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def compile_badly(function: Callable[[int], int]) -> Callable[[int], int]:
        def call(x: int) -> int:
            if x > 1:
                raise RuntimeError("no compiler\nfor this shape")
            return 10 * function(x)
        return call

    def half(x: int) -> int:
        return 6 // x

    monkeypatch.setattr(torch, "compile", lambda function, options: compile_badly(function))
    assert compiled(half, CPU) is half
    call = compiled(half, replace(CPU, compile=True))
    assert [call(1), call(2), call(1)] == [60, 3, 6]
    assert capsys.readouterr().out == "note: torch.compile failed (RuntimeError: no compiler); going on without it.\n"
    with pytest.raises(ZeroDivisionError):  # its own failures are its own
        call(0)
    for broken in (RuntimeError("Python 3.99+ is not supported"), OSError("no compiler here")):  # as it is made
        monkeypatch.setattr(torch, "compile", raiser(broken))
        call = compiled(half, replace(CPU, compile=True))
        assert [call(1), call(2)] == [6, 3]
        assert capsys.readouterr().out.count("torch.compile failed") == 1


def test_each_process_has_its_device_or_all_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(runtime, "kernel_error", lambda device: "")
    chosen = [str(choose_device(wanted, local_rank, local_world)) for wanted, local_rank, local_world in (
        ("auto", 0, 1), ("auto", 3, 4), ("cuda:3", 0, 1), ("cuda:2", 1, 2), ("cpu", 7, 8))]
    assert chosen == ["cuda:0", "cuda:3", "cuda:3", "cuda:3", "cpu"]
    for wanted, local_world, needed in (("auto", 5, 5), ("cuda:4", 1, 5), ("cuda:3", 2, 5), ("mps", 1, 1)):
        with pytest.raises(UserError, match=f"^--device {wanted}: torch .* not {needed}; leave --device out"):
            choose_device(wanted, 0, local_world)


# Signals


def fsync_or_hang(descriptor: int) -> None:
    while os.path.exists("hang") and stat.S_ISREG(os.fstat(descriptor).st_mode):
        time.sleep(0.01)


OFTEN = {"training.loop.SAVE_SECONDS": 0.0, "support.plots.save_losses": nothing}


def hang(*_: Any) -> None:
    print("hanging", file=sys.stderr, flush=True)
    time.sleep(1000)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_run_at_once_and_loses_nothing(number: signal.Signals, own_folder: Path,
                                                              flags: list[str]) -> None:
    """Without a reader of what it says."""
    flags = [*flags, "--epochs", "1000"]
    program = start(own_folder, *flags, changes={**OFTEN, "os.fsync": fsync_or_hang}, piped=True)
    program.wait_for(LAST.exists)
    program.hang_up()
    (own_folder / "hang").touch()
    program.wait_for(lambda: list(own_folder.rglob("*.part")))
    time.sleep(0.1)
    before = LAST.read_bytes()
    program.signal(number)
    time.sleep(0.3)
    assert program.running()
    program.signal(number)
    program.finish(128 + number, seconds=60)
    assert LAST.read_bytes() == before
    (own_folder / "hang").unlink()
    step = checkpoint.load(LAST)["step"]
    again = start(own_folder, *flags, changes=OFTEN)
    again.wait_for(lambda: f"Resuming the run in checkpoints/idx ({step:,} step" in again.output)
    again.wait_for(lambda: LAST.read_bytes() != before)
    again.signal(signal.SIGTERM)
    again.finish(143)
    assert not list(LAST.parent.glob(".*.part"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_stop_saves_though_nobody_reads_what_it_says(number: signal.Signals, own_folder: Path,
                                                       flags: list[str]) -> None:
    """As with `2>&1 | tee log`, of which Ctrl-C ends tee first, or in a terminal that is closed."""
    program = start(own_folder, *flags, "--epochs", "1000", changes={"support.plots.save_losses": nothing}, piped=True)
    program.wait_for(Path("results/idx/metrics.csv").exists)
    program.hang_up()
    program.signal(number)
    program.finish(128 + number, seconds=60)
    assert checkpoint.load(LAST)["step"] > 0


def test_a_run_ends_with_its_pictures_though_nobody_reads_what_it_says(own_folder: Path, flags: list[str]) -> None:
    program = start(own_folder, *flags, changes={"support.plots.save_losses": nothing}, piped=True)
    program.wait_for(Path("checkpoints/idx").exists)  # its streams are open
    program.wait_for(LAST.parent.exists)
    program.hang_up()
    program.finish(seconds=60)
    assert Path("results/idx/sample.png").exists()


def test_a_stop_saves_in_a_notebook(own_folder: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose standard error has no file number, no reconfigure, and may refuse what is written."""
    def refuse(*_: Any) -> None:
        raise OSError("this console is gone")

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=refuse, flush=refuse))
    stop_at(3, monkeypatch)
    assert main(flags) == 130 and checkpoint.load(LAST)["step"] == 3


def test_a_run_in_a_thread(own_folder: Path, flags: list[str]) -> None:
    """Which gets no signals."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(main, [*flags, "--epochs", "1"]).result() == 0
    assert checkpoint.load(LAST)["step"] == 8


def test_help_whose_reader_leaves_early() -> None:
    """As of `| head -1`, but before the first line comes."""
    process = subprocess.Popen([sys.executable, str(ROOT / "run.py"), "--help"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 0


@pytest.mark.parametrize("mode", ["sample", "evaluate"])
def test_ctrl_c_ends_the_other_modes_too(mode: str, there: Path) -> None:
    changes = {"evaluation.reference.load_classifier": hang} if mode == "evaluate" else {}
    number = "1000" if mode == "evaluate" else "100000"
    data = ["--dataset", "generated"] if mode == "evaluate" else []
    program = start(there, "--mode", mode, "--name", "idx", *data, "--device", "cpu", "--num-images", number,
                    "--steps", "100", changes=changes)
    program.wait_for(lambda: "Sampling from" in program.output if mode == "sample" else "hanging" in program.errors)
    program.signal(signal.SIGINT)
    assert "  results" not in program.finish(130) and not program.lines()


# Several processes


def sample_badly(model: Any, request: Any) -> Iterator[torch.Tensor]:
    if os.environ["RANK"] == "1":
        raise UserError("the second process has a problem")
    yield torch.zeros(len(request.indices), 1, 28, 28)


def report_badly(*_: Any) -> None:
    raise UserError("the first process has a problem")


def only_zeros(model: Any, request: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(len(request.indices), 1, 28, 28), torch.zeros(0)


def measures_nothing(*_: Any) -> Any:
    return SimpleNamespace(measure=lambda *_, **__: SimpleNamespace(estimates={}),
                           baseline=SimpleNamespace(estimates={"class_frechet": None}))


def end_alike(programs: list[Program]) -> str:
    """The one line with which all processes ended."""
    for program in programs:
        program.finish(2, seconds=60)
    (line,), *others = [program.lines() for program in programs]
    assert others == [[]] * (len(programs) - 1)
    return line


def test_all_processes_leave_together_with_one_line(there: Path, flags: list[str]) -> None:
    changes = {"sample._chunk_states": sample_badly}
    assert "second process" in end_alike(start_ranks(there, 2, *SAMPLE, "--num-images", "130", changes=changes))
    with files.lock(LAST.parent):
        assert "another run" in end_alike(start_ranks(there, 2, *flags, "--epochs", "3"))
    LAST.write_bytes(b"")
    assert "last.safetensors" in end_alike(start_ranks(there, 2, *flags, "--epochs", "3"))


@pytest.mark.parametrize("mode, failing", [
    ("evaluate", "evaluation.evaluate.report"), ("evaluate", "evaluation.evaluate.make_reference"),
    ("compare", "evaluation.compare.report"), ("compare", "support.plots.warn_if_broken")])
def test_a_failure_of_the_first_process_ends_all(mode: str, failing: str, there: Path, flags: list[str]) -> None:
    """Of the measuring modes, which measure in that one alone while the others wait."""
    module = f"evaluation.{mode}"
    changes = {f"{module}.make_reference": measures_nothing, f"{module}.sample_images": only_zeros,
               failing: report_badly}
    if mode == "compare":
        changes["evaluation.statistics.FEWEST_FOR_ERRORS"] = 16
    own = ["--name", "idx"] if mode == "evaluate" else ["--runs", "idx", f"{PREVIOUS}"]
    programs = start_ranks(there, 2, "--mode", mode, *own, *flags[-2:], "--num-images", "200", "--device", "cpu",
                           changes=changes)
    assert "first process" in end_alike(programs)


def test_a_run_stopped_on_two_processes_resumes_on_one(finished: Path, own_folder: Path, flags: list[str],
                                                       capsys: Capture) -> None:
    programs = start_ranks(own_folder, 2, *flags, "--preview", "1",
                           changes={"training.loop.SAVE_SECONDS": 0.0, "support.plots.save_losses": nothing,
                                    "training.state.BAD_STEPS": 20})
    programs[0].wait_for(Path("results/idx/preview-0000002.png").exists)
    programs[1].signal(signal.SIGTERM)  # whichever of them gets it
    outputs = [program.finish(143) for program in programs]
    assert "same command again" in outputs[0] and not outputs[1]
    assert 2 <= checkpoint.load(LAST)["step"] < 16
    assert main(flags) == 0 and "Resuming the run" in capsys.readouterr().out
    assert_close(learned(finished), learned(own_folder))


def test_too_few_images_for_the_processes(own_folder: Path, flags: list[str]) -> None:
    assert "--batch-size 1" in end_alike(start_ranks(own_folder, 2, *flags, "--batch-size", "1"))
