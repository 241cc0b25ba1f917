"""The teacher that reads from a store, alone and in front of another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from limbeck.config.parts.teachers import StoredTeacherOptions
from limbeck.errors import TeacherError
from limbeck.needs import HeadHidden, TopK
from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.store.store import SignalStore
from limbeck.teachers.stored import StoredTeacher
from limbeck.types import IGNORE, Batch
from signal_cases import answers, document, identity

NEED = TopK(8, (1.0, 2.0))


class Served:
    """Answers from elsewhere: slowly, document by document, and sometimes not at all."""

    module = None

    def __init__(self, silent: Sequence[bytes] = (), on_failure: str = "ce_only"):
        self.missing = on_failure
        self.findings = SimpleNamespace(vocabulary=500)
        self.asked: list[tuple[int, bool]] = []
        self.silent, self.closed = set(silent), False

    def load(self, device: Any) -> None: ...

    def fingerprint(self) -> dict[str, Any]:
        return {"model": "far away"}

    def ask(self, asks: Sequence[Ask], need: TopK, *, alone: bool = False) -> list[TopKRows | None]:
        time.sleep(0.01)
        self.asked.append((len(asks), alone))
        layout = identity(k=need.k, temperatures=need.temperatures).layout
        return [
            None if ask.key in self.silent else answers(np.random.default_rng(list(ask.key)), len(ask.positions), layout) for ask in asks
        ]

    def close(self) -> None:
        self.closed = True


def batch(seed: int = 0, rows: int = 2) -> Batch:
    """Rows of two documents each; every third label is masked."""
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(0, 500, (rows, 20)))
    documents = torch.tensor([0] * 12 + [1] * 8).expand(rows, -1).clone()
    labels = torch.cat([ids[:, 1:], torch.full((rows, 1), IGNORE)], 1)
    labels[:, 11] = IGNORE
    labels[:, ::3] = IGNORE
    positions = torch.cat([torch.arange(12), torch.arange(8)]).expand(rows, -1).clone()
    return Batch(ids, labels, positions, documents)


def cache(folder: Path, inner: Served, **options: Any) -> StoredTeacher:
    chosen = StoredTeacherOptions(signals=str(folder), teacher={"kind": "http", "url": "http://x"}, **options)
    teacher = StoredTeacher(chosen, folder, inner, num_ids=400)
    teacher.load()
    return teacher


def result(teacher: StoredTeacher, rows: Batch, need: TopK = NEED) -> Any:
    return teacher.submit(rows, {TopK: need}).result()[1][TopK]


def test_the_second_time_nothing_is_asked_and_the_answer_is_the_same(tmp_path: Path) -> None:
    first = cache(tmp_path / "s", Served())
    signals = [result(first, batch(seed)) for seed in (0, 1)]
    first.close()
    assert first.inner.closed and all(alone for _, alone in first.inner.asked)
    second = cache(tmp_path / "s", Served())
    assert first.fingerprint() == second.fingerprint()
    for seed, signal in enumerate(signals):
        again = result(second, batch(seed))
        assert torch.equal(signal.rows_n, batch(seed).label_mask_BT.flatten().nonzero().squeeze(1))
        for name in ("rows_n", "ids_nK", "logits_nK", "log_z_nZ"):
            assert torch.equal(getattr(signal, name), getattr(again, name)), name
    assert second.inner.asked == [] and second.counts == {"hits": 8, "misses": 0}
    assert SignalStore(tmp_path / "s").identity.vocabulary == 500
    second.close()


def test_part_of_what_is_stored_can_be_needed(tmp_path: Path) -> None:
    teacher = cache(tmp_path / "s", Served(), codec="exact")
    whole = result(teacher, batch())
    part = result(teacher, batch(), TopK(3, (2.0,)))
    assert part.temperatures == (2.0,) and part.ids_nK.shape[1] == 3
    assert torch.equal(part.ids_nK, whole.ids_nK[:, :3]) and torch.equal(part.log_z_nZ, whole.log_z_nZ[:, 1:])
    for need, message in (
        (TopK(9), "k = 9 of stored 8"),
        (TopK(8, (3.0,)), r"temperatures \[3.0\] of stored \[1.0, 2.0\]"),
        (TopK(8, (1.0,), 4), "samples 4 beside k = 8"),
    ):
        with pytest.raises(TeacherError, match=message):
            result(teacher, batch(), need)
    assert result(teacher, batch(), TopK(8, (3.0,), exact=False)).temperatures == (1.0,)
    teacher.close()


@pytest.mark.parametrize("on_failure", ["ce_only", "skip"])
def test_what_the_teacher_left_out_is_masked_and_not_stored(tmp_path: Path, on_failure: str) -> None:
    rows = batch()
    silent = Ask(rows.input_ids_BT[1, :12].numpy().astype(np.int32), np.zeros(0, np.int32)).key
    teacher = cache(tmp_path / "s", Served([silent], on_failure))
    found, signal = teacher.submit(rows, {TopK: NEED}).result()
    assert not found.signal_mask_BT[1, :12].any() and found.signal_mask_BT[0].sum() == rows.label_mask_BT[0].sum()
    assert found.label_mask_BT[1, :12].any() == (on_failure == "ce_only")
    assert len(signal[TopK].rows_n) == int(found.signal_mask_BT.sum())
    teacher.inner.silent.clear()
    assert len(result(teacher, rows).rows_n) == int(rows.label_mask_BT.sum())
    teacher.close()


def test_rows_of_other_positions_are_no_hit_for_a_cache(tmp_path: Path) -> None:
    teacher = cache(tmp_path / "s", Served())
    ask = document(np.random.default_rng(0), 12)
    teacher.ask([ask], NEED)
    teacher.ask([Ask(ask.ids, ask.positions[:4])], NEED)
    assert teacher.counts == {"hits": 0, "misses": 2}
    teacher.close()
    alone = StoredTeacher(StoredTeacherOptions(signals="s"), tmp_path / "s")
    alone.load()
    assert alone.ask([Ask(ask.ids, ask.positions[2:3])], NEED)[0] is not None
    with pytest.raises(TeacherError, match=r"no answer to document [0-9a-f]{32} \(12 tokens, 1 positions"):
        alone.ask([Ask(ask.ids, np.array([11], np.int32))], NEED)
    alone.close()


def test_questions_under_way_at_one_time_are_answered_each_for_itself(tmp_path: Path) -> None:
    teacher = cache(tmp_path / "s", Served())
    pending = [teacher.submit(batch(seed % 3), {TopK: NEED}) for seed in range(9)]
    found = [p.result()[1][TopK] for p in pending]
    for seed in range(9):
        assert torch.equal(found[seed].logits_nK, found[seed % 3].logits_nK)
    assert SignalStore(tmp_path / "s").num_documents == 12
    assert teacher.metrics()["stored_bytes"] > 0
    teacher.close()


def test_no_signals_and_needs_that_a_store_cannot_answer_are_named(tmp_path: Path) -> None:
    options = StoredTeacherOptions(signals="s")
    with pytest.raises(TeacherError, match="no signals here"):
        StoredTeacher(options, tmp_path / "s").load()
    assert "gives TopK" in str(options.provides(HeadHidden()))
    for kind in ("self", {"kind": "stored", "signals": "x"}, {"kind": "mixture", "teachers": {"a": {"kind": "self"}}}):
        with pytest.raises(ValueError, match=r"cannot stand behind|inside the mixture"):
            StoredTeacherOptions(signals="s", teacher=kind)
    through = StoredTeacherOptions(signals="s", teacher={"kind": "http", "url": "x", "protocol": "vllm"})
    assert "T = 1 only" in str(through.provides(TopK(8, (2.0,)))) and through.provides(TopK(8, (2.0,), exact=False)) is True
