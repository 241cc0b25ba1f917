"""What a trajectory is: a conversation of a system, a user, an agent and its tools, checked and with parsed arguments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

Reason = Literal[
    "not an object", "unknown format", "missing field", "wrong type", "truncated JSON", "undecodable", "nested too deep",
    "unknown role", "content is not text", "arguments not JSON", "arguments not an object", "unanswered call",
    "orphan tool answer", "no user turn", "no assistant turn", "empty task", "contradicting fields", "template",
    "special token in text", "unknown event", "damaged file"
]  # fmt: skip
"""Every reason for which reading a trajectory can fail."""


class Unusable(Exception):
    """A record that is no sound trajectory: ``reason`` is one of a few, so that they can be counted, ``detail`` says where and what."""

    def __init__(self, reason: Reason, detail: str):
        # What is found may be half a character, which no report can be written with.
        self.reason, self.detail = reason, detail.encode("utf-8", "backslashreplace").decode()
        super().__init__(f"{reason}: {self.detail}")


@dataclass(frozen=True)
class Trajectory:
    """One run of an agent.

    ``name`` is where it stood; ``messages`` as :func:`checked` gives them; ``tools`` in the form of a chat template.  ``resolved``:
    did it solve its task (None: the file does not say); ``exit_status``: ``submit``, or how else it ended; ``patch``: its change as
    a diff; ``issue``: the first user turn; ``base_commit``: of the repository that it found.
    """

    name: str
    instance_id: str
    repo: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    resolved: bool | None
    exit_status: str | None
    patch: str | None
    issue: str
    base_commit: str | None


def checked(messages: Any, where: str = "messages", places: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The turns with only the keys that belong to their role, and every call before the last turn's answered.

    system, user ``{role, content}``; assistant ``{role, content, tool_calls?, reasoning_content?}`` with ``arguments`` as a dict;
    tool ``{role, content, name?, tool_call_id?}``.  ``where`` is the name of the list in details, ``places`` those of its turns.

    Raises:
        Unusable: anything else.
    """
    if not isinstance(messages, list):
        fail("wrong type", where, f"a list of turns is needed, found {found(messages)}")
    if not messages:
        fail("no user turn", where, "the list is empty")
    places = places or [f"{where}[{i}]" for i in range(len(messages))]
    turns = [_turn(message, place) for message, place in zip(messages, places, strict=True)]
    _check_answers(turns, places)
    roles = {turn["role"] for turn in turns}
    lacking: tuple[tuple[str, Reason], ...] = (("user", "no user turn"), ("assistant", "no assistant turn"))
    for role, reason in lacking:
        if role not in roles:
            fail(reason, where, f"{len(turns)} turns of {', '.join(sorted(roles))}")
    if not first_user_turn(turns).strip():
        first = next(place for place, turn in zip(places, turns, strict=True) if turn["role"] == "user")
        fail("empty task", f"{first}.content", "the first user turn, which states the task, is blank")
    return turns


def first_user_turn(messages: Sequence[dict[str, Any]]) -> str:
    """The task: the content of the first user turn of checked messages."""
    return next(message["content"] for message in messages if message["role"] == "user")


def checked_tools(tools: Any, where: str = "tools") -> list[dict[str, Any]]:
    """Tool definitions without the keys whose value is null.

    Raises:
        Unusable: not a list of objects that each name a function.
    """
    if not isinstance(tools, list):
        fail("wrong type", where, f"a list of tools is needed, found {found(tools)}")
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            fail("not an object", f"{where}[{i}]", found(tool))
        function = tool.get("function", tool)
        if not isinstance(function, dict):
            fail("not an object", f"{where}[{i}].function", found(function))
        _name(function, f"{where}[{i}].function")
    # A parquet column has one struct type for all rows: each tool then has the fields of all, and null for those that are not its
    # own.  A template would print them.
    kept = [_without_nulls(tool) for tool in tools]
    encodable(kept, where)
    return kept


def fail(reason: Reason, where: str, words: str) -> NoReturn:
    """Raise :class:`Unusable` with the place first."""
    raise Unusable(reason, f"{where}: {words}")


def found(value: Any) -> str:
    """A value in the words of JSON, cut short."""
    if isinstance(value, dict):
        keys = ", ".join(str(key)[:40] for key in list(value)[:6])
        return f"an object of {keys}" if keys else "an empty object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}" + ("…" if len(value) > 40 else "")
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)[:40]


def text_or_none(holder: dict[str, Any], key: str, where: str) -> str | None:
    """A field that may be absent or null, and else is a text."""
    value = holder.get(key)
    if value is not None and not isinstance(value, str):
        fail("wrong type", where, f"a text is needed, found {found(value)}")
    return value


