"""Options of the objectives."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from limbeck.config.base import Count, Options, Part
from limbeck.needs import (
    AdapterFactors,
    AttentionQKV,
    AttentionStream,
    Deltas,
    HeadHidden,
    InputMoments,
    Need,
    RouterLogits,
    TopK,
)
from limbeck.registry import Registry

OBJECTIVES = Registry("objective")

Weight = Annotated[float, Field(ge=0)]


class Ramp(Options):
    """A weight that moves in a straight line over the first steps and then stays."""

    ramp: tuple[Weight, Weight]
    """From the first to the second."""
    steps: Count
    """Steps that it takes."""

    def at(self, step: int) -> float:
        """The weight of a step; the first is step 0."""
        start, end = self.ramp
        return start + (end - start) * min(step / self.steps, 1.0)

    def __format__(self, spec: str) -> str:
        start, end = self.ramp
        return f"({format(start, spec)} to {format(end, spec)} in {self.steps} steps)"


class ObjectiveOptions(Part):
    """Fields that every objective has."""

    weight: Weight | Ramp = 1.0
    """Factor of this loss in the sum; `{ramp: [0, 0.1], steps: 500}` goes from one to the other.  With 0 it is measured in validations
    alone, and costs training nothing."""

    @property
    def schedule(self) -> Ramp | None:
        """How the weight moves, if it does."""
        return self.weight if isinstance(self.weight, Ramp) else None

    def observes(self) -> tuple[Need, ...]:
        """What it must see inside the student."""
        return ()

    def weight_at(self, step: int) -> float:
        """The weight of a step; the first is step 0."""
        return self.weight.at(step) if isinstance(self.weight, Ramp) else self.weight


class FusedOptions(ObjectiveOptions):
    """Fields of the objectives that are fused with the head."""

    chunk: int | None = Field(None, ge=1)
    """Tokens whose logits exist at one time; null: 128 on a CPU, 1024 elsewhere."""


class DivergenceOptions(FusedOptions):
    """Fields of the divergences from a teacher."""

    temperature: float = Field(1.0, gt=0)
    """Both distributions are tempered; value and gradient carry the factor T squared."""


@OBJECTIVES.register("limbeck.objectives.ce:CrossEntropy")
class CrossEntropyOptions(FusedOptions):
    """Next-token cross-entropy on the labels."""

    kind: Literal["ce"] = "ce"


@OBJECTIVES.register("limbeck.objectives.kl:ForwardKL")
class ForwardKLOptions(DivergenceOptions):
    """Forward KL(teacher || student) over the whole vocabulary, fused with both heads and chunked over valid tokens."""

    kind: Literal["kl"] = "kl"

    def needs(self) -> tuple[Need, ...]:
        return (HeadHidden(),)


@OBJECTIVES.register("limbeck.objectives.reverse_kl:ReverseKL")
class ReverseKLOptions(DivergenceOptions):
    """Reverse KL(student || teacher) over the whole vocabulary."""

    kind: Literal["reverse_kl"] = "reverse_kl"

    def needs(self) -> tuple[Need, ...]:
        return (HeadHidden(),)


@OBJECTIVES.register("limbeck.objectives.jsd:JSD")
class JSDOptions(DivergenceOptions):
    """Generalised Jensen-Shannon divergence over the whole vocabulary, against M = (1 - beta) student + beta teacher."""

    kind: Literal["jsd"] = "jsd"
    beta: float = Field(0.5, gt=0, lt=1)
    """Weight of KL(teacher || M), and of the teacher in M; the ends are `kl` and `reverse_kl`."""

    def needs(self) -> tuple[Need, ...]:
        return (HeadHidden(),)


@OBJECTIVES.register("limbeck.objectives.topk_kl:TopKKL")
class TopKKLOptions(DivergenceOptions):
    """KL against the teacher's k likeliest tokens and the mass of the rest: what a served or a stored teacher gives."""

    kind: Literal["topk_kl"] = "topk_kl"
    k: int = Field(64, ge=0)
    """Ids kept; 0 with `samples`."""
    tail: Literal["tail", "zero", "renorm_both", "renorm_teacher"] = "tail"
    """What the rest becomes: one more category (`tail`), nothing (`zero`), or nothing with the kept probabilities of the teacher or
    of both made to sum to 1; the last three have another optimum than the teacher and are there for comparison."""
    direction: Literal["forward", "reverse"] = "forward"
    """`forward`: KL(teacher || student); `reverse`: KL(student || teacher), with the tail."""
    samples: int = Field(0, ge=0)
    """Ids drawn from what the k leave (from everything if k is 0), which stand for it without bias, in place of the tail category."""
    allow_approximate_tail: bool = False
    """Take a teacher that gives partition sums at T = 1 only (vLLM, SGLang) at another temperature, with an estimated tail."""

    @model_validator(mode="after")
    def _fits_together(self) -> TopKKLOptions:
        def refuse(message: str) -> None:
            raise PydanticCustomError("topk_kl", message)

        if not self.k and not self.samples:
            refuse("topk_kl: `k` is 0, which needs `samples` above 0")
        if self.direction == "reverse" and self.tail != "tail":
            refuse("topk_kl: `direction: reverse` needs `tail: tail` (a reverse KL without the rest has no meaning)")
        if self.samples and (self.tail != "tail" or self.direction != "forward"):
            refuse("topk_kl: `samples` stand for the tail: they go with `tail: tail` and `direction: forward`")
        if self.samples and self.allow_approximate_tail:
            refuse("topk_kl: `samples` are drawn at the loss's own temperature: leave `allow_approximate_tail` false")
        return self

    def needs(self) -> tuple[Need, ...]:
        return (TopK(self.k, (self.temperature,), self.samples, exact=not self.allow_approximate_tail),)


