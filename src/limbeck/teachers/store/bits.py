"""Whole numbers of any width in bits, packed and unpacked without a Python integer for any of them."""

from __future__ import annotations

from typing import Any

import numpy as np

GROUP = 8
"""Values whose bits end on a byte boundary whatever their width."""


def bits_for(count: int) -> int:
    """Width that tells ``count`` numbers ``0 … count - 1`` apart, at least 1."""
    return max(1, (count - 1).bit_length())


def packed_size(count: int, width: int) -> int:
    """Bytes that ``count`` numbers of ``width`` bits take."""
    return -(-count * width // 8)


def pack(values: np.ndarray, width: int) -> np.ndarray:
    """Numbers below ``2**width`` (``width`` <= 32) as uint8, lowest bit first, one after the other without gaps."""
    count = values.size
    groups = -(-count // GROUP)
    padded = np.zeros((groups, GROUP), np.uint64)
    padded.reshape(-1)[:count] = values.reshape(-1)
    out = np.zeros((groups, width), np.uint8)
    for place in range(GROUP):
        byte, shift = divmod(place * width, 8)
        shifted = padded[:, place] << np.uint64(shift)
        for step in range(packed_size(1, shift + width)):
            out[:, byte + step] |= (shifted >> np.uint64(8 * step)).astype(np.uint8)
    return out.reshape(-1)[: packed_size(count, width)]


def unpack(data: np.ndarray, width: int, count: int) -> np.ndarray:
    """The first ``count`` numbers of :func:`pack`, uint32 ``[count]``."""
    groups = -(-count // GROUP)
    padded = np.zeros(groups * width, np.uint8)
    size = packed_size(count, width)
    padded[:size] = data[:size]
    rows = padded.reshape(groups, width)
    # Up to 25 bits, a number and the bits before it in its first byte fit into 32.
    wide: Any = np.uint32 if width <= 25 else np.uint64
    out = np.empty((groups, GROUP), np.uint32)
    mask = wide((1 << width) - 1)
    for place in range(GROUP):
        byte, shift = divmod(place * width, 8)
        value = rows[:, byte].astype(wide)
        for step in range(1, packed_size(1, shift + width)):
            value |= rows[:, byte + step].astype(wide) << wide(8 * step)
        out[:, place] = (value >> wide(shift)) & mask
    return out.reshape(-1)[:count]


def pack_rising(values_mK: np.ndarray, limit: int) -> bytes:
    """Rows of non-decreasing numbers below ``limit`` at about ``log2(limit / K) + 2`` bits each (Elias 1974, Fano 1971).

    The low bits are packed as they are; the high bits are written as gaps in unary, row by row in the same number of bytes,
    which is what lets all rows be read at once.
    """
    rows, kept = values_mK.shape
    low, width = _rising_shape(kept, limit)
    marks = np.zeros((rows, width * 8), np.uint8)
    np.put_along_axis(marks, (values_mK >> low).astype(np.int64) + np.arange(kept), 1, axis=1)
    head = np.packbits(marks, axis=1, bitorder="little").tobytes()
    return head + (pack(values_mK & ((1 << low) - 1), low).tobytes() if low else b"")


def unpack_rising(data: np.ndarray, rows: int, kept: int, limit: int) -> np.ndarray:
    """What :func:`pack_rising` packed, uint32 ``[rows, kept]``; ValueError if the bytes do not hold so many numbers."""
    low, width = _rising_shape(kept, limit)
    marks = np.unpackbits(data[: rows * width].reshape(rows, width), axis=1, bitorder="little")
    found = np.flatnonzero(marks.view(bool))
    if len(found) != rows * kept:
        raise ValueError(f"{len(found)} marks instead of {rows * kept}")
    high = found.reshape(rows, kept) - np.arange(rows)[:, None] * (width * 8) - np.arange(kept)
    values = high.astype(np.uint32)
    if low:
        values <<= np.uint32(low)
        values |= unpack(data[rows * width :], low, rows * kept).reshape(rows, kept)
    return values


def rising_size(rows: int, kept: int, limit: int) -> int:
    """Bytes of :func:`pack_rising`."""
    low, width = _rising_shape(kept, limit)
    return rows * width + packed_size(rows * kept, low)


def _rising_shape(kept: int, limit: int) -> tuple[int, int]:
    """Low bits of a number, and bytes of a row's unary part."""
    low = max(0, (limit // max(kept, 1)).bit_length() - 1)
    return low, packed_size(kept + ((limit - 1) >> low), 1)
