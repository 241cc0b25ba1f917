"""LoRAs on paper, and the networks that write them: the Linears of a model, the numbers of an adapter, the parameters of a generator."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from limbeck.planner.architecture import Architecture, Weight, layer_of
from limbeck.planner.devices import PlanError

GROUPS = {
    "attention": ("self_attn", "attention", "self_attention", "attn", "linear_attn"),
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe", "shared_expert", "shared_experts"),
}
"""Words for the Linears below children of these names, as ``limbeck.adapters.targets`` has them."""
_LINEARS = ("attention", "linear_attention", "mixer", "mlp", "shared_expert")
_FUSED = {f"linear_{letter}": "in_proj_qkvz" for letter in "qkvz"} | {"linear_b": "in_proj_ba", "linear_a": "in_proj_ba", "linear_o": "out_proj"}
"""Names met in the wild for projections that a family keeps in one Linear."""
_BORDER, _WIDEST, _NARROWEST, _CELLS, _DEPTH, _KERNEL = 2, 512, 16, 32, 3, 3
"""Of Drag-and-Drop's tokens and decoder: border of a token, widest and narrowest piece, cells of a text, levels, side of a convolution."""


@dataclass(frozen=True)
class Site:
    """One kind of Linear, in all the layers that have it."""

    module: str
    inputs: int
    outputs: int
    layers: tuple[int, ...]

    def numbers(self, rank: int) -> int:
        """Numbers of a LoRA on it."""
        return rank * (self.inputs + self.outputs) * len(self.layers)


@dataclass(frozen=True)
class Network:
    """A network beside a frozen base."""

    weights: tuple[Weight, ...]
    lora: int
    """Numbers that it writes for one condition; 0 for a predictor of deltas."""
    queries: int
    """Queries of a forward pass for one condition."""
    width: int
    blocks: int
    """Residual blocks that every query goes through."""

    @property
    def total(self) -> int:
        """Parameters."""
        return sum(w.count for w in self.weights)


def linears(architecture: Architecture) -> tuple[Site, ...]:
    """Every kind of Linear in the model's layers (stacked experts and routers are none)."""
    found: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    for weight in architecture.weights:
        layer = layer_of(weight.name)
        if layer < 0 or weight.kind not in _LINEARS or len(weight.shape) != 2 or not weight.name.endswith(".weight"):
            continue
        module = weight.name.removesuffix(".weight").split(f".layers.{layer}.", 1)[1]
        found[module, weight.shape[1], weight.shape[0]].append(layer)
    return tuple(Site(module, inputs, outputs, tuple(sorted(layers))) for (module, inputs, outputs), layers in found.items())


def resolve_sites(architecture: Architecture, targets: Sequence[str]) -> tuple[Site, ...]:
    """The Linears that ``attention``, ``mlp``, ``all`` or names such as ``q_proj`` mean; :class:`PlanError` names the nearest."""
    sites = linears(architecture)
    for word in targets:
        if not any(_means(word, site) for site in sites):
            names = sorted({site.module.rsplit(".", 1)[-1] for site in sites})
            if _FUSED.get(word) in names:
                raise PlanError(f"targets: no Linear of {architecture.name} is called '{word}': this family keeps it in the fused `{_FUSED[word]}`")
            near = get_close_matches(word, [*names, *GROUPS, "all"], n=2, cutoff=0.5)
            hint = f" (nearest: {', '.join(near)})" if near else ""
            raise PlanError(
                f"targets: no Linear of {architecture.name} is called '{word}'{hint}; there are {', '.join(names)}, or attention, mlp, all"
            )
    return tuple(site for site in sites if any(_means(word, site) for word in targets))


def _means(word: str, site: Site) -> bool:
    if word == "all":
        return site.outputs > 1
    if word in GROUPS:
        return any(part in GROUPS[word] for part in site.module.split(".")) and site.outputs > 1
    return site.module == word or site.module.endswith(f".{word}")


