"""The reverse process against ideal denoisers: closed forms, an independent integrator, exact orders of convergence.

Three kinds of data have a denoiser in closed form: N(0, I), a single point, and a mixture of two Gaussians on a line.
"""

import math
import random

import numpy as np
import pytest
import torch

from config import DiffusionConfig, UserError
from diffusion import NoiseSchedule, make_denoiser, make_schedule, posterior
from samplers import SAMPLERS, spaced_timesteps

DETERMINISTIC = [("ddim", {}), ("dpmpp", {})]
STOCHASTIC = [("ddpm", {}), ("ddpm", {"variance": "upper"}), ("ddim", {"eta": 1.0}), ("ddim", {"eta": 0.4})]
SCHEDULES = ["linear", "cosine", "zero"]
STEPS = [1, 2, 5, 10, 50, 100]
T = 100


def schedule_of(name, timesteps=T):
    """linear, cosine, or zero: the cosine schedule with its end moved to pure noise."""
    schedule = make_schedule(DiffusionConfig(timesteps, "linear" if name == "linear" else "cosine"))
    if name == "zero":
        schedule.alpha_bar[-1] = 0
    return schedule


def unwanted():
    raise AssertionError("a deterministic sampler has drawn noise")


def states(name, denoise, schedule, x, timesteps, randn=unwanted, **options):
    """[(s, x, x0_hat)] after each step."""
    return list(SAMPLERS[name](denoise, schedule, x, timesteps, randn, **options))


def final(*arguments, **options):
    return states(*arguments, **options)[-1][1]


def standard_normal(schedule):
    """Denoiser of N(0, I) data: E[x_0 | x_t] = alpha_t x_t."""
    return lambda x, t: schedule.alpha[t].item() * x


class Basis:
    """Noise as unit vectors: x holds the weight of each noise that went in, so its variance is a sum of squares."""

    def __init__(self, steps):
        self.vectors = torch.eye(steps + 1, dtype=torch.float64)
        self.used = 1
        self.start = self.vectors[0]

    def __call__(self):
        self.used += 1
        return self.vectors[self.used - 1]


# Spaced timesteps


@pytest.mark.parametrize("timesteps", [1, 2, 3, 21, 50, 300, 1000])
def test_timesteps_descend_from_T_to_0(timesteps):
    for steps in range(1, timesteps + 1):
        spaced = spaced_timesteps(timesteps, steps)
        assert len(spaced) == steps + 1 and spaced[0] == timesteps and spaced[-1] == 0
        assert all(type(t) is int for t in spaced)
        assert all(t > s for t, s in zip(spaced, spaced[1:]))
        gaps = [t - s for t, s in zip(spaced, spaced[1:])]
        assert max(gaps) - min(gaps) <= 2  # as even as whole numbers can be, rounding each end


def test_timesteps_of_very_long_schedules():
    for steps in (1, 7, 99_999, 100_000):
        spaced = spaced_timesteps(100_000, steps)
        assert len(spaced) == steps + 1 and all(t > s for t, s in zip(spaced, spaced[1:]))


