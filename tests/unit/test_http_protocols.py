"""Four wire formats, one tensor: row j of an answer is the distribution after positions[j]."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from limbeck.config.parts.teachers import HttpTeacherOptions
from limbeck.needs import HeadHidden, TopK
from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.http.faults import BadReply
from limbeck.teachers.http.protocols import Protocol, protocol_of
from limbeck.teachers.http.protocols.base import check_rows
from limbeck.teachers.http.transport import Reply
from stub_teachers import VOCABULARY, StubTeacher, asks_for_tests, assert_same, expected

K = 9
NEED = TopK(K)
CASES = [("limbeck", ""), ("vllm", ""), ("sglang", "nested"), ("sglang", "flat"), ("sglang", "b64"), ("sglang", "b64_old"), ("seed", "")]


def made(name: str) -> Protocol:
    return protocol_of(HttpTeacherOptions(url="http://localhost:1", protocol=name, model="stub/model"))


def asked(protocol: Protocol, asks: list[Ask], need: TopK, stub: StubTeacher) -> Reply:
    """The stub's answer to the protocol's own request, without a socket."""
    path, body = protocol.request(asks, need)
    status, _, content, _ = asyncio.run(
        stub._answer({"method": "POST", "path": path or "/", "headers": []}, json.dumps(body).encode())
    )
    return Reply(status, {}, content, len(content))


def changed(reply: Reply, change: Any) -> Reply:
    """The reply with its JSON changed in place."""
    body = json.loads(reply.body)
    change(body)
    return Reply(200, {}, json.dumps(body).encode(), 0)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_every_protocol_gives_the_same_distribution(name: str, form: str) -> None:
    protocol, asks = made(name), asks_for_tests()
    answers = protocol.read(asked(protocol, asks, NEED, StubTeacher(form=form)), asks, NEED)
    assert_same(answers, [expected(ask, K, normalised=name in ("vllm", "sglang")) for ask in asks])
    # Whatever the zero point of the logits: the probabilities are one and the same.
    for ask, rows in zip(asks, answers, strict=True):
        true = expected(ask, K)
        np.testing.assert_allclose(rows.logits_mK - rows.log_z_mZ, true.logits_mK - true.log_z_mZ, atol=2e-6)


@pytest.mark.parametrize("name", ["limbeck", "seed"])
def test_partition_sums_come_for_each_temperature(name: str) -> None:
    protocol, asks, need = made(name), asks_for_tests(), TopK(K, (2.0, 1.0, 0.5))
    assert_same(protocol.read(asked(protocol, asks, need, StubTeacher()), asks, need), [expected(a, K, need.temperatures) for a in asks])


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize(("name", "form"), CASES)
def test_rows_that_are_shifted_are_not_what_is_expected(name: str, form: str, shift: int) -> None:
    """A server that is off by one is refused where its answer shows it, and else gives other tensors (the probe finds it)."""
    protocol, asks = made(name), asks_for_tests()
    reply = asked(protocol, asks, NEED, StubTeacher(form=form, shift=shift))
    try:
        answers = protocol.read(reply, asks, NEED)
    except BadReply:
        return
    with pytest.raises(AssertionError):
        assert_same(answers, [expected(ask, K, normalised=name in ("vllm", "sglang")) for ask in asks])


@pytest.mark.parametrize("form", ["nested", "flat", "b64"])
def test_sglang_rows_that_disagree_with_the_tokens_are_refused(form: str) -> None:
    # Tokens that are likely, so that they stand in their rows.
    ids = np.array([(7 * (p - 1) + 3) % VOCABULARY for p in range(12)], np.int32)
    asks = [Ask(ids, np.arange(11, dtype=np.int32))]
    protocol = made("sglang")
    assert protocol.read(asked(protocol, asks, NEED, StubTeacher(form=form)), asks, NEED)
    with pytest.raises(BadReply, match="not aligned"):
        protocol.read(asked(protocol, asks, NEED, StubTeacher(form=form, shift=1)), asks, NEED)


@pytest.mark.parametrize("drop", [0, 1])
def test_vllm_entries_that_moved_are_refused(drop: int) -> None:
    protocol, asks = made("vllm"), asks_for_tests()
    reply = asked(protocol, asks, NEED, StubTeacher())

    def move(body: Any) -> None:
        for choice in body["choices"]:
            entries = choice["prompt_logprobs"]
            entries.insert(len(entries) if drop else 1, entries.pop(drop))

    with pytest.raises(BadReply, match=r"null|token there"):
        protocol.read(changed(reply, move), asks, NEED)


def test_vllm_drops_the_own_token_by_its_rank_and_not_by_its_place() -> None:
    protocol, asks = made("vllm"), asks_for_tests(lengths=(12,), every=1)
    reply = asked(protocol, asks, NEED, StubTeacher())
    entries = [entry for entry in json.loads(reply.body)["choices"][0]["prompt_logprobs"] if entry]
    assert any(len(entry) == K + 1 for entry in entries), "the case that a slice of the dictionary gets wrong"
    sliced = np.array([[int(token) for token in list(entry)[:K]] for entry in entries])
    answers = protocol.read(reply, asks, NEED)
    assert (answers[0].ids_mK != sliced).any()
    assert_same(answers, [expected(asks[0], K, normalised=True)])


def test_vllm_ties_at_the_edge_leave_k() -> None:
    protocol, ask = made("vllm"), Ask(np.array([1, 2], np.int32), np.array([0], np.int32))
    entry = {str(t): {"logprob": value, "rank": rank} for t, value, rank in ((2, -2.0, 2), (7, -1.0, 1), (9, -2.0, 2))}
    body = {"choices": [{"index": 0, "prompt_logprobs": [None, entry]}]}
    rows = protocol.read(Reply(200, {}, json.dumps(body).encode(), 0), [ask], TopK(2))[0]
    assert rows.ids_mK.tolist()[0][0] == 7 and rows.ids_mK.tolist()[0][1] in (2, 9)
    assert rows.logits_mK.tolist() == [[-1.0, -2.0]]


def test_vllm_entries_that_lack_one_of_the_likeliest_are_refused() -> None:
    protocol, ask = made("vllm"), Ask(np.array([1, 2], np.int32), np.array([0], np.int32))
    entry = {str(t): {"logprob": value, "rank": rank} for t, value, rank in ((2, -5.0, 40), (7, -1.0, 1))}
    body = {"choices": [{"index": 0, "prompt_logprobs": [None, entry]}]}
    with pytest.raises(BadReply, match="1 of the 2 likeliest"):
        protocol.read(Reply(200, {}, json.dumps(body).encode(), 0), [ask], TopK(2))


def test_sglang_asks_only_for_what_follows_the_first_position() -> None:
    ask = Ask(np.arange(1, 11, dtype=np.int32), np.array([6, 8], np.int32))
    protocol = made("sglang")
    body = protocol.request([ask], NEED)[1]
    assert body["logprob_start_len"] == [6] and body["sampling_params"]["max_new_tokens"] == 0
    for form in ("nested", "b64", "b64_old"):
        assert_same(protocol.read(asked(protocol, [ask], NEED, StubTeacher(form=form)), [ask], NEED), [expected(ask, K, normalised=True)])


def test_a_request_asks_for_no_more_than_one_generated_token() -> None:
    body = made("vllm").request(asks_for_tests(), NEED)[1]
    assert body["max_tokens"] == 1 and body["temperature"] == 1.0 and body["prompt_logprobs"] == K


@pytest.mark.parametrize(("name", "form"), CASES)
def test_an_answer_that_is_cut_short_is_a_fault(name: str, form: str) -> None:
    protocol, asks = made(name), asks_for_tests()
    reply = asked(protocol, asks, NEED, StubTeacher(form=form))
    for length in (0, 1, len(reply.body) // 2, len(reply.body) - 1):
        with pytest.raises(BadReply):
            protocol.read(Reply(200, {}, reply.body[:length], length), asks, NEED)


@pytest.mark.parametrize("body", ["null", "[]", "{}", '"x"', '{"choices": 3}', '{"logits": {}}', "[[1]]", '{"choices": [null]}', '[{"meta_info": 1}]'])
@pytest.mark.parametrize("name", ["vllm", "sglang", "seed", "limbeck"])
def test_json_of_another_shape_is_a_fault(name: str, body: str) -> None:
    with pytest.raises(BadReply):
        made(name).read(Reply(200, {}, body.encode(), 0), asks_for_tests(), NEED)


def spoilt(rows: TopKRows, **changes: Any) -> TopKRows:
    return TopKRows(**{"ids_mK": rows.ids_mK, "logits_mK": rows.logits_mK, "log_z_mZ": rows.log_z_mZ, **changes})


def test_every_answer_is_held_against_what_a_distribution_is() -> None:
    ask = asks_for_tests()[0]
    good = expected(ask, K)
    check_rows(good, ask, NEED, VOCABULARY)
    nan = good.logits_mK.copy()
    nan[1, 2] = np.nan
    outside = good.ids_mK.copy()
    outside[0, 0] = VOCABULARY
    wrong = {
        "values where": spoilt(good, ids_mK=good.ids_mK[:, 1:], logits_mK=good.logits_mK[:, 1:]),
        "ids and": spoilt(good, ids_mK=good.ids_mK[1:]),
        "logZ": spoilt(good, log_z_mZ=good.log_z_mZ[:, :0]),
        "finite": spoilt(good, logits_mK=nan),
        "vocabulary of": spoilt(good, ids_mK=outside),
        "order": spoilt(good, logits_mK=good.logits_mK[:, ::-1]),
        "add up": spoilt(good, log_z_mZ=good.log_z_mZ - 3),
    }
    for words, rows in wrong.items():
        with pytest.raises(BadReply, match=words):
            check_rows(rows, ask, NEED, VOCABULARY)
    with pytest.raises(BadReply, match="samples"):
        check_rows(good, ask, TopK(K, samples=4), VOCABULARY)


def test_options_say_before_loading_what_a_protocol_cannot_do() -> None:
    def provides(need: Any, **options: Any) -> Any:
        return HttpTeacherOptions(url="http://x", **options).provides(need)

    assert provides(TopK(8, (1.0, 2.0), samples=3)) is True
    assert provides(TopK(8, (1.0, 2.0)), protocol="seed") is True
    for protocol in ("vllm", "sglang"):
        assert provides(TopK(8), protocol=protocol) is True
        assert "allow_approximate_tail" in str(provides(TopK(8, (2.0,)), protocol=protocol))
        assert provides(TopK(8, (2.0,), exact=False), protocol=protocol) is True
        assert "samples" in str(provides(TopK(8, samples=2), protocol=protocol))
    assert "topk_kl" in str(provides(HeadHidden()))
    for bad in ({"protocol": "vllm", "launch": {}}, {"launch": {}, "model": "m"}, {"token_env": "sk-secret"}, {"in_flight": 0}):
        with pytest.raises(ValueError):
            HttpTeacherOptions(url="http://x", **bad)
