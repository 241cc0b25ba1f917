"""The report page and the card: everything escaped, nothing fetched, nothing invented."""

from __future__ import annotations

import json
import math
import re
import xml.dom.minidom
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from limbeck.errors import CheckpointError
from limbeck.evaluation.table import comparison_rows, size
from limbeck.report.card import model_card
from limbeck.report.curves import thin, training_figures
from limbeck.report.html import write_report
from limbeck.report.ranking import DARKEST, importance_series, ranking_panel
from limbeck.report.run import read_run
from limbeck.report.style import STYLE
from limbeck.report.svg import Series, line_chart, linear_ticks, log_ticks

HYBRID = ["gated_deltanet", "gated_deltanet", "softmax", "gated_deltanet"]
NASTY = '</div><script>alert("x")</script> & <b>'
CE = {"teacher": 3.0, "copy_init": 7.0, "distil": 3.05}


def evaluation() -> dict:
    return {
        "student": "distil",
        "teacher": "teacher",
        "setting": {
            "rows": 8,
            "sequence": 64,
            "precision": "float32",
            "device": "CPU, 2 threads",
            "samples": {"temperature": 0.0},
        },
        "models": {
            m: {"parameters": 10**6, "model_type": "qwen3", "layers": ["softmax"] * 4 if m == "teacher" else HYBRID} for m in CE
        },
        "perplexity": {m: {"ce": ce, "perplexity": math.exp(ce), "accuracy": 0.4, "tokens": 512} for m, ce in CE.items()},
        "divergence": {
            m: {"kl": CE[m] - 2.99, "agreement": 0.9, "ce_gap": CE[m] - 3.0, "tokens": 512} for m in ("copy_init", "distil")
        },
        "recall": {m: [{"task": "repeat", "distance": d, "accuracy": 0.9, "ce": 0.1, "count": 8} for d in (32, 64)] for m in CE},
        "cache": {
            m: [{"context": c, "bytes": c * (4 if m == "teacher" else 1), "kv": 0, "state": 0} for c in (1024, 4096)] for m in CE
        },
        "speed": {m: [{"context": 1024, "tokens_per_second": 10.0 + (m == "distil") * 5, "seconds": 0.1}] for m in CE},
        "samples": [{"prompt": f"P {NASTY}", "continuations": {m: f" text {NASTY} {m}" for m in CE}}],
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    stages = {
        "align": {"kind": "train"},
        "distil": {"kind": "train"},
        "evaluate": {"kind": "evaluate", "from": "distil"},
        "later": {"kind": "export"},
    }
    files: dict[str, object] = {
        "recipe.json": {"name": f"run {NASTY}", "description": NASTY, "stages": stages},
        "environment.json": {"versions": {"torch": "2.13.0"}, "command": f"limbeck run {NASTY}", "machine": "Linux"},
        "evaluate/evaluation/evaluation.json": evaluation(),
    }
    for name in ("align", "distil", "evaluate"):
        files[f"{name}/stage.json"] = {
            "kind": stages[name]["kind"],
            "status": "finished",
            "seconds": 61.0,
            "options": stages[name],
        }
    for name, value in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(value), encoding="utf-8")
    for name, extra in (
        ("align", {"residual/0": 0.5, "residual/1": 0.2, "lr/mixers": 1e-3}),
        ("distil", {"kl": 0.3, "agreement": 0.8}),
    ):
        lines = [
            {"step": s, "tokens": 100 * s, "loss": 1 / s, "losses": [1 / s, None], "grad_norm": None, **extra}
            for s in range(2, 20, 2)
        ]
        lines.append({"step": 18, "validation/loss": 0.1, "validation/kl": 0.35})
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 20, "lo')
    return tmp_path


