"""Damage that was found late, or told in the words of a library: it is refused before any work, in one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from cfsp.checkpoint.reference import is_reference, read_reference
from cfsp.errors import CheckpointError
from cfsp.export.card import read_licence
from cfsp.record.finished import find_run_damage
from cfsp.record.run_record import RunRecord
from cfsp.weights.shards import read_header
from tests.conftest import mentions

pytestmark = pytest.mark.usefixtures("one_thread")


def _set(file: Path, **settings) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("streaming", ["on", "off"])
def test_generation_settings_that_transformers_cannot_use(model_folder, refused, sound_words, streaming):
    _set(model_folder / "generation_config.json", stop_strings=[{"a": 1}], cache_implementation={"a": 1})
    lines = refused(*sound_words, f"model.streaming={streaming}")
    mentions(lines, "model.path=", "generation_config.json", "fetch the file again, or remove it")


def test_a_tokenizer_that_loads_and_cannot_tokenise(model_folder, refused, sound_words):
    _set(model_folder / "tokenizer_config.json", model_max_length=[1])
    lines = refused(*sound_words)
    mentions(lines, "model.path=", "no tokenizer that transformers loads")
    assert "TypeError" not in lines[0]


def test_a_tokenizer_of_another_form_is_refused_without_class_names(model_folder, refused, sound_words):
    _set(model_folder / "tokenizer.json", model=True)
    lines = refused(*sound_words)
    mentions(lines, "no tokenizer that transformers loads", "copy the tokenizer files there")
    assert "AttributeError" not in lines[0]


def test_links_in_a_circle(model_folder, refused, sound_words):
    for name in ("cfsp_checkpoint.json", "LICENSE"):
        (model_folder / name).symlink_to(model_folder / name)
        mentions(refused(*sound_words), name, "cannot be read")
        (model_folder / name).unlink()


def test_an_adapter_that_is_no_file(model_folder, refused, sound_words):
    (model_folder / "adapter_config.json").mkdir()
    mentions(refused(*sound_words), "PEFT adapter", "move adapter_config.json away")


@pytest.mark.parametrize("header", ["[]", "3", '{"a": 3}', '{"a": {"dtype": []}}', "{", '{"a": {"data_offsets": [0]}}'])
def test_an_invalid_header_is_described_in_plain_words(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(CheckpointError, match="header cannot be read") as caught:
        read_header(file)
    assert "Error(" not in str(caught.value)


@pytest.mark.parametrize("key", ["model.name", "pruner.name"])
def test_a_quoted_name_in_a_sweep_is_shown_as_it_was_given(refused, key):
    lines = refused("-m", f"{key}=a,'../../x'")
    mentions(lines, f"{key}=../../x", "becomes the name of a folder")


def test_a_record_whose_files_are_no_list_of_files_is_not_finished(run_cfsp, sound_words, tmp_path):
    words = [word for word in sound_words if word != "save.model=false"]
    assert run_cfsp(*words)[0] == 0
    out = tmp_path / "out"
    shutil.rmtree(tmp_path / "records")
    for files in ([], 5, "x"):
        _set(out / "record.json", files=files)
        record = RunRecord.read(out / "record.json")
        assert "which files were written" in str(find_run_damage(record, out, model=True))


def test_a_reference_that_is_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "reference.safetensors")
    assert not is_reference(tmp_path / "reference.safetensors")
    with pytest.raises(CheckpointError, match="a FIFO"):
        read_reference(tmp_path / "reference.safetensors")


@pytest.mark.parametrize("name", ["plan.json", "blocks.png", "config.yaml", "run.log", "record.json"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_something_else_where_a_run_writes_a_file(run_cfsp, sound_words, tmp_path, name, make):
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / name)
    code, _, err = run_cfsp(*sound_words)
    lines = [line for line in err.splitlines() if line.startswith("cfsp: ")]
    assert code == 2, err
    mentions(lines, name)
    assert "calibrate" not in err


def test_a_card_is_read_for_its_licence_within_bounds(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n")
    assert read_licence(tmp_path) == {"license": "mit"}
    card.write_text(f"---\nlicense: {'[' * 100_000}\n---\n")
    assert read_licence(tmp_path) == {}
    for make in (os.mkfifo, lambda place: place.symlink_to("/dev/zero"), lambda place: place.symlink_to(place)):
        card.unlink()
        make(card)
        assert read_licence(tmp_path) == {}


def test_a_configuration_with_labels_without_end(model_folder, refused, sound_words):
    _set(model_folder / "config.json", num_labels=10**9)
    mentions(refused(*sound_words), "num_labels=1,000,000,000", "more than the 10,000")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rms_norm_eps": "x"}, "rms_norm_eps is"),
        ({"num_attention_heads": 3}, "3"),
        ({"eos_token_id": True}, "eos_token_id=True, where the key takes a token id"),
    ],
)
def test_a_value_that_transformers_refuses_is_reported(model_folder, refused, sound_words, settings, said):
    _set(model_folder / "config.json", **settings)
    lines = refused(*sound_words)
    mentions(lines, "model.path=", said)
    assert "alidation error" not in lines[0]
    assert "validator" not in lines[0]


def test_a_header_of_very_many_tensors(tmp_path):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{at}": entry for at in range(200_001)}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="names 200,001 tensors, at most 200,000"):
        read_header(tmp_path / "model.safetensors")
