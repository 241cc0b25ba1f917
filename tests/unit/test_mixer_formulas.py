"""Mixers against the formulas of their papers, written out token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.config.parts.mixers import MIXERS
from mixer_cases import CASES, Bench
from recurrences import keys_moved_token_by_token

pytestmark = pytest.mark.usefixtures("double")
LENGTH = 21


def make_bench(options: dict[str, Any], **kwargs: Any) -> tuple[Bench, Any, Tensor]:
    bench = Bench(MIXERS.options(options["kind"]).model_validate({"output_gate": False, **options} if options["kind"] != "path" else options), **kwargs)
    return bench, bench.mixer, bench.inputs(1, LENGTH)


def heads(mixer: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, mixer.facts.head_dim))


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@torch.no_grad()
def test_hgrn_averages_values_and_reads_convexly() -> None:
    bench, mixer, x = make_bench({"kind": "hgrn", "decay_init": (0.01, 0.4)})
    q = unit(mixer.q_norm(heads(mixer, mixer.q_proj(x)))) * math.sqrt(mixer.facts.head_dim)
    k = unit(mixer.k_norm(heads(mixer, mixer.k_proj(x)))) * math.sqrt(mixer.facts.head_dim)
    v, read = heads(mixer, mixer.v_proj(x)), q.softmax(-1)
    lower = 1 - (1 - 1e-4) * mixer.span_logit.sigmoid()
    forget = lower[:, None] + (1 - lower[:, None]) * (1 - k.sigmoid())
    state, outputs = torch.zeros(1, 4, 12, 12), []
    for t in range(LENGTH):
        state = forget[:, t, :, :, None] * state + (1 - forget[:, t])[..., None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, read[:, t]))
    expected = mixer.o_proj(torch.stack(outputs, 1).flatten(2))
    torch.testing.assert_close(bench(x), expected, rtol=1e-6, atol=1e-6)
    assert (forget > lower[:, None]).all() and (forget < 1).all()


@torch.no_grad()
def test_gsa_is_a_softmax_over_slots_of_moving_averages() -> None:
    bench, mixer, x = make_bench({"kind": "gsa", "slots": 5, "rope": False, "qk_norm": "none"})
    q, k = mixer.q_norm(heads(mixer, mixer.q_proj(x))), mixer.k_norm(heads(mixer, mixer.k_proj(x)))
    v, alpha = heads(mixer, mixer.v_proj(x)), mixer.f_proj(x).sigmoid().unflatten(-1, (4, 5)) ** (1 / 8)
    keys, values, outputs = torch.zeros(1, 4, 5, 12), torch.zeros(1, 4, 5, 12), []
    for t in range(LENGTH):
        a = alpha[:, t, :, :, None]
        keys, values = a * keys + (1 - a) * k[:, t, :, None], a * values + (1 - a) * v[:, t, :, None]
        weights = (torch.einsum("bhmk,bhk->bhm", keys, q[:, t]) * mixer.facts.scaling).softmax(-1)
        outputs.append(torch.einsum("bhmv,bhm->bhv", values, weights))
    torch.testing.assert_close(bench(x), mixer.o_proj(torch.stack(outputs, 1).flatten(2)), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_gsa_slots_start_with_rates_spread_over_the_asked_range() -> None:
    _, mixer, x = make_bench({"kind": "gsa", "slots": 16}, stirred=False)
    (g_BTHM,) = mixer._gates(torch.zeros_like(x))
    low, high = mixer.options.decay_init
    assert (-g_BTHM > low).all() and (-g_BTHM < high).all()
    assert len(g_BTHM[0, 0, 0].unique()) == 16


@torch.no_grad()
def test_path_moves_every_key_by_the_householders_after_it() -> None:
    bench, mixer, x = make_bench({"kind": "path", "rope": False, "beta_init": 0.8, "chunk": 8})
    q, k = mixer.q_norm(heads(mixer, mixer.q_proj(x))), mixer.k_norm(heads(mixer, mixer.k_proj(x)))
    raw, w = mixer.w_up(mixer.w_down(x)), torch.zeros(1, LENGTH, 24)
    for lag in range(3):
        w[:, lag:] += raw[:, : LENGTH - lag] * mixer.w_conv[:, 2 - lag]
    beta = 2 * mixer.b_proj(x).sigmoid()
    out = keys_moved_token_by_token(
        q.unflatten(2, (2, 2)), unit(heads(mixer, w)), beta, k, heads(mixer, mixer.v_proj(x)),
        torch.zeros(1, LENGTH, dtype=torch.int64), scale=mixer.facts.scaling,
    )  # fmt: skip
    torch.testing.assert_close(bench(x), mixer.o_proj(out.flatten(2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mistral"])
@torch.no_grad()
def test_path_without_steps_is_the_attention(family: str) -> None:
    """Rotation, norms, soft-cap and sliding window are the family's; only the path is added."""
    bench, mixer, x = make_bench({"kind": "path", "chunk": 8}, family=family, stirred=False)
    mixer.b_proj.bias.fill_(-80.0)
    tolerance = 1e-6 if family == "gemma2" else 1e-10
    torch.testing.assert_close(bench(x), bench.attention(x), rtol=tolerance, atol=tolerance)


