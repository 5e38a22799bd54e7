"""The measures themselves, as functions of tensors: digit and texture features, Fréchet distance, precision and
recall, nearest neighbours, class statistics, and the variational bound in bits per dimension.

Owns the extractor, a small digit classifier whose penultimate layer is the feature space, and reads its one file.
Knows no other file and no config. Images are uint8 [N, 1, 28, 28]; statistics are taken in float64 on the CPU.
"""

import hashlib
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from config import UserError
from diffusion import Denoiser, NoiseSchedule, posterior
from runtime import generator, to_unit

EXTRACTOR = Path(__file__).resolve().parent / "checkpoints" / "extractor.pt"
BOUND_STREAM, DECODER_STREAM = 5, 6  # of random numbers; train.py and sample.py own 1 to 4


# The extractor


class Extractor(nn.Module):
    """forward(x [B, 1, 28, 28] in [-1, 1]) -> (features [B, 64], logits [B, 10]); see benchmarks/train_extractor.py.

    A loaded one also has `digest`, 16 hex digits that name its weights, and `meta`, how they were made.
    """

    digest: str = ""
    meta: dict[str, Any] = {}

    def __init__(self) -> None:
        super().__init__()

        def convolution(channels_in: int, channels: int) -> list[nn.Module]:
            conv = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(channels), nn.ReLU()]

        self.body = nn.Sequential(
            *convolution(1, 16), *convolution(16, 16), nn.MaxPool2d(2),  # [B, 16, 14, 14]
            *convolution(16, 48), *convolution(48, 48), nn.MaxPool2d(2),  # [B, 48, 7, 7]
            *convolution(48, 96), *convolution(96, 96), nn.MaxPool2d(2),  # [B, 96, 3, 3]
            nn.Flatten(), nn.Linear(864, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(),  # [B, 64]
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return features, self.head(features)


def digest_of(state: dict[str, Tensor]) -> str:
    """First 16 hex digits of the SHA-256 over names, shapes and values of all tensors."""
    sha = hashlib.sha256()
    for name in sorted(state):
        sha.update(f"{name} {state[name].dtype} {tuple(state[name].shape)}".encode())
        sha.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def load_extractor(path: Path = EXTRACTOR) -> Extractor:
    """The extractor in eval mode on the CPU; raises UserError where its file is missing, damaged or of another make."""
    advice = "restore it from the repository, or train it again with benchmarks/train_extractor.py"
    if not Path(path).is_file():
        raise UserError(f"{path}: the classifier that measures digits is missing; {advice}")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        extractor = Extractor()
        extractor.load_state_dict(stored["state"])
        digest, meta = str(stored["digest"]), dict(stored["meta"])
    except (OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, pickle.UnpicklingError):
        raise UserError(f"{path}: the classifier that measures digits can't be read; {advice}") from None
    if digest_of(extractor.state_dict()) != digest:
        raise UserError(f"{path}: the weights don't match their digest {digest}, so the file is damaged; {advice}")
    extractor.digest, extractor.meta = digest, meta
    return extractor.to(memory_format=torch.channels_last).eval().requires_grad_(False)


@dataclass(frozen=True)
class Features:
    """What the extractor says of N images, on the CPU."""

    features: Tensor  # float32 [N, 64]
    probabilities: Tensor  # float32 [N, 10]


@torch.no_grad()
def extract(extractor: Extractor, images: Tensor, batch: int = 500, device: torch.device | str = "cpu") -> Features:
    """Features and class probabilities of uint8 images [N, 1, 28, 28]; moves the extractor to the device."""
    extractor = extractor.to(device).eval()
    features, probabilities = [], []
    for chunk in images.split(batch):
        x = to_unit(chunk.to(device)).to(memory_format=torch.channels_last)
        found, logits = extractor(x)
        features.append(found.cpu())
        probabilities.append(logits.softmax(dim=1).cpu())
    return Features(torch.cat(features), torch.cat(probabilities))


# Fréchet distance


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of features [N, D], float64; raises UserError below two of them."""
    if len(features) < 2:
        raise UserError(f"{len(features)} images: a covariance needs at least 2; draw more with --num-images")
    features = features.double().cpu()
    return features.mean(dim=0), features.T.cov()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians fitted to features a [N, D] and b [M, D] (arXiv 1706.08500, eq. 6).

    It is biased upwards by about 1/N, so only distances at equal N and M compare.
    """
    return frechet_from_moments(*moments(a), *moments(b))


def frechet_from_moments(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)) of float64 moments, singular ones too."""

    def factor(cov: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(cov)
        return vectors * values.clamp(min=0).sqrt()  # cov = factor @ factor.T

    # The eigenvalues of cov_a cov_b are the squared singular values of factor_a.T factor_b, none of them negative.
    cross = torch.linalg.svdvals(factor(cov_a).T @ factor(cov_b)).sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, distance.item())


# Texture: what digit features do not see


def texture_filters() -> Tensor:
    """The eight 3x3 cosine (DCT-II) filters without a mean, orthonormal: [8, 1, 3, 3]."""
    waves = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]])
    waves /= waves.norm(dim=1, keepdim=True)
    return torch.einsum("ik,jl->ijkl", waves, waves).reshape(9, 1, 3, 3)[1:]


@torch.no_grad()
def texture_features(images: Tensor, batch: int = 1000) -> Tensor:
    """Local contrast of uint8 images at two scales -> float32 [N, 32]; blind to where on the image it is.

    Responses r of fixed zero-mean filters to pixels in grey levels, taken as log(1 + |r|), which lifts what is faint;
    their mean and mean square over the image. Grain on the background, blur and lost contrast all move them. The
    filters are fixed rather than random, so that figures compare across machines and versions.
    """
    filters, found = texture_filters(), []
    for chunk in images.cpu().split(batch):
        pooled = []
        for dilation in (1, 2):
            strength = F.conv2d(chunk.float(), filters, dilation=dilation).abs().log1p()  # [B, 8, 26, 26], [.., 24, 24]
            pooled += [strength.mean(dim=(2, 3)), strength.square().mean(dim=(2, 3))]  # each [B, 8]
        found.append(torch.cat(pooled, dim=1))
    return torch.cat(found)


def zero_share(images: Tensor) -> float:
    """Share of all pixels that are exactly 0; about 0.81 in MNIST."""
    return (images == 0).double().mean().item()


# Precision, recall, coverage


class Overlap(NamedTuple):
    """How two sets of features overlap; every share is 1 at best, and density about 1 for two sets of one source."""

    precision: float  # share of fakes within some real ball
    recall: float  # share of reals within some fake ball
    density: float  # real balls around each fake, over k
    coverage: float  # share of real balls that hold a fake


def precision_recall_coverage(real: Tensor, fake: Tensor, k: int = 5, block: int = 1000) -> Overlap:
    """Overlap of features real [N, D] and fake [M, D]: precision and recall of arXiv 1904.06991, eq. 1 and 2; density
    and coverage of 2002.09797, eq. 3 and 4.

    A ball reaches from a point to its k-th nearest neighbour in its own set. Raises UserError below k + 1 images.
    """
    if min(len(real), len(fake)) <= k:
        raise UserError(f"{min(len(real), len(fake))} images: precision and recall need more than {k}; "
                        "draw more with --num-images")
    real, fake = real.double().cpu(), fake.double().cpu()  # in float32, matrix products would blur small distances
    real_radius, fake_radius = _radius(real, k, block), _radius(fake, k, block)  # [N], [M]
    balls, in_real = 0, 0
    in_fake, covered = torch.zeros(len(real), dtype=torch.bool), torch.zeros(len(real), dtype=torch.bool)
    for chunk, radius in zip(fake.split(block), fake_radius.split(block)):
        distance = torch.cdist(chunk, real)  # [B, N]
        inside = distance <= real_radius
        in_real += int(inside.any(dim=1).sum())
        balls += int(inside.sum())
        covered |= inside.any(dim=0)
        in_fake |= (distance <= radius[:, None]).any(dim=0)
    return Overlap(precision=in_real / len(fake), recall=in_fake.double().mean().item(),
                   density=balls / (k * len(fake)), coverage=covered.double().mean().item())


def _radius(points: Tensor, k: int, block: int) -> Tensor:
    """Distance of each of the points [N, D] to its k-th nearest other one -> [N]."""
    nearest = [torch.cdist(chunk, points).topk(k + 1, largest=False).values[:, k] for chunk in points.split(block)]
    return torch.cat(nearest)  # the nearest of all is the point itself


# Memorisation


@torch.no_grad()
def nearest(queries: Tensor, references: Tensor, block: int = 500) -> tuple[Tensor, Tensor]:
    """Distance float64 [N] of each of the queries [N, ...] to its nearest reference [M, ...], and its index int64 [N].

    The search runs on matrix products in float32, on the device of the references; the winner's distance is exact.
    """
    flat = references.flatten(1).float()  # [M, D]
    centre = flat.mean(dim=0)
    flat = flat - centre  # small numbers cancel less
    half_norm = flat.norm(dim=1).square() / 2  # [M]
    distances, indices = [], []
    for chunk in queries.split(block):
        shifted = chunk.flatten(1).to(flat) - centre
        index = torch.addmm(half_norm, shifted, flat.T, alpha=-1).argmin(dim=1).to(references.device)  # [B]
        found = references[index].flatten(1).cpu().double()
        distances.append((chunk.flatten(1).cpu().double() - found).norm(dim=1))
        indices.append(index.cpu())
    return torch.cat(distances), torch.cat(indices)


def memorisation(generated: Tensor, test: Tensor) -> dict[str, float]:
    """Compares distances [N] of generated images to their nearest training image with those [M] of unseen test images.

    A model that copies draws nearer to its training set than unseen digits lie: a ratio of medians well below 1, and
    a share closer than the test set's 1% quantile well above 0.01.
    """
    generated, test = generated.double().cpu(), test.double().cpu()
    median, expected = generated.median().item(), test.median().item()
    return {"median": median, "test_median": expected, "ratio": median / expected if expected > 0 else math.inf,
            "share_closer": (generated < test.quantile(0.01)).double().mean().item()}


# What the classifier says


def sure_share(probabilities: Tensor, threshold: float = 0.9) -> float:
    """Share of the images whose likeliest class has a probability above the threshold; probabilities [N, 10]."""
    return (probabilities.amax(dim=1) > threshold).double().mean().item()


def drawn_as_asked(probabilities: Tensor, labels: Tensor) -> float:
    """Share of the images whose likeliest class is the label asked for; probabilities [N, 10], labels int64 [N]."""
    return (probabilities.argmax(dim=1) == labels.to(probabilities.device)).double().mean().item()


def class_histogram(probabilities: Tensor) -> Tensor:
    """Number of images of each likeliest class, int64 [10]."""
    return torch.bincount(probabilities.argmax(dim=1), minlength=probabilities.shape[1])


def chi_square(counts: Tensor, expected: Tensor) -> tuple[float, float]:
    """Pearson's statistic and its p-value for counts [K] against expected counts [K] of the same total."""
    counts, expected = counts.double(), expected.double()
    statistic = ((counts - expected).square() / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return statistic.item(), torch.special.gammaincc(freedom, statistic / 2).item()


# Likelihood: the variational bound of the discrete process, on 8-bit images of 28x28 pixels, unpadded


# Edges between kinds of x0_hat, of which each has an uncertainty of its own: a pixel predicted black is nearly certain.
KINDS = (-0.999, -0.99, -0.97, -0.9, -0.5, 0.0, 0.5, 0.9, 0.97, 0.99, 0.999)
FEWEST_PIXELS = 200  # of a kind, below which its error is not to be trusted


@dataclass(frozen=True)
class Likelihood:
    """An upper bound on the negative log-likelihood and its three parts, all in bits per dimension (pixel)."""

    bits_per_dim: float
    standard_error: float  # of bits_per_dim: over images, timesteps and noise
    L_T: float  # KL(q(x_T | x_0) || N(0, I)), exact
    L_kl: float  # sum over t = 2..T of KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))
    L_0: float  # -log p(x_0 | x_1), exact for 256 levels
    decoder_std: float | list[float]  # standard deviation of p(x_0 | x_1), pixels in [-1, 1]; a list: for each kind of x0_hat
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
        """Variance of x0 about x0_hat [...] at a noise level, float64 like x0_hat; between timesteps, linear in log t."""
        place = torch.tensor(float(t), dtype=torch.float64).log()
        knots = self.timesteps.log()
        upper = int(torch.searchsorted(knots, place).clamp(1, len(knots) - 1))
        share = ((place - knots[upper - 1]) / (knots[upper] - knots[upper - 1])).clamp(0, 1)
        return (torch.lerp(self.error[upper - 1], self.error[upper], share) * (1 - schedule.alpha_bar[t]))[kind_of(x0_hat)]


def kind_of(x0_hat: Tensor) -> Tensor:
    """Index into KINDS, int64 [...], on the CPU."""
    return torch.bucketize(x0_hat.cpu().double(), torch.tensor(KINDS, dtype=torch.float64))


def discretised_log_likelihood(images: Tensor, mean: Tensor, std: float | Tensor) -> Tensor:
    """Log-probability of each pixel in nats, float64, under N(mean, std^2) cut into 256 levels (2006.11239, eq. 13).

    images uint8 [...], mean [...] in [-1, 1], std one number or like mean. The outermost bins are open, so the 256
    probabilities sum to one.
    """
    level, mean = images.double(), mean.to(images.device).double()
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
    return 0.5 * (signal * x0.double().cpu().square() - signal - math.log1p(-signal)).flatten(1).sum(dim=1)


def timestep_proposal(schedule: NoiseSchedule) -> Tensor:
    """Probabilities float64 [T-1] of drawing t = 2..T: in proportion to the KL terms that data N(0, I) would have.

    With their mean squared error 1 / (1 + SNR) these are steps of log(1 + SNR) = -log(1 - alpha_bar). Any positive
    proposal leaves the estimate unbiased; this one keeps its error small.
    """
    steps = (1 - schedule.alpha_bar[1:]).log().diff()
    return steps / steps.sum()


def kl_terms(denoise: Denoiser, schedule: NoiseSchedule, x0: Tensor, strata: int,
             random: torch.Generator, uncertainty: Uncertainty | None = None) -> tuple[Tensor, dict[int, Tensor]]:
    """Unbiased estimate of the sum of KL terms of each image x0 [B, ...] -> float64 [B], nats; and t -> that term [B].

    KL(q(x_s | x_t, x_0) || p(x_s | x_t)) = D / 2 |x_0 - x0_hat|^2 with s = t - 1 and D = SNR(s) - SNR(t), where p has the
    posterior's variance (2006.11239, eq. 5 and 8; 2107.00630, eq. 13). With an uncertainty u^2 of x0, p's variance is
    1 + D u^2 times that, and each pixel's term is ((1 + D error^2) / (1 + D u^2) - 1 + log(1 + D u^2)) / 2. One t is drawn
    in each of the strata, which hold equal probability of `timestep_proposal` (importance sampling, 2102.09672, 3.3).
    """
    total = torch.zeros(len(x0), dtype=torch.float64)
    terms: dict[int, Tensor] = {}
    if schedule.timesteps < 2:
        return total, terms
    proposal = timestep_proposal(schedule)
    offset = torch.rand(strata, generator=random, dtype=torch.float64)
    drawn = torch.searchsorted(proposal.cumsum(0), (torch.arange(strata) + offset) / strata)  # [strata]
    for index in drawn.clamp(max=len(proposal) - 1).tolist():
        t = index + 2
        x0_hat = estimate_x0(denoise, schedule, x0, t, random).double()
        gain = schedule.snr[t - 1] - schedule.snr[t]
        pixels = gain * (x0.cpu().double() - x0_hat).square()
        if uncertainty is not None:
            widened = gain * uncertainty.variance(x0_hat, t, schedule)
            pixels = (pixels - widened) / (1 + widened) + widened.log1p()
        terms[t] = 0.5 * pixels.flatten(1).sum(dim=1)
        total += terms[t] / (proposal[index] * strata)
    return total, terms


@torch.no_grad()
def bits_per_dim(denoise: Denoiser, schedule: NoiseSchedule, images: Tensor, strata: int = 10, batch: int = 100,
                 decoder_std: float | None = None, seed: int = 0, device: torch.device | str = "cpu",
                 progress: bool = False, uncertainty: Uncertainty | None = None) -> Likelihood:
    """Variational bound on uint8 images [N, 1, 28, 28] (2006.11239, eq. 5): strata + 1 network evaluations per image.

    denoise(x_t [batch, 1, 28, 28], t) -> x0_hat is always given whole batches, the last one padded. The reverse process
    has the variances that `uncertainty` gives it; unset, the posterior's, and in p(x_0 | x_1), where that is zero, the
    standard deviation `decoder_std`, or else that of the posterior's step 2 -> 1. The standard error comes from the
    scatter of batches, each with its own timesteps; it takes at least two.
    """
    decoder_std = default_decoder_std(schedule) if decoder_std is None else decoder_std
    sizes, parts = [], []
    by_timestep: dict[int, list[Tensor]] = {}
    for number, chunk in enumerate(tqdm(images.split(batch), desc="bound", leave=False, disable=not progress)):
        size, random = len(chunk), generator("cpu", seed, BOUND_STREAM, number)
        x0 = _padded(to_unit(chunk), batch).to(device)
        total, terms = kl_terms(denoise, schedule, x0, strata, random, uncertainty)
        decoded = estimate_x0(denoise, schedule, x0, 1, random)[:size]
        std = uncertainty.decoder_std[kind_of(decoded)] if uncertainty is not None else decoder_std
        decoder = -discretised_log_likelihood(chunk.cpu(), decoded, std).flatten(1).sum(dim=1)
        parts.append(torch.stack([prior_term(schedule, x0)[:size], total[:size], decoder]).mean(dim=1))  # [3]
        sizes.append(size)
        for t, term in terms.items():
            by_timestep.setdefault(t, []).append(term[:size].mean())

    bits = 1 / (math.log(2) * images[0].numel())
    weight = torch.tensor(sizes, dtype=torch.float64) / len(images)  # [batches]
    means = torch.stack(parts) * bits  # [batches, 3]
    prior, kl, decoder = (weight @ means).tolist()
    scatter = (weight * (means.sum(dim=1) - prior - kl - decoder)).square().sum()
    error = (scatter * len(sizes) / (len(sizes) - 1)).sqrt().item() if len(sizes) > 1 else math.nan
    return Likelihood(prior + kl + decoder, error, prior, kl, decoder,
                      uncertainty.decoder_std.tolist() if uncertainty is not None else decoder_std,
                      {t: torch.stack(found).mean().item() * bits for t, found in sorted(by_timestep.items())})


def default_decoder_std(schedule: NoiseSchedule) -> float:
    """Standard deviation of the posterior's step 2 -> 1; the last step, 1 -> 0, has none."""
    nothing = torch.zeros(())
    return math.sqrt(posterior(schedule, nothing, nothing, 2, 1)[1])


@torch.no_grad()
def calibrate(denoise: Denoiser, schedule: NoiseSchedule, images: Tensor, batch: int = 100, seed: int = 0,
              device: torch.device | str = "cpu", progress: bool = False) -> Uncertainty:
    """The uncertainty that suits the bound on uint8 images [N, 1, 28, 28], which have to be training images.

    About 20 network evaluations per image; 1,000 images are plenty. Kinds of x0_hat that hardly occur get the mean.
    """
    timesteps = sorted({round(t) for t in torch.logspace(0, math.log10(schedule.timesteps), 21, dtype=torch.float64).tolist()})
    images = images.cpu()
    x0, errors, std = to_unit(images), [], []
    for t in tqdm(timesteps, desc="calibrate", leave=False, disable=not progress):
        parts = [estimate_x0(denoise, schedule, _padded(chunk, batch).to(device), t, generator("cpu", seed, DECODER_STREAM, t, number))
                 [:len(chunk)] for number, chunk in enumerate(x0.split(batch))]
        x0_hat = torch.cat(parts)
        squares, kinds = (x0 - x0_hat).double().square().flatten(), kind_of(x0_hat).flatten()
        counts = torch.bincount(kinds, minlength=len(KINDS) + 1)
        means = torch.bincount(kinds, squares, len(KINDS) + 1) / counts.clamp(min=1)
        errors.append(torch.where(counts >= FEWEST_PIXELS, means, squares.mean()) / (1 - schedule.alpha_bar[t]))
        if t == 1:
            overall = _best_std(images, x0_hat)
            of_kind = [kinds.view_as(x0_hat) == kind for kind in range(len(KINDS) + 1)]
            std = [_best_std(images[of], x0_hat[of]) if of.sum() >= FEWEST_PIXELS else overall for of in of_kind]
    return Uncertainty(torch.tensor(timesteps, dtype=torch.float64), torch.stack(errors), torch.tensor(std, dtype=torch.float64))


def _best_std(images: Tensor, mean: Tensor) -> float:
    """The standard deviation under which uint8 pixels are likeliest: on a grid in its logarithm, then on finer ones."""
    def cost(log_std: float) -> float:
        return -discretised_log_likelihood(images, mean, math.exp(log_std)).mean().item()

    best, step = math.log(1e-2), 0.5
    grid = [best + step * i for i in range(9, -6, -1)]  # 0.9 to 8e-4, a tenth of a level; where all do, the largest
    for _ in range(3):
        best = min(grid, key=cost)
        grid = [best + step * i / 8 for i in range(8, -9, -1)]
        step /= 8
    return math.exp(best)


def estimate_x0(denoise: Denoiser, schedule: NoiseSchedule, x0: Tensor, t: int, random: torch.Generator) -> Tensor:
    """x0_hat at a draw of x_t from x0 [B, ...] -> like x0, on the CPU."""
    noise = torch.randn(x0.shape, generator=random).to(x0)
    return denoise(schedule.alpha[t].item() * x0 + schedule.sigma[t].item() * noise, t).cpu()


def _padded(x: Tensor, size: int) -> Tensor:
    """x [B, ...] with its first image repeated up to `size`."""
    return torch.cat([x, x[:1].expand(size - len(x), *x.shape[1:])])
