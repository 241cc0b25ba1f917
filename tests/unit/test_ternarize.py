"""The ternary surgery on dense and mixture-of-experts models: what it computes, trains, saves and refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from adapter_bases import QWEN3_NEXT
from engine_parts import DenseCE, Rows, make_trainer
from families import VOCABULARY, packed_batch, stir, tiny_model, tokens
from limbeck.config.parts.precision import precision_of, types_for
from limbeck.config.parts.surgeries import HybridizeOptions, TernarizeOptions
from limbeck.engine.metrics import loss_trace, read_metrics
from limbeck.engine.parallel import World
from limbeck.engine.recompute import recompute
from limbeck.engine.step import TrainStep
from limbeck.errors import ModelError
from limbeck.models import experts as experts_module
from limbeck.models.limbeck_model import wrap_student
from limbeck.models.loading import build_model, load_model, save_model
from limbeck.models.structure import layer_list
from limbeck.ops.ternary import dequantised, round_token, ternary
from limbeck.students.student import Student
from limbeck.students.ternarize import DONE, check_exportable, dequantise, settled, ternarize_options
from limbeck.students.ternary import modules
from moe_cases import ternary_weights
from ranks import on_two_ranks

BASE: dict[str, Any] = {"source": "tiny", "fingerprint": {}}
QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 24,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 5, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15,
}  # fmt: skip
DENSE = ("llama3", "qwen2", "qwen3")
MIXTURES = {"qwen3_moe": QWEN3_MOE, "qwen3_next": QWEN3_NEXT}
FAMILIES = (*DENSE, *MIXTURES)


def base_of(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    if family in DENSE:
        return tiny_model(family, dtype=dtype, **changes)
    model = build_model({**MIXTURES[family], **changes}, dtype=dtype)
    stir(model)
    return model


def student_of(base: Any, *surgery: Any, **options: Any) -> Student:
    return Student(wrap_student(base, [*surgery, TernarizeOptions(**options)], BASE))


def expected_names(model: Any) -> list[str]:
    """The weights of the default plan, found without it."""
    if any("experts" in name for name, _ in model.named_parameters()):
        return [name for name, _ in model.named_parameters() if ".experts." in name]
    return [f"model.layers.{i}.{n}.weight" for i, layer in enumerate(layer_list(model)) for n, m in layer.named_modules() if isinstance(m, nn.Linear)]


def with_weights(base: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a base with its ternary weights changed, gate and up apart."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name in expected_names(base):
            weight = model.get_parameter(name)
            halves = weight.chunk(2, dim=-2) if "gate_up_proj" in name else [weight]
            weight.copy_(torch.cat([change(half) for half in halves], -2))
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


def aligned(model: Any) -> Any:
    """Parameters in memory of their own: kernels on CPU may round differently where a file's mapping begins at an odd place."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


# -- the forward pass -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("scale", ["row", "tensor", "expert", "group"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_student_is_the_base_with_dequantised_weights_and_its_gradient(
    family: str, scale: Any, dtype: torch.dtype, tolerance: float
) -> None:
    width = {"intermediate_size": 64, "hidden_size": 64} if family in DENSE else {"moe_intermediate_size": 32}
    base = base_of(family, dtype, **width, **({"head_dim": 16} if family == "qwen3" else {}))
    options: dict[str, Any] = {"scale": scale, "group": 32 if scale == "group" else None}
    ids = tokens(2, 11)
    twin = with_weights(base, lambda w: dequantised(ternary(w, method="absmean", **options)).to(dtype))
    student = student_of(base, **options)
    found, wanted = logits(student.model, ids), logits(twin, ids)
    assert apart(found, wanted) <= tolerance
    assert apart(found, logits(base, ids)) > 1e-2
    # The gradient passes through the rounding: it is that of the dequantised weights.
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    names = [name for name, _ in student.model.named_parameters()]
    assert names == [name for name, _ in twin.named_parameters()]
    ours = torch.autograd.grad((found * slope).sum(), list(student.model.parameters()))
    theirs = torch.autograd.grad((wanted * slope).sum(), list(twin.parameters()))
    worst = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in zip(ours, theirs, strict=True))
    assert worst <= 50 * tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_lambda_0_is_the_base_and_between_is_the_mixture(family: str) -> None:
    base, ids = base_of(family, torch.float64), tokens(2, 11)
    before = logits(base, ids).detach().clone()
    student = student_of(base, warmup=10, activations="token")
    student.at_step(0)
    assert torch.equal(logits(student.model, ids), before)
    plain = student_of(base_of(family, torch.float64), warmup=10)
    plain.at_step(3)
    twin = with_weights(base_of(family, torch.float64), lambda w: w + 0.3 * (dequantised(ternary(w, scale="row", group=None, method="absmean")) - w))
    assert apart(logits(plain.model, ids), logits(twin, ids)) <= 1e-12
    plain.at_step(10)
    assert torch.equal(logits(plain.model, ids), logits(student_of(base_of(family, torch.float64)).model, ids))


