"""``scripts/sweep.py experiment=NAME [variant=...] [status=true] [launcher=...] [key=value ...]``."""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from cfsp.components import build, suggest
from cfsp.contracts import Launcher
from cfsp.errors import CfspError, ConfigError
from cfsp.package import config_folder
from cfsp.sweep.experiment import Cell, Experiment, Values, experiment_names, given_values, load_experiment
from cfsp.system import escape, interrupts

USAGE = """\
Run what is missing of an experiment, or list what is done.

  python scripts/sweep.py experiment=NAME                    the variant `bundled`: offline, on a CPU
  python scripts/sweep.py experiment=NAME variant=paper      the named models of the hub
  python scripts/sweep.py experiment=NAME status=true        done, missing, failed with the reason; runs nothing
  python scripts/sweep.py experiment=NAME launcher=local launcher.processes=4
  python scripts/sweep.py experiment=NAME launcher=slurm launcher.partition=P launcher.timeout_min=240 launcher.gpus=1
  python scripts/sweep.py experiment=NAME sparsity.ratio=0.3,0.4 model=local model.path=FOLDER

Every other key=value goes to each run and replaces what the experiment says of that key (key=a,b,c: several values;
~key: left out). What is finished is skipped; force=true does it again. Records: results/records/NAME/VARIANT
(paths.records_dir); the runs' own folders: outputs/sweeps/NAME/VARIANT (paths.output_dir). Exit codes: 0 all done,
1 a run failed, 2 wrong input.

Experiments: {experiments}
Launchers: {launchers}
"""

#: Keys of the sweep itself; the others go to the runs.
_OWN = ("experiment", "variant", "status", "launcher")


@dataclass(frozen=True)
class Request:
    """A checked command line."""

    experiment: Experiment
    variant: str
    cells: list[Cell]
    varying: list[str]
    launcher: Launcher
    status: bool
    force: bool
    given: Mapping[str, Values]

    def named(self, cell: Cell) -> str:
        """What tells a run from the others of the grid."""
        return " ".join(f"{key}={cell.point[key]}" for key in self.varying if key in cell.point) or str(cell)


def main(words: Sequence[str] | None = None) -> int:
    """Sweep; returns the exit code."""
    usage = USAGE.format(experiments=", ".join(experiment_names()), launchers=_options("launcher"))
    return command("sweep", usage, words, lambda given: _sweep(request_of(given)))


def command(name: str, usage: str, words: Sequence[str] | None, body: Callable[[list[str]], int]) -> int:
    """Call ``body`` with the words of the command line; every error becomes one line on stderr and an exit code.

    ``debug=true`` among the words is taken out of them; with it an error that nobody foresaw comes with its traceback.
    """
    given = sys.argv[1:] if words is None else list(words)
    if not given or any(word in ("-h", "--help") for word in given):
        print(usage)
        return 0 if given else 2
    debug = any(word.lower().lstrip("+") == "debug=true" for word in given)
    given = [word for word in given if word.lower().lstrip("+") not in ("debug=true", "debug=false")]
    quiet()
    interrupts.raise_again()
    try:
        code = body(given)
        sys.stdout.flush()  # a full disk or a reader that has gone is met here, not when Python ends
        return code
    except CfspError as error:
        if debug:
            traceback.print_exception(error)
        for problem in error.problems:
            print(f"{name}: {escape.plain(' '.join(problem.split()))}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever reads has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on", file=sys.stderr)
        return 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            print(f"{name}: {str(error.filename)[:80]}...: too long for a path; give a shorter one", file=sys.stderr)
            return 2
        print(unexpected(error, name, debug=debug), file=sys.stderr)
        return 1


def unexpected(error: Exception, name: str, *, debug: bool) -> str:
    """Say in one line what nobody foresaw; with ``debug`` its traceback is printed before."""
    if debug:
        traceback.print_exception(error)
    reason = escape.plain(" ".join(str(error).split()))[:300] or "no message"
    where = "" if debug else "; debug=true shows where"
    return f"{name}: failed ({type(error).__name__}: {reason}){where}"


def request_of(words: Sequence[str]) -> Request:
    """Read a command line of a sweep or of its tables.

    Raises:
        ConfigError: what is wrong with it.
    """
    given = given_values(words)
    own = {key: given.pop(key) for key in [*given] if key in _OWN or key.startswith("launcher.")}
    if "experiment" not in own:
        raise ConfigError(f"experiment is not set: give experiment=NAME; experiments: {', '.join(experiment_names())}")
    experiment = load_experiment(str(own["experiment"]))
    variant = str(own.get("variant", "bundled"))
    cells = experiment.cells(variant, {**_usual(experiment.name, variant, given), **given})
    points = [cell.point for cell in cells]
    keys = dict.fromkeys(key for point in points for key in point)
    varying = [key for key in keys if len({point[key] for point in points if key in point}) > 1]
    return Request(
        experiment,
        variant,
        cells,
        varying,
        _launcher(own, _allowed(given)),
        status=_flag(own, "status"),
        force=str(given.get("force", "false")).lower() == "true",
        given=given,
    )


