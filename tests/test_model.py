"""The U-Net: shapes, what its inputs change, its size and operations; and Muon, which trains its convolutions."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from config import ModelConfig, TrainConfig
from dataset import NO_LABEL
from model import Attention, UNet, time_features
from training.optimizer import Optimizer

SMALL = ModelConfig(channels=(8, 16, 24), blocks=(1, 1, 1), attention=(7,), embedding=16, groups=4)


def small_network(config=SMALL, seed=0):
    """A network whose zero-initialised layers are random instead, as after training."""
    torch.manual_seed(seed)
    network = UNet(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return network


def inputs(batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 1, 28, 28, generator=generator)
    return x, torch.randint(1, 1001, (batch,), generator=generator), torch.randint(0, 11, (batch,), generator=generator)


@pytest.mark.parametrize("config", [
    SMALL,
    replace(SMALL, channels=(16, 16, 16)),
    replace(SMALL, channels=(24, 8, 4)),
    replace(SMALL, blocks=(1, 2, 3)),
    replace(SMALL, blocks=(3, 1, 1), attention=()),
    replace(SMALL, attention=(28, 14, 7)),
    replace(SMALL, channels=(4, 40, 100), attention=(14, 7)),
    replace(SMALL, groups=1, embedding=2),
    replace(SMALL, groups=8, dropout=0.5),
    ModelConfig(),
], ids=str)
def test_prediction_has_the_shape_of_the_image(config):
    network = small_network(config)
    x, t, label = inputs(2)
    with torch.inference_mode():
        y = network(x, t, label)
    assert y.shape == (2, 1, 28, 28) and y.dtype == torch.float32 and torch.isfinite(y).all() and y.std() > 0.01
    blocks, stages = sum(config.blocks), [stage for level in [*network.down, *network.up] for stage in level]
    assert len(stages) == 2 * blocks
    attended = sum(n for n, resolution in zip(config.blocks, (28, 14, 7)) if resolution in config.attention)
    assert sum(isinstance(stage.attention, Attention) for stage in stages) == 2 * attended


def test_an_untrained_network_answers_zero():
    torch.manual_seed(0)
    assert not UNet(ModelConfig())(*inputs()).any()


def test_time_and_label_change_the_answer():
    network = small_network()
    x = inputs(1)[0].expand(11, -1, -1, -1)
    with torch.inference_mode():
        by_label = network(x, torch.full((11,), 500), torch.arange(11))
        times = torch.tensor([1, 2, 3, 10, 30, 100, 300, 500, 700, 999, 1000])
        by_time = network(x, times, torch.full((11,), NO_LABEL))
    for answers in (by_label, by_time):
        distance = torch.cdist(answers.flatten(1), answers.flatten(1)) / answers.std()
        assert distance[~torch.eye(11, dtype=torch.bool)].min() > 1e-3  # each differs from every other


@pytest.mark.parametrize("cut", [0, 1])
def test_skip_connections_carry_the_image_past_the_lower_resolutions(cut):
    network = small_network()
    torch.nn.init.zeros_(network.shrink[cut].weight)
    x, t, label = inputs(1)
    with torch.inference_mode():
        answers = network(torch.cat([x, -x]), t.expand(2), label.expand(2))
    assert (answers[0] - answers[1]).std() > 0.1 * answers.std()


def test_an_image_is_answered_apart_from_its_neighbours():
    network = small_network()
    x, t, label = inputs(4)
    with torch.inference_mode():
        together = network(x, t, label)
        changed = network(torch.cat([x[:1], x[1:] * 3]), t, label)
        swapped = network(x.flip(0), t.flip(0), label.flip(0)).flip(0)
    assert torch.equal(changed[0], together[0])
    torch.testing.assert_close(swapped, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, attention=(28, 14, 7)), ModelConfig()],
                         ids=["small", "attention", "default"])
def test_the_gradient_reaches_every_parameter(config):
    network = small_network(config)
    x, t, _ = inputs(11)
    (network(x, t, torch.arange(11)) * inputs(11, seed=1)[0]).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-8, name
    assert network.label.weight.grad.abs().amax(1).min() > 1e-8  # of each digit, and of no label


def test_channels_last_gives_the_same_answer():
    network = small_network(replace(SMALL, attention=(14, 7)))
    x, t, label = inputs()
    with torch.inference_mode():
        expected = network(x, t, label)
        answer = network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t, label)
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


def test_weights_survive_a_round_trip():
    network, other = small_network(seed=0), UNet(SMALL).eval()
    other.load_state_dict(network.state_dict(), strict=True)
    with torch.inference_mode():
        assert torch.equal(network(*inputs()), other(*inputs()))
    assert not list(network.buffers())  # nothing that an average of the weights would have to leave out


def test_dropout_acts_in_training_only():
    network = small_network(replace(SMALL, dropout=0.5))
    with torch.inference_mode():
        assert torch.equal(network(*inputs()), network(*inputs()))
        network.train()
        assert not torch.equal(network(*inputs()), network(*inputs()))


def test_float64_inputs_need_only_float64_weights():
    network = small_network().double()
    x, t, label = inputs()
    assert network(x.double(), t, label).dtype == torch.float64


def test_attention_is_softmax_of_scaled_dot_products():
    torch.manual_seed(0)
    channels = 64
    attention = Attention(channels, replace(SMALL, channels=(64, 64, 64))).eval()
    torch.nn.init.normal_(attention.out.weight, std=0.1)
    x = torch.randn(2, channels, 3, 3)
    with torch.inference_mode():
        query, key, value = attention.query_key_value(attention.norm(x)).flatten(2).chunk(3, dim=1)  # [2, 64, 9] each
        heads = []
        for q, k, v in zip(query.split(32, dim=1), key.split(32, dim=1), value.split(32, dim=1)):
            share = torch.softmax(torch.einsum("bcm,bcn->bmn", q, k) / math.sqrt(32), dim=2)
            heads.append(torch.einsum("bmn,bcn->bcm", share, v))
        expected = x + attention.out(torch.cat(heads, dim=1).reshape(2, channels, 3, 3))
        torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)


def test_time_features_tell_all_timesteps_apart():
    features = time_features(torch.arange(1, 1001), 128)
    assert features.shape == (1000, 128) and features.abs().max() <= 1
    distance = torch.cdist(features, features) + 9 * torch.eye(1000)
    assert distance.min() > 0.1
    torch.testing.assert_close(features[6, [0, 64]], torch.tensor([math.cos(7), math.sin(7)]))
    assert features[-1, 63] > 0.98  # the slowest wave has hardly begun


def test_the_default_network_is_within_its_budget():
    assert sum(weight.numel() for weight in UNet(ModelConfig()).parameters()) <= 2_300_000
    assert gflop_per_image(ModelConfig()) < 0.4


def gflop_per_image(config):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        UNet(config)(torch.empty(1, 1, 28, 28), torch.empty(1), torch.empty(1, dtype=torch.long))
    return counter.get_total_flops() / 1e9


@pytest.mark.parametrize("attention", [(), (7,), (14, 7)])
def test_gflop_is_a_count_by_hand(attention):
    """Two per multiply-add: convolutions, the layers of the embedding, and the two products of attention."""
    config = replace(SMALL, attention=attention)
    a, b, c = config.channels
    width = config.embedding

    def conv(pixels, channels_in, channels_out, size):
        return pixels**2 * channels_in * channels_out * size**2

    def block(pixels, channels):
        return 2 * conv(pixels, channels, channels, 3) + width * 2 * channels  # scale and shift out of the embedding

    count = 2 * width * width  # the embedding of time
    count += conv(28, 1, a, 3) + conv(28, a, 1, 3)  # stem and head
    count += conv(14, a, b, 3) + conv(7, b, c, 3) + conv(14, c, b, 1) + conv(28, b, a, 1)  # between resolutions
    for pixels, channels in ((28, a), (14, b), (7, c)):
        count += 2 * block(pixels, channels)
        if pixels in attention:
            count += 2 * (conv(pixels, channels, 4 * channels, 1) + 2 * pixels**4 * channels)
    assert gflop_per_image(config) == pytest.approx(2 * count / 1e9, rel=1e-9)


# Muon, on networks in either memory format


def stepped(network, optimizer="muon", steps=2):
    """A copy of the network after a few steps, with gradients that follow from the step and the weight's name."""
    network = copy.deepcopy(network)
    chosen = Optimizer(network, TrainConfig(optimizer=optimizer, lr=1e-2))
    for step in range(steps):
        random = torch.Generator().manual_seed(step)
        for weight in network.parameters():
            weight.grad = torch.empty_like(weight).copy_(torch.randn(weight.shape, generator=random))
        chosen.step(torch.tensor(True))
    return network


