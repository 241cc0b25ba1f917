"""The surgery that makes weights ternary: Linears and stacked experts compute with codes times scales of the weights they hold.

Parameters keep their names and their full precision; nothing but the forward pass changes, so that checkpoints of the base load and
what is exported is what was trained.  Lambda, between the base's weights (0) and the ternary ones (1), is a pure function of the
training step; the config remembers how far it came.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from limbeck.config.parts.precision import PLANS, idle_rules, plan_for, precision_of, types_for
from limbeck.config.parts.surgeries import TernarizeOptions
from limbeck.errors import ModelError
from limbeck.models.experts import plain
from limbeck.models.structure import OUTPUTS, layer_list
from limbeck.students.hybridize import REST_ROLE
from limbeck.students.mixers.base import Report
from limbeck.students.ternary.modules import LEARNT, Quantised, Quantiser, SubNorm, TernaryLinear, make_ternary, start_scales
from limbeck.students.ternary.watch import CodeWatch
from limbeck.types import Metric

TERNARY_ROLE, SCALES_ROLE = "ternary", "scales"
FUSED = "gate_up_proj"
"""A projection whose rows are two matrices, gate and up."""
NORMED = (*OUTPUTS, "down_proj")
"""Projections in front of which `sub_norm` puts a norm: those that write to the residual stream."""
DONE = "limbeck_ternarised"
"""Field of a config: the weights in the files are codes times scales."""
_SHOWN = 4


class Ternarize:
    """Re-classes the modules of ternary weights and nothing else."""

    def __init__(self, options: TernarizeOptions):
        self.options = options
        self._watch: CodeWatch | None = None

    def resolve(self, model: PreTrainedModel) -> TernarizeOptions:
        """The options with the plan that ``auto`` means for this model."""
        if getattr(model.config, DONE, False):
            raise ModelError(
                "surgery.ternarize: the weights of this model are codes times scales already, and a second rounding would shrink them by "
                "about a third: start from the student's own training checkpoint, or from its base"
            )
        if self.options.plan != "auto":
            return self.options
        return self.options.model_copy(update={"plan": plan_for(name for name, _ in model.named_parameters())})

    def apply(self, model: PreTrainedModel) -> None:
        """Let the plan's weights be computed with as ternary ones; learnt scales are not filled yet.  Works on meta."""
        if _found(model):
            raise ModelError("surgery.ternarize: the model is ternary already: give one plan with all its rules")
        self._make_ternary(model)

    def extend(self, model: PreTrainedModel) -> None:
        """Make ternary what the plan names and was put into the student since: attention that a hybrid was given back."""
        before = {path for path, _, _ in _found(model)}
        self._make_ternary(model)
        for path, module, name in _found(model):
            if path not in before:
                start_scales(module, name)

    def _make_ternary(self, model: PreTrainedModel) -> None:
        o = self.options
        config: Any = model.config
        quantiser = Quantiser(o.scale, o.group, o.method, o.activations, done=bool(getattr(config, DONE, False)))
        chosen = self._chosen(model)
        normed = {name for name in chosen if o.sub_norm and name.removesuffix(".weight").rpartition(".")[2] in NORMED}
        if o.sub_norm and not normed:
            raise ModelError(
                f"surgery.ternarize: `sub_norm` would do nothing: the plan makes none of {', '.join(NORMED)} ternary, in front of which its norms "
                "stand: leave it out, or let the plan name some of them"
            )
        done = {path for path, _, _ in _found(model)}
        names = [name for name in chosen if name not in done]
        for name in names:
            self._check_width(name, model.get_parameter(name))
        mix = lambda_of(config, o)
        for name in names:
            path, _, attribute = name.rpartition(".")
            parts = 2 if FUSED in name.split(".")[-2:] else 1
            make_ternary(model.get_submodule(path), attribute, quantiser, mix, parts, sub_norm=name in normed)
        for layer in layer_list(model):
            for unit in (layer, *layer.children()):
                if any(isinstance(module, Quantised) for module in unit.modules()):
                    # Sharded training must not gather rounded weights: other codes would be trained than exported.
                    unit.keeps_precision = True
        config.limbeck = {**config.limbeck, "lambda": mix}
        model.ternary_start = mix

    def initialise(self, model: PreTrainedModel, base: PreTrainedModel) -> list[Report]:
        """Set learnt scales to where the squared error is least."""
        for _, module, name in _found(model):
            start_scales(module, name)
        return [Report(copied=[], fresh=[*(name for name, role in self.roles(model).items() if role == SCALES_ROLE), *_norms(model)])]

    def roles(self, model: PreTrainedModel) -> dict[str, str]:
        """``ternary`` for the weights behind the codes, ``scales`` for learnt scales, ``rest`` for all others.

        The norms of ``sub_norm`` train with the norms that a model has already: ``rest``, or what the module around them is (``mixers``).
        """
        ours = {path: TERNARY_ROLE for path, _, _ in _found(model)}
        ours.update({path + LEARNT: SCALES_ROLE for path in list(ours)})
        return {name: ours.get(name, REST_ROLE) for name, _ in model.named_parameters()}

    def replaced(self, model: PreTrainedModel) -> list[int]:
        """No layer: attention stays where it is."""
        return []

    def at_step(self, model: Any, step: int) -> None:
        """Move lambda to where it is in a training step (from 0) of this stage."""
        if self._watch is None:
            self._watch = CodeWatch(_found(model))
        start, steps = model.ternary_start, self.options.warmup
        mix = min(1.0, start + step / steps) if steps else 1.0
        if mix == model.config.limbeck["lambda"]:
            return
        for _, module, _ in _found(model):
            module.mix = mix
        model.config.limbeck = {**model.config.limbeck, "lambda": mix}

    def measures(self, model: Any) -> dict[str, Metric]:
        """Lambda, and what the codes did since the last call, as ``(sum, count)``: see :class:`CodeWatch`."""
        if self._watch is None:
            return {}
        return {"ternary/lambda": (model.config.limbeck["lambda"], 1), **self._watch.measure()}

    def notes(self, model: PreTrainedModel) -> list[str]:
        """What to know before training: what ``sub_norm`` does to a pretrained model, and weights that no ternary file holds."""
        norms = _norms(model)
        if norms:
            return [
                f"`sub_norm` put {len(norms)} norms in front of ternary projections: from the first step on, also while lambda is 0, the student "
                "computes something else than its base, and has to learn it again; no GGUF file can hold it"
            ]
        homeless = [path for path, module, name in _found(model) if not types_for(getattr(module, name).shape[-1], self.options.group)]
        if not homeless:
            return []
        width = model.get_parameter(homeless[0]).shape[-1]
        return [
            f"{len(homeless)} ternary weights fit no ternary GGUF type ({homeless[0]}: {width} inputs; TQ1_0 and TQ2_0 hold rows of whole "
            "256s, Q2_0 of whole 64s): such a file will hold them at another precision"
        ]

    # -- the plan -------------------------------------------------------------------------------------------------------

    def _chosen(self, model: PreTrainedModel) -> list[str]:
        """Names of the weights that the plan makes ternary."""
        plan = self.options.plan
        ours = {path + LEARNT for path, _, _ in _found(model)} | set(_norms(model))
        names = [name for name, _ in model.named_parameters() if name not in ours]
        idle = idle_rules(plan, names)
        if idle:
            raise ModelError(f"surgery.ternarize: plan: '{idle[0]}' matches no parameter{_nearest(idle[0], names)}")
        chosen = [name for name in names if precision_of(plan, name) == "ternary"]
        if not chosen:
            candidates = [name for name in names if self._obstacle(model, name) is None]
            what = f"plan '{plan}'" if isinstance(plan, str) else "the plan"
            ways = " or ".join(f"`plan: {other}`" for other in PLANS if any(precision_of(other, name) == "ternary" for name in candidates))
            nearest = _nearest("experts.gate_up_proj", candidates)
            raise ModelError(
                f"surgery.ternarize: {what} makes no weight of {type(model).__name__} ternary{nearest}; "
                f"use {ways or 'rules of patterns of these names'}"
            )
        for name in chosen:
            obstacle = self._obstacle(model, name)
            if obstacle is not None:
                raise ModelError(
                    f"surgery.ternarize: the plan makes {name} ternary, and {obstacle}: put a rule that keeps it before the rule that matches it"
                )
        return chosen

    @staticmethod
    def _obstacle(model: PreTrainedModel, name: str) -> str | None:
        """Why a parameter cannot be ternary; None if it can."""
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if not any(module is inner for inner in layer_list(model).modules()):
            return "only weights of decoder layers can be"
        if isinstance(module, Quantised) and attribute in module.parts:
            return None
        if type(module) is nn.Linear or isinstance(module, TernaryLinear):
            return None if attribute == "weight" else "a bias cannot be"
        if attribute in (FUSED, "down_proj") and getattr(module, attribute).ndim == 3 and hasattr(module, "has_gate"):
            return None if plain(module) else f"{type(module).__name__} has biases, no gate or transposed weights"
        return f"{type(module).__name__} is neither a Linear nor stacked experts"

    def _check_width(self, name: str, weight: torch.Tensor) -> None:
        width, group = weight.shape[-1], self.options.group
        if group is not None and width % group:
            raise ModelError(f"surgery.ternarize: {name} has {width} inputs, no multiple of `group: {group}`: use a divisor, or scale: row")
        fits = types_for(width, group)
        for kind in self.options.export:
            if kind not in fits:
                raise ModelError(
                    f"surgery.ternarize: {name} has {width} inputs, which {kind} cannot hold (TQ1_0 and TQ2_0 take whole 256s, Q2_0 whole "
                    f"64s): export to {' or '.join(fits) or 'a type that is not ternary'}, or keep it by a rule of the plan"
                )


