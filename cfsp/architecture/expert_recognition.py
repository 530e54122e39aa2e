"""Recognition of a mixture of experts by the matrices of the experts and their router's rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cfsp.architecture.experts import ExpertMatrices, ExpertsFFN
from cfsp.architecture.ffn import FFN, ffn_of

#: Names under which a router or a mixture says how many experts see a token.
_TOP_K = ("top_k", "num_experts_per_tok", "moe_top_k", "k")


def experts_in(model: Any, block: nn.Module) -> ExpertsFFN | None:
    """Return the mixture of experts of a block of ``model``; None where none is recognised."""
    for module in block.modules():
        if module is block:  # a mixture that has no module of its own cannot be run alone
            continue
        for child in module.children():
            fused, each = _fused(child), _each(child)
            if not fused and not each:
                continue
            n = fused["down"].parameter.shape[0] if fused else len(each)
            return _mixture(model, module, child, fused, each, n)
    return None


def looks_like_experts(block: nn.Module) -> bool:
    """Return whether a module of the block has matrices of several experts in its parameters."""
    for module in block.modules():
        shapes = [p.shape for p in module._parameters.values() if p is not None and p.dim() == 3]
        # The gates of a recurrent mixer (RecurrentGemma) are square matrices, one for each head.
        if len(shapes) >= 2 and any(rows != columns for _, rows, columns in shapes):
            return True
    return False


def _fused(module: nn.Module) -> dict[str, ExpertMatrices]:
    """Return gate, up and down of experts in 3-D parameters, by the attribute names of transformers; else nothing."""
    first = next((name for name in ("gate_up_proj", "up_proj") if module._parameters.get(name) is not None), None)
    down = module._parameters.get("down_proj")
    if first is None or down is None or down.dim() != 3:
        return {}
    transposed = bool(getattr(module, "is_transposed", False))
    gated = first == "gate_up_proj"
    matrices = ExpertMatrices(module, first, transposed)
    output = ExpertMatrices(module, "down_proj", transposed)
    n_experts, hidden, width = output.weight.shape
    if matrices.parameter.dim() != 3 or tuple(matrices.weight.shape) != (n_experts, (1 + gated) * width, hidden):
        return {}
    if not gated:
        return {"up": matrices, "down": output}
    concatenated = getattr(module, "is_concatenated", True)
    rows = (slice(0, width), slice(width, None)) if concatenated else (slice(0, None, 2), slice(1, None, 2))
    gate, up = (ExpertMatrices(module, first, transposed, own) for own in rows)
    return {"gate": gate, "up": up, "down": output}


def _each(module: nn.Module) -> tuple[FFN, ...]:
    """Return the FFNs of a list of experts; empty where ``module`` is no such list."""
    if not isinstance(module, nn.ModuleList) or len(module) < 2:
        return ()
    ffns = [ffn for item in module if (ffn := ffn_of(item)) is not None]
    structures = {(ffn.kind, ffn.width, ffn.output.out_features) for ffn in ffns}
    return tuple(ffns) if len(ffns) == len(module) and len(structures) == 1 else ()


def _mixture(
    model: Any, module: nn.Module, experts: nn.Module, fused: dict[str, ExpertMatrices], each: tuple[FFN, ...], n: int
) -> ExpertsFFN | None:
    hidden = each[0].output.out_features if each else fused["down"].weight.shape[1]
    other_children = [child for child in module.children() if child is not experts]
    routers = [
        child for child in other_children
        if isinstance(weight := getattr(child, "weight", None), Tensor) and tuple(weight.shape) == (n, hidden)
    ]  # fmt: skip
    if len(routers) != 1:
        return None
    (router,) = routers
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    top_k = next(
        (k for holder in (router, module, config) for name in _TOP_K if (k := _number(holder, name)) is not None), None
    )
    if top_k is None or not 0 < top_k <= n:
        return None
    groups, top_groups = _number(router, "num_group", "n_group") or 1, _number(router, "topk_group") or 1
    if groups == 1 or getattr(router, "topk_method", "") == "greedy":
        groups = top_groups = 1
    shared = [ffn for child in other_children if (ffn := ffn_of(child)) is not None]
    return ExpertsFFN(
        module, experts, router, n, top_k, groups, top_groups, shared[0] if len(shared) == 1 else None, fused, each
    )


def _number(holder: Any, *names: str) -> int | None:
    values = (getattr(holder, name, None) for name in names)
    return next((n for n in values if isinstance(n, int) and not isinstance(n, bool)), None)
