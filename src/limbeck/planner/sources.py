"""Where a model's config comes from: the table, a folder, the hub's cache, a file that is named, or the stage that makes it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import limbeck
from limbeck.config.base import From
from limbeck.config.load import load_recipe, shipped_recipes
from limbeck.config.parts.surgeries import SURGERIES
from limbeck.config.recipe import Recipe
from limbeck.errors import did_you_mean
from limbeck.planner.architecture import Architecture, read_architecture
from limbeck.planner.devices import PlanError
from limbeck.planner.students import Student, operate, plain, restored
from limbeck.planner.texts import Text, text_of

PACKAGE = Path(limbeck.__file__).parent
_RUN = re.compile(r"runs/([A-Za-z0-9._-]+)/([A-Za-z0-9._-]+)/(?:model|export/.+)")
"""A folder that a run of a shipped recipe leaves behind."""


@cache
def table() -> dict[str, dict[str, Any]]:
    """The configs of public models, by their names on the hub: the fields that matter for sizes."""
    return json.loads((PACKAGE / "planner" / "models.json").read_text(encoding="utf-8"))


class Models:
    """Configs by source.  ``given`` holds those that a user names by hand."""

    def __init__(self, folder: Path | None = None, given: Mapping[str, Path] | None = None):
        self.folder = folder or Path.cwd()
        self.given = dict(given or {})

    def config(self, source: str) -> dict[str, Any]:
        """The config of a folder, a file, ``builtin:NAME`` or a hub name; :class:`PlanError` says how to give one that is not known."""
        if source in self.given:
            return _read(self.given[source])
        if source.startswith("builtin:"):
            place = PACKAGE / "builtin" / source.removeprefix("builtin:")
            if not (place / "config.json").is_file():
                known = sorted(path.name for path in (PACKAGE / "builtin").iterdir() if path.is_dir())
                raise PlanError(f"no built-in {source.removeprefix('builtin:')!r}; built in: {', '.join(known)}")
            return _read(place / "config.json")
        for root in (self.folder, Path.cwd()):
            place = root / Path(source).expanduser()
            if place.is_file() and place.suffix == ".json":
                return _read(place)
            if place.is_dir():
                if (place / "generator.json").is_file() and not (place / "config.json").is_file():
                    raise PlanError(f"{source}: is a saved LoRA generator, not a model: name its base, or plan the recipe that trains it")
                return _read(place / "config.json")
        if (known_config := table().get(source) or _by_short_name(source)) is not None:
            return known_config
        if (cached := _cached(source)) is not None:
            return _read(cached)
        if source.startswith((".", "/", "~")):
            raise PlanError(f"{source}: no such folder (looked from {self.folder}): give the folder of a model, or --config {source}=FILE")
        hint = did_you_mean(source, table()) or ""
        raise PlanError(
            f"{source}: its config is not known{hint}: it is in neither the built-in table ({', '.join(sorted(table()))}) nor the Hugging Face "
            f"cache; give its config.json by --config {source}=FILE, or name a folder that has one"
        )

    def architecture(self, source: str) -> Architecture:
        """The model of a source, with no surgery that its config may remember."""
        return read_architecture(self.config(source), source)

    def student(self, source: str) -> Student:
        """The model of a source, with the surgeries that a folder of ours remembers."""
        values = self.config(source)
        found = plain(read_architecture(values, source))
        section = values.get("limbeck")
        parts = section.get("surgery", ()) if isinstance(section, Mapping) else ()
        options = [SURGERIES.options(part["kind"]).model_validate(part) for part in parts if isinstance(part, Mapping) and "kind" in part]
        return operate(found, options) if options else found


def quantisation(values: Mapping[str, Any]) -> str | None:
    """The dtype in which a checkpoint's files hold its Linears, if that is not a plain one: ``fp8`` or ``int4``."""
    section = values.get("quantization_config")
    method = str(section.get("quant_method", "")) if isinstance(section, Mapping) else ""
    return "fp8" if "fp8" in method else "int4" if method in ("awq", "gptq", "compressed-tensors") else None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(f"{path.parent}: has no {path.name}: name the folder of a model, or its config.json") from None
    except (OSError, ValueError) as error:
        raise PlanError(f"{path}: cannot be read as JSON ({error}): put the original config.json back") from None
    if not isinstance(values, dict):
        raise PlanError(f"{path}: is no JSON object: a model's config.json is needed")
    return values


