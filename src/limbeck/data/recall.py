"""Made-up documents that can only be predicted by looking back, and probes of the same make at exact distances.

Three tasks, written in ids of any tokenizer, without special tokens:

* ``repeat``     ``s1 … sn  gap  s1 … sn``: everything in the second copy but its first token is in the first.
* ``key_value``  ``k1 v1 … km vm  gap  k3 v3 k1 v1 …``: after a key, its value.
* ``needle``     ``text  k v1 … v4  text  k v1 … v4``: one pair far back in other text.

The tokens that carry an answer are distinct and do not occur in the gap, so one look at the last occurrence of the current token
gives the next one, and nothing else does.  ``repeat`` and ``key_value`` go back to induction heads (Olsson et al. 2022,
arXiv:2209.11895) and associative recall (MQAR, Arora et al. 2023, arXiv:2312.04927).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from limbeck.config.parts.sources import RecallSourceOptions
from limbeck.data.sources import MadeUpSource
from limbeck.errors import DataError

TRAIN, HELD_OUT, PROBE = 0, 1, 2
"""Streams of random numbers: what is trained on, what validates, and what probes never meet."""
VALUE = 4
"""Tokens of a needle's value."""
BEFORE = 8
"""Tokens before the needle in a probe."""


@dataclass(frozen=True)
class MadeUp:
    """A document in ids ``[T]`` and, by target token, whether a look back gives it and whether its loss counts (bool ``[T]``)."""

    ids: np.ndarray
    recalled: np.ndarray
    counted: np.ndarray


