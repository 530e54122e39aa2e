"""Computation of a model's reference: log-probabilities and greedy tokens of fixed windows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cfsp.checkpoint.reference import LENGTH, SEED, WINDOWS, Reference
from cfsp.errors import CfspError, RunError
from cfsp.system.reading import read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from cfsp.architecture.views import BlockView


#: Number of greedy tokens. A streamed model gives only the first, since each further one would read it again.
GREEDY = 8


#: Elements of a matrix that are converted to float32 at a time: 256 MiB.
_PIECE = 1 << 26


def reference_of(model: Any, *, dtype: torch.dtype | None = None, tokenizer: Path | None = None) -> Reference:
    """Return the reference of ``model``, computed in float32 with the weights as a folder of ``dtype`` holds them.

    The model is left as it is. The reference is in float32 whatever dtype the run computes in: bfloat16 rounds away as
    much as a slightly different RoPE or a norm that is off by 5 % changes, and the two could not be told apart.

    For a model in memory this is a forward pass over about a hundred tokens and ``GREEDY`` more. A streamed model is
    read once more, block by block; :class:`StreamedReference` needs no read of its own.

    Args:
        model: the model, in memory or streamed.
        dtype: dtype of the folder's weights; None: that of the model.
        tokenizer: folder of the tokenizer files, whose special tokens are left out of the windows.

    Raises:
        RunError: the model gives values that are not finite.
    """
    import torch

    # Start-up time: loads torch.
    from cfsp.architecture.weights import weights_of

    ids = torch.from_numpy(token_windows(model, tokenizer))
    with torch.no_grad(), _evaluating(model), _as_stored(model, dtype):
        steps = weights_of(model).greedy(ids, GREEDY, lambda logits: _likeliest(logits)[0], "reference")
        return _reference(model, dtype, ids, _figures(steps, ids))


class StreamedReference:
    """Reference of a streamed model, computed from blocks that are read for another purpose: call it with each of them.

    Args:
        model: the streamed model.
        dtype: dtype of the folder's weights; None: that of the model.
        tokenizer: folder of the tokenizer files, whose special tokens are left out of the windows.
    """

    def __init__(self, model: Any, *, dtype: torch.dtype | None = None, tokenizer: Path | None = None) -> None:
        import torch

        # Start-up time: loads torch.
        from cfsp.architecture.views import resolve
        from cfsp.model.driver import BlockDriver

        self._model, self._dtype = model, dtype
        self._ids = torch.from_numpy(token_windows(model, tokenizer))
        self._driver = BlockDriver(resolve(model), len(self._ids))
        with _as_stored(model, dtype):
            self._entry = self._driver.entry(self._ids)
        self._hidden = self._entry.hidden[0]
        self._seen = 0

    def __call__(self, block: BlockView) -> None:
        """Run ``block`` over the windows; blocks have to come in order."""
        import torch

        # Start-up time: loads torch.
        from cfsp.model.driver import run_block

        if block.index == self._seen:
            with torch.no_grad(), _as_stored(self._model, self._dtype):
                self._hidden = run_block(block, self._hidden, self._entry.kwargs[block.index][0])
            self._seen += 1

    def result(self) -> Reference | None:
        """Return the reference; None where blocks were left out, e.g. since a killed process had written them.

        Raises:
            RunError: as :func:`reference_of`.
        """
        import torch

        if self._seen < len(self._driver.view.blocks):
            return None
        with torch.no_grad(), _as_stored(self._model, self._dtype):
            with self._driver.view.weights.resident_rest():
                logits = self._driver.logits(self._ids, self._hidden)
            return _reference(self._model, self._dtype, self._ids, _figures([logits], self._ids))


def _reference(
    model: Any, dtype: torch.dtype | None, ids: Tensor, figures: tuple[Tensor, Tensor, Tensor, Tensor]
) -> Reference:
    import torch

    logprobs, top, greedy, margins = figures
    if not (torch.isfinite(logprobs).all() and torch.isfinite(margins).all()):
        raise RunError(
            f"{type(model).__name__}: its logits on {WINDOWS} windows of random tokens are not finite, so nobody could "
            "use what is saved; try model.dtype=float32"
        )
    computed = "float64" if model.dtype == torch.float64 else "float32"
    stored = str(dtype or model.dtype).removeprefix("torch.")
    return Reference(ids.numpy(), logprobs.numpy(), top.numpy(), greedy.numpy(), margins.numpy(), computed, stored)


def token_windows(model: Any, tokenizer: Path | None = None) -> np.ndarray:
    """Return random token ids [WINDOWS, T], which are the same whenever vocabulary and special tokens are.

    T is LENGTH where the model's positions allow it. Random ids need no text, and no text would be in the vocabulary of
    every tokenizer.
    """
    config = model.config.get_text_config()
    size = int(config.vocab_size)
    special = {
        value
        for settings in (config, model.generation_config)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        for value in _to_list(getattr(settings, name, None))
    }
    known, reserved = _tokenizer_ids(tokenizer)
    usual = [at for at in range(size) if at not in special and at not in reserved and (not known or at in known)]
    candidates = np.array(usual or range(size))
    positions = getattr(config, "max_position_embeddings", None) or LENGTH + GREEDY
    length = max(2, min(LENGTH, positions - GREEDY))
    return candidates[np.random.default_rng(SEED).integers(len(candidates), size=(WINDOWS, length))].astype(np.int64)


def _tokenizer_ids(folder: Path | None) -> tuple[set[int], set[int]]:
    """Return the ids of all tokens in tokenizer.json, and those of its added tokens; both empty without the file."""
    try:
        content = read_json(folder / "tokenizer.json", "tokenizer.json") if folder else {}
        vocabulary = content.get("model", {}).get("vocab", {})
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        return set(ids), {token["id"] for token in content.get("added_tokens", ())}
    except (CfspError, KeyError, TypeError, AttributeError):
        return set(), set()


def _to_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _figures(steps: Iterable[Tensor], ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (logprobs, top, greedy, margins) of :class:`Reference`, on the CPU.

    Args:
        steps: logits of the windows, then those after each greedy token; see :meth:`Weights.greedy`.
        ids: the windows, [n, T].
    """
    import torch

    scored: tuple[Tensor, Tensor] | None = None
    tokens, margins = [], []
    for logits in steps:
        if scored is None:
            scored = _scored(logits, ids.to(logits.device))
        token, margin = _likeliest(logits)
        tokens.append(token)
        margins.append(margin)
    assert scored is not None
    return *scored, torch.stack(tokens, dim=1), torch.stack(margins, dim=1)


