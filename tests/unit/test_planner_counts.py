"""What the planner counts on paper is what the modules have: by name, shape and role.  The one test of the planner that imports torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapter_bases import QWEN3_NEXT
from families import EAGER_ONLY, FAMILIES, family_config
from limbeck.adapters.targets import resolve_spec
from limbeck.config.parts.surgeries import SURGERIES, DeltaPredictorOptions, LoraGeneratorOptions
from limbeck.models.limbeck_model import wrap_student
from limbeck.models.loading import build_model
from limbeck.planner.architecture import KNOWN, read_architecture
from limbeck.planner.generators import generator_network, lora_numbers, predictor_network
from limbeck.planner.mixers import mixer_state
from limbeck.planner.storage import cache_bytes, signal_bytes
from limbeck.planner.students import operate, plain
from limbeck.students.generator.network import Generator
from limbeck.students.generator.predictor import DeltaHead
from limbeck.students.student import Student
from limbeck.teachers.store.codecs import CODECS, Layout
from mixer_cases import CASES, Bench, options_of
from moe_cases import QWEN3_MOE

DENSE_NEXT = {k: v for k, v in QWEN3_NEXT.items() if "expert" not in k and k != "moe_intermediate_size"}
CONFIGS: dict[str, dict[str, Any]] = {
    **{f"{family}{' tied' * tied}": family_config(family, tied=tied) for family in FAMILIES for tied in (False, True)},
    "qwen3_moe": QWEN3_MOE,
    "qwen3_next": QWEN3_NEXT,
    "qwen3_5_text": {**DENSE_NEXT, "model_type": "qwen3_5_text"},
    "qwen3_5_moe_text": {**{k: v for k, v in QWEN3_NEXT.items() if k != "intermediate_size"}, "model_type": "qwen3_5_moe_text"},
}
STUDENTS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "ternary dense": ("qwen3", [{"kind": "ternarize"}]),
    "ternary, learnt scales": ("llama3", [{"kind": "ternarize", "method": "elastic"}]),
    "ternary, norms": ("qwen2", [{"kind": "ternarize", "sub_norm": True}]),
    "ternary experts, learnt scales of groups": ("moe", [{"kind": "ternarize", "method": "elastic", "scale": "expert", "plan": "moe_experts"}]),
    "ternary hybrid": ("qwen3", [{"kind": "hybridize", "keep": [1]}, {"kind": "ternarize"}]),
    "streams": ("gemma3", [{"kind": "hyper_connections", "streams": 4}]),
    "streams, permutations": ("qwen3", [{"kind": "hyper_connections", "streams": 2, "mixing": "permutation"}]),
    "streams, fixed": ("llama3", [{"kind": "hyper_connections", "dynamic": False}]),
}


def built(config: dict[str, Any]) -> Any:
    """On the meta device: shapes without numbers."""
    with torch.device("meta"):
        return build_model(config, attention="eager")


def shapes(module: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_of_a_family_is_counted_by_name_and_shape(name: str) -> None:
    model = read_architecture(CONFIGS[name], name)
    assert model.exact and {w.name: w.shape for w in model.weights} == shapes(built(CONFIGS[name]))


def test_every_family_that_is_called_exact_is_compared() -> None:
    assert {config["model_type"] for config in CONFIGS.values()} == set(KNOWN)


@pytest.mark.parametrize("case", CASES)
def test_a_hybrid_of_every_mixer_is_counted_by_name_shape_and_role(case: str) -> None:
    family = "olmo2" if case.endswith("normed") else "qwen3"
    config, mixer = family_config(family), options_of(case)
    options = SURGERIES.options("hybridize").model_validate({"mixer": mixer.model_dump(by_alias=True), "keep": [2]})
    student = Student(wrap_student(build_model(config, attention="sdpa"), [options], {"source": "tiny", "fingerprint": {}}))
    found = operate(plain(read_architecture(config, family)), [options])
    assert {w.name: w.shape for w in found.architecture.weights} == shapes(student.model)
    assert {w.name: found.role(w.name) for w in found.architecture.weights} == student.roles


@pytest.mark.parametrize("name", STUDENTS)
def test_other_surgeries_are_counted_by_name_shape_and_role(name: str) -> None:
    family, parts = STUDENTS[name]
    config = QWEN3_MOE if family == "moe" else family_config(family)
    options = [SURGERIES.options(part["kind"]).model_validate(part) for part in parts]
    attention = "eager" if family in EAGER_ONLY else "sdpa"
    student = Student(wrap_student(build_model(config, attention=attention), options, {"source": "tiny", "fingerprint": {}}))
    found = operate(plain(read_architecture(config, family)), options)
    assert {w.name: w.shape for w in found.architecture.weights} == shapes(student.model)
    assert {w.name: found.role(w.name) for w in found.architecture.weights} == student.roles


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("context", [3, 700])
def test_a_mixers_state_takes_the_bytes_that_it_says(case: str, context: int) -> None:
    bench = Bench(options_of(case), stirred=False)
    attention = read_architecture(family_config("qwen3"), "tiny").layers[0].attention
    assert attention is not None
    token, fixed = mixer_state(options_of(case), attention, context)
    assert token * context + fixed == bench.mixer.state_bytes(context)


def test_the_cache_of_a_model_is_what_transformers_keeps() -> None:
    model = build_model(QWEN3_NEXT)
    with torch.no_grad():
        held = model(input_ids=torch.arange(10)[None] + 3, use_cache=True).past_key_values
    attention = [layer for layer in held.layers if getattr(layer, "keys", None) is not None]
    token, _ = cache_bytes(read_architecture(QWEN3_NEXT, "next"), 10, 4)
    assert token * 10 == sum(4 * (layer.keys.numel() + layer.values.numel()) for layer in attention)


@pytest.mark.parametrize("targets", [["attention"], ["all"], ["mlp", "q_proj"]])
@pytest.mark.parametrize(("name", "config"), [("qwen3", family_config("qwen3")), ("qwen3_next", QWEN3_NEXT), ("phi3", family_config("phi3"))])
def test_a_lora_has_the_numbers_of_its_spec(name: str, config: dict[str, Any], targets: list[str]) -> None:
    if name == "phi3" and "q_proj" in targets:
        targets = ["qkv_proj"]
    spec = resolve_spec(built(config), targets, rank=4, alpha=8)
    assert lora_numbers(read_architecture(config, name), targets, 4) == spec.num_parameters


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"condition": "none"}, {"width": 64, "trunk": 0, "reader": {"kind": "transformer", "blocks": 3}}, {"reader": {"blocks": 1, "latents": 5}},
        {"decoder": "hyperconv"}, {"decoder": "hyperconv", "targets": ["mlp", "q_proj"], "rank": 3},
    ],
)  # fmt: skip
def test_a_generator_has_the_parameters_that_are_planned(settings: dict[str, Any]) -> None:
    config = family_config("qwen3", hidden_size=64, intermediate_size=96, head_dim=16)
    options = LoraGeneratorOptions.model_validate({"targets": ["all"], "rank": 4, **settings})
    size = 1 if options.condition == "none" else 64
    with torch.device("meta"):
        model = build_model(config, attention="sdpa")
        network = Generator(resolve_spec(model, options.targets, rank=options.rank, alpha=options.alpha), options, size, (2, 48))
    planned = generator_network(read_architecture(config, "tiny"), options, size, (2, 48))
    assert planned.total == sum(p.numel() for p in network.parameters())


def test_a_predictor_has_the_parameters_that_are_planned() -> None:
    options = DeltaPredictorOptions(width=64)
    head = DeltaHead(32, options, 500)
    assert predictor_network(options, 32, 500).total == sum(p.numel() for p in head.parameters())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("k", "vocabulary"), [(64, 151_936), (128, 151_936), (64, 4096)])
def test_a_stored_position_takes_the_bytes_of_its_codec(codec: str, k: int, vocabulary: int) -> None:
    size = CODECS[codec].size(1000, Layout(k, (1.0,), 0, vocabulary)) / 1000
    # What is planned has the document's own token in it and what zstd finds taken off.
    assert signal_bytes(k, codec, vocabulary) == pytest.approx(size, rel=0.07)
