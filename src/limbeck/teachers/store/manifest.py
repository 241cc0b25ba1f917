"""Whose signals a store holds, and what its finished files are: ``manifest.json``, which checks itself."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from limbeck.errors import TeacherError
from limbeck.records import parse
from limbeck.teachers.store.codecs import CODECS, Codec, Layout

FORMAT = 1
NAME = "manifest.json"
_FILE = re.compile(r"[0-9]{2}/[^/\\]+\.shard")
"""Names of finished files: a manifest lists nothing outside its folder."""


@dataclass(frozen=True)
class Identity:
    """Everything that a stored row depends on besides the document.  Rows of different identities never share a store."""

    teacher: dict[str, Any]
    """The teacher's fingerprint."""
    vocabulary: int
    """Ids that the teacher's distribution is over."""
    k: int
    temperatures: tuple[float, ...]
    samples: int = 0
    seed: int = 0
    """Of the samples."""
    codec: str = "compact"
    batch_tokens: int | None = None
    """Documents were scored together in groups of so many tokens; None: each one on its own."""

    @property
    def layout(self) -> Layout:
        """What the codec needs to know."""
        return Layout(self.k, self.temperatures, self.samples, self.vocabulary)

    @property
    def coding(self) -> Codec:
        """The codec itself."""
        return CODECS[self.codec]

    def digest(self) -> bytes:
        """16 bytes that stand in every shard."""
        return hashlib.blake2b(_text(self.record()).encode(), digest_size=16).digest()

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return json.loads(json.dumps(asdict(self)))

    def differences(self, other: Identity) -> list[str]:
        """``field: theirs -> ours`` where ``other`` differs."""
        return _differences(self.record(), other.record())

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Identity:
        """The opposite of :meth:`record`."""
        return cls(**{**record, "temperatures": tuple(record["temperatures"])})


@dataclass(frozen=True)
class ShardInfo:
    """A finished file."""

    file: str
    bytes: int
    documents: int
    rows: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says."""

    identity: Identity
    complete: bool = False
    """A capture has gone through all of its text."""
    shards: tuple[ShardInfo, ...] = field(default=())

    def listing(self, shard: ShardInfo) -> Manifest:
        """With one more finished file, or a newer word about it."""
        others = [other for other in self.shards if other.file != shard.file]
        return replace(self, shards=tuple(sorted([*others, shard], key=lambda s: s.file)))

    def text(self) -> str:
        """The file's text; it depends on nothing else."""
        record = {
            "format": FORMAT,
            "identity": self.identity.record(),
            "complete": self.complete,
            "documents": sum(shard.documents for shard in self.shards),
            "rows": sum(shard.rows for shard in self.shards),
            "shards": [asdict(shard) for shard in self.shards],
        }
        return _text({**record, "sha256": hashlib.sha256(_text(record).encode()).hexdigest()})


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest; None if it has none.

    Raises:
        TeacherError: damaged, or of another version.
    """
    path = folder / NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TeacherError(f"{path}: cannot be read ({error.strerror}): bring back a copy, or set {folder} aside and capture again") from error
    damaged = f"{path}: damaged: its text does not match its own checksum; set {folder} aside and capture again, or bring back a copy of the file"
    try:
        record = parse(data)
        version = record["format"]
        manifest = Manifest(
            Identity.from_record({f.name: record["identity"][f.name] for f in fields(Identity)}),
            record["complete"],
            tuple(ShardInfo(**shard) for shard in record["shards"]),
        )
        # Compared as text, so that not even a changed blank goes unnoticed.
        same = manifest.text().encode() == data
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TeacherError(damaged) from error
    if not same:
        if version != FORMAT:
            raise TeacherError(f"{path}: format {version!r:.80}, and this version reads {FORMAT}: capture again")
        raise TeacherError(damaged)
    if strange := [shard.file for shard in manifest.shards if not _FILE.fullmatch(str(shard.file))]:
        raise TeacherError(f"{path}: lists {strange[0]!r:.80}, which is no file of a store (00/00000.shard): set {folder} aside and capture again")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Written beside and renamed.  The caller holds :func:`exclusive`."""
    # One name for all processes: a killed one's remains are overwritten by the next writer.
    beside = folder / f".{NAME}.part"
    with open(beside, "w", encoding="utf-8") as file:
        file.write(manifest.text())
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, folder / NAME)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Wait for an advisory lock on the empty file ``path``; the system frees it with the process."""
    with open(path, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _text(record: Any) -> str:
    return json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for name in sorted({*old, *new})
            for line in _differences(old.get(name), new.get(name), f"{path}.{name}".lstrip("."))
        ]
    return [] if old == new else [f"{path}: {json.dumps(old, ensure_ascii=False)} -> {json.dumps(new, ensure_ascii=False)}"]
