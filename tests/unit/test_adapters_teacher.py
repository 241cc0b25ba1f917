"""The pool as teacher: every row is answered by an adapter of its own condition."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from adapter_cases import base_folder, peft_folders, random_adapters, small_spec
from families import packed_batch
from limbeck.adapters.delta_store import MeasuredDeltas, adapter_key, write_measured
from limbeck.adapters.peft_files import write_peft
from limbeck.adapters.pool import Entry, Pool, read_pool, write_pool
from limbeck.adapters.spec import Adapters
from limbeck.config.parts.adapters import RepresentationOptions
from limbeck.config.parts.teachers import AdaptersTeacherOptions
from limbeck.errors import AdapterError, TeacherError
from limbeck.models.loading import load_model
from limbeck.needs import AdapterFactors, Deltas, HeadHidden, InputMoments, Need
from limbeck.stages.probing import padded
from limbeck.teachers.adapters import AdaptersTeacher
from limbeck.types import Batch

NAMES = ("zero", "two", "three-a", "three-b", "three-c")
ENTRIES: Mapping[int, list[int]] = {0: [0], 2: [1], 3: [2, 3, 4]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("teacher") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> Adapters:
    return random_adapters(small_spec(load_model(str(base))), len(NAMES), dtype=torch.float32)


@pytest.fixture
def pool(tmp_path: Path, base: Path, adapters: Adapters) -> Pool:
    """Five adapters on disk; of the fourth condition there are three."""
    folder = tmp_path / "pool"
    folder.mkdir()
    peft_folders(folder, base, adapters, NAMES)
    write_pool(Pool(folder, tuple(Entry(name, name.partition("-")[0], name) for name in NAMES), {"source": str(base), "fingerprint": {}}))
    return read_pool(folder)


def measured(folder: Path, adapters: Adapters | None, names: tuple[str, ...] = NAMES) -> MeasuredDeltas:
    """Deltas that are the entries' numbers, of these adapters (of whole models for None)."""
    keys = [f"model-{name}" if adapters is None else adapter_key(adapters, i, "measuring") for i, name in enumerate(names)]
    found = {name: (keys[i], np.full(4, float(i), dtype=np.float32)) for i, name in enumerate(names)}
    folder.mkdir()
    write_measured(
        folder, found, statistics={name: {} for name in names}, probes=padded([[5, 6, 7], [8]]), represent=RepresentationOptions(tokens="last"),
        facts={"base": {}, "measuring": "measuring"},
    )  # fmt: skip
    return MeasuredDeltas(folder)


def teacher_of(pool: Pool, base: Path, *needs: type[Need], deltas: MeasuredDeltas | None = None, load: bool = True) -> AdaptersTeacher:
    options = AdaptersTeacherOptions.model_validate({"pool": {"from": "pool"}})
    found = AdaptersTeacher(options, pool, ENTRIES, needs={need: need() for need in needs}, base_source=str(base), deltas=deltas)
    if load:
        found.load("cpu")
    return found


def batch_of(owners: list[int], seed: int = 0) -> Batch:
    """Packed rows, two documents each and a padded tail, that name their condition."""
    return replace(packed_batch([[6, 5]] * len(owners), seed, padding=2), adapters_B=torch.tensor(owners))


def test_every_row_gets_an_adapter_of_its_own_condition(pool: Pool, base: Path, adapters: Adapters, tmp_path: Path) -> None:
    teacher = teacher_of(pool, base, AdapterFactors, Deltas, deltas=measured(tmp_path / "deltas", pool.adapters()))
    batch = batch_of([2, 0, 3, -1, 2])
    signal = teacher.signal(batch, teacher.needs)
    chosen = teacher.entries(batch).tolist()
    assert [chosen[0], chosen[1], chosen[4]] == [1, 0, 1] and chosen[2] in (2, 3, 4)
    rows = [i for i in range(5) if i != 3]
    found, wanted = signal[AdapterFactors].pick(rows), adapters.pick([chosen[i] for i in rows])
    for name in adapters.A:
        assert torch.equal(found.A[name], wanted.A[name]) and torch.equal(found.B[name], wanted.B[name])
    assert signal[Deltas].target_BF[rows].tolist() == [[float(chosen[i])] * 4 for i in rows]
    assert signal[Deltas].represent.tokens == "last" and signal[Deltas].probes.mask_KT.sum(1).tolist() == [3, 1]
    assert teacher.module is None, "a base was loaded that no objective asked for"


def test_of_several_inits_the_rows_own_text_decides(pool: Pool, base: Path) -> None:
    teacher = teacher_of(pool, base, AdapterFactors)
    batch = batch_of([3] * 24)
    chosen = teacher.entries(batch)
    assert set(chosen.tolist()) == {2, 3, 4}
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    shuffled = Batch(**{name: part[order] for name, part in batch._parts().items()})
    assert torch.equal(teacher.entries(shuffled), chosen[order])
    assert torch.equal(torch.cat([teacher.entries(part) for part in batch.split(5)]), chosen)


def test_a_condition_without_an_adapter_is_named(pool: Pool, base: Path) -> None:
    teacher = teacher_of(pool, base, AdapterFactors)
    for missing in (1, 4, 999):
        with pytest.raises(TeacherError, match=rf"condition {missing} has no adapter in .*pool \(1 such conditions in this batch\): train its teacher"):
            teacher.entries(batch_of([0, missing, 2]))


