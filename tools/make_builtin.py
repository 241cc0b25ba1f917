"""Turn a finished `pretrain` run into the teacher that comes with the package.

    limbeck run pretrain --run-dir runs/pretrain
    python tools/make_builtin.py runs/pretrain

Writes `src/limbeck/builtin/code-2m/`: bf16 weights, tokenizer, the resolved recipe, the training curve and a card with what was
measured.  Refuses a model that does not recall at half its context: experiments on such a teacher would mean nothing.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from limbeck.config.load import load_recipe
from limbeck.config.parts.stages import RecallOptions, StudentOptions
from limbeck.data.tokenizer import ordinary_ids
from limbeck.evaluation.recall import recall
from limbeck.evaluation.retrieval import retrieval_heads, retrieval_layers
from limbeck.models.loading import load_model, load_tokenizer
from limbeck.models.structure import decoder_layers
from limbeck.stages.export import export_model
from limbeck.stages.run import run_recipe
from limbeck.students.student import build_student

FOLDER = Path(__file__).resolve().parents[1] / "src" / "limbeck" / "builtin" / "code-2m"
RESTORING = "150k"
LICENCE = (
    "The weights are Apache-2.0 like the rest of Limbeck. They were trained from random numbers on the source of Python's standard "
    "library (PSF License Agreement; as found in the Python installation that ran the recipe, tests left out) and on made-up recall "
    "documents; none of that text is in the package."
)


def restore_one_layer(ids: np.ndarray, distilled: list[int]) -> dict[tuple[int | None, str], float]:
    """Recall (repeat, 256) of hybrids in which one layer alone is softmax, or none, by ``(layer, when)``.

    After the quickstart's align for every layer; for ``distilled`` also after a short distillation, since a layer that looks only
    where no other has looked before does not know yet that the others are gone.
    """
    probe = RecallOptions(tasks=("repeat",), distances=(256,), rows=8, vocabulary=512)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        run_recipe(load_recipe("quickstart"), recipe_dir=Path.cwd(), run_dir=run, stage="align")
        found: dict[tuple[int | None, str], float] = {}
        for layer in [None, *range(len(decoder_layers(load_model(str(FOLDER)))))]:
            options = StudentOptions.model_validate({"from": "align", "keep": [] if layer is None else [layer]})
            student = build_student(options, lambda _: str(run / "align" / "model"), seed=0, dtype=torch.float32)
            found[layer, "align"] = recall(student.model.eval(), probe, ids)[0]["accuracy"]
        for layer in distilled:
            recipe = load_recipe("quickstart", [f"distil.student.keep=[{layer}]", f"distil.loop.tokens={RESTORING}"])
            run_recipe(recipe, recipe_dir=Path.cwd(), run_dir=run, stage="distil")
            found[layer, "distil"] = recall(load_model(str(run / "distil" / "model")), probe, ids)[0]["accuracy"]
    return found


def main() -> int:
    """Export, measure, refuse or keep."""
    run = Path(sys.argv[1])
    recipe = json.loads((run / "recipe.json").read_text())
    trained = {name: options for name, options in recipe["stages"].items() if options["kind"] == "train"}
    stage = run / list(trained)[-1]
    export_model(stage / "model", FOLDER, "bfloat16")
    (FOLDER / "recipe.json").write_text(json.dumps({"name": recipe["name"], "stages": trained}, indent=1))
    curves = {
        name: [json.loads(line) for line in (run / name / "metrics.jsonl").read_text().splitlines()] for name in trained
    }
    kept = [
        {"stage": name, **{k: v for k, v in row.items() if k in ("step", "tokens", "loss", "validation/loss", "lr/0")}}
        for name, curve in curves.items()
        for row in curve
    ]
    (FOLDER / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))

    torch.manual_seed(0)
    model, tokenizer = load_model(str(FOLDER)), load_tokenizer(str(FOLDER))
    ids = ordinary_ids(tokenizer)
    found = recall(
        model, RecallOptions(tasks=("repeat", "key_value"), distances=(32, 64, 128, 256), rows=16, vocabulary=512), ids
    )
    heads = retrieval_heads(model, ids[:512], distance=128)
    layers = retrieval_layers(model, ids[:512], distance=128)
    control = max(set(range(len(decoder_layers(model)))) - set(layers))
    restored = restore_one_layer(ids, [control, *layers])
    enough = [layer for layer in layers if restored[layer, "distil"] >= 0.9]
    steps = [next(row for row in reversed(curve) if "tokens" in row) for curve in curves.values()]
    training = {key: sum(row[key] for row in steps) for key in ("step", "tokens")}
    held_out = next(row["validation/loss"] for row in reversed(curves[stage.name]) if "validation/loss" in row)
    rows = "\n".join(f"| {e['task']} | {e['distance']} | {e['accuracy']:.3f} |" for e in found)
    restoring = "\n".join(
        f"| {'none' if layer is None else layer} | {value:.3f} | "
        + (f"{restored[layer, 'distil']:.3f} |" if (layer, "distil") in restored else "|")
        for (layer, when), value in restored.items()
        if when == "align"
    )
    far = next(e["accuracy"] for e in found if e["task"] == "repeat" and e["distance"] == 256)
    size = sum(p.stat().st_size for p in FOLDER.iterdir()) / 1e6
    (FOLDER / "README.md").write_text(
        f"""---
license: apache-2.0
---

# code-2m: the small teacher that comes with Limbeck

A Qwen3-style language model of Python code, {sum(p.numel() for p in model.parameters()):,} parameters, head_dim 32 with width 160
and 4 heads (so head_dim != hidden / heads), byte-level BPE of 4,096 tokens, context 512.  `builtin:code-2m` in a recipe.

Made by the shipped `pretrain` recipe (resolved form: `recipe.json`; curve: `metrics.jsonl`): {training["step"]} steps,
{training["tokens"]:,} tokens, held-out loss {held_out:.4f} nats a token (text and recall documents together).
Remake it with `limbeck quickstart --train-teacher`.

| probe | distance | accuracy |
|---|---|---|
{rows}

Recall (repeat, 256) of a hybrid in which one layer alone is softmax, after the quickstart's align, and after distilling
{RESTORING} tokens more (the layers that look back, and one control):

| softmax in layer | after align | after align and distil |
|---|---|---|
{restoring}

| criterion | bound | measured | holds |
|---|---|---|---|
| recall half a context back (repeat, 256) | >= 0.9 | {far:.3f} | {str(far >= 0.9).lower()} |
| layers that bring recall back to 0.9 when they alone are softmax | >= 2 | {len(enough)} | {str(len(enough) >= 2).lower()} |

Heads that put more than 0.3 of their attention on the token to copy, as layer.head:
{", ".join(f"{layer}.{head} ({mass:.2f})" for layer, head, mass in heads)}.  Layers that look back, also when the ones before them
are silent: {", ".join(map(str, layers))}.

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
