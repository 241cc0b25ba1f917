"""``limbeck teach``: what it answers, what it refuses, and how it ends."""

from __future__ import annotations

import ctypes
import gc
import gzip
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
import zstandard

from integration.faults import KINDS, FaultyApp
from integration.serving import Serving, asking, serving, wait_for
from limbeck.models.loading import resolve_source
from limbeck.needs import TopK
from limbeck.serve import bodies
from limbeck.serve.teacher import TeacherService
from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.http.frames import MEDIA_TYPE, FrameError, decode, decode_object
from limbeck.teachers.scoring import Scorer

RNG = np.random.default_rng(0)
SEQUENCES = [RNG.integers(0, 4096, n).tolist() for n in (17, 40, 1, 9)]
POSITIONS = [[0, 3, 16], list(range(40)), [0], []]
QUESTION: dict[str, Any] = {"sequences": SEQUENCES, "positions": POSITIONS, "top_k": 8}


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    scorer = Scorer(resolve_source("builtin:code-2m"))
    scorer.load("cpu")
    return scorer


@contextmanager
def teaching(scorer: Any, name: str = "m", **options: Any) -> Iterator[tuple[TeacherService, httpx2.Client]]:
    service = TeacherService(scorer, name, **options)
    with serving(service.app, stopping=service.worker.close) as url, asking(url) as client:
        yield service, client
    assert service.worker.join(10)


@pytest.fixture(scope="module")
def served(scorer: Scorer) -> Iterator[tuple[TeacherService, httpx2.Client]]:
    with teaching(scorer, "builtin:code-2m", max_top_k=64, max_tokens=2000, max_values=300_000) as both:
        yield both


@pytest.fixture
def client(served: tuple[TeacherService, httpx2.Client]) -> httpx2.Client:
    return served[1]


def asks() -> list[Ask]:
    return [Ask(np.array(ids, np.int32), np.array(at, np.int32)) for ids, at in zip(SEQUENCES, POSITIONS, strict=True)]


def answers_of(reply: httpx2.Response) -> tuple[dict[str, Any], list[TopKRows]]:
    assert reply.status_code == 200, reply.text
    return decode(reply.content) if reply.headers["content-type"] == MEDIA_TYPE else decode_object(reply.json())


def bits(answers: list[TopKRows]) -> list[Any]:
    return [
        [(part.dtype.str, part.shape, part.tobytes()) for part in (a.ids_mK, a.logits_mK, a.log_z_mZ, a.samples_mS) if part is not None]
        for a in answers
    ]


class Slow:
    """A scorer that says when it begins and waits until it may go on."""

    def __init__(self, scorer: Scorer):
        self._scorer = scorer
        self.begun, self.go, self.calls = threading.Event(), threading.Event(), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)

    def score(self, asks: list[Ask], need: TopK, *, seed: int = 0) -> list[TopKRows]:
        self.calls += 1
        self.begun.set()
        assert self.go.wait(60)
        return self._scorer.score(asks, need, seed=seed)


# --- what it answers


@pytest.mark.parametrize("accept", ["identity", "gzip", "zstd, gzip"])
@pytest.mark.parametrize("encoding", ["frame", "b64", "json"])
def test_every_encoding_carries_the_bits_of_the_scorer(scorer: Scorer, client: httpx2.Client, encoding: str, accept: str) -> None:
    need = TopK(8, (1.0, 2.0), samples=3)
    asked = QUESTION | {"temperatures": [1, 2.0], "samples": 3, "seed": 7, "encoding": encoding}
    with client.stream("POST", "/v1/topk", json=asked, headers={"accept-encoding": accept}) as reply:
        packed = b"".join(reply.iter_raw())
    assert reply.status_code == 200 and reply.headers.get("content-encoding", "identity") == accept.split(",")[0]
    body = {"identity": bytes, "gzip": gzip.decompress, "zstd": zstandard.decompress}[accept.split(",")[0]](packed)
    header, got = decode(body) if encoding == "frame" else decode_object(json.loads(body))
    assert bits(got) == bits(scorer.score(asks(), need, seed=7))
    assert header["temperatures"] == [1.0, 2.0] and header["rows"] == [3, 40, 1, 0] and header["k"] == 8


