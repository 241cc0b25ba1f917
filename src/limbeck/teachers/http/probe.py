"""What a server is and can do, found out before the first batch; and a canary that notices when it is another one.

The self-check of alignment asks about two sequences that differ in one token.  The distribution after a token depends on it and the
distributions before it do not: a server, or a reading of its answers, that is off by one row is found without knowing the model.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from limbeck.errors import TeacherError, did_you_mean
from limbeck.needs import TopK
from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.http.faults import Backoff, Fault
from limbeck.teachers.http.pipeline import Answers, Pipeline, percentile
from limbeck.teachers.http.protocols.limbeck import LimbeckProtocol

T = TypeVar("T")
PREFLIGHT_SECONDS = 5.0
PROBE_PATIENCE = 20.0
PROBE_K = 16
"""vLLM answers k = 20 unless told otherwise."""
LENGTH = 24
CHANGED = 13
"""The token in which the two sequences of the self-check differ."""
TOLERANCE = 0.1
"""Total variation between two answers to the canary, on average: batches of other sizes round otherwise, other models differ more."""
_MANY = 1024
_LIMIT = re.compile(r"(?:max(?:imum)?(?: value)? allowed|at most|maximum of|up to|more than)\D{0,20}(\d+)", re.IGNORECASE)


@dataclass
class Findings:
    """What the probe found; ``lines`` is a summary for people."""

    model: str = ""
    health: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: int | None = None
    tokenizer: str | None = None
    k_limit: int | None = None
    token_limit: int | None = None
    temperature: str = ""
    alignment: str = ""
    canary: TopKRows | None = None
    latency: tuple[float, float] = (0.0, 0.0)
    bytes_per_token: float = 0.0
    lines: list[str] = field(default_factory=list)


async def preflight(pipeline: Pipeline, seconds: float = PREFLIGHT_SECONDS) -> Findings:
    """Reach the server within some seconds, and read what it says of itself.  Raises :class:`~limbeck.errors.TeacherError`."""
    end = asyncio.get_running_loop().time() + seconds
    backoff, attempt, found = Backoff(base=0.1, cap=1.0), 0, Findings()
    while True:
        left = end - asyncio.get_running_loop().time()
        try:
            await _introduce(pipeline, found, max(left, 0.1))
            return found
        except Fault as fault:
            wait = backoff.seconds(attempt, fault.retry_after)
            attempt += 1
            if asyncio.get_running_loop().time() + wait >= end:
                raise TeacherError(unreachable(pipeline, fault)) from fault
        await asyncio.sleep(wait)


def unreachable(pipeline: Pipeline, fault: Exception) -> str:
    """The message for a server that does not answer."""
    start = {
        "limbeck": "limbeck teach MODEL --port PORT",
        "vllm": "vllm serve MODEL --max-logprobs 128 --logprobs-mode raw_logprobs",
        "sglang": "python -m sglang.launch_server --model-path MODEL",
    }.get(pipeline.protocol.name)
    said = str(fault)
    if "CERTIFICATE_VERIFY_FAILED" in said:
        mend = "name the file with its authority's certificate in SSL_CERT_FILE (not read for this machine's own ports: take http there)"
    elif "WRONG_VERSION_NUMBER" in said:
        mend = "it speaks http, not https"
    elif said.startswith(("ReadError", "RemoteProtocolError")):
        mend = "something else listens there, or it speaks https"
    elif "JSON" in said:
        mend = "something else answers there"
    else:
        mend = f"start it (`{start}`)" if start else "start it"
    return (
        f"Failed to connect to teacher endpoint: {pipeline.shown}\n{fault}\n"
        f"{mend}, or correct `teacher.url` and `teacher.protocol` (now '{pipeline.protocol.name}'); "
        f"`limbeck doctor --teacher {pipeline.shown} --protocol {pipeline.protocol.name}` tries it by hand"
    )


async def _introduce(pipeline: Pipeline, found: Findings, timeout: float) -> None:
    protocol = pipeline.protocol
    if protocol.name == "seed":
        # It may know no GET: any answer says that it is there.
        await pipeline.reach("", timeout)
        found.model = protocol.model or "unnamed"
        return
    if isinstance(protocol, LimbeckProtocol):
        health = await _object(pipeline, "/health", timeout)
        missing = [name for name in ("model", "fingerprint", "digest", "vocabulary") if name not in health]
        if missing:
            raise TeacherError(f"{pipeline.shown}/health has no {missing[0]!r}: it is no `limbeck teach`; set `teacher.protocol`")
        found.health, found.model, found.vocabulary = health, str(health["model"]), int(health["vocabulary"])
        found.tokenizer, found.k_limit, found.token_limit = health.get("tokenizer"), health.get("max_top_k"), health.get("max_tokens")
        protocol.expect, protocol.vocabulary = str(health["digest"]), found.vocabulary
    elif protocol.name == "vllm":
        await pipeline.send(protocol.health_path, None, timeout)
        listed = (await _object(pipeline, "/v1/models", timeout)).get("data") or []
        names = [str(model.get("id")) for model in listed if isinstance(model, dict)]
        if protocol.model is None and not names:
            raise TeacherError(f"the teacher at {pipeline.shown} lists no model: name one in `teacher.model`")
        if protocol.model is not None and names and protocol.model not in names:
            hint = did_you_mean(protocol.model, names) or ";"
            raise TeacherError(f"the teacher at {pipeline.shown} serves no model '{protocol.model}'{hint} it serves: {', '.join(names)}")
        found.model = protocol.model = protocol.model or names[0]
        chosen = next((model for model in listed if isinstance(model, dict) and model.get("id") == found.model), {})
        found.token_limit = chosen.get("max_model_len")
    else:
        await pipeline.send(protocol.health_path, None, timeout)
        try:
            info = await _object(pipeline, "/model_info", timeout)
        except TeacherError:
            info = await _object(pipeline, "/get_model_info", timeout)
        found.model = str(protocol.model or info.get("model_path") or "unnamed")
        found.vocabulary = protocol.vocabulary = info.get("vocab_size")


async def _object(pipeline: Pipeline, path: str, timeout: float) -> dict[str, Any]:
    reply = await pipeline.send(path, None, timeout)
    try:
        body = json.loads(reply.body)
    except ValueError as error:
        raise Fault(f"{path} answers with something that is not JSON") from error
    if not isinstance(body, dict):
        raise Fault(f"{path} answers with something that is no JSON object")
    return body


def explore(pipeline: Pipeline, found: Findings, patience: float) -> None:
    """Ask a few questions and fill in what they tell.  Raises :class:`~limbeck.errors.TeacherError`."""
    patience = min(patience, PROBE_PATIENCE)
    if pipeline.protocol.name == "vllm":
        found.k_limit = pipeline.call(_k_limit(pipeline, patience))
    k = min(PROBE_K, found.k_limit or PROBE_K)
    temperatures = (1.0, 2.0) if pipeline.protocol.any_temperature else (1.0,)
    plain, changed = canary_asks(found.vocabulary)
    need = TopK(k, temperatures)
    bytes_before = pipeline.counts["bytes"]
    (first,), (plainly, otherwise) = (_all_there(pipeline, pipeline.ask(asks, need, patience=patience)) for asks in ([plain], [plain, changed]))
    found.bytes_per_token = (pipeline.counts["bytes"] - bytes_before) / (3 * len(plain.positions))
    found.latency = (percentile(list(pipeline.latencies), 0.5), percentile(list(pipeline.latencies), 0.95))
    found.vocabulary = found.vocabulary or pipeline.protocol.vocabulary
    found.canary = first
    found.alignment = alignment(plainly, otherwise, pipeline.shown)
    if pipeline.protocol.any_temperature:
        found.temperature = _tempered(pipeline, found.canary, temperatures)
    else:
        found.temperature = pipeline.call(_heated(pipeline, plain, found.canary, patience))
    found.lines = _summary(pipeline, found, k)


def _all_there(pipeline: Pipeline, answers: Answers) -> list[TopKRows]:
    there = [rows for rows in answers if rows is not None]
    if len(there) < len(answers):
        raise TeacherError(f"the teacher at {pipeline.shown} does not answer the first questions: see `limbeck doctor --teacher`")
    return there


def canary_asks(vocabulary: int | None) -> tuple[Ask, Ask]:
    """A fixed sequence of small ids, which every vocabulary has, and one that differs from it in a token."""
    top = min(vocabulary or 64, 64)
    ids = (np.arange(LENGTH) * 11 + 5) % top
    other = ids.copy()
    other[CHANGED] = (ids[CHANGED] + top // 2) % top
    positions = np.arange(LENGTH - 1, dtype=np.int32)
    return Ask(ids.astype(np.int32), positions), Ask(other.astype(np.int32), positions)


def distance(a: TopKRows, b: TopKRows) -> np.ndarray:
    """Total variation of each row's kept probabilities at T = 1, ``[m]``: ids kept on one side only count with their mass."""
    found = np.empty(len(a))
    for row in range(len(a)):
        p, q = (dict(zip(x.ids_mK[row].tolist(), np.exp(x.logits_mK[row] - x.log_z_mZ[row, 0]).tolist(), strict=True)) for x in (a, b))
        found[row] = sum(abs(p.get(token, 0.0) - q.get(token, 0.0)) for token in p.keys() | q.keys()) / 2
    return found


