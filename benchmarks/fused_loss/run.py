"""Head and loss, forward and backward: ours against TRL, Liger, DistillKit-style and dense code, on this machine's CPU.

python -m benchmarks.fused_loss.run [--quick] [--out FOLDER] [--threads 2] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.evidence import criterion, write_results
from benchmarks.fused_loss.losses import LOSSES, SAME

FULL = {"tokens": 1024, "width": 256, "vocabulary": 32000, "k": 128}
QUICK = {"tokens": 128, "width": 32, "vocabulary": 2000, "k": 16}
QUICK_NAMES = ("limbeck top-k tail", "dense top-k tail", "limbeck kl", "TRL GKD forward KL")
SHARES = (1.0, 0.25)
"""Share of the tokens that count."""
GRADIENT = 1e-4
PEERS = ("trl", "liger-kernel")


class Worker:
    """A process that runs one loss on request."""

    def __init__(self, name: str, shape: dict[str, int], threads: int):
        self.name = name
        root = Path(__file__).resolve().parents[2]
        path = [str(root / "src"), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "OMP_NUM_THREADS": str(threads),
            # Whatever is freed goes back to the system at once, so that one peak says nothing about another.
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "TRL_EXPERIMENTAL_SILENCE": "1",
        }
        words = [name, *(str(shape[key]) for key in ("tokens", "width", "vocabulary", "k")), str(threads)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fused_loss.worker", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.absent: str | None = None

    def wait(self) -> None:
        """Until it has run once."""
        self.absent = self._read().get("absent")

    def ask(self, request: str, share: float) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{request} {share}\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: {self.process.communicate()[1][-2000:]}")
        return json.loads(line)


def measure(shape: dict[str, int], names: list[str], repeats: int, threads: int) -> list[dict[str, Any]]:
    """A row a loss and share.  The losses take turns, so that whatever else the machine does falls on all of them."""
    workers = [Worker(name, shape, threads) for name in names]
    for worker in workers:
        worker.wait()
        if worker.absent is not None:
            print(f"{worker.name}: absent ({worker.absent})")
    runs = [(worker, share) for share in SHARES for worker in workers if worker.absent is None]
    memory = {run: min(run[0].ask("memory", run[1])["mib"] for _ in range(3)) for run in runs}
    gradients = {run: run[0].ask("gradient", run[1])["gradient"] for run in runs}
    times: dict[tuple[Worker, float], list[dict[str, float]]] = {run: [] for run in runs}
    for _ in range(repeats):
        for worker, share in runs:
            times[worker, share].append(worker.ask("time", share))
    rows = []
    for (worker, share), taken in times.items():
        same = next((group for group in SAME if worker.name in group), ())
        others = [found for (w, s), found in gradients.items() if w.name in same and s == share and w is not worker]
        mine = gradients[worker, share]
        apart = [abs(a - b) / max(abs(b), 1e-12) for other in others for a, b in zip(mine, other, strict=True)]
        cpu = [t["cpu"] for t in taken]
        rows.append(
            {
                "setting": f"{worker.name}, {share:.0%} of the tokens count",
                "metric": "CPU milliseconds, forward + backward",
                "value": round(median(cpu), 1),
                "name": worker.name,
                "share": share,
                "fastest": round(min(cpu), 1),
                "wall": round(median(t["wall"] for t in taken), 1),
                "extra_mib": round(memory[worker, share], 1),
                "apart": max(apart, default=None),
            }
        )
    for worker in workers:
        worker.close()
    return rows


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bounds of the spec, for what could be measured."""
    at = {(row["name"], row["share"]): row for row in rows}
    criteria = []

    def ratio(what: str, ours: str, theirs: str, share: float, bound: float) -> None:
        a, b = at.get((ours, share)), at.get((theirs, share))
        if a is None or b is None:
            return
        if what == "extra memory":
            found = a["extra_mib"] / b["extra_mib"]
        else:
            # The larger of two: medians suffer from other work on the machine, and not always evenly.
            found = max(a["value"] / b["value"], a["fastest"] / b["fastest"])
        name = f"{what}, {ours} / {theirs}, {share:.0%} of the tokens count"
        criteria.append(criterion(name, f"<= {bound}", round(found, 3), found <= bound))

    ratio("extra memory", "limbeck top-k tail", "TRL GKD forward KL", 1.0, 0.1)
    ratio("extra memory", "limbeck kl", "TRL GKD forward KL", 1.0, 0.1)
    ratio("extra memory", "limbeck top-k tail", "dense top-k tail", 1.0, 0.25)
    ratio("CPU time", "limbeck top-k tail", "dense top-k tail", 1.0, 1.15)
    ratio("CPU time", "limbeck top-k tail", "dense top-k tail", 0.25, 0.7)
    apart = [row["apart"] for row in rows if row["apart"] is not None]
    if apart:
        name = "largest relative difference of a loss or a gradient's projection"
        criteria.append(criterion(name, f"<= {GRADIENT}", max(apart), max(apart) <= GRADIENT))
    return criteria


def installed() -> dict[str, str]:
    """Versions of the peers that are here."""
    found = {}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, few repeats; writes only with --out")
    parser.add_argument("--out", type=Path, help="folder of results.json; by default this benchmark's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(LOSSES), help="these losses alone (--quick: those of the criteria)")
    options = parser.parse_args(arguments)
    shape = QUICK if options.quick else FULL
    names = options.only or list(QUICK_NAMES if options.quick else LOSSES)
    rows = measure(shape, names, 3 if options.quick else 15, options.threads)
    print("| loss | tokens that count | extra memory, MiB | CPU ms (fastest) | wall ms |\n|---|---|---|---|---|")
    for row in rows:
        print("| {name} | {share:.0%} | {extra_mib} | {value} ({fastest}) | {wall} |".format(**row))
    criteria = judge(rows)
    for line in criteria:
        print("{name}: {measured} ({bound}) {holds}".format(**line))
    folder = options.out or (None if options.quick else Path(__file__).parent)
    if folder:
        command = f"python -m benchmarks.fused_loss.run --threads {options.threads}" + (" --quick" if options.quick else "")
        claim = "The fused top-k divergence needs a tenth of the memory of TRL's GKD loss and no more time than dense code"
        rows = [{**row, **shape, "threads": options.threads, "peers": installed()} for row in rows]
        write_results(folder, claim, command, [0], rows, criteria)
    return criteria


if __name__ == "__main__":
    main()
