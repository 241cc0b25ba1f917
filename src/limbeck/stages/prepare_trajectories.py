"""The stage that makes training windows of agent trajectories.  No model, no GPU; it runs alone as a CPU job."""

from __future__ import annotations

from limbeck.data.trajectories.build import build_trajectories
from limbeck.stages.prepare_conditions import PrepareConditionsStage


class PrepareTrajectoriesStage(PrepareConditionsStage):
    """Writes ``conditions/``: one condition for each issue, one example for each window."""

    build = staticmethod(build_trajectories)
