"""Names of the pruned families: their model types, package, and submodules."""

from __future__ import annotations

#: Prefix of the model_type of a family with unequal layers, and the package of its classes.
PRUNED_PREFIX, PACKAGE = "pruned_", "cfsp_pruned_families"

#: Families that transformers loads after ``import cfsp`` without more ado.
COMMON_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


#: Names of the submodules in a layer of every family that is supported.
SUBMODULES = {"attention": "self_attn", "mlp": "mlp"}


def stock_type(model_type: str) -> str:
    """Return the stock ``model_type`` behind a pruned one; a stock type is returned as it is."""
    return model_type.removeprefix(PRUNED_PREFIX)
