"""Measure the cost of a sweep of twelve runs beside a single run: CFSP at four ratios with three allocators.

    cfsp benchmark sweep [repeats=5] [work=outputs/benchmark_sweep] [results=results]

A randomly initialised LLaMA (hidden 1024, FFN 2816, 8 blocks, the bundled tokenizer) is pruned without evaluation and
without saving (evaluation=none save.model=false), once with 8 and once with 64 windows of 512 tokens. Every measurement
is a separate process with an empty cache, which checks its runs, loads the model, calibrates, plans and slices. Its
seconds count from the first check to the last record, without imports. The sweep and the single run alternate, and the
ratio is the median over the pairs. Writes benchmarks/sweep.json and tables/benchmark_sweep.md under results.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from cfsp.errors import ConfigError, RunError
from cfsp.launcher.launch import Sequential
from cfsp.record.run_record import RunRecord
from cfsp.sweep.experiment import Experiment, Values, override_values
from cfsp.system.command import command
from cfsp.system.package import ROOT
from cfsp.tables.markdown_row import markdown_row

RATIOS = [0.2, 0.3, 0.4, 0.5]
ALLOCATORS = ["coarse", "uniform", "global_rank"]
WINDOWS = (8, 64)
SEQ_LEN = 512
SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
}
#: Largest ratio of the seconds of the sweep to those of the single run.
LIMIT = 1.5


def main(overrides: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code, which is 1 if a ratio is above the limit."""
    arguments = sys.argv[1:] if overrides is None else list(overrides)
    return command("benchmark sweep", str(__doc__), arguments or ["repeats=5"], _benchmark)


