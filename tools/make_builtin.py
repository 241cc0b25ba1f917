"""Turn a finished `pretrain` run into the teacher that comes with the package.

    limbeck run pretrain --run-dir runs/pretrain
    python tools/make_builtin.py runs/pretrain

Writes `src/limbeck/builtin/code-2m/`: bf16 weights, tokenizer, the resolved recipe, the training curve and a card with what was
measured.  Refuses a model that does not recall at half its context: experiments on such a teacher would mean nothing.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

from limbeck.config.parts.stages import RecallOptions
from limbeck.data.tokenizer import ordinary_ids
from limbeck.evaluation.recall import recall
from limbeck.evaluation.retrieval import retrieval_heads
from limbeck.models.loading import load_model, load_tokenizer
from limbeck.stages.export import export_model

FOLDER = Path(__file__).resolve().parents[1] / "src" / "limbeck" / "builtin" / "code-2m"
LICENCE = (
    "The weights are Apache-2.0 like the rest of Limbeck. They were trained from random numbers on the source of Python's standard "
    "library (PSF License Agreement; as found in the Python installation that ran the recipe, tests left out) and on made-up recall "
    "documents; none of that text is in the package."
)


def main() -> int:
    """Export, measure, refuse or keep."""
    run = Path(sys.argv[1])
    stage = run / "pretrain"
    export_model(stage / "model", FOLDER, "bfloat16")
    recipe = json.loads((run / "recipe.json").read_text())
    (FOLDER / "recipe.json").write_text(
        json.dumps({"name": recipe["name"], "stages": {"pretrain": recipe["stages"]["pretrain"]}}, indent=1)
    )
    shutil.copyfile(stage / "metrics.jsonl", FOLDER / "metrics.jsonl")
    curve = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if k in ("step", "tokens", "loss", "validation/loss", "lr/0")} for row in curve]
    (FOLDER / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))

    torch.manual_seed(0)
    model, tokenizer = load_model(str(FOLDER)), load_tokenizer(str(FOLDER))
    ids = ordinary_ids(tokenizer)
    found = recall(
        model, RecallOptions(tasks=("repeat", "key_value"), distances=(32, 64, 128, 256), rows=16, vocabulary=512), ids
    )
    heads = retrieval_heads(model, ids[:512], distance=128)
    layers = sorted({layer for layer, _, _ in heads})
    training = next(row for row in reversed(curve) if "tokens" in row)
    held_out = next(row["validation/loss"] for row in reversed(curve) if "validation/loss" in row)
    rows = "\n".join(f"| {e['task']} | {e['distance']} | {e['accuracy']:.3f} |" for e in found)
    far = next(e["accuracy"] for e in found if e["task"] == "repeat" and e["distance"] == 256)
    size = sum(p.stat().st_size for p in FOLDER.iterdir()) / 1e6
    (FOLDER / "README.md").write_text(
        f"""# code-2m: the small teacher that comes with Limbeck

A Qwen3-style language model of Python code, {sum(p.numel() for p in model.parameters()):,} parameters, head_dim 32 with width 160
and 4 heads (so head_dim != hidden / heads), byte-level BPE of 4,096 tokens, context 512.  `builtin:code-2m` in a recipe.

Made by the shipped `pretrain` recipe (resolved form: `recipe.json`; curve: `metrics.jsonl`): {training["step"]} steps,
{training["tokens"]:,} tokens, held-out loss {held_out:.4f} nats a token (text and recall documents together).
Remake it with `limbeck quickstart --train-teacher`.

| probe | distance | accuracy |
|---|---|---|
{rows}

| criterion | bound | measured | holds |
|---|---|---|---|
| recall half a context back (repeat, 256) | >= 0.9 | {far:.3f} | {str(far >= 0.9).lower()} |
| layers with a head that puts more than 0.3 of its attention on the token to copy | >= 2 | {len(layers)} | {str(len(layers) >= 2).lower()} |

Such heads, as layer.head: {", ".join(f"{layer}.{head} ({mass:.2f})" for layer, head, mass in heads)}.  A hybrid that does not keep
softmax attention in layer {", ".join(map(str, layers))} does not recall.

{LICENCE}
"""
    )
    print((FOLDER / "README.md").read_text(), f"{size:.2f} MB")
    if far < 0.9 or size > 8:
        print(f"REFUSED: recall {far:.3f} (>= 0.9), {size:.1f} MB (<= 8)")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
