"""Model folders by transformers: token by token, the answers under way by turns, in one thread.

Each turn is one token of one answer (or the whole of its prompt), so that a long answer never holds up a short one by more.  With a
LoRA generator the conversation's condition, its first user turn, makes the adapter, once; the last ones are kept.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from starlette.requests import ClientDisconnect
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.evaluation.decode import Draw, draws
from limbeck.evaluation.samples import end_ids
from limbeck.serve.openai.backend import Caller, Likely, Piece, TokenScore, Usage
from limbeck.serve.openai.questions import Question, bad, check_context
from limbeck.serve.openai.spoken import BROKEN, Spoken
from limbeck.serve.refusals import Refusal
from limbeck.serve.worker import Worker

Acting = Callable[[], AbstractContextManager]
"""Entered around each step of a model: within, an adapter acts."""
TAKES = frozenset(("tools", "chat_template_kwargs"))


class Adapting(Protocol):
    """Makes adapters of conditions."""

    def ids(self, text: str) -> tuple[int, ...]:
        """What it would read of a condition; :class:`LimbeckError` for what it cannot read."""
        ...

    def acting(self, ids: tuple[int, ...]) -> Acting:
        """The state in which the model writes with the adapter of a condition."""
        ...


@dataclass(frozen=True)
class Speaker:
    """A model in evaluation mode and its tokenizer; ``adapting`` is a LoRA generator for it, ``acting`` a state for all answers."""

    model: Any
    tokenizer: Any
    adapting: Adapting | None = None
    acting: Acting = nullcontext


class TransformersBackend:
    """A speaker.  ``context`` None: what the model was made for; ``adapters`` is how many conversations' LoRAs are kept."""

    takes = TAKES

    def __init__(self, speaker: Speaker, name: str, *, context: int | None = None, adapters: int = 16):
        config = speaker.model.config.get_text_config(decoder=True)
        made_for = getattr(config, "max_position_embeddings", None)
        if context is not None and made_for is not None and context > made_for:
            raise LimbeckError(f"--context {context}: {name} was made for {made_for}: ask for that or less")
        self.name = name
        self.context = context or made_for or 4096
        self._rows = int(speaker.model.get_input_embeddings().weight.shape[0])
        self.vocabulary = min(len(speaker.tokenizer), self._rows)
        self.worker = Worker(1)
        self._speaker = speaker
        self._ends = end_ids(speaker.model, speaker.tokenizer)
        self._adapters: OrderedDict[tuple[int, ...], Acting] = OrderedDict()
        self._most = adapters

    async def pieces(self, question: Question, caller: Caller) -> AsyncGenerator[Piece]:
        """See :class:`limbeck.serve.openai.backend.Backend`."""
        try:
            answer = await self.worker.run(lambda: self._begin(question), caller.receive)
            while True:
                # Queueing for every token anew is what gives each answer its turn.
                piece = await self.worker.run(answer.step, caller.receive)
                if piece.text or piece.scores or piece.finish is not None:
                    yield piece
                if piece.finish is not None:
                    return
        except ClientDisconnect:
            raise caller.end() from None

    def close(self, seconds: float) -> bool:
        """See :class:`limbeck.serve.openai.backend.Backend`."""
        self.worker.close()
        return self.worker.join(seconds)

    def _begin(self, question: Question) -> _Answer:
        ids = self._ids(question)
        check_context(len(ids), self.context)
        if max(ids) >= self._rows:
            raise bad("messages" if question.chat else "prompt", f"its token {max(ids)} is beyond the {self._rows} that {self.name} has embeddings for")
        acting = self._acting(question)
        ids_1T = torch.tensor([ids], device=self._speaker.model.device)
        tokens = min(question.max_tokens, self.context - len(ids))
        drawn = draws(self._speaker.model, ids_1T, tokens=tokens, sampling=question.sampling, acting=acting)
        spoken = Spoken(self._speaker.tokenizer, question.stop, ids)
        return _Answer(drawn, spoken, self._speaker.tokenizer, self._ends, tokens, len(ids), question.logprobs)

    def _ids(self, question: Question) -> list[int]:
        tokenizer = self._speaker.tokenizer
        if question.messages is not None:
            return self._chat_ids(question.messages, question)
        ids = question.prompt if isinstance(question.prompt, list) else list(tokenizer(question.prompt).input_ids)
        if not ids and tokenizer.bos_token_id is not None:
            return [tokenizer.bos_token_id]
        if not ids:
            raise bad("prompt", "is empty, and this model's tokenizer has no token that begins a text: send some text")
        return ids

    def _chat_ids(self, messages: list[dict[str, Any]], question: Question) -> list[int]:
        tokenizer = self._speaker.tokenizer
        if tokenizer.chat_template is None:
            raise bad("messages", f"{self.name} has no chat template: use /v1/completions, or serve it with --chat-template plain, or with a file")
        try:
            text = tokenizer.apply_chat_template(
                [_parsed(message) for message in messages],
                tools=question.extra.get("tools"),
                add_generation_prompt=True,
                tokenize=False,
                return_dict=False,
                **question.extra.get("chat_template_kwargs", {}),
            )
        except Exception as error:
            # Templates are programs of the model's own, and fail in their own ways on what they do not expect.
            raise bad("messages", f"the chat template of {self.name} refuses them: {str(error)[:500]}") from None
        ids = list(tokenizer(text, add_special_tokens=False).input_ids)
        if not ids:
            raise bad("messages", f"the chat template of {self.name} makes nothing of them")
        return ids

    def _acting(self, question: Question) -> Acting:
        """The state in which this conversation is answered; a condition that was met lately has its adapter still."""
        adapting = self._speaker.adapting
        if adapting is None:
            return self._speaker.acting
        try:
            ids = adapting.ids(self._condition(question))
        except LimbeckError as error:
            raise Refusal(400, f"the LoRA generator cannot read this conversation's first user turn: {error}") from None
        if ids not in self._adapters:
            self._adapters[ids] = adapting.acting(ids)
            if len(self._adapters) > self._most:
                self._adapters.popitem(last=False)
        self._adapters.move_to_end(ids)
        return self._adapters[ids]

    def _condition(self, question: Question) -> str:
        if question.messages is None:
            return question.prompt if isinstance(question.prompt, str) else self._speaker.tokenizer.decode(question.prompt or [])
        for message in question.messages:
            if message["role"] == "user":
                return message["content"]
        raise bad("messages", "hold no user's turn, which is what the LoRA generator reads: send one")


