"""Draw `curve.svg` and the README's table from what the runs left behind.

python experiments/hybrid_recovers/plot.py [runs/hybrid_recovers]
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
ARMS = {
    "linear": ("align", "all-linear, aligned first"),
    "kept": ("align", "25% softmax kept, aligned first"),
    "no_align": (None, "all-linear, no align (lr tuned)"),
    "rows": ("align_rows", "all-linear, key/value rows repeated"),
}


def curve(run: Path, stage: str, before: str | None) -> tuple[list[int], list[float]]:
    """Total tokens spent and held-out KL of a distil stage."""
    spent = 0
    if before is not None:
        spent = max(json.loads(line).get("tokens", 0) for line in (run / before / "metrics.jsonl").read_text().splitlines())
    tokens, losses, now = [], [], 0
    for line in (run / stage / "metrics.jsonl").read_text().splitlines():
        row: dict[str, Any] = json.loads(line)
        now = row.get("tokens", now)
        if "validation/kl" in row:
            tokens.append(spent + now)
            losses.append(row["validation/kl"])
    return tokens, losses


def draw(out: Path) -> None:
    """One line an arm: the mean over seeds, and the range as a band."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for stage, (before, label) in ARMS.items():
        seeds = [curve(run, stage, before) for run in sorted(out.glob("seed-*"))]
        length = min(len(tokens) for tokens, _ in seeds)
        values = [[losses[i] for _, losses in seeds] for i in range(length)]
        tokens = seeds[0][0][:length]
        (line,) = axis.plot([t / 1e3 for t in tokens], [statistics.mean(v) for v in values], label=label)
        axis.fill_between(
            [t / 1e3 for t in tokens], [min(v) for v in values], [max(v) for v in values], alpha=0.2, color=line.get_color()
        )
    axis.set(xlabel="tokens spent, align + distil (thousand)", ylabel="held-out KL (nats/token)", yscale="log")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(HERE / "curve.svg", metadata={"Date": None})


def table() -> str:
    """Mean and range over seeds of the headline numbers, as Markdown."""
    rows = json.loads((HERE / "results.json").read_text())["rows"]
    lines = ["| model | CE, nats | KL | agreement | repeat, 256 back |", "|---|---|---|---|---|"]
    for setting in dict.fromkeys(row["setting"] for row in rows if ": " in row["setting"]):
        cells = []
        for metric in ("ce", "kl", "agreement", "recall/repeat/256"):
            values = [row["value"] for row in rows if row["setting"] == setting and row["metric"] == metric]
            cells.append(f"{statistics.mean(values):.4f} ({min(values):.4f}–{max(values):.4f})" if values else "")
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    draw(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/hybrid_recovers"))
    print(table())
