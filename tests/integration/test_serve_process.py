"""``limbeck serve`` as a process: the seed's own line and request, how it ends, and what it refuses before it listens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from gguf_case import write_gguf
from integration.serving import asking

needs_llama = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="serving a GGUF file needs xllamacpp: pip install xllamacpp")
CHAT = {"messages": [{"role": "user", "content": "Write a Python function to check if a number is prime"}], "max_tokens": 500, "temperature": 0.7}


def serve(*words: str, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "limbeck", "serve", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def url_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("limbeck serve: http://127.0.0.1:"), process.communicate()
    return line.split()[-1]


@needs_llama
def test_a_gguf_file_is_served_as_the_seed_says_and_sigterm_lets_a_stream_end(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "qwen3-hybrid.gguf")
    process = serve("--model", str(file), "--port", "0", "--numa-aware", "--threads", "1", "--api-key-env", "THE_KEY", THE_KEY="a-secret")
    try:
        url = url_of(process)
        with asking(url) as stranger:
            assert stranger.post("/v1/chat/completions", json=CHAT).status_code == 401
        with asking(url, headers={"authorization": "Bearer a-secret"}) as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "qwen3-hybrid"
            answer = client.post("/v1/chat/completions", json=CHAT).json()
            assert answer["choices"][0]["message"]["content"] and answer["usage"]["completion_tokens"] <= 500
            with client.stream("POST", "/v1/chat/completions", json={**CHAT, "max_tokens": 1500, "stream": True}) as reply:
                lines = reply.iter_lines()
                first = next(lines)
                process.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
            assert first.startswith("data: {") and rest[-1] == "data: [DONE]"
            assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("length", "stop")
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (0, ""), err
    assert "Traceback" not in err and "a-secret" not in err and "qwen3-hybrid, context 2048, 4 answers at once" in err


def test_a_stream_that_outlasts_the_grace_time_is_cut_with_a_word() -> None:
    process = serve("builtin:code-2m", "--port", "0", "--threads", "1", "--grace", "0.3", "--parallel", "1")
    try:
        with asking(url_of(process)) as client:
            body = {"prompt": "def f(", "stream": True, "temperature": 1, "seed": 0}
            with client.stream("POST", "/v1/completions", json=body) as reply:
                lines = reply.iter_lines()
                assert next(lines).startswith("data: {")
                process.send_signal(signal.SIGINT)
                rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: ")).get("error", {}).get("message") == "the server is shutting down"
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in err, err


def test_what_cannot_be_served_ends_with_a_message_before_it_listens(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    good = str(write_gguf(tmp_path / "tiny.gguf"))
    (tmp_path / "cut.gguf").write_bytes(Path(good).read_bytes()[:-2000])
    cases = [
        (serve(), "name one model, as in `limbeck serve model.gguf`"),
        (serve("builtin:code-2m", "--numa-aware", "--port", "0"), "--numa-aware: is for GGUF files, and builtin:code-2m is none"),
        (serve("builtin:code-2m", "--api-key-env", "NOT_SET", "--port", "0"), "--api-key-env NOT_SET: is not set"),
        (serve("builtin:code-2m", "--context", "99999", "--port", "0"), "--context 99999: builtin:code-2m was made for"),
        (serve("builtin:code-2m", "--revision", "main", "--port", "0"), "--revision: is for hub models, and builtin:code-2m is a folder here"),
    ]
    if find_spec("xllamacpp") is not None:
        (tmp_path / "notes").write_text("hello")
        cases += [
            (serve(str(tmp_path / "notes"), "--port", "0"), "notes: is no GGUF file (it begins with b'hell')"),
            (serve(str(tmp_path / "text.gguf"), "--port", "0"), "text.gguf: is no GGUF file"),
            (serve(str(tmp_path / "cut.gguf"), "--port", "0"), "cut.gguf: llama.cpp cannot load it"),
            (serve(str(tmp_path / "absent.gguf"), "--port", "0"), "absent.gguf: cannot be read (No such file or directory)"),
            (serve(good, "--device", "cpu", "--port", "0"), "--device: is for model folders"),
            (serve(good, "--context", "99999", "--port", "0"), "--context 99999, and the model was made for 2048"),
        ]
    for process, message in cases:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (2, "") and message in err and "Traceback" not in err, (process.args, err)


def test_the_verb_shows_its_options_without_torch() -> None:
    code = "import sys\nfrom limbeck.cli.app import app\ntry:\n app(['serve', '--help'])\nexcept SystemExit:\n pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "--numa-aware" in done.stdout, done.stderr


