"""One document's rows as a block of bytes that can be checked, found again in a torn file, and read on its own.

A block is a header of :data:`HEADER`'s fields and a zstd frame; the frame holds, without gaps,

    bits of the positions that are answered, one a token, lowest first
    the document's ids, ``ceil(log2 V)`` bits each
    the codec's columns

The CRC-32 of the header before it and of the frame stands in the header, so any changed byte is noticed when a block is read.
"""

from __future__ import annotations

import hashlib
import struct
import threading
import zlib
from dataclasses import dataclass

import numpy as np
import zstandard

from limbeck.errors import TeacherError
from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.store.bits import bits_for, pack, packed_size, unpack
from limbeck.teachers.store.codecs import Codec, Layout

HEADER = struct.Struct("<4s16s8sIIII")
"""Magic, key of the document, digest of the positions, tokens, rows, bytes of the frame, CRC-32."""
MAGIC = b"LBLK"
LEVEL = 3
"""Of zstd; a block's bytes depend on it."""

_local = threading.local()


@dataclass(frozen=True)
class Block:
    """What a block's header says."""

    key: bytes
    asked: bytes
    tokens: int
    rows: int
    size: int
    """Bytes, header included."""


@dataclass(frozen=True)
class Document:
    """What is stored of one document."""

    ids: np.ndarray
    """int32 ``[n]``."""
    positions: np.ndarray
    """int32 ``[m]``, ascending."""
    rows: TopKRows

    def answer(self, positions: np.ndarray) -> TopKRows | None:
        """The rows of these positions; None if any of them is not stored."""
        if np.array_equal(positions, self.positions):
            return self.rows
        at = np.searchsorted(self.positions, positions)
        if not len(self.positions) or (self.positions[np.minimum(at, len(self.positions) - 1)] != positions).any():
            return None
        rows = self.rows
        samples = None if rows.samples_mS is None else rows.samples_mS[at]
        return TopKRows(rows.ids_mK[at], rows.logits_mK[at], rows.log_z_mZ[at], samples)


def asked_of(ask: Ask) -> bytes:
    """8 bytes that name the positions asked about."""
    return hashlib.blake2b(np.ascontiguousarray(ask.positions, "<i4").tobytes(), digest_size=8).digest()


def write_block(ask: Ask, rows: TopKRows, codec: Codec, layout: Layout) -> bytes:
    """The block of a document.  TeacherError for rows that are not an answer to the question."""
    if len(rows) != len(ask.positions):
        raise TeacherError(f"document {ask.key.hex()}: {len(rows)} rows for {len(ask.positions)} positions")
    if len(ask.positions) and not (ask.positions[0] >= 0 and ask.positions[-1] < len(ask.ids) and (np.diff(ask.positions) > 0).all()):
        raise TeacherError(f"document {ask.key.hex()}: positions must rise and lie within its {len(ask.ids)} tokens")
    if len(ask.ids) and not (int(ask.ids.min()) >= 0 and int(ask.ids.max()) < layout.vocabulary):
        raise TeacherError(f"document {ask.key.hex()}: id {int(ask.ids.max())} is not in the teacher's vocabulary of {layout.vocabulary} ids")
    marks = np.zeros(len(ask.ids), np.uint8)
    marks[ask.positions] = 1
    ids = pack(ask.ids.astype(np.uint32), bits_for(layout.vocabulary))
    raw = b"".join((np.packbits(marks, bitorder="little").tobytes(), ids.tobytes(), codec.encode(rows, layout)))
    frame = _compressor().compress(raw)
    fields = (MAGIC, ask.key, asked_of(ask), len(ask.ids), len(rows), len(frame))
    crc = zlib.crc32(frame, zlib.crc32(HEADER.pack(*fields, 0)))
    return HEADER.pack(*fields, crc) + frame


def read_header(data: bytes | memoryview) -> Block | None:
    """The header at the beginning of ``data``, or None if there is none."""
    if len(data) < HEADER.size:
        return None
    magic, key, asked, tokens, rows, size, _ = HEADER.unpack_from(data)
    return Block(key, asked, tokens, rows, HEADER.size + size) if magic == MAGIC else None


def whole(data: bytes | memoryview) -> bool:
    """Whether these bytes are one block as it was written."""
    block = read_header(data)
    if block is None or block.size != len(data):
        return False
    *fields, crc = HEADER.unpack_from(data)
    return zlib.crc32(data[HEADER.size :], zlib.crc32(HEADER.pack(*fields, 0))) == crc


def read_block(data: bytes | memoryview, codec: Codec, layout: Layout) -> Document:
    """The document of a block that is :func:`whole`.  ValueError for one that another layout wrote."""
    block = read_header(data)
    assert block is not None
    width = bits_for(layout.vocabulary)
    sizes = packed_size(block.tokens, 1), packed_size(block.tokens, width), codec.size(block.rows, layout)
    raw = np.frombuffer(_decompressor().decompress(data[HEADER.size :], max_output_size=sum(sizes)), np.uint8)
    if len(raw) != sum(sizes):
        raise ValueError(f"{len(raw)} bytes instead of {sum(sizes)}")
    marks = np.unpackbits(raw[: sizes[0]], count=block.tokens, bitorder="little")
    positions = np.flatnonzero(marks).astype(np.int32)
    ids = unpack(raw[sizes[0] :], width, block.tokens).astype(np.int32)
    return Document(ids, positions, codec.decode(raw[sizes[0] + sizes[1] :], block.rows, layout))


def _compressor() -> zstandard.ZstdCompressor:
    """One a thread: they are not made to be shared."""
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(level=LEVEL)
    return _local.compressor


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    return _local.decompressor