def _found(model: nn.Module) -> list[tuple[str, Quantised, str]]:
    """Every ternary weight: its full name, its module and its name there."""
    return [
        (f"{path}.{name}" if path else name, module, name)
        for path, module in model.named_modules()
        if isinstance(module, Quantised)
        for name in module.parts
    ]


def _norms(model: nn.Module) -> list[str]:
    """Names of the weights of ``sub_norm``."""
    return [f"{path}.weight" for path, module in model.named_modules() if isinstance(module, SubNorm)]


def _nearest(pattern: str, names: list[str]) -> str:
    near = get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:_SHOWN]
    return f"; nearest: {', '.join(near)}" if near else ""


# -- what a student's config and codes say --------------------------------------------------------------------------------


def ternarize_options(config: Any) -> TernarizeOptions | None:
    """The ternary surgery that a student's config remembers; None if there was none."""
    section = getattr(config, "limbeck", None) or {}
    found = [part for part in section.get("surgery", ()) if part.get("kind") == "ternarize"]
    return TernarizeOptions.model_validate(found[-1]) if found else None


def lambda_of(config: Any, options: TernarizeOptions) -> float:
    """How far a student is between its base's weights (0) and ternary ones (1)."""
    return float(config.limbeck.get("lambda", 0.0 if options.warmup else 1.0))


