"""Tool calls as the text that an assistant writes: reading them, where their parts stand, and how right a model's are.

Three ways of writing, told apart by the text itself:

* ``<tool_call>\\n<function=NAME>\\n<parameter=KEY>\\nVALUE\\n</parameter>\\n</function>\\n</tool_call>`` (Qwen3-Coder): values are text;
* ``<tool_call>\\n{"name": NAME, "arguments": {...}}\\n</tool_call>`` (Hermes, as in Qwen2.5, Qwen3 and QwQ);
* ``{"name": NAME, "parameters": {...}}`` as the whole turn (Llama 3.2).

What stands before ``</think>`` is thought, and a call in it is none.  A call that begins and is no whole call is counted as malformed.
A text never raises.  No model and no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np

Span = tuple[int, int]
"""First character, and the one behind the last."""

_MARK = re.compile(r"<tool_call>|</think>")
_BLOCK_END = re.compile(r"\s*</tool_call>")
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>")
_FUNCTION_END = re.compile(r"\s*(</function>)\s*</tool_call>")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?")
# A value may speak of parameters itself: it ends where another parameter, or the end of the call, really follows.
_VALUE_END = re.compile(r"\n?</parameter>(?=\s*<parameter=[^>\n]+>|\s*</function>\s*</tool_call>)")
_BARE = re.compile(r"\s*(?:<\|python_tag\|>\s*)?(?=\{)")
_BARE_BEGUN = re.compile(r'\{\s*"name"\s*:\s*"[^"]*"\s*,\s*"parameters"\s*:')
_ONLY_MARKERS = re.compile(r"(?:\s|<\|[^|<>]*\|>)*\Z")
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool."""

    name: str
    arguments: dict[str, Any]
    """Of a key that was written twice the last value, as JSON has it."""
    as_text: bool = field(default=False, compare=False)
    """Whether the values are text because their way of writing has no types."""


class CallSpans(NamedTuple):
    """Where the parts of a call stand in a turn: exactly they, a JSON string without its quotes."""

    name: Span
    keys: list[Span]
    values: list[Span]
    """Of the same arguments as ``keys``, in the order in which they were first written."""
    close: Span
    """What ends the arguments: ``</function>``, or the closing brace."""


@dataclass(frozen=True)
class Reading:
    """What was found in a turn; ``calls`` and ``spans`` belong together."""

    calls: list[ToolCall]
    spans: list[CallSpans]
    malformed: int
    """Calls that were begun and are none."""


class _Found(NamedTuple):
    call: ToolCall
    spans: CallSpans
    end: int


class _Member(NamedTuple):
    """A member of a JSON object."""

    key: str
    value: Any
    key_span: Span
    value_span: Span


def read_calls(text: str) -> Reading:
    """Everything about the calls of an assistant's turn (without its header; markers such as ``<|im_end|>`` may follow it)."""
    whole = _whole_turn(text)
    if whole is not None:
        return whole
    found: list[_Found] = []
    broken, at = 0, 0
    thinking = text.lstrip().startswith("<think>")
    while mark := _MARK.search(text, at):
        at = mark.end()
        if mark[0] == "</think>":
            found, broken, thinking = [], 0, False
        elif call := _xml_call(text, at) or _block_call(text, at):
            found.append(call)
            at = call.end
        else:
            broken += 1
    return Reading([], [], 0) if thinking else Reading([one.call for one in found], [one.spans for one in found], broken)


def _xml_call(text: str, at: int) -> _Found | None:
    head = _FUNCTION.match(text, at)
    if head is None:
        return None
    at = head.end()
    arguments: dict[str, tuple[Span, Span]] = {}
    while key := _PARAMETER.match(text, at):
        end = _VALUE_END.search(text, key.end())
        if end is None:
            return None
        arguments[key[1]] = key.span(1), (key.end(), end.start())
        at = end.end()
    tail = _FUNCTION_END.match(text, at)
    if tail is None:
        return None
    call = ToolCall(head[1], {key: text[slice(*value)] for key, (_, value) in arguments.items()}, as_text=True)
    spans = CallSpans(head.span(1), [key for key, _ in arguments.values()], [value for _, value in arguments.values()], tail.span(1))
    return _Found(call, spans, tail.end())


def _block_call(text: str, at: int) -> _Found | None:
    found = _json_call(text, _skip(text, at), "arguments")
    tail = None if found is None else _BLOCK_END.match(text, found.end)
    return None if found is None or tail is None else found._replace(end=tail.end())


