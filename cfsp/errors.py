"""The errors a user can cause or meet; each carries one sentence that says what is wrong and the way out.

``exit_code`` is what the command line returns: 2 where the configuration or an input is wrong, 1 where a run
failed on its way.
"""

from __future__ import annotations

import re


class CfspError(Exception):
    """Base of every error that cfsp raises on purpose."""

    exit_code = 2

    @property
    def problems(self) -> tuple[str, ...]:
        """One line per finding, of bounded length and without control characters."""
        return (one_line(str(self)),)


class ConfigError(CfspError):
    """Keys, values or combinations of values are wrong."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self._problems = tuple(map(one_line, problems))

    @property
    def problems(self) -> tuple[str, ...]:
        return self._problems


class UnsupportedModelError(CfspError):
    """The model's structure is not one that can be pruned here."""


class BudgetError(CfspError):
    """The requested sparsity cannot be met."""


class DataError(CfspError):
    """A calibration or evaluation input is missing, malformed or too small."""


class CheckpointError(CfspError):
    """A model folder, a plan or an output folder cannot be read or written."""


class BusyError(CfspError):
    """Another process is at this run now."""

    exit_code = 1


class RunError(CfspError):
    """A run failed for a reason that no input check can see beforehand."""

    exit_code = 1


#: Longest line that answers a user.
LONGEST = 480


def printable(text: str) -> str:
    """A text on one line: white space folded, control characters and halves of characters written as escapes."""
    folded = " ".join(text.split())
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", _escaped, folded)


def one_line(text: str, longest: int = LONGEST) -> str:
    """Cut an answer to ``longest`` characters, in its middle: the end is the way out."""
    line = printable(text)
    if len(line) <= longest:
        return line
    end = longest // 3
    return f"{line[: longest - end - 5]} ... {line[-end:]}"


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
