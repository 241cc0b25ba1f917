"""The reference, made from the schema: what `limbeck explain`, `init`, `ls` and `--help` say, as pages.

Nothing here knows a part, a field, a recipe or a verb by name, so nothing can be forgotten.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from itertools import groupby
from textwrap import dedent
from typing import Any

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from limbeck.cli.app import app
from limbeck.config.base import From
from limbeck.config.explain import Entry, default_of, header, help_of, index, json_schema, kinds, known, some, summary
from limbeck.config.fields import (
    DictShape,
    ListShape,
    ModelShape,
    PartShape,
    ScalarShape,
    Shape,
    Shapes,
    describe,
    field_shapes,
    fields_of,
    flat,
    shapes,
    with_article,
)
from limbeck.config.load import find_recipe, load_recipe, shipped_recipes, shipped_tree
from limbeck.config.plugins import load_entry_points
from limbeck.config.recipe import Recipe
from limbeck.config.template import class_for
from limbeck.registry import REGISTRIES, Registry

_LONGEST = 30
"""Lines of an example."""
_WIDTH = 90
"""Characters a line of `--help`."""


def pages() -> dict[str, str]:
    """Every page of the reference: its path below `reference/` -> Markdown (and the JSON schema, for editors)."""
    load_entry_points()
    recipes = {name: load_recipe(name) for name in shipped_recipes()}
    entries, uses = index(), _uses()
    groups = _groups(entries)
    links = {cls: f"mappings.md#{_slug(title)}" for cls, title in groups.items()} | {Recipe: "recipe.md"}
    found = {"recipe.md": _recipe_page(links)}
    for plural, kind in kinds().items():
        if kind in REGISTRIES:
            found[f"{plural}.md"] = _kind_page(plural, REGISTRIES[kind], entries, uses, links)
    found["mappings.md"] = _mappings_page(groups, entries, uses, links)
    found["commands.md"] = _commands_page()
    found["recipes/index.md"] = _recipes_page(recipes)
    found |= {f"recipes/{name}.md": _one_recipe(name, recipe) for name, recipe in recipes.items()}
    found["recipe.schema.json"] = json.dumps(json_schema(), indent=1, ensure_ascii=False)
    return {"index.md": _index_page(recipes), **found}


def navigation() -> list[Any]:
    """The reference's part of the site's menu."""
    parts = [{plural.capitalize(): f"reference/{plural}.md"} for plural, kind in kinds().items() if kind in REGISTRIES]
    recipes = ["reference/recipes/index.md", *({name: f"reference/recipes/{name}.md"} for name in shipped_recipes())]
    return [
        "reference/index.md",
        {"Command line": "reference/commands.md"},
        {"A recipe": "reference/recipe.md"},
        *parts,
        {"Mappings": "reference/mappings.md"},
        {"Shipped recipes": recipes},
    ]


def verbs(command: Any = None, path: tuple[str, ...] = ("limbeck",)) -> Iterator[tuple[str, str]]:
    """`(words, what --help prints)` of the command line itself and of every verb, groups before what is in them."""
    command = command or typer.main.get_command(app)
    context = command.context_class(command, info_name=" ".join(path), terminal_width=_WIDTH, max_content_width=_WIDTH)
    yield " ".join(path), command.get_help(context)
    for name in command.list_commands(context) if hasattr(command, "list_commands") else ():
        yield from verbs(command.get_command(context, name), (*path, name))


def _index_page(recipes: dict[str, Recipe]) -> str:
    names = {plural: list(REGISTRIES[kind]) for plural, kind in kinds().items() if kind in REGISTRIES}
    rows = [
        f"| [{plural}]({plural}.md) | {len(found)} | {', '.join(f'`{name}`' for name in found)} |"
        for plural, found in names.items()
    ]
    table = "\n".join([*rows, f"| [recipes](recipes/index.md) | {len(recipes)} | {', '.join(f'`{name}`' for name in recipes)} |"])
    return f"""# Reference

Made from the schema when this site is built: the same words as `limbeck explain NAME`, `limbeck ls` and `--help` print, for the version
that is installed. What a plug-in registers stands here too where the plug-in is installed.

