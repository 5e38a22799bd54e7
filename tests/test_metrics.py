"""Each measure against a closed form, an independent implementation or a constructed case; no data set is needed."""

import math
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import metrics
from config import DiffusionConfig, UserError
from diffusion import NoiseSchedule, make_schedule, posterior

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
def extractor() -> metrics.Extractor:
    return metrics.load_extractor()


# The extractor


def test_shipped_extractor_reads_digits(extractor: metrics.Extractor) -> None:
    images, labels = printed_digits(10)
    found = metrics.extract(extractor, images, batch=64)
    assert metrics.drawn_as_asked(found.probabilities, labels) > 0.95
    assert found.features.shape == (100, 64) and found.probabilities.sum(1).allclose(torch.ones(100))
    whole = metrics.extract(extractor, images, batch=100)
    torch.testing.assert_close(found.features, whole.features, rtol=1e-4, atol=1e-4)


def test_shipped_extractor_is_small_and_says_how_it_was_made(extractor: metrics.Extractor) -> None:
    assert metrics.EXTRACTOR.stat().st_size < 1e6
    assert extractor.meta["accuracy"] >= 0.995
    assert extractor.meta["command"].startswith("python benchmarks/train_extractor.py")
    assert len(extractor.digest) == 16 and not extractor.training
    assert metrics.load_extractor().digest == extractor.digest == metrics.digest_of(extractor.state_dict())


def test_damaged_or_missing_extractor_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"):
        metrics.load_extractor(tmp_path / "none.pt")
    path, whole = tmp_path / "extractor.pt", metrics.EXTRACTOR.read_bytes()
    for broken in (b"", b"not a file of torch", whole[:1000], whole[:-1000]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"extractor\.pt"):
            metrics.load_extractor(path)
    stored = torch.load(metrics.EXTRACTOR, weights_only=True)
    stored["state"]["head.bias"][0] += 1e-3
    torch.save(stored, path)
    with pytest.raises(UserError, match="digest"):
        metrics.load_extractor(path)
    for other in ({"state": {}}, [1, 2], {**stored, "state": {"head.bias": torch.zeros(3)}}):
        torch.save(other, path)
        with pytest.raises(UserError, match="can't be read"):
            metrics.load_extractor(path)


# Fréchet distance


def covariance(size: int, seed: int) -> Tensor:
    root = torch.randn(size, size, generator=random(seed), dtype=torch.float64)
    return root @ root.T


def test_frechet_of_commuting_gaussians() -> None:
    a, b = torch.tensor([4.0, 1.0, 0.0]).double(), torch.tensor([1.0, 9.0, 2.0]).double()
    rotation = torch.linalg.qr(covariance(3, 1)).Q
    mean = torch.tensor([1.0, -2.0, 0.5]).double()
    cov_a, cov_b = rotation @ a.diag() @ rotation.T, rotation @ b.diag() @ rotation.T
    found = metrics.frechet_from_moments(mean, cov_a, 0 * mean, cov_b)
    assert found == pytest.approx(5.25 + 1 + 4 + 2, abs=1e-6)  # |mean|^2 + sum of (sqrt a - sqrt b)^2


