"""What a stranger at the other end of a connection must not do; the table of clauses is in test_security.py."""

from __future__ import annotations

import asyncio
import gzip
import inspect
import json
import logging
import socket
import tracemalloc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from typer.testing import CliRunner

from integration.serving import serving
from limbeck.cli.app import app as command
from limbeck.cli.serve import serve
from limbeck.cli.teach import teach
from limbeck.config.parts.teachers import HttpTeacherOptions
from limbeck.errors import LimbeckError, TeacherError
from limbeck.needs import TopK
from limbeck.serve import gate, process
from limbeck.serve.bodies import read_body
from limbeck.serve.gate import application
from limbeck.serve.metrics import Metrics
from limbeck.serve.openai.app import OpenAiService
from limbeck.serve.process import bind, refuse_strangers
from limbeck.serve.teacher import TeacherService
from limbeck.teachers.http import transport
from limbeck.teachers.http.faults import Backoff, raise_for_status
from limbeck.teachers.http.teacher import HttpTeacher
from limbeck.teachers.http.transport import Reply, Transport, TransportError, secrets_of
from stub_teachers import StubTeacher, asks_for_tests, free_port, served

# -- the client ------------------------------------------------------------------------------------------------------------


class Answering:
    """The same answer to everybody; keeps path, query and headers."""

    def __init__(self, status: int = 200, headers: dict[str, str] | None = None, body: bytes = b"{}"):
        self.status, self.headers, self.body = status, headers or {}, body
        self.asked: list[tuple[str, str, dict[str, str]]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        given = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.asked.append((scope["path"], scope["query_string"].decode(), given))
        headers = [(name.encode(), value.encode()) for name, value in self.headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


def get(url: str, path: str = "", *, token: str | None = None) -> Reply:
    async def work() -> Reply:
        client = Transport(url, token=token)
        try:
            return await client.get(path, 20)
        finally:
            await client.close()

    return asyncio.run(work())


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_told_and_not_followed(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "canary-token")
    other = Answering()
    with served(other) as elsewhere, served(Answering(status, {"location": f"{elsewhere}/health?seen=canary-token"})) as url:
        teacher = HttpTeacher(HttpTeacherOptions(url=url, token_env="A_TOKEN"), backoff=Backoff(base=0.01))
        with pytest.raises(TeacherError) as refused:
            teacher.load()
    assert f"answers {status} and points to {elsewhere}/health?seen=***" in str(refused.value) and "teacher.url" in str(refused.value)
    assert other.asked == []


def test_a_url_is_used_as_it_is_given() -> None:
    there = Answering()
    with served(there) as url:
        get(f"{url}/a/b%20c?x=1&y=%2F")
        get(f"{url}/root/?x=1", "/v1/models")
        get(url.replace("//", "//me:p%40ss@"), "/v1")
    assert [(path, query) for path, query, _ in there.asked] == [("/a/b c", "x=1&y=%2F"), ("/root/v1/models", "x=1"), ("/v1", "")]
    assert there.asked[2][2]["authorization"] == "Basic bWU6cEBzcw=="


def test_a_proxy_is_no_way_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with served(Answering()) as url:
        for host in ("127.0.0.1", "localhost"):
            assert get(url.replace("127.0.0.1", host)).status == 200
    assert all(map(transport._is_here, ("127.0.0.2", "::1"))) and not any(map(transport._is_here, ("10.0.0.1", "localhost.example.org", "169.254.169.254")))


def test_a_small_answer_that_unpacks_to_a_large_one_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "LARGEST", 2**16)
    bomb = gzip.compress(bytes(2**24))
    assert len(bomb) < 2**17
    for headers, body in (({"content-encoding": "gzip"}, bomb[: 2**16]), ({"content-encoding": "gzip"}, bomb), ({}, bytes(2**16 + 1))):
        with served(Answering(200, headers, body)) as url:
            tracemalloc.start()
            with pytest.raises(TransportError, match="more than 65,536 bytes") as refused:
                get(url)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert refused.value.large and peak < 2**22
    with served(Answering(200, {"content-encoding": "gzip"}, gzip.compress(bytes(2**16)))) as url:
        assert get(url).body == bytes(2**16)


def test_an_answer_that_is_too_large_is_asked_for_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = StubTeacher()
    with served(stub) as url:
        teacher = HttpTeacher(HttpTeacherOptions(url=url, canary_every=0, patience=2), backoff=Backoff(base=0.01))
        teacher.load()
        asks = asks_for_tests(lengths=(40, 40))
        whole = teacher.ask(asks, TopK(8))
        monkeypatch.setattr(transport, "LARGEST", 2500)
        parts = teacher.ask(asks, TopK(8))
        assert teacher.pipeline.counts["split"] == 1
        assert all(a is not None and b is not None and (a.ids_mK == b.ids_mK).all() for a, b in zip(whole, parts, strict=True))
        monkeypatch.setattr(transport, "LARGEST", 500)
        with pytest.raises(TeacherError, match="cannot score a document of 40 tokens: an answer of more than 500 bytes"):
            teacher.ask(asks, TopK(8))
        teacher.close()


@pytest.mark.parametrize("encoding", ["br", "zstd", "deflate", "gzip, gzip"])
def test_what_was_not_asked_for_is_not_unpacked(encoding: str) -> None:
    there = Answering(200, {"content-encoding": encoding}, gzip.compress(b"{}"))
    with served(there) as url, pytest.raises(TransportError, match="not asked for"):
        get(url)
    assert there.asked[0][2]["accept-encoding"] == "gzip"


@pytest.mark.parametrize("status", [400, 403, 302, 500])
def test_what_a_server_says_back_is_struck_out(status: int) -> None:
    secrets = secrets_of("http://me:p%40ssword@host/v1?key=of-the-query&n=1", "of-the-header")
    said = "p@ssword p%40ssword of-the-query of-the-header"
    reply = Reply(status, {"location": said}, json.dumps({"error": {"message": said}}).encode(), 0)
    with pytest.raises(Exception, match=r"\*\*\* \*\*\* \*\*\* \*\*\*"):
        raise_for_status(reply, "http://host", secrets)


def test_the_library_of_the_client_logs_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), served(Answering()) as url:
        get(url.replace("//", "//me:hunter2x@"))
        get(url, token="hunter2x")
    assert "GET" in caplog.text and "hunter2x" not in caplog.text


