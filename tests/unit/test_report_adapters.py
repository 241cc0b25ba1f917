"""The report of a LoRA generator: every column named for what it is, shares only where there is a gain, and pages for half a run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.dom.minidom
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from limbeck.evaluation import adapters as measured
from limbeck.evaluation import composition
from limbeck.report import adapters as shown
from limbeck.report import adapters_panel
from limbeck.report.card import model_card
from limbeck.report.dots import Case, Dot, interval_chart, sorted_chart
from limbeck.report.html import write_report
from limbeck.report.run import read_run

NASTY = '</td><script>alert("x")</script> | `& <b>'
SPLITS = ["seen"] * 4 + ["held_out_slice"] * 3 + ["held_out_source"] * 2
BASE = np.array([3.0, 3.2, 3.4, 3.6, 3.0, 3.5, 4.0, 5.0, 5.5])
GAINS = {
    "base": 0.0, "mean adapter": 0.3, "nearest adapter": 0.45, "teacher": 1.0, "predict: nearest": 0.2, "predict: mean of 3": 0.25,
    "generate": 0.6, "static": 0.4, "rival": 0.7, "generate, shuffled": 0.1, "rival, shuffled": 0.5,
}  # fmt: skip


def judged(teacher_gain: float = 1.0, splits: list[str] | None = None, gains: dict[str, float] | None = None) -> dict:
    """`adapters.json` as the evaluation makes it; a column's loss is the base's less its share of the own teachers' gain."""
    splits = splits or SPLITS
    rng = np.random.default_rng(0)
    nll = {
        name: BASE[: len(splits)] - teacher_gain * gain + (0.02 * rng.standard_normal(len(splits)) if 0 < gain < 1 else 0)
        for name, gain in (gains or GAINS).items()
    }
    with np.errstate(all="ignore"):
        numbers = {
            "size_ratio": {name: np.full(len(splits), 0.5 + gain / 2) for name, gain in GAINS.items() if name != "base"},
            "delta_cosine": {name: np.linspace(gain - 0.1, gain, len(splits)) for name, gain in GAINS.items() if name != "base"},
        }
        conditions = [SimpleNamespace(split=split) for split in splits]
        table = measured.summarise(conditions, nll, "generate", resamples=200, numbers=numbers)
    rows = [
        {
            "name": f"task {i} {NASTY}", "split": split, "source": f"source {i}", "format": "plain", "shuffled": "other", "nearest": "near",
            "nll": {name: float(values[i]) for name, values in nll.items()},
        }
        for i, split in enumerate(splits)
    ]  # fmt: skip
    return {"splits": table, "conditions": rows, "generated": "generate"}


def composed() -> dict:
    names = (composition.MIX, composition.GENERATED, composition.SUM, composition.MEAN, composition.TIES, composition.BASE)
    nll = {text: {name: 3.0 + 0.1 * i for i, name in enumerate(names)} for text in ("mix", "first part", "second part")}
    mixes = [
        {"name": f"mix {i} {NASTY}", "cosine_sum": 0.9, "cosine_parts": [0.7, 0.95 * i], "cosine_generated": 0.5, "additive": not i, "nll": nll}
        for i in range(2)
    ]
    return {"additive": 0.5, "nll": nll, "mixes": mixes}


def generator(condition: str) -> dict:
    site = {"name": "self_attn.q_proj", "module": "self_attn.q_proj", "in_features": 64, "out_features": 32, "prefix": "layers", "layers": [0, 2, 3]}
    return {
        "options": {"kind": "lora_generator", "condition": condition, "decoder": "queries", "width": 32, "encoder": None, "reader": {"kind": "perceiver"}},
        "spec": {"rank": 2, "alpha": 4.0, "rslora": False, "sites": [site]}, "base": {"source": f"base {NASTY}"}, "text_shape": [4, 48],
    }  # fmt: skip


