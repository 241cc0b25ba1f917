"""Which conditions are held out, and which two make a mix: drawn by the seed, or named."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from limbeck.config.parts.conditions import HeldOutOptions
from limbeck.errors import DataError, did_you_mean


class Task(NamedTuple):
    """A slice of a source in a format."""

    source: str
    slice: str
    format: str

    @property
    def name(self) -> str:
        """``source/slice/format``."""
        return "/".join(self)


def split_of(tasks: Sequence[Task], held_out: HeldOutOptions, seed: int) -> list[str]:
    """``seen``, ``held_out_slice`` or ``held_out_source`` of each task.

    Raises:
        DataError: nothing seen is left, a name is unknown, or what is held out would leave its source or its format unseen.
    """
    splits = ["held_out_source" if task.source in held_out.sources else "seen" for task in tasks]
    seen = [i for i, split in enumerate(splits) if split == "seen"]
    if not seen:
        raise DataError("held_out.sources: no condition of another source is left to train on: lower `min_examples`, or hold out fewer")
    chosen = _drawn(tasks, seen, held_out.slices, seed) if isinstance(held_out.slices, int) else _named(tasks, seen, held_out.slices)
    for i in chosen:
        splits[i] = "held_out_slice"
    return splits


def _drawn(tasks: Sequence[Task], seen: list[int], count: int, seed: int) -> list[int]:
    """Conditions in a seeded order, each taken if its source and its format still occur among those that are left."""
    left = Counter(key for i in seen for key in _keys(tasks[i]))
    chosen: list[int] = []
    for i in np.random.default_rng((seed, 0x68656C64)).permutation(seen).tolist():
        if len(chosen) < count and all(left[key] > 1 for key in _keys(tasks[i])):
            left.subtract(_keys(tasks[i]))
            chosen.append(i)
    if len(chosen) < count:
        raise DataError(
            f"held_out.slices: {count} asked, and of {len(seen)} conditions, in the order of this seed, only {len(chosen)} can be held out so that "
            "the source and the format of each stay among the seen ones: lower it, or add slices (`slices.count`) or `formats`"
        )
    return chosen


def _named(tasks: Sequence[Task], seen: list[int], names: Sequence[str]) -> list[int]:
    chosen: set[int] = set()
    for name in names:
        found = [i for i in seen if name in (tasks[i].name, f"{tasks[i].source}/{tasks[i].slice}")]
        if not found:
            known = list(dict.fromkeys(word for i in seen for word in (tasks[i].name, f"{tasks[i].source}/{tasks[i].slice}")))
            hint = did_you_mean(name, known) or f"; there are {', '.join(known[:8])}{', …' if len(known) > 8 else ''}"
            raise DataError(f"held_out.slices: no condition {name!r}{hint}")
        chosen.update(found)
    left = {key for i in seen if i not in chosen for key in _keys(tasks[i])}
    for i in sorted(chosen):
        for what, word in _keys(tasks[i]):
            if (what, word) not in left:
                raise DataError(
                    f"held_out.slices: with {tasks[i].name} no condition of {what} {word!r} is left among the seen ones: hold out fewer"
                    + (", or the whole source by `held_out.sources`" if what == "source" else "")
                )
    return sorted(chosen)


def _keys(task: Task) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("source", task.source), ("format", task.format)


def mixed_pairs(tasks: Sequence[Task], splits: Sequence[str], count: int, in_one_format: int, seed: int) -> list[tuple[int, int]]:
    """``count`` different pairs of seen tasks of different sources, drawn by the seed, and ``in_one_format`` others of one format.

    Where there is one source, its slices stand for sources.

    Raises:
        DataError: there are not so many.
    """
    seen = [i for i, split in enumerate(splits) if split == "seen"]
    one = len({tasks[i].source for i in seen}) == 1
    of = [task.slice if one else task.source for task in tasks]
    pairs = [(i, j) for i, j in itertools.combinations(seen, 2) if of[i] != of[j]]
    alike = [pair for pair in pairs if tasks[pair[0]].format == tasks[pair[1]].format]
    first = _some_of(alike, in_one_format, seed, "mixes_in_one_format", "of different sources in one format")
    rest = [pair for pair in pairs if pair not in set(first)]
    return [*_some_of(rest, count, seed, "mixes", "of different sources"), *first]


def _some_of(pairs: list[tuple[int, int]], count: int, seed: int, field: str, which: str) -> list[tuple[int, int]]:
    if count > len(pairs):
        raise DataError(f"{field}: {count} asked, and there are {len(pairs)} pairs of seen conditions {which}: lower it, or add sources")
    return [pairs[k] for k in sorted(np.random.default_rng((seed, 0x6D6978)).permutation(len(pairs))[:count].tolist())]
