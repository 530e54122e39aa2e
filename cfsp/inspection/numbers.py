"""Where the numbers of an inspected model come from: a folder, the hub's config.json, or a file of conf/model."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import ValidationError

from cfsp.config.components import problems_of, shown, suggest
from cfsp.config.sections import ModelSection
from cfsp.errors import CheckpointError, ConfigError
from cfsp.model.transformers_config import load_config
from cfsp.system.hub import TIMEOUT, fetch_snapshot
from cfsp.system.hub_errors import hub_error, hub_reason
from cfsp.system.package import config_folder, package_path
from cfsp.weights.folder_check import ADAPTER, check_files, check_no_adapter, read_config
from cfsp.weights.source import ModelSource, is_hub_id


@dataclass(frozen=True)
class Numbers:
    """A configuration to build a model of.

    source: the folder that holds its config.json; its fingerprint is empty, because no weight is read. kind: folder,
    hub or yaml, where the numbers are from. notes: what there is to say of that; differences: where conf/model and
    config.json do not say the same, a line each. by_path: path= was given, not model=.
    """

    source: ModelSource
    kind: str
    notes: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    by_path: bool = False


def names() -> list[str]:
    """The models of conf/model."""
    return sorted(path.stem for path in (config_folder() / "model").glob("*.yaml"))


@contextmanager
def numbers_of(model: str | None, path: str | None, *, trust_remote_code: bool = False) -> Iterator[Numbers]:
    """The numbers of a ``model`` of conf/model, or of a folder or hub id ``path``; what is temporary goes at the end.

    Raises:
        ConfigError: no such model, or one without numbers. CheckpointError: no such folder, or no config.json in it.
    """
    with tempfile.TemporaryDirectory(prefix="cfsp-inspect-") as scratch:
        if model is not None:
            yield _of_name(model, Path(scratch), trust_remote_code)
        else:
            yield _of_path(str(path), trust_remote_code)


def _of_path(path: str, trust_remote_code: bool) -> Numbers:
    folder = Path(path).expanduser()
    if folder.exists() or not is_hub_id(path):
        return replace(_of_folder(folder.resolve().name, f"path={path}", path, folder), by_path=True)
    try:
        return replace(_of_hub(path, path, None, trust_remote_code), by_path=True)
    except CheckpointError:
        raise
    except Exception as error:  # the hub and the network fail in many ways
        near = suggest(path, names()).replace("did you mean ", "did you mean model=")
        raise CheckpointError(
            hub_error(f"path={path}", error, "the folder of a model (path=DIR), or model=NAME") + near
        ) from error


def _of_name(name: str, scratch: Path, trust_remote_code: bool) -> Numbers:
    section = _section(name)
    if section.path is None:
        raise ConfigError(f"model={name}: names no model of its own; give path=DIR, the folder of a model")
    folder, stated = package_path(section.path), section.architecture
    try:
        if section.path.startswith("pkg://") or folder.is_dir() or not is_hub_id(section.path):
            found = _of_folder(name, f"model={name}", section.path, folder)
        else:
            found = _of_hub(name, section.path, section.revision, trust_remote_code)
    except Exception as error:  # the hub and the network fail in many ways
        if stated is None and isinstance(error, CheckpointError):
            raise
        if stated is None:
            raise CheckpointError(hub_error(f"model={name}", error, "path=DIR, the folder of a model")) from error
        return Numbers(
            _stated(name, stated, scratch),
            "yaml",
            (f"the numbers are those of {_file(name)}, not compared with {section.path}: {_why(error)}",),
        )
    return found if stated is None else _compared(found, name, stated, scratch, trust_remote_code)


def _why(error: Exception) -> str:
    """Why there is no config.json, in a clause."""
    if isinstance(error, CheckpointError):
        return str(error).partition(": ")[2].partition(";")[0]
    return re.sub(r"^no local path,( and)? ", "", hub_reason(error).partition("; ")[0])  # nobody gave one


def _section(name: str) -> ModelSection:
    file = config_folder() / "model" / f"{name}.yaml"
    if name not in names():
        raise ConfigError(
            f"model={name}: there is no such model{suggest(name, names())}; models: {', '.join(names())}; a folder or "
            "a hub id is given with path="
        )
    values: Any = OmegaConf.to_container(OmegaConf.load(file))
    try:
        return ModelSection(**values)
    except ValidationError as error:
        raise ConfigError(*(f"{_file(name)}: {line}" for line in problems_of(error, "", ModelSection))) from error


def _of_folder(name: str, where: str, origin: str, folder: Path) -> Numbers:
    """``where``: key=value that named the folder."""
    if not folder.is_dir():
        found = "this is a file" if folder.exists() else "there is no such folder"
        raise CheckpointError(f"{where}: {found}; give the folder of a model, or the OUT of a run")
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        folder, origin = folder / "model", f"{origin.rstrip('/')}/model"
    check_no_adapter(folder, where)
    check_files(folder, where)
    source = ModelSource(name, origin, folder, _config(where, folder), "")
    weights = any(folder.glob("*.safetensors"))
    return Numbers(source, "folder", () if weights else ("the folder holds no *.safetensors weights",))


def _of_hub(name: str, repo: str, revision: str | None, trust_remote_code: bool) -> Numbers:
    """From config.json on the hub, or in its local cache; no weight is fetched."""
    code = ["*.py"] if trust_remote_code else []
    folder = fetch_snapshot(repo, revision, allow=["config.json", *code], ignore=[])
    origin = f"{repo}@{folder.name}"
    adapter = _adapter_of_hub(repo, folder.name)
    if adapter is not None:
        check_no_adapter(adapter, origin, full_weights=(folder / "config.json").is_file())
    return Numbers(ModelSource(name, origin, folder, _config(origin, folder), ""), "hub")


def _adapter_of_hub(repo: str, commit: str) -> Path | None:
    """The folder with the adapter's configuration that lies in a repository; None where there is none, or no answer."""
    from huggingface_hub import hf_hub_download

    with suppress(Exception):  # the hub and the network fail in many ways, and config.json is here
        return Path(hf_hub_download(repo, ADAPTER, revision=commit, etag_timeout=TIMEOUT)).parent
    return None