def test_frechet_of_any_gaussians_by_the_eigenvalues_of_the_product() -> None:
    a, b = covariance(12, 2), covariance(12, 3)
    mean = torch.randn(12, generator=random(4), dtype=torch.float64)
    root_trace = torch.linalg.eigvals(a @ b).sqrt().real.sum()
    expected = (mean.square().sum() + a.trace() + b.trace() - 2 * root_trace).item()
    assert metrics.frechet_from_moments(mean, a, 0 * mean, b) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_from_moments(0 * mean, b, mean, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_singular_covariances() -> None:
    u, v = torch.randn(2, 20, generator=random(5), dtype=torch.float64)
    expected = (u.square().sum() + v.square().sum() - 2 * (u @ v).abs()).item()  # of outer products of rank one
    zero = torch.zeros(20, dtype=torch.float64)
    assert metrics.frechet_from_moments(zero, u.outer(u), zero, v.outer(v)) == pytest.approx(expected, abs=1e-6)
    constant = torch.ones(5, 20)
    assert metrics.frechet_distance(constant, 3 * constant) == pytest.approx(80)


def test_frechet_of_samples() -> None:
    x = torch.randn(50_000, 4, generator=random(6))
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(x, x + 2) == pytest.approx(16, rel=1e-5)
    assert metrics.frechet_distance(x[:25_000], 3 * x[25_000:] + 1) == pytest.approx(4 + 4 * 4, rel=0.02)
    with pytest.raises(UserError, match="at least 2"):
        metrics.frechet_distance(x[:1], x)


# Texture


def test_texture_reacts_where_digit_features_do_not(extractor: metrics.Extractor) -> None:
    images, _ = printed_digits(60)
    real, other = images[:300], images[300:]
    level = other.float()
    blur = torch.tensor([1.0, 2, 1]).outer(torch.tensor([1.0, 2, 1]))[None, None] / 16
    grain = torch.randint(-3, 4, level.shape, generator=random()) * (level == 0)
    damage = {"grain": (level + grain).clamp(0, 255), "blur": F.conv2d(level, blur, padding=1), "contrast": 0.9 * level}
    texture, features = metrics.texture_features(real), metrics.extract(extractor, real).features
    texture_floor = metrics.frechet_distance(metrics.texture_features(other), texture)
    digit_floor = metrics.frechet_distance(metrics.extract(extractor, other).features, features)
    for name, changed in damage.items():
        changed = changed.round().byte()
        seen = metrics.frechet_distance(metrics.texture_features(changed), texture) / texture_floor
        assert seen > (1.5 if name == "contrast" else 8), name
    digits = metrics.extract(extractor, (level + grain).clamp(0, 255).byte()).features
    assert metrics.frechet_distance(digits, features) < 1.5 * digit_floor


def test_texture_filters_are_orthonormal_and_blind_to_brightness() -> None:
    filters = metrics.texture_filters().flatten(1)
    torch.testing.assert_close(filters @ filters.T, torch.eye(8))
    assert filters.sum(1).abs().max() < 1e-6
    flat = metrics.texture_features(torch.full((1, 1, 28, 28), 200, dtype=torch.uint8))
    assert flat.shape == (1, 32) and flat.abs().max() < 1e-3


def test_zero_share() -> None:
    images = torch.ones(2, 1, 28, 28, dtype=torch.uint8)
    images[0, 0, :7] = 0
    assert metrics.zero_share(images) == 1 / 8


# Precision, recall, coverage


def test_overlap_of_points_on_a_line() -> None:
    real, fake = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[0.5], [100.0], [101.0]])
    found = metrics.precision_recall_coverage(real, fake, k=1)
    # Every real ball has radius 1; the fake ones reach 99.5, 1 and 1. The fake at 0.5 lies in the balls of 0 and 1.
    assert found == pytest.approx((1 / 3, 1, 2 / 3, 2 / 4))


def test_overlap_against_plain_loops() -> None:
    real = torch.randn(40, 3, generator=random(1), dtype=torch.float64)
    fake = torch.randn(30, 3, generator=random(2), dtype=torch.float64) * 1.2 + 0.5
    k = 3

    def radius(points: Tensor) -> list[float]:
        return [sorted((p - q).norm().item() for q in points)[k] for p in points]

    inside = [[(x - y).norm().item() <= r for x, r in zip(real, radius(real))] for y in fake]  # [fake][real]
    around = [[(x - y).norm().item() <= r for y, r in zip(fake, radius(fake))] for x in real]  # [real][fake]
    expected = (np.mean([any(row) for row in inside]), np.mean([any(row) for row in around]),
                np.sum(inside) / (k * len(fake)), np.mean([any(column) for column in zip(*inside)]))
    found = metrics.precision_recall_coverage(real, fake, k=k, block=16)
    assert found == pytest.approx(expected) and 0.1 < found.precision < 1


