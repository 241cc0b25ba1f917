"""A student: a model, the role of each of its parameters, and where it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.config.base import From
from limbeck.config.parts.stages import StudentOptions
from limbeck.errors import ModelError
from limbeck.models.head import head_of
from limbeck.models.limbeck_model import surgeries_of, wrap_student
from limbeck.models.loading import build_model, fingerprint, load_model, resolve_source, save_model
from limbeck.models.observe import forward_observed
from limbeck.models.packed import leak_probe
from limbeck.models.structure import decoder_layers, layer_list
from limbeck.needs import Need
from limbeck.records import unsealed
from limbeck.students.hybridize import REST_ROLE, resolve_layers
from limbeck.types import Batch, Metric, Output

Locate = Callable[[Any], str]
"""Maps a model source, or ``{from: stage}``, to a folder or hub name."""


class Student(nn.Module):
    """What trains."""

    def __init__(self, model: PreTrainedModel, source: str | None = None):
        """``source`` is the plain model that the student starts as; one with surgery remembers its base by itself."""
        super().__init__()
        self.model: Any = model
        self._source = source
        self.num_ids: int | None = None
        """Output rows that count, where the teacher's head is narrower than the student's."""
        leak_probe(model)

    @property
    def trained(self) -> nn.Module:
        """What may train, and what is saved: names of parameters start here."""
        return self.model

    @property
    def surgeries(self) -> list[Any]:
        """The surgeries that made the student, in order; none for a plain model."""
        return surgeries_of(self.model.config) if hasattr(self.model.config, "limbeck") else []

    @cached_property
    def roles(self) -> dict[str, str]:
        """Role of every parameter by its name in the model: what the last surgery that claims it says, else ``rest``."""
        roles = {name: REST_ROLE for name, _ in self.model.named_parameters()}
        for surgery in self.surgeries:
            roles.update({name: role for name, role in surgery.roles(self.model).items() if role != REST_ROLE})
        return roles

    @cached_property
    def base_source(self) -> str | None:
        """Folder or hub name of the base, checked to be the one that the student was made from; None for a model from scratch."""
        return self._source if not self.surgeries else checked_base(self.model.config.limbeck["base"])

    @property
    def base_revision(self) -> str | None:
        """The commit of a base from the hub; None for a folder."""
        return self.model.config.limbeck["base"]["fingerprint"].get("commit") if self.surgeries else None

    def forward(self, batch: Batch, needs: Mapping[type[Need], Need] | None = None) -> Output:
        """Final hidden states of packed rows, and the head; what ``needs`` ask to see inside is ``observed``."""
        hidden_BTD, observed = forward_observed(self.model, batch, needs or {})
        return Output(hidden_BTD, head_of(self.model, self.num_ids), observed=observed)

    def mixers(self) -> dict[int, nn.Module]:
        """Mixers by layer index."""
        return self.model.mixers() if self.surgeries else {}

    @cached_property
    def _moving(self) -> list[Any]:
        """The surgeries that follow the training, each with what it remembers of it."""
        return [surgery for surgery in self.surgeries if hasattr(surgery, "at_step")]

    def at_step(self, step: int) -> None:
        """Put what changes over a training to where it is in a step (from 0): a function of the step alone."""
        for surgery in self._moving:
            surgery.at_step(self.model, step)

    def measures(self) -> dict[str, Metric]:
        """What the surgeries tell the log about the student itself, as ``(sum, count)``."""
        return {name: pair for surgery in self._moving for name, pair in surgery.measures(self.model).items()}

    @property
    def notes(self) -> list[str]:
        """Sentences to read before training."""
        return [note for surgery in self._moving for note in surgery.notes(self.model)]

    def units(self) -> list[nn.Module]:
        """What is sharded as a unit of its own: every mixer and every decoder layer."""
        return [*self.mixers().values(), *layer_list(self.model)]

    def save(
        self,
        folder: Path,
        *,
        tokenizer_source: str | None = None,
        state_dict: dict[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write a Hugging Face folder, with the tokenizer of ``tokenizer_source``; ``state_dict`` (of any shapes) stands in for
        sharded weights."""
        save_model(self.model, folder, tokenizer_source=tokenizer_source, dtype=dtype, state_dict=state_dict)


