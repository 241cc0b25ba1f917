"""The maths of choosing layers: controls, orders, correlation, early stopping, and the ledger under them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from limbeck.errors import CheckpointError
from limbeck.evaluation.ranking.orders import (
    by_importance,
    halo_importance,
    race,
    race_order,
    random_sets,
    spearman,
    stops_after,
    uniform_set,
)
from limbeck.stages.ledger import Ledger


def test_uniform_sets_are_those_of_the_published_recipes() -> None:
    assert uniform_set(28, 7) == list(range(3, 28, 4))
    assert uniform_set(36, 9) == list(range(3, 36, 4))
    assert uniform_set(8, 2) == [3, 7] and len(set(uniform_set(7, 3))) == 3


def test_random_sets_are_distinct_sorted_and_the_seeds_own() -> None:
    drawn = random_sets(8, 2, 5, seed=3)
    assert drawn == random_sets(8, 2, 5, seed=3) != random_sets(8, 2, 5, seed=4)
    assert len({tuple(layers) for layers in drawn}) == 5 and all(a < b < 8 for a, b in drawn)
    assert sorted(map(tuple, random_sets(4, 1, 9, seed=0))) == [(0,), (1,), (2,), (3,)]


def test_spearman_is_the_correlation_of_the_ranks() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.permutation(9).tolist(), rng.permutation(9).tolist()
    expected = np.corrcoef(np.argsort(one), np.argsort(other))[0, 1]
    assert spearman(one, other) == pytest.approx(expected, abs=1e-12)
    assert spearman([2, 0, 1], [2, 0, 1]) == 1 and spearman([0, 1, 2], [2, 1, 0]) == -1
    with pytest.raises(ValueError, match="different layers"):
        spearman([0, 1], [1, 2])


def test_equal_layers_come_in_their_order_in_the_model() -> None:
    assert by_importance({2: 1.0, 0: 1.0, 1: 3.0}) == [1, 0, 2]


def test_halo_prefers_recall_lost_without_text_lost() -> None:
    assert halo_importance(2.0, 0.1) > halo_importance(2.0, 1.0) > halo_importance(0.1, 1.0)


def test_a_candidate_stops_when_enough_others_were_clearly_better() -> None:
    better = [[1.0, 0.8, 0.5], [1.1, 0.9, 0.6]]
    assert stops_after([1.3, 1.2, 0.1], better, keep=2, rungs=3, margin=0.1) == 1
    assert stops_after([1.15, 1.2, 0.1], better, keep=2, rungs=3, margin=0.1) == 2
    assert stops_after([1.3, 1.2, 0.1], better, keep=3, rungs=3, margin=0.1) == 3, "two rivals do not fill three places"
    assert stops_after([1.3, 1.2, 0.1], better, keep=2, rungs=3, margin=None) == 3
    assert stops_after([9.0], better, keep=2, rungs=1, margin=0.0) == 1


def test_candidates_that_ran_elsewhere_to_the_end_count_as_if_they_had_run_in_turn() -> None:
    whole = {5: [1.0, 0.5, 0.2], 3: [2.0, 0.4, 0.1], 1: [4.0, 3.0, 0.05], 0: [1.2, 0.6, 0.3]}
    settings = {"keep": 1, "rungs": 3, "margin": 0.1}
    in_turn: dict[int, list[float]] = {}
    for layer, scores in whole.items():
        ran: list[float] = []
        # As the stage does it: each new score is looked at, beside what those before it have.
        while len(ran) < 3 and (not ran or stops_after(ran, list(in_turn.values()), **settings) > len(ran)):
            ran = scores[: len(ran) + 1]
        in_turn[layer] = ran
    assert race(whole, **settings) == in_turn == {5: [1.0, 0.5, 0.2], 3: [2.0], 1: [4.0], 0: [1.2]}
    assert race_order(in_turn, [7, 3, 2]) == [5, 0, 3, 1, 7, 2]


def test_a_ledger_gives_back_what_it_was_told(tmp_path: Path) -> None:
    value = {"scores": [0.1 + 0.2, 1e-17], "trained": 3}
    Ledger(tmp_path, "me").add("a", value)
    again = Ledger(tmp_path, "me")
    assert again["a"] == value and again.get("a", lambda: pytest.fail("known already")) == value and "b" not in again


def test_a_line_cut_short_by_a_crash_is_left_out_and_written_over(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "me")
    ledger.add("a", 1)
    with ledger.path.open("a") as file:
        file.write('{"identity": "me", "candidate": "b", "res')
    again = Ledger(tmp_path, "me")
    assert "a" in again and "b" not in again
    again.add("b", 2)
    assert [json.loads(line)["result"] for line in ledger.path.read_text().splitlines()] == [1, 2]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "me")
    ledger.add("a", 1)
    ledger.path.write_text("{}\n" + ledger.path.read_text())
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl:1"):
        Ledger(tmp_path, "me")


def test_ledgers_merge_and_leave_out_other_identities(tmp_path: Path) -> None:
    for own, name in itertools.product(("3", "5"), ("me", "other")):
        Ledger(tmp_path, name, own=own).add(f"ga_s2/{own}", f"{name} {own}")
    said: list[str] = []
    merged = Ledger(tmp_path, "me", say=said.append)
    assert (merged["ga_s2/3"], merged["ga_s2/5"]) == ("me 3", "me 5")
    assert len(said) == 1 and "2 lines" in said[0]
    Ledger(tmp_path, "me", own="4").add("ga_s2/3", "again")
    Ledger(tmp_path, "me").add("ga_s2/9", "common")
    assert Ledger(tmp_path, "me")["ga_s2/3"] == "me 3", "which of two lines counts does not depend on time"
