"""What the stages about adapters share: their conditions, base, pool and generator, found in a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from limbeck.adapters.delta_store import MeasuredDeltas
from limbeck.adapters.peft_files import read_base, read_peft_file, read_provenance
from limbeck.adapters.pool import Pool, pool_of_folders, read_pool
from limbeck.adapters.spec import Adapters
from limbeck.config.base import From
from limbeck.config.parts.stages import StudentOptions
from limbeck.config.parts.surgeries import SURGERIES, DeltaPredictorOptions, LoraGeneratorOptions
from limbeck.config.parts.teachers import AdaptersTeacherOptions
from limbeck.config.recipe import CONDITION_STAGES
from limbeck.data.conditions.store import ConditionSet
from limbeck.data.tokenizer import encode, prefix_ids
from limbeck.errors import RunError
from limbeck.models.loading import fingerprint, load_model, load_tokenizer, resolve_source
from limbeck.models.vocabulary import compare_vocabularies
from limbeck.needs import Need
from limbeck.stages.context import StageContext
from limbeck.students.generator.predictor import DeltaPredictor
from limbeck.students.generator.student import ConditionedStudent, GeneratorStudent, is_generator, read_record, read_weights
from limbeck.teachers.adapters import AdaptersTeacher


def conditions_stage(context: StageContext, data: Any) -> str | None:
    """The prepare_conditions or prepare_trajectories stage that a stage's data comes from, if it does."""
    while isinstance(data, From):
        stage: Any = context.stage_options(data.from_)
        if stage.kind in CONDITION_STAGES:
            return data.from_
        data = getattr(stage, "data", None)
    return None


def open_conditions(context: StageContext, stage: str) -> ConditionSet:
    """The conditions of a finished prepare_conditions or prepare_trajectories stage."""
    return ConditionSet(context.artefact(stage, "conditions"))


READERS = ("lora_generator", "delta_predictor")
"""Surgeries that make students which read conditions."""


def reader_options(options: StudentOptions) -> LoraGeneratorOptions | DeltaPredictorOptions | None:
    """The surgery that makes a student a reader of conditions, if it is one; it stands alone."""
    kinds = [part.kind for part in options.surgery]
    found = [part for part in options.surgery if part.kind in READERS]
    if not found:
        return None
    if len(kinds) > 1:
        raise RunError(
            f"student.surgery: '{found[0].kind}' stands alone, and {', '.join(k for k in kinds if k != found[0].kind) or 'another'} stands beside it: "
            "make that student in a stage of its own and name it by `base: {from: STAGE}`"
        )
    return found[0]


def reads_conditions(context: StageContext, options: StudentOptions) -> bool:
    """Whether a student reads conditions: by its surgery, or because the one that it goes on from does."""
    if options.from_ is not None:
        return is_generator(context.locate(From.model_validate({"from": options.from_})))
    return reader_options(options) is not None


def base_record(source: str, recorded: str, revision: str | None = None) -> dict[str, Any]:
    """Where a base comes from, as adapters and generators remember it."""
    return {"source": recorded if recorded.startswith("builtin:") else source, "fingerprint": fingerprint(source, revision)}


def load_base(source: str, *, dtype: torch.dtype, revision: str | None = None, conditions: ConditionSet | None = None) -> Any:
    """The frozen base, and a check that the conditions' ids mean its tokens."""
    model = load_model(source, dtype=dtype, revision=revision)
    if conditions is not None:
        compare_vocabularies(load_tokenizer(str(conditions.tokenizer)), load_tokenizer(source), names=("the conditions", f"the base {source}"))
    return model


def base_dtype(surgery: Any, dtype: torch.dtype) -> torch.dtype:
    """Weights' dtype of a frozen base: what the surgery says, but for checks in float64."""
    return torch.bfloat16 if surgery.base_dtype == "bfloat16" and dtype == torch.float32 else dtype


