"""Files for llama.cpp: what it computes from them is what torch computes, for every family that is written."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from families import stir
from gguf_case import write_gguf as write_random
from limbeck.cli.app import app
from limbeck.config.load import load_recipe
from limbeck.config.parts.stages import GgufOptions, TrainTokenizer
from limbeck.config.parts.surgeries import HybridizeOptions, TernarizeOptions
from limbeck.data.tokenizer import encode, train_tokenizer
from limbeck.errors import LimbeckError, ModelError, RunError
from limbeck.export.gguf import writer
from limbeck.export.gguf.architectures import rotary_sections
from limbeck.export.gguf.llama import Llama
from limbeck.export.gguf.packing import BF16, F32, TYPES, Weight
from limbeck.export.gguf.plan import Precisions
from limbeck.export.gguf.verify import EXACT, Verification, verify
from limbeck.export.gguf.weights import FolderWeights, ModelWeights, as_it_is
from limbeck.export.gguf.writer import Written, manifest_path, write_gguf
from limbeck.models.limbeck_model import wrap_student
from limbeck.models.loading import build_model, load_config, load_tokenizer, resolve_source, save_model
from limbeck.ops.ternary import ternary
from limbeck.stages.export import export_path
from limbeck.stages.export_gguf import export_gguf
from limbeck.stages.run import run_recipe

gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install 'limbeck[gguf]'")
needs_llama = pytest.mark.skipif(__import__("importlib.util").util.find_spec("xllamacpp") is None, reason="needs llama.cpp: pip install 'limbeck[verify]'")

VOCABULARY = 320
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.08, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
SHARED = {**MOE, "shared_expert_intermediate_size": 256}
# Value heads beside fewer key heads: the order in which they are repeated differs between the families.
DELTA = {
    "num_hidden_layers": 4, "head_dim": 64, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}  # fmt: skip
MIXED = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**COMMON, "model_type": "llama", "rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
    "qwen2": {**COMMON, "model_type": "qwen2", "tie_word_embeddings": True, "rope_parameters": LINEAR},
    "qwen3": {**COMMON, "model_type": "qwen3", "head_dim": 128, "rope_parameters": YARN},
    "qwen3_moe": {**COMMON, **MOE, "model_type": "qwen3_moe", "norm_topk_prob": True},
    "qwen3_next": {**COMMON, **SHARED, **DELTA, "model_type": "qwen3_next", "layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    "qwen3_5_text": {**COMMON, **DELTA, "model_type": "qwen3_5_text", "layer_types": MIXED},
    "qwen3_5_moe_text": {
        **{name: value for name, value in COMMON.items() if name != "intermediate_size"}, **SHARED, **DELTA,
        "model_type": "qwen3_5_moe_text", "layer_types": MIXED,
    },
}  # fmt: skip
TEXTS = ("def main():\n\treturn 'caf\u00e9'  # 1234\n\n  done", "I'll  go \u4f60\u597d \U0001f600")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["def main():\n    return 1  # I'll go\n"] * 4, TrainTokenizer(vocabulary=300), folder)
    return folder


def tiny(family: str, **changes: Any) -> Any:
    model = build_model({**FAMILIES[family], **changes})
    stir(model)
    return model


def is_projection(name: str) -> bool:
    """Whether a weight is a projection of a layer that may be ternary."""
    return "proj" in name and name.endswith(("proj.weight", "_proj", "qkvz.weight", "qkv.weight", "_z.weight"))


def is_expert(name: str) -> bool:
    return ".experts." in name


def written(model: Any, words: Path, out: Path, kind: str, chosen: Any = None, keep: Any = F32, group: int | None = None) -> tuple[Written, ModelWeights]:
    """A file in which the ``chosen`` weights are ternary."""

    def codes(name: str, weight: Tensor) -> Weight:
        if chosen is None or not chosen(name):
            return weight
        return ternary(weight, scale="group" if group else "row", group=group, method="absmean", parts=2 if "gate_up" in name else 1)

    weights = ModelWeights(model, codes if chosen is not None else as_it_is)
    precisions = Precisions(kind, lambda name, width: (group or width) if chosen is not None and chosen(name) else None, keep=keep)
    return write_gguf(weights, out, load_tokenizer(str(words)), precisions, name="tiny"), weights


def checked(model: Any, words: Path, out: Path, kind: str, chosen: Any = None, keep: Any = F32, group: int | None = None) -> Verification:
    file, weights = written(model, words, out, kind, chosen, keep, group)
    rows = torch.randint(3, 300, (16, 40), generator=torch.Generator().manual_seed(0)).tolist()
    return verify(file.path, weights, file.plan, load_tokenizer(str(words)), rows if kind != "f32" else rows[:2], TEXTS)


@needs_llama
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_same_from_an_fp32_file(family: str, words: Path, tmp_path: Path) -> None:
    found = checked(tiny(family), words, tmp_path / "x.gguf", "f32")
    assert found.holds and found.largest <= EXACT and found.same_ids == found.texts == 2, found


@needs_llama
@pytest.mark.parametrize(
    "family, kind, chosen, group",
    [
        ("llama", "tq2_0", is_projection, None),
        ("qwen2", "tq1_0", is_projection, 256),
        ("qwen3", "q2_0", is_projection, 128),
        ("qwen3_moe", "tq2_0", is_expert, None),
        ("qwen3_next", "tq2_0", is_expert, None),
        ("qwen3_5_text", "tq2_0", is_projection, None),
    ],
)
def test_llama_cpp_computes_the_same_from_ternary_weights(family: str, kind: str, chosen: Any, group: int | None, words: Path, tmp_path: Path) -> None:
    found = checked(tiny(family), words, tmp_path / "x.gguf", kind, chosen, group=group)
    assert found.holds and found.median <= 1e-5 and found.top1 == 1 and found.clear >= 20, found


@needs_llama
def test_kept_weights_in_bf16_are_computed_as_bf16(words: Path, tmp_path: Path) -> None:
    found = checked(tiny("qwen3_moe"), words, tmp_path / "x.gguf", "tq2_0", is_expert, keep=BF16)
    assert found.holds, found


@needs_llama
def test_a_wrong_tensor_is_noticed(words: Path, tmp_path: Path) -> None:
    """One norm without its offset, and one projection's heads in the wrong order."""
    model = tiny("qwen3_5_text")
    file, weights = written(model, words, tmp_path / "x.gguf", "f32")
    rows = torch.randint(3, 300, (1, 12), generator=torch.Generator().manual_seed(0)).tolist()
    layer = model.model.layers[1]
    for parameter, change in ((layer.input_layernorm.weight, 1.0), (layer.self_attn.k_proj.weight, None)):
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(before + change if change else before.roll(1, 0))
            found = verify(file.path, weights, file.plan, load_tokenizer(str(words)), rows)
            parameter.copy_(before)
        assert not found.holds and found.largest > 1e-2, found


