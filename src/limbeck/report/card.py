"""A short Markdown model card from the same data as the page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import yaml

from limbeck.config.redact import redacted
from limbeck.evaluation.harness_table import harness_rows
from limbeck.evaluation.table import Row, comparison_rows, percent
from limbeck.report.adapters import (
    SPLITS,
    Judgement,
    command,
    does,
    facts,
    judgements,
    loss_words,
    notes,
    sentence,
    share,
    signed,
    tiles,
    unjudged,
    warnings,
)
from limbeck.report.agent import agent_lines, agent_stages
from limbeck.report.provenance import hub_base, licence, made_from, made_with, safe_command
from limbeck.report.run import Run, became
from limbeck.report.tasks import task_notes, task_stages


def model_card(run: Run, *, stock: bool = False, peft: bool = False) -> str:
    """What the model is, what it was made with, how it compares, how it is loaded and how it was made.

    ``stock``: transformers alone loads it.  ``peft``: the folder holds adapters that a LoRA generator wrote, not a model.
    """
    stage = run.evaluated
    lines = ["---", f"library_name: {'peft' if peft else 'transformers'}", *_base(run), f"tags: [{', '.join(_tags(run, peft))}]", "---", ""]
    lines += [f"# {_cell(run.name)}", ""]
    if stage is not None:
        lines += [became(stage.evaluation or {}), ""]
    if run.recipe.get("description"):
        lines += [_cell(run.recipe["description"]), ""]
    lines += _loading_adapters() if peft else _loading(stock, "hybrid-attention" in _tags(run, peft))
    if stage is not None:
        results = stage.evaluation or {}
        names, setting = list(results["models"]), results.get("setting", {})
        where = f"On {setting.get('rows')} held-out rows of {setting.get('sequence')} tokens, {setting.get('precision')}."
        lines += ["## Evaluation", "", where, ""]
        lines += _measures(comparison_rows(results), names)
    for judged_tasks in task_stages(run):
        measured = judged_tasks.tasks or {}
        lines += [f"## Tasks: {_cell(judged_tasks.name)}", "", _cell(" ".join(task_notes(measured))), ""]
        lines += _measures(harness_rows(measured), list(measured["models"]))
    for judged in judgements(run):
        lines += _generator(judged)
    for judged_stage in agent_stages(run):
        lines += agent_lines(judged_stage)
    for one in unjudged(run):
        lines += [f"## LoRA generator: {_cell(one.name)}", "", f"{_cell(does(one))}. No evaluate_adapters stage has judged it.", ""]
        lines += [*(f"* {_cell(label)}: {_cell(words)}" for label, words in facts(run, one)), "", *_writing(one.name)]
    trained = [s for s in run.stages if s.metrics]
    if trained:
        lines += ["## Training", ""]
        lines += [*(f"* {_cell(s.name)}: {s.tokens:,} tokens, {s.record.get('seconds', 0):.0f} s" for s in trained), ""]
    return "\n".join([*lines, *_licence(run), *_made(run)])


def _measures(rows: Iterable[Row], names: list[str]) -> list[str]:
    """A row a measure, a column a model; the best is bold."""
    lines = ["| | " + " | ".join(map(_cell, names)) + " |", "|---|" + "---:|" * len(names)]
    for row in rows:
        cells = (f"**{_cell(cell)}**" if i == row.best else _cell(cell) for i, cell in enumerate(row.cells))
        lines.append(f"| {_cell(row.group)}: {_cell(row.measure)} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _tags(run: Run, peft: bool) -> list[str]:
    """Ours, and what its surgeries make of a base."""
    stages = run.recipe.get("stages", {}).values()
    kinds = {surgery.get("kind") for options in stages for surgery in (options.get("student") or {}).get("surgery") or () if isinstance(surgery, dict)}
    words = {"hybridize": "hybrid-attention", "ternarize": "ternary", "lora_generator": "lora"}
    made = ["lora"] if peft else [word for kind, word in words.items() if kind in kinds]
    return ["limbeck", "distillation", *made]


def _base(run: Run) -> list[str]:
    """The head's entries on the base: its name where that is one of the hub, and its licence, which goes with the student."""
    name = hub_base(run)
    head = {**({"base_model": name} if name else {}), **licence(run)}
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True).splitlines() if head else []


def _licence(run: Run) -> list[str]:
    """What of the base's licence is known."""
    found, name = licence(run), hub_base(run)
    if not found and name is None:
        return []
    terms = " ".join(_cell(value) for value in found.values())
    known = f"The base's own card says: {terms}." if found else f"It was not to be had when this was made: see the card of {_cell(str(name))}."
    return ["## Licence", "", f"What was made of a base is under the base's licence. {known}", ""]


