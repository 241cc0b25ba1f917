"""Numbers of the adapters' evaluation against plain ones: losses, shares, intervals, ranks and mixes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapter_cases import base_folder, changed_model, random_adapters, small_spec
from condition_cases import build, rows
from limbeck.adapters.gauge import align, norms
from limbeck.adapters.inject import Injector
from limbeck.adapters.merge import merge
from limbeck.adapters.spec import Adapters
from limbeck.config.parts.adapters import RepresentationOptions
from limbeck.data.conditions.store import ConditionSet
from limbeck.evaluation.adapters import BASE, TEACHER, Judged, delta_numbers, shares, size_ratio, summarise
from limbeck.evaluation.bootstrap import paired, spearman
from limbeck.evaluation.composition import MIX, SUM, compose
from limbeck.models.loading import load_model
from limbeck.stages.probing import padded
from limbeck.types import IGNORE


class World:
    """Conditions of two sources with two mixes, a base, and an adapter for each condition."""

    def __init__(self, folder: Path):
        sources = [rows(folder, "pump", count=60), rows(folder, "ledger", count=60)]
        self.conditions: ConditionSet = build(folder, sources, formats=["plain", "upper"], examples=20, test_examples=5, mixes=2)
        self.model = load_model(str(base_folder(folder / "base")))
        spec = small_spec(self.model)
        own = random_adapters(spec, len(self.conditions), dtype=torch.float32)
        self.mixes = [c for c in self.conditions.conditions if c.split == "mix"]
        self.seen = self.conditions.split("seen")
        # Mixed teachers that are exactly what their parts are together.
        lots = [own.pick([i]) for i in self.seen]
        lots += [merge(own.pick(list(c.parts)), [1.0, 1.0], method="task_arithmetic", rank=4).adapters for c in self.mixes]
        assert [c.id for c in self.conditions.conditions] == [*self.seen, *(c.id for c in self.mixes)]
        self.teachers = align(lots)

    def judged(self, together: int = 3, count: int = 2) -> Judged:
        return Judged(self.model, Injector(self.model, self.teachers.spec), self.conditions, count, together)

    def teacher(self, ids: Sequence[int]) -> Adapters:
        return self.teachers.pick(list(ids))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("judged"))


# -- losses and shares -----------------------------------------------------------------------------------------------------


def test_a_loss_is_that_of_each_conditions_own_test_text(world: World) -> None:
    one = world.teachers.pick([1])
    columns = {BASE: lambda ids: None, TEACHER: world.teacher, "one for all": lambda ids: one}
    found = world.judged().nll(world.seen, columns)
    again = world.judged(together=1).nll(world.seen, columns)
    for k, i in enumerate(world.seen):
        text = world.conditions.rows([i], "test")
        batch = text.batch(list(text.rows_of(i))[:2])
        for name, model in (
            (BASE, world.model), (TEACHER, changed_model(world.model, world.teachers, i)), ("one for all", changed_model(world.model, one, 0)),
        ):  # fmt: skip
            losses = []
            for row in range(len(batch.input_ids_BT)):
                for document in batch.documents_BT[row].unique().tolist():
                    at = batch.documents_BT[row] == document
                    if document < 0:
                        continue
                    labels = batch.labels_BT[row][at]
                    with torch.no_grad():
                        logs = model(batch.input_ids_BT[row][at][None]).logits[0].double().log_softmax(-1)
                    losses += [-float(logs[t, label]) for t, label in enumerate(labels.tolist()) if label != IGNORE]
            assert found[name][k] == pytest.approx(np.mean(losses), rel=1e-5), (name, k)
            assert again[name][k] == pytest.approx(found[name][k], rel=1e-6)


def test_a_perfect_generator_has_all_of_the_gain_and_the_base_none(world: World) -> None:
    columns = {BASE: lambda ids: None, TEACHER: world.teacher, "perfect": world.teacher}
    nll = world.judged().nll(world.seen, columns)
    own = shares(nll)
    assert np.allclose(own["perfect"], 1) and np.allclose(own[TEACHER], 1) and not own[BASE].any()
    table = summarise([world.conditions.conditions[i] for i in world.seen], nll, "perfect", resamples=100)["seen"]
    assert table["share"]["perfect"] == 1 and table["share"][BASE] == 0 and table["conditions"] == len(world.seen)
    assert table["lead"][TEACHER] == [0, 0, 0]


def test_a_summary_is_made_of_the_conditions_of_its_split(world: World) -> None:
    chosen = [world.conditions.conditions[i] for i in world.seen[:3]]
    nll = {BASE: np.array([4.0, 5.0, 3.0]), TEACHER: np.array([2.0, 1.0, 2.0]), "mine": np.array([3.0, 4.5, 3.5])}
    numbers = {"delta_cosine": {"mine": np.array([0.3, 0.2, 0.1])}}
    found = summarise(chosen, nll, "mine", resamples=200, numbers=numbers)["seen"]
    assert found["nll"] == {BASE: 4.0, TEACHER: pytest.approx(5 / 3), "mine": pytest.approx(11 / 3)}
    assert found["share"]["mine"] == pytest.approx((1 + 0.5 - 0.5) / (2 + 4 + 1))
    assert found["share_mean"]["mine"] == pytest.approx((1 / 2 + 0.5 / 4 - 0.5) / 3)
    assert found["beats_base"] == pytest.approx(2 / 3)
    mean, low, high = found["lead"][BASE]
    assert mean == pytest.approx(1 / 3) and -0.5 <= low <= mean <= high <= 1
    assert found["delta_cosine"]["mine"] == pytest.approx(0.2)
    assert found["spearman_cosine_gain"] == pytest.approx(1.0)


def test_deltas_and_sizes_are_compared_with_the_teachers(world: World) -> None:
    teacher = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    found = delta_numbers(torch.tensor([[3.0, 3.0], [0.0, -1.0]]), teacher)
    assert found["delta_cosine"] == pytest.approx([0.5**0.5, -1]) and found["delta_ratio"] == pytest.approx([2**0.5, 0.5])
    doubled = world.teachers.map(lambda t: t * 2)
    assert size_ratio(doubled, world.teachers) == pytest.approx([4.0] * len(world.teachers), rel=1e-5)
    assert float(norms(world.teachers).min()) > 0


# -- statistics ------------------------------------------------------------------------------------------------------------


def test_an_interval_covers_the_mean_that_it_estimates() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        found = paired(generator.normal(0.3, 1, 24), resamples=200)
        covered += found.low <= 0.3 <= found.high
        assert found.low <= found.mean <= found.high
    assert 50 <= covered < 60


def test_seeds_are_resampled_beside_conditions() -> None:
    # Every condition agrees and the seeds do not: the interval has to be as wide as the seeds.
    table = np.tile([-1.0, 0.0, 1.0], (20, 1))
    found = paired(table, resamples=300)
    assert found.mean == 0 and found.low < -0.3 and found.high > 0.3
    assert paired(table.mean(1), resamples=300).high == 0
    assert paired(table, resamples=300) == found, "the same numbers give another interval"


def test_a_rank_correlation_is_that_of_ranks_counted_one_by_one() -> None:
    generator = np.random.default_rng(1)
    x, y = generator.integers(0, 6, 30).astype(float), generator.normal(size=30)
    y += 0.2 * x

    def ranks(values: np.ndarray) -> np.ndarray:
        return np.array([np.sum(values < v) + (np.sum(values == v) + 1) / 2 for v in values])

    a, b = ranks(x), ranks(y)
    wanted = ((a - a.mean()) * (b - b.mean())).sum() / np.sqrt(((a - a.mean()) ** 2).sum() * ((b - b.mean()) ** 2).sum())
    assert spearman(x.tolist(), y.tolist()) == pytest.approx(wanted)
    assert spearman([1, 2, 3], [10, 20, 900]) == pytest.approx(1) and spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert np.isnan(spearman([1, 2], [1, 2])) and np.isnan(spearman([1, 1, 1], [1, 2, 3]))


# -- mixes -----------------------------------------------------------------------------------------------------------------


def composed(world: World, teacher_of: Any) -> dict[str, Any]:
    return compose(
        world.judged(), world.mixes, teacher_of=teacher_of, generated=teacher_of, probes=padded([[5, 6, 7, 8], [9, 10]]),
        represent=RepresentationOptions(), density=0.2,
    )  # fmt: skip


def test_the_sum_of_both_parts_is_what_a_teacher_that_is_that_sum_does(world: World) -> None:
    found = composed(world, world.teacher)
    assert {row["name"] for row in found["mixes"]} == {mix.name for mix in world.mixes}
    for row in found["mixes"]:
        for text in ("mix", "first part", "second part"):
            assert row["nll"][text][SUM] == pytest.approx(row["nll"][text][MIX], rel=1e-4)
            assert row["nll"][text][BASE] != row["nll"][text][MIX]
        assert row["cosine_generated"] == pytest.approx(1, abs=1e-5)
    part = world.judged().nll([world.mixes[0].parts[0]], {BASE: lambda ids: None})[BASE][0]
    assert found["mixes"][0]["nll"]["first part"][BASE] == pytest.approx(part, rel=1e-6)


def test_small_changes_add_up_and_a_teacher_of_one_part_alone_does_not(world: World) -> None:
    small = world.teachers.map(lambda t: t * 0.1)
    assert composed(world, lambda ids: small.pick(list(ids)))["additive"] == 1.0
    first = {mix.id: mix.parts[0] for mix in world.mixes}
    one_sided = composed(world, lambda ids: small.pick([first.get(i, i) for i in ids]))
    assert one_sided["additive"] == 0.0
    assert all(row["cosine_parts"][0] == pytest.approx(1, abs=1e-5) for row in one_sided["mixes"])
