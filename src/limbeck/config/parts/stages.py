"""Options of the stages: what a recipe is made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from limbeck.config.base import Count, From, OneOrMany, Options, Part, PartOf, Place, Seed
from limbeck.config.parts.objectives import OBJECTIVES
from limbeck.config.parts.precision import BLOCKS, types_for
from limbeck.config.parts.sources import SOURCES
from limbeck.config.parts.surgeries import SURGERIES
from limbeck.config.parts.teachers import TEACHERS, ModelSource
from limbeck.config.parts.trackers import TRACKERS
from limbeck.needs import Need, TopK, merge_needs
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
    """Parameters that share an optimiser and a learning rate."""

    role: str | None = None
    """Role of the parameters (`mixers`, `rest`)."""
    match: str | None = None
    """Or a pattern of parameter names."""
    kind: Literal["adamw", "muon", "lion"] = "adamw"
    """`adamw`; `muon`: orthogonal updates of matrices, stacked experts one by one (never for embeddings, heads or routers; it may
    harm the fine-tuning of what Adam trained); `lion`: the sign of a momentum, at 3 to 10 times lower rates than AdamW's."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay; never applied to vectors (norms, biases, decays) unless `decay_vectors`."""
    decay_vectors: bool = False
    """Decay one-dimensional parameters too."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] | None = None
    """AdamW's (by default `optim.betas`) or Lion's (by default 0.9 and 0.99)."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Muon's."""
    nesterov: bool = True
    """Muon's: look ahead along the momentum."""
    scaling: Literal["original", "moonlight"] = "original"
    """Muon's size of an update of a matrix with O outputs and I inputs: `original`: the root of max(1, O / I), for rates near 0.02;
    `moonlight`: 0.2 times the root of max(O, I), for rates and decay as AdamW has them."""
    newton_schulz: Literal["bfloat16", "float32"] = "bfloat16"
    """Muon's dtype of the products that orthogonalise."""

    @model_validator(mode="after")
    def _role_or_match(self) -> GroupOptions:
        if self.role is not None and self.match is not None:
            raise ValueError("a group takes `role` or `match`, not both")
        return self

    @model_validator(mode="after")
    def _of_its_kind(self) -> GroupOptions:
        foreign = {"betas"} if self.kind == "muon" else {"momentum", "nesterov", "scaling", "newton_schulz"}
        # A resolved recipe spells out every default, of all kinds.
        if odd := sorted(name for name in foreign if getattr(self, name) != type(self).model_fields[name].default):
            owner = "adamw and lion" if self.kind == "muon" else "muon"
            raise ValueError(f"a group of kind {self.kind} takes no {', '.join(f'`{name}`' for name in odd)}: that is for kind {owner}")
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
    """The optimiser: AdamW, Muon or Lion for each group of parameters."""

    groups: tuple[GroupOptions, ...] = Field(min_length=1)
    """Each trained parameter belongs to the first group that claims it; one left over is an error."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's, in groups that name none."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's."""
    schedule: ScheduleOptions = ScheduleOptions()
    """Learning rate over the run."""
    clip: float | None = Field(1.0, gt=0)
    """Global gradient norm; null for no clipping."""
    decay_until: float = Field(1.0, gt=0, le=1)
    """Share of the steps after which no weight decays any more.  0.5 is the second stage of BitNet b1.58: decay late in a training
    flips the signs of small latent weights."""


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
    log_form: Literal["full", "short"] = "full"
    """What a logged step looks like on the console: `full` names every measure; `short` is
    `[    10/    100] loss=2.34 lr=0.020 gnorm=1.2 tok/s=8500 elapsed=20s`, which `training.log` holds in either case."""
    trackers: Annotated[tuple[Annotated[Any, PartOf(TRACKERS)], ...], OneOrMany()] = ()
    """Where each line of `metrics.jsonl` is shown too, as it is written: `[tensorboard, {kind: wandb, project: mine}]`.  One that fails ends
    nothing; a run that goes on does so in the same place."""
    validate_every: int | None = Field(None, ge=1)
    """Steps between validations on held-out rows; none by default."""
    validate_rows: int = Field(32, ge=1)
    """Held-out rows of a validation."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Steps between checkpoints; by default ten a run and at least every 1000 steps."""
    keep_last: int = Field(2, ge=0)
    """Checkpoints kept, 0 for all (the final one is always kept).  A run that cannot have one more beside them does not start."""
    keep_every: int | None = Field(None, ge=1)
    """Keep for good, beside the last ones, every checkpoint whose step is a multiple of this: cheap frequent ones to go on from, rare ones to
    go back to."""
    save_in_background: bool = False
    """Copy what is saved to memory and write it while the next steps are done: training waits for the copy alone, and host memory for
    one more set of weights and optimiser state is needed."""
    canary: bool = True
    """Score the first row when a checkpoint is written and again when it has been read: weights that give other numbers are refused."""
    checkpoints: Place | None = None
    """Folder of the checkpoints, `step_N/` and `final/`: on another disk, say.  By default `checkpoints/` in the stage's own."""
    on_out_of_memory: Literal["stop", "halve"] = "stop"
    """`stop`: the run ends and says which micro-batch fits; `halve`: it goes on with that one, which takes the same steps in more
    passes.  On one rank; of several, each would have to know when another has failed."""
    zero_stage: Literal[1, 2, 3] = 3
    """On several ranks: 3 shards parameters, gradients and optimiser state, and puts gathered blocks away after the forward pass; 2 (and 1,
    here the same) keeps them for the backward pass, which needs more memory and less communication."""
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

    @model_validator(mode="after")
    def _trackers_differ(self) -> LoopOptions:
        kinds = [tracker.kind for tracker in self.trackers]
        if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
            raise ValueError(f"`trackers` names {twice!r} {kinds.count(twice)} times: once is enough")
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
        try:
            merge_needs(need for objective in self.objectives for need in objective.needs())
        except ValueError as error:
            gaps.append(str(error))
        if all(objective.weight == 0 for objective in self.objectives):
            gaps.append("every objective has weight 0, so nothing would train: give one of them a weight")
        streaming = [o.kind for o in self.objectives if o.kind == "attention_alignment"]
        if streaming and len(self.objectives) > 1:
            gaps.append("objective 'attention_alignment' streams layer by layer and stands alone: the others need a later stage")
        if self.grid and self.loop.checkpoints is not None:
            gaps.append("`loop.checkpoints` is one folder, and a grid is several runs: leave it out")
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