def test_two_ways_to_say_who_one_is_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "x" * 8)
    options = HttpTeacherOptions(url="http://me:${env:A_TOKEN}@127.0.0.1:1", token_env="A_TOKEN")
    with pytest.raises(TeacherError, match="leave out the other"):
        HttpTeacher(options).load()


# -- the servers -----------------------------------------------------------------------------------------------------------

OPEN = {"teach": {"/"}, "serve": {"/", "/health"}}


@pytest.mark.parametrize(("verb", "variable"), [("teach", "LIMBECK_TEACH_TOKEN"), ("serve", "LIMBECK_API_KEY")])
@pytest.mark.parametrize("host", ["0.0.0.0", "0"])
def test_an_address_that_others_reach_wants_a_token(verb: str, variable: str, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable, raising=False)
    words = [verb, "./no-such-model", "--host", host, "--port", "0"]
    refused = CliRunner().invoke(command, words)
    assert refused.exit_code == 2 and f"put a token into {variable}" in refused.output
    monkeypatch.setenv(variable, "a-token")
    assert "no-such-model" in CliRunner().invoke(command, words).output
    monkeypatch.delenv(variable)
    assert "no-such-model" in CliRunner().invoke(command, [verb, "./no-such-model", "--port", "0"]).output


def test_servers_listen_on_this_machine_alone_by_default() -> None:
    for verb in (teach, serve):
        sock = bind(inspect.signature(verb).parameters["host"].default, 0)
        refuse_strangers(sock, None, "X")
        assert sock.getsockname()[0] == "127.0.0.1"
        sock.close()
    with pytest.raises(LimbeckError, match="put a token into X"):
        refuse_strangers(bind("0.0.0.0", 0), None, "X")


def teacher_service(token: str | None) -> Any:
    weight = SimpleNamespace(weight=SimpleNamespace(shape=(8, 2)))
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(max_position_embeddings=16))
    model = SimpleNamespace(config=config, get_output_embeddings=lambda: weight, get_input_embeddings=lambda: weight)
    return TeacherService(SimpleNamespace(model=model, fingerprint=dict, source="./none", revision=None), "m", token=token)  # type: ignore[arg-type]


def openai_service(token: str | None) -> Any:
    return OpenAiService(SimpleNamespace(name="m", context=16, takes=frozenset()), vocabulary=8, token=token)  # type: ignore[arg-type]


