"""Arguments that several verbs take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from limbeck.cli.complete import override_words, recipe_names, stage_names

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.", autocompletion=recipe_names)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Changes, such as align.loop.tokens=1M.", show_default=False, autocompletion=override_words
    ),
]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Where the run lives; runs/NAME by default.", show_default=False)]
StageOption = Annotated[
    str | None,
    typer.Option("--stage", help="Only this stage; its inputs must be done.", show_default=False, autocompletion=stage_names),
]
Folders = Annotated[list[Path], typer.Argument(metavar="FOLDER", help="Folders with an adapter_config.json.")]
