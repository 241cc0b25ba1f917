"""The generalised delta rule of RWKV-7 (arXiv 2503.14456): decay a channel, and a key to remove by that is not the key to write.

    S <- diag(e^g) S ;   S <- S + b (S^T a)^T + k v^T ;   o = scale * S^T q

The read with ``a`` comes after the decay; RWKV-7 reads before it, which is ``a = e^-g`` times its removal key.  With ``b = -beta k``,
``a = k`` and ``k`` times beta it is the delta rule of :mod:`limbeck.ops.kda`.  In a chunk with entering state ``S`` the reads
``u_i = S_i^T a_i`` solve

    (I - B) u = A v + (e^G a) S          B_ij = sum_c a_ic b_jc e^(G_ic - G_jc),  A_ij = sum_c a_ic k_jc e^(G_ic - G_jc),  j < i

with ``G`` the sum of the log decays up to and including a token; :mod:`limbeck.ops.channel_decay` makes them without ever forming
``e^-G``.  Packing and padding as in :mod:`limbeck.ops.delta_rule`.  Shape legend: B rows, T tokens, H heads, K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.ops.backends import with_fla
from limbeck.ops.channel_decay import chunked_rows, common_dtype
from limbeck.ops.chunks import chunk_size, to_chunks, to_tokens


@with_fla
def generalised_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    *,
    documents_BT: Tensor | None = None,
    initial_state_BHKV: Tensor | None = None,
    scale: float | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The rule over whole rows, in parallel within chunks of tokens.

    ``g_BTHK`` is the log decay (<= 0), ``scale`` defaults to ``K ** -0.5``.  ``chunk`` (rounded up to a power of two) changes the
    speed, never the result.  Returns ``(o_BTHV, final_state_BHKV)``: outputs in the dtype of ``v``, the state in the dtype computed
    in, which is fp64 when any input is and otherwise fp32, under autocast too.  Gradients flow to all six and the initial state.
    """
    scale = k_BTHK.shape[-1] ** -0.5 if scale is None else scale
    dtype = common_dtype(q_BTHK, k_BTHK, v_BTHV, g_BTHK, a_BTHK, b_BTHK, initial_state_BHKV)
    num_tokens, out_dtype = v_BTHV.shape[1], v_BTHV.dtype
    size = chunk_size(chunk, num_tokens)
    with torch.autocast(v_BTHV.device.type, enabled=False):
        q, k, v, g, a, b = (x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTHK, a_BTHK, b_BTHK))
        made, removal = (chunked_rows((q * scale, a), keys, g, documents_BT, size) for keys in (k, b))
        values = to_chunks(v, size)
        from_writes, from_removals = made.scores.unbind(-3), removal.scores.unbind(-3)
        q_rows, a_rows = (made.rows * made.enter.unsqueeze(-3)).unbind(-3)
        system = torch.eye(size, dtype=dtype, device=v.device) - from_removals[1].tril(-1)
        known = torch.cat([from_writes[1].tril(-1) @ values, a_rows], -1)
        own, against = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True).split([v.shape[-1], a.shape[-1]], -1)
        written, removes = (made.keys * made.leave).mT @ values, (removal.keys * removal.leave).mT
        states = [written.new_zeros(written.shape[1:]) if initial_state_BHKV is None else initial_state_BHKV.to(dtype)]
        reads = []
        for c in range(values.shape[0]):
            reads.append(own[c] + against[c] @ states[-1])
            states.append(torch.addcmul(written[c], states[-1], made.survive[c]) + removes[c] @ reads[-1])
        o = q_rows @ torch.stack(states[:-1]) + from_writes[0] @ values + from_removals[0] @ torch.stack(reads)
    return to_tokens(o, num_tokens).to(out_dtype), states[-1]


def generalised_delta_rule_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    g_BHK: Tensor,
    a_BHK: Tensor,
    b_BHK: Tensor,
    state_BHKV: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token: ``(o_BHV, new_state_BHKV)``, computed in the state's dtype; the output has the dtype of ``v``."""
    scale = k_BHK.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, g, a, b = (x.to(state_BHKV.dtype) for x in (q_BHK, k_BHK, v_BHV, g_BHK, a_BHK, b_BHK))
    state_BHKV = state_BHKV * g.exp()[..., None]
    read_BHV = (state_BHKV * a[..., None]).sum(-2)
    state_BHKV = state_BHKV + b[..., None] * read_BHV[..., None, :] + k[..., None] * v[..., None, :]
    return ((state_BHKV * q[..., None]).sum(-2) * scale).to(v_BHV.dtype), state_BHKV
