"""Feed-forward network of a block, recognised by the matrices that are there and their attribute names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from cfsp.architecture.projection import Projection, projections_named, stored_parameters

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
#: The names that are looked for, in messages.
KNOWN_NAMES = " or ".join("/".join(names) for names in (*_GATED_NAMES, *_FUSED_NAMES, *_PLAIN_NAMES))


@dataclass(frozen=True)
class FFN:
    """FFN of a block: gate and up [N, d], down [d, N].

    Attributes:
        module: the module that holds the matrices; the block itself where the architecture gives the FFN none (OPT).
        kind: gated, ``down(act(gate(x)) * up(x))``, or plain, ``down(act(up(x)))``.
        inputs: gate and up, which may be rows of one matrix, or up alone.
        output: down.
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
        """Projections by the names gate, up and down."""
        return {**self.inputs, "down": self.output}

    @property
    def neuron_parameters(self) -> int:
        """Parameters that go with one neuron: a row of gate, a row of up, a column of down, two biases if any."""
        rows = sum(part.in_features + (part.module.bias is not None) for part in self.inputs.values())
        return rows + self.output.out_features

    @property
    def parameters(self) -> int:
        """Parameters of its matrices and their biases."""
        return stored_parameters(list(self.projections.values()))

    def weights(self) -> tuple[Tensor, ...]:
        """Return gate [N, d], up [N, d] and down [d, N], or these without gate, in fp32, detached."""
        return tuple(part.weight.detach().float() for part in self.projections.values())


def ffn_of(module: nn.Module) -> FFN | None:
    """Return the FFN whose matrices are attributes of ``module``; None where there is none."""
    for names in _GATED_NAMES:
        if (matrices := projections_named(module, names)) is not None:
            gate, up, down = matrices
            return _fitting(FFN(module, "gated", {"gate": gate, "up": up}, down))
    for names in _FUSED_NAMES:
        if (matrices := projections_named(module, names)) is not None:
            both, down = matrices
            n = both.out_features // 2
            halves = {"gate": range(n), "up": range(n, 2 * n)}
            inputs = {kind: Projection(module, both.name, (rows,)) for kind, rows in halves.items()}
            return _fitting(FFN(module, "gated", inputs, down))
    for names in _PLAIN_NAMES:
        if (matrices := projections_named(module, names)) is not None:
            up, down = matrices
            return _fitting(FFN(module, "plain", {"up": up}, down))
    return None


def _fitting(ffn: FFN) -> FFN | None:
    width, hidden = ffn.width, ffn.output.out_features
    fits = all((part.out_features, part.in_features) == (width, hidden) for part in ffn.inputs.values())
    return ffn if fits else None
