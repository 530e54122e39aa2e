"""Quantised checkpoints: dequantised where transformers can, refused in one line where it cannot."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import cfsp
from cfsp.checkpoint.save import save_checkpoint
from cfsp.config.sections import ModelSection
from cfsp.errors import CheckpointError
from cfsp.model.load import load_model
from cfsp.weights.source import ModelSource, locate, with_weights
from tests.conftest import mentions
from tests.helpers import quantised
from tests.helpers.tiny import tiny_model


def found(folder: Path, cache: Path | None = None, **keys: Any) -> ModelSource:
    return locate(ModelSection(name="m", path=str(folder), **{"dequantize": True, **keys}), cache)


def stored(source: ModelSource) -> dict[str, torch.Tensor]:
    return load_file(with_weights(source).folder / "model.safetensors")


def refused(folder: Path, **keys: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        found(folder, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def quantised_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if "quantised" in line]


def moe(architecture: str, **settings: Any) -> Any:
    config = AutoConfig.for_model(
        architecture, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=4096, num_experts_per_tok=2, max_position_embeddings=64, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def fp8_dense(folder: Path) -> dict[str, torch.Tensor]:
    return quantised.fp8(folder, tiny_model("llama", blocks=2))


def fp8_experts(folder: Path) -> dict[str, torch.Tensor]:
    return quantised.fp8(folder, moe("qwen3_moe", intermediate_size=64, moe_intermediate_size=32, num_experts=4))


def mxfp4_experts(folder: Path) -> dict[str, torch.Tensor]:
    layers = ["sliding_attention", "full_attention"]
    model = moe("gpt_oss", intermediate_size=64, num_local_experts=4, layer_types=layers, pad_token_id=0)
    return quantised.mxfp4(folder, model)


# Dequantised


@pytest.mark.parametrize("write", [fp8_dense, fp8_experts, mxfp4_experts])
def test_the_weights_are_the_values_that_the_checkpoint_stands_for(tmp_path, write):
    values = write(tmp_path / "model")
    source = found(tmp_path / "model", tmp_path / "cache")
    weights = stored(source)
    assert weights.keys() == values.keys()
    for name, value in values.items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], value), name
    load_model(source, dtype=torch.float32, device=torch.device("cpu"))  # it is a model folder like any other


def test_the_outline_is_written_first_and_the_weights_when_the_model_is_loaded(tmp_path):
    fp8_dense(tmp_path / "model")
    source = found(tmp_path / "model", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert source.stored_dtype == "float32"
    assert source.public_name == "model"
    folder = with_weights(source).folder
    written = (folder / "model.safetensors").stat().st_mtime_ns
    again = with_weights(found(tmp_path / "model", tmp_path / "cache"))
    assert again.folder == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_a_written_folder_has_no_trace_of_the_quantiser(tmp_path):
    fp8_dense(tmp_path / "model")
    source = found(tmp_path / "model", tmp_path / "cache")
    model = load_model(source, dtype=torch.float32, device=torch.device("cpu"))
    save_checkpoint(model, tmp_path / "out", source=source.folder, dtype=torch.bfloat16)
    for folder in (with_weights(source).folder, tmp_path / "out"):
        assert "quant" not in (folder / "config.json").read_text()
        assert not [name for name in load_file(folder / "model.safetensors") if "scale" in name]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_another_content_has_another_fingerprint_and_folder(tmp_path):
    fp8_dense(tmp_path / "one")
    quantised.fp8(tmp_path / "other", tiny_model("llama", blocks=2, seed=1))
    one, other = found(tmp_path / "one", tmp_path / "cache"), found(tmp_path / "other", tmp_path / "cache")
    assert one.fingerprint != other.fingerprint
    assert one.folder != other.folder
    assert one.fingerprint.endswith("#dequantised")


def test_a_model_that_is_not_quantised_is_taken_as_it_is(tmp_path):
    folder = quantised.marked(tmp_path / "model", tiny_model("llama", blocks=2))
    source = found(folder)
    assert source.dequantised is None
    assert source.folder == folder
    assert source.fingerprint == found(folder, dequantize=False).fingerprint


def test_scales_of_activations_and_of_the_cache_are_left_out(tmp_path):
    fp8_dense(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    for name in ("mlp.up_proj.input_scale", "self_attn.k_scale", "self_attn.q_proj.activation_scale"):
        tensors[f"model.layers.0.{name}"] = torch.ones(())
    save_file(tensors, file, metadata={"format": "pt"})
    assert len(stored(found(tmp_path / "model", tmp_path / "cache"))) == 21


def test_a_run_says_it_in_record_and_card(tmp_path, run_cfsp):
    fp8_dense_folder = tmp_path / "tiny"
    quantised.fp8(fp8_dense_folder, tiny_model("llama", blocks=2, vocab_size=4096))
    code, _, err = run_cfsp(
        "model=local", f"model.path={fp8_dense_folder}", "model.dequantize=true", "calibration.n_samples=2",
        "calibration.seq_len=32", "sparsity.round_to=4", "evaluation=none",
    )  # fmt: skip
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["model"]["quantised"] == {"method": "fp8", "weights": "dequantised"}
    mentions(record["model"]["notes"], "quantised checkpoint (fp8)", "dequantised")
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    mentions(quantised_lines(card), "base model", "quantised checkpoint (fp8)", "dequantised")


# Refused


@pytest.mark.parametrize("method", ["gptq", "awq", "torchao", "nvfp4", "own"])
@pytest.mark.parametrize("dequantize", [False, True])
def test_what_transformers_does_not_dequantise(tmp_path, method, dequantize):
    folder = quantised.marked(tmp_path / "model", tiny_model("llama", blocks=2), quant_method=method)
    parts = ("model.path=", f"quantised ({method})", "does not dequantise", "fp8", "before quantisation")
    mentions([refused(folder, dequantize=dequantize)], *parts)


@pytest.mark.parametrize(
    ("package", "settings", "name"),
    [
        ("bitsandbytes", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4 bit"),
        ("bitsandbytes", {"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8 bit"),
        (
            "compressed_tensors", {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "compressed-tensors pack-quantized",
        ),
    ],
)  # fmt: skip
def test_a_package_that_is_missing(tmp_path, package, settings, name):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    folder = quantised.marked(tmp_path / "model", tiny_model("llama", blocks=2), **settings)
    message = refused(folder)
    mentions([message], f"quantised ({name})", "pip install", package.replace("_", "-"), "before quantisation")


def test_load_dequantises_in_python_too(tmp_path):
    values = fp8_dense(tmp_path / "model")
    with pytest.raises(CheckpointError, match="quantised"):
        cfsp.load(tmp_path / "model")
    model, _ = cfsp.load(tmp_path / "model", dtype="float32", dequantize=True)
    weights = model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in values.items())


def test_a_checkpoint_is_dequantised_only_where_it_is_asked_for(tmp_path):
    fp8_dense(tmp_path / "model")
    mentions([refused(tmp_path / "model", dequantize=False)], "quantised (fp8)", "model.dequantize=true")


def test_8_bit_weights_without_their_scale(tmp_path):
    fp8_dense(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, file, metadata={"format": "pt"})
    mentions([refused(tmp_path / "model")], "layers.1.mlp.up_proj.weight", "without its scale")


def test_weights_that_do_not_fit_into_memory(tmp_path, monkeypatch):
    fp8_dense(tmp_path / "model")
    monkeypatch.setattr("cfsp.weights.dequantise.available", lambda _: 1000)
    source = found(tmp_path / "model", tmp_path / "cache")
    with pytest.raises(CheckpointError, match="dequantised weights take up to .* GB of memory"):
        with_weights(source)


def test_settings_that_are_no_quantisers(tmp_path):
    fp8_dense(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for settings in ("fp8", {"quant_method": "fp8", "weight_block_size": [0, 8]}, {"bits": 4}, ["fp8"]):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        mentions([refused(tmp_path / "model")], "its weights are quantised", "give the model before quantisation")


# Inspected


def test_inspect_says_what_a_run_needs(tmp_path, run_cfsp):
    fp8_dense(tmp_path / "model")
    code, out, err = run_cfsp("inspect", f"path={tmp_path / 'model'}", defaults=False)
    assert (code, err) == (0, "")
    mentions(quantised_lines(out), "quantised (fp8)", "model.dequantize=true", "float32")
    assert "32,928 parameters" in out
    folder = quantised.marked(tmp_path / "gptq", tiny_model("llama", blocks=2), quant_method="gptq", bits=4)
    _, out, _ = run_cfsp("inspect", f"path={folder}", defaults=False)
    mentions(quantised_lines(out), "quantised (gptq 4 bit)", "does not dequantise", "before quantisation")
