"""What a recipe would do, in a few lines a stage: ``limbeck check``."""

from __future__ import annotations

from math import ceil, prod
from typing import Any

from limbeck.config.address import shown
from limbeck.config.base import From
from limbeck.config.recipe import Recipe, stage_order


def summarise(recipe: Recipe) -> str:
    """Stages in their order, with data, student, teacher, objectives and budget."""
    order = stage_order(recipe)
    lines = [f"{recipe.name}: {recipe.description}" if recipe.description else recipe.name]
    for number, name in enumerate(order, 1):
        stage = recipe.stages[name]
        lines.append(f"\n{number}. {name} ({stage.kind})")
        lines += [f"   {word:<10} {text}" for word, text in _facts(recipe, stage)]
        if stage.grid:
            cells = prod(len(values) for values in stage.grid.values())
            lines.append(f"   {'grid':<10} {cells} runs: {', '.join(stage.grid)}")
    return "\n".join(lines)


def _facts(recipe: Recipe, stage: Any) -> list[tuple[str, str]]:
    facts = []
    if getattr(stage, "from_", None):
        facts.append(("from", stage.from_))
    if getattr(stage, "data", None) is not None:
        facts.append(("data", _data(stage.data)))
    if hasattr(stage, "student"):
        facts += [("student", _student(stage.student)), ("trains", ", ".join(stage.student.train))]
    if hasattr(stage, "objectives"):
        teacher = stage.teacher
        facts.append(("teacher", _teacher(teacher) if teacher else "none"))
        facts.append(("loss", " + ".join(o.kind if o.weight == 1 else f"{o.weight:g} x {o.kind}" for o in stage.objectives)))
    if hasattr(stage, "optim"):
        facts.append(("rates", ", ".join(f"{g.role or g.match or 'all'} {g.lr:g}" for g in stage.optim.groups)))
    if stage.kind == "train_adapters":
        facts += [("base", _source(stage.base)), ("conditions", f"those of stage {stage.conditions.from_}")]
        facts.append(("budget", f"{stage.loop.steps:,} steps of {stage.loop.rows} rows an adapter, {stage.loop.precision}"))
    elif hasattr(stage, "loop"):
        facts.append(("budget", _budget(stage.loop, _sequence(recipe, stage.data))))
    if hasattr(stage, "against"):
        facts.append(("against", ", ".join(stage.against) or "nothing"))
    if stage.kind == "prepare_trajectories":
        source = ", ".join(stage.path) if stage.hub is None else f"hub {stage.hub.path}"
        held_out = f"{stage.held_out:.0%} of the repositories" if isinstance(stage.held_out, float) else ", ".join(stage.held_out) or "nothing"
        facts += [("reads", source), ("windows", f"at most {stage.sequence:,} tokens, {stage.policy}"), ("held out", held_out)]
    if stage.kind == "rank_layers":
        beside = [name for name in stage.methods if name != stage.method]
        facts.append(("keeps", f"{stage.keep} layers by {stage.method}; beside it {', '.join([*beside, 'uniform', f'{stage.random_sets} random sets'])}"))
        if stage.distil is not None:
            data = stage.data or From.model_validate({"from": stage.from_})
            facts.append(("candidates", f"{stage.candidates}, each {_budget(stage.distil.loop, _sequence(recipe, data))}"))
    if hasattr(stage, "to"):
        facts.append(("writes", ", ".join(stage.to)))
    return facts


def _teacher(teacher: Any) -> str:
    """Kind, and where it is: its model, or what it is asked at."""
    place = getattr(teacher, "model", None) or shown(getattr(teacher, "url", ""))
    return f"{teacher.kind} {_source(place)}".strip()


def _source(source: Any) -> str:
    return f"of stage {source.from_}" if isinstance(source, From) else str(source)


def _data(data: Any) -> str:
    if isinstance(data, From):
        return f"that of stage {data.from_}"
    names = [f"{s.kind} {getattr(s, 'path', '')}".strip() + (f" ({s.share:.0%})" if s.share else "") for s in data.source]
    return f"{' + '.join(names)}, rows of {data.sequence}"


def _student(student: Any) -> str:
    if student.config is not None:
        origin = f"{student.config.get('model_type', 'a model')} from scratch"
    else:
        origin = _source(student.base) if student.base is not None else f"that of stage {student.from_}"
    steps = [f"{s.kind} with {s.mixer.kind}" if hasattr(s, "mixer") else s.kind for s in student.surgery]
    keep = student.keep.from_ if isinstance(student.keep, From) else student.keep
    return "; ".join([origin, *steps, *([f"softmax kept in {_layers(keep)}"] if keep is not None else [])])


def _layers(keep: Any) -> str:
    return f"layers {', '.join(map(str, keep))}" if isinstance(keep, tuple) and keep else "no layer" if keep == () else str(keep)


def _sequence(recipe: Recipe, data: Any) -> int | None:
    seen: set[str] = set()
    while isinstance(data, From) and data.from_ not in seen:
        seen.add(data.from_)
        data = getattr(recipe.stages[data.from_], "data", None)
    return getattr(data, "sequence", None)


def _budget(loop: Any, sequence: int | None) -> str:
    if loop.epochs is not None:
        return f"{loop.epochs:g} epochs, {_quantity(loop.batch_tokens)} tokens a step"
    tokens = loop.tokens or (loop.steps * loop.batch_tokens if loop.steps else None)
    if tokens is None and sequence is not None:
        tokens = loop.samples * sequence
    if tokens is None:
        return f"{loop.samples} rows, {_quantity(loop.batch_tokens)} tokens a step"
    steps = loop.steps or ceil(tokens / loop.batch_tokens)
    return f"{_quantity(tokens)} tokens in {steps:,} steps of {loop.batch_tokens:,}, {loop.precision}"


def _quantity(value: float) -> str:
    for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.4g}{suffix}"
    return f"{value:g}"
