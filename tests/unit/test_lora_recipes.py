"""The recipes for Qwen2.5-0.5B and -1.5B: the published shapes on the real structure, and one step on a small model of the same one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from families import VOCABULARY, packed_batch, stir, tokens
from limbeck.adapters.deltas import DeltaSignal, Probes, embed
from limbeck.adapters.inject import Injector
from limbeck.adapters.spec import Adapters
from limbeck.adapters.targets import resolve_spec
from limbeck.cli.app import app
from limbeck.config.load import load_recipe
from limbeck.config.parts.adapters import RepresentationOptions
from limbeck.config.parts.objectives import OBJECTIVES
from limbeck.engine.step import TrainStep
from limbeck.models.loading import build_model
from limbeck.needs import Deltas
from limbeck.students.generator.network import Generator
from limbeck.students.generator.student import GeneratorStudent
from limbeck.types import Signal

TARGETS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@dataclass(frozen=True)
class Published:
    """A model's config on the hub, and the LoRA that the plan has for it."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    rank: int
    alpha: int
    numbers: int

    def config(self, **changes: Any) -> dict[str, Any]:
        sizes = {"hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_attention_heads": self.heads, "vocab_size": 151_936}
        structure = {"model_type": "qwen2", "num_hidden_layers": self.layers, "num_key_value_heads": 2, "tie_word_embeddings": True}
        return {**structure, **sizes, **changes}

    def small(self) -> dict[str, Any]:
        """As many layers, heads and groups, all of them narrow."""
        return self.config(hidden_size=8 * self.heads, intermediate_size=48, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)


SIZES = {
    "lora_qwen2.5_0.5b": ("Qwen/Qwen2.5-0.5B", Published(24, 896, 4864, 14, 8, 16, 4_399_104)),
    "lora_qwen2.5_1.5b": ("Qwen/Qwen2.5-1.5B", Published(28, 1536, 8960, 12, 16, 32, 18_464_768)),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_recipe_passes_check_and_is_of_one_base_and_one_shape(name: str) -> None:
    base, published = SIZES[name]
    done = CliRunner().invoke(app, ["check", name])
    assert done.exit_code == 0 and base in done.output, done.output
    stages = load_recipe(name).stages
    assert {stages["conditions"].tokenizer, stages["pool"].base, stages["generate"].student.base, stages["static"].student.base} == {base}
    for shape in (stages["pool"].adapters, *(stages[stage].student.surgery[0] for stage in ("generate", "static"))):
        assert (shape.rank, shape.alpha, shape.targets) == (published.rank, published.alpha, ("all",))


@pytest.mark.parametrize("name", SIZES)
def test_model_generator_and_injection_are_built_at_full_size(name: str) -> None:
    """On the meta device: shapes without numbers."""
    _, published = SIZES[name]
    recipe = load_recipe(name)
    options, condition = recipe.stages["generate"].student.surgery[0], recipe.stages["conditions"].condition
    with torch.device("meta"):
        model = build_model(published.config(), attention="sdpa")
        spec = resolve_spec(model, options.targets, rank=options.rank, alpha=options.alpha)
        generator = Generator(spec, options, published.hidden, (condition.texts, condition.tokens))
        shape = (2, condition.texts, condition.tokens)
        A, B = generator(torch.zeros(*shape, published.hidden), torch.ones(shape, dtype=torch.bool))
        injector = Injector(model, spec)
        with injector.active(Adapters(spec, A, B)):
            # A mask of one's own: transformers would look for numbers to make one.
            logits = model(input_ids=torch.zeros(4, 16, dtype=torch.int64), attention_mask={"full_attention": None}, use_cache=False).logits
    assert {site.module.rsplit(".", 1)[-1] for site in spec.sites} == TARGETS and all(len(site.layers) == published.layers for site in spec.sites)
    assert spec.num_parameters == published.numbers and spec.scale == 2
    assert sum(len(modules) for modules in injector.modules.values()) == 7 * published.layers
    assert logits.shape == (4, 16, 151_936)


@pytest.mark.parametrize("name", SIZES)
def test_one_step_on_a_small_model_of_the_same_structure(name: str) -> None:
    """The recipe's own generator (narrow too), objectives and checkpointed microbatches of deltas."""
    _, published = SIZES[name]
    stage = load_recipe(name).stages["generate"]
    model = build_model(published.small(), attention="sdpa")
    stir(model)
    torch.manual_seed(0)
    narrow = stage.student.surgery[0].model_copy(update={"width": 64})
    student = GeneratorStudent(model, narrow, text_shape=(2, 6), base={"source": "small", "fingerprint": {}}).train()
    assert len(student.spec.paths) == 7 * published.layers and (student.spec.rank, student.spec.scale) == (published.rank, 2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    batch = replace(packed_batch([[9, 7], [5, 11], [16]]), condition_BSC=tokens(6, 6).view(3, 2, 6), adapters_B=torch.arange(3))
    probes, represent = Probes(tokens(2, 5), torch.ones(2, 5, dtype=torch.bool)), RepresentationOptions()
    with torch.no_grad():
        away = embed(student.run_base, None, probes, represent) * 1.1
    signal = Signal({Deltas: DeltaSignal((away - embed(student.run_base, None, probes, represent)).expand(3, -1).contiguous(), probes, represent)})
    step = TrainStep(student, [OBJECTIVES.build(objective) for objective in stage.objectives])
    assert step.labels == ["ce", "delta"]
    optimizer = torch.optim.AdamW(student.generator.parameters(), lr=1e-3)
    losses = []
    for at in (0, 500):
        optimizer.zero_grad()
        weights = step.weights(at)
        counts = step.counts(batch)
        metrics = step.run(batch, signal, [weight / int(count) for weight, count in zip(weights, counts, strict=True)])
        losses.append(float(metrics["ce/raw"][0]))
        moved = [key for key, parameter in student.generator.named_parameters() if parameter.grad is not None and parameter.grad.abs().max() > 0]
        assert moved and all(key.startswith(("static.B", "decoder.to_B")) for key in moved) == (at == 0)
        optimizer.step()
    assert losses[1] < losses[0] and weights == [1.0, 0.1]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
