"""Folder of local lm-eval task files: its tasks, the content that decides their figures, and its limits.

Task files are code. A ``!function`` value is Python that is imported, and a template is a program of its own. A folder
outside cfsp therefore needs ``plugins.allow=[tasks]``, and everything that a task runs has to lie in its folder.
lm-eval itself would take ``!function os.system`` from the standard library and follow ``include:
../../elsewhere.yaml``.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cfsp.errors import DataError
from cfsp.system.package import package_path
from cfsp.system.reading import read_text

#: Entry of ``plugins.allow`` that admits task folders.
PLUGIN_WORD = "tasks"
#: Size of the largest task YAML that is read; those of lm-eval have a few kilobytes.
_MAX_YAML_BYTES = 4_000_000
#: Largest number of values in a task YAML; anchors can turn a few lines into millions.
_MAX_VALUES = 100_000
#: Folders that lm-eval does not look into.
_IGNORED = {"__pycache__", ".ipynb_checkpoints"}
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@dataclass(frozen=True, eq=False)
class TaskFile:
    """Parsed task YAML.

    Attributes:
        path: path of the file.
        content: parsed content, in which ``!function`` values are strings.
        functions: all ``!function`` values, at any depth.
    """

    path: Path
    content: dict[str, Any]
    functions: tuple[str, ...]

    @property
    def includes(self) -> list[str]:
        """Return the names of the YAML files in ``include`` entries, at any depth."""
        return list(_strings_under_key(self.content, "include"))

    @property
    def names(self) -> list[str]:
        """Return the task or group that it defines, and its tags."""
        name = self.content.get("group", self.content.get("task"))
        tags = strings(self.content.get("tag"))
        return [name, *tags] if isinstance(name, str) else tags

    @property
    def members(self) -> list[str]:
        """Return the names of the tasks and groups that a group lists."""
        listed = self.content.get("task")
        if not isinstance(listed, list):
            return []
        entries = [entry.get("group", entry.get("task")) if isinstance(entry, dict) else entry for entry in listed]
        return [entry for entry in entries if isinstance(entry, str)]

    @property
    def is_plain(self) -> bool:
        """Return whether it is a single task without includes and functions."""
        return isinstance(self.content.get("task"), str) and not self.includes and not self.functions


def read_task(path: Path, key: str) -> TaskFile:
    """Parse a task YAML; ``!function`` values become strings.

    Args:
        path: the file.
        key: configuration key of the evaluator, for messages.

    Raises:
        DataError: the file cannot be read or is not a task YAML; names ``key``.
    """
    text = read_text(path, f"{key}.include_path: {path}", limit=_MAX_YAML_BYTES, error=DataError)
    return _parse_task(path, text, key)


@lru_cache(maxsize=4096)
def _parse_task(path: Path, text: str, key: str) -> TaskFile:
    import yaml

    functions: list[str] = []

    class Loader(yaml.SafeLoader):
        """Loader for this file alone, because its constructor collects the functions of the file."""

    def construct_function(loader: yaml.SafeLoader, node: Any) -> str:
        functions.append(str(node.value))
        return f"!function {node.value}"

    Loader.add_constructor("!function", construct_function)
    try:
        content = yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{key}.include_path: {path} is not a task YAML ({reason})") from error
    try:
        size = _size(content, {})
    except RecursionError:
        size = _MAX_VALUES + 1
    if size > _MAX_VALUES:
        raise DataError(
            f"{key}.include_path: {path} is not a task YAML (nested too deep, or more than {_MAX_VALUES:,} values)"
        )
    return TaskFile(path, content if isinstance(content, dict) else {}, tuple(functions))


def _size(value: Any, sizes: dict[int, int]) -> int:
    """Count the values of a YAML with its anchors unfolded; each value is visited once.

    Raises:
        RecursionError: a value holds itself, or the nesting is too deep.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in sizes:
        sizes[id(value)] = _MAX_VALUES + 1  # stays in place for a value that holds itself
        inner = value.values() if isinstance(value, dict) else value
        sizes[id(value)] = 1 + sum(_size(entry, sizes) for entry in inner)
    return sizes[id(value)]


def local_tasks(include_path: str | None, key: str) -> dict[str, list[TaskFile]]:
    """Return, by name, the files that define each task, group and tag of a folder.

    The files of a group include those of its members.

    Args:
        include_path: the folder; None: there are no local tasks.
        key: configuration key of the evaluator, for messages.

    Raises:
        DataError: there is no such folder, or a file in it is not a task YAML.
    """
    if include_path is None:
        return {}
    folder = package_path(include_path)
    if not folder.is_dir():
        raise DataError(f"{key}.include_path={include_path}: no such folder")
    files = [read_task(path, key) for path in yaml_files(folder)]
    defined: dict[str, list[TaskFile]] = {}
    for file in files:
        for position, name in enumerate(file.names):
            # lm-eval uses the first of two files with the same name; a tag collects all files that carry it.
            if name not in defined or (position > 0 or "task" not in file.content):
                defined.setdefault(name, []).append(file)
    return {name: _with_members(list(files_of_name), defined) for name, files_of_name in defined.items()}


