"""A file is as large as was said before anything was written, and ternary weights in it as small as their type promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from limbeck.config.parts.stages import GgufOptions
from limbeck.config.parts.surgeries import TernarizeOptions
from limbeck.export.gguf import writer
from limbeck.export.gguf.writer import manifest_path
from limbeck.models.limbeck_model import wrap_student
from limbeck.models.loading import build_model, resolve_source, save_model
from limbeck.stages.export_gguf import export_gguf

pytest.importorskip("gguf", reason="needs the gguf package: pip install 'limbeck[gguf]'")

BITS = {"tq2_0": 2.07, "tq1_0": 1.70, "q2_0": 2.25}
COMMON: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
KEPT = [{"match": "*.experts.*", "precision": "ternary"}, {"match": "*.self_attn.*_proj.weight", "precision": "q8"}]
STUDENTS: dict[str, tuple[dict[str, Any], Any, set[str]]] = {
    "llama": (COMMON, "dense", {"attention", "feed-forward"}),
    "qwen3_moe": ({**COMMON, **EXPERTS}, "moe_experts", {"experts"}),
    "qwen3_moe with q8 attention": ({**COMMON, **EXPERTS}, KEPT, {"experts"}),
}
"""Config, precision plan, and the rows of the size report that are ternary."""


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("name", STUDENTS)
def test_a_file_has_the_size_of_its_plan_and_a_ternary_weight_its_bits(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, plan, ternary = STUDENTS[name]
    student = wrap_student(
        build_model({**config, "model_type": name.partition(" ")[0]}), [TernarizeOptions(plan=plan)], {"source": "tiny", "fingerprint": {}}
    )
    source = resolve_source("builtin:code-2m")
    save_model(student, tmp_path / "model", tokenizer_source=source)
    asked: list[int] = []
    monkeypatch.setattr(writer, "_check_room", lambda path, size: asked.append(size))
    out = export_gguf(tmp_path / "model", tmp_path / "x.gguf", GgufOptions(type=kind), say=lambda line: None)
    manifest, size = json.loads(manifest_path(out).read_text()), out.stat().st_size
    assert asked == [manifest["predicted_bytes"]], "it is said, and room is looked for, before the first byte"
    assert abs(asked[0] / size - 1) < 0.01
    rows = [row for row in manifest["sizes"] if row["kind"] in ternary]
    assert {row["kind"] for row in rows} == ternary
    assert all(row["type"] == kind and row["bits_per_weight"] <= BITS[kind] for row in rows)
    total = manifest["sizes"][-1]
    assert total["bytes"] == sum(row["bytes"] for row in manifest["sizes"][:-1]) <= size
    assert total["parameters"] == student.num_parameters()
