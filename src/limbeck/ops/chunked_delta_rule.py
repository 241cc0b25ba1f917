"""The gated delta rule in chunks, with a hand-written backward pass.

Within a chunk of C tokens, let ``G_i`` be the sum of the log decays of the tokens up to and including ``i``, ``S`` the state
that enters, and ``R_ij = exp(G_i - G_j)`` for ``j <= i``, else 0.  The rule's corrections ``v~_i = beta_i (v_i - S_i^T
k_i)`` solve a unit lower-triangular system (the UT transform of DeltaNet, arXiv 2406.06484; with decays, arXiv 2412.06464):

    (I + A) v~ = beta v - (beta e^G k) S          A_ij = beta_i (k_i . k_j) R_ij,  j < i
    o          = (scale e^G q) S + P v~            P_ij = scale (q_i . k_j) R_ij,  j <= i
    S'         = e^(G_C) S + (e^(G_C - G) k)^T v~

Everything without ``S`` is batched over all chunks; only the first line and the last run in a loop.  The backward
pass needs no more than the forward's tensors.  With ``x = (I + A)^-T dv~`` the gradients of the system collapse to ``d(beta
v) = x``, ``d(beta e^G k) = -x S^T`` and ``dA = -x v~^T``, and every ``G_i`` receives ``q_i . dq_i + ... - k_i . dk_i``: no
second pass over [C, C] matrices.  A token's own term (j = i, and the last token's write) does not depend on ``G``; it is
kept out of these products, or under strong decay the gradient of ``g`` would be a small difference of large numbers.

Two more things keep fp32 accurate.  ``G`` is summed in fp64 and split into a leading fp32 part and a remainder: differences
of the leading parts are exact where they matter, and the remainders ride on q and k.  The inverse is built by doubling
blocks, which multiplies only blocks of inverses: powers of ``A``, as in a Neumann product, can overflow where the inverse
itself is tame.

Layout: ``c`` chunks first, so that one chunk of all rows and heads is contiguous; N = B * H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.ops.chunks import FLOOR, chunk_masks, to_chunks


@dataclass(frozen=True)
class Gates:
    """What is not differentiated: chunk size C (a power of two), scale of q, and the packing of the rows."""

    chunk: int
    scale: float
    segments_BT: Tensor | None = None
    real_BT: Tensor | None = None


class _Decays(NamedTuple):
    """Everything made from ``g``, ``beta`` and the packing; c chunks, shapes broadcast against ``[c, B, H, C, ...]``."""

    within: Tensor
    """fp64 ``[C, C]`` or ``[c, B, C, C]``: 1 where ``j <= i`` in one segment."""
    ratio: Tensor
    """``R_ij`` of the leading parts, ``[c, N, C, C]``."""
    q_factor: Tensor
    """What ``q`` is multiplied by on the way in: scale and remainder, ``[c, B, H, C, 1]``, as all that follow."""
    k_factor: Tensor
    """The same for ``k``."""
    key_row: Tensor
    """What turns ``k`` with its factor into ``-beta k`` with the row's remainder."""
    enter: Tensor
    """``e^(G_i)`` where the entering state is still alive, else 0."""
    leave: Tensor
    """``e^(G_C - G_j)`` where token j is still alive at the chunk's end, else 0."""
    survive: Tensor
    """``e^(G_C)`` if the entering state outlives the chunk, else 0; ``[c, N, 1, 1]``."""


def chunked_delta_rule(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g_BTH: Tensor, beta_BTH: Tensor, state_BHKV: Tensor | None, gates: Gates
) -> tuple[Tensor, Tensor]:
    """``(o_BTHV, final_state_BHKV)``; see :func:`limbeck.ops.delta_rule.gated_delta_rule`, which prepares the arguments."""
    inputs = (q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, state_BHKV)
    dtype = torch.float64 if any(x is not None and x.dtype == torch.float64 for x in inputs) else torch.float32
    if state_BHKV is None:
        batch, _, heads, key_width = k_BTHK.shape
        state_BHKV = torch.zeros(batch, heads, key_width, v_BTHV.shape[-1], dtype=dtype, device=v_BTHV.device)
    output, final = _ChunkedDeltaRule.apply(q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, state_BHKV.to(dtype), gates)
    return output, final


def _to_tokens(x: Tensor, num_tokens: int, dtype: torch.dtype, factor: Tensor | float = 1.0) -> Tensor:
    """``[c, B, H, C, D] * factor -> [B, T, H, D]`` in one pass."""
    chunks, batch, heads, size, width = x.shape
    out = torch.empty(batch, chunks * size, heads, width, dtype=dtype, device=x.device)
    torch.mul(x, factor, out=to_chunks(out, size))
    return out[:, :num_tokens]


