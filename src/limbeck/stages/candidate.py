"""One candidate of a ranking on its own: at the same time as others, or on another machine."""

from __future__ import annotations

from pathlib import Path

import torch

from limbeck.config.recipe import Recipe, references, stage_order
from limbeck.engine.lock import RunLock
from limbeck.engine.parallel import World
from limbeck.errors import RunError, did_you_mean
from limbeck.stages.context import Say, StageContext
from limbeck.stages.folder import StageFolder, make_run_dir
from limbeck.stages.rank_layers import RankLayersStage
from limbeck.stages.run import stage_key


def run_candidate(
    recipe: Recipe, candidate: int, *, recipe_dir: Path, run_dir: Path | None = None, stage: str | None = None, say: Say = print
) -> None:
    """Distil and score layer ``candidate`` into ``ranking/ledger-<candidate>.jsonl`` of the run's rank_layers stage.

    The stages that it reads must be finished.  Only this candidate is locked, so others may run beside it; `limbeck run` puts
    together what lies in ``ranking/`` (copy ledgers from other machines there) and does the rest.

    Raises:
        RunError: no such stage or layer, or inputs that are not finished.
    """
    run_dir = (run_dir or Path("runs") / recipe.name).resolve()
    name = _ranking_stage(recipe, stage)
    options = recipe.stages[name]
    for _, needed in references(options):
        if not StageFolder(run_dir / needed).finished(stage_key(recipe, needed, recipe_dir)):
            raise RunError(
                f"--candidate {candidate}: stage '{name}' needs stage '{needed}', which is not finished with this recipe: run --stage {needed} first"
            )
    make_run_dir(run_dir)
    folder = run_dir / name
    own = folder / "candidates" / f"lock-{candidate}"
    own.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with RunLock(own):
        context = StageContext(recipe, name, options, folder, run_dir, recipe_dir, World(device), say)
        RankLayersStage(context, candidate=candidate).run_candidate()


def _ranking_stage(recipe: Recipe, stage: str | None) -> str:
    found = [name for name in stage_order(recipe) if recipe.stages[name].kind == "rank_layers"]
    if stage is not None and stage not in found:
        raise RunError(f"--stage {stage}: not a rank_layers stage{did_you_mean(stage, found) or ';'} those are: {', '.join(found) or 'none'}")
    if stage is None and len(found) != 1:
        raise RunError(f"--candidate: the recipe has {len(found) or 'no'} rank_layers stages: {'name one by --stage' if found else 'there is nothing to rank'}")
    return stage or found[0]
