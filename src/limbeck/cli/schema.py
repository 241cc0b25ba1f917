"""``limbeck schema``: the JSON schema of a recipe, for editors."""

from __future__ import annotations

import typer


def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    import json

    from limbeck.config.explain import json_schema

    typer.echo(json.dumps(json_schema(), indent=1, ensure_ascii=False))
