"""A hybrid as transformers' own ``Qwen3_5ForCausalLM``, which stock transformers (and servers that know the architecture) run.

Nothing is approximated; every tensor of the student lands in one tensor of the other model:

    Qwen3.5 gates its softmax attention: out = o_proj(attention * sigmoid(gate)).  With zero rows for the gate sigmoid is 1/2, and
    o_proj is doubled.  Its norms multiply by 1 + w, so weights are stored minus one: exact in fp32 for weights of at least 1/2.
    Its rotary embedding covers a part of each head and three axes: here the whole, and for text the three axes are one.
    Our Gated DeltaNet has a norm weight for every head and theirs one for all: ours goes into out_proj, where it is a factor of the
    columns (the gate between norm and projection is elementwise), and theirs is 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from limbeck.config.native import ALL_LINEAR, mixer_obstacles, teacher_obstacles
from limbeck.errors import ModelError
from limbeck.export.foreign import check_foreign
from limbeck.models.loading import save_model
from limbeck.models.structure import decoder_layers
from limbeck.students.mixers.gated_deltanet import GatedDeltaNet

SHARED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings", "attention_dropout",
    "pad_token_id", "bos_token_id", "eos_token_id", "use_cache",
)  # fmt: skip
"""Fields of both configs with the same meaning."""
COPIED = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
ASKED = "export --to native"


def write_native(model: PreTrainedModel, folder: Path, *, tokenizer_source: str | None = None, dtype: torch.dtype | None = None) -> None:
    """Write a hybrid as a ``qwen3_5_text`` folder with tokenizer and generation settings; :class:`ModelError` says what does not fit."""
    save_model(native_model(model), folder, tokenizer_source=tokenizer_source, dtype=dtype)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    # A field of ours, which would be foreign to whoever loads this folder.
    config.pop("limbeck_attention", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def native_model(model: PreTrainedModel, asked: str = ASKED) -> PreTrainedModel:
    """The Qwen3.5 that computes what the hybrid does, to be saved: its rotary tables, which are no parameters, stay on meta.

    ``asked`` is what errors say was asked for.
    """
    check_native(model, asked)
    with torch.device("meta"):
        native: Any = Qwen3_5ForCausalLM(native_config(model))
    native.load_state_dict(native_state(model), strict=True, assign=True)
    native.tie_weights()
    native.generation_config = model.generation_config
    return native


def check_native(model: Any, asked: str = ASKED) -> None:
    """Raise :class:`ModelError` with every reason why the model cannot be written as Qwen3.5; layers with the same one are named together."""
    if not hasattr(model.config, "limbeck"):
        raise ModelError(f"{asked}: {type(model).__name__} is not a hybrid: `--to hf` writes a model that stock transformers loads")
    check_foreign(model.config, "native")
    mixers = model.mixers()
    base = {**model.config.to_dict(), "model_type": model.config.limbeck["base"]["model_type"]}
    kept = [index for index in range(base["num_hidden_layers"]) if index not in mixers]
    obstacles = teacher_obstacles(base, kept)
    layers: dict[str, list[str]] = {}
    for index, mixer in mixers.items():
        for obstacle in mixer_obstacles(mixer.options):
            layers.setdefault(obstacle, []).append(str(index))
    obstacles += [f"layer{'s' * (len(alike) > 1)} {', '.join(alike)}: {obstacle}" for obstacle, alike in layers.items()]
    if len({mixer.options.short_conv for mixer in mixers.values() if isinstance(mixer, GatedDeltaNet)}) > 1:
        obstacles.append("its mixers' convolutions differ in length, and Qwen3.5 has one length for all")
    if not kept:
        obstacles.append(ALL_LINEAR)
    if obstacles:
        lines = obstacles if len(obstacles) < 4 else [*obstacles[:3], f"and {len(obstacles) - 3} more"]
        raise ModelError(f"{asked}: {'; '.join(lines)}. `--to hf` writes any student")


def fits_native(config: Any) -> bool:
    """Whether a model of this config can be written as Qwen3.5; nothing is loaded."""
    if not hasattr(config, "limbeck"):
        return False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    try:
        check_native(model)
    except ModelError:
        return False
    return True


def native_config(model: Any) -> Qwen3_5TextConfig:
    """The config of the Qwen3.5 that a fitting hybrid becomes."""
    config, mixers = model.config, model.mixers()
    linear = next(iter(mixers.values()), None)
    half = config.head_dim // 2
    # Servers want the sections of the three position axes to fill the rotation; with one position for all three they change nothing.
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    rope = {"rope_type": "default", **config.rope_parameters, "partial_rotary_factor": 1.0}
    return Qwen3_5TextConfig(
        **{name: getattr(config, name) for name in SHARED_FIELDS},
        attention_bias=False,
        rope_parameters={**rope, "mrope_section": sections, "mrope_interleaved": True},
        layer_types=["linear_attention" if index in mixers else "full_attention" for index in range(config.num_hidden_layers)],
        linear_conv_kernel_dim=linear.options.short_conv if linear is not None else 4,
        linear_key_head_dim=config.head_dim,
        linear_value_head_dim=config.head_dim,
        linear_num_key_heads=config.num_attention_heads,
        linear_num_value_heads=config.num_attention_heads,
    )


@torch.no_grad()
def native_state(model: Any) -> dict[str, Tensor]:
    """The hybrid's tensors under the names and in the layout of ``Qwen3_5ForCausalLM``; one left over is a :class:`ModelError`."""
    left = dict(model.state_dict())
    tied = model.config.tie_word_embeddings
    head = left.pop("lm_head.weight")
    state = {"model.embed_tokens.weight": left.pop("model.embed_tokens.weight"), "model.norm.weight": left.pop("model.norm.weight") - 1}
    state["lm_head.weight"] = state["model.embed_tokens.weight"] if tied else head
    mixers = model.mixers()
    for index in range(len(decoder_layers(model))):
        prefix = f"model.layers.{index}."
        state |= {prefix + name: left.pop(prefix + name) for name in COPIED}
        state |= {prefix + name: left.pop(prefix + name) - 1 for name in NORMS}
        inner = f"{prefix}self_attn."
        mine = {name.removeprefix(inner): left.pop(name) for name in list(left) if name.startswith(inner)}
        found, slot = (linear_layer(mine), "linear_attn") if index in mixers else (softmax_layer(mine, model.config.head_dim), "self_attn")
        state |= {f"{prefix}{slot}.{name}": tensor.contiguous() for name, tensor in found}
        left |= {inner + name: tensor for name, tensor in mine.items()}
    if left:
        raise ModelError(f"export --to native: Qwen3.5 has no place for {', '.join(sorted(left)[:4])}; `--to hf` writes any student")
    return state


