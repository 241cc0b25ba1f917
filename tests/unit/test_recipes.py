"""The shipped recipes: every one loads, and its numbers are the published ones."""

from __future__ import annotations

import pytest

from limbeck.config.load import SHIPPED, load_recipe, shipped_recipes
from limbeck.config.recipe import stage_order, stage_problems
from limbeck.config.summary import summarise

HUB = {
    "hybrid_qwen2.5_1.5b": ("Qwen/Qwen2.5-1.5B", 28, {14, 19, 20, 23, 24, 26, 27}),
    "hybrid_qwen2.5_7b": ("Qwen/Qwen2.5-7B", 28, {14, 22, 16, 17, 5, 23, 26}),
    "hybrid_qwen3_0.6b": ("Qwen/Qwen3-0.6B", 28, set(range(3, 28, 4))),
    "hybrid_qwen3_8b": ("Qwen/Qwen3-8B", 36, set(range(3, 36, 4))),
    "hybrid_llama3.2_3b": ("meta-llama/Llama-3.2-3B", 28, {14, 8, 5, 12, 15, 13, 2}),
}


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_loads_and_says_what_it_does(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.description and not stage_problems(recipe)
    text = summarise(recipe)
    assert all(f"{number}. {stage} (" in text for number, stage in enumerate(stage_order(recipe), 1))
    assert shipped_recipes()[name].read_text().startswith("# "), "a shipped recipe begins with what it is for"


def test_the_recipes_are_beside_the_code() -> None:
    assert {"pretrain", "hybrid", *HUB} <= set(shipped_recipes())
    assert (SHIPPED / "__init__.py").exists()


@pytest.mark.parametrize("name", sorted(HUB))
def test_hub_recipes_follow_the_published_pipeline(name: str) -> None:
    model, layers, keep = HUB[name]
    stages = load_recipe(name).stages
    align, distil, extend = stages["align"], stages["distil"], stages["extend"]
    assert (align.loop.tokens, align.data.sequence, align.loop.batch_tokens) == (100_000_000, 512, 49_152)
    assert (distil.loop.tokens, distil.data.sequence, distil.loop.batch_tokens) == (600_000_000, 4096, 131_072)
    assert (extend.loop.tokens, extend.data.sequence) == (100_000_000, 16_384)
    schedule, group = align.optim.schedule, align.optim.groups[0]
    assert (schedule.kind, schedule.warmup, group.lr * schedule.final, group.weight_decay) == (
        "cosine",
        50,
        pytest.approx(1e-5),
        0,
    )
    assert {g.role: g.lr for g in distil.optim.groups} == {"mixers": 1e-4, "rest": 7e-6}
    assert extend.optim.groups[0].lr == 1e-5
    assert {align.student.base, distil.teacher.model, *(s.data.tokenizer for s in (align, distil, extend))} == {model}
    assert set(distil.student.keep) == keep and len(keep) == layers // 4 and max(keep) < layers
    assert align.student.surgery[0].mixer.rope and align.student.surgery[0].keep == ()
    assert all(s.kind == "hub" and s.path == "HuggingFaceFW/fineweb-edu" for s in distil.data.source)


def test_whole_rows_and_micro_batches_fill_a_step() -> None:
    for name in shipped_recipes():
        recipe = load_recipe(name)
        for stage in recipe.stages.values():
            if stage.kind == "train" and hasattr(stage.data, "sequence"):
                rows, rest = divmod(stage.loop.batch_tokens, stage.data.sequence)
                assert rest == 0 and rows % (stage.loop.microbatch or 1) == 0, (name, stage.loop)
