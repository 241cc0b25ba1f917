"""Whether adapters of one condition lie together in the space of weights and in the space of behaviour, when their starts differ.

    python experiments/gauge/run.py            # an hour on one core, half of it for pools that other experiments use too
    python experiments/gauge/run.py --quick    # the machinery in a minute; proves nothing

A pool for each seed, with its own random start for every adapter; three more in each of which all begin alike; and one in which all three
adapters of a condition, too, begin with that start.  A run that is interrupted goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from experiments.adapters_lab import Lab  # noqa: E402
from experiments.common import Rows, at_least, at_most, command_line, conclude  # noqa: E402

from limbeck.adapters.delta_store import MeasuredDeltas  # noqa: E402
from limbeck.adapters.gauge import cosine  # noqa: E402
from limbeck.adapters.pool import Pool, flat, read_pool  # noqa: E402
from limbeck.adapters.spec import Adapters, cat  # noqa: E402

STARTS = {"independent": "independent starts", "shared": "a start for each pool", "one start": "one start"}


def silhouette(cosines: np.ndarray, labels: list[str]) -> float:
    """Mean silhouette (Rousseeuw 1987) at distances 1 - cosine ``[N, N]``; members of a class of one count as 0."""
    distances, names = 1 - cosines, np.array(labels)
    scores = []
    for i, own in enumerate(names):
        same = names == own
        if same.sum() < 2:
            scores.append(0.0)
            continue
        inside = distances[i][same].sum() / (same.sum() - 1)
        outside = min(distances[i][names == other].mean() for other in set(labels) - {own})
        scores.append(float((outside - inside) / max(inside, outside)))
    return float(np.mean(scores))


def cosines_of(vectors: torch.Tensor) -> np.ndarray:
    """Pairwise, of rows."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=-1)
    return (unit @ unit.mT).numpy()


def main() -> None:
    """Pools and deltas of all seeds, then silhouettes by condition, source and format."""
    options = command_line(__doc__ or "", "adapters_lab", seeds=(1, 2, 3))
    seeds = (1, 2) if options.quick else options.seeds
    lab = Lab(options.out, options.quick)
    rows: Rows = []
    found: dict[tuple[str, str], float] = {}
    kinds = {
        "independent": [lab.pool(seed) for seed in seeds],
        "shared": [lab.pool(seed, "shared") for seed in seeds],
        "one start": [lab.pool(seeds[0], "shared", inits=len(seeds))],
    }
    for init, pools in kinds.items():
        ways = {"delta, default": [lab.deltas(pool, moments=not options.quick) for pool in pools]}
        ways["delta, paper"] = [lab.deltas(pool, "-paper", paper=True) for pool in pools]
        lab.run()
        opened = [read_pool(options.out / pool / "adapters") for pool in pools]
        kept = [[k for k, entry in enumerate(pool.entries) if not entry.condition.startswith("mix/")] for pool in opened]
        adapters = cat([pool.adapters([pool.entries[k] for k in own]) for pool, own in zip(opened, kept, strict=True)])
        spaces = {
            "A and B": cosines_of(flat(adapters)),
            "B alone": cosines_of(flat(only_B(adapters))),
            "dW": cosine(adapters, adapters).numpy(),
            **{way: cosines_of(stacked(options.out, stages, opened, kept)) for way, stages in ways.items()},
        }
        labels = {"condition": [pool.entries[k].condition for pool, own in zip(opened, kept, strict=True) for k in own]}
        labels["source"] = [name.split("/")[0] for name in labels["condition"]]
        labels["format"] = [name.rsplit("/", 1)[-1] for name in labels["condition"]]
        for space, cosines in spaces.items():
            for label, words in labels.items():
                if len(set(words)) == 1:
                    continue
                found[f"{init}: {space}", label] = value = silhouette(cosines, words)
                rows.append({"setting": f"{STARTS[init]}: {space}", "metric": f"silhouette by {label}", "value": value})
    best = found["independent: delta, default", "condition"]
    weights = found["independent: A and B", "condition"]
    conclude(
        options.out if options.quick else HERE,
        "gauge: adapters trained from different starts cluster by their task in the space of deltas and not in the space of A and B",
        "python experiments/gauge/run.py",
        seeds,
        rows,
        [
            at_least("silhouette by condition, deltas less A and B, independent starts", best - weights, 0.3),
            at_most("silhouette by condition of A and B, independent starts", weights, 0.0),
        ],
    )


def only_B(adapters: Adapters) -> Adapters:
    """The same with A set to zero, which takes no part in a cosine."""
    return Adapters(adapters.spec, {name: torch.zeros_like(A) for name, A in adapters.A.items()}, adapters.B)


def stacked(out: Path, stages: list[str], pools: list[Pool], kept: list[list[int]]) -> torch.Tensor:
    """Deltas of the kept entries of all pools."""
    return torch.cat(
        [MeasuredDeltas(out / stage / "deltas").stacked([pool.entries[k].name for k in own]) for stage, pool, own in zip(stages, pools, kept, strict=True)]
    )


if __name__ == "__main__":
    main()
