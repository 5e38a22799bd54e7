"""A run that cannot be lost: bad numbers, full disks, damaged files, changed settings, signals and several processes.

Most of it runs in this process through `main(argv)`; kills of real processes are in test_end_to_end.py and, by the
dozen, in benchmarks/stress.py.
"""

import contextlib
import csv
import itertools
import math
import os
import re
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import config as configs
import dataset
import train
from config import UserError
from diffusion import NoiseSchedule
from run import main
from support import checkpoint, files, plots
from support.optimizer import Optimizer
from support.runtime import Runtime, choose_device, compiled
from tests.conftest import ROOT, TINY, write_set
from tests.processes import assert_close, assert_same, learned, nothing, start, start_ranks, wait_for

RUN = ["--dataset", "idx", "--batch-size", "8", "--epochs", "2", "--timesteps", "100", "--preview", "0",
       "--device", "cpu", *TINY, "--steps", "3", "--num-images", "16"]  # 16 steps
SAMPLE = ["--mode", "sample", "--dataset", "idx", "--device", "cpu", "--steps", "3", "--num-images", "16"]
LAST, PREVIOUS = Path("checkpoints/idx/last.safetensors"), Path("checkpoints/idx/previous.safetensors")
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
        patch.setattr(train, "SAVE_SECONDS", 0.0)
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
    taken = train.training_step

    def with_signal(learn: Any, run: train.Run) -> torch.Tensor:
        if run.step == step - 1:
            monkeypatch.setattr(train, "training_step", taken)
            os.kill(os.getpid(), signal.SIGINT)
        return taken(learn, run)

    monkeypatch.setattr(train, "training_step", with_signal)


