"""The families that llama.cpp runs: their keys, the names of their tensors, and what each tensor goes through.

One table a family, from names in transformers' module tree to names in the file.  A tensor of a model without a place here is an
error: a file that loads and computes something else is worse than none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import ModelError
from limbeck.export.gguf.packing import Weight
from limbeck.export.gguf.transforms import columns, floats, half, regrouped, rotary_rows, rows, tiled_heads

ARCHITECTURES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "qwen3_next": "qwen3next",
    "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe",
}  # fmt: skip
"""llama.cpp's name by transformers' ``model_type``."""
LINEAR = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
EXPERTS = ("qwen3_moe", "qwen3_next", "qwen3_5_moe_text")
REGULAR = 4
"""llama.cpp's layer period of softmax attention where a file says nothing."""


@dataclass(frozen=True)
class Piece:
    """A tensor of the file, made from one of the model (``source``) or from the config alone."""

    name: str
    source: str
    shape: tuple[int, ...]
    kind: str
    """Row of the size report."""
    full: bool
    """Always fp32: vectors, norms, routers, convolutions."""
    make: Callable[[Weight], Weight]


def architecture(config: Any) -> str:
    """llama.cpp's name of a config's family; one that cannot be written is a :class:`ModelError` with every reason."""
    if config.model_type not in ARCHITECTURES:
        raise ModelError(f"GGUF: llama.cpp's form of '{config.model_type}' is not known here; known: {', '.join(ARCHITECTURES)}. `--to hf` writes any student")
    obstacles = _obstacles(config)
    if obstacles:
        raise ModelError(
            f"GGUF: llama.cpp's {ARCHITECTURES[config.model_type]} cannot compute this model: {'; '.join(obstacles)}. `--to hf` writes "
            "any student"
        )
    return ARCHITECTURES[config.model_type]


def _obstacles(config: Any) -> list[str]:
    found = []
    if config.hidden_act != "silu":
        found.append(f"hidden_act is {config.hidden_act!r} and it has silu")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or getattr(config, "use_sliding_window", False):
        found.append("it has sliding-window layers")
    if config.model_type in ("qwen3_moe", "qwen3_next"):
        if not config.norm_topk_prob:
            found.append("norm_topk_prob is false and it always normalises the chosen experts' weights")
        if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
            found.append("some layers have no experts")
    if config.model_type in LINEAR and config.linear_key_head_dim != config.linear_value_head_dim:
        found.append("its linear layers have keys and values of different widths")
    if config.model_type in LINEAR and len(set(config.layer_types)) < 2:
        found.append(f"all its layers are {config.layer_types[0]}, and it is a mixture of both kinds")
    if config.model_type != "llama" and getattr(config, "attention_bias", False):
        found.append("its attention has biases")
    if config.model_type == "qwen2" and head_width(config) * config.num_attention_heads != config.hidden_size:
        found.append(f"its {config.num_attention_heads} heads of {head_width(config)} are not as wide as the model, {config.hidden_size}")
    rope = config.rope_parameters
    if config.model_type not in LINEAR and _turned_part(config) != 1:
        found.append(f"its rotary embedding turns {_turned_part(config):g} of each head and it turns the whole")
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn") and not (kind == "llama3" and config.model_type == "llama"):
        found.append(f"its rotary embedding is of type {kind!r}")
    odd = [name for name in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(name) is not None]
    if kind == "yarn" and (odd or rope.get("truncate", True) is not True):
        found.append(f"its YaRN has {', '.join(odd) or 'truncate: false'}")
    return found