def test_half_precision_values_are_the_rounded_ones(scorer: Scorer, client: httpx2.Client) -> None:
    exact = scorer.score(asks(), TopK(8))
    for encoding in ("frame", "b64", "json"):
        _, got = answers_of(client.post("/v1/topk", json=QUESTION | {"encoding": encoding, "values": "float16"}))
        for a, b in zip(got, exact, strict=True):
            assert np.array_equal(a.logits_mK, b.logits_mK.astype(np.float16).astype(np.float32))
            assert np.array_equal(a.log_z_mZ, b.log_z_mZ)


def test_a_row_is_the_distribution_after_its_position(scorer: Scorer, client: httpx2.Client) -> None:
    _, got = answers_of(client.post("/v1/topk", json=QUESTION))
    with torch.no_grad():
        logits_TV = scorer.model(torch.tensor([SEQUENCES[0]])).logits[0]
    for row, position in enumerate(POSITIONS[0]):
        logits_K, ids_K = logits_TV[position].topk(8)
        assert got[0].ids_mK[row].tolist() == ids_K.tolist()
        np.testing.assert_allclose(got[0].logits_mK[row], logits_K, atol=1e-4)
        np.testing.assert_allclose(got[0].log_z_mZ[row, 0], logits_TV[position].logsumexp(0), atol=1e-4)


def test_the_same_body_gives_the_same_bytes_whatever_else_runs(client: httpx2.Client) -> None:
    asked = QUESTION | {"encoding": "frame", "samples": 2}
    alone = client.post("/v1/topk", json=asked).content
    others = [{"sequences": [SEQUENCES[1][: 5 + i]], "positions": [[i]], "top_k": 3} for i in range(6)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda body: client.post("/v1/topk", json=body).content, [asked, *others, asked, *others, asked]))
    assert [together[i] for i in (0, 7, 14)] == [alone] * 3


def test_more_than_the_vocabulary_is_all_of_it(scorer: Scorer) -> None:
    with teaching(scorer, max_top_k=10_000) as (_, client):
        asked = {"sequences": [[1, 2]], "positions": [[0]], "top_k": 4096, "encoding": "frame"}
        _, (got,) = answers_of(client.post("/v1/topk", json=asked))
        assert sorted(got.ids_mK[0].tolist()) == list(range(4096))
        refused = client.post("/v1/topk", json=asked | {"top_k": 4097})
        assert refused.status_code == 400 and "top_k: 4097 is not from 0 to 4096" in refused.json()["error"]["message"]


def test_nothing_asked_is_nothing_answered(served: tuple[TeacherService, httpx2.Client]) -> None:
    service, client = served
    before = service.metrics.total("tokens_scored_total")
    for sequences, rows in (([], []), ([[]], [0]), ([[], [1, 2]], [0, 0])):
        for encoding in ("frame", "b64", "json"):
            asked = {"sequences": sequences, "positions": [[] for _ in sequences], "top_k": 4, "samples": 2, "encoding": encoding}
            header, got = answers_of(client.post("/v1/topk", json=asked))
            assert header["rows"] == rows and [a.ids_mK.shape for a in got] == [(0, 4)] * len(rows)
    assert service.metrics.total("tokens_scored_total") == before
    mixed = {"sequences": [[], [1, 2]], "positions": [[], [1]], "top_k": 4}
    assert answers_of(client.post("/v1/topk", json=mixed))[0]["rows"] == [0, 1]
    assert client.post("/v1/completions", json={"input_ids": [], "return_logits": True}).json() == {"logits": []}


