"""Resumable checkpoints: either whole or not there.

A checkpoint is written under a temporary name beside its place, its files are fsynced, a manifest with sizes and SHA-256 comes
last, the folder is renamed and its parent fsynced.  Tensors go through DCP's safetensors storage (so that another number of ranks
can read them), everything else is JSON; nothing is pickled.

    checkpoints/step_10/   tensors/*.safetensors, objectives.safetensors, rng-0-of-1.{safetensors,json}, state.json, MANIFEST.json
    checkpoints/final/     the same, never pruned, and what the caller puts beside it (a train stage: model/, to load without us)
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from limbeck.engine.determinism import derive_seed, rng_state, seed_everything, set_rng_state
from limbeck.engine.parallel import World
from limbeck.errors import CheckpointError
from limbeck.files import fsync, sha256
from limbeck.records import unsealed

# A world of one is meant.  For good, since filters set for a while are not safe beside a save in the background.
warnings.filterwarnings("ignore", message="torch.distributed is .*uninitialized", category=UserWarning)

FORMAT = 1
MANIFEST = "MANIFEST.json"
FINAL = "final"
_STEP = re.compile(r"step_(\d+)")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NEARLY_FULL = 0.1
"""Share of a disk that is free, below which that is said."""
LATE = 60.0
"""Seconds after which a file that another rank has written must be seen."""
_PART = ".part-"
"""Each rank's piece of the manifest, gone when the whole one is written."""


class NoSpace(CheckpointError):
    """A save that was given up for lack of space; what was there before is intact."""


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint held besides the tensors that were filled in place; ``objectives`` are tensors of any shape."""

    path: Path
    step: int
    state: dict[str, Any]
    objectives: dict[str, Tensor]


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step_{step}"


def saved_steps(folder: Path) -> dict[int, Path]:
    """Step -> folder of every committed checkpoint but the final one, oldest first."""
    found = {int(match[1]): path for path in (folder.iterdir() if folder.is_dir() else ()) if (match := _STEP.fullmatch(path.name))}
    return dict(sorted(found.items()))


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None.  Every byte is read."""
    try:
        manifest = unsealed((folder / MANIFEST).read_bytes())
        listed = {name: (facts["size"], facts["sha256"]) for name, facts in manifest["files"].items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})"
    if manifest.get("format") != FORMAT:
        return f"it has format {manifest.get('format')!r:.80}, this version reads {FORMAT}"
    named = _STEP.fullmatch(folder.name)
    if named and manifest.get("step") != int(named[1]):
        return f"its {MANIFEST} is that of step {manifest.get('step')!r:.80}"
    found = {p.relative_to(folder).as_posix() for p in _files(folder)} - {MANIFEST}
    if foreign := sorted(found - set(listed)):
        return f"{foreign[0]} is not listed in its manifest"
    for name, (size, digest) in sorted(listed.items()):
        path = folder / name
        if name not in found:
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size!r:.80}"
        if sha256(path) != digest:
            return f"{name} has changed since it was written (SHA-256)"
    return None