def check_exportable(config: Any) -> TernarizeOptions:
    """The options of a student that can be written as a ternary file; :class:`ModelError` for any other, or while lambda is below 1."""
    options = ternarize_options(config)
    if options is None:
        raise ModelError("the model was not trained ternary (no `ternarize` surgery in its config): train it so, or export it at full precision")
    reached = lambda_of(config, options)
    if reached < 1:
        raise ModelError(
            f"lambda of this ternary student is {reached:.4g}: its warm-up of {options.warmup} steps is not over, and a file would hold other "
            "weights than were trained: go on training it, then export"
        )
    return options


@torch.no_grad()
def dequantise(model: Any) -> None:
    """Put codes times scales in the place of the weights, and mark the model so that they are never rounded again.

    The forward pass stays what it was to the last bit, and costs no quantising: for generation and for tools that do not know us.
    Refused while lambda is below 1.
    """
    check_exportable(model.config)
    for _, module, name in _found(model):
        getattr(module, name).copy_(module.quantised(name))
    for _, module, _ in _found(model):
        q = module.quantiser
        module.quantiser = Quantiser(q.scale, q.group, q.method, q.activations, done=True)
    setattr(model.config, DONE, True)


def settled(model: Any) -> Any:
    """A model to write text with: a ternary student whose lambda is 1 is no longer quantised anew for every token; any other as it is."""
    options = ternarize_options(model.config)
    if options is not None and lambda_of(model.config, options) == 1:
        dequantise(model)
    return model
