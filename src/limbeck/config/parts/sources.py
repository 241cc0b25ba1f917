"""Options of the text sources."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from limbeck.config.base import Count, Options, Part, Place
from limbeck.registry import Registry

SOURCES = Registry("source")


class Filters(Options):
    """Which documents are kept; every document left out is counted by reason."""

    min_characters: int = Field(1, ge=0)
    """Shorter documents are dropped."""
    max_characters: int | None = Field(None, gt=0)
    """Longer documents are dropped."""
    deduplicate: bool = True
    """Drop documents whose text was seen before."""
    pattern: str | None = None
    """Keep only documents in which this regular expression is found."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value


class SourceOptions(Part):
    """Fields that every source has."""

    share: float | None = Field(None, gt=0, le=1)
    """Share of this source in the tokens of the mixture; sources without a share are taken whole."""
    filters: Filters = Filters()
    """Which documents are kept."""
    limit: Count | None = None
    """At most this many documents."""
    domain: str = Field("text", min_length=1)
    """Name by which a `mixture` teacher knows these documents."""


@SOURCES.register("limbeck.data.sources:TextSource")
class TextSourceOptions(SourceOptions):
    """Text from files, folders and globs: one document a file, or a line, or a JSON row."""

    kind: Literal["text"] = "text"
    path: Place | tuple[Place, ...]
    """Files, folders or globs; relative paths start at the recipe's folder."""
    suffixes: tuple[str, ...] = (".txt", ".md", ".py", ".json", ".jsonl", ".parquet")
    """Files of a folder that are read."""
    documents: Literal["file", "line", "paragraph", "row"] = "file"
    """What one document is; `row` reads JSON, JSON lines and parquet (also gzipped)."""
    field: str = "text"
    """Column of a row that holds the text; `a+b` joins two with a line break."""
    encoding: str = "utf-8"
    """Of the files; a file that does not decode is counted and named, more than 5% of them is an error."""


@SOURCES.register("limbeck.data.sources:HubSource")
class HubSourceOptions(SourceOptions):
    """A Hugging Face dataset, from the hub or from a local folder."""

    kind: Literal["hub"] = "hub"
    path: Place
    """Name on the hub, or a folder that `datasets` can load."""
    name: str | None = None
    """Configuration of the dataset."""
    split: str = "train"
    """Split to read."""
    field: str = "text"
    """Column that holds the text; `a+b` joins two with a line break."""
    revision: str | None = None
    """Pinned revision."""
    streaming: bool = True
    """Read as a stream (nothing but what is used is downloaded)."""


@SOURCES.register("limbeck.data.sources:StdlibSource")
class StdlibSourceOptions(SourceOptions):
    """The source of Python's own standard library: real text that every machine already has."""

    kind: Literal["stdlib"] = "stdlib"
    exclude: tuple[str, ...] = ("test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip", "__pycache__")
    """Folders that are left out."""


@SOURCES.register("limbeck.data.recall:RecallSource")
class RecallSourceOptions(SourceOptions):
    """Made-up documents that can only be predicted by looking far back, written in ids of the tokenizer."""

    kind: Literal["recall"] = "recall"
    share: float | None = Field(0.15, gt=0, lt=1)
    """Share of the mixture's tokens."""
    tasks: tuple[Literal["repeat", "key_value", "needle"], ...] = ("repeat", "key_value", "needle")
    """`repeat`: a random string twice; `key_value`: pairs, then the keys asked in another order; `needle`: one pair far back in
    text."""
    vocabulary: int | None = Field(None, ge=32)
    """How many ids are used, the tokenizer's first ordinary ones (the most frequent of a BPE); all of them by default."""
    min_length: int = Field(16, ge=8)
    """Shortest document in tokens; lengths are log-uniform up to the row's length."""
