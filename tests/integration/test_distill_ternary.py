"""``limbeck distill-ternary``: the ternary plan's command line, end to end, against a teacher that another process serves."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from integration.serving import asking
from limbeck.config.parts.stages import GgufOptions
from limbeck.engine.checkpoint import damage
from limbeck.engine.metrics import loss_trace
from limbeck.errors import LimbeckError, RunError
from limbeck.stages.export import export_path
from limbeck.ternary import DistillTernary

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "base.loop.tokens=null", "base.loop.steps=2", "base.loop.batch_tokens=512", "base.loop.validate_every=null", "base.loop.stop_unless=null",
    "base.data.source=[{kind: stdlib, limit: 40}]", "base.data.held_out=0.2", "base.student.config.num_experts=4",
    "distil.data.source=[{kind: stdlib, limit: 40}]", "distil.data.held_out=0.2", "distil.loop.validate_every=null",
)  # fmt: skip
"""The recipe's student with half its experts, on a little text."""
FLAGS = ("--batch-size", "2", "--micro-batches", "2", "--seq-len", "64", "--save-every", "2", "--log-interval", "1", "--keep-last-checkpoints", "2")


def small(teacher: str, folder: Path, steps: int) -> DistillTernary:
    """The run of ``FLAGS`` and ``SMALL``, in this process."""
    return DistillTernary(
        teacher_endpoint=teacher, checkpoint_dir=folder, total_steps=steps, batch_size=2, micro_batches=2, seq_len=64, save_every=2, log_interval=1,
        keep_last_checkpoints=2, changes=SMALL,
    )  # fmt: skip


STEP = re.compile(r"\[ *\d+/ *\d+\] loss=\d+\.\d+ lr=\d\.\d+ gnorm=\d+\.\d tok/s=\d+ elapsed=\d+s")


