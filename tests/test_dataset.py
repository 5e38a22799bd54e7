"""dataset.py, support/idx.py: a batch follows from (seed, step), and files are what they have to be."""

import functools
import gzip
import hashlib
import http.server
import os
import shutil
import struct
import threading
from pathlib import Path

import pytest
import torch

import dataset
from config import Config, UserError
from dataset import LabelledImages, random_batch
from run import main
from support import idx, loading, selection
from support.runtime import Runtime

IMAGES, LABELS = idx.FILES["train"]
CPU = Runtime(torch.device("cpu"), bf16=False, compile=False)


def load_idx(folder: Path, split: str) -> LabelledImages:
    return loading.load_split(Config(dataset="idx", data_dir=folder), split)


def load_mnist(folder: Path, split: str) -> LabelledImages:
    return loading.load_split(Config(dataset="mnist", data_dir=folder), split)


def idx_files(train: int = 12, test: int = 7) -> dict[str, bytes]:
    """The content of four small IDX files; every byte of the images differs from those beside it."""
    files = {}
    for (images, labels), n in zip(idx.FILES.values(), (train, test)):
        files[images] = struct.pack(">4I", 0x803, n, 28, 28) + bytes((7 * i + n) % 251 for i in range(n * 784))
        files[labels] = struct.pack(">2I", 0x801, n) + bytes((i + n) % 10 for i in range(n))
    return files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in idx_files().items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.fixture
def mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder whose "MNIST" is the small set, known by its MD5s."""
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, data in idx_files().items():
        (raw / name).write_bytes(data)
        monkeypatch.setitem(idx.MNIST_MD5, name, hashlib.md5(data).hexdigest())
    return tmp_path


# Batches


def batch_indices(seed: int, step: int, size: int, n: int) -> torch.Tensor:
    return random_batch(seed, step, size, n)[0]


def test_every_epoch_is_a_full_permutation_and_differs_from_the_others() -> None:
    n, size = 60, 15
    epochs = [torch.cat([batch_indices(3, epoch * 4 + k, size, n) for k in range(4)]) for epoch in range(3)]
    for epoch in epochs:
        assert epoch.dtype == torch.int64 and sorted(epoch.tolist()) == list(range(n))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3


@pytest.mark.parametrize("size", [1, 7, 64, 150])
def test_batches_of_any_size_cut_the_same_stream(size: int) -> None:
    """Straddling one epoch's end or several; asked for in any order."""
    n = 60
    whole = batch_indices(0, 0, 600, n)
    steps = list(range(600 // size))
    for step in reversed(steps):
        assert batch_indices(0, step, size, n).equal(whole[step * size:(step + 1) * size])


def test_seeds_give_unrelated_orders() -> None:
    """A sum of seed and epoch would make epoch 1 of seed 0 the epoch 0 of seed 1."""
    first = batch_indices(0, 1, 60, 60)
    assert not first.equal(batch_indices(1, 0, 60, 60))
    assert not first.equal(batch_indices(2**40, 1, 60, 60))


def test_a_batch_is_a_copy() -> None:
    batch_indices(0, 0, 60, 60).zero_()
    assert batch_indices(0, 0, 60, 60).unique().numel() == 60


def test_all_that_is_random_in_a_step_follows_from_seed_and_step() -> None:
    one, again, later, other = (random_batch(*key, 8, 60) for key in ((0, 3), (0, 3), (0, 4), (1, 3)))
    assert [part.shape for part in one] == [(8,), (9,), (8, 1, 28, 28)]
    for part, same, *unlike in zip(one, again, later, other):
        assert part.equal(same) and not any(part.equal(each) for each in unlike)
    assert 0 <= one[1].min() and one[1].max() < 1 and abs(one[2].std() - 1) < 0.05


# IDX files


def test_idx_content(folder: Path) -> None:
    images = load_idx(folder, "test")
    raw = idx_files()
    assert len(images) == 7 and images.images.shape == (7, 1, 28, 28) and images.images.dtype == torch.uint8
    assert bytes(images.images.flatten().tolist()) == raw["t10k-images-idx3-ubyte"][16:]
    assert images.labels.dtype == torch.int64 and images.labels.tolist() == [7, 8, 9, 0, 1, 2, 3]
    images.images.zero_()  # writable
    assert images.to("meta").labels.device.type == "meta"


def test_idx_in_raw_subfolder_and_gzipped(tmp_path: Path) -> None:
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for name, data in idx_files().items():
        (tmp_path / "MNIST" / "raw" / f"{name}.gz").write_bytes(gzip.compress(data))
    assert len(load_idx(tmp_path, "train")) == 12


DAMAGED = {
    "truncated": (IMAGES, lambda data: data[:-100], "truncated: not the 9,424 bytes that its header promises"),
    "empty": (LABELS, lambda data: b"", "damaged, or can't be read .*requires a buffer of 8 bytes"),
    "header only in part": (IMAGES, lambda data: data[:9], "can't be read .*requires a buffer of 16 bytes"),
    "too long": (LABELS, lambda data: data + b"\0", "too long: not the 20 bytes"),
    "labels for images": (IMAGES, lambda data: idx_files()[LABELS], "IDX file of images: .*00000801.*swapped"),
    "images for labels": (LABELS, lambda data: idx_files()[IMAGES], "IDX file of labels: .*00000803.*swapped"),
    "no IDX file": (IMAGES, lambda data: b"<html>not found, sorry</html>", "not an IDX file of images: it starts"),
    "32 pixels": (IMAGES, lambda data: struct.pack(">4I", 0x803, 12, 32, 32) + data[16:], "32x32 pixels, not 28x28"),
    "no images": (IMAGES, lambda data: struct.pack(">4I", 0x803, 0, 28, 28), "promises 0 images"),
    "billions": (IMAGES, lambda data: struct.pack(">4I", 0x803, 2**32 - 1, 28, 28), "promises 4,294,967,295 images"),
    "fewer labels": (LABELS, lambda data: struct.pack(">2I", 0x801, 11) + data[8:-1], "12 images, but .* 11 labels"),
    "label 10": (LABELS, lambda data: data[:10] + b"\x0a" + data[11:], "it holds the label 10, but only .* 0 to 9"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_idx_file(folder: Path, case: str) -> None:
    name, damage, message = DAMAGED[case]
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        load_idx(folder, "train")
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert len(load_idx(folder, "test")) == 7


def test_gzip_that_is_damaged_or_a_bomb(folder: Path) -> None:
    data = gzip.compress((folder / IMAGES).read_bytes() + bytes(10**7))
    (folder / IMAGES).unlink()
    for content, message in ((data, "too long"), (data[:40], "can't be read"), (b"x" * 50, "can't be read")):
        (folder / f"{IMAGES}.gz").write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_idx(folder, "train")


@pytest.mark.parametrize("end", ["", ".gz"])
def test_the_names_that_kaggle_and_7_zip_give_are_accepted(end: str, tmp_path: Path) -> None:
    for name, data in idx_files().items():
        path = tmp_path / f"{name.replace('-idx', '.idx')}{end}"
        path.write_bytes(gzip.compress(data) if end else data)
    assert len(load_idx(tmp_path, "train")) == 12 and len(load_idx(tmp_path, "test")) == 7


@pytest.mark.parametrize("newer, count", [(IMAGES, 12), (f"{IMAGES}.gz", 9)])
def test_of_two_files_the_newer_is_read_and_named(newer: str, count: int, folder: Path, capsys) -> None:
    """Where they differ; packed beside unpacked, as after a set was made again."""
    (folder / f"{IMAGES}.gz").write_bytes(gzip.compress(idx_files(9)[IMAGES]))
    (folder / f"{LABELS}.gz").write_bytes(gzip.compress((folder / LABELS).read_bytes()))
    for name, seconds in ((IMAGES, 1000), (f"{IMAGES}.gz", 1000), (newer, 2000)):
        os.utime(folder / name, (seconds, seconds))
    images = idx._read_idx(folder, IMAGES, {}, "")
    assert len(images) == count and len(idx._read_idx(folder, LABELS, {}, "")) == 12
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"note: {folder / newer} is read; {IMAGES}") and "is no newer" in line


@pytest.mark.parametrize("brightest, noted", [(0, True), (1, True), (16, True), (200, False)])
def test_images_that_are_nearly_black_are_named(brightest: int, noted: bool, folder: Path, capsys) -> None:
    """As after a cast of [0, 1] to uint8."""
    for name in (IMAGES, "t10k-images-idx3-ubyte"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:16] + bytes(byte * brightest // 250 for byte in data[16:]))
    loading.load_both(Config(dataset="idx", data_dir=folder), CPU)
    output = capsys.readouterr().out
    assert output.count("\n") == noted and (f"brightest pixel of the training images is {brightest}, not 255" in output
                                            ) == noted


def test_missing_idx_file(folder: Path) -> None:
    (folder / LABELS).unlink()
    (folder / LABELS).mkdir()  # a folder is not a file
    with pytest.raises(UserError, match=f"{LABELS}: there is no such file.*--data-dir"):
        load_idx(folder, "train")
    with pytest.raises(UserError, match="there is no such file"):
        load_idx(folder / "nowhere", "train")


# MNIST


def test_mnist_is_known_by_its_md5(mnist: Path) -> None:
    assert len(load_mnist(mnist, "train")) == 12
    path = mnist / "mnist" / "MNIST" / "raw" / IMAGES
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{IMAGES}: wrong content.*MD5 .*; delete it to have it downloaded again"):
        load_mnist(mnist, "train")


def test_mnist_swapped_files_are_named(mnist: Path) -> None:
    path = mnist / "mnist" / "MNIST" / "raw" / IMAGES
    path.write_bytes(idx_files()["t10k-images-idx3-ubyte"])
    with pytest.raises(UserError, match=f"{IMAGES}: wrong content: that of t10k-images-idx3-ubyte"):
        load_mnist(mnist, "train")


def test_mnist_md5s_are_those_of_the_real_files() -> None:
    """Of the four files unpacked, in the order train images, train labels, test images, test labels."""
    assert [idx.MNIST_MD5[name] for name in idx.NAMES] == [
        "6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"]


class Mirror:
    """Serves gzipped files on this machine, and notes what was asked for."""

    def __init__(self, files: dict[str, bytes], folder: Path) -> None:
        for name, data in files.items():
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        self.folder = folder

    def __enter__(self) -> str:
        handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
        quiet = functools.partial(handler, directory=self.folder)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), quiet)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}/"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def torchvision_mnist(mnist: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """torchvision's MNIST, told the MD5s of the small set's .gz files; and a mirror of these."""
    kind = pytest.importorskip("torchvision.datasets").MNIST
    served = tmp_path_factory.mktemp("mirror")
    with Mirror(idx_files(), served) as address:
        resources = [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in sorted(served.iterdir())]
        monkeypatch.setattr(kind, "resources", resources)
        monkeypatch.setattr(kind, "mirrors", ["http://127.0.0.1:9/", address])  # nobody listens at the first
        yield kind, served


def test_download_takes_the_mirror_that_works(mnist: Path, torchvision_mnist, capsys: pytest.CaptureFixture) -> None:
    raw = mnist / "mnist" / "MNIST" / "raw"
    for name in idx.NAMES[1:]:
        (raw / name).unlink()
    (raw / idx.NAMES[0]).touch()
    before = (raw / idx.NAMES[0]).stat().st_mtime_ns
    assert len(load_mnist(mnist, "test")) == 7
    assert sorted(path.name for path in raw.iterdir()) == sorted(idx.NAMES) and list(raw.parent.iterdir()) == [raw]
    assert (raw / idx.NAMES[0]).stat().st_mtime_ns == before  # what was there is not overwritten
    said = capsys.readouterr()
    assert said.out.count("\n") == 1 and str(raw) in said.out and said.err == ""


def test_download_without_a_network(mnist: Path, torchvision_mnist, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision_mnist[0], "mirrors", ["http://127.0.0.1:9/one/", "http://127.0.0.1:9/two/"])
    raw = mnist / "mnist" / "MNIST" / "raw"
    (raw / IMAGES).unlink()
    with pytest.raises(UserError, match="can't be downloaded .*9/one/.*refused.*9/two/.*put train-im") as caught:
        load_mnist(mnist, "train")
    assert "\n" not in str(caught.value) and list(raw.parent.iterdir()) == [raw]


def test_download_of_damaged_files_changes_nothing(mnist: Path, torchvision_mnist,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision finds a .gz with the wrong MD5, and this project an unpacked file with the wrong one."""
    kind, served = torchvision_mnist
    raw = mnist / "mnist" / "MNIST" / "raw"
    (raw / LABELS).unlink()
    monkeypatch.setitem(idx.MNIST_MD5, LABELS, "0" * 32)
    with pytest.raises(UserError, match=f"{LABELS}: wrong content"):
        load_mnist(mnist, "train")
    (served / f"{LABELS}.gz").write_bytes(b"junk")
    with pytest.raises(UserError, match="can't be downloaded .*corrupted"):
        load_mnist(mnist, "train")
    assert not (raw / LABELS).exists() and list(raw.parent.iterdir()) == [raw]


def test_download_into_an_impossible_place(tmp_path: Path, torchvision_mnist) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not in .*file/mnist/MNIST/raw and can't be .*Not a dir.*--data-dir"):
        load_mnist(tmp_path / "file", "train")


def test_download_into_a_folder_without_permission(torchvision_mnist, no_root: None) -> None:
    Path("closed").mkdir(mode=0o500)
    with pytest.raises(UserError, match="can't be downloaded .*Permission denied"):
        load_mnist(Path("closed"), "train")


# --data-dir


@pytest.fixture
def unreachable(torchvision_mnist, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and mirrors that do not answer."""
    monkeypatch.setattr(torchvision_mnist[0], "mirrors", ["http://127.0.0.1:9/"])
    for path in own_folder.iterdir():
        shutil.rmtree(path)
    return own_folder


@pytest.mark.parametrize("flags", [["--mode", "train", "--name", "x", "--minutes", "0.01"],
                                   ["--mode", "train", "--dataset", "mnist"], ["--mode", "evaluate"],
                                   ["--mode", "compare", "--runs", "pretrained", "pretrained --guidance 1"]])
def test_a_mistyped_folder_is_an_error_and_stays_away(flags: list[str], unreachable: Path, capsys) -> None:
    (unreachable / "there").mkdir()
    for folder in ("typo", "there", "there/typo"):
        assert main([*flags, "--data-dir", folder, "--device", "cpu"]) == 2
        output = capsys.readouterr()
        assert output.err.count("\n") == 1 and f"MNIST is not in {folder}/mnist/MNIST/raw" in output.err
        assert "NOT MNIST" not in output.out  # never the generated digits
        assert list(unreachable.rglob("*")) == [unreachable / "there"]


def test_a_download_that_is_interrupted_leaves_no_folder(unreachable: Path, torchvision_mnist, monkeypatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torchvision_mnist[0], "__init__", interrupted)
    assert main(["--mode", "train", "--device", "cpu"]) == 130 and list(unreachable.iterdir()) == []


@pytest.mark.parametrize("layout", ["mnist/MNIST/raw", "MNIST/raw"])
def test_both_layouts_are_found_in_a_folder_under_the_home_folder(layout: str, mnist: Path, unreachable: Path,
                                                                  monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(unreachable / "home"))
    raw = unreachable / "home" / "data" / layout
    raw.mkdir(parents=True)
    for name, data in idx_files().items():
        (raw / name).write_bytes(data)
    config = selection.settle(Config(mode="train", data_dir=Path("~/data")), CPU)
    assert config.dataset == "mnist" and len(loading.load_split(config, "test")) == 7
    assert [path.name for path in unreachable.iterdir()] == ["home"]  # none called "~"


@pytest.mark.parametrize("name, said", [("~nobody-of-this-name/data", "no such home folder"),
                                        ("a" * 300, "can't be downloaded")])
@pytest.mark.parametrize("data", ["auto", "idx", "kmnist"])
def test_an_impossible_folder_is_one_line(data: str, name: str, said: str, unreachable: Path, capsys) -> None:
    assert main(["--mode", "train", "--dataset", data, "--data-dir", name, "--name", "x", "--device", "cpu"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and (said in line or "there is no such file" in line)


# Other data sets


@pytest.mark.parametrize("name", ["fashion-mnist", "kmnist"])
def test_others_are_fetched_kept_and_read_as_gz(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                tmp_path_factory: pytest.TempPathFactory) -> None:
    source, served = dataset.SOURCES[name], tmp_path_factory.mktemp("mirror")
    kind = getattr(pytest.importorskip("torchvision.datasets"), source.kind)
    assert dict(kind.resources) == source.digests and set(dataset.CLASS_NAMES) >= {name}
    with Mirror(idx_files(), served) as address:
        digests = {f"{file}.gz": hashlib.md5((served / f"{file}.gz").read_bytes()).hexdigest() for file in idx.NAMES}
        monkeypatch.setattr(kind, "resources", list(digests.items()))
        monkeypatch.setattr(kind, "mirrors", [address])
        monkeypatch.setitem(dataset.SOURCES, name, source._replace(digests=digests))
        config = Config(dataset=name, data_dir=tmp_path)
        assert len(loading.load_split(config, "train")) == 12
    raw = tmp_path / Path(name, source.kind, "raw")
    assert {path.name for path in raw.iterdir()} == set(digests) and list(raw.parent.iterdir()) == [raw]
    assert len(loading.load_split(config, "test")) == 7  # from there: the server is gone
    (raw / IMAGES).write_bytes(idx_files(13)[IMAGES])  # an unpacked file is not the one that is known
    assert len(loading.load_split(config, "train")) == 12
    (raw / f"{LABELS}.gz").write_bytes(gzip.compress(idx_files()[LABELS][:-1] + b"\0"))
    with pytest.raises(UserError, match=f"{LABELS}.gz: wrong content"):
        loading.load_split(config, "train")
    (raw / f"{LABELS}.gz").unlink()
    with pytest.raises(UserError, match=f"{source.kind} is not in .*can't be .*refused.*put {idx.NAMES[0]}.gz"):
        loading.load_split(config, "train")
