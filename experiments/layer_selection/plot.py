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
    """One point a method: what it costs against how far its choice is from the oracle."""
    found = json.loads((HERE / "results.json").read_text())
    values: dict[str, dict[str, list[float]]] = {}
    for row in found["rows"]:
        if isinstance(row["value"], int | float):
            name = "random" if row["setting"].startswith("random ") else row["setting"]
            values.setdefault(name, {}).setdefault(row["metric"], []).append(row["value"])
    mean = {name: {metric: statistics.mean(numbers) for metric, numbers in metrics.items()} for name, metrics in values.items()}
    # One stage makes both.
    for cheap in ("cheap greedy", "cheap ga_s2"):
        mean[cheap]["tokens"] = mean["cheap"]["tokens"]
    del mean["cheap"]
    figure, axis = plt.subplots(figsize=(7, 4))
    for name, metrics in mean.items():
        if "tokens" in metrics:
            axis.plot(metrics["tokens"] / 1e3, metrics["score"], "o")
            axis.annotate(name, (metrics["tokens"] / 1e3, metrics["score"]), xytext=(4, 4), textcoords="offset points", fontsize=8)
        elif name in ("uniform", "random", "oracle"):
            axis.axhline(metrics["score"], color="grey", linestyle="--", linewidth=0.8)
            axis.text(axis.get_xlim()[1], metrics["score"], f" {name}", fontsize=8, va="center")
    axis.set(xlabel="tokens spent on ranking (thousand)", ylabel="score of the chosen pair after distillation (nats)", xscale="log", yscale="log")
    axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(HERE / "selection.svg", metadata={"Date": None})
    print("| method | tokens | Spearman with GA-S2 | score | KL, text | recall |\n|---|---|---|---|---|---|")
    for name, metrics in sorted(mean.items(), key=lambda item: item[1]["score"]):
        tokens, rho = metrics.get("tokens"), metrics.get("spearman with ga_s2")
        print(
            f"| {name} | {'' if tokens is None else f'{tokens / 1e3:.0f}k'} | {'' if rho is None else f'{rho:.2f}'} "
            f"| {metrics['score']:.4f} | {metrics['kl']:.4f} | {metrics['recall']:.3f} |"
        )


if __name__ == "__main__":
    main()