def head_width(config: Any) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def keys(config: Any) -> dict[str, Any]:
    """The file's keys under its architecture's name, without the prefix; integers, floats, strings, and lists of integers or bools."""
    width, kind = head_width(config), config.model_type
    found: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
    }
    # The MoE families' dense width is of layers that they do not have here, and llama.cpp still asks for one.
    found["feed_forward_length"] = getattr(config, "intermediate_size", None) or config.moe_intermediate_size
    found |= _rotary_keys(config, width)
    if kind in EXPERTS:
        found |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    if getattr(config, "shared_expert_intermediate_size", None):
        found["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    if kind in LINEAR:
        found |= {
            "ssm.conv_kernel": config.linear_conv_kernel_dim,
            "ssm.state_size": config.linear_key_head_dim,
            "ssm.group_count": config.linear_num_key_heads,
            "ssm.time_step_rank": config.linear_num_value_heads,
            "ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads,
        }
        linear = [layer == "linear_attention" for layer in config.layer_types]
        if linear == [(index + 1) % REGULAR != 0 for index in range(len(linear))]:
            found["full_attention_interval"] = REGULAR
        else:
            found["attention.recurrent_layers"] = linear
    return found


def _turned_part(config: Any) -> float:
    """Share of a head that the rotary embedding turns."""
    return config.rope_parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0


def _rotary_keys(config: Any, width: int) -> dict[str, Any]:
    rope = config.rope_parameters
    turned = int(width * _turned_part(config))
    found: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": turned}
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        found["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
        for name, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if rope.get(name) is not None:
                found[f"rope.scaling.{key}"] = float(rope[name])
    if ARCHITECTURES[config.model_type].startswith("qwen35"):
        found["rope.dimension_sections"] = rotary_sections(turned // 2, rope.get("mrope_section"))
    return found


def rotary_sections(pairs: int, given: Sequence[int] | None) -> list[int]:
    """How many of the rotated pairs each of the position axes has, as llama.cpp reads it: interleaved, and a fourth axis that is 0.

    The three axes are one for text, so any division computes the same, as long as it reaches the last pair: one beyond its axis'
    share is not rotated at all.  What a config gives is kept where it does.
    """
    if given is not None and sum(given) >= pairs and all(pair < 3 * given[pair % 3] for pair in range(pairs)):
        return [*(int(part) for part in given), 0]
    return [-(-pairs // 3)] * 3 + [0]


def pieces(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[Piece]:
    """Every tensor of the file, in the order of the model's; a name of the model without a place is a :class:`ModelError`."""
    import gguf

    arch = architecture(config)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    found, lost = [], []
    for source, shape in shapes.items():
        for alias, make in _ways(config, source):
            name = names.get_name(alias, try_suffixes=(".weight", ".bias"))
            if name is None:
                lost.append(source)
                continue
            made = tuple(floats(make(torch.empty(shape, device="meta")), source).shape)
            found.append(Piece(name, source, made, kind_of(source), _full(name, made), make))
    if lost:
        raise ModelError(f"GGUF: llama.cpp's {arch} has no place for {', '.join(lost[:4])}{' ...' if len(lost) > 4 else ''}. `--to hf` writes any student")
    if config.rope_parameters.get("rope_type") == "llama3":
        factors = llama3_factors(config)
        found.append(Piece("rope_freqs.weight", "", tuple(factors.shape), "norms and vectors", True, lambda _: factors))
    return found


def _full(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 1 or "_norm" in name or ".ffn_gate_inp" in name or ".ssm_conv1d" in name


Way = tuple[str, Callable[[Weight], Weight]]
"""The name by which the name map knows a tensor, and what it goes through."""


def _same(weight: Weight) -> Weight:
    return weight


def _ways(config: Any, source: str) -> list[Way]:
    """How a tensor of the model reaches the file: one way for most, two for fused ones."""
    stem, _, suffix = source.rpartition(".")
    if source.endswith("mlp.experts.gate_up_proj"):
        stem = source.removesuffix(".gate_up_proj")
        return [(f"{stem}.{name}.weight", partial(half, which=which)) for which, name in enumerate(("gate_proj", "up_proj"))]
    if source.endswith("mlp.experts.down_proj"):
        return [(f"{source}.weight", _same)]
    if ".linear_attn." in source:
        return _linear_ways(config, source)
    offset = config.model_type in LINEAR and suffix == "weight" and stem.endswith("norm")
    if offset:
        return [(source, lambda weight: floats(weight, source) + 1)]
    if config.model_type == "llama" and (found := re.search(r"\.([qk])_proj\.", source)):
        heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
        return [(source, partial(_moved, index=rotary_rows(heads, head_width(config))))]
    return [(source, _same)]


def _linear_ways(config: Any, source: str) -> list[Way]:
    """Tensors of a gated delta rule; Qwen3.5's value heads are tiled over the key heads, Qwen3-Next's stay grouped."""
    key_heads, value_heads = config.linear_num_key_heads, config.linear_num_value_heads
    key_width, value_width = config.linear_key_head_dim, config.linear_value_head_dim
    name = source.split(".linear_attn.")[1]
    tiled = config.model_type != "qwen3_next"
    heads = tiled_heads(key_heads, value_heads, 1) if tiled else torch.arange(value_heads)
    values = tiled_heads(key_heads, value_heads, value_width) if tiled else torch.arange(value_heads * value_width)
    keys_first = 2 * key_heads * key_width
    all_three = torch.cat([torch.arange(keys_first), keys_first + values])
    if name == "in_proj_qkvz.weight":
        qkv, z = regrouped(key_heads, key_width, value_heads, value_width)
        stem = source.removesuffix("in_proj_qkvz.weight")
        return [(f"{stem}in_proj_qkv.weight", partial(_moved, index=qkv)), (f"{stem}in_proj_z.weight", partial(_moved, index=z))]
    if name == "A_log":
        return [(source, lambda weight: -floats(rows(weight, heads), source).exp())]
    if name == "dt_bias":
        return [(source.replace("dt_bias", "dt_proj.bias"), partial(_moved, index=heads))]
    if name == "conv1d.weight":
        return [(source, lambda weight: rows(floats(weight, source).squeeze(1), all_three))]
    if name == "out_proj.weight":
        return [(source, lambda weight: columns(weight, values.to(_device(weight)), source))]
    index = {"in_proj_qkv.weight": all_three, "in_proj_z.weight": values, "in_proj_a.weight": heads, "in_proj_b.weight": heads}.get(name)
    return [(source, _same if index is None else partial(_moved, index=index))]


def _moved(weight: Weight, index: Tensor) -> Weight:
    return rows(weight, index.to(_device(weight)))


def _device(weight: Weight) -> torch.device:
    return weight.device if isinstance(weight, Tensor) else weight.codes.device


def llama3_factors(config: Any) -> Tensor:
    """By how much Llama 3's scaling divides each rotary frequency, fp32 ``[head width / 2]`` (Llama 3.1's published rule)."""
    rope, width = config.rope_parameters, head_width(config)
    frequencies = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()


_KINDS = (
    (r"\.mlp\.experts\.", "experts"), (r"embed_tokens", "embedding"), (r"^lm_head", "head"), (r"shared_expert\.", "shared expert"),
    (r"norm|\.bias$|A_log|dt_bias|conv1d|\.mlp\.gate\.|shared_expert_gate", "norms and vectors"),
    (r"\.self_attn\.", "attention"), (r"\.linear_attn\.", "linear attention"), (r"\.mlp\.", "feed-forward"),
)  # fmt: skip


def kind_of(source: str) -> str:
    """Row of the size report that a tensor of the model belongs to."""
    return next((kind for pattern, kind in _KINDS if re.search(pattern, source)), "other")
