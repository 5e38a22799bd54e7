"""The variational bound of the discrete process in bits per dimension, on 8-bit images of 28x28 pixels, unpadded."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import NO_LABEL
from dataset import Digits
from diffusion import Denoiser, NoiseSchedule, make_denoiser
from drawing import Trained
from support.runtime import Runtime, generator, to_unit

BOUND_STREAM, DECODER_STREAM = 5, 6  # of random numbers; see train.py and drawing.py for the others
BOUND_IMAGES = 2000  # test images in the bound, from all over the set, whose first half is the easier one
CALIBRATION_IMAGES = 1000  # training images on which the reverse process's variances are chosen
# Edges between kinds of x0_hat, of which each has an uncertainty of its own: a pixel predicted black is nearly certain.
KINDS = torch.tensor([-0.999, -0.99, -0.97, -0.9, -0.5, 0, 0.5, 0.9, 0.97, 0.99, 0.999], dtype=torch.float64)
FEWEST_PIXELS = 200  # of a kind, below which its error is not to be trusted


@dataclass(frozen=True)
class Likelihood:
    """An upper bound on the negative log-likelihood and its three parts, all in bits per dimension (pixel)."""

    bits_per_dim: float
    standard_error: float  # of bits_per_dim: over images, timesteps and noise
    L_T: float  # KL(q(x_T | x_0) || N(0, I)), exact
    L_kl: float  # sum over t = 2..T of KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))
    L_0: float  # -log p(x_0 | x_1), exact for 256 levels
    decoder_std: list[float]  # of p(x_0 | x_1), pixels in [-1, 1], for each kind of x0_hat
    by_timestep: dict[int, float]  # t -> its KL term, for every t that was drawn


@dataclass(frozen=True)
class Uncertainty:
    """How far x0 lies from x0_hat, as found on training images, for each of the KINDS of x0_hat.

    It gives each pixel of the reverse process the variance that is best for the bound (arXiv 2201.06503, theorem 1; for
    each pixel, 2206.07309): the posterior's, plus that of the posterior's mean through x0.
    """

    timesteps: Tensor  # float64 [K], ascending
    error: Tensor  # float64 [K, kinds]: mean squared error over that of the noise, which changes little with t
    decoder_std: Tensor  # float64 [kinds]: standard deviation of p(x_0 | x_1)

    def variance(self, x0_hat: Tensor, t: int, schedule: NoiseSchedule) -> Tensor:
        """Variance of x0 about x0_hat [...] at t, float64 like x0_hat; between timesteps, linear in log t."""
        knots = self.timesteps.log().numpy()
        error = torch.from_numpy(np.array([np.interp(math.log(t), knots, kind) for kind in self.error.T.numpy()]))
        return (error * (1 - schedule.alpha_bar[t]))[kind_of(x0_hat)]


def kind_of(x0_hat: Tensor) -> Tensor:
    """Number of the kind, int64 [...]."""
    return torch.bucketize(x0_hat.double(), KINDS)


def discretised_log_likelihood(images: Tensor, mean: Tensor, std: float | Tensor) -> Tensor:
    """Log-probability of each pixel in nats, float64, under N(mean, std^2) cut into 256 levels (2006.11239, eq. 13).

    images uint8 [...], mean [...] in [-1, 1], std one number or like mean. The outermost bins are open, so the 256
    probabilities sum to one.
    """
    level, mean = images.double(), mean.double()
    lower = torch.where(images == 0, -math.inf, ((level - 0.5) / 127.5 - 1 - mean) / std)
    upper = torch.where(images == 255, math.inf, ((level + 0.5) / 127.5 - 1 - mean) / std)
    # Mirrored into the lower tail, where log Phi keeps its digits.
    mirrored = lower > 0
    lower, upper = torch.where(mirrored, -upper, lower), torch.where(mirrored, -lower, upper)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return log_upper + (-torch.expm1(log_lower - log_upper)).log()  # log(Phi(upper) - Phi(lower))


def prior_term(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) of each image x0 [B, ...] -> float64 [B], nats (2006.11239, eq. 5)."""
    signal = schedule.alpha_bar[-1].item()
    return 0.5 * (signal * x0.double().square() - signal - math.log1p(-signal)).flatten(1).sum(dim=1)


