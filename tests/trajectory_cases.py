"""Sound records of each format of agents' runs, to be changed by tests."""

from __future__ import annotations

from dataclasses import replace

from limbeck.data.trajectories.formats import trajectory_of
from limbeck.data.trajectories.trajectory import Trajectory


def call(name: str, label: str | None, arguments: object = '{"path": "a.py", "line": null}') -> dict:
    return {"index": None, "type": "function", "function": {"name": name, "arguments": arguments}} | (
        {} if label is None else {"id": label}
    )


def row(**changes: object) -> dict:
    """A sound row with two calls in one turn, as a data set of one struct type for all turns has it."""
    none = {"tool_calls": None, "tool_call_id": None, "name": None, "function_call": None}
    return {
        "trajectory_id": "run-1",
        "instance_id": "octo__cat-12",
        "repo": "octo/cat",
        "trajectory": [
            {"role": "system", "content": "You are an agent.", **none},
            {"role": "user", "content": "The cat does not purr.", **none},
            {"role": "assistant", "content": None, **none, "tool_calls": [call("view", "c1"), call("run", "c2", '{"command": "ls"}')]},
            {"role": "tool", "content": "a.py", **none, "name": "run", "tool_call_id": "c2"},
            {"role": "tool", "content": "def purr(): pass", **none, "name": "view", "tool_call_id": "c1"},
            {"role": "assistant", "content": "Done.", **none, "tool_calls": [call("finish", "c3", "{}")]},
        ],
        "tools": [
            {"type": "function", "function": {"name": "view", "parameters": {"type": "object", "default": None, "items": None}}},
            {"type": "function", "function": {"name": "run", "description": None, "parameters": {"enum": [None, "ls"]}}},
        ],
        "resolved": 1,
        "exit_status": "submit",
        "model_patch": "diff --git a b",
    } | changes


def made(**changes: object) -> Trajectory:
    return replace(trajectory_of(row(), "made"), **changes)


def event(number: int, **parts: object) -> dict:
    return {"id": number, "source": "agent", "message": "", **parts}


def stream(**changes: object) -> dict:
    """A sound event stream: two actions of one response, a response that was no call, and a finish."""
    both = [call("view", "t1"), call("run", "t2", '{"command": "ls"}')]
    first = {"id": "r1", "choices": [{"message": {"role": "assistant", "content": "Look.", "tool_calls": both}}]}
    last = {"id": "r2", "choices": [{"message": {"role": "assistant", "content": "", "tool_calls": [call("finish", "t3", "{}")]}}]}

    def metadata(response: dict, label: str, name: str, total: int) -> dict:
        return {"tool_call_id": label, "function_name": name, "model_response": response, "total_calls_in_response": total}

    shell = {"exit_code": 2, "prefix": "[before]", "suffix": "[after]", "working_dir": "/work", "py_interpreter_path": "/bin/python"}
    tools = [{"type": "function", "function": {"name": "view"}}]
    history = [
        event(0, action="system", args={"content": "You are an agent.", "tools": tools}),
        event(1, source="user", action="message", args={"content": "The cat does not purr."}),
        event(2, source="user", action="recall", args={"query": "cat"}),
        event(3, source="environment", observation="recall", content="Added workspace context"),
        event(4, action="read", args={"path": "a.py"}, tool_call_metadata=metadata(first, "t1", "view", 2)),
        event(5, observation="error", content="No such file", tool_call_metadata=metadata(first, "t1", "view", 2)),
        event(6, action="run", args={"command": "ls"}, tool_call_metadata=metadata(first, "t2", "run", 2)),
        event(7, observation="run", content="b.py", extras={"metadata": shell}, tool_call_metadata=metadata(first, "t2", "run", 2)),
        event(8, observation="error", content="Unknown tool", extras={"error_id": ""}),
        event(9, action="finish", args={"thought": "Done."}, tool_call_metadata=metadata(last, "t3", "finish", 1)),
    ]
    return {"instance_id": "octo__cat-12", "history": history, "error": None, "test_result": {"git_patch": "diff"}} | changes


def swe_agent(**changes: object) -> dict:
    """A sound SWE-agent run with a demonstration before it."""
    history = [
        {"role": "system", "content": [{"type": "text", "text": "You are "}, {"type": "text", "text": "an agent."}], "agent": "main"},
        {"role": "user", "content": "This is a demonstration.", "is_demo": True},
        {"role": "user", "content": "ISSUE:\nThe cat does not purr.\n\nINSTRUCTIONS:\nMend it."},
        {"role": "assistant", "content": "Look.", "thought": "Look.", "action": "ls", "tool_calls": [call("bash", "s1", "{}")]},
        {"role": "tool", "content": "a.py", "tool_call_ids": ["s1"]},
        {"role": "assistant", "content": "Hand in.", "tool_calls": [call("submit", "s1", {"force": None})]},
    ]
    return {"history": history, "info": {"exit_status": "submitted (exit_cost)", "submission": "diff"}} | changes
