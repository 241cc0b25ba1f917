"""What the training loop costs: Limbeck's Trainer against a bare PyTorch loop, step by step in turns.

python -m benchmarks.loop_overhead.run [--quick] [--out FOLDER]

Both train the same model from the same seed on the same rows with the same fused loss, AdamW and clipping.  The bare loop's step
runs between two steps of the Trainer, while the Trainer's clock stands still: whatever else the machine does hits both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it also runs as a file

from benchmarks.evidence import criterion, write_results

from limbeck.config.parts.objectives import CrossEntropyOptions
from limbeck.config.parts.stages import GroupOptions, LoopOptions, OptimOptions
from limbeck.data.loader import Loader
from limbeck.engine.loop import Trainer
from limbeck.engine.metrics import loss_trace
from limbeck.engine.step import TrainStep
from limbeck.models.head import head_of
from limbeck.models.loading import build_model
from limbeck.models.packed import forward_packed
from limbeck.objectives.ce import CrossEntropy
from limbeck.ops.fused import linear_cross_entropy
from limbeck.students.student import Student
from limbeck.types import IGNORE, Batch

VOCABULARY = 4096
BOUND = 0.95
LOSS_GAP = 1e-9
"""In float64.  In bfloat16 the two ways of dividing by the count round differently, and training spreads that without bound."""
LEARNING_RATE = 1e-3
SIZES: dict[str, dict[str, int]] = {
    "0.4M parameters, 512 tokens a step": {"width": 64, "layers": 2, "sequence": 128, "rows": 4, "steps": 203},
    "2M parameters, 4096 tokens a step": {"width": 160, "layers": 8, "sequence": 512, "rows": 8, "steps": 43},
}


class RandomRows:
    """Packed rows of random ids, two documents a row: the time of a step does not depend on what it reads."""

    def __init__(self, number: int, sequence: int, seed: int):
        self.sequence = sequence
        self._ids = torch.from_numpy(np.random.default_rng(seed).integers(0, VOCABULARY, (number, sequence)))

    def __len__(self) -> int:
        return len(self._ids)

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Rows by number, labels shifted, the documents' last positions masked."""
        ids = self._ids[torch.as_tensor(indices)]
        half = self.sequence // 2
        positions_T = torch.cat([torch.arange(half), torch.arange(self.sequence - half)])
        labels = torch.roll(ids, -1, 1)
        labels[:, [half - 1, -1]] = IGNORE
        documents_T = (torch.arange(self.sequence) >= half).long()
        return Batch(ids, labels, positions_T.expand_as(ids).clone(), documents_T.expand_as(ids).clone())


class BareLoop:
    """Fifteen lines of PyTorch, as one would write them without a framework."""

    def __init__(self, model: Any, rows: RandomRows, rows_per_step: int, seed: int, precision: str):
        self.model = model.train()
        self.bfloat16 = precision == "bfloat16"
        self.loader = Loader(rows, rows_per_step, seed=seed)
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True,
        )  # fmt: skip
        self.losses: list[float] = []

    def step(self) -> None:
        batch = self.loader.next_step()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            hidden = forward_packed(self.model, batch)
            loss_sum, _ = linear_cross_entropy(hidden.flatten(0, 1), head_of(self.model), batch.labels_BT.flatten())
        loss = loss_sum / batch.label_mask_BT.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())


class TurnTaking(Loader):
    """The Trainer's loader.  Being asked for rows ends one of the Trainer's turns; the bare loop then has its own."""

    def __init__(self, rows: RandomRows, rows_per_step: int, seed: int, bare: BareLoop):
        super().__init__(rows, rows_per_step, seed=seed)
        self.bare = bare
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self._resumed: float | None = None

    def next_step(self) -> Batch:
        asked = time.perf_counter()
        if self._resumed is not None:
            self.ours.append(asked - self._resumed)
            # A bare loop would not ask for deterministic kernels; the Trainer does, and pays for it.
            deterministic = torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(False)
            began = time.perf_counter()
            with torch.enable_grad():
                self.bare.step()
            self.theirs.append(time.perf_counter() - began)
            torch.use_deterministic_algorithms(deterministic)
        self._resumed = time.perf_counter()
        return super().next_step()


