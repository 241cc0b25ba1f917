"""The hypernetwork by name: what a prompt's states become, as a module of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck.adapters.spec import Adapters
from limbeck.adapters.targets import resolve_spec
from limbeck.agentic.settings import validated
from limbeck.config.parts.surgeries import LoraGeneratorOptions
from limbeck.errors import AdapterError
from limbeck.students.generator.conditions import BaseStates
from limbeck.students.generator.network import Generator


class AgenticHyperNetwork(nn.Module):
    """``prompt_embed [B, T, H] -> `` a LoRA for each of B prompts, on every target Linear of a frozen student.

    At the start the LoRA changes nothing (B = 0) and the output layers ``generator.decoder.to_B`` have a gradient.  Heads are shared by layers
    and ranks, layers are told apart by embeddings.

    Args:
        student: the base, a transformers model; it is read for its shapes and its states, and is no part of this module.
        targets: Linears as the student has them; by default those of both kinds of layer of Qwen3-Next.
        rank, alpha: of the LoRA.
        width: of the hypernetwork.
        trunk: residual blocks between reader and heads.
        reader: as ``surgery.reader`` of a recipe takes it.  ``{"kind": "transformer", "blocks": 4, "heads": 8}`` is the plan's encoder, whose mean
            is taken behind it and not before; one block each of perceiver and trunk keep to 50M parameters on Qwen3-Coder-Next (48.2M).
        tokens: of a prompt, at most.
        layer: layer of the student whose states :meth:`embed` gives; its input embeddings by default.  Recipes read two thirds of the way up.

    Raises:
        LimbeckError: targets that the student does not have (with the nearest names), or settings that do not fit together.
    """

    ATTENTION_TARGETS: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Of the 12 gated attention layers of Qwen3-Coder-Next."""
    DELTANET_TARGETS: ClassVar[tuple[str, ...]] = ("in_proj_qkvz", "in_proj_ba", "out_proj")
    """Of its 36 DeltaNet layers; the plan's ``linear_q``, ``linear_k`` and ``linear_v`` do not exist."""
    RANK: ClassVar[int] = 16
    ALPHA: ClassVar[float] = 32.0

    def __init__(
        self,
        student: Any,
        targets: Sequence[str] = (*ATTENTION_TARGETS, *DELTANET_TARGETS),
        *,
        rank: int = RANK,
        alpha: float = ALPHA,
        width: int = 512,
        trunk: int = 1,
        reader: dict[str, Any] | None = None,
        tokens: int = 512,
        layer: int | None = None,
    ):
        super().__init__()
        wanted = {"targets": targets, "rank": rank, "alpha": alpha, "width": width, "trunk": trunk, "layer": layer}
        read = {"blocks": 1, "heads": 8} if reader is None else reader
        self.options = validated(LoraGeneratorOptions, {**wanted, "reader": read}, "AgenticHyperNetwork")
        self.spec = resolve_spec(student, self.options.targets, rank=rank, alpha=alpha)
        self.tokens = tokens
        self._embeddings = None if layer is not None else student.get_input_embeddings
        self._states = BaseStates(student, layer)
        self.generator = Generator(self.spec, self.options, self._states.size, (1, tokens))

    @torch.no_grad()
    def embed(self, prompt_ids: Tensor) -> tuple[Tensor, Tensor]:
        """``(prompt_embed [B, T, D], mask [B, T])`` of ``prompt_ids [B, T]``, which are padded with -1."""
        if self._embeddings is not None:
            return self._embeddings()(prompt_ids.clamp_min(0)), prompt_ids >= 0
        states, mask = self._states(prompt_ids.unsqueeze(1))
        return states.squeeze(1), mask.squeeze(1)

    def forward(self, prompt_embed: Tensor, mask: Tensor | None = None) -> Adapters:
        """One LoRA for each of ``prompt_embed [B, T, D]``; ``mask [B, T]`` is True where a token is (everywhere by default).

        Raises:
            AdapterError: states of another width than the student's, or more tokens than were said.
        """
        if prompt_embed.ndim != 3 or prompt_embed.shape[-1] != self._states.size or prompt_embed.shape[1] > self.tokens:
            raise AdapterError(f"prompt_embed is {list(prompt_embed.shape)}; wanted [prompts, at most {self.tokens} tokens, {self._states.size}]")
        mask = prompt_embed.new_ones(prompt_embed.shape[:2], dtype=torch.bool) if mask is None else mask
        return Adapters(self.spec, *self.generator(prompt_embed.unsqueeze(1), mask.unsqueeze(1)))
