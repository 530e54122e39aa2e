"""Activation function of an FFN: candidates have the usual names, and the one that gives the FFN's values is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from cfsp.architecture.ffn import FFN

#: Attributes of the FFN's module, and keys of a configuration, that name the function.
_ATTRIBUTES = ("act_fn", "activation_fn", "act", "activation", "gelu_impl")
_KEYS = ("hidden_act", "hidden_activation", "activation_function", "ffn_hidden_act")
#: Largest relative difference, at a token, of the seen and the computed input of down_proj; bf16 differs by 0.004.
_TOLERANCE, _LOW_PRECISION_TOLERANCE = 1e-3, 1e-2
#: Share of the tokens that must agree. Each is compared alone: a token with huge values would hide the others.
_ALIKE = 0.9

Activation = Callable[[Tensor], Tensor]


def activation_of(model: Any, ffn: FFN, x: Tensor, hidden: Tensor) -> Activation | None:
    """Identify the function a of ``a(gate(x)) * up(x)``, or of ``a(up(x))``, from what an FFN computed.

    Args:
        model: the model, whose configuration may name the function.
        ffn: the FFN.
        x: inputs of the FFN, [n, d].
        hidden: inputs of its output projection for these ``x``, [n, N].

    Returns:
        The function; None where no known one gives these values.
    """
    projected = []
    for projection in ffn.inputs.values():
        value = x.float() @ projection.weight.detach().float().T
        projected.append(value if projection.bias is None else value + projection.bias.detach().float())
    tolerance = _TOLERANCE if x.dtype.itemsize >= 4 else _LOW_PRECISION_TOLERANCE
    for candidate in _candidates(model, ffn):
        try:
            value = candidate(projected[0])
        except (TypeError, ValueError, RuntimeError):  # something else by that name
            continue
        if not isinstance(value, Tensor) or value.shape != projected[0].shape:
            continue
        computed = value if ffn.kind == "plain" else value * projected[1]
        alike = (computed - hidden.float()).norm(dim=-1) <= tolerance * hidden.float().norm(dim=-1)
        if float(alike.float().mean()) >= _ALIKE:
            return candidate
    return None


def _candidates(model: Any, ffn: FFN) -> Iterator[Activation]:
    """Yield the functions that the module or the configuration names, then the usual ones."""
    from transformers.activations import ACT2FN

    for name in _ATTRIBUTES:
        function = getattr(ffn.module, name, None)
        if callable(function) and not (isinstance(function, nn.Module) and any(True for _ in function.parameters())):
            yield function
    config = model.config.get_text_config()
    configured = [getattr(config, key, None) for key in _KEYS]
    names = [name for name in configured if isinstance(name, str)]
    yield from (ACT2FN[name] for name in dict.fromkeys([*names, "silu", "gelu", "relu"]) if name in ACT2FN)
