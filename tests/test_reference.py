"""The reference: baseline, distances, the test set and errors against direct computation and constructed cases."""

from statistics import fmean

import pytest
import torch
from torch import Tensor

from config import UserError
from evaluation.classifier import load_classifier
from evaluation.metrics import nearest, share_closer
from evaluation.reference import OVERLAP, Measurement, Reference, baseline_sets, baseline_size
from evaluation.statistics import jackknife_error
from sample import choose_labels
from tests.conftest import frechet_distance
from tests.measuring import GENERATED

COUNT = 2000  # 20 blocks of images, the fewest that have errors
DIGITS = GENERATED["train"]
TRAIN, REST = DIGITS[torch.arange(7000)], DIGITS[torch.arange(7000, 9000)]  # the rest is what is measured


def equal_labels(count: int, classes: int = 10) -> Tensor:
    return choose_labels(None, 0, range(count), range(classes))


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(TRAIN, GENERATED["test"], equal_labels(COUNT), load_classifier())


def same_labels(labels: Tensor) -> Tensor:
    """Real images with these labels, out of those that the reference does not have."""
    images = torch.empty(len(labels), 1, 28, 28, dtype=torch.uint8)
    for k in range(10):
        own = REST.images[REST.labels == k]
        places = (labels == k).nonzero().flatten()
        images[places] = own[torch.arange(len(places)) % len(own)]
    return images


@pytest.fixture(scope="module")
def real(reference: Reference) -> Measurement:
    """Real images, as many of each class as are asked for."""
    return reference.measure(same_labels(reference.baseline.labels), reference.baseline.labels)


# The baseline


def test_the_sets_of_the_baseline_are_disjoint_and_have_the_labels_that_are_asked_for() -> None:
    there = torch.tensor([0] * 700 + [3] * 500 + [7] * 390)
    labels = choose_labels(None, 0, range(200), [0, 3, 7])
    sets = baseline_sets(there, labels)
    assert len(sets) == 5 and all(torch.equal(there[chosen], labels) for chosen in sets)
    assert len(torch.cat(sets).unique()) == 5 * 200
    again = baseline_sets(there, labels)
    assert all(torch.equal(one, other) for one, other in zip(sets, again))


def test_too_few_real_images_are_named_with_a_number_that_works() -> None:
    there = torch.arange(10).repeat_interleave(torch.tensor([300, 260, 300, 300, 300, 300, 300, 300, 300, 300]))
    with pytest.raises(UserError, match="--num-images 2000: too few real images .*at most 1300") as caught:
        baseline_sets(there, equal_labels(2000))
    assert "\n" not in str(caught.value)
    assert len(baseline_sets(there, equal_labels(1300))) == 2
    with pytest.raises(UserError, match="no number of images works"):
        baseline_sets(there, torch.full((200,), 1))


def test_the_baseline_is_as_large_as_two_sets_allow() -> None:
    real = torch.arange(10).repeat_interleave(torch.tensor([300, 260, *[300] * 8]))
    labels = equal_labels(2000)
    size = baseline_size(real, labels)
    assert size == 1300 and len(baseline_sets(real, labels[:size])) == 2 and baseline_size(real, labels[:900]) == 900
    assert baseline_size(real, torch.tensor([0, 1, 2]).repeat(500)) == 300  # class 1 allows 390, in steps of 100


def test_more_images_than_the_baseline_has_are_nearer_by_the_bias_alone() -> None:
    """Distances have a bias of about 1/N. Precision, recall and coverage, which depend on N too, keep that of the
    baseline."""
    labels = equal_labels(COUNT)
    large = Reference(TRAIN, GENERATED["test"], labels[:1000], load_classifier())
    small, more = (large.measure(same_labels(part), part) for part in (labels[:1000], labels[:COUNT]))
    assert more.estimates["frechet"].value == pytest.approx(small.estimates["frechet"].value / 2, rel=0.35)
    for key in OVERLAP:
        assert more.estimates[key].value == small.estimates[key].value


