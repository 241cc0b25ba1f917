"""The YAML files of fla-org/hybrid-distillation (one a stage) as one recipe: ``limbeck init --from-seed``.

What those files say is kept, also where another value would be better; a key that has no counterpart is listed and not dropped.
A stage that a file goes on from (``student_init_ckpt``) and that is not given itself takes the published settings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from limbeck.config.load import load_text
from limbeck.config.yaml_nodes import decode, parse
from limbeck.errors import LimbeckError, Problem, RecipeError, did_you_mean

STAGES = {1: "align", 2: "distil", 3: "extend"}
MIXERS: dict[str, dict[str, Any]] = {
    **{f"gdn_v{n}": {"kind": "gated_deltanet", "preset": f"gdn_v{n}"} for n in range(1, 7)},
    "gla_v1": {"kind": "gla"},
    "path_v1": {"kind": "path"},
    "gsa_v1": {"kind": "gsa"},
    "swa_v1": {"kind": "swa"},
    "hgrn_v1": {"kind": "hgrn"},
}
"""`student_model.name` -> mixer."""
PUBLISHED: dict[int, dict[str, Any]] = {
    1: {
        "target_tokens": 100_000_000, "batch_size": 96, "micro_batch_size": 12, "train_seq_len": 512, "lr_scheduler_type": "cosine",
        "lr": 1e-3, "lr_attn": 1e-3,
    },
    2: {
        "target_tokens": 600_000_000, "batch_size": 32, "micro_batch_size": 2, "train_seq_len": 4096, "lr_scheduler_type": "constant",
        "lr": 7e-6, "lr_attn": 1e-4,
    },
}  # fmt: skip
"""The `train` section of the shipped configs, for a stage whose file is not given."""
CORPUS = {"kind": "hub", "path": "robbiegwaldd/dclm-10B"}
"""Text from which the published models were made."""
WEIGHT_DECAY = 0.01
"""torch's own default, which the seed's optimiser leaves as it is."""
OWNERS = {"Qwen": "Qwen", "Llama": "meta-llama"}
DIFFERENCES = (
    "grouped key/value heads are expanded by heads; the seed repeats weight rows, which scrambles every head (`gqa: rows`)",
    "biases and q/k norms of the teacher survive where the mixer has a place for them",
    "weight decay (0.01, torch's default in the seed) spares vectors, among them the mixers' forget gates",
    "`lr_attn` is the rate of the mixers; in the seed it is also that of kept attention layers and of norms with `attn` in their name",
    "align takes the seed's loss (`rms`, not squared); the default `relative_mse` weighs layers alike",
)


class _File:
    """One file's values by dotted key, taken out as they are translated; what is left has no counterpart."""

    def __init__(self, path: Path):
        self.label = str(path)
        problems: list[Problem] = []
        try:
            text = decode(path.read_bytes(), self.label, problems)
        except OSError as error:
            raise LimbeckError(f"--from-seed {path}: cannot be read ({error.strerror})") from error
        root = parse(text, self.label, problems) if text is not None else None
        if root is None or problems:
            raise RecipeError(problems)
        tree = root.plain()
        if not isinstance(tree, dict) or tree.get("stage") not in STAGES:
            found = f"`stage: {tree['stage']}`" if isinstance(tree, dict) and "stage" in tree else "no `stage`"
            raise LimbeckError(f"--from-seed {path}: {found}; a config of the seed says `stage: 1`, 2 or 3")
        self.values = _flat(tree)
        self.stage = int(self.values.pop("stage"))

    def take(self, key: str, default: Any = None) -> Any:
        """A value, which then has a counterpart; the seed writes an absent one as the word None too."""
        value = self.values.pop(key, default)
        return default if value == "None" else value

    def number(self, key: str, default: Any = None) -> Any:
        """A number, or None where neither the file nor the default has one."""
        value = self.take(key, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise LimbeckError(f"{self.label}: {key}: {value!r} is not a number")
        return value


def from_seed(paths: Sequence[Path]) -> tuple[str, list[str]]:
    """One recipe's text from a seed's files, in any order, and a line for each key without counterpart.

    The text loads with :func:`~limbeck.config.load.load_recipe`.  Raises :class:`LimbeckError` for files that are no configs of the
    seed, do not belong together, or name a student that Limbeck has no mixer for.
    """
    files = {file.stage: file for file in map(_File, paths)}
    if len(files) < len(paths):
        raise LimbeckError("--from-seed: two files are of the same stage; a recipe holds one file a stage")
    teacher = _same(files, "teacher_model.name")
    student = _same(files, "student_model.name")
    if student not in MIXERS:
        raise LimbeckError(f"student_model.name: {student!r} has no mixer here{did_you_mean(str(student), MIXERS) or ';'} known: {', '.join(MIXERS)}")
    model = hub_name(str(teacher))
    notes: list[str] = []
    if model != teacher:
        notes.append(f"teacher_model.name: {teacher}: a conversion to the seed's own format, which is not read; the recipe names {model}")
    if student == "swa_v1":
        notes.append("student_model.name: swa_v1: the seed takes the window from the teacher's config, which has none: here the default of `swa`")
    last = max(files)
    stages = {STAGES[n]: _stage(n, files, str(student), model, notes) for n in range(1, last + 1)}
    name = _name(files[last].take("train.output_dir"))
    for file in files.values():
        file.take("train.output_dir")
        notes += [f"{key}: {value}: no counterpart" for key, value in file.values.items()]
    recipe = {"name": name, "description": f"{model} with {student} mixers, translated from a config of the seed.", "stages": stages}
    text = "\n".join([*_header(paths, notes), yaml.dump(recipe, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)])
    load_text(text, label="the translated recipe")
    return text, notes


def hub_name(name: str) -> str:
    """Where the original of a teacher that was converted for the seed lives: ``converted/Qwen2.5-1.5B`` -> ``Qwen/Qwen2.5-1.5B``."""
    folder, _, model = name.rstrip("/").rpartition("/")
    owner = next((owner for start, owner in OWNERS.items() if model.startswith(start)), None)
    return f"{owner}/{model}" if owner and folder.rpartition("/")[2] in ("converted", "fla-hub") else name


def _same(files: dict[int, _File], key: str) -> Any:
    found = {file.label: file.take(key) for file in files.values()}
    if len(set(found.values())) > 1 or None in found.values():
        said = ", ".join(f"{value} in {label}" for label, value in found.items())
        raise LimbeckError(f"--from-seed: {key} must be given and the same in all files: {said}")
    return next(iter(found.values()))


def _stage(number: int, files: dict[int, _File], student: str, model: str, notes: list[str]) -> dict[str, Any]:
    """One stage of the recipe, from its file or from the published settings."""
    name, file = STAGES[number], files.get(number)
    defaults = PUBLISHED.get(number, PUBLISHED[2])

    def number_of(key: str) -> Any:
        # A file that says nothing about a number leaves it to the seed's code, which has no defaults: the published one then.
        return file.number(f"train.{key}", defaults[key]) if file else defaults[key]

    before = file.take("train.student_init_ckpt") if file else None
    if before is not None:
        given = "its file is given" if number - 1 in files else "with the published settings: give its file too for others"
        place = f"made by stage {STAGES[number - 1]} ({given})" if number > 1 else "not read: align starts at the teacher"
        notes.append(f"train.student_init_ckpt: {before}: {place}")
    length = int(number_of("train_seq_len"))
    rows = number_of("batch_size")
    lr, lr_mixers = number_of("lr"), number_of("lr_attn")
    loop: dict[str, Any] = _budget(file, defaults)
    loop |= {"batch_tokens": _count(int(rows) * length), "microbatch": int(number_of("micro_batch_size"))}
    if file and (recompute := file.take("train.gradient_checkpointing")) is not None:
        loop["activation_checkpointing"] = bool(recompute)
    data: dict[str, Any] = {"source": [dict(CORPUS)], "tokenizer": model, "sequence": length}
    if "tokens" in loop:
        data["max_tokens"] = loop["tokens"]
    kept = _kept(file, f"{name}: student_model.keep_full_attention_layers")
    if file:
        _data(file, data, notes)
    optim = {"groups": _groups(number, lr, lr_mixers, file, notes), "schedule": {"kind": _schedule(file, defaults, notes)}}
    if file and (clip := file.number("train.max_grad_norm")) is not None:
        optim["clip"] = clip
    built = {"data": data, "student": _student(number, files, student, model, kept), **_signal(number, model)}
    return {**built, "optim": optim, "loop": loop}


def _budget(file: _File | None, defaults: dict[str, Any]) -> dict[str, Any]:
    if file is not None and "train.target_tokens" not in file.values and (steps := file.number("train.max_steps")) is not None:
        return {"steps": int(steps)}
    tokens = file.number("train.target_tokens", defaults["target_tokens"]) if file else defaults["target_tokens"]
    return {"tokens": _count(int(tokens))}


def _kept(file: _File | None, what: str) -> list[int]:
    layers = file.take("student_model.keep_full_attention_layers", []) if file else []
    if not isinstance(layers, list) or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in layers):
        raise LimbeckError(f"{what}: {layers!r} is not a list of layer numbers")
    return sorted(set(layers))


