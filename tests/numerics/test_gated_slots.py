"""Gated slot attention against its recurrence, fp64 and fp32."""

from __future__ import annotations

import pytest
import torch

from limbeck.ops.gated_slots import gated_slot_attention, gated_slot_attention_step
from recurrences import LENGTHS, TOLERANCE, Inputs, assert_equal, by_steps, results

recurrence = by_steps(gated_slot_attention_step)


def make_inputs(batch: int, tokens: int, heads: int, width: int, slots: int, *, gate: float = 0.3, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v, g in (-2 * gate, 0], and the initial state; fp64."""
    make = Inputs(seed)
    shape = (batch, tokens, heads)
    q, k, v = make.normal(*shape, width), make.normal(*shape, width), make.normal(*shape, width + 4)
    return [q, k, v, -2 * gate * make.uniform(*shape, slots), make.normal(batch, heads, slots, 2 * width + 4)]


@pytest.mark.parametrize(
    ("tokens", "chunk", "gate"), [(64, 32, 0.0), (70, 64, 0.05), (70, 64, 3.0), (70, 64, 15.0), (70, 16, 0.5), (50, 24, 0.5), (1, 64, 0.5)]
)
def test_chunked_equals_recurrent_with_every_gradient(tokens: int, chunk: int, gate: float) -> None:
    """Log decays a token from 0 to -30: a chunk of 64 forgets up to e^-1900."""
    inputs = make_inputs(2, tokens, 2, 8, 6, gate=gate)
    expected = results(recurrence, inputs, torch.float64, state="initial_state")
    for dtype, tolerance in TOLERANCE.items():
        assert_equal(results(gated_slot_attention, inputs, dtype, state="initial_state", chunk=chunk), expected, tolerance)


def test_packed_documents_and_padding_equal_separate_documents() -> None:
    tokens, padding = sum(LENGTHS), 5
    inputs = make_inputs(1, tokens + padding, 2, 8, 6)
    documents = torch.cat([torch.repeat_interleave(torch.arange(6), torch.tensor(LENGTHS)), torch.full((padding,), -1)])[None]
    state, outputs, start = inputs[4], [], 0
    for length in LENGTHS:
        output, final = recurrence(*(x[:, start : start + length] for x in inputs[:4]), initial_state=state)
        outputs.append(output)
        state, start = torch.zeros_like(state), start + length
    for rule in (gated_slot_attention, recurrence):
        output, after = rule(*inputs[:4], documents_BT=documents, initial_state=inputs[4])
        torch.testing.assert_close(output[:, :tokens], torch.cat(outputs, 1), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(after, final, rtol=1e-10, atol=1e-10)
        assert not output[:, tokens:].any()
    expected = results(recurrence, inputs, torch.float64, state="initial_state", documents_BT=documents)
    for dtype, tolerance in TOLERANCE.items():
        assert_equal(results(gated_slot_attention, inputs, dtype, state="initial_state", documents_BT=documents, chunk=16), expected, tolerance)


def test_prefill_and_decode_equal_the_full_pass() -> None:
    inputs = make_inputs(2, 60, 2, 8, 6)
    expected, final = gated_slot_attention(*inputs[:4], initial_state=inputs[4])
    first, state = gated_slot_attention(*(x[:, :37] for x in inputs[:4]), initial_state=inputs[4])
    outputs = [first]
    for t in range(37, 60):
        output, state = gated_slot_attention_step(*(x[:, t] for x in inputs[:4]), state)
        outputs.append(output[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


def test_slots_that_forget_nothing_new_are_softmax_attention_over_them() -> None:
    """With g = 0 nothing is written, and what is read is plain attention over the keys and values that are there."""
    q, k, v, g, state = make_inputs(1, 20, 2, 8, 6, gate=0.0)
    output, after = gated_slot_attention(q, k, v, g, initial_state=state)
    keys, values = state.split([8, 12], -1)
    expected = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), keys, values).transpose(1, 2)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(after, state)
