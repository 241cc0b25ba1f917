"""Tokens of one source and side on disk, in the order of the source, before they are mixed."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import numpy as np


class Scratch:
    """Documents are added one by one; after :meth:`close` their tokens are memory-mapped."""

    tokens: np.ndarray
    """All tokens, one document after the other."""
    mask: np.ndarray | None
    """uint8, 1 where the token counts as a target; None where all do."""
    ends: np.ndarray
    """int64 [N+1]: document ``i`` is tokens ``ends[i] … ends[i + 1]``."""

    def __init__(self, folder: Path, dtype: np.dtype, *, made_up: bool):
        folder.mkdir(parents=True)
        self.made_up = made_up
        self.num_tokens = 0
        self.hashes = array("Q")
        self.names_path = folder / "names.jsonl"
        self._ends = array("q", [0])
        self._dtype = dtype
        self._folder = folder
        # Open while documents come in, over many calls: closed by close().
        self._tokens = open(folder / "tokens.bin", "wb")  # noqa: SIM115
        self._mask = open(folder / "mask.bin", "wb") if made_up else None  # noqa: SIM115
        self._names = open(self.names_path, "w", encoding="utf-8")  # noqa: SIM115

    def add(self, ids: Any, hashed: int, name: str, counted: np.ndarray | None = None) -> None:
        """Append one document; ``counted`` (bool ``[T]``) belongs to made-up ones."""
        self._tokens.write(np.asarray(ids, dtype=self._dtype).tobytes())
        if self._mask is not None and counted is not None:
            self._mask.write(counted.astype(np.uint8).tobytes())
        self.num_tokens += len(ids)
        self._ends.append(self.num_tokens)
        self.hashes.append(hashed)
        self._names.write(json.dumps(name) + "\n")

    def close(self) -> None:
        """No more documents."""
        for file in (self._tokens, self._mask, self._names):
            if file is not None:
                file.close()
        self.ends = np.frombuffer(self._ends, dtype=np.int64)
        self.tokens = _mapped(self._folder / "tokens.bin", self._dtype)
        self.mask = _mapped(self._folder / "mask.bin", np.dtype(np.uint8)) if self.made_up else None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [N]."""
        return np.diff(self.ends)


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
