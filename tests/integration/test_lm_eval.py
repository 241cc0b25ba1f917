"""lm-evaluation-harness on students: its numbers are those of a plain forward pass, alone or in batches, and of its own model class."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from harness_cases import CHAT, CHOICES, saved, task_files
from limbeck.api import generate
from limbeck.cli.app import app
from limbeck.errors import RunError
from limbeck.export.native import write_native
from limbeck.models.loading import load_model, load_tokenizer

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'limbeck[lm-eval]'")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager, manager

from limbeck.evaluation.harness import LoadedLM, Tasks, run_tasks, spoken

KINDS = ("plain", "hybrid", "window", "ternary")
STARTS = ["def f(x):\n    return", "", "import os\n" * 5, "a", "for item in items:\n    yield"]
PAIRS = [(start, choice) for start in STARTS for choice in CHOICES]
CUT = [("import os\nimport", " sys"), ("import os", "\nimport sys"), ("import", " os\nimport re"), ("import os\nimport", " re")]
"""One input, cut at different places."""
TEXTS = ["x", "import re\n" * 3, "def f(x):\n    return x + 1\n" * 12, "class A:\n    pass\n" * 5]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def no_network() -> Iterator[None]:
    def refuse(self: Any, address: Any) -> None:
        raise AssertionError(f"asked the network: {address}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        # One folder of the harness's own tasks: reading all of them takes half a minute.
        patch.setattr(manager, "__file__", str(Path(manager.__file__).parent / "arc" / "manager.py"))
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    for kind in (*KINDS, "native"):
        saved(kind, folder / kind)
    task_files(folder)
    return folder


def opened(folder: Path, **options: Any) -> LoadedLM:
    return LoadedLM(load_model(str(folder)), load_tokenizer(str(folder)), **options)


def asked(kind: str, *args: Any) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(args)]  # type: ignore[arg-type]


def answers(lm: Any) -> tuple[list[float], list[bool], list[float], list[str]]:
    """Of every kind of request: sums, whether greedy, sums of whole texts, and what is written."""
    pairs = lm.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    texts = lm.loglikelihood_rolling(asked("loglikelihood_rolling", *((text,) for text in TEXTS)), disable_tqdm=True)
    stops = {"until": ["\n\n\n"], "max_gen_toks": 10}
    written = lm.generate_until(asked("generate_until", *((start, stops) for start in STARTS if start)), disable_tqdm=True)
    return [float(value) for value, _ in pairs], [greedy for _, greedy in pairs], [float(value) for value in texts], written


@torch.no_grad()
def scores(model: Any, ids: list[int]) -> torch.Tensor:
    """Log-probability of every token after the first, from one plain forward pass of one row."""
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pairs", [PAIRS, CUT], ids=["choices", "one input"])
def test_loglikelihoods_are_those_of_a_plain_forward_pass(home: Path, kind: str, pairs: list[tuple[str, str]]) -> None:
    model, tokenizer = load_model(str(home / kind)), load_tokenizer(str(home / kind))
    expected, greedy = [], []
    for start, choice in pairs:
        # Space at the end of a context belongs to the continuation: the harness's definition.
        before = tokenizer(start.rstrip()).input_ids or [tokenizer.bos_token_id]
        ids = tokenizer(start + choice).input_ids if start else before + tokenizer(choice).input_ids
        behind = len(ids) - len(before)
        expected.append(float(scores(model, ids)[-behind:].sum()))
        best = model(torch.tensor([ids]), use_cache=False).logits[0].argmax(-1)[-behind - 1 : -1]
        greedy.append(best.tolist() == ids[-behind:])
    found = opened(home / kind, batch_size=3).loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    torch.testing.assert_close(torch.tensor([value for value, _ in found]), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert [hit for _, hit in found] == greedy


@pytest.mark.parametrize("kind", KINDS)
def test_neither_batches_nor_padding_change_an_answer(home: Path, kind: str) -> None:
    alone, together = answers(opened(home / kind, batch_size=1)), answers(opened(home / kind, batch_size=7))
    for one, other in ((alone[0], together[0]), (alone[2], together[2])):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-5, atol=1e-5)
    assert (alone[1], alone[3]) == (together[1], together[3])
    assert len(set(together[3])) > 1 and all(together[3])


@pytest.mark.parametrize("kind", ["plain", "hybrid", "ternary"])
def test_they_are_the_answers_of_the_harnesss_own_model_class(home: Path, kind: str) -> None:
    """Which opens a student's folder by name, since the model type is registered."""
    stock = HFLM(pretrained=str(home / kind), device="cpu", dtype="float32", batch_size=4)
    theirs, ours = answers(stock), answers(opened(home / kind, batch_size=4))
    for one, other in ((ours[0], theirs[0]), (ours[2], theirs[2])):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-6, atol=1e-6)
    assert (ours[1], ours[3]) == (theirs[1], theirs[3])


