"""An untrained generator changes nothing: on Qwen3-Next the first step's logits are the base's to the bit."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from adapter_bases import QWEN3_NEXT
from families import VOCABULARY, packed_batch, stir, tokens
from limbeck.config.parts.surgeries import LoraGeneratorOptions
from limbeck.models.loading import build_model
from limbeck.models.packed import forward_packed
from limbeck.students.generator.student import GeneratorStudent
from limbeck.types import Batch

TARGETS = ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"]
SHARED = ["shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"]
READERS: dict[str, dict[str, Any]] = {
    "perceiver": {"reader": {"latents": 4, "blocks": 1}},
    "transformer": {"reader": {"kind": "transformer", "blocks": 2}},
    "static": {"condition": "none"},
}


def untrained(changes: dict[str, Any], targets: list[str], dtype: torch.dtype = torch.float32) -> GeneratorStudent:
    model = build_model(QWEN3_NEXT, dtype=dtype)
    stir(model)
    options = LoraGeneratorOptions.model_validate({"targets": targets, "rank": 4, "alpha": 32, "width": 32, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GeneratorStudent(model, options, text_shape=(1, 7), base={"source": "tiny", "fingerprint": {}})


def a_batch() -> Batch:
    """Rows of unequal documents and a padded tail, each with a condition of its own."""
    condition = torch.randint(3, VOCABULARY, (3, 1, 7), generator=torch.Generator().manual_seed(1))
    condition[1, :, 4:] = -1
    batch = packed_batch([[7, 70], [40, 37], [3, 2, 72]], padding=3)
    return replace(batch, condition_BSC=condition, adapters_B=torch.arange(3))


def logits_of(student: GeneratorStudent, batch: Batch, autocast: bool) -> tuple[Tensor, Tensor]:
    """The student's and the bare base's."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        output = student(batch)
        return tuple(linear(hidden, output.head.weight_VD) for hidden in (output.hidden_BTD, forward_packed(student.model, batch)))


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("targets", [TARGETS, [*TARGETS, *SHARED]], ids=["attention", "with shared experts"])
@pytest.mark.parametrize("changes", READERS.values(), ids=READERS)
def test_step_0_is_the_base_bitwise(changes: dict[str, Any], targets: list[str], precision: str) -> None:
    student = untrained(changes, targets, torch.bfloat16 if precision == "bf16" else torch.float32)
    batch = a_batch()
    found, wanted = logits_of(student, batch, precision == "autocast")
    assert torch.equal(found, wanted)
    # Not because there is nothing to act: A is drawn, and a B that is not zero is felt in every row.
    A, B = student.generator(*student.read(batch))
    assert all(a.abs().max() > 0 for a in A.values()) and not any(b.any() for b in B.values())
    with torch.no_grad():
        for part in student.generator.static.B.values():
            part.fill_(0.05)
    found, wanted = logits_of(student, batch, precision == "autocast")
    assert bool(((found - wanted).abs().amax((1, 2)) > 1e-2).all())


def test_text_written_at_step_0_is_the_bases_own() -> None:
    """Token by token, through the cache of both kinds of layer."""
    student = untrained(READERS["perceiver"], [*TARGETS, *SHARED])
    prompt = tokens(3, 9)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    adapters = student.generate(a_batch().condition_BSC)
    with student.injector.active(adapters):
        found = student.model.generate(prompt, **settings)
    wanted = student.model.generate(prompt, **settings)
    assert torch.equal(found.sequences, wanted.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, wanted.logits, strict=True))
