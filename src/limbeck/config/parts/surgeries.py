"""Options of the surgeries: what is done to a base model to make a student of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from limbeck.config.base import From, OneOrMany, Options, Part, PartOf, Place
from limbeck.config.parts.mixers import MIXERS
from limbeck.config.parts.precision import BLOCKS, PlanRule, TargetType, types_for
from limbeck.registry import Registry

SURGERIES = Registry("surgery")


@SURGERIES.register("limbeck.students.hybridize:Hybridize")
class HybridizeOptions(Part):
    """Replace softmax attention by a mixer in every layer that is not kept."""

    kind: Literal["hybridize"] = "hybridize"
    mixer: Annotated[Any, PartOf(MIXERS)] = Field({"kind": "gated_deltanet"})
    """What replaces attention."""
    keep: tuple[int, ...] | Literal["all"] = ()
    """Layers (from 0) that stay softmax; negative numbers count from the end."""
    calibration_rows: int = Field(16, ge=0)
    """Rows of the training text on which fresh mixers are fitted to the attention before the first step of a stage with
    `teacher: self`: forget rates to how far each head looks back, and the scale of each head.  0 leaves the neutral start."""
    gqa: Literal["heads", "rows"] = "heads"
    """How grouped key/value weights are expanded to one head a query head.  `rows` repeats weight rows as the reference
    repository did, which scrambles every head: it exists as a control for experiments."""


@SURGERIES.register("limbeck.students.ternarize:Ternarize")
class TernarizeOptions(Part):
    """Compute with weights in {-1, 0, 1} times a scale, and train the full-precision weights behind them."""

    kind: Literal["ternarize"] = "ternarize"
    plan: Literal["auto", "moe_experts", "dense"] | tuple[PlanRule, ...] = "auto"
    """Which weights are ternary.  `moe_experts`: the routed experts alone; `dense`: the projections of attention (or of the mixers
    in its place) and of the MLP; `auto`: the first where the model has routed experts, else the second.  Or rules, of which the
    first that matches a parameter's name decides."""
    scale: Literal["row", "tensor", "expert", "group"] = "row"
    """What shares one scale: a row, a whole tensor, one expert, or `group` neighbouring inputs of a row."""
    group: int | None = Field(None, ge=32)
    """Inputs to a scale (`scale: group`).  256 and its multiples fit every type of file, 64 and 128 only Q2_0."""
    method: Literal["absmean", "twn", "mse", "elastic"] = "absmean"
    """How scales are found: mean size (BitNet b1.58), mean size of the large ones (TWN), least squared error, or learnt (ParetoQ),
    starting at least squared error."""
    activations: Literal["none", "token", "q8_K"] = "none"
    """Rounding of what ternary weights are multiplied with: `token`: 8 bits, one scale a token; `q8_K`: exactly what llama.cpp does
    before TQ1_0 and TQ2_0."""
    warmup: int = Field(0, ge=0)
    """Steps over which a pretrained model is moved from its own weights to the ternary ones (lambda from 0 to 1).  0 computes with
    ternary weights from the start."""
    export: Annotated[tuple[TargetType, ...], OneOrMany()] = ()
    """File types that the student must fit without loss: checked before training."""
    sub_norm: bool = False
    """An RMSNorm with a learnt weight in front of the ternary output projections of attention and down projections (SubLN of BitNet
    b1.58 and BitDistill).  It changes what a pretrained model computes from the first step on, and no GGUF file can hold it."""

    @property
    def foreign(self) -> str | None:
        """Why no other program computes such a student; None where some do."""
        if not self.sub_norm:
            return None
        return (
            "the student has `sub_norm`: a norm in front of its output and down projections, for which llama.cpp's and Qwen3.5's graphs have "
            "no place, and which cannot be folded into the weights behind it (train without `sub_norm` for such a file)"
        )

    @model_validator(mode="after")
    def _fits_together(self) -> TernarizeOptions:
        if self.sub_norm and self.export:
            raise ValueError(
                f"no GGUF file can hold the norms of `sub_norm` (llama.cpp's graphs have no place for them), and `export` asks for "
                f"{', '.join(self.export)}: leave out one of the two"
            )
        if (self.scale == "group") != (self.group is not None):
            raise ValueError("`group` is the number of inputs to a scale of `scale: group`: give both or neither")
        for kind in self.export:
            if (self.group or 0) % BLOCKS[kind]:
                fits = types_for(self.group or 0, self.group)
                raise ValueError(
                    f"{kind} holds one scale for {BLOCKS[kind]} weights, and groups of {self.group} would be stored wrong: "
                    f"use {' or '.join(fits) or 'another group'}, or scale: row"
                )
        return self


