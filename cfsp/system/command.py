"""Frame of every command: it turns errors into lines on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from cfsp.errors import CfspError
from cfsp.system import escape, interrupts
from cfsp.system.logs import quiet


def command(
    name: str, usage: str, words: Sequence[str] | None, body: Callable[[list[str]], int], *, verb: str = ""
) -> int:
    """Call ``body`` with the words of the command line; every error becomes one line on stderr and an exit code.

    ``debug=true`` is removed from the words; it prints the traceback of an error.

    Args:
        name: name of the program, which begins each line on stderr.
        usage: text that ``--help``, or no words at all, prints.
        words: words of the command line; None: those of this process.
        body: does the work with the words; returns the exit code.
        verb: command of ``name``, for the line about an unexpected error.

    Returns:
        The exit code.
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
        sys.stdout.flush()  # raises errors of a full disk or a closed pipe here, not when Python ends
        return code
    except CfspError as error:
        if debug:
            traceback.print_exception(error)
        for problem in error.problems:
            print(f"{name}: {escape.plain(' '.join(problem.split()))}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of stdout closed it, e.g. head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on", file=sys.stderr)
        return 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            print(f"{name}: {str(error.filename)[:80]}...: too long for a path; give a shorter one", file=sys.stderr)
            return 2
        print(unexpected(error, f"{name}: {verb}".rstrip(": "), debug=debug), file=sys.stderr)
        return 1


def unexpected(error: Exception, name: str, *, debug: bool) -> str:
    """Describe an unexpected error in one line; with ``debug`` print its traceback first."""
    if debug:
        traceback.print_exception(error)
    reason = escape.plain(" ".join(str(error).split()))[:300] or "no message"
    where = "" if debug else "; debug=true shows where"
    return f"{name}{'' if ': ' in name else ':'} failed ({type(error).__name__}: {reason}){where}"
