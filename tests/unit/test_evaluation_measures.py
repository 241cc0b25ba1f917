"""Perplexity, divergence, recall and samples: what they count, what they leave alone."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from families import VOCABULARY, packed_batch, tiny_model
from limbeck.config.parts.stages import EvaluateStageOptions, RecallOptions
from limbeck.errors import DataError, ModelError
from limbeck.evaluation import recall as recall_module
from limbeck.evaluation.divergence import DivergenceTally
from limbeck.evaluation.evaluate import evaluate_models
from limbeck.evaluation.perplexity import label_bytes, perplexity
from limbeck.evaluation.recall import probe_batch, recall
from limbeck.evaluation.samples import continuation, default_prompts, end_ids
from limbeck.evaluation.table import comparison_table
from limbeck.models.head import head_of
from limbeck.models.packed import forward_packed
from limbeck.types import IGNORE, Batch, Head

IDS = np.arange(3, VOCABULARY)


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of one character a token, two of them longer than a byte; ids 0-2 are special."""
    alphabet = [*(chr(32 + i) for i in range(VOCABULARY - 5)), "é", "☃"]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


class Rows:
    """Packed rows in memory."""

    sequence = 24

    def __init__(self, number: int = 5):
        self.packed = packed_batch([[9, 5, 7]] * number, padding=3)

    def __len__(self) -> int:
        return len(self.packed.input_ids_BT)

    def batch(self, indices: Any) -> Batch:
        whole = self.packed
        return Batch(
            *(t[list(indices)] for t in (whole.input_ids_BT, whole.labels_BT, whole.position_ids_BT, whole.documents_BT))
        )


