"""Devices by their data sheets, and sizes as people write them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from limbeck.errors import LimbeckError, did_you_mean


class PlanError(LimbeckError, ValueError):
    """Something that cannot be planned: an option, a name or a config that must be another."""


@dataclass(frozen=True)
class Device:
    """One accelerator, or one machine without.  Rates are dense, without sparsity."""

    name: str
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second of its memory."""
    bf16: float
    """Floating-point operations a second in bfloat16."""
    fp32: float
    fp8: float | None
    """None where the device has no such units."""
    kernels: bool = True
    """Whether linear attention has fused kernels there (flash-linear-attention)."""

    def peak(self, precision: str) -> float:
        """Operations a second in a compute dtype."""
        if precision == "fp8":
            return self.fp8 or self.bf16
        if precision == "float64":
            return self.fp32 / 2
        return self.fp32 if precision == "float32" else self.bf16


_GB, _TB, _TFLOP = 1e9, 1e12, 1e12
DEVICES = {
    "h100": Device("h100", 80 * _GB, 3.35 * _TB, 989 * _TFLOP, 67 * _TFLOP, 1979 * _TFLOP),
    "h200": Device("h200", 141 * _GB, 4.8 * _TB, 989 * _TFLOP, 67 * _TFLOP, 1979 * _TFLOP),
    "a100": Device("a100", 80 * _GB, 2.04 * _TB, 312 * _TFLOP, 19.5 * _TFLOP, None),
    "b200": Device("b200", 180 * _GB, 8 * _TB, 2250 * _TFLOP, 80 * _TFLOP, 4500 * _TFLOP),
    "l40s": Device("l40s", 48 * _GB, 0.864 * _TB, 362 * _TFLOP, 91.6 * _TFLOP, 733 * _TFLOP),
    "rtx4090": Device("rtx4090", 24 * _GB, 1.01 * _TB, 165 * _TFLOP, 82.6 * _TFLOP, 330 * _TFLOP),
    "cpu": Device("cpu", 0.0, 0.02 * _TB, 0.1 * _TFLOP, 0.1 * _TFLOP, None, kernels=False),
}
"""SXM forms where there are several; the CPU is two cores of a server, its memory what this machine has."""


def find_device(name: str, memory: float | None = None) -> Device:
    """A device of the table, with another memory if given; :class:`PlanError` names the ones that there are."""
    key = name.lower().replace("-", "").replace("_", "").replace(" ", "")
    device = DEVICES.get(key)
    if device is None:
        hint = did_you_mean(key, DEVICES) or ";"
        others = "for another take the nearest and give --memory, --peak and --bandwidth"
        raise PlanError(f"--device: no device {name!r}{hint} known: {', '.join(DEVICES)} ({others})")
    if memory is None and not device.memory:
        memory = machine_memory()
    return device if memory is None else replace(device, memory=memory)


def machine_memory() -> float:
    """Bytes of memory of this machine."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return 16e9


_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmgtp]?)(i?)b?\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}


def parse_bytes(text: str, option: str) -> float:
    """``141GB``, ``80GiB``, ``1.5T`` as bytes."""
    match = _SIZE.fullmatch(text)
    if match is None or not float(match[1]):
        raise PlanError(f"{option}: {text!r} is no size: write it like 141GB, 80GiB or 1.5TB")
    return float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2].lower()]


def parse_count(text: str, option: str) -> float:
    """``28k``, ``0.9B``, ``160M`` as a number."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmbt]?)\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise PlanError(f"{option}: {text!r} is no number: write it like 28000, 28k, 160M or 0.9B")
    return float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[match[2].lower()]


def size_text(size: float) -> str:
    """``482 GB``, ``24.6 kB``: three digits, powers of ten, as disks and GPUs are sold."""
    for limit, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(size) >= 0.9995 * limit:
            return f"{size / limit:.3g} {unit}" if abs(size) < 999.5 * limit else f"{size / limit:.0f} {unit}"
    return f"{size:.0f} B"


def count_text(count: float) -> str:
    """``480.15B``, ``17.14M``: parameters and tokens, two places."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= limit:
            return f"{count / limit:.2f}{unit}"
    return f"{count:.0f}"


def time_text(seconds: float) -> str:
    """``7.4 days``, ``8.9 h``, ``12 min``, ``3.0 s``."""
    for limit, unit in ((2 * 86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= limit:
            return f"{seconds / (86400 if unit == 'days' else limit):.3g} {unit}"
    return f"{seconds:.2g} s"