* [Command line](commands.md): every verb.
* [A recipe](recipe.md): the fields at the top of the file, and [the mappings](mappings.md) that parts share, such as `loop` and `optim`.
* What is no kind of part: optimisers ([`groups`](mappings.md#groups)), learning rates ([`schedule`](mappings.md#schedule)), budgets and
  checkpoints ([`loop`](mappings.md#loop-of-train)), formats of files ([`export`](stages.md#export), [`gguf`](mappings.md#gguf)).
* [The JSON schema](recipe.schema.json) of a recipe, for editors that complete and check YAML.

| Kind | How many | Which |
|---|---:|---|
{table}
"""


def _recipe_page(links: dict[type, str]) -> str:
    return f"""# A recipe

{_prose(_doc(Recipe))}

A file may say `extends: NAME_OR_FILE` beside these: maps are merged over the other recipe's, lists are replaced. `path.to.key=value` on the
command line overrides a field.

{_fields(Recipe, "recipe", links)}
"""


def _kind_page(plural: str, registry: Registry, entries: list[Entry], uses: dict[type, list[Use]], links: dict[type, str]) -> str:
    places = _code(some(".".join(entry.path) for entry in entries if registry in _registries(field_shapes(entry.info))))
    overview = "\n".join(f"| [`{name}`](#{name}) | {_cell(text)} |" for name, text in known(plural))
    sections = "\n".join(_section(f"`{name}`", name, registry.options(name), uses, links) for name in registry)
    return f"""# {plural.capitalize()}

{with_article(registry.kind).capitalize()} stands at {places} in a recipe; `kind` says which.
A name alone, without a mapping, is one with its defaults.

| Kind | |
|---|---|
{overview}

{sections}
"""


def _mappings_page(groups: dict[type, str], entries: list[Entry], uses: dict[type, list[Use]], links: dict[type, str]) -> str:
    sections = []
    for cls, title in groups.items():
        places = some(".".join(entry.path[:-1]) for entry in entries if entry.cls is cls)
        sections.append(_section(title, _slug(title), cls, uses, links, f"At {_code(places)}."))
    return "# Mappings\n\nMappings that stand inside parts and stages, by the key that holds them.\n\n" + "\n".join(sections)


def _section(
    title: str, anchor: str, cls: type[BaseModel], uses: dict[type, list[Use]], links: dict[type, str], note: str = ""
) -> str:
    found = uses.get(cls, [])
    recipes = sorted({use.recipe for use in found})
    named = ", ".join(f"[{name}](recipes/{name}.md)" for name in recipes)
    parts = [f"## {title}", _prose(_doc(cls)), _prose(note), _fields(cls, anchor, links)]
    if found:
        example = max(found, key=lambda use: (use.lines <= _LONGEST, use.lines if use.lines <= _LONGEST else -use.lines))
        parts.append(
            f"From the recipe [{example.recipe}](recipes/{example.recipe}.md):\n\n```yaml\n{example.text}```\n\nIn the recipes {named}."
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def _fields(cls: type[BaseModel], anchor: str, links: dict[type, str]) -> str:
    rows = []
    for key, info in fields_of(cls).items():
        text = (
            f"`{cls.model_fields['kind'].default}`: this one." if key == "kind" and "kind" in cls.model_fields else help_of(info)
        )
        place = f'<a id="{anchor}.{key}"></a>'
        rows.append(f"| {place}`{key}` | {_takes(field_shapes(info), links)} | {_default(info)} | {_cell(text)} |")
    return "\n".join(["| Field | Takes | Default | What it is |", "|---|---|---|---|", *rows])


def _takes(found: Shapes, links: dict[type, str]) -> str:
    words = list(dict.fromkeys(_shape(shape, links) for shape in found))
    return " or ".join([*words, "`null`"] if found.nullable else words)


def _shape(shape: Shape, links: dict[type, str]) -> str:
    """As :func:`describe` has it, with links to what is inside."""
    if isinstance(shape, ModelShape) and shape.cls is not From:
        return f"[a mapping]({links[shape.cls]})"
    if isinstance(shape, PartShape):
        plural = next(word for word, kind in kinds().items() if kind == shape.registry.kind)
        return f"[{with_article(shape.registry.kind)}]({plural}.md)"
    if isinstance(shape, ListShape):
        return f"a list of {_takes(shapes(shape.item), links)}"
    if isinstance(shape, ScalarShape) and shape.choices:
        return " or ".join(f"`{choice}`" for choice in shape.choices)
    return f"`{describe(shape)}`" if isinstance(shape, ModelShape) else _cell(describe(shape))


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = default_of(info)
    inside = [shape.cls for shape in field_shapes(info) if isinstance(shape, ModelShape)]
    if isinstance(value, dict) and any(
        value == {key: default_of(field) for key, field in fields_of(cls).items() if not field.is_required()} for cls in inside
    ):
        return "its own"
    return _cell(f"`{json.dumps(value, ensure_ascii=False)}`")


def _registries(found: Shapes) -> list[Registry]:
    """The registries whose parts may stand in a field."""
    registries = [shape.registry for shape in flat(found) if isinstance(shape, PartShape)]
    for shape in found:
        if isinstance(shape, ListShape | DictShape):
            registries += _registries(shapes(shape.item if isinstance(shape, ListShape) else shape.value))
    return registries


def _groups(entries: list[Entry]) -> dict[type, str]:
    """Options classes that are no parts -> their title: the key that holds them, with its owner where two share the key."""
    parts = {registry.options(name) for registry in REGISTRIES.values() for name in registry}
    paths: dict[type, tuple[str, ...]] = {}
    for entry in entries:
        if entry.cls is not Recipe and entry.cls not in parts:
            paths[entry.cls] = min(paths.get(entry.cls, entry.path[:-1]), entry.path[:-1], key=len)
    keys = [path[-1] for path in paths.values()]
    titles = {
        cls: f"`{path[-1]}`" if keys.count(path[-1]) == 1 else f"`{path[-1]}` of `{path[-2]}`" for cls, path in paths.items()
    }
    return dict(sorted(titles.items(), key=lambda item: item[1]))


class Use:
    """A mapping in a shipped recipe that an options class takes."""

    def __init__(self, recipe: str, key: str, value: Any, listed: bool):
        self.recipe = recipe
        self.text = yaml.safe_dump(
            {key: [value] if listed else value}, sort_keys=False, allow_unicode=True, width=_WIDTH, default_flow_style=None
        )
        self.lines = self.text.count("\n")


def _uses() -> dict[type, list[Use]]:
    """Where shipped recipes use each options class."""
    uses: dict[type, list[Use]] = {}

    def look(recipe: str, key: str, value: Any, found: Shapes, listed: bool = False) -> None:
        if isinstance(value, list):
            items = Shapes(tuple(option for shape in found if isinstance(shape, ListShape) for option in shapes(shape.item)))
            for item in value:
                look(recipe, key, item, items, True)
            return
        part = next((shape.options_of(value) for shape in flat(found) if isinstance(shape, PartShape)), None)
        cls = part or (class_for(value, found) if isinstance(value, dict) else None)
        if cls is not None and cls is not From and value:
            uses.setdefault(cls, []).append(Use(recipe, key, value, listed))
        if isinstance(value, dict):
            free = next((shape for shape in flat(found) if isinstance(shape, DictShape)), None)
            for inner, item in value.items():
                if cls is not None and inner in fields_of(cls):
                    look(recipe, inner, item, field_shapes(fields_of(cls)[inner]))
                elif cls is None and free is not None:
                    look(recipe, inner, item, shapes(free.value))

    for name in shipped_recipes():
        stages = shipped_tree(find_recipe(name)).plain()["stages"]
        look(name, "stages", stages, field_shapes(fields_of(Recipe)["stages"]))
    return uses


def _commands_page() -> str:
    sections = [f"## {words}\n\n```text\n{text}\n```\n" for words, text in verbs()]
    note = "What `--help` prints. A mistake ends with exit code 2 and says what to do; Ctrl-C ends with 130, and the same command goes on."
    return f"# Command line\n\n{note}\n\n" + "\n".join(sections)


def _recipes_page(recipes: dict[str, Recipe]) -> str:
    rows = "\n".join(
        f"| [{name}]({name}.md) | {', '.join(f'`{stage}`' for stage in recipe.stages)} | {_cell(recipe.description)} |"
        for name, recipe in recipes.items()
    )
    return f"""# Shipped recipes

Each runs by its name (`limbeck run NAME`), is written out with every field explained by `limbeck init NAME > my.yaml`, and may be named by
`extends:` in a recipe of your own.

| Recipe | Stages | What it does |
|---|---|---|
{rows}
"""


def _one_recipe(name: str, recipe: Recipe) -> str:
    stages = "\n".join(
        f"| `{stage}` | [{options.kind}](../stages.md#{options.kind}) | {_cell(summary(type(options)))} |"
        for stage, options in recipe.stages.items()
    )
    text = shipped_recipes()[name].read_text(encoding="utf-8")
    above = re.sub(r"^# ?", "", header(name), flags=re.MULTILINE)
    base = re.search(r"^extends: *(\S+)", text, re.MULTILINE)
    note = f"What it leaves alone is that of [{base[1]}]({base[1]}.md).\n\n" if base and base[1] in shipped_recipes() else ""
    return f"""# {name}

{_prose(recipe.description)}

{_comment(above)}

```bash
limbeck check {name}            # what it does, or all that is wrong
limbeck plan {name}             # memory, time and disk
limbeck run {name}              # does what is not done yet
limbeck init {name} > my.yaml   # a copy with every field explained
```

| Stage | Kind | What it does |
|---|---|---|
{stages}

{note}```yaml
{text.removeprefix(header(name)).lstrip()}```
"""


def _comment(text: str) -> str:
    """A recipe's opening comment: what is indented there is commands or numbers in columns."""
    runs = groupby(text.splitlines(), key=lambda line: line.startswith("  "))
    blocks = (
        "\n".join(["", "```text", dedent("\n".join(lines)), "```", ""]) if indented else _prose("\n".join(lines))
        for indented, lines in runs
    )
    return "\n".join(blocks)


def _doc(cls: type[BaseModel]) -> str:
    return inspect.getdoc(cls) or ""


def _code(places: str) -> str:
    """Paths in a sentence, set as code."""
    return re.sub(r"\w+(\.\w+)*(?=,| and \d|$)", r"`\g<0>`", places)


def _slug(title: str) -> str:
    return re.sub(r"\s+", "-", title.replace("`", "").lower())


def _prose(text: str) -> str:
    """Text of a docstring as Markdown: what is no code is taken literally."""
    pieces = re.split(r"(``?[^`]+``?)", text)
    return "".join(piece if piece.startswith("`") else re.sub(r"([*<\[\]|])", r"\\\1", piece) for piece in pieces)


def _cell(text: str) -> str:
    """The same within a table, where code may hold no bare bar either."""
    flowed = " ".join(_prose(text).split())
    return re.sub(r"(?<!\\)\|", r"\\|", flowed)
