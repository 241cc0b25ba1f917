"""What a plan is made for: devices, how many, and what a user says of them."""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.planner.devices import Device
from limbeck.planner.serving import USABLE
from limbeck.planner.throughput import MFU


@dataclass(frozen=True)
class Machine:
    """Ranks of training, GPUs of a served model, and rates."""

    device: Device
    gpus: int = 1
    usable: float = USABLE
    mfu: float = MFU
    tp: int | None = None
    ep: int | None = None
    dtype: str | None = None
    """Of a served model's weights; by default as its checkpoint says."""
    context: int | None = None
    sequences: int = 1
    tokens: float | None = None
    """Of one pass over a recipe's text."""
    teacher_rate: float | None = None
    """Tokens that a served teacher scores in a second."""
    disk: float | None = None
    """Bytes that are free for checkpoints and signals."""

    @property
    def budget(self) -> float:
        """Bytes that a rank may take."""
        return self.device.memory * self.usable
