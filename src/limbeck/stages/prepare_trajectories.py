"""The stage that makes training windows of agent trajectories.  No model, no GPU; it runs alone as a CPU job."""

from __future__ import annotations

from limbeck.data.conditions.store import ConditionSet
from limbeck.data.trajectories.build import build_trajectories
from limbeck.stages.context import StageContext


class PrepareTrajectoriesStage:
    """Writes ``conditions/``: one condition for each issue, one example for each window."""

    def __init__(self, context: StageContext):
        self.context = context

    def run(self) -> None:
        """Build the folder on the first rank."""
        context = self.context
        options, out = context.options, context.folder / "conditions"
        tokenizer = context.locate(options.tokenizer)
        context.once(lambda: build_trajectories(options, out, tokenizer=tokenizer, base_dir=context.recipe_dir, progress=context.say))
        made = ConditionSet(out)
        windows = sum(sum(condition.examples.values()) for condition in made.conditions)
        context.facts["result"] = {"conditions": len(made), "windows": windows, "seen": len(made.split("seen")), "held_out": len(made.split("held_out_source"))}
