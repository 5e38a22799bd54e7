"""The yardstick: floor, references, errors, verdicts against direct computation, closed forms and constructed cases."""

import dataclasses
import math
from statistics import fmean, stdev

import pytest
import torch
from torch import Tensor

import dataset
from config import UserError
from dataset import Digits
from drawing import choose_labels
from support.extractor import load_extractor
from support.statistics import holm, jackknife_error, student_limit, student_p
from tests.conftest import frechet_distance
from verdict import SPREAD, smallest_shown, verdicts
from yardstick import Row, Yardstick, floor_sets

COUNT = 2000  # 20 blocks of labels, the fewest that have errors


@pytest.fixture(scope="module")
def digits() -> Digits:
    return dataset.load_generated("train")


@pytest.fixture(scope="module")
def real(digits: Digits) -> Yardstick:
    """On 7,000 of the generated digits; the other 2,000 are left to be judged."""
    labels = choose_labels(None, 0, range(COUNT), torch.bincount(digits.labels[:7000]).tolist())
    test = dataset.load_generated("test")
    return Yardstick(Digits(digits.images[:7000], digits.labels[:7000]), test, labels, load_extractor())


def same_labels(digits: Digits, labels: Tensor) -> Tensor:
    """Images out of the last 2,000 of each class, with these labels."""
    images = torch.empty(len(labels), 1, 28, 28, dtype=torch.uint8)
    for k in range(10):
        own = digits.images[7000:][digits.labels[7000:] == k]
        places = (labels == k).nonzero().flatten()
        images[places] = own[torch.arange(len(places)) % len(own)]
    return images


# References and the floor


def test_the_floors_sets_are_disjoint_and_have_the_labels_that_are_asked_for() -> None:
    there = torch.tensor([0] * 700 + [3] * 500 + [7] * 90)
    labels = choose_labels(None, 0, range(200), torch.bincount(there, minlength=10).tolist())
    sets = floor_sets(there, labels)
    assert len(sets) == 5 and all(torch.equal(there[chosen], labels) for chosen in sets)
    assert len(torch.cat(sets).unique()) == 5 * 200
    again = floor_sets(there, labels)
    assert all(torch.equal(one, other) for one, other in zip(sets, again))


def test_too_few_real_images_are_named_with_a_number_that_works() -> None:
    there = torch.arange(10).repeat_interleave(torch.tensor([300, 260, 300, 300, 300, 300, 300, 300, 300, 300]))
    shares = torch.bincount(there).tolist()
    with pytest.raises(UserError, match="--num-images 2000: too few real images .*at most 1400") as caught:
        floor_sets(there, choose_labels(None, 0, range(2000), shares))
    assert "\n" not in str(caught.value)
    assert len(floor_sets(there, choose_labels(None, 0, range(1400), shares))) == 2
    with pytest.raises(UserError, match="no number of images works"):
        floor_sets(there, torch.full((200,), 1))


def test_distances_are_to_the_images_outside_each_set(real: Yardstick, digits: Digits) -> None:
    """By hand, with references weighted by repetition: as the labels' shares are those of the images, not at all."""
    images = same_labels(digits, real.labels)
    row = real.measure(images, real.labels, overlap=False, neighbours=False)
    seen = real._see(images, real.labels)
    everything = torch.ones(7000, dtype=torch.bool)
    by_class: dict[int, list[float]] = {k: [] for k in range(10)}
    for chosen in real.sets:
        rest = everything.index_fill(0, chosen, False)
        for k in by_class:
            ours, theirs = seen.features[seen.labels == k], real.seen.features[rest & (real.seen.labels == k)]
            by_class[k].append(frechet_distance(ours, theirs))
    assert row.classes == pytest.approx({k: fmean(found) for k, found in by_class.items()}, rel=1e-6)
    assert row.values["within"] == pytest.approx(fmean(list(row.classes.values())))
    read, asked = torch.tensor(row.histogram), torch.bincount(real.labels, minlength=10)
    assert read.sum() == COUNT and (read - asked).abs().sum() < 0.05 * COUNT
    direct = fmean([frechet_distance(seen.texture, real.seen.texture[everything.index_fill(0, chosen, False)])
                   for chosen in real.sets])
    assert row.values["texture"] == pytest.approx(direct, rel=0.01)  # shares are equal to within an image or two


def test_class_shares_alone_make_no_distance(real: Yardstick) -> None:
    """Real sevens only are as far as the floor of sevens is, not as far as sevens are from all digits."""
    sevens, few = torch.full((100,), 7), Digits(real.train.images[:3100], real.train.labels[:3100])
    own = Yardstick(few, real.test, sevens, real.extractor)
    images = real.train.images[6000:][real.train.labels[6000:] == 7][:100]
    row = own.measure(images, sevens, overlap=False, neighbours=False)
    assert own.floor.values["frechet"] == pytest.approx(own.floor.values["within"], rel=0.02)
    assert row.values["frechet"] < 2 * own.floor.values["frechet"] and row.classes.keys() == {7}


