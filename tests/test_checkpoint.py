"""checkpoint.py: what is saved comes back bit for bit; nothing else is accepted, run, or left half written."""

import builtins
import contextlib
import errno
import hashlib
import io
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import checkpoint
from config import UserError


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
    """Another program's idea of the same file, written by torch.save alone; a change to ... leaves the key out."""
    state = torch.load(path, weights_only=True) | changes
    state = {key: value for key, value in state.items() if value is not ...}
    if right_digest:
        with contextlib.suppress(AttributeError, TypeError):  # some have none
            state["digest"] = checkpoint.digest(state)
    torch.save(state, path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "a.pt", make_state())
    return tmp_path / "a.pt"


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
    assert loaded["digest"] == checkpoint.digest(loaded) == checkpoint.digest(torch.load(path, weights_only=True))
    assert loaded["model"]["conv.weight"].is_contiguous(memory_format=torch.channels_last)


def test_weights_only_file(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "b.pt", {**make_state(), "model": None, "optimizer": None})
    loaded = checkpoint.load(tmp_path / "b.pt")
    assert loaded["model"] is None and loaded["optimizer"] is None


def test_views_and_numbers_of_numpy_are_saved_as_what_they_are(tmp_path: Path) -> None:
    large = torch.arange(100_000.0)
    history = {"a": large[5:8], "b": large[:1].expand(4), "c": np.float64(0.1), "d": nn.Parameter(large[:2])}
    checkpoint.save(tmp_path / "b.pt", make_state() | {"history": history})
    history = checkpoint.load(tmp_path / "b.pt")["history"]
    assert history["a"].tolist() == [5, 6, 7] and history["b"].tolist() == [0] * 4 and type(history["c"]) is float
    assert (tmp_path / "b.pt").stat().st_size < 20_000


