"""Writes ``results.json``: what was claimed, on which machine and commit it was measured, and whether each criterion holds."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


def criterion(name: str, bound: str, measured: float, holds: bool) -> dict[str, Any]:
    """One line of ``criteria``.  One that does not hold stays, with its number."""
    return {"name": name, "bound": bound, "measured": measured, "holds": bool(holds)}


def write_results(
    folder: str | Path,
    claim: str,
    command: str,
    seeds: Sequence[int],
    rows: Sequence[Mapping[str, Any]],
    criteria: Sequence[Mapping[str, Any]],
) -> Path:
    """Write ``folder/results.json`` atomically; commit and machine are found here.  Returns its path."""
    folder = Path(folder)
    results = {
        "claim": claim,
        "command": command,
        "commit": commit(),
        "machine": machine(),
        "seeds": list(seeds),
        "rows": list(rows),
        "criteria": list(criteria),
    }
    path = folder / "results.json"
    beside = path.with_suffix(".json.part")
    beside.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)
    return path


def machine() -> dict[str, Any]:
    """Cores, devices, load and the versions that matter for a number."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "versions": versions,
    }


def commit() -> str:
    """The repository's commit, with ``+changes`` when tracked files other than results differ from it; ``unknown`` outside a repository."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)*/results.json")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
