"""Preparing text as a whole: what ends up in the rows, and that the folder is there whole or not at all."""

from __future__ import annotations

import json
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest

from limbeck.config.parts.stages import DataOptions
from limbeck.data import preparation
from limbeck.data.dataset import TokenRows, check_disjoint
from limbeck.data.prepare import content_key, input_files, prepare
from limbeck.data.recall import RecallSource
from limbeck.errors import DataError
from limbeck.models.loading import load_tokenizer
from limbeck.types import IGNORE

PARAGRAPHS = [
    f"def function_{i}(argument):\n    return argument * {i} + {i * i % 97}\n    # {'word ' * (i % 23)}the end of number {i}"
    for i in range(400)
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("\n\n".join(PARAGRAPHS[:250]))
    (folder / "b.txt").write_text("\n\n".join(PARAGRAPHS[250:]))
    return folder


def options(**changes) -> DataOptions:
    base = {
        "source": [{"kind": "text", "path": ["a.txt", "b.txt"], "documents": "paragraph"}],
        "tokenizer": {"vocabulary": 512},
        "sequence": 64,
        "held_out": 0.1,
    }
    return DataOptions.model_validate({**base, **changes})


RECALL = [
    {"kind": "text", "path": ["a.txt", "b.txt"], "documents": "paragraph"},
    {"kind": "recall", "share": 0.25, "vocabulary": 64, "min_length": 16},
]


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(options(), folder, tokenizer=None, base_dir=corpus)
    return folder


@pytest.fixture(scope="module")
def mixed(corpus, prepared, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixed") / "data"
    prepare(options(source=RECALL), folder, tokenizer=str(prepared / "tokenizer"), base_dir=corpus)
    return folder


def documents_of(folder: Path, split: str) -> list[list[int]]:
    """Every document of one side, put together again from the rows."""
    rows = TokenRows(folder, split)
    batch = rows.batch(range(len(rows)))
    stream = batch.input_ids_BT.flatten()[batch.token_mask_BT.flatten()].tolist()
    documents, current = [], []
    for token in stream:
        current.append(token)
        if token == rows.info.eos:
            documents.append(current)
            current = []
    return documents


def texts_of(folder: Path, split: str) -> list[str]:
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    return [tokenizer.decode(ids[:-1]) for ids in documents_of(folder, split)]


def text_around_recall(folder: Path) -> list[str]:
    """The documents of which every token counts, put together again: recall documents may lie between their pieces."""
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    side = folder / "train"
    tokens, mask = np.fromfile(side / "tokens.bin", np.uint16), np.fromfile(side / "mask.bin", np.uint8)
    starts = np.load(side / "pieces.npy")
    pieces = [tokens[a:b].tolist() for a, b in pairwise(starts) if mask[a:b].all()]
    return tokenizer.decode(list(chain(*pieces))).split(tokenizer.eos_token)[:-1]


def test_every_document_comes_out_as_it_went_in_on_one_side_only(prepared):
    train, held_out = texts_of(prepared, "train"), texts_of(prepared, "held_out")
    assert sorted(train + held_out) == sorted(PARAGRAPHS)
    assert 15 < len(held_out) < 70 and train != sorted(train)
    info = TokenRows(prepared, "train", verify=True).info
    assert info.splits["held_out"].documents == len(held_out) and info.splits["train"].documents == len(train)
    check_disjoint(prepared, prepared)


def test_the_split_and_the_rows_do_not_depend_on_the_order_of_the_sources(corpus, prepared, tmp_path):
    turned = options(source=[{"kind": "text", "path": p, "documents": "paragraph"} for p in ("b.txt", "a.txt")])
    prepare(turned, tmp_path / "d", tokenizer=str(prepared / "tokenizer"), base_dir=corpus)
    assert sorted(texts_of(tmp_path / "d", "held_out")) == sorted(texts_of(prepared, "held_out"))
    check_disjoint(tmp_path / "d", prepared)
    check_disjoint(prepared, tmp_path / "d")


def test_preparing_twice_gives_the_same_bytes_and_preparing_again_touches_nothing(corpus, mixed, prepared, tmp_path):
    tokenizer = str(prepared / "tokenizer")
    prepare(options(source=RECALL), tmp_path / "d", tokenizer=tokenizer, base_dir=corpus)
    files = sorted(p.relative_to(mixed) for p in mixed.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "d") for p in (tmp_path / "d").rglob("*") if p.is_file())
    assert all((mixed / f).read_bytes() == (tmp_path / "d" / f).read_bytes() for f in files)
    before = {f: (mixed / f).stat().st_mtime_ns for f in files}
    said: list[str] = []
    info = prepare(options(source=RECALL), mixed, tokenizer=tokenizer, base_dir=corpus, progress=said.append)
    assert {f: (mixed / f).stat().st_mtime_ns for f in files} == before and not said
    assert info == TokenRows(mixed, "train").info


def test_a_share_of_recall_documents_is_mixed_in_and_only_its_answers_count(mixed, prepared):
    info = TokenRows(mixed, "train").info
    text, recall = info.sources
    assert recall.achieved == pytest.approx(0.25, abs=0.01) and text.passes == 1
    assert recall.tokens["held_out"] / info.splits["held_out"].tokens == pytest.approx(0.25, abs=0.05)
    assert sorted(text_around_recall(mixed)) == sorted(texts_of(prepared, "train"))
    rows = TokenRows(mixed, "train")
    batch = rows.batch(range(len(rows)))
    shorter = TokenRows(prepared, "train")
    text_labels = int(shorter.batch(range(len(shorter))).label_mask_BT.sum())
    extra = int(batch.label_mask_BT.sum()) - text_labels
    assert 0.1 * recall.tokens["train"] < extra < 0.7 * recall.tokens["train"]


def test_recall_documents_lie_whole_in_one_row(mixed):
    rows = TokenRows(mixed, "train")
    batch = rows.batch(range(len(rows)))
    repeats = crossing = 0
    for ids, documents, labels in zip(batch.input_ids_BT, batch.documents_BT, batch.labels_BT, strict=True):
        for number in range(int(documents.max()) + 1):
            piece, counted = ids[documents == number].tolist(), labels[documents == number] != IGNORE
            half = (len(piece) - 1) // 2
            if len(piece) > 8 and piece[-1] == rows.info.eos and piece[:half] == piece[half : 2 * half]:
                repeats += 1
                assert counted.tolist() == [False] * half + [True] * (half - 1) + [False] * (len(piece) - 2 * half + 1)
            crossing += not counted.any() and len(piece) > 16
    assert repeats > 5 and crossing <= 1


def test_made_up_documents_that_come_out_alike_are_used_once(corpus, prepared, tmp_path, monkeypatch):
    document = RecallSource.document
    every_third = {"stream": 0}
    monkeypatch.setattr(RecallSource, "document", lambda self, index, **given: document(self, index // 3, **given | every_third))
    given = {"tokenizer": str(prepared / "tokenizer"), "base_dir": corpus}
    prepare(options(source=RECALL), tmp_path / "d", **given)
    hashes = np.concatenate([np.load(tmp_path / "d" / split / "hashes.npy") for split in ("train", "held_out")])
    assert len(set(hashes.tolist())) == len(hashes)
    monkeypatch.setattr(RecallSource, "document", lambda self, index, **given: document(self, index % 3, **given))
    with pytest.raises(DataError, match="recall: cannot make enough different documents"):
        prepare(options(source=RECALL), tmp_path / "e", **given)


def test_no_made_up_document_is_on_both_sides(mixed):
    sides = [np.load(mixed / split / "hashes.npy") for split in ("train", "held_out")]
    lines = [(mixed / split / "names.jsonl").read_text().splitlines() for split in ("train", "held_out")]
    names = [[json.loads(line) for line in part] for part in lines]
    assert not set(sides[0].tolist()) & set(sides[1].tolist())
    assert [len(side) for side in sides] == [len(part) for part in names]
    assert sum(name.startswith("recall/held_out/") for name in names[1]) > 3


def test_max_tokens_and_repeated_shares_are_met_to_the_token(corpus, prepared, tmp_path):
    def tokens(folder, **changes):
        return prepare(options(**changes), tmp_path / folder, tokenizer=str(prepared / "tokenizer"), base_dir=corpus)

    assert tokens("a", max_tokens=2000).splits["train"].tokens == 2000
    b = {"kind": "text", "path": "b.txt", "documents": "paragraph", "share": 0.75}
    a = {"kind": "text", "path": "a.txt", "documents": "paragraph"}
    info = tokens("b", source=[a, b])
    assert info.sources[1].passes > 3 and info.sources[1].achieved == pytest.approx(0.75, abs=1e-4)
    texts = texts_of(tmp_path / "b", "train")
    repeated = [texts.count(text) for text in set(texts) if text in PARAGRAPHS[251:]]
    assert min(repeated) >= 3
    # Held-out text is never repeated.
    assert info.sources[1].tokens["held_out"] <= prepare_tokens(prepared)


def prepare_tokens(folder: Path) -> int:
    return TokenRows(folder, "held_out").num_tokens


def test_what_is_left_out_is_counted_by_reason(corpus, prepared, tmp_path):
    (tmp_path / "c.txt").write_text("\n\n".join([*PARAGRAPHS[:30], "x", PARAGRAPHS[0]]))
    source = {"path": "c.txt", "documents": "paragraph", "filters": {"min_characters": 5}}
    info = prepare(options(source=source), tmp_path / "d", tokenizer=str(prepared / "tokenizer"), base_dir=tmp_path)
    assert info.sources[0].dropped == {"duplicate": 1, "too short": 1}
    assert info.sources[0].dropped_names["duplicate"][0].startswith("c.txt:")
    assert any("left out 1 duplicate, 1 too short" in line for line in info.words())


def test_the_key_changes_with_every_input_and_with_nothing_else(corpus, prepared, tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")

    def key(trained: bool = False, **changes) -> str:
        return content_key(options(**changes), tokenizer=None if trained else str(tokenizer), base_dir=tmp_path)

    first = key()
    changed = [
        key(trained=True),
        key(trained=True, tokenizer={"vocabulary": 513}),
        key(sequence=32),
        key(seed=1),
        key(held_out=0.2),
    ]
    changed += [key(append_eos=False), key(max_tokens=10), key(source=RECALL)]
    (tokenizer / "tokenizer.json").write_text("{ }")
    changed.append(key())
    (tokenizer / "tokenizer.json").write_text("{}")
    (tmp_path / "b.txt").write_text("2wo")
    changed.append(key())
    assert len({first, *changed}) == len(changed) + 1
    (tmp_path / "b.txt").write_text("two")
    assert key() == first
    assert [p.name for p in input_files(options(), tmp_path)] == ["a.txt", "b.txt"]


def test_an_interrupted_preparation_leaves_nothing_and_the_folder_before_it(corpus, prepared, tmp_path, monkeypatch):
    folder, tokenizer = tmp_path / "d", str(prepared / "tokenizer")
    prepare(options(), folder, tokenizer=tokenizer, base_dir=corpus)
    before = (folder / "meta.json").read_bytes()

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "write_info", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(options(seed=1), folder, tokenizer=tokenizer, base_dir=corpus)
    assert (folder / "meta.json").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["d"]
    # A killed process cannot clean up: what it left is never read, and goes the next time.
    left = tmp_path / ".d.999999999.partial"
    left.mkdir()
    (left / "meta.json").write_text("{}")
    prepare(options(seed=1), folder, tokenizer=tokenizer, base_dir=corpus)
    assert [p.name for p in tmp_path.iterdir()] == ["d"] and (folder / "meta.json").read_bytes() != before


def test_a_damaged_folder_is_prepared_again(corpus, prepared, tmp_path):
    folder, tokenizer = tmp_path / "d", str(prepared / "tokenizer")
    prepare(options(), folder, tokenizer=tokenizer, base_dir=corpus)
    (folder / "train" / "tokens.bin").write_bytes(b"")
    prepare(options(), folder, tokenizer=tokenizer, base_dir=corpus)
    TokenRows(folder, "train", verify=True)


def test_bad_data_says_what_to_do(corpus, prepared, tmp_path):
    tokenizer = str(prepared / "tokenizer")

    def fails(words: str, base: Path = corpus, given: str | None = tokenizer, **changes):
        with pytest.raises(DataError, match=words):
            prepare(options(**changes), tmp_path / "d", tokenizer=given, base_dir=base)
        assert not any(tmp_path.glob("*d*"))

    whole_files = [{"path": ["a.txt", "b.txt"]}]
    fails("holds out none of the 2 documents: raise it, cut the text", source=whole_files, held_out=0.001)
    fails("all 2 documents are held out", source=whole_files, held_out=0.999999)
    fails("no documents; left out: 2 too short", source=[{"path": ["a.txt", "b.txt"], "filters": {"min_characters": 10**6}}])
    b_txt = {**RECALL[0], "path": "b.txt", "share": 0.8}
    fails("leave nothing for the sources without one", source=[{**RECALL[0], "path": "a.txt"}, RECALL[1], b_txt])
    fails("made-up documents have no end", source=[{"kind": "recall", "share": None}])
    fails("only made-up text to train it on", source=[{"kind": "recall"}], given=None)
    fails("sequence: 12 is too short for recall documents; allowed: 17 or more", source=RECALL, sequence=12)
    fails("no such file or folder", source=[{"path": "missing.txt"}])


def test_without_held_out_there_is_no_validation_side(corpus, prepared, tmp_path):
    prepare(options(held_out=0), tmp_path / "d", tokenizer=str(prepared / "tokenizer"), base_dir=corpus)
    with pytest.raises(DataError, match="nothing was held out"):
        TokenRows(tmp_path / "d", "held_out")
    check_disjoint(tmp_path / "d", tmp_path / "d")
    with pytest.raises(DataError, match="refuses to train"):
        check_disjoint(tmp_path / "d", prepared)


def test_recall_alone_fills_the_tokens_asked_for(corpus, prepared, tmp_path):
    source = [{"kind": "recall", "share": None, "vocabulary": 64}]
    info = prepare(
        options(source=source, max_tokens=4000), tmp_path / "d", tokenizer=str(prepared / "tokenizer"), base_dir=corpus
    )
    # Without text to wait behind, some are cut at the end of a row.
    assert 3200 < info.splits["train"].tokens < 4100 and info.splits["held_out"].tokens > 300
    check_disjoint(tmp_path / "d", tmp_path / "d")


def test_a_large_vocabulary_is_stored_in_32_bits_and_a_begin_token_starts_documents(corpus, shared_data, tmp_path):
    source = shared_data / "tokenizers" / "qwen2.5"
    info = prepare(options(), tmp_path / "qwen", tokenizer=str(source), base_dir=corpus)
    assert info.dtype == "uint32" and info.vocabulary > 2**16
    assert sorted(texts_of(tmp_path / "qwen", "train") + texts_of(tmp_path / "qwen", "held_out")) == sorted(PARAGRAPHS)
    stories = shared_data / "models" / "stories260K"
    prepare(options(), tmp_path / "llama", tokenizer=str(stories), base_dir=corpus)
    tokenizer = load_tokenizer(str(stories))
    assert {ids[0] for ids in documents_of(tmp_path / "llama", "train")} == {tokenizer.bos_token_id}
