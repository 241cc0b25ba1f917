"""Attention alignment and the teacher that streams: additive, padding-blind, one layer at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import packed_batch, tiny_model
from limbeck.config.parts.objectives import AttentionAlignmentOptions
from limbeck.config.parts.teachers import LocalTeacherOptions, SelfTeacherOptions
from limbeck.errors import ModelError
from limbeck.models.loading import save_model
from limbeck.models.vocabulary import check_vocabulary, compare_vocabularies
from limbeck.needs import HeadHidden
from limbeck.objectives.attention_alignment import AttentionAlignment
from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.self_teacher import SelfTeacher
from limbeck.types import Batch


class Half(nn.Module):
    """A mixer that is wrong by a learnable factor."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states * self.factor, None


def rows(lengths: tuple[int, ...], total: int) -> Batch:
    documents = torch.full((len(lengths), total), -1)
    for row, length in enumerate(lengths):
        documents[row, :length] = 0
    return Batch(
        torch.zeros_like(documents), torch.full_like(documents, -100), torch.arange(total).expand_as(documents), documents
    )


def aligned(loss: str) -> AttentionAlignment:
    return AttentionAlignment(AttentionAlignmentOptions.model_validate({"kind": "attention_alignment", "loss": loss}))


@pytest.mark.parametrize("loss", ["relative_mse", "mse", "rms"])
def test_micro_batches_and_padding_do_not_change_the_gradient(loss: str) -> None:
    torch.manual_seed(0)
    objective, mixer = aligned(loss), Half()
    batch = rows((5, 9, 3), 9)
    x_BTD, y_BTD = torch.randn(3, 9, 4, dtype=torch.float64), torch.randn(3, 9, 4, dtype=torch.float64)
    objective.load_state({"0": torch.tensor(3.0)})

    def gradient(parts: list[tuple[Batch, Tensor, Tensor]]) -> float:
        mixer.factor.grad = None
        count = sum(int(objective.count(part)) for part, _, _ in parts)
        for part, x, y in parts:
            (objective.piece(mixer, 0, x, y, {}, part).sum / count).backward()
        assert mixer.factor.grad is not None
        return float(mixer.factor.grad)

    whole = gradient([(batch, x_BTD, y_BTD)])
    split = gradient([(part, x_BTD[i : i + 1], y_BTD[i : i + 1]) for i, part in enumerate(batch.split(1))])
    noise = torch.where(batch.token_mask_BT[..., None], 0.0, 7.0)
    padded = gradient([(batch, x_BTD + noise, y_BTD - noise)])
    assert split == pytest.approx(whole, rel=1e-12) and padded == pytest.approx(whole, rel=1e-12)


def test_the_root_mean_square_has_a_finite_slope_where_nothing_is_wrong() -> None:
    mixer, batch = Half(), rows((2,), 4)
    zeros = torch.zeros(1, 4, 3, dtype=torch.float64)
    aligned("rms").piece(mixer, 0, zeros, zeros, {}, batch).sum.backward()
    assert mixer.factor.grad is not None and torch.isfinite(mixer.factor.grad)


def test_the_stored_power_makes_the_loss_the_relative_residual() -> None:
    torch.manual_seed(0)
    objective, batch = aligned("relative_mse"), rows((6, 4), 6)
    x_BTD = torch.randn(2, 6, 4, dtype=torch.float64)

    def stream(batch: Batch, visit: Any) -> None:
        visit(0, x_BTD, x_BTD, {})

    objective.calibrate(stream, [batch])
    term = objective.piece(Half(), 0, x_BTD, x_BTD, {}, batch)
    assert float(term.sum) / int(objective.count(batch)) == pytest.approx(0.25, rel=1e-5)
    error, power = term.metrics["residual/0"]
    assert float(error) / float(power) == pytest.approx(0.25, rel=1e-5)
    copy = aligned("relative_mse")
    copy.load_state(objective.state())
    assert torch.equal(copy.piece(Half(), 0, x_BTD, x_BTD, {}, batch).sum, term.sum)


