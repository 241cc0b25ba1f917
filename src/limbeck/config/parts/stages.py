"""Options of the stages: what a recipe is made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from limbeck.config.base import Count, From, OneOrMany, Options, Part, PartOf, Place, Seed
from limbeck.config.parts.objectives import OBJECTIVES
from limbeck.config.parts.sources import SOURCES
from limbeck.config.parts.surgeries import SURGERIES
from limbeck.config.parts.teachers import TEACHERS, ModelSource
from limbeck.needs import Need, TopK
from limbeck.registry import Registry

STAGES = Registry("stage")


class TrainTokenizer(Options):
    """Train a byte-level BPE on the documents themselves."""

    vocabulary: int = Field(4096, ge=300)
    """Size, special tokens included."""
    special: tuple[str, ...] = ("<|endoftext|>",)
    """Special tokens; the first one ends documents and pads."""


class DataOptions(Options):
    """Text -> packed rows of tokens.  Prepared once, keyed by content, memory-mapped afterwards."""

    source: Annotated[tuple[Annotated[Any, PartOf(SOURCES, "text")], ...], Field(min_length=1), OneOrMany()]
    """One source or several; a source with a `share` fills that part of the tokens."""
    tokenizer: Place | From | TrainTokenizer
    """A folder, a hub name, `builtin:NAME`, `{from: stage}`, or `{vocabulary: 4096}` to train one."""
    sequence: int = Field(512, ge=8)
    """Tokens a row."""
    held_out: float = Field(0.02, ge=0, lt=1)
    """Share of the documents held out for validation, chosen by a hash of their text."""
    append_eos: bool = True
    """End every document with the tokenizer's end-of-text token."""
    max_tokens: Count | None = None
    """Stop after so many training tokens (all of them by default)."""
    seed: Seed = 0
    """Of the mixture and the made-up documents."""


