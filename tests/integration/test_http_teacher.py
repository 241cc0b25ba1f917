"""The `http` teacher against servers on loopback: probe, faults, fault policies, canary, command line."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from integration.faults import FaultyApp
from integration.serving import Serving
from limbeck.cli.app import app
from limbeck.config.parts.teachers import HttpTeacherOptions
from limbeck.errors import TeacherError
from limbeck.models.loading import resolve_source
from limbeck.needs import TopK
from limbeck.serve.teacher import TeacherService
from limbeck.teachers.documents import Ask
from limbeck.teachers.http.faults import Backoff
from limbeck.teachers.http.teacher import HttpTeacher
from limbeck.teachers.scoring import Scorer
from limbeck.types import IGNORE, TopKSignal
from stub_teachers import VOCABULARY, StubTeacher, asks_for_tests, assert_same, batch_for_tests, expected, free_port, served

K = 8
NEEDS = {TopK: TopK(K)}
PROTOCOLS = ["limbeck", "vllm", "sglang", "seed"]


def opened(url: str, protocol: str = "limbeck", **options: Any) -> HttpTeacher:
    chosen = HttpTeacherOptions(url=url, protocol=protocol, **options)
    teacher = HttpTeacher(chosen, backoff=Backoff(base=0.01, cap=0.05, random=random.Random(0)))
    teacher.load(torch.device("cpu"))
    return teacher


def rows_of(signal: Any) -> TopKSignal:
    found = signal[TopK]
    assert isinstance(found, TopKSignal)
    return found


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_probe_tells_what_a_server_can_do(protocol: str) -> None:
    with served(StubTeacher()) as url:
        teacher = opened(url, protocol)
        text = "\n".join(teacher.summary)
        assert "row j is the distribution after position j" in text and "latency p50" in text and "bytes a token" in text
        assert {"limbeck": "k at most 100", "vllm": "k at most 64 (--max-logprobs)"}.get(protocol, "k at most not told") in text
        assert ("T = 1 only" in text) == (protocol in ("vllm", "sglang"))
        assert protocol == "seed" or "stub/model" in text
        teacher.close()


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_that_is_off_by_one_is_refused(protocol: str, shift: int) -> None:
    with served(StubTeacher(shift=shift)) as url, pytest.raises(TeacherError, match=r"off by|not aligned|add up"):
        opened(url, protocol, patience=0.2)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_signal_is_the_teachers_distribution_at_every_counted_position(protocol: str) -> None:
    batch = batch_for_tests(rows=3, length=12)
    with served(StubTeacher()) as url:
        teacher = opened(url, protocol)
        same, signal = teacher.submit(batch, NEEDS).result()
        found = rows_of(signal)
        teacher.close()
    assert same is batch
    assert torch.equal(found.rows_n, batch.signal_mask_BT.flatten().nonzero().flatten())
    ids = batch.input_ids_BT.numpy()
    true = [expected(Ask(ids[row].astype(np.int32), np.arange(11, dtype=np.int32)), K) for row in range(3)]
    np.testing.assert_array_equal(found.ids_nK.numpy(), np.concatenate([rows.ids_mK for rows in true]))
    np.testing.assert_allclose(
        (found.logits_nK - found.log_z_nZ).numpy(), np.concatenate([rows.logits_mK - rows.log_z_mZ for rows in true]), atol=2e-6
    )


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_tenth_of_faults_changes_no_answer(protocol: str) -> None:
    stub = StubTeacher(form="nested")
    kinds = ("500", "429", "reset", "stall", "truncated", "cut", "wrong_k", "nan")
    faulty = FaultyApp(stub, 0.1, kinds, seed=3, stall_seconds=30)
    batches = [batch_for_tests(seed) for seed in range(60)]

    def train(url: str) -> list[TopKSignal]:
        teacher = opened(url, protocol, timeout=0.5, patience=60)
        pending = [teacher.submit(batch, NEEDS) for batch in batches]
        found = [rows_of(answer.result()[1]) for answer in pending]
        teacher.close()
        return found

    with served(stub) as url:
        plain = train(url)
    with served(faulty) as url:
        spoilt = train(url)
    assert sum(faulty.injected.values()) >= 4, faulty.injected
    for a, b in zip(plain, spoilt, strict=True):
        assert torch.equal(a.ids_nK, b.ids_nK) and torch.equal(a.logits_nK, b.logits_nK) and torch.equal(a.log_z_nZ, b.log_z_nZ)


@pytest.mark.parametrize("kind", ["500", "429", "reset", "truncated", "cut", "wrong_k", "nan"])
def test_every_kind_of_fault_is_got_over(kind: str) -> None:
    stub, asks = StubTeacher(), asks_for_tests()
    faulty = FaultyApp(stub, 0.0, (kind,), seed=1)
    with served(faulty) as url:
        teacher = opened(url, timeout=5)
        faulty.rate = 0.5
        for _ in range(6):
            assert_same(teacher.ask(asks, TopK(K)), [expected(ask, K) for ask in asks])
        assert teacher.metrics()["retries"] >= 1
        teacher.close()


@pytest.mark.parametrize("policy", ["skip", "ce_only"])
def test_what_was_not_answered_is_masked(policy: str) -> None:
    batch = batch_for_tests(rows=3)
    second = batch.input_ids_BT[1].tolist()
    stub = StubTeacher()
    with served(stub) as url:
        teacher = opened(url, on_failure=policy, patience=0.1, tokens_per_request=1)
        stub.before = lambda body: (500, "no", {}) if body["sequences"] == [second] else None
        masked, signal = teacher.submit(batch, NEEDS).result()
        found = rows_of(signal)
        teacher.close()
    assert masked.signal_mask_BT[[0, 2], :-1].all() and not masked.signal_mask_BT[1].any()
    assert torch.equal(found.rows_n, masked.signal_mask_BT.flatten().nonzero().flatten())
    labels_left = (masked.labels_BT[1] != IGNORE).sum()
    assert labels_left == (0 if policy == "skip" else 15)
    assert teacher.metrics()["left_out"] == 1


def test_an_unreachable_teacher_ends_within_seconds_and_says_what_to_do() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    start = time.monotonic()
    done = CliRunner().invoke(app, ["doctor", "--teacher", url])
    assert done.exit_code == 2 and time.monotonic() - start < 8
    assert f"Failed to connect to teacher endpoint: {url}" in done.output and "limbeck teach MODEL" in done.output


def test_doctor_prints_what_the_probe_found() -> None:
    with served(StubTeacher()) as url:
        done = CliRunner().invoke(app, ["doctor", "--teacher", url, "--protocol", "sglang"])
    assert done.exit_code == 0, done.output
    assert "stub/model" in done.output and "row j is the distribution after position j" in done.output


def test_doctor_takes_words_for_the_protocol_only_from_the_list() -> None:
    done = CliRunner().invoke(app, ["doctor", "--teacher", "http://127.0.0.1:1", "--protocol", "trl"])
    assert done.exit_code == 2 and "limbeck" in done.output


def test_an_address_that_is_none_is_said() -> None:
    for url in ("127.0.0.1:8100", "ftp://x", "http://"):
        with pytest.raises(TeacherError, match=r"teacher\.url"):
            opened(url)


def test_a_swapped_model_is_noticed() -> None:
    for protocol in ("limbeck", "vllm", "sglang", "seed"):
        stub = StubTeacher()
        with served(stub) as url:
            teacher = opened(url, protocol, canary_every=2)
            first = teacher.fingerprint()
            batch = batch_for_tests()
            for _ in range(4):
                teacher.signal(batch, NEEDS)
            stub.model = 1
            with pytest.raises(TeacherError, match=r"has changed|fingerprint was"):
                for _ in range(40):
                    teacher.signal(batch, NEEDS)
            teacher.close()
            again = opened(url, protocol)
            assert again.fingerprint() != first
            again.close()


def test_the_same_model_elsewhere_has_the_same_fingerprint() -> None:
    for protocol in PROTOCOLS:
        found = []
        for _ in range(2):
            with served(StubTeacher()) as url:
                teacher = opened(url, protocol)
                found.append(teacher.fingerprint())
                teacher.close()
        assert found[0] == found[1]


def test_more_than_the_server_gives_is_refused_with_its_setting() -> None:
    with served(StubTeacher(max_logprobs=20)) as url:
        teacher = opened(url, "vllm")
        with pytest.raises(TeacherError, match=r"k = 20 at most.*--max-logprobs 32"):
            teacher.submit(batch_for_tests(), {TopK: TopK(32)})
        teacher.close()


def test_requests_are_no_larger_than_the_server_says() -> None:
    stub = StubTeacher(max_tokens=50)
    with served(stub) as url:
        teacher = opened(url)
        rows_of(teacher.signal(batch_for_tests(rows=7), NEEDS))
        teacher.close()
    assert teacher.pipeline.counts["split"] == 0 and {len(body["sequences"]) for body in stub.bodies[-3:]} == {3, 1}


def test_a_model_that_is_not_served_is_named() -> None:
    with served(StubTeacher()) as url, pytest.raises(TeacherError, match="no model 'stub/modle', did you mean 'stub/model'"):
        opened(url, "vllm", model="stub/modle")


def test_a_token_comes_from_the_environment_and_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = StubTeacher()
    stub.token = "very-secret-word"
    with served(stub) as url:
        with pytest.raises(TeacherError, match=r"TEACHER_TOKEN is not set"):
            opened(url, token_env="TEACHER_TOKEN")
        monkeypatch.setenv("TEACHER_TOKEN", "wrong-secret")
        with pytest.raises(TeacherError, match="401: wrong token") as refused:
            opened(url, token_env="TEACHER_TOKEN")
        assert "wrong-secret" not in str(refused.value) and "token_env" in str(refused.value)
        monkeypatch.setenv("TEACHER_TOKEN", "very-secret-word")
        teacher = opened(url, token_env="TEACHER_TOKEN")
        stub.before = lambda body: (400, "you sent very-secret-word", {})
        with pytest.raises(TeacherError) as refused:
            teacher.signal(batch_for_tests(), NEEDS)
        assert "very-secret-word" not in str(refused.value) + repr(teacher.fingerprint()) + "".join(teacher.summary)
        teacher.close()


def test_a_name_and_password_in_the_url_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_PASSWORD", "hidden")
    with pytest.raises(TeacherError) as refused:
        opened(f"http://me:${{env:TEACHER_PASSWORD}}@127.0.0.1:{free_port()}")
    assert "hidden" not in str(refused.value) and "Failed to connect" in str(refused.value)


def test_a_temperature_that_a_server_does_not_know_leaves_the_one_it_does() -> None:
    with served(StubTeacher()) as url:
        teacher = opened(url, "vllm")
        found = rows_of(teacher.signal(batch_for_tests(), {TopK: TopK(K, (2.0,), exact=False)}))
        assert found.temperatures == (1.0,) and found.log_z_nZ.shape == (30, 1)
        teacher.close()


@pytest.mark.parametrize(
    ("cause", "words"), [({"in_flight": 1}, "in_flight"), ({"max_bytes": 1}, "max_bytes"), ({"in_flight": 32}, "lookahead")]
)
def test_advice_names_the_setting_that_holds_things_up(cause: dict[str, Any], words: str) -> None:
    with served(StubTeacher(delay=0.1)) as url:
        teacher = opened(url, **cause)
        pending = [teacher.submit(batch_for_tests(), NEEDS) for _ in range(6)]
        for answer in pending:
            answer.result()
        assert words in teacher.advice() and "\n" not in teacher.advice()
        teacher.close()


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    scorer = Scorer(resolve_source("builtin:code-2m"))
    scorer.load("cpu")
    return scorer


@contextmanager
def taught(scorer: Scorer, port: int = 0, **limits: Any) -> Iterator[Serving]:
    service = TeacherService(scorer, "builtin:code-2m", **limits)
    server = Serving(service.app, port=port, stopping=service.worker.close)
    try:
        yield server
    finally:
        server.stop()


def test_limbeck_teach_is_asked_for_what_the_model_itself_gives(scorer: Scorer) -> None:
    rng = np.random.default_rng(0)
    asks = [Ask(rng.integers(0, 4096, n).astype(np.int32), np.arange(n - 1, dtype=np.int32)) for n in (30, 7, 50)]
    need = TopK(16, (2.0, 1.0), samples=5)
    with taught(scorer) as server:
        teacher = opened(server.url, seed=9)
        answers = teacher.ask(asks, need)
        assert teacher.fingerprint() == scorer.fingerprint()
        assert "row j is the distribution after position j" in "".join(teacher.summary)
        alone = teacher.ask(asks, need, alone=True)
        teacher.close()
    for found, true in ((answers, scorer.score(asks, need, seed=9)), (alone, [scorer.score([ask], need, seed=9)[0] for ask in asks])):
        for a, b in zip(found, true, strict=True):
            assert a is not None and a.samples_mS is not None and b.samples_mS is not None
            for x, y in ((a.ids_mK, b.ids_mK), (a.logits_mK, b.logits_mK), (a.log_z_mZ, b.log_z_mZ), (a.samples_mS, b.samples_mS)):
                assert x.tobytes() == y.tobytes()


def test_whole_logits_of_limbeck_teach_are_the_same_distribution(scorer: Scorer) -> None:
    asks, need = asks_for_tests(), TopK(16, (1.0, 2.0))
    with taught(scorer, max_values=400_000) as server:
        teacher = opened(server.url + "/v1/completions", "seed")
        assert_same(teacher.ask(asks, need), scorer.score(asks, need), tolerance=1e-5)
        teacher.close()


def test_a_server_that_is_killed_and_restarted_gives_the_same_bits(scorer: Scorer) -> None:
    batches = [batch_for_tests(seed, rows=4, length=24) for seed in range(12)]
    port = free_port()

    def train(restart: bool) -> list[TopKSignal]:
        found: list[TopKSignal] = []
        first = taught(scorer, port)
        server = first.__enter__()
        teacher = opened(server.url, in_flight=2, tokens_per_request=48)
        pending = [teacher.submit(batch, NEEDS) for batch in batches]
        found += [rows_of(answer.result()[1]) for answer in pending[:3]]
        if restart:
            first.__exit__(None, None, None)
            time.sleep(0.3)
            first = taught(scorer, port)
            first.__enter__()
        found += [rows_of(answer.result()[1]) for answer in pending[3:]]
        teacher.close()
        first.__exit__(None, None, None)
        return found

    for a, b in zip(train(False), train(True), strict=True):
        assert torch.equal(a.ids_nK, b.ids_nK) and torch.equal(a.logits_nK, b.logits_nK) and torch.equal(a.log_z_nZ, b.log_z_nZ)


FAKE_VLLM = """#!{python}
import json, sys
sys.path[:0] = {path!r}
from stub_teachers import StubTeacher
import uvicorn
words = sys.argv[1:]
if "--fail" in words:
    print("no such GPU")
    sys.exit(3)
