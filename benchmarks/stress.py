"""Kills real runs at random points and compares what they learn with a run that nothing interrupted, bit for bit.

    python benchmarks/stress.py --kills 20

Also: a disk that is full, two and four processes of torchrun, and one of them dying. It saves after every step, so that
many kills fall into a save; data and network are tiny. Prints counts, and exits with status 1 on any difference.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if sys.argv[1:2] == ["--as-run"]:  # this file in place of run.py, with a save after every step
    import train
    from run import main

    train.SAVE_SECONDS = 0.0
    sys.exit(main(sys.argv[2:]))

import checkpoint  # noqa: E402
from config import UserError  # noqa: E402
from tests.conftest import TINY, write_set  # noqa: E402
from tests.processes import assert_close, assert_same, learned  # noqa: E402

FLAGS = ["--dataset", "idx", "--data-dir", "data", "--batch-size", "32", "--timesteps", "100", "--preview", "4", "--device", "cpu",
         "--steps", "3", "--num-images", "16", *TINY]
EPOCHS = 8  # of 8 steps each
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
LAST = Path("checkpoints/idx/last.pt")
PATIENCE = 900  # seconds after which a process has hung, on a busy machine too
STARTED: list[subprocess.Popen] = []


class Failure(Exception):
    """What should have been so, and was not."""


class Run:
    """A folder with the data, and the processes that train in it."""

    def __init__(self, place: Path, name: str, epochs: int = EPOCHS) -> None:
        self.folder = place / name
        self.folder.mkdir()
        (self.folder / "data").symlink_to(place / "data")
        self.flags = [*FLAGS, "--epochs", str(epochs)]

    def start(self, processes: int = 1, often: bool = True) -> subprocess.Popen:
        command = [str(Path(__file__).resolve()), "--as-run"] if often else [str(ROOT / "run.py")]
        if processes > 1:
            command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *command]
        with open(self.folder / "log", "w") as log:
            STARTED.append(subprocess.Popen([sys.executable, *command, *self.flags], cwd=self.folder, env=ENVIRONMENT, stdout=log,
                                            stderr=subprocess.STDOUT))
        return STARTED[-1]

    def said(self) -> str:
        return (self.folder / "log").read_text()

    def finish(self, process: subprocess.Popen, status: int = 0) -> str:
        found = process.wait(PATIENCE)
        if found != status:
            raise Failure(f"exit status {found}, not {status}:\n{self.said()[-3000:]}")
        return self.said()

    def saved(self) -> int:
        """When the last save was; 0: never."""
        return (self.folder / LAST).stat().st_mtime_ns if (self.folder / LAST).exists() else 0

    def steps(self) -> int:
        """In the last save, which has to be whole."""
        return checkpoint.load(self.folder / LAST)["step"] if self.saved() else 0

    def wait_for_save(self, process: subprocess.Popen) -> None:
        before = self.saved()
        wait_for(lambda: self.saved() != before, process)

    def wait_for_step(self, process: subprocess.Popen, step: int) -> None:
        wait_for(lambda: self.steps() >= step, process)

    def parts(self) -> list[Path]:
        """The files of saves under way, or of a save that a kill has cut off."""
        return list((self.folder / LAST.parent).glob(".*.part"))


def check(ok: Any, what: str) -> None:
    if not ok:
        raise Failure(what)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen, pause: float = 0.02) -> None:
    """Until the condition holds or the process has ended."""
    end = time.monotonic() + PATIENCE
    while not condition() and process.poll() is None:
        check(time.monotonic() < end, "a process neither went on nor ended")
        time.sleep(pause)


def survive_kills(place: Path, straight: Run, kills: int, rng: random.Random) -> str:
    """kill -9 at random moments of as many runs as it takes, every second one inside a save."""
    done = inside = runs = most = 0
    expected = learned(straight.folder)
    while done < kills:
        runs += 1
        run = Run(place, f"killed-{runs}")
        killed_here = 0
        while True:
            process = run.start()
            if done == kills:
                break
            run.wait_for_save(process)
            time.sleep(rng.expovariate(1 / 0.15))
            if done % 2:
                wait_for(run.parts, process, pause=0.0005)
                time.sleep(rng.uniform(0, 0.0005))
            if process.poll() is not None:
                break
            process.kill()
            process.wait()
            done, killed_here, inside = done + 1, killed_here + 1, inside + bool(run.parts())
            run.steps()  # raises unless it is whole
        run.finish(process)
        assert_same(expected, learned(run.folder))
        check(not run.parts(), "a half-written checkpoint was left behind")
        most = max(most, killed_here)
        shutil.rmtree(run.folder)
    return f"{done} kills survived, {inside} of them inside a save, in {runs} runs with up to {most} kills each: all bitwise the same"


def survive_stops(place: Path, straight: Run, rng: random.Random) -> str:
    """Ctrl-C and SIGTERM in turn, until the run is finished."""
    run, stops = Run(place, "stopped"), 0
    while True:
        process = run.start(often=False)
        wait_for(lambda: "Training" in run.said(), process)
        time.sleep(rng.uniform(0.2, 1.5))
        number = (signal.SIGINT, signal.SIGTERM)[stops % 2]
        process.send_signal(number)
        status = process.wait(PATIENCE)
        if "Stopped after step" not in run.said():  # it came before the first step, or while drawing
            check(status in (0, 130, -signal.SIGTERM), f"exit status {status}")
            if stops >= 4 or status == 0:
                break
            continue
        check(status == 128 + number, f"exit status {status} after signal {number}")
        stops += 1
        if stops >= 4:
            break
    run.finish(run.start(often=False))
    assert_same(learned(straight.folder), learned(run.folder))
    return f"{stops} stop signals survived, saved at once, and bitwise the same"


def several_processes(place: Path, straight: Run) -> str:
    """Two and four processes learn what one does; runs saved on two go on on four and on one."""
    expected, apart = learned(straight.folder), []
    for world in (2, 4):
        run = Run(place, f"world-{world}")
        run.finish(run.start(world))
        apart.append(assert_close(expected, learned(run.folder)))
    run = Run(place, "moving")
    for world, epochs in ((2, 2), (4, 4)):
        process = run.start(world)
        run.wait_for_step(process, 8 * epochs)
        os.kill(process.pid, signal.SIGTERM)  # torchrun passes it on
        process.wait(PATIENCE)
        check(run.said().count("Stopped after step") == 1, f"no word of a save:\n{run.said()[-3000:]}")
    check("Going on" in run.finish(run.start()), "it did not go on")
    apart.append(assert_close(expected, learned(run.folder)))
    return f"2 and 4 processes learn what 1 does, and a run moves from 2 to 4 to 1: losses equal to {max(apart):.0e}"


def dying_rank(place: Path, straight: Run, deaths: int, rng: random.Random) -> str:
    """kill -9 of one process of two ends both, with a checkpoint behind them, and the same command carries on."""
    run = Run(place, "dying")
    for death in range(deaths):
        process = run.start(2)
        target = run.steps() + 5
        run.wait_for_step(process, target)
        time.sleep(rng.uniform(0, 0.3))
        workers = children(process.pid)
        check(len(workers) == 2, f"{len(workers)} workers")
        os.kill(workers[death % 2], signal.SIGKILL)
        began = time.monotonic()
        check(process.wait(PATIENCE) != 0, "torchrun took a death for success")
        check(time.monotonic() - began < PATIENCE / 2, "the other process went on for long")
        check(run.steps() >= target, "no checkpoint was left behind")
        check(not [pid for pid in workers if is_alive(pid)], "a process was left behind")
    run.finish(run.start(2))
    apart = assert_close(learned(straight.folder), learned(run.folder))
    return f"{deaths} deaths of one process in two survived: losses equal to {apart:.0e}"


def full_disk(place: Path, straight: Run, rng: random.Random) -> str:
    """A disk that fills up while it trains: one line, status 2, the last checkpoint whole; with room again, it goes on."""
    failures = 0
    with small_disk(place) as disk:
        run = Run(place, "full")
        for name in ("checkpoints", "results"):
            (disk / name).mkdir()
            (run.folder / name).symlink_to(disk / name)
        for _ in range(4):
            process, reached = run.start(), run.steps() + 3
            run.wait_for_step(process, reached)
            time.sleep(rng.uniform(0, 0.2))
            with filled(disk):
                status = process.wait(PATIENCE)
            lines = [line for line in run.said().splitlines() if line.startswith("error: ")]
            check(status == 2 and len(lines) == 1 and "Traceback" not in run.said(), f"status {status}:\n{run.said()[-3000:]}")
            check("No space left" in lines[0], lines[0])
            check(run.steps() >= reached, "a checkpoint was lost")
            failures += 1
        run.finish(run.start())
        assert_same(learned(straight.folder), learned(run.folder))
    return f"{failures} times out of space, each with one line and a whole checkpoint: bitwise the same in the end"


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of 16 MB, where one can be mounted."""
    disk = place / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True).returncode:
        raise Skipped("no small disk can be mounted here (it takes Linux and root)")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


