"""The capture stage: what a teacher says about a text, asked once and stored.

Documents are taken in the order of the rows, each once.  How they are grouped follows from that order alone, so a capture that
was killed and goes on leaves the same bytes as one that was not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch

from limbeck.config.parts.stages import CaptureStageOptions
from limbeck.data.conditions.rows import ConditionRows
from limbeck.data.dataset import TokenRows
from limbeck.engine.console import quantity
from limbeck.errors import TeacherError
from limbeck.models.loading import load_tokenizer
from limbeck.needs import TopK
from limbeck.stages.adapting import conditions_stage, open_conditions
from limbeck.stages.context import StageContext
from limbeck.stages.teaching import build_teacher, check_teacher_vocabulary
from limbeck.teachers.documents import Ask, TopKRows, asks_of
from limbeck.teachers.store.blocks import asked_of
from limbeck.teachers.store.store import SignalStore
from limbeck.teachers.stored import ask_each, identity_of

Side = TokenRows | ConditionRows

ROWS = 16
"""Rows that are cut into documents at one time."""
REQUESTS = 64
"""Documents that a served teacher is asked about at one time, each in a request of its own."""


class CaptureStage:
    """Writes ``signals/``."""

    def __init__(self, context: StageContext):
        self.context = context
        self.options: CaptureStageOptions = context.options

    def run(self) -> None:
        """Ask about every document that is not stored yet.  With several ranks each asks about its share."""
        context, options = self.context, self.options
        sides, tokenizer = self._text()
        num_ids = max(tokenizer.get_vocab().values()) + 1
        teacher = build_teacher(context, options.teacher)
        try:
            teacher.load(context.world.device)
            check_teacher_vocabulary(teacher, tokenizer)
            if options.teacher.kind == "local":
                teacher.num_ids = num_ids
            for line in getattr(teacher, "summary", ()):
                context.say(f"  {line}")
            self._capture(teacher, sides, num_ids)
        finally:
            getattr(teacher, "close", lambda: None)()

    def _text(self) -> tuple[list[Side], Any]:
        """The sides of the text that are asked for, and its tokenizer."""
        context, options = self.context, self.options
        if (stage := conditions_stage(context, options.data)) is not None:
            conditions = open_conditions(context, stage)
            tested = [c.id for c in conditions.conditions if c.examples["test"]]
            wanted = {"train": (conditions.split("seen"), "train"), "held_out": (tested, "test")}
            sides: list[Side] = [conditions.rows(*wanted[name]) for name in options.splits if wanted[name][0]]
            return sides, load_tokenizer(str(conditions.tokenizer))
        folder, data = context.data(options.data)
        splits = [name for name in options.splits if name == "train" or data.held_out]
        return [TokenRows(folder, name) for name in splits], load_tokenizer(str(folder / "tokenizer"))

    def _capture(self, teacher: Any, sides: list[Side], num_ids: int) -> None:
        context, options = self.context, self.options
        need = TopK(options.k, options.temperatures, options.samples)
        identity = identity_of(
            teacher, options.teacher, need, codec=options.codec, num_ids=num_ids, batch_tokens=options.batch_tokens
        )
        target = context.folder / "signals"
        store = SignalStore(target, identity, writer=context.world.rank)
        try:
            if store.lost:
                context.say(f"  going on after a kill: {store.lost} bytes of a half-written block were cut off")
            total = sum(side.num_tokens for side in sides) // context.world.size
            groups = islice(grouped(unique(documents(sides)), options.batch_tokens), context.world.rank, None, context.world.size)
            unanswered = 0
            with context.counting("tokens", total) as counter:
                for asks, answers in _answered(teacher, groups, need, store, alone=options.batch_tokens is None):
                    for ask, rows in zip(asks, answers or [None] * len(asks), strict=True):
                        if rows is not None:
                            store.put(ask, rows)
                    unanswered += sum(rows is None for rows in answers)
                    counter.add(sum(len(ask.ids) for ask in asks), before=not answers, facts=f"{store.num_bytes / 1e6:.1f} MB")
                rate = counter.rate
            if unanswered:
                raise TeacherError(f"the teacher left {unanswered} documents unanswered: run again to ask about these, or set teacher.on_failure to wait")
            store.finish()
            context.world.barrier()
            context.once(store.complete)
            store.refresh()
            self._sum_up(store, rate)
        finally:
            store.close()

    def _sum_up(self, store: SignalStore, rate: float) -> None:
        each = store.num_bytes / max(store.num_rows, 1)
        self.context.facts["result"] = {
            "documents": store.num_documents,
            "rows": store.num_rows,
            "bytes": store.num_bytes,
            "bytes_per_row": round(each, 2),
        }
        self.context.say(
            f"  {store.num_documents:,} documents, {store.num_rows:,} positions, {store.num_bytes / 1e6:.1f} MB: {each:.0f} bytes a position; "
            f"{quantity(rate)} tok/s"
        )


def documents(sides: Sequence[Side]) -> Iterator[Ask]:
    """Every document of the rows with the positions that losses use, in order."""
    for side in sides:
        for start in range(0, len(side), ROWS):
            yield from asks_of(side.batch(range(start, min(start + ROWS, len(side)))))[0]


def unique(asks: Iterator[Ask]) -> Iterator[Ask]:
    """Each document once for each set of positions."""
    seen = set()
    for ask in asks:
        name = ask.key + asked_of(ask)
        if name not in seen:
            seen.add(name)
            yield ask


def grouped(asks: Iterator[Ask], tokens: int | None) -> Iterator[list[Ask]]:
    """In order, as many as have ``tokens`` tokens together (at least one); None: :data:`REQUESTS` at a time."""
    group: list[Ask] = []
    for ask in asks:
        full = len(group) >= REQUESTS if tokens is None else sum(len(a.ids) for a in group) + len(ask.ids) > tokens
        if group and full:
            yield group
            group = []
        group.append(ask)
    if group:
        yield group


def _answered(
    teacher: Any, groups: Iterator[list[Ask]], need: TopK, store: SignalStore, *, alone: bool
) -> Iterator[tuple[list[Ask], list[TopKRows | None]]]:
    """Each group with its answers, in order; no answers for one that is stored.  A served teacher is asked one group ahead."""

    def ask(group: list[Ask]) -> tuple[list[Ask], list[TopKRows | None]]:
        todo = [a for a in group if not store.has(a)]
        if not todo:
            return group, []
        if alone:
            return todo, ask_each(teacher, todo, need)
        # All of the group, whatever of it is stored: the bits of one document depend on those beside it.
        return group, _together(teacher, group, need)

    if hasattr(teacher, "score"):
        yield from map(ask, groups)
        return
    with ThreadPoolExecutor(2, thread_name_prefix="capture") as pool:
        ahead: list[Future[tuple[list[Ask], list[TopKRows | None]]]] = []
        for group in groups:
            ahead.append(pool.submit(ask, group))
            if len(ahead) > 2:
                yield ahead.pop(0).result()
        for later in ahead:
            yield later.result()


def _together(teacher: Any, group: list[Ask], need: TopK) -> list[TopKRows | None]:
    if not hasattr(teacher, "score"):
        return list(teacher.ask(group, need))
    with torch.autocast(teacher.model.device.type, enabled=False):
        return list(teacher.score(group, need))
