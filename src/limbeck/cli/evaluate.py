"""``limbeck evaluate``: measure a run or a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from limbeck import api
from limbeck.errors import LimbeckError


def evaluate(
    path: Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="RUN/STAGE, or a model folder; with --tasks also builtin:NAME or a hub name.")],
    against: Annotated[str | None, typer.Option(help="A model beside it; by default its base (with --tasks: none).", show_default=False)] = None,
    data: Annotated[str | None, typer.Option(help="Text: a file, folder or glob.", show_default=False)] = None,
    recall_vocabulary: Annotated[
        int | None, typer.Option(min=32, help="Ids that recall probes use, if the model learnt recall on so many.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    tasks: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|FILE.yaml,...", help="Run these tasks of lm-evaluation-harness instead.", show_default=False),
    ] = None,
    include_path: Annotated[
        list[Path] | None, typer.Option(metavar="FOLDER", help="Task files that --tasks may name by their task.", show_default=False)
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Solved examples before each question.", show_default=False)] = None,
    limit: Annotated[
        float | None, typer.Option(min=0, help="Only so many documents of a task, or a share below 1: to try it.", show_default=False)
    ] = None,
    batch_size: Annotated[str, typer.Option(metavar="N|auto", help="Requests at once.")] = "8",
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens that the model sees at once; by default what it was made for.", show_default=False)
    ] = None,
    apply_chat_template: Annotated[bool, typer.Option("--apply-chat-template", help="Ask in the model's chat template.")] = False,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")] = "float32",
    condition: Annotated[
        list[str] | None, typer.Option(help="Text that a LoRA generator reads, once, for all tasks.", show_default=False)
    ] = None,
    condition_file: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="The same from a file: each is one text.", show_default=False)
    ] = None,
    named: Annotated[
        str | None, typer.Option(metavar="NAME", help="A condition of the generator's own data instead.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where lm_eval.json goes.", show_default=False)] = None,
) -> None:
    """Measure a model beside its teacher, or on tasks.

    \b
    limbeck evaluate runs/hybrid/distil
    limbeck evaluate runs/hybrid/distil --tasks arc_easy,mytasks/foo.yaml --against Qwen/Qwen3-0.6B
    limbeck evaluate runs/lora_generator/generate --tasks mytasks/foo.yaml --condition "reverse a list"

    Tasks are those of lm-evaluation-harness; every option from --include-path on goes with --tasks.
    """
    from limbeck.cli.console import say

    voice = (lambda thing: typer.echo(thing, err=True)) if as_json else say
    if tasks:
        _refuse("is for the measures on text, and --tasks asks for other ones: leave it out", data=data, recall_vocabulary=recall_vocabulary)
        if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size)):
            raise LimbeckError(f"--batch-size {batch_size}: allowed are a number from 1 on, and auto")
        results = api.evaluate_tasks(
            path, [name for words in tasks for name in words.split(",") if name], include=include_path or (), against=against, fewshot=num_fewshot,
            limit=limit or None, batch_size="auto" if batch_size == "auto" else int(batch_size), max_length=max_length,
            chat_template=apply_chat_template, dtype=dtype, condition=condition or (), condition_files=condition_file or (), named=named, out=out,
            say=voice,
        )  # fmt: skip
        from limbeck.evaluation.harness_table import harness_table as table
    else:
        _refuse(
            "goes with --tasks: name tasks, or leave it out", include_path=include_path, num_fewshot=num_fewshot, limit=limit, max_length=max_length,
            apply_chat_template=apply_chat_template or None, condition=condition, condition_file=condition_file, named=named, out=out,
            batch_size=None if batch_size == "8" else batch_size, dtype=None if dtype == "float32" else dtype,
        )  # fmt: skip
        results = api.evaluate(path, against=against, data=data, recall_vocabulary=recall_vocabulary, say=voice)
        from limbeck.evaluation.table import comparison_table as table
    if as_json:
        typer.echo(json.dumps(results, indent=1))
    else:
        say(table(results))


def _refuse(why: str, **given: Any) -> None:
    for option, value in given.items():
        if value is not None:
            raise LimbeckError(f"--{option.replace('_', '-')}: {why}")
