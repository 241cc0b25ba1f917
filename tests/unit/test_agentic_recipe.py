"""The agentic recipe at full size: its numbers, the size of its generator, and the scripts that start it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.adapters.spec import AdapterSpec, Site
from limbeck.agentic import STUDENT_CONFIG, TEACHER_CONFIG, AgenticHyperNetwork, teacher_options
from limbeck.config.load import SHIPPED, load_recipe
from limbeck.config.recipe import Recipe, stage_order
from limbeck.students.generator.network import Generator
from limbeck.teachers.http.launch import command_line

LAUNCH = SHIPPED / "launch"
TEACHER, SLURM = LAUNCH / "agentic_teacher.sh", LAUNCH / "agentic.slurm"
TRAIN = ("warmup", "main", "anneal", "static", "static_anneal")
SITES = {
    "linear_attn.in_proj_qkvz": (2048, 12288), "linear_attn.in_proj_ba": (2048, 64), "linear_attn.out_proj": (4096, 2048),
    "self_attn.q_proj": (2048, 8192), "self_attn.k_proj": (2048, 512), "self_attn.v_proj": (2048, 512), "self_attn.o_proj": (4096, 2048),
}  # fmt: skip
"""Linears of Qwen3-Coder-Next, in and out; attention in every fourth of 48 layers."""


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("agentic_lora")


def test_it_is_the_plans_schedule(recipe: Recipe) -> None:
    stages = recipe.stages
    assert stage_order(recipe) == list(stages) == ["windows_8k", "windows_32k", "capture_8k", "capture_32k", *TRAIN, "evaluate", "export"]
    warmup, main, anneal = (stages[name] for name in TRAIN[:3])
    assert (warmup.loop.samples, warmup.optim.groups[0].lr, warmup.loop.stop_unless.loss) == (1000, 1e-5, "decreases")
    assert (main.loop.epochs, main.optim.groups[0].lr, main.student.from_) == (20, 1e-4, "warmup")
    assert (anneal.student.from_, anneal.data.from_, anneal.teacher.signals.from_) == ("main", "windows_32k", "capture_32k")
    for stage in (stages[name] for name in TRAIN):
        assert [(o.kind, o.weight) for o in stage.objectives] == [("topk_kl", 1.0), ("norm_penalty", 1e-3)]
        topk = stage.objectives[0]
        assert (topk.k, topk.tail, topk.temperature, topk.direction) == (128, "tail", 1.0, "forward")
        loop, rows = stage.loop, stages[stage.data.from_].sequence
        assert loop.activation_checkpointing and (loop.precision, loop.microbatch, stage.optim.clip) == ("bfloat16", 1, 1.0)
        assert loop.checkpoint_every and loop.batch_tokens == rows * len(STUDENT_CONFIG["devices"])
        assert stage.student.train == ("generator",) and stage.teacher.kind == "stored"


def test_its_windows_are_the_same_trajectories_at_two_lengths(recipe: Recipe) -> None:
    short, long = recipe.stages["windows_8k"], recipe.stages["windows_32k"]
    assert (short.sequence, long.sequence) == (8192, 32768)
    assert short.model_copy(update={"sequence": 0}) == long.model_copy(update={"sequence": 0})
    assert (short.hub.path, short.tokenizer) == ("nebius/SWE-rebench-openhands-trajectories", STUDENT_CONFIG["model"])
    assert (short.filters.resolved, short.filters.exit_status, short.filters.patch, short.filters.swe_bench) == (True, ("submit",), True, "drop")
    assert (short.policy, short.condition.tokens, short.held_out) == ("windows", 512, 0.1)


def test_the_teacher_is_asked_once_for_what_training_and_judging_use(recipe: Recipe) -> None:
    for name in ("capture_8k", "capture_32k"):
        capture = recipe.stages[name]
        assert (capture.k, capture.codec, capture.splits, capture.temperatures) == (128, "compact", ("train", "held_out"), (1.0,))
        assert (capture.teacher.kind, capture.teacher.protocol, capture.teacher.model) == ("http", "vllm", TEACHER_CONFIG["model"])
        assert capture.teacher.url == teacher_options().url
        assert recipe.stages[capture.data.from_].sequence < TEACHER_CONFIG["max_model_len"]
    judge = recipe.stages["evaluate"]
    assert (judge.from_, judge.against, judge.top_k) == ("anneal", ("static_anneal",), 128)
    assert judge.teacher.signals.from_ == recipe.stages["anneal"].teacher.signals.from_ and "held_out_source" in judge.splits and judge.turns
    assert recipe.stages["export"].to == ("peft",)


def test_the_control_differs_in_nothing_but_the_condition(recipe: Recipe) -> None:
    for name, control in (("main", "static"), ("anneal", "static_anneal")):
        a, b = recipe.stages[name], recipe.stages[control]
        assert a.model_copy(update={"student": b.student}) == b
    generated, static = (recipe.stages[name].student.surgery[0] for name in ("warmup", "static"))
    assert (generated.condition, static.condition) == ("base", "none")
    assert all(getattr(generated, field) == getattr(static, field) for field in ("targets", "rank", "alpha", "rslora", "base_dtype"))
    assert generated.base_dtype == STUDENT_CONFIG["dtype"]


def real_spec(rank: int, alpha: float) -> AdapterSpec:
    kinds = {"linear_attn": tuple(i for i in range(48) if i % 4 != 3), "self_attn": tuple(range(3, 48, 4))}
    sites = (Site(name, name, *shape, "model.layers", kinds[name.split(".")[0]]) for name, shape in SITES.items())
    return AdapterSpec(tuple(sites), rank, alpha)


def test_its_generator_keeps_to_50_million_parameters(recipe: Recipe) -> None:
    options = recipe.stages["warmup"].student.surgery[0]
    assert set(options.targets) == {name.split(".")[1] for name in SITES} == {*AgenticHyperNetwork.ATTENTION_TARGETS, *AgenticHyperNetwork.DELTANET_TARGETS}
    assert (options.rank, options.alpha) == (16, 32) == (AgenticHyperNetwork.RANK, AgenticHyperNetwork.ALPHA)
    spec = real_spec(options.rank, options.alpha)
    assert spec.num_parameters == 12 * 344_064 + 36 * 361_472 == 17_141_760
    with torch.device("meta"):
        generator = Generator(spec, options, 2048, (1, 512))
    assert sum(p.numel() for p in generator.parameters()) == 48_172_856 <= 50_000_000


def test_check_passes_without_a_network() -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    code = "import sys; from limbeck.cli.app import main; sys.argv = ['limbeck', 'check', 'agentic_lora']; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(f" {name} (" in done.stdout for name in ("windows_8k", *TRAIN, "evaluate"))


# -- scripts ---------------------------------------------------------------------------------------------------------------


def printed(**variables: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TEACHER_")}
    done = subprocess.run(["bash", str(TEACHER), "--print"], env={**environment, **variables}, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("script", [TEACHER, SLURM], ids=lambda path: path.name)
def test_scripts_are_bash_and_stop_at_the_first_fault(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text and "trap stop EXIT" in text


def test_the_script_says_to_vllm_what_a_recipe_says() -> None:
    assert printed() == command_line(teacher_options())
    four = {
        "model": "/models/4bit", "tensor_parallel_size": 4, "devices": [0, 1, 2, 3], "gpu_memory_utilization": 0.8, "max_logprobs": 64, "max_model_len": 9000
    }  # fmt: skip
    told = printed(
        TEACHER_MODEL="/models/4bit", TEACHER_QUANTISATION="", TEACHER_TENSOR_PARALLEL="4", TEACHER_EXPERT_PARALLEL="0", TEACHER_GPU_MEMORY="0.8",
        TEACHER_MAX_LOGPROBS="64", TEACHER_MAX_MODEL_LEN="9000", TEACHER_HOST="10.0.0.7", TEACHER_PORT="9000",
    )  # fmt: skip
    assert told == command_line(teacher_options(four, "http://10.0.0.7:9000"))


FAKE_VLLM = """#!{python}
import http.server, json, os, subprocess, sys, threading
# A worker of its own, as vLLM has them.
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
record = {{"words": sys.argv, "devices": os.environ["CUDA_VISIBLE_DEVICES"], "pids": [os.getpid(), worker.pid]}}
with open(os.environ["FAKE_RECORD"], "w") as file:
    json.dump(record, file)

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *words):
        pass

