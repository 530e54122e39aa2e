"""The activation function of an FFN: found by the usual names, believed when it gives what the FFN gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from cfsp.architecture.ffn import FFN

#: Of the FFN's module, and of a configuration.
_ATTRIBUTES = ("act_fn", "activation_fn", "act", "activation", "gelu_impl")
_KEYS = ("hidden_act", "hidden_activation", "activation_function", "ffn_hidden_act")
#: What the seen and the computed input of down_proj may differ by at a token, relative to it; bf16 differs by 0.004.
_TOLERANCE, _LOW_PRECISION_TOLERANCE = 1e-3, 1e-2
#: Of the tokens. Each is compared alone: one with huge values would hide what the others are.
_ALIKE = 0.9

Activation = Callable[[Tensor], Tensor]


def activation_of(model: Any, ffn: FFN, x: Tensor, hidden: Tensor) -> Activation | None:
    """The function a of ``a(gate(x)) * up(x)``, or ``a(up(x))``; None where the FFN is no such function.

    Args:
        x: what entered the FFN, [n, d]. hidden: what entered its output projection then, [n, N].
    """
    before = []
    for projection in ffn.inputs.values():
        value = x.float() @ projection.weight.detach().float().T
        before.append(value if projection.bias is None else value + projection.bias.detach().float())
    tolerance = _TOLERANCE if x.dtype.itemsize >= 4 else _LOW_PRECISION_TOLERANCE
    for candidate in _candidates(model, ffn):
        try:
            value = candidate(before[0])
        except (TypeError, ValueError, RuntimeError):  # something else by that name
            continue
        if not isinstance(value, Tensor) or value.shape != before[0].shape:
            continue
        found = value if ffn.kind == "plain" else value * before[1]
        alike = (found - hidden.float()).norm(dim=-1) <= tolerance * hidden.float().norm(dim=-1)
        if float(alike.float().mean()) >= _ALIKE:
            return candidate
    return None


def _candidates(model: Any, ffn: FFN) -> Iterator[Activation]:
    from transformers.activations import ACT2FN

    for name in _ATTRIBUTES:
        found = getattr(ffn.module, name, None)
        if callable(found) and not (isinstance(found, nn.Module) and any(True for _ in found.parameters())):
            yield found
    config = model.config.get_text_config()
    given = [getattr(config, key, None) for key in _KEYS]
    names = [name for name in given if isinstance(name, str)]
    yield from (ACT2FN[name] for name in dict.fromkeys([*names, "silu", "gelu", "relu"]) if name in ACT2FN)
