"""Rows to bytes and back."""

from __future__ import annotations

import numpy as np
import pytest

from limbeck.errors import TeacherError
from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.store.bits import pack, pack_rising, packed_size, rising_size, unpack, unpack_rising
from limbeck.teachers.store.blocks import read_block, whole, write_block
from limbeck.teachers.store.codecs import CODECS, Layout
from signal_cases import answers, by_id, document


def through(codec: str, rows: TopKRows, layout: Layout) -> TopKRows:
    coder = CODECS[codec]
    data = np.frombuffer(coder.encode(rows, layout), np.uint8)
    assert len(data) == coder.size(len(rows), layout)
    return coder.decode(data, len(rows), layout)


@pytest.mark.parametrize("width", [1, 3, 8, 10, 17, 18, 24, 25, 26, 31, 32])
def test_numbers_of_any_width_come_back(width: int) -> None:
    rng = np.random.default_rng(width)
    for count in (0, 1, 7, 8, 9, 100):
        values = rng.integers(0, 2**width, count, dtype=np.uint64).astype(np.uint32)
        packed = pack(values, width)
        assert len(packed) == packed_size(count, width)
        np.testing.assert_array_equal(unpack(packed, width, count), values)


@pytest.mark.parametrize(("limit", "kept"), [(151_936, 64), (500, 8), (8, 8), (5, 1), (1000, 1000), (1, 3), (2**32 - 1, 2)])
def test_rising_numbers_come_back(limit: int, kept: int) -> None:
    rng = np.random.default_rng(limit % 97)
    values = np.sort(rng.integers(0, limit, (20, kept)), axis=1).astype(np.uint32)
    values[0], values[1] = 0, limit - 1
    packed = np.frombuffer(pack_rising(values, limit), np.uint8)
    assert len(packed) == rising_size(20, kept, limit)
    np.testing.assert_array_equal(unpack_rising(packed, 20, kept, limit), values)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("samples", [0, 5])
def test_half_precision_values_come_back_exactly(codec: str, samples: int) -> None:
    layout = Layout(8, (1.0, 2.0), samples, 500)
    rows = answers(np.random.default_rng(1), 30, layout)
    rows = TopKRows(rows.ids_mK, rows.logits_mK.astype(np.float16).astype(np.float32), rows.log_z_mZ, rows.samples_mS)
    found = through(codec, rows, layout)
    if samples:
        np.testing.assert_array_equal(found.samples_mS, rows.samples_mS)
    else:
        assert found.samples_mS is None
    if codec == "compact":
        np.testing.assert_array_equal(by_id(found)[0], by_id(rows)[0])
        np.testing.assert_array_equal(found.logits_mK[:, 0], rows.logits_mK.max(1))
        assert (np.diff(found.logits_mK, axis=1) <= 0).all()
        return
    np.testing.assert_array_equal(found.ids_mK, rows.ids_mK)
    np.testing.assert_array_equal(found.logits_mK, rows.logits_mK)
    np.testing.assert_array_equal(found.log_z_mZ, rows.log_z_mZ)


@pytest.mark.parametrize("codec", CODECS)
def test_what_was_read_once_is_written_and_read_the_same(codec: str) -> None:
    layout = Layout(8, (1.0,), 0, 500)
    once = through(codec, answers(np.random.default_rng(2), 30, layout), layout)
    twice = through(codec, once, layout)
    np.testing.assert_array_equal(by_id(once)[0], by_id(twice)[0])
    np.testing.assert_allclose(by_id(once)[1], by_id(twice)[1], atol=1e-5)


@pytest.mark.parametrize("codec", CODECS)
def test_missing_ranks_and_flat_rows_are_kept(codec: str) -> None:
    layout = Layout(4, (1.0,), 0, 500)
    logits = np.array([[3, 2, -np.inf, -np.inf], [1, 1, 1, 1], [-np.inf] * 4], np.float32)
    rows = TopKRows(np.tile(np.array([9, 400, 0, 0], np.int32), (3, 1)), logits, np.full((3, 1), 4, np.float32))
    found = through(codec, rows, layout)
    np.testing.assert_allclose(found.logits_mK, logits, atol=1e-2)
    assert np.isfinite(found.log_z_mZ).all()
    assert found.ids_mK[0, :2].tolist() == [9, 400]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("k", "samples"), [(0, 6), (1, 0), (500, 0)])
