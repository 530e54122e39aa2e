"""Names of the pruned families: their model types, package, and submodules."""

from __future__ import annotations

#: Of the model_type of a family whose layers differ; the package that its classes are in.
PRUNED_PREFIX, PACKAGE = "pruned_", "cfsp_pruned_families"


COMMON_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


#: Names of the submodules in a layer of every family that is supported.
SUBMODULES = {"attention": "self_attn", "mlp": "mlp"}


def stock_type(model_type: str) -> str:
    """The transformers ``model_type`` behind a pruned one; a stock type is returned as it is."""
    return model_type.removeprefix(PRUNED_PREFIX)
