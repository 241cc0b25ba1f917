"""Reverse KL, JSD and the truncated divergences against naive autograd in fp64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from fused_cases import D, N, V, Work, assert_relative, dense_logits, gradients, make_case, requiring_grad
from limbeck.errors import DataError
from limbeck.ops.divergences import linear_jsd, linear_reverse_kl
from limbeck.ops.fused import linear_kl
from limbeck.ops.tempering import approximate_log_z
from limbeck.ops.topk import _invert, linear_topk
from limbeck.ops.topk_divergence import linear_topk_divergence
from limbeck.types import Head, TopKSignal
from ranks import on_two_ranks

K = 6
MODES = [("tail", "forward"), ("tail", "reverse"), ("zero", "forward"), ("renorm_teacher", "forward"), ("renorm_both", "forward")]
DTYPES = [(torch.float32, 1e-6, 1e-5), (torch.float64, 1e-12, 1e-12)]
"""With the tolerances of the value and of the gradient."""


def doubled(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """The same leaves in fp64."""
    bias = None if head.bias_V is None else head.bias_V.detach().double().requires_grad_()
    weight = head.weight_VD.detach().double().requires_grad_()
    return hidden.detach().double().requires_grad_(), Head(weight, bias, head.softcap, head.scale, head.vocab_mask_V)


def log_probs(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    """Tempered log-probabilities of the ids that exist."""
    logits = dense_logits(hidden, head) / temperature
    mask = torch.ones(V, dtype=torch.bool) if head.vocab_mask_V is None else head.vocab_mask_V
    return logits[:, mask].log_softmax(-1)


def make_signal(
    hidden: Tensor, head: Head, rows: Tensor, k: int, temperatures: tuple[float, ...], uniforms: Tensor | None = None
) -> TopKSignal:
    found = linear_topk(hidden, head, rows, k=k, temperatures=temperatures, uniforms_nS=uniforms)
    return TopKSignal(rows, found.ids_nK, found.logits_nK, found.log_z_nZ, temperatures, found.samples_nS)


def naive(log_p: Tensor, log_t: Tensor, kept: Tensor, tail: str, direction: str) -> Tensor:
    """Per row, over log-probabilities in which the ``kept`` ids are True; the categories are made one by one."""
    rows = []
    for lp, lt, keep in zip(log_p, log_t, kept, strict=True):
        p, t = lp.exp(), lt.exp()
        if tail == "tail":
            rest = [] if keep.all() else [(p[~keep].sum(), t[~keep].sum())]
            p = torch.cat([p[keep], *[a[None] for a, _ in rest]])
            t = torch.cat([t[keep], *[b[None] for _, b in rest]])
        else:
            p, t = p[keep], t[keep]
            t = t / t.sum() if tail.startswith("renorm") else t
            p = p / p.sum() if tail == "renorm_both" else p
        rows.append((p * (p.log() - t.log())).sum() if direction == "reverse" else (t * (t.log() - p.log())).sum())
    return torch.stack(rows)


def kept_of(log_t: Tensor, k: int) -> Tensor:
    return torch.zeros_like(log_t, dtype=torch.bool).scatter_(1, log_t.topk(k).indices, True)


@pytest.mark.parametrize(("dtype", "close", "tolerance"), DTYPES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", ["plain", "all", "holes"])
@pytest.mark.parametrize("divergence", ["reverse", "jsd 0.5", "jsd 0.1"])
def test_dense_divergences_equal_naive_autograd(
    divergence: str, kind: str, temperature: float, dtype: torch.dtype, close: float, tolerance: float
) -> None:
    hidden, head, _, valid = make_case(dtype, kind)
    teacher, teacher_head, _, _ = make_case(dtype, kind, seed=1)
    requiring_grad(hidden, head)
    wide, wide_head = doubled(hidden, head)
    log_p = log_probs(wide, wide_head, temperature)[valid]
    log_t = log_probs(*doubled(teacher, teacher_head), temperature)[valid].detach()
    common = {"temperature": temperature, "chunk": 8}
    if divergence == "reverse":
        found, metrics = linear_reverse_kl(hidden, head, teacher, teacher_head, valid, **common)
        expected = (log_p.exp() * (log_p - log_t)).sum()
    else:
        beta = float(divergence.split()[1])
        found, metrics = linear_jsd(hidden, head, teacher, teacher_head, valid, beta=beta, **common)
        log_m = ((1 - beta) * log_p.exp() + beta * log_t.exp()).log()
        expected = (beta * log_t.exp() * (log_t - log_m) + (1 - beta) * log_p.exp() * (log_p - log_m)).sum()
    expected = temperature**2 * expected
    assert_relative([found], [expected], close)
    assert_relative(gradients(3 * found, hidden, head), gradients(3 * expected, wide, wide_head), tolerance)
    assert metrics.count == valid.sum()
    assert metrics.agreement == (log_p.argmax(-1) == log_t.argmax(-1)).sum()
    torch.testing.assert_close(metrics.kl * temperature**2, found.detach())


@pytest.mark.parametrize(("dtype", "close", "tolerance"), DTYPES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", ["plain", "all", "holes"])
@pytest.mark.parametrize(("tail", "direction"), MODES)
def test_truncated_divergences_equal_naive_autograd(
    tail: str, direction: str, kind: str, temperature: float, dtype: torch.dtype, close: float, tolerance: float
) -> None:
    """So is the tempering exact: the naive computation tempers the whole vocabulary before it cuts."""
    hidden, head, _, valid = make_case(dtype, kind)
    teacher, teacher_head, _, _ = make_case(dtype, kind, seed=1)
    # A teacher whose rest is not nothing at T = 0.5: a reverse KL divides by it.
    teacher = teacher / 2
    requiring_grad(hidden, head)
    wide, wide_head = doubled(hidden, head)
    log_p = log_probs(wide, wide_head, temperature)[valid]
    log_t = log_probs(*doubled(teacher, teacher_head), temperature)[valid].detach()
    kept = kept_of(log_t, K)
    rows = valid.nonzero().squeeze(1)
    # The signal's own rounding is not the operator's: it is made in fp64 and, for the fp32 operator, with the fp32 mass exact.
    signal = make_signal(*doubled(teacher, teacher_head), rows, K, (1.0, temperature))
    settings = {"tail": tail, "direction": direction, "temperature": temperature}
    found, metrics = linear_topk_divergence(hidden, head, signal, chunk=8, **settings)
    expected = temperature**2 * naive(log_p, log_t, kept, tail, direction).sum()
    assert_relative([found], [expected], close)
    assert_relative(gradients(3 * found, hidden, head), gradients(3 * expected, wide, wide_head), tolerance)
    assert metrics.count == valid.sum()
    torch.testing.assert_close(metrics.loss * temperature**2, found.detach())
    torch.testing.assert_close(metrics.mass.double(), (log_t.exp() * kept).sum(), rtol=1e-6, atol=0)
    if tail != "renorm_both":
        assert metrics.agreement == (log_p.argmax(-1) == log_t.argmax(-1)).sum()
        bucket = naive(log_p, log_t, kept, "tail", "forward").sum().detach()
        torch.testing.assert_close(metrics.kl.double(), bucket, rtol=1e-6, atol=0)
        gap = ((log_p.exp() * ~kept).sum(1) - (log_t.exp() * ~kept).sum(1)).abs().sum()
        torch.testing.assert_close(metrics.tail_gap.double(), gap.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tail", "direction"), [*MODES, ("jsd", ""), ("reverse_kl", ""), ("samples", "")])
def test_gradcheck(tail: str, direction: str) -> None:
    hidden, head, _, valid = make_case(torch.float64, "all", tokens=6)
    teacher, teacher_head, _, _ = make_case(torch.float64, "all", seed=1, tokens=6)
    requiring_grad(hidden, head)
    uniforms = torch.rand(int(valid.sum()), 3, dtype=torch.float64) if tail == "samples" else None
    signal = make_signal(teacher, teacher_head, valid.nonzero().squeeze(1), K, (2.0,), uniforms)

    def run(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        mine = Head(w, b, head.softcap, head.scale, head.vocab_mask_V)
        if tail == "jsd":
            return linear_jsd(h, mine, teacher, teacher_head, valid, beta=0.3, temperature=2.0, chunk=4)[0]
        if tail == "reverse_kl":
            return linear_reverse_kl(h, mine, teacher, teacher_head, valid, temperature=2.0, chunk=4)[0]
        settings = {} if tail == "samples" else {"tail": tail, "direction": direction}
        return linear_topk_divergence(h, mine, signal, temperature=2.0, chunk=4, **settings)[0]

    assert torch.autograd.gradcheck(run, (hidden, head.weight_VD, head.bias_V))


@pytest.mark.parametrize(("dtype", "close", "tolerance"), DTYPES)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("kind", ["plain", "holes"])
def test_keeping_everything_is_the_dense_divergence(
    kind: str, direction: str, dtype: torch.dtype, close: float, tolerance: float
) -> None:
    hidden, head, _, valid = make_case(dtype, kind)
    teacher, teacher_head, _, _ = make_case(dtype, kind, seed=1)
    requiring_grad(hidden, head)
    dense = linear_kl if direction == "forward" else linear_reverse_kl
    expected, _ = dense(hidden, head, teacher, teacher_head, valid, temperature=2.0)
    signal = make_signal(teacher, teacher_head, valid.nonzero().squeeze(1), V, (2.0,))
    found, metrics = linear_topk_divergence(hidden, head, signal, direction=direction, temperature=2.0)
    assert_relative([found], [expected], close)
    assert_relative(gradients(found, hidden, head), gradients(expected, hidden, head), tolerance)
    assert metrics.tail_gap < 1e-5


def test_the_tails_kl_is_never_above_the_full_kl() -> None:
    teacher, teacher_head, _, _ = make_case(torch.float64, seed=1)
    for noise in (0.1, 1.0, 3.0):
        hidden = teacher + noise * torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        for row in range(N):
            rows = torch.tensor([row])
            mask = torch.arange(N) == row
            full, _ = linear_kl(hidden, teacher_head, teacher, teacher_head, mask)
            previous = -1e-12
            for k in (1, 2, 8, 32):
                found, _ = linear_topk_divergence(hidden, teacher_head, make_signal(teacher, teacher_head, rows, k, (1.0,)))
                assert previous <= found <= full + 1e-12
                # A finer partition knows more.
                previous = found - 1e-12


def arrangements() -> list[tuple[int, Callable[[Tensor, float], Tensor]]]:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))

    def padded(x: Tensor, fill: float) -> Tensor:
        return torch.cat([torch.full_like(x[:5], fill), x, torch.full_like(x[:11], fill)])

    return [(1, lambda x, _: x), (7, lambda x, _: x), (1024, padded), (7, lambda x, _: x[order])]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_chunks_padding_and_order_do_not_change_the_gradient(dtype: torch.dtype, tolerance: float) -> None:
    hidden, head, _, valid = make_case(dtype, "all")
    teacher, teacher_head, _, _ = make_case(dtype, "all", seed=1)
    requiring_grad(hidden, head)
    uniforms = torch.rand(N, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def run(chunk: int, arrange: Callable[[Tensor, float], Tensor]) -> list[list[Tensor]]:
        t, mask = arrange(teacher, -9.0), arrange(valid, False)
        both = (head, t, teacher_head, mask)
        rows = mask.nonzero().squeeze(1)
        signal = make_signal(t, teacher_head, rows, K, (2.0,))
        sampled = make_signal(t, teacher_head, rows, K, (2.0,), arrange(uniforms, 0.5)[rows])
        common = {"temperature": 2.0, "chunk": chunk}
        losses = [lambda h: linear_reverse_kl(h, *both, **common)[0], lambda h: linear_jsd(h, *both, **common)[0]]
        for tail, direction in MODES:
            settings = {"tail": tail, "direction": direction, **common}
            losses.append(lambda h, settings=settings: linear_topk_divergence(h, head, signal, **settings)[0])
        losses.append(lambda h: linear_topk_divergence(h, head, sampled, **common)[0])
        made = [loss(arrange(hidden, 9.0)) for loss in losses]
        return [[loss, *gradients(loss, hidden, head)] for loss in made]

    expected = run(1024, lambda x, _: x)
    for chunk, arrange in arrangements():
        for a, b in zip(run(chunk, arrange), expected, strict=True):
            assert_relative(a, b, tolerance)


@pytest.mark.parametrize("k", [0, 5])
def test_samples_have_the_full_gradient_on_average(k: int) -> None:
    draws, samples = 20_000, 6
    generator = torch.Generator().manual_seed(0)
    hidden, head, _, _ = make_case(torch.float64, tokens=1)
    teacher, teacher_head, _, _ = make_case(torch.float64, seed=1, tokens=1)
    many = hidden.repeat(draws, 1).requires_grad_()
    uniforms = torch.rand(draws, samples, generator=generator, dtype=torch.float64)
    signal = make_signal(teacher.repeat(draws, 1), teacher_head, torch.arange(draws), k, (2.0,), uniforms)
    loss, metrics = linear_topk_divergence(many, head, signal, temperature=2.0)
    (found,) = torch.autograd.grad(loss, many)
    one = hidden.clone().requires_grad_()
    full, _ = linear_kl(one, head, teacher, teacher_head, torch.ones(1, dtype=torch.bool), temperature=2.0)
    (expected,) = torch.autograd.grad(full, one)
    # All directions at once (Hotelling): chi-squared with D degrees of freedom if the mean is the full gradient.
    error = found.mean(0) - expected[0]
    distance = draws * error @ torch.linalg.solve(found.T.cov(), error)
    assert distance < D + 3 * (2 * D) ** 0.5
    assert metrics.count == draws and (metrics.kl is None) == (k == 0)
    # Enough draws to notice a weight that is a twentieth off.
    error = 0.05 * expected[0]
    assert draws * error @ torch.linalg.solve(found.T.cov(), error) > 2 * (D + 3 * (2 * D) ** 0.5)


def test_draws_follow_the_tail_and_masked_ids_are_neither_kept_nor_drawn() -> None:
    hidden, head, _, _ = make_case(torch.float64, "holes", seed=1, tokens=1)
    draws = 40_000
    uniforms = torch.rand(1, draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    uniforms[0, :2] = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    found = linear_topk(hidden, head, torch.tensor([0]), k=4, temperatures=(2.0, 1.0), uniforms_nS=uniforms)
    assert found.samples_nS is not None
    weights = (dense_logits(hidden, head)[0] / 2).softmax(-1)
    weights[found.ids_nK[0]] = 0
    expected = weights / weights.sum()
    counts = torch.bincount(found.samples_nS[0], minlength=V)
    assert not counts[expected == 0].any() and not (~head.vocab_mask_V)[found.ids_nK[0]].any()
    there = expected > 0
    chi = ((counts - draws * expected)[there].square() / (draws * expected[there])).sum()
    degrees = int(there.sum()) - 1
    assert abs(float(chi) - degrees) < 4 * (2 * degrees) ** 0.5
    torch.testing.assert_close(found.log_z_nZ[0, 1], dense_logits(hidden, head)[0].logsumexp(-1))


def test_the_ends_of_the_unit_interval_draw_ids_that_have_weight() -> None:
    weights = torch.tensor([[0.0, 0.2, 0.0, 0.8, 0.0, 0.0]])
    assert _invert(weights, torch.tensor([[0.0, 0.1, 0.5, 1.0]])).tolist() == [[1, 1, 3, 3]]


@pytest.mark.parametrize(("tail", "direction"), MODES)
def test_ids_with_logit_minus_infinity_are_not_there(tail: str, direction: str) -> None:
    hidden, head, _, valid = make_case(torch.float32, "all")
    teacher, teacher_head, _, _ = make_case(torch.float32, "all", seed=1)
    requiring_grad(hidden, head)
    rows = valid.nonzero().squeeze(1)
    short = make_signal(teacher, teacher_head, rows, K, (1.0,))
    settings = {"tail": tail, "direction": direction}
    expected, _ = linear_topk_divergence(hidden, head, short, **settings)
    fill = torch.full((len(rows), 3), -torch.inf)
    padded = TopKSignal(
        rows, torch.cat([short.ids_nK, fill.new_zeros(fill.shape).long()], 1), torch.cat([short.logits_nK, fill], 1), short.log_z_nZ, (1.0,)
    )  # fmt: skip
    found, _ = linear_topk_divergence(hidden, head, padded, **settings)
    assert_relative([found, *gradients(found, hidden, head)], [expected, *gradients(expected, hidden, head)], 1e-6)
    nothing = TopKSignal(rows, torch.zeros_like(short.ids_nK), torch.full_like(short.logits_nK, -torch.inf), short.log_z_nZ, (1.0,))
    found, metrics = linear_topk_divergence(hidden, head, nothing, **settings)
    assert metrics.mass == 0 and found.abs() < 1e-4
    assert all(x.abs().max() < 1e-5 for x in gradients(found, hidden, head))


@pytest.mark.parametrize(("tail", "direction"), MODES)
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_sharp_distributions_stay_finite_and_right(tail: str, direction: str, temperature: float) -> None:
    """Both sides put all but 1e-30 on a few ids, not always the same ones; fp32 has no digits left in 1 - sum."""
    hidden, head, _, valid = make_case(torch.float32)
    teacher, teacher_head, _, _ = make_case(torch.float32, seed=1)
    rows = valid.nonzero().squeeze(1)
    hidden, teacher = 6 * hidden, 6 * teacher
    teacher[rows[::2]] = hidden[rows[::2]]
    teacher_head.weight_VD.copy_(head.weight_VD)
    requiring_grad(hidden, head)
    signal = make_signal(teacher, teacher_head, rows, K, (temperature,))
    found, metrics = linear_topk_divergence(hidden, head, signal, tail=tail, direction=direction, temperature=temperature)
    slopes = gradients(found, hidden, head)
    assert all(x.isfinite().all() for x in [found, *slopes, metrics.loss, metrics.mass])
    if tail == "tail" and direction == "forward":
        wide, wide_head = doubled(hidden, head)
        exact = make_signal(*doubled(teacher, teacher_head), rows, K, (temperature,))
        expected, _ = linear_topk_divergence(wide, wide_head, exact, temperature=temperature)
        assert_relative(slopes, gradients(expected, wide, wide_head), 1e-4)


def test_the_first_k_of_a_longer_signal_are_taken() -> None:
    hidden, head, _, valid = make_case(torch.float64)
    teacher, teacher_head, _, _ = make_case(torch.float64, seed=1)
    rows = valid.nonzero().squeeze(1)
    expected, _ = linear_topk_divergence(hidden, head, make_signal(teacher, teacher_head, rows, K, (1.0,)))
    found, _ = linear_topk_divergence(hidden, head, make_signal(teacher, teacher_head, rows, 3 * K, (2.0, 1.0)), k=K)
    torch.testing.assert_close(found, expected)


def test_ids_that_only_the_teacher_has_lose_their_mass() -> None:
    """As in the dense divergence: the teacher's distribution is that over the ids that both have."""
    hidden, head, _, valid = make_case(torch.float64)
    teacher, teacher_head, _, _ = make_case(torch.float64, seed=1)
    mask = torch.ones(V, dtype=torch.bool)
    mask[[3, 17, V - 1]] = False
    head = Head(head.weight_VD, vocab_mask_V=mask)
    requiring_grad(hidden, head)
    expected, _ = linear_kl(hidden, head, teacher, teacher_head, valid)
    rows = valid.nonzero().squeeze(1)
    found, _ = linear_topk_divergence(hidden, head, make_signal(teacher, teacher_head, rows, V, (1.0,)))
    assert_relative([found, *gradients(found, hidden, head)], [expected, *gradients(expected, hidden, head)], 1e-12)