def softmax_layer(mine: dict[str, Tensor], head_dim: int) -> Iterator[tuple[str, Tensor]]:
    """A Qwen3 attention's tensors as those of Qwen3.5's, taken out of ``mine``; ``q_proj`` holds each head's query and then its
    gate.

    Args:
        mine: ``q_proj.weight [Q, D]``, ``k_proj.weight [K, D]``, ``v_proj.weight [K, D]``, ``o_proj.weight [D, Q]`` and the two
        norms.
    """
    q_HKD = mine.pop("q_proj.weight").unflatten(0, (-1, head_dim))
    yield "q_proj.weight", torch.cat([q_HKD, torch.zeros_like(q_HKD)], 1).flatten(0, 1)
    yield "k_proj.weight", mine.pop("k_proj.weight")
    yield "v_proj.weight", mine.pop("v_proj.weight")
    yield "o_proj.weight", mine.pop("o_proj.weight") * 2
    for name in ("q_norm.weight", "k_norm.weight"):
        yield name, mine.pop(name) - 1


def linear_layer(mine: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A native Gated DeltaNet's tensors as those of Qwen3.5's, taken out of ``mine``.

    Args:
        mine: projections ``[Q, D]``, ``a_proj`` and ``b_proj`` ``[H, D]``, ``o_proj`` ``[D, Q]``, convolutions ``[Q, kernel]``,
        and vectors.
    """
    yield "in_proj_qkv.weight", torch.cat([mine.pop(f"{name}_proj.weight") for name in "qkv"])
    yield "conv1d.weight", torch.cat([mine.pop(f"{name}_conv") for name in "qkv"])[:, None]
    yield "in_proj_z.weight", mine.pop("g_proj.weight")
    yield "in_proj_b.weight", mine.pop("b_proj.weight")
    a_HD = mine.pop("a_proj.weight")
    yield "in_proj_a.weight", a_HD
    yield "A_log", mine.pop("A_log")
    yield "dt_bias", mine.pop("dt_bias")
    norm_Q, o_DQ = mine.pop("o_norm"), mine.pop("o_proj.weight")
    yield "norm.weight", torch.ones_like(norm_Q[: len(norm_Q) // len(a_HD)])
    yield "out_proj.weight", o_DQ * norm_Q
