"""Qwen3-Next as a base: experts as grouped products, LoRAs through both kinds of layer, and what the real sizes come to."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3NextConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from typer.testing import CliRunner

from adapter_bases import QWEN3_NEXT, qwen3_next
from families import VOCABULARY, packed_batch, stir, tokens
from limbeck.adapters.functional import FunctionalLoRA
from limbeck.adapters.inject import Injector
from limbeck.adapters.peft_experts import taken_for_experts
from limbeck.adapters.peft_files import read_peft, write_peft
from limbeck.adapters.spec import Adapters, AdapterSpec
from limbeck.adapters.targets import resolve_spec, resolve_targets
from limbeck.cli.app import app
from limbeck.config.parts.surgeries import LoraGeneratorOptions, TernarizeOptions
from limbeck.engine.recompute import recompute
from limbeck.errors import AdapterError
from limbeck.models import experts as experts_module
from limbeck.models.experts import EXPERTS, grouped_product
from limbeck.models.limbeck_model import wrap_student
from limbeck.models.loading import build_model, load_model, save_model
from limbeck.models.packed import FLAG, forward_packed, rows_seen
from limbeck.models.structure import layer_list
from limbeck.students.generator.network import Generator

DELTANET = ["in_proj_qkvz", "in_proj_ba", "out_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SHARED = ["shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"]
QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 24,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 5, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15,
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss", "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15,
}  # fmt: skip
FAMILIES = {"qwen3_next": QWEN3_NEXT, "qwen3_moe": QWEN3_MOE}


def moe(config: dict[str, Any], dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    model = build_model({**config, **changes}, dtype=dtype)
    stir(model)
    return model


def results(model: Any, form: str, x_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> list[Tensor]:
    """Output of the first layer's experts, and its gradient to the input, the weights of the choice, and the experts."""
    model.set_experts_implementation(form)
    experts = layer_list(model)[0].mlp.experts
    leaves = [x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_(), experts.gate_up_proj, experts.down_proj]
    y = experts(leaves[0], chosen_TK, leaves[1])
    return [y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), leaves)]


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference, relative to each tensor's largest number."""
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in zip(found, wanted, strict=True))


# -- experts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("width", [16, 6], ids=["aligned", "odd"])
@pytest.mark.parametrize("routing", ["any", "some experts get nothing", "one expert gets everything"])
@pytest.mark.parametrize("family", FAMILIES)
def test_grouped_experts_are_the_loop_over_experts(family: str, routing: str, width: int, dtype: torch.dtype, tolerance: float) -> None:
    model = moe(FAMILIES[family], dtype, moe_intermediate_size=width)
    count = layer_list(model)[0].mlp.experts.num_experts
    generator = torch.Generator().manual_seed(3)
    allowed = {"any": range(count), "some experts get nothing": (1, count - 1), "one expert gets everything": (2,)}[routing]
    kept = min(2, len(allowed))
    draw = torch.rand(23, len(allowed), generator=generator).argsort(1)[:, :kept]
    chosen = torch.tensor(list(allowed))[draw]
    x = torch.randn(23, 32, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.rand(23, kept, generator=generator, dtype=torch.float64).to(dtype)
    wanted = results(model, "eager", x, chosen, weights)
    found = results(model, EXPERTS, x, chosen, weights)
    assert apart(found, wanted) <= tolerance
    idle = sorted(set(range(count)) - set(allowed))
    assert all(not grad[idle].any() for grad in found[3:])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_computes_the_same_with_grouped_experts(family: str) -> None:
    model = moe(FAMILIES[family])
    ids = tokens(3, 11)
    found = {}
    for form in (EXPERTS, "eager"):
        model.set_experts_implementation(form)
        logits = model(input_ids=ids, use_cache=False).logits
        found[form] = [logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()))]
    assert apart(found[EXPERTS], found["eager"]) <= 1e-5


def test_experts_take_two_products_a_layer_however_many_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []

    def counting(x: Tensor, *others: Tensor) -> Tensor:
        calls.append(x.dtype)
        return grouped_product(x, *others)

    monkeypatch.setattr(experts_module, "grouped_product", counting)
    monkeypatch.setattr(torch, "where", lambda *_: pytest.fail("transformers' loop over experts"))
    model = moe(QWEN3_MOE, num_experts=64)
    model(input_ids=tokens(2, 9), use_cache=False)
    assert calls == [torch.float32] * 4
    # transformers' own grouped form leaves autocast out.
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=tokens(2, 9), use_cache=False)
    assert calls[4:] == [torch.bfloat16] * 4


