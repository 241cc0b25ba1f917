"""What a stage gets to work with: its options, its folder, and where the artefacts of other stages lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from limbeck.config.base import From
from limbeck.config.parts.stages import DataOptions, StageOptions, TrainTokenizer
from limbeck.config.recipe import Recipe
from limbeck.engine.console import Counter
from limbeck.engine.parallel import World
from limbeck.errors import DataError, RunError
from limbeck.models.loading import resolve_source
from limbeck.stages.folder import StageFolder

Say = Callable[[Any], None]
"""Takes a line of text, or a rich table."""


@dataclass
class StageContext:
    """One stage of one run."""

    recipe: Recipe
    name: str
    options: Any
    folder: Path
    run_dir: Path
    recipe_dir: Path
    world: World
    say: Say = print
    console: Console | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """What the stage wants to have noted in its ``stage.json``."""
    place: str = ""
    """Where the stage stands in this start, ``stage 2 of 5``."""

    def stage_options(self, name: str) -> StageOptions:
        """Options of another stage of the recipe."""
        return self.recipe.stages[name]

    def artefact(self, stage: str, kind: str) -> Path:
        """The artefact directory of a finished stage (``model``, ``data`` ...)."""
        path = StageFolder(self.run_dir / stage).path / kind
        if not path.is_dir():
            raise RunError(
                f"stage '{self.name}' needs {kind}/ of stage '{stage}', and {path} is not there: run stage '{stage}' first"
            )
        return path

    def locate(self, source: str | From) -> str:
        """A model or tokenizer source as a folder or hub name; ``{from: stage}`` is that stage's model, tokenizer or
        ranking."""
        if isinstance(source, From):
            kind = self.stage_options(source.from_).kind
            if kind == "prepare":
                return str(self.artefact(source.from_, "data") / "tokenizer")
            if kind == "rank_layers":
                return str(self.artefact(source.from_, "ranking") / "ranking.json")
            return str(self.artefact(source.from_, "model"))
        return resolve_source(source, self.recipe_dir)

    def data(self, data: DataOptions | From) -> tuple[Path, DataOptions]:
        """The folder of prepared text, preparing it if it is not there, and its options."""
        from limbeck.data.prepare import content_key, prepare

        if isinstance(data, From):
            stage: Any = self.stage_options(data.from_)
            if stage.kind == "prepare":
                return self.artefact(data.from_, "data"), stage.data
            if stage.kind in ("train", "capture"):
                return self.data(stage.data)
            raise DataError(
                f"stage '{self.name}': data.from names stage '{data.from_}' of kind '{stage.kind}', which has no data; name a prepare, train or capture stage"
            )
        tokenizer = None if isinstance(data.tokenizer, TrainTokenizer) else self.locate(data.tokenizer)
        folder = self.run_dir / "data" / content_key(data, tokenizer=tokenizer, base_dir=self.recipe_dir)
        self.once(lambda: prepare(data, folder, tokenizer=tokenizer, base_dir=self.recipe_dir, progress=self.say))
        return folder, data

    def lineage(self, stage: str) -> list[str]:
        """The train stages whose weights a train stage's student goes on from, nearest first."""
        student: Any = getattr(self.stage_options(stage), "student", None)
        if student is None:
            return []
        before = student.base.from_ if isinstance(student.base, From) else student.from_
        return [] if before is None else [before, *self.lineage(before)]

    def check_unseen(self, stage: str, folder: Path) -> None:
        """Refuse a held-out text of which the student of ``stage`` met documents in training, there or in an earlier stage."""
        from limbeck.data.dataset import check_disjoint

        for seen in [stage, *self.lineage(stage)]:
            trained: Any = self.stage_options(seen)
            check_disjoint(self.data(trained.data)[0], folder)

    def counting(self, unit: str, total: int | None = None) -> Counter:
        """To be entered around something long that is not training: shows how many of ``total`` are done, as they are added."""
        return Counter(self.say, self.console, self.name, unit=unit, total=total, place=self.place)

    def once(self, work: Callable[[], Any]) -> None:
        """Do something on the first rank while the others wait."""
        if self.world.rank == 0:
            work()
        self.world.barrier()
