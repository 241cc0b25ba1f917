"""Running a recipe: stages in order, each once, going on where the last start stopped.

A stage's *key* is a hash of its resolved options, of the keys of the stages it names, and of the files it reads.  A finished
stage with the same key is skipped; one with another key is *stale*: it and its followers are named, set aside and done anew.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console

from limbeck.config.base import From
from limbeck.config.messages import complaints
from limbeck.config.parts.stages import STAGES, DataOptions
from limbeck.config.plugins import load_plugin
from limbeck.config.recipe import CONDITION_STAGES, Recipe, references, stage_order
from limbeck.config.trackers import check_trackers
from limbeck.data.prepare import input_files
from limbeck.engine.checkpoint import FINAL, saved_steps
from limbeck.engine.lock import RunLock
from limbeck.engine.parallel import World, connect
from limbeck.engine.screen import unbroken
from limbeck.errors import LimbeckError, RecipeError, RunError, did_you_mean
from limbeck.files import sha256, write_atomically
from limbeck.interrupts import Interrupts, held, interruptible
from limbeck.models.loading import resolve_source
from limbeck.stages.context import Say, StageContext
from limbeck.stages.folder import EXIT_REASON, StageFolder, changed_fields, digest, make_run_dir, read_object, write_json
from limbeck.stages.provenance import surroundings

HASHED_WHOLE = 64 * 2**20
"""Larger files of a model folder count by size and time."""
COSMETIC = {
    "log_every", "log_form", "checkpoint_every", "keep_last", "keep_every", "save_in_background", "canary", "checkpoints", "validate_every",
    "validate_rows", "deterministic", "on_out_of_memory", "zero_stage", "trackers",
}  # fmt: skip
"""Loop settings that do not change what a stage makes."""


def run_recipe(
    recipe: Recipe,
    *,
    recipe_dir: Path,
    run_dir: Path | None = None,
    stage: str | None = None,
    fresh: bool = False,
    say: Say = print,
    console: Console | None = None,
    device: str | None = None,
) -> Path:
    """Do what is not done yet.  Returns the run directory.

    ``stage`` runs that stage alone (its inputs must be finished); ``fresh`` sets aside what is there and starts anew.
    ``console`` shows work as it goes: a live view on a terminal or in a notebook, plain lines elsewhere.  ``device`` is where to
    compute, a GPU by default if there is one.

    How it ended is in ``exit_reason`` of the run directory: ``finished``, ``preempted`` (Ctrl-C, SIGTERM, SIGUSR1, SIGHUP; the same
    call goes on) or ``failed``.  A start that was killed leaves none, and one that was refused because another is under way touches nothing.
    """
    run_dir = (run_dir or Path("runs") / recipe.name).resolve()
    order = stage_order(recipe)
    if stage is not None and stage not in order:
        raise RunError(f"--stage {stage}: no such stage{did_you_mean(stage, order) or ';'} stages: {', '.join(order)}")
    check_trackers(recipe)
    with interruptible() as interrupts:
        _own_kernels()
        world = connect(device)
        make_run_dir(run_dir)
        first = world.rank == 0
        run = _Run(recipe, run_dir, recipe_dir, world, unbroken(say) if first else _silent, console if first else None)
        with RunLock(run_dir if first else None), _end_recorded(run_dir if first else None, interrupts), world.watched():
            _run_stages(run, order, stage, fresh)
    return run_dir


def _run_stages(run: _Run, order: list[str], stage: str | None, fresh: bool) -> None:
    recipe, run_dir, recipe_dir, world = run.recipe, run.run_dir, run.recipe_dir, run.world
    keys = {name: stage_key(recipe, name, recipe_dir) for name in order}
    chosen = [stage] if stage else order
    if stage is not None:
        for _, needed in references(recipe.stages[stage]):
            if not StageFolder(run_dir / needed).finished(keys[needed]):
                raise RunError(
                    f"--stage {stage}: it needs stage '{needed}', which is not finished with this recipe: run without --stage, or --stage {needed} first"
                )
    if world.rank == 0:
        _set_aside(recipe, run_dir, recipe_dir, chosen, keys, fresh, run.say)
        _record_start(recipe, run_dir, recipe_dir, world.device)
    world.barrier()
    # Read by every rank before any of them starts to change it.
    done = {name for name in chosen if StageFolder(run_dir / name).finished(keys[name])}
    world.barrier()
    for number, name in enumerate(chosen, 1):
        if name in done:
            run.say(f"[{number}/{len(chosen)}] {name}: done before, skipped")
            continue
        run.say(f"[{number}/{len(chosen)}] {name} ({recipe.stages[name].kind})")
        _run_stage(name, keys[name], replace(run, place=f"stage {number} of {len(chosen)}"))
        world.barrier()


@contextmanager
def _end_recorded(run_dir: Path | None, interrupts: Interrupts) -> Iterator[None]:
    """Keep ``exit_reason`` of a run directory: gone while a start is under way, then how that ended."""
    if run_dir is None:
        yield
        return
    file = run_dir / EXIT_REASON
    file.unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        # A rank that hung in a collective hears of the signal when the others have left, and finds their connections closed.
        interrupted = interrupts.reason is not None or isinstance(error, KeyboardInterrupt | SystemExit)
        with held(), suppress(OSError):  # a full disk is the error that is on its way
            write_atomically(file, "preempted\n" if interrupted else "failed\n")
        raise
    with held():
        write_atomically(file, "finished\n")


def _own_kernels() -> None:
    """Give every rank a folder of its own for compiled kernels: ranks that compile into one overwrite each other's."""
    rank = os.environ.get("RANK")
    if rank is None or not rank.isdecimal() or os.environ.get("WORLD_SIZE", "1") == "1":
        return
    shared = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    if shared.name != f"rank-{rank}":
        os.environ["TRITON_CACHE_DIR"] = str(shared / f"rank-{rank}")


