"""``limbeck export``: a model folder, or a file for llama.cpp, that leaves the project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    path: Annotated[str | None, typer.Argument(metavar="RUN_OR_MODEL", help="RUN/STAGE, RUN/STAGE@STEP, or a model folder.", show_default=False)] = None,
    to: Annotated[
        str | None,
        typer.Option(
            help="hf (needs limbeck to load; the default), native (stock transformers), peft (what a LoRA generator makes of --prompt), or gguf "
            "(llama.cpp; the default for an --output that ends in .gguf).",
            show_default=False,
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder or .gguf file to write; beside the stage by default.", show_default=False)] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16 (the default, but for peft); with gguf of what is not ternary.", show_default=False)
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text that a LoRA generator reads; several times for several.", show_default=False)] = None,
    input: Annotated[str | None, typer.Option(help="The same as RUN_OR_MODEL.", show_default=False)] = None,
    type: Annotated[
        str, typer.Option(help="gguf: tq2_0, tq1_0, q2_0 (slower than bf16 on x86), f32, bf16, or auto: the first ternary type that fits each weight.")
    ] = "auto",
    scale: Annotated[
        str | None, typer.Option(help="gguf: row, tensor, expert or group: what shares a scale, where --force rounds.", show_default=False)
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="gguf: a scale for each so many inputs; 64 and 128 go to q2_0.", show_default=False)
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="gguf: load the file in llama.cpp and compare it with torch.")] = False,
    force: Annotated[bool, typer.Option("--force", help="gguf: round a model that was not trained ternary, and say what that costs.")] = False,
) -> None:
    """Write a model folder, or a file for llama.cpp, from a run or a model."""
    from pydantic import ValidationError

    from limbeck.cli.console import say
    from limbeck.config.parts.stages import GgufOptions
    from limbeck.errors import RunError
    from limbeck.stages.export import export_path

    if (path is None) == (input is None):
        raise RunError("name what to export once: RUN/STAGE or a model folder, or the same by --input")
    try:
        gguf = GgufOptions.model_validate({"type": type, "scale": scale, "group_size": group_size, "verify": verify, "force": force})
    except ValidationError as error:
        problems = [f"{_flag(found['loc'])}{found['msg'].removeprefix('Value error, ')}" for found in error.errors()]
        raise RunError("; ".join(problems)) from error
    say(f"exported to {export_path(path or input or '', to=to, output=output, dtype=dtype, prompts=prompt or (), gguf=gguf, say=say)}")


def _flag(location: tuple[int | str, ...]) -> str:
    return f"--{str(location[0]).replace('_', '-')}: " if location else ""
