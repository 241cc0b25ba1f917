"""The export stage, and `limbeck export`: a model folder that leaves the project."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from limbeck.config.parts.stages import ExportStageOptions
from limbeck.engine.checkpoint import load_parameters
from limbeck.errors import RunError, did_you_mean
from limbeck.export.native import write_native
from limbeck.models.loading import load_model, save_model
from limbeck.report.card import model_card
from limbeck.report.run import read_run
from limbeck.stages.context import Say, StageContext
from limbeck.stages.folder import read_json
from limbeck.stages.run import open_stage
from limbeck.stages.train import student_of, trained_model


class ExportStage:
    """Writes ``export/<format>/``."""

    def __init__(self, context: StageContext):
        self.context = context
        self.options: ExportStageOptions = context.options

    def run(self) -> None:
        """Write each format."""
        folder = trained_model(self.context, self.options.from_)
        for form in self.options.to:
            out = self.context.folder / "export" / form
            self.context.once(partial(export_model, folder, out, self.options.dtype, self.context.run_dir, form))
            self.context.say(f"  {out}")


FORMATS: dict[str, Callable[..., None]] = {"hf": save_model, "native": write_native}
"""Writers by format."""


def export_model(folder: Path, out: Path, dtype: str, run_dir: Path | None = None, form: str = "hf") -> Path:
    """A model folder in the wanted format and dtype, with tokenizer, chat template, generation settings and, from a run, a model card."""
    FORMATS[form](load_model(str(folder)), out, tokenizer_source=str(folder), dtype=getattr(torch, dtype))
    if run_dir is not None:
        (out / "README.md").write_text(model_card(read_run(run_dir), stock=form == "native"), encoding="utf-8")
    return out


def export_path(
    run_or_model: str, *, to: str = "hf", output: Path | None = None, dtype: str = "bfloat16", say: Say = print
) -> Path:
    """Export ``RUN/STAGE``, ``RUN/STAGE@STEP`` (a checkpoint) or a model folder."""
    if to not in FORMATS:
        raise RunError(f"--to {to}: not a format{did_you_mean(to, FORMATS) or ';'} allowed: {', '.join(FORMATS)}")
    if dtype not in ("float32", "bfloat16"):
        raise RunError(f"--dtype {dtype}: allowed are float32 and bfloat16")
    match = re.fullmatch(r"(.+)@(\d+)", run_or_model)
    path = Path(match[1] if match else run_or_model).resolve()
    if match:
        out = output or path / "export" / f"step-{int(match[2])}"
        return _export_checkpoint(path, int(match[2]), out, dtype, say, to)
    folder = path / "model" if (path / "model").is_dir() else path
    if not (folder / "config.json").exists():
        steps = sorted(int(p.name.removeprefix("step-")) for p in (path / "checkpoints").glob("step-*"))
        hint = f"; it has checkpoints, so {run_or_model}@{steps[-1]} exports the newest" if steps else ""
        raise RunError(f"{run_or_model}: neither a model folder (no config.json) nor a finished train stage{hint}")
    in_run = folder != path and (path.parent / "recipe.json").exists()
    return export_model(folder, output or path / "export" / to, dtype, path.parent if in_run else None, to)


def _export_checkpoint(stage_folder: Path, step: int, out: Path, dtype: str, say: Say, form: str) -> Path:
    if not (stage_folder / "stage.json").exists():
        raise RunError(f"{stage_folder}: not a train stage's folder; give RUN/STAGE@STEP")
    context = open_stage(stage_folder)
    context.say = say
    options: Any = context.options
    student = student_of(context, options.student, seed=options.seed, dtype=torch.float32)
    load_parameters(_checkpoint(stage_folder / "checkpoints", step), student)
    folder, _ = context.data(options.data)
    FORMATS[form](student.model, out, tokenizer_source=str(folder / "tokenizer"), dtype=getattr(torch, dtype))
    return out


def _checkpoint(folder: Path, step: int) -> Path:
    """The checkpoint of a step; the final one carries its step inside."""
    final = folder / "final"
    if (final / "state.json").exists() and read_json(final / "state.json")["step"] == step:
        return final
    return folder / f"step-{step:08d}"
