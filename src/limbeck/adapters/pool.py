"""A folder of many adapters of one base: PEFT folders beside each other, and what is known of each."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.adapters.delta_store import adapter_key
from limbeck.adapters.peft_files import read_peft_file
from limbeck.adapters.spec import Adapters, cat
from limbeck.errors import AdapterError
from limbeck.files import inside, write_atomically
from limbeck.records import sealed, unsealed

MANIFEST = "pool.json"
FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """One teacher: a PEFT folder (``mode: lora``) or a model folder (``full``) below the pool's."""

    name: str
    """Unique in the pool."""
    condition: str
    """Name of the condition that it was trained on."""
    folder: str
    """Its folder, below the pool's."""
    digest: str | None = None
    """Of a LoRA's numbers, Linears and scale, as they were when the pool was written; None for folders from elsewhere."""


@dataclass(frozen=True)
class Pool:
    """The entries of a pool folder, in order, and the base that all are for."""

    folder: Path
    entries: tuple[Entry, ...]
    base: Mapping[str, Any]
    """``source`` and ``fingerprint`` of the base."""
    mode: str = "lora"

    def adapters(self, chosen: Sequence[Entry] | None = None) -> Adapters:
        """The LoRAs of all (or the chosen) entries, stacked; damaged files, and those of another shape than the first, are named."""
        if self.mode != "lora":
            raise AdapterError(f"{self.folder}: its teachers are whole models (mode: full): they have behaviour, and no LoRA weights")
        lots: list[Adapters] = []
        for entry in self.entries if chosen is None else chosen:
            lot = read_peft_file(self.folder / entry.folder)
            if lots and (lot.spec.sites, lot.spec.rank, lot.spec.scale) != (lots[0].spec.sites, lots[0].spec.rank, lots[0].spec.scale):
                raise AdapterError(
                    f"{self.folder / entry.folder}: rank {lot.spec.rank}, scale {lot.spec.scale:g} on {len(lot.spec.paths)} Linears, and the "
                    f"pool's first adapter has rank {lots[0].spec.rank}, scale {lots[0].spec.scale:g} on {len(lots[0].spec.paths)}: a pool is of one shape"
                )
            if entry.digest is not None and entry.digest != _digest(lot):
                raise AdapterError(
                    f"{self.folder / entry.folder}: is not the adapter that was written: its numbers, Linears or scale are others: put an intact copy back, "
                    "or run its train_adapters stage again with --fresh"
                )
            lots.append(Adapters(lots[0].spec, lot.A, lot.B) if lots else lot)
        if not lots:
            raise AdapterError(f"{self.folder}: there are no adapters in it: run its train_adapters stage, or name another pool")
        return cat(lots)

    def of_conditions(self) -> dict[str, list[int]]:
        """Numbers of the entries by the name of their condition."""
        found: dict[str, list[int]] = {}
        for number, entry in enumerate(self.entries):
            found.setdefault(entry.condition, []).append(number)
        return found


def write_pool(pool: Pool) -> None:
    """Write the manifest; the entries' folders are there already."""
    entries = pool.entries
    if pool.mode == "lora":
        entries = tuple(replace(entry, digest=_digest(read_peft_file(pool.folder / entry.folder))) for entry in entries)
    record = {"format": FORMAT, "mode": pool.mode, "base": dict(pool.base), "entries": [asdict(entry) for entry in entries]}
    write_atomically(pool.folder / MANIFEST, json.dumps(sealed(record), indent=1))


def _digest(adapter: Adapters) -> str:
    return adapter_key(adapter, 0, "")


def read_pool(folder: Path) -> Pool:
    """Open a pool; its adapters are read by :meth:`Pool.adapters`."""
    try:
        record = unsealed((folder / MANIFEST).read_bytes())
        entries = tuple(Entry(**entry) for entry in record["entries"])
        base, mode = dict(record["base"]), record["mode"]
        if mode not in ("lora", "full"):
            raise ValueError(f"its mode is {mode!r:.80}")
        if not all(isinstance(entry.name, str) and isinstance(entry.condition, str) and isinstance(entry.digest, str | None) for entry in entries):
            raise ValueError("an entry has a name, a condition or a digest that is none")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{folder / MANIFEST}: cannot be read as a pool of adapters ({error}): run its train_adapters stage again with --fresh") from error
    if record.get("format") != FORMAT:
        raise AdapterError(f"{folder / MANIFEST}: format {record.get('format')}, this version reads {FORMAT}: run its train_adapters stage again with --fresh")
    if strange := [entry.folder for entry in entries if inside(folder, entry.folder) is None]:
        raise AdapterError(f"{folder / MANIFEST}: an adapter's folder is {strange[0]!r:.80}, outside the pool: run its train_adapters stage again with --fresh")
    return Pool(folder, entries, base, mode)


def pool_of_folders(folders: Mapping[str, Path], base: Mapping[str, Any]) -> Pool:
    """PEFT folders from elsewhere as a pool, by the name of their condition; at least one."""
    if not folders:
        raise AdapterError("pool: it names no adapter: give PEFT folders by name, or `{from: STAGE}` of a train_adapters stage")
    root = Path(os.path.commonpath([str(path.resolve().parent) for path in folders.values()]))
    entries = tuple(Entry(name, name, os.path.relpath(path.resolve(), root)) for name, path in folders.items())
    return Pool(root, entries, base)


def flat(adapters: Adapters) -> Tensor:
    """All numbers of each adapter's A and B, ``[N, numbers]``: the embedding that weight space offers."""
    return torch.cat([t.flatten(1) for t in adapters.tensors()], 1)


