"""support/checkpoint.py, files.py: what is saved comes back bit for bit; nothing else is accepted or half written."""

import builtins
import errno
import hashlib
import io
import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from config import UserError
from support import checkpoint, files, selection, settings
from support.runtime import Runtime

CPU = Runtime(torch.device("cpu"), bf16=False, compile=False)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.linear = nn.Linear(3, 2)
        self.register_buffer("count", torch.arange(3))


def make_state(step: int = 7) -> dict[str, Any]:
    torch.manual_seed(step)
    network = Network()
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "moment": torch.randn(3, 2)}, 1: {}},
                 "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.99), "fused": None, "params": [0, 1]}]}
    return {"config": {"seed": 2**62, "model": {"channels": [2, 3], "name": None}}, "model": network.state_dict(),
            "ema": {name: value.clone() for name, value in network.state_dict().items()},
            "optimizer": optimizer, "step": step,
            "history": {"loss": [0.1, float("nan"), float("inf"), -0.0], "text": "é", "seen": torch.zeros(0, 3),
                        "half": torch.randn(3).bfloat16(), "flag": torch.tensor([True])}}


def same(a: Any, b: Any) -> bool:
    """Bitwise."""
    if isinstance(a, Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and a.contiguous().flatten().view(torch.uint8).equal(
            b.contiguous().flatten().view(torch.uint8))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def resave(path: Path, right_digest: bool = True, **changes: Any) -> None:
    """Another program's idea of the same file, made by the library alone; a change to ... leaves the key out."""
    tensors, metadata = checkpoint.read_tensors(path, "")
    content = {key: value for key, value in (json.loads(metadata["content"]) | changes).items() if value is not ...}
    digest = checkpoint._digest(content, tensors) if right_digest else metadata["digest"]
    path.write_bytes(safetensors.torch.save(tensors, {"content": json.dumps(content), "digest": digest}))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "a.safetensors", make_state())
    return tmp_path / "a.safetensors"


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable()
    return message


# Round trips


def test_round_trip_is_bitwise(path: Path) -> None:
    loaded, state = checkpoint.load(path), make_state()
    assert set(loaded) == set(checkpoint.KEYS) and loaded["version"] == checkpoint.FORMAT_VERSION
    assert all(same(loaded[key], {**value} if key in ("model", "ema") else value) for key, value in state.items())
    assert loaded["digest"] == saved_digest(path, loaded)


def test_any_reader_of_safetensors_finds_weights_by_name_and_text_for_the_rest(path: Path) -> None:
    with safetensors.safe_open(path, framework="np") as file:
        assert {"ema.linear.weight", "model.conv.bias", "optimizer.state.0.moment"} <= set(file.keys())
        assert json.loads(file.metadata()["content"])["config"]["model"] == {"channels": [2, 3], "name": None}


def test_containers_and_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    history = {"numbered": {0: "a", **{i: i for i in range(1, 12)}, -7: {3: torch.ones(2)}, 10**18: ()},
               "tuples": ((1, (2,)), [(), ((),)]), "empty": {},
               "numbers": [0.1 + 0.2, 5e-324, -0.0, float("inf"), -float("inf"), float("nan"), 2**80, True, None],
               "text": "a\n\u2028é \U0001f600", "options": {"grad_clip": float("inf")}}
    checkpoint.save(tmp_path / "b.safetensors", make_state() | {"history": history})
    assert same(checkpoint.load(tmp_path / "b.safetensors")["history"], history)


def test_weights_only_file(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "b.safetensors", {**make_state(), "model": None, "optimizer": None})
    loaded = checkpoint.load(tmp_path / "b.safetensors")
    assert loaded["model"] is None and loaded["optimizer"] is None


def test_views_and_numbers_of_numpy_are_saved_as_what_they_are(tmp_path: Path) -> None:
    large = torch.arange(100_000.0)
    history = {"a": large[5:8], "b": large[:1].expand(4), "c": np.float64(0.1), "d": nn.Parameter(large[:2])}
    checkpoint.save(tmp_path / "b.safetensors", make_state() | {"history": history})
    history = checkpoint.load(tmp_path / "b.safetensors")["history"]
    assert history["a"].tolist() == [5, 6, 7] and history["b"].tolist() == [0] * 4 and type(history["c"]) is float
    assert (tmp_path / "b.safetensors").stat().st_size < 20_000