def test_real_against_real_is_the_floor_within_its_error(real: Yardstick, digits: Digits) -> None:
    row = real.measure(same_labels(digits, real.labels), real.labels)
    for key in ("within", "frechet", "texture"):
        ratio, error = real.over_floor(key, row)
        assert error is not None and abs(ratio - 1) < 3 * error and ratio < 2
    assert row.values["ink"] == pytest.approx(1, abs=4 * row.errors["ink"])
    for key in ("precision", "recall", "coverage"):
        assert row.values[key] == pytest.approx(real.floor.values[key], abs=0.05)
    noise = real.noise
    assert noise.values["frechet"] > 100 * row.values["frechet"] and noise.values["coverage"] < 0.1
    assert 0.5 < real.other_writers.values["frechet"] / real.floor.values["frechet"] < 3  # of the same model


def test_a_copier_is_caught(real: Yardstick) -> None:
    """Training images with a little noise: at the floor by their distance, and called out by their neighbours."""
    images = real.train.images[real.sets[0]].int()
    noise = torch.randint(-6, 7, images.shape, generator=torch.Generator().manual_seed(0))
    noisy = (images + noise).clamp(0, 255).byte()
    row = real.measure(noisy, real.labels, overlap=False)
    assert row.values["within"] < 2 * real.floor.values["within"]
    assert row.memorisation["pixels"]["share_closer"] > 0.9 and row.memorisation["pixels"]["ratio"] < 0.5
    assert torch.equal(row.neighbours["pixels"][1], real.sets[0])


def test_ink_and_labels_that_were_not_asked_for(real: Yardstick, digits: Digits) -> None:
    images = same_labels(digits, real.labels)
    row = real.measure((images.float() * 0.9).byte(), real.labels, overlap=False, neighbours=False)
    assert row.values["ink"] == pytest.approx(0.9, abs=0.02)
    shifted = real.measure(images, (real.labels + 1) % 10, overlap=False, neighbours=False)
    assert shifted.values["asked"] < 0.05 and shifted.values["within"] > 10 * real.floor.values["within"]
    few = Digits(real.train.images[:4400], real.train.labels[:4400])
    unlabelled = Yardstick(few, real.test, torch.full((COUNT,), 10), real.extractor)
    free = unlabelled.measure(images, torch.full((COUNT,), 10), overlap=False, neighbours=False)
    assert not {"within", "asked"} & free.values.keys() and not free.classes
    assert abs(unlabelled.over_floor("frechet", free)[0] - 1) < 1


# Errors


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert jackknife_error((x.sum() - x) / 29) == pytest.approx(stdev(x.tolist()) / math.sqrt(30))


def test_left_out_values_are_those_without_the_block(real: Yardstick, digits: Digits) -> None:
    images = same_labels(digits, real.labels)
    row = real.measure(images, real.labels, overlap=False, neighbours=False)
    assert all(len(values) == 20 for values in row.left_out.values())
    kept = torch.arange(COUNT) // 100 != 13
    sums = {key: part.sum() for key, part in real._sums(real._see(images[kept], real.labels[kept])).items()}
    counts = torch.bincount(real.labels, minlength=10).double()
    shorter = real._values(sums, counts, torch.arange(10), real.references)
    for key in ("within", "frechet", "texture", "ink", "sure", "zeros", "asked"):
        assert row.left_out[key][13].item() == pytest.approx(shorter[key].item(), rel=1e-4)
        assert row.errors[key] == pytest.approx(jackknife_error(row.left_out[key]))
    few = real.measure(images[:1900], real.labels[:1900], overlap=False, neighbours=False)
    assert not few.errors and real.over_floor("frechet", few)[1] is None


def test_students_t_and_holm_are_those_of_the_tables() -> None:
    for freedom, limit in ((1, 12.706), (4, 2.776), (6, 2.447), (19, 2.093), (99, 1.984), (math.inf, 1.960)):
        assert student_limit(freedom) == pytest.approx(limit, abs=2e-3)
        assert student_p(limit, freedom) == pytest.approx(0.05, abs=2e-4) and student_p(-limit, freedom) < 0.0502
    assert student_p(0, 5) == 1
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and holm([]) == []
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


# Verdicts


def row(blocks: int = 20, **values: float) -> Row:
    """A row whose left-out values scatter in a fixed way, by 0.01 each."""
    noise = torch.linspace(-1, 1, blocks, dtype=torch.float64) * 0.01
    return Row(values=values, left_out={key: value + noise for key, value in values.items()},
               errors=dict.fromkeys(values, 0.01))


FLOOR = row(within=0.1, ink=1.0, precision=0.93, sure=0.98)


def words(a: list[Row], b: list[Row]) -> dict[str, str]:
    return {verdict.measure.key: verdict.word for verdict in verdicts(a, b, FLOOR, 5)}


