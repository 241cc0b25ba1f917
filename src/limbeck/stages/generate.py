"""`limbeck generate`: text from a run or a model folder, piece by piece, with the LoRA that a generator makes of what it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.adapters.spec import Adapters
from limbeck.data.conditions.store import ConditionSet
from limbeck.errors import RunError
from limbeck.evaluation.decode import decode
from limbeck.evaluation.samples import end_ids
from limbeck.models.loading import load_model, load_tokenizer, resolve_source
from limbeck.stages.adapting import condition_of, conditions_stage, open_conditions, open_generator, static_adapter
from limbeck.stages.context import StageContext
from limbeck.stages.folder import model_of
from limbeck.stages.run import load_plugins_of, open_stage
from limbeck.students.generator.student import GeneratorStudent, is_generator, read_record
from limbeck.students.ternarize import settled

_BEFORE = 4
ADAPTED, BASE = "with the generated LoRA", "the base alone"


@dataclass(frozen=True)
class Reads:
    """What a LoRA generator is to read: by default the prompt."""

    texts: Sequence[str] = ()
    named: str | None = None
    """A condition of the run's own data instead."""

    def __bool__(self) -> bool:
        """Whether anything was asked for."""
        return bool(self.texts) or self.named is not None


@dataclass(frozen=True)
class Writer:
    """A model, and the state that it writes in (a LoRA acts, or not)."""

    model: Any
    tokenizer: Any
    acting: Callable[[], AbstractContextManager] = nullcontext

    def prompt_ids(self, prompt: str) -> Tensor:
        """Token ids of a prompt, ``[1, T]``; of an empty one the token that begins a text."""
        ids_1T: Tensor = self.tokenizer(prompt, return_tensors="pt").input_ids
        if ids_1T.shape[1]:
            self._check(ids_1T)
            return ids_1T
        if self.tokenizer.bos_token_id is None:
            raise RunError("the prompt is empty and the tokenizer has no beginning-of-text token: give --prompt")
        return torch.tensor([[self.tokenizer.bos_token_id]])

    def _check(self, ids_1T: Tensor) -> None:
        length, rows = ids_1T.shape[1], self.model.get_input_embeddings().weight.shape[0]
        made_for = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if made_for is not None and length >= made_for:
            raise RunError(f"the prompt has {length} tokens, and the model was made for {made_for} with what it writes: give a shorter --prompt")
        if ids_1T.max() >= rows:
            raise RunError(f"the prompt has the token {int(ids_1T.max())}, and the model has embeddings for {rows}: the tokenizer is another model's")

    def write(self, ids_1T: Tensor, *, tokens: int, temperature: float, seed: int) -> Iterator[str]:
        """Text behind these ids as it is decoded."""
        # Some tokenizers take the space from what begins a text: the first token is read behind the last ones of the prompt.
        written: list[int] = ids_1T[0, -_BEFORE:].tolist()
        shown = self._text(written)
        found = decode(self.model, ids_1T, tokens=tokens, ends=end_ids(self.model, self.tokenizer), temperature=temperature, seed=seed, acting=self.acting)
        for token in found:
            written.append(token)
            text = self._text(written)
            # A token may end inside a character; it is held back until the character is whole.
            if not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def continuations(
    path: str, prompt: str, *, tokens: int = 128, temperature: float = 0.0, seed: int = 0, reads: Reads | None = None, compare: bool = False
) -> dict[str, Iterator[str]]:
    """What goes on from a prompt, by who writes it, as it is decoded; every writer meets the same draws.

    ``reads`` and ``compare`` (the base without its LoRA as well) are for a LoRA generator's stage.  Everything is checked and loaded
    before this returns.

    Raises:
        RunError: nothing to go on from or to read, more texts than the generator reads, or what only a generator understands
            asked of a model.
    """
    reads = reads or Reads()
    if Path(path).is_file():
        raise RunError(f"{path}: is a file, and `limbeck generate` reads model folders and runs; `limbeck serve` speaks GGUF files")
    load_plugins_of(path)
    folder = model_of(Path(path))
    if is_generator(folder):
        writers = _of_generator(folder.resolve(), reads, prompt, compare)
    else:
        refuse_for_a_model(path, reads, compare)
        source = resolve_source(path if folder == Path(path) else str(folder))
        writers = {"model": Writer(settled(load_model(source)), load_tokenizer(source))}
    return {
        title: writer.write(writer.prompt_ids(prompt), tokens=tokens, temperature=temperature, seed=seed) for title, writer in writers.items()
    }


