"""Check before a run that the requested export format can hold the model once it is pruned."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cfsp.errors import ConfigError
from cfsp.export.folder import read_source
from cfsp.weights.source import ModelSource

if TYPE_CHECKING:
    from cfsp.architecture.views import DecoderView
    from cfsp.config.run_config import RunConfig

log = logging.getLogger(__name__)


def check_exportable(source: ModelSource, config: RunConfig, view: DecoderView) -> None:
    """Refuse a format that cannot hold the model that the pruner will give.

    Args:
        source: the base model.
        config: the run's configuration.
        view: view of the base model.

    Raises:
        CfspError: names save.format and the reason.
    """
    format, pruner = config.save.format, config.pruner.instance
    if format == "hf":
        return
    # Start-up time: loads numpy.
    from cfsp.export import decilm, gguf, padded

    folder = read_source(source)
    biases = pruner.biased_projections()
    if biases is None:
        log.warning(
            "save.format=%s: biased_projections: not stated by this pruner (pruner=%s); where its plan adds a bias "
            "that the format cannot hold, the export at the end of the run says so",
            format, pruner.name,
        )  # fmt: skip
    added = [name for name in biases or () if name not in folder.biased]
    instead = "use save.format=hf, or pruner.compensation=none"
    if format == "decilm":
        decilm.check(folder)
        if added:
            raise ConfigError(
                "save.format=decilm: pruner.compensation=bias adds biases, for which DeciLM has no place; " + instead
            )
    elif format == "padded":
        padded.check(folder)
        biases_without_place = [name for name in added if not padded.holds_bias(folder, name)]
        if biases_without_place:
            windowed = " with a sliding window" if folder.family == "mistral" else ""
            raise ConfigError(
                f"save.format=padded: pruner.compensation=bias adds a bias at {biases_without_place[0]}, for which "
                f"{folder.family}{windowed} has no place; {instead}"
            )
    else:
        gguf.check(folder, "auto")
        if folder.family != "qwen3":
            return
        if added:
            raise ConfigError(
                f"save.format=gguf: pruner.compensation=bias adds a bias at {added[0]}, for which llama.cpp has no "
                f"place in a qwen3 model; {instead}"
            )
        equal = pruner.keeps_blocks_equal(view, config.budget, config.allocator.instance)
        if not folder.tied and not equal:
            may = "keeps_blocks_equal: not stated by this pruner" if equal is None else "may leave such"
            raise ConfigError(
                "save.format=gguf: llama.cpp has no architecture for a qwen3 model with unequal blocks whose LM head "
                f"is not the embedding, and pruner={pruner.name} {may}; use save.format=padded, and export that "
                "folder as gguf, or prune all blocks alike (allocator=uniform sparsity.rounding=nearest)"
            )
