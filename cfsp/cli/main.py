"""Entry point of ``cfsp ...`` and ``python -m cfsp.run ...``.

Exit codes: 0 success, 1 a run failed, 2 the configuration or an input is wrong. The Hydra task never exits the process
and never raises an error, so that the other runs of a multirun continue. :func:`main` returns the highest exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from cfsp import __version__
from cfsp.cli.library_errors import library_memory_problem
from cfsp.config.components import shown, suggest
from cfsp.config.compose import explain
from cfsp.config.parse import parse
from cfsp.errors import CfspError, ConfigError, RunError, at_most, one_line, printable
from cfsp.system import interrupts, processes
from cfsp.system.names import RULE, is_name
from cfsp.system.override_check import check_overrides
from cfsp.system.package import config_folder
from cfsp.system.yaml_files import check_yaml

#: Name of a command -> its function, which takes the remaining arguments and returns the exit code. None stands for a
#: run, which Hydra composes.
COMMANDS = {
    "prune": None,
    "export": "cfsp.cli.export:main",
    "verify": "cfsp.cli.verify:main",
    "inspect": "cfsp.cli.inspect:main",
    "sweep": "cfsp.cli.sweep:main",
    "tables": "cfsp.cli.tables:main",
    "report": "cfsp.cli.report:main",
    "benchmark": "cfsp.cli.benchmark:main",
}
#: Keys whose values become names of folders, so they must be valid names.
_FOLDER_NAME_KEYS = ("model.name", "calibration.name", "pruner.name", "recovery.name", "evaluation.name")


@dataclass
class _Session:
    """A call of the command line.

    Attributes:
        overrides: the overrides of the command line.
        folder: the folder of --config-dir.
        sweep: whether -m is given.
        debug: whether debug=true is given.
        process: id of the process that started the call.
        codes: exit code of each run so far.
    """

    overrides: Sequence[str] = ()
    folder: Path | None = None
    sweep: bool = False
    debug: bool = False
    process: int = field(default_factory=os.getpid)
    codes: list[int] = field(default_factory=list)


#: The call that this process serves. In a process that a launcher started, it is None or a copy, because errors return
#: to the command line as exceptions there.
_session: _Session | None = None
#: Attribute of an error that was raised inside a run. It travels with the error from one process to another.
_RUN_ERROR_MARK = "raised_in_a_run"


@hydra.main(config_path=str(config_folder().resolve()), config_name="config", version_base="1.3")
def _run_task(config: DictConfig) -> None:
    if _session is None or _session.process != os.getpid():
        _run_and_mark_errors(config)
        return
    try:
        _session.codes.append(_run_and_mark_errors(config))
    except Exception as error:
        _session.codes.append(_report_error(error, _session, _job_label(_session)))
    if processes.launched().first and processes.launched().several:
        # Start-up time: loads numpy, safetensors, torch.
        from cfsp.pipeline.recovery_stage import end_other_processes

        end_other_processes(_session.codes[-1])


def _run_and_mark_errors(config: DictConfig) -> int:
    """Run one configuration and mark every error that it raises, to distinguish it from errors of Hydra.

    Returns:
        The exit code. A process that only takes part in the training returns that of the first process.
    """
    try:
        return _run(config)
    except (Exception, KeyboardInterrupt) as error:
        with contextlib.suppress(AttributeError):
            setattr(error, _RUN_ERROR_MARK, True)
        raise
    except BaseException as error:  # code of the model called sys.exit(0), which is not a success
        reason = f"{type(error).__name__}: {printable(str(error)) or 'no message'}"
        raise RunError(f"the run ended itself ({reason}), by code of the model; debug=true shows where") from error


def _run(config: DictConfig) -> int:
    checked = parse(config)
    processes.connect()
    if not processes.launched().first:
        # Start-up time: loads numpy, rich, safetensors, torch.
        from cfsp.pipeline.recovery_stage import join_training

        interrupts.raise_again()
        return join_training(checked)
    from cfsp.pipeline.run import run
    from cfsp.tables.terminal import show_result

    interrupts.raise_again()
    record, out = run(checked, multirun=_is_multirun())
    show_result(record, out)
    return 0


def main() -> None:
    """Run the command line and exit with its exit code."""
    sys.exit(_main(sys.argv))


def _main(argv: list[str]) -> int:
    global _session
    # Without it Hydra prints its own message and exits, and the code below needs the exception.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if not sys.stderr.isatty():  # progress bars hide the messages in a log file
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it at its first import, which comes later
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("cfsp").setLevel(logging.INFO if processes.launched().first else logging.WARNING)
    _session = session = _Session(debug="debug=true" in [word.lower().lstrip("+") for word in argv])
    try:
        if "--version" in argv:
            print(f"cfsp {__version__}")
            return 0
        command = _take_command(argv)
        if command is not None:
            return _run_command(command, argv[2:], session)
        flags = _parse_arguments(argv)
        session.overrides, session.sweep = list(flags.overrides), flags.multirun
        session.folder = Path(flags.config_dir) if flags.config_dir else None
        _check_names(session.overrides)
        check_overrides(session.overrides, sweep=session.sweep)
        _check_config_folder(session.folder)
        _run_task()
    except Exception as error:
        session.codes.append(_report_error(error, session))
    except KeyboardInterrupt:
        print("cfsp: interrupted", file=sys.stderr)
        return 1
    finally:
        _session = None
        processes.disconnect()
    failed = [code for code in session.codes if code]
    if failed and len(session.codes) > 1 and processes.launched().first:
        print(f"cfsp: {len(failed)} of {len(session.codes)} runs did not succeed", file=sys.stderr)
    return max(failed, default=0)


def _take_command(argv: list[str]) -> str | None:
    """Return the command in the first argument; None for a run, and ``prune`` is then removed from ``argv``."""
    if len(argv) < 2 or argv[1].startswith(("-", "+", "~")) or "=" in argv[1]:
        return None
    if argv[1] not in COMMANDS:
        word = argv[1]
        check_overrides([word])
        if "." in word:
            raise explain(ValueError(word), [word])
        raise ConfigError(
            f"{word}: neither a command nor key=value{suggest(word, COMMANDS)}; commands: "
            f"{', '.join(COMMANDS)} (the first is the default), then key=value ...; see cfsp --help"
        )
    if COMMANDS[argv[1]] is not None:
        return argv[1]
    del argv[1]
    return None


def _check_config_folder(folder: Path | None) -> None:
    """Refuse files of ``--config-dir`` that Hydra could not load in bounded time and memory."""
    if folder is None or not folder.is_dir():  # Hydra reports a folder that does not exist
        return
    files = sorted(islice(folder.rglob("*.yaml"), 10_001))
    if len(files) > 10_000:
        raise ConfigError(f"--config-dir {folder}: holds more than 10,000 YAML files; give the folder of your groups")
    for file in files:
        if not file.is_dir():
            check_yaml(file, f"--config-dir {folder}: {file.relative_to(folder)}")


def _run_command(command: str, overrides: list[str], session: _Session) -> int:
    """Run a command other than ``prune``. The command reports its own errors; this function those of its import."""
    module, _, function = str(COMMANDS[command]).partition(":")
    if session.debug:
        logging.getLogger("cfsp").setLevel(logging.DEBUG)
    try:
        body = getattr(importlib.import_module(module), function)
        interrupts.raise_again()
        code: int = body(overrides)
        return code
    except CfspError as error:
        return _report_error(error, session)
    except Exception as error:  # raised by the import; cfsp.system.command reports errors of the command itself
        if session.debug:
            traceback.print_exception(error)
        reason = printable(str(error)) or type(error).__name__
        where = "" if session.debug else "; debug=true shows where"
        print(one_line(f"cfsp: {command} failed ({type(error).__name__}: {reason}){where}"), file=sys.stderr)
        return 1


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the command line as Hydra does.

    Raises:
        ConfigError: Hydra does not know a flag, or cfsp does not support it.
    """
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        arguments, unknown = parser.parse_known_args(argv[1:])
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; see cfsp --help") from error
    if arguments.experimental_rerun:  # it loads a pickle, which may execute any code
        raise ConfigError("--experimental-rerun: not taken here; give the key=value overrides of that run again")
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        way_out = "" if unknown[0].startswith("-") else "; write every key=value in one place, after the flags"
        raise ConfigError(f"{unknown[0]}: not understood here{suggest(unknown[0], flags)}{way_out}; see cfsp --help")
    return arguments


