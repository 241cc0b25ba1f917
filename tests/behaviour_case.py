"""A tiny base with a tokenizer of its own and a few made-up tasks: what the behavioural-matching doors and pages are tried on."""

from __future__ import annotations

import json
from pathlib import Path

from limbeck.config.parts.stages import TrainTokenizer
from limbeck.data.tokenizer import train_tokenizer
from limbeck.models.loading import build_model, load_tokenizer, save_model

COLOURS = ("red", "green", "blue", "white", "black", "brown")
TASKS = {
    "colours": lambda i: (f"What colour is number {i}?", f"It is {COLOURS[i % 6]}."),
    "sums": lambda i: (f"Add {i} and {i + 3}.", f"That makes {2 * i + 3}."),
    "echo": lambda i: (f"Say {COLOURS[i % 6]} {i}!", f"{i} {COLOURS[i % 6]}"),
}


def write_workspace(folder: Path, *, layers: int = 2, width: int = 32) -> Path:
    """``folder/base`` (a random Qwen2 with a trained tokenizer) and ``folder/data/{colours,sums,echo}.jsonl`` of 90 rows each."""
    (folder / "data").mkdir(parents=True)
    texts = []
    for name, task in TASKS.items():
        rows = [dict(zip(("question", "answer"), task(i), strict=True)) for i in range(90)]
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        texts += [f"{row['question']} {row['answer']}" for row in rows]
    train_tokenizer(texts, TrainTokenizer(vocabulary=320), folder / "words")
    words = load_tokenizer(str(folder / "words"))
    config = {
        "model_type": "qwen2", "vocab_size": len(words), "hidden_size": width, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.15,
        "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id,
    }  # fmt: skip
    save_model(build_model(config, seed=0), folder / "base", tokenizer_source=str(folder / "words"))
    return folder
