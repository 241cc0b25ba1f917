"""Do behaviours add up?  Teachers that were really trained on two tasks, against sums and merges of the two tasks' own.

A "mixed" teacher made of the two others would be close to their sum by construction: only trained ones are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from limbeck.adapters.deltas import Probes
from limbeck.adapters.gauge import align
from limbeck.adapters.merge import merge
from limbeck.adapters.spec import Adapters
from limbeck.config.parts.adapters import RepresentationOptions
from limbeck.data.conditions.store import Condition
from limbeck.evaluation.adapters import BASE, Column, Judged

MIX, GENERATED, SUM, MEAN, TIES = "trained on the mix", "generated from the mix", "sum of both", "mean of both", "TIES of both"


@torch.no_grad()
def compose(
    judged: Judged,
    mixes: Sequence[Condition],
    *,
    teacher_of: Callable[[Sequence[int]], Adapters],
    generated: Column,
    probes: Probes,
    represent: RepresentationOptions,
    density: float,
) -> dict[str, Any]:
    """For each mix: is its teacher's delta nearer to the sum of the parts' deltas than to either, and how the merges do on each part.

    ``additive`` counts the mixes for which ``cos(d_mix, d_1 + d_2) > max(cos(d_mix, d_1), cos(d_mix, d_2))``.
    """
    ids, firsts, seconds = [c.id for c in mixes], [c.parts[0] for c in mixes], [c.parts[1] for c in mixes]
    deltas = [judged.deltas(teacher_of(which), probes, represent) for which in (ids, firsts, seconds)]
    to_sum = cosine_similarity(deltas[0], deltas[1] + deltas[2], dim=-1)
    to_parts = [cosine_similarity(deltas[0], part, dim=-1) for part in deltas[1:]]
    to_generated = cosine_similarity(deltas[0], judged.deltas(_all(generated(ids)), probes, represent), dim=-1)
    columns: dict[str, Column] = {
        BASE: lambda lot: None,
        MIX: teacher_of,
        GENERATED: generated,
        **{name: _merged(teacher_of, mixes, method, weights, density) for name, method, weights in MERGES},
    }
    texts = {"mix": None, "first part": dict(zip(ids, firsts, strict=True)), "second part": dict(zip(ids, seconds, strict=True))}
    nll = {text: judged.nll(ids, columns, text_of=reads) for text, reads in texts.items()}
    rows = [
        {
            "name": mix.name,
            "cosine_sum": float(to_sum[k]),
            "cosine_parts": [float(part[k]) for part in to_parts],
            "cosine_generated": float(to_generated[k]),
            "additive": bool(to_sum[k] > max(part[k] for part in to_parts)),
            "nll": {text: {name: float(values[k]) for name, values in found.items()} for text, found in nll.items()},
        }
        for k, mix in enumerate(mixes)
    ]
    means = {text: {name: float(values.mean()) for name, values in found.items()} for text, found in nll.items()}
    additive = float(np.mean([row["additive"] for row in rows]))
    return {"additive": additive, "nll": means, "mixes": rows, "lines": _lines(additive, rows, means)}


MERGES = ((SUM, "task_arithmetic", (1.0, 1.0)), (MEAN, "weighted", (0.5, 0.5)), (TIES, "ties", (1.0, 1.0)))


def _merged(teacher_of: Callable[[Sequence[int]], Adapters], mixes: Sequence[Condition], method: str, weights: Sequence[float], density: float) -> Column:
    parts = {mix.id: mix.parts for mix in mixes}
    made: dict[int, Adapters] = {}

    def column(lot: Sequence[int]) -> Adapters:
        for i in lot:
            if i not in made:
                both = teacher_of(list(parts[i]))
                # One rank for all: what two adapters need together.
                made[i] = merge(both, list(weights), method=method, rank=2 * both.spec.rank, density=density).adapters
        return align([made[i] for i in lot])

    return column


def _all(adapters: Adapters | None) -> Adapters:
    assert adapters is not None
    return adapters


def _lines(additive: float, rows: list[dict[str, Any]], means: dict[str, dict[str, float]]) -> list[str]:
    cosines = [np.mean([row["cosine_sum"] for row in rows]), *(np.mean([row["cosine_parts"][k] for row in rows]) for k in (0, 1))]
    lines = [
        f"{len(rows)} mixes: the teacher's delta is nearer to the sum than to either part in {additive:.0%} "
        f"(mean cosine {cosines[0]:.3f}; parts {cosines[1]:.3f}, {cosines[2]:.3f})"
    ]
    width = max(map(len, means["mix"]))
    for name in means["mix"]:
        lines.append(f"  {name:<{width}}  " + "  ".join(f"{text} {found[name]:.4f}" for text, found in means.items()))
    return lines