def _scored(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities [n, T-1] of the next tokens and the likeliest tokens [n, T]; log-softmax in fp32."""
    import torch

    rows = []
    for sequence, window in zip(logits, ids, strict=True):  # by window, so that the logits of only one are in fp32
        rows.append(sequence[:-1].float().log_softmax(-1).gather(-1, window[1:, None])[:, 0])
    return torch.stack(rows).cpu(), logits.argmax(-1).cpu()


def _likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeliest token [n] after the last position, and its margin over the second likeliest one."""
    values, tokens = logits[:, -1].float().topk(2, dim=-1)
    return tokens[:, 0].cpu(), (values[:, 0] - values[:, 1]).cpu()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was in training:
            module.training = was


def _stored_value(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor rounded to ``dtype`` where that is coarser, in float32 (float64 where it had that)."""
    import torch

    if not tensor.is_floating_point():
        return tensor
    bits = torch.finfo(tensor.dtype).bits
    computed = tensor.dtype if bits > 32 else torch.float32
    if dtype is not None and torch.finfo(dtype).bits < bits:
        tensor = tensor.to(dtype)
    return tensor.to(computed)


def _linear_by_rows(module: nn.Linear, exact: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """Return the output of a linear whose weight and bias are converted by ``exact``, some rows at a time."""
    import torch
    from torch.nn.functional import linear

    weight, bias = module.weight, module.bias
    rows = max(1, _PIECE // max(1, weight.shape[1]))
    parts = [
        linear(states, exact(piece), None if bias is None else exact(bias[at * rows : (at + 1) * rows]))
        for at, piece in enumerate(weight.split(rows))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@contextmanager
def _as_stored(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Compute in float32 with parameters as a folder of ``dtype`` holds them.

    Parameters are converted while their module runs, and large matrices some rows at a time, so that there is never a
    second model (or head) in memory.
    """
    import torch

    # Start-up time: loads torch.
    from cfsp.model.block_calls import replace_forward

    exact = partial(_stored_value, dtype=dtype)
    before: dict[nn.Module, dict[str, nn.Parameter | None]] = {}

    def enter(module: nn.Module, args: Any) -> None:
        before[module] = dict(module._parameters)
        for name, parameter in before[module].items():
            if parameter is not None:
                value = exact(parameter.detach())
                if value.data_ptr() != parameter.data_ptr():
                    module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(before.pop(module, {}))

    def looked_up(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return exact(output)

    hooks = []
    replaced = ExitStack()
    for module in model.modules():
        if type(module) is torch.nn.Embedding:  # converts the rows that were looked up, not the vocabulary
            hooks.append(module.register_forward_hook(looked_up))
        elif type(module) is torch.nn.Linear:
            replaced.enter_context(replace_forward(module, partial(_linear_by_rows, module, exact)))
        elif module._parameters:
            hooks.append(module.register_forward_pre_hook(enter))
            # First, because the hooks of a streamed model remove the parameters that they put there.
            hooks.append(module.register_forward_hook(leave, always_call=True, prepend=True))
    try:
        with replaced:
            yield
    finally:
        for hook in hooks:
            hook.remove()