@pytest.mark.parametrize("length", [16, 17])
def test_every_token_of_a_long_text_is_scored_once_and_sees_as_much_as_the_model_may(home: Path, length: int) -> None:
    model, tokenizer = load_model(str(home / "hybrid")), load_tokenizer(str(home / "hybrid"))
    word = tokenizer("import os\n" * 40).input_ids
    texts = [tokenizer.decode(word[:size]) for size in (1, length - 1, length, length + 1, 2 * length, 2 * length + 1, 90)]
    expected = []
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text).input_ids]
        total, done = 0.0, 1
        while done < len(ids):
            # As many new tokens as there is room for, and in front of them what room is left.
            end = min(done + length, len(ids))
            total += float(scores(model, ids[max(0, end - length - 1) : end])[done - end :].sum())
            done = end
        expected.append(total)
    lm = opened(home / "hybrid", batch_size=4, max_length=length)
    found = lm.loglikelihood_rolling(asked("loglikelihood_rolling", *((text,) for text in texts)), disable_tqdm=True)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_windows_of_all_texts_are_batched_by_length(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, seen = opened(home / "plain", batch_size=2, max_length=32), []
    call = lm._model_call
    monkeypatch.setattr(lm, "_model_call", lambda ids: seen.append(tuple(ids.shape)) or call(ids))
    lm.loglikelihood_rolling(asked("loglikelihood_rolling", *((text,) for text in TEXTS)), disable_tqdm=True)
    widths = [width for _, width in seen]
    assert widths == sorted(widths, reverse=True) and widths[0] == 32 and all(rows == 2 for rows, _ in seen[:-1])


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_what_is_written_is_what_generate_writes_up_to_the_first_stop(home: Path, kind: str) -> None:
    prompts = [start for start in STARTS if start]
    whole = [generate(home / kind, prompt, tokens=12) for prompt in prompts]
    stops = [whole[0][3:5], whole[1][-3:]]
    expected = []
    for text in whole:
        for stop in stops:
            text = text.split(stop)[0]
        expected.append(text)
    options = {"until": stops, "max_gen_toks": 12}
    lm = opened(home / kind, batch_size=3)
    assert lm.generate_until(asked("generate_until", *((prompt, options) for prompt in prompts)), disable_tqdm=True) == expected
    assert expected[0] != whole[0] and len(expected[0]) <= 3


@pytest.mark.parametrize("wanted", [False, True])
def test_a_chat_template_is_used_when_it_is_asked_for(home: Path, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, seen = opened(home / "plain"), []
    lm.tokenizer.chat_template = CHAT
    encode = lm.tok_batch_encode
    monkeypatch.setattr(lm, "tok_batch_encode", lambda texts, **more: seen.extend(texts) or encode(texts, **more))
    run_tasks(lm, Tasks([str(home / "tasks" / "write.yaml")]), chat=wanted, limit=2)
    question = "def f(x):\n    return"
    expected = [f"<user>{question}</><assistant>", f"<user>{question} a</><assistant>"] if wanted else [question, question + " a"]
    assert sorted(text.replace(" </>", "</>").rstrip() for text in seen) == sorted(expected)


def test_a_chat_template_that_is_not_there_is_an_error(home: Path) -> None:
    done = CliRunner().invoke(app, ["evaluate", str(home / "plain"), "--tasks", str(home / "tasks/write.yaml"), "--apply-chat-template"])
    assert done.exit_code == 2 and "--apply-chat-template: the tokenizer has no chat template" in done.stderr


# -- the command line ------------------------------------------------------------------------------------------------------


def test_evaluate_prints_a_table_and_writes_what_it_prints(home: Path, tmp_path: Path) -> None:
    words = ["evaluate", str(home / "hybrid"), "--tasks", "choice,text", "--tasks", str(home / "tasks" / "write.yaml")]
    words += ["--include-path", str(home / "tasks"), "--against", str(home / "plain"), "--max-length", "48", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "out" / "lm_eval.json").read_text())
    assert list(results) == ["kind", "harness", "source", "against", "settings", "models", "tasks"]
    assert list(results["models"]) == ["teacher", "model"] and results["models"]["model"]["max_length"] == 48
    assert {name: list(task["metrics"]) for name, task in results["tasks"].items()} == {
        "choice": ["acc,none", "acc_norm,none"], "text": ["bits_per_byte,none"], "write": ["exact_match,none"],
    }  # fmt: skip
    assert {name: task["documents"] for name, task in results["tasks"].items()} == {"choice": 6, "text": 3, "write": 4}
    bits = results["tasks"]["text"]["metrics"]["bits_per_byte,none"]
    assert bits["better"] == -1 and bits["values"]["teacher"] != bits["values"]["model"]
    texts = [json.loads(line)["text"] for line in (home / "tasks" / "text.jsonl").read_text().splitlines()]
    sums = opened(home / "hybrid", max_length=48).loglikelihood_rolling(asked("loglikelihood_rolling", *((text,) for text in texts)))
    assert bits["values"]["model"] == pytest.approx(-sum(sums) / sum(map(len, texts)) / torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    for shown in ("choice: 6 documents", "bits_per_byte", f"{bits['values']['model']:.4g}", "teacher", "Running loglikelihood requests", "lm_eval.json"):
        assert shown in done.output, done.output


def test_json_alone_is_on_stdout_and_the_file_is_beside_the_other_evaluation(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    task = str(home / "tasks" / "choice.yaml")
    done = CliRunner().invoke(app, ["evaluate", str(home / "plain"), "--tasks", task, "--limit", "2", "--batch-size", "auto", "--json"])
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "runs" / "evaluate" / "plain" / "evaluation" / "lm_eval.json").read_text())
    assert json.loads(done.stdout) == written and written["tasks"]["choice"]["documents"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "TASKS/none.yaml"], "none.yaml: no such file"),
        (["--tasks", "choice", "--include-path", "nowhere"], "--include-path nowhere: no such folder"),
        (["--tasks", "TASKS/choice.yaml", "--max-length", "4096"], "--max-length 4096: the model was made for 128 tokens"),
        (["--tasks", "TASKS/write.yaml", "--max-length", "8"], "write: generates up to 8 tokens, and the model reads 8 with them: set"),
        (["--tasks", "TASKS/lost.yaml"], "lost.yaml: cannot be built"),
        (["--tasks", "TASKS/choice.yaml", "--batch-size", "none"], "--batch-size none: allowed are a number from 1 on, and auto"),
        (["--tasks", "TASKS/choice.yaml", "--condition", "a"], "holds no trained LoRA generator, and --condition is for one"),
        (["--tasks", "TASKS/choice.yaml", "--data", "a"], "--data: is for the measures on text"),
        (["--tasks", "TASKS/unsafe.yaml"], "such a task runs what a model writes; `limbeck lm_eval --confirm_run_unsafe_code` does"),
        (["--limit", "3"], "--limit: goes with --tasks"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(home: Path, words: list[str], message: str) -> None:
    more = home / "more"
    more.mkdir(exist_ok=True)
    (more / "lost.yaml").write_text("task: lost\ndataset_path: nobody/nothing\ntest_split: test\ndoc_to_text: q\ndoc_to_target: a\n")
    (more / "unsafe.yaml").write_text((home / "tasks" / "choice.yaml").read_text() + "unsafe_code: true\n")
    words = [word.replace("TASKS/lost", f"{more}/lost").replace("TASKS/unsafe", f"{more}/unsafe") for word in words]
    done = CliRunner().invoke(app, ["evaluate", str(home / "plain"), *(word.replace("TASKS", str(home / "tasks")) for word in words)])
    assert done.exit_code == 2 and message in done.stderr, done.output
    assert "Traceback" not in done.output


def test_a_task_that_nobody_has_is_refused_with_the_nearest_names() -> None:
    assert "arc_easy" in TaskManager().all_tasks
    with pytest.raises(RunError, match=r"--tasks arc_esy: neither a task of the harness nor a \*.yaml file, did you mean 'arc_easy'"):
        Tasks(["arc_esy"])


def test_a_group_of_a_folder_is_summed_up(home: Path, tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text("group: both\ntask:\n  - choice\n  - text\naggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n")
    lm = opened(home / "plain", max_length=48)
    found = run_tasks(lm, Tasks(["both"], [home / "tasks", tmp_path]))
    assert set(found) == {"text", "choice", "both"}
    assert found["both"]["group"] and found["both"]["metrics"]["acc,none"]["value"] == found["choice"]["metrics"]["acc,none"]["value"]


def test_a_softmax_is_in_float32_whatever_the_weights_are(home: Path) -> None:
    model, tokenizer = load_model(str(home / "plain"), dtype=torch.bfloat16), load_tokenizer(str(home / "plain"))
    ids = tokenizer(TEXTS[1]).input_ids
    with torch.no_grad():
        logits = model(torch.tensor([[tokenizer.bos_token_id, *ids]]), use_cache=False).logits[0, :-1]
    expected = logits.float().log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].sum()
    lm = LoadedLM(model, tokenizer)
    assert lm.loglikelihood_rolling(asked("loglikelihood_rolling", (TEXTS[1],)))[0] == pytest.approx(float(expected), rel=1e-6)


def test_a_tokenizer_that_neither_begins_nor_ends_a_text_is_refused(home: Path) -> None:
    model, tokenizer = load_model(str(home / "plain")), load_tokenizer(str(home / "plain"))
    tokenizer.eos_token = None
    lm = LoadedLM(model, tokenizer)
    with pytest.raises(RunError, match="no end-of-text token, which tasks that generate need: name `eos_token`"):
        lm.generate_until(asked("generate_until", ("a", {"until": ["b"], "max_gen_toks": 2})))
    tokenizer.bos_token = None
    with pytest.raises(RunError, match="no token that begins or ends a text"):
        LoadedLM(model, tokenizer)


def test_a_warning_for_every_request_is_said_once(home: Path) -> None:
    said: list[str] = []
    with spoken(said.append):
        run_tasks(opened(home / "plain", max_length=5), Tasks([str(home / "tasks" / "choice.yaml")]))
    assert len([line for line in said if "Truncating" in line]) == 1 and len(said) == 1


# -- the harness's own command line, and none of ours ---------------------------------------------------------------------------


def test_the_harnesss_own_command_line_opens_a_hybrid(home: Path, tmp_path: Path) -> None:
    words = ["--model", "hf", "--model_args", f"pretrained={home / 'hybrid'},dtype=float32,max_length=48", "--device", "cpu", "--batch_size", "4"]
    words += ["--tasks", "text", "--include_path", str(home / "tasks"), "--output_path", str(tmp_path / "out.json")]
    done = subprocess.run(
        [sys.executable, "-m", "limbeck", "lm_eval", *words], capture_output=True, text=True, timeout=600,
        env={**os.environ, **OFFLINE, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "|bits_per_byte" in done.stdout
    (written,) = tmp_path.rglob("*.json")
    theirs = json.loads(written.read_text())["results"]["text"]["bits_per_byte,none"]
    ours = run_tasks(opened(home / "hybrid", max_length=48), Tasks(["text"], [home / "tasks"]))["text"]["metrics"]["bits_per_byte,none"]["value"]
    assert theirs == pytest.approx(ours, rel=1e-6)


STOCK = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "limbeck":
            raise ImportError("limbeck is not to be imported here")

sys.meta_path.insert(0, Refuse())
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
lm = HFLM(pretrained=sys.argv[1], device="cpu", dtype="float32", batch_size=4)
print(json.dumps(lm.loglikelihood([Instance("loglikelihood", {}, tuple(pair), 0) for pair in json.loads(sys.argv[2])], disable_tqdm=True)))
"""


def test_a_native_export_is_measured_without_us(home: Path, tmp_path: Path) -> None:
    write_native(load_model(str(home / "native")), tmp_path / "out", tokenizer_source=str(home / "native"), dtype=torch.float32)
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path / "out"), json.dumps(PAIRS)], capture_output=True, text=True, timeout=600,
        env={**os.environ, **OFFLINE, "PYTHONPATH": os.pathsep.join(path for path in sys.path if "site" in path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    theirs = torch.tensor([value for value, _ in json.loads(done.stdout.splitlines()[-1])])
    ours = torch.tensor([value for value, _ in opened(home / "native").loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
