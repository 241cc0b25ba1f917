"""Deltas of many adapters by batched injection and a cache, against loading one adapter after the other with peft.

python -m benchmarks.delta_cache.run [--quick] [--out FOLDER]

The adapters are PEFT folders, and reading them is part of every way.  CPU seconds are process time, all ways in one process.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it also runs as a file

from benchmarks.evidence import criterion, write_results

from limbeck.adapters.delta_store import DeltaCache
from limbeck.adapters.deltas import Probes
from limbeck.adapters.peft_files import write_peft
from limbeck.adapters.spec import Adapters, AdapterSpec
from limbeck.adapters.targets import resolve_spec
from limbeck.behaviour import compute_adapter_delta
from limbeck.models.loading import build_model

PROBES, TOKENS, RANK, VOCABULARY, SEED = 5, 32, 8, 512, 0
CONFIG: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": VOCABULARY, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
SPEEDUP, APART = 5.0, 1e-4
OURS, AGAIN, FRESH, SWAPPED = "measured in batches", "read from the cache", "a PeftModel for each", "one PeftModel, adapters swapped"


def written(folder: Path, spec: AdapterSpec, count: int) -> list[str]:
    """Random adapters as PEFT folders."""
    generator = torch.Generator().manual_seed(SEED)

    def draw(*shape: int) -> torch.Tensor:
        return 0.05 * torch.randn(shape, generator=generator)

    A = {s.name: draw(count, len(s.layers), RANK, s.in_features) for s in spec.sites}
    adapters = Adapters(spec, A, {s.name: draw(count, len(s.layers), s.out_features, RANK) for s in spec.sites})
    for n in range(count):
        write_peft(adapters, n, folder / f"{n:04d}", base="base", provenance={})
    return [str(folder / f"{n:04d}") for n in range(count)]


@torch.no_grad()
def state(model: Any, probes: Probes) -> np.ndarray:
    """v(M): last layer, last token, mean over probes (all of one length)."""
    return model(input_ids=probes.ids_KT, use_cache=False, output_hidden_states=True).hidden_states[-1][:, -1].mean(0).numpy()


def fresh(model: Any, probes: Probes, folders: list[str]) -> np.ndarray:
    """The base wrapped anew for every adapter, and unwrapped."""
    base, found = state(model, probes), []
    for folder in folders:
        wrapped = peft.PeftModel.from_pretrained(model, folder)
        found.append(state(wrapped, probes) - base)
        wrapped.unload()
    return np.stack(found)


def swapped(model: Any, probes: Probes, folders: list[str]) -> np.ndarray:
    """One wrapped base; the next adapter is loaded and the last one deleted."""
    base = state(model, probes)
    wrapped = peft.PeftModel.from_pretrained(model, folders[0], adapter_name="0")
    found = [state(wrapped, probes) - base]
    for n, folder in enumerate(folders[1:], 1):
        wrapped.load_adapter(folder, adapter_name=str(n))
        wrapped.set_adapter(str(n))
        wrapped.delete_adapter(str(n - 1))
        found.append(state(wrapped, probes) - base)
    wrapped.unload()
    return np.stack(found)


def timed(work: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    """What it gives, and its CPU seconds."""
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


def measure(count: int, work: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and criteria."""
    model = build_model(CONFIG, seed=SEED, dtype=torch.float32).requires_grad_(False).eval()
    folders = written(work / "adapters", resolve_spec(model, "all", rank=RANK, alpha=2 * RANK), count)
    generator = torch.Generator().manual_seed(SEED + 1)
    probes = Probes(torch.randint(0, VOCABULARY, (PROBES, TOKENS), generator=generator), torch.ones(PROBES, TOKENS, dtype=torch.bool))

    def cached() -> np.ndarray:
        return compute_adapter_delta(model, None, probes, folders, cache=DeltaCache(work / "cache"))

    ways: dict[str, Callable[[], np.ndarray]] = {
        FRESH: lambda: fresh(model, probes, folders), SWAPPED: lambda: swapped(model, probes, folders), OURS: cached, AGAIN: cached,
    }  # fmt: skip
    # One adapter each, which does not count: imports and the matrix library.
    fresh(model, probes, folders[:1])
    compute_adapter_delta(model, None, probes, folders[:1])
    found, taken = {}, {}
    for name, way in ways.items():
        found[name], taken[name] = timed(way)
        if name == OURS:
            kept = files(work / "cache")
    apart = float(np.abs(found[OURS] - found[FRESH]).max() / np.abs(found[FRESH]).max())
    setting = f"{count} adapters"
    rows = [{"setting": f"{setting}, {name}", "metric": "CPU seconds", "value": round(seconds, 3)} for name, seconds in taken.items()]
    best = min((FRESH, SWAPPED), key=lambda name: taken[name])
    passes = timed(lambda: np.stack([state(model, probes) for _ in folders]))[1]
    rows.append({"setting": f"{setting}, forward passes of the bare base on the probes, one for each", "metric": "CPU seconds", "value": round(passes, 3)})
    same = bool(np.array_equal(found[OURS], found[AGAIN]) and files(work / "cache") == kept)
    shutil.rmtree(work / "cache")
    anew = cached()
    same &= bool(np.array_equal(anew, found[OURS]) and files(work / "cache") == kept)
    ratios = {name: round(taken[best] / taken[name], 2) for name in (AGAIN, OURS)}
    criteria = [
        *(
            criterion(f"CPU time of the faster way with peft over that of deltas {name}, {setting}", f">= {SPEEDUP:g}", ratio, ratio >= SPEEDUP)
            for name, ratio in ratios.items()
        ),
        criterion(f"largest difference from peft over the largest number, {setting}", f"<= {APART:g}", apart, apart <= APART),
        criterion(f"files of a second measurement that are not the same bytes, {setting}", "<= 0", float(not same), same),
    ]
    for row in rows:
        print(f"{row['setting']}: {row['metric']} {row['value']:.4g}", flush=True)
    return rows, criteria


def files(folder: Path) -> dict[str, bytes]:
    """The numbers in a cache, by name."""
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print and write ``results.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 adapters; writes only with --out")
    parser.add_argument("--out", type=Path, help="folder of results.json; by default this benchmark's own")
    options = parser.parse_args(arguments)
    before = torch.get_num_threads()
    # Threads that wait for each other on a shared machine would measure the machine.
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as work, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows, criteria = measure(20 if options.quick else 200, Path(work))
        for line in criteria:
            print(f"{'holds' if line['holds'] else 'FAILS'}: {line['name']}: {line['measured']:.4g} {line['bound']}")
        folder = options.out or (None if options.quick else Path(__file__).parent)
        if folder:
            command = "python -m benchmarks.delta_cache.run" + (" --quick" if options.quick else "")
            claim = "the deltas of 200 adapters are measured five times faster than by loading each with peft, and are the same bytes again"
            write_results(folder, claim, command, [SEED], rows, criteria)
    finally:
        torch.set_num_threads(before)
    return criteria


if __name__ == "__main__":
    main()
