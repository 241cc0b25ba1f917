"""What a run was made with: versions, code, machine, and the command that started it, without secrets."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import limbeck
from limbeck.config.redact import redacted_command

_PATIENCE = 5
"""Seconds for git: a slow disk must not hold a start."""


def surroundings(device: torch.device) -> dict[str, Any]:
    """Facts of one start, for ``environment.json``; the commit is left out where the code is not that of a git checkout."""
    versions = {"limbeck": limbeck.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "safetensors", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    facts = {
        "versions": versions,
        "machine": platform.platform(),
        "device": device_words(device),
        "command": redacted_command(["limbeck", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    commit = code_commit(Path(limbeck.__file__).parent)
    return facts if commit is None else {**facts, "commit": commit}


def device_words(device: torch.device) -> str:
    """What computes: ``2 x NVIDIA H200``, or ``CPU, 2 threads``."""
    if device.type == "cuda":
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        return f"{ranks} x {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{device.type.upper()}, {threads} thread{'s' * (threads != 1)}"


def code_commit(package: Path) -> str | None:
    """The commit of the checkout that a package's code is tracked in, with ``+changes`` where it differs from it; None where there is none."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, timeout=_PATIENCE)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A package that was installed below somebody's repository is none of its files.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no", "--", ".")
    return commit and f"{commit}{'+changes' if changes else ''}"
