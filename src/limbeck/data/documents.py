"""Which documents are kept, and on which side they stand."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import islice

from limbeck.data.reading import Document
from limbeck.data.sources import Source

CHUNK_DOCUMENTS, CHUNK_CHARACTERS = 1024, 2_000_000
"""Documents tokenised at a time."""


def content_hash(content: bytes) -> int:
    """64 bits of blake2b."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def side_of(hashed: int, held_out: float) -> str:
    """``held_out`` for that share of all hashes, else ``train``."""
    return "held_out" if hashed < held_out * 2**64 else "train"


def kept_documents(source: Source, seen: set[int]) -> Iterator[tuple[Document, int]]:
    """The documents that pass the source's filters, with the hashes of their texts.

    What is left out goes into ``source.tally``; the hashes of what is kept go into ``seen``.
    """
    filters = source.options.filters
    pattern = re.compile(filters.pattern) if filters.pattern is not None else None

    def why_not(text: str, hashed: int) -> str | None:
        if not text.strip():
            return "empty"
        if len(text) < filters.min_characters:
            return "too short"
        if filters.max_characters is not None and len(text) > filters.max_characters:
            return "too long"
        if pattern is not None and not pattern.search(text):
            return "without the pattern"
        return "duplicate" if filters.deduplicate and hashed in seen else None

    def passing() -> Iterator[tuple[Document, int]]:
        for document in source.documents():
            try:
                hashed = content_hash(document.text.encode())
            except UnicodeEncodeError:
                # JSON may spell half a surrogate pair; no tokenizer takes it.
                source.tally.drop("undecodable", document.name)
                continue
            reason = why_not(document.text, hashed)
            if reason is None:
                seen.add(hashed)
                yield document, hashed
            else:
                source.tally.drop(reason, document.name)

    return islice(passing(), source.options.limit)


def chunks(documents: Iterator[tuple[Document, int]]) -> Iterator[list[tuple[Document, int]]]:
    """Documents in lists that are tokenised together."""
    chunk: list[tuple[Document, int]] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document[0].text)
        if len(chunk) == CHUNK_DOCUMENTS or characters > CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
