"""Plans: of a recipe, stage by stage, or of one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from limbeck.config.load import load_recipe, recipe_folder, shipped_recipes
from limbeck.config.parts.surgeries import TernarizeOptions
from limbeck.config.recipe import Recipe, stage_order
from limbeck.errors import did_you_mean
from limbeck.planner.devices import PlanError
from limbeck.planner.machine import Machine
from limbeck.planner.others import other_part
from limbeck.planner.report import Fact, Part, Plan, parameter_facts
from limbeck.planner.serving import Serving, first_violated, serve, usual_split, ways_out
from limbeck.planner.sources import Chain, Models, quantisation, table
from limbeck.planner.storage import BITS, STATES, cache_bytes, gguf_bytes, weight_bytes
from limbeck.planner.students import Student, operate
from limbeck.planner.teaching import asked, served_facts
from limbeck.planner.training import resolve, train_part
from limbeck.planner.verdict import smallest_change


def plan_of(
    what: str | Recipe, overrides: Sequence[str], machine: Machine, given: Mapping[str, Path] | None = None, stage: str | None = None
) -> Plan:
    """The plan of a recipe (loaded, a file, or a shipped one's name) or of a model (a folder, a config.json, a name).

    Overrides are for a recipe that is still to be loaded.
    """
    if isinstance(what, Recipe):
        return recipe_plan(what, Models(what.folder, given), machine, stage)
    if not is_model(what, given):
        recipe = load_recipe(what, overrides)
        return recipe_plan(recipe, Models(recipe_folder(what), given), machine, stage)
    if overrides:
        raise PlanError(
            f"{overrides[0]}: a model has no settings; words like loop.microbatch=1 are for recipes, --dtype, --context and --sequences for models"
        )
    if stage is not None:
        raise PlanError("--stage: a model has no stages; name a recipe")
    return model_plan(what, Models(given=given), machine)


def is_model(what: str, given: Mapping[str, Path] | None = None) -> bool:
    """Whether words name a model and not a recipe; :class:`PlanError` for what is neither."""
    path = Path(what).expanduser()
    if what in (given or {}) or what.startswith("builtin:") or path.suffix == ".json" or (path.is_dir() and any(path.glob("*.json"))):
        return True
    if path.is_file() or what in shipped_recipes() or path.suffix in (".yaml", ".yml"):
        return False
    if what in table() or any(what.lower() == name.split("/")[1].lower() for name in table()):
        return True
    if "/" in what and not what.startswith((".", "/", "~")) and not path.exists():
        # A hub name: the cache may have it, and the error says how to give it.
        return True
    if path.is_dir():
        raise PlanError(f"{what}: a folder without a config.json: name the folder of a model, or a recipe's file")
    hint = did_you_mean(what, [*shipped_recipes(), *(name.split("/")[1] for name in table())]) or ";"
    raise PlanError(f"no recipe and no model is called {what!r}{hint} recipes: {', '.join(shipped_recipes())}; models: {', '.join(table())}")


def recipe_plan(recipe: Recipe, models: Models, machine: Machine, stage: str | None = None) -> Plan:
    """Every stage in its order, or ``stage`` alone."""
    if stage is not None and stage not in recipe.stages:
        raise PlanError(f"--stage: no stage named {stage!r}{did_you_mean(stage, recipe.stages) or ';'} stages: {', '.join(recipe.stages)}")
    chain = Chain(recipe, models, machine.tokens)
    names = stage_order(recipe) if stage is None else [stage]
    parts = tuple(_part(chain, name, machine) for name in names)
    swept = [name for name in names if recipe.stages[name].grid]
    notes = tuple(f"stage {name} has a grid: sizes are of one cell, times of all" for name in swept)
    return Plan(recipe.name, f"{machine.gpus} x {machine.device.name}", parts, notes)


def _part(chain: Chain, name: str, machine: Machine) -> Part:
    options = chain.recipe.stages[name]
    if options.kind != "train":
        part = other_part(chain, name, machine)
    else:
        stage = resolve(chain, name, machine)
        part = train_part(stage, chain)
        if not part.fits:
            part = replace(part, changes=smallest_change(stage, chain))
        elif (question := asked(options.teacher, options.objectives, chain, stage.text, machine)).violated:
            part = replace(part, violated=question.violated, changes=question.changes, alternatives=True)
    cells = 1
    for values in options.grid.values():
        cells *= len(values)
    return part if cells == 1 or part.seconds is None else replace(part, seconds=part.seconds * cells)


def model_plan(source: str, models: Models, machine: Machine) -> Plan:
    """A model by itself: served on these GPUs, and what training it would hold."""
    values, student = models.config(source), models.student(source)
    model = student.architecture
    dtype = machine.dtype or quantisation(values) or "bf16"
    tp, ep = usual_split(model, dtype, machine.device, machine.gpus)
    tp, ep = machine.tp or tp, machine.ep or (1 if machine.tp else ep)
    context = machine.context or model.context
    plan = Serving(model, dtype, machine.device, machine.gpus, tp, ep, context, machine.sequences, 0, machine.usable)
    served = serve(plan)
    words = first_violated(plan, served)
    token, state = cache_bytes(model, context)
    facts = parameter_facts(model.total, model.active, None, model.exact)
    kinds = [
        (layer.mixer.kind if layer.mixer is not None else "DeltaNet" if layer.deltanet is not None else _softmax(layer)) for layer in model.layers
    ]
    layers = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    facts.append(Fact("parameters", "layers", layers, "text"))
    facts += [Fact("weights", name, weight_bytes(model.weights, name)) for name in ("fp32", "bf16", "fp8", "int4")]
    facts += [
        Fact("cache", "a token", token, note="bfloat16"),
        Fact("cache", "a sequence", state, note=f"recurrent states, windows; {context:,} tokens"),
    ]
    facts += served_facts(plan, served)
    for kind, states in STATES.items():
        facts.append(Fact("training", f"all, {kind}", model.total * 4.0 * (2 + states), note=f"float32 weights, gradients, {states} more a weight"))
    facts += _ternary_facts(student)
    ways = tuple(ways_out(plan)) if words else ()
    part = Part(source, "model", tuple(facts), (), machine.budget, 0.0, words, ways, alternatives=True, notes=student.notes)
    return Plan(source, f"{machine.gpus} x {machine.device.name}", (part,))


def _softmax(layer: object) -> str:
    attention = getattr(layer, "attention", None)
    if attention is None:
        return "linear"
    return "gated attention" if attention.gated else "windowed attention" if attention.window else "attention"


def _ternary_facts(student: Student) -> list[Fact]:
    """What ternary experts (or projections) would make of it."""
    try:
        ternary = student if student.ternary else operate(student, [TernarizeOptions()])
    except PlanError:
        return []
    count = sum(w.count for w in ternary.ternary)
    facts = [
        Fact("ternary", "weights", float(count), "count", "routed experts" if any(w.kind == "experts" for w in ternary.ternary) else "projections")
    ]
    for kind in ("tq2_0", "tq1_0", "q2_0", "bf16"):
        inner, whole = gguf_bytes(ternary, kind)
        facts.append(Fact("ternary", kind, inner, note=f"{BITS[kind]:.4g} bits a weight; whole file {whole / 1e9:.4g} GB"))
    facts.append(Fact("ternary", "master + Muon", count * 8.0, note="float32 weights and one momentum, before gradients"))
    return facts
