"""The bound's terms against closed forms: Gaussian data with its ideal denoiser, known images, published schedules."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import likelihood
from config import DiffusionConfig
from diffusion import NoiseSchedule, make_schedule, posterior


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def constant(error: float = 0.0, decoder_std: float = 1.0) -> likelihood.Uncertainty:
    """The same for every pixel and at all noise levels; without an error, the variances are the posterior's."""
    full = partial(torch.full, dtype=torch.float64)
    return likelihood.Uncertainty(torch.tensor([1.0, 1000]).double(), full((2, 12), error), full((12,), decoder_std))


def posterior_std(schedule: NoiseSchedule) -> float:
    """Standard deviation of the posterior's step 2 -> 1; the last step, 1 -> 0, has none."""
    return math.sqrt(posterior(schedule, torch.zeros(()), torch.zeros(()), 2, 1)[1])


@pytest.mark.parametrize("std", [1e-7, 1e-4, 2e-3, 0.03, 1.0, 50.0])
@pytest.mark.parametrize("mean", [-1.0, -0.9961, -0.3, 1 / 255, 0.77, 1.0])
def test_decoder_probabilities_sum_to_one(mean: float, std: float) -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    log_p = likelihood.discretised_log_likelihood(levels, torch.tensor(mean), std)
    assert not log_p.isnan().any() and (log_p <= 0).all()
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_decoder_is_the_difference_of_normal_cdfs() -> None:
    levels = torch.tensor([0, 1, 100, 128, 254, 255], dtype=torch.uint8)
    mean, std = 0.02, 0.3

    def cdf(level: float) -> float:
        return 0.5 * (1 + math.erf((level / 127.5 - 1 - mean) / (std * math.sqrt(2))))

    inner = [math.log(cdf(v + 0.5) - cdf(v - 0.5)) for v in (1, 100, 128, 254)]
    expected = [math.log(cdf(0.5)), *inner, math.log(1 - cdf(254.5))]
    found = likelihood.discretised_log_likelihood(levels, torch.tensor(mean), std)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    levels, mean = torch.tensor([255, 0, 200], dtype=torch.uint8), torch.tensor([-1.0, 1.0, -1.0])
    far = likelihood.discretised_log_likelihood(levels, mean, 1e-5)
    assert far.isfinite().all() and (far < -1e9).all()  # no underflow to -inf


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_terms_of_gaussian_data_with_the_ideal_denoiser(name: str) -> None:
    schedule = make_schedule(DiffusionConfig(timesteps=100, schedule=name))
    x0 = torch.randn(128, 1, 28, 28, generator=random(1))
    total, terms = likelihood.kl_terms(lambda x, t: schedule.alpha[t].item() * x, schedule, x0, constant(), 16,
                                       random(2))
    # The ideal denoiser's mean squared error is 1 - alpha_bar, so each term is known.
    snr, error = schedule.alpha_bar / (1 - schedule.alpha_bar), 1 - schedule.alpha_bar
    by_hand = sum(0.5 * (snr[t - 1] - snr[t]) * error[t] for t in range(2, 101)).item()
    assert total.mean().item() / 784 == pytest.approx(by_hand, rel=0.02)
    for t, term in terms.items():
        assert term.mean().item() / 784 == pytest.approx((0.5 * (snr[t - 1] - snr[t]) * error[t]).item(), rel=0.02)
    prior = -0.5 * math.log1p(-schedule.alpha_bar[-1].item())  # E[x0^2] = 1 leaves only the logarithm
    signal = schedule.alpha_bar[-1].item()
    sampled = prior + 0.5 * signal * (x0.square().mean().item() - 1)
    assert likelihood.prior_term(schedule, x0).mean().item() / 784 == pytest.approx(sampled, rel=1e-5)


def test_sum_of_terms_is_unbiased() -> None:
    schedule, wrong = make_schedule(DiffusionConfig(timesteps=6)), {2: 0.5, 3: 0.1, 4: 0.7, 5: 0.2, 6: 0.9}
    x0 = torch.zeros(1, 1, 28, 28)
    exact = sum(0.5 * (schedule.snr[t - 1] - schedule.snr[t]) * 784 * wrong[t] ** 2 for t in wrong).item()
    found, terms = likelihood.kl_terms(lambda x, t: torch.full_like(x, wrong[t]), schedule, x0, constant(), 5000,
                                       random())
    assert found.item() == pytest.approx(exact, rel=1e-3)
    assert terms.keys() == wrong.keys()
    proposal = likelihood.timestep_proposal(schedule)
    assert len(proposal) == 5 and (proposal > 0).all() and proposal.sum().item() == pytest.approx(1)


