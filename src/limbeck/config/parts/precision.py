"""Precision plans: which weights of a model are ternary, and what the others are.

One plan drives training, the optimiser's groups, the exported file and the size report alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field

from limbeck.config.base import Options

Precision = Literal["ternary", "keep", "bf16", "fp8", "q8"]
"""`keep` leaves a weight at the model's own precision; `bf16`, `fp8` and `q8` are what an exported file holds, and train as `keep`."""
TargetType = Literal["tq1_0", "tq2_0", "q2_0"]
BLOCKS: dict[str, int] = {"tq1_0": 256, "tq2_0": 256, "q2_0": 64}
"""Inputs that share one scale in a file of each type: rows are whole multiples of it, and so are groups."""


class PlanRule(Options):
    """What the weights whose names match a pattern are."""

    match: str = Field(min_length=1)
    """Shell-style pattern of parameter names, such as `*.experts.down_proj` or `model.layers.*.self_attn.*_proj.weight`."""
    precision: Precision
    """`ternary`, `keep`, or what an exported file holds: `bf16`, `fp8`, `q8`."""


def _rules(patterns: Iterable[str]) -> tuple[PlanRule, ...]:
    return tuple(PlanRule(match=pattern, precision="ternary") for pattern in patterns)


_SLOTS = ("self_attn", "attention", "self_attention", "attn")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj", "dense")
_MLP = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
_EXPERTS = ("*.experts.gate_up_proj", "*.experts.down_proj")
PLANS: dict[str, tuple[PlanRule, ...]] = {
    "moe_experts": _rules(_EXPERTS),
    "dense": _rules(
        [
            *(f"*.layers.*.{slot}.{name}.weight" for slot in _SLOTS for name in _ATTENTION),
            *(f"*.layers.*.mlp.{name}.weight" for name in _MLP),
        ]
    ),
}
"""`moe_experts`: routed experts alone; router, gates, norms, embeddings, head, shared expert, attention and linear attention keep.
`dense`: the projections of attention (and of mixers in its place) and of the MLP."""


def rules_of(plan: str | Sequence[PlanRule]) -> tuple[PlanRule, ...]:
    """A plan's rules, in order: the first that matches a name decides, and what none matches keeps."""
    return PLANS[plan] if isinstance(plan, str) else tuple(plan)


def precision_of(plan: str | Sequence[PlanRule], name: str) -> Precision:
    """What a plan says of one parameter."""
    return next((rule.precision for rule in rules_of(plan) if fnmatchcase(name, rule.match)), "keep")


def plan_for(names: Iterable[str]) -> Literal["moe_experts", "dense"]:
    """The named plan of a model with these parameters: that of experts where there are routed ones."""
    return "moe_experts" if any(precision_of("moe_experts", name) == "ternary" for name in names) else "dense"


def idle_rules(plan: str | Sequence[PlanRule], names: Sequence[str]) -> list[str]:
    """Patterns of a plan's own rules (not of a named plan) that match no name at all."""
    return [] if isinstance(plan, str) else [r.match for r in plan if not any(fnmatchcase(name, r.match) for name in names)]


def types_for(width: int, group: int | None) -> list[str]:
    """File types that hold rows of ``width`` with a scale for each ``group`` of them (None: one a row) without loss."""
    return [kind for kind, block in BLOCKS.items() if not width % block and not (group or block) % block]
