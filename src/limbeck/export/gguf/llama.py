"""A file in llama.cpp, in a process of its own: llama.cpp ends its process at what it cannot compute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import ModelError, RunError
from limbeck.export.gguf import llama_child

_LAST = 1000


def check_installed() -> None:
    """Raise :class:`ModelError` that says how to get llama.cpp's wheel, where it is missing."""
    if find_spec("xllamacpp") is None:
        raise ModelError("checking a GGUF file needs llama.cpp: pip install 'limbeck[verify]' (its prebuilt wheel `xllamacpp`)")


class Llama:
    """A loaded file; a context manager that ends the process."""

    def __init__(self, path: Path, *, context: int):
        check_installed()
        self._path = path
        # The process outlives this call; its messages go to a file, which never fills up as a pipe would.
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115
        self._child = subprocess.Popen(
            [sys.executable, llama_child.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            text=True,
            encoding="utf-8",
        )
        try:
            self._ask("load", path=str(path), context=context)
        except RunError:
            self.close()
            raise

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._messages):
            if stream is not None:
                stream.close()

    def log_probabilities(self, ids: list[int], vocabulary: int, whole: int) -> Tensor:
        """``log p(next token | ids)`` from a clean cache, fp32 ``[V]``; ``whole`` is any token of whole characters."""
        listed = torch.tensor(self._ask("probabilities", ids=ids, vocabulary=vocabulary, whole=whole), dtype=torch.float64)
        found = torch.full((vocabulary,), float("nan"))
        found[listed[:, 0].long()] = listed[:, 1].float()
        return found

    def tokens(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text, with what the tokenizer puts before it if ``special``; names of special tokens inside are text."""
        return self._ask("tokens", text=text, special=special)

    def _ask(self, kind: str, **question: Any) -> Any:
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps({"kind": kind, **question}) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RunError(f"{self._path}: llama.cpp ended its process at this file: {self._said() or 'it said nothing'}")
        reply = json.loads(line)
        if "error" in reply:
            raise RunError(f"{self._path}: llama.cpp cannot {kind} ({reply['error']}){': ' + self._said() if kind == 'load' else ''}")
        return reply["answer"]

    def _said(self) -> str:
        """The end of what llama.cpp wrote."""
        self._messages.seek(0)
        return self._messages.read()[-_LAST:].decode("utf-8", "replace").strip()
