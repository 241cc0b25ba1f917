"""The LoRA generator: where it begins, that it learns, that nothing but its condition decides, and its files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from adapter_bases import all_double, qwen3_next
from families import VOCABULARY, packed_batch, tiny_model
from limbeck.adapters.output import AdaptedOutput
from limbeck.adapters.spec import Adapters
from limbeck.config.parts.objectives import CrossEntropyOptions
from limbeck.config.parts.surgeries import LoraGeneratorOptions
from limbeck.engine.recompute import outer_units, recompute
from limbeck.errors import AdapterError, ModelError
from limbeck.models.packed import forward_packed
from limbeck.objectives.ce import CrossEntropy
from limbeck.students.generator.student import GeneratorStudent, is_generator, read_record, read_weights
from limbeck.types import Batch, Signal

TEXTS, TOKENS = 2, 6
BASE = {"source": "tiny", "fingerprint": {"files": "none"}}
PLAIN: dict[str, Any] = {"targets": "all", "rank": 2, "alpha": 4, "width": 32, "reader": {"latents": 4, "blocks": 1}}


def student_of(changes: dict[str, Any] | None = None, *, start: Adapters | None = None, seed: int = 0, model: Any = None, **facts: Any) -> GeneratorStudent:
    options = LoraGeneratorOptions.model_validate({**PLAIN, **(changes or {})})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = GeneratorStudent(model or tiny_model("qwen3"), options, text_shape=(TEXTS, TOKENS), base=BASE, **facts)
    if start is not None:
        student.generator.begin_as(start)
    return student


def conditions(count: int, seed: int = 0) -> Tensor:
    """Texts of many lengths, int64 ``[count, S, C]`` padded with -1; the second text of the first condition is missing."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, TEXTS, TOKENS), generator=generator)
    lengths = torch.randint(1, TOKENS + 1, (count, TEXTS), generator=generator)
    lengths[0, -1] = 0
    return torch.where(torch.arange(TOKENS) < lengths[..., None], ids, -1)


def batch_of(rows: int, seed: int = 0) -> Batch:
    lengths = [[[7, 9], [4, 12], [3, 2, 11]][row % 3] for row in range(rows)]
    return replace(packed_batch(lengths, seed, padding=2), condition_BSC=conditions(rows, seed), adapters_B=torch.arange(rows))


def loss_of(student: GeneratorStudent, batch: Batch) -> Tensor:
    """Summed cross-entropy."""
    return CrossEntropy(CrossEntropyOptions())(student(batch), Signal(), batch).sum


def trained(student: GeneratorStudent, steps: int = 3) -> GeneratorStudent:
    """A few steps away from the start, where B is 0."""
    optimizer = torch.optim.AdamW(student.generator.parameters(), lr=1e-2)
    student.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (loss_of(student, batch_of(3)) / 40).backward()
        optimizer.step()
    optimizer.zero_grad()
    return student


def all_of(adapters: Adapters) -> Tensor:
    """``[N, everything]``."""
    return torch.cat([t.flatten(1) for t in adapters.tensors()], 1)


def random_start(student: GeneratorStudent, **changes: Any) -> Adapters:
    spec = replace(student.spec, **changes)
    generator = torch.Generator().manual_seed(9)
    A = {s.name: 0.3 * torch.randn(1, len(s.layers), spec.rank, s.in_features, generator=generator) for s in spec.sites}
    return Adapters(spec, A, {s.name: 0.3 * torch.randn(1, len(s.layers), s.out_features, spec.rank, generator=generator) for s in spec.sites})


# -- the first step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"reader": {"kind": "transformer", "blocks": 2}}, {"condition": "none"}], ids=["perceiver", "transformer", "static"])
def test_the_first_step_is_the_base_bitwise(changes: dict[str, Any]) -> None:
    student = student_of(changes)
    batch = batch_of(3)
    with torch.no_grad():
        output = student(batch)
        found = torch.nn.functional.linear(output.hidden_BTD, output.head.weight_VD)
        wanted = torch.nn.functional.linear(forward_packed(student.model, batch), output.head.weight_VD)
    assert torch.equal(found, wanted)
    assert all(a.abs().max() > 0 for a in output.adapters.A.values())


