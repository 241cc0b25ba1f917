"""How alike two sequences of words are: the Jaccard similarity of their n-grams, estimated by MinHash.

Source: Broder, "On the resemblance and containment of documents" (1997): the share of equal minima over random orders of all
n-grams is an unbiased estimate, with a standard error of ``sqrt(s (1 - s) / 128)``, at most 0.044.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from limbeck.data.documents import content_hash

PERMUTATIONS = 128
"""Random orders P of a signature."""
_CHUNK = 4096
"""N-grams hashed at a time."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""2^64 divided by the golden ratio, made odd."""


def words(text: str) -> list[str]:
    """Words in small letters."""
    return re.findall(r"\w+", text.lower())


def signature(sequence: Sequence[str], width: int) -> np.ndarray:
    """Minima of the hashes of all n-grams of ``width`` items under P orders, uint64 ``[P]``; a shorter sequence is one n-gram."""
    grams = _grams(sequence, width)
    least = np.full(PERMUTATIONS, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(grams), _CHUNK):
        least = np.minimum(least, _mixed(grams[start : start + _CHUNK, None] ^ _SEEDS_P).min(axis=0))
    return least


def alike(signatures_NP: np.ndarray, signature_P: np.ndarray) -> np.ndarray:
    """Estimated similarity of each of N signatures to one, float64 ``[N]``."""
    return np.count_nonzero(signatures_NP == signature_P, axis=-1) / PERMUTATIONS


def _grams(sequence: Sequence[str], width: int) -> np.ndarray:
    """One hash for each n-gram, the order of its items counted, uint64 ``[G]``."""
    if not sequence:
        return np.empty(0, dtype=np.uint64)
    items = np.array([content_hash(item.encode("utf-8", "surrogatepass")) for item in sequence], dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(items, min(width, len(items)))
    total = np.zeros(len(windows), dtype=np.uint64)
    for column in windows.T:
        total = _mixed(total + column)
    return np.unique(total)


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): a bijection whose every output bit hangs on every input bit."""
    values = values * _FACTOR
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_SEEDS_P = _mixed(np.arange(1, PERMUTATIONS + 1, dtype=np.uint64))
