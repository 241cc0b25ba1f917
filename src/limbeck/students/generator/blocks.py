"""Pre-norm attention blocks, and the readers that turn condition states into latents."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from limbeck.config.parts.surgeries import ReaderOptions


def full_precision(device: torch.device) -> AbstractContextManager:
    """No autocast within: generators compute in their parameters' dtype, fp32, whatever the base does."""
    # The meta device, on which large generators are tried out, knows no autocast.
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()


class Attention(nn.Module):
    """Multi-head attention of ``x [N, M, D]`` to ``y [N, S, D]``; ``mask [N, S]`` is True where y may be seen."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_x, self.norm_y = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """The residual branch, ``[N, M, D]``."""
        q = self.q(self.norm_x(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.kv(self.norm_y(y)).chunk(2, -1))
        seen = None if mask is None else mask[:, None, None, :]
        return self.out(scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))


class MLP(nn.Sequential):
    """Norm, widen four times, GELU, narrow: a residual branch."""

    def __init__(self, width: int):
        super().__init__(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Perceiver(nn.Module):
    """Learned latents that attend to the states, then to each other (Jaegle et al. 2021)."""

    def __init__(self, width: int, options: ReaderOptions):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(options.latents, width))
        self.blocks = nn.ModuleList(
            nn.ModuleList([Attention(width, options.heads), Attention(width, options.heads), MLP(width)]) for _ in range(options.blocks)
        )

    def forward(self, states_NSD: Tensor, mask_NS: Tensor) -> Tensor:
        """Latents ``[N, M, D]`` that have read S states each, where ``mask_NS`` is True."""
        x = self.latents.expand(len(states_NSD), -1, -1)
        for read, mix, mlp in self.blocks:
            x = x + read(x, states_NSD, mask_NS)
            x = x + mix(x, x)
            x = x + mlp(x)
        return x


class TransformerReader(nn.Module):
    """A plain bidirectional encoder over the states, averaged to one latent."""

    def __init__(self, width: int, options: ReaderOptions):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList([Attention(width, options.heads), MLP(width)]) for _ in range(options.blocks))

    def forward(self, states_NSD: Tensor, mask_NS: Tensor) -> Tensor:
        """The mean ``[N, 1, D]`` of S encoded states each, over those where ``mask_NS`` is True."""
        x = states_NSD
        for mix, mlp in self.blocks:
            x = x + mix(x, x, mask_NS)
            x = x + mlp(x)
        weights = mask_NS.to(x.dtype).unsqueeze(-1)
        return (x * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)


class ConditionReader(nn.Module):
    """Frozen states ``[N, S, C, D]`` of S texts of C tokens and a mask ``[N, S, C]`` to latents ``[N, M, width]``.

    States are normalised first (some positions of a decoder are hundreds of times larger than the others), and one learned
    state that is always there stands for a condition without text.
    """

    def __init__(self, state_size: int, width: int, options: ReaderOptions):
        super().__init__()
        self.project = nn.Linear(state_size, width)
        self.nothing = nn.Parameter(torch.randn(1, 1, width))
        self.read = (Perceiver if options.kind == "perceiver" else TransformerReader)(width, options)

    def forward(self, states_NSCD: Tensor, mask_NSC: Tensor) -> Tensor:
        """``[N, M, width]``."""
        states = self.project(layer_norm(states_NSCD.flatten(1, 2).to(self.nothing.dtype), states_NSCD.shape[-1:]))
        count = len(states)
        states = torch.cat([self.nothing.expand(count, -1, -1), states], 1)
        mask = torch.cat([mask_NSC.new_ones(count, 1), mask_NSC.flatten(1)], 1)
        return self.read(states, mask)