def test_distances_are_to_the_images_outside_each_set(reference: Reference, real: Measurement) -> None:
    """By hand; the labels' shares are those of the training images, so no weights are needed."""
    labels = reference.baseline.labels
    sampled = reference._features(same_labels(labels), labels)
    everything = torch.ones(len(TRAIN), dtype=torch.bool)
    by_class: dict[int, list[float]] = {k: [] for k in range(10)}
    for chosen in reference.baseline.sets:
        rest = everything.index_fill(0, chosen, False)
        for k in by_class:
            real_features = reference.features["features"][rest & (TRAIN.labels == k)]
            by_class[k].append(frechet_distance(sampled["features"][labels == k], real_features))
    assert real.class_distances == pytest.approx({k: fmean(values) for k, values in by_class.items()}, rel=1e-6)
    assert real.estimates["class_frechet"].value == pytest.approx(fmean(real.class_distances.values()))
    read, expected = torch.tensor(real.class_counts), torch.bincount(labels, minlength=10)
    assert read.sum() == COUNT and (read - expected).abs().sum() < 0.05 * COUNT
    direct = fmean([frechet_distance(sampled["texture"], reference.features["texture"][
        everything.index_fill(0, chosen, False)]) for chosen in reference.baseline.sets])
    assert real.estimates["texture"].value == pytest.approx(direct, rel=0.01)


def test_class_shares_alone_make_no_distance() -> None:
    """Real sevens only are as far as the baseline of sevens is, not as far as sevens are from all digits."""
    sevens = torch.full((100,), 7)
    reference = Reference(TRAIN[torch.arange(3100)], GENERATED["test"], sevens, load_classifier())
    measurement = reference.measure(REST.images[REST.labels == 7][:100], sevens)
    base = reference.baseline.estimates["frechet"].value
    assert base == pytest.approx(reference.baseline.estimates["class_frechet"].value, rel=0.02)
    assert measurement.estimates["frechet"].value < 2 * base and measurement.class_distances.keys() == {7}


