"""The optimizer, AdamW or Muon, its learning rate, and the moving average of the weights.

A step whose loss or gradient is not `finite` changes nothing. The device decides that; the host does not wait for it.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import TrainConfig

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
    """Muon with Nesterov momentum, as torch.optim.Muon, for 4-D weights.

    On a CPU all weights of one shape move at once. Elsewhere, where a kernel takes longer to launch than to compute,
    all weights do: as matrices of one size, the smaller ones with zeros around them, which change nothing.
    """

    found_inf: Tensor

    def __init__(self, weights: Sequence[nn.Parameter], **options: Any) -> None:
        super().__init__(weights, options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size | None, list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    alike.setdefault(weight.shape if weight.device.type == "cpu" else None, []).append(weight)
            for weights in alike.values():
                self.move(weights, group)

    def move(self, weights: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        """One update of weights [a, b, k, k], here matrices [a, k * k * b], flattened."""
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        gradients = [cast(Tensor, weight.grad) for weight in weights]
        buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
        numbers = torch.cat([each.permute(0, 2, 3, 1).flatten() for each in (*weights, *gradients, *buffers)])
        old, grads, momenta = numbers.chunk(3)  # each [n]
        new_momenta = momenta.lerp(grads, 1 - MOMENTUM)
        shapes = tuple((len(weight), weight[0].numel()) for weight in weights)
        lr, change = group["lr"], orthogonal_change(grads.lerp(new_momenta, MOMENTUM), shapes)
        new = old * (1 - lr * group["weight_decay"]) - lr * change
        finite, sizes = self.found_inf == 0, [weight.numel() for weight in weights]
        results = (*torch.where(finite, new, old).split(sizes),
                   *torch.where(finite, new_momenta, momenta).split(sizes))
        targets = [each.permute(0, 2, 3, 1) for each in (*weights, *buffers)]  # each [a, k, k, b]
        torch._foreach_copy_(targets, [result.view_as(target) for result, target in zip(results, targets)])


def orthogonal_change(directions: Tensor, shapes: tuple[tuple[int, int], ...]) -> Tensor:
    """Orthogonalized matrices of these shapes, scaled to AdamW's size (2502.16982, eq. 4); flattened [n]."""
    if len(set(shapes)) == 1:
        return 0.2 * max(shapes[0]) ** 0.5 * orthogonalized(directions.view(-1, *shapes[0])).flatten()
    sources, places, scales = padding(shapes, directions.device)
    return (scales * orthogonalized(F.pad(directions, (0, 1))[sources])).flatten()[places]


@cache  # a captured CUDA graph goes on reading them
def padding(shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """To lay matrices of these shapes, flattened and concatenated to n numbers, into N of one size [a, b], and back.

    The number that belongs into each place of [N, a, b], n for none; the places [n] of the numbers among N * a * b; and
    the scale of each matrix [N, 1, 1]. Tall matrices lie on their side.
    """
    sizes = [a * b for a, b in shapes]
    sources = torch.full((len(shapes), max(map(min, shapes)), max(map(max, shapes))), sum(sizes))
    for matrix, (a, b), numbers in zip(sources, shapes, torch.arange(sum(sizes)).split(sizes)):
        matrix[:min(a, b), :max(a, b)] = numbers.view(a, b).mT if a > b else numbers.view(a, b)
    places = sources.flatten().argsort(stable=True)[:sum(sizes)]
    scales = torch.tensor([0.2 * max(shape) ** 0.5 for shape in shapes])[:, None, None]
    return sources.to(device), places.to(device), scales.to(device)


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