def test_only_whole_states_of_plain_values_are_saved(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        checkpoint.save(tmp_path / "b.safetensors", {"model": {}})
    for odd in (Path("x"), {"$tensor": 1}, {1: 2, "a": 3}, {1.5: 2}, b"bytes", {1, 2}):
        with pytest.raises(TypeError, match="can't hold|not JSON serializable"):
            checkpoint.save(tmp_path / "b.safetensors", make_state() | {"history": {"odd": odd}})
    with pytest.raises(ValueError, match="two tensors have the name history.a.b"):
        checkpoint.save(tmp_path / "b.safetensors",
                        make_state() | {"history": {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}})
    assert list(tmp_path.iterdir()) == []


# Digests


def saved_digest(path: Path, state: dict[str, Any]) -> str:
    checkpoint.save(path, state)
    return checkpoint.load(path)["digest"]


def test_digests_see_every_difference_and_no_layout(path: Path) -> None:
    state = make_state()
    digest = saved_digest(path, state)
    reordered = {key: state[key] for key in reversed(state)}
    reordered["ema"] = {name: value.contiguous() for name, value in reversed(state["ema"].items())}
    assert saved_digest(path, reordered) == digest and saved_digest(path, {**state, "digest": "x"}) == digest
    weights = state["ema"]["linear.weight"]
    flipped = weights.clone()
    flipped.view(torch.int32)[1, 2] ^= 1
    others = [{"step": 8}, {"config": {}}, {"history": {**state["history"], "loss": tuple(state["history"]["loss"])}},
              {"history": {**state["history"], "loss": [0.1, float("nan"), float("inf"), 0.0]}},
              *({"ema": {**state["ema"], "linear.weight": other}}
                for other in (flipped, weights.double(), weights.view(3, 2), weights.view(torch.int32)))]
    assert len({saved_digest(path, {**state, **other}) for other in others} | {digest}) == len(others) + 1


def test_weights_digest_names_tensors_alone() -> None:
    """The first 16 hex digits, by hand, for one weight of 1.0 and 2.0."""
    content = b"a torch.float32 (2,)" + np.array([1, 2], "<f4").tobytes()
    weights = {"a": torch.tensor([1.0, 2.0])}
    assert checkpoint.weights_digest(weights) == hashlib.sha256(content).hexdigest()[:16]
    image = torch.randn(2, 3, 4, 4)
    assert checkpoint.weights_digest({"a": image}) == checkpoint.weights_digest(
        {"a": image.to(memory_format=torch.channels_last)})


# Files that are not what was saved


def test_missing_file_folder_and_junk(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none.safetensors")
    assert "no such file" in refused(tmp_path)
    for content in (b"", b"junk" * 1000, pickle.dumps({"a": 1})):
        (tmp_path / "junk.safetensors").write_bytes(content)
        assert "damaged, or not a safetensors file" in refused(tmp_path / "junk.safetensors")
    (tmp_path / "other.safetensors").write_bytes(safetensors.torch.save({"a": torch.ones(2)}))
    assert "not a checkpoint of this project" in refused(tmp_path / "other.safetensors")


def test_pickles_are_never_read(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "mine.pt")
    assert "damaged, or not a safetensors file" in refused(tmp_path / "mine.pt")


def test_flipped_and_missing_bytes(path: Path) -> None:
    """Every 97th bit or so: either all content is as it was, or the file is refused."""
    data, original = path.read_bytes(), checkpoint.load(path)
    refusals = 0
    for bit in range(0, 8 * len(data), 8 * len(data) // 150):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            assert same(checkpoint.load(path), original)
        except UserError:
            refusals += 1
    assert refusals > 140
    for size in (1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        refused(path)


def test_a_changed_weight_or_number_in_a_file_that_is_well_formed(path: Path) -> None:
    whole = path.read_bytes()
    tensors, metadata = checkpoint.read_tensors(path, "")
    tensors["ema.linear.bias"].view(torch.int32)[0] ^= 1
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    assert "by its digest" in refused(path)
    path.write_bytes(whole)
    resave(path, right_digest=False, step=8)
    assert "by its digest" in refused(path)
    path.write_bytes(whole)
    tensors, metadata = checkpoint.read_tensors(path, "")
    path.write_bytes(safetensors.torch.save(tensors | {"more": torch.ones(1)}, metadata))
    assert "by its digest" in refused(path)


@pytest.mark.parametrize("changes, message", [
    ({"version": 3}, "written by a later version of the project .*update"),
    ({"step": ...}, "missing.*: 'step'"),
    ({"history": ..., "more\n": 1}, r"missing, unknown.*: 'history', 'more\\n'"),
    ({"config": [1]}, "not of the right type: 'config'"),
    ({"model": {"a": 1}}, "not of the right type: 'model.a'"),
    ({"ema": None}, "not of the right type: 'ema'"),
    ({"ema": {"$numbered": {"3": {"$tensor": "ema.count"}}}}, "not of the right type: 'ema.3'"),
    ({"optimizer": {"$tensor": "ema.count"}}, "not of the right type: 'optimizer'"),
    ({"step": 1.0, "history": 5}, "not of the right type: 'step', 'history'"),
    ({"step": -1}, "not of the right type: 'step'"),
    ({"step": True}, "not of the right type: 'step'"),
    ({"version": 1.0}, "not of the right type: 'version'"),
    ({"history": {"a": {"$tensor": "nowhere"}}}, "not a checkpoint of this project"),
    ({"history": {"a": {"$tensor": ["ema.count"]}}}, "not a checkpoint of this project"),
    ({"history": {"$numbered": {"x": 1}}}, "not a checkpoint of this project"),
    ({"history": {"$tuple": 3}}, "not a checkpoint of this project"),
])
def test_states_of_another_making(path: Path, changes: dict[str, Any], message: str) -> None:
    resave(path, **changes)
    with pytest.raises(UserError, match=message):
        checkpoint.load(path)


def test_content_that_is_no_state_or_nests_without_end(path: Path) -> None:
    tensors, metadata = checkpoint.read_tensors(path, "")
    for content in ("[" * 100_000, "3", "[1, 2]", "{", '{"step": ' + "9" * 10_000 + "}", ""):
        path.write_bytes(safetensors.torch.save(tensors, metadata | {"content": content}))
        assert "not a checkpoint of this project" in refused(path)


def test_a_file_that_is_replaced_while_it_is_read_is_one_or_the_other(tmp_path: Path) -> None:
    last = tmp_path / "last.safetensors"
    states = [make_state(1), make_state(2) | {"history": {"more": torch.ones(999)}}]
    checkpoint.save(last, states[0])
    saving = threading.Thread(target=lambda: [checkpoint.save(last, states[i % 2]) for i in range(60)])
    checkpoint.save(last, states[1])
    saving.start()
    while saving.is_alive():
        assert {checkpoint.load(path)["step"] for path in (last, tmp_path / "previous.safetensors")} <= {1, 2}
    saving.join()


# Two files


def test_previous_is_the_one_before(tmp_path: Path) -> None:
    (tmp_path / ".last.safetensors.12345.part").write_bytes(b"left by a kill")
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / "last.safetensors", make_state(step))
    assert checkpoint.load(tmp_path / "last.safetensors")["step"] == 3
    assert checkpoint.load(tmp_path / "previous.safetensors")["step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.safetensors", "previous.safetensors"]


def test_damaged_last_is_named_kept_and_the_one_before_it_offered(tmp_path: Path) -> None:
    last, previous = tmp_path / "last.safetensors", tmp_path / "previous.safetensors"
    for step in (1, 2):
        checkpoint.save(last, make_state(step))
    broken = last.read_bytes()[:-500]
    last.write_bytes(broken)
    message = refused(last)
    assert (f"--checkpoint {previous}" in message and "rename it to last.safetensors" in message
            and last.read_bytes() == broken)
    previous.write_bytes(b"junk")
    assert "previous.safetensors" not in refused(last)


def test_names_that_differ_from_last_keep_no_previous(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path / "pretrained.safetensors", make_state(step))
    assert [path.name for path in tmp_path.iterdir()] == ["pretrained.safetensors"]


def test_a_link_stays_a_link_and_previous_is_a_whole_file(tmp_path: Path) -> None:
    """As where last.safetensors lies on another disk."""
    (tmp_path / "run").mkdir()
    (tmp_path / "disk").mkdir()
    last, target = tmp_path / "run" / "last.safetensors", tmp_path / "disk" / "a.safetensors"
    last.symlink_to(target)  # which is not there yet
    for step in (1, 2, 3):
        checkpoint.save(last, make_state(step))
        assert last.is_symlink() and not target.is_symlink() and checkpoint.load(target)["step"] == step
    previous = tmp_path / "run" / "previous.safetensors"
    assert not previous.is_symlink() and checkpoint.load(previous)["step"] == 2
    assert len(list(tmp_path.rglob("*"))) == 5  # no litter


# Disks that are full or closed


@pytest.mark.parametrize("broken", ["write", "fsync", "replace"])
def test_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    last = tmp_path / "last.safetensors"
    checkpoint.save(last, make_state(1))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            super().write(bytes(data)[:1000])
            return full()  # type: ignore[return-value]

    real = builtins.open
    with monkeypatch.context() as patch:
        if broken == "write":
            patch.setattr(builtins, "open", lambda file, mode="r": Full(file, "w") if "w" in mode else real(file, mode))
        else:
            patch.setattr(os, broken, full)
        with pytest.raises(UserError, match=r"last.safetensors: can't be written \(No space left on device\): "
                                            "free some space; the file that was there is untouched"):
            checkpoint.save(last, make_state(2))
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".part")] == ["last.safetensors"]
    assert checkpoint.load(last)["step"] == 1


def test_no_folder_to_write_to(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't be written .No such file or directory.: make its folder first"):
        checkpoint.save(tmp_path / "none" / "last.safetensors", make_state())
    (tmp_path / "last.safetensors").mkdir()
    with pytest.raises(UserError, match="last.safetensors: can't be written"):
        checkpoint.save(tmp_path / "last.safetensors", make_state())
    assert [path.name for path in tmp_path.iterdir()] == ["last.safetensors"]


def test_folder_without_permission(no_root: None) -> None:
    Path("closed").mkdir(mode=0o500)
    with pytest.raises(UserError, match="can't be written .Permission denied.: make it writable"):
        checkpoint.save(Path("closed/last.safetensors"), make_state())


def test_write_atomically_cleans_up_after_any_failure(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    files.write_atomically(target, lambda file: file.write(b"one"))

    def fail(file: Any) -> None:
        file.write(b"two")
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        files.write_atomically(target, fail)
    assert target.read_bytes() == b"one" and list(tmp_path.iterdir()) == [target]


# Weights into a network


def test_load_weights(path: Path) -> None:
    weights, network = checkpoint.load(path)["ema"], Network()
    checkpoint.load_weights(network, weights, path)
    assert same({**network.state_dict()}, weights)
    half = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    checkpoint.load_weights(network, half, path)
    assert network.linear.weight.dtype == torch.float32 and network.linear.weight.equal(half["linear.weight"].float())


@pytest.mark.parametrize("name, value, message", [
    ("linear.bias", None, 'Missing key.*"linear.bias"'),
    ("more\n", torch.zeros(1), 'Unexpected key.*"more'),
    ("linear.bias", torch.zeros(3), r"size mismatch for linear.bias: .*\[3\].*\[2\]"),
    ("linear.bias", torch.tensor([0.0, float("nan")]), "the weight linear.bias is not finite"),
    ("linear.bias", torch.tensor([0.0, 1e300], dtype=torch.float64), "the weight linear.bias is not finite"),
])
def test_weights_that_do_not_fit(name: str, value: Tensor | None, message: str) -> None:
    weights, network = {**make_state()["ema"]}, Network()
    weights.pop(name, None)
    if value is not None:
        weights[name] = value
    with pytest.raises(UserError, match=f"^x.safetensors: .*{message}") as caught:
        checkpoint.load_weights(network, weights, Path("x.safetensors"))
    assert "\n" not in str(caught.value)


# Which file, and whose


def put(name: str, file: str = "last.safetensors") -> Path:
    """An empty file as the checkpoint of a run."""
    path = Path("checkpoints", name, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def found(*flags: str) -> Path:
    return selection.find(settings.parse(["--mode", "sample", *flags]))


def test_find(own_folder: Path) -> None:
    assert found() == found("--checkpoint", "pretrained") == selection.PRETRAINED
    other = put("other")
    assert found() == selection.PRETRAINED  # not just any run
    generated = put("generated")
    assert found() == generated
    mnist = put("mnist")
    assert found() == mnist and found("--dataset", "generated") == generated and found("--name", "other") == other
    for text in ("other", "checkpoints/other", "checkpoints/other/last.safetensors"):  # a run, its folder, a file
        assert found("--checkpoint", text) == other and selection.resolve(text, "--runs") == other
    assert found("--checkpoint", "pretrained") == selection.PRETRAINED
    for flag, value in (("--name", "othr"), ("--dataset", "kmnist"), ("--checkpoint", "othr")):
        with pytest.raises(UserError, match=f"^{flag} {value}: .*Runs in checkpoints/: generated, mnist, other."):
            found(flag, value)


def test_a_run_that_lost_its_last_file_is_not_passed_over(own_folder: Path) -> None:
    previous = put("mnist", "previous.safetensors")
    checkpoint.save(previous, make_state())
    for flags in ((), ("--name", "mnist"), ("--dataset", "mnist")):
        assert (last := found(*flags)) == selection.run_path("mnist")
        message = refused(last)
        assert "no such file" in message and f"--checkpoint {previous}, or rename it to last.safetensors" in message


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/mnist"])
def test_runs_that_cannot_be_seen_are_not_taken_for_none(place: str, no_root: None) -> None:
    """As where another user made the folder."""
    put("mnist")
    Path(place).chmod(0)
    for flags in (["sample"], ["sample", "--name", "mnist"], ["train", "--name", "mnist"],
                  ["evaluate", "--checkpoint", "mnist"]):
        with pytest.raises(UserError, match=f"^{place}.*Permission denied.*: make .*readable"):
            selection.settle(settings.parse(["--mode", *flags]), CPU)
    Path(place).chmod(0o700)
    put("mnist").chmod(0)
    with pytest.raises(UserError, match="last.safetensors: can't be read .Permission denied.: make it readable"):
        checkpoint.load(selection.run_path("mnist"))
    assert selection.settle(settings.parse(["--mode", "sample", "--checkpoint", "pretrained"]), CPU)


def test_a_link_that_leads_nowhere_is_named(own_folder: Path) -> None:
    """As where the disk of the checkpoints is not mounted."""
    Path("checkpoints").symlink_to("/nowhere/checkpoints")
    for work in (lambda: selection.settle(settings.parse(["--mode", "sample"]), CPU),
                 lambda: found("--name", "mine"), lambda: files.make_folder(Path("checkpoints/mine"))):
        with pytest.raises(UserError, match="checkpoints is a link to /nowhere/checkpoints, which is not there: mount"):
            work()


def test_a_folder_that_cannot_be_written(no_root: None) -> None:
    """Another --name would not help."""
    Path("checkpoints").mkdir(mode=0o500)
    with pytest.raises(UserError, match="^checkpoints/mine: can't be made .Permission denied.: make .*/checkpoints "
                                        "writable, or run this in a folder that is$"):
        files.make_folder(Path("checkpoints/mine"))


def test_shipped_weights_in_place_of_a_run_say_which_runs_there_are(own_folder: Path, capsys) -> None:
    sample = settings.parse(["--mode", "sample"])
    selection.settle(sample, CPU)
    assert capsys.readouterr().out == ("There is no run of your own yet, so this uses the pretrained weights, which "
                                       "come with the project.\n")
    put("mine")
    selection.settle(sample, CPU)
    assert capsys.readouterr().out == ("There is no run named mnist, so this uses the pretrained weights, which come "
                                       "with the project. Runs in checkpoints/: mine. Choose one with --name.\n")


def test_a_home_folder_is_a_place_for_checkpoints(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(own_folder))
    assert found("--checkpoint", f"~/{put('x')}") == own_folder / "checkpoints/x/last.safetensors"


@pytest.mark.parametrize("path, folder", [
    ("checkpoints/mine/last.safetensors", "mine"), ("checkpoints/mine/previous.safetensors", "mine-previous-01234567"),
    ("other.safetensors", "other-01234567"), ("checkpoints/other.safetensors", "other-01234567"),
    ("there/mine/last.safetensors", "mine-01234567"), ("there/../checkpoints/mine/last.safetensors", "mine"),
    ("checkpoints/pretrained/last.safetensors", "pretrained-01234567"),
    ("checkpoints/Pretrained/last.safetensors", "Pretrained-01234567"),
    (selection.PRETRAINED, "pretrained-01234567"),
    (os.fsdecode(b"a\xff.safetensors"), os.fsdecode(b"a\xff-01234567")),
    ("x" * 240 + ".safetensors", "x" * 100 + "-01234567")])
def test_each_checkpoint_has_a_results_folder_of_its_own(path: str, folder: str) -> None:
    for form in (path, os.path.relpath(path)):
        assert selection.results_folder(Path(form), "0123456789abcdef") == Path("results", folder)


def test_names_that_are_no_text_can_be_written_to(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"a\xff\n") / "last.safetensors"
    try:
        files.make_folder(path.parent)
    except UserError as error:  # some systems have none
        assert "can't be made" in str(error)
        return
    for step in (1, 2):
        checkpoint.save(path, make_state(step))
    assert checkpoint.load(path)["step"] == 2 and checkpoint.load(path.with_name("previous.safetensors"))["step"] == 1


def test_a_folder_whose_name_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't be made .File name too long.*--name"):
        files.make_folder(tmp_path / ("数" * 100))


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: can't be made .*file is a file: move it away"):
        files.make_folder(tmp_path / "file")