@pytest.mark.parametrize("path", ["/", "/v1/completions"])
def test_whole_logits_are_those_of_the_model(scorer: Scorer, client: httpx2.Client, path: str) -> None:
    body = client.post(path, json={"input_ids": [SEQUENCES[0], SEQUENCES[3]], "return_logits": True, "model": "any"}).json()
    assert list(body) == ["logits"] and [len(rows) for rows in body["logits"]] == [17, 9]
    for ids, rows in zip((SEQUENCES[0], SEQUENCES[3]), body["logits"], strict=True):
        with torch.no_grad():
            expected_TV = scorer.model(torch.tensor([ids])).logits[0]
        got_TV = torch.tensor(rows)
        torch.testing.assert_close(got_TV, expected_TV, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(got_TV.softmax(-1), expected_TV.softmax(-1), atol=1e-6, rtol=1e-4)


def test_the_likeliest_of_every_position_in_place_of_whole_logits(client: httpx2.Client) -> None:
    asked = {"input_ids": [SEQUENCES[0], SEQUENCES[2]], "return_logits": True}
    whole = client.post("/v1/completions", json=asked).json()["logits"]
    body = client.post("/v1/completions", json=asked | {"top_k": 5}).json()
    for i, rows in enumerate(whole):
        logits_TK, ids_TK = torch.tensor(rows).topk(5)
        assert torch.equal(torch.tensor(body["ids"][i]), ids_TK) and torch.equal(torch.tensor(body["logits"][i]), logits_TK)
        torch.testing.assert_close(torch.tensor(body["log_z"][i]), torch.tensor(rows).logsumexp(1))


def test_whole_logits_beyond_the_limit_name_the_way_out(client: httpx2.Client) -> None:
    asked = {"input_ids": [list(range(74))], "return_logits": True}
    refused = client.post("/v1/completions", json=asked)
    assert refused.status_code == 413 and "send top_k" in refused.json()["error"]["message"] and "300000" in refused.text
    assert client.post("/v1/completions", json=asked | {"top_k": 8}).status_code == 200


def test_it_says_what_it_is(scorer: Scorer, client: httpx2.Client) -> None:
    health = client.get("/health").json()
    assert health["status"] == "ok" and health["model"] == "builtin:code-2m" and health["fingerprint"] == scorer.fingerprint()
    assert (health["vocabulary"], health["max_top_k"], health["max_tokens"]) == (4096, 64, 2000)
    assert len(health["tokenizer"]) == 64 and len(health["digest"]) == 32
    assert client.get("/v1/models").json()["data"][0]["id"] == "builtin:code-2m"
    assert "teaches builtin:code-2m" in client.get("/").text
    for path in ("/", "/health", "/metrics"):
        head = client.head(path)
        assert head.status_code == 200 and head.content == b"" and int(head.headers["content-length"]) > 0


def test_metrics_count_what_was_done(scorer: Scorer) -> None:
    with teaching(scorer) as (_, client):
        client.post("/v1/topk", json=QUESTION)
        client.post("/v1/topk", json=QUESTION)
        client.post("/v1/topk", content=b"{")
        client.get("/no/such")
        lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    assert lines['limbeck_requests_total{path="/v1/topk",status="200"}'] == "2"
    assert lines['limbeck_requests_total{path="/v1/topk",status="400"}'] == "1"
    assert lines['limbeck_requests_total{path="other",status="404"}'] == "1"
    assert lines["limbeck_tokens_scored_total"] == "134" and lines["limbeck_positions_answered_total"] == "88"
    assert lines["limbeck_scoring_seconds_count"] == "2" and float(lines["limbeck_scoring_seconds_sum"]) > 0
    assert lines["limbeck_queue_length"] == "0" and float(lines["limbeck_sent_bytes_total"]) > 1000


# --- what it refuses

BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"sequences": [[1], [2, 200_000]], "positions": [[], []]}, "sequences[1][1]: 200000 is not in the vocabulary of 4096"),
    ({"sequences": [[-1]], "positions": [[0]]}, "sequences[0][0]: -1 is not in the vocabulary"),
    ({"sequences": [[10**40]], "positions": [[0]]}, "sequences[0][0]: a number of more than twenty digits"),
    ({"sequences": [[1.0]], "positions": [[0]]}, "sequences[0][0]: 1.0 is not a token id"),
    ({"sequences": [[True]], "positions": [[0]]}, "sequences[0][0]: True is not a token id"),
    ({"sequences": [1, 2], "positions": []}, "sequences[0]: must be a list of whole numbers, not 1"),
    ({"sequences": "abc"}, "sequences: must be a list of lists"),
    ({"positions": [[0]]}, "positions: 1 lists for 4 sequences"),
    ({"positions": [[17], [], [], []]}, "positions[0][0]: 17 is no position of a sequence of 17 tokens"),
    ({"positions": [[-1], [], [], []]}, "positions[0][0]: -1 is no position"),
    ({"positions": [[2, 2], [], [], []]}, "positions[0][1]: 2 after 2: positions must ascend"),
    ({"positions": [["0"], [], [], []]}, "positions[0][0]: '0' is not a whole number"),
    ({"top_k": 65}, "top_k: 65 is not from 0 to 64 (--max-top-k)"),
    ({"top_k": -1}, "top_k: -1"),
    ({"top_k": None}, "top_k: is missing"),
    ({"temperatures": []}, "temperatures: must be a list of 1 to 16"),
    ({"temperatures": [1, 0]}, "temperatures[1]: 0 is not a number from 0.01 to 100"),
    ({"temperatures": ["1"]}, "temperatures[0]: '1'"),
    ({"samples": 1.5}, "samples: must be a whole number"),
    ({"seed": -1}, "seed: -1"),
    ({"encoding": "xml"}, "encoding: 'xml' is not one of frame, b64, json"),
    ({"values": ["float16"]}, "values: ['float16'] is not one of"),
    ({"expect": 5}, "expect: must be the digest"),
    ({"topk": 5}, "topk: unknown field, did you mean 'top_k'?"),
]


