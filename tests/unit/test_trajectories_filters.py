"""Which of agents' runs are kept, and on which side of the split they stand."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest

from limbeck.data.trajectories.filters import SWE_BENCH, Leakage, Outline, capped, split_by_repo, why_not
from limbeck.data.trajectories.similarity import alike, signature, words
from limbeck.data.trajectories.trajectory import Trajectory
from limbeck.errors import DataError
from trajectory_cases import made


def test_filters_say_why():
    words_ = dict(resolved=True, exit_status=("submit",), patch=True)
    assert why_not(made(), **words_) is None
    assert why_not(made(resolved=False), **words_) == "not resolved"
    assert why_not(made(resolved=None), **words_) == "resolved unknown"
    assert why_not(made(exit_status="exit_cost"), **words_) == "exit status"
    assert why_not(made(patch=" \n"), **words_) == "empty patch"
    assert why_not(made(resolved=None, exit_status=None, patch=None), resolved=False, exit_status=(), patch=False) is None


def test_the_repositories_of_swe_bench_are_left_out_in_any_spelling():
    leakage = Leakage()
    assert len(SWE_BENCH) == 12
    for repo in SWE_BENCH:
        for spelling in (repo, repo.upper(), repo.replace("/", "__"), f"https://github.com/{repo}.git"):
            assert leakage.why_not(made(repo=spelling)) == "SWE-bench repository", spelling
    assert leakage.why_not(made(repo="mirror/of-it", instance_id="Django__django-1")) == "SWE-bench repository"
    assert leakage.why_not(made(repo="octo/django")) is None
    assert Leakage(swe_bench=False).why_not(made(repo="django/django")) is None


def test_listed_instances_commits_and_issues_are_left_out(tmp_path):
    rng = random.Random(0)
    issue = [f"word{rng.randrange(400)}" for _ in range(300)]
    (tmp_path / "ids.txt").write_text("octo__dog-1\n\nOcto__Cat-12\n")
    listed = {"instance_id": "octo__cow-3", "base_commit": "ABCDEF0123", "problem_statement": " ".join(issue)}
    (tmp_path / "verified.jsonl").write_text(json.dumps(listed) + "\n")
    (tmp_path / "more.json").write_text(json.dumps(["octo__hen-4"]))
    leakage = Leakage([tmp_path / "ids.txt", tmp_path / "verified.jsonl", tmp_path / "more.json"])
    other = made(instance_id="octo__owl-9")
    assert leakage.why_not(other) is None
    assert leakage.why_not(made()) == leakage.why_not(made(instance_id="octo__hen-4")) == "listed instance"
    assert leakage.why_not(replace(other, base_commit="abcdef0123")) == "listed commit"

    def wrapped(text: list[str]) -> Trajectory:
        return replace(other, issue=f"I've uploaded a repository.\n<issue_description>\n{' '.join(text)}\n</issue_description>\n" + "Mend it. " * 200)

    assert leakage.why_not(wrapped(issue)) == "near a listed issue"
    assert leakage.why_not(wrapped([*issue[:295], "and", "so", "on"])) == "near a listed issue"
    assert leakage.why_not(wrapped(issue[:150])) is None
    assert leakage.why_not(wrapped(issue[::-1])) is None


def test_a_list_with_holes_is_refused(tmp_path):
    for name, text, words_ in (
        ("empty.txt", "\n", "holds no instance"),
        ("cut.jsonl", '{"instance_id": "octo__', r"cut\.jsonl:1"),
        ("other.jsonl", '{"id": 3}', "`instance_id` is needed, found an object of id"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=words_):
            Leakage([tmp_path / name])
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="no UTF-8 text"):
        Leakage([tmp_path / "bytes.txt"])
    with pytest.raises(DataError, match=r"did you mean 'empty\.txt'"):
        Leakage([tmp_path / "emty.txt"])


def test_minhash_estimates_the_jaccard_similarity():
    rng = random.Random(1)
    errors = []
    for share in (0.1, 0.5, 0.8, 0.95):
        for _ in range(20):
            a = [str(rng.random()) for _ in range(300)]
            b = a[: int(300 * share)] + [str(rng.random()) for _ in range(300 - int(300 * share))]
            grams = [set(zip(*(x[i:] for i in range(5)), strict=False)) for x in (a, b)]
            true = len(grams[0] & grams[1]) / len(grams[0] | grams[1])
            errors.append(alike(signature(a, 5)[None], signature(b, 5))[0] - true)
    # The standard error of 128 orders is at most 0.044; of the mean of 80 texts a ninth of that.
    assert abs(np.mean(errors)) < 0.015 and np.std(errors) < 0.05
    assert words("The cat's  PURR") == ["the", "cat", "s", "purr"]
    assert (signature(["a"], 5) == signature(["a"], 5)).all() and not (signature(["a", "b"], 2) == signature(["b", "a"], 2)).any()


def test_the_cap_keeps_the_shortest_and_then_the_most_different():
    def run(name: str, actions: str, size: int, instance: str = "octo__cat-1") -> Trajectory:
        calls = [{"function": {"name": action, "arguments": {"path": "x"}}} for action in actions]
        turns = [{"role": "user", "content": "u" * size}, {"role": "assistant", "content": "", "tool_calls": calls}]
        return made(name=name, instance_id=instance, messages=turns)

    runs = [
        run("copy", "abcdefgh", 20),
        run("other", "zyxwvuts", 90),
        run("first", "abcdefgh", 10),
        run("again", "zyxwvuts", 95),
        run("half", "abcdzyxw", 50),
        run("alone", "abcdefgh", 500, "octo__cat-2"),
    ]

    def kept(order: list[Trajectory], count: int) -> list[str]:
        return [outline.name for outline in capped([Outline.of(i, t) for i, t in enumerate(order)], count)]

    assert kept(runs, 1) == ["first", "alone"]
    assert kept(runs, 2) == ["other", "first", "alone"]
    assert kept(runs, 3) == ["other", "first", "half", "alone"]
    assert kept(runs, 4) == ["copy", "other", "first", "half", "alone"]
    assert kept(runs, 5) == [t.name for t in runs]
    # Which are kept hangs on the runs, not on their order.
    for order in itertools.permutations(runs):
        assert set(kept(list(order), 3)) == {"other", "first", "half", "alone"}
    with pytest.raises(DataError, match="per_instance: 0"):
        capped([], 0)


def test_a_repository_stands_on_one_side_whatever_else_is_there():
    repos = [f"owner{i}/repo{i}" for i in range(400)]
    sides = split_by_repo(repos, 0.25, seed=3)
    away = {repo for repo, side in sides.items() if side == "held_out_source"}
    assert 70 < len(away) < 130 and set(sides.values()) == {"seen", "held_out_source"}
    half = split_by_repo(repos[::2], 0.25, seed=3)
    assert all(sides[repo] == side for repo, side in half.items())
    assert sides != split_by_repo(repos, 0.25, seed=4)
    spellings = split_by_repo(["Octo/Cat", "octo__cat", "octo/cat", *repos], 0.5, seed=0)
    assert len({spellings[name] for name in ("Octo/Cat", "octo__cat", "octo/cat")}) == 1


def test_each_side_has_a_repository_where_there_are_two():
    for seed in range(30):
        for share in (0.01, 0.5, 0.99, 1.0):
            assert set(split_by_repo(["a/b", "c/d", "a/b"], share, seed).values()) == {"seen", "held_out_source"}
    assert split_by_repo(["a/b", "c/d"], 0.0, 0) == {"a/b": "seen", "c/d": "seen"}


def test_repositories_held_out_by_name():
    assert split_by_repo(["Octo/Cat", "octo/dog"], ["octo__cat"], 0) == {"Octo/Cat": "held_out_source", "octo/dog": "seen"}
    with pytest.raises(DataError, match="no trajectory is of repository 'octo/cet', did you mean 'octo/cat'"):
        split_by_repo(["octo/cat", "octo/dog"], ["octo/cet"], 0)
    with pytest.raises(DataError, match="all 2 repositories are held out"):
        split_by_repo(["octo/cat", "octo/dog"], ["octo/cat", "octo/dog"], 0)
    with pytest.raises(DataError, match=r"held_out: 1\.5"):
        split_by_repo(["octo/cat"], 1.5, 0)
