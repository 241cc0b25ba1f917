"""Calibration of fresh mixers: what is measured of the attention, what a mixer takes from it, and that it is done once."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from families import packed_batch, tiny_model
from limbeck.config.load import load_recipe
from limbeck.config.parts.stages import StudentOptions
from limbeck.config.parts.teachers import SelfTeacherOptions
from limbeck.data.dataset import TokenRows
from limbeck.engine.loop import Trainer
from limbeck.engine.parallel import World
from limbeck.models.loading import load_model, save_model
from limbeck.models.structure import attention_view
from limbeck.ops.attention_reach import Reach, attention_reach, bounded_gains, head_products
from limbeck.stages import calibrating
from limbeck.stages.run import open_stage, run_recipe
from limbeck.stages.train import student_of
from limbeck.students import calibration
from limbeck.students.mixers.base import RATES, Measured, Mixer
from limbeck.students.mixers.linear import inverse_softplus
from limbeck.students.student import build_student
from limbeck.teachers.self_teacher import SelfTeacher
from limbeck.types import Batch
from mixer_cases import CASES, Bench, options_of

DECAYING = ("gated_deltanet", "gated_deltanet-native", "kda", "gla", "gla-normed", "mamba2", "rwkv7")
"""Cases whose first gate is a log decay, the same for all channels of a head."""
FIXED = ("lightning", "lightning-normed", "deltanet", "gated_deltanet-plain")
LOOSE = ("swa", "path")


def naive(q: Tensor, k: Tensor, documents: Tensor, scaling: float, softcap: float | None, window: int | None) -> Reach:
    """One query at a time."""
    rows, heads, length = q.shape[:3]
    distance, queries = torch.zeros(heads, dtype=torch.float64), 0
    for b in range(rows):
        for i in range(length):
            if documents[b, i] < 0:
                continue
            seen = [j for j in range(i + 1) if documents[b, j] == documents[b, i] and (window is None or i - j < window)]
            queries += 1
            for h in range(heads):
                scores = torch.stack([q[b, h, i] @ k[b, h * k.shape[1] // heads, j] for j in seen]) * scaling
                weights = (scores if softcap is None else softcap * torch.tanh(scores / softcap)).softmax(0)
                distance[h] += sum(w * (i - j) for w, j in zip(weights, seen, strict=True))
    return Reach(distance, torch.tensor(queries))


@pytest.mark.parametrize(("softcap", "window"), [(None, None), (3.0, 4)])
def test_reach_is_that_of_a_loop_over_queries(softcap: float | None, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    documents = packed_batch([[7, 6], [1, 12]], padding=3).documents_BT
    q, k = (torch.randn(2, heads, 16, 5, dtype=torch.float64, generator=generator) for heads in (4, 2))
    found = attention_reach(q, k, documents, scaling=0.7, softcap=softcap, window=window, block=5)
    expected = naive(q, k, documents, 0.7, softcap, window)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0, check_dtype=False)


def test_reach_adds_up_over_rows_and_does_not_see_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = packed_batch([[7, 6], [5, 8], [2, 11]], padding=3)
    q, k = (torch.randn(3, 4, 16, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    whole = attention_reach(q, k, batch.documents_BT, scaling=1.0)
    parts = [attention_reach(q[i : i + 1], k[i : i + 1], batch.documents_BT[i : i + 1], scaling=1.0) for i in range(3)]
    noise = torch.where(batch.token_mask_BT[:, None, :, None], 0.0, 9.0)
    padded = attention_reach(q + noise, k - noise, batch.documents_BT, scaling=1.0)
    for total, split, moved in zip(whole, parts[0].plus(parts[1]).plus(parts[2]), padded, strict=True):
        torch.testing.assert_close(split, total, rtol=1e-12, atol=0)
        torch.testing.assert_close(moved, total, rtol=1e-12, atol=0)


def test_an_even_mean_has_half_the_distance() -> None:
    zeros = torch.zeros(1, 1, 41, 4)
    distance_H = attention_reach(zeros, zeros, torch.zeros(1, 41, dtype=torch.long), scaling=1.0).mean()
    assert distance_H.item() == pytest.approx(10.0, rel=1e-5)  # the mean of i / 2 over i = 0 ... 40


@pytest.mark.parametrize("case", DECAYING)
def test_half_the_memory_is_gone_after_the_measured_distance(case: str, double: None) -> None:
    bench = Bench(options_of(case), stirred=False)
    distance_H = torch.tensor([2.0, 5.0, 40.0, 300.0])
    names = bench.mixer.calibrate(Measured(distance_H))
    assert names and set(names) <= {name for name, _ in bench.mixer.named_parameters()}
    decay = bench.mixer._gates(torch.zeros(1, 1, bench.width))[0].exp()
    kept = decay.reshape(4, -1) ** distance_H[:, None]
    torch.testing.assert_close(kept, torch.full_like(kept, 0.5), rtol=1e-9, atol=0)


def test_half_open_gates_and_slots_follow_the_distance_too(double: None) -> None:
    distance_H = torch.tensor([2.0, 5.0, 40.0, 300.0])
    measured = Measured(distance_H)
    hgrn, gsa = (Bench(options_of(case), stirred=False) for case in ("hgrn", "gsa"))
    hgrn.mixer.calibrate(measured)
    span_H = hgrn.mixer._gates(torch.zeros(1, 1, hgrn.width))[0].flatten()
    torch.testing.assert_close(span_H / 2, math.log(2) / distance_H)
    gsa.mixer.calibrate(measured)
    rates_HM = -gsa.mixer._gates(torch.zeros(1, 1, gsa.width))[0][0, 0]
    torch.testing.assert_close(rates_HM.log().mean(-1).exp(), math.log(2) / distance_H)
    assert (rates_HM.amax(-1) / rates_HM.amin(-1)).min() > 50


@pytest.mark.parametrize("case", CASES)
def test_every_mixer_takes_any_distance_and_stays_finite(case: str) -> None:
    bench = Bench(options_of(case), stirred=False)
    before = {name: p.clone() for name, p in bench.mixer.named_parameters()}
    names = bench.mixer.calibrate(Measured(torch.tensor([0.0, 1.0, 7.0, 1e9]).double()))
    names += bench.mixer.scale_heads(torch.tensor([0.1, 1, 2, 10]).double())
    changed = [name for name, p in bench.mixer.named_parameters() if not torch.equal(p, before[name])]
    assert sorted(changed) == sorted(names)
    assert (not names) == (case.partition("-")[0] in LOOSE)
    assert case not in FIXED or names == ["o_proj.weight"]
    assert bench(bench.inputs(1, 9)).isfinite().all()


def test_rates_stay_where_every_forget_gate_can_have_them() -> None:
    rates_H = Measured(torch.tensor([0.0, 1.0, 1e9]).double()).rates_H
    assert rates_H.tolist() == [RATES[1], RATES[1], RATES[0]]


def test_a_known_scale_of_every_head_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    heads_NQ, weight_DQ = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((50, 12), (7, 12)))
    scales_H = torch.tensor([0.3, 1.0, 2.0, 9.0], dtype=torch.float64)
    target_ND = (heads_NQ * scales_H.repeat_interleave(3)) @ weight_DQ.mT
    halves = [head_products(part, weight_DQ, target, 4) for part, target in zip(heads_NQ.split(20), target_ND.split(20), strict=True)]
    gram_HH, cross_H = (sum(parts) for parts in zip(*halves, strict=True))
    torch.testing.assert_close(bounded_gains(gram_HH, cross_H, (0.1, 10.0)), scales_H, rtol=1e-6, atol=0)
    bounded = bounded_gains(gram_HH, cross_H, (0.5, 4.0))
    assert bounded.min() >= 0.5 and bounded.max() <= 4.0

    def error(gain_H: Tensor) -> float:
        return float(((heads_NQ * gain_H.repeat_interleave(3)) @ weight_DQ.mT - target_ND).square().sum())

    # No corner and no single clipped head is better than what was found.
    tried = [torch.ones_like(bounded), scales_H.clamp(0.5, 4.0), *(bounded.clone().index_fill(0, torch.tensor([h]), v) for h in range(4) for v in (0.6, 3.9))]
    assert all(error(bounded) <= error(gain_H) * (1 + 1e-9) for gain_H in tried)


def test_a_silent_head_keeps_its_scale() -> None:
    gains_H = bounded_gains(torch.diag(torch.tensor([0.0, 2.0]).double()), torch.tensor([0.0, 6.0]).double(), (0.1, 10.0))
    assert gains_H.tolist() == [1.0, 3.0]


class Place:
    """A tiny base as teacher, fresh mixers, and a batch of packed rows."""

    def __init__(self, folder: Path, case: str = "gated_deltanet", family: str = "qwen3"):
        save_model(tiny_model(family), folder)
        self.teacher = SelfTeacher(SelfTeacherOptions(), str(folder))
        self.teacher.load("cpu")
        self.views = {layer: attention_view(self.teacher.model, layer) for layer in range(2)}
        self.case, self.family = case, family
        self.batch = packed_batch([[9, 14], [20, 3], [5, 18]], padding=4)

    def mixers(self) -> dict[int, Mixer]:
        torch.manual_seed(0)
        return {layer: Bench(options_of(self.case), self.family, layer=layer, stirred=False).mixer for layer in range(2)}

    def measure(self, *batches: Batch) -> dict[int, calibration.LayerRecord]:
        return calibration.measure(self.mixers(), self.views, self.teacher.stream, batches)

    def residuals(self, mixers: dict[int, Mixer]) -> dict[int, float]:
        found, mask = {}, self.batch.token_mask_BT

        def visit(layer: int, inputs: Tensor, outputs: Tensor, kwargs: dict[str, Any]) -> None:
            if layer in mixers:
                error = (mixers[layer](inputs, **kwargs)[0] - outputs)[mask].square().sum()
                found[layer] = float(error / outputs[mask].square().sum())

        self.teacher.stream(self.batch, visit)
        return found


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi3", "mistral"])
def test_what_is_measured_is_what_the_family_attends_to(tmp_path: Path, family: str) -> None:
    place = Place(tmp_path, family=family)
    model = place.teacher.model
    ids = place.batch.input_ids_BT[:1, :9]
    model.set_attn_implementation("eager")
    weights = [a[0].double() for a in model(ids, output_attentions=True, use_cache=False).attentions[:2]]
    single = Batch(ids, ids, torch.arange(9)[None], torch.zeros_like(ids))
    records = place.measure(single)
    steps = torch.arange(9)
    for layer, weight_HTS in enumerate(weights):
        distance_H = (weight_HTS * (steps[:, None] - steps)).sum(-1).mean(-1)
        torch.testing.assert_close(torch.tensor(records[layer].distance).double(), distance_H, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["gated_deltanet", "gla", "mamba2", "gated_deltanet-native"])
def test_the_calibrated_mixer_has_the_residual_that_was_promised(tmp_path: Path, case: str) -> None:
    place = Place(tmp_path, case)
    records, mixers = place.measure(place.batch), place.mixers()
    fresh = place.residuals(mixers)
    calibration.apply(mixers, records)
    calibrated = place.residuals(mixers)
    for layer, record in records.items():
        assert record.residual == pytest.approx((fresh[layer], calibrated[layer]), rel=1e-4)
        assert record.residual[1] <= record.residual[0]


def test_micro_batches_and_packing_do_not_change_what_is_measured(tmp_path: Path) -> None:
    place = Place(tmp_path)
    whole, split = place.measure(place.batch), place.measure(*place.batch.split(1))
    alone = []
    for row in place.batch.split(1):
        for document in range(2):
            inside = row.documents_BT[0] == document
            ids, labels, positions = (part[:, inside] for part in (row.input_ids_BT, row.labels_BT, row.position_ids_BT))
            alone.append(Batch(ids, labels, positions, torch.zeros_like(ids)))
    unpacked = place.measure(*alone)
    for layer in whole:
        for other in (split[layer], unpacked[layer]):
            for name in ("distance", "gain", "residual"):
                assert getattr(other, name) == pytest.approx(getattr(whole[layer], name), rel=2e-4), name


def test_measuring_again_gives_the_same_bits_and_a_file_brings_them_back(tmp_path: Path) -> None:
    place = Place(tmp_path)
    first, second = place.measure(place.batch), place.measure(place.batch)
    assert first == second == calibration.from_json(json.loads(json.dumps(calibration.to_json(first))))
    one, two = place.mixers(), place.mixers()
    calibration.apply(one, first)
    calibration.apply(two, second)
    for layer in one:
        for a, b in zip(one[layer].parameters(), two[layer].parameters(), strict=True):
            assert torch.equal(a, b)


RECIPE = """
name: calibrated
stages:
  pretrain:
    data: {source: {kind: text, path: text.txt}, tokenizer: {vocabulary: 300}, sequence: 16, held_out: 0}
    student:
      config: {model_type: qwen3, vocab_size: 400, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 3, num_attention_heads: 2,
               num_key_value_heads: 1, head_dim: 8, max_position_embeddings: 64}
    optim: {groups: [{lr: 1e-3}]}
    loop: {steps: 1, batch_tokens: 32, precision: float32}
  align:
    data: {from: pretrain}
    student:
      base: {from: pretrain}
      surgery: [{kind: hybridize, mixer: gated_deltanet, calibration_rows: 6, keep: [0]}]
      train: ["model.layers.*.self_attn.g_proj.*"]
    teacher: {kind: self}
    objectives: [{kind: attention_alignment}]
    optim: {groups: [{lr: 1e-3}]}
    loop: {steps: 2, batch_tokens: 32, precision: float32}
  straight:
    data: {from: pretrain}
    student: {base: {from: pretrain}, surgery: [{kind: hybridize, mixer: gated_deltanet, calibration_rows: 6, keep: [0]}]}
    teacher: {kind: local, model: {from: pretrain}}
    objectives: [{kind: kl}]
    optim: {groups: [{lr: 1e-3}]}
    loop: {steps: 1, batch_tokens: 32, precision: float32}
