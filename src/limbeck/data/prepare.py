"""Text -> one folder of packed tokens, named by the content of everything it is made from.

The folder appears whole or not at all, and preparing again is free.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from limbeck.config.parts.stages import DataOptions
from limbeck.data.preparation import Preparation, build_sources
from limbeck.data.store import FORMAT, DataInfo, being_written, read_info
from limbeck.data.tokenizer import tokenizer_digest
from limbeck.errors import DataError

HASHED_WHOLE = 64 * 2**20
"""Larger input files count by their size, date, beginning and end."""


def prepare(
    options: DataOptions,
    folder: Path,
    *,
    tokenizer: str | None,
    base_dir: Path,
    progress: Callable[[str], None] | None = None,
) -> DataInfo:
    """Prepare ``options`` into ``folder``; one that is there already, whole and of the same content, is left as it is.

    ``tokenizer`` is a folder or hub name, None when one is to be trained on the training documents.  Relative paths start at
    ``base_dir``; ``progress`` takes lines of text.

    Raises:
        DataError: a source that is missing, empty or unreadable, shares that do not add up, or nothing held out.
    """
    say = progress or (lambda line: None)
    folder, base_dir = Path(folder), Path(base_dir).resolve()
    key = content_key(options, tokenizer=tokenizer, base_dir=base_dir)
    if (finished := _finished(folder, key)) is not None:
        return finished
    with being_written(folder) as out:
        info = Preparation(options, out, tokenizer, base_dir, say).run(key)
    for line in info.words():
        say(f"  {line}")
    return info


def content_key(options: DataOptions, *, tokenizer: str | None, base_dir: Path) -> str:
    """16 hexadecimal digits that change when an option, an input file or the tokenizer does."""
    record = {
        "format": FORMAT,
        "options": options.model_dump(mode="json", by_alias=True, exclude={"tokenizer"}),
        "tokenizer": options.model_dump(mode="json")["tokenizer"] if tokenizer is None else tokenizer_digest(tokenizer),
        "files": [
            [[source.name_of(path), _file_digest(path)] for path in source.files()]
            for source in build_sources(options, Path(base_dir).resolve())
        ],
    }
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=8).hexdigest()


def input_files(options: DataOptions, base_dir: Path) -> list[Path]:
    """Every local file that the sources read."""
    return [path for source in build_sources(options, Path(base_dir).resolve()) for path in source.files()]


def _finished(folder: Path, key: str) -> DataInfo | None:
    if not (folder / "meta.json").exists():
        return None
    try:
        info = read_info(folder)
    except DataError:
        # Damaged or of another version: made again, in its place.
        return None
    return info if info.key == key else None


def _file_digest(path: Path) -> str:
    try:
        stat = path.stat()
        return _digest_once(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): let yourself read it, or leave it out of the source") from error


@lru_cache(maxsize=100_000)
def _digest_once(path: Path, size: int, modified_ns: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        if size <= HASHED_WHOLE:
            digest.update(file.read())
        else:
            digest.update(f"{size} {modified_ns}".encode() + file.read(2**20))
            file.seek(-(2**20), 2)
            digest.update(file.read())
    return digest.hexdigest()