class Skipped(Exception):
    """What this machine can't do."""


@contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Leaves no room on it."""
    ballast = disk / "ballast"
    with suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    yield
    ballast.unlink()


def children(pid: int) -> list[int]:
    """Worker processes of torchrun, by rank."""
    found = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split("\n")
    return [int(line.split()[0]) for line in found if line.strip() and int(line.split()[1]) == pid]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["kills", "stops", "processes", "deaths", "disk"], help="one part of it")
    options = parser.parse_args(arguments)
    rng, began, failed = random.Random(options.seed), time.monotonic(), 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing stays behind
    with tempfile.TemporaryDirectory(prefix="stress-") as folder:
        place = Path(folder)
        write_set(place / "data")
        straight = Run(place, "straight")
        straight.finish(straight.start(often=False))
        parts: dict[str, Callable[[], str]] = {
            "kills": lambda: survive_kills(place, straight, options.kills, rng), "stops": lambda: survive_stops(place, straight, rng),
            "processes": lambda: several_processes(place, straight), "deaths": lambda: dying_rank(place, straight, 2, rng),
            "disk": lambda: full_disk(place, straight, rng)}
        for name, part in parts.items():
            if options.only in (None, name):
                try:
                    said = part()
                except Skipped as reason:
                    said = f"skipped: {reason}"
                except (Failure, AssertionError, UserError, subprocess.TimeoutExpired) as error:
                    failed, said = failed + 1, f"FAILED: {error}"
                finally:
                    for process in STARTED:
                        process.terminate()
                        process.wait()
                print(f"{name}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
