"""Hybrids with every registered mixer generate: with a cache as without, padded, in beams, chunk by chunk, and in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import tiny_model, tokens
from limbeck.config.parts.mixers import MIXERS as REGISTRY
from limbeck.config.parts.surgeries import HybridizeOptions
from limbeck.models.limbeck_model import wrap_student
from limbeck.models.loading import load_model, save_model

NARROW: dict[str, dict[str, Any]] = {"swa": {"window": 6, "sinks": 2}}
"""Where the defaults would see all of a short test."""
MIXERS: dict[str, dict[str, Any]] = {kind: {"kind": kind, **NARROW.get(kind, {})} for kind in REGISTRY}
MIXERS["convolution"] = {"kind": "gated_deltanet", "preset": "native"}
KEPT: dict[str, tuple[int, ...]] = {"mixed": (1,), "all-linear": ()}
every_student = pytest.mark.parametrize(("mixer", "kept"), [(m, k) for m in MIXERS for k in KEPT])


def _student(mixer: str, kept: str, family: str = "qwen3", dtype: torch.dtype = torch.float64) -> Any:
    base = tiny_model(family, dtype=dtype, num_hidden_layers=2)
    student = wrap_student(base, [HybridizeOptions(mixer=MIXERS[mixer], keep=KEPT[kept])], {"source": "tiny", "fingerprint": {}})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in student.mixers().values():
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return student


@pytest.mark.parametrize(("mixer", "kept"), [*((mixer, "all-linear") for mixer in MIXERS), ("convolution", "mixed"), ("swa", "mixed")])
def test_200_greedy_tokens_with_a_cache_equal_those_without(mixer: str, kept: str) -> None:
    student, ids = _student(mixer, kept), tokens(1, 9)
    options: dict[str, Any] = {"max_new_tokens": 200, "do_sample": False, "eos_token_id": None}
    cached = student.generate(ids, use_cache=True, **options)
    assert cached.shape == (1, 209) and len(cached[0].unique()) > 5
    assert torch.equal(cached, student.generate(ids, use_cache=False, **options))


@every_student
def test_padded_rows_generate_what_they_generate_alone(mixer: str, kept: str) -> None:
    """Greedy, and in beams with the cache reordered."""
    student, ids, mask = _student(mixer, kept), tokens(2, 14), torch.ones(2, 14, dtype=torch.int64)
    mask[0, :6] = 0
    for beams in (1, 3):
        options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "num_beams": beams, "eos_token_id": None}
        together = student.generate(ids, attention_mask=mask, **options)
        assert torch.equal(together[0, 6:], student.generate(ids[:1, 6:], **options)[0])
        assert torch.equal(together[1], student.generate(ids[1:], **options)[0])


@every_student
def test_chunked_prefill_equals_one_pass(mixer: str, kept: str) -> None:
    student, ids = _student(mixer, kept), tokens(2, 40)
    with torch.no_grad():
        cache, parts, start = student.new_cache(), [], 0
        for size in (13, 1, 19, 7):
            parts.append(student(ids[:, start : start + size], past_key_values=cache, use_cache=True).logits)
            start += size
        torch.testing.assert_close(torch.cat(parts, 1), student(ids, use_cache=False).logits, rtol=1e-10, atol=1e-10)


@every_student
def test_teacher_forced_decoding_in_float32_is_near_one_pass(mixer: str, kept: str) -> None:
    student, ids = _student(mixer, kept, dtype=torch.float32), tokens(1, 60)
    with torch.no_grad():
        cache = student.new_cache()
        stepped = [student(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(60)]
        torch.testing.assert_close(torch.cat(stepped, 1), student(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


FRESH = """
import json, sys, torch, limbeck
from pathlib import Path
from transformers import AutoModelForCausalLM
made = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = torch.tensor(json.loads(sys.argv[2]))
    made[folder.name] = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None).tolist()
print(json.dumps(made))
"""


def test_every_saved_hybrid_generates_the_same_in_a_fresh_process(tmp_path: Path) -> None:
    """Through the Auto class after ``import limbeck``: one process for all mixers, with no layer kept."""
    ids, expected = tokens(2, 9), {}
    for mixer in MIXERS:
        student = _student(mixer, "all-linear")
        save_model(student, tmp_path / mixer)
        expected[mixer] = student.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None).tolist()
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path), json.dumps(ids.tolist())],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == expected and len(found) == len(MIXERS)


@pytest.mark.parametrize("family", ["llama3", "gemma3", "phi3"])
@pytest.mark.parametrize("kept", KEPT)
def test_a_saved_hybrid_generates_the_same(family: str, kept: str, tmp_path: Path) -> None:
    """Through the Auto class, with sdpa; sampling options and stop ids travel in the generation config."""
    student, ids = _student("gated_deltanet", kept, family), tokens(2, 9)
    student.generation_config.eos_token_id = [2, 5]
    student.generation_config.pad_token_id = 0
    save_model(student, tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float64)
    assert again.config._attn_implementation == "sdpa"
    assert again.generation_config.eos_token_id == [2, 5]
    made = student.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(again.generate(ids, max_new_tokens=20, do_sample=False), made)
    strict = load_model(str(tmp_path / "student"), dtype=torch.float64)
    assert torch.equal(strict.generate(ids, max_new_tokens=20, do_sample=False), made)
