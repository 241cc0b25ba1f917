"""Objectives: counts from the masks, sums from the fused operators, metrics that are sums too."""

from __future__ import annotations

import pytest
import torch

from limbeck.config.parts.objectives import OBJECTIVES, CrossEntropyOptions, ForwardKLOptions
from limbeck.needs import HeadHidden
from limbeck.types import IGNORE, Batch, Head, Objective, Output, Signal

B, T, D, V = 4, 9, 6, 20


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (B, T), generator=generator)
    labels = ids.roll(-1, 1)
    labels[:, -1] = IGNORE
    labels[1, 3] = IGNORE
    labels[3] = IGNORE
    return Batch(ids, labels, torch.arange(T).expand(B, T), torch.zeros(B, T, dtype=torch.int64))


def make_output(seed: int) -> Output:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Output(normal(B, T, D).requires_grad_(), Head(normal(V, D).requires_grad_()))


def build(kind: str) -> Objective:
    options = {"ce": CrossEntropyOptions(weight=0.5, chunk=5), "kl": ForwardKLOptions(weight=0.5, chunk=5, temperature=2.0)}
    return OBJECTIVES.build(options[kind])


@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_the_count_is_that_of_the_labels_that_count(kind: str) -> None:
    batch, objective = make_batch(), build(kind)
    assert objective.name == kind and objective.weight == 0.5
    assert int(objective.count(batch)) == 3 * (T - 1) - 1
    term = objective(make_output(0), Signal({HeadHidden: make_output(1)}), batch)
    for _, count in term.metrics.values():
        assert count == objective.count(batch)


@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_micro_batches_sum_to_the_batch(kind: str) -> None:
    batch, objective = make_batch(), build(kind)
    output, teacher = make_output(0), make_output(1)
    leaves = [output.hidden_BTD, output.head.weight_VD]
    whole = objective(output, Signal({HeadHidden: teacher}), batch)
    expected = torch.autograd.grad(whole.sum, leaves)
    terms = []
    for row, part in enumerate(batch.split(1)):
        signal = Signal({HeadHidden: Output(teacher.hidden_BTD[row : row + 1], teacher.head)})
        terms.append(objective(Output(output.hidden_BTD[row : row + 1], output.head), signal, part))
    total = torch.stack([term.sum for term in terms]).sum()
    torch.testing.assert_close(total, whole.sum)
    for a, b in zip(torch.autograd.grad(total, leaves), expected, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()
    for name, (value, count) in whole.metrics.items():
        torch.testing.assert_close(sum(term.metrics[name][0] for term in terms), value)
        assert sum(int(term.metrics[name][1]) for term in terms) == count


def test_the_metrics_are_what_they_are_called() -> None:
    batch, output, teacher = make_batch(), make_output(0), make_output(1)
    valid = batch.label_mask_BT
    student_logits = (output.hidden_BTD @ output.head.weight_VD.T)[valid]
    teacher_logits = (teacher.hidden_BTD @ teacher.head.weight_VD.T)[valid]
    ce = build("ce")(output, Signal(), batch)
    torch.testing.assert_close(
        ce.metrics["ce"][0], torch.nn.functional.cross_entropy(student_logits, batch.labels_BT[valid], reduction="sum").detach()
    )
    assert ce.metrics["accuracy"][0] == (student_logits.argmax(-1) == batch.labels_BT[valid]).sum()
    kl = build("kl")(output, Signal({HeadHidden: teacher}), batch)
    tempered = [(x / 2).log_softmax(-1).detach() for x in (student_logits, teacher_logits)]
    torch.testing.assert_close(kl.metrics["kl"][0], (tempered[1].exp() * (tempered[1] - tempered[0])).sum())
    torch.testing.assert_close(kl.sum.detach(), 4 * kl.metrics["kl"][0])
    assert kl.metrics["agreement"][0] == (student_logits.argmax(-1) == teacher_logits.argmax(-1)).sum()
    assert not any(value.requires_grad for term in (ce, kl) for value, _ in term.metrics.values())


def test_nothing_flows_to_the_teacher() -> None:
    output, teacher = make_output(0), make_output(1)
    build("kl")(output, Signal({HeadHidden: teacher}), make_batch()).sum.backward()
    assert teacher.hidden_BTD.grad is None and teacher.head.weight_VD.grad is None
    assert output.hidden_BTD.grad is not None
