"""One configuration for the whole method, and the recipe that it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from limbeck.adapters.spec import AdapterSpec
from limbeck.adapters.targets import resolve_spec
from limbeck.config.load import load_text
from limbeck.config.recipe import Recipe
from limbeck.errors import RecipeError
from limbeck.models.loading import build_model

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven Linears of a layer of Qwen2.5."""


@dataclass(frozen=True)
class Architecture:
    """A published size of Qwen2.5, and the LoRA that the method uses for it."""

    base: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    rank: int
    alpha: float

    def model_config(self) -> dict[str, Any]:
        """As ``student.config`` of a recipe takes it, with the published vocabulary."""
        return {
            "model_type": "qwen2",
            "vocab_size": 151_936,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "tie_word_embeddings": True,
        }


SMALL = Architecture("Qwen/Qwen2.5-0.5B", 24, 896, 4864, 14, 2, 8, 16.0)
LARGE = Architecture("Qwen/Qwen2.5-1.5B", 28, 1536, 8960, 12, 2, 16, 32.0)


@dataclass(frozen=True)
class TrainingConfig:
    """Every setting of the method.  ``use_small_model`` sets base, rank and alpha where they are not given."""

    use_small_model: bool = True
    """Qwen2.5-0.5B with rank 8 and alpha 16; else Qwen2.5-1.5B with 16 and 32."""
    base: str | None = None
    """Another base: a folder, a hub name or ``builtin:NAME``."""
    rank: int | None = None
    alpha: float | None = None
    targets: Sequence[str] = TARGETS
    mode: Literal["weights", "multitask", "delta_only"] = "multitask"
    """What teaches: the adapters' weights (phase 0), weights and deltas (4), deltas alone (5)."""

    # -- conditions
    sources: Sequence[Mapping[str, Any]] = ()
    """As ``prepare_conditions.sources`` takes them: ``{"name", "source", "prompt", "answer"}``."""
    conditioning: Literal["prompts", "prompt_answer"] = "prompts"
    condition_texts: int = 4
    condition_tokens: int = 48
    formats: Sequence[str] = ("plain",)
    examples: int = 200
    test_examples: int = 40
    min_examples: int = 20
    held_out_sources: Sequence[str] = ()
    held_out_slices: int = 0
    mixes: int = 0
    sequence: int = 128

    # -- teachers
    teacher_steps: int = 300
    teacher_rows: int = 2
    teacher_lr: float = 1e-3
    teacher_init: Literal["shared", "independent"] = "shared"
    teacher_mode: Literal["lora", "full"] = "lora"

    # -- deltas
    paper: bool = False
    """The five generic probes, last token of the last layer, averaged; else diverse probes, every token of each."""
    probes: Mapping[str, Any] | None = None
    """As ``measure_deltas.probes`` takes them, without ``paper``."""
    represent: Mapping[str, Any] | None = None
    """As ``measure_deltas.represent`` takes it, without ``paper``."""

    # -- generator
    decoder: Literal["queries", "hyperconv"] = "queries"
    """Limbeck's generator, or one in the manner of Drag-and-Drop."""
    width: int = 128
    reader: Mapping[str, Any] = field(default_factory=dict)

    # -- losses
    lambda_weight: float = 1.0
    lambda_delta: float = 0.1
    ramp_steps: int = 0
    """Steps in which lambda_delta rises from 0."""
    weight_loss: Literal["mse", "canonical", "product", "whitened"] = "mse"
    delta_loss: Literal["mse", "cosine", "relative"] = "relative"
    delta_microbatch: int | None = 4
    norm_penalty: float = 0.0
    tether: float = 0.0

    # -- training
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 0
    clip: float | None = 1.0
    steps: int = 1000
    batch_size: int = 16
    """Rows of text, each with its condition and adapter."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    log_every: int = 10
    seed: int = 0

    # -- judging
    controls: bool = True
    """Train one static LoRA on all conditions too, which a generator has to beat."""
    test_rows: int = 8
    name: str = "behaviour"

    @property
    def architecture(self) -> Architecture | None:
        """The published size; None for a base of one's own."""
        return None if self.base is not None else SMALL if self.use_small_model else LARGE

    @property
    def num_layers(self) -> int | None:
        """Of the published size."""
        return None if self.architecture is None else self.architecture.num_layers

    @property
    def hidden_size(self) -> int | None:
        """Of the published size."""
        return None if self.architecture is None else self.architecture.hidden_size

    @property
    def intermediate_size(self) -> int | None:
        """Of the published size."""
        return None if self.architecture is None else self.architecture.intermediate_size

    @property
    def lora_rank(self) -> int:
        """``rank``, or that of the published size."""
        return self.rank or (SMALL if self.use_small_model else LARGE).rank

    @property
    def lora_alpha(self) -> float:
        """``alpha``, or that of the published size."""
        return self.alpha or (SMALL if self.use_small_model else LARGE).alpha

    def adapter_spec(self) -> AdapterSpec:
        """Shapes of the LoRAs of a published size, from the model's structure; no weight is made.

        Raises:
            RecipeError: a base of one's own, whose shapes are its folder's.
        """
        if self.architecture is None:
            raise RecipeError([f"TrainingConfig.base is {self.base}: the shapes of its LoRAs are known when it is loaded (adapters.targets.resolve_spec)"])
        with torch.device("meta"):
            model = build_model(self.architecture.model_config(), attention="sdpa")
        return resolve_spec(model, self.targets, rank=self.lora_rank, alpha=self.lora_alpha)

    def to_recipe(self, folder: Path | str | None = None) -> Recipe:
        """The recipe that :func:`limbeck.behaviour.train` runs; ``folder`` is where its relative paths start.

        Raises:
            RecipeError: every setting that a recipe would refuse, by name.
        """
        return load_text(self.to_yaml(), label="TrainingConfig", base_dir=None if folder is None else Path(folder))

    def to_yaml(self) -> str:
        """The recipe as a file to read, change and run by ``limbeck run``."""
        if not self.sources:
            raise RecipeError(["TrainingConfig.sources: none: name the text of the tasks, for example [{'name': 'sums', 'source': {'path': 'sums.jsonl'}}]"])
        return yaml.safe_dump(self._tree(), sort_keys=False, allow_unicode=True)

    def _tree(self) -> dict[str, Any]:
        stages: dict[str, Any] = {"conditions": self._conditions(), "pool": self._pool()}
        if self._measures:
            stages["deltas"] = self._deltas()
        stages["generate"] = {
            **self._train({"kind": "lora_generator", **self._lora(), "decoder": self.decoder, "width": self.width, "reader": dict(self.reader)}),
            "teacher": {"kind": "adapters", "pool": {"from": "pool"}, **({"deltas": {"from": "deltas"}} if self._measures else {})},
            "objectives": self._objectives(),
        }
        judged: dict[str, Any] = {"kind": "evaluate_adapters", "from": "generate", "pool": {"from": "pool"}, "rows": self.test_rows, "seed": self.seed}
        if self.controls:
            stages["static"] = {**self._train({"kind": "lora_generator", **self._lora(), "condition": "none"}), "objectives": [{"kind": "ce"}]}
            judged["against"] = ["static"]
        if self.teacher_mode == "lora":
            stages["evaluate"] = {**judged, **({"composition": {}} if self.mixes else {})}
        return {"name": self.name, "stages": stages}

    @property
    def _source(self) -> str:
        return self.base or (SMALL if self.use_small_model else LARGE).base

    @property
    def _measures(self) -> bool:
        return self.mode != "weights" or self.weight_loss == "whitened" or self.tether > 0

    def _lora(self) -> dict[str, Any]:
        return {"targets": list(self.targets), "rank": self.lora_rank, "alpha": self.lora_alpha}

    def _conditions(self) -> dict[str, Any]:
        return {
            "kind": "prepare_conditions",
            "tokenizer": self._source,
            "sources": [dict(source) for source in self.sources],
            "formats": list(self.formats),
            "examples": self.examples,
            "test_examples": self.test_examples,
            "min_examples": self.min_examples,
            "held_out": {"sources": list(self.held_out_sources), "slices": self.held_out_slices},
            "mixes": self.mixes,
            "sequence": self.sequence,
            "condition": {"form": self.conditioning, "texts": self.condition_texts, "tokens": self.condition_tokens},
            "seed": self.seed,
        }

    def _pool(self) -> dict[str, Any]:
        full = self.teacher_mode == "full"
        return {
            "kind": "train_adapters",
            "base": self._source,
            "conditions": {"from": "conditions"},
            "mode": self.teacher_mode,
            **({} if full else {"adapters": {**self._lora(), "init": self.teacher_init}}),
            "optim": {"groups": [{"lr": self.teacher_lr}], "clip": 1.0 if full else None},
            "loop": {"steps": self.teacher_steps, "rows": self.teacher_rows, "precision": self.precision},
            "seed": self.seed,
        }

    def _deltas(self) -> dict[str, Any]:
        stage: dict[str, Any] = {"kind": "measure_deltas", "pool": {"from": "pool"}, "moments": self.weight_loss == "whitened"}
        for name, value in (("paper", self.paper or None), ("probes", self.probes), ("represent", self.represent)):
            if value is not None:
                stage[name] = dict(value) if isinstance(value, Mapping) else value
        return stage

    def _train(self, surgery: dict[str, Any]) -> dict[str, Any]:
        return {
            "data": {"from": "conditions"},
            "student": {"base": self._source, "surgery": [surgery], "train": ["generator"]},
            "optim": {
                "groups": [{"lr": self.learning_rate, "weight_decay": self.weight_decay}],
                "schedule": {"kind": "cosine", "warmup": self.warmup},
                "clip": self.clip,
            },
            "loop": {
                "steps": self.steps,
                "batch_tokens": self.batch_size * self.sequence,
                "precision": self.precision,
                "log_every": self.log_every,
            },
            "seed": self.seed,
        }

    def _objectives(self) -> list[dict[str, Any]]:
        ramp = {"ramp": [0.0, self.lambda_delta], "steps": self.ramp_steps} if self.ramp_steps else self.lambda_delta
        weights = {"kind": "weights", "loss": self.weight_loss, "weight": self.lambda_weight}
        delta = {"kind": "delta", "loss": self.delta_loss, "microbatch": self.delta_microbatch}
        losses: dict[str, list[dict[str, Any]]] = {"weights": [weights], "multitask": [weights, {**delta, "weight": ramp}], "delta_only": [delta]}
        found = losses[self.mode]
        if self.norm_penalty:
            found = [*found, {"kind": "norm_penalty", "weight": self.norm_penalty}]
        if self.tether:
            found = [*found, {"kind": "tether", "weight": self.tether, "microbatch": self.delta_microbatch}]
        return found
