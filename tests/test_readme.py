"""The readme's commands, snippets, flags, files and names do what it says."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from config import Config
from support import checkpoint, selection, settings
from tests.conftest import ROOT, TINY

README = (ROOT / "readme.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(word: str) -> str:
    """The one snippet with that word in it."""
    (found,) = [text for text in BLOCKS if word in text]
    return found


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with every change that the readme tells to make."""
    copy = tmp_path_factory.mktemp("changed")
    for name in ("training", "support", "evaluation", "dataset/generated"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, copy)
    (schedule,) = re.findall(r'schedule: Literal\["cosine", "linear", "sigmoid"\] = "cosine"', README)
    (weighting,) = re.findall(r'`("soft-min-snr": .*)`', README)
    (stage,) = re.findall(r"`(self\.block = .*)`", README)
    # Where each change goes: found also in a project that has ideas of its own.
    changes = {
        "diffusion.py": [("    else:\n        raise", f"{block('log-SNR')}\\g<0>"),
                         (r"clamp\(max=MIN_SNR_GAMMA\)", rf"\g<0>, {weighting}")],
        "config.py": [(r'schedule: Literal\[.*\] = "cosine"', schedule),
                      (r'(weighting: Literal\[.*)\]', r'\1, "soft-min-snr"]'),
                      (r'(sampler: Literal\[.*)\]', r'\1, "renoise"]'),
                      ("    dropout: Ann", '    block: Literal["residual", "light"] = "residual"  # kind\n\\g<0>')],
        "model.py": [(r"class Attention\(", f"{block('LightBlock')}\n\n\\g<0>"), (r"self\.block = .*", stage)],
        "samplers.py": [("SAMPLERS: dict", f"{block('def renoise')}\n\n\\g<0>"),
                        ('"sa": sa', '\\g<0>, "renoise": renoise')]}
    for name, edits in changes.items():
        content = (copy / name).read_text("utf-8")
        for before, after in edits:
            content, times = re.subn(before, after, content)
            assert times == 1, before
        (copy / name).write_text(content, "utf-8")
    return copy


def test_each_idea_can_be_trained_and_sampled_from(changed: Path) -> None:
    flags = ["--mode", "train", "--schedule", "sigmoid", "--weighting", "soft-min-snr", "--block", "light",
             "--sampler", "renoise", "--minutes", "0.02", "--name", "mine-0", "--dataset", "generated",
             "--preview", "0", "--steps", "3", "--num-images", "4", *TINY]
    process = subprocess.run([sys.executable, "run.py", *flags], cwd=changed, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    state = checkpoint.load(changed / "checkpoints/mine-0/last.safetensors")
    alpha_bar = state["history"]["alpha_bar"]
    assert alpha_bar.shape == (1001,) and alpha_bar[0] == 1 and alpha_bar[-1] < 2e-4 and (alpha_bar.diff() < 0).all()
    steps = (alpha_bar[1:] / (1 - alpha_bar[1:])).log().diff()
    assert (steps + 18 / 999).abs().max() < 1e-9
    assert state["model"]["down.0.0.block.conv_out.weight"].shape == (8, 8, 1, 1)
    assert (changed / "results/mine-0/samples.npz").is_file()


def test_a_new_knob_leaves_the_shipped_weights_as_they_are(changed: Path) -> None:
    (changed / "checkpoints").mkdir(exist_ok=True)
    shutil.copy(selection.PRETRAINED, changed / "checkpoints")
    flags = ["--mode", "sample", "--checkpoint", "pretrained", "--num-images", "1", "--steps", "2"]
    process = subprocess.run([sys.executable, "run.py", *flags], cwd=changed, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]


def test_script_example() -> None:
    names: dict = {}
    exec(block("load_model").replace("path/to/this/folder", str(ROOT)), names)
    assert names["images"].shape == (30, 28, 28) and names["images"].dtype == np.uint8
    assert len(names["trajectory"].timesteps) == 26 and names["trajectory"].states.shape == (26, 30, 28, 28)


def test_commands_in_the_readme_are_accepted() -> None:
    commands = re.findall(r"python run\.py (-[^`\n;#]+)", README.replace("$s", "0").replace("\\\n", ""))
    assert len(commands) >= 8
    for command in commands:
        settings.parse(shlex.split(command.replace("--schedule sigmoid", "")))  # which the reader adds


def test_flags_files_and_names_in_the_readme_exist() -> None:
    known = set(settings.KNOBS) | {f"no_{name}" for name in settings.KNOBS} | {"nproc_per_node", "help", "signal"}
    for flag in re.findall(r"`[^`\n]*?--([a-z][a-z-]+)", README):
        assert flag.replace("-", "_") in known, flag
    for name in re.findall(r"`(?:\./)?((?:[a-z_]+/)*[a-z_]+\.py)", README):
        assert (ROOT / name).is_file(), name
    source = "".join(path.read_text("utf-8") for path in ROOT.glob("*.py"))
    for name in ("make_schedule", "add_noise", "diffusion_loss", "loss_weights", "Stage", "SAMPLERS", "load_model"):
        assert f"`{name}`" in README or name in "".join(BLOCKS)
        assert re.search(rf"(def|class) {name}\b|^{name}\b", source, re.MULTILINE), name


def test_defaults_in_the_readme_are_those_of_the_config() -> None:
    sample = Config().sample
    assert f"the number of steps ({sample.steps})" in README and f"the label counts ({sample.guidance})" in README
    assert "`--guidance-interval {:g} {:g}`".format(*sample.guidance_interval) in README
    assert f"trains for {Config().train.epochs} epochs" in README and f"{Config().train.focus:.0%} of each" in README


def test_pictures_in_the_readme_exist() -> None:
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file(), path


def test_the_pictures_are_of_the_weights_that_ship() -> None:
    digest = checkpoint.weights_digest(checkpoint.load(selection.PRETRAINED)["ema"])
    for path in (ROOT / "results" / "pretrained").iterdir():
        assert digest in str(Image.open(path).info), path


def test_every_benchmark_finds_the_project_from_any_folder(tmp_path: Path) -> None:
    script = ("import runpy, sys\n"
              "for path in sys.argv[2:]:\n"
              "    sys.path[0], before = sys.argv[1], {*sys.modules}\n"
              "    runpy.run_path(path)\n"
              "    sys.path.remove(str(sys.modules['config'].ROOT))\n"
              "    for name in {*sys.modules} - before:\n"
              "        if (getattr(sys.modules[name], '__file__', None) or '').startswith(sys.argv[1]):\n"
              "            del sys.modules[name]\n")
    paths = [str(path) for path in (ROOT / "benchmarks").glob("*.py")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run([sys.executable, "-c", script, str(ROOT / "benchmarks"), *paths], cwd=tmp_path,
                             capture_output=True, text=True, env=environment)
    assert process.returncode == 0 and len(paths) >= 8, process.stderr[-2000:]
