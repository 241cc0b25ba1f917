"""The stage that trains a teacher for every condition: LoRAs all at once, or whole models one after the other."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.adapters.peft_experts import taken_for_experts
from limbeck.adapters.peft_files import write_peft
from limbeck.adapters.pool import Entry, Pool, write_pool
from limbeck.adapters.targets import resolve_spec
from limbeck.config.parts.adapters import TrainAdaptersStageOptions
from limbeck.config.parts.objectives import CrossEntropyOptions
from limbeck.config.parts.stages import LoopOptions
from limbeck.data.conditions.loaders import PoolLoader
from limbeck.data.conditions.store import Condition
from limbeck.data.loader import Loader
from limbeck.engine.loop import Trainer, TrainResult
from limbeck.engine.metrics import read_metrics
from limbeck.engine.parallel import full_state_dict
from limbeck.engine.step import TrainStep
from limbeck.models.loading import load_tokenizer, save_model
from limbeck.models.vocabulary import check_vocabulary
from limbeck.objectives.ce import CrossEntropy
from limbeck.stages.adapting import base_record, load_base, open_conditions
from limbeck.stages.context import StageContext
from limbeck.students.pool import AdapterPool
from limbeck.students.selection import select_trainable
from limbeck.students.student import Student
from limbeck.types import Batch


class TrainAdaptersStage:
    """Writes ``adapters/``."""

    def __init__(self, context: StageContext):
        self.context = context
        self.options: TrainAdaptersStageOptions = context.options

    def run(self) -> None:
        """Train up to the budget; an interrupted run goes on from its newest checkpoint."""
        context, options = self.context, self.options
        self.conditions = open_conditions(context, options.conditions.from_)
        self.source = context.locate(options.base)
        self.base = base_record(self.source, options.base if isinstance(options.base, str) else self.source)
        self.chosen = [self.conditions.conditions[i] for i in self.conditions.split(*options.splits)]
        self.dtype = torch.float64 if options.loop.precision == "float64" else torch.float32
        entries, mode = (self._pool(), "lora") if options.mode == "lora" else (self._models(), "full")
        folder = context.folder / "adapters"
        context.once(lambda: write_pool(Pool(folder, tuple(entries), self.base, mode)))

    # -- a pool of LoRAs ---------------------------------------------------------------------------------------------------

    def _pool(self) -> list[Entry]:
        context, options = self.context, self.options
        shape = options.adapters
        model = load_base(self.source, dtype=self.dtype, conditions=self.conditions)
        check_vocabulary(load_tokenizer(str(self.conditions.tokenizer)), model, who="the base")
        spec = resolve_spec(model, shape.targets, rank=shape.rank, alpha=shape.alpha, rslora=shape.rslora)
        slots = [condition for condition in self.chosen for _ in range(options.inits)]
        for line in spec.table():
            context.say(f"  {line}")
        context.say(f"  {len(slots)} adapters at once: {len(self.chosen)} conditions, {options.inits} for each, {shape.init} start")
        pool = AdapterPool(model, spec, len(slots), init=shape.init, seed=options.seed, dtype=self.dtype).to(context.world.device)
        rows = self.conditions.rows([condition.id for condition in self.chosen])
        loader = PoolLoader(
            rows,
            [condition.id for condition in slots],
            each=options.loop.rows,
            seed=options.seed,
            rank=context.world.rank,
            world=context.world.size,
        )
        together = None if options.loop.together is None else options.loop.together * options.loop.rows
        # The loss is a mean over all places: times the number of adapters, each has the gradient that it would have alone.
        objective = OwnCrossEntropy(CrossEntropyOptions(weight=float(len(slots))))
        result = self._train(pool, loader, context.folder, objective, microbatch=together)
        last = next(row["ce"] for row in reversed(read_metrics(context.folder / "metrics.jsonl")) if "ce" in row)
        context.facts["result"] = {"adapters": len(slots), "loss": last, "steps": result.steps, "tokens": result.tokens}
        state = full_state_dict(pool.A), full_state_dict(pool.B)
        names = [f"{condition.name}#{slot % options.inits}" if options.inits > 1 else condition.name for slot, condition in enumerate(slots)]
        entries = [Entry(name, condition.name, safe(name, slot)) for slot, (name, condition) in enumerate(zip(names, slots, strict=True))]
        context.once(lambda: self._write(pool, state, entries, slots))
        return entries

    def _write(self, pool: AdapterPool, state: tuple[dict[str, Any], dict[str, Any]], entries: list[Entry], slots: list[Condition]) -> None:
        folder = self.context.folder / "adapters"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        adapters = pool.gathered(*state)
        as_parameters = taken_for_experts(pool.model, pool.spec)
        for slot, entry in enumerate(entries):
            provenance = {
                "condition": slots[slot].name,
                "text": slots[slot].digest,
                "conditions": self.conditions.digest,
                "base": self.base["fingerprint"],
                "seed": self.options.seed,
            }
            write_peft(adapters, slot, folder / entry.folder, base=self.base["source"], provenance=provenance, as_parameters=as_parameters)

    # -- whole models ------------------------------------------------------------------------------------------------------

    def _models(self) -> list[Entry]:
        """One model after the other; a finished one is not trained again."""
        context, options = self.context, self.options
        entries = []
        losses = []
        for number, condition in enumerate(self.chosen):
            name = safe(condition.name, number)
            entries.append(Entry(condition.name, condition.name, name))
            folder, work = context.folder / "adapters" / name, context.folder / "models" / name
            done = work / "finished.json"
            if done.is_file() and folder.is_dir():
                losses.append(json.loads(done.read_text())["loss"])
                continue
            context.say(f"  model {number + 1}/{len(self.chosen)}: {condition.name}")
            model = load_base(self.source, dtype=self.dtype, conditions=self.conditions)
            student = Student(model, self.source).to(context.world.device)
            select_trainable(student, ("all",))
            rows = self.conditions.rows([condition.id])
            loader = Loader(rows, options.loop.rows, seed=options.seed, rank=context.world.rank, world=context.world.size)
            place = f", model {number + 1} of {len(self.chosen)}"
            result = self._train(student, loader, work, CrossEntropy(CrossEntropyOptions()), microbatch=None, place=place)
            losses.append(result.loss)
            state = full_state_dict(student.model)
            context.once(partial(self._keep, model, state, folder, done, result.loss))
        context.facts["result"] = {"models": len(entries), "loss": sum(losses) / len(losses)}
        return entries

    def _keep(self, model: Any, state: dict[str, Any], folder: Path, done: Path, loss: float) -> None:
        """Save a finished model, and drop the checkpoints that led to it."""
        folder.parent.mkdir(exist_ok=True)
        save_model(model, folder, tokenizer_source=str(self.conditions.tokenizer), state_dict=state)
        done.write_text(json.dumps({"loss": loss}))
        shutil.rmtree(done.parent / "checkpoints")

    # -- both --------------------------------------------------------------------------------------------------------------

    def _train(
        self, student: Any, loader: Any, folder: Path, objective: CrossEntropy, *, microbatch: int | None, place: str = ""
    ) -> TrainResult:
        context, options = self.context, self.options
        loop = LoopOptions(
            steps=options.loop.steps,
            microbatch=microbatch,
            precision=options.loop.precision,
            activation_checkpointing=options.loop.activation_checkpointing,
            log_every=options.loop.log_every,
            checkpoint_every=options.loop.checkpoint_every,
            keep_last=options.loop.keep_last,
        )
        trained = [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]
        trainer = Trainer(
            TrainStep(student, [objective]),
            loader,
            groups=[(options.optim.groups[0], trained)],
            optim_options=options.optim,
            loop=loop,
            folder=folder,
            seed=options.seed,
            world=context.world,
            console=context.console,
            title=context.name,
            place=f"{context.place}{place}",
            identity={"data": self.conditions.digest, "teacher": "none"},
        )
        result = trainer.run()
        if result.exit_reason != "finished":
            raise KeyboardInterrupt(result.exit_reason)
        return result


class OwnCrossEntropy(CrossEntropy):
    """Cross-entropy divided by the places in the rows, which no text changes.

    Divided by the positions that count, the size of an adapter's gradient would follow how full the rows of the others are.
    """

    def count(self, batch: Batch) -> Tensor:
        """Places, whatever stands there."""
        return torch.tensor(batch.labels_BT.numel())


def safe(name: str, number: int) -> str:
    """A folder name for an adapter: readable, and unique by its number."""
    return f"{number:04d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[:80]}"


