"""Questions to a served teacher are on their way together."""

from __future__ import annotations

import time

from limbeck.config.parts.teachers import HttpTeacherOptions
from limbeck.needs import TopK
from limbeck.teachers.http.teacher import HttpTeacher
from stub_teachers import StubTeacher, batch_for_tests, served

LATENCY, QUESTIONS = 1.2, 8


def seconds(teacher: HttpTeacher, questions: int) -> float:
    """Until all of so many micro-batches are answered."""
    batches = [batch_for_tests(seed, rows=1) for seed in range(questions)]
    start = time.monotonic()
    for pending in [teacher.submit(batch, {TopK: TopK(8)}) for batch in batches]:
        _, signal = pending.result()
        assert len(signal[TopK].ids_nK)
    return time.monotonic() - start


def test_eight_questions_take_at_most_one_and_a_half_times_as_long_as_one() -> None:
    stub = StubTeacher()
    with served(stub) as url:
        teacher = HttpTeacher(HttpTeacherOptions(url=url, in_flight=QUESTIONS, canary_every=0))
        teacher.load("cpu")
        try:
            stub.delay = LATENCY
            one, eight = seconds(teacher, 1), seconds(teacher, QUESTIONS)
        finally:
            teacher.close()
    assert one >= LATENCY and stub.most_running == QUESTIONS
    assert eight <= 1.5 * one, f"{QUESTIONS} took {eight:.2f} s and one {one:.2f} s"