def test_the_cache_of_path_grows_with_the_context() -> None:
    """It is softmax-priced, and says so."""
    _, mixer, _ = make_bench({"kind": "path", "short_conv": 0})
    assert mixer.state_bytes(4000) == 4 * mixer.state_bytes(1000)
    assert mixer.num_flops_per_token(4000) > mixer.num_flops_per_token(1000)


@torch.no_grad()
def test_rwkv7_reads_before_the_decay_and_removes_by_its_own_key() -> None:
    """The paper's form: S <- S diag(w) - (S c) (a c)^T + v k~^T, in its own layout (values first)."""
    bench, mixer, x = make_bench({"kind": "rwkv7", "rope": False})
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    xq, xk, xv, xw, xa, _ = (x + mu * (before - x) for mu in mixer.shift)
    q, k = (unit(norm(heads(mixer, project(y)))) for norm, project, y in ((mixer.q_norm, mixer.q_proj, xq), (mixer.k_norm, mixer.k_proj, xk)))
    v = heads(mixer, mixer.v_proj(xv))
    w = heads(mixer, torch.exp(-math.exp(-0.5) * mixer.w_up(mixer.w_down(xw).tanh()).sigmoid()))
    a = heads(mixer, mixer.a_up(mixer.a_down(xa)).sigmoid())
    kappa, alpha, rho = (heads(mixer, p) for p in (mixer.kappa, mixer.alpha, mixer.rho))
    c, written = unit(k * kappa), k * (1 + (a - 1) * alpha)
    state, outputs = torch.zeros(1, 4, 12, 12), []
    for t in range(LENGTH):
        transition = torch.diag_embed(w[:, t]) - c[:, t, :, :, None] * (a * c)[:, t, :, None]
        state = state @ transition + v[:, t, :, :, None] * written[:, t, :, None]
        bonus = (q[:, t] * rho * written[:, t]).sum(-1, keepdim=True) * v[:, t]
        outputs.append((state @ q[:, t, :, :, None])[..., 0] + bonus)
    torch.testing.assert_close(bench(x), mixer.o_proj(torch.stack(outputs, 1).flatten(2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["hgrn", "gsa", "path", "path-plain", "rwkv7", "rwkv7-plain"])
@torch.no_grad()
def test_a_row_that_waits_for_the_others_goes_on_as_if_it_had_not(case: str) -> None:
    """Padding in the middle of a cached row: nothing is forgotten, written or moved."""
    bench, _, x = make_bench(CASES[case])
    expected = bench(x)
    cache, positions, outputs = bench.cache(), torch.arange(LENGTH)[None], []
    for start, end in ((0, 9), (9, 10), (10, LENGTH)):
        outputs.append(bench(x[:, start:end], positions[:, start:end], past_key_values=cache))
        for wait in (3, 1):
            noise = torch.randn(1, wait, bench.width)
            bench(noise, positions[:, :wait], past_key_values=cache, padding_mask=torch.zeros(1, wait, dtype=torch.bool))
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-10, atol=1e-10)