def _silent(text: str) -> None:
    """What ranks other than the first say."""


def prepare_recipe(recipe: Recipe, *, recipe_dir: Path, run_dir: Path | None = None, say: Say = print) -> Path:
    """Prepare the text of every stage of a recipe: no model is loaded, no GPU touched."""
    run_dir = (run_dir or Path("runs") / recipe.name).resolve()
    make_run_dir(run_dir)
    world = World(torch.device("cpu"))
    with interruptible() as interrupts, RunLock(run_dir), _end_recorded(run_dir, interrupts):
        run = _Run(recipe, run_dir, recipe_dir, world, say, None)
        for name in stage_order(recipe):
            options = recipe.stages[name]
            context = run.context(name, options, run_dir / name)
            if options.kind == "prepare" or (options.kind in CONDITION_STAGES and isinstance(options.tokenizer, str)):
                key = stage_key(recipe, name, recipe_dir)
                if not StageFolder(run_dir / name).finished(key):
                    _set_aside(recipe, run_dir, recipe_dir, [name], {name: key}, False, say)
                    _run_stage(name, key, run)
            elif isinstance(getattr(options, "data", None), DataOptions):
                tokenizer = options.data.tokenizer
                if isinstance(tokenizer, From) and recipe.stages[tokenizer.from_].kind != "prepare":
                    say(f"{name}: its tokenizer comes from stage '{tokenizer.from_}', so its text is prepared when that has run")
                    continue
                folder, _ = context.data(options.data)
                say(f"{name}: {folder}")
    return run_dir


@dataclass(frozen=True)
class _Run:
    """What every stage of one start shares."""

    recipe: Recipe
    run_dir: Path
    recipe_dir: Path
    world: World
    say: Say
    console: Console | None
    place: str = ""

    def context(self, name: str, options: Any, folder: Path, facts: dict[str, Any] | None = None) -> StageContext:
        """What a stage, or a cell of its grid, gets to work with."""
        return StageContext(
            self.recipe, name, options, folder, self.run_dir, self.recipe_dir, self.world, self.say, self.console,
            {} if facts is None else facts, self.place,
        )  # fmt: skip


