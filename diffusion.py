"""The mathematics of diffusion: noise schedules, q(x_t | x_0), the posterior, prediction targets, loss and denoiser.

x_t = alpha_t x_0 + sigma_t noise with alpha_t^2 = alpha_bar_t and sigma_t^2 = 1 - alpha_bar_t; t = 0 is clean data,
t = T is noise, and the network is trained on t in 1..T. The network is any callable (x, t, label) -> prediction.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from config import DiffusionConfig, UserError
from dataset import NO_LABEL
from support import code

code.register(__file__)

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
Denoiser = Callable[[Tensor, int], Tensor]
MIN_SNR_GAMMA = 5.0  # arXiv 2303.09556, section 3.4
FOCUS = (0.1, 0.65)  # alpha_bar between which the shape is decided; cosine schedule, T = 1000: 398 < t <= 793


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """alpha_bar float64 [T+1] on the CPU, descending from alpha_bar[0] == 1; and what the network predicts.

    It may end at 0 (zero terminal SNR); then the prediction can't be the noise. All derived values are float64 [T+1].
    """

    alpha_bar: Tensor
    prediction: str = "v"
    weighting: str = "none"
    tables: dict[torch.device, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.alpha_bar[0] != 1 or (self.alpha_bar.diff() >= 0).any():
            raise ValueError("alpha_bar has to begin with 1 and to descend")

    timesteps = property(lambda self: len(self.alpha_bar) - 1)
    alpha = cached_property(lambda self: self.alpha_bar.sqrt())  # scale of the signal
    sigma = cached_property(lambda self: (1 - self.alpha_bar).sqrt())  # standard deviation of the noise
    snr = cached_property(lambda self: self.alpha_bar / (1 - self.alpha_bar))  # alpha_t^2 / sigma_t^2, infinite at 0

    @cached_property
    def focus(self) -> tuple[int, int]:  # the timesteps low < t <= high lie in FOCUS
        high, low = (int((self.alpha_bar[1:] > edge).sum()) for edge in FOCUS)
        return low, high

    @cached_property
    def loss_weights(self) -> Tensor:
        """Weight of the prediction's squared error at each t.

        "none": 1. "snr": x0's squared error is weighted by SNR, which is the unweighted noise loss of 2006.11239,
        eq. 14. "min-snr": x0's squared error is weighted by min(SNR, 5) (2303.09556, section 3.4).
        """
        snr = self.snr.clone()
        snr[0] = snr[1]  # t = 0 is never trained on; keep it finite
        # Squared errors: x0's is the noise's over SNR, and v's over SNR + 1.
        plain = {"noise": snr, "x0": torch.ones_like(snr), "v": snr + 1}[self.prediction]
        wanted = {"none": plain, "snr": snr, "min-snr": snr.clamp(max=MIN_SNR_GAMMA)}
        return wanted[self.weighting] / plain

    def at(self, name: str, t: Tensor) -> Tensor:
        """Float32 values of alpha, sigma or loss_weights at t int64 [B], as [B, 1, 1, 1] on t's device."""
        if t.device not in self.tables:
            self.copy_to(t.device)
        return self.tables[t.device][name][t][:, None, None, None]

    def copy_to(self, device: torch.device) -> None:
        """Copies there what training reads, once: a copy in each step would wait for a GPU."""
        with torch.inference_mode(False):  # it may be made while sampling and used in training
            self.tables[device] = {name: getattr(self, name).float().to(device)  # Apple GPUs have no float64
                                   for name in ("alpha", "sigma", "loss_weights")}


def make_schedule(config: DiffusionConfig) -> NoiseSchedule:
    """Linear betas (arXiv 2006.11239, section 4; scaled by 1000 / T) or the cosine schedule (2102.09672, eq. 17)."""
    steps = config.timesteps
    if config.schedule == "linear":
        beta = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000 / steps)
    elif config.schedule == "cosine":
        f = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2).square()
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    else:
        raise UserError(f"--schedule {config.schedule}: diffusion.py has no such schedule")
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])
    return NoiseSchedule(alpha_bar, config.prediction, config.weighting)


