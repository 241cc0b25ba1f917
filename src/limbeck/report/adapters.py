"""What the evaluation of a LoRA generator says, for page and card: which columns are controls, what the headline is, what was trained on what."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from limbeck.evaluation.table import count as quantity
from limbeck.evaluation.table import percent
from limbeck.report.run import Run, Stage

BASE, TEACHER, MEAN, NEAREST, SHUFFLED = "base", "teacher", "mean adapter", "nearest adapter", ", shuffled"
"""Columns that `evaluate_adapters` writes; their modules load torch, and a page should not."""
SPLITS = {"held_out_slice": "held-out slices", "held_out_source": "held-out sources", "seen": "seen conditions"}
"""Splits in the order in which they are shown: what was never trained on comes first."""


@dataclass(frozen=True)
class Column:
    """One thing judged: its key in the file, a plain name, what it is, and whether the generator has to beat it."""

    key: str
    name: str
    meaning: str
    control: bool = False


@dataclass(frozen=True)
class Judgement:
    """One finished `evaluate_adapters` stage, with what its run knows about the generator judged."""

    run: Run
    stage: Stage

    @property
    def results(self) -> dict[str, Any]:
        """What `adapters.json` holds."""
        return self.stage.adapters or {}

    @property
    def generated(self) -> str:
        """The stage whose generator is judged."""
        return str(self.results["generated"])

    @property
    def generator(self) -> Stage | None:
        """That stage."""
        return self.run.stage(self.generated)

    @property
    def splits(self) -> list[str]:
        """Those judged, held-out ones first."""
        found = list(self.results["splits"])
        return sorted(found, key=lambda split: list(SPLITS).index(split) if split in SPLITS else len(SPLITS))

    @property
    def headline(self) -> str:
        """The split that the first numbers are about: held-out slices where there are any."""
        return self.splits[0]

    def split(self, name: str) -> dict[str, Any]:
        """Summary of a split."""
        found: dict[str, Any] = self.results["splits"][name]
        return found

    def rows(self, split: str) -> list[dict[str, Any]]:
        """Its conditions."""
        return [row for row in self.results["conditions"] if row["split"] == split]

    def gain(self, split: str) -> float:
        """What the conditions' own teachers gain over the base on average, nats a token."""
        losses = self.split(split)["nll"]
        return float(losses[BASE] - losses[TEACHER])

    def columns(self, split: str) -> list[Column]:
        """Columns of a split, best loss first; those without a number last."""
        losses = self.split(split)["nll"]
        return [self.column(key) for key in sorted(losses, key=lambda key: losses[key] if math.isfinite(losses[key]) else math.inf)]

    def column(self, key: str) -> Column:
        """A column in plain words.  Other generators that read their conditions are rivals; all other columns are controls."""
        fixed = {
            BASE: Column(key, "base, no adapter", "the frozen model as it is"),
            TEACHER: Column(key, "own teacher", "the LoRA trained on the condition itself: all of the gain, by definition"),
            MEAN: Column(key, "mean of the seen teachers", "one adapter for all conditions, the exact mean of the seen teachers' changes", True),
            NEAREST: Column(key, "nearest seen teacher", "the teacher of the other seen condition whose texts look most alike to the base", True),
        }
        if key in fixed:
            return fixed[key]
        if key == self.generated:
            return Column(key, f"generated: {key}", "what the judged generator writes after reading the condition")
        if key.endswith(SHUFFLED):
            name = key.removesuffix(SHUFFLED)
            return Column(
                key, f"wrong condition: {name}",
                "the same generator reading another condition's texts, of another source and format where there is one", name == self.generated,
            )  # fmt: skip
        predictor = key.partition(": ")[0]
        if key != predictor and predictor in (self.stage.options.get("predictors") or ()):
            return Column(key, f"retrieved: {key}", "seen teachers found by a predicted delta, never the condition's own; alone or merged", True)
        other = self.run.stage(key)
        options = options_of(other) if other else {}
        if not options:
            return Column(key, key, "an adapter of which this run has no record", True)
        if options["condition"] == "none":
            return Column(key, f"one LoRA for all: {key}", "a LoRA trained on all seen conditions together, which reads nothing", True)
        return Column(key, f"another generator: {key}", "a generator of this run, judged beside this one")

    def strongest(self, split: str) -> Column | None:
        """The control with the least loss."""
        losses = self.split(split)["nll"]
        return next((column for column in self.columns(split) if column.control and math.isfinite(losses[column.key])), None)


def judgements(run: Run) -> list[Judgement]:
    """Every finished evaluation of a generator."""
    return [Judgement(run, stage) for stage in run.stages if (stage.adapters or {}).get("splits")]


def unjudged(run: Run) -> list[Stage]:
    """Stages that trained a generator which reads conditions, in a run where nothing has been judged."""
    judged = judgements(run) or any(stage.agent for stage in run.stages)
    return [] if judged else [stage for stage in run.stages if options_of(stage) and options_of(stage)["condition"] != "none"]


