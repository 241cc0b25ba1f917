"""Cache sizes and decode rates: the formula against the cache, the filled cache against the real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from families import tiny_model, tokens
from limbeck.config.parts.surgeries import HybridizeOptions
from limbeck.evaluation import speed
from limbeck.evaluation.decode import new_cache, step
from limbeck.evaluation.evaluate import describe
from limbeck.evaluation.speed import cache_bytes, decode_rates, filled_cache
from limbeck.models.limbeck_model import wrap_student

MIXERS: dict[str, dict[str, Any]] = {
    "gated_deltanet": {"kind": "gated_deltanet"},
    "convolution": {"kind": "gated_deltanet", "short_conv": 4},
    "swa": {"kind": "swa", "window": 12, "sinks": 2},
}


def hybrid(mixer: str, family: str = "qwen3") -> PreTrainedModel:
    options = HybridizeOptions.model_validate({"mixer": MIXERS[mixer], "keep": [1]})
    return wrap_student(tiny_model(family), [options], {"source": "test", "fingerprint": "test"}).eval()


@pytest.fixture(scope="module", params=["llama3", "mistral", "gemma3", *MIXERS])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return hybrid(request.param) if request.param in MIXERS else tiny_model(request.param)


def cache_tensors(cache: Any) -> list[dict[str, torch.Tensor]]:
    """The tensors of each cache layer, by name."""
    return [layer.states if hasattr(layer, "states") else {"keys": layer.keys, "values": layer.values} for layer in cache.layers]


@pytest.mark.parametrize("context", [3, 20, 70])
def test_bytes_are_those_of_the_cache_that_a_prefill_leaves(model: PreTrainedModel, context: int) -> None:
    cache = new_cache(model)
    step(model, tokens(1, context), cache)
    held = sum(tensor.numel() * tensor.element_size() for layer in cache_tensors(cache) for tensor in layer.values())
    counted = cache_bytes(model, context, dtype_bytes=4)
    assert counted["bytes"] == counted["kv"] + counted["state"] == held
    assert counted["context"] == context


def test_a_filled_cache_is_shaped_like_one_that_was_run(model: PreTrainedModel) -> None:
    context = 70
    real, filled = new_cache(model), filled_cache(model, context)
    step(model, tokens(1, context), real)
    shapes = [
        [{name: tensor.shape for name, tensor in layer.items()} for layer in cache_tensors(cache)] for cache in (real, filled)
    ]
    assert shapes[0] == shapes[1]
    assert [layer.get_seq_length() for layer in filled.layers] == [context] * len(real.layers)
    logits = step(model, tokens(1, 1), filled)
    assert logits.isfinite().all()
    assert filled.get_seq_length() == context + 1


def test_filling_a_cache_runs_only_a_few_tokens_through_the_model() -> None:
    student, run = hybrid("gated_deltanet"), []
    student.model.register_forward_pre_hook(
        lambda module, args, kwargs: run.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    filled_cache(student, 32768)
    assert sum(run) <= 16


def test_a_hybrids_cache_stops_growing_where_its_layers_do() -> None:
    student = hybrid("gated_deltanet")
    teacher = tiny_model("qwen3")
    small, large = (cache_bytes(student, context) for context in (1024, 32768))
    assert large["state"] == small["state"] > 0
    assert large["kv"] == 32 * small["kv"] == cache_bytes(teacher, 32768)["kv"] // 4
    assert describe(student)["layers"] == ["gated_deltanet", "softmax", "gated_deltanet", "gated_deltanet"]
    assert describe(teacher)["layers"] == ["softmax"] * 4 and describe(student)["model_type"] == "qwen3"


def test_models_take_turns_and_each_gets_its_own_median(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"fast": tiny_model("llama3"), "slow": tiny_model("llama3", seed=1)}
    clock, turns = 0.0, []
    names = {id(model): name for name, model in models.items()}

    def fake_step(model: PreTrainedModel, input_ids_BT: torch.Tensor, cache: Any) -> None:
        nonlocal clock
        name = names[id(model)]
        turns.append(name)
        # One step in each model is disturbed: a median does not notice.
        clock += {"fast": 1.0, "slow": 4.0}[name] * (100 if len(turns) in (9, 10) else 1)

    monkeypatch.setattr(speed, "filled_cache", lambda model, context, seed: None)
    monkeypatch.setattr(speed, "step", fake_step)
    monkeypatch.setattr(speed, "_now", lambda device: clock)
    rates = decode_rates(models, [64], tokens=5)
    assert turns == ["fast", "slow"] * (5 + speed.WARMUP)
    assert rates["fast"] == [{"context": 64, "tokens_per_second": 1.0, "seconds": 1.0, "count": 5}]
    assert rates["slow"][0]["tokens_per_second"] == 0.25


def test_measuring_the_rate_moves_no_global_randomness() -> None:
    before = torch.get_rng_state()
    rates = decode_rates({"teacher": tiny_model("mistral")}, [16, 256], tokens=2)
    assert torch.equal(before, torch.get_rng_state())
    assert [entry["context"] for entry in rates["teacher"]] == [16, 256]
    assert all(entry["tokens_per_second"] > 0 for entry in rates["teacher"])
