"""A folder of local lm-eval task files: which tasks it defines, what decides their figures, and its limits.

Task files are code. A ``!function`` value is Python that is imported, and a template is a program of its own. So a
folder outside cfsp needs ``plugins.allow=[tasks]``, and what a task runs lies in its folder: lm-eval itself would take
``!function os.system`` from the standard library and follow ``include: ../../elsewhere.yaml``.
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

#: The word in ``plugins.allow`` for task folders.
PLUGIN_WORD = "tasks"
#: Largest task YAML that is read; lm-eval's own have a few kilobytes.
_MAX_YAML_BYTES = 4_000_000
#: Most values in one; anchors can make millions of a few lines.
_MAX_VALUES = 100_000
#: Folders that lm-eval does not look into.
_IGNORED = {"__pycache__", ".ipynb_checkpoints"}
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@dataclass(frozen=True, eq=False)
class TaskFile:
    """A parsed task YAML. ``functions``: its ``!function`` values, wherever in it they stand."""

    path: Path
    content: dict[str, Any]
    functions: tuple[str, ...]

    @property
    def includes(self) -> list[str]:
        """The YAML files that it includes, at any depth."""
        return list(_values_of(self.content, "include"))

    @property
    def names(self) -> list[str]:
        """The task or group that it defines, and its tags."""
        name = self.content.get("group", self.content.get("task"))
        tags = strings(self.content.get("tag"))
        return [name, *tags] if isinstance(name, str) else tags

    @property
    def members(self) -> list[str]:
        """Names of tasks and groups that a group lists."""
        listed = self.content.get("task")
        if not isinstance(listed, list):
            return []
        entries = [entry.get("group", entry.get("task")) if isinstance(entry, dict) else entry for entry in listed]
        return [entry for entry in entries if isinstance(entry, str)]

    @property
    def is_plain(self) -> bool:
        """Whether it is one task that stands for itself: nothing included, no functions."""
        return isinstance(self.content.get("task"), str) and not self.includes and not self.functions


def read_task(path: Path, key: str) -> TaskFile:
    """Parse a task YAML; ``!function`` values become strings.

    Raises:
        DataError: not readable, or not a YAML of this kind; names ``key``.
    """
    text = read_text(path, f"{key}.include_path: {path}", limit=_MAX_YAML_BYTES, error=DataError)
    return _parsed(path, text, key)


@lru_cache(maxsize=4096)
def _parsed(path: Path, text: str, key: str) -> TaskFile:
    import yaml

    functions: list[str] = []

    class Loader(yaml.SafeLoader):
        pass

    def function(loader: yaml.SafeLoader, node: Any) -> str:
        functions.append(str(node.value))
        return f"!function {node.value}"

    Loader.add_constructor("!function", function)
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
    """Count the values of a YAML with its anchors unfolded; each value is looked at once.

    Raises:
        RecursionError: a value holds itself, or the nesting is too deep.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in sizes:
        sizes[id(value)] = _MAX_VALUES + 1  # of a value that holds itself
        inner = value.values() if isinstance(value, dict) else value
        sizes[id(value)] = 1 + sum(_size(entry, sizes) for entry in inner)
    return sizes[id(value)]


def local_tasks(include_path: str | None, key: str) -> dict[str, list[TaskFile]]:
    """Name of each task, group and tag of a folder -> the files that define it; for a group, its members' as well.

    Raises:
        DataError: no such folder, or a file in it is not a task YAML.
    """
    if include_path is None:
        return {}
    folder = package_path(include_path)
    if not folder.is_dir():
        raise DataError(f"{key}.include_path={include_path}: no such folder")
    files = [read_task(path, key) for path in yaml_files(folder)]
    defined: dict[str, list[TaskFile]] = {}
    for file in files:
        for at, name in enumerate(file.names):
            # Of two files with one name lm-eval takes the first; a tag is of all that carry it.
            if name not in defined or (at > 0 or "task" not in file.content):
                defined.setdefault(name, []).append(file)
    return {name: _with_members(list(own), defined) for name, own in defined.items()}


def yaml_files(folder: Path) -> list[Path]:
    """The YAML files of a folder that lm-eval looks at, in its order."""
    inside = (path for path in folder.glob("**/*.yaml") if not _IGNORED & set(path.parts))
    return sorted(inside, key=lambda path: path.as_posix())


def _with_members(files: list[TaskFile], defined: dict[str, list[TaskFile]]) -> list[TaskFile]:
    for file in files:  # grows while it is read
        for member in file.members:
            files += [other for other in defined.get(member, ()) if other not in files]
    return files


def check_task_file(path: Path, folder: Path, key: str) -> None:
    """See that what a task file runs and includes lies in its folder.

    Raises:
        DataError: the file itself, a YAML that it includes or the module of a function lies elsewhere or nowhere.
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


def content_of(files: list[TaskFile], folder: Path, key: str) -> str:
    """sha256 over everything local that decides a task: its YAML, what it includes, its functions, its data."""
    digest = hashlib.sha256()
    # By path alone, so that a task in several files (a group) is hashed as one set.
    for path in sorted({path for file in files for path in _files_of(file, folder, key, ())}):
        if not path.is_file():
            raise DataError(
                f"{key}: task {files[0].path.stem} names the file {path}, which does not exist; "
                "put it beside the task's YAML"
            )
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _files_of(file: TaskFile, folder: Path, key: str, seen: tuple[Path, ...]) -> Iterator[Path]:
    """The task's YAML, the YAMLs it includes, the modules of its functions and its data files."""
    if file.path.resolve() in seen:
        raise DataError(f"{key}.include_path: {file.path} includes itself")
    check_task_file(file.path, folder, key)
    yield file.path
    for name in file.includes:
        included = file.path.parent / name
        if not included.is_file():
            yield included  # named as missing
            continue
        yield from _files_of(read_task(included, key), folder, key, (*seen, file.path.resolve()))
    for name in file.functions:
        yield file.path.parent / f"{name.rpartition('.')[0].replace('.', '/')}.py"
    for name in strings((_mapping(file.content.get("dataset_kwargs"))).get("data_files")):
        if "://" not in name:
            # The harness itself looks from the working folder on; a plain task is handed over with absolute paths.
            beside = file.path.parent / name
            yield beside if beside.is_file() or not Path(name).is_file() else Path(name)


def with_absolute_data(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The task with the data files that lie beside its YAML named absolutely: lm-eval looks in the working folder."""
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


def _values_of(value: Any, key: str) -> Iterator[str]:
    """Every string under ``key`` at any depth."""
    if isinstance(value, dict):
        yield from strings(value.get(key))
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for entry in entries:
        yield from _values_of(entry, key)


def strings(value: Any) -> list[str]:
    """Every string in a value that may be one, a list of them or a dictionary of either."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in strings(item)] if isinstance(value, list) else []
