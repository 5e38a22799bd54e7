"""What a person sees of work that takes long: a bar in a terminal, lines in a file, a widget in a notebook."""

import builtins
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import training.log
from config import UserError
from evaluation.experiment import Training, minutes_left
from evaluation.reference import FEWEST
from run import main
from support.console import progress_bar, say
from support.settings import EXAMPLES, parse
from tests.conftest import ROOT, TINY, write_set
from tests.processes import start

RUN = ["--mode", "train", "--dataset", "idx", "--epochs", "2", "--batch-size", "8", "--timesteps", "100", "--preview",
       "0", "--device", "cpu", *TINY, "--steps", "3", "--num-images", "16", "--name", "mine",
       "--data-dir", "data"]  # 16 steps
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("TQDM", "COLUMNS"))}
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the images of RUN."""
    write_set(tmp_path / "data", train=64, test=32)
    return tmp_path


def in_terminal(folder: Path, command: list[str], columns: int = 80, status: int = 0, **environment: str) -> str:
    """All that a command writes to a terminal; it has to end with that status."""
    fcntl, pty, struct, termios = map(pytest.importorskip, ("fcntl", "pty", "struct", "termios"))
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen([sys.executable, *command], cwd=folder, stdin=terminal, stdout=terminal, stderr=terminal,
                               env=ENVIRONMENT | environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    os.close(terminal)
    said = b""
    while True:
        try:
            said += os.read(master, 4096)
        except OSError:  # the terminal's end
            break
    os.close(master)
    assert process.wait(60) == status, said
    return said.decode().replace("\r\n", "\n")


def test_a_terminal_shows_bars_that_end_full(folder: Path) -> None:
    said = in_terminal(folder, [str(ROOT / "run.py"), *RUN])
    bars = [part for line in said.splitlines() for part in line.split("\r") if "%|" in part]
    assert re.match(r"100%\|█+\| \d\d:\d\d<00:00, epoch 2.0, [\d,]+ images/s, loss \d", bars[-2]), bars
    assert re.match(r"sampling: +\d+%\|.*\| \d+/16 \[", bars[-1]) and all(len(bar) <= 80 for bar in bars)
    assert "appear in results/mine/ as it\ntrains.\n" in said and " remaining\n" not in said
    assert re.search("\n *\r?Training is finished", said), "on a line of its own"


def test_what_is_said_stands_above_the_bar(tmp_path: Path) -> None:
    script = ("from support.console import progress_bar, say\nwith progress_bar(total=3, desc='bar') as bar:\n"
              " bar.update(1); say('a warning'); bar.update(2)")
    assert re.search("bar: .*\r *\ra warning\n\r?bar: ", in_terminal(tmp_path, ["-c", script]))


def test_a_terminal_gets_prose_in_its_width_with_words_whole(folder: Path) -> None:
    """Of lines, an error and --help's examples; a path longer than a line stays whole, and so do tables and lists."""
    path = f"/nowhere/{'folder-' * 12}"
    said = in_terminal(folder, [str(ROOT / "run.py"), *RUN[:4], "--data-dir", path], columns=60, status=2)
    assert said.startswith("error:\n") and said.count("\n") > 2
    assert max(len(line) for line in said.splitlines() if path not in line) <= 60 and f"{path}/train-images" in said
    program = start(folder, "--dataset", "idx", "--data-dir", path)
    program.finish(2)
    assert program.errors == said.replace("\n", " ").strip() + "\n", "whole in a file"
    assert max(map(len, EXAMPLES.splitlines())) <= 60
    table = f"  {path}\nmetric{' ' * 60}1.00x\n{'a ' * 40}"
    script = f"from support.console import say; say({table!r})"
    assert in_terminal(folder, ["-c", script], columns=60) == f"{table[:-80]}{'a ' * 29}a\n{'a ' * 9}a\n"


@pytest.mark.parametrize("variable", ["", "TQDM_DISABLE"])
def test_a_file_has_no_bar_but_a_line_at_each_log_point(variable: str, folder: Path) -> None:
    """Nor has a terminal in which tqdm is switched off."""
    if variable:
        said = in_terminal(folder, [str(ROOT / "run.py"), *RUN], TQDM_DISABLE="1")
    else:
        program = start(folder, *RUN)
        said = program.finish()
        assert program.errors == ""
        note = r"^note: all metrics of --mode evaluate take 400 .* class and 200 test images; here are \d and 32\.$"
        assert re.search(note, said, re.MULTILINE) and training.log.MEASURED == (2 * FEWEST, FEWEST)
    assert "%|" not in said and "\r" not in said
    lines = re.findall(r"^epoch \d\.\d, [\d,]+ images/s, loss \d\.\d{4}, \d\d:\d\d remaining$", said, re.MULTILINE)
    rows = (folder / "results/mine/metrics.csv").read_text().splitlines()[1:]
    assert len(lines) == len(rows) == 8


