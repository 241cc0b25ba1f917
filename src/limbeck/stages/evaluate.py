"""The evaluate stage, and `limbeck evaluate` on a run or a model folder: students beside their teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from limbeck.config.base import From
from limbeck.config.parts.sources import StdlibSourceOptions
from limbeck.config.parts.stages import DataOptions, EvaluateStageOptions, RecallOptions
from limbeck.config.parts.surgeries import SURGERIES
from limbeck.data.dataset import TokenRows
from limbeck.engine.parallel import World
from limbeck.errors import RunError
from limbeck.evaluation.evaluate import evaluate_models
from limbeck.models.limbeck_model import wrap_student
from limbeck.models.loading import load_model, load_tokenizer, resolve_source
from limbeck.models.vocabulary import check_vocabulary
from limbeck.stages.context import Say, StageContext
from limbeck.stages.folder import model_of, read_json, write_json
from limbeck.stages.run import load_plugins_of, open_stage
from limbeck.stages.train import trained_model


class EvaluateStage:
    """Writes ``evaluation/evaluation.json``."""

    def __init__(self, context: StageContext):
        self.context = context
        self.options: EvaluateStageOptions = context.options

    def run(self) -> None:
        """Measure every named model on the same held-out rows and probes; each rank takes its share of them."""
        data = self.options.data
        trained: Any = self.context.stage_options(self.options.from_)
        folder, chosen = self.context.data(trained.data)
        if data is not None:
            folder, chosen = self.context.data(data)
        self.context.check_unseen(self.options.from_, folder)
        self._run(folder, chosen)

    def _run(self, data_folder: Path, data: DataOptions) -> None:
        context, options = self.context, self.options
        folder = trained_model(context, options.from_)
        trained: Any = context.stage_options(options.from_)
        if not data.held_out:
            raise RunError(
                f"stage '{context.name}': the data hold no documents out (held_out: 0), so there is nothing to evaluate on; set data.held_out"
            )
        models: dict[str, Any] = {}
        teacher: str | None = None
        for name in options.against:
            if name == "teacher":
                models[name], teacher = load_model(_teacher_source(context, trained, folder)), name
            elif name == "copy_init":
                models[name] = copy_initialised(folder, options.seed)
            else:
                models[name] = load_model(str(trained_model(context, name)))
        models[options.from_] = load_model(str(folder))
        context.facts["result"] = _measure(models, data_folder, _probing(options, data), teacher, context)["summary"]


def _teacher_source(context: StageContext, trained: Any, folder: Path) -> str:
    if trained.teacher is not None and hasattr(trained.teacher, "model"):
        return context.locate(trained.teacher.model)
    return base_of(folder)


def _origin(folder: Path) -> dict[str, Any]:
    """What a saved student remembers of its making: ``surgery`` and ``base``."""
    record = read_json(folder / "config.json").get("limbeck")
    if not record:
        raise RunError(
            f"{folder}: not made by a surgery, so it has no base to stand beside: leave `teacher` and `copy_init` out of `against`"
        )
    return record


def base_of(folder: Path) -> str:
    """The base that a saved student was made from."""
    return resolve_source(_origin(folder)["base"]["source"])


def copy_initialised(folder: Path, seed: int) -> Any:
    """The student as its surgery made it, before any training."""
    record = _origin(folder)
    surgery: list[Any] = [SURGERIES.options(options["kind"]).model_validate(options) for options in record["surgery"]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return wrap_student(load_model(base_of(folder)), surgery, record["base"])


def _probing(options: EvaluateStageOptions, data: DataOptions) -> EvaluateStageOptions:
    return options if options.recall is None else options.model_copy(update={"recall": recall_probes(options.recall, data)})


def recall_probes(recall: RecallOptions, data: DataOptions) -> RecallOptions:
    """Probes in the ids of the recall documents that the data hold, where the recipe names no others."""
    if recall.vocabulary is not None:
        return recall
    known = [source.vocabulary for source in data.source if source.kind == "recall" and source.vocabulary is not None]
    return recall.model_copy(update={"vocabulary": min(known)}) if known else recall


def _measure(
    models: dict[str, Any], data_folder: Path, options: EvaluateStageOptions, teacher: str | None, context: StageContext
) -> dict[str, Any]:
    tokenizer, world = load_tokenizer(str(data_folder / "tokenizer")), context.world
    for name, model in models.items():
        check_vocabulary(tokenizer, model, who=f"model '{name}'")
        model.requires_grad_(False).eval().to(world.device)
    results = evaluate_models(
        models, TokenRows(data_folder, "held_out"), options, tokenizer, teacher, progress=context.say, counting=context.counting, world=world
    )
    context.once(lambda: write_json(context.folder / "evaluation" / "evaluation.json", results))
    return results


def evaluate_path(
    path: Path, *, against: str | None = None, data: str | None = None, recall_vocabulary: int | None = None, say: Say = print
) -> dict[str, Any]:
    """Evaluate a model folder, or a train stage of a run, beside ``against`` (by default its base, where it has one).

    ``data`` is text (a file, folder or glob); by default the held-out text of the run, else the standard library.
    ``recall_vocabulary`` is the number of ids that recall probes use (:class:`RecallOptions`).
    """
    path = path.resolve()
    load_plugins_of(path)
    run_stage = path if (path / "stage.json").exists() else path.parent if (path.parent / "stage.json").exists() else None
    folder = model_of(path)
    if not (folder / "config.json").exists():
        there = "neither a model folder (no config.json) nor a finished train stage of a run" if path.exists() else "is not there"
        raise RunError(f"{path}: {there}: name RUN/STAGE of a train stage that has finished, or a model folder")
    options = EvaluateStageOptions.model_validate({"from": "model", "against": (), "recall": {"vocabulary": recall_vocabulary}})
    models: dict[str, Any] = {}
    teacher = None
    if against is None and (base := _base_or_none(folder)):
        against = base
    if against is not None:
        models["teacher"], teacher = load_model(resolve_source(against)), "teacher"
    models["model"] = load_model(str(folder))
    context, chosen = _evaluation_data(folder, run_stage, data, say)
    context.world = World(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    data_folder, prepared = context.data(chosen)
    return _measure(models, data_folder, _probing(options, prepared), teacher, context)


def _base_or_none(folder: Path) -> str | None:
    try:
        return base_of(folder)
    except RunError:
        return None


def _evaluation_data(folder: Path, run_stage: Path | None, data: str | None, say: Say) -> tuple[StageContext, DataOptions | From]:
    from limbeck.config.recipe import Recipe

    if run_stage is not None and data is None:
        context = open_stage(run_stage)
        context.say = say
        return context, context.options.data
    source: Any = {"kind": "text", "path": data} if data else StdlibSourceOptions()
    chosen = DataOptions.model_validate({"source": source, "tokenizer": str(folder), "held_out": 0.1 if data is None else 0.99})
    recipe = Recipe.model_construct(name="evaluate", stages={})
    out = Path("runs") / "evaluate" / folder.name
    return StageContext(recipe, "evaluate", None, out, out, Path.cwd(), World(torch.device("cpu")), say), chosen
