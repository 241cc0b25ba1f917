"""Ranks and sharding.  FSDP2 on a device mesh; a world of one takes the same path and finds nothing to wrap.

Three rules, each of which fails silently or far from its cause when broken: the root is the whole train step; gradients are
summed over ranks, never averaged (losses are already divided by global counts); every mixer is a unit of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
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
TIMEOUT = 600.0
"""Seconds that ranks wait for each other in training; `LIMBECK_RANK_TIMEOUT` sets another number."""
ROLL_CALL = 15.0
"""Seconds in which a rank must answer when it is asked whether it is still there."""


@dataclass(frozen=True)
class World:
    """The ranks of a run, and three gloo groups beside the one that training's own sums go through.

    ``control`` is for what ranks agree on at every step, and gives up on a rank that does not come; ``patient`` waits for what the
    first rank does alone; ``saving`` belongs to checkpoints, which may be written while the next steps are done.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    control: dist.ProcessGroup | None = None
    patient: dist.ProcessGroup | None = None
    saving: dist.ProcessGroup | None = None

    def gather(self, values: list[int]) -> Tensor:
        """Every rank's integers, int64 ``[size, len(values)]`` on the CPU."""
        mine = torch.tensor(values, dtype=torch.int64)
        if self.size == 1:
            return mine[None]
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine, group=self.control)
        return torch.stack(rows)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks of ``values``, a CPU tensor of any shape."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.control)
        return values

    def barrier(self) -> None:
        """Wait for every rank, for as long as the first may be at work alone."""
        if self.size > 1:
            dist.barrier(group=self.patient or self.control)

    def for_saves(self) -> World:
        """The same ranks, talking over the group of checkpoints alone: two threads on one group would take each other's messages."""
        group = self.saving or self.control
        return replace(self, control=group, patient=group)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What a rank that died or hangs does to the others ends here as an error that names it."""
        try:
            yield
        except RuntimeError as error:
            # gloo raises plain RuntimeErrors, and says so in their text alone.
            if self.size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise RunError(f"{self._roll_call()}: this rank stops too.  What was saved is intact; the same command goes on from there") from error

    def _roll_call(self) -> str:
        """Which ranks do not answer any more, in words: each tells the first that it is there, and the first tells them all who is not."""
        group, seconds = self.patient or self.control, timedelta(seconds=ROLL_CALL)
        if self.rank:
            gone = torch.zeros(self.size, dtype=torch.int64)
            try:
                dist.send(torch.ones(1, dtype=torch.int64), 0, group=group)
                _received(dist.irecv(gone, 0, group=group), 3 * seconds)
            except RuntimeError:
                gone[0] = 1
        else:
            gone = torch.tensor([0, *(1 - self._answers(rank, seconds) for rank in range(1, self.size))])
            for rank in range(1, self.size):
                with suppress(RuntimeError):
                    if not gone[rank]:
                        dist.send(gone, rank, group=group)
        missing = gone.nonzero().flatten().tolist()
        if not missing:
            return "the ranks lost touch with each other (a network that failed, or a rank that was too slow)"
        many = len(missing) > 1
        names = f"rank{'s' * many} {', '.join(map(str, missing))} of {self.size} {'have' if many else 'has'}"
        return f"{names} died or hang{'s' * (not many)} (a message of its own, if there is one, says why)"

    def _answers(self, rank: int, seconds: timedelta) -> bool:
        try:
            _received(dist.irecv(torch.zeros(1, dtype=torch.int64), rank, group=self.patient or self.control), seconds)
        except RuntimeError:
            return False
        return True


def _received(work: dist.Work | None, seconds: timedelta) -> None:
    assert work is not None
    work.wait(seconds)


def connect(device: str | torch.device | None = None, timeout: float | None = None) -> World:
    """Join the run that ``torchrun`` or Slurm started, or be a world of one.

    ``timeout`` seconds (:data:`TIMEOUT`) bound every wait of training for a rank that died or hangs.  What ranks agree on beside it may
    wait longer: the first rank may be judging, or writing 80B parameters, while the others wait.
    """
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if size == 1:
        return World(kind)
    seconds = _timeout() if timeout is None else timeout
    if kind.type == "cuda":
        kind = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(kind)
    bound, patience = timedelta(seconds=seconds), timedelta(seconds=max(seconds, PATIENCE))
    if not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if kind.type == "cuda" else "gloo", timeout=bound)
        except ValueError as error:
            # A variable that the rendezvous reads is missing, or is no number.
            raise RunError(f"WORLD_SIZE is {size}, and the ranks cannot find each other ({error}): start them by torchrun, or unset WORLD_SIZE") from error
    mesh = init_device_mesh(kind.type, (size,))
    control, patient, saving = (dist.new_group(backend="gloo", timeout=t) for t in (bound, patience, patience))
    return World(kind, dist.get_rank(), size, mesh, control, patient, saving)


def _timeout() -> float:
    given = os.environ.get("LIMBECK_RANK_TIMEOUT", "")
    try:
        seconds = float(given or TIMEOUT)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise RunError(f"LIMBECK_RANK_TIMEOUT: {given!r} is no number of seconds; it must be above 0, or unset for {TIMEOUT:g}")
    return seconds


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


def parallelize(step: TrainStep, world: World, policy: MixedPrecisionPolicy, zero_stage: int = 3) -> None:
    """Shard a step's student and its teacher, each on its own, over ``world``.

    ZeRO 3 puts a student's gathered blocks away after their forward pass, 1 and 2 keep them for the backward pass; gradients and
    optimiser state are sharded in all three.  Optimisers are built afterwards: sharding replaces the parameters.
    """
    if world.mesh is None:
        return
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    for unit in _inner_first(step.student, step.student.units()):
        # A network that computes in float32 by itself must not find its parameters rounded.
        _shard(unit, world.mesh, whole if getattr(unit, "keeps_precision", False) else policy, reshard=zero_stage == 3)
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
            raise RunError(f"{name} is not sharded over the {world.size} ranks although sharding was asked for: run with fewer ranks")
        local, total = local + parameter.to_local().numel(), total + parameter.numel()
    held = world.sum(torch.tensor([local], dtype=torch.int64)).item()
    if held != total:
        raise RunError(f"the {world.size} ranks hold {held} numbers of a network of {total}, which is not sharded evenly: run with fewer ranks")


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """A module's whole state on the CPU; ranks other than 0 take part and keep nothing (an empty mapping)."""
    keep = not dist.is_initialized() or dist.get_rank() == 0
    state = {}
    for name, tensor in module.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            state[name] = full.detach().cpu()
    return state
