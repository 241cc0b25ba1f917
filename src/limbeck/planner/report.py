"""What a plan says, as values: facts with units, memory item by item, and a verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from limbeck.planner.devices import count_text, size_text, time_text
from limbeck.planner.memory import MOMENTS, Item, peak

Unit = Literal["bytes", "count", "seconds", "rate", "text"]


@dataclass(frozen=True)
class Fact:
    """One number, or a word."""

    group: str
    name: str
    value: float | str | None
    unit: Unit = "bytes"
    note: str = ""

    @property
    def text(self) -> str:
        """For people."""
        if self.value is None:
            return "unknown"
        if isinstance(self.value, str):
            return self.value
        if self.unit == "bytes":
            return size_text(self.value)
        if self.unit == "seconds":
            return time_text(self.value)
        if self.unit == "rate":
            return f"{count_text(self.value)} tokens/s"
        return f"{self.value:,.0f}" if self.value < 1e6 else count_text(self.value)


@dataclass(frozen=True)
class Part:
    """One stage of a recipe, or a model that is served."""

    name: str
    kind: str
    facts: tuple[Fact, ...] = ()
    items: tuple[Item, ...] = ()
    """Memory of one rank."""
    budget: float = 0.0
    """Bytes that a rank may take."""
    seconds: float | None = None
    """Wall clock; None where it is not known."""
    violated: str = ""
    """The first constraint that does not hold; empty when it fits."""
    changes: tuple[str, ...] = ()
    """Words of the command line that make it fit, the smallest first."""
    alternatives: bool = False
    """Whether each of the changes is enough by itself; else all of them are needed."""
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether it can run as it is."""
        return not self.violated

    @property
    def peak(self) -> tuple[float, str]:
        """Bytes of a rank when it holds most, and when that is."""
        return peak(self.items)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        groups: dict[str, dict[str, Any]] = {}
        for fact in self.facts:
            groups.setdefault(fact.group, {})[fact.name] = {"value": fact.value, "unit": fact.unit, "note": fact.note}
        most, moment = self.peak
        memory = {
            "items": [{"name": item.name, **{moment: getattr(item, moment) for moment in MOMENTS}, "note": item.note} for item in self.items],
            "peak": most,
            "when": moment if self.items else None,
            "budget": self.budget,
        }
        return {
            "name": self.name,
            "kind": self.kind,
            "facts": groups,
            "memory": memory,
            "seconds": self.seconds,
            "fits": self.fits,
            "violated": self.violated or None,
            "changes": list(self.changes),
            "alternatives": self.alternatives,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Plan:
    """All of it."""

    title: str
    device: str
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def fits(self) -> bool:
        """Whether every part does."""
        return all(part.fits for part in self.parts)

    @property
    def seconds(self) -> float | None:
        """Wall clock of all parts, one after the other; None where one is not known."""
        times = [part.seconds for part in self.parts]
        return None if any(time is None for time in times) else sum(time or 0.0 for time in times)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        stages = [part.to_json() for part in self.parts]
        return {"title": self.title, "device": self.device, "fits": self.fits, "seconds": self.seconds, "parts": stages, "notes": list(self.notes)}


def parameter_facts(total: int, active: int, trained: int | None, exact: bool) -> list[Fact]:
    """Parameters: all of them, those that a token meets, those that train."""
    found = [
        Fact("parameters", "total", total, "count", "" if exact else "family not known exactly: counted like a Llama"),
        Fact("parameters", "active", active, "count"),
    ]
    return found if trained is None else [*found, Fact("parameters", "trainable", trained, "count")]
