"""The optimizer, AdamW or Muon, its rate, and the moving average of the weights.

A step that is not `good` changes nothing, which is decided on the device, so that the host never waits for it.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from config import TrainConfig
from support.runtime import side_by_side

MOMENTUM = 0.95
ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # of Newton and Schulz, as in torch.optim.Muon


class Optimizer:
    """AdamW, or Muon (arXiv 2510.19376 for U-Nets) for the matrices of inner convolutions with AdamW for all else.

    Muon's update is scaled to AdamW's size (2502.16982, section 2.2), so both share one rate and one decay.
    """

    def __init__(self, network: nn.Module, options: TrainConfig) -> None:
        muon = options.optimizer == "muon"
        inner = [p for p in network.parameters() if muon and p.ndim == 4 and min(p.shape[:2]) > 1]
        chosen = {id(p) for p in inner}
        rest = [p for p in network.parameters() if id(p) not in chosen]
        self.rate = torch.tensor(options.lr, device=rest[0].device)
        common: dict[str, Any] = {"lr": self.rate, "weight_decay": options.weight_decay}
        self.parts: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(rest, betas=(0.9, 0.99), fused=True, capturable=self.rate.is_cuda, **common)}
        vars(self.parts["adamw"])["_warned_capturable_if_run_uncaptured"] = True  # it would, of every graph's warm-up
        if inner:
            self.parts["muon"] = Muon(inner, **common)

    def set_rate(self, rate: float) -> None:
        self.rate.fill_(rate)

    def step(self, good: Tensor) -> None:
        """One update by the gradients, or none: good, bool [], is on the parameters' device."""
        if good.device.type == "mps" and not good:  # whose fused AdamW may not know found_inf; this waits
            return
        for part in self.parts.values():
            part.found_inf = (~good).float()  # type: ignore[attr-defined]  # torch's own name, of its gradient scaler
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises LookupError, ValueError, TypeError or AttributeError for anything but such an optimizer's state."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
            for group in part.param_groups:
                group["lr"] = self.rate
                if "capturable" in group:  # the run may have been on another device
                    group["capturable"] = self.rate.is_cuda
            for weight, values in part.state.items():
                for key, value in values.items():
                    if value.ndim and value.shape != weight.shape:  # torch does not look at shapes
                        raise ValueError("its shapes are not those of the weights")
                    if value.ndim:  # nor at the layout, which the fused kernels take for the weight's
                        values[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum (torch.optim.Muon), all matrices of one shape at once, and `found_inf` as AdamW."""

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
            work = [partial(self.move, weights, group) for weights in alike.values()]
            side_by_side(work, self.found_inf.device)

    def move(self, weights: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        """One update of weights of one shape."""
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        gradients = [cast(Tensor, weight.grad) for weight in weights]
        buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
        old, slopes, momenta = (torch.stack([as_matrix(each) for each in those])
                                for those in (weights, gradients, buffers))
        new = muon_update(old, slopes, momenta, group["lr"], group["weight_decay"], self.found_inf)
        torch._foreach_copy_([as_matrix(each) for each in (*weights, *buffers)], [*new[0], *new[1]])


def muon_update(weights: Tensor, gradients: Tensor, momenta: Tensor, rate: Tensor, decay: float,
                found_inf: Tensor) -> tuple[Tensor, Tensor]:
    """New weights and momenta of matrices [N, a, b]; the old ones where found_inf is 1."""
    moved = momenta.lerp(gradients, 1 - MOMENTUM)
    change = orthogonalized(gradients.lerp(moved, MOMENTUM))
    scale = 0.2 * max(weights.shape[1:]) ** 0.5
    return (torch.where(found_inf == 1, weights, weights * (1 - rate * decay) - rate * scale * change),
            torch.where(found_inf == 1, momenta, moved))


def orthogonalized(matrices: Tensor) -> Tensor:
    """About U V' of each matrix U S V' of [N, a, b], in bfloat16, by Newton and Schulz's iteration."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def as_matrix(weight: Tensor) -> Tensor:
    """A convolution's weight [a, b, k, k] as [a, k * k * b]: a view where it is channels_last."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def learning_rate(options: TrainConfig, step: int, progress: float) -> float:
    """The rate of a step: risen over the warm-up, then decayed over the run, of which `progress` (0 to 1) is over."""
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return options.lr * decay[options.lr_schedule] * min(1.0, (step + 1) / max(1, options.warmup))


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, gain: Tensor, good: Tensor) -> None:
    """average += gain (network - average), for each weight (not for buffers: no layer here has any); gain [] or 0."""
    averages: list[Tensor] = list(average.parameters())
    towards = torch._foreach_sub(list(network.parameters()), averages)
    torch._foreach_mul_(towards, good * gain)
    torch._foreach_add_(averages, towards)
