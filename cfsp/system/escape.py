"""Escaping of texts from records, names and configurations for each output format.

A record may come from an untrusted source, so none of its texts may become a command, a tag, a link, a formula, a
second line or a control sequence of the terminal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: Line ends and tabs, which become a space.
_LINE_ENDS = re.compile("[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")
#: Other control characters and characters that reorder text, which are replaced.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_LATEX = {
    "†": r"\textdagger{}",
    "‡": r"\textdaggerdbl{}",
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
#: Entities, because the meaning of a backslash escape depends on the backslashes before it.
_MARKDOWN = {character: f"&#{ord(character)};" for character in "|[]`"} | {"<": "&lt;", ">": "&gt;"}
_FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")


def plain(text: str) -> str:
    """Return a text on one line without control characters, for the terminal, logs and comments."""
    return _CONTROL.sub("\ufffd", _LINE_ENDS.sub(" ", text))


def latex(text: str) -> str:
    """Escape a text that is typeset by LaTeX."""
    return "".join(_LATEX.get(character, character) for character in plain(text))


def latex_comment(text: str) -> str:
    """Return a text as one line of a LaTeX comment."""
    return f"% {plain(text)}"


def markdown(text: str) -> str:
    """Escape a text for a paragraph or a table cell of Markdown."""
    return "".join(_MARKDOWN.get(character, character) for character in plain(text))


def code(text: str) -> str:
    """Return a text as inline code of Markdown."""
    return f"`{markdown(text)}`"


def cell(text: Any) -> Any:
    """Prefix a CSV cell with an apostrophe where a spreadsheet would read a formula; numbers stay unchanged."""
    if not isinstance(text, str):
        return text
    shown = plain(text)
    if not (shown.lstrip().startswith(_FORMULA) or text[:1] in ("\t", "\r", "\n")):
        return shown
    try:
        float(shown)
    except ValueError:
        return f"'{shown}"
    return shown


def html(value: Any) -> Any:
    """Replace control characters except line ends and tabs; Jinja escapes the rest.

    Text that is marked as safe (:class:`markupsafe.Markup`) and values that are no text stay unchanged.
    """
    if type(value) is not str:
        return value
    return _CONTROL.sub("\ufffd", value)


def figure(text: str) -> str:
    """Escape a label of a matplotlib figure, in which a dollar sign begins a formula."""
    return plain(text).replace("$", r"\$")


def in_markdown(value: Any) -> Any:
    """Return the same mappings and lists with every text escaped by :func:`markdown`."""
    if isinstance(value, str):
        return markdown(value)
    if isinstance(value, Mapping):
        return {key: in_markdown(inner) for key, inner in value.items()}
    return [in_markdown(inner) for inner in value] if isinstance(value, list | tuple) else value
