"""The planner's golden figures: sizes of large models by which wrong plans were found out, to the digits of their derivation."""

from __future__ import annotations

from typing import Any

import pytest

from limbeck.config.parts.surgeries import LoraGeneratorOptions, TernarizeOptions
from limbeck.planner.devices import find_device
from limbeck.planner.generators import generator_network, linears, lora_numbers
from limbeck.planner.machine import Machine
from limbeck.planner.plan import model_plan, plan_of
from limbeck.planner.report import Part, Plan
from limbeck.planner.serving import Serving, first_violated, serve, usual_split, ways_out
from limbeck.planner.sources import Models
from limbeck.planner.storage import cache_bytes, gguf_bytes, weight_bytes
from limbeck.planner.students import operate, plain
from limbeck.planner.texts import TRAJECTORY_TOKENS
from limbeck.planner.throughput import forward_flops

CODER, NEXT = "Qwen/Qwen3-Coder-480B-A35B-Instruct-FP8", "Qwen/Qwen3-Coder-Next"
H200 = find_device("h200")
DELTANET, ATTENTION = ("in_proj_qkvz", "in_proj_ba", "out_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")


def model(name: str) -> Any:
    return Models().architecture(name)


def fact(plan: Plan | Part, group: str, name: str) -> Any:
    parts = plan.parts if isinstance(plan, Plan) else (plan,)
    return next(f.value for part in parts for f in part.facts if (f.group, f.name) == (group, name))


def billions(number: float) -> float:
    return round(number / 1e9, 2)


def served(gpus: int, dtype: str = "fp8", **changes: Any) -> Serving:
    tp, ep = usual_split(model(CODER), dtype, H200, gpus)
    return Serving(**{"model": model(CODER), "dtype": dtype, "device": H200, "gpus": gpus, "tp": tp, "ep": ep, **changes})


# -- Qwen3-Coder-480B-A35B ------------------------------------------------------------------------------------------------


def test_qwen3_coder_480b_has_480_billion_parameters_of_which_a_token_meets_35() -> None:
    coder = model(CODER)
    assert (billions(coder.total), billions(coder.active)) == (480.15, 35.47)
    assert (round(coder.of("experts") / 1e9, 1), billions(coder.total - coder.of("experts"))) == (468.1, 12.07)


def test_its_fp8_weights_are_482_gb_and_not_the_280_of_the_plan() -> None:
    size = weight_bytes(model(CODER).weights, "fp8")
    assert round(size / 1e9) == 482 and round(size / 2**30) == 449


def test_its_cache_takes_253_952_bytes_a_token() -> None:
    assert cache_bytes(model(CODER), 32_768) == (253_952, 0)
    assert cache_bytes(model(CODER), 32_768, 1) == (126_976, 0)
    assert round(262_144 * 253_952 / 1e9, 1) == 66.6


def test_four_h200_leave_about_26_gb_so_eight_are_needed_or_four_bits() -> None:
    four = served(4)
    found = serve(four)
    assert round(4 * 141 * 0.9) - round(found.weights / 1e9) == 26 and 25e9 <= found.room <= 26e9
    assert not found.problems and not found.fits and "caches of 1 sequence of 262,144 tokens take 66.6 GB" in first_violated(four, found)
    assert ways_out(four)[:2] == ["--gpus 8 --ep 8", "--dtype int4"]
    assert serve(served(8)).fits and serve(served(4, "int4")).fits
    assert 255e9 <= serve(served(4, "int4")).weights <= 270e9
    # With prompt log-probabilities of two to four thousand tokens at a time: one or two sequences of 32k.
    assert all(40_000 <= round(serve(served(4, scored=scored)).cached_tokens, -3) <= 80_000 for scored in (2048, 4096))


def test_eight_gpus_take_expert_parallel_since_320_is_no_multiple_of_128() -> None:
    split = served(8, ep=1)
    assert serve(split).problems == (
        "an expert's width of 2560 / 8 = 320 is no multiple of the block of 128 of fp8: spread whole experts (--ep 8)",
    )
    assert not serve(split).fits and ways_out(split)[0] == "--ep 8"
    assert usual_split(model(CODER), "fp8", H200, 8) == (8, 8) and usual_split(model(CODER), "fp8", H200, 4) == (4, 1)
    found = serve(served(8))
    assert round(found.room / 1e9) in (532, 533) and round(found.cached_tokens / 1e6, 1) == 2.1


def test_prompt_log_probabilities_spike_by_7_and_a_half_gb_at_8192_tokens() -> None:
    assert round(serve(served(8, scored=8192)).spike / 1e9, 2) == 7.47


# -- Qwen3-Coder-Next -----------------------------------------------------------------------------------------------------


def test_qwen3_coder_next_has_79_67_billion_parameters_159_gb() -> None:
    student = model(NEXT)
    assert (billions(student.total), round(student.active / 1e9, 1)) == (79.67, 3.9)
    assert round((student.active - student.of("embedding")) / 1e9, 2) == 3.56
    assert round(weight_bytes(student.weights, "bf16") / 1e9) == 159
    assert sum(layer.deltanet is not None for layer in student.layers) == 36
    assert sum(layer.attention is not None and layer.attention.gated for layer in student.layers) == 12


