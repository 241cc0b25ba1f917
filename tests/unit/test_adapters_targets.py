"""Targets are what the loaded model has: golden shapes of Qwen3-Next, words for groups, and refusals that name the way out."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3NextConfig

from families import tiny_model
from limbeck.adapters.spec import Adapters, AdapterSpec
from limbeck.adapters.targets import linears_of, resolve_spec, resolve_targets
from limbeck.config.parts.surgeries import LoraGeneratorOptions
from limbeck.errors import AdapterError
from limbeck.students.generator.network import Generator

ATTENTION = tuple(range(3, 48, 4))
DELTANET = tuple(layer for layer in range(48) if layer % 4 != 3)
GOLDEN = {
    "self_attn.q_proj": (2048, 8192, ATTENTION),
    "self_attn.k_proj": (2048, 512, ATTENTION),
    "self_attn.v_proj": (2048, 512, ATTENTION),
    "self_attn.o_proj": (4096, 2048, ATTENTION),
    "linear_attn.in_proj_qkvz": (2048, 12288, DELTANET),
    "linear_attn.in_proj_ba": (2048, 64, DELTANET),
    "linear_attn.out_proj": (4096, 2048, DELTANET),
}
SHARED = {
    "mlp.shared_expert.gate_proj": (2048, 512, tuple(range(48))),
    "mlp.shared_expert.up_proj": (2048, 512, tuple(range(48))),
    "mlp.shared_expert.down_proj": (512, 2048, tuple(range(48))),
}
MOST_PARAMETERS = 50_000_000


@functools.cache
def coder_next() -> Any:
    """80 billion parameters that are nowhere: transformers' defaults are Qwen3-Next-80B-A3B, and Qwen3-Coder-Next has its shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(Qwen3NextConfig())


def shapes(spec: AdapterSpec) -> dict[str, Any]:
    return {site.name: (site.in_features, site.out_features, site.layers) for site in spec.sites}


def test_attention_of_the_real_qwen3_next_is_17_million() -> None:
    spec = resolve_spec(coder_next(), "attention", rank=16, alpha=32)
    assert shapes(spec) == GOLDEN
    assert spec.num_parameters == 12 * 344_064 + 36 * 361_472 == 17_141_760
    assert len(spec.paths) == 12 * 4 + 36 * 3


def test_all_of_the_real_qwen3_next_adds_the_shared_experts() -> None:
    spec = resolve_spec(coder_next(), "all", rank=16, alpha=32)
    assert shapes(spec) == GOLDEN | SHARED
    assert spec.num_parameters == 17_141_760 + 48 * 3 * 40_960 == 23_040_000
    assert shapes(resolve_spec(coder_next(), "mlp", rank=16, alpha=32)) == SHARED
    assert spec.table()[-1].startswith("rank 16, scale 2: 23,040,000 numbers in 300 Linears")


def test_an_invented_projection_is_refused_with_the_fused_one() -> None:
    with pytest.raises(AdapterError, match=r"no Linear is called 'linear_q': this family keeps it in the fused `in_proj_qkvz`"):
        resolve_targets(coder_next(), ["q_proj", "linear_q"])


SIZES = {
    "width 512": {"width": 512, "trunk": 1, "reader": {"blocks": 1, "heads": 8}},
    "default depth": {"width": 448, "reader": {"heads": 8}},
    "4 layers, 8 heads": {"width": 384, "reader": {"kind": "transformer", "blocks": 4, "heads": 8}},
}
"""The static LoRA alone is 17 million; width 512 at the default depth would be 54."""


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_generator_for_qwen3_coder_next_has_at_most_50_million_parameters(size: dict[str, Any]) -> None:
    options = LoraGeneratorOptions.model_validate({"targets": "attention", "rank": 16, "alpha": 32, **size})
    model = coder_next()
    with torch.device("meta"):
        generator = Generator(resolve_spec(model, options.targets, rank=16, alpha=32), options, model.config.hidden_size, (1, 512))
        A, B = generator(torch.zeros(2, 1, 512, 2048), torch.ones(2, 1, 512, dtype=torch.bool))
    Adapters(generator.spec, A, B)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in generator.named_children()}
    assert 40_000_000 < sum(parts.values()) <= MOST_PARAMETERS, f"{sum(parts.values()):,}: {parts}"


# -- words and names -------------------------------------------------------------------------------------------------------


a_model = functools.cache(tiny_model)


def names(family: str, targets: Any) -> list[str]:
    return [site.name for site in resolve_targets(a_model(family), targets)]


def test_words_and_names() -> None:
    attention = [f"self_attn.{p}_proj" for p in "qkvo"]
    mlp = [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert names("qwen3", "attention") == attention
    assert names("qwen3", "mlp") == mlp
    assert names("qwen3", "all") == names("qwen3", ["mlp", "attention"]) == [*attention, *mlp]
    # In the model's order, each once, however they are named.
    assert names("qwen3", ["down_proj", "self_attn.q_proj", "q_proj"]) == ["self_attn.q_proj", "mlp.down_proj"]
    assert names("phi3", "all") == ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"]


@pytest.mark.parametrize("wanted, nearest", [("q_pro", "q_proj"), ("attenton", "attention"), ("mlp.up", r"mlp\.up_proj")])
def test_a_name_that_matches_nothing_is_an_error_with_the_nearest(wanted: str, nearest: str) -> None:
    with pytest.raises(AdapterError, match=rf"no Linear is called '{wanted}' \(nearest: [^)]*{nearest}.*mlp\.down_proj \(32 x 48\)"):
        names("qwen3", ["v_proj", wanted])


def test_every_wrong_name_is_told_at_once() -> None:
    with pytest.raises(AdapterError, match=r"'qq'.*'linear_q'"):
        names("qwen3", ["qq", "q_proj", "linear_q"])


def test_half_a_name_and_the_head_are_no_targets() -> None:
    for wanted in ("proj", "lm_head", "embed_tokens", "self_attn"):
        with pytest.raises(AdapterError, match=f"'{wanted}'"):
            names("qwen3", [wanted])


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(AdapterError, match="has no Linear in a list of layers"):
        resolve_targets(nn.Sequential(nn.ReLU()), "all")


def test_a_rank_that_a_linear_cannot_have_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"rank 25 is more than self_attn\.k_proj \(24 x 32\) can have: at most 24"):
        resolve_spec(a_model("qwen3"), "attention", rank=25, alpha=8)


def test_layers_that_differ_in_shape_are_kinds_of_their_own() -> None:
    model = tiny_model("qwen3")
    model.model.layers[2].mlp.up_proj = nn.Linear(32, 40)
    found = {site.name: site.layers for site in linears_of(model) if site.module == "mlp.up_proj"}
    assert found == {"mlp.up_proj@48x32": (0, 1, 3), "mlp.up_proj@40x32": (2,)}
    assert [site.name for site in resolve_targets(model, ["up_proj"])] == list(found)


def test_a_spec_survives_its_manifest() -> None:
    spec = resolve_spec(a_model("qwen3"), "all", rank=3, alpha=5, rslora=True)
    assert AdapterSpec.from_json(spec.to_json()) == spec
    assert spec.scale == pytest.approx(5 / 3**0.5)
