"""Reading what an offline W&B run holds, from its file on disk: a LevelDB log of protobuf records."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER, _IDENT = 32 * 1024, 7, 7


def offline_run(folder: Path) -> dict[str, Any]:
    """run (its own fields), config, summary, history (rows), artifact (name, type, files) of an offline-run folder."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("run-*.wandb")
    found: dict[str, Any] = {"summary": {}, "history": []}
    for data in _whole(path):
        entry = wandb_internal_pb2.Record()
        entry.ParseFromString(data)
        kind = entry.WhichOneof("record_type")
        if kind == "run":
            found["run"] = {"run_id": entry.run.run_id, "group": entry.run.run_group, "job_type": entry.run.job_type}
            found["config"] = {item.key: json.loads(item.value_json) for item in entry.run.config.update}
        elif kind == "summary":
            for item in entry.summary.update:
                found["summary"]["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        elif kind == "history":
            items = entry.history.item
            found["history"].append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
        elif kind == "request" and entry.request.WhichOneof("request_type") == "log_artifact":
            _artifact(found, entry.request.log_artifact.artifact)
        elif kind == "artifact":
            _artifact(found, entry.artifact)
    return found


def _artifact(found: dict[str, Any], artifact: Any) -> None:
    if artifact.type != "run_table":
        files = {content.path for content in artifact.manifest.contents}
        found["artifact"] = {"name": artifact.name, "type": artifact.type, "files": files}


def _whole(path: Path) -> list[bytes]:
    """All records; W&B's own process writes the last ones just after the run has finished."""
    from wandb.proto import wandb_internal_pb2

    for _ in range(100):
        chunks = list(_chunks(path.read_bytes()))
        last = wandb_internal_pb2.Record()
        last.ParseFromString(chunks[-1] if chunks else b"")
        if last.WhichOneof("record_type") == "exit":
            return chunks
        time.sleep(0.1)
    raise AssertionError(f"{path.name}: the run has no end")


def _chunks(content: bytes) -> Iterator[bytes]:
    """Records of the log: blocks of 32 KiB; a header is a checksum (4 bytes), a length (2) and whether it goes on."""
    at, whole = _IDENT, b""
    while at + _HEADER <= len(content):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in (1, 4):  # full, or the last part of one
            yield whole
            whole = b""
