"""LoRAs trained at once are the LoRAs that training one after the other gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from adapter_bases import all_double, qwen3_next
from families import packed_batch, tiny_model
from limbeck.adapters.spec import Adapters
from limbeck.adapters.start import bound_of_A
from limbeck.adapters.targets import resolve_spec
from limbeck.config.parts.objectives import CrossEntropyOptions
from limbeck.engine.recompute import outer_units, recompute
from limbeck.errors import ModelError
from limbeck.models.packed import forward_packed
from limbeck.objectives.ce import CrossEntropy
from limbeck.students.generator.heads import Static, key_of
from limbeck.students.pool import AdapterPool
from limbeck.types import Batch, Signal

COUNT, EACH, STEPS = 5, 2, 4


def pool_of(count: int = COUNT, *, init: Any = "independent", seed: int = 0, dtype: torch.dtype = torch.float64, model: Any = None) -> AdapterPool:
    model = model or tiny_model("qwen3", dtype=dtype)
    return AdapterPool(model, resolve_spec(model, "all", rank=2, alpha=4), count, init=init, seed=seed, dtype=dtype)


def batch_of(numbers: list[int], seed: int = 0) -> Batch:
    """Rows of two or three documents, each row with its adapter's number."""
    lengths = [[[7, 6], [4, 9], [8, 3, 2]][row % 3] for row in range(len(numbers))]
    return replace(packed_batch(lengths, seed, padding=1), adapters_B=torch.tensor(numbers))


def pick(batch: Batch, rows: list[int], **changes: Any) -> Batch:
    """Some of the rows."""
    return replace(Batch(**{name: part[rows] for name, part in batch._parts().items()}), **changes)


def loss_of(pool: AdapterPool, batch: Batch) -> Tensor:
    return CrossEntropy(CrossEntropyOptions())(pool(batch), Signal(), batch).sum