@SURGERIES.register("limbeck.students.hyper_connections:HyperConnections")
class HyperConnectionsOptions(Part):
    """Carry several residual streams, mixed by doubly stochastic matrices (mHC, arXiv 2512.24880; mHC-lite, arXiv 2601.05732).

    The student starts as the model with one stream.  No GGUF or native export can hold it.
    """

    kind: Literal["hyper_connections"] = "hyper_connections"
    streams: Literal[2, 4] = 4
    """Residual streams: copies of the embedding at the start, averaged at the end."""
    mixing: Literal["sinkhorn", "permutation"] = "sinkhorn"
    """How the matrix that mixes the streams becomes doubly stochastic: rows and columns made to sum to 1 in turns (mHC), or a mixture
    of all permutations (mHC-lite), exact without iterating."""
    iterations: int = Field(20, ge=1)
    """Turns of `mixing: sinkhorn`."""
    dynamic: bool = True
    """Let the mixing depend on the token, by a part that starts at 0; else each sublayer has its numbers for all tokens."""

    @property
    def foreign(self) -> str | None:
        """Why no other program computes such a student."""
        return (
            f"the student has {self.streams} residual streams (`hyper_connections`), and llama.cpp's and Qwen3.5's graphs of these families "
            "have one (train without that surgery for such a file)"
        )

    @model_validator(mode="after")
    def _fits_together(self) -> HyperConnectionsOptions:
        if self.mixing != "sinkhorn" and self.iterations != type(self).model_fields["iterations"].default:
            raise ValueError(f"`iterations` are of `mixing: sinkhorn`, and this is {self.mixing}, which is exact at once: leave them out")
        return self


class ReaderOptions(Options):
    """How condition states become a few latent vectors."""

    kind: Literal["perceiver", "transformer"] = "perceiver"
    """`perceiver`: learned latents attend to all states of all texts; `transformer`: a plain encoder over the states, averaged to
    one vector."""
    blocks: int = Field(2, ge=1)
    """Blocks of cross-attention, self-attention and MLP (perceiver), or encoder layers."""
    heads: int = Field(4, ge=1)
    """Attention heads."""
    latents: int = Field(16, ge=1)
    """Latent vectors (perceiver)."""


@SURGERIES.register("limbeck.students.generator.student:GeneratorStudent")
class LoraGeneratorOptions(Part):
    """A network that reads a condition and emits a LoRA for the frozen base."""

    kind: Literal["lora_generator"] = "lora_generator"
    targets: Annotated[tuple[str, ...], Field(min_length=1), OneOrMany()] = ("attention",)
    """Linears that the LoRA changes: `attention`, `mlp`, `all`, or names such as `q_proj`, as the loaded model has them."""
    rank: int = Field(16, ge=1)
    """Rank of the LoRA."""
    alpha: float = Field(32.0, gt=0)
    """The LoRA is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    condition: Literal["base", "sentence", "none"] = "base"
    """Whose states are read: the frozen base's own, a sentence encoder's, or none at all: one static LoRA for every condition,
    the control that a generator has to beat."""
    layer: int | None = None
    """Layer of the base whose states are read (negative ones count from the end); two thirds of the way up by default."""
    encoder: Place | None = None
    """Folder or hub name of the sentence encoder."""
    decoder: Literal["queries", "hyperconv"] = "queries"
    """`queries`: one query a layer, Linear and rank, heads shared by layers and ranks.  `hyperconv`: cascaded convolutions that
    write the tokens of Drag-and-Drop, the published baseline."""
    width: int = Field(128, ge=8)
    """Width of the generator."""
    trunk: int = Field(2, ge=0)
    """Residual MLP blocks between the queries and the heads."""
    reader: ReaderOptions = ReaderOptions()
    """How the states are read."""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights' dtype of the frozen base; the LoRA and the generator are float32 whatever it is."""
    start: From | Place | None = None
    """A LoRA that every generated one begins as: a PEFT folder, or `{from: stage}` of a static generator.  By default A is drawn
    as PEFT does and B is 0."""

    @model_validator(mode="after")
    def _fits_together(self) -> LoraGeneratorOptions:
        if (self.condition == "sentence") != (self.encoder is not None):
            raise ValueError("`encoder` names the sentence encoder of `condition: sentence`: give both or neither")
        if self.width % self.reader.heads:
            raise ValueError(f"width {self.width} cannot be split over {self.reader.heads} heads: choose a multiple")
        if self.decoder == "hyperconv" and (self.condition == "none" or self.start is not None):
            raise ValueError("decoder 'hyperconv' writes whole adapters from a condition: it goes without `start` and with a condition")
        return self


@SURGERIES.register("limbeck.students.generator.predictor:DeltaPredictor")
class DeltaPredictorOptions(Part):
    """A network that reads a condition and predicts the delta of its adapter, by which adapters are retrieved and merged.

    It trains under the objective `delta`; `evaluate_adapters` judges it by its `predictors`.
    """

    kind: Literal["delta_predictor"] = "delta_predictor"
    condition: Literal["base", "sentence"] = "base"
    """Whose states are read: the frozen base's own, or a sentence encoder's."""
    layer: int | None = None
    """Layer of the base whose states are read (negative ones count from the end); two thirds of the way up by default."""
    encoder: Place | None = None
    """Folder or hub name of the sentence encoder."""
    width: int = Field(128, ge=8)
    """Width of the network."""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights' dtype of the frozen base."""
    reader: ReaderOptions = ReaderOptions()
    """How the states are read."""

    @model_validator(mode="after")
    def _fits_together(self) -> DeltaPredictorOptions:
        if (self.condition == "sentence") != (self.encoder is not None):
            raise ValueError("`encoder` names the sentence encoder of `condition: sentence`: give both or neither")
        if self.width % self.reader.heads:
            raise ValueError(f"width {self.width} cannot be split over {self.reader.heads} heads: choose a multiple")
        return self
