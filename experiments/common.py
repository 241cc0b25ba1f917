"""What experiments share: their command line, stages under other names, the numbers of an evaluate stage, and the last page."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence import criterion, write_results

from limbeck.config.recipe import Recipe

Rows = list[dict[str, Any]]
"""Rows of ``results.json``: ``setting``, ``metric``, ``value`` and, but for timings, ``seed``."""


def command_line(doc: str, name: str, seeds: Sequence[int], extra: Sequence[str] = ()) -> argparse.Namespace:
    """``--quick``, ``--seeds`` and ``--out``, and lists of words named in ``extra``; ``out`` comes back absolute.

    The quick form has one seed and a folder of its own.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the machinery in a minute; proves nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--out", type=Path, default=Path("runs") / name, help="where the runs go")
    for word in extra:
        parser.add_argument(f"--{word}", nargs="+", default=None)
    options = parser.parse_args()
    options.out = (options.out / "quick" if options.quick else options.out).resolve()
    options.seeds = options.seeds[:1] if options.quick else options.seeds
    return options


def renamed(tree: Any, names: Mapping[str, str]) -> Any:
    """Options (as JSON) in which every stage that they go on from, or stand against, has its new name.

    So the same stages run many times in one run directory, which prepares their text once.
    """
    if isinstance(tree, dict):
        new = {key: renamed(value, names) for key, value in tree.items()}
        if isinstance(tree.get("from"), str):
            new["from"] = names.get(tree["from"], tree["from"])
        if "against" in tree:
            new["against"] = [names.get(name, name) for name in tree["against"]]
        return new
    return [renamed(item, names) for item in tree] if isinstance(tree, list) else tree


def part_of(recipe: Recipe, names: Mapping[str, str]) -> Recipe:
    """The stages in ``names``, under their new names."""
    stages = recipe.model_dump(mode="json", by_alias=True)["stages"]
    return Recipe.model_validate({"name": recipe.name, "stages": {new: renamed(stages[name], names) for name, new in names.items()}})


def measured(run: Path, stage: str) -> dict[str, dict[str, float]]:
    """Model -> its numbers in an evaluate stage: text, divergence from the teacher, recall by task and distance."""
    found = json.loads((run / stage / "evaluation" / "evaluation.json").read_text())
    models: dict[str, dict[str, float]] = {}
    for name, text in found["perplexity"].items():
        models[name] = {"ce": text["ce"], "perplexity": text["perplexity"]}
        models[name] |= {key: found["divergence"][name][key] for key in ("kl", "agreement") if name in found["divergence"]}
        models[name] |= {f"recall/{e['task']}/{e['distance']}": e["accuracy"] for e in found.get("recall", {}).get(name, [])}
    return models


def residuals(run: Path, stage: str) -> dict[str, float]:
    """Held-out relative residual of each layer at the end of an align stage; empty where nothing was validated."""
    lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    mark = "validation/residual/"
    last = next((line for line in reversed(lines) if any(key.startswith(mark) for key in line)), {})
    return {key.removeprefix(mark): value for key, value in last.items() if key.startswith(mark)}


def as_rows(setting: str, seed: int, values: dict[str, float]) -> Rows:
    """One row a metric."""
    return [{"setting": setting, "seed": seed, "metric": metric, "value": value} for metric, value in values.items()]


def mean_recall(values: dict[str, float], distances: Collection[int] | None = None) -> float:
    """Mean accuracy of the probes at some distances (all of them by default)."""
    marks = [key.split("/") for key in values if key.startswith("recall/")]
    return statistics.mean(values["/".join(mark)] for mark in marks if distances is None or int(mark[2]) in distances)


def keys(run: Path, stages: Iterable[str]) -> list[str]:
    """What the artefacts of finished stages depend on, hashed: the key of a measure of them."""
    return [json.loads((run / stage / "stage.json").read_text())["key"] for stage in stages]


def remembered(path: Path, key: Any, make: Callable[[], Any]) -> Any:
    """What an earlier start measured for the same ``key``, else ``make()``, kept at ``path`` as JSON."""
    if path.exists() and (held := json.loads(path.read_text()))["key"] == key:
        return held["found"]
    found = make()
    path.write_text(json.dumps({"key": key, "found": found}, indent=1))
    return found


def at_least(name: str, value: float, bound: float) -> dict[str, Any]:
    """A criterion with a lower bound."""
    return criterion(name, f">= {bound:g}", value, value >= bound)


def at_most(name: str, value: float, bound: float) -> dict[str, Any]:
    """A criterion with an upper bound."""
    return criterion(name, f"<= {bound:g}", value, value <= bound)


def conclude(folder: Path, claim: str, command: str, seeds: Sequence[int], rows: Rows, criteria: list[dict[str, Any]]) -> None:
    """Write ``results.json`` and print whether each criterion holds."""
    write_results(folder, claim=claim, command=command, seeds=seeds, rows=rows, criteria=criteria)
    for c in criteria:
        print(f"{'holds' if c['holds'] else 'FAILS'}  {c['measured']:.4g} {c['bound']}  {c['name']}")


class Results:
    """A ``results.json`` to draw from."""

    def __init__(self, folder: Path):
        self.tree = json.loads((folder / "results.json").read_text())

    def values(self, setting: str, metric: str) -> list[float]:
        """One number a seed, or the one number of a timing; empty where nothing was measured."""
        return [row["value"] for row in self.tree["rows"] if row["setting"] == setting and row["metric"] == metric]

    def settings(self) -> list[str]:
        """All settings, in the order in which they were written."""
        return list(dict.fromkeys(row["setting"] for row in self.tree["rows"]))

    def criteria(self) -> str:
        """The criteria as Markdown."""
        lines = [f"| {c['name']} | {c['bound']} | {c['measured']:.4g} | {str(c['holds']).lower()} |" for c in self.tree["criteria"]]
        return "\n".join(["| criterion | bound | measured | holds |", "|---|---|---|---|", *lines])


def cell(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and range over seeds; a single number alone; nothing for none."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}}–{max(values):{form}})"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    rows = [list(head), ["---"] * len(head), *map(list, lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
