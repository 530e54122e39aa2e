"""A reader that closes the pipe early, as head does, is no error."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("name", ["benchmark", "sweep", "export", "inspect", "verify", "tables", "report"])
def test_help_into_a_closed_pipe_says_nothing(name):
    process = subprocess.Popen(
        [sys.executable, "-m", "cfsp.run", name, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 0
