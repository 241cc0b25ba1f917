"""Signals from the store, and a cache of any other teacher in front of it.

What is given out always went through the store's codec, and what another teacher is asked for is asked document by document.  So
a document's answer depends on the document and the positions alone: not on what else was in the store, in the batch or asked
before, and a run with a full cache equals the run that filled it bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from limbeck.config.parts.teachers import StoredTeacherOptions
from limbeck.errors import TeacherError
from limbeck.needs import Need, TopK
from limbeck.teachers.documents import THREADS, Ask, PendingAnswers, TopKRows, asks_of, assemble
from limbeck.teachers.store.manifest import Identity, read_manifest
from limbeck.teachers.store.store import SignalStore
from limbeck.types import Batch, Signal, TopKSignal, Visit


class StoredTeacher:
    """Answers :class:`~limbeck.needs.TopK` from a folder of signals.

    ``inner`` is asked for what is not there, and its answers are stored; without one a document that is not stored is an error.
    ``num_ids`` is the number of ids of the data's tokenizer: a teacher in this process is scored over these.  ``writer`` is the
    rank: each has files of its own.
    """

    module = None
    """Never sharded: ranks would ask about different numbers of documents and wait for each other for ever."""
    lookahead = 1

    def __init__(
        self, options: StoredTeacherOptions, folder: Path, inner: Any = None, *, num_ids: int | None = None, writer: int = 0
    ):
        self.options = options
        self.folder = Path(folder)
        self.inner = inner
        self.num_ids = num_ids
        self.counts = {"hits": 0, "misses": 0}
        self._writer = writer
        self._store: SignalStore | None = None
        self._opening, self._scoring = threading.Lock(), threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        if not hasattr(inner, "score"):
            # A network in this process is asked when its turn comes: it computes on the device that trains.
            self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="signals")
            self.submit = self._submit

    def load(self, device: torch.device | str = "cpu") -> None:
        """Load or reach the teacher behind the store, and see that the store, if there is one, is of that teacher.

        Raises:
            TeacherError: no signals, damaged ones, or another teacher's, with every field that differs.
        """
        manifest = read_manifest(self.folder)
        if self.inner is None:
            if manifest is None:
                raise TeacherError(
                    f"{self.folder}: no signals here (no manifest.json): run the capture stage that makes them, "
                    "or give the `stored` teacher a `teacher` to ask"
                )
            self._store = SignalStore(self.folder)
            return
        self.inner.load(device)
        if hasattr(self.inner, "num_ids"):
            self.inner.num_ids = self.num_ids
        if manifest is not None:
            held = manifest.identity
            self._refuse_others(held, self._identity(TopK(held.k, held.temperatures, held.samples)))

    def fingerprint(self) -> dict[str, Any]:
        """The teacher's whose signals these are, and how they are rounded: the same before and after the store is filled."""
        if self.inner is not None:
            return {"teacher": self.inner.fingerprint(), "codec": self.options.codec, "batch_tokens": None}
        manifest = read_manifest(self.folder)
        if manifest is None:
            return {"teacher": None}
        identity = manifest.identity
        return {"teacher": identity.teacher, "codec": identity.codec, "batch_tokens": identity.batch_tokens}

    @property
    def vocabulary(self) -> int | None:
        """Ids that the stored distributions are over, where that is known already."""
        return self._store.identity.vocabulary if self._store is not None else self.num_ids

    def ask(self, asks: Sequence[Ask], need: TopK, *, alone: bool = True) -> list[TopKRows | None]:
        """Answers to documents, in order; None for those that the teacher behind the store left out.

        Each is asked about ``alone``, also for those who do not insist on it.

        Raises:
            TeacherError: the store does not hold what is needed, or is damaged.
        """
        store = self._open(need)
        # Rows that were stored for other positions are not handed out where the teacher can be asked: computed together with other
        # positions they may differ in the last bit.
        same = self.inner is not None
        found = [store.get(ask, same_question=same) for ask in asks]
        missing = {(ask.key, ask.positions.tobytes()): ask for ask, rows in zip(asks, found, strict=True) if rows is None}
        self.counts["hits"] += len(asks) - len(missing)
        self.counts["misses"] += len(missing)
        if missing:
            given = dict(zip(missing, self._fetch(list(missing.values()), store), strict=True))
            found = [
                given[ask.key, ask.positions.tobytes()] if rows is None else rows for ask, rows in zip(asks, found, strict=True)
            ]
        chosen = self._columns(need, store.identity)
        return [None if rows is None else _part(rows, need, chosen) for rows in found]

    def signal(self, batch: Batch, needs: Mapping[type[Need], Need]) -> Signal:
        """``signal[TopK]`` of a micro-batch."""
        return self._pending(batch, needs, lambda asks, need: lambda timeout: self.ask(asks, need)).result()[1]

    def stream(self, batch: Batch, visit: Visit) -> None:
        """Nothing streams from a store; the options say so before anything is loaded."""
        raise TypeError("teacher 'stored' does not stream attention: use teacher 'self'")

    def metrics(self) -> dict[str, float]:
        """``hits`` and ``misses`` in documents, ``stored_bytes``, and those of the teacher behind the store."""
        stored = 0 if self._store is None else self._store.num_bytes
        inner = self.inner.metrics() if hasattr(self.inner, "metrics") else {}
        return {**inner, **{name: float(n) for name, n in self.counts.items()}, "stored_bytes": float(stored)}

    def advice(self) -> str:
        """One line for a run that waits for its teacher."""
        if hasattr(self.inner, "advice"):
            return self.inner.advice()
        return f"signals are read from {self.folder}: put it on a faster disk"

    @property
    def missing(self) -> str:
        """What becomes of documents that were not answered (:func:`~limbeck.teachers.documents.assemble`)."""
        return getattr(self.inner, "missing", "ce_only")

    def close(self) -> None:
        """Free the store for other writers, and end the work of the teacher behind it."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        if hasattr(self.inner, "close"):
            self.inner.close()
        if self._store is not None:
            self._store.close()

    def _submit(self, batch: Batch, needs: Mapping[type[Need], Need]) -> PendingAnswers:
        """Read, or ask, in the background."""
        assert self._threads is not None
        pool = self._threads
        return self._pending(batch, needs, lambda asks, need: pool.submit(self.ask, asks, need).result)

    def _pending(
        self,
        batch: Batch,
        needs: Mapping[type[Need], Need],
        begin: Callable[[list[Ask], TopK], Callable[[float | None], list[TopKRows | None]]],
    ) -> PendingAnswers:
        need = needs[TopK]
        assert isinstance(need, TopK)
        asks, starts = asks_of(batch)

        def finish(answers: Sequence[TopKRows | None]) -> tuple[Batch, TopKSignal]:
            # Only an open store knows which temperatures it holds.
            held = self._open(need).identity
            temperatures = tuple(held.temperatures[i] for i in self._columns(need, held))
            return assemble(batch, asks, starts, answers, temperatures, missing=self.missing)

        return PendingAnswers(begin(asks, need), finish)

    def _open(self, need: TopK) -> SignalStore:
        """The store; made for this need if it is not there."""
        with self._opening:
            if self._store is None:
                manifest = read_manifest(self.folder)
                if manifest is not None:
                    held = manifest.identity
                    need = TopK(held.k, held.temperatures, held.samples)
                self._store = SignalStore(self.folder, self._identity(need), writer=self._writer)
            return self._store

    def _identity(self, need: TopK) -> Identity:
        """What is stored when this is needed."""
        options: Any = self.options.teacher
        if need.temperatures != (1.0,) and options.provides(replace(need, exact=True)) is not True:
            need = replace(need, temperatures=(1.0,))
        return identity_of(self.inner, options, need, codec=self.options.codec, num_ids=self.num_ids)

    def _refuse_others(self, held: Identity, ours: Identity) -> None:
        changed = held.differences(ours)
        if not changed:
            return
        if changed == held.differences(replace(held, batch_tokens=None)):
            raise TeacherError(
                f"{self.folder} was captured in groups of {held.batch_tokens} tokens, and a cache asks document by document: capture without "
                "`batch_tokens`, or leave out `teacher` and read what is there"
            )
        raise TeacherError(
            f"{self.folder} holds the signals of something else ({'; '.join(changed)}): name another `signals` folder, or set this one aside"
        )

    def _columns(self, need: TopK, held: Identity) -> list[int]:
        """Which stored temperatures answer a need.  TeacherError if the store does not hold it."""
        gaps = []
        if need.k > held.k:
            gaps.append(f"k = {need.k} of stored {held.k}")
        wanted = need.temperatures
        if not set(wanted) <= set(held.temperatures) and not need.exact:
            wanted = (1.0,)
        if not set(wanted) <= set(held.temperatures):
            gaps.append(f"temperatures {list(need.temperatures)} of stored {list(held.temperatures)}")
        if need.samples and (need.samples, need.k, wanted[0]) != (min(need.samples, held.samples), held.k, held.temperatures[0]):
            drawn = f"{held.samples} drawn beside k = {held.k} at T = {held.temperatures[0]:g}"
            gaps.append(f"samples {need.samples} beside k = {need.k} at T = {wanted[0]:g} of stored {drawn}")
        if gaps:
            raise TeacherError(f"{self.folder}: the objectives want {' and '.join(gaps)}: change the objectives, or capture into another folder")
        return [held.temperatures.index(t) for t in wanted]

    def _fetch(self, asks: list[Ask], store: SignalStore) -> list[TopKRows | None]:
        """Ask the teacher behind the store, and store what it says."""
        if self.inner is None:
            first = asks[0]
            raise TeacherError(
                f"{self.folder} has no answer to document {first.key.hex()} ({len(first.ids)} tokens, {len(first.positions)} positions, beginning "
                f"{first.ids[:6].tolist()}; {len(asks)} such in this batch): capture the same data (text, tokenizer, sequence, masks), "
                "or give the `stored` teacher a `teacher` to ask"
            )
        held = store.identity
        answers = ask_each(self.inner, asks, TopK(held.k, held.temperatures, held.samples), self._scoring)
        return [None if rows is None else store.put(ask, rows) for ask, rows in zip(asks, answers, strict=True)]


def ask_each(inner: Any, asks: Sequence[Ask], need: TopK, turn: threading.Lock | None = None) -> list[TopKRows | None]:
    """Each document's answer on its own, whatever else is asked.

    A network in this process is asked in its own precision: the training's autocast would make the answer depend on who asks.
    """
    if not hasattr(inner, "score"):
        return list(inner.ask(asks, need, alone=True))
    with turn or threading.Lock(), torch.autocast(inner.model.device.type, enabled=False):
        return list(inner.ask(asks, need, alone=True))


def identity_of(
    inner: Any, options: Any, need: TopK, *, codec: str, num_ids: int | None, batch_tokens: int | None = None
) -> Identity:
    """The identity of a store of a loaded teacher's answers."""
    found = getattr(getattr(inner, "findings", None), "vocabulary", None)
    # A served teacher may keep ids of its head's padding; one in this process is masked to the tokenizer's.
    vocabulary = max(found or 0, num_ids or 0)
    if not vocabulary:
        raise TypeError("a store needs the number of ids of its teacher's vocabulary")
    return Identity(
        inner.fingerprint(),
        vocabulary,
        need.k,
        tuple(float(t) for t in need.temperatures),
        need.samples,
        getattr(options, "seed", 0) if need.samples else 0,
        codec,
        batch_tokens,
    )


def _part(rows: TopKRows, need: TopK, columns: list[int]) -> TopKRows:
    """The first ``k`` ids, the temperatures and the samples that are needed."""
    samples_mS = rows.samples_mS[:, : need.samples] if need.samples and rows.samples_mS is not None else None
    return TopKRows(rows.ids_mK[:, : need.k], rows.logits_mK[:, : need.k], rows.log_z_mZ[:, columns], samples_mS)
