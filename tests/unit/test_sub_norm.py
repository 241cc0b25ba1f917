"""Norms in front of ternary output and down projections (SubLN): what they compute, train, save and keep out of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from adapter_bases import QWEN3_NEXT
from engine_parts import DenseCE
from families import packed_batch, stir, tiny_model, tokens
from limbeck.config.parts.stages import GroupOptions, OptimOptions
from limbeck.config.parts.surgeries import HybridizeOptions, TernarizeOptions
from limbeck.engine.optim import build_optimizer
from limbeck.engine.recompute import recompute
from limbeck.engine.step import TrainStep
from limbeck.errors import ModelError
from limbeck.export.gguf.origin import opened
from limbeck.models.limbeck_model import wrap_student
from limbeck.models.loading import build_model, fingerprint, load_model, save_model
from limbeck.models.structure import layer_list
from limbeck.students.selection import parameter_groups, select_trainable
from limbeck.students.student import Student, restore_attention
from limbeck.students.ternarize import dequantise
from limbeck.students.ternary.modules import SubNorm
from moe_cases import QWEN3_MOE

BASE: dict[str, Any] = {"source": "tiny", "fingerprint": {}}
MIXTURES = {"qwen3_moe": QWEN3_MOE, "qwen3_next": QWEN3_NEXT}
EPS = 1e-8


def base_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    if family not in MIXTURES:
        return tiny_model(family, dtype=dtype)
    model = build_model(MIXTURES[family], dtype=dtype)
    stir(model)
    return model


def student_of(base: Any, *surgery: Any, **options: Any) -> Student:
    return Student(wrap_student(base, [*surgery, TernarizeOptions(sub_norm=True, **options)], BASE))


def norms_of(model: Any) -> dict[str, SubNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SubNorm)}


def with_norm_weights(model: Any) -> Any:
    """Weights that are not 1, so that one that is applied twice, or not at all, shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in norms_of(model).values():
            module.weight.copy_((0.4 * torch.randn(module.weight.shape, generator=generator)).exp())
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


# -- the forward pass -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3", "phi3"])
def test_norms_stand_in_front_of_output_and_down_projections_and_nowhere_else(family: str) -> None:
    model = student_of(base_of(family)).model
    wanted = {f"model.layers.{i}.{n}.sub_norm" for i in range(4) for n in ("self_attn.o_proj", "mlp.down_proj")}
    assert set(norms_of(model)) == wanted
    assert all(torch.equal(module.weight, torch.ones_like(module.weight)) for module in norms_of(model).values())


@pytest.mark.parametrize("warmup", [0, 10], ids=["ternary", "lambda 0"])
def test_a_projection_reads_the_norm_of_its_input(warmup: int) -> None:
    """Against the same student without norms whose projections' inputs are normed from outside."""
    ids = tokens(2, 11)
    student = student_of(base_of("qwen3", torch.float64), warmup=warmup)
    student.at_step(0)
    twin = wrap_student(base_of("qwen3", torch.float64), [TernarizeOptions(warmup=warmup)], BASE)
    before = logits(twin, ids)
    for name, module in norms_of(with_norm_weights(student.model)).items():

        def normed(projection: nn.Module, args: Any, weight: Tensor = module.weight) -> Any:
            return (F.rms_norm(args[0], weight.shape, weight, EPS),)

        twin.get_submodule(name.removesuffix(".sub_norm")).register_forward_pre_hook(normed)
    assert apart(logits(student.model, ids), logits(twin, ids)) <= 1e-12
    assert apart(logits(student.model, ids), before) > 1e-2


def test_experts_of_a_layer_share_a_norm_between_their_two_products() -> None:
    """Against a loop over tokens and their experts."""
    model = with_norm_weights(student_of(base_of("qwen3_moe", torch.float64), activations="none").model)
    assert list(norms_of(model)) == [f"model.layers.{i}.mlp.experts.sub_norm" for i in (0, 2)]
    experts = model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 32, generator=generator, dtype=torch.float64)
    weights = torch.rand(7, 2, generator=generator, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(7)])
    gate_up, down = experts.quantised("gate_up_proj"), experts.quantised("down_proj")
    wanted = torch.zeros_like(x)
    for t in range(7):
        for k in range(2):
            e = int(chosen[t, k])
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            inner = F.rms_norm(F.silu(gate) * up, (16,), experts.sub_norm.weight, EPS)
            wanted[t] += weights[t, k] * (down[e] @ inner)
    assert apart(experts(x, chosen, weights), wanted) <= 1e-12


def test_what_is_rounded_is_what_was_normed() -> None:
    """Eight bits a token, one scale: the largest of a token is 127 steps."""
    model = with_norm_weights(student_of(base_of("qwen3"), activations="token").model)
    projection = model.model.layers[0].mlp.down_proj
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(3)) * 1e-3
    rounded = projection.rounded("weight", x)
    normed = F.rms_norm(x, (48,), projection.sub_norm.weight, EPS)
    assert (rounded - normed).abs().max() <= normed.abs().max() / 127
    steps = rounded * 127 / normed.abs().amax(-1, keepdim=True)
    assert (steps - steps.round()).abs().max() <= 1e-3


def test_norms_are_computed_in_fp32_under_autocast() -> None:
    norm = SubNorm(torch.empty(8, 64))
    x = (torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 1e-3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, F.rms_norm(x.float(), (64,), None, EPS).bfloat16())


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_generating_with_a_cache_is_generating_without(family: str) -> None:
    model, ids = with_norm_weights(student_of(base_of(family, torch.float64)).model), tokens(2, 7)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