class Checker(HTMLParser):
    """Every tag closed, none that runs or fetches."""

    VOID = frozenset({"meta", "path", "circle"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onload", "onclick"}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_is_well_formed_and_needs_nothing_from_outside(run_dir: Path) -> None:
    text = write_report(run_dir).read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    assert not checker.tags & {"script", "link", "img", "iframe", "object"}
    assert "http" not in text and "@import" not in text and "url(" not in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text


def test_text_of_models_and_recipes_cannot_become_markup(run_dir: Path) -> None:
    text = write_report(run_dir).read_text(encoding="utf-8")
    assert "<script" not in text and "<b>P" not in text
    assert text.count("&lt;script&gt;") >= 6  # title, heading, description, command, prompt, continuations


def origins(run_dir: Path) -> None:
    """What newer runs record: device, commit, fingerprints; and secrets where somebody has put them."""
    file = run_dir / "environment.json"
    command = "limbeck run x.yaml distil.teacher.token=hush-hush --api-key abcdef"
    more = {"device": "CPU, 2 threads", "commit": "abc123+changes", "command": command}
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
    file = run_dir / "distil/stage.json"
    fingerprint = {"sha256": "f00d", "dtype": "bfloat16", "url": "https://me:hush-hush@host", "nothing": None}
    made = {"data": "d4t4", "tokenizer": "70k3n", "teacher": "7eac", "teacher_fingerprint": fingerprint}
    file.write_text(json.dumps({**json.loads(file.read_text()), "made_from": made}))
    file = run_dir / "recipe.json"
    recipe = json.loads(file.read_text())
    student = {"base": "Qwen/Qwen3-0.6B", "surgery": [{"kind": "ternarize"}]}
    recipe["stages"]["distil"] |= {"teacher": {"kind": "http", "api_key": "hush-hush"}, "student": student}
    file.write_text(json.dumps(recipe))


def test_page_and_card_say_where_it_comes_from_without_secrets(run_dir: Path) -> None:
    origins(run_dir)
    page = write_report(run_dir)
    card = page.with_name("model_card.md").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8"))
    for shown in (text, card):
        for words in ("d4t4", "70k3n", "7eac: sha256 f00d, dtype bfloat16", "abc123+changes", "CPU, 2 threads", "2.13.0", "--api-key ***", "token=***"):
            assert words in shown, words
        assert "hush-hush" not in shown and "abcdef" not in shown and "nothing" not in shown


def test_the_card_makes_the_run_again_and_names_its_base(run_dir: Path) -> None:
    origins(run_dir)
    recipe = json.loads((run_dir / "recipe.json").read_text())
    recipe["description"] = "ends ```` a block"
    (run_dir / "recipe.json").write_text(json.dumps(recipe))
    card = model_card(read_run(run_dir))
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"library_name": "transformers", "base_model": "Qwen/Qwen3-0.6B", "tags": ["limbeck", "distillation", "ternary"]}
    again = yaml.safe_load(card.split("`````yaml\n")[1].split("\n`````")[0])
    recipe["stages"]["distil"]["teacher"]["api_key"] = "***"
    assert again == recipe and "limbeck run recipe.yaml" in card


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb`` (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def mixed(colour: str, paper: str, share: float) -> str:
    return "#" + "".join(f"{round(share * int(colour[i : i + 2], 16) + (1 - share) * int(paper[i : i + 2], 16)):02x}" for i in (1, 3, 5))


def test_every_colour_can_be_read_on_its_ground_by_day_and_by_night() -> None:
    schemes = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[:2]
    for scheme in schemes:
        colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6});", scheme))
        assert len(colours) == 10, "paper, card, ink, soft, rule and five of models"
        for ground in ("paper", "card"):
            for name in set(colours) - {"paper", "card", "rule"}:
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
        for share in (i / 100 for i in range(int(100 * DARKEST) + 1)):
            assert contrast(colours["ink"], mixed(colours["student"], colours["paper"], share)) >= 4.5, share
    assert "@media screen and (prefers-color-scheme: dark)" in STYLE, "paper is white at night too"


def test_page_says_what_became_what_and_what_it_costs(run_dir: Path) -> None:
    text = re.sub(r"<[^>]+>", " ", write_report(run_dir).read_text(encoding="utf-8"))
    for words in (
        "3 of the 4 attention layers of a qwen3 model became gated_deltanet; softmax stays in layer 2.",
        "+0.050",
        "98.8% of copy_init&#x27;s gap closed",
        "0.25×",
        "1.50×",
        "layer 1: 0.2 at step 18",
        "held out: 0.35 at step 18",
        "limbeck run recipe.json",
        "torch",
    ):
        assert words in text, words