@pytest.mark.parametrize(("change", "message"), BAD_FIELDS)
def test_a_wrong_field_is_named(client: httpx2.Client, change: dict[str, Any], message: str) -> None:
    refused = client.post("/v1/topk", json=QUESTION | change)
    assert refused.status_code == 400 and refused.json()["error"]["type"] == "invalid_request"
    assert refused.json()["error"]["message"].startswith(message)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON"),
        (b"\xff\xfe", "the body is not JSON"),
        (b"[1]", "the body is a JSON list, and must be an object"),
        (b'{"top_k": NaN}', "NaN is not a JSON number"),
        (b'{"sequences": [[1]], "positions": [[0]], "top_k": 1, "temperatures": [1e999]}', "temperatures[0]: inf is not a number"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"sequences": [[' + b"9" * 5000 + b"]]}", "the body is not JSON"),
        (b'{"positions": [[0]], "top_k": 1}', "sequences: is missing"),
    ],
)
def test_a_body_that_is_no_question_is_refused(client: httpx2.Client, body: bytes, message: str) -> None:
    refused = client.post("/v1/topk", content=body)
    assert refused.status_code == 400 and message in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "def"}, "prompt: this server scores token ids"),
        ({"input_ids": [[1]]}, "return_logits: must be true"),
        ({"input_ids": [1, 2], "return_logits": True}, "input_ids[0]: must be a list"),
        ({"input_ids": [[4096]], "return_logits": True}, "input_ids[0][0]: 4096 is not in the vocabulary of 4096"),
        ({"input_ids": [[1]], "return_logits": True, "top_k": 0}, "top_k: 0 is not from 1"),
    ],
)
def test_the_route_of_whole_logits_names_what_is_wrong(client: httpx2.Client, body: dict[str, Any], message: str) -> None:
    refused = client.post("/v1/completions", json=body)
    assert refused.status_code == 400 and refused.json()["error"]["message"].startswith(message)


