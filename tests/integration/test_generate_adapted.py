"""`limbeck generate` with a LoRA generator: the base writes with what was generated from what was read, and is the base again after."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from adapter_bases import QWEN3_NEXT
from adapter_cases import VOCABULARY, base_folder, changed_model, generating, recipe_on, run
from condition_cases import TOKENIZER
from families import stir, tiny_model
from limbeck.api import generate
from limbeck.cli.app import app
from limbeck.config.parts.surgeries import HybridizeOptions
from limbeck.data.conditions.store import ConditionSet
from limbeck.data.tokenizer import encode, prefix_ids
from limbeck.models.limbeck_model import wrap_student
from limbeck.models.loading import build_model, load_tokenizer, save_model
from limbeck.stages.adapting import open_generator, static_adapter
from limbeck.stages.generate import ADAPTED, BASE, Reads, continuations
from limbeck.stages.run import open_stage
from limbeck.students.generator.student import GeneratorStudent

PROMPT = "def reverse(items):\n"
ASKED = "pump: what red thing is number 6?"
OTHER = "LEDGER: WHAT BLACK THING IS NUMBER 10?"
TOKENS = 16
NARROW = {"head_dim": 8, "vocab_size": VOCABULARY, "eos_token_id": None, "bos_token_id": None}


def qwen3_next() -> Any:
    model = build_model({**QWEN3_NEXT, "vocab_size": VOCABULARY})
    stir(model)
    return model


def hybrid() -> Any:
    base = tiny_model("qwen3", num_hidden_layers=2, **NARROW)
    return wrap_student(base, [HybridizeOptions(mixer={"kind": "gated_deltanet"}, keep=(1,))], {"source": "tiny", "fingerprint": {}})


BASES = {"llama": None, "qwen3_next": qwen3_next, "hybrid": hybrid}


class Made:
    """A run of one step of a generator that reads and of one that does not, both then given other weights."""

    def __init__(self, home: Path, family: str):
        self.home, self.base = home, home / "base"
        make = BASES[family]
        base_folder(self.base) if make is None else save_model(make(), self.base, tokenizer_source=TOKENIZER)
        loop = {"steps": 1, "batch_tokens": 64, "microbatch": 2, "precision": "float32"}
        stages = {name: {**generating([{"kind": "ce"}], condition=kind), "loop": loop} for name, kind in (("reads", "base"), ("static", "none"))}
        self.run, _ = run(home, recipe_on(home, pool=None, deltas=None, generate=None, **stages))
        # The options of what is not yet trained: exactly what a first step would start from.
        self.fresh = home / "fresh"
        for folder in ("conditions", "reads", "static"):
            shutil.copytree(self.run / folder, self.fresh / folder)
        for name in ("recipe.json", "environment.json"):
            shutil.copy(self.run / name, self.fresh / name)
        for stage in ("reads", "static"):
            self.rewritten(self.run / stage, 0.5, (0 if stage == "reads" else 1))
            self.rewritten(self.fresh / stage, None)

    def student(self, stage: Path) -> GeneratorStudent:
        return open_generator(open_stage(stage), stage / "model", None, dtype=torch.float32)

    def rewritten(self, stage: Path, size: float | None, seed: int = 0) -> None:
        """Noise on every weight of a generator, or a new one."""
        student = self.student(stage)
        if size is None:
            facts = {"text_shape": student.text_shape, "base": student.base, "tokenizer": load_tokenizer(str(stage / "model"))}
            student = GeneratorStudent(student.model, student.options, **facts)
        else:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in student.generator.parameters():
                    parameter += size * torch.randn(parameter.shape, generator=generator)
        student.save(stage / "model", tokenizer_source=TOKENIZER)

    def text(self, stage: str = "reads", prompt: str = PROMPT, **more: Any) -> str:
        return generate(self.run / stage, prompt, tokens=TOKENS, condition=more.pop("texts", ()), **more)

    def conditions(self) -> ConditionSet:
        return ConditionSet(self.run / "conditions/conditions")

    def with_change(self, stage: str, ids: torch.Tensor | None) -> str:
        """What the base writes with the generated dW added to its weights."""
        student = self.student(self.run / stage)
        with torch.no_grad():
            adapters = static_adapter(student) if ids is None else student.generate(ids).detach()
        student.injector.remove()
        folder = self.home / "changed"
        save_model(changed_model(student.model, adapters, 0), folder, tokenizer_source=TOKENIZER)
        return generate(folder, PROMPT, tokens=TOKENS)


@pytest.fixture(scope="module", params=BASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("cli"), "llama")


def said(words: list[str]) -> str:
    result = CliRunner().invoke(app, ["generate", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_generator_before_its_first_step_writes_what_the_base_writes(made: Made) -> None:
    for drawn in ({}, {"temperature": 1.5, "seed": 3}):
        base = generate(made.base, PROMPT, tokens=TOKENS, **drawn)  # type: ignore[arg-type]
        assert len(base) > TOKENS // 2
        for stage in ("reads", "static"):
            assert generate(made.fresh / stage, PROMPT, tokens=TOKENS, **drawn) == base  # type: ignore[arg-type]


def test_the_base_writes_as_if_its_weights_were_changed(made: Made) -> None:
    """By a condition given as text, cut and padded by hand; by a name; and by a static LoRA."""
    tokenizer = load_tokenizer(TOKENIZER)
    long = ASKED + " And much more than twelve tokens of it."
    ids = torch.full((1, 2, 12), -1)
    for row, text in enumerate((long, "sum")):
        found = [*prefix_ids(tokenizer), *encode(tokenizer, [text])[0]][:12]
        ids[0, row, : len(found)] = torch.tensor(found)
    assert (ids[0, 0] >= 0).all() and (ids[0, 1] < 0).any()
    texts = {
        "by text": (made.text(texts=[long, "sum"]), made.with_change("reads", ids)),
        "static": (made.text("static"), made.with_change("static", None)),
        "by name": (made.text(named="ledger/all/upper"), made.with_change("reads", torch.from_numpy(made.conditions().texts.of(np.array([3]))))),
    }
    assert made.conditions().conditions[3].name == "ledger/all/upper"
    for words, (found, wanted) in texts.items():
        assert found == wanted, words
    assert len({found for found, _ in texts.values()}) == 3, "what is read makes no difference"


def test_what_is_read_decides_what_is_written_and_the_prompt_is_read_by_default(made: Made) -> None:
    one = made.text(texts=[ASKED])
    assert one == made.text(texts=[ASKED]) != made.text(texts=[OTHER])
    assert made.text() == made.text(texts=[PROMPT]) != one
    assert made.text(texts=[ASKED], temperature=1.5, seed=1) != made.text(texts=[ASKED], temperature=1.5, seed=2)


def test_the_adapter_acts_in_its_own_steps_only(made: Made) -> None:
    """Both writers share one base; read by turns, or left in the middle, they write what they write alone."""

    def parts() -> dict[str, Iterator[str]]:
        return continuations(str(made.run / "reads"), PROMPT, tokens=TOKENS, reads=Reads([ASKED]), compare=True)

    found: dict[str, str] = dict.fromkeys((ADAPTED, BASE), "")
    writers = parts()
    for _ in range(TOKENS):
        for title, pieces in writers.items():
            found[title] += next(pieces, "")
    base = generate(made.base, PROMPT, tokens=TOKENS)
    assert found == {ADAPTED: made.text(texts=[ASKED]), BASE: base} and found[ADAPTED] != base
    left = parts()
    next(left[ADAPTED])
    del left[ADAPTED]
    assert "".join(left[BASE]) == base


# -- the command line ------------------------------------------------------------------------------------------------------


def test_the_command_line_says_the_same(llama: Made) -> None:
    stage, short = str(llama.run / "reads"), ["--prompt", PROMPT, "--tokens", str(TOKENS)]
    file = llama.home / "asked.txt"
    file.write_text(ASKED + "\n")
    wanted = PROMPT + llama.text(texts=[ASKED]) + "\n"
    assert said([stage, *short, "--condition", ASKED]) == wanted
    assert said([stage, *short, "--condition-file", str(file)]) == wanted
    assert said([str(llama.run / "reads/model"), *short, "--condition", ASKED]) == wanted
    both = said([stage, *short, "--condition", OTHER, "--condition-file", str(file)])
    assert both == PROMPT + llama.text(texts=[OTHER, ASKED]) + "\n" != wanted
    base = said([str(llama.base), *short])
    assert said([stage, *short, "--condition", ASKED, "--compare"]) == f"--- {ADAPTED}\n{wanted}--- {BASE}\n{base}"
    assert said([stage, *short, "--named", "pump/all/plain"]) == PROMPT + llama.text(named="pump/all/plain") + "\n"
    assert said([str(llama.run / "static"), *short]) == PROMPT + llama.text("static") + "\n"


@pytest.mark.parametrize(
    ("stage", "words", "message"),
    [
        ("reads", [], "stage 'reads' trained a LoRA generator, which needs something to read: give --condition TEXT"),
        ("reads", ["--condition", "a", "--condition", "b", "--condition", "c"], "--condition: 3 texts, and this generator reads at most 2: give fewer"),
        ("reads", ["--condition", "a", "--condition", ""], "--condition: text 2 of 2 is empty"),
        ("reads", ["--named", "pump/all/plan"], "no condition 'pump/all/plan', did you mean 'pump/all/plain'"),
        ("reads", ["--named", "pump/all/plain", "--condition", "a"], "--named and --condition both say what is read: give one of them"),
        ("reads", ["--condition-file", "nowhere.txt"], "--condition-file nowhere.txt: cannot be read (No such file or directory)"),
        ("reads", ["--condition-file", "HOME/bytes"], "bytes: is no UTF-8 text (byte 1): give a text file"),
        ("static", ["--condition", "a"], "stage 'static' trained one LoRA for everything (condition: none), which reads nothing: leave out --condition"),
        ("static", ["--named", "pump/all/plain"], "which reads nothing: leave out --condition and --named"),
        ("../base", ["--condition", "a"], "holds no trained LoRA generator, and --condition is for one: leave it out, or name the stage"),
        ("../base", ["--named", "a"], "holds no trained LoRA generator, and --named is for one"),
        ("../base", ["--compare"], "holds no trained LoRA generator, and --compare is for one"),
        ("../alone", ["--condition", "a"], "name the generator's stage, RUN/STAGE: its run knows how it was made"),
    ],
)
def test_what_cannot_be_read_is_refused(llama: Made, stage: str, words: list[str], message: str) -> None:
    (llama.home / "bytes").write_bytes(b"a\xff")
    shutil.copytree(llama.run / "reads/model", llama.home / "alone", dirs_exist_ok=True)
    words = [word.replace("HOME", str(llama.home)) for word in words]
    result = CliRunner().invoke(app, ["generate", str(llama.run / stage), *words])
    assert result.exit_code == 2 and message in result.stderr, result.stderr
    assert result.stdout == "" and "Traceback" not in result.output


def test_an_empty_prompt_begins_a_text_and_is_refused_where_nothing_begins_one(llama: Made) -> None:
    assert llama.text(prompt="", texts=[ASKED]) not in ("", llama.text(texts=[ASKED]))
    folder = shutil.copytree(llama.base, llama.home / "unbegun")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": None}))
    result = CliRunner().invoke(app, ["generate", str(folder)])
    assert result.exit_code == 2 and "the prompt is empty and the tokenizer has no beginning-of-text token: give --prompt" in result.stderr
    assert result.stdout == ""
