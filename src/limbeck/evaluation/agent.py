"""How well a base with an adapter follows agents' trajectories: loss, divergence from a teacher, and tool calls.

Each condition is a trajectory's issue, and its rows are windows of which the assistant's words count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.adapters.inject import Injector
from limbeck.adapters.spec import Adapters
from limbeck.data.conditions.store import ConditionSet
from limbeck.evaluation.bootstrap import paired
from limbeck.evaluation.decode import decode
from limbeck.evaluation.perplexity import CrossEntropyTally
from limbeck.evaluation.tool_calls import CallScore, compare, forced_calls, read_calls
from limbeck.models.head import head_of
from limbeck.models.packed import forward_packed
from limbeck.ops.projection import chunk_for, whole_logits
from limbeck.ops.topk_divergence import linear_topk_divergence
from limbeck.types import IGNORE, Batch, Head, Output, TopKSignal

Ask = Callable[[Batch], tuple[Batch, TopKSignal | None]]
"""What a teacher says about a batch, and the batch with what it left out masked."""


@dataclass
class Found:
    """Of one column on one condition."""

    nll: float
    """Nats a token of what the assistant says."""
    kl: float | None
    """Nats a token from the teacher's distribution, over its kept ids and the rest."""
    agreement: float | None
    """Share of tokens at which the likeliest id is the teacher's."""
    forced: CallScore = field(default_factory=CallScore)
    """Tool calls, each token after the true ones before it."""
    written: CallScore = field(default_factory=CallScore)
    """Tool calls as the model writes them itself, turn by turn after the true conversation."""

    def measures(self) -> dict[str, float]:
        """The losses that there are."""
        return {name: value for name in ("nll", "kl", "agreement") if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class AgentJudge:
    """A base with a place for adapters, and the conditions whose windows it is judged on."""

    model: Any
    injector: Injector
    conditions: ConditionSet
    tokenizer: Any
    rows: int
    """Windows of a condition, at most."""
    ask: Ask
    turns: int = 0
    """Assistant turns of a condition with a call that each column writes itself."""
    new_tokens: int = 256
    """Tokens of such a turn, at most."""

    def rows_of(self, condition: int) -> Batch:
        """A condition's windows: of a held-out one its test side, else those that it was trained on."""
        own = self.conditions.conditions[condition]
        rows = self.conditions.rows([condition], "test" if own.examples["test"] else "train")
        return rows.batch(range(min(self.rows, len(rows))))

    @torch.no_grad()
    def judge(self, condition: int, columns: Mapping[str, Adapters | None]) -> dict[str, Found]:
        """Every column on one condition; None is the base."""
        batch, signal = self.ask(self.rows_of(condition).to(self.model.device))
        turns = list(turns_of(batch))
        found = {}
        for name, adapters in columns.items():
            with self.injector.active(adapters):
                output = Output(forward_packed(self.model, batch), head_of(self.model))
                found[name] = self._forced(output, batch, signal, turns)
                found[name].written = self._written(batch, turns)
        return found

    def _forced(self, output: Output, batch: Batch, signal: TopKSignal | None, turns: Sequence[tuple[int, int, int]]) -> Found:
        tally = CrossEntropyTally()
        tally.add(output.hidden_BTD, output.head, batch.labels_BT)
        found = Found(tally.result()["ce"], None, None)
        if signal is not None and len(signal.rows_n):
            _, numbers = linear_topk_divergence(output.hidden_BTD.flatten(0, 1), output.head, signal, k=signal.ids_nK.shape[1])
            assert numbers.kl is not None and numbers.agreement is not None
            found.kl, found.agreement = float(numbers.kl / numbers.count), float(numbers.agreement / numbers.count)
        likeliest_BT = torch.full_like(batch.labels_BT, IGNORE)
        likeliest_BT[batch.label_mask_BT] = likeliest(output.hidden_BTD[batch.label_mask_BT], output.head)
        for row, start, end in turns:
            # Position t predicts the token behind it.
            wanted, predicted = batch.input_ids_BT[row, start:end], likeliest_BT[row, start - 1 : end - 1]
            found.forced += forced_calls(wanted.cpu().numpy(), predicted.cpu().numpy(), self.tokenizer)
        return found

    def _written(self, batch: Batch, turns: Sequence[tuple[int, int, int]]) -> CallScore:
        score, left = CallScore(), self.turns
        for row, start, end in turns:
            if not left:
                break
            wanted = read_calls(self.tokenizer.decode(batch.input_ids_BT[row, start:end])).calls
            if wanted:
                # What ends a turn in the truth ends it in what is written.
                stop = int(batch.input_ids_BT[row, end - 1])
                prompt_1T = batch.input_ids_BT[row, None, :start]
                text = self.tokenizer.decode(list(decode(self.model, prompt_1T, tokens=self.new_tokens, ends=[stop])))
                read = read_calls(text)
                score += compare(wanted, read.calls, malformed=read.malformed)
                left -= 1
        return score


def turns_of(batch: Batch) -> Iterator[tuple[int, int, int]]:
    """``(row, first token, behind the last)`` of every assistant turn that counts, in order."""
    for row, labels in enumerate(batch.labels_BT.cpu().numpy()):
        # The label of position t is token t + 1.
        counts = np.concatenate([[0], labels[:-1] != IGNORE, [0]]).astype(np.int8)
        edges = np.diff(counts)
        for start, end in zip(np.flatnonzero(edges == 1) + 1, np.flatnonzero(edges == -1) + 1, strict=True):
            yield row, int(start), int(end)


def likeliest(hidden_nD: Tensor, head: Head) -> Tensor:
    """The likeliest id behind each position, int64 ``[n]``, a chunk of logits at a time."""
    size = chunk_for(hidden_nD.device)
    chunks = [whole_logits(part, head).argmax(-1) for part in hidden_nD.split(size)]
    return torch.cat(chunks) if chunks else hidden_nD.new_zeros(0, dtype=torch.int64)


def summarise(conditions: ConditionSet, found: Mapping[int, Mapping[str, Found]], generated: str, *, resamples: int = 2000) -> dict[str, dict[str, Any]]:
    """Split -> means by measure and column, rates of tool calls, and the lead of ``generated`` over every other column.

    A lead is ``the column's loss - the generated adapter's`` in nats a token (of ``kl`` where there is a teacher, else of ``nll``), with
    the middle 95% of its bootstrap over the conditions.
    """
    table: dict[str, dict[str, Any]] = {}
    for split in dict.fromkeys(conditions.conditions[i].split for i in found):
        own = [columns for i, columns in found.items() if conditions.conditions[i].split == split]
        names = list(own[0])
        measures = [m for m in ("nll", "kl", "agreement") if all(m in columns[names[0]].measures() for columns in own)]
        losses = {m: {n: np.array([columns[n].measures()[m] for columns in own]) for n in names} for m in measures}
        judged = "kl" if "kl" in losses else "nll"
        leads = {n: paired(losses[judged][n] - losses[judged][generated], resamples=resamples) for n in names if n != generated}
        calls = {kind: {n: sum((getattr(c[n], kind) for c in own), CallScore()).rates() for n in names} for kind in ("forced", "written")}
        table[split] = {
            "conditions": len(own),
            **{measure: {n: float(values.mean()) for n, values in by_name.items()} for measure, by_name in losses.items()},
            "lead_of": judged,
            "lead": {n: [lead.mean, lead.low, lead.high] for n, lead in leads.items()},
            **{f"calls_{kind}": rates for kind, rates in calls.items() if any(rates.values())},
        }
    return table


def lines_of(table: Mapping[str, Mapping[str, Any]], generated: str) -> list[str]:
    """The summary for a terminal."""
    lines = []
    for split, found in table.items():
        lines.append(f"{split}: {found['conditions']} issues; lead of '{generated}' in {found['lead_of']}")
        width = max(map(len, found["nll"]))
        for name in found["nll"]:
            words = [f"  {name:<{width}}  {found['nll'][name]:.4f} nats"]
            if "kl" in found:
                words.append(f"KL {found['kl'][name]:.4f}, agreement {found['agreement'][name]:.1%}")
            if name in found["lead"]:
                mean, low, high = found["lead"][name]
                words.append(f"lead {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
            for kind in ("forced", "written"):
                rates = found.get(f"calls_{kind}", {}).get(name)
                if rates:
                    words.append(f"calls {kind}: name {rates['name']:.0%}, keys {rates['keys']:.0%}, values {rates.get('values', 1.0):.0%}")
            lines.append("  ".join(words))
    return lines