def _whole_turn(text: str) -> Reading | None:
    """A turn that is one bare object and nothing else; None if it does not begin as a call does."""
    head = _BARE.match(text)
    if head is None:
        return None
    found = _json_call(text, head.end(), "parameters")
    if found is not None and _ONLY_MARKERS.match(text, found.end):
        return Reading([found.call], [found.spans], 0)
    return Reading([], [], 1) if _BARE_BEGUN.match(text, head.end()) else None


def _json_call(text: str, at: int, arguments_key: str) -> _Found | None:
    """The call whose object begins at ``at``."""
    try:
        outer, end = _members(text, at)
        named = {member.key: member for member in outer}
        name, arguments = named["name"], named[arguments_key]
        if not isinstance(name.value, str) or not name.value or not isinstance(arguments.value, dict):
            return None
        inner, _ = _members(text, arguments.value_span[0])
    except (ValueError, KeyError, RecursionError):
        return None
    last = {member.key: member for member in inner}
    call = ToolCall(name.value, {key: member.value for key, member in last.items()})
    close = arguments.value_span[1]
    spans = CallSpans(name.value_span, [m.key_span for m in last.values()], [m.value_span for m in last.values()], (close - 1, close))
    return _Found(call, spans, end)


def _members(text: str, at: int) -> tuple[list[_Member], int]:
    """Members of the JSON object that begins at ``at``, and where it ends; ValueError for anything else."""
    _expect(text, at, "{")
    members: list[_Member] = []
    at = _skip(text, at + 1)
    if text.startswith("}", at):
        return members, at + 1
    while True:
        key, key_end = _DECODER.raw_decode(text, at)
        if not isinstance(key, str):
            raise ValueError("a key is no string")
        start = _skip(text, _expect(text, _skip(text, key_end), ":"))
        value, end = _DECODER.raw_decode(text, start)
        inner = (start + 1, end - 1) if isinstance(value, str) else (start, end)
        members.append(_Member(key, value, (at + 1, key_end - 1), inner))
        at = _skip(text, end)
        if text.startswith("}", at):
            return members, at + 1
        at = _skip(text, _expect(text, at, ","))


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    assert space is not None
    return space.end()


def _expect(text: str, at: int, sign: str) -> int:
    if not text.startswith(sign, at):
        raise ValueError(f"no {sign} at {at}")
    return at + len(sign)


# -- how right a call is ---------------------------------------------------------------------------------------------------


