"""One training step: batch, loss, gradient and update of the network, and the moving average of its weights.

Knows neither the loop nor files nor pictures. Files that decide what a step does register with support/code.py.
"""

import copy

import torch
from torch import Tensor, nn

from config import Config
from dataset import NO_LABEL, LabelledImages, random_batch, to_unit
from diffusion import diffusion_loss, make_schedule, stratified_timesteps
from model import UNet
from support import code
from support.cuda_graphs import CudaGraph, compiled
from support.precision import autocast, deterministic
from support.randomness import DROPOUT_STREAM, seed_of
from support.runtime import Runtime
from training.optimizer import Optimizer, update_average

code.register(__file__)


class Learner:
    """A network in training: the step takes the batch of a step number, which follows from (seed, number) alone.

    All processes start with the same weights, which follow from the seed.
    """

    def __init__(self, config: Config, images: LabelledImages, runtime: Runtime) -> None:
        torch.manual_seed(seed_of(config.seed))
        self.config, self.images, self.runtime = config, images, runtime
        self.schedule = make_schedule(config.diffusion)
        self.schedule.copy_to(runtime.device)
        self.focus = self.schedule.focus  # here, since a compiler can't trace a property that is cached
        self.network = UNet(config.model).to(runtime.device).to(memory_format=runtime.memory_format).train()
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)  # its weights averaged over the steps
        self.optimizer = Optimizer(self.network, config.train)
        # Functions, not methods of this object: in a cycle of references, its memory would wait for the collector.
        self.compiled_loss = compiled(Learner.loss, runtime, config.train.deterministic)
        alone_on_cuda = runtime.device.type == "cuda" and runtime.world == 1
        self.graph = CudaGraph(runtime) if runtime.compile and alone_on_cuda else None

    def start_from(self, network: UNet, *, same_classes: bool) -> None:
        """Takes the weights of a network; other classes keep their random embeddings, to be learned anew."""
        weights = network.state_dict()
        if not same_classes:
            classes = self.network.state_dict()["label.weight"][:NO_LABEL]
            weights["label.weight"] = torch.cat([classes, weights["label.weight"][NO_LABEL:]])
        for part in (self.network, self.average):
            part.load_state_dict(weights)

    @property
    def slow_steps(self) -> int:
        """Steps at the start of a process that may compile for minutes, and are not counted as training time."""
        return CudaGraph.WARM_UPS + 1 if self.graph else int(self.runtime.compile)

    def step(self, number: int, lr: float) -> Tensor:
        """One step, of all processes together; the batch's mean loss [], nan if the step was skipped."""
        config, runtime = self.config, self.runtime
        if config.model.dropout:
            torch.manual_seed(seed_of(config.seed, DROPOUT_STREAM, number, runtime.rank))
        self.optimizer.lr.fill_(lr)
        batch = random_batch(config.seed, number, config.train.batch_size, len(self.images), runtime.device)
        ema_rate = 1 - min(config.train.ema, (1 + number) / (10 + number))  # the first averages are short-lived
        inputs = (*batch, torch.full((), ema_rate, device=runtime.device))
        with deterministic(runtime.device, config.train.deterministic, runtime.say):
            return self.graph(self.update, *inputs) if self.graph else self.update(*inputs)

    def update(self, indices: Tensor, uniform: Tensor, noise: Tensor, ema_rate: Tensor) -> Tensor:
        """What a step does with `random_batch`; a loss or gradient that is not finite never reaches the weights.

        The device decides everything here: the host launches the step and does not wait for it. On a GPU this becomes
        one CUDA graph, so that this Python runs in the first steps only: what changes later has to be an argument.
        """
        self.network.zero_grad()
        loss = self.compiled_loss(self, indices, uniform, noise)
        loss.backward()
        loss = loss.detach()
        if self.runtime.world > 1:
            self.add_up(loss)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.train.grad_clip)
        finite = torch.isfinite(norm + loss)
        self.optimizer.step(finite)
        update_average(self.average, self.network, ema_rate, finite)
        return torch.where(finite, loss, torch.nan)

    def add_up(self, loss: Tensor) -> None:
        """Adds up the loss and the gradients of all processes, in place and in one message."""
        values = [loss, *(weight.grad for weight in self.network.parameters() if weight.grad is not None)]
        message = torch.cat([value.flatten() for value in values])
        torch.distributed.all_reduce(message)
        for value, part in zip(values, message.split([value.numel() for value in values])):
            value.copy_(part.view_as(value))

    def loss(self, indices: Tensor, uniform: Tensor, noise: Tensor) -> Tensor:
        """The part [] of a batch's mean loss that this process's share of its images makes up."""
        options, runtime, schedule = self.config.train, self.runtime, self.schedule
        share = slice(runtime.rank, None, runtime.world)
        t = stratified_timesteps(schedule.timesteps, options.batch_size, uniform[:1], options.focus, self.focus)
        labels = self.images.labels[indices].masked_fill(uniform[1:] < options.label_dropout, NO_LABEL)
        x0 = to_unit(self.images.images[indices[share]])
        with autocast(runtime.device, self.config.precision == "bf16"):
            losses = diffusion_loss(self.network, schedule, x0, labels[share], t[share], noise[share],
                                    options.clip_loss)
        return losses.sum() / options.batch_size