def build_student(options: StudentOptions, locate: Locate, *, seed: int, dtype: torch.dtype) -> Student:
    """The student of a recipe: a base with surgery, the student of another stage, or a model from scratch.

    Parameters are of ``dtype``.  Random numbers come from ``seed`` alone; the global generator is left as it was.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if options.config is not None:
            if options.surgery:
                raise ModelError(
                    "student.surgery: a model from scratch has no weights to operate on: train it in a stage of its own, "
                    "then set `base: {from: STAGE}` here"
                )
            return Student(build_model(options.config, seed=seed, dtype=dtype))
        if options.from_ is not None:
            keep = ranked_layers(locate(options.keep)) if isinstance(options.keep, From) else options.keep
            return _continued(options, keep, locate(From.model_validate({"from": options.from_})), dtype)
        assert options.base is not None
        source = locate(options.base)
        return _from_base(source, options, dtype, recorded=options.base if isinstance(options.base, str) else source)


def _from_base(source: str, options: StudentOptions, dtype: torch.dtype, recorded: str) -> Student:
    model = load_model(source, dtype=dtype, revision=options.revision)
    if not options.surgery:
        return Student(model, source)
    base = {"source": recorded if recorded.startswith("builtin:") else source, "fingerprint": fingerprint(source, options.revision)}
    return Student(wrap_student(model, options.surgery, base))


def _continued(options: StudentOptions, keep: Sequence[int] | Literal["all"] | None, folder: str, dtype: torch.dtype) -> Student:
    """The student of another stage; with ``keep``, some layers get the base's softmax attention back."""
    model: Any = load_model(folder, dtype=dtype)
    if not hasattr(model.config, "limbeck"):
        if keep is not None:
            raise ModelError(f"student.keep: the model of stage '{options.from_}' was not made by a surgery, so there is nothing to restore")
        return _from_base(folder, options, dtype, folder) if options.surgery else Student(model, folder)
    if options.surgery:
        raise ModelError(
            f"student.surgery: the student of stage '{options.from_}' has been operated on already and goes on as it is; "
            "for another surgery start again from the base"
        )
    if keep:
        layers = resolve_layers(keep, len(decoder_layers(model)), field="student.keep")
        restore_attention(model, layers, stage=options.from_ or folder)
    return Student(model)


def ranked_layers(path: str) -> tuple[int, ...]:
    """The layers that a ranking (``ranking.json`` of a rank_layers stage) says to keep."""
    try:
        keep = unsealed(Path(path).read_bytes())["keep"]
        if not isinstance(keep, list) or not all(type(layer) is int for layer in keep):
            raise ValueError(f"keep is {keep!r:.80}")
        return tuple(keep)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"student.keep: {path} cannot be read as a ranking ({error}): run its rank_layers stage again with --fresh") from error


def restore_attention(model: Any, layers: Sequence[int], *, stage: str) -> None:
    """Put the base's softmax attention back into ``layers`` of a hybrid, and write that into its config."""
    surgeries = surgeries_of(model.config)
    if not any(hasattr(surgery, "restore") for surgery in surgeries):
        raise ModelError(f"student.keep: no surgery of stage '{stage}' replaced attention, so there is nothing to restore")
    record = model.config.limbeck
    base = load_model(
        checked_base(record["base"]),
        dtype=model.dtype,
        attention=model.config._attn_implementation,
        revision=record["base"]["fingerprint"].get("commit"),
    )
    options = [surgery.restore(model, base, layers) if hasattr(surgery, "restore") else surgery.options for surgery in surgeries]
    for surgery in surgeries:
        # Loading replays every surgery on a model with this attention: so it is done here, or another function would train than is saved.
        getattr(surgery, "extend", lambda model: None)(model)
    model.config.limbeck = {**record, "surgery": [part.model_dump(mode="json", by_alias=True) for part in options]}


def checked_base(record: dict[str, Any]) -> str:
    """Folder or hub name of the recorded base; an error if it is gone or its files have changed."""
    recorded, before = record["source"], record["fingerprint"]
    try:
        source = resolve_source(recorded)
        now = fingerprint(source, before.get("commit"))
    except ModelError as error:
        raise ModelError(
            f"the base {recorded} of this student cannot be read ({error}): its attention is needed again; put the folder back where it was"
        ) from error
    differing = [f"{field}: {before.get(field)} when the student was made, {now.get(field)} now" for field in before if before[field] != now.get(field)]
    if differing:
        raise ModelError(
            f"the base {recorded} of this student has changed since ({'; '.join(differing)}): put the old files back, or "
            "make the student again from the new ones"
        )
    return source
