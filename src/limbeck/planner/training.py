"""A train stage: what one rank holds, what goes to disk and over the wire, how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from limbeck.config.base import From
from limbeck.planner.activations import Pass, kept_bytes
from limbeck.planner.architecture import Architecture, Weight
from limbeck.planner.devices import size_text
from limbeck.planner.machine import Machine
from limbeck.planner.memory import (
    SAVING,
    Item,
    Setting,
    dense_logits,
    loss_items,
    network_items,
    of_a_process,
    optimiser_items,
    pass_items,
    peak,
    save_item,
    stream_items,
    teacher_items,
    weights_items,
)
from limbeck.planner.report import Fact, Part, parameter_facts
from limbeck.planner.sources import Chain, probe_count
from limbeck.planner.storage import checkpoint_bytes, checkpoint_plan, wide, wire_bytes
from limbeck.planner.students import Student, grouped, trainable
from limbeck.planner.teaching import Asked, asked
from limbeck.planner.texts import Text
from limbeck.planner.throughput import forward_flops, step_rate, training_flops


@dataclass(frozen=True)
class Training:
    """Everything that a train stage's plan needs, resolved."""

    name: str
    options: Any
    student: Student
    text: Text
    machine: Machine
    teacher: Student | None
    """A frozen model in the same process."""
    probes: Any = None
    """Options of the texts on which the teacher's deltas were measured."""

    @property
    def rows(self) -> int:
        """Rows of a step over all ranks."""
        return max(1, round(self.options.loop.batch_tokens / self.text.sequence))

    @property
    def rank_rows(self) -> int:
        """Rows of a step on one rank."""
        return max(1, self.rows // self.machine.gpus)

    @property
    def microbatch(self) -> int:
        """Rows of a forward pass."""
        return min(self.options.loop.microbatch or self.rank_rows, self.rank_rows)

    @property
    def streams(self) -> bool:
        """Whether mixers are aligned one by one."""
        return any(o.kind == "attention_alignment" for o in self.options.objectives)

    @property
    def setting(self) -> Setting:
        """How it runs."""
        loop, machine = self.options.loop, self.machine
        flash = getattr(self.options.teacher, "attention", None) == "flash_attention_2"
        run = Pass(self.microbatch, self.text.sequence, loop.precision, mask=not flash, kernels=machine.device.kernels, streams=self.student.streams)
        recompute = loop.activation_checkpointing
        return Setting(machine.device, machine.gpus, loop.precision, recompute, loop.zero_stage, run, ceil(self.rank_rows / self.microbatch))

    @property
    def trained(self) -> list[Weight]:
        """Parameters that train."""
        return trainable(self.student, self.options.student.train)

    @property
    def steps(self) -> int | None:
        """Optimiser steps; None where only the data would tell."""
        loop, each = self.options.loop, self.rows * self.text.sequence
        if loop.steps is not None:
            return loop.steps
        if loop.tokens is not None:
            return ceil(loop.tokens / each)
        if loop.samples is not None:
            return ceil(loop.samples / self.rows)
        return None if self.text.tokens is None else ceil(loop.epochs * self.text.tokens / each)


def resolve(chain: Chain, name: str, machine: Machine) -> Training:
    """A train stage of a recipe."""
    options = chain.recipe.stages[name]
    student = chain.student(name)
    teacher = None
    kind = getattr(options.teacher, "kind", None)
    if kind == "local":
        teacher = chain.source(options.teacher.model)
    elif kind == "self":
        teacher = replace(student, architecture=student.base or student.architecture)
    deltas = getattr(options.teacher, "deltas", None)
    probes = chain.recipe.stages[deltas.from_].resolved_probes if isinstance(deltas, From) else None
    return Training(name, options, student, chain.text(options.data), machine, teacher, probes)


def items_of(stage: Training) -> list[Item]:
    """Memory of one rank."""
    options, student, how = stage.options, stage.student, stage.setting
    trained = stage.trained
    groups = grouped(student, trained, options.optim.groups)
    items = [*weights_items(student, trained, how), *optimiser_items(groups, how)]
    model = student.architecture
    if stage.streams:
        items += stream_items(student, how)
    else:
        names = {w.name for w in trained}
        head = ("model.embed_tokens.weight" if model.tied else "lm_head.weight") in names
        items += [*pass_items(student, how), *loss_items(model, options.objectives, head, how), *network_items(student, how, stage.text.condition)]
        items += _probe_items(stage)
    if stage.teacher is not None:
        dtype = getattr(options.teacher, "dtype", "float32")
        items += teacher_items(stage.teacher.architecture, dtype, how, same=stage.streams)
    return of_a_process([*items, save_item(checkpoint_bytes(groups, options.loop.precision), how)], how)


def _probe_items(stage: Training) -> list[Item]:
    """Objectives that run the base with generated adapters on probes: their own pass, in pieces of `microbatch` adapters."""
    how, found = stage.setting, 0.0
    note = ""
    for objective in stage.options.objectives:
        if objective.kind not in ("delta", "tether") or stage.student.network is None or not stage.student.network.lora:
            continue
        count, length = (probe_count(stage.probes), stage.probes.length) if stage.probes is not None else (16, 256)
        together = min(objective.microbatch or stage.microbatch, stage.microbatch)
        run = replace(how.run, rows=together * count, sequence=length, precision=objective.precision)
        each = kept_bytes(stage.student.architecture, run, how.recompute) * run.tokens
        if each > found:
            found, note = each, f"{together} adapters on {count} probes of at most {length} tokens ({objective.kind})"
    return [Item("probes", found, found, 0.0, 0.0, note)] if found else []


def violated(stage: Training, items: Sequence[Item]) -> str:
    """The first constraint that does not hold; empty if all do."""
    machine, rows = stage.machine, stage.rows
    if rows % machine.gpus:
        even = machine.gpus * stage.text.sequence
        return f"{rows} rows a step cannot be shared out evenly to {machine.gpus} ranks: loop.batch_tokens must be a multiple of {even:,}"
    most, moment = peak(items)
    if most > machine.budget:
        largest = max(items, key=lambda item: getattr(item, moment))
        return (
            f"{size_text(most)} a rank at the {_MOMENTS[moment]} and {machine.usable:g} x {size_text(machine.device.memory)} = "
            f"{size_text(machine.budget)} are there (largest: {largest.name}, {size_text(getattr(largest, moment))})"
        )
    return ""


_MOMENTS = {
    "forward": "end of the forward pass",
    "backward": "end of the backward pass",
    "step": "optimiser's step",
    "save": "writing of a checkpoint",
}


def train_part(stage: Training, chain: Chain) -> Part:
    """The whole plan of a train stage, without ways out."""
    options, student, machine, how = stage.options, stage.student, stage.machine, stage.setting
    trained, steps = stage.trained, stage.steps
    groups = grouped(student, trained, options.optim.groups)
    model = student.architecture
    count = sum(w.count for w in trained)
    total = model.total + (student.network.total if student.network is not None else 0)
    facts = parameter_facts(total, model.active, count, model.exact)
    if student.network is not None and student.network.lora:
        facts.append(Fact("parameters", "numbers of a LoRA", student.network.lora, "count"))
    facts += [
        Fact(
            "step",
            "rows",
            stage.rows,
            "count",
            f"of {stage.text.sequence:,} tokens; {stage.microbatch} a pass, {how.passes} pass{'es' * (how.passes > 1)} a rank",
        ),
        Fact("step", "steps", steps, "count", stage.text.note or ("" if steps else "the text's length is not known here: give --tokens")),
    ]
    items = items_of(stage)
    for objective in options.objectives:
        if objective.kind in ("ce", "kl", "reverse_kl", "jsd", "topk_kl") and not stage.streams:
            size = dense_logits(model, objective.kind, how.run.tokens)
            facts.append(Fact("logits", f"dense {objective.kind}", size, note="what a loss that holds [tokens, V] would take; ours is in the table"))
            break
    facts += _disk_facts(stage, groups, model)
    question = asked(options.teacher, options.objectives, chain, stage.text, machine)
    facts += _teacher_facts(stage, question, steps)
    seconds, rates = _time(stage, question, steps, count)
    facts += rates
    if machine.device.name != "cpu":
        host = model.total * wide(options.loop.precision) * machine.gpus
        saved = SAVING * checkpoint_bytes(groups, options.loop.precision)
        facts.append(Fact("host", "memory while loading", host, note="every rank loads whole weights" if machine.gpus > 1 else ""))
        facts.append(Fact("host", "memory while saving", saved, note="of all ranks: two copies of a checkpoint"))
    notes = (*student.notes, *((f"the teacher: {question.note}",) if question.note else ()))
    return Part(stage.name, "train", tuple(facts), tuple(items), machine.budget, seconds, violated(stage, items) or _full(stage, facts), notes=notes)


def _full(stage: Training, facts: Sequence[Fact]) -> str:
    """Whether the disk holds the checkpoints."""
    need = next((fact.value for fact in facts if (fact.group, fact.name) == ("disk", "checkpoints")), 0.0)
    if stage.machine.disk is not None and isinstance(need, float) and need > stage.machine.disk:
        return f"checkpoints take {size_text(need)} and {size_text(stage.machine.disk)} are free: lower loop.keep_last or name another disk in loop.checkpoints"
    return ""


def _disk_facts(stage: Training, groups: Sequence[tuple[Any, Sequence[Weight]]], model: Architecture) -> list[Fact]:
    each = wide(stage.options.loop.precision)
    final = (stage.student.network.total if stage.student.network is not None else model.total) * float(each)
    kept = checkpoint_plan(groups, final, stage.options.loop, stage.steps)
    return [
        Fact("disk", "one checkpoint", kept.one, note=f"every {kept.every:,} steps"),
        Fact("disk", "final model", kept.model, note="in final/; the stage's own model shares its files"),
        Fact("disk", "checkpoints", kept.disk, note=f"{kept.kept} at a time with the one in flight, and final/"),
    ]


def _teacher_facts(stage: Training, question: Asked, steps: int | None) -> list[Fact]:
    teacher = stage.options.teacher
    if teacher is None or teacher.kind != "http" or question.k is None:
        return []
    each = wire_bytes(teacher.protocol, question.k, stage.student.architecture.vocabulary)
    tokens = stage.rows * stage.text.sequence
    facts = [Fact("wire", "a token", each, note=f"protocol {teacher.protocol}, k = {question.k}, before compression")]
    facts.append(Fact("wire", "a step", each * tokens))
    if steps is not None:
        facts.append(Fact("wire", "all steps", each * tokens * steps))
    return [*facts, *question.facts]


def _time(stage: Training, question: Asked, steps: int | None, trained: int) -> tuple[float | None, list[Fact]]:
    how, model, machine, text = stage.setting, stage.student.architecture, stage.machine, stage.text
    if stage.streams:
        # The teacher forward, and of the student the mixers alone, forward and backward.
        mixers = sum(w.count for w in stage.student.trained if stage.student.role(w.name) == "mixers")
        base = stage.student.base or model
        flops = forward_flops(base, text.sequence) + 3 * 2.0 * mixers
    else:
        share = trained / max(1, model.total) if stage.student.network is None else 0.0
        flops = training_flops(stage.student, text.sequence, how.recompute, min(1.0, share))
        if stage.teacher is not None:
            flops += forward_flops(stage.teacher.architecture, text.sequence)
    tokens = stage.rows * text.sequence
    held = model.total * float(how.compute)
    passes, layers = how.passes, len(model.layers)
    rate = step_rate(tokens, flops, held, trained / machine.gpus, passes, layers, machine.gpus, machine.device, how.precision, machine.mfu)
    facts = [
        Fact("time", "operations a token", f"{flops / 1e9:.3g} GFLOP", "text"),
        Fact("time", "student", rate.tokens, "rate", f"{rate.bound} bound, MFU {machine.mfu:g}"),
    ]
    seconds = rate.seconds
    if question.rate is not None:
        facts.append(Fact("time", "teacher", question.rate, "rate", question.rate_note))
        seconds = max(seconds, tokens / question.rate)
    facts.append(Fact("time", "a step", seconds, "seconds"))
    total = None if steps is None else steps * seconds
    facts.append(Fact("time", "wall clock", total, "seconds", "without loading, validation and checkpoints"))
    return total, facts
