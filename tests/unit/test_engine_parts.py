"""Schedules, seeds, optimiser groups, metrics files and the console."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from limbeck.config.parts.stages import GroupOptions, OptimOptions, ScheduleOptions
from limbeck.engine.console import Progress, duration, quantity
from limbeck.engine.determinism import derive_seed, deterministic, rng_state, seed_everything, set_rng_state, untouched_rng
from limbeck.engine.metrics import MetricsWriter, loss_trace, read_metrics
from limbeck.engine.optim import build_optimizer, global_norm, materialise_state, set_rates
from limbeck.engine.schedule import factor
from limbeck.engine.signals import StopFlag
from limbeck.errors import CheckpointError


def curve(steps: int = 100, **options: object) -> list[float]:
    return [factor(ScheduleOptions(**options), step, steps) for step in range(steps)]  # type: ignore[arg-type]


def test_schedules_warm_up_and_end_where_they_should() -> None:
    cosine = curve(kind="cosine", warmup=9, final=0.1)
    assert cosine[0] == pytest.approx(0.1)
    assert cosine[9] == 1.0
    assert cosine[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(cosine[9:]))
    wsd = curve(kind="wsd", decay=0.25)
    assert set(wsd[:76]) == {1.0}
    assert wsd[-1] == 0.0
    assert wsd[87] == pytest.approx(0.5, abs=0.03)
    assert curve(kind="constant", warmup=1)[1:] == [1.0] * 99


def test_a_run_of_one_step_has_a_rate() -> None:
    for kind in ("cosine", "wsd", "constant"):
        assert curve(1, kind=kind) == [1.0]


def test_vectors_are_not_decayed_unless_asked() -> None:
    layer = nn.Linear(3, 3)
    members = list(layer.named_parameters())
    group = GroupOptions(role="mixers", lr=0.5, weight_decay=0.1)
    optimizer = build_optimizer([(group, members)], OptimOptions(groups=(group,)))
    assert {g["params"][0].ndim: g["weight_decay"] for g in optimizer.param_groups} == {2: 0.1, 1: 0.0}
    assert set_rates(optimizer, 0.5) == {"mixers": 0.25}
    decayed = GroupOptions(lr=0.5, weight_decay=0.1, decay_vectors=True)
    assert [g["weight_decay"] for g in build_optimizer([(decayed, members)], OptimOptions(groups=(decayed,))).param_groups] == [
        0.1
    ]


def test_making_optimiser_state_moves_no_weight() -> None:
    layer = nn.Linear(3, 3)
    before = [p.detach().clone() for p in layer.parameters()]
    group = GroupOptions(lr=0.5, weight_decay=0.1)
    optimizer = build_optimizer([(group, list(layer.named_parameters()))], OptimOptions(groups=(group,)))
    materialise_state(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    assert all(p.grad is None for p in layer.parameters())
    assert len(optimizer.state) == 2
    assert {g["lr"] for g in optimizer.param_groups} == {0.5}


def test_the_norm_is_that_of_all_gradients() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert global_norm(parameters) == 5.0


def test_seeds_differ_by_purpose_and_rank_and_never_change() -> None:
    assert derive_seed(1, "train", 0) == 2064939839190351003
    assert len({derive_seed(s, p, r) for s in (0, 1) for p in ("train", "data") for r in (0, 1)}) == 8


def test_random_states_survive_json_and_inner_draws() -> None:
    def draw() -> list[float]:
        return [torch.rand(1).item(), random.random(), np.random.rand(), random.gauss(0, 1), np.random.normal()]

    seed_everything(3)
    draw()
    tensors, values = rng_state()
    expected = draw()
    set_rng_state(tensors, json.loads(json.dumps(values)))
    with untouched_rng():
        draw()
    assert draw() == expected


def test_a_second_interrupt_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.reason, left) == ("SIGTERM", [])
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.reason, left) == ("SIGINT", [])
        os.kill(os.getpid(), signal.SIGINT)
        assert left == [130]


def test_deterministic_mode_is_left_as_it_was_found() -> None:
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_metrics_after_the_resumed_step_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, 0)
    for step in (1, 2, 3):
        writer.write({"step": step, "losses": [float(step)]})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 4, "los')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    writer = MetricsWriter(path, 2)
    writer.write({"step": 3, "losses": [float("nan")]})
    writer.close()
    assert path.read_text().splitlines()[-1] == '{"step": 3, "losses": [null]}'
    assert repr(loss_trace(path)) == "[1.0, 2.0, nan]"


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2: not a JSON line"):
        read_metrics(path)


ROW = {
    "step": 3,
    "loss": 1.25,
    "kl": 0.5,
    "grad_norm": 0.1,
    "tokens_per_second": 12345.0,
    "memory_bytes": 3e9,
    "eta_seconds": 3700.0,
}


def test_a_pipe_gets_plain_lines_and_a_narrow_terminal_one_line() -> None:
    pipe = io.StringIO()
    voice = Progress(Console(file=pipe, width=40), "align", 10)
    voice.start()
    voice.update(ROW)
    voice.close()
    assert pipe.getvalue() == "align  step 3/10  loss 1.2500  kl 0.5000  eta 1h01m  12.3k tok/s  |g| 0.1  3.00 GB\n"
    screen = io.StringIO()
    voice = Progress(Console(file=screen, width=20, force_terminal=True, legacy_windows=False), "align", 10)
    voice.start()
    voice.update(ROW)
    voice.say("a line that stays")
    voice.close()
    assert "a line that stays" in screen.getvalue()
    assert "…" in screen.getvalue()
    Progress(None, "align", 10).update(ROW)


def test_words_for_numbers() -> None:
    assert [duration(s) for s in (5, 65, 3600)] == ["5s", "1m05s", "1h00m"]
    assert [quantity(n) for n in (12, 1234, 4.56e6, 2e9)] == ["12", "1.23k", "4.56M", "2B"]


def test_a_materialised_optimiser_takes_its_first_step_as_a_fresh_one() -> None:
    weights = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    optimizers = [torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0) for weight in weights]
    materialise_state(optimizers[0])
    for _ in range(3):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
            optimizer.step()
    assert torch.equal(weights[0], weights[1])