def test_overlap_of_same_and_of_distant_sets() -> None:
    points = torch.randn(300, 8, generator=random(3))
    same = metrics.precision_recall_coverage(points, points)
    assert same.precision == same.recall == same.coverage == 1
    assert metrics.precision_recall_coverage(points, points + 1000) == (0, 0, 0, 0)
    with pytest.raises(UserError, match="more than 5"):
        metrics.precision_recall_coverage(points[:5], points)


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


def test_memorisation_tells_copies_from_new_images() -> None:
    test = 1 + torch.rand(2000, generator=random(1))
    fresh = metrics.memorisation(1 + torch.rand(1000, generator=random(2)), test)
    copied = metrics.memorisation(torch.cat([torch.zeros(300), 1 + torch.rand(700, generator=random(2))]), test)
    assert fresh["ratio"] == pytest.approx(1, abs=0.03) and fresh["share_closer"] < 0.03
    assert copied["ratio"] < 0.9 and copied["share_closer"] == pytest.approx(0.3, abs=0.03)


# Class statistics


def test_sure_share_histogram_and_asked() -> None:
    probabilities = torch.tensor([[0.95, 0.05, 0.0], [0.1, 0.89, 0.01], [0.0, 0.08, 0.92], [0.91, 0.0, 0.09]])
    assert metrics.sure_share(probabilities) == 3 / 4
    assert metrics.class_histogram(probabilities).tolist() == [2, 1, 1]
    assert metrics.drawn_as_asked(probabilities, torch.tensor([0, 1, 1, 1])) == 2 / 4


@pytest.mark.parametrize("classes, critical, p",
                         [(10, 16.919, 0.05), (10, 21.666, 0.01), (2, 3.841, 0.05), (5, 7.779, 0.10)])
def test_chi_square_against_tables(classes: int, critical: float, p: float) -> None:
    expected = torch.full((classes,), 100.0, dtype=torch.float64)
    counts = expected.clone()
    counts[0] += math.sqrt(critical * 50)
    counts[1] -= math.sqrt(critical * 50)
    assert metrics.chi_square(counts, expected) == (pytest.approx(critical), pytest.approx(p, abs=2e-5))
    assert metrics.chi_square(expected, expected) == (0, 1)


# Likelihood


@pytest.mark.parametrize("std", [1e-7, 1e-4, 2e-3, 0.03, 1.0, 50.0])
@pytest.mark.parametrize("mean", [-1.0, -0.9961, -0.3, 1 / 255, 0.77, 1.0])
def test_decoder_probabilities_sum_to_one(mean: float, std: float) -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    log_p = metrics.discretised_log_likelihood(levels, torch.tensor(mean), std)
    assert not log_p.isnan().any() and (log_p <= 0).all()
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_decoder_is_the_difference_of_normal_cdfs() -> None:
    levels = torch.tensor([0, 1, 100, 128, 254, 255], dtype=torch.uint8)
    mean, std = 0.02, 0.3

    def cdf(level: float) -> float:
        return 0.5 * (1 + math.erf((level / 127.5 - 1 - mean) / (std * math.sqrt(2))))

    inner = [math.log(cdf(v + 0.5) - cdf(v - 0.5)) for v in (1, 100, 128, 254)]
    expected = [math.log(cdf(0.5)), *inner, math.log(1 - cdf(254.5))]
    found = metrics.discretised_log_likelihood(levels, torch.tensor(mean), std)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    levels, mean = torch.tensor([255, 0, 200], dtype=torch.uint8), torch.tensor([-1.0, 1.0, -1.0])
    far = metrics.discretised_log_likelihood(levels, mean, 1e-5)
    assert far.isfinite().all() and (far < -1e9).all()  # no underflow to -inf


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_terms_of_gaussian_data_with_the_ideal_denoiser(name: str) -> None:
    schedule = make_schedule(DiffusionConfig(timesteps=100, schedule=name))
    x0 = torch.randn(128, 1, 28, 28, generator=random(1))
    total, terms = metrics.kl_terms(lambda x, t: schedule.alpha[t].item() * x, schedule, x0, 16, random(2))
    # The ideal denoiser's mean squared error is 1 - alpha_bar, so each term is known.
    snr, error = schedule.alpha_bar / (1 - schedule.alpha_bar), 1 - schedule.alpha_bar
    by_hand = sum(0.5 * (snr[t - 1] - snr[t]) * error[t] for t in range(2, 101)).item()
    assert total.mean().item() / 784 == pytest.approx(by_hand, rel=0.02)
    for t, term in terms.items():
        assert term.mean().item() / 784 == pytest.approx((0.5 * (snr[t - 1] - snr[t]) * error[t]).item(), rel=0.02)
    prior = -0.5 * math.log1p(-schedule.alpha_bar[-1].item())  # E[x0^2] = 1 leaves only the logarithm
    signal = schedule.alpha_bar[-1].item()
    sampled = prior + 0.5 * signal * (x0.square().mean().item() - 1)
    assert metrics.prior_term(schedule, x0).mean().item() / 784 == pytest.approx(sampled, rel=1e-5)


