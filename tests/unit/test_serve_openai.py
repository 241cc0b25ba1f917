"""The parts of ``limbeck serve`` that need no server: what may be asked, what may be shown, how a token is drawn."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.requests import ClientDisconnect

from gguf_case import CONTEXT, TEMPLATE, write_gguf
from limbeck.errors import ModelError
from limbeck.evaluation.decode import decode, draw, draws
from limbeck.evaluation.sampling import Sampling
from limbeck.models.loading import load_model, load_tokenizer, resolve_source
from limbeck.serve.openai.app import House
from limbeck.serve.openai.backend import Caller, Likely, Piece, TokenScore, Usage
from limbeck.serve.openai.gguf_header import read_header
from limbeck.serve.openai.questions import EXTRA, Limits, question
from limbeck.serve.openai.replies import Form
from limbeck.serve.openai.spoken import Spoken
from limbeck.serve.openai.transformers import score_of
from limbeck.serve.refusals import Refusal

LIMITS = Limits("m", 100, 50)
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
SEED_CURL = {
    "messages": [{"role": "user", "content": "Write a Python function to check if a number is prime"}], "max_tokens": 100, "temperature": 0.7,
}  # fmt: skip


def schema(inner: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": inner}}


# --- what may be asked


def test_what_is_not_said_has_openais_defaults() -> None:
    asked = question(SEED_CURL, LIMITS, chat=True)
    assert (asked.max_tokens, asked.stop, asked.logprobs, asked.stream) == (100, (), None, False)
    assert (asked.sampling.temperature, asked.sampling.top_p, asked.sampling.top_k, asked.sampling.min_p) == (0.7, 1, 0, 0)
    assert question(HI, LIMITS, chat=True).sampling.temperature == 1 and question(HI, LIMITS, chat=True).max_tokens == 100
    seeds = {question(HI, LIMITS, chat=True).sampling.seed for _ in range(4)}
    assert len(seeds) > 1, "two requests without a seed meet other draws"
    assert question({**HI, "seed": -1}, LIMITS, chat=True).sampling.seed == question({**HI, "seed": -1}, LIMITS, chat=True).sampling.seed


def test_fields_that_mean_nothing_are_let_pass() -> None:
    body = {
        **HI, "model": "m", "n": 1, "user": "me", "store": True, "metadata": {"a": "b"}, "frequency_penalty": 0, "presence_penalty": 0.0,
        "logit_bias": {}, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "stop": None, "seed": None,
    }  # fmt: skip
    assert question(body, LIMITS, chat=True).extra == {}
    takes = Limits("m", 100, 50, frozenset(EXTRA))
    assert question({**HI, "frequency_penalty": 0.5}, takes, chat=True).extra == {"frequency_penalty": 0.5}


def test_text_comes_in_parts_and_prompts_as_ids() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = question({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [call]}]}, LIMITS, chat=True)
    assert asked.messages is not None and asked.messages[0]["content"] == "ab" and asked.messages[1]["content"] == ""
    assert question({"prompt": [1, 2]}, LIMITS, chat=False).prompt == question({"prompt": [[1, 2]]}, LIMITS, chat=False).prompt == [1, 2]
    assert question({"prompt": ["a"]}, LIMITS, chat=False).prompt == "a"


@pytest.mark.parametrize(
    ("chat", "body", "message"),
    [
        (True, {**HI, "temperatur": 1}, "temperatur: unknown field, did you mean 'temperature'"),
        (True, {**HI, "prompt": "a"}, "prompt: unknown field"),
        (True, {**HI, "model": "other"}, "model: 'other' is not served here, 'm' is"),
        (True, {**HI, "model": 5}, "model: must be a string, not 5"),
        (True, {**HI, "n": 2}, "n: 2 answers to one request: this server gives 1"),
        (True, {**HI, "n": True}, "n: True answers"),
        (True, {**HI, "temperature": 2.5}, "temperature: 2.5 is not from 0 to 2"),
        (True, {**HI, "temperature": float("inf")}, "temperature: inf is not from 0 to 2"),
        (True, {**HI, "temperature": "hot"}, "temperature: must be a number, not 'hot'"),
        (True, {**HI, "temperature": True}, "temperature: must be a number, not True"),
        (True, {**HI, "top_p": 1.5}, "top_p: 1.5 is not from 0 to 1"),
        (True, {**HI, "top_k": 1.5}, "top_k: must be a whole number, not 1.5"),
        (True, {**HI, "min_p": -1}, "min_p: -1 is not from 0 to 1"),
        (True, {**HI, "seed": 10**30}, "seed: a number of more than twenty digits is not from"),
        (True, {**HI, "max_tokens": 0}, "max_tokens: 0 is below 1"),
        (True, {**HI, "max_tokens": 101}, "max_tokens: 101 is more than the 100 that this server writes in one answer (--max-tokens)"),
        (True, {**HI, "max_completion_tokens": 101}, "max_completion_tokens: 101 is more than the 100"),
        (True, {**HI, "stop": [""]}, "stop[0]: must be a string of 1 to 256 characters, not ''"),
        (True, {**HI, "stop": ["a"] * 17}, "stop: must be a string, or a list of at most 16"),
        (True, {**HI, "stream": "yes"}, "stream: must be true or false, not 'yes'"),
        (True, {**HI, "stream_options": {"include_usage": True}}, "stream_options: is for `stream: true` alone"),
        (True, {**HI, "top_logprobs": 3}, "top_logprobs: asks for log-probabilities without `logprobs: true`"),
        (True, {**HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs: 21 is not from 0 to 20"),
        (True, {**HI, "tools": [{}]}, "tools: a list of 1 is nothing that this model's backend can do"),
        (True, {}, "messages: is missing"),
        (True, {"messages": []}, "messages: must be a list of 1 to 4096 messages"),
        (True, {"messages": ["hi"]}, "messages[0]: must be an object with role and content"),
        (True, {"messages": [{"role": "king", "content": "a"}]}, "messages[0].role: 'king' is not one of system"),
        (True, {"messages": [{"role": "user"}]}, "messages[0].content: is missing"),
        (True, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]: a part of type 'image_url'"),
        (True, {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls: must be a list of"),
        (True, {"messages": [{"role": "user", "content": "\ud800"}]}, "the body holds half a character ('\\ud800')"),
        (False, {}, "prompt: is missing"),
        (False, {"prompt": 5}, "prompt: must be a string, or a list of token ids, not 5"),
        (False, {"prompt": ["a", "b"]}, "prompt: 2 prompts in one request: this server takes 1"),
        (False, {"prompt": [50]}, "prompt[0]: 50 is no token id of a vocabulary of 50"),
        (False, {"prompt": [True]}, "prompt[0]: True is no token id"),
        (False, {"prompt": ["a", 1]}, "prompt[0]: 'a' is no token id"),
        (False, {"prompt": [[["a"]]]}, "prompt[0]: a list of 1 is no token id"),
        (False, {"prompt": "a", "echo": True}, "echo: True is not supported"),
        (False, {"prompt": "a", "messages": []}, "messages: unknown field"),
    ],
)
def test_what_is_wrong_is_said_by_field(chat: bool, body: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal) as refused:
        question(body, LIMITS, chat=chat)
    assert refused.value.message.startswith(message), refused.value.message
    assert refused.value.status == (404 if "not served here" in message else 400)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("frequency_penalty", True, "frequency_penalty: must be a number, not True"),
        ("presence_penalty", 3, "presence_penalty: 3 is not from -2 to 2"),
        ("logit_bias", "x", "logit_bias: must be an object, not 'x'"),
        ("logit_bias", {"a": 1}, "logit_bias: 'a' is no token id of a vocabulary of 50"),
        ("logit_bias", {"50": 1}, "logit_bias: '50' is no token id of a vocabulary of 50"),
        ("logit_bias", {"4": "x"}, "logit_bias.4: must be a number, not 'x'"),
        ("logit_bias", {"4": 101}, "logit_bias.4: 101 is not from -100 to 100"),
        ("logit_bias", {"4": None}, "logit_bias.4: must be a number, not None"),
        ("tools", "", "tools: must be a list, not ''"),
        ("tools", [{"type": "function"}], 'tools[0]: must be {"type": "function", "function"'),
        ("tools", [{"type": "function", "function": {"name": "f", "parameters": 5}}], "tools[0].function.parameters: must be a JSON schema, not 5"),
        ("tool_choice", 5, "tool_choice: must be auto, none, required, or"),
        ("tool_choice", "required", "tool_choice: chooses what is not among the 0 `tools`"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}, "tool_choice: chooses what is not among the 0 `tools`"),
        ("parallel_tool_calls", "yes", "parallel_tool_calls: must be true or false, not 'yes'"),
        ("response_format", "json", "response_format: must be an object, not 'json'"),
        ("response_format", {"type": "xml"}, "response_format.type: 'xml' is not one of text, json_object, json_schema"),
        ("response_format", {"type": "json_schema"}, "response_format.json_schema: must be"),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": 5}}, "response_format.json_schema: must be"),
        ("response_format", schema({"enum": [*range(1001)]}), "response_format.json_schema.schema: has 1001 alternatives: at most 1000"),
        ("response_format", schema({"pattern": "^(((a{0,100}){0,100}){0,9})$"}), "response_format.json_schema.schema: repeats something 90000 times"),
        ("response_format", schema({"items": {"maxLength": 10**6}}), "response_format.json_schema.schema: repeats something 1000000 times"),
        ("chat_template_kwargs", [1], "chat_template_kwargs: must be an object, not a list of 1"),
        ("chat_template_kwargs", {"chat_template": "{{ 1 }}"}, "chat_template_kwargs.chat_template: is the server's business"),
        ("chat_template_kwargs", {"messages": []}, "chat_template_kwargs.messages: is the server's business"),
        ("reasoning_effort", 5, "reasoning_effort: must be a string, not 5"),
    ],
)
def test_what_a_backend_takes_has_openais_form(field: str, value: Any, message: str) -> None:
    with pytest.raises(Refusal) as refused:
        question({**HI, field: value}, Limits("m", 100, 50, frozenset(EXTRA)), chat=True)
    assert refused.value.message.startswith(message) and refused.value.status == 400, refused.value.message


def test_what_a_backend_takes_goes_to_it_as_it_came() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}, {"type": "function", "function": {"name": "g"}}]
    given = {
        "frequency_penalty": -2, "logit_bias": {"49": -100, "0": 1.5}, "tools": tools, "tool_choice": {"type": "function", "function": {"name": "g"}},
        "response_format": schema({"type": "string", "pattern": "^[a-z]{1,64}@[a-z]{1,255}$", "minLength": 1000, "maxLength": 2000}),
        "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    assert question({**HI, **given}, Limits("m", 100, 50, frozenset(EXTRA)), chat=True).extra == given


def test_a_body_of_any_depth_is_an_answer_or_a_refusal() -> None:
    deep: Any = 1
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(Refusal, match="the body is nested too deeply"):
        question({**HI, "metadata": deep}, LIMITS, chat=True)


# --- what may be shown


class Letters:
    """A tokenizer whose ids are bytes, or texts of its own."""

    def __init__(self, *texts: str):
        self._data = {256 + i: text.encode() for i, text in enumerate(texts)}

    def decode(self, ids: list[int], **_: Any) -> str:
        return b"".join(self._data.get(i, bytes([i % 256])) for i in ids).decode("utf-8", "replace")


def said(ids: list[int], tokenizer: Any, stop: tuple[str, ...] = ()) -> tuple[list[str], list[str], bool]:
    """Shown pieces, tokens whose scores were shown, and whether a stop string was met."""
    spoken, pieces = Spoken(tokenizer, stop), []
    for i in ids:
        pieces.append(spoken.add(i, TokenScore(Likely(tokenizer.decode([i]), None, 0.0))))
        if spoken.stopped:
            break
    else:
        pieces.append(spoken.end())
    return [p.text for p in pieces], [s.token.text for p in pieces for s in p.scores], spoken.stopped


def test_a_stop_string_across_tokens_never_shows() -> None:
    tokenizer = Letters("ab", "cS", "TO", "P!x", "S", "ST")
    for ids, wanted in (
        ([256, 257, 258, 259], "abc"),
        ([256, 260, 260, 258, 259], "abS"),
        ([256, 261, 261, 256], "abSTSTab"),
        ([256, 261], "abST"),
        ([261, 258], "STTO"),
    ):
        pieces, tokens, stopped = said(ids, tokenizer, ("STOP",))
        assert "".join(pieces) == wanted and stopped == ("P!" in tokenizer.decode(ids))
        shown = "".join(tokens)
        # The token that ends in the beginning of the stop string is not shown either.
        assert "STO" not in shown if stopped else shown == wanted
    assert said([256, 257, 258], tokenizer, ("zz", "cSTO", "b"))[0] == ["a"], "the one that begins first cuts"


def test_text_is_shown_as_soon_as_it_is_certain() -> None:
    tokenizer = Letters()
    pieces, _, _ = said(list(b"abSx"), tokenizer, ("STOP",))
    assert pieces == ["a", "b", "", "Sx", ""]
    assert said(list(b"abc"), tokenizer)[0] == ["a", "b", "c", ""]


def test_characters_are_shown_whole() -> None:
    pieces, tokens, _ = said([*"é😀x".encode(), 0xC3], Letters())
    assert [p for p in pieces if p] == ["é", "😀", "x"] and len(tokens) == 8
    # Bytes that make no character do not hold up the rest.
    broken, _, _ = said([0x80] * 20 + list(b"ok"), Letters())
    assert "".join(broken).endswith("ok") and any(broken[:12])
    assert "".join(said(list("naïve 日本語 text".encode()), Letters(), ("本語 t",))[0]) == "naïve 日"


def test_an_answer_goes_on_from_its_prompt() -> None:
    class Words(Letters):
        """As SentencePiece does it: a text does not begin with a space."""

        def decode(self, ids: list[int], **options: Any) -> str:
            return super().decode(ids, **options).removeprefix(" ")

    tokenizer = Words(" time", " a")
    for prompt, wanted in (([257], " time a"), ([*b"xyz", 257], " time a"), ([], "time a"), ([0xC3], "time a")):
        spoken = Spoken(tokenizer, (), prompt)
        assert "".join(spoken.add(i).text for i in (256, 257)) + spoken.end().text == wanted, prompt


def test_text_of_a_real_tokenizer_is_what_it_decodes() -> None:
    tokenizer = load_tokenizer(resolve_source("builtin:code-2m"))
    text = "def f(x):\n    return 'é😀 — 日本' + x  # done\n"
    ids = tokenizer(text).input_ids
    assert "".join(said(ids, tokenizer)[0]) == tokenizer.decode(ids, skip_special_tokens=True)


# --- how a token is drawn


def shares(logits_V: torch.Tensor, count: int = 1500, **how: Any) -> dict[int, float]:
    generator = torch.Generator().manual_seed(0)
    found = Counter(draw(logits_V, Sampling(**how), generator) for _ in range(count))
    return {token: times / count for token, times in found.items()}


def test_sampling_keeps_the_likeliest_part_of_the_distribution() -> None:
    logits_V = torch.tensor([0.1, 0.4, 0.2, 0.05, 0.25]).log()
    assert set(shares(logits_V)) == {1} and set(shares(logits_V, temperature=1e-9)) == {1}
    for how, kept in (
        ({"temperature": 1.0}, {0, 1, 2, 3, 4}),
        ({"temperature": 1.0, "top_k": 2}, {1, 4}),
        ({"temperature": 1.0, "top_p": 0.6}, {1, 4}),
        ({"temperature": 1.0, "top_p": 0.66}, {1, 4, 2}),
        ({"temperature": 1.0, "top_p": 0.0}, {1}),
        ({"temperature": 1.0, "min_p": 0.45}, {1, 2, 4}),
        # Of the two that are left 1 has 0.62.
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.6}, {1}),
        ({"temperature": 1.0, "top_k": 99, "top_p": 0.999999, "min_p": 1e-9}, {0, 1, 2, 3, 4}),
    ):
        found = shares(logits_V, **how)
        wanted = {token: float(logits_V[token].exp()) for token in kept}
        assert set(found) == kept, how
        for token, share in found.items():
            assert abs(share - wanted[token] / sum(wanted.values())) < 0.05, (how, token)


def test_decoding_draws_what_it_drew_before_there_were_cuts() -> None:
    model = load_model(resolve_source("builtin:code-2m"))
    ids_1T = torch.tensor([[5, 6, 7]])
    found = list(decode(model, ids_1T, tokens=12, ends=(), temperature=0.8, seed=3))
    same = [d.token for d in draws(model, ids_1T, tokens=12, sampling=Sampling(0.8, top_k=10**6, top_p=1, min_p=0, seed=3))]
    generator, ids = torch.Generator().manual_seed(3), ids_1T
    by_hand = []
    for _ in range(12):
        with torch.no_grad():
            logits_V = model(input_ids=ids).logits[0, -1].float()
        by_hand.append(int(torch.multinomial((logits_V / 0.8).softmax(-1), 1, generator=generator)))
        ids = torch.cat([ids, torch.tensor([by_hand[-1:]])], 1)
    assert found == same
    assert found == by_hand


def test_scores_are_of_the_models_own_distribution() -> None:
    tokenizer = load_tokenizer(resolve_source("builtin:code-2m"))
    logits_V = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    score = score_of(300, logits_V, 3, tokenizer)
    assert abs(score.token.log_probability - float(logits_V.log_softmax(-1)[300])) < 1e-6
    assert [t.log_probability for t in score.top] == logits_V.log_softmax(-1).topk(3).values.tolist()
    assert score.token.text == tokenizer.decode([300]) and score_of(300, logits_V, 0, tokenizer).top == ()


# --- places, forms, files


def test_a_client_that_goes_away_gives_its_place_back() -> None:
    async def run() -> None:
        house, cut = House(8, 1), asyncio.Event()
        leave = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await leave.wait()
            return {"type": "http.disconnect"}

        async def never() -> dict[str, Any]:
            await asyncio.Event().wait()
            return {}

        first, second, third = Caller(never, cut), Caller(receive, cut), Caller(never, cut)
        order = []

        async def take(caller: Caller, name: str) -> None:
            async with house.place(caller):
                order.append(name)

        async with house.place(first):
            waiting = [asyncio.ensure_future(take(second, "second")), asyncio.ensure_future(take(third, "third"))]
            await asyncio.sleep(0.01)
            assert house.busy == 1 and order == []
            leave.set()
            with pytest.raises(ClientDisconnect):
                await waiting[0]
        await asyncio.wait_for(waiting[1], 5)
        assert order == ["third"] and house.busy == 0
        cut.set()
        with pytest.raises(Refusal) as refused:
            await first.wait_for(asyncio.sleep(60))
        assert refused.value.status == 503
        for caller in (first, second, third):
            caller.close()

    asyncio.run(run())


def test_calls_of_tools_are_put_together_from_their_parts() -> None:
    form = Form(question(HI, LIMITS, chat=True), "m")
    form.gather(Piece(more={"tool_calls": [{"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}]}))
    form.gather(Piece(more={"tool_calls": [{"index": 0, "function": {"arguments": '{"x":'}}]}))
    form.gather(Piece(more={"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}, {"index": 1, "id": "b", "function": {"name": "g"}}]}))
    last = Piece(finish="tool_calls", usage=Usage(3, 4))
    form.gather(last)
    whole = form.whole(last)
    assert whole["choices"][0]["message"] == {
        "role": "assistant", "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
            {"id": "b", "type": "function", "function": {"name": "g", "arguments": ""}},
        ],
    }  # fmt: skip
    assert whole["usage"]["total_tokens"] == 7 and whole["choices"][0]["finish_reason"] == "tool_calls"


def test_the_header_of_a_gguf_file_is_read_and_a_damaged_one_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    header = read_header(file)
    assert header["general.architecture"] == "llama" and header["llama.context_length"] == CONTEXT
    assert header["tokenizer.chat_template"] == TEMPLATE and header["tokenizer.ggml.tokens"] == 262
    data = file.read_bytes()
    kinds = data.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    for name, content, message in (
        ("text", b"hello, I am text", "is no GGUF file"),
        ("empty", b"", "is cut off or damaged"),
        ("short", data[:2000], "is cut off or damaged"),
        ("old", b"GGUF" + (1).to_bytes(4, "little") + data[8:], "old: GGUF version 1, and 2 and 3 can be read$"),
        ("endless", data[:kinds] + (2**62).to_bytes(8, "little") + data[kinds + 8 :], "is cut off or damaged"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=message):
            read_header(tmp_path / name)
    with pytest.raises(ModelError, match="cannot be read"):
        read_header(tmp_path / "absent")
