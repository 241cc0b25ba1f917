"""``limbeck teach``: a model's top-k logits and partition sums for given tokens, over HTTP.

==========================  =========================================================================================
``POST /v1/topk``           ``{"sequences": [[int]], "positions": [[int]], "top_k": int}`` and, with their defaults,
                            ``"temperatures": [1.0], "samples": 0, "seed": 0, "values": "float32" | "float16",
                            "encoding": "json" | "b64" | "frame", "expect": null``; the answers' layout is that of
                            :mod:`limbeck.teachers.http.frames`.  Row ``j`` is the distribution over the token *after*
                            ``positions[j]``; a sequence's last position may be asked.  ``expect`` is the digest of a
                            fingerprint or its fields: another model answers 409 and says what differs
``POST /``,                 ``{"input_ids": [[int]], "return_logits": true}`` gives ``{"logits": [[[float] * V] * T] * B}``;
``POST /v1/completions``    with ``"top_k"``: ``{"ids": [[[int]]], "logits": [[[float]]], "log_z": [[float]]}``
``GET /health``             status, model, fingerprint and its digest, vocabulary, limits
``GET /v1/models``          the model, as OpenAI's API lists it
``GET /metrics``            Prometheus text
``GET /``                   a few words, without a token
==========================  =========================================================================================

A request is scored on its own, so that the same body gives the same bits whatever else runs.  Bodies are compressed with zstd or
gzip as ``Accept-Encoding`` says.  Errors are ``{"error": {"message", "type"}}``: 400 for a field that is wrong, 401 without the
token, 409 for another model, 413 for more than the limits (send less at a time), 429 and 503 with ``Retry-After``.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from limbeck import __version__
from limbeck.errors import DataError
from limbeck.models.loading import load_tokenizer
from limbeck.models.vocabulary import vocabulary_digest
from limbeck.needs import TopK
from limbeck.serve.bodies import parse_object, read_body
from limbeck.serve.gate import application, exit_stack
from limbeck.serve.metrics import MEDIA_TYPE as METRICS_TYPE
from limbeck.serve.metrics import Metrics
from limbeck.serve.questions import Completion, Limits, Question, completion, topk_question
from limbeck.serve.refusals import Refusal
from limbeck.serve.replies import reply
from limbeck.serve.worker import Worker
from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.http.frames import MEDIA_TYPE, FrameError, encode, encode_object
from limbeck.teachers.scoring import Scorer

log = logging.getLogger("limbeck.serve")
JSON = "application/json"


class TeacherService:
    """A loaded :class:`Scorer` behind :attr:`app`.  ``queue`` bounds the requests under way."""

    def __init__(
        self,
        scorer: Scorer,
        name: str,
        *,
        max_top_k: int = 1024,
        max_tokens: int = 16_384,
        max_values: int = 4_000_000,
        queue: int = 64,
        token: str | None = None,
        log_every: int = 0,
        say: Callable[[str], None] = log.info,
    ):
        config = scorer.model.config.get_text_config(decoder=True)
        self.scorer = scorer
        self.name = name
        self.vocabulary = int(scorer.model.get_output_embeddings().weight.shape[0])
        self.limits = Limits(
            vocabulary=min(int(scorer.model.get_input_embeddings().weight.shape[0]), self.vocabulary),
            max_top_k=min(max_top_k, self.vocabulary),
            max_tokens=max_tokens,
            max_values=max_values,
            context=getattr(config, "max_position_embeddings", None),
        )
        self.fingerprint = scorer.fingerprint()
        self.digest = _digest(self.fingerprint)
        self.tokenizer = _tokenizer_digest(scorer)
        self.worker = Worker(queue)
        self.metrics = Metrics()
        self._declare()
        routes = [
            Route("/", self.root),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/v1/models", self.models),
            Route("/v1/topk", self.topk, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/", self.completions, methods=["POST"]),
        ]
        self.app: ASGIApp = application(
            routes, self.metrics, token=token, open_paths=("/",), log_every=log_every, say=say
        )

    def _declare(self) -> None:
        self.metrics.counter("tokens_scored_total", "Tokens that went through the model.")
        self.metrics.counter("positions_answered_total", "Positions whose distribution was given.")
        self.metrics.summary("scoring_seconds", "Seconds of scoring a request, without waiting.")
        self.metrics.gauge("queue_length", "Requests that wait for the model.", lambda: self.worker.waiting)
        self.metrics.gauge("requests_under_way", "Requests waiting, in work or being sent.", lambda: self.worker.admitted)

    async def root(self, _: Request) -> Response:
        """Enough for a browser or ``curl``."""
        return PlainTextResponse(f"limbeck {__version__} teaches {self.name}: POST /v1/topk, GET /health\n")

    async def health(self, _: Request) -> Response:
        """What a client must know before it asks."""
        return JSONResponse(
            {
                "status": "closing" if self.worker.closed else "ok",
                "model": self.name,
                "fingerprint": self.fingerprint,
                "digest": self.digest,
                "vocabulary": self.vocabulary,
                "tokenizer": self.tokenizer,
                "max_top_k": self.limits.max_top_k,
                "max_tokens": self.limits.max_tokens,
                "max_values": self.limits.max_values,
                "context": self.limits.context,
                "version": __version__,
            }
        )

    async def models(self, _: Request) -> Response:
        """OpenAI's list of models: this one."""
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "limbeck"}
        return JSONResponse({"object": "list", "data": [model]})

    async def show_metrics(self, _: Request) -> Response:
        """Prometheus text."""
        return Response(self.metrics.text(), media_type=METRICS_TYPE)

    async def topk(self, request: Request) -> Response:
        """``POST /v1/topk``."""
        body = await self._body(request)
        question = await asyncio.to_thread(lambda: topk_question(parse_object(body), self.limits))
        self._check_expected(question.expect)
        answers = await self._answers(request, question.asks, question.need, question.seed)
        accept = request.headers.get("accept-encoding", "")
        return await asyncio.to_thread(lambda: reply(*self._encoded(question, answers), accept))

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions`` and ``POST /``: whole logits, or the likeliest of every position."""
        body = await self._body(request)
        asked = await asyncio.to_thread(lambda: completion(parse_object(body), self.limits))
        need = TopK(self.vocabulary if asked.top_k is None else asked.top_k)
        answers = await self._answers(request, asked.asks, need, 0)
        accept = request.headers.get("accept-encoding", "")
        return await asyncio.to_thread(lambda: reply(_completion_text(asked, answers), JSON, accept))

    async def _body(self, request: Request) -> bytes:
        exit_stack(request.scope).enter_context(self.worker.admission())
        return await read_body(request, self.limits.max_body, way_out="send fewer sequences at a time")

    def _check_expected(self, expect: str | dict[str, Any] | None) -> None:
        if expect is None or expect in (self.digest, self.fingerprint):
            return
        if isinstance(expect, str):
            what = f"the client expects digest {expect:.64} and this is {self.digest}: {json.dumps(self.fingerprint)}"
        else:
            ours, names = self.fingerprint, sorted(expect.keys() | self.fingerprint.keys())
            what = "; ".join(f"{n}: expected {expect.get(n)!r}, here {ours.get(n)!r}" for n in names if expect.get(n) != ours.get(n))
        raise Refusal(
            409, f"another model is served here, or served otherwise: {what}", digest=self.digest, fingerprint=self.fingerprint
        )

    async def _answers(self, request: Request, asks: list[Ask], need: TopK, seed: int) -> list[TopKRows]:
        if not any(len(ask.positions) for ask in asks):
            return [self._no_rows(need) for _ in asks]
        return await self.worker.run(lambda: self._score(asks, need, seed), request.receive)

    def _no_rows(self, need: TopK) -> TopKRows:
        k = min(need.k, self.vocabulary)
        samples_mS = np.zeros((0, need.samples), np.int32) if need.samples else None
        zeros = np.zeros((0, k), np.float32)
        return TopKRows(zeros.astype(np.int32), zeros, np.zeros((0, len(need.temperatures)), np.float32), samples_mS)

    def _score(self, asks: Sequence[Ask], need: TopK, seed: int) -> list[TopKRows]:
        tokens = sum(len(ask.ids) for ask in asks)
        start = time.perf_counter()
        failure: Refusal | None = None
        try:
            answers = self.scorer.score(asks, need, seed=seed)
        except Exception as error:
            if not _is_out_of_memory(error):
                log.exception("scoring %d tokens failed", tokens)
            failure = _failure(error, tokens)
        if failure is not None:
            # Only now are the frames of the failed forward gone, and their tensors with them.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise failure
        self.metrics.observe("scoring_seconds", time.perf_counter() - start)
        self.metrics.add("tokens_scored_total", tokens)
        self.metrics.add("positions_answered_total", sum(map(len, answers)))
        if not all(np.isfinite(answer.logits_mK).all() and np.isfinite(answer.log_z_mZ).all() for answer in answers):
            raise Refusal(500, "the model gave logits that are not finite: its weights or its dtype are at fault (try --dtype float32)")
        return answers

    def _encoded(self, question: Question, answers: list[TopKRows]) -> tuple[bytes, str]:
        meta = {
            "model": self.name,
            "fingerprint": self.digest,
            "vocabulary": self.vocabulary,
            "temperatures": question.need.temperatures,
            "k": min(question.need.k, self.vocabulary),
            "samples": question.need.samples,
        }
        try:
            if question.encoding == "frame":
                return encode(answers, meta, question.values), MEDIA_TYPE
            body = encode_object(answers, meta, question.values, lists=question.encoding == "json")
        except FrameError as error:
            raise Refusal(400, f"values: {error}") from None
        return json.dumps(body, separators=(",", ":"), allow_nan=False).encode(), JSON


def _completion_text(asked: Completion, answers: Sequence[TopKRows]) -> bytes:
    if asked.top_k is None:
        return b'{"logits":' + _lists([_whole_logits(answer) for answer in answers]) + b"}"
    ids, logits = _lists([answer.ids_mK for answer in answers]), _lists([answer.logits_mK for answer in answers])
    log_z = json.dumps([answer.log_z_mZ[:, 0].tolist() for answer in answers]).encode()
    return b'{"ids":' + ids + b',"logits":' + logits + b',"log_z":' + log_z + b"}"


def _whole_logits(answer: TopKRows) -> np.ndarray:
    """Logits ``[m, V]`` in the order of ids, from those of all ids in the order of likelihood."""
    logits_mV = np.empty_like(answer.logits_mK)
    np.put_along_axis(logits_mV, answer.ids_mK.astype(np.int64), answer.logits_mK, axis=1)
    return logits_mV


def _lists(arrays: Sequence[np.ndarray]) -> bytes:
    """Arrays as JSON, a row at a time: one call for all of it would hold Python's lock for seconds."""
    documents = ("[" + ",".join(json.dumps(row.tolist(), separators=(",", ":")) for row in array) + "]" for array in arrays)
    return ("[" + ",".join(documents) + "]").encode()


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch's CPU allocator has no type of its own for it.
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))


def _failure(error: Exception, tokens: int) -> Refusal:
    if _is_out_of_memory(error):
        return Refusal(413, f"out of memory while scoring {tokens} tokens: send fewer tokens at a time")
    line = (str(error).splitlines() or [""])[0][:200]
    return Refusal(500, f"scoring {tokens} tokens failed ({type(error).__name__}: {line})")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def _tokenizer_digest(scorer: Scorer) -> str | None:
    """SHA-256 of the token strings in the order of their ids; None for a model without a tokenizer."""
    try:
        return vocabulary_digest(load_tokenizer(scorer.source, scorer.revision))
    except DataError:
        return None


def model_name(source: str) -> str:
    """How a model is called on the wire: as it was asked for, or a folder's own name (paths are nobody else's business)."""
    path = Path(source).expanduser()
    if not path.is_dir():
        return source
    path = path.resolve()
    return f"{path.parent.name}/model" if path.name == "model" else path.name
