"""How much of each source is taken, and how documents are laid into rows."""

from __future__ import annotations

import numpy as np
import pytest

from limbeck.data.mixture import Entry, draw, pack, targets
from limbeck.errors import DataError


def test_a_share_fills_that_part_of_the_whole():
    assert targets([800, None], [None, 0.2], None) == [800, 200]
    assert targets([300, 500, 50], [None, None, 0.2], None) == [300, 500, 200]
    assert targets([800, None], [None, 0.2], 100) == [80, 20]
    assert targets([300, 100], [None, None], 200) == [150, 50]


def test_where_all_have_shares_none_is_repeated():
    assert targets([300, 900], [0.5, 0.5], None) == [300, 300]
    assert targets([300, 900], [0.5, 0.5], 100) == [50, 50]


def test_shares_that_cannot_be_met_are_errors():
    with pytest.raises(DataError, match="leave nothing for the sources without one"):
        targets([10, 10, 10], [None, 0.5, 0.5], None)
    with pytest.raises(DataError, match=r"they add up to 0\.7"):
        targets([10, 10], [0.4, 0.3], None)
    with pytest.raises(DataError, match="made-up documents have no end"):
        targets([None], [None], None)
    assert targets([None], [None], 50) == [50]


def test_documents_are_drawn_once_each_before_any_comes_again_and_to_the_token():
    lengths = np.array([5, 7, 11, 2])
    documents, taken = draw(lengths, 60, np.random.default_rng(0))
    assert taken.sum() == 60
    assert sorted(documents[:4]) == [0, 1, 2, 3] == sorted(documents[4:8])
    assert (taken[:-1] == lengths[documents[:-1]]).all()
    documents, taken = draw(lengths, 9, np.random.default_rng(0))
    assert taken.sum() == 9 and len(set(documents)) == len(documents)


@pytest.mark.parametrize("seed", range(5))
def test_packing_keeps_every_token_once_and_whole_documents_in_one_row(seed):
    rng = np.random.default_rng(seed)
    entries = [
        Entry(int(whole), i, int(rng.integers(1, 33) if whole else rng.integers(1, 90)), bool(whole))
        for i, whole in enumerate(rng.random(400) < 0.4)
    ]
    at, covered = 0, {}
    for entry, start, stop in pack(iter(entries), 32):
        assert covered.get(entry, 0) == start < stop
        covered[entry] = stop
        if entry.whole and stop == entry.length:
            assert at // 32 == (at + stop - start - 1) // 32
        at += stop - start
    assert set(covered) == set(entries)
    assert all(covered[entry] == entry.length for entry in entries if not entry.whole)
    cut = [entry for entry in entries if entry.whole and covered[entry] < entry.length]
    # Only at the very end is there no text left to wait behind.
    assert len(cut) <= 2


def test_whole_documents_alone_are_cut_at_the_end_of_the_row():
    pieces = list(pack((Entry(0, i, 20, True) for i in range(200)), 32))
    at = 0
    for _, start, stop in pieces:
        assert start == 0 and at // 32 == (at + stop - 1) // 32
        at += stop
    assert len(pieces) == 200 and any(stop < 20 for *_, stop in pieces)
