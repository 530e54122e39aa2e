"""Cost: parameters, MACs, checkpoint bytes, prefill and decode speed, peak memory; timed in alternation, as medians."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from cfsp.components import component
from cfsp.evaluate.measurement import Measurement
from cfsp.progress import progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from cfsp.data.calibration import Limits
    from cfsp.evaluate.base import Side


@component
class Cost:
    """Batch 1: prefill of ``prompt_tokens``, then greedy decoding of ``new_tokens`` with the KV cache.

    Each of the ``repeats`` times every side once, after one warm-up round.
    """

    prompt_tokens: Annotated[int, Field(ge=2)] = 256
    new_tokens: Annotated[int, Field(ge=1)] = 32
    repeats: Annotated[int, Field(ge=1)] = 5

    side_by_side: ClassVar[bool] = True

    def check(self, tokenizer: Any, limits: Limits) -> dict[str, Any]:
        limits.check_length(
            "evaluation.cost.prompt_tokens + evaluation.cost.new_tokens", self.prompt_tokens + self.new_tokens
        )
        return {"prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens, "repeats": self.repeats}

    def measure(self, model: nn.Module, tokenizer: Any) -> list[Measurement]:
        from cfsp.evaluate.base import Side

        side = Side("model", contextlib.nullcontext, next(model.parameters()).dtype)
        return self.measure_sides(model, [side])["model"]

    def measure_sides(self, model: nn.Module, sides: list[Side]) -> dict[str, list[Measurement]]:
        import torch

        vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(vocabulary, (1, self.prompt_tokens), generator=generator).to(device)
        times: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
        for repeat in progress(range(self.repeats + 1), "time prefill and decode", unit="round"):
            for side in sides:
                with side.active():
                    timed = time_generation(model, prompt, self.new_tokens)
                if repeat:
                    times[side.name].append(timed)
        found = {}
        for side in sides:
            with side.active():
                found[side.name] = [
                    *size_of(model, side.storage_dtype),
                    *self._speeds(times[side.name], device),
                    self._memory(model, prompt),
                ]
        return found

    def _memory(self, model: nn.Module, prompt: Tensor) -> Measurement:
        """The weights and what the same generation holds beside them at most: hidden states, logits, KV cache."""
        tensors = [*model.parameters(), *model.buffers()]
        weights = sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())
        beside = peak_beside(tensors, prompt, lambda: time_generation(model, prompt, self.new_tokens))
        detail = {"batch_size": 1, "device": prompt.device.type, "weights": weights}
        length = self.prompt_tokens + self.new_tokens
        return Measurement("cost", "memory", "peak_bytes", weights + beside, "bytes", seq_len=length, detail=detail)

    def _speeds(self, times: list[tuple[float, float]], device: torch.device) -> list[Measurement]:
        import torch

        detail = {
            "statistic": "median",
            "batch_size": 1,
            "device": device.type,
            "threads": torch.get_num_threads(),
        }
        figures = []
        for task, tokens, seconds in (
            ("prefill", self.prompt_tokens, [prefill for prefill, _ in times]),
            ("decode", self.new_tokens, [decode for _, decode in times]),
        ):
            figures.append(
                Measurement(
                    "cost", task, "tokens_per_second", tokens / median(seconds), "tokens/s",
                    n=len(seconds), seq_len=tokens, detail={**detail, "seconds": seconds},
                )
            )  # fmt: skip
        return figures


def time_generation(model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds for the prefill of ``prompt`` [1, T] and for ``new_tokens`` greedy steps after it."""
    import torch

    synchronise = torch.cuda.synchronize if prompt.is_cuda else (lambda: None)
    with torch.no_grad():
        synchronise()
        start = time.perf_counter()
        output = model(prompt, use_cache=True, logits_to_keep=1)
        synchronise()
        prefilled = time.perf_counter()
        for _ in range(new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
        synchronise()
        return prefilled - start, time.perf_counter() - prefilled


def peak_beside(weights: Sequence[Tensor], prompt: Tensor, call: Callable[[], object]) -> int:
    """Most bytes of tensors beside ``weights`` that are alive at one time during ``call``.

    CUDA: by its allocator, kernels' work space included. Elsewhere by counting the tensors that operations return,
    which is the same on every machine.
    """
    import torch

    if prompt.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from cfsp.evaluate.live_tensors import LiveTensors

    with LiveTensors([*weights, prompt]) as live:
        call()
    return live.peak


def size_of(model: nn.Module, storage_dtype: torch.dtype) -> list[Measurement]:
    """Parameters (tied ones once), bytes of their checkpoint in ``storage_dtype``, MACs of the linears per token."""
    from torch import nn

    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = parameters * storage_dtype.itemsize
    macs = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
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
