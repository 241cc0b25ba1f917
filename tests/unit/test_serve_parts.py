"""The parts of a server that need no server."""

from __future__ import annotations

import asyncio
import gzip
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import zstandard
from starlette.requests import ClientDisconnect

from limbeck.errors import LimbeckError
from limbeck.serve.gate import check_token
from limbeck.serve.metrics import Metrics
from limbeck.serve.openai.templates import PLAIN, read_template
from limbeck.serve.refusals import Refusal, retry_after
from limbeck.serve.replies import accepted_encoding, reply
from limbeck.serve.worker import Worker


@pytest.mark.parametrize(
    ("header", "best"),
    [
        ("", None),
        ("identity", None),
        ("gzip", "gzip"),
        ("gzip, deflate, br, zstd", "zstd"),
        ("GZIP;q=1.0, zstd;q=0.5", "gzip"),
        ("zstd;q=0", None),
        ("*", "zstd"),
        ("zstd;q=0, *", "gzip"),
        ("gzip;q=nonsense", None),
    ],
)
def test_the_client_chooses_the_compression(header: str, best: str | None) -> None:
    assert accepted_encoding(header) == best


def test_a_compressed_body_is_the_body_and_always_the_same_bytes() -> None:
    body = bytes(range(256)) * 40
    for encoding, unpack in (("gzip", gzip.decompress), ("zstd", zstandard.decompress)):
        first, second = (reply(body, "text/plain", encoding) for _ in range(2))
        assert bytes(first.body) == bytes(second.body) and unpack(bytes(first.body)) == body
        assert first.headers["content-encoding"] == encoding
    assert "content-encoding" not in reply(b"short", "text/plain", "gzip, zstd").headers


def test_metrics_are_prometheus_text() -> None:
    metrics = Metrics()
    metrics.counter("a_total", "Things.")
    metrics.summary("b_seconds", "Time.")
    metrics.gauge("c", "Now.", lambda: 2.5)
    empty = metrics.text()
    assert "limbeck_a_total 0" in empty and "limbeck_b_seconds_count 0" in empty
    metrics.add("a_total", 2, kind="x")
    metrics.add("a_total", kind="y")
    metrics.observe("b_seconds", 0.25)
    assert metrics.total("a_total") == 3
    assert metrics.text().splitlines() == [
        "# HELP limbeck_a_total Things.",
        "# TYPE limbeck_a_total counter",
        'limbeck_a_total{kind="x"} 2',
        'limbeck_a_total{kind="y"} 1',
        "# HELP limbeck_b_seconds Time.",
        "# TYPE limbeck_b_seconds summary",
        "limbeck_b_seconds_sum 0.25",
        "limbeck_b_seconds_count 1",
        "# HELP limbeck_c Now.",
        "# TYPE limbeck_c gauge",
        "limbeck_c 2.5",
    ]


def test_counting_from_many_threads_loses_nothing() -> None:
    metrics = Metrics()
    metrics.counter("a_total", "Things.")
    threads = [threading.Thread(target=lambda: [metrics.add("a_total") for _ in range(2000)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.total("a_total") == 16_000


def test_retry_after_is_whole_seconds_within_bounds() -> None:
    assert [retry_after(s)["retry-after"] for s in (0, 0.5, 3, 3.2, 1e9)] == ["1", "1", "3", "4", "60"]


@pytest.mark.parametrize("token", ["", " ", "a b", "ä", "a\n"])
def test_a_token_that_no_header_can_carry_is_refused(token: str) -> None:
    with pytest.raises(LimbeckError, match="MY_TOKEN is set to something that is no token"):
        check_token(token, "MY_TOKEN")


async def _never() -> dict[str, Any]:
    await asyncio.sleep(3600)
    return {}


def test_jobs_are_done_one_at_a_time_in_order() -> None:
    worker, order, running = Worker(100), [], []

    def job(i: int) -> int:
        running.append(i)
        assert len(running) == 1
        time.sleep(0.001)
        order.append(running.pop())
        return i

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*(worker.run(lambda i=i: job(i), _never) for i in range(50)))  # type: ignore[misc]

    assert asyncio.run(all_of_them()) == order == list(range(50))
    worker.close()
    assert worker.join(5)


def test_a_job_whose_client_is_gone_is_dropped_unless_it_runs() -> None:
    worker, begun, go, done = Worker(100), threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        go.wait(20)
        done.append("first")

    async def both() -> None:
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        running = asyncio.ensure_future(worker.run(first, receive))
        await asyncio.to_thread(begun.wait, 20)
        waiting = asyncio.ensure_future(worker.run(lambda: done.append("second"), receive))
        await asyncio.sleep(0.01)
        assert worker.waiting == 1
        gone.set()
        for task in (running, waiting):
            with pytest.raises(ClientDisconnect):
                await task
        assert worker.waiting == 0
        go.set()
        await worker.run(lambda: None, _never)

    asyncio.run(both())
    assert done == ["first"]
    worker.close()


def test_a_failed_job_leaves_its_tensors_behind() -> None:
    worker = Worker(1)

    def fails() -> None:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error

    async def run() -> BaseException:
        try:
            await worker.run(fails, _never)
        except ValueError as error:
            return error
        raise AssertionError

    error = asyncio.run(run())
    assert error.__cause__ is None and error.__context__ is None
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert "fails" not in frames
    worker.close()


def test_admission_is_bounded_and_given_back() -> None:
    worker = Worker(2)
    with worker.admission(), worker.admission():
        with pytest.raises(Refusal) as refused, worker.admission():
            pass
        assert refused.value.status == 429 and "retry-after" in refused.value.headers
    with worker.admission():
        pass
    worker.close()
    with pytest.raises(Refusal) as refused, worker.admission():
        pass
    assert refused.value.status == 503


@pytest.mark.parametrize(
    ("content", "word"),
    [(None, "cannot be read"), ("", "is empty"), ("{% for m in messages %}{{ m.content }}", ":1: Unexpected end of template"), (b"\xff", "no UTF-8")],
)
def test_a_chat_template_that_is_none_is_refused(tmp_path: Path, content: str | bytes | None, word: str) -> None:
    path = tmp_path / "t.jinja"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LimbeckError, match=word):
        read_template(str(path))


def test_templates_of_transformers_own_dialect_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("{% for m in messages %}{% if not m.content %}{% continue %}{% endif %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    assert read_template(str(path)) == path.read_text() and read_template("plain") == PLAIN