@OBJECTIVES.register("limbeck.objectives.attention_alignment:AttentionAlignment")
class AttentionAlignmentOptions(ObjectiveOptions):
    """Each mixer reproduces the attention output of its layer from the teacher's own input; layers are independent."""

    kind: Literal["attention_alignment"] = "attention_alignment"
    loss: Literal["relative_mse", "mse", "rms"] = "relative_mse"
    """`relative_mse`: squared error over the layer's teacher power, measured once on calibration batches; `mse`: mean squared
    error; `rms`: the reference repository's un-squared root mean square a token."""
    calibration_batches: int = Field(4, ge=1)
    """Micro-batches on which each layer's teacher power is measured."""

    def needs(self) -> tuple[Need, ...]:
        return (AttentionStream(),)


@OBJECTIVES.register("limbeck.objectives.weights:Weights")
class WeightsOptions(ObjectiveOptions):
    """The generated LoRA equals the teacher's; each adapter counts as one."""

    kind: Literal["weights"] = "weights"
    loss: Literal["product", "whitened", "canonical", "mse"] = "product"
    """`product`: squared error of dW over the teacher's dW squared, by r x r products; `whitened`: the same after the inputs that
    the Linears see on the probes, which is the error of their outputs; `canonical`: mean squared error of A and B against the
    teacher's in a fixed gauge; `mse`: against the teacher's own A and B (Drag-and-Drop's), which means something only if all
    teachers began alike."""

    def needs(self) -> tuple[Need, ...]:
        return (AdapterFactors(), InputMoments()) if self.loss == "whitened" else (AdapterFactors(),)


class ProbedOptions(ObjectiveOptions):
    """Fields of the objectives that run the base with generated adapters on probes."""

    microbatch: int | None = Field(None, ge=1)
    """Adapters whose probes run at one time; the backward pass then computes them again.  All of them by default."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of the probes: a delta is a small difference of large states, and bfloat16 loses part of it."""


@OBJECTIVES.register("limbeck.objectives.delta:Delta")
class DeltaObjectiveOptions(ProbedOptions):
    """The generated LoRA moves the base's hidden states on probes as the teacher does; each adapter counts as one."""

    kind: Literal["delta"] = "delta"
    loss: Literal["relative", "mse", "cosine"] = "relative"
    """`relative`: squared error over the teacher's delta squared; `mse`: mean squared error over its numbers; `cosine`: 1 - cosine,
    which leaves the size free."""

    def needs(self) -> tuple[Need, ...]:
        return (Deltas(),)


@OBJECTIVES.register("limbeck.objectives.tether:Tether")
class TetherOptions(ProbedOptions):
    """KL(base || base with the generated LoRA) on the probes' tokens, in nats a token: what no delta asks for stays as it was."""

    kind: Literal["tether"] = "tether"
    chunk: int | None = Field(None, ge=1)
    """Tokens whose logits exist at one time; null: 128 on a CPU, 1024 elsewhere."""

    def needs(self) -> tuple[Need, ...]:
        return (Deltas(),)


@OBJECTIVES.register("limbeck.objectives.norm_penalty:NormPenalty")
class NormPenaltyOptions(ObjectiveOptions):
    """The size of what is generated; each adapter counts as one."""

    kind: Literal["norm_penalty"] = "norm_penalty"
    of: Literal["factors", "product"] = "factors"
    """`factors`: mean square of A plus mean square of B (Text-to-LoRA's); `product`: the mean square of dW."""