def _config(where: str, folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{where}: there is no config.json; give the folder that save_pretrained wrote")
    try:
        return read_config(folder, where)
    except CheckpointError as error:
        said = str(error).replace("config.json is not valid JSON", "config.json cannot be read, it is not valid JSON")
        raise CheckpointError(said) from error


def _stated(name: str, stated: Mapping[str, Any], scratch: Path) -> ModelSource:
    """What conf/model says, as a folder."""
    (scratch / "config.json").write_text(json.dumps(stated), encoding="utf-8")
    return ModelSource(name, _file(name), scratch, dict(stated), "")


def _compared(found: Numbers, name: str, stated: Mapping[str, Any], scratch: Path, trust_remote_code: bool) -> Numbers:
    """``found`` with what conf/model says otherwise; defaults count, whichever of the two leaves a key out."""
    ours = load_config(_stated(name, stated, scratch))
    theirs = load_config(found.source, trust_remote_code=trust_remote_code)
    differences = []
    for key, value in stated.items():
        if key == "dtype":  # a key of another name in older ones
            here: Any = value
            there: Any = found.source.stored_dtype
        else:
            here, there = getattr(ours, key, None), getattr(theirs, key, None)
        if here != there:
            differences.append(f"{key}: {shown(here)} in {_file(name)}, {shown(there)} in {found.source.origin}")
    if differences:
        note = f"{_file(name)} differs from {found.source.origin}, whose numbers these are:"
    else:
        note = f"{_file(name)} says the same as config.json of {found.source.origin}"
    return replace(found, notes=(*found.notes, note), differences=tuple(differences))


def _file(name: str) -> str:
    return f"conf/model/{name}.yaml"
