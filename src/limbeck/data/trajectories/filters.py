"""Which trajectories are kept, and on which side of the split they stand."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.data.documents import content_hash, side_of
from limbeck.data.trajectories.formats import repo_of
from limbeck.data.trajectories.reading import SUFFIXES, raw_rows
from limbeck.data.trajectories.similarity import PERMUTATIONS, alike, signature, words
from limbeck.data.trajectories.trajectory import Trajectory, Unusable, found
from limbeck.errors import DataError, did_you_mean

SWE_BENCH = (
    "django/django",
    "sympy/sympy",
    "scikit-learn/scikit-learn",
    "matplotlib/matplotlib",
    "astropy/astropy",
    "sphinx-doc/sphinx",
    "pytest-dev/pytest",
    "pylint-dev/pylint",
    "psf/requests",
    "pydata/xarray",
    "mwaskom/seaborn",
    "pallets/flask",
)
"""The repositories of SWE-bench (Jimenez et al., 2024)."""
NEAR = 0.8
"""Similarity of 5-grams of words from which two issues count as the same."""
ISSUE_WORDS, ACTIONS = 5, 3
"""Lengths of the n-grams of issues and of actions."""
SEEN, HELD_OUT = "seen", "held_out_source"
"""The sides of a split by repository."""

_STATEMENT = re.compile(
    r"<(issue_description|pr_description|problem_statement|issue)>(?P<tagged>.*?)</\1>"
    r"|^ISSUE:\n(?P<titled>.*?)\n\s*INSTRUCTIONS:",
    re.DOTALL | re.MULTILINE,
)
"""How OpenHands and SWE-agent wrap an issue in the first user turn."""


def why_not(trajectory: Trajectory, *, resolved: bool, exit_status: tuple[str, ...], patch: bool) -> str | None:
    """The reason for which a trajectory is left out, or None.

    ``resolved``: only those that are known to solve their task; ``exit_status``: only those that ended so (empty: any);
    ``patch``: only those that changed something.
    """
    if resolved and not trajectory.resolved:
        return "resolved unknown" if trajectory.resolved is None else "not resolved"
    if exit_status and trajectory.exit_status not in exit_status:
        return "exit status"
    return "empty patch" if patch and not (trajectory.patch or "").strip() else None


class Leakage:
    """What must not be trained on: the repositories of SWE-bench, and listed instances, their commits, and issues that read like theirs.

    A list holds one id a line, or records with ``instance_id`` and maybe ``base_commit`` and ``problem_statement`` or ``issue``.

    Raises:
        DataError: a file that is not there or damaged, or a record without an id: a list with holes leaks.
    """

    def __init__(self, files: Sequence[Path] = (), *, swe_bench: bool = True):
        self.repositories = frozenset(SWE_BENCH if swe_bench else ())
        self.instances: set[str] = set()
        self.commits: set[str] = set()
        issues = [self._add(name, record) for file in files for name, record in _listed(file)]
        signatures = [signature(issue, ISSUE_WORDS) for issue in issues if issue]
        self._issues_NP = np.stack(signatures) if signatures else np.empty((0, PERMUTATIONS), dtype=np.uint64)

    def _add(self, name: str, record: Any) -> list[str]:
        """Take a record in; the words of its issue come back."""
        record = {"instance_id": record} if isinstance(record, str) else record
        if isinstance(record, Unusable):
            raise DataError(f"{record.detail}: an instance that cannot be read would not be kept out; mend or remove it")
        instance = record.get("instance_id") if isinstance(record, dict) else None
        if not isinstance(instance, str) or not instance.strip():
            raise DataError(f"{name}: an `instance_id` is needed, found {found(record)}")
        self.instances.add(instance.strip().lower())
        if isinstance(record.get("base_commit"), str) and record["base_commit"].strip():
            self.commits.add(record["base_commit"].strip().lower())
        text = record.get("problem_statement") or record.get("issue")
        return words(statement(text)) if isinstance(text, str) else []

    def why_not(self, trajectory: Trajectory) -> str | None:
        """``SWE-bench repository``, ``listed instance``, ``listed commit``, ``near a listed issue``, or None."""
        if {canonical(trajectory.repo), canonical(repo_of(trajectory.instance_id) or "")} & self.repositories:
            return "SWE-bench repository"
        if trajectory.instance_id.lower() in self.instances:
            return "listed instance"
        if trajectory.base_commit is not None and trajectory.base_commit.lower() in self.commits:
            return "listed commit"
        if len(self._issues_NP):
            near = alike(self._issues_NP, signature(words(statement(trajectory.issue)), ISSUE_WORDS))
            if near.max() >= NEAR:
                return "near a listed issue"
        return None


def statement(issue: str) -> str:
    """The issue in a first user turn, without what the scaffold says around it; the whole turn where no scaffold is known."""
    match = _STATEMENT.search(issue)
    return (match["tagged"] or match["titled"] or issue) if match else issue


def canonical(repo: str) -> str:
    """``owner/repo`` in small letters, also of ``owner__repo`` and of an address."""
    return "/".join(repo.strip().lower().removesuffix(".git").replace("__", "/").rstrip("/").split("/")[-2:])


def _listed(file: Path) -> list[tuple[str, Any]]:
    """The records of a list; an id by itself is a text."""
    if not file.is_file() or file.name.lower().removesuffix(".gz").endswith(SUFFIXES):
        records = list(raw_rows([str(file)], None, file.parent))
    else:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: no UTF-8 text ({error}): one id a line is needed, or a file of {', '.join(SUFFIXES)}") from error
        records = [(f"{file}:{i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise DataError(f"{file}: holds no instance: one id a line is needed, or records with `instance_id`")
    return records


@dataclass(frozen=True)
class Outline:
    """A kilobyte of a trajectory, so that many can be compared without being kept.

    ``number`` is its place in the input, ``size`` the characters of its turns and arguments, ``actions_P`` the signature (uint64) of
    the sequence of its actions, each a tool's name and the first argument.
    """

    number: int
    name: str
    instance_id: str
    repo: str
    size: int
    actions_P: np.ndarray

    @classmethod
    def of(cls, number: int, trajectory: Trajectory) -> Outline:
        """The outline of a trajectory."""
        size = sum(len(message["content"]) for message in trajectory.messages)
        actions = []
        for message in trajectory.messages:
            for call in message.get("tool_calls", ()):
                arguments = [str(value) for value in call["function"]["arguments"].values()]
                size += sum(map(len, arguments))
                actions.append(f"{call['function']['name']} {arguments[0] if arguments else ''}")
        return cls(number, trajectory.name, trajectory.instance_id, trajectory.repo, size, signature(actions, ACTIONS))


def capped(outlines: Sequence[Outline], per_instance: int) -> list[Outline]:
    """At most so many of each instance, in the order of the input: the shortest, then again and again the one whose actions are least like those kept.

    Ties go to the shorter, then to the earlier.

    Raises:
        DataError: a cap below 1.
    """
    if per_instance < 1:
        raise DataError(f"per_instance: {per_instance}, at least 1 is needed")
    groups = defaultdict[str, list[int]](list)
    for place, outline in enumerate(outlines):
        groups[outline.instance_id].append(place)
    kept = [place for group in groups.values() for place in _spread(outlines, group, per_instance)]
    return [outlines[place] for place in sorted(kept)]


def _spread(outlines: Sequence[Outline], group: list[int], count: int) -> list[int]:
    """``count`` of the places of a group."""
    if len(group) <= count:
        return group
    order = sorted(group, key=lambda place: (outlines[place].size, place))
    actions_NP = np.stack([outlines[place].actions_P for place in order])
    chosen = [0]
    nearest = alike(actions_NP, actions_NP[0])
    while len(chosen) < count:
        # Above any similarity: what is chosen is not chosen again.
        nearest[chosen] = 2.0
        chosen.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, alike(actions_NP, actions_NP[chosen[-1]]))
    return [order[i] for i in chosen]


def split_by_repo(repos: Sequence[str], held_out: float | Sequence[str], seed: int) -> dict[str, str]:
    """The side of each repository, ``seen`` or ``held_out_source``.

    ``held_out``: a share of all repositories, by a hash of ``seed`` and name, so that a repository stays where it is when others
    come or go; at least one on each side where there are two and the share is above 0.  Or the names of those held out.

    Raises:
        DataError: a share outside 0 to 1, a name that is no repository here, or nothing left to train on.
    """
    names = sorted({canonical(repo) for repo in repos})
    if isinstance(held_out, int | float):
        away = _drawn(names, held_out, seed)
    else:
        away = {_known(name, names) for name in ([held_out] if isinstance(held_out, str) else held_out)}
        if names and away == set(names):
            raise DataError(f"held_out: all {len(names)} repositories are held out ({', '.join(names[:5])}): leave one to train on")
    return {repo: HELD_OUT if canonical(repo) in away else SEEN for repo in repos}


def _drawn(names: list[str], share: float, seed: int) -> set[str]:
    if not 0 <= share <= 1:
        raise DataError(f"held_out: {share}, a share of the repositories from 0 to 1 is needed, or their names")
    hashes = {name: content_hash(f"{seed}:{name}".encode()) for name in names}
    away = {name for name, hashed in hashes.items() if side_of(hashed, share) == "held_out"}
    if share > 0 and len(names) > 1:
        order = sorted(names, key=lambda name: (hashes[name], name))
        away = (away | {order[0]}) - ({order[-1]} if len(away) == len(names) else set())
    return away


def _known(name: str, names: list[str]) -> str:
    wanted = canonical(name)
    if wanted not in names:
        hint = did_you_mean(wanted, names) or ";"
        known = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        raise DataError(f"held_out: no trajectory is of repository {name!r}{hint} there are {len(names)}: {known}")
    return wanted
