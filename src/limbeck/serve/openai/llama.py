"""GGUF files by llama.cpp, in this process: the request handlers of ``xllamacpp``'s server, called in threads of ours.

They stream, they report on the prompt as it is read, and they stop when a callback says so, which frees the slot.  The wheel opens a
listener of its own whether one wants it or not: it gets a socket in a folder that nobody else may enter, and a key that nobody knows.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import tempfile
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from limbeck.errors import ModelError
from limbeck.serve.openai.backend import Caller, Likely, Piece, TokenScore, Usage
from limbeck.serve.openai.gguf_header import read_header
from limbeck.serve.openai.questions import EXTRA, Question, bad, check_context, too_long
from limbeck.serve.refusals import Refusal

TAKES = frozenset(EXTRA)
SAMPLERS = ["penalties", "temperature", "top_k", "top_p", "min_p"]
"""Their order: that of transformers, so that a request means the same to both backends."""
BATCH = 512
"""Tokens of a prompt between two looks at whether somebody still waits for the answer."""
PADDING = 256
"""llama.cpp rounds a context up to a multiple of it."""


class LlamaBackend:
    """A GGUF file.  ``context`` None: 4096, or what the model was made for if that is less; ``threads`` None: as llama.cpp likes;
    ``template`` is used instead of the file's own."""

    takes = TAKES

    def __init__(
        self, path: Path, *, name: str | None = None, context: int | None = None, parallel: int = 4, threads: int | None = None, numa: bool = False,
        template: str | None = None,
    ):  # fmt: skip
        if find_spec("xllamacpp") is None:
            raise ModelError(f"{path}: serving a GGUF file needs xllamacpp: pip install xllamacpp")
        header = read_header(path)
        made_for = header.get(f"{header.get('general.architecture')}.context_length")
        self.context = min(context or 4096, made_for or 2**31)
        if context is not None and self.context < context:
            raise ModelError(f"{path}: --context {context}, and the model was made for {made_for}: ask for that or less")
        self.name = name or path.stem
        self.has_template = template is not None or "tokenizer.chat_template" in header
        self.vocabulary = int(header.get("tokenizer.ggml.tokens", 0))
        self._first: int | None = header.get("tokenizer.ggml.bos_token_id")
        # 0700, and removed with all that is in it.
        self._folder = Path(tempfile.mkdtemp(prefix="limbeck-serve-"))
        self._server: Any = self._load(path, parallel, threads, numa, template)
        self._pool = ThreadPoolExecutor(parallel, "limbeck-llama")

    def _load(self, path: Path, parallel: int, threads: int | None, numa: bool, template: str | None) -> Any:
        xllamacpp: Any = import_module("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_batch = self.context * parallel, parallel, BATCH
        params.ctx_shift = False
        # Prompts of slots that are taken over would be kept in gigabytes of memory.
        params.cache_ram_mib = 0
        params.verbosity = 1
        params.ui = params.endpoint_slots = False
        params.hostnames, params.port, params.api_keys = [str(self._folder / "llama.sock")], 8080, [secrets.token_hex(32)]
        params.n_threads_http = 1
        if template is not None:
            params.chat_template = template
        if threads is not None:
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        if numa:
            params.numa = xllamacpp.ggml_numa_strategy.GGML_NUMA_STRATEGY_DISTRIBUTE
        try:
            return xllamacpp.Server(params)
        except Exception as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise ModelError(f"{path}: llama.cpp cannot load it ({error}); what it says of the reason stands above") from error

    async def pieces(self, question: Question, caller: Caller) -> AsyncGenerator[Piece]:
        """See :class:`limbeck.serve.openai.backend.Backend`."""
        if question.chat and not self.has_template:
            raise bad("messages", f"{self.name} has no chat template: use /v1/completions, or serve it with --chat-template plain, or with a file")
        if question.prompt == "":
            if self._first is None:
                raise bad("prompt", "is empty, and this model's tokenizer has no token that begins a text: send some text")
            question = replace(question, prompt=[self._first])
        loop = asyncio.get_running_loop()
        chunks: asyncio.Queue[Any] = asyncio.Queue()
        cut = threading.Event()

        def tell(thing: Any) -> bool:
            """Hand a thing over to the event loop; True stops llama.cpp."""
            if not cut.is_set():
                loop.call_soon_threadsafe(chunks.put_nowait, thing)
            return cut.is_set()

        work = loop.run_in_executor(self._pool, self._write, question, tell)
        try:
            gathering = _Gathering(question, self.context)
            while True:
                found = gathering.piece(await caller.wait_for(chunks.get()))
                if found is not None:
                    yield found
                if found is not None and found.finish is not None:
                    return
        finally:
            cut.set()
            # The place is free when llama.cpp has seen it, after the token or the part of the prompt that it is at.
            await asyncio.shield(work)

    def _write(self, question: Question, tell: Callable[[Any], bool]) -> None:
        handler = self._server.handle_chat_completions if question.chat else self._server.handle_completions
        try:
            handler({**_body(question), "timings_per_token": bool(self.context % PADDING)}, tell)
        except Exception as error:
            # Exceptions of C++ come as RuntimeError and ValueError; that of a template or a schema is the client's business.
            tell(Refusal(400, f"llama.cpp refuses this request: {str(error).strip()[:1000]}"))
        else:
            tell(None)

    def close(self, seconds: float) -> bool:
        """See :class:`limbeck.serve.openai.backend.Backend`."""
        # Its own threads end with what they are at; the caller has seen to it that nothing is asked any more.
        ending = threading.Thread(target=self._end, daemon=True)
        ending.start()
        ending.join(seconds)
        return not ending.is_alive()

    def _end(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._server = None
        shutil.rmtree(self._folder, ignore_errors=True)


def _body(question: Question) -> dict[str, Any]:
    """The request as llama.cpp's server knows it."""
    how = question.sampling
    body: dict[str, Any] = {
        **question.extra,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_progress": True,
        "max_tokens": question.max_tokens,
        "temperature": how.temperature,
        "top_k": how.top_k,
        "top_p": how.top_p,
        "min_p": how.min_p,
        "seed": how.seed,
        "samplers": SAMPLERS,
        "stop": list(question.stop),
    }
    if question.chat:
        body |= {"messages": question.messages}
        if question.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": max(1, question.logprobs)}
    else:
        body |= {"prompt": question.prompt}
        if question.logprobs is not None:
            body |= {"logprobs": max(1, question.logprobs)}
    return body


class _Gathering:
    """llama.cpp's chunks as pieces; its end and its usage come apart.

    Its own context may be longer than ``context``, which is kept here: by the prompt's length, and by the count in each chunk.
    """

    def __init__(self, question: Question, context: int):
        self._question, self._context = question, context
        self._finish: str | None = None
        self._prompt = 0

    def piece(self, chunk: Any) -> Piece | None:
        """The piece of a chunk; None for one that says nothing to a client."""
        if isinstance(chunk, Refusal):
            raise chunk
        if chunk is None:
            if self._finish is None:
                raise RuntimeError("llama.cpp ended an answer without saying why")
            return Piece(finish=self._finish)
        if "error" in chunk:
            raise _refusal(chunk["error"])
        progress = chunk.get("prompt_progress")
        if progress is not None:
            self._prompt = progress["total"]
            check_context(self._prompt, self._context)
        choice = (chunk.get("choices") or [{}])[0]
        self._finish = choice.get("finish_reason") or self._finish
        delta = choice.get("delta", {})
        text = choice.get("text") or delta.get("content") or ""
        more = {name: delta[name] for name in ("reasoning_content", "tool_calls") if delta.get(name)}
        scores = tuple(self._score(entry) for entry in (choice.get("logprobs") or {}).get("content", ()))
        usage = chunk.get("usage")
        if usage is not None and self._finish is not None:
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            return Piece(text, scores, more, self._finish, Usage(usage["prompt_tokens"], usage["completion_tokens"], cached))
        timings = chunk.get("timings") or {}
        written = timings.get("predicted_n", 0)
        if self._finish is None and written and self._prompt + written >= self._context:
            return Piece(text, scores, more, "length", Usage(self._prompt, written, timings.get("cache_n", 0)))
        return Piece(text, scores, more) if text or scores or more else None

    def _score(self, entry: Mapping[str, Any]) -> TokenScore:
        top = entry["top_logprobs"][: self._question.logprobs]
        return TokenScore(_likely(entry), tuple(_likely(other) for other in top))


def _likely(entry: Mapping[str, Any]) -> Likely:
    return Likely(entry["token"], tuple(entry["bytes"]), entry["logprob"])


def _refusal(error: Mapping[str, Any]) -> Refusal:
    if error.get("type") == "exceed_context_size_error":
        return too_long(error["n_prompt_tokens"], error["n_ctx"])
    status = error.get("code", 500)
    return Refusal(status if status in (400, 404, 413, 501, 503) else 500, f"llama.cpp: {error.get('message')}")
