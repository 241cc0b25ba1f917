"""A small mixture of experts with DeltaNet layers: pretrained, made ternary under its teacher, judged, and written for llama.cpp."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from limbeck.config.recipe import Recipe
from limbeck.errors import LimbeckError
from limbeck.stages.export import export_path
from limbeck.stages.run import run_recipe

CONFIG = {
    "model_type": "qwen3_next", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256,
    "max_position_embeddings": 1024, "tie_word_embeddings": True, "eos_token_id": 0, "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}  # fmt: skip


def stages(warmup: int) -> dict[str, Any]:
    return {
        "pretrain": {
            "data": {"source": {"kind": "stdlib", "limit": 40}, "tokenizer": "builtin:code-2m", "sequence": 64, "held_out": 0.2},
            "student": {"config": CONFIG},
            "optim": {"groups": [{"lr": 3e-3}]},
            "loop": {"steps": 4, "batch_tokens": 512},
        },
        "ternary": {
            "data": {"from": "pretrain"},
            "student": {"base": {"from": "pretrain"}, "surgery": [{"kind": "ternarize", "warmup": warmup, "export": ["tq2_0"]}]},
            "teacher": {"kind": "local", "model": {"from": "pretrain"}},
            "objectives": [
                {"kind": "ce", "weight": 0.5},
                {"kind": "topk_kl", "k": 16, "temperature": 2.0, "weight": 0.5},
                {"kind": "moe_balance", "weight": 0.01},
                {"kind": "router_entropy", "weight": 0.001},
            ],
            "optim": {"groups": [{"role": "ternary", "kind": "muon", "lr": 0.02}, {"role": "rest", "kind": "lion", "lr": 1e-4}]},
            "loop": {"steps": 4, "batch_tokens": 512, "microbatch": 4, "validate_every": 4, "validate_rows": 4, "log_every": 2},
        },
        "evaluate": {"kind": "evaluate", "from": "ternary", "against": ["teacher"], "speed": None, "recall": None, "samples": None},
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ternary")
    return run_recipe(Recipe.model_validate({"name": "ternary", "stages": stages(2)}), recipe_dir=folder, run_dir=folder / "run")


def test_every_term_is_logged_and_codes_flip(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "ternary" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "losses" in line]
    last = logged[-1]
    assert {"ce", "kl", "moe_balance/raw", "router_entropy/raw"} <= last.keys()
    assert last["ternary/lambda"] == 1.0 and 0.1 < last["ternary/zeros"] < 0.6
    assert max(line["ternary/flips"] for line in logged) > 0


def test_the_evaluation_reads_what_was_trained(run: Path) -> None:
    results = json.loads((run / "evaluate" / "evaluation" / "evaluation.json").read_text())
    assert results["models"]["ternary"]["layers"] == ["Qwen3NextGatedDeltaNet", "softmax"]
    trained = json.loads((run / "ternary" / "stage.json").read_text())["result"]["held_out/ce"]
    assert results["perplexity"]["ternary"]["ce"] == pytest.approx(trained, rel=0.05)


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs xllamacpp")
def test_the_file_is_what_was_trained(run: Path, tmp_path: Path) -> None:
    from limbeck.config.parts.stages import GgufOptions

    said: list[str] = []
    out = export_path(str(run / "ternary"), output=tmp_path / "t.gguf", gguf=GgufOptions(verify=True), say=lambda line: said.append(str(line)))
    assert out.exists() and any("tq2_0" in line for line in said) and any("verified in llama.cpp" in line for line in said)


def test_half_way_through_the_warm_up_nothing_is_exported(run: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"name": "half", "stages": {name: stage for name, stage in stages(100).items() if name != "evaluate"}})
    half = run_recipe(recipe, recipe_dir=tmp_path, run_dir=tmp_path / "half")
    with pytest.raises(LimbeckError, match=r"lambda|warm"):
        export_path(str(half / "ternary"), output=tmp_path / "t.gguf")
