"""``limbeck serve`` asked by OpenAI's own client: GGUF files, model folders and a LoRA generator, behind one face."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from adapter_cases import base_folder, generating, recipe_on, run
from condition_cases import TOKENIZER
from gguf_case import write_gguf
from integration.serving import Serving, asking, serving, wait_for
from limbeck.api import generate
from limbeck.serve.openai.app import OpenAiService
from limbeck.serve.openai.backend import Caller, Piece, Usage
from limbeck.serve.openai.llama import LlamaBackend
from limbeck.serve.openai.questions import Question
from limbeck.serve.openai.templates import PLAIN
from limbeck.serve.openai.transformers import Speaker, TransformersBackend
from limbeck.stages.adapting import open_generator
from limbeck.stages.run import open_stage
from limbeck.stages.serving import open_speaker

openai = pytest.importorskip("openai", reason="OpenAI's client is the client of these tests: pip install openai")
needs_llama = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="serving a GGUF file needs xllamacpp: pip install xllamacpp")
TEMPLATE = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}"
HI = [{"role": "user", "content": "hello"}]
PROMPT = "def reverse("


@contextmanager
def service_of(backend: Any, **options: Any) -> Iterator[tuple[OpenAiService, Any]]:
    """A served backend and a client for it."""
    service = OpenAiService(backend, vocabulary=backend.vocabulary, **options)
    with serving(service.app, stopping=service.stop) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0, timeout=60) as client:
        yield service, client
        wait_for(lambda: service.house.admitted == 0)


def folder_backend(**options: Any) -> TransformersBackend:
    speaker = open_speaker("builtin:code-2m")
    speaker.tokenizer.chat_template = TEMPLATE
    return TransformersBackend(speaker, "tiny", **options)


def gguf_backend(folder: Path, **options: Any) -> LlamaBackend:
    return LlamaBackend(write_gguf(folder / "tiny.gguf"), **{"context": 512, "parallel": 2, "threads": 1, **options})


@pytest.fixture(scope="module", params=["gguf", "folder"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[OpenAiService, Any]]:
    if request.param == "gguf" and find_spec("xllamacpp") is None:
        pytest.skip("serving a GGUF file needs xllamacpp: pip install xllamacpp")
    backend: Any = gguf_backend(tmp_path_factory.mktemp("gguf")) if request.param == "gguf" else folder_backend(context=512)
    with service_of(backend, parallel=2, token="k") as both:
        yield both
    assert backend.close(10)


@pytest.fixture
def client(served: tuple[OpenAiService, Any]) -> Any:
    return served[1]


def streamed(client: Any, **asked: Any) -> tuple[str, str | None, Any]:
    """Text, finish and usage of a streamed chat."""
    text, finish, usage = "", None, None
    for chunk in client.chat.completions.create(**{"model": "tiny", "messages": HI, "stream": True, "stream_options": {"include_usage": True}, **asked}):
        for choice in chunk.choices:
            assert finish is None, "something after the finish"
            text += choice.delta.content or ""
            finish = choice.finish_reason
        usage = chunk.usage or usage
    return text, finish, usage


# --- answers


def test_streamed_and_whole_answers_are_the_same_text(client: Any) -> None:
    for sampling in ({"temperature": 0}, {"temperature": 0.9, "seed": 5, "top_p": 0.9, "extra_body": {"top_k": 20, "min_p": 0.01}}):
        whole = client.chat.completions.create(model="tiny", messages=HI, max_tokens=24, **sampling)
        text, finish, usage = streamed(client, max_tokens=24, **sampling)
        assert whole.choices[0].message.content == text != "" and whole.choices[0].message.role == "assistant"
        assert finish == whole.choices[0].finish_reason == "length"
        assert usage.completion_tokens == whole.usage.completion_tokens == 24
        assert usage.prompt_tokens == whole.usage.prompt_tokens and usage.total_tokens == usage.prompt_tokens + 24


def test_a_plain_completion_takes_text_or_ids(served: tuple[OpenAiService, Any]) -> None:
    service, client = served
    one = client.completions.create(model="tiny", prompt=[72, 70, 71], max_tokens=12, temperature=0, logprobs=2)
    two = "".join(c.choices[0].text for c in client.completions.create(model="tiny", prompt=[72, 70, 71], max_tokens=12, temperature=0, stream=True))
    assert one.choices[0].text == two and one.usage.prompt_tokens == 3 and one.usage.completion_tokens == 12
    scores = one.choices[0].logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == 12 and "".join(scores.tokens) == two
    assert all(max(top.values()) == score for top, score in zip(scores.top_logprobs, scores.token_logprobs, strict=True)), "greedy is the likeliest"
    assert [two[at : at + len(token)] for at, token in zip(scores.text_offset, scores.tokens, strict=True)] == scores.tokens
    assert client.completions.create(model="tiny", prompt="hello", max_tokens=1).object == "text_completion"
    assert client.models.list().data[0].id == "tiny" == service.backend.name


def test_the_same_seed_gives_the_same_text_and_another_another(client: Any) -> None:
    texts = {seed: streamed(client, max_tokens=24, temperature=1.2, seed=seed)[0] for seed in (1, 2)}
    assert texts[1] != texts[2]
    assert texts[1] == client.chat.completions.create(model="tiny", messages=HI, max_tokens=24, temperature=1.2, seed=1).choices[0].message.content


def test_stop_strings_end_the_text_and_are_never_in_it(client: Any) -> None:
    full, _, _ = streamed(client, max_tokens=40, temperature=1, seed=7)
    for at, size in ((3, 2), (7, 5), (12, 9)):
        word = full[at : at + size]
        text, finish, usage = streamed(client, max_tokens=40, temperature=1, seed=7, stop=[word, "never, ever"])
        assert text == full[: full.index(word)] and finish == "stop" and usage.completion_tokens <= 40
        whole = client.chat.completions.create(model="tiny", messages=HI, max_tokens=40, temperature=1, seed=7, stop=word, logprobs=True)
        assert whole.choices[0].message.content == text
        assert word not in "".join(entry.token for entry in whole.choices[0].logprobs.content)


def test_log_probabilities_come_with_their_tokens(client: Any) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token and entry.top_logprobs[0].logprob == entry.logprob <= 0
        assert bytes(entry.bytes).decode() == entry.token
    streamed_tokens = [
        entry.token
        for chunk in client.chat.completions.create(model="tiny", messages=HI, max_tokens=8, temperature=0, logprobs=True, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert streamed_tokens == [entry.token for entry in entries]


def test_an_answer_ends_where_the_context_does(served: tuple[OpenAiService, Any]) -> None:
    service, client = served
    answer = client.completions.create(model="tiny", prompt=[72] * 500, temperature=1, seed=1)
    assert answer.choices[0].finish_reason == "length" and answer.usage.total_tokens <= service.backend.context + 1


def test_a_models_own_errors_map_to_the_clients_classes(served: tuple[OpenAiService, Any]) -> None:
    service, client = served
    refused: list[tuple[dict[str, Any], Any, str]] = [
        ({"messages": [{"role": "user", "content": "x" * 4000}]}, openai.BadRequestError, f"and the context of {service.backend.context} must hold it"),
        ({"model": "gpt-4"}, openai.NotFoundError, "'gpt-4' is not served here, 'tiny' is"),
        ({"n": 3}, openai.BadRequestError, "n: 3 answers to one request: this server gives 1"),
        ({"messages": [{"role": "user", "content": "x" * 1_100_000}]}, openai.APIStatusError, "and at most 1048576 are taken"),
        ({"temperature": 9}, openai.BadRequestError, "temperature: 9 is not from 0 to 2"),
    ]
    for stream in (False, True):
        for asked, kind, message in refused:
            with pytest.raises(kind, match="Error code") as error:
                client.chat.completions.create(**{"model": "tiny", "messages": HI, "stream": stream, **asked})
            assert message in error.value.body["message"]
    assert error.value.status_code == 400
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="tiny", prompt=[72] * 600)
    assert error.value.code == "context_length_exceeded" and "600 tokens" in str(error.value)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_what_is_no_request_is_refused_in_words(served: tuple[OpenAiService, Any]) -> None:
    _, client = served
    with asking(str(client.base_url).removesuffix("/v1/"), headers={"authorization": "Bearer k"}) as plain:
        for body, message in ((b"{", "the body is not JSON"), (b"[]", "must be an object"), (b'{"prompt": NaN}', "NaN is not a JSON number")):
            reply = plain.post("/v1/completions", content=body)
            assert reply.status_code == 400 and message in reply.json()["error"]["message"]
        assert plain.get("/v1/nothing").status_code == 404 and plain.get("/v1/completions").status_code == 405
        assert plain.get("/v1/models", headers={"authorization": "Bearer x"}).status_code == 401
        assert plain.get("/health", headers={"authorization": ""}).json()["status"] == "ok"
        curl = {"messages": [{"role": "user", "content": "Is 7 a prime?"}], "max_tokens": 20, "temperature": 0.7}
        answer = plain.post("/v1/chat/completions", json=curl)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] <= 20
        text = plain.get("/metrics").text
        assert "limbeck_written_tokens_total" in text and 'limbeck_requests_total{path="/v1/chat/completions",status="200"}' in text


def test_events_end_with_done_and_usage_comes_when_asked(served: tuple[OpenAiService, Any]) -> None:
    _, client = served
    with asking(str(client.base_url), headers={"authorization": "Bearer k"}) as plain:
        for asked in ({}, {"stream_options": {"include_usage": True}}):
            reply = plain.post("chat/completions", json={"messages": HI, "max_tokens": 3, "stream": True, **asked})
            assert reply.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in reply.text.split("\n\n") if line]
            assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
            events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
            assert {event["object"] for event in events} == {"chat.completion.chunk"} and len({event["id"] for event in events}) == 1
            assert events[0]["choices"][0]["delta"]["role"] == "assistant"
            if asked:
                assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 3 and events[0]["usage"] is None
            else:
                assert all("usage" not in event for event in events)


def test_a_client_that_goes_away_frees_its_place_at_once(served: tuple[OpenAiService, Any]) -> None:
    service, client = served
    before = service.metrics.total("cancelled_total")
    streams = [client.chat.completions.create(model="tiny", messages=HI, max_tokens=400, temperature=1, stream=True) for _ in range(2)]
    for stream in streams:
        next(iter(stream))
        stream.close()
    wait_for(lambda: service.house.busy == 0 and service.house.admitted == 0, 3)
    wait_for(lambda: service.metrics.total("cancelled_total") == before + 2, 3)
    assert streamed(client, max_tokens=2)[2].completion_tokens == 2


# --- each backend alone


def test_a_folder_writes_what_generate_writes() -> None:
    backend = folder_backend()
    with service_of(backend) as (_, client):
        answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, temperature=0)
        assert answer.choices[0].text == generate("builtin:code-2m", PROMPT, tokens=24)
        with pytest.raises(openai.BadRequestError, match="nothing that this model's backend can do"):
            client.completions.create(model="tiny", prompt=PROMPT, frequency_penalty=1)
        with pytest.raises(openai.BadRequestError, match=r"chat_template_kwargs\.tokenize: is the server's business"):
            client.chat.completions.create(model="tiny", messages=HI, extra_body={"chat_template_kwargs": {"tokenize": True}})
    assert backend.close(10)


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{{ messages[0].nothing.at }}", "{% if %}", "{{ tools | tojson }}"])
def test_a_template_that_fails_is_a_refusal_however_it_fails(template: str) -> None:
    backend = folder_backend()
    backend._speaker.tokenizer.chat_template = template
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(300):
        schema = {"type": "object", "properties": {"a": schema}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    with service_of(backend) as (_, client), pytest.raises(openai.BadRequestError, match="the chat template of tiny refuses them"):
        client.chat.completions.create(model="tiny", messages=HI, tools=tools)
    assert backend.close(10)


def test_an_answer_keeps_the_space_that_its_tokenizer_takes_from_what_begins_a_text(stories260k: Path) -> None:
    prompt = "Once upon a"
    assert generate(stories260k, prompt, tokens=8).startswith(" time, there was")
    backend = TransformersBackend(open_speaker(str(stories260k)), "stories")
    with service_of(backend) as (_, client):
        answer = client.completions.create(model="stories", prompt=prompt, max_tokens=8, temperature=0, logprobs=0)
        chunks = list(client.completions.create(model="stories", prompt=prompt, max_tokens=8, temperature=0, stream=True))
        assert answer.choices[0].text.startswith(" time, there was") and "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert backend.close(10)


def test_a_tokenizer_that_is_larger_than_its_model_is_a_refusal(tmp_path: Path) -> None:
    speaker = open_speaker("builtin:code-2m")
    speaker.model.resize_token_embeddings(300)
    backend = TransformersBackend(speaker, "small")
    with service_of(backend) as (_, client), pytest.raises(openai.BadRequestError, match="is beyond the 300 that small has embeddings for"):
        client.completions.create(model="small", prompt="def reverse(", max_tokens=2)
    assert backend.close(10)


@needs_llama
def test_a_gguf_file_keeps_the_context_that_was_asked_for(tmp_path: Path) -> None:
    """llama.cpp's own context is a multiple of 256."""
    backend = gguf_backend(tmp_path, context=100, parallel=1)
    with service_of(backend, parallel=1) as (_, client):
        with pytest.raises(openai.BadRequestError, match="the prompt has 150 tokens, and the context of 100 must hold it"):
            client.completions.create(model="tiny", prompt=[72] * 150, max_tokens=2)
        answer = client.completions.create(model="tiny", prompt=[72] * 90, max_tokens=50, temperature=0)
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.choices[0].finish_reason) == (90, 10, "length")
        assert client.completions.create(model="tiny", prompt=[72] * 90, max_tokens=10, temperature=0).choices[0].text == answer.choices[0].text
    assert backend.close(10)


