"""What mkdocs is told beyond mkdocs.yml: the reference is made as the site is built, notebooks are pages, links that leave docs/ become words."""

from __future__ import annotations

import logging
import xml.etree.ElementTree as etree
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import reference
from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from notebook_pages import markdown

log = logging.getLogger("mkdocs.hooks.limbeck")


class NotebookFile(File):
    """An executed notebook, which is a page like the Markdown files beside it."""

    def is_documentation_page(self) -> bool:
        return True

    @property
    def content_string(self) -> str:
        return markdown(Path(self.abs_src_path or ""))


class OutsideLinks(Treeprocessor):
    """A link to a file of the repository that is no page: it works there, and here it is its words and the file's path."""

    docs = Path()
    page = Path()

    def run(self, root: etree.Element) -> None:
        """Change the tree of a page in place; what such a link names must exist, as a page's links must."""
        for link in root.iter("a"):
            target = urlsplit(link.get("href", ""))
            if target.scheme or target.netloc or not target.path:
                continue
            path = (self.docs / self.page.parent / target.path).resolve()
            if path.is_relative_to(self.docs):
                continue
            repository = self.docs.parent
            if not path.is_relative_to(repository) or not path.exists():
                log.warning(f"{self.page}: links to '{target.path}', which is not in the repository")
            del link.attrib["href"]
            name = path.relative_to(repository).as_posix() if path.is_relative_to(repository) else target.path
            link.tag = "span"
            link.set("class", "outside")
            if name.rstrip("/") not in "".join(link.itertext()):
                last = link[-1] if len(link) else link
                code = etree.SubElement(link, "code")
                code.text = name
                code.tail = ")"
                if last is link:
                    link.text = f"{link.text or ''} ("
                else:
                    last.tail = f"{last.tail or ''} ("


class _Outside(Extension):
    def __init__(self) -> None:
        super().__init__()
        self.processor = OutsideLinks()

    def extendMarkdown(self, md: Markdown) -> None:
        """After the links were read (20) and before mkdocs looks at them (0)."""
        self.processor.md = md
        md.treeprocessors.register(self.processor, "limbeck-outside", 5)


_outside = _Outside()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the reference into the menu and the treatment of links into Markdown."""
    config.nav = [{"Reference": reference.navigation()} if entry == "Reference" else entry for entry in config.nav or []]
    _outside.processor.docs = Path(config.docs_dir).resolve()
    config.markdown_extensions.append(_outside)  # type: ignore[arg-type]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference, and turn notebooks into pages."""
    for path, text in reference.pages().items():
        files.append(File.generated(config, f"reference/{path}", content=text))
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            files.remove(file)
            files.append(NotebookFile(file.src_uri, file.src_dir, file.dest_dir, file.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> None:
    """Tell the treatment of links where it is."""
    _outside.processor.page = Path(page.file.src_uri)
