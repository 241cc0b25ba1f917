"""Injected LoRAs against PEFT called one adapter at a time, through activation checkpointing, and without a trace afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from adapter_bases import qwen3_next
from families import VOCABULARY, packed_batch, tiny_model, tokens
from limbeck.adapters.functional import FunctionalLoRA
from limbeck.adapters.inject import Injector, checkpoint_context, low_rank
from limbeck.adapters.spec import Adapters, AdapterSpec
from limbeck.adapters.targets import resolve_spec
from limbeck.engine.recompute import recompute
from limbeck.errors import AdapterError
from limbeck.models.packed import FLAG, forward_packed, leak_probe, rows_seen
from limbeck.models.structure import layer_list

COUNT, ROWS, LENGTH = 3, 2, 9


def model_of(family: str) -> Any:
    return qwen3_next() if family == "qwen3_next" else tiny_model(family, dtype=torch.float64)


def random_adapters(spec: AdapterSpec, count: int = COUNT, seed: int = 0, dtype: torch.dtype = torch.float64) -> Adapters:
    """Leaves that want gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    A = {s.name: draw(count, len(s.layers), spec.rank, s.in_features) for s in spec.sites}
    return Adapters(spec, A, {s.name: draw(count, len(s.layers), s.out_features, spec.rank) for s in spec.sites})


def reference(family: str, spec: AdapterSpec) -> FunctionalLoRA:
    """The same model, wrapped by PEFT with LoRAs on the same Linears."""
    model = model_of(family)
    # In a family of fused experts peft takes every gate_proj, up_proj and down_proj, the shared expert's too, to mean the routed ones.
    model.config.model_type = "unknown"
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, use_rslora=spec.rslora, target_modules=spec.paths)
    return FunctionalLoRA(get_peft_model(model, config).eval())


def gradients(loss: Tensor, adapters: Adapters) -> list[Tensor]:
    return list(torch.autograd.grad(loss, adapters.tensors()))


def furthest(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(found, wanted, strict=True))


# -- against the reference -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "rslora"])
@pytest.mark.parametrize("family", ["qwen2", "llama3", "qwen3", "gemma2", "olmo2", "qwen3_next"])
def test_one_batched_forward_is_peft_called_adapter_by_adapter(family: str, rslora: bool) -> None:
    model = model_of(family)
    spec = resolve_spec(model, "all", rank=3, alpha=5, rslora=rslora)
    adapters = random_adapters(spec)
    peft = reference(family, spec)
    ids = tokens(COUNT * ROWS, LENGTH)
    weights = torch.randn(COUNT * ROWS, LENGTH, VOCABULARY, dtype=torch.float64) / VOCABULARY
    with Injector(model, spec).active(adapters):
        ours = model(input_ids=ids, use_cache=False).logits
    parts = [peft(adapters, n, input_ids=ids[n * ROWS : (n + 1) * ROWS], use_cache=False).logits for n in range(COUNT)]
    theirs = torch.cat(parts)
    assert furthest([ours], [theirs]) <= 1e-10
    assert (parts[0] - model(input_ids=ids[:ROWS], use_cache=False).logits).abs().max() > 1e-2, "the LoRA must matter"
    found, wanted = gradients((ours * weights).sum(), adapters), gradients((theirs * weights).sum(), adapters)
    assert all(bool((g.flatten(1).abs().amax(1) > 0).all()) for g in wanted), "every adapter must have a gradient everywhere"
    assert furthest(found, wanted) <= 1e-10


def test_the_reference_refuses_other_tensors_than_the_models() -> None:
    model = model_of("qwen3")
    peft = reference("qwen3", resolve_spec(model, "attention", rank=2, alpha=4))
    for targets in ("all", ["q_proj"]):
        with pytest.raises(AdapterError, match="in only one of"):
            peft.apply_lora_weights(random_adapters(resolve_spec(model, targets, rank=2, alpha=4)))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_next"])
