"""Measured deltas on disk: one ``.npy`` an adapter under the key of everything that it depends on, and a manifest of who has which."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck import __version__
from limbeck.adapters.deltas import Probes
from limbeck.adapters.spec import Adapters
from limbeck.config.parts.adapters import RepresentationOptions
from limbeck.errors import AdapterError
from limbeck.files import damage, listing, write_atomically
from limbeck.records import sealed, unsealed

MANIFEST, PROBES, MOMENTS = "manifest.json", "probes.safetensors", "moments.safetensors"
FORMAT = 1
_AGAIN = "run its measure_deltas stage again with --fresh"
_KEY = re.compile(r"[A-Za-z0-9_-]{1,128}")


class DeltaCache:
    """``<key>.npy`` files and ``manifest.json``, which maps an adapter's name or path to its key.

    Files are written beside and renamed: a killed process leaves the old file or the new one.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def path(self, key: str) -> Path:
        """Where a key's numbers lie; a key of a manifest that leads elsewhere is an error."""
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise AdapterError(f"{self.folder / MANIFEST}: {key!r:.80} is no key of a delta: remove the file, and they are listed again when measured")
        return self.folder / f"{key}.npy"

    def get(self, key: str) -> np.ndarray | None:
        """The float32 numbers of a key, or None, mapped from disk so that many need no memory; a damaged file is an error that names it."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise AdapterError(f"{path}: is damaged ({error}): remove it, and it is measured again") from error

    def put(self, key: str, numbers: np.ndarray) -> None:
        """Keep float32 numbers."""
        path = self.path(key)
        beside = self.folder / f".{key}.{os.getpid()}.npy"
        np.save(beside, np.ascontiguousarray(numbers, dtype=np.float32))
        os.replace(beside, path)

    @property
    def manifest(self) -> dict[str, Any]:
        """Name or path of an adapter -> what is known of it, its ``key`` among them."""
        path = self.folder / MANIFEST
        if not path.is_file():
            return {}
        try:
            return unsealed(path.read_bytes())
        except ValueError as error:
            raise AdapterError(f"{path}: is damaged ({error}): remove it, and its deltas are listed again when they are measured") from error

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Replace the manifest."""
        write_atomically(self.folder / MANIFEST, json.dumps(sealed(dict(manifest)), indent=1, ensure_ascii=False))


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of ``tensors`` of any shapes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def probe_digest(probes: Probes) -> str:
    """Of the probes' tokens."""
    parts = {"ids": probes.ids_KT, "mask": probes.mask_KT.to(torch.uint8)}
    if probes.scored_KT is not None:
        parts["scored"] = probes.scored_KT.to(torch.uint8)
    return tensor_digest(parts)


