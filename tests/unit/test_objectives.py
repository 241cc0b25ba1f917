"""Objectives: counts from the masks, sums from the fused operators, metrics that are sums too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from limbeck.config.parts.objectives import OBJECTIVES, AttentionAlignmentOptions, CrossEntropyOptions, Ramp, TopKKLOptions
from limbeck.errors import TeacherError
from limbeck.needs import HeadHidden, TopK
from limbeck.ops.topk import linear_topk
from limbeck.types import IGNORE, Batch, Head, Objective, Output, Signal, TopKSignal

B, T, D, V = 4, 9, 6, 20


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (B, T), generator=generator)
    labels = ids.roll(-1, 1)
    labels[:, -1] = IGNORE
    labels[1, 3] = IGNORE
    labels[3] = IGNORE
    return Batch(ids, labels, torch.arange(T).expand(B, T), torch.zeros(B, T, dtype=torch.int64))


def make_output(seed: int, dtype: torch.dtype = torch.float64) -> Output:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return Output(normal(B, T, D).requires_grad_(), Head(normal(V, D).requires_grad_()))


SETTINGS: dict[str, dict[str, object]] = {
    "ce": {"kind": "ce"},
    "kl": {"kind": "kl", "temperature": 2.0},
    "reverse_kl": {"kind": "reverse_kl", "temperature": 2.0},
    "jsd": {"kind": "jsd", "temperature": 2.0, "beta": 0.3},
    "topk_kl": {"kind": "topk_kl", "temperature": 2.0, "k": 4},
    "topk_kl zero": {"kind": "topk_kl", "temperature": 2.0, "k": 4, "tail": "zero"},
    "topk_kl renorm_both": {"kind": "topk_kl", "temperature": 2.0, "k": 4, "tail": "renorm_both"},
    "topk_kl renorm_teacher": {"kind": "topk_kl", "temperature": 2.0, "k": 4, "tail": "renorm_teacher"},
    "topk_kl reverse": {"kind": "topk_kl", "temperature": 2.0, "k": 4, "direction": "reverse"},
    "topk_kl samples": {"kind": "topk_kl", "temperature": 2.0, "k": 4, "samples": 3},
    "topk_kl samples alone": {"kind": "topk_kl", "temperature": 2.0, "k": 0, "samples": 3},
}


def build(name: str, **more: object) -> Objective:
    settings = {"weight": 0.5, "chunk": 5, **SETTINGS[name], **more}
    return OBJECTIVES.build(OBJECTIVES.options(str(settings["kind"])).model_validate(settings))


def answer(name: str, teacher: Output, batch: Batch) -> Signal:
    """What a teacher gives for what the objective needs; the random numbers belong to a position's token."""
    signal = Signal({HeadHidden: teacher})
    for need in OBJECTIVES.options(str(SETTINGS[name]["kind"])).model_validate(SETTINGS[name]).needs():
        if isinstance(need, TopK):
            rows = batch.signal_mask_BT.flatten().nonzero().squeeze(1)
            position = (batch.position_ids_BT + 100 * batch.input_ids_BT).flatten()[rows]
            uniforms = (position[:, None] * torch.tensor([0.1234, 0.5678, 0.777])).double() % 1 if need.samples else None
            found = linear_topk(
                teacher.hidden_BTD.detach().flatten(0, 1), teacher.head, rows, k=need.k, temperatures=need.temperatures, uniforms_nS=uniforms
            )  # fmt: skip
            signal[TopK] = TopKSignal(rows, found.ids_nK, found.logits_nK, found.log_z_nZ, need.temperatures, found.samples_nS)
    return signal


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_count_is_that_of_the_labels_that_count(kind: str) -> None:
    batch, objective = make_batch(), build(kind)
    assert objective.name == kind.split()[0] and objective.weight == 0.5
    assert int(objective.count(batch)) == 3 * (T - 1) - 1
    term = objective(make_output(0), answer(kind, make_output(1), batch), batch)
    for _, count in term.metrics.values():
        assert count == objective.count(batch)


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_position_without_an_answer_counts_for_cross_entropy_alone(kind: str) -> None:
    batch, objective = make_batch(), build(kind)
    answered = torch.ones(B, T, dtype=torch.bool)
    answered[0, :4] = False
    partly = replace(batch, answered_BT=answered)
    assert objective.count(batch) - objective.count(partly) == (0 if kind == "ce" else 4)
    output = make_output(0)
    term = objective(output, answer(kind, make_output(1), partly), partly)
    (slope,) = torch.autograd.grad(term.sum, [output.hidden_BTD])
    assert bool(slope[0, :4].any()) == (kind == "ce") and slope[0, 4:8].any()


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_micro_batches_sum_to_the_batch(kind: str, dtype: torch.dtype) -> None:
    """One micro-batch of ragged rows or as many as there are rows (one of them counts nothing)."""
    batch, objective = make_batch(), build(kind)
    output, teacher = make_output(0, dtype), make_output(1, dtype)
    leaves = [output.hidden_BTD, output.head.weight_VD]
    whole = objective(output, answer(kind, teacher, batch), batch)
    expected = torch.autograd.grad(whole.sum, leaves)
    terms = []
    for row, part in enumerate(batch.split(1)):
        signal = answer(kind, Output(teacher.hidden_BTD[row : row + 1], teacher.head), part)
        terms.append(objective(Output(output.hidden_BTD[row : row + 1], output.head), signal, part))
    total = torch.stack([term.sum for term in terms]).sum()
    torch.testing.assert_close(total, whole.sum)
    for a, b in zip(torch.autograd.grad(total, leaves), expected, strict=True):
        assert (a - b).norm() <= (1e-12 if dtype == torch.float64 else 1e-6) * b.norm()
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


