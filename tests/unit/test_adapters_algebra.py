"""Adapters compared in the space of dW: against dense fp64 products, and whatever their gauge."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from limbeck.adapters.gauge import align, canonical, cosine, inner, norms, shared_gauge, site_norms
from limbeck.adapters.retrieve import nearest, retrieve
from limbeck.adapters.spec import Adapters, AdapterSpec, Site
from limbeck.errors import AdapterError
from limbeck.ops import low_rank

SITES = (
    Site("self_attn.q_proj", "self_attn.q_proj", 24, 20, "model.layers", (0, 1, 3)),
    Site("mlp.down_proj", "mlp.down_proj", 36, 24, "model.layers", (0, 2)),
)


def some_adapters(count: int = 3, rank: int = 4, *, seed: int = 0, alpha: float = 6, rslora: bool = False, sites=SITES) -> Adapters:
    """Random factors of ordinary sizes."""
    generator = torch.Generator().manual_seed(seed)
    spec = AdapterSpec(sites, rank, alpha, rslora)
    A = {s.name: torch.randn(count, len(s.layers), rank, s.in_features, generator=generator) for s in sites}
    B = {s.name: 0.1 * torch.randn(count, len(s.layers), s.out_features, rank, generator=generator) for s in sites}
    return Adapters(spec, A, B)


def regauged(adapters: Adapters, seed: int = 1) -> Adapters:
    """The same dW with (R^-1 A, B R), another well-conditioned R in every Linear."""
    generator = torch.Generator().manual_seed(seed)
    A, B = {}, {}
    for name in adapters.A:
        mixers = torch.randn(*adapters.A[name].shape[:2], adapters.spec.rank, adapters.spec.rank, generator=generator, dtype=torch.float64)
        U, S, Vt = torch.linalg.svd(mixers)
        R = U @ torch.diag_embed(0.5 + S / S.amax(-1, keepdim=True)) @ Vt
        A[name] = (torch.linalg.inv(R) @ adapters.A[name].double()).float()
        B[name] = (adapters.B[name].double() @ R).float()
    return replace(adapters, A=A, B=B)


def dense(adapters: Adapters) -> torch.Tensor:
    """``[N, all entries of all dW]`` in fp64."""
    return torch.cat([adapters.to(torch.float64).change(site.name).flatten(1) for site in adapters.spec.sites], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inner_products_are_those_of_the_products(dtype: torch.dtype) -> None:
    a, b = some_adapters(3, 4).to(dtype), some_adapters(2, 5, seed=3, rslora=True).to(dtype)
    wanted = dense(a) @ dense(b).T
    assert inner(a, b).dtype == torch.float32
    torch.testing.assert_close(inner(a, b).double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norms(a).double(), dense(a).norm(dim=1), rtol=1e-5, atol=0)
    changes = a.to(torch.float64).change("mlp.down_proj")
    torch.testing.assert_close(site_norms(a)["mlp.down_proj"].double(), changes.norm(dim=(-2, -1)), rtol=1e-5, atol=0)


def test_pairs_taken_a_few_rows_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = some_adapters(5), some_adapters(3, seed=2)
    whole = inner(a, b)
    monkeypatch.setattr(low_rank, "_PAIRWISE_NUMBERS", 1)
    torch.testing.assert_close(inner(a, b), whole, rtol=1e-6, atol=1e-6)


def test_whitened_norms_are_the_mean_squared_change_of_the_outputs() -> None:
    adapters = some_adapters(2).to(torch.float64)
    generator = torch.Generator().manual_seed(5)
    inputs = {s.name: torch.randn(len(s.layers), 50, s.in_features, generator=generator, dtype=torch.float64) for s in SITES}
    moments = {name: x.mT @ x / x.shape[1] for name, x in inputs.items()}
    outputs = {name: x @ adapters.change(name).mT for name, x in inputs.items()}
    for name, found in site_norms(adapters, moments).items():
        torch.testing.assert_close(found.square(), outputs[name].square().sum(-1).mean(-1))
    cross = sum((y[0] * y[1]).sum(-1).mean(-1).sum() for y in outputs.values())
    torch.testing.assert_close(inner(adapters, adapters, moments)[0, 1], torch.as_tensor(cross))


def test_distances_keep_their_digits_near_zero() -> None:
    a = some_adapters(1, 4)
    A, B = a.A["mlp.down_proj"], a.B["mlp.down_proj"]
    A2, B2 = A + 1e-5 * torch.randn_like(A), B + 1e-6 * torch.randn_like(B)
    wanted = (B.double() @ A.double() - B2.double() @ A2.double()).square().sum((-2, -1))
    torch.testing.assert_close(low_rank.squared_distance(A, B, A2, B2).double(), wanted, rtol=1e-2, atol=0)
    far = some_adapters(1, 3, seed=9)
    wanted = (B.double() @ A.double() - far.B["mlp.down_proj"].double() @ far.A["mlp.down_proj"].double()).square().sum((-2, -1))
    torch.testing.assert_close(low_rank.squared_distance(A, B, far.A["mlp.down_proj"], far.B["mlp.down_proj"]).double(), wanted, rtol=1e-5, atol=0)


def test_inner_products_have_the_gradient_of_the_products() -> None:
    generator = torch.Generator().manual_seed(0)
    A1, B1, A2, B2 = (torch.randn(2, *shape, generator=generator, dtype=torch.float64, requires_grad=True)
                      for shape in ((3, 7), (6, 3), (2, 7), (6, 2)))  # fmt: skip
    assert torch.autograd.gradcheck(low_rank.inner, (A1, B1, A2, B2))
    assert torch.autograd.gradcheck(low_rank.squared_distance, (A1, B1, A2, B2))
    assert torch.autograd.gradcheck(low_rank.pairwise_inner, (A1, B1, A2, B2))


def test_the_norm_of_a_zero_adapter_has_no_nan_gradient() -> None:
    fresh = some_adapters(2)
    B = {name: torch.zeros_like(b).requires_grad_() for name, b in fresh.B.items()}
    norms(replace(fresh, B=B)).sum().backward()
    assert all(b.grad is not None and not b.grad.any() for b in B.values())


def test_broken_adapters_have_norms_that_show_it() -> None:
    adapters = some_adapters(2)
    adapters.B["mlp.down_proj"][1, 0, 0, 0] = torch.nan
    assert norms(adapters).isfinite().tolist() == [True, False] and cosine(adapters, adapters)[1].isnan().all()


@pytest.mark.parametrize("rank", [4, 30])
def test_the_decomposition_is_that_of_the_product(rank: int) -> None:
    adapters = some_adapters(2, rank)
    A, B = adapters.A["mlp.down_proj"].double(), adapters.B["mlp.down_proj"].double()
    U, S, Vt = low_rank.product_svd(A, B)
    torch.testing.assert_close(U @ torch.diag_embed(S) @ Vt, B @ A)
    torch.testing.assert_close(S, torch.linalg.svdvals(B @ A)[..., : S.shape[-1]])
    assert S.shape[-1] == min(rank, 24) and (S.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize(("rank", "rslora"), [(4, False), (4, True), (1, False), (30, False)])
def test_every_gauge_has_one_canonical_form(rank: int, rslora: bool) -> None:
    adapters = some_adapters(2, rank, rslora=rslora)
    first, second = canonical(adapters), canonical(regauged(adapters))
    for here, there in zip(first.tensors(), second.tensors(), strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-5)
    torch.testing.assert_close(dense(first), dense(adapters), rtol=0, atol=1e-5)
    assert first.spec == adapters.spec


def test_the_canonical_form_is_balanced_with_fixed_signs() -> None:
    form = canonical(some_adapters(2))
    for name in form.A:
        sizes = form.A[name].norm(dim=-1)
        torch.testing.assert_close(sizes, form.spec.scale * form.B[name].norm(dim=-2), rtol=1e-4, atol=1e-5)
        assert (sizes.diff(dim=-1) < 0).all()
        assert (form.B[name].gather(-2, form.B[name].abs().argmax(-2, keepdim=True)) > 0).all()


def test_fresh_and_deficient_adapters_have_a_canonical_form() -> None:
    fresh = some_adapters(2)
    zero = canonical(replace(fresh, B={name: torch.zeros_like(b) for name, b in fresh.B.items()}))
    assert all(not t.any() and t.isfinite().all() for t in zero.tensors())
    # Rank 3 in factors of rank 4: what rounding makes of the missing singular value must not show.
    for name in fresh.B:
        fresh.B[name][..., -1] = fresh.B[name][..., 0]
    for here, there in zip(canonical(fresh).tensors(), canonical(regauged(fresh)).tensors(), strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=2e-5)


def test_cosines_do_not_see_the_gauge() -> None:
    adapters = some_adapters(3)
    torch.testing.assert_close(cosine(adapters, regauged(adapters)).diagonal(), torch.ones(3), rtol=0, atol=1e-5)
    empty = replace(adapters, B={name: torch.zeros_like(b) for name, b in adapters.B.items()})
    assert not cosine(adapters, empty).any()


def test_a_shared_gauge_is_a_shared_a() -> None:
    adapters = some_adapters(3)
    shared = replace(adapters, A={name: a[:1].expand(3, -1, -1, -1) for name, a in adapters.A.items()})
    assert shared_gauge(shared) and not shared_gauge(adapters) and shared_gauge(adapters.pick([0]))
    moved = shared.map(torch.clone)
    moved.A["mlp.down_proj"][2, 1] *= 1 + 1e-5
    assert not shared_gauge(moved)


def test_aligned_adapters_keep_their_changes() -> None:
    other_sites = (replace(SITES[0], layers=(1, 2)), Site("mlp.up_proj", "mlp.up_proj", 24, 36, "model.layers", (1,)))
    one, two = some_adapters(2, 4), some_adapters(1, 6, seed=4, alpha=3, rslora=True, sites=other_sites)
    both = align([one, two])
    assert [(s.name, s.layers) for s in both.spec.sites] == [
        ("self_attn.q_proj", (0, 1, 2, 3)), ("mlp.down_proj", (0, 2)), ("mlp.up_proj", (1,))
    ]  # fmt: skip
    change = both.change("self_attn.q_proj")
    torch.testing.assert_close(change[:2, [0, 1, 3]], one.change("self_attn.q_proj"))
    torch.testing.assert_close(change[2, [1, 2]], two.change("self_attn.q_proj")[0])
    assert not change[:2, 2].any() and not change[2, [0, 3]].any() and not both.change("mlp.down_proj")[2].any()
    torch.testing.assert_close(both.change("mlp.up_proj")[2], two.change("mlp.up_proj")[0])
    torch.testing.assert_close(norms(both)[2:], norms(two))


def test_adapters_of_two_models_cannot_be_aligned() -> None:
    with pytest.raises(AdapterError, match=r"self_attn.q_proj.*24 -> 20.*24 -> 22.*one base model"):
        align([some_adapters(), some_adapters(sites=(replace(SITES[0], out_features=22), SITES[1]))])


def test_retrieval_ranks_by_cosine() -> None:
    keys = torch.tensor([[1.0, 0], [0, 2], [3, 3], [-1, 0], [0, 0]])
    indices, weights = retrieve(torch.tensor([2.0, 1]), keys, 3, temperature=0.5)
    assert indices.tolist() == [2, 0, 1]
    cosines = torch.tensor([3 / 10**0.5, 2 / 5**0.5, 1 / 5**0.5])
    torch.testing.assert_close(weights, torch.softmax(cosines / 0.5, 0))
    assert nearest(torch.tensor([[0.0, 1e-30], [-5, 0.1]]), keys).tolist() == [1, 3]


def test_an_adapter_that_does_nothing_is_never_retrieved() -> None:
    keys = np.array([[0.0, 0.0], [-1, 0]], dtype=np.float16)
    indices, weights = retrieve(np.array([1, 0], dtype=np.float16), keys, 2)
    assert isinstance(indices, np.ndarray) and indices.tolist() == [1, 0] and weights.tolist() == [1, 0]
    indices, weights = retrieve(torch.zeros(2), torch.eye(2), 2)
    assert weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("query", "keys", "k", "temperature", "message"),
    [
        (torch.ones(3), torch.ones(4, 2), 1, 1.0, "cannot be compared"),
        (torch.ones(2), torch.ones(4, 2), 5, 1.0, "k is 5.*1 to 4"),
        (torch.ones(2), torch.ones(4, 2), 1, 0.0, "temperature is 0"),
        (torch.full((2,), torch.nan), torch.ones(4, 2), 1, 1.0, "not finite"),
        (torch.ones(2), torch.zeros(4, 2), 1, 1.0, "all keys are zero"),
    ],
)
def test_retrieval_says_what_is_wrong(query: torch.Tensor, keys: torch.Tensor, k: int, temperature: float, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        retrieve(query, keys, k, temperature)
