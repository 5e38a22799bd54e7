"""training/step.py, and what makes it fast: nothing of that ends a run, costs a result, or keeps memory."""

import contextlib
import copy
import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import training.loop
from dataset import random_batch
from support import loading, settings
from support.cuda_graphs import CudaGraph
from support.runtime import Runtime
from tests.conftest import TINY
from tests.processes import nothing
from training.optimizer import update_average
from training.state import TrainingState, new_state
from training.step import Learner

CPU = Runtime(torch.device("cpu"), bf16=False, compile=False)


def tiny_state(*flags: str, runtime: Runtime = CPU) -> TrainingState:
    config = settings.parse(["--mode", "train", "--dataset", "generated", "--batch-size", "8", "--precision",
                             "fp32", *TINY, *flags])
    images = (loading.load_split(config, split) for split in ("train", "test"))
    return new_state(replace(config, name="tiny"), runtime, *images)


class PretendedGraphs:
    """torch.cuda as far as a CUDA graph needs it; a capture calls its function, or fails."""

    def __init__(self, patch: pytest.MonkeyPatch, fails: bool) -> None:
        self.fails, self.captures, self.replays, self.collecting = fails, 0, 0, list[bool]()
        stream = SimpleNamespace(wait_stream=nothing)
        for name, value in {
                "Stream": lambda: stream, "current_stream": lambda: stream, "set_stream": nothing,
                "stream": lambda _: contextlib.nullcontext(), "graph": self.graph,
                "CUDAGraph": lambda: SimpleNamespace(replay=self.replay)}.items():
            patch.setattr(torch.cuda, name, value)

    @contextlib.contextmanager
    def graph(self, *_: Any, **__: Any) -> Iterator[None]:
        self.captures += 1
        self.collecting.append(gc.isenabled())
        yield
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def replay(self) -> None:
        self.replays += 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_that_can_not_be_captured_runs_as_it_is(fails: bool, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    pretended = PretendedGraphs(monkeypatch, fails)
    graph, calls = CudaGraph(CPU), list[float]()

    def double(x: Tensor) -> Tensor:
        calls.append(x.item())
        return 2 * x

    results = [graph(double, torch.tensor(float(i))).item() for i in range(6)]
    assert pretended.captures == 1 and pretended.collecting == [False] and gc.isenabled()
    output = capsys.readouterr().out
    if fails:  # the call of the failed capture is repeated, and all that follow are plain
        assert calls == [0, 1, 2, 3, 3, 4, 5] and results == [0, 2, 4, 6, 8, 10] and pretended.replays == 0
        assert output.count("can't be captured as a CUDA graph (RuntimeError: operation not permitted") == 1
    else:
        assert calls == [0, 1, 2, 3] and pretended.replays == 3 and not output


def test_a_learner_that_is_dropped_is_freed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory, most of a GPU perhaps, does not wait for the garbage collector."""
    PretendedGraphs(monkeypatch, fails=True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: partial(function))
    learner = tiny_state(runtime=replace(CPU, compile=True)).learner
    learner.graph = CudaGraph(CPU)
    gc.collect()
    gc.disable()
    try:
        for step in range(CudaGraph.WARM_UPS + 2):
            learner.step(step, lr=1e-3)
        watched = weakref.ref(learner), weakref.ref(learner.network.head.weight)
        del learner
        assert [reference() for reference in watched] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("slow_steps, compiles", [(0, False), (1, True)])
def test_compiling_takes_none_of_the_minutes(slow_steps: int, compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a second, the first one ten minutes more where it compiles: a minute is sixty steps after that."""
    clock = SimpleNamespace(seconds=0.0)
    state = tiny_state("--minutes", "1", runtime=replace(CPU, compile=compiles))
    assert state.learner.slow_steps == slow_steps

    def step(number: int, lr: float) -> Tensor:
        clock.seconds += 601 if compiles and number == 0 else 1
        return torch.zeros(())

    for name in ("save", "log_point"):
        monkeypatch.setattr(training.loop, name, nothing)
    monkeypatch.setattr(state.learner, "step", step)
    monkeypatch.setattr(training.loop, "time", SimpleNamespace(perf_counter=lambda: clock.seconds))
    training.loop.train(state)
    assert state.step == 60 + slow_steps and state.history["seconds"] == pytest.approx(60)


def test_the_loss_of_one_of_several_processes_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    state, losses = tiny_state(), []
    batch = random_batch(0, 0, 8, len(state.train))
    for rank in (0, 1):
        learner = Learner(state.config, state.train, replace(CPU, compile=True, rank=rank, world=2))
        losses.append(learner.compiled_loss(learner, *batch).item())
    assert sum(losses) == pytest.approx(state.learner.loss(*batch).item(), rel=1e-5)


def test_an_optimizer_that_nobody_wrote_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is added to the choices in config.py alone."""
    config = settings.parse(["--mode", "train", "--dataset", "generated", *TINY])
    config = replace(config, train=replace(config.train, optimizer="lion"))
    with pytest.raises(Exception, match="--optimizer lion: .* has no such optimizer"):
        Learner(config, loading.load_split(config, "test"), CPU)


def test_running_means_of_a_layer_reach_the_averaged_network() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    average = copy.deepcopy(network)
    network(torch.randn(8, 3) + 5)
    update_average(average, network, torch.tensor(0.1), torch.tensor(True))
    assert torch.equal(average[1].running_mean, network[1].running_mean) and average[1].num_batches_tracked == 1
