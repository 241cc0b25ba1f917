"""Tool calls as text: what the templates write is read back, what is broken is counted, and what is scored is what was written."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.evaluation.tool_calls import (
    CallScore,
    ToolCall,
    compare,
    forced_calls,
    forced_score,
    read_calls,
    same_value,
    token_offsets,
    written,
)
from limbeck.models.loading import load_tokenizer

TEMPLATES = {
    "Qwen3-Coder": "xml", "Qwen-Qwen2.5-7B-Instruct": "block", "qwen2_5_training": "block", "Qwen-Qwen3-0.6B": "block", "qwen3_training": "block",
    "Qwen-QwQ-32B": "block", "llama3_2": "bare",
}  # fmt: skip
HEADERS = ("<|im_start|>assistant\n", "<|im_start|>assistant", "<|start_header_id|>assistant<|end_header_id|>\n\n")
ODD: list[dict[str, Any]] = [
    {},
    {"command": "ls -la"},
    {"text": "", "lines": "\n", "more": "\n\na\n\n", "space": "  "},
    {"code": "if a < b and b > c:\n    print('</parameter>', \"<parameter=x>\", '</function>')\n", "path": "/a b/ü.py"},
    {"xml": "<a></parameter></a>\n</function> </tool_call> <tool_call>", "json": '{"name": "x", "arguments": {"a": "}"}}\\', "emoji": "🦙 é漢"},
    {"range": [1, -1], "deep": {"a": {"b": [None, True, 1.5, "é"]}}, "number": 3, "share": 0.25, "flag": True, "off": False, "none": None},
]


def turn(template: str, calls: list[dict[str, Any]], tokenizer: Any, *, content: str = "") -> str:
    """What a template writes as the assistant's turn with these calls, without its header."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    asked = [{"type": "function", "function": call} for call in calls]
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": content, "tool_calls": asked}], chat_template=template, tokenize=False)
    assert isinstance(whole, str)
    header = next(header for header in HEADERS if header in whole)
    return whole.rpartition(header)[2] if whole.count(header) == 1 else whole.partition(header)[2]


@pytest.fixture(scope="module")
def qwen(shared_data: Path) -> Any:
    return load_tokenizer(str(shared_data / "tokenizers/qwen2.5"))


@pytest.fixture(params=TEMPLATES)
def template(request: pytest.FixtureRequest, shared_data: Path) -> tuple[str, str]:
    return (shared_data / "chat_templates" / f"{request.param}.jinja").read_text(), TEMPLATES[request.param]


def real_calls(folder: Path) -> list[dict[str, Any]]:
    """Every call of the shipped trajectories, once."""
    turns: list[dict[str, Any]] = []
    for line in (folder / "openhands_messages_3rows.jsonl").read_text().splitlines():
        turns += json.loads(line)["trajectory"]
    for path in sorted(folder.glob("*.traj")):
        turns += json.loads(path.read_text())["history"]
    functions = [call["function"] for message in turns for call in message.get("tool_calls") or ()]
    unique = {json.dumps(f, sort_keys=True): {"name": f["name"], "arguments": json.loads(f["arguments"])} for f in functions}
    return list(unique.values())


def check_read_back(text: str, calls: list[dict[str, Any]], form: str) -> None:
    reading = read_calls(text)
    assert reading.malformed == 0 and [call.name for call in reading.calls] == [call["name"] for call in calls]
    for found, spans, call in zip(reading.calls, reading.spans, calls, strict=True):
        wanted = call["arguments"]
        assert list(found.arguments) == list(wanted) == [text[a:b] for a, b in spans.keys]
        assert text[slice(*spans.name)] == call["name"]
        spelt = [text[a:b] for a, b in spans.values]
        if form == "xml":
            assert all(same_value(value, found.arguments[key]) for key, value in wanted.items())
            assert spelt == list(found.arguments.values()) and text[slice(*spans.close)] == "</function>"
        else:
            assert found.arguments == wanted and text[slice(*spans.close)] == "}"
            for key, piece in zip(wanted, spelt, strict=True):
                assert json.loads(f'"{piece}"' if isinstance(wanted[key], str) else piece) == wanted[key]
    assert compare([ToolCall(**call) for call in calls], reading.calls).rates().get("exact", 1) == 1