def test_bound_of_one_image_that_is_known() -> None:
    schedule = make_schedule(DiffusionConfig(timesteps=50))
    images = torch.randint(0, 256, (1, 1, 28, 28), generator=random(), dtype=torch.uint8).repeat(7, 1, 1, 1)
    known, calls = images[:1].float() / 127.5 - 1, []

    def denoise(x: Tensor, t: int) -> Tensor:
        calls.append((len(x), type(t)))
        return known.expand_as(x)

    std = posterior_std(schedule)
    found = likelihood.bits_per_dim(denoise, schedule, images, constant(decoder_std=std), strata=3, batch=4)
    assert calls == [(4, int)] * 4 + [(3, int)] * 4
    assert found.L_kl == pytest.approx(0, abs=1e-9) and found.L_T == pytest.approx(0, abs=1e-5)
    inner = (images[0] > 0) & (images[0] < 255)
    width = 1 / 255 / std / math.sqrt(2)
    bits = torch.where(inner, -math.log2(math.erf(width)), -math.log2(0.5 + 0.5 * math.erf(width)))
    assert found.L_0 == pytest.approx(bits.mean().item(), rel=1e-5) and found.decoder_std == [std] * 12
    assert found.bits_per_dim == pytest.approx(found.L_T + found.L_kl + found.L_0)
    assert found.standard_error == pytest.approx(0, abs=1e-9)
    sharp = likelihood.bits_per_dim(denoise, schedule, images, constant(decoder_std=1e-4), strata=3)
    assert sharp.L_0 == pytest.approx(0, abs=1e-9) and math.isnan(sharp.standard_error)  # of a single batch


def shrinking(schedule: NoiseSchedule):  # type: ignore[no-untyped-def]
    """The ideal denoiser of pixels with mean 0 and variance 1/3, as uniform ones have, among the linear ones."""
    return lambda x, t: schedule.alpha[t].item() * x / (1 + 2 * schedule.sigma[t].item() ** 2)


def test_standard_error_is_the_scatter_of_repeated_estimates() -> None:
    schedule = make_schedule(DiffusionConfig(timesteps=200))
    plain = constant(decoder_std=posterior_std(schedule))
    runs = [likelihood.bits_per_dim(shrinking(schedule), schedule, torch.randint(
        0, 256, (40, 1, 28, 28), generator=random(seed), dtype=torch.uint8), plain, 4, 5, seed) for seed in range(16)]
    scatter = torch.tensor([run.bits_per_dim for run in runs]).std().item()
    claimed = sum(run.standard_error for run in runs) / len(runs)
    assert 0.5 < claimed / scatter < 2
    images = torch.randint(0, 256, (25, 1, 28, 28), generator=random(0), dtype=torch.uint8)
    once, again = (likelihood.bits_per_dim(shrinking(schedule), schedule, images, plain, batch=10) for _ in range(2))
    assert once == again  # a function of the seed


def test_calibrated_decoder_is_the_best_one() -> None:
    schedule = make_schedule(DiffusionConfig(timesteps=1000, schedule="linear"))
    images = torch.randint(20, 236, (30, 1, 28, 28), generator=random(), dtype=torch.uint8)
    found = likelihood.calibrate(shrinking(schedule), schedule, images, batch=20)
    # x1 has noise of sigma = 0.01, and the linear denoiser leaves nearly all of it in.
    assert found.decoder_std.tolist() == pytest.approx([0.01] * 12, rel=0.1)
    cost = [likelihood.bits_per_dim(shrinking(schedule), schedule, images, replace(
        found, decoder_std=factor * found.decoder_std), 1, 20).L_0 for factor in (0.8, 1, 1.25)]
    assert cost[1] < min(cost[0], cost[2])


