"""Top-k rows as bytes: exactly, in half precision, or in a byte a value.

Shape legend: m rows, K kept ids, Z temperatures, S samples, V vocabulary.  Columns stand one after the other, little-endian,
and their sizes follow from ``m`` and the :class:`Layout` alone.

A rounded logit changes the mass of the kept ids, and with it the mass of the rest, which the losses take from logZ.  So what is
stored beside rounded logits ``q`` is ``logZ_T + logsumexp(q / T) - logsumexp(z / T)`` for each temperature: the kept mass at every
stored temperature is the teacher's to the last bit of fp32 (and so never above 1), and the rounding costs
``KL = m log sum_i p_i e^(d_i) - m sum_i p_i d_i``, about half of the variance of the errors ``d = (q - z) / T`` under the kept
probabilities ``p`` (with mass ``m``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from limbeck.errors import TeacherError
from limbeck.teachers.documents import TopKRows
from limbeck.teachers.store.bits import bits_for, pack, pack_rising, packed_size, rising_size, unpack, unpack_rising

LEVELS = 255
"""Values of a byte that stand for numbers; the one above them stands for minus infinity."""
BEND = 1.5
"""How much finer the levels are at the likeliest id than at the last kept one, as a power of e: errors weigh by probability."""
SMALLEST_SPAN = 2.0**-10


@dataclass(frozen=True)
class Layout:
    """What a store's rows have in common: K, the temperatures, S and V."""

    k: int
    temperatures: tuple[float, ...]
    samples: int
    vocabulary: int


class Codec(Protocol):
    """One way to write rows down."""

    name: str

    def encode(self, rows: TopKRows, layout: Layout) -> bytes:
        """All columns of a document's rows.  TeacherError for rows that do not fit the layout or hold NaN."""
        ...

    def decode(self, data: np.ndarray, m: int, layout: Layout) -> TopKRows:
        """Rows from the bytes (uint8) of :meth:`encode`.  ValueError if they are not what was encoded."""
        ...

    def size(self, m: int, layout: Layout) -> int:
        """Bytes of ``m`` rows."""
        ...


class FloatCodec:
    """Values as they are in fp32 or fp16, ids in ``ceil(log2 V)`` bits, in the order given."""

    def __init__(self, name: str, dtype: str):
        self.name = name
        self.dtype = np.dtype(dtype)

    def encode(self, rows: TopKRows, layout: Layout) -> bytes:
        check(rows, layout)
        with np.errstate(over="ignore"):
            values_mK = rows.logits_mK.astype(self.dtype)
        if np.isinf(values_mK).any() and np.isposinf(np.abs(values_mK[np.isfinite(rows.logits_mK)])).any():
            worst = float(np.abs(rows.logits_mK[np.isfinite(rows.logits_mK)]).max())
            raise TeacherError(f"a logit of {worst:g} does not fit into codec '{self.name}': use codec exact")
        log_z_mZ = rows.log_z_mZ
        if self.dtype != np.float32:
            log_z_mZ = keep_mass(rows.logits_mK, values_mK.astype(np.float32), log_z_mZ, layout.temperatures)
        ids = pack(rows.ids_mK.astype(np.uint32), bits_for(layout.vocabulary))
        return b"".join((ids.tobytes(), values_mK.tobytes(), _shared(log_z_mZ, rows, layout)))

    def decode(self, data: np.ndarray, m: int, layout: Layout) -> TopKRows:
        width, count = bits_for(layout.vocabulary), m * layout.k
        cut = _cutter(data)
        ids_mK = unpack(cut(packed_size(count, width)), width, count).astype(np.int32).reshape(m, layout.k)
        values_mK = cut(count * self.dtype.itemsize).view(self.dtype).astype(np.float32).reshape(m, layout.k)
        return TopKRows(ids_mK, values_mK, *_read_shared(cut, m, layout))

    def size(self, m: int, layout: Layout) -> int:
        count = m * layout.k
        return packed_size(count, bits_for(layout.vocabulary)) + count * self.dtype.itemsize + _shared_size(m, layout)