def test_timesteps_are_trailing():
    """Table 2 of 2305.08891: round(arange(T, 0, -T / steps)), there less 1 as its levels count from 0."""
    assert spaced_timesteps(1000, 10) == [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert spaced_timesteps(1000, 3) == [1000, 667, 333, 0]
    assert spaced_timesteps(6, 6) == [6, 5, 4, 3, 2, 1, 0]
    for steps in (7, 25, 60, 999):
        expected = np.round(1000 - np.arange(steps) * 1000 / steps).astype(int).tolist()
        assert spaced_timesteps(1000, steps)[:-1] == expected


@pytest.mark.parametrize("spacing", ["trailing", "eased"])
@pytest.mark.parametrize("timesteps", [21, 1000])
def test_every_spacing_descends_from_T_to_0(spacing, timesteps):
    for steps in {*range(1, 41), timesteps - 1, timesteps} & set(range(1, timesteps + 1)):
        spaced = spaced_timesteps(timesteps, steps, spacing)
        assert len(spaced) == steps + 1 and spaced[0] == timesteps and spaced[-1] == 0
        assert all(type(t) is int for t in spaced) and all(t > s for t, s in zip(spaced, spaced[1:]))


def test_eased_spacing():
    assert spaced_timesteps(1000, 10, "trailing") == spaced_timesteps(1000, 10)
    eased = spaced_timesteps(1000, 10, "eased")  # symmetric, closer at both ends than in the middle
    assert all(t + s == 1000 for t, s in zip(eased, reversed(eased)))
    gaps = [t - s for t, s in zip(eased, eased[1:])]
    assert gaps[:5] == sorted(gaps[:5]) and gaps[0] < 85 < 100 < gaps[4]
    default = [1000, 969, 936, 901, 865, 826, 786, 745, 702, 658, 614, 568, 523, 477, 432, 386, 342, 298, 255, 214, 174,
               135, 99, 64, 31, 0]
    assert spaced_timesteps(1000, 25, "eased") == default, "the published pictures and figures have these"


@pytest.mark.parametrize("steps", [0, -1, 51])
def test_impossible_steps_are_a_user_error(steps):
    with pytest.raises(UserError, match=f"--steps {steps}.* 50 "):
        spaced_timesteps(50, steps)


# What every sampler promises


@pytest.mark.parametrize("name, options", [*DETERMINISTIC, *STOCHASTIC, ("sa", {})])
@pytest.mark.parametrize("timesteps", [[100, 0], [100, 99, 3, 2, 0], [100, 61, 20], [60, 30, 0]])
def test_one_state_and_one_evaluation_per_step(name, options, timesteps):
    schedule, asked = schedule_of("cosine"), []

    def denoise(x, t):
        asked.append((t, x))
        return 0.5 * x

    x = torch.ones(2, 3)
    seen = states(name, denoise, schedule, x, timesteps, lambda: torch.full((2, 3), 0.1), **options)
    assert [t for t, _ in asked] == timesteps[:-1] and all(type(t) is int for t, _ in asked)
    assert [s for s, _, _ in seen] == timesteps[1:]
    assert asked[0][1] is x and torch.equal(x, torch.ones(2, 3))
    for (_, evaluated), (_, x, x0_hat) in zip(asked[1:], seen):
        assert torch.equal(evaluated, x)  # what is shown is what is asked about next
    for (_, evaluated), (_, _, x0_hat) in zip(asked, seen):
        assert torch.equal(x0_hat, 0.5 * evaluated)


@pytest.mark.parametrize("name, options", [*DETERMINISTIC, *STOCHASTIC, ("sa", {})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(name, options, dtype):
    schedule, timesteps = schedule_of("zero"), spaced_timesteps(T, 6)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for _, x, x0_hat in states(name, standard_normal(schedule), schedule, x, timesteps, lambda: x * 0, **options):
        assert x.dtype == dtype and x0_hat.dtype == dtype


@pytest.mark.parametrize("name, options", [*DETERMINISTIC, *STOCHASTIC, ("sa", {})])
@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("steps", [1, 2, 5, T])
def test_zero_terminal_snr_stays_finite(name, options, prediction, steps):
    schedule = NoiseSchedule(schedule_of("zero").alpha_bar, prediction)

    def network(x, t, label):
        return torch.sin(3 * x) + t[:, None, None, None] / T

    denoise = make_denoiser(network, schedule, torch.tensor([1, 2]), guidance=2.0)
    x, timesteps = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), spaced_timesteps(T, steps)
    for _, x, x0_hat in states(name, denoise, schedule, x, timesteps, lambda: torch.ones_like(x), **options):
        assert torch.isfinite(x).all() and x0_hat.abs().max() <= 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_last_state_is_the_last_estimate(name):
    """At t = 0 there is no noise: none is added in the last step, and a solver's last step is of first order."""
    schedule, timesteps = schedule_of(name), spaced_timesteps(T, 10)
    for sampler, options in [*DETERMINISTIC, *STOCHASTIC, ("sa", {})]:
        basis = Basis(10)
        seen = states(sampler, standard_normal(schedule), schedule, basis.start, timesteps, basis, **options)
        torch.testing.assert_close(seen[-1][1], seen[-1][2], rtol=1e-12, atol=1e-12)
        # One noise at the start, and one in each step but the last.
        assert basis.used == (1 if (sampler, options) in DETERMINISTIC else 10)


# Data at a single point


@pytest.mark.parametrize("name, options", [*DETERMINISTIC, *STOCHASTIC, ("sa", {})])
@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 5, T])
def test_point_mass_is_returned(name, options, schedule_name, steps):
    schedule, random = schedule_of(schedule_name), torch.Generator().manual_seed(0)
    point = torch.rand(1, 1, 4, 4, generator=random, dtype=torch.float64) * 2 - 1

    def randn():
        return torch.randn(3, 1, 4, 4, generator=random, dtype=torch.float64)

    x = final(name, lambda x, t: point.expand_as(x), schedule, randn(), spaced_timesteps(T, steps), randn, **options)
    torch.testing.assert_close(x, point.expand_as(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name, options", DETERMINISTIC)
@pytest.mark.parametrize("schedule_name", SCHEDULES)
def test_deterministic_samplers_keep_the_noise_of_a_point_mass(name, options, schedule_name):
    schedule = schedule_of(schedule_name)
    point, noise = torch.tensor([0.7, -0.2], dtype=torch.float64), torch.tensor([1.3, -0.4], dtype=torch.float64)
    x = schedule.alpha[T] * point + schedule.sigma[T] * noise
    for s, x, _ in states(name, lambda x, t: point, schedule, x, spaced_timesteps(T, 7), **options):
        torch.testing.assert_close(x, schedule.alpha[s] * point + schedule.sigma[s] * noise, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name, options", [("ddpm", {}), ("ddim", {"eta": 1.0}), ("ddim", {"eta": 0.4}), ("ddim", {})])
@pytest.mark.parametrize("schedule_name", SCHEDULES)
def test_stochastic_samplers_keep_the_marginals_of_a_point_mass(name, options, schedule_name):
    schedule, basis, timesteps = schedule_of(schedule_name), Basis(13), spaced_timesteps(T, 13)
    start = schedule.sigma[T] * basis.start
    for s, x, _ in states(name, lambda x, t: torch.zeros_like(x), schedule, start, timesteps, basis, **options):
        assert x.square().sum().item() == pytest.approx(schedule.sigma[s].item() ** 2, rel=1e-9, abs=1e-15)


# DDPM and DDIM


@pytest.mark.parametrize("schedule_name", SCHEDULES)
def test_ddim_with_eta_1_is_ancestral_sampling_for_any_pair(schedule_name):
    schedule, choose, generator = schedule_of(schedule_name), random.Random(0), torch.Generator().manual_seed(0)
    pairs = [sorted(choose.sample(range(T + 1), 2), reverse=True) for _ in range(40)]
    for t, s in [(T, 0), (1, 0), (T, T - 1), (2, 1), *pairs]:
        x, x0_hat, noise = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
        ancestral = final("ddpm", lambda x, t: x0_hat, schedule, x, [t, s], lambda: noise)
        implicit = final("ddim", lambda x, t: x0_hat, schedule, x, [t, s], lambda: noise, eta=1.0)
        torch.testing.assert_close(implicit, ancestral, rtol=1e-9, atol=1e-9)


def test_ddpm_is_algorithm_2_of_the_paper():
    """In the paper's own terms: x - beta / sqrt(1 - alpha_bar) noise_hat, over sqrt(1 - beta), plus noise."""
    schedule, generator = schedule_of("linear"), torch.Generator().manual_seed(0)
    for t in (2, 30, T):
        x, noise_hat, z = torch.randn(3, 6, generator=generator, dtype=torch.float64)
        now, before = schedule.alpha_bar[t].item(), schedule.alpha_bar[t - 1].item()
        beta = 1 - now / before
        mean = (x - beta / math.sqrt(1 - now) * noise_hat) / math.sqrt(1 - beta)
        x0_hat = (x - math.sqrt(1 - now) * noise_hat) / math.sqrt(now)
        for variance, step_variance in (("posterior", beta * (1 - before) / (1 - now)), ("upper", beta)):
            stepped = final("ddpm", lambda x, t: x0_hat, schedule, x, [t, t - 1], lambda: z, variance=variance)
            torch.testing.assert_close(stepped, mean + math.sqrt(step_variance) * z, rtol=1e-8, atol=1e-8)


def test_upper_variance_is_that_of_the_forward_step_for_any_pair():
    schedule, x, z = schedule_of("cosine"), torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for t, s in [(T, 40), (40, 10), (10, 1), (100, 99)]:
        upper = final("ddpm", lambda x, t: x, schedule, x, [t, s], lambda: z, variance="upper").item()
        lower = final("ddpm", lambda x, t: x, schedule, x, [t, s], lambda: z).item()
        assert upper**2 == pytest.approx(1 - (schedule.alpha_bar[t] / schedule.alpha_bar[s]).item(), rel=1e-10)
        assert lower**2 == pytest.approx(posterior(schedule, x, x, t, s)[1], rel=1e-10)
        assert lower < upper


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2])
def test_dpmpp_in_one_or_two_steps_is_ddim(schedule_name, steps):
    """Its first and its last step are of first order."""
    schedule = schedule_of(schedule_name)
    x = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = zip(states("dpmpp", bent, schedule, x, spaced_timesteps(T, steps)),
                states("ddim", bent, schedule, x, spaced_timesteps(T, steps)))
    for (_, one, _), (_, other, _) in pairs:
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def bent(x, t):
    """A denoiser of nothing in particular, far from linear in x and t."""
    return torch.tanh(2 * x + math.sin(t / 20))


# Data from N(0, I): what becomes of the start and of each noise has a closed form


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("steps", STEPS)
def test_ddim_scale_of_standard_normal_data(schedule_name, steps):
    """With alpha = cos(angle) and sigma = sin(angle), a step from t to s scales x by cos(angle_t - angle_s)."""
    schedule, timesteps = schedule_of(schedule_name), spaced_timesteps(T, steps)
    angle = torch.atan2(schedule.sigma, schedule.alpha)[timesteps]
    x = final("ddim", standard_normal(schedule), schedule, torch.ones(1, dtype=torch.float64), timesteps)
    assert x.item() == pytest.approx(angle.diff().cos().prod().item(), rel=1e-10)


@pytest.mark.parametrize("name, options", STOCHASTIC)
@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("steps", STEPS)
def test_variance_of_standard_normal_data(name, options, schedule_name, steps):
    """A step keeps x_t with a factor and adds noise; for DDPM the factor is alpha_t / alpha_s."""
    schedule, timesteps, basis = schedule_of(schedule_name), spaced_timesteps(T, steps), Basis(steps)
    expected = 1.0
    seen = states(name, standard_normal(schedule), schedule, basis.start, timesteps, basis, **options)
    for t, (s, x, _) in zip(timesteps, seen):
        now, before = schedule.alpha_bar[t].item(), schedule.alpha_bar[s].item()
        forward = 1 - now / before
        added = {"ddpm": 1.0, "ddim": options.get("eta", 0.0) ** 2}[name] * forward * (1 - before) / (1 - now)
        factor = math.sqrt(now / before)
        if name == "ddim":
            factor = math.sqrt(now * before) + math.sqrt((1 - now) * max(0, 1 - before - added))
        if options == {"variance": "upper"} and s > 0:
            added = forward
        expected = factor**2 * expected + added
        assert x.square().sum().item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("steps", STEPS)
def test_sa_on_standard_normal_data(schedule_name, steps):
    """Against the reverse SDE's solution for x0_hat on straight lines, integrated, in terms of h, half the log-SNR."""
    schedule, timesteps, basis = schedule_of(schedule_name), spaced_timesteps(T, steps), Basis(steps)
    alpha, sigma = schedule.alpha.tolist(), schedule.sigma.tolist()
    x, before, noises = basis.start, None, iter(torch.eye(steps + 1, dtype=torch.float64)[1:])
    for t, (s, state, x0_hat) in zip(timesteps, states("sa", standard_normal(schedule), schedule, x, timesteps, basis)):
        x0 = alpha[t] * x
        torch.testing.assert_close(x0_hat, x0, rtol=1e-7, atol=1e-9)
        shrink = sigma[s] * alpha[t] / (alpha[s] * sigma[t])  # exp(-h)
        h = -math.log(shrink) if shrink > 0 else math.inf
        aim = x0
        if before is not None:
            rest, share, last, last_h = before
            x = rest + share * (last + mean_position(last_h) * (x0 - last))
            if s > 0 and last_h < math.inf:
                aim = x0 + mean_position(h) * h / last_h * (x0 - last)
        noise = sigma[s] * math.sqrt(1 - shrink**2) * next(noises) if s > 0 else 0
        rest, share = sigma[s] / sigma[t] * shrink * x + noise, alpha[s] * (1 - shrink**2)
        before, x = (rest, share, x0, h), rest + share * aim
        torch.testing.assert_close(state, x, rtol=1e-7, atol=1e-9)


def mean_position(h):
    """Of 0 to 1, where position u counts as much as x0_hat does at u of a step: exp(-2 h (1 - u)), by quadrature."""
    if h == math.inf:
        return 1.0
    u = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    weight = torch.exp(-2 * h * (1 - u))
    return (torch.trapezoid(u * weight, u) / torch.trapezoid(weight, u)).item()


def test_sa_keeps_the_spread_to_a_higher_order(mixture):
    """The variance of N(0, I) data, which `ddpm` loses in coarse steps."""
    schedule, errors = mixture.schedule, {}
    for count in (20, 40, 80):
        timesteps = [round(schedule.timesteps - 95_000 * i / count) for i in range(count + 1)]
        for name in ("ddpm", "sa"):
            basis = Basis(count + 1)
            x = final(name, standard_normal(schedule), schedule, basis.start, timesteps, basis)
            errors[name, count] = abs(x.square().sum().item() - 1)
    for count in (20, 40):
        assert errors["ddpm", count] / errors["ddpm", 2 * count] < 2
        assert errors["sa", count] / errors["sa", 2 * count] > 7
    assert errors["sa", 40] < 0.01 < 0.1 < errors["ddpm", 40]


def test_sa_is_ddpm_where_x0_hat_stays_the_same():
    schedule, timesteps = schedule_of("cosine"), spaced_timesteps(T, 7)
    x = torch.tensor([1.0, -0.3], dtype=torch.float64)
    one, other = (final(name, lambda x, t: torch.full_like(x, 0.4), schedule, x, timesteps[:-1], stream(x))
                  for name in ("sa", "ddpm"))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def stream(x):
    """randn() that gives the same noises in each sampler."""
    generator = torch.Generator().manual_seed(3)
    return lambda: torch.randn(x.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name, options", [*DETERMINISTIC, *STOCHASTIC, ("sa", {})])
@pytest.mark.parametrize("schedule_name", ["linear", "cosine"])
def test_standard_normal_data_come_out_standard_normal_in_many_steps(name, options, schedule_name):
    schedule = schedule_of(schedule_name, 1000)

    def variance(steps):
        basis, timesteps = Basis(steps), spaced_timesteps(1000, steps)
        x = final(name, standard_normal(schedule), schedule, basis.start, timesteps, basis, **options)
        return x.square().sum().item()

    few, many = abs(variance(5) - 1), abs(variance(1000) - 1)
    assert many < 0.01 and many < few / 4


# DPM-Solver++ against an integrator that shares nothing with it


def integrate(denoise, schedule, x, timesteps):
    """x after each step, from x_s = sigma_s / sigma_t x_t + alpha_s * (integral over u from -h to 0 of exp(u) x0_hat).

    The integral runs over half the log-SNR up to s. x0_hat is the straight line through the latest two evaluations, at
    the middle of the step, as in DPM-Solver++ 2M. From infinite noise and to none it is the latest evaluation.
    """
    alpha, sigma = schedule.alpha.tolist(), schedule.sigma.tolist()
    clock = [math.log(a / s) if a > 0 and s > 0 else None for a, s in zip(alpha, sigma)]
    before, found = None, []
    for t, s in zip(timesteps, timesteps[1:]):
        value = denoise(x, t)
        if clock[s] is None or clock[t] is None:
            weight, x0_hat = 1 - sigma[s] * alpha[t] / (alpha[s] * sigma[t]), value
        else:
            u = torch.linspace(clock[t] - clock[s], 0, 20_001, dtype=torch.float64)
            weight, x0_hat = torch.trapezoid(u.exp(), u).item(), value
            if before is not None and clock[before[0]] is not None:
                middle = (clock[s] + clock[t]) / 2
                x0_hat = torch.lerp(before[1], value, (middle - clock[before[0]]) / (clock[t] - clock[before[0]]))
        before = t, value
        x = sigma[s] / sigma[t] * x + alpha[s] * weight * x0_hat
        found.append(x)
    return found


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("steps", STEPS)
def test_dpmpp_integrates_a_straight_line(schedule_name, steps):
    """For N(0, I), where x stays a multiple of the start, and for a denoiser that is far from linear."""
    schedule, timesteps = schedule_of(schedule_name), spaced_timesteps(T, steps)
    x = torch.tensor([1.0, -0.6, 0.1], dtype=torch.float64)
    for denoise in (standard_normal(schedule), bent):
        seen = states("dpmpp", denoise, schedule, x, timesteps)
        for (_, x_s, _), expected in zip(seen, integrate(denoise, schedule, x, timesteps), strict=True):
            torch.testing.assert_close(x_s, expected, rtol=1e-7, atol=1e-8)


def test_from_pure_noise_the_first_step_goes_to_the_estimate():
    schedule, x = schedule_of("zero"), torch.tensor([0.8, -1.5], dtype=torch.float64)
    (s, stepped, x0_hat), *_ = states("dpmpp", bent, schedule, x, [T, 60, 30, 0])
    torch.testing.assert_close(stepped, schedule.sigma[s] * x + schedule.alpha[s] * x0_hat, rtol=1e-12, atol=0)


# A mixture of two Gaussians: the order of each solver


class Mixture:
    """Two Gaussians on a line, under a fine schedule that is even in log-SNR, with exact denoiser and exact flow."""

    means = torch.tensor([-0.8, 0.6], dtype=torch.float64)
    shares = torch.tensor([0.3, 0.7], dtype=torch.float64)
    std = 0.15

    def __init__(self, timesteps=100_000):
        half_log_snr = torch.linspace(4, -4, timesteps, dtype=torch.float64)
        self.schedule = NoiseSchedule(torch.cat([torch.ones(1, dtype=torch.float64), torch.sigmoid(2 * half_log_snr)]))

    def components(self, t):
        alpha_bar = self.schedule.alpha_bar[t].item()
        return math.sqrt(alpha_bar), alpha_bar * self.std**2 + 1 - alpha_bar

    def denoise(self, x, t):
        """E[x_0 | x_t]: each component's own estimate, weighted by how likely it is."""
        alpha, variance = self.components(t)
        distance = x[:, None] - alpha * self.means  # [N, 2]
        likely = torch.softmax(self.shares.log() - distance**2 / (2 * variance), dim=1)
        return (likely * (self.means + alpha * self.std**2 / variance * distance)).sum(1)

    def cdf(self, x, t):
        alpha, variance = self.components(t)
        return (self.shares * torch.special.ndtr((x[:, None] - alpha * self.means) / math.sqrt(variance))).sum(1)

    def flow(self, x, t, s):
        """Where the probability-flow ODE takes x: on a line it keeps order, so x_s has the quantile of x_t."""
        quantile, low, high = self.cdf(x, t), torch.full_like(x, -9), torch.full_like(x, 9)
        for _ in range(60):
            middle = (low + high) / 2
            above = self.cdf(middle, s) > quantile
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return middle


@pytest.fixture(scope="module")
def mixture():
    return Mixture()


@pytest.mark.parametrize("name, order", [("ddim", 1), ("dpmpp", 2)])
def test_error_falls_at_the_promised_order(mixture, name, order):
    end, schedule = 5000, mixture.schedule
    x = torch.linspace(-2.5, 2.5, 21, dtype=torch.float64)
    exact = mixture.flow(x, schedule.timesteps, end)
    errors = []
    for count in (40, 80, 160):
        timesteps = [round(schedule.timesteps - (schedule.timesteps - end) * i / count) for i in range(count + 1)]
        errors.append((final(name, mixture.denoise, schedule, x, timesteps) - exact).abs().mean().item())
    for coarse, fine in zip(errors, errors[1:]):
        assert order - 0.3 < math.log2(coarse / fine) < order + 0.2


def test_second_order_is_closer_at_twenty_steps(mixture):
    end, schedule = 5000, mixture.schedule
    x = torch.linspace(-2.5, 2.5, 21, dtype=torch.float64)
    timesteps = [round(schedule.timesteps - (schedule.timesteps - end) * i / 20) for i in range(21)]
    exact = mixture.flow(x, schedule.timesteps, end)
    ddim, dpmpp = ((final(name, mixture.denoise, schedule, x, timesteps) - exact).abs().mean()
                   for name in ("ddim", "dpmpp"))
    assert dpmpp < ddim / 2


@pytest.mark.parametrize("name, options", STOCHASTIC)
def test_stochastic_samplers_reach_the_mixture_too(name, options):
    """Quantiles of 4,000 draws at the end of the linear schedule's 300 steps, from pure noise."""
    mixture, generator = Mixture(), torch.Generator().manual_seed(0)
    mixture.schedule = schedule_of("linear", 300)

    def randn():
        return torch.randn(4000, generator=generator, dtype=torch.float64)

    x = final(name, mixture.denoise, mixture.schedule, randn(), spaced_timesteps(300, 300), randn, **options)
    quantiles = mixture.cdf(x, 0).sort().values  # uniform, if x has the distribution of the data
    assert (quantiles - torch.linspace(0, 1, 4000, dtype=torch.float64)).abs().max() < 0.04
