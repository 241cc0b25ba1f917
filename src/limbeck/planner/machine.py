"""What a plan is made for: devices, how many, and what a user says of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from limbeck.planner.devices import Device, PlanError, find_device, parse_bytes, parse_count
from limbeck.planner.serving import DTYPES, USABLE
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


def machine_of(
    device: str,
    gpus: int = 1,
    *,
    memory: str | None = None,
    peak: float | None = None,
    bandwidth: float | None = None,
    usable: float = USABLE,
    mfu: float = MFU,
    tp: int | None = None,
    ep: int | None = None,
    dtype: str | None = None,
    context: int | None = None,
    sequences: int = 1,
    tokens: str | None = None,
    teacher_rate: str | None = None,
    disk: str | None = None,
) -> Machine:
    """A machine in people's words: sizes like ``141GB``, counts like ``0.9B``, ``peak`` in TFLOP/s and ``bandwidth`` in TB/s.

    Raises:
        PlanError: a device, dtype, size or number that there is not.
    """
    if dtype is not None and dtype not in DTYPES:
        raise PlanError(f"--dtype: no dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    for option, number in (("--gpus", gpus), ("--peak", peak), ("--bandwidth", bandwidth), ("--usable", usable), ("--mfu", mfu)):
        if number is not None and not number > 0:
            raise PlanError(f"{option}: {number} is not above 0")
    chosen = find_device(device, None if memory is None else parse_bytes(memory, "--memory"))
    if peak is not None:
        chosen = replace(chosen, bf16=peak * 1e12, fp8=None)
    if bandwidth is not None:
        chosen = replace(chosen, bandwidth=bandwidth * 1e12)
    return Machine(
        chosen, gpus, usable, mfu, tp, ep, dtype, context, sequences,
        tokens=None if tokens is None else parse_count(tokens, "--tokens"),
        teacher_rate=None if teacher_rate is None else parse_count(teacher_rate, "--teacher-rate"),
        disk=None if disk is None else parse_bytes(disk, "--disk"),
    )  # fmt: skip
