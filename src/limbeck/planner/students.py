"""A student: a model with its surgeries done on paper, the role of each parameter, and what trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import factorial
from typing import Any

from limbeck.config.parts.precision import plan_for, precision_of
from limbeck.planner.architecture import Architecture, Weight, attention_weights, layer_of
from limbeck.planner.devices import PlanError
from limbeck.planner.generators import Network, generator_network, predictor_network
from limbeck.planner.mixers import mixer_weights

REST, MIXERS, TERNARY, SCALES, MHC, GENERATOR = "rest", "mixers", "ternary", "scales", "mhc", "generator"
_OUTPUTS = ("o_proj", "out_proj", "dense", "down_proj")


@dataclass(frozen=True)
class Student:
    """What a stage holds of its student."""

    architecture: Architecture
    """The model with mixers, learnt scales and the like in it."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """Role of the parameters that are not ``rest``."""
    base: Architecture | None = None
    """What it was made from, where that differs."""
    network: Network | None = None
    """A generator or predictor that trains beside a frozen base."""
    frozen_dtype: str = "float32"
    """Of the base under a network."""
    surgeries: tuple[Any, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def trained(self) -> tuple[Weight, ...]:
        """What may train: the network, or the whole model."""
        return self.network.weights if self.network is not None else self.architecture.weights

    @property
    def ternary(self) -> tuple[Weight, ...]:
        """Weights that are ternary."""
        return tuple(w for w in self.architecture.weights if self.roles.get(w.name) == TERNARY)

    @property
    def streams(self) -> int:
        """Residual streams."""
        return next((s.streams for s in self.surgeries if s.kind == "hyper_connections"), 1)

    def role(self, name: str) -> str:
        """Role of a parameter."""
        return GENERATOR if self.network is not None else self.roles.get(name, REST)


def plain(architecture: Architecture) -> Student:
    """A model as it is."""
    return Student(architecture)


def operate(
    base: Student, surgeries: Sequence[Any], *, sites_text: tuple[int, int] = (1, 1), delta_size: int = 0, state_size: int | None = None
) -> Student:
    """A student after its surgeries, in order.

    ``sites_text`` is (texts, tokens) of the conditions that a generator reads, ``delta_size`` the numbers of a delta that is predicted,
    ``state_size`` the width of a sentence encoder.
    """
    student = replace(base, base=base.architecture, surgeries=tuple(surgeries)) if surgeries else base
    for options in surgeries:
        if options.kind == "hybridize":
            student = _hybridized(student, options)
        elif options.kind == "ternarize":
            student = _ternarized(student, options)
        elif options.kind == "hyper_connections":
            student = _connected(student, options)
        elif options.kind in ("lora_generator", "delta_predictor"):
            width = student.architecture.hidden if options.condition == "base" else 1 if options.condition == "none" else state_size or 384
            notes = () if options.condition != "sentence" or state_size else ("the sentence encoder is taken to be 384 wide",)
            if options.kind == "lora_generator":
                network = generator_network(student.architecture, options, width, sites_text)
            else:
                network = predictor_network(options, width, delta_size)
            student = replace(student, network=network, frozen_dtype=options.base_dtype, notes=student.notes + notes)
        else:
            note = f"surgery '{options.kind}' of a plug-in is counted as changing nothing"
            student = replace(student, notes=(*student.notes, note))
    return student


def _layers(keep: Any, count: int) -> set[int]:
    if keep == "all":
        return set(range(count))
    strange = [str(i) for i in keep if not -count <= i < count]
    if strange:
        raise PlanError(f"keep: no layer {', '.join(strange)}: the model has {count} layers, 0 to {count - 1}")
    return {i % count for i in keep}


def _with_layers(student: Student, change: Mapping[int, Any]) -> Student:
    """``change`` gives layers a mixer (its options) or, by None, their attention back."""
    model = student.architecture
    kept = [w for w in model.weights if layer_of(w.name) not in change or ".self_attn." not in w.name]
    layers = list(model.layers)
    added: list[Weight] = []
    for index, mixer in change.items():
        attention = layers[index].attention
        if attention is None:
            raise PlanError(f"surgery.hybridize: layer {index} of {model.name} is linear already: only softmax attention is converted")
        at = f"model.layers.{index}.self_attn"
        added += mixer_weights(at, mixer, attention, index) if mixer is not None else list(attention_weights(at, attention, model.family))
        layers[index] = replace(layers[index], mixer=mixer)
    roles = {name: role for name, role in student.roles.items() if layer_of(name) not in change or ".self_attn." not in name}
    roles |= {w.name: MIXERS for w in added if change[layer_of(w.name)] is not None}
    return replace(student, architecture=replace(model, layers=tuple(layers), weights=(*kept, *added)), roles=roles)


def _hybridized(student: Student, options: Any) -> Student:
    model = student.architecture
    kept = _layers(options.keep, len(model.layers))
    return _with_layers(student, {layer.index: options.mixer for layer in model.layers if layer.index not in kept})


def restored(student: Student, keep: Sequence[int] | str) -> Student:
    """A hybrid with softmax attention back in some layers."""
    layers = _layers(keep, len(student.architecture.layers))
    again = _with_layers(student, {i: None for i in layers if student.architecture.layers[i].mixer is not None})
    ternary = next((s for s in student.surgeries if s.kind == "ternarize"), None)
    return again if ternary is None else _ternary_roles(again, ternary)


def _ternary_roles(student: Student, options: Any) -> Student:
    names = [w.name for w in student.architecture.weights]
    plan = plan_for(names) if options.plan == "auto" else options.plan
    chosen = {name: TERNARY for name in names if precision_of(plan, name) == "ternary"}
    if not chosen:
        raise PlanError(
            f"surgery.ternarize: the plan makes no weight of {student.architecture.name} ternary: use `plan: dense` or rules of its own names"
        )
    return replace(student, roles={**student.roles, **chosen})


def _ternarized(student: Student, options: Any) -> Student:
    student = _ternary_roles(student, options)
    more: list[Weight] = []
    roles = dict(student.roles)
    for weight in student.ternary:
        # Gate and up are two matrices in one.
        parts = 2 if "gate_up_proj" in weight.name else 1
        *stack, rows, width = weight.shape
        if options.group is not None and width % options.group:
            raise PlanError(
                f"surgery.ternarize: {weight.name} has {width} inputs, no multiple of `group: {options.group}`: use a divisor, or scale: row"
            )
        if options.method == "elastic":
            blocks = (rows, width // (options.group or width)) if options.scale in ("row", "group") else (parts, 1)
            shape = (*(stack if options.scale != "tensor" else [1] * len(stack)), *blocks)
            more.append(Weight(f"{weight.name}_scale", shape, "scale"))
            roles[f"{weight.name}_scale"] = SCALES
        if options.sub_norm and weight.name.removesuffix(".weight").rpartition(".")[2] in _OUTPUTS:
            path = weight.name.removesuffix(".weight") if weight.name.endswith(".weight") else weight.name.rpartition(".")[0]
            more.append(Weight(f"{path}.sub_norm.weight", (width,), "norm"))
    model = student.architecture
    return replace(student, architecture=replace(model, weights=(*model.weights, *more)), roles=roles)


def _connected(student: Student, options: Any) -> Student:
    model = student.architecture
    streams = options.streams
    many = 2 * streams + (streams**2 if options.mixing == "sinkhorn" else factorial(streams))
    sandwich = any("pre_feedforward_layernorm" in w.name for w in model.weights)
    reading = ("input_layernorm", "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm")
    more: list[Weight] = []
    for layer in model.layers:
        for name in reading:
            at = f"model.layers.{layer.index}.{name}.connection"
            more.append(Weight(f"{at}.bias", (many,), "connection"))
            if options.dynamic:
                more += [Weight(f"{at}.alpha", (3,), "connection"), Weight(f"{at}.weight", (many, model.hidden), "connection")]
    roles = {**student.roles, **{w.name: MHC for w in more}}
    return replace(student, architecture=replace(model, weights=(*model.weights, *more)), roles=roles)


# -- what trains ----------------------------------------------------------------------------------------------------------


def trainable(student: Student, patterns: Iterable[str]) -> list[Weight]:
    """The parameters that ``student.train`` names: roles, ``all``, patterns of names."""
    chosen: list[Weight] = []
    words = tuple(patterns)
    for word in words:
        if not any(_matches(word, w.name, student) for w in student.trained):
            roles = sorted({student.role(w.name) for w in student.trained})
            raise PlanError(
                f"student.train: '{word}' matches no parameter; it is `all`, {', '.join(roles)}, or a pattern such as model.layers.*.mlp.*"
            )
    chosen = [w for w in student.trained if any(_matches(word, w.name, student) for word in words)]
    return chosen


def grouped(student: Student, weights: Sequence[Weight], groups: Sequence[Any]) -> list[tuple[Any, list[Weight]]]:
    """Each trained parameter under the first group of the optimiser that claims it."""
    claimed: list[tuple[Any, list[Weight]]] = [(group, []) for group in groups]
    for weight in weights:
        for group, members in claimed:
            if group.role in (None, student.role(weight.name)) and (
                group.match is None or fnmatchcase(weight.name, group.match) or group.match == "all"
            ):
                members.append(weight)
                break
        else:
            raise PlanError(f"optim.groups: no group claims {weight.name}, which trains: add a group with only a learning rate for the rest")
    return claimed


def _matches(word: str, name: str, student: Student) -> bool:
    return word == "all" or student.role(name) == word or fnmatchcase(name, word)
