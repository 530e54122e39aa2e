"""Configuration of an inspected model, read from a folder, a GGUF file, the hub, or a file of conf/model."""

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
from cfsp.weights.dequantise import note_of, write_config_of
from cfsp.weights.folder_check import ADAPTER, check_files, check_no_adapter, read_config
from cfsp.weights.gguf_choice import gguf_file_of, the_only_one
from cfsp.weights.gguf_header import read_header
from cfsp.weights.gguf_model import config_of, unread_settings, write_config
from cfsp.weights.source import ModelSource, gguf_files_on_hub, is_hub_id


@dataclass(frozen=True)
class ConfigSource:
    """Configuration that a model is built from, and where it was read.

    Attributes:
        source: the model; its folder holds config.json, and its fingerprint is empty because no weight is read.
        kind: where the numbers are from: folder, gguf, hub or yaml.
        notes: remarks for the user on where the numbers are from.
        differences: a line for each key in which conf/model and config.json differ.
        by_path: whether path= was given, not model=.
    """

    source: ModelSource
    kind: str
    notes: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    by_path: bool = False


def names() -> list[str]:
    """Return the models of conf/model."""
    return sorted(path.stem for path in (config_folder() / "model").glob("*.yaml"))


@contextmanager
def open_config_source(
    model: str | None, path: str | None, *, trust_remote_code: bool = False, gguf_file: str | None = None
) -> Iterator[ConfigSource]:
    """Yield the configuration of a model, and remove the temporary files at the end.

    Args:
        model: name of a file of conf/model; None: ``path`` is given.
        path: folder or hub id.
        trust_remote_code: whether code on the hub is fetched and run.
        gguf_file: name of the GGUF file in ``path``, where there are several.

    Raises:
        ConfigError: there is no such model, or it has no numbers.
        CheckpointError: there is no such folder, or no config.json in it.
    """
    with tempfile.TemporaryDirectory(prefix="cfsp-inspect-") as scratch:
        if model is not None:
            yield _read_name(model, Path(scratch), trust_remote_code)
        else:
            yield _read_path(str(path), gguf_file, Path(scratch), trust_remote_code)


def _read_path(path: str, gguf_file: str | None, scratch: Path, trust_remote_code: bool) -> ConfigSource:
    folder = Path(path).expanduser()
    section = ModelSection(name="path", path=path, gguf_file=gguf_file)
    file = gguf_file_of(folder, gguf_file, f"path={path}")
    if file is not None:
        return replace(_read_gguf(file, f"path={path}", scratch), by_path=True)
    if folder.exists() or not is_hub_id(path):
        return replace(_read_folder(folder.resolve().name, f"path={path}", path, folder, scratch), by_path=True)
    try:
        return replace(_read_hub(path, section, scratch, trust_remote_code), by_path=True)
    except CheckpointError:
        raise
    except Exception as error:  # the hub and the network fail in many ways
        near = suggest(path, names()).replace("did you mean ", "did you mean model=")
        raise CheckpointError(
            hub_error(f"path={path}", error, "the folder of a model (path=DIR), or model=NAME") + near
        ) from error


def _read_name(name: str, scratch: Path, trust_remote_code: bool) -> ConfigSource:
    section = _section(name)
    if section.path is None:
        raise ConfigError(f"model={name}: names no model of its own; give path=DIR, the folder of a model")
    folder, yaml_values = package_path(section.path), section.architecture
    try:
        if section.path.startswith("pkg://") or folder.is_dir() or not is_hub_id(section.path):
            numbers = _read_folder(name, f"model={name}", section.path, folder, scratch)
        else:
            numbers = _read_hub(name, section, scratch / "hub", trust_remote_code)
    except Exception as error:  # the hub and the network fail in many ways
        if yaml_values is None and isinstance(error, CheckpointError):
            raise
        if yaml_values is None:
            raise CheckpointError(hub_error(f"model={name}", error, "path=DIR, the folder of a model")) from error
        return ConfigSource(
            _yaml_source(name, yaml_values, scratch),
            "yaml",
            (f"the numbers are those of {_file(name)}, not compared with {section.path}: {_missing_reason(error)}",),
        )
    return numbers if yaml_values is None else _add_differences(numbers, name, yaml_values, scratch, trust_remote_code)


def _missing_reason(error: Exception) -> str:
    """Return a clause on why there is no config.json."""
    if isinstance(error, CheckpointError):
        return str(error).partition(": ")[2].partition(";")[0]
    return re.sub(r"^no local path,( and)? ", "", hub_reason(error).partition("; ")[0])  # the user gave no local path


def _section(name: str) -> ModelSection:
    file = config_folder() / "model" / f"{name}.yaml"
    if name not in names():
        raise ConfigError(
            f"model={name}: there is no such model{suggest(name, names())}; models: {', '.join(names())}; a folder or "
            "a hub id is given with path="
        )
    values: Any = OmegaConf.to_container(OmegaConf.load(file))
    values.pop("defaults", None)  # the defaults of the other keys are those of the section
    try:
        return ModelSection(**values)
    except ValidationError as error:
        raise ConfigError(*(f"{_file(name)}: {line}" for line in problems_of(error, "", ModelSection))) from error