def _run_stage(name: str, key: str, run: _Run) -> None:
    folder, options = StageFolder(run.run_dir / name), run.recipe.stages[name]
    if options.grid:
        with _recorded(folder, key, options, run.world):
            _run_grid(name, folder.path, run)
        return
    _perform(name, options, folder, key, run)


def _perform(name: str, options: Any, folder: StageFolder, key: str, run: _Run) -> None:
    with _recorded(folder, key, options, run.world) as facts:
        STAGES.implementation(options.kind)(run.context(name, options, folder.path, facts)).run()


@contextmanager
def _recorded(folder: StageFolder, key: str, options: Any, world: World) -> Iterator[dict[str, Any]]:
    if world.rank:
        yield {}
        return
    folder.start(key, options.model_dump(mode="json", by_alias=True))
    began = time.monotonic()
    facts: dict[str, Any] = {}
    try:
        yield facts
    except BaseException as error:
        status = "preempted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
        with held():
            folder.end(status, time.monotonic() - began, **facts)
        raise
    folder.end("finished", time.monotonic() - began, **facts)


def grid_cells(options: Any) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """``(label, settings, options)`` of every cell of a stage's grid; a setting that does not exist is an error."""
    base = options.model_dump(mode="json", by_alias=True)
    base["grid"] = {}
    for values in itertools.product(*options.grid.values()):
        settings = dict(zip(options.grid, values, strict=True))
        cell = json.loads(json.dumps(base))
        for path, value in settings.items():
            _assign(cell, path, value)
        try:
            validated = STAGES.options(options.kind).model_validate(cell)
        except ValidationError as error:
            raise RecipeError([f"grid {settings}: {line}" for line in complaints(error, STAGES.options(options.kind), cell)]) from error
        yield (
            ",".join(f"{path.rsplit('.', 1)[-1]}={value}" for path, value in settings.items()).replace("/", "_"),
            settings,
            validated,
        )


def _assign(tree: Any, path: str, value: Any) -> None:
    words = path.split(".")
    for i, word in enumerate(words):
        known: dict[Any, Any] = dict(enumerate(tree)) if isinstance(tree, list) else tree if isinstance(tree, dict) else {}
        step: Any = int(word) if isinstance(tree, list) and word.isdigit() else word
        if step not in known:
            hint = did_you_mean(word, map(str, known)) or f"; known here: {', '.join(map(str, known))}"
            raise RecipeError([f"grid.{path}: no setting {'.'.join(words[: i + 1])!r}{hint}"])
        if i == len(words) - 1:
            tree[step] = value
        else:
            tree = tree[step]


