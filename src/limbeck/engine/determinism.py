"""Seeds, random states and deterministic kernels.

Every random stream has a seed of its own, derived from the run's seed, what it is for and the rank; whatever must not move the
training's stream (validation, saving, logging) runs inside :func:`untouched_rng`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


def derive_seed(seed: int, purpose: str, rank: int = 0) -> int:
    """A 63-bit seed for one purpose and rank; stable across processes and Python versions."""
    digest = hashlib.sha256(f"{seed}:{purpose}:{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators (torch's on every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every global generator's state as tensors (torch) and JSON values (Python, numpy): nothing that needs pickle."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    values = {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
    }
    return tensors, values


def set_rng_state(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Restore what :func:`rng_state` returned: ``tensors`` of any shape, as torch made them, and JSON values."""
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = values["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))


@contextlib.contextmanager
def untouched_rng() -> Iterator[None]:
    """Whatever happens inside leaves the global generators as they were."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(*state)


@contextlib.contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Deterministic kernels while inside, if ``enabled``; the process's own settings come back afterwards."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    fill = torch.utils.deterministic.fill_uninitialized_memory
    if enabled:
        # cuBLAS reads it when its handle is made; a value set by the user is left alone.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        # Filling every fresh tensor with NaN finds bugs but costs a memory pass each; no result depends on it.
        torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        torch.utils.deterministic.fill_uninitialized_memory = fill
