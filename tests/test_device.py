"""Ready for a GPU, as far as a machine without one can tell: no waits, devices that don't mix, types, and our Muon."""

import contextlib
import copy
import re
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import config as configs
import dataset
import sample
import training.log
import training.loop
import training.step
from benchmarks.common import Operations
from config import Config, ModelConfig, UserError
from dataset import LabelledImages
from diffusion import diffusion_loss, make_schedule
from evaluation import evaluate, reference
from evaluation.classifier import load_classifier
from model import UNet
from support import checkpoint, loading, plots, settings
from support.cuda_graphs import compiled
from support.precision import deterministic
from support.runtime import Runtime, fast_bf16, make_runtime
from tests.conftest import TINY, write_set
from tests.fake_mps import MPS, FakeMps, pretended_mps
from tests.processes import nothing
from training.log import current_model
from training.optimizer import Muon, update_average
from training.state import BAD_STEPS, TrainingState, new_state, read_losses

CPU = Runtime(torch.device("cpu"), bf16=False, compile=False)
SCHEDULE = make_schedule(Config().diffusion)
FINITE, NOT_FINITE = torch.tensor(True), torch.tensor(False)


def tiny_state(*flags: str, runtime: Runtime = CPU) -> TrainingState:
    config = settings.parse(["--mode", "train", "--dataset", "generated", "--batch-size", "8", "--precision",
                             "fp32", *TINY, *flags])
    images = (loading.load_split(config, split).to(runtime.device) for split in ("train", "test"))
    return new_state(config, runtime, *images)


