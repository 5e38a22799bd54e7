"""Sampling: an image and its label follow from (seed, index) alone; what is asked for; and the API for scripts."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

import run
from config import Config, DiffusionConfig, ModelConfig, SampleConfig, TrainConfig, UserError
from dataset import NO_LABEL, to_uint8
from diffusion import make_schedule
from model import UNet
from sample import (
    LoadedModel,
    SampleRequest,
    choose_labels,
    load_model,
    make_request,
    provenance,
    sample_images,
)
from samplers import SAMPLERS, spaced_timesteps
from support import checkpoint, settings
from support.runtime import Runtime
from tests.conftest import ROOT

CPU = Runtime(torch.device("cpu"), bf16=False, compile=False)
OPTIONS = SampleConfig(sampler="dpmpp", steps=3, spacing="trailing", guidance=1.0, guidance_interval=(0.0, 1.0))
COUNT = 130  # two whole chunks and a little
SMALL = ModelConfig(channels=(8, 8, 16), blocks=(1, 1, 1), attention=(7,), embedding=16, groups=4)
FIVE = [40, 0, 30, 0, 20, 0, 10, 0, 0, 25]  # training images of each class, of a network that has seen five classes


def model_of(network, schedule, label_dropout=0.1, counts=None, bf16=False):
    stored = settings.stored(Config(train=TrainConfig(label_dropout=label_dropout)))
    history = {"data": {"name": "shapes", "classes": counts}}
    return LoadedModel(network, schedule, replace(CPU, bf16=bf16), stored, history)


def sampled(network, schedule, options, seed, indices, labels, shown=0, bf16=False):
    timesteps = spaced_timesteps(schedule.timesteps, options.steps, options.spacing)
    request = SampleRequest(options, seed, indices, labels, timesteps, options.guidance, options.guidance_interval, "")
    images, states = sample_images(model_of(network, schedule, bf16=bf16), request, shown)
    return (images, states) if shown else images


def answer_zero(x, t, label):
    return torch.zeros_like(x)


def small_network():
    """A small U-Net with random weights in every layer."""
    torch.manual_seed(0)
    unet = UNet(SMALL)
    unet.eval().requires_grad_(False)
    for parameter in unet.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)
    return unet.to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def network():
    return small_network()


@pytest.fixture(scope="module")
def schedule():
    return make_schedule(DiffusionConfig(timesteps=100))


# Images


@pytest.mark.parametrize("options", [
    replace(OPTIONS, sampler="dpmpp"),
    replace(OPTIONS, sampler="sa", guidance=1.5),
    replace(OPTIONS, sampler="ddpm"),
    replace(OPTIONS, sampler="ddpm", variance="upper", guidance=2.0),
    replace(OPTIONS, sampler="ddim", eta=0.5),
], ids=["dpmpp", "sa-guided", "ddpm", "ddpm-guided", "ddim"])
@pytest.mark.parametrize("bf16", [False, True])
def test_an_image_is_bitwise_the_same_alone_and_among_many(network, schedule, options, bf16):
    def chosen(indices):
        return sampled(network, schedule, options, 7, indices, choose_labels(None, 7, indices, range(10)), bf16=bf16)

    everything = chosen(range(COUNT))
    assert everything.shape == (COUNT, 1, 28, 28) and everything.dtype == torch.float32
    assert torch.isfinite(everything).all() and len(everything.flatten(1).unique(dim=0)) == COUNT
    for indices in ([0], [37], [63], [64], [COUNT - 1], [COUNT - 1, 3, 70, 2], range(60, 68)):
        assert torch.equal(chosen(indices), everything[list(indices)]), indices


def test_images_follow_from_the_seed(network, schedule):
    labels = torch.zeros(4).long()
    one, again, other = (sampled(network, schedule, OPTIONS, seed, range(4), labels) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not any(torch.equal(a, b) for a in one for b in other)


def test_every_label_reaches_its_own_image(schedule):
    """With a network that answers x0 = label / 20, the images are their labels."""
    def network(x, t, label):
        return (label / 20)[:, None, None, None].expand_as(x)

    indices, labels = [129, 4, 64, 5, 0], torch.tensor([9, 1, 8, 0, 3])
    images = sampled(network, replace(schedule, prediction="x0"), OPTIONS, 0, indices, labels)
    assert torch.equal(images, network(images, None, labels))


def test_image_i_takes_slot_i_of_its_chunk(schedule):
    seen = []

    def network(x, t, label):
        seen.append((x.clone(), label.clone()))
        return torch.zeros_like(x)

    sampled(network, schedule, replace(OPTIONS, steps=1), 0, [130, 66, 3, 64], torch.tensor([1, 2, 3, 4]))
    slots = [{slot: label[slot].item() for slot in x.flatten(1).any(1).nonzero().flatten().tolist()}
             for x, label in seen]
    assert sorted(slots, key=len) == [{2: 1}, {3: 3}, {2: 2, 0: 4}]
    assert all((label == NO_LABEL).sum() == CPU.chunk - len(taken) for taken, (_, label) in zip(slots, seen))


def test_the_network_is_given_chunks_of_one_size(schedule):
    sizes = []

    def network(x, t, label):
        sizes.append(len(x))
        return torch.zeros_like(x)

    for guidance in (1.0, 2.0):
        sampled(network, schedule, replace(OPTIONS, guidance=guidance), 0, range(70), torch.zeros(70).long())
    assert sizes == [CPU.chunk] * 2 * OPTIONS.steps + [2 * CPU.chunk] * 2 * OPTIONS.steps


def test_the_noise_is_standard_normal_and_its_own_for_each_image(schedule):
    """With a denoiser of zero, what an ancestral step leaves is noise."""
    seen = []

    def network(x, t, label):
        seen.append(x.clone())
        return torch.zeros_like(x)

    options, labels = replace(OPTIONS, sampler="ddpm"), torch.zeros(64).long()
    _, states = sampled(network, replace(schedule, prediction="x0"), options, 3, range(64), labels, shown=64)
    first, second, _ = seen
    assert states.shape == (4, 64, 1, 28, 28)
    assert abs(first.mean()) < 0.02 and abs(first.std() - 1) < 0.02
    correlation = torch.corrcoef(first.flatten(1)) - torch.eye(64)
    assert correlation.abs().max() < 0.2
    s = spaced_timesteps(100, 3)[1]
    assert abs(second.std() - schedule.sigma[s].item()) < 0.02
    fresh = second - second.flatten().dot(first.flatten()) / first.square().sum() * first
    assert fresh.std() > 0.5 * second.std()  # new noise came in


@pytest.mark.parametrize("shown", [0, 1, 66, 500])
def test_the_states_are_those_of_the_first_images(network, schedule, shown):
    labels = torch.arange(70) % 10
    images, states = sampled(network, schedule, OPTIONS, 2, range(70), labels, shown or 70)
    assert states.shape == (OPTIONS.steps + 1, min(shown or 70, 70), 1, 28, 28) and states.dtype == torch.uint8
    assert torch.equal(states[-1], to_uint8(images)[:states.shape[1]])
    assert states[0].float().std() > 60, "the first state is noise"


def test_a_state_that_is_not_finite_is_a_user_error(schedule):
    with pytest.raises(UserError, match="finite"):
        sampled(lambda x, t, label: x * float("nan"), schedule, OPTIONS, 0, [0], torch.tensor([1]))


def test_more_steps_than_timesteps_is_a_user_error(network, schedule):
    with pytest.raises(UserError, match="--steps 101"):
        make_request(model_of(network, schedule), replace(OPTIONS, steps=101), 0, 1)


# Labels


def test_digits_are_cycled_over_the_indices():
    assert choose_labels("0123456789", 0, range(12), range(10)).tolist() == [*range(10), 0, 1]
    assert choose_labels("7", 5, range(3), range(10)).tolist() == [7, 7, 7]
    assert choose_labels("305", 0, [7, 0, 2], range(10)).tolist() == [0, 3, 5]
    assert choose_labels("none", 0, range(3), range(10)).tolist() == [NO_LABEL] * 3
    for digits in (None, "12", "none"):
        labels = choose_labels(digits, 0, range(4), range(10))
        assert labels.dtype == torch.int64 and labels.shape == (4,)


@pytest.mark.parametrize("classes", [[*range(10)], [0, 2, 4, 6, 9], [3, 8], [7]])
def test_each_block_has_every_class_ten_times(classes):
    size = 10 * len(classes)
    for seed in (0, 3):
        labels = choose_labels(None, seed, range(20 * size), classes)
        for block in labels.split(size):
            assert sorted(block.tolist()) == sorted(classes * 10)
        if len(classes) > 1:
            assert len({tuple(block.tolist()) for block in labels.split(size)}) == 20, "each has an order of its own"


def test_the_order_of_a_block_follows_from_the_seed_and_its_number():
    classes = [0, 2, 4, 6, 9]
    labels = choose_labels(None, 0, range(5000), classes)
    for indices in ([4999, 17, 0, 250], range(150, 200), [149, 150]):
        assert torch.equal(choose_labels(None, 0, indices, classes), labels[list(indices)])
    assert 0.1 < (choose_labels(None, 1, range(5000), classes) == labels).float().mean() < 0.3


def test_labels_show_no_pattern():
    """Neighbours in a row, or in a column of a grid of 256, are independent: 99 degrees of freedom."""
    labels = choose_labels(None, 0, range(5000), range(10))
    for step in (1, 16):
        pairs = torch.bincount(labels[:-step] * 10 + labels[step:], minlength=100)
        assert ((pairs - 50.0) ** 2 / 50).sum() < 190


def test_labels_are_the_classes_that_the_network_has_seen(network, schedule):
    labels = make_request(model_of(network, schedule, counts=FIVE), OPTIONS, 5, 100).labels
    assert torch.bincount(labels, minlength=10).tolist() == [20, 0, 20, 0, 20, 0, 20, 0, 0, 20]
    everything = make_request(model_of(network, schedule), OPTIONS, 5, 100).labels
    assert torch.bincount(everything).tolist() == [10] * 10


@pytest.mark.parametrize("dropout, counts, digits, problem", [
    (0.1, FIVE, "7", "was not trained on class 7; choose from 02469"),
    (0.1, FIVE, "01234", "was not trained on class 1, 3;"),
    (0.0, None, "none", "--label-dropout 0, so it knows images only with"),
    (1.0, None, "7", "--label-dropout 1, so it knows no labels")])
def test_labels_that_nobody_learned_are_refused(network, schedule, dropout, counts, digits, problem):
    model = model_of(network, schedule, dropout, counts)
    with pytest.raises(UserError, match=problem) as caught:
        make_request(model, replace(OPTIONS, digits=digits), 0, 4)
    assert str(caught.value).startswith(f"--digits {digits}: ")
    if digits != "none":
        with pytest.raises(UserError, match=f"^--write {digits}: .*{problem}"):
            make_request(model, replace(OPTIONS, digits=digits, write=digits), 0, 4)
    with pytest.raises(UserError, match=problem):
        model.sample(None if digits == "none" else digits, steps=3)


@pytest.mark.parametrize("dropout, counts, digits", [
    (0.1, FIVE, "4269"), (0.1, FIVE, "none"), (0.0, None, "7"), (1.0, None, "none"), (1.0, None, None)])
def test_labels_that_were_learned_are_not(network, schedule, dropout, counts, digits):
    labels = make_request(model_of(network, schedule, dropout, counts), replace(OPTIONS, digits=digits), 0, 4).labels
    expected = [NO_LABEL] * 4 if dropout == 1 or digits == "none" else [int(digits[i % len(digits)]) for i in range(4)]
    assert labels.tolist() == expected


# Guidance


def guided_timesteps(model, request):
    """The timesteps at which the network is evaluated twice, and all evaluations for an image, as they are run."""
    seen = []

    def network(x, t, label):
        seen.append((t[0].item(), len(x) // CPU.chunk))
        return torch.zeros_like(x)

    sample_images(replace(model, network=network), request)
    return [t for t, times in seen if times == 2], sum(times for _, times in seen)


def test_two_of_thirteen_steps_are_guided(network):
    """Those in 450 < t <= 600 of the default schedule, as in all published pictures."""
    model = model_of(network, make_schedule(DiffusionConfig()))
    request = make_request(model, SampleConfig(steps=13, guidance=2.1, guidance_interval=(0.34, 0.57)), 0, 3)
    guided, calls = guided_timesteps(model, request)
    assert guided == [t for t in request.timesteps if 450 < t <= 600] == [544, 456]
    assert calls == request.evaluations == 15
    assert request.note == "Guidance 2.1 acts in 2 of 13 steps."
    inside = [t for t in range(1, 1001) if 0.34 <= model.schedule.alpha_bar[t] <= 0.57]
    assert inside == [*range(451, 601)]


@pytest.mark.parametrize("kind, timesteps, steps", [("linear", 1000, 13), ("linear", 1000, 50), ("cosine", 300, 13),
                                                    ("linear", 100, 20), ("cosine", 40, 40)])
def test_the_interval_means_the_same_noise_under_every_schedule(network, kind, timesteps, steps):
    model = model_of(network, make_schedule(DiffusionConfig(timesteps, kind)))
    for interval in ((0.34, 0.57), (0.1, 0.9)):  # the default is not treated in another way
        request = make_request(model, SampleConfig(steps=steps, guidance=2.0, guidance_interval=interval), 0, 1)
        guided, calls = guided_timesteps(model, request)
        levels = {t: model.schedule.alpha_bar[t].item() for t in request.timesteps[:-1]}
        assert guided == [t for t, level in levels.items() if interval[0] <= level <= interval[1]] != []
        assert calls == request.evaluations == steps + len(guided)
        assert f"Guidance 2 acts in {len(guided)} of {steps} steps." == request.note


@pytest.mark.parametrize("steps, interval, nearest", [
    (3, (0.34, 0.57), 688), (5, (0.34, 0.57), 614), (1, (0.34, 0.57), 1000), (13, (0.9999, 1.0), 61)])
def test_where_no_step_lies_inside_the_nearest_is_guided(network, steps, interval, nearest):
    model = model_of(network, make_schedule(DiffusionConfig()))
    request = make_request(model, SampleConfig(steps=steps, guidance=8.0, guidance_interval=interval), 0, 2)
    guided, calls = guided_timesteps(model, request)
    levels = {t: model.schedule.alpha_bar[t].item() for t in request.timesteps[:-1]}
    outside = {t: max(interval[0] - level, level - interval[1]) for t, level in levels.items()}
    assert guided == [min(outside, key=outside.get)] == [nearest] and min(outside.values()) > 0
    assert calls == request.evaluations == steps + 1
    assert request.note == (f"Guidance 8 acts in 1 of {steps} steps, the one nearest to the interval (alpha_bar "
                            f"{interval[0]:g} to {interval[1]:g}).")


def test_guidance_changes_the_images_however_few_the_steps(network):
    """Three steps with guidance 8 gave the same bytes as with guidance 1."""
    model = model_of(network, make_schedule(DiffusionConfig()))
    for steps in (1, 3, 5):
        with_it, without = (model.sample("123", steps=steps, guidance=guidance) for guidance in (8.0, 1.0))
        assert not np.array_equal(with_it, without), steps


@pytest.mark.parametrize("dropout, digits, guided", [
    (0.1, None, 3), (0.1, "7", 3), (0.1, "none", 0), (0.0, None, 0), (0.0, "7", 0), (1.0, None, 0), (1.0, "none", 0)])
def test_guidance_needs_images_with_and_without_labels(network, dropout, digits, guided):
    """A network that knows no labels costs one evaluation a step, not two."""
    model = model_of(network, make_schedule(DiffusionConfig()), dropout)
    request = make_request(model, SampleConfig(digits=digits), 0, 2)
    twice, calls = guided_timesteps(model, request)
    assert len(twice) == guided and calls == request.evaluations == SampleConfig.steps + guided
    assert request.note.startswith(f"Guidance {SampleConfig.guidance:g} acts in" if guided else
                                   "No guidance: it compares images with and")
    if not guided:
        with pytest.raises(UserError, match="--guidance 4: this network can't be guided"):
            make_request(model, SampleConfig(digits=digits, guidance=4.0), 0, 2)
    assert make_request(model, SampleConfig(digits=digits, guidance=1.0), 0, 2).note == ""


def test_a_sampler_that_evaluates_twice_a_step_is_counted_right(network, monkeypatch):
    """Heun's method (arXiv 2206.00364, algorithm 1), whose second evaluation may lie inside the interval or not."""
    def heun(denoise, schedule, x, timesteps, randn):
        for t, s in pairwise(timesteps):
            x0_hat = denoise(x, t)
            if s > 0:
                x0_hat = (x0_hat + denoise(x, s)) / 2
            yield s, x, x0_hat

    monkeypatch.setitem(SAMPLERS, "heun", heun)
    model = model_of(network, make_schedule(DiffusionConfig()))
    request = make_request(model, SampleConfig(sampler="heun", steps=13, guidance=2.1), 0, 3)
    guided, calls = guided_timesteps(model, request)
    assert guided == [544, 544, 456, 456] and calls == request.evaluations == 2 * 13 - 1 + len(guided)
    assert request.note == "Guidance 2.1 acts in 2 of 13 steps."