def encodable(tree: Any, where: str) -> None:
    """Refuse half a surrogate pair: JSON may spell one, an undecodable byte becomes one, and no tokenizer takes it."""
    try:
        json.dumps(tree, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        fail("undecodable", where, f"holds {error.object[error.start]!r}, which is no character")


def _turn(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        fail("not an object", where, found(message))
    if message.get("role") is None:
        fail("missing field", f"{where}.role", f"a turn has a role, found {found(message)}")
    role = message["role"]
    if role not in ("system", "user", "assistant", "tool"):
        fail("unknown role", f"{where}.role", f"{found(role)}; known are system, user, assistant and tool")
    if role == "assistant":
        turn = _assistant(message, where)
    else:
        if "content" not in message:
            fail("missing field", f"{where}.content", f"a turn of role {role} has a content")
        turn = {"role": role, "content": _content(message["content"], f"{where}.content")}
        if role == "tool":
            turn |= _labels(message, where)
    encodable(turn, where)
    return turn


def _assistant(message: dict[str, Any], where: str) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        fail("wrong type", f"{where}.tool_calls", f"a list of calls is needed, found {found(calls)}")
    if "content" not in message and not calls:
        fail("missing field", f"{where}.content", "an assistant turn has a content or tool_calls")
    content = message.get("content")
    turn: dict[str, Any] = {"role": "assistant", "content": "" if content is None else _content(content, f"{where}.content")}
    if calls:
        turn["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    if message.get("reasoning_content") is not None:
        turn["reasoning_content"] = _content(message["reasoning_content"], f"{where}.reasoning_content")
    return turn


def _content(content: Any, where: str) -> str:
    """A text, or the texts of a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        fail("content is not text", where, found(content))
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            fail("content is not text", f"{where}[{i}]", f"{{type: text, text}} is needed, found {found(part)}")
    return "".join(part["text"] for part in content)


def _call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        fail("not an object", where, found(call))
    if call.get("type") not in (None, "function"):
        fail("wrong type", f"{where}.type", f"only functions can be called, found {found(call['type'])}")
    function = call.get("function")
    if function is None:
        fail("missing field", f"{where}.function", f"a call names a function, found {found(call)}")
    if not isinstance(function, dict):
        fail("not an object", f"{where}.function", found(function))
    parsed = {"name": _name(function, f"{where}.function"), "arguments": _arguments(function, f"{where}.function.arguments")}
    return _label(call, "id", where) | {"type": "function", "function": parsed}


def _name(function: dict[str, Any], where: str) -> str:
    name = function.get("name")
    if name is None:
        fail("missing field", f"{where}.name", f"a function has a name, found {found(function)}")
    if not isinstance(name, str) or not name:
        fail("wrong type", f"{where}.name", f"a name is needed, found {found(name)}")
    return name


def _arguments(function: dict[str, Any], where: str) -> dict[str, Any]:
    arguments = function.get("arguments")
    if arguments is None:
        fail("missing field", where, "a call has arguments, {} if there are none")
    if isinstance(arguments, str):
        try:
            # Null stays: it is what the model wrote.
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            fail("arguments not JSON", where, f"{error}, in {found(arguments)}")
    if not isinstance(arguments, dict):
        fail("arguments not an object", where, found(arguments))
    return arguments


def _labels(message: dict[str, Any], where: str) -> dict[str, Any]:
    return _label(message, "name", where) | _label(message, "tool_call_id", where)


def _label(holder: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """``{key: text}``, or nothing where it is absent or null."""
    value = text_or_none(holder, key, f"{where}.{key}")
    return {} if value is None else {key: value}


def _check_answers(turns: list[dict[str, Any]], places: Sequence[str]) -> None:
    """Pair answers with the calls of the assistant turn before them; ids may be used again by a later turn."""
    caller, waiting = "", list[dict[str, Any]]()
    for place, turn in zip(places, turns, strict=True):
        if turn["role"] == "assistant":
            if waiting:
                names = ", ".join(_title(call) for call in waiting)
                fail("unanswered call", f"{caller}.tool_calls", f"no answer to {names} before the next assistant turn, {place}")
            caller, waiting = place, list(turn.get("tool_calls", ()))
        elif turn["role"] == "tool":
            answered = _answered(turn, waiting)
            if answered is None:
                asked = ", ".join(_title(call) for call in waiting) or "no call"
                fail("orphan tool answer", place, f"answers {_title(turn)}, but {asked} waits for an answer")
            waiting.pop(answered)


def _answered(turn: dict[str, Any], waiting: list[dict[str, Any]]) -> int | None:
    """Which of the waiting calls: the one with the id; the first, where one of the two has none."""
    wanted = turn.get("tool_call_id")
    exact = (i for i, call in enumerate(waiting) if wanted is not None and call.get("id") == wanted)
    loose = (i for i, call in enumerate(waiting) if wanted is None or "id" not in call)
    return next(exact, next(loose, None))


def _title(turn: dict[str, Any]) -> str:
    """A call or an answer in words."""
    name = turn.get("function", turn).get("name", "a call")
    label = turn.get("id", turn.get("tool_call_id"))
    return name if label is None else f"{name} ({label})"


def _without_nulls(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_nulls(value) for key, value in tree.items() if value is not None}
    return [_without_nulls(value) for value in tree] if isinstance(tree, list) else tree
