"""Plans of recipes: every shipped one is planned, what is said to fit does, and mistakes are told with a way out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from limbeck.cli.app import app
from limbeck.config.load import load_recipe, recipe_folder, shipped_recipes
from limbeck.planner.devices import DEVICES, PlanError, find_device, parse_bytes, parse_count, size_text
from limbeck.planner.machine import Machine
from limbeck.planner.memory import Item, always, peak
from limbeck.planner.plan import plan_of
from limbeck.planner.report import Part
from limbeck.planner.sources import Chain, Models, table
from limbeck.planner.storage import checkpoint_plan
from limbeck.planner.training import Training, items_of, resolve

runner = CliRunner()
H100, H200, CPU = find_device("h100"), find_device("h200"), replace(find_device("cpu"), memory=64e9)
TRAINS = [(name, stage) for name in shipped_recipes() for stage, options in load_recipe(name).stages.items() if options.kind == "train"]
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": 0.49, "Qwen/Qwen2.5-1.5B": 1.54, "Qwen/Qwen2.5-7B": 7.62, "Qwen/Qwen3-0.6B": 0.60, "Qwen/Qwen3-8B": 8.19,
    "meta-llama/Llama-3.2-3B": 3.21, "Qwen/Qwen3-Coder-480B-A35B-Instruct": 480.15, "Qwen/Qwen3-Coder-480B-A35B-Instruct-FP8": 480.15,
    "Qwen/Qwen3-Coder-Next": 79.67,
}  # fmt: skip
"""Billions of parameters by their model cards."""


def plan(*words: str) -> Any:
    return runner.invoke(app, ["plan", *words])


def stage_of(recipe: str, stage: str, *overrides: str, machine: Machine | None = None) -> Training:
    chain = Chain(load_recipe(recipe, overrides), Models(recipe_folder(recipe)))
    return resolve(chain, stage, machine or Machine(H100))


def held(stage: Training) -> dict[str, Item]:
    return {item.name: item for item in items_of(stage)}


def most(stage: Training) -> float:
    return peak(items_of(stage))[0]


# -- every recipe, every model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_is_parsed_and_planned(name: str) -> None:
    made = plan_of(name, (), Machine(H200, 8))
    recipe = load_recipe(name)
    assert {part.name for part in made.parts} == set(recipe.stages)
    for part in made.parts:
        assert part.facts or part.notes, part.name
        if recipe.stages[part.name].kind == "train":
            facts = {(fact.group, fact.name): fact.value for fact in part.facts}
            assert facts["parameters", "trainable"] and facts["disk", "one checkpoint"] and part.peak[0] > 0
    assert json.loads(json.dumps(made.to_json(), allow_nan=False))["fits"] is made.fits


@pytest.mark.parametrize("name", sorted(table()))
def test_models_of_the_table_have_the_parameters_of_their_cards(name: str) -> None:
    model = Models().architecture(name)
    assert model.exact and round(model.total / 1e9, 2) == PUBLISHED[name]


def test_every_base_that_a_shipped_recipe_names_is_known() -> None:
    assert set(PUBLISHED) == set(table())
    for name in shipped_recipes():
        recipe = load_recipe(name)
        chain = Chain(recipe, Models(recipe_folder(name)))
        for stage, options in recipe.stages.items():
            if options.kind == "train":
                assert chain.student(stage).architecture.exact, (name, stage)


def test_one_gpu_of_80_gb_takes_the_recipe_of_1_5_billion_and_eight_train_those_of_7_and_8() -> None:
    assert plan_of("hybrid_qwen2.5_1.5b", (), Machine(H100)).fits and plan_of("hybrid_qwen3_0.6b", (), Machine(H100)).fits
    for name in ("hybrid_qwen2.5_7b", "hybrid_qwen3_8b"):
        assert not any(part.fits for part in plan_of(name, (), Machine(H100)).parts if part.kind == "train")
        assert all(part.fits for part in plan_of(name, (), Machine(H100, 8)).parts if part.kind == "train")


def test_an_evaluation_holds_every_model_that_it_compares_at_once() -> None:
    part = plan_of("hybrid_qwen2.5_7b", (), Machine(H200, 8), stage="evaluate").parts[0]
    assert not part.fits and part.peak[0] > 5 * 4 * 7.6e9
    words = part.changes[0]
    assert words.startswith("evaluate.against=[teacher,") and plan("hybrid_qwen2.5_7b", words, "--device", "h200", "--stage", "evaluate").exit_code == 0


# -- what a rank holds ----------------------------------------------------------------------------------------------------


def test_adamw_keeps_two_numbers_a_weight_and_muon_and_lion_one() -> None:
    stage = stage_of("pretrain", "pretrain", "pretrain.loop.precision=float32")
    weights = held(stage)["trained weights"].most
    states = {
        kind: held(stage_of("pretrain", "pretrain", f"pretrain.optim.groups=[{{kind: {kind}, lr: 1e-3}}]"))["optimiser"].most / weights
        for kind in ("adamw", "lion", "muon")
    }
    assert weights == 4 * sum(w.count for w in stage.trained)
    assert states == {"adamw": 2, "lion": 1, "muon": 1}
    mixed = "pretrain.optim.groups=[{match: '*_proj.weight', kind: muon, lr: 0.02}, {kind: adamw, lr: 1e-3}]"
    assert 1 < held(stage_of("pretrain", "pretrain", mixed))["optimiser"].most / weights < 2


@pytest.mark.parametrize(("recipe", "stage"), TRAINS)
def test_recomputing_layers_smaller_micro_batches_and_more_ranks_never_take_more(recipe: str, stage: str) -> None:
    here = stage_of(recipe, stage)
    smaller = replace(here, options=here.options.model_copy(update={"loop": here.options.loop.model_copy(update={"microbatch": 1})}))
    recomputed = replace(here, options=here.options.model_copy(update={"loop": here.options.loop.model_copy(update={"activation_checkpointing": True})}))
    name = "activations"
    assert held(smaller)[name].most <= held(here)[name].most and held(recomputed)[name].most <= held(here)[name].most
    many = replace(here, machine=replace(here.machine, gpus=4))
    assert held(many)["trained weights"].most == held(here)["trained weights"].most / 4
    assert held(many)["optimiser"].most == held(here)["optimiser"].most / 4


def test_zero_2_holds_gathered_layers_that_zero_3_puts_away() -> None:
    machine = Machine(H100, 8)
    two, three = (held(stage_of("hybrid_qwen3_8b", "distil", f"distil.loop.zero_stage={n}", machine=machine))["compute copies"].most for n in (2, 3))
    assert two > 3 * three and two == pytest.approx(2 * stage_of("hybrid_qwen3_8b", "distil").student.architecture.total, rel=0.1)


def test_fused_losses_hold_a_chunk_and_not_the_vocabulary_of_every_token() -> None:
    stage = stage_of("hybrid_qwen2.5_1.5b", "distil")
    part = plan_of("hybrid_qwen2.5_1.5b", (), Machine(H100), stage="distil").parts[0]
    dense = next(fact.value for fact in part.facts if fact.group == "logits")
    assert dense == 9 * stage.setting.run.tokens * 151_936 * 4
    assert held(stage)["logits workspace"].most < 0.1 * dense
    narrow = stage_of("hybrid_qwen2.5_1.5b", "distil", "distil.objectives.0.chunk=128")
    assert held(narrow)["logits workspace"].most < 0.4 * held(stage)["logits workspace"].most


def test_a_frozen_base_has_no_optimiser_and_its_own_dtype() -> None:
    stage = stage_of("agentic_lora", "warmup", machine=Machine(H200, 8))
    found = held(stage)
    assert stage.student.network is not None and stage.student.network.total == 48_172_856
    assert found["optimiser"].most * 8 == 2 * 4 * 48_172_856
    assert found["frozen weights"].most * 8 == pytest.approx(2 * 79_674_391_296, rel=1e-6)


def test_checkpoints_count_the_last_ones_the_one_in_flight_the_rare_ones_and_the_final_one() -> None:
    stage = stage_of("pretrain", "pretrain")
    loop = stage.options.loop.model_copy(update={"checkpoint_every": 100, "keep_last": 3})
    groups = [(stage.options.optim.groups[0], stage.trained)]
    size = sum(w.count for w in stage.trained)
    plain = checkpoint_plan(groups, 7.0, loop, 1000)
    assert (plain.one, plain.kept, plain.disk) == (12 * size, 4, 5 * 12 * size + 7)
    rare = checkpoint_plan(groups, 7.0, loop.model_copy(update={"keep_every": 500}), 1000)
    assert rare.disk == plain.disk + 2 * 12 * size
    everything = checkpoint_plan(groups, 7.0, loop.model_copy(update={"keep_last": 0}), 1000)
    assert everything.kept == 11


def test_a_peak_is_the_largest_moment_and_not_the_sum_of_all() -> None:
    assert peak([always("a", 1.0), Item("b", forward=5.0), Item("c", step=4.0)]) == (6.0, "forward")


# -- verdicts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "stage", "overrides", "device", "gpus"),
    [
        ("hybrid_qwen2.5_1.5b", "distil", (), "rtx4090", 1),
        ("hybrid_qwen2.5_1.5b", "distil", ("distil.loop.microbatch=32",), "l40s", 1),
        ("hybrid_qwen2.5_1.5b", "distil", ("distil.loop.activation_checkpointing=false",), "h100", 1),
        ("hybrid_qwen3_8b", "extend", (), "h100", 1),
        ("hybrid_qwen2.5_7b", "distil", ("distil.teacher.dtype=float32",), "h100", 2),
        ("ternary_qwen3_coder_next", "distil", (), "h200", 8),
        ("agentic_lora", "warmup", ("warmup.student.surgery.0.base_dtype=float32",), "h100", 4),
        ("agentic_lora_tiny", "main", (), "h200", 3),
    ],
)  # fmt: skip
def test_the_smallest_change_fits_and_nothing_smaller_does(recipe: str, stage: str, overrides: tuple[str, ...], device: str, gpus: int) -> None:
    """The words are put on the command line as they are said."""
    words = ["--device", device, "--gpus", str(gpus), "--stage", stage, "--brief"]
    before = json.loads(plan(recipe, *overrides, *words, "--json").output)["parts"][0]
    assert not before["fits"] and before["changes"], before["violated"]
    settings = [word for word in before["changes"] if "=" in word]
    options = [part for word in before["changes"] if "=" not in word for part in word.split()]
    again = plan(recipe, *overrides, *settings, *words, *options)
    assert again.exit_code == 0, again.output
    # Without any one of them it does not.
    for word in before["changes"]:
        rest = [w for w in settings if w != word]
        others = [] if word in (" ".join(options), *options) else options
        if rest or others or len(before["changes"]) == 1:
            assert plan(recipe, *overrides, *rest, *words, *others).exit_code == 1


def test_exit_codes_say_whether_it_fits() -> None:
    assert plan("hybrid").exit_code == 0
    refused = plan("Qwen/Qwen3-Coder-480B-A35B-Instruct-FP8", "--device", "h200", "--gpus", "4")
    assert refused.exit_code == 1 and refused.output.rstrip().endswith("verdict: does not fit")
    assert "smallest change that fits: --gpus 8 --ep 8 or --dtype int4" in refused.output
    assert plan("Qwen3-Coder-480B-A35B-Instruct-FP8", "--device", "h200", "--gpus", "8").exit_code == 0
    full = plan("pretrain", "--disk", "1MB", "--stage", "pretrain")
    assert full.exit_code == 1 and "lower loop.keep_last" in full.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("hybird",), "did you mean 'hybrid'"),
        (("hybrid", "align.lop.tokens=3"), "did you mean 'loop'"),
        (("hybrid", "--device", "h300"), "known: h100, h200"),
        (("hybrid", "--memory", "lots"), "--memory: 'lots' is no size"),
        (("hybrid", "--tokens", "many"), "--tokens: 'many' is no number"),
        (("hybrid", "--stage", "distill"), "did you mean 'distil'"),
        (("hybrid", "--dtype", "fp4"), "allowed: fp32, bf16, fp8, int4"),
        (("hybrid", "--config", "name"), "is not NAME=FILE"),
        (("hybrid", "align.student.base=someone/unknown-1B"), "--config someone/unknown-1B=FILE"),
        (("someone/unknown-1B",), "--config someone/unknown-1B=FILE"),
        (("builtin:nothing",), "built in: code-2m"),
        (("builtin:code-2m", "loop.tokens=1M"), "a model has no settings"),
        (("builtin:code-2m", "--stage", "align"), "a model has no stages"),
        (("hybrid", "align.student.surgery.0.keep=[99]"), "no layer 99"),
        (("hybrid", "--gpus", "0"), "Invalid value for '--gpus'"),
    ],
)
def test_mistakes_are_told_with_what_is_allowed_and_end_with_code_2(words: tuple[str, ...], message: str) -> None:
    done = plan(*words)
    assert done.exit_code == 2 and message in " ".join(done.stderr.split()).replace("│ ", ""), done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"), ("[]", "is no JSON object"), ("{}", "has no `model_type`"),
        ('{"model_type": "qwen3"}', "has no `num_hidden_layers`"), ('{"model_type": "t5", "is_encoder_decoder": true}', "is an encoder-decoder"),
        ('{"model_type": "deepseek_v3", "kv_lora_rank": 8}', "multi-head latent attention"),
        ('{"model_type": "qwen3", "num_hidden_layers": "many"}', "`num_hidden_layers` is 'many'"),
        ('{"model_type": "qwen3", "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 9, "intermediate_size": 8, "num_attention_heads": 4, '
         '"num_key_value_heads": 3}', "4 attention heads cannot share 3"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_counted_is_refused_by_name(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    done = plan(str(tmp_path / "config.json"))
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.output
    assert plan(str(tmp_path)).stderr == done.stderr.replace(str(tmp_path / "config.json") + ":", f"{tmp_path}:") or message in plan(str(tmp_path)).stderr


# -- where configs come from ----------------------------------------------------------------------------------------------


def test_a_model_is_a_folder_a_file_a_name_or_given_by_hand(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(table()["Qwen/Qwen3-0.6B"]))
    named = json.loads(plan("Qwen/Qwen3-0.6B", "--json").output)["parts"][0]["facts"]
    for words in ((str(tmp_path),), (str(tmp_path / "config.json"),), ("Qwen3-0.6B",), ("me/mine", "--config", f"me/mine={tmp_path}")):
        done = plan(*words, "--json")
        assert done.exit_code == 0 and json.loads(done.output)["parts"][0]["facts"] == named
    words = ("align.student.base=me/mine", "distil.teacher.model=me/mine", "--config", f"me/mine={tmp_path}/config.json")
    done = plan("hybrid", *words, "--stage", "distil", "--json")
    assert json.loads(done.output)["parts"][0]["facts"]["parameters"]["total"]["value"] > 596_049_920


def test_the_hub_cache_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--me--mine" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(table()["Qwen/Qwen3-0.6B"]))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert plan("me/mine").exit_code == 0 and plan("me/other").exit_code == 2


def test_a_stage_goes_on_with_the_student_of_another() -> None:
    chain = Chain(load_recipe("hybrid_qwen2.5_1.5b"), Models())
    counts = {name: sum(layer.mixer is not None for layer in chain.student(name).architecture.layers) for name in ("align", "distil", "extend")}
    assert counts == {"align": 28, "distil": 21, "extend": 21}
    assert chain.student("export") == chain.student("extend")
    assert chain.student("align").base == Models().architecture("Qwen/Qwen2.5-1.5B")


def test_a_saved_student_is_counted_with_its_surgery(tmp_path: Path) -> None:
    surgery = [{"kind": "hybridize", "mixer": {"kind": "gated_deltanet"}, "keep": [0]}]
    section = {"surgery": surgery, "base": {"source": "x", "model_type": "qwen3", "fingerprint": {}}}
    (tmp_path / "config.json").write_text(json.dumps({**table()["Qwen/Qwen3-0.6B"], "model_type": "limbeck", "limbeck": section}))
    found = Models().student(str(tmp_path))
    assert [layer.mixer is None for layer in found.architecture.layers] == [True] + 27 * [False]


def test_a_family_that_is_not_known_is_counted_and_marked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**table()["Qwen/Qwen2.5-0.5B"], "model_type": "newcomer"}))
    assert not Models().architecture(str(tmp_path)).exact
    assert "family not known exactly" in plan(str(tmp_path)).output


# -- numbers for people ---------------------------------------------------------------------------------------------------


def test_sizes_and_counts_are_read_as_people_write_them() -> None:
    assert parse_bytes("141GB", "--memory") == 141e9 and parse_bytes("80 GiB", "--memory") == 80 * 2**30 and parse_bytes("1.5T", "--memory") == 1.5e12
    assert parse_count("28k", "--tokens") == 28_000 and parse_count("0.9B", "--tokens") == 0.9e9
    assert [size_text(size) for size in (481.9e9, 253_952, 1.92e12, 0)] == ["482 GB", "254 kB", "1.92 TB", "0 B"]
    with pytest.raises(PlanError):
        parse_bytes("0GB", "--memory")


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_has_memory_and_rates(name: str) -> None:
    device = find_device(name.upper())
    assert device.memory > 1e9 and device.bandwidth > 1e9 and device.bf16 >= device.fp32 > 0
    assert find_device(name, 5e9).memory == 5e9


def test_a_pipe_gets_every_row_on_one_line() -> None:
    output = plan("hybrid_qwen2.5_1.5b", "--stage", "distil").output
    assert "ours is in the table" in next(line for line in output.splitlines() if "dense kl" in line)
    assert "[tokens, V]" in output, "brackets are no markup"


def test_a_part_is_json_with_every_moment() -> None:
    part: Part = plan_of("hybrid", (), Machine(CPU), stage="distil").parts[0]
    memory = part.to_json()["memory"]
    assert {"forward", "backward", "step", "save"} <= set(memory["items"][0]) and memory["peak"] == part.peak[0] <= memory["budget"]
