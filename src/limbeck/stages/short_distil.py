"""The short distillation of one candidate: some layers softmax again, the rest mixers, scored at equal steps of the way."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from limbeck.config.parts.objectives import OBJECTIVES
from limbeck.config.parts.stages import ShortDistilOptions, StudentOptions
from limbeck.config.parts.teachers import TEACHERS, LocalTeacherOptions
from limbeck.data.dataset import TokenRows
from limbeck.data.loader import Loader
from limbeck.engine.batches import num_steps
from limbeck.engine.loop import Trainer
from limbeck.engine.parallel import World
from limbeck.engine.step import TrainStep
from limbeck.evaluation.ranking.scoring import Score, Scoring
from limbeck.needs import HeadHidden, Need, merge_needs
from limbeck.stages.folder import read_json, write_json
from limbeck.students.selection import parameter_groups, select_trainable
from limbeck.students.student import Student, build_student
from limbeck.types import Batch, Output, Signal

Go = Callable[[list[float]], bool]
"""Whether a candidate with these scores so far goes on."""


class RememberingTeacher:
    """A local teacher that is asked once about each batch: candidates meet the same ones in the same order."""

    def __init__(self, teacher: Any, limit: int | None):
        self._teacher, self._limit = teacher, limit or 0
        self._known: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self.module = teacher.module

    def signal(self, batch: Batch, needs: Mapping[type[Need], Need]) -> Signal:
        """The final hidden states, from memory where they are known."""
        key = hashlib.sha256(batch.input_ids_BT.cpu().numpy().tobytes() + batch.documents_BT.cpu().numpy().tobytes()).hexdigest()
        if key not in self._known:
            signal = self._teacher.signal(batch, needs)
            hidden_BTD = signal[HeadHidden].hidden_BTD
            if self._bytes + hidden_BTD.nbytes > self._limit:
                return signal
            self._bytes += hidden_BTD.nbytes
            self._known[key] = hidden_BTD.cpu()
        hidden_BTD = self._known[key].to(batch.input_ids_BT.device)
        return Signal({HeadHidden: Output(hidden_BTD, self._teacher.head())})


class ShortDistil:
    """Trains candidates; each is independent of all others and goes on where it was interrupted."""

    def __init__(
        self,
        options: ShortDistilOptions,
        *,
        model_folder: Path,
        base: str,
        revision: str | None,
        rows: TokenRows,
        recall_weight: float,
        folder: Path,
        identity: str,
        seed: int,
        device: torch.device,
        console: Console | None = None,
        place: str = "",
    ):
        self.options = options
        self.model_folder, self.rows, self.folder = model_folder, rows, folder
        self.recall_weight, self.identity = recall_weight, identity
        self.seed, self.device = seed, device
        self.console, self.place = console, place
        local = LocalTeacherOptions(model=base, revision=revision)
        self._local = TEACHERS.build(local, base)
        self._teacher: RememberingTeacher | None = None
        self._kl: Any = OBJECTIVES.options("kl")()
        self.rows_per_step = max(1, round(options.loop.batch_tokens / rows.sequence))
        self.num_steps = num_steps(options.loop, Loader(rows, self.rows_per_step, seed=seed))
        self.rungs = min(options.rungs, self.num_steps)
        """Parts of the budget."""

    @property
    def teacher(self) -> RememberingTeacher:
        """Loaded when the first candidate needs it."""
        if self._teacher is None:
            self._local.load(self.device)
            self._teacher = RememberingTeacher(self._local, self.options.teacher_cache)
        return self._teacher

    def run(self, name: str, layers: Sequence[int], *, scoring: Scoring, go: Go, every_rung: bool = True) -> dict[str, Any]:
        """Distil the student with ``layers`` softmax again, and score it after each part of the budget while ``go`` says so.

        Returns:
            ``scores`` (full ones, a part each) and the tokens that were ``trained``.

        Raises:
            KeyboardInterrupt: a stop signal came; the candidate is saved.
        """
        folder = self.folder / name
        record = folder / "scores.json"
        if not record.exists() or read_json(record)["identity"] != self.identity:
            shutil.rmtree(folder, ignore_errors=True)
            write_json(record, {"identity": self.identity, "scores": [], "trained": 0})
        known = read_json(record)
        student = build_student(
            StudentOptions.model_validate({"from": "candidate", "keep": list(layers)}),
            lambda _: str(self.model_folder),
            seed=self.seed,
            dtype=torch.float32,
        ).to(self.device)
        select_trainable(student, ("all",))
        rungs = self.rungs if every_rung else 1
        for rung in range(len(known["scores"]) + 1, rungs + 1):
            # A longer budget in the same folder goes on where the last part ended.
            trained = self._train(student, folder, self.num_steps * rung // rungs, name)
            score = scoring.score(student.model)
            known = {**known, "scores": [*known["scores"], score.as_json()], "trained": trained}
            write_json(record, known)
            if not go([Score.from_json(held).mixed(self.recall_weight) for held in known["scores"]]):
                break
        return {"scores": known["scores"], "trained": known["trained"]}

    def forget(self, name: str) -> None:
        """Remove a candidate's checkpoints, once what was found is noted."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def _train(self, student: Student, folder: Path, steps: int, name: str) -> int:
        options = self.options
        every = options.loop.checkpoint_every or steps
        loop = options.loop.model_copy(update={"steps": steps, "tokens": None, "samples": None, "epochs": None, "checkpoint_every": every})
        teacher: Any = self.teacher
        trainer = Trainer(
            TrainStep(student, [OBJECTIVES.build(self._kl)], teacher, merge_needs(self._kl.needs())),
            Loader(self.rows, self.rows_per_step, seed=self.seed),
            groups=parameter_groups(student, options.optim.groups),
            optim_options=options.optim,
            loop=loop,
            folder=folder,
            seed=self.seed,
            world=World(self.device),
            console=self.console,
            title=name,
            place=self.place,
            quiet=True,
            identity={"candidate": self.identity},
        )
        result = trainer.run()
        if result.exit_reason != "finished":
            raise KeyboardInterrupt(result.exit_reason)
        return result.tokens
