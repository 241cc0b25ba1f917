"""Windows of conversations that are longer than a row, against a plain search over random lengths of turns."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from limbeck.data.trajectories.tokens import Tokens
from limbeck.data.trajectories.windows import Window, cut

HEADER = 2
"""Tokens before an assistant's words."""
SEEDS = range(300)


def conversation(prefix: int, steps: list[tuple[int, int]]) -> Tokens:
    """Token ``i`` has the id ``i``; each step is (words of the assistant, what answers it)."""
    turns, at = [], prefix
    for words, answer in steps:
        turns.append((at, at + HEADER, at + HEADER + words))
        at += HEADER + words + answer
    spoken = np.zeros(at, dtype=bool)
    for _, start, end in turns:
        spoken[start:end] = True
    return Tokens(np.arange(at), spoken, np.array(turns, dtype=np.int64).reshape(-1, 3))


def random_case(seed: int) -> tuple[Tokens, int, list[tuple[int, int]], int]:
    """A conversation, the length of its beginning, its steps, and the size of a row, from too short to long enough."""
    rng = np.random.default_rng(seed)
    prefix = int(rng.integers(1, 20))
    long = int(rng.choice((4, 12, 40)))
    steps = [(int(rng.integers(1, long)), int(rng.integers(0, long))) for _ in range(rng.integers(1, 12))]
    return conversation(prefix, steps), prefix, steps, int(rng.integers(1, 120))


def counted(tokens: Tokens, windows: list[Window]) -> list[int]:
    """The turns whose words are targets, over all windows; each must be whole."""
    turns = []
    for window in windows:
        ids = window.ids(tokens)[window.targets(tokens)]
        for number, (_, start, end) in enumerate(tokens.turns_N3):
            inside = ids[(ids >= start) & (ids < end)]
            if len(inside):
                assert inside.tolist() == list(range(start, end)), "a turn was cut"
                turns.append(number)
        assert np.isin(ids, np.flatnonzero(tokens.spoken_T)).all()
    return turns


def held(tokens: Tokens, window: Window) -> list[int]:
    """The turns that stand in a window, targets or not; each whole, with its header."""
    ids = set(window.ids(tokens).tolist())
    found = []
    for number, (header, _, end) in enumerate(tokens.turns_N3):
        own = set(range(header, end))
        assert own <= ids or not own & ids, "a turn was cut"
        if own <= ids:
            found.append(number)
    return found


def check(tokens: Tokens, windows: list[Window], left_out: int, prefix: int, size: int) -> None:
    """What holds of every policy."""
    for window in windows:
        ids = window.ids(tokens)
        assert len(ids) <= size
        assert ids[:prefix].tolist() == list(range(prefix)), "the task is not at the beginning"
        assert (np.diff(ids) > 0).all(), "a token stands twice, or out of order"
        assert window.targets(tokens).any()
        held(tokens, window)
    turns = counted(tokens, windows)
    assert len(turns) == len(set(turns)), "a turn is a target twice"
    assert len(turns) + left_out == len(tokens.turns_N3)


def plain_windows(steps: list[tuple[int, int]], room: int, overlap: float) -> list[tuple[int, int, int, bool]]:
    """The first turn held, the first that counts, the one behind the last, and whether the last's answer is left out: step by step."""
    lengths = [HEADER + words + answer for words, answer in steps]
    said = [HEADER + words for words, _ in steps]
    found, at = [], 0
    while at < len(steps):
        if said[at] > room:
            at += 1
            continue
        first, spent = at, 0
        allowed = min(int(overlap * room), room - said[at]) if found else 0
        while first and spent + lengths[first - 1] <= allowed:
            first -= 1
            spent += lengths[first]
        behind, bare = at, False
        while behind < len(steps) and not bare:
            if spent + lengths[behind] <= room:
                spent += lengths[behind]
            elif spent + said[behind] <= room:
                bare = True
            else:
                break
            behind += 1
        found.append((first, at, behind, bare))
        at = behind
    return found


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.9])
def test_windows_are_those_of_a_plain_search(overlap):
    several = skipped = overlapping = 0
    for seed in SEEDS:
        tokens, prefix, steps, size = random_case(seed)
        windows, left_out = cut(tokens, size, "windows", overlap)
        check(tokens, windows, left_out, prefix, size)
        if len(tokens) <= size:
            assert len(windows) == 1 and windows[0].ids(tokens).tolist() == tokens.ids_T.tolist() and left_out == 0
            continue
        room = size - prefix
        wanted = plain_windows(steps, room, overlap) if room > 0 else []
        assert len(windows) == len(wanted)
        for window, (first, at, behind, bare) in zip(windows, wanted, strict=True):
            turns = held(tokens, window)
            assert turns == list(range(first, behind)) and counted(tokens, [window]) == list(range(at, behind))
            begin, end = tokens.turns_N3[first, 0], tokens.turns_N3[at, 0]
            assert end - begin <= overlap * room, "more of the window before than its share"
            overlapping += first < at
            last = int(window.ids(tokens)[-1])
            assert (last == tokens.turns_N3[behind - 1, 2] - 1) == (bare or steps[behind - 1][1] == 0)
        # Only words that fit no row are in none.
        assert left_out == (sum(HEADER + words > room for words, _ in steps) if room > 0 else len(steps))
        several += len(windows) > 1
        skipped += 0 < left_out < len(steps)
    assert several > 50 and skipped > 5 and (overlapping > 20 or overlap == 0), "the random lengths test little"


