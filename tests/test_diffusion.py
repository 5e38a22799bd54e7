"""Schedules, q(x_t | x_0), the posterior, prediction targets, loss and denoiser, against closed forms."""

import math
import random

import pytest
import torch

from config import Config, DiffusionConfig, UserError
from dataset import NO_LABEL
from diffusion import (
    MIN_SNR_GAMMA,
    NoiseSchedule,
    add_noise,
    diffusion_loss,
    make_denoiser,
    make_schedule,
    posterior,
    predicted_x0,
    stratified_timesteps,
    target,
    transition_variance,
)
from support.settings import validate

PREDICTIONS = ["noise", "x0", "v"]
WEIGHTINGS = ["none", "snr", "min-snr"]
SCHEDULES = [("linear", 1000), ("linear", 300), ("linear", 21), ("cosine", 1000), ("cosine", 50), ("cosine", 2)]


def schedule_of(name="cosine", timesteps=1000, prediction="v", weighting="none"):
    return make_schedule(DiffusionConfig(timesteps, name, prediction, weighting))


def zero_terminal(prediction="v", weighting="none", timesteps=50):
    """A schedule that ends in pure noise."""
    alpha_bar = schedule_of("cosine", timesteps).alpha_bar.clone()
    alpha_bar[-1] = 0
    return NoiseSchedule(alpha_bar, prediction, weighting)


def images(count, seed=0, dtype=torch.float32):
    return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def noise_like(x, seed=1):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def pairs(timesteps, count=30):
    """Random (t, s) with T >= t > s >= 0, with the extremes among them."""
    draw = random.Random(0)
    chosen = [(1, 0), (timesteps, 0), (timesteps, timesteps - 1), (2, 1)]
    return chosen + [tuple(sorted(draw.sample(range(timesteps + 1), 2), reverse=True)) for _ in range(count)]


# Schedules


@pytest.mark.parametrize("t, value", [(1, 0.9999), (100, 0.897018145675), (500, 0.0785872428818),
                                      (1000, 4.03582976538e-5)])
def test_linear_schedule_has_the_published_values(t, value):
    assert schedule_of("linear").alpha_bar[t].item() == pytest.approx(value, rel=1e-11)


def test_cosine_schedule_has_the_published_values():
    alpha_bar = schedule_of("cosine").alpha_bar
    assert alpha_bar[500].item() == pytest.approx(0.493843590441, rel=1e-11)
    # Equation 17 itself holds wherever the cap on beta does not act.
    for t in (1, 10, 250, 998):
        f = [math.cos((u / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t, 0)]
        assert alpha_bar[t].item() == pytest.approx(f[0] / f[1], rel=1e-10)


@pytest.mark.parametrize("timesteps", [2, 50, 1000])
def test_cosine_beta_is_capped(timesteps):
    alpha_bar = schedule_of("cosine", timesteps).alpha_bar
    beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
    assert beta.max().item() == pytest.approx(0.999, rel=1e-12)
    assert beta.argmax() == timesteps - 1


def test_linear_betas_are_those_of_the_paper_at_1000_and_scaled_at_other_lengths():
    for timesteps in (1000, 300, 100, 50, 21):
        alpha_bar = schedule_of("linear", timesteps).alpha_bar
        beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
        assert beta[0].item() == pytest.approx(0.1 / timesteps, rel=1e-9)
        assert beta[-1].item() == pytest.approx(20 / timesteps, rel=1e-9)
        torch.testing.assert_close(beta.diff(), torch.full_like(beta[1:], 19.9 / timesteps / (timesteps - 1)),
                                   rtol=1e-6, atol=1e-13)
    assert schedule_of("linear", 100).alpha_bar[-1].item() == pytest.approx(2.039e-5, rel=1e-3)


@pytest.mark.parametrize("timesteps", [1000, 300, 100, 50, 21])
def test_linear_schedule_ends_in_noise_at_every_length(timesteps):
    assert schedule_of("linear", timesteps).alpha_bar[-1] < 5e-5


@pytest.mark.parametrize("timesteps", [2, 10, 20])
def test_too_short_linear_schedule_is_a_user_error(timesteps):
    with pytest.raises(UserError, match=f"--timesteps {timesteps}"):
        validate(Config(diffusion=DiffusionConfig(timesteps, "linear")))


def test_unknown_schedule_is_a_user_error():
    with pytest.raises(UserError, match="--schedule"):
        schedule_of("no such schedule")


@pytest.mark.parametrize("name, timesteps", SCHEDULES)
def test_schedule_begins_clean_and_descends(name, timesteps):
    schedule = schedule_of(name, timesteps)
    alpha_bar = schedule.alpha_bar
    assert alpha_bar.dtype == torch.float64 and alpha_bar.device.type == "cpu"
    assert len(alpha_bar) == timesteps + 1 == schedule.timesteps + 1
    assert alpha_bar[0] == 1 and alpha_bar[-1] > 0
    assert (alpha_bar.diff() < 0).all()
    assert (schedule.snr.diff()[1:] < 0).all() and schedule.snr[0] == math.inf
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones_like(alpha_bar), rtol=1e-14, atol=0)
    torch.testing.assert_close(schedule.alpha**2, alpha_bar, rtol=1e-14, atol=0)
    assert schedule.sigma[0] == 0


