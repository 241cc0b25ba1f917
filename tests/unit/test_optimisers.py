"""Muon, Lion and AdamW by group: each against its formula in fp64, together as one optimiser, resumed bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from engine_parts import make_step, make_trainer
from limbeck.config.parts.stages import GroupOptions, LoopOptions, OptimOptions
from limbeck.engine.lion import Lion
from limbeck.engine.loop import Trainer
from limbeck.engine.metrics import loss_trace
from limbeck.engine.muon import Muon, halves_of, scale
from limbeck.engine.optim import Mixed, build_optimizer, flat_state, materialise_state, set_rates
from limbeck.errors import RunError
from limbeck.ops import newton_schulz
from limbeck.ops.newton_schulz import orthogonalise, orthogonalised

A, B, C = 3.4445, -4.7750, 2.0315


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_singular_values(x: Tensor, steps: int = 5) -> Tensor:
    """The polynomial on the singular values of one matrix: no product of the implementation."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = A * s + B * s**3 + C * s**5
    return u @ torch.diag(s) @ vh


def naive_muon(weight: Tensor, grads: list[Tensor], *, lr: float, decay: float, factor: float, nesterov: bool = True) -> Tensor:
    """One matrix in fp64, as the definition says."""
    momentum = torch.zeros_like(weight)
    for g in grads:
        momentum = 0.95 * momentum + 0.05 * g
        direction = by_singular_values(0.05 * g + 0.95 * momentum if not nesterov else g + 0.95 * (momentum - g))
        if not nesterov:
            direction = by_singular_values(momentum)
        weight = weight * (1 - lr * decay) - lr * factor * direction
    return weight


def run(optimizer: torch.optim.Optimizer, weight: nn.Parameter, grads: list[Tensor]) -> Tensor:
    for g in grads:
        weight.grad = g.clone()
        optimizer.step()
    return weight.detach()


# -- Newton-Schulz ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9), (2, 3)])
def test_newton_schulz_is_the_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    x = random(4, *shape)
    found = orthogonalised(x, dtype=torch.float64)
    expected = torch.stack([by_singular_values(m) for m in x])
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    assert torch.linalg.svdvals(found).min() > 0.6 and torch.linalg.svdvals(found).max() < 1.2


def test_the_size_of_a_matrix_does_not_matter_and_zero_stays_zero() -> None:
    x = random(3, 5, 8, dtype=torch.float32)
    sized = torch.stack([x[0] * 1e-25, x[1] * 1e25, x[2] * 0])
    found = orthogonalised(sized, dtype=torch.bfloat16)
    expected = orthogonalised(x, dtype=torch.bfloat16)
    torch.testing.assert_close(found[:2], expected[:2], atol=0.05, rtol=0)
    assert not found[2].any() and bool(found.isfinite().all())