def test_activations_of_linears_are_rounded_before_the_product() -> None:
    base, ids = base_of("qwen3"), tokens(2, 11)
    student = student_of(base, activations="token")
    twin = with_weights(base, lambda w: dequantised(ternary(w, scale="row", group=None, method="absmean")))
    for name in expected_names(base):
        twin.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(lambda module, args: (round_token(args[0]),))
    assert apart(logits(student.model, ids), logits(twin, ids)) <= 1e-6
    assert apart(logits(student.model, ids), logits(student_of(base_of("qwen3")).model, ids)) > 1e-4


def test_activations_of_experts_are_rounded_once_a_token_and_before_each_product(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("qwen3_moe", num_hidden_layers=1)
    student = student_of(base, activations="token")
    seen: list[tuple[int, ...]] = []
    monkeypatch.setitem(
        __import__("limbeck.students.ternary.modules", fromlist=["x"])._ROUNDINGS, "token", lambda x, mix: seen.append(tuple(x.shape)) or round_token(x, mix)
    )
    products: list[Tensor] = []
    real = experts_module.grouped_product
    monkeypatch.setattr(experts_module, "grouped_product", lambda x, w, ends: products.append(x) or real(x, w, ends))
    logits(student.model, tokens(2, 9))
    # 18 tokens of width 32, and their 36 copies of width 16 between the two products.
    assert seen == [(18, 32), (36, 16)]
    assert all(torch.allclose(round_token(x), x, rtol=0, atol=1e-6) for x in products)


def test_experts_are_ternary_whatever_implementation_is_asked_for() -> None:
    student, ids = student_of(base_of("qwen3_moe")), tokens(2, 9)
    wanted = logits(student.model, ids)
    student.model.set_experts_implementation("eager")
    assert torch.equal(logits(student.model, ids), wanted)


def test_a_recomputed_layer_has_the_same_gradient() -> None:
    found = []
    for again in (False, True):
        student = student_of(base_of("qwen3_moe", torch.float64), method="elastic")
        if again:
            for layer in layer_list(student.model):
                recompute(layer)
        loss = logits(student.model.train(), tokens(2, 9)).square().mean()
        found.append(torch.autograd.grad(loss, list(student.model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_generating_with_a_cache_is_generating_without(family: str) -> None:
    model, ids = student_of(base_of(family, torch.float64)).model, tokens(2, 7)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


# -- saving and roles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"scale": "expert", "method": "elastic"}, {"warmup": 10}], ids=["row", "elastic", "warming"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_student_loads_with_the_same_logits(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    student, ids = student_of(base_of(family), **options), tokens(2, 11)
    student.at_step(4)
    student.save(tmp_path / "model")
    loaded = aligned(load_model(str(tmp_path / "model")))
    assert torch.equal(logits(loaded, ids), logits(student.model, ids))
    assert loaded.config.limbeck["lambda"] == (0.4 if "warmup" in options else 1.0)
    assert ternarize_options(loaded.config).plan == ("dense" if family in DENSE else "moe_experts")
    # What goes on from a student that is under way goes on from its lambda.
    again = Student(loaded)
    again.at_step(3)
    assert loaded.config.limbeck["lambda"] == pytest.approx(0.7 if "warmup" in options else 1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_are_those_of_the_plan(family: str) -> None:
    base = base_of(family)
    wanted = set(expected_names(base))
    roles = student_of(base, method="elastic", scale="tensor").roles
    assert {name for name, role in roles.items() if role == "ternary"} == wanted
    assert {name for name, role in roles.items() if role == "scales"} == {f"{name}_scale" for name in wanted}
    assert {name for name, role in roles.items() if role == "rest"} == {name for name, _ in base.named_parameters()} - wanted


def test_a_ternary_hybrid_has_ternary_mixers_and_keeps_their_gates() -> None:
    mixed = HybridizeOptions(mixer={"kind": "gated_deltanet"}, keep=(0, 2))
    student = student_of(base_of("qwen3"), mixed)
    ternary_names = {name for name, role in student.roles.items() if role == "ternary"}
    assert {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(4) for p in "qkvo"} <= ternary_names
    mixers = {name.rpartition("self_attn.")[2] for name, role in student.roles.items() if role == "mixers"}
    assert any(name.startswith("b_proj") for name in mixers) and not any(name.startswith("q_proj") for name in mixers)
    ids = tokens(2, 9)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    model = student.model
    assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))
    only = student_of(base_of("qwen3"), mixed, plan=[{"match": "*.layers.1.self_attn.g_proj.weight", "precision": "ternary"}])
    assert [name for name, role in only.roles.items() if role == "ternary"] == ["model.layers.1.self_attn.g_proj.weight"]


def test_the_first_rule_that_matches_decides() -> None:
    plan = [
        {"match": "*.layers.0.*", "precision": "bf16"},
        {"match": "*.mlp.*_proj.weight", "precision": "ternary"},
        {"match": "*.self_attn.*_proj.weight", "precision": "q8"},
    ]
    student = student_of(base_of("qwen3"), plan=plan)
    kept = ternarize_options(student.model.config).plan
    said = {name: precision_of(kept, name) for name, _ in student.model.named_parameters()}
    assert {name for name, role in student.roles.items() if role == "ternary"} == {name for name, p in said.items() if p == "ternary"}
    assert said["model.layers.0.mlp.up_proj.weight"] == "bf16" and said["model.layers.1.mlp.up_proj.weight"] == "ternary"
    assert said["model.layers.3.self_attn.q_proj.weight"] == "q8" and said["lm_head.weight"] == "keep"


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("method", ["absmean", "elastic"])
def test_dequantised_models_compute_the_same_and_are_never_rounded_again(family: str, method: Any, tmp_path: Path) -> None:
    student, ids = student_of(base_of(family), method=method, activations="token"), tokens(2, 11)
    wanted, codes = logits(student.model, ids), ternary_weights(student.model)
    dequantise(student.model)
    assert torch.equal(logits(student.model, ids), wanted)
    save_model(student.model, tmp_path / "model")
    loaded = aligned(load_model(str(tmp_path / "model")))
    assert torch.equal(logits(loaded, ids), wanted)
    for name, again in ternary_weights(loaded).items():
        # A file holds the same values, whether codes are found while training or in dequantised weights.
        assert torch.equal(again.codes, codes[name].codes)
        used = codes[name].codes.any(-1, keepdim=True)
        assert torch.equal(again.scales[used], codes[name].scales[used])
    # Where the mark travels with a plain model of the family, it is refused as a base.
    base = base_of(family)
    setattr(base.config, DONE, True)
    with pytest.raises(ModelError, match="codes times scales already"):
        student_of(base)


def test_export_is_refused_while_lambda_is_below_1_and_for_other_students() -> None:
    student = student_of(base_of("qwen3"), warmup=4)
    student.at_step(3)
    with pytest.raises(ModelError, match=r"lambda of this ternary student is 0\.75: its warm-up of 4 steps"):
        check_exportable(student.model.config)
    with pytest.raises(ModelError, match=r"0\.75"):
        dequantise(student.model)
    student.at_step(4)
    assert check_exportable(student.model.config).warmup == 4
    with pytest.raises(ModelError, match="not trained ternary"):
        check_exportable(base_of("qwen3").config)


# -- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "sentence"),
    [
        ("qwen3", {"plan": "moe_experts"}, r"plan 'moe_experts' makes no weight of LimbeckQwen3ForCausalLM ternary.*use `plan: dense`"),
        ("qwen3", {"plan": [{"match": "*.mlp.up_prj.weight", "precision": "ternary"}]}, r"'\*.mlp.up_prj.weight' matches no parameter; nearest: .*up_proj"),
        ("qwen3", {"plan": [{"match": "*.mlp.*", "precision": "q8"}]}, r"the plan makes no weight.*use `plan: dense`"),
        ("qwen3", {"plan": [{"match": "*.layers.*", "precision": "ternary"}]}, r"q_norm.weight ternary, and Qwen3RMSNorm is neither"),
        ("qwen3", {"plan": [{"match": "lm_head.weight", "precision": "ternary"}]}, "only weights of decoder layers can be"),
        ("qwen2", {"plan": [{"match": "*.q_proj.bias", "precision": "ternary"}]}, "a bias cannot be"),
        ("qwen3_moe", {"plan": [{"match": "*.mlp.gate.weight", "precision": "ternary"}]}, "Qwen3MoeTopKRouter is neither"),
        ("qwen3", {"scale": "group", "group": 48}, r"q_proj.weight has 32 inputs, no multiple of `group: 48`"),
        ("qwen3", {"export": "tq2_0"}, "has 32 inputs, which tq2_0 cannot hold .* export to a type that is not ternary"),
    ],
)
def test_what_cannot_be_ternary_is_refused_with_a_way_out(family: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        student_of(base_of(family), **options)


def test_a_second_ternary_surgery_is_refused() -> None:
    with pytest.raises(ModelError, match="ternary already"):
        student_of(base_of("qwen3"), TernarizeOptions())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scale": "group"}, "give both or neither"),
        ({"group": 128}, "give both or neither"),
        ({"scale": "group", "group": 128, "export": "tq2_0"}, "groups of 128 would be stored wrong: use q2_0"),
        ({"scale": "group", "group": 96, "export": "q2_0"}, "use another group, or scale: row"),
    ],
)
def test_scales_that_a_file_cannot_hold_are_errors_of_the_recipe(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        TernarizeOptions(**options)


def test_file_types_hold_whole_blocks_of_rows_and_groups() -> None:
    assert types_for(2048, None) == ["tq1_0", "tq2_0", "q2_0"] == types_for(2048, 512)
    assert types_for(896, None) == ["q2_0"] == types_for(2048, 128) == types_for(2048, 64)
    assert types_for(48, None) == [] == types_for(2048, 32)
    wide = student_of(base_of("qwen3", hidden_size=64, intermediate_size=128, head_dim=16), export="q2_0")
    assert wide.notes == []
    assert "28 ternary weights fit no ternary GGUF type" in student_of(base_of("qwen3")).notes[0]


# -- training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama3", "qwen3_moe"])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(family: str) -> None:
    student = student_of(base_of(family, torch.float64), method="elastic", activations="token")
    step, batch = TrainStep(student, [DenseCE()]), packed_batch([[5, 7], [3, 9], [12], [4, 8]])
    found = []
    for rows in (4, 1):
        student.zero_grad()
        for part in batch.split(rows):
            step.run(part, {}, [1 / int(batch.label_mask_BT.sum())])
        found.append([p.grad.clone() for p in student.parameters()])
    assert max(apart(a, b) for a, b in zip(*found, strict=True)) <= 1e-12


def trained(folder: Path, family: str, *, steps: int = 12, stop: int | None = None, **options: Any) -> Student:
    """Train for ``steps``, or to step ``stop`` of them, and go on from a checkpoint that is there."""
    student = student_of(base_of(family), **options)
    step = TrainStep(student, [DenseCE()])
    trainer = make_trainer(folder, step, steps=steps, lr=3e-3, log_every=4, checkpoint_every=6)
    if stop is not None:
        real = step.run

        def run(*args: Any) -> Any:
            if trainer.at.step == stop:
                raise KeyboardInterrupt
            return real(*args)

        step.run = run
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
        return student
    trainer.run()
    return student


@pytest.mark.parametrize("options", [{}, {"method": "elastic"}, {"warmup": 8, "activations": "token"}], ids=["absmean", "elastic", "warming"])
@pytest.mark.parametrize("family", ["llama3", "qwen3_moe"])
def test_training_lowers_the_loss_and_changes_codes(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    before = ternary_weights(student_of(base_of(family), **options).model)
    student = trained(tmp_path, family, steps=40, **options)
    losses = loss_trace(tmp_path / "metrics.jsonl")
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.2
    flips = [(t.codes != before[name].codes).float().mean() for name, t in ternary_weights(student.model).items()]
    assert all(share > 0.01 for share in flips)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert all(0.2 < row["ternary/zeros"] < 0.6 and 0 <= row["ternary/flips"] < 0.5 for row in rows)
    assert rows[3]["ternary/flips"] > 0 and rows[3]["ternary/scale_drift"] > 0
    assert [row["ternary/lambda"] for row in rows[:3]] == ([0.0, 0.375, 0.625] if "warmup" in options else [1.0, 1.0, 1.0])


def test_a_resumed_run_goes_on_with_the_lambda_of_its_step(tmp_path: Path) -> None:
    options: dict[str, Any] = {"warmup": 9, "method": "elastic"}
    whole = trained(tmp_path / "whole", "qwen3_moe", **options)
    trained(tmp_path / "cut", "qwen3_moe", stop=8, **options)
    resumed = trained(tmp_path / "cut", "qwen3_moe", **options)
    assert loss_trace(tmp_path / "cut" / "metrics.jsonl") == loss_trace(tmp_path / "whole" / "metrics.jsonl")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def _two_ranks(rank: int, mesh: DeviceMesh) -> None:
    """Losses, gradients and what is measured of the codes are those of one process."""
    import tempfile

    import torch.distributed as dist

    for family, options in (("qwen3_moe", {"scale": "expert", "method": "elastic"}), ("llama3", {"scale": "tensor"})):
        # fp64, or a code at a boundary would go to the other side in the last digit of a sum over ranks.
        runs = {}
        for size in (1, 2):
            student = student_of(base_of(family, torch.float64), warmup=3, **options)
            world = World(torch.device("cpu"), rank, 2, mesh, dist.new_group(backend="gloo")) if size == 2 else World(torch.device("cpu"))
            place = [tempfile.mkdtemp()]
            if size == 2:
                dist.broadcast_object_list(place, 0)
            trainer = make_trainer(
                Path(place[0]), TrainStep(student, [DenseCE()]), rows=Rows(16), rows_per_step=5, world=world, steps=4, lr=1e-3, precision="float64", log_every=1
            )
            trainer.run()
            dist.barrier()
            runs[size] = read_metrics(Path(place[0]) / "metrics.jsonl")
        for one, two in zip(runs[1], runs[2], strict=True):
            for key in ("loss", "grad_norm", "ternary/zeros", "ternary/flips", "ternary/scale_drift", "ternary/lambda"):
                assert abs(one[key] - two[key]) <= 1e-10 * max(1, abs(one[key])), (family, key, one[key], two[key])


def _gathered(rank: int, mesh: DeviceMesh) -> None:
    """Sharded training in bfloat16 computes with the codes of the full-precision weights."""
    import torch.distributed as dist

    from limbeck.engine.parallel import parallelize
    from limbeck.engine.precision import autocast, sharded_policy

    student = student_of(base_of("qwen3_moe"), plan=[{"match": "*.experts.*", "precision": "ternary"}, {"match": "*", "precision": "keep"}])
    wanted = ternary_weights(student.model)
    step = TrainStep(student, [DenseCE()])
    world = World(torch.device("cpu"), rank, 2, mesh, dist.new_group(backend="gloo"))
    parallelize(step, world, sharded_policy("bfloat16"))
    seen: dict[str, Tensor] = {}
    for path, module in student.model.named_modules():
        if hasattr(module, "quantised"):

            def watching(name: str, *, real: Any = module.quantised, path: str = path, module: Any = module) -> Tensor:
                seen[f"{path}.{name}"] = module.codes(name).codes
                return real(name)

            module.quantised = watching
    with autocast(world.device, "bfloat16"):
        step.run(packed_batch([[5, 7], [3, 9]]), {}, [1.0])
    assert seen.keys() == wanted.keys()
    assert all(torch.equal(seen[name], wanted[name].codes) for name in wanted)


def _checks(rank: int, mesh: DeviceMesh) -> None:
    _gathered(rank, mesh)
    _two_ranks(rank, mesh)


def test_two_ranks_train_and_measure_as_one(tmp_path: Path) -> None:
    on_two_ranks(_checks, tmp_path)


def test_what_writes_text_is_quantised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    student, ids = student_of(base_of("qwen3_moe")), tokens(2, 11)
    wanted = logits(student.model, ids)
    ready = settled(student.model)
    with monkeypatch.context() as patched:
        patched.setattr(modules, "fake_quant", None)
        assert torch.equal(logits(ready, ids), wanted)
    # Half way to ternary weights they are still both, and a plain model has none.
    half = student_of(base_of("qwen3_moe"), warmup=10).model
    before = {name: p.detach().clone() for name, p in half.named_parameters()}
    settled(half)
    assert all(torch.equal(p, before[name]) for name, p in half.named_parameters())
    assert settled(plain := base_of("qwen3")) is plain