def watched(state: TrainingState) -> dict[str, set[torch.dtype]]:
    """What each kind of layer of the network and of its average gave, filled in as they are called."""
    seen: dict[str, set[torch.dtype]] = {}

    def watch(layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen.setdefault(type(layer).__name__, set()).add(output.dtype)

    for module in (*state.learner.network.modules(), *state.learner.average.modules()):
        module.register_forward_hook(watch)
    return seen


def sample_two(state: TrainingState) -> None:
    model = current_model(state)
    sample.sample_images(model, sample.make_request(model, configs.SampleConfig(steps=2), 0, 2))


def test_a_step_learns_at_the_levels_in_focus(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, seen = tiny_state("--focus", "0.999").learner, []
    monkeypatch.setattr(training.step, "diffusion_loss",
                        lambda *inputs: seen.append(inputs[4]) or diffusion_loss(*inputs))
    learner.step(0, lr=1e-3)
    low, high = learner.schedule.focus
    assert len(seen[0]) == 8 and seen[0].min() > low and seen[0].max() <= high


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_step_learns_a_share_of_its_images_without_labels(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, seen = tiny_state("--label-dropout", str(share), "--batch-size", "200").learner, []
    monkeypatch.setattr(training.step, "diffusion_loss",
                        lambda *inputs: seen.append(inputs[3]) or diffusion_loss(*inputs))
    learner.step(0, lr=1e-3)
    labels = learner.images.labels[dataset.random_batch(0, 0, 200, len(learner.images))[0]]
    dropped = seen[0] == dataset.NO_LABEL
    assert dropped.double().mean() == pytest.approx(share, abs=0.1) and (share == 0.4 or dropped.all() == (share == 1))
    assert torch.equal(seen[0][~dropped], labels[~dropped])


@pytest.mark.parametrize("flags", [(), ("--optimizer", "adamw", "--dropout", "0.1", "--attention", "7")])
def test_a_step_never_waits_for_the_device(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU too, an operation for whose result the host waits can be told by its name."""
    state = tiny_state(*flags)
    assert state.learner.schedule.focus  # found once, on the CPU
    for name in ("tolist", "numpy", "cpu"):  # these leave no operation
        monkeypatch.setattr(Tensor, name, lambda *_: pytest.fail("the host waits"))
    for step in range(3):
        with Operations() as watched:
            state.pending_losses.append(state.learner.step(step, lr=1e-3))
        assert watched.waits == 0 and watched.count > 100
    monkeypatch.undo()
    with Operations() as watched:
        bool(state.pending_losses[0] > 0)
    assert watched.waits == 1
    read_losses(state)
    assert state.history["running"][1] == 3 and not state.pending_losses


def test_the_average_is_short_lived_at_first() -> None:
    learner = tiny_state().learner

    def weight(network: nn.Module) -> Tensor:
        return network.head.weight.detach().clone()

    for step in range(3):
        before = weight(learner.average)
        learner.step(step, lr=1e-2)
        kept = (1 + step) / (10 + step)
        torch.testing.assert_close(weight(learner.average), kept * before + (1 - kept) * weight(learner.network))
        assert not torch.equal(weight(learner.average), before)


def test_muon_leaves_alone_what_has_no_gradient() -> None:
    weights = parameters([(8, 8, 3, 3)] * 3)
    weights[0].grad, weights[2].grad = torch.ones_like(weights[0]), torch.randn_like(weights[2])
    before = [weight.detach().clone() for weight in weights]
    muon = Muon(weights, lr=0.1, weight_decay=0.1)
    muon.found_inf = torch.tensor(0.0)
    muon.step()
    assert [torch.equal(*pair) for pair in zip(before, weights)] == [False, True, False]


def test_losses_are_added_in_order_and_skipped_steps_counted() -> None:
    state = tiny_state()
    state.pending_losses = [torch.tensor(value) for value in (0.1, 0.7, torch.nan, 0.2, torch.nan, torch.nan)]
    expected = sum(torch.tensor(value).item() for value in (0.1, 0.7, 0.2))
    assert read_losses(state) == expected / 3
    assert state.history["running"] == [expected, 3] and state.history["skipped"] == 3
    assert state.skipped_in_a_row == 2


def parameters(shapes: list[tuple[int, ...]],
               layout: torch.memory_format = torch.channels_last) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=random).to(memory_format=layout)) for shape in shapes]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_muon_is_torchs_on_matrices_of_many_shapes(layout: torch.memory_format) -> None:
    """Wide, tall and square; those of one shape are updated together."""
    shapes = [(8, 16, 3, 3), (24, 8, 1, 1), (8, 16, 3, 3), (16, 4, 2, 2), (8, 16, 3, 3), (40, 8, 2, 2)]
    ours = parameters(shapes, layout)
    theirs = [nn.Parameter(p.detach().permute(0, 2, 3, 1).flatten(1).clone()) for p in ours]
    options = {"lr": 0.02, "weight_decay": 0.1}
    muon, expected = Muon(ours, **options), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    random = torch.Generator().manual_seed(2)
    for _ in range(4):
        for own, other in zip(ours, theirs):
            own.grad = torch.randn(own.shape, generator=random).to(memory_format=layout)
            other.grad = own.grad.permute(0, 2, 3, 1).flatten(1)
        muon.found_inf = torch.tensor(0.0)
        muon.step()
        expected.step()
        for own, other in zip(ours, theirs):
            torch.testing.assert_close(own.permute(0, 2, 3, 1).flatten(1), other, rtol=0, atol=1e-3)


@pytest.mark.parametrize("flags", [(), ("--attention", "7", "--dropout", "0.1", "--optimizer", "adamw"),
                                   ("--precision", "bf16", "--label-dropout", "0.5")])
def test_no_operation_of_a_step_adds_numbers_in_any_order_on_a_gpu(flags: tuple[str, ...]) -> None:
    """As those do that torch lists under use_deterministic_algorithms, and a lookup whose gradient is compiled."""
    state, seen = tiny_state(*flags), set[str]()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func.overloadpacket.__name__.rstrip("_"))
            return func(*args, **(kwargs or {}))

    with Names():
        state.learner.step(0, lr=1e-3)
    assert "convolution_backward" in seen
    assert not [name for name in seen if re.search("embedding|index_|scatter|put|gather|cumsum|histc|median|pool|"
                                                   "upsample|pad.*backward|nll|grid|repeat_interleave", name)]


@pytest.mark.parametrize("flag, wanted", [((), True), (("--no-deterministic",), False)])
def test_a_step_is_deterministic_unless_told_otherwise(flag: tuple[str, ...], wanted: bool,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(training.step, "deterministic",
                        lambda device, wanted, say: asked.append(wanted) or contextlib.nullcontext())
    tiny_state(*flag).learner.step(0, lr=1e-3)
    assert asked == [wanted]


def test_an_operation_without_a_deterministic_form_is_said_once_and_ends_no_run(
        capsys: pytest.CaptureFixture[str]) -> None:
    """As torch does on a GPU; of the operations about which it warns there, put_ is one that it knows on a CPU too."""
    gpu = torch.device("cuda", 0)
    for device, wanted in ((torch.device("cpu"), True), (gpu, False)):
        with deterministic(device, wanted, print):
            assert not torch.are_deterministic_algorithms_enabled()
    for _ in range(2):
        with pytest.warns(UserWarning, match="another"), deterministic(gpu, True, print):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.utils.deterministic.fill_uninitialized_memory
            x = torch.zeros(3)
            x.put_(torch.tensor([0]), torch.ones(1))
            warnings.warn("another warning", UserWarning, stacklevel=1)
        assert x[0] == 1
    said = capsys.readouterr().out
    assert said.count("put_ has no deterministic form") == 1 and "deterministic" not in said.split("\n", 1)[1]
    with pytest.raises(RuntimeError, match="mistake"), deterministic(gpu, True, print):
        raise RuntimeError("a mistake")
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_average_by_hand(decay: float) -> None:
    network = nn.Linear(3, 2)
    average = copy.deepcopy(network)
    for step in range(5):
        before, finite = average.weight.clone(), step != 3
        if finite:
            network.weight.data.normal_()
        update_average(average, network, torch.tensor(1 - decay), FINITE if finite else NOT_FINITE)
        if not finite:
            assert torch.equal(average.weight, before)
        else:
            torch.testing.assert_close(average.weight, decay * before + (1 - decay) * network.weight)


def loss_of(network: UNet, data: LabelledImages) -> Tensor:
    t = torch.randint(1, 1001, (len(data),), device=data.labels.device)
    return diffusion_loss(network, SCHEDULE, data.images.float(), data.labels, t,
                          torch.randn_like(data.images.float()), clip=True)


@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="it asks for a real driver")
def test_forward_and_loss_stay_on_one_device() -> None:
    """On a pretended GPU, where an operation on tensors of two devices fails."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for attention in ((), (7, 14)):
            with torch.device("cuda"):
                network = UNet(ModelConfig(attention=attention))
                data = LabelledImages(torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.zeros(4, dtype=torch.long))
            loss = loss_of(network, data)
            assert loss.device.type == "cuda" and loss.shape == (4,) and loss.dtype == torch.float32


def test_bf16_keeps_the_loss_in_float32() -> None:
    network, data = UNet(ModelConfig()), LabelledImages(torch.zeros(2, 1, 28, 28), torch.tensor([3, 10]))
    seen: list[torch.dtype] = []

    def forward(*arguments: Tensor) -> Tensor:
        seen.append((answer := network(*arguments)).dtype)
        return answer

    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(forward, data)  # type: ignore[arg-type]
    loss.sum().backward()
    assert seen == [torch.bfloat16] and loss.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in network.parameters())


@pytest.mark.parametrize("fast", [False, True])
def test_auto_is_bf16_where_the_cpu_is_fast_at_it(fast: bool, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    """There, convolutions and linear layers, in training, sampling and test losses; all else stays in float32."""
    monkeypatch.setattr("support.runtime.fast_bf16", lambda device: fast)
    state = tiny_state("--precision", "auto", runtime=make_runtime(Config(device="cpu", compile="off")))
    chosen = "bf16" if fast else "fp32"
    assert settings.stored(state.config)["precision"] == state.config.precision == chosen
    training.log.announce(state, None)
    assert f", {chosen}: " in capsys.readouterr().out.splitlines()[0]
    seen = watched(state)
    step = torch.bfloat16 if fast else torch.float32
    assert state.learner.step(1, 1e-3).dtype == torch.float32
    assert seen["Conv2d"] == seen["ConvTranspose2d"] == seen["Linear"] == {step}
    assert seen["GroupNorm"] == {torch.float32}
    for part in state.learner.optimizer.parts.values():
        assert {value.dtype for values in part.state.values() for value in values.values()} == {torch.float32}
    assert {p.dtype for p in (*state.learner.network.parameters(), *state.learner.average.parameters())} == {
        torch.float32}
    for other in (training.log.test_loss, sample_two):
        seen.clear()
        other(state)
        assert seen["Conv2d"] == seen["Linear"] == {step} and seen["GroupNorm"] == {torch.float32}


@pytest.mark.parametrize("amx, avx512, vendor, fast", [
    (True, True, "GenuineIntel", True), (False, True, "GenuineIntel", False), (False, True, "AuthenticAMD", True),
    (False, False, "AuthenticAMD", False)])
@pytest.mark.parametrize("windows", [False, True])
def test_which_cpus_are_fast_at_bf16(amx: bool, avx512: bool, vendor: str, fast: bool, windows: bool,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Intel's with AVX512-BF16 but without AMX, as a virtual machine may hide it, are slower at it than in float32."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)

    def read_text(path: Path, *_: str) -> str:
        if windows:
            raise FileNotFoundError(path)
        return f"processor\t: 0\nvendor_id\t: {vendor}\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr("platform.processor", lambda: f"AMD64 Family 25, {vendor}" if windows else "x86_64")
    assert fast_bf16(torch.device("cpu")) == fast


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("precision, expected", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_explicit_precision_holds_everywhere(precision: Any, expected: torch.dtype, fast: bool,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """In training steps, test losses and sampling, whatever the CPU is fast at."""
    monkeypatch.setattr("support.runtime.fast_bf16", lambda device: fast)
    state = tiny_state("--precision", precision, runtime=make_runtime(Config(device="cpu", precision=precision)))
    seen = watched(state)
    for work in (lambda state: state.learner.step(1, 1e-3), training.log.test_loss, sample_two):
        seen.clear()
        work(state)
        assert seen["Conv2d"] == seen["Linear"] == {expected} and seen["GroupNorm"] == {torch.float32}


def test_a_compiled_run_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for a GPU, forward and backward; benchmarks/gpu.py generates the code, which takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    plain, traced = (tiny_state(runtime=replace(CPU, compile=compile)).learner for compile in (False, True))
    for step in range(20):
        losses = [learner.step(step, 1e-3 * (step + 1)).item() for learner in (plain, traced)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-3), step
    assert losses[0] < 0.9


@pytest.mark.parametrize("flag, options", [("--deterministic", {"deterministic": True}), ("--no-deterministic", None)])
def test_the_compiler_of_a_gpu_is_deterministic_too(flag: str, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it tries kernels that add in different orders, and takes the fastest."""
    wanted = []
    monkeypatch.setattr(torch, "compile", lambda function, options=None: wanted.append(options) or function)
    chosen = settings.parse(["--mode", "train", flag]).train.deterministic
    compiled(nothing, Runtime(torch.device("cuda", 0), bf16=True, compile=True), chosen)()
    assert wanted[-1] == options


def test_many_skipped_steps_in_a_row_end_a_run_though_the_last_was_finite() -> None:
    state = tiny_state()
    state.pending_losses = [torch.tensor(value) for value in (0.1, *[torch.nan] * BAD_STEPS, 0.2)]
    with pytest.raises(UserError, match="not finite in 20 steps in a row"):
        read_losses(state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it takes a GPU")
@pytest.mark.parametrize("flags, graphs", [((), False), (("--dropout", "0.1"), True)])
def test_a_gpu_learns_the_same_in_graphs(flags: tuple[str, ...], graphs: bool,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """As launched one by one; with dropout, which a compiler has its own numbers for, as in other graphs."""
    cuda = torch.device("cuda", 0)
    one, other = (tiny_state("--precision", "fp32", *flags, runtime=Runtime(cuda, bf16=False, compile=compile))
                  for compile in (graphs, True))
    for step in range(20):
        losses = [state.learner.step(step, lr=1e-3).item() for state in (one, other)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-3), step
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.learner.step(20, lr=0.0)  # never waits for the GPU
    finally:
        torch.cuda.set_sync_debug_mode("default")

    def not_finite(*arguments: Any) -> tuple[Tensor, ...]:
        indices, uniform, noise = dataset.random_batch(*arguments)
        return indices, uniform, noise * torch.nan

    before = other.learner.network.head.weight.clone()
    with monkeypatch.context() as patch:
        patch.setattr(training.step, "random_batch", not_finite)
        assert other.learner.step(20, lr=1e-3).isnan()
    assert torch.equal(other.learner.network.head.weight, before)


# An Apple GPU


def test_an_apple_gpu_trains_logs_samples_and_evaluates(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both modes as they are, with a pretended device and the classifier of MNIST instead of one trained for it."""
    monkeypatch.setattr(plots, "save_losses", nothing)
    monkeypatch.setattr(training.log, "PREVIEW_STEPS", 1)
    monkeypatch.setattr(reference, "dataset_classifier", lambda *_: load_classifier())
    data = ["--data-dir", str(write_set(own_folder / "data", train=600, test=100)), "--steps", "2"]
    runtime = Runtime(MPS, bf16=False, compile=False)
    with pretended_mps():
        config = settings.parse(["--mode", "train", "--dataset", "idx", *data, "--epochs", "1", "--batch-size", "100",
                                 "--preview", "10", "--num-images", "20", *TINY])
        assert training.loop.main(config, runtime) == 0
        evaluate.main(settings.parse(["--mode", "evaluate", "--name", "idx", *data, "--num-images", "200"]), runtime)
    assert checkpoint.load(Path("checkpoints/idx/last.safetensors"))["step"] == 6
    written = {path.name for path in Path("results/idx").iterdir()}
    assert written >= {"metrics.csv", "preview-0000001.png", "sample.png", "samples.npz", "metrics.json"}


def test_the_pretended_gpu_refuses_what_a_real_one_does() -> None:
    with pretended_mps():
        x = torch.ones(3).to("mps")
        assert isinstance(x + 1, FakeMps) and (x * 2).device == MPS and x.cpu().device.type == "cpu"
        for refused in (lambda: x.double(), lambda: torch.zeros(2, device=MPS, dtype=torch.float64),
                        lambda: torch.ones(3).double().to(MPS), lambda: x + torch.ones(3), lambda: x.numpy()):
            with pytest.raises((TypeError, RuntimeError)):
                refused()
