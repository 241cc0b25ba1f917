"""What can stand beside other things in a comparison: a run, a stage of one, a cell of a stage's grid."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limbeck.errors import CheckpointError, RunError, did_you_mean
from limbeck.report.run import Run, Stage, read_run, read_stage


@dataclass(frozen=True)
class Entry:
    """One thing compared, with those of its run's stages that count."""

    label: str
    path: Path
    run: Run
    stages: tuple[Stage, ...]
    whole: bool
    """A run, not one stage of it."""

    @property
    def main(self) -> Stage | None:
        """What it is about: its stage; of a run, what the last evaluation judged, else the last stage that trained."""
        if not self.whole:
            return self.stages[0]
        judged = self.run.evaluated
        named = self.run.stage(judged.options.get("from", "")) if judged else None
        return named or next((stage for stage in reversed(self.stages) if stage.kind == "train"), None)

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """What the recipe says of every stage compared."""
        if self.whole:
            return dict(self.run.recipe.get("stages", {}))
        return {stage.name: stage.options for stage in self.stages}

    @property
    def evaluation(self) -> tuple[dict[str, Any], str] | None:
        """The results and the column in them that is this: its own, else the last evaluation of its stage."""
        if self.whole:
            stage = self.run.evaluated
            return (stage.evaluation, stage.evaluation["student"]) if stage and stage.evaluation else None
        stage = self.stages[0]
        if stage.evaluation:
            return stage.evaluation, stage.evaluation["student"]
        if self.cell:
            return None
        found = [other.evaluation for other in self.run.stages if other.evaluation and stage.name in other.evaluation["models"]]
        return (found[-1], stage.name) if found else None

    @property
    def cell(self) -> bool:
        """One cell of a grid: evaluations of its run are not about it."""
        return self.path.parent.name == "grid"


def read_entries(paths: Sequence[Path]) -> list[Entry]:
    """What the paths name; a stage with a grid stands for all of its cells.

    Raises:
        CheckpointError: a path that is none of these.
        RunError: fewer than two things, or one of them twice.
    """
    found = [entry for path in paths for entry in _read(path.resolve())]
    for i, entry in enumerate(found):
        if entry.path in [other.path for other in found[:i]]:
            raise RunError(f"{entry.path}: is named twice: name two different runs, stages (RUN/STAGE) or cells (RUN/STAGE/grid/CELL)")
    if len(found) < 2:
        raise RunError(f"{paths[0] if paths else 'nothing'}: is one thing, and a comparison needs two: name another, or see this one by `limbeck report`")
    return [replace(entry, label=label) for entry, label in zip(found, _labels([entry.path for entry in found]), strict=True)]


def narrowed(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """Entries of one kind, and what to say of it.

    Beside single stages a run is its stage of the same name, else its main one; so are runs that have no stage's name in common.
    """
    names = [entry.stages[0].name for entry in entries if not entry.whole]
    if len(names) == len(entries) or (not names and _share_stages(entries)):
        return list(entries), []
    out, notes = [], []
    for entry in entries:
        if entry.whole:
            stage = next((stage for name in names if (stage := entry.run.stage(name))), None) or entry.main
            if stage is None:
                if not names:
                    return list(entries), ["These runs have no stage of the same name, and not all of them have trained one."]
                raise RunError(f"{entry.path}: this run has no stage to put beside {names[0]!r}: name its stage as RUN/STAGE")
            notes.append(f"{entry.label} is a whole run and is compared by its stage {stage.name}.")
            entry = replace(entry, stages=(stage,), whole=False)
        out.append(entry)
    return out, notes


def _share_stages(entries: Sequence[Entry]) -> bool:
    names = [stage.name for entry in entries for stage in entry.stages]
    return len(set(names)) < len(names)


def _read(path: Path) -> Iterator[Entry]:
    if (path / "recipe.json").exists():
        run = read_run(path)
        yield Entry(run.name, path, run, tuple(run.stages), True)
        return
    cell = path.parent.name == "grid"
    run_dir = path.parents[2] if cell and len(path.parents) > 2 else path.parent
    if not (path / "stage.json").exists() or not (run_dir / "recipe.json").exists():
        raise CheckpointError(f"{path}: {_strange(path)}")
    run = read_run(run_dir)
    # A folder that a later recipe set aside is a stage too, though the run does not count it any more.
    stage = (None if cell else run.stage(path.name)) or read_stage(path, path.parents[1].name if cell else path.name)
    assert stage is not None
    cells = _cells(stage)
    for folder in cells:
        part = read_stage(folder, stage.name)
        if part is not None:
            yield Entry(folder.name, folder, run, (part,), False)
    if not cells:
        yield Entry(path.name, path, run, (stage,), False)


def _cells(stage: Stage) -> list[Path]:
    """Folders of a grid's cells, in the order of its product."""
    grid, folder = stage.options.get("grid") or {}, stage.folder
    if not grid or folder is None or not (folder / "grid").is_dir():
        return []
    found = {path.name: path for path in sorted((folder / "grid").iterdir()) if (path / "stage.json").exists()}
    names = [
        ",".join(f"{path.rsplit('.', 1)[-1]}={value}" for path, value in zip(grid, values, strict=True)).replace("/", "_")
        for values in itertools.product(*grid.values())
    ]
    return [found[name] for name in names if name in found]


def _strange(path: Path) -> str:
    """Why a path is nothing to compare, and what is near it."""
    if path.exists():
        return (
            "is neither a run (no recipe.json), nor a stage of one or a cell of its grid (no stage.json): name a folder that `limbeck run` made, "
            "or a stage in it"
        )
    beside = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    known = [other.name for other in beside if (other / "stage.json").exists() or (other / "recipe.json").exists()]
    near = did_you_mean(path.name, known) or (f"; there are {', '.join(known)}" if known else "")
    return f"is not there{near}: name a run, RUN/STAGE or RUN/STAGE/grid/CELL"


def _labels(paths: Sequence[Path]) -> list[str]:
    """Each path without the folders that all of them are in, and without the word `grid`."""
    parents = [path.parent.parts for path in paths]
    same = next((i for i, parts in enumerate(zip(*parents, strict=False)) if len(set(parts)) > 1), min(map(len, parents)))
    short = ["/".join(part for part in path.parts[same:] if part != "grid") for path in paths]
    return short if len(set(short)) == len(short) else ["/".join(path.parts[same:]) for path in paths]
