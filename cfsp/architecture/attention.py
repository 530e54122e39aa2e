"""The attention of a block and its KV groups, recognised by the matrices that are there and their attribute names."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from cfsp.architecture.projection import Projection, is_matrix, projections_named, stored_parameters

_QKV_NAMES = ("q_proj", "k_proj", "v_proj")
#: Name of one matrix for q, k and v -> layout of its rows. concatenated: all of q, all of k, all of v. grouped: one KV
#: group after the other, in each the query heads, then k, then v; with one query head per group that is head by head.
FUSED_NAMES: dict[str, Literal["concatenated", "grouped"]] = {
    "qkv_proj": "concatenated",
    "c_attn": "concatenated",
    "query_key_value": "grouped",
}
_OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "c_proj")
#: Names under which transformers' attentions repeat their numbers of heads and of KV heads.
_HEADS = ("num_heads", "num_attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEAD_DIMS = ("head_dim", "head_size")


@dataclass(frozen=True)
class AttentionView:
    """Attention of a block. The numbers of heads are derived from the real shapes.

    The removable unit is a whole KV group: a key and a value head with the ``n_heads // n_kv_heads`` query heads
    that read them. Its channels, columns of o_proj, lie together in the order of the groups.

    Attributes:
        module: the attention's module.
        n_heads: query heads.
        n_kv_heads: key and value heads.
        head_dim: channels of a head.
        q_proj: queries; like k_proj and v_proj, a matrix of its own or rows of a fused one.
        k_proj: keys.
        v_proj: values.
        o_proj: output projection.
        fixed: the reason why no group can be removed; None where groups can be removed.
    """

    module: nn.Module
    n_heads: int
    n_kv_heads: int
    head_dim: int
    q_proj: Projection
    k_proj: Projection
    v_proj: Projection
    o_proj: Projection
    fixed: str | None = None

    @property
    def output(self) -> Projection:
        """The projection whose input channels the heads are: o_proj."""
        return self.o_proj

    @property
    def projections(self) -> dict[str, Projection]:
        """Projections by the names q, k, v and o."""
        return {"q": self.q_proj, "k": self.k_proj, "v": self.v_proj, "o": self.o_proj}

    @property
    def is_fused(self) -> bool:
        """True where q, k and v are rows of one matrix."""
        return self.q_proj.rows is not None

    @property
    def width(self) -> int:
        """Channels of all query heads: n_heads * head_dim."""
        return self.n_heads * self.head_dim

    @property
    def queries_per_group(self) -> int:
        """Query heads that read one key and value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def group_parameters(self) -> int:
        """Parameters that go with one KV group: its rows of q, k and v with their biases, its columns of o."""
        rows = {self.q_proj: self.queries_per_group, self.k_proj: 1, self.v_proj: 1}
        inputs = sum(n * (part.in_features + (part.module.bias is not None)) for part, n in rows.items())
        return self.head_dim * (inputs + self.queries_per_group * self.o_proj.out_features)

    @property
    def parameters(self) -> int:
        """Parameters of its matrices and their biases."""
        return stored_parameters(list(self.projections.values()))

    def spread(self, rows: Tensor) -> Tensor:
        """Repeat values per row of k or v for the query heads that read them.

        Args:
            rows: [n_kv_heads * head_dim, ...].

        Returns:
            [n_heads * head_dim, ...].
        """
        heads = rows.unflatten(0, (self.n_kv_heads, self.head_dim))
        return heads.repeat_interleave(self.queries_per_group, 0).flatten(0, 1)

    def weights(self) -> tuple[Tensor, ...]:
        """Return q, k, v [N, d] and o [d, N] in fp32, detached; N = n_heads * head_dim.

        k and v are repeated for the query heads that read them.
        """
        q, k, v, o = (part.weight.detach().float() for part in self.projections.values())
        return q, self.spread(k), self.spread(v), o


