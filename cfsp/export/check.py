"""What can be refused before a run starts: a model that the asked format will not hold once it is pruned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsp.errors import BudgetError, ConfigError
from cfsp.models.source import ModelSource

if TYPE_CHECKING:
    from cfsp.config import RunConfig
    from cfsp.models.views import DecoderView

#: pruner.structure -> the projections that a bias compensation gives a bias.
_COMPENSATED = {
    "ffn": ("mlp.down_proj",),
    "heads": ("self_attn.o_proj",),
    "heads_ffn": ("mlp.down_proj", "self_attn.o_proj"),
}


def check_exportable(source: ModelSource, config: RunConfig, view: DecoderView) -> None:
    """
    Raises:
        CfspError: names save.format and why.
    """
    form, pruner = config.save.format, config.pruner.instance
    if form == "hf":
        return
    from cfsp.export import decilm, gguf, padded
    from cfsp.export.folder import read_source

    folder = read_source(source)
    compensated = getattr(pruner, "compensation", "none") == "bias"
    biases = _COMPENSATED.get(getattr(pruner, "structure", "ffn"), ()) if compensated else ()
    added = [name for name in biases if name not in folder.biased]
    instead = "use save.format=hf, or pruner.compensation=none"
    if form == "decilm":
        decilm.check(folder)
        if added:
            raise ConfigError(
                "save.format=decilm: pruner.compensation=bias adds biases, for which DeciLM has no place; " + instead
            )
    elif form == "padded":
        padded.check(folder)
        lacking = [name for name in added if not padded.holds_bias(folder, name)]
        if lacking:
            windowed = " with a sliding window" if folder.family == "mistral" else ""
            raise ConfigError(
                f"save.format=padded: pruner.compensation=bias adds a bias at {lacking[0]}, for which "
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
        if not folder.tied and not _keeps_equal(config, view):
            raise ConfigError(
                f"save.format=gguf: llama.cpp has no form for a qwen3 model with unequal blocks whose LM head is not "
                f"the embedding, and pruner={pruner.name} may leave such; use save.format=padded, and export that "
                "folder as gguf, or prune all blocks alike (allocator=uniform sparsity.rounding=nearest)"
            )


def _keeps_equal(config: RunConfig, view: DecoderView) -> bool:
    """Whether all blocks that stay are known to be of the same sizes before anything is computed."""
    from cfsp.allocate.budget import Sizes, keep_fraction, to_widths
    from cfsp.allocate.uniform import Uniform
    from cfsp.pruning.depth import ShortGPT, SlidingWindow
    from cfsp.pruning.one_shot import OneShotPruner

    pruner, budget = config.pruner.instance, config.budget
    if isinstance(pruner, ShortGPT | SlidingWindow):  # whole blocks go
        return True
    if not isinstance(pruner, OneShotPruner) or not isinstance(config.allocator.instance, Uniform):
        return False
    if len(budget.free_blocks(len(view.blocks))) < len(view.blocks):
        return False
    sizes = Sizes.of(view, pruner.structure)
    try:
        keep = keep_fraction(budget, sizes)
    except BudgetError:  # which the pruner's own check says
        return True
    widths = to_widths(
        [keep * n for n in sizes.widths], budget, sizes, groups=[keep * groups for groups in sizes.kv_groups]
    )
    return len(set(widths.per_block)) == len(set(widths.kv_groups)) == 1
