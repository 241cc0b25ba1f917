"""Adapters on test text and on probes: loss a condition, shares of the teacher's gain, deltas, and the table of all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from limbeck.adapters.deltas import Probes, embed
from limbeck.adapters.gauge import norms
from limbeck.adapters.inject import Injector
from limbeck.adapters.spec import Adapters
from limbeck.config.parts.adapters import RepresentationOptions
from limbeck.data.conditions.store import Condition, ConditionSet
from limbeck.evaluation.bootstrap import paired, spearman
from limbeck.evaluation.perplexity import CrossEntropyTally
from limbeck.models.head import head_of
from limbeck.models.packed import forward_packed, rows_seen
from limbeck.students.adapted import runner
from limbeck.types import Batch

Column = Callable[[Sequence[int]], Adapters | None]
"""``column(conditions)``: the adapter of each of these conditions (one adapter for all counts too); None is the base."""
BASE, TEACHER = "base", "teacher"


@dataclass(frozen=True)
class Judged:
    """A base with a place for adapters, and the conditions on whose test rows they are judged."""

    model: Any
    injector: Injector
    conditions: ConditionSet
    rows: int
    """Test rows of a condition, at most."""
    together: int
    """Conditions in one forward pass."""

    @torch.no_grad()
    def nll(
        self,
        ids: Sequence[int],
        columns: Mapping[str, Column],
        text_of: Mapping[int, int] | None = None,
        *,
        done: Callable[[int], object] = lambda conditions: None,
    ) -> dict[str, np.ndarray]:
        """Nats a token of each condition's test text under each column, ``[conditions]``.

        ``text_of`` gives the condition whose text is read instead of a condition's own (a part of a mix).  ``done`` hears of
        conditions as they are judged.
        """
        found: dict[str, list[float]] = {name: [] for name in columns}
        for start in range(0, len(ids), self.together):
            lot = list(ids[start : start + self.together])
            batch, owner_B = self._test_rows([(text_of or {}).get(i, i) for i in lot])
            for name, column in columns.items():
                found[name] += self._losses(batch, owner_B, len(lot), column(lot))
            done(len(lot))
        return {name: np.array(values) for name, values in found.items()}

    def _test_rows(self, ids: Sequence[int]) -> tuple[Batch, Tensor]:
        """The first test rows of each of these conditions, and which of them each row belongs to, int64 ``[B]``."""
        rows = self.conditions.rows(sorted(set(ids)), "test")
        wanted = [list(rows.rows_of(i))[: self.rows] for i in ids]
        batch = rows.batch([row for group in wanted for row in group])
        owners = torch.tensor([number for number, group in enumerate(wanted) for _ in group])
        return batch.to(self.model.device), owners.to(self.model.device)

    def _losses(self, batch: Batch, owner_B: Tensor, count: int, adapters: Adapters | None) -> list[float]:
        if adapters is not None:
            each = owner_B if len(adapters) > 1 or count == 1 else torch.zeros_like(owner_B)
            seen = rows_seen(self.model, batch)
            adapters = adapters.pick(each if seen is None else each[seen]) if len(adapters) > 1 else adapters
        with self.injector.active(adapters):
            hidden = forward_packed(self.model, batch)
        head = head_of(self.model)
        losses = []
        for number in range(count):
            tally = CrossEntropyTally()
            mine = owner_B == number
            tally.add(hidden[mine], head, batch.labels_BT[mine])
            losses.append(tally.result()["ce"])
        return losses

    @torch.no_grad()
    def deltas(self, adapters: Adapters, probes: Probes, options: RepresentationOptions) -> Tensor:
        """Delta embeddings ``[N, F]``."""
        run = runner(self.model, self.injector)
        return embed(run, adapters, probes, options, together=self.together) - embed(run, None, probes, options)


def delta_numbers(found: Tensor, teacher: Tensor) -> dict[str, np.ndarray]:
    """Cosine to the teacher's delta and size over its size, ``[N]`` each, of ``found [N, F]`` and ``teacher [N, F]``."""
    ratio = found.norm(dim=-1) / teacher.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return {"delta_cosine": cosine_similarity(found, teacher, dim=-1).cpu().numpy(), "delta_ratio": ratio.cpu().numpy()}


def size_ratio(found: Adapters, teacher: Adapters) -> np.ndarray:
    """Size of dW over the teacher's, ``[N]``."""
    return (norms(found) / norms(teacher).clamp_min(torch.finfo(torch.float32).tiny)).cpu().numpy()


def shares(nll: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``(base - column) / (base - teacher)`` of each condition: 1 is as good as the condition's own teacher, 0 as the base."""
    gain = nll[BASE] - nll[TEACHER]
    return {name: (nll[BASE] - values) / gain for name, values in nll.items()}


def summarise(
    conditions: Sequence[Condition],
    nll: Mapping[str, np.ndarray],
    generated: str,
    *,
    resamples: int = 2000,
    numbers: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Split -> mean loss and share by column, wins of ``generated`` over the base, and its lead over every other column.

    A lead is ``loss of the column - loss of the generated adapter`` in nats a token, with the middle 95% of its bootstrap over the
    conditions.  ``share`` is the ratio of mean gains; ``share_mean`` the mean of the conditions' own shares.
    """
    table: dict[str, dict[str, Any]] = {}
    per_condition = shares(nll)
    for split in dict.fromkeys(condition.split for condition in conditions):
        at = np.array([condition.split == split for condition in conditions])
        gain = (nll[BASE] - nll[TEACHER])[at].mean()
        leads = {name: paired((values - nll[generated])[at], resamples=resamples) for name, values in nll.items() if name != generated}
        table[split] = {
            "conditions": int(at.sum()),
            "nll": {name: float(values[at].mean()) for name, values in nll.items()},
            "share": {name: float((nll[BASE] - values)[at].mean() / gain) for name, values in nll.items()},
            "share_mean": {name: float(values[at].mean()) for name, values in per_condition.items()},
            "beats_base": float((nll[generated] < nll[BASE])[at].mean()),
            "lead": {name: [interval.mean, interval.low, interval.high] for name, interval in leads.items()},
        }
        for kind, values in (numbers or {}).items():
            table[split][kind] = {name: float(found[at].mean()) for name, found in values.items()}
        cosine = (numbers or {}).get("delta_cosine", {}).get(generated)
        if cosine is not None:
            table[split]["spearman_cosine_gain"] = spearman(cosine[at], (nll[BASE] - nll[generated])[at])
    return table


def lines_of(table: Mapping[str, Mapping[str, Any]], generated: str) -> list[str]:
    """The summary for a terminal."""
    lines = []
    for split, found in table.items():
        lines.append(f"{split}: {found['conditions']} conditions; '{generated}' beats the base on {found['beats_base']:.0%}")
        width = max(map(len, found["nll"]))
        for name, value in found["nll"].items():
            words = f"  {name:<{width}}  {value:.4f} nats  {found['share'][name]:>7.1%} of the teacher's gain"
            if name in found["lead"]:
                mean, low, high = found["lead"][name]
                words += f"  lead {mean:+.4f} [{low:+.4f}, {high:+.4f}]"
            if name in found.get("delta_cosine", {}):
                words += f"  delta cosine {found['delta_cosine'][name]:.3f}, size x {found['delta_ratio'][name]:.2f}"
            lines.append(words)
    return lines
