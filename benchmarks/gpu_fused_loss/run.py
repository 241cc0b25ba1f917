"""Head and loss at the size of a real model on a GPU, bf16: ours against dense code and Liger.

python -m benchmarks.gpu_fused_loss.run [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.evidence import criterion, write_results
from benchmarks.fused_loss.losses import LOSSES, Case, make_case

FULL = {"tokens": 16384, "width": 4096, "vocabulary": 151936, "k": 128}
QUICK = {"tokens": 512, "width": 128, "vocabulary": 8000, "k": 16}
NAMES = ("limbeck top-k tail", "dense top-k tail", "limbeck kl", "limbeck jsd", "Liger chunked JSD")
COMPARED = 512
"""Tokens whose gradient is compared with that of fp32."""


def clear(case: Case) -> None:
    case.hidden_ND.grad = case.weight_VD.grad = None
    gc.collect()
    torch.cuda.empty_cache()


def once(name: str, case: Case) -> float:
    """Milliseconds of one forward and backward."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    LOSSES[name](case).backward()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measure(name: str, case: Case, repeats: int) -> dict[str, Any]:
    """Time and the peak of what is allocated over inputs, gradients of the leaves included."""
    times = []
    for _ in range(repeats + 2):
        clear(case)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        times.append(once(name, case))
        peak = torch.cuda.max_memory_allocated() - before
    clear(case)
    # Two to warm up the matrix library and, with Liger, the compiler.
    taken = times[2:]
    return {"value": round(median(taken), 2), "fastest": round(min(taken), 2), "extra_gib": round(peak / 2**30, 3)}


def apart(case: Case) -> float:
    """Relative distance of the bf16 gradient of some hidden states from the one that fp32 gives for the same inputs."""
    found = []
    for dtype in (torch.float32, case.hidden_ND.dtype):
        few = case.signal.rows_n < COMPARED
        signal = replace(
            case.signal,
            rows_n=case.signal.rows_n[few],
            ids_nK=case.signal.ids_nK[few],
            logits_nK=case.signal.logits_nK[few],
            log_z_nZ=case.signal.log_z_nZ[few],
        )
        hidden = case.hidden_ND.detach()[:COMPARED].to(dtype).requires_grad_()
        part = replace(case, hidden_ND=hidden, weight_VD=case.weight_VD.detach().to(dtype), signal=signal)
        LOSSES["limbeck top-k tail"](part).backward()
        assert hidden.grad is not None
        found.append(hidden.grad.double())
    return float((found[1] - found[0]).norm() / found[0].norm())


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, few repeats; writes only with --out")
    parser.add_argument("--out", type=Path, help="folder of results.json; by default this benchmark's own")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is measured")
        return []
    shape = QUICK if options.quick else FULL
    case = make_case(**shape, share=1.0, device="cuda", dtype=torch.bfloat16)
    rows: list[dict[str, Any]] = []
    for name in NAMES:
        try:
            row = measure(name, case, 3 if options.quick else 10)
        except ImportError as error:
            print(f"{name}: absent ({error})")
            continue
        setting = "{} N{tokens} H{width} V{vocabulary} k{k} bf16".format(name, **shape)
        rows.append({"setting": setting, "metric": "milliseconds, forward + backward", "name": name, **row})
        print("{setting}: {value} ms (fastest {fastest}), {extra_gib} GiB".format(**rows[-1]))
    at = {row["name"]: row for row in rows}
    ours, dense, liger = (at.get(name) for name in ("limbeck top-k tail", "dense top-k tail", "Liger chunked JSD"))
    assert ours is not None and dense is not None
    error = apart(case)
    time = max(ours[key] / dense[key] for key in ("value", "fastest"))
    criteria = [
        criterion("extra memory of limbeck top-k tail, GiB", "<= 6", ours["extra_gib"], ours["extra_gib"] <= 6),
        criterion("time, limbeck top-k tail / dense top-k tail", "<= 1.1", round(time, 3), time <= 1.1),
        criterion("relative distance of the gradient from fp32", "<= 0.01", error, error <= 0.01),
    ]
    if liger is not None:
        time = max(at["limbeck jsd"][key] / liger[key] for key in ("value", "fastest"))
        criteria.append(criterion("time, limbeck jsd / Liger chunked JSD", "< 1", round(time, 3), time < 1))
    for line in criteria:
        print("{name}: {measured} ({bound}) {holds}".format(**line))
    folder = options.out or (None if options.quick else Path(__file__).parent)
    if folder:
        command = "python -m benchmarks.gpu_fused_loss.run" + (" --quick" if options.quick else "")
        claim = "At N = 16k, H = 4096, V = 151,936 in bf16 the fused top-k divergence needs 6 GiB at most and no more time than dense code"
        write_results(folder, claim, command, [0], rows, criteria)
    return criteria


if __name__ == "__main__":
    main()
