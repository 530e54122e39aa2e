"""``cfsp sweep experiment=NAME [variant=...] [status=true] [launcher=...] [key=value ...]``: run an experiment."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from cfsp.errors import CfspError, ConfigError
from cfsp.sweep.experiment import experiment_names
from cfsp.sweep.request import Request, options, read_request
from cfsp.system import escape
from cfsp.system.command import command

USAGE = """\
Run what is missing of an experiment, or list what is done.

  cfsp sweep experiment=NAME                    the variant `bundled`: offline, on a CPU
  cfsp sweep experiment=NAME variant=paper      the named models of the hub
  cfsp sweep experiment=NAME status=true        done, missing, failed with the reason; runs nothing
  cfsp sweep experiment=NAME launcher=local launcher.processes=4
  cfsp sweep experiment=NAME launcher=slurm launcher.partition=P launcher.timeout_min=240 launcher.gpus=1
  cfsp sweep experiment=NAME sparsity.ratio=0.3,0.4 model=local model.path=FOLDER

Every other key=value goes to each run and replaces what the experiment says of that key (key=a,b,c: several values;
~key: left out). What is finished is skipped; force=true does it again. Records: results/records/NAME/VARIANT
(paths.records_dir); the runs' own folders: outputs/sweeps/NAME/VARIANT (paths.output_dir). Exit codes: 0 all done,
1 a run failed, 2 wrong input.

Experiments: {experiments}
Launchers: {launchers}
"""


def main(overrides: Sequence[str] | None = None) -> int:
    """Run the sweep or list the states of its runs; return the exit code."""
    usage = USAGE.format(experiments=", ".join(experiment_names()), launchers=options("launcher"))
    return command("sweep", usage, overrides, lambda arguments: _sweep(read_request(arguments)))


def _sweep(request: Request) -> int:
    # Start-up time: loads numpy, safetensors, torch.
    from cfsp.sweep.job import Job, Outcome, job_state, prepare_jobs

    if not request.status:
        request.launcher.check()
    try:
        jobs = prepare_jobs(request.cells)
    except CfspError as error:
        raise ConfigError(*(_name_experiment(problem, request) for problem in error.problems)) from error
    states = {job.run_id: job_state(job) for job in jobs}
    if request.status:
        _show_states(request, jobs, states)
        return 0
    pending = [job for job in jobs if request.force or states[job.run_id].name != "done"]
    print(f"{request.experiment.name} ({request.variant}): {len(jobs)} runs, {len(jobs) - len(pending)} done already")
    failed: list[str] = []
    over = 0

    def report(job: Job, outcome: Outcome) -> None:
        nonlocal over
        over += 1
        if outcome.name == "failed":
            failed.append(job.run_id)
        texts = {"failed": f"FAILED: {escape.plain(outcome.reason)}", "busy": "done by another process"}
        ended = texts.get(outcome.name, f"{outcome.seconds:.1f} s")
        print(f"[{over}/{len(pending)}] {request.named(job.cell)}: {ended}", flush=True)

    if pending:
        request.launcher.launch(pending, report)
    if failed:
        print(
            f"sweep: {len(failed)} of {len(pending)} runs failed; the same command tries them again, with status=true "
            "it lists them",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _name_experiment(problem: str, request: Request) -> str:
    """Name the experiment in a problem if it, and not the command line, sets the wrong key."""
    key = problem.partition(":")[0].partition("=")[0]
    entries = [*request.experiment.runs, request.experiment.variants[request.variant]]
    if not any(key in entry for entry in entries) or key in request.fixed:
        return problem
    return f"{problem} (experiment={request.experiment.name} says {key}; ~{key} on the command line leaves it out)"


def _show_states(request: Request, jobs: Sequence[Any], states: Mapping[str, Any]) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)
    table = Table("state", "run", "run_id", "reason", box=None, pad_edge=False)
    for job in jobs:
        state = states[job.run_id]
        table.add_row(state.name, request.named(job.cell), job.run_id, escape.plain(state.reason))
    console.print(table)
    counts = Counter(state.name for state in states.values())
    summary = ", ".join(f"{counts[name]} {name}" for name in ("done", "running", "failed", "interrupted", "missing"))
    console.print(f"{request.experiment.name} ({request.variant}): {len(jobs)} runs: {summary}")
