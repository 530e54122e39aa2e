"""Handling of Ctrl-C while a command imports its libraries: one line instead of a traceback.

This module imports nothing heavy, because entry points call :func:`quiet` before everything else.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading

TYPE_CHECKING = False  # importing typing takes longer than the rest of this module
if TYPE_CHECKING:
    from types import FrameType

_name = "cfsp"
_registered: list[bool] = []


def quiet_command() -> None:
    """Call :func:`quiet` if this process is the command ``cfsp`` or ``python -m cfsp.run``."""
    program = (getattr(sys, "argv", None) or [""])[0]
    if os.path.basename(program) == "cfsp" or (program == "-m" and "cfsp.run" in sys.orig_argv[:8]):
        quiet()


def quiet(name: str = "cfsp") -> None:
    """Let Ctrl-C end the process with one line from now on.

    An interrupt that is ignored (``nohup``) stays ignored, and a handler that another program has set stays in place.

    Args:
        name: name of the program, which begins the line.
    """
    global _name
    _name = name
    if not _registered:
        _registered.append(True)
        atexit.register(_ignore)
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _end)
    except ValueError:  # not in the main thread
        pass


def raise_again() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, because from now on the command has work to clean up."""
    try:
        if signal.getsignal(signal.SIGINT) is _end:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    except ValueError:
        pass


def _ignore() -> None:
    """Ignore Ctrl-C while Python shuts down, which takes a second with these libraries.

    Everything is written by then, and the signal would change the exit code. The function is registered first and
    therefore called last, so that the exit functions of other libraries can still be interrupted.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end(_: int, __: FrameType | None) -> None:
    os.write(2, f"{_name}: interrupted\n".encode())
    os._exit(1)