def test_an_empty_prompt_begins_a_text(served: tuple[OpenAiService, Any]) -> None:
    _, client = served
    answer = client.completions.create(model="tiny", prompt="", max_tokens=4, temperature=0)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1, 4) and answer.choices[0].text


def test_a_long_answer_does_not_hold_up_a_short_one() -> None:
    """Both go token by token by turns: a short answer that comes later ends when the long one has written about as much."""
    backend = folder_backend()
    with service_of(backend, parallel=2) as (_, client):
        long = iter(client.completions.create(model="tiny", prompt=PROMPT, max_tokens=160, temperature=1, stream=True))
        next(long)
        counts: list[int] = []
        done = threading.Event()

        def read() -> None:
            counts.append(sum(1 for _ in long))
            done.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0).usage.completion_tokens == 8
        assert not done.is_set(), "the short one had to wait for the long one"
        reader.join()
        assert counts[0] > 80
    assert backend.close(10)


def test_answers_by_turns_are_those_that_are_given_alone() -> None:
    backend = folder_backend()
    with service_of(backend, parallel=4) as (_, client):

        def one(seed: int) -> str:
            return client.completions.create(model="tiny", prompt=PROMPT[: 5 + seed], max_tokens=20, temperature=1, seed=seed).choices[0].text

        alone = [one(seed) for seed in range(4)]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(one, range(4))) == alone and len(set(alone)) == 4
    assert backend.close(10)


