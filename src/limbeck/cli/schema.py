"""``limbeck schema``: the JSON schema of a recipe, for editors."""

from __future__ import annotations

import json

import typer

from limbeck import api


def schema() -> None:
    """Print the JSON schema of a recipe, for editors.

    \b
    limbeck schema > recipe.schema.json

    An editor with YAML support then completes and checks a recipe whose first line is
    `# yaml-language-server: $schema=recipe.schema.json`.
    """
    typer.echo(json.dumps(api.schema(), indent=1, ensure_ascii=False))
