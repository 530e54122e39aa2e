"""Values of the wrong kind in the JSON files of a model folder, for every key that is looked at."""

from __future__ import annotations

import json
import shutil

import pytest

from cfsp.config.sections import ModelSection
from cfsp.errors import CheckpointError
from cfsp.export.folder import read_folder
from cfsp.weights.config_values import check_values
from cfsp.weights.source import locate
from tests.conftest import ROOT, mentions

BUNDLED = ROOT / "cfsp" / "assets" / "books7m"


@pytest.fixture
def changed(tmp_path):
    """``changed(name, key, value)``: a copy of the bundled model with another value in one of its files."""

    def of(name: str, key: str, value: object):
        folder = shutil.copytree(BUNDLED, tmp_path / "model")
        file = folder / name
        values = json.loads(file.read_text()) if file.is_file() else {}
        file.unlink(missing_ok=True)
        file.write_text(json.dumps(values | {key: value}))
        return folder

    return of


@pytest.mark.parametrize("read", [read_folder, lambda folder: locate(ModelSection(name="m", path=str(folder)))])
@pytest.mark.parametrize(
    ("name", "key", "value", "part"),
    [
        ("config.json", "model_type", ["llama"], "a name"),
        ("config.json", "rope_parameters", "default", "an object"),
        ("config.json", "rope_scaling", 2.0, "an object"),
        ("config.json", "architectures", "LlamaForCausalLM", "a list of class names"),
        ("config.json", "tie_word_embeddings", "no", "true or false"),
        ("config.json", "eos_token_id", "2", "a token id"),
        ("config.json", "text_config", [], "an object"),
        ("config.json", "layer_types", [1, 2], "a list of a name for each layer"),
        ("generation_config.json", "bos_token_id", {"id": 1}, "a token id"),
        ("generation_config.json", "eos_token_id", [[2]], "a token id"),
        ("generation_config.json", "pad_token_id", True, "a token id"),
    ],
)
def test_a_value_of_another_kind_is_named_with_what_its_key_takes(changed, name, key, value, part, read):
    with pytest.raises(CheckpointError) as caught:
        read(changed(name, key, value))
    mentions(caught.value.problems, name, f"{key}={value}", part)


def test_the_kinds_that_published_models_use_are_taken():
    check_values(
        {
            "model_type": "llama", "architectures": None, "rope_scaling": None, "rope_parameters": {"rope_theta": 1e4},
            "eos_token_id": [1, 2], "bos_token_id": 1, "pad_token_id": -1, "tie_word_embeddings": False,
            "text_config": {"model_type": "gemma3_text", "layer_types": ["full_attention"]},
        },
        "config.json",
    )  # fmt: skip


def test_a_value_in_the_nested_text_model_is_named_with_its_place():
    with pytest.raises(CheckpointError, match="text_config.model_type=5"):
        check_values({"model_type": "gemma3", "text_config": {"model_type": 5}}, "config.json")