def poison(steps: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the loss of these training steps (counted from 1) not finite."""
    loss, count = train.diffusion_loss, itertools.count(1)

    def poisoned(*arguments: Any) -> torch.Tensor:
        return loss(*arguments) * (torch.nan if next(count) in steps else 1)

    monkeypatch.setattr(train, "diffusion_loss", poisoned)


# Numbers


@pytest.mark.parametrize("broken", [
    lambda loss: loss * torch.tensor([1.0] * 7 + [torch.nan]),
    lambda loss: loss + torch.inf,
    lambda loss: 1 + (0 * loss).sqrt(),  # the loss is 1, but its gradient is not a number
], ids=["one nan", "inf", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(broken: Callable[[torch.Tensor], torch.Tensor], flags: list[str],
                                                   tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, cpu = configs.parse(flags), Runtime(torch.device("cpu"), bf16=False, compile=False)
    run = train.new_run(config, cpu, dataset.load(config, "train"), dataset.load(config, "test"))
    loss = train.diffusion_loss

    def step() -> bool:
        """Whether it was taken."""
        return math.isfinite(train.training_step(train.learner(run), run).item())

    def everything() -> str:
        path = tmp_path / "all.safetensors"
        checkpoint.save(path, {"model": run.network.state_dict(), "ema": run.average.state_dict(), "config": {},
                               "optimizer": run.optimizer.state_dict(), "step": 0, "history": {}})
        return checkpoint.load(path)["digest"]

    run.optimizer.set_rate(1e-3)
    assert step()
    before = everything()
    monkeypatch.setattr(train, "diffusion_loss", lambda *arguments: broken(loss(*arguments)))
    assert not step() and everything() == before
    assert all(parameter.grad is None for parameter in run.network.parameters())
    monkeypatch.setattr(train, "diffusion_loss", loss)
    assert step() and everything() != before


def test_skipped_steps_are_counted(own_folder: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch,
                                   capsys: Capture) -> None:
    poison(range(3, 5), monkeypatch)
    assert main(flags) == 0
    assert "16 steps" in (output := capsys.readouterr().out) and "2 steps skipped" in output
    rows = list(csv.DictReader(Path("results/idx/metrics.csv").open()))
    assert [row["skipped"] for row in rows if row["step"] in ("2", "3", "4", "16")] == ["0", "1", "2", "2"]


def test_many_bad_steps_in_a_row_end_the_run_and_leave_the_checkpoint(own_folder: Path, flags: list[str],
                                                                      monkeypatch: pytest.MonkeyPatch,
                                                                      capsys: Capture) -> None:
    flags = [*flags, "--epochs", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "SAVE_SECONDS", 0.0)
        poison(range(4, 1000), patch)
        line = refused(flags, capsys)
    assert "not finite in 20 steps in a row" in line and "step 23" in line and "--lr" in line and str(LAST) in line
    state = checkpoint.load(LAST)
    assert state["step"] == 3 and state["history"]["skipped"] == 0
    # Where the numbers are good again, it goes on.
    assert main(flags) == 0 and "3 steps, 0.4 epochs" in capsys.readouterr().out


def test_a_run_that_never_was_good_has_no_checkpoint(own_folder: Path, flags: list[str],
                                                     monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    poison(range(1000), monkeypatch)
    monkeypatch.setattr(train, "BAD_STEPS", 3)
    assert "last.safetensors" not in refused([*flags, "--epochs", "3"], capsys) and not LAST.exists()


def test_weights_that_are_not_finite_are_not_saved(there: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch,
                                                   capsys: Capture) -> None:
    before = checkpoint.load(LAST)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(Optimizer, "step",
                        lambda self, good: self.parts["muon"].param_groups[0]["params"][0].data.fill_(torch.nan))
    line = refused([*flags, "--epochs", "3"], capsys)
    assert "not finite after step 17" in line and str(LAST) in line
    after = checkpoint.load(LAST)
    assert after["step"] == 16 and all(torch.equal(after["model"][name], weight)
                                       for name, weight in before["model"].items())


def test_weights_that_draw_nonsense_are_called_out(there: Path, capsys: Capture) -> None:
    weights = checkpoint.load(LAST)["ema"]

    def draw_with(prediction: str, **filled: float) -> None:
        def edit(state: dict[str, Any]) -> None:
            state["config"]["diffusion"]["prediction"] = prediction
            state["ema"] = {name: torch.full_like(value, filled.get(name.replace(".", "_"), 0))
                            for name, value in weights.items()}

        change(LAST, edit)

    def said() -> str:
        capsys.readouterr()
        assert main(SAMPLE) == 0
        return capsys.readouterr().out

    draw_with("x0", head_bias=-1)
    assert "all black" in said()
    draw_with("v")  # x0_hat = alpha x_t
    assert "static" in said()
    pictures = {path: path.read_bytes() for path in Path("results/idx").iterdir()}
    draw_with("x0", stem_weight=3e38, norm_weight=1, head_weight=1)
    line = refused(SAMPLE, capsys)
    assert ("stopped being finite at t = " in line
            and pictures == {path: path.read_bytes() for path in Path("results/idx").iterdir()})
    draw_with("x0", head_weight=torch.nan)
    assert "head.weight is not finite" in refused(SAMPLE, capsys)


# Going on


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


def test_a_run_that_was_killed_while_drawing_draws(there: Path, flags: list[str], capsys: Capture) -> None:
    before, samples = LAST.read_bytes(), Path("results/idx/samples.npz")
    pictures = learned(there)["pictures"]
    samples.unlink()
    assert main(flags) == 0 and samples.exists()
    assert main(flags) == 0 and "is finished" in capsys.readouterr().out
    assert LAST.read_bytes() == before and learned(there)["pictures"] == pictures


@pytest.mark.parametrize("schedule, end", [("linear", "falls to zero"), ("constant", "stays there")])
def test_more_epochs_extend_a_run_and_say_what_the_rate_does(schedule: str, end: str, own_folder: Path,
                                                             flags: list[str], capsys: Capture) -> None:
    flags = [*flags, "--lr-schedule", schedule, "--warmup", "0", "--lr", "0.01"]
    assert main([*flags, "--epochs", "1"]) == 0
    short = learned(own_folder)["rows"]
    capsys.readouterr()
    assert main([*flags, "--epochs", "2"]) == 0
    output = capsys.readouterr().out
    assert "Its length is now 2 epochs, no longer 1 epoch:" in output and end in output
    assert ("goes from 0 to 0.005" if schedule == "linear" else "goes from 0.01 to 0.01") in output
    rows = learned(own_folder)["rows"]
    assert rows[:len(short)] == short and rows[-1]["step"] == "16"


def test_minutes_used_are_remembered(own_folder: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that a step moves on by a second."""
    clock, taken = SimpleNamespace(seconds=0.0), train.training_step

    def step(*arguments: Any) -> torch.Tensor:
        clock.seconds += 1
        if clock.seconds == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return taken(*arguments)

    monkeypatch.setattr(train, "training_step", step)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: clock.seconds))
    flags = [*flags, "--minutes", "0.2"]
    assert main(flags) == 130 and checkpoint.load(LAST)["history"]["seconds"] == 4
    clock.seconds += 1000
    assert main(flags) == 0
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
    assert Path("checkpoints/idx/old1-last.safetensors").read_bytes() == old
    assert checkpoint.load(Path("checkpoints/idx/old2-last.safetensors"))["config"]["train"]["lr"] == 0.1
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
    (lambda state: state["optimizer"]["adamw"]["state"][0].update(exp_avg=torch.zeros(3)), "optimizer"),
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
@pytest.mark.parametrize("damage", [lambda data: data[:len(data) // 2], lambda data: b"",
                                    lambda data: data[:9000] + bytes([data[9000] ^ 1]) + data[9001:]],
                         ids=["half", "empty", "bit"])
def test_a_damaged_checkpoint_is_named_kept_and_the_one_before_offered(mode: str, damage: Callable[[bytes], bytes],
                                                                       there: Path, flags: list[str],
                                                                       capsys: Capture) -> None:
    arguments = SAMPLE if mode == "sample" else [*flags, "--epochs", "3"]
    LAST.write_bytes(damage(LAST.read_bytes()))
    files = {path: path.read_bytes() for path in LAST.parent.iterdir()}
    line = refused(arguments, capsys)
    assert str(LAST) in line and str(PREVIOUS) in line
    assert files == {path: path.read_bytes() for path in LAST.parent.iterdir()}
    if mode == "sample":
        assert main([*arguments, "--checkpoint", str(PREVIOUS)]) == 0
    else:
        LAST.unlink()
        assert str(PREVIOUS) in refused(arguments, capsys)  # not a silent start from nothing
        PREVIOUS.rename(LAST)
        assert main(arguments) == 0 and "Going on" in capsys.readouterr().out


def test_what_the_end_needs_is_checked_at_the_start(own_folder: Path, flags: list[str], capsys: Capture) -> None:
    assert "--steps 3" in refused([*flags, "--timesteps", "2"], capsys)
    assert not list(own_folder.iterdir())


def test_code_that_was_edited_since_is_named(there: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch,
                                             capsys: Capture) -> None:
    """An edit of model.py and of the optimizer, as the run that goes on would find it."""
    edited = {**train.code_digests(), "model.py": "0" * 16, "support/optimizer.py": "1" * 16}
    monkeypatch.setattr(train, "code_digests", lambda: edited)
    before, flags = LAST.read_bytes(), [*flags, "--epochs", "3"]
    line = refused(flags, capsys)
    assert "(model.py, support/optimizer.py edited since)" in line and "--fresh" in line and "--same-code" in line
    assert LAST.read_bytes() == before
    assert main([*flags, "--same-code"]) == 0
    assert checkpoint.load(LAST)["history"]["code"] == edited
    assert main(flags) == 0  # which it is from now on


def test_digests_of_code_see_every_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = train.code_digests()
    for name in train.DECISIVE:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes().replace(b"\n", b"\r\n"))  # as git may check it out
    monkeypatch.setattr(train, "ROOT", tmp_path)
    assert train.code_digests() == before
    for name in train.DECISIVE:
        (tmp_path / name).write_bytes((ROOT / name).read_bytes() + b"# more\n")
        changed = train.code_digests()
        assert {other for other in before if before[other] != changed[other]} == {name}
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())