def measure(size: dict[str, int], steps: int, seed: int, precision: str = "bfloat16") -> dict[str, float]:
    """Seconds a step of both loops, the ratio of their rates, and how far their losses are apart."""
    config = {
        "model_type": "qwen3", "vocab_size": VOCABULARY, "hidden_size": size["width"], "intermediate_size": 2 * size["width"],
        "num_hidden_layers": size["layers"], "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "tie_word_embeddings": True,
    }  # fmt: skip
    rows = RandomRows(64 * size["rows"], size["sequence"], seed)
    dtype = torch.float64 if precision == "float64" else torch.float32
    bare = BareLoop(build_model(config, seed=seed, dtype=dtype), rows, size["rows"], seed, precision)
    loader = TurnTaking(rows, size["rows"], seed, bare)
    student = Student(build_model(config, seed=seed, dtype=dtype))
    group = GroupOptions(lr=LEARNING_RATE, weight_decay=0.1)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            TrainStep(student, [CrossEntropy(CrossEntropyOptions())]),
            loader,
            groups=[(group, list(student.named_parameters()))],
            optim_options=OptimOptions.model_validate({"groups": [group], "schedule": {"kind": "constant"}}),
            # Checkpoints are work of another kind, and a bare loop has none; their canary would read rows outside the turns.
            loop=LoopOptions.model_validate(
                {
                    "steps": steps,
                    "batch_tokens": size["rows"] * size["sequence"],
                    "checkpoint_every": steps,
                    "precision": precision,
                    "canary": False,
                }
            ),
            folder=Path(folder),
            seed=seed,
        ).run()
        trace = loss_trace(Path(folder) / "metrics.jsonl")
    # The first steps warm up allocators and caches, of one loop on behalf of the other.
    ours, theirs = loader.ours[3:], loader.theirs[3:]
    return {
        "ratio": sum(theirs) / sum(ours),
        "trainer_ms": 1000 * statistics.mean(ours),
        "bare_ms": 1000 * statistics.mean(theirs),
        # The Trainer's last step has no turn of the bare loop behind it.
        "loss_difference": max(abs(a - b) for a, b in zip(trace[:-1], bare.losses, strict=True)),
    }


def main() -> None:
    """Measure, print and write ``results.json``."""
    parser = argparse.ArgumentParser(description="The Trainer against a bare PyTorch loop.")
    parser.add_argument("--quick", action="store_true", help="the small size, one seed, few steps")
    parser.add_argument("--out", type=Path, help="folder of results.json; by default this one, and none for --quick")
    arguments = parser.parse_args()
    # Threads that wait for each other on a shared machine would measure the machine.
    torch.set_num_threads(1)
    seeds = [0] if arguments.quick else [0, 1, 2]
    sizes = dict(list(SIZES.items())[:1]) if arguments.quick else SIZES
    rows, criteria = [], []
    for name, size in sizes.items():
        steps = 33 if arguments.quick else size["steps"]
        found = [measure(size, steps, seed) for seed in seeds]
        for seed, values in zip(seeds, found, strict=True):
            facts = {"setting": name, "seed": seed, "steps": steps}
            rows += [{**facts, "metric": key, "value": value} for key, value in values.items()]
            print(f"{name}  seed {seed}  " + "  ".join(f"{key} {value:.4g}" for key, value in values.items()), flush=True)
        ratio = statistics.mean(values["ratio"] for values in found)
        criteria.append(criterion(f"rate over a bare loop's, {name}", f">= {BOUND}", ratio, ratio >= BOUND))
    name, size = next(iter(sizes.items()))
    for seed in seeds:
        gap = measure(size, 33 if arguments.quick else size["steps"], seed, "float64")["loss_difference"]
        rows.append({"setting": f"{name}, float64", "seed": seed, "metric": "loss_difference", "value": gap})
    gap = max(row["value"] for row in rows if row["setting"].endswith("float64"))
    criteria.append(criterion(f"largest difference of the losses in float64, {name}", f"<= {LOSS_GAP}", gap, gap <= LOSS_GAP))
    for found_criterion in criteria:
        verdict = "holds" if found_criterion["holds"] else "FAILS"
        print(f"{verdict}: {found_criterion['name']}: {found_criterion['measured']:.4g} {found_criterion['bound']}")
    out = arguments.out or (None if arguments.quick else Path(__file__).parent)
    if out is None:
        return
    write_results(
        out,
        claim="the training loop keeps at least 95% of a bare PyTorch loop's rate",
        command="python -m benchmarks.loop_overhead.run" + (" --quick" if arguments.quick else ""),
        seeds=seeds,
        rows=rows,
        criteria=criteria,
    )


if __name__ == "__main__":
    main()