def texts_of(files: Sequence[Path]) -> list[str]:
    """The text of each file, without the newlines behind it."""
    texts = []
    for path in files:
        try:
            texts.append(path.read_text(encoding="utf-8").rstrip("\n"))
        except OSError as error:
            raise RunError(f"--condition-file {path}: cannot be read ({error.strerror}): name a text file") from error
        except UnicodeDecodeError as error:
            raise RunError(f"--condition-file {path}: is no UTF-8 text (byte {error.start}): give a text file") from error
    return texts


def refuse_for_a_model(path: str, reads: Reads, compare: bool = False) -> None:
    """Say which option only a LoRA generator understands."""
    named = "--named" if reads.named is not None else "--condition" if reads else "--compare" if compare else None
    if named is not None:
        raise RunError(f"{path}: holds no trained LoRA generator, and {named} is for one: leave it out, or name the stage that trained one, RUN/STAGE")


def _of_generator(folder: Path, reads: Reads, prompt: str, compare: bool) -> dict[str, Writer]:
    """The base with the LoRA that is generated, once, and if wanted without."""
    student, adapters, tokenizer = adapted_base(folder, reads, prompt)
    acting = {ADAPTED: adapters, **({BASE: None} if compare else {})}
    return {title: Writer(student.model, tokenizer, partial(student.injector.active, who)) for title, who in acting.items()}


def adapted_base(
    folder: Path, reads: Reads, prompt: str | None = None, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[GeneratorStudent, Adapters, Any]:
    """The generator of a stage's ``model/``, the LoRA that it makes of ``reads`` (else of ``prompt``), and the base's own tokenizer."""
    context = stage_of(folder)
    reads = _checked(reads, prompt, read_record(folder), context)
    conditions = None if reads.named is None else _own_conditions(context)
    chosen = None if conditions is None or reads.named is None else conditions.named(reads.named)
    student = open_generator(context, folder, conditions, dtype=dtype)
    student.to(device)
    if chosen is not None and conditions is not None:
        adapters = _generate(student, torch.from_numpy(conditions.texts.of(np.array([chosen.id]))))
    elif reads:
        adapters = _generate(student, condition_of(list(reads.texts), load_tokenizer(str(folder)), *student.text_shape))
    else:
        adapters = static_adapter(student)
    # The base's own, so that its text is what it would be without any of this.
    return student, adapters, load_tokenizer(resolve_source(student.base_source), student.base_revision)


def _generate(student: GeneratorStudent, condition_1SC: Tensor) -> Adapters:
    with torch.no_grad():
        return student.generate(condition_1SC.to(student.model.device)).detach()


def stage_of(folder: Path) -> StageContext:
    """The train stage whose ``model/`` this is."""
    if folder.name != "model" or not (folder.parents[1] / "recipe.json").is_file():
        raise RunError(f"{folder}: name the generator's stage, RUN/STAGE: its run knows how it was made")
    context = open_stage(folder.parent)
    context.say = lambda line: None
    return context


def _own_conditions(context: StageContext) -> ConditionSet:
    stage = conditions_stage(context, getattr(context.options, "data", None))
    if stage is None:
        raise RunError(f"--named: stage '{context.name}' was trained on data without named conditions: give the text itself by --condition TEXT")
    return open_conditions(context, stage)


def _checked(reads: Reads, prompt: str | None, record: dict[str, Any], context: StageContext) -> Reads:
    """What is really read; refused before any weight is loaded."""
    if record["options"].get("condition") == "none":
        if reads:
            raise RunError(f"stage '{context.name}' trained one LoRA for everything (condition: none), which reads nothing: leave out --condition and --named")
        return reads
    if reads.texts and reads.named is not None:
        raise RunError("--named and --condition both say what is read: give one of them")
    if not reads and not prompt:
        last = "or --named NAME" if prompt is None else "--named NAME, or a --prompt, which is read if there is nothing else"
        raise RunError(
            f"stage '{context.name}' trained a LoRA generator, which needs something to read: give --condition TEXT, --condition-file FILE, {last}"
        )
    if reads.named is not None:
        return reads
    texts, (most, _) = reads.texts or [prompt or ""], record["text_shape"]
    if len(texts) > most:
        raise RunError(f"--condition: {len(texts)} texts, and this generator reads at most {most}: give fewer")
    if "" in texts:
        raise RunError(f"--condition: text {list(texts).index('') + 1} of {len(texts)} is empty: give text, or leave it out")
    return Reads(texts)
