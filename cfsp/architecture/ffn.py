"""The feed-forward network of a block, recognised by the matrices that are there and their attribute names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from cfsp.architecture.projection import Projection, of_names, stored_parameters

#: Attribute names in transformers: (gate, up, down); gate and up in one matrix, in this order, and down; (up, down).
_GATED_NAMES: tuple[tuple[str, ...], ...] = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_FUSED_NAMES: tuple[tuple[str, ...], ...] = (("gate_up_proj", "down_proj"),)
_PLAIN_NAMES: tuple[tuple[str, ...], ...] = (
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("fc_in", "fc_out"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("up_proj", "down_proj"),
)
#: For messages.
KNOWN_NAMES = " or ".join("/".join(names) for names in (*_GATED_NAMES, *_FUSED_NAMES, *_PLAIN_NAMES))


@dataclass(frozen=True)
class FFN:
    """gated: ``down(act(gate(x)) * up(x))``; plain: ``down(act(up(x)))``. gate and up are [N, d], down is [d, N].

    module: what holds the matrices: the block itself where the architecture gives the FFN no module (OPT).
    inputs: gate and up, or up alone; gate and up may be rows of one matrix.
    """

    module: nn.Module
    kind: Literal["gated", "plain"]
    inputs: dict[str, Projection]
    output: Projection

    @property
    def width(self) -> int:
        """N, the number of neurons."""
        return self.output.in_features

    @property
    def projections(self) -> dict[str, Projection]:
        """By the names gate, up and down."""
        return {**self.inputs, "down": self.output}

    @property
    def neuron_parameters(self) -> int:
        """Parameters that go with one neuron: a row of gate, a row of up, a column of down, two biases if any."""
        rows = sum(one.in_features + (one.module.bias is not None) for one in self.inputs.values())
        return rows + self.output.out_features

    @property
    def parameters(self) -> int:
        """Of its matrices and their biases."""
        return stored_parameters(list(self.projections.values()))

    def weights(self) -> tuple[Tensor, ...]:
        """(gate [N, d], up [N, d], down [d, N]), or without gate, in fp32, detached."""
        return tuple(one.weight.detach().float() for one in self.projections.values())


def ffn_of(module: nn.Module) -> FFN | None:
    """The FFN whose matrices are attributes of ``module``; None where it is none."""
    for names in _GATED_NAMES:
        if (found := of_names(module, names)) is not None:
            gate, up, down = found
            return _fitting(FFN(module, "gated", {"gate": gate, "up": up}, down))
    for names in _FUSED_NAMES:
        if (found := of_names(module, names)) is not None:
            both, down = found
            n = both.out_features // 2
            halves = {"gate": range(n), "up": range(n, 2 * n)}
            inputs = {kind: Projection(module, both.name, (rows,)) for kind, rows in halves.items()}
            return _fitting(FFN(module, "gated", inputs, down))
    for names in _PLAIN_NAMES:
        if (found := of_names(module, names)) is not None:
            up, down = found
            return _fitting(FFN(module, "plain", {"up": up}, down))
    return None


def _fitting(ffn: FFN) -> FFN | None:
    width, hidden = ffn.width, ffn.output.out_features
    fits = all((one.out_features, one.in_features) == (width, hidden) for one in ffn.inputs.values())
    return ffn if fits else None
