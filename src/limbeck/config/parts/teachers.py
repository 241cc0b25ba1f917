"""Options of the teachers: where the signal comes from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from limbeck.config.address import Url
from limbeck.config.base import Count, From, Options, Part, PartOf, Place, Seed
from limbeck.needs import AdapterFactors, AttentionQKV, AttentionStream, Deltas, HeadHidden, InputMoments, Need, TopK
from limbeck.registry import Registry

TEACHERS = Registry("teacher")

ModelSource = Place | From


@TEACHERS.register("limbeck.teachers.local:LocalTeacher")
class LocalTeacherOptions(Part):
    """A frozen Hugging Face model in this process."""

    kind: Literal["local"] = "local"
    model: ModelSource
    """A folder, a hub name, `builtin:NAME`, or `{from: stage}`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights' dtype."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """Attention implementation; by default the one saved with the model, else sdpa."""
    revision: str | None = None
    """Revision of a hub model."""

    def provides(self, need: Need) -> bool | str:
        if isinstance(need, HeadHidden | TopK | AttentionQKV):
            return True
        gives = "it gives HeadHidden, TopK and AttentionQKV (objectives kl, topk_kl, attention_relation …); for attention_alignment use teacher 'self'"
        return f"teacher 'local' does not provide {type(need).__name__}; {gives}"


@TEACHERS.register("limbeck.teachers.self_teacher:SelfTeacher")
class SelfTeacherOptions(Part):
    """The student's own base, with its softmax attention: it streams every attention layer's input and output."""

    kind: Literal["self"] = "self"

    def provides(self, need: Need) -> bool | str:
        if isinstance(need, AttentionStream):
            return True
        gives = "it streams attention (objective attention_alignment); for kl use teacher 'local'"
        return f"teacher 'self' does not provide {type(need).__name__}; {gives}"


class LaunchOptions(Options):
    """Start `vllm serve` for the length of the run, and wait until it answers."""

    command: str = "vllm"
    """The program: `vllm`, or a path to it."""
    devices: tuple[int, ...] = ()
    """GPUs that it may use (`CUDA_VISIBLE_DEVICES`); none named: all that it sees."""
    tensor_parallel: int = Field(1, ge=1)
    """Over how many GPUs each layer is split."""
    expert_parallel: bool = False
    """Spread a mixture's experts over the GPUs whole instead of splitting each (needed where a split expert is no multiple of
    the quantisation's block)."""
    quantisation: str | None = None
    """vLLM's name of it, such as `fp8`; by default as the checkpoint says."""
    gpu_memory: float = Field(0.85, gt=0, le=1)
    """Share of each GPU's memory; prompt log-probabilities need what is left over."""
    max_logprobs: int = Field(128, ge=1)
    """The largest k that it answers (`--max-logprobs`)."""
    max_batch_tokens: int = Field(4096, ge=256)
    """Tokens scored in one forward (`--max-num-batched-tokens`): they bound the memory that prompt log-probabilities take."""
    arguments: tuple[str, ...] = ()
    """More words for its command line, as they are."""
    wait: float = Field(1800, gt=0)
    """Seconds until it must answer."""


@TEACHERS.register("limbeck.teachers.http.teacher:HttpTeacher")
class HttpTeacherOptions(Part):
    """A teacher behind an HTTP endpoint: `limbeck teach`, vLLM, SGLang, or one that returns whole logits."""

    kind: Literal["http"] = "http"
    url: Url
    """Where it listens, such as `http://127.0.0.1:8100`.  A name and password in it come from the environment alone:
    `https://${env:USER}:${env:PASSWORD}@host`."""
    protocol: Literal["limbeck", "vllm", "sglang", "seed"] = "limbeck"
    """What it speaks.  `vllm` and `sglang` give log-probabilities at T = 1; `limbeck` gives logits with the partition sum of
    each temperature; `seed` is `{"input_ids", "return_logits"}`, whole vocabularies as JSON."""
    model: str | None = None
    """The served model's name (vLLM); by default the first that the server lists."""
    token_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the environment variable that holds the bearer token.  The token itself is never written anywhere."""
    in_flight: int = Field(8, ge=1, le=1024)
    """Most requests under way; fewer while the server says that it is too many."""
    max_bytes: Count = 500_000_000
    """Memory for answers that wait for their turn."""
    tokens_per_request: Count = 8192
    """A micro-batch's documents are sent in order, as many at a time as have so few tokens."""
    timeout: float = Field(120, gt=0)
    """Seconds for one answer."""
    patience: float | None = Field(None, ge=0)
    """Seconds of trying one request before `on_failure` decides; by default 600 for `wait`, 30 for `skip` and `ce_only`."""
    on_failure: Literal["wait", "skip", "ce_only", "abort"] = "wait"
    """What becomes of a request that fails: `wait` tries for `patience` seconds, then the run saves a checkpoint and stops; `skip`
    leaves the positions out of every loss, `ce_only` out of the teacher's; `abort` stops at the first fault."""
    lookahead: int = Field(1, ge=0)
    """Steps whose requests go out before they are needed."""
    canary_every: int = Field(200, ge=0)
    """A fixed sequence is scored again after so many micro-batches, and a changed answer stops the run; 0 for never."""
    seed: Seed = 0
    """Of the samples that objectives with `samples` draw."""
    launch: LaunchOptions | None = None
    """Start the server (vLLM) for this run."""

    @model_validator(mode="after")
    def _launchable(self) -> HttpTeacherOptions:
        if self.launch is not None and (self.protocol != "vllm" or self.model is None):
            raise ValueError("launch starts `vllm serve MODEL`: it needs `protocol: vllm` and `model`")
        return self

    def provides(self, need: Need) -> bool | str:
        if not isinstance(need, TopK):
            return f"teacher 'http' does not provide {type(need).__name__}; it gives TopK (objective topk_kl)"
        if self.protocol == "limbeck":
            return True
        if need.samples or need.k < 1:
            return f"protocol '{self.protocol}' draws no samples: use `protocol: limbeck`, or k >= 1 and `samples: 0`"
        if self.protocol != "seed" and need.exact and need.temperatures != (1.0,):
            return (
                f"protocol '{self.protocol}' gives log-probabilities at T = 1 only: set `temperature: 1` or "
                "`allow_approximate_tail: true` on the objective, or serve the teacher with `limbeck teach`"
            )
        return True


