"""Common frame of all commands, which turns errors into lines on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from cfsp.errors import CfspError, at_most
from cfsp.system import escape, interrupts
from cfsp.system.logs import quiet


def command(
    name: str, usage: str, overrides: Sequence[str] | None, body: Callable[[list[str]], int], *, verb: str = ""
) -> int:
    """Call ``body`` with the arguments of the command line; every error becomes one line on stderr and an exit code.

    ``debug=true`` is removed from the arguments; it prints the traceback of an error.

    Args:
        name: name of the program, which begins each line on stderr.
        usage: text that ``--help``, or no argument at all, prints.
        overrides: arguments of the command line; None: those of this process.
        body: function that executes the command with the arguments and returns the exit code.
        verb: command of ``name``, for the line about an unexpected error.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if overrides is None else list(overrides)
    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        try:
            print(usage, flush=True)
        except BrokenPipeError:
            _forget_stdout()
        return 0 if arguments else 2
    debug = any(argument.lower().lstrip("+") == "debug=true" for argument in arguments)
    arguments = [
        argument for argument in arguments if argument.lower().lstrip("+") not in ("debug=true", "debug=false")
    ]
    quiet()
    interrupts.raise_again()
    try:
        code = body(arguments)
        sys.stdout.flush()  # raises errors of a full disk or a closed pipe here, not when Python ends
        return code
    except CfspError as error:
        if debug:
            traceback.print_exception(error)
        for problem in at_most(error.problems):
            print(f"{name}: {escape.plain(' '.join(problem.split()))}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of stdout closed it, e.g. head
        _forget_stdout()
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on", file=sys.stderr)
        return 1
    except SystemExit as error:  # code shipped with a model called sys.exit(0), which must not count as success
        reason = escape.plain(str(error.code))[:100]
        print(f"{name}: {verb} ended itself (SystemExit: {reason}), by code of the model", file=sys.stderr)
        return 1
    except Exception as error:
        if (path_problem := _path_problem(error)) is not None:
            print(f"{name}: {path_problem}", file=sys.stderr)
            return 2
        print(unexpected(error, f"{name}: {verb}".rstrip(": "), debug=debug), file=sys.stderr)
        return 1


def _forget_stdout() -> None:
    """Redirect stdout to the null device, so that Python prints no error about the closed pipe when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _path_problem(error: Exception) -> str | None:
    """Describe the error of a path that is too long or a loop of links; return None for other errors."""
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.ENAMETOOLONG:
        return f"{str(getattr(error, 'filename', ''))[:80]}...: too long for a path; give a shorter one"
    # pathlib raises a RuntimeError for a loop before Python 3.13, and an OSError from then on.
    if code == errno.ELOOP or (isinstance(error, RuntimeError) and str(error).startswith("Symlink loop from ")):
        place = getattr(error, "filename", None) or str(error).removeprefix("Symlink loop from ").strip("'")
        return f"{escape.plain(str(place))[:300]}: a link that leads to itself; give the file or folder that is meant"
    return None


def unexpected(error: Exception, name: str, *, debug: bool) -> str:
    """Describe an unexpected error in one line; with ``debug`` print its traceback first."""
    if debug:
        traceback.print_exception(error)
    reason = escape.plain(" ".join(str(error).split()))[:300] or "no message"
    where = "" if debug else "; debug=true shows where"
    return f"{name}{'' if ': ' in name else ':'} failed ({type(error).__name__}: {reason}){where}"
