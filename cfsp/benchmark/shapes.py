"""Models for the benchmarks: randomly initialised LLaMAs, in memory or as a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.benchmark.make_checkpoint import Shape, make_checkpoint

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Tokens of a window.
SEQ_LEN = 512
SHAPES = {
    "small": Shape(hidden=1024, ffn=2816, blocks=8, heads=16, kv_heads=16, dtype="float32"),
    "large": Shape(hidden=2048, ffn=5632, blocks=16, heads=16, kv_heads=16, dtype="float32"),
    "llama3_8b": Shape(
        hidden=4096, ffn=14336, blocks=32, heads=32, kv_heads=8, vocab=128256, positions=8192, dtype="bfloat16"
    ),
}
#: Shape that is measured only on a GPU, with the number and the length of its windows.
GPU_SHAPE, GPU_WINDOWS, GPU_SEQ_LEN = "llama3_8b", 128, 1024


def describe_shape(name: str) -> str:
    """Describe a shape for the text below a table."""
    shape = SHAPES[name]
    heads = f"{shape.heads} heads" + (f" ({shape.kv_heads} KV)" if shape.kv_heads != shape.heads else "")
    return f"{name}: hidden {shape.hidden}, FFN {shape.ffn}, {shape.blocks} blocks, {heads}, vocabulary {shape.vocab}"


def build_model(shape: Shape, dtype: torch.dtype, device: torch.device, **changed: int) -> Any:
    """Build the model in eval mode with seeded initial values.

    Args:
        shape: shape of the model.
        dtype: dtype of the weights.
        device: device of the weights.
        changed: fields of the shape -> values to use instead.
    """
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = replace(shape, **changed).config()  # type: ignore[arg-type]
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with device:
            model: Any = LlamaForCausalLM(config)
            return model.to(dtype).eval()
    finally:
        torch.set_default_dtype(before)


def write_model(folder: Path, shape: Shape) -> Path:
    """Write the model to a folder unless it exists; return the folder."""
    make_checkpoint(folder, shape)
    return folder


def draw_token_ids(windows: int, length: int, vocabulary: int) -> Tensor:
    """Draw token ids [windows, length] on the CPU, seeded."""
    import torch

    return torch.randint(vocabulary, (windows, length), generator=torch.Generator().manual_seed(0))


def device_dtypes(device: torch.device, on_cpu: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the dtypes to measure on a device."""
    return ("bfloat16",) if device.type == "cuda" else on_cpu
