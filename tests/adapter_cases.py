"""Small parts for the tests of adapters: tiny bases, random LoRAs, made-up conditions and a recipe on them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from condition_cases import COLOURS, TOKENIZER
from families import tiny_model, tokens
from limbeck.adapters.inject import Injector
from limbeck.adapters.output import AdaptedOutput, RunBase
from limbeck.adapters.peft_files import write_peft
from limbeck.adapters.spec import Adapters, AdapterSpec
from limbeck.adapters.targets import modules_of, resolve_spec
from limbeck.config.load import load_recipe
from limbeck.models.head import head_of
from limbeck.models.hidden import hidden_states
from limbeck.models.loading import build_model, fingerprint, load_tokenizer, save_model
from limbeck.stages.run import run_recipe

VOCABULARY = len(load_tokenizer(TOKENIZER))
TASKS = ("pump", "ledger", "garden")


def small_model(family: str = "qwen2", *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """Two layers of a family, frozen."""
    return tiny_model(family, dtype=dtype, seed=seed, num_hidden_layers=2).requires_grad_(False)


def small_spec(model: Any, *, rank: int = 2, alpha: float = 4.0, targets: str | Sequence[str] = "all") -> AdapterSpec:
    """LoRAs on every Linear of the layers."""
    return resolve_spec(model, targets, rank=rank, alpha=alpha)


def random_adapters(spec: AdapterSpec, count: int, *, seed: int = 0, size: float = 0.2, dtype: torch.dtype = torch.float64) -> Adapters:
    """LoRAs with no factor near zero; the first ones are the same however many there are."""
    A: dict[str, list[Tensor]] = {site.name: [] for site in spec.sites}
    B: dict[str, list[Tensor]] = {site.name: [] for site in spec.sites}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for site in spec.sites:
            layers = len(site.layers)
            A[site.name].append(size * torch.randn(layers, spec.rank, site.in_features, generator=generator, dtype=torch.float64))
            B[site.name].append(size * torch.randn(layers, site.out_features, spec.rank, generator=generator, dtype=torch.float64))
    stacked = ({name: torch.stack(parts).to(dtype) for name, parts in factors.items()} for factors in (A, B))
    return Adapters(spec, *stacked)


def wanting_gradients(adapters: Adapters) -> Adapters:
    """The same numbers as leaves."""
    return adapters.map(lambda t: t.detach().clone().requires_grad_())


def gradients(adapters: Adapters) -> Tensor:
    """The gradients of all leaves in one row."""
    return torch.cat([torch.zeros_like(t).flatten() if t.grad is None else t.grad.flatten() for t in adapters.tensors()])


def runner(model: Any, injector: Injector) -> RunBase:
    """Runs a base with adapters, as a generator's student does."""

    def run(ids: Tensor, layers: Sequence[int], final_norm: bool, chosen: Adapters | None) -> list[Tensor]:
        with injector.active(chosen):
            return hidden_states(model, ids, layers, final_norm=final_norm)

    return run


def adapted_output(model: Any, injector: Injector, adapters: Adapters) -> AdaptedOutput:
    """What a student that makes these adapters hands to the objectives on adapters."""

    def hidden() -> Tensor:
        raise AssertionError("objectives on adapters do not ask for the batch's hidden states")

    return AdaptedOutput(adapters, lambda: head_of(model), hidden, runner(model, injector))


def changed_model(model: Any, adapters: Adapters, index: int) -> Any:
    """A copy of a model with one adapter's dW added to its weights: what an adapter means, without any injection."""
    found = copy.deepcopy(model)
    modules = modules_of(found, adapters.spec)
    with torch.no_grad():
        for site in adapters.spec.sites:
            for module, change in zip(modules[site.name], adapters.change(site.name)[index], strict=True):
                module.weight += change
    return found


def ragged_rows(lengths: Sequence[int], seed: int = 3) -> list[list[int]]:
    """Rows of token ids of a tiny model."""
    ids = tokens(rows=len(lengths), length=max(lengths), seed=seed)
    return [ids[i, :length].tolist() for i, length in enumerate(lengths)]


# -- files and recipes -----------------------------------------------------------------------------------------------------