def options_of(stage: Stage) -> dict[str, Any]:
    """The options of a trained LoRA generator; empty for other stages."""
    options: dict[str, Any] = (stage.generator or {}).get("options", {})
    return options if options.get("kind") == "lora_generator" else {}


def sentence(judged: Judgement) -> str:
    """What the generator does and what it was judged on."""
    *first, last = (counted(judged, split) for split in judged.splits)
    return f"{does(judged.generator)}; judged on {', '.join(first)}{' and ' * bool(first)}{last}."


def does(stage: Stage | None) -> str:
    """What a generator reads and writes, as far as its stage says."""
    record = (stage.generator if stage else None) or {}
    if "spec" not in record:
        return "A network that reads a task and writes a LoRA for a frozen base"
    spec = record["spec"]
    writes = f"a LoRA of rank {spec['rank']} for {sum(len(site['layers']) for site in spec['sites'])} Linears of a frozen base"
    if record["options"]["condition"] == "none":
        return f"One set of numbers, the same for every task: {writes}"
    texts, tokens = record["text_shape"]
    return f"A network that reads {texts} text{'s' * (texts != 1)} of a task, {tokens} tokens of each, and writes {writes}"


def counted(judged: Judgement, split: str) -> str:
    """``6 conditions of held-out slices``."""
    number = judged.split(split)["conditions"]
    if split == "seen":
        return f"{number} seen condition{'s' * (number != 1)}"
    return f"{number} condition{'s' * (number != 1)} of {SPLITS.get(split, split.replace('_', ' '))}"


def tiles(judged: Judgement) -> list[tuple[str, str, str]]:
    """``(label, number, explanation)`` of the headline split, and the share on each other held-out one."""
    split = judged.headline
    found = judged.split(split)
    rest = [other for other in judged.splits if other != split and other != "seen"]
    beats = found["beats_base"]
    tiles = [
        _share_tile(judged, split),
        ("beats the base", percent(beats), f"{round(beats * found['conditions'])} of {counted(judged, split)}"),
    ]
    strongest = judged.strongest(split)
    if strongest is not None:
        mean, low, high = found["lead"][strongest.key]
        tiles.append(("lead over the strongest control", signed(mean), f"nats a token over “{strongest.name}”, {interval_words(found, low, high)}"))
    return tiles + [_share_tile(judged, other) for other in rest]


def _share_tile(judged: Judgement, split: str) -> tuple[str, str, str]:
    found, label = judged.split(split), "share of the teacher's gain"
    if not judged.gain(split) > 0:
        return label, "–", f"on {counted(judged, split)}: {no_gain(judged, split)}"
    losses = found["nll"]
    words = f"on {counted(judged, split)}; nats a token: base {losses[BASE]:.3f}, generated {losses[judged.generated]:.3f}, own teachers {losses[TEACHER]:.3f}"
    return label, share(judged, split, judged.generated), words


def share(judged: Judgement, split: str, key: str) -> str:
    """Share of the teachers' gain of a column, a dash where there is no gain to share."""
    value = judged.split(split)["share"].get(key, math.nan)
    return percent(value) if judged.gain(split) > 0 and math.isfinite(value) else "–"


def no_gain(judged: Judgement, split: str) -> str:
    """Why there is no share."""
    if not math.isfinite(judged.gain(split)):
        return "the loss of the base or of the teachers is not a number, so there is no share of a gain"
    return f"the own teachers are no better than the base ({signed(judged.gain(split))} nats a token), so there is no share of a gain"


def signed(value: float) -> str:
    """A difference of losses."""
    return f"{value:+.4f}" if math.isfinite(value) else "–"


def loss_words(value: float) -> str:
    """A loss in nats a token."""
    return f"{value:.4f}" if math.isfinite(value) else "–"


def interval_words(found: Mapping[str, Any], low: float, high: float) -> str:
    """The 95% interval of a lead and what follows from it."""
    if found["conditions"] < 2:
        return "of one condition, which gives no interval"
    if not (math.isfinite(low) and math.isfinite(high)):
        return "no interval"
    verdict = "" if low > 0 else ": behind it" if high < 0 else ": not told apart from it"
    return f"95% interval {signed(low)} to {signed(high)}{verdict}"


def facts(run: Run, stage: Stage | None) -> list[tuple[str, str]]:
    """What a generator is and what it learned from, as ``(label, words)``; what the run does not say is left out."""
    if stage is None:
        return [("stage", "has left no record in this run")]
    return [*_network(stage), *_conditions(run, stage), *_learning(run, stage)]


