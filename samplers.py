"""The reverse process: spaced timesteps, and one generator function per sampler.

Every sampler has the signature (denoise, schedule, x, timesteps, randn, **options) and yields (s, x, x0_hat) after
each step from t to the next s < t, any pair. It sees only denoise(x, t) -> x0_hat: labels, guidance and prediction
type live inside that. Noise is re-derived from x0_hat, so that a clipped x0_hat gives a consistent step.
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
EDM_RHO, EDM_HIGHEST = 7, 20.0  # of the spacing "edm"; sigma / alpha above which the data hardly shows


def spaced_timesteps(timesteps: int, steps: int) -> list[int]:
    """Descending integers from T to 0, length steps + 1, evenly spaced from the noisy end (arXiv 2305.08891, table 2).

    Raises UserError unless 1 <= steps <= T.
    """
    if not 1 <= steps <= timesteps:
        raise UserError(f"--steps {steps}: this model has {timesteps} noise levels; choose from 1 to {timesteps} steps")
    return [round(timesteps * (1 - i / steps)) for i in range(steps + 1)]


def timesteps_of(schedule: NoiseSchedule, steps: int, spacing: str = "trailing") -> list[int]:
    """Descending integers from T to 0, length steps + 1, spaced in one of three ways; raises UserError as above.

    "trailing": evenly. "eased": closer together at both ends, a quarter of the way to the Chebyshev nodes.
    "edm": from T to sigma_t / alpha_t = 20, and on to t = 1 as arXiv 2206.00364, eq. 5, spaces it.
    """
    last = schedule.timesteps
    even = spaced_timesteps(last, steps)
    if spacing == "trailing" or steps == 1:
        return even
    if spacing == "eased":
        wanted = [(1 - EASE) * t + EASE * last * (1 + math.cos(math.pi * i / steps)) / 2 for i, t in enumerate(even)]
    else:
        ratio = (schedule.sigma / schedule.alpha)[1:]
        high, low = (min(ratio[i].item(), EDM_HIGHEST) ** (1 / EDM_RHO) for i in (-1, 0))
        ramp = [high + (low - high) * i / max(1, steps - 2) for i in range(steps - 1)]
        wanted = [last, *(1 + (ratio - value**EDM_RHO).abs().argmin().item() for value in ramp), 0]
    spaced = [round(t) for t in wanted]
    for i in range(1, steps):  # distinct, with room for what follows
        spaced[i] = max(min(spaced[i], spaced[i - 1] - 1), steps - i)
    return spaced


def ddpm(denoise: Denoiser, schedule: NoiseSchedule, x: Tensor, timesteps: Sequence[int], randn: Randn,
         variance: str = "posterior") -> Steps:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2); variance "posterior" (beta-tilde) or "upper" (beta)."""
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


def dpmpp(denoise: Denoiser, schedule: NoiseSchedule, x: Tensor, timesteps: Sequence[int], randn: Randn,
          order: int = 2) -> Steps:
    """DPM-Solver++ (arXiv 2211.01095, "2M"), deterministic; at order 1 it is DDIM.

    The first step and the step to s = 0, where log-SNR is infinite, are of first order.
    """
    previous: tuple[int, Tensor] | None = None
    for t, s in pairwise(timesteps):
        x0_hat = denoise(x, t)
        aim = x0_hat
        if order > 1 and previous is not None and s > 0:  # along a line in log-SNR, to the middle of the step
            r_inverse = _log_snr_step(schedule, t, s) / _log_snr_step(schedule, previous[0], t)
            aim = x0_hat + r_inverse / 2 * (x0_hat - previous[1])  # x0_hat itself after infinite noise
        x = _exponential_step(schedule, x, aim, t, s)
        previous = t, x0_hat
        yield s, x, x0_hat


def sa(denoise: Denoiser, schedule: NoiseSchedule, x: Tensor, timesteps: Sequence[int], randn: Randn) -> Steps:
    """SA-Solver (arXiv 2309.05019, tau = 1), predictor and corrector of second order: ancestral sampling.

    With x0_hat constant its step is that of `ddpm`. An evaluation first corrects the step that led to it, by the line
    in log-SNR between x0_hat at both ends, and then predicts the next, by the line through the latest two. Where steps
    are coarse, x0_hat at the far end, which has seen the step's fresh noise, also gives back the spread that a step
    lacks whose x0_hat is only a mean.
    """
    before: tuple[Tensor, Tensor, float, float] | None = None  # x0_hat, all of the step but its x0, share, h
    for t, s in pairwise(timesteps):
        x0_hat = denoise(x, t)
        aim = x0_hat
        h = _log_snr_step(schedule, t, s)
        if before is not None:
            last, rest, share, last_h = before
            x = rest + share * torch.lerp(last, x0_hat, _lean(last_h))
            if s > 0:
                aim = x0_hat + _lean(h) * h / last_h * (x0_hat - last)  # 0 after infinite noise
        rest, step_variance = posterior(schedule, torch.zeros_like(x), x, t, s)
        if s > 0:
            rest = rest + math.sqrt(step_variance) * randn()
        share = (schedule.alpha[s] * transition_variance(schedule, t, s) / (1 - schedule.alpha_bar[t])).item()
        x = rest + share * aim
        before = x0_hat, rest, share, h
        yield s, x, x0_hat