def write_model(folder: Path) -> None:
    """Write the model of the benchmark in float32 with the bundled tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "books7m")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2 * SEQ_LEN, **SHAPE)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure_sweep(
    model: Path, folder: Path, windows: int, ratios: list[float], allocators: list[str]
) -> dict[str, Any]:
    """Run a sweep in this process.

    Args:
        model: folder of the model.
        folder: folder of the runs.
        windows: number of calibration windows.
        ratios: sparsity ratios of the sweep.
        allocators: allocators of the sweep.

    Returns:
        The seconds of the sweep and of its stages, and how often the runs loaded the model and calibrated.
    """
    # Start-up time: loads numpy, safetensors, torch.
    from cfsp.sweep.job import prepare_jobs

    experiment = Experiment(
        name="benchmark",
        title="",
        runs=[{"pruner": "cfsp", "sparsity.ratio": list(ratios), "allocator": list(allocators)}],
        variants={"one": {}},
    )
    overrides: dict[str, Values] = {
        "model": "local", "model.path": str(model), "calibration": "bundled", "calibration.seq_len": SEQ_LEN,
        "calibration.n_samples": windows, "evaluation": "none", "save.model": False, "logger": "none",
        **{f"paths.{key}": str(folder / key) for key in ("output_dir", "records_dir", "cache_dir")},
    }  # fmt: skip
    failed: list[str] = []
    # Import before the timing starts.
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import cfsp.pipeline.run  # noqa: F401

    start = time.perf_counter()
    jobs = prepare_jobs(experiment.cells("one", overrides))
    checked = time.perf_counter()
    Sequential().launch(jobs, lambda job, outcome: failed.extend([outcome.reason] if outcome.name != "done" else []))
    seconds = time.perf_counter() - start
    if failed:
        raise RunError(f"a run of the benchmark failed: {failed[0]}")
    records = [record for job in jobs if (record := RunRecord.read(job.record)) is not None]
    stages = [stage for record in records for stage in record.stages]

    def spent(name: str) -> float:
        return sum(stage["seconds"] for stage in stages if stage["name"] == name)

    return {
        "runs": len(records),
        "seconds": seconds,
        "check": checked - start,
        **{name: spent(name) for name in ("load", "calibrate", "plan", "apply")},
        "loads": sum(stage["name"] == "load" and not stage["cached"] for stage in stages),
        "calibrations": sum(stage["name"] == "calibrate" and not stage["cached"] for stage in stages),
    }


def render_table(record: dict[str, Any]) -> str:
    """Render the record of the benchmark as Markdown."""
    head = ["windows", "one run, s", "twelve runs, s", "ratio (lowest to highest)", "loads", "calibrations"]
    lines = [
        "### Twelve runs of a sweep beside one",
        "",
        markdown_row(head),
        markdown_row(["---", *["--:"] * (len(head) - 1)]),
    ]
    for part in record["parts"]:
        single, twelve = part["one"], part["twelve"]
        spread = f"**{part['ratio']:.2f}** ({min(part['ratios']):.2f} to {max(part['ratios']):.2f})"
        lines.append(
            markdown_row(
                [
                    f"{part['windows']} x {SEQ_LEN}", f"{_median(single):.1f}", f"{_median(twelve):.1f}", spread,
                    str(twelve[0]["loads"]), str(twelve[0]["calibrations"]),
                ]
            )
        )  # fmt: skip
    environment, packages = record["environment"], record["environment"]["packages"]
    git = environment["git"] or {"commit": "an installed wheel", "dirty": False}
    lines += [
        "",
        f"Medians of {record['repeats']} measurements each, in alternation. CFSP at ratios {RATIOS} with the "
        f"allocators {', '.join(ALLOCATORS)}; the one run: {RATIOS[-1]}, {ALLOCATORS[0]}. Hidden "
        f"{SHAPE['hidden_size']}, FFN {SHAPE['intermediate_size']}, {SHAPE['num_hidden_layers']} blocks, float32, no "
        "evaluation, nothing saved.  ",
        f"Commit: {git['commit'][:12]}{'+changes' if git['dirty'] else ''}. torch {packages['torch']}, transformers "
        f"{packages['transformers']}. {environment['cpu']}, {environment['cores']} cores.  ",
        "Made by: cfsp benchmark sweep",
    ]
    return "\n".join(lines) + "\n"


def _median(rows: Sequence[dict[str, Any]]) -> float:
    return median(row["seconds"] for row in rows)


def _benchmark(overrides: Sequence[str]) -> int:
    from cfsp.record import environment

    values = {"repeats": "5", "work": "outputs/benchmark_sweep", "results": "results", **override_values(overrides)}
    unknown = sorted(set(values) - {"repeats", "work", "results"})
    if unknown:
        raise ConfigError(
            f"{unknown[0]}={values[unknown[0]]}: there is no such key; there are repeats, work and results"
        )
    if not str(values["repeats"]).isdigit() or int(str(values["repeats"])) < 1:
        raise ConfigError(f"repeats={values['repeats']}: give a whole number from 1")
    work, results, repeats = Path(str(values["work"])), Path(str(values["results"])), int(str(values["repeats"]))
    model = work / "model"
    if not (model / "config.json").is_file():
        write_model(model)
    parts = []
    for windows in WINDOWS:
        pairs: dict[str, list[dict[str, Any]]] = {"one": [], "twelve": []}
        for repeat in range(repeats):
            for name in ("one", "twelve") if repeat % 2 == 0 else ("twelve", "one"):
                pairs[name].append(_measure_in_process(model, work / "runs", windows, name))
            single, twelve = pairs["one"][-1], pairs["twelve"][-1]
            print(f"{windows} windows: {single['seconds']:.1f} s, {twelve['seconds']:.1f} s", flush=True)
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(pairs["one"], pairs["twelve"], strict=True)]
        parts.append({"windows": windows, **pairs, "ratios": ratios, "ratio": median(ratios)})
    record = {"repeats": repeats, "parts": parts, "environment": environment.describe()}
    for path, content in (
        (results / "benchmarks" / "sweep.json", json.dumps(record, indent=2) + "\n"),
        (results / "tables" / "benchmark_sweep.md", render_table(record)),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    print(render_table(record))
    above = [part for part in parts if part["ratio"] > LIMIT]
    if above:
        print(f"benchmark sweep: above {LIMIT}: {above[0]['ratio']:.2f}", file=sys.stderr)
    return 1 if above else 0


def _measure_in_process(model: Path, folder: Path, windows: int, name: str) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    ratios, allocators = (RATIOS, ALLOCATORS) if name == "twelve" else (RATIOS[-1:], ALLOCATORS[:1])
    request = json.dumps([str(model), str(folder), windows, ratios, allocators])
    done = subprocess.run([sys.executable, "-m", __spec__.name, "--measure", request], capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"a measurement ended with exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        from cfsp.system.logs import quiet

        quiet()
        at_model, at_folder, *rest = json.loads(sys.argv[2])
        print(json.dumps(measure_sweep(Path(at_model), Path(at_folder), *rest)))
        sys.exit(0)
    sys.exit(main())
