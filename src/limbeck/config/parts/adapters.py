"""Options of the stages that train, measure and judge adapters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from limbeck.config.base import Count, From, OneOrMany, Options, Place, Seed
from limbeck.config.parts.stages import STAGES, GroupOptions, OptimOptions, StageOptions
from limbeck.config.parts.teachers import ModelSource


class AdapterOptions(Options):
    """The shape of the LoRAs."""

    targets: Annotated[tuple[str, ...], Field(min_length=1), OneOrMany()] = ("attention",)
    """Linears that they change: `attention`, `mlp`, `all`, or names such as `q_proj`, as the loaded model has them."""
    rank: int = Field(16, ge=1)
    """Rank."""
    alpha: float = Field(32.0, gt=0)
    """They are scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    init: Literal["shared", "independent"] = "shared"
    """Whether all LoRAs begin with one A or each with its own; B begins at 0."""


class PoolLoopOptions(Options):
    """How long the pool trains, and how much at a time."""

    steps: Count
    """Optimiser steps; in each of them every adapter sees `rows` rows of its own condition."""
    rows: int = Field(2, ge=1)
    """Rows of each adapter in a step."""
    together: int | None = Field(None, ge=1)
    """Adapters in one forward pass; all by default.  Fewer need less memory and change nothing else."""
    precision: Literal["float32", "bfloat16", "float64"] = "bfloat16"
    """Compute dtype (autocast); adapters are float32 (float64 for checks)."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass."""
    log_every: int = Field(10, ge=1)
    """Steps between logged lines."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Steps between checkpoints; ten in a run by default."""
    keep_last: int = Field(2, ge=1)
    """Checkpoints kept."""


@STAGES.register("limbeck.stages.train_adapters:TrainAdaptersStage")
class TrainAdaptersStageOptions(StageOptions):
    """A teacher for every condition: LoRAs trained all at once in one batch, or fully fine-tuned models one after the other."""

    kind: Literal["train_adapters"] = "train_adapters"
    base: ModelSource
    """The frozen base: a folder, a hub name, `builtin:NAME` or `{from: stage}`."""
    conditions: From
    """The prepare_conditions stage."""
    mode: Literal["lora", "full"] = "lora"
    """`lora`: a pool of adapters.  `full`: a copy of the base for each condition, of which all parameters train; its behaviour can be
    measured and matched, its weights cannot."""
    adapters: AdapterOptions = AdapterOptions()
    """Their shape (`mode: lora`)."""
    inits: int = Field(1, ge=1)
    """Adapters for each condition, with random numbers of their own."""
    splits: tuple[Literal["seen", "held_out_slice", "held_out_source", "mix"], ...] = ("seen", "held_out_slice", "held_out_source", "mix")
    """Conditions that get teachers; those of held-out ones are for judging alone."""
    optim: OptimOptions = OptimOptions(groups=(GroupOptions(lr=1e-3),), clip=None)
    """Optimiser; one learning rate, and no clipping, which would couple the adapters (`mode: full` may clip)."""
    loop: PoolLoopOptions
    """Budget of each adapter."""

    @model_validator(mode="after")
    def _independent(self) -> TrainAdaptersStageOptions:
        if len(self.optim.groups) != 1 or self.optim.groups[0].role or self.optim.groups[0].match:
            raise ValueError("optim.groups: adapters of a pool have one learning rate: give one group with `lr` alone")
        if self.mode == "lora" and self.optim.clip is not None:
            raise ValueError("optim.clip: the gradients of a pool have one global norm, so clipping would couple its adapters: set `clip: null`")
        if self.mode == "full" and self.inits != 1:
            raise ValueError("inits: a fully fine-tuned model begins at the base, so there is one for each condition")
        return self


class ProbeOptions(Options):
    """Texts on which behaviour is measured."""

    kind: Literal["diverse", "generic", "domain", "conditions", "texts"] = "diverse"
    """`diverse`: short texts of many kinds; `generic`: the five instruction templates of Delta Activations; `domain`: prompts of one
    domain; `conditions`: snippets of the seen conditions' training text; `texts`: your own."""
    count: int | None = Field(None, ge=1)
    """At most so many; all there are by default (32 of `conditions`)."""
    length: int = Field(256, ge=4)
    """Tokens of a probe at most."""
    domain: Literal["math", "code", "commonsense"] | None = None
    """Of `domain` probes."""
    texts: tuple[str, ...] = ()
    """Of `texts` probes."""
    conditions: From | None = None
    """The prepare_conditions stage of `conditions` probes."""
    seed: Seed = 0
    """Of the drawn snippets."""

    @model_validator(mode="after")
    def _complete(self) -> ProbeOptions:
        for kind, given in (("domain", self.domain), ("texts", self.texts or None), ("conditions", self.conditions)):
            if (self.kind == kind) != (given is not None):
                raise ValueError(f"`{kind}` goes with `kind: {kind}`: give both or neither")
        return self


