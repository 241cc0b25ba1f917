"""The stage that judges a LoRA generator beside every control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.adapters.delta_store import MeasuredDeltas
from limbeck.adapters.gauge import align
from limbeck.adapters.inject import Injector
from limbeck.adapters.merge import merge
from limbeck.adapters.retrieve import nearest, retrieve
from limbeck.adapters.spec import Adapters
from limbeck.config.parts.adapters import EvaluateAdaptersStageOptions
from limbeck.data.conditions.store import Condition, ConditionSet
from limbeck.engine.precision import autocast
from limbeck.errors import RunError
from limbeck.evaluation.adapters import BASE, TEACHER, Column, Judged, delta_numbers, lines_of, size_ratio, summarise
from limbeck.evaluation.composition import compose
from limbeck.models.loading import load_tokenizer
from limbeck.stages.adapting import (
    conditions_stage,
    entries_of,
    open_conditions,
    open_generator,
    open_pool,
    open_reader,
    static_adapter,
)
from limbeck.stages.context import StageContext
from limbeck.stages.folder import write_json
from limbeck.stages.probing import probes_of
from limbeck.stages.train import trained_model
from limbeck.students.generator.conditions import BaseStates
from limbeck.students.generator.predictor import DeltaPredictor
from limbeck.students.generator.student import GeneratorStudent, is_generator

MEAN, NEAREST = "mean adapter", "nearest adapter"


class EvaluateAdaptersStage:
    """Writes ``evaluation/adapters.json``: the summary by split, and every condition's numbers."""

    def __init__(self, context: StageContext):
        self.context = context
        self.options: EvaluateAdaptersStageOptions = context.options

    def run(self) -> None:
        """Judge on the first rank."""
        self.context.once(self._run)

    @torch.no_grad()
    def _run(self) -> None:
        context, options = self.context, self.options
        stage = conditions_stage(context, getattr(context.stage_options(options.from_), "data", None))
        if stage is None:
            raise RunError(
                f"stage '{context.name}': '{options.from_}' was not trained on the data of a prepare_conditions stage and makes no "
                "adapters: name a stage that was"
            )
        self.conditions: ConditionSet = open_conditions(context, stage)
        self.student = main = self._open(options.from_)
        self.generators = {options.from_: main, **{name: self._open(name, main) for name in options.against}}
        self.pool = open_pool(context, options.pool)
        if self.pool.base["fingerprint"] != main.base["fingerprint"]:
            raise RunError(
                f"stage '{context.name}': pool {options.pool.from_!r} and generator {options.from_!r} are of different bases: name a "
                "pool of the generator's"
            )
        self.entries = entries_of(self.pool, self.conditions)
        self.teachers = self.pool.adapters().to(context.world.device)
        # One injector a spec: generators and pool may differ in rank, and change the same Linears.
        self.judged = Judged(main.model, Injector(main.model, self.teachers.spec), self.conditions, options.rows, options.together)
        chosen = [c for c in self.conditions.conditions if c.split in options.splits and c.id in self.entries]
        if not chosen:
            words = ", ".join(options.splits)
            raise RunError(f"stage '{context.name}': no condition of {words} has a teacher in the pool: train_adapters.splits says which get one")
        with autocast(context.world.device, options.precision):
            table = self._judge(chosen)
            if options.composition is not None:
                table["composition"] = self._compose()
        write_json(context.folder / "evaluation" / "adapters.json", table)
        context.facts["result"] = {
            f"{split}/{key}": found[key][options.from_] for split, found in table["splits"].items() for key in ("nll", "share")
        }

    def _open(self, stage: str, beside: GeneratorStudent | None = None) -> GeneratorStudent:
        folder = trained_model(self.context, stage)
        if not is_generator(folder):
            raise RunError(f"stage '{self.context.name}': '{stage}' trained no LoRA generator: name one, or a static one for the multi-task control")
        return open_generator(self.context, Path(folder), self.conditions, dtype=torch.float32, beside=beside).to(self.context.world.device)

    # -- columns -----------------------------------------------------------------------------------------------------------

    def _teacher(self, ids: Sequence[int]) -> Adapters:
        return self.teachers.pick([self.entries[i][0] for i in ids])

    def _texts(self, ids: Sequence[int], draw: int) -> Tensor:
        """What is read of each condition, ``[N, S, C]``: training examples, never the test text."""
        return torch.from_numpy(self.conditions.texts.of(np.array(ids), draw=draw)).to(self.context.world.device)

    def _generated(self, name: str, draw: int, reads: dict[int, int] | None = None) -> Column:
        student = self.generators[name]
        if student.options.condition == "none":
            only = static_adapter(student)
            return lambda ids: only
        return lambda ids: student.generate(self._texts([(reads or {}).get(i, i) for i in ids], draw))

    def _mean(self) -> Adapters:
        """The exact mean of the seen teachers' dW."""
        seen = [entry for i in self.conditions.split("seen") for entry in self.entries.get(i, [])]
        return merge(self.teachers.pick(seen), method="weighted").adapters

    def _nearest(self, ids: Sequence[int]) -> dict[int, int]:
        """The seen condition, other than itself, whose texts look most alike to the base."""
        seen = [i for i in self.conditions.split("seen") if i in self.entries]
        if len(seen) < 2:
            raise RunError(
                f"stage '{self.context.name}': the control '{NEAREST}' needs two seen conditions with teachers, and there are "
                f"{len(seen)}: train teachers for more of them"
            )
        keys, queries = self._looks(seen), self._looks(ids)
        # All texts look alike in a mean state: what sets them apart is left.
        keys, queries = keys - keys.mean(0), queries - keys.mean(0)
        found = {}
        for i, query in zip(ids, queries, strict=True):
            others = [k for k, j in enumerate(seen) if j != i]
            found[i] = seen[others[int(nearest(query, keys[others]))]]
        return found

    def _looks(self, ids: Sequence[int]) -> Tensor:
        """Mean state of the base over texts of each condition, summed over draws, ``[N, D]``."""
        reader = BaseStates(self.student.model, None)
        total = torch.zeros(len(ids), reader.size, device=self.context.world.device)
        for draw in range(self.options.draws + 2):
            for start in range(0, len(ids), self.options.together):
                states, mask = reader(self._texts(list(ids[start : start + self.options.together]), draw))
                weights = mask.unsqueeze(-1)
                total[start : start + len(states)] += (states.float() * weights).sum((1, 2)) / weights.sum((1, 2))
        return total

    def _retrieved(self, stage: str, ids: Sequence[int]) -> dict[str, Column]:
        """The seen adapters whose measured deltas are nearest to the predicted one, never the condition's own: the nearest, and merges."""
        options = self.options
        folder = trained_model(self.context, stage)
        predictor = open_reader(self.context, Path(folder), self.conditions, dtype=torch.float32, beside=self.student).to(self.context.world.device)
        if not isinstance(predictor, DeltaPredictor):
            raise RunError(f"stage '{self.context.name}': predictors: '{stage}' trained no delta_predictor: name a stage whose surgery is one")
        assert options.deltas is not None
        measured = MeasuredDeltas(self.context.artefact(options.deltas.from_, "deltas"))
        entries = [(i, entry) for i in self.conditions.split("seen") for entry in self.entries.get(i, [])]
        keys = measured.stacked([self.pool.entries[entry].name for _, entry in entries])
        if keys.shape[1] != predictor.size:
            other = f"those of '{options.deltas.from_}' have {keys.shape[1]}"
            raise RunError(
                f"stage '{self.context.name}': '{stage}' predicts deltas of {predictor.size} numbers, {other}: name the measure_deltas "
                "stage that it learnt from"
            )
        lots = [ids[start : start + options.together] for start in range(0, len(ids), options.together)]
        wanted = torch.cat([predictor.predict(self._texts(lot, 0)) for lot in lots]).cpu()
        chosen: dict[int, tuple[list[int], list[float]]] = {}
        for i, query in zip(ids, wanted, strict=True):
            others = [place for place, (condition, _) in enumerate(entries) if condition != i]
            found, weights = retrieve(query, keys[others], min(options.top, len(others)), options.temperature)
            chosen[i] = [entries[others[k]][1] for k in found.tolist()], weights.tolist()

        def merged(method: str) -> Column:
            def column(lot: Sequence[int]) -> Adapters:
                parts = [self.teachers.pick(chosen[i][0]) for i in lot]
                rank = options.top * self.teachers.spec.rank
                return align([merge(part, chosen[i][1], method=method, rank=rank).adapters for i, part in zip(lot, parts, strict=True)])

            return column

        return {
            f"{stage}: nearest": lambda lot: self.teachers.pick([chosen[i][0][0] for i in lot]),
            f"{stage}: mean of {options.top}": merged("weighted"),
            f"{stage}: TIES of {options.top}": merged("ties"),
        }

    def _shuffled(self, chosen: Sequence[Condition]) -> dict[int, int]:
        """Another condition of the same split for each, of another source and another format wherever there is one."""
        found = {}
        generator = np.random.default_rng(self.options.seed)
        for condition in chosen:
            others = [c for c in chosen if c.split == condition.split and c.id != condition.id] or [c for c in chosen if c.id != condition.id]
            far = [c for c in others if c.source != condition.source and c.format != condition.format] or others
            if not far:
                raise RunError(
                    f"stage '{self.context.name}': there is one condition to judge, and the shuffled control needs another: judge more "
                    "`splits`, or hold more out"
                )
            found[condition.id] = far[int(generator.integers(len(far)))].id
        return found

    # -- judging -----------------------------------------------------------------------------------------------------------

    def _losses(self, ids: Sequence[int], columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
        with self.context.counting("conditions", len(ids)) as counter:
            return self.judged.nll(ids, columns, done=counter.add)

    def _judge(self, chosen: list[Condition]) -> dict[str, Any]:
        context, options = self.context, self.options
        ids = [condition.id for condition in chosen]
        shuffled, near = self._shuffled(chosen), self._nearest(ids)
        mean = self._mean()
        fixed: dict[str, Column] = {
            BASE: lambda ids: None,
            MEAN: lambda ids: mean,
            NEAREST: lambda ids: self._teacher([near[i] for i in ids]),
            TEACHER: self._teacher,
        }
        nll = self._losses(ids, fixed)
        context.say(f"  {len(ids)} conditions: base {nll[BASE].mean():.4f}, their own teachers {nll[TEACHER].mean():.4f} nats a token")
        retrieved = {name: column for stage in options.predictors for name, column in self._retrieved(stage, ids).items()}
        nll |= self._losses(ids, retrieved) if retrieved else {}
        reading = [name for name, student in self.generators.items() if student.options.condition != "none"]
        first: dict[str, Column] = {**fixed, **retrieved}
        for draw in range(options.draws):
            columns = {name: self._generated(name, draw) for name in self.generators if draw == 0 or name in reading}
            columns |= {f"{name}, shuffled": self._generated(name, draw, shuffled) for name in reading}
            first |= columns if draw == 0 else {}
            for name, values in self._losses(ids, columns).items():
                weight = options.draws if name.removesuffix(", shuffled") in reading else 1
                nll[name] = nll.get(name, 0) + values / weight
        numbers = self._numbers(ids, {name: column for name, column in first.items() if name != BASE})
        table = summarise(chosen, nll, options.from_, resamples=options.bootstrap, numbers=numbers)
        for line in lines_of(table, options.from_):
            context.say(f"  {line}")
        rows = [
            {
                "name": c.name, "split": c.split, "source": c.source, "format": c.format, "shuffled": self.conditions.conditions[shuffled[c.id]].name,
                "nearest": self.conditions.conditions[near[c.id]].name, "nll": {name: float(values[k]) for name, values in nll.items()},
                **{kind: {name: float(values[k]) for name, values in found.items()} for kind, found in numbers.items()},
            }
            for k, c in enumerate(chosen)
        ]  # fmt: skip
        return {"splits": table, "conditions": rows, "generated": options.from_}

    def _numbers(self, ids: list[int], columns: dict[str, Column]) -> dict[str, dict[str, np.ndarray]]:
        """Deltas on fresh probes and sizes of dW, against the conditions' own teachers."""
        options = self.options
        lots = [ids[start : start + options.together] for start in range(0, len(ids), options.together)]
        adapters = {name: [self._spread(column(lot), len(lot)) for lot in lots] for name, column in columns.items()}
        found: dict[str, dict[str, np.ndarray]] = {"size_ratio": {}}
        for name, parts in adapters.items():
            found["size_ratio"][name] = np.concatenate([size_ratio(part, own) for part, own in zip(parts, adapters[TEACHER], strict=True)])
        if options.probes is None:
            return found
        conditions = self.conditions if options.probes.kind == "conditions" else None
        # Snippets come from the test side: no generator was trained on them.
        probes = probes_of(options.probes, load_tokenizer(str(self.conditions.tokenizer)), conditions, side="test").to(self.context.world.device)
        found |= {"delta_cosine": {}, "delta_ratio": {}}
        teacher = [self.judged.deltas(part, probes, options.represent) for part in adapters[TEACHER]]
        for name, parts in adapters.items():
            own = teacher if name == TEACHER else [self.judged.deltas(part, probes, options.represent) for part in parts]
            pieces = [delta_numbers(a, b) for a, b in zip(own, teacher, strict=True)]
            for kind in ("delta_cosine", "delta_ratio"):
                found[kind][name] = np.concatenate([piece[kind] for piece in pieces])
        return found

    def _spread(self, adapters: Adapters | None, count: int) -> Adapters:
        assert adapters is not None
        return adapters.pick([0] * count) if len(adapters) == 1 else adapters

    def _compose(self) -> dict[str, Any]:
        options = self.options
        mixes = [c for c in self.conditions.conditions if c.split == "mix" and all(i in self.entries for i in (c.id, *c.parts))]
        if not mixes:
            raise RunError(
                f"stage '{self.context.name}': composition is judged against teachers that were really trained on mixes, and there are none: set "
                "`mixes` in the conditions and `mix` in train_adapters.splits"
            )
        probe_options = options.probes
        if probe_options is None:
            raise RunError(f"stage '{self.context.name}': composition compares deltas: set `probes`")
        conditions = self.conditions if probe_options.kind == "conditions" else None
        probes = probes_of(probe_options, load_tokenizer(str(self.conditions.tokenizer)), conditions, side="test").to(self.context.world.device)
        assert options.composition is not None
        found = compose(
            self.judged,
            mixes,
            teacher_of=self._teacher,
            generated=self._generated(options.from_, 0),
            probes=probes,
            represent=options.represent,
            density=options.composition.density,
        )
        for line in found.pop("lines"):
            self.context.say(f"  {line}")
        return found
