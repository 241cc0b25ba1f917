"""The rank_layers stage: which layers of a hybrid stay softmax.

Everything that is measured is noted in a ledger, candidate by candidate; the ranking is a pure function of it, so a run that
was killed and goes on, and candidates that ran elsewhere, give the same ranking as one run without a break.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.config.parts.stages import RankLayersStageOptions
from limbeck.data.dataset import TokenRows
from limbeck.data.tokenizer import ordinary_ids
from limbeck.engine.precision import autocast
from limbeck.errors import RunError
from limbeck.evaluation.ranking.orders import (
    by_importance,
    halo_importance,
    race,
    race_order,
    random_sets,
    spearman,
    stops_after,
    uniform_set,
)
from limbeck.evaluation.ranking.scoring import Score, Scoring, make_scoring
from limbeck.evaluation.ranking.swaps import Sweep, residuals, swapped, sweep
from limbeck.models.loading import fingerprint, load_model, load_tokenizer
from limbeck.models.structure import attention_slot, decoder_layers
from limbeck.records import sealed
from limbeck.stages.context import StageContext
from limbeck.stages.evaluate import recall_probes
from limbeck.stages.folder import digest, write_json
from limbeck.stages.ledger import Ledger
from limbeck.stages.short_distil import ShortDistil
from limbeck.stages.train import trained_model
from limbeck.students.student import Student

RANK, COMPARE = 0, 1
"""Halves of the held-out data."""
COSMETIC = {"method", "compare", "candidates", "random_sets", "oracle", "oracle_sets", "sets", "grid"}
"""Options that do not change what a candidate scores."""


class RankLayersStage:
    """Writes ``ranking/ranking.json``, with ``ledger.jsonl`` beside it."""

    def __init__(self, context: StageContext, *, candidate: int | None = None):
        self.context = context
        self.options: RankLayersStageOptions = context.options
        self.alone = candidate

    def run(self) -> None:
        """Rank, choose and compare, on the first rank; the candidates of `ga_s2` are distilled on all of them."""
        context = self.context
        folder, _ = context.data(self._trained.data if self.options.data is None else self.options.data)
        context.check_unseen(self.options.from_, folder)
        if context.world.size > 1 and "ga_s2" in self.options.methods:
            self._share_candidates()
        context.once(self._run)

    def _share_candidates(self) -> None:
        """Each rank distils its share of the candidates to the end, into ledgers of their own.

        The ranking finds them there, and counts each as far as it would have run after the others.
        """
        context, candidates = self.context, self.options.candidates
        chosen = list(range(self.num_layers))
        if candidates != "all":
            context.once(self._restore_one)
            self.__dict__.pop("ledger", None)
            chosen = self._restore_one()["order"][:candidates]
        for layer in chosen[context.world.rank :: context.world.size]:
            self.alone = layer
            self.__dict__.pop("ledger", None)
            self._candidate(layer, [])
        self.alone = None
        # Read again: it holds what the other ranks found.
        self.__dict__.pop("ledger", None)
        context.world.barrier()

    def run_candidate(self) -> None:
        """Distil and score one layer alone, into a ledger of its own; nothing else of the stage is done."""
        assert self.alone is not None
        if self.options.distil is None:
            raise RunError(f"stage '{self.context.name}': only `ga_s2` has candidates to run alone, and the stage has no `distil`: run it without --candidate")
        if not 0 <= self.alone < self.num_layers:
            raise RunError(f"--candidate {self.alone}: no such layer; the model has layers 0 to {self.num_layers - 1}")
        self._candidate(self.alone, [])
        self.context.say(f"candidate {self.alone}: noted in {self.ledger.path}")

    # -- what is worked with ---------------------------------------------------------------------------------------------

    @property
    def _trained(self) -> Any:
        return self.context.stage_options(self.options.from_)

    @cached_property
    def model_folder(self) -> Path:
        """The aligned student."""
        return trained_model(self.context, self.options.from_)

    @cached_property
    def student(self) -> Student:
        """The all-linear student, on the device."""
        model: Any = load_model(str(self.model_folder))
        if not hasattr(model.config, "limbeck"):
            raise RunError(
                f"stage '{self.context.name}': the model of stage '{self.options.from_}' was not made by a surgery and has no mixers: "
                "name a stage whose student is hybridized"
            )
        student = Student(model.requires_grad_(False).eval().to(self.context.world.device))
        soft = sorted(set(range(len(decoder_layers(model)))) - set(student.mixers()))
        if soft:
            raise RunError(
                f"stage '{self.context.name}': layers {', '.join(map(str, soft))} of the student of stage '{self.options.from_}' are softmax already: "
                "rank the layers of a student with a mixer in every layer (`keep: []` in its surgery)"
            )
        return student

    @cached_property
    def num_layers(self) -> int:
        """Decoder layers; more than are kept."""
        count = len(decoder_layers(self.student.model))
        if self.options.keep >= count:
            raise RunError(f"stage '{self.context.name}': keep: {self.options.keep} of {count} layers leaves nothing to replace; at most {count - 1}")
        return count

    @cached_property
    def base(self) -> Any:
        """The teacher: the student's own base."""
        source = self.student.base_source
        assert source is not None
        model = load_model(
            source, attention=self.student.model.config._attn_implementation, revision=self.student.base_revision, device=self.context.world.device
        )
        return model.requires_grad_(False).eval()

    @cached_property
    def attentions(self) -> dict[int, nn.Module]:
        """The teacher's softmax attention by layer."""
        return {index: getattr(layer, attention_slot(layer)) for index, layer in enumerate(decoder_layers(self.base))}

    @cached_property
    def _data(self) -> tuple[Path, Any]:
        folder, data = self.context.data(self._trained.data if self.options.data is None else self.options.data)
        if not data.held_out:
            raise RunError(f"stage '{self.context.name}': the data hold no documents out (held_out: 0), so nothing can be scored; set data.held_out")
        return folder, data

    def _scoring(self, half: int) -> Scoring:
        folder, data = self._data
        return make_scoring(
            self.base,
            TokenRows(folder, "held_out"),
            ordinary_ids(load_tokenizer(str(folder / "tokenizer"))),
            num_rows=self.options.rows,
            recall=recall_probes(self.options.recall, data),
            half=half,
            seed=self.options.seed,
            compute=autocast(self.context.world.device, self.options.precision),
        )

    @cached_property
    def ranking_data(self) -> Scoring:
        """Held-out data that rank."""
        return self._scoring(RANK)

    @cached_property
    def comparing_data(self) -> Scoring:
        """Held-out data that compare sets; no ranking has met them."""
        return self._scoring(COMPARE)

    @cached_property
    def identity(self) -> str:
        """What a score depends on."""
        options = self.options.model_dump(mode="json", by_alias=True, exclude=COSMETIC)
        if options["distil"] is not None:
            # What is kept in memory changes no score.
            del options["distil"]["teacher_cache"]
        return digest([options, fingerprint(str(self.model_folder)), self._data[0].name])

    @cached_property
    def ledger(self) -> Ledger:
        """What is known; one candidate alone writes a file of its own."""
        own = None if self.alone is None else str(self.alone)
        return Ledger(self.context.folder / "ranking", self.identity, own=own, say=self.context.say)

    @cached_property
    def short(self) -> ShortDistil:
        """Trains candidates."""
        source = self.student.base_source
        assert self.options.distil is not None and source is not None
        return ShortDistil(
            self.options.distil,
            model_folder=self.model_folder,
            base=source,
            revision=self.student.base_revision,
            rows=TokenRows(self._data[0], "train"),
            recall_weight=self.options.recall_weight,
            folder=self.context.folder / "candidates",
            identity=self.identity,
            seed=self.options.seed,
            console=self.context.console,
            place=self.context.place,
            device=self.context.world.device,
        )

    def _sweep(self, model: Any, candidates: Mapping[Any, Mapping[int, Any]], scoring: Scoring) -> Sweep:
        with self.context.counting("batches", len(scoring)) as counter:
            return sweep(model, candidates, scoring, done=counter.add)

    def _mixed(self, score: Mapping[str, Any]) -> float:
        return Score.from_json(dict(score)).mixed(self.options.recall_weight)

    # -- the methods -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        options, say = self.options, self.context.say
        num_layers, keep = self.num_layers, options.keep
        names = options.methods
        if "ga_s2" in names and "restore_one" not in names:
            # Its order is also the one in which candidates are distilled.
            names = ("restore_one", *names)
        say(f"  {options.keep} of {num_layers} layers are to stay softmax; methods {', '.join(names)}")
        methods: dict[str, dict[str, Any]] = {}
        for name in sorted(names, key=lambda name: name == "ga_s2"):
            methods[name] = getattr(self, f"_{name}")(*([methods["restore_one"]["order"]] if name == "ga_s2" else []))
            methods[name]["keep"] = sorted(methods[name]["order"][:keep])
            say(f"  {name}: {', '.join(map(str, methods[name]['order']))}; {methods[name]['tokens']['all']:,} tokens")
        ranking = self._compared(methods)
        write_json(self.context.folder / "ranking" / "ranking.json", sealed(ranking))
        say(f"  keeps layers {', '.join(map(str, ranking['keep']))} ({options.method})")
        chosen = next(row for row in ranking["sets"] if row["layers"] == ranking["keep"])
        self.context.facts["result"] = {
            "keep": " ".join(map(str, ranking["keep"])),
            **{key: chosen[key] for key in ("kl", "recall_kl", "recall")},
            "tokens": ranking["tokens"]["all"],
        }

    def _restore_one(self) -> dict[str, Any]:
        found = self._restored(())
        gain = {layer: self._mixed(found["baseline"]) - self._mixed(score) for layer, score in _by_layer(found["scores"]).items()}
        return {"order": by_importance(gain), "importance": _listed(gain), "scores": found["scores"], "tokens": _tokens(scored=found["tokens"])}

    def _restored(self, kept: Sequence[int]) -> dict[str, Any]:
        """Every other layer softmax again beside ``kept``, without training; once for both methods that ask for it."""

        def work() -> dict[str, Any]:
            extra = [layer for layer in range(self.num_layers) if layer not in kept]
            candidates = {(layer,): {layer: self.attentions[layer]} for layer in extra}
            # Kept layers are softmax in the pass that all share, so that each candidate begins at its own layer.
            with swapped(self.student.model, {layer: self.attentions[layer] for layer in kept}):
                return _swept(self._sweep(self.student.model, candidates, self.ranking_data), lambda layers: layers[-1])

        return self.ledger.get("restore/" + "-".join(map(str, kept)), work)

    def _greedy(self) -> dict[str, Any]:
        order: list[int] = []
        tokens = 0
        while len(order) < self.options.keep:
            found = self._restored(order)
            tokens += found["tokens"]
            scores = {layer: -self._mixed(score) for layer, score in _by_layer(found["scores"]).items()}
            order.append(by_importance(scores)[0])
        # The last round's scores put the layers that nobody keeps in an order.
        rest = [layer for layer in by_importance(scores) if layer not in order]
        return {"order": [*order, *rest], "tokens": _tokens(scored=tokens)}

    def _replaced(self) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            candidates = {(layer,): {layer: mixer} for layer, mixer in self.student.mixers().items()}
            return _swept(self._sweep(self.base, candidates, self.ranking_data), lambda layers: layers[-1])

        return self.ledger.get("replace", work)

    def _replace_one(self) -> dict[str, Any]:
        found = self._replaced()
        loss = {layer: self._mixed(score) for layer, score in _by_layer(found["scores"]).items()}
        return {"order": by_importance(loss), "importance": _listed(loss), "scores": found["scores"], "tokens": _tokens(scored=found["tokens"])}

    def _halo(self) -> dict[str, Any]:
        found = self._replaced()
        ratio = {layer: halo_importance(score["recall"], score["text"]) for layer, score in _by_layer(found["scores"]).items()}
        return {"order": by_importance(ratio), "importance": _listed(ratio), "tokens": _tokens(scored=found["tokens"])}

    def _residual(self) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            found = residuals(self.base, self.student.mixers(), self.ranking_data)
            return {"residual": {str(layer): value for layer, value in found.items()}, "tokens": self.ranking_data.num_tokens}

        found, weight = self.ledger.get("residual", work), self.options.recall_weight
        error = {layer: (1 - weight) * value["text"] + weight * value["recall"] for layer, value in _by_layer(found["residual"]).items()}
        return {"order": by_importance(error), "importance": _listed(error), "scores": found["residual"], "tokens": _tokens(scored=found["tokens"])}

    def _ga_s2(self, free: Sequence[int]) -> dict[str, Any]:
        options = self.options
        assert options.distil is not None
        chosen = list(free) if options.candidates == "all" else list(free[: options.candidates])
        rungs, ran = self._rungs, dict[int, list[float]]()
        for layer in chosen:
            self._candidate(layer, list(ran.values()))
            # Also one that ran elsewhere, to its end, counts as far as it would have run here.
            scores = {**ran, layer: [self._mixed(score) for score in self.ledger[f"ga_s2/{layer}"]["scores"]]}
            ran = race(scores, keep=options.keep, rungs=rungs, margin=options.distil.margin)
            stopped = "" if len(ran[layer]) == rungs else f", stopped after part {len(ran[layer])} of {rungs}"
            self.context.say(f"  ga_s2: layer {layer} {ran[layer][-1]:.4f}{stopped}")
        entries = {layer: self.ledger[f"ga_s2/{layer}"] for layer in chosen}
        trained = {layer: round(entries[layer]["trained"] * len(ran[layer]) / len(entries[layer]["scores"])) for layer in chosen}
        budget = max(entry["trained"] * rungs // len(entry["scores"]) for entry in entries.values())
        passes = sum(len(scores) for scores in ran.values())
        return {
            "order": race_order(ran, free),
            "scores": {str(layer): entries[layer]["scores"][: len(ran[layer])] for layer in chosen},
            "traces": {str(layer): scores for layer, scores in ran.items()},
            "candidates": chosen,
            # Trained tokens are the largest part of the cost; a full run has every layer as a candidate, and nobody stops.
            "tokens": _tokens(teacher=self._asked(list(trained.values())), trained=sum(trained.values()), scored=passes * self._passes[RANK]),
            "full_tokens": _tokens(
                teacher=budget * self.num_layers, trained=budget * self.num_layers, scored=self.num_layers * rungs * self._passes[RANK]
            ),
        }

    @property
    def _passes(self) -> list[int]:
        """Tokens of one pass over the data that rank, and over those that compare; from the ledger where they are known."""
        return self.ledger.get("passes", lambda: [self.ranking_data.num_tokens, self.comparing_data.num_tokens])

    @property
    def _rungs(self) -> int:
        assert self.options.distil is not None
        return self.short.rungs

    def _asked(self, trained: Sequence[int]) -> int:
        """Tokens about which the teacher is asked when its answers are kept in memory for the candidates after the first."""
        assert self.options.distil is not None
        held = (self.options.distil.teacher_cache or 0) // (4 * self.base.config.get_text_config(decoder=True).hidden_size)
        return min(held, max(trained, default=0)) + sum(max(0, tokens - held) for tokens in trained)

    def _candidate(self, layer: int, earlier: list[list[float]]) -> None:
        options = self.options
        assert options.distil is not None
        rungs, keep, margin, name = self._rungs, options.keep, options.distil.margin, f"ga_s2/{layer}"
        if name in self.ledger:
            return

        def go(scores: list[float]) -> bool:
            return stops_after(scores, earlier, keep=keep, rungs=rungs, margin=margin) > len(scores)

        self.ledger.add(name, self.short.run(f"layer-{layer}", (layer,), scoring=self.ranking_data, go=go))
        self.short.forget(f"layer-{layer}")

    # -- sets ------------------------------------------------------------------------------------------------------------

    def _compared(self, methods: dict[str, dict[str, Any]]) -> dict[str, Any]:
        options, num_layers = self.options, self.num_layers
        drawn = random_sets(num_layers, options.keep, options.random_sets, options.seed)
        choices = {name: method["keep"] for name, method in methods.items()} | {"uniform": uniform_set(num_layers, options.keep)}
        choices |= {f"random {number}": layers for number, layers in enumerate(drawn, 1)}
        every = self._every_set() if options.oracle else []
        found, tokens = self._measure_sets([tuple(layers) for layers in [*choices.values(), *every]])
        rows = [{"name": name, **_row(layers, found[tuple(layers)], options.recall_weight)} for name, layers in choices.items()]
        randoms = [row for row in rows if row["name"].startswith("random ")]
        result: dict[str, Any] = {
            "method": options.method,
            "keep": choices["random 1" if options.method == "random" else options.method],
            "num_layers": num_layers,
            "methods": methods,
            "sets": rows,
            "random_mean": {key: sum(row[key] for row in randoms) / len(randoms) for key in ("score", "kl", "recall_kl", "recall")},
            "sets_measured": options.sets,
            "spearman": {
                f"{one}, {other}": spearman(methods[one]["order"], methods[other]["order"]) for one, other in itertools.combinations(methods, 2)
            },
            "recall_weight": options.recall_weight,
        }
        if every:
            ordered = sorted((_row(layers, found[tuple(layers)], options.recall_weight) for layers in every), key=lambda row: (row["score"], row["layers"]))
            result["oracle"] = {**ordered[0], "sets": ordered}
        sweeps = {"greedy": ("restore_one",), "halo": ("replace_one",)}
        # What two methods measure together is paid once.
        shared = [method["tokens"]["all"] for name, method in methods.items() if not any(other in methods for other in sweeps.get(name, ()))]
        greedy_rest = methods["greedy"]["tokens"]["all"] - methods["restore_one"]["tokens"]["all"] if {"greedy", "restore_one"} <= set(methods) else 0
        result["tokens"] = {"teacher": sum(self._passes), "ranking": sum(shared) + greedy_rest, "sets": tokens}
        result["tokens"]["all"] = sum(result["tokens"].values())
        return result

    def _every_set(self) -> list[list[int]]:
        count = math.comb(self.num_layers, self.options.keep)
        if count > self.options.oracle_sets:
            raise RunError(
                f"stage '{self.context.name}': the oracle would measure {count} sets of {self.options.keep} of {self.num_layers} layers, and "
                f"oracle_sets is {self.options.oracle_sets}: raise it, or set `oracle: false`"
            )
        return [list(layers) for layers in itertools.combinations(range(self.num_layers), self.options.keep)]

    def _measure_sets(self, sets: list[tuple[int, ...]]) -> tuple[dict[tuple[int, ...], dict[str, Any]], int]:
        """Each set's score on data that no ranking has met, and the tokens that all cost."""
        sets = sorted(dict.fromkeys(sets))
        if self.options.sets == "zero_shot":

            def work() -> dict[str, Any]:
                candidates = {layers: {index: self.attentions[index] for index in layers} for layers in sets}
                return _swept(self._sweep(self.student.model, candidates, self.comparing_data), lambda layers: "-".join(map(str, layers)))

            found = self.ledger.get("sets/" + digest(sets), work)
            return {layers: found["scores"]["-".join(map(str, layers))] for layers in sets}, found["tokens"]
        known: dict[tuple[int, ...], dict[str, Any]] = {}
        for number, layers in enumerate(sets, 1):
            name = "set-" + "-".join(map(str, layers))
            if f"sets/{name}" not in self.ledger:
                self.context.say(f"  set {number}/{len(sets)}: layers {', '.join(map(str, layers))}")
                self.ledger.add(f"sets/{name}", self.short.run(name, layers, scoring=self.comparing_data, go=lambda _: True, every_rung=False))
                self.short.forget(name)
            known[layers] = self.ledger[f"sets/{name}"]
        trained = [entry["trained"] for entry in known.values()]
        tokens = sum(trained) + self._asked(trained) + len(known) * self._passes[COMPARE]
        return {layers: entry["scores"][-1] for layers, entry in known.items()}, tokens


def _swept(found: Any, name: Any) -> dict[str, Any]:
    """A sweep as a ledger holds it."""
    return {
        "scores": {str(name(layers)): score.as_json() for layers, score in found.scores.items()},
        "baseline": found.baseline.as_json(),
        "tokens": found.tokens,
        "shared": found.shared,
    }


def _by_layer(values: Mapping[str, Any]) -> dict[int, Any]:
    return {int(layer): value for layer, value in values.items()}


def _listed(importance: Mapping[int, float]) -> dict[str, float]:
    return {str(layer): importance[layer] for layer in sorted(importance)}


def _tokens(*, teacher: int = 0, trained: int = 0, scored: int = 0) -> dict[str, int]:
    return {"teacher": teacher, "trained": trained, "scored": scored, "all": teacher + trained + scored}


def _row(layers: Sequence[int], score: Mapping[str, Any], recall_weight: float) -> dict[str, Any]:
    found = Score.from_json(dict(score))
    return {
        "layers": list(layers),
        "score": found.mixed(recall_weight),
        "kl": found.text,
        "agreement": found.agreement,
        "recall_kl": found.recall,
        "recall": found.accuracy,
        "probes": found.probes,
    }
