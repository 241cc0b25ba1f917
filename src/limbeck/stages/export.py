"""The export stage, and `limbeck export`: a model folder that leaves the project."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from limbeck.adapters.peft_experts import taken_for_experts
from limbeck.adapters.peft_files import write_peft
from limbeck.config.parts.stages import ExportStageOptions, GgufOptions
from limbeck.config.recipe import NAME
from limbeck.data.conditions.store import ConditionSet
from limbeck.engine.checkpoint import FINAL, MANIFEST, load_parameters, saved_steps, step_name
from limbeck.errors import RunError, did_you_mean
from limbeck.export.native import fits_native, write_native
from limbeck.export.places import check_file, check_new_folder, writing
from limbeck.files import sha256
from limbeck.models.loading import load_config, load_model, load_tokenizer, resolve_source, save_model
from limbeck.report.card import model_card
from limbeck.report.run import read_run
from limbeck.stages.adapting import condition_of, conditions_stage, open_conditions, open_generator, reader_options
from limbeck.stages.context import Say, StageContext
from limbeck.stages.export_gguf import SUFFIX, export_gguf
from limbeck.stages.folder import digest, model_of, read_json
from limbeck.stages.run import load_plugins_of, open_stage
from limbeck.stages.train import checkpoint_folder, student_of, trained_model
from limbeck.stages.train_adapters import safe
from limbeck.students.generator.student import WEIGHTS, is_generator


class ExportStage:
    """Writes ``export/<format>/``."""

    def __init__(self, context: StageContext):
        self.context = context
        self.options: ExportStageOptions = context.options

    def run(self) -> None:
        """Write each format."""
        folder = trained_model(self.context, self.options.from_)
        if is_generator(folder) != ("peft" in self.options.to):
            made, wanted = ("a LoRA generator", "`to: peft`") if is_generator(folder) else ("a model", "`hf` or `native`")
            raise RunError(f"stage '{self.context.name}': stage '{self.options.from_}' trained {made}: export it with {wanted}")
        if "peft" in self.options.to:
            self.context.once(partial(self._adapters, folder))
            return
        for form in self.options.to:
            out = self.context.folder / "export" / form
            if form == GGUF:
                out = out / f"{self.options.from_}{SUFFIX}"
                self.context.once(partial(self._gguf, folder, out))
                self.context.say(f"  {out}")
                continue
            self.context.once(partial(export_model, folder, out, self.options.dtype or "bfloat16", self.context.run_dir, form))
            self.context.say(f"  {out}")

    def _gguf(self, folder: Path, out: Path) -> None:
        context, options = self.context, self.options
        data = partial(_held_out, context, getattr(context.stage_options(options.from_), "data", None))
        export_gguf(folder, out, options.gguf, dtype=options.dtype or "bfloat16", held_out=data, say=context.say)

    def _adapters(self, folder: Path) -> None:
        context, options = self.context, self.options
        stage = conditions_stage(context, getattr(context.stage_options(options.from_), "data", None))
        wanted: dict[str, Any] = dict(options.prompts)
        conditions = None if stage is None else open_conditions(context, stage)
        for pattern in options.conditions:
            known = {c.name: c.id for c in conditions.conditions} if conditions is not None else {}
            found = [name for name in known if fnmatchcase(name, pattern)]
            if not found:
                raise RunError(f"stage '{context.name}': conditions: no condition matches {pattern!r}{did_you_mean(pattern, known) or ''}")
            wanted |= {name: known[name] for name in found}
        out = context.folder / "export" / "peft"
        export_adapters(context, folder, out, wanted, options.dtype or "float32", conditions)
        (out / "README.md").write_text(model_card(read_run(context.run_dir), peft=True), encoding="utf-8")


def export_adapters(
    context: StageContext, folder: Path, out: Path, wanted: dict[str, Any], dtype: str, conditions: ConditionSet | None = None
) -> list[Path]:
    """One PEFT folder for each of ``wanted``: a name, and the number of a condition or the texts that the generator reads."""
    student = open_generator(context, folder, conditions, dtype=torch.float32)
    as_parameters = taken_for_experts(student.model, student.spec)
    tokenizer = load_tokenizer(str(folder))
    written = []
    for number, (name, source) in enumerate(wanted.items()):
        if isinstance(source, int):
            assert conditions is not None
            ids = torch.from_numpy(conditions.texts.of(np.array([source])))
        else:
            ids = condition_of(list(source), tokenizer, *student.text_shape)
        with torch.no_grad():
            adapters = student.generate(ids).detach()
        target = out / (name if NAME.fullmatch(name) else safe(name, number))
        provenance = {
            "generator": sha256(folder / WEIGHTS),
            "condition": name,
            "condition_hash": digest(ids.tolist()),
            "base": student.base["fingerprint"],
        }
        write_peft(
            adapters, 0, target, base=student.base["source"], provenance=provenance, dtype=getattr(torch, dtype), as_parameters=as_parameters
        )
        context.say(f"  {target}")
        written.append(target)
    return written


FORMATS: dict[str, Callable[..., None]] = {"hf": save_model, "native": write_native}
"""Writers of models by format."""
PEFT = "peft"
"""What a LoRA generator writes."""
GGUF = "gguf"
"""A file for llama.cpp."""


def _held_out(context: StageContext, data: Any) -> Path | None:
    """The prepared text of a train stage, if documents of it are held out."""
    if data is None:
        return None
    folder, chosen = context.data(data)
    return folder if chosen.held_out else None


def export_model(folder: Path, out: Path, dtype: str, run_dir: Path | None = None, form: str = "hf") -> Path:
    """A model folder in the wanted format and dtype, with tokenizer, chat template, generation settings and, from a run, a model card."""
    model = load_model(str(folder))
    with writing(out):
        FORMATS[form](model, out, tokenizer_source=str(folder), dtype=getattr(torch, dtype))
    if run_dir is not None:
        (out / "README.md").write_text(model_card(read_run(run_dir), stock=form == "native"), encoding="utf-8")
    return out


def export_path(
    run_or_model: str,
    *,
    to: str | None = None,
    output: Path | None = None,
    dtype: str | None = None,
    prompts: Sequence[str] = (),
    gguf: GgufOptions | None = None,
    say: Say = print,
) -> Path:
    """Export ``RUN/STAGE``, ``RUN/STAGE@STEP`` (a checkpoint) or a model folder; of a LoRA generator, the adapter for ``prompts``.

    An output that ends in ``.gguf`` is a format too, where ``to`` names none.  By default a finished student that Qwen3.5 can hold is
    written as ``native``, which opens without Limbeck, and everything else as ``hf``.
    """
    known = (*FORMATS, PEFT, GGUF)
    by_default = to is None
    to = to or (GGUF if output is not None and output.suffix.lower() == SUFFIX else "hf")
    if to not in known:
        raise RunError(f"--to {to}: not a format{did_you_mean(to, known) or ';'} allowed: {', '.join(known)}")
    if gguf not in (None, GgufOptions()) and to != GGUF:
        raise RunError(f"--type, --scale, --group-size, --verify and --force are for --to {GGUF}, and this is --to {to}")
    if to == GGUF and output is not None and output.suffix.lower() != SUFFIX:
        raise RunError(f"--output {output}: a GGUF file ends in {SUFFIX}")
    if dtype not in (None, "float32", "bfloat16"):
        raise RunError(f"--dtype {dtype}: allowed are float32 and bfloat16")
    if to == PEFT:
        return _export_generated(run_or_model, output, dtype or "float32", prompts)
    dtype = dtype or "bfloat16"
    if prompts:
        raise RunError(f"--prompt: is what a LoRA generator reads: it goes with --to {PEFT}")
    match = re.fullmatch(r"(.+)@(\d+)", run_or_model)
    path = Path(match[1] if match else resolve_source(run_or_model) if run_or_model.startswith("builtin:") else run_or_model).resolve()
    if output is not None:
        _check_output(output, to, path)
    load_plugins_of(path)
    if match:
        _check_checkpoint(path, run_or_model)
    if match and to == GGUF:
        return _gguf_of_checkpoint(path, int(match[2]), output, dtype, gguf or GgufOptions(), say)
    if match:
        out = output or path / "export" / step_name(int(match[2]))
        return _export_checkpoint(path, int(match[2]), out, dtype, say, to)
    folder = path / "model" if (path / "model").is_dir() else path
    if is_generator(folder):
        raise RunError(f"{run_or_model}: holds what reads conditions, not a model: --to {PEFT} --prompt TEXT writes the LoRA that a generator makes of a text")
    if not (folder / "config.json").exists():
        if not (path / "stage.json").exists():
            model_of(path)
        stage = open_stage(path) if (path / "stage.json").exists() else None
        if stage is not None and stage.options.kind != "train":
            raise RunError(f"{run_or_model}: is a {stage.options.kind} stage, which makes no model: name a train stage")
        steps = [] if stage is None else list(saved_steps(checkpoint_folder(stage)))
        hint = f"; it has checkpoints, so {run_or_model}@{steps[-1]} exports the newest" if steps else ""
        raise RunError(f"{run_or_model}: neither a model folder (no config.json) nor a finished train stage{hint or ': name one of the two'}")
    in_run = folder != path and (path / "stage.json").exists()
    # Nothing is put into a checkpoint: what is not in its manifest is damage.
    home = path.parent if (path / MANIFEST).exists() else path
    if to == GGUF:
        out = output or home / "export" / GGUF / f"{path.name}{SUFFIX}"
        return export_gguf(folder, out, gguf or GgufOptions(), dtype=dtype, held_out=partial(_text_of, path if in_run else None), say=say)
    if by_default and fits_native(load_config(str(folder))):
        to = "native"
        say("as native: Qwen3.5 computes the same, and stock transformers loads that; `--to hf` keeps the student's own form")
    return export_model(folder, output or home / "export" / to, dtype, path.parent if in_run else None, to)


def _check_output(output: Path, to: str, source: Path) -> None:
    """Refuse a place that cannot be written or holds something else, before anything is loaded."""
    if to == GGUF:
        check_file(output)
    else:
        check_new_folder(output, source)


def _check_checkpoint(stage_folder: Path, named: str) -> None:
    """A checkpoint of other stages than train is no model, nor is one of a LoRA generator."""
    if not (stage_folder / "stage.json").exists():
        return
    options: Any = open_stage(stage_folder).options
    if options.kind != "train":
        raise RunError(f"{named}: '{stage_folder.name}' is a {options.kind} stage, which makes no model: name a train stage")
    if reader_options(options.student) is not None or is_generator(stage_folder / "model"):
        raise RunError(
            f"{named}: is a checkpoint of a LoRA generator, which is no model: run its stage to the end, and export what it generates by "
            f"{stage_folder.name} --to {PEFT} --prompt TEXT"
        )


def _text_of(stage_folder: Path | None) -> Path | None:
    """The prepared text of a run's train stage, by its folder."""
    if stage_folder is None:
        return None
    context = open_stage(stage_folder)
    context.say = lambda line: None
    return _held_out(context, getattr(context.options, "data", None))