def test_autocast_rounds_grouped_experts_no_more_than_the_loop() -> None:
    model = moe(QWEN3_NEXT)
    experts = layer_list(model)[0].mlp.experts
    x, chosen, weights = torch.randn(64, 32), torch.rand(64, 4).argsort(1)[:, :2], torch.rand(64, 2)
    exact = results(model, "eager", x, chosen, weights)
    with torch.autocast("cpu", torch.bfloat16):
        loop, grouped = (results(model, form, x, chosen, weights) for form in ("eager", EXPERTS))
    assert 1e-4 < apart(grouped, exact) <= 1.2 * apart(loop, exact) <= 3e-2
    assert [t.dtype for t in grouped] == [torch.float32] * 5
    assert experts.gate_up_proj.dtype == torch.float32


def test_recomputed_layers_have_the_same_gradients_to_the_bit() -> None:
    plain, model = moe(QWEN3_NEXT).train(), moe(QWEN3_NEXT).train()
    for layer in layer_list(model):
        recompute(layer)
    gradients = []
    for m in (plain, model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = m(input_ids=tokens(2, 9), labels=tokens(2, 9), use_cache=False).loss
        gradients.append(torch.autograd.grad(loss, list(m.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_other_layouts_of_experts_are_left_to_transformers() -> None:
    """Biases, transposed weights, a gate of its own."""
    model = build_model(GPT_OSS, attention="eager")
    stir(model)
    assert model.config._experts_implementation == EXPERTS
    ids = tokens(2, 9)
    ours = model(input_ids=ids, use_cache=False).logits
    model.set_experts_implementation("eager")
    assert apart([ours], [model(input_ids=ids, use_cache=False).logits]) <= 1e-5


def test_the_form_of_experts_is_pinned_and_saved(tmp_path: Path) -> None:
    model = moe(QWEN3_NEXT)
    assert model.config._experts_implementation == EXPERTS and EXPERTS in ALL_EXPERTS_FUNCTIONS
    save_model(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["limbeck_experts"] == EXPERTS
    assert load_model(str(tmp_path / "ours")).config._experts_implementation == EXPERTS
    # Of a model that says nothing too, and what was chosen stays chosen.
    model.save_pretrained(tmp_path / "stock")
    assert load_model(str(tmp_path / "stock")).config._experts_implementation == EXPERTS
    model.set_experts_implementation("eager")
    save_model(model, tmp_path / "chosen")
    assert load_model(str(tmp_path / "chosen")).config._experts_implementation == "eager"
    dense = build_model({"model_type": "qwen3", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8})
    save_model(dense, tmp_path / "dense")
    assert "limbeck_experts" not in json.loads((tmp_path / "dense" / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_the_same_in_stock_transformers(family: str, tmp_path: Path) -> None:
    model = moe(FAMILIES[family])
    save_model(model, tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert stock.config._experts_implementation == "grouped_mm"
    with torch.no_grad():
        ours, theirs = (m(input_ids=tokens(2, 9), use_cache=False).logits for m in (model, stock))
    assert apart([theirs], [ours]) <= 1e-6


# -- LoRAs on this family --------------------------------------------------------------------------------------------------


def random_adapters(spec: AdapterSpec, count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Adapters:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    A = {s.name: draw(count, len(s.layers), spec.rank, s.in_features) for s in spec.sites}
    return Adapters(spec, A, {s.name: draw(count, len(s.layers), s.out_features, spec.rank) for s in spec.sites})


def test_the_targets_resolve_in_their_layers() -> None:
    model = qwen3_next()
    sites = {site.name: site.layers for site in resolve_targets(model, [*DELTANET, *ATTENTION, *SHARED])}
    assert sites == (
        {f"linear_attn.{name}": (0, 1, 2) for name in DELTANET}
        | {f"self_attn.{name}": (3,) for name in ATTENTION}
        | {f"mlp.{name}": (0, 1, 2, 3) for name in SHARED}
    )
    assert set(resolve_targets(model, "attention")) == set(resolve_targets(model, [*DELTANET, *ATTENTION]))


def test_projections_that_do_not_exist_are_refused_with_the_fused_one() -> None:
    wanted = ["q_proj", "linear_q", "linear_k", "linear_v"]
    with pytest.raises(AdapterError) as caught:
        resolve_targets(qwen3_next(), wanted)
    for name in wanted[1:]:
        assert f"no Linear is called '{name}': this family keeps it in the fused `in_proj_qkvz`" in str(caught.value)
    assert "linear_attn.in_proj_qkvz (96 x 32)" in str(caught.value) and "'q_proj'" not in str(caught.value)


@pytest.mark.parametrize("targets", [DELTANET, ATTENTION, SHARED, [*DELTANET, *ATTENTION]], ids=["deltanet", "attention", "shared", "both"])
def test_one_forward_is_each_adapter_alone_and_peft(targets: list[str]) -> None:
    """Rows of unequal documents, which this family sees unpacked; values and gradients."""
    model = qwen3_next()
    spec = resolve_spec(model, targets, rank=2, alpha=4)
    adapters = random_adapters(spec, 3)
    batch = packed_batch([[4, 6, 3], [8, 5], [2, 2, 2, 7]], padding=2)
    injector = Injector(model, spec)
    rows = rows_seen(model, batch)
    assert rows is not None and not getattr(model, FLAG)
    weights = torch.randn(3, 15, 32, dtype=torch.float64) * (batch.documents_BT >= 0)[..., None]

    with injector.active(adapters.pick(rows)):
        found = forward_packed(model, batch)
    found_gradients = torch.autograd.grad((found * weights).sum(), adapters.tensors())
    wanted = []
    for n in range(3):
        with injector.active(adapters.pick([n])):
            wanted.append(forward_packed(model, batch)[n])
    real = batch.documents_BT >= 0
    assert (found - torch.stack(wanted))[real].abs().max() <= 1e-10
    wanted_gradients = torch.autograd.grad((torch.stack(wanted) * weights).sum(), adapters.tensors())
    assert apart(list(found_gradients), list(wanted_gradients)) <= 1e-10
    injector.remove()

    # In a family of fused experts peft takes the shared expert's Linears to mean the routed ones.
    wrapped = qwen3_next()
    wrapped.config.model_type = "unknown"
    functional = FunctionalLoRA(get_peft_model(wrapped, LoraConfig(r=2, lora_alpha=4, target_modules=spec.paths)).eval())
    ids = tokens(6, 9)
    with torch.no_grad():
        with Injector(model, spec).active(adapters):
            ours = model(input_ids=ids, use_cache=False).logits
        theirs = torch.cat([functional(adapters, n, input_ids=ids[2 * n : 2 * n + 2], use_cache=False).logits for n in range(3)])
    assert (ours - theirs).abs().max() <= 1e-10
    assert (ours - model(input_ids=ids, use_cache=False).logits).abs().max() > 1e-2


def test_an_adapter_never_reaches_another_row() -> None:
    model = qwen3_next(torch.float32)
    model.set_experts_implementation(EXPERTS)
    spec = resolve_spec(model, [*DELTANET, *ATTENTION, *SHARED], rank=2, alpha=4)
    batch = packed_batch([[4, 6, 3], [8, 5], [2, 2, 2, 7]], padding=2)
    injector = Injector(model, spec)
    rows = rows_seen(model, batch)
    one, other = (random_adapters(spec, 3, seed, torch.float32) for seed in (0, 1))
    mixed = Adapters(spec, *({name: torch.cat([f[name][:1], g[name][1:2], f[name][2:]]) for name in f} for f, g in ((one.A, other.A), (one.B, other.B))))
    states = []
    for adapters in (one, mixed):
        with torch.no_grad(), injector.active(adapters.pick(rows)):
            states.append(forward_packed(model, batch))
    assert torch.equal(states[0][0::2], states[1][0::2])
    assert (states[0][1] - states[1][1]).abs().max() > 1e-2


# -- files -----------------------------------------------------------------------------------------------------------------


DENSE_FIRST: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 24,
    "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_group": 1, "topk_group": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15,
}  # fmt: skip
"""A dense layer, and one of experts with a shared one."""


def of_family(config: dict[str, Any], dtype: torch.dtype) -> Any:
    model = moe(config, dtype)
    # The grouped product of experts has no fp64.
    model.set_experts_implementation("eager")
    return model


def distance_in_peft(config: dict[str, Any], folder: Path, wanted: Tensor, dtype: torch.dtype) -> float:
    """Of the logits of peft with a folder's adapter from those wanted."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(of_family(config, dtype), folder)
        return float((loaded(input_ids=tokens(2, 9), use_cache=False).logits - wanted).abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize(
    ("config", "targets", "mistaken"),
    [
        (QWEN3_NEXT, [*DELTANET, *ATTENTION], 0), (QWEN3_NEXT, SHARED, 12), (QWEN3_NEXT, "all", 12), (DENSE_FIRST, "all", 6),
        ({**QWEN3_MOE, "mlp_only_layers": [0]}, "all", 3),
    ],
    ids=["attention", "shared", "all", "dense first layer", "dense layer"],
)  # fmt: skip
def test_peft_loads_an_adapter_beside_fused_experts(config: dict, targets: Any, mistaken: int, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    model = of_family(config, dtype)
    spec = resolve_spec(model, targets, rank=2, alpha=4)
    # Smaller ones: a deep model of large weights makes much of rounding.
    adapters = random_adapters(spec, 1, dtype=dtype).map(lambda t: t.detach() / 2)
    by_weight = taken_for_experts(model, spec)
    assert len(by_weight) == mistaken
    write_peft(adapters, 0, tmp_path / "ours", base=None, provenance={}, dtype=dtype, as_parameters=by_weight)
    with torch.no_grad(), Injector(model, spec).active(adapters):
        wanted = model(input_ids=tokens(2, 9), use_cache=False).logits
    assert (wanted - of_family(config, dtype)(input_ids=tokens(2, 9), use_cache=False).logits).abs().max() > 0.3
    assert distance_in_peft(config, tmp_path / "ours", wanted, dtype) <= tolerance
    back = read_peft(tmp_path / "ours", model)
    assert back.spec == spec and all(torch.equal(back.B[name], B) for name, B in adapters.B.items())
    # When peft reads the plain form of them, the other one can go.
    write_peft(adapters, 0, tmp_path / "plain", base=None, provenance={}, dtype=dtype)
    assert (distance_in_peft(config, tmp_path / "plain", wanted, dtype) > 0.1) == bool(mistaken)


def test_a_merge_of_adapters_beside_fused_experts_is_loaded_too(tmp_path: Path) -> None:
    model = of_family(QWEN3_NEXT, torch.float64)
    spec = resolve_spec(model, "all", rank=2, alpha=4)
    adapters = random_adapters(spec, 2, dtype=torch.float32).detach()
    for n in range(2):
        write_peft(adapters, n, tmp_path / str(n), base="b", provenance={}, as_parameters=taken_for_experts(model, spec))
    done = CliRunner().invoke(app, ["adapters", "merge", str(tmp_path / "0"), str(tmp_path / "1"), "--out", str(tmp_path / "both")])
    assert done.exit_code == 0, done.output
    merged = read_peft(tmp_path / "both", model).to(torch.float64)
    with torch.no_grad(), Injector(model, merged.spec).active(merged):
        wanted = model(input_ids=tokens(2, 9), use_cache=False).logits
    assert distance_in_peft(QWEN3_NEXT, tmp_path / "both", wanted, torch.float64) <= 1e-10


# -- the real sizes --------------------------------------------------------------------------------------------------------


def test_generators_for_the_real_qwen3_coder_next() -> None:
    """Nothing is allocated: a LoRA's numbers by kind of layer, and which generators stay within 50 million parameters."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3NextConfig())
    layers = {"attention": (ATTENTION, 12, 344_064), "deltanet": (DELTANET, 36, 361_472), "shared": (SHARED, 48, 3 * 40_960)}
    for targets, count, numbers in layers.values():
        spec = resolve_spec(model, targets, rank=16, alpha=32)
        assert spec.num_parameters == count * numbers and {len(site.layers) for site in spec.sites} == {count}
    sizes = {}
    for name, targets, more in (
        ("default depth", [*DELTANET, *ATTENTION], {"width": 512, "reader": {"heads": 8}}),
        ("one block", [*DELTANET, *ATTENTION], {"width": 512, "trunk": 1, "reader": {"blocks": 1, "heads": 8}}),
        ("with shared experts", [*DELTANET, *ATTENTION, *SHARED], {"width": 384, "trunk": 1, "reader": {"blocks": 1, "heads": 8}}),
    ):
        options = LoraGeneratorOptions.model_validate({"targets": targets, "rank": 16, "alpha": 32, **more})
        with torch.device("meta"):
            generator = Generator(resolve_spec(model, options.targets, rank=16, alpha=32), options, 2048, (1, 512))
            A, B = generator(torch.zeros(2, 1, 512, 2048), torch.ones(2, 1, 512, dtype=torch.bool))
        assert Adapters(generator.spec, A, B).spec.num_parameters == (23_040_000 if "shared" in name else 17_141_760)
        sizes[name] = sum(p.numel() for p in generator.parameters())
    assert sizes == {"default depth": 54_479_672, "one block": 48_172_856, "with shared experts": 47_887_704}
    assert sizes["one block"] <= 50_000_000 and sizes["with shared experts"] <= 50_000_000


def test_a_student_of_a_mixture_of_experts_from_files_is_saved_as_it_is_loaded(tmp_path: Path) -> None:
    save_model(moe(QWEN3_NEXT), tmp_path / "base")
    with safe_open(tmp_path / "base" / "model.safetensors", "pt") as file:
        assert any(".experts.0." in name for name in file.keys())  # noqa: SIM118
    student = wrap_student(load_model(str(tmp_path / "base")), (TernarizeOptions(),), {"source": str(tmp_path / "base"), "fingerprint": "none"})
    save_model(student, tmp_path / "student")
    again = load_model(str(tmp_path / "student"))
    ids = torch.arange(24).reshape(2, 12) * 5 % 90
    with torch.no_grad():
        assert (again(input_ids=ids).logits - student(input_ids=ids).logits).abs().max() < 1e-5
