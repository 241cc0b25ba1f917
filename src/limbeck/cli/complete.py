"""What a shell offers when TAB is pressed.  It is asked at every press: nothing heavy is imported, and a mistake offers nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from textwrap import shorten
from typing import Any

import typer

Candidates = list[tuple[str, str] | str]
_WIDTH = 60


def _quiet(offer: Callable[[typer.Context, str], Candidates]) -> Callable[..., Candidates]:
    """Nothing is offered for a recipe that is broken: who runs it is told why."""

    @wraps(offer)
    def offered(ctx: Any, incomplete: str) -> Candidates:
        try:
            return [word if isinstance(word, str) else (word[0], _line(word[1])) for word in offer(ctx, incomplete)]
        except Exception:
            return []

    # typer asks for the parameters by the wrapper's own names.
    del offered.__wrapped__
    return offered


def _line(text: str) -> str:
    """What stands beside a word: short, since it must not break, and without what shells and rich read as their own."""
    return shorten(re.sub(r"[`'\"\[\]]", "", text), _WIDTH, placeholder=" …")


@_quiet
def recipe_names(ctx: typer.Context, incomplete: str) -> Candidates:
    """Shipped recipes.  Where none fits, the shell offers files."""
    # Not from config.load, which imports the whole schema.
    folder = Path(__file__).parents[1] / "recipes"
    return [(path.stem, _described(path)) for path in sorted(folder.glob(f"{_plain(incomplete)}*.yaml"))]


def _plain(incomplete: str) -> str:
    return "".join(c for c in incomplete if c.isalnum() or c in "_-.")


def _described(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip().strip("\"'") for line in lines if line.startswith("description:")), "")


@_quiet
def override_words(ctx: typer.Context, incomplete: str) -> Candidates:
    """``key=value`` words for the recipe that is named before them."""
    from limbeck.config.complete import override_candidates

    recipe, words = _recipe_of(ctx), list(ctx.params.get("overrides") or ctx.params.get("changes") or ())
    if len(words) > 1 and words[-1] == "=":
        # bash breaks words at `=`, and wants what stands behind it.
        key = f"{words[-2]}="
        return [word.removeprefix(key) for word, _ in override_candidates(recipe, f"{key}{incomplete}")]
    return list(override_candidates(recipe, incomplete))


@_quiet
def stage_names(ctx: typer.Context, incomplete: str) -> Candidates:
    """Stages of the recipe that is named."""
    from limbeck.config.complete import stage_candidates

    return list(stage_candidates(_recipe_of(ctx)))


def _recipe_of(ctx: typer.Context) -> str:
    # An option that still waits for its value stops typer before it has named the arguments.
    return str(ctx.params.get("recipe") or ctx.params.get("what") or ctx.args[0])


@_quiet
def kind_names(ctx: typer.Context, incomplete: str) -> Candidates:
    """Words that ``limbeck ls`` takes."""
    import limbeck.config.parts  # noqa: F401  (fills the registries)
    from limbeck.config.explain import kinds

    return list(kinds())


@_quiet
def explained_names(ctx: typer.Context, incomplete: str) -> Candidates:
    """Recipes, parts, kinds with their parts, and fields with what they stand in."""
    from limbeck.config.explain import index, summary
    from limbeck.config.load import shipped_recipes
    from limbeck.registry import REGISTRIES

    parts = {name: summary(registry.options(name)) for registry in REGISTRIES.values() for name in registry}
    named = {f"{kind}.{name}": "" for kind, registry in REGISTRIES.items() for name in registry}
    fields = {word: "" for entry in index() for word in (entry.key, ".".join(entry.path[-2:]))}
    whole = dict.fromkeys(shipped_recipes(), "recipe") | parts
    # Short names first; the longer ones when there is a dot to go by.
    return list(
        (whole | fields | named if "." in incomplete else whole | {k: v for k, v in fields.items() if "." not in k}).items()
    )


@_quiet
def device_names(ctx: typer.Context, incomplete: str) -> Candidates:
    """Devices of the planner's table."""
    from limbeck.planner.devices import DEVICES

    return list(DEVICES)
