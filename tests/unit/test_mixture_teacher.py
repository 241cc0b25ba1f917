"""A mixture asks each teacher about its own documents, and nobody else's."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from limbeck.config.parts.teachers import MixtureTeacherOptions
from limbeck.errors import TeacherError
from limbeck.needs import AttentionStream, TopK
from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.mixture import MixtureTeacher
from limbeck.types import IGNORE, Batch

NEED = TopK(2)
OPTIONS = {"kind": "local", "model": "x"}


class Constant:
    """A teacher whose every answer is its own number."""

    module = None

    def __init__(self, number: int, *, answers: bool = True):
        self.number, self.answers = number, answers
        self.asked: list[Ask] = []

    def ask(self, asks: Sequence[Ask], need: TopK, *, alone: bool = False) -> list[TopKRows | None]:
        self.asked += asks
        if not self.answers:
            return [None] * len(asks)
        shape = [(len(ask.positions), need.k) for ask in asks]
        return [
            TopKRows(np.full(s, self.number, np.int32), np.full(s, self.number, np.float32), np.zeros((s[0], 1), np.float32)) for s in shape
        ]

    def fingerprint(self) -> dict[str, Any]:
        return {"number": self.number}


def batch() -> Batch:
    """One row of three documents of domains 0, 1 and 0."""
    documents_BT = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]])
    ids_BT = torch.arange(8)[None] + 10
    labels_BT = torch.where(documents_BT == torch.roll(documents_BT, -1), torch.roll(ids_BT, -1, 1), IGNORE)
    labels_BT[0, -1] = IGNORE
    positions_BT = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1]])
    return Batch(ids_BT, labels_BT, positions_BT, documents_BT, domains_BT=(documents_BT == 1).long())


def mixture(teachers: dict[str, Any], default: str | None = None) -> MixtureTeacher:
    options = MixtureTeacherOptions(teachers=dict.fromkeys(teachers, OPTIONS), default=default)
    built = MixtureTeacher(options, teachers)
    built.domains = ["text", "code"]
    return built


def test_documents_go_to_the_teacher_of_their_domain() -> None:
    text, code = Constant(3), Constant(4)
    answered, signal = mixture({"text": text, "code": code}).submit(batch(), {TopK: NEED}).result()
    assert signal[TopK].rows_n.tolist() == [0, 1, 3, 4, 6]
    assert signal[TopK].ids_nK[:, 0].tolist() == [3, 3, 4, 4, 3]
    assert [len(t.asked) for t in (text, code)] == [2, 1]
    assert answered.answered_BT is None


def test_a_network_in_this_process_takes_its_turn_and_teachers_elsewhere_are_asked_beside_it() -> None:
    class Watched(Constant):
        def ask(self, *args: Any, **kwargs: Any) -> list[TopKRows | None]:
            self.thread = threading.get_ident()
            return super().ask(*args, **kwargs)

    class Network(Watched):
        def score(self) -> None: ...

    here, there = Network(1), Watched(2)
    teacher = mixture({"text": here, "code": there})
    teacher.submit(batch(), {TopK: NEED}).result()
    assert here.thread == threading.get_ident() != there.thread


def test_a_mixture_in_a_mixture_is_refused() -> None:
    inner = {"kind": "mixture", "teachers": {"code": OPTIONS}}
    with pytest.raises(ValidationError, match=r"teachers\.text is a mixture itself"):
        MixtureTeacherOptions(teachers={"text": inner})


def test_a_domain_without_a_teacher_goes_to_the_default_or_is_an_error() -> None:
    text = Constant(3)
    _, signal = mixture({"text": text}, default="text").submit(batch(), {TopK: NEED}).result()
    assert len(signal[TopK].rows_n) == 5
    with pytest.raises(TeacherError, match=r"no teacher for the domain 'code'.*default"):
        mixture({"text": text}).submit(batch(), {TopK: NEED})
    with pytest.raises(ValidationError, match="names 'nobody'"):
        MixtureTeacherOptions(teachers={"text": OPTIONS}, default="nobody")


def test_what_one_teacher_leaves_out_is_masked_and_the_rest_stays() -> None:
    answered, signal = mixture({"text": Constant(3), "code": Constant(4, answers=False)}).submit(batch(), {TopK: NEED}).result()
    assert signal[TopK].rows_n.tolist() == [0, 1, 6]
    assert answered.signal_mask_BT.flatten().nonzero().squeeze(1).tolist() == [0, 1, 6]
    assert int(answered.label_mask_BT.sum()) == 5


def test_its_fingerprint_changes_with_any_of_its_teachers() -> None:
    one, other = (mixture({"text": Constant(3), "code": Constant(n)}).fingerprint() for n in (4, 5))
    assert one != other


def test_it_says_which_teacher_cannot_do_what_is_needed() -> None:
    options = MixtureTeacherOptions(teachers={"text": OPTIONS, "code": {"kind": "http", "url": "http://x", "protocol": "vllm"}})
    assert options.provides(TopK(8)) is True
    assert "code" in str(options.provides(TopK(8, (2.0,))))
    assert "TopK" in str(options.provides(AttentionStream()))


def test_domains_come_from_the_sources_through_the_data(tmp_path: Path) -> None:
    from limbeck.config.parts.stages import DataOptions
    from limbeck.data.dataset import TokenRows
    from limbeck.data.prepare import prepare

    for name in ("prose", "code"):
        (tmp_path / name).mkdir()
        for number in range(12):
            (tmp_path / name / f"{number}.txt").write_text(f"{name} number {number} " * (5 + number))
    source = [{"kind": "text", "path": "prose"}, {"kind": "text", "path": "code", "domain": "code"}]
    options = DataOptions.model_validate({"source": source, "tokenizer": {"vocabulary": 300}, "sequence": 32, "held_out": 0.0})
    prepare(options, tmp_path / "data", tokenizer=None, base_dir=tmp_path)
    rows = TokenRows(tmp_path / "data", "train")
    assert rows.info.domains == ["text", "code"]
    whole = rows.batch(range(len(rows)))
    assert whole.domains_BT is not None
    from limbeck.models.loading import load_tokenizer

    tokenizer = load_tokenizer(str(tmp_path / "data" / "tokenizer"))
    for row in range(len(rows)):
        for document in set(whole.documents_BT[row].tolist()) - {-1}:
            here = whole.documents_BT[row] == document
            domains = set(whole.domains_BT[row][here].tolist())
            assert len(domains) == 1
            text = tokenizer.decode(whole.input_ids_BT[row][here])
            word = "code" if "code" in text else "prose" if "prose" in text else None
            if word is not None:
                assert rows.info.domains[domains.pop()] == ("code" if word == "code" else "text")
    assert replace(whole, domains_BT=None).split(2)[0].domains_BT is None
