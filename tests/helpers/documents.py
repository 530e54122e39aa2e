"""The pages that a user reads: README.md, CONTRIBUTING.md and docs/, with what is in them for the tests."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
}
#: All pages as one text.
TEXT = "\n\n".join(PAGES.values())

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Fence:
    """A fenced block of a page: its language and its content."""

    page: str
    language: str
    content: str

    @property
    def file(self) -> str | None:
        """The path in the comment of its first line, where it is a file."""
        named = re.match(r"# (\S+\.(?:py|yaml))$", self.content.partition("\n")[0])
        return named.group(1) if named else None


FENCES = [Fence(page, language, content) for page, text in PAGES.items() for language, content in _FENCE.findall(text)]


def without_fences(text: str) -> str:
    """Return a page without its fenced blocks."""
    return _FENCE.sub("", text)


def code_spans(page: str) -> list[str]:
    """Return the inline code of a page."""
    return re.findall(r"`([^`\n]+)`", without_fences(PAGES[page]))


def command_lines() -> list[tuple[str, str]]:
    """Return (page, command line) of every ``sh`` fence, and of inline code that is a whole command."""
    lines = [
        (fence.page, line.strip())
        for fence in FENCES
        if fence.language == "sh"
        for line in fence.content.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    lines += [
        (page, span)
        for page in PAGES
        for span in code_spans(page)
        if re.match(r"cfsp .*(=|--|-m )|(make|python scripts/\S+|python docs/\S+) \S", span) and "..." not in span
    ]
    return list(dict.fromkeys(lines))


def words_of(line: str) -> list[str]:
    """Split a command line as a shell does; comments go."""
    return shlex.split(line, comments=True)


def path_exists(path: str) -> bool:
    """Whether a path of the repository exists; ``path`` may hold wildcards."""
    return any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()


def folder_text(path: Path) -> str:
    """Return the text of a Markdown file, or of all Markdown files in a folder."""
    files = sorted(path.rglob("*.md")) if path.is_dir() else [path]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)
