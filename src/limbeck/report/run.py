"""What a run directory says, read without models: nothing here is computed anew, and what is not there is left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from limbeck.engine.metrics import read_metrics
from limbeck.errors import CheckpointError, did_you_mean
from limbeck.evaluation.table import contexts, percent, point, recall_points, size
from limbeck.evaluation.table import tokens as token_count
from limbeck.files import inside
from limbeck.records import parse


@dataclass(frozen=True)
class Stage:
    """One stage: its ``stage.json``, its metrics, and its evaluation, ranking, grid, conditions or generator if it has one."""

    name: str
    record: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    grid: list[dict[str, Any]] | None = None
    ranking: dict[str, Any] | None = None
    adapters: dict[str, Any] | None = None
    """A LoRA generator beside its controls."""
    conditions: dict[str, Any] | None = None
    """The conditions that were prepared."""
    generator: dict[str, Any] | None = None
    """Options, spec and base of a trained generator (or predictor)."""
    agent: dict[str, Any] | None = None
    """A LoRA generator on agents' trajectories."""
    tasks: dict[str, Any] | None = None
    """Tasks of lm-evaluation-harness."""
    folder: Path | None = None
    """Where it lies."""

    @property
    def options(self) -> dict[str, Any]:
        """What the recipe said of it, defaults filled in."""
        return self.record.get("options") or {}

    @property
    def kind(self) -> str:
        """Kind of the stage."""
        return self.record.get("kind", "?")

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return max((row.get("tokens", 0) for row in self.metrics), default=0)


@dataclass(frozen=True)
class Run:
    """A run directory."""

    path: Path
    recipe: dict[str, Any]
    environment: dict[str, Any]
    stages: list[Stage]

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.recipe.get("name", self.path.name)

    @property
    def evaluated(self) -> Stage | None:
        """The last evaluation: what the headline is about."""
        return next((stage for stage in reversed(self.stages) if stage.evaluation), None)

    def stage(self, name: str) -> Stage | None:
        """A stage by its name."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def __getitem__(self, name: str) -> Stage:
        """A stage that was started, by its name; :class:`~limbeck.errors.CheckpointError` names those that were."""
        stage = self.stage(name)
        if stage is None:
            started = [stage.name for stage in self.stages]
            hint = did_you_mean(name, started) or ";"
            raise CheckpointError(f"{self.path}: no stage {name!r} was started in this run{hint} there are: {', '.join(started) or 'none'}")
        return stage

    def __fspath__(self) -> str:
        """The run's folder: a run may be given wherever its path may."""
        return str(self.path)


def read_run(path: str | PathLike[str]) -> Run:
    """Read a run directory; stages in the recipe's order, those of earlier recipes left out.

    ``limbeck.read_run("runs/hybrid")["distil"].metrics``

    Raises:
        CheckpointError: not a run directory, or a file in it that is damaged.
    """
    path = Path(path)
    recipe = _json(path / "recipe.json")
    if recipe is None:
        raise CheckpointError(f"{path}: not a run directory, it has no recipe.json; name a folder that `limbeck run` made")
    stages = []
    for name in recipe.get("stages", {}):
        folder = inside(path, name)
        if folder is None:
            raise CheckpointError(f"{path / 'recipe.json'}: a stage is called {name!r:.80}, which leads out of the run: this is no recipe of `limbeck run`")
        stage = read_stage(folder, name)
        if stage is not None:
            stages.append(stage)
    return Run(path, recipe, _json(path / "environment.json") or {}, stages)


def read_stage(folder: Path, name: str) -> Stage | None:
    """One stage, or a cell of its grid; None where none was started."""
    record = _json(folder / "stage.json")
    if record is None:
        return None
    return Stage(
        name,
        record,
        read_metrics(folder / "metrics.jsonl"),
        _json(folder / "evaluation" / "evaluation.json"),
        _json(folder / "grid.json"),
        _json(folder / "ranking" / "ranking.json"),
        _json(folder / "evaluation" / "adapters.json"),
        _json(folder / "conditions" / "conditions.json"),
        _json(folder / "model" / "generator.json"),
        _json(folder / "evaluation" / "agent.json"),
        _json(folder / "evaluation" / "lm_eval.json"),
        folder,
    )


def _json(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return parse(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); set it aside and start its stage again") from error


def became(results: dict[str, Any]) -> str:
    """What the student is, in a sentence: its family, which layers changed and into what."""
    facts = results["models"][results["student"]]
    layers = facts["layers"]
    kept = [i for i, kind in enumerate(layers) if kind == "softmax"]
    mixers = sorted({kind for kind in layers if kind != "softmax"})
    if not mixers:
        return f"A {facts['model_type']} model with softmax attention in all of its {len(layers)} layers."
    replaced = f"{len(layers) - len(kept)} of the {len(layers)} attention layers of a {facts['model_type']} model"
    changed = f"{replaced} became {' and '.join(mixers)}"
    if not kept:
        return f"{changed}; none stays softmax."
    named = ", ".join(map(str, kept)) if len(kept) <= 12 else f"{len(kept)} layers"
    return f"{changed}; softmax stays in layer{'s' if len(kept) > 1 else ''} {named}."


def key_numbers(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """``(label, number, explanation)`` of an evaluation: what the student costs and what it saves, as far as measured."""
    student, teacher = results["student"], results["teacher"]
    tiles: list[tuple[str, str, str]] = []
    text, against = results.get("perplexity", {}), results.get("divergence", {}).get(student)
    if against and teacher in text:
        note = f"perplexity {_short(text[teacher]['perplexity'])} → {_short(text[student]['perplexity'])}"
        start = results["divergence"].get("copy_init")
        if start and student != "copy_init" and start["ce_gap"] > 0:
            note += f"; {percent(1 - against['ce_gap'] / start['ce_gap'])} of copy_init's gap closed"
        tiles.append(("cross-entropy gap", f"{against['ce_gap']:+.3f}", f"nats a token; {note}"))
        tiles.append(("KL divergence", f"{against['kl']:.3f}", "nats a token, from the teacher"))
        tiles.append(("top-1 agreement", percent(against["agreement"]), f"on {against['tokens']:,} held-out tokens"))
    elif student in text:
        tiles.append(("perplexity", _short(text[student]["perplexity"]), f"on {text[student]['tokens']:,} held-out tokens"))
    if recall_points(results):
        far = max(distance for _, distance in recall_points(results))
        note = f"{far} tokens back, mean of tasks"
        if teacher in results["recall"]:
            note += f"; teacher {percent(mean_recall(results, teacher, far))}"
        tiles.append(("recall", percent(mean_recall(results, student, far)), note))
    for measure, key, label, form in (
        ("cache", "bytes", "KV + state", size),
        ("speed", "tokens_per_second", "decode rate", lambda rate: f"{rate:.3g} tokens/s"),
    ):
        if teacher is not None and student != teacher and contexts(results, measure):
            far = contexts(results, measure)[-1]
            ours, theirs = (point(results, measure, name, far, key) for name in (student, teacher))
            if ours is not None and theirs:
                tiles.append((label, f"{ours / theirs:.2f}×", f"at {token_count(far)} tokens: {form(theirs)} → {form(ours)}"))
    return tiles


def mean_recall(results: dict[str, Any], name: str, distance: int) -> float:
    """Accuracy at one distance, the mean over tasks."""
    found = [entry["accuracy"] for entry in results["recall"][name] if entry["distance"] == distance]
    return sum(found) / len(found)


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
