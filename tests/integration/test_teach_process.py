"""``limbeck teach`` as a process: what it prints, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from integration.serving import asking, wait_for

QUESTION = {"sequences": [[1, 2, 3]], "positions": [[0, 2]], "top_k": 4}


def teach(*words: str, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "limbeck", "teach", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def test_sigterm_ends_the_process_when_what_runs_is_answered() -> None:
    process = teach("builtin:code-2m", "--port", "0", "--threads", "1", "--log-every", "2", LIMBECK_TEACH_TOKEN="a-secret")
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("limbeck teach: http://127.0.0.1:"), process.communicate()
        url = line.split()[-1]
        with asking(url, headers={"authorization": "Bearer a-secret"}) as client:
            assert client.get("/health").json()["model"] == "builtin:code-2m"
            rng = np.random.default_rng(1)
            long = {"sequences": [rng.integers(0, 4096, 1500).tolist() for _ in range(2)], "positions": [[1499]] * 2, "top_k": 4}
            with ThreadPoolExecutor(1) as pool:
                reply = pool.submit(client.post, "/v1/topk", json=long)
                wait_for(lambda: "limbeck_requests_under_way 1" in client.get("/metrics").text or reply.done())
                process.send_signal(signal.SIGTERM)
                assert reply.result().status_code == 200
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert out == "" and "Traceback" not in err and "a-secret" not in err
    assert "builtin:code-2m in float32 on cpu" in err and "2 requests" in err


def test_a_forward_that_outlasts_the_grace_time_does_not_hold_the_process() -> None:
    code = (
        "import time, limbeck.teachers.scoring as s\n"
        "s.Scorer.score = lambda *a, **k: time.sleep(300)\n"
        "from limbeck.cli.app import app\n"
        "app(['teach', 'builtin:code-2m', '--port', '0', '--grace', '1'], prog_name='limbeck')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        with asking(url) as client, ThreadPoolExecutor(1) as pool:
            reply = pool.submit(client.post, "/v1/topk", json=QUESTION)
            wait_for(lambda: "limbeck_requests_under_way 1" in client.get("/metrics").text)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
            assert reply.exception() is not None or reply.result().status_code >= 500
    finally:
        process.kill()
    assert process.returncode == 0, err


def test_what_cannot_be_served_ends_with_a_message_before_it_listens(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        started = [
            (teach(str(tmp_path / "empty"), "--port", "0"), "no config.json in this folder"),
            (teach("builtin:code-2m", "--port", port), f"127.0.0.1:{port} cannot be listened on"),
            (teach("builtin:code-2m", "--host", "no.such.host.invalid"), "--host no.such.host.invalid: no such address"),
            (teach("builtin:code-2m", "--port", "0", LIMBECK_TEACH_TOKEN=" "), "LIMBECK_TEACH_TOKEN is set to something that is no token"),
            (teach("builtin:code-2m", "--port", "0", "--device", "cuda:99"), "--device cuda:99: cannot be used here"),
        ]
        for process, message in started:
            out, err = process.communicate(timeout=120)
            assert (process.returncode, out) == (2, "") and message in err and "Traceback" not in err, (process.args, err)