def test_every_document_of_a_packed_row_gets_the_rows_adapter(family: str) -> None:
    model = model_of(family)
    leak_probe(model)
    assert getattr(model, FLAG) is (family == "qwen3")
    spec = resolve_spec(model, "all", rank=2, alpha=4)
    adapters = random_adapters(spec)
    # Not as many documents in every row: equal shares of the documents would be other rows'.
    batch = packed_batch([[4, 6, 3], [8, 5], [2, 2, 2, 7]], padding=2)
    injector = Injector(model, spec)
    rows = rows_seen(model, batch)
    with torch.no_grad():
        with injector.active(adapters if rows is None else adapters.pick(rows)):
            found = forward_packed(model, batch)
        for row in range(COUNT):
            for document in batch.documents_BT[row].unique()[1:]:
                here = batch.documents_BT[row] == document
                with injector.active(adapters.pick([row])):
                    alone = model.model(input_ids=batch.input_ids_BT[row, here][None], use_cache=False).last_hidden_state[0]
                torch.testing.assert_close(found[row, here], alone, rtol=0, atol=2e-5 if family == "qwen3_next" else 1e-10)


def test_low_rank_counts_rows_of_any_shape() -> None:
    adapters = random_adapters(resolve_spec(model_of("qwen2"), ["q_proj"], rank=2, alpha=4)).detach()
    A, B = adapters.A["self_attn.q_proj"][:, 1], adapters.B["self_attn.q_proj"][:, 1]
    x = torch.randn(6, 4, 5, 32, dtype=torch.float64)
    wanted = torch.cat([0.7 * part @ a.T @ b.T for part, a, b in zip(x.split(2), A, B, strict=True)])
    torch.testing.assert_close(low_rank(x, A, B, 0.7), wanted)
    torch.testing.assert_close(low_rank(x.flatten(0, 2), A, B, 0.7), wanted.flatten(0, 2))
    torch.testing.assert_close(low_rank(x, A[:1], B[:1], 0.7), 0.7 * x @ A[0].T @ B[0].T)


def test_fp32_adapters_act_in_a_bf16_model_and_get_fp32_gradients() -> None:
    model = tiny_model("qwen3", dtype=torch.bfloat16)
    spec = resolve_spec(model, "all", rank=2, alpha=4)
    adapters = random_adapters(spec, dtype=torch.float32)
    with Injector(model, spec).active(adapters):
        logits = model(input_ids=tokens(COUNT, LENGTH), use_cache=False).logits
    assert logits.dtype == torch.bfloat16
    assert {g.dtype for g in gradients(logits.float().square().mean(), adapters)} == {torch.float32}


class WholeNumbers(nn.Linear):
    """As bitsandbytes and others have it: a Linear that keeps 8-bit numbers and multiplies by what they stand for."""

    def __init__(self, of: nn.Linear):
        super().__init__(of.in_features, of.out_features, bias=of.bias is not None, device="meta")
        self.scale = of.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((of.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = of.bias

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight * self.scale, self.bias)


def test_adapters_act_in_a_quantised_base_as_in_the_weights_that_it_stands_for() -> None:
    quantised, plain = model_of("qwen3"), model_of("qwen3")
    spec = resolve_spec(plain, "all", rank=2, alpha=4)
    for path in spec.paths:
        module = WholeNumbers(quantised.get_submodule(path))
        quantised.set_submodule(path, module)
        plain.get_submodule(path).weight.data.copy_(module.weight * module.scale)
    assert resolve_spec(quantised, "all", rank=2, alpha=4) == spec
    before = {name: tensor.clone() for name, tensor in quantised.state_dict().items()}
    adapters, found = random_adapters(spec), []
    for model in (quantised, plain):
        with Injector(model, spec).active(adapters):
            logits = model(input_ids=tokens(COUNT, LENGTH), use_cache=False).logits
        found.append([logits, *gradients(logits.square().mean(), adapters)])
    assert furthest(*found) <= 1e-10 and min(float(g.detach().abs().max()) for g in found[0]) > 1e-6
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantised.state_dict().items())


# -- activation checkpointing ----------------------------------------------------------------------------------------------


def by_the_engine(model: Any) -> None:
    for layer in layer_list(model):
        recompute(layer)


def by_transformers(model: Any, **options: Any) -> None:
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False, **options})
    model.train()


def with_context(model: Any) -> None:
    by_transformers(model, context_fn=checkpoint_context)


def shared_trunk(spec: AdapterSpec) -> tuple[Adapters, list[Tensor]]:
    """Factors that hang on one another, as a generator's do, and the leaves below them."""
    plain = random_adapters(spec, dtype=torch.float32)
    knob = torch.tensor([0.7, 1.1], requires_grad=True)
    scale = knob.prod().tanh()
    return plain.map(lambda t: t * scale), [knob, *plain.tensors()]


