"""The training loop.  One for every kind of student; it knows protocols, never a method."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from limbeck.config.parts.stages import LoopOptions, OptimOptions
from limbeck.engine import optim, schedule
from limbeck.engine.ahead import StepQueue, Upcoming
from limbeck.engine.batches import Rows, StepLoader, num_steps, padding_like
from limbeck.engine.canary import Canary, changed
from limbeck.engine.checkpoint import Checkpoints, Loaded, NoSpace
from limbeck.engine.console import WAITING, Progress, quantity
from limbeck.engine.determinism import derive_seed, deterministic, seed_everything
from limbeck.engine.gates import check_gate
from limbeck.engine.lock import RunLock
from limbeck.engine.metrics import MetricsWriter
from limbeck.engine.parallel import World, parallelize, release_teacher
from limbeck.engine.precision import autocast, sharded_policy
from limbeck.engine.recompute import outer_units, recompute
from limbeck.engine.resources import memory_bytes, release_memory
from limbeck.engine.signals import StopFlag
from limbeck.engine.step import TrainStep
from limbeck.engine.trackers import Trackers
from limbeck.engine.validation import validate
from limbeck.engine.window import Window
from limbeck.errors import LimbeckError, RunError, TeacherError
from limbeck.files import write_atomically
from limbeck.types import Batch, Signal

LAST_SAVE = 60.0
"""Seconds that a run which ends by an error waits for the save in the background."""
MAX_SKIPS = 10
"""Steps in a row that may be skipped for a non-finite gradient."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: steps and tokens done, mean loss of its last tenth, ``finished`` or ``preempted``."""

    steps: int
    tokens: int
    loss: float
    exit_reason: str


@dataclass
class _Position:
    """What moves from step to step."""

    step: int = 0
    tokens: int = 0
    skips: int = 0


@dataclass(frozen=True)
class _Agreed:
    """A step as all ranks see it: this rank's micro-batches (as many as any rank has) with the answers that are here, global
    counts and tokens, why it is not done, if it is not, and whether a save in the background has failed."""

    parts: list[tuple[Batch, Signal | None]]
    counts: list[int]
    tokens: int
    stopping: bool
    failure: LimbeckError | None = None
    unsaved: bool = False


