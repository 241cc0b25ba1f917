"""The notebooks of docs/ run, and what is committed is what they give: the same cells, outputs of the same form, the same findings."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from tools.notebooks import NOTEBOOKS, executed

_PNG = b"\x89PNG\r\n\x1a\n"


def text(notebook: NotebookNode) -> str:
    """What the cells printed, and their tables."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text") or output.data.get("text/markdown", "") for output in outputs)


def form(notebook: NotebookNode) -> list[list[tuple[str, ...]]]:
    """What kind of outputs each cell has."""
    return [
        [(output.output_type, *sorted(output.get("data", {"text": ""}))) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def table(notebook: NotebookNode) -> dict[str, list[str]]:
    """Rows of the first table by their name."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text(notebook).splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in rows[1:]}


def hybrid_findings(notebook: NotebookNode) -> None:
    """Distilling has closed most of the gap that copied weights leave, with less cache, and the export is the student."""
    rows = table(notebook)
    teacher, copied, student = (float(rows[name][0]) for name in ("teacher", "copy_init", "distil"))
    assert teacher < student < copied
    assert float(rows["distil"][1]) < 0.5 * float(rows["copy_init"][1])
    found = re.search(r"closed (\d+)% of the gap", text(notebook))
    assert found and int(found[1]) >= 50
    caches = re.findall(r"([\d.]+) MiB of the teacher, ([\d.]+) MiB of the student", text(notebook))
    assert len(caches) == 2 and all(float(student) < float(teacher) for teacher, student in caches)
    assert "logits equal those of the run's own model: True" in text(notebook)
    assert "did you mean 'tokens'" in text(notebook) and "did you mean 'bfloat16'" in text(notebook)


def generator_findings(notebook: NotebookNode) -> None:
    """In every column of losses the LoRA that was written from that convention is the lowest, and every LoRA is better than the base."""
    rows = table(notebook)
    names = [name for name in rows if name.startswith("LoRA from")]
    assert len(names) == 3
    for column, name in enumerate(names):
        bold = [row for row, cells in rows.items() if cells[column].startswith("**")]
        assert bold == [name], (column, rows)
        assert float(rows[name][column].strip("*")) < float(rows["the base alone"][column])
    matches = re.search(r"^query +(\w+) ", text(notebook), re.MULTILINE)
    assert matches and matches[1] == "camel"


FINDINGS: dict[str, Callable[[NotebookNode], None]] = {"hybrid": hybrid_findings, "lora_generator": generator_findings}


def test_every_notebook_is_looked_at() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(FINDINGS)


@pytest.mark.parametrize("name", FINDINGS)
def test_what_is_committed_is_what_the_notebook_gives(name: str, tmp_path: Path) -> None:
    path = NOTEBOOKS / f"{name}.ipynb"
    committed = nbformat.read(path, as_version=4)
    assert not re.search(r"(^|\s)/\w+/", text(committed)), "a path of one machine"
    FINDINGS[name](committed)
    outputs = [output for cell in committed.cells if cell.cell_type == "code" for output in cell.outputs]
    figures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert figures and all(base64.b64decode(figure).startswith(_PNG) for figure in figures)
    found = executed(path, tmp_path)
    assert [cell.source for cell in found.cells] == [cell.source for cell in committed.cells]
    assert form(found) == form(committed), f"{path.name} gives other outputs than are committed: make notebooks"
    FINDINGS[name](found)
