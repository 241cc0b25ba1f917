"""Relations between tokens: the formula, what does not change it, and a weight that follows the gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from adapter_bases import qwen3_next
from engine_parts import Rows, make_trainer
from families import packed_batch, tiny_model
from limbeck.config.parts.objectives import OBJECTIVES
from limbeck.config.parts.teachers import LocalTeacherOptions
from limbeck.engine.metrics import loss_trace, read_metrics
from limbeck.engine.step import TrainStep
from limbeck.errors import ModelError, RunError
from limbeck.models.observe import forward_observed
from limbeck.needs import AttentionQKV, HeadHidden, merge_needs
from limbeck.ops.attention_relation import relation_divergence
from limbeck.students.student import Student
from limbeck.teachers.local import LocalTeacher
from limbeck.types import AttentionStates, Batch, Head, Output, Signal
from moe_cases import objective

B, T = 2, 11
HEADS = 4


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def a_batch() -> Batch:
    return packed_batch([[5, 4], [3, 6]], padding=2)


def naive(student: Tensor, teacher: Tensor, documents: Tensor, heads: int, tau: float, causal: bool) -> Tensor:
    """Row by row, head by head."""
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(documents)):
        for t in range(documents.shape[1]):
            if documents[b, t] < 0:
                continue
            others = [j for j in range(documents.shape[1]) if documents[b, j] == documents[b, t] and (j <= t or not causal)]
            for h in range(heads):
                rows = []
                for x in (student, teacher):
                    part = x[b].double().chunk(heads, -1)[h]
                    unit = part / part.norm(dim=-1, keepdim=True)
                    scores = torch.stack([(unit[t] * unit[j]).sum() / tau for j in others])
                    rows.append(scores.exp() / scores.exp().sum())
                total = total + (rows[1] * (rows[1].log() - rows[0].log())).sum()
    return total / heads


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk", [None, 3])
def test_the_divergence_is_its_formula(causal: bool, chunk: int | None) -> None:
    """Of states whose widths differ."""
    documents = a_batch().documents_BT
    student, teacher = random(B, T, 8).requires_grad_(), random(B, T, 12, seed=1)
    found = relation_divergence(student, teacher, documents, heads=HEADS, temperature=0.5, causal=causal, chunk=chunk)
    expected = naive(student, teacher, documents, HEADS, 0.5, causal)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    slopes = [torch.autograd.grad(x, [student])[0] for x in (found, expected)]
    torch.testing.assert_close(*slopes, atol=1e-12, rtol=1e-12)
    assert not slopes[0][:, -2:].any(), "padding is related to nothing"


def test_the_gradient_is_that_of_finite_differences() -> None:
    documents, teacher = a_batch().documents_BT, random(B, T, 8, seed=1)
    student = random(B, T, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: relation_divergence(x, teacher, documents, heads=2, chunk=4), (student,))


def test_equal_relations_cost_nothing_whatever_their_scale() -> None:
    documents, student = a_batch().documents_BT, random(B, T, 8)
    assert abs(relation_divergence(student, 3 * student, documents, heads=HEADS)) < 1e-12
    turned, _ = torch.linalg.qr(random(2, 2, seed=5))
    rotated = (student.unflatten(-1, (HEADS, 2)) @ turned).flatten(-2)
    assert abs(relation_divergence(student, rotated, documents, heads=HEADS)) < 1e-12
    assert relation_divergence(student, random(B, T, 8, seed=9), documents, heads=HEADS) > 0.01


def test_documents_and_padding_do_not_see_each_other() -> None:
    """A packed row is its documents one by one."""
    student, teacher, documents = random(1, T, 8), random(1, T, 8, seed=1), a_batch().documents_BT[:1]
    whole = relation_divergence(student, teacher, documents, heads=2, causal=False)
    alone = [
        relation_divergence(student[:, span], teacher[:, span], torch.zeros(1, span.stop - span.start), heads=2, causal=False)
        for span in (slice(0, 5), slice(5, 9))
    ]
    torch.testing.assert_close(whole, alone[0] + alone[1])


def states(seed: int, dtype: torch.dtype = torch.float64) -> AttentionStates:
    return AttentionStates(*(random(B, T, width, seed=seed + i, dtype=dtype).requires_grad_() for i, width in enumerate((16, 8, 8))))


def parts_of(found: AttentionStates) -> list[Tensor]:
    return [found.q_BTQ, found.k_BTK, found.v_BTK]


def call(found: Any, student: AttentionStates, teacher: AttentionStates, batch: Batch) -> Any:
    output = Output(torch.zeros(B, T, 4), Head(torch.zeros(5, 4)), observed={AttentionQKV: {-1: student}})
    return found(output, Signal({AttentionQKV: {-1: teacher}}), batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_micro_batches_sum_to_the_batch(dtype: torch.dtype) -> None:
    batch, student, teacher = a_batch(), states(0, dtype), states(10, dtype)
    found = objective("attention_relation", heads=HEADS)
    assert int(found.count(batch)) == B * 9
    expected = torch.autograd.grad(call(found, student, teacher, batch).sum, parts_of(student))
    terms = []
    for row, part in enumerate(batch.split(1)):
        mine, theirs = (AttentionStates(*(x[row : row + 1] for x in parts_of(s))) for s in (student, teacher))
        terms.append(call(found, mine, theirs, part).sum)
    for a, b in zip(torch.autograd.grad(torch.stack(terms).sum(), parts_of(student)), expected, strict=True):
        assert (a - b).norm() <= (1e-12 if dtype == torch.float64 else 1e-6) * b.norm()
    assert all(x.grad is None for x in parts_of(teacher))


def test_heads_that_do_not_divide_the_widths_are_refused() -> None:
    with pytest.raises(RunError, match=r"3 relation heads do not divide the queries of width 16 and keys of width 8.*student.*a divisor of 8"):
        call(objective("attention_relation", heads=3), states(0), states(1), a_batch())


# -- in models -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama3", "qwen3", "phi3"])
def test_the_states_are_what_the_projections_give(family: str) -> None:
    from limbeck.models.structure import attention_view

    model, batch = tiny_model(family, dtype=torch.float64), a_batch()
    view, inputs = attention_view(model, 2), {}
    attention = model.model.layers[2].self_attn
    handle = attention.register_forward_pre_hook(lambda m, args, kwargs: inputs.update(x=kwargs["hidden_states"]), with_kwargs=True)
    hidden, seen = forward_observed(model, batch, {AttentionQKV: AttentionQKV((2, -2))})
    handle.remove()
    for layer in (2, -2):
        for found, weight in zip(parts_of(seen[AttentionQKV][layer]), (view.q_weight_QD, view.k_weight_KD, view.v_weight_KD), strict=True):
            torch.testing.assert_close(found, inputs["x"] @ weight.T)
    assert torch.equal(hidden, forward_observed(model, batch, {})[0])


def test_a_gated_attentions_queries_are_told_from_its_gates() -> None:
    model = qwen3_next()
    batch = packed_batch([[5, 4]], padding=2)
    _, seen = forward_observed(model, batch, {AttentionQKV: AttentionQKV((3,))})
    attention = model.model.layers[3].self_attn
    kept: list[Tensor] = []
    handle = attention.q_norm.register_forward_pre_hook(lambda m, args: kept.append(args[0]))
    forward_observed(model, batch, {})
    handle.remove()
    first = kept[0][0]  # the first document, [T, H, K]
    torch.testing.assert_close(seen[AttentionQKV][3].q_BTQ[0, :5], first[:5].flatten(-2))
    with pytest.raises(ModelError):
        forward_observed(model, batch, {AttentionQKV: AttentionQKV((0,))})
    with pytest.raises(ModelError, match="4 layers"):
        forward_observed(model, batch, {AttentionQKV: AttentionQKV((7,))})


def test_needs_merge_and_a_local_teacher_answers() -> None:
    options = OBJECTIVES.options("attention_relation").model_validate({"kind": "attention_relation", "layer": 3, "teacher_layer": 2})
    assert options.needs() == (AttentionQKV((2,)),) and options.observes() == (AttentionQKV((3,)),)
    both = merge_needs([AttentionQKV((2,)), HeadHidden(), AttentionQKV((-1, 2))])
    assert both[AttentionQKV] == AttentionQKV((2, -1))
    assert LocalTeacherOptions(model="x").provides(AttentionQKV((1,))) is True
    teacher = LocalTeacher(LocalTeacherOptions(model="x"), "x")
    teacher.module = tiny_model("llama3")
    signal = teacher.signal(a_batch(), both)
    assert list(signal[AttentionQKV]) == [2, -1] and HeadHidden in signal
    assert not signal[AttentionQKV][2].q_BTQ.requires_grad


@pytest.mark.parametrize("settings", [{"ratio": 1.0, "weight": 0}, {"ratio": 0}, {"ratio": 1.0, "weight": {"ramp": [0, 1], "steps": 3}}])
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        objective("attention_relation", **settings)


# -- the weight that follows the gradients ---------------------------------------------------------------------------------


def trainer_of(folder: Path, ratio: float | None, *, lr: float = 1e-3, **loop: Any) -> Any:
    teacher = LocalTeacher(LocalTeacherOptions(model="x"), "x")
    teacher.module = tiny_model("llama3", seed=1, dtype=torch.float64)
    settings = {"heads": 4, "layer": 2, **({} if ratio is None else {"ratio": ratio, "ratio_memory": 0.5})}
    options = OBJECTIVES.options("attention_relation").model_validate({"kind": "attention_relation", **settings})
    step = TrainStep(
        Student(tiny_model("llama3", dtype=torch.float64)), [objective("ce"), OBJECTIVES.build(options)], teacher, merge_needs(options.needs())
    )
    return make_trainer(folder, step, precision="float64", lr=lr, **{"rows": Rows(30), "steps": 6, "log_every": 1, **loop})


def test_the_weight_gives_the_gradients_the_ratio_that_was_asked_for(tmp_path: Path) -> None:
    """At a rate near zero, where gradients stay as they are, on the same rows every step; by gradients of each loss alone."""
    trainer = trainer_of(tmp_path, 0.25, lr=1e-12, rows=Rows(10), rows_per_step=10)
    trainer.run()
    step, batch = trainer.train_step, trainer.loader.rows.batch(range(10))
    student, relation = step.student, step.objectives[1]
    output = student(batch, {AttentionQKV: AttentionQKV((2,))})
    seen, signal = output.observed[AttentionQKV][2], step.ask("signal", batch, step.needs)
    sizes = []
    for one, weight, points in ((step.objectives[0], 1.0, seen.onward), (relation, relation.weight, parts_of(seen))):
        loss = one(output, signal, batch).sum * weight / one.count(batch)
        grads = torch.autograd.grad(loss, points, retain_graph=True)
        sizes.append(math.sqrt(sum(float(g.square().sum()) for g in grads)))
    assert sizes[1] / sizes[0] == pytest.approx(0.25, rel=1e-6)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0]["attention_relation/weight"] == 0 and "attention_relation/ratio" not in rows[0]
    assert rows[-1]["attention_relation/weight"] == pytest.approx(relation.weight, rel=1e-6)
    assert rows[-1]["attention_relation/ratio"] == pytest.approx(0.25, rel=1e-6)


def test_one_measure_gives_exactly_the_ratio() -> None:
    """The whole gradient is known apart: of this loss, and of another."""
    batch, student, teacher = a_batch(), states(0), states(10)
    found = objective("attention_relation", heads=HEADS, ratio=0.1, weight=3.0)
    leaves = parts_of(student)

    def forked() -> tuple[AttentionStates, Tensor]:
        """What the objective sees, and another loss of what goes on."""
        onward = tuple(x.view_as(x) for x in leaves)
        return AttentionStates(*(x.view_as(x) for x in leaves), onward), sum((x * random(*x.shape, seed=20 + i)).sum() for i, x in enumerate(onward))  # type: ignore[return-value]

    seen, other = forked()
    plain = torch.autograd.grad(call(objective("attention_relation", heads=HEADS), student, teacher, batch).sum, parts_of(student))
    rest = torch.autograd.grad(other, parts_of(student), retain_graph=True)
    first = call(found, seen, teacher, batch).sum * (found.weight / 18) + other
    for got, wanted in zip(torch.autograd.grad(first, parts_of(student), retain_graph=False), rest, strict=True):
        torch.testing.assert_close(got, wanted, msg="the step that measures first is not moved")
    found.settle(found.statistics())
    size = [math.sqrt(sum(float(g.square().sum()) for g in grads)) for grads in (plain, rest)]
    assert found.weight == pytest.approx(0.1 * size[1] / (size[0] / 18), rel=1e-9)
    # From now on it is let through, and measured as what it is.
    seen, other = forked()
    again = call(found, seen, teacher, batch)
    for got, a, b in zip(torch.autograd.grad(again.sum * (found.weight / 18) + other, parts_of(student)), plain, rest, strict=True):
        torch.testing.assert_close(got, found.weight / 18 * a + b)
    before = found.weight
    found.settle(found.statistics())
    assert found.weight == pytest.approx(before, rel=1e-9) and found.state()["weight"][1] == pytest.approx(0.1, rel=1e-9)


def test_micro_batches_do_not_change_a_balanced_run_and_it_resumes_bit_for_bit(tmp_path: Path) -> None:
    trainer_of(tmp_path / "whole", 0.25).run()
    trainer_of(tmp_path / "split", 0.25, microbatch=3, activation_checkpointing=True).run()
    whole, split = (loss_trace(tmp_path / name / "metrics.jsonl") for name in ("whole", "split"))
    assert max(abs(a - b) for a, b in zip(whole, split, strict=True)) <= 1e-9
    assert read_metrics(tmp_path / "split" / "metrics.jsonl")[-1]["attention_relation/weight"] > 0
    trainer = trainer_of(tmp_path / "broken", 0.25, checkpoint_every=2)
    apply = trainer._apply

    def dies(*args: Any) -> None:
        if trainer.at.step == 3:
            raise RuntimeError("killed")
        apply(*args)

    trainer._apply = dies
    with pytest.raises(RuntimeError, match="killed"):
        trainer.run()
    trainer_of(tmp_path / "broken", 0.25, checkpoint_every=2).run()
    assert loss_trace(tmp_path / "broken" / "metrics.jsonl") == whole