def _student(number: int, files: dict[int, _File], student: str, model: str, kept: list[int]) -> dict[str, Any]:
    if number == 1:
        surgery = {"kind": "hybridize", "mixer": MIXERS[student], **({"keep": kept} if kept else {})}
        return {"base": model, "surgery": [surgery], "train": ["mixers"]}
    restored: dict[str, Any] = {"keep": kept} if kept and (number == 2 or 2 not in files) else {}
    return {"from": STAGES[number - 1], **restored, "train": ["all"]}


def _signal(number: int, model: str) -> dict[str, Any]:
    if number == 1:
        return {"teacher": {"kind": "self"}, "objectives": [{"kind": "attention_alignment", "loss": "rms"}]}
    if number == 2:
        return {"teacher": {"kind": "local", "model": model, "dtype": "bfloat16"}, "objectives": [{"kind": "kl"}]}
    return {"objectives": [{"kind": "ce"}]}


def _data(file: _File, data: dict[str, Any], notes: list[str]) -> None:
    """What a file says of its text."""
    if (folder := file.take("data.cache_dir")) is not None:
        notes.append(
            f"data.cache_dir: {folder}: tokens chunked beforehand, which are not read; the recipe prepares its own from "
            f"{CORPUS['path']}: put your text into `data.source`"
        )
    if (append := file.take("train.add_eos_token")) is not None:
        data["append_eos"] = bool(append)
    if file.values.get("train.max_length") == data["sequence"]:
        file.take("train.max_length")
    if "train.resume_from_checkpoint" in file.values:
        resume = file.values.pop("train.resume_from_checkpoint")
        notes.append(f"train.resume_from_checkpoint: {resume}: no counterpart: a run that was interrupted goes on from its newest checkpoint")