def yaml_files(folder: Path) -> list[Path]:
    """Return the YAML files of a folder that lm-eval reads, in its order."""
    inside = (path for path in folder.glob("**/*.yaml") if not _IGNORED & set(path.parts))
    return sorted(inside, key=lambda path: path.as_posix())


def _with_members(files: list[TaskFile], defined: dict[str, list[TaskFile]]) -> list[TaskFile]:
    for file in files:  # the list grows while it is iterated
        for member in file.members:
            files += [other for other in defined.get(member, ()) if other not in files]
    return files


def check_task_file(path: Path, folder: Path, key: str) -> None:
    """Check that everything that a task file runs and includes lies in its folder.

    Args:
        path: the task file.
        folder: folder of local tasks.
        key: configuration key of the evaluator, for messages.

    Raises:
        DataError: the file itself, a YAML that it includes or the module of a function lies elsewhere or is missing.
    """
    root = folder.resolve()
    if not Path(os.path.realpath(path)).is_relative_to(root):
        raise DataError(f"{key}.include_path: {path} leads outside {folder}; copy the file there")
    file = read_task(path, key)
    for name in file.functions:
        module = path.resolve().parent / f"{name.rpartition('.')[0].replace('.', '/')}.py"
        if not _FUNCTION.fullmatch(name) or not module.is_file() or not module.resolve().is_relative_to(root):
            raise DataError(
                f"{key}.include_path: !function {name[:100]} in {path}: its module has to be a .py file in {folder} "
                "(module.function, beside the YAML; no other folder, no link that leads outside)"
            )
    for name in file.includes:
        included = path.parent / name
        if Path(name).is_absolute() or not included.resolve().is_relative_to(root):
            raise DataError(
                f"{key}.include_path: include: {name[:100]} in {path} leads outside {folder}; copy the file there"
            )


def hash_task_files(files: list[TaskFile], folder: Path, key: str) -> str:
    """Return the SHA-256 of all local files that decide a task: its YAML, its includes, its functions and its data.

    Raises:
        DataError: a file is missing or lies outside ``folder``.
    """
    digest = hashlib.sha256()
    # Each path once, so that a task in several files (a group) is hashed as a single set.
    for path in sorted({path for file in files for path in _iterate_files(file, folder, key, ())}):
        if not path.is_file():
            raise DataError(
                f"{key}: task {files[0].path.stem} names the file {path}, which does not exist; "
                "put it beside the task's YAML"
            )
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _iterate_files(file: TaskFile, folder: Path, key: str, including_files: tuple[Path, ...]) -> Iterator[Path]:
    """Yield the YAML of a task, the YAMLs that it includes, the modules of its functions and its data files."""
    if file.path.resolve() in including_files:
        raise DataError(f"{key}.include_path: {file.path} includes itself")
    check_task_file(file.path, folder, key)
    yield file.path
    for name in file.includes:
        included = file.path.parent / name
        if not included.is_file():
            yield included  # hash_task_files reports it as missing
            continue
        yield from _iterate_files(read_task(included, key), folder, key, (*including_files, file.path.resolve()))
    for name in file.functions:
        yield file.path.parent / f"{name.rpartition('.')[0].replace('.', '/')}.py"
    for name in strings((_mapping(file.content.get("dataset_kwargs"))).get("data_files")):
        if "://" not in name:
            # The harness resolves paths from the working folder; a plain task is handed over with absolute ones.
            beside = file.path.parent / name
            yield beside if beside.is_file() or not Path(name).is_file() else Path(name)


def with_absolute_data(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the task with absolute paths of the data files beside its YAML.

    lm-eval itself resolves them from the working folder.
    """
    files = _mapping(task.get("dataset_kwargs")).get("data_files")

    def absolute(value: Any) -> Any:
        if isinstance(value, str):
            beside = folder / value
            return str(beside.resolve()) if "://" not in value and beside.is_file() else value
        if isinstance(value, list):
            return [absolute(entry) for entry in value]
        return {split: absolute(entry) for split, entry in value.items()} if isinstance(value, dict) else value

    if not files:
        return task
    return {**task, "dataset_kwargs": {**task["dataset_kwargs"], "data_files": absolute(files)}}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _strings_under_key(value: Any, key: str) -> Iterator[str]:
    """Yield every string under ``key``, at any depth."""
    if isinstance(value, dict):
        yield from strings(value.get(key))
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for entry in entries:
        yield from _strings_under_key(entry, key)


def strings(value: Any) -> list[str]:
    """Return every string in a value that may be a string, a list of them, or a dictionary of either."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in strings(item)] if isinstance(value, list) else []