def attention_in(model: Any, block: nn.Module) -> AttentionView | None:
    """Return the attention of a block of ``model``; None where its projections are not recognised."""
    for module in block.modules():
        outputs = [name for name in _OUTPUT_NAMES if is_matrix(getattr(module, name, None))]
        fused = [name for name in FUSED_NAMES if is_matrix(getattr(module, name, None))]
        separate = projections_named(module, _QKV_NAMES)
        if not outputs or (separate is None and not fused):
            continue
        output = Projection(module, outputs[0])
        head_dim = _head_dim(model, module)
        fixed = _fixed(model, block, module, head_dim)
        if not head_dim or output.in_features % head_dim:
            return None
        if separate is not None:
            q, k, v = separate
            return _fitting(module, head_dim, q, k, v, output, fixed)
        layout = FUSED_NAMES[fused[0]]
        if getattr(module, "multi_query", None) is False:  # GPT-BigCode without multi-query attention
            layout = "grouped"
        parts = _parts(Projection(module, fused[0]), output.in_features // head_dim, head_dim, layout)
        return None if parts is None else _fitting(module, head_dim, *parts, output, fixed)
    return None


def _head_dim(model: Any, module: nn.Module) -> int | None:
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    for holder, names in ((module, _HEAD_DIMS), (config, _HEAD_DIMS[:1])):
        for name in names:
            if isinstance(size := getattr(holder, name, None), int) and size:
                return size
    return None


def _fixed(model: Any, block: nn.Module, module: nn.Module, head_dim: int | None) -> str | None:
    """Return what ties the heads to each other or to their numbers, so that none can be removed; else None."""
    matrices = {id(child) for child in module.modules() if is_matrix(child)}
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            return f"its {name} holds a module for each head"
        for own, parameter in child._parameters.items():
            if parameter is None or id(child) in matrices:
                continue
            # A parameter of the attention itself belongs to the heads whatever its size: GPT-OSS has 64 sinks and
            # heads of 64 channels.
            if child is module or parameter.numel() != head_dim:
                full_name = f"{name}.{own}" if name else own
                return f"its {full_name} {tuple(parameter.shape)} is of several heads together"
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    if getattr(config, "alibi", False) or "alibi" in inspect.signature(type(block).forward).parameters:
        rotary = not getattr(config, "alibi", True)
        return None if rotary else "ALiBi gives each head a slope by its number"
    return None


def _parts(
    fused: Projection, n_heads: int, head_dim: int, layout: Literal["concatenated", "grouped"]
) -> tuple[Projection, Projection, Projection] | None:
    """Split a fused matrix with ``n_heads`` query heads into q, k and v; None where no whole KV heads fit its size."""
    rest, odd = divmod(fused.out_features - n_heads * head_dim, 2 * head_dim)
    if odd or rest <= 0 or n_heads % rest:
        return None
    queries = n_heads // rest * head_dim  # rows of the query heads of a KV group
    if layout == "concatenated":
        ends = (n_heads * head_dim, (n_heads + rest) * head_dim, (n_heads + 2 * rest) * head_dim)
        rows: list[tuple[range, ...]] = [(range(ends[0]),), (range(ends[0], ends[1]),), (range(ends[1], ends[2]),)]
    else:
        starts = [group * (queries + 2 * head_dim) for group in range(rest)]
        rows = [
            tuple(range(at, at + queries) for at in starts),
            tuple(range(at + queries, at + queries + head_dim) for at in starts),
            tuple(range(at + queries + head_dim, at + queries + 2 * head_dim) for at in starts),
        ]
    q, k, v = (Projection(fused.owner, fused.name, own) for own in rows)
    return q, k, v


def _fitting(
    module: nn.Module, head_dim: int, q: Projection, k: Projection, v: Projection, o: Projection, fixed: str | None
) -> AttentionView | None:
    if q.out_features % head_dim or k.out_features % head_dim:
        return None
    n_heads, n_kv_heads = q.out_features // head_dim, k.out_features // head_dim
    # Value heads of another size, as in multi-head latent attention, are another structure.
    if n_heads % n_kv_heads or v.out_features != k.out_features or o.in_features != q.out_features:
        return None
    return AttentionView(module, n_heads, n_kv_heads, head_dim, q, k, v, o, fixed)


class LayerConfig:
    """Configuration for one attention: its own numbers of heads, everything else from the model's configuration.

    The same class ships with the models that need it (:mod:`cfsp.pruned_model.shapes_template`).
    """

    def __init__(self, config: Any, heads: dict[str, int]) -> None:
        self.__dict__["config"], self.__dict__["heads"] = config, heads

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        heads = self.__dict__["heads"]
        return heads[name] if name in heads else getattr(self.__dict__["config"], name)


def is_layer_config(value: Any) -> bool:
    """Return whether a configuration is a :class:`LayerConfig`, from here or from a model folder's code."""
    return type(value).__name__ == LayerConfig.__name__ and {"config", "heads"} <= vars(value).keys()


def count_heads(attention: AttentionView, heads: int, kv_heads: int) -> None:
    """Update the numbers of heads that the module of an attention keeps.

    Args:
        attention: the view from before it lost groups.
        heads: query heads now.
        kv_heads: key and value heads now.
    """
    module = attention.module
    counts = dict.fromkeys(_HEADS, heads) | dict.fromkeys(_KV_HEADS, kv_heads)
    counts["split_size"] = heads * attention.head_dim  # GPT-2: the query channels
    for name, n in counts.items():
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, n)
    if attention.is_fused and hasattr(module, "config"):  # Phi-3 splits its fused matrix by the configuration's numbers
        config = vars(module.config)["config"] if is_layer_config(module.config) else module.config
        own = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
        module.config = LayerConfig(config, own)  # type: ignore[assignment]
