"""The prepare stage: download, filter, tokenise, chunk.  No model, no GPU; it runs alone as a CPU job."""

from __future__ import annotations

from limbeck.config.parts.stages import TrainTokenizer
from limbeck.data.prepare import prepare
from limbeck.stages.context import StageContext


class PrepareStage:
    """Writes ``data/``."""

    def __init__(self, context: StageContext):
        self.context = context

    def run(self) -> None:
        """Prepare; a finished folder of the same content is left as it is."""
        context, data = self.context, self.context.options.data
        tokenizer = None if isinstance(data.tokenizer, TrainTokenizer) else context.locate(data.tokenizer)
        out = context.folder / "data"
        context.once(lambda: prepare(data, out, tokenizer=tokenizer, base_dir=context.recipe_dir, progress=context.say))