def test_only_whole_states_of_plain_values_are_saved(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        checkpoint.save(tmp_path / "b.pt", {"model": {}})
    with pytest.raises(TypeError, match="PosixPath|WindowsPath"):
        checkpoint.save(tmp_path / "b.pt", make_state() | {"history": {"path": Path("x")}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_are_stripped(tmp_path: Path, path: Path, prefix: str) -> None:
    plain = make_state()
    state = plain | {part: {prefix + name: value for name, value in plain[part].items()} for part in ("model", "ema")}
    checkpoint.save(tmp_path / "b.pt", state)
    assert not any(prefix in name for name in torch.load(tmp_path / "b.pt", weights_only=True)["ema"])
    resave(path, model=state["model"], ema=state["ema"])
    for file in (path, tmp_path / "b.pt"):
        assert same(checkpoint.load(file)["ema"], {**plain["ema"]}), file
    assert checkpoint.weights_digest(state["ema"]) == checkpoint.weights_digest(plain["ema"])


def test_the_same_weight_twice_is_refused(path: Path) -> None:
    weights = make_state()["ema"]
    resave(path, right_digest=False, ema=weights | {"module.linear.bias": torch.ones(2)})
    assert "twice" in refused(path)


# Digests


def test_digests_see_every_difference_and_no_layout() -> None:
    state = make_state()
    digest = checkpoint.digest(state)
    reordered = {key: state[key] for key in reversed(state)}
    reordered["ema"] = {name: value.contiguous() for name, value in reversed(state["ema"].items())}
    assert checkpoint.digest(reordered) == digest and checkpoint.digest({**state, "digest": "x"}) == digest
    weights = state["ema"]["linear.weight"]
    flipped = weights.clone()
    flipped.view(torch.int32)[1, 2] ^= 1
    others = [{"step": 8}, {"config": {}}, {"history": {**state["history"], "loss": tuple(state["history"]["loss"])}},
              {"history": {**state["history"], "loss": [0.1, float("nan"), float("inf"), 0.0]}},
              *({"ema": {**state["ema"], "linear.weight": other}}
                for other in (flipped, weights.double(), weights.view(3, 2), weights.view(torch.int32)))]
    assert len({checkpoint.digest({**state, **other}) for other in others} | {digest}) == len(others) + 1


def test_weights_digest_names_tensors_alone() -> None:
    """The first 16 hex digits, by hand, for one weight of 1.0 and 2.0."""
    content = b"dict 1;str 1;atensor torch.float32 (2,);" + struct.pack("<2f", 1, 2)
    weights = {"a": torch.tensor([1.0, 2.0])}
    assert checkpoint.weights_digest(weights) == hashlib.sha256(content).hexdigest()[:16]
    image = torch.randn(2, 3, 4, 4)
    assert checkpoint.weights_digest({"a": image}) == checkpoint.weights_digest(
        {"a": image.to(memory_format=torch.channels_last)})


# Files that are not what was saved


def test_missing_file_folder_and_junk(tmp_path: Path) -> None:
    assert "no such checkpoint" in refused(tmp_path / "none.pt")
    assert "folder" in refused(tmp_path)
    for content in (b"", b"junk" * 1000, pickle.dumps({"a": 1})):
        (tmp_path / "junk.pt").write_bytes(content)
        assert "damaged, or not a checkpoint" in refused(tmp_path / "junk.pt")


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
    assert refusals > 40  # the rest is padding
    for size in (1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        refused(path)


def test_changed_weight_with_right_checksums_of_the_archive(path: Path) -> None:
    weights = make_state()["ema"]
    weights["linear.bias"].view(torch.int32)[0] ^= 1
    resave(path, right_digest=False, ema=weights)
    assert "by its digest" in refused(path)


@pytest.mark.parametrize("changes, message", [
    ({"version": 2}, "written by a later version of the project .*update"),
    ({"step": ...}, "step missing"),
    ({"history": ..., "more\n": 1}, r"history missing, 'more\\n' unknown"),
    ({"config": [1]}, "not of the right type: config"),
    ({"model": {"a": 1}}, "not of the right type: model"),
    ({"ema": None}, "not of the right type: ema"),
    ({"ema": {3: torch.zeros(1)}}, "not of the right type: ema"),
    ({"optimizer": torch.zeros(1)}, "not of the right type: optimizer"),
    ({"step": -1, "history": 5}, "not of the right type: history, step"),
    ({"step": True}, "not of the right type: step"),
    ({"version": 1.0}, "not of the right type: version"),
    ({"history": {"a": {1, 2}}}, "asks to run '__builtin__.set'"),
    ({"history": {"a": b"bytes"}}, "asks to run '_codecs.encode'"),
    ({"history": {1.5: 2}}, "a dict with odd keys"),
    ({"history": {"a": nn.Parameter(torch.zeros(2))}}, "asks to run 'torch._utils._rebuild_parameter'"),
    ({"history": {"a": torch.zeros(1).expand(10**6)}}, "unfolds to more than its own size"),
    ({"history": {"a": torch.zeros(4)[1:2]}}, "an odd kind"),
])
def test_states_of_another_making(path: Path, changes: dict[str, Any], message: str) -> None:
    resave(path, **changes)
    with pytest.raises(UserError, match=message):
        checkpoint.load(path)


def test_containers_that_unfold_without_end(path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    laugh: Any = [0]
    for _ in range(12):
        laugh = [laugh] * 20
    deep: Any = None
    for _ in range(300):
        deep = [deep]
    for value in (loop, laugh, deep, [torch.zeros(1000)] * 1000):
        resave(path, right_digest=False, history={"a": value})
        assert "unfolds to more than its own size" in refused(path)


class Touches:
    """Makes a file when it is unpickled by the book."""

    def __init__(self, marker: Path, function: Any) -> None:
        self.call = function, (f"open({str(marker)!r}, 'w')" if function in (eval, exec) else f"touch {marker}",)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec])
def test_hostile_pickles_are_not_run(path: Path, function: Any) -> None:
    marker = path.with_name("marker")
    state = torch.load(path, weights_only=True)
    for protocol in (2, 4):
        torch.save(state | {"history": Touches(marker, function)}, path, pickle_protocol=protocol)
        assert f".{function.__name__}'" in refused(path) and not marker.exists()
    path.write_bytes(pickle.dumps(Touches(marker, function)))
    refused(path)
    assert not marker.exists()


def archive(path: Path, compression: int = zipfile.ZIP_STORED, **changes: bytes) -> None:
    """Writes the file's archive again, with right checksums and with some records changed."""
    with zipfile.ZipFile(path) as source:
        records = {entry.filename: source.read(entry) for entry in source.infolist()}
    with zipfile.ZipFile(path, "w", compression) as target:
        for name, content in records.items():
            target.writestr(name, changes.get(name.partition("/")[2].replace(".", "_").replace("/", "_"), content))


def test_zip_bombs(path: Path) -> None:
    small = path.read_bytes()
    archive(path, zipfile.ZIP_DEFLATED, data_0=bytes(10**7))
    assert path.stat().st_size < 10**5 and "compressed, or unpacks to more" in refused(path)
    path.write_bytes(small)
    archive(path, zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(path)


def test_memory_bombs_in_the_pickle(path: Path) -> None:
    """A memo of 2^31 places, which the C unpickler would fill; and a call that allocates."""
    for content in (b"\x80\x02}r\xff\xff\xff\x7f.", b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R."):
        archive(path, data_pkl=content)
        start = time.perf_counter()
        refused(path)
        assert time.perf_counter() - start < 2


def test_records_shorter_than_their_tensors_are_never_read_beyond(path: Path) -> None:
    """Some versions of torch take the pickle's word for the size of a record."""
    with zipfile.ZipFile(path) as source:
        size = source.getinfo("archive/data/0").file_size
    for other in (size - 4, size + 4):
        archive(path, data_0=bytes(other))
        assert "another size than its record" in refused(path)


# Two files


def test_previous_is_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / "last.pt", make_state(step))
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 3
    assert checkpoint.load(tmp_path / "previous.pt")["step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


def test_previous_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    test_previous_is_the_one_before(tmp_path)


def test_damaged_last_is_named_kept_and_the_one_before_it_offered(tmp_path: Path) -> None:
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for step in (1, 2):
        checkpoint.save(last, make_state(step))
    broken = last.read_bytes()[:-500]
    last.write_bytes(broken)
    message = refused(last)
    assert f"--checkpoint {previous}" in message and "rename it to last.pt" in message and last.read_bytes() == broken
    previous.write_bytes(b"junk")
    assert "previous.pt" not in refused(last)


def test_names_that_differ_from_last_keep_no_previous(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path / "pretrained.pt", make_state(step))
    assert [path.name for path in tmp_path.iterdir()] == ["pretrained.pt"]


# Disks that are full or closed


@pytest.mark.parametrize("broken", ["write", "fsync", "replace"])
def test_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    last = tmp_path / "last.pt"
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
        with pytest.raises(UserError, match=r"last.pt: can't be written \(No space left on device\): free some space; "
                                            "the file that was there is untouched"):
            checkpoint.save(last, make_state(2))
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".previous")] == ["last.pt"]
    assert checkpoint.load(last)["step"] == 1


def test_no_folder_to_write_to(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't be written .No such file or directory.: make its folder first"):
        checkpoint.save(tmp_path / "none" / "last.pt", make_state())
    (tmp_path / "last.pt").mkdir()
    with pytest.raises(UserError, match="last.pt: can't be written"):
        checkpoint.save(tmp_path / "last.pt", make_state())
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(UserError, match="can't be written .Permission denied.: make it writable"):
        checkpoint.save(tmp_path / "closed" / "last.pt", make_state())


def test_write_atomically_cleans_up_after_any_failure(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    checkpoint.write_atomically(target, lambda file: file.write(b"one"))

    def fail(file: Any) -> None:
        file.write(b"two")
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        checkpoint.write_atomically(target, fail)
    assert target.read_bytes() == b"one" and list(tmp_path.iterdir()) == [target]


SAVER = """
import sys, pathlib, torch
sys.path[:0] = [{root!r}, {tests!r}]
import checkpoint, test_checkpoint
states = [test_checkpoint.make_state(step) for step in range(10)]
print("ready", flush=True)
while True:
    for state in states:
        checkpoint.save(pathlib.Path({path!r}), state)
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_kills_in_the_middle_of_saves(tmp_path: Path) -> None:
    last = tmp_path / "last.pt"
    here = Path(__file__).resolve().parent
    code = SAVER.format(root=str(here.parent), tests=str(here), path=str(last))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for _ in range(20):  # stopped anywhere, both files are whole, as a kill there would leave them
        time.sleep(0.013)
        process.send_signal(signal.SIGSTOP)
        if last.exists():
            checkpoint.load(last)
        if (tmp_path / "previous.pt").exists():
            checkpoint.load(tmp_path / "previous.pt")
        process.send_signal(signal.SIGCONT)
    time.sleep(0.05)
    process.kill()
    process.wait()
    process.stdout.close()
    before = checkpoint.load(last)["step"]
    checkpoint.save(last, make_state(99))
    assert checkpoint.load(last)["step"] == 99 and checkpoint.load(tmp_path / "previous.pt")["step"] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]  # no litter of the killed one


# Weights into a network


def test_load_weights(path: Path) -> None:
    weights, network = checkpoint.load(path)["ema"], Network()
    checkpoint.load_weights(network, weights, path)
    assert same({**network.state_dict()}, weights)
    half = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    checkpoint.load_weights(network, half, path)
    assert network.linear.weight.dtype == torch.float32 and network.linear.weight.equal(half["linear.weight"].float())


@pytest.mark.parametrize("name, value, message", [
    ("linear.bias", None, "'linear.bias' is missing"),
    ("more\n", torch.zeros(1), r"'more\\n' is unknown"),
    ("linear.bias", torch.zeros(3), r"linear.bias has the shape \(3,\), where .* \(2,\)"),
    ("linear.bias", torch.zeros(2, dtype=torch.int64), "linear.bias is torch.int64, the network's torch.float32"),
    ("count", torch.zeros(3), "count is torch.float32, the network's torch.int64"),
    ("linear.bias", torch.tensor([0.0, float("nan")]), "linear.bias is not finite"),
    ("linear.bias", torch.tensor([0.0, 1e300], dtype=torch.float64), "linear.bias is not finite"),
])
def test_weights_that_do_not_fit(name: str, value: Tensor | None, message: str) -> None:
    weights, network = {**make_state()["ema"]}, Network()
    before = {key: item.clone() for key, item in network.state_dict().items()}
    weights.pop(name, None)
    if value is not None:
        weights[name] = value
    with pytest.raises(UserError, match=f"^x.pt: the weight .*{message}") as caught:
        checkpoint.load_weights(network, weights, Path("x.pt"))
    assert "\n" not in str(caught.value) and same({**network.state_dict()}, before)


# Which file, and whose


def test_find(tmp_path: Path) -> None:
    own, shipped = tmp_path / "mnist" / "last.pt", tmp_path / "pretrained.pt"
    with pytest.raises(UserError, match="mnist/last.pt: there is no checkpoint yet.*--mode train"):
        checkpoint.find("mnist", None, tmp_path)
    shipped.touch()
    assert checkpoint.find("mnist", None, tmp_path) == shipped
    own.parent.mkdir()
    own.touch()
    assert checkpoint.find("mnist", None, tmp_path) == own
    assert checkpoint.find("mnist", shipped, tmp_path) == shipped
    with pytest.raises(UserError, match="there is no such checkpoint"):
        checkpoint.find("mnist", tmp_path / "none.pt", tmp_path)
    with pytest.raises(UserError, match="this is a folder; name a file, such as .*mnist/last.pt"):
        checkpoint.find("mnist", own.parent, tmp_path)


HOLDER = """
import sys, pathlib
sys.path.insert(0, {root!r})
import checkpoint
with checkpoint.lock(pathlib.Path({path!r})):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_lock_refuses_a_second_run_until_the_first_ends(tmp_path: Path) -> None:
    folder = tmp_path / "mnist"
    code = HOLDER.format(root=str(Path(__file__).resolve().parent.parent), path=str(folder))
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdin is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another run of this name is going on .*mnist.: wait, or choose another"):
        checkpoint.lock(folder).__enter__()
    holder.kill()  # the system frees the lock
    holder.wait()
    holder.stdout.close()
    holder.stdin.close()
    for _ in range(2):
        with checkpoint.lock(folder):
            pass


def test_lock_of_an_impossible_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be locked"), checkpoint.lock(tmp_path / "file"):
        pass
