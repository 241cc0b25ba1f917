"""Memory in use."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch


def memory_bytes(device: torch.device) -> int:
    """Peak device memory on CUDA, the process's resident memory elsewhere, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_memory(device: torch.device) -> None:
    """Give freed memory back: a GPU's to its driver, a CPU's to the system, where the C library can be asked to (glibc).

    Blocks of ever-changing sizes (the number of valid tokens moves) fragment its heap: a run on a CPU otherwise grows by some
    megabytes a step.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
