"""Errors that cfsp raises on purpose; each message says what is wrong and the way out.

The command line returns their ``exit_code``: 2 if the configuration or an input is wrong, 1 if a run failed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


class CfspError(Exception):
    """Base of every error that cfsp raises on purpose."""

    exit_code = 2

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each finding, of bounded length and without control characters."""
        return (one_line(str(self)),)


class ConfigError(CfspError):
    """A key, a value or a combination of values in the configuration is wrong."""

    def __init__(self, *problems: str) -> None:
        """Join the findings, one text each, into one message."""
        super().__init__("; ".join(problems))
        self._problems = tuple(map(one_line, problems))

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each finding, of bounded length and without control characters."""
        return self._problems


class UnsupportedModelError(CfspError):
    """cfsp cannot prune a model of this structure."""


class BudgetError(CfspError):
    """The requested sparsity cannot be met."""


class DataError(CfspError):
    """A calibration or evaluation input is missing, malformed or too small."""


class CheckpointError(CfspError):
    """A model folder, a plan or an output folder cannot be read or written."""


class BusyError(CfspError):
    """Another process is executing this run now."""

    exit_code = 1


class RunError(CfspError):
    """A run failed for a reason that no input check can see beforehand."""

    exit_code = 1


#: Most characters of a line that is shown to a user.
LONGEST = 480
#: Most findings that are shown to a user at once.
MOST_LINES = 6


def printable(text: str) -> str:
    """Return a text on one line: white space is folded, control characters and lone surrogates become escapes."""
    folded = " ".join(text.split())
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", _escaped, folded)


#: Types as libraries print them -> words for a user.
_TYPES = {
    "int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "list": "a list",
    "tuple": "a list", "dict": "a group of keys", "NoneType": "null",
}  # fmt: skip


def plain_words(text: str) -> str:
    """Replace the types and addresses in a library's message: ``<class 'int'>`` becomes "a whole number"."""
    text = re.sub(r"<class '(?:[\w.<>]*\.)?(\w+)'>", lambda match: _TYPES.get(match[1], match[1]), text)
    text = re.sub(r"<(?:[\w.<>]*\.)?(\w+) object at 0x[0-9a-fA-F]+>", r"\1", text)
    return re.sub(r"'?\bNoneType\b'?(?: object)?", "null", text)


def one_line(text: str, longest: int = LONGEST) -> str:
    """Return a text on one line of at most ``longest`` characters.

    A longer text is cut in its middle, because its end is the way out.
    """
    line = plain_words(printable(text))
    if len(line) <= longest:
        return line
    end = longest // 3
    return f"{line[: longest - end - 5]} ... {line[-end:]}"


def at_most(problems: Sequence[str], lines: int = MOST_LINES) -> list[str]:
    """Return at most ``lines`` findings; if some are left out, the last line counts them."""
    if len(problems) <= lines:
        return list(problems)
    return [*problems[: lines - 1], f"and {len(problems) - lines + 1} more of this kind; mend these first"]


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
