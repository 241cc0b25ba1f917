"""A short Markdown model card from the same data as the page."""

from __future__ import annotations

from limbeck.evaluation.table import comparison_rows
from limbeck.report.run import Run, became


def model_card(run: Run, *, stock: bool = False) -> str:
    """What the model is, what it was made with, how it compares, how it is loaded and how it was made.

    ``stock``: transformers alone loads it.
    """
    stage = run.evaluated
    lines = ["---", "library_name: transformers", "tags: [limbeck, distillation, hybrid-attention]", "---", ""]
    lines += [f"# {_cell(run.name)}", ""]
    if stage is not None:
        lines += [became(stage.evaluation or {}), ""]
    if run.recipe.get("description"):
        lines += [_cell(run.recipe["description"]), ""]
    lines += [
        "## Loading", "", "```python", *([] if stock else ["import limbeck  # registers the model class"]),
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'model = AutoModelForCausalLM.from_pretrained("PATH_TO_THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH_TO_THIS_FOLDER")', "```", "",
    ]  # fmt: skip
    if stage is not None:
        results = stage.evaluation or {}
        names, setting = list(results["models"]), results.get("setting", {})
        where = f"On {setting.get('rows')} held-out rows of {setting.get('sequence')} tokens, {setting.get('precision')}."
        lines += ["## Evaluation", "", where, ""]
        lines += ["| | " + " | ".join(map(_cell, names)) + " |", "|---|" + "---:|" * len(names)]
        for row in comparison_rows(results):
            cells = (f"**{_cell(cell)}**" if i == row.best else _cell(cell) for i, cell in enumerate(row.cells))
            lines.append(f"| {_cell(row.group)}: {_cell(row.measure)} | " + " | ".join(cells) + " |")
        lines.append("")
    trained = [s for s in run.stages if s.metrics]
    if trained:
        lines += ["## Training", ""]
        lines += [*(f"* {_cell(s.name)}: {s.tokens:,} tokens, {s.record.get('seconds', 0):.0f} s" for s in trained), ""]
    versions = ", ".join(f"{name} {number}" for name, number in run.environment.get("versions", {}).items())
    if versions:
        lines += [f"Made with {versions}.", ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text that neither ends a table's cell nor starts markup."""
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
