"""The documentation site: it is built strictly, opens without a network, and its reference leaves nothing out."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml
from markdown import Markdown
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from limbeck.cli.app import app
from limbeck.config.explain import help_of, index, kinds
from limbeck.config.fields import fields_of
from limbeck.config.load import load_recipe, shipped_recipes
from limbeck.config.recipe import Recipe
from limbeck.registry import REGISTRIES

ROOT = Path(__file__).resolve().parents[2]
BUILD = """
import sys
from mkdocs.__main__ import cli
try:
    cli(sys.argv[1:])
finally:
    print("torch was imported" if "torch" in sys.modules else "no torch")
"""


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` does, into another folder."""
    words = [sys.executable, "-c", BUILD, "build", "--strict", "--config-file", str(config), "--site-dir", str(site)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


class Loaded(HTMLParser):
    """What a page loads when it is opened: not what it links to."""

    def __init__(self, page: str):
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed"):
            self.addresses.append(given.get("src") or "")
        elif tag == "link":
            self.addresses.append(given.get("href") or "")


def test_the_site_is_built_strictly_without_torch_and_opens_without_a_network(tmp_path: Path) -> None:
    done = build(ROOT / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no torch" in done.stdout
    pages = sorted((tmp_path / "site").rglob("*.html"))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        outside = [address for address in Loaded(text).addresses if re.match(r"(https?:)?//", address)]
        assert not outside, f"{page.name} loads {outside}"
        # The theme would fetch what draws these.
        assert 'class="mermaid"' not in text and 'class="arithmatex"' not in text
    for style in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:)?//|@import", style.read_text(encoding="utf-8")), style
    # Every page of the repository is there, and can be searched.
    names = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for kind in ("md", "ipynb") for path in (ROOT / "docs").rglob(f"*.{kind}")}
    assert names <= {page.relative_to(tmp_path / "site").as_posix() for page in pages}
    searched = (tmp_path / "site/search/search_index.js").read_text(encoding="utf-8")
    assert all(f'"location": "{name}"' in searched or f'"location":"{name}"' in searched for name in names)
    notebook = (tmp_path / "site/notebooks/hybrid.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in notebook
    assert "closed" in notebook and '<span class="n">check</span>' in notebook


def test_what_is_wrong_with_a_page_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    links = "[a](nothing.md) [b](#nowhere) [c](../nothing.py) [d](reference/mixers.md#swa) [e](reference/mixers.md#swo)"
    (tmp_path / "docs/index.md").write_text(f"# A\n\n{links}\n")
    (tmp_path / "docs/forgotten.md").write_text("# B\n")
    settings = {
        "INHERIT": str(ROOT / "mkdocs.yml"),
        "docs_dir": "docs",
        "hooks": [str(ROOT / "tools/site/hooks.py")],
        "watch": [],
        "nav": ["index.md", "Reference"],
    }
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings))
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 1
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    for words in ("nothing.md", "#nowhere", "../nothing.py", "#swo"):
        assert any(words in line for line in warnings), (words, done.stderr)
    assert "forgotten.md" in done.stderr
    assert len(warnings) == 5, done.stderr


@pytest.fixture(scope="module", autouse=True)
def shipped_parts_alone() -> Iterator[None]:
    """Without the plug-ins that other tests have put into the registries of this process."""
    with pytest.MonkeyPatch.context() as patch:
        for registry in REGISTRIES.values():
            ours = {name: options for name, options in registry._options.items() if options.__module__.startswith("limbeck.")}
            patch.setattr(registry, "_options", ours)
        yield


@pytest.fixture(scope="module")
def site() -> Iterator[ModuleType]:
    """The hooks of the site, as mkdocs imports them."""
    sys.path.insert(0, str(ROOT / "tools/site"))
    try:
        yield import_module("hooks")
    finally:
        sys.path.remove(str(ROOT / "tools/site"))


@pytest.fixture(scope="module")
def pages(site: ModuleType) -> dict[str, str]:
    return site.reference.pages()


