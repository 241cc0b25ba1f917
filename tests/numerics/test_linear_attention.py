"""Linear attention and the delta rule with decays a head or a channel: chunked == recurrent, packed == separate, and what equals what.

Gate range of these tests: log decays a token in [-gate, 0] with gate up to 20 (e^-20 = 2e-9 kept of a channel), all equal to -5, mixed
in one row from -1e-4 to -30, and -inf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from limbeck.ops.channel_decay import decayed_scores
from limbeck.ops.delta_rule import gated_delta_rule, gated_delta_rule_step
from limbeck.ops.kda import kimi_delta_rule
from limbeck.ops.linear_attention import linear_attention, linear_attention_step
from recurrences import LENGTHS, TOLERANCE, Inputs, assert_equal, by_steps, numbered, results, separately


class Rule(NamedTuple):
    chunked: Callable[..., Any]
    step: Callable[..., Any]
    channels: bool
    delta: bool

    @property
    def reference(self) -> Callable[..., Any]:
        return by_steps(self.step)

    def inputs(self, batch: int, tokens: int, heads: int = 2, key: int = 12, value: int = 20, *, gate: float = 1.0, seed: int = 0) -> list[Tensor]:
        """q, k, v, g, (beta,) state; log decays uniform in [-gate, 0]."""
        make = Inputs(seed)
        shape = (batch, tokens, heads)
        g = -gate * make.uniform(*shape, *([key] if self.channels else []))
        strength = [make.uniform(*shape)] if self.delta else []
        return [make.unit(*shape, key), make.unit(*shape, key), make.normal(*shape, value), g, *strength, make.normal(batch, heads, key, value)]


RULES = {
    "heads": Rule(linear_attention, linear_attention_step, False, False),
    "channels": Rule(linear_attention, linear_attention_step, True, False),
    "kda": Rule(kimi_delta_rule, gated_delta_rule_step, True, True),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))


@every_rule
@pytest.mark.parametrize(
    ("tokens", "chunk", "gate"),
    [(64, 32, 0.0), (70, 64, 0.05), (70, 64, 5.0), (70, 64, 20.0), (70, 16, 1.0), (50, 24, 1.0), (37, 128, 1.0), (1, 64, 1.0)],
)
def test_chunked_equals_recurrent_with_every_gradient(rule: Rule, tokens: int, chunk: int, gate: float) -> None:
    inputs = rule.inputs(2, tokens, gate=gate)
    expected = results(rule.reference, inputs, torch.float64)
    for dtype, tolerance in TOLERANCE.items():
        assert_equal(results(rule.chunked, inputs, dtype, chunk=chunk), expected, tolerance)


@every_rule
def test_a_strong_decay_at_every_token_costs_no_precision(rule: Rule) -> None:
    """e^-G of a token 64 tokens into the chunk is e^320: no single reference point can carry both factors."""
    inputs = rule.inputs(1, 80)
    inputs[3] = torch.full_like(inputs[3], -5.0)
    expected = results(rule.reference, inputs, torch.float64)
    assert_equal(results(rule.chunked, inputs, torch.float32), expected, 2e-6)
    assert_equal(results(rule.chunked, inputs, torch.float64), expected, 1e-12)


@every_rule
def test_slow_and_fast_channels_and_tokens_side_by_side(rule: Rule) -> None:
    """Log-uniform from 1e-4 to 30: sums reach -600 in one channel while its neighbour has forgotten nothing."""
    inputs = rule.inputs(2, 130)
    inputs[3] = -torch.exp(torch.log(torch.tensor(1e-4)) + 12.6 * Inputs(3).uniform(*inputs[3].shape))
    expected = results(rule.reference, inputs, torch.float64)
    for dtype, tolerance in TOLERANCE.items():
        assert_equal(results(rule.chunked, inputs, dtype), expected, tolerance)


@every_rule
def test_a_shut_gate_leaves_neither_nan_nor_a_wrong_gradient(rule: Rule) -> None:
    inputs = rule.inputs(1, 96)
    inputs[3][:, ::7] = -torch.inf
    inputs[3][:, 1::7] = -1e4
    found = results(rule.chunked, inputs, torch.float32)
    inputs[3] = inputs[3].clamp_min(-700)
    assert_equal(found, results(rule.reference, inputs, torch.float64), 1e-5)


@every_rule
def test_packed_documents_equal_separate_documents(rule: Rule) -> None:
    inputs = rule.inputs(1, sum(LENGTHS), gate=2.0)
    expected = separately(rule.reference, inputs, LENGTHS)
    assert_equal(results(rule.reference, inputs, torch.float64, documents_BT=numbered(LENGTHS)), expected, 1e-10)
    for dtype, tolerance in TOLERANCE.items():
        assert_equal(results(rule.chunked, inputs, dtype, documents_BT=numbered(LENGTHS), chunk=16), expected, tolerance)


@every_rule
@pytest.mark.parametrize("left", [0, 5, 16])
def test_padding_reads_zero_and_leaves_state_and_gradients_alone(rule: Rule, left: int) -> None:
    tokens, right = 30, 9
    inputs = rule.inputs(2, tokens)
    expected = results(rule.reference, inputs, torch.float64)
    span = slice(left, left + tokens)
    padded = [*rule.inputs(2, left + tokens + right, seed=1)[:-1], inputs[-1]]
    for x, y in zip(padded[:-1], inputs[:-1], strict=True):
        x[:, span] = y
    documents = torch.full((2, left + tokens + right), -1)
    documents[:, span] = 4
    for one in (rule.chunked, rule.reference):

        def inner(*args: Tensor, one: Callable[..., Any] = one, **options: Any) -> tuple[Tensor, Tensor]:
            output, state = one(*args, documents_BT=documents, **options)
            assert not output[:, :left].any() and not output[:, left + tokens :].any()
            return output[:, span], state

        found = results(inner, padded, torch.float64)
        for gradient in found[2:-1]:
            assert not gradient[:, :left].any() and not gradient[:, left + tokens :].any()
        assert_equal([*found[:2], *(x[:, span] for x in found[2:-1]), found[-1]], expected, 1e-10)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prefill_and_decode_equal_the_full_pass(rule: Rule, dtype: torch.dtype) -> None:
    *inputs, state = (x.to(dtype) for x in rule.inputs(2, 150))
    expected, expected_state = rule.chunked(*inputs, initial_state_BHKV=state)
    outputs, start = [], 0
    for length in (70, 1, 64, 5):
        output, state = rule.chunked(*(x[:, start : start + length] for x in inputs), initial_state_BHKV=state)
        outputs.append(output)
        start += length
    for t in range(start, 150):
        output, state = rule.step(*(x[:, t] for x in inputs), state)
        outputs.append(output[:, None])
    assert_equal([torch.cat(outputs, 1), state], [expected, expected_state], TOLERANCE[dtype])


@every_rule
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_inputs_keep_an_fp32_state(rule: Rule, autocast: bool) -> None:
    inputs = rule.inputs(1, 80)
    expected = results(rule.reference, inputs, torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, state = rule.chunked(*(x.bfloat16() for x in inputs[:-1]), initial_state_BHKV=inputs[-1].float())
    assert output.dtype == torch.bfloat16 and state.dtype == torch.float32
    for a, b in zip((output, state), expected[:2], strict=True):
        assert (a.double() - b).norm() / b.norm() <= 2e-2


def test_decayed_scores_equal_the_sum_they_are_named_for() -> None:
    make = Inputs()
    rows, keys, decay = make.normal(3, 2, 16, 5), make.normal(3, 16, 5), -4 * make.uniform(3, 16, 5)
    total = decay.cumsum(1)
    expected = torch.einsum("nric,njc,nijc->nrij", rows, keys, (total[:, :, None] - total[:, None]).exp()).tril()
    scores, since, until = decayed_scores(rows, keys, decay)
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(since, total)
    torch.testing.assert_close(until, total[:, -1:] - total)


def test_the_delta_rule_with_one_decay_in_all_channels_is_the_gated_delta_rule() -> None:
    """Outputs, state and gradients; the gradient of the scalar is the sum of those of its copies."""
    inputs = RULES["kda"].inputs(2, 90)
    inputs[3] = inputs[3][..., 0]

    def tiled(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *rest: Tensor, **options: Any) -> Any:
        return kimi_delta_rule(q, k, v, g[..., None].expand_as(k), *rest, **options)

    for dtype, tolerance in TOLERANCE.items():
        expected = results(gated_delta_rule, inputs, torch.float64, documents_BT=numbered((40, 50)).expand(2, -1))
        assert_equal(results(tiled, inputs, dtype, documents_BT=numbered((40, 50)).expand(2, -1)), expected, tolerance)


@pytest.mark.parametrize("name", ["recurrent_kimi_delta_attention", "chunk_kimi_delta_attention"])
def test_kimi_delta_rule_equals_that_of_transformers(name: str) -> None:
    module = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    *inputs, state = (x.float() for x in RULES["kda"].inputs(2, 70, key=16, value=16))
    theirs = getattr(module, name)(*inputs, initial_state=state, output_final_state=True)
    assert_equal(kimi_delta_rule(*inputs, initial_state_BHKV=state), theirs, 1e-5)


def test_one_decay_in_all_channels_is_a_decay_a_head() -> None:
    inputs = RULES["heads"].inputs(2, 90)

    def tiled(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **options: Any) -> Any:
        return linear_attention(q, k, v, g[..., None].expand_as(k), **options)

    assert_equal(results(tiled, inputs, torch.float64), results(linear_attention, inputs, torch.float64), 1e-12)


def test_without_decay_it_is_causal_attention_without_a_softmax() -> None:
    q, k, v, g, _ = RULES["heads"].inputs(2, 90)
    found, _ = linear_attention(q, k, v, torch.zeros_like(g), scale=1.0)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    torch.testing.assert_close(found, ((q @ k.mT).tril() @ v).transpose(1, 2), rtol=1e-10, atol=1e-10)


def test_orthogonal_keys_at_full_strength_need_no_delta() -> None:
    """The delta rule corrects what similar keys have stored; without any it is linear attention, decays and all."""
    q, _, v, g, beta, state = RULES["kda"].inputs(1, 12)
    k = torch.eye(12, dtype=torch.float64)[None, :, None].expand(1, 12, 2, 12)
    zero = torch.zeros_like(state)
    expected, _ = linear_attention(q, k, v, g, initial_state_BHKV=zero)
    found, _ = kimi_delta_rule(q, k, v, g, torch.ones_like(beta), initial_state_BHKV=zero)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
