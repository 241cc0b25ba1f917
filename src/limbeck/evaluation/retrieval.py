"""Which heads look things up: the attention that lands on the token to be copied.

In a string that stands twice, the token after the earlier occurrence is the answer; a head that puts its attention there is an
induction head (Olsson et al. 2022, arXiv 2209.11895: "prefix matching").
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from limbeck.evaluation.speed import attention_modules
from limbeck.models.structure import AttentionView, attention_slot, attention_view, decoder_layers


def retrieval_layers(model: Any, ids: np.ndarray, *, distance: int, rows: int = 4, above: float = 0.3) -> list[int]:
    """Layers with a head that looks things up, also those that do so only while the layers before them are silent.

    A layer that finds the answer already there need not look ("backup" heads: Wang et al. 2022, arXiv 2211.00593); a hybrid that
    loses the first one needs the second.  So the layers found are silenced, one after the other, and the rest is looked at again.
    """
    layers = decoder_layers(model)
    found: list[int] = []
    handles = []
    try:
        while fresh := [
            index for index, _, _ in retrieval_heads(model, ids, distance=distance, rows=rows, above=above) if index not in found
        ]:
            index = min(fresh)
            found.append(index)
            handles.append(getattr(layers[index], attention_slot(layers[index])).register_forward_hook(_silence))
    finally:
        for handle in handles:
            handle.remove()
    return sorted(found)


def _silence(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


@torch.no_grad()
def retrieval_heads(
    model: Any, ids: np.ndarray, *, distance: int, rows: int = 4, above: float = 0.3, seed: int = 0
) -> list[tuple[int, int, float]]:
    """``(layer, head, mass)`` of every softmax head whose mean attention on the answer is over ``above``.

    The probability is computed from the module's own projections, norms and rotation, on ``rows`` strings of ``distance`` of
    ``ids`` that stand twice.
    """
    text = np.random.default_rng(seed).choice(ids, (rows, distance))
    tokens_BT = torch.from_numpy(np.concatenate([text, text], 1)).to(model.device)
    captured: dict[int, tuple[Tensor, Any]] = {}
    handles = []
    for index, attention in enumerate(attention_modules(model)):
        if hasattr(attention, "state_bytes"):
            continue

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> None:
            captured[index] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], kwargs["position_embeddings"]

        handles.append(attention.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        model(input_ids=tokens_BT, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for index, (hidden_BTD, rotary) in captured.items():
        mass_H = _answer_mass(attention_view(model, index), hidden_BTD, rotary, distance)
        found += [(index, head, float(mass)) for head, mass in enumerate(mass_H) if mass > above]
    return found


def _answer_mass(view: AttentionView, hidden_BTD: Tensor, rotary: Any, distance: int) -> Tensor:
    """Mean attention from each position of the second copy to the token after its earlier occurrence, ``[H]``."""
    facts = view.facts
    q_BTHK = linear(hidden_BTD, view.q_weight_QD, view.q_bias).unflatten(-1, (-1, facts.head_dim))
    k_BTHK = linear(hidden_BTD, view.k_weight_KD, view.k_bias).unflatten(-1, (-1, facts.head_dim))
    if view.q_norm is not None:
        q_BTHK, k_BTHK = facts.normalise(view.q_norm, q_BTHK), facts.normalise(view.k_norm, k_BTHK)
    q_BHTK, k_BHTK = facts.rotate(q_BTHK.transpose(1, 2), k_BTHK.transpose(1, 2), rotary)
    scores_BHTT = (q_BHTK @ k_BHTK.repeat_interleave(facts.num_groups, 1).mT).float() * facts.scaling
    length = scores_BHTT.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=scores_BHTT.device).tril()
    attention_BHTT = scores_BHTT.masked_fill(~causal, float("-inf")).softmax(-1)
    # Position t of the second copy must predict what stands at t + 1 - distance.
    return attention_BHTT.diagonal(1 - distance, -2, -1)[..., 1:].mean((0, 2))
