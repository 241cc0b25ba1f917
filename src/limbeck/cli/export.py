"""``limbeck export``: a model folder that leaves the project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    path: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="RUN/STAGE, RUN/STAGE@STEP, or a model folder.")],
    to: Annotated[str, typer.Option(help="hf (needs limbeck to load), native (stock transformers), or peft (what a LoRA generator makes of --prompt).")] = "hf",
    output: Annotated[Path | None, typer.Option(help="Folder to write; beside the stage by default.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16 (the default, but for peft).", show_default=False)] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text that a LoRA generator reads; several times for several.", show_default=False)] = None,
) -> None:
    """Write a model folder from a run or a model."""
    from limbeck.cli.console import say
    from limbeck.stages.export import export_path

    say(f"exported to {export_path(path, to=to, output=output, dtype=dtype, prompts=prompt or (), say=say)}")
