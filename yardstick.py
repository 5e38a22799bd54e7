"""The yardstick: what drawn images are compared with, and every measure with its error.

Distances are to the training images. The floor is real training images with the same labels, against the rest of them:
no model can be expected to do better. A figure means something only beside its floor and its error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

import config as configs
from config import CLASSES, Config, UserError
from dataset import MNIST_DIGEST, Digits, describe
from drawing import BLOCK, choose_labels
from support import metrics
from support.extractor import SURE, Extractor, extract, load_extractor, own_extractor
from support.metrics import Moments
from support.runtime import generator, to_uint8
from support.statistics import jackknife_error

FLOOR_STREAM = 7  # of random numbers; see train.py, drawing.py and likelihood.py for others
FEWEST = 200  # real images (of a class, too), below which the covariance of 64 features says nothing
FEWEST_DRAWN = 100  # of a class, likewise
FEWEST_WRITERS = 50  # test images
FEWEST_BLOCKS, MOST_BLOCKS = 20, 100  # below, a jackknife says nothing; above, it takes longer and gains nothing
SETS = 5  # of real images in the floor, at most


class Measure(NamedTuple):
    """One column of every table."""

    key: str
    heading: str
    form: str  # of its numbers
    good: str  # "low", "floor" (the nearer to the floor's value the better) or "" (neither way)


MEASURES = (
    Measure("within", "in class", "{:.4f}", "low"), Measure("frechet", "Fréchet", "{:.4f}", "low"),
    Measure("texture", "texture", "{:.4f}", "low"), Measure("ink", "ink", "{:.3f}", "floor"),
    Measure("precision", "prec.", "{:.3f}", "floor"), Measure("recall", "recall", "{:.3f}", "floor"),
    Measure("coverage", "cover.", "{:.3f}", "floor"), Measure("sure", "sure", "{:.2%}", "floor"),
    Measure("asked", "as asked", "{:.2%}", "floor"), Measure("zeros", "zeros", "{:.2%}", "floor"),
    Measure("nearest_pixels", "nn pixel", "{:.2f}", ""), Measure("nearest_features", "nn feat.", "{:.2f}", ""))
OVERLAP = ("precision", "recall", "coverage")
JUDGED = ("within", "frechet", *OVERLAP, "sure", "asked", "nearest_features")  # what takes a classifier
Sums = dict[str, Moments]  # of "features", "texture" and "shares", by class: all that adds up over images


@dataclass(frozen=True)
class Seen:
    """What there is to measure of N images, one by one, on the CPU."""

    labels: Tensor  # int64 [N]
    probabilities: Tensor  # float32 [N, 10], of the classifier
    features: Tensor  # float32 [N, 64], of the classifier
    texture: Tensor  # float32 [N, 32]
    shares: Tensor  # float64 [N, 5]: sure, as asked, share of zeros, grey level, and that of real images of the class

    def __getitem__(self, chosen: Tensor) -> "Seen":
        return Seen(*(getattr(self, f.name)[chosen] for f in fields(self)))


@dataclass
class Row:
    """What was measured of one set of images."""

    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)  # standard errors; of the floor: deviations over its sets
    left_out: dict[str, Tensor] = field(default_factory=dict)  # float64 [B]: the value without each block of labels
    classes: dict[int, float] = field(default_factory=dict)  # class -> Fréchet distance within it
    histogram: list[int] = field(default_factory=list)  # images of each class, as the classifier reads them
    neighbours: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # space -> distances [N], indices [N]
    memorisation: dict[str, dict[str, float]] = field(default_factory=dict)

    def forget(self, keys: Sequence[str]) -> None:
        for part in (self.values, self.errors, self.left_out):
            for key in keys:
                part.pop(key, None)
        self.classes = {} if "within" in keys else self.classes


class Yardstick:
    """Real images to compare N drawn ones with, whose labels [N] are given (10: drawn without one).

    Without an extractor there are only the measures that take none. Raises UserError for too few real images.
    """

    def __init__(self, train: Digits, test: Digits, labels: Tensor, extractor: Extractor | None) -> None:
        self.train, self.test = train.to("cpu"), test.to("cpu")
        self.extractor = extractor
        per_class = torch.bincount(self.train.labels, minlength=CLASSES)
        labelled = int(labels.max()) < CLASSES
        self.labels = labels if labelled else choose_labels(None, 0, range(len(labels)), per_class.tolist())
        self.sets = floor_sets(self.train.labels, self.labels)
        asked = torch.isin(self.test.labels, self.labels)
        self.writers = Digits(self.test.images[asked], self.test.labels[asked])
        if len(self.writers) < FEWEST_WRITERS:
            raise UserError(f"--digits: {len(self.writers)} test images of the classes that are drawn, and measuring "
                            f"takes at least {FEWEST_WRITERS}; ask for other classes, or add test images")
        grey = self.train.images.double().mean((1, 2, 3))
        ink = torch.zeros(CLASSES, dtype=torch.float64).index_add(0, self.train.labels, grey)
        self.ink = ink / per_class.clamp(min=1)  # mean grey level of each class
        self.seen = self._see(self.train.images, self.train.labels)
        own, everything = [self._sums(self.seen[chosen]) for chosen in self.sets], self._sums(self.seen)
        self.references = [{key: (everything[key] - part[key]).sum() for key in part} for part in own]

    def measure(self, images: Tensor, asked: Tensor, overlap: bool = True, neighbours: bool = True) -> Row:
        """All measures of uint8 images [N, 1, 28, 28] drawn for labels [N] (10: none); distances to all references.

        `overlap` (precision, recall and coverage) and `neighbours` (to the nearest training image) take the most time.
        """
        labelled = int(asked.max()) < CLASSES
        seen = self._see(images, asked if labelled else self.labels)
        row = self._row(seen, self.references)
        if not labelled:
            row.forget(("within", "asked"))
        if overlap and self.extractor is not None:
            row.values |= self._overlap(seen.features, metrics.radius(seen.features), 0)
            row.errors |= {key: self.floor.errors[key] for key in OVERLAP}
        if neighbours:
            row.neighbours = self._neighbours(images, seen)
            for space, (distances, _) in row.neighbours.items():
                row.values[f"nearest_{space}"] = distances.median().item()
                row.memorisation[space] = metrics.memorisation(distances, self.test_neighbours[space][0])
        return row

    @cached_property
    def floor(self) -> Row:
        """Real training images: means over sets, each against all outside it, and deviations over the sets."""
        rows = [self._row(self.seen[chosen], [rest]) for chosen, rest in zip(self.sets, self.references)]
        for i, row in enumerate(rows):
            if self.extractor is not None:
                row.values |= self._overlap(self.seen.features[self.sets[i]], self.radius[i], (i + 1) % len(rows))
        floor = Row(classes={k: fmean(row.classes[k] for row in rows) for k in rows[0].classes})
        for key in rows[0].values:
            found = [row.values[key] for row in rows]
            floor.values[key], floor.errors[key] = fmean(found), stdev(found)
        for space, (distances, _) in self.test_neighbours.items():  # a training image's nearest is itself
            floor.values[f"nearest_{space}"] = distances.median().item()
        return floor

    @cached_property
    def other_writers(self) -> Row:
        """The test set, which other people wrote: no model that learns the training set can remove this distance."""
        row = self._row(self.test_seen, self.references)
        row.values |= {f"nearest_{space}": found[0].median().item() for space, found in self.test_neighbours.items()}
        return row

    @cached_property
    def noise(self) -> Row:
        """Pixels of a standard normal distribution: the far end."""
        x = torch.randn(len(self.labels), 1, 28, 28, generator=generator("cpu", FLOOR_STREAM))
        return self.measure(to_uint8(x), self.labels, neighbours=False)

    def over_floor(self, key: str, row: Row) -> tuple[float, float | None]:
        """A distance as a multiple of the floor, and its standard error, to which the floor's own spread adds."""
        value, floor = row.values[key], self.floor.values[key]
        if key not in row.errors:
            return value / floor, None
        own, floors = row.errors[key] / value, self.floor.errors[key] / floor / math.sqrt(len(self.sets))
        return value / floor, value / floor * math.hypot(own, floors)

    def _row(self, seen: Seen, references: list[Sums]) -> Row:
        counts = torch.bincount(seen.labels, minlength=CLASSES).double()
        real = torch.stack([reference["features"].count for reference in references]).amin(0)
        classes = ((counts >= FEWEST_DRAWN) & (real >= FEWEST)).nonzero().flatten()
        blocks = min(MOST_BLOCKS, len(seen.labels) // BLOCK)
        by_block = self._sums(seen, max(1, blocks))
        everything = {key: part.sum() for key, part in by_block.items()}
        found = self._values(everything, counts, classes, references)
        row = Row(classes=dict(zip(classes.tolist(), found.pop("classes").tolist())),
                  values={key: value.item() for key, value in found.items() if not value.isnan()},
                  histogram=torch.bincount(seen.probabilities.argmax(1), minlength=CLASSES).tolist())
        if blocks >= FEWEST_BLOCKS:
            rest = {key: everything[key] - part for key, part in by_block.items()}
            left_out = self._values(rest, counts, classes, references)
            row.left_out = {key: left_out[key] for key in row.values}
            row.errors = {key: jackknife_error(values) for key, values in row.left_out.items()}
        if self.extractor is None:
            row.forget(JUDGED)
        return row

    def _see(self, images: Tensor, labels: Tensor) -> Seen:
        features, probabilities = torch.zeros(len(images), 1), torch.zeros(len(images), CLASSES)
        if self.extractor is not None:
            features, probabilities = extract(self.extractor, images)
        likeliest = probabilities.max(1)
        shares = (likeliest.values > SURE, likeliest.indices == labels, (images == 0).double().mean((1, 2, 3)),
                  images.double().mean((1, 2, 3)), self.ink[labels])
        return Seen(labels, probabilities, features, metrics.texture_features(images),
                    torch.stack([share.double() for share in shares], 1))

    def _sums(self, seen: Seen, blocks: int = 1) -> Sums:
        """For each of so many blocks of images, in order: [blocks, ...]."""
        block = torch.arange(len(seen.labels)) * blocks // len(seen.labels)
        return {key: metrics.class_moments(getattr(seen, key), seen.labels, block)
                for key in ("features", "texture", "shares")}

    def _values(self, sums: Sums, counts: Tensor, classes: Tensor, references: list[Sums]) -> dict[str, Tensor]:
        """What follows from sums [...]: measures [...], and "classes" [..., K], the distances within these classes.

        The references are weighted to have the labels' class shares, so that no distance is due to those.
        """
        def distance(ours: Any, theirs: list[Any]) -> Tensor:  # of means and covariances
            return torch.stack([metrics.frechet_from_moments(*ours, *real) for real in theirs]).mean(0)

        found = {name: distance(sums[key].together(), [reference[key].together(counts) for reference in references])
                 for name, key in (("frechet", "features"), ("texture", "texture"))}
        found["classes"] = distance(sums["features"].of(classes), [real["features"].of(classes) for real in references])
        found["within"] = found["classes"].mean(-1)
        mean_shares, _ = sums["shares"].together()
        sure, asked, zeros, grey, real_grey = mean_shares.unbind(-1)
        return found | {"sure": sure, "asked": asked, "zeros": zeros, "ink": grey / real_grey}

    def _overlap(self, features: Tensor, radius: Tensor, real: int) -> dict[str, float]:
        """With the floor's set of that number."""
        theirs = self.seen.features[self.sets[real]]
        return dict(zip(OVERLAP, metrics.precision_recall_coverage(theirs, features, self.radius[real], radius)))

    @cached_property
    def radius(self) -> list[Tensor]:
        return [metrics.radius(self.seen.features[chosen]) for chosen in self.sets]

    @cached_property
    def test_seen(self) -> Seen:
        return self._see(self.writers.images, self.writers.labels)

    @cached_property
    def test_neighbours(self) -> dict[str, tuple[Tensor, Tensor]]:
        return self._neighbours(self.writers.images, self.test_seen)

    def _neighbours(self, images: Tensor, seen: Seen) -> dict[str, tuple[Tensor, Tensor]]:
        """Distance to the nearest training image and its index, in intensities from 0 to 1, and in features."""
        distances, indices = metrics.nearest(images, self.train.images)
        found = {"pixels": (distances / 255, indices)}
        return found | ({"features": metrics.nearest(seen.features, self.seen.features)} if self.extractor else {})


def floor_sets(real: Tensor, labels: Tensor) -> list[Tensor]:
    """Disjoint sets of real images with the same labels [N], image for image: 2 to 5 index tensors int64 [N].

    They leave at least N of the real images [M] outside each. Raises UserError where there are not even two.
    """
    wanted, there = (torch.bincount(x, minlength=CLASSES) for x in (labels, real))
    asked = wanted > 0
    count = min(SETS, int((there[asked] // wanted[asked]).min()))
    if count < 2 or len(real) < 2 * len(labels):
        share = (there[asked] / wanted[asked]).min().item() * len(labels) / 2  # images of which two sets would do
        most = int(min(share, len(real) / 2)) // BLOCK * BLOCK
        advice = f"draw at most {most}" if most >= FEWEST else "no number of images works for these"
        raise UserError(f"--num-images {len(labels)}: too few real images for a floor, two disjoint sets of as many "
                        f"with the same labels; {advice}")
    sets = [torch.empty_like(labels) for _ in range(count)]
    for k in asked.nonzero().flatten().tolist():
        own = (real == k).nonzero().flatten()
        own = own[torch.randperm(len(own), generator=generator("cpu", FLOOR_STREAM, k))]
        for chosen, part in zip(sets, own.split(int(wanted[k]))):
            chosen[labels == k] = part
    return sets


def judge(config: Config, train: Digits, test: Digits, labels: Tensor) -> Extractor | None:
    """The classifier that knows these images: the shipped one of MNIST, or the data set's own; None for one class.

    Raises UserError where there are too few images to judge any with these labels.
    """
    digest = describe(train, "")["digest"]
    if config.dataset == "generated" or digest == MNIST_DIGEST:
        return load_extractor()
    if len(train.labels.unique()) == 1:
        print("These images are all of one class, so no classifier can judge them: only what takes none is measured.")
        return None
    if int(labels.max()) < CLASSES:
        floor_sets(train.labels.cpu(), labels)  # before minutes of training
    pairs = ((digits.images.cpu(), digits.labels.cpu()) for digits in (train, test))
    return own_extractor(configs.run_name(replace(config, name=None)), digest, *pairs)
