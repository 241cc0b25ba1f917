"""What `limbeck serve` lets speak: a model folder, or a run's LoRA generator on its base."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from limbeck.models.loading import load_model, load_tokenizer, resolve_source
from limbeck.serve.openai.transformers import Acting, Speaker
from limbeck.stages.adapting import condition_of, open_generator, static_adapter
from limbeck.stages.folder import model_of
from limbeck.stages.generate import stage_of
from limbeck.stages.run import load_plugins_of
from limbeck.students.generator.student import GeneratorStudent, is_generator
from limbeck.students.ternarize import settled


class ConditionReader:
    """A LoRA generator that reads one text at a time."""

    def __init__(self, student: GeneratorStudent, tokenizer: Any):
        self._student, self._tokenizer = student, tokenizer

    def ids(self, text: str) -> tuple[int, ...]:
        """The ids of a text as the generator reads it: cut to its length, padded with -1."""
        condition_1SC = condition_of([text], self._tokenizer, *self._student.text_shape)
        return tuple(condition_1SC.flatten().tolist())

    def acting(self, ids: Sequence[int]) -> Acting:
        """The state in which the base writes with the LoRA of these ids."""
        condition_1SC = torch.tensor(ids).view(1, *self._student.text_shape).to(self._student.model.device)
        with torch.no_grad():
            adapters = self._student.generate(condition_1SC).detach()
        return partial(self._student.injector.active, adapters)


def open_speaker(model: str, *, dtype: str = "float32", device: str = "cpu", revision: str | None = None) -> Speaker:
    """The model of a folder, a stage (``RUN/STAGE``), ``builtin:NAME`` or a hub name; a LoRA generator comes with its base."""
    load_plugins_of(model)
    folder = model_of(Path(model))
    kind: torch.dtype = getattr(torch, dtype)
    if not is_generator(folder):
        source = resolve_source(model if folder == Path(model) else str(folder))
        return Speaker(settled(load_model(source, dtype=kind, device=device, revision=revision)), load_tokenizer(source, revision))
    folder = folder.resolve()
    student = open_generator(stage_of(folder), folder, None, dtype=kind)
    student.to(device)
    tokenizer = load_tokenizer(resolve_source(student.base_source), student.base_revision)
    if student.options.condition == "none":
        return Speaker(student.model, tokenizer, acting=partial(student.injector.active, static_adapter(student)))
    return Speaker(student.model, tokenizer, ConditionReader(student, load_tokenizer(str(folder))))
