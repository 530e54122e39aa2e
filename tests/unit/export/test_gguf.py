"""A GGUF file, read back: its metadata, its tensors, what is filled with zeros, and what is refused."""

from __future__ import annotations

import errno
import json
import shutil
import struct
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

import cfsp
from cfsp.checkpoint.save import save_checkpoint
from cfsp.errors import CheckpointError, ConfigError, UnsupportedModelError
from cfsp.export import gguf as exporter
from cfsp.export.folder import read_folder
from cfsp.export.gguf import check, export
from cfsp.export.gguf_layout import CHUNK
from cfsp.export.gguf_tokenizer_json import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from cfsp.export.gguf_vocabulary import read_vocabulary
from cfsp.export.sentencepiece_file import read_sentencepieces
from cfsp.plan.pruning_plan import BlockPlan, PruningPlan
from tests.conftest import ROOT, SENTENCE, mentions, shared
from tests.helpers.tiny import tiny_model

BUNDLED = ROOT / "cfsp" / "assets" / "books7m"
VOCABULARY = 300
SOME = (0, 3, 7, *range(20, 60))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
UNEQUAL = (BlockPlan(SOME), BlockPlan(), BlockPlan())


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer of fewer tokens than the tiny models have."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=special)
    trained.train_from_iterator([SENTENCE * 3], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    trained.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def folder_of(tmp_path, tokenizer_folder):
    """A tiny model of 3 blocks, pruned as the plans say, as a folder: ``model, source = folder_of(...)``."""
    return partial(_folder_of, tmp_path, tokenizer_folder)


def _folder_of(
    tmp_path: Path, tokenizer: Path, architecture: str = "llama", blocks=(), biases=(), dtype=None, **settings
):
    model = tiny_model(architecture, blocks=3, **{"vocab_size": VOCABULARY, **settings})
    if blocks:
        tensors = {name: torch.full((32,), 0.5) for name in biases}
        cfsp.apply(model, PruningPlan("m", "f", {"name": "hand"}, tuple(blocks), {}, {}, tensors=tensors))
    save_checkpoint(model, tmp_path / "model", source=tokenizer, dtype=dtype)
    return model, read_folder(tmp_path / "model")


class Written:
    """A GGUF file as it was read back."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.values = {name: entry.contents() for name, entry in reader.fields.items()}
        self.kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {
            tensor.name: torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
            for tensor in reader.tensors
        }
        self.architecture = self.values["general.architecture"]

    def __getitem__(self, key: str):
        return self.values[f"{self.architecture}.{key}"]


def written(tmp_path: Path, source, dtype="f32") -> Written:
    return Written(export(source, tmp_path / "model.gguf", dtype=dtype).place)


def turned_back(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


# What is written


@pytest.mark.parametrize(
    ("family", "architecture"), [("llama", "llama"), ("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
)
def test_a_model_with_equal_blocks_is_written_in_the_stock_architecture(tmp_path, folder_of, family, architecture):
    model, source = folder_of(family)
    file = written(tmp_path, source)
    assert file.architecture == architecture
    assert file["block_count"] == 3
    assert (file["feed_forward_length"], file["attention.head_count"], file["attention.head_count_kv"]) == (96, 4, 2)
    assert file["attention.key_length"] == file["rope.dimension_count"] == file["attention.value_length"] == 8
    assert file["embedding_length"] == 32
    assert file["context_length"] == 128
    assert file["vocab_size"] == VOCABULARY
    assert file["rope.freq_base"] == 10000.0
    assert file["attention.layer_norm_rms_epsilon"] == pytest.approx(model.config.rms_norm_eps)
    state = model.state_dict()
    assert torch.equal(file.tensors["token_embd.weight"], state["model.embed_tokens.weight"])
    assert torch.equal(file.tensors["output.weight"], state["lm_head.weight"])
    q = file.tensors["blk.1.attn_q.weight"]
    k = file.tensors["blk.1.attn_k.weight"]
    if architecture == "llama":
        q, k = turned_back(q, 4), turned_back(k, 2)
    assert torch.equal(q, state["model.layers.1.self_attn.q_proj.weight"])
    assert torch.equal(k, state["model.layers.1.self_attn.k_proj.weight"])
    if family == "qwen2":
        assert torch.equal(file.tensors["blk.1.attn_q.bias"], state["model.layers.1.self_attn.q_proj.bias"])
    if family == "qwen3":
        assert torch.equal(file.tensors["blk.1.attn_q_norm.weight"], state["model.layers.1.self_attn.q_norm.weight"])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_unequal_blocks_keep_their_own_sizes(tmp_path, folder_of, family):
    blocks = (BlockPlan(tuple(range(64))), BlockPlan(None, (1,)), BlockPlan())
    model, source = folder_of(family, blocks)
    found = export(source, tmp_path / "model.gguf")
    file = Written(found.place)
    assert file.architecture == "deci"
    assert any("deci" in note for note in found.notes)
    assert file["feed_forward_length"] == [64, 96, 96]
    assert file["attention.head_count"] == [4, 2, 4]
    assert file["attention.head_count_kv"] == [2, 1, 2]
    state = model.state_dict()
    name = "model.layers.1.self_attn.q_proj"
    assert torch.equal(turned_back(file.tensors["blk.1.attn_q.weight"], 2), state[f"{name}.weight"])
    assert torch.equal(
        turned_back(file.tensors["blk.0.attn_k.weight"], 2), state["model.layers.0.self_attn.k_proj.weight"]
    )
    assert torch.equal(file.tensors["blk.0.ffn_down.weight"], state["model.layers.0.mlp.down_proj.weight"])
    if family == "qwen2":
        assert torch.equal(turned_back(file.tensors["blk.1.attn_q.bias"], 2), state[f"{name}.bias"])
        assert torch.equal(file.tensors["blk.1.attn_v.bias"], state["model.layers.1.self_attn.v_proj.bias"])


def test_widths_are_filled_up_with_zero_neurons_that_the_notes_count(tmp_path, folder_of):
    model, source = folder_of("llama_bias", UNEQUAL)
    found = export(source, tmp_path / "model.gguf")
    file = Written(found.place)
    assert any(note.startswith("21 zero neurons in 1 of 3 blocks") for note in found.notes)
    assert file["feed_forward_length"] == [64, 96, 96]
    state = model.state_dict()
    for ours, theirs in (("gate", "ffn_gate"), ("up", "ffn_up")):
        weight = file.tensors[f"blk.0.{theirs}.weight"]
        assert torch.equal(weight[:43], state[f"model.layers.0.mlp.{ours}_proj.weight"])
        assert not weight[43:].any()
        assert not file.tensors[f"blk.0.{theirs}.bias"][43:].any()
    assert torch.equal(file.tensors["blk.0.ffn_down.weight"][:, :43], state["model.layers.0.mlp.down_proj.weight"])
    assert not file.tensors["blk.0.ffn_down.weight"][:, 43:].any()


def test_widths_are_filled_up_to_another_multiple_on_request(tmp_path, folder_of):
    _, source = folder_of(blocks=(BlockPlan(SOME), BlockPlan(ffn=False), BlockPlan()), width=300)
    found = export(source, tmp_path / "model.gguf", multiple=256)
    assert Written(found.place)["feed_forward_length"] == [256, 256, 512]
    assert any("multiples of 256" in note for note in found.notes)
    with pytest.raises(ConfigError, match="multiple=48: format=gguf needs a multiple of 32"):
        check(source, multiple=48)


def test_widths_that_are_alike_once_filled_up_need_no_other_architecture(tmp_path, folder_of):
    blocks = [BlockPlan(tuple(range(width))) for width in (64, 50, 33)]
    file = written(tmp_path, folder_of(blocks=blocks)[1])
    assert (file.architecture, file["feed_forward_length"]) == ("llama", 64)


def test_missing_attention_and_ffn(tmp_path, folder_of):
    blocks = (BlockPlan(attention=False), BlockPlan(ffn=False), BlockPlan(attention=False))
    _, source = folder_of(blocks=blocks)
    found = export(source, tmp_path / "model.gguf")
    file = Written(found.place)
    assert file["attention.head_count"] == [1, 4, 0]
    assert file["attention.head_count_kv"] == [1, 2, 0]
    assert file["feed_forward_length"] == [96, CHUNK, 96]
    assert file.tensors["blk.0.attn_q.weight"].shape == file.tensors["blk.0.attn_k.weight"].shape == (8, 32)
    assert file.tensors["blk.0.attn_output.weight"].shape == (32, 8)
    zeros = [f"blk.0.attn_{name}.weight" for name in ("q", "k", "v", "output")]
    zeros += [f"blk.1.ffn_{name}.weight" for name in ("gate", "up", "down")]
    assert not any(file.tensors[name].any() for name in zeros)
    assert not [name for name in file.tensors if name.startswith("blk.2.attn")]
    assert any("no attention, in block 0." in note for note in found.notes)
    assert any("there is none, in block 1." in note for note in found.notes)


def test_biases_that_a_compensation_added(tmp_path, folder_of):
    biases = ("blocks.0.ffn.bias", "blocks.1.attention.bias")
    file = written(tmp_path, folder_of(blocks=UNEQUAL, biases=biases)[1])
    assert file.architecture == "deci"
    assert torch.equal(file.tensors["blk.0.ffn_down.bias"], torch.full((32,), 0.5))
    assert torch.equal(file.tensors["blk.1.attn_output.bias"], torch.full((32,), 0.5))
    assert "blk.0.attn_output.bias" not in file.tensors


def test_tied_qwen3_with_unequal_blocks_becomes_openelm(tmp_path, folder_of):
    blocks = (BlockPlan(SOME), BlockPlan(None, (1,), ffn=False), BlockPlan(attention=False))
    model, source = folder_of("qwen3", blocks, tie_word_embeddings=True)
    file = written(tmp_path, source)
    assert file.architecture == "openelm"
    assert "output.weight" not in file.tensors
    assert file["attention.head_count"] == [4, 2, 1]
    assert file["attention.head_count_kv"] == [2, 1, 1]
    parts = [model.state_dict()[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(file.tensors["blk.1.attn_qkv.weight"], torch.cat(parts))
    assert file.tensors["blk.2.attn_qkv.weight"].shape == (3 * 8, 32)
    assert not file.tensors["blk.2.attn_qkv.weight"].any()
    assert not file.tensors["blk.1.ffn_down.weight"].any()


def test_qwen2_whose_heads_are_no_square_becomes_deci(tmp_path, folder_of):
    blocks = [BlockPlan(None, (1,))] * 3
    file = written(tmp_path, folder_of("qwen2", blocks)[1])
    assert (file.architecture, file["attention.head_count"]) == ("deci", [2, 2, 2])


def test_yarn_is_written_with_the_length_it_extends(tmp_path, folder_of):
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    file = written(tmp_path, folder_of("qwen2", UNEQUAL, rope_parameters=rope)[1])
    assert (file["rope.scaling.type"], file["rope.scaling.factor"]) == ("yarn", 4.0)
    assert file["rope.scaling.original_context_length"] == 32


@pytest.mark.parametrize(("family", "architecture"), [("llama", "llama"), ("qwen2", "deci")])
def test_llama3_rope_is_a_tensor_of_factors(tmp_path, folder_of, family, architecture):
    model, source = folder_of(family, rope_parameters=dict(LLAMA3))
    file = written(tmp_path, source)
    assert file.architecture == architecture
    assert file["rope.freq_base"] == 500000.0
    plain = 500000.0 ** -(torch.arange(0, 8, 2) / 8)
    assert torch.allclose(file.tensors["rope_freqs.weight"], plain / model.model.rotary_emb.inv_freq, rtol=1e-5)


def test_linear_rope_is_written_for_every_family(tmp_path, folder_of):
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    file = written(tmp_path, folder_of("qwen3", rope_parameters=rope)[1])
    assert (file["rope.scaling.type"], file["rope.scaling.factor"]) == ("linear", 4.0)


def test_a_sliding_window_limits_the_context(tmp_path, folder_of):
    _, source = folder_of("mistral", sliding_window=48)
    found = export(source, tmp_path / "model.gguf")
    assert Written(found.place)["context_length"] == 48
    assert any("up to 48 tokens" in note for note in found.notes)


def test_what_config_json_leaves_out_is_transformers_default(tmp_path, folder_of):
    """mistral has a sliding window of 4096 where config.json names none."""
    folder_of("mistral", max_position_embeddings=8192)
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    del config["sliding_window"], config["rms_norm_eps"]
    file.write_text(json.dumps(config))
    found = written(tmp_path, read_folder(tmp_path / "model"))
    assert found["context_length"] == 4096
    assert found["attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


# Dtypes


@pytest.mark.parametrize(
    ("stored", "asked", "kind", "number"),
    [
        (None, "auto", "F32", 0),
        (torch.bfloat16, "auto", "BF16", 32),
        (torch.float16, "auto", "F16", 1),
        (None, "f16", "F16", 1),
        (None, "bf16", "BF16", 32),
        (None, "q8_0", "Q8_0", 7),
    ],
)
def test_matrices_are_in_the_dtype_and_vectors_in_f32(tmp_path, folder_of, stored, asked, kind, number):
    model, source = folder_of("qwen2", UNEQUAL, dtype=stored)
    found = export(source, tmp_path / "model.gguf", dtype=asked)
    file = Written(found.place)
    assert file.values["general.file_type"] == number
    for name, tensor in file.tensors.items():
        assert file.kinds[name] == ("F32" if tensor.dim() == 1 else kind), name
    expected = model.state_dict()["model.layers.1.mlp.up_proj.weight"]
    found_there = file.tensors["blk.1.ffn_up.weight"]
    assert len(found_there) == (128 if kind in ("F16", "BF16") else 96)
    error = (found_there[:96] - expected).abs()
    largest = expected.abs().amax(-1, keepdim=True)  # a row is one chunk of 32
    limits = {
        "F32": 0 * expected,
        "F16": expected.abs() * 2**-11 + 2**-25,
        "BF16": expected.abs() * 2**-8,
        # Half a step, and the step itself is rounded to f16.
        "Q8_0": largest / 127 * (0.5 + 127 * 2**-11),
    }
    assert (error <= limits[kind]).all()
    assert found.bytes == sum(tensor.n_bytes for tensor in gguf.GGUFReader(found.place).tensors)


def test_q8_0_leaves_rows_of_other_lengths_in_f16_and_says_so(tmp_path, folder_of):
    blocks = (BlockPlan(None, (1,)), BlockPlan(), BlockPlan())
    found = export(folder_of(blocks=blocks)[1], tmp_path / "model.gguf", dtype="q8_0")
    kinds = Written(found.place).kinds
    assert (kinds["blk.0.attn_output.weight"], kinds["blk.1.attn_output.weight"]) == ("F16", "Q8_0")
    assert any("1 matrices" in note and "blk.0.attn_output.weight" in note for note in found.notes)


def test_pieces_of_a_tensor_are_the_tensor(tmp_path, folder_of, monkeypatch):
    _, source = folder_of()
    for dtype in ("f32", "q8_0"):
        whole = export(source, tmp_path / "whole" / "model.gguf", dtype=dtype).place.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(exporter, "_PIECE", 100)
            pieces = export(source, tmp_path / "pieces" / "model.gguf", dtype=dtype).place.read_bytes()
        assert pieces == whole


def test_a_value_too_large_for_f16_is_named(tmp_path, folder_of):
    model, source = folder_of()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = 1e6
    save_checkpoint(model, tmp_path / "model", source=source.folder)
    with pytest.raises(CheckpointError, match=r"blk.2.ffn_up.weight has values up to 1e\+06.*dtype=bf16"):
        export(read_folder(tmp_path / "model"), tmp_path / "model.gguf", dtype="f16")
    assert not list(tmp_path.glob("*.gguf")) + list(tmp_path.glob(".*"))


# What is refused


def refused(kind: type, source, dtype="auto") -> list[str]:
    with pytest.raises(kind) as found:
        check(source, dtype)
    return [str(found.value)]


def test_untied_qwen3_with_unequal_blocks_is_refused(tmp_path, folder_of):
    _, source = folder_of("qwen3", (BlockPlan(), BlockPlan(), BlockPlan(SOME)))
    mentions(refused(UnsupportedModelError, source), "block 2", "LM head", "format=padded")


def test_a_bias_that_openelm_cannot_hold_is_refused(tmp_path, folder_of):
    biases = ("blocks.1.ffn.bias",)
    _, source = folder_of("qwen3", UNEQUAL, biases, tie_word_embeddings=True)
    mentions(refused(UnsupportedModelError, source), "block 1", "mlp.down_proj", "openelm", "format=hf")


@pytest.mark.parametrize(
    ("family", "rope", "parts"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 2.0}, ("rope_type=dynamic", "linear, llama3")),
        (
            "llama",
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16},
            ("YaRN with beta_fast=16",),
        ),
        ("qwen3", LLAMA3, ("rope_type=llama3", "qwen3")),
        ("llama", {"rope_type": "default", "partial_rotary_factor": 0.5}, ("partial_rotary_factor=0.5",)),
    ],
)
def test_a_rope_that_the_architecture_does_not_know_is_refused(tmp_path, folder_of, family, rope, parts):
    _, source = folder_of(family, rope_parameters={"rope_theta": 10000.0, **rope})
    mentions(refused(UnsupportedModelError, source), *parts)


def test_another_activation_is_refused(tmp_path, folder_of):
    _, source = folder_of(hidden_act="gelu")
    mentions(refused(UnsupportedModelError, source), "hidden_act=gelu")


def test_another_dtype_is_refused(tmp_path, folder_of):
    mentions(refused(ConfigError, folder_of()[1], "q4_k"), "dtype=q4_k", "q8_0")


def test_a_missing_or_misshapen_tensor_is_named(tmp_path, folder_of):
    _, source = folder_of()
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(source.shapes, "model.layers.1.mlp.up_proj.weight")
        mentions(refused(CheckpointError, source), "lacks model.layers.1.mlp.up_proj.weight")
    wrong = type(source)(**{**vars(source), "config": {**source.config, "hidden_size": 64}})
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is \(300, 32\), its config.json says \(300, 64\)"):
        export(wrong, tmp_path / "model.gguf")


# Where it is written


def test_a_file_of_ours_is_replaced_and_another_is_not(tmp_path, folder_of):
    _, source = folder_of()
    place = tmp_path / "new" / "model.gguf"
    export(source, place)
    export(source, place, dtype="bf16")
    assert Written(place).kinds["token_embd.weight"] == "BF16"
    place.write_bytes(b"GGUF of somebody else")
    with pytest.raises(CheckpointError, match="was not written by cfsp"):
        export(source, place)
    with pytest.raises(CheckpointError, match="is a folder"):
        export(source, tmp_path)


def test_the_reference_beside_the_file_is_ours_and_of_this_source(tmp_path, folder_of):
    _, source = folder_of()
    place, beside = tmp_path / "x.gguf", tmp_path / "x.reference.safetensors"
    export(source, place)
    assert beside.is_file()
    shutil.rmtree(source.folder / "verify")
    export(source, place)
    assert not beside.exists()  # it was of an earlier source
    place.unlink()
    save_file({"mine": torch.ones(2)}, beside)
    before = beside.read_bytes()
    with pytest.raises(CheckpointError, match=r"x.reference.safetensors: exists and was not written by cfsp"):
        export(source, place)
    assert (beside.read_bytes(), place.exists()) == (before, False)


def test_a_file_of_another_ending_is_refused(tmp_path, folder_of):
    _, source = folder_of()
    with pytest.raises(CheckpointError, match=r"noext: a GGUF file is named \*.gguf; give .*noext.gguf"):
        export(source, tmp_path / "noext")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_leaves_nothing_and_keeps_the_file_that_was_there(tmp_path, folder_of, monkeypatch):
    _, source = folder_of()
    place = export(source, tmp_path / "model.gguf").place
    before = place.read_bytes()
    write = exporter._write_tensor
    calls = []

    def full(*words):
        calls.append(words)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*words)

    monkeypatch.setattr(exporter, "_write_tensor", full)
    with pytest.raises(CheckpointError, match="model.gguf: the file cannot be written there \\(No space left"):
        export(source, place, dtype="bf16")
    assert place.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model", "model.gguf", "model.reference.safetensors",
    ]  # fmt: skip


def test_a_disk_that_fills_up_with_the_reference_leaves_what_was_there(tmp_path, folder_of, monkeypatch):
    _, source = folder_of()
    place = export(source, tmp_path / "model.gguf").place
    names = ("model.gguf", "model.reference.safetensors")
    before = {name: (tmp_path / name).read_bytes() for name in names}

    def full(_, target):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cfsp.checkpoint.reference.shutil.copyfile", full)
    with pytest.raises(CheckpointError, match="No space left"):
        export(source, place, dtype="bf16")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_takes_nothing_closes_the_file(tmp_path, folder_of, monkeypatch):
    _, source = folder_of()
    write_header = gguf.GGUFWriter.write_header_to_file
    monkeypatch.setattr(
        gguf.GGUFWriter, "write_header_to_file", lambda self, path: write_header(self, Path("/dev/full"))
    )
    with pytest.raises(CheckpointError, match="No space left on device"):
        export(source, tmp_path / "model.gguf")


# Vocabulary


def edited(tmp_path: Path, model: str, **changes) -> Path:
    """A folder with the tokenizer of a model, its tokenizer.json changed."""
    shutil.copytree(shared("models", model), tmp_path / "tokenizer", copy_function=shutil.copyfile)
    (tmp_path / "tokenizer").chmod(0o755)
    file = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    for key, value in changes.items():
        if key in content:
            content[key] = value
        else:
            content["model"][key] = value
    file.write_text(json.dumps(content))
    return tmp_path / "tokenizer"


def vocabulary_of(folder: Path, **changes):
    return read_vocabulary(folder, {**json.loads((folder / "config.json").read_text()), **changes})


def test_a_byte_level_tokenizer_is_written_with_its_merges(tmp_path, folder_of):
    _, source = folder_of()
    file = written(tmp_path, source)
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in file.values.items()}
    n = len(tokenizer)
    assert (values["model"], values["pre"]) == ("gpt2", "gpt-2")
    assert values["tokens"][:n] == tokenizer.convert_ids_to_tokens(list(range(n)))
    assert values["tokens"][n:] == [f"[PAD{number}]" for number in range(n, VOCABULARY)]
    assert values["token_type"][:4] == [CONTROL] * 3 + [NORMAL]
    assert values["token_type"][n:] == [UNUSED] * (VOCABULARY - n)
    assert (values["bos_token_id"], values["eos_token_id"], values["unknown_token_id"]) == (1, 2, 0)
    assert (values["add_bos_token"], values["add_eos_token"]) == (False, False)
    merges = json.loads((source.folder / "tokenizer.json").read_text())["model"]["merges"]
    assert values["merges"] == [" ".join(pair) for pair in merges]


def test_the_bundled_model_s_tokenizer_is_one_of_gpt_2():
    found = vocabulary_of(BUNDLED)
    assert (found.kind, found.pre, len(found.tokens), len(found.merges)) == ("gpt2", "gpt-2", 4096, 3837)
    assert found.special == {"bos": 1, "eos": 2, "unk": 0}


@pytest.mark.parametrize("with_model", [True, False])
def test_a_sentencepiece_tokenizer_is_written_with_scores_that_join_alike(tmp_path, with_model):
    folder = edited(tmp_path, "stories260K")
    if not with_model:
        (folder / "tokenizer.model").unlink()
    found = vocabulary_of(folder)
    assert (found.kind, found.pre, found.space_prefix) == ("llama", "default", True)
    assert (found.add_bos, found.add_eos) == (True, False)
    assert found.special == {"bos": 1, "eos": 2, "unk": 0, "pad": 2}
    assert found.types[:5] == [UNKNOWN, CONTROL, CONTROL, BYTE, BYTE]
    pieces = read_sentencepieces(shared("models", "stories260K", "tokenizer.model")).pieces
    joined = [n for n, piece in enumerate(pieces) if piece.kind == NORMAL and len(piece.text) > 1]
    by_score = sorted(joined, key=lambda n: -found.scores[n])
    assert by_score == sorted(joined, key=lambda n: -pieces[n].score)


def test_a_sentencepiece_model_alone_is_enough(tmp_path):
    folder = edited(tmp_path, "stories260K")
    expected = vocabulary_of(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "added_tokens.json").write_text('{"<tool>": 512}')
    found = vocabulary_of(folder, vocab_size=513)
    assert list(found.tokens) == [*expected.tokens, "<tool>"]
    assert list(found.types) == [*expected.types, USER_DEFINED]
    assert list(found.scores) == [*expected.scores, 0.0]
    assert (found.special, found.add_bos) == (expected.special, True)


def test_the_chat_template_and_the_tokens_around_a_text(tmp_path):
    template = {"single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "E"}}]}
    tokens = {"<s>": {"ids": [1]}, "E": {"ids": [5]}}
    processor = {"type": "TemplateProcessing", "special_tokens": tokens, **template}
    folder = edited(tmp_path, "books7m", post_processor={"type": "Sequence", "processors": [processor]})
    settings = folder / "tokenizer_config.json"
    named = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": named}))
    found = vocabulary_of(folder)
    assert (found.add_bos, found.add_eos, found.special["eos"]) == (True, True, 5)
    assert found.chat_template == "D"
    (folder / "chat_template.jinja").write_text("J")
    assert vocabulary_of(folder).chat_template == "J"


QWEN2 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+"
    "|\\s+(?!\\S)|\\s+"
)
LLAMA3_WORDS = QWEN2.replace("\\p{N}| ?", "\\p{N}{1,3}| ?")


def split_by(regex: str) -> dict:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, bytes_]}


@pytest.mark.parametrize(
    ("changes", "pre"),
    [
        ({"pre_tokenizer": split_by(QWEN2), "normalizer": {"type": "NFC"}}, "qwen2"),
        ({"pre_tokenizer": split_by(LLAMA3_WORDS), "ignore_merges": True}, "llama-bpe"),
        ({"pre_tokenizer": split_by(LLAMA3_WORDS)}, "smaug-bpe"),
    ],
)
def test_the_pre_tokenizer_decides_what_llama_cpp_splits_by(tmp_path, changes, pre):
    found = vocabulary_of(edited(tmp_path, "books7m", **changes))
    assert found.pre == pre
    assert bool(found.notes) == ("normalizer" in changes)


@pytest.mark.parametrize(
    ("model", "changes", "part"),
    [
        ("books7m", {"type": "Unigram"}, "is a Unigram tokenizer"),
        ("books7m", {"pre_tokenizer": split_by("[a-z]+")}, "unknown pre-tokenizer"),
        ("books7m", {"pre_tokenizer": None}, "unknown pre-tokenizer"),
        ("books7m", {"normalizer": {"type": "Lowercase"}}, "normalises text by Lowercase"),
        ("books7m", {"ignore_merges": True}, "ignore_merges=True"),
        ("books7m", {"post_processor": {"type": "BertProcessing"}}, "BertProcessing post-processor"),
        ("stories260K", {"normalizer": {"type": "NFKC"}}, "normalises text by NFKC"),
        ("stories260K", {"pre_tokenizer": {"type": "Whitespace"}}, "unknown pre-tokenizer"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_not_reproduce_is_refused_in_one_line(tmp_path, model, changes, part):
    folder = edited(tmp_path, model)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    for key, value in changes.items():
        (content if key in content else content["model"])[key] = value
    file.write_text(json.dumps(content))
    with pytest.raises(UnsupportedModelError) as found:
        vocabulary_of(folder)
    mentions(str(found.value).splitlines(), str(file), part, "use another format")


def test_merges_that_scores_cannot_express_are_refused(tmp_path):
    folder = edited(tmp_path, "stories260K")
    (folder / "tokenizer.model").unlink()
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = content["model"]["merges"][1:]
    file.write_text(json.dumps(content))
    with pytest.raises(UnsupportedModelError, match="has no merge of '▁' and 't' into its token '▁t'"):
        vocabulary_of(folder)


def test_a_tokenizer_that_is_not_there_broken_or_too_large_is_named(tmp_path):
    folder = edited(tmp_path, "stories260K")
    with pytest.raises(CheckpointError, match="its tokenizer has 512 tokens, its model 500"):
        vocabulary_of(folder, vocab_size=500)
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(CheckpointError, match="is not a readable tokenizer.json"):
        vocabulary_of(folder)
    (folder / "tokenizer.json").unlink()
    model = folder / "tokenizer.model"
    model.write_bytes(model.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="cannot be read as a SentencePiece model"):
        vocabulary_of(folder)
    model.unlink()
    with pytest.raises(CheckpointError, match="has neither tokenizer.json nor tokenizer.model"):
        vocabulary_of(folder)


def test_a_unigram_sentencepiece_model_is_refused(tmp_path):
    piece = b"\x0a\x01a\x15" + struct.pack("<f", -1.0)
    unigram = b"\x0a" + bytes([len(piece)]) + piece + b"\x12\x02\x18\x01"
    (tmp_path / "tokenizer.model").write_bytes(unigram)
    with pytest.raises(UnsupportedModelError, match="is not a BPE model"):
        read_vocabulary(tmp_path, {"vocab_size": 10})