def test_without_a_chat_template_chats_are_refused(tmp_path: Path) -> None:
    backends: list[Any] = [TransformersBackend(open_speaker("builtin:code-2m"), "bare")]
    if find_spec("xllamacpp") is not None:
        backends.append(LlamaBackend(write_gguf(tmp_path / "bare.gguf", template=None), context=256, parallel=1, threads=1))
    for backend in backends:
        with service_of(backend) as (_, client):
            with pytest.raises(openai.BadRequestError, match="bare has no chat template: use /v1/completions"):
                client.chat.completions.create(model="bare", messages=HI)
            assert client.completions.create(model="bare", prompt="a", max_tokens=2).usage.completion_tokens == 2
        assert backend.close(10)


def test_a_base_model_chats_with_a_template_beside_it(tmp_path: Path) -> None:
    speaker = open_speaker("builtin:code-2m")
    speaker.tokenizer.chat_template = PLAIN
    backends: list[Any] = [TransformersBackend(speaker, "bare")]
    if find_spec("xllamacpp") is not None:
        backends.append(LlamaBackend(write_gguf(tmp_path / "bare.gguf", template=None), context=256, parallel=1, threads=1, template=PLAIN))
    talk = [{"role": "system", "content": "a"}, {"role": "user", "content": "b c"}]
    for backend in backends:
        with service_of(backend) as (_, client):
            said = client.chat.completions.create(model="bare", messages=talk, max_tokens=4, temperature=0)
            # The very text that the template makes.
            text = client.completions.create(model="bare", prompt="a\n\nb c", max_tokens=4, temperature=0)
            assert said.choices[0].message.content == text.choices[0].text and said.usage.prompt_tokens == text.usage.prompt_tokens
        assert backend.close(10)


