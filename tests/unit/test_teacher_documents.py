"""Packed rows as documents, and answers back in their places: one off-by-one here would be everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from families import tiny_model
from limbeck.config.parts.teachers import LocalTeacherOptions
from limbeck.models.head import head_of
from limbeck.models.loading import save_model
from limbeck.models.packed import forward_packed
from limbeck.needs import HeadHidden, TopK
from limbeck.ops.topk import linear_topk
from limbeck.teachers.documents import Ask, TopKRows, asks_of, assemble
from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.scoring import Scorer, pack
from limbeck.types import IGNORE, Batch, Head

NEED = TopK(6, (1.0, 2.0))


def ragged(seed: int = 0) -> Batch:
    """Three rows of documents with masked text, an unasked document and padding."""
    rng = np.random.default_rng(seed)
    ids, labels, positions, documents = (np.zeros((3, 17), np.int64) for _ in range(4))
    labels[:], documents[:] = IGNORE, -1
    for row, lengths in enumerate(([5, 7, 3], [17], [4, 2])):
        start = 0
        for number, length in enumerate(lengths):
            here = slice(start, start + length)
            ids[row, here] = rng.integers(3, 96, length)
            positions[row, here], documents[row, here] = np.arange(length), number
            labels[row, start : start + length - 1] = ids[row, start + 1 : start + length]
            start += length
        positions[row, start:] = np.arange(17 - start)
    labels[0, [1, 6]] = IGNORE
    labels[0, 12:15] = IGNORE
    return Batch(*map(torch.from_numpy, (ids, labels, positions, documents)))


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    save_model(tiny_model("qwen3"), folder)
    scorer = Scorer(str(folder))
    scorer.load("cpu")
    return scorer


def test_every_counted_position_is_asked_once_and_no_other() -> None:
    batch = ragged()
    asks, starts = asks_of(batch)
    assert len(asks) == 5, "a document of which nothing counts is not asked about"
    rows = np.concatenate([start + ask.positions for ask, start in zip(asks, starts, strict=True)])
    assert rows.tolist() == batch.label_mask_BT.flatten().nonzero().squeeze(1).tolist()
    for ask, start in zip(asks, starts, strict=True):
        labels = batch.labels_BT.flatten()[start + torch.from_numpy(ask.positions).long()]
        assert labels.tolist() == ask.ids[ask.positions + 1].tolist(), "a row predicts the token after its position"


def test_a_document_is_known_by_its_tokens_alone() -> None:
    ids = np.arange(5, dtype=np.int32)
    assert Ask(ids, np.array([1], np.int32)).key == Ask(ids.copy(), np.array([2], np.int32), domain=3).key
    assert Ask(ids, np.array([1], np.int32)).key != Ask(ids[:4], np.array([1], np.int32)).key


def test_scored_documents_give_the_signal_of_the_packed_batch(scorer: Scorer) -> None:
    batch = ragged()
    asks, starts = asks_of(batch)
    _, signal = assemble(batch, asks, starts, scorer.score(asks, NEED), NEED.temperatures)
    with torch.no_grad():
        hidden_ND = forward_packed(scorer.model, batch).flatten(0, 1)
    direct = linear_topk(hidden_ND, head_of(scorer.model), signal.rows_n, k=6, temperatures=NEED.temperatures)
    assert torch.equal(signal.ids_nK, direct.ids_nK)
    torch.testing.assert_close(signal.logits_nK, direct.logits_nK, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(signal.log_z_nZ, direct.log_z_nZ, rtol=1e-5, atol=1e-5)
    labels = batch.labels_BT.flatten()[signal.rows_n]
    assert (labels != IGNORE).all()


def test_a_shift_by_one_position_is_seen(scorer: Scorer) -> None:
    batch = ragged()
    asks, starts = asks_of(batch)
    shifted = [Ask(ask.ids, np.maximum(ask.positions - 1, 0)) for ask in asks]
    right = assemble(batch, asks, starts, scorer.score(asks, NEED), NEED.temperatures)[1]
    wrong = assemble(batch, asks, starts, scorer.score(shifted, NEED), NEED.temperatures)[1]
    assert not torch.allclose(right.logits_nK, wrong.logits_nK, atol=1e-2)


def test_the_local_teacher_and_the_scorer_agree(scorer: Scorer) -> None:
    need = TopK(4, (1.0,), samples=5)
    teacher = LocalTeacher(LocalTeacherOptions(model="x"), scorer.source)
    teacher.load("cpu")
    batch = ragged()
    asks, starts = asks_of(batch)
    _, expected = assemble(batch, asks, starts, scorer.score(asks, need), need.temperatures)
    found = teacher.signal(batch, {TopK: need})[TopK]
    assert torch.equal(found.rows_n, expected.rows_n) and torch.equal(found.ids_nK, expected.ids_nK)
    assert expected.samples_nS is not None and (found.samples_nS == expected.samples_nS).float().mean() > 0.99
    assert HeadHidden not in teacher.signal(batch, {TopK: need})


@pytest.mark.parametrize(("missing", "counts"), [("ce_only", True), ("skip", False)])
def test_what_is_not_answered_is_masked_as_the_policy_says(scorer: Scorer, missing: str, counts: bool) -> None:
    batch = ragged()
    asks, starts = asks_of(batch)
    answers: list[TopKRows | None] = list(scorer.score(asks, NEED))
    answers[1] = None
    masked, signal = assemble(batch, asks, starts, answers, NEED.temperatures, missing=missing)
    lost = starts[1] + torch.from_numpy(asks[1].positions).long()
    assert masked.signal_mask_BT.flatten().nonzero().squeeze(1).tolist() == signal.rows_n.tolist()
    assert not masked.signal_mask_BT.flatten()[lost].any()
    assert bool(masked.label_mask_BT.flatten()[lost].all()) is counts
    assert masked.split(1)[0].answered_BT is not None


def test_an_answer_of_the_wrong_length_is_refused(scorer: Scorer) -> None:
    batch = ragged()
    asks, starts = asks_of(batch)
    answers: list[Any] = scorer.score(asks, NEED)
    answers[0] = TopKRows(answers[0].ids_mK[1:], answers[0].logits_mK[1:], answers[0].log_z_mZ[1:])
    with pytest.raises(ValueError, match="rows to a question about"):
        assemble(batch, asks, starts, answers, NEED.temperatures)


def test_packing_puts_every_document_somewhere_and_depends_on_the_documents_alone() -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 90, n).astype(np.int32) for n in (30, 5, 70, 1, 64, 2, 8)]
    batch, starts = pack(documents, row_tokens=64)
    flat = batch.input_ids_BT.flatten().numpy()
    for ids, start in zip(documents, starts, strict=True):
        assert np.array_equal(flat[start : start + len(ids)], ids)
        assert batch.position_ids_BT.flatten()[start : start + len(ids)].tolist() == list(range(len(ids)))
    assert batch.num_tokens == sum(map(len, documents))
    assert torch.equal(pack(documents, row_tokens=64)[0].input_ids_BT, batch.input_ids_BT)


def test_samples_come_from_the_tail_and_never_from_masked_ids() -> None:
    torch.manual_seed(0)
    hidden_ND, weight_VD = torch.randn(2, 8), torch.randn(20, 8)
    mask_V = torch.arange(20) % 5 != 0
    rows_n, uniforms_nS = torch.arange(2), torch.rand(2, 20000)
    found = linear_topk(hidden_ND, Head(weight_VD, vocab_mask_V=mask_V), rows_n, k=3, temperatures=(2.0,), uniforms_nS=uniforms_nS)
    tail_nV = (hidden_ND @ weight_VD.T / 2).masked_fill(~mask_V, float("-inf")).softmax(1)
    tail_nV = tail_nV.scatter(1, found.ids_nK, 0)
    tail_nV = tail_nV / tail_nV.sum(1, keepdim=True)
    assert found.samples_nS is not None
    for row in range(2):
        counts = torch.bincount(found.samples_nS[row], minlength=20) / 20000
        assert (counts - tail_nV[row]).abs().max() < 0.02
        assert not counts[~mask_V].any() and not counts[found.ids_nK[row]].any()
