"""The train stage: data, student, teacher and objectives put together for the one loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from limbeck.config.parts.objectives import OBJECTIVES
from limbeck.config.parts.stages import StudentOptions, TrainStageOptions
from limbeck.config.parts.teachers import TEACHERS
from limbeck.data.dataset import TokenRows
from limbeck.data.loader import Loader
from limbeck.engine.loop import Trainer, TrainResult
from limbeck.engine.parallel import full_state_dict
from limbeck.engine.step import StreamingTrainStep, TrainStep
from limbeck.errors import RunError
from limbeck.models.loading import load_tokenizer
from limbeck.models.vocabulary import check_vocabulary, shared_ids
from limbeck.needs import AttentionStream, merge_needs
from limbeck.stages.calibrating import calibrate
from limbeck.stages.context import StageContext
from limbeck.stages.folder import digest
from limbeck.stages.teaching import build_teacher, check_teacher_vocabulary, tell_domains
from limbeck.students.selection import parameter_groups, select_trainable
from limbeck.students.stochastic_depth import skip_attention
from limbeck.students.student import Student, build_student


class TrainStage:
    """Writes ``model/``."""

    def __init__(self, context: StageContext):
        self.context = context
        self.options: TrainStageOptions = context.options

    def run(self) -> None:
        """Train up to the budget and save the student; an interrupted run goes on from its newest checkpoint."""
        context, options = self.context, self.options
        folder, data = context.data(options.data)
        rows = TokenRows(folder, "train")
        held_out = TokenRows(folder, "held_out") if data.held_out else None
        context.check_unseen(context.name, folder)
        tokenizer_source = str(folder / "tokenizer")

        dtype = torch.float64 if options.loop.precision == "float64" else torch.float32
        device = context.world.device
        student = student_of(context, options.student, seed=options.seed, dtype=dtype).to(device)
        if options.student.skip_attention:
            skip_attention(student.model, options.student.skip_attention)
        tokenizer = load_tokenizer(tokenizer_source)
        check_vocabulary(tokenizer, student.model, who="the student")
        teacher = self._teacher(student, tokenizer)
        try:
            result = self._train(student, teacher, rows, held_out, tokenizer)
        finally:
            getattr(teacher, "close", lambda: None)()
        context.facts["result"] = {"loss": result.loss, "tokens": result.tokens, "steps": result.steps}
        if result.exit_reason != "finished":
            raise KeyboardInterrupt(result.exit_reason)
        state = full_state_dict(student.model)
        context.once(lambda: student.save(context.folder / "model", tokenizer_source=tokenizer_source, state_dict=state))

    def _train(self, student: Student, teacher: Any, rows: TokenRows, held_out: TokenRows | None, tokenizer: Any) -> TrainResult:
        context, options = self.context, self.options
        if teacher is not None:
            teacher.load(context.world.device)
            check_teacher_vocabulary(teacher, tokenizer)
            tell_domains(teacher, rows.info.domains)
            if hasattr(teacher, "num_ids") and teacher.module is not None:
                # Rows that only one of two padded heads has are masked.
                teacher.num_ids = student.num_ids = shared_ids(tokenizer, student.model, teacher.module)
            for line in getattr(teacher, "summary", ()):
                context.say(f"  {line}")
            calibrate(context, student, teacher, rows)
        step = self._step(student, teacher)
        groups = parameter_groups(student, options.optim.groups)

        rows_per_step = max(1, round(options.loop.batch_tokens / rows.sequence))
        loader = Loader(rows, rows_per_step, seed=options.seed, rank=context.world.rank, world=context.world.size)
        context.say(
            f"  {sum(p.numel() for p in student.parameters()) / 1e6:.2f}M parameters, "
            f"{sum(p.numel() for _, group in groups for _, p in group) / 1e6:.2f}M train; "
            f"{rows.num_tokens / 1e6:.2f}M tokens, {rows_per_step} rows of {rows.sequence} a step"
        )
        trainer = Trainer(
            step,
            loader,
            groups=groups,
            optim_options=options.optim,
            loop=options.loop,
            folder=context.folder,
            seed=options.seed,
            world=context.world,
            validation_rows=held_out,
            console=context.console,
            title=context.name,
            identity={"data": rows.folder.name, "teacher": digest(teacher.fingerprint()) if teacher else "none"},
        )
        return trainer.run()

    def _step(self, student: Student, teacher: Any) -> TrainStep:
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

    def _teacher(self, student: Student, tokenizer: Any) -> Any:
        """The teacher, not yet loaded; None without one."""
        options = self.options.teacher
        if options is None:
            return None
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


def trained_model(context: StageContext, stage: str) -> Path:
    """The model folder of a finished train stage."""
    kind = context.stage_options(stage).kind
    if kind != "train":
        raise RunError(f"stage '{context.name}': '{stage}' is a {kind} stage and has no model; name a train stage")
    return context.artefact(stage, "model")