def test_calibrated_error_is_that_of_each_kind_of_pixel() -> None:
    schedule = make_schedule(DiffusionConfig(timesteps=1000))
    images = torch.zeros(20, 1, 28, 28, dtype=torch.uint8)
    images[:, :, :, 14:] = torch.randint(100, 200, (20, 1, 28, 14), generator=random(), dtype=torch.uint8)

    def denoise(x: Tensor, t: int) -> Tensor:  # knows that the left half is black, and of the right half what it sees
        return torch.cat([torch.full_like(x[..., :14], -1),
                          (x[..., 14:] / schedule.alpha[t].item()).clamp(-0.8, 0.8)], dim=-1)

    found = likelihood.calibrate(denoise, schedule, images, batch=20)
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
        _, found = likelihood.kl_terms(denoise, schedule, x0, constant(variance), 300, random())
        return {t: term.item() / 4 for t, term in found.items()}

    for t, term in terms(0.3).items():
        mean_q, var = posterior(schedule, torch.zeros(1), torch.ones(1), t, t - 1)
        mean_p, _ = posterior(schedule, torch.full((1,), error), torch.ones(1), t, t - 1)
        through_x0 = (mean_p - mean_q).item() / error  # how far the mean moves with x0
        wide = var + through_x0**2 * 0.3 * (1 - schedule.alpha_bar[t].item())
        q, p = (torch.distributions.Normal(mean_q.double(), var**0.5),
                torch.distributions.Normal(mean_p.double(), wide**0.5))
        assert term == pytest.approx(torch.distributions.kl_divergence(q, p).item(), rel=1e-4)
    for t in (2, 4, 6):
        best = error**2 / (1 - schedule.alpha_bar[t].item())
        costs = [terms(factor * best)[t] for factor in (0, 0.8, 1, 1.25)]
        assert costs[2] == min(costs) and costs[2] < costs[0]
    plain = {t: 0.5 * (schedule.snr[t - 1] - schedule.snr[t]).item() * error**2 for t in range(2, 7)}
    assert terms(0) == pytest.approx(plain)  # with the posterior's variances


def test_what_a_pixel_is_worth_follows_from_its_prediction_alone() -> None:
    """A variance or a decoder that knew x0 would make a bound of nothing."""
    schedule = make_schedule(DiffusionConfig(timesteps=3))
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    images[:, :, 0] = 250
    guess = torch.tensor([[-1.0, 0.97], [-0.95, 1.0]])  # nowhere of the kind that x0 is
    kinds = likelihood.kind_of(guess)
    assert len(kinds.unique()) == 4 and not (kinds == likelihood.kind_of(images[0, 0] / 127.5 - 1)).any()
    table = torch.arange(1.0, 13.0, dtype=torch.float64)
    known = likelihood.Uncertainty(torch.tensor([1.0, 3.0], dtype=torch.float64), torch.stack([table, table]) / 4,
                                   table / 10)
    found = likelihood.bits_per_dim(lambda x, t: guess.expand_as(x), schedule, images, known, strata=200, batch=2)

    x0, bits = (images[0, 0].double() / 127.5 - 1), math.log(2) * 4
    error, expected = (x0 - guess.double()).square(), 0.0
    for t in (2, 3):
        gain = (schedule.snr[t - 1] - schedule.snr[t]).item()
        wide = 1 + gain * (kinds + 1) / 4 * (1 - schedule.alpha_bar[t]).item()
        expected += 0.5 * ((1 + gain * error) / wide - 1 + wide.log()).sum().item() / bits
    assert found.L_kl == pytest.approx(expected, rel=0.01)
    decoder = -likelihood.discretised_log_likelihood(images[0, 0], guess.double(),
                                                     (kinds + 1.0) / 10).sum().item() / bits
    assert found.L_0 == pytest.approx(decoder, rel=1e-6)


def test_the_bound_is_never_below_the_entropy() -> None:
    """Pixels black or white at random have one bit each, whatever the variances; the ideal denoiser comes near."""
    schedule = make_schedule(DiffusionConfig(timesteps=1000))
    images = 255 * torch.randint(0, 2, (60, 1, 8, 8), generator=random(), dtype=torch.uint8)

    def denoise(x: Tensor, t: int) -> Tensor:
        return torch.tanh(schedule.alpha[t].item() * x / (1 - schedule.alpha_bar[t].item()))

    known = likelihood.calibrate(denoise, schedule, images[:20], batch=20)
    bound = likelihood.bits_per_dim(denoise, schedule, images[20:], known, strata=40, batch=20)
    assert 1 - 3 * bound.standard_error < bound.bits_per_dim < 1.05


@pytest.mark.parametrize("name, bits", [("linear", 0.657), ("cosine", 0.400)])
def test_l0_of_the_published_schedules_on_the_levels_of_mnist(name: str, bits: float) -> None:
    std = posterior_std(make_schedule(DiffusionConfig(timesteps=1000, schedule=name)))
    levels = torch.cat([torch.zeros(8091), torch.full((55,), 255), torch.full((1854,), 130)]).byte()  # in 10,000 pixels
    found = -likelihood.discretised_log_likelihood(levels, levels.float() / 127.5 - 1, std).mean().item() / math.log(2)
    assert found == pytest.approx(bits, abs=1e-3)