def test_too_much_is_refused_with_the_limit_and_the_way_out(client: httpx2.Client) -> None:
    many = client.post("/v1/topk", json={"sequences": [[1] * 1001] * 2, "positions": [[0], [0]], "top_k": 1})
    assert many.status_code == 413 and "2002 tokens in one request, and at most 2000 are taken" in many.json()["error"]["message"]
    long = client.post("/v1/topk", content=b" " * 30_000_000)
    assert long.status_code == 413 and "at most 1144576 are taken: send fewer sequences" in long.json()["error"]["message"]
    undeclared = client.post("/v1/topk", content=iter([b" " * 500_000] * 8))
    assert undeclared.status_code == 413 and "more than 1144576" in undeclared.json()["error"]["message"]
    wide = {"sequences": [[1] * 1999], "positions": [list(range(1999))], "top_k": 64}
    lists = client.post("/v1/topk", json=wide | {"samples": 64})
    assert lists.status_code == 413 and "ask for encoding 'frame'" in lists.json()["error"]["message"]
    assert client.post("/v1/topk", json=wide | {"encoding": "frame"}).status_code == 200
    crowd = client.post("/v1/topk", json={"sequences": [[]] * 5000, "positions": [[]] * 5000, "top_k": 1})
    assert crowd.status_code == 413 and "5000 sequences" in crowd.text
    packed = client.post("/v1/topk", content=b"{}", headers={"content-encoding": "gzip"})
    assert packed.status_code == 415


def test_a_sequence_beyond_the_context_is_refused(scorer: Scorer) -> None:
    with teaching(scorer, max_tokens=40_000) as (_, client):
        refused = client.post("/v1/topk", json={"sequences": [[1] * 32_769], "positions": [[0]], "top_k": 1})
    assert refused.status_code == 400 and "sequences[0]: 32769 tokens, and the model's context is 32768" in refused.text


def test_errors_have_one_shape(client: httpx2.Client) -> None:
    absent, wrong = client.get("/nothing"), client.put("/v1/topk", content=b"")
    assert (absent.status_code, absent.json()["error"]["type"]) == (404, "not_found")
    assert "POST /v1/topk" in absent.json()["error"]["message"]
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "method_not_allowed")


def test_another_fingerprint_is_a_conflict_that_says_what_differs(scorer: Scorer, client: httpx2.Client) -> None:
    health = client.get("/health").json()
    for same in (health["digest"], health["fingerprint"]):
        assert client.post("/v1/topk", json=QUESTION | {"expect": same}).status_code == 200
    other = client.post("/v1/topk", json=QUESTION | {"expect": "0" * 32})
    assert other.status_code == 409 and health["digest"] in other.text
    assert other.json()["error"]["fingerprint"] == health["fingerprint"]
    fields = client.post("/v1/topk", json=QUESTION | {"expect": health["fingerprint"] | {"dtype": "bfloat16"}})
    assert fields.status_code == 409 and "dtype: expected 'bfloat16', here 'float32'" in fields.json()["error"]["message"]
    assert "weights:" not in fields.json()["error"]["message"]


def test_without_the_token_only_the_root_answers(scorer: Scorer, caplog: pytest.LogCaptureFixture) -> None:
    with teaching(scorer, token="a-secret") as (_, client):
        assert client.get("/").status_code == client.head("/").status_code == 200
        for path in ("/health", "/metrics", "/v1/models", "/nothing"):
            assert client.get(path).status_code == 401
        for given in ("a-secret", "Basic a-secret", "Bearer", "Bearer a-secre", "Bearer é"):
            refused = client.post("/v1/topk", json=QUESTION, headers=[(b"authorization", given.encode("latin-1"))])
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert "a-secret" not in refused.text
        assert client.post("/", json={}).status_code == 401
        assert client.post("/v1/topk", json=QUESTION, headers={"authorization": "Bearer a-secret"}).status_code == 200
    assert "a-secret" not in caplog.text


