"""The whole of it: `limbeck teach` in one process, training in another, faults between them, the server killed and started again.

The loss curve is that of the run without faults, bit for bit.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from integration.faults import FaultyApp, Receive, Scope, Send
from integration.serving import serving
from limbeck.config.load import load_recipe
from limbeck.engine.metrics import loss_trace
from limbeck.errors import TeacherError
from limbeck.models.vocabulary import vocabulary_digest
from limbeck.stages.run import run_recipe

MODEL = """{model_type: qwen3, vocab_size: 400, hidden_size: %d, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4,
               num_key_value_heads: 2, head_dim: 16, max_position_embeddings: 256, tie_word_embeddings: true}"""
RECIPE = f"""
name: drill
stages:
  teacher:
    data: {{source: {{kind: text, path: corpus, suffixes: [.py]}}, tokenizer: {{vocabulary: 400}}, sequence: 64, held_out: 0.1}}
    student:
      config: {MODEL % 32}
    optim: {{groups: [{{lr: 3e-3}}]}}
    loop: {{steps: 4, batch_tokens: 512}}
"""
STUDENT = f"""
name: taught
stages:
  distil:
    data: {{source: {{kind: text, path: corpus, suffixes: [.py]}}, tokenizer: run/teacher/model, sequence: 64, held_out: 0.1}}
    student:
      config: {MODEL % 16}
    teacher: {{kind: http, url: "http://127.0.0.1:1", tokens_per_request: 200, in_flight: 4, timeout: 5, canary_every: 6}}
    objectives: [{{kind: topk_kl, k: 8, temperature: 2, weight: 0.7}}, {{kind: ce, weight: 0.3}}]
    optim: {{groups: [{{lr: 3e-3}}]}}
    loop: {{steps: 24, batch_tokens: 512, microbatch: 2, precision: float32}}
"""


class Teach:
    """`limbeck teach` in a process of its own, always on the same port."""

    def __init__(self, model: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model = model
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = [sys.executable, "-m", "limbeck", "teach", str(self.model), "--port", str(self.port), "--threads", "1"]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert self.process.stdout is not None
        assert self.url in self.process.stdout.readline()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Proxy:
    """Passes requests on, and an unreachable server as a reset; kills and restarts it once, at request number ``fatal``."""

    def __init__(self, teach: Teach, fatal: int):
        self.teach, self.fatal, self.seen = teach, fatal, 0
        self.client = httpx2.AsyncClient(base_url=teach.url, trust_env=False, timeout=30)
        self.restart: threading.Thread | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.seen += 1
        if self.seen == self.fatal:
            self.teach.kill()
            self.restart = threading.Thread(target=self.teach.start)
            self.restart.start()
        headers = {k.decode(): v.decode() for k, v in scope["headers"] if k not in (b"host", b"content-length")}
        try:
            reply = await self.client.request(scope["method"], scope["path"], content=body, headers=headers)
        except httpx2.TransportError:
            status, content, kind = 502, b'{"error": {"message": "no server behind the proxy"}}', "application/json"
        else:
            status, content, kind = reply.status_code, reply.content, reply.headers.get("content-type", "")
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode())]})
        await send({"type": "http.response.body", "body": content})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("drill")
    (home / "corpus").mkdir()
    for source in sorted(Path(textwrap.__file__).parent.glob("[a-d]*.py"))[:30]:
        (home / "corpus" / source.name).write_bytes(source.read_bytes())
    (home / "teacher.yaml").write_text(RECIPE)
    (home / "student.yaml").write_text(STUDENT)
    run_recipe(load_recipe(home / "teacher.yaml"), recipe_dir=home, run_dir=home / "run", say=lambda line: None)
    return home


def train(home: Path, name: str, url: str) -> list[float]:
    recipe = load_recipe(home / "student.yaml", [f"distil.teacher.url={json.dumps(url)}"])
    said: list[Any] = []
    run = run_recipe(recipe, recipe_dir=home, run_dir=home / name, say=said.append)
    return loss_trace(run / "distil" / "metrics.jsonl")


def test_a_served_teacher_of_other_tokens_is_refused(home: Path) -> None:
    from limbeck.models.loading import load_tokenizer
    from limbeck.stages.teaching import check_teacher_vocabulary

    tokenizer = load_tokenizer(str(home / "run" / "teacher" / "model"))
    served = SimpleNamespace(findings=SimpleNamespace(tokenizer=vocabulary_digest(tokenizer)), options=SimpleNamespace(url="http://x"))
    behind = SimpleNamespace(inner=served)
    check_teacher_vocabulary(behind, tokenizer)
    served.findings.tokenizer = "0" * 64
    with pytest.raises(TeacherError, match="http://x has another vocabulary"):
        check_teacher_vocabulary(behind, tokenizer)


def test_the_loss_curve_survives_faults_and_a_killed_server(home: Path) -> None:
    teach = Teach(home / "run" / "teacher")
    try:
        whole = train(home, "whole", teach.url)
        assert len(whole) == 24 and whole[-1] < whole[0]
        proxy = Proxy(teach, fatal=60)
        faulty = FaultyApp(proxy, rate=0.1, seed=3, stall_seconds=2.0)
        began = time.monotonic()
        with serving(faulty) as url:
            drilled = train(home, "drilled", url)
        assert proxy.restart is not None, "the server was to be killed in the middle"
        proxy.restart.join()
        assert sum(faulty.injected.values()) >= 5, f"{faulty.injected} of {faulty.requests}"
        assert drilled == whole
        assert time.monotonic() - began < 150
    finally:
        teach.kill()
