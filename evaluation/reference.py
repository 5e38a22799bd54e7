"""The real images that sampled ones are compared with, the real-vs-real baseline, and all metrics with their errors.

Distances are to the training images. The baseline is the distance of real training images, with the same labels, from
the rest of them: no model can be expected to do better. Always read a value beside its baseline and error.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from config import Config, UserError
from dataset import CLASSES, MNIST_DIGEST, LabelledImages, describe
from evaluation import metrics
from evaluation.classifier import CONFIDENT, Classifier, dataset_classifier, extract, load_classifier
from evaluation.metrics import Moments
from evaluation.statistics import BLOCK, FEWEST_BLOCKS, MOST_BLOCKS, jackknife_error
from sample import choose_labels
from support.console import say
from support.randomness import BASELINE_STREAM, generator

FEWEST = 200  # real images (of a class, too), below which the covariance of 64 features says nothing
FEWEST_OF_CLASS = 100  # sampled ones, likewise
FEWEST_TEST = 50  # test images
SETS = 5  # of real images in the baseline, at most


class Metric(NamedTuple):
    """One row of every table."""

    key: str
    heading: str
    form: str  # of its numbers
    distance: bool = False  # lower is closer; all others are best at the baseline's value


METRICS = (
    Metric("class_frechet", "class-wise Fréchet", "{:.4f}", True), Metric("frechet", "Fréchet", "{:.4f}", True),
    Metric("texture", "texture", "{:.4f}", True), Metric("mean_intensity", "intensity", "{:.3f}"),
    Metric("precision", "precision", "{:.3f}"), Metric("recall", "recall", "{:.3f}"),
    Metric("coverage", "coverage", "{:.3f}"), Metric("confident", "confident", "{:.2%}"),
    Metric("label_accuracy", "label accuracy", "{:.2%}"), Metric("zeros", "zeros", "{:.2%}"))
DECIDING = "class_frechet"  # the one metric that decides a comparison
SHARES = ("confident", "label_accuracy", "zeros", "grey")  # means over images; each is the metric of its name
OVERLAP = ("precision", "recall", "coverage")
OF_LABELS = ("class_frechet", "label_accuracy")  # those that need labels
OF_CLASSIFIER = (*OF_LABELS, "frechet", "confident")  # and, with OVERLAP, a classifier


@dataclass(frozen=True)
class Estimate:
    """The value of one metric."""

    value: float
    error: float | None = None  # standard error; of a baseline, the standard deviation over its sets
    replicates: Tensor | None = None  # float64 [B]: the value without each jackknife block


Estimates = dict[str, Estimate]  # by the key of the metric


class Measurement(NamedTuple):
    """All that is measured of one set of images."""

    estimates: Estimates
    class_distances: dict[int, float]  # class -> Fréchet distance to the training images of this class
    class_counts: list[int]  # images of each class, as the classifier reads them


class Baseline(NamedTuple):
    """Disjoint sets of real images with given labels, each measured against the real images outside it."""

    labels: Tensor  # int64 [N]
    sets: list[Tensor]  # for each set the indices int64 [N] of its training images
    outside: list[dict[str, Moments]]  # for each set the moments of all training images outside it, by features
    estimates: Estimates  # means over the sets, and standard deviations
    class_distances: dict[int, float]

    def ratio(self, key: str, estimate: Estimate) -> tuple[float, float | None]:
        """A distance as a multiple of the baseline's, and its standard error, which includes the baseline's."""
        baseline = self.estimates[key]
        ratio = estimate.value / baseline.value
        if estimate.error is None:
            return ratio, None
        relative, relative_baseline = estimate.error / estimate.value, (baseline.error or 0.0) / baseline.value
        return ratio, ratio * math.hypot(relative, relative_baseline / math.sqrt(len(self.sets)))


def rows(estimates: Estimates, baseline: Baseline | None = None) -> dict[str, Any]:
    """What a report says of each metric; with a baseline, distances as multiples of it, too."""
    ratios = {metric.key: dict(zip(("ratio", "ratio_error"), baseline.ratio(metric.key, estimates[metric.key])))
              for metric in METRICS if baseline and metric.distance and metric.key in estimates}
    return {key: {"value": estimate.value, "error": estimate.error} | ratios.get(key, {})
            for key, estimate in estimates.items()}


class Reference:
    """The training and test images of a data set, with which N images sampled for given labels [N] are compared.

    Label 10 means that an image is sampled without one. Without a classifier, only the metrics that need none are
    measured. Raises UserError for too few real images.
    """

    def __init__(self, train: LabelledImages, test: LabelledImages, labels: Tensor,
                 classifier: Classifier | None) -> None:
        self.train, test, self.classifier = train.to("cpu"), test.to("cpu"), classifier
        if int(labels.max()) == CLASSES:
            labels = choose_labels(None, 0, range(len(labels)), self.train.labels.unique().tolist())
        class_counts = torch.minimum(*(torch.bincount(k, minlength=CLASSES) for k in (labels, test.labels))).tolist()
        class_indices = [(test.labels == k).nonzero().flatten() for k in range(CLASSES)]
        chosen = [indices[torch.arange(count) * len(indices) // max(1, count)]  # evenly spaced
                  for indices, count in zip(class_indices, class_counts)]
        self.test_subset = test[torch.cat(chosen).sort().values]
        if len(self.test_subset) < FEWEST_TEST:
            raise UserError(f"--digits: {len(self.test_subset)} test images of the classes that are sampled, and "
                            f"measuring takes at least {FEWEST_TEST}; ask for other classes, or add test images")
        self.features = self._features(self.train.images, self.train.labels)
        self.moments = self._moments(self.features, self.train.labels)
        grey, count = self.moments["shares"].first[0, :, SHARES.index("grey")], self.moments["shares"].count[0]
        self.mean_grey = grey / count.clamp(min=1)  # float64 [C]: of each class
        self.baseline = self._baseline(labels, overlap=classifier is not None)

    def measure(self, images: Tensor, labels: Tensor) -> Measurement:
        """All metrics of uint8 images [N, 1, 28, 28] sampled for labels [N] (10: none).

        N may be larger than the baseline's: such distances compare with each other, not with the baseline.
        """
        labelled = int(labels.max()) < CLASSES
        labels = labels if labelled else self.baseline.labels
        features = self._features(images, labels)
        measurement = self._measure_features(features, labels, self.baseline.outside, labelled=labelled)
        if self.classifier is not None:  # these depend on the number of images, so it is that of the baseline
            points = features["features"][:len(self.baseline.labels)]
            sampled = points, metrics.radius(points)
            for key, share in zip(OVERLAP, metrics.precision_recall_coverage(*self.manifolds[0], *sampled)):
                measurement.estimates[key] = Estimate(share, self.baseline.estimates[key].error)
        return measurement

    @cached_property
    def test_set(self) -> tuple[Measurement, Baseline]:
        """The test set, with as many images of each class as are asked for or exist, and the baseline for just these.

        Other people wrote it: no model that learns the training set can come closer to it than that.
        """
        labels = self.test_subset.labels
        same = torch.equal(labels.sort().values, self.baseline.labels.sort().values)
        baseline = self.baseline if same else self._baseline(labels, overlap=False)
        features = self._features(self.test_subset.images, labels)
        return self._measure_features(features, labels, baseline.outside), baseline

    def _baseline(self, labels: Tensor, *, overlap: bool) -> Baseline:
        sets = baseline_sets(self.train.labels, labels)
        set_features = [{key: values[indices] for key, values in self.features.items()} for indices in sets]
        set_moments = [self._moments(features, labels) for features in set_features]
        outside = [{key: (self.moments[key] - inside[key]).sum() for key in inside} for inside in set_moments]
        measurements = [self._measure_features(features, labels, [rest])
                        for features, rest in zip(set_features, outside)]
        values: dict[str, Any] = {key: [measurement.estimates[key].value for measurement in measurements]
                                  for key in measurements[0].estimates}
        if overlap:  # of each set with the next
            self.manifolds = [(features["features"], metrics.radius(features["features"])) for features in set_features]
            shares = [metrics.precision_recall_coverage(*real, *fake)
                      for real, fake in zip([*self.manifolds[1:], self.manifolds[0]], self.manifolds)]
            values |= zip(OVERLAP, zip(*shares))
        estimates = {key: Estimate(fmean(column), stdev(column)) for key, column in values.items()}
        class_distances = {k: fmean(measurement.class_distances[k] for measurement in measurements)
                           for k in measurements[0].class_distances}
        return Baseline(labels, sets, outside, estimates, class_distances)

    def _measure_features(self, features: dict[str, Tensor], labels: Tensor, references: list[dict[str, Moments]], *,
                          labelled: bool = True) -> Measurement:
        """All metrics that follow from features, as means over the references, with jackknife errors.

        labelled: whether the images were sampled for these labels.
        """
        missing = OF_CLASSIFIER if self.classifier is None else () if labelled else OF_LABELS
        counts = torch.bincount(labels, minlength=CLASSES).double()
        real_counts = torch.stack([reference["features"].count for reference in references]).amin(0)
        classes = ((counts >= FEWEST_OF_CLASS) & (real_counts >= FEWEST)).nonzero().flatten()
        blocks = min(MOST_BLOCKS, len(labels) // BLOCK)
        block_moments = self._moments(features, labels, max(1, blocks))
        moments = {key: parts.sum() for key, parts in block_moments.items()}
        values, distances = self._metrics_of_moments(moments, counts, classes, references)
        estimates = {key: Estimate(value.item()) for key, value in values.items()
                     if key not in missing and not value.isnan()}
        if blocks >= FEWEST_BLOCKS:
            without_block = {key: moments[key] - parts for key, parts in block_moments.items()}
            replicates, _ = self._metrics_of_moments(without_block, counts, classes, references)
            estimates = {key: Estimate(estimate.value, jackknife_error(replicates[key]), replicates[key])
                         for key, estimate in estimates.items()}
        class_counts = torch.bincount(features["probabilities"].argmax(1), minlength=CLASSES).tolist()
        return Measurement(estimates, {} if missing else dict(zip(classes.tolist(), distances.tolist())), class_counts)

    def _metrics_of_moments(self, moments: dict[str, Moments], counts: Tensor, classes: Tensor,
                            references: list[dict[str, Moments]]) -> tuple[dict[str, Tensor], Tensor]:
        """Metrics [...] from moments [...], and the distances [..., K] within these classes [K].

        The references are weighted to the class shares of the labels, so that no distance is due to those.
        """
        def distance(sampled: Any, real: list[Any]) -> Tensor:  # of means and covariances
            return torch.stack([metrics.frechet_from_moments(*sampled, *reference) for reference in real]).mean(0)

        values = {name: distance(moments[key].together(), [reference[key].together(counts) for reference in references])
                  for name, key in (("frechet", "features"), ("texture", "texture"))}
        within = distance(moments["features"].of(classes), [real["features"].of(classes) for real in references])
        count, shares = moments["shares"].count, dict(zip(SHARES, moments["shares"].together()[0].unbind(-1)))
        intensity = shares.pop("grey") / (count @ self.mean_grey / count.sum(-1))
        return values | shares | {"class_frechet": within.mean(-1), "mean_intensity": intensity}, within

    def _features(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What the metrics need of each image, by name: [N, ...]."""
        features, probabilities = torch.zeros(len(images), 1), torch.zeros(len(images), CLASSES)
        if self.classifier is not None:
            features, probabilities = extract(self.classifier, images)
        likeliest = probabilities.max(1)
        shares = {"confident": likeliest.values > CONFIDENT, "label_accuracy": likeliest.indices == labels,
                  "zeros": (images == 0).double().mean((1, 2, 3)), "grey": images.double().mean((1, 2, 3))}
        return {"features": features, "texture": metrics.texture_features(images), "probabilities": probabilities,
                "shares": torch.stack([shares[name].double() for name in SHARES], 1)}

    def _moments(self, features: dict[str, Tensor], labels: Tensor, blocks: int = 1) -> dict[str, Moments]:
        """By class, for each of so many blocks of images, in order: [blocks, ...]."""
        block = torch.arange(len(labels)) * blocks // len(labels)
        return {key: metrics.class_moments(features[key], labels, block) for key in ("features", "texture", "shares")}


