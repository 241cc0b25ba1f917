"""Rows of conditions: what a row holds, which tokens count, and what a generator reads beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from condition_cases import build, decoded, options, rows
from limbeck.config.recipe import Recipe
from limbeck.data.conditions.store import ConditionSet
from limbeck.data.loader import Loader
from limbeck.errors import DataError
from limbeck.models.loading import load_tokenizer
from limbeck.stages.run import prepare_recipe, run_recipe, stage_key
from limbeck.types import IGNORE


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ConditionSet:
    """Six conditions, two of them small, and a mix."""
    folder = tmp_path_factory.mktemp("conditions")
    sources = [rows(folder, word, count=count) for word, count in (("birds", 120), ("stones", 120), ("tools", 24))]
    return build(folder, sources, formats=["plain", "upper"], mixes=1)


def naive(made: ConditionSet, condition: int, side: int) -> list[dict[str, list[int]]]:
    """The rows of a condition, one token at a time."""
    lines = [line for line in made.examples_E5.tolist() if line[3:] == [condition, side]]
    stream = [(int(made.tokens[i]), e, i >= prompt_end) for e, (start, prompt_end, end, _, _) in enumerate(lines) for i in range(start, end)]
    T, found = made.manifest.sequence, []
    for begin in range(0, len(stream), T):
        row: dict[str, list[int]] = {"ids": [], "labels": [], "positions": [], "documents": []}
        for k in range(T):
            here = stream[begin + k] if begin + k < len(stream) else None
            then = stream[begin + k + 1] if k + 1 < T and begin + k + 1 < len(stream) else None
            before = stream[begin + k - 1] if k and begin + k - 1 < len(stream) else None
            row["ids"].append(here[0] if here else made.manifest.pad)
            follows = here and then and here[1] == then[1] and (made.manifest.loss == "text" or then[2])
            row["labels"].append(then[0] if follows else IGNORE)
            same = (here[1] if here else None) == (before[1] if before else None) if k else False
            row["positions"].append(row["positions"][-1] + 1 if same else 0)
            row["documents"].append(here[1] - stream[begin][1] if here else -1)
        found.append(row)
    return found


@pytest.mark.parametrize("loss", ["text", "answer"])
@pytest.mark.parametrize("side", ["train", "test"])
def test_rows_are_the_packed_examples_of_one_condition_each(tmp_path, loss, side):
    made = build(tmp_path, [rows(tmp_path, word) for word in ("birds", "stones")], formats=["plain", "rot13"], mixes=1, loss=loss)
    ids = [2, 0, 4]
    opened = made.rows(ids, side)
    expected = [(i, row) for i in ids for row in naive(made, i, ("train", "test").index(side))]
    assert len(opened) == len(expected) == sum(len(opened.rows_of(i)) for i in ids) and opened.sequence == 32
    order = np.random.default_rng(0).permutation(len(opened))
    batch = opened.batch(order)
    for b, r in enumerate(order):
        condition, row = expected[r]
        assert int(batch.adapters_B[b]) == condition and r in opened.rows_of(condition)
        for name, tensor in (("ids", batch.input_ids_BT), ("labels", batch.labels_BT), ("positions", batch.position_ids_BT), ("documents", batch.documents_BT)):
            assert tensor[b].tolist() == row[name], (name, r)


def test_rows_decode_to_the_text_of_their_condition(made):
    tokenizer = load_tokenizer(str(made.tokenizer))
    found = decoded(made)
    opened = made.rows(range(len(made)))
    for condition in range(len(made)):
        batch = opened.batch(list(opened.rows_of(condition)))
        text = tokenizer.decode(batch.input_ids_BT[batch.token_mask_BT], skip_special_tokens=True)
        assert text == "".join(prompt + answer for prompt, answer in found[condition, 0])


def texts_of(made: ConditionSet, condition: int, side: int = 0) -> set[str]:
    return {prompt for prompt, _ in decoded(made)[condition, side]}


def read(made: ConditionSet, batch) -> list[list[str]]:
    tokenizer = load_tokenizer(str(made.tokenizer))
    return [[tokenizer.decode(text[text >= 0]) for text in row] for row in batch.condition_BSC]


@pytest.mark.parametrize("side", ["train", "test"])
def test_texts_come_from_the_training_side_of_the_condition_and_never_from_the_row(made, side):
    opened = made.rows(range(len(made)), side)
    batch = opened.batch(range(len(opened)))
    tokenizer = load_tokenizer(str(made.tokenizer))
    prompts = [texts_of(made, i) for i in range(len(made))]
    for b, found in enumerate(read(made, batch)):
        assert len(set(found)) == len(found) == 4 and set(found) <= prompts[int(batch.adapters_B[b])]
        row = tokenizer.decode(batch.input_ids_BT[b][batch.token_mask_BT[b]])
        # A prompt that begins in the row stands in it to its number at least.
        assert not any(text.split(" of ")[0] + " of" in row for text in found)


def test_the_examples_of_a_row_are_read_when_there_are_no_others(tmp_path):
    made = build(tmp_path, [rows(tmp_path, "birds")], sequence=4096)
    batch = made.rows([0]).batch([0])
    assert len(made.rows([0])) == 1 and all(len(set(found)) == 4 for found in read(made, batch))


def test_a_row_reads_the_same_texts_whatever_it_is_opened_with_and_others_in_another_draw(made):
    alone, together = made.rows([3]), made.rows([5, 3, 1])
    row = alone.batch(list(alone.rows_of(3))).condition_BSC
    assert torch.equal(row, together.batch(list(together.rows_of(3))).condition_BSC)
    drawn = [made.rows([3], draw=draw, seed=seed).batch(range(len(alone))).condition_BSC for draw, seed in ((0, 0), (1, 0), (0, 1))]
    assert torch.equal(row, drawn[0])
    for other in drawn[1:]:
        assert (other != row).any(-1).any(-1).float().mean() > 0.9
    # Over the rows of a condition nearly all of its texts are read.
    assert len({text for found in read(made, alone.batch(range(len(alone)))) for text in found}) > 30
    assert made.texts.of([3, 0]).shape == (2, 4, 48) and (made.texts.of([3], draw=1) != made.texts.of([3])).any()


def test_another_conditions_texts_can_be_read(made):
    opened = made.rows([0, 1], "test", condition_of={0: 1})
    batch = opened.batch(range(len(opened)))
    for b, found in enumerate(read(made, batch)):
        assert set(found) <= texts_of(made, 1), b
    plain = made.rows([0, 1], "test").batch(range(len(opened)))
    assert torch.equal(plain.input_ids_BT, batch.input_ids_BT) and torch.equal(plain.adapters_B, batch.adapters_B)


def test_a_text_is_cut_so_that_its_answer_is_seen(tmp_path):
    sources = [rows(tmp_path, "birds")]
    whole = decoded(build(tmp_path, sources))[0, 0]
    tokenizer = load_tokenizer(str(tmp_path / "conditions" / "tokenizer"))
    both = build(tmp_path, sources, condition={"form": "prompt_answer", "tokens": 8})
    found = read(both, both.rows([0]).batch([0]))[0]
    for text in found:
        parts = [(p, a) for p, a in whole if any(text == tokenizer.decode(tokenizer(p)["input_ids"][:k] + tokenizer(a)["input_ids"][: 8 - k]) for k in (4,))]
        assert parts, text
    prompts = build(tmp_path, sources, condition={"form": "prompts", "tokens": 8})
    batch = prompts.rows([0]).batch([0])
    assert batch.condition_BSC.shape == (1, 4, 8) and bool((batch.condition_BSC >= 0).all())


def test_plain_text_counts_whole_and_is_read_whole(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"a line of text, number {i}" for i in range(90)))
    made = build(tmp_path, [{"name": "a", "source": {"path": "a.txt", "documents": "line"}}], loss="answer", min_examples=4)
    opened = made.rows([0])
    batch = opened.batch(range(len(opened)))
    assert batch.label_mask_BT.sum() == sum((row["labels"][k] != IGNORE) for row in naive(made, 0, 0) for k in range(32)) > 200
    assert all(text.startswith("a line of text") for row in read(made, batch) for text in row)


def test_the_loader_deals_the_rows_out_and_a_batch_splits(made):
    loader = Loader(made.rows(made.split("seen")), 8, seed=0)
    batch = loader.next_step()
    assert batch.adapters_B.shape == (8,) and batch.condition_BSC.shape == (8, 4, 48)
    assert [part.adapters_B.shape[0] for part in batch.split(3)] == [3, 3, 2]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda made: made.rows([]), "no conditions: name at least one"),
        (lambda made: made.rows([0, 9]), r"no condition 9: .* holds 0 to 6"),
        (lambda made: made.rows([0], condition_of={0: 9}), "no condition 9"),
        (lambda made: made.rows([1, 1]), "condition 1 stands twice"),
        (lambda made: made.rows([0], "tset"), "no side 'tset' of conditions, did you mean 'test'"),
        (lambda made: made.rows([0]).rows_of(1), "condition 1 is not among the 1 of these rows"),
        (lambda made: made.split("sen"), "no split 'sen' of conditions, did you mean 'seen'"),
        (lambda made: made.named("bird/all/plain"), "no condition 'bird/all/plain', did you mean 'birds/all/plain'"),
    ],
)
def test_what_is_not_there_is_named(made, call, words):
    with pytest.raises(DataError, match=words):
        call(made)
    with pytest.raises(IndexError, match="of "):
        made.rows([0]).batch([10**6])


def test_conditions_that_read_the_same_are_refused(tmp_path):
    """A constant prompt tells a generator nothing."""
    sources = []
    for word in ("birds", "stones", "tools"):
        source = rows(tmp_path, word)
        path = Path(source["source"]["path"])
        read_rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("\n".join(json.dumps({**row, "question": "You are a helpful assistant."}) for row in read_rows))
        sources.append(source)
    with pytest.raises(DataError, match=r"33% of 3 conditions have texts of their own .* birds/all/plain and stones/all/plain read the same"):
        build(tmp_path, sources)
    assert not (tmp_path / "conditions").exists()
    assert len(build(tmp_path, sources, condition={"form": "prompt_answer"})) == 3
    # A long constant beginning hides what follows it; so does one that most prompts share.
    for source in sources:
        path = Path(source["source"]["path"])
        read_rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("\n".join(json.dumps({**row, "question": "a b c d e f g h" * 8 + f"{i} {path.stem}"}) for i, row in enumerate(read_rows)))
    assert len(build(tmp_path, sources, condition={"tokens": 200})) == 3
    with pytest.raises(DataError, match="read the same"):
        build(tmp_path, sources)
    for source in sources:
        path = Path(source["source"]["path"])
        read_rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("\n".join(json.dumps({**row, "question": "Same." if i % 2 else f"{path.stem} {i}"}) for i, row in enumerate(read_rows)))
    with pytest.raises(DataError, match=r"two texts of two different conditions are the same in \d\d% of all pairs, at most 10%"):
        build(tmp_path, sources)


def recipe(folder: Path) -> Recipe:
    stage = options([rows(folder, "birds"), rows(folder, "stones")]).model_dump(mode="json", by_alias=True)
    return Recipe.model_validate({"name": "x", "stages": {"conditions": stage}})


def test_the_stage_writes_its_folder_once_and_again_when_a_source_changes(tmp_path):
    made_of = recipe(tmp_path)
    said: list[str] = []
    run = {"recipe_dir": tmp_path, "run_dir": tmp_path / "run", "say": said.append}
    prepare_recipe(made_of, **run)
    opened = ConditionSet(tmp_path / "run" / "conditions" / "conditions", verify=True)
    assert len(opened) == 2 and json.loads((tmp_path / "run" / "conditions" / "stage.json").read_text())["result"]["seen"] == 2
    run_recipe(made_of, **run)
    assert "[1/1] conditions: done before, skipped" in said
    before = stage_key(made_of, "conditions", tmp_path)
    with open(tmp_path / "birds.jsonl", "a") as file:
        file.write('\n{"question": "one more", "answer": "row", "level": "easy"}')
    assert stage_key(made_of, "conditions", tmp_path) != before


def test_real_tasks_become_conditions(shared_data, tmp_path):
    sources = []
    for name, file in (("obqa", "OBQA_train.json"), ("sums", "Math-Plus.json"), ("wino", "WinoGrande_validation.json")):
        source = {"kind": "text", "path": str(shared_data / "tasks" / file), "documents": "row", "limit": 600}
        sources.append({"name": name, "source": source, "prompt": "prompt", "answer": "response", "slices": {"by": "topic", "count": 2}})
    play = {"kind": "text", "path": str(shared_data / "text" / "tinyshakespeare.txt"), "documents": "paragraph", "limit": 600}
    sources.append({"name": "play", "source": play, "slices": {"by": "length", "count": 2}})
    made = build(tmp_path, sources, formats=["plain", "no_vowels", "rot13"], held_out={"sources": ["play"], "slices": 3}, mixes=2)
    assert {name: len(made.split(name)) for name in ("held_out_slice", "held_out_source", "mix")} == {"held_out_slice": 3, "held_out_source": 6, "mix": 2}
    found = decoded(made)
    test = {text for (_, side), pairs in found.items() if side for text in pairs}
    assert not test & {text for (_, side), pairs in found.items() if not side for text in pairs}
    assert len(made.split("seen")) == 15