def dense_log_probabilities(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Of the labelled positions, one document at a time, without a fused operator: ``[N, V]``."""
    found = []
    for ids_T, documents_T, labels_T in zip(batch.input_ids_BT, batch.documents_BT, batch.labels_BT, strict=True):
        for document in range(int(documents_T.max()) + 1):
            here = documents_T == document
            logits = model(input_ids=ids_T[here][None], use_cache=False).logits[0]
            found.append(logits.log_softmax(-1)[labels_T[here] != IGNORE])
    return torch.cat(found)


@pytest.fixture(scope="module")
def pair() -> dict[str, PreTrainedModel]:
    return {"teacher": tiny_model("qwen3"), "student": tiny_model("qwen3", seed=1)}


@torch.no_grad()
def test_perplexity_is_the_dense_mean_over_labelled_positions(pair: dict[str, PreTrainedModel]) -> None:
    batch = Rows().packed
    labels = batch.labels_BT[batch.label_mask_BT]
    expected = -dense_log_probabilities(pair["teacher"], batch).gather(1, labels[:, None]).mean()
    result = perplexity(pair["teacher"], batch.split(2), letters())
    assert result["ce"] == pytest.approx(float(expected), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(float(expected)), rel=1e-4)
    assert result["tokens"] == len(labels) == 5 * (8 + 4 + 6)
    assert result["bits_per_byte"] == pytest.approx(float(expected) / math.log(2) * len(labels) / result["bytes"], rel=1e-5)


@torch.no_grad()
def divergence(teacher: PreTrainedModel, student: PreTrainedModel, *batches: Batch) -> dict[str, Any]:
    """What the tally makes of packed rows."""
    tally = DivergenceTally()
    for batch in batches:
        hidden_BTD, teacher_BTD = forward_packed(student, batch), forward_packed(teacher, batch)
        tally.add(hidden_BTD, head_of(student), teacher_BTD, head_of(teacher), batch.label_mask_BT)
    return tally.result()


@torch.no_grad()
def test_divergence_is_the_dense_kl_and_nothing_against_oneself(pair: dict[str, PreTrainedModel]) -> None:
    batch = Rows().packed
    teacher, student = (dense_log_probabilities(model, batch) for model in pair.values())
    result = divergence(pair["teacher"], pair["student"], *batch.split(2))
    assert result["kl"] == pytest.approx(float((teacher.exp() * (teacher - student)).sum(-1).mean()), rel=1e-5)
    assert result["agreement"] == pytest.approx(float((teacher.argmax(-1) == student.argmax(-1)).float().mean()))
    assert result["tokens"] == len(teacher)
    itself = divergence(pair["teacher"], pair["teacher"], *batch.split(2))
    assert abs(itself["kl"]) < 1e-6 and itself["agreement"] == 1


def test_teacher_runs_once_a_batch_whatever_the_number_of_students(pair: dict[str, PreTrainedModel]) -> None:
    options = EvaluateStageOptions.model_validate({"from": "a", "rows": 4, "recall": None, "speed": None, "samples": None})
    students = {"a": pair["student"], "b": tiny_model("qwen3", seed=2), "c": tiny_model("qwen3", seed=3)}
    found = []
    for names in ("a", "abc"):
        calls: list[int] = []
        handle = pair["teacher"].model.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        models = {"teacher": pair["teacher"], **{name: students[name] for name in names}}
        assert set(evaluate_models(models, Rows(4), options, letters(), "teacher")["divergence"]) == set(names)
        handle.remove()
        found.append(len(calls))
    assert found[0] == found[1] > 0


def test_bytes_are_those_of_the_predicted_text() -> None:
    snow, accent = letters().convert_tokens_to_ids(["☃", "é"])
    labels = torch.tensor([[IGNORE, snow, 2, accent, 40, IGNORE]])  # three bytes, none (special), two, one
    batch = Batch(torch.zeros_like(labels), labels, torch.zeros_like(labels), torch.tensor([[0, 0, 0, 1, 1, -1]]))
    assert label_bytes(batch, letters()) == 3 + 0 + 2 + 1


def test_made_up_documents_do_not_count_as_text(pair: dict[str, PreTrainedModel]) -> None:
    rows = Rows(4)
    text = perplexity(pair["teacher"], [Batch(**{name: t[:, :9] for name, t in vars(rows.packed).items() if t is not None})])
    # Only the answers of the two later documents count: what is left of the rows as text is their first document.
    rows.packed.labels_BT[:, 10:12] = IGNORE
    rows.packed.labels_BT[:, 15:18] = IGNORE
    options = EvaluateStageOptions.model_validate({"from": "student", "rows": 4, "recall": None, "speed": None, "samples": None})
    assert evaluate_models(pair, rows, options, letters(), None)["perplexity"]["teacher"]["ce"] == pytest.approx(
        text["ce"], rel=1e-5
    )
    # Rows without any text are measured by what labels they have.
    rows.packed.labels_BT[:, 3:5] = IGNORE
    assert evaluate_models(pair, rows, options, letters(), None)["perplexity"]["teacher"]["tokens"] == 4 * (6 + 2 + 3)


def test_text_without_a_label_is_an_error_and_not_a_nan(pair: dict[str, PreTrainedModel]) -> None:
    batch = packed_batch([[1, 1]])
    with pytest.raises(DataError, match="no position of these rows has a label"):
        perplexity(pair["teacher"], [batch])
    with pytest.raises(DataError, match="no position of these rows has a label"):
        divergence(pair["teacher"], pair["student"], batch)


def test_recall_is_the_share_of_the_asked_tokens_that_a_model_knows(
    pair: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def knowing(wrong_rows: int) -> Any:
        def forward(model: PreTrainedModel, batch: Batch) -> Tensor:
            guess_BT = batch.input_ids_BT.roll(-1, 1).clone()
            guess_BT[:wrong_rows] = (guess_BT[:wrong_rows] + 1) % VOCABULARY
            return torch.nn.functional.one_hot(guess_BT, VOCABULARY).float() * 50

        return forward

    monkeypatch.setattr(recall_module, "head_of", lambda model: Head(torch.eye(VOCABULARY)))
    options = RecallOptions(tasks=("repeat", "key_value"), distances=(16, 32), rows=4)
    asked = [probe_batch(t, d, 4, IDS, seed=0).label_mask_BT.sum(1).float() for t in options.tasks for d in options.distances]
    for wrong in (0, 2, 4):
        monkeypatch.setattr(recall_module, "forward_packed", knowing(wrong))
        found = recall(pair["teacher"], options, IDS)
        assert [(entry["task"], entry["distance"]) for entry in found] == [
            (t, d) for t in options.tasks for d in options.distances
        ]
        assert [entry["accuracy"] for entry in found] == pytest.approx([float(a[wrong:].sum() / a.sum()) for a in asked])
        assert [entry["count"] for entry in found] == [int(a.sum()) for a in asked]


def test_head_meets_only_the_answers_of_a_probe(pair: dict[str, PreTrainedModel]) -> None:
    batch = probe_batch("key_value", 32, 4, IDS, seed=0)
    assert 4 <= int(batch.label_mask_BT.sum()) < batch.input_ids_BT.numel() / 4
    rows, columns = batch.label_mask_BT.nonzero(as_tuple=True)
    assert torch.equal(batch.labels_BT[rows, columns], batch.input_ids_BT[rows, columns + 1])


def test_a_probe_does_not_depend_on_what_else_is_asked() -> None:
    first, again, other = (probe_batch("repeat", d, 4, IDS, seed=s).input_ids_BT for d, s in ((32, 0), (32, 0), (32, 1)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_greedy_samples_are_what_generate_writes(pair: dict[str, PreTrainedModel]) -> None:
    model, tokenizer = pair["teacher"], letters()
    prompt = "abc de"
    ids = torch.tensor([tokenizer.encode(prompt)])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert continuation(model, tokenizer, prompt, tokens=12) == tokenizer.decode(expected.tolist(), skip_special_tokens=True)


def test_sampling_repeats_itself_and_moves_no_global_randomness(pair: dict[str, PreTrainedModel]) -> None:
    before = torch.get_rng_state()
    texts = [continuation(pair["teacher"], letters(), "ab", tokens=12, temperature=2.0, seed=s) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(before, torch.get_rng_state())


def test_samples_stop_at_any_of_several_ends(pair: dict[str, PreTrainedModel]) -> None:
    model = pair["teacher"]
    held = model.generation_config.eos_token_id
    whole = continuation(model, letters(), "ab", tokens=12)
    try:
        model.generation_config.eos_token_id = list(range(VOCABULARY))
        assert continuation(model, letters(), "ab", tokens=12) == "" != whole
        model.generation_config.eos_token_id = None
        assert end_ids(model, letters()) == {letters().eos_token_id}
    finally:
        model.generation_config.eos_token_id = held


def test_prompts_begin_where_documents_begin() -> None:
    rows = Rows(5)
    assert rows.packed.documents_BT[0, 14] == 2
    assert default_prompts(rows, letters(), count=2, tokens=5)[0] == letters().decode(
        rows.packed.input_ids_BT[0, 14:19].tolist(), skip_special_tokens=True
    )
    assert len(default_prompts(rows, letters(), count=3, tokens=5)) == 3
    assert len(default_prompts(rows, letters(), count=3, tokens=50)) == 3


def test_evaluation_is_json_and_leaves_the_models_and_the_random_state_as_they_were(pair: dict[str, PreTrainedModel]) -> None:
    options = EvaluateStageOptions.model_validate(
        {
            "kind": "evaluate",
            "from": "student",
            "rows": 4,
            "recall": {"distances": [16], "rows": 2},
            "speed": {"contexts": [32, 64], "tokens": 2},
            "samples": {"tokens": 4, "temperature": 1.0},
        }
    )
    pair["student"].train()
    before, said = torch.get_rng_state(), []
    results = evaluate_models(pair, Rows(), options, letters(), "teacher", progress=said.append)
    assert torch.equal(before, torch.get_rng_state())
    assert pair["student"].training and not pair["teacher"].training
    pair["student"].eval()
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    parts = {"student", "teacher", "setting", "summary", "models", "perplexity", "divergence"}
    assert set(results) == parts | {"recall", "cache", "speed", "samples"}
    assert results["perplexity"]["student"] == perplexity(pair["student"], [Rows().batch(range(4))], letters())
    assert set(results["divergence"]) == {"student"}
    gap = results["perplexity"]["student"]["ce"] - results["perplexity"]["teacher"]["ce"]
    assert results["divergence"]["student"]["ce_gap"] == pytest.approx(gap)
    assert [line.split(":")[0].strip() for line in said] == ["text", "recall", "decode rate and cache", "samples"]
    assert results["student"] == "student" and results["summary"]["kl"] == results["divergence"]["student"]["kl"]
    assert results["summary"]["cache_ratio"] == 1 and results["summary"]["speed_ratio"] > 0
    assert comparison_table(results).row_count > 10


def test_only_what_is_asked_is_measured(pair: dict[str, PreTrainedModel]) -> None:
    options = EvaluateStageOptions.model_validate({"from": "student", "rows": 2, "recall": None, "speed": None, "samples": None})
    results = evaluate_models({"student": pair["student"]}, Rows(), options, letters(), None)
    assert not {"recall", "cache", "speed", "samples"} & set(results) and results["divergence"] == {}
    with pytest.raises(ModelError, match="'master' is not among"):
        evaluate_models(pair, Rows(), options, letters(), "master")


def test_bfloat16_weighs_the_models_in_bfloat16(pair: dict[str, PreTrainedModel]) -> None:
    common = {"from": "student", "rows": 2, "recall": None, "speed": None, "samples": None}
    full, half = (
        evaluate_models(pair, Rows(), EvaluateStageOptions.model_validate({**common, "precision": p}), letters(), "teacher")
        for p in ("float32", "bfloat16")
    )
    difference = abs(full["perplexity"]["teacher"]["ce"] - half["perplexity"]["teacher"]["ce"])
    assert 0 < difference < 0.05


def test_shapes_of_a_head_reach_the_measure() -> None:
    model = tiny_model("gemma2")  # soft-capped logits
    assert head_of(model).softcap is not None
    batch = packed_batch([[12]])
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids_BT, use_cache=False).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, batch.labels_BT[0, :-1])
    assert perplexity(model, [batch])["ce"] == pytest.approx(float(expected), rel=1e-5)
