"""The U-Net: (x, t, label) -> prediction.

Residual blocks at 28, 14 and 7 pixels. Time and label reach each block as a scale and a shift of its normalised
activations. The output of each block on the way down is added to the input of its counterpart on the way up.
Knows no schedule, no loss and no sampler.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from dataset import NO_LABEL
from support import code

code.register(__file__)

RESOLUTIONS = (28, 14, 7)  # pixels at the three stages


class GroupNorm(nn.GroupNorm):
    """In the precision of its weights, float32, as on CUDA: a CPU's bfloat16 kernel takes four times as long."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Embedding(nn.Embedding):
    """By a product with a one-hot (a GPU adds a lookup's gradients in any order); zeros for an index out of range."""

    def forward(self, index: Tensor) -> Tensor:
        one_hot = index[:, None] == torch.arange(self.num_embeddings, device=index.device)  # [B, N]
        return (one_hot[:, :, None] * self.weight).sum(1)  # [B, width]; not a matrix product, which may be in bfloat16


class ResidualBlock(nn.Module):
    """x + conv(act(scale, shift(norm(conv(act(norm(x))))))), as in arXiv 2105.05233, at one resolution."""

    def __init__(self, channels: int, config: ModelConfig) -> None:
        super().__init__()
        self.norm_in = GroupNorm(config.groups, channels)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = nn.Linear(config.embedding, 2 * channels)
        self.norm_out = GroupNorm(config.groups, channels)
        self.dropout = nn.Dropout(config.dropout)
        self.conv_out = zeroed(nn.Conv2d(channels, channels, 3, padding=1))  # the block starts as the identity

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv_in(F.silu(self.norm_in(x)))  # [B, C, H, W]
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)  # [B, C, 1, 1]
        h = F.silu(torch.addcmul(shift, self.norm_out(h), 1 + scale))
        return x + self.conv_out(self.dropout(h))


class Attention(nn.Module):
    """Self-attention over all pixels, with heads of about 32 channels, added to its input."""

    def __init__(self, channels: int, config: ModelConfig) -> None:
        super().__init__()
        self.heads = max(heads for heads in range(1, max(1, channels // 32) + 1) if channels % heads == 0)
        self.norm = GroupNorm(config.groups, channels)
        self.query_key_value = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        h = self.query_key_value(self.norm(x)).flatten(2)  # [B, 3C, H*W]
        q, k, v = h.unflatten(1, (3, self.heads, -1)).transpose(-1, -2).unbind(1)  # each [B, heads, H*W, C/heads]
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)  # [B, heads, C/heads, H*W]
        return x + self.out(h.flatten(1, 2).unflatten(-1, size))


class Stage(nn.Module):
    """One residual block at one resolution, with attention where the config has it."""

    def __init__(self, channels: int, resolution: int, config: ModelConfig) -> None:
        super().__init__()
        self.block = ResidualBlock(channels, config)
        self.attention = Attention(channels, config) if resolution in config.attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.block(x, embedding))


class UNet(nn.Module):
    """Predicts noise, x0 or v, as it was trained to (U-Net: arXiv 1505.04597; for diffusion: 2006.11239, appendix B).

    forward(x [B, 1, 28, 28] in [-1, 1] plus noise, t [B] in 1..T, label int64 [B]) -> [B, 1, 28, 28]; label 10 means
    "no label". Skip connections are added, not concatenated, and the way up has no 3x3 convolution outside its blocks:
    the stage at 28 pixels takes far more of the time than its share of the operations.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels, width = config.channels, config.embedding
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = Embedding(NO_LABEL + 1, width)
        self.stem = nn.Conv2d(1, channels[0], 3, padding=1)

        self.down, self.up, self.shrink, self.grow = (nn.ModuleList() for _ in range(4))
        for level, resolution in enumerate(RESOLUTIONS):
            level_channels = channels[level]
            if level:
                self.shrink.append(nn.Conv2d(channels[level - 1], level_channels, 3, stride=2, padding=1))
                self.grow.append(nn.ConvTranspose2d(level_channels, channels[level - 1], 2, stride=2))
            for stages in (self.down, self.up):
                stages.append(nn.ModuleList(Stage(level_channels, resolution, config)
                                            for _ in range(config.blocks[level])))

        self.norm = GroupNorm(config.groups, channels[0])
        self.head = zeroed(nn.Conv2d(channels[0], 1, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        width = self.label.embedding_dim
        embedding = F.silu(self.time(time_features(t, width).to(x.dtype)) + self.label(label))  # [B, width]
        x = self.stem(x)  # [B, C28, 28, 28]
        skips = []
        for level in range(len(self.down)):
            if level:
                x = self.shrink[level - 1](x)  # [B, C14, 14, 14], then [B, C7, 7, 7]
            for stage in cast(nn.ModuleList, self.down[level]):
                x = stage(x, embedding)
                skips.append(x)
        for level in reversed(range(len(self.up))):
            for stage in cast(nn.ModuleList, self.up[level]):
                x = stage(x + skips.pop(), embedding)
            if level:
                x = self.grow[level - 1](x)  # [B, C14, 14, 14], then [B, C28, 28, 28]
        return self.head(F.silu(self.norm(x)))  # [B, 1, 28, 28]


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with all its parameters at zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def time_features(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of t [B] at `width / 2` frequencies from 1 to 1e-4 -> [B, width] (arXiv 1706.03762, 3.5)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(1e4) / half))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