def test_images_say_how_they_were_guided(network):
    model = model_of(network, make_schedule(DiffusionConfig()))
    source = provenance(model, make_request(model, SampleConfig(guidance=2.5), 3, 2))
    assert (source["guidance"], source["guidance_interval"], source["seed"]) == ("2.5", "0.34 0.57", "3")
    assert provenance(model, make_request(model, SampleConfig(digits="none"), 3, 2))["guidance"] == "1"


# The API for scripts


def write_model(path, label_dropout=0.05, counts=FIVE):
    """The checkpoint of a small network on 100 noise levels, as a finished run leaves it."""
    config = Config(dataset="idx", model=SMALL, diffusion=DiffusionConfig(timesteps=100),
                    train=TrainConfig(label_dropout=label_dropout))
    path.parent.mkdir(parents=True)
    checkpoint.save(path, {
        "config": settings.stored(config), "model": None, "ema": small_network().state_dict(), "optimizer": None,
        "step": 5, "history": {"data": {"name": "idx", "classes": counts, "mean": 0.5, "std": 0.25},
                               "alpha_bar": make_schedule(config.diffusion).alpha_bar}})


def written(folder, *flags):
    """The images [N, 28, 28] and labels [N] in samples.npz of --mode sample."""
    assert run.main(["--mode", "sample", *flags]) == 0
    (path,) = folder.glob("results/*/samples.npz")
    with np.load(path) as arrays:
        return arrays["images"], arrays["labels"]


