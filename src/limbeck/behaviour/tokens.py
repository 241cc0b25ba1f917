"""DnD's two-dimensional tokens of the LoRAs of Qwen2.5-1.5B, under DnD's name for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.adapters.dnd import Codec, DnDTokenizer
from limbeck.adapters.peft_files import read_peft_file
from limbeck.adapters.spec import Adapters, AdapterSpec
from limbeck.behaviour.config import TrainingConfig


class Qwen2515LoRA_Tokenizer2D(DnDTokenizer):
    """Between LoRAs and tokens ``[N, tokens, rows, cols]``; for Qwen2.5-1.5B at rank 16: 4508 of (18, 258).

    Unlike the published one it needs no teacher file as a template: names and shapes are those of the spec.

    Args:
        like: what the LoRAs are shaped like: a spec, adapters or a PEFT folder; by default rank 16 on the seven Linears of Qwen2.5-1.5B.
        codec: ``exact`` keeps every adapter; ``legacy`` writes and reads the numbers of DnD's own files.
    """

    def __init__(self, like: AdapterSpec | Adapters | str | Path | None = None, codec: Codec = "exact"):
        if like is None:
            like = TrainingConfig(use_small_model=False).adapter_spec()
        elif isinstance(like, str | Path):
            like = read_peft_file(Path(like))
        super().__init__(like.spec if isinstance(like, Adapters) else like, codec=codec)

    def tokenize(self, adapters: Adapters | str | Path) -> Tensor:
        """Tokens of adapters or of a PEFT folder; NaN where a token holds no number."""
        return super().tokenize(read_peft_file(Path(adapters)) if isinstance(adapters, str | Path) else adapters)

    def roundtrip_error(self, adapters: Adapters | str | Path) -> float:
        """Largest absolute difference of a token that is decoded and coded again, where it holds a number."""
        tokens: Any = self.tokenize(adapters)
        again = self.tokenize(self.detokenize(tokens))
        held = ~tokens.isnan()
        return float((again[held] - tokens[held]).abs().max()) if torch.equal(held, ~again.isnan()) else float("inf")
