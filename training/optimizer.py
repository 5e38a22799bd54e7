"""The optimizer, AdamW or Muon, its learning rate, and the moving average of the weights.

A step whose loss or gradient is not `finite` changes nothing. The device decides that; the host does not wait for it.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from config import TrainConfig, UserError
from support import code

code.register(__file__)

MOMENTUM = 0.95
ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # of Newton and Schulz, as in torch.optim.Muon


class Optimizer:
    """AdamW, or Muon for the weights of inner convolutions (arXiv 2510.19376) with AdamW for the rest.

    Muon's update is scaled to AdamW's size (2502.16982, section 2.2), so both share one learning rate and decay.
    """

    def __init__(self, network: nn.Module, options: TrainConfig) -> None:
        inner, rest = [], list(network.parameters())
        if options.optimizer == "muon":
            inner = [p for p in network.parameters() if p.ndim == 4 and min(p.shape[:2]) > 1]
            rest = [p for p in network.parameters() if p.ndim != 4 or min(p.shape[:2]) == 1]
        elif options.optimizer != "adamw":
            raise UserError(f"--optimizer {options.optimizer}: training/optimizer.py has no such optimizer")
        self.lr = torch.tensor(options.lr, device=rest[0].device)
        common: dict[str, Any] = {"lr": self.lr, "weight_decay": options.weight_decay}
        self.parts: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(rest, betas=(0.9, 0.99), fused=True, capturable=self.lr.is_cuda, **common)}
        vars(self.parts["adamw"])["_warned_capturable_if_run_uncaptured"] = True  # torch warns at each graph's warm-up
        if inner:
            self.parts["muon"] = Muon(inner, **common)

    def step(self, finite: Tensor) -> None:
        """One update by the gradients if `finite`, a bool [] on the parameters' device, is true; else none."""
        if finite.device.type == "mps" and not finite:  # its fused AdamW may ignore found_inf; this waits
            return
        for part in self.parts.values():
            part.found_inf = (~finite).float()  # type: ignore[attr-defined]  # torch's name, from its gradient scaler
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises LookupError, ValueError, TypeError or AttributeError for anything but such an optimizer's state."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
            for group in part.param_groups:
                group["lr"] = self.lr
                if "capturable" in group:  # the run may have been on another device
                    group["capturable"] = self.lr.is_cuda
            for weight, values in part.state.items():
                for key, value in values.items():
                    if value.shape == weight.shape:  # in the layout that fused kernels take to be the weight's
                        values[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, as torch.optim.Muon, for 4-D weights; those of one shape are updated together."""

    found_inf: Tensor

    def __init__(self, weights: Sequence[nn.Parameter], **options: Any) -> None:
        super().__init__(weights, options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for weights in by_shape.values():
                self.update(weights, group)

    def update(self, weights: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        """One update of N weights [a, b, k, k], here matrices [a, k * k * b]."""
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        gradients = [cast(Tensor, weight.grad) for weight in weights]
        buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
        old, grads, momenta = (torch.stack([tensor.permute(0, 2, 3, 1).flatten(1) for tensor in tensors])
                               for tensors in (weights, gradients, buffers))  # each [N, a, k * k * b]
        new_momenta = momenta.lerp(grads, 1 - MOMENTUM)
        scale = 0.2 * max(old.shape[1:]) ** 0.5  # to AdamW's size (2502.16982, eq. 4)
        change = scale * orthogonalized(grads.lerp(new_momenta, MOMENTUM))
        new = old * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * change
        finite = self.found_inf == 0
        for tensors, after, before in ((weights, new, old), (buffers, new_momenta, momenta)):
            targets = [tensor.permute(0, 2, 3, 1) for tensor in tensors]  # each [a, k, k, b]
            torch._foreach_copy_(targets, [matrix.view_as(target) for matrix, target in
                                           zip(torch.where(finite, after, before), targets)])


def orthogonalized(matrices: Tensor) -> Tensor:
    """Approximately U V' of each matrix U S V' [N, a, b], by the Newton-Schulz iteration in bfloat16."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


def run_length(options: TrainConfig, images: int) -> int:
    """Steps in the epochs of these options, each a pass over so many images."""
    return math.ceil(options.epochs * images / options.batch_size)


def progress(options: TrainConfig, images: int, step: int, seconds: float) -> float:
    """The part of a run that is done, 0 to 1: by seconds of training if minutes are given, else by steps."""
    if options.minutes is not None:
        return min(1.0, seconds / (60 * options.minutes))
    return min(1.0, step / run_length(options, images))


def learning_rate(options: TrainConfig, step: int, progress: float) -> float:
    """The rate of a step: rises over the warm-up and decays over the run, of which `progress` (0 to 1) is done."""
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return options.lr * decay[options.lr_schedule] * min(1.0, (step + 1) / max(1, options.warmup))


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, ema_rate: Tensor, finite: Tensor) -> None:
    """average += ema_rate (network - average) for each weight where finite; both [] tensors. Buffers are copied."""
    averages: list[Tensor] = list(average.parameters())
    change = torch._foreach_sub(list(network.parameters()), averages)
    torch._foreach_mul_(change, finite * ema_rate)
    torch._foreach_add_(averages, change)
    for buffer, value in zip(average.buffers(), network.buffers()):  # running means, of layers that have them
        buffer.copy_(value)