def test_a_full_queue_says_when_to_come_again(scorer: Scorer) -> None:
    slow = Slow(scorer)
    with teaching(slow, queue=2) as (service, client), ThreadPoolExecutor(2) as pool:
        under_way = [pool.submit(client.post, "/v1/topk", json=QUESTION) for _ in range(2)]
        wait_for(lambda: service.worker.admitted == 2)
        refused = client.post("/v1/topk", json=QUESTION)
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["type"] == "queue_full"
        assert client.get("/health").status_code == 200
        slow.go.set()
        assert [reply.result().status_code for reply in under_way] == [200, 200]
        wait_for(lambda: service.worker.admitted == 0)
        assert client.post("/v1/topk", json=QUESTION).status_code == 200


def test_a_client_that_goes_away_costs_no_forward(scorer: Scorer) -> None:
    slow = Slow(scorer)
    with teaching(slow) as (service, client), ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/v1/topk", json=QUESTION)
        assert slow.begun.wait(20)
        for _ in range(3):
            with pytest.raises(httpx2.TimeoutException):
                client.post("/v1/topk", json=QUESTION, timeout=0.3)
        wait_for(lambda: service.worker.waiting == 0 and service.worker.admitted == 1)
        slow.go.set()
        assert first.result().status_code == 200
        assert client.post("/v1/topk", json=QUESTION).status_code == 200
        wait_for(lambda: 'path="/v1/topk",status="499"} 3' in client.get("/metrics").text)
    assert slow.calls == 2


def test_a_body_that_never_ends_is_given_up(client: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "SECONDS", 0.2)
    with socket.create_connection((client.base_url.host, client.base_url.port)) as sock:
        sock.sendall(b"POST /v1/topk HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{")
        sock.settimeout(20)
        assert sock.recv(12) == b"HTTP/1.1 408"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 413, "send fewer tokens"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), 413, "send fewer tokens"),
        (MemoryError(), 413, "send fewer tokens"),
        (RuntimeError("it broke\nin two lines"), 500, "scoring 67 tokens failed (RuntimeError: it broke)"),
        (FrameError("odd"), 500, "FrameError: odd"),
    ],
)
def test_a_failed_forward_is_told_and_the_server_lives(scorer: Scorer, error: Exception, status: int, words: str) -> None:
    class Failing(Slow):
        def score(self, asks: list[Ask], need: TopK, *, seed: int = 0) -> list[TopKRows]:
            self.calls += 1
            if self.calls == 1:
                raise error
            return scorer.score(asks, need, seed=seed)

    with teaching(Failing(scorer)) as (_, client):
        failed = client.post("/v1/topk", json=QUESTION)
        assert failed.status_code == status and words in failed.json()["error"]["message"]
        assert client.post("/v1/topk", json=QUESTION).status_code == 200


def test_numbers_that_are_none_are_never_sent(scorer: Scorer) -> None:
    class Broken(Slow):
        def score(self, asks: list[Ask], need: TopK, *, seed: int = 0) -> list[TopKRows]:
            answers = scorer.score(asks, need, seed=seed)
            answers[0].logits_mK[0, 0] = 1e6 if need.k == 2 else np.nan
            return answers

    with teaching(Broken(scorer)) as (_, client):
        for encoding in ("frame", "b64", "json"):
            asked = QUESTION | {"encoding": encoding}
            failed = client.post("/v1/topk", json=asked)
            assert failed.status_code == 500 and "not finite" in failed.text
            asked |= {"top_k": 2}
            assert client.post("/v1/topk", json=asked).status_code == 200
            wide = client.post("/v1/topk", json=asked | {"values": "float16"})
            assert wide.status_code == 400 and "ask for values float32" in wide.text


# --- how it ends