def timestep_proposal(schedule: NoiseSchedule) -> Tensor:
    """Probabilities float64 [T-1] of drawing t = 2..T: in proportion to the KL terms that data N(0, I) would have.

    With their mean squared error 1 / (1 + SNR) these are steps of log(1 + SNR) = -log(1 - alpha_bar).
    """
    steps = (1 - schedule.alpha_bar[1:]).log().diff()
    return steps / steps.sum()


def kl_terms(denoise: Denoiser, schedule: NoiseSchedule, x0: Tensor, uncertainty: Uncertainty, strata: int,
             random: torch.Generator) -> tuple[Tensor, dict[int, Tensor]]:
    """Unbiased estimate of the sum of KL terms of each image x0 [B, ...] -> float64 [B], nats; and t -> that term [B].

    KL(q(x_s | x_t, x_0) || p(x_s | x_t)) = D / 2 |x_0 - x0_hat|^2 with s = t - 1 and D = SNR(s) - SNR(t), where p has
    the posterior's variance (2006.11239, eq. 5 and 8; 2107.00630, eq. 13). With an uncertainty u^2 of x0, p's variance
    is 1 + D u^2 times that, and each pixel's term is ((1 + D error^2) / (1 + D u^2) - 1 + log(1 + D u^2)) / 2. One t is
    drawn in each of the strata, of equal probability under `timestep_proposal` (importance sampling, 2102.09672, 3.3).
    """
    total = torch.zeros(len(x0), dtype=torch.float64)
    terms: dict[int, Tensor] = {}
    proposal = timestep_proposal(schedule)
    offset = torch.rand(strata, generator=random, dtype=torch.float64)
    drawn = torch.searchsorted(proposal.cumsum(0), (torch.arange(strata) + offset) / strata)  # [strata]
    for index in drawn.clamp(max=len(proposal) - 1).tolist():
        t = index + 2
        x0_hat = estimate_x0(denoise, schedule, x0, t, random).double()
        gain = schedule.snr[t - 1] - schedule.snr[t]
        widened = gain * uncertainty.variance(x0_hat, t, schedule)
        pixels = (gain * (x0.double() - x0_hat).square() - widened) / (1 + widened) + widened.log1p()
        terms[t] = 0.5 * pixels.flatten(1).sum(dim=1)
        total += terms[t] / (proposal[index] * strata)
    return total, terms


def bits_per_dim(denoise: Denoiser, schedule: NoiseSchedule, images: Tensor, uncertainty: Uncertainty,
                 strata: int = 10, batch: int = 100, seed: int = 0) -> Likelihood:
    """Variational bound on uint8 images [N, 1, 28, 28] (2006.11239, eq. 5): strata + 1 network evaluations per image.

    All on the CPU, as denoise(x_t [batch, 1, 28, 28], t) -> x0_hat has to be. The standard error comes from the scatter
    of batches, each with its own timesteps; of a single one it is not a number.
    """
    parts = []
    by_timestep: dict[int, list[Tensor]] = {}
    for number, chunk in enumerate(tqdm(images.split(batch), desc="bound", leave=False)):
        x0, random = to_unit(chunk), generator("cpu", seed, BOUND_STREAM, number)
        total, terms = kl_terms(denoise, schedule, x0, uncertainty, strata, random)
        decoded = estimate_x0(denoise, schedule, x0, 1, random)
        decoder = -discretised_log_likelihood(chunk, decoded, uncertainty.decoder_std[kind_of(decoded)])
        parts.append(torch.stack([prior_term(schedule, x0), total, decoder.flatten(1).sum(dim=1)]))  # [3, B]
        for t, term in terms.items():
            by_timestep.setdefault(t, []).append(term.mean())

    bits = 1 / (math.log(2) * images[0].numel())
    prior, kl, decoder = (torch.cat(parts, dim=1).mean(dim=1) * bits).tolist()
    means = torch.stack([part.sum(dim=0).mean() for part in parts]) * bits  # [batches]
    error = (means.var(correction=0) / (len(parts) - 1)).sqrt().item()
    return Likelihood(prior + kl + decoder, error, prior, kl, decoder, uncertainty.decoder_std.tolist(),
                      {t: torch.stack(found).mean().item() * bits for t, found in sorted(by_timestep.items())})


