"""Each metric against a closed form, an independent implementation or a constructed case; no data set is needed."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from config import UserError
from evaluation import metrics
from evaluation.classifier import SHIPPED, Classifier, extract, load_classifier
from support.checkpoint import read_tensors, weights_digest
from tests.conftest import frechet_distance

FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "cmr10.ttf", "STIXGeneral.ttf")


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def printed_digits(copies: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Digits in matplotlib's fonts at random sizes, places and strengths: uint8 [10 * copies, 1, 28, 28], labels."""
    chance, folder = np.random.default_rng(seed), Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images, labels = [], []
    for i in range(10 * copies):
        font = ImageFont.truetype(str(folder / chance.choice(FONTS)), int(chance.integers(22, 26)))
        image = Image.new("L", (28, 28))
        place = tuple(14 + chance.uniform(-1.5, 1.5, 2))
        ImageDraw.Draw(image).text(place, str(i % 10), fill=int(chance.integers(220, 256)), font=font, anchor="mm")
        images.append(torch.from_numpy(np.array(image))[None])
        labels.append(i % 10)
    return torch.stack(images), torch.tensor(labels)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return load_classifier()


# The classifier


def test_shipped_classifier_reads_digits(classifier: Classifier) -> None:
    images, labels = printed_digits(10)
    features, probabilities = extract(classifier, images, batch=64)
    assert (probabilities.argmax(1) == labels).double().mean() > 0.95
    assert features.shape == (100, 64) and probabilities.sum(1).allclose(torch.ones(100))
    torch.testing.assert_close(features, extract(classifier, images, batch=100)[0], rtol=1e-4, atol=1e-4)


def test_shipped_classifier_is_small_and_says_how_it_was_made(classifier: Classifier) -> None:
    assert SHIPPED.stat().st_size < 1e6
    assert classifier.meta["accuracy"] >= 0.995
    assert classifier.meta["command"].startswith("python benchmarks/train_")
    assert len(classifier.digest) == 16 and not classifier.training
    assert load_classifier().digest == classifier.digest == weights_digest(classifier.state_dict())


def test_damaged_or_missing_classifier_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_classifier(tmp_path / "none.safetensors")
    path, whole = tmp_path / "classifier.safetensors", SHIPPED.read_bytes()
    for broken in (b"", b"not a file of tensors", whole[:1000], whole[:-1000]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"classifier\.safetensors: damaged"):
            load_classifier(path)
    state, metadata = read_tensors(SHIPPED, "")
    state["head.bias"][0] += 1e-3
    path.write_bytes(safetensors.torch.save(state, metadata))
    with pytest.raises(UserError, match="digest"):
        load_classifier(path)
    for other, said in (({}, metadata), ({"head.bias": torch.zeros(3)}, metadata), (state, {}),
                        (state, {**metadata, "meta": "{"})):
        path.write_bytes(safetensors.torch.save(other, said))
        with pytest.raises(UserError, match="no classifier"):
            load_classifier(path)


# Fréchet distance


def covariance(size: int, seed: int) -> Tensor:
    root = torch.randn(size, size, generator=random(seed), dtype=torch.float64)
    return root @ root.T


def test_frechet_of_commuting_gaussians() -> None:
    a, b = torch.tensor([4.0, 1.0, 0.0]).double(), torch.tensor([1.0, 9.0, 2.0]).double()
    rotation = torch.linalg.qr(covariance(3, 1)).Q
    mean = torch.tensor([1.0, -2.0, 0.5]).double()
    cov_a, cov_b = rotation @ a.diag() @ rotation.T, rotation @ b.diag() @ rotation.T
    found = metrics.frechet_from_moments(mean, cov_a, 0 * mean, cov_b).item()
    assert found == pytest.approx(5.25 + 1 + 4 + 2, abs=1e-6)  # |mean|^2 + sum of (sqrt a - sqrt b)^2


