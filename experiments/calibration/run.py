"""Whether mixers that are calibrated before align are nearer to their attention, before, early in and after it.

    python experiments/calibration/run.py            # twenty minutes on one core
    python experiments/calibration/run.py --quick    # the machinery in a minute; proves nothing

Every arm goes through the shipped engine by `recipe.yaml` beside this file.  A run that is interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.common import Rows, as_rows, at_most, command_line, conclude, markdown, part_of  # noqa: E402

from limbeck.config.load import load_recipe  # noqa: E402
from limbeck.stages.run import run_recipe  # noqa: E402

MIXERS = ("gated_deltanet", "gla", "mamba2", "kda")
ROWS = {"neutral": 0, "calibrated": 16}
"""Arm -> rows of calibration."""
QUICK = ["align.data.source.0.limit=100", "align.loop.tokens=1k", "align.loop.batch_tokens=512", "align.loop.validate_every=1", "align.loop.validate_rows=1"]
MARK = "validation/residual/"


def residuals(folder: Path) -> dict[int, float]:
    """Tokens -> held-out relative residual, the mean over layers."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tokens = {line["step"]: line["tokens"] for line in lines if "tokens" in line}
    first = min(tokens)
    per_step = tokens[first] / first
    found = {}
    for line in lines:
        values = [value for key, value in line.items() if key.startswith(MARK)]
        if values:
            found[round(line["step"] * per_step)] = statistics.mean(values)
    return found


def run_arm(mixer: str, arm: str, seed: int, more: list[str], out: Path) -> Path:
    """Train one arm; returns its stage folder."""
    words = [f"align.student.surgery.0.mixer={{kind: {mixer}}}", f"align.student.surgery.0.calibration_rows={ROWS[arm]}", f"align.seed={seed}"]
    name = f"{mixer}-{arm}-s{seed}"
    run_recipe(part_of(load_recipe(HERE / "recipe.yaml", [*words, *more]), {"align": name}), recipe_dir=HERE, run_dir=out)
    return out / name


def before_training(folder: Path) -> tuple[float, float]:
    """Relative residual on the calibration rows, the mean over layers: as the mixer starts by itself, and calibrated."""
    records = json.loads((folder / "calibration.json").read_text()).values()
    fresh, calibrated = zip(*(record["residual"] for record in records), strict=True)
    return statistics.mean(fresh), statistics.mean(calibrated)


def main() -> None:
    """Run every mixer, arm and seed, and write results.json."""
    options = command_line(__doc__, "calibration", seeds=[1, 2])
    more = QUICK if options.quick else []
    mixers = MIXERS[:2] if options.quick else MIXERS
    rows: Rows = []
    ratios: dict[int, list[float]] = {}
    starts, lines = [], []
    for mixer in mixers:
        means: dict[str, dict[int, list[float]]] = {arm: {} for arm in ROWS}
        for seed in options.seeds:
            found = {}
            for arm in ROWS:
                folder = run_arm(mixer, arm, seed, more, options.out)
                found[arm] = residuals(folder)
                if arm == "calibrated":
                    found["neutral"][0], found[arm][0] = before_training(folder)
                    starts.append(found[arm][0] / found["neutral"][0])
            for arm in ROWS:
                values = {f"residual after {tokens} tokens": value for tokens, value in sorted(found[arm].items())}
                rows += as_rows(f"{mixer}, {arm}", seed, values)
                for tokens, value in found[arm].items():
                    means[arm].setdefault(tokens, []).append(value)
            for tokens in set(found["neutral"]) - {0}:
                ratios.setdefault(tokens, []).append(found["calibrated"][tokens] / found["neutral"][tokens])
        steps = sorted(means["neutral"])
        lines += [[f"{mixer}, {arm}", *(f"{statistics.mean(means[arm][tokens]):.3f}" for tokens in steps)] for arm in ROWS]
    early, late = min(ratios), max(ratios)
    criteria = [
        at_most("residual of the calibrated over the neutral start, before training (worst mixer and seed)", max(starts), 1.0),
        at_most(f"the same on held-out rows after {early} tokens (worst mixer and seed)", max(ratios[early]), 1.0),
        at_most(f"the same after {late} tokens (worst mixer and seed)", max(ratios[late]), 1.0),
        at_most(f"the same after {late} tokens (mean)", statistics.mean(ratios[late]), 1.0),
    ]
    conclude(
        options.out if options.quick else HERE,
        "mixers that are calibrated before align are nearer to their attention, before, early in and after it",
        "python experiments/calibration/run.py" + (" --quick" if options.quick else ""),
        options.seeds,
        rows,
        criteria,
    )
    print(markdown(["mean relative residual after tokens", *map(str, steps)], lines))


if __name__ == "__main__":
    main()