def train(pool: AdapterPool, batches: list[Batch]) -> Adapters:
    optimizer = torch.optim.AdamW([p for p in pool.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for batch in batches:
        optimizer.zero_grad()
        loss_of(pool, batch).backward()
        optimizer.step()
    return pool.adapters.detach()


def trained(pool: AdapterPool) -> AdapterPool:
    train(pool, [batch_of([n for n in range(pool.count) for _ in range(EACH)], seed) for seed in range(2)])
    pool.zero_grad()
    return pool


def furthest(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest relative difference."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("layout", ["runs", "mixed"])
def test_an_adapter_trained_among_five_is_the_one_trained_alone(layout: str) -> None:
    """``mixed``: rows in any order and uneven numbers, which have an adapter each."""
    numbers = [n for n in range(COUNT) for _ in range(EACH)] if layout == "runs" else [3, 0, 0, 0, 4, 4, 4, 1, 1, 2]
    batches = [batch_of(numbers, seed) for seed in range(STEPS)]
    together = train(pool_of(), batches)
    for slot in (0, 3, 4):
        rows = [row for row, number in enumerate(numbers) if number == slot]
        single = pool_of(1)
        with torch.no_grad():
            for key, start in single.A.items():
                start.copy_(pool_of().A[key][slot : slot + 1])
        alone = train(single, [pick(b, rows, adapters_B=torch.zeros(len(rows), dtype=torch.int64)) for b in batches])
        assert furthest(together.pick([slot]).tensors(), alone.tensors()) <= 1e-5
        assert furthest(together.pick([(slot + 1) % COUNT]).tensors(), alone.tensors()) > 1e-2


def test_starts_are_shared_or_independent_and_the_first_do_not_depend_on_how_many_there_are() -> None:
    model = tiny_model("qwen3")
    few, many = (pool_of(count, dtype=torch.float32, model=model).adapters for count in (2, COUNT))
    assert all(torch.equal(many.A[name][:2], few.A[name]) for name in few.A)
    assert all(not torch.equal(many.A[name][0], many.A[name][1]) for name in many.A)
    shared = pool_of(dtype=torch.float32, model=model, init="shared").adapters
    assert all(torch.equal(shared.A[name], many.A[name][:1].expand_as(shared.A[name])) for name in shared.A)
    for site in many.spec.sites:
        bound = site.in_features**-0.5
        assert many.B[site.name].abs().max() == 0 and 0.9 * bound < many.A[site.name].abs().max() <= bound
    other = pool_of(seed=1, dtype=torch.float32, model=model).adapters
    assert not any(torch.equal(many.A[name], other.A[name]) for name in many.A)


def test_shared_starts_are_parameters_of_their_own() -> None:
    """One storage for all would move them together."""
    pool = trained(pool_of(init="shared"))
    assert all(not torch.equal(A[0], A[1]) for A in pool.A.values())


def test_a_fresh_pool_is_the_base_and_gets_gradients_in_b_first() -> None:
    pool = pool_of(dtype=torch.float32)
    batch = batch_of(list(range(COUNT)))
    with torch.no_grad():
        hidden = pool(batch).hidden_BTD
        with pool.injector.active(None):
            assert torch.equal(hidden, forward_packed(pool.model, batch))
    loss_of(pool, batch).backward()
    assert all(p.grad.abs().max() == 0 for p in pool.A.values())
    assert all(bool((p.grad.flatten(1).abs().amax(1) > 0).all()) for p in pool.B.values())
    assert {name for name, p in pool.named_parameters() if p.requires_grad} == set(pool.roles)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
def test_how_many_are_trained_together_changes_nothing(size: int, checkpointed: bool) -> None:
    pool = trained(pool_of())
    batch = batch_of([n for n in range(COUNT) for _ in range(EACH)])
    loss_of(pool, batch).backward()
    wanted = [p.grad.clone() for p in (*pool.A.values(), *pool.B.values())]
    pool.zero_grad()
    if checkpointed:
        for unit in outer_units(pool):
            recompute(unit)
    for part in batch.split(size):
        loss_of(pool, part).backward()
    assert furthest([p.grad for p in (*pool.A.values(), *pool.B.values())], wanted) <= 1e-10


def test_rows_of_padding_give_nothing_to_any_adapter() -> None:
    pool = trained(pool_of())
    plain = batch_of([1, 1, 3])
    loss_of(pool, plain).backward()
    wanted = [p.grad.clone() for p in (*pool.A.values(), *pool.B.values())]
    pool.zero_grad()
    padded = pick(plain, [0, 1, 2, 2, 2])
    padded.adapters_B[3:] = -1
    padded.labels_BT[3:] = -100
    loss_of(pool, padded).backward()
    found = [p.grad for p in (*pool.A.values(), *pool.B.values())]
    assert max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)) <= 1e-10
    assert all(p.grad[0].abs().max() == 0 for p in pool.B.values())


def test_the_gradient_is_that_of_finite_differences() -> None:
    pool = trained(pool_of(3, model=all_double()))
    batch = batch_of([0, 1, 2])
    loss_of(pool, batch).backward()
    torch.manual_seed(0)
    for factors in (pool.A, pool.B):
        for name, parameter in factors.items():
            direction = torch.rand_like(parameter) * parameter.grad.sign()
            wanted = float((parameter.grad * direction).sum())
            step = 1e-6
            found = []
            with torch.no_grad():
                for sign in (1, -2):
                    parameter.add_(direction, alpha=sign * step)
                    found.append(float(loss_of(pool, batch)))
                parameter.add_(direction, alpha=step)
            assert (found[0] - found[1]) / (2 * step) == pytest.approx(wanted, rel=1e-6), name


def test_documents_of_a_family_that_cannot_pack_get_their_rows_adapter() -> None:
    pool = trained(pool_of(3, model=qwen3_next(), dtype=torch.float64))
    batch = batch_of([2, 0, 1])
    with torch.no_grad():
        found = pool(batch).hidden_BTD
        for row, number in enumerate([2, 0, 1]):
            for document in batch.documents_BT[row].unique()[1:]:
                here = batch.documents_BT[row] == document
                with pool.injector.active(pool.adapters.pick([number])):
                    alone = pool.model.model(input_ids=batch.input_ids_BT[row, here][None], use_cache=False).last_hidden_state[0]
                torch.testing.assert_close(found[row, here], alone, rtol=0, atol=2e-5)


def test_the_state_gives_the_adapters_back_and_the_base_stays_in_evaluation_mode() -> None:
    pool = trained(pool_of(2))
    state = pool.state_dict()
    A, B = ({key.removeprefix(f"{letter}."): t for key, t in state.items() if key.startswith(f"{letter}.")} for letter in "AB")
    again = pool.gathered(A, B)
    assert all(torch.equal(a, b) for a, b in zip(again.tensors(), pool.adapters.tensors(), strict=True))
    pool.train()
    assert pool.training and not pool.model.training


def test_rows_without_an_adapter_are_refused() -> None:
    with pytest.raises(ModelError, match="rows of a pool name their adapter"):
        pool_of(2)(packed_batch([[5, 5]]))


def test_pools_and_generators_begin_as_peft_does() -> None:
    model = tiny_model("qwen3")
    spec = resolve_spec(model, "all", rank=8, alpha=8)
    pool = AdapterPool(model, spec, 3, init="independent", seed=0)
    static = Static(spec)
    theirs = dict(peft.get_peft_model(tiny_model("qwen3"), peft.LoraConfig(r=8, target_modules=spec.paths)).named_parameters())
    for site in spec.sites:
        bound = bound_of_A(site)
        drawn = [theirs[f"base_model.model.{path}.lora_A.default.weight"] for path in site.paths()]
        for A in (pool.A[key_of(site)], static.A[key_of(site)], torch.stack(drawn)):
            assert 0.9 * bound < float(A.detach().abs().max()) <= bound * (1 + 1e-6)
        assert not pool.B[key_of(site)].any() and not static.B[key_of(site)].any()
