"""Adapters as PEFT folders: what peft makes of ours is what the injector makes of them, and the other way round."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from families import tiny_model, tokens
from limbeck.adapters.inject import Injector
from limbeck.adapters.keys import peft_key, split_peft_key, vllm_key
from limbeck.adapters.peft_files import read_base, read_peft, read_peft_file, read_provenance, write_peft
from limbeck.adapters.spec import Adapters, AdapterSpec
from limbeck.adapters.targets import resolve_spec
from limbeck.errors import AdapterError

FAMILIES = ["qwen2", "llama3", "qwen3"]


def random_adapters(spec: AdapterSpec, count: int = 2, seed: int = 0) -> Adapters:
    """Large enough to move the logits of a tiny model, and no larger: it would amplify rounding."""
    generator = torch.Generator().manual_seed(seed)
    A = {s.name: 0.3 * torch.randn(count, len(s.layers), spec.rank, s.in_features, generator=generator) for s in spec.sites}
    B = {s.name: 0.05 * torch.randn(count, len(s.layers), s.out_features, spec.rank, generator=generator) for s in spec.sites}
    return Adapters(spec, A, B)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(tokens(2, 12)).logits


def injected(model: nn.Module, adapters: Adapters) -> torch.Tensor:
    injector = Injector(model, adapters.spec)
    with injector.active(adapters):
        found = logits(model)
    injector.remove()
    return found


def loaded_by_peft(family: str, folder: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(tiny_model(family), folder)


def made_by_peft(family: str, folder: Path, *, save_embedding_layers: bool | str = "auto", **options: Any) -> torch.Tensor:
    """A folder that peft wrote, of a LoRA with a random B; the logits that peft has with it."""
    model = peft.get_peft_model(tiny_model(family), peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **options))
    model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return logits(model.eval())


def edited(folder: Path, **fields: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A good folder of a qwen2 adapter."""
    spec = resolve_spec(tiny_model("qwen2"), ["q_proj", "down_proj"], rank=3, alpha=5)
    write_peft(random_adapters(spec), 1, tmp_path / "ours", base="tiny", provenance={"condition": "ab12"})
    return tmp_path / "ours"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("alpha", "rslora"), [(4, False), (6.5, False), (6, True)])
