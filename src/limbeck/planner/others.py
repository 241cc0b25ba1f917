"""Stages that do not train a student: capture, ranking, pools of adapters, deltas, judging, exports, preparation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from math import ceil, comb
from typing import Any

from limbeck.config.parts.stages import OptimOptions, StudentOptions, TrainStageOptions
from limbeck.planner.activations import Pass, kept_bytes, working_bytes
from limbeck.planner.architecture import Architecture
from limbeck.planner.devices import size_text
from limbeck.planner.generators import lora_numbers
from limbeck.planner.machine import Machine
from limbeck.planner.memory import Item, always, peak
from limbeck.planner.report import Fact, Part, parameter_facts
from limbeck.planner.sources import Chain, probe_count
from limbeck.planner.storage import STATES, cache_bytes, gguf_bytes, signal_bytes, weight_bytes, wire_bytes
from limbeck.planner.students import Student
from limbeck.planner.teaching import ask
from limbeck.planner.texts import Text
from limbeck.planner.throughput import forward_flops, scoring_rate
from limbeck.planner.training import Training, items_of

TOKEN_BYTES = 4
"""Of a prepared token: its id (labels and positions follow from documents)."""


def other_part(chain: Chain, name: str, machine: Machine) -> Part:
    """The plan of a stage of another kind than train."""
    options = chain.recipe.stages[name]
    planned = _KINDS.get(options.kind)
    if planned is None:
        return Part(name, options.kind, notes=(f"a stage of kind '{options.kind}' is not planned: it is a plug-in's",))
    return planned(chain, name, options, machine)


def _finished(
    name: str, kind: str, facts: list[Fact], items: list[Item], machine: Machine, seconds: float | None, notes: tuple[str, ...] = ()
) -> Part:
    most, _ = peak(items)
    words = ""
    changes: tuple[str, ...] = ()
    if most > machine.budget:
        words = (
            f"{size_text(most)} on one device, over which nothing is sharded in this stage, and {machine.usable:g} x {size_text(machine.device.memory)} = "
            f"{size_text(machine.budget)} are there"
        )
        # Of a device: nothing in the recipe makes one model smaller.
        changes = (f"--memory {ceil(most / machine.usable / 1e9)}GB",)
    if seconds is not None:
        facts.append(Fact("time", "wall clock", seconds, "seconds", "of operations alone"))
    return Part(name, kind, tuple(facts), tuple(items), machine.budget, seconds, words, changes, notes=notes)


def _pass_items(model: Architecture, rows: int, sequence: int, precision: str) -> list[Item]:
    """A pass without gradients, and a chunk of its logits."""
    run = Pass(rows, sequence, precision)
    work = working_bytes(model, run) * run.tokens
    return [
        Item("a pass", work, note=f"{rows} rows of {sequence:,} tokens, no gradients"),
        Item("logits", 3.0 * 4 * 1024 * model.vocabulary, note="a chunk, both models"),
    ]


def _prepare(chain: Chain, name: str, options: Any, machine: Machine) -> Part:
    text = chain.text(getattr(options, "data", None) or options)
    facts = [Fact("text", "tokens of one pass", text.tokens, "count", text.note or "known when it is prepared")]
    if text.conditions > 1:
        facts.append(Fact("text", "conditions", text.conditions, "count", "at most"))
    facts.append(Fact("disk", "prepared text", None if text.tokens is None else text.tokens * TOKEN_BYTES, note="4 bytes a token"))
    return Part(name, options.kind, tuple(facts), notes=("no model and no GPU",), seconds=0.0, budget=machine.budget)


def _capture(chain: Chain, name: str, options: Any, machine: Machine) -> Part:
    text, teacher = chain.text(options.data), options.teacher
    items: list[Item] = []
    facts: list[Fact] = []
    changes: tuple[str, ...] = ()
    violated, note, rate = "", "", machine.teacher_rate
    vocabulary = 151_936
    if teacher.kind == "local":
        model = chain.source(teacher.model).architecture
        vocabulary = model.vocabulary
        facts += parameter_facts(model.total, model.active, None, model.exact)
        items = [
            always("teacher", weight_bytes(model.weights, teacher.dtype), teacher.dtype),
            *_pass_items(model, 1, options.batch_tokens or text.sequence, teacher.dtype),
        ]
        rate = rate or scoring_rate(model, text.sequence, machine.device, 1, teacher.dtype, machine.mfu)
    else:
        question = ask(teacher, options.k, chain, text, machine)
        facts += question.facts
        rate, violated, changes, note = question.rate, question.violated, question.changes, question.note
    each = signal_bytes(options.k, options.codec, vocabulary, len(options.temperatures), options.samples)
    positions = None if text.tokens is None else text.tokens * text.share
    facts.append(Fact("signals", "a position", each, note=f"k = {options.k}, {options.codec}"))
    share = "" if text.share == 1 else f"an estimated {text.share:.0%} of the tokens have a loss"
    facts.append(Fact("signals", "store", None if positions is None else positions * each, note=share or ("" if positions else "give --tokens")))
    if teacher.kind == "http":
        wire = wire_bytes(teacher.protocol, options.k, vocabulary, len(options.temperatures))
        facts.append(Fact("wire", "a token", wire, note=f"protocol {teacher.protocol}, k = {options.k}, before compression"))
        facts.append(Fact("wire", "all", None if text.tokens is None else wire * text.tokens))
    if rate is not None:
        facts.append(Fact("time", "teacher", rate, "rate"))
    seconds = None if rate is None or text.tokens is None else text.tokens / rate
    part = _finished(name, options.kind, facts, items, machine, seconds, (f"the teacher: {note}",) if note else ())
    if machine.disk is not None and positions is not None and positions * each > machine.disk and not violated:
        violated = f"signals take {size_text(positions * each)} and {size_text(machine.disk)} are free: lower k, or use codec compact"
    return replace(part, violated=part.violated or violated, changes=part.changes or changes, alternatives=True)


def _rank(chain: Chain, name: str, options: Any, machine: Machine) -> Part:
    student = chain.student(options.from_)
    model, base = student.architecture, student.base or student.architecture
    layers = sum(layer.mixer is not None for layer in model.layers)
    text = chain.text(options.data or chain.recipe.stages[options.from_].data)
    items = [
        always("student", weight_bytes(model.weights, "fp32"), "float32"),
        always("teacher", weight_bytes(base.weights, "fp32"), "float32"),
        *_pass_items(model, options.rows, text.sequence, options.precision),
    ]
    passes = sum({"greedy": options.keep * layers, "residual": 1}.get(method, layers) for method in options.methods) + 2 * (options.random_sets + 2)
    if options.oracle:
        passes += min(options.oracle_sets, comb(layers, options.keep))
    tokens = passes * options.rows * text.sequence
    seconds = tokens * 2 * forward_flops(model, text.sequence) / (machine.device.peak(options.precision) * machine.mfu)
    facts = [
        *parameter_facts(model.total, model.active, None, model.exact),
        Fact("ranking", "scorings", passes, "count", "of sets of layers, on held-out rows and probes"),
    ]
    if options.distil is not None:
        candidates = layers if options.candidates == "all" else options.candidates
        stage = _distilled(chain, name, options, student, text, machine)
        items = items_of(stage)
        facts.append(Fact("ranking", "short distillations", candidates, "count"))
    return _finished(name, options.kind, facts, items, machine, seconds if options.distil is None else None)


def _distilled(chain: Chain, name: str, options: Any, student: Student, text: Text, machine: Machine) -> Training:
    stage = TrainStageOptions.model_validate(
        {
            "data": {"from": options.from_},
            "student": StudentOptions.model_validate({"from": options.from_, "train": ["all"]}),
            "teacher": {"kind": "local", "model": "base"},
            "objectives": [{"kind": "kl"}],
            "optim": OptimOptions.model_validate(options.distil.optim.model_dump(by_alias=True)),
            "loop": options.distil.loop.model_dump(by_alias=True),
        }
    )
    return Training(name, stage, student, text, replace(machine, gpus=1), replace(student, architecture=student.base or student.architecture))


def _pool(chain: Chain, name: str, options: Any, machine: Machine) -> Part:
    base = chain.source(options.base)
    model, loop = base.architecture, options.loop
    text = chain.text(options.conditions)
    each = 8 if loop.precision == "float64" else 4
    run = Pass((loop.together or max(1, text.conditions)) * loop.rows, text.sequence, loop.precision, kernels=machine.device.kernels)
    group = options.optim.groups[0]
    if options.mode == "lora":
        count = max(1, text.conditions) * options.inits
        one = lora_numbers(model, options.adapters.targets, options.adapters.rank)
        trained = count * one
        facts = [
            Fact("parameters", "numbers of a LoRA", one, "count"),
            Fact("parameters", "adapters", count, "count", "at most: every slice in every format, and mixes"),
        ]
        frozen = always("frozen base", weight_bytes(model.weights, "fp32") * each / 4, "float32")
    else:
        trained, facts, frozen = model.total, [], always("frozen base", 0.0)
        run = replace(run, rows=loop.rows)
    facts = [*parameter_facts(model.total, model.active, trained, model.exact), *facts]
    kept = kept_bytes(model, run, loop.activation_checkpointing) * run.tokens
    states = STATES[group.kind]
    cast = 2.0 * (model.total - model.head) if loop.precision == "bfloat16" else 0.0
    items = [
        frozen,
        always("trained weights", trained * float(each)),
        Item("compute copies", cast / (len(model.layers) if loop.activation_checkpointing else 1)),
        Item("gradients", trained * float(each), trained * float(each), trained * float(each)),
        always("optimiser", states * trained * float(each), group.kind),
        Item("activations", kept, note=f"{run.rows} rows of {run.sequence:,} tokens"),
    ]
    tokens = (max(1, text.conditions) * loop.rows * text.sequence) * loop.steps
    flops = forward_flops(model, text.sequence) * (2 + loop.activation_checkpointing + (options.mode == "full"))
    seconds = tokens * flops / (machine.device.peak(loop.precision) * machine.mfu)
    # Models that are fully fine-tuned are each a folder; a checkpoint is of the one that trains.
    out = trained * 4.0 * (1 if options.mode == "lora" else max(1, text.conditions))
    checkpoint = trained * float(each) * (1 + states)
    facts += [
        Fact("disk", "adapters", out),
        Fact("disk", "checkpoints", checkpoint * (loop.keep_last + 2), note=f"{loop.keep_last + 1} with the one in flight, and final/"),
    ]
    return _finished(name, options.kind, facts, items, machine, seconds, base.notes)


def _deltas(chain: Chain, name: str, options: Any, machine: Machine) -> Part:
    stage = chain.recipe.stages.get(getattr(options.pool, "from_", ""))
    base = chain.source(stage.base if options.base is None and stage is not None else options.base)
    model, probes = base.architecture, options.resolved_probes
    count, length = probe_count(probes), probes.length
    adapters = max(1, chain.text(stage.conditions).conditions) if stage is not None else len(options.pool)
    one = lora_numbers(model, stage.adapters.targets, stage.adapters.rank) if stage is not None else 0
    shape = options.resolved_represent
    width = (shape.projection or model.hidden) * (len(shape.layers) if shape.join == "concat" else 1)
    delta = width * (count if shape.per_probe else 1) * (length if shape.tokens == "all" else 1)
    items = [
        always("base", weight_bytes(model.weights, "fp32"), "float32"),
        Item("adapters", one * 4.0 * adapters, note="all of the pool"),
        *_pass_items(model, options.together * count, length, options.precision),
    ]
    tokens = (adapters + 1) * count * length
    facts = [
        *parameter_facts(model.total, model.active, None, model.exact),
        Fact("deltas", "numbers of a delta", delta, "count"),
        Fact("disk", "deltas", 4.0 * delta * adapters, note=f"{adapters} adapters, float32, at most"),
    ]
    return _finished(
        name, options.kind, facts, items, machine, tokens * forward_flops(model, length) / (machine.device.peak(options.precision) * machine.mfu)
    )


def _evaluate(chain: Chain, name: str, options: Any, machine: Machine) -> Part:
    student = chain.student(options.from_)
    model, base = student.architecture, student.base or student.architecture
    text = chain.text(options.data or chain.recipe.stages[options.from_].data)
    beside = {other: _beside(chain, options.from_, other) for other in options.against}
    context = max(options.speed.contexts) if options.speed is not None else text.sequence
    width = 4 if options.precision == "float32" else 2
    caches = [token * context + state for token, state in (cache_bytes(one, context, width) for one in (model, *beside.values()))]

    def items(names: Sequence[str]) -> list[Item]:
        return [
            always(options.from_, weight_bytes(model.weights, "fp32"), "float32"),
            *(always(other, weight_bytes(beside[other].weights, "fp32"), "float32, beside it") for other in names),
            Item("cache", max(caches), note=f"decode rate at {context:,} tokens"),
            *_pass_items(model, 8, text.sequence, options.precision),
        ]

    facts = [
        *parameter_facts(model.total, model.active, None, model.exact),
        Fact("cache", "a token", cache_bytes(model, context)[0], note="bfloat16"),
        Fact("cache", "a sequence", cache_bytes(model, context)[1], note="recurrent states, windows"),
        Fact("cache", "base's, a token", cache_bytes(base, context)[0], note="bfloat16"),
    ]
    # Rows are shared out to the ranks; models are whole on each.
    tokens = options.rows * text.sequence * (1 + len(beside)) / machine.gpus
    seconds = tokens * forward_flops(model, text.sequence) / (machine.device.peak(options.precision) * machine.mfu)
    part = _finished(name, options.kind, facts, items(options.against), machine, seconds)
    if part.fits:
        return part
    for count in range(len(beside) - 1, -1, -1):
        for names in combinations(options.against, count):
            if peak(items(names))[0] <= machine.budget:
                return replace(part, changes=(f"{name}.against=[{','.join(names)}]", *part.changes), alternatives=True)
    return part


def _beside(chain: Chain, stage: str, other: str) -> Architecture:
    """A model that an evaluation sets beside a stage's: its teacher or base, the student before any training, or another stage's."""
    student = chain.student(stage)
    if other == "teacher":
        teacher = getattr(chain.recipe.stages[stage], "teacher", None)
        named = getattr(teacher, "model", None) if getattr(teacher, "kind", None) == "local" else None
        return chain.source(named).architecture if named is not None else student.base or student.architecture
    return student.architecture if other == "copy_init" else chain.student(other).architecture


def _judge(chain: Chain, name: str, options: Any, machine: Machine) -> Part:
    """evaluate_adapters and evaluate_agent: a frozen base, a generator, rows of several conditions."""
    student = chain.student(options.from_)
    model, network = student.architecture, student.network
    text = chain.text(chain.recipe.stages[options.from_].data)
    rows = getattr(options, "together", 1) * options.rows if options.kind == "evaluate_adapters" else 1
    width = "bf16" if student.frozen_dtype == "bfloat16" else "fp32"
    items = [
        always("frozen base", weight_bytes(model.weights, width), width),
        always("generator", 4.0 * network.total if network is not None else 0.0, "float32"),
        *_pass_items(model, rows, text.sequence, options.precision),
    ]
    if options.kind == "evaluate_agent" and getattr(options.teacher, "kind", None) == "local":
        teacher = chain.source(options.teacher.model).architecture
        items.append(always("teacher", weight_bytes(teacher.weights, options.teacher.dtype)))
    facts = parameter_facts(model.total, model.active, None, model.exact)
    return _finished(name, options.kind, facts, items, machine, None, ("its time is not planned: it hangs on what the models write",))


def _export(chain: Chain, name: str, options: Any, machine: Machine) -> Part:
    student = chain.student(options.from_)
    model = student.architecture
    facts: list[Fact] = []
    for form in options.to:
        if form == "peft" and student.network is not None:
            count = max(1, len(options.conditions) + len(options.prompts))
            each = 2.0 if options.dtype == "bfloat16" else 4.0
            facts.append(Fact("disk", "PEFT folder", student.network.lora * each, note=f"each; {count} named here"))
        elif form == "gguf":
            facts += gguf_facts(student, options.gguf.type, options.dtype)
        else:
            facts.append(Fact("disk", f"{form} folder", weight_bytes(model.weights, options.dtype or "bf16"), note=options.dtype or "bfloat16"))
    if "peft" in options.to and student.network is not None:
        width = "bf16" if student.frozen_dtype == "bfloat16" else "fp32"
        items = [always("frozen base", weight_bytes(model.weights, width), width), always("generator", 4.0 * student.network.total, "float32")]
    else:
        items = [always("model", weight_bytes(model.weights, "fp32"), "float32, in host memory")]
    # It is read and written in host memory, whatever the device is.
    part = _finished(name, options.kind, facts, items, machine, 0.0)
    return part if machine.device.name == "cpu" else replace(part, violated="", changes=(), notes=("its memory is the host's",))


def gguf_facts(student: Student, kind: str, dtype: str | None) -> list[Fact]:
    """Sizes of a file for llama.cpp."""
    rest = "f32" if dtype == "float32" or kind == "f32" else "bf16"
    if not student.ternary:
        each = 4.0 if rest == "f32" else 2.0
        return [Fact("disk", "GGUF file", student.architecture.total * each, note=rest)]
    chosen = "tq2_0" if kind == "auto" else kind
    inner, whole = gguf_bytes(student, chosen, rest)
    return [
        Fact("disk", "ternary weights", inner, note=chosen),
        Fact("disk", "GGUF file", whole, note=f"{chosen}, the rest {rest}, without tokenizer"),
    ]


_KINDS: dict[str, Callable[[Chain, str, Any, Machine], Part]] = {
    "prepare": _prepare, "prepare_conditions": _prepare, "prepare_trajectories": _prepare, "capture": _capture, "rank_layers": _rank, "train_adapters": _pool,
    "measure_deltas": _deltas, "evaluate": _evaluate, "evaluate_adapters": _judge, "evaluate_agent": _judge, "export": _export,
}  # fmt: skip
