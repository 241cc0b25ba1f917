"""The one way a packed batch goes through a model.

transformers finds document boundaries from ``position_ids`` that restart at 0, and only when ``attention_mask`` is None and no
cache is made; an all-ones mask or the default ``use_cache`` switches that off silently and documents see each other.  Families
whose CPU code cannot pack at all (Qwen3-Next, Qwen3.5) get their documents as rows of a padded batch instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.errors import ModelError
from limbeck.models.head import backbone, head_of
from limbeck.types import Batch

FLAG = "_limbeck_packs"
"""Attribute of a probed model: True when its own forward keeps packed documents apart, False when they are unpacked for it."""


def forward_packed(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Final hidden states ``[B, T, D]`` (after the final norm), every document as if it stood alone; padding's mean nothing.

    Mixers read ``documents_BT``; varlen kernels read ``cu_seq_lens_q/k``, ``max_length_q/k`` and ``seq_idx``.  The model is
    probed (:func:`leak_probe`) the first time, if it was not before.
    """
    if not hasattr(model, FLAG):
        leak_probe(model)
    return _packed(model, batch) if getattr(model, FLAG) else _unpacked(model, batch)


def rows_seen(model: PreTrainedModel, batch: Batch) -> Tensor | None:
    """The batch's row of every row that the model's Linears see, int64 ``[documents]``; None where they see the batch's own.

    For what is applied row by row: a family that cannot pack sees documents as rows.
    """
    if not hasattr(model, FLAG):
        leak_probe(model)
    if getattr(model, FLAG):
        return None
    rows_BT = torch.arange(batch.input_ids_BT.shape[0], device=batch.input_ids_BT.device)[:, None].expand_as(batch.input_ids_BT)
    return rows_BT[_documents(batch)]


def packing_kwargs(batch: Batch) -> dict[str, Any]:
    """Document boundaries under the names that transformers and our mixers read.

    ``cu_seq_lens_q/k`` int32 ``[documents + 1]`` over the flattened batch (a padded tail is a document of its own), ``seq_idx``
    int32 ``[B, T]``.
    """
    starts = _starts(batch).flatten().nonzero().flatten()
    end = torch.tensor([batch.position_ids_BT.numel()], device=starts.device)
    edges = torch.cat([starts, end]).to(torch.int32)
    longest = int(edges.diff().max())
    return {
        "documents_BT": batch.documents_BT,
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": (_starts(batch).cumsum(-1) - 1).to(torch.int32),
    }


def _starts(batch: Batch) -> Tensor:
    """Where a document or a padded tail begins, bool ``[B, T]``; the first column always does."""
    starts = batch.position_ids_BT == 0
    starts[:, 0] = True
    return starts


def _documents(batch: Batch) -> Tensor:
    """Where a document begins, bool ``[B, T]``: a padded tail is none (it would be run like one), a row of padding alone is one."""
    starts = _starts(batch) & batch.token_mask_BT
    starts[:, 0] = True
    return starts


def _packed(model: PreTrainedModel, batch: Batch) -> Tensor:
    output = backbone(model)(
        input_ids=batch.input_ids_BT,
        position_ids=batch.position_ids_BT,
        attention_mask=None,
        use_cache=False,
        **packing_kwargs(batch),
    )
    return output.last_hidden_state


