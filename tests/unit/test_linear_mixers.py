"""What the mixers with a matrix state promise beyond the conformance tests: their formulas, their neutral start, their scale."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.config.parts.mixers import MIXERS
from limbeck.models.loading import load_model, load_tokenizer, resolve_source
from limbeck.models.structure import attention_slot, attention_view, decoder_layers
from mixer_cases import Bench, options_of

pytestmark = pytest.mark.usefixtures("double")
KINDS = ("gated_deltanet", "deltanet", "kda", "gla", "lightning", "mamba2")
every_kind = pytest.mark.parametrize("kind", KINDS)
LENGTH = 30


def _heads(bench: Bench, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k of unit length and v as the fresh mixer of a Llama-like family without norms projects them, ``[B, H, T, K]``."""
    mixer, facts = bench.mixer, bench.view.facts
    q, k, v = (p(x).unflatten(-1, (facts.num_heads, -1)).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    cos, sin = bench.rope(torch.arange(x.shape[1])[None])
    q, k = facts.rotate(q, k, (cos, sin))
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v


def _out(bench: Bench, o_BHTV: Tensor, x: Tensor) -> Tensor:
    mixer = bench.mixer
    return mixer.o_proj(o_BHTV.transpose(1, 2).flatten(-2) * F.silu(mixer.g_proj(x)))


@every_kind
@pytest.mark.parametrize("sizes", [[3], [1, 1]], ids=["chunk", "tokens"])
def test_padding_leaves_every_state_as_it_was(kind: str, sizes: list[int]) -> None:
    """Not even decayed: a row that waits for the others of its batch forgets nothing."""
    bench = Bench(options_of(kind))
    x, cache = bench.inputs(1, 20), bench.cache()
    with torch.no_grad():
        bench(x[:, :10], past_key_values=cache)
        before = cache.layers[0].read("state").clone()
        for size in sizes:
            bench(x[:, 10 : 10 + size], past_key_values=cache, padding_mask=torch.zeros(1, size, dtype=torch.bool))
    assert torch.equal(cache.layers[0].read("state"), before)


def test_lightning_is_a_sum_that_fades_at_a_fixed_rate() -> None:
    bench = Bench(options_of("lightning"), "qwen2")
    x = bench.inputs(2, LENGTH)
    rates = torch.tensor([0.003 * 100 ** ((h + 0.5) / 4) for h in range(4)])
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    with torch.no_grad():
        q, k, v = _heads(bench, x)
        weights = (q @ k.mT) * (-rates[:, None, None] * distance).exp().tril() * bench.mixer.read_scale[:, None, None]
        torch.testing.assert_close(bench(x), _out(bench, weights @ v, x), rtol=1e-5, atol=1e-5)
    names = [name for name, _ in bench.mixer.named_parameters()]
    assert not [name for name in names if name.startswith(("a_", "A_", "dt_"))]


def test_mamba2_is_the_state_space_dual_in_closed_form() -> None:
    """y = (C B^T o e^(segment sums of dt A)) (dt x) + D x, arXiv 2405.21060 section 3 with C = q, B = k, x = v; every parameter stirred."""
    bench = Bench(options_of("mamba2"), "qwen2")
    mixer, x = bench.mixer, bench.inputs(2, LENGTH)
    with torch.no_grad():
        q, k, v = _heads(bench, x)
        step = F.softplus(mixer.dt_proj(x) + mixer.dt_bias).transpose(1, 2)
        total = (-mixer.A_log.exp()[:, None] * step).cumsum(-1)
        decay = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
        y = ((q @ k.mT) * decay) @ (step[..., None] * v) + mixer.D[:, None, None] * v
        torch.testing.assert_close(bench(x), _out(bench, y, x), rtol=1e-5, atol=1e-5)
    assert mixer.D.abs().min() > 0


def test_a_fresh_kimi_delta_attention_is_a_fresh_gated_deltanet() -> None:
    """Same decays in all channels, up to the small random weights that let gradients through."""
    x = Bench(options_of("kda")).inputs(2, LENGTH)
    with torch.no_grad():
        found, expected = (Bench(options_of(kind), stirred=False)(x) for kind in ("kda", "gated_deltanet"))
    assert 0 < (found - expected).norm() < 0.01 * expected.norm()


def test_deltanet_is_gated_deltanet_with_its_gate_open() -> None:
    """Bit for bit, with the same stirred parameters."""
    bench, gated = Bench(options_of("deltanet")), Bench(options_of("gated_deltanet"))
    gated.mixer.load_state_dict({**gated.mixer.state_dict(), **bench.mixer.state_dict()})
    x = bench.inputs(2, LENGTH)
    with torch.no_grad():
        gated.mixer.A_log.fill_(-torch.inf)
        assert torch.equal(gated(x), bench(x))
        assert torch.equal(gated.in_chunks(x, [13, 1, 16]), bench.in_chunks(x, [13, 1, 16]))


@pytest.mark.parametrize("kind", ["gated_deltanet", "kda", "gla", "lightning", "mamba2"])
def test_fresh_forget_rates_spread_over_the_range_of_the_options(kind: str) -> None:
    bench = Bench(options_of(kind), stirred=False)
    with torch.no_grad():
        rates = -bench.mixer._gates(bench.inputs(1, 5))[0].flatten(0, 1)
    assert (rates > 0.003).all() and (rates < 0.3).all()
    by_head = rates.transpose(0, 1).flatten(1)
    assert (by_head.amax(1) < 1.25 * by_head.amin(1)).all(), "the input says little at the start"
    assert (by_head.amin(1)[1:] > 2 * by_head.amax(1)[:-1]).all(), "heads have time scales of their own"


@pytest.mark.parametrize("kind", ["gla", "lightning", "mamba2"])
def test_a_read_of_what_is_stored_over_and_over_is_a_mean(kind: str) -> None:
    """All tokens alike: the attention gives the value, and the fresh mixer comes to it from below as its window fills."""
    options = options_of(kind).model_copy(update={"rope": False})
    bench = Bench(options, "qwen2", stirred=False)
    with torch.no_grad():
        bench.mixer.k_proj.load_state_dict(bench.mixer.q_proj.state_dict())
        x = bench.inputs(1, 1).expand(-1, 2500, -1)
        value = bench.mixer.v_proj(x[:, -1:])
        share = (bench(x) * bench.mixer.o_proj(value)).sum(-1) / bench.mixer.o_proj(value).square().sum(-1)
    # Mamba-2 multiplies by dt, the others by 1 - e^-dt.
    assert (share[0, 1:] >= share[0, :-1] - 1e-9).all()
    assert share[0, 0] < 0.3 and 0.98 < share[0, -1] < 1.1


@pytest.fixture(scope="module")
def code_model() -> dict[str, Any]:
    """The built-in model, and what its attention makes of eight rows of its own kind of text."""
    source = resolve_source("builtin:code-2m")
    model, made = load_model(source), []
    text = "\n".join(inspect.getsource(module) for module in (F, torch.functional, torch.serialization))
    ids = torch.tensor(load_tokenizer(source)(text)["input_ids"][: 8 * 256]).view(8, 256)

    def keep(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        made.append((kwargs["hidden_states"], kwargs["position_embeddings"], output[0]))

    handles = [getattr(layer, attention_slot(layer)).register_forward_hook(keep, with_kwargs=True) for layer in decoder_layers(model)]
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return {"model": model, "made": made}


@every_kind
def test_a_fresh_mixer_on_the_built_in_model_starts_near_the_attention(kind: str, code_model: dict[str, Any]) -> None:
    """Squared error over the attention's power: silence has 1, and a mixer of the wrong scale has ten and more."""
    torch.set_default_dtype(torch.float32)
    model, errors = code_model["model"], []
    for layer, (x, position_embeddings, expected) in enumerate(code_model["made"]):
        view = attention_view(model, layer)
        mixer = MIXERS.build(options_of(kind), view.facts, model.config, layer)
        mixer.init_from(view)
        with torch.no_grad():
            found = mixer(x, position_embeddings=position_embeddings)[0]
        errors.append(float((found - expected).square().sum() / expected.square().sum()))
    bound = {"deltanet": (2.2, 1.3), "gated_deltanet": (1.4, 0.9), "kda": (1.4, 0.9)}.get(kind, (1.02, 0.95))
    assert max(errors) < bound[0] and sum(errors) / len(errors) < bound[1], errors
