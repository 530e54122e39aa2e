"""Validating the settings of the calibration set, and of the sources of a mixed one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cfsp.config.parse_section import parse_section
from cfsp.config.problems import shown, suggest
from cfsp.config.sections import CALIBRATION_KINDS, MixCalibration, TextCalibration, TokensCalibration


def parse_calibration(values: Any, problems: list[str]) -> Any:
    """Validate the group calibration.

    Args:
        values: values from the configuration.
        problems: list to which a line is added for each finding.

    Returns:
        The section; None where there are problems.
    """
    if not isinstance(values, Mapping):
        problems.append(f"calibration={shown(values)}: a group of keys is expected; choose one, e.g. calibration=text")
        return None
    if values.get("kind") == "mix":
        return _parse_mix(values, problems)
    section = _parse_kind("calibration", values, problems)
    problems.extend(_missing_paths(section, "calibration"))
    return section


def _parse_kind(key: str, values: Any, problems: list[str]) -> Any:
    """Validate the settings of one calibration set by its kind; ``key``: where they stand."""
    kind = values.get("kind") if isinstance(values, Mapping) else None
    if not isinstance(values, Mapping):
        problems.append(f"{key}={shown(values)}: a group of keys is expected, as in conf/calibration/text.yaml")
    elif not isinstance(kind, str) or kind not in CALIBRATION_KINDS:
        problems.append(f"{key}.kind={shown(kind)}: use {', '.join(CALIBRATION_KINDS)}")
    else:
        return parse_section(key, CALIBRATION_KINDS[kind], values, problems)
    return None


def _parse_mix(values: Mapping[str, Any], problems: list[str]) -> MixCalibration | None:
    sources, before = values.get("sources"), len(problems)
    if not isinstance(sources, Mapping):
        problems.append(
            f"calibration.sources={shown(sources)}: a group of calibration sets by name is expected; leave it out for "
            "those of conf/calibration/mix.yaml"
        )
        sources = {}
    sections = {}
    for name, source in sources.items():
        if isinstance(source, Mapping) and source.get("kind") == "mix":
            problems.append(f"calibration.sources.{name}.kind=mix: a source is no mixture; use text, tokens or self")
        else:
            sections[str(name)] = _parse_kind(f"calibration.sources.{name}", source, problems)
    own = {key: value for key, value in values.items() if key != "sources"}
    section = parse_section("calibration", MixCalibration, {**own, "sources": {}}, problems)
    if len(problems) > before or section is None:
        return None
    section = section.model_copy(update={"sources": sections})
    problems.extend(_mix_problems(section))
    return section


def _missing_paths(section: Any, key: str) -> Iterator[str]:
    """Yield a line where a calibration set needs a file and names none; ``key``: where its settings stand."""
    if isinstance(section, TextCalibration) and section.path is None and section.hub is None:
        yield (
            f"{key}.path=null: {'calibration=' if key == 'calibration' else ''}{section.name} has no copy on the hub: "
            f"give a local .txt, .jsonl or .parquet file, {key}.path=FILE"
        )
    if isinstance(section, TokensCalibration) and section.path is None:
        yield f"{key}.path=null: calibration=tokens needs it: give a .npy file of ids, {key}.path=FILE.npy"


def _mix_problems(section: MixCalibration) -> Iterator[str]:
    """Yield a line for each problem of a mixed calibration set."""
    example = "calibration.mix='{wikitext2: 2, c4: 1}'"
    if not section.mix:
        yield f"calibration.mix={shown(section.mix)}: calibration=mix needs the share of each source, e.g. {example}"
        return
    unknown = [name for name in section.mix if name not in section.sources]
    for name in unknown:
        yield (
            f"calibration.mix.{name}: there is no such source{suggest(name, section.sources)}; sources: "
            f"{', '.join(section.sources)}"
        )
    if unknown:
        return
    parts = section.parts
    for name, share in section.mix.items():
        if name not in parts:
            yield (
                f"calibration.mix.{name}={share:g}: its share of calibration.n_samples={section.n_samples} is no whole "
                "window; raise the share or calibration.n_samples, or leave the source out"
            )
    for name, part in parts.items():
        yield from _missing_paths(part, f"calibration.sources.{name}")