# -- reading ---------------------------------------------------------------------------------------------------------------


def test_what_a_template_writes_is_read_back(template: tuple[str, str], qwen: Any) -> None:
    text, form = template
    for arguments in ODD:
        check_read_back(turn(text, [{"name": "edit", "arguments": arguments}], qwen), [{"name": "edit", "arguments": arguments}], form)
    if form != "bare":
        several = [{"name": f"tool_{i}", "arguments": arguments} for i, arguments in enumerate(ODD)]
        check_read_back(turn(text, several, qwen, content="I say: look < here."), several, form)


def test_the_calls_of_real_trajectories_are_read_back(template: tuple[str, str], qwen: Any, shared_data: Path) -> None:
    text, form = template
    calls = real_calls(shared_data / "trajectories")
    assert len(calls) > 30 and any("\n" in str(value) for call in calls for value in call["arguments"].values())
    for call in calls:
        check_read_back(turn(text, [call], qwen), [call], form)


XML = "<tool_call>\n<function=run>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
BLOCK = '<tool_call>\n{"name": "run", "arguments": {"a": 1}}\n</tool_call>'
BARE = '{"name": "run", "parameters": {"a": 1}}'


@pytest.mark.parametrize(
    ("text", "calls", "broken"),
    [
        ("", 0, 0), ("I think <b>so</b>. {}", 0, 0), ('Use {"name": "run", "parameters": {}} for that', 0, 0),
        (XML + XML, 2, 0), (XML + "\n" + BLOCK, 2, 0), (f"text {BLOCK} text", 1, 0),
        ("<tool_call>\n</tool_call>", 0, 1), ("<tool_call>", 0, 1), ("<tool_call>" + BLOCK, 1, 1),
        (XML[:-12], 0, 1), (XML[:40], 0, 1), (XML.replace("</parameter>", ""), 0, 1), (XML.replace("run", ""), 0, 1),
        (XML.replace("\n", ""), 1, 0), (XML.replace("function=", "fun="), 0, 1),
        (BLOCK[:-12], 0, 1), (BLOCK[:30], 0, 1), (BLOCK.replace("arguments", "parameters"), 0, 1), (BLOCK.replace('"run"', "3"), 0, 1),
        (BLOCK.replace('"run"', '""'), 0, 1), (BLOCK.replace('{"a": 1}', "[1]"), 0, 1), (BLOCK.replace('{"a": 1}', '"{}"'), 0, 1),
        (BLOCK.replace('{"a": 1}', "{1: 1}"), 0, 1), (BLOCK.replace('{"a": 1}', '{"a": 1,}'), 0, 1), (BLOCK.replace("1", "[" * 100_000), 0, 1),
        (BLOCK.replace("1", "9" * 5000), 0, 1),
        (BARE, 1, 0), (f"<|python_tag|>{BARE}<|eot_id|>\n", 1, 0), (BARE + " and so on", 0, 1), (BARE[:-1], 0, 1), ('{"name": "Ann", "age": 3}', 0, 0),
        (f"<think>\n{XML}\n<tool_call>\n</think>\n\n{BLOCK}", 1, 0), (f"maybe {XML} <tool_call>\n</think>\nNo.", 0, 0), (f"<think>\n{XML}", 0, 0),
    ],
)  # fmt: skip
def test_what_is_no_whole_call_is_counted_and_never_raises(text: str, calls: int, broken: int) -> None:
    reading = read_calls(text)
    assert (len(reading.calls), reading.malformed, len(reading.spans)) == (calls, broken, calls)


def test_a_key_that_is_written_twice_has_its_last_value() -> None:
    for text in (XML.replace("</function>", "<parameter=a>\n22\n</parameter>\n</function>"), BLOCK.replace('"a": 1', '"a": 1, "a": 22')):
        reading = read_calls(text)
        (call,), (spans,) = reading.calls, reading.spans
        assert written(call.arguments["a"]) == "22" and [text[a:b] for a, b in spans.values] == ["22"] and len(spans.keys) == 1


