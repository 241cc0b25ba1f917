"""``limbeck evaluate``: measure a run or a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from limbeck.cli.lm_eval import need_harness
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
    """Measure a model beside its teacher, or on tasks of lm-evaluation-harness (what is said behind --tasks goes with it).

    \b
    limbeck evaluate runs/hybrid/distil
    limbeck evaluate runs/hybrid/distil --tasks arc_easy,mytasks/foo.yaml --against Qwen/Qwen3-0.6B
    limbeck evaluate runs/lora-generator/generate --tasks mytasks/foo.yaml --condition "reverse a list"
    """
    from limbeck.cli.console import say

    voice = (lambda thing: typer.echo(thing, err=True)) if as_json else say
    if tasks:
        _refuse("is for the measures on text, and --tasks asks for other ones: leave it out", data=data, recall_vocabulary=recall_vocabulary)
        how = {"limit": limit or None, "fewshot": num_fewshot, "chat_template": apply_chat_template, "max_length": max_length, "dtype": dtype}
        reading = (condition or [], condition_file or [], named)
        results, table = _on_tasks(str(path), tasks, include_path or [], against, how, batch_size, reading, out, voice)
    else:
        _refuse(
            "goes with --tasks: name tasks, or leave it out", include_path=include_path, num_fewshot=num_fewshot, limit=limit, max_length=max_length,
            apply_chat_template=apply_chat_template or None, condition=condition, condition_file=condition_file, named=named, out=out,
            batch_size=None if batch_size == "8" else batch_size, dtype=None if dtype == "float32" else dtype,
        )  # fmt: skip
        from limbeck.evaluation.table import comparison_table
        from limbeck.stages.evaluate import evaluate_path

        results, table = evaluate_path(path, against=against, data=data, recall_vocabulary=recall_vocabulary, say=voice), comparison_table
    if as_json:
        import json

        typer.echo(json.dumps(results, indent=1))
    else:
        say(table(results))


def _on_tasks(
    path: str, tasks: list[str], include: list[Path], against: str | None, how: dict[str, Any], batch_size: str, reading: Any, out: Path | None, say: Any
) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]:
    need_harness("`limbeck evaluate --tasks`")
    if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size)):
        raise LimbeckError(f"--batch-size {batch_size}: allowed are a number from 1 on, and auto")
    names = [name for words in tasks for name in words.split(",") if name]
    try:
        from limbeck.evaluation.harness_table import harness_table
        from limbeck.stages.generate import Reads, texts_of
        from limbeck.stages.harness import HarnessSettings, evaluate_tasks
    except ModuleNotFoundError as error:
        raise LimbeckError(f"`limbeck evaluate --tasks`: lm_eval needs {error.name}, which is not installed: pip install 'limbeck[lm-eval]'") from error
    texts, files, named = reading
    reads = Reads([*texts, *texts_of(files)], named)
    settings = HarnessSettings(**how, batch_size=batch_size if batch_size == "auto" else int(batch_size))
    return evaluate_tasks(path, names, settings, include=include, against=against, reads=reads, out=out, say=say), harness_table


def _refuse(why: str, **given: Any) -> None:
    for option, value in given.items():
        if value is not None:
            raise LimbeckError(f"--{option.replace('_', '-')}: {why}")
