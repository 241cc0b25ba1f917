"""What the teachers that hold a network share: loading it frozen, and saying what it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from limbeck import __version__
from limbeck.models.loading import fingerprint, load_model
from limbeck.models.packed import leak_probe


class FrozenModel:
    """A Hugging Face causal LM that never trains.

    Construction is light; :meth:`load` brings the weights, pins the attention implementation and probes that packed documents
    do not see each other.
    """

    def __init__(self, source: str, *, dtype: str = "float32", attention: str | None = None, revision: str | None = None):
        self.source = source
        self.dtype = dtype
        self.attention = attention
        self.revision = revision
        self.module: nn.Module | None = None

    def load(self, device: torch.device | str) -> None:
        """Load the weights, frozen, in evaluation mode."""
        model = load_model(
            self.source, dtype=getattr(torch, self.dtype), device=device, attention=self.attention, revision=self.revision
        )
        model.requires_grad_(False)
        model.eval()
        leak_probe(model)
        self.module = model

    @property
    def model(self) -> Any:
        """The loaded network; asking before :meth:`load` is a programmer's error."""
        assert self.module is not None, "load() comes first"
        return self.module

    def fingerprint(self) -> dict[str, Any]:
        """What a signal of this teacher depends on; the key of every cache of it."""
        attention = self.attention or (self.model.config._attn_implementation if self.module is not None else None)
        return {
            **fingerprint(self.source, self.revision),
            "dtype": self.dtype,
            "attention": attention,
            "code": __version__,
        }
