"""Ready for a GPU, as far as a machine without one can tell: no waits, devices that don't mix, types, and our Muon."""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import config as configs
import dataset
import drawing
import train
from benchmarks.common import Operations
from config import Config, ModelConfig, UserError
from dataset import Digits
from diffusion import diffusion_loss, make_schedule
from model import UNet
from support.optimizer import Muon, update_average
from support.runtime import Runtime
from tests.conftest import TINY

CPU = Runtime(torch.device("cpu"), bf16=False, compile=False)
GOOD, BAD = torch.tensor(True), torch.tensor(False)


def tiny_run(*flags: str) -> train.Run:
    config = configs.parse(["--dataset", "generated", "--batch-size", "8", *TINY, *flags])
    return train.new_run(config, CPU, dataset.load(config, "train"), dataset.load(config, "test"))


def test_a_step_learns_at_the_levels_in_focus(monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen = tiny_run("--focus", "0.999"), []
    loss = train.diffusion_loss
    monkeypatch.setattr(train, "diffusion_loss", lambda *inputs: seen.append(inputs[4]) or loss(*inputs))
    train.training_step(train.learner(run), run)
    low, high = run.schedule.focus
    assert len(seen[0]) == 8 and seen[0].min() > low and seen[0].max() <= high


@pytest.mark.parametrize("flags", [(), ("--optimizer", "adamw", "--dropout", "0.1", "--attention", "7")])
def test_a_step_never_waits_for_the_device(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU too, an operation for whose result the host waits can be told by its name."""
    run = tiny_run(*flags)
    learn = train.learner(run)
    for name in ("tolist", "numpy", "cpu"):  # these leave no operation
        monkeypatch.setattr(Tensor, name, lambda *_: pytest.fail("the host waits"))
    for _ in range(3):
        with Operations() as watched:
            run.optimizer.set_rate(1e-3)
            run.unread.append(train.training_step(learn, run))
        run.step += 1
        assert watched.waits == 0 and watched.count > 100
    monkeypatch.undo()
    with Operations() as watched:
        bool(run.unread[0] > 0)
    assert watched.waits == 1
    train.read_losses(run)
    assert run.history["running"][1] == 3 and not run.unread


def test_the_average_is_short_lived_at_first() -> None:
    run = tiny_run()
    learn, weight = train.learner(run), lambda network: network.head.weight.detach().clone()
    for step in range(3):
        before = weight(run.average)
        run.optimizer.set_rate(1e-2)
        train.training_step(learn, run)
        run.step += 1
        kept = (1 + step) / (10 + step)
        torch.testing.assert_close(weight(run.average), kept * before + (1 - kept) * weight(run.network))
        assert not torch.equal(weight(run.average), before)


def test_muon_leaves_alone_what_has_no_gradient() -> None:
    weights = parameters([(8, 8, 3, 3)] * 3)
    weights[0].grad, weights[2].grad = torch.ones_like(weights[0]), torch.randn_like(weights[2])
    before = [weight.detach().clone() for weight in weights]
    muon = Muon(weights, lr=0.1, weight_decay=0.1)
    muon.found_inf = torch.tensor(0.0)
    muon.step()
    assert [torch.equal(*pair) for pair in zip(before, weights)] == [False, True, False]


def test_losses_are_added_in_order_and_bad_steps_counted() -> None:
    run = tiny_run()
    run.unread = [torch.tensor(value) for value in (0.1, 0.7, torch.nan, 0.2, torch.nan, torch.nan)]
    expected = sum(torch.tensor(value).item() for value in (0.1, 0.7, 0.2))
    train.read_losses(run)
    assert run.history["running"] == [expected, 3] and run.history["skipped"] == 3 and run.bad == 2


def parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=random).to(memory_format=torch.channels_last))
            for shape in shapes]


def test_muon_is_torchs_on_matrices_of_many_shapes() -> None:
    ours = parameters([(8, 16, 3, 3), (24, 8, 1, 1), (8, 16, 3, 3), (16, 8, 2, 2), (8, 16, 3, 3)])
    theirs = [nn.Parameter(p.detach().permute(0, 2, 3, 1).flatten(1).clone()) for p in ours]
    options = {"lr": 0.02, "weight_decay": 0.1}
    muon, expected = Muon(ours, **options), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw",
                                                                         **options)
    random = torch.Generator().manual_seed(2)
    for _ in range(4):
        for own, other in zip(ours, theirs):
            own.grad = torch.randn(own.shape, generator=random).to(memory_format=torch.channels_last)
            other.grad = own.grad.permute(0, 2, 3, 1).flatten(1)
        muon.found_inf = torch.tensor(0.0)
        muon.step()
        expected.step()
        for own, other in zip(ours, theirs):
            torch.testing.assert_close(own.permute(0, 2, 3, 1).flatten(1), other, rtol=0, atol=1e-3)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_average_by_hand(decay: float) -> None:
    network = nn.Linear(3, 2)
    average = copy.deepcopy(network)
    for step in range(5):
        before, good = average.weight.clone(), step != 3
        if good:
            network.weight.data.normal_()
        update_average(average, network, torch.tensor(1 - decay), GOOD if good else BAD)
        if not good:
            assert torch.equal(average.weight, before)
        else:
            torch.testing.assert_close(average.weight, decay * before + (1 - decay) * network.weight)


def test_a_graph_is_captured_once_and_goes_with_its_network(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[Any] = []

    def capture(function: Any) -> Any:
        captured.append(seen := [])
        return lambda x, t, label: seen.append(len(x)) or x + len(x)

    monkeypatch.setattr(drawing, "Captured", capture)
    drawing._GRAPHS.clear()
    network, other = nn.Linear(1, 1), nn.Linear(1, 1)
    for module, sizes in ((network, (3, 6, 3)), (network, (6,)), (other, (3,))):
        graphed = drawing._graphed(module)
        for size in sizes:
            assert torch.equal(graphed(torch.zeros(size), torch.zeros(size), torch.zeros(size)),
                               torch.full((size,), size))
    assert captured == [[3, 3], [6, 6], [3]] and len(drawing._GRAPHS) == 2
    del network, other, module, graphed
    assert len(drawing._GRAPHS) == 0


def loss_of(network: UNet, digits: Digits) -> Tensor:
    t = torch.randint(1, 1001, (len(digits),), device=digits.labels.device)
    return diffusion_loss(network, make_schedule(Config().diffusion), digits.images.float(), digits.labels, t,
                          torch.randn_like(digits.images.float()), clip=True)


@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="it asks for a real driver")
def test_forward_and_loss_stay_on_one_device() -> None:
    """On a pretended GPU, where an operation on tensors of two devices fails."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for attention in ((), (7, 14)):
            with torch.device("cuda"):
                network = UNet(ModelConfig(attention=attention))
                digits = Digits(torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.zeros(4, dtype=torch.long))
            loss = loss_of(network, digits)
            assert loss.device.type == "cuda" and loss.shape == (4,) and loss.dtype == torch.float32


def test_bf16_keeps_the_loss_in_float32() -> None:
    network, digits = UNet(ModelConfig()), Digits(torch.zeros(2, 1, 28, 28), torch.tensor([3, 10]))
    seen: list[torch.dtype] = []

    def forward(*arguments: Tensor) -> Tensor:
        seen.append((answer := network(*arguments)).dtype)
        return answer

    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(forward, digits)  # type: ignore[arg-type]
    loss.sum().backward()
    assert seen == [torch.bfloat16] and loss.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in network.parameters())


def test_a_compiled_run_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for a GPU, forward and backward; benchmarks/gpu.py generates the code, which takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    plain = tiny_run()
    traced = train.new_run(plain.config, Runtime(CPU.device, bf16=False, compile=True), plain.train, plain.test)
    learners = train.learner(plain), train.learner(traced)
    for step in range(20):
        losses = []
        for run, learn in zip((plain, traced), learners):
            run.optimizer.set_rate(1e-3 * (step + 1))
            losses.append(train.training_step(learn, run).item())
            run.step += 1
        assert losses[0] == pytest.approx(losses[1], abs=1e-3), step
    assert losses[0] < 0.9


def test_a_long_streak_of_bad_steps_ends_a_run_though_the_last_was_good() -> None:
    run = tiny_run()
    run.unread = [torch.tensor(value) for value in (0.1, *[torch.nan] * train.BAD_STEPS, 0.2)]
    with pytest.raises(UserError, match="not finite in 20 steps in a row"):
        train.read_losses(run)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it takes a GPU")
@pytest.mark.parametrize("flags, graphs", [((), False), (("--dropout", "0.1"), True)])
def test_a_gpu_learns_and_draws_the_same_in_graphs(flags: tuple[str, ...], graphs: bool) -> None:
    """As launched one by one; with dropout, which a compiler has its own numbers for, as in other graphs."""
    cuda, run = torch.device("cuda", 0), tiny_run(*flags)
    one, other = (train.new_run(run.config, Runtime(cuda, bf16=False, compile=compile), run.train.to(cuda),
                                run.test.to(cuda)) for compile in (graphs, True))
    learners = train.learner(one), train.learner(other)
    for step in range(20):
        losses = []
        for run, learn in zip((one, other), learners):
            run.optimizer.set_rate(1e-3)
            losses.append(train.training_step(learn, run).item())
            run.step += 1
        assert losses[0] == pytest.approx(losses[1], abs=1e-3), step
    before = other.network.head.weight.clone()
    indices, uniform, noise = train.draw_batch(other)
    assert learners[1](indices, uniform, noise * torch.nan, torch.tensor(0.9, device=cuda)).isnan()
    assert torch.equal(other.network.head.weight, before)
    trained = drawing.Trained(other.average, other.schedule, other.config, other.history)
    order = drawing.Order(other.config.sample, 0, range(5), torch.arange(5))
    drawn = [drawing.draw(trained, order, replace(other.runtime, compile=compile)) for compile in (True, False, True)]
    assert torch.equal(drawn[0], drawn[2])
    torch.testing.assert_close(drawn[0], drawn[1])
    train.training_step(learners[1], other)  # the graph sees the new weights
    again = [drawing.draw(trained, order, replace(other.runtime, compile=compile)) for compile in (True, False)]
    torch.testing.assert_close(*again)
    assert not torch.equal(again[0], drawn[0])
