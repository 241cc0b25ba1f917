"""What is compared: one forward and backward of head and loss each, from the same inputs.

The peers' own code runs where it is installed (``pip install trl==1.16.0 liger-kernel==0.8.5 accelerate --no-deps``).  "DistillKit
style" is written here after what its sparse losses do: the student's logits whole, the divergence over slices of the sequence
under autograd, the tail as one more category.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.ops.divergences import linear_jsd
from limbeck.ops.fused import linear_kl
from limbeck.ops.topk import linear_topk
from limbeck.ops.topk_divergence import linear_topk_divergence
from limbeck.types import Head, TopKSignal


@dataclass(frozen=True)
class Case:
    """A student, the teacher whole and its top k; ``valid_N`` are the tokens that count."""

    hidden_ND: Tensor
    weight_VD: Tensor
    teacher_ND: Tensor
    teacher_VD: Tensor
    valid_N: Tensor
    signal: TopKSignal
    log_probs_NK: Tensor
    """The top k as a collator pads it: a row for every token."""
    ids_NK: Tensor


Loss = Callable[[Case], Tensor]
"""The loss, a sum or a mean over the tokens; its backward is taken with gradients to ``hidden_ND`` and ``weight_VD``."""


def make_case(
    tokens: int, width: int, vocabulary: int, k: int, share: float, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Case:
    """Random weights with logits of deviation 3: confident enough for a top k to hold much of the mass."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    teacher, weight = normal(tokens, width), normal(vocabulary, width) * 3 / width**0.5
    hidden, student = teacher + 0.3 * normal(tokens, width), weight + 0.1 * normal(vocabulary, width) / width**0.5
    valid = torch.zeros(tokens, dtype=torch.bool, device=device)
    valid[torch.randperm(tokens, generator=generator, device=device)[: round(share * tokens)]] = True
    hidden, student, teacher, weight = (x.to(dtype) for x in (hidden, student, teacher, weight))
    found = linear_topk(teacher, Head(weight), torch.arange(tokens, device=device), k=k)
    rows = valid.nonzero().squeeze(1)
    signal = TopKSignal(rows, found.ids_nK[rows], found.logits_nK[rows].float(), found.log_z_nZ[rows].float(), (1.0,))
    log_probs = (found.logits_nK - found.log_z_nZ).float()
    return Case(hidden.requires_grad_(), student.requires_grad_(), teacher, weight, valid, signal, log_probs, found.ids_nK)


def limbeck_tail(case: Case) -> Tensor:
    return linear_topk_divergence(case.hidden_ND, Head(case.weight_VD), case.signal)[0]


def limbeck_kl(case: Case) -> Tensor:
    return linear_kl(case.hidden_ND, Head(case.weight_VD), case.teacher_ND, Head(case.teacher_VD), case.valid_N)[0]


def limbeck_jsd(case: Case) -> Tensor:
    return linear_jsd(case.hidden_ND, Head(case.weight_VD), case.teacher_ND, Head(case.teacher_VD), case.valid_N)[0]


def _tail_kl(log_p_NK: Tensor, log_t_NK: Tensor) -> Tensor:
    """KL over the kept ids and the rest, ``[N]``."""

    def log_rest(x: Tensor) -> Tensor:
        return torch.log1p(-x.exp().sum(-1).clamp_max(1 - 1e-6))

    rest_t, rest_p = log_rest(log_t_NK), log_rest(log_p_NK)
    return (log_t_NK.exp() * (log_t_NK - log_p_NK)).sum(-1) + rest_t.exp() * (rest_t - rest_p)


def dense_topk(case: Case) -> Tensor:
    """Log-softmax over everything, then the kept ids."""
    log_p_NV = (case.hidden_ND @ case.weight_VD.T).float().log_softmax(-1)
    return (_tail_kl(log_p_NV.gather(1, case.ids_NK), case.log_probs_NK) * case.valid_N).sum()


def distillkit_style(case: Case, slice_length: int = 128) -> Tensor:
    logits_NV = case.hidden_ND @ case.weight_VD.T
    total = logits_NV.new_zeros((), dtype=torch.float32)
    for start in range(0, len(logits_NV), slice_length):
        part = slice(start, start + slice_length)
        logits = logits_NV[part].float()
        log_p_NK = logits.gather(1, case.ids_NK[part]) - logits.logsumexp(-1, keepdim=True)
        total = total + (_tail_kl(log_p_NK, case.log_probs_NK[part]) * case.valid_N[part]).sum()
    return total


def _trl(case: Case, beta: float) -> Tensor:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    with torch.no_grad():
        teacher_NV = case.teacher_ND @ case.teacher_VD.T
    student_NV = case.hidden_ND @ case.weight_VD.T
    labels = torch.where(case.valid_N, 0, -100)
    return GKDTrainer.generalized_jsd_loss(student_NV[None], teacher_NV[None], labels[None], beta=beta, reduction="sum")


def trl_gkd_kl(case: Case) -> Tensor:
    return _trl(case, 0.0)


def trl_gkd_jsd(case: Case) -> Tensor:
    return _trl(case, 0.5)


def liger_jsd(case: Case) -> Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    # Its default chunk and compilation where they are meant to run; on a CPU the chunk that we take, and no compiler.
    gpu = case.hidden_ND.is_cuda
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, beta=0.5, compiled=gpu, chunk_size=1024 if gpu else 128)
    labels = torch.where(case.valid_N, 0, -100)
    return loss(case.hidden_ND, case.weight_VD, case.teacher_ND, case.teacher_VD, labels)


LOSSES: dict[str, Loss] = {
    "limbeck top-k tail": limbeck_tail,
    "dense top-k tail": dense_topk,
    "DistillKit-style top-k tail": distillkit_style,
    "limbeck kl": limbeck_kl,
    "TRL GKD forward KL": trl_gkd_kl,
    "limbeck jsd": limbeck_jsd,
    "TRL GKD JSD": trl_gkd_jsd,
    "Liger chunked JSD": liger_jsd,
}
SAME = (
    ("limbeck top-k tail", "dense top-k tail", "DistillKit-style top-k tail"),
    ("limbeck kl", "TRL GKD forward KL"),
    ("limbeck jsd", "TRL GKD JSD"),
)
"""Losses that must give the same gradient (Liger's is a mean, with conventions of its own)."""
