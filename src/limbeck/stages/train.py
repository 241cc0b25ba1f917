"""The train stage: data, student, teacher and objectives put together for the one loop."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from limbeck.config.parts.objectives import OBJECTIVES
from limbeck.config.parts.stages import StudentOptions, TrainStageOptions
from limbeck.config.parts.teachers import TEACHERS
from limbeck.config.redact import redacted
from limbeck.data.conditions.loaders import ConditionLoader
from limbeck.data.conditions.rows import ConditionRows
from limbeck.data.conditions.spread import SpreadRows
from limbeck.data.conditions.store import ConditionSet
from limbeck.data.dataset import TokenRows
from limbeck.data.loader import Loader
from limbeck.engine.checkpoint import FINAL
from limbeck.engine.loop import Trainer, TrainResult
from limbeck.engine.parallel import full_state_dict
from limbeck.engine.step import StreamingTrainStep, TrainStep
from limbeck.engine.trackers import Tracked, Trackers
from limbeck.errors import RunError
from limbeck.files import same_files, sha256
from limbeck.models.licence import licence_of
from limbeck.models.loading import load_tokenizer
from limbeck.models.vocabulary import check_vocabulary, shared_ids
from limbeck.needs import AttentionStream, merge_needs
from limbeck.stages.adapting import (
    build_adapters_teacher,
    build_reader,
    conditions_stage,
    measured_deltas,
    open_conditions,
    reads_conditions,
)
from limbeck.stages.calibrating import calibrate
from limbeck.stages.context import StageContext
from limbeck.stages.folder import digest
from limbeck.stages.teaching import build_teacher, check_teacher_vocabulary, tell_domains
from limbeck.students.generator.student import ConditionedStudent
from limbeck.students.selection import parameter_groups, select_trainable
from limbeck.students.stochastic_depth import skip_attention
from limbeck.students.student import Student, build_student


@dataclass(frozen=True)
class TrainingText:
    """What a stage trains and validates on."""

    rows: TokenRows | ConditionRows
    held_out: TokenRows | SpreadRows | None
    tokenizer: str
    identity: str
    """What a run that goes on must find again."""
    domains: tuple[str, ...] = ()
    conditions: ConditionSet | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens to train on."""
        return self.rows.num_tokens


