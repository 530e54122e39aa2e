"""The local stand-in for the Hugging Face hub (../shared/hub), and this process told to use it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.conftest import shared


def module(name: str) -> ModuleType:
    """``serve`` or ``build`` of ../shared/hub."""
    known = f"shared_hub_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, shared("hub", f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


def in_shards(out: Path, repo: str = "local/stories260K", source: Path | None = None) -> Path:
    """Make a model repository of three shards under ``out``; returns its folder."""
    folder = source or shared("models", "stories260K")
    module("build").build_model(out, f"{repo}={folder}:3", False)
    return out / "models" / repo


def use(endpoint: str, cache: Path, monkeypatch: Any, *, offline: bool = False) -> None:
    """Have huggingface_hub, which read its environment when it was imported, use another hub and cache."""
    values = {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": offline,
    }
    for name, value in values.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_HUB_OFFLINE", str(int(offline)))
    monkeypatch.delenv("HF_TOKEN", raising=False)