class CompactCodec:
    """A byte a value between each row's first and last logit, and ids in rising order as gaps.

    A row keeps its largest logit in fp32 and the span to its smallest in fp16; :data:`LEVELS` levels between them lie closer
    together towards the largest.  The order is found again from the values: ids of the same level come in rising order.
    """

    name = "compact"

    def encode(self, rows: TopKRows, layout: Layout) -> bytes:
        check(rows, layout)
        logits_mK = rows.logits_mK
        finite_mK = np.isfinite(logits_mK)
        top_m1 = np.where(finite_mK, logits_mK, -np.inf).max(1, initial=-np.inf, keepdims=True)
        top_m1 = np.where(np.isfinite(top_m1), top_m1, 0).astype("<f4")
        depth_mK = np.where(finite_mK, top_m1 - logits_mK, 0)
        span_m1 = np.maximum(depth_mK.max(1, initial=0, keepdims=True), SMALLEST_SPAN).astype(np.float32)
        if span_m1.size and span_m1.max() > np.finfo(np.float16).max:
            raise TeacherError(f"kept logits that lie {float(span_m1.max()):g} apart do not fit into codec 'compact': use codec exact")
        # Rounded up, so that the last level reaches the smallest logit.
        half_m1 = span_m1.astype("<f2")
        half_m1 = np.where(half_m1.astype(np.float32) < span_m1, np.nextafter(half_m1, np.float16(np.inf)), half_m1).astype("<f2")
        codes_mK = np.searchsorted(_MIDDLES, depth_mK / half_m1.astype(np.float32)).astype(np.uint8)
        codes_mK[~finite_mK] = LEVELS
        values_mK = _levels(codes_mK, top_m1, half_m1)
        log_z_mZ = keep_mass(logits_mK, values_mK, rows.log_z_mZ, layout.temperatures)
        order_mK = np.argsort(rows.ids_mK, axis=1, kind="stable")
        ids = pack_rising(np.take_along_axis(rows.ids_mK, order_mK, 1).astype(np.uint32), layout.vocabulary)
        codes = np.take_along_axis(codes_mK, order_mK, 1)
        return b"".join((ids, codes.tobytes(), top_m1.tobytes(), half_m1.tobytes(), _shared(log_z_mZ, rows, layout)))

    def decode(self, data: np.ndarray, m: int, layout: Layout) -> TopKRows:
        cut = _cutter(data)
        ids_mK = unpack_rising(cut(rising_size(m, layout.k, layout.vocabulary)), m, layout.k, layout.vocabulary)
        codes_mK = cut(m * layout.k).reshape(m, layout.k)
        top_m1, half_m1 = cut(m * 4).view("<f4")[:, None], cut(m * 2).view("<f2")[:, None]
        # Level and id in one number: sorting it sorts the row, and no index has to be followed afterwards.
        width = bits_for(layout.vocabulary)
        wide: Any = np.uint32 if width <= 24 else np.uint64
        both_mK = codes_mK.astype(wide) << wide(width)
        both_mK |= ids_mK
        both_mK.sort(axis=1)
        ids_mK = (both_mK & wide((1 << width) - 1)).astype(np.int32)
        values_mK = _levels((both_mK >> wide(width)).astype(np.uint8), top_m1, half_m1)
        return TopKRows(ids_mK, values_mK, *_read_shared(cut, m, layout))

    def size(self, m: int, layout: Layout) -> int:
        return rising_size(m, layout.k, layout.vocabulary) + m * (layout.k + 6) + _shared_size(m, layout)


CODECS: dict[str, Codec] = {c.name: c for c in (FloatCodec("exact", "<f4"), FloatCodec("fp16", "<f2"), CompactCodec())}

_CURVE = (np.expm1(BEND * np.arange(LEVELS) / (LEVELS - 1)) / np.expm1(BEND)).astype(np.float32)
_MIDDLES = ((_CURVE[1:] + _CURVE[:-1]) / 2).astype(np.float32)
_DEPTHS = np.append(_CURVE, np.float32(np.inf))


