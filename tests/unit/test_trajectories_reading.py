"""What is read of agents' runs, and what is refused and why."""

from __future__ import annotations

import copy
import gzip
import json
import random
from collections import Counter
from dataclasses import replace
from typing import get_args

import pytest

from limbeck.config.parts.trajectories import TrajectoryHubOptions
from limbeck.data.trajectories.filters import statement, why_not
from limbeck.data.trajectories.formats import repo_of, trajectory_of
from limbeck.data.trajectories.reading import local_files, raw_rows
from limbeck.data.trajectories.trajectory import Reason, Unusable, checked
from limbeck.errors import DataError
from trajectory_cases import call, event, made, row, stream, swe_agent


def refusal(record: object, name: str = "made") -> Unusable:
    with pytest.raises(Unusable) as caught:
        trajectory_of(record, name)
    return caught.value


# -- real files --------------------------------------------------------------------------------------------------------


def test_every_shipped_run_is_read(shared_data):
    folder = shared_data / "trajectories"
    if not folder.is_dir():
        pytest.skip("needs the runs in ../shared/data/trajectories, which are not there")
    runs = {name: trajectory_of(record, name) for name, record in raw_rows([str(folder)], None, folder)}
    facts = {
        name: (t.instance_id, t.repo, len(t.messages), len(t.tools), t.resolved, t.exit_status, bool(t.patch)) for name, t in runs.items()
    }
    replay = "replay__marshmallow-code__marshmallow-1867__function_calling"
    marshmallow = ("marshmallow-code__marshmallow-1867", "marshmallow-code/marshmallow")
    limit = "RuntimeError: Agent reached maximum iteration in headless mode. Current iteration: 50, max iteration: 50"
    assert facts == {
        "function_calling_simple.traj": ("function_calling_simple", "function_calling_simple", 12, 0, None, None, False),
        "openhands_events_3runs.jsonl:1": ("ponylang__ponyc-4595", "ponylang/ponyc", 47, 4, None, "submit", True),
        "openhands_events_3runs.jsonl:2": ("ponylang__ponyc-4593", "ponylang/ponyc", 68, 4, None, "submit", True),
        "openhands_events_3runs.jsonl:3": ("ponylang__ponyc-4588", "ponylang/ponyc", 101, 4, None, limit, True),
        "openhands_messages_3rows.jsonl:1": ("python__mypy-15976", "python/mypy", 41, 3, True, "submit", True),
        "openhands_messages_3rows.jsonl:2": ("Project-MONAI__MONAI-5686", "Project-MONAI/MONAI", 23, 3, True, "submit", True),
        "openhands_messages_3rows.jsonl:3": ("Project-MONAI__MONAI-6849", "Project-MONAI/MONAI", 26, 3, True, "submit", True),
        f"{replay}__install-1__marshmallow-code__marshmallow-1867.traj": (*marshmallow, 24, 0, True, "submit", True),
        f"{replay}_replace__install-1__marshmallow-code__marshmallow-1867.traj": (*marshmallow, 24, 0, True, "submit", True),
        f"{replay}_replace_from_source__marshmallow-code__marshmallow-1867.traj": (*marshmallow, 28, 0, True, "submit", True),
    }
    calls = [c["function"] for t in runs.values() for m in t.messages for c in m.get("tool_calls", ())]
    assert len(calls) == 186 and all(isinstance(c["arguments"], dict) for c in calls)
    starts = {statement(t.issue).strip().partition("\n")[0] for t in runs.values()}
    assert "TimeDelta serialization precision" in starts and "Incorrect aliasing of iso when using match" in starts


# -- what a sound record becomes ---------------------------------------------------------------------------------------


def test_only_the_keys_of_a_role_stay_and_arguments_are_parsed():
    messages = trajectory_of(row(), "made").messages
    assert messages[1] == {"role": "user", "content": "The cat does not purr."}
    assert messages[2] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            # A null that the model wrote stays.
            {"id": "c1", "type": "function", "function": {"name": "view", "arguments": {"path": "a.py", "line": None}}},
            {"id": "c2", "type": "function", "function": {"name": "run", "arguments": {"command": "ls"}}},
        ],
    }
    assert messages[3] == {"role": "tool", "content": "a.py", "name": "run", "tool_call_id": "c2"}
    assert trajectory_of(row(trajectory=[*row()["trajectory"][:5], {"role": "assistant", "content": "x", "reasoning_content": "y"}]), "").messages[
        -1
    ] == {"role": "assistant", "content": "x", "reasoning_content": "y"}


