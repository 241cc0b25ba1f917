"""Files of blocks: ``NN/NNNNN.open`` while one is written, ``NN/NNNNN.shard`` with an index when it is full.

A file begins with :data:`HEAD` (magic, version, digest of the store's identity).  Blocks follow.  A finished one ends in an
index of its blocks and :data:`TAIL` (where the index begins, blocks, CRC-32 of the index, magic).  An unfinished one is only ever
appended to: whatever kills its writer, all blocks but the last are whole, and the next writer cuts the last one off if it is not.

Each writer has a folder of its own (``00`` for the first rank), locked while it writes, so that several may fill one store.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from limbeck.errors import TeacherError
from limbeck.files import fsync, sha256
from limbeck.teachers.store.blocks import HEADER, read_header, whole
from limbeck.teachers.store.manifest import ShardInfo

VERSION = 1
HEAD = struct.Struct("<8sI16s4x")
HEAD_MAGIC = b"LBSIGNAL"
TAIL = struct.Struct("<QII8s")
TAIL_MAGIC = b"LBINDEX1"
ENTRY = np.dtype([("key", "V16"), ("asked", "V8"), ("offset", "<u8"), ("size", "<u4"), ("rows", "<u4")])
"""Of one block: key and positions of the document, where it stands, its bytes, its rows."""
SHARD_BYTES = 256 * 2**20
"""A file is finished when it has grown past this."""
MAPPED = 256
"""Files that are mapped at one time."""


def head(identity: bytes) -> bytes:
    """The first bytes of every file of a store."""
    return HEAD.pack(HEAD_MAGIC, VERSION, identity)


def entry(block_bytes: bytes | memoryview, offset: int) -> np.ndarray:
    """The index entry of a block, :data:`ENTRY` ``[1]``."""
    block = read_header(block_bytes)
    assert block is not None
    found = np.zeros(1, ENTRY)
    found["key"] = np.frombuffer(block.key, "V16")
    found["asked"] = np.frombuffer(block.asked, "V8")
    found["offset"], found["size"], found["rows"] = offset, block.size, block.rows
    return found


def scan(path: Path, start: int = HEAD.size) -> Iterator[tuple[int, bytes]]:
    """``(offset, bytes)`` of the whole blocks from ``start`` on, up to the first that is not."""
    with open(path, "rb") as file:
        file.seek(start)
        offset = start
        while len(begun := file.read(HEADER.size)) == HEADER.size:
            block = read_header(begun)
            if block is None or not whole(data := begun + file.read(block.size - HEADER.size)):
                return
            yield offset, data
            offset += len(data)


def check_head(path: Path, identity: bytes) -> None:
    """Refuse a file that is not of this store."""
    try:
        with open(path, "rb") as file:
            found = file.read(HEAD.size)
    except OSError as error:
        raise TeacherError(f"{path}: cannot be read ({error.strerror}): set it aside and capture again") from error
    if found != head(identity):
        raise TeacherError(f"{path}: its first {HEAD.size} bytes are damaged, or it belongs to another store: set it aside and capture again")


def read_index(path: Path) -> np.ndarray:
    """The index of a finished file, :data:`ENTRY` ``[blocks]``.

    Raises:
        TeacherError: cut short or damaged.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size >= HEAD.size + TAIL.size:
            file.seek(size - TAIL.size)
            start, blocks, crc, magic = TAIL.unpack(file.read(TAIL.size))
            if magic == TAIL_MAGIC and start + blocks * ENTRY.itemsize + TAIL.size == size:
                file.seek(start)
                data = file.read(blocks * ENTRY.itemsize)
                if zlib.crc32(data) == crc:
                    return np.frombuffer(data, ENTRY)
    raise TeacherError(f"{path}: its index, the end of the file, is damaged or missing: set the file aside and capture again")


def finished_files(folder: Path) -> list[Path]:
    """All finished files of a store, in order."""
    return [path for own in sorted(folder.glob("[0-9][0-9]")) for path in shards_of(own)]


def shards_of(own: Path) -> list[Path]:
    """The finished files of one writer's folder: what has a number, and not what somebody put beside it."""
    return sorted(path for path in own.glob("*.shard") if path.stem.isdecimal())


def unfinished_files(folder: Path) -> list[Path]:
    """The files that are being written, or were when their writer was killed."""
    return sorted(folder.glob("[0-9][0-9]/*.open"))