json.dump(words, open({record!r}, "w"))
uvicorn.run(StubTeacher(max_logprobs=int(words[words.index("--max-logprobs") + 1])), host=words[words.index("--host") + 1],
            port=int(words[words.index("--port") + 1]), log_level="critical", lifespan="off")
"""


def test_a_launched_server_lives_as_long_as_the_teacher(tmp_path: Path) -> None:
    program, record = tmp_path / "vllm", tmp_path / "words.json"
    tests = Path(__file__).parents[1]
    program.write_text(FAKE_VLLM.format(python=sys.executable, path=[str(tests), str(tests.parent / "src")], record=str(record)))
    program.chmod(0o755)
    url = f"http://127.0.0.1:{free_port()}"
    block = {"command": str(program), "devices": [0, 1], "tensor_parallel": 2, "max_logprobs": 48, "wait": 120}
    teacher = opened(url, "vllm", model="stub/model", launch=block)
    words = json.loads(record.read_text())
    assert words[:2] == ["serve", "stub/model"] and words[words.index("--tensor-parallel-size") + 1] == "2"
    assert teacher.findings.k_limit == 48
    teacher.signal(batch_for_tests(), NEEDS)
    process = teacher._launched.process if teacher._launched else None
    teacher.close()
    assert isinstance(process, subprocess.Popen) and process.poll() is not None
    with pytest.raises(TeacherError, match=r"ended with code 3:\nno such GPU"):
        opened(url, "vllm", model="stub/model", launch={**block, "arguments": ["--fail"]})
    with pytest.raises(TeacherError, match=r"teacher\.launch\.command"):
        opened(url, "vllm", model="stub/model", launch={"command": "no-such-vllm"})


def test_ids_of_the_probe_exist_in_every_vocabulary() -> None:
    from limbeck.teachers.http.probe import canary_asks

    for vocabulary in (16, VOCABULARY, None):
        plain, changed = canary_asks(vocabulary)
        assert plain.ids.max() < (vocabulary or 64) and (plain.ids != changed.ids).sum() == 1
