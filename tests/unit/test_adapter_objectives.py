"""Objectives on adapters: against plain formulas, and the same however a batch is split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapter_cases import (
    adapted_output,
    gradients,
    ragged_rows,
    random_adapters,
    runner,
    small_model,
    small_spec,
    wanting_gradients,
)
from limbeck.adapters.deltas import DeltaSignal, embed
from limbeck.adapters.inject import Injector
from limbeck.adapters.spec import Adapters, AdapterSpec
from limbeck.config.parts.adapters import RepresentationOptions
from limbeck.config.parts.objectives import OBJECTIVES
from limbeck.engine.batches import padding_like
from limbeck.engine.step import TrainStep
from limbeck.errors import AdapterError, RunError
from limbeck.models.head import head_of
from limbeck.needs import AdapterFactors, Deltas, InputMoments, Need, merge_needs
from limbeck.stages.probing import padded, with_continuations
from limbeck.students.generator.heads import key_of
from limbeck.types import IGNORE, Batch, Output, Signal

SETTINGS: dict[str, dict[str, Any]] = {
    "product": {"kind": "weights"},
    "whitened": {"kind": "weights", "loss": "whitened"},
    "canonical": {"kind": "weights", "loss": "canonical"},
    "mse": {"kind": "weights", "loss": "mse"},
    "delta": {"kind": "delta"},
    "delta in lots": {"kind": "delta", "microbatch": 2},
    "delta mse": {"kind": "delta", "loss": "mse"},
    "delta cosine": {"kind": "delta", "loss": "cosine"},
    "tether": {"kind": "tether"},
    "tether in lots": {"kind": "tether", "microbatch": 2, "chunk": 5},
    "norms of factors": {"kind": "norm_penalty"},
    "norms of products": {"kind": "norm_penalty", "of": "product"},
}
OWNERS = [0, 1, -1, 2, 1]
LENGTHS = (6, 4)


def build(name: str) -> Any:
    settings = SETTINGS[name]
    return OBJECTIVES.build(OBJECTIVES.options(settings["kind"]).model_validate(settings))


def batch_of(owners: list[int]) -> Batch:
    """Rows that name their condition; a row's first token is its number in the batch."""
    count = len(owners)
    ids = torch.arange(count)[:, None].repeat(1, 4)
    labels = torch.full_like(ids, IGNORE)
    return Batch(ids, labels, torch.arange(4).repeat(count, 1), torch.zeros_like(ids), adapters_B=torch.tensor(owners))


class World:
    """A base, teachers for three conditions, their deltas, and moments."""

    def __init__(self, dtype: torch.dtype = torch.float64, represent: RepresentationOptions | None = None):
        self.model = small_model(dtype=dtype)
        self.spec = small_spec(self.model)
        self.injector = Injector(self.model, self.spec)
        self.teachers = random_adapters(self.spec, 3, seed=5, dtype=dtype)
        self.probes = padded(ragged_rows(LENGTHS))
        self.represent = represent or RepresentationOptions()
        run = runner(self.model, self.injector)
        with torch.no_grad():
            self.deltas = embed(run, self.teachers, self.probes, self.represent) - embed(run, None, self.probes, self.represent)
        generator = torch.Generator().manual_seed(2)
        self.moments = {}
        for site in self.spec.sites:
            x = torch.randn(len(site.layers), 7, site.in_features, generator=generator, dtype=torch.float64).to(dtype)
            self.moments[site.name] = x.mT @ x / 7
        self.module = None

    def signal(self, batch: Batch, needs: Mapping[type[Need], Need] | None = None) -> Signal:
        """As the teacher of adapters answers: padding gets some adapter or other."""
        assert batch.adapters_B is not None
        chosen = batch.adapters_B.clamp_min(0)
        answer = DeltaSignal(self.deltas[chosen], self.probes, self.represent)
        return Signal({AdapterFactors: self.teachers.pick(chosen), Deltas: answer, InputMoments: self.moments})

    def output(self, adapters: Adapters) -> Any:
        return adapted_output(self.model, self.injector, adapters)

    def loss(self, name: str, adapters: Adapters, owners: list[int]) -> Tensor:
        """An objective's sum over rows."""
        batch = batch_of(owners)
        return build(name)(self.output(adapters), self.signal(batch), batch).sum