"""


def forbidden(*args: Any) -> Any:
    raise AssertionError("measured a second time")


def test_a_stage_measures_once_and_every_start_and_rank_has_the_same_mixers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("".join(f"{i} bottles of beer on the wall, take {i % 7} down. " for i in range(80)))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe, run = load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run"
    said: list[str] = []

    def start(stage: str) -> None:
        run_recipe(recipe, recipe_dir=tmp_path, run_dir=run, stage=stage, say=said.append)

    start("pretrain")
    start("straight")
    for stage in ("pretrain", "straight"):
        assert not (run / stage / "calibration.json").exists(), "only a teacher that streams attention has something to measure"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "run", lambda self: (_ for _ in ()).throw(KeyboardInterrupt("killed")))
        start("align")
    records = calibration.from_json(json.loads((run / "align" / "calibration.json").read_text()))
    assert sorted(records) == [1, 2]
    monkeypatch.setattr(calibrating, "measure", forbidden)
    start("align")
    assert sum("calibrated on 6 rows: heads look" in str(line) for line in said) == 2
    trained = load_model(str(run / "align" / "model")).mixers()
    context = replace(open_stage(run / "align"), world=World(torch.device("cpu"), rank=1), say=said.append)
    student = student_of(context, context.options.student, seed=0, dtype=torch.float32)
    calibrating.calibrate(context, student, SimpleNamespace(stream=forbidden), TokenRows(context.data(context.options.data)[0], "train"))
    for layer, record in records.items():
        assert record.measured is not None
        assert torch.equal(trained[layer].dt_bias, inverse_softplus(record.measured.rates_H).float())
        # What does not train is in no checkpoint: it is set again at every start, and by every rank.
        for name in ("dt_bias", "o_proj.weight"):
            assert torch.equal(student.mixers()[layer].get_parameter(name), trained[layer].get_parameter(name)), name


def test_nothing_is_calibrated_where_the_recipe_says_so(tmp_path: Path) -> None:
    options = {"base": str(tmp_path), "surgery": [{"kind": "hybridize", "calibration_rows": 0}]}
    save_model(tiny_model("qwen3"), tmp_path)
    student = build_student(StudentOptions.model_validate(options), str, seed=0, dtype=torch.float32)
    assert calibrating.calibrated_layers(student) == {}
    options["surgery"] = [{"kind": "hybridize", "calibration_rows": 5, "keep": [1]}]
    student = build_student(StudentOptions.model_validate(options), str, seed=0, dtype=torch.float32)
    assert calibrating.calibrated_layers(student) == {0: 5, 2: 5, 3: 5}
