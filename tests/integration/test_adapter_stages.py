"""Pools, deltas, generators and their judging as stages of recipes: killed and gone on with, measured again, refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from adapter_cases import base_folder, generating, peft_folders, random_adapters, recipe_on, run, small_spec, write_recipe
from condition_cases import decoded
from limbeck.adapters.delta_store import MeasuredDeltas, tensor_digest
from limbeck.adapters.peft_files import read_peft_file
from limbeck.adapters.pool import read_pool
from limbeck.cli.app import app
from limbeck.data.conditions.loaders import ConditionLoader, PoolLoader
from limbeck.data.conditions.store import ConditionSet
from limbeck.engine.loop import Trainer
from limbeck.engine.metrics import read_metrics
from limbeck.errors import AdapterError, DataError, RunError
from limbeck.models.loading import fingerprint, load_model
from limbeck.stages.adapting import open_generator
from limbeck.stages.measure_deltas import MeasureDeltasStage
from limbeck.stages.train_adapters import TrainAdaptersStage

JUDGE: dict[str, Any] = {
    "kind": "evaluate_adapters", "from": "generate", "against": ["static"], "pool": {"from": "pool"}, "rows": 1, "draws": 2, "together": 4,
    "probes": {"kind": "conditions", "conditions": {"from": "conditions"}, "count": 4, "length": 12}, "composition": {}, "bootstrap": 100,
}  # fmt: skip
STILL = {"groups": [{"lr": 1e-30}]}
"""Steps too small to change a number."""


class Finished:
    """A recipe that ran from end to end."""

    def __init__(self, home: Path):
        self.home = home
        self.base = base_folder(home / "base")
        self.before = fingerprint(str(self.base))
        static = generating([{"kind": "ce"}], condition="none")
        self.recipe = recipe_on(home, static=static, evaluate=JUDGE)
        self.run, self.said = run(home, self.recipe)

    @property
    def conditions(self) -> ConditionSet:
        return ConditionSet(self.run / "conditions/conditions")

    def beside(self, to: str, *stages: str) -> Path:
        """Another run directory in which these stages are finished."""
        for stage in stages:
            shutil.copytree(self.run / stage, self.home / to / stage)
        return self.home / to

    def only(self, *stages: str, **changes: Any) -> dict[str, Any]:
        """The recipe with these stages and others beside them."""
        kept = {name: stage for name, stage in self.recipe["stages"].items() if name in stages}
        return {"name": "adapted", "stages": {**kept, **changes}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(tmp_path_factory.mktemp("adapted"))


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The process is asked to end in a step of training."""
    apply = Trainer._apply

    def watched(self: Trainer, *given: Any) -> None:
        apply(self, *given)
        if self.at.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_apply", watched)


def numbers_of(folder: Path) -> dict[str, str]:
    """A digest of the tensors of every file of weights below a folder (safetensors orders the words of its header as it likes)."""
    return {str(p.relative_to(folder)): tensor_digest(load_file(p)) for p in sorted(folder.rglob("*.safetensors"))}


def pools(finished: Finished, to: str, **loop: Any) -> dict[str, Any]:
    """Each adapter of a pool that trains with another loop, by name."""
    stage = finished.recipe["stages"]["pool"]
    finished.beside(to, "conditions")
    out, _ = run(finished.home, finished.only("conditions", pool={**stage, "loop": {**stage["loop"], **loop}}), to=to)
    pool = read_pool(out / "pool/adapters")
    return {entry.name: read_peft_file(pool.folder / entry.folder) for entry in pool.entries}


