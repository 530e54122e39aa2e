"""Sums over coupled weights, which are removed together with a neuron or a KV group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cfsp.architecture.views import AttentionView

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.views import Channels


def coupled(channels: Channels, terms: Mapping[str, Tensor]) -> Tensor:
    """Sum ``terms`` over the weights that are removed with each channel.

    A row of k or v is shared out among the query heads that read it, so that the sum over a KV group counts each
    weight once.

    Args:
        terms: projection name -> term of each row of gate, up, q, k, v, and of each column of down, o.

    Returns:
        Sums per channel [N].
    """
    part = channels.part
    if not isinstance(part, AttentionView):
        return sum((terms[name] for name in part.inputs), terms["down"])
    shared = part.spread(terms["k"] + terms["v"]) / part.queries_per_group
    return terms["q"] + terms["o"] + shared
