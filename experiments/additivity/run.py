"""Whether behaviours add up: teachers that were really trained on two tasks, against sums and merges of the two tasks' own.

    python experiments/additivity/run.py            # half an hour on one core, beside what held_out_conditions has made
    python experiments/additivity/run.py --quick    # the machinery in a minute; proves nothing

A run that is interrupted goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np  # noqa: E402
from experiments.adapters_lab import Lab  # noqa: E402
from experiments.common import Rows, as_rows, at_least, command_line, conclude  # noqa: E402

from limbeck.evaluation.composition import GENERATED, MEAN, MIX, SUM, TIES  # noqa: E402

WAYS: dict[str, dict[str, Any]] = {
    "all tokens, per probe": {},
    "mean of tokens, per probe": {"tokens": "mean"},
    "last token, mean over probes (paper)": {"tokens": "last", "per_probe": False},
}
"""How deltas are read; the first is the default."""
DEFAULT = next(iter(WAYS))
STARTS = {"independent": "", "shared": ", one start"}
"""How the teachers begin, and what a reading is called then: those of one start are read in the default way alone."""
STEPS, RATE = 1000, 1e-3
"""Those of the generator of held_out_conditions, so that it is trained once."""


def main() -> None:
    """Judge the composition of every seed's pool and generator, for each way to read deltas."""
    options = command_line(__doc__ or "", "adapters_lab", seeds=(1, 2, 3))
    lab = Lab(options.out, options.quick)
    if options.quick:
        lab.stages["conditions"] |= {"mixes": 1, "mixes_in_one_format": 1}
        lab.stages["conditions"]["sources"][0]["name"] = "modules"
        lab.stages["conditions"]["sources"].append({"name": "text", "source": {"kind": "stdlib", "limit": 60}, "cut": 200})
        lab.stages["conditions"]["sources"].reverse()
    rows: Rows = []
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        generator = lab.generator(f"ho-generated-{RATE:g}", [{"kind": "ce"}], seed=seed, lr=RATE, steps=STEPS)
        stages: dict[str, str] = {}
        for starts, label in STARTS.items():
            for number, (way, represent) in enumerate(WAYS.items() if starts == "independent" else list(WAYS.items())[:1]):
                changes = {"represent": represent, "composition": {}, "splits": ["seen"], "rows": 4, "draws": 1}
                stages[f"{way}{label}"] = lab.judge([generator], lab.pool(seed, starts), f"-additivity{number}-{starts}", **changes)
        lab.run()
        for way, stage in stages.items():
            own = lab.judged(stage)["composition"]
            found.setdefault(way, []).append(own)
            for kind, mixes in by_kind(own["mixes"]).items():
                cosines = {"sum": [m["cosine_sum"] for m in mixes], "nearer part": [max(m["cosine_parts"]) for m in mixes]}
                values = {f"cosine to the {k}": float(np.mean(v)) for k, v in cosines.items()}
                rows += as_rows(f"{kind}: {way}", seed, {"additive": float(np.mean([m["additive"] for m in mixes])), **values})
        for text, losses in found[DEFAULT][-1]["nll"].items():
            rows += [{"setting": f"{text}: {name}", "seed": seed, "metric": "nll", "value": value} for name, value in losses.items()]
    conclude(
        options.out if options.quick else HERE,
        "additivity: the delta of an adapter trained on two tasks is nearer to the sum of their deltas than to either",
        "python experiments/additivity/run.py",
        options.seeds,
        rows,
        criteria(found),
    )


def by_kind(mixes: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Mixes of two sources in one format, and of two sources in two."""
    formats = [{part.rsplit("/", 1)[-1] for part in mix["name"].removeprefix("mix/").split("+")} for mix in mixes]
    kinds = {words: [m for m, f in zip(mixes, formats, strict=True) if len(f) == size] for words, size in (("one format", 1), ("two formats", 2))}
    return {kind: chosen for kind, chosen in kinds.items() if chosen}


def criteria(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """In the default way; losses are means over mixes and seeds."""
    mixes = [mix for seed in found[DEFAULT] for mix in seed["mixes"]]

    def loss(text: str, name: str) -> float:
        return float(np.mean([mix["nll"][text][name] for mix in mixes]))

    lines = [at_least("really mixed pairs", float(len(found[DEFAULT][0]["mixes"])), 10.0)]
    for label in STARTS.values():
        own = [mix for seed in found[f"{DEFAULT}{label}"] for mix in seed["mixes"]]
        for kind, chosen in [("all", own), *by_kind(own).items()]:
            share = float(np.mean([mix["additive"] for mix in chosen]))
            lines.append(at_least(f"{kind}{label}: pairs (and seeds) whose delta is nearer to the sum than to either part", share, 0.8))
    for name in (MIX, GENERATED):
        for text in ("first part", "second part"):
            best = min((SUM, MEAN, TIES), key=lambda merge: loss(text, merge))
            lines.append(at_least(f"{name}, on the {text}: nats a token better than the best naive merge ({best})", loss(text, best) - loss(text, name), 0.0))
    return lines


if __name__ == "__main__":
    main()