def test_the_shipped_weights_give_a_script_what_they_give_the_command(own_folder, capfd):
    images = load_model("pretrained").sample("77777", steps=3)
    assert images.shape == (5, 28, 28) and images.dtype == np.uint8
    assert capfd.readouterr() == ("", ""), "nothing is printed"
    assert not list(own_folder.iterdir()), "nothing is written"
    theirs, labels = written(own_folder, "--checkpoint", "pretrained", "--digits", "77777", "--num-images", "5",
                             "--steps", "3")
    np.testing.assert_array_equal(images, theirs)
    assert labels.tolist() == [7] * 5 and list(own_folder.glob("results/pretrained-*/sample.png"))


@pytest.mark.parametrize("arguments, flags", [
    ({"labels": "024"}, ["--digits", "024", "--num-images", "3"]),
    ({"labels": [9, 4], "num_images": 66, "seed": 3, "guidance": 4.0}, ["--digits", "94", "--num-images", "66",
                                                                         "--seed", "3", "--guidance", "4"]),
    ({"labels": None, "num_images": 2, "sampler": "ddim", "eta": 0.5, "spacing": "trailing"},
     ["--digits", "none", "--num-images", "2", "--sampler", "ddim", "--eta", "0.5", "--spacing", "trailing"]),
    ({"labels": np.array([6]), "sampler": "ddpm", "variance": "upper", "guidance_interval": (0.0, 0.2)},
     ["--digits", "6", "--num-images", "1", "--sampler", "ddpm", "--variance", "upper", "--guidance-interval", "0",
      "0.2"])], ids=["string", "list", "unlabelled", "array"])