def _check_names(overrides: Sequence[str]) -> None:
    """Refuse names that cannot be folders, before Hydra creates the folders of a multirun."""
    problems = []
    for word in overrides:
        if word.partition("=")[0].lstrip("+") not in _FOLDER_NAME_KEYS:
            continue
        try:
            override = OverridesParser.create().parse_override(word)
        except (HydraException, ValueError):  # reported when all overrides are explained
            continue
        several = override.is_discrete_sweep()
        for value in [*override.sweep_iterator()] if several else [override.value()]:
            text = value.text if isinstance(value, QuotedString) else value
            if not override.is_delete() and not is_name(str(text)):
                problems.append(f"{override.key_or_group}={shown(text)}: {RULE}")
    if problems:
        raise ConfigError(*problems)


def _report_error(error: Exception, session: _Session, label: str = "") -> int:
    """Print one line on stderr for each problem of an error; return the exit code."""
    if session.debug:
        traceback.print_exception(error)
    if not isinstance(error, CfspError):
        error = _translate_error(error, session)
    mine = processes.launched()
    if not mine.first:
        if isinstance(error, CfspError) and not processes.connected():
            # Before the processes are connected, all of them meet the same error, and the first one reports it. The
            # launcher ends all processes when one ends, so the others wait until the first one has reported.
            time.sleep(5)
            return error.exit_code
        label = f"process {mine.rank}: {label}"
    if isinstance(error, CfspError):
        for problem in at_most(error.problems):
            print(one_line(f"cfsp: {label}{problem}"), file=sys.stderr)
        return error.exit_code
    reason = printable(str(error)) or type(error).__name__
    where = "" if session.debug else "; debug=true shows where"
    print(one_line(f"cfsp: {label}the run failed ({type(error).__name__}: {reason}){where}"), file=sys.stderr)
    return 1