def test_peft_makes_the_same_logits_of_our_folder(family: str, alpha: float, rslora: bool, tmp_path: Path) -> None:
    model = tiny_model(family)
    adapters = random_adapters(resolve_spec(model, "all", rank=4, alpha=alpha, rslora=rslora))
    write_peft(adapters, 1, tmp_path / "a", base="somewhere/base", provenance={"condition": "x"})
    wanted = injected(model, adapters.pick([1]))
    theirs = loaded_by_peft(family, tmp_path / "a")
    assert (wanted - logits(model)).abs().max() > 0.1
    assert (logits(theirs) - wanted).abs().max() <= 1e-5
    # Without rounding they are the same.
    assert (logits(theirs.double()) - injected(tiny_model(family).double(), adapters.pick([1]))).abs().max() <= 1e-12
    for back in (read_peft(tmp_path / "a", model), read_peft_file(tmp_path / "a")):
        assert (back.spec.rank, back.spec.alpha, back.spec.rslora) == (4, alpha, rslora)
        for name in adapters.A:
            assert torch.equal(back.A[name], adapters.A[name][1:]) and torch.equal(back.B[name], adapters.B[name][1:])
    assert read_peft(tmp_path / "a", model).spec == adapters.spec
    assert {s.name: s for s in read_peft_file(tmp_path / "a").spec.sites} == {s.name: s for s in adapters.spec.sites}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 7, "target_modules": "all-linear"},
        {"r": 4, "lora_alpha": 7, "use_rslora": True, "target_modules": ["q_proj", "mlp.up_proj"], "layers_to_transform": [1, 3]},
        {"r": 2, "target_modules": r".*\.(0|2)\..*(o|down)_proj", "exclude_modules": ["layers.2.mlp.down_proj"]},
        {
            "r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 2, r"layers\.[01]\.self_attn.q_proj": 6}, "alpha_pattern": {"down_proj": 3},
        },
    ],
)  # fmt: skip
def test_our_logits_are_those_of_the_folder_that_peft_wrote(family: str, options: dict, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = made_by_peft(family, tmp_path, **options)
    model = tiny_model(family)
    for adapters in (read_peft(tmp_path, model), read_peft_file(tmp_path)):
        assert (injected(model, adapters) - wanted).abs().max() <= 1e-5
    assert (wanted - logits(model)).abs().max() > 1e-3


def test_swapped_adapters_leave_nothing_behind(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    lots = [
        random_adapters(resolve_spec(model, targets, rank=rank, alpha=8), 1, seed=rank)
        for targets, rank in ((["q_proj", "up_proj"], 4), (["o_proj"], 2))
    ]
    for name, lot in zip("ab", lots, strict=True):
        write_peft(lot, 0, tmp_path / name, base=None, provenance={})
    base, alone = logits(model), [injected(model, lot) for lot in lots]
    theirs = loaded_by_peft("qwen3", tmp_path / "a")
    theirs.load_adapter(tmp_path / "b", "b")
    injectors = [Injector(model, read_peft(tmp_path / name, model).spec) for name in "ab"]
    for turn in (0, 1, 0, 1):
        with injectors[turn].active(read_peft(tmp_path / "ab"[turn], model)):
            assert torch.equal(logits(model), alone[turn])
        theirs.set_adapter(["default", "b"][turn])
        assert (logits(theirs) - alone[turn]).abs().max() <= 1e-5
        assert torch.equal(logits(model), base)


def test_low_precision_factors_are_read_as_they_are(tmp_path: Path) -> None:
    model = tiny_model("llama3")
    adapters = random_adapters(resolve_spec(model, "mlp", rank=2, alpha=4))
    write_peft(adapters, 0, tmp_path / "a", base=None, provenance={}, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "a" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    for name, found in read_peft(tmp_path / "a", model).B.items():
        assert torch.equal(found, adapters.B[name][:1].bfloat16().float())


def test_a_folder_says_where_its_adapter_came_from(ours: Path) -> None:
    assert read_provenance(ours) == json.loads((ours / "limbeck.json").read_text()) == {"condition": "ab12"}
    assert read_base(ours) == "tiny"
    (ours / "limbeck.json").unlink()
    assert read_provenance(ours) == {"condition": "ab12"}


def test_a_folder_is_replaced_whole_or_not_at_all(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen2")
    other = random_adapters(resolve_spec(model, ["o_proj"], rank=2, alpha=2))
    before = {path.name: path.read_bytes() for path in ours.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("limbeck.files.fsync", lambda path: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_peft(other, 0, ours, base=None, provenance={})
    assert {path.name: path.read_bytes() for path in ours.iterdir()} == before
    write_peft(other, 0, ours, base=None, provenance={})
    assert read_peft(ours, model).spec == other.spec and [path.name for path in ours.parent.iterdir()] == ["ours"]
    (ours / "notes.txt").write_text("mine")
    with pytest.raises(AdapterError, match=r"holds other things \(notes.txt\)"):
        write_peft(other, 0, ours, base=None, provenance={})


def test_factors_that_lie_transposed_in_memory_are_written_as_they_read(tmp_path: Path) -> None:
    # As a decoder that writes B^T leaves them.
    spec = resolve_spec(tiny_model("qwen2"), "all", rank=2, alpha=4)
    plain = random_adapters(spec, 1)
    strided = Adapters(spec, plain.A, {name: B.mT.contiguous().mT for name, B in plain.B.items()})
    for name, adapters in (("plain", plain), ("strided", strided)):
        write_peft(adapters, 0, tmp_path / name, base="b", provenance={})
    written, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "strided"))
    assert written.keys() == again.keys() and all(torch.equal(tensor, again[key]) for key, tensor in written.items())


def test_a_broken_adapter_is_not_written(ours: Path) -> None:
    adapters = read_peft_file(ours)
    adapters.B["mlp.down_proj"][0, 2, 0, 0] = 1e30
    with pytest.raises(AdapterError, match=r"B of mlp.down_proj.*not finite as float16"):
        write_peft(adapters, 0, ours.parent / "new", base=None, provenance={}, dtype=torch.float16)
    assert not (ours.parent / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora is True: DoRA.*merge_and_unload"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is .*lm_head"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.*(is a LoRA on an embedding|is a whole weight.*an embedding)"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head(.base_layer.weight is a whole weight.*output head| is outside the model's)"),
    ],
)
@pytest.mark.parametrize("whole_embeddings", [True, False])
def test_what_is_no_lora_on_linears_is_refused_by_name(options: dict, message: str, whole_embeddings: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"r": 2, "target_modules": ["q_proj"], **options}
        made_by_peft("qwen2", tmp_path, save_embedding_layers="auto" if whole_embeddings else False, **options)
    for read in (lambda: read_peft(tmp_path, tiny_model("qwen2")), lambda: read_peft_file(tmp_path)):
        with pytest.raises(AdapterError, match=message):
            read()


def test_a_lora_on_a_convolution_is_refused(tmp_path: Path) -> None:
    class Convolved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv1d(4, 4, 3)])

    model = peft.get_peft_model(Convolved(), peft.LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    for read in (lambda: read_peft(tmp_path, Convolved()), lambda: read_peft_file(tmp_path)):
        with pytest.raises(AdapterError, match=r"(convolution|layers.0 is a Conv1d)"):
            read()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and only 'LORA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "also changed the base.*path_initial_model_for_weight_conversion"),
        ({"r": 0}, "ranks are"),
        ({"r": 4}, "says rank 4"),
        ({"target_modules": ["q_proj", "down_proj", "o_proj"]}, "layers.0.self_attn.o_proj should be changed.*4 such"),
        ({"target_modules": ["q_proj"]}, "layers.0.mlp.down_proj has factors.*not name it.*4 such"),
        ({"target_modules": ["q_proj", "mlp"]}, "layers.0.mlp is a Qwen2MLP"),
        ({"target_modules": None}, "target_modules is None"),
    ],
)
def test_a_config_that_does_not_fit_is_named(fields: dict, message: str, ours: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        read_peft(edited(ours, **fields), tiny_model("qwen2"))


def test_tensors_are_all_used_and_all_there(ours: Path) -> None:
    path = ours / "adapter_model.safetensors"
    tensors = load_file(path)
    last = peft_key("model.layers.3.mlp.down_proj", "B")
    for change, message in (
        ({last: None}, f"{last} is not there"),
        ({last.replace(".weight", ".default.weight"): torch.ones(1)}, "lora_B.default.weight is no factor of a LoRA"),
        ({"base_model.model.lm_head.weight": torch.ones(2, 2)}, "lm_head.weight is a whole weight"),
        ({last: torch.ones(31, 3)}, r"down_proj as 48 -> 31, and it is 48 -> 32"),
        ({peft_key("model.layers.4.mlp.down_proj", f): t for f, t in (("A", torch.ones(3, 48)), ("B", torch.ones(32, 3)))},
         "layers.4.mlp.down_proj is not there in this model"),
    ):  # fmt: skip
        save_file({name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}, path)
        with pytest.raises(AdapterError, match=message):
            read_peft(ours, tiny_model("qwen2"))


def test_damaged_and_missing_files_are_named(ours: Path) -> None:
    with pytest.raises(AdapterError, match="no such folder"):
        read_peft_file(ours / "nowhere")
    weights = ours / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors: cannot be read"):
        read_peft_file(ours)
    weights.rename(ours / "adapter_model.bin")
    with pytest.raises(AdapterError, match="a pickle, which is not opened"):
        read_peft_file(ours)
    (ours / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match=r"adapter_config.json: cannot be read"):
        read_peft_file(ours)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_alpha": "8"}, r"alphas are \['8'\], and must be numbers above 0"),
        ({"lora_alpha": None}, r"alphas are \[None\]"),
        ({"lora_alpha": 0}, r"alphas are \[0\]"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, r"alphas are \[5, nan\]"),
        ({"r": None}, r"ranks are \[None\], and must be whole numbers above 0"),
        ({"rank_pattern": {"q_proj": "two"}}, r"ranks are \[3, 'two'\]"),
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern is \['q_proj'\], and must give a number for each name"),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern has '\(', which is no regular expression"),
        ({"target_modules": "(q_proj"}, r"target_modules has '\(q_proj', which is no regular expression"),
        ({"target_modules": 7}, r"target_modules is 7, and must be a pattern or a list of names"),
        ({"base_model_name_or_path": ["x"]}, r"base_model_name_or_path is \['x'\], and must be a name"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, r"target_parameters names mlp\.experts\.gate_up_proj: it changes bare parameters"),
        ({"target_parameters": ["o_proj.weight"], "rank_pattern": {"o_proj": 3}}, "target_parameters stands beside patterns of rank or alpha"),
    ],
)
def test_a_config_of_the_wrong_kind_is_refused_and_raises_nothing_else(fields: dict, message: str, ours: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        read_peft_file(edited(ours, **fields))


def test_numbers_that_were_rounded_to_whole_ones_are_refused(ours: Path) -> None:
    path = ours / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(AdapterError, match=r"the factors of model\.layers\.0\.mlp\.down_proj are int8 and int8: quantised ones cannot be read"):
        read_peft_file(ours)


@pytest.mark.parametrize("story", ["{", "[1]"])
def test_a_damaged_provenance_is_named(story: str, ours: Path) -> None:
    path = ours / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"limbeck": story})
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: where it came from cannot be read"):
        read_provenance(ours)


