"""A folder of pictures: how it is read, what is refused, and a run from such a folder to its evaluation; --init."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from config import SampleConfig, UserError
from dataset import NO_LABEL, LabelledImages, class_name, describe
from evaluation import classifier, compare, experiment, reference
from run import main
from sample import load_model, make_request
from support import checkpoint, loading, pictures, plots, selection, settings
from support.runtime import Runtime
from tests.conftest import TINY
from tests.processes import start
from training.log import MEASURED
from training.state import TrainingState, new_state

CPU = Runtime(torch.device("cpu"), bf16=False, compile=False)

QUICK = ["--device", "cpu", "--steps", "2", "--num-images", "4", "--preview", "0", "--epochs", "1", "--batch-size", "8",
         "--timesteps", "50"]
RUN = ["--mode", "train", "--dataset", "folder", "--data-dir", "pictures", *QUICK]
KINDS = ("png", "jpg", "bmp", "webp", "gif")


def draw(path: Path, number: int, paper: int = 240, ink: int = 20) -> None:
    """A bar, upright or level by the class, whose place and size follow from the number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = 40 + number % 23, 50 + number % 31
    image = Image.new("L", (width, height), paper)
    box = (15, 8, 21, 40) if path.parent.name < "b" else (8, 15, 32, 21)
    ImageDraw.Draw(image).rectangle([side + number % 5 for side in box], ink)
    image.putpixel((0, 0), number % 256)  # no two files are alike
    image.save(path)


def draw_all(folder: Path, classes: str = "ab", each: int = 20, paper: int = 240, ink: int = 20) -> Path:
    for name in classes:
        for i in range(each):
            draw(folder / name / f"{i}.{KINDS[i % len(KINDS)]}", 100 * ord(name) + i, paper, ink)
    return folder


def read(folder: Path, *flags: str) -> dict[str, LabelledImages]:
    return loading.load_folder(settings.parse(["--dataset", "folder", "--data-dir", str(folder), *flags]))


def one(folder: Path, image: Image.Image, name: str = "picture.png") -> np.ndarray:
    """That picture as the network sees it, not inverted."""
    (folder / "test").mkdir(parents=True, exist_ok=True)
    image.save(folder / "test" / name)
    draw(folder / "train" / "a.png", 1)
    return read(folder, "--no-invert")["test"].images[0, 0].numpy()


def test_a_folder_from_training_to_evaluation(own_folder: Path) -> None:
    draw_all(Path("pictures"), each=230)
    program = start(own_folder, *RUN, *TINY, "--name", "mine")
    output = program.finish()
    held = len(read(Path("pictures"))["test"])
    assert f"pictures: {460 - held} pictures to train on and {held} to test on; classes: 0 (a), 1 (b).\n" in output
    assert "inverted; --no-invert" in output and "The first 64 images, as the network sees them: " in output
    data = checkpoint.load(selection.run_path("mine"))["history"]["data"]
    assert f"200 test images; here are {min(data['classes'][:2])} and {held}.\n" in output
    assert data["class_names"] == ["a", "b"] and data["inverted"] is True and data["mean"] < 0.5
    picture = Path("results/mine/data.png")
    assert plots.metadata_of(picture) == {"digest": data["digest"]} and Image.open(picture).width == 8 * 88 + 4
    again = start(own_folder, *RUN, *TINY, "--name", "mine").finish()
    assert "is finished" in again and "--no-invert" not in again
    evaluated = start(own_folder, "--mode", "evaluate", "--name", "mine", "--data-dir", "pictures", "--device", "cpu",
                      "--steps", "1", "--num-images", "200", changes={
                          "evaluation.classifier.FEWEST": 20, "evaluation.classifier.FEWEST_STEPS": 20,
                          "evaluation.reference.FEWEST_TEST": 20, "evaluation.reference.FEWEST": 90,
                          "evaluation.classifier.EPOCHS": 1})
    output = evaluated.finish()
    assert "largest for 0 (a)" in output or "largest for 1 (b)" in output
    assert "evaluation.png" in output and "--no-invert" not in output
    otherwise = start(own_folder, "--mode", "evaluate", "--name", "mine", "--data-dir", "pictures", "--no-invert",
                      "--num-images", "200")
    otherwise.finish(2)
    assert "not the images that" in otherwise.lines()[0]