class GgufOptions(Options):
    """A file for llama.cpp."""

    type: Literal["auto", "tq2_0", "tq1_0", "q2_0", "f32", "bf16"] = "auto"
    """Type of the ternary weights: `tq2_0` (2.06 bits a weight, fastest on x86), `tq1_0` (1.69 bits), `q2_0` (2.25 bits; the only one
    for groups of 64 and 128, and slower than bf16 on x86).  `auto` is the first that fits each weight.  `f32` and `bf16`: all weights."""
    scale: Literal["row", "tensor", "expert", "group"] | None = None
    """What shares a scale: that of the training, or with `force` the one to round with (`row`)."""
    group_size: int | None = Field(None, ge=32)
    """A scale for each so many inputs: 256 and its multiples for `tq2_0` and `tq1_0`, 64 and 128 go to `q2_0`.  By default as trained."""
    verify: bool = False
    """Load the file in llama.cpp and compare probabilities and token ids with torch; an error if they differ."""
    force: bool = False
    """Round a model that was not trained ternary all the same, and say how much worse it is on held-out text."""

    @model_validator(mode="after")
    def _holdable(self) -> GgufOptions:
        block = BLOCKS.get(self.type)
        if block and self.group_size and self.group_size % block:
            fits = types_for(self.group_size, self.group_size)
            raise ValueError(
                f"{self.type} holds one scale for {block} weights, and groups of {self.group_size} would be stored wrong: "
                f"set the type to {' or '.join(fits) if fits else 'bf16'} or leave the group size out"
            )
        if self.scale == "group" and self.group_size is None:
            raise ValueError("scale 'group' needs the group size")
        return self


@STAGES.register("limbeck.stages.export:ExportStage")
class ExportStageOptions(StageOptions):
    """Write a model folder that leaves the project."""

    kind: Literal["export"] = "export"
    from_: str = Field(alias="from")
    """The train stage whose model is exported."""
    to: Annotated[tuple[Literal["hf", "native", "peft", "gguf"], ...], Field(min_length=1), OneOrMany()] = ("hf",)
    """`hf`: a Hugging Face folder, which `import limbeck` loads.  `native`: the same function as a `Qwen3_5ForCausalLM`, which stock
    transformers and servers load; for Qwen3-style teachers and mixers of the preset `native`.  `peft`: what a LoRA generator writes
    for some conditions, one PEFT folder each.  `gguf`: a file for llama.cpp."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Weights' dtype in the folder (`gguf`: of those that are not ternary); bfloat16 by default, float32 for `peft`."""
    gguf: GgufOptions = GgufOptions()
    """`gguf`: types, scales and the check."""
    conditions: tuple[str, ...] = ()
    """`peft`: conditions of the generator's data for which adapters are written, by name or by a pattern such as `math/*`."""
    prompts: dict[str, Annotated[tuple[str, ...], Field(min_length=1), OneOrMany()]] = Field(default_factory=dict)
    """`peft`: texts that the generator reads, by the name of the adapter that it writes for them."""

    @model_validator(mode="after")
    def _what_for(self) -> ExportStageOptions:
        given = bool(self.conditions or self.prompts)
        if ("peft" in self.to) != given:
            raise ValueError("`to: peft` writes the adapters that a generator makes for `conditions` or `prompts`: give both or neither")
        if "peft" in self.to and len(self.to) > 1:
            raise ValueError("`to: peft` is for LoRA generators and the others for models: use two stages")
        return self


