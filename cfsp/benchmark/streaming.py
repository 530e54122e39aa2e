"""Pruning of a streamed checkpoint beside pruning in memory: peak resident memory, time and equality of the plans."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from cfsp.benchmark.make_checkpoint import Shape
from cfsp.benchmark.part import Check, Result, Settings, format_range, markdown_table
from cfsp.benchmark.processes import run_watched
from cfsp.benchmark.shapes import SEQ_LEN, draw_token_ids, write_model
from cfsp.errors import RunError
from cfsp.system.package import ROOT

#: Largest resident memory of a streamed run in bytes, for a model of any size.
MEMORY_LIMIT = 2_000_000_000
#: Largest ratio of the seconds of a streamed run to those of a run in memory.
TIME_LIMIT = 1.3
WINDOWS = 16
#: Bytes between two probes of the page cache in a file. Each probe may read a little ahead.
PROBE_STEP = 2**24
RATIO = 0.5
#: Dtype of the files. model.dtype=auto would widen it on a CPU.
DTYPE = "bfloat16"
SHAPE = Shape(hidden=2048, ffn=5632, heads=16, kv_heads=16, dtype=DTYPE)


def measure(settings: Settings) -> Result:
    """Measure a row for each mode (model.streaming) and run."""
    import numpy

    shape = replace(SHAPE, blocks=settings.blocks)
    work = settings.work / "streaming"
    folder = write_model(work / f"model-{shape.hidden}-{shape.blocks}", shape)
    ids = work / f"ids-{shape.vocab}.npy"
    numpy.save(ids, draw_token_ids(WINDOWS, min(SEQ_LEN, shape.positions), shape.vocab).numpy())
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    # Each size has a record of its own.
    usual = shape.blocks == Settings.blocks
    name = "streaming" if usual else f"streaming_{shape.blocks}_blocks"
    arguments = "parts=streaming" + ("" if usual else f" blocks={shape.blocks}")
    arguments += f" modes={','.join(settings.modes)} runs={settings.runs}"
    notes = {"checkpoint_bytes": size, "blocks": shape.blocks, "windows": WINDOWS}
    result = Result(name, arguments, notes=notes)
    plans: dict[str, Any] = {}
    for run in range(settings.runs):
        for mode in settings.modes if run % 2 == 0 else tuple(reversed(settings.modes)):
            cached = drop_from_page_cache(sorted(folder.iterdir()))
            row = {"cached_before": cached, **run_pruning(folder, ids, work / "run", mode)}
            plan = row.pop("plan")
            row["same_plan"] = plan == plans.setdefault("first", plan)
            result.rows.append({"run": run, **row})
            print(f"streaming: {mode}: {row['seconds']:.1f} s, {row['peak_bytes'] / 1e9:.2f} GB resident", flush=True)
    result.checks = _checks(result)
    return result


def drop_from_page_cache(files: Sequence[Path]) -> float | None:
    """Drop the files from the page cache, so that the next run reads them from the disk.

    Otherwise the first run would read the disk and the next one the memory, which hides the difference between modes.

    Returns:
        The share of probed pages that are still cached; None if the system cannot drop files or cannot report it, as
        in memory file systems and outside of Linux.
    """
    if not (hasattr(os, "posix_fadvise") and hasattr(os, "RWF_NOWAIT")):
        return None
    cached, probes = 0, 0
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that are not on the disk yet cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            for offset in range(0, file.stat().st_size, PROBE_STEP):
                probes += 1
                with suppress(BlockingIOError):  # not in memory
                    cached += os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
        except OSError:
            return None
        finally:
            os.close(descriptor)
    return cached / probes if probes else None


def run_pruning(folder: Path, ids: Path, run: Path, mode: str | None) -> dict[str, Any]:
    """Prune the checkpoint in a separate process with empty caches and return a row of the result.

    Args:
        folder: folder of the checkpoint.
        ids: file with the calibration tokens.
        run: folder of the run.
        mode: value of model.streaming; None leaves the key out.

    Raises:
        RunError: the run failed; the message has the end of its error output.
    """
    shutil.rmtree(run, ignore_errors=True)
    overrides = [
        "model=local", f"model.path={folder}", f"model.dtype={DTYPE}", "calibration=tokens", f"calibration.path={ids}",
        "pruner=cfsp", f"sparsity.ratio={RATIO}", "evaluation=none", "logger=none",
        f"paths.output_dir={run / 'out'}", f"paths.records_dir={run / 'records'}", f"paths.cache_dir={run / 'cache'}",
    ]  # fmt: skip
    if mode is not None:
        overrides.append(f"model.streaming={mode}")
    # The child process runs this checkout, whatever is installed.
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    ended = run_watched([sys.executable, "-m", "cfsp.run", *overrides], run / "process.log", environment)
    if ended.code:
        message = " ".join(ended.err.split())[-300:] or "nothing on stderr"
        raise RunError(f"model.streaming={mode}: the run ended with exit code {ended.code}: {message}")
    record = json.loads((run / "out" / "record.json").read_text(encoding="utf-8"))
    plan = json.loads((run / "out" / "plan.json").read_text(encoding="utf-8"))
    stages = {stage["name"]: stage for stage in record["stages"]}
    peaks = [ended.peak_bytes or 0, *(stage["peak_bytes"] or 0 for stage in record["stages"])]
    shutil.rmtree(run)  # the pruned model in it is large
    return {
        "mode": mode,
        "seconds": ended.seconds,
        "stages_seconds": sum(stage["seconds"] for stage in record["stages"]),
        "peak_bytes": max(peaks),
        "stages": {name: {key: stage[key] for key in ("seconds", "peak_bytes")} for name, stage in stages.items()},
        "written_bytes": record["checkpoint"]["bytes"],
        "plan": {key: plan[key] for key in ("blocks", "requested", "achieved")},
    }


def _checks(result: Result) -> list[Check]:
    by_mode: dict[str, list[dict[str, Any]]] = {}
    for row in result.rows:
        by_mode.setdefault(row["mode"], []).append(row)
    checks = []
    if "on" in by_mode:
        peak = max(row["peak_bytes"] for row in by_mode["on"])
        checks.append(Check("streamed, GB resident at most", peak / 1e9, MEMORY_LIMIT / 1e9))
    if {"on", "off"} <= set(by_mode):
        on, off = (median(row["seconds"] for row in by_mode[mode]) for mode in ("on", "off"))
        checks.append(Check("streamed / in memory, seconds of the whole process", on / off, TIME_LIMIT))
        different = sum(not row["same_plan"] for row in result.rows)
        checks.append(Check("plans that differ from the first run's", different, 0))
    return checks


def render_table(result: Result) -> str:
    """Render the table as Markdown."""
    names = list(dict.fromkeys(name for row in result.rows for name in row["stages"]))
    head = ["model.streaming", "seconds (lowest to highest)", "peak resident, GB", *(f"{name}, s" for name in names)]
    rows = []
    for mode in dict.fromkeys(row["mode"] for row in result.rows):
        runs = [row for row in result.rows if row["mode"] == mode]
        run_seconds = [row["seconds"] for row in runs]
        rows.append(
            [
                str(mode),
                f"{median(run_seconds):.1f} ({format_range(run_seconds, 1)})",
                f"**{max(row['peak_bytes'] for row in runs) / 1e9:.2f}**",
                *(f"{_median_stage_seconds(runs, name):.1f}" for name in names),
            ]
        )
    explained = (
        f"A randomly initialised LLaMA of {result.notes['checkpoint_bytes'] / 1e9:.2f} GB in {DTYPE} (hidden "
        f"{SHAPE.hidden}, FFN {SHAPE.ffn}, {result.notes['blocks']} blocks) in shards, {result.notes['windows']} "
        f"windows of {SEQ_LEN} tokens, cfsp at {RATIO:.0%}, the pruned model written. Each run is a process of its "
        f"own with empty caches of cfsp, {max(row['run'] for row in result.rows) + 1} of each mode, in the order "
        f"{', '.join(str(row['mode']) for row in result.rows)}; {_describe_page_cache(result)}. Seconds: of the whole "
        "process, imports and start included, medians; peak resident: VmHWM, the highest seen."
    )
    return markdown_table("Pruning a checkpoint from its shards", head, rows, result, explained)


def _describe_page_cache(result: Result) -> str:
    """Describe the state of the page cache in which the runs started."""
    shares = [row["cached_before"] for row in result.rows]
    if None in shares:
        return (
            "the checkpoint could not be dropped from the page cache, so all runs but the first may find it in memory"
        )
    return (
        "before each the checkpoint is dropped from the page cache (posix_fadvise), so that all read it from the disk: "
        f"{max(shares):.0%} of it was still in memory at most"
    )


def _median_stage_seconds(runs: list[dict[str, Any]], name: str) -> float:
    """Return the median seconds of a stage over the runs that have it; NaN if no run has it."""
    seconds = [row["stages"][name]["seconds"] for row in runs if name in row["stages"]]
    return median(seconds) if seconds else float("nan")