def test_the_first_gradient_reaches_b_alone_and_the_second_everything() -> None:
    student = student_of()
    optimizer = torch.optim.AdamW(student.generator.parameters(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(student, batch_of(3)).backward()
        found = {name for name, p in student.generator.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        everything = {name for name, _ in student.generator.named_parameters()}
        b_path = {name for name in everything if name.startswith(("static.B.", "decoder.to_B."))}
        assert found == (everything if step else b_path), found ^ (everything if step else b_path)
        optimizer.step()


def test_a_start_is_begun_with_exactly_and_still_learns() -> None:
    start = random_start(student_of())
    student = student_of(start=start)
    with torch.no_grad():
        found = student.generate(conditions(3))
        for name in start.A:
            assert torch.equal(found.A[name], start.A[name].expand_as(found.A[name]))
            assert torch.equal(found.B[name], start.B[name].expand_as(found.B[name]))
    loss_of(student, batch_of(3)).backward()
    for letter in "AB":
        for part in (getattr(student.generator.static, letter), getattr(student.generator.decoder, f"to_{letter}")):
            assert all(p.grad.abs().max() > 0 for p in part.values())
    trained(student)
    with torch.no_grad():
        apart = all_of(student.generate(conditions(3)))
    assert (apart[0] - apart[1]).abs().max() > 1e-3, "conditions must come to differ"


def test_a_start_of_another_scale_changes_the_base_as_much() -> None:
    start = random_start(student_of(), alpha=1.0)
    with torch.no_grad():
        found = student_of(start=start).generate(conditions(1))
    for site in start.spec.sites:
        torch.testing.assert_close(found.change(site.name), start.change(site.name))


def test_a_start_that_does_not_fit_is_refused() -> None:
    with pytest.raises(AdapterError, match="`start` is a LoRA of rank 1, and this generator makes rank 2"):
        student_of(start=random_start(student_of({"rank": 1})))
    with pytest.raises(AdapterError, match=r"adapters differ in mlp\.\w+_proj.*not changed"):
        student_of(start=random_start(student_of({"targets": "attention"})))


# -- what an adapter depends on --------------------------------------------------------------------------------------------

FORMS = {"perceiver": {}, "transformer": {"reader": {"kind": "transformer", "blocks": 2}}, "hyperconv": {"decoder": "hyperconv"}}


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS)
def test_an_adapter_depends_on_its_own_condition_alone(changes: dict[str, Any]) -> None:
    student = trained(student_of(changes))
    wanted = conditions(5)
    with torch.no_grad():
        together = all_of(student.generate(wanted))
        for row in range(5):
            alone = all_of(student.generate(wanted[row : row + 1]))
            assert (alone[0] - together[row]).norm() <= 1e-5 * together[row].norm()
    # A decoder that knew no conditions would pass all this.
    assert (together[1] - together[2]).norm() > 1e-3 * together[1].norm()


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS)
def test_padding_of_a_condition_changes_nothing(changes: dict[str, Any]) -> None:
    student = trained(student_of(changes))
    short = conditions(3)
    short[:, :, TOKENS - 2 :] = -1
    if "decoder" not in changes:
        # More room for tokens and for texts; the convolutions are made for one shape.
        wide = torch.cat([short, torch.full((3, TEXTS, 3), -1)], 2)
        wide = torch.cat([wide, torch.full((3, 1, TOKENS + 3), -1)], 1)
    else:
        wide = short
    with torch.no_grad():
        found = all_of(student.generate(wide))
        torch.testing.assert_close(found, all_of(student.generate(short)), rtol=1e-5, atol=1e-6)
        mask = short >= 0
        states, _ = student.states(short)
        # What stands at padded places is not read, whatever it is.
        A, B = student.generator(torch.where(mask[..., None], states, 50.0), mask)
        torch.testing.assert_close(all_of(Adapters(student.spec, A, B)), all_of(student.generate(short)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS)
def test_a_condition_without_text_is_an_adapter_like_others(changes: dict[str, Any]) -> None:
    student = trained(student_of(changes))
    wanted = conditions(3)
    wanted[1] = -1
    adapters = student.generate(wanted)
    found = all_of(adapters)
    assert bool(found.isfinite().all())
    found.square().sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in student.generator.parameters())


def test_rows_get_their_own_adapter() -> None:
    student = trained(student_of())
    batch = batch_of(4)
    with torch.no_grad():
        whole = student(batch).hidden_BTD
        for row, part in enumerate(batch.split(1)):
            torch.testing.assert_close(student(part).hidden_BTD[0], whole[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
def test_micro_batches_have_the_gradient_of_the_whole(checkpointed: bool) -> None:
    """In fp64 through the base and the generator; recomputed units of a batch that was left before the backward pass too."""
    student = trained(student_of()).double()
    batch = batch_of(4)
    loss_of(student, batch).backward()
    whole = {name: p.grad.clone() for name, p in student.generator.named_parameters()}
    student.zero_grad()
    if checkpointed:
        for unit in outer_units(student):
            recompute(unit)
    for part in batch.split(1 if checkpointed else 3):
        loss_of(student, part).backward()
    for name, p in student.generator.named_parameters():
        assert (p.grad - whole[name]).norm() <= 1e-6 * whole[name].norm(), name


@pytest.mark.parametrize("part", ["static.A", "static.B", "reader", *(f"decoder.{n}" for n in ("to_A", "to_B", "gain_A", "gain_B", "trunk", "ask", "site"))])
def test_the_gradient_is_that_of_finite_differences(part: str) -> None:
    """dL/dtheta along one direction in each part of the generator."""
    student = trained(student_of(model=all_double())).double()
    batch = batch_of(3)
    loss_of(student, batch).backward()
    torch.manual_seed(0)
    parameters = list(student.generator.get_submodule(part).parameters())
    directions = [torch.rand_like(p) * p.grad.sign() for p in parameters]
    wanted = sum(float((p.grad * d).sum()) for p, d in zip(parameters, directions, strict=True))
    found, step = [], 1e-6
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=sign * step)
            found.append(float(loss_of(student, batch)))
    assert (found[0] - found[1]) / (2 * step) == pytest.approx(wanted, rel=1e-5)


# -- learning --------------------------------------------------------------------------------------------------------------


def test_two_conditions_learn_two_random_teachers_by_heart() -> None:
    student = student_of({"targets": "attention", "width": 48}, model=tiny_model("qwen3", num_hidden_layers=2))
    generator = torch.Generator().manual_seed(4)
    wanted = {}
    for site in student.spec.sites:
        left, right = (torch.randn(2, len(site.layers), *shape, generator=generator) for shape in ((site.out_features, 2), (2, site.in_features)))
        wanted[site.name] = left @ right
    total = sum(w.square().sum((1, 2, 3)) for w in wanted.values())
    steps = 250
    optimizer = torch.optim.Adam(student.generator.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, steps)
    states, mask = student.states(conditions(2))
    for _ in range(steps):
        adapters = Adapters(student.spec, *student.generator(states, mask))
        error = sum((adapters.change(name) - w).square().sum((1, 2, 3)) for name, w in wanted.items()) / total
        optimizer.zero_grad()
        error.sum().backward()
        optimizer.step()
        schedule.step()
    assert float(error.detach().max()) ** 0.5 < 1e-2, error


def digest(model: Any) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def test_training_leaves_the_base_as_it_was_and_in_evaluation_mode() -> None:
    model = tiny_model("qwen3", attention_dropout=0.5)
    before = digest(model)
    student = student_of(model=model)
    seen: list[bool] = []
    model.model.layers[0].register_forward_hook(lambda layer, *_: seen.append(layer.training))
    assert not any(p.requires_grad for p in model.parameters())
    first = float(loss_of(student, batch_of(3)).detach())
    trained(student, 6)
    assert student.generator.training and not any(m.training for m in model.modules())
    assert seen and not any(seen)
    assert float(loss_of(student, batch_of(3)).detach()) < first
    assert digest(model) == before
    assert all(p.grad is None for p in model.parameters())
    assert set(student.roles.values()) == {"generator"} and set(student.roles) == {n for n, _ in student.trained.named_parameters()}


def test_hidden_states_are_computed_when_they_are_asked_for() -> None:
    student = student_of()
    calls: list[int] = []
    batch = batch_of(3)
    with torch.no_grad():
        student.model.model.layers[-1].register_forward_hook(lambda *_: calls.append(1))
        output = student(batch)
        asked = len(calls)
        assert isinstance(output, AdaptedOutput) and len(output.adapters) == 3
        assert output.hidden_BTD is output.hidden_BTD
    assert len(calls) == asked + 1


def test_a_static_lora_is_the_same_for_all_and_learns() -> None:
    student = trained(student_of({"condition": "none"}))
    with torch.no_grad():
        found = all_of(student.generate(conditions(4)))
    assert torch.equal(found, found[:1].expand_as(found)) and found.abs().sum() > 0
    assert {name.split(".")[0] for name in student.roles} == {"static"}
    loss_of(student, batch_of(3)).backward()
    assert all(p.grad.abs().max() > 0 for p in student.generator.parameters())


def test_data_without_conditions_is_refused() -> None:
    with pytest.raises(ModelError, match="name a prepare_conditions or prepare_trajectories stage"):
        student_of()(packed_batch([[5, 5]]))


# -- a sentence encoder ----------------------------------------------------------------------------------------------------


def word_tokenizer(words: Sequence[str], **special: str) -> PreTrainedTokenizerFast:
    names = ["[UNK]", *dict.fromkeys(special.values()), *words]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(dict.fromkeys(names))}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **special)


