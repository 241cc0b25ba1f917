"""Batches of (teacher's tokens, condition, teacher's delta): what the plan's phase 2 asks of a data loader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from limbeck.adapters.delta_store import MeasuredDeltas
from limbeck.adapters.dnd import DnDTokenizer
from limbeck.adapters.pool import Pool, flat, read_pool
from limbeck.adapters.spec import Adapters
from limbeck.behaviour.opening import stage_of_kind
from limbeck.behaviour.tokens import Qwen2515LoRA_Tokenizer2D
from limbeck.data.conditions.store import ConditionSet
from limbeck.errors import AdapterError, DataError
from limbeck.stages.adapting import entries_of

Form = Literal["prompts", "prompt_answer"]
Item = dict[str, Any]


class DeltaAugmentedDataset(Dataset[Item]):
    """One item for each teacher adapter of some conditions, and each draw of condition texts.

    An item is a mapping: ``tokens_teacher`` (fp32: DnD's tokens ``[tokens, rows, cols]`` with NaN where there is no number, or ``[numbers]``
    of A and B), ``condition`` (int64 ``[S, C]``, padded with -1), ``delta_teacher`` (fp32 ``[F]``), ``condition_id`` and ``entry``, the
    adapter's number in the pool.

    Args:
        conditions: the artefact of a prepare_conditions stage, or its folder.  Its ``condition.form`` says whether a generator reads
            prompts, or prompts with their answers.
        pool: the artefact of a train_adapters stage, or its folder.
        deltas: the artefact of a measure_deltas stage of that pool, or its folder.
        tokens: ``dnd`` or ``factors``.
        splits: conditions whose teachers are given; those of held-out ones are for judging.
        draws: sets of texts for each adapter.
        form: what the conditions must be written as; whatever they are by default.

    Raises:
        LimbeckError: artefacts that do not belong together, or conditions of the other form.
    """

    def __init__(
        self,
        conditions: ConditionSet | str | Path,
        pool: Pool | str | Path,
        deltas: MeasuredDeltas | str | Path,
        *,
        tokens: Literal["dnd", "factors"] = "dnd",
        splits: Sequence[str] = ("seen",),
        draws: int = 1,
        form: Form | None = None,
    ):
        if draws < 1:
            raise DataError(f"draws is {draws}, and must be at least 1")
        self.conditions = conditions if isinstance(conditions, ConditionSet) else ConditionSet(Path(conditions))
        self.pool = pool if isinstance(pool, Pool) else read_pool(Path(pool))
        self.deltas = deltas if isinstance(deltas, MeasuredDeltas) else MeasuredDeltas(Path(deltas))
        self._check(form)
        found, wanted = entries_of(self.pool, self.conditions), self.conditions.split(*splits)
        self._pairs = [(condition, entry) for condition in wanted for entry in found.get(condition, [])]
        if not self._pairs:
            raise DataError(f"no condition of {', '.join(splits)} has a teacher in {self.pool.folder}: train_adapters.splits says which get one")
        self.draws = draws
        self._deltas_MF = self.deltas.stacked([self.pool.entries[entry].name for _, entry in self._pairs])
        self.tokenizer = self._tokenizer() if tokens == "dnd" else None

    def _tokenizer(self) -> DnDTokenizer:
        return DnDTokenizer(self.adapters([self._pairs[0][1]]).spec)

    def _check(self, form: Form | None) -> None:
        made = self.conditions.manifest.form
        if form is not None and form != made:
            raise DataError(
                f"{self.conditions.folder}: these conditions are read as '{made}', and '{form}' is asked for: set `condition: {{form: {form}}}` in a "
                "prepare_conditions stage"
            )
        if self.deltas.record["base"]["fingerprint"] != self.pool.base["fingerprint"]:
            raise AdapterError(
                f"{self.deltas.folder}: its deltas were measured on another base than that of the adapters in {self.pool.folder}: "
                "measure them again"
            )

    @property
    def form(self) -> Form:
        """What of an example is read: ``prompts`` or ``prompt_answer``."""
        return self.conditions.manifest.form  # type: ignore[return-value]

    def adapters(self, entries: Sequence[int]) -> Adapters:
        """The teachers with these numbers in the pool, such as ``batch["entry"]``."""
        return self.pool.adapters([self.pool.entries[int(entry)] for entry in entries])

    def __len__(self) -> int:
        """Adapters times draws."""
        return len(self._pairs) * self.draws

    def __getitem__(self, index: int) -> Item:
        """One item; negative numbers count from the end."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        draw, place = divmod(index % len(self), len(self._pairs))
        condition, entry = self._pairs[place]
        teacher = self.adapters([entry])
        tokens = flat(teacher)[0].float() if self.tokenizer is None else self.tokenizer.tokenize(teacher)[0].float()
        texts = torch.from_numpy(self.conditions.texts.of(np.array([condition]), draw=draw)[0])
        return {"tokens_teacher": tokens, "condition": texts, "delta_teacher": self._deltas_MF[place], "condition_id": condition, "entry": entry}


class Text2Qwen25LoRA_DeltaDataset(DeltaAugmentedDataset):
    """:class:`DeltaAugmentedDataset` of a run directory, in the tokens of :class:`Qwen2515LoRA_Tokenizer2D`.

    Args:
        run: what a recipe with the stages prepare_conditions, train_adapters and measure_deltas made.
        form: ``prompts`` or ``prompt_answer``, which the conditions must be.
        conditions: that stage's name, where there are several of its kind; ``pool`` and ``deltas`` too.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        form: Form = "prompts",
        conditions: str | None = None,
        pool: str | None = None,
        deltas: str | None = None,
        splits: Sequence[str] = ("seen",),
        draws: int = 1,
    ):
        kinds = (("prepare_conditions", conditions, "conditions"), ("train_adapters", pool, "adapters"), ("measure_deltas", deltas, "deltas"))
        folders = [Path(run) / stage_of_kind(run, kind, name) / artefact for kind, name, artefact in kinds]
        missing = [folder for folder in folders if not folder.is_dir()]
        if missing:
            raise DataError(f"{missing[0]} is not there: run that stage first")
        super().__init__(*folders, splits=splits, draws=draws, form=form)

    def _tokenizer(self) -> DnDTokenizer:
        return Qwen2515LoRA_Tokenizer2D(self.adapters([self._pairs[0][1]]))


def create_dataloader(
    dataset: DeltaAugmentedDataset, batch_size: int = 4, *, shuffle: bool = True, seed: int = 0, num_workers: int = 0
) -> DataLoader[Item]:
    """Batches of items stacked: ``tokens_teacher [B, ...]``, ``condition [B, S, C]``, ``delta_teacher [B, F]`` fp32, ``condition_id [B]``.

    The order depends on ``seed`` alone.
    """
    order = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size, shuffle=shuffle, generator=order, num_workers=num_workers, collate_fn=_stacked)


def _stacked(items: list[Item]) -> Item:
    batch: Item = default_collate(items)
    size = len(items)
    wanted = {"tokens_teacher": (torch.float32, None), "condition": (torch.int64, 3), "delta_teacher": (torch.float32, 2)}
    for name, (dtype, dimensions) in wanted.items():
        found: Tensor = batch[name]
        assert found.dtype == dtype and len(found) == size and dimensions in (None, found.ndim), (name, found.dtype, found.shape)
    return batch
