"""Rows of packed documents, read from disk by arithmetic."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from limbeck.data.store import SPLITS, DataInfo, read_info
from limbeck.errors import DataError
from limbeck.types import IGNORE, Batch


class TokenRows:
    """One side of prepared text as rows of ``sequence`` tokens (memory-mapped).

    Documents stand one after the other; one that crosses the end of a row goes on in the next as a piece of its own, with
    positions from 0.  The last row is padded.  Row ``r`` is tokens ``r * sequence …``: nothing is stored for each row.
    """

    def __init__(self, folder: Path, split: str, *, verify: bool = False):
        """Open ``folder``; sizes are always checked, contents with ``verify``.

        Raises:
            DataError: not prepared text, no such split, or a missing, truncated or (``verify``) altered file.
        """
        self.folder = folder = Path(folder)
        self.info: DataInfo = read_info(folder, verify=verify)
        if split not in self.info.splits:
            known = ", ".join(self.info.splits)
            raise DataError(f"{folder}: no split {split!r} here; it has {known}" + _hint(split))
        self.split = split
        self.sequence = self.info.sequence
        self.num_tokens = self.info.splits[split].tokens
        side = folder / split
        self._tokens = np.memmap(side / "tokens.bin", dtype=self.info.dtype, mode="r")
        self._mask = np.memmap(side / "mask.bin", dtype=np.uint8, mode="r") if (side / "mask.bin").exists() else None
        self._starts = np.load(side / "pieces.npy", mmap_mode="r")
        self._domains = np.load(side / "domains.npy", mmap_mode="r") if (side / "domains.npy").exists() else None
        if len(self._tokens) != self.num_tokens or int(self._starts[-1]) != self.num_tokens:
            raise DataError(f"{side}: tokens.bin, pieces.npy and meta.json disagree: remove {folder} and prepare again")

    def __len__(self) -> int:
        """Number of rows."""
        return -(-self.num_tokens // self.sequence)

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The rows with these numbers, int64 ``[B, T]`` on the CPU."""
        rows = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"row {int(rows.max())} of {len(self)}")
        start_B1 = rows[:, None] * self.sequence
        at_BT = start_B1 + np.arange(self.sequence)
        real_BT = at_BT < self.num_tokens
        safe_BT = np.where(real_BT, at_BT, 0)

        piece_BT = np.searchsorted(self._starts, safe_BT, side="right") - 1
        begins_BT = np.maximum(self._starts[piece_BT], start_B1)
        begins_BT = np.where(real_BT, begins_BT, np.maximum(self.num_tokens, start_B1))
        documents_BT = np.where(real_BT, piece_BT - piece_BT[:, :1], -1)

        ids_BT = np.where(real_BT, self._tokens[safe_BT].astype(np.int64), self.info.pad)
        counts_BT = np.zeros(ids_BT.shape, dtype=bool)
        counts_BT[:, :-1] = real_BT[:, 1:] & (documents_BT[:, 1:] == documents_BT[:, :-1])
        if self._mask is not None:
            counts_BT[:, :-1] &= self._mask[safe_BT[:, 1:]] != 0
        labels_BT = np.full_like(ids_BT, IGNORE)
        labels_BT[:, :-1] = np.where(counts_BT[:, :-1], ids_BT[:, 1:], IGNORE)
        arrays = [ids_BT, labels_BT, at_BT - begins_BT, documents_BT]
        domains_BT = None if self._domains is None else _tensor(np.where(real_BT, self._domains[piece_BT], 0))
        ids, labels, positions, documents = map(_tensor, arrays)
        return Batch(ids, labels, positions, documents, domains_BT=domains_BT)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))


def _hint(split: str) -> str:
    return ": nothing was held out; set data.held_out above 0" if split == "held_out" else f" (splits are {', '.join(SPLITS)})"


def check_disjoint(train_folder: Path, held_out_folder: Path) -> None:
    """Refuse to train on one's own validation documents (compared by the hash of their text).

    Raises:
        DataError: with the number of common documents and the names of the first.
    """
    for folder in (train_folder, held_out_folder):
        read_info(Path(folder))
    train_side, held_out_side = Path(train_folder) / "train", Path(held_out_folder) / "held_out"
    if not held_out_side.is_dir():
        return
    train, held_out = np.load(train_side / "hashes.npy"), np.load(held_out_side / "hashes.npy")
    common = np.flatnonzero(np.isin(held_out, train))
    if len(common):
        with open(held_out_side / "names.jsonl", encoding="utf-8") as file:
            first = set(common[:3].tolist())
            names = [json.loads(line) for i, line in enumerate(itertools.islice(file, max(first) + 1)) if i in first]
        raise DataError(
            f"{len(common)} of {len(held_out)} held-out documents of {held_out_folder} are also in the training text of "
            f"{train_folder} ({', '.join(names)}{', …' if len(common) > 3 else ''}): Limbeck refuses to train on its own "
            "validation documents; prepare both from one `data` section, or evaluate on other text"
        )