def test_the_fingerprint_changes_with_any_adapters_numbers(pool: Pool, base: Path, adapters: Adapters, tmp_path: Path) -> None:
    before = teacher_of(pool, base, AdapterFactors).fingerprint()
    assert teacher_of(read_pool(pool.folder), base, AdapterFactors).fingerprint() == before
    with_deltas = teacher_of(pool, base, AdapterFactors, deltas=measured(tmp_path / "deltas", None)).fingerprint()
    assert with_deltas["adapters"] == before["adapters"] and with_deltas["deltas"] is not None
    for index, name in enumerate(NAMES):
        write_peft(adapters, index, pool.folder / name, base=str(base), provenance={"written": "again"})
    assert teacher_of(pool, base, AdapterFactors).fingerprint() == before
    config = pool.folder / NAMES[1] / "adapter_config.json"
    held = config.read_text()
    config.write_text(json.dumps({**json.loads(held), "lora_alpha": 9}))
    assert teacher_of(pool, base, AdapterFactors, load=False).fingerprint()["adapters"] != before["adapters"]
    config.write_text(held)
    moved = adapters.map(lambda t: t.clone())
    moved.A[adapters.spec.sites[0].name][3, 0, 0, 0] += 1e-3
    write_peft(moved, 3, pool.folder / NAMES[3], base=str(base), provenance={})
    with pytest.raises(AdapterError, match="three-b: is not the adapter that was written"):
        pool.adapters()
    write_pool(pool)
    after = teacher_of(read_pool(pool.folder), base, AdapterFactors).fingerprint()
    assert after["adapters"] != before["adapters"] and after["base"] == before["base"]


def test_hidden_states_are_those_of_peft_with_the_rows_adapter(pool: Pool, base: Path) -> None:
    teacher = teacher_of(pool, base, HeadHidden)
    batch = batch_of([3, 0, 2, -1])
    output = teacher.signal(batch, teacher.needs)[HeadHidden]
    logits = output.hidden_BTD @ output.head.weight_VD.T
    for row, entry in enumerate(teacher.entries(batch).tolist()[:3]):
        model = PeftModel.from_pretrained(load_model(str(base)), str(pool.folder / NAMES[entry])).eval()
        plain = load_model(str(base))
        for document in (slice(0, 6), slice(6, 11)):
            ids = batch.input_ids_BT[row, document][None]
            with torch.no_grad():
                wanted, without = model(ids).logits[0], plain(ids).logits[0]
            found = logits[row, document]
            assert float((found - wanted).norm() / wanted.norm()) < 1e-5
            assert float((found - without).norm() / wanted.norm()) > 1e-2
    assert not output.hidden_BTD.requires_grad


def test_what_was_not_measured_is_named(pool: Pool, base: Path, tmp_path: Path) -> None:
    few = measured(tmp_path / "few", pool.adapters(), NAMES[:2])
    with pytest.raises(AdapterError, match=r"no delta of three-a was measured \(3 missing of 5\)"):
        teacher_of(pool, base, Deltas, deltas=few)
    found = measured(tmp_path / "all", pool.adapters())
    teacher = teacher_of(pool, base, InputMoments, deltas=found)
    with pytest.raises(AdapterError, match=r"second moments were not measured: set `moments: true`"):
        teacher.signal(batch_of([0]), teacher.needs)
    next(iter(found.folder.glob("*.npy"))).unlink()
    with pytest.raises(AdapterError, match=r"\.npy: is missing: run its measure_deltas stage again"):
        teacher_of(pool, base, Deltas, deltas=found)


def test_deltas_of_another_pool_with_the_same_names_are_refused(pool: Pool, base: Path, adapters: Adapters, tmp_path: Path) -> None:
    deltas = measured(tmp_path / "deltas", pool.adapters())
    write_peft(adapters, 0, pool.folder / NAMES[3], base=str(base), provenance={})
    write_pool(pool)
    with pytest.raises(TeacherError, match=r"delta of three-b was measured of another adapter than the one in .*pool: name the measure_deltas stage of this"):
        teacher_of(read_pool(pool.folder), base, Deltas, deltas=deltas)


def test_whole_models_have_behaviour_and_no_factors(pool: Pool, base: Path, tmp_path: Path) -> None:
    whole = replace(pool, mode="full")
    teacher = teacher_of(whole, base, Deltas, deltas=measured(tmp_path / "deltas", None))
    assert teacher.signal(batch_of([2]), teacher.needs)[Deltas].target_BF.tolist() == [[1.0] * 4]
    with pytest.raises(AdapterError, match=r"whole models \(mode: full\)"):
        teacher_of(whole, base, AdapterFactors)


def test_a_pool_is_of_one_shape_and_a_damaged_one_is_named(pool: Pool, base: Path) -> None:
    model = load_model(str(base))
    odd = random_adapters(small_spec(model, rank=3), 1, dtype=torch.float32)
    write_peft(odd, 0, pool.folder / NAMES[4], base=str(base), provenance={})
    with pytest.raises(AdapterError, match=r"three-c: rank 3, scale .* a pool is of one shape"):
        pool.adapters()
    (pool.folder / "pool.json").write_text('{"format": 1}')
    with pytest.raises(AdapterError, match=r"pool\.json: cannot be read as a pool of adapters"):
        read_pool(pool.folder)