def alignment(plain: TopKRows, changed: TopKRows, where: str) -> str:
    """Words for the summary; raises :class:`~limbeck.errors.TeacherError` when the rows are certainly shifted."""
    apart = distance(plain, changed)
    near = apart[CHANGED - 1 : CHANGED + 2]
    # Served models round: the rows before the changed token are not quite alike.
    noise = 8 * float(np.median(apart[: CHANGED - 1])) + 1e-5
    if near.max() <= noise:
        return "not to be told: the answers hardly depend on the tokens"
    shift = int(np.flatnonzero(near > max(noise, near.max() / 20))[0]) - 1
    if shift:
        raise TeacherError(
            f"the rows of the teacher at {where} are off by {shift:+d}: another token at position {CHANGED} changes the row of "
            f"position {CHANGED + shift} first\nis `teacher.protocol` right, and does the server score what it is sent?"
        )
    return "row j is the distribution after position j"


async def _patiently(pipeline: Pipeline, work: Callable[[], Awaitable[T]], patience: float) -> T:
    """Try until it is no fault any more."""
    end = asyncio.get_running_loop().time() + patience
    for attempt in itertools.count():
        try:
            return await work()
        except Fault as fault:
            wait = pipeline.backoff.seconds(attempt, fault.retry_after)
            if asyncio.get_running_loop().time() + wait > end:
                raise TeacherError(f"the teacher at {pipeline.shown} does not answer the first questions: {fault}") from fault
        await asyncio.sleep(wait)
    raise AssertionError("unreachable")