def base_folder(folder: Path, *, seed: int = 0) -> Path:
    """A random model with the built-in tokenizer."""
    config = {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.1, "tie_word_embeddings": True,
    }  # fmt: skip
    save_model(build_model(config, seed=seed), folder, tokenizer_source=TOKENIZER)
    return folder


def peft_folders(folder: Path, base: Path, adapters: Adapters, names: Sequence[str]) -> dict[str, str]:
    """Each adapter as a PEFT folder; folder by name."""
    provenance = {"base": fingerprint(str(base))}
    for index, name in enumerate(names):
        write_peft(adapters, index, folder / name, base=str(base), provenance=provenance)
    return {name: str(folder / name) for name in names}


def corpus(home: Path) -> list[dict[str, Any]]:
    """Sources of made-up questions, no two of which have an answer in common."""
    sources = []
    for task in TASKS:
        texts = [f"{task}: what {COLOURS[i % 6]} thing is number {i}?\nIt is {task} {i * 7}." for i in range(60)]
        (home / f"{task}.txt").write_text("\n\n".join(texts))
        sources.append({"name": task, "source": {"kind": "text", "path": f"{task}.txt", "documents": "paragraph"}})
    return sources


def recipe_on(home: Path, **changes: Any) -> dict[str, Any]:
    """Conditions, a pool, its deltas, a generator and its judging, each a few steps; ``changes`` replace stages (None drops one)."""
    shape = {"targets": "all", "rank": 2, "alpha": 4}
    stages: dict[str, Any] = {
        "conditions": {
            "kind": "prepare_conditions", "tokenizer": "base", "sources": corpus(home), "formats": ["plain", "upper"], "examples": 20, "test_examples": 6,
            "min_examples": 8, "held_out": {"sources": ["garden"]}, "mixes": 1, "sequence": 32,
            "condition": {"form": "prompt_answer", "texts": 2, "tokens": 12},
        },
        "pool": {
            "kind": "train_adapters", "base": "base", "conditions": {"from": "conditions"}, "adapters": {**shape, "init": "independent"},
            "optim": {"groups": [{"lr": 2e-2}], "clip": None}, "loop": {"steps": 8, "rows": 2, "precision": "float32", "log_every": 1, "checkpoint_every": 3},
        },
        "deltas": {"kind": "measure_deltas", "pool": {"from": "pool"}, "probes": {"count": 4, "length": 12}, "moments": True, "together": 3},
        "generate": generating(
            [{"kind": "ce"}, {"kind": "weights", "loss": "whitened"}, {"kind": "delta", "microbatch": 2}, {"kind": "tether", "weight": 0.1}],
            teacher={"kind": "adapters", "pool": {"from": "pool"}, "deltas": {"from": "deltas"}},
        ),
    }  # fmt: skip
    stages.update(changes)
    return {"name": "adapted", "stages": {name: stage for name, stage in stages.items() if stage is not None}}


def generating(
    objectives: list[dict[str, Any]], *, teacher: dict[str, Any] | None = None, student: dict[str, Any] | None = None, **surgery: Any
) -> dict[str, Any]:
    """A train stage of a small generator."""
    surgery = {"kind": "lora_generator", "targets": "all", "rank": 2, "alpha": 4, "width": 16, "trunk": 1, "reader": {"blocks": 1, "latents": 4}, **surgery}
    return {
        "data": {"from": "conditions"}, "student": student or {"base": "base", "surgery": [surgery], "train": ["generator"]}, "teacher": teacher,
        "objectives": objectives, "optim": {"groups": [{"lr": 3e-3}]},
        "loop": {"steps": 4, "batch_tokens": 128, "microbatch": 2, "precision": "float32", "log_every": 1, "checkpoint_every": 2},
    }  # fmt: skip


def write_recipe(home: Path, recipe: dict[str, Any], name: str = "recipe") -> Path:
    """The recipe as a file beside its base."""
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def run(home: Path, recipe: dict[str, Any], *, to: str = "run", stage: str | None = None, fresh: bool = False) -> tuple[Path, list[str]]:
    """Run a recipe; the run directory and what was said."""
    said: list[str] = []
    path = write_recipe(home, recipe, to)
    return run_recipe(load_recipe(path), recipe_dir=home, run_dir=home / to, stage=stage, fresh=fresh, say=lambda text: said.append(str(text))), said
