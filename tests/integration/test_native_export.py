"""The native export: what we compute, computed by stock transformers."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from families import tiny_model, tokens
from limbeck.cli.app import app
from limbeck.config.load import load_recipe, load_text
from limbeck.config.parts.surgeries import HybridizeOptions
from limbeck.errors import ModelError, RecipeError, RunError
from limbeck.export.native import fits_native, native_model, write_native
from limbeck.models.limbeck_model import wrap_student
from limbeck.models.loading import load_model, load_tokenizer, resolve_source
from limbeck.stages.export import export_path
from limbeck.stages.run import run_recipe

NATIVE = {"kind": "gated_deltanet", "preset": "native"}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
NEW = 50

STOCK = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "limbeck":
            raise ImportError("limbeck is not to be imported here")

sys.meta_path.insert(0, Refuse())
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

out, *folders = sys.argv[1:]
for number, folder in enumerate(folders):
    inputs = torch.load(f"{folder}.inputs", weights_only=True)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(model).__name__ == "Qwen3_5ForCausalLM" and type(model).__module__.startswith("transformers."), type(model)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        found = {
            "logits": model(input_ids=inputs["ids"]).logits,
            "padded": model(input_ids=inputs["padded"], attention_mask=inputs["mask"]).logits,
            "greedy": model.generate(inputs["ids"], max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0),
        }
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, f"{out}/{number}.safetensors")
text = AutoTokenizer.from_pretrained(folders[-1])("def main():\\n    return 1")["input_ids"]
json.dump(text, open(f"{out}/tokens.json", "w"))
assert not [name for name in sys.modules if name.split(".")[0] == "limbeck"]
"""


def hybrid(base: Any, keep: Any, mixer: dict[str, Any] = NATIVE, seed: int = 0) -> Any:
    """A hybrid whose mixers are not where they start: every tensor that training moves is moved."""
    student: Any = wrap_student(base, [HybridizeOptions(mixer=mixer, keep=keep)], {"source": "nowhere", "fingerprint": {}})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in student.mixers().values():
            for name, parameter in layer.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter * (0.4 * noise).exp() if name == "o_norm" else parameter + 0.1 * noise)
    return student


def students() -> dict[str, Any]:
    """Hybrids with log-normal norms: grouped heads, a head width that is not hidden / heads, tied and untied, scaled rotation, all kept."""
    return {
        "untied": hybrid(tiny_model("qwen3"), [1, 3]),
        "tied, yarn": hybrid(tiny_model("qwen3", tied=True, seed=1, rope_parameters=YARN), [0]),
        "all kept": hybrid(tiny_model("qwen3", seed=2, head_dim=8), "all"),
        "longer convolution": hybrid(tiny_model("qwen3", seed=3), [2], {**NATIVE, "short_conv": 5}),
        "trained": hybrid(load_model(resolve_source("builtin:code-2m")), [6, 7]),
    }


@torch.no_grad()
def ours(student: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "logits": student(input_ids=inputs["ids"]).logits,
        "padded": student(input_ids=inputs["padded"], attention_mask=inputs["mask"]).logits,
        "greedy": student.generate(inputs["ids"], max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0),
    }


