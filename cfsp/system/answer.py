"""Answers to the user: one line each, of bounded length, without control characters."""

from __future__ import annotations

import re

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
