"""Other tools that remove FFN neurons, on the same job and the same model, in a separate environment."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

from cfsp.benchmark import peer_job
from cfsp.benchmark.environments import create_environment
from cfsp.benchmark.part import Check, Result, Settings, format_range, markdown_table
from cfsp.benchmark.processes import run_watched
from cfsp.benchmark.shapes import SEQ_LEN, SHAPES, describe_shape, draw_token_ids, write_model
from cfsp.errors import RunError
from cfsp.system.package import ROOT

#: Packages of the other tools. The project does not depend on them.
PACKAGES = ("torch-pruning==1.6.1", "optipfair==0.4.2")
WINDOWS, BATCH_SIZE, PERCENT = 8, 4, 50
#: Largest number of repeats. Each repeat loads the model again.
MOST_REPEATS = 3
#: Largest distance of the removed share of the FFN from one half.
REMOVED_TOLERANCE = 0.01


def measure(settings: Settings) -> Result:
    """Measure a row for each shape and tool, including cfsp, on the CPU."""
    import numpy

    work = settings.work / "peers"
    python = create_peer_environment(work)
    repeats = min(settings.repeats, MOST_REPEATS)
    result = Result(
        "peers",
        "parts=peers",
        notes={"windows": WINDOWS, "seq_len": SEQ_LEN, "batch_size": BATCH_SIZE, "processes": repeats},
    )
    for name in settings.shapes:
        shape = SHAPES[name]
        folder = write_model(work / f"model-{name}", shape)
        ids = work / f"ids-{name}.npy"
        numpy.save(ids, draw_token_ids(WINDOWS, min(SEQ_LEN, shape.positions), shape.vocab).numpy())
        runs: dict[str, list[dict[str, Any]]] = {job: [] for job in peer_job.JOBS}
        for repeat in range(repeats):
            for job in runs if repeat % 2 == 0 else reversed(runs):
                runs[job].append(run_job(job, Path(sys.executable) if job == "cfsp" else python, folder, ids, work))
                print(f"peers: {name} {job}: {runs[job][-1]['seconds']:.2f} s", flush=True)
        for job, rows in runs.items():
            row = {"shape": name, **merge_repeats(rows)}
            result.rows.append(row)
            removed = row["parameters"]["before"] - row["parameters"]["after"]
            ratio = removed / (3 * shape.hidden * shape.ffn * shape.blocks)
            result.checks.append(
                Check(
                    f"{name} {job}, removed share of the FFN, distance from one half",
                    abs(ratio - PERCENT / 100),
                    REMOVED_TOLERANCE,
                )
            )
    return result


def create_peer_environment(work: Path) -> Path:
    """Create the environment of the other tools unless it exists; return its Python.

    Raises:
        RunError: it could not be created; the message has the end of pip's error output.
    """
    folder = work / "venv"
    failure = f"the peers' environment could not be made in {folder}: {{message}}; is a package index at hand?"
    return create_environment(PACKAGES, folder, "--quiet", beside=("torch", "transformers"), failure=failure)


def run_job(job: str, python: Path, folder: Path, ids: Path, work: Path) -> dict[str, Any]:
    """Run a job in a separate process and return its reply.

    Args:
        job: name of the job (:data:`cfsp.benchmark.peer_job.JOBS`).
        python: Python that has the package of the job.
        folder: folder of the model.
        ids: file with the calibration tokens.
        work: folder for the log.

    Raises:
        RunError: the process failed (the message has the end of its error output), or the logits of the pruned model
            are not finite.
    """
    request = {"job": job, "model": str(folder), "ids": str(ids), "batch_size": BATCH_SIZE, "percent": PERCENT}
    command_line = [str(python), peer_job.__file__, json.dumps(request)]
    # Only our own job has the checkout on its path, so that no peer can import a module of the project.
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables = {**kept, "PYTHONPATH": str(ROOT.parent)} if job == "cfsp" else kept
    ended = run_watched(
        command_line,
        work / f"{job}.log",
        {**variables, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    if ended.code:
        message = " ".join(ended.err.split())[-300:] or "nothing on stderr"
        raise RunError(f"{job}: the process ended with exit code {ended.code}: {message}")
    reply: dict[str, Any] = json.loads(ended.out.splitlines()[-1])
    if not reply["finite"]:
        raise RunError(f"{job}: the pruned model gives logits that are not finite")
    return reply


def merge_repeats(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the repeats of a job: the seconds of all, the highest peaks, and the other values of the first repeat."""
    tokens, seconds = rows[0]["tokens"], [row["seconds"] for row in rows]
    peaks = {
        key: None if any(row[key] is None for row in rows) else max(row[key] for row in rows)
        for key in ("peak_bytes", "beside_bytes")
    }
    return {
        **rows[0],
        **peaks,
        "seconds": seconds,
        "tokens_per_second": tokens / median(seconds) if tokens else None,
        "microseconds_per_token": 1e6 * median(seconds) / tokens if tokens else None,
    }


def render_table(result: Result) -> str:
    """Render the table as Markdown."""
    head = [
        "model, tool", "chooses by", "seconds (lowest to highest)", "tokens", "tokens/s", "µs/token",
        "peak beside, GiB", "parameters", "version",
    ]  # fmt: skip
    rows = []
    for row in result.rows:
        uses = row["tokens"] > 0
        beside = row["beside_bytes"]
        rows.append(
            [
                f"{row['shape']} {row['job']}",
                peer_job.JOBS[row["job"]][1],
                f"**{median(row['seconds']):.2f}** ({format_range(row['seconds'])})",
                f"{row['tokens']:,}" if uses else "none",
                f"{row['tokens_per_second']:,.0f}" if uses else "",
                f"{row['microseconds_per_token']:,.1f}" if uses else "",
                "" if beside is None else f"{beside / 2**30:.2f}",
                f"{row['parameters']['before'] / 1e6:,.1f} M to {row['parameters']['after'] / 1e6:,.1f} M",
                f"{row['package']} {row['version']}",
            ]
        )
    shapes = "; ".join(describe_shape(name) for name in dict.fromkeys(row["shape"] for row in result.rows))
    explained = (
        f"Half of the FFN neurons of a randomly initialised LLaMA in float32 on the CPU, {result.notes['windows']} "
        f"windows of {SEQ_LEN} tokens in batches of {BATCH_SIZE} where tokens are used. Medians of "
        f"{result.notes['processes']} processes each, in alternation; seconds and peak (resident memory above what it "
        "was with the model loaded) are of the pruning alone: from the loaded model to the smaller one in memory. A "
        f"tool that uses no tokens chooses by weights alone, which is another job than ours. {shapes}."
    )
    return markdown_table("Other tools at the same job", head, rows, result, explained)
