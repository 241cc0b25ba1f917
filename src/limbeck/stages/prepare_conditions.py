"""The stage that cuts text into conditions.  No model, no GPU; it runs alone as a CPU job."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from limbeck.data.conditions.build import build_conditions
from limbeck.data.conditions.store import ConditionSet
from limbeck.stages.context import StageContext


class PrepareConditionsStage:
    """Writes ``conditions/``."""

    build: Callable[..., Any] = staticmethod(build_conditions)

    def __init__(self, context: StageContext):
        self.context = context

    def run(self) -> None:
        """Build the folder on the first rank."""
        context = self.context
        options, out = context.options, context.folder / "conditions"
        tokenizer = context.locate(options.tokenizer)
        context.once(lambda: self.build(options, out, tokenizer=tokenizer, base_dir=context.recipe_dir, progress=context.say))
        made = ConditionSet(out)
        splits = Counter(condition.split for condition in made.conditions)
        context.facts["result"] = {"conditions": len(made), **splits}
