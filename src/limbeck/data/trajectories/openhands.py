"""An OpenHands event stream -> the turns that its model saw.

Events are actions (of the agent or the user) and observations.  An agent's action carries ``tool_call_metadata`` with the model's
whole response; an observation that answers a call carries the same.  Facts of the format: OpenHands 0.35 to 0.54,
``openhands/memory/conversation_memory.py`` and ``openhands/events/observation``.
"""

from __future__ import annotations

from typing import Any

from limbeck.data.trajectories.trajectory import checked_tools, fail, found, text_or_none

QUIET = frozenset({"recall", "change_agent_state", "null", "condensation", "condensation_request", "pause", "resume", "stop", "start"})
"""Actions that say nothing to the model."""


class EventTurns:
    """The turns of a stream, not yet checked: ``messages``, the place of each, the tools, and the agent's last action."""

    def __init__(self, history: list[Any]):
        self.messages: list[dict[str, Any]] = []
        self.places: list[str] = []
        self.tools: list[dict[str, Any]] = []
        self.last_action = ""
        self._response: Any = None
        self._started: set[str] = set()
        for i, event in enumerate(history):
            place = f"history[{i}]"
            if not isinstance(event, dict):
                fail("not an object", place, found(event))
            action, observation = (text_or_none(event, key, f"{place}.{key}") for key in ("action", "observation"))
            if action is not None:
                self._act(action, event, place)
            elif observation is not None:
                self._observe(observation, event, place)
            else:
                fail("missing field", place, f"an event is an action or an observation, found {found(event)}")

    def _add(self, place: str, message: dict[str, Any]) -> None:
        self.messages.append(message)
        self.places.append(place)

    def _act(self, action: str, event: dict[str, Any], place: str) -> None:
        if action in QUIET:
            return
        source = text_or_none(event, "source", f"{place}.source")
        if source == "agent":
            self.last_action = action
        if event.get("tool_call_metadata") is not None:
            self._call(_object(event, "tool_call_metadata", place), f"{place}.tool_call_metadata")
        elif action == "system":
            arguments = _object(event, "args", place)
            self._add(place, {"role": "system", "content": arguments.get("content")})
            if arguments.get("tools") is not None:
                self.tools = checked_tools(arguments["tools"], f"{place}.args.tools")
        elif action in ("message", "finish"):
            if source not in ("user", "agent"):
                fail("missing field", f"{place}.source", f"who says it, user or agent? found {found(source)}")
            arguments = _object(event, "args", place)
            words = arguments.get("content" if action == "message" else "thought")
            self._add(place, {"role": "user" if source == "user" else "assistant", "content": words})
        elif source == "agent":
            needed = f"the model's response is needed for the agent's action {action!r}: a stream with function calling has it"
            fail("missing field", f"{place}.tool_call_metadata", needed)
        else:
            fail("unknown event", place, f"an action {action!r} of {found(source)} is no turn that is known")

    def _call(self, metadata: dict[str, Any], place: str) -> None:
        """The turn of a response, once for all the actions that come from it."""
        response, label = _object(metadata, "model_response", place), metadata.get("tool_call_id")
        choices = response.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            fail("missing field", f"{place}.model_response.choices", f"one choice with a message is needed, found {found(choices)}")
        where = f"{place}.model_response.choices[0]"
        message = _object(choices[0], "message", where)
        where = f"{where}.message"
        calls = message.get("tool_calls")
        labels = [call.get("id") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
        if message.get("role") != "assistant":
            fail("contradicting fields", f"{where}.role", f"a model answers as assistant, found {found(message.get('role'))}")
        if not isinstance(label, str) or label not in labels:
            fail("contradicting fields", f"{where}.tool_calls", f"tool_call_id {found(label)} is not among the calls of the response")
        total = metadata.get("total_calls_in_response")
        if total is not None and total != len(labels):
            fail("contradicting fields", f"{where}.tool_calls", f"{len(labels)} calls, total_calls_in_response says {found(total)}")
        # A provider that numbers neither its responses nor its calls may give the same answer twice.
        if response != self._response or label in self._started:
            self._response, self._started = response, set()
            self._add(where, message)
        self._started.add(label)

    def _observe(self, observation: str, event: dict[str, Any], place: str) -> None:
        metadata = event.get("tool_call_metadata")
        if metadata is not None:
            metadata = _object(event, "tool_call_metadata", place)
            label = metadata.get("tool_call_id")
            if label is None:
                fail("missing field", f"{place}.tool_call_metadata.tool_call_id", "an answer names its call")
            words = _shown(observation, event, place)
            self._add(place, {"role": "tool", "content": words, "name": metadata.get("function_name"), "tool_call_id": label})
        elif observation == "error":
            # A response that was no valid call is not kept, but what the model was told about it is: the next turn answers that.
            self._add(place, {"role": "user", "content": _shown(observation, event, place)})


def _object(holder: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value, place = holder.get(key), f"{where}.{key}"
    if value is None:
        fail("missing field", place, f"an object is needed, found {found(holder)}")
    if not isinstance(value, dict):
        fail("not an object", place, found(value))
    return value


def _shown(observation: str, event: dict[str, Any], place: str) -> Any:
    """An observation's content with the lines that OpenHands adds before its model reads it."""
    content = event.get("content")
    if not isinstance(content, str):
        fail("missing field" if content is None else "content is not text", f"{place}.content", found(content))
    if observation == "error":
        return f"{content}\n[Error occurred in processing last action]"
    extras = event.get("extras")
    shell = extras.get("metadata") if isinstance(extras, dict) else None
    if observation != "run" or not isinstance(shell, dict):
        return content
    words = {
        key: text_or_none(shell, key, f"{place}.extras.metadata.{key}") or ""
        for key in ("prefix", "suffix", "working_dir", "py_interpreter_path")
    }
    code = shell.get("exit_code", -1)
    lines = [words["prefix"] + content + words["suffix"]]
    lines += [f"[Current working directory: {words['working_dir']}]"] if words["working_dir"] else []
    lines += [f"[Python interpreter: {words['py_interpreter_path']}]"] if words["py_interpreter_path"] else []
    lines += [f"[Command finished with exit code {code}]"] if code != -1 else []
    return "\n".join(lines)
