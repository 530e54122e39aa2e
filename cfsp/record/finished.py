"""Check that a finished run is whole: a record of a success, and every file as the run wrote it."""

from __future__ import annotations

from pathlib import Path

from cfsp.errors import CheckpointError
from cfsp.record.run_record import RunRecord
from cfsp.record.written import MODEL_FOLDERS, PLAN_FILES, damage, within


def find_run_damage(record: RunRecord, out: Path, *, model: bool, hashes: bool = False) -> str | None:
    """Return a clause on what is missing or damaged in a successful run; None where nothing has to be done again.

    Args:
        record: the record of a success.
        out: OUT of the run. Without a model folder it may have been removed, since the record alone holds the results.
        model: whether the run writes a model folder.
        hashes: compare the content of every file too, not only its size.
    """
    if not model and not (out / "record.json").is_file():
        return None
    if record.files is None:  # written by an earlier version, which recorded no sizes
        return _find_damage_without_sizes(out) if model else None
    if not isinstance(record.files, dict):
        return "record.json does not say which files were written"
    expected_files = within(record.files, (*PLAN_FILES, *(MODEL_FOLDERS if model else ())))
    if model and not any(path.startswith("model/") for path in expected_files):
        return "model is missing"
    return damage(expected_files, out, hashes=hashes)


def export_problem(record: RunRecord, out: Path, format: str, *, hashes: bool = False) -> str | None:
    """Return a clause on why the export of a run is missing or damaged; None where it is whole.

    Args:
        record: the record of a success.
        out: OUT of the run.
        format: format of the export.
        hashes: compare the content of every file too, not only its size.
    """
    export = record.checkpoint.get("export") if isinstance(record.checkpoint, dict) else None
    if not isinstance(export, dict) or export.get("form") != format or not isinstance(export.get("place"), str):
        return f"there is no export as {format}"
    if not (out / export["place"]).exists():
        return f"{export['place']} is missing"
    return damage(within(record.files, export_files(export["place"])), out, hashes=hashes)


def export_files(place: str) -> tuple[str, ...]:
    """Return the entries of OUT that an export consists of: a folder, or a file and its reference beside it."""
    return (place, f"{place.removesuffix('.gguf')}.reference.safetensors") if place.endswith(".gguf") else (place,)


def _find_damage_without_sizes(out: Path) -> str | None:
    # Start-up time: loads torch.
    from cfsp.weights.shards import check_safetensors

    for name in ("plan.json", "model/config.json"):
        if not (out / name).is_file():
            return f"{name} is missing"
    try:
        check_safetensors(out / "model")
    except CheckpointError as error:
        return str(error).partition(";")[0]
    return None