def test_chunks_of_stacks_are_the_matrices_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stacks = [random(n, 4, 6, seed=n, dtype=torch.float32) for n in (5, 1, 3, 0)]
    alone = [torch.stack([orthogonalised(m, dtype=torch.float32) for m in s]) if len(s) else s for s in stacks]
    for numbers in (1, 48, 100, 10**6):
        monkeypatch.setitem(newton_schulz._NUMBERS, "cpu", numbers)
        for found, expected in zip(orthogonalise(stacks, dtype=torch.float32), alone, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_bfloat16_products_point_where_fp32_ones_do() -> None:
    x = random(2, 32, 48, dtype=torch.float32)
    low, high = orthogonalised(x, dtype=torch.bfloat16), orthogonalised(x, dtype=torch.float32)
    assert torch.cosine_similarity(low.flatten(1), high.flatten(1)).min() > 0.999
    assert low.dtype == torch.float32


# -- Muon ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("scaling", "factor"), [("original", (12 / 5) ** 0.5), ("moonlight", 0.2 * 12**0.5)])
def test_muon_is_its_formula(scaling: str, factor: float, nesterov: bool) -> None:
    start, grads = random(12, 5), [random(12, 5, seed=i) for i in range(1, 4)]
    weight = nn.Parameter(start.clone())
    muon = Muon([weight], lr=0.05, weight_decay=0.3, scaling=scaling, nesterov=nesterov, products=torch.float32)
    expected = naive_muon(start, grads, lr=0.05, decay=0.3, factor=factor, nesterov=nesterov)
    torch.testing.assert_close(run(muon, weight, grads), expected, atol=1e-10, rtol=0)


def test_the_scales_are_those_of_the_papers() -> None:
    assert scale("original", 4, 16) == 1.0 and scale("original", 16, 4) == 2.0
    assert scale("moonlight", 4, 16) == scale("moonlight", 16, 4) == pytest.approx(0.8)


def test_every_expert_is_a_matrix_of_its_own() -> None:
    """Flattening the stack to one matrix is another update."""
    start, grads = random(6, 8, 5), [random(6, 8, 5, seed=i) for i in range(1, 4)]
    weight = nn.Parameter(start.clone())
    found = run(Muon([weight], lr=0.1, products=torch.float32), weight, grads)
    for e in range(6):
        expected = naive_muon(start[e], [g[e] for g in grads], lr=0.1, decay=0, factor=(8 / 5) ** 0.5)
        torch.testing.assert_close(found[e], expected, atol=1e-10, rtol=0)
    flat = nn.Parameter(start.clone().flatten(0, 1))
    wrong = run(Muon([flat], lr=0.1, products=torch.float32), flat, [g.flatten(0, 1) for g in grads]).view_as(found)
    assert torch.cosine_similarity((wrong - start).flatten(), (found - start).flatten(), dim=0) < 0.95


@pytest.mark.parametrize("name", ["mlp.experts.gate_up_proj", "mlp.gate_up_proj.weight"])
@pytest.mark.parametrize("shape", [(3, 12, 5), (12, 5)])
def test_gate_and_up_halves_are_matrices_of_their_own(name: str, shape: tuple[int, ...]) -> None:
    start, grads = random(*shape), [random(*shape, seed=i) for i in range(1, 3)]
    weight = nn.Parameter(start.clone())
    assert halves_of(name) == 2 and halves_of("mlp.down_proj.weight") == 1
    group = GroupOptions(kind="muon", lr=0.1, newton_schulz="float32")
    optimizer = build_optimizer([(group, [(name, weight)])], OptimOptions(groups=(group,)))
    found = run(optimizer, weight, grads)
    for half in (slice(0, 6), slice(6, 12)):
        pieces = [(x[..., half, :]).reshape(-1, 6, 5) for x in (start, *grads, found)]
        for i in range(len(pieces[0])):
            expected = naive_muon(pieces[0][i], [p[i] for p in pieces[1:-1]], lr=0.1, decay=0, factor=(6 / 5) ** 0.5)
            torch.testing.assert_close(pieces[-1][i], expected, atol=1e-10, rtol=0)


def test_vectors_in_a_muon_group_are_refused_by_name() -> None:
    group = GroupOptions(role="ternary", kind="muon", lr=0.02)
    members = [("up.weight", nn.Parameter(random(4, 4))), ("norm.weight", nn.Parameter(random(4))), ("conv1d.weight", nn.Parameter(random(4, 1, 3)))]
    with pytest.raises(RunError, match=r"'ternary'.*norm.weight, conv1d.weight are vectors.*lion or adamw"):
        build_optimizer([(group, members)], OptimOptions(groups=(group,)))
    odd = nn.Parameter(random(5, 4))
    with pytest.raises(RunError, match=r"gate_up_proj.weight has 5 outputs, which are not 2 matrices"):
        build_optimizer([(group, [("gate_up_proj.weight", odd)])], OptimOptions(groups=(group,)))


# -- Lion ------------------------------------------------------------------------------------------------------------------


def test_lion_is_its_formula() -> None:
    start, grads = random(5, 3), [random(5, 3, seed=i) for i in range(1, 6)]
    weight, momentum, expected = nn.Parameter(start.clone()), torch.zeros_like(start), start.clone()
    for g in grads:
        expected = expected * (1 - 0.01 * 0.5) - 0.01 * torch.sign(0.9 * momentum + 0.1 * g)
        momentum = 0.99 * momentum + 0.01 * g
    found = run(Lion([weight], lr=0.01, weight_decay=0.5), weight, grads)
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=0)


# -- together --------------------------------------------------------------------------------------------------------------

KINDS = [
    {"match": "*.mixer.*.weight", "kind": "muon", "lr": 0.02, "weight_decay": 0.1},
    {"match": "*.weight", "kind": "lion", "lr": 1e-3, "betas": (0.95, 0.98)},
    {"lr": 1e-2, "kind": "adamw"},
]


