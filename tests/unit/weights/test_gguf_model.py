"""Models from GGUF files: a file of our own export read back, what transformers' reader leaves out, and bad files."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import SafetensorError

import cfsp
from cfsp.checkpoint.save import save_checkpoint
from cfsp.config.sections import ModelSection
from cfsp.errors import CfspError, CheckpointError, UnsupportedModelError
from cfsp.export.folder import read_folder
from cfsp.export.gguf import export
from cfsp.inspection.numbers import open_config_source
from cfsp.inspection.report import build_report
from cfsp.model.tokenizer import load_tokenizer
from cfsp.system.storage import storage_problem
from cfsp.weights.gguf_header import read_header
from cfsp.weights.source import locate, with_weights
from tests.conftest import ROOT, SENTENCE, mentions
from tests.helpers.tiny import tiny_model

BUNDLED = ROOT / "cfsp" / "assets" / "books7m"


def section(path: Path, **keys) -> ModelSection:
    return ModelSection(name="m", path=str(path), **keys)


def tiny_file(tmp_path: Path, architecture: str = "llama", *, dtype: str = "f32", **settings) -> tuple[object, Path]:
    """A tiny model, and the GGUF file of it."""
    held = {"f16": torch.float16, "bf16": torch.bfloat16}.get(dtype, torch.float32)
    model = tiny_model(architecture, blocks=2, vocab_size=4096, **settings).to(held)
    save_checkpoint(model, tmp_path / "folder", source=BUNDLED, dtype=None)
    return model, export(read_folder(tmp_path / "folder"), tmp_path / f"tiny-{dtype}.gguf", dtype=dtype).place


@pytest.fixture(scope="module")
def bundled_file(tmp_path_factory) -> Path:
    return export(read_folder(BUNDLED), tmp_path_factory.mktemp("gguf") / "books7m.gguf", dtype="f32").place


@pytest.fixture
def damaged(bundled_file, tmp_path):
    """``damaged(change)``: a copy of the file whose bytes ``change`` has changed."""

    def of(change) -> Path:
        file = tmp_path / "damaged.gguf"
        file.write_bytes(change(bundled_file.read_bytes()))
        return file

    return of


def refused(file: Path, **keys) -> list[str]:
    with pytest.raises(CfspError) as caught:
        with_weights(locate(section(file, **keys)))
    return caught.value.problems


# Read back


def test_the_weights_and_tokens_of_an_exported_model_are_those_of_the_folder(bundled_file):
    (model, tokenizer), (back, tokenizer_back) = cfsp.load(BUNDLED), cfsp.load(bundled_file)
    ids = torch.tensor([tokenizer(SENTENCE).input_ids])
    assert tokenizer_back(SENTENCE).input_ids == ids[0].tolist()
    with torch.no_grad():
        assert torch.equal(back(ids).logits, model(ids).logits)
    for name in ("bos_token_id", "eos_token_id"):
        assert getattr(back.config, name) == getattr(model.config, name)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_each_family_that_is_exported_is_read_back(tmp_path, architecture):
    model, file = tiny_file(tmp_path, architecture)
    back, _ = cfsp.load(file)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, model.float()(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_the_scaling_of_rope_which_the_reader_leaves_out_is_read(tmp_path, rope):
    model, file = tiny_file(tmp_path, rope_parameters=rope)
    back, _ = cfsp.load(file)
    ids = torch.arange(48)[None]
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, model.float()(ids).logits, rtol=1e-4, atol=1e-4)


def test_factors_of_another_rope_are_refused(tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    _, file = tiny_file(tmp_path, rope_parameters=rope)
    mentions(refused(file), str(file), "rope_freqs.weight", "safetensors")


@pytest.mark.parametrize(("dtype", "stored"), [("f16", "float16"), ("bf16", "bfloat16"), ("q8_0", "float32")])
def test_the_stored_dtype_is_the_files_where_it_holds_the_values_and_float32_for_quantised_ones(
    tmp_path, dtype, stored
):
    _, file = tiny_file(tmp_path, dtype=dtype, tie_word_embeddings=True)
    source = with_weights(locate(section(file), tmp_path / "cache"))
    assert source.stored_dtype == stored
    assert source.gguf.quantisation.startswith(dtype.upper())
    header = read_header(file, "f")
    name = "blk.0.ffn_down.weight"
    stored_values = next(t for t in gguf.GGUFReader(file).tensors if t.name == name)
    values = torch.from_numpy(gguf.dequantize(stored_values.data, stored_values.tensor_type).copy())
    back, _ = cfsp.load(file)
    assert torch.equal(back.model.layers[0].mlp.down_proj.weight.float(), values)
    assert {tensor.name: tensor.shape for tensor in header.tensors}[name] == tuple(values.shape)


def test_a_written_folder_has_no_trace_of_the_quantiser_and_both_spellings_of_rope(tmp_path):
    _, file = tiny_file(tmp_path, dtype="q8_0")
    model, tokenizer = cfsp.load(file)
    save_checkpoint(model, tmp_path / "out", source=locate(section(file)).folder, dtype=None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quant" not in json.dumps(config)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["rms_norm_eps"] == model.config.rms_norm_eps
    assert "e" not in str(config["rope_theta"])
    again, _ = cfsp.load(tmp_path / "out")
    ids = torch.tensor([tokenizer(SENTENCE).input_ids])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_digits_of_smollm_are_split_from_the_spaces_before_them(tmp_path, monkeypatch):
    monkeypatch.setattr("cfsp.export.gguf_vocabulary.pre_tokenizer_name", lambda *_: ("smollm", ()))
    _, file = tiny_file(tmp_path)
    splitter = load_tokenizer(locate(section(file))).backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in splitter.pre_tokenize_str("a  12")] == ["a", "ĠĠ", "1", "2"]  # GPT-2: a, Ġ, Ġ12


def test_another_pre_tokenizer_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr("cfsp.export.gguf_vocabulary.pre_tokenizer_name", lambda *_: ("viking", ()))
    _, file = tiny_file(tmp_path)
    assert "viking" in locate(section(file)).gguf.notes[0]


# Which file


def test_a_folder_with_one_file_means_it_and_several_must_be_named(bundled_file, tmp_path):
    shutil.copy(bundled_file, tmp_path / "a.gguf")
    assert locate(section(tmp_path)).gguf.file == "a.gguf"
    shutil.copy(bundled_file, tmp_path / "b.gguf")
    mentions(refused(tmp_path), "2 GGUF files (a.gguf, b.gguf)", "model.gguf_file=NAME")
    assert locate(section(tmp_path, gguf_file="b.gguf")).gguf.file == "b.gguf"
    mentions(refused(tmp_path, gguf_file="c.gguf"), "model.gguf_file=c.gguf", "a.gguf, b.gguf")
    mentions(refused(tmp_path, gguf_file="../a.gguf"), "model.gguf_file=../a.gguf")
    mentions(refused(tmp_path / "a.gguf", gguf_file="b.gguf"), "model.gguf_file=b.gguf")


def test_safetensors_in_the_folder_come_first(bundled_file, tmp_path):
    shutil.copytree(BUNDLED, tmp_path / "model")
    shutil.copy(bundled_file, tmp_path / "model" / "a.gguf")
    assert locate(section(tmp_path / "model")).gguf is None
    assert locate(section(tmp_path / "model", gguf_file="a.gguf")).gguf is not None


def test_the_same_file_in_another_place_is_the_same_model_and_the_folder_is_kept(bundled_file, tmp_path):
    shutil.copy(bundled_file, tmp_path / "a.gguf")
    first = with_weights(locate(section(bundled_file), tmp_path / "cache"))
    stamp = (first.folder / "model.safetensors").stat().st_mtime_ns
    second = with_weights(locate(section(tmp_path / "a.gguf"), tmp_path / "cache"))
    assert first.fingerprint == second.fingerprint
    assert (second.folder / "model.safetensors").stat().st_mtime_ns == stamp


def test_no_weights_are_dequantised_before_a_model_is_loaded(bundled_file, tmp_path):
    source = locate(section(bundled_file), tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert with_weights(source).folder != source.folder


def test_inspect_reads_the_header_alone(bundled_file, tmp_path, monkeypatch):
    monkeypatch.setattr("cfsp.weights.gguf_model._tokenizer", None)  # must not be called
    with open_config_source(None, str(bundled_file)) as numbers:
        report = build_report(numbers)
    assert report.parameters == sum(p.numel() for p in cfsp.load(BUNDLED)[0].parameters())
    assert numbers.kind == "gguf"
    assert "F32" in numbers.notes[0]


# Bad files


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.99])
def test_a_file_that_was_cut_is_refused_before_anything_is_made_of_it(damaged, share):
    mentions(refused(damaged(lambda content: content[: int(len(content) * share)])), "damaged", "fetch it again")


@pytest.mark.parametrize(
    ("at", "value"), [(8, 2**62), (16, 2**62), (8, 2**20), (16, 9000), (24, 2**63)], ids=lambda value: str(value)
)
def test_absurd_counts_are_refused_at_once(damaged, at, value):
    changed = damaged(lambda content: content[:at] + struct.pack("<Q", value) + content[at + 8 :])
    mentions(refused(changed), "damaged.gguf", "fetch it again")


def test_a_long_array_that_is_not_there_is_refused_at_once(damaged):
    key = b"tokenizer.ggml.token_type" + struct.pack("<II", 9, 5)

    def longer(content: bytes) -> bytes:
        at = content.index(key) + len(key)
        return content[:at] + struct.pack("<Q", 2**40) + content[at + 8 :]

    mentions(refused(damaged(longer)), "damaged.gguf", "fetch it again")


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"PK\3\4" * 20, b"GGUF" + bytes(200)])
def test_what_is_no_gguf_file_is_refused(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    assert len(refused(tmp_path / "x.gguf")) == 1


def test_an_architecture_that_transformers_does_not_read_is_refused_with_those_that_it_reads(damaged):
    key = b"general.architecture" + struct.pack("<IQ", 8, 5)

    def other(content: bytes) -> bytes:
        return content.replace(key + b"llama", key + b"plamo")

    mentions(refused(damaged(other)), "plamo", "llama", "qwen3", "safetensors")


def test_a_part_of_a_split_model_is_refused(bundled_file, tmp_path):
    part = tmp_path / "m-00001-of-00002.gguf"
    shutil.copy(bundled_file, part)
    mentions(refused(part), "llama-gguf-split --merge")


def test_a_tensor_without_a_place_and_a_missing_one_are_refused(damaged):
    names = [b"blk.0.ffn_down.weight", b"blk.0.ffn_dowm.weight"]
    mentions(refused(damaged(lambda content: content.replace(*names))), "down_proj", "missing")


def test_metadata_of_another_size_than_the_tensors_is_refused(damaged):
    key = b"llama.feed_forward_length" + struct.pack("<I", 4)

    def narrower(content: bytes) -> bytes:
        at = content.index(key) + len(key)
        return content[:at] + struct.pack("<I", 64) + content[at + 4 :]

    with pytest.raises((CheckpointError, UnsupportedModelError)):
        with_weights(locate(section(damaged(narrower))))


U32, TEXT = 4, 8


def with_value(content: bytes, key: str, kind: int | None, value: bytes = b"", *, size: int = 4) -> bytes:
    """The file with another value of a key whose value now has ``size`` bytes; ``kind`` None: without the key.

    The tensors keep their places, because spaces in the name of the model make up for the bytes.
    """
    at = content.index(struct.pack("<Q", len(key)) + key.encode())
    end = at + 8 + len(key) + 4 + size
    entry = b"" if kind is None else content[at : end - 4 - size] + struct.pack("<I", kind) + value
    changed = content[:at] + entry + content[end:]
    keys = struct.unpack_from("<Q", content, 16)[0] + (0 if kind is None else 1)
    name = struct.pack("<Q", 5) + b"cfsp." + struct.pack("<I", TEXT)
    fill = -(len(changed) - len(content) + len(name) + 8) % 32
    filler = name + struct.pack("<Q", fill) + b" " * fill
    return changed[:16] + struct.pack("<Q", keys) + filler + changed[24:]


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [
        ("llama.block_count", U32, struct.pack("<I", 9)),
        ("llama.block_count", U32, struct.pack("<I", 2**31)),
        ("llama.block_count", 5, struct.pack("<i", -1)),
        ("llama.embedding_length", U32, struct.pack("<I", 128)),
        ("llama.context_length", U32, bytes(4)),
        ("llama.context_length", 10, struct.pack("<Q", 2**40)),
        ("llama.context_length", TEXT, struct.pack("<Q", 4) + b"word"),
        ("llama.context_length", 9, struct.pack("<IQI", 4, 1, 7)),
        ("llama.attention.head_count", 7, b"\1"),
        ("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", float("nan"))),
        ("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", -1e-5)),
        ("llama.rope.freq_base", 6, struct.pack("<f", float("inf"))),
        ("llama.rope.freq_base", 9, struct.pack("<IQQ", 8, 1, 1) + b"a"),
        ("tokenizer.ggml.bos_token_id", U32, struct.pack("<I", 4096)),
        ("tokenizer.ggml.eos_token_id", 5, struct.pack("<i", -1)),
    ],
    ids=str,
)
def test_a_wrong_value_in_the_metadata_is_named_before_anything_is_made_of_the_file(damaged, key, kind, value):
    lines = refused(damaged(lambda content: with_value(content, key, kind, value)))
    assert len(lines) == 1
    mentions(lines, "damaged.gguf", f"{key}=", "fetch it again")


@pytest.mark.parametrize(
    "key", ["block_count", "context_length", "attention.head_count", "attention.layer_norm_rms_epsilon"]
)
def test_a_setting_that_is_missing_is_not_replaced_by_the_default_of_the_class(damaged, key):
    lines = refused(damaged(lambda content: with_value(content, f"llama.{key}", None)))
    mentions(lines, f"lacks llama.{key}", "default")


def test_the_filler_of_these_tests_alone_changes_nothing(damaged, bundled_file):
    same = damaged(lambda content: with_value(content, "llama.context_length", U32, struct.pack("<I", 512)))
    assert read_header(same, "x").tensors == read_header(bundled_file, "x").tensors
    assert locate(section(same)).config == locate(section(bundled_file)).config


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        (b"tokenizer.ggml.merges", b"tokenizer.ggml.mergeX", "has no tokenizer.ggml.merges"),
        (b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenX", "has no tokenizer.ggml.tokens"),
        (b"llama.context_length", b"llama.context_l\0ngth", "header cannot be read"),
        (struct.pack("<Q", 3) + b"the", struct.pack("<Q", 3) + b"t\xffe", "header cannot be read"),
    ],
)
def test_keys_and_tokens_that_are_no_text_or_missing(damaged, old, new, part):
    lines = refused(damaged(lambda content: content.replace(old, new, 1)))
    assert lines[0].isprintable()
    mentions(lines, part)


def test_weights_that_are_not_finite_are_refused_when_they_are_loaded(damaged):
    file = damaged(lambda content: content[:-4] + struct.pack("<f", float("nan")))
    with pytest.raises(CfspError, match="NaN"):
        cfsp.load(file)


def test_links_fifos_and_folders_with_the_name_of_a_gguf_file(bundled_file, tmp_path):
    (tmp_path / "folder.gguf").mkdir()
    os.mkfifo(tmp_path / "fifo.gguf")
    (tmp_path / "link.gguf").symlink_to(bundled_file)
    assert locate(section(tmp_path)).gguf.file == "link.gguf"
    mentions(refused(tmp_path / "fifo.gguf"), "neither a folder nor a regular file")
    mentions(refused(tmp_path / "folder.gguf"), "the folder is empty")
    lines = refused(tmp_path, gguf_file="fifo.gguf")
    mentions(lines, "model.gguf_file=fifo.gguf: no such file", "there link.gguf can be found")
    bundled = ModelSection(name="m", path="pkg://assets/books7m", gguf_file="x.gguf")
    with pytest.raises(CheckpointError, match=r"model\.gguf_file=x\.gguf.*leave it out"):
        locate(bundled)


def test_an_export_of_a_gguf_file_is_answered_with_the_way_out(bundled_file, tmp_path):
    shutil.copy(bundled_file, tmp_path / "x.gguf")
    for place in (tmp_path, tmp_path / "x.gguf"):
        with pytest.raises(CheckpointError, match=r"GGUF file.*give the folder that it was made of"):
            read_folder(place)


def test_a_full_disk_names_the_key_and_the_file_and_leaves_no_scratch_folder(bundled_file, tmp_path, monkeypatch):
    def full(*_, **__):
        raise Exception("No space left on device (os error 28)")  # the class that tokenizers raises

    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
        with pytest.raises(CfspError, match=r"^paths\.cache_dir=.*the disk is full.*tokenizer\.json failed") as caught:
            locate(section(bundled_file), tmp_path / "cache")
    assert len(caught.value.problems) == 1
    assert not list((tmp_path / "cache").rglob(".outline*"))
    assert with_weights(locate(section(bundled_file), tmp_path / "cache")).folder.is_dir()


def test_weights_that_the_disk_does_not_take_name_their_file(bundled_file, tmp_path, monkeypatch):
    def full(self, folder, **_):
        (Path(folder) / "model.safetensors").write_bytes(b"begun")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    source = locate(section(bundled_file), tmp_path)
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(CheckpointError, match="model.safetensors failed") as caught:
        with_weights(source)
    line = storage_problem(caught.value, {"paths.output_dir": tmp_path / "out", "paths.cache_dir": tmp_path})
    assert line.startswith(f"paths.cache_dir={tmp_path}: the disk is full")
    assert "model.safetensors failed" in line
