"""Files -> documents: whole files, lines, paragraphs, and rows of JSON, JSON lines and parquet."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.errors import DataError, did_you_mean

MAX_UNDECODABLE = 0.05
"""Share of a source's files (or lines, or paragraphs) that may fail to decode before the encoding is taken to be wrong."""
NAMES_KEPT = 5
"""Names of left-out documents that are remembered, by reason."""
BROKEN = (EOFError, UnicodeError, zlib.error, gzip.BadGzipFile)
"""What a file raises that ends too early, or is not what its name says."""


class Document(NamedTuple):
    """A text and where it stood."""

    name: str
    text: str


@dataclass
class Tally:
    """What was left out, by reason, with the names of the first few."""

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, name: str) -> None:
        """Count one document, row or file."""
        self.counts[reason] += 1
        kept = self.names.setdefault(reason, [])
        if len(kept) < NAMES_KEPT:
            kept.append(name)

    def words(self) -> str:
        """``3 duplicate (a.txt, b.txt, …), 1 empty (c.txt)``."""
        parts = []
        for reason, count in sorted(self.counts.items()):
            names = ", ".join(self.names[reason]) + (", …" if count > len(self.names[reason]) else "")
            parts.append(f"{count} {reason} ({names})")
        return ", ".join(parts)


class FieldReader:
    """Takes the text out of rows; ``a+b`` joins two columns with a line break."""

    def __init__(self, title: str, names: str, tally: Tally):
        self.title, self.names, self.tally = title, names.split("+"), tally
        self._num_found = 0
        self._columns: list[str] = []

    def document(self, row: Any, name: str) -> Document | None:
        """The row's text, or None with the reason in the tally."""
        if isinstance(row, str):
            self._num_found += 1
            return Document(name, row)
        if not isinstance(row, dict):
            self.tally.drop("not a row", name)
            return None
        values = [row.get(column) for column in self.names]
        if any(value is None for value in values):
            self._columns = self._columns or [str(column) for column in row]
            self.tally.drop("without the field", name)
            return None
        self._num_found += 1
        texts = [value for value in values if isinstance(value, str)]
        if len(texts) < len(values):
            self.tally.drop("not text", name)
            return None
        return Document(name, "\n".join(texts))

    def check(self) -> None:
        """Not one row with the field is a wrong name, not bad data."""
        if self._columns and not self._num_found:
            wanted = "+".join(self.names)
            hint = did_you_mean(self.names[0], self._columns) or ";"
            known = ", ".join(self._columns)
            raise DataError(f"source.field: no row of {self.title} has {wanted!r}{hint} columns: {known}")


def read_files(
    files: list[tuple[Path, str]], tally: Tally, *, title: str, encoding: str, documents: str = "file"
) -> Iterator[Document]:
    """Text files, each with its name in messages, as whole files, lines or paragraphs.

    Raises:
        DataError: a file that cannot be read, or more than 5% that does not decode.
    """
    good = 0
    bad: list[str] = []
    for path, name in files:
        if path.suffix == ".parquet":
            raise DataError(f"{name}: a parquet file holds rows: set `documents: row`, or leave .parquet out of `suffixes`")
        try:
            with open_text(path, encoding) as file:
                for document in _cut(file, name, documents):
                    if _is_valid(document.text):
                        good += 1
                        yield document
                    else:
                        bad.append(document.name)
                        tally.drop("undecodable", document.name)
        except BROKEN:
            bad.append(name)
            tally.drop("undecodable", name)
    if len(bad) > MAX_UNDECODABLE * (good + len(bad)):
        raise DataError(
            f"{title}: {len(bad)} of {good + len(bad)} {documents}s do not decode as {encoding} "
            f"({', '.join(bad[:NAMES_KEPT])}): set `encoding`, or leave them out with `suffixes`"
        )


def open_text(path: Path, encoding: str) -> io.TextIOBase:
    """Undecodable bytes become lone surrogates, so that each line or file is judged by itself; line ends stay as they are."""
    try:
        "".encode(encoding)
    except LookupError as error:
        raise DataError(f"source.encoding: unknown encoding {encoding!r}; for example utf-8, latin-1, utf-16") from error
    if encoding.lower().replace("_", "-") in ("utf-8", "utf8"):
        # The same, and a byte order mark is no text.
        encoding = "utf-8-sig"
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        return opened(path, "rt", encoding=encoding, errors="surrogateescape", newline="")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): let yourself read it, or leave it out of the source") from error


def _is_valid(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _cut(file: io.TextIOBase, name: str, documents: str) -> Iterator[Document]:
    if documents == "file":
        yield Document(name, file.read())
    elif documents == "line":
        for number, line in enumerate(file, 1):
            yield Document(f"{name}:{number}", line.rstrip("\r\n"))
    else:
        lines: list[str] = []
        for number, line in enumerate(file, 1):
            if line.strip():
                lines.append(line)
            elif lines:
                yield Document(f"{name}:{number - len(lines)}", "".join(lines).rstrip("\r\n"))
                lines = []
        if lines:
            yield Document(f"{name}:{number - len(lines) + 1}", "".join(lines).rstrip("\r\n"))


def read_rows(files: list[tuple[Path, str]], tally: Tally, *, title: str, encoding: str, column: str) -> Iterator[Document]:
    """Rows of ``.json`` (a list, or lines), ``.jsonl`` (both also gzipped) and ``.parquet`` files.

    Raises:
        DataError: a file of another kind or that cannot be read, or no row at all with the column.
    """
    reader = FieldReader(title, column, tally)
    for path, name in files:
        kind = path.name.lower().removesuffix(".gz").rsplit(".", 1)[-1]
        if kind == "parquet":
            rows = parquet_rows(path, name, reader.names, tally)
        elif kind in ("json", "jsonl", "ndjson"):
            rows = _json_rows(path, name, encoding, tally, lines=kind != "json")
        else:
            raise DataError(
                f"{name}: `documents: row` reads .json, .jsonl and .parquet (also .gz); leave others out with `suffixes`"
            )
        for row_name, row in rows:
            document = reader.document(row, row_name)
            if document is not None:
                yield document
    reader.check()


def _json_rows(path: Path, name: str, encoding: str, tally: Tally, *, lines: bool) -> Iterator[tuple[str, Any]]:
    try:
        with open_text(path, encoding) as file:
            if lines:
                yield from _json_lines(file, name, tally)
                return
            text = file.read()
            try:
                value = json.loads(text)
            except ValueError:
                # JSON lines are often called .json.
                yield from _json_lines(io.StringIO(text), name, tally)
            else:
                for i, row in enumerate(value if isinstance(value, list) else [value]):
                    yield f"{name}[{i}]", row
    except BROKEN:
        tally.drop("undecodable", name)


def _json_lines(file: io.TextIOBase, name: str, tally: Tally) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield f"{name}:{number}", json.loads(line)
            except ValueError:
                tally.drop("corrupt", f"{name}:{number}")


def parquet_rows(path: Path, name: str, wanted: list[str], tally: Tally, *, together: int = 1024) -> Iterator[tuple[str, Any]]:
    """Rows of a parquet file by name, ``together`` in memory at a time; ``wanted`` columns, all if it is empty."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{name}: parquet needs the packages of limbeck[data]: pip install 'limbeck[data]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [column for column in wanted if column in file.schema_arrow.names]
            number = 0
            for batch in file.iter_batches(batch_size=together, columns=columns or None):
                for row in batch.to_pylist():
                    yield f"{name}[{number}]", row
                    number += 1
    except (pyarrow.ArrowException, OSError):
        tally.drop("corrupt", name)