class TrainStage:
    """Writes ``model/``."""

    def __init__(self, context: StageContext):
        self.context = context
        self.options: TrainStageOptions = context.options

    def run(self) -> None:
        """Train up to the budget and save the student; an interrupted run goes on from its newest checkpoint."""
        context, options = self.context, self.options
        text = self._text()
        student = self._student(text)
        if context.world.mesh is None or not isinstance(student, ConditionedStudent):
            # A frozen base may be larger than one device: sharding moves it there unit by unit.
            student = student.to(context.world.device)
        for line in getattr(student, "notes", ()):
            context.say(f"  {line}")
        if options.student.skip_attention:
            skip_attention(student.model, options.student.skip_attention)
        tokenizer = load_tokenizer(text.tokenizer)
        check_vocabulary(tokenizer, student.model, who="the student")
        teacher = self._teacher(student, tokenizer, text)
        try:
            result = self._train(student, teacher, text, tokenizer)
        finally:
            getattr(teacher, "close", lambda: None)()
        held_out = {f"held_out/{name}": value for name, value in last_validation(context.folder / "metrics.jsonl").items()}
        context.facts["result"] = {"loss": result.loss, "tokens": result.tokens, "steps": result.steps, **held_out}
        if result.exit_reason != "finished":
            raise KeyboardInterrupt(result.exit_reason)
        context.once(lambda: same_files(checkpoint_folder(context) / FINAL / "model", context.folder / "model"))

    def _licence(self) -> dict[str, str]:
        """Of the base, where this stage names one."""
        base = self.options.student.base
        if self.context.world.rank or not isinstance(base, str):
            return {}
        return licence_of(self.context.locate(base), self.options.student.revision)

    def _text(self) -> TrainingText:
        context, options = self.context, self.options
        if (stage := conditions_stage(context, options.data)) is not None:
            conditions = open_conditions(context, stage)
            rows = conditions.rows(conditions.split("seen"))
            judged = conditions.judged()
            held_out = SpreadRows(conditions.rows(judged, "test")) if judged else None
            return TrainingText(rows, held_out, str(conditions.tokenizer), conditions.digest, conditions=conditions)
        folder, data = context.data(options.data)
        packed = TokenRows(folder, "train")
        context.check_unseen(context.name, folder)
        side = TokenRows(folder, "held_out") if data.held_out else None
        return TrainingText(packed, side, str(folder / "tokenizer"), packed.folder.name, tuple(packed.info.domains))

    def _student(self, text: TrainingText) -> Student | ConditionedStudent:
        context, options = self.context, self.options
        dtype = torch.float64 if options.loop.precision == "float64" else torch.float32
        if not reads_conditions(context, options.student):
            return student_of(context, options.student, seed=options.seed, dtype=dtype)
        if text.conditions is None:
            raise RunError(
                f"stage '{context.name}': this student reads conditions, and `data` is plain text: name a prepare_conditions or prepare_trajectories stage, "
                "`data: {from: STAGE}`"
            )
        deltas = measured_deltas(context, options.teacher)
        return build_reader(context, options.student, text.conditions, seed=options.seed, dtype=dtype, deltas=deltas)

    def _train(self, student: Any, teacher: Any, text: TrainingText, tokenizer: Any) -> TrainResult:
        context, options, rows = self.context, self.options, text.rows
        if teacher is not None:
            if options.loop.precision == "float64" and hasattr(teacher, "dtype"):
                # A check to the last digits: what runs here must not round more than the student.
                teacher.dtype = "float64"
            teacher.load(context.world.device)
            check_teacher_vocabulary(teacher, tokenizer)
            tell_domains(teacher, text.domains)
            if hasattr(teacher, "num_ids") and teacher.module is not None:
                # Rows that only one of two padded heads has are masked.
                teacher.num_ids = student.num_ids = shared_ids(tokenizer, student.model, teacher.module)
            for line in getattr(teacher, "summary", ()):
                context.say(f"  {line}")
            calibrate(context, student, teacher, rows)
        step = self._step(student, teacher)
        groups = parameter_groups(student, options.optim.groups)
        fingerprint = teacher.fingerprint() if teacher else None
        identity = {"data": text.identity, "teacher": digest(fingerprint) if fingerprint else "none"}
        origin = {"tokenizer": tokenizer_digest(text.tokenizer), "teacher_fingerprint": redacted(fingerprint), "licence": self._licence()}
        context.facts["made_from"] = {**identity, **origin}

        rows_per_step = max(1, round(options.loop.batch_tokens / rows.sequence))
        dealing: Any = ConditionLoader if isinstance(rows, ConditionRows) else Loader
        loader = dealing(rows, rows_per_step, seed=options.seed, rank=context.world.rank, world=context.world.size)
        context.say(
            f"  {sum(p.numel() for p in student.parameters()) / 1e6:.2f}M parameters, "
            f"{sum(p.numel() for _, group in groups for _, p in group) / 1e6:.2f}M train; "
            f"{text.num_tokens / 1e6:.2f}M tokens, {rows_per_step} rows of {rows.sequence} a step"
        )

        def save(folder: Path) -> None:
            """The student's model folder in a checkpoint; every rank gathers, the first one writes."""
            state = full_state_dict(student.trained)
            if context.world.rank == 0:
                student.save(folder / "model", tokenizer_source=text.tokenizer, state_dict=state)

        trainer = Trainer(
            step,
            loader,
            groups=groups,
            optim_options=options.optim,
            loop=options.loop,
            folder=context.folder,
            seed=options.seed,
            world=context.world,
            validation_rows=text.held_out,
            console=context.console,
            title=context.name,
            place=context.place,
            identity=identity,
            checkpoints=checkpoint_folder(context),
            beside_final=save,
            trackers=self._trackers(),
        )
        return trainer.run()

    def _trackers(self) -> Trackers | None:
        """What mirrors the metrics, on the first rank; a cell of a grid is a run of its own."""
        context, chosen = self.context, self.options.loop.trackers
        if not chosen or context.world.rank:
            return None
        place = context.folder.relative_to(context.run_dir).parts
        name = "/".join([context.run_dir.name, *(part for part in place if part != "grid")])
        config = redacted(self.options.model_dump(mode="json", by_alias=True))
        return Trackers(chosen, Tracked(context.folder, name, context.recipe_dir, config), context.say)

    def _step(self, student: Any, teacher: Any) -> TrainStep:
        options = self.options
        objectives = [OBJECTIVES.build(objective) for objective in options.objectives]
        needs = merge_needs(need for objective in options.objectives for need in objective.needs())
        trained = select_trainable(student, options.student.train)
        if AttentionStream not in needs:
            return TrainStep(student, objectives, teacher, needs)
        stray = [name for name in trained if student.roles.get(name) != "mixers"]
        if stray:
            raise RunError(
                f"stage '{self.context.name}': alignment trains the mixers alone, and student.train also names {stray[0]}: "
                "set `train: [mixers]`"
            )
        return StreamingTrainStep(student, objectives[0], teacher)

    def _teacher(self, student: Any, tokenizer: Any, text: TrainingText) -> Any:
        """The teacher, not yet loaded; None without one."""
        options = self.options.teacher
        if options is None:
            return None
        if options.kind == "adapters":
            if text.conditions is None or not isinstance(student, ConditionedStudent):
                raise RunError(
                    f"stage '{self.context.name}': teacher 'adapters' answers for conditions: it teaches a LoRA generator on the data of a "
                    "prepare_conditions stage"
                )
            needs = merge_needs(need for objective in self.options.objectives for need in objective.needs())
            return build_adapters_teacher(self.context, options, text.conditions, student, needs)
        if options.kind != "self":
            return build_teacher(self.context, options, num_ids=max(tokenizer.get_vocab().values()) + 1)
        if student.base_source is None:
            raise RunError(
                f"stage '{self.context.name}': teacher 'self' is the base of a student made by surgery, and this student has none: "
                "give `student.base` and `student.surgery`"
            )
        return TEACHERS.build(options, student.base_source, student.base_revision)


