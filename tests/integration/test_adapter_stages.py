"""Pools, deltas, generators and their judging as stages of recipes: killed and gone on with, measured again, refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from adapter_cases import base_folder, generating, recipe_on, run, write_recipe
from condition_cases import decoded
from limbeck.adapters.delta_store import MeasuredDeltas, tensor_digest
from limbeck.adapters.output import PredictedOutput
from limbeck.adapters.peft_files import read_peft_file
from limbeck.adapters.pool import read_pool
from limbeck.cli.app import app
from limbeck.data.conditions.loaders import ConditionLoader, PoolLoader
from limbeck.data.conditions.store import ConditionSet
from limbeck.engine.loop import Trainer
from limbeck.engine.metrics import read_metrics
from limbeck.errors import AdapterError, DataError, RunError
from limbeck.models.loading import fingerprint, load_model, load_tokenizer
from limbeck.stages.adapting import base_record, condition_of, open_generator, start_adapter
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


def test_all_that_is_judged_stands_on_one_copy_of_the_base(finished: Finished) -> None:
    context: Any = SimpleNamespace(recipe_dir=finished.home, name="test")
    folders = {stage: finished.run / stage / "model" for stage in ("generate", "static")}
    main = open_generator(context, folders["generate"], finished.conditions, dtype=torch.float32)
    alone, beside = (open_generator(context, folders["static"], finished.conditions, dtype=torch.float32, beside=other) for other in (None, main))
    assert beside.model is main.model and alone.model is not main.model
    texts = finished.conditions.rows(finished.conditions.split("seen")).batch([0, 3]).condition_BSC
    ids = torch.arange(24).reshape(2, 12)
    assert texts is not None
    with torch.no_grad():
        states = []
        for student in (alone, beside):
            with student.injector.active(student.generate(texts)):
                states.append(student.model(input_ids=ids).logits)
    assert torch.equal(*states)
    # Of another base it is opened on its own.
    other = SimpleNamespace(model=main.model, base={"fingerprint": {"weights": "others"}})
    assert open_generator(context, folders["static"], finished.conditions, dtype=torch.float32, beside=other).model is not main.model  # type: ignore[arg-type]


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

    for changed, named in (({"rank": 3}, "rank 3, alpha 4"), ({"alpha": 8}, "rank 2, alpha 8"), ({"rslora": True}, "rank 2, alpha 4, rslora")):
        for loss in ("mse", "canonical"):
            factors = generating([{"kind": "weights", "loss": loss}], teacher={"kind": "adapters", "pool": {"from": "pool"}}, **changed)
            words = refused(finished, "check", finished.only("conditions", "pool", generate=factors))
            assert f"'{loss}' compares A and B, and the generator's ({named}) are not of the shape of its teachers' in stage 'pool' (rank 2, alpha 4)" in words
    product = generating([{"kind": "weights"}], teacher={"kind": "adapters", "pool": {"from": "pool"}}, rank=3)
    swept = {**factors, "grid": {"student.surgery.0.rslora": [False]}}
    for stage in (product, swept):
        done = CliRunner().invoke(app, ["check", str(write_recipe(finished.home, finished.only("conditions", "pool", generate=stage), "taken"))])
        assert done.exit_code == 0, done.output

    judge = {**JUDGE, "from": "pool", "against": []}
    words = refused(finished, "check", finished.only("conditions", "pool", evaluate=judge))
    assert "stage 'pool' is of kind train_adapters: it makes no model" in words


PREDICTOR: dict[str, Any] = {"base": "base", "surgery": [{"kind": "delta_predictor", "width": 16}], "train": ["generator"]}
TEACHER: dict[str, Any] = {"kind": "adapters", "pool": {"from": "pool"}, "deltas": {"from": "deltas"}}


def test_a_predictor_of_deltas_takes_no_loss_on_text(finished: Finished) -> None:
    both = generating([{"kind": "delta"}, {"kind": "ce"}, {"kind": "tether"}], teacher=TEACHER, student=PREDICTOR)
    further = generating([{"kind": "ce"}], student={"from": "generate"})
    words = refused(finished, "check", finished.only("conditions", "pool", "deltas", generate=both, further=further))
    for place, kind in (("generate.objectives.1", "ce"), ("generate.objectives.2", "tether"), ("further.objectives.0", "ce")):
        assert f"stages.{place}: 'delta_predictor' makes no model that '{kind}' could run: its objective is `delta`" in words
    # What a plug-in's objective may ask for is found out when it asks.
    for name in ("hidden_BTD", "head"):
        with pytest.raises(AdapterError, match=r"this student predicts deltas and runs no model.*its objective is `delta`"):
            getattr(PredictedOutput(torch.zeros(1, 2)), name)


def test_a_static_generator_of_another_base_is_no_start(finished: Finished) -> None:
    base_folder(finished.home / "another", seed=5)
    context: Any = SimpleNamespace(recipe_dir=finished.home, name="test", locate=str)
    static = str(finished.run / "static/model")
    with pytest.raises(RunError, match=r"surgery\.start was trained on .*base, whose files are not those of .*another"):
        start_adapter(context, static, base_record(str(finished.home / "another"), str(finished.home / "another")))
    assert start_adapter(context, static, base_record(str(finished.base), str(finished.base))).spec.rank == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate"], "generate: holds what reads conditions, not a model: --to peft --prompt TEXT writes the LoRA"),
        (["generate", "--to", "gguf"], "holds what reads conditions, not a model"),
        (["generate@2"], "generate@2: is a checkpoint of a LoRA generator, which is no model"),
        (["generate@2", "--to", "gguf"], "is a checkpoint of a LoRA generator"),
        (["generate@2", "--to", "peft", "--prompt", "a"], "generate@2: holds no trained LoRA generator.*a checkpoint is none"),
        (["pool"], "pool: is a train_adapters stage, which makes no model: name a train stage"),
        (["conditions", "--to", "gguf"], "conditions: is a prepare_conditions stage, which makes no model"),
        (["pool@3"], "pool@3: 'pool' is a train_adapters stage, which makes no model"),
        (["pool", "--to", "peft", "--prompt", "a"], "pool: holds no trained LoRA generator"),
        (["generate/model", "--to", "peft", "--prompt", "a"], "name the generator's stage, RUN/STAGE"),
        (["generate", "--to", "peft"], "a generator needs something to read: give it by --prompt TEXT"),
        (["generate", "--to", "peft", "--prompt", ""], "prompt 1 has no token"),
        (["generate", "--to", "peft", "--prompt", "a", "--output", "recipe.json/x"], "recipe.json is a file"),
        (["generate", "--to", "peft", "--prompt", "a", "--output", "recipe.json"], "recipe.json: is a file"),
    ],
)
def test_wrong_names_of_an_export_are_refused(words: list[str], message: str, finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.run)
    done = CliRunner().invoke(app, ["export", *words])
    assert done.exit_code == 2 and re.search(message, " ".join(done.stderr.split())), done.output


def test_an_exported_adapter_is_the_generated_one_in_peft(finished: Finished) -> None:
    """By the command line from a prompt, and by a stage from a condition of the data."""
    from peft import PeftModel

    out = finished.home / "exported" / "red"
    done = CliRunner().invoke(app, ["export", str(finished.run / "generate"), "--to", "peft", "--prompt", "what red thing", "--output", str(out)])
    assert done.exit_code == 0, done.output
    stages = ("conditions", "pool", "deltas", "generate")
    to = finished.beside("exporting", *stages)
    name = finished.conditions.conditions[finished.conditions.split("held_out_source")[0]].name
    run(finished.home, finished.only(*stages, export={"kind": "export", "from": "generate", "to": "peft", "conditions": [name]}), to="exporting")
    (written,) = (path for path in (to / "export/export/peft").iterdir() if path.is_dir())
    context: Any = SimpleNamespace(recipe_dir=finished.home, name="test")
    student = open_generator(context, finished.run / "generate/model", finished.conditions, dtype=torch.float32)
    ids = torch.arange(24).reshape(2, 12)
    texts = condition_of(["what red thing"], load_tokenizer(str(finished.run / "generate/model")), *student.text_shape)
    own = torch.from_numpy(finished.conditions.texts.of(np.array([finished.conditions.split("held_out_source")[0]])))
    with torch.no_grad():
        bare = student.model(input_ids=ids).logits
        for folder, read in ((out, texts), (written, own)):
            with student.injector.active(student.generate(read)):
                wanted = student.model(input_ids=ids).logits
            found = PeftModel.from_pretrained(load_model(str(finished.base)), folder)(input_ids=ids).logits
            assert (found - wanted).abs().max() <= 1e-5 < (wanted - bare).abs().max()


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
    del record["sha256"]  # what is edited by hand has no seal
    record["entries"] = [entry for entry in record["entries"] if not entry["condition"].startswith("mix")]
    assert len(record["entries"]) == 6
    (finished.home / "unmixed/pool/adapters/pool.json").write_text(json.dumps(record))
    judge = {**JUDGE, "against": [], "probes": {"count": 2, "length": 8}}
    with pytest.raises(RunError, match="teachers that were really trained on mixes, and there are none: set `mixes`"):
        run(finished.home, finished.only(*stages, evaluate=judge), to="unmixed")