def inputs_of(seed: int) -> dict[str, Tensor]:
    """Two rows of 70 tokens (more than a chunk), and the same with the first padded on the left."""
    ids = tokens(2, 70, seed)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    return {"ids": ids, "padded": ids.masked_fill(mask == 0, 0), "mask": mask}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor], Tensor]]:
    """For every student what we compute, what a process without Limbeck computes from the exported folder, and the mask."""
    from safetensors.torch import load_file

    home = tmp_path_factory.mktemp("native")
    made, folders, inputs = students(), [], []
    for number, (name, student) in enumerate(made.items()):
        folder = home / f"model-{number}"
        source = resolve_source("builtin:code-2m") if name == "trained" else None
        write_native(student, folder, tokenizer_source=source, dtype=torch.float32)
        inputs.append(inputs_of(number))
        torch.save(inputs[-1], f"{folder}.inputs")
        folders.append(str(folder))
    command = [sys.executable, "-I", "-c", f"NEW = {NEW}\n" + STOCK, str(home), *folders]
    done = subprocess.run(command, cwd=home, env={"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((home / "tokens.json").read_text()) == load_tokenizer(resolve_source("builtin:code-2m"))("def main():\n    return 1")["input_ids"]
    return {
        name: (ours(student, inputs[number]), load_file(home / f"{number}.safetensors"), inputs[number]["mask"])
        for number, (name, student) in enumerate(made.items())
    }


CASES = ("untied", "tied, yarn", "all kept", "longer convolution", "trained")


@pytest.mark.parametrize("case", CASES)
def test_stock_transformers_computes_our_logits(compared: Any, case: str) -> None:
    mine, theirs, mask = compared[case]
    scale = mine["logits"].abs().max().clamp(min=1)
    assert (mine["logits"] - theirs["logits"]).abs().max() <= 1e-5 * scale
    real = mask.bool()
    assert (mine["padded"] - theirs["padded"])[real].abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("case", CASES)
def test_stock_transformers_generates_our_tokens(compared: Any, case: str) -> None:
    mine, theirs, _ = compared[case]
    assert mine["greedy"].shape == (2, 70 + NEW)
    assert torch.equal(mine["greedy"], theirs["greedy"])


def test_a_lifted_softmax_layer_is_exact_where_norm_weights_are_at_least_a_half(tmp_path: Path) -> None:
    base: Any = tiny_model("qwen3")
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "norm" in name:
                parameter.clamp_(min=0.5)
    write_native(hybrid(base, "all"), tmp_path / "native", dtype=torch.float32)
    ids = tokens(2, 40)
    with torch.no_grad():
        assert torch.equal(load_model(str(tmp_path / "native"))(input_ids=ids).logits, base(input_ids=ids).logits)


def test_generation_settings_travel(tmp_path: Path) -> None:
    base: Any = tiny_model("qwen3")
    base.generation_config.eos_token_id = [2, 5]
    write_native(hybrid(base, [1]), tmp_path / "native", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "native" / "generation_config.json").read_text())["eos_token_id"] == [2, 5]
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"], config["dtype"]) == (2, 1, 0, "bfloat16")


def test_one_format_needs_no_list() -> None:
    recipe: Any = load_text(RECIPE, ["export.to=native"])
    assert recipe.stages["export"].to == ("native",)


def test_in_bf16_the_export_strays_no_further_than_twice_the_models_own_rounding(tmp_path: Path) -> None:
    source = resolve_source("builtin:code-2m")
    tokenizer = load_tokenizer(source)
    ids = torch.tensor(tokenizer(Path(textwrap.__file__).read_text())["input_ids"][:2048]).view(8, 256)

    def log_probabilities(folder: str, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            return load_model(folder, dtype=dtype)(input_ids=ids).logits.double().log_softmax(-1)

    def kl(p: Tensor, q: Tensor) -> float:
        return float((p.exp() * (p - q)).sum(-1).mean())

    write_native(hybrid(load_model(source), "all"), tmp_path / "native", dtype=torch.bfloat16)
    exact = log_probabilities(source, torch.float32)
    rounded = kl(exact, log_probabilities(source, torch.bfloat16))
    native = kl(exact, log_probabilities(str(tmp_path / "native"), torch.bfloat16))
    assert 0 < native <= 2 * rounded


@pytest.mark.parametrize(
    ("family", "reason"),
    [("qwen2", "biases on q, k and v and no q/k norms"), ("llama3", "no q/k norms"), ("mistral", "no q/k norms"), ("olmo2", "span all heads"),
     ("gemma2", "soft-capped"), ("gemma3", "further norms"), ("phi3", "no q/k norms")],
)  # fmt: skip
def test_a_teacher_that_does_not_fit_is_refused_by_name_and_reason(family: str, reason: str) -> None:
    base = tiny_model(family)
    with pytest.raises(ModelError, match=reason) as error:
        native_model(hybrid(base, [1]))
    assert base.config.model_type in str(error.value) and "--to hf" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"attention_bias": True}, "has biases"), ({"hidden_act": "gelu"}, "activation is 'gelu'"),
     ({"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}, "kept layers 1 attend to a sliding window"),
     ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary scaling 'dynamic'")],
)  # fmt: skip
def test_a_qwen3_with_what_qwen35_lacks_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        native_model(hybrid(tiny_model("qwen3", **changes), [1]))


@pytest.mark.parametrize(
    ("mixer", "reason"),
    [({"kind": "swa"}, "mixer 'swa'"), ({"kind": "gated_deltanet"}, "preset: native"), ({**NATIVE, "rope": True}, "`rope: true` .native: false"),
     ({**NATIVE, "short_conv": 0}, "short_conv: 0")],
)  # fmt: skip
def test_other_mixers_are_refused(mixer: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        native_model(hybrid(tiny_model("qwen3"), [1], mixer))
    with pytest.raises(RecipeError, match=r"stages\.export\.to"):
        load_text(RECIPE, [f"train.student.surgery.0.mixer={json.dumps(mixer)}"])


def test_what_qwen35_cannot_hold_is_not_written_so_by_default() -> None:
    assert fits_native(hybrid(tiny_model("qwen3"), [1]).config)
    assert not fits_native(hybrid(tiny_model("qwen3"), []).config)
    assert not fits_native(tiny_model("qwen3").config)


def test_a_model_without_surgery_is_refused() -> None:
    with pytest.raises(ModelError, match="not a hybrid"):
        native_model(tiny_model("qwen3"))


def test_a_student_without_any_softmax_layer_is_refused() -> None:
    with pytest.raises(ModelError, match="keep at least one layer"):
        native_model(hybrid(tiny_model("qwen3"), []))
    with pytest.raises(RecipeError, match="keep at least one layer"):
        load_text(RECIPE, ["train.student.surgery.0.keep=[]"])


def test_a_tensor_that_has_no_place_is_an_error() -> None:
    student = hybrid(tiny_model("qwen3"), [1])
    student.model.layers[1].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"no place for model.layers.1.mlp.extra"):
        native_model(student)


RECIPE = """
name: native
stages:
  train:
    data: {source: {kind: text, path: corpus, suffixes: [.py]}, tokenizer: builtin:code-2m, sequence: 64, held_out: 0.2}
    student: {base: "builtin:code-2m", surgery: [{kind: hybridize, mixer: {kind: gated_deltanet, preset: native}, keep: [6, 7]}]}
    optim: {groups: [{lr: 1e-3}]}
    loop: {steps: 2, batch_tokens: 256, checkpoint_every: 1, log_every: 1}
  export: {kind: export, from: train, to: [hf, native], dtype: float32}
"""


def test_check_refuses_a_teacher_before_anything_is_trained(tmp_path: Path) -> None:
    from limbeck.models.loading import save_model

    save_model(tiny_model("qwen2"), tmp_path / "teacher")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    words = [str(tmp_path / "recipe.yaml"), "train.student.base=teacher"]
    for verb in ("check", "run"):
        refused = CliRunner().invoke(app, [verb, *words])
        assert refused.exit_code == 2 and "stages.export.to: native: teacher is refused" in refused.stderr and "biases" in refused.stderr
    fine = CliRunner().invoke(app, ["check", words[0]])
    assert fine.exit_code == 0 and "hf, native" in fine.output
    absent = CliRunner().invoke(app, ["check", words[0], "train.student.base=./absent"])
    assert absent.exit_code == 0 and "not checked: export" in absent.output


def test_an_export_stage_and_a_checkpoint_become_native_folders(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "corpus").mkdir()
    for source in sorted(Path(textwrap.__file__).parent.glob("[a-b]*.py")):
        (tmp_path / "corpus" / source.name).write_bytes(source.read_bytes())
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    run = run_recipe(load_recipe(tmp_path / "recipe.yaml"), recipe_dir=tmp_path, run_dir=tmp_path / "run", say=lambda text: None)
    folder = run / "export" / "export" / "native"
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen3_5_text", ["Qwen3_5ForCausalLM"])
    assert config["layer_types"] == ["linear_attention"] * 6 + ["full_attention"] * 2 and "limbeck" not in json.dumps(config)
    assert (folder / "tokenizer.json").exists() and "import limbeck" not in (folder / "README.md").read_text()
    last = export_path(f"{run / 'train'}@2", to="native", output=tmp_path / "last", dtype="float32")
    # Where it is possible it is the default.
    assert export_path(str(run / "train"), dtype="float32", say=said.append) == run / "train" / "export" / "native"
    assert "as native" in said[-1]
    assert json.loads((run / "train" / "export" / "native" / "config.json").read_text()) == config
    ids = tokens(1, 30)
    with torch.no_grad():
        mine, theirs, again = (load_model(str(f))(input_ids=ids).logits for f in (run / "train" / "model", folder, last))
    assert (mine - theirs).abs().max() < 1e-5 * mine.abs().max() and torch.equal(theirs, again)
    with pytest.raises(RunError, match="allowed: hf, native"):
        export_path(str(run / "train"), to="onnx")