def test_sum_of_terms_is_unbiased() -> None:
    schedule, wrong = make_schedule(DiffusionConfig(timesteps=6)), {2: 0.5, 3: 0.1, 4: 0.7, 5: 0.2, 6: 0.9}
    x0 = torch.zeros(1, 1, 28, 28)
    exact = sum(0.5 * (schedule.snr[t - 1] - schedule.snr[t]) * 784 * wrong[t] ** 2 for t in wrong).item()
    found, terms = metrics.kl_terms(lambda x, t: torch.full_like(x, wrong[t]), schedule, x0, 5000, random())
    assert found.item() == pytest.approx(exact, rel=1e-3)
    assert terms.keys() == wrong.keys()
    proposal = metrics.timestep_proposal(schedule)
    assert len(proposal) == 5 and (proposal > 0).all() and proposal.sum().item() == pytest.approx(1)


def test_bound_of_one_image_that_is_known() -> None:
    schedule = make_schedule(DiffusionConfig(timesteps=50))
    images = torch.randint(0, 256, (1, 1, 28, 28), generator=random(), dtype=torch.uint8).repeat(7, 1, 1, 1)
    known, calls = images[:1].float() / 127.5 - 1, []

    def denoise(x: Tensor, t: int) -> Tensor:
        calls.append((len(x), type(t)))
        return known.expand_as(x)

    found = metrics.bits_per_dim(denoise, schedule, images, strata=3, batch=4)
    assert set(calls) == {(4, int)} and len(calls) == 2 * 4  # the last batch is padded
    assert found.L_kl == pytest.approx(0, abs=1e-9) and found.L_T == pytest.approx(0, abs=1e-5)
    inner = (images[0] > 0) & (images[0] < 255)
    width = 1 / 255 / found.decoder_std / math.sqrt(2)
    bits = torch.where(inner, -math.log2(math.erf(width)), -math.log2(0.5 + 0.5 * math.erf(width)))
    assert found.L_0 == pytest.approx(bits.mean().item(), rel=1e-5)
    assert found.bits_per_dim == pytest.approx(found.L_T + found.L_kl + found.L_0)
    bar = schedule.alpha_bar
    variance = (1 - bar[1]) / (1 - bar[2]) * (1 - bar[2] / bar[1])  # 2006.11239, eq. 7 at t = 2
    assert found.decoder_std == pytest.approx(variance.sqrt().item())
    sharp = metrics.bits_per_dim(denoise, schedule, images, strata=3, batch=4, decoder_std=1e-4)
    assert sharp.L_0 == pytest.approx(0, abs=1e-9)


def shrinking(schedule: NoiseSchedule):  # type: ignore[no-untyped-def]
    """The ideal denoiser of pixels with mean 0 and variance 1/3, as uniform ones have, among the linear ones."""
    return lambda x, t: schedule.alpha[t].item() * x / (1 + 2 * schedule.sigma[t].item() ** 2)