def ranking() -> dict:
    """Four layers, three methods, as `rank_layers` writes them; the chosen one distilled two of them and has no importances."""

    def score(text: float, recall: float) -> dict:
        return {"text": text, "agreement": 0.8, "recall": recall, "accuracy": 0.5, "probes": {}}

    def row(layers: list[int], value: float) -> dict:
        return {"layers": layers, "score": value, "kl": value / 2, "agreement": 0.75, "recall_kl": 1.5 * value, "recall": 0.5, "probes": {}}

    def tokens(trained: int, scored: int) -> dict:
        return {"teacher": 0, "trained": trained, "scored": scored, "all": trained + scored}

    worth = {"0": 0.5, "1": -0.1, "2": 2.0, "3": 1.0}
    methods = {
        "greedy": {"order": [2, 0, 1, 3], "tokens": tokens(0, 4000), "keep": [0, 2]},
        "restore_one": {
            "order": [2, 3, 0, 1], "importance": worth, "scores": {i: score(0.3, 4 - w) for i, w in worth.items()},
            "tokens": tokens(0, 2000), "keep": [2, 3],
        },
        "ga_s2": {
            "order": [3, 2, 0, 1], "scores": {"3": [score(9, 9), score(0.1, 0.3)], "2": [score(9, 9), score(0.4, 0.8)]},
            "tokens": tokens(30000, 5000), "full_tokens": tokens(60000, 10000), "keep": [2, 3],
        },
    }  # fmt: skip
    sets = [("greedy", [0, 2], 0.25), ("ga_s2", [2, 3], 0.5), ("restore_one", [2, 3], 0.5), ("uniform", [1, 3], 1.0)]
    return {
        "method": "ga_s2", "keep": [2, 3], "num_layers": 4, "methods": methods,
        "sets": [{"name": name, **row(*rest)} for name, *rest in (*sets, ("random 1", [0, 1], 3.0), ("random 2", [0, 3], 1.0))],
        "random_mean": {"score": 2.0, "kl": 1.0, "recall_kl": 3.0, "recall": 0.25}, "sets_measured": "distil",
        "spearman": {"greedy, restore_one": 0.4, "greedy, ga_s2": -0.2, "restore_one, ga_s2": 0.8}, "recall_weight": 0.5,
        "oracle": {**row([0, 2], 0.25), "sets": [row([0, 2], 0.25)] * 6},
        "tokens": {"teacher": 100, "ranking": 39000, "sets": 900, "all": 40000},
    }  # fmt: skip


def cells(text: str) -> list[list[str]]:
    """The words of every row of every table."""
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    return [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in rows]


def test_a_ranking_shows_places_sets_correlations_and_cost(run_dir: Path) -> None:
    (run_dir / "align" / "ranking").mkdir()
    (run_dir / "align" / "ranking" / "ranking.json").write_text(json.dumps(ranking()), encoding="utf-8")
    text = write_report(run_dir).read_text(encoding="utf-8")
    Checker().feed(text)
    assert "Layer ranking: align" in text and "Softmax stays in layers 2, 3 of 4, by ga_s2" in text
    assert "after a short distillation" in text and "best of all 6 sets" in text
    rows = cells(text)
    assert ["restore_one", "3", "4", "1", "2"] in rows and ["ga_s2 (chosen)", "3", "4", "2", "1"] in rows
    assert text.count("<td class=kept") == 6
    found = [row[:3] + row[-1:] for row in rows if len(row) == 8 and row[0] != "set"]
    assert found == [
        ["greedy, oracle", "0 2", "0.25", "+0.0%"],
        ["ga_s2, restore_one (chosen)", "2 3", "0.5", "+100.0%"],
        ["uniform", "1 3", "1", "+300.0%"],
        ["random 2", "0 3", "1", "+300.0%"],
        ["mean of 2 random sets", "–", "2", "+700.0%"],
        ["random 1", "0 1", "3", "+1100.0%"],
    ]
    assert ["greedy", "", "+0.40", "-0.20"] in rows and ["ga_s2", "-0.20", "+0.80", ""] in rows
    assert ["ga_s2", "0", "30k", "5k", "35k", "70k"] in rows and ["greedy", "0", "0", "4k", "4k", "–"] in rows
    assert "This stage: 40k, of which 39k for rankings" in text
    assert ["layer 3", "0.3", "3", "0.1", "0.3"] in rows and ["layer 0", "0.3", "3.5", "–", "–"] in rows


def test_importance_is_a_share_of_the_best_layer_and_needs_numbers() -> None:
    lines = {one.name: one.points for one in importance_series(ranking())}
    assert set(lines) == {"restore_one", "ga_s2"}, "greedy only puts layers in order"
    assert lines["restore_one"] == [(0, 0.25), (1, -0.05), (2, 1), (3, 0.5)]
    assert lines["ga_s2"] == [(2, 0), (3, 1)], "counted from the worst candidate, at the end of training"