@pytest.fixture(params=["teach", "serve"])
def service(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    made = (teacher_service if request.param == "teach" else openai_service)("a-token")
    yield request.param, made
    if request.param == "teach":
        made.worker.close()


def ask(app: Any, path: str, method: str = "GET", headers: dict[str, str] | None = None, chunks: tuple[bytes, ...] = (b"",)) -> tuple[int, str]:
    """Status and text of one request, without a network."""
    told: list[Any] = []
    left = [{"type": "http.request", "body": chunk, "more_body": i + 1 < len(chunks)} for i, chunk in enumerate(chunks)]

    async def receive() -> Any:
        return left.pop(0) if left else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        told.append(message)

    pairs = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": pairs, "root_path": ""}
    asyncio.run(app(scope, receive, send))
    return told[0]["status"], b"".join(message.get("body", b"") for message in told[1:]).decode()


def test_every_route_but_the_open_ones_wants_the_token(service: tuple[str, Any]) -> None:
    verb, made = service
    routes = {(route.path, method) for route in made.app.routes for method in route.methods}
    assert len(routes) > 8
    strange = {("/docs", "GET"), ("/openapi.json", "GET"), ("/redoc", "GET"), ("//health", "GET"), ("/health/", "GET"), ("/metrics/../health", "GET")}
    for path, method in routes | strange | {("/health", "OPTIONS"), ("/", "DELETE")}:
        status, text = ask(made.app, path, method)
        assert (status == 200) == (path in OPEN[verb] and method in ("GET", "HEAD")), (path, method, status)
        assert status in (200, 401) and "a-token" not in text
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert ask(made.app, path, headers={"authorization": "Bearer a-token"})[0] == 404


def test_tokens_are_compared_in_constant_time(service: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(gate.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or True)
    assert ask(service[1].app, "/v1/models", headers={"authorization": "Bearer anything"})[0] == 200
    assert compared == [(b"anything", b"a-token")]


def test_a_model_of_another_name_opens_no_file(service: tuple[str, Any], tmp_path: Any) -> None:
    verb, made = service
    allowed = {"authorization": "Bearer a-token"}
    for path in ("/../../etc/passwd", "/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/m"):
        assert ask(made.app, path, headers=allowed)[0] == 404
    if verb == "serve":
        for name in ("../m", str(tmp_path), "m/../m", "gpt-4"):
            body = json.dumps({"model": name, "messages": [{"role": "user", "content": "x"}]}).encode()
            assert ask(made.app, "/v1/chat/completions", "POST", allowed, (body,))[0] == 404


def test_a_failure_tells_the_client_no_stack(caplog: pytest.LogCaptureFixture) -> None:
    def breaks(_: Request) -> Response:
        raise RuntimeError("of /home/somebody")

    app = application([Route("/", breaks)], Metrics(), token=None)
    status, text = ask(app, "/")
    assert status == 500 and "its log says where" in text
    assert not any(word in text for word in ("Traceback", "breaks", "/home", ".py", "line "))
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("headers", [{}, {"content-length": "10"}, {"content-length": "-1"}, {"transfer-encoding": "chunked"}])
def test_a_body_is_counted_as_it_comes(headers: dict[str, str]) -> None:
    async def takes(request: Request) -> Response:
        return Response(str(len(await read_body(request, 1000, way_out="send less"))))

    app = application([Route("/", takes, methods=["POST"])], Metrics(), token=None)
    assert ask(app, "/", "POST", headers, (b"x" * 500, b"x" * 500)) == (200, "1000")
    status, text = ask(app, "/", "POST", headers, (b"x" * 500,) * 1000)
    assert status == 413 and "send less" in text
    assert ask(app, "/", "POST", {"content-encoding": "gzip"}, (gzip.compress(b"x"),))[0] == 415


@pytest.mark.parametrize("before", [b"", b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"])
@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nhost: a\r\nx: "])
def test_a_head_that_never_ends_is_given_up(before: bytes, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    if before and not sent:
        pytest.skip("an idle connection is kept for the next request")
    monkeypatch.setattr(process, "HEAD_SECONDS", 0.3)
    app = application([Route("/", lambda _: Response("here"))], Metrics(), token=None)
    with serving(app) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as sock:
            sock.settimeout(20)
            if before:
                sock.sendall(before)
                answer = b""
                # Head and body may come one after the other.
                while b"here" not in answer:
                    piece = sock.recv(4096)
                    assert piece, answer
                    answer += piece
            if sent:
                sock.sendall(sent)
            assert sock.recv(4096) == b""
        # One that is ended in time is answered, however long the connection was open before.
        with socket.create_connection((host, int(port))) as sock:
            sock.settimeout(20)
            sock.sendall(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            assert b"200 OK" in sock.recv(4096)