@pytest.fixture(scope="module")
def world() -> World:
    return World()


# -- formulas --------------------------------------------------------------------------------------------------------------


def test_products_are_compared_as_dense_matrices_are(world: World) -> None:
    # Another rank and scale than the teacher's: dW is all that counts.
    spec = AdapterSpec(world.spec.sites, 3, 1.5)
    found = random_adapters(spec, 3, seed=8)
    for name, moments in (("product", None), ("whitened", world.moments)):
        wanted = 0.0
        for n in range(3):
            above = below = 0.0
            for site in spec.sites:
                for layer in range(len(site.layers)):
                    target = world.teachers.change(site.name)[n, layer]
                    moment = torch.eye(site.in_features, dtype=torch.float64) if moments is None else moments[site.name][layer]
                    gap = found.change(site.name)[n, layer] - target
                    above += float(torch.trace(gap @ moment @ gap.T))
                    below += float(torch.trace(target @ moment @ target.T))
            wanted += above / below
        assert float(world.loss(name, found, [0, 1, 2])) == pytest.approx(wanted, rel=1e-9)
        assert float(world.loss(name, world.teachers, [0, 1, 2])) < 1e-20


def test_mse_is_the_mean_over_all_numbers_of_a_and_b(world: World) -> None:
    found = random_adapters(world.spec, 2, seed=8)
    wanted = 0.0
    for n, owner in enumerate((2, 0)):
        own, theirs = (torch.cat([t[i].flatten() for t in lot.tensors()]) for lot, i in ((found, n), (world.teachers, owner)))
        wanted += float((own - theirs).square().mean())
    assert float(world.loss("mse", found, [2, 0])) == pytest.approx(wanted, rel=1e-12)


def test_only_the_plain_mse_sees_the_teachers_gauge(world: World) -> None:
    found = random_adapters(world.spec, 3, seed=8)
    mixing = torch.tensor([[0.3, -1.2], [2.0, 0.7]], dtype=torch.float64)
    turned = replace(
        world.teachers,
        A={name: torch.linalg.inv(mixing) @ A for name, A in world.teachers.A.items()},
        B={name: B @ mixing for name, B in world.teachers.B.items()},
    )
    batch = batch_of([0, 1, 2])
    for name in ("product", "whitened", "canonical", "mse"):
        values = [
            float(build(name)(world.output(found), Signal({AdapterFactors: lot, InputMoments: world.moments}), batch).sum)
            for lot in (world.teachers, turned)
        ]
        if name == "mse":
            assert abs(values[1] - values[0]) > 0.01 * values[0]
        else:
            assert values[1] == pytest.approx(values[0], rel=1e-9)


def test_factors_of_another_rank_cannot_be_compared(world: World) -> None:
    found = random_adapters(AdapterSpec(world.spec.sites, 3, 1.5), 1)
    message = r"'mse' compares A and B, and the generator's have rank 3 and scale 0\.5, its teachers' rank 2.*the same, or set `loss: product`"
    with pytest.raises(AdapterError, match=message):
        world.loss("mse", found, [0])


def test_norm_penalties_are_mean_squares(world: World) -> None:
    found = random_adapters(world.spec, 2, seed=8)
    factors = products = 0.0
    for n in range(2):
        for lot in (found.A, found.B):
            factors += float(torch.cat([t[n].flatten() for t in lot.values()]).square().mean())
        products += float(torch.cat([found.change(site.name)[n].flatten() for site in found.spec.sites]).square().mean())
    assert float(world.loss("norms of factors", found, [0, 1])) == pytest.approx(factors, rel=1e-12)
    assert float(world.loss("norms of products", found, [0, 1])) == pytest.approx(products, rel=1e-9)


