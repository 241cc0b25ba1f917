"""A stop signal ends what is no training as Ctrl-C does, and the run says how it ended."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

import limbeck.cli.manners as cli
from limbeck.cli.manners import group_left
from limbeck.config.load import load_text
from limbeck.engine.signals import StopFlag
from limbeck.errors import DataError
from limbeck.interrupts import SIGNALS, held, interruptible
from limbeck.stages.folder import EXIT_REASON
from limbeck.stages.run import _own_kernels, prepare_recipe


@pytest.fixture
def quiet() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    assert before == {number: signal.getsignal(number) for number in before}


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stop_signal_is_a_keyboard_interrupt_and_its_repetition_disturbs_nothing(number: signal.Signals, quiet: None) -> None:
    with interruptible() as interrupts:
        with pytest.raises(KeyboardInterrupt, match=number.name):
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # torchrun says it once more while the first is being answered
        assert interrupts.reason == number.name


def test_signals_are_held_while_the_end_is_written_down(quiet: None) -> None:
    with interruptible() as interrupts, held():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert interrupts.reason == "SIGUSR1"


def test_training_takes_the_signals_over_and_gives_them_back(quiet: None) -> None:
    with interruptible() as interrupts:
        with StopFlag() as flag:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert flag.reason == "SIGUSR1" and interrupts.reason is None
        with interruptible() as again, pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert again is interrupts


def test_a_closed_terminal_is_no_reason_to_stop_under_nohup(quiet: None) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            with StopFlag() as flag:
                os.kill(os.getpid(), signal.SIGHUP)
        assert flag.reason is None and interrupts.reason is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_handler_of_the_program_around_us_stays(quiet: None) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]


def test_the_verb_prepare_says_how_it_ended_too(tmp_path: Path) -> None:
    recipe = load_text(
        "name: text\nstages: {text: {kind: prepare, data: {source: {kind: text, path: corpus}, tokenizer: {vocabulary: 300}, sequence: 16}}}\n",
        base_dir=tmp_path,
    )
    with pytest.raises(DataError):
        prepare_recipe(recipe, recipe_dir=tmp_path, run_dir=tmp_path / "run", say=lambda line: None)
    assert (tmp_path / "run" / EXIT_REASON).read_text() == "failed\n"


def test_every_rank_compiles_into_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/kernels")
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    for _ in range(2):
        _own_kernels()
        assert os.environ["TRITON_CACHE_DIR"] == "/kernels/rank-3"


def test_a_verb_leaves_the_group_that_it_joined_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def join() -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    with group_left():
        join()
    assert not dist.is_initialized()
    join()
    try:
        with group_left():
            pass
        assert dist.is_initialized(), "it was there before"
    finally:
        dist.destroy_process_group()
    never = threading.Event()
    leave = dist.destroy_process_group
    monkeypatch.setattr(cli, "_PATIENCE", 0.2)
    monkeypatch.setattr(dist, "destroy_process_group", never.wait)
    try:
        with group_left():
            join()  # and its peer dies: whoever waits for it does so in a thread that holds nothing up
    finally:
        never.set()
        leave()