def test_ids_that_the_student_does_not_have_are_refused() -> None:
    hidden, head, _, valid = make_case(torch.float64)
    rows = valid.nonzero().squeeze(1)
    signal = make_signal(hidden, head, rows, K, (1.0,), torch.rand(len(rows), 2))
    signal.ids_nK[1, 2] = V
    with pytest.raises(DataError, match=rf"\[{V}\] are not among the {V}"):
        linear_topk_divergence(hidden, head, signal)
    signal.ids_nK[1, 2] = 0
    assert signal.samples_nS is not None
    signal.samples_nS[0, 0] = -1
    with pytest.raises(DataError, match=r"\[-1\]"):
        linear_topk_divergence(hidden, head, signal)


def test_a_temperature_without_its_partition_sum_is_refused_or_estimated() -> None:
    hidden, head, _, valid = make_case(torch.float64)
    teacher, teacher_head, _, _ = make_case(torch.float64, seed=1)
    rows = valid.nonzero().squeeze(1)
    signal = make_signal(teacher, teacher_head, rows, K, (1.0,))
    with pytest.raises(DataError, match=r"temperature 2: .* at temperature 1 only.*allow_approximate_tail"):
        linear_topk_divergence(hidden, head, signal, temperature=2.0)
    exact = make_signal(teacher, teacher_head, rows, K, (2.0,))
    expected, _ = linear_topk_divergence(hidden, head, exact, temperature=2.0)
    found, _ = linear_topk_divergence(hidden, head, signal, temperature=2.0, allow_approximate_tail=True)
    assert abs(found - expected) < 0.1 * expected
    whole = make_signal(teacher, teacher_head, rows, V, (1.0,))
    found, _ = linear_topk_divergence(hidden, head, whole, temperature=2.0, allow_approximate_tail=True)
    torch.testing.assert_close(found, linear_kl(hidden, head, teacher, teacher_head, valid, temperature=2.0)[0])


