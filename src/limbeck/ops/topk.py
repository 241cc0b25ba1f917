"""A head's likeliest tokens and partition sums, without ``[tokens, vocabulary]``.

Shape legend: N tokens, n chosen tokens, D width, V vocabulary, K kept ids, Z temperatures, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.ops.projection import chunk_for, common_vocabulary, logits_of, project_with, whole_head
from limbeck.types import Head


@dataclass(frozen=True)
class TopKLogits:
    """``ids_nK`` (int64, likeliest first), their ``logits_nK`` and ``log_z_nZ = logsumexp(logits / T)``; ``samples_nS`` or None."""

    ids_nK: Tensor
    logits_nK: Tensor
    log_z_nZ: Tensor
    samples_nS: Tensor | None = None


@torch.no_grad()
def linear_topk(
    hidden_ND: Tensor,
    head: Head,
    rows_n: Tensor,
    *,
    k: int,
    temperatures: tuple[float, ...] = (1.0,),
    uniforms_nS: Tensor | None = None,
    chunk: int | None = None,
) -> TopKLogits:
    """Top ``k`` of ``hidden_ND[rows_n] @ head`` (fewer if the vocabulary is smaller) and logZ at each temperature, in fp32 or better.

    ``uniforms_nS`` in [0, 1) draw ids by inversion, with repetition, from what the top ``k`` leave at ``temperatures[0]``.
    Ids that the head masks are never kept and have no mass.  ``chunk`` is the number of tokens whose logits exist at one time
    (None: by the device).
    """
    head = whole_head(head)
    width, mask_V = common_vocabulary([head])
    projection = project_with(hidden_ND, head, width, mask_V, 1.0)
    accumulate = projection.accumulate
    chunk = chunk or chunk_for(hidden_ND.device)
    k = min(k, width if mask_V is None else int(mask_V.sum()))
    ids, kept, sums, drawn = [], [], [], []
    for start in range(0, rows_n.numel(), chunk):
        part = slice(start, start + chunk)
        logits_nV, _ = logits_of(hidden_ND[rows_n[part]], projection)
        logits_nK, ids_nK = logits_nV.topk(k, dim=1)
        log_z_nZ = torch.stack([(logits_nV / t).logsumexp(1) if t != 1 else logits_nV.logsumexp(1) for t in temperatures], 1)
        ids.append(ids_nK)
        kept.append(logits_nK)
        sums.append(log_z_nZ)
        if uniforms_nS is not None:
            tail_nV = (logits_nV / temperatures[0]).softmax(1).scatter_(1, ids_nK, 0)
            drawn.append(_invert(tail_nV, uniforms_nS[part].to(accumulate)))
    if not ids:
        device, samples = hidden_ND.device, None if uniforms_nS is None else uniforms_nS.long()
        empty = torch.zeros(0, k, dtype=accumulate, device=device)
        return TopKLogits(empty.long(), empty, torch.zeros(0, len(temperatures), dtype=accumulate, device=device), samples)
    return TopKLogits(torch.cat(ids), torch.cat(kept), torch.cat(sums), torch.cat(drawn) if drawn else None)


def _invert(weights_nV: Tensor, uniforms_nS: Tensor) -> Tensor:
    """Ids ``[n, S]`` at which the cumulated weights pass ``uniforms`` of their total; ids of weight 0 are never drawn."""
    cumulated_nV = weights_nV.cumsum(1)
    total_n1 = cumulated_nV[:, -1:]
    ids_nS = torch.searchsorted(cumulated_nV, uniforms_nS * total_n1, right=True)
    # Rounding can carry the largest uniform past the end: the last id that has any weight is meant.
    last_n1 = (weights_nV > 0).long().cumsum(1).argmax(1, keepdim=True)
    return torch.minimum(ids_nS, last_n1)