def test_the_self_teacher_streams_every_layers_own_input_and_output(tmp_path: Any) -> None:
    model = tiny_model("qwen3")
    save_model(model, tmp_path / "base")
    teacher = SelfTeacher(SelfTeacherOptions(), str(tmp_path / "base"))
    teacher.load("cpu")
    batch = packed_batch([[7, 5], [4, 8]])
    seen: dict[int, Tensor] = {}

    def visit(layer: int, inputs_BTD: Tensor, outputs_BTD: Tensor, kwargs: dict[str, Any]) -> None:
        assert not inputs_BTD.requires_grad and "position_embeddings" in kwargs and "documents_BT" in kwargs
        seen[layer] = outputs_BTD
        attention = teacher.model.model.layers[layer].self_attn
        assert torch.equal(attention.forward(inputs_BTD, **kwargs)[0], outputs_BTD)

    teacher.stream(batch, visit)
    assert sorted(seen) == list(range(len(teacher.model.model.layers)))
    assert not teacher.model.model.layers[0].self_attn._forward_hooks, "hooks must not outlive the stream"


def test_the_local_teacher_gives_hidden_states_and_a_head_and_never_logits(tmp_path: Any) -> None:
    model = tiny_model("qwen3")
    save_model(model, tmp_path / "base")
    teacher = LocalTeacher(LocalTeacherOptions(model="x"), str(tmp_path / "base"))
    teacher.load("cpu")
    batch = packed_batch([[7, 5], [4, 8]])
    answer = teacher.signal(batch, {HeadHidden: HeadHidden()})[HeadHidden]
    assert answer.hidden_BTD.shape == (*batch.input_ids_BT.shape, model.config.hidden_size)
    assert not answer.hidden_BTD.requires_grad
    assert all(not p.requires_grad for p in teacher.model.parameters())
    with torch.no_grad():
        first = batch.documents_BT[0] == 0
        logits = model(input_ids=batch.input_ids_BT[:1, first], use_cache=False).logits
    ours = answer.hidden_BTD[:1, first] @ answer.head.weight_VD.T
    assert torch.allclose(ours, logits, atol=1e-4)
    other = LocalTeacher(LocalTeacherOptions(model="x", dtype="bfloat16"), str(tmp_path / "base"))
    assert other.fingerprint() != teacher.fingerprint()


class Words:
    """A tokenizer as far as its vocabulary goes."""

    def __init__(self, *words: str):
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}


def test_vocabularies_are_compared_as_strings_and_a_longer_tail_is_allowed() -> None:
    compare_vocabularies(Words("a", "b"), Words("a", "b", "<pad>"), names=("ours", "theirs"))
    with pytest.raises(ModelError, match=r"id 1: 'b' in ours, 'c' in theirs"):
        compare_vocabularies(Words("a", "b"), Words("a", "c"), names=("ours", "theirs"))
    with pytest.raises(ModelError, match=r"\(none\)"):
        compare_vocabularies(Words("a", "b", "c"), Words("a", "b"), names=("ours", "theirs"))


def test_a_tokenizer_larger_than_the_embedding_is_refused() -> None:
    model = tiny_model("qwen3")
    width = model.get_input_embeddings().weight.shape[0]
    check_vocabulary(Words(*map(str, range(width))), model, who="the student")
    with pytest.raises(ModelError, match=f"vocab_size >= {width + 1}"):
        check_vocabulary(Words(*map(str, range(width + 1))), model, who="the student")


def test_batches_move_and_split_whole() -> None:
    batch = rows((5, 9, 3), 9)
    parts = batch.split(2)
    assert [part.input_ids_BT.shape[0] for part in parts] == [2, 1]
    assert torch.equal(torch.cat([part.documents_BT for part in parts]), batch.documents_BT)
    assert batch.num_tokens == 17 and replace(batch).to("cpu").num_tokens == 17
