"""Balance, entropy and z-loss of routers: formulas, what neither micro-batches nor padding change, and what is seen."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapter_bases import qwen3_next
from engine_parts import Rows, make_trainer
from families import packed_batch, tiny_model
from limbeck.engine.metrics import loss_trace, read_metrics
from limbeck.engine.step import TrainStep
from limbeck.errors import ModelError, RunError
from limbeck.models.observe import forward_observed, routers
from limbeck.needs import RouterLogits
from limbeck.students.student import Student
from limbeck.types import Batch, Head, Output, Routing, Signal
from moe_cases import moe_student, objective

NEEDS = {RouterLogits: RouterLogits()}
KINDS = ("moe_balance", "router_entropy", "router_z")
B, T, E, K = 3, 10, 8, 2


def a_batch(padding: int = 0) -> Batch:
    return packed_batch([[4, 6], [7, 3], [2, 8]], padding=padding)


def routing(seed: int, batch: Batch, dtype: torch.dtype = torch.float64) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*batch.input_ids_BT.shape, E, generator=generator, dtype=torch.float64)
    return Routing(logits.to(dtype).requires_grad_(), logits.topk(K).indices)


def output_of(*layers: Routing) -> Output:
    hidden = torch.zeros(*layers[0].logits_BTE.shape[:2], 4, dtype=layers[0].logits_BTE.dtype)
    return Output(hidden, Head(torch.zeros(5, 4)), observed={RouterLogits: {2 * i: r for i, r in enumerate(layers)}})


def with_load(kind: str, load_LE: Tensor | None, **settings: Any) -> Any:
    found = objective(kind, **settings)
    if kind == "moe_balance" and load_LE is not None:
        found.settle(load_LE)
    return found


def naive(kind: str, layers: list[Routing], mask_BT: Tensor, load_LE: Tensor) -> Tensor:
    """Token by token."""
    total = torch.zeros((), dtype=torch.float64)
    for layer, load_E in zip(layers, load_LE.double(), strict=True):
        for row, column in mask_BT.nonzero().tolist():
            x = layer.logits_BTE[row, column].double()
            p = x.exp() / x.exp().sum()
            if kind == "moe_balance":
                term = E * sum(load_E[e] / load_E.sum() * p[e] for e in range(E))
            elif kind == "router_entropy":
                term = -sum(p[e] * p[e].log() for e in range(E)) / math.log(E)
            else:
                term = x.exp().sum().log() ** 2
            total = total + term / len(layers)
    return total


LOAD = torch.tensor([[5, 0, 1, 9, 2, 2, 0, 1], [1, 1, 1, 1, 4, 4, 4, 4]])


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_their_formulas_and_padding_has_no_part(kind: str) -> None:
    batch = a_batch(padding=3)
    layers = [routing(i, batch) for i in (0, 1)]
    found = with_load(kind, LOAD)
    assert found.weight == (0.01 if kind == "moe_balance" else 0.001)
    assert int(found.count(batch)) == B * T
    term = found(output_of(*layers), Signal(), batch)
    torch.testing.assert_close(term.sum, naive(kind, layers, batch.token_mask_BT, LOAD), atol=1e-12, rtol=1e-12)
    slopes = torch.autograd.grad(term.sum, [r.logits_BTE for r in layers])
    expected = torch.autograd.grad(naive(kind, layers, batch.token_mask_BT, LOAD), [r.logits_BTE for r in layers])
    for slope, wanted in zip(slopes, expected, strict=True):
        torch.testing.assert_close(slope, wanted, atol=1e-12, rtol=1e-12)
        assert not slope[:, T:].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_micro_batches_sum_to_the_step(kind: str, dtype: torch.dtype) -> None:
    batch = a_batch(padding=2)
    layers = [routing(i, batch, dtype) for i in (0, 1)]
    leaves = [r.logits_BTE for r in layers]
    whole, parts = with_load(kind, LOAD), with_load(kind, LOAD)
    expected = torch.autograd.grad(whole(output_of(*layers), Signal(), batch).sum, leaves)
    terms = []
    for row, part in enumerate(batch.split(1)):
        one = [Routing(r.logits_BTE[row : row + 1], r.chosen_BTK[row : row + 1]) for r in layers]
        terms.append(parts(output_of(*one), Signal(), part).sum)
    found = torch.autograd.grad(torch.stack(terms).sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= (1e-12 if dtype == torch.float64 else 1e-6) * b.norm()
    if kind == "moe_balance":
        assert torch.equal(parts.statistics(), whole.statistics())
        assert parts.statistics() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("load", [None, LOAD])
def test_a_uniform_router_is_exactly_balanced(dtype: torch.dtype, load: Tensor | None) -> None:
    batch = a_batch(padding=1)
    flat = Routing(torch.full((B, T + 1, E), 0.7, dtype=dtype), torch.randint(0, E, (B, T + 1, K)))
    term = with_load("moe_balance", load)(output_of(flat, flat), Signal(), batch)
    assert term.sum.item() / (B * T) == 1.0
    assert objective("router_entropy")(output_of(flat, flat), Signal(), batch).sum.item() / (B * T) == pytest.approx(1, abs=1e-6)


def test_the_load_is_that_of_the_step_before_and_the_first_step_is_not_pushed() -> None:
    batch = a_batch(padding=2)
    layers = [routing(i, batch) for i in (0, 1)]
    found = objective("moe_balance")
    first = found(output_of(*layers), Signal(), batch)
    for slope in torch.autograd.grad(first.sum, [r.logits_BTE for r in layers]):
        assert slope.abs().max() < 1e-15
    counted = found.statistics()
    expected = torch.stack([torch.bincount(r.chosen_BTK[batch.token_mask_BT].flatten(), minlength=E) for r in layers])
    assert torch.equal(counted, expected) and int(counted.sum()) == 2 * B * T * K
    found.settle(counted)
    second = found(output_of(*layers), Signal(), batch)
    torch.testing.assert_close(second.sum, naive("moe_balance", layers, batch.token_mask_BT, counted))
    with torch.no_grad():
        found(output_of(*layers), Signal(), batch)
    assert torch.equal(found.statistics(), counted), "a validation is no part of the load"


def test_memory_keeps_a_share_of_the_load_and_a_checkpoint_all_of_it() -> None:
    found = objective("moe_balance", memory=0.75)
    found.settle(LOAD)
    found.settle(LOAD.flip(0))
    torch.testing.assert_close(found.state()["load"], 0.75 * LOAD.double() + 0.25 * LOAD.flip(0).double())
    other, batch = objective("moe_balance", memory=0.75), a_batch()
    assert other.state() == {}
    other.load_state(found.state())
    layers = [routing(i, batch) for i in (0, 1)]
    assert torch.equal(other(output_of(*layers), Signal(), batch).sum, found(output_of(*layers), Signal(), batch).sum)


def test_an_expert_that_is_dead_in_one_layer_is_seen_and_gets_a_push() -> None:
    """The other layer has the opposite load: summed over layers it is even, and hides it."""
    load = torch.tensor([[0] + [8] * 7, [14] + [6] * 7])
    assert load.sum(0).unique().numel() == 1
    batch = a_batch()
    layers = [routing(i, batch) for i in (0, 1)]
    term = with_load("moe_balance", load)(output_of(*layers), Signal(), batch)
    assert term.metrics["router/idle"] == (1, 1)
    assert term.metrics["router/peak/0"][0] == pytest.approx(8 / 7) and term.metrics["router/peak/2"][0] == pytest.approx(14 / 7)
    assert 0 < float(term.metrics["router/cv"][0]) < 1
    slope, _ = torch.autograd.grad(term.sum, [r.logits_BTE for r in layers])
    assert (slope[..., 0] < 0).all(), "descent makes the dead expert likelier for every token"


def test_routers_that_collapse_cost_experts_over_choices() -> None:
    batch = a_batch()
    logits = torch.full((B, T, E), -60.0, dtype=torch.float64)
    logits[..., :K] = 60
    same = Routing(logits, logits.topk(K).indices)
    found = objective("moe_balance")
    found(output_of(same), Signal(), batch)
    found.settle(found.statistics())
    assert float(found(output_of(same), Signal(), batch).sum) / (B * T) == pytest.approx(E / K)


# -- in real models --------------------------------------------------------------------------------------------------------


def test_a_students_routers_are_observed() -> None:
    student, batch = moe_student(), a_batch(padding=2)
    inputs: dict[int, Tensor] = {}
    found = routers(student.model)
    assert list(found) == [0, 2]
    handles = [m.register_forward_pre_hook(lambda m, args, i=i: inputs.__setitem__(i, args[0])) for i, m in found.items()]
    seen = student(batch, NEEDS)
    [h.remove() for h in handles]
    for layer, router in found.items():
        one = seen.observed[RouterLogits][layer]
        torch.testing.assert_close(one.logits_BTE.flatten(0, 1), inputs[layer] @ router.weight.T)
        assert torch.equal(one.chosen_BTK, one.logits_BTE.topk(2).indices)
    assert torch.equal(seen.hidden_BTD, student(batch).hidden_BTD)
    assert not any(m._forward_hooks for m in student.modules())


def test_a_family_that_cannot_pack_shows_its_routers_in_packed_order() -> None:
    model = qwen3_next()
    packed, alone = packed_batch([[5, 4]], padding=2), packed_batch([[5, 4]])
    _, seen = forward_observed(model, packed, NEEDS)
    for span in (slice(0, 5), slice(5, 9)):
        document = replace(
            alone, **{n: getattr(alone, n)[:, span] for n in ("input_ids_BT", "labels_BT")}, position_ids_BT=alone.position_ids_BT[:, span],
            documents_BT=torch.zeros_like(alone.documents_BT[:, span]),
        )  # fmt: skip
        _, single = forward_observed(model, document, NEEDS)
        for layer, one in single[RouterLogits].items():
            torch.testing.assert_close(seen[RouterLogits][layer].logits_BTE[:, span], one.logits_BTE)
            assert torch.equal(seen[RouterLogits][layer].chosen_BTK[:, span], one.chosen_BTK)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_router_is_that_of_finite_differences(kind: str) -> None:
    """Along the last router's weight: what is behind it is not its affair."""
    student, batch = moe_student(), a_batch(padding=1)
    found = with_load(kind, LOAD)
    weight = routers(student.model)[2].weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def value() -> Tensor:
        return found(student(batch, NEEDS), Signal(), batch).sum

    (slope,) = torch.autograd.grad(value(), [weight])
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 1e-5 * direction
            values.append(float(value()))
            weight -= sign * 1e-5 * direction
    assert float((slope * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_student_is_refused_by_the_objectives_name(kind: str) -> None:
    student, batch = Student(tiny_model("qwen3")), a_batch()
    with pytest.raises(RunError, match=rf"'{kind}' is about the routers.*dense"):
        objective(kind)(student(batch, NEEDS), Signal(), batch)


def test_a_student_that_shows_nothing_is_refused_before_it_runs() -> None:
    class Blind(torch.nn.Module):
        def forward(self, batch: Batch) -> Output:
            raise AssertionError

    with pytest.raises(RunError, match="'router_z' looks inside the student"):
        TrainStep(Blind(), [objective("router_z")])


def test_compiled_layers_are_refused() -> None:
    student = moe_student()
    student.units()[0].compile()
    with pytest.raises(ModelError, match=r"loop.compile: false"):
        student(a_batch(), NEEDS)


# -- in the loop -----------------------------------------------------------------------------------------------------------


def run(folder: Path, balance: float | None, *, steps: int = 8, lr: float = 1e-3, **loop: Any) -> Any:
    objectives = [objective("ce")]
    if balance is not None:
        objectives += [objective("moe_balance", weight=balance), objective("router_entropy", weight=0.01 * (balance > 0))]
    step = TrainStep(moe_student(), objectives)
    trainer = make_trainer(folder, step, rows=Rows(30), lr=lr, precision="float64", steps=steps, log_every=1, **loop)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_micro_batches_do_not_change_a_run(tmp_path: Path) -> None:
    traces = []
    for microbatch in (None, 3):
        run(tmp_path / str(microbatch), 0.5, microbatch=microbatch, activation_checkpointing=microbatch == 3).run()
        traces.append(loss_trace(tmp_path / str(microbatch) / "metrics.jsonl"))
    assert max(abs(a - b) for a, b in zip(*traces, strict=True)) <= 1e-9
    rows = read_metrics(tmp_path / "3" / "metrics.jsonl")
    assert "router/cv" not in rows[0] and rows[1]["router/cv"] > 0
    assert {"moe_balance/raw", "moe_balance/weighted", "router_entropy/raw"} <= rows[0].keys()


def test_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    run(tmp_path / "whole", 0.5).run()
    trainer = run(tmp_path / "broken", 0.5, checkpoint_every=3)
    apply = trainer._apply

    def dies(*args: Any) -> None:
        if trainer.at.step == 5:
            raise RuntimeError("killed")
        apply(*args)

    trainer._apply = dies
    with pytest.raises(RuntimeError, match="killed"):
        trainer.run()
    run(tmp_path / "broken", 0.5, checkpoint_every=3).run()
    assert loss_trace(tmp_path / "broken" / "metrics.jsonl") == loss_trace(tmp_path / "whole" / "metrics.jsonl")


def test_weight_zero_is_off_to_the_last_bit(tmp_path: Path) -> None:
    run(tmp_path / "off", 0.0).run()
    run(tmp_path / "without", None).run()
    assert loss_trace(tmp_path / "off" / "metrics.jsonl") == loss_trace(tmp_path / "without" / "metrics.jsonl")


def test_balance_spreads_a_routing_that_began_collapsed(tmp_path: Path) -> None:
    """Experts 0 and 1 of every layer begin with all tokens; with the loss they do not keep them."""
    ends = {}
    for balance in (0.0001, 1.0):
        trainer = run(tmp_path / str(balance), balance, steps=40, lr=1e-2)
        for router in routers(trainer.train_step.student.model).values():
            with torch.no_grad():
                router.weight.mul_(0.02)
                router.weight[:2] += 0.02
        trainer.run()
        ends[balance] = read_metrics(tmp_path / str(balance) / "metrics.jsonl")[-1]["router/cv"]
    assert ends[1.0] < 0.7 * ends[0.0001]


def test_the_steps_own_load_is_the_same_in_one_micro_batch_and_in_many(tmp_path: Path) -> None:
    def steps_load(name: str, **loop: Any) -> Any:
        step = TrainStep(moe_student(), [objective("ce"), objective("moe_balance", weight=0.5, load="step")])
        make_trainer(tmp_path / name, step, rows=Rows(30), lr=1e-3, precision="float64", steps=5, log_every=1, **loop).run()
        return loss_trace(tmp_path / name / "metrics.jsonl"), read_metrics(tmp_path / name / "metrics.jsonl")

    (whole, rows), (parts, _) = steps_load("whole"), steps_load("parts", microbatch=3)
    assert max(abs(a - b) for a, b in zip(whole, parts, strict=True)) <= 1e-9
    # The first step is pushed too, by what is seen of it: E sum f p of one batch, with its own f.
    student, batch = moe_student(), make_trainer(tmp_path / "same", rows=Rows(30)).loader.next_step()
    _, observed = forward_observed(student.model, batch, NEEDS)
    layers = list(observed[RouterLogits].values())
    own = torch.stack([torch.bincount(r.chosen_BTK[batch.token_mask_BT].flatten(), minlength=E) for r in layers])
    wanted = naive("moe_balance", layers, batch.token_mask_BT, own) / batch.token_mask_BT.sum()
    assert rows[0]["moe_balance/raw"] == pytest.approx(float(wanted), rel=1e-9) and rows[0]["router/cv"] > 0


def test_memory_is_of_steps_before() -> None:
    with pytest.raises(ValueError, match="`memory` is of steps before"):
        objective("moe_balance", load="step", memory=0.5)