def _gguf_of_checkpoint(stage_folder: Path, step: int, output: Path | None, dtype: str, options: GgufOptions, say: Say) -> Path:
    """A checkpoint as a file: its model is written beside it first, since files are read tensor by tensor."""
    out = output or stage_folder / "export" / GGUF / f"{step_name(step)}{SUFFIX}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{step_name(step)}-") as beside:
        folder = Path(beside) / step_name(step)
        _export_checkpoint(stage_folder, step, folder, "float32", say, "hf")
        return export_gguf(folder, out, options, dtype=dtype, held_out=partial(_text_of, stage_folder), say=say)


def _export_generated(run_or_model: str, output: Path | None, dtype: str, prompts: Sequence[str]) -> Path:
    path = Path(run_or_model).resolve()
    folder = path / "model" if (path / "model").is_dir() else path
    if not is_generator(folder):
        hint = ": a checkpoint is none, so run its stage to the end and name RUN/STAGE" if re.fullmatch(r".+@\d+", run_or_model) else ""
        raise RunError(f"{run_or_model}: holds no trained LoRA generator, and --to peft writes what one generates{hint}")
    if not prompts:
        raise RunError("--to peft: a generator needs something to read: give it by --prompt TEXT (several times for several texts)")
    if folder == path:
        raise RunError(f"{path}: name the generator's stage, RUN/STAGE: its run knows where the base lies")
    if output is not None:
        _check_output(output, PEFT, path)
    context = open_stage(path)
    context.say = lambda line: None
    out = output or path / "export" / "peft"
    (written,) = export_adapters(context, folder, out.parent, {out.name: list(prompts)}, dtype)
    return written


def _export_checkpoint(stage_folder: Path, step: int, out: Path, dtype: str, say: Say, form: str) -> Path:
    if not (stage_folder / "stage.json").exists():
        raise RunError(f"{stage_folder}: not a train stage's folder; give RUN/STAGE@STEP")
    context = open_stage(stage_folder)
    context.say = say
    options: Any = context.options
    student = student_of(context, options.student, seed=options.seed, dtype=torch.float32)
    load_parameters(_checkpoint(checkpoint_folder(context), step), student)
    folder, _ = context.data(options.data)
    with writing(out):
        FORMATS[form](student.model, out, tokenizer_source=str(folder / "tokenizer"), dtype=getattr(torch, dtype))
    return out


def _checkpoint(folder: Path, step: int) -> Path:
    """The checkpoint of a step; the final one carries its step inside."""
    final = folder / FINAL
    if (final / "state.json").exists() and read_json(final / "state.json")["step"] == step:
        return final
    return folder / step_name(step)
