"""Printer for the report of ``cfsp inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from cfsp.inspection.describe import AttentionFacts, BlockFacts, ExpertFacts, FfnFacts, equal_blocks, ranges

if TYPE_CHECKING:
    from cfsp.inspection.history import History
    from cfsp.inspection.reach import Reach
    from cfsp.inspection.report import Report

_NAMES = {"ffn": "FFN"}
_KINDS = {"experts": "mixture of experts"}


def show(report: Report) -> None:
    """Print the report."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, 200)  # lines of a log are not wrapped
    source = report.numbers.source
    console.print(source.origin if report.by_path else f"{source.name}: {source.origin}", soft_wrap=True)
    for line in report.numbers.notes:
        console.print(f"  {line}", soft_wrap=True)
    for line in report.numbers.differences:
        console.print(f"    {line}", soft_wrap=True)
    positions = "" if report.positions is None else f", {report.positions:,} positions"
    console.print(
        f"{report.model_class} ({report.model_type}), {report.dtype}: {report.parameters:,} parameters, "
        f"{_bytes(report.bytes)}; {len(report.blocks)} blocks, hidden size {report.hidden:,}, vocabulary "
        f"{report.vocabulary:,}{positions}",
        soft_wrap=True,
    )
    if report.history is not None:
        console.print(_history_line(report.history), soft_wrap=True)
    for table in (_parts(report), _blocks(report)):
        console.print()
        console.print(table)
    usable = [reach for reach in report.reaches if not reach.reason]
    console.print()
    if usable:
        console.print(_reaches(usable, report.parameters))
    for line in _refusals(report.reaches):
        console.print(line, soft_wrap=True)


def _bytes(n: int) -> str:
    return f"{n / 2**30:,.2f} GiB" if n >= 2**30 else f"{n / 2**20:,.1f} MiB"


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, pad_edge=False)


def _history_line(history: History) -> str:
    before, after = history.parameters.get("before"), history.parameters.get("after")
    counts = f": {before:,} parameters before, {after:,} after" if before and after else ""
    removed = history.removed_blocks
    blocks = f"; blocks {ranges(removed)} of {history.blocks_before} went" if removed else ""
    return f"{history.state or 'pruned'} earlier by {', then '.join(history.methods)}{counts}{blocks}"


def _parts(report: Report) -> Table:
    table = _table("part", "parameters", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    for part, n in report.parts.items():
        tied = part == "head" and report.tied
        if n or tied:
            shown = (f"{n:,}", f"{n / report.parameters:.1%}") if n else ("tied", "")
            table.add_row(_NAMES.get(part, part), *shown)
    table.add_row("total", f"{report.parameters:,}", "100.0%")
    return table


def _blocks(report: Report) -> Table:
    table = _table("blocks", "FFN", "attention", "parameters of a block")
    table.columns[3].justify = "right"
    for indices, block in equal_blocks(report.blocks):
        table.add_row(ranges(indices), describe_ffn(block.ffn), describe_attention(block), f"{block.parameters:,}")
    return table


def describe_ffn(ffn: FfnFacts | None) -> str:
    """Return a clause on the FFN of a block."""
    if ffn is None:
        return "removed"
    before = "" if ffn.width_before is None else f" of {ffn.width_before:,}"
    if ffn.experts is not None:
        return _describe_experts(ffn, ffn.experts, before)
    return (
        f"{_KINDS.get(ffn.kind, ffn.kind)}, {ffn.width:,}{before} neurons ({ffn.neuron_parameters:,} parameters each)"
    )


def _describe_experts(ffn: FfnFacts, experts: ExpertFacts, before: str) -> str:
    total = "" if experts.n_before is None else f" of {experts.n_before}"
    groups = "" if experts.groups == 1 else f" in {experts.groups} groups"
    shared = "" if experts.shared is None else f"; shared, {experts.shared:,} neurons that stay"
    return (
        f"{_KINDS[ffn.kind]}, {experts.n}{total}{groups}, {experts.top_k} for a token, {ffn.width:,}{before} neurons "
        f"({ffn.neuron_parameters // experts.n:,} parameters each){shared}"
    )


def describe_attention(block: BlockFacts) -> str:
    """Return a clause on the attention of a block."""
    attention = block.attention
    if block.latent:
        return "multi-head latent: its heads share keys and values, and stay"
    if attention is None:
        return "removed" if block.attention_known else "not recognised: its heads stay"
    window = "" if attention.window is None else f", sliding window of {attention.window:,}"
    return f"{_heads(attention)} ({attention.group_parameters:,} parameters each){window}"


def _heads(attention: AttentionFacts) -> str:
    before = "" if attention.groups_before is None else f" of {attention.groups_before}"
    if attention.kind == "multi-head":
        return f"multi-head, {attention.heads}{before} heads of {attention.head_dim}"
    groups = "KV group" if attention.kv_groups == 1 and not before else "KV groups"
    return (
        f"{attention.kind}, {attention.heads} heads of {attention.head_dim} in {attention.kv_groups}{before} {groups}"
    )


def _reaches(reaches: Sequence[Reach], parameters: int) -> Table:
    """Return a table of what could be removed; pruners with the same reach share a row."""
    table = _table("could remove", "parameters at most", "of the model", "sparsity.ratio", "sparsity.scope", "pruner")
    for column in table.columns[1:4]:
        column.justify = "right"
    rows: dict[tuple[str, ...], list[str]] = {}
    for reach in reaches:
        units = "units: not stated by this pruner"
        if reach.units is not None:
            units = ", ".join(f"{n:,} {unit}" for unit, n in reach.units.items())
        most = reach.parameters or 0
        row = (
            units,
            f"{most:,}",
            f"{most / parameters:.1%}",
            f"{reach.largest_ratio:.4f}",
            reach.scope,
        )
        rows.setdefault(row, []).append(reach.pruner)
    for cells, names in rows.items():
        table.add_row(*cells, ", ".join(names))
    return table


def _refusals(reaches: Sequence[Reach]) -> list[str]:
    """Return a line for each pruner that cannot be used, or a single line where the reason is the same for all."""
    refused: dict[str, list[str]] = {}
    for reach in reaches:
        if reach.reason:
            refused.setdefault(reach.reason, []).append(reach.pruner)
    lines = []
    for reason, names in refused.items():
        whose = "no pruner can" if len(names) == len(reaches) else f"{', '.join(names)} cannot"
        lines.append(f"{whose} be used: {reason}")
    return lines