http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Health).serve_forever()
"""

FAKE_PYTHON = """#!/usr/bin/env bash
# Says what it was asked to run, with what of the GPUs, and whether a teacher answers.
answers=no
curl --silent --fail --noproxy '*' --max-time 2 --output /dev/null "http://127.0.0.1:$TEACHER_PORT/health" && answers=yes
printf '%s|%s|%s\\n' "${CUDA_VISIBLE_DEVICES-unset}" "$answers" "$*" >>"$FAKE_CALLS"
if [[ -n ${FAKE_FAILS-} && "$*" == *"$FAKE_FAILS"* ]]; then exit 3; fi
"""


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def alive(pid: int) -> bool:
    """Whether a process still runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def submitted(folder: Path, **variables: str) -> tuple[int, list[list[str]], dict[str, Any]]:
    """Run the Slurm script with a vLLM that only answers for its health: exit code, calls, and what was served."""
    for name, text in (("vllm", FAKE_VLLM.format(python=sys.executable)), ("python", FAKE_PYTHON)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TEACHER_", "CUDA_"))}
    environment |= {
        "PYTHON": str(folder / "python"), "LAUNCH": str(LAUNCH), "TEACHER_COMMAND": str(folder / "vllm"), "TEACHER_PORT": str(free_port()),
        "FAKE_CALLS": str(folder / "calls"), "FAKE_RECORD": str(folder / "served.json"), "TEACHER_WAIT": "30", **variables,
    }  # fmt: skip
    done = subprocess.run(["bash", str(SLURM)], env=environment, capture_output=True, text=True, check=False, timeout=60)
    calls = [line.split("|") for line in (folder / "calls").read_text().splitlines()]
    served = folder / "served.json"
    return done.returncode, calls, json.loads(served.read_text()) if served.exists() else {}


needs_tools = pytest.mark.skipif(not (shutil.which("curl") and shutil.which("setsid") and Path("/proc/self/stat").exists()), reason="needs curl, setsid, /proc")


@needs_tools
def test_the_slurm_script_serves_for_the_captures_and_then_trains_on_all_gpus(tmp_path: Path) -> None:
    code, calls, served = submitted(tmp_path, OVERRIDES="main.loop.epochs=2")
    assert code == 0
    port = served["words"][served["words"].index("--port") + 1]
    overrides = f"main.loop.epochs=2 capture_8k.teacher.url=http://127.0.0.1:{port} capture_32k.teacher.url=http://127.0.0.1:{port}"
    ranks = "-m torch.distributed.run --standalone --nproc-per-node 8 -m limbeck run agentic_lora"
    assert calls == [
        ["unset", "no", f"-m limbeck prepare agentic_lora {overrides}"],
        ["", "yes", f"{ranks} {overrides} --stage capture_8k"],
        ["", "yes", f"{ranks} {overrides} --stage capture_32k"],
        ["unset", "no", f"{ranks} {overrides}"],
    ]
    assert served["devices"] == "0,1,2,3,4,5,6,7" and not any(alive(pid) for pid in served["pids"])
    # The overrides are ones that the recipe takes.
    assert load_recipe("agentic_lora", overrides.split()).stages["main"].loop.epochs == 2


@needs_tools
def test_the_slurm_script_ends_the_teacher_when_a_capture_fails(tmp_path: Path) -> None:
    code, calls, served = submitted(tmp_path, FAKE_FAILS="capture_32k")
    # The stage's name is in the overrides of every call: the first one fails.
    assert code == 3 and len(calls) == 1 and not served
    code, calls, served = submitted(tmp_path, FAKE_FAILS="--stage capture_8k")
    assert code == 3 and len(calls) == 3 and not any(alive(pid) for pid in served["pids"])


@needs_tools
def test_the_teacher_ends_with_all_that_it_started_when_its_script_is_told_to(tmp_path: Path) -> None:
    (tmp_path / "vllm").write_text(FAKE_VLLM.format(python=sys.executable))
    (tmp_path / "vllm").chmod(0o755)
    record = tmp_path / "served.json"
    told = {"TEACHER_COMMAND": str(tmp_path / "vllm"), "TEACHER_PORT": str(free_port()), "TEACHER_DEVICES": "4,5", "FAKE_RECORD": str(record)}
    script = subprocess.Popen(["bash", str(TEACHER)], env={**os.environ, **told})
    try:
        end = time.monotonic() + 20
        while not (record.exists() and record.read_text().endswith("}")) and time.monotonic() < end:
            time.sleep(0.05)
        served = json.loads(record.read_text())
        assert served["devices"] == "4,5" and all(alive(pid) for pid in served["pids"])
        script.terminate()
        assert script.wait(20) == 143 and not any(alive(pid) for pid in served["pids"])
    finally:
        script.kill()


@needs_tools
def test_the_slurm_script_goes_on_without_a_teacher_and_says_when_there_is_none(tmp_path: Path) -> None:
    code, calls, served = submitted(tmp_path, CAPTURE="0")
    assert code == 0 and not served and [" --stage " in call[2] for call in calls] == [False, False]
    (tmp_path / "calls").unlink()
    code, calls, _ = submitted(tmp_path, TEACHER_COMMAND=str(tmp_path / "missing"))
    assert code == 1 and len(calls) == 1


def test_the_scripts_are_shipped() -> None:
    root = Path(__file__).resolve().parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]["limbeck"]
    package = SHIPPED.parent
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    assert {TEACHER, SLURM, SHIPPED / "agentic_lora.yaml"} <= shipped