def test_the_overlap_never_counts_again():
    tokens = conversation(5, [(3, 5)] * 20)
    windows, left_out = cut(tokens, 45, "windows", 0.5)
    assert left_out == 0 and counted(tokens, windows) == list(range(20))
    again = [set(held(tokens, b)) & set(held(tokens, a)) for a, b in pairwise(windows)]
    assert all(len(shared) == 2 for shared in again), "half of 40 tokens is two turns of 10"


def test_a_bound_is_a_bound():
    tokens = conversation(5, [(3, 5), (3, 5)])
    assert len(tokens) == 25
    assert [len(cut(tokens, size, "windows", 0.0)[0]) for size in (25, 24, 20, 19, 10)] == [1, 1, 1, 2, 2]
    # Without room for its answer an assistant's turn may still end a window; of its own words none may be missing.
    assert cut(tokens, 24, "windows", 0.0)[0][0].ids(tokens).tolist() == list(range(20))
    assert cut(tokens, 9, "windows", 0.0) == ([], 2)


def test_a_turn_longer_than_a_row_is_left_out_alone():
    tokens = conversation(4, [(3, 2), (50, 2), (3, 2)])
    windows, left_out = cut(tokens, 30, "windows", 0.25)
    assert counted(tokens, windows) == [0, 2] and left_out == 1
    assert all(1 not in held(tokens, window) for window in windows)
    assert cut(tokens, 30, "head", 0.25)[1] == 2


@pytest.mark.parametrize("policy", ["drop", "head", "head_tail", "windows"])
def test_a_task_longer_than_a_row_leaves_nothing(policy):
    tokens = conversation(40, [(3, 2), (3, 2)])
    for size in (20, 40, 42):
        assert cut(tokens, size, policy, 0.25) == ([], 2)


@pytest.mark.parametrize("policy", ["drop", "head", "head_tail", "windows"])
def test_what_fits_is_never_cut(policy):
    tokens = conversation(5, [(3, 2), (4, 0)])
    [window], left_out = cut(tokens, len(tokens), policy, 0.25)
    assert left_out == 0 and window.ids(tokens).tolist() == tokens.ids_T.tolist() and (window.targets(tokens) == tokens.spoken_T).all()


def test_drop_is_all_or_nothing():
    for seed in SEEDS:
        tokens, prefix, _, size = random_case(seed)
        windows, left_out = cut(tokens, size, "drop", 0.25)
        check(tokens, windows, left_out, prefix, size)
        assert len(windows) == (len(tokens) <= size)


def test_head_is_the_first_window():
    for seed in SEEDS:
        tokens, prefix, steps, size = random_case(seed)
        windows, left_out = cut(tokens, size, "head", 0.25)
        check(tokens, windows, left_out, prefix, size)
        if len(tokens) <= size or size <= prefix:
            continue
        wanted = plain_windows(steps[:1], size - prefix, 0.0) and plain_windows(steps, size - prefix, 0.0)[0]
        assert [held(tokens, window) for window in windows] == ([list(range(wanted[2]))] if wanted else [])


def test_head_and_tail_share_the_room():
    """The first steps get half of the room at most, the last ones what is left, and one more would not fit on either side."""
    both = 0
    for seed in SEEDS:
        tokens, prefix, steps, size = random_case(seed)
        windows, left_out = cut(tokens, size, "head_tail", 0.25)
        check(tokens, windows, left_out, prefix, size)
        room = size - prefix
        if len(tokens) <= size or room <= 0:
            continue
        lengths = [HEADER + words + answer for words, answer in steps]
        head = max(n for n in range(len(steps) + 1) if sum(lengths[:n]) <= room // 2)
        tail = max(n for n in range(len(steps) - head + 1) if sum(lengths[len(steps) - n :]) <= room - sum(lengths[:head]))
        assert [held(tokens, window) for window in windows] == ([[*range(head), *range(len(steps) - tail, len(steps))]] if head + tail else [])
        both += head > 0 and tail > 0
    assert both > 20