def test_its_cache_takes_24_576_bytes_a_token_and_77_mb_a_sequence() -> None:
    token, state = cache_bytes(model(NEXT), 262_144)
    assert token == 24_576 and round(state / 1e6) == 77


def test_its_linears_are_those_that_exist() -> None:
    sizes = {site.module.rsplit(".", 1)[-1]: (site.inputs, site.outputs) for site in linears(model(NEXT)) if "attn" in site.module}
    assert sizes == {
        "in_proj_qkvz": (2048, 12_288), "in_proj_ba": (2048, 64), "out_proj": (4096, 2048),
        "q_proj": (2048, 8192), "k_proj": (2048, 512), "v_proj": (2048, 512), "o_proj": (4096, 2048),
    }  # fmt: skip


def test_a_lora_of_rank_16_on_all_of_them_has_17_14_million_numbers() -> None:
    student = model(NEXT)
    assert lora_numbers(student, ATTENTION, 16) == 12 * 344_064 and lora_numbers(student, DELTANET, 16) == 36 * 361_472
    assert lora_numbers(student, [*DELTANET, *ATTENTION], 16) == 17_141_760


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"width": 512, "reader": {"heads": 8}}, 54_479_672),
        ({"width": 512, "trunk": 1, "reader": {"blocks": 1, "heads": 8}}, 48_172_856),
    ],
)
def test_generators_of_it_have_the_parameters_that_they_have_on_the_meta_device(settings: dict[str, Any], numbers: int) -> None:
    options = LoraGeneratorOptions.model_validate({"targets": [*DELTANET, *ATTENTION], "rank": 16, "alpha": 32, **settings})
    network = generator_network(model(NEXT), options, 2048, (1, 512))
    assert (network.total, network.lora) == (numbers, 17_141_760)


# -- ternary --------------------------------------------------------------------------------------------------------------


def test_ternary_qwen3_coder_next_by_type_of_file() -> None:
    student = operate(plain(model(NEXT)), [TernarizeOptions(plan="moe_experts")])
    assert billions(sum(w.count for w in student.ternary)) == 77.31
    found = {kind: gguf_bytes(student, kind) for kind in ("tq2_0", "tq1_0", "q2_0", "bf16")}
    assert {kind: billions(inner) for kind, (inner, _) in found.items()} == {"tq2_0": 19.93, "tq1_0": 16.31, "q2_0": 21.74, "bf16": 154.62}
    assert found["tq2_0"][1] / 1e9 == pytest.approx(24.7, abs=0.1)


def test_training_all_experts_with_master_weights_and_a_momentum_is_618_gb_and_not_5() -> None:
    plan = model_plan(NEXT, Models(), Machine(H200, 8))
    assert round(fact(plan, "ternary", "master + Muon") / 1e9) == 618
    stage = plan_of("ternary_qwen3_coder_next", (), Machine(H200, 8)).parts[0]
    held = {item.name: item.most * 8 for item in stage.items}
    assert round((held["trained weights"] + held["optimiser"]) / 1e9) == 637, "with what is not ternary: 79.67 billion x 8"
    assert not stage.fits


# -- trajectories ---------------------------------------------------------------------------------------------------------


def test_trajectories_are_40_to_50_thousand_tokens_and_twenty_epochs_online_are_days() -> None:
    assert 40_000 <= TRAJECTORY_TOKENS <= 50_000
    tokens = 20_000 * TRAJECTORY_TOKENS
    assert tokens == 0.9e9
    assert round(20 * tokens / 28e3 / 86_400, 1) == 7.4 and round(20 * 160e6 / 28e3 / 86_400, 1) == 1.3


def test_a_stored_signal_needs_the_teacher_for_one_epoch_only() -> None:
    machine = Machine(H200, 8, tokens=0.9e9, teacher_rate=28e3)
    stored = {part.name: part for part in plan_of("agentic_lora", (), machine).parts}
    assert round((stored["capture_8k"].seconds or 0) / 3600) == 9
    asked = "main.teacher={kind: http, url: 'http://127.0.0.1:8100', protocol: vllm, model: Qwen/Qwen3-Coder-480B-A35B-Instruct-FP8}"
    online = {part.name: part for part in plan_of("agentic_lora", (asked,), machine, stage="main").parts}
    assert round((online["main"].seconds or 0) / 86_400, 1) == 7.4
    assert stored["main"].seconds is not None and stored["main"].seconds < 0.5 * (online["main"].seconds or 0)


def test_a_token_of_the_teacher_costs_70_gflop() -> None:
    assert 68e9 <= forward_flops(model(CODER), 1) <= 71.5e9
    assert 7.0e9 <= forward_flops(model(NEXT), 1) <= 7.5e9