def measuring_digest(base: Mapping[str, Any], probes: Probes, represent: RepresentationOptions, precision: str) -> str:
    """Everything but the adapter that a delta depends on: base, probes, representation, compute dtype, version of the code."""
    record = [base["fingerprint"], probe_digest(probes), represent.model_dump(mode="json"), precision, __version__]
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def adapter_key(adapters: Adapters, index: int, measuring: str) -> str:
    """The key of one adapter's delta: its tensors, Linears and scale, and :func:`measuring_digest`."""
    tensors = {f"{name}.{letter}": factors[name][index] for letter, factors in (("A", adapters.A), ("B", adapters.B)) for name in factors}
    words = json.dumps([adapters.spec.to_json(), measuring, tensor_digest(tensors)], sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()


class MeasuredDeltas:
    """The artefact of a measure_deltas stage."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.cache = DeltaCache(self.folder)
        self.record = self.cache.manifest
        if self.record.get("format") != FORMAT:
            raise AdapterError(
                f"{self.folder / MANIFEST}: is not the manifest of measured deltas of format {FORMAT}: {_AGAIN}"
            )
        try:
            held = all(isinstance(entry["key"], str) for entry in self.record["adapters"].values())
            self._files = {str(name): (int(size), str(digest)) for name, (size, digest) in self.record.get("files", {}).items()}
            RepresentationOptions.model_validate(self.record["represent"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterError(f"{self.folder / MANIFEST}: is damaged ({type(error).__name__}: {error}): {_AGAIN}") from error
        if not held:
            raise AdapterError(f"{self.folder / MANIFEST}: is damaged (a key that is none): {_AGAIN}")
        self._check(self._files, verify=False)

    @property
    def represent(self) -> RepresentationOptions:
        """What was read."""
        return RepresentationOptions.model_validate(self.record["represent"])

    @property
    def digest(self) -> str:
        """Of all that the deltas depend on."""
        return hashlib.sha256(json.dumps(self.record["adapters"], sort_keys=True).encode()).hexdigest()

    @cached_property
    def probes(self) -> Probes:
        """The texts."""
        held = self._tensors(PROBES)
        scored = held["scored"].bool() if "scored" in held else None
        return Probes(held["ids"], held["mask"].bool(), scored)

    def _check(self, names: Iterable[str], *, verify: bool = True) -> None:
        problem = damage(self.folder, {name: self._files[name] for name in names if name in self._files}, verify=verify)
        if problem:
            raise AdapterError(f"{problem}: {_AGAIN}")

    def _tensors(self, name: str) -> dict[str, Tensor]:
        self._check([name])
        try:
            return load_file(self.folder / name)
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"{self.folder / name}: is damaged ({error}): {_AGAIN}") from error

    def stacked(self, names: Sequence[str]) -> Tensor:
        """Deltas ``[N, F]`` (fp32) of the named adapters, in that order."""
        missing = [name for name in names if name not in self.record["adapters"]]
        if missing:
            raise AdapterError(
                f"{self.folder}: no delta of {missing[0]} was measured ({len(missing)} missing of {len(names)}): run the measure_deltas stage of "
                "this pool again"
            )
        keys = [self.record["adapters"][name]["key"] for name in names]
        self._check(self.cache.path(key).name for key in keys)
        found = [self.cache.get(key) for key in keys]
        if any(numbers is None for numbers in found):
            raise AdapterError(f"{self.folder}: files of its manifest are gone: {_AGAIN}")
        return torch.from_numpy(np.stack([numbers for numbers in found if numbers is not None]))

    def moments(self) -> dict[str, Tensor]:
        """``E[x x^T] [L, I, I]`` of the Linears' inputs on the probes, by site."""
        if not (self.folder / MOMENTS).is_file():
            raise AdapterError(f"{self.folder}: the inputs' second moments were not measured: set `moments: true` in its measure_deltas stage")
        return self._tensors(MOMENTS)


def write_measured(
    folder: Path,
    deltas: Mapping[str, tuple[str, np.ndarray]],
    *,
    statistics: Mapping[str, Mapping[str, Any]],
    probes: Probes,
    represent: RepresentationOptions,
    facts: Mapping[str, Any],
    moments: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the artefact: ``deltas[name] = (key, numbers)``, what is known of each, probes and how they were read.

    ``moments[name] [L, I, I]`` are the second moments of the Linears' inputs, where they were measured.
    """
    cache = DeltaCache(folder)
    for key, numbers in deltas.values():
        cache.put(key, numbers)
    tensors = {"ids": probes.ids_KT, "mask": probes.mask_KT.to(torch.uint8)}
    if probes.scored_KT is not None:
        tensors["scored"] = probes.scored_KT.to(torch.uint8)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / PROBES)
    if moments is not None:
        save_file({name: t.contiguous() for name, t in moments.items()}, folder / MOMENTS)
    entries = {name: {"key": key, "file": f"{key}.npy", **statistics[name]} for name, (key, _) in deltas.items()}
    files = {name: found for name, found in listing(folder).items() if name != MANIFEST}
    cache.write_manifest({"format": FORMAT, "represent": represent.model_dump(mode="json"), **facts, "adapters": entries, "files": files})
