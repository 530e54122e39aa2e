"""Python API: plan the pruning of a model that is already in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn

from cfsp.architecture.views import DecoderView, resolve
from cfsp.calibration.batching import batch_size as chosen_batch_size
from cfsp.calibration.calibration_set import from_ids
from cfsp.config.budget import Scope
from cfsp.config.compose import compose
from cfsp.config.parse import parse
from cfsp.config.run_config import RunConfig
from cfsp.data.limits import Limits
from cfsp.errors import ConfigError, UnsupportedModelError
from cfsp.model.driver import BlockDriver
from cfsp.model.weight_sample import weight_sample
from cfsp.plan.pruning_plan import PruningPlan
from cfsp.pruned_model.adopt import check_adoptable
from cfsp.pruner.base import removes_experts, removes_heads
from cfsp.pruner.context import plan_context
from cfsp.pruner.probe import probe

#: Bytes of one checksum of :func:`memory_fingerprint`.
_CHECKED_BYTES = 16384


def prune(
    model: nn.Module,
    input_ids: Tensor,
    pruner: str = "cfsp",
    ratio: float = 0.5,
    scope: Scope | None = None,
    round_to: int = 32,
    *,
    batch_size: int | None = None,
    overrides: Sequence[str] = (),
) -> PruningPlan:
    """Plan the pruning of a model; the model is not changed.

    Args:
        model: causal language model of transformers, with all weights in memory.
        input_ids: calibration windows [n, T] (a tensor, array or nested list), which run through the decoder once.
        pruner: option of ``conf/pruner``.
        ratio: fraction of the parameters of ``scope`` to remove, 0 < ratio < 1.
        scope: parameters that the ratio refers to: ffn, decoder or model; None: the pruner's own scope (ffn if it
            removes only FFN neurons, otherwise decoder).
        round_to: kept widths are multiples of it, in neurons.
        batch_size: sequences processed at a time; None: chosen for device and memory.
        overrides: further configuration in the notation of the command line, e.g. ``["allocator.temperature=2"]``.

    Returns:
        The plan, which :func:`cfsp.apply` carries out.

    Raises:
        ConfigError: a setting is wrong.
        DataError: the ids do not fit the model.
        UnsupportedModelError: cfsp cannot prune a model of this structure.
        BudgetError: the ratio cannot be met.

    Example:
        >>> model, tokenizer = cfsp.load("path/to/model")
        >>> input_ids = tokenizer(text, return_tensors="pt").input_ids[:, :8192].reshape(-1, 256)
        >>> plan = cfsp.prune(model, input_ids, pruner="cfsp", ratio=0.5)
        >>> cfsp.apply(model, plan).save_pretrained("pruned")
    """
    settings = [f"pruner={pruner}", f"sparsity.ratio={ratio}", f"sparsity.round_to={round_to}"]
    chosen_scope = [] if scope is None else [f"sparsity.scope={scope}"]
    config = _configuration((*settings, *chosen_scope, *overrides))
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: 1 or more sequences at a time are needed")
    view = _view(model)
    calibration = from_ids(torch.as_tensor(input_ids), _limits(model))
    pruner_instance = config.pruner.instance
    pruner_instance.check(view, config.budget)
    with _evaluation_mode(model):
        probe(view, heads=removes_heads(pruner_instance), experts=removes_experts(pruner_instance))
        context, _ = plan_context(
            config,
            BlockDriver(view, chosen_batch_size(batch_size or "auto", view, calibration.input_ids.shape[1])),
            calibration,
            base_model=str(getattr(model, "name_or_path", "")) or type(model).__name__,
            base_fingerprint=_fingerprint(view),
        )
        return pruner_instance.plan(context)


def _view(model: nn.Module) -> DecoderView:
    """Return the view of a model that can be pruned and has all weights in memory.

    Raises:
        UnsupportedModelError: the model is of another kind.
    """
    check_adoptable(model)  # type: ignore[arg-type]
    view = resolve(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"{type(model).__name__}: some of its weights are not in memory (meta device, or offloaded by accelerate); "
            "load it with cfsp.load, or prune the folder with the command line and model.streaming=on"
        )
    return view


def _limits(model: nn.Module) -> Limits:
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    return Limits(vocabulary, getattr(model.config, "max_position_embeddings", None))


@lru_cache(maxsize=64)
def _configuration(overrides: tuple[str, ...]) -> RunConfig:
    """Return the checked configuration.

    The latest ones are cached, because composing takes about as long as calibrating a small model.
    """
    return parse(compose(list(overrides)))


def _fingerprint(view: DecoderView) -> str:
    """Return the folder's fingerprint for an unedited model of ``cfsp.load``; otherwise a fingerprint of the memory."""
    loaded = getattr(view.model, "_cfsp_loaded", None)
    if loaded is not None and loaded[1] == weight_sample(view):
        return loaded[0]
    return memory_fingerprint(view.model)


def memory_fingerprint(model: nn.Module) -> str:
    """Return a fingerprint of all parameters and buffers, for models that ``cfsp.load`` did not load.

    It is a sha256 over names, dtypes, shapes and a checksum (a sum of 64-bit words) of each 16 KiB. Checksums run at
    the memory's speed; hashing every byte would take a good part of a calibration pass.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().reshape(-1)
        if flat.numel():
            data = flat.view(torch.uint8)
            in_rows = len(data) - len(data) % _CHECKED_BYTES
            # A slice that does not begin at a multiple of 8 bytes cannot be viewed as 64-bit words.
            aligned = data if data.storage_offset() % 8 == 0 else data.clone()
            sums = aligned[:in_rows].view(torch.int64).view(-1, _CHECKED_BYTES // 8).sum(1)
            for part in (sums.cpu().view(torch.uint8), data[in_rows:].cpu()):
                digest.update(part.numpy())
    return f"memory:{digest.hexdigest()}"


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode inside the context; restore the mode of each module afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