class _Answer:
    """One answer under way."""

    def __init__(
        self, drawn: Iterator[Draw], spoken: Spoken, tokenizer: Any, ends: set[int], tokens: int, prompt: int, logprobs: int | None
    ):
        self._drawn, self._spoken, self._tokenizer, self._ends = drawn, spoken, tokenizer, ends
        self._tokens, self._prompt, self._logprobs = tokens, prompt, logprobs
        self._written = 0

    def step(self) -> Piece:
        """One more token."""
        with torch.no_grad():
            token, logits_V = next(self._drawn)
        self._written += 1
        if token in self._ends:
            return self._last(self._spoken.end(), "stop")
        score = None if self._logprobs is None else score_of(token, logits_V, self._logprobs, self._tokenizer)
        piece = self._spoken.add(token, score)
        if self._spoken.stopped:
            return self._last(piece, "stop")
        if self._written < self._tokens:
            return piece
        rest = self._spoken.end()
        both = Piece(piece.text + rest.text, piece.scores + rest.scores)
        return self._last(both, "stop" if self._spoken.stopped else "length")

    def _last(self, piece: Piece, finish: str) -> Piece:
        return replace(piece, finish=finish, usage=Usage(self._prompt, self._written))


def score_of(token: int, logits_V: Tensor, count: int, tokenizer: Any) -> TokenScore:
    """A token's log-probability and those of the ``count`` likeliest ids, from logits ``[V]``."""
    log_probabilities_V = logits_V.log_softmax(-1)
    values_K, ids_K = log_probabilities_V.topk(min(count, len(log_probabilities_V)))
    top = zip(ids_K.tolist(), values_K.tolist(), strict=True)
    own = _likely(token, float(log_probabilities_V[token]), tokenizer)
    return TokenScore(own, tuple(_likely(i, value, tokenizer) for i, value in top))


def _likely(token: int, value: float, tokenizer: Any) -> Likely:
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # JSON knows no infinities.
    return Likely(text, None if BROKEN in text else tuple(text.encode()), max(value, -9999.0))


def _parsed(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: OpenAI's arguments of a call are a string, theirs an object."""
    calls: Sequence[dict[str, Any]] = message.get("tool_calls") or ()
    if not calls:
        return message
    return {**message, "tool_calls": [{**call, "function": {**call["function"], "arguments": _arguments(call["function"])}} for call in calls]}


def _arguments(function: dict[str, Any]) -> Any:
    given = function.get("arguments")
    if not isinstance(given, str):
        return given or {}
    try:
        return json.loads(given)
    except ValueError:
        return given
