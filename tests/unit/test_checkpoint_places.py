"""``loop.checkpoints``: a folder for one run alone, which its stage's records follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from limbeck.config.load import load_text
from limbeck.config.recipe import Recipe
from limbeck.errors import LimbeckError
from limbeck.stages.export import export_path
from limbeck.stages.run import run_recipe


def stage(**loop: Any) -> dict[str, Any]:
    return {
        "data": {"source": {"kind": "stdlib", "limit": 12}, "tokenizer": "builtin:code-2m", "sequence": 32, "held_out": 0},
        "student": {"base": "builtin:code-2m", "train": ["model.norm.weight"]},
        "optim": {"groups": [{"lr": 1e-3}]},
        "loop": {"steps": 4, "batch_tokens": 64, "checkpoint_every": 2, **loop},
    }


def test_a_grid_or_two_stages_cannot_share_one() -> None:
    import json

    with pytest.raises(LimbeckError, match=r"`loop.checkpoints` is one folder, and a grid is several runs"):
        load_text(json.dumps({"name": "x", "stages": {"a": stage(checkpoints="c") | {"grid": {"seed": [1, 2]}}}}))
    with pytest.raises(LimbeckError, match=r"stages.b.loop.checkpoints: stage 'a' keeps its checkpoints in 'c' too"):
        load_text(json.dumps({"name": "x", "stages": {"a": stage(checkpoints="c"), "b": stage(checkpoints="c")}}))


def test_checkpoints_elsewhere_are_found_and_set_aside_with_their_stage(tmp_path: Path) -> None:
    def run(**loop: Any) -> Path:
        recipe = Recipe.model_validate({"name": "x", "stages": {"a": stage(checkpoints="elsewhere", **loop)}})
        return run_recipe(recipe, recipe_dir=tmp_path, run_dir=tmp_path / "run", say=lambda line: None)

    folder = run()
    elsewhere = tmp_path / "elsewhere"
    assert sorted(p.name for p in elsewhere.iterdir()) == ["final", "step_2"] and not (folder / "a" / "checkpoints").exists()
    # One file under two names, and a config of its own.
    ours, theirs = folder / "a" / "model", elsewhere / "final" / "model"
    assert (ours / "model.safetensors").samefile(theirs / "model.safetensors") and not (ours / "config.json").samefile(theirs / "config.json")
    assert (export_path(f"{folder / 'a'}@2", output=tmp_path / "out") / "config.json").exists()
    assert (export_path(str(elsewhere / "final"), output=tmp_path / "out2") / "config.json").exists()
    run(steps=2)
    assert sorted(p.name for p in (folder / "a.stale-1" / "checkpoints").iterdir()) == ["final", "step_2"]
    assert [p.name for p in elsewhere.iterdir()] == ["final"]