@pytest.mark.parametrize("k", [8, 64])
@pytest.mark.parametrize("temperature", [0.5, 1.5, 4.0])
def test_the_estimated_tail_is_near_that_of_zipfs_law(k: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = 8000
    logits = -1.5 * torch.arange(1, ids + 1).log() + torch.randn(16, ids, generator=generator)
    kept = logits.topk(k).values
    found = approximate_log_z(kept, logits.logsumexp(1), 1.0, temperature, ids)
    mass = (kept / temperature).logsumexp(1)
    wrong = (mass - found).exp() - (mass - (logits / temperature).logsumexp(1)).exp()
    assert wrong.abs().mean() < 0.05
    unchanged = (mass - found).exp() - (kept.logsumexp(1) - logits.logsumexp(1)).exp()
    assert unchanged.abs().mean() > 0.05


@pytest.mark.parametrize(("trains", "per_chunk"), [("everything", 3), ("hidden", 2), ("nothing", 1)])
def test_logits_of_all_tokens_never_exist_and_what_is_frozen_costs_no_product(trains: str, per_chunk: int) -> None:
    tokens, width, vocabulary, chunk = 256, 4, 300, 16
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, requires_grad=trains != "nothing")
    head = Head(torch.randn(vocabulary, width, requires_grad=trains == "everything"))
    signal = make_signal(hidden.detach(), Head(head.weight_VD.detach()), torch.arange(tokens), 5, (1.0,))
    for tail, direction in MODES:
        with Work() as work:
            value, _ = linear_topk_divergence(hidden, head, signal, tail=tail, direction=direction, chunk=chunk)
            if value.requires_grad:
                value.backward()
        # What `renorm_both` gathers, [chunk, K, D], is as small as the head itself; nothing is [chunk, V].
        assert work.largest <= (max(tokens * 5, vocabulary * width) if tail == "renorm_both" else chunk * vocabulary)
        if tail != "renorm_both":
            assert work.products == tokens // chunk * per_chunk