class Trainer:
    """Trains ``step`` on ``loader`` until the budget is spent, and goes on where it stopped if the folder holds a checkpoint.

    ``groups`` are options and the named parameters they claim; together they must be exactly what requires a gradient.
    ``identity`` (short strings: data, recipe, teacher) is stored, and a run that resumes with another one is refused.
    """

    def __init__(
        self,
        step: TrainStep,
        loader: StepLoader,
        *,
        groups: optim.Groups,
        optim_options: OptimOptions,
        loop: LoopOptions,
        folder: Path,
        seed: int = 0,
        world: World | None = None,
        validation_rows: Rows | None = None,
        console: Console | None = None,
        title: str = "train",
        place: str = "",
        quiet: bool = False,
        identity: Mapping[str, str] | None = None,
        checkpoints: Path | None = None,
        beside_final: Callable[[Path], None] | None = None,
        trackers: Trackers | None = None,
    ):
        """``checkpoints`` is where they lie, if not in ``folder``; ``beside_final`` (called on every rank) adds to the final one."""
        self.train_step = step
        self.loader = loader
        self.options = loop
        self.optim_options = optim_options
        self.folder = folder
        self.seed = seed
        self.world = world or World(torch.device("cpu"))
        self.validation_rows = validation_rows
        self.identity = dict(identity or {})
        self.total = num_steps(loop, loader)
        first = self.world.rank == 0
        self.voice = Progress(
            console if first else None, title, self.total, place=place, quiet=quiet,
            log=folder / "training.log" if first else None, short=loop.log_form == "short",
        )  # fmt: skip
        self.checkpoint_folder = checkpoints or folder / "checkpoints"
        self.beside_final = beside_final
        self.trackers = trackers
        self.microbatch = loop.microbatch
        self.at = _Position()
        self.window = Window()
        self.advised = False
        self.validations: list[dict[str, float]] = []
        self.warned: str | None = None
        step.to(self.world.device)
        self._shard(groups)
        # A compiled layer is compiled again for another number of rows.
        rows = (loop.microbatch or max(1, loader.rows_per_step // self.world.size)) if loop.compile else 1
        self.canary = Canary(loader, world=self.world, precision=loop.precision, rows=rows) if loop.canary else None

    # -- set-up ----------------------------------------------------------------------------------------------------------

    def _shard(self, groups: optim.Groups) -> None:
        """Shard, then build the optimiser from the parameters that sharding put in the place of ours."""
        step, student = self.train_step, self.train_step.student
        name_of = {id(p): name for name, p in student.named_parameters()}
        claimed = [(options, [name_of[id(p)] for _, p in members]) for options, members in groups]
        trained = {name for name, p in student.named_parameters() if p.requires_grad}
        listed = {name for _, names in claimed for name in names}
        if trained != listed:
            odd = sorted(trained ^ listed)
            verb = (
                "trains but no optim.groups entry claims it" if odd[0] in trained else "is in an optim.groups entry but is frozen"
            )
            raise RunError(f"{odd[0]} {verb} ({len(odd)} such parameters)")
        if self.options.activation_checkpointing:
            for unit in outer_units(student):
                recompute(unit)
        parallelize(step, self.world, sharded_policy(self.options.precision), self.options.zero_stage)
        if self.options.compile:
            for unit in outer_units(student):
                unit.compile()
        parameters = dict(student.named_parameters())
        rebuilt = [(options, [(name, parameters[name]) for name in names]) for options, names in claimed]
        self.names = {p: name for _, members in rebuilt for name, p in members}
        self.parameters = list(self.names)
        self.optimizer = optim.build_optimizer(rebuilt, self.optim_options)

    def _tensors(self) -> dict[str, Tensor]:
        """What a checkpoint fills: trained parameters, persistent buffers, optimiser state.  The live tensors, no copies."""
        student = self.train_step.student
        parameters = {name for name, _ in student.named_parameters(remove_duplicate=False)}
        buffers = {f"buffer/{name}": t for name, t in student.state_dict().items() if name not in parameters}
        weights = {f"model/{name}": p.detach() for p, name in self.names.items()}
        return {**weights, **buffers, **optim.flat_state(self.optimizer, self.names)}

    # -- the run ---------------------------------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        """Train to the end of the budget or to a stop signal.  Raises :class:`RunError` for what ends a run early."""
        reason_file = self.folder / "exit_reason"
        self.folder.mkdir(parents=True, exist_ok=True)
        on_cpu = self.world.device.type == "cpu"
        exact = on_cpu if self.options.deterministic is None else self.options.deterministic
        with RunLock(self.folder if self.world.rank == 0 else None), StopFlag() as stop, deterministic(exact):
            if self.world.rank == 0:
                reason_file.unlink(missing_ok=True)
            try:
                result = self._run(stop, exact)
            except BaseException as error:
                if self.world.rank == 0:
                    write_atomically(reason_file, "failed\n")
                if isinstance(error, torch.OutOfMemoryError):
                    raise RunError(f"out of memory at step {self.at.step + 1}: {self._ways_out()}") from error
                raise
            finally:
                self.voice.close()
            if self.world.rank == 0:
                write_atomically(reason_file, result.exit_reason + "\n")
        if result.exit_reason == "finished":
            self.voice.say(f"finished: {result.steps} steps, {quantity(result.tokens)} tokens, loss {result.loss:.4f}")
        else:
            who = stop.reason or "another rank"
            self.voice.say(f"stopped by {who} after step {result.steps} and saved: the same command goes on from there")
        return result

    def _run(self, stop: StopFlag, exact: bool) -> TrainResult:
        self.checkpoints = Checkpoints(
            self.checkpoint_folder,
            self.world,
            keep_last=self.options.keep_last,
            keep_every=self.options.keep_every,
            say=self.voice.say,
            note=self.voice.note,
            saved=self.voice.saved,
        )
        self._announce(exact)
        self.exact = exact
        self.voice.start(lambda: stop.reason)
        self.voice.doing("reading checkpoints")
        self._resume()
        if self.at.step < self.total:
            self.checkpoints.check_room(self._tensors(), -(-self.total // self._save_every))
        if self.trackers is not None:
            self.trackers.say = self.voice.say
        writer = MetricsWriter(self.folder / "metrics.jsonl", self.at.step, self.trackers) if self.world.rank == 0 else None
        try:
            self.voice.recall(self.folder / "metrics.jsonl")
            preempted = self._loop(stop, writer)
        finally:
            with suppress(Exception):
                # After an error: what is being written may still become whole, if the other ranks are there.
                self.checkpoints.finish(LAST_SAVE)
            if writer is not None:
                writer.close()
        loss = check_gate(self.folder / "metrics.jsonl", None if preempted else self.options.stop_unless, self.world)
        return TrainResult(self.at.step, self.at.tokens, loss, "preempted" if preempted else "finished")

    def _announce(self, exact: bool) -> None:
        """Say what is about to happen."""
        rows, length = self.loader.rows_per_step, self.loader.rows.sequence
        trained = sum(p.numel() for p in self.parameters)
        level = "L1 (this machine gives a bit-equal trace)" if exact else "L0 (same data order; kernels may round differently)"
        self.voice.say(
            f"{self.total} steps of {rows} rows x {length} tokens = {quantity(self.total * rows * length)} tokens; "
            f"{quantity(trained)} trained parameters, {self.options.precision}, "
            f"{self.world.size} rank(s) on {self.world.device.type}, determinism {level}"
        )

    def _resume(self) -> None:
        """Model, optimiser, objectives, position; random states last."""
        optim.materialise_state(self.optimizer)
        objectives = dict(zip(self.train_step.labels, self.train_step.objectives, strict=True))
        loaded = self.checkpoints.load(self._tensors())
        if loaded is None:
            self._calibrate()
            seed_everything(derive_seed(self.seed, "train", self.world.rank))
            return
        state = loaded.state
        changed = [
            f"{key}: was {state['identity'].get(key)}, is {value}"
            for key, value in self.identity.items()
            if state["identity"].get(key) != value
        ]
        if changed:
            raise RunError(
                f"{self.folder} was begun with something else ({'; '.join(changed)}): "
                "give the run another name, or start it with --fresh"
            )
        for label, objective in objectives.items():
            held = {name.removeprefix(f"{label}/"): t for name, t in loaded.objectives.items() if name.startswith(f"{label}/")}
            if held:
                objective.load_state({name: t.to(self.world.device) for name, t in held.items()})
        self._check_canary(loaded)
        self.at = _Position(loaded.step, state["tokens"], state["skips"])
        self.loader.restore(state["position"])
        if state["total_steps"] != self.total:
            self.voice.say(
                f"the budget was {state['total_steps']} steps and is {self.total} now: the learning rate follows the new one"
            )
        if state["threads"] != torch.get_num_threads():
            self.voice.say(
                f"resumed with {torch.get_num_threads()} threads instead of {state['threads']}: sums may round differently"
            )
        self.checkpoints.load_rng(loaded, self.seed)
        self.voice.say(f"resumed at step {loaded.step} from {loaded.path.name}")
        self.voice.saved(loaded.step, loaded.path.stat().st_mtime)

    def _check_canary(self, loaded: Loaded) -> None:
        """Refuse weights that give other numbers than they did when they were saved."""
        saved = loaded.state.get("canary")
        if self.canary is None or saved is None:
            return
        # Kernels that are not deterministic round otherwise at every call, whatever else is the same.
        alike = self.exact and saved["conditions"] == self.canary.conditions(self.exact)
        difference = changed(saved["score"], self.canary.score(self.train_step, loaded.step), alike=alike)
        if difference is not None:
            raise RunError(
                f"{loaded.path} was read whole and is not what it was: {difference}.  The frozen part of the student, its code or a library has "
                "changed: bring back what was there, start with --fresh, or go on all the same with loop.canary=false"
            )

    def _calibrate(self) -> None:
        """Let objectives measure what their loss divides by, on rows spread over the data: the same ones on every rank."""
        self.voice.doing("calibrating objectives")
        rows = self.loader.rows
        for objective in self.train_step.objectives:
            batches = getattr(objective, "calibration_batches", 0)
            if not batches:
                continue
            # Independent of the micro-batch size, or the loss would depend on it.
            wanted = min(len(rows), batches * min(8, self.loader.rows_per_step))
            indices = np.unique(np.linspace(0, len(rows) - 1, wanted).astype(np.int64))
            size = self.options.microbatch or min(8, self.loader.rows_per_step)
            parts = [rows.batch(indices[i : i + size]).to(self.world.device) for i in range(0, len(indices), size)]
            with self._compute():
                objective.calibrate(lambda batch, visit: self.train_step.ask("stream", batch, visit), parts)
            release_teacher(self.train_step)

    def _compute(self) -> AbstractContextManager:
        return autocast(self.world.device, self.options.precision)

    # -- steps -----------------------------------------------------------------------------------------------------------

    def _loop(self, stop: StopFlag, writer: MetricsWriter | None) -> bool:
        """Steps until the budget is spent (False) or a signal came (True)."""
        every_validation = self.options.validate_every
        self.train_step.train()
        self.began, self.began_step = time.perf_counter(), self.at.step
        self.window = Window()
        queue = StepQueue(self.loader, self.train_step, microbatch=self.microbatch, num_steps=self.total - self.at.step)
        if self.at.step >= self.total and not self.checkpoints.has_final(self.at.step):
            self._save(queue.position, final=True)
        while self.at.step < self.total:
            agreed = self._agree(queue.first(), stop)
            if agreed.unsaved:
                self._finish_save()
            if agreed.stopping or agreed.failure:
                self._log(writer)
                self._save(queue.position, required=True)
                if agreed.failure is not None:
                    raise agreed.failure
                return True
            queue.advance()
            loss = self._gradients(agreed, queue)
            # The next rows are fetched while the device still works on the backward pass.
            queue.fill(1)
            self._apply(loss)
            self.at.step += 1
            self.at.tokens += agreed.tokens
            self.window.tokens += agreed.tokens
            last = self.at.step == self.total
            saving = self.at.step % self._save_every == 0 and not last
            if last or saving or self.at.step == 1 or self.at.step % self.options.log_every == 0:
                self._log(writer)
            if self.validation_rows is not None and every_validation and (last or self.at.step % every_validation == 0):
                self._validate(writer, queue.position)
            if saving:
                self._save(queue.position)
            elif last:
                self._save(queue.position, final=True)
        return False

    def _agree(self, upcoming: Upcoming, stop: StopFlag) -> _Agreed:
        """What ranks must know of each other before any forward.  One collective.

        Answers that come from elsewhere are waited for first: what was not answered does not count.
        """
        parts: list[tuple[Batch, Signal | None]] = []
        failure: LimbeckError | None = None
        asked = time.perf_counter()
        self.voice.doing("waiting for the teacher", self.at.step)
        try:
            parts = upcoming.answers(lambda: stop.reason is not None) or []
        except TeacherError as error:
            failure = error
        self.window.teacher_seconds += time.perf_counter() - asked
        self.voice.doing("")
        counts = [0] * len(self.train_step.objectives)
        if parts:
            counts = torch.stack([self.train_step.counts(part) for part, _ in parts]).sum(0).tolist()
        flags = [int(stop.reason is not None), int(failure is not None), int(self.checkpoints.failed), len(parts)]
        table = self.world.gather([*counts, upcoming.rows.num_tokens, *flags])
        *totals, tokens, stops, failures, unsaved, _ = table.sum(0).tolist()
        if failures and failure is None:
            failure = RunError("another rank has lost its teacher; its own message says why")
        padding: list[tuple[Batch, Signal | None]] = [(padding_like(upcoming.rows), None)]
        most = int(table[:, -1].max())
        return _Agreed([*parts, *padding * (most - len(parts))], totals, tokens, stops > 0, failure, unsaved > 0)

    def _accumulate(self, agreed: _Agreed) -> Tensor:
        """Gradients of a step; returns this rank's share of its loss.  The only division by a token count is here."""
        weights = self.train_step.weights(self.at.step)
        scales = [weight / max(count, 1) for weight, count in zip(weights, agreed.counts, strict=True)]
        loss: Tensor | float = 0.0
        if self.train_step.previews:
            for rows, _ in agreed.parts:
                with self._compute():
                    self.train_step.preview(rows.to(self.world.device))
            self.train_step.settle(self.world.sum)
        for rows, given in agreed.parts:
            part = rows.to(self.world.device)
            with self._compute():
                asked = time.perf_counter()
                part, signal = (part, given) if given is not None else self.train_step.answer(part)
                self.window.teacher_seconds += time.perf_counter() - asked
                metrics = self.train_step.run(part, signal.to(self.world.device), scales)
            release_teacher(self.train_step)
            loss = loss + self.window.add(metrics)
        self.train_step.settle(self.world.sum)
        return torch.as_tensor(loss)

    def _gradients(self, agreed: _Agreed, queue: StepQueue) -> Tensor:
        """:meth:`_accumulate`; where memory runs out, the same step in smaller micro-batches until one fits, which is then said or kept."""
        rows = max((part.input_ids_BT.shape[0] for part, _ in agreed.parts), default=1)
        fits, held = rows, dict(self.window.metrics)
        while True:
            try:
                loss = self._accumulate(agreed)
                break
            except torch.OutOfMemoryError:
                if self.world.size > 1 or fits == 1:
                    raise
            # Outside the handler: its traceback holds the graph that did not fit.
            self.train_step.forget()
            self.optimizer.zero_grad(set_to_none=True)
            self.window.metrics = dict(held)
            release_memory(self.world.device)
            fits = -(-fits // 2)
            # Smaller parts have no answer of their own yet: the teacher is asked again.
            agreed = replace(agreed, parts=[(piece, None) for part, _ in agreed.parts for piece in part.split(fits)])
        if fits == rows:
            return loss
        said = f"out of memory at step {self.at.step + 1} with {rows} rows a micro-batch; {fits} fit (tried)"
        if self.options.on_out_of_memory == "stop":
            raise RunError(
                f"{said}: set loop.microbatch: {fits}, which takes the same steps in more passes, or loop.on_out_of_memory: halve to have "
                "that done by itself"
            )
        self.voice.say(f"{said}: the run goes on with them, at the same rows a step")
        self.microbatch = queue.microbatch = fits
        return loss

    def _ways_out(self) -> str:
        """What to set when memory has run out and nothing smaller was tried, or the smallest did not fit."""
        rows, length = self.loader.rows_per_step // self.world.size, self.loader.rows.sequence
        ways = [] if (self.microbatch or rows) == 1 else [f"loop.microbatch (now {self.microbatch or f'all {rows} rows of a step'})"]
        ways += [f"data.sequence (now {length})"]
        recomputed = "" if self.options.activation_checkpointing else ", or set loop.activation_checkpointing: true"
        return f"lower {' or '.join(ways)}{recomputed}"

    @property
    def _save_every(self) -> int:
        return self.options.checkpoint_every or min(1000, max(1, self.total // 10))

    def _apply(self, loss: Tensor) -> None:
        """Clip and update, unless the gradient is not finite."""
        factor = schedule.factor(self.optim_options.schedule, self.at.step, self.total)
        rates = optim.set_rates(self.optimizer, factor, decays=self.at.step < self.optim_options.decay_until * self.total)
        total_norm = optim.global_norm(self.parameters)
        norm = float(total_norm)
        if math.isfinite(norm):
            if self.optim_options.clip is not None and norm > self.optim_options.clip:
                nn.utils.clip_grads_with_norm_(self.parameters, self.optim_options.clip, total_norm)
            self.optimizer.step()
            self.at.skips = 0
        else:
            self._nonfinite(norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.window.losses.append(loss)
        self.window.rates, self.window.norm = rates, norm

    def _nonfinite(self, norm: float) -> None:
        """Name the tensor, then skip or stop by policy.  The norm is global, so every rank comes here."""
        text = f"step {self.at.step + 1}: the gradient is not finite (norm {norm}); first in {optim.first_nonfinite(self.names)}"
        self.at.skips += 1
        if self.options.on_nonfinite == "stop":
            raise RunError(f"{text}.  The last checkpoint is intact; lower the learning rate, or set loop.on_nonfinite: skip")
        if self.at.skips > MAX_SKIPS:
            raise RunError(
                f"{text}, and so were the {MAX_SKIPS} steps before it.  The last checkpoint is intact; lower the learning rate"
            )
        self.voice.say(f"{text}; step skipped ({self.at.skips} in a row)")

    # -- what is written -------------------------------------------------------------------------------------------------

    def _log(self, writer: MetricsWriter | None) -> None:
        """Write one line for the steps since the last one."""
        window = self.window
        if not window.losses:
            return
        # What a student measures of itself is measured when it is logged, on every rank.
        window.metrics.update(getattr(self.train_step.student, "measures", dict)())
        values, losses = window.fetch(self.world)
        if self.world.device.type == "cpu":
            release_memory(self.world.device)
        now = time.perf_counter()
        per_step = (now - self.began) / max(1, self.at.step - self.began_step)
        self.window = Window(started=now)
        if writer is None:
            return
        elapsed = max(now - window.started, 1e-9)
        self._advise(window.teacher_seconds / elapsed)
        row = {
            "step": self.at.step,
            "tokens": self.at.tokens,
            "loss": math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.nan,
            "losses": losses,
            **values,
            "grad_norm": window.norm,
            **{f"lr/{label}": rate for label, rate in window.rates.items()},
            "tokens_per_second": window.tokens / elapsed,
            "memory_bytes": memory_bytes(self.world.device),
            "teacher_seconds": window.teacher_seconds,
            "teacher_share": window.teacher_seconds / elapsed if hasattr(self.train_step.teacher, "submit") else 0.0,
            **{f"teacher/{name}": value for name, value in getattr(self.train_step.teacher, "metrics", dict)().items()},
            "eta_seconds": per_step * (self.total - self.at.step),
            "time": time.time(),
        }
        writer.write(row)
        self.voice.update(row)

    def _advise(self, waiting: float) -> None:
        """Say once what to change when a run mostly waits for its teacher."""
        advice = getattr(self.train_step.teacher, "advice", None)
        if advice is not None and waiting > WAITING and not self.advised:
            self.advised = True
            self.voice.say(f"{100 * waiting:.0f}% of the time is spent waiting for the teacher: {advice()}")

    def _validate(self, writer: MetricsWriter | None, position: dict[str, int]) -> None:
        """Log the losses on held-out rows; the time it takes is not training time."""
        rows, options = self.validation_rows, self.options
        assert rows is not None
        began = time.perf_counter()
        self.voice.doing("measuring held-out rows")
        size = self.microbatch or max(1, min(options.validate_rows, self.loader.rows_per_step) // self.world.size)
        try:
            values = validate(
                self.train_step, rows, wanted=options.validate_rows, size=size, world=self.world, precision=options.precision
            )
        except TeacherError:
            # Alone, this rank can save; with others beside it, they may be in the middle of the next forward.
            if self.world.size == 1:
                self._save(position, final=self.at.step == self.total, required=True)
            raise
        if writer is not None:
            writer.write({"step": self.at.step, **{f"validation/{name}": value for name, value in values.items()}})
            self.voice.say(f"step {self.at.step}: held-out loss {values['loss']:.4f}")
        self.validations.append(values)
        for objective in self.train_step.objectives:
            warning = getattr(objective, "warning", lambda history: None)(self.validations)
            if warning is not None and warning != self.warned:
                self.warned = warning
                self.voice.say(f"WARNING: step {self.at.step}: {warning}")
        self.window.started += time.perf_counter() - began

    def _finish_save(self) -> None:
        """Wait for the save in the background; that it did not fit is said, anything else ends the run, on every rank."""
        try:
            self.checkpoints.finish()
        except NoSpace as error:
            self.voice.say(f"WARNING: {error}.  Training goes on; the checkpoints before it are intact")

    def _save(self, position: dict[str, int], *, final: bool = False, required: bool = False) -> None:
        """Save; without space the run goes on with what was there, unless nothing comes after this."""
        began = time.perf_counter()
        self.voice.doing("saving a checkpoint", self.at.step)
        self._finish_save()
        canary = self.canary and {"score": self.canary.score(self.train_step, self.at.step), "conditions": self.canary.conditions(self.exact)}
        state = {
            "canary": canary,
            "tokens": self.at.tokens,
            "skips": self.at.skips,
            "position": position,
            "total_steps": self.total,
            "identity": self.identity,
            "seed": self.seed,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        objectives = {
            f"{label}/{name}": tensor
            for label, objective in zip(self.train_step.labels, self.train_step.objectives, strict=True)
            if hasattr(objective, "state")
            for name, tensor in objective.state().items()
        }
        try:
            self.checkpoints.save(
                self.at.step,
                self._tensors(),
                objectives,
                state,
                final=final,
                beside=self.beside_final if final else None,
                # What nothing comes after is there when this returns.
                background=self.options.save_in_background and not final and not required,
            )
        except NoSpace as error:
            if final or required:
                raise RunError(f"{error}.  Step {self.at.step} is not saved; the checkpoints before it are intact") from error
            self.voice.say(f"WARNING: {error}.  Training goes on; the checkpoints before it are intact")
        self.window.started += time.perf_counter() - began