# -- saving, roles, training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama3", "qwen3", "qwen3_moe", "qwen3_next"])
def test_a_saved_student_loads_with_the_same_logits(family: str, tmp_path: Path) -> None:
    student, ids = student_of(base_of(family)), tokens(2, 11)
    with_norm_weights(student.model)
    wanted = logits(student.model, ids)
    student.save(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"))
    for parameter in loaded.parameters():
        # Kernels may round differently where a file's mapping begins at an odd place.
        parameter.data = parameter.data.clone()
    assert torch.equal(logits(loaded, ids), wanted)
    dequantise(loaded)
    assert torch.equal(logits(loaded, ids), wanted)


def test_norms_of_a_hybrid_stand_in_front_of_its_mixers_projections_and_train_with_the_mixers() -> None:
    student = student_of(base_of("qwen3"), HybridizeOptions(keep=(0, 2)))
    roles = {name: student.roles[f"{name}.weight"] for name in norms_of(student.model)}
    assert {name for name, role in roles.items() if role == "mixers"} == {f"model.layers.{i}.self_attn.o_proj.sub_norm" for i in (1, 3)}
    assert set(roles.values()) == {"mixers", "rest"} and len(roles) == 8


def test_norms_never_land_in_a_muon_group_and_every_parameter_lands_in_one() -> None:
    student = student_of(base_of("qwen3_moe"), method="elastic")
    select_trainable(student, ["all"])
    options = [
        GroupOptions(role="ternary", kind="muon", lr=0.02),
        GroupOptions(role="scales", kind="lion", lr=1e-4),
        GroupOptions(role="rest", kind="lion", lr=1e-4),
    ]
    groups = parameter_groups(student, options)
    claimed = [name for _, members in groups for name, _ in members]
    assert sorted(claimed) == sorted(name for name, _ in student.model.named_parameters())
    norms = {f"{name}.weight" for name in norms_of(student.model)}
    assert norms and norms <= {name for name, _ in groups[2][1]}
    build_optimizer(groups, OptimOptions(groups=options))


@pytest.mark.parametrize("family", ["llama3", "qwen3_moe"])
def test_micro_batches_add_up_to_the_gradient_of_the_batch_and_reach_every_norm(family: str) -> None:
    student = student_of(base_of(family, torch.float64), activations="token")
    step, batch = TrainStep(student, [DenseCE()]), packed_batch([[5, 7], [3, 9], [12], [4, 8]])
    found = []
    for rows in (4, 1):
        student.zero_grad()
        for part in batch.split(rows):
            step.run(part, {}, [1 / int(batch.label_mask_BT.sum())])
        found.append([p.grad.clone() for p in student.parameters()])
    assert max(apart(a, b) for a, b in zip(*found, strict=True)) <= 1e-12
    assert all(module.weight.grad.abs().max() > 0 for module in norms_of(student.model).values())


def test_a_recomputed_layer_has_the_same_gradient() -> None:
    found = []
    for again in (False, True):
        model = student_of(base_of("qwen3_moe", torch.float64)).model
        if again:
            for layer in layer_list(model):
                recompute(layer)
        found.append(torch.autograd.grad(logits(model.train(), tokens(2, 9)).square().mean(), list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("sub_norm", [False, True], ids=["plain", "sub_norm"])
def test_attention_that_a_ternary_hybrid_is_given_back_is_ternary_as_it_is_when_loaded(sub_norm: bool, tmp_path: Path) -> None:
    ids = tokens(2, 11)
    save_model(tiny_model("qwen3"), tmp_path / "base")
    base: dict[str, Any] = {"source": str(tmp_path / "base"), "fingerprint": fingerprint(str(tmp_path / "base"))}
    plan = [{"match": "*.mlp.*", "precision": "ternary"}, {"match": "*.self_attn.*_proj.weight", "precision": "ternary"}]
    surgery = [HybridizeOptions(), TernarizeOptions(plan=plan, method="elastic", sub_norm=sub_norm)]
    model = wrap_student(load_model(base["source"]), surgery, base)
    restore_attention(model, [0, 2], stage="align")
    # Learnt scales of what came back start where all do.
    assert all(float(scale.detach().max()) < 0.9 for name, scale in model.named_parameters() if name.endswith("weight_scale"))
    wanted = logits(model, ids)
    save_model(model, tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"))
    for parameter in loaded.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(logits(loaded, ids), wanted)


# -- what is refused, and what is said ------------------------------------------------------------------------------------


def test_a_pretrained_models_owner_is_told_that_its_function_changes() -> None:
    (note,) = student_of(base_of("qwen3"), warmup=5).notes
    assert "`sub_norm` put 8 norms" in note and "while lambda is 0" in note and "GGUF" in note


def test_norms_and_a_file_type_exclude_each_other_in_a_recipe() -> None:
    with pytest.raises(ValidationError, match=r"no GGUF file can hold the norms of `sub_norm`.*asks for tq2_0: leave out one"):
        TernarizeOptions(sub_norm=True, export="tq2_0")


def test_a_plan_without_output_and_down_projections_is_refused() -> None:
    with pytest.raises(ModelError, match=r"`sub_norm` would do nothing: the plan makes none of o_proj, out_proj, dense, down_proj ternary"):
        student_of(base_of("qwen3"), plan=[{"match": "*.mlp.up_proj.weight", "precision": "ternary"}])


def test_a_file_for_llama_cpp_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    student_of(base_of("qwen3")).save(tmp_path / "model")
    with pytest.raises(ModelError, match=r"export --to gguf: the student has `sub_norm`.*`--to hf` writes any student"):
        opened(tmp_path / "model")