def _no_space(error: BaseException) -> bool:
    """Whether an error, or what it was made from, says that a disk or a quota is full."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    if isinstance(error, CheckpointException):
        return any(_no_space(e[0]) for e in error.failures.values())
    text = str(error)
    return any(word in text for word in ("No space left", "File too large", "quota exceeded", "inline_container"))


def wait_for(path: Path) -> None:
    """Wait, within bounds, until a file that another machine has written is seen here."""
    until = time.monotonic() + LATE
    while not path.exists():
        if time.monotonic() > until:
            raise CheckpointError(f"{path}: is not there after {LATE:g} s, although another rank has written it: all ranks must see one file system")
        time.sleep(0.05)


def space(size: float) -> str:
    """``162GB``, ``1.8TB``, ``4.1MB``: three digits at most, as disks are sold."""
    for limit, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        # What three digits round up to a thousand is one of the next unit.
        if size >= 0.9995 * limit:
            return f"{size / limit:.3g}{unit}"
    return f"{size / 1e3:.3g}kB"


def space_needed(tensors: dict[str, Tensor]) -> int:
    """Bytes of a checkpoint of ``tensors`` of any shape, with a tenth to spare."""
    return int(1.1 * sum(t.numel() * t.element_size() for t in tensors.values())) + (1 << 20)


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        keep_last: int,
        keep_every: int | None = None,
        say: Callable[[str], None],
        note: Callable[[str], None] | None = None,
        saved: Callable[[int], None] | None = None,
    ):
        """``say`` takes what must be read, ``note`` what is only for the log, ``saved`` the step of each checkpoint that is there.

        ``keep_last`` 0 keeps all; a multiple of ``keep_every`` steps is kept beside the last ones.
        """
        self.folder = folder
        self.world = world = world.for_saves()
        self.keep_last = keep_last
        self.keep_every = keep_every
        self._under_way: Future[None] | None = None
        self._stager: DefaultStager | None = None
        self.say = say
        self.note = note or (lambda text: None)
        self.saved = saved or (lambda step: None)
        self._warned = 0
        if world.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for stale in sorted(folder.glob(".tmp-*")) + sorted(folder.glob(".trash-*")):
                shutil.rmtree(stale, ignore_errors=True)
        world.barrier()

    def steps(self) -> list[tuple[int, Path]]:
        """Committed checkpoints, oldest first; ``final`` counts with the step it holds."""
        final = self.folder / FINAL
        found = [*saved_steps(self.folder).items(), *([(_final_step(final), final)] if final.exists() else [])]
        # The final one has more in it than the step's own: it is the newer of two.
        return sorted(found, key=lambda pair: (pair[0], pair[1] == final))

    def has_final(self, step: int) -> bool:
        """Whether the final checkpoint is that of a step, as every rank sees it."""
        return bool(self.world.gather([int(_final_step(self.folder / FINAL) == step)])[0, 0])

    # -- saving ----------------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        objectives: dict[str, Tensor],
        state: dict[str, Any],
        *,
        final: bool = False,
        beside: Callable[[Path], None] | None = None,
        background: bool = False,
    ) -> Path:
        """Write, commit, then prune.  Raises :class:`NoSpace` when it does not fit; nothing committed is touched by that.

        ``tensors`` (parameters and the optimiser's state, sharded or not) and ``objectives`` (theirs) are of any shape.
        ``beside`` (called on every rank) puts more into the folder, which is then a part of the checkpoint.  In the ``background`` what
        is saved is copied to memory before this returns; how it ended is known by :meth:`finish`, and one is written at a time.
        """
        self.finish()
        target = self.folder / (FINAL if final else step_name(step))
        rng = rng_state()
        if not background:
            self._save(target, step, tensors, objectives, state, rng, beside)
            return target
        if self._stager is None:
            self._stager = DefaultStager(StagingOptions(False, False, False, False))
        staged, kept = self._stager.stage(tensors), {name: t.detach().cpu().clone() for name, t in objectives.items()}
        outcome: Future[None] = Future()

        def work() -> None:
            try:
                self._save(target, step, staged, kept, state, rng, None)
            except BaseException as error:
                outcome.set_exception(error)
            else:
                outcome.set_result(None)

        # A daemon: a process that must end is not held up by a save, which is either committed or never read.
        threading.Thread(target=work, name=f"save {target.name}", daemon=True).start()
        self._under_way = outcome
        return target

    @property
    def failed(self) -> bool:
        """Whether a save in the background has ended in an error that :meth:`finish` has not told yet, on this rank."""
        return self._under_way is not None and self._under_way.done() and self._under_way.exception() is not None

    def finish(self, timeout: float | None = None) -> None:
        """Wait for the save in the background, if there is one, and raise what it failed with."""
        outcome, self._under_way = self._under_way, None
        if outcome is not None:
            outcome.result(timeout)

    def _save(
        self,
        target: Path,
        step: int,
        tensors: dict[str, Tensor],
        objectives: dict[str, Tensor],
        state: dict[str, Any],
        rng: tuple[dict[str, Tensor], dict[str, Any]],
        beside: Callable[[Path], None] | None,
    ) -> None:
        owner = int(self.world.gather([os.getpid()])[0, 0])
        temporary = self.folder / f".tmp-{target.name}-{owner}"
        failure: BaseException | None = None
        entries: dict[str, dict[str, Any]] = {}
        try:
            self._check_space(tensors)
            if self.world.rank == 0:
                (temporary / "tensors").mkdir(parents=True)
        except (OSError, NoSpace) as error:
            failure = error
        self._agree(failure, temporary)
        try:
            wait_for(temporary / "tensors")
            self._write(temporary, tensors, objectives, {**state, "step": step}, rng)
            if beside is not None:
                beside(temporary)
        except (OSError, RuntimeError, CheckpointError, CheckpointException) as error:  # the last one is no Exception
            failure = error
        except Exception as error:
            if "Safetensor" not in type(error).__name__:
                raise
            failure = error
        self._agree(failure, temporary)
        try:
            # Every rank hashes its share of the files.
            for path in self._written(temporary)[self.world.rank :: self.world.size]:
                fsync(path)
                entries[path.relative_to(temporary).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
            (temporary / f"{_PART}{self.world.rank}").write_text(json.dumps(entries), encoding="utf-8")
        except (OSError, CheckpointError) as error:
            failure = error
        self._agree(failure, temporary)
        try:
            if self.world.rank == 0:
                self._commit(temporary, target, step)
        except (OSError, CheckpointError) as error:
            failure = error
        self._agree(failure, temporary)
        if self.world.rank == 0:
            size = sum(path.stat().st_size for path in _files(target))
            self.note(f"  -> checkpoint saved to {target} ({space(size)})")
            self.saved(step)
            self._prune()
        self.world.barrier()

    def _written(self, temporary: Path) -> list[Path]:
        """The files of a save, once every rank sees the same ones: on a shared disk those of other machines come late."""
        until = time.monotonic() + LATE
        while True:
            files = [path for path in _files(temporary) if not path.name.startswith(_PART)]
            names = "\n".join(path.relative_to(temporary).as_posix() for path in files)
            seen = self.world.gather([int.from_bytes(hashlib.sha256(names.encode()).digest()[:7], "big"), int(time.monotonic() > until)])
            if bool((seen[:, 0] == seen[0, 0]).all()):
                return files
            if int(seen[:, 1].max()):
                raise CheckpointError(f"{temporary}: after {LATE:g} s ranks still see different files in it: all must see one file system")
            time.sleep(0.1)

    def check_room(self, tensors: dict[str, Tensor], saves: int) -> None:
        """Raises :class:`NoSpace` if the checkpoints of ``tensors`` (any shape) that a run of ``saves`` saves keeps, and the one
        being written, do not fit."""
        failure: NoSpace | None = None
        if self.world.rank == 0:
            kept = min(saves, self.keep_last or saves) + 1
            one, free = space_needed(tensors), shutil.disk_usage(self.folder).free
            held = sum(path.stat().st_size for _, folder in self.steps() for path in _files(folder))
            if free + held < kept * one:
                failure = NoSpace(
                    f"{self.folder}: {kept} checkpoints of {space(one)} are there at one time, and {space(free)} are free: make room, lower "
                    "loop.keep_last, or name a folder on another disk in loop.checkpoints"
                )
        if self.world.gather([int(failure is not None)]).sum():
            raise failure or NoSpace(f"{self.folder}: the checkpoints do not fit; the first rank's message says more")

    def _check_space(self, tensors: dict[str, Tensor]) -> None:
        usage = shutil.disk_usage(self.folder)
        need = space_needed(tensors)
        if usage.free < need:
            raise NoSpace(
                f"{self.folder}: a checkpoint needs {space(need)} and {space(usage.free)} are free; "
                "make room, or lower loop.keep_last"
            )
        percent = int(100 * (1 - usage.free / usage.total))
        if usage.free < NEARLY_FULL * usage.total and percent > self._warned and self.world.rank == 0:
            self._warned = percent
            self.say(f"WARNING: Disk {percent}% full ({space(usage.free)} / {space(usage.total)} available)")

    def _write(
        self,
        temporary: Path,
        tensors: dict[str, Tensor],
        objectives: dict[str, Tensor],
        state: dict[str, Any],
        rng: tuple[dict[str, Tensor], dict[str, Any]],
    ) -> None:
        rank, size = self.world.rank, self.world.size
        dcp.save(
            tensors,
            storage_writer=HuggingFaceStorageWriter(str(temporary / "tensors"), save_distributed=True),
            process_group=self.world.control,
            no_dist=size == 1,
        )
        rng_tensors, rng_values = rng
        save_file(rng_tensors, temporary / f"rng-{rank}-of-{size}.safetensors")
        (temporary / f"rng-{rank}-of-{size}.json").write_text(json.dumps(rng_values), encoding="utf-8")
        if rank == 0:
            save_file(
                {name: t.detach().cpu().contiguous() for name, t in objectives.items()}, temporary / "objectives.safetensors"
            )
            state = {**state, "shapes": {name: list(t.shape) for name, t in tensors.items()}, "world": size}
            (temporary / "state.json").write_text(json.dumps(state, allow_nan=False), encoding="utf-8")

    def _agree(self, failure: BaseException | None, temporary: Path) -> None:
        """If any rank failed, all give this save up together."""
        code = 0 if failure is None else 2 if isinstance(failure, NoSpace) or _no_space(failure) else 1
        codes = self.world.gather([code])[:, 0]
        worst = int(codes.max())
        if worst == 0:
            return
        if self.world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        self.world.barrier()
        if isinstance(failure, NoSpace):
            raise failure
        reason = str(failure).splitlines()[0] if failure is not None else f"rank {int(codes.argmax())} failed"
        if worst == 2:
            raise NoSpace(f"{self.folder}: no space left while a checkpoint was written ({reason})") from failure
        raise CheckpointError(f"{self.folder}: a checkpoint could not be written: {reason}") from failure

    def _commit(self, temporary: Path, target: Path, step: int) -> None:
        files: dict[str, dict[str, Any]] = {}
        for part in [temporary / f"{_PART}{rank}" for rank in range(self.world.size)]:
            wait_for(part)
            files.update(json.loads(part.read_text(encoding="utf-8")))
            part.unlink()
        manifest = temporary / MANIFEST
        manifest.write_text(
            json.dumps({"format": FORMAT, "step": step, "world": self.world.size, "files": files}, indent=1), encoding="utf-8"
        )
        fsync(manifest)
        for folder in (temporary / "tensors", temporary):
            fsync(folder)
        if target.exists():
            _remove(target)
        os.rename(temporary, target)
        fsync(self.folder)

    def _prune(self) -> None:
        """Only after a commit, only step folders, never the newest ones."""
        last = list(saved_steps(self.folder).items())[: -self.keep_last] if self.keep_last else []
        old = [path for step, path in last if not self.keep_every or step % self.keep_every]
        for path in old:
            _remove(path)
        if old:
            self.note(f"  Cleaned {len(old)} old checkpoint(s), keeping last {self.keep_last}")

    # -- loading ---------------------------------------------------------------------------------------------------------

    def load(self, tensors: dict[str, Tensor]) -> Loaded | None:
        """Fill ``tensors`` of any shape in place from the newest whole checkpoint.  Random states are *not* touched: see
        :meth:`load_rng`.

        A damaged one is named, set aside as ``.corrupt-...`` and the one before it is used.  None when there never was one.
        """
        step, name = -1, ""
        problem = 0
        if self.world.rank == 0:
            tried = False
            found = self.steps()[::-1]
            if found and found[0][1].name != FINAL:
                # Its step may be what is damaged: a final one is not passed over in silence.
                found.sort(key=lambda pair: pair[1].name != FINAL or damage(pair[1]) is None)
            for number, path in found:
                tried = True
                reason = damage(path)
                if reason is None:
                    step, name = number, path.name
                    break
                aside = path.with_name(f".corrupt-{path.name}-{time.time_ns()}")
                os.rename(path, aside)
                self.say(
                    f"checkpoint {path.name} is damaged: {reason}.  It is set aside as {aside.name}; the one before it is used."
                )
            problem = int(tried and step < 0)
        step, is_final, problem = (int(x) for x in self.world.gather([step, int(name == FINAL), problem])[0])
        if problem:
            raise CheckpointError(
                f"{self.folder}: no checkpoint in it is whole (the damaged ones are set aside as .corrupt-*); "
                "start again with --fresh, or put an intact one back"
            )
        if step < 0:
            return None
        path = self.folder / (FINAL if is_final else step_name(step))
        wait_for(path / "state.json")
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        _compare_shapes(path, state["shapes"], tensors)
        _read_tensors(path, tensors, self.world)
        return Loaded(path, step, state, load_file(path / "objectives.safetensors"))

    def load_rng(self, loaded: Loaded, seed: int) -> None:
        """Restore the random states: the last thing before the next step.

        On another number of ranks there are none of its own for each: new streams are derived and that is said.
        """
        stem = f"rng-{self.world.rank}-of-{self.world.size}"
        if (loaded.path / f"{stem}.json").exists():
            values = json.loads((loaded.path / f"{stem}.json").read_text(encoding="utf-8"))
            set_rng_state(load_file(loaded.path / f"{stem}.safetensors"), values)
        else:
            seed_everything(derive_seed(seed, f"resumed at {loaded.step} on {self.world.size}", self.world.rank))
            before = loaded.state["world"]
            self.say(f"resumed on {self.world.size} ranks instead of {before}: random streams are new, sums round differently")


def load_parameters(path: Path, module: nn.Module) -> None:
    """Put a checkpoint's trained parameters and buffers into a module of the same structure (one process, no optimiser)."""
    reason = damage(path) if path.is_dir() else "there is no such checkpoint"
    if reason is not None:
        there = ", ".join(sorted(p.name for p in path.parent.glob("[sf]*"))) or "none"
        raise CheckpointError(f"{path}: {reason}; name another one, or put an intact copy back; checkpoints here: {there}")
    shapes = json.loads((path / "state.json").read_text(encoding="utf-8"))["shapes"]
    held = {f"model/{name}": p.detach() for name, p in module.named_parameters()}
    held |= {f"buffer/{name}": b for name, b in module.named_buffers()}
    wanted = {name: shape for name, shape in shapes.items() if name.startswith(("model/", "buffer/"))}
    tensors = {name: tensor for name, tensor in held.items() if name in wanted}
    _compare_shapes(path, wanted, tensors)
    _read_tensors(path, tensors, World(torch.device("cpu")))


def _read_tensors(path: Path, tensors: dict[str, Tensor], world: World) -> None:
    try:
        dcp.load(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(path / "tensors")),
            process_group=world.control,
            no_dist=world.size == 1,
        )
    except CheckpointException as error:  # no Exception: it would pass every handler above
        reason = str(next(iter(error.failures.values()))[0]).splitlines()[0]
        raise CheckpointError(f"{path}: its tensors cannot be read: {reason}") from None


def _remove(path: Path) -> None:
    """Rename first: a half-deleted folder must never look like a checkpoint."""
    trash = path.with_name(f".trash-{path.name}-{time.time_ns()}")
    os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def _final_step(path: Path) -> int:
    try:
        return int(unsealed((path / MANIFEST).read_bytes())["step"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return 0


def _differences(saved: dict[str, list[int]], tensors: dict[str, Tensor]) -> Iterator[str]:
    for name in sorted({*saved, *tensors}):
        have = list(tensors[name].shape) if name in tensors else None
        if saved.get(name) != have:
            yield f"{name}: checkpoint {saved.get(name, 'has none')}, run {have if have is not None else 'has none'}"


def _compare_shapes(path: Path, saved: dict[str, list[int]], tensors: dict[str, Tensor]) -> None:
    """Strict both ways: a tensor that is missing on either side is another training."""
    differences = list(_differences(saved, tensors))
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise CheckpointError(
            f"{path} belongs to another training: {'; '.join(differences[:5])}{more}.  "
            "Give the run another name, or start it with --fresh"
        )
