"""What the tests of the pages in docs/ share: blocks of code, the commands in them, and numbers that a page cites from results.json."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
_BLOCK = re.compile(r"^```(?P<language>\S*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_PLANNED = re.compile(r"<!-- planned by (?P<words>[^\n]+)\n(?P<lines>.*?)-->", re.DOTALL)
_CITED = re.compile(r"<!-- measured in (?P<place>\S+)\n(?P<lines>.*?)-->", re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    code: str
    lines: int
    """Lines of the page before its code, so that errors can name the page's own line."""


class Page:
    """A page of docs/, by its path from there."""

    def __init__(self, name: str):
        self.path = DOCS / name
        self.text = self.path.read_text(encoding="utf-8")

    def blocks(self, *languages: str) -> list[Block]:
        """Its fenced blocks in order, of these languages or of all."""
        found = [Block(b["language"], b["code"], self.text.count("\n", 0, b.start("code"))) for b in _BLOCK.finditer(self.text)]
        return [block for block in found if not languages or block.language in languages]

    def commands(self, *languages: str, program: str = "limbeck") -> list[list[str]]:
        """Words behind ``limbeck`` of every line that calls it, with or without a prompt; what is printed below one is left out."""
        lines = [
            line.removeprefix("$ ").removeprefix("python -m ")
            for block in self.blocks(*languages)
            for line in block.code.splitlines()
        ]
        return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{program} ")]

    def compiled(self, block: Block) -> Any:
        """A block of Python as code whose line numbers are the page's."""
        return compile("\n" * block.lines + block.code, str(self.path), "exec")

    @property
    def prose(self) -> str:
        """What a reader sees outside of fenced blocks: no comments, no code spans, no targets of links."""
        text = re.sub(r"<!--.*?-->", "", _BLOCK.sub("", self.text), flags=re.DOTALL)
        return re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`\n]*`", "", text))

    def links(self) -> list[str]:
        """Targets of its links to files, without the heading in them."""
        return [target for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", _BLOCK.sub("", self.text)) if "://" not in target]

    def cited(self) -> Iterator[Citation]:
        """Every number that a comment of the page traces to a ``results.json``.

        A line is a number, a setting and a metric, or a number and a criterion; ``0.45 3% | SETTING | kl & recall`` are two.
        """
        for comment in _CITED.finditer(self.text):
            for line in comment["lines"].strip().splitlines():
                shown, setting, *metrics = (word.strip() for word in line.split(" | "))
                for number, metric in zip(shown.split(), metrics[0].split(" & ") if metrics else [None], strict=True):
                    yield Citation(number, comment["place"], setting, metric)

    def planned(self) -> Iterator[tuple[list[str], list[str]]]:
        """What comments of the page say that ``limbeck plan`` prints: its words, and each of the texts."""
        for comment in _PLANNED.finditer(self.text):
            yield shlex.split(comment["words"]), comment["lines"].strip().splitlines()


class Citation(NamedTuple):
    """A number as a page shows it, and where it was measured: the mean of the rows of a setting (or a pattern) and a metric, or a criterion."""

    shown: str
    place: str
    setting: str
    metric: str | None
    """None: ``setting`` is the name of a criterion."""

    @property
    def value(self) -> float:
        """The number in ``results.json``, to all its digits."""
        results = json.loads((ROOT / self.place / "results.json").read_text(encoding="utf-8"))
        if self.metric is None:
            found = [c["measured"] for c in results["criteria"] if c["name"] == self.setting]
        else:
            rows = [r for r in results["rows"] if r["metric"] == self.metric]
            found = [
                r["value"]
                for r in rows
                if r["setting"] == self.setting or ("*" in self.setting and fnmatchcase(r["setting"], self.setting))
            ]
        assert found, f"{self.place}/results.json has no {self}"
        return fmean(found)

    @property
    def agrees(self) -> bool:
        """Whether the number is shown as it was measured, rounded to the digits that are shown."""
        number = self.shown.removesuffix("%")
        value = 100 * self.value if self.shown.endswith("%") else self.value
        digits = len(number.partition(".")[2])
        return abs(value - float(number)) <= 0.5000001 * 10**-digits