def test_no_answer_at_all_gives_zero_and_the_usual_metrics() -> None:
    hidden, head, _, _ = make_case(torch.float32, "all")
    requiring_grad(hidden, head)
    empty = TopKSignal(torch.zeros(0).long(), torch.zeros(0, 0).long(), torch.zeros(0, 0), torch.zeros(0, 1), (1.0,))
    for tail, direction in MODES:
        loss, metrics = linear_topk_divergence(hidden, head, empty, k=K, tail=tail, direction=direction)
        assert loss == 0 and metrics.count == 0 and metrics.mass == 0 and metrics.kl == 0
        assert not any(x.any() for x in gradients(loss, hidden, head))


@pytest.mark.parametrize(("tail", "direction"), MODES)
def test_bfloat16_autocast_keeps_the_softmax_in_fp32(tail: str, direction: str) -> None:
    hidden, head, _, valid = make_case(torch.float32, "all")
    teacher, teacher_head, _, _ = make_case(torch.float32, "all", seed=1)
    requiring_grad(hidden, head)
    signal = make_signal(teacher / 2, teacher_head, valid.nonzero().squeeze(1), K, (1.0,))

    def run() -> Tensor:
        return linear_topk_divergence(hidden, head, signal, tail=tail, direction=direction, chunk=8)[0]

    expected = run()
    expected_gradients = gradients(expected, hidden, head)
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    found_gradients = gradients(found, hidden, head)
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    assert_relative([found, *found_gradients], [expected, *expected_gradients], 2e-2)


