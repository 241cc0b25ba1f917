"""The gated delta rule: chunked == recurrent, packed == separate, prefill + decode == one pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from limbeck.ops.chunked_delta_rule import unit_lower_inverse
from limbeck.ops.delta_rule import gated_delta_rule, gated_delta_rule_step
from recurrences import LENGTHS, TOLERANCE, Inputs, assert_equal, by_steps, gradients_of, numbered, results, separately

recurrence = by_steps(gated_delta_rule_step)


def make_inputs(
    batch: int, tokens: int, heads: int, key: int, value: int, *, gate: float = 1.0, uniform: bool = False, seed: int = 0
) -> list[Tensor]:
    """q, k, v, g, beta, state in fp64; log decays in [-gate, 0], or all equal to -gate."""
    make = Inputs(seed)
    shape = (batch, tokens, heads)
    q, k = make.unit(*shape, key), make.unit(*shape, key)
    g = -gate * (torch.ones(*shape, dtype=torch.float64) if uniform else make.uniform(*shape))
    return [q, k, make.normal(*shape, value), g, make.uniform(*shape), make.normal(batch, heads, key, value)]


@pytest.mark.parametrize(
    ("tokens", "chunk", "gate", "uniform"),
    [
        (64, 32, 0.0, False),
        (70, 64, 0.05, False),
        (70, 64, 5.0, False),
        (80, 64, 5.0, True),
        (70, 64, 20.0, False),
        (70, 16, 1.0, False),
        (50, 24, 1.0, False),
        (37, 128, 1.0, False),
        (1, 64, 1.0, False),
    ],
)
def test_chunked_equals_recurrent_with_every_gradient(tokens: int, chunk: int, gate: float, uniform: bool) -> None:
    inputs = make_inputs(2, tokens, 2, 16, 24, gate=gate, uniform=uniform)
    expected = results(recurrence, inputs, torch.float64)
    for dtype, tolerance in TOLERANCE.items():
        assert_equal(results(gated_delta_rule, inputs, dtype, chunk=chunk), expected, tolerance)


def test_a_strong_decay_far_back_in_the_chunk_costs_no_precision() -> None:
    # Sums of -300 leave an fp32 difference of neighbours 3e-5 to go wrong by.
    inputs = make_inputs(1, 64, 2, 16, 16, gate=0.02)
    inputs[3][:, :60:2] = -10.3
    inputs[3][:, 30:] = inputs[3][:, 30:].clamp_min(-0.02)
    expected = results(recurrence, inputs, torch.float64)
    assert_equal(results(gated_delta_rule, inputs, torch.float32), expected, 2e-6)


def test_decayed_to_nothing_leaves_neither_nan_nor_a_wrong_gradient() -> None:
    inputs = make_inputs(1, 96, 2, 8, 8)
    inputs[3][:, ::7] = -torch.inf
    inputs[3][:, 1::7] = -1e4
    found = results(gated_delta_rule, inputs, torch.float32)
    finite = [*inputs[:3], inputs[3].clamp_min(-700), *inputs[4:]]
    assert_equal(found, results(recurrence, finite, torch.float64), 1e-5)


def test_equal_keys_at_full_strength_keep_their_precision() -> None:
    # Every entry of A is 1: its powers reach 1e17 within a chunk while the inverse has entries of 1.
    inputs = make_inputs(1, 128, 1, 8, 8, gate=0.0)
    inputs[1][:] = inputs[1][:, :1]
    inputs[4][:] = 1.0
    expected = results(recurrence, inputs, torch.float64)
    assert_equal(results(gated_delta_rule, inputs, torch.float32), expected, 1e-5)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_the_inverse_reads_only_what_stands_below_the_diagonal(size: int) -> None:
    strict = 0.2 * torch.randn(3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.linalg.inv(torch.eye(size, dtype=torch.float64) - strict.tril(-1))
    torch.testing.assert_close(unit_lower_inverse(strict), expected, rtol=1e-9, atol=1e-9)


def test_packed_documents_equal_separate_documents() -> None:
    inputs = make_inputs(1, sum(LENGTHS), 2, 8, 12, gate=2.0)
    documents, expected = numbered(LENGTHS), separately(recurrence, inputs, LENGTHS)
    assert_equal(results(recurrence, inputs, torch.float64, documents_BT=documents), expected, 1e-10)
    for dtype, tolerance in TOLERANCE.items():
        assert_equal(results(gated_delta_rule, inputs, dtype, documents_BT=documents, chunk=16), expected, tolerance)


@pytest.mark.parametrize("left", [0, 5, 16])
def test_padding_reads_zero_and_leaves_state_and_gradients_alone(left: int) -> None:
    right, tokens = 9, 30
    inputs = make_inputs(2, tokens, 2, 8, 8)
    expected = results(recurrence, inputs, torch.float64)
    noise = make_inputs(2, left + tokens + right, 2, 8, 8, seed=1)
    padded = [*noise[:5], inputs[5]]
    for x, y in zip(padded[:5], inputs[:5], strict=True):
        x[:, left : left + tokens] = y
    documents = torch.full((2, left + tokens + right), -1)
    documents[:, left : left + tokens] = 4
    for rule in (gated_delta_rule, recurrence):

        def inner(*args, rule=rule, **options):
            output, state = rule(*args, documents_BT=documents, **options)
            assert not output[:, :left].any() and not output[:, left + tokens :].any()
            return output[:, left : left + tokens], state

        found = results(inner, padded, torch.float64)
        for gradient in found[2:7]:
            assert not gradient[:, :left].any() and not gradient[:, left + tokens :].any()
        found[2:7] = [x[:, left : left + tokens] for x in found[2:7]]
        assert_equal(found, expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prefill_and_decode_equal_the_full_pass(dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in make_inputs(2, 150, 2, 16, 16)]
    expected, expected_state = gated_delta_rule(*inputs[:5], initial_state_BHKV=inputs[5])
    state, outputs, start = inputs[5], [], 0
    for length in (70, 1, 64, 5):
        part = [x[:, start : start + length] for x in inputs[:5]]
        output, state = gated_delta_rule(*part, initial_state_BHKV=state)
        outputs.append(output)
        start += length
    for t in range(start, 150):
        output, state = gated_delta_rule_step(*(x[:, t] for x in inputs[:5]), state)
        outputs.append(output[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(state, expected_state, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_without_decay_it_is_deltanet() -> None:
    """DeltaNet in closed form over the whole row: (I + tril(beta K K^T, -1)) U = beta V, o = tril(Q K^T) U."""
    q, k, v, _, beta, _ = make_inputs(2, 90, 2, 16, 12)
    found, _ = gated_delta_rule(q, k, v, torch.zeros_like(beta), beta, scale=1.0)
    q, k, v, beta = (x.transpose(1, 2) for x in (q, k, v, beta))
    system = torch.eye(90, dtype=torch.float64) + (beta[..., None] * (k @ k.mT)).tril(-1)
    corrections = torch.linalg.solve(system, beta[..., None] * v)
    expected = ((q @ k.mT).tril() @ corrections).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_inputs_keep_an_fp32_state(autocast: bool) -> None:
    inputs = make_inputs(1, 80, 2, 32, 32)
    expected = results(recurrence, inputs, torch.float64)
    leaves = [x.to(torch.bfloat16).requires_grad_() for x in inputs[:5]]
    start = inputs[5].float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, state = gated_delta_rule(*leaves, initial_state_BHKV=start)
    assert output.dtype == torch.bfloat16 and state.dtype == torch.float32
    found = [output, state, *gradients_of(output, state, [*leaves, start])]
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a.double() - b).norm() / b.norm() <= 2e-2, number


def test_a_loss_on_the_state_alone_has_gradients() -> None:
    inputs = make_inputs(1, 20, 1, 8, 8)
    found = [x.requires_grad_() for x in inputs]
    _, state = gated_delta_rule(*found[:5], initial_state_BHKV=found[5])
    gradients = torch.autograd.grad(state.sum(), found[1:])
    _, state = recurrence(*found[:5], initial_state_BHKV=found[5])
    for a, b in zip(gradients, torch.autograd.grad(state.sum(), found[1:]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_speed_benchmark_runs_and_writes_its_evidence(tmp_path: Path) -> None:
    from benchmarks.delta_rule.run import main

    # The ratio itself belongs to the committed results: a shared machine's clock decides no test.
    main(["--quick", "--out", str(tmp_path), "--threads", "1"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"claim", "command", "commit", "machine", "seeds", "rows", "criteria"}
    agreement = results["criteria"][-1]
    assert agreement["name"] == "largest relative difference" and agreement["holds"]
