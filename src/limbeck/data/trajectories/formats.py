"""A record of a file -> a trajectory; which format it is in is seen by its fields.

========== ============================================= ========================================================================
format     told by                                       resolved and exit_status
========== ============================================= ========================================================================
rows       ``trajectory`` or ``messages``                the columns ``resolved`` and ``exit_status`` (SWE-rebench-openhands)
SWE-agent  ``history`` of turns with a ``role``          both from ``info.exit_status``: one that starts with ``submitted`` is
                                                         ``submit`` and resolved (the file holds no verdict of tests)
OpenHands  ``history`` of events                         ``resolved`` of ``report``, of ``test_result.report`` or of the record;
                                                         ``submit`` without ``error`` and with ``finish`` or words at the end
========== ============================================= ========================================================================
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

from limbeck.data.trajectories.openhands import EventTurns
from limbeck.data.trajectories.trajectory import (
    Trajectory,
    checked,
    checked_tools,
    encodable,
    fail,
    first_user_turn,
    found,
    text_or_none,
)

SUBMIT = "submit"
"""The exit status of a run whose agent handed its work in."""
_INSTANCE = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*)__([A-Za-z0-9._-]+)-\d+")
_FILE = re.compile(r"(.*?)(?:\.(?:traj|jsonl?|ndjson|parquet))?(?:\.gz)?((?:\[\d+\]|:\d+)?)", re.DOTALL)
"""A file's stem, and the place of a record in it."""
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


def trajectory_of(record: Any, name: str) -> Trajectory:
    """The trajectory in a record; ``name`` is where it stood (``file.jsonl:3``).

    Raises:
        Unusable: a record of no known format, or one that is not sound.
    """
    try:
        trajectory = _trajectory(record, name)
        encodable([trajectory.instance_id, trajectory.repo, trajectory.exit_status, trajectory.patch], "the record")
        return trajectory
    except RecursionError:
        fail("nested too deep", "the record", "lists and objects inside each other by the hundred")


def repo_of(instance_id: str) -> str | None:
    """``owner/repo`` of an id ``owner__repo-123``."""
    match = _INSTANCE.fullmatch(instance_id)
    return f"{match[1]}/{match[2]}" if match else None


def _trajectory(record: Any, name: str) -> Trajectory:
    if not isinstance(record, dict):
        fail("not an object", "the record", found(record))
    history = record.get("history")
    if isinstance(history, list):
        keys = {key for event in history if isinstance(event, dict) for key in event}
        if "role" in keys:
            return _of_swe_agent(record, name)
        if keys & {"action", "observation", "source"}:
            return _of_events(record, name)
        fail("unknown format", "history", f"{found(history)}, neither turns with a role nor events with an action or observation")
    for key in ("trajectory", "messages"):
        if record.get(key) is not None:
            return _of_row(record, key, name)
    if history is not None:
        fail("wrong type", "history", f"a list of turns or events is needed, found {found(history)}")
    known = "history (SWE-agent, OpenHands) or trajectory or messages (rows)"
    fail("unknown format", "the record", f"one of {known} is needed, found {found(record)}")


def _of_row(record: dict[str, Any], key: str, name: str) -> Trajectory:
    messages = checked(_parsed(record[key], key), key)
    tools = _parsed(record.get("tools"), "tools")
    if tools is None and any("tool_calls" in message for message in messages):
        fail("missing field", "tools", "the turns call tools, and the record does not say which there are")
    instance_id = _instance_id(record)
    return Trajectory(
        name=name,
        instance_id=instance_id,
        repo=_repo(record, instance_id, "repo"),
        messages=messages,
        tools=[] if tools is None else checked_tools(tools),
        resolved=_verdict(record.get("resolved"), "resolved"),
        exit_status=text_or_none(record, "exit_status", "exit_status"),
        patch=text_or_none(record, "model_patch", "model_patch"),
        issue=first_user_turn(messages),
        base_commit=_commit(record),
    )


def _of_swe_agent(record: dict[str, Any], name: str) -> Trajectory:
    turns, places = [], []
    for i, message in enumerate(record["history"]):
        if isinstance(message, dict):
            if message.get("is_demo") is True:
                continue
            message = _with_call_id(message, f"history[{i}]")
        turns.append(message)
        places.append(f"history[{i}]")
    messages = checked(turns, "history", places)
    config = record.get("replay_config")
    config = _parsed(config, "replay_config") if isinstance(config, str) else config
    info = record.get("info")
    if info is not None and not isinstance(info, dict):
        fail("not an object", "info", found(info))
    info = info or {}
    status = text_or_none(info, "exit_status", "info.exit_status")
    submitted = status is not None and status.startswith("submitted")
    instance_id = _instance_of_file(record, config, name)
    return Trajectory(
        name=name,
        instance_id=instance_id,
        repo=repo_of(instance_id) or instance_id,
        messages=messages,
        tools=checked_tools(record["tools"]) if record.get("tools") is not None else [],
        resolved=None if status is None else submitted,
        exit_status=SUBMIT if submitted else status,
        patch=text_or_none(info, "submission", "info.submission"),
        issue=first_user_turn(messages),
        base_commit=_commit(_inside(config, "env", "repo")),
    )


