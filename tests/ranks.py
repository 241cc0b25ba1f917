"""Two gloo ranks on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

PATIENCE = 30.0
"""Seconds that a rank waits for the other to be done too."""


def on_two_ranks(check: Callable[[int, DeviceMesh], None], folder: Path) -> None:
    """Run ``check(rank, mesh)``, a function of a module, on both ranks; an assertion of either fails here."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(_rank, (check, folder), nprocs=2)
    assert {path.name for path in folder.glob("rank*")} == {"rank0", "rank1"}


def _rank(rank: int, check: Callable[[int, DeviceMesh], None], folder: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        check(rank, init_device_mesh("cpu", (2,)))
        (folder / f"rank{rank}").touch()
        # gloo aborts a rank whose peer is gone, now and then even in an orderly teardown: both leave when both are done.
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if len(list(folder.glob("rank*"))) == 2:
                os._exit(0)
            time.sleep(0.05)
    finally:
        dist.destroy_process_group()
