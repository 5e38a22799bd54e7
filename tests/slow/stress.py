"""Kills real runs at random points and compares what they learn with a run that nothing interrupted, bit for bit.

    python tests/slow/stress.py --kills 20

Also: stop signals, and two and four processes as torchrun starts them. It saves after every step, so that many kills
fall into a save; data and network are tiny. Prints counts, and exits with status 1 on any difference.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import UserError
from support import checkpoint
from tests.conftest import TINY, write_set
from tests.processes import Program, assert_close, assert_same, learned, start, start_ranks, wait_for

EPOCHS = 8  # of 8 steps each
FLAGS = ["--dataset", "idx", "--data-dir", "../data", "--epochs", str(EPOCHS), "--batch-size", "32", "--device", "cpu",
         "--timesteps", "100", "--preview", "4", "--steps", "3", "--num-images", "16", *TINY]
OFTEN = {"training.loop.SAVE_SECONDS": 0.0}  # a save after every step
PATIENCE = 900  # seconds after which a process has hung, on a busy machine too
Learned = dict[str, Any]


class Run:
    """A folder, and the processes that train in it."""

    def __init__(self, place: Path, name: str) -> None:
        self.folder = place / name
        self.folder.mkdir()
        self.last = self.folder / "checkpoints/idx" / checkpoint.LAST

    def start(self, often: bool = True) -> Program:
        return start(self.folder, *FLAGS, changes=OFTEN if often else None)

    def start_ranks(self, world: int) -> list[Program]:
        return start_ranks(self.folder, world, *FLAGS, changes=OFTEN)

    def steps(self) -> int:
        """In the last save, which has to be whole."""
        return checkpoint.load(self.last)["step"] if self.last.exists() else 0

    def parts(self) -> list[Path]:
        """The files of saves under way, or of a save that a kill has cut off."""
        return list(self.last.parent.glob(".*.part"))

    def wait_for_step(self, step: int, program: Program) -> None:
        until(lambda: self.steps() >= step, program)


def until(condition: Callable[[], Any], program: Program, pause: float = 0.02) -> None:
    """Waits until the condition holds or the process has ended."""
    wait_for(lambda: condition() or not program.running(), PATIENCE, pause)


def end(program: Program) -> int:
    """Waits for the end, and returns the exit status."""
    wait_for(lambda: not program.running(), PATIENCE)
    return program.process.exitcode


def survive_kills(place: Path, expected: Learned, kills: int = 20) -> str:
    """kill -9 at random moments of as many runs as it takes, every second one inside a save."""
    done = inside = runs = 0
    while done < kills:
        runs += 1
        run = Run(place, f"killed-{runs}")
        program = run.start()
        while done < kills:
            run.wait_for_step(run.steps() + 1, program)
            time.sleep(random.expovariate(1 / 0.15))
            if done % 2:
                until(run.parts, program, pause=0.0005)
                time.sleep(random.uniform(0, 0.0005))
            if not program.running():
                break
            program.kill()
            done, inside = done + 1, inside + bool(run.parts())
            run.steps()  # raises unless it is whole
            program = run.start()
        program.finish(seconds=PATIENCE)
        assert_same(expected, learned(run.folder))
        assert not run.parts(), "a half-written checkpoint was left behind"
        shutil.rmtree(run.folder)
    many = f"{runs} run{'s' * (runs > 1)}"
    return f"{done} kills survived, {inside} of them inside a save, in {many}: all bitwise the same"


def stop(run: Run, number: int) -> tuple[int, str]:
    """Sends it a signal soon after it began; returns the exit status and what it said."""
    program = run.start(often=False)
    until(lambda: "Training" in program.output, program)
    time.sleep(random.uniform(0, 0.7))
    program.signal(number)
    return end(program), program.output


def survive_stops(place: Path, expected: Learned) -> str:
    """Ctrl-C and SIGTERM in turn, until the run is finished."""
    run, stops, status = Run(place, "stopped"), 0, 1
    while stops < 4 and status != 0:
        number = (signal.SIGINT, signal.SIGTERM)[stops % 2]
        status, said = stop(run, number)
        if "Stopped after step" in said:
            assert status == 128 + number, f"exit status {status} after signal {number}"
            stops += 1
        else:  # it came before the first step, or while sampling
            assert status in (0, 130, -signal.SIGTERM), f"exit status {status}"
    run.start(often=False).finish(seconds=PATIENCE)
    assert_same(expected, learned(run.folder))
    return f"{stops} stop signals survived, saved at once, and bitwise the same"


def several_processes(place: Path, expected: Learned) -> str:
    """Two and four processes learn what one does; a run saved on two resumes on four, and then on one."""
    apart = []
    for world in (2, 4):
        run = Run(place, f"world-{world}")
        for program in run.start_ranks(world):
            program.finish(seconds=PATIENCE)
        apart.append(assert_close(expected, learned(run.folder)))
    run = Run(place, "moving")
    for world, step in ((2, 16), (4, 32)):
        programs = run.start_ranks(world)
        run.wait_for_step(step, programs[0])
        for program in programs:
            program.signal(signal.SIGTERM)
        said = "".join(program.finish(128 + signal.SIGTERM, PATIENCE) for program in programs)
        assert said.count("Stopped after step") == 1, said
    assert "Resuming the run" in run.start().finish(seconds=PATIENCE)
    apart.append(assert_close(expected, learned(run.folder)))
    return f"2 and 4 processes learn what 1 does, and a run moves from 2 to 4 to 1: losses equal to {max(apart):.0e}"


PARTS: dict[str, Callable[..., str]] = {"kills": survive_kills, "stops": survive_stops, "processes": several_processes}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="every random number follows from it")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", choices=PARTS, help="one part of it")
    options = parser.parse_args(argv)
    random.seed(options.seed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing stays behind
    os.environ["PYTHONWARNINGS"] = "ignore"  # of semaphores that those killed leave behind
    began, failed = time.monotonic(), False
    with tempfile.TemporaryDirectory(prefix="stress-") as folder:
        place = Path(folder)
        write_set(place / "data")
        straight = Run(place, "straight")
        straight.start(often=False).finish(seconds=PATIENCE)
        for name in [options.only] if options.only else PARTS:
            try:
                count = {"kills": options.kills} if name == "kills" else {}
                said = PARTS[name](place, learned(straight.folder), **count)
            except (AssertionError, UserError) as error:
                failed, said = True, f"FAILED: {error}"
            print(f"{name}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