def write(folder: Path, files: dict[str, object]) -> Path:
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    objectives = [{"kind": "ce", "weight": 1.0}, {"kind": "weights", "loss": "mse", "weight": 0.1}]
    trained = {"kind": "train", "data": {"from": "conditions"}, "objectives": objectives}
    stages: dict[str, dict] = {
        "conditions": {"kind": "prepare_conditions"},
        "pool": {"kind": "train_adapters"},
        "generate": {**trained, "teacher": {"kind": "adapters", "pool": {"from": "pool"}}},
        "rival": trained,
        "static": trained,
        "evaluate": {"kind": "evaluate_adapters", "from": "generate", "against": ["static", "rival"], "predictors": ["predict"]},
    }
    conditions = [{"name": f"c{i}", "split": split, "source": f"s{i % 2} {NASTY}", "format": "plain"} for i, split in enumerate([*SPLITS, "mix"])]
    files: dict[str, object] = {"recipe.json": {"name": "generators", "stages": stages}, "environment.json": {}}
    for name, options in stages.items():
        result = {"result": {"adapters": 10}} if name == "pool" else {}
        files[f"{name}/stage.json"] = {"kind": options["kind"], "status": "finished", "seconds": 61.0, "options": options, **result}
    files["conditions/conditions/conditions.json"] = {"conditions": conditions, "form": "prompt_answer"}
    for name, condition in (("generate", "base"), ("rival", "base"), ("static", "none")):
        files[f"{name}/model/generator.json"] = generator(condition)
    files["evaluate/evaluation/adapters.json"] = judged() | {"composition": composed()}
    return write(tmp_path, files)


class Checker(HTMLParser):
    """Every tag closed, none that runs or fetches."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in {"script", "link", "img", "iframe", "object"}
        assert not {name for name, _ in attrs} & {"src", "href", "onload", "onclick"}
        if tag not in {"meta", "path", "circle"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in {"meta", "path", "circle"}:
            assert self.open.pop() == tag


def test_the_map_shows_where_the_adapter_acts(run_dir: Path) -> None:
    text, _ = report(run_dir)
    row = re.search(r"<tr><td>self_attn.q_proj</td>(.*?)</tr>", text)
    assert row and [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td[^>]*>.*?</td>", row[1])] == ["192", "", "192", "192"]


def report(run_dir: Path) -> tuple[str, str]:
    """The page, checked, and its words."""
    text = write_report(run_dir).read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    for chart in re.findall(r"<svg.*?</svg>", text):
        xml.dom.minidom.parseString(chart)
        assert "nan" not in chart and "inf" not in chart
    return text, unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text)))


def tables(text: str) -> list[list[str]]:
    """The words of every row of every table."""
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    return [[unescape(re.sub(r"<[^>]+>", "", cell)) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in rows]


def split_tables(text: str) -> list[list[list[str]]]:
    """The rows of each split's table, in the order of the page."""
    return [tables(part) for part in re.findall(r"<table>(?:(?!</table>).)*generated leads by.*?</table>", text)]


def test_the_page_says_what_the_generator_is_and_what_it_was_judged_on(run_dir: Path) -> None:
    _, words = report(run_dir)
    for said in (
        "A network that reads 4 texts of a task, 48 tokens of each, and writes a LoRA of rank 2 for 3 Linears of a frozen base",
        "judged on 3 conditions of held-out slices, 2 conditions of held-out sources and 4 seen conditions.",
        "rank 2, scale 2, 576 numbers",
        "self_attn.q_proj × 3",
        "4 seen, 3 of held-out slices, 2 of held-out sources, 1 mixes",
        "ce, weights (mse) × 0.1",
        "10 adapters of stage pool",
        'limbeck export RUN/generate --to peft --prompt "TEXT OF THE TASK"',
    ):
        assert said in words, said


def test_the_headline_is_of_held_out_slices_against_the_strongest_control(run_dir: Path) -> None:
    run = read_run(run_dir)
    (judgement,) = shown.judgements(run)
    found = judgement.split("held_out_slice")
    (share, beats, lead, source) = shown.tiles(judgement)
    assert share[1] == f"{100 * found['share']['generate']:.1f}%" and "on 3 conditions of held-out slices" in share[2]
    assert beats[1] == "100.0%" and beats[2].startswith("3 of 3")
    strongest = judgement.strongest("held_out_slice")
    assert strongest is not None and strongest.key == "nearest adapter", "the rival is better, but no control; so is its shuffled column"
    mean, low, _ = found["lead"]["nearest adapter"]
    assert lead[1] == f"{mean:+.4f}" and f"95% interval {low:+.4f} to" in lead[2] and "not told apart" not in lead[2] and low > 0
    assert "held-out sources" in source[2]


@pytest.mark.parametrize(("low", "high", "verdict"), [(0.1, 0.2, ""), (-0.1, 0.2, ": not told apart from it"), (-0.2, -0.1, ": behind it")])
def test_a_lead_is_claimed_only_where_its_interval_excludes_nought(low: float, high: float, verdict: str) -> None:
    assert shown.interval_words({"conditions": 5}, low, high).endswith(f"{high:+.4f}{verdict}")


