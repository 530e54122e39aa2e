"""Cost: parameters, MACs, checkpoint bytes, speed of prefill and decoding, and peak memory.

Speeds are measured in alternation on shapes that stay the same, and reported as medians with their spread.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from cfsp.config.components import component
from cfsp.config.contracts import Evaluator
from cfsp.config.deciding import deciding_settings
from cfsp.evaluation.measurement import Measurement
from cfsp.system.progress import progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from cfsp.data.limits import Limits
    from cfsp.evaluation.base import Side


log = logging.getLogger(__name__)


@component
class Cost(Evaluator):
    """Cost at batch size 1: prefill of a prompt, then greedy decoding (:func:`time_generation`).

    After one round for warming up, each round measures every side once.

    Attributes:
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens that are generated after it.
        repeats: number of measured rounds.
    """

    prompt_tokens: Annotated[int, Field(ge=2)] = 256
    new_tokens: Annotated[int, Field(ge=1)] = 32
    repeats: Annotated[int, Field(ge=1)] = 5

    side_by_side: ClassVar[bool] = True
    key: ClassVar[str] = "evaluation.cost"

    def check(self, tokenizer: Any, limits: Limits) -> dict[str, Any]:
        """Check that prompt and new tokens fit into the model; see :meth:`cfsp.config.contracts.Evaluator.check`."""
        limits.check_length(f"{self.key}.prompt_tokens + {self.key}.new_tokens", self.prompt_tokens + self.new_tokens)
        return deciding_settings(self)

    def measure(self, model: nn.Module, tokenizer: Any) -> list[Measurement]:
        """Measure one model; see :meth:`measure_sides`."""
        # Start-up time: loads torch.
        from cfsp.evaluation.base import Side

        side = Side("model", contextlib.nullcontext, next(model.parameters()).dtype)
        return self.measure_sides(model, [side])["model"]

    def measure_sides(self, model: nn.Module, sides: list[Side]) -> dict[str, list[Measurement]]:
        """Measure several sides in alternation; for a streamed model only sizes, not speed and memory.

        Returns:
            Figures by the side's name.
        """
        import torch

        # Start-up time: loads torch.
        from cfsp.architecture.weights import weights_of

        measurements = {}
        if weights_of(model).is_streamed:
            log.info("cost: the weights are read from disk for each token, so speed and memory are not measured")
            for side in sides:
                with side.active():
                    measurements[side.name] = measure_size(model, side.storage_dtype)
            return measurements

        vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(vocabulary, (1, self.prompt_tokens), generator=generator).to(device)
        times = time_sides(model, sides, prompt, self.new_tokens, self.repeats)
        for side in sides:
            with side.active():
                measurements[side.name] = [
                    *measure_size(model, side.storage_dtype),
                    *self._speeds(times[side.name], device),
                    self._memory(model, prompt),
                ]
        return measurements

    def _memory(self, model: nn.Module, prompt: Tensor) -> Measurement:
        """Measure the bytes of the weights plus the peak of all other tensors: activations, logits and KV cache."""
        tensors = [*model.parameters(), *model.buffers()]
        weights = sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())
        other_bytes = measure_peak_besides_weights(
            tensors, prompt, lambda: time_generation(model, prompt, self.new_tokens)
        )
        detail = {"batch_size": 1, "device": prompt.device.type, "weights": weights}
        length = self.prompt_tokens + self.new_tokens
        return Measurement(
            "cost", "memory", "peak_bytes", weights + other_bytes, "bytes", seq_len=length, detail=detail
        )

    def _speeds(self, times: list[Timing], device: torch.device) -> list[Measurement]:
        import torch

        detail = {
            "statistic": "median",
            "batch_size": 1,
            "device": device.type,
            "threads": torch.get_num_threads(),
        }
        figures = []
        for task, tokens, seconds in (
            ("prefill", self.prompt_tokens, [timing.prefill for timing in times]),
            ("decode", self.new_tokens, [timing.decode for timing in times]),
        ):
            spread = {"min": tokens / max(seconds), "max": tokens / min(seconds)}
            cache = {"cache": times[0].cache} if task == "decode" else {}
            figures.append(
                Measurement(
                    "cost", task, "tokens_per_second", tokens / median(seconds), "tokens/s",
                    n=len(seconds), seq_len=tokens, detail={**detail, **cache, "spread": spread, "seconds": seconds},
                )
            )  # fmt: skip
        return figures


@dataclass(frozen=True)
class Timing:
    """Times of one generation.

    Attributes:
        prefill: seconds of the prefill.
        decode: seconds of all decoding steps after it.
        cache: KV cache of the decoding steps, "static" or "dynamic".
    """

    prefill: float
    decode: float
    cache: str


def time_sides(
    model: nn.Module, sides: Sequence[Side], prompt: Tensor, new_tokens: int, repeats: int
) -> dict[str, list[Timing]]:
    """Time the generation of every side once in each round; the first round only warms up.

    Args:
        model: the model in whose place the sides put their weights.
        sides: sides to measure.
        prompt: token ids, [1, T].
        new_tokens: tokens to generate.
        repeats: number of measured rounds.

    Returns:
        ``repeats`` timings by the side's name.
    """
    times: dict[str, list[Timing]] = {side.name: [] for side in sides}
    for repeat in progress(range(repeats + 1), "time prefill and decode", unit="round"):
        for side in sides:
            with side.active():
                timing = time_generation(model, prompt, new_tokens)
            if repeat:
                times[side.name].append(timing)
    return times


def time_generation(model: nn.Module, prompt: Tensor, new_tokens: int) -> Timing:
    """Time the prefill of ``prompt`` [1, T] and ``new_tokens`` greedy steps after it.

    All steps have the same shapes. Their KV cache (transformers' StaticCache) has T + ``new_tokens`` places from the
    start, and each step reads all of them, with the empty ones masked. On a CPU this takes as long as a cache that
    grows to this length, give or take a few percent. The prefill has one shape anyway and writes T places; copying them
    to the static cache is not timed. The cache grows instead where a model has no static cache that can be filled in
    this way (a window shorter than the prompt, or a state that is not a cache of keys), and ``Timing.cache`` then says
    "dynamic".
    """
    import torch

    synchronise = partial(torch.cuda.synchronize, prompt.device) if prompt.is_cuda else (lambda: None)
    with torch.no_grad():
        synchronise()
        start = time.perf_counter()
        output = model(prompt, use_cache=True, logits_to_keep=1)
        synchronise()
        prefill_end = time.perf_counter()
        grown, logits = output.past_key_values, output.logits
        del output
        static = _static_cache(model, grown, prompt.shape[1], new_tokens)
        cache = grown if static is None else static
        del grown
        synchronise()
        decode_start = time.perf_counter()
        for _ in range(new_tokens):
            token = logits[:, -1:].argmax(-1)
            logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        synchronise()
        decode_end = time.perf_counter()
    return Timing(prefill_end - start, decode_end - decode_start, "dynamic" if static is None else "static")


def _static_cache(model: nn.Module, grown: Any, length: int, new_tokens: int) -> Any:
    """Return a static cache of ``length`` + ``new_tokens`` places with the content of ``grown``; None where none fits.

    Layers that hold nothing (a removed attention has no slot) stay empty. Keys and values are moved out of ``grown``
    layer by layer, so that both caches are never in memory as a whole.
    """
    from transformers import DynamicCache, StaticCache
    from transformers.cache_utils import (
        DynamicLayer,
        DynamicSlidingWindowLayer,
        StaticLayer,
        StaticSlidingWindowLayer,
    )

    if type(grown) is not DynamicCache:
        return None
    config: Any = model.config
    try:
        static = StaticCache(config=config, max_cache_len=length + new_tokens)
    except (
        AttributeError,
        KeyError,
        NotImplementedError,
        TypeError,
        ValueError,
    ):  # some kinds of layer have no static cache
        return None
    static_types: dict[type, type] = {DynamicLayer: StaticLayer, DynamicSlidingWindowLayer: StaticSlidingWindowLayer}
    pairs: list[tuple[Any, Any]] = list(zip(static.layers, grown.layers, strict=False))
    for static_layer, grown_layer in pairs:
        # A sliding window that is already full keeps less than the prompt, so a static cache cannot continue from it.
        n_cached = grown_layer.keys.shape[-2] if grown_layer.is_initialized else length
        if static_types.get(type(grown_layer)) is not type(static_layer) or n_cached != length:
            return None
    if len(static.layers) < len(grown.layers):
        return None
    for static_layer, grown_layer in pairs:
        if grown_layer.is_initialized:
            static_layer.update(grown_layer.keys, grown_layer.values)
            grown_layer.keys = grown_layer.values = None
    return static


def measure_peak_besides_weights(weights: Sequence[Tensor], prompt: Tensor, call: Callable[[], object]) -> int:
    """Return the largest number of bytes of tensors other than ``weights`` that are alive at one time during ``call``.

    On CUDA the allocator is asked, so the work space of kernels counts, and the GPUs that hold weights are summed.
    Elsewhere the tensors that operations return are counted, which gives the same number on every machine.
    """
    import torch

    if prompt.is_cuda:
        devices = {tensor.device for tensor in (*weights, prompt) if tensor.is_cuda}
        before = 0
        for device in devices:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before += torch.cuda.memory_allocated(device)
        call()
        for device in devices:
            torch.cuda.synchronize(device)
        return sum(torch.cuda.max_memory_allocated(device) for device in devices) - before
    # Start-up time: loads torch.
    from cfsp.evaluation.live_tensors import LiveTensors

    with LiveTensors([*weights, prompt]) as live:
        call()
    return live.peak


def measure_size(model: nn.Module, storage_dtype: torch.dtype) -> list[Measurement]:
    """Count parameters (tied ones once), bytes of the checkpoint, and MACs of the linear layers per token.

    Args:
        model: the model.
        storage_dtype: dtype of the checkpoint.
    """
    # Start-up time: loads torch.
    from cfsp.architecture.projection import is_matrix

    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = parameters * storage_dtype.itemsize
    matrices: list[Any] = [module for module in model.modules() if is_matrix(module)]
    macs = sum(module.weight.numel() for module in matrices)
    return [
        Measurement("cost", "parameters", "count", parameters, "parameters"),
        Measurement(
            "cost",
            "checkpoint",
            "bytes",
            size,
            "bytes",
            detail={"dtype": str(storage_dtype).removeprefix("torch.")},
        ),
        Measurement("cost", "linear_macs", "count", macs, "MACs per token"),
    ]
