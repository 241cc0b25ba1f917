"""Limbeck in Python: one function for each verb of the command line, which is a thin front of them.

``import limbeck`` offers all of these under its own name (``limbeck.run``), and importing it loads nothing heavy: a function imports what it
needs when it is called.  They return values and print nothing, unless they are given ``say=print``; what a user can mend is a
:class:`~limbeck.errors.LimbeckError`.  A recipe is a file, the name of a shipped one, or what :func:`load` returns; ``key=value`` words
after it change it, as on the command line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    from rich.console import Console

    from limbeck.adapters.folders import merge_adapters as merge_adapters
    from limbeck.adapters.folders import retrieve_adapters as retrieve_adapters
    from limbeck.adapters.folders import show_adapters as show_adapters
    from limbeck.config.explain import explain as explain
    from limbeck.config.explain import json_schema
    from limbeck.config.recipe import Recipe
    from limbeck.config.slurm import Job as Job
    from limbeck.config.slurm import slurm_script as slurm_script
    from limbeck.config.template import template as template
    from limbeck.diagnosis import doctor as doctor
    from limbeck.diagnosis import try_teacher as try_teacher
    from limbeck.planner.report import Plan
    from limbeck.report.compare import Comparison
    from limbeck.report.html import write_report as write_report
    from limbeck.report.run import Run
    from limbeck.report.run import read_run as read_run
    from limbeck.stages.servers import serving as serving
    from limbeck.stages.servers import teaching as teaching
    from limbeck.teachers.store.store import SignalStore
    from limbeck.ternary import DistillTernary as DistillTernary

    schema = json_schema

AnyPath = str | PathLike[str]
Say = Callable[[Any], None]
"""Takes a line of text, or a rich table."""

_ELSEWHERE = {
    "DistillTernary": "limbeck.ternary:DistillTernary",
    "Job": "limbeck.config.slurm:Job",
    "doctor": "limbeck.diagnosis:doctor",
    "explain": "limbeck.config.explain:explain",
    "merge_adapters": "limbeck.adapters.folders:merge_adapters",
    "read_run": "limbeck.report.run:read_run",
    "retrieve_adapters": "limbeck.adapters.folders:retrieve_adapters",
    "schema": "limbeck.config.explain:json_schema",
    "serving": "limbeck.stages.servers:serving",
    "show_adapters": "limbeck.adapters.folders:show_adapters",
    "slurm_script": "limbeck.config.slurm:slurm_script",
    "teaching": "limbeck.stages.servers:teaching",
    "template": "limbeck.config.template:template",
    "try_teacher": "limbeck.diagnosis:try_teacher",
    "write_report": "limbeck.report.html:write_report",
}
"""What stands in the room that it belongs to, imported when it is asked for."""
NAMES = (
    "check", "compare", "continuations", "evaluate", "evaluate_tasks", "export_model", "from_seed", "generate", "lm_eval", "load", "ls", "plan",
    "prepare", "quickstart", "run", "run_candidate", "signals", *_ELSEWHERE,
)  # fmt: skip
"""Everything that ``limbeck`` offers under its own name."""


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _ELSEWHERE[name].partition(":")
    return getattr(import_module(module), attribute)


def _silent(_: Any) -> None:
    """What is said without ``say``."""


def load(recipe: AnyPath | Recipe, *overrides: str) -> Recipe:
    """Read a recipe file, or a shipped recipe by its name, with changes; nothing is run, torch is not loaded.

    ``recipe = limbeck.load("hybrid", "distil.loop.tokens=200k")``; its stages are ``recipe.stages["distil"]``.

    Raises:
        RecipeError: every problem at once (``error.problems``), each with ``file:line:col``.
    """
    from limbeck.config.load import load_recipe, load_text, resolved
    from limbeck.config.recipe import Recipe

    if not isinstance(recipe, Recipe):
        return load_recipe(str(recipe), overrides)
    if not overrides:
        return recipe
    import json

    changed = load_text(json.dumps(resolved(recipe)), overrides, label=recipe.name, base_dir=recipe.folder)
    changed.__dict__["folder"] = recipe.folder
    return changed


def check(recipe: AnyPath | Recipe, *overrides: str) -> tuple[str, list[str]]:
    """What a recipe would do, in words, and a line for each thing that could not be checked from here.

    ``summary, unchecked = limbeck.check("hybrid", "align.loop.tokens=1M")``

    Raises:
        RecipeError: all that is wrong with it.
    """
    from limbeck.config.native import native_exports
    from limbeck.config.summary import summarise
    from limbeck.config.trackers import check_trackers

    loaded = load(recipe, *overrides)
    check_trackers(loaded)
    notes: list[str] = []
    if native_exports(loaded):
        # Reads the teacher's config, by transformers: seconds that other recipes need not pay.
        from limbeck.stages.native import check_native_teachers

        notes = check_native_teachers(loaded, loaded.folder)
    return summarise(loaded), notes


def plan(
    what: AnyPath | Recipe,
    *overrides: str,
    device: str = "h100",
    gpus: int = 1,
    memory: str | None = None,
    peak: float | None = None,
    bandwidth: float | None = None,
    usable: float = 0.9,
    mfu: float = 0.4,
    tp: int | None = None,
    ep: int | None = None,
    dtype: str | None = None,
    context: int | None = None,
    sequences: int = 1,
    tokens: str | None = None,
    teacher_rate: str | None = None,
    disk: str | None = None,
    config: Mapping[str, AnyPath] | None = None,
    stage: str | None = None,
) -> Plan:
    """Memory, time, wire and disk of a recipe or a model, on paper.  The options are those of ``limbeck plan``; torch is not loaded.

    ``limbeck.plan("hybrid", device="h100", gpus=8).fits``; ``.parts`` are its stages, ``.to_json()`` is all of it.  ``config`` gives the
    config.json of a model that is not known, by the name that the recipe has for it.

    Raises:
        PlanError: a device, size, model or option that there is not.
        RecipeError: all that is wrong with the recipe.
    """
    from limbeck.planner.machine import machine_of
    from limbeck.planner.plan import plan_of
    from limbeck.planner.sources import config_file

    machine = machine_of(
        device, gpus, memory=memory, peak=peak, bandwidth=bandwidth, usable=usable, mfu=mfu, tp=tp, ep=ep, dtype=dtype, context=context,
        sequences=sequences, tokens=tokens, teacher_rate=teacher_rate, disk=disk,
    )  # fmt: skip
    given = {name: config_file(Path(file)) for name, file in (config or {}).items()}
    if isinstance(what, str | PathLike):
        return plan_of(str(what), overrides, machine, given, stage)
    return plan_of(load(what, *overrides), (), machine, given, stage)


def run(
    recipe: AnyPath | Recipe,
    *overrides: str,
    run_dir: AnyPath | None = None,
    stage: str | None = None,
    fresh: bool = False,
    device: str | None = None,
    say: Say | None = None,
    console: Console | None = None,
) -> Run:
    """Do what a recipe says and is not done yet; the same call goes on where it stopped.

    ``run = limbeck.run("hybrid", "distil.loop.tokens=200k", run_dir="runs/first")`` gives what the run directory says:
    ``run["distil"].metrics`` (rows of metrics.jsonl), ``run.evaluated.evaluation``, ``run.path``.

    ``run_dir`` is ``runs/NAME`` by default.  ``stage`` runs that stage alone, ``fresh`` sets aside what is there.  ``device`` is a GPU by default
    if there is one.  ``console`` shows training as it goes.

    Raises:
        LimbeckError: what the recipe, a file, the machine or the run itself lacks.
        KeyboardInterrupt: Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP (in the main thread), after a checkpoint was written.
    """
    loaded = _to_run(recipe, overrides, say)
    from limbeck.report.run import read_run
    from limbeck.stages.run import run_recipe

    where = None if run_dir is None else Path(run_dir)
    return read_run(
        run_recipe(
            loaded,
            recipe_dir=loaded.folder,
            run_dir=where,
            stage=stage,
            fresh=fresh,
            say=say or _silent,
            console=console,
            device=device,
        )
    )


def run_candidate(
    recipe: AnyPath | Recipe,
    candidate: int,
    *overrides: str,
    run_dir: AnyPath | None = None,
    stage: str | None = None,
    say: Say | None = None,
) -> None:
    """One layer as a candidate of a rank_layers stage, on its own: beside others, or on another machine (``limbeck explain rank_layers``).

    ``limbeck.run_candidate("hybrid_select", 3, run_dir="runs/select")``; :func:`run` puts candidates together.

    Raises:
        LimbeckError: no such stage or layer, or inputs that are not finished.
    """
    loaded = _to_run(recipe, overrides, say)
    from limbeck.stages.candidate import run_candidate as alone

    alone(
        loaded,
        candidate,
        recipe_dir=loaded.folder,
        run_dir=None if run_dir is None else Path(run_dir),
        stage=stage,
        say=say or _silent,
    )


def _to_run(recipe: AnyPath | Recipe, overrides: Sequence[str], say: Say | None) -> Recipe:
    """A recipe, with what only a start checks."""
    loaded = load(recipe, *overrides)
    from limbeck.stages.native import check_native_teachers

    for note in check_native_teachers(loaded, loaded.folder):
        (say or _silent)(f"not checked: {note}")
    return loaded


def prepare(recipe: AnyPath | Recipe, *overrides: str, run_dir: AnyPath | None = None, say: Say | None = None) -> Path:
    """Prepare a recipe's text (read, filter, tokenise, pack): no model, no GPU.  Returns the run directory.

    ``limbeck.prepare("hybrid", run_dir="runs/first")``

    Raises:
        LimbeckError: text or a tokenizer that is missing or does not fit.
    """
    loaded = load(recipe, *overrides)
    from limbeck.stages.run import prepare_recipe

    return prepare_recipe(
        loaded, recipe_dir=loaded.folder, run_dir=None if run_dir is None else Path(run_dir), say=say or _silent
    )


def quickstart(
    directory: AnyPath = "runs/quickstart",
    *,
    train_teacher: bool = False,
    quick: bool = False,
    say: Say | None = None,
    console: Console | None = None,
) -> Run:
    """A real distillation on this machine, without downloads; ``train_teacher`` makes the teacher too, ``quick`` is a form of seconds.

    ``limbeck.quickstart("runs/quickstart", say=print)``

    Raises:
        LimbeckError: no room, or a folder that cannot be written to.
    """
    from limbeck.report.run import read_run
    from limbeck.stages.quickstart import quickstart as distil

    return read_run(
        distil(directory=Path(directory), train_teacher=train_teacher, quick=quick, say=say or _silent, console=console)
    )


def compare(*runs: AnyPath, out: AnyPath | None = None, by: str = "tokens") -> Comparison:
    """Runs, stages (RUN/STAGE) or cells of grids side by side; ``out`` is where a page of it goes, ``by`` what its curves run over.

    ``limbeck.compare("runs/a", "runs/b", out="compare.html").differences`` are the settings that differ.

    Raises:
        LimbeckError: fewer than two things, one that is no run, or a page that cannot be written.
    """
    from limbeck.report.compare import compare as compared
    from limbeck.report.compare_page import check_axis, write_comparison
    from limbeck.report.entries import read_entries

    check_axis(by)
    comparison = compared(read_entries([Path(run) for run in runs]))
    if out is not None:
        write_comparison(comparison, Path(out), axis=by)
    return comparison


def evaluate(
    path: AnyPath,
    *,
    against: str | None = None,
    data: str | None = None,
    recall_vocabulary: int | None = None,
    say: Say | None = None,
) -> dict[str, Any]:
    """Perplexity, divergence, recall, speed and samples of a model beside its teacher.

    ``limbeck.evaluate("runs/hybrid/distil")["perplexity"]``

    ``path`` is RUN/STAGE or a model folder; ``against`` its base by default; ``data`` text (a file, folder or glob), by default what the run
    held out.  ``recall_vocabulary`` is the number of ids that recall probes use, if the model learnt recall on so many.

    Raises:
        LimbeckError: no model there, or one that does not fit what it stands beside.
    """
    from limbeck.stages.evaluate import evaluate_path

    return evaluate_path(Path(path), against=against, data=data, recall_vocabulary=recall_vocabulary, say=say or _silent)


def evaluate_tasks(
    path: AnyPath,
    tasks: Sequence[str],
    *,
    include: Sequence[AnyPath] = (),
    against: str | None = None,
    fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | Literal["auto"] = 8,
    max_length: int | None = None,
    chat_template: bool = False,
    dtype: str = "float32",
    condition: Sequence[str] = (),
    condition_files: Sequence[AnyPath] = (),
    named: str | None = None,
    out: AnyPath | None = None,
    say: Say | None = None,
) -> dict[str, Any]:
    """Tasks of lm-evaluation-harness (names, or files) on a model, and before it on ``against`` if one is named.

    ``limbeck.evaluate_tasks("runs/hybrid/distil", ["arc_easy", "mytasks/foo.yaml"], limit=100)["tasks"]``

    ``condition``, ``condition_files`` and ``named`` are what a LoRA generator reads.  The result is written to ``out`` (by default the stage's
    evaluation/) as lm_eval.json, whose form :mod:`limbeck.stages.harness` describes.

    Raises:
        LimbeckError: the harness is not installed, or no such task, model or condition.
    """
    who = "`limbeck evaluate --tasks`"
    _need_harness(who)
    try:
        from limbeck.stages.generate import Reads, texts_of
        from limbeck.stages.harness import HarnessSettings
        from limbeck.stages.harness import evaluate_tasks as on_tasks
    except ModuleNotFoundError as error:
        raise LimbeckError(
            f"{who}: lm_eval needs {error.name}, which is not installed: pip install 'limbeck[lm-eval]'"
        ) from error
    settings = HarnessSettings(
        limit=limit, fewshot=fewshot, chat_template=chat_template, batch_size=batch_size, max_length=max_length, dtype=dtype
    )
    reads = Reads([*condition, *texts_of([Path(file) for file in condition_files])], named)
    where = None if out is None else Path(out)
    return on_tasks(
        str(path),
        tasks,
        settings,
        include=[Path(folder) for folder in include],
        against=against,
        reads=reads,
        out=where,
        say=say or _silent,
    )


def lm_eval(*words: str) -> None:
    """lm-evaluation-harness's own command line, whose ``--model hf`` opens students; it prints what it prints.

    ``limbeck.lm_eval("--model", "hf", "--model_args", "pretrained=runs/hybrid/distil/model", "--tasks", "arc_easy")``

    Raises:
        LimbeckError: the harness, or something that it needs, is not installed.
    """
    import sys

    who = "`limbeck lm_eval`"
    _need_harness(who)
    before, sys.argv = sys.argv, ["lm_eval", *words]
    try:
        # `import limbeck` has registered the model type.
        cli_evaluate = import_module("lm_eval.__main__").cli_evaluate
        cli_evaluate()
    except ModuleNotFoundError as error:
        raise LimbeckError(
            f"{who}: the harness needs {error.name} for this, which is not installed: pip install {error.name}"
        ) from error
    finally:
        sys.argv = before


def _need_harness(who: str) -> None:
    from limbeck.packages import need

    need(who, "lm-eval", "lm_eval", "accelerate", "datasets")


def generate(
    path: AnyPath,
    prompt: str = "",
    *,
    tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    condition: Sequence[str] = (),
    condition_files: Sequence[AnyPath] = (),
    named: str | None = None,
) -> str:
    """What a model writes after a prompt: RUN/STAGE, a model folder, or ``builtin:NAME``; temperature 0 is greedy.

    ``limbeck.generate("runs/hybrid/distil", "def main(", tokens=64)``

    A LoRA generator reads ``condition`` (texts), ``condition_files`` or its own data's condition ``named`` first, and by default the prompt.
    """
    (pieces,) = continuations(
        path,
        prompt,
        tokens=tokens,
        temperature=temperature,
        seed=seed,
        condition=condition,
        condition_files=condition_files,
        named=named,
    ).values()
    return "".join(pieces)


def continuations(
    path: AnyPath,
    prompt: str = "",
    *,
    tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    condition: Sequence[str] = (),
    condition_files: Sequence[AnyPath] = (),
    named: str | None = None,
    compare: bool = False,
) -> dict[str, Iterator[str]]:
    """:func:`generate` piece by piece as it is decoded, by who writes; ``compare`` adds the base without the generated LoRA.

    ``for piece in limbeck.continuations("runs/hybrid/distil", "def main(")["model"]: print(piece, end="")``

    Raises:
        RunError: nothing to go on from or to read, or what only a LoRA generator understands asked of a model.
    """
    from limbeck.stages.generate import Reads, texts_of
    from limbeck.stages.generate import continuations as found

    reads = Reads([*condition, *texts_of([Path(file) for file in condition_files])], named)
    return found(str(path), prompt, tokens=tokens, temperature=temperature, seed=seed, reads=reads, compare=compare)


def export_model(
    path: AnyPath,
    to: str | None = None,
    *,
    output: AnyPath | None = None,
    dtype: str | None = None,
    prompt: Sequence[str] = (),
    type: str = "auto",
    scale: str | None = None,
    group_size: int | None = None,
    verify: bool = False,
    force: bool = False,
    say: Say | None = None,
) -> Path:
    """A model folder (``to="hf"``, ``"native"``), a LoRA (``"peft"``) or a file for llama.cpp (``"gguf"``) that leaves the project.

    ``limbeck.export_model("runs/hybrid/distil", "hf", output="out")``; the options are those of ``limbeck export``.  Returns what was written.

    Raises:
        LimbeckError: no model there, a format that cannot hold it, or a place that is taken.
    """
    from pydantic import ValidationError

    from limbeck.config.messages import complaints
    from limbeck.config.parts.stages import GgufOptions
    from limbeck.errors import RunError

    options = {"type": type, "scale": scale, "group_size": group_size, "verify": verify, "force": force}
    try:
        gguf = GgufOptions.model_validate(options)
    except ValidationError as error:
        said = [
            re.sub(r"^(\w+):", lambda field: f"--{field[1].replace('_', '-')}:", line)
            for line in complaints(error, GgufOptions, options)
        ]
        raise RunError("; ".join(said)) from error
    from limbeck.stages.export import export_path

    place = None if output is None else Path(output)
    return export_path(str(path), to=to, output=place, dtype=dtype, prompts=prompt, gguf=gguf, say=say or _silent)


def signals(folder: AnyPath) -> SignalStore:
    """A folder of stored signals, open for reading: ``num_documents``, ``identity``, and ``verify()``, which reads every byte.

    ``limbeck.signals("runs/logit_kd_stored/capture/signals").num_documents``

    Raises:
        TeacherError: no signals there, or damaged ones.
    """
    from limbeck.teachers.store.store import SignalStore

    return SignalStore(Path(folder))


def from_seed(*files: AnyPath) -> tuple[str, list[str]]:
    """A recipe's text from configs of fla-org/hybrid-distillation, one a stage, and a line for each key without counterpart.

    ``text, notes = limbeck.from_seed("stage1.yaml", "stage2.yaml")``

    Raises:
        LimbeckError: files that are no such configs or do not belong together.
    """
    from limbeck.config.from_seed import from_seed as translate

    return translate([Path(file) for file in files])


def ls(kind: str | None = None) -> dict[str, dict[str, str]]:
    """What there is, plug-ins included: kind (recipes, mixers, teachers ...) -> name -> one line; all kinds by default.

    ``limbeck.ls("mixers")["mixers"]``

    Raises:
        LimbeckError: no such kind.
    """
    from limbeck.config.explain import kinds, known

    return {word: dict(known(word)) for word in ([kind] if kind is not None else kinds())}