def test_every_column_has_a_row_in_each_split_named_for_what_it_is(run_dir: Path) -> None:
    text, words = report(run_dir)
    found = split_tables(text)
    assert len(found) == 3
    names = [row[0] for row in found[0][1:]]
    assert names[0] == "own teacher" and names[-1] == "base, no adapter" and len(names) == len(GAINS)
    assert set(names) == {
        "base, no adapter", "own teacher", "mean of the seen teachers", "nearest seen teacher", "generated: generate", "another generator: rival",
        "one LoRA for all: static", "wrong condition: generate", "wrong condition: rival", "retrieved: predict: nearest", "retrieved: predict: mean of 3",
    }  # fmt: skip
    split = shown.judgements(read_run(run_dir))[0].split("held_out_slice")
    row = next(row for row in found[0] if row[0] == "one LoRA for all: static")
    mean, low, high = split["lead"]["static"]
    assert row[1:4] == [f"{split['nll']['static']:.4f}", f"{100 * split['share']['static']:.1f}%", f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"]
    assert row[4:] == [f"{split['delta_cosine']['static']:.3f}", "0.700"]
    assert "one LoRA for all: static (control)" in words and "wrong condition: rival (control)" not in words


def test_composition_counts_the_mixes_that_add_up(run_dir: Path) -> None:
    text, words = report(run_dir)
    assert "In 1 of 2 mixes (50.0%)" in words
    assert [composition.MIX, "3.0000", "3.0000", "3.0000"] in tables(text)
    assert [row[-1] for row in tables(text) if row and row[0].startswith("mix ")] == ["yes", "no"]


def test_names_cannot_become_markup_in_page_or_card(run_dir: Path) -> None:
    write(run_dir, {"evaluate/evaluation/adapters.json": judged(gains=GAINS | {NASTY: 0.2}) | {"composition": composed()}})
    text, _ = report(run_dir)
    assert "<script" not in text and text.count("&lt;script&gt;") >= 2 * len(SPLITS)
    card = model_card(read_run(run_dir), peft=True)
    assert "<script" not in card and "&lt;script>" in card
    table = [line for line in card.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {6}


def test_without_an_evaluation_the_page_and_the_card_say_so(run_dir: Path) -> None:
    (run_dir / "evaluate/evaluation/adapters.json").unlink()
    _, words = report(run_dir)
    assert "No evaluate_adapters stage has judged generate, rival: there are training curves only." in words
    card = model_card(read_run(run_dir))
    assert "No evaluate_adapters stage has judged it." in card and "limbeck export RUN/generate --to peft" in card


def test_only_seen_conditions_is_said(run_dir: Path) -> None:
    write(run_dir, {"evaluate/evaluation/adapters.json": judged(splits=["seen"] * 4)})
    _, words = report(run_dir)
    assert "Only seen conditions were judged" in words and "on 4 seen conditions" in words
    assert "Only seen conditions were judged" in model_card(read_run(run_dir))


def test_one_condition_has_no_interval(run_dir: Path) -> None:
    write(run_dir, {"evaluate/evaluation/adapters.json": judged(splits=["held_out_slice"])})
    text, words = report(run_dir)
    assert "of one condition, which gives no interval" in words and "95% interval" not in words.split("What the rows are")[0]
    assert not any("[" in row[3] for row in split_tables(text)[0][1:])


@pytest.mark.parametrize("gain", [0.0, -0.5, float("nan")])
def test_teachers_no_better_than_the_base_give_no_share(run_dir: Path, gain: float) -> None:
    write(run_dir, {"evaluate/evaluation/adapters.json": judged(teacher_gain=gain)})
    text, words = report(run_dir)
    assert "so there is no share of a gain" in words
    assert {row[2] for row in split_tables(text)[0][1:]} == {"–"}
    card = model_card(read_run(run_dir))
    assert "so there is no share of a gain" in card and "nan" not in card.lower()
    assert "Mean loss" in words and "Share of the teacher's gain" not in words


def test_a_run_whose_other_stages_are_gone_still_has_a_page(tmp_path: Path) -> None:
    stage = {"kind": "evaluate_adapters", "status": "finished"}
    recipe = {"name": "bare", "stages": {"evaluate": {"kind": "evaluate_adapters"}}}
    write(tmp_path, {"recipe.json": recipe, "evaluate/stage.json": stage, "evaluate/evaluation/adapters.json": judged()})
    _, words = report(tmp_path)
    assert "has left no record in this run" in words and "writes a LoRA for a frozen base; judged on" in words
    (judgement,) = shown.judgements(read_run(tmp_path))
    assert judgement.column("rival").control, "what nothing is known of counts as a control: the claim gets no easier"


def test_a_later_evaluation_has_the_header_and_the_earlier_one_tiles_of_its_own(run_dir: Path) -> None:
    recipe = json.loads((run_dir / "recipe.json").read_text())
    recipe["stages"]["again"] = recipe["stages"]["evaluate"]
    late = judged(gains=GAINS | {"generate": 0.0})
    write(run_dir, {"recipe.json": recipe, "again/stage.json": {"kind": "evaluate_adapters", "status": "finished"}, "again/evaluation/adapters.json": late})
    text, _ = report(run_dir)
    rows = re.findall(r'<div class="tiles">(.*?)</h', text)
    assert len(rows) == 2 and "<strong>0.0%</strong>" in rows[0] and "<strong>0.0%</strong>" not in rows[1]


def test_the_card_has_numbers_controls_and_the_way_to_an_adapter(run_dir: Path) -> None:
    card = model_card(read_run(run_dir), peft=True)
    assert card.startswith("---\nlibrary_name: peft") and "PeftModel.from_pretrained" in card and "import limbeck" not in card
    assert "AutoTokenizer" in model_card(read_run(run_dir))
    found = shown.judgements(read_run(run_dir))[0].split("held_out_slice")
    mean, low, high = found["lead"]["static"]
    wanted = f"| one LoRA for all: static (control) | {found['nll']['static']:.4f} | {100 * found['share']['static']:.1f}% "
    assert f"{wanted}| {mean:+.4f} | {low:+.4f} to {high:+.4f} |" in card
    assert "* mean of the seen teachers: one adapter" in card and "* another generator" not in card


def test_an_interval_is_drawn_where_the_lead_says() -> None:
    marks = [(0.0, "zero"), (1.0, "one")]
    dots = [
        Dot("a", 0.5, (0.25, 0.75), "red", "50%", "t"), Dot("b", -9.0, (-12.0, -8.0), "red", "-900%", "t"), Dot("c", float("nan"), None, "red", "–", "t"),
    ]  # fmt: skip
    chart = xml.dom.minidom.parseString(interval_chart(dots, width=480, x_label="x", marks=marks, limits=(-1.0, 2.0)))
    dashed = [path for path in chart.getElementsByTagName("path") if path.getAttribute("stroke-dasharray")]
    zero, one = (float(re.findall(r"M([\d.]+)", path.getAttribute("d"))[0]) for path in dashed)
    (line,) = [path.getAttribute("d") for path in chart.getElementsByTagName("path") if path.getAttribute("class") == "line"]
    low, high = (float(x) for x in re.fullmatch(r"M([\d.]+) [\d.]+H([\d.]+)", line).groups())
    assert (low - zero) / (one - zero) == pytest.approx(0.25, abs=0.01) and (high - zero) / (one - zero) == pytest.approx(0.75, abs=0.01)
    (dot,) = chart.getElementsByTagName("circle")
    assert (float(dot.getAttribute("cx")) - zero) / (one - zero) == pytest.approx(0.5, abs=0.01)
    assert sum(path.getAttribute("class") == "dot" for path in chart.getElementsByTagName("path")) == 1, "what is off the chart is an arrow"
    assert "no finite value" in interval_chart(dots[2:], width=480, x_label="x")


def test_cases_stand_in_order_of_their_first_value() -> None:
    cases = [Case("high", (3.0, 2.0)), Case("low", (1.0, float("nan"))), Case("none", (float("nan"),) * 2), Case("middle", (2.0, 4.0))]
    chart = xml.dom.minidom.parseString(sorted_chart(cases, ("base", "own"), ("red", "blue"), width=480, x_label="x", y_label="y"))
    titles = [title.firstChild.data for title in chart.getElementsByTagName("title")]
    assert titles == ["low: base 1.0000", "middle: base 2.0000, own 4.0000", "high: base 3.0000, own 2.0000"]
    heights = [float(circle.getAttribute("cy")) for circle in chart.getElementsByTagName("circle")]
    assert len(heights) == 5 and heights[2] < heights[3] < heights[1] < heights[0], "a larger loss is higher"


def test_column_names_are_those_of_the_evaluation_and_a_page_needs_no_torch() -> None:
    from limbeck.stages import evaluate_adapters

    assert (shown.BASE, shown.TEACHER) == (measured.BASE, measured.TEACHER) and adapters_panel.TRAINED == composition.MIX
    assert (shown.MEAN, shown.NEAREST) == (evaluate_adapters.MEAN, evaluate_adapters.NEAREST)
    code = "import sys, limbeck.report.html; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