def _decays(g: Tensor, beta: Tensor, gates: Gates, dtype: torch.dtype) -> _Decays:
    """The decays of ``g``, ``beta`` ``[c, B, H, C]``."""
    size, device = gates.chunk, g.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    masks = chunk_masks(gates.segments_BT, gates.real_BT, size, device)
    within = masks.within.to(wide)
    enters, stays, survives = (x.to(wide) for x in (masks.enters, masks.stays, masks.survives))
    # A gate that is shut has g = -inf, and -inf - -inf is NaN; e^-1000 is as shut.
    total = (within @ g.to(wide).clamp_min(-1e3).transpose(2, 3)).transpose(2, 3).contiguous()
    leading = total.to(dtype)
    rest = (total - leading).to(dtype)
    end = total[..., -1:]
    # The clamp also bounds what the mask then removes: no exp overflows, so 0 * inf never meets.
    ratio = (leading[..., :, None] - leading[..., None, :]).clamp_(FLOOR, 0).exp_().mul_(masks.reads.to(dtype))
    return _Decays(
        within=within,
        ratio=ratio.flatten(1, 2),
        q_factor=(gates.scale * rest.exp())[..., None],
        k_factor=rest.neg().exp()[..., None],
        key_row=(-beta * (2 * rest).exp())[..., None],
        enter=(leading.clamp_min(FLOOR).exp() * enters).to(dtype)[..., None],
        leave=((end - total).clamp(FLOOR, 0).exp() * stays * rest.exp()).to(dtype)[..., None],
        survive=(end.clamp_min(FLOOR).exp() * survives).to(dtype).flatten(1, 2)[..., None],
    )


def unit_lower_inverse(strict_NCC: Tensor) -> Tensor:
    """``(I - Z)^-1 [N, C, C]`` for strictly lower ``Z`` (what stands on or above the diagonal is not read), C a power of two.

    Inverses ``a``, ``b`` of neighbouring diagonal blocks give that of the block of twice the size, ``[[a, 0], [b z a, b]]``:
    log2(C) rounds of two batched products.
    """
    num, size, _ = strict_NCC.shape
    inverse = torch.eye(size, dtype=strict_NCC.dtype, device=strict_NCC.device).repeat(num, 1, 1)
    half = 1
    while half < size:
        pairs = size // (2 * half)

        def blocks(x: Tensor, pairs: int = pairs) -> Tensor:
            return x.unflatten(2, (pairs, -1)).unflatten(1, (pairs, -1)).diagonal(0, 1, 3).movedim(-1, 1)

        strict, done = blocks(strict_NCC)[..., half:, :half], blocks(inverse)
        corner = strict
        if half > 1:
            first = done[..., :half, :half].reshape(-1, half, half)
            second = done[..., half:, half:].reshape(-1, half, half)
            corner = torch.bmm(torch.bmm(second, strict.reshape(-1, half, half)), first).view(strict.shape)
        done[..., half:, :half] = corner
        half *= 2
    return inverse