def test_no_cut_or_mutation_of_a_turn_raises() -> None:
    rng = random.Random(0)
    pieces = ["<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=k>", "</parameter>", "</think>", '"', "{", "}", "\\", ",", "\n", "é"]
    for text in (XML, BLOCK, BARE, XML + BLOCK):
        for at in range(len(text)):
            assert len(read_calls(text[:at]).calls) <= 1
        for _ in range(400):
            at, broken = rng.randrange(len(text)), text
            for _ in range(rng.randrange(1, 4)):
                broken = broken[:at] + rng.choice(pieces) * rng.randrange(3) + broken[at + rng.randrange(4) :]
            reading = read_calls(broken)
            assert len(reading.calls) == len(reading.spans) <= 3
            for call, spans in zip(reading.calls, reading.spans, strict=True):
                assert len(spans.keys) == len(spans.values) == len(call.arguments)


# -- comparing -------------------------------------------------------------------------------------------------------------


def test_counts_say_which_part_of_a_call_is_wrong() -> None:
    wanted = [ToolCall("run", {"a": "1", "b": [1, 2]}), ToolCall("stop", {})]
    cases = {
        "exact": (wanted, (2, 2, 2, 2, 2)),
        "another name": ([ToolCall("walk", wanted[0].arguments), wanted[1]], (1, 2, 2, 1, 2)),
        "a key too many": ([ToolCall("run", {**wanted[0].arguments, "c": 0}), wanted[1]], (2, 1, 2, 1, 2)),
        "a key too few": ([ToolCall("run", {"a": "1"}), wanted[1]], (2, 1, 1, 1, 1)),
        "another value": ([ToolCall("run", {"a": "1", "b": [2, 1]}), wanted[1]], (2, 2, 1, 1, 1)),
        "another type": ([ToolCall("run", {"a": 1, "b": [1, 2]}), wanted[1]], (2, 2, 1, 1, 1)),
        "as text": ([ToolCall("run", {"a": "1", "b": "[1, 2]"}, as_text=True), wanted[1]], (2, 2, 2, 2, 2)),
        "the first alone": (wanted[:1], (1, 1, 1, 1, 2)),
        "none": ([], (0, 0, 0, 0, 0)),
    }
    for words, (found, counts) in cases.items():
        score = compare(wanted, found)
        assert (score.name, score.keys, score.all_values, score.exact, score.values) == counts, words
        assert (score.calls, score.wanted_values, score.right_number) == (2, 2, len(found) == 2), words
    flag = [ToolCall("run", {"a": True})]
    assert compare(flag, [ToolCall("run", {"a": 1})]).values == 0 and compare(flag, flag).values == 1
    nested = [ToolCall("run", {"a": {"x": 1, "y": 2}})]
    assert compare(nested, [ToolCall("run", {"a": {"y": 2, "x": 1}})]).exact == 1


def test_rates_are_over_everything_that_was_added() -> None:
    total = CallScore()
    assert total.rates() == {}
    total += compare([], [])
    total += compare([], [ToolCall("run", {})], malformed=2)
    assert total.rates() == {"number": 0.5} and total.malformed == 2
    total += compare([ToolCall("run", {"a": 1, "b": 2, "c": 3})], [ToolCall("run", {"a": 1, "b": 3, "c": 3})])
    total += compare([ToolCall("run", {"a": 1})], [])
    assert total.rates() == {"number": 0.5, "name": 0.5, "keys": 0.5, "all_values": 0, "exact": 0, "values": 0.5}
    assert total == CallScore(4, 4, 2, 2, 2, 1, 1, 0, 0, 4, 2)


