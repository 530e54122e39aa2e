"""Ctrl-C while a command imports its libraries: one line and the end, no traceback out of the middle of an import.

Nothing heavy is imported here: entry points call :func:`quiet` before everything else.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # importing typing takes longer than all else that is done here
if TYPE_CHECKING:
    from types import FrameType

_name = "cfsp"


def quiet_command() -> None:
    """Call :func:`quiet` where this process is the command ``cfsp`` or ``python -m cfsp.run``, no other program."""
    program = (getattr(sys, "argv", None) or [""])[0]
    if os.path.basename(program) == "cfsp" or (program == "-m" and "cfsp.run" in sys.orig_argv[:8]):
        quiet()


def quiet(name: str = "cfsp") -> None:
    """Let Ctrl-C end the process with one line from now on; ``name`` stands at its beginning.

    An interrupt that is ignored (``nohup``) stays so, and a handler of somebody else stays his.
    """
    global _name
    _name = name
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _end)
    except ValueError:  # not in the main thread
        pass


def raise_again() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again: from here on there is something to be cleaned up."""
    try:
        if signal.getsignal(signal.SIGINT) is _end:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    except ValueError:
        pass


def _end(_: int, __: FrameType | None) -> None:
    os.write(2, f"{_name}: interrupted\n".encode())
    os._exit(1)
