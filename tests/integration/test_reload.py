"""A saved student is a Hugging Face folder: any process that imports limbeck loads it with the Auto classes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import linear_plugin
from families import FAMILIES, LAYERS, tiny_model, tokens
from limbeck.config.parts.surgeries import HybridizeOptions
from limbeck.models.limbeck_model import wrap_student
from limbeck.models.loading import load_model, load_tokenizer, save_model

TESTS = Path(__file__).resolve().parents[1]
BASE = {"source": "tiny", "fingerprint": "none"}

RELOAD = """
import sys
ORDER
assert "torch" not in sys.modules or "transformers" in sys.modules
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
assert AutoConfig.from_pretrained(sys.argv[1] + "/qwen3").model_type == "limbeck"
import linear_plugin
import json, torch
from pathlib import Path
from typing import Any
from safetensors.torch import load_file
result = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    if not folder.is_dir():
        continue
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    expected = load_file(f"{folder}.expected")
    with torch.no_grad():
        logits = model(expected["ids"]).logits
    made = model.generate(expected["ids"], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    result[folder.name] = [float((logits - expected["logits"]).abs().max()), torch.equal(made, expected["made"]), tied]
print(json.dumps(result))
"""


def _run(code: str, *args: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def test_students_of_every_family_reload_in_a_fresh_process(tmp_path: Path) -> None:
    ids, tied = tokens(2, 9), {}
    students: dict[str, tuple[str, Any]] = {}
    for family in FAMILIES:
        layers = tuple(range(LAYERS)) if family in ("olmo2", "gemma3") else (1, 3)
        students[family] = (family, linear_plugin.DecayOptions(layers=layers))
    for mixer in ("gated_deltanet", "swa"):
        students[f"qwen3-{mixer}"] = ("qwen3", HybridizeOptions.model_validate({"mixer": mixer, "keep": [0]}))
    for number, (name, (family, surgery)) in enumerate(students.items()):
        tied[name] = number % 2 == 0
        student = wrap_student(tiny_model(family, tied=tied[name], dtype=torch.float64), [surgery], BASE)
        save_model(student, tmp_path / name)
        with torch.no_grad():
            made = student.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
            save_file({"ids": ids, "logits": student(ids).logits, "made": made}, tmp_path / f"{name}.expected")
    result = json.loads(_run(RELOAD.replace("ORDER", "import limbeck"), str(tmp_path)))
    # Weights that are mapped from a file lie otherwise in memory, and a matrix product may then sum in another order.
    assert result == {name: [pytest.approx(0.0, abs=1e-13), True, tied[name]] for name in students}


def test_registration_works_when_transformers_comes_first(tmp_path: Path) -> None:
    student = wrap_student(tiny_model("qwen3"), [linear_plugin.DecayOptions(layers=(0,))], BASE)
    save_model(student, tmp_path / "m")
    code = """
import sys
from transformers import AutoConfig
import limbeck
print(type(AutoConfig.from_pretrained(sys.argv[1])).__name__)
"""
    assert _run(code, str(tmp_path / "m")) == "LimbeckQwen3Config"


def test_importing_limbeck_loads_neither_torch_nor_transformers() -> None:
    assert _run("import limbeck, sys; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])") == "[]"


def test_a_resaved_student_is_the_same_student(tmp_path: Path) -> None:
    """Also with transformers' own save_pretrained."""
    student = wrap_student(tiny_model("mistral"), [linear_plugin.DecayOptions(layers=(0, 2))], BASE)
    student.save_pretrained(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    save_model(again, tmp_path / "b")
    third, ids = load_model(str(tmp_path / "b")), tokens(1, 12)
    with torch.no_grad():
        assert torch.equal(third(ids).logits, student(ids).logits)
    assert third.config.limbeck == student.config.limbeck


def test_a_really_trained_llama_loads_and_tells_a_story(stories260k: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(str(stories260k)), load_tokenizer(str(stories260k))
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    if ids[0, 0] != tokenizer.bos_token_id:
        ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], 1)
    made = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(made[0], skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was a little girl named"), text
    student = wrap_student(model, [linear_plugin.DecayOptions(layers=())], BASE)
    save_model(student, tmp_path / "m", tokenizer_source=str(stories260k))
    again = load_model(str(tmp_path / "m"))
    assert torch.equal(again.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0), made)
    assert load_tokenizer(str(tmp_path / "m"))("Lily saw a cat.").input_ids == tokenizer("Lily saw a cat.").input_ids
