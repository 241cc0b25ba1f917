"""Ternary quantisers against naive loops, and the gradients that pass through them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from limbeck.ops.ternary import dequantised, elastic_start, fake_quant, round_q8_K, round_token, scale_shape, ternary

GRAINS: list[tuple[str, int | None]] = [("tensor", None), ("expert", None), ("row", None), ("group", 8)]
METHODS = ["absmean", "twn", "mse", "elastic", "exact"]


def weights(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of different sizes, some with outliers."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
    sizes = torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64) + 0.2
    outliers = 1 + 5 * (torch.rand(*shape, generator=generator, dtype=torch.float64) < 0.02)
    return (drawn * sizes * outliers * 0.05).to(dtype)


def blocks_of(shape: tuple[int, ...], grain: str, group: int | None, parts: int) -> list[list[tuple[int, ...]]]:
    """The entries that share each scale, by going through all of them."""
    found: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for index in itertools.product(*map(range, shape)):
        *stack, row, column = index
        part = row // (shape[-2] // parts)
        key = {"tensor": (part,), "expert": (*stack, part), "row": (*stack, row), "group": (*stack, row, column // (group or 1))}[grain]
        found.setdefault(key, []).append(index)
    return list(found.values())


def naive_scale(values: list[float], method: str) -> float:
    sizes = [abs(v) for v in values]
    mean = math.fsum(sizes) / len(sizes)
    if method == "absmean":
        return mean
    if method == "exact":
        return max(sizes)
    large = [v for v in sizes if v > 0.7 * mean]
    scale = math.fsum(large) / len(large) if large else 0.7 * mean
    if method == "twn":
        return scale
    for _ in range(12):
        large = [v for v in sizes if v > scale / 2]
        scale = math.fsum(large) / len(large) if large else scale / 2
    return scale


def naive(weight: Tensor, grain: str, group: int | None, method: str, parts: int, learnt: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Codes and the value of every entry, entry by entry, in fp64."""
    w = weight.double().numpy()
    codes, values = np.zeros(w.shape), np.zeros(w.shape)
    for number, block in enumerate(blocks_of(w.shape, grain, group, parts)):
        found = naive_scale([w[i] for i in block], method) if learnt is None else float(learnt.flatten()[number]) * 2 / 3
        scale = float(np.float16(min(max(found, 1e-5), 65504.0)))
        for i in block:
            codes[i] = min(max(round(w[i] / scale), -1), 1)
            values[i] = codes[i] * scale
    return codes, values


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("grain", "group"), GRAINS)
@pytest.mark.parametrize("shape", [(4, 24), (3, 4, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_and_scales_are_those_of_a_loop_over_entries(
    dtype: torch.dtype, shape: tuple[int, ...], grain: Any, group: int | None, method: Any, parts: int
) -> None:
    weight = weights(*shape, dtype=dtype)
    learnt = None
    if method == "elastic":
        form = scale_shape(shape, scale=grain, group=group, parts=parts)
        learnt = 0.05 + 0.05 * torch.rand(form, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    options: dict[str, Any] = {"scale": grain, "group": group, "method": method, "learnt": learnt, "parts": parts}
    found = ternary(weight, **options)
    codes, values = naive(weight, grain, group, method, parts, learnt)
    assert found.codes.dtype == torch.int8 and found.scales.dtype == torch.float32
    assert found.scales.shape == (*shape[:-1], 3 if group else 1)
    assert np.array_equal(found.codes.numpy(), codes)
    assert np.array_equal(dequantised(found).numpy(), values)
    assert torch.equal(found.scales, found.scales.half().float())
    # What is trained is what is exported, to the last bit.
    assert torch.equal(fake_quant(weight, **options), dequantised(found).to(dtype))


@pytest.mark.parametrize("method", ["absmean", "twn", "mse"])
def test_codes_do_not_depend_on_how_a_stack_is_cut(method: Any) -> None:
    weight = weights(4, 64, 512, seed=3)
    whole = ternary(weight, scale="expert", group=None, method=method, parts=2)
    for expert, half in itertools.product(range(4), range(2)):
        rows = slice(32 * half, 32 * (half + 1))
        alone = ternary(weight[expert, rows].T.contiguous().T, scale="tensor", group=None, method=method)
        assert torch.equal(alone.codes, whole.codes[expert, rows])
        assert torch.equal(alone.scales, whole.scales[expert, rows])


@pytest.mark.parametrize("method", ["absmean", "twn", "mse", "exact"])
def test_a_block_of_zeros_is_zeros(method: Any) -> None:
    weight = weights(2, 64)
    weight[0, 32:] = 0
    found = ternary(weight, scale="group", group=32, method=method)
    assert not found.codes[0, 32:].any() and found.codes[0, :32].any()
    assert torch.isfinite(dequantised(found)).all() and (found.scales > 0).all()
    leaf = weight.clone().requires_grad_()
    fake_quant(leaf, scale="group", group=32, method=method).sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(weight))


def test_weights_beyond_float16_keep_a_finite_scale() -> None:
    found = ternary(torch.full((1, 32), 1e6), scale="row", group=None, method="absmean")
    assert torch.equal(found.scales, torch.tensor([[65504.0]])) and (found.codes == 1).all()


@pytest.mark.parametrize("kind", ["normal", "laplace", "outliers"])
def test_no_scale_has_a_smaller_squared_error_than_mse(kind: str) -> None:
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randn(16, 1024, generator=generator, dtype=torch.float64)
    if kind == "laplace":
        drawn = drawn.sign() * torch.empty_like(drawn).exponential_(generator=generator)
    if kind == "outliers":
        drawn[:, ::128] *= 6
    found = dequantised(ternary(drawn, scale="row", group=None, method="mse")).double()
    error = (found - drawn).square().sum(1)
    grid = drawn.abs().mean(1, keepdim=True) * torch.linspace(0.3, 4, 800, dtype=torch.float64)
    tried = torch.stack([(s * (drawn / s).round().clamp(-1, 1) - drawn).square().sum(1) for s in grid.unsqueeze(-1).unbind(1)])
    assert (error / tried.amin(0)).max() <= 1 + 2e-4
    # Tables of quantisers have these errors for normal weights: 0.513 of the norm for absmean, about 0.44 at best.
    if kind == "normal":
        mean = dequantised(ternary(drawn, scale="row", group=None, method="absmean")).double()
        assert float((mean - drawn).norm() / drawn.norm()) == pytest.approx(0.513, abs=0.004)
        assert float(error.sum().sqrt() / drawn.norm()) == pytest.approx(0.437, abs=0.004)


def test_absmean_of_ternary_weights_shrinks_them_and_exact_does_not() -> None:
    weight = weights(8, 512)
    once = ternary(weight, scale="row", group=None, method="absmean")
    again = ternary(dequantised(once), scale="row", group=None, method="absmean")
    nonzero = once.codes.count_nonzero(-1) / 512
    assert torch.allclose(again.scales[:, 0] / once.scales[:, 0], nonzero, rtol=2e-3)
    exact = ternary(dequantised(once), scale="row", group=None, method="exact")
    assert torch.equal(exact.codes, once.codes) and torch.equal(exact.scales, once.scales)


@pytest.mark.parametrize("mix", [0.0, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("method", ["absmean", "twn", "mse"])
def test_lambda_goes_from_the_weight_to_the_codes_and_the_gradient_passes(method: Any, mix: float) -> None:
    weight = weights(3, 4, 32, dtype=torch.float64).requires_grad_()
    value = fake_quant(weight, scale="row", group=None, method=method, mix=mix)
    target = dequantised(ternary(weight, scale="row", group=None, method=method)).double()
    wanted = weight + mix * (target - weight).detach()
    if mix in (0.0, 1.0):
        assert torch.equal(value, weight if mix == 0 else target)
    assert torch.allclose(value, wanted, rtol=1e-14, atol=1e-16)
    slope = torch.linspace(-1, 1, weight.numel(), dtype=torch.float64).view_as(weight)
    assert torch.equal(torch.autograd.grad(value, weight, slope)[0], slope)


@pytest.mark.parametrize("mix", [0.4, 1.0])
@pytest.mark.parametrize(("grain", "group"), GRAINS)
def test_learnt_scales_get_lsqs_gradient(grain: Any, group: int | None, mix: float) -> None:
    shape = (3, 4, 24)
    weight = weights(*shape, dtype=torch.float64).requires_grad_()
    form = scale_shape(shape, scale=grain, group=group, parts=2)
    # Numbers of which two thirds are float16 ones: rounding the scale is then no part of the difference.
    learnt = (1.5 * (0.02 + 0.1 * torch.rand(form, generator=torch.Generator().manual_seed(2))).half().double()).requires_grad_()
    slope = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    value = fake_quant(weight, scale=grain, group=group, method="elastic", learnt=learnt, parts=2, mix=mix)
    found = torch.autograd.grad(value, [weight, learnt], slope)

    columns = 24 // form[-1]
    spread = learnt.repeat_interleave(4 // form[-2], -2).repeat_interleave(columns, -1).expand(shape)
    ratio = (weight / spread).clamp(-0.99, 0.99)
    level = (ratio * 1.5).round() / 1.5
    naive_value = torch.lerp(weight, spread * (ratio + (level - ratio).detach()), mix)
    wanted = torch.autograd.grad(naive_value, [weight, learnt], slope)
    assert torch.allclose(value, naive_value, rtol=1e-12, atol=1e-15)
    assert torch.allclose(found[0], wanted[0], rtol=1e-12, atol=1e-15)
    count = weight.numel() / learnt.numel()
    # At lambda below 1 the gradient of `a` is already mixed in the naive form.
    assert torch.allclose(found[1], wanted[1] / math.sqrt(count), rtol=1e-11, atol=1e-14)
    outside = (weight.abs() > 0.99 * spread).detach()
    assert outside.any() and (~outside).any()


def test_learnt_scales_start_where_the_error_is_least() -> None:
    weight = weights(3, 8, 64)
    learnt = elastic_start(weight, scale="row", group=None)
    assert learnt.shape == (3, 8, 1)
    elastic = ternary(weight, scale="row", group=None, method="elastic", learnt=learnt)
    least = ternary(weight, scale="row", group=None, method="mse")
    assert torch.equal(elastic.codes, least.codes) and torch.equal(elastic.scales, least.scales)


@pytest.mark.parametrize("method", ["absmean", "twn", "mse", "elastic"])
def test_a_moving_lambda_is_compiled_once(method: Any) -> None:
    graphs: list[Any] = []
    torch._dynamo.reset()
    learnt = torch.full((4, 1), 0.05) if method == "elastic" else None
    compiled = torch.compile(
        lambda weight, mix: round_token(fake_quant(weight, scale="row", group=None, method=method, learnt=learnt, mix=mix), mix),
        backend=lambda graph, _: graphs.append(graph) or graph,
        fullgraph=True,
    )
    weight = weights(4, 32).requires_grad_()
    for mix in (0.1, 0.2, 0.3, 0.4, 0.5):
        wanted = round_token(fake_quant(weight, scale="row", group=None, method=method, learnt=learnt, mix=mix), mix)
        assert torch.allclose(compiled(weight, mix), wanted, rtol=1e-6, atol=0)
    assert len(graphs) <= 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scale": "group", "group": 7}, "24 inputs are no multiple of the group of 7"),
        ({"scale": "expert", "group": None, "parts": 3}, "4 rows do not split into 3 parts"),
        ({"scale": "row", "group": None, "method": "elastic"}, "needs its learnt scales"),
        ({"scale": "row", "group": None, "method": "elastic", "learnt": torch.ones(4)}, r"\(4, 1\) is needed for row scales"),
    ],
)
def test_sizes_that_do_not_divide_are_errors(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ternary(weights(4, 24), **{"method": "absmean", **options})


# -- activations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_token_rounding_is_eight_bits_a_token(dtype: torch.dtype) -> None:
    x = (weights(5, 7, 48, seed=9) * 30).to(dtype)
    x[0, 0] = 0
    leaf = x.clone().requires_grad_()
    found = round_token(leaf)
    assert found.dtype == dtype
    for i, j in itertools.product(range(5), range(7)):
        row = x[i, j].double()
        unit = max(float(row.abs().max()), 1e-5) / 127
        wanted = torch.tensor([min(max(round(float(v) / unit), -128), 127) * unit for v in row])
        assert torch.allclose(found[i, j].detach().double(), wanted.double(), rtol=0, atol=unit * (1.0 if dtype == torch.bfloat16 else 1e-3))
    found.sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(x))
    assert torch.equal(round_token(x, 0.0), x)


def naive_q8(values: np.ndarray) -> np.ndarray:
    """``quantize_row_q8_K_ref`` and its inverse, in float32 as the C code has it."""
    out = np.zeros_like(values)
    for start in range(0, len(values), 256):
        block = values[start : start + 256]
        largest, signed = np.float32(0), np.float32(0)
        for v in block:
            if abs(v) > largest:
                largest, signed = abs(v), v
        if largest == 0:
            continue
        factor = np.float32(-127.0) / signed
        scale = np.float32(1) / factor
        for j, v in enumerate(block):
            out[start + j] = scale * np.float32(min(127, int(np.rint(factor * v))))
    return out


def test_q8_K_rounding_is_that_of_llama_cpp_to_the_last_bit() -> None:
    x = weights(3, 768, seed=11) * 7
    x[1, 256:512] = 0
    x[2, 10], x[2, 20] = 9.0, -9.0
    found = round_q8_K(x.requires_grad_())
    wanted = np.stack([naive_q8(row) for row in x.detach().numpy()])
    assert np.array_equal(found.detach().numpy(), wanted)
    found.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    with pytest.raises(ValueError, match="320 is no multiple"):
        round_q8_K(torch.zeros(2, 320))
