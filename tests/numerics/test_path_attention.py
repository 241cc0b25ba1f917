"""PaTH in blocks against its definition, fp64 and fp32."""

from __future__ import annotations

import pytest
import torch

from limbeck.ops.path_attention import PathKeys, path_attention
from recurrences import keys_moved_token_by_token

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
NAMES = ("output", "dq", "dw", "dbeta", "dk", "dv")
HEADS, GROUPS, WIDTH = 2, 3, 8


def make_inputs(tokens: int, *, rows: int = 2, strength: float = 2.0, seed: int = 0) -> list[torch.Tensor]:
    """q, w (unit), beta in [0, strength), k, v; fp64."""
    generator = torch.Generator().manual_seed(seed)

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(rows, tokens, HEADS, *shape, generator=generator, dtype=torch.float64)

    w = torch.nn.functional.normalize(new(WIDTH), dim=-1)
    beta = strength * torch.rand(rows, tokens, HEADS, generator=generator, dtype=torch.float64)
    return [new(GROUPS, WIDTH), w, beta, new(WIDTH), new(WIDTH + 4)]


def one_document(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(x.shape[:2], dtype=torch.int64)


def in_blocks(q, w, beta, k, v, documents, *, scale: float, **options) -> torch.Tensor:
    position = torch.arange(q.shape[1]).expand(q.shape[:2])
    return path_attention(q, w, beta, PathKeys(k, v, position, documents), scale=scale, **options)[0]


def results(rule, inputs: list[torch.Tensor], documents: torch.Tensor, dtype: torch.dtype, **options) -> list[torch.Tensor]:
    """Output and every gradient of a random linear loss."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    output = rule(*leaves, documents, scale=WIDTH**-0.5, **options)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert a.isfinite().all(), name
        error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-6)
        assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize(("tokens", "chunk"), [(64, 16), (70, 64), (70, 16), (33, 8), (50, 128), (1, 64)])
@pytest.mark.parametrize("strength", [0.05, 1.0, 2.0])
def test_blocks_equal_keys_moved_token_by_token_with_every_gradient(tokens: int, chunk: int, strength: float) -> None:
    inputs = make_inputs(tokens, strength=strength)
    expected = results(keys_moved_token_by_token, inputs, one_document(inputs[0]), torch.float64)
    for dtype, tolerance in TOLERANCE.items():
        assert_equal(results(in_blocks, inputs, one_document(inputs[0]), dtype, chunk=chunk), expected, tolerance)


def test_packed_documents_equal_separate_documents() -> None:
    lengths = (3, 13, 1, 16, 10, 7)
    inputs = make_inputs(sum(lengths), rows=1)
    documents = torch.repeat_interleave(torch.arange(6), torch.tensor(lengths))[None]
    packed, start = in_blocks(*inputs, documents, scale=0.3, chunk=16), 0
    for length in lengths:
        part = [x[:, start : start + length] for x in inputs]
        alone = in_blocks(*part, one_document(part[0]), scale=0.3, chunk=16)
        torch.testing.assert_close(packed[:, start : start + length], alone, rtol=1e-10, atol=1e-10)
        start += length
    expected = results(keys_moved_token_by_token, inputs, documents, torch.float64)
    for dtype, tolerance in TOLERANCE.items():
        assert_equal(results(in_blocks, inputs, documents, dtype, chunk=16), expected, tolerance)


@pytest.mark.parametrize("sizes", [[1] * 40, [19, 1, 20], [7, 33]])
def test_prefill_and_decode_equal_the_full_pass(sizes: list[int]) -> None:
    q, w, beta, k, v = make_inputs(40)
    expected = in_blocks(q, w, beta, k, v, one_document(q), scale=0.3)
    position, outputs, past, start = torch.arange(40).expand(2, -1), [], None, 0
    for size in sizes:
        span = slice(start, start + size)
        new = PathKeys(k[:, span], v[:, span], position[:, span], one_document(q[:, span]))
        output, keys = path_attention(q[:, span], w[:, span], beta[:, span], new, past, scale=0.3, chunk=8)
        outputs.append(output)
        start += size
        past = PathKeys(keys, v[:, :start], position[:, :start], one_document(q[:, :start]))
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("softcap", "window"), [(None, None), (5.0, None), (None, 6)])
def test_without_a_path_it_is_softmax_attention(softcap: float | None, window: int | None) -> None:
    q, w, beta, k, v = make_inputs(50)
    found = in_blocks(q, w, torch.zeros_like(beta), k, v, one_document(q), scale=0.3, softcap=softcap, window=window, chunk=16)
    scores = torch.einsum("bijgk,bsjk->bjgis", q, k) * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    seen = torch.ones(50, 50, dtype=torch.bool).tril()
    seen = seen if window is None else seen & ~torch.ones_like(seen).tril(-window)
    expected = torch.einsum("bjgis,bsjv->bijgv", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
