"""LoRAs as folders in PEFT's format, which peft, transformers and vLLM load.

A folder holds ``adapter_model.safetensors``, ``adapter_config.json`` and ``limbeck.json`` (where the adapter came from; the same stands
in the metadata of the safetensors file, since peft complains about foreign fields in its config).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from limbeck.adapters.keys import peft_key, split_peft_key
from limbeck.adapters.peft_config import CONFIG, PeftConfig, config_fields, read_config
from limbeck.adapters.spec import Adapters, AdapterSpec, Site
from limbeck.adapters.targets import linears_of
from limbeck.errors import AdapterError, did_you_mean
from limbeck.files import put_in_place

WEIGHTS = "adapter_model.safetensors"
PROVENANCE = "limbeck.json"
_README = "README.md"
"""peft's own writer leaves one."""
Factors = Mapping[str, tuple[Tensor, Tensor]]
"""``{path: (A [R, I], B [O, R])}``."""


def write_peft(
    adapters: Adapters,
    index: int,
    folder: Path,
    *,
    base: str | None,
    provenance: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    as_parameters: Collection[str] = (),
) -> None:
    """Write adapter ``index`` as a folder, complete or not at all; a folder with an adapter is replaced.

    Args:
        base: the model it is for, as peft should find it: a folder or a name on the hub.
        provenance: what it was made from, as JSON: condition, generator, teacher.
        dtype: of the stored factors.
        as_parameters: paths of Linears that peft must be told of by their weight (:func:`~limbeck.adapters.peft_experts.taken_for_experts`).

    Raises:
        AdapterError: numbers that are not finite, a folder that holds other things, or a place where none can be made.
    """
    folder = Path(folder)
    _refuse_strangers(folder)
    tensors = _tensors(adapters, index, dtype)
    story = json.dumps(dict(provenance), sort_keys=True, ensure_ascii=False)
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise AdapterError(f"{folder}: no folder can be made there ({error.strerror}): name another place") from error
    try:
        save_file(tensors, beside / WEIGHTS, metadata={"format": "pt", "limbeck": story})
        for name, value in ((CONFIG, config_fields(adapters.spec, base, as_parameters)), (PROVENANCE, json.loads(story))):
            (beside / name).write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        put_in_place(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def read_peft(folder: Path, model: nn.Module) -> Adapters:
    """The adapter in a folder (N = 1) for a model: every tensor is used, every expected one is there, every shape fits.

    Linears of different rank are filled with zeros to the largest; where rank or alpha differ, the scales go into B and the spec's
    is 1.  Factors are given in fp32 at least.

    Raises:
        AdapterError: what the folder holds is more than a LoRA on Linears of layers, damaged, or made for another model.
    """
    config, factors = _read(Path(folder))
    _check_targets(config, factors, model)
    return _stack(config, factors, model)


def read_peft_file(folder: Path) -> Adapters:
    """The adapter in a folder (N = 1) by its tensors alone.

    The names of its sites are those of :func:`read_peft` except for models with several lists of layers, or with Linears of one name
    and several shapes, of which the adapter changes only one.
    """
    config, factors = _read(Path(folder))
    return _stack(config, factors, _skeleton({path: (A.shape[1], B.shape[0]) for path, (A, B) in factors.items()}))


def read_base(folder: Path) -> str | None:
    """The base model that a folder's adapter names."""
    return read_config(Path(folder)).base


def read_as_parameters(folder: Path) -> tuple[str, ...]:
    """Paths of Linears that a folder's config names by their weight."""
    return read_config(Path(folder)).as_parameters


def read_provenance(folder: Path) -> dict[str, Any]:
    """What :func:`write_peft` was told about the adapter; empty for adapters of other origin."""
    with _opened(Path(folder)) as file:
        text = (file.metadata() or {}).get("limbeck", "{}")
    try:
        story = json.loads(text)
    except ValueError:
        story = None
    if not isinstance(story, dict):
        raise AdapterError(f"{Path(folder) / WEIGHTS}: where it came from cannot be read ({text[:60]!r} in its metadata): put an intact copy back")
    return story


def _tensors(adapters: Adapters, index: int, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for site in adapters.spec.sites:
        for factor, stacked in (("A", adapters.A[site.name]), ("B", adapters.B[site.name])):
            rows = stacked.detach()[index].to("cpu", dtype)
            if not rows.isfinite().all():
                raise AdapterError(f"{factor} of {site.name} holds numbers that are not finite{_as(dtype)}: the adapter is broken, and not written")
            # Copies in plain order: safetensors refuses rows that share one storage, and transposed ones.
            tensors |= {peft_key(path, factor): row.clone(memory_format=torch.contiguous_format) for path, row in zip(site.paths(), rows, strict=True)}
    return tensors


def _as(dtype: torch.dtype) -> str:
    return "" if dtype == torch.float32 else f" as {str(dtype).removeprefix('torch.')}"


def _refuse_strangers(folder: Path) -> None:
    """Never replace a folder with more in it than an adapter."""
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"{folder} is a file: name a folder to write the adapter to")
    strangers = sorted({path.name for path in folder.iterdir()} - {CONFIG, WEIGHTS, PROVENANCE, _README}) if folder.exists() else []
    if strangers:
        raise AdapterError(f"{folder} holds other things ({', '.join(strangers[:3])}), and an adapter replaces the folder: name another one")


def _opened(folder: Path) -> Any:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        way_out = "; adapter_model.bin is a pickle, which is not opened: load it with peft and save it again" if pickled else ""
        raise AdapterError(f"{folder} holds no {WEIGHTS}{way_out or ': put an intact copy back'}")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: cannot be read ({error}): put an intact copy back") from error


def _read(folder: Path) -> tuple[PeftConfig, Factors]:
    config = read_config(folder)
    found: dict[str, dict[str, Tensor]] = {}
    with _opened(folder) as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            path, factor = split_peft_key(key)
            found.setdefault(path, {})[factor] = file.get_tensor(key)
    if not found:
        raise AdapterError(f"{folder / WEIGHTS} holds no tensor: put an intact copy back")
    for path, pair in found.items():
        _check_pair(path, pair, config.rank(path), folder)
    return config, {path: (pair["A"], pair["B"]) for path, pair in sorted(found.items(), key=lambda item: _natural(item[0]))}


def _check_pair(path: str, pair: Mapping[str, Tensor], rank: int, folder: Path) -> None:
    missing = {"A", "B"} - set(pair)
    if missing:
        raise AdapterError(f"{folder / WEIGHTS}: {peft_key(path, missing.pop())} is not there, and its other factor is: put an intact copy back")
    A, B = pair["A"], pair["B"]
    if not (A.is_floating_point() and B.is_floating_point()):
        kinds = " and ".join(str(t.dtype).removeprefix("torch.") for t in (A, B))
        raise AdapterError(f"{folder / WEIGHTS}: the factors of {path} are {kinds}: quantised ones cannot be read, save them as floating-point numbers")
    if A.ndim != 2 or B.ndim != 2:
        raise AdapterError(f"{folder / WEIGHTS}: the factors of {path} are {list(A.shape)} and {list(B.shape)}: a LoRA on a convolution, not on a Linear")
    if (A.shape[0], B.shape[1]) != (rank, rank):
        shapes = f"{list(A.shape)} and {list(B.shape)}"
        raise AdapterError(f"{folder / WEIGHTS}: the factors of {path} are {shapes}, and {CONFIG} says rank {rank}: put intact copies back")


def _check_targets(config: PeftConfig, factors: Factors, model: nn.Module) -> None:
    wanted = set(config.targets(model))
    modules = dict(model.named_modules())
    for path in sorted(wanted, key=_natural):
        if not isinstance(modules[path], nn.Linear):
            raise AdapterError(f"{config.folder}: {path or 'the whole'} is a {type(modules[path]).__name__} of this model, and a target must be a Linear")
    for odd, problem in (
        (set(factors) - set(modules), "is not there in this model: the adapter was made for another"),
        (wanted - set(factors), f"should be changed by what {CONFIG} says, and {WEIGHTS} has no factors for it"),
        (set(factors) - wanted, f"has factors in {WEIGHTS}, and {CONFIG} does not name it as a target"),
    ):
        if odd:
            first = min(odd, key=_natural)
            near = did_you_mean(first, modules) if first not in modules else ""
            raise AdapterError(f"{config.folder}: {first} {problem}{near} ({len(odd)} such)")


def _stack(config: PeftConfig, factors: Factors, model: nn.Module) -> Adapters:
    sites = _sites(config, factors, linears_of(model))
    settings = {(config.rank(path), config.alpha(path)) for path in factors}
    if len(settings) == 1:
        rank, alpha = settings.pop()
        spec = AdapterSpec(sites, rank, alpha, config.rslora)
    else:
        rank = max(rank for rank, _ in settings)
        spec = AdapterSpec(sites, rank, alpha=rank)
    A: dict[str, Tensor] = {}
    B: dict[str, Tensor] = {}
    wide = torch.float64 if any(t.dtype == torch.float64 for pair in factors.values() for t in pair) else torch.float32
    for site in sites:
        A[site.name] = torch.zeros(1, len(site.layers), rank, site.in_features, dtype=wide)
        B[site.name] = torch.zeros(1, len(site.layers), site.out_features, rank, dtype=wide)
        for row, path in enumerate(site.paths()):
            a, b = factors[path]
            A[site.name][0, row, : len(a)] = a
            # Exactly 1 where the spec's own scale is the Linear's.
            B[site.name][0, row, :, : len(a)] = b.to(wide) * (config.scale(path) / spec.scale)
    return Adapters(spec, A, B)


def _sites(config: PeftConfig, factors: Factors, known: list[Site]) -> tuple[Site, ...]:
    """The model's sites, each with the layers that the file changes."""
    shapes = {path: (site.in_features, site.out_features) for site in known for path in site.paths()}
    for path, (A, B) in factors.items():
        if path not in shapes:
            raise AdapterError(f"{config.folder}: {path} is outside the model's lists of layers: train the adapter without it among its targets")
        if (A.shape[1], B.shape[0]) != shapes[path]:
            raise AdapterError(
                f"{config.folder}: the adapter changes {path} as {A.shape[1]} -> {B.shape[0]}, and it is {shapes[path][0]} -> {shapes[path][1]} "
                "here: it was made for another model"
            )
    changed = [
        replace(site, layers=tuple(layer for layer, path in zip(site.layers, site.paths(), strict=True) if path in factors))
        for site in known
    ]
    return tuple(site for site in changed if site.layers)


def _skeleton(shapes: Mapping[str, tuple[int, int]]) -> nn.Module:
    """A module tree with Linears of these shapes at these paths, without weights."""
    root = nn.Module()
    for path, (size_in, size_out) in shapes.items():
        node = root
        *parents, name = path.split(".")
        for parent in parents:
            if not hasattr(node, parent):
                node.add_module(parent, nn.Module())
            node = node.get_submodule(parent)
        node.add_module(name, nn.Linear(size_in, size_out, bias=False, device="meta"))
    return root


def _natural(path: str) -> list[tuple[bool, int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"\.", path)]