def add_noise(schedule: NoiseSchedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """A sample x_t of q(x_t | x_0) (2006.11239, eq. 4). x0, noise [B, 1, H, W]; t int64 [B] in 0..T."""
    return schedule.at("alpha", t) * x0 + schedule.at("sigma", t) * noise


def posterior(schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: int, s: int) -> tuple[Tensor, float]:
    """Mean (like x_t) and variance of q(x_s | x_t, x_0) for any s < t (2006.11239, eq. 7; 2107.00630, eq. 24-25)."""
    var_t, var_s = 1 - schedule.alpha_bar[t], 1 - schedule.alpha_bar[s]
    alpha_ts = schedule.alpha[t] / schedule.alpha[s]
    var_ts = transition_variance(schedule, t, s)
    mean = (alpha_ts * var_s / var_t).item() * x_t + (schedule.alpha[s] * var_ts / var_t).item() * x0
    return mean, (var_ts * var_s / var_t).item()


def transition_variance(schedule: NoiseSchedule, t: int, s: int) -> Tensor:
    """Variance of q(x_t | x_s), s < t: 1 - alpha_bar_t / alpha_bar_s, which is beta_t where s = t - 1."""
    return 1 - schedule.alpha_bar[t] / schedule.alpha_bar[s]


def target(schedule: NoiseSchedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """What the network learns to predict: the noise, x0, or v = alpha noise - sigma x0 (2202.00512, appendix D)."""
    if schedule.prediction == "v":
        return schedule.at("alpha", t) * noise - schedule.at("sigma", t) * x0
    return {"noise": noise, "x0": x0}[schedule.prediction]


def predicted_x0(schedule: NoiseSchedule, prediction: Tensor, x_t: Tensor, t: int) -> Tensor:
    """x0_hat that follows from a prediction at x_t: the inverse of `target` at one timestep, unclipped."""
    alpha, sigma = schedule.alpha[t].item(), schedule.sigma[t].item()
    if schedule.prediction == "noise":
        return (x_t - sigma * prediction) / alpha
    if schedule.prediction == "x0":
        return prediction
    return alpha * x_t - sigma * prediction


def diffusion_loss(network: Network, schedule: NoiseSchedule, x0: Tensor, labels: Tensor, t: Tensor,
                   noise: Tensor, clip: bool = False) -> Tensor:
    """Weighted mean squared error of each image's prediction -> [B], float32 (2006.11239, eq. 14).

    x0, noise [B, 1, H, W]; t, labels int64 [B]. With clip, a pixel that is exactly -1 or 1 adds no loss where its
    predicted x0 lies beyond it, since the denoiser clips x0_hat. The best prediction within [-1, 1] stays the mean.
    """
    prediction = network(add_noise(schedule, x0, t, noise), t, labels).float()
    error = prediction - target(schedule, x0, t, noise)
    if clip:
        outwards = x0 if schedule.prediction == "x0" else -x0  # a larger noise or v stands for a smaller x0
        error = error.masked_fill((outwards * error > 0) & (x0.abs() >= 1), 0)
    return schedule.at("loss_weights", t).flatten() * error.square().flatten(1).mean(1)


def stratified_timesteps(timesteps: int, batch_size: int, offset: Tensor, share: float = 0.0,
                         focus: tuple[int, int] = (0, 0)) -> Tensor:
    """t int64 [B] in 1..T from one random offset [1] in [0, 1): a share < 1 in low < t <= high, the rest in 1..T.

    Both parts are evenly spaced, so that each batch covers all noise levels (2107.00630, appendix I.1). With a uniform
    offset, t of an image picked at random is uniform within its part.
    """
    u = (torch.arange(batch_size, device=offset.device) + offset) / batch_size
    low, high = focus
    t = torch.where(u < share, low + (high - low) * u / share, timesteps * (u - share) / (1 - share))
    return t.long().clamp(max=timesteps - 1) + 1


def make_denoiser(network: Network, schedule: NoiseSchedule, labels: Tensor, guidance: float = 1.0,
                  interval: tuple[float, float] | None = None) -> Denoiser:
    """denoise(x [B, 1, H, W], t int) -> x0_hat like x, in [-1, 1] and in the dtype of x, for labels int64 [B].

    Classifier-free guidance (arXiv 2207.12598, eq. 6, whose w is guidance - 1) evaluates the network with and without
    labels, in one batch of 2B. It acts where alpha_bar_t lies in the interval (2404.07724), None: everywhere.
    denoise raises UserError for t that is not in 1..T.
    """
    low, high = interval or (0.0, 1.0)
    both_labels = torch.cat([labels, torch.full_like(labels, NO_LABEL)])

    def denoise(x: Tensor, t: int) -> Tensor:
        if not 1 <= t <= schedule.timesteps:
            raise UserError(f"t = {t}: the network was trained on t from 1 to {schedule.timesteps}")
        x_in = x.float()
        times = torch.full((len(x),), t, device=x.device)
        if guidance == 1 or not low <= schedule.alpha_bar[t] <= high:
            prediction = network(x_in, times, labels).to(x.dtype)
        else:
            predictions = network(x_in.repeat(2, 1, 1, 1), times.repeat(2), both_labels)
            labelled, unconditional = predictions.to(x.dtype).chunk(2)
            prediction = unconditional + guidance * (labelled - unconditional)
        return predicted_x0(schedule, prediction, x, t).clamp(-1, 1)

    return denoise
