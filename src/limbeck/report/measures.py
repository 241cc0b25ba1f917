"""Every number that one run, stage or cell left, under names that others share: what a comparison puts side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from limbeck.evaluation.table import comparison_rows, count, decimal, percent, size
from limbeck.evaluation.table import tokens as token_count
from limbeck.report.adapters import judgements
from limbeck.report.agent import agent_stages
from limbeck.report.entries import Entry
from limbeck.report.run import Stage

GENERATED, AGENT, RANKED, DISK = "generated adapters", "on trajectories", "layer ranking", "on disk"


@dataclass(frozen=True)
class Measure:
    """A number, how it is written, and which way is better (1: more, -1: less, 0: neither)."""

    value: float
    form: Callable[[float], str]
    better: int = 0

    @property
    def cell(self) -> str:
        """The number in words."""
        return self.form(self.value) if math.isfinite(self.value) else "–"

    def beside(self, other: Measure) -> str:
        """What this is compared with another: a ratio of sizes and rates, points of shares, a difference of all else."""
        if not (math.isfinite(self.value) and math.isfinite(other.value)):
            return ""
        change = self.value - other.value
        if self.form in (size, count, seconds):
            return f"{self.value / other.value:.2f}×" if other.value > 0 else ""
        return f"{100 * change:+.1f} pt" if self.form is percent else f"{change:+.4g}"


Measures = dict[tuple[str, str], Measure]
"""``(group, name)`` -> a number."""


def seconds(value: float) -> str:
    """A time for a table."""
    return f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min" if value < 36000 else f"{value / 3600:.1f} h"


def nats(value: float) -> str:
    """A loss."""
    return f"{value:.4f}"


KNOWN: dict[str, tuple[Callable[[float], str], int]] = {
    "loss": (nats, -1), "kl": (nats, -1), "ce": (nats, -1), "agreement": (percent, 1), "accuracy": (percent, 1),
}  # fmt: skip
"""Measures of a validation of which a direction is known."""


def measures(entry: Entry) -> Measures:
    """All of them, in the order in which they are shown."""
    found: Measures = {}
    if entry.evaluation:
        found |= _evaluated(*entry.evaluation)
    found |= _generated(entry)
    for stage in entry.stages:
        if stage.ranking:
            score = next((row["score"] for row in stage.ranking["sets"] if row["layers"] == stage.ranking["keep"]), math.nan)
            found[RANKED, "layers kept"] = Measure(len(stage.ranking["keep"]), decimal)
            found[RANKED, "score of the chosen set"] = Measure(score, nats, -1)
            found[RANKED, "tokens spent"] = Measure(stage.ranking["tokens"]["all"], count, -1)
    for stage in entry.stages:
        group = f"training: {stage.name}" if entry.whole else "training"
        found |= {(group, name): measure for name, measure in _trained(stage)}
    main = entry.main
    if main is not None:
        found |= {(DISK, name): measure for name, measure in _stored(main)}
    return found


def _evaluated(results: dict[str, Any], column: str) -> Measures:
    place, found = list(results["models"]).index(column), {}
    for row in comparison_rows(results):
        value = row.values[place]
        if value is not None:
            found[row.group, row.measure] = Measure(value, row.form, row.better)
    for point in results.get("speed", {}).get(column, ()):
        found["decode rate", f"tokens a second at {token_count(point['context'])} tokens"] = Measure(point["tokens_per_second"], count, 1)
    return found


def _generated(entry: Entry) -> Measures:
    """What evaluations of LoRA generators say of it: those of its run, or those of its stage."""
    found: Measures = {}
    for judged in judgements(entry.run):
        if not _counts(entry, judged.stage, judged.generated):
            continue
        for split in judged.splits:
            numbers = judged.split(split)
            place, key = split.replace("_", " "), judged.generated
            found[GENERATED, f"loss, {place}"] = Measure(_number(numbers["nll"].get(key)), nats, -1)
            if judged.gain(split) > 0:
                found[GENERATED, f"share of the teacher's gain, {place}"] = Measure(_number(numbers["share"].get(key)), percent, 1)
            found[GENERATED, f"beats the base, {place}"] = Measure(_number(numbers.get("beats_base")), percent, 1)
    for stage in agent_stages(entry.run):
        results = stage.agent or {}
        if not _counts(entry, stage, results["generated"]):
            continue
        for split, numbers in results["splits"].items():
            for key, name, form, better in (("nll", "loss", nats, -1), ("kl", "KL to teacher", nats, -1), ("agreement", "agreement", percent, 1)):
                if key in numbers:
                    found[AGENT, f"{name}, {split.replace('_', ' ')}"] = Measure(_number(numbers[key].get(results["generated"])), form, better)
    return found


def _counts(entry: Entry, judging: Stage, generated: str) -> bool:
    return entry.whole or (not entry.cell and entry.stages[0].name in (judging.name, generated))


def _trained(stage: Stage) -> Iterator[tuple[str, Measure]]:
    rows = [row for row in stage.metrics if "loss" in row]
    validations = [row for row in stage.metrics if any(key.startswith("validation/") for key in row)]
    result: Mapping[str, Any] = stage.record.get("result") or {}
    if not rows:
        return
    yield "tokens", Measure(stage.tokens, count)
    yield "steps", Measure(rows[-1]["step"], decimal)
    if "loss" in result:
        yield "loss, mean of the last tenth", Measure(_number(result["loss"]), nats, -1)
    for key, name, form, better in (("kl", "KL from the teacher", nats, -1), ("agreement", "top-1 agreement", percent, 1)):
        last = [row[key] for row in rows[-max(1, len(rows) // 10) :] if isinstance(row.get(key), int | float)]
        if last:
            yield f"{name}, last tenth", Measure(sum(last) / len(last), form, better)
    for key, value in (validations[-1] if validations else {}).items():
        name = key.removeprefix("validation/")
        if name != key and "/" not in name and isinstance(value, int | float):
            yield f"held out: {name}", Measure(float(value), *KNOWN.get(name, (nats, 0)))
    if "seconds" in stage.record:
        yield "time", Measure(stage.record["seconds"], seconds)
    rates = [row["tokens_per_second"] for row in rows if isinstance(row.get("tokens_per_second"), int | float)]
    if rates:
        yield "tokens a second, median", Measure(median(rates), count, 1)
    memory = [row["memory_bytes"] for row in rows if isinstance(row.get("memory_bytes"), int | float)]
    if memory:
        yield "memory, at most", Measure(max(memory), size, -1)


def _stored(stage: Stage) -> Iterator[tuple[str, Measure]]:
    """Sizes of the model and of what was exported of it."""
    if stage.folder is None:
        return
    places = {"model": stage.folder / "model"}
    if (stage.folder / "export").is_dir():
        places |= {f"export: {path.name}": path for path in sorted((stage.folder / "export").iterdir()) if not path.name.startswith(".")}
    for name, folder in places.items():
        files = [folder] if folder.is_file() else [file for file in folder.rglob("*") if file.is_file()] if folder.is_dir() else []
        weights = [file.stat().st_size for file in files if file.suffix in (".safetensors", ".gguf")]
        if weights:
            yield name, Measure(sum(weights), size, -1)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
