"""Conditions: how text is sliced and written, on which side it stands, and what is held out and mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from condition_cases import build, decoded, options, rows
from limbeck.config.parts.conditions import FormatName, SliceOptions
from limbeck.data.conditions.choice import Task, mixed_pairs, split_of
from limbeck.data.conditions.examples import Example
from limbeck.data.conditions.formats import FORMATS
from limbeck.data.conditions.slicing import slice_examples
from limbeck.data.conditions.store import ConditionSet
from limbeck.data.documents import content_hash
from limbeck.errors import DataError

AWKWARD = ("", " ", "a", "Straße ı İ ﬁ", "日本語 テキスト", "e\u0301\u200d🙂 \x00\t\r\n", "x" * 500, "The cat sat.\nOn two mats!")


def example(text: str, name: str = "a", value: str = "") -> Example:
    return Example(name, "", text, value, content_hash(text.encode()))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_format_of_the_recipe_writes_any_text_and_tells_texts_apart():
    assert set(FORMATS) == set(get_args(FormatName)) and len(FORMATS) >= 8
    different = [f"The {word} Cat sat on mat {i}, twice.\nAnd left." for i, word in enumerate(("big", "bag", "old", "new", "shy"))]
    for name, (write, words) in FORMATS.items():
        assert words and all(isinstance(write(text), str) and write(text) == write(text) for text in AWKWARD), name
        assert all(write(text).count("\n") == text.count("\n") for text in different), name
        # Five texts of other words and numbers stay five.
        assert len({write(text) for text in different}) == 5, name
    assert len({write(different[0]) for write, _ in FORMATS.values()}) == len(FORMATS)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("no_vowels", "Th ct st.\nn tw mts!"),
        ("no_spaces", "Thecatsat.\nOntwomats!"),
        ("reversed_words", "sat. cat The\nmats! two On"),
        ("mirrored", "ehT tac tas.\nnO owt stam!"),
        ("rot13", "Gur png fng.\nBa gjb zngf!"),
        ("snake", "the_cat_sat.\non_two_mats!"),
        ("quoted", "> The cat sat.\n> On two mats!"),
        ("doubled", "TThhee ccaatt ssaatt.\nOOnn ttwwoo mmaattss!"),
        ("digits_for_letters", "7h3 c47 547.\n0n 7w0 m475!"),
    ],
)
def test_a_format_writes_what_it_says(name, written):
    assert FORMATS[name].write("The cat sat.\nOn two mats!") == written


def test_lengths_are_cut_into_equal_parts_from_short_to_long():
    examples = [example("w" * n + str(n)) for n in (9, 1, 5, 3, 7, 2, 8, 4)]
    groups = slice_examples(examples, SliceOptions(by="length", count=4), 0)
    sizes = [sorted(len(examples[i].text) for i in group) for group in groups.values()]
    assert sizes == [[2, 3], [4, 5], [6, 8], [9, 10]] and list(groups) == ["length0", "length1", "length2", "length3"]


def test_fields_and_folders_keep_the_most_frequent_under_names_fit_for_a_path():
    values = ["Level 5"] * 3 + ["a/b"] * 2 + ["a b"] * 2 + ["rare"]
    groups = slice_examples([example(str(i), value=v) for i, v in enumerate(values)], SliceOptions(by="field", field="x", count=3), 0)
    assert {name: group.tolist() for name, group in groups.items()} == {"Level_5": [0, 1, 2], "a_b": [5, 6], "a_b-2": [3, 4]}
    names = ["../lib/x/a.py", "../lib/x/sub/b.py", "../lib/y/c.py", "../lib/d.py:3"]
    groups = slice_examples([example(n, name=n) for n in names], SliceOptions(by="folder", count=9), 0)
    assert {name: group.tolist() for name, group in groups.items()} == {"x": [0, 1], "top": [3], "y": [2]}


def test_topics_find_the_words_that_go_together_and_do_not_depend_on_the_run():
    kinds = (("planet", "orbit", "star", "moon", "comet"), ("butter", "flour", "sugar", "oven", "bread"), ("goal", "league", "striker", "match", "referee"))
    texts = [f"{k[i % 5]} and {k[(i * 2 + 1) % 5]} with {k[(i + 3) % 5]} number {i}" for i in range(40) for k in kinds]
    examples = [example(text) for text in texts]
    groups = slice_examples(examples, SliceOptions(by="topic", count=3), 0)
    assert sorted(tuple({i % 3 for i in group}) for group in groups.values()) == [(0,), (1,), (2,)]
    again = slice_examples(examples, SliceOptions(by="topic", count=3), 0)
    assert all((groups[name] == again[name]).all() for name in groups)


def test_the_same_inputs_give_the_same_bytes(tmp_path):
    sources = [rows(tmp_path, "birds", slices={"by": "topic", "count": 2}), rows(tmp_path, "stones", slices={"by": "field", "field": "level", "count": 2})]
    more = {"formats": ["plain", "no_vowels"], "held_out": {"slices": 2}, "mixes": 2}
    first, second = (build(tmp_path, sources, out=out, **more) for out in ("one", "two"))
    assert contents(first.folder) == contents(second.folder) and first.digest == second.digest
    other = build(tmp_path, sources, out="three", **{**more, "seed": 1})
    assert [(c.split, c.parts) for c in other.conditions] != [(c.split, c.parts) for c in first.conditions]
    assert not list(tmp_path.glob(".*partial*"))


def test_no_test_text_stands_in_the_training_side_of_any_format(tmp_path):
    """Texts that differ in plain and agree in a format would: `Bat 3` and `BAT 3` are one text in capitals."""
    path = tmp_path / "a.jsonl"
    texts = [f"{word} number {i} {end}" for i in range(60) for word in ("Bat", "BAT", "bet") for end in ("x", "y")]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    said: list[str] = []
    source = {"name": "a", "source": {"kind": "text", "path": str(path), "documents": "row"}, "slices": {"by": "length", "count": 2}}
    made = build(tmp_path, [source], formats=["plain", "upper", "no_vowels"], test_examples=30, min_examples=4, said=said)
    found = decoded(made)
    test = {text for (_, side), pairs in found.items() if side == 1 for _, text in pairs}
    train = [text for (_, side), pairs in found.items() if side == 0 for _, text in pairs]
    assert test and train and not test & set(train)
    assert any("the text of another in one of the formats" in line for line in said)
    # The same examples stand on the same side in every format.
    for condition in made.conditions:
        first = next(c for c in made.conditions if c.slice == condition.slice)
        for side in (0, 1):
            hashes = [made.hashes_E2[made.first_N3[c.id, side] : made.first_N3[c.id, side + 1], 0].tolist() for c in (first, condition)]
            assert hashes[0] == hashes[1]


def test_the_files_hold_the_examples_as_they_are_written(tmp_path):
    made = build(tmp_path, [rows(tmp_path, "birds")], formats=["plain", "upper"])
    known = {(r["question"] + "\n", r["answer"]) for r in map(json.loads, (tmp_path / "birds.jsonl").read_text().splitlines())}
    upper = {(prompt.upper(), answer.upper()) for prompt, answer in known}
    for (condition, _), pairs in decoded(made).items():
        assert set(pairs) <= (known, upper)[condition] and len(set(pairs)) == len(pairs)
    assert made.conditions[0].examples == {"train": 40, "test": 10} and made.conditions[0].name == "birds/all/plain"
    assert int(made.tokens[made.examples_E5[0, 2] - 1]) == made.manifest.eos


def test_long_text_is_cut_at_line_ends(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line number {i} of the text\n" for i in range(300)) + "z" * 95)
    made = build(tmp_path, [{"name": "a", "source": {"kind": "text", "path": "a.txt"}, "cut": 60}], examples=200)
    texts = [answer for pairs in decoded(made).values() for _, answer in pairs]
    assert all(len(text) <= 60 and (text.startswith("line") or text.startswith("z")) for text in texts)
    assert made.examples_E5[0, 0] == made.examples_E5[0, 1]


def test_rows_that_lack_a_column_are_counted_by_its_name(tmp_path):
    source = rows(tmp_path, "birds")
    with open(source["source"]["path"], "a") as file:
        file.write('\n{"question": "no answer"}\n{"answer": "no question"}\n{"question": "q", "answer": 3}\n{"question": "q", "answer": " "}\n{"broken\n')
    said: list[str] = []
    build(tmp_path, [source], said=said)
    line = next(line for line in said if "birds: left out" in line)
    for words in ("1 without answer (", "1 without question (", "1 whose answer is not text", "1 with an empty prompt or answer", "1 corrupt"):
        assert words in line, line


def test_held_out_conditions_leave_their_source_and_format_seen(tmp_path):
    sources = [rows(tmp_path, word, slices={"by": "length", "count": 2}) for word in ("birds", "stones", "tools")]
    made = build(tmp_path, sources, formats=["plain", "upper", "rot13"], held_out={"sources": ["tools"], "slices": 5}, mixes=4)
    splits = {name: made.split(name) for name in ("seen", "held_out_slice", "held_out_source", "mix")}
    assert [len(ids) for ids in splits.values()] == [7, 5, 6, 4]
    seen = [made.conditions[i] for i in splits["seen"]]
    for i in splits["held_out_slice"]:
        assert made.conditions[i].source in {c.source for c in seen} and made.conditions[i].format in {c.format for c in seen}
    assert {made.conditions[i].source for i in splits["held_out_source"]} == {"tools"}
    assert made.split("seen", "mix") == sorted(splits["seen"] + splits["mix"])
    with pytest.raises(DataError, match=r"held_out\.slices: 11 asked, and of 12 conditions, in the order of this seed, only [89] can be held out"):
        build(tmp_path, sources, formats=["plain", "upper", "rot13"], held_out={"sources": ["tools"], "slices": 11})


TASKS = [Task(source, part, written) for source in "ab" for part in "xy" for written in ("plain", "upper")]


def test_named_conditions_are_held_out_and_unknown_names_are_errors():
    held = options([{"name": "a", "source": {"path": "x"}}], held_out={"slices": ["a/x", "b/y/upper"]}).held_out
    splits = split_of(TASKS, held, 0)
    assert [task.name for task, split in zip(TASKS, splits, strict=True) if split != "seen"] == ["a/x/plain", "a/x/upper", "b/y/upper"]
    with pytest.raises(DataError, match=r"no condition 'a/z/plain', did you mean 'a/y/plain' or 'a/x/plain'"):
        split_of(TASKS, held.model_copy(update={"slices": ("a/z/plain",)}), 0)
    with pytest.raises(DataError, match="no condition of source 'a' is left among the seen ones: hold out fewer, or the whole source"):
        split_of(TASKS, held.model_copy(update={"slices": ("a/x", "a/y")}), 0)
    with pytest.raises(DataError, match="no condition of another source is left"):
        split_of(TASKS[:4], held.model_copy(update={"sources": ("a",), "slices": 0}), 0)
    with pytest.raises(DataError, match="mixes: 17 asked, and there are 16 pairs"):
        mixed_pairs(TASKS, ["seen"] * 8, 17, 0, 0)


def test_mixes_in_one_format_come_beside_the_others_and_never_twice():
    pairs = mixed_pairs(TASKS, ["seen"] * 8, 8, 8, 0)
    alike = [TASKS[a].format == TASKS[b].format for a, b in pairs]
    assert len(set(pairs)) == 16 and alike[8:] == [True] * 8 and alike[:8] == [False] * 8
    assert all(TASKS[a].source != TASKS[b].source for a, b in pairs)
    alone = TASKS[:4]
    assert {frozenset({alone[a].slice, alone[b].slice}) for a, b in mixed_pairs(alone, ["seen"] * 4, 4, 0, 0)} == {frozenset({"x", "y"})}
    with pytest.raises(DataError, match="mixes_in_one_format: 9 asked, and there are 8 pairs"):
        mixed_pairs(TASKS, ["seen"] * 8, 0, 9, 0)


def test_a_mix_is_half_of_each_of_two_seen_sources(tmp_path):
    sources = [rows(tmp_path, "birds"), rows(tmp_path, "stones"), rows(tmp_path, "tools")]
    made = build(tmp_path, sources, formats=["plain", "upper"], held_out={"sources": ["tools"]}, mixes=3)
    found = decoded(made)
    for i in made.split("mix"):
        mix, (a, b) = made.conditions[i], made.conditions[i].parts
        assert made.conditions[a].split == made.conditions[b].split == "seen" and made.conditions[a].source != made.conditions[b].source
        for side, number in (("train", 40), ("test", 10)):
            k = ("train", "test").index(side)
            assert mix.examples[side] == number and len(found[i, k]) == number
            # By turns, and every one from the same side of its part.
            assert found[i, k][::2] == found[a, k][: number // 2] and found[i, k][1::2] == found[b, k][: number // 2]


def test_small_slices_are_dropped_aloud_and_none_left_is_an_error(tmp_path):
    said: list[str] = []
    made = build(tmp_path, [rows(tmp_path, "birds"), rows(tmp_path, "few", count=6)], said=said)
    assert [condition.source for condition in made.conditions] == ["birds"]
    assert any("slice few/all dropped: 6 training and 0 test examples, at least 8 and 1 are needed" in line for line in said), said
    assert made.manifest.notes and all(f"  {note}" in said for note in made.manifest.notes)
    with pytest.raises(DataError, match="min_examples: no slice has enough examples: slice few/all dropped"):
        build(tmp_path, [rows(tmp_path, "few", count=6)], out="none")
    assert not (tmp_path / "none").exists() and not list(tmp_path.glob(".none*"))


def test_damage_is_named(tmp_path):
    made = build(tmp_path, [rows(tmp_path, "birds")])
    with pytest.raises(DataError, match=r"no conditions here \(no conditions\.json\)"):
        ConditionSet(tmp_path)
    tokens = made.folder / "tokens.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=rf"tokens\.bin: has {len(whole) - 2} bytes instead of {len(whole)}: remove"):
        ConditionSet(made.folder)
    tokens.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert len(ConditionSet(made.folder)) == 1
    with pytest.raises(DataError, match=r"tokens\.bin: its content is not what was written"):
        ConditionSet(made.folder, verify=True)
    tokens.unlink()
    with pytest.raises(DataError, match=r"tokens\.bin: is missing"):
        ConditionSet(made.folder)
    manifest = made.folder / "conditions.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"format": 1,', '"format": 0,'))
    with pytest.raises(DataError, match="written by another version"):
        ConditionSet(made.folder)
    manifest.write_text(text[:-9])
    with pytest.raises(DataError, match=r"conditions\.json: damaged"):
        ConditionSet(made.folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"formats": ["plain", "plain"]}, "'plain' stands twice"),
        ({"formats": ["uper"]}, "formats"),
        ({"held_out": {"sources": ["brds"]}}, "no source named 'brds', did you mean 'birds'"),
        ({"held_out": {"sources": ["birds"]}}, "all 1 sources are held out"),
        ({"min_examples": 3}, "min_examples: 3 training examples are fewer than the condition.texts: 4"),
        ({"examples": 7}, "examples: 7 are fewer than min_examples: 8"),
        ({"mixes": 1, "examples": 9, "condition": {"texts": 5}}, "half of examples: 9 is too few: allowed with 10"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(tmp_path, change, words):
    with pytest.raises(ValidationError, match=words):
        options([rows(tmp_path, "birds")], **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slices": {"count": 2}}, "2 slices need a `by`"),
        ({"slices": {"by": "field"}}, "go together"),
        ({"prompt": None}, "`prompt` and `answer` go together"),
        ({"cut": 100}, "`cut` is for plain text"),
        ({"source": {"kind": "stdlib"}}, "name columns, and this source of kind 'stdlib' has no rows: only sources of rows"),
        ({"source": {"path": "x"}}, "set `documents: row`"),
        ({"source": {"path": "x", "documents": "row", "share": 0.5}}, "share: 0.5 has no meaning here"),
        ({"source": {"kind": "recall"}}, "makes its text up"),
        ({"name": "mix"}, "kept for mixes"),
        ({"name": "a/b"}, "name"),
    ],
)
def test_sources_that_cannot_be_read_as_asked_are_refused(tmp_path, change, words):
    with pytest.raises(ValidationError, match=words):
        options([{**rows(tmp_path, "birds"), **change}])


def test_a_wrong_column_is_an_error_with_the_source_and_its_columns(tmp_path):
    with pytest.raises(DataError, match=r"source 'birds': .*'answr', did you mean 'answer'.*columns: question, answer, level"):
        build(tmp_path, [{**rows(tmp_path, "birds"), "answer": "answr"}])
    (tmp_path / "empty.jsonl").write_text('{"question": " ", "answer": "x"}\n')
    source = {**rows(tmp_path, "birds"), "source": {"path": "empty.jsonl", "documents": "row"}}
    with pytest.raises(DataError, match=r"source 'birds' \(text empty\.jsonl\): no examples; left out: 1 with an empty prompt"):
        build(tmp_path, [source])
