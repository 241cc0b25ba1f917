"""Training and judging by name: a recipe is written, and the stages run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limbeck.behaviour.config import TrainingConfig
from limbeck.behaviour.opening import stage_of_kind
from limbeck.config.load import load_recipe, recipe_folder
from limbeck.stages.context import Say
from limbeck.stages.folder import read_json
from limbeck.stages.run import open_stage, run_recipe


def train(config: TrainingConfig, folder: str | Path = ".", *, say: Say = print) -> Path:
    """Write ``folder/<name>.yaml`` and do what it says and is not done yet; the run directory ``folder/runs/<name>``.

    Relative paths in the configuration start at ``folder``.  Called again, it goes on where it stopped.

    Raises:
        LimbeckError: what is wrong with the configuration, its files or the run.
    """
    folder = Path(folder)
    config.to_recipe(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{config.name}.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    return run_recipe(load_recipe(path), recipe_dir=recipe_folder(path), run_dir=folder / "runs" / config.name, say=say)


def evaluate(run: str | Path, stage: str | None = None, *, say: Say = print) -> dict[str, Any]:
    """What an evaluate_adapters stage of a run found, which is run first if that is not done.

    ``["splits"][SPLIT]`` has ``nll`` and ``share`` by column (base, mean adapter, nearest adapter, shuffled condition, static LoRA, teacher),
    and the generator's ``lead`` over each with its interval; ``["conditions"]`` has every condition's numbers.

    Raises:
        LimbeckError: no run, no such stage (or several, none of them named), or inputs that are not finished.
    """
    run = Path(run)
    name = stage_of_kind(run, "evaluate_adapters", stage)
    context = open_stage(run.resolve() / name)
    run_recipe(context.recipe, recipe_dir=context.recipe_dir, run_dir=run, stage=name, say=say)
    return read_json(run / name / "evaluation" / "adapters.json")
