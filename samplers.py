"""The reverse process: spaced timesteps, and one generator function per sampler.

A sampler is called with (denoise, schedule, x, timesteps, randn, **options) and yields (s, x, x0_hat) after each step
from t to the next s < t, any pair; x keeps its dtype. It sees only denoise(x, t) -> x0_hat: labels, guidance and
prediction type are hidden in that. It derives the noise from x0_hat, so that a clipped x0_hat gives a consistent step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from config import UserError
from diffusion import Denoiser, NoiseSchedule, posterior, transition_variance

Steps = Iterator[tuple[int, Tensor, Tensor]]
Randn = Callable[[], Tensor]
EASE = 0.25  # share of the Chebyshev nodes in the spacing "eased"


def spaced_timesteps(timesteps: int, steps: int, spacing: str = "trailing") -> list[int]:
    """Descending integers from T = `timesteps` to 0, length steps + 1, all different.

    "trailing": evenly spaced from the noisy end (arXiv 2305.08891, table 2). "eased": closer together at both ends, a
    quarter of the way from those to the Chebyshev nodes T (1 + cos(pi i / steps)) / 2. Raises UserError unless
    1 <= steps <= T.
    """
    if not 1 <= steps <= timesteps:
        raise UserError(f"--steps {steps}: this model has {timesteps} noise levels; choose from 1 to {timesteps} steps")
    even = [round(timesteps * (1 - i / steps)) for i in range(steps + 1)]
    if spacing == "trailing" or steps == 1:
        return even
    spaced = [round((1 - EASE) * t + EASE * timesteps * (1 + math.cos(math.pi * i / steps)) / 2)
              for i, t in enumerate(even)]
    for i in range(1, steps):  # different ones, with room for those that follow
        spaced[i] = max(min(spaced[i], spaced[i - 1] - 1), steps - i)
    return spaced


def ddpm(denoise: Denoiser, schedule: NoiseSchedule, x: Tensor, timesteps: Sequence[int], randn: Randn,
         variance: str = "posterior") -> Steps:
    """DDPM, ancestral sampling (arXiv 2006.11239, algorithm 2); variance "posterior" (beta-tilde) or "upper" (beta)."""
    for t, s in pairwise(timesteps):
        x0_hat = denoise(x, t)
        x, step_variance = posterior(schedule, x0_hat, x, t, s)
        if variance == "upper":
            step_variance = transition_variance(schedule, t, s).item()
        if s > 0:  # the last step has no noise
            x = x + math.sqrt(step_variance) * randn()
        yield s, x, x0_hat


def ddim(denoise: Denoiser, schedule: NoiseSchedule, x: Tensor, timesteps: Sequence[int], randn: Randn,
         eta: float = 0.0) -> Steps:
    """DDIM (arXiv 2010.02502, eq. 12 and 16): deterministic at eta = 0, ancestral sampling at eta = 1."""
    for t, s in pairwise(timesteps):
        x0_hat = denoise(x, t)
        step_variance = eta**2 * posterior(schedule, x0_hat, x, t, s)[1]
        noise_hat = (x - schedule.alpha[t].item() * x0_hat) / schedule.sigma[t].item()
        direction = math.sqrt(max(0.0, 1 - schedule.alpha_bar[s].item() - step_variance))  # rounding may go below 0
        x = schedule.alpha[s].item() * x0_hat + direction * noise_hat
        if step_variance > 0:
            x = x + math.sqrt(step_variance) * randn()
        yield s, x, x0_hat


def dpmpp(denoise: Denoiser, schedule: NoiseSchedule, x: Tensor, timesteps: Sequence[int], randn: Randn) -> Steps:
    """DPM-Solver++ (arXiv 2211.01095, "2M"), deterministic.

    The first step and the step to s = 0, where log-SNR is infinite, are of first order, which is DDIM.
    """
    previous: tuple[int, Tensor] | None = None
    for t, s in pairwise(timesteps):
        x0 = x0_hat = denoise(x, t)
        if previous is not None and s > 0:  # extrapolate x0_hat, linear in log-SNR, to the middle of the step
            ratio = _log_snr_step(schedule, t, s) / _log_snr_step(schedule, previous[0], t)  # 0 after infinite noise
            x0 = x0_hat + ratio / 2 * (x0_hat - previous[1])
        shrink = (schedule.sigma[s] / schedule.sigma[t]).item()
        x = shrink * x + (schedule.alpha[s].item() - schedule.alpha[t].item() * shrink) * x0
        previous = t, x0_hat
        yield s, x, x0_hat


def sa(denoise: Denoiser, schedule: NoiseSchedule, x: Tensor, timesteps: Sequence[int], randn: Randn) -> Steps:
    """SA-Solver (arXiv 2309.05019, tau = 1), predictor and corrector of second order: ancestral sampling.

    With a constant x0_hat it is `ddpm`. Each evaluation first corrects the step that led to it, with x0_hat linear in
    log-SNR between both ends of that step, and then predicts the next step by extrapolation. The correction restores
    the variance that a coarse step loses, because its x0_hat is only a mean.
    """
    previous: tuple[Tensor, Tensor, float, float] | None = None  # x0_hat, rest, weight, h; x = rest + weight x0
    for t, s in pairwise(timesteps):
        x0 = x0_hat = denoise(x, t)
        h = _log_snr_step(schedule, t, s)
        if previous is not None:
            last_x0_hat, rest, weight, last_h = previous
            x = rest + weight * torch.lerp(last_x0_hat, x0_hat, _mean_position(last_h))
            if s > 0:
                x0 = x0_hat + _mean_position(h) * h / last_h * (x0_hat - last_x0_hat)  # 0 after infinite noise
        rest, step_variance = posterior(schedule, torch.zeros_like(x), x, t, s)
        if s > 0:
            rest = rest + math.sqrt(step_variance) * randn()
        weight = (schedule.alpha[s] * transition_variance(schedule, t, s) / (1 - schedule.alpha_bar[t])).item()
        x = rest + weight * x0
        previous = x0_hat, rest, weight, h
        yield s, x, x0_hat


def _mean_position(h: float) -> float:
    """Centre of the exponential weights over a step of log-SNR 2h, as a fraction of the step."""
    reached = -math.expm1(-2 * h)
    return (1 - reached / (2 * h)) / reached


def _log_snr_step(schedule: NoiseSchedule, t: int, s: int) -> float:
    """h: half the gain in log-SNR from t to s, log(alpha_s sigma_t / (sigma_s alpha_t)); infinite from alpha_t = 0."""
    ratio = schedule.snr[s] / schedule.snr[t]
    return 0.5 * math.log(ratio) if math.isfinite(ratio) else math.inf


SAMPLERS: dict[str, Callable[..., Steps]] = {"ddpm": ddpm, "ddim": ddim, "dpmpp": dpmpp, "sa": sa}