def test_drawing_takes_the_schedule_of_the_checkpoint_not_of_the_code(there: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(SAMPLE) == 0
    images = np.load("results/idx/samples.npz")["arr_0"]
    for module in ("diffusion", "train"):
        monkeypatch.setattr(f"{module}.make_schedule",
                            lambda config: NoiseSchedule(torch.linspace(1, 0.5, 101).double()))
    assert main(SAMPLE) == 0
    assert np.array_equal(np.load("results/idx/samples.npz")["arr_0"], images)


@pytest.mark.parametrize("group, knob", [("model", "dropout"), ("train", "label_dropout")])
def test_a_checkpoint_from_before_a_knob_was_added_is_read(group: str, knob: str, there: Path, flags: list[str],
                                                         capsys: Capture) -> None:
    change(LAST, lambda state: state["config"][group].pop(knob))
    assert not {"sample", "evaluate", "steps"} & checkpoint.load(LAST)["config"].keys()  # nor any of drawing
    for arguments in (SAMPLE, [*flags, "--epochs", "3"]):
        assert main(arguments) == 0
        assert f"older than these settings, which have their defaults: {knob}" in capsys.readouterr().out


def test_a_run_of_the_first_version_is_not_mixed_with_this_one(there: Path, flags: list[str], capsys: Capture) -> None:
    LAST.rename(LAST.with_name("last.pt"))
    PREVIOUS.unlink()
    for arguments in (flags, SAMPLE, ["--mode", "evaluate", "--dataset", "idx"]):
        line = refused(arguments, capsys)
        assert "last.pt" in line and "first version" in line and "--fresh" in line
    assert not LAST.exists()
    assert main([*flags, "--fresh"]) == 0 and LAST.exists() and LAST.with_name("old1-last.pt").exists()


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
    monkeypatch.setattr(train, "SAVE_SECONDS", 0.0)
    with file_size_limit(len(before) // 2):
        line = refused([*flags, "--epochs", "3"], capsys)
    assert str(LAST) in line and LAST.read_bytes() == before
    assert sorted(path.name for path in LAST.parent.iterdir()) == ["last.safetensors", "lock", "previous.safetensors"]
    assert main([*flags, "--epochs", "3"]) == 0 and "16 steps" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("name", ["preview-0000024.png", "metrics.csv", "sample.png", "samples.npz"])
def test_no_room_for_a_picture(name: str, there: Path, flags: list[str], capsys: Capture) -> None:
    """The file is written beside its place first: there lies a device that is full."""
    beside = Path(f"results/idx/.{name}.{os.getpid()}.part")
    beside.symlink_to("/dev/full")
    before = Path("results/idx", name).read_bytes() if not name.startswith("preview") else None
    line = refused([*flags, "--epochs", "3", "--preview", "4"], capsys)
    assert name in line and "No space left" in line
    assert (Path("results/idx", name).read_bytes() if Path("results/idx", name).exists() else None) == before
    assert checkpoint.load(LAST)["step"] in (16, 24) and not beside.exists()
    if name.startswith("preview"):
        assert main([*flags, "--epochs", "3", "--preview", "4"]) == 0


@pytest.mark.parametrize("place", ["results", "results/idx", "checkpoints/idx", "checkpoints/idx/lock/folder"])
def test_a_place_that_is_taken(place: str, own_folder: Path, flags: list[str], capsys: Capture) -> None:
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Path(place).write_text("")
    assert place.removesuffix("/lock/folder") in refused(flags, capsys)
    assert not LAST.exists()


# The device


def test_a_compiler_that_fails_at_any_call_ends_no_run(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def compile_badly(function: Callable[[int], int]) -> Callable[[int], int]:
        def call(x: int) -> int:
            if x > 1:
                raise RuntimeError("no compiler\nfor this shape")
            return 10 * function(x)
        return call

    def half(x: int) -> int:
        return 6 // x

    monkeypatch.setattr(torch, "compile", compile_badly)
    assert compiled(half, Runtime(torch.device("cpu"), bf16=False, compile=False)) is half
    call = compiled(half, Runtime(torch.device("cpu"), bf16=False, compile=True))
    assert [call(1), call(2), call(1)] == [60, 3, 6]
    assert capsys.readouterr().out == "note: torch.compile failed (RuntimeError: no compiler); going on without\n"
    with pytest.raises(ZeroDivisionError):  # its own failures are its own
        call(0)


def test_each_process_has_its_device_or_all_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
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


def hang(*_: Any) -> None:
    print("hanging", file=sys.stderr, flush=True)
    time.sleep(1000)


def test_a_second_ctrl_c_leaves_at_once_and_loses_nothing(own_folder: Path, flags: list[str]) -> None:
    flags = [*flags, "--epochs", "1000"]
    program = start(own_folder, *flags, changes={"train.SAVE_SECONDS": 0.0, "support.plots.save_losses": nothing,
                                                 "os.fsync": fsync_or_hang})
    wait_for(LAST.exists)
    (own_folder / "hang").touch()
    wait_for(lambda: list(own_folder.rglob("*.part")))
    time.sleep(0.1)
    before = LAST.read_bytes()
    program.signal(signal.SIGINT)
    wait_for(lambda: "stopping after this step" in program.errors)
    assert program.running()
    program.signal(signal.SIGINT)
    program.finish(130, seconds=60)
    assert LAST.read_bytes() == before
    (own_folder / "hang").unlink()
    step = checkpoint.load(LAST)["step"]
    again = start(own_folder, *flags, changes={"train.SAVE_SECONDS": 0.0, "support.plots.save_losses": nothing})
    wait_for(lambda: f"Going on with the run in checkpoints/idx ({step:,} steps" in again.output)
    wait_for(lambda: LAST.read_bytes() != before)
    again.signal(signal.SIGTERM)
    again.finish(143)
    assert not list(LAST.parent.glob(".*.part"))


@pytest.mark.parametrize("mode", ["sample", "evaluate"])
def test_ctrl_c_ends_the_other_modes_too(mode: str, there: Path) -> None:
    changes = {"yardstick.load_extractor": hang} if mode == "evaluate" else {}
    program = start(there, "--mode", mode, "--name", "idx", "--dataset", "generated", "--device", "cpu",
                    "--num-images", "100000", "--steps", "100", changes=changes)
    wait_for(lambda: re.search(r" [1-9]\d*/\d", program.errors) or "hanging" in program.errors)
    program.signal(signal.SIGINT)
    assert not program.finish(130).count("Time:") and not program.lines()


# Several processes


def draw_badly(trained: Any, order: Any, *_: Any) -> torch.Tensor:
    if os.environ["RANK"] == "1":
        raise UserError("the second process has a problem")
    return torch.zeros(len(order.indices), 1, 28, 28)


def end_alike(programs: list[Any]) -> str:
    """The one line with which all processes ended."""
    for program in programs:
        program.finish(2, seconds=60)
    (line,), *others = [program.lines() for program in programs]
    assert others == [[]] * (len(programs) - 1)
    return line


def test_all_processes_leave_together_with_one_line(there: Path, flags: list[str]) -> None:
    changes = {"drawing._draw_chunk": draw_badly}
    assert "second process" in end_alike(start_ranks(there, 2, *SAMPLE, "--num-images", "130", changes=changes))
    Path("results/idx/samples.npz").unlink()
    Path("results/idx/samples.npz").mkdir()
    assert "samples.npz" in end_alike(start_ranks(there, 2, *SAMPLE))
    with files.lock(LAST.parent):
        assert "another run" in end_alike(start_ranks(there, 2, *flags, "--epochs", "3"))
    LAST.write_bytes(b"")
    assert "last.safetensors" in end_alike(start_ranks(there, 2, *flags, "--epochs", "3"))


def test_a_run_stopped_on_two_processes_goes_on_on_one(finished: Path, own_folder: Path, flags: list[str],
                                                       capsys: Capture) -> None:
    programs = start_ranks(own_folder, 2, *flags, "--preview", "1",
                           changes={"train.SAVE_SECONDS": 0.0, "support.plots.save_losses": nothing,
                                    "train.BAD_STEPS": 20})
    wait_for(Path("results/idx/preview-0000002.png").exists)
    programs[1].signal(signal.SIGTERM)  # whichever of them gets it
    outputs = [program.finish(143) for program in programs]
    assert "same command again" in outputs[0] and not outputs[1]
    assert 2 <= checkpoint.load(LAST)["step"] < 16
    assert main(flags) == 0 and "Going on" in capsys.readouterr().out
    assert_close(learned(finished), learned(own_folder))


def test_too_few_images_for_the_processes(own_folder: Path, flags: list[str]) -> None:
    assert "--batch-size 1" in end_alike(start_ranks(own_folder, 2, *flags, "--batch-size", "1"))