class _ChunkedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, gates: Gates
    ) -> tuple[Tensor, Tensor]:
        dtype, size, num_tokens = state.dtype, gates.chunk, v.shape[1]
        with torch.autocast(v.device.type, enabled=False):
            q_, k_, v_ = to_chunks(q, size), to_chunks(k, size), to_chunks(v, size)
            beta_ = to_chunks(beta, size).to(dtype)
            decay = _decays(to_chunks(g, size), beta_, gates, dtype)
            chunks, batch, heads, _, key_width = k_.shape
            num, value_width = batch * heads, v.shape[-1]

            def new(*shape: int) -> Tensor:
                return torch.empty(shape, dtype=dtype, device=v.device)

            keys = torch.mul(k_, decay.k_factor, out=new(*k_.shape))
            rows = new(2, *k_.shape)
            torch.mul(q_, decay.q_factor, out=rows[0])
            torch.mul(keys, decay.key_row, out=rows[1])
            reads = (rows * decay.enter).view(2, chunks, num, size, key_width)
            writes = (keys * decay.leave).view(chunks, num, size, key_width)
            values = torch.mul(v_, beta_[..., None], out=new(*v_.shape)).view(chunks, num, size, value_width)

            keys = keys.view(-1, size, key_width)
            ratio = decay.ratio.view(-1, size, size)
            scores = torch.bmm(rows[0].view(keys.shape), keys.mT).mul_(ratio)
            system = torch.bmm(rows[1].view(keys.shape), keys.mT).mul_(ratio)
            inverse = unit_lower_inverse(system).view(chunks, num, size, size)

            states = new(chunks + 1, num, key_width, value_width)
            states[0] = state.flatten(0, 1)
            for c in range(chunks):
                # v~ overwrites beta v, chunk by chunk.
                torch.bmm(inverse[c], torch.baddbmm(values[c], reads[1, c], states[c]), out=values[c])
                torch.mul(states[c], decay.survive[c], out=states[c + 1])
                states[c + 1].baddbmm_(writes[c].mT, values[c])

            o = torch.bmm(scores, values.flatten(0, 1))
            o.baddbmm_(reads[0].flatten(0, 1), states[:-1].flatten(0, 1))
            output = _to_tokens(o.view(chunks, batch, heads, size, value_width), num_tokens, v.dtype)
        ctx.gates = gates
        ctx.dtypes = [x.dtype for x in (q, k, v, g, beta)]
        ctx.save_for_backward(v, beta, keys, rows, reads, writes, values, scores, inverse, states, *decay)
        return output, states[-1].view(state.shape).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        v, beta, keys, rows, reads, writes, values, scores, inverse, states, *rest = ctx.saved_tensors
        decay = _Decays(*rest)
        size, num_tokens = ctx.gates.chunk, v.shape[1]
        _, chunks, batch, heads, _, key_width = rows.shape
        num, value_width, dtype = batch * heads, v.shape[-1], keys.dtype
        q_dtype, k_dtype, v_dtype, g_dtype, beta_dtype = ctx.dtypes

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=v.device)

        with torch.autocast(v.device.type, enabled=False):
            # errors[0] is do, errors[1] is x = (I + A)^-T dv~.
            errors = new(2, chunks, num, size, value_width)
            errors[0].view(chunks, batch, heads, size, value_width).copy_(to_chunks(do, size))
            flat_errors = errors.flatten(1, 2)
            dvalues = torch.bmm(scores.mT, flat_errors[0]).view(values.shape)
            dstates = new(*states.shape)
            torch.bmm(reads[0].flatten(0, 1).mT, flat_errors[0], out=dstates[:-1].flatten(0, 1))
            dstates[-1] = dstate.flatten(0, 1)
            for c in reversed(range(chunks)):
                torch.bmm(inverse[c].mT, dvalues[c].baddbmm_(writes[c], dstates[c + 1]), out=errors[1, c])
                dstates[c].addcmul_(dstates[c + 1], decay.survive[c]).baddbmm_(reads[1, c].mT, errors[1, c])

            values, rows = values.flatten(0, 1), rows.view(2, -1, size, key_width)
            dscores, drows = new(2, *scores.shape), new(*rows.shape)
            for part in range(2):
                torch.bmm(flat_errors[part], values.mT, out=dscores[part])
                torch.bmm(flat_errors[part], states[:-1].flatten(0, 1).mT, out=drows[part])
            dscores.mul_(decay.ratio.view(scores.shape))
            own = dscores[0].diagonal(dim1=1, dim2=2).clone()[..., None]
            dscores.diagonal(dim1=2, dim2=3).zero_()
            drows.mul_(decay.enter.reshape(-1, size, 1))
            dkeys = torch.bmm(values, dstates[1:].flatten(0, 1).mT).mul_(decay.leave.reshape(-1, size, 1))

            def dots(a: Tensor, b: Tensor) -> Tensor:
                return (a * b).sum(-1).view(chunks, batch, heads, size)

            # What e^(G_C) scales in S': what came in, and every write but the last token's own.
            kept = (states[:-1] * dstates[1:]).sum((-1, -2), keepdim=True) * decay.survive
            dend = kept.view(chunks, batch, heads) + dots(keys, dkeys)[..., :-1].sum(-1)
            for part in range(2):
                drows[part].baddbmm_(dscores[part], keys)
                dkeys.baddbmm_(dscores[part].mT, rows[part])
            key_row = decay.key_row
            key_dots = dots(keys, drows[1])
            dtotal = dots(rows[0], drows[0]).addcmul_(key_row[..., 0], key_dots)
            dtotal[..., :-1] -= dots(keys, dkeys)[..., :-1]
            dtotal[..., -1] += dend
            dg = decay.within.mT @ dtotal.transpose(2, 3).to(decay.within.dtype)
            dg = dg.transpose(0, 1).flatten(1, 2)[:, :num_tokens].to(g_dtype)

            shape = (chunks, batch, heads, size)
            x = errors[1].view(*shape, value_width)
            dbeta = (to_chunks(v, size) * x).sum(-1).addcmul_(decay.k_factor[..., 0].pow(-2), key_dots, value=-1)
            dbeta = dbeta.permute(1, 0, 3, 2).flatten(1, 2)[:, :num_tokens].to(beta_dtype)
            dv = _to_tokens(x, num_tokens, v_dtype, to_chunks(beta, size)[..., None].to(dtype))
            dkeys.addcmul_(own, rows[0]).addcmul_(key_row.reshape(-1, size, 1), drows[1])
            drows[0].addcmul_(own, keys)
            dq = _to_tokens(drows[0].view(*shape, key_width), num_tokens, q_dtype, decay.q_factor)
            dk = _to_tokens(dkeys.view(*shape, key_width), num_tokens, k_dtype, decay.k_factor)
        return dq, dk, dv, dg, dbeta, dstates[0].view(batch, heads, key_width, value_width), None
