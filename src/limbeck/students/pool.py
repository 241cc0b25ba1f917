"""Many LoRAs of one frozen base, trained at once: every row of a batch has its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.adapters.inject import Injector
from limbeck.adapters.spec import Adapters, AdapterSpec
from limbeck.adapters.start import bound_of_A
from limbeck.errors import ModelError
from limbeck.models.head import head_of
from limbeck.models.packed import forward_packed, leak_probe, rows_seen
from limbeck.models.structure import layer_list
from limbeck.students.generator.heads import key_of
from limbeck.types import Batch, Output

POOL_ROLE = "adapters"


class AdapterPool(nn.Module):
    """N LoRAs as parameters: ``A [N, L, R, I]`` and ``B [N, L, O, R]`` of each site.

    A row's ``adapters_B`` is its LoRA's number in the pool.  What one LoRA gets depends on its own rows alone: elementwise
    optimisers keep it so.
    """

    def __init__(self, model: Any, spec: AdapterSpec, count: int, *, init: Literal["shared", "independent"], seed: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.spec, self.count = spec, count
        self.num_ids: int | None = None
        generator = torch.Generator().manual_seed(seed)
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        starts: dict[str, list[Tensor]] = {site.name: [] for site in spec.sites}
        # Adapter by adapter: the first ones do not depend on how many there are.
        for _ in range(1 if init == "shared" else count):
            for site in spec.sites:
                shape = (len(site.layers), spec.rank, site.in_features)
                starts[site.name].append((torch.rand(shape, generator=generator, dtype=dtype) * 2 - 1) * bound_of_A(site))
        for site in spec.sites:
            A = torch.stack(starts[site.name]).expand(count, -1, -1, -1).contiguous()
            self.A[key_of(site)] = nn.Parameter(A)
            self.B[key_of(site)] = nn.Parameter(torch.zeros(count, len(site.layers), site.out_features, spec.rank, dtype=dtype))
        self.injector = Injector(model, spec)
        leak_probe(model)

    @property
    def adapters(self) -> Adapters:
        """All LoRAs; the parameters themselves."""
        A = {site.name: self.A[key_of(site)] for site in self.spec.sites}
        return Adapters(self.spec, A, {site.name: self.B[key_of(site)] for site in self.spec.sites})

    def gathered(self, A: Mapping[str, Tensor], B: Mapping[str, Tensor]) -> Adapters:
        """Adapters from the whole state of :attr:`A` and :attr:`B`, which may have been sharded."""
        return Adapters(self.spec, {s.name: A[key_of(s)] for s in self.spec.sites}, {s.name: B[key_of(s)] for s in self.spec.sites})

    @property
    def roles(self) -> dict[str, str]:
        """One role for all."""
        return {name: POOL_ROLE for name, parameter in self.named_parameters() if parameter.requires_grad}

    def units(self) -> list[nn.Module]:
        """What is sharded as a unit of its own; the factors stay with the root, which uses them all."""
        return [*layer_list(self.model)]

    def train(self, mode: bool = True) -> AdapterPool:
        """The base stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, batch: Batch) -> Output:
        """Final hidden states of rows, each with its LoRA."""
        if batch.adapters_B is None:
            raise ModelError("rows of a pool name their adapter, and these do not")
        rows = rows_seen(self.model, batch)
        with self.injector.active(self._of_rows(batch.adapters_B if rows is None else batch.adapters_B[rows])):
            return Output(forward_packed(self.model, batch), head_of(self.model, self.num_ids))

    def _of_rows(self, numbers_B: Tensor) -> Adapters:
        """One LoRA for equal runs of rows where the rows stand so, else one for each row."""
        # Rows of padding have no LoRA; any will do, as nothing of theirs counts.
        slots, runs = numbers_B.clamp_min(0).unique_consecutive(return_counts=True)
        if int(runs.min()) != int(runs.max()):
            slots = numbers_B.clamp_min(0)
        if len(slots) == self.count and bool((slots == torch.arange(self.count, device=slots.device)).all()):
            return self.adapters
        return self.adapters.pick(slots)
