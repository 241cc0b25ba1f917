"""Fused linear + cross-entropy and linear + KL against dense autograd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from fused_cases import D, N, V, Work, assert_relative, dense_kl, dense_logits, gradients, make_case, requiring_grad
from limbeck.errors import DataError, ModelError
from limbeck.ops.fused import linear_cross_entropy, linear_kl
from limbeck.types import IGNORE, Head
from ranks import on_two_ranks


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", ["plain", "all", "holes"])
def test_cross_entropy_equals_dense_autograd(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    hidden, head, labels, valid = make_case(dtype, kind)
    requiring_grad(hidden, head)
    dense = dense_logits(hidden, head)[valid]
    expected = F.cross_entropy(dense, labels[valid], reduction="sum")
    found, metrics = linear_cross_entropy(hidden, head, labels, chunk=8)
    assert_relative([found, *gradients(3 * found, hidden, head)], [expected, *gradients(3 * expected, hidden, head)], tolerance)
    assert metrics.count == valid.sum()
    assert metrics.agreement == (dense.argmax(-1) == labels[valid]).sum()
    assert metrics.kl == found.detach()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("kind", ["plain", "all", "holes"])
def test_kl_equals_dense_autograd(kind: str, temperature: float, dtype: torch.dtype, tolerance: float) -> None:
    hidden, head, _, valid = make_case(dtype, kind)
    teacher, teacher_head, _, _ = make_case(dtype, kind, seed=1)
    requiring_grad(hidden, head)
    dense, dense_teacher = dense_logits(hidden, head)[valid], dense_logits(teacher, teacher_head)[valid]
    expected = dense_kl(dense, dense_teacher, temperature)
    found, metrics = linear_kl(hidden, head, teacher, teacher_head, valid, temperature=temperature, chunk=8)
    assert_relative([found, *gradients(3 * found, hidden, head)], [expected, *gradients(3 * expected, hidden, head)], tolerance)
    assert metrics.count == valid.sum()
    assert metrics.agreement == (dense.argmax(-1) == dense_teacher.argmax(-1)).sum()
    torch.testing.assert_close(metrics.kl * temperature**2, found.detach())


def test_gradcheck() -> None:
    hidden, head, labels, valid = make_case(torch.float64, "all", tokens=6)
    teacher, teacher_head, _, _ = make_case(torch.float64, "all", seed=1, tokens=6)
    requiring_grad(hidden, head)

    def with_head(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Head]:
        return h, Head(w, b, head.softcap, head.scale, head.vocab_mask_V)

    inputs = (hidden, head.weight_VD, head.bias_V)
    assert torch.autograd.gradcheck(lambda *x: linear_cross_entropy(*with_head(*x), labels, chunk=4)[0], inputs)
    assert torch.autograd.gradcheck(
        lambda *x: linear_kl(*with_head(*x), teacher, teacher_head, valid, temperature=2.0, chunk=4)[0], inputs
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_chunks_padding_and_order_do_not_change_the_gradient(dtype: torch.dtype, tolerance: float) -> None:
    hidden, head, labels, valid = make_case(dtype, "all")
    teacher, teacher_head, _, _ = make_case(dtype, "all", seed=1)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    requiring_grad(hidden, head)

    def run(chunk: int, arrange) -> list[list[Tensor]]:
        """Both losses' values and gradients when the tokens are arranged in another way."""
        ce, _ = linear_cross_entropy(arrange(hidden, 9.0), head, arrange(labels, IGNORE), chunk=chunk)
        kl, _ = linear_kl(
            arrange(hidden, 9.0), head, arrange(teacher, -9.0), teacher_head, arrange(valid, False), temperature=2.0, chunk=chunk
        )
        return [[loss, *gradients(loss, hidden, head)] for loss in (ce, kl)]

    def padded(x: Tensor, fill: float) -> Tensor:
        return torch.cat([torch.full_like(x[:5], fill), x, torch.full_like(x[:11], fill)])

    expected = run(1024, lambda x, _: x)
    for chunk, arrange in ((1, lambda x, _: x), (7, lambda x, _: x), (1024, padded), (7, lambda x, _: x[order])):
        for a, b in zip(run(chunk, arrange), expected, strict=True):
            assert_relative(a, b, tolerance)


@pytest.mark.parametrize("wider", ["student", "teacher"])
def test_padded_vocabularies_are_compared_where_both_exist(wider: str) -> None:
    hidden, head, _, valid = make_case(torch.float64)
    teacher, teacher_head, _, _ = make_case(torch.float64, seed=1)
    requiring_grad(hidden, head)
    expected = dense_kl(dense_logits(hidden, head)[valid], dense_logits(teacher, teacher_head)[valid], 1.0)
    expected_gradients = gradients(expected, hidden, head)

    def widen(head: Head, masked: bool) -> Head:
        mask = torch.arange(V + 14) < V
        weight = torch.cat([head.weight_VD, torch.full((14, D), 5.0, dtype=torch.float64)])
        return Head(weight, vocab_mask_V=mask if masked else None)

    def run(masked: bool) -> Tensor:
        heads = (widen(head, masked), teacher_head) if wider == "student" else (head, widen(teacher_head, masked))
        return linear_kl(hidden, heads[0], teacher, heads[1], valid)[0]

    found = run(masked=True)
    assert_relative([found, *gradients(found, hidden, head)], [expected, *expected_gradients], 1e-12)
    with pytest.raises(ModelError, match="14 ids from 50 on exist on one side only"):
        run(masked=False)


