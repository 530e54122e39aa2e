"""The site builds from docs/ with every link checked, and its pages fetch nothing; needs the extra ``docs``."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.helpers.documents import FENCES

pytest.importorskip("material", reason="needs pip install 'cfsp[docs]'")
pytest.importorskip("latex2mathml", reason="needs pip install 'cfsp[docs]'")


def test_the_site_builds_and_needs_no_network(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")}
    formulas = sum(fence.language == "math" and fence.page == "docs/methods.md" for fence in FENCES)
    assert pages["methods.html"].count("<math") == formulas > 0
    for name, page in pages.items():
        assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//[^"]*"', page), name
