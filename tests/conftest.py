"""Shared fixtures: the real models and data beside the checkout, and the command line run in this process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def shared(*parts: str) -> Path:
    """A path under ../shared; without it the test skips, or fails where CFSP_REQUIRE_SHARED=1."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        if os.environ.get("CFSP_REQUIRE_SHARED") == "1":
            pytest.fail(f"{'/'.join(('../shared', *parts))} is missing and CFSP_REQUIRE_SHARED=1")
        pytest.skip(f"needs {'/'.join(('../shared', *parts))}, which is not here")
    return path


@pytest.fixture(scope="session", autouse=True)
def _determinism() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run_cfsp(tmp_path, monkeypatch, capsys):
    """Run the command line in this process: ``code, out, err = run_cfsp("key=value", ...)``."""
    import sys

    from hydra.core.global_hydra import GlobalHydra

    from cfsp import run

    def call(*words: str, defaults: bool = True):
        given = list(words)
        if defaults:
            base = {
                "paths.output_dir": tmp_path / "out",
                "paths.cache_dir": tmp_path / "cache",
                "paths.records_dir": tmp_path / "records",
            }
            named = {word.split("=", 1)[0] for word in given}
            given += [f"{key}={value}" for key, value in base.items() if key not in named]
            if not any(word.startswith("logger") for word in given):
                given.append("logger=none")
        monkeypatch.setattr(sys, "argv", ["cfsp", *given])
        GlobalHydra.instance().clear()
        capsys.readouterr()
        code = run._main(sys.argv)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def refused(run_cfsp, tmp_path, monkeypatch):
    """Run a command line that must end with exit code 2: ``lines = refused("key=value", ...)``.

    Each line on stderr is one finding, no weight is loaded, and nothing stays behind but an empty OUT.
    """
    import transformers

    from cfsp import pipeline

    def no_weights(*_, **__):
        raise AssertionError("weights were loaded")

    def files():
        return {path for path in tmp_path.rglob("*") if path != tmp_path / "out"}

    def call(*words: str, loads: bool = False, **keys) -> list[str]:
        before = files()
        with monkeypatch.context() as patch:
            if not loads:
                patch.setattr(pipeline, "load_model", no_weights)
                patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", no_weights)
            code, _, err = run_cfsp(*words, **keys)
        lines = err.splitlines()
        assert code == 2, err
        assert lines
        assert all(line.startswith("cfsp: ") for line in lines), err
        if not loads:
            assert files() == before
        return [line.removeprefix("cfsp: ") for line in lines]

    return call