RANKING = ("ga_s2", "greedy", "restore_one", "replace_one", "halo", "residual")
"""Methods that put all layers in an order."""


class ShortDistilOptions(Options):
    """The short distillation that `ga_s2` gives each of its candidates, and `sets: distil` each set."""

    optim: OptimOptions
    """Optimiser; the schedule is `constant`, so that a run which is stopped early is the beginning of a whole one."""
    loop: LoopOptions
    """Budget of one candidate."""
    rungs: int = Field(4, ge=1)
    """The budget is spent in so many equal parts; after each the candidate is scored on held-out data."""
    margin: float | None = Field(0.1, ge=0)
    """A candidate stops after a part when `keep` others, earlier in the order of the free scores, were better at the same point by
    more than this share of their score; null lets all of them finish."""
    teacher_cache: Count | None = 10**9
    """Bytes of memory in which the teacher's answers are kept: candidates meet the same batches, so it is asked once for all
    of them.  Null asks it anew."""

    @model_validator(mode="after")
    def _constant(self) -> ShortDistilOptions:
        if self.optim.schedule.kind != "constant":
            raise ValueError(
                f"optim.schedule '{self.optim.schedule.kind}' depends on the length of the run, so that a candidate stopped early "
                "could not be compared: set `schedule: {kind: constant}`"
            )
        if self.loop.trackers:
            raise ValueError("loop.trackers: candidates are many short trainings whose scores the ranking shows: give trackers to train stages")
        return self


@STAGES.register("limbeck.stages.rank_layers:RankLayersStage")
class RankLayersStageOptions(StageOptions):
    """Which layers stay softmax: rank them, choose `keep` of them, and compare the choice with controls.

    `student: {from: align, keep: {from: select}}` in a later train stage reads the choice.
    """

    kind: Literal["rank_layers"] = "rank_layers"
    from_: str = Field(alias="from")
    """The train stage whose student has a mixer in every layer that may be kept; its base is the teacher."""
    keep: int = Field(ge=1)
    """How many layers stay softmax."""
    method: Literal["ga_s2", "greedy", "restore_one", "replace_one", "halo", "residual", "uniform", "random"] = "greedy"
    """Whose choice is kept.  `greedy`: the best layer beside those chosen before, without training.  `ga_s2`: each layer alone
    softmax, after a short distillation; two layers that do the same work both rank high.  `restore_one`: softmax back in one layer
    of the all-linear student, without training.  `replace_one`: one mixer in the teacher; `halo`: the same by recall lost over text
    lost.  `residual`: error of the mixer on the teacher's input.  `uniform` and `random` are controls."""
    compare: tuple[Literal["ga_s2", "greedy", "restore_one", "replace_one", "halo", "residual"], ...] = (
        "greedy", "restore_one", "replace_one", "halo", "residual",
    )  # fmt: skip
    """Methods computed beside it."""
    data: DataOptions | From | None = None
    """Text; by default that of the `from` stage.  Scores come from its held-out documents."""
    rows: int = Field(16, ge=1)
    """Held-out rows of text that a score uses; sets are compared on as many others."""
    recall: RecallOptions = RecallOptions(rows=4)
    """Probes of long-range recall; sets are compared on others of the same make."""
    recall_weight: float = Field(0.5, ge=0, le=1)
    """Share of recall in a score, which is a KL to the teacher in nats a token: the rest is text.  Text alone picks the wrong
    layers."""
    candidates: Literal["all"] | Annotated[int, Field(ge=1)] = "all"
    """Layers that `ga_s2` distils: all, or so many that are best by `restore_one`."""
    distil: ShortDistilOptions | None = None
    """The short distillation; needed by `ga_s2` and `sets: distil`."""
    random_sets: int = Field(5, ge=5)
    """Random sets beside the chosen ones."""
    sets: Literal["zero_shot", "distil"] = "zero_shot"
    """How sets are compared: as they are restored, or after the short distillation."""
    oracle: bool = False
    """Measure every set of `keep` layers."""
    oracle_sets: int = Field(100, ge=1)
    """The oracle is refused when there are more sets than this."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of scoring."""

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods that are computed, each once, in a fixed order."""
        return tuple(name for name in RANKING if name == self.method or name in self.compare)

    @model_validator(mode="after")
    def _short_distil(self) -> RankLayersStageOptions:
        trains = ["method 'ga_s2'"] if "ga_s2" in self.methods else []
        trains += ["sets: distil"] if self.sets == "distil" else []
        if trains and self.distil is None:
            raise ValueError(f"{trains[0]} distils each candidate for a short while: give `distil: {{optim: ..., loop: {{tokens: ...}}}}`")
        if isinstance(self.candidates, int) and self.candidates < self.keep:
            raise ValueError(f"candidates: {self.candidates} are fewer than the {self.keep} layers to keep")
        return self
