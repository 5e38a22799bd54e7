"""Drawing: an image and its label follow from (seed, index) alone, whatever else is drawn beside it."""

from dataclasses import replace

import pytest
import torch

from config import NO_LABEL, Config, DiffusionConfig, ModelConfig, SampleConfig, TrainConfig, UserError
from diffusion import make_schedule
from drawing import Order, Trace, Trained, choose_labels, draw, evaluations, guided
from model import UNet
from samplers import spaced_timesteps
from support.runtime import Runtime

CPU = Runtime(torch.device("cpu"), bf16=False, compile=False)
OPTIONS = SampleConfig(sampler="dpmpp", steps=3, spacing="trailing", guidance=1.0, guidance_interval=None)
COUNT = 130  # two whole chunks and a little


def drawn(network, schedule, options, seed, indices, labels, trace=None):
    return draw(Trained(network, schedule, Config(), {}), Order(options, seed, indices, labels), CPU, trace)


@pytest.fixture(scope="module")
def network():
    """A small U-Net with random weights in every layer."""
    torch.manual_seed(0)
    unet = UNet(ModelConfig(channels=(8, 8, 16), blocks=(1, 1, 1), attention=(7,), embedding=16, groups=4))
    unet.eval().requires_grad_(False)
    for parameter in unet.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)
    return unet.to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def schedule():
    return make_schedule(DiffusionConfig(timesteps=100))


@pytest.mark.parametrize("options", [
    replace(OPTIONS, sampler="dpmpp"),
    replace(OPTIONS, sampler="sa"),
    replace(OPTIONS, sampler="ddpm"),
    replace(OPTIONS, sampler="ddpm", variance="upper", guidance=2.0),
    replace(OPTIONS, sampler="ddim", eta=0.5),
    replace(OPTIONS, sampler="unipc", guidance=1.5),
], ids=["dpmpp", "sa", "ddpm", "ddpm-guided", "ddim", "unipc-guided"])
def test_an_image_is_bitwise_the_same_alone_and_among_many(network, schedule, options):
    def chosen(indices):
        return drawn(network, schedule, options, 7, indices, choose_labels(None, 7, indices))

    everything = chosen(range(COUNT))
    assert everything.shape == (COUNT, 1, 28, 28) and everything.dtype == torch.float32
    assert torch.isfinite(everything).all() and len(everything.flatten(1).unique(dim=0)) == COUNT
    for indices in ([0], [37], [63], [64], [COUNT - 1], [COUNT - 1, 3, 70, 2], range(60, 68)):
        assert torch.equal(chosen(indices), everything[list(indices)]), indices


@pytest.mark.parametrize("dropout, digits, guidance, said", [
    (0.1, None, 2.0, ""), (0.1, "none", 1.0, ""), (0.0, "7", 1.0, "only with their labels"),
    (1.0, None, 0.0, "only without labels")])
def test_guidance_needs_a_network_that_knows_both_halves(network, schedule, dropout, digits, guidance, said, capsys):
    config = Config(train=TrainConfig(label_dropout=dropout))
    options = replace(OPTIONS, digits=digits, guidance=2.0)
    trained = Trained(network, schedule, config, {})
    assert guided(options, trained, CPU) == replace(options, guidance=guidance)
    out = capsys.readouterr().out
    assert said in out if said else not out


