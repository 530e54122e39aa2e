"""Tiny quantised checkpoints, and the values that their weights stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT

#: Values of a 4-bit float (E2M1) by its code.
_FP4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def fp8(folder: Path, model: Any, block: int = 8) -> dict[str, torch.Tensor]:
    """Write a model whose projections are 8-bit floats with a scale for each block; returns what they stand for."""
    stored, values = _saved(folder, model), {}
    for name, weight in list(stored.items()):
        values[name] = weight
        if "_proj" in name:
            rows, columns = weight.shape
            blocks = weight.reshape(rows // block, block, columns // block, block)
            scale = blocks.abs().amax((1, 3)) / 448
            codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            values[name] = (codes.float() * scale[:, None, :, None]).reshape(rows, columns)
            stored |= {name: codes.reshape(rows, columns), f"{name}_scale_inv": scale}
        else:
            stored[name] = weight.to(torch.bfloat16)
            values[name] = stored[name].float()
    _write(folder, stored, {"quant_method": "fp8", "weight_block_size": [block, block]})
    return values


def mxfp4(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    """Write a gpt_oss model whose experts are 4-bit floats with an exponent for each 32; returns their values."""
    stored, values = _saved(folder, model), {}
    generator = torch.Generator().manual_seed(0)
    for name, weight in list(stored.items()):
        values[name] = weight
        if "experts" in name and name.endswith("_proj"):
            experts, inputs, outputs = weight.shape
            codes = torch.randint(16, (experts, outputs, inputs), generator=generator)
            exponents = torch.randint(122, 126, (experts, outputs, inputs // 32), generator=generator)
            scales = torch.exp2(exponents.float() - 127).repeat_interleave(32, dim=2)
            values[name] = (_FP4[codes] * scales).transpose(1, 2)
            packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
            del stored[name]
            stored[f"{name}_blocks"] = packed.reshape(experts, outputs, inputs // 32, 16)
            stored[f"{name}_scales"] = exponents.to(torch.uint8)
    _write(folder, stored, {"quant_method": "mxfp4"})
    return values


def marked(folder: Path, model: Any, **settings: Any) -> Path:
    """Write a model whose config.json says that it is quantised."""
    _write(folder, _saved(folder, model), settings)
    return folder


def _saved(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    for file in (ROOT / "cfsp" / "assets" / "books7m").glob("tokenizer*"):
        shutil.copy(file, folder)
    return load_file(folder / "model.safetensors")


def _write(folder: Path, stored: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in stored.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": settings, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
