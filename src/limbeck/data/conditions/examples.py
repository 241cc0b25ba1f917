"""Rows and documents -> examples: a prompt and an answer, or plain text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from limbeck.config.parts.conditions import ConditionSourceOptions
from limbeck.config.parts.sources import SOURCES
from limbeck.data.documents import content_hash, kept_documents
from limbeck.data.reading import Document, Tally
from limbeck.data.sources import MadeUpSource, Source
from limbeck.errors import DataError

SEPARATOR = "\n"
"""Stands between a prompt and its answer, and belongs to the prompt."""


class Example(NamedTuple):
    """One example as it was read, in no format yet."""

    name: str
    """Where it stood."""
    prompt: str
    """What is asked; empty for plain text."""
    answer: str
    """What is to be said, or the text."""
    value: str
    """Of the column by which the source is sliced, else empty."""
    hash: int
    """64 bits of its text."""

    @property
    def text(self) -> str:
        """All of it."""
        return joined(self.prompt, self.answer)


def joined(prompt: str, answer: str) -> str:
    """A prompt and its answer as one text."""
    return f"{prompt}{SEPARATOR}{answer}" if prompt else answer


class Examples:
    """The examples of one source, each text once.  What is left out goes into ``tally``."""

    def __init__(self, options: ConditionSourceOptions, base_dir: Path):
        self.options = options
        self.source = _Columns(options, base_dir)
        self.tally = self.source.tally

    def files(self) -> list[Path]:
        """The local files that are read."""
        return self.source.first.files()

    def read(self, seen: set[int]) -> list[Example]:
        """All of them, in the order of the source; ``seen`` holds the hashes of the texts of other sources, and of these later."""
        found: list[Example] = []
        for document, _ in kept_documents(self.source, seen):
            prompt, answer, value = self.source.parts.pop(document.name)
            if self.options.cut is None:
                found.append(Example(document.name, prompt, answer, value, content_hash(document.text.encode())))
                continue
            for number, piece in enumerate(_cut(answer, self.options.cut)):
                hashed = content_hash(piece.encode())
                if not piece.strip():
                    continue
                if hashed in seen and piece != document.text:
                    self.tally.drop("duplicate", f"{document.name}#{number}")
                    continue
                seen.add(hashed)
                found.append(Example(document.name, "", piece, value, hashed))
        if not found:
            left_out = f"; left out: {self.tally.words()}" if self.tally.counts else ""
            raise DataError(f"source {self.options.name!r} ({self.source.title}): no examples{left_out}: give it more or longer text")
        return found


class _Columns(Source):
    """A source whose documents are a prompt and an answer joined; the parts are kept by name until they are fetched."""

    def __init__(self, options: ConditionSourceOptions, base_dir: Path):
        super().__init__(options.source, base_dir)
        self.name = options.name
        text = getattr(options.source, "field", None)
        names = [text] if options.prompt is None else [options.prompt, options.answer]
        self._sliced = options.slices.field is not None
        self.columns = [*names, options.slices.field] if self._sliced else names
        # One reader a column: together they read a file several times and never hold it.
        readers: list[Source] = [
            SOURCES.build(options.source if column is None else options.source.model_copy(update={"field": column}), base_dir)
            for column in self.columns
        ]
        self.readers, self.first = readers, readers[0]
        if isinstance(self.first, MadeUpSource):
            raise DataError(
                f"source {options.name!r} of kind {options.source.kind!r} makes its text up, and conditions are cut from real text: "
                "name a source that reads some"
            )
        self.parts: dict[str, tuple[str, str, str]] = {}

    @property
    def title(self) -> str:
        """The title of the source itself."""
        return self.first.title

    def documents(self) -> Iterator[Document]:
        """One document for each row that has all columns."""
        for name, values in self._joined():
            value = values.pop() if self._sliced else ""
            prompt, answer = values if len(values) == 2 else ("", values[0])
            if len(values) == 2 and not (prompt.strip() and answer.strip()):
                self.tally.drop("with an empty prompt or answer", name)
                continue
            self.parts[name] = prompt, answer, value
            yield Document(name, joined(prompt, answer))
            self.parts.pop(name, None)
        self._count()

    def _joined(self) -> Iterator[tuple[str, list[str]]]:
        """The columns of each row, matched by the row's name."""
        waiting: dict[str, dict[int, str]] = {}
        for row in zip_longest(*(self._column(number) for number in range(len(self.readers)))):
            for number, document in enumerate(row):
                if document is not None:
                    found = waiting.setdefault(document.name, {})
                    found[number] = document.text
                    if len(found) == len(self.readers):
                        del waiting[document.name]
                        yield document.name, [found[k] for k in range(len(found))]

    def _column(self, number: int) -> Iterator[Document]:
        try:
            yield from self.readers[number].documents()
        except DataError as error:
            raise DataError(f"source {self.name!r}: {error}") from error

    def _count(self) -> None:
        """What the readers left out: what is wrong with a row once, what is wrong with a column by its name."""
        for number, (column, reader) in enumerate(zip(self.columns, self.readers, strict=True)):
            for reason, count in reader.tally.counts.items():
                words = {"without the field": f"without {column}", "not text": f"whose {column} is not text"}.get(reason)
                if words is not None or number == 0:
                    _add(self.tally, words or reason, count, reader.tally.names[reason])


def _add(tally: Tally, reason: str, count: int, names: list[str]) -> None:
    tally.counts[reason] += count
    tally.names.setdefault(reason, []).extend(names)


def _cut(text: str, longest: int) -> Iterator[str]:
    """Pieces of at most so many characters, cut behind line ends where there are any."""
    piece = ""
    for line in text.splitlines(keepends=True):
        if piece and len(piece) + len(line) > longest:
            yield piece.rstrip("\r\n")
            piece = ""
        while len(line) > longest:
            yield line[:longest]
            line = line[longest:]
        piece += line
    if piece:
        yield piece.rstrip("\r\n")
