"""Where a LoRA begins: A as PEFT draws it, and B at zero."""

from __future__ import annotations

import math

from limbeck.adapters.spec import Site


def bound_of_A(site: Site) -> float:
    """A's numbers lie evenly between minus and plus this: PEFT's kaiming uniform with ``a = sqrt(5)``."""
    return 1 / math.sqrt(site.in_features)