def written(value: Any) -> str:
    """An argument as Qwen3-Coder's template writes it: objects and lists as JSON, anything else by ``str``."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | tuple) else str(value)


def same_value(a: Any, b: Any) -> bool:
    """Whether two arguments are the same where values are text: 3 and ``"3"`` are."""
    return written(a) == written(b)


def _same_json(a: Any, b: Any) -> bool:
    """Whether two arguments are the same JSON, whatever the order of keys: 1, 1.0, true and ``"1"`` are four values."""
    try:
        return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    except RecursionError:
        return False


@dataclass(frozen=True)
class CallScore:
    """Counts over turns; they add up.  The calls of a turn are matched by their place in it."""

    turns: int = 0
    counted: int = 0
    """Turns whose number of calls was looked at: none under teacher forcing."""
    right_number: int = 0
    """Of those, the ones with as many calls as wanted."""
    malformed: int = 0
    calls: int = 0
    """Wanted calls; what follows is counted among them."""
    name: int = 0
    """The name is right."""
    keys: int = 0
    """The set of argument keys is right: none is missing, none too many."""
    all_values: int = 0
    """Every wanted value is right."""
    exact: int = 0
    """Name, keys and every value are right."""
    wanted_values: int = 0
    values: int = 0
    """Wanted values that are right."""

    def __add__(self, other: CallScore) -> CallScore:
        """Counts of both."""
        return CallScore(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def rates(self) -> dict[str, float]:
        """Shares between 0 and 1; what had nothing to be counted among is left out."""
        shares = {
            "number": (self.right_number, self.counted),
            **{part: (getattr(self, part), self.calls) for part in ("name", "keys", "all_values", "exact")},
            "values": (self.values, self.wanted_values),
        }
        return {name: count / of for name, (count, of) in shares.items() if of}


def compare(wanted: Sequence[ToolCall], found: Sequence[ToolCall], *, malformed: int = 0) -> CallScore:
    """How right the calls of one turn are.  Values are compared as text where either call is written in a way without types."""
    score = CallScore(turns=1, counted=1, right_number=int(len(wanted) == len(found)), malformed=malformed)
    for place, call in enumerate(wanted):
        score += _compared(call, found[place] if place < len(found) else None)
    return score


def _compared(wanted: ToolCall, found: ToolCall | None) -> CallScore:
    if found is None:
        return CallScore(calls=1, wanted_values=len(wanted.arguments))
    same = same_value if wanted.as_text or found.as_text else _same_json
    right = [key in found.arguments and same(value, found.arguments[key]) for key, value in wanted.arguments.items()]
    return _judged(wanted.name == found.name, wanted.arguments.keys() == found.arguments.keys(), right)


def _judged(name: bool, keys: bool, values: Sequence[bool]) -> CallScore:
    """Counts of one wanted call."""
    return CallScore(
        calls=1, name=int(name), keys=int(keys), all_values=int(all(values)), exact=int(name and keys and all(values)),
        wanted_values=len(values), values=int(sum(values)),
    )  # fmt: skip


# -- teacher forcing -------------------------------------------------------------------------------------------------------


def forced_calls(wanted_ids_T: np.ndarray, argmax_ids_T: np.ndarray, tokenizer: Any) -> CallScore:
    """Which parts of a turn's calls a model would have written, each after the true text before it.

    Args:
        wanted_ids_T: the true token ids of an assistant's turn.
        argmax_ids_T: the model's most likely token in each of these places.

    Raises:
        ValueError: the two are not of one length.
    """
    wanted_ids_T, argmax_ids_T = np.asarray(wanted_ids_T), np.asarray(argmax_ids_T)
    if wanted_ids_T.shape != argmax_ids_T.shape or wanted_ids_T.ndim != 1:
        raise ValueError(f"true and predicted ids must be two rows of one length; found shapes {wanted_ids_T.shape} and {argmax_ids_T.shape}")
    text, offsets_T2 = token_offsets(wanted_ids_T, tokenizer)
    return forced_score(read_calls(text).spans, offsets_T2, wanted_ids_T == argmax_ids_T)


def forced_score(spans: Sequence[CallSpans], offsets_T2: np.ndarray, right_T: np.ndarray) -> CallScore:
    """Counts of one turn from where its tokens stand (``[T, 2]`` characters, in order) and which of them were predicted.

    A part is right when every token is that holds a character of it *or the first character behind it*: a model that would have gone
    on (``ls -l`` for ``ls``) did not predict it.  The keys are right when each is, and so is the end of the arguments: none would follow.
    """
    score = CallScore(turns=1)
    for call in spans:
        parts_M2 = np.array([call.name, call.close, *call.keys, *call.values], dtype=np.int64)
        name, close, *rest = _all_right(parts_M2, np.asarray(offsets_T2).reshape(-1, 2), np.asarray(right_T, dtype=bool)).tolist()
        keys, values = rest[: len(call.keys)], rest[len(call.keys) :]
        score += _judged(name, close and all(keys), values)
    return score


def _all_right(parts_M2: np.ndarray, offsets_T2: np.ndarray, right_T: np.ndarray) -> np.ndarray:
    """Whether all tokens of each part are right, bool ``[M]``; a part without a token is not."""
    first_M = np.searchsorted(offsets_T2[:, 1], parts_M2[:, 0], side="right")
    behind_M = np.searchsorted(offsets_T2[:, 0], parts_M2[:, 1] + 1, side="left")
    wrong = np.concatenate([[0], np.cumsum(~right_T)])
    return (behind_M > first_M) & (wrong[np.maximum(behind_M, first_M)] == wrong[first_M])


def token_offsets(ids_T: np.ndarray, tokenizer: Any) -> tuple[str, np.ndarray]:
    """The text of token ids and the characters of each token in it, int64 ``[T, 2]``; these ids are never tokenised anew.

    Tokens that share a character have all the characters that they spell together.  Only in ids that break off inside a character may
    the end of the text differ from what the tokenizer makes of them at once.
    """
    ids = np.asarray(ids_T).tolist()
    offsets_T2 = np.zeros((len(ids), 2), dtype=np.int64)
    pieces: list[str] = []
    # Some tokenizers write a first token differently: what is new is seen behind the tokens before it.
    before, start, length = 0, 0, 0
    context = ""
    for at in range(len(ids)):
        together = _decoded(ids[before : at + 1], tokenizer)
        if together.endswith("\ufffd") and at + 1 < len(ids):
            continue
        new = together[len(context) :]
        pieces.append(new)
        offsets_T2[start : at + 1] = length, length + len(new)
        length += len(new)
        before, start = start, at + 1
        context = _decoded(ids[before:start], tokenizer)
    return "".join(pieces), offsets_T2


def _decoded(ids: list[int], tokenizer: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