def test_every_field_of_every_part_and_mapping_is_in_the_reference(pages: dict[str, str]) -> None:
    plain = {name: " ".join(re.sub(r"\\([*<\[\]|])", r"\1", page).split()) for name, page in pages.items()}
    for plural, kind in kinds().items():
        for name in REGISTRIES.get(kind, ()):
            page = pages[f"{plural}.md"]
            assert f"## `{name}`\n" in page and f"[`{name}`](#{name})" in page and f"`{name}`" in pages["index.md"]
            for key in fields_of(REGISTRIES[kind].options(name)):
                assert f'<a id="{name}.{key}"></a>`{key}`' in page, f"{kind} {name}: {key}"
    everywhere = " ".join(plain.values())
    anchors = re.findall(r'<a id="([^"]+)"', " ".join(pages.values()))
    for entry in index():
        assert any(anchor.endswith(f".{entry.key}") for anchor in anchors), entry.path
        assert entry.key == "kind" or help_of(entry.info), f"{entry.cls.__name__}.{entry.key} has no words"
        assert entry.key == "kind" or help_of(entry.info) in everywhere, f"{entry.cls.__name__}.{entry.key}"
    # One table for each class of options, and one row for each of its fields.
    classes = {entry.cls for entry in index()} | {registry.options(name) for registry in REGISTRIES.values() for name in registry}
    assert sum(page.count("| Field | Takes |") for page in pages.values()) == len(classes)
    assert len(anchors) == sum(len(fields_of(cls)) for cls in classes)
    assert all(f'<a id="recipe.{key}"></a>' in pages["recipe.md"] for key in fields_of(Recipe))


def test_every_recipe_is_in_the_reference_with_its_text(pages: dict[str, str], site: ModuleType) -> None:
    for name, path in shipped_recipes().items():
        page, recipe = pages[f"recipes/{name}.md"], load_recipe(name)
        block = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
        assert block and yaml.safe_load(block[1]) == yaml.safe_load(path.read_text(encoding="utf-8"))
        assert f"limbeck run {name}" in page
        assert all(f"| `{stage}` | [{options.kind}]" in page for stage, options in recipe.stages.items())
        assert f"[{name}]({name}.md)" in pages["recipes/index.md"]
    examples = [block for name, page in pages.items() for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "/" not in name]
    assert len(examples) > 40 and all(yaml.safe_load(example) for example in examples)
    listed = str(site.reference.navigation())
    assert all(f"'reference/{path}'" in listed for path in pages if path.endswith(".md")), "a page of the reference is not in its menu"


def test_every_verb_and_option_is_in_the_reference(pages: dict[str, str]) -> None:
    sections = dict(re.findall(r"^## (limbeck.*?)\n\n```text\n(.*?)\n```$", pages["commands.md"], re.DOTALL | re.MULTILINE))

    def look(command: Any, words: str) -> None:
        assert words in sections
        options = [name for option in command.params for name in option.opts if name.startswith("--") and not getattr(option, "hidden", False)]
        assert all(name in sections[words] for name in options), words
        for name, inner in getattr(command, "commands", {}).items():
            assert re.search(rf"^ +{re.escape(name)} ", sections[words], re.MULTILINE), f"{words} does not list {name}"
            look(inner, f"{words} {name}")

    root: Any = typer.main.get_command(app)
    look(root, "limbeck")
    assert len(sections) > len(root.commands) > 20


def test_a_link_that_leaves_docs_becomes_its_words_and_its_path(site: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    processor = site._outside.processor
    processor.docs, processor.page = ROOT / "docs", Path("behaviour/index.md")
    markdown = Markdown(extensions=[site._outside])
    assert markdown.convert("[measured](../../Makefile)") == '<p><span class="outside">measured (<code>Makefile</code>)</span></p>'
    assert markdown.convert("[`tools/site`](../../tools/site)") == '<p><span class="outside"><code>tools/site</code></span></p>'
    assert markdown.convert("[**it**](../../Makefile#x)") == '<p><span class="outside"><strong>it</strong> (<code>Makefile</code>)</span></p>'
    for kept in ("[a](../plan.md)", "[b](#here)", "[c](https://example.org/)"):
        assert "<a href=" in markdown.convert(kept)
    assert not caplog.records
    markdown.convert("[d](../../nothing)")
    assert "behaviour/index.md: links to '../../nothing'" in caplog.text


def test_the_locks_hold_all_that_the_site_needs_and_move_nothing() -> None:
    pinned: dict[str, set[str]] = {}
    for lock in ROOT.glob("requirements*.lock"):
        for line in lock.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                name, version = line.split("==")
                pinned.setdefault(canonicalize_name(name), set()).add(version)
    assert not {name: versions for name, versions in pinned.items() if len(versions) > 1}, "locks that disagree"
    extra = re.search(r'^docs = \[(.*?)\]$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert extra
    waiting, seen = [Requirement(text) for text in re.findall(r'"([^"]+)"', extra[1])], set()
    while waiting:
        need = waiting.pop()
        name = canonicalize_name(need.name)
        assert name in pinned, f"{need} is in no lock"
        assert all(need.specifier.contains(version) for version in pinned[name]), f"{need}, and the lock has {pinned[name]}"
        if name not in seen:
            seen.add(name)
            try:
                more = [Requirement(text) for text in requires(name) or ()]
            except PackageNotFoundError:
                pytest.fail(f"{name} is locked and not installed: make setup")
            waiting += [one for one in more if one.marker is None or one.marker.evaluate({**default_environment(), "extra": ""})]