def config_file(path: Path) -> Path:
    """A model's config.json, or that of its folder.  Raises :class:`PlanError` where there is none."""
    expanded = path.expanduser()
    file = expanded / "config.json" if expanded.is_dir() else expanded
    if not file.is_file():
        raise PlanError(f"--config: {path}: no such file: give the model's config.json, or the folder that has it")
    return file


def _by_short_name(source: str) -> dict[str, Any] | None:
    """A model of the table without its organisation."""
    return next((values for name, values in table().items() if name.split("/")[1].lower() == source.lower()), None)


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloads, by the rules of its documentation."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()


def _cached(source: str) -> Path | None:
    """The newest config.json of a hub name in the Hugging Face cache, which is only looked at."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        return None
    found = list((hub_cache() / f"models--{source.replace('/', '--')}" / "snapshots").glob("*/config.json"))
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


class Chain:
    """The stages of a recipe as far as they say what a model is and what it reads."""

    def __init__(self, recipe: Recipe, models: Models, tokens: float | None = None):
        self.recipe, self.models, self.tokens = recipe, models, tokens
        self._students: dict[str, Student] = {}

    def text(self, data: Any) -> Text:
        """What a stage reads."""
        return text_of(self.recipe, data, self.tokens)

    def source(self, source: Any) -> Student:
        """A model source of an option: ``{from: stage}``, a folder, a name."""
        if isinstance(source, From):
            return self.student(source.from_)
        made = _RUN.fullmatch(str(source))
        if made and not (self.models.folder / source).is_dir() and not Path(source).is_dir() and made[1] in shipped_recipes():
            # It is not there yet; the recipe that will make it is.
            return Chain(load_recipe(made[1]), self.models).student(made[2])
        return self.models.student(str(source))

    def student(self, stage: str) -> Student:
        """The student that a stage trains or hands on."""
        if stage not in self._students:
            options = self.recipe.stages[stage]
            if options.kind == "train":
                self._students[stage] = self._trained(options)
            elif isinstance(getattr(options, "from_", None), str):
                self._students[stage] = self.student(options.from_)
            else:
                raise PlanError(f"stage '{stage}' is of kind {options.kind}: it makes no model; name a train stage")
        return self._students[stage]

    def _trained(self, options: Any) -> Student:
        student = options.student
        if student.config is not None:
            return plain(read_architecture(student.config, f"{student.config.get('model_type', 'a model')} from scratch"))
        if student.from_ is not None:
            found = self.student(student.from_)
            if student.keep is not None:
                found = restored(found, self._kept(student.keep, found))
        else:
            found = self.source(student.base)
        if not student.surgery:
            return found
        text = self.text(options.data)
        sentence = next((s.encoder for s in student.surgery if getattr(s, "encoder", None)), None)
        size = None
        if sentence is not None:
            try:
                size = self.models.config(str(sentence)).get("hidden_size")
            except PlanError:
                size = None
        return operate(found, student.surgery, sites_text=text.condition, delta_size=self._delta(options, found), state_size=size)

    def _kept(self, keep: Any, student: Student) -> tuple[int, ...] | str:
        if not isinstance(keep, From):
            return keep
        # Which layers a ranking will choose is not known; layers of one kind cost the same.
        count, layers = self.recipe.stages[keep.from_].keep, len(student.architecture.layers)
        return tuple(range(layers - min(count, layers), layers))

    def _delta(self, options: Any, base: Student) -> int:
        """Numbers of a delta that a stage's teacher measured; 0 where there is none."""
        named = getattr(options.teacher, "deltas", None)
        if not isinstance(named, From):
            return 0
        stage = self.recipe.stages[named.from_]
        shape = stage.resolved_represent
        width = (shape.projection or base.architecture.hidden) * (len(shape.layers) if shape.join == "concat" else 1)
        return width * (probe_count(stage.resolved_probes) if shape.per_probe else 1) * (stage.resolved_probes.length if shape.tokens == "all" else 1)


def probe_count(probes: Any) -> int:
    """Texts on which behaviour is measured."""
    return probes.count or {"generic": 5, "conditions": 32, "texts": len(probes.texts), "diverse": 16, "domain": 5}[probes.kind]