def student_of(context: StageContext, options: StudentOptions, *, seed: int, dtype: torch.dtype) -> Student:
    """Build the student of a train stage, with its sources located in this run."""
    return build_student(options, context.locate, seed=seed, dtype=dtype)


def checkpoint_folder(context: StageContext) -> Path:
    """Where a train stage's checkpoints lie."""
    place = getattr(context.options.loop, "checkpoints", None)
    return context.folder / "checkpoints" if place is None else context.recipe_dir / place


def trained_model(context: StageContext, stage: str) -> Path:
    """The model folder of a finished train stage."""
    kind = context.stage_options(stage).kind
    if kind != "train":
        raise RunError(f"stage '{context.name}': '{stage}' is a {kind} stage and has no model; name a train stage")
    return context.artefact(stage, "model")


def tokenizer_digest(source: str) -> str | None:
    """A short hash of a tokenizer's own file; None where it has none."""
    file = Path(source) / "tokenizer.json"
    return sha256(file)[:16] if file.exists() else None


def last_validation(metrics: Path) -> dict[str, float]:
    """The plain measures of a run's last validation (losses with their weights are left out); empty if there was none."""
    mark = "validation/"
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if mark in line]
    last = lines[-1] if lines else {}
    return {name.removeprefix(mark): value for name, value in last.items() if name.startswith(mark) and name.count("/") == 1}