def test_standard_error_is_the_scatter_of_repeated_estimates() -> None:
    schedule = make_schedule(DiffusionConfig(timesteps=200))
    runs = [metrics.bits_per_dim(shrinking(schedule), schedule, strata=4, batch=5, seed=seed, images=torch.randint(
        0, 256, (40, 1, 28, 28), generator=random(seed), dtype=torch.uint8)) for seed in range(16)]
    scatter = torch.tensor([run.bits_per_dim for run in runs]).std().item()
    claimed = sum(run.standard_error for run in runs) / len(runs)
    assert 0.5 < claimed / scatter < 2
    images = torch.randint(0, 256, (25, 1, 28, 28), generator=random(0), dtype=torch.uint8)
    once, again = (metrics.bits_per_dim(shrinking(schedule), schedule, images, batch=10) for _ in range(2))
    assert once == again  # a function of the seed


def test_calibrated_decoder_is_the_best_one() -> None:
    schedule = make_schedule(DiffusionConfig(timesteps=1000, schedule="linear"))
    images = torch.randint(20, 236, (30, 1, 28, 28), generator=random(), dtype=torch.uint8)
    found = metrics.calibrate(shrinking(schedule), schedule, images, batch=20)
    # x1 has noise of sigma = 0.01, and the linear denoiser leaves nearly all of it in.
    assert found.decoder_std.tolist() == pytest.approx([0.01] * 12, rel=0.1)
    cost = [metrics.bits_per_dim(shrinking(schedule), schedule, images, 1, 20, uncertainty=replace(
        found, decoder_std=factor * found.decoder_std)).L_0 for factor in (0.8, 1, 1.25)]
    assert cost[1] < min(cost[0], cost[2])


def test_calibrated_error_is_that_of_each_kind_of_pixel() -> None:
    schedule = make_schedule(DiffusionConfig(timesteps=1000))
    images = torch.zeros(20, 1, 28, 28, dtype=torch.uint8)
    images[:, :, :, 14:] = torch.randint(100, 200, (20, 1, 28, 14), generator=random(), dtype=torch.uint8)

    def denoise(x: Tensor, t: int) -> Tensor:  # knows that the left half is black, and of the right half what it sees
        return torch.cat([torch.full_like(x[..., :14], -1), (x[..., 14:] / schedule.alpha[t].item()).clamp(-0.8, 0.8)], dim=-1)

    found = metrics.calibrate(denoise, schedule, images, batch=20)
    assert found.timesteps[0] == 1 and found.timesteps[-1] == 1000
    for t in (1, 2, 9, 30):
        right = torch.linspace(-0.2, 0.5, 8)
        expected = (1 - schedule.alpha_bar[t]) / schedule.alpha_bar[t]
        assert found.variance(right, t, schedule).tolist() == pytest.approx([expected.item()] * 8, rel=0.1)
        assert found.variance(-torch.ones(3), t, schedule).tolist() == [0, 0, 0]


def test_the_best_variance_of_the_reverse_process() -> None:
    """Against normal distributions by torch, and against every other variance."""
    schedule = make_schedule(DiffusionConfig(timesteps=6))
    x0, error = torch.zeros(1, 1, 2, 2), 0.4

    def denoise(x: Tensor, t: int) -> Tensor:
        return torch.full_like(x, error)

    def terms(variance: float) -> dict[int, float]:
        knots = torch.tensor([1.0, 6.0], dtype=torch.float64)
        relative = torch.full((2, 12), variance, dtype=torch.float64)
        found = metrics.Uncertainty(knots, relative, torch.ones(12, dtype=torch.float64))
        return {t: term.item() / 4 for t, term in metrics.kl_terms(denoise, schedule, x0, 300, random(), found)[1].items()}

    for t, term in terms(0.3).items():
        mean_q, var = posterior(schedule, torch.zeros(1), torch.ones(1), t, t - 1)
        mean_p, _ = posterior(schedule, torch.full((1,), error), torch.ones(1), t, t - 1)
        through_x0 = (mean_p - mean_q).item() / error  # how far the mean moves with x0
        wide = var + through_x0**2 * 0.3 * (1 - schedule.alpha_bar[t].item())
        q, p = torch.distributions.Normal(mean_q.double(), var**0.5), torch.distributions.Normal(mean_p.double(), wide**0.5)
        assert term == pytest.approx(torch.distributions.kl_divergence(q, p).item(), rel=1e-4)
    for t in (2, 4, 6):
        best = error**2 / (1 - schedule.alpha_bar[t].item())
        costs = [terms(factor * best)[t] for factor in (0, 0.8, 1, 1.25)]
        assert costs[2] == min(costs) and costs[2] < costs[0]
    plain = metrics.kl_terms(denoise, schedule, x0, 300, random())[1]
    assert {t: term.item() / 4 for t, term in plain.items()} == pytest.approx(terms(0))


