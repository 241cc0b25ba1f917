"""A teacher that is not in training memory: what it is asked, what it is itself, how fast it scores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from limbeck.needs import TopK, merge_needs
from limbeck.planner.devices import PlanError
from limbeck.planner.machine import Machine
from limbeck.planner.report import Fact
from limbeck.planner.serving import Served, Serving, first_violated, serve, usual_split, ways_out
from limbeck.planner.sources import Chain, quantisation
from limbeck.planner.texts import Text
from limbeck.planner.throughput import scoring_rate


@dataclass(frozen=True)
class Asked:
    """What is known of a teacher."""

    k: int | None = None
    rate: float | None = None
    """Tokens a second; None where there is no telling."""
    rate_note: str = ""
    facts: tuple[Fact, ...] = ()
    violated: str = ""
    changes: tuple[str, ...] = ()
    note: str = ""


def asked(teacher: Any, objectives: Iterable[Any], chain: Chain, text: Text, machine: Machine) -> Asked:
    """The teacher of a train stage."""
    needs = merge_needs(need for objective in objectives for need in objective.needs())
    need = needs.get(TopK)
    return ask(teacher, need.k if isinstance(need, TopK) else None, chain, text, machine)


def ask(teacher: Any, k: int | None, chain: Chain, text: Text, machine: Machine) -> Asked:
    """A teacher that answers top-k questions; nothing of one that is in this process."""
    if teacher is None or teacher.kind != "http":
        return Asked(k)
    rate, note = machine.teacher_rate, "as --teacher-rate says"
    if teacher.model is None:
        return Asked(k, rate, note, note="" if rate else "it is served elsewhere and not named: give --teacher-rate for its time")
    try:
        plan, served = served_teacher(teacher, chain, text, machine)
    except PlanError as error:
        return Asked(k, rate, note, note=str(error))
    if rate is None:
        rate = scoring_rate(plan.model, text.sequence, plan.device, plan.gpus, plan.dtype, machine.mfu)
        note = f"{plan.gpus} x {plan.device.name}, {plan.dtype}, MFU {machine.mfu:g}"
    words = first_violated(plan, served)
    return Asked(k, rate, note, served_facts(plan, served), f"teacher: {words}" if words else "", tuple(ways_out(plan)) if words else ())


def served_teacher(teacher: Any, chain: Chain, text: Text, machine: Machine) -> tuple[Serving, Served]:
    """The model behind an endpoint, on the GPUs that its ``launch`` names or on all of this plan's."""
    values = chain.models.config(teacher.model)
    model = chain.models.architecture(teacher.model)
    launch = teacher.launch
    quantised = {"fp8": "fp8", "awq": "int4", "gptq": "int4", None: None}.get(getattr(launch, "quantisation", None))
    dtype = machine.dtype or quantised or quantisation(values) or "bf16"
    gpus = len(launch.devices) if launch is not None and launch.devices else launch.tensor_parallel if launch is not None else machine.gpus
    if launch is not None:
        tp, ep = launch.tensor_parallel, gpus if launch.expert_parallel else 1
    else:
        tp, ep = usual_split(model, dtype, machine.device, gpus)
        tp, ep = machine.tp or tp, machine.ep or (1 if machine.tp else ep)
    scored = launch.max_batch_tokens if launch is not None else 4096
    usable = launch.gpu_memory if launch is not None else machine.usable
    plan = Serving(model, dtype, machine.device, gpus, tp, ep, text.sequence, teacher.in_flight, scored if teacher.protocol == "vllm" else 0, usable)
    return plan, serve(plan)


def served_facts(plan: Serving, served: Served) -> tuple[Fact, ...]:
    """The numbers of a served model."""
    split = f"tensor parallel {plan.tp}" + (f", expert parallel {plan.ep}" if plan.ep > 1 else "")
    found = [
        Fact("served", "weights", served.weights, note=plan.dtype),
        Fact("served", "weights a GPU", served.per_gpu, note=f"{plan.gpus} GPUs, {split}"),
        Fact("served", "cache a token", served.token, note="bfloat16 keys and values" if plan.kv == 2 else ""),
    ]
    if served.state:
        found.append(Fact("served", "state a sequence", served.state, note="recurrent state, windows"))
    if served.spike:
        found.append(Fact("served", "prompt log-probabilities", served.spike, note=f"{plan.scored:,} tokens scored at a time, on each GPU"))
    found.append(Fact("served", "left for caches", served.room, note=f"on all GPUs, at {plan.usable:g} of their memory"))
    tokens = served.cached_tokens
    found.append(Fact("served", "tokens in caches", tokens if tokens != float("inf") else None, "count"))
    return tuple(found)