def _head_alone(rank: int, mesh: DeviceMesh) -> None:
    hidden, head, _, valid = make_case(torch.float64, "all")
    teacher, teacher_head, _, _ = make_case(torch.float64, "all", seed=1)
    # The head trains alone.
    for x in (head.weight_VD, head.bias_V):
        x.requires_grad_()
    half = slice(0, N // 2) if rank == 0 else slice(N // 2, N)

    def losses(head: Head, part: slice) -> Tensor:
        t, h, mask = teacher[part], hidden[part], valid[part]
        signal = make_signal(t, teacher_head, mask.nonzero().squeeze(1), K, (2.0,))
        sums = [linear_topk_divergence(h, head, signal, tail=a, direction=b, temperature=2.0)[0] for a, b in MODES]
        sums += [linear_reverse_kl(h, head, t, teacher_head, mask)[0], linear_jsd(h, head, t, teacher_head, mask)[0]]
        return torch.stack(sums).sum()

    def of_head(loss: Tensor, head: Head) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [head.weight_VD, head.bias_V]))

    expected = of_head(losses(head, slice(0, N)), head)
    weight = distribute_tensor(head.weight_VD.detach(), mesh, [Shard(0)]).requires_grad_()
    bias = distribute_tensor(head.bias_V.detach(), mesh, [Shard(0)]).requires_grad_()
    sharded = Head(weight, bias, head.softcap, head.scale, head.vocab_mask_V)
    found = of_head(losses(sharded, half), sharded)
    assert_relative([x.full_tensor() for x in found], expected, 1e-12)


def test_a_head_that_trains_alone_on_two_ranks_equals_one_rank(tmp_path: Path) -> None:
    on_two_ranks(_head_alone, tmp_path)