def run(model: Any, injector: Injector, spec: AdapterSpec, *, leave: bool, backward: Callable[..., Any] = torch.autograd.grad) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients; with ``leave`` the adapters are no longer active in the backward pass."""
    adapters, leaves = shared_trunk(spec)
    ids = tokens(COUNT * ROWS, LENGTH)
    with injector.active(adapters):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if not leave:
            return loss, list(backward(loss, leaves))
    return loss, list(backward(loss, leaves))


def in_a_thread(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(loss, leaves)))
    thread.start()
    thread.join()
    return found


@pytest.mark.parametrize("leave", [False, True], ids=["inside", "left"])
@pytest.mark.parametrize("backward", [torch.autograd.grad, in_a_thread], ids=["here", "thread"])
@pytest.mark.parametrize("checkpointing", [by_the_engine, with_context])
def test_recomputed_layers_have_the_adapters_that_they_ran_with(checkpointing: Callable, backward: Callable, leave: bool) -> None:
    plain, model = tiny_model("qwen3"), tiny_model("qwen3")
    spec = resolve_spec(plain, "all", rank=2, alpha=4)
    wanted = run(plain.train(), Injector(plain, spec), spec, leave=False)
    checkpointing(model)
    injector = Injector(model, spec)
    calls: list[bool] = []
    layer_list(model)[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(True))
    loss, found = run(model, injector, spec, leave=leave, backward=backward)
    assert len(calls) == 2, "the layer was not computed again"
    assert torch.equal(loss, wanted[0])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted[1], strict=True))
    assert all(g.abs().max() > 0 for g in found)


def test_the_engines_recomputation_takes_other_adapters_in_the_meantime() -> None:
    plain, model = tiny_model("qwen3"), tiny_model("qwen3")
    spec = resolve_spec(plain, "all", rank=2, alpha=4)
    _, wanted = run(plain, Injector(plain, spec), spec, leave=False)
    by_the_engine(model)
    injector = Injector(model, spec)

    def while_others_act(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        with injector.active(random_adapters(spec, seed=5, dtype=torch.float32)):
            return list(torch.autograd.grad(loss, leaves))

    _, found = run(model, injector, spec, leave=True, backward=while_others_act)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_transformers_checkpointing_without_the_context_is_an_error_and_no_wrong_gradient() -> None:
    model = tiny_model("qwen3")
    by_transformers(model)
    spec = resolve_spec(model, "all", rank=2, alpha=4)
    with pytest.raises(CheckpointError):
        run(model, Injector(model, spec), spec, leave=True)


def test_reentrant_checkpointing_is_refused_with_the_way_out() -> None:
    model = tiny_model("qwen3")
    spec = resolve_spec(model, "all", rank=2, alpha=4)
    injector = Injector(model, spec)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(AdapterError, match=r'"use_reentrant": False, "context_fn": limbeck\.adapters\.inject\.checkpoint_context'):
        injector.active(random_adapters(spec)).__enter__()
    with injector.active(None):
        pass


# -- what is and is not active ---------------------------------------------------------------------------------------------


def test_nothing_of_an_adapter_stays_behind() -> None:
    model = tiny_model("qwen3")
    ids = tokens(COUNT, LENGTH)

    def logits() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    base, weights = logits(), {name: p.clone() for name, p in model.named_parameters()}
    spec = resolve_spec(model, "all", rank=2, alpha=4)
    injector = Injector(model, spec)
    first, second = random_adapters(spec, seed=1, dtype=torch.float32), random_adapters(spec, seed=2, dtype=torch.float32)
    assert torch.equal(logits(), base)
    with injector.active(first):
        one = logits()
        with injector.active(second):
            two = logits()
        with injector.active(None):
            assert torch.equal(logits(), base)
        assert torch.equal(logits(), one)
    with injector.active(second):
        assert torch.equal(logits(), two)
    assert not torch.equal(one, two) and not torch.equal(one, base)
    with pytest.raises(ZeroDivisionError), injector.active(first):
        _ = 1 / 0
    assert torch.equal(logits(), base)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    injector.remove()
    with injector.active(first):
        assert torch.equal(logits(), base)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_two_injectors_on_one_model_add_up_and_do_not_meddle() -> None:
    model = tiny_model("qwen3", dtype=torch.float64)
    ids = tokens(COUNT, LENGTH)
    spec = resolve_spec(model, "all", rank=2, alpha=4)
    narrow = resolve_spec(model, ["q_proj"], rank=3, alpha=3)
    one, other = Injector(model, spec), Injector(model, narrow)
    a, b = random_adapters(spec, seed=1).detach(), random_adapters(narrow, seed=2).detach()
    # Both as one LoRA of rank 5: B carries each one's scale.
    name = "self_attn.q_proj"
    wide = resolve_spec(model, ["q_proj"], rank=5, alpha=5)
    joined = Adapters(
        wide, {name: torch.cat([a.A[name], b.A[name]], 2)}, {name: torch.cat([a.spec.scale * a.B[name], b.spec.scale * b.B[name]], 3)}
    )  # fmt: skip
    rest = replace(a, B={**a.B, name: torch.zeros_like(a.B[name])})
    with torch.no_grad():
        with one.active(a), other.active(b):
            both = model(input_ids=ids, use_cache=False).logits
            with one.active(None):
                only_b = model(input_ids=ids, use_cache=False).logits
        with one.active(rest), Injector(model, wide).active(joined):
            torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, both, rtol=0, atol=1e-6)
        with other.active(b):
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, only_b)


def test_adapters_of_another_thread_are_not_active_here() -> None:
    model = tiny_model("qwen3")
    ids = tokens(COUNT, LENGTH)
    spec = resolve_spec(model, "all", rank=2, alpha=4)
    with torch.no_grad():
        base = model(input_ids=ids, use_cache=False).logits
        found: list[Tensor] = []
        with Injector(model, spec).active(random_adapters(spec, dtype=torch.float32)):
            thread = threading.Thread(target=lambda: found.append(model(input_ids=ids, use_cache=False).logits.detach()))
            thread.start()
            thread.join()
    assert torch.equal(found[0], base)


# -- what does not fit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["all", ["shared_expert.up_proj", "shared_expert.down_proj"]], ids=["all", "flat inputs"])
def test_rows_that_cannot_be_shared_out_are_an_error(targets: Any) -> None:
    """The shared expert sees tokens as rows: 2 rows of 9 tokens are 18, which 3 adapters could share, and wrongly."""
    model = qwen3_next()
    spec = resolve_spec(model, targets, rank=2, alpha=4)
    with pytest.raises(AdapterError, match="2 rows cannot be shared out evenly to 3 adapters"), Injector(model, spec).active(random_adapters(spec)):
        model(input_ids=tokens(2, LENGTH), use_cache=False)


def test_adapters_of_another_spec_are_refused() -> None:
    model = tiny_model("qwen3")
    injector = Injector(model, resolve_spec(model, "attention", rank=2, alpha=4))
    other = random_adapters(resolve_spec(model, "all", rank=2, alpha=4))
    with pytest.raises(AdapterError, match=r"other Linears than the ones prepared \(mlp\.down_proj"):
        injector.active(other).__enter__()
    higher = random_adapters(resolve_spec(model, "attention", rank=4, alpha=1), dtype=torch.float32)
    with injector.active(higher):
        model(input_ids=tokens(COUNT, LENGTH), use_cache=False)


def test_a_spec_of_another_model_is_refused_with_the_nearest_name() -> None:
    spec = resolve_spec(tiny_model("qwen3"), "all", rank=2, alpha=4)
    with pytest.raises(AdapterError, match=r"model\.layers\.3\.\S+, which is no Linear .*nearest: model\.layers\.2\."):
        Injector(tiny_model("qwen3", num_hidden_layers=3), spec)
    with pytest.raises(AdapterError, match=r"self_attn\.q_proj as 32 -> 48, and it is 32 -> 32 here"):
        Injector(tiny_model("qwen2"), spec)
    with pytest.raises(AdapterError, match=r"q_proj, which is no Linear of Phi3ForCausalLM; nearest: model\.layers\.\d\.self_attn\.\w+_proj"):
        Injector(tiny_model("phi3"), spec)


def test_a_spec_that_changes_nothing_is_refused() -> None:
    with pytest.raises(AdapterError, match="changes no Linear"):
        Injector(tiny_model("qwen3"), AdapterSpec((), 2, 4.0))


def test_factors_of_another_shape_are_refused() -> None:
    spec = resolve_spec(tiny_model("qwen3"), ["q_proj"], rank=2, alpha=4)
    adapters = random_adapters(spec)
    with pytest.raises(AdapterError, match=r"A of self_attn\.q_proj is \(3, 4, 1, 32\), the spec says \(3, 4, 2, 32\)"):
        Adapters(spec, {name: t[:, :, :1] for name, t in adapters.A.items()}, adapters.B)