def test_a_script_gets_the_images_of_the_same_flags(own_folder, arguments, flags):
    write_model(own_folder / "checkpoints" / "mine" / "last.safetensors")
    images = load_model("mine").sample(**arguments, steps=4)
    theirs, labels = written(own_folder, "--name", "mine", "--steps", "4", *flags)
    np.testing.assert_array_equal(images, theirs)
    wanted = [NO_LABEL] if arguments["labels"] is None else [int(label) for label in arguments["labels"]]
    assert labels.tolist() == [wanted[i % len(wanted)] for i in range(len(images))]


def test_what_a_script_asks_for_is_checked_as_flags_are(own_folder, capfd):
    write_model(own_folder / "checkpoints" / "mine" / "last.safetensors")
    model = load_model("mine")
    for arguments, problem in (
            ({"steps": 0}, "--steps 0"), ({"steps": 101}, "--steps 101"), ({"steps": "3"}, "--steps 3"),
            ({"sampler": "euler"}, "--sampler euler"), ({"guidance": -1.0}, "--guidance -1"),
            ({"eta": 0.5}, "--eta 0.5: only ddim"), ({"guidance_interval": (0.5, 0.2)}, "--guidance-interval 0.5 0.2"),
            ({"guidance_interval": (450, 600)}, "--guidance-interval 450 600"), ({"seed": -1}, "--seed -1"),
            ({"num_images": 0}, "--num-images 0"), ({"labels": "12a"}, "labels '12a'"), ({"labels": ""}, "labels ''"),
            ({"labels": [3, 10]}, r"labels \[3, 10\]"), ({"labels": [-1]}, r"labels \[-1\]"),
            ({"labels": ["x"]}, "labels"), ({"labels": 2.5}, "labels 2.5"), ({"labels": 7}, "not trained on class 7"),
            ({"labels": [2.5]}, r"labels \[2.5\]"),
            ({"labels": "7"}, "not trained on class 7"),
            ({"labels": None, "guidance": 4.0}, "guidance needs labels"), ({"stepz": 3}, "stepz: no option")):
        with pytest.raises(UserError, match=problem) as caught:
            model.sample(**{"labels": "02", **arguments})
        assert "\n" not in str(caught.value)
    for name, problem in (("nobody", "nobody: there is no such checkpoint"), ("a/folder", "in checkpoints/: mine")):
        with pytest.raises(UserError, match=problem):
            load_model(name)
    with pytest.raises(UserError, match="--device tpu"):
        load_model("mine", device="tpu")
    assert capfd.readouterr() == ("", "")
    assert run.main(["--mode", "sample", "--name", "mine", "--digits", "7"]) == 2
    out, errors = capfd.readouterr()
    assert errors.startswith("error: --digits 7: this network was not trained on class 7") and errors.count("\n") == 1