def test_nulls_that_a_parquet_column_adds_to_tools_are_gone(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    tools = [{"type": "function", "function": {"name": "view", "range": [1]}}, {"type": "function", "function": {"name": "run", "safe": True}}]
    pq.write_table(pa.Table.from_pylist([row(tools=tools)]), tmp_path / "rows.parquet")
    ((name, record),) = raw_rows(["rows.parquet"], None, tmp_path)
    assert record["tools"][1]["function"] == {"name": "run", "range": None, "safe": True}
    assert name == "rows.parquet[0]" and trajectory_of(record, name).tools == tools
    # A null in a list is a value, not an absent field.
    assert trajectory_of(row(), "made").tools[1]["function"] == {"name": "run", "parameters": {"enum": [None, "ls"]}}


def test_columns_as_json_text_and_under_the_other_name_give_the_same():
    expected = trajectory_of(row(), "made")
    text = row(trajectory=json.dumps(row()["trajectory"]), tools=json.dumps(row()["tools"]))
    other = row(messages=row()["trajectory"])
    del other["trajectory"]
    assert trajectory_of(text, "made") == expected == trajectory_of(other, "made")


def test_a_swe_agent_run_says_how_it_ended_and_its_file_what_it_was_about():
    run = trajectory_of(swe_agent(), "runs/gpt-4__v-2__octo__cat-12.traj")
    assert (run.instance_id, run.repo, run.resolved, run.exit_status, run.patch) == ("octo__cat-12", "octo/cat", True, "submit", "diff")
    assert run.messages[0]["content"] == "You are an agent." and len(run.messages) == 5
    assert statement(run.issue) == "The cat does not purr."
    assert run.messages[3] == {"role": "tool", "content": "a.py", "tool_call_id": "s1"}
    lost = trajectory_of(swe_agent(info={"exit_status": "exit_cost", "submission": None}), "tries.jsonl:7")
    assert (lost.instance_id, lost.repo, lost.resolved, lost.exit_status, lost.patch) == ("tries:7", "tries:7", False, "exit_cost", None)
    config = {"problem_statement": {"id": "octo__cat-13"}, "env": {"repo": {"base_commit": "0123abc"}}}
    for form in (config, json.dumps(config)):
        run = trajectory_of(swe_agent(replay_config=form), "x.traj")
        assert (run.instance_id, run.base_commit) == ("octo__cat-13", "0123abc")
    config["env"]["repo"]["base_commit"] = "HEAD"
    assert trajectory_of(swe_agent(replay_config=config), "x.traj").base_commit is None
    plain = [{"role": "user", "content": "Mend it."}, {"role": "assistant", "content": "```\nls\n```"}, {"role": "user", "content": "a.py"}]
    assert trajectory_of({"history": plain}, "old.traj").messages == plain


def test_an_event_stream_becomes_what_its_model_saw():
    run = trajectory_of(stream(), "made")
    assert [m["role"] for m in run.messages] == ["system", "user", "assistant", "tool", "tool", "user", "assistant"]
    assert [c["id"] for c in run.messages[2]["tool_calls"]] == ["t1", "t2"]
    assert run.messages[3] == {
        "role": "tool",
        "content": "No such file\n[Error occurred in processing last action]",
        "name": "view",
        "tool_call_id": "t1",
    }
    assert run.messages[4]["content"] == (
        "[before]b.py[after]\n[Current working directory: /work]\n[Python interpreter: /bin/python]\n[Command finished with exit code 2]"
    )
    assert run.messages[5]["content"].startswith("Unknown tool\n")
    assert run.tools == [{"type": "function", "function": {"name": "view"}}]
    assert (run.repo, run.patch, run.resolved, run.exit_status) == ("octo/cat", "diff", None, "submit")
    assert trajectory_of(stream(error="Stuck.\nAt line 3"), "made").exit_status == "Stuck."
    assert trajectory_of(stream(history=stream()["history"][:9]), "made").exit_status == "unfinished"
    words_last = [*stream()["history"][:9], event(9, action="message", args={"content": "Done."})]
    assert trajectory_of(stream(history=words_last), "made").exit_status == "submit"
    assert trajectory_of(stream(report={"resolved": True}), "made").resolved is True
    assert trajectory_of(stream(test_result={"git_patch": "", "report": {"resolved": False}}), "made").resolved is False


def test_equal_responses_without_an_id_are_turns_of_their_own():
    history = stream()["history"]
    for part in history:
        if "tool_call_metadata" in part:
            part["tool_call_metadata"]["model_response"].pop("id", None)
    again = trajectory_of(stream(history=[*history[:8], *copy.deepcopy(history[4:8]), *history[8:]]), "made")
    assert Counter(m["role"] for m in again.messages) == {"system": 1, "user": 2, "assistant": 3, "tool": 4}


def test_answers_pair_with_calls_by_id_and_by_count_where_ids_are_missing():
    ask, end = {"role": "user", "content": "go"}, {"role": "assistant", "content": "done"}
    nameless = [ask, {"role": "assistant", "tool_calls": [call("a", None), call("b", None)]}]
    answer = {"role": "tool", "content": "x"}
    assert len(checked([*nameless, answer, answer, end])) == 5
    for wrong, reason in (([answer], "unanswered call"), ([answer] * 3, "orphan tool answer")):
        with pytest.raises(Unusable) as caught:
            checked([*nameless, *wrong, end])
        assert caught.value.reason == reason
    # An id may come again in a later turn, and the last turn's calls may stay open.
    turn = [{"role": "assistant", "content": "", "tool_calls": [call("a", "same")]}, {**answer, "tool_call_id": "same"}]
    assert len(checked([ask, *turn, *turn, turn[0]])) == 6


# -- what is refused ---------------------------------------------------------------------------------------------------


def set_at(path: str, value: object):
    """A mutation: the value at a dotted path, or without it where the value is ``...``."""

    def mutate(record: dict) -> dict:
        *way, last = [int(step) if step.isdigit() else step for step in path.split(".")]
        holder = record
        for step in way:
            holder = holder[step]
        if value is ...:
            del holder[last]
        else:
            holder[last] = value
        return record

    return mutate


ROW_MUTATIONS = {
    "no turns": (set_at("trajectory", ...), "unknown format", "the record"),
    "turns null": (set_at("trajectory", None), "unknown format", "the record"),
    "turns empty": (set_at("trajectory", []), "no user turn", "trajectory"),
    "turns a number": (set_at("trajectory", 3), "wrong type", "trajectory"),
    "turns cut": (set_at("trajectory", '[{"role": "user", "cont'), "truncated JSON", "trajectory"),
    "turn a text": (set_at("trajectory.1", "hello"), "not an object", "trajectory[1]"),
    "no role": (set_at("trajectory.1.role", ...), "missing field", "trajectory[1].role"),
    "unknown role": (set_at("trajectory.1.role", "ai"), "unknown role", "trajectory[1].role"),
    "role a list": (set_at("trajectory.1.role", ["user"]), "unknown role", "trajectory[1].role"),
    "no content": (set_at("trajectory.1.content", ...), "missing field", "trajectory[1].content"),
    "content null": (set_at("trajectory.1.content", None), "content is not text", "trajectory[1].content"),
    "content a number": (set_at("trajectory.3.content", 7), "content is not text", "trajectory[3].content"),
    "content an image": (set_at("trajectory.1.content", [{"type": "image_url"}]), "content is not text", "trajectory[1].content[0]"),
    "half a character": (set_at("trajectory.1.content", "\ud83d"), "undecodable", "trajectory[1]"),
    "blank task": (set_at("trajectory.1.content", " \n"), "empty task", "trajectory[1].content"),
    "no user": (set_at("trajectory.1.role", "system"), "no user turn", "trajectory"),
    "no assistant": (lambda record: record | {"trajectory": record["trajectory"][:2]}, "no assistant turn", "trajectory"),
    "assistant of nothing": (set_at("trajectory.5", {"role": "assistant"}), "missing field", "trajectory[5].content"),
    "calls a text": (set_at("trajectory.2.tool_calls", "ls"), "wrong type", "trajectory[2].tool_calls"),
    "call a text": (set_at("trajectory.2.tool_calls.1", "ls"), "not an object", "trajectory[2].tool_calls[1]"),
    "call without function": (set_at("trajectory.2.tool_calls.1.function", ...), "missing field", "trajectory[2].tool_calls[1].function"),
    "call of another kind": (set_at("trajectory.2.tool_calls.1.type", "custom"), "wrong type", "trajectory[2].tool_calls[1].type"),
    "call without name": (set_at("trajectory.2.tool_calls.0.function.name", ...), "missing field", "trajectory[2].tool_calls[0].function.name"),
    "call id a number": (set_at("trajectory.2.tool_calls.0.id", 4), "wrong type", "trajectory[2].tool_calls[0].id"),
    "no arguments": (set_at("trajectory.2.tool_calls.0.function.arguments", ...), "missing field", "trajectory[2].tool_calls[0].function.arguments"),
    "arguments cut": (set_at("trajectory.2.tool_calls.0.function.arguments", '{"path": "a'), "arguments not JSON", "trajectory[2].tool_calls[0]"),
    "arguments deep": (set_at("trajectory.2.tool_calls.0.function.arguments", "[" * 10**5), "arguments not JSON", "trajectory[2].tool_calls[0]"),
    "arguments a list": (set_at("trajectory.2.tool_calls.0.function.arguments", "[1]"), "arguments not an object", "trajectory[2].tool_calls[0]"),
    "answer missing": (set_at("trajectory.4", ...), "unanswered call", "trajectory[2].tool_calls: no answer to view (c1)"),
    "answer twice": (lambda record: (record["trajectory"].insert(4, record["trajectory"][3]), record)[1], "orphan tool answer", "trajectory[4]"),
    "answer of another": (set_at("trajectory.4.tool_call_id", "c9"), "orphan tool answer", "trajectory[4]: answers view (c9), but view (c1)"),
    "answer before a call": (set_at("trajectory.2", {"role": "user", "content": "x"}), "orphan tool answer", "trajectory[3]: answers run (c2), but no call"),
    "no tools": (set_at("tools", ...), "missing field", "tools"),
    "tools cut": (set_at("tools", "[{"), "truncated JSON", "tools"),
    "tools a number": (set_at("tools", 1), "wrong type", "tools"),
    "tool a text": (set_at("tools.1", "run"), "not an object", "tools[1]"),
    "tool without name": (set_at("tools.1.function.name", None), "missing field", "tools[1].function.name"),
    "no instance": (set_at("instance_id", ...), "missing field", "instance_id"),
    "no repo": (lambda record: record | {"repo": None, "instance_id": "twelve"}, "missing field", "repo"),
    "resolved a word": (set_at("resolved", "yes"), "wrong type", "resolved"),
    "exit status a number": (set_at("exit_status", 0), "wrong type", "exit_status"),
    "patch a list": (set_at("model_patch", []), "wrong type", "model_patch"),
    "patch half a character": (set_at("model_patch", "\udcff"), "undecodable", "the record"),
    "a list": (lambda record: [record], "not an object", "the record"),
    "a text": (lambda record: "row", "not an object", "the record"),
    "nothing": (lambda record: None, "not an object", "the record"),
    "other columns": (lambda record: {"prompt": "a", "response": "b"}, "unknown format", "the record: one of history"),
}
OTHER_MUTATIONS = {
    "history a number": (swe_agent, set_at("history", 3), "wrong type", "history"),
    "history empty": (swe_agent, set_at("history", []), "unknown format", "history"),
    "only a demonstration": (swe_agent, lambda r: r | {"history": r["history"][:2]}, "no user turn", "history"),
    "two calls, one answer": (swe_agent, set_at("history.4.tool_call_ids", ["s1", "s2"]), "wrong type", "history[4].tool_call_ids"),
    # The demonstration before it is counted: places are those of the file.
    "agent's answer missing": (swe_agent, set_at("history.4", ...), "unanswered call", "history[3].tool_calls"),
    "info a text": (swe_agent, set_at("info", "submitted"), "not an object", "info"),
    "exit status an object": (swe_agent, set_at("info.exit_status", {}), "wrong type", "info.exit_status"),
    "event a text": (stream, set_at("history.2", "x"), "not an object", "history[2]"),
    "event of nothing": (stream, set_at("history.6.action", ...), "missing field", "history[6]"),
    "action a number": (stream, set_at("history.6.action", 5), "wrong type", "history[6].action"),
    "action without its response": (stream, set_at("history.6.tool_call_metadata", ...), "missing field", "history[6].tool_call_metadata"),
    "message of nobody": (stream, set_at("history.1.source", ...), "missing field", "history[1].source"),
    "user's command": (stream, set_at("history.2.action", "run"), "unknown event", "history[2]"),
    "no choice": (stream, set_at("history.4.tool_call_metadata.model_response.choices", []), "missing field", "history[4].tool_call_metadata"),
    "response of the user": (
        stream,
        set_at("history.4.tool_call_metadata.model_response.choices.0.message.role", "user"),
        "contradicting fields",
        "history[4].tool_call_metadata.model_response.choices[0].message.role",
    ),
    "another total": (stream, set_at("history.4.tool_call_metadata.total_calls_in_response", 3), "contradicting fields", "history[4]"),
    "call that nobody made": (stream, set_at("history.4.tool_call_metadata.tool_call_id", "t9"), "contradicting fields", "history[4]"),
    "observation missing": (stream, set_at("history.7", ...), "unanswered call", "history[4]"),
    "observation twice": (stream, lambda r: (r["history"].insert(6, r["history"][5]), r)[1], "orphan tool answer", "history[6]"),
    "observation of nothing": (stream, set_at("history.7.content", None), "missing field", "history[7].content"),
    "task missing": (stream, lambda r: r | {"history": [r["history"][0], *r["history"][4:8]]}, "no user turn", "history"),
    "report a word": (stream, set_at("test_result", {"report": {"resolved": "no"}}), "wrong type", "test_result.report.resolved"),
}


@pytest.mark.parametrize("title", ROW_MUTATIONS)
def test_a_damaged_row_is_refused_with_its_reason_and_place(title):
    mutate, reason, place = ROW_MUTATIONS[title]
    found = refusal(mutate(copy.deepcopy(row())))
    assert (found.reason, found.detail[: len(place)]) == (reason, place)
    assert reason in get_args(Reason) and len(found.detail) < 400


@pytest.mark.parametrize("title", OTHER_MUTATIONS)
def test_a_damaged_run_of_another_format_is_refused_with_its_reason_and_place(title):
    sound, mutate, reason, place = OTHER_MUTATIONS[title]
    found = refusal(mutate(copy.deepcopy(sound())))
    assert (found.reason, found.detail[: len(place)]) == (reason, place)
    assert reason in get_args(Reason)


@pytest.mark.parametrize("field, reason", [("resolved", "resolved unknown"), ("exit_status", "exit status"), ("model_patch", "empty patch")])
def test_a_verdict_that_is_missing_is_unknown_and_not_a_yes(field, reason):
    for record in (row(**{field: None}), {key: value for key, value in row().items() if key != field}):
        assert why_not(trajectory_of(record, "made"), resolved=True, exit_status=("submit",), patch=True) == reason


def places(tree: object, path: tuple = ()) -> list[tuple]:
    """Paths to every value below a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in items for found in ((*path, key), *places(value, (*path, key)))]


def test_no_random_damage_raises_anything_but_unusable_or_breaks_a_promise():
    rng = random.Random(6)
    values = [None, 7, -1.5, "", "x", "\ud800", "[", "{}", [], {}, [None], {"role": "user"}, True, float("nan"), [[[]]], {"": {}}]
    outcomes: Counter[str] = Counter()
    for number in range(600):
        sound = (row, stream, swe_agent)[number % 3]()
        whole = trajectory_of(sound, "made")
        path = rng.choice(places(sound))
        holder = sound
        for step in path[:-1]:
            holder = holder[step]
        if rng.random() < 0.4:
            del holder[path[-1]]
        else:
            holder[path[-1]] = rng.choice(values)
        try:
            read = trajectory_of(sound, "made")
        except Unusable as why:
            assert why.reason in get_args(Reason) and why.detail.encode()
            outcomes[why.reason] += 1
        else:
            outcomes["read"] += 1
            # What was read keeps the promises of a trajectory, whatever the damage hit.
            assert checked(copy.deepcopy(read.messages)) == read.messages
            json.dumps([read.messages, read.tools], ensure_ascii=False).encode()
            assert {m["role"] for m in read.messages} <= {m["role"] for m in whole.messages}
            assert read.resolved in (True, False, None) and read.issue.strip()
    assert len(outcomes) > 10 and 100 < outcomes["read"] < 500, outcomes


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_line_that_breaks_off_is_one_dropped_row(tmp_path):
    line = json.dumps(row())
    (tmp_path / "runs.jsonl").write_text(f"{line}\n{line[:200]}\n\n{line}\n" + "[" * 10**5 + "\n", encoding="utf-8")
    found = list(raw_rows(["runs.jsonl"], None, tmp_path))
    assert [name for name, _ in found] == [f"runs.jsonl:{n}" for n in (1, 2, 4, 5)]
    broken = found[1][1]
    assert isinstance(broken, Unusable) and broken.reason == "truncated JSON" and broken.detail.startswith("runs.jsonl:2: ")
    assert found[0][1] == found[2][1] == row() and found[3][1].reason == "nested too deep"


def test_every_kind_of_file_gives_the_same_records(tmp_path):
    expected = [row(), row(repo="a\u2028b")]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in expected)
    texts = {
        "a.jsonl": lines,
        "b.json": json.dumps(expected, indent=1),
        "c.json": lines,
        "d.traj": json.dumps(swe_agent(), indent=1),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("a.jsonl", "a.jsonl.gz", "b.json", "b.json.gz", "c.json", "c.json.gz"):
        assert [record for _, record in raw_rows([name], None, tmp_path)] == expected, name
    assert list(raw_rows(["d.traj"], None, tmp_path)) == [("d.traj", swe_agent())]
    assert [record for _, record in raw_rows(["d.traj.gz"], None, tmp_path)] == [swe_agent()]
    assert len(local_files(["."], tmp_path)) == 8 and len(local_files(["*.json", "c.json"], tmp_path)) == 2


def test_a_file_that_cannot_be_parsed_is_one_dropped_row(tmp_path):
    whole = json.dumps(swe_agent(), indent=1)
    packed = gzip.compress("\n".join([json.dumps(row())] * 200).encode())
    (tmp_path / "cut.traj").write_text(whole[:300])
    (tmp_path / "cut.json").write_text(json.dumps([row()], indent=1)[:300])
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) - 20])
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 is not enough")
    (tmp_path / "sound.traj").write_text(whole)
    found = list(raw_rows(["."], None, tmp_path))
    reasons = Counter((name, record.reason) for name, record in found if isinstance(record, Unusable))
    assert reasons == {
        ("cut.traj", "truncated JSON"): 1,
        ("cut.json", "truncated JSON"): 1,
        ("cut.jsonl.gz", "damaged file"): 1,
        ("cut.parquet", "damaged file"): 1,
    }
    assert found[-1] == ("sound.traj", swe_agent())


def test_a_path_that_is_not_there_is_named_with_its_neighbours(tmp_path):
    (tmp_path / "runs.jsonl").write_text("{}\n")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"^path: run\.jsonl: no such file .*did you mean 'runs\.jsonl'"):
        list(raw_rows(["run.jsonl"], None, tmp_path))
    with pytest.raises(DataError, match=r"notes\.txt: trajectories are read from \.jsonl"):
        list(raw_rows(["notes.txt"], None, tmp_path))


def test_a_dataset_folder_is_read_like_the_hub(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([row(), row(instance_id="octo__cat-13")]).save_to_disk(tmp_path / "set")
    found = list(raw_rows([], TrajectoryHubOptions(path="set"), tmp_path))
    assert [name for name, _ in found] == ["set/train[0]", "set/train[1]"]
    assert trajectory_of(found[1][1], "made") == replace(made(), instance_id="octo__cat-13")
    with pytest.raises(DataError, match=r"^hub\.path: gone: cannot be read"):
        list(raw_rows([], TrajectoryHubOptions(path="gone"), tmp_path))


def test_the_repository_of_an_id():
    assert repo_of("marshmallow-code__marshmallow-1867") == "marshmallow-code/marshmallow"
    assert repo_of("octo__cat.py-utils-3") == "octo/cat.py-utils"
    assert repo_of("function_calling__install-1") is None and repo_of("octo-cat-3") is None
    assert repo_of("octo__cat") is None