async def _k_limit(pipeline: Pipeline, patience: float) -> int | None:
    """The largest k, from the refusal of one that is too large; None if it was not refused."""
    path, body = pipeline.protocol.request([Ask(np.array([1, 2], np.int32), np.array([0], np.int32))], TopK(_MANY))
    try:
        await _patiently(pipeline, lambda: pipeline.send(path, body), patience)
    except TeacherError as refusal:
        said = _LIMIT.search(str(refusal))
        if said is None:
            raise
        return int(said[1])
    return None


def _tempered(pipeline: Pipeline, canary: TopKRows, temperatures: tuple[float, ...]) -> str:
    """Whether the partition sums belong to the logits: each is at least that of the kept ids."""
    logits = canary.logits_mK.astype(np.float64)
    for column, temperature in enumerate(temperatures):
        kept = np.log(np.exp((logits - logits[:, :1]) / temperature).sum(1)) + logits[:, 0] / temperature
        same = column > 0 and np.allclose(canary.log_z_mZ[:, 0], canary.log_z_mZ[:, column], atol=1e-6)
        if same or (canary.log_z_mZ[:, column] < kept - 1e-3).any():
            raise TeacherError(f"the teacher at {pipeline.shown} gives a partition sum at T = {temperature:g} that does not fit its logits: "
                "is `teacher.protocol` right, and are both sides of one release?")
    return "any: logZ of each temperature asked for"


