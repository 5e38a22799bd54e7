"""Metrics as functions of tensors: Fréchet distance, texture features, precision and recall, nearest neighbours.

Images are uint8 [N, 1, 28, 28]; statistics are computed in float64 on the CPU.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import CLASSES


@dataclass(frozen=True)
class Moments:
    """Sums over the images of each class, from which means and covariances follow; any leading dimensions [...]."""

    count: Tensor  # float64 [..., C]
    first: Tensor  # float64 [..., C, D]: sum of the features
    second: Tensor  # float64 [..., C, D, D]: sum of their products

    def __sub__(self, part: "Moments") -> "Moments":
        return Moments(self.count - part.count, self.first - part.first, self.second - part.second)

    def sum(self) -> "Moments":
        """Over the first dimension."""
        return Moments(self.count.sum(0), self.first.sum(0), self.second.sum(0))

    def of(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [..., K, D] and covariance [..., K, D, D] within each of these classes [K]."""
        return _gaussian(self.count[..., classes], self.first[..., classes, :], self.second[..., classes, :, :])

    def together(self, shares: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean [..., D] and covariance [..., D, D] of all classes, weighted to have these shares [C], if given."""
        weight = torch.ones_like(self.count)
        if shares is not None:
            weight = (shares / self.count).nan_to_num(0, 0, 0) * self.count.sum(-1, keepdim=True) / shares.sum()
        return _gaussian((weight * self.count).sum(-1), (weight[..., None] * self.first).sum(-2),
                         (weight[..., None, None] * self.second).sum(-3))


def class_moments(features: Tensor, labels: Tensor, block: Tensor) -> Moments:
    """Of features [N, D] by label [N], for each of the blocks, whose numbers [N] are given: [blocks, C, ...]."""
    blocks, group = int(block.max()) + 1, block * CLASSES + labels
    sizes = torch.bincount(group, minlength=blocks * CLASSES)
    parts = features.double()[group.argsort(stable=True)].split(sizes.tolist())
    first = torch.stack([part.sum(0) for part in parts])
    second = torch.stack([part.T @ part for part in parts])
    return Moments(*(sums.unflatten(0, (blocks, CLASSES)) for sums in (sizes.double(), first, second)))


def _gaussian(count: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    mean = first / count[..., None]
    covariance = second / count[..., None, None] - mean[..., :, None] * mean[..., None, :]
    return mean, covariance * (count / (count - 1))[..., None, None]


def frechet_from_moments(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> Tensor:
    """Squared Fréchet distance of Gaussians with these float64 moments, singular ones too: [...] (1706.08500, eq. 6).

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)). With moments of N samples it is biased upwards by
    about 1/N, so only distances at equal N compare.
    """
    values, vectors = torch.linalg.eigh(cov_b)
    root = vectors * values.clamp(min=0).sqrt()[..., None, :]  # cov_b = root @ root.mT
    # The eigenvalues of cov_a cov_b are those of root.mT cov_a root, which is symmetric, so none of them is negative.
    cross = torch.linalg.eigvalsh(root.mT @ cov_a @ root).clamp(min=0).sqrt().sum(-1)
    traces = cov_a.diagonal(dim1=-2, dim2=-1).sum(-1) + cov_b.diagonal(dim1=-2, dim2=-1).sum(-1)
    return ((mean_a - mean_b).square().sum(-1) + traces - 2 * cross).clamp(min=0)


def texture_filters() -> Tensor:
    """The eight 3x3 cosine (DCT-II) filters without a mean, orthonormal: [8, 1, 3, 3]."""
    waves = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]])
    waves /= waves.norm(dim=1, keepdim=True)
    return torch.einsum("ik,jl->ijkl", waves, waves).reshape(9, 1, 3, 3)[1:]


def texture_features(images: Tensor, batch: int = 1000) -> Tensor:
    """Local contrast of uint8 images at two scales -> float32 [N, 32]; independent of the position.

    Responses r of fixed zero-mean filters to pixels in grey levels, taken as log(1 + |r|), which lifts what is faint;
    their mean and mean square over the image. Grain on the background, blur and lost contrast all move them. The
    filters are fixed rather than random, so that figures compare across machines and versions.
    """
    filters, features = texture_filters(), []
    for chunk in images.cpu().split(batch):
        pooled = []
        for dilation in (1, 2):
            strength = F.conv2d(chunk.float(), filters, dilation=dilation).abs().log1p()  # [B, 8, 26, 26], [.., 24, 24]
            pooled += [strength.mean(dim=(2, 3)), strength.square().mean(dim=(2, 3))]  # each [B, 8]
        features.append(torch.cat(pooled, dim=1))
    return torch.cat(features)


def precision_recall_coverage(real: Tensor, real_radius: Tensor, fake: Tensor, fake_radius: Tensor,
                              block: int = 1000) -> tuple[float, float, float]:
    """Shares, 1 at best, of features real [N, D] and fake [M, D], a ball around each point having its `radius`.

    Precision: of fakes within some real ball; recall: of reals within some fake ball (arXiv 1904.06991, eq. 1 and 2);
    coverage: of real balls that hold a fake (2002.09797, eq. 4).
    """
    real, fake = real.double(), fake.double()  # in float32, matrix products would blur small distances
    in_real = []
    in_fake, covered = torch.zeros(2, len(real), dtype=torch.bool)
    for chunk, reach in zip(fake.split(block), fake_radius.split(block)):
        distance = torch.cdist(chunk, real)  # [B, N]
        inside = distance <= real_radius
        in_real.append(inside.any(dim=1))
        covered |= inside.any(dim=0)
        in_fake |= (distance <= reach[:, None]).any(dim=0)
    precision, recall, coverage = (share.double().mean().item() for share in (torch.cat(in_real), in_fake, covered))
    return precision, recall, coverage


def radius(points: Tensor, k: int = 5, block: int = 1000) -> Tensor:
    """Distance of each of the points [N, D], which are more than k, to the k-th nearest of the others: float64 [N]."""
    points = points.double()
    nearest = [torch.cdist(chunk, points).topk(k + 1, largest=False).values[:, k] for chunk in points.split(block)]
    return torch.cat(nearest)  # the nearest of all is the point itself


def nearest(queries: Tensor, references: Tensor, block: int = 500) -> tuple[Tensor, Tensor]:
    """Distance float64 [N] of each of the queries [N, ...] to its nearest reference [M, ...], and its index int64 [N].

    The search uses matrix products in float32; the distances that are returned are exact.
    """
    flat = references.flatten(1).float()  # [M, D]
    centre = flat.mean(dim=0)
    flat = flat - centre  # small numbers cancel less
    half_norm = flat.norm(dim=1).square() / 2  # [M]
    indices = torch.cat([torch.addmm(half_norm, chunk.flatten(1) - centre, flat.T, alpha=-1).argmin(dim=1)
                         for chunk in queries.split(block)])
    differences = queries.flatten(1).double() - references[indices].flatten(1).double()
    return differences.norm(dim=1), indices


def share_closer(generated: Tensor, test: Tensor) -> float:
    """Share of distances [N] of generated images to their nearest training image below the 1% quantile of [M] test's.

    About 0.01 for images that are as new as the test set; well above it for copies of training images.
    """
    return (generated < test.quantile(0.01)).double().mean().item()
