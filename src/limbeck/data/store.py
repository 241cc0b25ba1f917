"""The folder of prepared text: what is in it, and how it comes into being whole or not at all.

```
meta.json                     DataInfo: written last
tokenizer/                    the tokenizer that made the ids
train/  held_out/
    tokens.bin                uint16 or uint32, in packed order
    pieces.npy                int64 [P+1], where each document or piece of one begins in tokens.bin
    domains.npy               uint8 [P], index of each piece's domain; only where there are several
    mask.bin                  uint8, 1 where the token counts as a target; only where made-up documents are mixed in
    hashes.npy                uint64 [N], blake2b of each document's text
    names.jsonl               N names, in the order of the hashes
```
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from limbeck.errors import DataError
from limbeck.files import damage, listing, put_in_place
from limbeck.records import sealed, unsealed

FORMAT = 1
"""Raised when the same options would give other tokens or other files."""
SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class SplitInfo:
    """Sizes of one side."""

    tokens: int
    """Tokens, in rows of ``DataInfo.sequence``."""
    documents: int
    """Different documents that these come from."""
    rows: int
    """Rows, the last one padded."""


@dataclass(frozen=True)
class SourceInfo:
    """What became of one source."""

    title: str
    share: float | None
    """Share of the training tokens that was asked for."""
    achieved: float
    """Share that it has."""
    documents: dict[str, int]
    """Documents read and kept, by split."""
    tokens: dict[str, int]
    """Tokens used, by split."""
    passes: float
    """Training tokens used over tokens there were: above 1 it was repeated, below 1 sub-sampled."""
    dropped: dict[str, int]
    """Documents left out, by reason."""
    dropped_names: dict[str, list[str]]
    """The first few of them."""


@dataclass(frozen=True)
class DataInfo:
    """What ``meta.json`` says."""

    key: str
    sequence: int
    dtype: str
    vocabulary: int
    """Highest id of the tokenizer plus one."""
    eos: int | None
    pad: int
    tokenizer: str
    """Fingerprint of the tokenizer's files."""
    splits: dict[str, SplitInfo]
    sources: list[SourceInfo]
    domains: list[str] = field(default_factory=lambda: ["text"])
    """Names of the domains that documents belong to."""
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Size and SHA-256 by file."""
    format: int = FORMAT

    def words(self) -> list[str]:
        """A few lines for the console."""
        lines = [
            f"{name}: {split.tokens:,} tokens of {split.documents:,} documents in {split.rows:,} rows of {self.sequence}"
            for name, split in self.splits.items()
        ]
        for source in self.sources:
            line = f"{source.title}: {source.achieved:.1%} of the training tokens"
            if source.passes > 1.005:
                line += f", repeated {source.passes:.2f} times"
            if source.dropped:
                line += ", left out " + ", ".join(f"{count} {reason}" for reason, count in sorted(source.dropped.items()))
            lines.append(line)
        return lines


def read_info(folder: Path, *, verify: bool = False) -> DataInfo:
    """The folder's ``meta.json``, after checking the size (and with ``verify`` the SHA-256) of every file it lists.

    Raises:
        DataError: no such folder, not prepared text, another format, or a damaged file, by name.
    """
    path = folder / "meta.json"
    try:
        record = unsealed(path.read_bytes())
        if record.get("format") != FORMAT:
            found = record.get("format")
            raise DataError(f"{folder}: prepared by another version (format {found!r:.80}, this one reads {FORMAT}): prepare again")
        info = DataInfo(
            **{
                **record,
                "splits": {name: SplitInfo(**split) for name, split in record["splits"].items()},
                "sources": [SourceInfo(**source) for source in record["sources"]],
                "files": {name: (int(size), str(sha)) for name, (size, sha) in record["files"].items()},
            }
        )
    except FileNotFoundError as error:
        raise DataError(f"{folder}: no prepared text here (no meta.json): run `limbeck prepare`") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error}): remove {folder} and prepare again") from error
    if problem := damage(folder, info.files, verify=verify):
        raise DataError(f"{problem}: remove {folder} and prepare again")
    return info


@contextmanager
def being_written(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` that takes its place when the block ends well, and goes when it does not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        put_in_place(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_info(folder: Path, info: DataInfo) -> DataInfo:
    """Write ``meta.json`` with the size and SHA-256 of everything else in the folder."""
    files = listing(folder)
    record: dict[str, Any] = {**asdict(info), "files": files}
    (folder / "meta.json").write_text(json.dumps(sealed(record), indent=1, sort_keys=True) + "\n")
    return DataInfo(**{**{name: getattr(info, name) for name in record}, "files": files})


def _sweep(folder: Path) -> None:
    """Remove what killed processes left beside the folder."""
    for path in folder.parent.glob(f".{folder.name}.*.partial"):
        owner = path.name.removesuffix(".partial").rsplit(".", 1)[-1]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
