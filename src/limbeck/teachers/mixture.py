"""Several teachers, each for its own domain: documents go to the one that knows them, answers come back as one signal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from limbeck.config.parts.teachers import MixtureTeacherOptions
from limbeck.errors import TeacherError
from limbeck.needs import Need, TopK
from limbeck.teachers.documents import THREADS, Ask, PendingAnswers, TopKRows, asks_of, assemble
from limbeck.types import Batch, Signal, Visit


class MixtureTeacher:
    """Routes documents by the ``domain`` of the source that they come from.

    ``domains`` are the names behind ``batch.domains_BT`` (the data's own list); set before the first question.
    """

    module = None

    def __init__(self, options: MixtureTeacherOptions, teachers: Mapping[str, Any]):
        self.teachers = dict(teachers)
        self.default = options.default
        self.domains: Sequence[str] = ("text",)
        self.lookahead = max((getattr(t, "lookahead", 1) for t in self.teachers.values() if hasattr(t, "submit")), default=0)
        self.missing = "skip" if any(getattr(t, "missing", "ce_only") == "skip" for t in self.teachers.values()) else "ce_only"
        # Teachers elsewhere are asked side by side; a network in this process takes its turn when its answer is needed.
        self._threads = {
            name: ThreadPoolExecutor(THREADS, thread_name_prefix=f"teacher-{name}")
            for name, teacher in self.teachers.items()
            if not hasattr(teacher, "score")
        }

    def load(self, device: torch.device) -> None:
        """Load or reach every one."""
        for teacher in self.teachers.values():
            teacher.load(device)

    def fingerprint(self) -> dict[str, Any]:
        """Those of all, by name."""
        return {"default": self.default, **{name: teacher.fingerprint() for name, teacher in sorted(self.teachers.items())}}

    def route(self, ask: Ask) -> str:
        """The teacher's name for a document; a domain without a teacher goes to the default, if there is one."""
        domain = self.domains[ask.domain]
        if domain in self.teachers:
            return domain
        if self.default is None:
            known = ", ".join(sorted(self.teachers))
            raise TeacherError(f"teacher 'mixture' has no teacher for the domain {domain!r} (it has {known}): name one in teachers, or set `default`")
        return self.default

    def submit(self, batch: Batch, needs: Mapping[type[Need], Need]) -> PendingAnswers:
        """Ask every teacher about its documents."""
        need = needs[TopK]
        assert isinstance(need, TopK)
        asks, starts = asks_of(batch)
        finish = partial(assemble, batch, asks, starts, temperatures=need.temperatures, missing=self.missing)
        return PendingAnswers(partial(self._gather, len(asks), self._parts(asks, need)), finish)

    def _parts(self, asks: Sequence[Ask], need: TopK) -> list[_Part]:
        routed: dict[str, list[int]] = {}
        for index, ask in enumerate(asks):
            routed.setdefault(self.route(ask), []).append(index)
        parts = []
        for name, indices in routed.items():
            question = partial(self.teachers[name].ask, [asks[i] for i in indices], need)
            pool = self._threads.get(name)
            parts.append(_Part(indices, question, None if pool is None else pool.submit(question)))
        return parts

    def _gather(self, number: int, parts: list[_Part], timeout: float | None) -> list[TopKRows | None]:
        """Wait for those elsewhere first, then ask those in this process."""
        answers: list[TopKRows | None] = [None] * number
        for part in sorted(parts, key=lambda part: part.later is None):
            found = part.question() if part.later is None else part.later.result(timeout)
            for index, answer in zip(part.indices, found, strict=True):
                answers[index] = answer
        return answers

    def signal(self, batch: Batch, needs: Mapping[type[Need], Need]) -> Signal:
        """The answer, waited for."""
        return self.submit(batch, needs).result()[1]

    def stream(self, batch: Batch, visit: Visit) -> None:
        """Nothing streams here; the options say so before anything is loaded."""
        raise TypeError("teacher 'mixture' does not stream attention: use teacher 'self'")

    def metrics(self) -> dict[str, float]:
        """Those of the teachers that have any, by name."""
        return {
            f"{name}/{key}": value
            for name, teacher in self.teachers.items()
            for key, value in getattr(teacher, "metrics", dict)().items()
        }

    def advice(self) -> str:
        """What each of those that are waited for advises."""
        return "; ".join(f"{name}: {t.advice()}" for name, t in self.teachers.items() if hasattr(t, "advice"))

    def close(self) -> None:
        """End the work of all."""
        for pool in self._threads.values():
            pool.shutdown(wait=False, cancel_futures=True)
        for teacher in self.teachers.values():
            getattr(teacher, "close", lambda: None)()


@dataclass
class _Part:
    """The question to one teacher about the documents at ``indices``, and the answer if it is on its way."""

    indices: list[int]
    question: Callable[[], list[TopKRows | None]]
    later: Future[list[TopKRows | None]] | None