def _unpacked(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Documents as the rows of a right-padded batch ``[documents, longest]``, and back.

    A causal model's document cannot see the padding behind it, so no mask is needed.
    """
    document_BT, column_BT = _places(batch)
    rows, longest = int(document_BT.max()) + 1, int(column_BT.max()) + 1
    ids, real_BT = batch.input_ids_BT.new_zeros(rows, longest), batch.token_mask_BT
    ids[document_BT[real_BT], column_BT[real_BT]] = batch.input_ids_BT[real_BT]
    output = backbone(model)(input_ids=ids, attention_mask=None, use_cache=False)
    return output.last_hidden_state[document_BT, column_BT]


def as_in_batch(model: PreTrainedModel, batch: Batch, seen: Tensor) -> Tensor:
    """What a module inside gave for the tokens of a forward, ``seen [rows * length, W]`` or ``[rows, length, W]``, as ``[B, T, W]``.

    Not for what :func:`leak_probe` has not seen: the model has been run.
    """
    if getattr(model, FLAG):
        return seen.reshape(*batch.input_ids_BT.shape, seen.shape[-1])
    document_BT, column_BT = _places(batch)
    return seen.reshape(int(document_BT.max()) + 1, -1, seen.shape[-1])[document_BT, column_BT]


def _places(batch: Batch) -> tuple[Tensor, Tensor]:
    """Row and column that each position has where documents are rows, int64 ``[B, T]`` each; padding has those of some token."""
    starts = _documents(batch)
    return (starts.flatten().cumsum(0) - 1).view_as(starts), _columns(starts).where(batch.token_mask_BT, 0)


def _columns(starts_BT: Tensor) -> Tensor:
    """Distance of each position from its document's start, int64 ``[B, T]``."""
    index_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    return index_T - torch.where(starts_BT, index_T, 0).cummax(-1).values


@torch.no_grad()
def leak_probe(model: PreTrainedModel) -> None:
    """Check on a loaded model that packed documents do not see each other, and that ``head_of`` is its head.

    The first document of a row is changed and the second must not move.  A model that leaks when packed is marked, so that
    :func:`forward_packed` unpacks for it; one that leaks even so, or whose logits are not its head's, raises
    :class:`ModelError`.
    """
    training = model.training
    model.eval()
    try:
        batch, second = _probe_batch(model)
        low = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
        tolerance = 1e-2 if low else 1e-5
        for packs in (True, False):
            try:
                hidden = (_packed if packs else _unpacked)(model, batch)[:, second]
            except (RuntimeError, ValueError, TypeError, NotImplementedError):
                if not packs:
                    raise
                continue
            if not bool(hidden.isfinite().all()):
                raise ModelError(
                    f"{type(model).__name__}: its hidden states are not finite on a few plain tokens; the weights are damaged: download or save them again"
                )
            if (hidden[0] - hidden[1]).abs().max() <= tolerance * hidden.abs().max():
                break
        else:
            raise ModelError(
                f"{type(model).__name__}: a document changes the next one in its row, packed and unpacked; Limbeck "
                "cannot train on packed rows with it"
            )
        _check_head(model, batch, tolerance)
        setattr(model, FLAG, packs)
    finally:
        model.train(training)


def _probe_batch(model: PreTrainedModel, first: int = 7, second: int = 9) -> tuple[Batch, slice]:
    """Two rows whose second documents are the same and whose first are not; and where the second stands."""
    vocabulary = model.get_input_embeddings().num_embeddings
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(first + second, device=device).repeat(2, 1) * 5 + 3
    ids[1, :first] = ids[1, :first].flip(0) * 3 + 1
    positions = torch.cat([torch.arange(first), torch.arange(second)]).to(device).repeat(2, 1)
    documents = torch.tensor([0] * first + [1] * second, device=device).repeat(2, 1)
    ids = ids % vocabulary
    return Batch(ids, ids, positions, documents), slice(first, first + second)


def _check_head(model: PreTrainedModel, batch: Batch, tolerance: float) -> None:
    ids = batch.input_ids_BT[:1]
    logits = model(input_ids=ids, attention_mask=None, use_cache=False).logits[0]
    hidden = backbone(model)(input_ids=ids, attention_mask=None, use_cache=False).last_hidden_state[0]
    head = head_of(model)
    ours = head.scale * torch.nn.functional.linear(hidden, head.weight_VD, head.bias_V)
    if head.softcap is not None:
        ours = head.softcap * torch.tanh(ours / head.softcap)
    if logits.shape != ours.shape or (logits - ours).abs().max() > 10 * tolerance * logits.abs().max():
        raise ModelError(
            f"{type(model).__name__}: its logits are not what its output projection, soft-cap and scale give; "
            "the family does something to them that Limbeck does not know"
        )
