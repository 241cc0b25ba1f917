"""The student that makes LoRAs: a frozen base, a generator, and the base run with what it generates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Self

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limbeck.adapters.inject import Injector
from limbeck.adapters.output import AdaptedOutput
from limbeck.adapters.spec import Adapters, AdapterSpec
from limbeck.adapters.targets import resolve_spec
from limbeck.config.parts.surgeries import DeltaPredictorOptions, LoraGeneratorOptions
from limbeck.errors import ModelError
from limbeck.files import put_in_place, sha256
from limbeck.models.head import head_of
from limbeck.models.loading import copy_tokenizer
from limbeck.models.packed import forward_packed, leak_probe, rows_seen
from limbeck.models.structure import layer_list
from limbeck.records import sealed, unsealed
from limbeck.students.adapted import runner
from limbeck.students.generator.conditions import states_of
from limbeck.students.generator.network import Generator
from limbeck.types import Batch

GENERATOR_ROLE = "generator"
RECORD, WEIGHTS = "generator.json", "generator.safetensors"
FORMAT = 1


class ConditionedStudent(nn.Module):
    """A frozen base, a reader of conditions, and a network that trains: what generators and predictors share.

    ``text_shape`` is (S, C): texts of a condition and tokens of each.  ``base`` says where the base came from (``source`` and
    ``fingerprint``).  The base never trains.
    """

    def __init__(
        self,
        model: Any,
        options: LoraGeneratorOptions | DeltaPredictorOptions,
        *,
        text_shape: tuple[int, int],
        base: dict[str, Any],
        tokenizer: Any = None,
        encoder: str | None = None,
    ):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.base = base
        self.text_shape = text_shape
        self.num_ids: int | None = None
        self.states = states_of(options, model, tokenizer, encoder)
        leak_probe(model)

    @property
    def trained(self) -> nn.Module:
        """What may train, and what is saved: names of parameters start here."""
        raise TypeError(f"{type(self).__name__} must define trained")

    @property
    def roles(self) -> dict[str, str]:
        """Every parameter that trains has the role ``generator``."""
        return {name: GENERATOR_ROLE for name, _ in self.trained.named_parameters()}

    @property
    def base_source(self) -> str:
        """Folder or hub name of the base."""
        return self.base["source"]

    @property
    def base_revision(self) -> str | None:
        """The commit of a base from the hub."""
        return self.base["fingerprint"].get("commit")

    def units(self) -> list[nn.Module]:
        """What is sharded as a unit of its own; the network that trains computes in its parameters' dtype there too."""
        self.trained.keeps_precision = True
        return [self.trained, *layer_list(self.model)]

    def train(self, mode: bool = True) -> Self:
        """The base stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States and mask of each row's condition."""
        if batch.condition_BSC is None:
            raise ModelError("this student reads conditions, and this data has none: name a prepare_conditions or prepare_trajectories stage in `data`")
        return self.states(batch.condition_BSC)

    def facts(self) -> dict[str, Any]:
        """What a saved student must remember to be built again."""
        raise TypeError(f"{type(self).__name__} must define facts()")

    def save(self, folder: Path, *, tokenizer_source: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the network, what it is, and the tokenizer; complete or not at all.  The base stays where it is.

        ``state_dict`` (tensors of any shape) stands in for the network's own, for one that was gathered from shards.
        """
        beside = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        state = self.trained.state_dict() if state_dict is None else state_dict
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, beside / WEIGHTS)
        record = {"format": FORMAT, "base": self.base, "text_shape": list(self.text_shape), **self.facts(), "weights": sha256(beside / WEIGHTS)}
        (beside / RECORD).write_text(json.dumps(sealed(record), indent=1), encoding="utf-8")
        if tokenizer_source is not None:
            copy_tokenizer(tokenizer_source, beside)
        put_in_place(beside, folder)


class GeneratorStudent(ConditionedStudent):
    """Reads each row's condition, generates its LoRA, and offers the base with it."""

    def __init__(self, model: Any, options: LoraGeneratorOptions, **facts: Any):
        """``facts`` are those of :class:`ConditionedStudent`.  Raises :class:`AdapterError` for targets that the base does not have."""
        super().__init__(model, options, **facts)
        self.options = options
        self.spec: AdapterSpec = resolve_spec(model, options.targets, rank=options.rank, alpha=options.alpha, rslora=options.rslora)
        self.generator = Generator(self.spec, options, self.states.size, self.text_shape)
        self.injector = Injector(model, self.spec)
        self.run_base = runner(model, self.injector)

    @property
    def trained(self) -> nn.Module:
        """The generator."""
        return self.generator

    def facts(self) -> dict[str, Any]:
        """Options and the Linears that they came to."""
        return {"options": self.options.model_dump(mode="json", by_alias=True), "spec": self.spec.to_json()}

    def forward(self, batch: Batch) -> AdaptedOutput:
        """One LoRA for each row; the base runs with them when an objective asks for hidden states."""
        A, B = self.generator(*self.read(batch))
        adapters = Adapters(self.spec, A, B)
        return AdaptedOutput(adapters, lambda: head_of(self.model, self.num_ids), lambda: self._hidden(batch, adapters), self.run_base)

    def generate(self, condition_NSC: Tensor) -> Adapters:
        """The LoRA of each of N conditions: S texts of at most C token ids, padded with -1."""
        A, B = self.generator(*self.states(condition_NSC))
        return Adapters(self.spec, A, B)

    def _hidden(self, batch: Batch, adapters: Adapters) -> Tensor:
        rows = rows_seen(self.model, batch)
        with self.injector.active(adapters if rows is None else adapters.pick(rows)):
            return forward_packed(self.model, batch)


def is_generator(folder: str | Path) -> bool:
    """Whether a folder holds a saved generator or predictor."""
    return (Path(folder) / RECORD).is_file()


def read_record(folder: Path) -> dict[str, Any]:
    """What a saved generator is; raises :class:`ModelError` for a damaged or newer folder."""
    try:
        record = unsealed((folder / RECORD).read_bytes())
        if record["format"] != FORMAT:
            raise ModelError(f"{folder / RECORD}: format {record['format']!r:.80}, this version reads {FORMAT}: train it again")
        return record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / RECORD}: cannot be read as a LoRA generator ({error}): train it again, or put an intact copy back") from error


def read_weights(folder: Path, generator: nn.Module) -> None:
    """Fill a generator from a folder, strictly."""
    written = read_record(folder).get("weights")
    try:
        if written is not None and sha256(folder / WEIGHTS) != written:
            raise ModelError("its content is not what was written: SHA-256 differs")
        state = load_file(folder / WEIGHTS)
        generator.load_state_dict(state, strict=True)
    except Exception as error:
        # safetensors and torch name a damaged file and a missing or misshapen tensor by different types.
        reason = str(error).strip().splitlines()
        raise ModelError(f"{folder / WEIGHTS}: does not hold this generator ({' '.join(reason[:3])}): train it again, or put an intact copy back") from error