class RepresentationOptions(Options):
    """What is read of a model on the probes."""

    tokens: Literal["all", "mean", "last"] = "all"
    """Every token's state, their mean, or the last token's."""
    per_probe: bool = True
    """Keep probes apart, or average over them."""
    layers: Annotated[tuple[int, ...], Field(min_length=1), OneOrMany()] = (-1,)
    """Layers whose states are read; negative numbers count from the end."""
    join: Literal["concat", "mean"] = "concat"
    """How several layers become one state."""
    final_norm: bool = True
    """Read the last layer after the final norm."""
    projection: int | None = Field(None, ge=1)
    """Map states to so many numbers by a fixed random matrix."""
    what: Literal["states", "likelihoods"] = "states"
    """`likelihoods`: the log-likelihoods of continuations that the base sampled, which can be compared across backbones (Delta
    Meaning); the fields above are not used then."""
    continuations: int = Field(8, ge=1)
    """Continuations of each probe (`likelihoods`)."""
    continuation_tokens: int = Field(16, ge=1)
    """Their length (`likelihoods`)."""

    @model_validator(mode="after")
    def _meaningful(self) -> RepresentationOptions:
        if self.tokens == "all" and not self.per_probe:
            raise ValueError("`tokens: all` cannot be averaged over probes of different text: set `per_probe: true`, or `tokens: mean`")
        return self


PAPER = RepresentationOptions(tokens="last", per_probe=False)
"""Delta Activations as published: the last token of the last layer, averaged over the probes."""


@STAGES.register("limbeck.stages.measure_deltas:MeasureDeltasStage")
class MeasureDeltasStageOptions(StageOptions):
    """How each adapter of a pool moves the base's hidden states on probes.  Measured once, kept by content."""

    kind: Literal["measure_deltas"] = "measure_deltas"
    pool: From | dict[str, Place] = Field(union_mode="left_to_right")
    """`{from: stage}` of a train_adapters stage, or PEFT folders by name."""
    base: ModelSource | None = None
    """The base of PEFT folders; a pool knows its own."""
    probes: ProbeOptions = ProbeOptions()
    """Texts."""
    paper: bool = False
    """Delta Activations exactly as published: its five probes, last layer, last token, mean over probes.  Measurably the weakest on
    small bases."""
    represent: RepresentationOptions = RepresentationOptions()
    """What is read."""
    moments: bool = False
    """Measure the second moments of the Linears' inputs too, for `weights` with `loss: whitened`."""
    together: int = Field(8, ge=1)
    """Adapters in one forward pass."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; differences are taken in float32."""

    @model_validator(mode="after")
    def _paper(self) -> MeasureDeltasStageOptions:
        if self.paper and (self.probes != ProbeOptions() or self.represent != RepresentationOptions()):
            raise ValueError("`paper: true` sets probes and representation itself: leave them out")
        if isinstance(self.pool, dict) and self.base is None:
            raise ValueError("`base`: PEFT folders need the base that they were made for")
        return self

    @property
    def resolved_probes(self) -> ProbeOptions:
        """Probes, with `paper` in force."""
        return ProbeOptions(kind="generic") if self.paper else self.probes

    @property
    def resolved_represent(self) -> RepresentationOptions:
        """Representation, with `paper` in force."""
        return PAPER if self.paper else self.represent


class CompositionOptions(Options):
    """What is measured of mixed conditions, each against a teacher that was really trained on the mix."""

    density: float = Field(0.2, gt=0, le=1)
    """Share of entries that the TIES merge keeps."""


@STAGES.register("limbeck.stages.evaluate_adapters:EvaluateAdaptersStage")
class EvaluateAdaptersStageOptions(StageOptions):
    """A generator beside every control: loss on test text, share of the teacher's gain, deltas on fresh probes, mixed conditions."""

    kind: Literal["evaluate_adapters"] = "evaluate_adapters"
    from_: str = Field(alias="from")
    """The train stage whose generator is judged."""
    against: tuple[str, ...] = ()
    """Other generators, by their stages; a static one (`condition: none`) is the multi-task control."""
    predictors: tuple[str, ...] = ()
    """Predictors of deltas, by their stages: adapters of seen conditions are retrieved by what they predict, and merged."""
    deltas: From | None = None
    """The measured deltas of the pool, among which a predictor's nearest are looked for."""
    top: int = Field(3, ge=1)
    """Adapters that are merged after retrieval."""
    temperature: float = Field(0.1, gt=0)
    """Their weights are the softmax of cosine / temperature."""
    pool: From
    """The teachers: a train_adapters stage (`mode: lora`) with all splits that are judged."""
    splits: tuple[Literal["seen", "held_out_slice", "held_out_source"], ...] = ("seen", "held_out_slice", "held_out_source")
    """Conditions that are judged."""
    rows: int = Field(8, ge=1)
    """Test rows of each condition, at most."""
    draws: int = Field(2, ge=1)
    """Sets of condition texts for which each adapter is generated; losses are averaged over them."""
    probes: ProbeOptions | None = ProbeOptions()
    """Texts on which deltas are compared; they should be others than those of training.  Null for none."""
    represent: RepresentationOptions = RepresentationOptions()
    """How they are read."""
    composition: CompositionOptions | None = None
    """Judge mixed conditions too (the conditions' `mixes`)."""
    together: int = Field(8, ge=1)
    """Conditions in one forward pass."""
    bootstrap: int = Field(2000, ge=100)
    """Resamples of the conditions for each interval."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""

    @model_validator(mode="after")
    def _retrieval(self) -> EvaluateAdaptersStageOptions:
        if bool(self.predictors) != (self.deltas is not None):
            raise ValueError("`predictors` retrieve among measured `deltas`: give both or neither")
        if self.represent.what != "states":
            raise ValueError("represent: adapters are judged by states; `what: likelihoods` is for measure_deltas")
        return self
