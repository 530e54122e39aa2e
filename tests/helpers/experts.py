"""Mixtures of experts computed by hand: the routing of a router, and one expert from its matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.architectures import ARCHITECTURES, VOCABULARY, Architecture
from tests.helpers.tiny import tokens

SPARSE = {name: entry for name, entry in ARCHITECTURES.items() if entry.experts}
IDS = tokens(6, 24, vocabulary=VOCABULARY)
SHORT = tokens(2, 12, seed=3, vocabulary=VOCABULARY)


def logits(model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def entering(mixture: nn.Module, model: nn.Module, ids: Tensor) -> Tensor:
    """States [S, d] that enter a mixture on the tokens of ``ids``."""
    seen: list[Tensor] = []
    handle = mixture.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    logits(model, ids)
    handle.remove()
    return seen[0]


@torch.no_grad()
def routed(a: Architecture, mixture: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
    """(chosen [S, k], weights [S, k]) of states [S, d], from the router itself."""
    router = getattr(mixture, a.experts.router)
    if a.experts.layout == "modules":
        weights, chosen = router(states).softmax(-1).topk(a.experts.top_k, -1)
        return chosen, weights / weights.sum(-1, keepdim=True)
    _, weights, chosen = router(states[None] if a.model_type.startswith("deepseek") else states)
    return chosen, weights


def expert_by_hand(a: Architecture, mixture: nn.Module, expert: int, x: Tensor) -> tuple[Tensor, Tensor]:
    said = a.experts
    if said.layout == "modules":
        one = mixture.experts[expert]
        inner = F.silu(one.gate_proj(x)) * one.up_proj(x)
        return inner, one.down_proj(inner)
    experts = mixture.experts
    first, second = experts.gate_up_proj[expert], experts.down_proj[expert]
    if not said.transposed:
        first, second = first.T, second.T
    both = x @ first + (experts.gate_up_proj_bias[expert] if said.biases else 0)
    if said.interleaved:
        gate, up = both[:, ::2].clamp(max=experts.limit), both[:, 1::2].clamp(-experts.limit, experts.limit)
        inner = (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
    else:
        gate, up = both.chunk(2, -1)
        inner = F.silu(gate) * up
    return inner, inner @ second + (experts.down_proj_bias[expert] if said.biases else 0)