def limbeck(*words: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), **environment}
    return subprocess.Popen([sys.executable, "-m", "limbeck", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=cwd)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process = limbeck("teach", "builtin:code-2m", "--port", "0", "--threads", "1", cwd=tmp_path_factory.mktemp("teacher"))
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("limbeck teach: http://"), process.communicate()
        yield line.split()[-1]
    finally:
        process.kill()


@pytest.fixture(scope="module")
def run(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run that was interrupted by Ctrl-C and started again, as a user would; its folder, and what each start printed."""
    folder = tmp_path_factory.mktemp("run")
    words = ("distill-ternary", "--total-steps", "8", *FLAGS, *SMALL)
    process = limbeck(*words, cwd=folder, TEACHER_ENDPOINT=teacher, CHECKPOINT_DIR="out")
    log = folder / "out" / "training.log"
    end = time.monotonic() + 120
    while not (log.exists() and "[     3/      8]" in log.read_text()):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    first, error = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on" in error, (first, error)
    again = limbeck(*words, cwd=folder, TEACHER_ENDPOINT=teacher, CHECKPOINT_DIR="out")
    second, error = again.communicate(timeout=240)
    assert again.returncode == 0, (second, error)
    return folder / "out", first, second


def test_it_goes_on_where_it_was_interrupted(run: tuple[Path, str, str]) -> None:
    folder, first, second = run
    assert "saved: the same command goes on from there" in first and re.search(r"resumed at step [3-7] from step_[3-7]", second)
    assert len(loss_trace(folder / "distil" / "metrics.jsonl")) == 8


def test_console_and_log_have_the_plans_lines(run: tuple[Path, str, str]) -> None:
    folder, first, second = run
    log = (folder / "training.log").read_text().splitlines()
    steps = [line for line in log if line.startswith("[ ")]
    assert len(steps) >= 8 and all(STEP.fullmatch(line) for line in steps)
    # The rate is Muon's.
    assert "lr=0.020" in steps[3]
    assert any(re.fullmatch(rf"  -> checkpoint saved to {folder}/step_6 \([\d.]+MB\)", line) for line in log)
    assert "  Cleaned 1 old checkpoint(s), keeping last 2" in log
    said = [line for line in (first + second).splitlines() if STEP.fullmatch(line)]
    assert said == steps


def test_step_folders_are_cleaned_and_final_is_kept_with_the_student_in_it(run: tuple[Path, str, str]) -> None:
    folder = run[0]
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith("step_") or p.name == "final") == ["final", "step_4", "step_6"]
    config = json.loads((folder / "final" / "model" / "config.json").read_text())
    assert config["limbeck"]["lambda"] == 1.0
    recorded = json.loads((folder / "recipe.json").read_text())["stages"]["distil"]
    assert recorded["optim"]["groups"][0]["kind"] == "muon" and recorded["teacher"]["in_flight"] == 2


def test_every_term_of_the_loss_is_logged(run: tuple[Path, str, str]) -> None:
    last = json.loads((run[0] / "distil" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"ce/raw", "topk_kl/raw", "moe_balance/raw", "router_entropy/raw", "kl", "agreement", "ternary/flips", "router/cv"} <= last.keys()


def test_the_same_settings_find_everything_done(run: tuple[Path, str, str], teacher: str) -> None:
    said: list[str] = []
    assert small(teacher, run[0], 8).run(say=lambda line: said.append(str(line))) == run[0] / "final"
    assert sum("done before, skipped" in line for line in said) == 2


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp comes with xllamacpp: pip install xllamacpp")
def test_the_final_folder_becomes_a_verified_file_that_is_served(run: tuple[Path, str, str], tmp_path: Path) -> None:
    from openai import OpenAI

    said: list[str] = []
    export_path(str(run[0] / "final"), output=tmp_path / "student.gguf", gguf=GgufOptions(verify=True), say=lambda line: said.append(str(line)))
    assert any("verified in llama.cpp" in line for line in said) and any("tq2_0" in line for line in said)
    # Nothing was put into the checkpoint.
    assert damage(run[0] / "final") is None
    server = limbeck("serve", "--model", "student.gguf", "--port", "0", "--numa-aware", "--threads", "1", "--chat-template", "plain", cwd=tmp_path)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        # The plan's own request, as curl sends it.
        body = '{"messages": [{"role": "user", "content": "Write a Python function to check if a number is prime"}], "max_tokens": 500, "temperature": 0.7}'
        with asking(url) as client:
            reply = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 200 and reply.json()["choices"][0]["message"]["role"] == "assistant"
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        asked = {"model": "student", "messages": [{"role": "user", "content": "def f("}], "max_tokens": 8, "temperature": 0}
        whole = client.chat.completions.create(**asked).choices[0].message.content
        pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True) if chunk.choices]
        assert whole and "".join(pieces) == whole
    finally:
        server.kill()


def test_both_examples_run(teacher: str, tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "PYTHON": sys.executable, "RECIPE": "ternary", "PROTOCOL": "limbeck"}
    env |= {"TEACHER_ENDPOINT": teacher, "CHECKPOINT_DIR": str(tmp_path / "shell"), "MICRO_BATCHES": "2", "PARALLEL": "false", "DEVICE": "cpu"}
    words = ["--total-steps", "2", "--batch-size", "1", "--seq-len", "64", *SMALL]
    done = subprocess.run([str(ROOT / "examples" / "train_qwen3_distill.sh"), *words], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and (tmp_path / "shell" / "final" / "model" / "config.json").exists(), done.stderr
    command = [sys.executable, str(ROOT / "examples" / "distill_qwen3.py"), "--teacher-endpoint", teacher, "--checkpoint-dir", str(tmp_path / "python")]
    command += ["--total-steps", "6", "--batch-size", "1", "--micro-batches", "1", "--seq-len", "64", *SMALL]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert not find_spec("gguf") or (tmp_path / "python" / "student.gguf").exists()


# -- what does not fit ---------------------------------------------------------------------------------------------------------


def test_a_teacher_that_is_not_there_ends_the_run_before_anything_is_made(tmp_path: Path) -> None:
    run = DistillTernary(teacher_endpoint="http://127.0.0.1:9", checkpoint_dir=tmp_path / "out")
    with pytest.raises(LimbeckError, match=r"Failed to connect to teacher endpoint: http://127.0.0.1:9(.|\n)*teacher.url is --teacher-endpoint"):
        run.run()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"total_steps": 0}, "--total-steps 0: must be 1 or more"),
        ({"keep_last_checkpoints": -1}, "--keep-last-checkpoints -1"),
        ({"kl_weight": 1.5}, "--kl-weight 1.5: is a share"),
        ({"total_steps": 100, "warmup_steps": 100}, "--warmup-steps 100: the learning rate would still rise"),
        ({"total_steps": 100, "lambda_steps": 200}, "--lambda-steps 200: after 100 steps the student is not ternary yet"),
        ({"recipe": "hybrid"}, "--recipe hybrid: it has no train stage 'distil'"),
        ({"recipe": "ternray"}, "did you mean 'ternary'"),
        ({"changes": ("distil.loop.stepz=3",)}, "did you mean 'steps'"),
        ({"student": "builtin:nothing"}, "no built-in 'nothing'"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(settings: dict[str, object], word: str, tmp_path: Path) -> None:
    with pytest.raises(LimbeckError, match=re.escape(word)):
        DistillTernary(**{"teacher_endpoint": "http://127.0.0.1:9", "checkpoint_dir": tmp_path, **settings}).load()  # type: ignore[arg-type]


def test_the_plans_defaults_are_those_of_a_long_run(tmp_path: Path) -> None:
    stage = DistillTernary(teacher_endpoint="http://h:1", checkpoint_dir=tmp_path).load().stages["distil"]
    loop, groups = stage.loop, {group.kind: group.lr for group in stage.optim.groups}
    assert (loop.steps, loop.batch_tokens, loop.microbatch, loop.keep_last, loop.checkpoint_every) == (100_000, 65_536, 4, 3, 1000)
    assert groups == {"muon": 0.02, "lion": 1e-4} and (stage.optim.schedule.kind, stage.optim.schedule.warmup) == ("wsd", 2000)
    weights = {o.kind: o.weight for o in stage.objectives}
    assert weights == {"ce": 0.5, "topk_kl": 0.5, "moe_balance": 0.01, "router_entropy": 0.001}
    assert stage.objectives[1].temperature == 2 and (stage.teacher.in_flight, stage.teacher.lookahead) == (8, 1)
    assert stage.student.surgery[0].warmup == 1000


def test_weights_of_zero_leave_their_terms_out(tmp_path: Path) -> None:
    settings = {"kl_weight": 1.0, "load_balance_weight": 0.0, "router_aux_weight": 0.0, "parallel": False, "protocol": "vllm"}
    stage = DistillTernary(teacher_endpoint="http://h:1", checkpoint_dir=tmp_path, **settings).load().stages["distil"]  # type: ignore[arg-type]
    assert [o.kind for o in stage.objectives] == ["topk_kl"] and stage.objectives[0].allow_approximate_tail
    assert (stage.teacher.in_flight, stage.teacher.lookahead) == (1, 0)


def test_a_dense_student_has_no_router_to_balance(tmp_path: Path) -> None:
    stage = DistillTernary(teacher_endpoint="http://h:1", checkpoint_dir=tmp_path, student="builtin:code-2m").load().stages["distil"]
    assert [o.kind for o in stage.objectives] == ["ce", "topk_kl"] and stage.student.surgery[0].plan == "auto"


def test_the_large_recipe_takes_the_same_flags(tmp_path: Path) -> None:
    stage = DistillTernary(teacher_endpoint="http://h:1", checkpoint_dir=tmp_path, recipe="ternary_qwen3_coder_next", protocol="vllm").load().stages["distil"]
    assert stage.student.base == "Qwen/Qwen3-Coder-Next" and stage.objectives[1].allow_approximate_tail


def test_a_log_of_something_else_is_not_overwritten(teacher: str, tmp_path: Path) -> None:
    (tmp_path / "training.log").write_text("mine\n")
    with pytest.raises(RunError, match=r"training.log: is there already"):
        DistillTernary(teacher_endpoint=teacher, checkpoint_dir=tmp_path, total_steps=1).run()
    assert (tmp_path / "training.log").read_text() == "mine\n"


def test_a_folder_that_cannot_be_made_is_named(teacher: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"--checkpoint-dir .*file/out: cannot be used"):
        DistillTernary(teacher_endpoint=teacher, checkpoint_dir=tmp_path / "file" / "out", total_steps=1).run()


def test_other_settings_set_the_old_checkpoints_aside(run: tuple[Path, str, str], teacher: str, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(run[0], folder, symlinks=True)
    said: list[str] = []
    small(teacher, folder, 1).run(say=lambda line: said.append(str(line)))
    assert any("stale" in line for line in said)
    assert sorted(p.name for p in (folder / "distil.stale-1" / "checkpoints").iterdir()) == ["final", "step_4", "step_6"]
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(("step_", "final"))) == ["final"]
