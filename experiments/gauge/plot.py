"""Draw `silhouette.svg` and print the README's tables from `results.json`.

python experiments/gauge/plot.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.adapters_plots import finish, folder, plt  # noqa: E402
from experiments.common import Results, cell, markdown  # noqa: E402

STARTS = ("independent starts", "a start for each pool", "one start")
MARK, METRIC = ": ", "silhouette by "


def spaces(results: Results) -> list[str]:
    """In which adapters were compared."""
    return list(dict.fromkeys(setting.split(MARK)[1] for setting in results.settings()))


def labels(results: Results) -> list[str]:
    """By what they were put together: condition, source, format; those of which there was more than one class."""
    return list(dict.fromkeys(row["metric"].removeprefix(METRIC) for row in results.tree["rows"]))


def draw(results: Results, path: Path) -> None:
    """A panel a kind of start, a line a space, a bar a label."""
    order, words = spaces(results)[::-1], labels(results)
    figure, axes = plt.subplots(1, len(STARTS), figsize=(12, 1.6 + 0.45 * len(order)), sharey=True)
    height = 0.8 / len(words)
    for axis, start in zip(axes, STARTS, strict=True):
        for number, word in enumerate(words):
            found = [(place, results.values(start + MARK + space, METRIC + word)) for place, space in enumerate(order)]
            shift = height * ((len(words) - 1) / 2 - number)
            axis.barh([place + shift for place, value in found if value], [value[0] for _, value in found if value], height, label=f"by {word}")
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set(title=start, xlabel="mean silhouette, cosine distance")
        axis.grid(alpha=0.3, axis="x")
    axes[0].set_yticks(range(len(order)), order)
    axes[-1].legend(frameon=False)
    finish(figure, path)


def table(results: Results) -> str:
    """All silhouettes; one number each, over the pools of all seeds together."""
    pairs = [(start, word) for start in STARTS for word in labels(results)]
    lines = [[space, *(cell(results.values(start + MARK + space, METRIC + word)) for start, word in pairs)] for space in spaces(results)]
    return markdown(["space", *(f"{start}, by {word}" for start, word in pairs)], lines)


if __name__ == "__main__":
    place = folder(HERE)
    found = Results(place)
    draw(found, place / "silhouette.svg")
    print(table(found), found.criteria(), sep="\n\n")
