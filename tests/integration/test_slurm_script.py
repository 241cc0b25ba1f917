"""The script of `limbeck init --slurm`, run: with stand-ins for Slurm and torchrun, and under plain bash with the real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from limbeck.config.slurm import Job, slurm_script
from limbeck.engine.checkpoint import saved_steps

RECIPE = "my recipe.yaml"
RUN = "runs/my run"
TWO_NODES = Job(nodes=2, gpus=4)
PROGRAMS = {
    # Drops its own options and runs the rest, in the environment of a step.
    "srun": 'echo "srun $*" >>"$FAKES/log"; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    # Ends by a signal as torchrun does: by code 1, whatever its ranks said.
    "torchrun": """
      echo "torchrun $*" >>"$FAKES/log"
      env >"$FAKES/environment"
      printf '%s\\n' "$@" >"$FAKES/words"
      end() {
        echo "told $1" >>"$FAKES/log"
        sleep "${SAVING:-0}"
        if [[ -n ${REASON-} ]]; then mkdir -p "$RUN_DIR"; echo "$REASON" >"$RUN_DIR/exit_reason"; fi
        exit 1
      }
      trap 'end USR1' USR1
      trap 'end TERM' TERM
      echo $$ >"$FAKES/ranks"
      [[ -n ${AT_ONCE-} ]] && end nobody
      while :; do sleep 0.05; done""",
    "scontrol": """
      echo "scontrol $*" >>"$FAKES/log"
      [[ $1 == show ]] && printf 'node-%s\\n' $(seq 1 2000)
      exit 0""",
    "scancel": 'echo "scancel $*" >>"$FAKES/log"; kill -USR1 "$(cat "$FAKES/ranks")"',
    "python": 'echo "python $*" >>"$FAKES/log"; env >"$FAKES/environment"',
}


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    """A folder of programs that log how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in PROGRAMS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def start(fakes: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the script of a job, by default as Slurm does; what still runs is ended."""
    started: list[subprocess.Popen[str]] = []

    def begin(job: Job = TWO_NODES, *words: str, slurm: bool = True, setup: str = "", **variables: str) -> subprocess.Popen[str]:
        home = fakes.parent
        (home / RECIPE).write_text("extends: agentic_lora\nname: my-run\n")
        (home / "job.sbatch").write_text(slurm_script(str(home / RECIPE), job).replace("\nset -uo pipefail\n", f"\nset -uo pipefail\n{setup}\n"))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMP", "TRITON", "TORCH"))}
        kept |= {"PATH": f"{fakes}:{kept['PATH']}", "FAKES": str(fakes), "RUN_DIR": RUN, "RECIPE": RECIPE}
        if slurm:
            kept |= {"SLURM_JOB_ID": "70001", "SLURM_JOB_NODELIST": "node-[1-2000]", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "32"}
        process = subprocess.Popen(
            ["bash", "job.sbatch", *words], cwd=home, env=kept | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()


def until(happened: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)


def warn(fakes: Path, process: subprocess.Popen[str], number: signal.Signals = signal.SIGUSR1) -> str:
    """What Slurm does to the script's own process, once its ranks are there; returns what it said to its end."""
    until(lambda: (fakes / "ranks").exists() and bool((fakes / "ranks").read_text()), process)
    process.send_signal(number)
    return process.communicate(timeout=60)[0]


def log(fakes: Path) -> list[str]:
    return (fakes / "log").read_text().splitlines()


def requeues(fakes: Path) -> int:
    return log(fakes).count("scontrol requeue 70001")


def test_the_ranks_are_told_once_and_a_preempted_job_goes_back_into_the_queue_once(fakes: Path, start: Any) -> None:
    process = start(TWO_NODES, "align.loop.tokens=1B", REASON="preempted", HF_TOKEN="secret", setup="WANDB_MODE=offline; HF_HOME=/hub")
    said = warn(fakes, process)
    assert (process.returncode, requeues(fakes)) == (130, 1), said
    assert log(fakes).count("scancel --signal=USR1 70001") == 1 and log(fakes).count("told USR1") == 1
    srun = next(line for line in log(fakes) if line.startswith("srun"))
    assert "--kill-on-bad-exit=1" in srun and "--cpus-per-task=32" in srun
    assert (fakes / "words").read_text().splitlines() == [
        "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=node-1:30001", "--rdzv-id=70001-0", "--nproc-per-node=4", "--max-restarts=0",
        "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGHUP", "-m", "limbeck", "run", RECIPE, "--run-dir", RUN, "align.loop.tokens=1B",
    ]  # fmt: skip
    environment = dict(line.split("=", 1) for line in (fakes / "environment").read_text().splitlines() if "=" in line)
    expected = {
        "HF_TOKEN": "secret", "WANDB_MODE": "offline", "HF_HOME": "/hub", "OMP_NUM_THREADS": "8", "MASTER_ADDR": "node-1", "MASTER_PORT": "30001",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240", "TRITON_CACHE_DIR": f"{os.environ['HOME']}/.cache/limbeck/triton",
    }  # fmt: skip
    assert {name: environment.get(name) for name in expected} == expected
    assert "CUDA_VISIBLE_DEVICES" not in environment or environment["CUDA_VISIBLE_DEVICES"] == os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    ("reason", "variables", "expected"),
    [
        ("finished", {}, (0, 0)),
        ("failed", {}, (1, 0)),
        ("", {}, (1, 1)),  # killed while it saved
        ("preempted", {"SLURM_RESTART_COUNT": "49"}, (130, 1)),
        ("preempted", {"SLURM_RESTART_COUNT": "50"}, (130, 0)),
        ("preempted", {"SLURM_RESTART_COUNT": "3", "MAX_REQUEUES": "3"}, (130, 0)),
    ],
)
def test_what_a_warned_run_says_decides_and_its_return_code_does_not(
    reason: str, variables: dict[str, str], expected: tuple[int, int], fakes: Path, start: Any
) -> None:
    process = start(REASON=reason, **variables)
    said = warn(fakes, process)
    assert (process.returncode, requeues(fakes)) == expected, said


