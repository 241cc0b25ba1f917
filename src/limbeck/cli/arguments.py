"""Arguments that several verbs take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes, such as align.loop.tokens=1M.", show_default=False)
]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Where the run lives; runs/NAME by default.", show_default=False)]
