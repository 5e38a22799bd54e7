"""One training step: batch, loss, gradient and update of the network, and the moving average of its weights.

What a step does is decided by this file and those that it imports, directly or not. `code_digests` identifies their
versions, so that a run is not continued by other code unnoticed. So this file imports nothing that logs or plots.
"""

import ast
import copy
import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from config import ROOT, Config
from dataset import NO_LABEL, LabelledImages, random_batch, to_unit
from diffusion import diffusion_loss, make_schedule, stratified_timesteps
from model import UNet
from optimizer import Optimizer, update_average
from support.cuda_graphs import CudaGraph, compiled
from support.randomness import DROPOUT_STREAM, seed_of
from support.runtime import Runtime, cast_together


class Learner:
    """A network in training: the step takes the batch of a step number, which follows from (seed, number) alone."""

    def __init__(self, config: Config, images: LabelledImages, runtime: Runtime) -> None:
        torch.manual_seed(seed_of(config.seed))
        self.config, self.images, self.runtime = config, images, runtime
        self.schedule = make_schedule(config.diffusion)
        self.schedule.copy_to(runtime.device)
        self.focus = self.schedule.focus  # here, since a compiler can't trace a property that is cached
        self.network = UNet(config.model).to(runtime.device).to(memory_format=torch.channels_last).train()
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)  # its weights averaged over the steps
        self.optimizer = Optimizer(self.network, config.train)
        self._network = self.network if runtime.world == 1 else DistributedDataParallel(self.network)
        self._compiled_loss = compiled(self.loss, runtime, config.train.deterministic)
        alone_on_cuda = runtime.device.type == "cuda" and runtime.world == 1
        self._captured_update = CudaGraph(self.update) if runtime.compile and alone_on_cuda else self.update

    def step(self, number: int, lr: float) -> Tensor:
        """One step, of all processes together; the batch's mean loss [], nan if the step was skipped."""
        config, device = self.config, self.runtime.device
        if config.model.dropout:
            torch.manual_seed(seed_of(config.seed, DROPOUT_STREAM, number, self.runtime.rank))
        self.optimizer.lr.fill_(lr)
        batch = random_batch(config.seed, number, config.train.batch_size, len(self.images), device)
        ema_rate = 1 - min(config.train.ema, (1 + number) / (10 + number))  # the first averages are short-lived
        with self.runtime.deterministic(config.train.deterministic):
            return self._captured_update(*batch, torch.full((), ema_rate, device=device))

    def update(self, indices: Tensor, uniform: Tensor, noise: Tensor, ema_rate: Tensor) -> Tensor:
        """What a step does with `random_batch`; a loss or gradient that is not finite never reaches the weights.

        The device decides everything here: the host launches the step and does not wait for it. On a GPU this becomes
        one CUDA graph, so that this Python runs in the first steps only: what changes later has to be an argument.
        """
        loss = self._compiled_loss(indices, uniform, noise)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.train.grad_clip)
        total = loss.detach()
        if self.runtime.world > 1:
            torch.distributed.all_reduce(total)
            total /= self.runtime.world
        finite = torch.isfinite(norm + total)
        self.optimizer.step(finite)
        update_average(self.average, self.network, ema_rate, finite)
        self.network.zero_grad()
        return torch.where(finite, total, torch.nan)

    def loss(self, indices: Tensor, uniform: Tensor, noise: Tensor) -> Tensor:
        """The loss [] of this process's share of a batch, such that the mean over processes is the batch's mean."""
        options, runtime, schedule = self.config.train, self.runtime, self.schedule
        share = slice(runtime.rank, None, runtime.world)
        t = stratified_timesteps(schedule.timesteps, options.batch_size, uniform[:1], options.focus, self.focus)
        labels = self.images.labels[indices].masked_fill(uniform[1:] < options.label_dropout, NO_LABEL)
        x0 = to_unit(self.images.images[indices[share]])
        weights = cast_together(self._network) if self.config.precision == "bf16" else {}
        with runtime.autocast(self.config.precision == "bf16"):
            losses = diffusion_loss(lambda *inputs: functional_call(self._network, weights, inputs), schedule, x0,
                                    labels[share], t[share], noise[share], options.clip_loss)
        return losses.sum() * (runtime.world / options.batch_size)  # the shares may differ by one image


def code_digests() -> dict[str, str]:
    """Digest of each file that decides what a training step does, by name: this one and all that it imports.

    config.py is not among them: its values are stored and compared one by one.
    """
    names = [Path(__file__).name]
    for name in names:  # which grows
        for node in ast.walk(ast.parse((ROOT / name).read_text("utf-8"))):
            parts = ([node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
                     if isinstance(node, ast.ImportFrom) else
                     [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
            files = {f"{part.replace('.', '/')}.py" for part in parts}
            names += [file for file in files - {*names, "config.py"} if (ROOT / file).is_file()]
    return {name: hashlib.sha256((ROOT / name).read_text("utf-8").encode()).hexdigest()[:16] for name in sorted(names)}
