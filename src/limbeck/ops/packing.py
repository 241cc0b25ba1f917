"""Where documents begin in packed rows.  B rows, T tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def document_segments(documents_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens are real, and which wipe-free segment every token belongs to.

    Returns ``(real_BT bool, segments_BT int64)``.  Segments rise by one where a document begins that is not the row's first;
    padding belongs to the segment before it.
    """
    real_BT = documents_BT >= 0
    steps_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    last_real_BT = torch.where(real_BT, steps_T, -1).cummax(1).values
    before_BT = torch.nn.functional.pad(last_real_BT[:, :-1], (1, 0), value=-1)
    previous_BT = documents_BT.gather(1, before_BT.clamp_min(0))
    begins_BT = real_BT & (before_BT >= 0) & (documents_BT != previous_BT)
    return real_BT, begins_BT.cumsum(1)
