"""The smallest change that fits: settings of a stage are tried, the fewest first, and the cheapest of as many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from limbeck.planner.sources import Chain
from limbeck.planner.training import Training, items_of, violated

MOST_GPUS = 256
MOST_CHANGES = 3


@dataclass(frozen=True)
class Change:
    """One setting at another value, and its words on the command line."""

    words: str
    apply: Callable[[Training], Training]


def smallest_change(stage: Training, chain: Chain) -> tuple[str, ...]:
    """Words that make a train stage fit; empty if nothing that is tried does."""
    kinds = [options for options in _kinds(stage, chain) if options]
    for number in range(1, MOST_CHANGES + 1):
        for chosen in combinations(kinds, number):
            for changes in product(*chosen):
                changed = stage
                for change in changes:
                    changed = change.apply(changed)
                if not violated(changed, items_of(changed)):
                    return tuple(change.words for change in changes)
    return ()


def _kinds(stage: Training, chain: Chain) -> Iterator[Sequence[Change]]:
    """Settings that may change, the least painful first, each with its values from the mildest."""
    loop, name = stage.options.loop, stage.name
    rows, sizes = stage.microbatch, []
    while rows > 1:
        rows = -(-rows // 2)
        sizes.append(rows)
    yield [_loop(name, "microbatch", size) for size in sizes]
    if not loop.activation_checkpointing:
        yield [_loop(name, "activation_checkpointing", True)]
    if loop.zero_stage < 3 and stage.machine.gpus > 1:
        yield [_loop(name, "zero_stage", 3)]
    if loop.precision == "float32":
        yield [_loop(name, "precision", "bfloat16")]
    if getattr(stage.options.teacher, "kind", None) == "local" and stage.options.teacher.dtype == "float32":
        yield [Change(f"{name}.teacher.dtype=bfloat16", lambda s: _with(s, teacher=s.options.teacher.model_copy(update={"dtype": "bfloat16"})))]
    if stage.student.network is not None and stage.student.frozen_dtype == "float32":
        place = _origin(chain, name)
        yield [Change(f"{place}.base_dtype=bfloat16", lambda s: replace(s, student=replace(s.student, frozen_dtype="bfloat16")))]
    yield list(_gpus(stage))


def _loop(name: str, field: str, value: Any) -> Change:
    word = str(value).lower() if isinstance(value, bool) else value
    return Change(f"{name}.loop.{field}={word}", lambda s: _with(s, loop=s.options.loop.model_copy(update={field: value})))


def _with(stage: Training, **fields: Any) -> Training:
    return replace(stage, options=stage.options.model_copy(update=fields))


def _gpus(stage: Training) -> Iterator[Change]:
    """More ranks, of numbers by which the rows of a step divide."""
    rows = stage.rows
    counts = [count for count in range(stage.machine.gpus + 1, MOST_GPUS + 1) if rows % count == 0]
    if rows % stage.machine.gpus:
        counts = [count for count in range(1, MOST_GPUS + 1) if rows % count == 0]
        counts.sort(key=lambda count: (abs(count - stage.machine.gpus), count))
    for count in counts:
        yield Change(f"--gpus {count}", lambda s, count=count: replace(s, machine=replace(s.machine, gpus=count)))  # type: ignore[misc]


def _origin(chain: Chain, name: str) -> str:
    """Path of the surgery that a stage's student comes from."""
    stage = chain.recipe.stages[name]
    while stage.student.from_ is not None:
        name = stage.student.from_
        stage = chain.recipe.stages[name]
    index = next(i for i, s in enumerate(stage.student.surgery) if hasattr(s, "base_dtype"))
    return f"{name}.student.surgery.{index}"