def lora_numbers(architecture: Architecture, targets: Sequence[str], rank: int) -> int:
    """Numbers of one LoRA: ``rank (inputs + outputs)`` for each Linear."""
    return sum(site.numbers(rank) for site in resolve_sites(architecture, targets))


# -- the networks ---------------------------------------------------------------------------------------------------------


def _attention(width: int) -> int:
    """Two norms, q, k and v, and the output projection, with biases."""
    return 4 * width * width + 8 * width


def _mlp(width: int) -> int:
    """A norm, four times as wide, and back."""
    return 8 * width * width + 7 * width


def _reader(size: int, width: int, options: Any) -> int:
    block = (2 if options.kind == "perceiver" else 1) * _attention(width) + _mlp(width)
    latents = options.latents * width if options.kind == "perceiver" else 0
    return size * width + width + width + latents + options.blocks * block


def generator_network(architecture: Architecture, options: Any, state_size: int, text: tuple[int, int]) -> Network:
    """The generator of ``limbeck.students.generator``: a static LoRA, a reader of conditions, and a decoder."""
    sites, rank, width = resolve_sites(architecture, options.targets), options.rank, options.width
    lora = sum(site.numbers(rank) for site in sites)
    places = sum(len(site.layers) for site in sites)
    if options.decoder == "hyperconv":
        tokens = text[1] * (2 if options.condition == "sentence" else 1)
        count = _hyperconv(sites, rank, (text[0], tokens), state_size)
        return Network((Weight("decoder", (count,), "network"),), lora, places * rank, state_size, _DEPTH)
    weights = [Weight("static", (lora,), "network")]
    if options.condition == "none":
        return Network(tuple(weights), lora, 0, width, 0)
    layers = len({layer for site in sites for layer in site.layers})
    heads = sum(width * (site.inputs + site.outputs) + 2 * len(site.layers) for site in sites)
    decoder = (layers + len(sites) + rank) * width + _attention(width) + options.trunk * _mlp(width) + heads
    weights += [Weight("reader", (_reader(state_size, width, options.reader),), "network"), Weight("decoder", (decoder,), "network")]
    return Network(tuple(weights), lora, places * rank, width, 1 + options.trunk)


def predictor_network(options: Any, state_size: int, delta_size: int) -> Network:
    """The network that predicts a delta of ``delta_size`` numbers."""
    width = options.width
    head = _mlp(width) + 2 * width + width * delta_size + delta_size
    weights = (Weight("reader", (_reader(state_size, width, options.reader),), "network"), Weight("head", (head,), "network"))
    return Network(weights, 0, 1, width, 1)


def _hyperconv(sites: Sequence[Site], rank: int, text: tuple[int, int], state_size: int) -> int:
    lengths = [(size, len(site.layers)) for site in sites for size in (site.inputs, site.outputs)]
    width = _piece_width(lengths)
    tokens = sum(layers * -(-size // width) for size, layers in lengths)
    last = (tokens, rank + rank % 2 + _BORDER, width + width % 2 + _BORDER)
    first = (text[0], min(text[1], _CELLS), state_size)
    ladder = [tuple(round(a * (b / a) ** (at / _DEPTH)) for a, b in zip(first, last, strict=True)) for at in range(_DEPTH + 1)]
    area, total = _KERNEL * _KERNEL, 0
    for (n_in, h_in, w_in), (n_out, h_out, w_out) in pairwise(ladder):
        total += 2 * h_in * w_in + 2 * area * (w_in * w_out + h_in * h_out) + h_out * w_out + n_in * n_out * area + n_out
    return total


def _piece_width(lengths: Sequence[tuple[int, int]]) -> int:
    sizes = [size for size, _ in lengths]
    common = math.gcd(*sizes)
    width = max(divisor for divisor in range(1, min(common, _WIDEST) + 1) if common % divisor == 0)
    if width >= _NARROWEST or width == min(*sizes, _WIDEST):
        return width
    widths = range(2, min(max(sizes), _WIDEST) + 2, 2)
    return min(widths, key=lambda w: sum(layers * -(-size // w) for size, layers in lengths) * (w + _BORDER))
