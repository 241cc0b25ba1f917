"""Is the file the model?  llama.cpp's probabilities beside torch's, and the tokenizer's ids beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.data.tokenizer import encode
from limbeck.errors import RunError
from limbeck.export.gguf.llama import Llama
from limbeck.export.gguf.packing import BF16, F16, F32
from limbeck.export.gguf.plan import Planned
from limbeck.export.gguf.reference import exact, reference_model
from limbeck.export.gguf.weights import Weights

EXACT = 1e-4
"""Largest difference of a log-probability that an fp32 file may have."""
MEDIAN = 1e-5
"""Median difference that a ternary file may have: most activations are rounded alike to the last digit, a few fall otherwise."""
HALF = 1e-2
"""The same for a file of bf16 or fp16 alone: their steps are so fine that in every vector some roundings fall otherwise, and differences
grow with width and depth (2e-3 at width 1024 and 8 layers).  A tensor in a wrong place moves probabilities by whole nats."""

SHORT = 3
"""Tokens of a prompt where activations are rounded."""
EVERY = 8
"""Positions of a row between two that are compared, where nothing is rounded."""
LONG_ROWS = 4
"""Rows that are compared then."""
TIE = 0.1
"""Lead in nats below which a single rounding may change which token is likeliest."""


@dataclass(frozen=True)
class Verification:
    """Differences of log-probabilities over all tokens of all positions, in nats, between llama.cpp and torch."""

    positions: int
    largest: float
    median: float
    top1: float
    """Share of positions with the same likeliest token, among those where ours leads by more than a rounding can move."""
    clear: int
    """How many those are."""
    bound: str
    holds: bool
    texts: int
    """Texts whose ids were compared."""
    same_ids: int
    llama_cpp: str

    def line(self) -> str:
        """For people."""
        verdict = "verified" if self.holds else "NOT VERIFIED"
        return (
            f"{verdict} in llama.cpp: {self.positions} positions, largest difference {self.largest:.2e}, median {self.median:.2e} nats, "
            f"top-1 {100 * self.top1:.1f}% of {self.clear} clear ones ({self.bound}); ids of {self.same_ids}/{self.texts} texts equal"
        )


@torch.no_grad()
def verify(path: Path, weights: Weights, plan: Sequence[Planned], tokenizer: Any, rows: Sequence[Sequence[int]], texts: Sequence[str] = ()) -> Verification:
    """Compare at positions spread over rows of ids, each from a clean cache, and the ids of ``texts``.

    Where activations are rounded only the first tokens of a row are used: sums in another order let a rounding fall to the other side
    now and then, and each moves all that follows.
    """
    prompts = [list(row) for row in rows[:LONG_ROWS]] if exact(plan) else [list(row[:SHORT]) for row in rows]
    model = reference_model(weights, plan)
    vocabulary, whole = weights.config.vocab_size, whole_token(tokenizer)
    differences, agree = [], []
    with Llama(path, context=max(len(row) for row in prompts) + 8) as llama:
        for row in prompts:
            ours_TV = model(torch.tensor([row]), use_cache=False).logits[0].float().log_softmax(-1)
            for place in sorted({*range(0, len(row), EVERY if exact(plan) else 1), len(row) - 1}):
                theirs_V = llama.log_probabilities(row[: place + 1], vocabulary, whole)
                differences.append((ours_TV[place] - theirs_V).abs())
                likeliest, second = ours_TV[place].topk(2).values.tolist()
                if likeliest - second > TIE:
                    agree.append(bool(ours_TV[place].argmax() == theirs_V.argmax()))
        same = sum(llama.tokens(text) == ids for text, ids in zip(texts, encode(tokenizer, list(texts)) if texts else [], strict=True))
    return _verdict(torch.stack(differences), agree, plan, len(texts), same)


def whole_token(tokenizer: Any) -> int:
    """An id that is read back as whole characters."""
    special = set(tokenizer.all_special_ids)
    for number in range(len(tokenizer)):
        text = tokenizer.decode([number])
        if number not in special and text.strip() and text.isascii() and text.isprintable():
            return number
    raise RunError("--verify: the tokenizer has no token of plain letters, which the comparison needs: leave --verify out")


def _verdict(differences_PV: Tensor, agree: Sequence[bool], plan: Sequence[Planned], texts: int, same: int) -> Verification:
    largest, median = float(differences_PV.nan_to_num(float("inf")).max()), float(differences_PV.median())
    top1 = sum(agree) / len(agree) if agree else 1.0
    if exact(plan):
        bound, holds = f"largest <= {EXACT:g}", largest <= EXACT
    else:
        most = HALF if {one.type for one in plan} <= {F32, BF16, F16} else MEDIAN
        bound, holds = f"median <= {most:g}, top-1 100%", median <= most and top1 == 1
    return Verification(len(differences_PV), largest, median, top1, len(agree), bound, holds and same == texts, texts, same, version("xllamacpp"))


def record(found: Verification) -> dict[str, Any]:
    """A verification for the manifest."""
    return asdict(found)


def check_verified(path: Path, found: Verification) -> None:
    """Raise :class:`RunError` for a file that is not the model."""
    if not found.holds:
        raise RunError(f"{path}: {found.line()}. The file stays for inspection; do not use it")
