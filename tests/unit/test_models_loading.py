"""Models come in whole or not at all, and go out with everything that belongs to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import linear_plugin
from families import FAMILIES, family_config, tiny_model, tokens
from limbeck.errors import DataError, ModelError
from limbeck.models import loading
from limbeck.models.head import backbone
from limbeck.models.limbeck_model import wrap_student
from limbeck.models.loading import build_model, fingerprint, load_model, load_tokenizer, resolve_source, save_model

BASE = {"source": "tiny", "fingerprint": "none"}


def _student(**changes: Any) -> Any:
    return wrap_student(tiny_model("qwen3", **changes), [linear_plugin.DecayOptions(layers=(1,))], BASE)


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    save_model(tiny_model("llama3"), tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def hybrid(tmp_path: Path) -> Path:
    save_model(_student(), tmp_path / "hybrid")
    return tmp_path / "hybrid"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_with_the_same_logits(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(family, tied=tied)
    save_model(model, tmp_path / "m")
    again, ids = load_model(str(tmp_path / "m")), tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert ("lm_head.weight" in load_file(tmp_path / "m" / "model.safetensors")) == (not tied)


def test_a_missing_tensor_is_an_error_with_its_name(plain: Path) -> None:
    _edit(plain, lambda w: w.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"not in the files: model\.layers\.2\.mlp\.up_proj\.weight"):
        load_model(str(plain))


def test_an_unexpected_tensor_is_an_error_with_its_name_and_the_nearest(plain: Path) -> None:
    _edit(plain, lambda w: w.update({"model.layers.2.mlp.up_projection.weight": w.pop("model.layers.2.mlp.up_proj.weight")}))
    with pytest.raises(
        ModelError, match=r"not in the model: model\.layers\.2\.mlp\.up_projection\.weight \(nearest: .*up_proj\.weight\)"
    ):
        load_model(str(plain))


def test_a_tensor_of_another_shape_is_an_error_with_both_shapes(plain: Path) -> None:
    _edit(plain, lambda w: w.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight is \(31,\) in the files, \(32,\) in the model"):
        load_model(str(plain))


@pytest.mark.parametrize("name", ["decay_H", "gain"], ids=["parameter", "buffer"])
def test_students_load_strictly_with_stock_transformers_too(name: str, hybrid: Path) -> None:
    from transformers import AutoModelForCausalLM

    _edit(hybrid, lambda w: w.pop(f"model.layers.1.self_attn.{name}"))
    for load in (load_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ModelError, match=f"not in the files: model.layers.1.self_attn.{name}"):
            load(str(hybrid))


def test_every_buffer_of_a_student_survives_the_round_trip(tmp_path: Path) -> None:
    student = _student()
    with torch.no_grad():
        student.mixers()[1].gain.fill_(0.625)
    save_model(student, tmp_path / "m")
    again = load_model(str(tmp_path / "m"))
    before, after = dict(student.named_buffers()), dict(again.named_buffers())
    assert before.keys() == after.keys() and len(before) >= 2
    for name in before:
        assert torch.equal(before[name], after[name]), name


def test_a_damaged_file_is_named(plain: Path) -> None:
    (plain / "model.safetensors").write_bytes((plain / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ModelError, match="plain: cannot be loaded"):
        load_model(str(plain))


def test_rotary_frequencies_stay_fp32_in_a_bf16_model(plain: Path) -> None:
    model = load_model(str(plain), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert torch.equal(backbone(model).rotary_emb.inv_freq, backbone(load_model(str(plain))).rotary_emb.inv_freq)


@pytest.mark.parametrize("student", [False, True], ids=["plain", "student"])
def test_the_attention_implementation_survives_the_round_trip(student: bool, tmp_path: Path) -> None:
    model = build_model(family_config("qwen3"), attention="eager")
    if student:
        model = wrap_student(model, [linear_plugin.DecayOptions(layers=(1,))], BASE)
    save_model(model, tmp_path / "m")
    assert load_model(str(tmp_path / "m")).config._attn_implementation == "eager"
    assert load_model(str(tmp_path / "m"), attention="sdpa").config._attn_implementation == "sdpa"


def test_an_attention_implementation_that_is_not_there_names_the_way_out(plain: Path) -> None:
    with pytest.raises(ModelError, match=r"flash_attention_2.*sdpa"):
        load_model(str(plain), attention="flash_attention_2")
    with pytest.raises(ModelError, match="flash_attn_9"):
        load_model(str(plain), attention="flash_attn_9")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, r"no config\.json in this folder \(it is empty\)"),
        ({"config.json": "{}"}, "no weights"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "pickled weights only"),
        ({"config.json": "{}", "model.gguf": ""}, "GGUF weights only"),
        ({"config.json": "{", "model.safetensors": ""}, r"config\.json cannot be read"),
        ({"config.json": '{"model_type": "lama"}', "model.safetensors": ""}, r"config\.json cannot be read"),
        ({"config.json": '{"model_type": "t5"}', "model.safetensors": ""}, "encoder-decoder"),
        ({"config.json": '{"model_type": "limbeck"}', "model.safetensors": ""}, "no `limbeck` section"),
        (
            {"config.json": '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', "model.safetensors": ""},
            "quantised",
        ),
    ],
)
def test_a_folder_that_is_not_a_model_says_what_it_lacks(files: dict[str, str], words: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=words):
        load_model(str(tmp_path))


def test_a_folder_or_hub_name_that_is_not_there_says_so() -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_model("./nowhere/at/all")
    with pytest.raises(ModelError, match="looked for on the hub"):
        load_model("nobody/nothing-that-exists")
    with pytest.raises(DataError, match="looked for on the hub"):
        load_tokenizer("nobody/nothing-that-exists")


def test_sources_are_found_beside_the_recipe_in_the_package_or_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe" / "model").mkdir(parents=True)
    (tmp_path / "builtin" / "tiny").mkdir(parents=True)
    monkeypatch.setattr(loading, "BUILTIN", tmp_path / "builtin")
    assert resolve_source("model", tmp_path / "recipe") == str(tmp_path / "recipe" / "model")
    assert resolve_source("builtin:tiny") == str(tmp_path / "builtin" / "tiny")
    assert resolve_source("Qwen/Qwen2.5-1.5B") == "Qwen/Qwen2.5-1.5B"
    with pytest.raises(ModelError, match="did you mean 'tiny'"):
        resolve_source("builtin:tinny")
    with pytest.raises(ModelError, match="no such folder"):
        resolve_source("models/a/b", tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        resolve_source("./model", tmp_path)


def test_a_config_with_an_unknown_field_or_family_is_refused_with_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"config\.hiden_size: unknown field of 'qwen3', did you mean 'hidden_size'"):
        build_model({"model_type": "qwen3", "hiden_size": 32})
    with pytest.raises(ModelError, match="did you mean 'qwen3'"):
        build_model({"model_type": "qwen3x"})
    with pytest.raises(ModelError, match=r"config\.model_type: is missing"):
        build_model({"hidden_size": 32})
    with pytest.raises(ModelError, match="refuses it"):
        build_model({"model_type": "qwen3", "hidden_size": "wide"})


def test_building_is_seeded_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    weights = [build_model(family_config("qwen3"), seed=seed).lm_head.weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(before, torch.get_rng_state())


def test_saving_in_bf16_casts_a_copy_and_says_so_in_the_config(tmp_path: Path) -> None:
    student = _student(tied=True)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    save_model(student, tmp_path / "m", dtype=torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    saved = load_file(tmp_path / "m" / "model.safetensors")
    assert saved["model.layers.1.self_attn.decay_H"].dtype == saved["model.norm.weight"].dtype == torch.bfloat16
    assert saved["model.layers.1.self_attn.gain"].dtype == torch.float32
    assert "lm_head.weight" not in saved
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(str(tmp_path / "m"), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_gathered_state_dict_of_a_tied_model_is_written_once(tmp_path: Path) -> None:
    model = tiny_model("llama3", tied=True)
    gathered = {name: tensor.clone() + 1 for name, tensor in model.state_dict().items()}
    gathered["lm_head.weight"] = gathered["model.embed_tokens.weight"].clone()
    save_model(model, tmp_path / "m", state_dict=gathered)
    again = load_model(str(tmp_path / "m"))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, gathered["lm_head.weight"])


def test_generation_settings_and_special_tokens_travel(tmp_path: Path) -> None:
    student = _student()
    student.generation_config.eos_token_id = [2, 5, 9]
    student.generation_config.temperature = 0.6
    student.generation_config.do_sample = True
    save_model(student, tmp_path / "m")
    again = load_model(str(tmp_path / "m"))
    assert again.generation_config.eos_token_id == [2, 5, 9]
    assert (again.generation_config.temperature, again.generation_config.do_sample) == (0.6, True)
    assert (again.config.pad_token_id, again.config.bos_token_id, again.config.eos_token_id) == (0, 1, 2)


def test_tokenizer_files_and_chat_templates_travel_as_they_are(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    (origin / "additional_chat_templates").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"):
        (origin / name).write_text('{"tokenizer_class": "TokenizersBackend"}')
    save_model(tiny_model("llama3"), tmp_path / "m", tokenizer_source=str(origin))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"):
        assert (tmp_path / "m" / name).read_bytes() == (origin / name).read_bytes()
    with pytest.raises(DataError, match="no tokenizer files"):
        save_model(tiny_model("llama3"), tmp_path / "n", tokenizer_source=str(tmp_path))


def test_a_tokenizer_that_leaves_its_class_to_the_model_type_is_the_same_in_a_student(shared_data: Path, tmp_path: Path) -> None:
    import shutil

    origin = tmp_path / "origin"
    save_model(tiny_model("qwen2"), origin)
    for path in (shared_data / "tokenizers" / "qwen2.5").iterdir():
        shutil.copy(path, origin / path.name)
    config = json.loads((origin / "tokenizer_config.json").read_text())
    del config["tokenizer_class"]
    (origin / "tokenizer_config.json").write_text(json.dumps(config))
    student = wrap_student(tiny_model("qwen2"), [linear_plugin.DecayOptions(layers=(1,))], BASE)
    save_model(student, tmp_path / "m", tokenizer_source=str(origin))
    ours, theirs, text = load_tokenizer(str(tmp_path / "m")), load_tokenizer(str(origin)), "Hello  World's\n\n 12345 été 你好"
    assert ours(text).input_ids == theirs(text).input_ids
    assert (ours.eos_token, ours.chat_template) == (theirs.eos_token, theirs.chat_template)


def test_a_save_that_fails_leaves_the_old_folder_and_nothing_beside_it(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(str(plain))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loading, "_finish_config", full)
    with pytest.raises(OSError, match="No space"):
        save_model(tiny_model("llama3", seed=1), plain)
    assert fingerprint(str(plain)) == before
    assert [path.name for path in plain.parent.iterdir()] == ["plain"]


def test_saving_over_a_folder_replaces_it_whole(plain: Path) -> None:
    (plain / "stale.safetensors").write_bytes(b"old")
    before = fingerprint(str(plain))
    save_model(tiny_model("llama3", seed=1), plain)
    assert fingerprint(str(plain)) != before
    assert not (plain / "stale.safetensors").exists()
    assert [path.name for path in plain.parent.iterdir()] == ["plain"]


def test_a_fingerprint_follows_weights_and_config_and_not_the_place(plain: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(plain, tmp_path / "copy")
    assert fingerprint(str(plain)) == fingerprint(str(tmp_path / "copy"))
    _edit(tmp_path / "copy", lambda w: w.update({"model.norm.weight": w["model.norm.weight"] + 1}))
    changed = fingerprint(str(tmp_path / "copy"))
    assert changed["config"] == fingerprint(str(plain))["config"]
    assert changed["weights"] != fingerprint(str(plain))["weights"]
