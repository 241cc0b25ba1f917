"""The generalised delta rule of RWKV-7 against its recurrence, and against the rules it contains."""

from __future__ import annotations

import pytest
import torch

from limbeck.ops.delta_rule import gated_delta_rule
from limbeck.ops.kda import kimi_delta_rule
from limbeck.ops.linear_attention import linear_attention
from limbeck.ops.rwkv7 import generalised_delta_rule, generalised_delta_rule_step
from recurrences import LENGTHS, TOLERANCE, Inputs, assert_equal, by_steps, results

recurrence = by_steps(generalised_delta_rule_step)


def make_inputs(batch: int, tokens: int, heads: int, width: int, *, gate: float = 0.3, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v, g in (-2 * gate, 0], a unit, b = -strength * a with a strength a channel, and the initial state; fp64."""
    make = Inputs(seed)
    shape = (batch, tokens, heads, width)
    q, k, a = (make.unit(*shape) for _ in range(3))
    v, g = make.normal(batch, tokens, heads, width + 4), -2 * gate * make.uniform(*shape)
    return [q, k, v, g, a, -make.uniform(*shape) * a, make.normal(batch, heads, width, width + 4)]


@pytest.mark.parametrize(
    ("tokens", "chunk", "gate"), [(64, 32, 0.0), (70, 64, 0.05), (70, 64, 0.3), (70, 64, 10.0), (70, 16, 0.3), (50, 24, 0.3), (1, 64, 0.3)]
)
def test_chunked_equals_recurrent_with_every_gradient(tokens: int, chunk: int, gate: float) -> None:
    """Log decays a token from 0 to -20; RWKV-7's own reach -0.61."""
    inputs = make_inputs(2, tokens, 2, 12, gate=gate)
    expected = results(recurrence, inputs, torch.float64)
    for dtype, tolerance in TOLERANCE.items():
        assert_equal(results(generalised_delta_rule, inputs, dtype, chunk=chunk), expected, tolerance)


def test_packed_documents_and_padding_equal_separate_documents() -> None:
    tokens, padding = sum(LENGTHS), 5
    inputs = make_inputs(1, tokens + padding, 2, 8)
    documents = torch.cat([torch.repeat_interleave(torch.arange(6), torch.tensor(LENGTHS)), torch.full((padding,), -1)])[None]
    state, outputs, start = inputs[6], [], 0
    for length in LENGTHS:
        output, final = recurrence(*(x[:, start : start + length] for x in inputs[:6]), initial_state_BHKV=state)
        outputs.append(output)
        state, start = torch.zeros_like(state), start + length
    output, after = generalised_delta_rule(*inputs[:6], documents_BT=documents, initial_state_BHKV=inputs[6], chunk=16)
    torch.testing.assert_close(output[:, :tokens], torch.cat(outputs, 1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after, final, rtol=1e-10, atol=1e-10)
    assert not output[:, tokens:].any()
    expected = results(recurrence, inputs, torch.float64, documents_BT=documents)
    for dtype, tolerance in TOLERANCE.items():
        assert_equal(results(generalised_delta_rule, inputs, dtype, documents_BT=documents, chunk=16), expected, tolerance)


def test_prefill_and_decode_equal_the_full_pass() -> None:
    inputs = make_inputs(2, 60, 2, 8)
    expected, final = generalised_delta_rule(*inputs[:6], initial_state_BHKV=inputs[6])
    first, state = generalised_delta_rule(*(x[:, :37] for x in inputs[:6]), initial_state_BHKV=inputs[6])
    outputs = [first]
    for t in range(37, 60):
        output, state = generalised_delta_rule_step(*(x[:, t] for x in inputs[:6]), state)
        outputs.append(output[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rule", ["gated_delta_rule", "kda", "linear_attention"])
def test_it_contains_the_other_rules(rule: str) -> None:
    q, k, v, g, _, _, state = make_inputs(2, 90, 2, 12)
    beta = torch.rand(2, 90, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    options = {"initial_state_BHKV": state}
    if rule == "linear_attention":
        expected = linear_attention(q, k, v, g, **options)
        found = generalised_delta_rule(q, k, v, g, torch.zeros_like(k), torch.zeros_like(k), **options)
    elif rule == "kda":
        expected = kimi_delta_rule(q, k, v, g, beta, **options)
        found = generalised_delta_rule(q, k * beta[..., None], v, g, k, -beta[..., None] * k, **options)
    else:
        tiled = g[..., :1].expand_as(g)
        expected = gated_delta_rule(q, k, v, g[..., 0], beta, **options)
        found = generalised_delta_rule(q, k * beta[..., None], v, tiled, k, -beta[..., None] * k, **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
