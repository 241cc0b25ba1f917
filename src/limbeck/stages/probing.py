"""Probes as tokens, and what the base needs to be measured on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.adapters.deltas import Probes
from limbeck.adapters.probe_texts import DIVERSE, create_domain_probes, create_generic_probes
from limbeck.adapters.spec import AdapterSpec
from limbeck.adapters.targets import modules_of
from limbeck.config.parts.adapters import ProbeOptions, RepresentationOptions
from limbeck.data.conditions.store import END, START, ConditionSet
from limbeck.errors import DataError
from limbeck.models.head import head_of
from limbeck.models.hidden import hidden_states
from limbeck.ops.projection import whole_logits

SNIPPETS = 32
"""Probes drawn from conditions by default."""


def probes_of(options: ProbeOptions, tokenizer: Any, conditions: ConditionSet | None = None, *, side: str = "train") -> Probes:
    """The probes of a recipe as right-padded tokens, at most ``options.length`` of each."""
    if options.kind == "conditions":
        assert conditions is not None
        rows = snippets(conditions, options.count or SNIPPETS, options.length, options.seed, side)
    else:
        texts = {"generic": create_generic_probes, "diverse": lambda: DIVERSE, "texts": lambda: options.texts}
        found = create_domain_probes(options.domain) if options.domain else texts[options.kind]()
        rows = [tokenizer(text)["input_ids"][: options.length] for text in found[: options.count]]
    empty = [i for i, row in enumerate(rows) if not row]
    if empty or not rows:
        raise DataError(f"probes: {f'text {empty[0]} has no token' if empty else 'there are none'}: give texts")
    return padded(rows)


def padded(rows: Sequence[Sequence[int]]) -> Probes:
    """Rows of ids, right-padded."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row)
        mask[i, : len(row)] = True
    return Probes(ids, mask)


def snippets(conditions: ConditionSet, count: int, length: int, seed: int, side: str = "train") -> list[list[int]]:
    """Beginnings of examples of the seen conditions, spread over them evenly; drawn by the seed."""
    generator = np.random.default_rng((seed, 7919))
    seen = generator.permutation(conditions.split("seen"))
    at = 0 if side == "train" else 1
    rows = []
    for turn in range(count):
        first, last = conditions.first_N3[seen[turn % len(seen)]][at : at + 2]
        example = conditions.examples_E5[int(generator.integers(first, last))]
        rows.append(conditions.tokens[example[START] : min(example[END], example[START] + length)].astype(np.int64).tolist())
    return rows


@torch.no_grad()
def with_continuations(model: nn.Module, probes: Probes, options: RepresentationOptions, seed: int) -> Probes:
    """Every probe with ``continuations`` texts that the base samples after it, whose likelihoods are read."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = []
    starts: list[int] = []
    for ids_T, mask_T in zip(probes.ids_KT, probes.mask_KT, strict=True):
        text = ids_T[mask_T].repeat(options.continuations, 1)
        starts += [text.shape[1]] * options.continuations
        for _ in range(options.continuation_tokens):
            (states,) = hidden_states(model, text, [-1])
            probabilities = whole_logits(states[:, -1], head_of(model)).softmax(-1).cpu()
            text = torch.cat([text, torch.multinomial(probabilities, 1, generator=generator).to(text.device)], 1)
        rows += text.tolist()
    found = padded(rows)
    places = torch.arange(found.ids_KT.shape[1])
    scored = found.mask_KT & (places >= torch.tensor(starts)[:, None])
    return Probes(found.ids_KT, found.mask_KT, scored)


@torch.no_grad()
def input_moments(model: nn.Module, spec: AdapterSpec, probes: Probes) -> dict[str, Tensor]:
    """``E[x x^T] [L, I, I]`` (fp32) of the inputs of every site's Linears over the probes' tokens, in the base."""
    modules = modules_of(model, spec)
    keep = probes.mask_KT.flatten()
    found = {site.name: torch.zeros(len(site.layers), site.in_features, site.in_features) for site in spec.sites}

    def hook_of(name: str, row: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])[keep.to(inputs[0].device)].float()
            found[name][row] = (x.T @ x / len(x)).cpu()

        return hook

    handles = [module.register_forward_hook(hook_of(name, row)) for name, group in modules.items() for row, module in enumerate(group)]
    try:
        hidden_states(model, probes.ids_KT, [-1])
    finally:
        for handle in handles:
            handle.remove()
    return found
