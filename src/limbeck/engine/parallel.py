"""Ranks and sharding.  FSDP2 on a device mesh; a world of one takes the same path and finds nothing to wrap.

Three rules, each of which fails silently or far from its cause when broken: the root is the whole train step; gradients are
summed over ranks, never averaged (losses are already divided by global counts); every mixer is a unit of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from limbeck.engine.step import StreamingTrainStep, TrainStep
from limbeck.errors import RunError

PATIENCE = 24 * 3600.0
"""Seconds that ranks wait for what the first does alone."""


@dataclass(frozen=True)
class World:
    """The ranks of a run.  ``control`` is a gloo group for what ranks agree on; training's own group never carries it."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    control: dist.ProcessGroup | None = None

    def gather(self, values: list[int]) -> Tensor:
        """Every rank's integers, int64 ``[size, len(values)]`` on the CPU."""
        mine = torch.tensor(values, dtype=torch.int64)
        if self.size == 1:
            return mine[None]
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine, group=self.control)
        return torch.stack(rows)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a CPU tensor over the ranks."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.control)
        return values

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier(group=self.control)


def connect(device: str | torch.device | None = None, timeout: float = 600) -> World:
    """Join the run that ``torchrun`` or Slurm started, or be a world of one.

    ``timeout`` seconds bound every wait of training for a rank that died.  What ranks agree on beside it may wait longer: the first
    rank may be judging, or writing 80B parameters, while the others wait; whoever started them ends all when one dies.
    """
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if size == 1:
        return World(kind)
    if kind.type == "cuda":
        kind = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(kind)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    mesh = init_device_mesh(kind.type, (size,))
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=max(timeout, PATIENCE)))
    return World(kind, dist.get_rank(), size, mesh, control)


def _shard(unit: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy, reshard: bool) -> None:
    fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    assert isinstance(unit, FSDPModule)
    # Sums instead of means; gloo has no scaled sum, so the plain one is forced beside the factor.
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)


def _inner_first(root: nn.Module, units: Iterable[nn.Module]) -> list[nn.Module]:
    """Units without doubles, nested ones before what holds them."""
    wanted = {id(u) for u in units}
    named = [(name.count("."), module) for name, module in root.named_modules() if id(module) in wanted]
    return [module for _, module in sorted(named, key=lambda pair: -pair[0])]


def blocks(network: nn.Module) -> list[nn.Module]:
    """A network's repeated blocks: the members of its largest module list."""
    lists = [list(m) for m in network.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda members: sum(p.numel() for m in members for p in m.parameters()), default=[])


def parallelize(step: TrainStep, world: World, policy: MixedPrecisionPolicy) -> None:
    """Shard a step's student and its teacher, each on its own, over ``world``.

    Optimisers are built afterwards: sharding replaces the parameters.
    """
    if world.mesh is None:
        return
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    for unit in _inner_first(step.student, step.student.units()):
        # A network that computes in float32 by itself must not find its parameters rounded.
        _shard(unit, world.mesh, whole if getattr(unit, "keeps_precision", False) else policy, reshard=True)
    # A streaming step calls its mixers directly, each a root of its own; the student around them is only stored sharded.
    root = step.student if isinstance(step, StreamingTrainStep) else step
    _shard(root, world.mesh, policy, reshard=False)
    assert_sharded(step.student, world)
    if step.teacher_root is not None:
        frozen = MixedPrecisionPolicy(cast_forward_inputs=False)
        for unit in blocks(step.teacher_root):
            _shard(unit, world.mesh, frozen, reshard=True)
        # Its head stays whole until the losses have read it; `release_teacher` puts it away.
        _shard(step.teacher_root, world.mesh, frozen, reshard=False)
        assert_sharded(step.teacher_root, world)


def release_teacher(step: TrainStep) -> None:
    """Shard the teacher's own root parameters again, after the losses have used them."""
    if isinstance(step.teacher_root, FSDPModule):
        step.teacher_root.reshard()


def assert_sharded(module: nn.Module, world: World) -> None:
    """Every parameter is a DTensor that holds about its share; anything else means that sharding was silently not applied."""
    local = total = 0
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, DTensor):
            raise RunError(f"{name} is not sharded over the {world.size} ranks although sharding was asked for")
        local, total = local + parameter.to_local().numel(), total + parameter.numel()
    held = world.sum(torch.tensor([local], dtype=torch.int64)).item()
    if held != total:
        raise RunError(f"the {world.size} ranks hold {held} numbers of a network of {total}: it is not sharded evenly")


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """A module's whole state on the CPU; ranks other than 0 take part and keep nothing (an empty mapping)."""
    keep = not dist.is_initialized() or dist.get_rank() == 0
    state = {}
    for name, tensor in module.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            state[name] = full.detach().cpu()
    return state