class StudentOptions(Options):
    """A base model, what is done to it, and what trains."""

    base: ModelSource | None = None
    """Base model: a folder, a hub name, `builtin:NAME` or `{from: stage}`."""
    from_: str | None = Field(None, alias="from")
    """Go on with the student of another stage."""
    config: dict[str, Any] | None = None
    """Build a model from scratch: a Hugging Face config with its `model_type`."""
    surgery: tuple[Annotated[Any, PartOf(SURGERIES)], ...] = ()
    """What is done to the base, in order."""
    keep: tuple[int, ...] | Literal["all"] | From | None = None
    """With `from`: layers whose softmax attention is restored from the base."""
    train: Annotated[tuple[str, ...], OneOrMany()] = ("all",)
    """What trains: roles given by the surgery (`mixers`, `rest`), `all`, or parameter-name patterns such as
    `model.layers.*.mlp.*`."""
    skip_attention: float = Field(0.0, ge=0, lt=1)
    """In training each row skips a layer's attention with this probability in the last layer, falling linearly to none in
    the first (stochastic depth): what one layer alone could do is learnt by a second."""
    revision: str | None = None
    """Revision of a hub model."""

    @model_validator(mode="after")
    def _one_origin(self) -> StudentOptions:
        origins = {"base": self.base, "from": self.from_, "config": self.config}
        given = [name for name, value in origins.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of `base`, `from` and `config`, found {', '.join(given) or 'none'}")
        if self.keep is not None and self.from_ is None:
            raise ValueError(
                "`keep` restores layers of another stage's student: it goes with `from`; in a new hybrid set `surgery[].keep`"
            )
        return self


class GroupOptions(Options):
    """Parameters that share a learning rate."""

    role: str | None = None
    """Role of the parameters (`mixers`, `rest`)."""
    match: str | None = None
    """Or a pattern of parameter names."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay; never applied to vectors (norms, biases, decays) unless `decay_vectors`."""
    decay_vectors: bool = False
    """Decay one-dimensional parameters too."""

    @model_validator(mode="after")
    def _role_or_match(self) -> GroupOptions:
        if self.role is not None and self.match is not None:
            raise ValueError("a group takes `role` or `match`, not both")
        return self


class ScheduleOptions(Options):
    """Learning rate over the run, as a factor of each group's peak."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """Cosine, warm-up / stable / decay, or constant after the warm-up."""
    warmup: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    final: float = Field(0.0, ge=0, le=1)
    """Factor at the end (cosine, wsd)."""
    decay: float = Field(0.2, gt=0, le=1)
    """Share of the steps in which wsd decays."""


class OptimOptions(Options):
    """The optimiser: AdamW with groups."""

    groups: tuple[GroupOptions, ...] = Field(min_length=1)
    """Each trained parameter belongs to the first group that claims it; one left over is an error."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's."""
    schedule: ScheduleOptions = ScheduleOptions()
    """Learning rate over the run."""
    clip: float | None = Field(1.0, gt=0)
    """Global gradient norm; null for no clipping."""


class StopUnless(Options):
    """A gate: the stage fails, and later ones do not start, unless this holds at the end."""

    loss: Literal["decreases"] | None = None
    """Mean loss of the last tenth is below that of the first tenth."""
    below: float | None = None
    """Mean loss of the last tenth is below this."""


class LoopOptions(Options):
    """How long, how much at a time, and what is kept."""

    tokens: Count | None = None
    """Budget in tokens."""
    steps: Count | None = None
    """Budget in optimiser steps."""
    samples: Count | None = None
    """Budget in rows."""
    epochs: float | None = Field(None, gt=0)
    """Budget in passes over the data."""
    batch_tokens: Count = 8192
    """Tokens an optimiser step, over all ranks and micro-batches."""
    microbatch: int | None = Field(None, ge=1)
    """Rows a forward pass; the whole step's rows by default."""
    precision: Literal["float32", "bfloat16", "float64"] = "bfloat16"
    """Compute dtype (autocast); trained parameters are float32 (float64 for checks)."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass."""
    compile: bool = False
    """Compile each decoder layer with torch.compile: a minute at the start, often 1.5 times the rate; needs a C++ compiler."""
    deterministic: bool | None = None
    """Deterministic kernels; on by default on CPU."""
    log_every: int = Field(10, ge=1)
    """Steps between logged lines."""
    validate_every: int | None = Field(None, ge=1)
    """Steps between validations on held-out rows; none by default."""
    validate_rows: int = Field(32, ge=1)
    """Held-out rows of a validation."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Steps between checkpoints; by default ten a run and at least every 1000 steps."""
    keep_last: int = Field(2, ge=1)
    """Checkpoints kept (the final one is always kept)."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A non-finite gradient stops the run, or skips the step (at most ten in a row)."""
    stop_unless: StopUnless | None = None
    """Gate on the result."""

    @model_validator(mode="after")
    def _one_budget(self) -> LoopOptions:
        given = [name for name in ("tokens", "steps", "samples", "epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise ValueError(f"needs exactly one budget of `tokens`, `steps`, `samples`, `epochs`, found {found}")
        return self


class StageOptions(Part):
    """Fields that every stage has."""

    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Run the product of these settings, `{"optim.groups.0.lr": [1e-3, 3e-3], "seed": [1, 2, 3]}`, and tabulate it."""
    seed: Seed = 0
    """Seed of everything random in this stage."""


@STAGES.register("limbeck.stages.prepare:PrepareStage")
class PrepareStageOptions(StageOptions):
    """Download, filter, tokenise, chunk: no model, no GPU, runs alone."""

    kind: Literal["prepare"] = "prepare"
    data: DataOptions
    """What to prepare."""


@STAGES.register("limbeck.stages.train:TrainStage")
class TrainStageOptions(StageOptions):
    """Train a student on data, under objectives, with or without a teacher."""

    kind: Literal["train"] = "train"
    data: DataOptions | From
    """The text, or `{from: stage}` for the artefact of a prepare stage or the data of another train stage."""
    student: StudentOptions
    """What trains."""
    teacher: Annotated[Any, PartOf(TEACHERS)] | None = None
    """Where the signal comes from; none for plain language modelling."""
    objectives: tuple[Annotated[Any, PartOf(OBJECTIVES)], ...] = Field(({"kind": "ce"},), min_length=1)
    """Losses; each is divided by its own global count, weighted and summed."""
    optim: OptimOptions
    """Optimiser and schedule."""
    loop: LoopOptions
    """Budget, batch and retention."""

    @model_validator(mode="after")
    def _gaps(self) -> TrainStageOptions:
        """Needs against provides, all gaps together, before anything is loaded."""
        gaps = []
        for objective in self.objectives:
            for need in objective.needs():
                wants = f"objective '{objective.kind}' needs {type(need).__name__}"
                if self.teacher is None:
                    gaps.append(f"{wants} from a teacher, and the stage has none: add `teacher:`")
                    continue
                answer = self.teacher.provides(need)
                if answer is not True:
                    gaps.append(f"{wants}: {answer}")
        streaming = [o.kind for o in self.objectives if o.kind == "attention_alignment"]
        if streaming and len(self.objectives) > 1:
            gaps.append("objective 'attention_alignment' streams layer by layer and stands alone: the others need a later stage")
        if gaps:
            raise ValueError("; ".join(gaps))
        return self


@STAGES.register("limbeck.stages.capture:CaptureStage")
class CaptureStageOptions(StageOptions):
    """Ask a teacher about a text once and store what it says, for `teacher: {kind: stored, signals: {from: stage}}`."""

    kind: Literal["capture"] = "capture"
    data: DataOptions | From
    """The text, or `{from: stage}`.  Only positions that losses use are asked about and stored."""
    teacher: Annotated[Any, PartOf(TEACHERS)]
    """Who is asked: `local` or `http`."""
    k: int = Field(64, ge=0)
    """Likeliest ids kept at each position."""
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field((1.0,), min_length=1)
    """Temperatures at which objectives can use the signals: a logarithm of the partition sum is kept for each."""
    samples: int = Field(0, ge=0)
    """Ids drawn at each position from what the kept ones leave, at the first temperature."""
    codec: Literal["exact", "fp16", "compact"] = "compact"
    """Values in fp32, in fp16, or in a byte each (about 183 bytes a token at k = 64, 332 at 128, and a KL error below
    1e-4 nat)."""
    splits: tuple[Literal["train", "held_out"], ...] = Field(("train", "held_out"), min_length=1)
    """Sides of the text."""
    batch_tokens: Count | None = None
    """Score so many tokens of documents together; by default each document on its own, which makes its answer independent of
    all others, as a cache needs it."""

    @model_validator(mode="after")
    def _askable(self) -> CaptureStageOptions:
        if self.teacher.kind not in ("local", "http"):
            raise ValueError(f"teacher '{self.teacher.kind}' cannot be captured: `local` and `http` can; of a mixture, capture each teacher")
        if not self.k and not self.samples:
            raise ValueError("nothing to store: set `k`, `samples` or both")
        if len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError(f"temperatures {list(self.temperatures)} name one twice")
        answer = self.teacher.provides(TopK(self.k, self.temperatures, self.samples))
        if answer is not True:
            raise ValueError(str(answer))
        return self

    def provides(self, need: Need) -> bool | str:
        """Whether a `stored` teacher of these signals answers a need."""
        if not isinstance(need, TopK):
            return f"captured signals do not provide {type(need).__name__}"
        if need.k > self.k:
            return f"k = {need.k}, and k = {self.k} are captured"
        if need.samples and (need.k, need.temperatures[0]) != (self.k, self.temperatures[0]):
            return f"samples beside k = {need.k} at T = {need.temperatures[0]:g}, and they are drawn beside {self.k} at {self.temperatures[0]:g}"
        if need.samples > self.samples:
            return f"{need.samples} samples, and {self.samples} are captured"
        if not set(need.temperatures) <= set(self.temperatures) and (need.exact or 1.0 not in self.temperatures):
            return f"temperatures {list(need.temperatures)}, and {list(self.temperatures)} are captured"
        return True


class RecallOptions(Options):
    """Recall probes: made-up rows that can only be predicted by looking back."""

    tasks: tuple[Literal["repeat", "key_value", "needle"], ...] = ("repeat", "key_value")
    """Which probes."""
    distances: tuple[int, ...] = (32, 64, 128, 256)
    """Tokens between what is asked and where it stood."""
    rows: int = Field(16, ge=1)
    """Rows a probe and distance."""
    vocabulary: int | None = Field(None, ge=32)
    """How many ids are used, the tokenizer's first ordinary ones; by default as many as the recall source of the data uses,
    all of them where there is none."""


class SpeedOptions(Options):
    """Decode rate and cache size by context."""

    contexts: tuple[int, ...] = (1024, 4096, 8192, 32768)
    """Context lengths; caches are filled with random states, so that no long prefill is paid."""
    tokens: int = Field(16, ge=1)
    """Tokens decoded at each context."""


class SampleOptions(Options):
    """A continuation of each prompt by each model."""

    prompts: tuple[str, ...] = ()
    """Prompts; by default the beginnings of held-out documents."""
    tokens: int = Field(64, ge=1)
    """New tokens."""
    temperature: float = Field(0.0, ge=0)
    """0 for greedy."""


@STAGES.register("limbeck.stages.evaluate:EvaluateStage")
class EvaluateStageOptions(StageOptions):
    """Perplexity, KL and agreement, recall by distance, decode rate, KV + state bytes; students beside their teacher."""

    kind: Literal["evaluate"] = "evaluate"
    from_: str = Field(alias="from")
    """The train stage whose model is evaluated."""
    against: tuple[str, ...] = ("teacher",)
    """Beside it: `teacher` (the stage's teacher, or its base), `copy_init` (the student before any training), or stages by
    name."""
    data: DataOptions | From | None = None
    """Held-out text; by default that of the evaluated stage."""
    rows: int = Field(64, ge=1)
    """Held-out rows for perplexity, KL and agreement."""
    recall: RecallOptions | None = RecallOptions()
    """Recall probes; null for none."""
    speed: SpeedOptions | None = SpeedOptions()
    """Decode rate and bytes; null for none."""
    samples: SampleOptions | None = SampleOptions()
    """Text samples; null for none."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""


@STAGES.register("limbeck.stages.export:ExportStage")
class ExportStageOptions(StageOptions):
    """Write a model folder that leaves the project."""

    kind: Literal["export"] = "export"
    from_: str = Field(alias="from")
    """The train stage whose model is exported."""
    to: tuple[Literal["hf"], ...] = ("hf",)
    """Formats."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Weights' dtype in the folder."""
