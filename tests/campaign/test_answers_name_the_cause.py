"""Answers to single bad inputs: which file or key is at fault, in few lines, and before anything is written."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import cfsp.cli.export
import cfsp.cli.inspect
from cfsp.errors import UnsupportedModelError
from cfsp.pruned_model.stock import stock_classes
from cfsp.system.package import ROOT
from tests.conftest import mentions
from tests.helpers.wrong_values import check_lines


def _header(file: Path, **metadata: object) -> None:
    """Replace ``__metadata__`` of a safetensors file."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    text = json.dumps(json.loads(content[8 : 8 + length]) | metadata).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize("metadata", [[1], {"a": 1}, "pt", 7])
@pytest.mark.parametrize("streaming", ["off", "on"])
def test_metadata_of_a_safetensors_file_that_is_no_group_of_texts(
    refused, sound_words, model_folder, metadata, streaming
) -> None:
    _header(model_folder / "model.safetensors", __metadata__=metadata)
    mentions(refused(*sound_words, f"model.streaming={streaming}"), "model.safetensors", "__metadata__")


@pytest.mark.parametrize("content", ["[]", "7", '"text"', "null"])
def test_a_tokenizer_that_is_no_object(refused, sound_words, model_folder, content) -> None:
    (model_folder / "tokenizer.json").write_text(content)
    mentions(refused(*sound_words), "tokenizer.json holds no object")


@pytest.mark.parametrize("key", ["model", "added_tokens", "pre_tokenizer"])
def test_a_tokenizer_with_a_value_of_a_wrong_kind(refused, sound_words, model_folder, key) -> None:
    content = json.loads((model_folder / "tokenizer.json").read_text())
    (model_folder / "tokenizer.json").write_text(json.dumps(content | {key: 5}))
    lines = refused(*sound_words)
    mentions(lines, "model.path=", "tokenizer")
    check_lines(lines)


@pytest.mark.parametrize("content", ["", "[]", '{"a":' * 60_000, "\0", "[" * 100_000])
@pytest.mark.parametrize("form", ["hf", "padded", "gguf"])
def test_a_damaged_tokenizer_is_not_exported(model_folder, tmp_path, capsys, content, form) -> None:
    (model_folder / "tokenizer.json").write_text(content)
    to = tmp_path / "exported.gguf"
    assert cfsp.cli.export.main([f"path={model_folder}", f"format={form}", f"to={to}"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    check_lines(lines)
    mentions(lines, "tokenizer.json")
    assert not to.exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_folder_in_the_place_of_a_tokenizer_file(model_folder, tmp_path, capsys, name) -> None:
    (model_folder / name).unlink()
    (model_folder / name).mkdir()
    assert cfsp.cli.export.main([f"path={model_folder}", "format=hf", f"to={tmp_path / 'exported'}"]) == 2
    mentions(capsys.readouterr().err.strip().splitlines(), name, "folder")


def test_a_link_that_leads_to_itself(model_folder, tmp_path, capsys) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for command in (
        lambda: cfsp.cli.inspect.main([f"path={loop}"]),
        lambda: cfsp.cli.export.main([f"path={model_folder}", "format=hf", f"to={loop}"]),
    ):
        assert command() == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        mentions(lines, "loop", "link")
        check_lines(lines)


def test_many_findings_are_six_lines(run_cfsp, sound_words) -> None:
    code, _, err = run_cfsp(*sound_words, "+model@y=local")
    lines = [line for line in err.splitlines() if line.startswith("cfsp: ")]
    assert code == 2
    assert len(lines) == 6
    assert re.fullmatch(r"cfsp: and \d+ more of this kind; mend these first", lines[-1])


@pytest.mark.parametrize("key", ["output_dir", "records_dir", "cache_dir"])
def test_a_folder_that_is_null(run_cfsp, sound_words, key) -> None:
    words = [word for word in sound_words if not word.startswith(f"paths.{key}=")]
    code, _, err = run_cfsp(*words, f"paths.{key}=null")
    lines = err.strip().splitlines()
    assert code == 2
    mentions(lines, f"paths.{key}=null: expected ")
    check_lines(lines)


@pytest.mark.parametrize("target", ["cfsp", "cfsp.", "cfsp.importance.cfsp.nope", "cfsp.nope.Nope"])
def test_a_class_that_is_not_there(refused, sound_words, target) -> None:
    lines = refused(*sound_words, f"importance._target_={target}")
    mentions(lines, f"importance._target_={target}")
    check_lines(lines)


def test_a_model_type_that_transformers_does_not_have() -> None:
    with pytest.raises(UnsupportedModelError, match="model_type=nobodys: .*pruner=none"):
        stock_classes("nobodys")


def test_an_interrupt_while_python_ends_does_not_change_how_a_command_ended() -> None:
    # What is registered after the import is called before what cfsp has registered, and a thread still runs then.
    code = (
        "import atexit, os, signal, sys; sys.argv = ['cfsp']; import cfsp\n"
        "class Last:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGINT); os.write(1, b'whole')\n"
        "last = Last()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "whole", "")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", {"a": 1}), ("hidden_size", None), ("intermediate_size", 1.5), ("vocab_size", "x"),
        ("num_attention_heads", 0), ("num_key_value_heads", [1]), ("head_dim", -1), ("num_hidden_layers", True),
        ("architectures", 5), ("architectures", [None]), ("per_layer_config", {"1": {"intermediate_size": 1.5}}),
        ("per_layer_config", [1]), ("per_layer_config", {"x": {}}), ("added_bias", {"0": 5}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["hf", "padded", "gguf"])
def test_an_export_names_the_key_of_config_json(model_folder, tmp_path, capsys, key, value, form) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {key: value}))
    assert cfsp.cli.export.main([f"path={model_folder}", f"format={form}", f"to={tmp_path / 'exported.gguf'}"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    check_lines(lines)
    mentions(lines, key)


@pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", None), ("pretraining_tp", "gone"), ("pad_token_id", "x")])
def test_a_gguf_file_names_the_key_that_transformers_refuses(model_folder, tmp_path, capsys, key, value) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {key: value}))
    assert cfsp.cli.export.main([f"path={model_folder}", "format=gguf", f"to={tmp_path / 'exported.gguf'}"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    check_lines(lines)
    mentions(lines, f"{key}={value}")
