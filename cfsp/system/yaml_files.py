"""Untrusted YAML files, checked before they are loaded.

A loader expands aliases and walks nested collections recursively, so a file of one kilobyte can demand all memory
("billion laughs") or overflow the stack. This module counts the events of the parser first.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from cfsp.errors import CfspError, ConfigError
from cfsp.system.reading import read_text

#: Most bytes, levels and values of a configuration file; the largest one of cfsp has 200 lines.
MAX_BYTES, MAX_DEPTH, MAX_VALUES = 1_000_000, 40, 50_000


def check_yaml(path: Path, label: str, *, error: type[CfspError] = ConfigError) -> str:
    """Read a YAML file and refuse one that is unsafe to load.

    Args:
        path: the file.
        label: how messages name the file.
        error: class of the error.

    Returns:
        The text of the file.

    Raises:
        CfspError: an ``error``: the file is not regular, too large, not UTF-8, not YAML or nested too deeply, or its
            aliases stand for too many values.
    """
    text = read_text(path, label, limit=MAX_BYTES, error=error)
    try:
        _count(text, label, error)
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        raise error(f"{label}: not a YAML file ({' '.join(str(problem).split())[:200]})") from problem
    return text


def _count(text: str, label: str, error: type[CfspError]) -> None:
    open_sizes: list[tuple[str | None, int]] = []  # for each open collection its anchor, and the values before it
    anchors: dict[str, int] = {}
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        size = 0
        if isinstance(event, yaml.CollectionStartEvent):
            open_sizes.append((event.anchor, total))
            size = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_sizes.pop()
            if anchor is not None:
                anchors[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if event.anchor is not None:
                anchors[event.anchor] = 1
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_sizes):
                raise error(f"{label}: the alias *{event.anchor} stands within what it names; write the values out")
            size = anchors.get(str(event.anchor), 1)
        total += size
        if len(open_sizes) > MAX_DEPTH:
            raise error(f"{label}: nested deeper than {MAX_DEPTH} levels; no configuration file is")
        if total > MAX_VALUES:
            raise error(f"{label}: stands for more than {MAX_VALUES:,} values, aliases counted; give a smaller file")