def _groups(number: int, lr: Any, lr_mixers: Any, file: _File | None, notes: list[str]) -> list[dict[str, Any]]:
    mixers = {"role": "mixers", "lr": float(lr_mixers), "weight_decay": WEIGHT_DECAY}
    if number > 1:
        return [mixers, {"role": "rest", "lr": float(lr), "weight_decay": WEIGHT_DECAY}]
    if file is not None and lr != lr_mixers:
        notes.append(f"train.lr: {lr}: acts on nothing in stage 1, where the mixers alone train, at `lr_attn`")
    return [mixers]


def _schedule(file: _File | None, defaults: dict[str, Any], notes: list[str]) -> str:
    kind = file.take("train.lr_scheduler_type", defaults["lr_scheduler_type"]) if file else defaults["lr_scheduler_type"]
    if kind in ("cosine", "constant"):
        return str(kind)
    notes.append(f"train.lr_scheduler_type: {kind}: no counterpart; the recipe says cosine")
    return "cosine"


def _name(output_dir: Any) -> str:
    """A run's name from where the seed's checkpoints went: ``checkpoints/NAME/stage2`` -> ``NAME``."""
    parts = [part for part in str(output_dir or "").split("/") if part and not re.fullmatch(r"stage[123]", part)]
    name = re.sub(r"[^A-Za-z0-9._-]", "_", parts[-1]).lstrip("._-")[:64] if parts else ""
    return name or "from_seed"


def _header(paths: Sequence[Path], notes: list[str]) -> list[str]:
    lines = [f"# Translated by `limbeck init --from-seed` from {', '.join(path.name for path in paths)}."]
    if notes:
        lines += ["#", "# Without a counterpart, or not as it was:", *(f"#   {note}" for note in notes)]
    lines += ["#", "# What Limbeck does otherwise:", *(f"#   {difference}" for difference in DIFFERENCES)]
    return [line.replace("\n", " ").replace("\r", " ") for line in lines]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _count(value: int) -> int | str:
    """A number as recipes write it: ``600M``."""
    for unit, suffix in ((10**9, "B"), (10**6, "M")):
        if value >= unit and value % unit == 0:
            return f"{value // unit}{suffix}"
    return value


class _Dumper(yaml.SafeDumper):
    """Without anchors: a mapping that occurs twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
