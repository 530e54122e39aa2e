"""Report of ``cfsp inspect`` on a model, for people (:mod:`cfsp.inspection.show`) and for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from cfsp.inspection.describe import BlockFacts, count_parameters, describe_blocks, equal_blocks, is_tied
from cfsp.inspection.history import History, read_history
from cfsp.inspection.numbers import ConfigSource
from cfsp.inspection.reach import Plugins, Reach, reaches
from cfsp.model.outline import config_corrections, outline
from cfsp.plan.check import read_block_sizes

SCHEMA = 1


@dataclass(frozen=True)
class Report:
    """Description of a model, computed without its weights.

    Attributes:
        numbers: where the numbers are from.
        model_class: class of transformers.
        model_type: model_type of its configuration.
        dtype: dtype of the stored weights.
        parameters: all parameters, each once, tied ones too.
        parts: part -> parameters.
        tied: whether the head is tied to the embeddings.
        vocabulary: rows of the embeddings.
        hidden: hidden size.
        positions: longest window; None where config.json does not say.
        blocks: facts of each block, in order.
        history: earlier pruning; None where nothing was removed before.
        reaches: reach of each pruner.
    """

    numbers: ConfigSource
    model_class: str
    model_type: str
    dtype: str
    parameters: int
    parts: Mapping[str, int]
    tied: bool
    vocabulary: int
    hidden: int
    positions: int | None
    blocks: tuple[BlockFacts, ...]
    history: History | None
    reaches: tuple[Reach, ...]

    @property
    def by_path(self) -> bool:
        """Return whether a folder or hub id was given, whose name says nothing more."""
        return self.numbers.by_path

    @property
    def bytes(self) -> int:
        """Return the size of the weights in ``dtype``, in bytes."""
        return self.parameters * getattr(torch, self.dtype).itemsize

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON; equal blocks are one entry, which lists their indices."""
        source = self.numbers.source
        return {
            "schema": SCHEMA,
            "model": source.name,
            "origin": source.origin,
            "numbers": self.numbers.kind,
            "notes": list(self.numbers.notes),
            "differences": list(self.numbers.differences),
            "class": self.model_class,
            "model_type": self.model_type,
            "dtype": self.dtype,
            "parameters": self.parameters,
            "parts": dict(self.parts),
            "tied": self.tied,
            "bytes": self.bytes,
            "vocabulary": self.vocabulary,
            "hidden": self.hidden,
            "positions": self.positions,
            "n_blocks": len(self.blocks),
            "blocks": [{"blocks": indices, **block.as_dict()} for indices, block in equal_blocks(self.blocks)],
            "removed_before": None if self.history is None else self.history.as_dict(),
            "pruners": [reach.as_dict() for reach in self.reaches],
        }


def build_report(numbers: ConfigSource, *, trust_remote_code: bool = False, plugins: Plugins | None = None) -> Report:
    """Build the model on the meta device and describe it.

    Args:
        numbers: configuration that the model is built of.
        trust_remote_code: whether code of the folder is run.
        plugins: pruners of other packages.

    Raises:
        CfspError: it is not a causal language model that can be pruned, or config.json and weights differ.
    """
    source = numbers.source
    view = outline(source, trust_remote_code=trust_remote_code)
    notes = config_corrections(source, trust_remote_code=trust_remote_code)
    history = read_history(source.folder, source.state, read_block_sizes(view))
    embeddings = view.model.get_input_embeddings().weight
    return Report(
        numbers=replace(numbers, notes=(*numbers.notes, *notes)),
        model_class=type(view.model).__name__,
        model_type=str(view.model.config.model_type),
        dtype=source.stored_dtype,
        parameters=view.model_parameters,
        parts=count_parameters(view),
        tied=is_tied(view),
        vocabulary=embeddings.shape[0],
        hidden=embeddings.shape[1],
        positions=source.positions,
        blocks=tuple(describe_blocks(view, history)),
        history=history,
        reaches=tuple(reaches(view, plugins)),
    )