def _translate_error(error: Exception, session: _Session) -> Exception:
    """Return an error of cfsp in place of an error of Hydra; other errors are returned unchanged.

    Hydra's errors outside of a run concern the overrides or the folder that Hydra creates.
    """
    if libraries := library_memory_problem(error):
        return RunError(libraries)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return explain(error, session.overrides, session.folder, sweep=session.sweep)
    if getattr(error, _RUN_ERROR_MARK, False):
        return error
    if isinstance(error, ValueError | TypeError | AttributeError | LookupError | RecursionError):
        return explain(error, session.overrides, session.folder, sweep=session.sweep)
    if isinstance(error, OSError) and error.filename:
        return ConfigError(
            f"paths.output_dir: {error.filename} cannot be written ({error.strerror}); give another folder"
        )
    return error


def _is_multirun() -> bool:
    return HydraConfig.get().mode == RunMode.MULTIRUN


def _job_label(session: _Session) -> str:
    """Return the overrides that distinguish this run from the others of a multirun; empty outside of a multirun."""
    if not _is_multirun():
        return ""
    parsed = OverridesParser.create().parse_overrides(list(session.overrides))
    same = {override.key_or_group for override in parsed if not override.is_sweep_override()}
    own = [word for word in HydraConfig.get().overrides.task if word.partition("=")[0].lstrip("+~") not in same]
    return f"[{' '.join(own)}] " if own else ""


if __name__ == "__main__":
    main()
