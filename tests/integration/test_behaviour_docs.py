"""The pages of docs/behaviour, read from the first to the last: every block of code in them runs, on a tiny base and made-up tasks."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import limbeck.behaviour as behaviour
from behaviour_case import write_workspace
from pages import Page

PHASES = [f"phase_{name}" for name in ("0_baseline", "1_delta", "2_dataset", "3_differentiable", "4_multitask", "5_delta_only", "6_composition")]
FILE = re.compile(r"# file: (?P<name>\S+)\n")


class Reader:
    """Does what the pages say, in one folder; a page stands on the ones before it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.done: dict[str, list[str]] = {}

    def read(self, page: str) -> list[str]:
        """Languages of the blocks that were run of a page, after all pages before it."""
        for earlier in PHASES[: PHASES.index(page) + 1]:
            if earlier not in self.done:
                self.done[earlier] = self._perform(earlier)
        return self.done[page]

    def _perform(self, page: str) -> list[str]:
        run: list[str] = []
        names: dict[str, Any] = {"__name__": page}
        shown = Page(f"behaviour/{page}.md")
        for block in shown.blocks():
            language, code, _ = block
            if language == "yaml":
                if not (named := FILE.match(code)):
                    continue
                (self.folder / named["name"]).write_text(code, encoding="utf-8")
            elif language == "console":
                for line in code.splitlines():
                    if line.startswith("$ "):
                        command(line.removeprefix("$ "))
            elif language == "python":
                exec(shown.compiled(block), names)
            else:
                raise AssertionError(f"{page}: a block of {language or 'no language'}: write yaml, console or python")
            run.append(language)
        return run


def command(line: str) -> None:
    """``limbeck ...`` as ``python -m limbeck`` runs it, without the seconds of another interpreter."""
    program, *words = shlex.split(line, comments=True)
    assert program == "limbeck", line
    before, sys.argv = sys.argv, ["limbeck", *words]
    try:
        runpy.run_module("limbeck", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert end.code in (0, None), f"{line}: exit code {end.code}"
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    folder = write_workspace(tmp_path_factory.mktemp("pages"))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        yield Reader(folder)


@pytest.mark.parametrize("page", PHASES)
def test_every_block_of_a_page_runs(reader: Reader, page: str) -> None:
    run = reader.read(page)
    assert "python" in run and len(run) >= 2


@pytest.mark.parametrize("page", ["index", *PHASES])
def test_pages_are_short_and_their_links_lead_somewhere(page: str) -> None:
    shown = Page(f"behaviour/{page}.md")
    assert shown.text.count("\n") < 120
    assert [link for link in shown.links() if not (shown.path.parent / link).exists()] == []


def test_the_index_lists_every_public_name_and_every_page() -> None:
    text = Page("behaviour/index.md").text
    assert [name for name in behaviour.__all__ if f"`{name}" not in text] == []
    assert [page for page in PHASES if f"({page}.md)" not in text] == []
