"""Draw `selection.svg` and print the README's table from `results.json`.

python experiments/layer_selection/plot.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent


def main() -> None:
    """One line a method: how far its choice is from the oracle's on each seed, and what it cost."""
    found = json.loads((HERE / "results.json").read_text())
    values: dict[str, dict[str, list[float]]] = {}
    for row in found["rows"]:
        if isinstance(row["value"], int | float):
            name = "random" if row["setting"].startswith("random ") else row["setting"]
            values.setdefault(name, {}).setdefault(row["metric"], []).append(row["value"])
    # One stage makes both.
    for cheap in ("cheap greedy", "cheap ga_s2"):
        values[cheap]["tokens"] = values["cheap"]["tokens"]
    del values["cheap"]
    mean = {name: {metric: statistics.mean(numbers) for metric, numbers in metrics.items()} for name, metrics in values.items()}
    draw(values, mean)
    print("| method | tokens | Spearman with GA-S2 | score | KL, text | recall |\n|---|---|---|---|---|---|")
    for name, metrics in sorted(mean.items(), key=lambda item: item[1]["score"]):
        tokens, rho = metrics.get("tokens"), metrics.get("spearman with ga_s2")
        print(
            f"| {name} | {'' if tokens is None else f'{tokens / 1e3:.0f}k'} | {'' if rho is None else f'{rho:.2f}'} "
            f"| {metrics['score']:.4f} | {metrics['kl']:.4f} | {metrics['recall']:.3f} |"
        )



def draw(values: dict[str, dict[str, list[float]]], mean: dict[str, dict[str, float]]) -> None:
    """Write `selection.svg`: a dot a seed (and set, for random), a bar at the mean."""
    best = values["oracle"]["score"]
    names = sorted((name for name in mean if name != "oracle"), key=lambda name: -mean[name]["score"])
    figure, axis = plt.subplots(figsize=(7, 4))
    for height, name in enumerate(names):
        scores = values[name]["score"]
        sets = len(scores) // len(best)
        excess = [100 * (score / best[i // sets] - 1) for i, score in enumerate(scores)]
        axis.plot(excess, [height] * len(excess), "o", color="tab:blue", alpha=0.4, markersize=4)
        axis.plot(statistics.mean(excess), height, "|", color="black", markersize=14)
    costs = [f"{mean[name]['tokens'] / 1e3:,.0f}k" if "tokens" in mean[name] else "" for name in names]
    axis.set_yticks(range(len(names)), [f"{name}  {cost}" for name, cost in zip(names, costs, strict=True)], fontsize=8)
    axis.axvline(5, color="grey", linestyle="--", linewidth=0.8)
    axis.set_xscale("symlog", linthresh=10)
    axis.set(xlabel="score of the chosen pair above the oracle's, % (dashed: 5%)", xlim=(-0.5, None))
    axis.grid(alpha=0.3, axis="x")
    figure.tight_layout()
    figure.savefig(HERE / "selection.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
