"""Linear-attention operators and training steps on a GPU: flash-linear-attention's kernels against our torch form.

python -m benchmarks.gpu_fla.run [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it also runs as a file

from benchmarks.evidence import criterion, write_results
from benchmarks.loop_overhead.run import RandomRows

from limbeck.config.parts.mixers import MIXERS
from limbeck.config.parts.surgeries import HybridizeOptions
from limbeck.models.head import head_of
from limbeck.models.limbeck_model import wrap_student
from limbeck.models.loading import build_model
from limbeck.models.packed import forward_packed
from limbeck.ops import backends, fla_kernels
from limbeck.ops.delta_rule import gated_delta_rule
from limbeck.ops.fused import linear_cross_entropy
from limbeck.ops.gated_slots import gated_slot_attention
from limbeck.ops.kda import kimi_delta_rule
from limbeck.ops.linear_attention import linear_attention
from limbeck.ops.rwkv7 import generalised_delta_rule

OPERATORS: dict[str, tuple[Callable[..., Any], int]] = {
    "gated_deltanet, deltanet": (gated_delta_rule, 0),
    "kda": (kimi_delta_rule, 1),
    "lightning, mamba2": (linear_attention, 0),
    "gla, hgrn": (linear_attention, 1),
    "gsa": (gated_slot_attention, 1),
    "rwkv7": (generalised_delta_rule, 3),
}
"""Which mixers an operator serves, the operator, and how many of its gates have one entry a channel."""
FULL: dict[str, Any] = {
    "operator": {"batch": 4, "tokens": 4096, "heads": 16, "width": 128},
    "model": {"vocab_size": 32768, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12,
              "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True},
    "keep": [1, 6], "rows": 8, "sequence": 2048, "repeats": 10,
}  # fmt: skip
QUICK: dict[str, Any] = {
    "operator": {"batch": 2, "tokens": 200, "heads": 2, "width": 32},
    "model": {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True},
    "keep": [1], "rows": 2, "sequence": 128, "repeats": 2,
}  # fmt: skip
SOFTMAX = ("path", "swa")
"""Mixers for which there is nothing to take: a step of theirs is not a comparison."""
OUTPUT_BOUND, GRADIENT_BOUND, SPEED_BOUND, PARAMETERS = 1e-2, 3e-2, 5.0, 50e6


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], Any], repeats: int, device: str) -> dict[str, float]:
    """Median and fastest of some runs, after two in which kernels are compiled and tuned."""
    taken = []
    for _ in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        taken.append(1e3 * (time.perf_counter() - start))
    return {"value": round(median(taken[2:]), 3), "fastest": round(min(taken[2:]), 3)}


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


def operator_rows(shape: dict[str, int], repeats: int, device: str) -> list[dict[str, Any]]:
    """Milliseconds, forward and backward, and distance from the torch form, of every operator on bf16 rows of two documents."""
    rows = []
    batch, tokens, heads, width = shape.values()
    documents = (torch.arange(tokens, device=device) >= tokens // 3).long().expand(batch, -1).contiguous()
    for mixers, (operator, channels) in OPERATORS.items():
        made = fla_kernels.example(operator.__name__, (width,) * (3 + channels), batch=batch, tokens=tokens, heads=heads)
        leaves = [x.to(device, torch.bfloat16 if i < 3 else torch.float32).requires_grad_() for i, x in enumerate(made[:-1])]
        direction = torch.randn(batch, tokens, heads, width, generator=torch.Generator().manual_seed(1)).to(
            device, torch.bfloat16
        )

        def both_ways(operator: Any = operator, leaves: Any = leaves, direction: Any = direction) -> list[torch.Tensor]:
            o, _ = operator(*leaves, documents_BT=documents)
            return [o, *torch.autograd.grad(o, leaves, direction)]

        results = {}
        for name in ("torch", "fla"):
            with backends.use(name):
                results[name] = both_ways()
                timed = milliseconds(both_ways, repeats, device)
            setting = f"{mixers}: {operator.__name__}, {name}, B{batch} T{tokens} H{heads} K{width} bf16"
            rows.append(
                {"setting": setting, "metric": "milliseconds, forward + backward", "mixers": mixers, "backend": name, **timed}
            )
        output, *gradients = (distance(a, b) for a, b in zip(results["fla"], results["torch"], strict=True))
        for metric, value in (("distance, output", output), ("distance, worst gradient", max(gradients))):
            rows.append({"setting": f"{mixers}: fla from torch", "metric": metric, "mixers": mixers, "value": value})
    return rows


def step_rows(size: dict[str, Any], device: str) -> tuple[list[dict[str, Any]], int]:
    """Tokens a second of a training step (bf16 autocast, AdamW) of a hybrid with each mixer, and its parameters (the fewest of them)."""
    rows, parameters = [], []
    data = RandomRows(size["rows"], size["sequence"], 0).batch(range(size["rows"])).to(device)
    for kind in (kind for kind in MIXERS if kind not in SOFTMAX):
        base = build_model({"model_type": "qwen3", **size["model"]}, seed=0, dtype=torch.float32)
        options = HybridizeOptions.model_validate({"mixer": {"kind": kind}, "keep": size["keep"]})
        model = wrap_student(base, [options], {"source": "random", "fingerprint": {}}).to(device).train()
        parameters.append(sum(p.numel() for p in model.parameters()))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step(model: Any = model, optimizer: Any = optimizer) -> None:
            with torch.autocast(device, torch.bfloat16):
                hidden = forward_packed(model, data)
                loss, _ = linear_cross_entropy(hidden.flatten(0, 1), head_of(model), data.labels_BT.flatten())
            (loss / data.num_tokens).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        for name in ("torch", "fla"):
            with backends.use(name):
                timed = milliseconds(step, size["repeats"], device)
            rate = round(1e3 * size["rows"] * size["sequence"] / timed["value"])
            setting = f"{kind}, {name}: {parameters[-1] / 1e6:.1f}M parameters, {size['rows']} x {size['sequence']} tokens"
            rows.append(
                {"setting": setting, "metric": "training tokens per second", "mixer": kind, "backend": name, "value": rate}
            )
        del base, model, optimizer, step
        gc.collect()
    return rows, min(parameters)


def criteria_of(rows: list[dict[str, Any]], parameters: int) -> list[dict[str, Any]]:
    """What is asked: the worst distances, the least speed-ups of an operator and of a step, and the hybrid's size."""

    def worst(metric: str) -> float:
        return max(row["value"] for row in rows if row["metric"] == metric)

    output, gradient = worst("distance, output"), worst("distance, worst gradient")
    times = {(row["mixers"], row["backend"]): row["value"] for row in rows if row["metric"].startswith("milliseconds")}
    speed = min(times[m, "torch"] / times[m, "fla"] for m in OPERATORS)
    rates = {(row["mixer"], row["backend"]): row["value"] for row in rows if row["metric"].startswith("training")}
    step = min(rates[kind, "fla"] / rates[kind, "torch"] for kind, _ in rates)
    return [
        criterion("worst distance of an output", f"<= {OUTPUT_BOUND}", output, output <= OUTPUT_BOUND),
        criterion("worst distance of a gradient", f"<= {GRADIENT_BOUND}", gradient, gradient <= GRADIENT_BOUND),
        criterion("least speed-up of an operator, torch / fla", f">= {SPEED_BOUND}", round(speed, 2), speed >= SPEED_BOUND),
        criterion("least speed-up of a training step, torch / fla", "> 1", round(step, 2), step > 1),
        criterion("parameters of the smallest hybrid", f">= {PARAMETERS:.0f}", parameters, parameters >= PARAMETERS),
    ]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, few repeats; writes only with --out")
    parser.add_argument("--out", type=Path, help="folder of results.json; by default this benchmark's own")
    options = parser.parse_args(arguments)
    reason = "no CUDA device" if not torch.cuda.is_available() else backends.missing()
    if reason is not None:
        print(f"{reason}: nothing is measured")
        return []
    size = QUICK if options.quick else FULL
    rows = operator_rows(size["operator"], size["repeats"], "cuda")
    steps, parameters = step_rows(size, "cuda")
    rows += steps
    for row in rows:
        print("{setting}: {value:.4g} ({metric})".format(**row))
    criteria = criteria_of(rows, parameters)
    for line in criteria:
        print("{name}: {measured:.4g} ({bound}) {holds}".format(**line))
    folder = options.out or (None if options.quick else Path(__file__).parent)
    if folder:
        command = "python -m benchmarks.gpu_fla.run" + (" --quick" if options.quick else "")
        claim = "On a GPU flash-linear-attention's kernels give the numbers of our torch form, faster, in every recurrent mixer"
        write_results(folder, claim, command, [0], rows, criteria)
    return criteria


if __name__ == "__main__":
    main()