def _read_folder(name: str, where: str, origin: str, folder: Path, scratch: Path) -> ConfigSource:
    """Return the configuration of a model folder.

    Args:
        name: name of the model.
        where: key=value that named the folder, for messages.
        origin: the folder as the user wrote it.
        folder: its path.
        scratch: an empty folder.
    """
    if not folder.is_dir():
        problem = "this is a file" if folder.exists() else "there is no such folder"
        raise CheckpointError(f"{where}: {problem}; give the folder of a model, or the OUT of a run")
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        folder, origin = folder / "model", f"{origin.rstrip('/')}/model"
    check_no_adapter(folder, where)
    check_files(folder, where)
    source = ModelSource(name, origin, folder, _config(where, folder), "")
    weights = any(folder.glob("*.safetensors"))
    notes = () if weights else ("the folder holds no *.safetensors weights",)
    return _apply_dequantisation(ConfigSource(source, "folder", notes), scratch)


def _apply_dequantisation(numbers: ConfigSource, scratch: Path) -> ConfigSource:
    """Replace the configuration of a quantised checkpoint by the one that a run dequantises it to."""
    source = numbers.source
    note = note_of(source.config)
    if note is None:
        return numbers
    write_config_of(source.folder, scratch)
    plain = replace(source, folder=scratch, config=_config(source.origin, scratch))
    return replace(numbers, source=plain, notes=(*numbers.notes, note))


def _read_gguf(file: Path, where: str, scratch: Path) -> ConfigSource:
    """Return the configuration in the header of a GGUF file; neither weights nor tokenizer are read."""
    header = read_header(file, where)
    write_config(config_of(header, where), header, scratch)
    size = f"{file.stat().st_size / 2**20:,.1f} MiB"
    notes = [f"GGUF, {header.quantisation}, {size}; a run dequantises the weights to {header.dtype}"]
    notes += [f"transformers' GGUF reader leaves out {setting}" for setting in unread_settings(header)]
    return ConfigSource(ModelSource(file.stem, str(file), scratch, _config(where, scratch), ""), "gguf", tuple(notes))


def _read_hub(name: str, section: ModelSection, scratch: Path, trust_remote_code: bool) -> ConfigSource:
    """Return the content of config.json on the hub or in its local cache; no weight is fetched but a GGUF file."""
    repo, file = str(section.path), section.gguf_file
    code = ["*.py"] if trust_remote_code else []
    folder = fetch_snapshot(repo, section.revision, allow=["config.json", *code], ignore=[])
    scratch.mkdir(exist_ok=True)
    if file is None and not (folder / "config.json").is_file():
        names = gguf_files_on_hub(repo, folder)
        file = the_only_one(names, f"path={repo}") if names else None
    if file is not None:
        return _read_gguf_on_hub(section, file, scratch)
    origin = f"{repo}@{folder.name}"
    adapter = _adapter_of_hub(repo, folder.name)
    if adapter is not None:
        check_no_adapter(adapter, origin, full_weights=(folder / "config.json").is_file())
    source = ModelSource(name, origin, folder, _config(origin, folder), "")
    return _apply_dequantisation(ConfigSource(source, "hub"), scratch)


def _read_gguf_on_hub(section: ModelSection, name: str, scratch: Path) -> ConfigSource:
    """Return the configuration in the header of a GGUF file on the hub, which is fetched for it and kept for a run."""
    repo = str(section.path)
    folder = fetch_snapshot(repo, section.revision, allow=[name], ignore=[])
    if not (folder / name).is_file():
        available = ", ".join(gguf_files_on_hub(repo, folder)[:8]) or "none"
        raise CheckpointError(f"gguf_file={name}: {repo} has no such file; its GGUF files: {available}")
    numbers = _read_gguf(folder / name, f"path={repo}", scratch)
    return replace(numbers, source=replace(numbers.source, origin=f"{repo}@{folder.name}/{name}"))


def _adapter_of_hub(repo: str, commit: str) -> Path | None:
    """Return the folder with the adapter's configuration of a repository; None where there is none, or no answer."""
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
        message = str(error).replace(
            "config.json is not valid JSON", "config.json cannot be read, it is not valid JSON"
        )
        raise CheckpointError(message) from error


def _yaml_source(name: str, yaml_values: Mapping[str, Any], scratch: Path) -> ModelSource:
    """Write the configuration in conf/model as a model folder."""
    (scratch / "config.json").write_text(json.dumps(yaml_values), encoding="utf-8")
    return ModelSource(name, _file(name), scratch, dict(yaml_values), "")


def _add_differences(
    numbers: ConfigSource, name: str, yaml_values: Mapping[str, Any], scratch: Path, trust_remote_code: bool
) -> ConfigSource:
    """Add the differences from conf/model to the numbers of config.json; a missing key has its default."""
    yaml_config = load_config(_yaml_source(name, yaml_values, scratch))
    folder_config = load_config(numbers.source, trust_remote_code=trust_remote_code)
    differences = []
    for key, value in yaml_values.items():
        if key == "dtype":  # older files spell it torch_dtype
            yaml_value: Any = value
            folder_value: Any = numbers.source.stored_dtype
        else:
            yaml_value, folder_value = getattr(yaml_config, key, None), getattr(folder_config, key, None)
        if yaml_value != folder_value:
            differences.append(
                f"{key}: {shown(yaml_value)} in {_file(name)}, {shown(folder_value)} in {numbers.source.origin}"
            )
    if differences:
        note = f"{_file(name)} differs from {numbers.source.origin}, whose numbers these are:"
    else:
        note = f"{_file(name)} says the same as config.json of {numbers.source.origin}"
    return replace(numbers, notes=(*numbers.notes, note), differences=tuple(differences))


def _file(name: str) -> str:
    return f"conf/model/{name}.yaml"
