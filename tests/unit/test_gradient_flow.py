"""From the loss through a frozen Qwen3-Next and its LoRA into the generator: who gets a gradient, and that it is the right one."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_next import modeling_qwen3_next

from adapter_bases import QWEN3_NEXT
from families import VOCABULARY, packed_batch, stir
from limbeck.config.parts.objectives import TopKKLOptions
from limbeck.config.parts.surgeries import LoraGeneratorOptions
from limbeck.engine.recompute import outer_units, recompute
from limbeck.models.loading import build_model
from limbeck.needs import TopK
from limbeck.objectives.topk_kl import TopKKL
from limbeck.students.generator.student import GeneratorStudent
from limbeck.types import Batch, Signal, TopKSignal

DELTANET = ["in_proj_qkvz", "in_proj_ba", "out_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SHARED = ["shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"]
SITES = [f"linear_attn-{name}" for name in DELTANET] + [f"self_attn-{name}" for name in ATTENTION] + [f"mlp-{name.replace('.', '-')}" for name in SHARED]
KEPT = 8


def student_of(dtype: torch.dtype = torch.float32) -> GeneratorStudent:
    model = build_model(QWEN3_NEXT, dtype=dtype)
    stir(model)
    options = LoraGeneratorOptions.model_validate(
        {"targets": [*DELTANET, *ATTENTION, *SHARED], "rank": 2, "alpha": 4, "width": 32, "reader": {"latents": 4, "blocks": 1}}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GeneratorStudent(model, options, text_shape=(2, 6), base={"source": "tiny", "fingerprint": {}}).to(dtype).train()


def a_batch() -> Batch:
    condition = torch.randint(3, VOCABULARY, (3, 2, 6), generator=torch.Generator().manual_seed(1))
    condition[1, 0, 4:] = -1
    return replace(packed_batch([[7, 9], [4, 12], [3, 2, 11]], padding=2), condition_BSC=condition, adapters_B=torch.arange(3))


def loss_of(student: GeneratorStudent, batch: Batch) -> Tensor:
    """Top-k KL, summed, against a teacher that knows its own mind: random logits."""
    rows = batch.signal_mask_BT.flatten().nonzero().flatten()
    logits = 3 * torch.randn(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    top = logits.topk(KEPT)
    signal = Signal({TopK: TopKSignal(rows, top.indices, top.values, logits.logsumexp(-1, keepdim=True), (1.0,))})
    return TopKKL(TopKKLOptions(k=KEPT))(student(batch), signal, batch).sum


def fingerprint(model: Any) -> str:
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def with_gradient(student: GeneratorStudent) -> set[str]:
    return {name for name, p in student.generator.named_parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
def test_the_gradient_reaches_every_target_at_step_0_and_everything_after_one_step(autocast: bool, checkpointed: bool) -> None:
    student, batch = student_of(), a_batch()
    before = fingerprint(student.model)
    if checkpointed:
        for unit in outer_units(student):
            recompute(unit)
    everything = {name for name, _ in student.generator.named_parameters()}
    assert {name.removeprefix("decoder.to_B.") for name in everything if name.startswith("decoder.to_B.")} == set(SITES)
    optimizer = torch.optim.AdamW(student.generator.parameters(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(student, batch)
        loss.backward()
        # B is zero at first: what lies behind it learns from the second step on.
        wanted = everything if step else {f"{part}.{site}" for part in ("decoder.to_B", "static.B") for site in SITES}
        assert with_gradient(student) == wanted
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in student.generator.parameters())
        optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in student.model.parameters())
    assert fingerprint(student.model) == before


@pytest.mark.parametrize("site", SITES)
def test_every_layer_and_every_row_steers_its_own_gradient(site: str) -> None:
    """The gradient of B, by row and layer: no module of either kind of layer is passed by."""
    student, batch = student_of(), a_batch()
    found: dict[str, Tensor] = {}
    plain = student.generator.forward

    def kept(*inputs: Tensor) -> Any:
        A, B = plain(*inputs)
        for name, factor in B.items():
            factor.retain_grad()
            found[name] = factor
        return A, B

    student.generator.forward = kept
    loss_of(student, batch).backward()
    factor = found[next(name for name in found if name.replace(".", "-") == site)]
    assert bool((factor.grad.flatten(2).abs().amax(-1) > 0).all()), "a row or a layer gets no gradient"


# -- in fp64 ---------------------------------------------------------------------------------------------------------------


class Double(types.ModuleType):
    """``torch`` to whom fp32 is fp64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def all_in_fp64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The family rounds to fp32 in its norms, its router and its recurrence, which blurs differences of losses."""
    monkeypatch.setattr(modeling_qwen3_next, "torch", Double("torch"))
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double())
    yield


PARTS = {"everything": "", "static": "static", "reader": "reader", "trunk": "decoder.trunk", "heads of A": "decoder.to_A", "heads of B": "decoder.to_B"}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.usefixtures("all_in_fp64")
def test_the_gradient_is_that_of_finite_differences(part: str) -> None:
    """dL/dtheta along one direction, through both kinds of layer and the experts."""
    student, batch = student_of(torch.float64), a_batch()
    optimizer = torch.optim.AdamW(student.generator.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        (loss_of(student, batch) / 40).backward()
        optimizer.step()
    optimizer.zero_grad()
    loss_of(student, batch).backward()
    torch.manual_seed(0)
    parameters = list(student.generator.get_submodule(part).parameters())
    directions = [torch.rand_like(p) * p.grad.sign() for p in parameters]
    wanted = sum(float((p.grad * d).sum()) for p, d in zip(parameters, directions, strict=True))
    # So small that no token changes its experts, which the loss is not continuous in.
    found, step = [], 1e-4 / wanted
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=sign * step)
            found.append(float(loss_of(student, batch)))
    assert (found[0] - found[1]) / (2 * step) == pytest.approx(wanted, rel=1e-6)