def _network(stage: Stage) -> Iterator[tuple[str, str]]:
    record = stage.generator or {}
    options = options_of(stage)
    if not options:
        return
    reader, width = options["reader"], options["width"]
    yield "base", str(record["base"]["source"])
    if options["condition"] != "none":
        eyes = "the base's own states" if options["condition"] == "base" else f"states of {options['encoder']}"
        yield "network", f"{reader['kind']} over {eyes}, decoder {options['decoder']}, width {width}"
    spec = record["spec"]
    numbers = sum(len(site["layers"]) * spec["rank"] * (site["in_features"] + site["out_features"]) for site in spec["sites"])
    scale = spec["alpha"] / (math.sqrt(spec["rank"]) if spec["rslora"] else spec["rank"])
    yield "adapter", f"rank {spec['rank']}, scale {scale:g}, {quantity(numbers)} numbers"
    yield "sites", ", ".join(f"{site['name']} × {len(site['layers'])}" for site in spec["sites"])


def _conditions(run: Run, stage: Stage) -> Iterator[tuple[str, str]]:
    record = _conditions_of(run, stage)
    if record is None:
        return
    named: dict[str, list[dict[str, Any]]] = {}
    for row in record["conditions"]:
        named.setdefault(row["split"], []).append(row)
    words = {"seen": "seen", "held_out_slice": "of held-out slices", "held_out_source": "of held-out sources", "mix": "mixes"}
    yield "conditions", ", ".join(f"{len(named[split])} {word}" for split, word in words.items() if split in named)
    seen = named.get("seen", [])
    sources, formats = (list(dict.fromkeys(str(row[key]) for row in seen)) for key in ("source", "format"))
    yield "seen", f"{len(sources)} source{'s' * (len(sources) != 1)} ({', '.join(sources)}) in the formats {', '.join(formats)}"
    sources = list(dict.fromkeys(str(row["source"]) for row in named.get("held_out_source", [])))
    if sources:
        yield "never seen", f"source{'s' * (len(sources) != 1)} {', '.join(sources)}"
    yield "reads", {"prompts": "prompts", "prompt_answer": "prompts with their answers"}.get(record.get("form", ""), str(record.get("form", "texts")))


def _conditions_of(run: Run, stage: Stage) -> dict[str, Any] | None:
    """The conditions that a train stage's data names, by itself or by another stage's data."""
    passed: set[str] = set()
    data = stage.options.get("data")
    while isinstance(data, dict) and isinstance(data.get("from"), str) and data["from"] not in passed:
        passed.add(data["from"])
        found = run.stage(data["from"])
        if found is None or found.conditions is not None:
            return found.conditions if found else None
        data = found.options.get("data")
    return None


def _learning(run: Run, stage: Stage) -> Iterator[tuple[str, str]]:
    objectives = stage.options.get("objectives") or []
    if objectives:
        yield "objectives", ", ".join(_objective(one) for one in objectives)
    if stage.tokens:
        yield "trained on", f"{quantity(stage.tokens)} tokens"
    teacher = stage.options.get("teacher") or {}
    pool = (teacher.get("pool") or {}).get("from") if isinstance(teacher.get("pool"), dict) else None
    trained = run.stage(pool) if isinstance(pool, str) else None
    if trained is not None and "adapters" in trained.record.get("result", {}):
        yield "teachers", f"{trained.record['result']['adapters']} adapters of stage {trained.name}, {quantity(trained.tokens)} tokens"


def _objective(options: Mapping[str, Any]) -> str:
    """Its kind, its loss where it has a choice, its weight where that is not 1."""
    loss, weight = options.get("loss"), options.get("weight", 1.0)
    words = f"{options.get('kind', '?')}" + (f" ({loss})" if loss else "")
    if isinstance(weight, int | float):
        return words if weight == 1 else f"{words} × {weight:g}"
    return f"{words} × ramp"


def notes(judged: Judgement, split: str) -> list[str]:
    """What a reader of a split's numbers has to know, one sentence each."""
    found, rows, said = judged.split(split), judged.rows(split), []
    if not judged.gain(split) > 0:
        said.append(f"{no_gain(judged, split)[0].upper()}{no_gain(judged, split)[1:]}.")
    else:
        idle = sum(not row["nll"][TEACHER] < row["nll"][BASE] for row in rows)
        if idle:
            said.append(f"The own teacher of {idle} of the {len(rows)} conditions is no better than the base.")
    if found["conditions"] < 2:
        said.append("One condition: there is nothing to resample, so no interval.")
    rank = found.get("spearman_cosine_gain", math.nan)
    if math.isfinite(rank):
        said.append(f"Rank correlation of delta cosine and gain over the base (Spearman): {rank:+.2f}.")
    return said


def warnings(judged: Judgement) -> list[str]:
    """What the whole evaluation cannot say."""
    if not any(split != "seen" for split in judged.splits):
        return ["Only seen conditions were judged: nothing here says what the generator writes for tasks that it was not trained on."]
    return []


def command(stage: str) -> str:
    """How an adapter is written."""
    return f'limbeck export RUN/{stage} --to peft --prompt "TEXT OF THE TASK" --output ADAPTER'