def test_classes_have_names_in_tables_and_pictures() -> None:
    data = describe(LabelledImages(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.tensor([0, 1]),
                                   {"class_names": ["cat", "$dog$"], "inverted": False}), "folder")
    assert [class_name(data, k) for k in range(3)] == ["0 (cat)", "1 ($dog$)", "2"]
    assert class_name({"name": "kmnist"}, 1) == "1 (ki)" and class_name({}, 1) == "1"


def test_limits_of_measuring_are_said_as_they_are() -> None:
    assert MEASURED == (2 * reference.FEWEST, classifier.FEWEST)


@pytest.mark.parametrize("name", [f"a.{kind}" for kind in (*KINDS, "JPEG")])
def test_every_kind_of_file(name: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 60), "black")
    ImageDraw.Draw(image).rectangle((30, 0, 60, 60), "white")
    pixels = one(tmp_path, image, name)
    assert pixels.shape == (28, 28) and pixels[:, :13].max() < 20 and pixels[:, 15:].min() > 235


def half(mode: str, dark: object, light: object) -> Image.Image:
    image = Image.new(mode, (56, 56), dark)  # type: ignore[arg-type]
    image.paste(light, (28, 0, 56, 56))  # type: ignore[call-overload]
    return image


@pytest.mark.parametrize("image, left, right", [
    (half("1", 0, 1), 0, 255), (half("L", 50, 200), 50, 200), (half("LA", (50, 0), (50, 255)), 255, 50),
    (half("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)), 255, 0), (half("RGBA", (0, 0, 0, 128), (0, 0, 0, 255)), 127, 0),
    (half("P", 0, 1), None, None), (Image.fromarray(np.tile(np.uint16([12800, 51200]).repeat(28), (56, 1))), 50, 200)],
    ids=lambda value: getattr(value, "mode", None))
def test_every_mode(image: Image.Image, left: int | None, right: int | None, tmp_path: Path) -> None:
    if image.mode == "P":  # a palette whose first colour is transparent
        image.putpalette([10, 20, 30, 100, 100, 100])
        image.info["transparency"], left, right = 0, 255, 100
    pixels = one(tmp_path, image)
    assert np.abs(pixels[:, :13] - float(left or 0)).max() <= 1
    assert np.abs(pixels[:, 15:] - float(right or 0)).max() <= 1


def test_a_picture_is_padded_with_the_colour_of_its_border_and_reduced_without_aliasing(tmp_path: Path) -> None:
    lines = np.full((200, 100), 90, np.uint8)
    lines[20:180, 20:80] = 255 * (np.arange(60) % 2)  # finer than what 28 pixels can show: grey
    pixels = one(tmp_path, Image.fromarray(lines))
    assert (pixels[:, :6] == 90).all() and (pixels[:, -6:] == 90).all()
    assert np.abs(pixels[6:22, 11:17].astype(int) - 127).max() < 12


def test_a_photograph_that_was_held_upright_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by 90 degrees clockwise: the left half becomes the upper one
    path = tmp_path / "turned.jpg"
    half("L", 0, 255).save(path, exif=exif)
    pixels = pictures._read(path)[0]
    assert pixels[:12].max() < 20 and pixels[16:].min() > 235


@pytest.mark.parametrize("paper, flags, bright", [(240, [], False), (10, [], False), (240, ["--no-invert"], True),
                                                  (10, ["--invert"], True)])
def test_bright_borders_are_inverted_unless_told_otherwise(paper: int, flags: list[str], bright: bool,
                                                           tmp_path: Path) -> None:
    train = read(draw_all(tmp_path / "pictures", each=4, paper=paper, ink=255 - paper), *flags)["train"]
    assert (train.images[:, 0, 2, 2] > 128).all() == bright == (train.images.float().mean() > 128)
    assert train.about["inverted"] == (bright if flags == ["--invert"] else paper > 128 and not flags)


def test_held_out_pictures_stay_held_out_when_some_are_added(tmp_path: Path) -> None:
    def digests(split: str) -> set[bytes]:
        return {image.numpy().tobytes() for image in read(folder)[split].images}

    folder = draw_all(tmp_path / "pictures", "a", each=200)
    train, test = digests("train"), digests("test")
    draw_all(folder, "a", each=300)
    assert train < digests("train") and test < digests("test") and 10 <= len(test) <= 32
    for few in ([7, 8, 9], [10, 20, 30], [10, 10, 11]):  # none, all and copies of one
        chosen = pictures.held_out(np.array(few, np.uint64))
        assert chosen.any() and not chosen.all()


def test_a_test_folder_is_used_as_it_is(tmp_path: Path) -> None:
    draw_all(tmp_path / "train", "cab", each=3)
    draw_all(tmp_path / "test", "bc", each=2)
    draw(tmp_path / "train" / "a" / ".hidden" / "0.png", 1)
    draw(tmp_path / "train" / "a" / "deeper" / "0.png", 2)
    draw(tmp_path / "train" / "__MACOSX" / "._0.png", 3)
    splits = read(tmp_path)
    assert splits["train"].labels.tolist() == [0] * 4 + [1] * 3 + [2] * 3
    assert splits["test"].labels.tolist() == [1, 1, 2, 2] and splits["test"].about["class_names"] == ["a", "b", "c"]
    shutil.rmtree(tmp_path / "test")
    assert len(read(tmp_path)["test"]) >= 3


def test_pictures_without_classes_are_one_class(tmp_path: Path) -> None:
    folder = draw_all(tmp_path, "a", each=12) / "a"
    splits = read(folder)
    assert sum(map(len, splits.values())) == 12 and splits["train"].labels.unique().tolist() == [0]
    assert splits["train"].about["class_names"] == []


def test_files_are_read_once_until_one_changes(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, opened = draw_all(Path("pictures"), each=5), []
    real = pictures._read
    monkeypatch.setattr(pictures, "_read", lambda path: opened.append(path) or real(path))
    first = read(folder)
    assert len(opened) == 10
    second = read(folder, "--no-invert")
    assert len(opened) == 10 and torch.equal(255 - second["train"].images, first["train"].images)
    os.utime(folder / "a" / "0.png", (1, 1))
    read(folder)
    assert len(opened) == 20
    (kept,) = pictures.KEPT.iterdir()
    kept.write_bytes(b"damaged")
    assert torch.equal(read(folder)["train"].images, first["train"].images) and len(opened) == 30
    shutil.rmtree(pictures.KEPT)
    pictures.KEPT.write_text("in the way")
    assert torch.equal(read(folder)["train"].images, first["train"].images)


def spoil(folder: Path, how: str) -> None:
    if how == "unreadable":
        for name in ("x.png", "y.jpg"):
            (folder / "a" / name).write_bytes(b"no picture")
    elif how == "empty":
        (folder / "c").mkdir()
    elif how == "eleven":
        draw_all(folder, "cdefghijk", each=1)
    elif how == "none":
        for name in "ab":
            shutil.rmtree(folder / name)
    elif how == "missing":
        shutil.rmtree(folder)
    elif how == "single":
        draw_all(folder, "c", each=1)
    elif how == "unknown":
        shutil.rmtree(folder)
        draw_all(folder / "train", "a")
        draw_all(folder / "test", "z")


@pytest.mark.parametrize("how, said", [
    ("unreadable", r"pictures/a/x.png: it can't be read as a picture; .*\(2 of 42; "),
    ("empty", "pictures/c: there are no"),
    ("eleven", "pictures: it has 11 folders of classes"), ("none", "pictures: there are no pictures"),
    ("missing", "pictures: can't be read"), ("single", "pictures/c: no picture is left"),
    ("unknown", "pictures/test/z: pictures/train has no such class")])
def test_bad_folders_are_one_line(how: str, said: str, own_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spoil(draw_all(Path("pictures")), how)
    assert main([*RUN, *TINY]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    with pytest.raises(UserError, match=said):
        raise UserError(line)
    assert not Path("results").exists()


def test_a_few_unreadable_pictures_are_named_and_left_out(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = draw_all(Path("pictures"), each=60)
    (folder / "a" / "x.png").write_bytes((folder / "a" / "0.png").read_bytes()[:60])
    draw(folder / "loose.png", 1)
    assert sum(map(len, read(folder).values())) == 120
    output = capsys.readouterr().out
    assert "can't be read as pictures: pictures/a/x.png\n" in output
    assert "beside the folders of classes: loose.png" in output


@pytest.mark.parametrize("flags, said", [
    (["--dataset", "folder"], "--data-dir"),
    (["--dataset", "generated", "--invert"], "only pictures of --dataset folder"),
    (["--init", "nowhere"], "--init nowhere"), (["--init", "pretrained", "--channels", "16", "32", "64"], "--channels"),
    (["--init", "pretrained", "--prediction", "noise"], "add --prediction v"),
    (["--checkpoint", "pretrained"], "--init says"), (["--mode", "sample", "--init", "pretrained"], "--init")])
def test_flags_that_can_not_be_honoured(flags: list[str], said: str, own_folder: Path,
                                        capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--dataset", "generated", *flags] if "--dataset" not in flags else flags) == 2
    assert said in capfd.readouterr().err


@pytest.fixture
def base(own_folder: Path) -> Path:
    """A small finished run on the pictures, whose weights others start from."""
    draw_all(Path("pictures"), each=20)
    assert main([*RUN, *TINY, "--name", "base"]) == 0
    return own_folder


def started(*flags: str) -> TrainingState:
    config = selection.settle(settings.parse([*RUN, "--name", "child", *flags]), CPU)
    return new_state(config, CPU, *loading.load_both(config, CPU))


def test_a_run_starts_from_the_averaged_weights_with_classes_anew_if_the_images_differ(base: Path) -> None:
    weights = load_model("base").network.state_dict()
    assert weights["stem.weight"].shape[0] == 8
    same = started("--init", "base")
    for network in (same.learner.network, same.learner.average):
        assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in same.learner.network.parameters())
    other = started("--init", str(selection.run_path("base")), "--no-invert", "--seed", "1")
    for network in (other.learner.network, other.learner.average):
        found = network.state_dict()
        assert [name for name, value in found.items() if not torch.equal(value, weights[name])] == ["label.weight"]
        assert torch.equal(found["label.weight"][NO_LABEL], weights["label.weight"][NO_LABEL])
        assert not torch.isclose(found["label.weight"][:NO_LABEL], weights["label.weight"][:NO_LABEL]).all(1).any()
    assert other.learner.network.state_dict()["label.weight"][0].std() > 0.5


def test_the_start_is_stored_compared_and_kept_on_resume(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = [*RUN, "--name", "child", "--no-invert"]
    assert main([*run, "--init", "base"]) == 0
    model = load_model("base")
    said = f"It starts from the averaged weights of base ({model.digest}). Its images are others, so the classes are"
    assert said in capfd.readouterr().out
    state = checkpoint.load(selection.run_path("child"))
    assert state["config"]["train"]["init"] == "base" and state["config"]["model"] == model.settings["model"]
    assert state["history"]["init"] == {"weights": model.digest, "same_classes": False}
    assert main([*run, "--init", "pretrained"]) == 2 and "init was base, now pretrained" in capfd.readouterr().err
    assert main([*run, *TINY]) == 2 and "init was base, now None" in capfd.readouterr().err
    sides = [compare.Side(name, [load_model(name)], [make_request(load_model(name), SampleConfig(), 0, 4)])
             for name in ("base", "child")]
    assert "init None / base" in compare.settings_differences(*sides)[2]
    shutil.rmtree("checkpoints/base")  # of no need any more
    assert main([*run, "--init", "base", "--epochs", "2"]) == 0 and "Resuming the run" in capfd.readouterr().out


def test_initial_weights_are_part_of_a_recipe(base: Path) -> None:
    config = settings.parse(["--mode", "experiment", "--change", "--init base"])
    recipe = experiment.changed("--init base", config)
    assert recipe.train.init == "base"
    with pytest.raises(UserError, match="--dropout: it has no effect beside --init"):
        experiment.changed("--dropout 0.1", recipe)
    named = {experiment.run_name(recipe, start) for start in ("these weights", "others")}
    assert len(named) == 2 and all(name.startswith("experiment/") and "init-base" in name for name in named)