def test_frechet_of_any_gaussians_by_the_eigenvalues_of_the_product() -> None:
    a, b = covariance(12, 2), covariance(12, 3)
    mean = torch.randn(12, generator=random(4), dtype=torch.float64)
    root_trace = torch.linalg.eigvals(a @ b).sqrt().real.sum()
    expected = (mean.square().sum() + a.trace() + b.trace() - 2 * root_trace).item()
    assert metrics.frechet_from_moments(mean, a, 0 * mean, b).item() == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_from_moments(0 * mean, b, mean, a).item() == pytest.approx(expected, rel=1e-9)


def test_frechet_of_singular_covariances() -> None:
    u, v = torch.randn(2, 20, generator=random(5), dtype=torch.float64)
    expected = (u.square().sum() + v.square().sum() - 2 * (u @ v).abs()).item()  # of outer products of rank one
    zero = torch.zeros(20, dtype=torch.float64)
    assert metrics.frechet_from_moments(zero, u.outer(u), zero, v.outer(v)).item() == pytest.approx(expected, abs=1e-6)
    constant = torch.ones(5, 20)
    assert frechet_distance(constant, 3 * constant) == pytest.approx(80)


def test_frechet_of_samples() -> None:
    x = torch.randn(50_000, 4, generator=random(6))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 2) == pytest.approx(16, rel=1e-5)
    assert frechet_distance(x[:25_000], 3 * x[25_000:] + 1) == pytest.approx(4 + 4 * 4, rel=0.02)


def test_moments_add_up_by_class_and_block_and_take_any_shares() -> None:
    x, labels = torch.randn(600, 5, generator=random(7)), torch.randint(0, 4, (600,), generator=random(8))
    block = torch.arange(600) // 100
    parts = metrics.class_moments(x, labels, block)
    assert parts.first.shape == (6, 10, 5) and parts.second.shape == (6, 10, 5, 5)
    everything = parts.sum()
    without = everything - metrics.class_moments(x[200:300], labels[200:300], 0 * block[200:300]).sum()
    for found, chosen in ((everything, torch.ones(600).bool()), (without, block != 2)):
        mean, covariance = found.of(torch.tensor([3, 1]))
        for place, k in enumerate((3, 1)):
            own = x[chosen & (labels == k)].double()
            torch.testing.assert_close(mean[place], own.mean(0))
            torch.testing.assert_close(covariance[place], own.T.cov())
        mean, covariance = found.together()
        torch.testing.assert_close(mean, x[chosen].double().mean(0))
        torch.testing.assert_close(covariance, x[chosen].double().T.cov())
    # Shares of 2 to 1 are what class 0 twice and class 1 once would be, were they equally many.
    two = torch.cat([x[labels == 0][:100], x[labels == 1][:100]])
    shares = torch.tensor([2, 1] + 8 * [0]).double()
    mean, _ = metrics.class_moments(two, torch.arange(200) // 100, torch.zeros(200).long()).sum().together(shares)
    torch.testing.assert_close(mean, torch.cat([two[:100], two[:100], two[100:]]).double().mean(0))


# Texture


def test_texture_reacts_where_digit_features_do_not(classifier: Classifier) -> None:
    images, _ = printed_digits(60)
    real, other = images[:300], images[300:]
    level = other.float()
    blur = torch.tensor([1.0, 2, 1]).outer(torch.tensor([1.0, 2, 1]))[None, None] / 16
    grain = torch.randint(-3, 4, level.shape, generator=random()) * (level == 0)
    damage = {"grain": (level + grain).clamp(0, 255), "blur": F.conv2d(level, blur, padding=1), "contrast": 0.9 * level}
    texture, features = metrics.texture_features(real), extract(classifier, real)[0]
    texture_baseline = frechet_distance(metrics.texture_features(other), texture)
    digit_baseline = frechet_distance(extract(classifier, other)[0], features)
    for name, changed in damage.items():
        changed = changed.round().byte()
        seen = frechet_distance(metrics.texture_features(changed), texture) / texture_baseline
        assert seen > (1.5 if name == "contrast" else 8), name
    digits = extract(classifier, (level + grain).clamp(0, 255).byte())[0]
    assert frechet_distance(digits, features) < 1.5 * digit_baseline


def test_texture_filters_are_orthonormal_and_blind_to_brightness() -> None:
    filters = metrics.texture_filters().flatten(1)
    torch.testing.assert_close(filters @ filters.T, torch.eye(8))
    assert filters.sum(1).abs().max() < 1e-6
    flat = metrics.texture_features(torch.full((1, 1, 28, 28), 200, dtype=torch.uint8))
    assert flat.shape == (1, 32) and flat.abs().max() < 1e-3


# Precision, recall, coverage


def overlap(real: Tensor, fake: Tensor, k: int = 5, block: int = 1000) -> tuple[float, float, float]:
    real_radius, fake_radius = (metrics.radius(points, k, block) for points in (real, fake))
    return metrics.precision_recall_coverage(real, real_radius, fake, fake_radius, block)


def test_overlap_of_points_on_a_line() -> None:
    real, fake = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[0.5], [100.0], [101.0]])
    found = overlap(real, fake, k=1)
    # Every real ball has radius 1; the fake ones reach 99.5, 1 and 1. The fake at 0.5 lies in the balls of 0 and 1.
    assert found == pytest.approx((1 / 3, 1, 2 / 4))