def test_samples_alone_one_id_and_the_whole_vocabulary(codec: str, k: int, samples: int) -> None:
    layout = Layout(k, (2.0,), samples, 500)
    rows = answers(np.random.default_rng(3), 5, layout)
    found = through(codec, rows, layout)
    assert found.ids_mK.shape == (5, k) and found.log_z_mZ.shape == (5, 1)
    np.testing.assert_array_equal(by_id(found)[0], by_id(rows)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids_mK": np.full((2, 4), 500)}, "from 500 to 500.*500 ids"),
        ({"logits_mK": np.full((2, 4), np.nan)}, "NaN or infinite"),
        ({"log_z_mZ": np.full((2, 1), np.inf)}, "NaN or infinite"),
        ({"logits_mK": np.zeros((2, 3))}, r"logits of shape \[2, 3\].*\[2, 4\]"),
        ({"logits_mK": np.full((2, 4), 1e5)}, "does not fit into codec 'fp16'"),
    ],
)
def test_rows_that_cannot_be_kept_are_refused(change: dict[str, np.ndarray], message: str) -> None:
    layout = Layout(4, (1.0,), 0, 500)
    whole_rows = {"ids_mK": np.zeros((2, 4), np.int32), "logits_mK": np.zeros((2, 4), np.float32), "log_z_mZ": np.zeros((2, 1), np.float32)}
    with pytest.raises(TeacherError, match=message):
        CODECS["fp16"].encode(TopKRows(**{**whole_rows, **change}), layout)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("length", "share"), [(0, 1), (1, 1), (2, 1), (300, 0.2), (20_000, 0.001)])
def test_documents_of_any_length_come_back(codec: str, length: int, share: float) -> None:
    rng = np.random.default_rng(length)
    layout = Layout(4, (1.0,), 2, 500)
    ask = document(rng, length, share=share)
    rows = answers(rng, len(ask.positions), layout)
    block = write_block(ask, rows, CODECS[codec], layout)
    found = read_block(block, CODECS[codec], layout)
    np.testing.assert_array_equal(found.ids, ask.ids)
    np.testing.assert_array_equal(found.positions, ask.positions)
    assert found.rows.samples_mS is not None and len(found.rows) == len(ask.positions)
    # A document with few answered positions must not cost its whole length in bytes.
    assert len(block) < 200 + 2 * length + 40 * len(ask.positions)


def test_every_flipped_bit_of_a_block_is_noticed() -> None:
    rng = np.random.default_rng(4)
    layout = Layout(4, (1.0,), 0, 500)
    ask = document(rng, 12)
    block = write_block(ask, answers(rng, 11, layout), CODECS["compact"], layout)
    assert whole(block)
    for bit in range(len(block) * 8):
        flipped = bytearray(block)
        flipped[bit // 8] ^= 1 << bit % 8
        assert not whole(flipped)


def test_an_answer_to_another_question_is_refused() -> None:
    rng = np.random.default_rng(5)
    layout = Layout(4, (1.0,), 0, 500)
    ask = document(rng, 12)
    with pytest.raises(TeacherError, match="10 rows for 11 positions"):
        write_block(ask, answers(rng, 10, layout), CODECS["exact"], layout)
    with pytest.raises(TeacherError, match="must rise"):
        write_block(Ask(ask.ids, ask.positions[::-1]), answers(rng, 11, layout), CODECS["exact"], layout)
    with pytest.raises(TeacherError, match="must rise"):
        write_block(Ask(ask.ids, ask.positions + 1000), answers(rng, 11, layout), CODECS["exact"], layout)