def _with_call_id(message: dict[str, Any], place: str) -> dict[str, Any]:
    """``tool_call_ids: [id]``, as SWE-agent has it, as ``tool_call_id``."""
    ids = message.get("tool_call_ids")
    if ids is None:
        return message
    if not isinstance(ids, list) or len(ids) > 1:
        fail("wrong type", f"{place}.tool_call_ids", f"an answer belongs to one call, found {found(ids)}")
    return message | {"tool_call_id": ids[0] if ids else None}


def _instance_of_file(record: dict[str, Any], config: Any, name: str) -> str:
    """The record's own id, else one of the form ``owner__repo-1`` in the file's name or in the replayed problem, else the file's stem."""
    own = text_or_none(record, "instance_id", "instance_id")
    if own:
        return own
    last = name.rsplit("/", 1)[-1]
    match = _FILE.fullmatch(last)
    file, place = match.groups() if match else (last, "")
    # Prefixes of an experiment stand before the id, so the last pair is the one.
    parts = file.split("__")
    pairs = [f"{owner}__{repo}" for owner, repo in pairwise(parts)]
    replayed = _inside(config, "problem_statement").get("id")
    found_ids = [pair for pair in reversed(pairs) if repo_of(pair)] + [replayed]
    return next((one for one in found_ids if isinstance(one, str) and repo_of(one)), file + place)


def _of_events(record: dict[str, Any], name: str) -> Trajectory:
    stream = EventTurns(record["history"])
    messages = checked(stream.messages, "history", stream.places)
    instance = _inside(record, "instance")
    instance_id = _instance_id(instance if record.get("instance_id") is None else record)
    error = (text_or_none(record, "error", "error") or "").strip()
    spoken = messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
    ended = SUBMIT if stream.last_action == "finish" or spoken else "unfinished"
    return Trajectory(
        name=name,
        instance_id=instance_id,
        repo=_repo(record if record.get("repo") is not None else instance, instance_id, "instance.repo"),
        messages=messages,
        tools=stream.tools,
        resolved=_reported(record),
        exit_status=error.splitlines()[0] if error else ended,
        patch=text_or_none(_inside(record, "test_result"), "git_patch", "test_result.git_patch"),
        issue=first_user_turn(messages),
        base_commit=_commit(instance),
    )


def _reported(record: dict[str, Any]) -> bool | None:
    """The verdict of the first report there is."""
    for path in (("report",), ("test_result", "report"), ()):
        value = _inside(record, *path).get("resolved")
        if value is not None:
            return _verdict(value, ".".join([*path, "resolved"]))
    return None


def _inside(tree: Any, *keys: str) -> dict[str, Any]:
    """The object at the end of a path; an empty one where the path ends early."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


def _parsed(value: Any, where: str) -> Any:
    """A column that holds JSON as text, or the value itself."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        fail("truncated JSON", where, f"{error}, in {found(value)}")


def _instance_id(record: dict[str, Any]) -> str:
    value = text_or_none(record, "instance_id", "instance_id")
    if not value or not value.strip():
        fail("missing field", "instance_id", f"the id of the task is needed, found {found(record.get('instance_id'))}")
    return value


def _repo(record: dict[str, Any], instance_id: str, where: str) -> str:
    repo = text_or_none(record, "repo", where) or repo_of(instance_id)
    if not repo or not repo.strip():
        fail("missing field", where, f"owner/repo is needed, or an instance_id owner__repo-123 that tells; found {found(instance_id)}")
    return repo


def _verdict(value: Any, where: str) -> bool | None:
    # A column of numbers has NaN where it has no value.
    if value is None or value != value:
        return None
    if value in (0, 1):
        return bool(value)
    fail("wrong type", where, f"true, false, 1 or 0 is needed, found {found(value)}")


def _commit(record: dict[str, Any]) -> str | None:
    """A hash; SWE-agent writes HEAD where nobody named one."""
    value = record.get("base_commit")
    return value if isinstance(value, str) and _COMMIT.fullmatch(value) else None
