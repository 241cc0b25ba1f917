"""A ternary run that is killed ten times, whenever it happens to be, is the run that was never killed, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from limbeck.config.recipe import Recipe
from limbeck.engine.loop import Trainer
from limbeck.engine.metrics import read_metrics
from limbeck.models.loading import build_model, resolve_source, save_model
from limbeck.stages.run import run_recipe

TESTS = Path(__file__).parents[1]
TOKENIZER = "builtin:code-2m"
KILLS, STEPS, SAVE, FURTHER, SEED = 10, 60, 3, 5, 0
"""Deaths, steps of the run, steps between checkpoints, and most steps of a life before it is chosen to die: ten lives are too few to
come to the end."""
LOADING, SAVING = 1.0, 0.05
"""Seconds in which a life dies that is to do no step, or that is saving."""
CONFIG = {
    "model_type": "qwen3_moe", "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "norm_topk_prob": True, "tie_word_embeddings": True, "max_position_embeddings": 64, "eos_token_id": 0, "pad_token_id": 0,
    "initializer_range": 0.1,
}  # fmt: skip
NURSERY = "import sys\nfrom pathlib import Path\nfrom integration.test_ternary_kills import nursery\nnursery(Path(sys.argv[1]))\n"


def recipe(base: str) -> Recipe:
    """Everything that a ternary run keeps from one step to the next: momenta of both kinds, lambda, learnt scales, routers' load."""
    stage: dict[str, Any] = {
        "data": {"source": {"kind": "stdlib", "limit": 12}, "tokenizer": TOKENIZER, "sequence": 32, "held_out": 0},
        "student": {"base": base, "surgery": [{"kind": "ternarize", "method": "elastic", "warmup": 60}]},
        "teacher": {"kind": "local", "model": base},
        "objectives": [
            {"kind": "ce", "weight": 0.5},
            {"kind": "topk_kl", "k": 8, "temperature": 2.0, "weight": 0.5},
            {"kind": "moe_balance", "weight": 0.01},
            {"kind": "router_entropy", "weight": 0.001},
        ],
        "optim": {
            "groups": [{"role": "ternary", "kind": "muon", "lr": 0.02}, {"kind": "lion", "lr": 1e-3}],
            "schedule": {"kind": "wsd", "warmup": 5},
        },
        "loop": {"steps": STEPS, "batch_tokens": 128, "microbatch": 2, "log_every": 1, "checkpoint_every": SAVE},
    }
    return Recipe.model_validate({"name": "killed", "stages": {"ternary": stage}})


class Life:
    """The run in a process of its own, forked where all is imported already, which tells of each step that it has done."""

    def __init__(self, folder: Path, base: str):
        self._told, telling = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            _live(folder, base, telling)
        os.close(telling)

    def step(self) -> bool:
        """Wait for a step; False when it has ended."""
        return bool(os.read(self._told, 1))

    def runs(self) -> bool:
        """Whether it has not ended yet."""
        return os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def end(self) -> int:
        """Its exit code, or a signal's number below zero."""
        while self.step():
            pass
        os.close(self._told)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def _live(folder: Path, base: str, telling: int) -> None:
    apply = Trainer._apply

    def watched(self: Trainer, *arguments: Any) -> None:
        apply(self, *arguments)
        os.write(telling, b".")

    Trainer._apply = watched  # type: ignore[method-assign]
    try:
        run_recipe(recipe(base), recipe_dir=folder.parent, run_dir=folder, say=lambda line: None)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def nursery(folder: Path) -> None:
    """Run once to the end, and once with deaths.

    A life does so many steps, often none, and dies at a random moment behind them; every second one dies in its next save.
    """
    torch.set_num_threads(1)
    base, rng = str(folder / "base"), random.Random(SEED)
    whole = Life(folder / "whole", base)
    assert whole.step()
    began = time.monotonic()
    assert whole.end() == 0
    seconds = (time.monotonic() - began) / (STEPS - 1)
    deaths = []
    for number in range(KILLS):
        life, further = Life(folder / "killed", base), rng.randint(0, FURTHER)
        done = sum(life.step() for _ in range(further))
        if number % 2:
            while not saving(folder / "killed") and life.runs():
                time.sleep(0.001)
            time.sleep(rng.random() * SAVING)
        else:
            time.sleep(rng.random() * (seconds if further else LOADING))
        os.kill(life.process, signal.SIGKILL)
        deaths.append({"further": further, "done": done, "ended": life.end(), "saving": saving(folder / "killed")})
    assert Life(folder / "killed", base).end() == 0
    (folder / "deaths.json").write_text(json.dumps(deaths))


def saving(run: Path) -> bool:
    """Whether a checkpoint is half written."""
    return any((run / "ternary" / "checkpoints").glob(".tmp-*"))


def trace(stage: Path) -> list[str]:
    return [value.hex() for row in read_metrics(stage / "metrics.jsonl") for value in row["losses"]]


def test_ten_kills_at_random_moments_change_no_bit_of_a_ternary_run(tmp_path: Path) -> None:
    save_model(build_model(CONFIG, seed=1), tmp_path / "base", tokenizer_source=resolve_source(TOKENIZER))
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent / 'src'}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", NURSERY, str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    deaths = json.loads((tmp_path / "deaths.json").read_text())
    assert len(deaths) == KILLS
    assert all(death["ended"] == -signal.SIGKILL and death["done"] == death["further"] for death in deaths), deaths
    whole, killed = tmp_path / "whole" / "ternary", tmp_path / "killed" / "ternary"
    assert len(trace(whole)) == STEPS and trace(killed) == trace(whole)
    for name in ("grad_norm", "ternary/flips", "ternary/lambda"):
        mine, theirs = ([row[name] for row in read_metrics(stage / "metrics.jsonl")] for stage in (killed, whole))
        assert mine[-1] == theirs[-1], name
    found, expected = (load_file(next((stage / "model").glob("*.safetensors"))) for stage in (killed, whole))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert any(death["saving"] for death in deaths) and not saving(tmp_path / "killed")
    print(f"steps of a life: {[death['done'] for death in deaths]}; killed while saving: {sum(death['saving'] for death in deaths)}")
