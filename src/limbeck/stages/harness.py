"""`limbeck evaluate --tasks`: lm-evaluation-harness on a run, a model folder, or the base with a generated LoRA.

Writes ``lm_eval.json`` into ``evaluation/`` of the stage (of ``runs/evaluate/NAME`` for a model folder), or into ``--out``::

    {"kind": "lm_eval", "harness": "0.4.13", "source": RUN_OR_MODEL, "against": MODEL | null,
     "settings": {"limit", "fewshot", "chat_template", "batch_size", "max_length", "dtype", "condition": [TEXT, ...], "named"},
     "models": {"teacher" (what --against names) | "model": {"parameters", "max_length"}},
     "tasks": {TASK: {"version", "fewshot", "documents", "group",
                      "metrics": {"METRIC,FILTER": {"better": 1 | -1 | 0, "values": {MODEL: x}, "stderr": {MODEL: x | null}}}}}}

``better`` is 1 where more is better, -1 where less is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from limbeck.errors import RunError
from limbeck.evaluation.harness import LoadedLM, Tasks, harness_version, run_tasks, spoken
from limbeck.models.loading import load_model, load_tokenizer, resolve_source
from limbeck.models.vocabulary import check_vocabulary
from limbeck.stages.context import Say
from limbeck.stages.folder import model_of, write_json
from limbeck.stages.generate import Reads, adapted_base, refuse_for_a_model
from limbeck.stages.run import load_plugins_of
from limbeck.students.generator.student import is_generator
from limbeck.students.ternarize import settled

FILE = "lm_eval.json"


@dataclass(frozen=True)
class HarnessSettings:
    """How tasks are run: see :func:`limbeck.evaluation.harness.run_tasks`."""

    limit: float | None = None
    fewshot: int | None = None
    chat_template: bool = False
    batch_size: int | str = 8
    max_length: int | None = None
    dtype: str = "float32"


def evaluate_tasks(
    path: str,
    tasks: Sequence[str],
    settings: HarnessSettings,
    *,
    include: Sequence[Path] = (),
    against: str | None = None,
    reads: Reads | None = None,
    out: Path | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Run the tasks on ``path`` (and before it on ``against``), write what came out, and return it.

    ``reads`` is what a LoRA generator reads: one LoRA is made of it, once, and acts in the base for all tasks.
    """
    reads = reads or Reads()
    target = (out or _home(path) / "evaluation") / FILE
    asked = {**({} if against is None else {"teacher": (against, Reads())}), "model": (path, reads)}
    with spoken(say):
        chosen = Tasks(tasks, include)
        models: dict[str, Any] = {}
        found: dict[str, Any] = {}
        for name, (source, read) in asked.items():
            say(f"{name}: {source}")
            models[name], found[name] = _measure(_open(source, read, settings), chosen, settings)
    results = {
        "kind": "lm_eval", "harness": harness_version(), "source": path, "against": against,
        "settings": {**asdict(settings), "condition": list(reads.texts), "named": reads.named},
        "models": models, "tasks": _beside(found),
    }  # fmt: skip
    write_json(target, results)
    say(f"{target}")
    return results


def _measure(lm: LoadedLM, tasks: Tasks, settings: HarnessSettings) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the model is, and what came out.  It is let go here: two beside each other may be more than a device holds."""
    limit = settings.limit if settings.limit is None or settings.limit < 1 else int(settings.limit)
    facts = {"parameters": sum(p.numel() for p in lm.model.parameters()), "max_length": lm.max_length}
    return facts, run_tasks(lm, tasks, fewshot=settings.fewshot, limit=limit, chat=settings.chat_template)


def _open(path: str, reads: Reads, settings: HarnessSettings) -> LoadedLM:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: torch.dtype = getattr(torch, settings.dtype)
    more: dict[str, Any] = {"batch_size": settings.batch_size, "max_length": settings.max_length}
    load_plugins_of(path)
    folder = model_of(Path(path))
    if is_generator(folder):
        student, adapters, tokenizer = adapted_base(folder.resolve(), reads, dtype=dtype, device=device)
        model, more["acting"] = student.model, partial(student.injector.active, adapters)
    else:
        refuse_for_a_model(path, reads)
        source = resolve_source(path if folder == Path(path) else str(folder))
        model, tokenizer = settled(load_model(source, dtype=dtype, device=device)), load_tokenizer(source)
    check_vocabulary(tokenizer, model, who=path)
    _check_length(model, settings.max_length)
    return LoadedLM(model.requires_grad_(False).eval(), tokenizer, **more)


def _check_length(model: Any, asked: int | None) -> None:
    made_for = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if asked is not None and made_for is not None and asked > made_for:
        raise RunError(f"--max-length {asked}: the model was made for {made_for} tokens: ask for that or less")


def _home(path: str) -> Path:
    """A stage of a run, or a folder for what is none."""
    folder = Path(path).resolve()
    stage = next((place for place in (folder, folder.parent) if (place / "stage.json").exists()), None)
    return stage or Path("runs") / "evaluate" / (folder.name if folder.is_dir() else path.replace("/", "-").replace(":", "-"))


def _beside(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One entry a task with all models' values, from one a model."""
    tasks: dict[str, Any] = {}
    for name, entries in found.items():
        for task, entry in entries.items():
            known = tasks.setdefault(task, {**entry, "metrics": {}})
            for metric, measured in entry["metrics"].items():
                row = known["metrics"].setdefault(metric, {"better": measured["better"], "values": {}, "stderr": {}})
                row["values"][name], row["stderr"][name] = measured["value"], measured["stderr"]
    return tasks
