"""``limbeck export``: a model folder, or a file for llama.cpp, that leaves the project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from limbeck import api
from limbeck.errors import RunError


def export(
    path: Annotated[str | None, typer.Argument(metavar="RUN_OR_MODEL", help="RUN/STAGE, RUN/STAGE@STEP, or a model folder.", show_default=False)] = None,
    to: Annotated[
        str | None,
        typer.Option(
            help="native (stock transformers; the default where Qwen3.5 can hold the student), hf (needs limbeck to load; the default elsewhere), "
            "peft (what a LoRA generator makes of --prompt), or gguf (llama.cpp; the default for an --output that ends in .gguf).",
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
    """Write a model folder, or a file for llama.cpp.

    \b
    limbeck export runs/hybrid/distil --to hf --output my-model
    limbeck export runs/ternary/distil --output model.gguf --verify
    limbeck export runs/hybrid/distil@200 --dtype float32
    limbeck export runs/lora_generator/generate --to peft --prompt "reverse a list"
    """
    from limbeck.cli.console import say

    if (path is None) == (input is None):
        raise RunError("name what to export once: RUN/STAGE or a model folder, or the same by --input")
    written = api.export_model(
        path or input or "", to, output=output, dtype=dtype, prompt=prompt or (), type=type, scale=scale, group_size=group_size, verify=verify,
        force=force, say=say,
    )  # fmt: skip
    say(f"exported to {written}")
