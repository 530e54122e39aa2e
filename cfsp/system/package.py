"""Paths of files in the package: ``pkg://cfsp/assets/...``, ``conf`` and ``experiments``."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def package_path(path: str) -> Path:
    """Return the real path of ``pkg://cfsp/...``; in other paths ``~`` is expanded."""
    if path.startswith("pkg://cfsp/"):
        return ROOT / path.removeprefix("pkg://cfsp/")
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~NAME of an unknown user
        return Path(path)


def is_packaged(path: str) -> bool:
    """Return whether a path, with its links followed, lies in the package."""
    return package_path(path).resolve().is_relative_to(ROOT)


def config_folder() -> Path:
    """Return the folder ``conf``: inside the package in an installed wheel, beside it in a checkout."""
    inside = ROOT / "conf"
    return inside if inside.is_dir() else ROOT.parent / "conf"


def experiments_folder() -> Path:
    """Return the folder ``experiments``: inside the package in an installed wheel, beside it in a checkout."""
    inside = ROOT / "experiments"
    return inside if inside.is_dir() else ROOT.parent / "experiments"
