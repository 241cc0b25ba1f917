"""What befalls one of two ranks: it dies, it hangs, it cannot save.  The other ends in bounded time and says who it was."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from engine_parts import Rows, make_step, make_trainer
from limbeck.engine.checkpoint import Checkpoints, damage, saved_steps
from limbeck.engine.metrics import loss_trace
from limbeck.engine.parallel import World, connect
from limbeck.errors import RunError

ROWS, STEPS = 21, 12
TIMEOUT = 4.0
"""Seconds after which a rank is given up."""


def trainer_of(folder: Path, world: World, **options: Any) -> Any:
    """With 10 rows of 21 a step, one of two ranks has none in every third step."""
    return make_trainer(
        folder, make_step("kl", dtype=torch.float64), rows=Rows(ROWS), world=world, precision="float64", lr=3e-3, steps=STEPS, checkpoint_every=3, **options
    )


def on_step(trainer: Any, step: int, work: Callable[[], Any]) -> None:
    apply = trainer._apply

    def watched(*args: Any) -> None:
        apply(*args)
        if trainer.at.step == step:
            work()

    trainer._apply = watched


def dies(folder: Path, world: World) -> None:
    trainer = trainer_of(folder / "run", world)
    if world.rank == 1:
        on_step(trainer, 5, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with world.watched():
        trainer.run()


def hangs(folder: Path, world: World) -> None:
    trainer = trainer_of(folder / "run", world)
    if world.rank == 1:
        on_step(trainer, 5, lambda: time.sleep(120))
    with world.watched():
        trainer.run()


def first_dies(folder: Path, world: World) -> None:
    trainer = trainer_of(folder / "run", world)
    if world.rank == 0:
        on_step(trainer, 5, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with world.watched():
        trainer.run()


def cannot_save(folder: Path, world: World) -> None:
    """Rank 1 runs out of space in one save in the background, and gets an input error in another."""
    write = Checkpoints._write

    def fails(self: Checkpoints, temporary: Path, *args: Any) -> None:
        write(self, temporary, *args)
        if world.rank == 1 and "step_6-" in temporary.name:
            raise OSError(28, "No space left on device")

    Checkpoints._write = fails  # type: ignore[method-assign]
    trainer_of(folder / "run", world, save_in_background=True, keep_last=0, zero_stage=2).run()


def worker(rank: int, folder: Path, work: Callable[[Path, World], None]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT))
    world = connect("cpu", timeout=TIMEOUT)
    began = time.monotonic()
    try:
        work(folder, world)
        (folder / f"end-{rank}").write_text("finished")
        dist.barrier()
    except RunError as error:
        (folder / f"end-{rank}").write_text(f"{time.monotonic() - began:.1f} {error}")
    except BaseException:
        (folder / f"end-{rank}").write_text(traceback.format_exc())
    # Without a farewell to the other rank, which may be gone.
    os._exit(0)


def played(folder: Path, work: Callable[[Path, World], None], *, patience: float = 90) -> dict[int, str]:
    """How each rank ended; one that did not is missing."""
    context = mp.get_context("spawn")
    ranks = [context.Process(target=worker, args=(rank, folder, work)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    until = time.monotonic() + patience
    while time.monotonic() < until and sum(rank.is_alive() for rank in ranks) > (work is hangs):
        time.sleep(0.1)
    for rank in ranks:
        rank.kill()
        rank.join()
    return {rank: path.read_text() for rank in (0, 1) if (path := folder / f"end-{rank}").exists()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("whole")
    trainer_of(folder, World(torch.device("cpu"))).run()
    return loss_trace(folder / "metrics.jsonl")


@pytest.mark.parametrize(("work", "gone"), [(dies, 1), (hangs, 1), (first_dies, 0)])
def test_the_others_stop_in_bounded_time_and_say_which_rank_it_was(tmp_path: Path, whole: list[float], work: Any, gone: int) -> None:
    ends = played(tmp_path, work)
    assert set(ends) == {1 - gone}, ends
    end = ends[1 - gone]
    assert f"rank {gone}" in end and "the same command goes on from there" in end, end
    assert "Traceback" not in end
    assert float(end.split()[0]) < 60
    # What was saved before is whole, and the run goes on from it, here on one rank.
    assert list(saved_steps(tmp_path / "run" / "checkpoints")) == [3]
    if gone != 0:
        assert (tmp_path / "run" / "exit_reason").read_text() == "failed\n"
    trainer_of(tmp_path / "run", World(torch.device("cpu"))).run()
    assert loss_trace(tmp_path / "run" / "metrics.jsonl") == pytest.approx(whole, abs=1e-9)


def test_a_save_in_the_background_that_one_rank_cannot_do_is_given_up_by_both(tmp_path: Path, whole: list[float]) -> None:
    assert played(tmp_path, cannot_save) == {0: "finished", 1: "finished"}
    assert list(saved_steps(tmp_path / "run" / "checkpoints")) == [3, 9]
    assert all(damage(path) is None for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert loss_trace(tmp_path / "run" / "metrics.jsonl") == pytest.approx(whole, abs=1e-9)
    assert "no space left" in (tmp_path / "run" / "training.log").read_text()