class RecallSource(MadeUpSource):
    """The recall documents of a mixture: document ``index`` of a stream is a pure function of the seed."""

    def __init__(self, options: RecallSourceOptions, base_dir: Path):
        super().__init__(options, base_dir)
        self.options: RecallSourceOptions = options

    def document(
        self, index: int, *, stream: int, ids: np.ndarray, longest: int, seed: tuple[int, ...], text: np.ndarray | None = None
    ) -> MadeUp:
        """Document ``index`` of at most ``longest`` tokens, log-uniform in length.

        ``ids`` are the tokenizer's ordinary ids, of which ``options.vocabulary`` are used; ``text`` is a run of real tokens for
        needles to hide in (random ids without it).
        """
        rng = np.random.default_rng((*seed, stream, index))
        ids = ids[: self.options.vocabulary]
        task = self.options.tasks[rng.integers(len(self.options.tasks))]
        shortest = min(self.options.min_length, longest)
        length = int(math.exp(rng.uniform(math.log(shortest), math.log(longest + 1))))
        length = min(max(length, shortest), longest)
        # Without a gap everything in the second half is asked; with one there is little to ask, but from further back.
        body = length if rng.random() < 0.5 else int(length * rng.random())
        if task == "repeat":
            size = max(2, min(body // 2, len(ids)))
            if length - 2 * size > 1:
                size = min(size, len(ids) // 2)
                return _repeat(rng, ids, size, length - 2 * size)
            return _repeat(rng, ids, size, 0)
        if task == "key_value":
            pairs = max(2, min(body // 4, len(ids) // 4))
            gap = length - 4 * pairs
            return _key_value(rng, ids, rng.permutation(pairs), gap if gap > 3 else 0)
        value = max(1, min(VALUE, (length - 4) // 2))
        spare = max(0, length - 2 * (1 + value))
        before = int(rng.integers(spare + 1))
        return _needle(rng, ids, value, before, spare - before, text)


def probe(
    task: str, distance: int, rows: int, *, ids: np.ndarray, seed: int, filler_ids: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows in which the asked tokens stood exactly ``distance`` tokens earlier.

    ``ids`` are ordinary token ids; ``filler_ids`` is a run of real tokens for needles to hide in.  The same make as the training
    documents, from random numbers that those never use.

    Returns:
        ``input_ids_BT`` int64, and ``answers_BT`` bool: positions whose **next** token is asked.

    Raises:
        DataError: an unknown task, a distance too short for it, or too few ids.
    """
    shortest = {"repeat": 2, "key_value": 4, "needle": 1 + VALUE}
    if task not in shortest:
        raise DataError(f"unknown recall task {task!r}; allowed: {', '.join(shortest)}")
    if distance < shortest[task]:
        raise DataError(f"recall task '{task}' cannot ask {distance} tokens back: its shortest distance is {shortest[task]}")
    check_ids(ids)
    documents, exact = [], []
    for row in range(rows):
        rng = np.random.default_rng((seed, 0, PROBE, row))
        if task == "repeat":
            size = distance if distance <= len(ids) else len(ids) // 2
            document = _repeat(rng, ids, size, distance - size)
            exact.append(document.recalled)
        elif task == "key_value":
            pairs = min(distance // 2, len(ids) // 4)
            document = _key_value(rng, ids, order := _half_in_place(rng, pairs), distance - 2 * pairs)
            in_place = np.zeros(len(document.ids), dtype=bool)
            in_place[-2 * pairs + 1 :: 2] = order == np.arange(pairs)
            exact.append(document.recalled & in_place)
        else:
            document = _needle(rng, ids, VALUE, BEFORE, distance - 1 - VALUE, filler_ids)
            exact.append(document.recalled)
        documents.append(document.ids)
    asked_BT = np.stack(exact)
    answers_BT = np.zeros_like(asked_BT)
    answers_BT[:, :-1] = asked_BT[:, 1:]
    return np.stack(documents), answers_BT


def check_ids(ids: np.ndarray) -> None:
    """Recall documents need distinct ids to tell their parts apart."""
    if len(ids) < 32:
        raise DataError(
            f"recall documents need at least 32 ordinary token ids, and the tokenizer has {len(ids)}: take another tokenizer, or leave "
            "the source out"
        )


def _repeat(rng: np.random.Generator, ids: np.ndarray, size: int, gap: int) -> MadeUp:
    string = rng.choice(ids, size, replace=False)
    tokens = np.concatenate([string, _others(rng, ids, gap, string), string]).astype(np.int64)
    recalled = np.zeros(len(tokens), dtype=bool)
    recalled[size + gap + 1 :] = True
    return MadeUp(tokens, recalled, recalled)


def _key_value(rng: np.random.Generator, ids: np.ndarray, order: np.ndarray, gap: int) -> MadeUp:
    pairs_M2 = rng.choice(ids, 2 * len(order), replace=False).reshape(-1, 2)
    tokens = np.concatenate([pairs_M2.ravel(), _others(rng, ids, gap, pairs_M2), pairs_M2[order].ravel()]).astype(np.int64)
    recalled = np.zeros(len(tokens), dtype=bool)
    recalled[2 * len(order) + gap + 1 :: 2] = True
    return MadeUp(tokens, recalled, recalled)


def _needle(rng: np.random.Generator, ids: np.ndarray, value: int, before: int, gap: int, text: np.ndarray | None) -> MadeUp:
    hay = None if text is None else _window(rng, text, before + gap)
    pair = rng.choice(ids, 1 + value, replace=False)
    for _ in range(32):
        if hay is None or not np.isin(pair, hay).any():
            break
        pair = rng.choice(ids, 1 + value, replace=False)
    else:
        # So few ids that the text has them all: only a random haystack leaves the pair unique.
        hay = None
    counted_hay = hay is not None
    if hay is None:
        hay = _others(rng, ids, before + gap, pair)
    tokens = np.concatenate([hay[:before], pair, hay[before:], pair]).astype(np.int64)
    recalled = np.zeros(len(tokens), dtype=bool)
    recalled[-value:] = True
    counted = recalled.copy()
    if counted_hay:
        # Real text is worth learning wherever it stands, but for the first token after the pair.
        counted[:before] = True
        counted[before + 2 + value : before + 1 + value + gap] = True
    return MadeUp(tokens, recalled, counted)


def _half_in_place(rng: np.random.Generator, size: int) -> np.ndarray:
    """A permutation of which at least half the places are fixed points, at random."""
    order = np.arange(size)
    moved = rng.choice(size, size // 2, replace=False)
    order[moved] = rng.permutation(moved)
    return order


def _others(rng: np.random.Generator, ids: np.ndarray, count: int, taken: np.ndarray) -> np.ndarray:
    """``count`` ids at random, none of them ``taken``."""
    drawn = rng.choice(ids, count)
    while (clash := np.isin(drawn, taken)).any():
        drawn[clash] = rng.choice(ids, int(clash.sum()))
    return drawn


def _window(rng: np.random.Generator, text: np.ndarray, count: int) -> np.ndarray | None:
    if len(text) < count:
        return None
    start = int(rng.integers(len(text) - count + 1))
    return np.asarray(text[start : start + count], dtype=np.int64)
