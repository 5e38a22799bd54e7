"""The optimizer, AdamW or Muon, its learning rate, and the moving average of the weights.

A step whose loss or gradient is not `finite` changes nothing. The device decides that; the host does not wait for it.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from config import TrainConfig
from support.cuda_graphs import side_by_side

MOMENTUM = 0.95
ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # of Newton and Schulz, as in torch.optim.Muon


class Optimizer:
    """AdamW, or Muon for the weights of inner convolutions (arXiv 2510.19376) with AdamW for the rest.

    Muon's update is scaled to AdamW's size (2502.16982, section 2.2), so both share one learning rate and decay.
    """

    def __init__(self, network: nn.Module, options: TrainConfig) -> None:
        muon = options.optimizer == "muon"
        inner = [p for p in network.parameters() if muon and p.ndim == 4 and min(p.shape[:2]) > 1]
        rest = [p for p in network.parameters() if all(p is not other for other in inner)]
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
                    if value.ndim and value.shape != weight.shape:  # torch does not check shapes
                        raise ValueError("its shapes are not those of the weights")
                    if value.ndim:  # nor the layout, which the fused kernels take to be the weight's
                        values[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, as torch.optim.Muon, for 4-D weights; all of one shape at once."""

    found_inf: Tensor

    def __init__(self, weights: Sequence[nn.Parameter], **options: Any) -> None:
        super().__init__(weights, options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    alike.setdefault(weight.shape, []).append(weight)
            side_by_side([partial(self.move, weights, group) for weights in alike.values()], self.found_inf.device)

    def move(self, weights: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        """One update of weights that have one shape [a, b, k, k]."""
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        gradients = [cast(Tensor, weight.grad) for weight in weights]
        buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
        old, grads, momenta = (torch.stack([each.permute(0, 2, 3, 1).flatten(1) for each in tensors])
                               for tensors in (weights, gradients, buffers))  # [N, a, k * k * b]
        new_momenta = momenta.lerp(grads, 1 - MOMENTUM)
        change = orthogonalized(grads.lerp(new_momenta, MOMENTUM))
        lr, scale = group["lr"], 0.2 * max(old.shape[1:]) ** 0.5
        new = old * (1 - lr * group["weight_decay"]) - lr * scale * change
        finite = self.found_inf == 0
        results = (*torch.where(finite, new, old), *torch.where(finite, new_momenta, momenta))
        targets = [each.permute(0, 2, 3, 1) for each in (*weights, *buffers)]  # [a, k, k, b]
        torch._foreach_copy_(targets, [matrix.view_as(targets[0]) for matrix in results])


def orthogonalized(matrices: Tensor) -> Tensor:
    """Approximately U V' of each matrix U S V' [N, a, b], in bfloat16, by the Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def learning_rate(options: TrainConfig, step: int, progress: float) -> float:
    """The rate of a step: rises over the warm-up and decays over the run, of which `progress` (0 to 1) is over."""
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return options.lr * decay[options.lr_schedule] * min(1.0, (step + 1) / max(1, options.warmup))


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, ema_rate: Tensor, finite: Tensor) -> None:
    """average += ema_rate (network - average) for each weight where finite; both [] tensors. No layer has buffers."""
    averages: list[Tensor] = list(average.parameters())
    change = torch._foreach_sub(list(network.parameters()), averages)
    torch._foreach_mul_(change, finite * ema_rate)
    torch._foreach_add_(averages, change)