def test_a_script_may_give_the_numbers_of_numpy_and_torch(own_folder):
    write_model(own_folder / "checkpoints" / "mine" / "last.safetensors")
    model = load_model("mine")
    plain = model.sample("22", 4, 3, steps=2, guidance=2.0, guidance_interval=(0.25, 1.0))
    for labels in (np.array([2, 2]), torch.tensor([2, 2]), np.int64(2), 2):
        given = model.sample(labels, np.int32(4), np.int64(3), steps=np.int64(2), guidance=np.float32(2.0),
                             guidance_interval=np.array([0.25, 1.0]))
        np.testing.assert_array_equal(given, plain)
    np.testing.assert_array_equal(model.sample(2), model.sample("2"))
    for wrong in ({"steps": np.float64(2.5)}, {"steps": np.bool_(True)}, {"seed": np.int64(-1)},
                  {"num_images": np.array([1, 2])}):
        with pytest.raises(UserError, match=f"--{next(iter(wrong)).replace('_', '-')} "):
            model.sample("2", **wrong)


def test_a_script_may_give_any_number_of_labels(own_folder):
    write_model(own_folder / "checkpoints" / "mine" / "last.safetensors")
    model = load_model("mine")
    assert model.sample("02" * 10_000, num_images=2, steps=1).shape == (2, 28, 28)
    with pytest.raises(UserError, match="not trained on class 7") as caught:
        model.sample("7" * 20_000, steps=1)
    assert len(str(caught.value)) < 300