def test_overlap_against_plain_loops() -> None:
    real = torch.randn(40, 3, generator=random(1), dtype=torch.float64)
    fake = torch.randn(30, 3, generator=random(2), dtype=torch.float64) * 1.2 + 0.5
    k = 3

    def radius(points: Tensor) -> list[float]:
        return [sorted((p - q).norm().item() for q in points)[k] for p in points]

    inside = [[(x - y).norm().item() <= r for x, r in zip(real, radius(real))] for y in fake]  # [fake][real]
    around = [[(x - y).norm().item() <= r for y, r in zip(fake, radius(fake))] for x in real]  # [real][fake]
    expected = [np.mean([any(row) for row in rows]) for rows in (inside, around, zip(*inside))]
    found = overlap(real, fake, k, block=16)
    assert found == pytest.approx(expected) and 0.1 < found[0] < 1


def test_overlap_of_same_and_of_distant_sets() -> None:
    points = torch.randn(300, 8, generator=random(3))
    assert overlap(points, points) == (1, 1, 1)
    assert overlap(points, points + 1000) == (0, 0, 0)


# Memorisation


@pytest.mark.parametrize("shape", [(1, 28, 28), (7,)])
def test_nearest_against_brute_force(shape: tuple[int, ...]) -> None:
    references = torch.randint(0, 256, (120, *shape), generator=random(1), dtype=torch.uint8)
    queries = torch.randint(0, 256, (45, *shape), generator=random(2), dtype=torch.uint8)
    queries[3], queries[44] = references[17], references[119]
    queries[5] = references[0]
    queries[5].view(-1)[0] ^= 1  # one grey level away
    every = (queries.double().flatten(1)[:, None] - references.double().flatten(1)).norm(dim=2)  # [45, 120]
    distances, indices = metrics.nearest(queries, references, block=16)
    torch.testing.assert_close(distances, every.amin(1), rtol=1e-12, atol=0)
    assert torch.equal(indices, every.argmin(1))
    assert distances[3] == 0 and distances[5] == 1


def test_the_share_that_is_closer_tells_copies_from_new_images() -> None:
    test = 1 + torch.rand(2000, generator=random(1))
    assert metrics.share_closer(1 + torch.rand(1000, generator=random(2)), test) < 0.03
    copied = torch.cat([torch.zeros(300), 1 + torch.rand(700, generator=random(2))])
    assert metrics.share_closer(copied, test) == pytest.approx(0.3, abs=0.03)
