"""Hook of mkdocs: ``math`` fences become MathML, which browsers render without a script and without network."""

from __future__ import annotations

import html
from typing import Any

from latex2mathml.converter import convert


def on_config(config: Any) -> Any:
    """Add the fence to the settings of pymdownx.superfences."""
    fences = config["mdx_configs"].setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "math", "class": "math", "format": _format}]
    return config


def _format(source: str, language: str, class_name: str, options: Any, md: Any, **rest: Any) -> str:
    return f'<div class="math" role="math" aria-label="{html.escape(source)}">{convert(source, display="block")}</div>'