def claimed(student: nn.Module, groups: list[dict[str, Any]]) -> list[tuple[GroupOptions, list[tuple[str, nn.Parameter]]]]:
    """The first group whose pattern fits, as the stages do."""
    from fnmatch import fnmatchcase

    found = [(GroupOptions.model_validate(g), []) for g in groups]
    for name, p in student.named_parameters():
        next(members for options, members in found if fnmatchcase(name, options.match or "*")).append((name, p))
    return found  # type: ignore[return-value]


def mixed_trainer(folder: Path, groups: list[dict[str, Any]] = KINDS, **loop: Any) -> Trainer:
    parts = make_trainer(folder, make_step())
    members = claimed(parts.train_step.student, groups)
    return Trainer(
        parts.train_step, parts.loader, groups=members, optim_options=OptimOptions(groups=tuple(g for g, _ in members)),
        loop=LoopOptions(**{"precision": "float32", "steps": 16, "log_every": 1, **loop}), folder=folder,
    )  # fmt: skip


def test_a_mixed_optimiser_is_its_parts() -> None:
    one, other = make_step().student, make_step().student
    mixed = build_optimizer(claimed(one, KINDS), OptimOptions(groups=tuple(GroupOptions.model_validate(g) for g in KINDS)))
    assert isinstance(mixed, Mixed) and set_rates(mixed, 0.5) == {"*.mixer.*.weight": 0.01, "*.weight": 5e-4, "2": 5e-3}
    parts = []
    for options, members in claimed(other, KINDS):
        parts.append(build_optimizer([(options, members)], OptimOptions(groups=(options,))))
        set_rates(parts[-1], 0.5)
    for step in range(3):
        for student in (one, other):
            for i, p in enumerate(student.parameters()):
                p.grad = random(*p.shape, seed=100 * step + i, dtype=torch.float32)
        mixed.step()
        for part in parts:
            part.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    names = {p: name for name, p in one.named_parameters()}
    keys = {key.partition("/")[0] for key in flat_state(mixed, names)}
    assert keys == {"momentum", "exp_avg", "exp_avg_sq", "step"}
    mixed.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in one.parameters())


def test_making_a_mixed_state_moves_no_weight_and_changes_no_step() -> None:
    students = [make_step().student for _ in range(2)]
    optimizers = [build_optimizer(claimed(s, KINDS), OptimOptions(groups=(GroupOptions(lr=1),))) for s in students]
    before = [p.detach().clone() for p in students[0].parameters()]
    materialise_state(optimizers[0])
    assert all(torch.equal(a, b) for a, b in zip(before, students[0].parameters(), strict=True))
    assert len(optimizers[0].state) == len(before)
    for student, optimizer in zip(students, optimizers, strict=True):
        for i, p in enumerate(student.parameters()):
            p.grad = random(*p.shape, seed=i, dtype=torch.float32)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(students[0].parameters(), students[1].parameters(), strict=True))


def test_adamw_alone_is_still_torchs_own() -> None:
    group = GroupOptions(lr=0.1)
    assert type(build_optimizer([(group, [("w", nn.Parameter(random(2, 2)))])], OptimOptions(groups=(group,)))) is torch.optim.AdamW


def test_a_mixed_run_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    mixed_trainer(tmp_path / "whole").run()
    whole = loss_trace(tmp_path / "whole" / "metrics.jsonl")
    assert sum(whole[-4:]) < sum(whole[:4])
    trainer = mixed_trainer(tmp_path / "broken", checkpoint_every=5)
    apply = trainer._apply

    def dies(*args: Any) -> None:
        if trainer.at.step == 7:
            raise RuntimeError("killed")
        apply(*args)

    trainer._apply = dies  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="killed"):
        trainer.run()
    mixed_trainer(tmp_path / "broken", checkpoint_every=5).run()
    assert loss_trace(tmp_path / "broken" / "metrics.jsonl") == whole


# -- options ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 0.9}, "adamw takes no `momentum`: that is for kind muon"),
        ({"kind": "lion", "scaling": "moonlight"}, "lion takes no `scaling`"),
        ({"kind": "muon", "betas": (0.9, 0.99)}, "muon takes no `betas`: that is for kind adamw and lion"),
        ({"kind": "sgd"}, "adamw"),
        ({"kind": "lion", "betas": (0.9, 1.0)}, "less than 1"),
    ],
)
def test_options_of_another_kind_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GroupOptions.model_validate({"lr": 0.1, **settings})
