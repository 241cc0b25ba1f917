"""Merges are merges of dW: exact where they can be, the same in every gauge, and dense one Linear at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_adapters_algebra import dense, regauged, some_adapters

from limbeck.adapters import merge as merge_module
from limbeck.adapters.gauge import canonical, norms
from limbeck.adapters.merge import METHODS, merge
from limbeck.adapters.spec import Adapters, cat
from limbeck.errors import AdapterError

WEIGHTS = [0.5, 0.3, 0.2]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def twins() -> tuple[Adapters, Adapters]:
    """One adapter, and three copies of it in different gauges."""
    one = some_adapters(1)
    return one, cat([one, regauged(one, 1), regauged(one, 2)])


@pytest.mark.parametrize("method", ["weighted", "cat", "task_arithmetic"])
def test_sums_are_exact_at_full_rank(method: str) -> None:
    adapters = some_adapters(3, rslora=True)
    merged = merge(adapters, WEIGHTS, method=method)
    wanted = torch.tensor(WEIGHTS, dtype=torch.float64) @ dense(adapters)
    assert relative(dense(merged.adapters), wanted) <= 1e-6
    assert merged.adapters.spec.rank == 12 and merged.adapters.spec.scale == 1 and merged.lowest_energy == 1


def test_many_merges_at_once_are_those_made_one_by_one() -> None:
    adapters = some_adapters(3)
    table = [[0.5, 0.3, 0.2], [1, -1, 0.25]]
    for method in ("weighted", "cat", "ties", "dare_linear", "dare_ties"):
        together = merge(adapters, table, method=method, rank=None if method == "cat" else 10)
        for row, weights in enumerate(table):
            alone = merge(adapters, weights, method=method, rank=None if method == "cat" else 10)
            torch.testing.assert_close(dense(together.adapters)[row], dense(alone.adapters)[0], rtol=1e-4, atol=1e-5)
            for name, kept in alone.energy.items():
                torch.testing.assert_close(together.energy[name][row], kept[0], rtol=1e-5, atol=1e-6)


def test_weights_are_a_mean_or_a_sum_by_default() -> None:
    adapters = some_adapters(3)
    assert relative(dense(merge(adapters).adapters), dense(adapters).mean(0)[None]) <= 1e-6
    assert relative(dense(merge(adapters, method="task_arithmetic").adapters), dense(adapters).sum(0)[None]) <= 1e-6


@pytest.mark.parametrize("method", [name for name in METHODS if name != "factors"])
def test_one_adapter_in_several_gauges_merges_to_itself(method: str) -> None:
    one, copies = twins()
    merged = merge(copies, WEIGHTS, method=method, density=1.0).adapters
    assert relative(dense(merged), dense(one)) <= 1e-5
    if method == "weighted":
        assert merged.spec.rank == one.spec.rank
        form = canonical(one)
        for name in form.A:
            torch.testing.assert_close(merged.A[name], form.A[name], rtol=0, atol=1e-4)


def test_factors_are_averaged_only_in_a_shared_gauge() -> None:
    adapters = some_adapters(3)
    with pytest.raises(AdapterError, match=r"differ by up to \d.*cross terms.*`weighted`"):
        merge(adapters, WEIGHTS, method="factors")
    shared = replace(adapters, A={name: a[:1].expand(3, -1, -1, -1) for name, a in adapters.A.items()})
    merged = merge(shared, WEIGHTS, method="factors").adapters
    assert merged.spec == shared.spec
    assert relative(dense(merged), torch.tensor(WEIGHTS, dtype=torch.float64) @ dense(shared)) <= 1e-6


def test_the_best_adapter_of_a_rank_and_the_energy_that_it_keeps() -> None:
    adapters = some_adapters(3)
    merged = merge(adapters, WEIGHTS, rank=5)
    assert merged.adapters.spec.rank == 5
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    for name, kept in merged.energy.items():
        wanted = torch.einsum("n,nloi->loi", weights, adapters.to(torch.float64).change(name))
        U, S, Vt = torch.linalg.svd(wanted)
        best = U[..., :5] @ torch.diag_embed(S[..., :5]) @ Vt[..., :5, :]
        torch.testing.assert_close(merged.adapters.change(name)[0].double(), best, rtol=0, atol=1e-5)
        torch.testing.assert_close(kept[0].double(), S[..., :5].square().sum(-1) / S.square().sum(-1), rtol=1e-5, atol=0)
        assert (kept < 1).all()


def test_ties_by_hand() -> None:
    """Two Linears of one entry a row and column, taken as a whole: trim, elect, mean of those that agree."""
    weights = torch.tensor([0.5, 0.25, 0.25])
    dW = torch.tensor([[[4.0, -3, 0.1, 0.2]], [[-5, -1, 2, 0.3]], [[-4, 6, 0.1, -7]]])
    trimmed = torch.tensor([[[4.0, -3, 0, 0]], [[-5, 0, 2, 0]], [[0, 6, 0, -7]]])
    found = merge_module._combiner("ties", 0.5, 0)(dW, weights, "x")
    assert torch.equal(merge_module._largest(dW, 0.5), trimmed)
    # Weighted: (2, -1.25, 0), (-1.5, 0, 1.5), (0, .5, 0), (0, 0, -1.75): the second is a tie of signs, where nobody is elected.
    torch.testing.assert_close(found, torch.tensor([[4.0, 0, 2, -7]]))


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_sparse_merges_are_those_of_the_dense_products(method: str) -> None:
    adapters = some_adapters(3)
    merged = merge(adapters, WEIGHTS, method=method, density=0.4, rank=24, seed=3)
    combine = merge_module._combiner(method, 0.4, 3)
    for site in adapters.spec.sites:
        for row, path in enumerate(site.paths()):
            wanted = combine(adapters.change(site.name)[:, row], torch.tensor(WEIGHTS), path)
            torch.testing.assert_close(merged.adapters.change(site.name)[0, row], wanted, rtol=0, atol=1e-5)
    assert merged.lowest_energy > 1 - 1e-5


def test_sparse_merges_say_what_their_rank_loses() -> None:
    adapters = some_adapters(3)
    full = merge(adapters, method="ties", rank=24)
    low = merge(adapters, method="ties")
    assert low.adapters.spec.rank == 12
    for name, kept in low.energy.items():
        squares = low.adapters.change(name).square().sum((-2, -1)) / full.adapters.change(name).square().sum((-2, -1))
        torch.testing.assert_close(kept, squares, rtol=1e-4, atol=0)
    assert 0.3 < low.lowest_energy < 0.99


def test_dare_is_unbiased_and_its_masks_belong_to_the_linears() -> None:
    adapters = some_adapters(2)
    first = merge(adapters, method="dare_linear", density=0.5, rank=24, seed=1).adapters
    assert torch.equal(dense(first), dense(merge(adapters, method="dare_linear", density=0.5, rank=24, seed=1).adapters))
    assert not torch.allclose(dense(first), dense(merge(adapters, method="dare_linear", density=0.5, rank=24, seed=2).adapters))
    mean = torch.stack([dense(merge(adapters, method="dare_linear", density=0.5, rank=24, seed=s).adapters)[0] for s in range(40)]).mean(0)
    assert relative(mean, dense(adapters).mean(0)) < 0.3
    alike = adapters.map(lambda t: t[:, :1].expand_as(t))
    masked = merge(alike, method="dare_linear", density=0.5, rank=24, seed=1).adapters.change("self_attn.q_proj")[0]
    assert not torch.allclose(masked[0], masked[1])
    only = replace(adapters.spec, sites=adapters.spec.sites[1:])
    part = Adapters(only, *({"mlp.down_proj": f["mlp.down_proj"]} for f in (adapters.A, adapters.B)))
    alone = merge(part, method="dare_linear", density=0.5, rank=24, seed=1).adapters
    torch.testing.assert_close(alone.change("mlp.down_proj"), first.change("mlp.down_proj"), rtol=0, atol=1e-5)


def test_dense_products_are_formed_one_linear_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    combiner = merge_module._combiner

    def spying(method: str, density: float, seed: int):
        inner = combiner(method, density, seed)
        return lambda dW, weights, path: shapes.append(tuple(dW.shape)) or inner(dW, weights, path)

    monkeypatch.setattr(merge_module, "_combiner", spying)
    merge(some_adapters(3), method="ties")
    assert shapes == [(3, 20, 24)] * 3 + [(3, 24, 36)] * 2


def test_large_matrices_keep_their_leading_part(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = some_adapters(3)
    exact = merge(adapters, method="dare_linear", density=0.9, rank=4)
    monkeypatch.setattr(merge_module, "_EXACT_SIDE", 8)
    monkeypatch.setattr(merge_module, "_OVERSAMPLING", 6)
    state = torch.random.get_rng_state()
    found = merge(adapters, method="dare_linear", density=0.9, rank=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert relative(dense(found.adapters), dense(exact.adapters)) < 0.02
    for name, kept in found.energy.items():
        torch.testing.assert_close(kept, exact.energy[name], rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", ["weighted", "ties", "dare_ties"])
def test_zero_adapters_merge_to_zero(method: str) -> None:
    adapters = some_adapters(2)
    zero = merge(replace(adapters, B={name: torch.zeros_like(b) for name, b in adapters.B.items()}), method=method)
    assert not norms(zero.adapters).any() and zero.lowest_energy == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tie"}, "no merge method is called 'tie', did you mean 'ties'"),
        ({"weights": [1.0]}, r"weights are \[1\], and there are 3"),
        ({"weights": [1.0, torch.nan, 0]}, "finite"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 4, "method": "cat"}, "`weighted`"),
        ({"density": 0.0, "method": "ties"}, "density is 0"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        merge(some_adapters(3), **options)


def test_a_broken_adapter_is_not_merged() -> None:
    adapters = some_adapters(3)
    adapters.B["mlp.down_proj"][1, 0, 0, 0] = torch.inf
    with pytest.raises(AdapterError, match=r"adapter 1 .*mlp.down_proj.*not finite"):
        merge(adapters)