@needs_llama
def test_llama_cpp_does_what_only_it_can(tmp_path: Path) -> None:
    backend = gguf_backend(tmp_path)
    with service_of(backend) as (_, client):
        schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object", "properties": {"a": {"const": 7}}, "required": ["a"]}}}
        answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=60, temperature=0, response_format=schema)
        assert json.loads(answer.choices[0].message.content) == {"a": 7}
        banned = client.completions.create(model="tiny", prompt="ab", max_tokens=30, temperature=1, logit_bias={str(ord("a") - 33): -100})
        assert banned.usage.completion_tokens == 30
        with pytest.raises(openai.BadRequestError, match=r"llama\.cpp refuses this request"):
            client.chat.completions.create(model="tiny", messages=HI, response_format={"type": "json_schema", "json_schema": {"schema": {"type": "zz"}}})
    assert backend.close(10) and not backend._folder.exists()


@needs_llama
def test_a_prompt_is_left_in_the_middle_when_its_client_goes(tmp_path: Path) -> None:
    """The prompt alone takes seconds; the slot is free again long before."""
    backend = LlamaBackend(write_gguf(tmp_path / "tiny.gguf", context=1 << 14), context=1 << 14, parallel=1, threads=1)
    with service_of(backend, parallel=1) as (service, client):
        prompt = [72 + i % 7 for i in range(14_000)]
        start = time.monotonic()
        client.completions.create(model="tiny", prompt=prompt, max_tokens=1)
        whole = time.monotonic() - start
        start = time.monotonic()
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=whole / 10).completions.create(model="tiny", prompt=prompt[::-1], max_tokens=1)
        wait_for(lambda: service.house.busy == 0)
        assert time.monotonic() - start < 0.6 * whole, "it was read to its end for nobody"
    assert backend.close(10)


