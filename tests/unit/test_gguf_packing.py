"""Block formats: the bytes that the `gguf` package writes, no loss on the way there and back, and refusals that say what would fit."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from limbeck.errors import ModelError
from limbeck.export.gguf.packing import (
    BF16,
    F16,
    F32,
    Q2_0,
    Q8_0,
    TERNARY,
    TQ1_0,
    TQ2_0,
    as_read,
    fitting,
    pack,
    pack_ternary,
)
from limbeck.ops.ternary import Ternary, dequantised, ternary

gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install 'limbeck[gguf]'")
SCALES: dict[str, tuple[str, int | None]] = {"tensor": ("tensor", None), "row": ("row", None), "expert": ("expert", None), "group": ("group", 256)}


def random_ternary(*shape: int, scale: str = "row", group: int | None = None, seed: int = 0) -> Ternary:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    made: Any = ternary(weight, scale=scale, group=group, method="absmean")  # type: ignore[arg-type]
    return made


def unpack_ternary(packed: np.ndarray, kind: Any) -> Ternary:
    """A reader of what :func:`pack_ternary` writes, with a scale for each block: ``codes [*, O, I]``, ``scales [*, O, I / block]``."""
    blocks = packed.reshape(-1, kind.size)
    scales, body = (blocks[:, :2], blocks[:, 2:]) if kind is Q2_0 else (blocks[:, -2:], blocks[:, :-2])
    if kind is Q2_0:
        digits = _from_four(body).transpose(0, 2, 1)
    elif kind is TQ2_0:
        digits = _from_four(body.reshape(-1, 32))
    else:
        # ggml's three stretches of a block: 32 bytes of five weights, 16 of five, 4 of four.
        parts = zip(np.split(body, [32, 48], 1), (5, 5, 4), strict=True)
        digits = np.concatenate([_from_five(part, count) for part, count in parts], 1)
    codes = digits.reshape(len(blocks), kind.block).astype(np.int8) - np.int8(1)
    shape = (*packed.shape[:-1], packed.shape[-1] // kind.size * kind.block)
    found = np.ascontiguousarray(scales).view(np.float16).astype(np.float32)
    return Ternary(torch.from_numpy(codes.reshape(shape)), torch.from_numpy(found.reshape(*packed.shape[:-1], -1)))


def _from_four(body_NM: np.ndarray) -> np.ndarray:
    return np.stack([body_NM >> shift & 3 for shift in (0, 2, 4, 6)], 1)


def _from_five(body_NM: np.ndarray, count: int) -> np.ndarray:
    powers = np.array([1, 3, 9, 27, 81], dtype=np.uint8)[:count, None]
    shifted = body_NM[:, None] * powers
    return (shifted.astype(np.uint16) * 3 >> 8).reshape(len(body_NM), -1)


@pytest.mark.parametrize("kind, name", [(TQ1_0, "TQ1_0"), (TQ2_0, "TQ2_0")])
@pytest.mark.parametrize("scale", SCALES)
def test_a_million_weights_have_the_bytes_of_the_gguf_package(kind: Any, name: str, scale: str) -> None:
    granularity, group = SCALES[scale]
    weight = random_ternary(4, 512, 512, scale=granularity, group=group)
    theirs = gguf.quants.quantize(dequantised(weight).numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(pack_ternary(weight, kind), theirs)


def test_q2_0_is_a_half_and_then_two_bits_a_weight_from_the_lowest() -> None:
    weight = random_ternary(3, 192, scale="group", group=64)
    expected = bytearray()
    for row, block in product(range(3), range(3)):
        expected += np.float16(weight.scales[row, block].item()).tobytes()
        codes = weight.codes[row, 64 * block : 64 * (block + 1)].tolist()
        expected += bytes(sum((codes[4 * byte + slot] + 1) << 2 * slot for slot in range(4)) for byte in range(16))
    assert pack_ternary(weight, Q2_0).tobytes() == bytes(expected)


@pytest.mark.parametrize("kind", TERNARY, ids=lambda kind: kind.name)
def test_what_is_packed_is_what_is_read(kind: Any) -> None:
    weight = random_ternary(2, 5, 768, scale="group", group=256)
    packed = pack_ternary(weight, kind)
    assert packed.nbytes == kind.nbytes((2, 5, 768)) and packed.shape == (2, 5, 768 // kind.block * kind.size)
    found = unpack_ternary(packed, kind)
    assert torch.equal(found.codes, weight.codes) and torch.equal(dequantised(found), dequantised(weight))


@pytest.mark.parametrize("kind", TERNARY, ids=lambda kind: kind.name)
def test_a_block_of_zeros_has_no_scale(kind: Any) -> None:
    weight = Ternary(torch.zeros(2, 256, dtype=torch.int8), torch.full((2, 1), 0.5))
    found = unpack_ternary(pack_ternary(weight, kind), kind)
    assert found.scales.abs().max() == 0 and found.codes.abs().max() == 0
    if kind is not Q2_0:
        assert np.array_equal(pack_ternary(weight, kind), gguf.quants.quantize(np.zeros((2, 256), np.float32), gguf.GGMLQuantizationType[kind.name.upper()]))


@pytest.mark.parametrize("kind", [TQ1_0, TQ2_0], ids=lambda kind: kind.name)
def test_groups_of_128_are_refused_where_a_block_has_one_scale(kind: Any) -> None:
    weight = random_ternary(4, 512, scale="group", group=128)
    with pytest.raises(ModelError, match=rf"model\.x: {kind.name} cannot hold it: it has a scale for each 128 weights and .* one for 256; use q2_0"):
        pack_ternary(weight, kind, "model.x")
    assert torch.equal(dequantised(unpack_ternary(pack_ternary(weight, Q2_0), Q2_0)), dequantised(weight))


def test_a_width_that_does_not_divide_names_tensor_width_and_the_types_that_would_do() -> None:
    with pytest.raises(ModelError, match=r"mlp\.up: tq2_0 cannot hold it: its 320 inputs are not a multiple of 256; use q2_0"):
        pack_ternary(random_ternary(2, 320), TQ2_0, "mlp.up")
    with pytest.raises(ModelError, match="no ternary type holds it: keep it in f16"):
        pack_ternary(random_ternary(2, 96), Q2_0)
    assert [kind.name for kind in fitting(896, 896)] == ["q2_0"] and fitting(512, 32) == []
    assert [kind.name for kind in fitting(512, 512)] == ["tq2_0", "tq1_0", "q2_0"]


def test_a_scale_that_fp16_would_round_is_refused() -> None:
    with pytest.raises(ModelError, match="no fp16 number"):
        pack_ternary(Ternary(torch.ones(1, 256, dtype=torch.int8), torch.tensor([[0.1]])), TQ2_0)
    with pytest.raises(ModelError, match="other than -1, 0 and 1"):
        pack_ternary(Ternary(torch.full((1, 256), 2, dtype=torch.int8), torch.tensor([[0.5]])), TQ2_0)


@pytest.mark.parametrize("kind, name", [(F32, "F32"), (F16, "F16"), (BF16, "BF16"), (Q8_0, "Q8_0")])
def test_floats_have_the_bytes_of_the_gguf_package(kind: Any, name: str) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    theirs = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name])
    assert pack(weight, kind).tobytes() == theirs.tobytes()
    read = gguf.quants.dequantize(theirs, gguf.GGMLQuantizationType[name])
    assert np.array_equal(as_read(weight, kind).numpy(), read)


def test_a_ternary_weight_is_exact_in_fp16_and_its_packed_size_is_what_is_promised() -> None:
    weight = random_ternary(8, 256)
    assert torch.equal(as_read(weight, F16), dequantised(weight))
    assert TQ2_0.bits <= 2.07 and TQ1_0.bits <= 1.70 and Q2_0.bits == 2.25