def test_a_ranking_without_oracle_or_a_second_method_leaves_them_out() -> None:
    found = ranking()
    found["methods"], found["method"] = {"greedy": found["methods"]["greedy"]}, f"greedy{NASTY}"
    found["spearman"] = {}
    del found["oracle"]
    panel = ranking_panel(found)
    assert importance_series(found) == [] and "<script" not in panel
    for word in ("oracle", "Spearman", "Scores by layer", "every candidate"):
        assert word not in panel, word


def test_half_a_run_has_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"name": "young", "stages": {"align": {}}}')
    assert "young" in write_report(tmp_path).read_text()
    (tmp_path / "align").mkdir()
    (tmp_path / "align" / "stage.json").write_text('{"kind": "train", "status": "failed", "seconds": 3}')
    assert "class=failed>failed" in write_report(tmp_path).read_text()
    assert "young" in model_card(read_run(tmp_path))


def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no recipe\.json"):
        write_report(tmp_path)
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"recipe\.json: not JSON"):
        write_report(tmp_path)


def test_best_is_looked_for_among_students_and_not_where_they_tie() -> None:
    rows = {row.measure: row for row in comparison_rows(evaluation())}
    assert rows["cross-entropy, nats/token"].best == 2
    assert rows["repeat, 32 tokens back"].best is None
    assert rows["over teacher's, at 1k tokens"].cells == ("1.00×", "1.00×", "1.50×")
    assert rows["cross-entropy gap to the teacher"].cells == ("–", "+4.0000", "+0.0500")


def test_measures_that_were_not_taken_leave_no_row() -> None:
    results = {key: evaluation()[key] for key in ("student", "teacher", "models", "perplexity", "divergence")}
    assert {row.group for row in comparison_rows(results)} == {"held-out text", "size"}


def test_card_keeps_its_table_whole(run_dir: Path) -> None:
    results = evaluation()
    name = "a|b"
    for part in ("models", "perplexity", "divergence", "recall", "cache", "speed"):
        results[part][name] = results[part].pop("distil")
    results["student"] = name
    (run_dir / "evaluate/evaluation/evaluation.json").write_text(json.dumps(results))
    table = [line for line in model_card(read_run(run_dir)).splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {5}


def test_charts_are_xml_and_leave_out_what_is_not_finite() -> None:
    series = [Series("a", [(1.0, 1.0), (2.0, math.nan), (3.0, 100.0)], "red"), Series("b", [(1.0, math.inf)], "blue")]
    chart = line_chart(series, x_label="x", y_label="y", log_y=True)
    assert len(xml.dom.minidom.parseString(chart).getElementsByTagName("title")) == 2
    assert "nan" not in chart and "inf" not in chart
    assert "no points" in line_chart([Series("a", [], "red")], x_label="x", y_label="y")
    assert "<svg" in line_chart([Series("a", [(1.0, 0.0)], "red")], x_label="x", y_label="y")


def test_every_step_of_the_loss_is_in_the_curve(run_dir: Path) -> None:
    stage = next(stage for stage in read_run(run_dir).stages if stage.name == "align")
    figures = {title: (note, chart) for title, note, chart in training_figures(stage)}
    assert set(figures) == {"loss", "KL from the teacher", "attention residual by layer", "learning rate"}
    assert "training: 0.5 at step 1<" in figures["loss"][1]
    points, width = thin([(float(i), float(i)) for i in range(1000)], most=100)
    assert width == 10 and len(points) == 100 and points[0] == (9.0, 4.5)


def test_a_wait_for_the_teacher_is_drawn_where_there_was_one(run_dir: Path) -> None:
    stage = next(stage for stage in read_run(run_dir).stages if stage.name == "align")
    for shares, drawn in (((0.0, 0.0), False), ((0.0, 0.3), True)):
        metrics = [{"step": i, "loss": 1.0, "agreement": 0.0, "teacher_share": share} for i, share in enumerate(shares, 1)]
        titles = [title for title, _, _ in training_figures(replace(stage, metrics=metrics))]
        assert ("waiting for the teacher" in titles) is drawn
        assert "top-1 agreement with the teacher" in titles, "a measured zero is shown"


def test_ticks_are_round_and_inside() -> None:
    assert linear_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert log_ticks(0.05, 20) == pytest.approx([0.1, 1, 10])
    assert [size(n) for n in (0, 900, 1024, 1536, 1010 * 1024, 3 * 2**30)] == [
        "0 B",
        "900 B",
        "1 KiB",
        "1.5 KiB",
        "1010 KiB",
        "3 GiB",
    ]