def _lean(h: float) -> float:
    """Mean position in a step of log-SNR 2h, 0 at its begin and 1 at its end, of what reaches its end of x0_hat."""
    reached = -math.expm1(-2 * h)
    return (1 - reached / (2 * h)) / reached


def unipc(denoise: Denoiser, schedule: NoiseSchedule, x: Tensor, timesteps: Sequence[int], randn: Randn,
          order: int = 3) -> Steps:
    """UniPC on x0, multistep, with its corrector (arXiv 2302.04867), deterministic.

    An evaluation first corrects the step that led to it and then predicts the next, so each step costs one.
    The first step and the step to s = 0, where log-SNR is infinite, are predicted at first order.
    """
    history: list[tuple[int, Tensor]] = []  # (t, x0_hat) of the latest evaluations, the newest last
    corrected = x
    for t, s in pairwise(timesteps):
        x0_hat = denoise(x, t)
        if history:
            corrected = _unified_step(schedule, corrected, history, t, end=x0_hat)
        history = [*history, (t, x0_hat)][-order:]
        x = _unified_step(schedule, corrected, history, s)
        yield s, x, x0_hat


def _unified_step(schedule: NoiseSchedule, x: Tensor, history: list[tuple[int, Tensor]], s: int,
                  end: Tensor | None = None) -> Tensor:
    """From history's newest t to s, with x0_hat a polynomial in log-SNR through history, and `end` at s if given."""
    t, x0_hat = history[-1]
    h = _log_snr_step(schedule, t, s)
    first_order = _exponential_step(schedule, x, x0_hat, t, s)
    nodes = [(-_log_snr_step(schedule, u, t) / h, value) for u, value in history[:-1]]  # (position in h, x0_hat)
    nodes = [(position, value) for position, value in nodes if math.isfinite(position)]
    if end is not None:
        nodes.append((1.0, end))
    if not nodes or not math.isfinite(h):
        return first_order
    positions = torch.tensor([position for position, _ in nodes], dtype=torch.float64)
    powers = torch.arange(len(nodes), dtype=torch.float64)
    weights = torch.linalg.solve(positions ** powers[:, None], _moments(-h, len(nodes)))
    bend = sum(weight / position * (value - x0_hat) for weight, (position, value) in zip(weights.tolist(), nodes))
    return first_order - schedule.alpha[s].item() * math.expm1(-h) * bend


def _moments(z: float, count: int) -> Tensor:
    """i! phi_{i+1}(z) / phi_1(z) for i in 1..count, float64."""
    phi = [math.expm1(z) / z]
    for i in range(1, count + 1):
        phi.append((phi[-1] - 1 / math.factorial(i)) / z)
    return torch.tensor([math.factorial(i) * phi[i] / phi[0] for i in range(1, count + 1)], dtype=torch.float64)


def _log_snr_step(schedule: NoiseSchedule, t: int, s: int) -> float:
    """Half the gain in log-SNR from t to s, log(alpha_s sigma_t / (sigma_s alpha_t)); infinite from alpha_t = 0."""
    ratio = schedule.snr[s] / schedule.snr[t]
    return 0.5 * math.log(ratio) if math.isfinite(ratio) else math.inf


def _exponential_step(schedule: NoiseSchedule, x: Tensor, x0_hat: Tensor, t: int, s: int) -> Tensor:
    """Exact solution of the probability-flow ODE from t to s while x0_hat is constant (2211.01095)."""
    shrink = (schedule.sigma[s] / schedule.sigma[t]).item()
    return shrink * x + (schedule.alpha[s].item() - schedule.alpha[t].item() * shrink) * x0_hat


SAMPLERS: dict[str, Callable[..., Steps]] = {
    "ddpm": ddpm, "ddim": ddim, "dpmpp": dpmpp, "sa": sa, "unipc": unipc}