def test_a_cancelled_job_saves_and_stays_ended(fakes: Path, start: Any) -> None:
    process = start(REASON="preempted")
    warn(fakes, process, signal.SIGTERM)
    assert (process.returncode, requeues(fakes)) == (130, 0) and log(fakes).count("told USR1") == 1


def test_a_second_signal_does_not_break_off_what_is_saving(fakes: Path, start: Any) -> None:
    process = start(REASON="preempted", SAVING="2")
    until((fakes / "ranks").exists, process)
    process.send_signal(signal.SIGUSR1)
    until(lambda: "told USR1" in log(fakes), process)
    warn(fakes, process, signal.SIGTERM)
    assert log(fakes).count("scancel --signal=USR1 70001") == 1 and process.returncode == 130


@pytest.mark.parametrize(("reason", "code"), [("failed", 1), ("", 1), ("finished", 0)])
def test_what_ends_without_a_warning_stays_ended(reason: str, code: int, fakes: Path, start: Any) -> None:
    (fakes.parent / RUN).mkdir(parents=True)
    (fakes.parent / RUN / "exit_reason").write_text("preempted\n")  # of the start before
    process = start(REASON=reason, AT_ONCE="1")
    said = process.communicate(timeout=60)[0]
    assert (process.returncode, requeues(fakes)) == (code, 0), said


def test_plain_bash_needs_no_slurm(fakes: Path, start: Any) -> None:
    process = start(slurm=False, REASON="preempted")
    warn(fakes, process)
    assert process.returncode == 130
    assert not [line for line in log(fakes) if line.startswith(("srun", "scontrol", "scancel"))]
    assert (fakes / "words").read_text().splitlines()[:2] == ["--standalone", "--nproc-per-node=4"]


def test_forms_without_gpus(fakes: Path, start: Any) -> None:
    start(Job(verb="capture", cpus=4), REASON="finished", AT_ONCE="1").communicate(timeout=60)
    ranks = [line for line in log(fakes) if line.startswith("torchrun")]
    assert [line.split("--stage ")[1] for line in ranks] == ["capture_8k", "capture_32k"] and all("--nproc-per-node=4" in line for line in ranks)
    assert "\nCUDA_VISIBLE_DEVICES=\n" in (fakes / "environment").read_text()
    start(Job(verb="capture"), REASON="failed", AT_ONCE="1").communicate(timeout=60)
    assert len([line for line in log(fakes) if line.startswith("torchrun")]) == 3, "what fails is not gone on from"
    start(Job(verb="prepare"), "windows_8k.sequence=64").communicate(timeout=60)
    start(Job(verb="report"), slurm=False).communicate(timeout=60)
    assert [line for line in log(fakes) if line.startswith("python")] == [
        f"python -m limbeck prepare {RECIPE} --run-dir {RUN} windows_8k.sequence=64", f"python -m limbeck report {RUN}",
    ]  # fmt: skip


TINY = """
name: tiny
stages:
  pretrain:
    data: {source: {kind: text, path: text.txt, documents: paragraph}, tokenizer: {vocabulary: 300}, sequence: 32}
    student:
      config: {model_type: qwen3, vocab_size: 300, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 1,
               num_key_value_heads: 1, head_dim: 16, max_position_embeddings: 64, tie_word_embeddings: true}
    optim: {groups: [{lr: 1e-3}]}
    loop: {steps: 100000, batch_tokens: 64, checkpoint_every: 100000, log_every: 5}
"""


def test_bash_job_sbatch_with_the_real_programs_saves_when_it_is_told_to(tmp_path: Path) -> None:
    home = tmp_path / "a place"
    home.mkdir()
    (home / "text.txt").write_text("\n\n".join(f"paragraph {i} of {i * i} words" for i in range(1000)))
    (home / RECIPE).write_text(TINY)
    (home / "job.sbatch").write_text(slurm_script(str(home / RECIPE), Job(gpus=0, cpus=1)))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{environment['PATH']}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        ["bash", "job.sbatch"], cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = home / "runs/tiny/pretrain/metrics.jsonl"
    until(lambda: metrics.exists() and bool(metrics.read_text()), process, 300)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 130, said
    assert (home / "runs/tiny/exit_reason").read_text() == "preempted\n"
    assert json.loads((home / "runs/tiny/pretrain/stage.json").read_text())["status"] == "preempted"
    assert saved_steps(home / "runs/tiny/pretrain/checkpoints"), said
