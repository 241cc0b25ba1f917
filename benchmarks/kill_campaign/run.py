"""Kills at random moments: whatever a run was doing when it died, it goes on to what an undisturbed run makes, to the last bit.

python -m benchmarks.kill_campaign.run [--quick] [--out FOLDER] [--seed N]

Each subject is one stage of a small recipe, what comes before it being done.  It runs in a process of its own, is killed (SIGKILL) at a
random moment, starts again in the same folder, and so on.  A life that comes to its end is compared with the undisturbed run, and another
folder is begun until the subject has died often enough.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it also runs as a file

from benchmarks.evidence import criterion, write_results

from limbeck.config.recipe import Recipe
from limbeck.engine.checkpoint import damage, saved_steps
from limbeck.engine.metrics import read_metrics
from limbeck.models.loading import build_model, resolve_source, save_model
from limbeck.stages.run import run_recipe

TOKENIZER = "builtin:code-2m"
SAVING = 0.03
"""Most seconds between the beginning of a save and a death that is to fall into it."""
CONFIG = {
    "model_type": "qwen3", "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True, "max_position_embeddings": 64, "eos_token_id": 0, "pad_token_id": 0,
    "initializer_range": 0.1,
}  # fmt: skip
DATA = {"source": {"kind": "stdlib", "limit": 12}, "tokenizer": TOKENIZER, "sequence": 32, "held_out": 0.3}
LOOP = {"steps": 60, "batch_tokens": 256, "microbatch": 4, "log_every": 1, "checkpoint_every": 3, "validate_every": 20}
ALIGN = {
    "data": DATA,
    "student": {"base": "base", "surgery": [{"kind": "hybridize", "keep": []}], "train": ["mixers"]},
    "teacher": {"kind": "self"},
    "objectives": [{"kind": "attention_alignment"}],
    "optim": {"groups": [{"role": "mixers", "lr": 3e-3}]},
    "loop": {**LOOP, "steps": 5},
}
DISTIL = {
    "data": DATA,
    # Layers that are skipped at random: a random stream that is not restored shows in the first step.
    "student": {"base": "base", "surgery": [{"kind": "hybridize", "keep": [1]}], "skip_attention": 0.3},
    "teacher": {"kind": "local", "model": "base"},
    "objectives": [{"kind": "kl"}, {"kind": "ce", "weight": 0.1}],
    "optim": {"groups": [{"role": "mixers", "lr": 1e-3}, {"role": "rest", "lr": 1e-4}], "schedule": {"kind": "wsd", "warmup": 5}},
    "loop": LOOP,
}
TERNARY = {
    "data": DATA,
    "student": {"base": "base", "surgery": [{"kind": "ternarize", "method": "elastic", "warmup": 30}]},
    "teacher": {"kind": "local", "model": "base"},
    "objectives": [{"kind": "topk_kl", "k": 8, "temperature": 2.0}],
    "optim": {"groups": [{"role": "ternary", "kind": "muon", "lr": 0.02}, {"kind": "lion", "lr": 1e-3}]},
    "loop": {**LOOP, "steps": 40, "checkpoint_every": 1, "validate_every": None},
}
CONDITIONS = {
    "kind": "prepare_conditions",
    "tokenizer": TOKENIZER,
    "sources": [{"name": "stdlib", "source": {"kind": "stdlib", "limit": 60}, "cut": 300, "slices": {"by": "topic", "count": 3}}],
    "formats": ["plain", "upper"],
    "examples": 16, "test_examples": 4, "min_examples": 4, "sequence": 48, "condition": {"texts": 2, "tokens": 12},
}  # fmt: skip
POOL = {
    "kind": "train_adapters",
    "base": TOKENIZER,
    "conditions": {"from": "conditions"},
    "adapters": {"targets": "attention", "rank": 2, "alpha": 4},
    "optim": {"groups": [{"lr": 1e-2}], "clip": None},
    "loop": {"steps": 16, "rows": 1, "log_every": 1, "checkpoint_every": 2},
}
RANK = {
    "kind": "rank_layers", "from": "align", "method": "ga_s2", "keep": 1, "rows": 8, "random_sets": 5,
    "recall": {"tasks": ["repeat"], "distances": [8], "rows": 2},
    "distil": {"optim": {"groups": [{"lr": 1e-3}], "schedule": {"kind": "constant"}}, "loop": {"steps": 8, "batch_tokens": 256, "checkpoint_every": 2}},
}  # fmt: skip
DELTAS = {"kind": "measure_deltas", "pool": {"from": "pool"}, "probes": {"count": 4, "length": 16}, "together": 1}
CAPTURE = {"kind": "capture", "data": DATA, "teacher": {"kind": "local", "model": "base"}, "k": 16, "splits": ["train", "held_out"]}


@dataclass
class Subject:
    """One stage that is killed; what comes before it; the files that must come out the same; how often it dies."""

    name: str
    stages: dict[str, Any]
    files: tuple[str, ...]
    kills: int
    while_saving: bool = False

    @property
    def stage(self) -> str:
        return list(self.stages)[-1]

    @property
    def trains(self) -> bool:
        return "loop" in self.stages[self.stage]


MODEL = ("model/*.safetensors",)
SUBJECTS = [
    Subject("training a hybrid", {"distil": DISTIL}, MODEL, 50),
    Subject("saving in the background", {"distil": {**DISTIL, "loop": {**LOOP, "save_in_background": True, "keep_every": 12}}}, MODEL, 40),
    Subject("while a ternary student is saved", {"ternary": TERNARY}, MODEL, 40, while_saving=True),
    Subject("capturing", {"capture": CAPTURE}, ("signals/**/*",), 20),
    Subject("ranking layers", {"align": ALIGN, "rank": RANK}, ("ranking/ranking.json",), 20),
    Subject("training adapters", {"conditions": CONDITIONS, "pool": POOL}, ("adapters/**/*.safetensors",), 10),
    Subject(
        "measuring deltas",
        {"conditions": CONDITIONS, "pool": POOL, "deltas": DELTAS},
        ("deltas/**/*",), 12,
    ),
    Subject("exporting", {"align": ALIGN, "export": {"kind": "export", "from": "align", "to": ["hf"]}}, ("export/**/*.safetensors",), 8),
]  # fmt: skip


def start(home: Path, subject: Subject, run: Path, *, fresh: bool = False) -> int:
    """Run a subject's recipe in a process of its own, forked where all is imported; returns the process."""
    process = os.fork()
    if process:
        return process
    try:
        os.dup2(os.open(home / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        recipe = Recipe.model_validate({"name": "campaign", "stages": subject.stages})
        run_recipe(recipe, recipe_dir=home, run_dir=run, stage=subject.stage if fresh else None, fresh=fresh, say=lambda text: None)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(process: int) -> bool:
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def outcome(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def made(subject: Subject, run: Path) -> dict[str, str]:
    """What the stage left behind: the trace of its losses to the last bit, and the hash of every file that counts."""
    folder, found = run / subject.stage, {}
    if subject.trains:
        rows = [row for row in read_metrics(folder / "metrics.jsonl") if "losses" in row]
        found["trace"] = " ".join(value.hex() for row in rows for value in row["losses"])
    for pattern in subject.files:
        for path in sorted(p for p in folder.glob(pattern) if p.is_file()):
            found[str(path.relative_to(folder))] = hashlib.sha256(content(path)).hexdigest()
    return found


def content(path: Path) -> bytes:
    """A file's bytes; of tensors their names and numbers, since safetensors writes what is said about them in any order."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    tensors = load_file(path)
    return b"".join(f"{name} {t.dtype} {tuple(t.shape)}".encode() + t.flatten().view(torch.uint8).numpy().tobytes() for name, t in sorted(tensors.items()))


def base(folder: Path) -> None:
    """The model that all begin with, made in a process of its own: what forks must not have run threads of torch."""
    process = os.fork()
    if process == 0:
        save_model(build_model(CONFIG, seed=1), folder, tokenizer_source=resolve_source(TOKENIZER))
        os._exit(0)
    assert outcome(process) == 0


def leftovers(run: Path) -> list[str]:
    """Half-written things that a finished run must not leave behind."""
    return [str(path.relative_to(run)) for path in run.rglob("*") if path.name.startswith((".tmp-", ".trash-")) or path.name.endswith((".partial", ".part"))]


def committed(subject: Subject, run: Path) -> tuple[int, list[str]]:
    """The newest committed checkpoint, and what is wrong with any of them."""
    folder = run / subject.stage / "checkpoints"
    steps = saved_steps(folder)
    wrong = [f"{path.name}: {reason}" for path in steps.values() if (reason := damage(path)) is not None]
    return max(steps, default=0), wrong


def resumed(subject: Subject, run: Path) -> list[int]:
    """The steps at which lives of this folder went on."""
    log = run / subject.stage / "training.log"
    return [int(step) for step in re.findall(r"resumed at step (\d+) from step_", log.read_text())] if log.exists() else []


def campaign(home: Path, subject: Subject, kills: int, rng: random.Random, say: Callable[[str], None]) -> dict[str, Any]:
    """Kill a subject so often; returns what was found."""
    whole = home / f"{subject.name}-whole"
    if len(subject.stages) > 1:
        before = Subject(subject.name, dict(list(subject.stages.items())[:-1]), (), 0)
        assert outcome(start(home, before, whole)) == 0, (home / "output.txt").read_text()[-3000:]
    ready = home / f"{subject.name}-ready"
    if whole.exists():
        shutil.copytree(whole, ready)
    else:
        ready.mkdir()
    began = time.monotonic()
    assert outcome(start(home, subject, whole)) == 0, (home / "output.txt").read_text()[-3000:]
    seconds, expected = time.monotonic() - began, made(subject, whole)
    assert expected and all(expected.values())
    found: dict[str, Any] = {"subject": subject.name, "kills": 0, "lives": 0, "finished": 0, "in a save": 0, "after the first checkpoint": 0}
    problems: list[str] = []
    died: list[float] = []
    number = 0
    while found["kills"] < kills:
        number += 1
        run, first = shutil.copytree(ready, home / f"{subject.name}-{number}"), True
        while True:
            newest, gone_on = committed(subject, run)[0] if subject.trains else 0, resumed(subject, run)
            process, born = start(home, subject, run), time.monotonic()
            last = found["kills"] >= kills
            if not last:
                delay = rng.random() * 0.7 * seconds
                while time.monotonic() - born < delay and not ended(process):
                    time.sleep(0.001)
                if subject.while_saving:
                    while not any((run / subject.stage / "checkpoints").glob(".tmp-*")) and not ended(process):
                        time.sleep(0.0005)
                    time.sleep(rng.random() * SAVING)
                if not ended(process):
                    os.kill(process, signal.SIGKILL)
            code = outcome(process)
            found["lives"] += 1
            first, was_first = False, first
            if subject.trains and (more := resumed(subject, run)[len(gone_on) :]) and more != [newest]:
                problems.append(f"went on at {more} with a checkpoint of step {newest}")
            if code == 0:
                found["finished"] += 1
                if was_first:
                    # The machine is faster or slower than it was: deaths must still fall into a life.
                    seconds = time.monotonic() - born
                if made(subject, run) != expected:
                    differing = [name for name, value in expected.items() if made(subject, run).get(name) != value]
                    problems.append(f"{run.name}: {differing[:3]} differ from the undisturbed run")
                if left := leftovers(run):
                    problems.append(f"left behind: {left[:3]}")
                break
            if code != -signal.SIGKILL:
                problems.append(f"a life ended with code {code}: {(home / 'output.txt').read_text()[-500:]}")
                break
            found["kills"] += 1
            died.append(time.monotonic() - born)
            if subject.trains:
                step, wrong = committed(subject, run)
                problems += wrong
                if step < newest:
                    problems.append(f"the checkpoint of step {newest} is gone, {step} is the newest")
                found["after the first checkpoint"] += step > 0
                found["in a save"] += any((run / subject.stage / "checkpoints").glob(".tmp-*"))
        if found["kills"] >= kills:
            # A fresh start in the folder of the dead begins anew, and sets aside what was there.
            code = outcome(start(home, subject, run, fresh=True))
            if code != 0 or made(subject, run) != expected or not (run / f"{subject.stage}.stale-1").is_dir():
                problems.append(f"a fresh start in the same folder ended with {code} or made something else")
        shutil.rmtree(run)
    found |= {"seconds undisturbed": round(seconds, 2), "median seconds of a life": round(statistics.median(died), 2), "problems": len(problems)}
    say(f"{subject.name}: {found['kills']} kills in {found['lives']} lives, {found['finished']} came to the end, {len(problems)} problems")
    for problem in problems:
        say(f"  {problem}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two deaths of one subject; proves little")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        os.environ["HF_HUB_OFFLINE"] = "1"
        base(Path(home) / "base")
        # Whatever is imported late is imported here, once, and not in every life.
        for module in ("capture", "export", "measure_deltas", "rank_layers", "train", "train_adapters"):
            import_module(f"limbeck.stages.{module}")
        subjects = SUBJECTS[:1] if options.quick else SUBJECTS
        found = [campaign(Path(home), subject, 2 if options.quick else subject.kills, rng, print) for subject in subjects]
    kills, problems = sum(row["kills"] for row in found), sum(row["problems"] for row in found)
    finished = sum(row["finished"] for row in found)
    rows = [{"setting": row["subject"], "metric": metric, "value": value} for row in found for metric, value in row.items() if metric != "subject"]
    options.out.mkdir(parents=True, exist_ok=True)
    saves = sum(row["in a save"] for row in found)
    least, in_saves, ends = (2, 0, 1) if options.quick else (200, 30, 8)
    write_results(
        options.out,
        "a run that is killed at any moment goes on to what an undisturbed one makes, bit for bit",
        "python -m benchmarks.kill_campaign.run",
        [options.seed],
        rows,
        [
            criterion("random SIGKILLs", f">= {least}", kills, kills >= least),
            criterion("of them in the middle of a save", f">= {in_saves}", saves, saves >= in_saves),
            criterion("runs that came to their end after deaths, each bit-equal to the undisturbed one", f">= {ends}", finished, finished >= ends),
            criterion("lost or damaged checkpoints, differing traces or files, leftovers, fresh starts that are none", "0", problems, problems == 0),
        ],
    )
    print(json.dumps({"kills": kills, "problems": problems, "minutes": round((time.monotonic() - began) / 60, 1)}))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
