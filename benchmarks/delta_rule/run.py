"""Forward + backward of our chunked gated delta rule against transformers' torch kernel, on this machine's CPU.

python -m benchmarks.delta_rule.run [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.evidence import criterion, write_results
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from limbeck.ops.delta_rule import gated_delta_rule

BOUND = 1.5
AGREEMENT = 1e-4
SHAPES = ((4, 512, 4, 64), (4, 512, 4, 32), (8, 512, 6, 32), (1, 2048, 4, 64), (2, 512, 4, 128))
"""Rows, tokens, heads, width of keys and values."""
QUICK = ((1, 128, 2, 32), (2, 128, 2, 64))
SEED = 0


def inputs(shape: tuple[int, int, int, int]) -> tuple[list[Tensor], Tensor]:
    """q, k, v, g in [-1, 0], beta in [0, 1], and the gradient of the output; fp32."""
    batch, tokens, heads, width = shape
    generator = torch.Generator().manual_seed(SEED)
    q, k, v, do = (torch.randn(batch, tokens, heads, width, generator=generator) for _ in range(4))
    g, beta = (torch.rand(batch, tokens, heads, generator=generator) for _ in range(2))
    leaves = [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, -g, beta]
    return [x.requires_grad_() for x in leaves], do


def transformers_rule(*leaves: Tensor) -> Tensor:
    return torch_chunk_gated_delta_rule(*leaves, output_final_state=True)[0]


def limbeck_rule(*leaves: Tensor) -> Tensor:
    return gated_delta_rule(*leaves)[0]


def once(rule: Callable[..., Tensor], leaves: list[Tensor], do: Tensor) -> tuple[float, float]:
    """Milliseconds of one forward and one backward."""
    for x in leaves:
        x.grad = None
    start = time.perf_counter()
    output = rule(*leaves)
    middle = time.perf_counter()
    output.backward(do)
    return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)


def difference(leaves: list[Tensor], do: Tensor) -> float:
    """Largest relative difference of the two kernels' outputs and gradients."""
    found = []
    for rule in (transformers_rule, limbeck_rule):
        output = rule(*leaves)
        found.append([output.detach(), *torch.autograd.grad(output, leaves, do)])
    return max(float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True))


def measure(shape: tuple[int, int, int, int], repeats: int) -> dict[str, Any]:
    """Medians and minima over interleaved repeats, so that whatever else the machine does falls on both kernels."""
    leaves, do = inputs(shape)
    rules = {"transformers": transformers_rule, "limbeck": limbeck_rule}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rules}
    apart = difference(leaves, do)
    for repeat in range(repeats + 2):
        for name, rule in rules.items():
            taken = once(rule, leaves, do)
            # Two rounds to warm up the allocator and the matrix library.
            if repeat >= 2:
                times[name].append(taken)
    row: dict[str, Any] = {"setting": "B{} T{} H{} D{}".format(*shape), "metric": "milliseconds, forward + backward"}
    for name, taken in times.items():
        row[f"{name}_forward"] = round(median(t[0] for t in taken), 2)
        row[f"{name}_backward"] = round(median(t[1] for t in taken), 2)
        row[name] = round(median(sum(t) for t in taken), 2)
        row[f"{name}_fastest"] = round(min(sum(t) for t in taken), 2)
    row["value"] = round(row["transformers"] / row["limbeck"], 2)
    row["ratio_of_fastest"] = round(row["transformers_fastest"] / row["limbeck_fastest"], 2)
    row["relative_difference"] = apart
    return row


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, few repeats; writes only with --out")
    parser.add_argument("--out", type=Path, help="folder of results.json; by default this benchmark's own")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        rows = [measure(shape, 3 if options.quick else 21) for shape in (QUICK if options.quick else SHAPES)]
        criteria = []
        for row in rows:
            line = "{setting}: transformers {transformers} ms, limbeck {limbeck} ms, {value}x; fastest runs {ratio_of_fastest}x"
            print(line.format(**row))
            # The smaller of two: medians suffer from other work on the machine, and not always evenly.
            ratio = min(row["value"], row["ratio_of_fastest"])
            criteria.append(criterion(f"speed-up, {row['setting']}", f">= {BOUND}", ratio, ratio >= BOUND))
        apart = max(row["relative_difference"] for row in rows)
        criteria.append(criterion("largest relative difference", f"<= {AGREEMENT}", apart, apart <= AGREEMENT))
        folder = options.out or (None if options.quick else Path(__file__).parent)
        if folder:
            command = "python -m benchmarks.delta_rule.run" + (" --quick" if options.quick else "")
            claim = f"The chunked gated delta rule is >= {BOUND}x transformers' torch kernel on CPU, forward + backward, fp32"
            write_results(folder, claim, command, [SEED], rows, criteria)
    finally:
        torch.set_num_threads(before)
    return criteria


if __name__ == "__main__":
    main()