def build_reader(
    context: StageContext, options: StudentOptions, conditions: ConditionSet, *, seed: int, dtype: torch.dtype, deltas: MeasuredDeltas | None
) -> ConditionedStudent:
    """The generator or predictor of a train stage: a new one, or that of another stage."""
    if options.from_ is not None:
        return open_reader(context, Path(context.locate(From.model_validate({"from": options.from_}))), conditions, dtype=dtype)
    surgery = reader_options(options)
    if surgery is None or options.base is None:
        raise RunError(f"stage '{context.name}': a student that reads conditions needs `student.base` and a surgery: {' or '.join(READERS)}")
    source = context.locate(options.base)
    facts = {
        "text_shape": (conditions.manifest.texts, conditions.manifest.tokens),
        "base": base_record(source, options.base if isinstance(options.base, str) else source, options.revision),
        "tokenizer": load_tokenizer(str(conditions.tokenizer)),
        "encoder": None if surgery.encoder is None else resolve_source(surgery.encoder, context.recipe_dir),
    }
    model = load_base(source, dtype=base_dtype(surgery, dtype), revision=options.revision, conditions=conditions)
    start = start_adapter(context, surgery.start, facts["base"]) if isinstance(surgery, LoraGeneratorOptions) and surgery.start is not None else None
    known = None
    if isinstance(surgery, DeltaPredictorOptions):
        if deltas is None:
            raise RunError(f"stage '{context.name}': 'delta_predictor' learns measured deltas: give `teacher: {{kind: adapters, deltas: {{from: STAGE}}}}`")
        known = deltas.stacked(list(deltas.record["adapters"]))
        facts["size"] = known.shape[1]
    # Random numbers come from the seed alone; the global generator is left as it was.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(surgery, DeltaPredictorOptions):
            predictor = DeltaPredictor(model, surgery, **facts)
            assert known is not None
            predictor.head.begin_at(known)
            return predictor
        student = GeneratorStudent(model, surgery, **facts)
        if start is not None:
            student.generator.begin_as(start)
    return student


def start_adapter(context: StageContext, start: str | From, base: Mapping[str, Any]) -> Adapters:
    """The LoRA that a generator on ``base`` begins as: a PEFT folder, or what a static generator has learnt."""
    folder = Path(context.locate(start))
    if not is_generator(folder):
        adapter = read_peft_file(folder)
        check_made_for(folder, base)
        return adapter
    record = read_record(folder)
    if record["options"]["condition"] != "none":
        raise RunError(f"stage '{context.name}': surgery.start names a generator that reads conditions: name one with `condition: none`, or a PEFT folder")
    if record["base"]["fingerprint"] != base["fingerprint"]:
        raise RunError(
            f"stage '{context.name}': surgery.start was trained on {record['base']['source']}, whose files are not those of {base['source']}: adapters fit "
            "the weights that they were made for"
        )
    return static_adapter(open_generator(context, folder, None, dtype=torch.float32))


def static_adapter(student: GeneratorStudent) -> Adapters:
    """The one LoRA of a generator with ``condition: none``."""
    with torch.no_grad():
        return student.generate(torch.full((1, 1, 1), -1)).detach()


def open_reader(
    context: StageContext, folder: Path, conditions: ConditionSet | None, *, dtype: torch.dtype, beside: ConditionedStudent | None = None
) -> ConditionedStudent:
    """A saved generator or predictor on its base, which is checked to be the one that it was trained with.

    It shares the base of ``beside`` where that is the same in the same dtype: a base may be as large as a device.
    """
    record = read_record(folder)
    options = SURGERIES.options(record["options"]["kind"]).model_validate({**record["options"], **({"start": None} if "start" in record["options"] else {})})
    source = checked_source(record["base"], folder)
    tokenizer = conditions.tokenizer if conditions is not None else folder
    facts = {
        "text_shape": tuple(record["text_shape"]),
        "base": record["base"],
        "tokenizer": load_tokenizer(str(tokenizer)),
        "encoder": None if options.encoder is None else resolve_source(options.encoder, context.recipe_dir),  # type: ignore[attr-defined]
        **({"size": record["size"]} if "size" in record else {}),
    }
    stored = base_dtype(options, dtype)
    if beside is not None and beside.base["fingerprint"] == record["base"]["fingerprint"] and beside.model.dtype == stored:
        model = beside.model
    else:
        model = load_base(source, dtype=stored, revision=record["base"]["fingerprint"].get("commit"), conditions=conditions)
    with torch.random.fork_rng():
        student: ConditionedStudent = SURGERIES.implementation(record["options"]["kind"])(model, options, **facts)
    read_weights(folder, student.trained)
    return student


def open_generator(
    context: StageContext, folder: Path, conditions: ConditionSet | None, *, dtype: torch.dtype, beside: ConditionedStudent | None = None
) -> GeneratorStudent:
    """:func:`open_reader` of what must be a generator."""
    student = open_reader(context, folder, conditions, dtype=dtype, beside=beside)
    if not isinstance(student, GeneratorStudent):
        raise RunError(f"stage '{context.name}': {folder} holds a predictor of deltas, which generates no LoRA: name a generator")
    return student