def test_muon_moves_every_weight_whatever_its_memory_format():
    """Where weights are not channels_last, their matrices are copies: the update has to reach the weights."""
    config = replace(SMALL, attention=(7,))
    contiguous = small_network(config)
    last, mixed = copy.deepcopy(contiguous).to(memory_format=torch.channels_last), copy.deepcopy(contiguous)
    for weight in [weight for weight in mixed.parameters() if weight.ndim == 4][::2]:  # so one shape has both formats
        weight.data = weight.data.to(memory_format=torch.channels_last)
    networks = {"contiguous": contiguous, "channels_last": last, "mixed": mixed}
    moved = {name: dict(stepped(network).named_parameters()) for name, network in networks.items()}
    for name, before in contiguous.named_parameters():
        after = moved["channels_last"][name]
        assert (after - before).abs().max() > 1e-3, name
        for other in ("contiguous", "mixed"):
            torch.testing.assert_close(moved[other][name], after, rtol=0, atol=1e-6, msg=f"{name}, {other}")
    inner = [name for name, p in contiguous.named_parameters() if p.ndim == 4 and min(p.shape[:2]) > 1]
    adamw = dict(stepped(contiguous, "adamw").named_parameters())
    assert all(not torch.allclose(moved["mixed"][name], adamw[name], atol=1e-3) for name in inner), "not Muon's update"
