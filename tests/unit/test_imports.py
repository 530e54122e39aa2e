"""Imports stand at the top of a module; those inside a function say that they are there for start-up time."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

#: Imports of cfsp's own modules inside functions that may do without a reason in a comment.
LIMIT = 20


def unmarked(file: Path) -> Iterator[str]:
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("cfsp"):
                continue
            above = node.lineno - 1
            while (above and lines[above - 1].strip().startswith(("import ", "from ", ")"))) or lines[
                above - 1
            ].strip().endswith(","):
                above -= 1
            if "start-up time" not in lines[above - 1].lower():
                yield f"{file.relative_to(ROOT)}:{node.lineno}"


def test_imports_inside_functions_say_why():
    places = {place for file in (ROOT / "cfsp").rglob("*.py") for place in unmarked(file)}
    assert len(places) <= LIMIT, "\n".join(sorted(places))
