"""Mixture of experts of a block, as :mod:`cfsp.architecture.expert_recognition` recognises it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from cfsp.architecture.ffn import FFN

#: Names under which modules repeat the number of experts, and fused experts their width.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_experts", "out_features")
_WIDTHS = ("intermediate_dim", "intermediate_size", "moe_intermediate_size", "expert_dim", "ffn_dim")


@dataclass(frozen=True)
class ExpertMatrices:
    """The same matrix of all experts, stored in a single 3-D parameter.

    Attributes:
        owner: the module that holds the parameter.
        name: the parameter's attribute name.
        transposed: it is stored as [E, in, out] (GPT-OSS).
        rows: the output rows that are this matrix; gate and up of one parameter lie one after the other, or
            alternate. None: all.
    """

    owner: nn.Module
    name: str
    transposed: bool = False
    rows: slice | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """Parameter as it is stored, gate and up together."""
        return getattr(self.owner, self.name)

    @property
    def weight(self) -> Tensor:
        """Matrices [E, out, in], a view of the parameter."""
        return self.part(self.parameter)

    @property
    def bias(self) -> Tensor | None:
        """Biases [E, out]; None where there are none."""
        bias: Tensor | None = getattr(self.owner, f"{self.name}_bias", None)
        return bias if bias is None or self.rows is None else bias[:, self.rows]

    @property
    def out_axis(self) -> int:
        """Axis of the stored parameter that holds the outputs."""
        return 2 if self.transposed else 1

    def part(self, stored: Tensor) -> Tensor:
        """Return this matrix's part of a tensor that is laid out like the parameter, such as a gradient.

        Returns:
            [E, out, in].
        """
        rows = stored.transpose(1, 2) if self.transposed else stored
        return rows if self.rows is None else rows[:, self.rows]


@dataclass(frozen=True)
class ExpertMatrix:
    """Matrix of one expert, with the attributes of a projection that metrics read.

    Attributes:
        matrices: the matrices of all experts.
        expert: index of the expert.
    """

    matrices: ExpertMatrices
    expert: int

    @property
    def weight(self) -> Tensor:
        """Matrix [out, in]."""
        return self.matrices.weight[self.expert]

    @property
    def bias(self) -> Tensor | None:
        """Bias [out]; None where there is none."""
        bias = self.matrices.bias
        return None if bias is None else bias[self.expert]

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return self.matrices.weight.shape[1]

    @property
    def in_features(self) -> int:
        """Number of inputs."""
        return self.matrices.weight.shape[2]


@dataclass(frozen=True)
class Expert:
    """A single fused expert, with the attributes of an FFN that metrics read.

    Attributes:
        inputs: gate and up, or up alone.
        output: down.
    """

    inputs: dict[str, ExpertMatrix]
    output: ExpertMatrix

    @property
    def width(self) -> int:
        """N, the number of neurons."""
        return self.output.in_features

    @property
    def projections(self) -> dict[str, ExpertMatrix]:
        """Matrices by the names gate, up and down."""
        return {**self.inputs, "down": self.output}

    def weights(self) -> tuple[Tensor, ...]:
        """Return gate [N, d], up [N, d] and down [d, N], or these without gate, in fp32, detached."""
        return tuple(matrix.weight.detach().float() for matrix in self.projections.values())


@dataclass(frozen=True)
class ExpertsFFN:
    """FFN of a block that is a mixture of experts: a router sends each token to a few FFNs of one width.

    Attributes:
        module: the mixture.
        experts: its child that holds the experts.
        router: its child with a row of weights per expert.
        n_experts: number of experts, E.
        top_k: experts that a token is sent to.
        groups: groups of experts, which lie one after the other; the router chooses groups first (DeepSeek).
        top_groups: groups that are chosen.
        shared: the FFN that sees every token beside the experts, and stays whole.
        fused: gate, up and down where all experts lie in 3-D parameters; else empty.
        each: the experts' FFNs where they lie in an nn.ModuleList; else empty.
        kind: tells a mixture from an :class:`~cfsp.architecture.ffn.FFN`.
    """

    module: nn.Module
    experts: nn.Module
    router: nn.Module
    n_experts: int
    top_k: int
    groups: int = 1
    top_groups: int = 1
    shared: FFN | None = None
    fused: dict[str, ExpertMatrices] = field(default_factory=dict)
    each: tuple[FFN, ...] = ()

    kind: Literal["experts"] = "experts"

    @property
    def width(self) -> int:
        """N, the number of neurons of every expert."""
        return self.expert(0).width

    @property
    def hidden(self) -> int:
        """Hidden size, d."""
        return self.expert(0).output.out_features

    @property
    def expert_neuron_parameters(self) -> int:
        """Parameters that go with one neuron of one expert, as :attr:`cfsp.architecture.ffn.FFN.neuron_parameters`."""
        first = self.expert(0)
        rows = sum(matrix.in_features + (matrix.bias is not None) for matrix in first.inputs.values())
        return rows + first.output.out_features

    @property
    def neuron_parameters(self) -> int:
        """Parameters that go with a neuron of every expert: all keep the same number."""
        return self.n_experts * self.expert_neuron_parameters

    @property
    def expert_parameters(self) -> int:
        """Parameters that go with one expert: its matrices and biases, its row of the router."""
        router = sum(p.numel() for module, name in self.per_expert() if (p := module._parameters.get(name)) is not None)
        return (self.parameters + router) // self.n_experts

    @property
    def parameters(self) -> int:
        """Parameters of the routed experts with their biases, without the router and the shared FFN."""
        return sum(getattr(module, name).numel() for module, name in self.stored())

    @property
    def least_experts(self) -> int:
        """Fewest experts that may stay.

        With fewer there would be nothing to choose ``top_k`` from, or less than the two experts by which a router
        judges a group.
        """
        return self.groups * max(2, math.ceil(self.top_k / self.top_groups))

    @property
    def device(self) -> torch.device:
        """Device of the experts' matrices."""
        return self.expert(0).output.weight.device

    def expert(self, index: int) -> Expert | FFN:
        """Return one expert with the attributes of an FFN that metrics read."""
        if self.each:
            return self.each[index]
        *inputs, output = ((name, ExpertMatrix(matrices, index)) for name, matrices in self.fused.items())
        return Expert(dict(inputs), output[1])

    def stored(self) -> list[tuple[nn.Module, str]]:
        """Return (module, attribute) of every parameter of the routed experts."""
        modules = [self.experts] if self.fused else [m for ffn in self.each for m in ffn.module.modules()]
        return [(module, name) for module in modules for name, p in module._parameters.items() if p is not None]

    def per_expert(self) -> Iterator[tuple[nn.Module, str]]:
        """Yield (module, attribute) of the parameters and buffers outside of the experts that have a row per expert."""
        for module in (self.module, *self.router.modules()):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.dim() and tensor.shape[0] == self.n_experts:
                    yield module, name

    def run(self, expert: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """Run one expert.

        Args:
            expert: its index.
            states: [n, d].

        Returns:
            The inputs of its down matrix [n, N], and its output [n, d] before the routing weight.
        """
        if self.each:
            intermediates: list[Tensor] = []
            ffn = self.each[expert]
            handle = ffn.output.register_forward_pre_hook(lambda _, args: intermediates.append(args[0]))
            try:
                output = ffn.module(states)
            finally:
                handle.remove()
            return intermediates[0], output
        projected = self._linear(states, "gate" if "gate" in self.fused else "up", expert)
        apply_gate = getattr(self.experts, "_apply_gate", None)
        if "gate" not in self.fused:
            activation = self.experts.act_fn(projected)  # type: ignore[operator]
        elif apply_gate is not None:
            activation = apply_gate(projected)
        else:
            gate, up = projected.chunk(2, -1)
            activation = self.experts.act_fn(gate) * up  # type: ignore[operator]
        return activation, self._linear(activation, "down", expert)

    def _linear(self, x: Tensor, kind: str, expert: int) -> Tensor:
        """Apply the whole parameter that holds the matrix ``kind``, of one expert."""
        matrices = self.fused[kind]
        stored = matrices.parameter[expert]
        bias = getattr(matrices.owner, f"{matrices.name}_bias", None)
        weight = stored.T if matrices.transposed else stored
        return nn.functional.linear(x, weight, None if bias is None else bias[expert])


def update_counts(module: nn.Module, before: int, after: int, *, width: bool = False) -> None:
    """Change the numbers of experts (with ``width``: their widths) that a module keeps from ``before`` to ``after``."""
    for name in _WIDTHS if width else _COUNTS:
        if vars(module).get(name) == before:
            setattr(module, name, after)