class RouterOptions(ObjectiveOptions):
    """Fields of the objectives on the routers of a mixture of experts; a dense student is refused."""

    def observes(self) -> tuple[Need, ...]:
        return (RouterLogits(),)


@OBJECTIVES.register("limbeck.objectives.moe_balance:MoEBalance")
class MoEBalanceOptions(RouterOptions):
    """Load balance of a mixture of experts: E times the sum over experts of load and mean probability, exactly 1 where a router is
    uniform; the mean over layers, so that no layer hides another.

    The load is that of a whole step (all micro-batches and ranks), so that neither changes the loss.
    """

    kind: Literal["moe_balance"] = "moe_balance"
    weight: Weight | Ramp = 0.01
    """Factor of this loss in the sum."""
    memory: float = Field(0.0, ge=0, lt=1)
    """Share of the load so far that stays when a step's is added (a moving mean, for small batches); 0: the step before alone."""
    load: Literal["before", "step"] = "before"
    """Which step's: the one `before`, which costs nothing (the first step has none and is not pushed), or this `step`'s own, which a pass
    without gradients counts first: about a third more time."""

    @model_validator(mode="after")
    def _own_step(self) -> MoEBalanceOptions:
        if self.load == "step" and self.memory:
            raise PydanticCustomError("moe_balance", "moe_balance: `memory` is of steps before, and `load: step` looks at none: leave one out")
        return self


@OBJECTIVES.register("limbeck.objectives.router_entropy:RouterEntropy")
class RouterEntropyOptions(RouterOptions):
    """Mean entropy of a token's distribution over the experts, as a share of the uniform one's: routers are pushed to be sure.

    It works against `moe_balance` and early in a training can collapse the routing; a ramp from 0 brings it in later.
    """

    kind: Literal["router_entropy"] = "router_entropy"
    weight: Weight | Ramp = 0.001
    """Factor of this loss in the sum."""


@OBJECTIVES.register("limbeck.objectives.router_z:RouterZ")
class RouterZOptions(RouterOptions):
    """Mean squared logsumexp of the routers' logits: they stay small."""

    kind: Literal["router_z"] = "router_z"
    weight: Weight | Ramp = 0.001
    """Factor of this loss in the sum."""


@OBJECTIVES.register("limbeck.objectives.attention_relation:AttentionRelation")
class AttentionRelationOptions(ObjectiveOptions):
    """The tokens of a document stand to each other as in the teacher, by queries, by keys and by values of one layer: KL(teacher ||
    student) of softmax(A A^T / tau), summed over the three and averaged over heads (MiniLMv2, BitDistill)."""

    kind: Literal["attention_relation"] = "attention_relation"
    weight: Weight | Ramp = 1.0
    """Factor of this loss in the sum; with `ratio` that of the first steps, before it is measured."""
    layer: int = -1
    """Decoder layer of the student, from 0 or, negative, from the end; one at about four fifths of the depth serves well."""
    teacher_layer: int | None = None
    """Decoder layer of the teacher; by default the same number."""
    heads: int = Field(32, ge=1)
    """Relation heads into which queries, keys and values are regrouped, whatever heads they have."""
    temperature: float = Field(1.0, gt=0)
    """tau; rows are L2-normalised, so that similarities lie between -1 / tau and 1 / tau."""
    causal: bool = True
    """A token's relations are to those before it; off: to the whole document, as the papers have it."""
    ratio: float | None = Field(None, gt=0)
    """Instead of a fixed weight: the size of this loss's gradient over that of all others together, both measured at the layer's
    queries, keys and values on the steps before.  The step that measures first is not moved by this loss."""
    ratio_memory: float = Field(0.9, ge=0, lt=1)
    """Share of the weight so far (its logarithm) that stays when a step's measure is added; with `ratio`."""
    chunk: int | None = Field(None, ge=1)
    """Rows of relations that exist at one time; null: 256."""

    @model_validator(mode="after")
    def _one_weight(self) -> AttentionRelationOptions:
        if self.ratio is not None and (isinstance(self.weight, Ramp) or self.weight == 0):
            raise PydanticCustomError("attention_relation", "attention_relation: `ratio` moves the weight by itself: leave `weight` out")
        return self

    @property
    def source_layer(self) -> int:
        """The teacher's layer."""
        return self.layer if self.teacher_layer is None else self.teacher_layer

    def needs(self) -> tuple[Need, ...]:
        return (AttentionQKV((self.source_layer,)),)

    def observes(self) -> tuple[Need, ...]:
        return (AttentionQKV((self.layer,)),)