def test_the_host_programs_default_dtype_and_device_change_nothing(own_folder):
    write_model(own_folder / "checkpoints" / "mine" / "last.safetensors")
    for name, labels, options in (("pretrained", "777", {"steps": 3}), ("mine", "02", {"sampler": "ddpm", "steps": 5}),
                                  ("mine", None, {"sampler": "ddim", "eta": 0.5, "steps": 5})):
        plain, trajectory = load_model(name).sample(labels, **options, trajectory=True)
        try:
            torch.set_default_dtype(torch.float64)
            torch.set_default_device("meta")
            model = load_model(name)
            images, again = model.sample(labels, **options, trajectory=True)
            denoised = model.denoiser([2])(torch.zeros(1, 1, 28, 28, dtype=torch.float32, device="cpu"), 50)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        assert (denoised.dtype, denoised.device.type) == (torch.float32, "cpu")
        np.testing.assert_array_equal(images, plain)
        np.testing.assert_array_equal(again.states, trajectory.states)


@pytest.mark.parametrize("entry, name, lines", [
    ("sample", "config", f"import config; sys.path.insert(0, {str(ROOT)!r})"),
    ("run", "model", f"sys.path.append({str(ROOT)!r})")], ids=["imported before", "first on the path"])
def test_modules_of_the_host_program_are_not_taken_for_the_projects(entry, name, lines, own_folder):
    (own_folder / f"{name}.py").write_text("VALUE = 3")
    process = subprocess.run([sys.executable, "-c", f"import sys; {lines}; import {entry}"], cwd=own_folder,
                             capture_output=True, text=True)
    assert process.stderr.splitlines()[-1] == (
        f"ImportError: the module {name} is {own_folder / name}.py, not the one in {ROOT}: give yours another name, or "
        "move it into a package")