# q(x_t | x_0) and the posterior


@pytest.mark.parametrize("name, timesteps", SCHEDULES)
def test_noise_added_step_by_step_has_the_moments_of_the_closed_form(name, timesteps):
    schedule = schedule_of(name, timesteps)
    scale, variance = 1.0, 0.0
    for t in range(1, timesteps + 1):
        beta = transition_variance(schedule, t, t - 1).item()
        scale, variance = math.sqrt(1 - beta) * scale, (1 - beta) * variance + beta
        assert scale == pytest.approx(schedule.alpha[t].item(), rel=1e-9)
        assert variance == pytest.approx(schedule.sigma[t].item() ** 2, rel=1e-9)


def test_add_noise_takes_each_image_to_its_own_timestep():
    schedule, t = schedule_of(), torch.tensor([0, 1, 250, 999, 1000])
    x0 = images(5)
    noise = noise_like(x0)
    x_t = add_noise(schedule, x0, t, noise)
    assert x_t.dtype == torch.float32 and x_t.shape == x0.shape
    assert torch.equal(x_t[0], x0[0])
    for i, step in enumerate(t.tolist()):
        exact = schedule.alpha[step] * x0[i].double() + schedule.sigma[step] * noise[i].double()
        torch.testing.assert_close(x_t[i].double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name, timesteps", SCHEDULES)
def test_posterior_is_bayes_rule(name, timesteps):
    """q(x_s | x_t, x_0) is q(x_t | x_s) q(x_s | x_0), normalised: precisions add, as do the means weighted by them."""
    schedule = schedule_of(name, timesteps)
    x0, x_t = images(2, dtype=torch.float64), images(2, seed=5, dtype=torch.float64) * 3
    for t, s in pairs(timesteps):
        mean, variance = posterior(schedule, x0, x_t, t, s)
        step_scale = math.sqrt(schedule.alpha_bar[t] / schedule.alpha_bar[s])
        step_variance = 1 - step_scale**2
        prior_variance = 1 - schedule.alpha_bar[s].item()
        if s == 0:
            assert variance == 0
            torch.testing.assert_close(mean, x0, rtol=0, atol=1e-12)
            continue
        precision = 1 / prior_variance + step_scale**2 / step_variance
        weighted = schedule.alpha[s] / prior_variance * x0 + step_scale / step_variance * x_t
        assert variance == pytest.approx(1 / precision, rel=1e-8)
        torch.testing.assert_close(mean, weighted / precision, rtol=1e-8, atol=1e-9)
        assert 0 < variance < transition_variance(schedule, t, s)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_posterior_of_one_step_is_equation_7_of_ddpm(name):
    schedule = schedule_of(name, 100)
    x0, x_t = torch.tensor(0.3, dtype=torch.float64), torch.tensor(-1.2, dtype=torch.float64)
    for t in range(2, 101):
        now, before = schedule.alpha_bar[t].item(), schedule.alpha_bar[t - 1].item()
        beta = 1 - now / before
        mean, variance = posterior(schedule, x0, x_t, t, t - 1)
        expected = math.sqrt(before) * beta / (1 - now) * 0.3 - math.sqrt(1 - beta) * (1 - before) / (1 - now) * 1.2
        assert mean.item() == pytest.approx(expected, rel=1e-10)
        assert variance == pytest.approx((1 - before) / (1 - now) * beta, rel=1e-10)


@pytest.mark.parametrize("name, timesteps", SCHEDULES)
def test_posterior_leads_from_one_marginal_to_the_other(name, timesteps):
    """Integrated over q(x_t | x_0), q(x_s | x_t, x_0) is q(x_s | x_0)."""
    schedule = schedule_of(name, timesteps)
    zero, one = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for t, s in pairs(timesteps):
        of_x_t, variance = posterior(schedule, zero, one, t, s)
        of_x0, _ = posterior(schedule, one, zero, t, s)
        assert (of_x_t * schedule.alpha[t] + of_x0).item() == pytest.approx(schedule.alpha[s].item(), rel=1e-9)
        total = of_x_t**2 * schedule.sigma[t] ** 2 + variance
        assert total.item() == pytest.approx(schedule.sigma[s].item() ** 2, rel=1e-7, abs=1e-14)


def test_posterior_keeps_the_dtype():
    schedule = schedule_of()
    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(2, 1, 4, 4, dtype=dtype)
        assert posterior(schedule, x, x, 700, 20)[0].dtype == dtype


def test_transition_variance_of_one_step_is_beta_and_steps_compose():
    schedule = schedule_of("linear")
    assert transition_variance(schedule, 1000, 999).item() == pytest.approx(0.02, rel=1e-9)
    for t, s in pairs(1000):
        u = (t + s) // 2
        kept = (1 - transition_variance(schedule, t, u)) * (1 - transition_variance(schedule, u, s))
        assert 1 - transition_variance(schedule, t, s).item() == pytest.approx(kept.item(), rel=1e-10)


# Targets and loss


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_predicted_x0_inverts_the_target(prediction, name):
    schedule = schedule_of(name, 1000, prediction)
    x0 = images(3)
    noise = noise_like(x0)
    for step in (1, 3, 200, 500, 800, 990):
        t = torch.full((3,), step)
        x_t = add_noise(schedule, x0, t, noise)
        x0_hat = predicted_x0(schedule, target(schedule, x0, t, noise), x_t, step)
        torch.testing.assert_close(x0_hat, x0, rtol=0, atol=3e-6 / schedule.alpha[step].item())


def test_targets_are_those_of_the_papers():
    t = torch.tensor([1, 400, 1000])
    x0 = images(3)
    noise = noise_like(x0)
    assert torch.equal(target(schedule_of(prediction="noise"), x0, t, noise), noise)
    assert torch.equal(target(schedule_of(prediction="x0"), x0, t, noise), x0)
    schedule = schedule_of(prediction="v")
    v, x_t = target(schedule, x0, t, noise).double(), add_noise(schedule, x0, t, noise).double()
    # v is x_t a quarter turn on, and both are turned by the same angle out of (x0, noise).
    alpha, sigma = (values[t][:, None, None, None] for values in (schedule.alpha, schedule.sigma))
    torch.testing.assert_close(alpha * x_t - sigma * v, x0.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sigma * x_t + alpha * v, noise.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weight_per_timestep(prediction):
    """Each weighting is a weight on x0's squared error; what multiplies the prediction's follows from its Jacobian."""
    for weighting in WEIGHTINGS:
        schedule = schedule_of("linear", 1000, prediction, weighting)
        weights = schedule.loss_weights
        assert weights.shape == (1001,) and weights.dtype == torch.float64
        assert torch.isfinite(weights).all() and (weights > 0).all()
        for t in (1, 10, 300, 1000):
            snr = (schedule.alpha_bar[t] / (1 - schedule.alpha_bar[t])).item()
            zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
            slope = (predicted_x0(schedule, one, zero, t) - predicted_x0(schedule, zero, zero, t)).item()
            on_x0 = {"none": 1 / slope**2, "snr": snr, "min-snr": min(snr, MIN_SNR_GAMMA)}[weighting]
            assert weights[t].item() == pytest.approx(on_x0 * slope**2, rel=1e-9)


def test_weights_that_the_papers_name():
    ones = torch.ones(1001, dtype=torch.float64)
    plain = schedule_of(prediction="noise", weighting="snr").loss_weights  # 2006.11239, eq. 14
    torch.testing.assert_close(plain, ones)
    capped = schedule_of("linear", prediction="noise", weighting="min-snr").loss_weights  # 2303.09556
    snr = schedule_of("linear").snr[1:]
    torch.testing.assert_close(capped[1:], (MIN_SNR_GAMMA / snr).clamp(max=1))


@pytest.mark.parametrize("weighting", ["snr", "min-snr"])
def test_one_guess_has_the_same_loss_whatever_the_network_predicts(weighting):
    """Three networks that mean the same x0_hat, asked for noise, x0 and v."""
    x0 = images(6)
    noise, wrong = noise_like(x0), images(6, seed=9).double()
    t, labels = torch.tensor([1, 100, 300, 500, 700, 950]), torch.zeros(6).long()
    losses = []
    for prediction in PREDICTIONS:
        schedule = schedule_of("linear", 1000, prediction, weighting)
        alpha, sigma = (values[t][:, None, None, None] for values in (schedule.alpha, schedule.sigma))
        noise_hat = (alpha * x0 + sigma * noise - alpha * wrong) / sigma
        answer = {"noise": noise_hat, "x0": wrong, "v": alpha * noise_hat - sigma * wrong}[prediction]
        losses.append(diffusion_loss(lambda x, t, label, answer=answer: answer, schedule, x0, labels, t, noise))
    weight = schedule_of("linear").snr[t].clamp(max=MIN_SNR_GAMMA if weighting == "min-snr" else math.inf)
    expected = (weight * (wrong - x0).square().flatten(1).mean(1)).float()
    for loss in losses:
        torch.testing.assert_close(loss, expected, rtol=2e-4, atol=1e-7)


def test_unweighted_noise_loss_is_the_snr_weighted_loss_of_x0():
    x0, labels, t = images(4), torch.zeros(4).long(), torch.tensor([5, 200, 600, 900])
    noise = noise_like(x0)
    plain, weighted = schedule_of(prediction="noise"), schedule_of(prediction="x0", weighting="snr")

    def guess(x, t, label):
        return torch.tanh(x) + label[:, None, None, None]

    def same_guess(x, t, label):
        answers = zip(guess(x, t, label), x, t.tolist())
        return torch.stack([predicted_x0(plain, answer, x_t, step) for answer, x_t, step in answers])

    torch.testing.assert_close(diffusion_loss(guess, plain, x0, labels, t, noise),
                               diffusion_loss(same_guess, weighted, x0, labels, t, noise), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_loss_is_per_image_float32_and_zero_for_the_right_answer(prediction, weighting):
    schedule, x0, t = schedule_of("cosine", 100, prediction, weighting), images(5), torch.tensor([1, 2, 50, 99, 100])
    noise, labels = noise_like(x0), torch.arange(5)
    seen = []

    def network(x, times, label):
        seen.append((x, times, label))
        return target(schedule, x0, times, noise).bfloat16() * 0

    loss = diffusion_loss(network, schedule, x0, labels, t, noise)
    assert loss.shape == (5,) and loss.dtype == torch.float32 and (loss > 0).all() and torch.isfinite(loss).all()
    expected = schedule.loss_weights[t] * target(schedule, x0, t, noise).double().square().flatten(1).mean(1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    (x, times, label), = seen
    torch.testing.assert_close(x, add_noise(schedule, x0, t, noise))
    assert torch.equal(times, t) and torch.equal(label, labels)
    exact = diffusion_loss(lambda x, t, label: target(schedule, x0, t, noise), schedule, x0, labels, t, noise)
    assert torch.equal(exact, torch.zeros(5))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clipped_loss_forgives_what_sampling_clips(prediction):
    """An answer that stands for x0_hat costs what its clipped self does where x0 is at an edge, all of it elsewhere."""
    schedule, t = schedule_of("cosine", 100, prediction), torch.tensor([1, 10, 50, 90])
    x0 = torch.tensor([-1.0, 1, 0.5, -1]).repeat(4, 1, 28, 7)
    x0_hat = x0 + 0.4 * noise_like(x0, 3)
    noise = noise_like(x0)
    x_t = add_noise(schedule, x0, t, noise)
    alpha, sigma = (schedule.at(part, t) for part in ("alpha", "sigma"))

    def loss(x0_hat, clip):
        implied = (x_t - alpha * x0_hat) / sigma  # the noise that goes with x_t and x0_hat
        answer = {"noise": implied, "x0": x0_hat, "v": alpha * implied - sigma * x0_hat}[prediction]
        return diffusion_loss(lambda x, t, label: answer, schedule, x0, torch.zeros(4).long(), t, noise, clip)

    at_edge = torch.where(x0.abs() == 1, x0_hat.clamp(-1, 1), x0_hat)
    torch.testing.assert_close(loss(x0_hat, True), loss(at_edge, False), rtol=1e-3, atol=1e-6)
    assert (loss(x0_hat, True) < 0.8 * loss(x0_hat, False)).all()
    inside = x0 * 0.3
    torch.testing.assert_close(loss(inside, True), loss(inside, False))


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_zero_terminal_snr_stays_finite(prediction, weighting):
    schedule = zero_terminal(prediction, weighting)
    x0, t = images(3), torch.tensor([1, 25, 50])
    noise = noise_like(x0)
    assert torch.isfinite(schedule.loss_weights).all()
    loss = diffusion_loss(lambda x, t, label: x * 0.3, schedule, x0, torch.zeros(3).long(), t, noise)
    assert torch.isfinite(loss).all()
    assert torch.equal(add_noise(schedule, x0, t, noise)[2], noise[2])
    x0_hat = predicted_x0(schedule, target(schedule, x0, t, noise)[2:], noise[2:], 50)
    torch.testing.assert_close(x0_hat, x0[2:])
    for s in (0, 1, 30, 49):
        mean, variance = posterior(schedule, x0, noise, 50, s)
        torch.testing.assert_close(mean, schedule.alpha[s].float() * x0)  # pure noise tells nothing
        assert variance == pytest.approx(schedule.sigma[s].item() ** 2)


# Timesteps of a batch


@pytest.mark.parametrize("timesteps, batch_size", [(1000, 64), (1000, 7), (50, 128), (21, 21), (2, 5), (100_000, 256)])
@pytest.mark.parametrize("offset", [0.0, 0.5, 1 - 2**-24])
def test_stratified_timesteps_lie_one_in_each_stratum(timesteps, batch_size, offset):
    t = stratified_timesteps(timesteps, batch_size, torch.tensor(offset))
    assert t.dtype == torch.int64 and t.shape == (batch_size,)
    assert t.min() >= 1 and t.max() <= timesteps
    edges = torch.arange(batch_size + 1, dtype=torch.float64) * timesteps / batch_size
    t = t.sort().values
    assert (t >= edges[:-1].floor() + 1).all() and (t <= edges[1:].floor() + 1).all()


def test_stratified_timesteps_are_uniform_over_offsets():
    timesteps, batch_size, offsets = 10, 4, 5000
    counts = torch.zeros(timesteps + 1)
    for i in range(offsets):
        t = stratified_timesteps(timesteps, batch_size, torch.tensor((i + 0.5) / offsets))
        counts += torch.bincount(t, minlength=timesteps + 1)
    assert counts[0] == 0
    torch.testing.assert_close(counts[1:] / counts.sum(), torch.full((timesteps,), 0.1), rtol=2e-3, atol=0)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.7, 0.999])
def test_a_share_of_the_batch_has_the_levels_in_focus(share):
    batch_size, offsets = 40, 50
    counts = torch.zeros(101, dtype=torch.float64)
    for i in range(offsets):
        t = stratified_timesteps(100, batch_size, torch.tensor((i + 0.5) / offsets), share, (35, 90))
        counts += torch.bincount(t, minlength=101)
    expected = torch.full((101,), (1 - share) / 100, dtype=torch.float64)
    expected[0], expected[36:91] = 0, (1 - share) / 100 + share / 55
    torch.testing.assert_close(counts / (batch_size * offsets), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name, low, high", [("cosine", 398, 793), ("linear", 203, 475)])
def test_the_focus_is_a_matter_of_noise_not_of_the_schedule(name, low, high):
    schedule = make_schedule(DiffusionConfig(schedule=name))
    assert schedule.focus == (low, high)
    assert schedule.alpha_bar[low] > 0.65 >= schedule.alpha_bar[low + 1]
    assert schedule.alpha_bar[high] > 0.1 >= schedule.alpha_bar[high + 1]
    none = NoiseSchedule(torch.tensor([1, 0.9, 0.05, 0.01], dtype=torch.float64))  # then the next level
    assert none.focus == (1, 1)
    assert stratified_timesteps(3, 4, torch.tensor(0.5), 0.75, none.focus).tolist() == [2, 2, 2, 2]


class Recorder:
    """A network that keeps its inputs and answers with a function of them."""

    def __init__(self, answer=lambda x, t, label: 0.5 * x + 0.01 * label[:, None, None, None]):
        self.calls, self.answer = [], answer

    def __call__(self, x, t, label):
        self.calls.append((x, t, label))
        return self.answer(x, t, label)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_denoiser_calls_the_network_once_in_float32_and_keeps_the_dtype(prediction, dtype):
    schedule, network, labels = schedule_of(prediction=prediction), Recorder(), torch.tensor([3, 1, 4])
    x = images(3, dtype=dtype)
    x0_hat = make_denoiser(network, schedule, labels)(x, 300)
    (seen, t, label), = network.calls
    assert seen.dtype == torch.float32 and torch.equal(seen, x.float())
    assert t.tolist() == [300] * 3 and torch.equal(label, labels)
    assert x0_hat.dtype == dtype and x0_hat.shape == x.shape
    expected = predicted_x0(schedule, network.answer(x.float(), t, labels).to(dtype), x, 300).clamp(-1, 1)
    torch.testing.assert_close(x0_hat, expected)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoiser_clips(prediction):
    schedule = schedule_of(prediction=prediction)
    for sign in (1, -1):
        network = Recorder(lambda x, t, label, sign=sign: torch.full_like(x, sign * 1e4))
        x0_hat = make_denoiser(network, schedule, torch.zeros(2).long())(images(2), 500)
        assert x0_hat.abs().max() == 1 and len(x0_hat.unique()) == 1


@pytest.mark.parametrize("guidance", [0.0, 0.5, 2.0, 7.5])
def test_guidance_makes_one_call_for_both_halves(guidance):
    schedule, labels, x = schedule_of(prediction="x0"), torch.tensor([3, 1, 4]), images(3) * 0.1
    network = Recorder(lambda x, t, label: 0.1 * x + 0.01 * label[:, None, None, None])
    x0_hat = make_denoiser(network, schedule, labels, guidance)(x, 77)
    (seen, t, label), = network.calls
    assert torch.equal(seen, torch.cat([x, x])) and t.tolist() == [77] * 6
    assert label.tolist() == [3, 1, 4] + [NO_LABEL] * 3
    # 2207.12598, eq. 6, in its own notation: (1 + w) labelled - w free
    w = guidance - 1
    expected = (1 + w) * network.answer(x, t, labels) - w * network.answer(x, t, torch.full((3,), NO_LABEL))
    torch.testing.assert_close(x0_hat, expected)


def test_guidance_zero_is_unlabelled_and_equal_halves_change_nothing():
    schedule, labels, x = schedule_of(), torch.tensor([3, 1, 4]), images(3)
    plain = make_denoiser(Recorder(), schedule, torch.full((3,), NO_LABEL))(x, 500)
    torch.testing.assert_close(make_denoiser(Recorder(), schedule, labels, 0.0)(x, 500), plain)
    deaf = Recorder(lambda x, t, label: 0.3 * x)
    guided, unguided = (make_denoiser(deaf, schedule, labels, guidance)(x, 500) for guidance in (5.0, 1.0))
    torch.testing.assert_close(guided, unguided)


def test_guidance_within_an_interval():
    schedule, labels, x = schedule_of("linear", 1000), torch.tensor([3, 1]), images(2)
    network = Recorder(lambda x, t, label: 0.1 * x + 0.01 * label[:, None, None, None])
    always, never = (make_denoiser(network, schedule, labels, guidance) for guidance in (2.0, 1.0))
    low, high = schedule.alpha_bar[[750, 251]].tolist()  # of alpha_bar: both ends belong to it
    within = make_denoiser(network, schedule, labels, 2.0, (low, high))
    for t, expected in ((1, never), (250, never), (251, always), (750, always), (751, never), (1000, never)):
        assert torch.equal(within(x, t), expected(x, t))


def test_guidance_is_computed_in_the_dtype_of_the_state():
    """A prediction in bfloat16 is cast before it is extrapolated: else guidance 8 rounds eight times as coarsely."""
    schedule, labels, x = schedule_of(prediction="x0"), torch.tensor([3, 1, 4]), images(3) * 0.1
    network = Recorder(lambda x, t, label: (0.1 * x + 0.01 * label[:, None, None, None]).bfloat16())
    labelled, free = (network.answer(x, 77, which).float() for which in (labels, torch.full((3,), NO_LABEL)))
    x0_hat = make_denoiser(network, schedule, labels, 8.0)(x, 77)
    torch.testing.assert_close(x0_hat, free + 8 * (labelled - free), rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guided_x0_is_the_same_extrapolation_whatever_the_network_predicts(prediction):
    """Before clipping, x0 is affine in the prediction, so guidance of one is guidance of the other."""
    schedule, labels, x, t = schedule_of("linear", 1000, prediction), torch.tensor([3, 1]), images(2) * 0.1, 60
    network = Recorder(lambda x, t, label: 0.1 * x + 0.01 * label[:, None, None, None])
    labelled, free = (make_denoiser(network, schedule, which)(x, t) for which in (labels, torch.full((2,), NO_LABEL)))
    torch.testing.assert_close(make_denoiser(network, schedule, labels, 1.5)(x, t), free + 1.5 * (labelled - free),
                               rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha_bar", [[0.99, 0.5, 0.1], [1.0, 0.5, 0.5], [1.0, 0.2, 0.5]])
def test_a_schedule_begins_with_one_and_descends(alpha_bar):
    with pytest.raises(ValueError, match="begin with 1 and to descend"):
        NoiseSchedule(torch.tensor(alpha_bar, dtype=torch.float64))