def _made(run: Run) -> list[str]:
    """Where it comes from, and how to make it again."""
    lines = ["## How this was made", ""]
    origins = made_from(run)
    if origins:
        lines += ["| stage | data | tokenizer | teacher |", "|---|---|---|---|"]
        lines += [*(f"| {' | '.join(map(_cell, row))} |" for row in origins), ""]
    lines += [*(f"* {_cell(name)}: {_cell(value)}" for name, value in made_with(run)), ""]
    if run.environment.get("command"):
        lines += [*_fenced(safe_command(run), "bash"), ""]
    lines += ["The recipe below, saved as recipe.yaml, makes it again: `limbeck run recipe.yaml`.", ""]
    return [*lines, *_fenced(yaml.safe_dump(redacted(run.recipe), sort_keys=False, allow_unicode=True).rstrip(), "yaml"), ""]


def _fenced(text: str, language: str) -> list[str]:
    """A block of code that its own text does not end."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", text)), 0)
    return [f"{fence}{language}", text, fence]


def _loading(stock: bool, foreign: bool) -> list[str]:
    """How transformers opens it; ``foreign``: other tools do not, and how they come to."""
    return [
        "## Loading", "", "```python", *([] if stock else ["import limbeck  # registers the model class"]),
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'model = AutoModelForCausalLM.from_pretrained("PATH_TO_THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH_TO_THIS_FOLDER")', "```", "",
        *([] if stock or not foreign else [
            "Tools that do not import limbeck do not know this model type. lm-evaluation-harness runs on it by",
            "`python -m limbeck lm_eval --model hf --model_args pretrained=PATH_TO_THIS_FOLDER --tasks ...`; a hybrid of the mixer preset `native` can be",
            "exported as one that stock tools open (`limbeck export ... --to native`).", "",
        ]),
    ]  # fmt: skip


def _loading_adapters() -> list[str]:
    return [
        "## Loading", "", "Each folder here is one adapter; `adapter_config.json` names the base that it belongs to.", "", "```python",
        "from peft import PeftModel", "from transformers import AutoModelForCausalLM", "",
        'base = AutoModelForCausalLM.from_pretrained("PATH_TO_THE_BASE")',
        'model = PeftModel.from_pretrained(base, "PATH_TO_ONE_ADAPTER")', "```", "",
    ]  # fmt: skip


def _generator(judged: Judgement) -> list[str]:
    """What a judged generator is, what it is worth beside every control, and how it writes an adapter."""
    lines = [f"## LoRA generator: {_cell(judged.generated)}", "", _cell(sentence(judged)), ""]
    lines += [f"* {_cell(label)}: {_cell(words)}" for label, words in facts(judged.run, judged.generator)]
    lines += ["", *(f"**{_cell(label)}: {_cell(value)}** ({_cell(note)})  " for label, value, note in tiles(judged)), ""]
    for warning in warnings(judged):
        lines += [_cell(warning), ""]
    for split in judged.splits:
        number = judged.split(split)["conditions"]
        lines += [f"### {_cell(judged.stage.name)}: {number} × {_cell(SPLITS.get(split, split))}", ""]
        lines += [*(f"{_cell(note)}" for note in notes(judged, split)), ""]
        lines += ["| | loss, nats a token | share of the teacher's gain | generated leads by | 95% interval |", "|---|" + "---:|" * 4]
        lines += [*_rows(judged, split), ""]
    meanings = {column.key: column for split in judged.splits for column in judged.columns(split)}
    lines += ["Controls:", "", *(f"* {_cell(c.name)}: {_cell(c.meaning)}" for c in meanings.values() if c.control), ""]
    if judged.results.get("composition"):
        found = judged.results["composition"]
        lines += [
            f"Of {len(found['mixes'])} mixes of two tasks, the delta of the adapter trained on the mix is nearer to the sum of both parts' deltas "
            f"than to either in {percent(found['additive'])}.", "",
        ]  # fmt: skip
    return lines + _writing(judged.generated)


def _rows(judged: Judgement, split: str) -> list[str]:
    found, rows = judged.split(split), []
    for column in judged.columns(split):
        mean, low, high = found["lead"].get(column.key, [math.nan] * 3)
        name = f"**{_cell(column.name)}**" if column.key == judged.generated else _cell(column.name) + " (control)" * column.control
        known = found["conditions"] > 1 and math.isfinite(low) and math.isfinite(high)
        cells = [loss_words(found["nll"][column.key]), share(judged, split, column.key), signed(mean), f"{signed(low)} to {signed(high)}" if known else "–"]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def _writing(stage: str) -> list[str]:
    line = command(stage).replace("`", "").replace("\n", " ")
    return ["### Writing an adapter", "", "```bash", line, "```", "", "`--prompt` may stand several times, once for each example of the task.", ""]


def _cell(text: str) -> str:
    """Text that neither ends a table's cell nor starts markup."""
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
