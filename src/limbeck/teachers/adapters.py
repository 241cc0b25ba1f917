"""A pool of adapters as teacher: their weights, their behaviour on probes, or the base with them on the batch's text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from limbeck.adapters.delta_store import MeasuredDeltas, adapter_key, tensor_digest
from limbeck.adapters.deltas import DeltaSignal
from limbeck.adapters.inject import Injector
from limbeck.adapters.pool import Pool
from limbeck.adapters.spec import Adapters
from limbeck.config.parts.teachers import AdaptersTeacherOptions
from limbeck.errors import TeacherError
from limbeck.models.head import head_of
from limbeck.models.packed import forward_packed, rows_seen
from limbeck.needs import AdapterFactors, Deltas, HeadHidden, InputMoments, Need
from limbeck.teachers.frozen import FrozenModel
from limbeck.types import Batch, Output, Signal, Visit


class AdaptersTeacher(FrozenModel):
    """Answers for each row by a teacher of the row's condition.

    ``entries_of`` maps a condition's number, as batches hold it, to its entries in the pool; of several, the row's own text decides
    which one answers.  The base is loaded only if ``needs`` ask for hidden states.
    """

    def __init__(
        self,
        options: AdaptersTeacherOptions,
        pool: Pool,
        entries_of: Mapping[int, Sequence[int]],
        *,
        needs: Mapping[type[Need], Need],
        base_source: str,
        base_revision: str | None = None,
        deltas: MeasuredDeltas | None = None,
    ):
        super().__init__(base_source, dtype=options.dtype, revision=base_revision)
        self.pool, self.deltas = pool, deltas
        self.needs = dict(needs)
        self.num_ids: int | None = None
        most = max((len(found) for found in entries_of.values()), default=0)
        count = max(entries_of, default=-1) + 1
        # Conditions without a teacher (held-out ones) never come up in training.
        self._entries = torch.full((count, max(most, 1)), -1, dtype=torch.int64)
        self._numbers = torch.zeros(count, dtype=torch.int64)
        for condition, found in entries_of.items():
            self._entries[condition, : len(found)] = torch.tensor(list(found))
            self._numbers[condition] = len(found)
        self._adapters: Adapters | None = None
        self._targets: Tensor | None = None

    def load(self, device: torch.device | str) -> None:
        """Read the adapters and their deltas; the base too, if it has to run."""
        factors = AdapterFactors in self.needs or HeadHidden in self.needs
        # Whole models have behaviour alone; asked for factors, their pool says so.
        held = self.pool.adapters() if factors or self.pool.mode == "lora" else None
        if factors and held is not None:
            self._adapters = held.to(torch.float32)
        if Deltas in self.needs:
            assert self.deltas is not None
            if held is not None:
                self._check_measured(self.deltas, held)
            self._targets = self.deltas.stacked([entry.name for entry in self.pool.entries])
        if HeadHidden in self.needs:
            super().load(device)
            assert self._adapters is not None
            self._injector = Injector(self.model, self._adapters.spec)

    def _check_measured(self, deltas: MeasuredDeltas, adapters: Adapters) -> None:
        """Another pool's adapters may have the same names: their deltas would teach something else."""
        held = deltas.record["adapters"]
        for i, entry in enumerate(self.pool.entries):
            if entry.name in held and held[entry.name]["key"] != adapter_key(adapters, i, deltas.record["measuring"]):
                raise TeacherError(
                    f"{deltas.folder}: the delta of {entry.name} was measured of another adapter than the one in {self.pool.folder}: name the "
                    "measure_deltas stage of this pool"
                )

    def fingerprint(self) -> dict[str, Any]:
        """The base, every adapter's tensors and config, and what was measured of them."""
        files = hashlib.sha256()
        for entry in self.pool.entries:
            folder = self.pool.folder / entry.folder
            # Tensors, not bytes: safetensors writes its header's words in any order.
            found = {path.name: tensor_digest(load_file(path)) for path in sorted(folder.glob("*.safetensors"))}
            found |= {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*config.json"))}
            files.update(f"{entry.name}: {found}\n".encode())
        return {"base": dict(self.pool.base), "adapters": files.hexdigest(), "deltas": self.deltas.digest if self.deltas else None, "dtype": self.dtype}

    def entries(self, batch: Batch) -> Tensor:
        """The pool entry that answers for each row, int64 ``[B]`` on the CPU; 0 for padding, whose rows do not count."""
        assert batch.adapters_B is not None
        conditions = batch.adapters_B.cpu()
        known = (conditions < len(self._numbers)) & (conditions >= 0)
        numbers = torch.where(known, self._numbers[conditions.clamp(0, len(self._numbers) - 1)], 0)
        if bool(((conditions >= 0) & (numbers == 0)).any()):
            missing = sorted({int(c) for c in conditions[(conditions >= 0) & (numbers == 0)]})
            raise TeacherError(
                f"condition {missing[0]} has no adapter in {self.pool.folder} ({len(missing)} such conditions in this batch): train its teacher, "
                "or leave it out"
            )
        turn = batch.input_ids_BT.cpu().sum(1) % numbers.clamp_min(1)
        return torch.where(known, self._entries[conditions.clamp_min(0), turn], 0)

    @torch.no_grad()
    def signal(self, batch: Batch, needs: Mapping[type[Need], Need]) -> Signal:
        """``signal[AdapterFactors]`` is :class:`Adapters` of the rows, ``[Deltas]`` a :class:`DeltaSignal`, ``[InputMoments]`` a mapping
        of sites to ``[L, I, I]``, ``[HeadHidden]`` an :class:`Output`."""
        device, chosen, signal = batch.input_ids_BT.device, self.entries(batch), Signal()
        adapters = None if self._adapters is None else self._adapters.pick(chosen).to(device)
        if AdapterFactors in needs:
            signal[AdapterFactors] = adapters
        if Deltas in needs:
            assert self.deltas is not None and self._targets is not None
            signal[Deltas] = DeltaSignal(self._targets[chosen], self.deltas.probes, self.deltas.represent).to(device)
        if InputMoments in needs:
            assert self.deltas is not None
            signal[InputMoments] = {name: moment.to(device) for name, moment in self.deltas.moments().items()}
        if HeadHidden in needs:
            assert adapters is not None
            rows = rows_seen(self.model, batch)
            with self._injector.active(adapters if rows is None else adapters.pick(rows)):
                signal[HeadHidden] = Output(forward_packed(self.model, batch), head_of(self.model, self.num_ids))
        return signal

    def stream(self, batch: Batch, visit: Visit) -> None:
        """Adapters do not stream; their options say so before anything is loaded."""
        raise TypeError("teacher 'adapters' does not stream attention: use teacher 'self'")