def condition_of(texts: list[str], tokenizer: Any, num_texts: int, num_tokens: int) -> torch.Tensor:
    """Texts as a generator reads them, int64 ``[1, S, C]``, padded with -1; more than S texts, or a text of no token, is an error."""
    if len(texts) > num_texts:
        raise RunError(f"{len(texts)} prompts, and this generator reads at most {num_texts}: give fewer")
    ids = torch.full((1, num_texts, num_tokens), -1)
    for row, text in enumerate(texts):
        found = encode(tokenizer, [text])[0]
        if not found:
            raise RunError(f"prompt {row + 1} has no token: give text")
        found = [*prefix_ids(tokenizer), *found][:num_tokens]
        ids[0, row, : len(found)] = torch.tensor(found)
    return ids


def checked_source(record: dict[str, Any], who: Path) -> str:
    """Folder or hub name of a recorded base; refused when its files have changed since."""
    source = resolve_source(record["source"])
    now = fingerprint(source, record["fingerprint"].get("commit"))
    changed = [field for field in record["fingerprint"] if record["fingerprint"][field] != now.get(field)]
    if changed:
        raise RunError(
            f"{who}: the base {record['source']} has changed since ({', '.join(changed)}): adapters fit the weights that they were made for; "
            "put the old files back, or train them again"
        )
    return source


def open_pool(context: StageContext, pool: From | dict[str, str], base: dict[str, Any] | None = None) -> Pool:
    """The pool of a finished train_adapters stage, or PEFT folders by the name of their condition."""
    if isinstance(pool, From):
        return read_pool(context.artefact(pool.from_, "adapters"))
    folders = {name: (context.recipe_dir / Path(path).expanduser()) for name, path in pool.items()}
    missing = [str(path) for path in folders.values() if not path.is_dir()]
    if missing:
        raise RunError(f"stage '{context.name}': pool: {missing[0]}: no such folder (looked from {context.recipe_dir})")
    for folder in folders.values() if base else ():
        check_made_for(folder, base or {})
    return pool_of_folders(folders, base or {})


def check_made_for(folder: Path, base: Mapping[str, Any]) -> None:
    """Refuse a PEFT folder that says that it was trained on other weights; one from elsewhere says nothing of them."""
    told = read_provenance(folder).get("base")
    told = told if isinstance(told, dict) else {}
    changed = [field for field in told if field in base["fingerprint"] and told[field] != base["fingerprint"][field]]
    if changed:
        raise RunError(
            f"{folder}: was trained on {read_base(folder)}, whose files ({', '.join(changed)}) are not those of the base {base['source']} here: adapters "
            "fit the weights that they were made for"
        )


def entries_of(pool: Pool, conditions: ConditionSet) -> dict[int, list[int]]:
    """Numbers of the pool's entries by the number of their condition; a pool for other conditions is refused."""
    known = {condition.name: condition.id for condition in conditions.conditions}
    found = {known[name]: numbers for name, numbers in pool.of_conditions().items() if name in known}
    if not found:
        names = ", ".join(list(pool.of_conditions())[:3])
        raise RunError(
            f"{pool.folder}: none of its adapters belongs to one of these conditions (it has {names}, ...), it was trained on others: "
            "name the pool of these conditions"
        )
    return found


def measured_deltas(context: StageContext, teacher: Any) -> MeasuredDeltas | None:
    """The deltas that a teacher's options name, if they do."""
    named = getattr(teacher, "deltas", None)
    return None if named is None else MeasuredDeltas(context.artefact(named.from_, "deltas"))


def build_adapters_teacher(
    context: StageContext, options: AdaptersTeacherOptions, conditions: ConditionSet, student: ConditionedStudent, needs: dict[type[Need], Need]
) -> AdaptersTeacher:
    """The pool as teacher, checked to be of the student's base; nothing is loaded."""
    pool = open_pool(context, options.pool, student.base)
    deltas = measured_deltas(context, options)
    for what, base in (("pool", pool.base), ("deltas", deltas.record["base"] if deltas else student.base)):
        if base["fingerprint"] != student.base["fingerprint"]:
            raise RunError(
                f"stage '{context.name}': teacher.{what} was made with the base {base['source']}, whose files are not those of the student's base "
                f"{student.base_source}: adapters fit the weights that they were made for"
            )
    entries, seen = entries_of(pool, conditions), conditions.split("seen")
    lacking = [conditions.conditions[i].name for i in seen if i not in entries]
    if lacking:
        raise RunError(
            f"stage '{context.name}': {pool.folder}: there is no adapter of {lacking[0]} ({len(lacking)} of {len(seen)} seen conditions have none): train "
            "their teachers, or leave those conditions out"
        )
    return AdaptersTeacher(
        options,
        pool,
        entries,
        needs=needs,
        base_source=resolve_source(student.base_source),
        base_revision=student.base_revision,
        deltas=deltas,
    )

