"""A teacher behind an HTTP endpoint, asked ahead of time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from limbeck.config.address import missing, shown
from limbeck.config.parts.teachers import HttpTeacherOptions
from limbeck.errors import TeacherError
from limbeck.needs import Need, TopK
from limbeck.teachers.documents import Ask, PendingAnswers, asks_of, assemble
from limbeck.teachers.http.faults import Backoff
from limbeck.teachers.http.launch import Launched, launch
from limbeck.teachers.http.pipeline import Answers, Pipeline, Settings, percentile
from limbeck.teachers.http.probe import Canary, Findings, canary_digest, explore, preflight
from limbeck.teachers.http.protocols import protocol_of
from limbeck.teachers.http.transport import address
from limbeck.types import Batch, Signal, Visit

PATIENCE = {"wait": 600.0, "skip": 30.0, "ce_only": 30.0, "abort": 0.0}


class HttpTeacher:
    """Answers :class:`~limbeck.needs.TopK` from a server (`limbeck teach`, vLLM, SGLang, whole logits).

    ``source`` is not used: a served teacher is where its URL says.  ``summary`` holds the lines of the capability probe after
    :meth:`load`, ``findings`` what it found.
    """

    module = None

    def __init__(self, options: HttpTeacherOptions, source: str | None = None, *, backoff: Backoff | None = None):
        self.options = options
        self.lookahead = options.lookahead
        self.summary: list[str] = []
        self.findings = Findings()
        self._backoff = backoff
        self._pipeline: Pipeline | None = None
        self._canary: Canary | None = None
        self._launched: Launched | None = None
        self._submitted = 0

    @property
    def patience(self) -> float:
        """Seconds of trying one request."""
        return PATIENCE[self.options.on_failure] if self.options.patience is None else self.options.patience

    @property
    def pipeline(self) -> Pipeline:
        """The open connection; asking before :meth:`load` is a programmer's error."""
        assert self._pipeline is not None, "load() comes first"
        return self._pipeline

    def load(self, device: torch.device | str = "cpu") -> None:
        """Start the server if the recipe says so, reach it within five seconds, and find out what it can do.

        Raises :class:`~limbeck.errors.TeacherError` with the way out.
        """
        options = self.options
        if variable := missing(options.url):
            raise TeacherError(f"teacher.url: the environment variable {variable} is not set: export {variable}=… before the run")
        try:
            named = address(options.url).named
        except ValueError as error:
            raise TeacherError(f"teacher.url: {shown(options.url)!r} is no address ({error})") from None
        token = self._token()
        if token and named:
            raise TeacherError("teacher.url has a name and password, and teacher.token_env a token: one of them can be sent, leave out the other")
        if options.launch is not None:
            self._launched = launch(options, token)
        settings = Settings(
            url=options.url,
            token=token,
            in_flight=options.in_flight,
            max_bytes=options.max_bytes,
            tokens_per_request=options.tokens_per_request,
            timeout=options.timeout,
            patience=self.patience,
            on_failure=options.on_failure,
        )
        self._pipeline = Pipeline(protocol_of(options), settings, self._backoff)
        try:
            self.findings = self._pipeline.call(preflight(self._pipeline))
            explore(self._pipeline, self.findings, self.patience)
            self._keep_to(self.findings.token_limit)
        except BaseException:
            self.close()
            raise
        assert self.findings.canary is not None
        self._canary = Canary(self._pipeline, self.findings.canary, self.findings.vocabulary)
        self.summary = self.findings.lines

    def fingerprint(self) -> dict[str, Any]:
        """What the signal depends on, whatever the URL: the server's own fingerprint, or the model's name and its canary's answer."""
        if self.findings.canary is None:
            return {"protocol": self.options.protocol, "model": self.options.model}
        if "fingerprint" in self.findings.health:
            return dict(self.findings.health["fingerprint"])
        return {
            "protocol": self.options.protocol,
            "model": self.findings.model,
            "canary": canary_digest(self.findings.canary),
        }

    def signal(self, batch: Batch, needs: Mapping[type[Need], Need]) -> Signal:
        """Ask and wait."""
        return self.submit(batch, needs).result()[1]

    def stream(self, batch: Batch, visit: Visit) -> None:
        """A served teacher does not stream; its options say so before anything is loaded."""
        raise TypeError("teacher 'http' does not stream attention: use teacher 'self'")

    @property
    def missing(self) -> str:
        """What becomes of documents that were not answered (:func:`~limbeck.teachers.documents.assemble`)."""
        return "skip" if self.options.on_failure == "skip" else "ce_only"

    def submit(self, batch: Batch, needs: Mapping[type[Need], Need]) -> PendingAnswers:
        """Send the questions of one micro-batch; returns at once."""
        need = needs[TopK]
        assert isinstance(need, TopK)
        need = self._answerable(need)
        asks, starts = asks_of(batch)
        question = self.pipeline.question(asks, need)
        self._submitted += 1
        every = self.options.canary_every
        if every and self._canary is not None and self._submitted % every == 0:
            self.pipeline.spawn(self._canary.sing())
        finish = partial(assemble, batch, asks, starts, temperatures=need.temperatures, missing=self.missing)
        return PendingAnswers(question.wait, finish)

    def ask(self, asks: Sequence[Ask], need: TopK, *, alone: bool = False) -> Answers:
        """Answers to documents, in order; None for those that `skip` or `ce_only` left out.

        ``alone`` sends each in a request of its own, so that its answer depends on no other document.
        """
        return self.pipeline.ask(list(asks), self._answerable(need), alone=alone)

    def close(self) -> None:
        """Hang up, and end the server that was started for this run."""
        if self._pipeline is not None:
            self._pipeline.close()
        if self._launched is not None:
            self._launched.stop()
            self._launched = None

    def metrics(self) -> dict[str, float]:
        """For the log: seconds of the last requests (``latency_p50``, ``latency_p95``), and since the start ``requests``,
        ``retries``, ``left_out`` (documents) and ``bytes`` on the wire; ``in_flight`` is how many the server bears now."""
        pipeline = self.pipeline
        latencies = list(pipeline.latencies)
        totals = {name: float(pipeline.counts[name]) for name in ("requests", "retries", "left_out", "bytes")}
        return {
            "latency_p50": percentile(latencies, 0.5),
            "latency_p95": percentile(latencies, 0.95),
            **totals,
            "in_flight": float(int(pipeline.admission.limit)),
        }

    def advice(self) -> str:
        """One line for a run that waits for its teacher: what holds it up, and the setting to change."""
        options, pipeline = self.options, self.pipeline
        found = self.metrics()
        waits = pipeline.waited
        worst = max(waits, key=lambda name: waits[name], default="latency")
        head = f"the run waits for its teacher ({found['latency_p50']:.2f} s a request): "
        if worst == "congestion":
            return head + (
                f"the server says that it has too much to do and bears {found['in_flight']:.0f} of teacher.in_flight = {options.in_flight} "
                "requests: give it more devices, or lower teacher.tokens_per_request"
            )
        if worst == "bytes":
            return head + f"answers that wait fill teacher.max_bytes = {options.max_bytes:,}: raise it, or lower the objective's k"
        if worst == "places":
            return head + f"all teacher.in_flight = {options.in_flight} places are taken: raise it if the server bears more"
        if options.lookahead < 2:
            return head + f"questions go out too late: raise teacher.lookahead = {options.lookahead}"
        return head + "the server is slower than the student: give it more devices, or capture its signals once (stage kind capture)"

    def _answerable(self, need: TopK) -> TopK:
        limit = self.findings.k_limit
        if limit is not None and need.k > limit:
            setting = self.pipeline.protocol.tokens_at_k
            raise TeacherError(
                f"the teacher at {self.pipeline.shown} answers k = {limit} at most and the objectives want {need.k}: "
                f"start it with `{setting} {need.k}`, or lower the objective's k"
            )
        return self.pipeline.protocol.answerable(need)

    def _keep_to(self, token_limit: int | None) -> None:
        """Where the server counts a request's tokens, groups are no larger than it takes: halves would cost a refusal each time."""
        settings = self.pipeline.settings
        if token_limit is not None and self.options.protocol == "limbeck":
            self.pipeline.settings = replace(settings, tokens_per_request=min(settings.tokens_per_request, token_limit))

    def _token(self) -> str | None:
        name = self.options.token_env
        if name is None:
            return None
        token = os.environ.get(name)
        if not token:
            raise TeacherError(f"teacher.token_env: the environment variable {name} is not set; it must hold the teacher's token")
        return token
