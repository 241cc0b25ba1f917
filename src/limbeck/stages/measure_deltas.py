"""The stage that measures how every adapter of a pool moves the base's hidden states on probes."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import torch

from limbeck.adapters.delta_store import DeltaCache, adapter_key, measuring_digest, write_measured
from limbeck.adapters.deltas import Probes, embed, measured
from limbeck.adapters.inject import Injector
from limbeck.adapters.pool import Pool
from limbeck.adapters.spec import Adapters
from limbeck.config.parts.adapters import MeasureDeltasStageOptions
from limbeck.engine.precision import autocast
from limbeck.errors import RunError
from limbeck.models.head import head_of
from limbeck.models.loading import fingerprint, load_model, load_tokenizer
from limbeck.stages.adapting import base_record, checked_source, open_conditions, open_pool
from limbeck.stages.context import StageContext
from limbeck.stages.folder import digest
from limbeck.stages.probing import input_moments, probes_of, with_continuations
from limbeck.students.adapted import runner

OUTLIER = 10.0
"""Times the median norm (or less than a tenth of it) from which a delta is named as an outlier."""


class MeasureDeltasStage:
    """Writes ``deltas/``; numbers are kept in the run's ``delta_cache/`` by content too, so that a second stage finds them."""

    def __init__(self, context: StageContext):
        self.context = context
        self.options: MeasureDeltasStageOptions = context.options

    def run(self) -> None:
        """Measure what is not in the cache, each rank its share; the same inputs give the same bytes."""
        context, options = self.context, self.options
        given = None if options.base is None else base_record(context.locate(options.base), str(options.base))
        pool = open_pool(context, options.pool, given)
        source = context.locate(options.base) if isinstance(options.pool, dict) and options.base is not None else checked_source(dict(pool.base), pool.folder)
        self.model: Any = load_model(source, revision=pool.base["fingerprint"].get("commit"), device=context.world.device)
        self.represent = options.resolved_represent
        self.probes = self._probes(source)
        self.measuring = measuring_digest(pool.base, self.probes, self.represent, options.precision)
        self.cache = DeltaCache(context.run_dir / "delta_cache")
        # One compute dtype for the base and all that is compared with it.
        with torch.no_grad(), autocast(context.world.device, options.precision):
            keys = self._loras(pool) if pool.mode == "lora" else self._models(pool)
        # What the other ranks measured lies in the cache now.
        context.world.barrier()
        context.once(lambda: self._write(pool, {entry.name: (key, self._held(key)) for entry, key in zip(pool.entries, keys, strict=True)}))

    def _write(self, pool: Pool, found: dict[str, tuple[str, np.ndarray]]) -> None:
        context, options = self.context, self.options
        statistics = self._statistics({name: numbers for name, (_, numbers) in found.items()})
        moments = input_moments(self.model, pool.adapters(pool.entries[:1]).spec, self.probes) if options.moments else None
        out = context.folder / "deltas"
        shutil.rmtree(out, ignore_errors=True)
        write_measured(
            out,
            found,
            statistics=statistics,
            probes=self.probes.to("cpu"),
            represent=self.represent,
            facts={"base": dict(pool.base), "measuring": self.measuring, "precision": options.precision, "noise": self.noise},
            moments=moments,
        )

    def _probes(self, source: str) -> Probes:
        context, options = self.context, self.options.resolved_probes
        conditions = None if options.conditions is None else open_conditions(context, options.conditions.from_)
        probes = probes_of(options, load_tokenizer(source), conditions).to(context.world.device)
        if self.represent.what == "likelihoods":
            with torch.no_grad():
                probes = with_continuations(self.model, probes, self.represent, options.seed).to(context.world.device)
        context.say(f"  {len(probes)} probes, {int(probes.mask_KT.sum())} tokens")
        return probes

    def _embed(self, model: Any, injector: Injector | None = None, adapters: Adapters | None = None) -> torch.Tensor:
        return embed(runner(model, injector), adapters, self.probes, self.represent, head=head_of(model))

    def _loras(self, pool: Pool) -> list[str]:
        """All adapters x probes, ``together`` at a time, each lot of the same shape whatever is in the cache already; returns their keys."""
        options, world, device = self.options, self.context.world, self.context.world.device
        adapters = pool.adapters()
        keys = [adapter_key(adapters, i, self.measuring) for i in range(len(adapters))]
        missing = [i for i, key in enumerate(keys) if key not in self.cache]
        self.context.say(f"  {len(keys)} adapters, {len(keys) - len(missing)} of them measured before")
        # Nobody begins to fill the cache before all have seen what is missing.
        world.barrier()
        lots_of = [missing[i : i + options.together] for i in range(0, len(missing), options.together)]
        missing = [i for lot in lots_of[world.rank :: world.size] for i in lot]
        injector = Injector(self.model, adapters.spec)
        try:
            base = self._embed(self.model, injector)
            # How far apart the base lies from itself when others share its batch: what no delta can be told from.
            nothing = adapters.pick([0] * min(options.together, len(keys))).map(torch.zeros_like).to(device)
            self.noise = float((self._embed(self.model, injector, nothing) - base).norm(dim=-1).max())
            lots = measured(
                runner(self.model, injector), adapters, missing, self.probes, self.represent, base, together=options.together, head=head_of(self.model)
            )
            with self.context.counting("adapters", len(missing)) as counter:
                for lot, deltas in lots:
                    for i, numbers in zip(lot, deltas.cpu().numpy(), strict=True):
                        self.cache.put(keys[i], numbers)
                    counter.add(len(lot))
        finally:
            injector.remove()
        return keys

    def _models(self, pool: Pool) -> list[str]:
        """Whole models, one after the other; returns their keys."""
        base, world = self._embed(self.model), self.context.world
        self.noise = 0.0
        keys = [f"model-{digest([fingerprint(str(pool.folder / entry.folder)), self.measuring])}" for entry in pool.entries]
        mine = list(zip(pool.entries, keys, strict=True))[world.rank :: world.size]
        with self.context.counting("models", len(mine)) as counter:
            for entry, key in mine:
                if key in self.cache:
                    counter.add(before=True)
                    continue
                model = load_model(str(pool.folder / entry.folder), device=world.device)
                self.cache.put(key, (self._embed(model) - base)[0].cpu().numpy())
                counter.add()
        return keys

    def _held(self, key: str) -> np.ndarray:
        numbers = self.cache.get(key)
        if numbers is None:
            raise RunError(f"{self.cache.path(key)} has gone while it was used: is another process clearing the run's folder?")
        return numbers

    def _statistics(self, found: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
        """Norm of every delta; broken adapters and outliers by name."""
        norms = {name: float(np.linalg.norm(numbers)) for name, numbers in found.items()}
        finite = [norm for norm in norms.values() if np.isfinite(norm) and norm > 0]
        median = float(np.median(finite)) if finite else 0.0
        notes: dict[str, str] = {}
        for name, norm in norms.items():
            if not np.isfinite(norm):
                notes[name] = "not finite"
            elif norm <= self.noise:
                notes[name] = "no larger than the noise: an adapter that does nothing"
            elif median and not median / OUTLIER <= norm <= median * OUTLIER:
                notes[name] = f"outlier: {norm / median:.2g} times the median"
        broken = [name for name, note in notes.items() if "not finite" in note]
        if broken:
            raise RunError(f"the deltas of {', '.join(broken[:5])} are not finite: these adapters are broken; train them again or take them out of the pool")
        spread = f"{min(norms.values()):.4g} to {max(norms.values()):.4g}, median {median:.4g}" if norms else "none"
        self.context.say(f"  norms of the deltas: {spread}; noise {self.noise:.2g}")
        for name, note in notes.items():
            self.context.say(f"  WARNING: {name}: {note}")
        self.context.facts["result"] = {"adapters": len(found), "median_norm": median, "outliers": len(notes), "noise": self.noise}
        return {name: {"norm": norm, **({"note": notes[name]} if name in notes else {})} for name, norm in norms.items()}
