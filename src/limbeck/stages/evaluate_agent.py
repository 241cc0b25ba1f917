"""The stage that judges a generator of LoRAs on agents' trajectories, beside the base, a static LoRA and shuffled issues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck.adapters.inject import Injector
from limbeck.adapters.spec import Adapters
from limbeck.config.parts.trajectories import EvaluateAgentStageOptions
from limbeck.data.conditions.store import ConditionSet
from limbeck.engine.precision import autocast
from limbeck.engine.step import TrainStep
from limbeck.errors import RunError
from limbeck.evaluation.adapters import BASE
from limbeck.evaluation.agent import AgentJudge, Found, lines_of, summarise
from limbeck.models.loading import load_tokenizer
from limbeck.models.vocabulary import shared_ids
from limbeck.needs import TopK
from limbeck.stages.adapting import conditions_stage, open_conditions, open_generator, static_adapter
from limbeck.stages.context import StageContext
from limbeck.stages.folder import write_json
from limbeck.stages.teaching import build_teacher, check_teacher_vocabulary
from limbeck.stages.train import trained_model
from limbeck.students.generator.student import GeneratorStudent, is_generator
from limbeck.types import Batch, TopKSignal


class EvaluateAgentStage:
    """Writes ``evaluation/agent.json``: the summary by split, and every issue's numbers."""

    def __init__(self, context: StageContext):
        self.context = context
        self.options: EvaluateAgentStageOptions = context.options

    def run(self) -> None:
        """Judge on the first rank."""
        self.context.once(self._run)

    @torch.no_grad()
    def _run(self) -> None:
        context, options = self.context, self.options
        stage = conditions_stage(context, getattr(context.stage_options(options.from_), "data", None))
        self.conditions: ConditionSet | None = open_conditions(context, stage) if stage is not None else None
        if self.conditions is None or self.conditions.manifest.form != "issue":
            raise RunError(
                f"stage '{context.name}': '{options.from_}' was not trained on the data of a prepare_trajectories stage; for others there is evaluate_adapters"
            )
        main = self._open(options.from_, self.conditions)
        self.students = {options.from_: main, **{name: self._open(name, self.conditions, main) for name in options.against}}
        tokenizer = load_tokenizer(str(self.conditions.tokenizer))
        teacher = self._teacher(tokenizer, main)
        try:
            judge = AgentJudge(
                main.model, Injector(main.model, main.spec), self.conditions, tokenizer, options.rows, self._asker(teacher), options.turns, options.new_tokens
            )
            with autocast(context.world.device, options.precision):
                found = self._judged(judge)
        finally:
            getattr(teacher, "close", lambda: None)()
        if not found:
            words = ", ".join(options.splits)
            raise RunError(f"stage '{context.name}': there is no issue of {words} to judge: hold repositories out (`held_out` of the trajectories)")
        self._write(self.conditions, found)

    def _judged(self, judge: AgentJudge) -> dict[int, dict[str, Found]]:
        """Every model on every chosen issue."""
        chosen = {split: self._chosen(split) for split in self.options.splits}
        issues = [(i, ids) for ids in chosen.values() for i in ids]
        found: dict[int, dict[str, Found]] = {}
        with self.context.counting("issues", len(issues)) as counter:
            for issue, ids in issues:
                found[issue] = judge.judge(issue, self._columns(issue, ids))
                counter.add()
        return found

    def _open(self, stage: str, conditions: ConditionSet, beside: GeneratorStudent | None = None) -> GeneratorStudent:
        folder = trained_model(self.context, stage)
        if not is_generator(folder):
            raise RunError(f"stage '{self.context.name}': '{stage}' trained no LoRA generator: name one, or a static one (`condition: none`)")
        return open_generator(self.context, Path(folder), conditions, dtype=torch.float32, beside=beside).to(self.context.world.device)

    def _teacher(self, tokenizer: Any, student: GeneratorStudent) -> Any:
        if self.options.teacher is None:
            return None
        teacher = build_teacher(self.context, self.options.teacher, num_ids=max(tokenizer.get_vocab().values()) + 1)
        teacher.load(self.context.world.device)
        check_teacher_vocabulary(teacher, tokenizer)
        if hasattr(teacher, "num_ids") and teacher.module is not None:
            teacher.num_ids = shared_ids(tokenizer, student.model, teacher.module)
        return teacher

    def _asker(self, teacher: Any) -> Any:
        """How the teacher is asked about a batch: as in training."""
        step = TrainStep(torch.nn.Identity(), (), teacher, {TopK: TopK(self.options.top_k)})

        def ask(batch: Batch) -> tuple[Batch, TopKSignal | None]:
            batch, signal = step.answer(batch)
            return batch, signal[TopK].to(batch.labels_BT.device) if TopK in signal else None

        return ask

    def _chosen(self, split: str) -> list[int]:
        """Issues of a split, spread over it."""
        assert self.conditions is not None
        ids = self.conditions.split(split)
        if len(ids) <= self.options.issues:
            return ids
        return sorted(np.random.default_rng(self.options.seed).choice(ids, self.options.issues, replace=False).tolist())

    def _columns(self, condition: int, chosen: list[int]) -> dict[str, Adapters | None]:
        """Every model that an issue is judged with."""
        main = self.options.from_
        columns: dict[str, Adapters | None] = {BASE: None}
        for name, student in self.students.items():
            columns[name] = static_adapter(student) if student.options.condition == "none" else self._generated(student, condition)
        other = self._other(condition, chosen)
        if other is not None and self.students[main].options.condition != "none":
            columns[f"{main}, shuffled"] = self._generated(self.students[main], other)
        return columns

    def _generated(self, student: GeneratorStudent, condition: int) -> Adapters:
        assert self.conditions is not None
        texts = torch.from_numpy(self.conditions.texts.of(np.array([condition]))).to(self.context.world.device)
        return student.generate(texts)

    def _other(self, condition: int, chosen: list[int]) -> int | None:
        """Another issue of the same split, of another repository wherever there is one; of any split where it is the only one."""
        assert self.conditions is not None
        all_of = self.conditions.conditions
        others = [i for i in chosen if i != condition] or [c.id for c in all_of if c.id != condition]
        far = [i for i in others if all_of[i].source != all_of[condition].source] or others
        return far[int(np.random.default_rng((self.options.seed, condition)).integers(len(far)))] if far else None

    def _write(self, conditions: ConditionSet, found: dict[int, dict[str, Found]]) -> None:
        context, options = self.context, self.options
        table = summarise(conditions, found, options.from_, resamples=options.bootstrap)
        for line in lines_of(table, options.from_):
            context.say(f"  {line}")
        rows = [
            {
                "name": conditions.conditions[i].name, "split": conditions.conditions[i].split, "repo": conditions.conditions[i].source,
                "measures": {name: one.measures() for name, one in columns.items()},
                "calls_forced": {name: one.forced.rates() for name, one in columns.items()},
                "calls_written": {name: one.written.rates() for name, one in columns.items()},
            }
            for i, columns in found.items()
        ]  # fmt: skip
        write_json(context.folder / "evaluation" / "agent.json", {"splits": table, "issues": rows, "generated": options.from_})
        context.facts["result"] = {f"{split}/{m}": one[m][options.from_] for split, one in table.items() for m in ("nll", "kl", "agreement") if m in one}
