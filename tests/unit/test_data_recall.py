"""Recall documents and probes: predictable by looking back, from nowhere else, at exactly the stated distance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from limbeck.config.parts.sources import RecallSourceOptions
from limbeck.data.recall import HELD_OUT, TRAIN, RecallSource, probe
from limbeck.errors import DataError

IDS = np.arange(100, 700)
TASKS = ("repeat", "key_value", "needle")


def look_back(ids: np.ndarray, at: int) -> tuple[int | None, int]:
    """The oracle: what followed the last earlier occurrence of the token at ``at``, and how far before ``at + 1`` that stood."""
    earlier = np.flatnonzero(ids[:at] == ids[at])
    if not len(earlier):
        return None, 0
    return int(ids[earlier[-1] + 1]), at - int(earlier[-1])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("distance", [7, 32, 129, 900])
def test_an_oracle_that_looks_back_solves_every_probe_at_exactly_its_distance(task, distance):
    rows_BT, answers_BT = probe(task, distance, 4, ids=IDS, seed=3)
    assert rows_BT.dtype == np.int64 and answers_BT.dtype == bool and rows_BT.shape == answers_BT.shape
    assert answers_BT.any(axis=1).all() and not answers_BT[:, -1].any()
    for ids, answers in zip(rows_BT, answers_BT, strict=True):
        for at in np.flatnonzero(answers):
            assert look_back(ids, at) == (ids[at + 1], distance)


@pytest.mark.parametrize("task", TASKS)
def test_without_the_earlier_part_nothing_predicts_a_probe(task):
    rows_BT, answers_BT = probe(task, 64, 4, ids=IDS, seed=3)
    for ids, answers in zip(rows_BT, answers_BT, strict=True):
        for at in np.flatnonzero(answers):
            # Inside the last `distance` tokens the asked one has not been seen.
            assert ids[at + 1] not in ids[at + 2 - 64 : at + 1]


def test_probes_are_deterministic_and_their_rows_differ():
    first, again = probe("repeat", 16, 3, ids=IDS, seed=1)[0], probe("repeat", 16, 3, ids=IDS, seed=1)[0]
    assert (first == again).all() and (first[0] != first[1]).any()
    assert (probe("repeat", 16, 3, ids=IDS, seed=2)[0] != first).any()


def test_a_needle_hides_in_real_text():
    text = np.tile(np.arange(1000, 1090), 20)
    rows_BT, answers_BT = probe("needle", 200, 2, ids=IDS, seed=0, filler_ids=text)
    assert (rows_BT >= 1000).sum(axis=1).tolist() == [203, 203]
    assert answers_BT.sum(axis=1).tolist() == [4, 4]


@pytest.mark.parametrize("num_ids", [600, 40])
def test_a_needle_is_unique_in_text_of_the_same_ids(num_ids):
    text = np.random.default_rng(0).choice(IDS[:num_ids], 5000)
    rows_BT, answers_BT = probe("needle", 100, 8, ids=IDS[:num_ids], seed=0, filler_ids=text)
    for ids, answers in zip(rows_BT, answers_BT, strict=True):
        for at in np.flatnonzero(answers):
            assert look_back(ids, at) == (ids[at + 1], 100)


def test_bad_probes_say_what_is_allowed():
    with pytest.raises(DataError, match="unknown recall task 'copy'; allowed: repeat"):
        probe("copy", 32, 1, ids=IDS, seed=0)
    with pytest.raises(DataError, match="its shortest distance is 5"):
        probe("needle", 4, 1, ids=IDS, seed=0)
    with pytest.raises(DataError, match="at least 32 ordinary token ids"):
        probe("repeat", 32, 1, ids=IDS[:20], seed=0)


def documents(stream: int, count: int = 120, ids: np.ndarray = IDS, text: np.ndarray | None = None, **options):
    source = RecallSource(RecallSourceOptions(**options), Path("."))
    return [source.document(i, stream=stream, ids=ids, longest=200, seed=(0, 1), text=text) for i in range(count)]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("num_ids", [32, 600])
def test_every_counted_token_of_a_training_document_is_found_by_looking_back(task, num_ids):
    for document in documents(TRAIN, tasks=(task,), ids=IDS[:num_ids]):
        assert document.counted.any() and len(document.ids) <= 200
        assert not document.counted[: len(document.ids) // 2].any()
        for at in np.flatnonzero(document.counted):
            assert look_back(document.ids, at - 1)[0] == document.ids[at]


def test_lengths_reach_from_the_shortest_to_the_row_and_use_the_vocabulary_asked_for():
    made = documents(TRAIN, 400, min_length=16, vocabulary=64)
    lengths = np.array([len(document.ids) for document in made])
    assert lengths.min() < 20 and lengths.max() > 190 and np.median(lengths) < 80
    assert set(np.concatenate([document.ids for document in made])) <= set(IDS[:64])


def test_held_out_documents_are_others_than_those_trained_on():
    train = {document.ids.tobytes() for document in documents(TRAIN)}
    assert train == {document.ids.tobytes() for document in documents(TRAIN)}
    assert not train & {document.ids.tobytes() for document in documents(HELD_OUT)}


def test_real_text_around_a_needle_counts_but_the_needle_itself_does_not():
    text = np.tile(np.arange(1000, 1090), 20)
    for document in documents(TRAIN, tasks=("needle",), text=text):
        needle = document.ids < 1000
        assert (document.counted & needle).sum() == (document.recalled & needle).sum() > 0
        assert (document.counted | needle).sum() >= len(document.ids) - 1