def test_real_against_real_is_the_baseline_within_its_error(reference: Reference, real: Measurement) -> None:
    estimates, base = real.estimates, reference.baseline
    for key in ("class_frechet", "frechet", "texture"):
        ratio, error = base.ratio(key, estimates[key])
        assert error is not None and abs(ratio - 1) < 3 * error and ratio < (3 if key == "texture" else 2)
    intensity = estimates["mean_intensity"]
    assert intensity.value == pytest.approx(1, abs=4 * (intensity.error or 0))
    for key in ("precision", "recall", "coverage"):
        assert estimates[key].value == pytest.approx(base.estimates[key].value, abs=0.05)
    noise = torch.randint(0, 256, (COUNT, 1, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
    static = reference.measure(noise, base.labels).estimates
    assert static["frechet"].value > 100 * estimates["frechet"].value and static["coverage"].value < 0.1


# The test set


@pytest.mark.parametrize("count, available", [(1000, 2000), (2000, 1000)])
def test_the_test_set_has_a_baseline_of_its_own_class_counts(count: int, available: int) -> None:
    """Where test images come from the same source as the training images, they lie at the baseline for any count.

    The distance of N images is biased by about 1/N, so all of the test images, divided by the baseline of `count`
    images, look nearer or further than they are.
    """
    images = REST[torch.arange(available)]
    reference = Reference(TRAIN[torch.arange(4000)], images, equal_labels(count), load_classifier())
    test, baseline = reference.test_set
    labels = reference.test_subset.labels
    assert torch.bincount(labels).tolist() == [min(count, available) // 10] * 10
    assert torch.equal(torch.bincount(baseline.labels), torch.bincount(labels))
    for key in ("class_frechet", "frechet"):
        assert baseline.ratio(key, test.estimates[key])[0] == pytest.approx(1, abs=0.25)
    everything = reference.measure(images.images, images.labels).estimates
    ratio, _ = reference.baseline.ratio("frechet", everything["frechet"])
    assert ratio < 0.7 if count < available else ratio > 1.3


def test_a_class_of_few_test_images_is_taken_whole_and_has_a_baseline_of_so_few() -> None:
    kept = torch.cat([(REST.labels == k).nonzero().flatten()[:30 if k == 3 else 200] for k in range(10)])
    reference = Reference(TRAIN[torch.arange(4000)], REST[kept], equal_labels(1500), load_classifier())
    test, baseline = reference.test_set
    counts = [30 if k == 3 else 150 for k in range(10)]
    assert torch.bincount(baseline.labels).tolist() == counts and baseline is not reference.baseline
    assert 3 not in test.class_distances and len(test.class_distances) == 9
    for key in ("class_frechet", "frechet"):
        assert baseline.ratio(key, test.estimates[key])[0] == pytest.approx(1, abs=0.25)


def test_the_test_images_that_are_taken_are_spread_over_all_of_them() -> None:
    reference = Reference(TRAIN, GENERATED["test"], torch.full((200,), 7), None)
    assert len(reference.test_subset) == 100 and set(reference.test_subset.labels.tolist()) == {7}
    few = Reference(TRAIN, REST, torch.arange(10).repeat(20), None).test_subset
    places = [(REST.images[:, 0] == image).all(dim=(1, 2)).nonzero()[0].item() for image in few.images[:, 0]]
    assert min(places) < 50 and max(places) > 1900
    with pytest.raises(UserError, match="test images of the classes that are sampled"):
        Reference(TRAIN, REST[torch.arange(40)], torch.arange(10).repeat(20), None)


# What is measured


def test_a_copier_is_caught(reference: Reference) -> None:
    """Training images with a little noise: at the baseline by their distance, and told by their neighbours."""
    base = reference.baseline
    images = TRAIN.images[base.sets[0]].int()
    noise = torch.randint(-6, 7, images.shape, generator=torch.Generator().manual_seed(0))
    copies = (images + noise).clamp(0, 255).byte()
    estimates = reference.measure(copies, base.labels).estimates
    assert estimates["class_frechet"].value < 2 * base.estimates["class_frechet"].value
    (distances, indices), (others, _) = (nearest(each, TRAIN.images) for each in (copies, reference.test_subset.images))
    assert torch.equal(indices, base.sets[0]) and share_closer(distances, others) > 0.9
    assert distances.median() < 0.5 * others.median()


def test_intensity_and_labels_that_were_not_asked_for(reference: Reference) -> None:
    base = reference.baseline
    images = same_labels(base.labels)
    pale = reference.measure((images.float() * 0.9).byte(), base.labels).estimates
    assert pale["mean_intensity"].value == pytest.approx(0.9, abs=0.02)
    shifted = reference.measure(images, (base.labels + 1) % 10).estimates
    assert shifted["label_accuracy"].value < 0.05
    assert shifted["class_frechet"].value > 10 * base.estimates["class_frechet"].value
    unlabelled = reference.measure(images, torch.full((COUNT,), 10))
    assert not {"class_frechet", "label_accuracy"} & unlabelled.estimates.keys() and not unlabelled.class_distances
    assert abs(base.ratio("frechet", unlabelled.estimates["frechet"])[0] - 1) < 1


def test_without_labels_the_baseline_has_each_class_equally_often() -> None:
    kept = TRAIN.labels != 4
    reference = Reference(TRAIN[kept], GENERATED["test"], torch.full((900,), 10), None)
    assert torch.bincount(reference.baseline.labels, minlength=10).tolist() == [100] * 4 + [0] + [100] * 5


# Errors


def test_a_replicate_is_the_value_without_its_block(reference: Reference, real: Measurement) -> None:
    estimates, labels = real.estimates, reference.baseline.labels
    kept = torch.arange(COUNT) // 100 != 13
    rest = reference._features(same_labels(labels)[kept], labels[kept])
    sums = {key: part.sum() for key, part in reference._moments(rest, labels[kept]).items()}
    counts = torch.bincount(labels, minlength=10).double()
    shorter, _ = reference._metrics_of_moments(sums, counts, torch.arange(10), reference.baseline.outside)
    for key in ("class_frechet", "frechet", "texture", "mean_intensity", "confident", "zeros", "label_accuracy"):
        replicates = estimates[key].replicates
        assert replicates is not None and len(replicates) == 20
        assert replicates[13].item() == pytest.approx(shorter[key].item(), rel=1e-4)
        assert estimates[key].error == pytest.approx(jackknife_error(replicates))
    few = reference.measure(same_labels(labels)[:1900], labels[:1900]).estimates
    assert all(few[key].error is None for key in ("class_frechet", "frechet", "texture", "zeros"))
    assert reference.baseline.ratio("frechet", few["frechet"])[1] is None