def calibrate(denoise: Denoiser, schedule: NoiseSchedule, images: Tensor, batch: int = 100) -> Uncertainty:
    """The uncertainty that suits the bound on uint8 images [N, 1, 28, 28], which have to be training images.

    About 20 network evaluations per image; 1,000 images are plenty. Kinds of x0_hat that hardly occur get the mean.
    """
    timesteps = torch.logspace(0, math.log10(schedule.timesteps), 21, dtype=torch.float64).round().unique()
    x0, errors = to_unit(images), []
    for t in tqdm(timesteps.int().tolist(), desc="calibrate", leave=False):
        x0_hat = torch.cat([estimate_x0(denoise, schedule, chunk, t, generator("cpu", 0, DECODER_STREAM, t, number))
                            for number, chunk in enumerate(x0.split(batch))])
        kinds, squares = kind_of(x0_hat), (x0 - x0_hat).double().square()
        counts = torch.bincount(kinds.flatten(), minlength=len(KINDS) + 1)
        means = torch.bincount(kinds.flatten(), squares.flatten(), len(KINDS) + 1) / counts
        errors.append(torch.where(counts >= FEWEST_PIXELS, means, squares.mean()) / (1 - schedule.alpha_bar[t]))
        if t == 1:
            groups = [kinds == k if counts[k] >= FEWEST_PIXELS else kinds >= 0 for k in range(len(KINDS) + 1)]
            std = [_best_std(images[group], x0_hat[group]) for group in groups]
    return Uncertainty(timesteps, torch.stack(errors), torch.tensor(std, dtype=torch.float64))


def _best_std(images: Tensor, mean: Tensor) -> float:
    """The standard deviation under which uint8 pixels are likeliest: on a grid in its logarithm, then on finer ones."""
    def cost(log_std: float) -> float:
        return -discretised_log_likelihood(images, mean, math.exp(log_std)).mean().item()

    best = math.log(1e-2)
    # At first 0.9 to 8e-4, a tenth of a level; where all are as good, the largest.
    for step, places in ((1 / 2, range(9, -6, -1)), (1 / 16, range(8, -9, -1)), (1 / 128, range(8, -9, -1))):
        best = min([best + step * i for i in places], key=cost)
    return math.exp(best)


def estimate_x0(denoise: Denoiser, schedule: NoiseSchedule, x0: Tensor, t: int, random: torch.Generator) -> Tensor:
    """x0_hat at a draw of x_t from x0 [B, ...] -> like x0."""
    noise = torch.randn(x0.shape, generator=random)
    return denoise(schedule.alpha[t].item() * x0 + schedule.sigma[t].item() * noise, t)


def bound(trained: Trained, train: Digits, test: Digits, runtime: Runtime) -> Likelihood:
    """The bound without labels, as published values are; its variances are calibrated on training images."""
    def denoise(x: Tensor, t: int) -> Tensor:
        unlabelled = torch.full((len(x),), NO_LABEL, device=runtime.device)
        with torch.inference_mode(), runtime.autocast():
            return make_denoiser(trained.network, trained.schedule, unlabelled)(x.to(runtime.device), t).cpu()

    uncertainty = calibrate(denoise, trained.schedule, train.images[:CALIBRATION_IMAGES].cpu())
    return bits_per_dim(denoise, trained.schedule, bound_images(test).cpu(), uncertainty)


def bound_images(test: Digits) -> Tensor:
    """At most BOUND_IMAGES, evenly spread over the test set."""
    return test.images[::math.ceil(len(test) / BOUND_IMAGES)]