@TEACHERS.register("limbeck.teachers.mixture:MixtureTeacher")
class MixtureTeacherOptions(Part):
    """Several teachers: each document goes to the one that is named like the `domain` of its source."""

    kind: Literal["mixture"] = "mixture"
    teachers: dict[str, Annotated[Any, PartOf(TEACHERS)]] = Field(min_length=1)
    """A teacher for each domain."""
    default: str | None = None
    """The one for documents of other domains; none: such a document is an error."""

    @model_validator(mode="after")
    def _default_is_one(self) -> MixtureTeacherOptions:
        if self.default is not None and self.default not in self.teachers:
            raise ValueError(f"`default` names {self.default!r}; teachers: {', '.join(self.teachers)}")
        nested = [name for name, teacher in self.teachers.items() if teacher.kind == "mixture"]
        if nested:
            raise ValueError(f"teachers.{nested[0]} is a mixture itself: name its teachers here")
        return self

    def provides(self, need: Need) -> bool | str:
        if not isinstance(need, TopK):
            return f"teacher 'mixture' does not provide {type(need).__name__}; it gives TopK (objective topk_kl)"
        for name, teacher in self.teachers.items():
            answer = teacher.provides(need)
            if answer is not True:
                return f"teacher of domain '{name}': {answer}"
        return True


@TEACHERS.register("limbeck.teachers.stored:StoredTeacher")
class StoredTeacherOptions(Part):
    """Signals on disk, written by a capture stage, or kept from another teacher as it is asked."""

    kind: Literal["stored"] = "stored"
    signals: Place | From
    """The folder of signals, or `{from: stage}` for those of a capture stage."""
    teacher: Annotated[Any, PartOf(TEACHERS)] | None = None
    """Asked for what is not stored, which is then stored: a cache.  None: a document that is not stored is an error."""
    codec: Literal["exact", "fp16", "compact"] = "compact"
    """How a cache keeps values: in fp32, in fp16, or in a byte each (about 183 bytes a token at k = 64, 332 at 128, and a KL
    error below 1e-4 nat)."""

    @model_validator(mode="after")
    def _askable(self) -> StoredTeacherOptions:
        kind = getattr(self.teacher, "kind", None)
        if kind in ("stored", "self"):
            raise ValueError(f"teacher '{kind}' cannot stand behind a store; `local` or `http` can")
        if kind == "mixture":
            raise ValueError("put a `stored` teacher inside the mixture, one with a folder of its own for each of its teachers")
        if self.teacher is not None and isinstance(self.signals, From):
            raise ValueError("`signals: {from: stage}` are finished and not added to: leave out `teacher`, or give the cache a folder of its own")
        return self

    def provides(self, need: Need) -> bool | str:
        if not isinstance(need, TopK):
            return f"teacher 'stored' does not provide {type(need).__name__}; it gives TopK (objective topk_kl)"
        return True if self.teacher is None else self.teacher.provides(need)


@TEACHERS.register("limbeck.teachers.adapters:AdaptersTeacher")
class AdaptersTeacherOptions(Part):
    """A pool of adapters, one or more for each condition: their weights, their behaviour on probes, or the base with them."""

    kind: Literal["adapters"] = "adapters"
    pool: From | dict[str, Place] = Field(union_mode="left_to_right")
    """`{from: stage}` of a train_adapters stage, or PEFT folders by the name of their condition."""
    deltas: From | None = None
    """The measure_deltas stage that measured how they behave."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights' dtype of the base, where the teacher runs it (objectives on text)."""

    def provides(self, need: Need) -> bool | str:
        if isinstance(need, AdapterFactors | HeadHidden):
            return True
        if isinstance(need, Deltas | InputMoments):
            return True if self.deltas is not None else "teacher 'adapters' has no measured deltas: add a measure_deltas stage and `deltas: {from: stage}`"
        gives = "it gives adapters (objective weights), deltas (objectives delta, tether) and hidden states (objective kl)"
        return f"teacher 'adapters' does not provide {type(need).__name__}; {gives}"