def furthest(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """The largest relative difference of a factor."""
    pairs = [(a, b) for name in found for a, b in zip(found[name].tensors(), wanted[name].tensors(), strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


# -- the whole recipe ------------------------------------------------------------------------------------------------------


def test_a_recipe_goes_through_and_leaves_the_base_as_it_was(finished: Finished) -> None:
    statuses = {p.parent.name: json.loads(p.read_text())["status"] for p in finished.run.glob("*/stage.json")}
    assert statuses == dict.fromkeys(("conditions", "pool", "deltas", "generate", "static", "evaluate"), "finished")
    assert fingerprint(str(finished.base)) == finished.before
    held = load_file(finished.run / "generate/model/generator.safetensors")
    largest = max(t.numel() for t in load_model(str(finished.base)).parameters())
    assert held and all(t.numel() < largest for t in held.values()), "the base was saved with the generator"
    logged = read_metrics(finished.run / "generate/metrics.jsonl")[0]
    for name in ("ce", "weights/raw", "delta/raw", "tether", "delta_cosine", "delta_ratio", "lora_ratio"):
        assert np.isfinite(logged[name]), name
    # Before the first step there is no change at all: relative errors are 1, the tether 0.
    assert logged["weights/raw"] == pytest.approx(1) and logged["delta/raw"] == pytest.approx(1) and abs(logged["tether"]) < 1e-6


def test_nothing_that_is_judged_was_trained_on(finished: Finished) -> None:
    texts: dict[int, set[str]] = {0: set(), 1: set()}
    for (_, side), examples in decoded(finished.conditions).items():
        texts[side] |= {(prompt + answer).lower() for prompt, answer in examples}
    assert texts[0] and texts[1] and not texts[0] & texts[1]


def test_every_control_is_judged_beside_the_generator(finished: Finished) -> None:
    found = json.loads((finished.run / "evaluate/evaluation/adapters.json").read_text())
    assert set(found["splits"]) == {"seen", "held_out_source"}
    columns = {"base", "mean adapter", "nearest adapter", "teacher", "generate", "static", "generate, shuffled"}
    for table in found["splits"].values():
        assert set(table["nll"]) == set(table["share"]) == columns
        assert table["share"]["teacher"] == pytest.approx(1) and table["share"]["base"] == 0
        assert table["delta_cosine"]["teacher"] == pytest.approx(1, abs=1e-5) and table["size_ratio"]["teacher"] == pytest.approx(1, abs=1e-5)
    for row in found["conditions"]:
        assert row["shuffled"] != row["name"] and row["nearest"] != row["name"]
    # A teacher that learnt nothing would make every share mean nothing.
    assert found["splits"]["seen"]["nll"]["teacher"] < found["splits"]["seen"]["nll"]["base"]
    assert len(found["composition"]["mixes"]) == 1


# -- the pool --------------------------------------------------------------------------------------------------------------


def test_a_pool_that_was_stopped_is_the_one_that_was_not(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = finished.only("conditions", "pool")
    to = finished.beside("stopped", "conditions")
    with monkeypatch.context() as patched:
        stop_at(patched, 5)
        with pytest.raises(KeyboardInterrupt):
            run(finished.home, recipe, to="stopped")
    assert json.loads((to / "pool/stage.json").read_text())["status"] == "preempted" and not (to / "pool/adapters").exists()
    run(finished.home, recipe, to="stopped")
    found, wanted = numbers_of(to / "pool/adapters"), numbers_of(finished.run / "pool/adapters")
    assert len(wanted) == 7 and found == wanted


def test_adapters_do_not_depend_on_how_many_run_together(finished: Finished) -> None:
    wanted = pools(finished, "whole", precision="float64")
    found = pools(finished, "parts", precision="float64", together=2)
    assert furthest(found, wanted) < 1e-6
    assert all(float(lot.B["self_attn.q_proj"].norm()) > 0 for lot in wanted.values())


def test_an_adapter_trains_as_it_would_alone(finished: Finished) -> None:
    stage = finished.recipe["stages"]["pool"]
    shared = {**stage, "adapters": {**stage["adapters"], "init": "shared"}, "loop": {**stage["loop"], "precision": "float64"}}
    found = []
    for to, splits in (("many", ["seen", "held_out_source"]), ("few", ["seen"])):
        finished.beside(to, "conditions")
        out, _ = run(finished.home, finished.only("conditions", pool={**shared, "splits": splits}), to=to)
        pool = read_pool(out / "pool/adapters")
        found.append({entry.name: read_peft_file(pool.folder / entry.folder) for entry in pool.entries})
    assert len(found[0]) == 6 and len(found[1]) == 4
    assert list(found[0])[:4] == list(found[1]), "a slot draws rows by its number"
    assert furthest(found[1], found[0]) < 1e-6


def test_slots_read_rows_of_their_own_condition_in_an_order_of_their_own(finished: Finished) -> None:
    conditions = finished.conditions
    ids = conditions.split("seen")
    rows = conditions.rows(ids)

    def loader(slots: list[int], each: int = 2, **more: Any) -> PoolLoader:
        return PoolLoader(rows, slots, each=each, seed=3, **more)

    def read(of: PoolLoader, steps: int) -> list[torch.Tensor]:
        return [of.next_step().input_ids_BT for _ in range(steps)]

    first = loader([ids[0], ids[1], ids[0]])
    batch = first.next_step()
    assert batch.adapters_B is not None and batch.adapters_B.tolist() == [0, 0, 1, 1, 2, 2]
    assert not torch.equal(batch.input_ids_BT[:2], batch.input_ids_BT[4:]), "two inits of one condition read the same rows"
    others = loader([ids[0], ids[2], ids[3]])
    for a, b in zip([batch.input_ids_BT, *read(first, 5)], read(others, 6), strict=True):
        assert torch.equal(a[:2], b[:2])

    steps = 2 + len(rows.rows_of(ids[0])) // 2 * 2
    through, again = loader(ids), loader(ids)
    everything = read(through, steps)
    read(again, 2)
    resumed = loader(ids)
    resumed.restore(again.state())
    assert all(torch.equal(a, b) for a, b in zip(read(resumed, steps - 2), everything[2:], strict=True))
    ranks = [loader(ids, rank=rank, world=2) for rank in range(2)]
    assert all(torch.equal(torch.cat(pair), whole) for pair, whole in zip(zip(*(read(r, 3) for r in ranks), strict=True), everything[:3], strict=True))

    own = rows.batch(list(rows.rows_of(ids[0]))).input_ids_BT
    epoch = torch.cat([step[:1] for step in read(loader(ids, each=1), len(own))])
    assert sorted(epoch.tolist()) == sorted(own.tolist()), "an epoch is every row once"
    with pytest.raises(DataError, match=r"4 rows a step cannot be shared out evenly to 3 processes: choose a multiple of 3"):
        loader(ids, each=1, world=3)
    with pytest.raises(DataError, match=r"taken with 4 slots on .* resume with the same conditions"):
        loader(ids[:2]).restore(again.state())


def test_a_generator_reads_every_condition_as_often(finished: Finished) -> None:
    conditions = finished.conditions
    ids = conditions.split("seen")
    rows = conditions.rows(ids)
    through, again = (ConditionLoader(rows, 6, seed=3) for _ in range(2))
    steps = [through.next_step() for _ in range(6)]
    owners = [owner for step in steps for owner in step.adapters_B.tolist()]  # type: ignore[union-attr]
    rounds = [owners[at : at + len(ids)] for at in range(0, len(owners), len(ids))]
    assert all(sorted(turn) == ids for turn in rounds) and len({tuple(turn) for turn in rounds}) > 1
    texts: dict[int, list[Any]] = {i: [] for i in ids}
    for step in steps:
        for owner, text in zip(step.adapters_B.tolist(), step.input_ids_BT.tolist(), strict=True):  # type: ignore[union-attr]
            texts[owner].append(text)
    for i in ids:
        own = rows.batch(list(rows.rows_of(i))).input_ids_BT.tolist()
        epoch = texts[i][: len(own)]
        assert all(epoch.count(text) <= own.count(text) for text in epoch), "a row came twice before all had come once"
    for _ in range(2):
        again.next_step()
    resumed = ConditionLoader(rows, 6, seed=3)
    resumed.restore(again.state())
    for step in steps[2:]:
        assert torch.equal(resumed.next_step().input_ids_BT, step.input_ids_BT)
    halves = [ConditionLoader(rows, 6, seed=3, rank=rank, world=2) for rank in range(2)]
    assert torch.equal(torch.cat([half.next_step().input_ids_BT for half in halves]), steps[0].input_ids_BT)


def test_whole_models_are_taught_measured_and_not_trained_twice(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    full = {
        "kind": "train_adapters", "base": "base", "conditions": {"from": "conditions"}, "mode": "full", "splits": ["seen"],
        "optim": {"groups": [{"lr": 1e-3}]}, "loop": {"steps": 2, "rows": 2, "precision": "float32"},
    }  # fmt: skip
    teacher = {"kind": "adapters", "pool": {"from": "pool"}, "deltas": {"from": "deltas"}}
    deltas = {"kind": "measure_deltas", "pool": {"from": "pool"}, "probes": {"count": 2, "length": 8}}
    recipe = finished.only("conditions", pool=full, deltas=deltas, generate=generating([{"kind": "delta"}], teacher=teacher))
    to = finished.beside("full", "conditions")
    train, calls = TrainAdaptersStage._train, [0]

    def watched(self: TrainAdaptersStage, *given: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return train(self, *given, **more)

    monkeypatch.setattr(TrainAdaptersStage, "_train", watched)
    with pytest.raises(KeyboardInterrupt):
        run(finished.home, recipe, to="full")
    first = next((to / "pool/adapters").glob("0000-*/model.safetensors"))
    made = first.stat().st_mtime_ns
    run(finished.home, recipe, to="full")
    assert calls[0] == 5 and first.stat().st_mtime_ns == made
    assert not list((to / "pool/models").glob("*/checkpoints"))
    measured = MeasuredDeltas(to / "deltas/deltas")
    assert len(measured.record["adapters"]) == 4 and all(entry["norm"] > 0 for entry in measured.record["adapters"].values())
    assert np.isfinite(read_metrics(to / "generate/metrics.jsonl")[-1]["delta/raw"])

    recipe["stages"]["generate"] = generating([{"kind": "weights"}], teacher=teacher)
    with pytest.raises(AdapterError, match=r"whole models \(mode: full\): they have behaviour, and no LoRA weights"):
        run(finished.home, recipe, to="full")


def test_a_whole_model_and_its_base_are_measured_in_one_dtype(finished: Finished) -> None:
    # A learning rate that moves nothing: what is left of a delta would be the difference of two roundings.
    full = {
        "kind": "train_adapters", "base": "base", "conditions": {"from": "conditions"}, "mode": "full", "splits": ["held_out_source"],
        "optim": {"groups": [{"lr": 1e-30}]}, "loop": {"steps": 1, "rows": 1, "precision": "float32"},
    }  # fmt: skip
    deltas = {"kind": "measure_deltas", "pool": {"from": "pool"}, "probes": {"count": 2, "length": 8}, "precision": "bfloat16"}
    to = finished.beside("unmoved", "conditions")
    run(finished.home, finished.only("conditions", pool=full, deltas=deltas), to="unmoved")
    held = MeasuredDeltas(to / "deltas/deltas").record["adapters"].values()
    assert held and all(entry["norm"] == 0 for entry in held)


# -- deltas ----------------------------------------------------------------------------------------------------------------


class Folders:
    """PEFT folders of a base, and stages that measure them."""

    def __init__(self, home: Path, count: int = 5, **shape: Any):
        self.home = home
        self.base = base_folder(home / "base")
        self.spec = small_spec(load_model(str(self.base)), **shape)
        self.adapters = random_adapters(self.spec, count, dtype=torch.float32)
        self.folders = peft_folders(home / "peft", self.base, self.adapters, [f"a{i}" for i in range(count)])

    def stage(self, **changes: Any) -> dict[str, Any]:
        probes = {"kind": "texts", "texts": ["def one(two):", "Three or four."]}
        return {"kind": "measure_deltas", "pool": self.folders, "base": "base", "probes": probes, "together": 2, **changes}

    def measure(self, to: str, **stages: Any) -> tuple[Path, list[str]]:
        return run(self.home, {"name": "measured", "stages": stages}, to=to)


def keys_of(out: Path, stage: str) -> dict[str, str]:
    return {name: entry["key"] for name, entry in MeasuredDeltas(out / stage / "deltas").record["adapters"].items()}


def bytes_of(out: Path, stage: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (out / stage / "deltas").glob("*.npy")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("folders"))


def test_measuring_again_gives_the_same_bytes_whatever_was_kept(folders: Folders) -> None:
    out, said = folders.measure("bytes", one=folders.stage())
    assert any("5 adapters, 0 of them measured before" in line for line in said)
    wanted, keys = bytes_of(out, "one"), keys_of(out, "one")
    assert len(wanted) == 5 == len(set(keys.values()))

    out, said = folders.measure("bytes", one=folders.stage(), again=folders.stage())
    assert any("5 adapters, 5 of them measured before" in line for line in said)
    assert bytes_of(out, "again") == wanted and keys_of(out, "again") == keys

    for name in ("a0", "a3"):
        (out / "delta_cache" / f"{keys[name]}.npy").unlink()
    out, said = folders.measure("bytes", one=folders.stage(), again=folders.stage(), partly=folders.stage())
    assert any("5 adapters, 3 of them measured before" in line for line in said)
    assert bytes_of(out, "partly") == wanted

    afresh, said = folders.measure("afresh", one=folders.stage())
    assert any("0 of them measured before" in line for line in said) and bytes_of(afresh, "one") == wanted


def test_whatever_a_delta_depends_on_is_measured_anew(folders: Folders) -> None:
    base_folder(folders.home / "other", seed=4)
    moved = replace(folders.adapters, A={name: A * (1 + 1e-6) for name, A in folders.adapters.A.items()})
    others = peft_folders(folders.home / "moved", folders.base, moved, list(folders.folders))
    texts = {"kind": "texts", "texts": ["def one(two):", "Three or four!"]}
    stages = {
        "text": folders.stage(probes=texts),
        "layer": folders.stage(represent={"layers": [0]}),
        "precision": folders.stage(precision="bfloat16"),
        "adapter": folders.stage(pool=others),
        "base": folders.stage(base="other"),
    }
    out, said = folders.measure("keys", plain=folders.stage(), **stages)
    assert sum("5 adapters, 0 of them measured before" in line for line in said) == 6
    found = {name: set(keys_of(out, name).values()) for name in ("plain", *stages)}
    assert len(set.union(*found.values())) == 5 * len(found)


def test_broken_adapters_are_refused_and_idle_ones_named(folders: Folders) -> None:
    broken = shutil.copytree(folders.folders["a1"], folders.home / "broken")
    path = broken / "adapter_model.safetensors"
    held = load_file(path)
    name = next(key for key in held if "lora_B" in key)
    save_file({**held, name: torch.full_like(held[name], torch.nan)}, path, metadata={"format": "pt"})
    with pytest.raises((RunError, AdapterError), match="broken") as refused:
        folders.measure("broken-run", one=folders.stage(pool={**folders.folders, "wrong": str(broken)}))
    assert "finite" in str(refused.value) and "a0" not in str(refused.value)

    idle = replace(folders.adapters, B={name: torch.zeros_like(B) for name, B in folders.adapters.B.items()})
    added = peft_folders(folders.home / "idle", folders.base, idle.pick([0]), ["idle"])
    out, said = folders.measure("idle-run", one=folders.stage(pool={**folders.folders, **added}))
    entries = MeasuredDeltas(out / "one/deltas").record["adapters"]
    assert "does nothing" in entries["idle"]["note"] and "note" not in entries["a0"]
    assert any("WARNING: idle: no larger than the noise" in line for line in said)


def test_memory_stays_flat_over_two_hundred_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    many = Folders(tmp_path, 200, targets="q_proj", rank=1)
    seen: list[int] = []
    progress = MeasureDeltasStage._progress

    def watched(self: MeasureDeltasStage, *given: Any) -> None:
        seen.append(next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("RssAnon")))
        progress(self, *given)

    statistics: Callable[..., Any] = MeasureDeltasStage._statistics

    def at_the_end(self: MeasureDeltasStage, found: Any) -> Any:
        kept = statistics(self, found)
        watched(self, 200, 200, 0.0)
        return kept

    monkeypatch.setattr(MeasureDeltasStage, "_progress", watched)
    monkeypatch.setattr(MeasureDeltasStage, "_statistics", at_the_end)
    # 16 probes x 64 tokens x 16 numbers: 200 such deltas held at once would be 13 MB in each copy.
    out, _ = many.measure("many", one=many.stage(probes={"length": 64}, together=8))
    assert len(seen) == 26 and max(seen[3:]) - seen[2] < 20 * 1024
    size = next((out / "one/deltas").glob("*.npy")).stat().st_size * 200 // 1024
    assert size > 8 * 1024 and seen[-1] - seen[-2] < size / 2, "every delta was read back into memory"


# -- generators ------------------------------------------------------------------------------------------------------------


def test_a_generator_that_was_stopped_is_the_one_that_was_not(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = finished.only("conditions", "pool", "deltas", "generate")
    to = finished.beside("stopped-generator", "conditions", "pool", "deltas")
    with monkeypatch.context() as patched:
        # It ends with the step after, whose rows are on their way.
        stop_at(patched, 1)
        with pytest.raises(KeyboardInterrupt):
            run(finished.home, recipe, to="stopped-generator")
    assert len(read_metrics(to / "generate/metrics.jsonl")) < 4
    run(finished.home, recipe, to="stopped-generator")
    assert numbers_of(to / "generate/model") == numbers_of(finished.run / "generate/model")
    losses = [[row["loss"] for row in read_metrics(where / "generate/metrics.jsonl") if "loss" in row] for where in (to, finished.run)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_generator_goes_on_from_another_and_starts_from_a_static_one(finished: Finished) -> None:
    further = {**generating([{"kind": "ce"}], student={"from": "generate", "train": ["generator"]}), "optim": STILL}
    started = {**generating([{"kind": "ce"}], start={"from": "static"}), "optim": STILL}
    to = finished.beside("further", "conditions", "pool", "deltas", "generate", "static")
    run(finished.home, finished.only("conditions", "pool", "deltas", "generate", "static", further=further, started=started), to="further")
    before, after = (load_file(to / f"{stage}/model/generator.safetensors") for stage in ("generate", "further"))
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)

    context: Any = SimpleNamespace(recipe_dir=finished.home, name="test")
    static, mine, plain = (
        open_generator(context, to / f"{stage}/model", finished.conditions, dtype=torch.float32) for stage in ("static", "started", "generate")
    )
    ids = finished.conditions.split("seen")
    texts = finished.conditions.rows(ids).batch([0, 3]).condition_BSC
    assert texts is not None
    with torch.no_grad():
        for site in static.spec.sites:
            wanted = static.generate(texts).change(site.name)
            assert float(wanted.abs().max()) > 0
            torch.testing.assert_close(mine.generate(texts).change(site.name), wanted, rtol=1e-6, atol=1e-9)
        two = plain.generate(texts)
    assert not torch.equal(*two.B["self_attn.q_proj"]), "two conditions get one adapter"


def test_a_teacher_of_another_base_is_refused(finished: Finished) -> None:
    base_folder(finished.home / "other", seed=4)
    teacher = {"kind": "adapters", "pool": {"from": "pool"}}
    student = {"base": "other", "surgery": [{"kind": "lora_generator", "targets": "all", "rank": 2, "width": 16}], "train": ["generator"]}
    finished.beside("other-base", "conditions", "pool")
    recipe = finished.only("conditions", "pool", generate=generating([{"kind": "weights"}], teacher=teacher, student=student))
    with pytest.raises(RunError, match=r"teacher\.pool was made with the base .* whose files are not those of the student's base .*other"):
        run(finished.home, recipe, to="other-base")


# -- refusals --------------------------------------------------------------------------------------------------------------


def refused(finished: Finished, verb: str, recipe: dict[str, Any]) -> str:
    """What the command line says with exit code 2."""
    done = CliRunner().invoke(app, [verb, str(write_recipe(finished.home, recipe, "refused"))])
    assert done.exit_code == 2, done.output
    return " ".join(done.stderr.split())


def test_recipes_that_cannot_work_are_refused_before_anything_runs(finished: Finished) -> None:
    weights = generating([{"kind": "weights"}], teacher={"kind": "adapters", "pool": {"from": "deltas"}, "deltas": {"from": "pool"}})
    words = refused(finished, "check", finished.only("conditions", "pool", "deltas", generate=weights))
    assert "stage 'deltas' is of kind measure_deltas: it trains no pool of adapters; name a train_adapters stage" in words
    assert "stage 'pool' is of kind train_adapters: it measures no deltas; name a measure_deltas stage" in words

    pool = {**finished.recipe["stages"]["pool"], "conditions": {"from": "other"}}
    words = refused(finished, "check", finished.only("conditions", pool=pool, other=generating([{"kind": "ce"}])))
    assert "stage 'other' is of kind train: it makes no conditions; name a prepare_conditions or prepare_trajectories stage" in words

    delta = generating([{"kind": "delta"}], teacher={"kind": "adapters", "pool": {"from": "pool"}})
    words = refused(finished, "check", finished.only("conditions", "pool", generate=delta))
    assert "objective 'delta' needs Deltas: teacher 'adapters' has no measured deltas: add a measure_deltas stage" in words

    judge = {**JUDGE, "from": "pool", "against": []}
    words = refused(finished, "check", finished.only("conditions", "pool", evaluate=judge))
    assert "stage 'pool' is of kind train_adapters: it makes no model" in words


def test_data_without_conditions_and_a_surgery_beside_the_generator_are_refused(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.home)
    plain = {"source": [{"kind": "text", "path": "pump.txt", "documents": "paragraph"}], "tokenizer": "base", "sequence": 32, "held_out": 0}
    words = refused(finished, "run", {"name": "plain", "stages": {"generate": {**generating([{"kind": "ce"}]), "data": plain}}})
    assert "reads conditions, and `data` is plain text: name a prepare_conditions or prepare_trajectories stage" in words

    both = generating([{"kind": "ce"}])
    both["student"]["surgery"].insert(0, {"kind": "hybridize"})
    finished.beside("both", "conditions")
    with pytest.raises(RunError, match="'lora_generator' stands alone, and hybridize stands beside it"):
        run(finished.home, finished.only("conditions", generate=both), to="both")


def test_composition_is_judged_against_trained_mixes_or_not_at_all(finished: Finished) -> None:
    stages = ("conditions", "pool", "deltas", "generate")
    finished.beside("unmixed", *stages)
    pool = shutil.copytree(finished.run / "pool", finished.home / "unmixed-pool")
    record = json.loads((pool / "adapters/pool.json").read_text())
    record["entries"] = [entry for entry in record["entries"] if not entry["condition"].startswith("mix")]
    assert len(record["entries"]) == 6
    (finished.home / "unmixed/pool/adapters/pool.json").write_text(json.dumps(record))
    judge = {**JUDGE, "against": [], "probes": {"count": 2, "length": 8}}
    with pytest.raises(RunError, match="teachers that were really trained on mixes, and there are none: set `mixes`"):
        run(finished.home, finished.only(*stages, evaluate=judge), to="unmixed")
