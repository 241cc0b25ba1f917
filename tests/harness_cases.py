"""Task files of lm-evaluation-harness on a few made-up lines, and tiny students with a real tokenizer to run them on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from condition_cases import TOKENIZER
from families import tiny_model
from limbeck.config.parts.surgeries import HybridizeOptions, TernarizeOptions
from limbeck.models.limbeck_model import wrap_student
from limbeck.models.loading import load_tokenizer, save_model

VOCABULARY = len(load_tokenizer(TOKENIZER))
ORIGIN = {"source": "tiny", "fingerprint": {}}
CHOICES = [" x + 1", " None", "[", " yield from items"]
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
MIXERS = {"hybrid": {"kind": "gated_deltanet"}, "native": {"kind": "gated_deltanet", "preset": "native"}, "window": {"kind": "swa", "window": 6, "sinks": 2}}


def task_files(home: Path) -> Path:
    """A folder with ``choice``, ``text`` and ``write``: multiple choice, perplexity of whole texts, and generation until a newline."""
    folder = home / "tasks"
    folder.mkdir(parents=True)
    _task(
        folder, "choice", [{"q": f"def f{'_' * i}(x):\n    return", "choices": CHOICES, "answer": i % 4} for i in range(6)],
        output_type="multiple_choice", doc_to_text="{{q}}", doc_to_choice="choices", doc_to_target="answer",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )  # fmt: skip
    _task(
        folder, "text", [{"text": "import os\n" * times} for times in (1, 7, 40)], output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="text", metric_list=[{"metric": "bits_per_byte"}],
    )  # fmt: skip
    _task(
        folder, "write", [{"q": "def f(x):\n    return " + "a" * i, "a": "x"} for i in range(4)], output_type="generate_until", doc_to_text="{{q}}",
        doc_to_target="a", generation_kwargs={"until": ["\n"], "max_gen_toks": 8}, metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    return folder


def _task(folder: Path, name: str, rows: Sequence[dict[str, Any]], **fields: Any) -> None:
    lines = folder / f"{name}.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(lines)}, "cache_dir": str(folder / "cache")}, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **fields, "metadata": {"version": 1.0}}))


def model_of(kind: str) -> Any:
    """``plain`` Qwen3, ``ternary``, or a hybrid of :data:`MIXERS` with every tensor of its mixers moved."""
    base = tiny_model("qwen3", num_hidden_layers=2, head_dim=8, vocab_size=VOCABULARY, max_position_embeddings=128, bos_token_id=0, eos_token_id=0)
    if kind == "plain":
        return base
    surgery = TernarizeOptions() if kind == "ternary" else HybridizeOptions(mixer=MIXERS[kind], keep=(1,))
    student: Any = wrap_student(base, [surgery], ORIGIN)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in student.mixers().values():
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return student


def saved(kind: str, folder: Path) -> Path:
    """The same as a folder with the built-in tokenizer."""
    save_model(model_of(kind), folder, tokenizer_source=TOKENIZER)
    return folder