def _levels(codes_mK: np.ndarray, top_m1: np.ndarray, half_m1: np.ndarray) -> np.ndarray:
    depth_mK = _DEPTHS[codes_mK]
    depth_mK *= half_m1.astype(np.float32)
    return np.subtract(top_m1, depth_mK, out=depth_mK)


def keep_mass(
    logits_mK: np.ndarray, rounded_mK: np.ndarray, log_z_mZ: np.ndarray, temperatures: tuple[float, ...]
) -> np.ndarray:
    """LogZ ``[m, Z]`` with which the rounded logits have the mass that the true ones have; untouched rows keep theirs."""
    if not logits_mK.size or np.array_equal(logits_mK, rounded_mK):
        return log_z_mZ
    shift_mZ = np.stack([log_sum(rounded_mK, t) - log_sum(logits_mK, t) for t in temperatures], 1)
    # A row without any finite logit has no mass to keep.
    return (log_z_mZ + np.where(np.isfinite(shift_mZ), shift_mZ, 0)).astype(np.float32)


def log_sum(logits_mK: np.ndarray, temperature: float) -> np.ndarray:
    """``logsumexp(logits / T)`` of each row in fp64, ``[m]``."""
    scaled_mK = logits_mK.astype(np.float64) / temperature
    top_m1 = scaled_mK.max(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.log(np.exp(scaled_mK - top_m1).sum(1)) + top_m1[:, 0]


def check(rows: TopKRows, layout: Layout) -> None:
    """Refuse rows of another shape, ids that the vocabulary does not have, NaN and plus infinity."""
    m = len(rows)
    shapes = {
        "ids": (rows.ids_mK.shape, (m, layout.k)),
        "logits": (rows.logits_mK.shape, (m, layout.k)),
        "log_z": (rows.log_z_mZ.shape, (m, len(layout.temperatures))),
        "samples": ((m, 0) if rows.samples_mS is None else rows.samples_mS.shape, (m, layout.samples)),
    }
    for name, (found, wanted) in shapes.items():
        if found != wanted:
            raise TeacherError(f"the teacher gave {name} of shape {list(found)}, and the store holds {list(wanted)}")
    for name, ids in (("ids", rows.ids_mK), ("samples", rows.samples_mS)):
        if ids is not None and ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < layout.vocabulary):
            raise TeacherError(
                f"the teacher gave {name} from {int(ids.min())} to {int(ids.max())}, and the store's vocabulary has {layout.vocabulary} ids"
            )
    if np.isnan(rows.logits_mK).any() or np.isposinf(rows.logits_mK).any() or not np.isfinite(rows.log_z_mZ).all():
        raise TeacherError("the teacher gave NaN or infinite numbers: nothing was stored of them")


def _shared(log_z_mZ: np.ndarray, rows: TopKRows, layout: Layout) -> bytes:
    samples = b"" if rows.samples_mS is None else pack(rows.samples_mS.astype(np.uint32), bits_for(layout.vocabulary)).tobytes()
    return np.ascontiguousarray(log_z_mZ, "<f4").tobytes() + samples


def _read_shared(cut: _Cut, m: int, layout: Layout) -> tuple[np.ndarray, np.ndarray | None]:
    log_z_mZ = cut(m * len(layout.temperatures) * 4).view("<f4").astype(np.float32).reshape(m, len(layout.temperatures))
    if not layout.samples:
        return log_z_mZ, None
    width, count = bits_for(layout.vocabulary), m * layout.samples
    return log_z_mZ, unpack(cut(packed_size(count, width)), width, count).astype(np.int32).reshape(m, layout.samples)


def _shared_size(m: int, layout: Layout) -> int:
    return m * len(layout.temperatures) * 4 + packed_size(m * layout.samples, bits_for(layout.vocabulary))


class _Cut(Protocol):
    def __call__(self, size: int) -> np.ndarray: ...


def _cutter(data: np.ndarray) -> _Cut:
    """Gives column after column of the bytes."""
    start = 0

    def cut(size: int) -> np.ndarray:
        nonlocal start
        part = data[start : start + size]
        if len(part) != size:
            raise ValueError(f"{len(data)} bytes end before {start + size}")
        start += size
        return part

    return cut