def make_reference(config: Config, train: LabelledImages, test: LabelledImages, labels: Tensor) -> Reference:
    """The reference for these labels, with the classifier of the data set, which is trained first if there is none.

    Raises UserError where there are too few real images.
    """
    if int(labels.max()) < CLASSES:
        baseline_sets(train.labels.cpu(), labels)  # raises before minutes of training
    digest, classifier = describe(train, "")["digest"], None
    say("Measuring the real images, with which samples are compared.")
    if config.dataset == "generated" or digest == MNIST_DIGEST:
        classifier = load_classifier()
    elif len(train.labels.unique()) > 1:
        classifier = dataset_classifier(config.dataset, digest, train.to("cpu"), test.to("cpu"))
    else:
        say("These images are all of one class: no classifier can be trained, so metrics that need one are left out.")
    return Reference(train, test, labels, classifier)


def baseline_size(real: Tensor, labels: Tensor) -> int:
    """For how many of the labels [N], from the first on, the real images [M] have two disjoint sets.

    All N, or a multiple of BLOCK.
    """
    needed = 2 * F.one_hot(labels, CLASSES).cumsum(0)  # [N, C]
    count = int((needed <= torch.bincount(real, minlength=CLASSES)).all(1).sum())
    return count if count == len(labels) else count // BLOCK * BLOCK


def baseline_sets(real: Tensor, labels: Tensor) -> list[Tensor]:
    """Disjoint sets of real images with the same labels [N], image for image: 2 to 5 index tensors int64 [N].

    They leave at least N of the real images [M] outside each. Raises UserError where there are not even two.
    """
    if (most := baseline_size(real, labels)) < len(labels):
        advice = f"use at most {most}" if most >= FEWEST else "no number of images works for these"
        raise UserError(f"--num-images {len(labels)}: too few real images for a baseline, two disjoint sets of as many "
                        f"with the same labels; {advice}")
    wanted, available = (torch.bincount(classes, minlength=CLASSES) for classes in (labels, real))
    sampled = wanted > 0
    count = min(SETS, int((available[sampled] // wanted[sampled]).min()))
    sets = [torch.empty_like(labels) for _ in range(count)]
    for k in sampled.nonzero().flatten().tolist():
        indices = (real == k).nonzero().flatten()
        indices = indices[torch.randperm(len(indices), generator=generator("cpu", BASELINE_STREAM, k))]
        for chosen, part in zip(sets, indices.split(int(wanted[k]))):
            chosen[labels == k] = part
    return sets