@pytest.fixture
def bert(tmp_path: Path) -> str:
    """A sentence encoder with a vocabulary and places of its own."""
    words = [f"w{i}" for i in range(VOCABULARY)][::-1]
    word_tokenizer(words, pad_token="[PAD]").save_pretrained(tmp_path / "bert")
    config = BertConfig(
        vocab_size=VOCABULARY + 2, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=8, pad_token_id=1
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def test_a_sentence_encoder_reads_the_text_of_the_base_tokens(bert: str) -> None:
    base_tokenizer = word_tokenizer([f"w{i}" for i in range(1, VOCABULARY)])
    student = student_of({"condition": "sentence", "encoder": bert}, tokenizer=base_tokenizer, encoder=bert)
    wanted = conditions(3)
    states, mask = student.states(wanted)
    assert states.shape[:2] == (3, TEXTS) and states.shape[-1] == 24
    assert torch.equal(mask.sum(-1), (wanted >= 0).sum(-1)), "one word is one token here; a missing text has none"
    ids = [i for i in wanted[2, 0].tolist() if i >= 0]
    text = " ".join(f"w{i}" for i in ids)
    with torch.no_grad():
        alone = student.states.encoder(**student.states.tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    torch.testing.assert_close(states[2, 0, : len(ids)], alone, rtol=1e-4, atol=1e-5)
    trained(student)
    with torch.no_grad():
        together = all_of(student.generate(wanted))
        for row in range(3):
            alone = all_of(student.generate(wanted[row : row + 1]))[0]
            assert (alone - together[row]).norm() <= 1e-5 * together[row].norm()
        assert (together[1] - together[2]).abs().max() > 1e-4
    assert not any(name.startswith("states") for name in student.state_dict())


def test_texts_longer_than_the_sentence_encoder_takes_are_cut(bert: str) -> None:
    base_tokenizer = word_tokenizer([f"w{i}" for i in range(1, VOCABULARY)])
    student = student_of({"condition": "sentence", "encoder": bert}, tokenizer=base_tokenizer, encoder=bert)
    states, mask = student.states(torch.full((1, 1, 30), 7))
    assert states.shape[2] == mask.shape[2] == 8


def test_a_sentence_encoder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"surgery\.encoder: .*nowhere: cannot be loaded"):
        student_of({"condition": "sentence", "encoder": "nowhere"}, encoder=str(tmp_path / "nowhere"))


# -- files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [*FORMS.values(), {"condition": "none"}], ids=[*FORMS, "static"])
def test_a_saved_generator_comes_back_as_it_was(changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    student = trained(student_of(changes, model=model))
    folder = tmp_path / "model"
    student.save(folder)
    student.save(folder)
    assert is_generator(folder) and not is_generator(tmp_path) and not list(tmp_path.glob(".*"))
    record = read_record(folder)
    options = LoraGeneratorOptions.model_validate({**record["options"], "start": None})
    again = GeneratorStudent(model, options, text_shape=tuple(record["text_shape"]), base=record["base"])
    read_weights(folder, again.generator)
    assert again.spec == student.spec and again.base == BASE and again.spec.to_json() == record["spec"]
    with torch.no_grad():
        assert torch.equal(all_of(again.generate(conditions(3))), all_of(student.generate(conditions(3))))


def test_files_of_another_generator_are_refused(tmp_path: Path) -> None:
    student_of({"width": 16}).save(tmp_path / "model")
    with pytest.raises(ModelError, match="does not hold this generator"):
        read_weights(tmp_path / "model", student_of().generator)
    (tmp_path / "model" / "generator.json").write_text('{"format": 99}')
    with pytest.raises(ModelError, match="format 99, this version reads 1"):
        read_record(tmp_path / "model")
    (tmp_path / "model" / "generator.json").write_text("[]")
    with pytest.raises(ModelError, match="cannot be read as a LoRA generator"):
        read_record(tmp_path / "model")


def test_a_generator_works_where_rows_are_documents() -> None:
    """A family that cannot pack: every document of a row has the row's adapter."""
    # In fp64: large weights make two thousandths of a rounding in fp32.
    student = trained(student_of({"targets": "attention"}, model=qwen3_next()).double())
    batch = batch_of(3)
    adapters = student.generate(batch.condition_BSC).detach()
    with torch.no_grad():
        found = student(batch).hidden_BTD
        for row in range(3):
            for document in batch.documents_BT[row].unique()[1:]:
                here = batch.documents_BT[row] == document
                (alone,) = student.run_base(batch.input_ids_BT[row, here][None], [-1], True, adapters.pick([row]))
                torch.testing.assert_close(found[row, here], alone[0], rtol=1e-6, atol=1e-6)


def test_run_base_gives_states_of_the_layers_asked_for() -> None:
    student = trained(student_of())
    ids = batch_of(3).input_ids_BT
    with torch.no_grad():
        wanted = student.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        found = student.run_base(ids, [0, -2, -1], True, None)
        for ours, theirs in zip(found, (wanted[1], wanted[3], wanted[4]), strict=True):
            assert torch.equal(ours, theirs)
        (raw,) = student.run_base(ids, [-1], False, None)
        assert torch.equal(student.model.model.norm(raw), wanted[4])
        adapted = student.run_base(ids, [-1], True, student.generate(conditions(3)))[0]
        assert (adapted - wanted[4]).abs().max() > 1e-3
    with pytest.raises(ModelError, match=r"layer 4: the model has 4 layers, 0 to 3"):
        student.run_base(ids, [4], True, None)