def test_a_trajectory_goes_from_noise_to_the_images(own_folder):
    write_model(own_folder / "checkpoints" / "mine" / "last.safetensors")
    model = load_model(own_folder / "checkpoints" / "mine" / "last.safetensors")
    images, trajectory = model.sample([2, 2, 4], num_images=70, guidance=1.0, steps=5, trajectory=True)
    assert images.shape == (70, 28, 28) and isinstance(trajectory.states, np.ndarray)
    assert trajectory.states.shape == (6, 70, 28, 28) and trajectory.states.dtype == np.uint8
    assert trajectory.timesteps == spaced_timesteps(100, 5, "eased") and trajectory.timesteps[::5] == [100, 0]
    np.testing.assert_array_equal(trajectory.states[-1], images)
    np.testing.assert_array_equal(model.sample([2, 2, 4], num_images=70, guidance=1.0, steps=5), images)


def test_without_labels_there_is_one_image_unless_more_are_asked_for(own_folder):
    write_model(own_folder / "checkpoints" / "mine" / "last.safetensors", counts=None)
    model = load_model("mine")
    assert model.sample(None, steps=1).shape == (1, 28, 28)
    assert model.sample(None, 3, steps=1).shape == (3, 28, 28)
    assert model.sample(steps=1).shape == (10, 28, 28), "the ten digits"


def test_a_script_joins_no_processes(own_folder, monkeypatch):
    """Not even with torchrun's environment, in which the command would wait for the others."""
    write_model(own_folder / "checkpoints" / "mine" / "last.safetensors")
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2"),
                        ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setitem(os.environ, name, value)
    model = load_model("mine")
    assert (model.runtime.rank, model.runtime.world) == (0, 1)
    assert model.sample("2", steps=1).shape == (1, 28, 28) and not torch.distributed.is_initialized()


def test_a_loop_of_ones_own_needs_the_denoiser_alone(own_folder):
    write_model(own_folder / "checkpoints" / "mine" / "last.safetensors")
    model = load_model("mine")
    x, labels = torch.randn(2, 1, 28, 28), [2, NO_LABEL]
    with torch.inference_mode():
        plain, guided = (model.denoiser(labels, guidance)(x, 50) for guidance in (1.0, 3.0))
        outside = model.denoiser(labels, 3.0, (0.0, 0.01))(x, 50)
    assert plain.shape == x.shape and torch.equal(outside, plain)
    assert not torch.allclose(guided[0], plain[0], atol=1e-3)
    torch.testing.assert_close(guided[1], plain[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("labels, wrong", [([-1], "-1"), ([2, 12], "12"), (np.array([11]), "11"), ([1.5], "1.5")])
def test_what_is_no_label_is_refused_by_the_denoiser(own_folder, labels, wrong):
    write_model(own_folder / "checkpoints" / "mine" / "last.safetensors")
    with pytest.raises(UserError, match=f"label {wrong}: give classes from 0 to 9, or 10 for no label"):
        load_model("mine").denoiser(labels)


def test_what_is_no_time_is_refused_by_the_denoiser(own_folder):
    write_model(own_folder / "checkpoints" / "mine" / "last.safetensors")
    denoise = load_model("mine").denoiser([2])
    for t in (-1, 0, 101):
        with pytest.raises(UserError, match=f"t = {t}: the network was trained on t from 1 to 100"):
            denoise(torch.zeros(1, 1, 28, 28), t)
    for t in (1, 100, np.int64(50)):
        assert denoise(torch.zeros(1, 1, 28, 28), t).shape == (1, 1, 28, 28)


def test_a_model_in_a_notebook_says_in_one_line_what_it_is() -> None:
    text = repr(load_model("pretrained", device="cpu"))
    assert text.startswith("LoadedModel(") and "trained on mnist, step " in text and len(text) < 250
