"""DeltaNet (arXiv 2406.06484) in the place of softmax attention: Gated DeltaNet without its forget gate.

    S <- S + k (beta (v - S^T k))^T ;  o = S^T q

A fresh one differs from a fresh Gated DeltaNet in that it remembers the whole document until a similar key comes by.
"""

from __future__ import annotations

from limbeck.config.parts.mixers import DeltaNetOptions
from limbeck.students.mixers.gated_deltanet import DeltaRuleMixer


class DeltaNet(DeltaRuleMixer):
    """The delta rule with write strengths and without decay."""

    options: DeltaNetOptions