# --- limits, and the end


class Slow:
    """A backend that writes a letter whenever it is told to."""

    name, context, takes, vocabulary = "slow", 100, frozenset[str](), 10

    def __init__(self) -> None:
        self.step, self.running, self.fails = threading.Semaphore(0), 0, False

    async def pieces(self, question: Question, caller: Caller) -> Any:
        self.running += 1
        try:
            for i in range(question.max_tokens):
                while not self.step.acquire(blocking=False):
                    await caller.wait_for(asyncio.sleep(0.005))
                if self.fails and i:
                    raise ValueError("a bug")
                yield Piece("a")
            yield Piece(finish="length", usage=Usage(1, question.max_tokens))
        finally:
            self.running -= 1

    def close(self, seconds: float) -> bool:
        return True


def test_more_than_the_queue_is_told_to_come_again() -> None:
    slow = Slow()
    with service_of(slow, parallel=1, queue=3) as (service, client), ThreadPoolExecutor(3) as pool:

        def ask() -> str:
            return client.completions.create(model="slow", prompt="a", max_tokens=3).choices[0].text

        answers = [pool.submit(ask) for _ in range(3)]
        wait_for(lambda: service.house.admitted == 3)
        assert slow.running == service.house.busy == 1, "one place, two that wait"
        with pytest.raises(openai.RateLimitError, match="3 requests are under way, and at most 3 are taken") as refused:
            ask()
        assert refused.value.response.headers["retry-after"].isdecimal()
        slow.step.release(9)
        assert [answer.result() for answer in answers] == ["aaa"] * 3
        slow.step.release(3)
        assert ask() == "aaa"


def test_what_fails_on_the_way_ends_the_stream_with_an_error() -> None:
    slow = Slow()
    slow.fails = True
    slow.step.release(99)
    with service_of(slow) as (service, client):
        with pytest.raises(openai.APIError, match=r"the server failed on this request \(ValueError\)"):
            list(client.completions.create(model="slow", prompt="a", max_tokens=3, stream=True))
        with pytest.raises(openai.InternalServerError, match="its log says where"):
            client.completions.create(model="slow", prompt="a", max_tokens=3)
        assert slow.running == service.house.busy == 0