async def _heated(pipeline: Pipeline, ask: Ask, canary: TopKRows, patience: float) -> str:
    """Whether the sampling temperature reaches the prompt's log-probabilities: in most releases it does not."""
    need = TopK(canary.ids_mK.shape[1])
    path, body = pipeline.protocol.request([ask], need)
    body = pipeline.protocol.heated(body, 2.0)

    async def once() -> TopKRows:
        return pipeline.protocol.read(await pipeline.send(path, body), [ask], need)[0]

    apart = float(distance(canary, await _patiently(pipeline, once, patience)).mean())
    changes = "changes" if apart > TOLERANCE else "does not change"
    return f"T = 1 only (log-probabilities; the request's temperature {changes} them, and requests say 1)"


def _summary(pipeline: Pipeline, found: Findings, k: int) -> list[str]:
    def told(value: Any, otherwise: str = "not told") -> str:
        return otherwise if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    setting = pipeline.protocol.tokens_at_k
    return [
        f"teacher {found.model} at {pipeline.shown} ({pipeline.protocol.name})",
        f"  vocabulary {told(found.vocabulary)}, tokenizer {told(found.tokenizer and found.tokenizer[:16])}",
        f"  k at most {told(found.k_limit)}{f' ({setting})' if found.k_limit and setting else ''}, "
        f"tokens a request at most {told(found.token_limit)}",
        f"  temperatures: {found.temperature}",
        f"  alignment: {found.alignment}",
        f"  latency p50 {1e3 * found.latency[0]:.0f} ms, p95 {1e3 * found.latency[1]:.0f} ms; "
        f"{found.bytes_per_token:,.0f} bytes a token on the wire at k = {k}",
    ]


class Canary:
    """Scores the fixed sequence again from time to time."""

    def __init__(self, pipeline: Pipeline, first: TopKRows, vocabulary: int | None):
        self._pipeline, self._first = pipeline, first
        self._ask = canary_asks(vocabulary)[0]
        self._need = TopK(first.ids_mK.shape[1], (1.0,))

    async def sing(self) -> None:
        """Ask once, and let the pipeline fail if the answer is another one.  A server that does not answer is not its business."""
        try:
            found = (await self._pipeline.attempt([self._ask], self._need))[0]
        except Fault:
            return
        except TeacherError as error:
            self._pipeline.fail(error)
            return
        assert found is not None
        apart = float(distance(self._first, found).mean())
        if apart > TOLERANCE:
            self._pipeline.fail(
                TeacherError(
                    f"the teacher at {self._pipeline.shown} has changed: a fixed sequence is answered differently than at the start "
                    f"(total variation {apart:.3f}, allowed {TOLERANCE})\nanother model, adapter, quantisation or template is served "
                    "there now; serve the first one again and start the run again, or begin a new run"
                )
            )


def canary_digest(rows: TopKRows) -> str:
    """Names a model by the ids that it is sure of: the likeliest ones that lead by a factor of e, which rounding does not move."""
    sure = rows.logits_mK[:, 0] - rows.logits_mK[:, min(1, rows.logits_mK.shape[1] - 1)] > 1
    answer = np.where(sure, rows.ids_mK[:, 0], -1).astype("<i4")
    return hashlib.sha256(answer.tobytes()).hexdigest()[:16]