@needs_llama
def test_a_wide_bf16_file_holds_and_one_with_a_wrong_tensor_does_not(words: Path, tmp_path: Path) -> None:
    model = build_model({**FAMILIES["llama"], "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4})
    file, weights = written(model, words, tmp_path / "x.gguf", "bf16")
    rows = torch.randint(3, 300, (4, 3), generator=torch.Generator().manual_seed(0)).tolist()
    found = verify(file.path, weights, file.plan, load_tokenizer(str(words)), rows)
    assert found.holds and found.median > 1e-5, found
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.copy_(model.model.layers[1].self_attn.v_proj.weight.roll(1, 0))
    found = verify(file.path, weights, file.plan, load_tokenizer(str(words)), rows)
    assert not found.holds and found.median > 2e-2, found


@needs_llama
@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_the_built_in_model_is_verified_with_its_own_words(kind: str, tmp_path: Path) -> None:
    lines: list[str] = []
    out = export_path(resolve_source("builtin:code-2m"), output=tmp_path / "code.gguf", gguf=GgufOptions(type=kind, verify=True), say=lines.append)
    manifest = json.loads(manifest_path(out).read_text())
    found = manifest["verification"]
    assert found["holds"] and found["positions"] >= 20 and found["same_ids"] == found["texts"], found
    assert any(line.startswith("  verified in llama.cpp") for line in lines)
    assert manifest["bytes"] == out.stat().st_size and abs(manifest["predicted_bytes"] / manifest["bytes"] - 1) < 0.01
    assert manifest["sizes"][-1]["kind"] == "total" and manifest["sha256"] == writer.sha256(out)


@needs_llama
def test_a_tokenizer_of_a_few_letters_is_verified_too(tmp_path: Path) -> None:
    """It has no "a" and no merges, and makes nothing of most texts."""
    tokenizer = Tokenizer(models.BPE(vocab={"<e>": 0, "A": 1, "C": 2, "G": 3, "T": 4}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    save_model(tiny("llama", vocab_size=8), tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>").save_pretrained(tmp_path / "model")
    out = export_path(str(tmp_path / "model"), output=tmp_path / "dna.gguf", gguf=GgufOptions(type="f32", verify=True), say=lambda line: None)
    assert json.loads(manifest_path(out).read_text())["verification"]["holds"]
    with Llama(out, context=32) as llama:
        assert llama.tokens("GATTACA") == encode(load_tokenizer(str(tmp_path / "model")), ["GATTACA"])[0] == [3, 1, 4, 4, 1, 2, 1]


def ternary_student(words: Path, folder: Path, base: Any, **options: Any) -> Path:
    student = wrap_student(base, [TernarizeOptions(**options)], {"source": "nowhere", "fingerprint": {}})
    save_model(student, folder, tokenizer_source=str(words))
    return folder


@needs_llama
@pytest.mark.parametrize("method", ["absmean", "elastic"])
def test_a_trained_ternary_moe_is_exported_as_it_computes(method: str, words: Path, tmp_path: Path) -> None:
    folder = ternary_student(words, tmp_path / "model", tiny("qwen3_moe"), method=method, scale="expert")
    lines: list[str] = []
    out = export_gguf(folder, tmp_path / "moe.gguf", GgufOptions(verify=True), dtype="float32", say=lines.append)
    manifest = json.loads(manifest_path(out).read_text())
    assert manifest["trained_ternary"] and manifest["type"] == "tq2_0" and manifest["verification"]["holds"]
    experts = next(row for row in manifest["sizes"] if row["kind"] == "experts")
    assert experts["type"] == "tq2_0" and experts["bits_per_weight"] <= 2.07
    # The reference of the check is made from codes; the student itself computes the same without rounded activations.
    assert manifest["tensors"]["blk.0.ffn_gate_inp.weight"]["type"] == manifest["tensors"]["blk.0.attn_norm.weight"]["type"] == "f32"


@needs_llama
def test_a_ternary_hybrid_is_exported_as_the_qwen3_5_that_it_equals(words: Path, tmp_path: Path) -> None:
    base = tiny("qwen3", rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, head_dim=64, num_key_value_heads=4)
    surgery = [HybridizeOptions(mixer={"kind": "gated_deltanet", "preset": "native"}, keep=[1]), TernarizeOptions(plan="dense")]
    student = wrap_student(base, surgery, {"source": "nowhere", "fingerprint": {}})
    folder = tmp_path / "model"
    save_model(student, folder, tokenizer_source=str(words))
    out = export_gguf(folder, tmp_path / "hybrid.gguf", GgufOptions(verify=True), dtype="float32", say=lambda line: None)
    manifest = json.loads(manifest_path(out).read_text())
    assert manifest["architecture"] == "qwen35" and manifest["verification"]["holds"]
    kinds = {name: tensor["type"] for name, tensor in manifest["tensors"].items()}
    assert kinds["blk.0.ffn_up.weight"] == kinds["blk.0.attn_qkv.weight"] == kinds["blk.1.attn_output.weight"] == "tq2_0"


def test_a_student_in_warm_up_is_refused(words: Path, tmp_path: Path) -> None:
    folder = ternary_student(words, tmp_path / "model", tiny("qwen2"), warmup=10)
    with pytest.raises(ModelError, match="lambda"):
        export_gguf(folder, tmp_path / "x.gguf", GgufOptions(), say=lambda line: None)
    assert not list(tmp_path.glob("*gguf*"))


def test_a_model_that_was_not_trained_ternary_needs_force(words: Path, tmp_path: Path) -> None:
    model = tiny("qwen2")
    save_model(model, tmp_path / "model", tokenizer_source=str(words))
    with pytest.raises(RunError, match=r"was not trained ternary.*--force"):
        export_gguf(tmp_path / "model", tmp_path / "x.gguf", GgufOptions(type="tq2_0"), say=lambda line: None)
    lines: list[str] = []
    out = export_gguf(tmp_path / "model", tmp_path / "x.gguf", GgufOptions(type="q2_0", group_size=128, force=True), say=lines.append)
    assert any("the damage was not measured" in line for line in lines) and any("slower than bf16" in line for line in lines)
    manifest = json.loads(manifest_path(out).read_text())
    assert manifest["forced"] and manifest["type"] == "q2_0" and manifest["group"] == 128


def test_another_scale_than_the_trained_one_is_refused_and_a_finer_grid_of_it_is_not(words: Path, tmp_path: Path) -> None:
    folder = ternary_student(words, tmp_path / "model", tiny("qwen2"))
    with pytest.raises(RunError, match="trained with `scale: row`"):
        export_gguf(folder, tmp_path / "x.gguf", GgufOptions(scale="tensor"), say=lambda line: None)
    out = export_gguf(folder, tmp_path / "x.gguf", GgufOptions(group_size=128), say=lambda line: None)
    assert json.loads(manifest_path(out).read_text())["type"] == "q2_0"


def test_experts_one_by_one_on_disk_are_read_stacked_and_a_lost_or_odd_tensor_is_named(words: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny("qwen3_moe")
    save_model(model, tmp_path / "model", tokenizer_source=str(words))
    (path,) = (tmp_path / "model").glob("*.safetensors")
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, halves in enumerate(tensor):
                for part, half in zip(("gate_proj", "up_proj"), halves.chunk(2), strict=True):
                    state[name.replace("gate_up_proj", f"{expert}.{part}.weight")] = half.clone()
        elif name.endswith("experts.down_proj"):
            state |= {name.replace("down_proj", f"{expert}.down_proj.weight"): part.clone() for expert, part in enumerate(tensor)}
        else:
            state[name] = tensor.clone()
    save_file(state, path)
    config = load_config(str(tmp_path / "model"))
    weights = FolderWeights(tmp_path / "model", config)
    for name in weights.shapes:
        assert torch.equal(weights.read(name), model.state_dict()[name]), name
    save_file({**load_file(path), "model.layers.0.extra": torch.ones(1)}, path)
    with pytest.raises(ModelError, match=r"such as model\.layers\.0\.extra"):
        FolderWeights(tmp_path / "model", config)
    save_file({name: tensor for name, tensor in state.items() if name != "model.norm.weight"}, path)
    with pytest.raises(ModelError, match=r"lacks 1 tensors .* such as model\.norm\.weight"):
        FolderWeights(tmp_path / "model", config)


def test_a_full_disk_leaves_nothing_and_says_what_was_needed(words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = tiny("llama"), tmp_path / "x.gguf"
    out.write_text("the file of before")
    real, count = writer._write_tensor, []

    def fails(*arguments: Any) -> None:
        count.append(1)
        if len(count) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(writer, "_write_tensor", fails)
    with pytest.raises(RunError, match=r"the disk is full: [\d,]+ bytes were needed"):
        written(model, words, out, "f32")
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"] and out.read_text() == "the file of before"
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(RunError, match="10 are free on its disk"):
        written(model, words, out, "f32")


@pytest.mark.parametrize(
    "family, changes, what",
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3", {"hidden_act": "gelu"}, "gelu"),
        ("qwen3_5_text", {"layer_types": ["full_attention"] * 4}, "mixture of both kinds"),
        ("qwen3", {"rope_parameters": LLAMA3}, "llama3"),
        ("qwen3", {"rope_parameters": {**YARN, "attention_factor": 2.0}}, "attention_factor"),
        ("qwen3", {"attention_bias": True}, "its attention has biases"),
        ("qwen3_moe", {"attention_bias": True}, "its attention has biases"),
        ("qwen3_next", {"attention_bias": True}, "its attention has biases"),
        ("qwen3_5_text", {"attention_bias": True}, "its attention has biases"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "turns 0.5 of each head"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(family: str, changes: dict[str, Any], what: str, words: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=what):
        written(tiny(family, **changes), words, tmp_path / "x.gguf", "f32")


def test_heads_of_another_width_than_the_models_are_refused_where_llama_cpp_has_no_place(words: Path, tmp_path: Path) -> None:
    save_model(tiny("qwen2"), tmp_path / "model", tokenizer_source=str(words))
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "head_dim": 32}))
    with pytest.raises(ModelError, match="its 4 heads of 32 are not as wide as the model, 256"):
        export_gguf(tmp_path / "model", tmp_path / "x.gguf", GgufOptions(), say=lambda line: None)


def test_a_damaged_folder_is_named_and_not_a_traceback(words: Path, tmp_path: Path) -> None:
    good = tmp_path / "good"
    save_model(tiny("qwen3"), good, tokenizer_source=str(words))
    weights = (good / "model.safetensors").read_bytes()

    def bert(folder: Path) -> None:
        (folder / "config.json").write_text('{"model_type": "bert"}')

    def index(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text("[]")

    damages: list[tuple[Callable[[Path], object], str]] = [
        (lambda folder: (folder / "model.safetensors").write_bytes(weights[:-1000]), r"model\.safetensors: cannot be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), r"model\.safetensors: cannot be read"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickled weights only"),
        (index, "is no index of files"),
        (bert, "llama.cpp's form of 'bert' is not known here"),
        (lambda folder: [path.unlink() for path in folder.glob("token*")], "no tokenizer files in this folder"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "the tokenizer has no words|no tokenizer can be loaded"),
    ]
    for number, (damage, what) in enumerate(damages):
        folder = tmp_path / str(number)
        shutil.copytree(good, folder)
        damage(folder)
        with pytest.raises(LimbeckError, match=what):
            export_gguf(folder, tmp_path / "x.gguf", GgufOptions(), say=lambda line: None)


def test_what_transformers_passes_over_is_passed_over(words: Path, tmp_path: Path) -> None:
    """Rotary frequencies of older files, and weights in another form beside the ones that count."""
    from safetensors.torch import load_file, save_file

    save_model(tiny("llama"), tmp_path / "model", tokenizer_source=str(words))
    path = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(path), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)}, path)
    save_file({"layers.0.attention.wq.weight": torch.ones(2)}, tmp_path / "model" / "consolidated.safetensors")
    weights = FolderWeights(tmp_path / "model", load_config(str(tmp_path / "model")))
    assert set(weights.shapes) == {name for name in tiny("llama").state_dict() if "inv_freq" not in name}


def test_scales_that_nothing_has_are_refused(words: Path, tmp_path: Path) -> None:
    save_model(tiny("qwen2"), tmp_path / "model", tokenizer_source=str(words))
    for options, what in ((GgufOptions(group_size=128), "--group-size: is of ternary weights"), (GgufOptions(scale="row"), "--scale: is of ternary weights")):
        with pytest.raises(RunError, match=what):
            export_gguf(tmp_path / "model", tmp_path / "x.gguf", options, say=lambda line: None)
    with pytest.raises(ModelError, match=r"--group-size 96: the 256 inputs of .* are no multiple of it"):
        export_gguf(tmp_path / "model", tmp_path / "x.gguf", GgufOptions(group_size=96, force=True), say=lambda line: None)


def test_a_place_that_cannot_be_written_is_said_before_the_model_is_read(words: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_model(tiny("qwen2"), model, tokenizer_source=str(words))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "other.gguf.json").mkdir()
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "letter.txt").write_text("mine")
    for out, what in (
        (tmp_path / "file" / "x.gguf", "file is a file: give another --output"),
        (tmp_path / "folder.gguf", "is a folder: give another --output"),
        (tmp_path / "other.gguf", r"other\.gguf\.json: is a folder"),
        (tmp_path / ("x" * 300 + ".gguf"), "cannot be written .*too long"),
        (Path("/proc/nowhere/x.gguf"), "cannot be written"),
        (tmp_path / "file", "is a file: name a folder"),
        (tmp_path / "file" / "x", "file is a file: give another --output"),
        (tmp_path / "things", "holds something that is no export, and would be replaced"),
        (model, "holds what is exported, and would be replaced"),
        (tmp_path, "holds what is exported, and would be replaced"),
        (Path("/proc/nowhere/x"), "cannot be written"),
    ):
        with pytest.raises(RunError, match=what):
            export_path(str(model), output=out, say=lambda line: None)
    assert (tmp_path / "things" / "letter.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    for _ in range(2):
        assert (export_path(str(model), output=tmp_path / "new" / "one") / "config.json").exists(), "an export of before is replaced"


def test_the_rotation_reaches_every_pair() -> None:
    for pairs in range(1, 70):
        found = rotary_sections(pairs, [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3])
        assert sum(found[:3]) >= pairs and all(pair < 3 * found[pair % 3] for pair in range(pairs)) and found[3] == 0
    assert rotary_sections(32, [11, 11, 10]) == [11, 11, 10, 0]


def test_the_damage_of_force_is_measured_on_the_text_of_a_run(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(60):
        (text / f"{number}.py").write_text(f"def function_{number}(x):\n    return x + {number}\n\n\nprint(function_{number}({number}))\n" * 3)
    recipe = {
        "name": "tiny",
        "stages": {
            "train": {
                "data": {"source": {"kind": "text", "path": str(text)}, "tokenizer": resolve_source("builtin:code-2m"), "sequence": 32, "held_out": 0.3},
                "student": {"base": "builtin:code-2m"},
                "objectives": [{"kind": "ce"}],
                "optim": {"groups": [{"lr": 1e-5}]},
                "loop": {"steps": 1, "batch_tokens": 64},
            },
            "export": {"kind": "export", "from": "train", "to": "gguf", "gguf": {"force": True}},
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    lines: list[str] = []
    run_recipe(load_recipe(path), recipe_dir=tmp_path, run_dir=tmp_path / "run", say=lines.append)
    out = tmp_path / "run" / "export" / "export" / "gguf" / "train.gguf"
    manifest = json.loads(manifest_path(out).read_text())
    damage = manifest["damage"]
    assert damage["perplexity_after"] > 2 * damage["perplexity_before"] > 2
    assert any("perplexity of held-out text" in line for line in lines)
    # 160 inputs are no multiple of 64, 320 are.
    assert {manifest["tensors"][f"blk.0.{name}.weight"]["type"] for name in ("attn_q", "ffn_up")} == {"f16"}
    assert manifest["tensors"]["blk.0.ffn_down.weight"]["type"] == "q2_0"
    with pytest.raises(ModelError, match="q2_0 cannot hold it: its 160 inputs are not a multiple of 64"):
        export_path(str(tmp_path / "run" / "train"), output=tmp_path / "x.gguf", gguf=GgufOptions(type="q2_0", force=True), say=lambda line: None)


@needs_llama
def test_a_file_that_llama_cpp_dies_of_is_an_error_and_not_our_end(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(RunError, match=r"bad\.gguf: llama\.cpp"):
        Llama(tmp_path / "bad.gguf", context=32)
    data = write_random(tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "other.gguf").write_bytes(data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0qwen2", 1))
    with pytest.raises(RunError, match=r"(?s)other\.gguf: llama\.cpp cannot load .*qwen2\.context_length"):
        Llama(tmp_path / "other.gguf", context=32)


@needs_llama
def test_qwen2_5_has_the_ids_of_llama_cpps_own_vectors(shared_data: Path, tmp_path: Path) -> None:
    folder, vectors = shared_data / "tokenizers" / "qwen2.5", shared_data / "tokenizers" / "llama.cpp-vectors"
    tokenizer = load_tokenizer(str(folder))
    texts = (vectors / "ggml-vocab-qwen2.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")[:-1]
    expected = [[int(word) for word in line.split()] for line in (vectors / "ggml-vocab-qwen2.gguf.out").read_text().splitlines()]
    assert len(texts) == len(expected) == 46
    model = build_model({**COMMON, "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1})
    weights = ModelWeights(model)
    file = write_gguf(weights, tmp_path / "x.gguf", tokenizer, Precisions("bf16", lambda name, width: None), name="qwen2.5")
    with Llama(file.path, context=32) as llama:
        assert [llama.tokens(text) for text in texts] == expected
    assert encode(tokenizer, texts) == expected


@needs_llama
def test_stories_260k_has_equal_ids_and_probabilities(stories260k: Path, tmp_path: Path) -> None:
    out = export_path(str(stories260k), output=tmp_path / "stories.gguf", gguf=GgufOptions(type="f32", verify=True), say=lambda line: None)
    tokenizer = load_tokenizer(str(stories260k))
    texts = ["Once upon a time, there was a little girl", "  two  spaces", "na\u00efve \u4f60\u597d", "a", "\n\n", "Lily's mom said: \"No!\""]
    with Llama(out, context=32) as llama:
        assert [llama.tokens(text) for text in texts] == encode(tokenizer, texts)
        assert llama.tokens("Once", special=True) == tokenizer("Once")["input_ids"]


def test_the_command_line_takes_the_words_of_the_seed(words: Path, tmp_path: Path) -> None:
    folder = ternary_student(words, tmp_path / "checkpoints" / "final", tiny("qwen2"))
    runner = CliRunner()
    done = runner.invoke(app, ["export", "--input", str(folder), "--output", str(tmp_path / "models" / "x.gguf"), "--group-size", "128"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert json.loads(manifest_path(tmp_path / "models" / "x.gguf").read_text())["type"] == "q2_0"
    for words_after, what in (
        (["--type", "tq2_0", "--group-size", "128"], "groups of 128 would be stored wrong"),
        (["--type", "q3"], "--type: "),
        (["--to", "hf", "--verify"], "are for --to gguf"),
    ):
        refused = runner.invoke(app, ["export", str(folder), "--output", str(tmp_path / "y.gguf"), *words_after])
        assert refused.exit_code != 0 and what in refused.output + str(refused.exception), refused.output


def test_every_type_has_the_number_of_the_gguf_package() -> None:
    for name, kind in TYPES.items():
        if name != "q2_0":
            theirs = gguf.GGMLQuantizationType[name.upper()]
            assert (kind.number, (kind.block, kind.size)) == (int(theirs), gguf.GGML_QUANT_SIZES[theirs])


def test_what_is_written_is_read_by_the_gguf_package(words: Path, tmp_path: Path) -> None:
    file, weights = written(tiny("qwen3_moe"), words, tmp_path / "x.gguf", "tq1_0", is_expert)
    reader = gguf.GGUFReader(file.path)
    assert {tensor.name for tensor in reader.tensors} == {one.piece.name for one in file.plan}
    found = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down_exps.weight")
    stored: Any = weights.read("model.layers.1.mlp.experts.down_proj")
    values = gguf.quants.dequantize(found.data, found.tensor_type)
    assert torch.equal(torch.from_numpy(values).reshape(stored.codes.shape).sign().to(torch.int8), stored.codes)


def test_a_saved_model_is_written_as_one_in_memory(words: Path, tmp_path: Path) -> None:
    model = tiny("qwen3_next")
    save_model(model, tmp_path / "model", tokenizer_source=str(words))
    one, _ = written(model, words, tmp_path / "one.gguf", "f32")
    tokenizer = load_tokenizer(str(words))
    weights = FolderWeights(tmp_path / "model", load_config(str(tmp_path / "model")))
    two = write_gguf(weights, tmp_path / "two.gguf", tokenizer, Precisions("f32", lambda name, width: None), name="tiny")
    assert one.path.read_bytes() == two.path.read_bytes()
