"""The optimizer, AdamW or Muon, and the moving average of the weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from config import TrainConfig


class Optimizer:
    """AdamW, or Muon (arXiv 2510.19376 for U-Nets) for the matrices of inner convolutions with AdamW for all else.

    Muon's update is scaled to AdamW's size (2502.16982, section 2.2), so both share one rate and one decay.
    """

    def __init__(self, network: nn.Module, options: TrainConfig) -> None:
        muon = options.optimizer == "muon"
        inner = [p for p in network.parameters() if muon and p.ndim == 4 and min(p.shape[:2]) > 1]
        chosen = {id(p) for p in inner}
        self.matrices = [(nn.Parameter(as_matrix(p.detach())), p) for p in inner]  # the same memory, seen as a matrix
        assert all(matrix.data_ptr() == p.data_ptr() for matrix, p in self.matrices)
        rest = [p for p in network.parameters() if id(p) not in chosen]
        common: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
        adamw = torch.optim.AdamW(rest, betas=(0.9, 0.99), fused=True, **common)
        self.parts: dict[str, torch.optim.Optimizer] = {"adamw": adamw}
        if self.matrices:
            muon_part = torch.optim.Muon([m for m, _ in self.matrices], adjust_lr_fn="match_rms_adamw", **common)
            self.parts["muon"] = muon_part

    def set_rate(self, rate: float) -> None:
        for part in self.parts.values():
            for group in part.param_groups:
                group["lr"] = rate

    def step(self) -> None:
        for matrix, parameter in self.matrices:
            matrix.grad = None if parameter.grad is None else as_matrix(parameter.grad)
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises LookupError, ValueError, TypeError or AttributeError for anything but such an optimizer's state."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
            for weight, values in part.state.items():
                for key, value in values.items():
                    if value.ndim and value.shape != weight.shape:  # torch does not look at shapes
                        raise ValueError("its shapes are not those of the weights")
                    if value.ndim:  # nor at the layout, which the fused kernels take for the weight's
                        values[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def as_matrix(weight: Tensor) -> Tensor:
    """A convolution's weight [a, b, k, k] as [a, k * k * b]: a view where it is channels_last."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def moving_average(network: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the weights, its decay warmed up as (1 + n) / (10 + n), which forgets the start."""
    @torch.no_grad()
    def update(averages: Any, weights: Any, updates: Tensor | int) -> None:
        n = int(updates)
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(network, multi_avg_fn=update)