@pytest.mark.parametrize("grace", [30.0, 0.2])
def test_a_stopped_server_finishes_what_runs_or_cuts_it_with_a_word(grace: float) -> None:
    slow = Slow()
    service = OpenAiService(slow, vocabulary=10, grace=grace)
    running = Serving(service.app, grace=grace + 2, stopping=service.stop)
    lines: list[str] = []

    def read() -> None:
        with asking(running.url) as plain, plain.stream("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 3, "stream": True}) as reply:
            lines.extend(line for line in reply.iter_lines() if line)

    reader = threading.Thread(target=read)
    reader.start()
    slow.step.release(1)
    wait_for(lambda: len(lines) > 0)
    stopper = threading.Thread(target=running.stop)
    stopper.start()
    wait_for(lambda: service.house.closed)
    if grace > 1:
        slow.step.release(9)
    stopper.join()
    reader.join()
    assert lines[-1] == "data: [DONE]" and slow.running == 0
    if grace > 1:
        assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length" and len(lines) == 5
    else:
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["message"] == "the server is shutting down"
    with pytest.raises(httpx2.HTTPError), asking(running.url) as plain:
        plain.get("/health")


# --- a LoRA generator


class Shifts:
    """Adapts by adding to the head's output: what it read decides which letter is written."""

    def __init__(self, model: Any):
        self._model, self.made = model, 0

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode()[:8])

    def acting(self, ids: tuple[int, ...]) -> Any:
        self.made += 1

        @contextmanager
        def acting() -> Iterator[None]:
            def shift(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
                return logits + 1e6 * torch.nn.functional.one_hot(torch.tensor(300 + sum(ids) % 100), logits.shape[-1])

            handle = self._model.get_output_embeddings().register_forward_hook(shift)
            try:
                yield
            finally:
                handle.remove()

        return acting


def test_a_run_of_a_lora_generator_speaks_with_the_lora_of_the_first_user_turn(tmp_path: Path) -> None:
    base_folder(tmp_path / "base")
    loop = {"steps": 1, "batch_tokens": 64, "microbatch": 2, "precision": "float32"}
    stages = {name: {**generating([{"kind": "ce"}], condition=kind), "loop": loop} for name, kind in (("reads", "base"), ("static", "none"))}
    home, _ = run(tmp_path, recipe_on(tmp_path, pool=None, deltas=None, generate=None, **stages))
    for stage in ("reads", "static"):
        student = open_generator(open_stage(home / stage), home / stage / "model", None, dtype=torch.float32)
        with torch.no_grad():
            for parameter in student.generator.parameters():
                parameter += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        student.save(home / stage / "model", tokenizer_source=TOKENIZER)
    texts = {}
    for stage, conditions in (("reads", ("pump: what?", "LEDGER: WHO?")), ("static", ("any",))):
        speaker = open_speaker(str(home / stage))
        speaker.tokenizer.chat_template = TEMPLATE
        backend = TransformersBackend(speaker, stage, context=100)
        with service_of(backend) as (_, client):
            for first in conditions:
                messages = [{"role": "system", "content": "s"}, {"role": "user", "content": first}]
                answer = client.chat.completions.create(model=stage, messages=messages, max_tokens=10, temperature=0)
                prompt = f"# system: s\n# user: {first}\n"
                reads = [first] if stage == "reads" else []
                texts[first] = answer.choices[0].message.content
                assert texts[first] == generate(home / stage, prompt, tokens=10, condition=reads)
                assert texts[first] != generate(tmp_path / "base", prompt, tokens=10), "no adapter acted"
            if stage == "reads":
                with pytest.raises(openai.BadRequestError, match="cannot read this conversation's first user turn"):
                    client.chat.completions.create(model=stage, messages=[{"role": "user", "content": ""}])
        assert backend.close(10)
    assert len(set(texts.values())) == 3


def test_a_conversation_makes_its_adapter_once() -> None:
    plain = open_speaker("builtin:code-2m")
    plain.tokenizer.chat_template = TEMPLATE
    shifts = Shifts(plain.model)
    backend = TransformersBackend(Speaker(plain.model, plain.tokenizer, shifts), "adapted", adapters=2)
    with service_of(backend, parallel=4) as (_, client):

        def ask(first: str, *more: str) -> str:
            turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate((first, *more))]
            messages = [{"role": "system", "content": "Be short."}, *turns]
            return client.chat.completions.create(model="adapted", messages=messages, max_tokens=6, temperature=0).choices[0].message.content

        a, b = ask("alpha"), ask("beta")
        assert a != b and ask("alpha", a, "and then?") == a and shifts.made == 2
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(ask, ["alpha", "beta"] * 4)) == [a, b] * 4
        assert shifts.made == 2
        ask("gamma")
        assert ask("alpha") == a and shifts.made == 4, "the one that was asked least lately is forgotten"
        with pytest.raises(openai.BadRequestError, match="hold no user's turn"):
            client.chat.completions.create(model="adapted", messages=[{"role": "system", "content": "a"}])
    assert backend.close(10)
