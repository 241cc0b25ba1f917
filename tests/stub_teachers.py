"""Teachers without a network, behind real sockets: one synthetic distribution in the exact formats of four servers.

The distribution after position ``p`` depends on the tokens up to ``p`` and on ``p`` itself: an answer that is off by one, or that
belongs to another document, is another distribution.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import uvicorn

from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.http.frames import MEDIA_TYPE, encode
from limbeck.types import IGNORE, Batch

VOCABULARY = 128


def logits_of(ids: list[int] | np.ndarray, model: int = 0) -> np.ndarray:
    """``[n, V]`` fp32, row ``p`` after token ``p``.  Rounded to a grid, so that every format carries it without loss."""
    return _logits_of(tuple(int(token) for token in ids), model)


@lru_cache(maxsize=512)
def _logits_of(ids: tuple[int, ...], model: int) -> np.ndarray:
    found = np.empty((len(ids), VOCABULARY), np.float32)
    for p in range(len(ids)):
        seen = np.asarray(ids[: p + 1], "<i4").tobytes()
        seed = int.from_bytes(hashlib.blake2b(seen + bytes([model]), digest_size=8).digest(), "little")
        # Distinct values: the order of the likeliest ids is the same whoever sorts.
        found[p] = np.random.default_rng(seed).permutation(VOCABULARY).astype(np.float32) / 32
        found[p, (7 * p + 3 + 5 * model) % VOCABULARY] += 6
    return found


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """fp32 log-probabilities."""
    wide = logits.astype(np.float64)
    return (wide - np.logaddexp.reduce(wide, axis=1, keepdims=True)).astype(np.float32)


def expected(ask: Ask, k: int, temperatures: tuple[float, ...] = (1.0,), *, normalised: bool = False, model: int = 0) -> TopKRows:
    """The true answer; ``normalised`` for sources of log-probabilities."""
    logits = logits_of(ask.ids, model)
    if normalised:
        logits = log_softmax(logits)
    logits = logits[ask.positions]
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :k].astype(np.int32)
    wide = logits.astype(np.float64)
    log_z = np.stack([np.logaddexp.reduce(wide / t, axis=1) for t in temperatures], 1).astype(np.float32)
    kept = np.take_along_axis(logits, ids, 1)
    return TopKRows(ids, kept, np.zeros_like(log_z) if normalised else log_z)


def asks_for_tests(seed: int = 0, lengths: tuple[int, ...] = (9, 5, 12), every: int = 2) -> list[Ask]:
    """Documents of which some positions are asked, never the last."""
    rng = np.random.default_rng(seed)
    return [
        Ask(rng.integers(1, VOCABULARY - 1, n).astype(np.int32), np.arange(i % 2, n - 1, every, dtype=np.int32))
        for i, n in enumerate(lengths)
    ]


def batch_for_tests(seed: int = 0, rows: int = 2, length: int = 16) -> Batch:
    """Rows of one document each whose predictions all count."""
    ids = torch.from_numpy(np.random.default_rng(seed).integers(1, VOCABULARY - 1, (rows, length)))
    labels = torch.cat([ids[:, 1:], torch.full((rows, 1), IGNORE)], 1)
    return Batch(ids, labels, torch.arange(length).repeat(rows, 1), torch.zeros(rows, length, dtype=torch.int64))


class StubTeacher:
    """An ASGI application that speaks every protocol.

    ``shift`` moves all rows, ``form`` is SGLang's (``nested``, ``flat``, ``b64``, ``b64_old``), ``delay`` seconds are slept before an
    answer, ``model`` is which distribution, ``max_tokens`` gives 413, ``before(body)`` may return a status and a text instead.
    """

    def __init__(self, *, shift: int = 0, form: str = "b64", delay: float = 0.0, max_logprobs: int = 64, max_tokens: int = 10**9):
        self.shift, self.form, self.delay = shift, form, delay
        self.max_logprobs, self.max_tokens = max_logprobs, max_tokens
        self.model = 0
        self.token: str | None = None
        self.before: Callable[[dict[str, Any]], tuple[int, str, dict[str, str]] | None] = lambda body: None
        self.bodies: list[dict[str, Any]] = []
        self.running = self.most_running = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": message["type"] + ".complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            status, kind, content, headers = await self._answer(scope, body)
        finally:
            self.running -= 1
        pairs = [(b"content-type", kind.encode()), (b"content-length", str(len(content)).encode())]
        pairs += [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": content})

    async def _answer(self, scope: Any, raw: bytes) -> tuple[int, str, bytes, dict[str, str]]:
        def as_json(thing: Any, status: int = 200, headers: dict[str, str] | None = None) -> tuple[int, str, bytes, dict[str, str]]:
            return status, "application/json", json.dumps(thing).encode(), headers or {}

        if self.token and dict(scope["headers"]).get(b"authorization", b"").decode() != f"Bearer {self.token}":
            return as_json({"error": {"message": "wrong token", "type": "auth"}}, 401)
        path = scope["path"]
        if scope["method"] == "GET":
            pages = {
                "/health": self.health(),
                "/v1/models": {"object": "list", "data": [{"id": "stub/model", "object": "model", "max_model_len": 4096}]},
                "/model_info": {"model_path": "stub/model", "is_generation": True},
            }
            return as_json(pages[path]) if path in pages else as_json({"detail": "Not Found"}, 404)
        body = json.loads(raw)
        self.bodies.append(body)
        instead = self.before(body)
        if instead is not None:
            return as_json({"error": {"message": instead[1], "type": "stub"}}, instead[0], instead[2])
        await asyncio.sleep(self.delay)
        documents = body.get("sequences") or body.get("input_ids") or body.get("prompt")
        if sum(map(len, documents)) > self.max_tokens:
            return as_json({"error": {"message": f"more than {self.max_tokens} tokens", "type": "too_large"}}, 413)
        routes: dict[str, Callable[[dict[str, Any]], Any]] = {"/generate": self.sglang, "/": self.seed, "/v1/completions": self.vllm}
        if path == "/v1/topk":
            return 200, MEDIA_TYPE, self.limbeck(body), {}
        if path == "/v1/completions" and body["prompt_logprobs"] > self.max_logprobs:
            asked = body["prompt_logprobs"]
            text = f"Requested prompt logprobs of {asked}, which is greater than max allowed: {self.max_logprobs}"
            return as_json({"error": {"message": text, "type": "BadRequestError", "param": "prompt_logprobs", "code": 400}}, 400)
        return as_json(routes[path](body))

    def health(self) -> dict[str, Any]:
        return {
            "status": "ok", "model": "stub/model", "fingerprint": {"weights": f"stub-{self.model}"}, "digest": f"digest-{self.model}",
            "vocabulary": VOCABULARY, "tokenizer": "0123456789abcdef", "max_top_k": 100, "max_tokens": min(self.max_tokens, 8192),
        }  # fmt: skip

    def rows(self, ids: list[int]) -> np.ndarray:
        return np.roll(logits_of(ids, self.model), self.shift, axis=0)

    def limbeck(self, body: dict[str, Any]) -> bytes:
        temperatures = body["temperatures"]
        answers = []
        for ids, positions in zip(body["sequences"], body["positions"], strict=True):
            logits = self.rows(ids)[positions].reshape(-1, VOCABULARY)
            kept = np.argsort(-logits, axis=1, kind="stable")[:, : body["top_k"]]
            wide = logits.astype(np.float64)
            log_z = np.stack([np.logaddexp.reduce(wide / t, axis=1) for t in temperatures], 1)
            answers.append(TopKRows(kept.astype(np.int32), np.take_along_axis(logits, kept, 1), log_z.astype(np.float32)))
        digest = self.health()["digest"]
        meta = {"model": "stub/model", "fingerprint": digest, "vocabulary": VOCABULARY, "temperatures": temperatures}
        return encode(answers, meta, body["values"])

    def vllm(self, body: dict[str, Any]) -> dict[str, Any]:
        """Each entry: the prompt's own token first, then the likeliest ones, as vLLM's dictionaries are filled."""
        choices = []
        for index, ids in enumerate(body["prompt"]):
            logprobs = log_softmax(self.rows(ids))
            entries: list[Any] = [None]
            for i in range(1, len(ids)):
                row, token = logprobs[i - 1], ids[i]
                order = np.argsort(-row, kind="stable")
                ranked = {int(token): int((row >= row[token]).sum())}
                ranked.update({int(t): rank for rank, t in enumerate(order[: body["prompt_logprobs"]].tolist(), 1)})
                entries.append({
                    str(t): {"logprob": float(row[t]), "rank": rank, "decoded_token": f" {t}"} for t, rank in ranked.items()
                })  # fmt: skip
            choices.append({"index": index, "text": " x", "finish_reason": "length", "logprobs": None, "prompt_logprobs": entries})
        # The order of the list is not promised.
        return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": choices[::-1]}

    def sglang(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        k, found = body["top_logprobs_num"], []
        for ids, start in zip(body["input_ids"], body["logprob_start_len"], strict=True):
            logprobs = log_softmax(self.rows(ids))
            honest = log_softmax(logits_of(ids, self.model))
            own: list[Any] = [[None, ids[start], None]]
            own += [[float(honest[i - 1, ids[i]]), ids[i] if ids[i] < VOCABULARY - 1 else 0, None] for i in range(start + 1, len(ids))]
            order = np.argsort(-logprobs, axis=1, kind="stable")[start : len(ids) - 1, :k]
            values = np.take_along_axis(logprobs[start : len(ids) - 1], order, 1)
            meta: dict[str, Any] = {"id": "0", "prompt_tokens": len(ids), "completion_tokens": 0, "input_token_logprobs": own}
            rows = len(order) + (1 if self.form == "b64_old" else 0)
            if self.form == "nested":
                meta["input_top_logprobs"] = [
                    None, *([[float(v), int(t), None] for v, t in zip(*pair, strict=True)] for pair in zip(values, order, strict=True))
                ]  # fmt: skip
            else:
                meta |= {"input_top_logprobs_shape": [rows, k], "input_top_logprobs_null_prefix": 1}
                for name, part, dtype in (("val", values, "float32"), ("idx", order, "int32")):
                    key = f"input_top_logprobs_{name}_flat"
                    if self.form == "flat":
                        meta[key] = part.ravel().tolist()
                    else:
                        meta[f"{key}_b64"] = base64.b64encode(part.astype(dtype).tobytes()).decode()
                        meta[f"{key}_b64_dtype"] = dtype
            found.append({"text": "", "output_ids": [], "meta_info": meta})
        return found

    def seed(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"logits": [self.rows(ids).tolist() for ids in body["input_ids"]]}


App = Callable[[Any, Any, Any], Awaitable[None]]


@contextlib.contextmanager
def served(app: App, port: int = 0) -> Iterator[str]:
    """An application on a loopback port, in a thread; yields its URL."""
    config = uvicorn.Config(app, host="127.0.0.1", port=port or free_port(), log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started and time.monotonic() < end:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{config.port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def assert_same(found: list[TopKRows | None], wanted: list[TopKRows], tolerance: float = 1e-6) -> None:
    """Answer by answer."""
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a is not None
        np.testing.assert_array_equal(a.ids_mK, b.ids_mK)
        np.testing.assert_allclose(a.logits_mK, b.logits_mK, rtol=0, atol=tolerance)
        np.testing.assert_allclose(a.log_z_mZ, b.log_z_mZ, rtol=0, atol=max(tolerance, 2e-6))
