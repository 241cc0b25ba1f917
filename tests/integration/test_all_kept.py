"""A hybrid that keeps every layer is its teacher, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from families import FAMILIES, packed_batch, tiny_model, tokens
from limbeck.config.parts.stages import StudentOptions
from limbeck.models.loading import load_model, save_model
from limbeck.models.packed import forward_packed
from limbeck.students.student import build_student


def _all_kept(folder: Path) -> Any:
    options = StudentOptions.model_validate({"base": str(folder), "surgery": [{"kind": "hybridize", "keep": "all"}]})
    return build_student(options, str, seed=0, dtype=torch.float32)


@torch.no_grad()
def _compare(student: Any, base: Any, ids: torch.Tensor, batch: Any) -> None:
    assert torch.equal(student.model(ids).logits, base(ids).logits)
    hidden = forward_packed(base, batch)
    assert torch.equal(student(batch).hidden_BTD, hidden)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    assert torch.equal(student.model(ids, attention_mask=mask).logits, base(ids, attention_mask=mask).logits)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = student.model(ids).logits
        assert torch.equal(rounded, base(ids).logits)
        assert torch.equal(student(batch).hidden_BTD, forward_packed(base, batch))
    assert not torch.equal(rounded.float(), base(ids).logits)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    assert torch.equal(student.model.generate(ids, **options), base.generate(ids, **options))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_kept_is_bit_identical_to_the_teacher(family: str, tied: bool, tmp_path: Path) -> None:
    """fp32, packed, padded, under bf16 autocast and in generation; and again after save and load."""
    save_model(tiny_model(family, tied=tied), tmp_path / "base")
    base = load_model(str(tmp_path / "base"))
    student = _all_kept(tmp_path / "base")
    ids, batch = tokens(2, 15), packed_batch([[7, 9, 20], [16, 15, 5]], padding=3)
    _compare(student, base, ids, batch)
    student.save(tmp_path / "student")
    again = load_model(str(tmp_path / "student"))
    assert type(again).__name__.startswith("Limbeck")
    assert again.config._attn_implementation == base.config._attn_implementation
    with torch.no_grad():
        assert torch.equal(again(ids).logits, base(ids).logits)


def test_all_kept_is_bit_identical_on_a_trained_model(stories260k: Path) -> None:
    base, student = load_model(str(stories260k)), _all_kept(stories260k)
    _compare(student, base, tokens(2, 40) * 5, packed_batch([[70, 90, 20], [16, 150, 14]], padding=9))