def test_what_a_pixel_is_worth_follows_from_its_prediction_alone() -> None:
    """A variance or a decoder that knew x0 would make a bound of nothing."""
    schedule = make_schedule(DiffusionConfig(timesteps=3))
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    images[:, :, 0] = 250
    guess = torch.tensor([[-1.0, 0.97], [-0.95, 1.0]])  # nowhere of the kind that x0 is
    kinds = metrics.kind_of(guess)
    assert len(kinds.unique()) == 4 and not (kinds == metrics.kind_of(images[0, 0] / 127.5 - 1)).any()
    table = torch.arange(1.0, 13.0, dtype=torch.float64)
    known = metrics.Uncertainty(torch.tensor([1.0, 3.0], dtype=torch.float64), torch.stack([table, table]) / 4, table / 10)
    found = metrics.bits_per_dim(lambda x, t: guess.expand_as(x), schedule, images, strata=200, batch=2, uncertainty=known)

    x0, bits = (images[0, 0].double() / 127.5 - 1), math.log(2) * 4
    error, expected = (x0 - guess.double()).square(), 0.0
    for t in (2, 3):
        gain = (schedule.snr[t - 1] - schedule.snr[t]).item()
        wide = 1 + gain * (kinds + 1) / 4 * (1 - schedule.alpha_bar[t]).item()
        expected += 0.5 * ((1 + gain * error) / wide - 1 + wide.log()).sum().item() / bits
    assert found.L_kl == pytest.approx(expected, rel=0.01)
    decoder = -metrics.discretised_log_likelihood(images[0, 0], guess.double(), (kinds + 1.0) / 10).sum().item() / bits
    assert found.L_0 == pytest.approx(decoder, rel=1e-6)


def test_the_bound_is_never_below_the_entropy() -> None:
    """Pixels black or white at random have one bit each, whatever the variances are chosen to be; the ideal denoiser comes near."""
    schedule = make_schedule(DiffusionConfig(timesteps=1000))
    images = 255 * torch.randint(0, 2, (60, 1, 8, 8), generator=random(), dtype=torch.uint8)

    def denoise(x: Tensor, t: int) -> Tensor:
        return torch.tanh(schedule.alpha[t].item() * x / (1 - schedule.alpha_bar[t].item()))

    known = metrics.calibrate(denoise, schedule, images[:20], batch=20)
    bound = metrics.bits_per_dim(denoise, schedule, images[20:], strata=40, batch=20, uncertainty=known)
    assert 1 - 3 * bound.standard_error < bound.bits_per_dim < 1.05


@pytest.mark.parametrize("name, bits", [("linear", 0.657), ("cosine", 0.400)])
def test_l0_of_the_published_schedules_on_the_levels_of_mnist(name: str, bits: float) -> None:
    std = metrics.default_decoder_std(make_schedule(DiffusionConfig(timesteps=1000, schedule=name)))
    levels = torch.cat([torch.zeros(8091), torch.full((55,), 255), torch.full((1854,), 130)]).byte()  # in 10,000 pixels
    found = -metrics.discretised_log_likelihood(levels, levels.float() / 127.5 - 1, std).mean().item() / math.log(2)
    assert found == pytest.approx(bits, abs=1e-3)
