"""Cutting a source into slices.

Every way gives the same slices on every machine: they depend on the texts, the options and the seed alone.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from limbeck.config.parts.conditions import SliceOptions
from limbeck.data.conditions.examples import Example

FEATURES = 1024
"""Buckets that words are hashed into."""
LEVELS = 127
"""Vectors are rounded to whole numbers up to this: with 1024 of them a scalar product stays below 2**24, so that it is exact in
fp32 and does not depend on the order in which a machine adds."""
FITTED = 4096
"""Examples on which the clusters are found; the others are put to the nearest."""
ROUNDS, STARTS = 15, 3
"""Steps of one clustering, and how many are tried."""

_WORD = re.compile(r"[^\W\d_]{3,}")


def slice_examples(examples: Sequence[Example], options: SliceOptions, seed: int) -> dict[str, np.ndarray]:
    """Indices (int64, ascending) of the examples of each slice, by its name; what belongs to no slice is left out."""
    if options.by == "field":
        return _most_frequent([example.value for example in examples], options.count)
    if options.by == "folder":
        return _most_frequent(_folders([example.name for example in examples]), options.count)
    if options.by == "length":
        order = sorted(range(len(examples)), key=lambda i: (len(examples[i].text), examples[i].hash))
        return {f"length{k}": np.sort(part) for k, part in enumerate(np.array_split(np.array(order, dtype=np.int64), options.count)) if len(part)}
    if options.by == "topic":
        return _numbered("topic", topics([example.text for example in examples], options.count, seed))
    return {"all": np.arange(len(examples))}


def _most_frequent(values: Sequence[str], count: int) -> dict[str, np.ndarray]:
    """The ``count`` most frequent values, ties by name; names are made fit for a path and told apart by a number."""
    frequent = sorted(Counter(values).items(), key=lambda item: (-item[1], item[0]))[:count]
    found: dict[str, np.ndarray] = {}
    for value, _ in frequent:
        word = re.sub(r"[^\w.-]+", "_", value.strip())[:48] or "_"
        name, number = word, 1
        while name in found:
            number += 1
            name = f"{word}-{number}"
        found[name] = np.flatnonzero(np.array([v == value for v in values]))
    return found


def _folders(names: Sequence[str]) -> list[str]:
    """The first folder below the one that all documents share; ``top`` for those that lie in it."""
    parents = [PurePosixPath(name).parts[:-1] for name in names]
    shared = 0
    while parents and all(len(parent) > shared and parent[shared] == parents[0][shared] for parent in parents):
        shared += 1
    return [parent[shared] if len(parent) > shared else "top" for parent in parents]


def _numbered(word: str, group_N: np.ndarray) -> dict[str, np.ndarray]:
    """Groups numbered from the largest; of equally large ones the one that begins first."""
    groups = [np.flatnonzero(group_N == k) for k in np.unique(group_N)]
    groups.sort(key=lambda group: (-len(group), int(group[0])))
    return {f"{word}{k}": group for k, group in enumerate(groups)}


def topics(texts: Sequence[str], count: int, seed: int) -> np.ndarray:
    """The cluster of each text, int64 ``[N]`` in ``0 … count - 1``: spherical k-means on hashed tf-idf.

    Words weigh ``(1 + log tf) log((1 + N) / (1 + df))``.  The best of several seeded starts (k-means++) is kept.
    """
    words = [Counter(zlib.crc32(word.encode()) for word in _WORD.findall(text.lower())) for text in texts]
    idf_F = _idf(words)
    fitted = np.unique(np.linspace(0, len(texts) - 1, min(len(texts), FITTED)).astype(np.int64))
    X_NF = _vectors([words[i] for i in fitted], idf_F)
    rng = np.random.default_rng((seed, 0x746F))
    best: tuple[float, np.ndarray] | None = None
    for _ in range(STARTS):
        score, centres_KF = _cluster(X_NF, min(count, len(fitted)), rng)
        if best is None or score > best[0]:
            best = score, centres_KF
    assert best is not None
    chunks = [words[start : start + FITTED] for start in range(0, len(words), FITTED)]
    return np.concatenate([(_vectors(chunk, idf_F) @ best[1].T).argmax(1) for chunk in chunks]).astype(np.int64)


def _idf(words: Sequence[Counter[int]]) -> np.ndarray:
    frequency_F = np.zeros(FEATURES)
    for found in words:
        frequency_F[list({bucket % FEATURES for bucket in found})] += 1
    return np.log((1 + len(words)) / (1 + frequency_F))


def _vectors(words: Sequence[Counter[int]], idf_F: np.ndarray) -> np.ndarray:
    """Unit vectors in whole numbers, fp32 ``[N, F]``.  A bit of the hash is the sign, so that collisions cancel on average."""
    X_NF = np.zeros((len(words), FEATURES))
    for i, found in enumerate(words):
        buckets = np.fromiter(found, np.int64, len(found))
        counts = np.fromiter(found.values(), np.float64, len(found))
        np.add.at(X_NF[i], buckets % FEATURES, np.where(buckets >> 31, 1.0, -1.0) * (1 + np.log(counts)))
    return _whole(X_NF * idf_F)


def _whole(X_NF: np.ndarray) -> np.ndarray:
    X_NF = X_NF.astype(np.float64)
    length_N1 = np.sqrt((X_NF * X_NF).sum(1, keepdims=True))
    return np.rint(X_NF * LEVELS / np.where(length_N1 > 0, length_N1, 1)).astype(np.float32)


def _cluster(X_NF: np.ndarray, count: int, rng: np.random.Generator) -> tuple[float, np.ndarray]:
    """The summed similarity of one run, and its centres ``[K, F]``."""
    centres_KF = X_NF[[int(rng.integers(len(X_NF)))]]
    while len(centres_KF) < count:
        far_N = np.maximum(LEVELS**2 - (X_NF @ centres_KF.T).max(1).astype(np.float64), 0)
        total = far_N.cumsum()
        chosen = int(np.searchsorted(total, rng.random() * total[-1], side="right")) if total[-1] > 0 else len(centres_KF)
        centres_KF = np.concatenate([centres_KF, X_NF[[min(chosen, len(X_NF) - 1)]]])
    group_N = (X_NF @ centres_KF.T).argmax(1)
    for _ in range(ROUNDS):
        member_KN = (group_N == np.arange(count)[:, None]).astype(np.float32)
        # Sums of whole numbers below 2**24: exact.  A centre that lost all its members stays.
        moved_KF = _whole(member_KN @ X_NF)
        centres_KF = np.where(member_KN.sum(1, keepdims=True) > 0, moved_KF, centres_KF)
        again_N = (X_NF @ centres_KF.T).argmax(1)
        if (again_N == group_N).all():
            break
        group_N = again_N
    return float((X_NF @ centres_KF.T).max(1).astype(np.float64).sum()), centres_KF