@pytest.mark.parametrize("name", ["tether", "tether in lots"])
def test_a_tether_is_the_kl_of_each_probe_token_and_zero_at_the_base(world: World, name: str) -> None:
    found = random_adapters(world.spec, 3, seed=8)
    wanted = 0.0
    count = sum(LENGTHS)
    with torch.no_grad():
        for row in ragged_rows(LENGTHS):
            ids = torch.tensor([row])
            base = world.model(ids).logits.log_softmax(-1)
            for n in range(3):
                with world.injector.active(found.pick([n])):
                    adapted = world.model(ids).logits.log_softmax(-1)
                wanted += float((base.exp() * (base - adapted)).sum()) / count
    assert float(world.loss(name, found, [0, 1, 2])) == pytest.approx(wanted, rel=1e-6)
    assert wanted > 1e-3
    nothing = replace(found, B={name: torch.zeros_like(B) for name, B in found.B.items()})
    assert abs(float(world.loss(name, nothing, [0, 1, 2]))) < 1e-12


def test_delta_losses_are_their_formulas_with_metrics_beside_them(world: World) -> None:
    found = random_adapters(world.spec, 2, seed=8)
    run = runner(world.model, world.injector)
    with torch.no_grad():
        own = embed(run, found, world.probes, world.represent) - embed(run, None, world.probes, world.represent)
    target = world.deltas[[2, 1]]
    cosine = torch.nn.functional.cosine_similarity(own, target)
    wanted = {
        "delta": float(((own - target).square().sum(1) / target.square().sum(1)).sum()),
        "delta mse": float((own - target).square().mean(1).sum()),
        "delta cosine": float((1 - cosine).sum()),
    }
    batch = batch_of([2, 1])
    for name, value in wanted.items():
        term = build(name)(world.output(found), world.signal(batch), batch)
        assert float(term.sum) == pytest.approx(value, rel=1e-9)
        sums = {key: (float(total), int(count)) for key, (total, count) in term.metrics.items()}
        assert sums["delta_cosine"] == (pytest.approx(float(cosine.sum())), 2)
        assert sums["delta_ratio"] == (pytest.approx(float((own.norm(dim=1) / target.norm(dim=1)).sum())), 2)
        assert sums["delta_norm"][0] == pytest.approx(float(own.norm(dim=1).sum()))
        assert sums["delta_teacher_norm"][0] == pytest.approx(float(target.norm(dim=1).sum()))


def test_likelihoods_of_continuations_are_matched_like_states(world: World) -> None:
    options = RepresentationOptions(what="likelihoods", continuations=2, continuation_tokens=3)
    probes = with_continuations(world.model, world.probes, options, seed=1)
    read = partial(embed, runner(world.model, world.injector), probes=probes, options=options, head=head_of(world.model))
    with torch.no_grad():
        base, teachers = read(None), read(world.teachers)
    batch = batch_of([0, 2])
    found = random_adapters(world.spec, 2, seed=8).map(lambda t: t.requires_grad_())
    signal = Signal({Deltas: DeltaSignal((teachers - base)[[0, 2]], probes, options)})
    term = build("delta")(world.output(found), signal, batch)
    own = read(found) - base
    wanted = ((own - (teachers - base)[[0, 2]]).square().sum(1) / (teachers - base)[[0, 2]].square().sum(1)).sum()
    assert float(term.sum.detach()) == pytest.approx(float(wanted.detach()), rel=1e-9)
    term.sum.backward()
    assert all(t.grad is not None and bool(t.grad.any()) for t in found.tensors())


@pytest.mark.parametrize("name", SETTINGS)
def test_an_adapter_that_does_nothing_has_a_finite_gradient(world: World, name: str) -> None:
    start = random_adapters(world.spec, 3, seed=8)
    leaves = wanting_gradients(replace(start, B={key: torch.zeros_like(B) for key, B in start.B.items()}))
    world.loss(name, leaves, [0, 1, 2]).backward()
    found = gradients(leaves)
    assert bool(found.isfinite().all())
    if name not in ("tether", "tether in lots", "norms of products"):
        assert float(found.abs().max()) > 0


# -- batches ---------------------------------------------------------------------------------------------------------------


