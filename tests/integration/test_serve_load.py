"""``limbeck serve`` under eight clients that do what clients do: the right answers, no crash, and no memory that stays."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import httpx2
import pytest

from gguf_case import write_gguf
from integration.serving import asking, wait_for
from integration.test_serve_process import serve, url_of

CLIENTS, ROUNDS, MEGABYTES = 8, 8, 20


@pytest.fixture(params=["gguf", "folder"])
def process(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    model = "builtin:code-2m"
    if request.param == "gguf":
        if find_spec("xllamacpp") is None:
            pytest.skip("serving a GGUF file needs xllamacpp: pip install xllamacpp")
        model = str(write_gguf(tmp_path / "tiny.gguf"))
    limits = ("--context", "512", "--parallel", "4", "--queue", "7", "--max-tokens", "100", "--max-body", "20000")
    started = serve(model, "--port", "0", "--threads", "1", *limits)
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def resident(process: subprocess.Popen[str]) -> float:
    """Megabytes of memory that a process has."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


# Each does one thing and says what it got; a status is given as its number.


def short(client: httpx2.Client, rng: random.Random) -> int | str:
    return client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 4, "seed": rng.randrange(99)}).status_code


def long(client: httpx2.Client, rng: random.Random) -> int | str:
    body = {"prompt": [60 + rng.randrange(20) for _ in range(300)], "max_tokens": 30, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as reply:
        text = "".join(reply.iter_text())
    return reply.status_code if reply.status_code != 200 or text.endswith("data: [DONE]\n\n") else "cut off"


def cancelled(client: httpx2.Client, rng: random.Random) -> int | str:
    with client.stream("POST", "/v1/completions", json={"prompt": "abc", "max_tokens": 100, "stream": True}) as reply:
        if reply.status_code == 200:
            next(reply.iter_text())
    return reply.status_code


def oversized(client: httpx2.Client, rng: random.Random) -> int | str:
    return client.post("/v1/completions", json={"prompt": "a" * rng.choice((20_000, 200_000))}).status_code


def too_long(client: httpx2.Client, rng: random.Random) -> int | str:
    return client.post("/v1/completions", json={"prompt": [70] * 600, "stream": rng.random() < 0.5}).status_code


def malformed(client: httpx2.Client, rng: random.Random) -> int | str:
    body = rng.choice((b"{", b"[]", b'{"prompt": {}}', b'{"prompt": "a", "temperature": 9}', b'{"prompt": "a", "nonsense": 1}', b"\xff\xfe"))
    return client.post("/v1/completions", content=body).status_code


DEEDS: dict[Callable[[httpx2.Client, random.Random], int | str], int] = {
    short: 200, long: 200, cancelled: 200, oversized: 413, too_long: 400, malformed: 400,
}  # fmt: skip
"""What is done, and the status that it must get when there is room."""


def client_of(url: str, number: int, rounds: int) -> Counter[tuple[str, int | str]]:
    rng, seen = random.Random(number), Counter[tuple[str, int | str]]()
    with asking(url) as client:
        for i in range(rounds):
            deed = list(DEEDS)[(i + number) % len(DEEDS)]
            seen[deed.__name__, deed(client, rng)] += 1
    return seen


def test_eight_clients_get_the_right_answers_and_leave_no_memory_behind(process: subprocess.Popen[str]) -> None:
    url, start = url_of(process), time.monotonic()
    with asking(url) as looker, ThreadPoolExecutor(CLIENTS) as pool:

        def storm(rounds: int) -> Counter[tuple[str, int | str]]:
            seen = sum(pool.map(lambda number: client_of(url, number, rounds), range(CLIENTS)), Counter[tuple[str, int | str]]())
            wait_for(lambda: looker.get("/health").json()["requests_under_way"] == 0)
            return seen

        storm(len(DEEDS))
        warm = resident(process)
        seen = storm(ROUNDS)
        after = resident(process)
        health = looker.get("/health").json()
        metrics = looker.get("/metrics").text
    for (deed, status), times in seen.items():
        wanted = next(code for function, code in DEEDS.items() if function.__name__ == deed)
        assert status in (wanted, 429), (deed, status, times)
    for function, status in DEEDS.items():
        assert seen[function.__name__, status] > 0, f"{function.__name__} never got its answer: {seen}"
    assert seen.total() == CLIENTS * ROUNDS and health["status"] == "ok" and health["places_taken"] == 0
    assert after - warm < MEGABYTES, f"{warm:.1f} MB after the warm-up, {after:.1f} MB in the end"
    assert 'status="413"' in metrics and 'status="500"' not in metrics
    assert time.monotonic() - start < 40
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in err, err
    print(f"{dict(seen)}: {warm:.1f} -> {after:.1f} MB, {time.monotonic() - start:.1f} s")


def test_more_clients_than_the_queue_holds_are_told_to_come_again(process: subprocess.Popen[str]) -> None:
    url = url_of(process)

    def ask(_: int) -> httpx2.Response:
        with asking(url) as client:
            return client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 40})

    with ThreadPoolExecutor(24) as pool:
        replies = list(pool.map(ask, range(24)))
    counts = Counter(reply.status_code for reply in replies)
    assert set(counts) == {200, 429} and counts[200] >= 7, counts
    assert all(1 <= int(reply.headers["retry-after"]) <= 60 for reply in replies if reply.status_code == 429)
