"""A terminal for tests: a pseudo-terminal with an emulator at its other end, and processes to run in it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TERMINAL = {"TERM": "xterm-256color"}
PATIENCE = 120.0
"""Seconds in which something must have happened, on however slow a machine."""


class Emulator:
    """What a terminal shows: enough of one for the sequences of a live view, with lines that are wrapped anew when it is resized."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.lines: list[str] = [""]
        """All rows ever, the last ``height`` of which are on the screen."""
        self.wraps: list[bool] = [False]
        self.at = (0, 0)
        self.cursor = True
        self._rest = ""

    def feed(self, text: str) -> None:
        text, self._rest = self._rest + text, ""
        for found in re.finditer(r"\x1b\[([?0-9;]*)([A-Za-z])|\x1b.*$|.", text, re.DOTALL):
            if found[2]:
                self._control(found[1], found[2])
            elif found[0].startswith("\x1b"):
                self._rest = found[0]
            else:
                self._put(found[0])

    def _control(self, numbers: str, word: str) -> None:
        y, x = self.at
        if word == "A":
            self.at = max(len(self.lines) - self.height, 0, y - int(numbers or 1)), x
        elif word == "K":
            assert numbers == "2", numbers
            self.lines[y], self.wraps[y] = "", False
        elif numbers == "?25":
            self.cursor = word == "h"
        else:
            assert word == "m", (numbers, word)

    def _put(self, character: str) -> None:
        y, x = self.at
        if character == "\r":
            self.at = y, 0
        elif character == "\n":
            self._down(wrapped=False)
        else:
            assert character.isprintable(), repr(character)
            if x == self.width:
                self._down(wrapped=True)
                y, x = self.at[0], 0
            self.lines[y] = self.lines[y].ljust(x)[:x] + character + self.lines[y][x + 1 :]
            self.at = y, x + 1

    def _down(self, *, wrapped: bool) -> None:
        y, x = self.at
        self.wraps[y] = wrapped
        if y + 1 == len(self.lines):
            self.lines.append("")
            self.wraps.append(False)
        self.at = y + 1, 0 if wrapped else x

    def resize(self, width: int, height: int) -> None:
        """As terminals do: a line that is too long goes on in the next row, and comes back."""
        whole: list[str] = []
        joined, cursor = "", (0, self.at[1])
        for y, (line, wrapped) in enumerate(zip(self.lines, self.wraps, strict=True)):
            if y == self.at[0]:
                cursor = len(whole), len(joined) + self.at[1]
            joined += line
            if not wrapped:
                whole.append(joined)
                joined = ""
        self.width, self.height = width, height
        self.lines, self.wraps = [], []
        for number, line in enumerate(whole):
            if number == cursor[0]:
                self.at = len(self.lines) + max(0, cursor[1] - 1) // width, cursor[1] - max(0, cursor[1] - 1) // width * width
            pieces = [line[i : i + width] for i in range(0, len(line), width)] or [""]
            self.lines += pieces
            self.wraps += [True] * (len(pieces) - 1) + [False]
        # A screen with fewer rows loses empty ones below the cursor first.
        while len(self.lines) > self.at[0] + 1 and not self.lines[-1]:
            del self.lines[-1], self.wraps[-1]

    def text(self) -> list[str]:
        """Everything, long lines whole again."""
        return "".join(line + ("" if wrapped else "\n") for line, wrapped in zip(self.lines, self.wraps, strict=True)).rstrip("\n").split("\n")


class Terminal:
    """A pseudo-terminal with an emulator at its other end."""

    def __init__(self, width: int, height: int):
        self.outer, self.inner = pty.openpty()
        self.seen = ""
        self.emulator = Emulator(width, height)
        self.lock = threading.Lock()
        self._closing = threading.Event()
        self.size(width, height)
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def size(self, width: int, height: int) -> None:
        with self.lock:
            fcntl.ioctl(self.inner, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
            self.emulator.resize(width, height)

    def _read(self) -> None:
        held = b""
        while not self._closing.is_set():
            if not select.select([self.outer], [], [], 0.05)[0]:
                continue
            with self.lock:
                try:
                    held += os.read(self.outer, 65536)
                except OSError:  # closed at the other end
                    return
                text = held.decode(errors="ignore") if held[-1] < 128 else held.rpartition(b"\x1b")[0].decode(errors="ignore")
                held = held[len(text.encode()) :]
                self.seen += text
                self.emulator.feed(text)

    def wait(self, promise: Callable[[Emulator], bool]) -> None:
        """Until the screen shows what is promised."""
        end = time.monotonic() + PATIENCE
        while True:
            with self.lock:
                if promise(self.emulator):
                    return
                assert time.monotonic() < end, "\n".join(self.emulator.text())
            time.sleep(0.01)

    def shows(self, word: str, times: int = 1) -> None:
        self.wait(lambda emulator: "\n".join(emulator.text()).count(word) == times)

    def close(self) -> None:
        self._closing.set()
        self._reading.join()
        os.close(self.outer)


def child(script: str, *words: str, **options: Any) -> subprocess.Popen[str]:
    """A script in a process of its own, with a terminal's name and without what would say more about one."""
    code = f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}, {str(ROOT / 'src')!r}]\n" + textwrap.dedent(script)
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    environment |= {"OMP_NUM_THREADS": "1", **TERMINAL, **options.pop("env", {})}
    return subprocess.Popen([sys.executable, "-c", code, *words], env=environment, text=True, **options)
