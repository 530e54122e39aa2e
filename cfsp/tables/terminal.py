"""Output at the end of a run: the summary table and the paths of the written files."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from cfsp.record.run_record import RunRecord
from cfsp.tables.summary import summary_table

_FILES = (
    "record.json", "plan.json", "compensation.safetensors", "model", "model-padded", "model-decilm", "model.gguf",
    "adapter", "pruned",
    "blocks.png", "recovery.png", "config.yaml", "run.log", "wandb",
)  # fmt: skip


def show_result(record: RunRecord, out: Path) -> None:
    """Print the summary table of a finished run and the files that it wrote to OUT.

    Args:
        record: record of the run.
        out: folder OUT.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 100)  # a log file does not wrap lines
    table = summary_table(record)
    console.print()
    if table is not None:
        console.print(table)
    written = [name for name in _FILES if (out / name).exists()]
    console.print(f"Written to {out}: {', '.join(written)}", soft_wrap=True)
    if (record.checkpoint or {}).get("form") == "plain":
        console.print(
            "model is a plain folder of the base architecture: all layers are alike, no remote code is needed"
        )
