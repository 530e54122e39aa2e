"""The local stand-in for the Hugging Face hub (../shared/hub), and this process told to use it."""

from __future__ import annotations

import importlib.util
import socket
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


def break_the_api(monkeypatch: Any, times: int) -> list[str]:
    """Have the next answers of the API break off in the middle; returns the paths of those that did, as they come."""
    handler, broken = module("serve")._Handler, []
    answer = handler._answer

    def broken_answer(self: Any, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        if len(broken) == times or self.command != "GET" or not self.path.startswith("/api/"):
            answer(self, status, body, kind, headers)
            return
        broken.append(self.path)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    monkeypatch.setattr(handler, "_answer", broken_answer)
    return broken
