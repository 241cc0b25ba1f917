"""Sources of text: what they read, in which order, and what they say about what they cannot read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from limbeck.config.parts.sources import SOURCES, HubSourceOptions, StdlibSourceOptions, TextSourceOptions
from limbeck.data.documents import content_hash, kept_documents, side_of
from limbeck.data.reading import Document
from limbeck.errors import DataError


def source(base: Path, **options):
    return SOURCES.build(TextSourceOptions.model_validate({"path": ".", **options}), base)


def texts(base: Path, **options) -> list[str]:
    return [document.text for document in source(base, **options).documents()]


def kept(base: Path, **options):
    built = source(base, **options)
    return [document.text for document, _ in kept_documents(built, set())], dict(built.tally.counts), built.tally.names


def test_a_folder_is_read_sorted_by_suffix_and_without_hidden_files(tmp_path):
    for name in ("b.txt", "a.md", "c.bin", ".hidden.txt", "sub/d.TXT", ".git/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a.md", "b.txt", "sub/d.TXT"]
    assert texts(tmp_path, suffixes=[".bin"]) == ["c.bin"]


def test_files_globs_and_lists_each_give_a_file_once_in_the_order_written(tmp_path):
    for name in ("a.txt", "b.txt", "c.log"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path, path=["c.log", "*.txt", "a.txt"]) == ["c.log", "a.txt", "b.txt"]


def test_lines_and_paragraphs_are_documents_named_by_their_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n\r\n\nthree\nfour")
    paragraphs = list(source(tmp_path, documents="paragraph").documents())
    assert paragraphs == [Document("a.txt:1", "one\r\ntwo"), Document("a.txt:5", "three\nfour")]
    lines = kept(tmp_path, documents="line")[0]
    assert lines == ["one", "two", "three", "four"]


def test_a_whole_file_keeps_its_line_ends_and_loses_its_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert texts(tmp_path) == ["one\r\ntwo\n"]


def test_rows_are_read_from_every_format(tmp_path):
    rows = [{"text": "one"}, {"text": "two"}]
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl").write_text(lines)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "d.json").write_text(lines)
    (tmp_path / "e.json").write_text(json.dumps(["one", "two"]))
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["one", "two"]}), tmp_path / "f.parquet")
    assert texts(tmp_path, documents="row") == ["one", "two"] * 6


def test_two_fields_are_joined_with_a_line_break(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"q": "why", "a": "because"}))
    assert texts(tmp_path, documents="row", field="q+a") == ["why\nbecause"]


def test_bad_rows_are_counted_and_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "good"}\n{"text": \n{"other": 1}\n[1]\n{"text": 3}\n{"text": "  "}\n{"text": "\\ud800"}\n'
    )
    found, counts, names = kept(tmp_path, documents="row")
    assert found == ["good"]
    assert counts == {"corrupt": 1, "without the field": 1, "not a row": 1, "not text": 1, "empty": 1, "undecodable": 1}
    assert names["corrupt"] == ["a.jsonl:2"]


def test_a_wrong_field_is_an_error_with_the_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"txt": "one", "id": 1}\n')
    with pytest.raises(DataError, match=r"'text'.*did you mean 'txt'.*columns: txt, id"):
        texts(tmp_path, documents="row")


def test_one_file_in_thirty_that_does_not_decode_is_counted_and_more_are_an_error(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text(f"text {i}")
    (tmp_path / "07.txt").write_bytes(b"\xff\xfe\xfa")
    found, counts, names = kept(tmp_path)
    assert len(found) == 29 and counts == {"undecodable": 1} and names["undecodable"] == ["07.txt"]
    (tmp_path / "08.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match=r"2 of 30 files do not decode as utf-8 \(07.txt, 08.txt\): set `encoding`"):
        texts(tmp_path)
    assert len(texts(tmp_path, encoding="latin-1")) == 30


def test_a_truncated_archive_is_counted_and_an_unknown_encoding_is_an_error(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text(f"text {i}")
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"some text that is long enough to be cut" * 50)[:-20])
    _, counts, names = kept(tmp_path)
    assert counts == {"undecodable": 1} and names["undecodable"] == ["x.txt.gz"]
    with pytest.raises(DataError, match="unknown encoding 'utf-99'"):
        texts(tmp_path, encoding="utf-99")


def test_a_missing_path_names_the_nearest(tmp_path):
    (tmp_path / "corpus.txt").write_text("text")
    with pytest.raises(DataError, match=r"corpsu\.txt: no such file or folder in .*did you mean 'corpus\.txt'"):
        texts(tmp_path, path="corpsu.txt")
    with pytest.raises(DataError, match="no file matches"):
        texts(tmp_path, path="*.csv")
    with pytest.raises(DataError, match=r"it holds \.txt"):
        texts(tmp_path, suffixes=[".csv"])


def test_a_parquet_file_read_as_text_says_what_to_set(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="documents: row"):
        texts(tmp_path)


def test_every_filter_drops_and_counts_by_its_reason(tmp_path):
    lines = ["keep me x", "keep me x", "x", "far too long for this x", "keep without", "", "keep two x"]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    filters = {"min_characters": 3, "max_characters": 15, "pattern": "x$"}
    found, counts, _ = kept(tmp_path, documents="line", filters=filters)
    assert found == ["keep me x", "keep two x"]
    assert counts == {"duplicate": 1, "too short": 1, "too long": 1, "without the pattern": 1, "empty": 1}
    assert kept(tmp_path, documents="line", limit=1)[0] == ["keep me x"]
    assert kept(tmp_path, documents="line", filters={**filters, "deduplicate": False})[0].count("keep me x") == 2


def test_the_side_of_a_document_depends_on_its_text_alone():
    hashes = [content_hash(f"document {i}".encode()) for i in range(4000)]
    held_out = {h for h in hashes if side_of(h, 0.1) == "held_out"}
    assert 300 < len(held_out) < 500
    assert held_out == {h for h in reversed(hashes) if side_of(h, 0.1) == "held_out"}
    assert held_out < {h for h in hashes if side_of(h, 0.2) == "held_out"}
    assert not any(side_of(h, 0.0) == "held_out" for h in hashes)


def test_the_standard_library_is_read_without_its_tests():
    built = SOURCES.build(StdlibSourceOptions(limit=20), Path("."))
    names = [built.name_of(path) for path in built.files()]
    assert "json/decoder.py" in names and names == sorted(names)
    assert not any("test" in Path(name).parts[:-1] for name in names)
    assert all(document.text for document, _ in kept_documents(built, set()))


def test_a_hub_dataset_is_read_from_a_folder_and_is_an_error_without_a_network(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    datasets.Dataset.from_dict({"text": ["three"]}).save_to_disk(str(tmp_path / "saved"))

    def read(path, **more):
        built = SOURCES.build(HubSourceOptions(path=path, **more), tmp_path)
        return built, [document.text for document in built.documents()]

    built, found = read("set")
    assert found == ["one", "two"] and [p.name for p in built.files()] == ["train.jsonl"]
    assert read("saved")[1] == ["three"]
    with pytest.raises(DataError, match=r"nobody/nothing: cannot be read .*without a network, download it first"):
        read("nobody/nothing")
    with pytest.raises(DataError, match=r"cannot be read .*check name, split and field"):
        read("set", split="validation")
