"""What is asked of ``limbeck serve``, checked field by field before the model sees it."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from limbeck.errors import did_you_mean
from limbeck.evaluation.sampling import Sampling
from limbeck.serve.refusals import Refusal

COMMON = (
    "model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stream", "stream_options", "n", "logprobs",
)  # fmt: skip
OWN = {True: ("messages", "max_completion_tokens", "top_logprobs"), False: ("prompt", "echo", "best_of", "suffix")}
"""Fields of a chat (True) and of a plain completion (False) alone."""
EXTRA = {
    "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "tools": [], "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True, False), "response_format": {"type": "text"}, "chat_template_kwargs": {}, "reasoning_effort": None,
}  # fmt: skip
"""Fields that some backends know, and the values that mean nothing and are let pass by all."""
IGNORED = ("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
"""Fields about the client's account, which change no answer."""
TEMPLATE_OWN = frozenset((
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "self",
))  # fmt: skip
"""Names of ``chat_template_kwargs`` that are no variables of a template: a template of the client's own would be a program that runs here."""
ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_STOP, MAX_STOP_LENGTH, MAX_TOP_LOGPROBS, MAX_MESSAGES = 16, 256, 20, 4096
MAX_ALTERNATIVES, MAX_REPEATS = 1000, 2000
"""Of a JSON schema; more of either can hold up the grammar's making, and with it everybody, for minutes."""
_REPEATED = re.compile(r"(.)\{(?:\d*,)?(\d+)\}")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for: ``max_tokens`` to write, of a model that is called ``model`` and ids below ``vocabulary``."""

    model: str
    max_tokens: int
    vocabulary: int
    takes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Question:
    """A checked request; either ``messages`` or ``prompt``.

    ``max_tokens`` None means as many as the context has room for.  ``logprobs`` is how many of the likeliest go with each token (0:
    the token's own alone; None: none at all).  ``extra`` are fields for the backend that takes them.
    """

    messages: list[dict[str, Any]] | None
    prompt: str | list[int] | None
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    stream: bool = False
    usage_in_stream: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def chat(self) -> bool:
        """Whether it is a chat."""
        return self.messages is not None


def question(body: Mapping[str, Any], limits: Limits, *, chat: bool) -> Question:
    """The question in a body; :class:`Refusal` names the field that is wrong, and how."""
    _check_characters(body)
    _known(body, limits, chat)
    most = _number(body, "max_tokens", 1, math.inf, None, whole=True)
    if chat:
        newer = _number(body, "max_completion_tokens", 1, math.inf, None, whole=True)
        most = most if newer is None else newer
    if most is not None and most > limits.max_tokens:
        name = "max_completion_tokens" if chat and body.get("max_completion_tokens") is not None else "max_tokens"
        raise bad(name, f"{_show(most)} is more than the {limits.max_tokens} that this server writes in one answer (--max-tokens)")
    count = body.get("n")
    if count is not None and (type(count) is not int or count != 1):
        raise bad("n", f"{_show(count)} answers to one request: this server gives 1; send the request several times, with other seeds")
    stream = _flag(body, "stream")
    return Question(
        messages=_messages(body) if chat else None,
        prompt=None if chat else _prompt(body, limits),
        max_tokens=limits.max_tokens if most is None else int(most),
        sampling=_sampling(body),
        stop=_stop(body),
        logprobs=_logprobs(body, chat),
        stream=stream,
        usage_in_stream=_stream_options(body, stream),
        extra=_extra(body, limits),
    )


def bad(path: str, what: str, *, status: int = 400, code: str | None = None) -> Refusal:
    """A refusal that names a field, with OpenAI's ``param`` and ``code``."""
    return Refusal(status, f"{path}: {what}", param=path, code=code)


def check_context(prompt: int, context: int) -> None:
    """Refuse a prompt that leaves no room for an answer."""
    if prompt >= context:
        raise too_long(prompt, context)


def too_long(prompt: int, context: int) -> Refusal:
    """The refusal of a prompt for its length."""
    return Refusal(
        400,
        f"the prompt has {prompt} tokens, and the context of {context} must hold it and at least one more: send less, or start the server "
        "with a larger --context",
        param="messages",
        code="context_length_exceeded",
    )


def _check_characters(body: Mapping[str, Any]) -> None:
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply") from None
    except UnicodeEncodeError as error:
        raise Refusal(400, f"the body holds half a character ({error.object[error.start]!r}): send whole ones") from None


def _known(body: Mapping[str, Any], limits: Limits, chat: bool) -> None:
    """Refuse unknown fields, another model, and what this backend cannot do."""
    known = (*COMMON, *OWN[chat], *EXTRA, *IGNORED)
    for name in body:
        if name not in known:
            raise bad(str(name)[:100], f"unknown field{did_you_mean(str(name), known) or '; there are ' + ', '.join(known)}")
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise bad("model", f"must be a string, not {_show(model)}")
    if model is not None and model != limits.model:
        raise bad("model", f"{_show(model)} is not served here, {limits.model!r} is", status=404, code="model_not_found")
    for name, neutral in EXTRA.items():
        value = body.get(name)
        nothing = value is None or value == neutral or (isinstance(neutral, tuple) and value in neutral)
        if not nothing and name not in limits.takes:
            raise bad(name, f"{_show(value)} is nothing that this model's backend can do: leave it out, or serve a GGUF file")
    if not chat:
        for name, allowed in (("echo", (False,)), ("best_of", (1,)), ("suffix", ("",))):
            if body.get(name) is not None and body[name] not in allowed:
                raise bad(name, f"{_show(body[name])} is not supported: leave it out")


def _sampling(body: Mapping[str, Any]) -> Sampling:
    temperature = _number(body, "temperature", 0, 2, 1.0)
    top_p = _number(body, "top_p", 0, 1, 1.0)
    top_k = _number(body, "top_k", -1, 2**31 - 1, 0, whole=True)
    min_p = _number(body, "min_p", 0, 1, 0.0)
    seed = _number(body, "seed", -(2**63), 2**63 - 1, None, whole=True)
    assert temperature is not None and top_p is not None and top_k is not None and min_p is not None
    # llama.cpp's seeds have 32 bits, of which the largest means "any".
    number = secrets.randbelow(2**32 - 1) if seed is None else int(seed) % (2**32 - 1)
    return Sampling(float(temperature), max(0, int(top_k)), float(top_p), float(min_p), number)


def _stop(body: Mapping[str, Any]) -> tuple[str, ...]:
    value = body.get("stop")
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or len(values) > MAX_STOP:
        raise bad("stop", f"must be a string, or a list of at most {MAX_STOP}")
    for i, text in enumerate(values):
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise bad(f"stop[{i}]", f"must be a string of 1 to {MAX_STOP_LENGTH} characters, not {_show(text)}")
    return tuple(values)


def _logprobs(body: Mapping[str, Any], chat: bool) -> int | None:
    if not chat:
        count = _number(body, "logprobs", 0, MAX_TOP_LOGPROBS, None, whole=True)
        return None if count is None else int(count)
    top = _number(body, "top_logprobs", 0, MAX_TOP_LOGPROBS, None, whole=True)
    if not _flag(body, "logprobs"):
        if top:
            raise bad("top_logprobs", "asks for log-probabilities without `logprobs: true`: send both")
        return None
    return int(top or 0)


def _stream_options(body: Mapping[str, Any], stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise bad("stream_options", f"must be an object, not {_show(options)}")
    if not stream:
        raise bad("stream_options", "is for `stream: true` alone: leave it out")
    for name in options:
        if name not in ("include_usage", "include_obfuscation"):
            raise bad(f"stream_options.{str(name)[:100]}", "unknown field; there is include_usage")
    return _flag(options, "include_usage")


def _extra(body: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Fields that the backend takes, each of the form that OpenAI gives it: what a backend would not understand it might pass over."""
    for name in ("frequency_penalty", "presence_penalty"):
        _number(body, name, -2, 2, None)
    _flag(body, "parallel_tool_calls")
    _check_bias(_object(body, "logit_bias"), limits.vocabulary)
    _check_choice(body.get("tool_choice"), _tool_names(body.get("tools")))
    _check_format(_object(body, "response_format"))
    for name in _object(body, "chat_template_kwargs"):
        if name in TEMPLATE_OWN:
            raise bad(f"chat_template_kwargs.{name}", "is the server's business: variables of the model's own template alone can be set")
    effort = body.get("reasoning_effort")
    if effort is not None and not isinstance(effort, str):
        raise bad("reasoning_effort", f"must be a string, not {_show(effort)}")
    return {name: body[name] for name in EXTRA if name in limits.takes and body.get(name) is not None}


def _object(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise bad(name, f"must be an object, not {_show(value)}")
    return value or {}


def _check_bias(bias: Mapping[str, Any], vocabulary: int) -> None:
    for token in bias:
        if not token.isascii() or not token.isdecimal() or len(token) > 10 or int(token) >= vocabulary:
            raise bad("logit_bias", f"{_show(token)} is no token id of a vocabulary of {vocabulary}")
        if _number(bias, token, -100, 100, None, path=f"logit_bias.{token}") is None:
            raise bad(f"logit_bias.{token}", "must be a number, not None")


def _tool_names(tools: Any) -> list[str]:
    if tools is not None and not isinstance(tools, list):
        raise bad("tools", f"must be a list, not {_show(tools)}")
    for i, tool in enumerate(tools or ()):
        if not isinstance(tool, dict) or tool.get("type") != "function" or not _are_calls([tool]):
            raise bad(f"tools[{i}]", 'must be {"type": "function", "function": {"name", "description", "parameters"}}')
        if not isinstance(tool["function"].get("parameters", {}), dict):
            raise bad(f"tools[{i}].function.parameters", f"must be a JSON schema, not {_show(tool['function']['parameters'])}")
        if reason := _too_much(tool["function"].get("parameters", {})):
            raise bad(f"tools[{i}].function.parameters", reason)
    return [tool["function"]["name"] for tool in tools or ()]


def _check_choice(choice: Any, names: list[str]) -> None:
    if choice is None or choice in ("auto", "none"):
        return
    named = isinstance(choice, dict) and _are_calls([choice])
    if choice != "required" and not named:
        raise bad("tool_choice", f'must be auto, none, required, or {{"type": "function", "function": {{"name"}}}}, not {_show(choice)}')
    if not names or (named and choice["function"]["name"] not in names):
        raise bad("tool_choice", f"chooses what is not among the {len(names)} `tools`: send it there")


def _check_format(form: Mapping[str, Any]) -> None:
    if not form:
        return
    if form.get("type") not in ("text", "json_object", "json_schema"):
        raise bad("response_format.type", f"{_show(form.get('type'))} is not one of text, json_object, json_schema")
    schema = form.get("json_schema")
    if form["type"] == "json_schema" and not (isinstance(schema, dict) and isinstance(schema.get("schema"), dict)):
        raise bad("response_format.json_schema", 'must be {"name": "...", "schema": {...}}')
    if form["type"] == "json_schema" and (reason := _too_much(form["json_schema"]["schema"])):
        raise bad("response_format.json_schema.schema", reason)


def _too_much(schema: Any) -> str | None:
    """Why a schema would hold up everybody: a grammar is made of it, whose size is what its alternatives and repetitions multiply to."""
    left, alternatives = [schema], 0
    while left:
        node = left.pop()
        if isinstance(node, dict):
            alternatives += sum(len(node[name]) for name in ("enum", "anyOf", "oneOf") if isinstance(node.get(name), list))
            pattern = node.get("pattern")
            counts = [node[name] for name in ("maxItems", "minItems", "maxLength", "minLength") if isinstance(node.get(name), int)]
            if isinstance(pattern, str):
                found = [(before, int(count[:9])) for before, count in _REPEATED.findall(pattern)]
                # Groups may stand in each other, where their counts multiply.
                grouped = math.prod(count for before, count in found if before == ")")
                counts.append(max(grouped, 1) * max([1, *(count for before, count in found if before != ")")]))
            if max(counts, default=0) > MAX_REPEATS:
                return f"repeats something {max(counts)} times: at most {MAX_REPEATS} are taken"
            left.extend(node.values())
        elif isinstance(node, list):
            left.extend(node)
    return f"has {alternatives} alternatives: at most {MAX_ALTERNATIVES} are taken" if alternatives > MAX_ALTERNATIVES else None


def _prompt(body: Mapping[str, Any], limits: Limits) -> str | list[int]:
    value = body.get("prompt")
    if value is None:
        raise bad("prompt", "is missing: send a string, or a list of token ids")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise bad("prompt", f"must be a string, or a list of token ids, not {_show(value)}")
    if len(value) > 1 and all(isinstance(one, str | list) for one in value):
        raise bad("prompt", f"{len(value)} prompts in one request: this server takes 1; send one request for each")
    for i, token in enumerate(value):
        if type(token) is not int or not 0 <= token < limits.vocabulary:
            raise bad(f"prompt[{i}]", f"{_show(token)} is no token id of a vocabulary of {limits.vocabulary}")
    return value


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    values = body.get("messages")
    if values is None:
        raise bad("messages", 'is missing: send a list such as [{"role": "user", "content": "..."}]')
    if not isinstance(values, list) or not 1 <= len(values) <= MAX_MESSAGES:
        raise bad("messages", f"must be a list of 1 to {MAX_MESSAGES} messages")
    return [_message(f"messages[{i}]", value) for i, value in enumerate(values)]


def _message(path: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad(path, f"must be an object with role and content, not {_show(value)}")
    role = value.get("role")
    if role not in ROLES:
        raise bad(f"{path}.role", f"{_show(role)} is not one of {', '.join(ROLES)}")
    calls = value.get("tool_calls")
    if calls is not None and (role != "assistant" or not _are_calls(calls)):
        raise bad(f"{path}.tool_calls", 'must be a list of {"function": {"name", "arguments"}}, in an assistant\'s message')
    content = value.get("content")
    if content is None and not calls:
        raise bad(f"{path}.content", "is missing")
    return {**value, "content": "" if content is None else _text(f"{path}.content", content)}


def _are_calls(calls: Any) -> bool:
    return isinstance(calls, list) and all(
        isinstance(call, dict) and isinstance(call.get("function"), dict) and isinstance(call["function"].get("name"), str) for call in calls
    )


def _text(path: str, content: Any) -> str:
    """A message's text, from a string or from parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad(path, f"must be a string, or a list of parts of type text, not {_show(content)}")
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise bad(f"{path}[{i}]", f'a part of type {_show(kind)}: this model reads {{"type": "text", "text": "..."}} alone')
    return "".join(part["text"] for part in content)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad(name, f"must be true or false, not {_show(value)}")
    return bool(value)


def _number(
    body: Mapping[str, Any], name: str, low: float, high: float, default: float | None, *, whole: bool = False, path: str | None = None
) -> float | int | None:
    value, path = body.get(name), path or name
    if value is None:
        return default
    if type(value) not in ((int,) if whole else (int, float)):
        raise bad(path, f"must be a {'whole ' if whole else ''}number, not {_show(value)}")
    # A number such as 1e999 is an infinity to Python.
    if not low <= value <= high or (isinstance(value, float) and not math.isfinite(value)):
        raise bad(path, f"{_show(value)} is not from {low:g} to {high:g}" if high < math.inf else f"{_show(value)} is below {low:g}")
    return value


def _show(value: Any) -> str:
    """A value in a message, cut; a number with thousands of digits is no use there (and Python refuses to write it)."""
    if type(value) is int and abs(value) >= 10**20:
        return "a number of more than twenty digits"
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    return f"{value!r:.60}"
