"""Top-k answers on the wire: one binary frame, and the same columns in JSON.

A frame is, without gaps and little-endian::

    4 bytes  b"LMBK"
    u16      version
    u32      length of the header
    ...      header, JSON: {"model", "fingerprint", "vocabulary", "k", "temperatures", "rows", "samples", "values"}
    u32      ids      [M, K]   likeliest first
    values   logits   [M, K]   float32 or float16, before any temperature
    f4       log_z    [M, Z]   one column a temperature
    u32      samples  [M, S]   S = 0 when none were asked for
    u32      CRC-32 of every byte before it

``rows`` holds the number of rows of each document, M is their sum, and row ``j`` of a document is the distribution over the token
after its ``positions[j]``.  The header ends in spaces, so that the columns begin at a multiple of eight bytes.  The same
columns travel as base64 (``"encoding": "b64"``) or as lists, one a document (``"json"``), in a JSON object that has the header's
fields beside them.  Every form gives back the bits that went in, up to the rounding of float16 values if those were asked for.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from limbeck.errors import LimbeckError
from limbeck.teachers.documents import TopKRows

__all__ = ["COLUMNS", "HEADER", "MEDIA_TYPE", "VALUES", "FrameError", "decode", "decode_object", "encode", "encode_object"]

MAGIC = b"LMBK"
VERSION = 1
MEDIA_TYPE = "application/x-limbeck-topk"
VALUES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
COLUMNS = ("ids", "logits", "log_z", "samples")
HEADER = ("model", "fingerprint", "vocabulary", "k", "temperatures", "rows", "samples", "values")

_PRELUDE = struct.Struct("<4sHI")
_CRC = struct.Struct("<I")
_ID: np.dtype[Any] = np.dtype("<u4")
_LOG_Z: np.dtype[Any] = np.dtype("<f4")


class FrameError(LimbeckError, ValueError):
    """Bytes that are no whole answer: cut short, damaged, or of another version.  Asking again may help."""


def encode(answers: Sequence[TopKRows], meta: Mapping[str, Any], values: str = "float32") -> bytes:
    """The frame of some answers that have one K, Z and S.

    ``meta`` has ``model``, ``fingerprint``, ``vocabulary`` and ``temperatures`` (and ``k``, ``samples`` for the case that
    there is no answer to read them from).  Raises :class:`FrameError` for a number that ``values`` cannot hold.
    """
    header, columns = _columns(answers, meta, values)
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-(_PRELUDE.size + len(text)) % 8)
    parts = [_PRELUDE.pack(MAGIC, VERSION, len(text)), text, *(columns[name].tobytes() for name in COLUMNS)]
    body = b"".join(parts)
    return body + _CRC.pack(zlib.crc32(body))


def decode(data: bytes | memoryview) -> tuple[dict[str, Any], list[TopKRows]]:
    """Header and answers of a frame.  Raises :class:`FrameError` unless every byte is as it was sent."""
    view = memoryview(data)
    if len(view) < _PRELUDE.size + _CRC.size:
        raise FrameError(f"a frame of {len(view)} bytes: it was cut short")
    magic, version, length = _PRELUDE.unpack_from(view)
    if magic != MAGIC:
        raise FrameError(f"not a top-k frame: it begins with {bytes(magic)!r}, not {MAGIC!r}")
    if version != VERSION:
        raise FrameError(f"a frame of version {version}, and this side reads version {VERSION}: use one release of Limbeck on both")
    if zlib.crc32(view[: -_CRC.size]) != _CRC.unpack_from(view, len(view) - _CRC.size)[0]:
        raise FrameError(f"a frame of {len(view)} bytes that does not match its checksum: it was damaged or cut short")
    start, end = _PRELUDE.size + length, len(view) - _CRC.size
    if start > end:
        raise FrameError(f"a frame of {len(view)} bytes whose header would take {length}")
    try:
        header = json.loads(bytes(view[_PRELUDE.size : start]))
    except ValueError as error:
        raise FrameError(f"a frame whose header is not JSON ({error})") from error
    shapes = _shapes(header)
    wanted = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
    if wanted != end - start:
        raise FrameError(f"a frame with {end - start} bytes of columns where its header says {wanted}")
    columns = {}
    for name, (shape, dtype) in shapes.items():
        columns[name] = np.frombuffer(view, dtype, math.prod(shape), start).reshape(shape)
        start += columns[name].nbytes
    return header, _answers(header, columns)


def encode_object(answers: Sequence[TopKRows], meta: Mapping[str, Any], values: str = "float32", *, lists: bool = False) -> dict[str, Any]:
    """The same as an object for JSON: columns in base64, or as ``lists``, ``[documents][rows][K]``."""
    header, columns = _columns(answers, meta, values)
    # The header's "samples" is a number and the column is what a reader looks for under that name.
    body: dict[str, Any] = {**header, "num_samples": header["samples"]}
    if lists:
        edges = list(pairwise([0, *accumulate(header["rows"])]))
        return body | {name: [columns[name][a:b].tolist() for a, b in edges] for name in COLUMNS}
    return body | {name: base64.b64encode(columns[name].tobytes()).decode() for name in COLUMNS}


def decode_object(body: Mapping[str, Any]) -> tuple[dict[str, Any], list[TopKRows]]:
    """Header and answers of :func:`encode_object`, whichever form its columns have."""
    if not isinstance(body, Mapping) or not all(name in body for name in (*HEADER, *COLUMNS, "num_samples")):
        raise FrameError("an answer that is not a JSON object with the fields of a top-k answer")
    header = {name: body[name] for name in HEADER} | {"samples": body["num_samples"]}
    columns = {}
    for name, (shape, dtype) in _shapes(header).items():
        column = body[name]
        try:
            if isinstance(column, str):
                flat = np.frombuffer(base64.b64decode(column, validate=True), dtype)
            else:
                if [len(rows) for rows in column] != header["rows"]:
                    raise ValueError(f"not {len(header['rows'])} lists of {header['rows']} rows")
                flat = np.array([number for rows in column for row in rows for number in row], dtype)
            columns[name] = flat.reshape(shape)
        except (ValueError, TypeError, OverflowError, binascii.Error) as error:
            raise FrameError(f"an answer whose {name} are not {' x '.join(map(str, shape))} numbers ({error})") from error
    return header, _answers(header, columns)


def _columns(
    answers: Sequence[TopKRows], meta: Mapping[str, Any], values: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if values not in VALUES:
        raise FrameError(f"values: {values!r} is not one of {', '.join(VALUES)}")
    k = answers[0].ids_mK.shape[1] if answers else int(meta.get("k", 0))
    drawn = [answer.samples_mS for answer in answers if answer.samples_mS is not None]
    num_samples = drawn[0].shape[1] if drawn else (0 if answers else int(meta.get("samples", 0)))
    temperatures = [float(t) for t in meta["temperatures"]]

    def joined(parts: list[np.ndarray], width: int, dtype: np.dtype[Any]) -> np.ndarray:
        whole = np.concatenate(parts) if parts else np.zeros((0, width), dtype)
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(whole, dtype)

    columns = {
        "ids": joined([answer.ids_mK for answer in answers], k, _ID),
        "logits": joined([answer.logits_mK for answer in answers], k, VALUES[values]),
        "log_z": joined([answer.log_z_mZ for answer in answers], len(temperatures), _LOG_Z),
        "samples": joined(drawn, num_samples, _ID) if drawn else np.zeros((sum(map(len, answers)), num_samples), _ID),
    }
    for name in ("logits", "log_z"):
        if not np.isfinite(columns[name]).all():
            raise FrameError(f"{name} that are not finite, or too large for {values}: ask for values float32, or look at the model")
    rows = [len(answer) for answer in answers]
    header = {name: meta[name] for name in ("model", "fingerprint", "vocabulary")}
    header |= {"k": k, "temperatures": temperatures, "rows": rows, "samples": num_samples, "values": values}
    return header, columns


def _shapes(header: Any) -> dict[str, tuple[tuple[int, int], np.dtype[Any]]]:
    """Shape and type of every column, in order; a header that does not say them is refused."""

    def count(number: Any) -> bool:
        return isinstance(number, int) and not isinstance(number, bool) and number >= 0

    if not isinstance(header, dict) or not all(name in header for name in HEADER):
        raise FrameError(f"an answer whose header lacks one of {', '.join(HEADER)}")
    rows, temperatures = header["rows"], header["temperatures"]
    if not (isinstance(rows, list) and all(map(count, rows)) and count(header["k"]) and count(header["samples"])):
        raise FrameError("an answer whose header has no plain numbers as k, samples and rows")
    if not isinstance(temperatures, list) or header["values"] not in tuple(VALUES):
        raise FrameError("an answer whose header has no list of temperatures, or values of an unknown type")
    num_rows = sum(rows)
    return {
        "ids": ((num_rows, header["k"]), _ID),
        "logits": ((num_rows, header["k"]), VALUES[header["values"]]),
        "log_z": ((num_rows, len(temperatures)), _LOG_Z),
        "samples": ((num_rows, header["samples"]), _ID),
    }


def _answers(header: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> list[TopKRows]:
    ids_MK, samples_MS = columns["ids"].astype(np.int32), columns["samples"].astype(np.int32)
    logits_MK, log_z_MZ = columns["logits"].astype(np.float32), columns["log_z"].astype(np.float32)
    edges = [0, *accumulate(header["rows"])]
    return [
        TopKRows(ids_MK[a:b], logits_MK[a:b], log_z_MZ[a:b], samples_MS[a:b] if header["samples"] else None)
        for a, b in pairwise(edges)
    ]