def test_a_label_outside_the_vocabulary_is_refused() -> None:
    hidden, head, labels, _ = make_case(torch.float32, "all")
    for wrong in (V, V - 1, -1):
        labels[3] = wrong
        with pytest.raises(DataError, match=str(wrong)):
            linear_cross_entropy(hidden, head, labels)


def test_no_valid_token_gives_zero_and_zero_gradients() -> None:
    hidden, head, labels, valid = make_case(torch.float32, "all")
    requiring_grad(hidden, head)
    for loss, metrics in (
        linear_cross_entropy(hidden, head, torch.full_like(labels, IGNORE)),
        linear_kl(hidden, head, hidden, head, torch.zeros_like(valid)),
    ):
        assert loss == 0 and metrics.count == 0
        assert not any(x.any() for x in gradients(loss, hidden, head))


def test_a_student_equal_to_its_teacher_has_no_loss() -> None:
    hidden, head, _, valid = make_case(torch.float64, "all")
    requiring_grad(hidden, head)
    loss, metrics = linear_kl(hidden, head, hidden, head, valid)
    assert loss.abs() < 1e-12 and metrics.agreement == metrics.count
    assert all(x.abs().max() < 1e-12 for x in gradients(loss, hidden, head))


@pytest.mark.parametrize(("trains", "per_chunk"), [("everything", 3), ("hidden", 2), ("nothing", 1)])
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_logits_of_all_tokens_never_exist_and_what_is_frozen_costs_no_product(loss: str, trains: str, per_chunk: int) -> None:
    tokens, width, vocabulary, chunk = 512, 4, 300, 16
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, requires_grad=trains != "nothing")
    head = Head(torch.randn(vocabulary, width, requires_grad=trains == "everything"))
    with Work() as work:
        if loss == "ce":
            value, _ = linear_cross_entropy(hidden, head, torch.randint(0, vocabulary, (tokens,)), chunk=chunk)
        else:
            value, _ = linear_kl(hidden, head, hidden.detach(), head, torch.ones(tokens, dtype=torch.bool), chunk=chunk)
        if value.requires_grad:
            value.backward()
    assert work.largest <= chunk * vocabulary
    assert work.products == tokens // chunk * (per_chunk + (loss == "kl"))


def test_without_grad_mode_no_gradient_is_formed() -> None:
    hidden, head, labels, _ = make_case(torch.float32)
    requiring_grad(hidden, head)
    with torch.no_grad(), Work() as work:
        loss, _ = linear_cross_entropy(hidden, head, labels)
    assert not loss.requires_grad and work.products == 1


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_bfloat16_autocast_keeps_softmax_in_fp32(loss: str) -> None:
    hidden, head, labels, valid = make_case(torch.float32, "all")
    teacher, teacher_head, _, _ = make_case(torch.float32, "all", seed=1)
    requiring_grad(hidden, head)

    def run() -> Tensor:
        if loss == "ce":
            return linear_cross_entropy(hidden, head, labels, chunk=8)[0]
        return linear_kl(hidden, head, teacher, teacher_head, valid, temperature=2.0, chunk=8)[0]

    expected = run()
    expected_gradients = gradients(expected, hidden, head)
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    found_gradients = gradients(found, hidden, head)
    assert found.dtype == torch.float32 and all(x.dtype == torch.float32 for x in found_gradients)
    assert not torch.equal(found, expected), "autocast was not honoured"
    assert_relative([found, *found_gradients], [expected, *expected_gradients], 2e-2)


def _sharded_head(rank: int, mesh: DeviceMesh) -> None:
    hidden, head, labels, valid = make_case(torch.float64, "all")
    teacher, teacher_head, _, _ = make_case(torch.float64, "all", seed=1)
    requiring_grad(hidden, head)
    half = slice(0, N // 2) if rank == 0 else slice(N // 2, N)

    def losses(head: Head, part: slice) -> Tensor:
        kl, _ = linear_kl(hidden[part], head, teacher[part], teacher_head, valid[part])
        return linear_cross_entropy(hidden[part], head, labels[part])[0] + kl

    expected = gradients(losses(head, slice(0, N)), hidden, head)
    weight = distribute_tensor(head.weight_VD.detach(), mesh, [Shard(0)]).requires_grad_()
    bias = distribute_tensor(head.bias_V.detach(), mesh, [Shard(0)]).requires_grad_()
    sharded = Head(weight, bias, head.softcap, head.scale, head.vocab_mask_V)
    found = gradients(losses(sharded, half), hidden, sharded)
    assert_relative([x.full_tensor() for x in found[1:]], expected[1:], 1e-12)
    assert_relative([found[0][half]], [expected[0][half]], 1e-12)


def test_a_sharded_head_on_two_ranks_has_the_gradient_of_one(tmp_path: Path) -> None:
    on_two_ranks(_sharded_head, tmp_path)
