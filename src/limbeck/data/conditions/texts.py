"""What a generator reads: a few texts of a condition's training side, drawn by a hash."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from limbeck.data.conditions.store import ConditionSet

SIDES = ("train", "test")
PAD = -1
"""Behind the end of a text."""
_OTHERS, _OWN, _NONE = 0, 1, 2
"""Order in which training examples are drawn: those outside the row, those in it, and places behind the last one."""


class ConditionTexts:
    """The texts of a set's conditions, S texts of at most C tokens at a time."""

    def __init__(self, conditions: ConditionSet):
        manifest = conditions.manifest
        self.num_texts, self.num_tokens = manifest.texts, manifest.tokens
        self.seed = manifest.seed
        self.fixed_NSC = np.load(conditions.folder / "reads.npy", mmap_mode="r") if manifest.form == "issue" else None
        """What is read of each condition, where that is not drawn from its examples."""
        self._with_answer = manifest.form == "prompt_answer"
        self._tokens, self._examples_E5 = conditions.tokens, conditions.examples_E5
        self._first_N, self._count_N = conditions.first_N3[:, 0], conditions.first_N3[:, 1] - conditions.first_N3[:, 0]
        self._ids_N = np.array([condition.id for condition in conditions.conditions if condition.split != "mix"])

    def of(self, ids: np.ndarray, *, draw: int = 0, seed: int | None = None) -> np.ndarray:
        """Texts of conditions by themselves, without rows: int64 ``[N, S, C]``, padded with -1."""
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        if self.fixed_NSC is not None:
            return self.fixed_NSC[ids].astype(np.int64)
        # Where a row's key has its side there is one behind the last: no row draws by the same key.
        return self.tokens(self.draw(ids, random_keys(self.seed if seed is None else seed, draw, len(SIDES), ids)))

    def draw(self, ids_B: np.ndarray, keys_B: np.ndarray, own_B2: np.ndarray | None = None) -> np.ndarray:
        """Lines of ``examples.npy``, int64 ``[B, S]``: different training examples of each condition, in an order by ``keys_B``.

        ``own_B2`` gives lines (first, behind the last) that are drawn only when the others do not suffice.
        """
        at_M = np.arange(int(self._count_N[ids_B].max(initial=self.num_texts)))
        line_BM = self._first_N[ids_B][:, None] + at_M
        rank_BM = np.full(line_BM.shape, _OTHERS, dtype=np.uint64)
        if own_B2 is not None:
            rank_BM[(line_BM >= own_B2[:, :1]) & (line_BM < own_B2[:, 1:])] = _OWN
        rank_BM[at_M >= self._count_N[ids_B][:, None]] = _NONE
        order_BM = (rank_BM << np.uint64(62)) | (mixed(keys_B[:, None] ^ mixed(at_M.astype(np.uint64))) >> np.uint64(2))
        return self._first_N[ids_B][:, None] + np.argsort(order_BM, axis=1)[:, : self.num_texts]

    def tokens(self, lines: np.ndarray) -> np.ndarray:
        """What is read of examples, int64 ``[*lines, C]``, padded with -1.

        Of a prompt with its answer that are too long together, the answer keeps half of the tokens if it needs them.
        """
        start, prompt_end, end = (self._examples_E5[:, column][lines][..., None] for column in range(3))
        prompt, answer, C = prompt_end - start, end - prompt_end, self.num_tokens
        if self._with_answer:
            kept_answer = np.minimum(answer, np.maximum(C - prompt, (C + 1) // 2))
        else:
            kept_answer = np.where(prompt > 0, 0, np.minimum(answer, C))
        kept_prompt = np.minimum(prompt, C - kept_answer)
        at_C = np.arange(C)
        index = np.where(at_C < kept_prompt, start + at_C, prompt_end + at_C - kept_prompt)
        real = at_C < kept_prompt + kept_answer
        return np.where(real, self._tokens[np.where(real, index, 0)].astype(np.int64), PAD)

    def diversity(self) -> tuple[float, float, tuple[int, int]]:
        """Different sets of texts over conditions (mixes left out), how often two texts of two different conditions are the same,
        and the places of the first two conditions that read the same."""
        if self.fixed_NSC is not None:
            _, text = np.unique(self.fixed_NSC, axis=0, return_inverse=True)
            return self._alike(np.stack([np.arange(len(self._ids_N)), text.reshape(-1)], axis=1), np.ones(len(self._ids_N)))
        lines = np.concatenate([np.arange(self._first_N[i], self._first_N[i] + self._count_N[i]) for i in self._ids_N])
        place = np.repeat(np.arange(len(self._ids_N)), self._count_N[self._ids_N])
        _, text = np.unique(self.tokens(lines), axis=0, return_inverse=True)
        pairs, counts = np.unique(np.stack([place, text.reshape(-1)], axis=1), axis=0, return_counts=True)
        return self._alike(pairs, counts / self._count_N[self._ids_N][pairs[:, 0]])

    def _alike(self, pairs: np.ndarray, share: np.ndarray) -> tuple[float, float, tuple[int, int]]:
        """:meth:`diversity` from the different (condition, text) pairs, ascending, and each text's share in its condition."""
        summed = np.bincount(pairs[:, 1], weights=share)
        N = len(self._ids_N)
        alike = float((summed @ summed - share @ share) / (N * (N - 1)))

        seen: dict[bytes, int] = {}
        first: tuple[int, int] | None = None
        for number, own in enumerate(np.split(pairs[:, 1], np.flatnonzero(np.diff(pairs[:, 0])) + 1)):
            before = seen.setdefault(own.tobytes(), number)
            first = (before, number) if first is None and before != number else first
        return len(seen) / N, alike, first or (0, 0)


def mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on uint64 (Steele, Lea and Flood 2014): each bit of the result depends on every bit of ``x``."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_keys(*parts: int | np.ndarray) -> np.ndarray:
    """A uint64 hash of non-negative numbers, in their order; arrays are matched element by element."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = mixed(key ^ np.asarray(part, dtype=np.int64).astype(np.uint64))
    return key