def test_a_place_where_no_folder_can_be_made_is_named(ours: Path) -> None:
    with pytest.raises(AdapterError, match=r"no folder can be made there.*name another place"):
        write_peft(read_peft_file(ours), 0, ours / "adapter_config.json" / "below", base=None, provenance={})
    with pytest.raises(AdapterError, match=r"adapter_config\.json is a file: name the folder of an adapter"):
        read_peft_file(ours / "adapter_config.json")


def test_every_linear_has_one_name_in_each_program() -> None:
    path = "model.layers.10.self_attn.k_proj"
    assert peft_key(path, "A") == f"base_model.model.{path}.lora_A.weight"
    assert split_peft_key(peft_key(path, "B")) == (path, "B")
    assert vllm_key(path) == ("model.layers.10.self_attn.qkv_proj", 1)
    assert vllm_key("model.layers.0.mlp.up_proj") == ("model.layers.0.mlp.gate_up_proj", 1)
    assert vllm_key("model.layers.0.linear_attn.in_proj_z") == ("model.layers.0.linear_attn.in_proj_qkvz", 1)
    assert vllm_key("model.layers.0.linear_attn.in_proj_qkvz") == ("model.layers.0.linear_attn.in_proj_qkvz", 0)
    assert vllm_key("model.layers.0.mlp.down_proj") == ("model.layers.0.mlp.down_proj", 0)


def test_what_vllm_reads_of_a_config_says_all(ours: Path) -> None:
    """vLLM takes one rank, alpha and rsLoRA flag for a whole adapter."""
    fields = json.loads((ours / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["use_rslora"], fields["bias"]) == (3, 5, False, "none")
    assert not fields["rank_pattern"] and not fields["alpha_pattern"] and not fields["modules_to_save"] and len(fields["target_modules"]) == 8
