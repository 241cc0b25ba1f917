"""Ternary distillation from a served teacher, under the names that its training scripts have for everything.

A thin front of the recipe ``ternary`` (or another with a train stage ``distil``): each setting is a change to it, and what runs is ``limbeck
run``.  Nothing else in Limbeck imports this but the verb ``distill-ternary``.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from limbeck.config.load import load_recipe, recipe_folder
from limbeck.config.recipe import Recipe, stage_order
from limbeck.engine.checkpoint import FINAL
from limbeck.errors import CheckpointError, RunError, TeacherError
from limbeck.models.loading import load_config, resolve_source
from limbeck.stages.context import Say
from limbeck.stages.run import run_recipe

STAGE = "distil"
TOKEN = "TEACHER_API_KEY"
WARMUP_STEPS, LAMBDA_STEPS, LOG_INTERVAL = 2000, 1000, 100
"""Defaults of a long run; a short one takes a tenth, a fifth and a tenth of its steps."""
FLAGS = {
    "loop.microbatch": "--batch-size, with as many more --micro-batches",
    "data.sequence": "--seq-len",
    "loop.keep_last": "--keep-last-checkpoints",
    "loop.checkpoints": "--checkpoint-dir",
    "teacher.url": "--teacher-endpoint",
    "teacher.protocol": "--protocol",
    "teacher.token_env": f"the environment's {TOKEN}",
}
"""Settings of the recipe that messages speak of, and what they are called here."""


@dataclass(frozen=True)
class DistillTernary:
    """One run.  Every field is a flag of ``limbeck distill-ternary``, and says there what it does.

    None leaves what the recipe says (``student``), takes the machine's own (``device``), or is a share of ``total_steps`` where those are few.
    """

    teacher_endpoint: str
    checkpoint_dir: Path = Path("checkpoints/qwen3-hybrid")
    student: str | None = None
    data: tuple[str, ...] = ()
    recipe: str = "ternary"
    protocol: Literal["limbeck", "vllm", "sglang", "seed"] = "limbeck"
    top_k: int = 64
    keep_last_checkpoints: int = 3
    total_steps: int = 100_000
    warmup_steps: int | None = None
    lambda_steps: int | None = None
    batch_size: int = 4
    seq_len: int = 2048
    lr: float = 0.02
    mhc_lr: float = 1e-4
    kl_weight: float = 0.5
    temperature: float = 2.0
    load_balance_weight: float = 0.01
    router_aux_weight: float = 0.001
    parallel: bool = True
    micro_batches: int = 8
    save_every: int = 1000
    log_interval: int | None = None
    device: str | None = None
    changes: tuple[str, ...] = ()
    """``key=value`` words for anything else in the recipe, applied last."""

    def load(self) -> Recipe:
        """The recipe with all settings in it.  Raises :class:`~limbeck.errors.LimbeckError` that names what does not fit."""
        self._check()
        recipe = load_recipe(self.recipe)
        distil = recipe.stages.get(STAGE)
        if distil is None or distil.kind != "train" or not any(s.kind == "ternarize" for s in distil.student.surgery):
            raise RunError(
                f"--recipe {self.recipe}: it has no train stage '{STAGE}' whose student is made by `ternarize`; `limbeck init ternary` prints one that has"
            )
        words = [f"{STAGE}.{path}={json.dumps(value)}" for path, value in self._settings(distil).items()]
        return load_recipe(self.recipe, [f"name={json.dumps(self._name())}", *words, *self.changes])

    def run(self, *, fresh: bool = False, say: Say = print, console: Console | None = None) -> Path:
        """Train up to the budget, going on from the newest checkpoint.  Returns ``final/``: a checkpoint, with the student in its ``model/``."""
        recipe, folder = self.load(), self.checkpoint_dir
        try:
            reach(recipe.stages[STAGE].teacher)
            _show_log(folder)
            for stage in stage_order(recipe, STAGE):
                run_recipe(
                    recipe, recipe_dir=recipe_folder(self.recipe), run_dir=folder, stage=stage, fresh=fresh and stage == STAGE, say=say,
                    console=console, device=self.device,
                )  # fmt: skip
        except (RunError, CheckpointError, TeacherError) as error:
            raise type(error)(in_flags(str(error))) from error
        return folder / FINAL

    # -- what the flags mean in the recipe ------------------------------------------------------------------------------

    def _check(self) -> None:
        for flag, value, least in (
            ("--total-steps", self.total_steps, 1), ("--batch-size", self.batch_size, 1), ("--micro-batches", self.micro_batches, 1),
            ("--seq-len", self.seq_len, 8), ("--save-every", self.save_every, 1), ("--keep-last-checkpoints", self.keep_last_checkpoints, 0),
        ):  # fmt: skip
            if value < least:
                raise RunError(f"{flag} {value}: must be {least} or more")
        if not 0 <= self.kl_weight <= 1:
            raise RunError(f"--kl-weight {self.kl_weight:g}: is a share of the loss, between 0 (cross-entropy alone) and 1 (KL alone)")
        if (self.warmup_steps or 0) >= self.total_steps:
            raise RunError(f"--warmup-steps {self.warmup_steps}: the learning rate would still rise at the end of {self.total_steps} steps: take fewer")
        if (self.lambda_steps or 0) >= self.total_steps:
            raise RunError(
                f"--lambda-steps {self.lambda_steps}: after {self.total_steps} steps the student is not ternary yet, and no file can hold it: take fewer"
            )

    def _name(self) -> str:
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.checkpoint_dir.resolve().name).lstrip("._-")[:64] or "ternary"

    def _settings(self, distil: Any) -> dict[str, Any]:
        """Path within the stage -> value."""
        total = self.total_steps
        rows = self.batch_size * self.micro_batches
        warmed = self.lambda_steps if self.lambda_steps is not None else min(LAMBDA_STEPS, total // 5)
        # What the recipe says of widths and experts is said of its own model.
        own = {} if self.student is None else {"plan": "auto", "export": []}
        surgery = [part.model_dump(mode="json", by_alias=True) for part in distil.student.surgery]
        settings: dict[str, Any] = {
            "student.surgery": [part | ({"warmup": warmed, **own} if part["kind"] == "ternarize" else {}) for part in surgery],
            "data.sequence": self.seq_len,
            "teacher": self._teacher(),
            "objectives": self._objectives(),
            "optim.groups": [{"role": "ternary", "kind": "muon", "lr": self.lr, "weight_decay": 0.1}, {"kind": "lion", "lr": self.mhc_lr}],
            "optim.schedule.warmup": min(WARMUP_STEPS, total // 10) if self.warmup_steps is None else self.warmup_steps,
            "loop.steps": total,
            **{f"loop.{budget}": None for budget in ("tokens", "samples", "epochs")},
            "loop.batch_tokens": rows * self.seq_len,
            "loop.microbatch": self.batch_size,
            "loop.keep_last": self.keep_last_checkpoints,
            "loop.checkpoint_every": self.save_every,
            "loop.log_every": min(LOG_INTERVAL, max(1, total // 10)) if self.log_interval is None else self.log_interval,
            "loop.log_form": "short",
            "loop.checkpoints": str(self.checkpoint_dir.resolve()),
        }
        if self.student is not None:
            # A path is the user's, not the recipe's.
            source = self.student if self.student.startswith("builtin:") else resolve_source(self.student)
            settings |= {"student.base": source, "data.tokenizer": source}
        if self.data:
            settings["data.source"] = [_source(word) for word in self.data]
        return settings

    def _teacher(self) -> dict[str, Any]:
        token = {"token_env": TOKEN} if os.environ.get(TOKEN) else {}
        flight = {"in_flight": self.micro_batches, "lookahead": 1} if self.parallel else {"in_flight": 1, "lookahead": 0}
        return {"kind": "http", "url": self.teacher_endpoint, "protocol": self.protocol, **flight, **token}

    def _objectives(self) -> list[dict[str, Any]]:
        # vLLM and SGLang know T = 1 alone: the tail's mass at another temperature is estimated there.
        estimated = self.protocol in ("vllm", "sglang") and self.temperature != 1
        kl = {"kind": "topk_kl", "weight": self.kl_weight, "k": self.top_k, "temperature": self.temperature, "allow_approximate_tail": estimated}
        balance = {"kind": "moe_balance", "weight": self.load_balance_weight}
        sure = {"kind": "router_entropy", "weight": self.router_aux_weight}
        routed = [balance, sure] if self.student is None or _has_experts(self.student) else []
        return [o for o in ({"kind": "ce", "weight": 1 - self.kl_weight}, kl, *routed) if o["weight"]]


def reach(teacher: Any) -> None:
    """Ask an endpoint who it is, before anything is prepared or trained.  Raises :class:`~limbeck.errors.TeacherError` if it does not answer."""
    from limbeck.teachers.http.teacher import HttpTeacher

    if teacher.kind != "http" or teacher.launch is not None:
        return
    served = HttpTeacher(teacher)
    try:
        served.load()
    finally:
        served.close()


def in_flags(message: str) -> str:
    """A message about settings of the recipe, with the flags that they are here."""
    named = [f"{setting} is {flag}" for setting, flag in FLAGS.items() if setting in message]
    return f"{message}\n(here {'; '.join(named)})" if named else message


def _show_log(folder: Path) -> None:
    """The stage's log, in the run's folder itself."""
    log = folder / "training.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if log.exists() and not log.is_symlink():
            raise RunError(f"{log}: is there already and is not of a run of this command: name another --checkpoint-dir")
        if int(os.environ.get("RANK", "0")) == 0 and not log.is_symlink():
            log.symlink_to(Path(STAGE) / log.name)
    except OSError as error:
        raise RunError(f"--checkpoint-dir {folder}: cannot be used ({error.strerror}): name a folder that can be written to") from error


def _source(word: str) -> dict[str, Any]:
    """``stdlib``, a file or folder of text, or a data set on the hub (``NAME`` or ``NAME:FIELD``)."""
    if word == "stdlib":
        return {"kind": "stdlib"}
    if Path(word).exists():
        return {"kind": "text", "path": str(Path(word).resolve())}
    name, _, field = word.partition(":")
    return {"kind": "hub", "path": name, **({"field": field} if field else {})}


def _has_experts(source: str) -> bool:
    config = load_config(resolve_source(source)).get_text_config(decoder=True)
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
