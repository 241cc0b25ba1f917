"""Draw `additivity.svg` and print the README's tables from `results.json`.

python experiments/additivity/plot.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.adapters_plots import finish, folder, plt, points  # noqa: E402
from experiments.common import Results, cell, markdown  # noqa: E402

COSINES = ("cosine to the sum", "cosine to the nearer part")
TEXTS = {"mix": "the mix", "first part": "its first part", "second part": "its second part"}


def readings(results: Results) -> list[str]:
    """``kind of mix: how deltas are read``."""
    return list(dict.fromkeys(row["setting"] for row in results.tree["rows"] if row["metric"] == "additive"))


def adapters(results: Results) -> list[str]:
    """Those whose losses were measured."""
    return list(dict.fromkeys(row["setting"].split(": ", 1)[1] for row in results.tree["rows"] if row["metric"] == "nll"))


def gains(results: Results, text: str, name: str) -> list[float]:
    """Nats a token below the base, a seed."""
    base, own = results.values(f"{text}: base", "nll"), results.values(f"{text}: {name}", "nll")
    return [b - o for b, o in zip(base, own, strict=True)]


def draw(results: Results, path: Path) -> None:
    """Cosines of a mix teacher's delta by reading, and what each adapter gains on each text."""
    left, right = readings(results)[::-1], [name for name in adapters(results) if name != "base"][::-1]
    figure, axes = plt.subplots(2, 1, figsize=(9, 2.2 + 0.32 * (len(left) + len(right))), height_ratios=[len(left), len(right)])
    for shift, marker, metric in zip((0.12, -0.12), "os", COSINES, strict=True):
        points(axes[0], [k + shift for k in range(len(left))], [results.values(setting, metric) for setting in left], fmt=marker, label=metric)
    for shift, marker, (text, words) in zip((0.2, 0, -0.2), "osD", TEXTS.items(), strict=True):
        points(axes[1], [k + shift for k in range(len(right))], [gains(results, text, name) for name in right], fmt=marker, label=f"on {words}")
    axes[0].set(xlabel="cosine to the delta of the teacher trained on the mix", yticks=range(len(left)), yticklabels=left)
    axes[1].set(xlabel="nats a token below the base", yticks=range(len(right)), yticklabels=right)
    for axis, lines in zip(axes, (left, right), strict=True):
        axis.set_ylim(-0.6, len(lines) - 0.4)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), columnspacing=1, handletextpad=0.3)
    finish(figure, path)


def additive(results: Results) -> str:
    """A line a reading and kind of mix."""
    lines = [[setting, *(cell(results.values(setting, metric)) for metric in ("additive", *COSINES))] for setting in readings(results)]
    return markdown(["mixes: deltas read as", "share of additive pairs", *COSINES], lines)


def losses(results: Results) -> str:
    """A line an adapter, a column a text."""
    lines = [[name, *(cell(results.values(f"{text}: {name}", "nll"), ".4f") for text in TEXTS)] for name in adapters(results)]
    return markdown(["nats a token", *(f"on {words}" for words in TEXTS.values())], lines)


if __name__ == "__main__":
    place = folder(HERE)
    found = Results(place)
    draw(found, place / "additivity.svg")
    print(additive(found), losses(found), found.criteria(), sep="\n\n")
