"""A folder of signals: put a document's rows in, get them back by the document's tokens.

    manifest.json         whose signals these are, and the finished files with their SHA-256
    00/00000.shard        finished: blocks and an index            (shards.py)
    00/00001.open         being written
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from limbeck.errors import TeacherError
from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.store.blocks import Document, asked_of, read_block, read_header, whole, write_block
from limbeck.teachers.store.manifest import Identity, Manifest, exclusive, read_manifest, write_manifest
from limbeck.teachers.store.shards import (
    ENTRY,
    HEAD,
    SHARD_BYTES,
    ShardFile,
    ShardWriter,
    check_head,
    describe,
    entry,
    finished_files,
    read_index,
    scan,
    shards_of,
    unfinished_files,
)


@dataclass(frozen=True)
class _Where:
    file: ShardFile
    entry: np.ndarray


class SignalStore:
    """One store, open for reading, and for writing if it is given an identity.

    Any number of processes read while others write: what they see is whole blocks, those of other writers as they were when the
    store was opened or last :meth:`refresh`-ed.
    """

    def __init__(
        self, folder: Path, identity: Identity | None = None, *, writer: int | None = 0, shard_bytes: int = SHARD_BYTES
    ):
        """Open ``folder``.  With an ``identity`` the store is made if it is not there, and must be of that identity if it is;
        ``writer`` is the number of the sub-folder to write to, None to read only.

        Raises:
            TeacherError: nothing here, another identity (with every differing field), damaged, or ``writer`` is taken.
        """
        self.folder = Path(folder)
        self._mutex = threading.RLock()
        self._writer: ShardWriter | None = None
        self._own: ShardFile | None = None
        manifest = read_manifest(self.folder)
        if manifest is None:
            if identity is None:
                raise TeacherError(f"{self.folder}: no signals here (no manifest.json): run the capture stage that makes them")
            manifest = self._found(identity)
        if identity is not None and (changed := manifest.identity.differences(identity)):
            raise TeacherError(
                f"{self.folder} holds the signals of something else ({'; '.join(changed)}): "
                "name another `signals` folder, or set this one aside"
            )
        self.identity = manifest.identity
        self.codec, self.layout = self.identity.coding, self.identity.layout
        self._digest = self.identity.digest()
        if identity is not None and writer is not None:
            self._writer = ShardWriter(self.folder / f"{writer:02d}", self._digest, shard_bytes=shard_bytes)
            self._list_finished()
            if self._writer.full:
                # Killed between its last block and its index.
                self.finish()
        self._sizes_agree()
        self._files: list[ShardFile] = []
        self._recent: dict[bytes, list[_Where]] = {}
        self.num_documents = self.num_rows = self.num_bytes = 0
        self._load()

    @property
    def lost(self) -> int:
        """Bytes of a half-written block that a killed writer left, and that were cut off."""
        return 0 if self._writer is None else self._writer.lost

    def get(self, ask: Ask, *, same_question: bool = False) -> TopKRows | None:
        """The rows of a document's positions, decoded; None if they are not all stored.

        With ``same_question`` only rows that were stored for just these positions will do.

        Raises:
            TeacherError: the block is damaged; the message names file, document and place.
        """
        asked = asked_of(ask)
        with self._mutex:
            held = sorted(self._held(ask.key), key=lambda where: where.entry["asked"].tobytes() != asked)
        for where in held:
            if same_question and where.entry["asked"].tobytes() != asked:
                break
            answer = self._read(where).answer(ask.positions)
            if answer is not None:
                return answer
        return None

    def has(self, ask: Ask) -> bool:
        """Whether rows of just these positions are stored."""
        asked = asked_of(ask)
        with self._mutex:
            return any(where.entry["asked"].tobytes() == asked for where in self._held(ask.key))

    def put(self, ask: Ask, rows: TopKRows) -> TopKRows:
        """Store the answer to a question that has none yet.  Returns what the store gives back for it from now on."""
        with self._mutex:
            held = self.get(ask, same_question=True)
            if held is not None:
                return held
            block = write_block(ask, rows, self.codec, self.layout)
            if self._writer is not None:
                self._append(block)
            return read_block(block, self.codec, self.layout).rows

    def finish(self) -> None:
        """Finish the file that is being written."""
        with self._mutex:
            if self._writer is None:
                return
            info = self._writer.finish()
            self._own = None
            if info is not None:
                with exclusive(self.folder / "LOCK"):
                    write_manifest(self.folder, self._manifest().listing(info))

    def complete(self) -> None:
        """Finish, and note that a capture has gone through all of its text."""
        self.finish()
        with exclusive(self.folder / "LOCK"):
            manifest = self._manifest()
            write_manifest(self.folder, Manifest(manifest.identity, True, manifest.shards))

    def refresh(self) -> None:
        """See what other writers have stored since."""
        with self._mutex:
            for file in self._files:
                file.close()
            self._load()

    def close(self) -> None:
        """Free the lock and the files; an unfinished file goes on with the next writer."""
        with self._mutex:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            for file in self._files:
                file.close()

    def documents(self) -> Iterator[Document]:
        """Everything stored, in the order of files and blocks."""
        for path in (*finished_files(self.folder), *unfinished_files(self.folder)):
            file = ShardFile(path)
            try:
                for one in self._entries(path):
                    yield self._read(_Where(file, one))
            finally:
                file.close()

    def verify(self) -> list[str]:
        """Everything that is damaged, a line each, by file, block and document; nothing if every byte is as it was written."""
        manifest = self._manifest()
        listed = {shard.file: shard for shard in manifest.shards}
        found = []
        for file in sorted({*listed, *(f"{path.parent.name}/{path.name}" for path in finished_files(self.folder))}):
            path = self.folder / file
            try:
                same = path.is_file() and (file not in listed or describe(path) == listed[file])
            except TeacherError:
                same = False
            if same and file in listed:
                continue
            lines = list(self._damage(path)) if path.is_file() else [f"{path}: is missing"]
            found += lines or ([] if same else [f"{path}: its content is not what was written (SHA-256 differs)"])
        for path in unfinished_files(self.folder):
            found += self._damage(path)
        return found

    def _found(self, identity: Identity) -> Manifest:
        """Make a store, unless another process was faster."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with exclusive(self.folder / "LOCK"):
            manifest = read_manifest(self.folder)
            if manifest is None:
                if finished_files(self.folder) or unfinished_files(self.folder):
                    raise TeacherError(f"{self.folder}: signals without their manifest.json: bring it back, or set the folder aside")
                manifest = Manifest(identity)
                write_manifest(self.folder, manifest)
        return manifest

    def _manifest(self) -> Manifest:
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise TeacherError(f"{self.folder / 'manifest.json'} has gone: bring it back, or set the folder aside")
        return manifest

    def _list_finished(self) -> None:
        """Enter files that were finished just before their writer was killed."""
        assert self._writer is not None
        with exclusive(self.folder / "LOCK"):
            manifest = self._manifest()
            listed = {shard.file for shard in manifest.shards}
            for path in shards_of(self._writer.folder):
                if f"{path.parent.name}/{path.name}" not in listed:
                    check_head(path, self._digest)
                    manifest = manifest.listing(describe(path))
                    write_manifest(self.folder, manifest)

    def _sizes_agree(self) -> None:
        for shard in self._manifest().shards:
            path = self.folder / shard.file
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                what = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
                raise TeacherError(f"{path}: {what}: bring it back, or set {self.folder} aside and capture again")

    def _load(self) -> None:
        """Read every index into one, sorted by key."""
        self._files, tables, numbers = [], [np.zeros(0, ENTRY)], [np.zeros(0, np.uint32)]
        # Listed first: one that is finished by its writer in between is met again among the finished.
        unfinished = unfinished_files(self.folder)
        for path in finished_files(self.folder):
            check_head(path, self._digest)
            tables.append(read_index(path))
            numbers.append(np.full(len(tables[-1]), len(self._files), np.uint32))
            self._files.append(ShardFile(path))
        table = np.concatenate(tables)
        high, low = _halves(np.ascontiguousarray(table["key"]).tobytes())
        order = np.lexsort((low, high))
        self._table, self._numbers = table[order], np.concatenate(numbers)[order]
        self._high, self._low = high[order], low[order]
        self._recent, self._own = {}, None
        self.num_documents, self.num_rows = len(table), int(table["rows"].sum())
        self.num_bytes = int(table["size"].sum())
        for path in unfinished:
            with suppress(FileNotFoundError):
                self._load_unfinished(path)

    def _load_unfinished(self, path: Path) -> None:
        file = ShardFile(path)
        self._files.append(file)
        if self._writer is not None and path == self._writer.path:
            self._own = file
        if path.stat().st_size < HEAD.size:
            return
        check_head(path, self._digest)
        for offset, block in scan(path):
            self._enter(file, entry(block, offset))

    def _enter(self, file: ShardFile, one: np.ndarray) -> None:
        self._recent.setdefault(one["key"].tobytes(), []).append(_Where(file, one[0]))
        self.num_documents += 1
        self.num_rows += int(one["rows"][0])
        self.num_bytes += int(one["size"][0])

    def _append(self, block: bytes) -> None:
        assert self._writer is not None
        one = self._writer.append(block)
        if self._own is None:
            self._own = ShardFile(self._writer.path)
            self._files.append(self._own)
        self._enter(self._own, one)
        if self._writer.full:
            self.finish()

    def _held(self, key: bytes) -> Iterable[_Where]:
        (high,), (low,) = _halves(key)
        at = int(np.searchsorted(self._high, high))
        while at < len(self._high) and self._high[at] == high:
            if self._low[at] == low:
                yield _Where(self._files[self._numbers[at]], self._table[at])
            at += 1
        yield from self._recent.get(key, ())

    def _read(self, where: _Where) -> Document:
        offset, size = int(where.entry["offset"]), int(where.entry["size"])
        data = where.file.read(offset, size)
        key = where.entry["key"].tobytes()
        block = read_header(data)
        if block is not None and block.key == key and whole(data):
            return read_block(data, self.codec, self.layout)
        raise TeacherError(
            f"{where.file.path}: the block of document {key.hex()} at byte {offset} does not match its checksum: "
            f"set {self.folder} aside and capture again"
        )

    def _entries(self, path: Path) -> Iterator[np.ndarray]:
        if path.suffix == ".shard":
            yield from read_index(path)
        else:
            for offset, block in scan(path):
                yield entry(block, offset)[0]

    def _damage(self, path: Path) -> Iterator[str]:
        """What is wrong with one file."""
        try:
            check_head(path, self._digest)
        except TeacherError as error:
            yield str(error)
        end = path.stat().st_size
        try:
            index = read_index(path) if path.suffix == ".shard" else np.zeros(0, ENTRY)
        except TeacherError as error:
            yield str(error)
            index = np.zeros(0, ENTRY)
        if len(index):
            with open(path, "rb") as file:
                for number, one in enumerate(index):
                    file.seek(int(one["offset"]))
                    data = file.read(int(one["size"]))
                    yield from self._block_damage(path, number, int(one["offset"]), data, one["key"].tobytes())
            return
        offset = HEAD.size
        for number, (offset, block) in enumerate(scan(path)):
            yield from self._block_damage(path, number, offset, block, None)
            offset += len(block)
        if path.suffix == ".open" and offset != end:
            yield f"{path}: {end - offset} bytes from byte {offset} on are no whole block: its writer was killed, or they are damaged"

    def _block_damage(self, path: Path, number: int, offset: int, data: bytes, key: bytes | None) -> Iterator[str]:
        block = read_header(data)
        name = key.hex() if key is not None else block.key.hex() if block is not None else "unknown"
        place = f"{path}: block {number} (document {name}) at byte {offset}"
        if block is None or not whole(data) or (key is not None and block.key != key):
            yield f"{place}: does not match its checksum"
            return
        document = read_block(data, self.codec, self.layout)
        if Ask(document.ids, document.positions).key != block.key:
            yield f"{place}: its tokens are not those that its key names"


def _halves(keys: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The first and the second 8 bytes of keys as numbers that sort as they do."""
    both = np.frombuffer(keys, ">u8").reshape(-1, 2).astype(np.uint64)
    return both[:, 0], both[:, 1]