@lru_cache(maxsize=MAPPED)
def _mapped(path: Path, inode: int) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class ShardFile:
    """Blocks of one file by offset: mapped if it is finished, else through a descriptor that outlives its renaming."""

    def __init__(self, path: Path):
        self.path = path
        self.finished = path.suffix == ".shard"
        self._descriptor = -1 if self.finished else os.open(path, os.O_RDONLY)
        self._inode = path.stat().st_ino if self.finished else 0

    def read(self, offset: int, size: int) -> bytes | memoryview:
        """Bytes of a block, fewer if the file ends before."""
        if self.finished:
            return memoryview(_mapped(self.path, self._inode))[offset : offset + size]
        return os.pread(self._descriptor, size, offset)

    def close(self) -> None:
        """Let go of it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class ShardWriter:
    """Appends blocks to the files of one writer's folder.

    Going on after a kill: finished files stay, the unfinished one is cut after its last whole block.  The files depend on the
    blocks and their order alone.
    """

    def __init__(self, folder: Path, identity: bytes, *, shard_bytes: int = SHARD_BYTES):
        """Lock ``folder`` and find its end.  TeacherError if another process writes there."""
        self.folder = folder
        self.identity = identity
        self.shard_bytes = shard_bytes
        folder.mkdir(parents=True, exist_ok=True)
        # Held while the writer lives: the system frees it with the process.
        self._lock = open(folder / "LOCK", "a", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise TeacherError(
                f"{folder} is being written by another process: wait for it, stop it, or give this run another `signals` folder"
            ) from error
        self.lost = 0
        """Bytes that the last writer left half-written, and that were cut off."""
        self._descriptor = -1
        self._entries: list[np.ndarray] = []
        self._recover()

    @property
    def path(self) -> Path:
        """The file that is written now."""
        return self.folder / f"{self.number:05d}.open"

    def append(self, block: bytes) -> np.ndarray:
        """Write a block; returns its index entry."""
        if self._descriptor < 0:
            self._begin()
        found = entry(block, self._size)
        # Entered only when written: on a full disk the file keeps its last whole block and an end that is cut off next time.
        _write(self._descriptor, block)
        self._digest.update(block)
        self._size += len(block)
        self._entries.append(found)
        return found

    @property
    def full(self) -> bool:
        """Whether the file has grown past the limit."""
        return self._descriptor >= 0 and self._size >= self.shard_bytes

    def finish(self) -> ShardInfo | None:
        """Give the file its index, put it on the disk and rename it; None if nothing is in it."""
        if not self._entries:
            return None
        index = np.concatenate(self._entries)
        data = index.tobytes()
        data += TAIL.pack(self._size, len(index), zlib.crc32(data), TAIL_MAGIC)
        _write(self._descriptor, data)
        self._digest.update(data)
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1
        done = self.path.with_suffix(".shard")
        os.rename(self.path, done)
        fsync(self.folder)
        info = _info(done, self._size + len(data), index, self._digest.hexdigest())
        self._entries = []
        self.number += 1
        return info

    def close(self) -> None:
        """Stop writing and free the lock; the unfinished file stays for the next writer."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._lock.close()

    def _begin(self) -> None:
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        _write(self._descriptor, head(self.identity))
        self._digest = hashlib.sha256(head(self.identity))
        self._size, self._entries = HEAD.size, []

    def _recover(self) -> None:
        self.number = max((int(path.stem) + 1 for path in shards_of(self.folder)), default=0)
        if not self.path.exists():
            return
        found = self.path.stat().st_size
        if found < HEAD.size:
            self.path.unlink()
            self.lost = found
            return
        check_head(self.path, self.identity)
        self._size, self._digest = HEAD.size, hashlib.sha256(head(self.identity))
        for offset, block in scan(self.path):
            self._entries.append(entry(block, offset))
            self._digest.update(block)
            self._size += len(block)
        self.lost = found - self._size
        self._descriptor = os.open(self.path, os.O_WRONLY)
        os.ftruncate(self._descriptor, self._size)
        os.lseek(self._descriptor, self._size, os.SEEK_SET)


def describe(path: Path) -> ShardInfo:
    """What the manifest says about a finished file, read from the file."""
    return _info(path, path.stat().st_size, read_index(path), sha256(path))


def _info(path: Path, size: int, index: np.ndarray, digest: str) -> ShardInfo:
    return ShardInfo(f"{path.parent.name}/{path.name}", size, len(index), int(index["rows"].sum()), digest)


def _write(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]