def scattered(seed: int, size: float, **values: float) -> Row:
    made = row(**values)
    noise = torch.randn(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
    return dataclasses.replace(made, left_out={key: left + noise for key, left in made.left_out.items()})


def test_one_network_a_side_is_paired_block_by_block() -> None:
    a = row(within=0.30)
    (same,) = verdicts([a], [a], FLOOR, 5)
    assert same.word == "no difference shown" and same.p == 1
    b = scattered(1, 1e-4, within=0.29)  # each without its block moves with the other, so little noise is left
    (verdict,) = verdicts([a], [b], FLOOR, 5)
    error = jackknife_error(b.left_out["within"] - a.left_out["within"])
    assert verdict.word == "better" and verdict.low is not None and verdict.high is not None
    assert (verdict.high - verdict.low) / 2 == pytest.approx(student_limit(19) * error)
    assert (verdict.high + verdict.low) / 2 == pytest.approx(-0.01) and verdict.high < 0
    unpaired = dataclasses.replace(b, left_out={"within": b.left_out["within"].flip(0)})
    assert words([a], [unpaired]) == {"within": "no difference shown"}


def test_directions_are_those_of_the_measures() -> None:
    a, better = row(within=0.3, ink=0.96, sure=0.95), scattered(2, 1e-5, within=0.2, ink=0.99, sure=0.97)
    assert words([a], [better]) == {"within": "better", "ink": "better", "sure": "better"}
    assert words([better], [a]) == {"within": "worse", "ink": "worse", "sure": "worse"}
    beyond = scattered(3, 1e-5, within=0.3, ink=1.04, sure=0.95)  # as far from 1 on the other side
    assert words([a], [beyond])["ink"] == "no difference shown"
    copied = scattered(4, 1e-5, precision=0.99)
    copied.left_out.clear()
    assert words([row(precision=0.93)], [copied]) == {"precision": "worse"}  # more precise than real images are


def test_all_but_the_headline_are_corrected_for_their_number() -> None:
    a = row(within=0.3, frechet=0.03, texture=0.2, ink=0.97, sure=0.95, zeros=0.8)
    b = scattered(5, 1e-4, **a.values)
    error = jackknife_error(b.left_out["frechet"] - a.left_out["frechet"])
    moved = {**a.values, "within": 0.3 - 2.3 * error, "frechet": 0.03 - 2.3 * error}  # p = 0.033 on its own
    b = dataclasses.replace(b, values=moved)
    found = {verdict.measure.key: verdict for verdict in verdicts([a], [b], row(**a.values), 5)}
    assert found["within"].word == "better" and found["within"].p == pytest.approx(0.033, abs=0.002)
    assert found["frechet"].word == "no difference shown" and found["frechet"].p == pytest.approx(5 * 0.033, abs=0.01)


def test_several_trainings_a_side_are_compared_by_the_spread_between_them() -> None:
    a, b = ([row(within=value) for value in values] for values in ((0.30, 0.33, 0.31, 0.36), (0.20, 0.26, 0.22)))
    (verdict,) = verdicts(a, b, FLOOR, 5)
    logs = [[math.log(one.values["within"]) for one in side] for side in (a, b)]
    pooled = (3 * stdev(logs[0]) ** 2 + 2 * stdev(logs[1]) ** 2) / 5
    half = student_limit(5) * math.sqrt(pooled * (1 / 4 + 1 / 3))
    change = fmean(logs[1]) - fmean(logs[0])
    assert verdict.a == pytest.approx(math.exp(fmean(logs[0]))) and verdict.word == "better"
    assert verdict.low == pytest.approx(verdict.a * math.expm1(change - half))
    assert verdict.high == pytest.approx(verdict.a * math.expm1(change + half))
    assert smallest_shown(a, b) == pytest.approx(math.expm1(half))


def test_few_trainings_take_the_spread_that_was_measured_once() -> None:
    spread = SPREAD["within"]
    a, b = [row(within=0.3), row(within=0.3)], [row(within=0.3 * math.exp(-3 * spread))]
    (verdict,) = verdicts(a, b, FLOOR, 5)
    half = 1.95996 * spread * math.sqrt(1.5)
    assert verdict.word == "better" and verdict.low is not None
    assert math.log1p(verdict.low / 0.3) == pytest.approx(-3 * spread - half, abs=1e-3)
    assert words(a, [row(within=0.3 * math.exp(-2 * spread))]) == {"within": "no difference shown"}


def test_two_sides_of_the_floor_are_not_told_apart_by_a_difference_that_they_share() -> None:
    """What a and b have in common cancels in b - a, but not in which of them is nearer to a floor between them."""
    common = torch.randn(20, generator=torch.Generator().manual_seed(6), dtype=torch.float64) * 0.01
    a, b = (dataclasses.replace(row(ink=ink), left_out={"ink": ink + common}) for ink in (1.012, 0.990))
    assert words([a], [b]) == {"ink": "no difference shown"}
    (verdict,) = verdicts([a], [b], FLOOR, 5)
    assert verdict.high is not None and verdict.high < 0  # they are different all the same
