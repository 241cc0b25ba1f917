"""Top-k answers on the wire: what goes in comes out, and damage is noticed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from limbeck.teachers.documents import TopKRows
from limbeck.teachers.http.frames import FrameError, decode, decode_object, encode, encode_object

META = {"model": "a model", "fingerprint": "0123abcd", "vocabulary": 151_936, "temperatures": [1.0, 2.0], "k": 5, "samples": 0}


def answers(rows: tuple[int, ...] = (3, 0, 4), k: int = 5, z: int = 2, samples: int = 0) -> list[TopKRows]:
    rng = np.random.default_rng(0)
    return [
        TopKRows(
            rng.integers(0, 151_936, (m, k)).astype(np.int32),
            -np.sort(-rng.normal(0, 8, (m, k)), axis=1).astype(np.float32),
            rng.normal(12, 2, (m, z)).astype(np.float32),
            rng.integers(0, 151_936, (m, samples)).astype(np.int32) if samples else None,
        )
        for m in rows
    ]


def columns(answer: TopKRows) -> list[tuple[Any, ...]]:
    """Name, type, shape and bytes of everything in an answer."""
    parts = {name: getattr(answer, name) for name in ("ids_mK", "logits_mK", "log_z_mZ", "samples_mS")}
    return [(name, part.dtype.str, part.shape, part.tobytes()) for name, part in parts.items() if part is not None]


def assert_same(ours: list[TopKRows], theirs: list[TopKRows]) -> None:
    assert [columns(a) for a in ours] == [columns(b) for b in theirs]


@pytest.mark.parametrize("samples", [0, 3])
@pytest.mark.parametrize("rows", [(3, 0, 4), (1,), (0,), ()])
@pytest.mark.parametrize("form", ["frame", "b64", "json"])
def test_every_form_gives_back_the_bits_that_went_in(form: str, rows: tuple[int, ...], samples: int) -> None:
    sent = answers(rows, samples=samples)
    if form == "frame":
        header, got = decode(encode(sent, META))
    else:
        header, got = decode_object(json.loads(json.dumps(encode_object(sent, META, lists=form == "json"))))
    assert_same(got, sent)
    assert (header["rows"], header["k"], header["samples"]) == (list(rows), 5, samples if rows else 0)
    assert (header["model"], header["fingerprint"], header["vocabulary"]) == ("a model", "0123abcd", 151_936)
    assert header["temperatures"] == [1.0, 2.0]


def test_sampling_alone_travels_without_kept_ids() -> None:
    sent = answers((2, 3), k=0, samples=4)
    assert_same(decode(encode(sent, META))[1], sent)
    assert_same(decode_object(encode_object(sent, META, lists=True))[1], sent)


@pytest.mark.parametrize("lists", [False, True])
def test_half_precision_rounds_the_logits_and_nothing_else(lists: bool) -> None:
    sent = answers(samples=2)
    for header, got in (decode(encode(sent, META, "float16")), decode_object(encode_object(sent, META, "float16", lists=lists))):
        assert header["values"] == "float16"
        for a, b in zip(got, sent, strict=True):
            assert a.logits_mK.dtype == np.float32
            assert np.array_equal(a.logits_mK, b.logits_mK.astype(np.float16).astype(np.float32))
            assert np.array_equal(a.log_z_mZ, b.log_z_mZ) and np.array_equal(a.ids_mK, b.ids_mK)


def test_a_frame_is_as_small_as_its_columns() -> None:
    frame = encode(answers((1024,), k=128), META, "float16")
    assert len(frame) <= 1024 * (128 * 6 + 8) + 256


def test_any_changed_byte_is_noticed() -> None:
    frame = encode(answers(samples=1), META)
    for place in range(len(frame)):
        damaged = bytearray(frame)
        damaged[place] ^= 0x10
        with pytest.raises(FrameError):
            decode(bytes(damaged))


def test_any_cut_is_noticed() -> None:
    frame = encode(answers(), META)
    for length in range(len(frame)):
        with pytest.raises(FrameError):
            decode(frame[:length])
    with pytest.raises(FrameError):
        decode(frame + b"\0")


def test_another_version_is_named() -> None:
    frame = bytearray(encode(answers(), META))
    frame[4] = 9
    with pytest.raises(FrameError, match="version 9, and this side reads version 1"):
        decode(bytes(frame))


def reheaded(change: dict[str, Any]) -> bytes:
    """A frame with a true checksum and a header that lies."""
    import struct
    import zlib

    frame = encode(answers(), META)
    length = struct.unpack_from("<4sHI", frame)[2]
    header = json.dumps(json.loads(frame[10 : 10 + length]) | change).encode()
    body = struct.pack("<4sHI", b"LMBK", 1, len(header)) + header + frame[10 + length : -4]
    return body + struct.pack("<I", zlib.crc32(body))


@pytest.mark.parametrize(
    "change",
    [{"k": 4}, {"k": -5}, {"k": "5"}, {"k": 10**12}, {"rows": [3, 5]}, {"rows": 7}, {"rows": [True]}, {"samples": 1},
     {"temperatures": [1.0]}, {"temperatures": None}, {"values": "float64"}, {"values": []}, {"values": "float16"}],
)  # fmt: skip
def test_a_header_that_does_not_fit_its_columns_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(FrameError):
        decode(reheaded(change))


@pytest.mark.parametrize(
    "change",
    [{"ids": "AAAA"}, {"ids": "not base64!"}, {"logits": [[]]}, {"logits": 3}, {"log_z": [[[1.0, 2.0]] * 3, [], [["x", 1]] * 4]},
     {"ids": [[[-1] * 5] * 3, [], [[0] * 5] * 4]}, {"num_samples": 2}, {"rows": None}],
)  # fmt: skip
def test_an_object_that_does_not_fit_its_fields_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(FrameError):
        decode_object(encode_object(answers(), META) | change)
    with pytest.raises(FrameError):
        decode_object([])  # type: ignore[arg-type]


def test_a_number_that_the_values_cannot_hold_is_not_sent() -> None:
    sent = answers()
    sent[0].logits_mK[0, 0] = 1e6
    assert_same(decode(encode(sent, META))[1], sent)
    with pytest.raises(FrameError, match="too large for float16"):
        encode(sent, META, "float16")
    sent[0].logits_mK[0, 0] = np.nan
    with pytest.raises(FrameError, match="not finite"):
        encode_object(sent, META)
