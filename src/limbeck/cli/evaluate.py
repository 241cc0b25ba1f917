"""``limbeck evaluate``: measure a run or a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    path: Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="RUN/STAGE, or a model folder.")],
    against: Annotated[str | None, typer.Option(help="A model beside it; by default its base.", show_default=False)] = None,
    data: Annotated[str | None, typer.Option(help="Text: a file, folder or glob.", show_default=False)] = None,
    recall_vocabulary: Annotated[
        int | None, typer.Option(min=32, help="Ids that recall probes use, if the model learnt recall on so many.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure a model beside its teacher."""
    from limbeck.cli.console import say
    from limbeck.evaluation.table import comparison_table
    from limbeck.stages.evaluate import evaluate_path

    voice = (lambda thing: typer.echo(thing, err=True)) if as_json else say
    results = evaluate_path(path, against=against, data=data, recall_vocabulary=recall_vocabulary, say=voice)
    if as_json:
        import json

        typer.echo(json.dumps(results, indent=1))
    else:
        say(comparison_table(results))
