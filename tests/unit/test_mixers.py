"""What every mixer promises, run over the whole registry: a new mixer is tested by being registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from families import FAMILIES, tiny_model, tokens
from limbeck.config.parts.surgeries import HybridizeOptions
from limbeck.models.limbeck_model import wrap_student
from limbeck.models.loading import load_model, save_model
from limbeck.models.state import MixerState
from mixer_cases import CASES, Bench, options_of

pytestmark = pytest.mark.usefixtures("double")
every_mixer = pytest.mark.parametrize("case", CASES)
LENGTH = 40
CHUNKS = [13, 1, 19, 7]


def _close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@every_mixer
def test_the_future_does_not_change_the_past(case: str) -> None:
    bench = Bench(options_of(case))
    x = bench.inputs(1, LENGTH)
    changed = x.clone()
    changed[:, 25] += 1
    with torch.no_grad():
        before, after = bench(x), bench(changed)
    _close(after[:, :25], before[:, :25])
    assert (after[:, 25] - before[:, 25]).abs().max() > 1e-4


@every_mixer
def test_packed_documents_equal_separate_ones(case: str) -> None:
    """Three documents and padding in a row; the first one of the second row is a single token."""
    bench = Bench(options_of(case))
    lengths = [[7, 9, 20], [1, 30, 5]]
    x = bench.inputs(2, LENGTH)
    documents = torch.full((2, LENGTH), -1)
    positions = torch.zeros(2, LENGTH, dtype=torch.int64)
    spans = []
    for row, sizes in enumerate(lengths):
        start = 0
        for number, size in enumerate(sizes):
            documents[row, start : start + size] = number
            positions[row, start : start + size] = torch.arange(size)
            spans.append((row, slice(start, start + size)))
            start += size
    with torch.no_grad():
        packed = bench(x, positions, documents_BT=documents)
        for row, span in spans:
            _close(packed[row, span], bench(x[row : row + 1, span])[0])


@every_mixer
@pytest.mark.parametrize("sizes", [[1] * LENGTH, CHUNKS, [2] * 20], ids=["tokens", "chunks", "pairs"])
def test_any_split_through_the_cache_equals_one_pass(case: str, sizes: list[int]) -> None:
    bench = Bench(options_of(case))
    x = bench.inputs(2, LENGTH)
    with torch.no_grad():
        _close(bench.in_chunks(x, sizes), bench(x))


@every_mixer
def test_left_padding_changes_nothing(case: str) -> None:
    """In one pass and through the cache; one row is padded beyond the first chunk, the other is not padded."""
    bench = Bench(options_of(case))
    x = bench.inputs(2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, :16] = False
    positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        alone, unpadded = bench(x[:1, 16:])[0], bench(x[1:])[0]
        for padded in (bench(x, positions, padding_mask=mask), bench.in_chunks(x, CHUNKS, positions, mask)):
            _close(padded[0, 16:], alone)
            _close(padded[1], unpadded)


@pytest.mark.parametrize("sizes", [[3], [1, 1]], ids=["chunk", "tokens"])
def test_padding_leaves_a_state_as_it_was(sizes: list[int]) -> None:
    """Not even decayed: a row that waits for the others of its batch forgets nothing."""
    bench = Bench(options_of("gated_deltanet"))
    x, cache = bench.inputs(1, 20), bench.cache()
    with torch.no_grad():
        bench(x[:, :10], past_key_values=cache)
        before = cache.layers[0].read("state").clone()
        for size in sizes:
            bench(x[:, 10 : 10 + size], past_key_values=cache, padding_mask=torch.zeros(1, size, dtype=torch.bool))
    assert torch.equal(cache.layers[0].read("state"), before)


@every_mixer
def test_every_parameter_gets_a_finite_gradient_from_the_first_step(case: str) -> None:
    bench = Bench(options_of(case), "qwen2", stirred=False)
    documents = torch.tensor([[0] * 15 + [1] * 20 + [-1] * 5])
    out = bench(bench.inputs(1, LENGTH), documents_BT=documents)
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in bench.mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A constant key bias cancels in softmax attention, up to its rotation: small, and not zero.
        assert parameter.grad.abs().max() > 0, name


@every_mixer
def test_gradients_equal_those_of_token_by_token_recurrence(case: str) -> None:
    bench = Bench(options_of(case))
    x = bench.inputs(1, 24).requires_grad_(True)
    parameters = [x, *bench.mixer.parameters()]
    target = torch.randn(1, 24, bench.width)
    whole = torch.autograd.grad((bench(x) * target).sum(), parameters)
    stepped = torch.autograd.grad((bench.in_chunks(x, [1] * 24) * target).sum(), parameters)
    for a, b in zip(whole, stepped, strict=True):
        _close(a, b, 1e-8)


@every_mixer
def test_the_state_holds_the_bytes_it_says(case: str) -> None:
    torch.set_default_dtype(torch.float32)
    bench = Bench(options_of(case))
    for context in (3, 40, 300):
        cache = bench.cache()
        with torch.no_grad():
            bench(bench.inputs(1, context), past_key_values=cache)
        state = cache.layers[0]
        assert isinstance(state, MixerState)
        assert state.num_bytes() == bench.mixer.state_bytes(context, dtype_bytes=4)
    assert bench.mixer.num_flops_per_token(40) > 2 * sum(p.numel() for n, p in bench.mixer.named_parameters() if n.endswith("proj.weight")) - 1


@every_mixer
def test_every_tensor_survives_save_and_load(case: str, tmp_path: Path) -> None:
    """Through meta, into a model that was built without the base."""
    base = tiny_model("qwen2", dtype=torch.float64, num_hidden_layers=2)
    student = wrap_student(base, [HybridizeOptions(mixer=CASES[case], keep=(1,))], {"source": "tiny", "fingerprint": {}})
    with torch.no_grad():
        for tensor in (*student.mixers()[0].parameters(), *student.mixers()[0].buffers()):
            tensor.add_(0.1 * torch.randn_like(tensor))
    save_model(student, tmp_path / "student")
    again = load_model(str(tmp_path / "student"), dtype=torch.float64)
    for ours, theirs in ((student.named_parameters(), again.named_parameters()), (student.named_buffers(), again.named_buffers())):
        expected, found = dict(ours), dict(theirs)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), name
    ids = tokens(2, 20)
    with torch.no_grad():
        assert torch.equal(student(ids).logits, again(ids).logits)


@every_mixer
def test_every_tensor_is_reported_as_copied_or_fresh(case: str) -> None:
    bench = Bench(options_of(case), "qwen2")
    named = {name for name, _ in bench.mixer.named_parameters()} | {name for name, _ in bench.mixer.named_buffers()}
    assert set(bench.report.copied) | set(bench.report.fresh) == named
    assert not set(bench.report.copied) & set(bench.report.fresh)
    assert {f"{p}_proj.{t}" for p in "qkv" for t in ("weight", "bias")} | {"o_proj.weight"} <= set(bench.report.copied)


@every_mixer
def test_bfloat16_autocast_stays_near_float32(case: str) -> None:
    torch.set_default_dtype(torch.float32)
    bench = Bench(options_of(case))
    x = bench.inputs(2, LENGTH)
    with torch.no_grad():
        exact = bench(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = bench(x)
            assert torch.isfinite(bench.in_chunks(x, CHUNKS)).all()
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_as_long_as_the_context_is_the_attention(family: str, layer: int) -> None:
    """Layers with a window of their own included; rope, norms, biases, soft-caps and grouped heads come with the family."""
    bench = Bench(options_of("swa"), family, layer=layer, stirred=False)
    x = bench.inputs(2, LENGTH)
    with torch.no_grad():
        tolerance = 1e-6 if family == "gemma2" else 1e-12
        _close(bench(x), bench.attention(x), tolerance)
        _close(bench.in_chunks(x, CHUNKS), bench.attention(x), tolerance)


@pytest.mark.parametrize("sinks", [0, 2])
def test_a_window_sees_its_tokens_and_the_sinks_and_nothing_else(sinks: int) -> None:
    """Over several blocks of queries, in the second of two packed documents."""
    options = options_of("swa-narrow").model_copy(update={"sinks": sinks})
    bench = Bench(options)
    x = bench.inputs(1, 300)
    documents = torch.tensor([[0] * 20 + [1] * 280])
    positions = torch.cat([torch.arange(20), torch.arange(280)])[None]
    with torch.no_grad():
        before = bench(x, positions, documents_BT=documents)
        for token in range(0, 300, 7):
            changed = x.clone()
            changed[:, token] += 1
            after = bench(changed, positions, documents_BT=documents)
            moved = set((after - before).abs().amax(-1)[0].gt(1e-9).nonzero().flatten().tolist())
            end = 20 if token < 20 else 300
            expected = set(range(token, min(token + 5, end)))
            if int(positions[0, token]) < sinks:
                expected = set(range(token, end))
            assert moved == expected


def test_a_full_width_key_norm_is_the_same_on_expanded_heads() -> None:
    """OLMo 2 norms keys over all KV heads together; the mixer's keys have one head a query head."""
    bench = Bench(options_of("gated_deltanet"), "olmo2", stirred=False)
    x, facts = bench.inputs(1, 9), bench.view.facts
    attention: Any = bench.base.model.layers[0].self_attn
    with torch.no_grad():
        theirs = attention.k_norm(attention.k_proj(x)).unflatten(-1, (facts.num_kv_heads, -1)).repeat_interleave(facts.num_groups, dim=2)
        ours = facts.normalise(bench.mixer.k_norm, bench.mixer.k_proj(x).unflatten(-1, (facts.num_heads, -1)))
    _close(ours, theirs, 1e-6)


def test_a_fresh_gate_is_open_and_forgetting_covers_the_asked_range() -> None:
    bench = Bench(options_of("gated_deltanet"), stirred=False)
    with torch.no_grad():
        g_BTH, beta_BTH = bench.mixer._gates(bench.inputs(1, 5))
        _close(torch.nn.functional.silu(bench.mixer.g_proj(bench.inputs(1, 5))), torch.ones(1, 5, 48))
    assert (beta_BTH == 0.5).all()
    low, high = bench.mixer.options.decay_init
    assert (-g_BTH > low).all() and (-g_BTH < high).all() and -g_BTH.min() / -g_BTH.max() > 10
    assert len(g_BTH[0, 0].unique()) == 4
