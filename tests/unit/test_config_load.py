"""Recipes: what loads, and what every mistake is told."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from limbeck.config.load import load_recipe, load_text, resolved
from limbeck.config.recipe import Recipe
from limbeck.errors import RecipeError

RECIPE = dedent("""\
    name: demo
    stages:
      align:
        data:
          source: {kind: text, path: books}
          tokenizer: builtin:code-2m
        student:
          base: builtin:code-2m
          surgery:
            - kind: hybridize
              mixer: {kind: gated_deltanet, short_conv: 4}
          train: mixers
        teacher: self
        objectives: [attention_alignment]
        optim:
          groups:
            - {role: mixers, lr: 1e-3}
        loop: {tokens: 100k, batch_tokens: 4096}
      evaluate: {kind: evaluate, from: align, against: []}
    """)


def problems(text: str, *overrides: str) -> list[str]:
    """The lines of the error that a recipe ends in."""
    with pytest.raises(RecipeError) as caught:
        load_text(text, overrides)
    return [str(problem) for problem in caught.value.problems]


def broken(old: str, new: str) -> list[str]:
    """The error lines of the recipe above with one text replaced."""
    assert old in RECIPE
    return problems(RECIPE.replace(old, new, 1))


def test_a_recipe_loads_with_shorthands_and_defaults() -> None:
    stage = load_text(RECIPE).stages["align"]
    assert stage.kind == "train"
    assert stage.teacher.kind == "self"
    assert stage.data.source[0].kind == "text"
    assert stage.student.train == ("mixers",)
    assert stage.student.surgery[0].mixer.short_conv == 4
    assert (stage.optim.groups[0].lr, stage.loop.tokens) == (1e-3, 100_000)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (
            "batch_tokens: 4096",
            "batch_tokns: 4096",
            "recipe.yaml:18:26 stages.align.loop.batch_tokns: unknown key, did you mean 'batch_tokens'?",
        ),
        ("tokens: 100k", "tokens: 100x", "recipe.yaml:18:20 stages.align.loop.tokens: must be a positive whole number"),
        ("tokens: 100k", "tokens: true", "recipe.yaml:18:20 stages.align.loop.tokens: must be a positive whole number"),
        (
            "lr: 1e-3",
            "lr: fast",
            'recipe.yaml:17:30 stages.align.optim.groups.0.lr: must be a number above 0; found "fast" (text)',
        ),
        ("lr: 1e-3", "lr: -1", "recipe.yaml:17:30 stages.align.optim.groups.0.lr: must be above 0.0; found -1"),
        ("lr: 1e-3", "lr: .nan", "recipe.yaml:17:30 stages.align.optim.groups.0.lr: must be a finite number"),
        (
            "short_conv: 4",
            "short_conv: 99",
            "recipe.yaml:11:53 stages.align.student.surgery.0.mixer.short_conv: must be at most 16; found 99",
        ),
        (
            "kind: hybridize",
            "kind: hybridise",
            "recipe.yaml:10:17 stages.align.student.surgery.0.kind: unknown surgery 'hybridise', did you mean",
        ),
        ("teacher: self", "teacher: 7", "recipe.yaml:13:14 stages.align.teacher: must be a mapping with a `kind`"),
        (
            "tokenizer: builtin:code-2m",
            "tokenizer: {vocabulry: 300}",
            "recipe.yaml:6:19 stages.align.data.tokenizer.vocabulry: unknown key",
        ),
        (
            "tokenizer: builtin:code-2m",
            "tokenizer: 3",
            "recipe.yaml:6:18 stages.align.data.tokenizer: must be text or {from: stage} or",
        ),
        ("    optim:\n", "    optim: null\n    rest:\n", "recipe.yaml:15:12 stages.align.optim: must be a mapping with groups"),
        (
            "loop: {",
            "loop: {deterministic: yes, ",
            "recipe.yaml:18:27 stages.align.loop.deterministic: must be true or false or null",
        ),
        ("from: align", "from: algn", "recipe.yaml:19:36 stages.evaluate.from: no stage named 'algn', did you mean 'align'?"),
        ("against: []", "against: [evaluate]", "stages refer to each other in a circle: evaluate -> evaluate"),
        ("name: demo", "name: ../demo", "recipe.yaml:1:7 name: '../demo' cannot name a folder"),
        ("name: demo\n", "", "recipe.yaml:1:1 needs `name`: Name of the run"),
        ("tokens: 100k, ", "", "recipe.yaml:18:11 stages.align.loop: needs exactly one budget of `tokens`"),
        (
            "teacher: self",
            "teacher: null",
            "objective 'attention_alignment' needs AttentionStream from a teacher, and the stage has none",
        ),
        (
            "path: books",
            "path: books, filters: {pattern: '['}",
            "stages.align.data.source.filters.pattern: not a regular expression",
        ),
    ],
)
def test_a_mistake_is_told_at_its_place_in_plain_words(old: str, new: str, line: str) -> None:
    lines = broken(old, new)
    assert any(line in found for found in lines), lines


def test_every_mistake_is_reported_at_once_from_the_top() -> None:
    text = RECIPE.replace("name: demo", "nam: demo").replace("100k", "zero").replace("from: align", "from: nowhere")
    text = text.replace("kind: gated_deltanet", "kind: delta").replace("self", "{kind: self, dtype: float32}")
    lines = problems(text)
    assert [int(line.split(":")[1]) for line in lines] == sorted(int(line.split(":")[1]) for line in lines)
    for words in (
        "needs `name`",
        "unknown key, did you mean 'name'",
        "unknown mixer 'delta'",
        "dtype: unknown key",
        "tokens: must be",
        "nowhere",
    ):
        assert sum(words in line for line in lines) == 1, (words, lines)


def test_a_duplicate_key_names_both_places() -> None:
    assert broken("teacher: self", "teacher: self\n    teacher: self") == [
        "recipe.yaml:14:5 stages.align.teacher: this key stands twice, first at recipe.yaml:13:5: keep one"
    ]


def test_scalars_follow_yaml_1_2() -> None:
    text = RECIPE.replace("name: demo", "name: on\ndescription: 2024-01-01").replace("1e-3", "1e-3, weight_decay: 1E+0")
    recipe = load_text(text.replace("100k", "1_000_000"))
    group = recipe.stages["align"].optim.groups[0]
    assert (recipe.name, recipe.description, group.lr, group.weight_decay) == ("on", "2024-01-01", 0.001, 1.0)
    assert recipe.stages["align"].loop.tokens == 1_000_000


@pytest.mark.parametrize(("word", "tokens"), [("1.1B", 1_100_000_000), ("64k", 64_000), ("1e8", 100_000_000), ("2_000", 2000)])
def test_counts_take_suffixes_exactly(word: str, tokens: int) -> None:
    assert load_text(RECIPE.replace("100k", word)).stages["align"].loop.tokens == tokens


def test_anchors_and_merge_keys_work_and_keep_their_places() -> None:
    anchored = RECIPE.replace("loop: {", "loop: &loop {") + "  more:\n    <<: *loop\n"
    lines = problems(anchored)
    assert any("recipe.yaml:18:18 stages.more.tokens: unknown key" in line for line in lines), lines
    merged = RECIPE.replace("{role: mixers, lr: 1e-3}", "&g {role: mixers, lr: 1e-3}\n        - {<<: *g, role: rest}")
    assert [group.role for group in load_text(merged).stages["align"].optim.groups] == ["mixers", "rest"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty: a recipe is a mapping"),
        ("- a\n- b", "is a list: a recipe is a mapping"),
        ("name", "is a single value"),
        ("name: a\n\tstages: b", "a tab where YAML wants spaces"),
        ("name: [a", "YAML: expected ',' or ']'"),
        ("name: a\n---\nname: b", "a second document"),
        ("name: a: b", "a second ': ' on one line"),
        ("a: &a [*a]", "an anchor that contains itself"),
        (
            "a: &a [x,x,x,x,x,x,x,x]\n"
            + "".join(f"{b}: &{b} [{','.join(['*' + a] * 8)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)),
            "more than 50000 values",
        ),
        ("a: " + "[" * 5000, "nested more than 40 levels deep"),
        ("name: " + "9" * 5000, "(5000 digits) cannot be read as a number"),
        ("name: !!python/object:os.system x", "is not used in recipes"),
        ("? [a]\n: b", "a key must be a word"),
        ('name: "\\ud800"', "half of a surrogate pair"),
        ('name: "\\U99999999"', "not a character that exists"),
        ("name: a\x00b", "recipe.yaml:1:8 character 0x00 is not allowed"),
        ("x" * 1_000_001, "1000001 characters"),
        ("name: *nobody", "undefined alias"),
        ("<<: 3", "`<<` merges mappings"),
    ],
)
def test_text_that_is_no_recipe_is_refused_in_one_line(text: str, words: str) -> None:
    lines = problems(text)
    assert any(words in line and line.startswith("recipe.yaml:") for line in lines), lines


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"name: a\nstages: \xff\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:2:9 byte 0xff is not UTF-8"):
        load_recipe(path)
    path.write_bytes(b"\xef\xbb\xbf" + RECIPE.encode())
    assert load_recipe(path).name == "demo"


@pytest.mark.parametrize("name", ["nowhere.yaml", "hybird", "", "\x00", "a" * 5000])
def test_a_missing_file_is_told_with_the_shipped_recipes(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert len(caught.value.problems) == 1
    if name == "hybird":
        assert "did you mean 'hybrid'?" in str(caught.value)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)


def test_resolved_recipes_load_back_and_equal_recipes_are_equal_text() -> None:
    recipe = load_text(RECIPE)
    assert Recipe.model_validate(resolved(recipe)) == recipe
    spaced = load_text(RECIPE.replace("100k", "100000").replace("teacher: self", "teacher: {kind: self}"))
    assert resolved(recipe) == resolved(spaced)
    assert resolved(recipe) != resolved(load_text(RECIPE.replace("100k", "101k")))


def test_extends_merges_mappings_replaces_lists_and_keeps_places(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(RECIPE)
    (tmp_path / "sub").mkdir()
    child = tmp_path / "sub" / "child.yaml"
    child.write_text(
        "extends: ../base.yaml\nname: child\nstages:\n  align:\n    optim: {groups: [{lr: 1e-4}]}\n    loop: {tokens: 2M}\n"
    )
    stage = load_recipe(child).stages["align"]
    assert (stage.loop.tokens, stage.loop.batch_tokens, len(stage.optim.groups), stage.optim.groups[0].role) == (
        2_000_000,
        4096,
        1,
        None,
    )
    child.write_text("extends: ../base.yaml\nname: child\nstages: {align: {loop: {steps: 3}}}\n")
    with pytest.raises(
        RecipeError, match=r"child\.yaml:3:24 stages\.align\.loop: needs exactly one budget .* found tokens, steps"
    ):
        load_recipe(child)
    (tmp_path / "base.yaml").write_text(RECIPE.replace("1e-3", "fast"))
    with pytest.raises(RecipeError, match=r"base\.yaml:17:30 stages\.align\.optim\.groups\.0\.lr"):
        load_recipe(child, ["align.loop.steps=null"])


def test_extends_does_not_mix_a_reference_or_another_kind_into_options() -> None:
    recipe = load_text(
        "extends: hybrid\nname: x\nstages: {distil: {data: {source: stdlib, tokenizer: t},"
        " teacher: {kind: self}, objectives: [attention_alignment]}}"
    )
    assert recipe.stages["distil"].data.tokenizer == "t"
    assert not hasattr(recipe.stages["distil"].teacher, "model")


def test_extends_in_a_circle_or_of_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\nname: a")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nname: b")
    with pytest.raises(
        RecipeError, match=r"b\.yaml:1:10 extends: recipes extend each other in a circle: a\.yaml -> b\.yaml -> a\.yaml"
    ):
        load_recipe(tmp_path / "a.yaml")
    assert any("no shipped recipe of that name" in line for line in problems("extends: nothing\nname: a"))
    assert any("must be one file" in line for line in problems("extends: [a, b]\nname: a"))


def test_environment_variables_expand_in_paths_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOOKS", "/data/books")
    assert (
        load_text(RECIPE.replace("path: books", 'path: "${env:BOOKS}/a"')).stages["align"].data.source[0].path == "/data/books/a"
    )
    assert load_text(RECIPE, ["align.student.base=${env:BOOKS}"]).stages["align"].student.base == "/data/books"
    assert any(
        "the environment variable NO_SUCH_THING is not set" in line
        for line in broken("path: books", 'path: "${env:NO_SUCH_THING}"')
    )
    assert any(
        "recipe.yaml:1:7 name: ${env:NAME} is for paths and secrets only" in line
        for line in broken("name: demo", "name: ${env:BOOKS}")
    )
    assert any("cannot expand ${HOME}" in line for line in broken("path: books", "path: '${HOME}/x'"))
