"""`limbeck quickstart`: a real distillation on this machine, from a teacher that comes with the package."""

from __future__ import annotations

import json
import time
from pathlib import Path

from rich.console import Console

from limbeck.config.load import load_recipe
from limbeck.evaluation.table import comparison_table
from limbeck.report.html import write_report
from limbeck.stages.context import Say
from limbeck.stages.folder import read_json
from limbeck.stages.run import run_recipe


def quickstart(
    *, directory: Path, train_teacher: bool = False, quick: bool = False, say: Say = print, console: Console | None = None
) -> Path:
    """Align, distil, evaluate and report.  Returns the run directory.

    ``train_teacher`` first makes the teacher anew with the `pretrain` recipe (an hour or two); ``quick`` is a seconds-long form
    that shows the machinery and no quality, for the tests.
    """
    began = time.monotonic()
    overrides = []
    if train_teacher:
        short = ["pretrain.loop.tokens=64k", "spread.loop.tokens=16k", "evaluate.rows=4"] if quick else []
        taught = run_recipe(
            load_recipe("pretrain", short), recipe_dir=Path.cwd(), run_dir=directory / "pretrain", say=say, console=console
        )
        # Quoted: an override's value is read as YAML.
        model = json.dumps(str(taught / "spread" / "model"))
        overrides += [
            f"align.student.base={model}",
            f"align.data.tokenizer={model}",
            f"distil.teacher.model={model}",
        ]
    if quick:
        overrides += [
            "align.data.source.0.limit=100", "align.loop.tokens=4k", "distil.loop.tokens=4k", "align.loop.batch_tokens=512", "distil.loop.batch_tokens=512",
            "evaluate.rows=2", "evaluate.recall.rows=2", "evaluate.speed.contexts=[1024, 32768]", "evaluate.speed.tokens=2",
            "evaluate.samples.tokens=8",
        ]  # fmt: skip
    say("Limbeck quickstart: a softmax model becomes a hybrid that keeps a quarter of its attention layers")
    run_dir = run_recipe(
        load_recipe("quickstart", overrides), recipe_dir=Path.cwd(), run_dir=directory / "hybrid", say=say, console=console
    )
    results = read_json(run_dir / "evaluate" / "evaluation" / "evaluation.json")
    report = write_report(run_dir)
    say("")
    say(comparison_table(results))
    say("")
    say(f"report   {report}")
    say(f"student  {run_dir / 'distil' / 'model'}   (AutoModelForCausalLM loads it after `import limbeck`)")
    say(f"run      {run_dir}   (curves in */metrics.jsonl, resolved recipe in recipe.json)")
    say(f"try      limbeck generate {run_dir / 'distil' / 'model'} --prompt 'def main('")
    say(f"took     {time.monotonic() - began:.0f} s")
    return run_dir