def test_each_mode_reports_what_it_knows() -> None:
    batch, teacher = make_batch(), make_output(1)
    for kind, names in {
        "topk_kl": {"kl", "mass", "tail_gap", "agreement"},
        "topk_kl zero": {"kl", "mass", "tail_gap", "agreement"},
        "topk_kl renorm_both": {"mass"},
        "topk_kl samples": {"kl", "mass", "tail_gap", "agreement"},
        "topk_kl samples alone": set(),
        "jsd": {"jsd", "agreement"},
        "reverse_kl": {"reverse_kl", "agreement"},
    }.items():
        term = build(kind)(make_output(0), answer(kind, teacher, batch), batch)
        assert set(term.metrics) == names, kind
        # Nothing of it is a rank's own: a rank whose micro-batch is padding has the same names.
        empty = replace(batch, labels_BT=torch.full_like(batch.labels_BT, IGNORE))
        assert set(build(kind)(make_output(0), answer(kind, teacher, empty), empty).metrics) == names, kind


def test_rows_of_other_positions_are_refused() -> None:
    batch, objective = make_batch(), build("topk_kl")
    signal = answer("topk_kl", make_output(1), batch)
    moved = signal[TopK].rows_n + 1
    for rows in (moved, signal[TopK].rows_n[:-1]):
        with pytest.raises(TeacherError, match="signal_mask_BT"):
            objective(make_output(0), Signal({TopK: replace(signal[TopK], rows_n=rows)}), batch)


def test_samples_that_another_objective_asked_for_are_left_alone() -> None:
    batch, output, teacher = make_batch(), make_output(0), make_output(1)
    sampled = answer("topk_kl samples", teacher, batch)
    expected = build("topk_kl")(output, answer("topk_kl", teacher, batch), batch)
    assert torch.equal(build("topk_kl")(output, sampled, batch).sum, expected.sum)
    fewer = build("topk_kl samples", samples=2)(output, sampled, batch)
    assert not torch.equal(fewer.sum, build("topk_kl samples")(output, sampled, batch).sum)
    with pytest.raises(TeacherError, match="3 samples a token, and topk_kl wants 9"):
        build("topk_kl samples", samples=9)(output, sampled, batch)


def test_top_k_asks_for_what_it_uses() -> None:
    assert TopKKLOptions(k=8, temperature=2.0).needs() == (TopK(8, (2.0,)),)
    assert TopKKLOptions(temperature=2.0, allow_approximate_tail=True).needs() == (TopK(64, (2.0,), exact=False),)
    assert TopKKLOptions(k=0, samples=12).needs() == (TopK(0, (1.0,), 12),)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "needs `samples`"),
        ({"direction": "reverse", "tail": "zero"}, "needs `tail: tail`"),
        ({"samples": 3, "tail": "renorm_both"}, "`samples` stand for the tail"),
        ({"samples": 3, "direction": "reverse"}, "`samples` stand for the tail"),
        ({"samples": 3, "allow_approximate_tail": True}, "leave `allow_approximate_tail` false"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TopKKLOptions.model_validate(settings)


def test_a_ramp_moves_the_weight_and_then_stays() -> None:
    options = CrossEntropyOptions.model_validate({"weight": {"ramp": [0.2, 0.1], "steps": 4}})
    assert [round(options.weight_at(step), 4) for step in (0, 1, 2, 4, 5, 1000)] == [0.2, 0.175, 0.15, 0.1, 0.1, 0.1]
    objective = OBJECTIVES.build(options)
    assert objective.weight == 0.2 and objective.schedule.at(4) == pytest.approx(0.1)
    plain = CrossEntropyOptions(weight=0.3)
    assert plain.weight_at(7) == 0.3 and plain.schedule is None and OBJECTIVES.build(plain).schedule is None
    assert isinstance(AttentionAlignmentOptions(weight=Ramp(ramp=(0, 1), steps=2)).schedule, Ramp)
    assert f"{Ramp(ramp=(0, 0.1), steps=500):g}" == "(0 to 0.1 in 500 steps)"
    for wrong in ({"ramp": [0, -1], "steps": 4}, {"ramp": [0, 1]}, {"ramp": [1], "steps": 4}, {"ramp": [0, 1], "steps": 0}, -1.0):
        with pytest.raises(ValidationError):
            CrossEntropyOptions.model_validate({"weight": wrong})