def quiet() -> None:
    """What runs say goes to their run.log; here only warnings."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=UserWarning)
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    ours = logging.getLogger("cfsp")
    ours.setLevel(ours.level or logging.INFO)  # debug=true may have set it


def records_folder(name: str, variant: str) -> Path:
    """Where the records of an experiment are, seen from the working folder."""
    return Path("results") / "records" / name / variant


def _sweep(request: Request) -> int:
    from cfsp.sweep.job import Job, Outcome, jobs_of, state_of

    if not request.status:
        request.launcher.check()
    try:
        jobs = jobs_of(request.cells)
    except CfspError as error:
        raise ConfigError(*(_whose(problem, request) for problem in error.problems)) from error
    states = {job.run_id: state_of(job) for job in jobs}
    if request.status:
        _show(request, jobs, states)
        return 0
    wanted = [job for job in jobs if request.force or states[job.run_id].name != "done"]
    print(f"{request.experiment.name} ({request.variant}): {len(jobs)} runs, {len(jobs) - len(wanted)} done already")
    failed: list[str] = []
    over = 0

    def report(job: Job, outcome: Outcome) -> None:
        nonlocal over
        over += 1
        if outcome.name == "failed":
            failed.append(job.run_id)
        said = {"failed": f"FAILED: {escape.plain(outcome.reason)}", "busy": "done by another process"}
        ended = said.get(outcome.name, f"{outcome.seconds:.1f} s")
        print(f"[{over}/{len(wanted)}] {request.named(job.cell)}: {ended}", flush=True)

    if wanted:
        request.launcher.launch(wanted, report)
    if failed:
        print(
            f"sweep: {len(failed)} of {len(wanted)} runs failed; the same command tries them again, with status=true "
            "it lists them",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _whose(problem: str, request: Request) -> str:
    """What is wrong with the runs, and where the key is from if not from the command line."""
    key = problem.partition(":")[0].partition("=")[0]
    said = {*(key for entry in request.experiment.runs for key in entry), *request.experiment.variants[request.variant]}
    if key not in said or key in request.given:
        return problem
    return f"{problem} (experiment={request.experiment.name} says {key}; ~{key} on the command line leaves it out)"


def _show(request: Request, jobs: Sequence[Any], states: Mapping[str, Any]) -> None:
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


def _usual(name: str, variant: str, given: Mapping[str, Values]) -> dict[str, Values]:
    """What a sweep sets unless the command line does."""
    usual: dict[str, Values] = {
        "save.model": "false",
        "paths.output_dir": f"outputs/sweeps/{name}/{variant}",
        "paths.records_dir": str(records_folder(name, variant)),
    }
    if given.get("logger", "wandb") == "wandb":
        usual["logger.group"] = f"{name}-{variant}"
    return {key: value for key, value in usual.items() if key not in given}


def _launcher(own: Mapping[str, Values], allowed: Sequence[str] = ()) -> Launcher:
    name = str(own.get("launcher", "sequential"))
    path = config_folder() / "launcher" / f"{name}.yaml"
    if not path.is_file():
        known = _options("launcher")
        raise ConfigError(
            f"launcher={name}: there is no such launcher{suggest(name, known.split(', '))}; there are {known}"
        )
    values: Any = OmegaConf.to_container(OmegaConf.load(path))
    for key, value in own.items():
        if key.startswith("launcher."):
            values[key.removeprefix("launcher.")] = _value(key, value)
    return build("launcher", values, allowed, Launcher).instance


def _allowed(given: Mapping[str, Values]) -> list[str]:
    """Packages of ``plugins.allow``, whose launchers may be built too."""
    if "plugins.allow" not in given:
        return []
    packages = _value("plugins.allow", given["plugins.allow"])
    return [str(package) for package in packages] if isinstance(packages, list) else []


def _value(key: str, value: Values) -> Any:
    """As Hydra reads it, lists and mappings too.

    Raises:
        ConfigError: several values, or none.
    """
    if isinstance(value, list | dict):
        raise ConfigError(f"{key}: a launcher's key has one value; write a list as {key}=[a,b]")
    return OverridesParser.create().parse_override(f"{key}={value}").value()


def _flag(own: Mapping[str, Values], key: str) -> bool:
    value = str(own.get(key, "false")).lower()
    if value not in ("true", "false"):
        raise ConfigError(f"{key}={value}: use true or false")
    return value == "true"


def _options(group: str) -> str:
    return ", ".join(sorted(path.stem for path in (config_folder() / group).glob("*.yaml")))
