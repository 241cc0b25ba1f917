"""Draw `long_context.svg` and the README's tables from `results.json`.

python experiments/long_context/plot.py
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.common import Results, cell, markdown  # noqa: E402
from experiments.long_context.run import CONTEXTS, DECODING, EDGES, FAR, MODELS, NEAR  # noqa: E402

DISTANCES = (*NEAR, *FAR)
SPANS = [f"{low} to {high}" for low, high in itertools.pairwise(EDGES)]
SPEEDS = ("teacher", *DECODING.values())


def line(axis: Any, places: Sequence[float], found: Sequence[list[float]], label: str) -> None:
    """Mean over seeds, and the range as a band, where something was measured."""
    places, found = zip(*[(place, values) for place, values in zip(places, found, strict=True) if values], strict=True)
    (drawn,) = axis.plot(places, [statistics.mean(values) for values in found], marker="o", markersize=3, label=label)
    axis.fill_between(places, [min(v) for v in found], [max(v) for v in found], alpha=0.2, color=drawn.get_color())


def draw(results: Results) -> None:
    """Recall by distance, cross-entropy by position, decode rate by context."""
    figure, (recall, position, speed) = plt.subplots(1, 3, figsize=(12, 3.8))
    for label in MODELS.values():
        repeat = [results.values(label, f"recall/repeat/{distance}") for distance in DISTANCES]
        line(recall, DISTANCES, repeat, label)
        ce = [results.values(label, f"ce at {span}") for span in SPANS]
        line(position, [(low + high) / 2 for low, high in itertools.pairwise(EDGES)], ce, label)
    for name in SPEEDS:
        line(speed, CONTEXTS, [results.values(f"speed: {name}", f"decode tokens/s at {context}") for context in CONTEXTS], name)
    recall.set(xlabel="tokens back", ylabel="accuracy, repeat", xscale="log")
    recall.set_xticks(DISTANCES, [str(distance) for distance in DISTANCES], fontsize=7, rotation=60)
    recall.set_xticks([], minor=True)
    position.set(xlabel="position in the document", ylabel="held-out CE (nats/token)")
    speed.set(xlabel="tokens of context", ylabel="decoded tokens a second", xscale="log", yscale="log")
    for axis in (recall, position, speed):
        axis.grid(alpha=0.3, which="both")
    recall.legend(frameon=False, fontsize=7)
    speed.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(HERE / "long_context.svg", metadata={"Date": None})


def quality(results: Results) -> str:
    """Recall and cross-entropy of each model."""
    recalls = [(f"recall/{task}/{distance}", f"{task}, {distance} back") for task in ("repeat", "key_value") for distance in DISTANCES]
    spans = [(f"ce at {span}", f"CE at {span}") for span in SPANS]
    lines = [[name, *(cell(results.values(label, metric)) for label in MODELS.values())] for metric, name in [*recalls, *spans]]
    return markdown(["measure", *MODELS.values()], lines)


def costs(results: Results) -> str:
    """Bytes and decode rates by context; ranges are over the measurements."""
    lines = []
    for name in SPEEDS:
        for context in CONTEXTS:
            metrics = [(f"{part} at {context}", ",.0f") for part in ("bytes", "kv", "state")]
            metrics += [(f"bytes at {context}, over teacher", ".4f"), (f"decode tokens/s at {context}", ".1f")]
            metrics += [(f"decode tokens/s at {context}, over teacher", ".2f")]
            lines.append([name, f"{context:,}", *(cell(results.values(f"speed: {name}", metric), form) for metric, form in metrics)])
    return markdown(["model", "context", "cache bytes", "KV", "state", "over the teacher's", "decode tokens/s", "over the teacher's"], lines)


def tuned(results: Results) -> str:
    """Held-out loss of every learning rate that was tried."""
    names = [setting for setting in results.settings() if setting.startswith("tune ")]
    return markdown(["arm", "held-out loss"], [[name.removeprefix("tune "), cell(results.values(name, "held-out loss"), ".4f")] for name in names])


if __name__ == "__main__":
    found = Results(HERE)
    draw(found)
    print(quality(found), costs(found), tuned(found), found.criteria(), sep="\n\n")