def test_images_follow_from_the_seed(network, schedule):
    labels = torch.zeros(4).long()
    one, again, other = (drawn(network, schedule, OPTIONS, seed, range(4), labels) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not any(torch.equal(a, b) for a in one for b in other)


def test_every_label_reaches_its_own_image(schedule):
    """With a network that answers x0 = label / 20, the images are their labels."""
    def network(x, t, label):
        return (label / 20)[:, None, None, None].expand_as(x)

    indices, labels = [129, 4, 64, 5, 0], torch.tensor([9, 1, 8, 0, 3])
    images = drawn(network, replace(schedule, prediction="x0"), OPTIONS, 0, indices, labels)
    assert torch.equal(images, network(images, None, labels))


def test_image_i_takes_slot_i_of_its_chunk(schedule):
    seen = []

    def network(x, t, label):
        seen.append((x.clone(), label.clone()))
        return torch.zeros_like(x)

    drawn(network, schedule, replace(OPTIONS, steps=1), 0, [130, 66, 3, 64], torch.tensor([1, 2, 3, 4]))
    slots = [{slot: label[slot].item() for slot in x.flatten(1).any(1).nonzero().flatten().tolist()}
             for x, label in seen]
    assert sorted(slots, key=len) == [{2: 1}, {3: 3}, {2: 2, 0: 4}]
    assert all((label == NO_LABEL).sum() == CPU.chunk - len(taken) for taken, (_, label) in zip(slots, seen))


def test_evaluations_are_counted(schedule) -> None:
    ten = replace(OPTIONS, steps=10)  # 100, 90, ... 10
    for options, expected in ((ten, 10), (replace(ten, guidance=2.0), 20),
                              (replace(ten, guidance=2.0, guidance_interval=(30, 60)), 13),
                              (replace(ten, guidance_interval=(30, 60)), 10)):
        calls: list[int] = []
        network = lambda x, t, label: calls.append(len(x)) or 0 * x  # noqa: E731
        drawn(network, schedule, options, 0, range(3), torch.zeros(3).long())
        assert evaluations(schedule, options) == expected == sum(calls) / CPU.chunk


def test_the_network_is_given_chunks_of_one_size(schedule):
    sizes = []

    def network(x, t, label):
        sizes.append(len(x))
        return torch.zeros_like(x)

    for guidance in (1.0, 2.0):
        drawn(network, schedule, replace(OPTIONS, guidance=guidance), 0, range(70), torch.zeros(70).long())
    assert sizes == [CPU.chunk] * 2 * OPTIONS.steps + [2 * CPU.chunk] * 2 * OPTIONS.steps


def test_the_noise_is_standard_normal_and_its_own_for_each_image(schedule):
    """With a denoiser of zero, what an ancestral step leaves is noise."""
    trace, seen = Trace(), []

    def network(x, t, label):
        seen.append(x.clone())
        return torch.zeros_like(x)

    options, labels = replace(OPTIONS, sampler="ddpm"), torch.zeros(64).long()
    drawn(network, replace(schedule, prediction="x0"), options, 3, range(64), labels, trace)
    first, second, _ = seen
    assert trace.timesteps == spaced_timesteps(100, 3) and len(trace.states) == 4
    assert abs(first.mean()) < 0.02 and abs(first.std() - 1) < 0.02
    correlation = torch.corrcoef(first.flatten(1)) - torch.eye(64)
    assert correlation.abs().max() < 0.2
    s = trace.timesteps[1]
    assert abs(second.std() - schedule.sigma[s].item()) < 0.02
    fresh = second - second.flatten().dot(first.flatten()) / first.square().sum() * first
    assert fresh.std() > 0.5 * second.std()  # new noise came in


def test_a_state_that_is_not_finite_is_a_user_error(schedule):
    with pytest.raises(UserError, match="finite"):
        drawn(lambda x, t, label: x * float("nan"), schedule, OPTIONS, 0, [0], torch.tensor([1]))


def test_more_steps_than_timesteps_is_a_user_error(network, schedule):
    with pytest.raises(UserError, match="--steps 101"):
        drawn(network, schedule, replace(OPTIONS, steps=101), 0, [0], torch.tensor([1]))


def test_digits_are_cycled_over_the_indices():
    assert choose_labels("0123456789", 0, range(12)).tolist() == [*range(10), 0, 1]
    assert choose_labels("7", 5, range(3)).tolist() == [7, 7, 7]
    assert choose_labels("305", 0, [7, 0, 2]).tolist() == [0, 3, 5]
    assert choose_labels("none", 0, range(3)).tolist() == [NO_LABEL] * 3
    for digits in (None, "12", "none"):
        labels = choose_labels(digits, 0, range(4))
        assert labels.dtype == torch.int64 and labels.shape == (4,)


MNIST_CLASSES = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


@pytest.mark.parametrize("classes", [MNIST_CLASSES, [1] * 10, [], [0, 1, 0, 0, 0, 2, 0, 0, 0, 997]])
def test_labels_have_the_shares_of_the_training_images(classes):
    shares = torch.tensor(classes or [1] * 10).double()
    shares /= shares.sum()
    for seed, count in ((0, 1000), (3, 10_000), (7, 64_000)):
        labels = choose_labels(None, seed, range(count), classes)
        for block in labels.split(100):
            assert (torch.bincount(block, minlength=10) - 100 * shares).abs().max() <= 1
        assert (torch.bincount(labels, minlength=10) - count * shares).abs().max() <= 2


def test_a_network_that_has_seen_sevens_is_asked_for_sevens():
    assert choose_labels(None, 5, range(250), [0] * 7 + [40, 0, 0]).tolist() == [7] * 250


def test_labels_follow_from_seed_and_index_and_show_no_pattern():
    labels = choose_labels(None, 0, range(5000), MNIST_CLASSES)
    indices = [4999, 17, 0, 250]
    assert torch.equal(choose_labels(None, 0, indices, MNIST_CLASSES), labels[indices])
    assert (choose_labels(None, 1, range(5000), MNIST_CLASSES) == labels).float().mean() < 0.13
    for step in (1, 16):  # neighbours in a row, or in a column of a grid of 256, are independent: 99 degrees of freedom
        pairs = torch.bincount(labels[:-step] * 10 + labels[step:], minlength=100)
        assert ((pairs - 50.0) ** 2 / 50).sum() < 190


def test_the_default_interval_fits_the_number_of_noise_levels(network, schedule) -> None:
    """100 of them here; one's own is taken as it is."""
    trained = Trained(network, schedule, Config(), {})
    assert guided(SampleConfig(), trained, CPU).guidance_interval == (45, 60)
    assert guided(SampleConfig(guidance_interval=(1, 7)), trained, CPU).guidance_interval == (1, 7)
