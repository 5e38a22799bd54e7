"""As on Windows: the program runs where os and signal lack what Windows lacks, and however Python is started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY

RUN = ["--mode", "train", "--dataset", "generated", "--minutes", "0.01", "--preview", "10", "--device", "cpu", *TINY,
       "--steps", "2", "--num-images", "16", "--name", "mine"]
# Packages choose their own ways for each system, so they are imported first.
PREAMBLE = """
import getpass, os, platform, signal, sys
import filelock, matplotlib.figure, matplotlib.backends.backend_agg, PIL.Image, safetensors.torch, tqdm.auto, tyro
import torch, torch.distributed, torch.optim.swa_utils, torchvision
for name in ("uname", "O_DIRECTORY", "O_NOFOLLOW", "getuid", "geteuid", "getgid", "getpgid", "setsid", "fork",
             "forkpty", "mkfifo", "chown", "killpg", "sched_getaffinity", "sysconf", "statvfs", "ttyname", "WNOHANG"):
    delattr(os, name)
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGQUIT", "SIGALRM", "SIGCHLD", "SIGPIPE", "pthread_sigmask"):
    delattr(signal, name)
for name in ("fcntl", "resource", "pwd", "grp", "termios", "pty", "tty"):
    sys.modules[name] = None
real_open = os.open
def open_no_folder(path, flags, *rest, **named):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied")
    return real_open(path, flags, *rest, **named)
os.open = open_no_folder
import run
status = run.main(sys.argv[1:])
assert status == 0, status
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there it is so anyway")
def test_training_and_sampling_without_what_windows_lacks(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("USER", "LOGNAME", "USERNAME")}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252", "OMP_NUM_THREADS": "1"}
    for arguments in (RUN, ["--mode", "sample", "--name", "mine", "--steps", "2", "--write", "42"]):
        process = subprocess.run([sys.executable, "-c", PREAMBLE, *arguments], cwd=tmp_path, capture_output=True,
                                 env=environment, timeout=120)
        assert process.returncode == 0, process.stderr.decode("cp1252")[-2000:]
        assert b"WARNING" not in process.stdout, process.stdout
    assert {path.name for path in (tmp_path / "results/mine").iterdir()} >= {
        "metrics.csv", "sample.png", "process.gif", "number.png"}
    assert (tmp_path / "checkpoints/mine/last.safetensors").exists()


@pytest.mark.parametrize("flag, variable", [((), {"PYTHONSAFEPATH": "1"}), (("-I",), {})])
def test_python_that_leaves_out_the_scripts_folder(flag: tuple[str, ...], variable: dict[str, str],
                                                   tmp_path: Path) -> None:
    process = subprocess.run([sys.executable, *flag, str(ROOT / "run.py"), "--mode", "train", "--epochs", "0"],
                             cwd=tmp_path, text=True, capture_output=True, env={**os.environ, **variable})
    assert process.returncode == 2 and process.stderr.startswith("error: --epochs 0")