class Free(nn.Module):
    """A student whose every row has a LoRA of its own, by the row's first token."""

    def __init__(self, world: World, count: int):
        super().__init__()
        adapters = random_adapters(world.spec, count, seed=8, dtype=next(iter(world.teachers.A.values())).dtype)
        self.A = nn.ParameterDict({key_of(site): nn.Parameter(adapters.A[site.name]) for site in world.spec.sites})
        self.B = nn.ParameterDict({key_of(site): nn.Parameter(adapters.B[site.name]) for site in world.spec.sites})
        self._world = (world,)

    def forward(self, batch: Batch) -> Any:
        world, rows = self._world[0], batch.input_ids_BT[:, 0]
        factors = [{site.name: kept[key_of(site)][rows] for site in world.spec.sites} for kept in (self.A, self.B)]
        return world.output(Adapters(world.spec, *factors))


def step_in_parts(world: World, names: list[str], parts: list[Batch]) -> tuple[Tensor, list[Tensor], dict[str, float]]:
    """One step as the engine takes it: loss, gradients of the student and metrics."""
    student = Free(world, len(OWNERS))
    objectives = [build(name) for name in names]
    needs = merge_needs(need for name in names for need in OBJECTIVES.options(SETTINGS[name]["kind"]).model_validate(SETTINGS[name]).needs())
    step = TrainStep(student, objectives, world, needs)  # type: ignore[arg-type]
    counts = sum(step.counts(part) for part in parts)
    assert isinstance(counts, Tensor)
    scales = [weight / max(int(count), 1) for weight, count in zip(step.weights(0), counts, strict=True)]
    metrics: dict[str, list[float]] = {}
    for part in parts:
        _, signal = step.answer(part)
        for name, (total, count) in step.run(part, signal, scales).items():
            held = metrics.setdefault(name, [0.0, 0.0])
            held[0], held[1] = held[0] + float(total), held[1] + float(count)
    loss = torch.tensor(metrics.pop("loss")[0], dtype=torch.float64)
    return loss, [p.grad.clone() for p in student.parameters() if p.grad is not None], {k: a / b for k, (a, b) in metrics.items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_splitting_a_batch_changes_no_gradient_and_padding_rows_do_not_count(name: str) -> None:
    world = World(torch.float32)
    whole = batch_of(OWNERS)
    loss, wanted, numbers = step_in_parts(world, [name], [whole])
    size = torch.stack([g.norm() for g in wanted]).norm()
    assert float(size) > 0 and all(not g[OWNERS.index(-1)].any() for g in wanted)
    without = [part for i, part in enumerate(whole.split(1)) if OWNERS[i] >= 0]
    ways = {"by ones": whole.split(1), "by twos": whole.split(2), "without padding": without, "with padding": [*whole.split(2), padding_like(whole)]}
    for way, parts in ways.items():
        other, found, others = step_in_parts(world, [name], list(parts))
        assert float((other - loss).abs() / loss) < 1e-6, way
        assert float(torch.stack([(a - b).norm() for a, b in zip(found, wanted, strict=True)]).norm() / size) < 1e-6, way
        assert others == pytest.approx(numbers, rel=1e-5), way


def test_all_objectives_together_are_the_sum_of_each() -> None:
    world = World()
    names = ["product", "delta in lots", "tether", "norms of factors"]
    loss, found, numbers = step_in_parts(world, names, list(batch_of(OWNERS).split(2)))
    alone = [step_in_parts(world, [name], [batch_of(OWNERS)]) for name in names]
    assert float(loss) == pytest.approx(sum(float(part[0]) for part in alone), rel=1e-9)
    for i, gradient in enumerate(found):
        torch.testing.assert_close(gradient, sum(part[1][i] for part in alone), rtol=1e-8, atol=1e-12)
    assert {"lora_ratio", "delta_cosine", "delta_norm", "delta_teacher_norm", "tether", "lora_norm", "weights/weighted", "delta/weighted"} <= set(numbers)


def test_objectives_on_adapters_refuse_a_student_that_makes_none(world: World) -> None:
    batch = batch_of([0, 1])
    plain = Output(torch.zeros(2, 4, 32), head_of(world.model))
    for name, settings in SETTINGS.items():
        with pytest.raises(RunError, match=rf"objective '{settings['kind']}' is about generated adapters: .* 'lora_generator'"):
            build(name)(plain, world.signal(batch), batch)


def test_text_without_conditions_counts_no_adapter() -> None:
    batch = replace(batch_of([0, 1]), adapters_B=None)
    assert all(int(build(name).count(batch)) == 0 for name in SETTINGS)
