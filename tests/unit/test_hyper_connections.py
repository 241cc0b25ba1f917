"""Several residual streams: the base at the start, more than it after a step, and a model like any other on the way."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from adapter_bases import QWEN3_NEXT
from engine_parts import DenseCE, Rows, make_trainer
from families import VOCABULARY, packed_batch, stir, tiny_model, tokens
from limbeck.config.load import load_text
from limbeck.config.parts.stages import GroupOptions, OptimOptions
from limbeck.config.parts.surgeries import HybridizeOptions, HyperConnectionsOptions, TernarizeOptions
from limbeck.engine.metrics import read_metrics
from limbeck.engine.optim import build_optimizer
from limbeck.engine.parallel import World
from limbeck.engine.recompute import recompute
from limbeck.engine.step import TrainStep
from limbeck.errors import LimbeckError, ModelError, RecipeError
from limbeck.export.gguf.origin import opened
from limbeck.export.native import check_native
from limbeck.models.hidden import hidden_states
from limbeck.models.limbeck_model import wrap_student
from limbeck.models.loading import build_model, load_model
from limbeck.models.observe import forward_observed
from limbeck.models.packed import forward_packed
from limbeck.models.structure import layer_list
from limbeck.needs import RouterLogits
from limbeck.students import hyper_connections
from limbeck.students.hyper_connections import Connection, StreamLayer, reading_norms
from limbeck.students.selection import parameter_groups, select_trainable
from limbeck.students.student import Student
from moe_cases import QWEN3_MOE, ternary_weights
from ranks import on_two_ranks

BASE: dict[str, Any] = {"source": "tiny", "fingerprint": {}}
QWEN3_5: dict[str, Any] = {
    **{name: value for name, value in QWEN3_NEXT.items() if "expert" not in name and not name.startswith("moe")}, "model_type": "qwen3_5_text",
}  # fmt: skip
BUILT = {"qwen3_moe": QWEN3_MOE, "qwen3_next": QWEN3_NEXT, "qwen3_5": QWEN3_5}
DENSE = ("llama3", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3")
KINDS: dict[str, dict[str, Any]] = {
    "mhc": {}, "mhc-2": {"streams": 2}, "lite": {"mixing": "permutation"}, "lite-2": {"streams": 2, "mixing": "permutation"},
    "static": {"dynamic": False},
}  # fmt: skip
"""What a recipe says of the surgery."""


def base_of(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    if family not in BUILT:
        return tiny_model(family, dtype=dtype, **changes)
    model = build_model({**BUILT[family], **changes}, dtype=dtype)
    stir(model)
    return model


def student_of(base: Any, *before: Any, after: tuple[Any, ...] = (), **options: Any) -> Student:
    torch.manual_seed(7)
    return Student(wrap_student(base, [*before, HyperConnectionsOptions(**options), *after], BASE))


def connections(model: Any) -> dict[str, Connection]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Connection)}


@torch.no_grad()
def stirred(student: Student) -> Student:
    """As after a long training: nothing is where it began."""
    generator = torch.Generator().manual_seed(11)
    for module in connections(student.model).values():
        for parameter in module.parameters():
            parameter.add_(0.7 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return student


def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


def entering(model: Any, ids: Tensor) -> list[Tensor]:
    """What each layer after the first is given."""
    found: list[Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda module, args: found.append(args[0])) for layer in layer_list(model)[1:]]
    with torch.no_grad():
        logits(model, ids)
    for handle in handles:
        handle.remove()
    return found


# -- at the start ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [*DENSE, *BUILT])
def test_a_new_student_is_its_base(family: str, kind: str, dtype: torch.dtype, tolerance: float) -> None:
    base, ids = base_of(family, dtype), tokens(2, 11)
    model = student_of(base, **KINDS[kind]).model
    assert all(isinstance(layer, StreamLayer) for layer in layer_list(model)) and len(connections(model)) == 2 * len(layer_list(model))
    if family == "qwen3_next" and dtype == torch.float32:
        tolerance = 5e-5  # Noise of half a last digit in the embeddings alone moves this base by 1.5e-5.
    assert apart(logits(model, ids), logits(base, ids)) <= tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_sublayers_read_from_other_streams_in_turn_and_write_to_all(kind: str) -> None:
    model = student_of(base_of("qwen3", torch.float64), **KINDS[kind]).model
    streams = KINDS[kind].get("streams", 4)
    x = torch.randn(1, 3, streams, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for place, module in enumerate(connections(model).values()):
        pre, post, res = module(x)
        assert (pre.sum(-1) - 1).abs().max() <= 1e-12 and torch.equal(post, torch.ones_like(post))
        assert bool((pre.argmax(-1) == place % streams).all()) and bool((pre.amax(-1) > 2 * pre.amin(-1)).all())
        # Nearly the identity, and the same in both forms.
        assert bool((res.diagonal(dim1=-2, dim2=-1) > 0.98).all())
        assert (res.sum(-1) - 1).abs().max() <= 1e-12 and (res.sum(-2) - 1).abs().max() <= 1e-12
        if module.dynamic:
            assert torch.equal(module.alpha, torch.zeros_like(module.alpha)) and module.weight.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_streams_are_one_until_a_step_tells_them_apart_and_then_everything_learns(kind: str) -> None:
    student, ids = student_of(base_of("qwen3", torch.float64), **KINDS[kind]), tokens(2, 9)
    step, batch = TrainStep(student, [DenseCE()]), packed_batch([[5, 7], [3, 9]])
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-2)
    for number in range(3):
        optimizer.zero_grad()
        step.run(batch, {}, [1 / int(batch.label_mask_BT.sum())])
        inner = entering(student.model, ids)
        spread = [float((x - x.mean(-2, keepdim=True)).abs().max() / x.abs().max()) for x in inner]
        if number == 0:
            assert max(spread) <= 1e-14
        else:
            assert min(spread) > 1e-7, spread
        optimizer.step()
    silent = [name for name, p in student.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert silent == []
    lost = [name for name, module in connections(student.model).items() if any(p.grad.abs().max() < 1e-12 for p in module.parameters())]
    assert lost == []


# -- the forward pass -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_layers_compute_what_the_papers_say_with_the_familys_own_sublayers(family: str) -> None:
    """Layer by layer from the modules alone: reading, norm, sublayer, writing."""
    base = base_of(family, torch.float64, num_hidden_layers=2)
    model, ids = stirred(student_of(base)).model, tokens(2, 9)
    seen: list[dict[str, Any]] = []
    handles = [
        layer.self_attn.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
        for layer in layer_list(model)
    ]
    with torch.no_grad():
        wanted = model.model(input_ids=ids, use_cache=False).last_hidden_state
        for handle in handles:
            handle.remove()
        x = base.model.embed_tokens(ids)[:, :, None].expand(-1, -1, 4, -1)
        for layer, kwargs in zip(layer_list(model), list(seen), strict=True):
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            for name in reading_norms(layer, 0):
                norm = getattr(layer, name)
                pre, post, res = norm.connection(x)
                inner = norm(torch.einsum("bts,btsd->btd", pre, x))
                if name == "input_layernorm":
                    y = layer.self_attn(hidden_states=inner, **rest)[0]
                    y = layer.post_attention_layernorm(y) if family == "gemma3" else y
                else:
                    y = layer.mlp(inner)
                    y = layer.post_feedforward_layernorm(y) if family == "gemma3" else y
                x = torch.einsum("btij,btjd->btid", res, x) + torch.einsum("bts,btd->btsd", post, y)
        found = model.model.norm(x.mean(2))
    assert apart(found, wanted) <= 1e-6, "the families' norms round to fp32"


@pytest.mark.parametrize("surgery", [(), (HybridizeOptions(keep=(0, 2)),)], ids=["softmax", "hybrid"])
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_generating_with_a_cache_is_generating_without(family: str, surgery: tuple[Any, ...]) -> None:
    """One row left-padded, greedy."""
    model, ids = stirred(student_of(base_of(family, torch.float64), *surgery)).model, tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_next"])
def test_packed_documents_do_not_see_each_other(family: str) -> None:
    model = stirred(student_of(base_of(family, torch.float64))).model
    batch = packed_batch([[5, 7], [3, 9]], padding=2)
    with torch.no_grad():
        together = forward_packed(model, batch)
        for row, start, end in ((0, 0, 5), (0, 5, 12), (1, 0, 3), (1, 3, 12)):
            alone = model.model(input_ids=batch.input_ids_BT[row : row + 1, start:end], use_cache=False).last_hidden_state
            assert apart(together[row : row + 1, start:end], alone) <= 1e-6


def test_the_residual_stream_is_not_rounded_by_autocast_and_keeps_the_models_dtype() -> None:
    student, ids = stirred(student_of(base_of("qwen3"))), tokens(1, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert {x.dtype for x in entering(student.model, ids)} == {torch.float32}
    half = stirred(student_of(base_of("qwen3", torch.bfloat16)))
    assert {x.dtype for x in entering(half.model, ids)} == {torch.bfloat16}
    assert half.model.model(input_ids=ids, use_cache=False).last_hidden_state.dtype == torch.bfloat16


def test_recomputed_and_compiled_layers_have_the_same_gradient() -> None:
    """Compiled in one graph each: the object that carries the streams through a layer is traced away."""
    found = []
    for way in ("plain", "recomputed", "compiled"):
        model = stirred(student_of(base_of("qwen3", torch.float64, num_hidden_layers=3))).model.train()
        for layer in layer_list(model):
            if way == "recomputed":
                recompute(layer)
            elif way == "compiled":
                layer.compile(backend="eager", fullgraph=True)
        loss = logits(model, tokens(2, 9)).square().mean()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert max(apart(a, b) for a, b in zip(found[2], found[0], strict=True)) <= 1e-12


def test_a_recomputed_layer_of_experts_has_the_same_gradient() -> None:
    found = []
    for again in (False, True):
        model = stirred(student_of(base_of("qwen3_moe", torch.float64))).model.train()
        if again:
            for layer in layer_list(model):
                recompute(layer)
        found.append(torch.autograd.grad(logits(model, tokens(2, 9)).square().mean(), list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_inner_states_are_means_of_streams_and_transformers_own_are_refused() -> None:
    base, ids = base_of("qwen3"), tokens(2, 9)
    model = student_of(base).model
    for found, wanted in zip(hidden_states(model, ids, [0, 2, -1]), hidden_states(base, ids, [0, 2, -1]), strict=True):
        assert found.shape == (2, 9, 32) and apart(found, wanted) <= 1e-5
    x = entering(stirred(student_of(base_of("qwen3"))).model, ids)[1]
    (second,) = hidden_states(stirred(student_of(base_of("qwen3"))).model, ids, [1])
    assert x.shape == (2, 9, 4, 32) and apart(second, x.mean(2)) <= 1e-6
    with pytest.raises(ModelError, match=r"output_hidden_states.*hidden_states gives their mean"):
        model(input_ids=ids, output_hidden_states=True)


def test_routers_are_seen_as_before() -> None:
    base, batch = base_of("qwen3_moe"), packed_batch([[5, 7], [3, 9]])
    student = student_of(base)
    _, found = forward_observed(student.model, batch, {RouterLogits: RouterLogits()})
    _, wanted = forward_observed(base, batch, {RouterLogits: RouterLogits()})
    assert found[RouterLogits].keys() == wanted[RouterLogits].keys() == {0, 2}
    for layer, routing in found[RouterLogits].items():
        torch.testing.assert_close(routing.logits_BTE, wanted[RouterLogits][layer].logits_BTE, rtol=1e-4, atol=1e-5)


# -- saving, roles, training ----------------------------------------------------------------------------------------------


def reloaded(student: Student, folder: Path) -> Any:
    student.save(folder)
    loaded = load_model(str(folder))
    for parameter in loaded.parameters():
        # Kernels may round differently where a file's mapping begins at an odd place.
        parameter.data = parameter.data.clone()
    return loaded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama3", "gemma3", *BUILT])
def test_a_saved_student_loads_with_the_same_logits(family: str, kind: str, tmp_path: Path) -> None:
    student, ids = stirred(student_of(base_of(family), **KINDS[kind])), tokens(2, 11)
    loaded = reloaded(student, tmp_path / "model")
    assert torch.equal(logits(loaded, ids), logits(student.model, ids))
    assert apart(logits(loaded, ids), logits(base_of(family), ids)) > 1e-3


def test_every_parameter_is_in_one_group_and_connections_in_their_own() -> None:
    student = student_of(base_of("qwen3_moe"), HybridizeOptions(keep=(0, 2)), after=(TernarizeOptions(method="elastic", sub_norm=True),))
    select_trainable(student, ["all"])
    options = [
        GroupOptions(role="ternary", kind="muon", lr=0.02),
        GroupOptions(role="mhc", kind="lion", lr=1e-4),
        GroupOptions(kind="lion", lr=1e-4),
    ]
    groups = parameter_groups(student, options)
    claimed = [name for _, members in groups for name, _ in members]
    assert sorted(claimed) == sorted(name for name, _ in student.model.named_parameters())
    assert {name for name, _ in groups[1][1]} == {f"{path}.{name}" for path in connections(student.model) for name in ("alpha", "bias", "weight")}
    assert set(student.roles.values()) == {"ternary", "scales", "mixers", "mhc", "rest"}
    build_optimizer(groups, OptimOptions(groups=options))


def test_connections_are_never_made_ternary() -> None:
    student = student_of(base_of("qwen3"), after=(TernarizeOptions(plan="dense"),))
    assert not any("connection" in name for name in ternary_weights(student.model))
    greedy = [{"match": "*.layers.*.input_layernorm.*.weight", "precision": "ternary"}]
    with pytest.raises(ModelError, match=r"input_layernorm\.connection\.weight ternary, and Connection is neither a Linear nor"):
        student_of(base_of("qwen3"), after=(TernarizeOptions(plan=greedy),))


@pytest.mark.parametrize("kind", ["mhc", "lite"])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(kind: str) -> None:
    student = stirred(student_of(base_of("qwen3", torch.float64), **KINDS[kind]))
    step, batch = TrainStep(student, [DenseCE()]), packed_batch([[5, 7], [3, 9], [12], [4, 8]])
    found = []
    for rows in (4, 1):
        student.zero_grad()
        for part in batch.split(rows):
            step.run(part, {}, [1 / int(batch.label_mask_BT.sum())])
        found.append([p.grad.clone() for p in student.parameters()])
    assert max(apart(a, b) for a, b in zip(*found, strict=True)) <= 1e-12


HYBRID, TERNARY, STREAMS = HybridizeOptions(keep=(0, 2)), TernarizeOptions(sub_norm=True), HyperConnectionsOptions()
ORDERS = {"last ternary": (HYBRID, STREAMS, TERNARY), "last streams": (HYBRID, TERNARY, STREAMS), "first streams": (STREAMS, HYBRID, TERNARY)}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_it_goes_with_mixers_and_ternary_weights_in_any_order(family: str, order: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    student, ids = Student(wrap_student(base_of(family), ORDERS[order], BASE)), tokens(2, 11)
    torch.manual_seed(7)
    twin = wrap_student(base_of(family), [HYBRID, TERNARY], BASE)
    assert apart(logits(student.model, ids), logits(twin, ids)) <= 2e-5
    before = ternary_weights(student.model)
    assert before.keys() == ternary_weights(twin).keys()
    make_trainer(tmp_path / "run", TrainStep(student, [DenseCE()]), steps=4, lr=3e-3, log_every=4).run()
    assert any(bool((t.codes != before[name].codes).any()) for name, t in ternary_weights(student.model).items())
    assert all(module.alpha.abs().min() > 0 for module in connections(student.model).values())
    inner = entering(student.model, ids)
    assert all((x - x.mean(-2, keepdim=True)).abs().max() > 1e-4 for x in inner)
    loaded = reloaded(student, tmp_path / "model")
    assert torch.equal(logits(loaded, ids), logits(student.model, ids))


def _two_ranks(rank: int, mesh: DeviceMesh) -> None:
    """Losses and gradient norms are those of one process, and bfloat16 gathers no rounded connections."""
    import torch.distributed as dist

    runs = {}
    for size in (1, 2):
        student = student_of(base_of("qwen3_moe", torch.float64), after=(TernarizeOptions(sub_norm=True),))
        world = World(torch.device("cpu"), rank, 2, mesh, dist.new_group(backend="gloo")) if size == 2 else World(torch.device("cpu"))
        place = [tempfile.mkdtemp()]
        if size == 2:
            dist.broadcast_object_list(place, 0)
        step = TrainStep(student, [DenseCE()])
        make_trainer(Path(place[0]), step, rows=Rows(16), rows_per_step=5, world=world, steps=3, lr=1e-3, precision="float64", log_every=1).run()
        dist.barrier()
        runs[size] = read_metrics(Path(place[0]) / "metrics.jsonl")
    assert len(runs[1]) == len(runs[2]) == 3
    for one, two in zip(runs[1], runs[2], strict=True):
        for key in ("loss", "grad_norm"):
            assert abs(one[key] - two[key]) <= 1e-8 * abs(one[key]), (key, one[key], two[key])
    _gathered(rank, mesh)


def _gathered(rank: int, mesh: DeviceMesh) -> None:
    import torch.distributed as dist

    from limbeck.engine.parallel import parallelize
    from limbeck.engine.precision import autocast, sharded_policy

    step = TrainStep(stirred(student_of(base_of("qwen3"))), [DenseCE()])
    world = World(torch.device("cpu"), rank, 2, mesh, dist.new_group(backend="gloo"))
    parallelize(step, world, sharded_policy("bfloat16"))
    kinds = set()
    for module in connections(step.student).values():
        module.register_forward_hook(lambda module, args, output: kinds.update({module.bias.dtype, *(part.dtype for part in output)}))
    with autocast(world.device, "bfloat16"):
        step.run(packed_batch([[5, 7], [3, 9]]), {}, [1.0])
    assert kinds == {torch.float32}


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    on_two_ranks(_two_ranks, tmp_path)


# -- what is refused ------------------------------------------------------------------------------------------------------

COHERE: dict[str, Any] = {
    "model_type": "cohere", "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def test_families_without_a_norm_in_front_of_each_sublayer_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"layer 0: Olmo2DecoderLayer has the norms post_attention_layernorm, post_feedforward_layernorm, and .*take the"):
        student_of(base_of("olmo2"))
    with pytest.raises(ModelError, match=r"CohereDecoderLayer has the norms input_layernorm, and"):
        student_of(build_model(COHERE))


def scaled(self: Any, hidden_states: Any, **kwargs: Any) -> Any:
    return hidden_states * 0.5 + self.mlp(self.input_layernorm(hidden_states))


def parallel(self: Any, hidden_states: Any, **kwargs: Any) -> Any:
    return hidden_states + self.mlp(self.input_layernorm(hidden_states)) + self.mlp(self.post_attention_layernorm(hidden_states))


def post_norm(self: Any, hidden_states: Any, **kwargs: Any) -> Any:
    inner = self.input_layernorm(hidden_states)
    return inner + self.mlp(self.post_attention_layernorm(inner))


def single(self: Any, hidden_states: Any, **kwargs: Any) -> Any:
    return hidden_states + self.mlp(self.input_layernorm(hidden_states))


@pytest.mark.parametrize(
    ("forward", "sentence"),
    [
        (single, "StreamQwen3DecoderLayer is no layer of two sublayers"),
        (scaled, r"LimbeckQwen3ForCausalLM do something else to their residual stream than norm it and add to it \(unsupported operand"),
        (parallel, "two norms read the residual stream before anything is added"),
        (post_norm, "StreamQwen3DecoderLayer is no layer of two sublayers"),
    ],
)
def test_layers_that_treat_their_residual_stream_otherwise_are_refused(forward: Any, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("qwen3")
    monkeypatch.setattr(type(layer_list(base)[0]), "forward", forward)
    with pytest.raises(ModelError, match=sentence):
        student_of(base)


def test_a_student_that_does_not_start_as_its_base_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = hyper_connections.sinkhorn
    monkeypatch.setattr(hyper_connections, "sinkhorn", lambda logits, iterations: 0.9 * real(logits, iterations))
    with pytest.raises(ModelError, match="with several streams it is not the model that it is with one"):
        student_of(base_of("qwen3"))


def test_a_second_surgery_of_streams_is_refused() -> None:
    with pytest.raises(ModelError, match="several residual streams already"):
        student_of(base_of("qwen3"), HyperConnectionsOptions())


def test_iterations_without_sinkhorn_are_an_error_of_the_recipe() -> None:
    with pytest.raises(ValidationError, match="`iterations` are of `mixing: sinkhorn`, and this is permutation"):
        HyperConnectionsOptions(mixing="permutation", iterations=5)


@pytest.mark.parametrize("after", [(), (TernarizeOptions(),)], ids=["streams", "ternary"])
def test_files_of_one_residual_stream_are_refused_before_anything_is_written(after: tuple[Any, ...], tmp_path: Path) -> None:
    student = student_of(base_of("qwen3"), after=after)
    with pytest.raises(LimbeckError, match=r"export --to native: the student has 4 residual streams.*`--to hf` writes any student"):
        check_native(student.model)
    student.save(tmp_path / "model")
    with pytest.raises(LimbeckError, match=r"export --to gguf: the student has 4 residual streams"):
        opened(tmp_path / "model")


@pytest.mark.parametrize(
    ("surgery", "sentence"),
    [("{kind: hyper_connections, streams: 2}", "has 2 residual streams"), ("{kind: ternarize, sub_norm: true}", "has `sub_norm`")],
)
def test_a_recipe_that_ends_in_such_a_file_is_refused_when_it_is_read(surgery: str, sentence: str) -> None:
    recipe = f"""
name: refused
stages:
  train:
    data: {{source: {{kind: stdlib}}, tokenizer: builtin:model, sequence: 64}}
    student: {{base: builtin:model, surgery: [{surgery}], train: all}}
    objectives: [{{kind: ce}}]
    optim: {{groups: [{{lr: 1e-3}}]}}
    loop: {{steps: 2, batch_tokens: 256}}
  out: {{kind: export, from: train, to: [FORM]}}
"""
    load_text(recipe.replace("FORM", "hf"))
    with pytest.raises(RecipeError, match=rf"stages.out.to: gguf: the student .*{sentence}"):
        load_text(recipe.replace("FORM", "gguf"))
    with pytest.raises(RecipeError, match="leaves another architecture"):
        load_text(recipe.replace("FORM", "native"))
