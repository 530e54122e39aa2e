"""Other versions of transformers beside the installed one, in environments that share everything else with this one."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import ROOT


def with_transformers(version: str) -> Path:
    """The Python of an environment with that version, which is made in the checkout where it is not there.

    Only transformers and what it needs in other versions is installed. torch and the rest are found in this
    environment's packages, whose own .pth files (an editable install of cfsp) are not followed from there. Where no
    package index is at hand the test skips, or fails where CFSP_REQUIRE_SHARED=1.
    """
    folder = ROOT / f".venv-transformers-{version.removesuffix('.*')}"
    python, done = folder / "bin" / "python", folder / ".installed"
    wanted = f"transformers=={version} in {sys.version} beside {sysconfig.get_paths()['purelib']}\n"
    if done.is_file() and done.read_text(encoding="utf-8") == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    install = ["install", "--quiet", "--retries", "1", f"transformers=={version}"]
    ended = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), *install], capture_output=True, text=True
    )
    if ended.returncode:
        said = f"transformers {version} could not be installed: {' '.join(ended.stderr.split())[-300:]}"
        if os.environ.get("CFSP_REQUIRE_SHARED") == "1":
            pytest.fail(said)
        pytest.skip(said)
    done.write_text(wanted, encoding="utf-8")
    return python