def _run_grid(name: str, folder: Path, run: _Run) -> None:
    rows = []
    cells = list(grid_cells(run.recipe.stages[name]))
    keys = [digest(options.model_dump(mode="json", by_alias=True)) for _, _, options in cells]
    done = [StageFolder(folder / "grid" / label).finished(key) for (label, _, _), key in zip(cells, keys, strict=True)]
    run.world.barrier()
    for number, ((label, settings, options), key, finished) in enumerate(zip(cells, keys, done, strict=True), 1):
        run.say(f"  cell {number}/{len(cells)}: {label}{' (done before, skipped)' if finished else ''}")
        cell = StageFolder(folder / "grid" / label)
        if not finished:
            _perform(name, options, cell, key, replace(run, place=f"{run.place}, cell {number} of {len(cells)}"))
            run.world.barrier()
        record = cell.record or {}
        rows.append({**settings, **{k: v for k, v in record.get("result", {}).items() if isinstance(v, int | float | str)}})
    if run.world.rank == 0:
        write_json(folder / "grid.json", rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = [columns, *[[_cell(row.get(column)) for column in columns] for row in rows]]
    widths = [max(len(str(line[i])) for line in table) for i in range(len(columns))]
    for line in table:
        run.say("  " + "  ".join(str(item).rjust(width) for item, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else str(value)


def stage_key(recipe: Recipe, name: str, recipe_dir: Path) -> str:
    """The key of a stage: what its artefact depends on."""
    options = recipe.stages[name]
    resolved = options.model_dump(mode="json", by_alias=True)
    for cosmetic in COSMETIC & set(resolved.get("loop", {})):
        del resolved["loop"][cosmetic]
    files = {}
    for source in _sources(options):
        files[source] = _listing(Path(resolve_source(source, recipe_dir)))
    # What is not there, or on the hub, is told by its name among the options.
    files |= {place: found for place, folder in _adapter_folders(options, recipe_dir) if (found := _listing(folder))}
    for teacher in _teachers(getattr(options, "teacher", None)):
        # A store that is a cache grows by being used; one that is only read must stay what it was.
        if isinstance(signals := getattr(teacher, "signals", None), str) and teacher.teacher is None:
            files[signals] = _listing((recipe_dir / signals).resolve())
    data = getattr(options, "data", None)
    if isinstance(data, DataOptions):
        files["data"] = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in input_files(data, recipe_dir)}
    if options.kind in CONDITION_STAGES:
        files["sources"] = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in _condition_files(options, recipe_dir)}
    return digest([resolved, {other: stage_key(recipe, other, recipe_dir) for _, other in references(options)}, files])


def _condition_files(options: Any, recipe_dir: Path) -> list[Path]:
    """Every local file that conditions are made of."""
    from limbeck.data.conditions import build as conditions
    from limbeck.data.trajectories import build as trajectories

    made = conditions if options.kind == "prepare_conditions" else trajectories
    return made.input_files(options, recipe_dir)


def _sources(options: Any) -> list[str]:
    local = [teacher.model for teacher in _teachers(getattr(options, "teacher", None)) if teacher.kind == "local"]
    named = [getattr(getattr(options, "student", None), "base", None), *local]
    return [source for source in named if isinstance(source, str)]


def _adapter_folders(options: Any, recipe_dir: Path) -> Iterator[tuple[str, Path]]:
    """Folders that only the stages of adapters read: bases (a built-in one is part of the version), PEFT folders, sentence encoders."""
    base = getattr(options, "base", None)
    surgeries = getattr(getattr(options, "student", None), "surgery", ())
    named = [base, *(getattr(surgery, field, None) for surgery in surgeries for field in ("start", "encoder"))]
    yield from ((place, Path(resolve_source(place, recipe_dir))) for place in named if isinstance(place, str) and not place.startswith("builtin:"))
    for owner in (options, getattr(options, "teacher", None)):
        pool = getattr(owner, "pool", None)
        yield from ((place, recipe_dir / Path(place).expanduser()) for place in (pool.values() if isinstance(pool, dict) else ()))


def _teachers(options: Any) -> Iterator[Any]:
    """A teacher's options and those of the teachers in it."""
    if options is not None:
        yield options
        for inner in [getattr(options, "teacher", None), *getattr(options, "teachers", {}).values()]:
            yield from _teachers(inner)


def _listing(path: Path) -> dict[str, Any]:
    """What a model folder holds: small files by content (a fresh copy is the same model), large ones by size and time."""
    if not path.is_dir():
        return {}
    found: dict[str, Any] = {}
    for file in sorted(path.iterdir()):
        if file.suffix in (".json", ".safetensors"):
            facts = file.stat()
            large = facts.st_size > HASHED_WHOLE
            found[file.name] = [facts.st_size, facts.st_mtime_ns] if large else hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _set_aside(recipe: Recipe, run_dir: Path, recipe_dir: Path, chosen: list[str], keys: dict[str, str], fresh: bool, say: Say) -> None:
    """Say which stages are stale and why, and rename what they left, before anything starts."""
    for name in chosen:
        folder = StageFolder(run_dir / name)
        # With --fresh nothing of it is read: it is the way out of a damaged one.
        record = {} if fresh and (folder.path / "stage.json").exists() else folder.record
        if record is None:
            continue
        if fresh:
            say(f"{name}: --fresh; what was there is kept as {_aside(folder, recipe.stages[name], recipe_dir)}/")
        elif record["key"] != keys[name]:
            changes = changed_fields(record["options"], recipe.stages[name].model_dump(mode="json", by_alias=True))
            reason = "; ".join(changes[:4]) + (f"; and {len(changes) - 4} more" if len(changes) > 4 else "")
            say(
                f"{name}: stale ({reason or 'a stage or file it reads has changed'}); what was there is kept as "
                f"{_aside(folder, recipe.stages[name], recipe_dir)}/"
            )


def _aside(folder: StageFolder, options: Any, recipe_dir: Path) -> str:
    """Rename a stage's folder, with its checkpoints in it wherever they lay; returns the new name."""
    aside = folder.set_aside()
    place = getattr(getattr(options, "loop", None), "checkpoints", None)
    if place is not None:
        there = recipe_dir / place
        for checkpoint in [*saved_steps(there).values(), *([there / FINAL] if (there / FINAL).exists() else [])]:
            # To another disk this copies: a stage that begins anew must not find another's steps.
            (aside / "checkpoints").mkdir(exist_ok=True)
            shutil.move(checkpoint, aside / "checkpoints" / checkpoint.name)
    return aside.name


def _record_start(recipe: Recipe, run_dir: Path, recipe_dir: Path, device: torch.device) -> None:
    write_json(run_dir / "recipe.json", recipe.model_dump(mode="json", by_alias=True))
    where = {"recipe_dir": str(recipe_dir.resolve()), "recipe_sha256": sha256(run_dir / "recipe.json")}
    write_json(run_dir / "environment.json", {**surroundings(device), **where})


def load_plugins_of(path: str | Path) -> None:
    """Load the plug-ins of the run that a stage, or the model folder of one, belongs to; any other place is left alone."""
    folder = Path(path).resolve()
    stage = next((place for place in (folder, folder.parent) if (place / "stage.json").exists()), None)
    if stage is not None and (stage.parent / "recipe.json").exists() and read_object(stage.parent / "recipe.json").get("plugins"):
        open_stage(stage)


def open_stage(path: Path) -> StageContext:
    """A train stage of a run that was made before, for the verbs that take one."""
    run_dir = path.parent
    try:
        environment, tree = read_object(run_dir / "environment.json", recipe_dir=str), read_object(run_dir / "recipe.json")
        if environment.get("recipe_sha256") not in (None, sha256(run_dir / "recipe.json")):
            raise RunError(f"{run_dir / 'recipe.json'}: is not what the last start wrote: run the recipe again, which writes it anew")
        recipe_dir = Path(environment["recipe_dir"])
        for plugin in tree.get("plugins", ()):
            if (recipe_dir / plugin).resolve().is_relative_to(run_dir.resolve()):
                raise RunError(f"{run_dir}: its recipe names a plug-in inside the run directory ({plugin}), where a stranger could have put it: move it out")
            load_plugin(plugin, recipe_dir)
        recipe = Recipe.model_validate(tree)
    except (ValidationError, LimbeckError, KeyError, TypeError, OSError) as error:
        why = complaints(error, Recipe, tree)[0] if isinstance(error, ValidationError) else error
        raise RunError(f"{run_dir}: not a run directory that this version can read ({why}): name one that `limbeck run` made, or run it again") from error
    if path.name not in recipe.stages:
        raise RunError(f"{path}: the recipe of this run has no stage {path.name!r}; stages: {', '.join(recipe.stages)}")
    return StageContext(recipe, path.name, recipe.stages[path.name], path, run_dir, recipe_dir, World(torch.device("cpu")))
