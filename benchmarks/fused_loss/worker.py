"""One loss in a process of its own: a request and the share of tokens that count a line on stdin, an answer a line on stdout.

``memory`` -> extra peak resident memory in MiB of one forward and backward over what is held before; ``time`` -> CPU and wall
milliseconds of one; ``gradient`` -> the loss and two random projections of its gradient.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from benchmarks.fused_loss.losses import LOSSES, Case, make_case


def status(field: str) -> int:
    """A field of this process's status in KiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def once(name: str, case: Case) -> torch.Tensor:
    loss = LOSSES[name](case)
    loss.backward()
    return loss.detach()


def clear(case: Case) -> None:
    case.hidden_ND.grad = case.weight_VD.grad = None
    gc.collect()


def answer(request: str, name: str, case: Case) -> dict[str, Any]:
    clear(case)
    if request == "memory":
        # Writing 5 sets the peak back to what is held now.
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        once(name, case)
        return {"mib": (status("VmHWM") - before) / 1024}
    if request == "time":
        cpu, wall = time.process_time(), time.perf_counter()
        once(name, case)
        return {"cpu": 1e3 * (time.process_time() - cpu), "wall": 1e3 * (time.perf_counter() - wall)}
    loss = once(name, case)
    generator = torch.Generator().manual_seed(1)
    found = [float(loss)]
    for leaf in (case.hidden_ND, case.weight_VD):
        assert leaf.grad is not None
        found.append(float((leaf.grad * torch.randn(leaf.shape, generator=generator)).sum()))
    return {"gradient": found}


def main() -> None:
    warnings.simplefilter("ignore")
    name, *shape, threads = sys.argv[1:]
    tokens, width, vocabulary, k = map(int, shape)
    torch.set_num_threads(int(threads))
    cases: dict[str, Case] = {}
    # The protocol has stdout for itself, whatever a library prints.
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        try:
            once(name, make_case(8, 4, 16, 2, 1.0))
        except ImportError as error:
            print(json.dumps({"absent": str(error)}), file=out, flush=True)
            return
        print(json.dumps({"ready": True}), file=out, flush=True)
        for line in sys.stdin:
            request, share = line.split()
            if share not in cases:
                cases[share] = make_case(tokens, width, vocabulary, k, float(share))
                once(name, cases[share])
            print(json.dumps(answer(request, name, cases[share])), file=out, flush=True)


if __name__ == "__main__":
    main()
