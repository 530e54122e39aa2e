"""Links and paths in README.md, CONTRIBUTING.md and docs/ lead somewhere."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml

from tests.conftest import ROOT
from tests.helpers.documents import PAGES, TEXT, code_spans, path_exists, without_fences

#: Folders of the repository whose paths the pages name.
_FOLDERS = ("cfsp", "conf", "docs", "experiments", "results", "scripts", "tests")
#: The pages name the modules of the new layout.
_NEW_LAYOUT = (ROOT / "cfsp" / "cli").is_dir()


def _anchors(page: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", without_fences(PAGES[page]), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_fences(PAGES[page])):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), link
        name = target.resolve().relative_to(ROOT).as_posix()
        assert not anchor or anchor in _anchors(name), link


@pytest.mark.parametrize("page", PAGES)
def test_paths_of_the_repository_that_a_page_names_exist(page):
    for span in code_spans(page):
        if re.fullmatch(rf"({'|'.join(_FOLDERS)})/[\w./*-]+", span) and not re.search(r"/[A-Z]{2,}\b(?!\.md)", span):
            if span.startswith("cfsp/") and not _NEW_LAYOUT:
                continue
            assert path_exists(span.rstrip("/")), span


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    navigation = yaml.safe_load(text)["nav"]

    def files(entry):
        if isinstance(entry, str):
            return [entry]
        return [file for one in (entry.values() if isinstance(entry, dict) else entry) for file in files(one)]

    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert set(files(navigation)) == pages


def test_every_page_is_linked_in_the_readme():
    linked = set(re.findall(r"\]\(docs/([\w/-]+\.md)", PAGES["README.md"]))
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")} - {"index.md"}
    assert linked == pages


def test_the_changelog_has_the_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert re.search(rf"^## \[{re.escape(version)}\]", PAGES["CHANGELOG.md"], re.MULTILINE)


def test_the_pages_are_written_in_one_way():
    """Decimals begin with a digit, nothing names a machine, and the old names of commands are gone."""
    prose = re.sub(r"`[^`\n]*`", "", without_fences(TEXT))
    assert not re.findall(r"(?<![\w.)\]/-])\.\d+", prose)
    assert not re.search(r"/(?:home|root|work|tmp)/", TEXT)
    text = "\n".join(text for page, text in PAGES.items() if page != "CHANGELOG.md")
    assert not re.search(r"scripts/(?:sweep|tables|report|benchmark)\.py", text)