def test_what_runs_is_answered_and_what_waits_is_sent_away(scorer: Scorer) -> None:
    slow = Slow(scorer)
    service = TeacherService(slow, "m")  # type: ignore[arg-type]
    running = Serving(service.app, stopping=service.worker.close)
    with asking(running.url) as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, "/v1/topk", json=QUESTION)
        assert slow.begun.wait(20)
        second = pool.submit(client.post, "/v1/topk", json=QUESTION)
        wait_for(lambda: service.worker.waiting == 1)
        running.server.should_exit = True
        refused = second.result()
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        # A connection of its own: one that was kept alive may be closed while it is asked.
        with asking(running.url) as late, pytest.raises((httpx2.ConnectError, httpx2.ReadError, httpx2.RemoteProtocolError)):
            late.post("/v1/topk", json=QUESTION)
        slow.go.set()
        assert first.result().status_code == 200
    running.stop()
    assert service.worker.join(10)


COUNTERS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _MallInfo(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in COUNTERS)


def _allocated() -> int:
    """Bytes in use in the C heap: the resident set would hide a leak in what earlier tests gave back."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        pytest.skip("needs glibc's mallinfo2")
    mallinfo.restype = _MallInfo
    gc.collect()
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


def test_two_hundred_requests_leave_no_memory_behind(client: httpx2.Client) -> None:
    asked = {"sequences": [SEQUENCES[1] * 5], "positions": [list(range(200))], "top_k": 64, "encoding": "frame"}
    one = len(client.post("/v1/topk", json=asked, headers={"accept-encoding": "identity"}).content)
    for _ in range(20):
        client.post("/v1/topk", json=asked)
    before = _allocated()
    for _ in range(200):
        client.post("/v1/topk", json=asked)
    growth = (_allocated() - before) / 200
    assert growth < one / 20, f"{growth:.0f} bytes a request stay behind, of an answer of {one}"


# --- the faults that other tests inject


@pytest.mark.parametrize("kind", KINDS)
def test_every_injected_fault_is_what_it_says(served: tuple[TeacherService, httpx2.Client], kind: str) -> None:
    faulty = FaultyApp(served[0].app, rate=1.0, kinds=(kind,), stall_seconds=0.2, retry_after=2)
    asked = QUESTION | {"encoding": "frame"}
    with serving(faulty) as url, asking(url) as client:
        assert client.get("/health").status_code == 200
        if kind in ("reset", "stall", "cut"):
            with pytest.raises(httpx2.TransportError):
                client.post("/v1/topk", json=asked)
            return
        reply = client.post("/v1/topk", json=asked)
        if kind in ("500", "429"):
            assert reply.status_code == int(kind) and reply.headers.get("retry-after") == ("2" if kind == "429" else None)
        elif kind == "truncated":
            with pytest.raises(FrameError):
                decode(reply.content)
        else:
            header, answers = decode(reply.content)
            assert header["k"] == (7 if kind == "wrong_k" else 8)
            assert np.isnan(answers[0].logits_mK[0, 0]) == (kind == "nan")
            lists = client.post("/v1/completions", json={"input_ids": [[1, 2]], "return_logits": True, "top_k": 3})
            assert ("NaN" in lists.text) == (kind == "nan")
            assert kind == "nan" or [len(row) for row in json.loads(lists.content)["ids"][0]] == [2, 2]
    assert faulty.injected[kind] == faulty.requests


def test_faults_come_at_their_rate_and_from_their_seed(served: tuple[TeacherService, httpx2.Client]) -> None:
    seen = []
    for _ in range(2):
        faulty = FaultyApp(served[0].app, rate=0.3, kinds=("500", "429"), seed=5)
        with serving(faulty) as url, asking(url) as client:
            seen.append([client.post("/v1/topk", json={}).status_code for _ in range(60)])
        assert faulty.requests == 60 and 8 <= faulty.injected.total() <= 30
    assert seen[0] == seen[1] and set(seen[0]) == {400, 429, 500}