# -- teacher forcing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["xml", "block", "bare"])
def test_one_wrong_token_is_wrong_in_the_part_that_holds_it_and_no_other(form: str, qwen: Any, shared_data: Path) -> None:
    """Against a slow count, character by character, for a wrong token in every place."""
    template = (shared_data / "chat_templates" / f"{next(n for n, f in TEMPLATES.items() if f == form)}.jinja").read_text()
    call = {"name": "str_edit", "arguments": {"path": "/src/ü/🦙.py", "old": "a < b\n", "flag": True, "range": [1, 20], "count": 12, "none": ""}}
    ids = np.array(qwen.encode(turn(template, [call], qwen, content="Look: 漢字🦙"), add_special_tokens=False))
    text, offsets = token_offsets(ids, qwen)
    (spans,) = read_calls(text).spans
    held = [{c for c in range(a, b)} for a, b in offsets]

    def hit(part: tuple[int, int], token: int) -> bool:
        return any(c in held[token] for c in range(part[0], part[1] + 1))

    assert forced_calls(ids, ids, qwen).rates() == {"name": 1, "keys": 1, "all_values": 1, "exact": 1, "values": 1}
    touched = 0
    for token in range(len(ids)):
        guess = ids.copy()
        guess[token] += 1
        score = forced_calls(ids, guess, qwen)
        values = [not hit(part, token) for part in spans.values]
        keys = not any(hit(part, token) for part in [*spans.keys, spans.close])
        name = not hit(spans.name, token)
        assert (score.name, score.keys, score.values, score.all_values) == (name, keys, sum(values), all(values)), qwen.decode(ids[token])
        assert score.exact == (name and keys and all(values))
        touched += not (name and keys and all(values))
    assert 20 < touched < len(ids)


def test_a_model_that_would_have_gone_on_did_not_predict_the_value() -> None:
    text = XML.replace("\n1\n", "\nls\n")
    (spans,) = read_calls(text).spans
    offsets = np.array([(c, c + 1) for c in range(len(text))])
    right = np.ones(len(text), dtype=bool)
    end = spans.values[0][1]
    right[end] = False
    assert text[end] == "\n" and forced_score([spans], offsets, right).values == 0
    right[end], right[end + 1] = True, False
    assert forced_score([spans], offsets, right).values == 1
    # `</function>` not predicted: another argument would have followed.
    right[end + 1], right[spans.close[0]] = True, False
    score = forced_score([spans], offsets, right)
    assert (score.name, score.keys, score.values, score.exact) == (1, 0, 1, 0)


def test_a_turn_without_a_call_or_without_its_tokens_counts_nothing_as_right() -> None:
    assert forced_score([], np.zeros((0, 2)), np.zeros(0, dtype=bool)) == CallScore(turns=1)
    cut = forced_score(read_calls(XML).spans, np.zeros((0, 2)), np.zeros(0, dtype=bool))
    assert (cut.calls, cut.name, cut.keys, cut.values, cut.wanted_values) == (1, 0, 0, 0, 1)
    with pytest.raises(ValueError, match=r"one length; found shapes \(3,\) and \(2,\)"):
        forced_calls(np.arange(3), np.arange(2), None)


@pytest.mark.parametrize("which", ["tokenizers/qwen2.5", "models/stories260K"])
def test_offsets_are_of_these_very_tokens(which: str, shared_data: Path) -> None:
    """Characters of several tokens, tokens that a tokenizer would not choose itself, and one that drops a leading space."""
    tokenizer = load_tokenizer(str(shared_data / which))
    text = "Once upon 🦙🦙 a tïme,  there\n\nwas 漢字 <|im_end|> \ufffd end"
    whole = tokenizer.encode(text, add_special_tokens=False)
    letters = [i for letter in text for i in tokenizer.encode(letter, add_special_tokens=False)]
    for ids in (whole, letters, whole[2:], [], *([whole[:n] for n in range(len(whole))])):
        found, offsets = token_offsets(np.array(ids, dtype=np.int64), tokenizer)
        wanted = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert found == wanted or (wanted.endswith("\ufffd") and ids not in (whole, letters))
        assert offsets.shape == (len(ids), 2) and (np.diff(offsets, axis=0) >= 0).all()
        assert not len(ids) or (offsets[0, 0] == 0 and offsets[-1, 1] == len(found))
        # Where the next token begins a new character, the two have none in common and leave none out.
        parted = offsets[1:, 0] != offsets[:-1, 0]
        assert (offsets[1:, 0] == offsets[:-1, 1])[parted].all()