def test_tqdms_variables_hold(tmp_path: Path) -> None:
    script = ("import sys; from support.console import progress_bar; bar = progress_bar(total=3, leave=False);"
              "print(bar.mininterval, bar.ncols, bar.leave)")
    values = {"TQDM_MININTERVAL": "7", "TQDM_NCOLS": "33", "TQDM_LEAVE": "1"}
    assert "7.0 33 True" in in_terminal(tmp_path, ["-c", script], **values)
    assert "0.5 79 False" in in_terminal(tmp_path, ["-c", script])
    assert progress_bar(False, total=3).disable and progress_bar(total=3).disable  # pytest's stderr is no terminal


def test_a_resumed_run_shows_its_own_speed_and_the_time_that_remains(monkeypatch: pytest.MonkeyPatch,
                                                                     capsys: Capture) -> None:
    """500 steps in 1000 seconds were done before; 10 in 5 seconds now."""
    clock = SimpleNamespace(seconds=70.0)
    monkeypatch.setattr(training.log, "time", SimpleNamespace(perf_counter=lambda: clock.seconds))
    state = SimpleNamespace(config=parse(["--batch-size", "64"]), step=500, history={"seconds": 1000.0},
                            runtime=SimpleNamespace(rank=0, say=say))
    state.progress, state.epoch = lambda options: state.step / 1000, lambda step: step / 100
    display = training.log.Display(state)
    assert display.bar.n == 0.5
    clock.seconds, state.step, state.history["seconds"], display.steps = 76.0, 510, 1005.0, 10
    display.show(0.25, log_now=True)
    assert capsys.readouterr().out == "epoch 5.1, 128 images/s, loss 0.2500, 04:54 remaining\n"  # 490 steps of 0.6 s


def test_an_experiment_says_for_how_long_it_trains() -> None:
    def to_go(flags: str, trainings: int, seconds: list[float], done: float = 0.0) -> str:
        return minutes_left([Training("unchanged", parse(flags.split()), done)] * trainings, seconds)

    assert to_go("--minutes 5", 4, []) == "; about 20 minutes of training to go"
    assert to_go("--minutes 0.05", 2, [], 0.5) == "; about 1 minute of training to go", "never 0"
    assert to_go("--epochs 2", 3, []) == "; the first training shows how long one takes"
    assert to_go("--epochs 2", 3, [100, 140]) == "; about 6 minutes of training to go"
    assert to_go("--epochs 2", 0, []) == ""


def test_a_notebook_gets_errors_and_stops_and_no_status(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtins, "get_ipython", lambda: None, raising=False)
    assert main(["--mode", "sample", "--checkpoint", "pretrained", "--steps", "1", "--num-images", "1"]) is None
    with pytest.raises(UserError, match="--mode") as caught:
        main(["--mode", "sampel"])
    assert caught.value._render_traceback_() == [f"error: {caught.value}"]
    monkeypatch.setattr("training.loop.main", lambda config, runtime: 130)
    with pytest.raises(KeyboardInterrupt):
        main([])


@pytest.mark.parametrize("widgets", [True, False])
def test_cells_of_a_notebook(widgets: bool, folder: Path) -> None:
    """tqdm's own bar, which is one widget; without ipywidgets a few lines. An error is one line, and ends the cell."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("ipywidgets")
    hide = "" if widgets else "sys.modules['ipywidgets'] = None\n"
    cells = [f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{hide}import run", f"run.main({RUN!r})",
             "run.main(['--mode', 'train', '--epochs', '0'])"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = nbclient.NotebookClient(notebook, timeout=120, allow_errors=True, kernel_name="python3",
                                     resources={"metadata": {"path": str(folder)}})
    client.execute()
    first, training_outputs, failed = (cell.outputs for cell in notebook.cells)
    assert not first
    texts = "".join(output.text for output in training_outputs if output.output_type == "stream")
    shown = [output for output in training_outputs if output.output_type == "display_data"]
    assert {output.output_type for output in training_outputs} <= {"stream", "display_data"}, "no stray 0"
    assert "Training is finished" in texts and "%|" not in texts and texts.count("\n") < 30
    assert len(shown) == (2 if widgets else 0) and ("remaining\n" in texts) == (not widgets)
    assert failed[-1].output_type == "error" and failed[-1].ename == "UserError"
    assert len(failed[-1].traceback) == 1 and failed[-1].traceback[0].startswith("error: --epochs 0: ")
