"""Bad input is refused with one clear line per finding and exit code 2, before any weight is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from cfsp.config.compose import compose
from cfsp.config.parse import parse
from cfsp.errors import ConfigError
from cfsp.system import hub
from cfsp.weights.source import ModelSource
from tests.conftest import POSITIONS, SENTENCE, VOCABULARY, mentions, save_with_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def without(words: list[str], *keys: str) -> list[str]:
    """The words whose keys do not start with any of ``keys``."""
    return [word for word in words if not word.startswith(keys)]


def test_the_command_line_that_these_tests_damage_is_sound(run_cfsp, sound_words):
    code, _, err = run_cfsp(*sound_words)
    assert code == 0, err


# Values


def _problems(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as found:
        parse(compose(words))
    return list(found.value.problems)


@pytest.mark.parametrize("ratio", ["0", "1", "-0.1", "1.2", "abc", "nan", "inf", "-inf", "''", "null", "[0.2]"])
def test_ratio(ratio):
    mentions(_problems(f"sparsity.ratio={ratio}"), f"sparsity.ratio={ratio}: ", "the fraction to remove, e.g.")


@pytest.mark.parametrize(
    ("word", "way_out"),
    [
        ("sparsity.round_to=0", "a whole number from 1"),
        ("sparsity.round_to=-3", "a whole number from 1"),
        ("sparsity.round_to=1.5", "whole number"),
        ("sparsity.min_width=0", "a whole number from 1"),
        ("sparsity.scope=fnn", "did you mean ffn?"),
        ("sparsity.rounding=nearst", "did you mean nearest?"),
        ("model.dtype=flaot16", "did you mean float16?"),
        ("model.dtype=int8", "expected auto, float32, bfloat16 or float16"),
        ("model.device=gpu", "cuda"),
        ("model.device=cuda:x", "cuda:N"),
        ("model.trust_remote_code=perhaps", "true or false"),
        ("calibration.n_samples=0", "a whole number from 1"),
        ("calibration.seq_len=1", "a whole number from 2"),
        ("calibration.batch_size=0", "auto or a whole number from 1"),
        ("calibration.sampling=sequental", "did you mean sequential?"),
        ("allocator.metric=anglar", "did you mean angular?"),
        ("allocator.temperature=nan", "finite"),
        ("allocator.temperature=-1", "number from 0"),
        ("pruner.structure=attention", "expected ffn, heads, heads_ffn or experts"),
        ("seed=-1", "number from 0"),
        ("seed=1.5", "whole number"),
        ("force=maybe", "true or false"),
        ("save.dtype=int8", "expected float32, bfloat16, float16 or null"),
        ("save.format=onnx", "hf, padded, gguf or decilm"),
        ("plugins.allow=mine", "plugins.allow=[my_package]"),
        ("paths.cache_dir=''", "not empty"),
        ("evaluation.perplexity.seq_len=1", "a whole number from 2"),
        ("evaluation.perplexity.datasets=[]", "1 or more"),
        ("evaluation.perplexity.datasets=[bundeld]", "did you mean bundled?"),
        ("evaluation.perplexity.windows=[5,3]", "first < end"),
        ("evaluation.perplexity.windows=[5]", "item 2 is missing"),
        ("evaluation.perplexity.texts.bundled.bos=begin", "none, start or window"),
        ("evaluation.zero_shot.limit=0", "a whole number from 1"),
        ("evaluation.zero_shot.tasks=[]", "1 or more"),
        ("evaluation.cost.repeats=0", "a whole number from 1"),
    ],
)
def test_value(word, way_out):
    key, _, value = word.partition("=")
    mentions(_problems(word), key, value.strip("'[]"), way_out)


def test_importance_variant(refused):
    lines = refused("importance=cfsp_released", "importance.variant=one_w")
    mentions(lines, "importance.variant=one_w: ", "wanda_base or mag_base", "did you mean one_wa?")


def test_wrong_values_are_reported_together(refused):
    lines = refused("sparsity.ratio=2", "sparsity.round_to=0", "model.dtype=int8", "allocator.temperature=-1", "seed=x")
    keys = {line.partition("=")[0] for line in lines}
    assert keys == {"sparsity.ratio", "sparsity.round_to", "model.dtype", "allocator.temperature", "seed"}


@pytest.mark.parametrize(
    ("given", "key"),
    [
        (["model=local"], "model.path"),
        (["calibration=text"], "calibration.path"),
        (["calibration=tokens"], "calibration.path"),
        (["calibration=ptb"], "calibration.path"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_required_path_is_not_given(given, key):
    mentions(_problems(*given), f"{key}=null: ", given[0], "give a")


def test_device_that_is_not_there(refused, sound_words):
    lines = refused(*sound_words, "model.device=cuda:7")
    mentions(lines, "model.device=cuda:7: ", "model.device=auto or cpu")


# Budget


@pytest.mark.parametrize("scope", ["ffn", "decoder", "model"])
def test_a_ratio_that_cannot_be_met_names_one_that_can(refused, run_cfsp, sound_words, tmp_path, scope):
    words = [*sound_words, f"sparsity.scope={scope}"]
    lines = refused(*words, "sparsity.ratio=0.97")
    mentions(lines, "sparsity.ratio=0.97", f"sparsity.scope={scope}", "cannot be met")
    largest = lines[0].partition("use sparsity.ratio=")[2].split()[0]
    code, _, err = run_cfsp(*words, f"sparsity.ratio={largest}")
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["plan"]["achieved"]["ratio"] == pytest.approx(float(largest), abs=1e-3)


@pytest.mark.parametrize("word", ["sparsity.min_width=65", "sparsity.min_width=1000", "sparsity.round_to=128"])
def test_a_smallest_width_that_leaves_nothing_to_remove(refused, sound_words, word):
    mentions(refused(*sound_words, word), "sparsity.ratio=0.5", word, "width 64", "smaller")


# Model folders


def _no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def _file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _without(name: str):
    return lambda folder: (folder / name).unlink()


def _config(**changes):
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return damage


def _config_text(text: str):
    return lambda folder: (folder / "config.json").write_text(text)


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _contradicting(folder: Path) -> None:
    """A shape that does not take the bytes the header gives it; names, sizes and the file's length are right."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    assert content.count(b"[64,16]")
    file.write_bytes(content.replace(b"[64,16]", b"[64,15]"))


def _weights(change):
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def _without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


_NORM, _UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        pytest.param(_no_folder, ["no such folder"], id="no folder"),
        pytest.param(_file, ["this is a file"], id="file"),
        pytest.param(_empty, ["the folder is empty", "config.json"], id="empty"),
        pytest.param(_without("config.json"), ["no config.json", "save_pretrained"], id="no config"),
        pytest.param(_config_text('{"model_type": '), ["config.json is not valid JSON", "fetch"], id="broken config"),
        pytest.param(_config_text("[1, 2]"), ["config.json", "object"], id="config that is a list"),
        pytest.param(_config_text("{}"), ["model_type"], id="config without model_type"),
        pytest.param(_config(hidden_size="wide"), ["hidden_size"], id="config of wrong types"),
        pytest.param(_config(num_attention_heads=0, num_key_value_heads=0), ["model.path="], id="config of no heads"),
        pytest.param(_config(quantization_config={"quant_method": "gptq"}), ["quantised (gptq)"], id="quantised"),
        pytest.param(_without("model.safetensors"), ["*.safetensors", "save_pretrained"], id="no weights"),
        pytest.param(_pickled, ["*.safetensors", "pytorch_model.bin", "never loaded"], id="pickled weights"),
        pytest.param(_truncated, ["model.safetensors", "truncated", "fetch"], id="truncated weights"),
        pytest.param(_contradicting, ["model.safetensors", "[64, 15]", "fetch"], id="header that contradicts itself"),
        pytest.param(_weights(lambda w: w.pop(_UP)), ["1 weights are missing", _UP], id="missing tensor"),
        pytest.param(_config(intermediate_size=48), ["mlp", "[64, 16]", "[48, 16]"], id="config of another width"),
        pytest.param(_config(num_hidden_layers=3), ["weights are missing", "layers.2"], id="config of more layers"),
        pytest.param(_without_tokenizer, ["no tokenizer", "copy the tokenizer files"], id="no tokenizer"),
        pytest.param(_config(model_type="lama"), ["does not know this model", "lama"], id="unknown model_type"),
        pytest.param(
            _config(model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}),
            ["auto_map", "model.trust_remote_code=true"],
            id="code of its own",
        ),
    ],
)
def test_model_folder(refused, sound_words, model_folder, damage, parts):
    damage(model_folder)
    mentions(refused(*sound_words), str(model_folder), *parts)


def test_nan_weights(refused, run_cfsp, sound_words, model_folder, tmp_path):
    _weights(lambda weights: weights[_UP].view(-1)[5:6].fill_(float("nan")))(model_folder)
    mentions(refused(*sound_words, loads=True), f"model.path={model_folder}", _UP, "NaN")
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert (record["status"], record["error"]["type"]) == ("failed", "CheckpointError")


def test_unsupported_structure_says_what_was_looked_for(refused, sound_words, model_folder):
    from transformers import CTRLConfig, CTRLLMHeadModel

    shutil.rmtree(model_folder)
    sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "dff": 32}
    save_with_tokenizer(CTRLLMHeadModel(CTRLConfig(vocab_size=VOCABULARY, **sizes)), model_folder)
    mentions(refused(*sound_words), str(model_folder), "CTRLLMHeadModel", "looked for", "found")


def test_a_config_without_positions_does_no_harm(run_cfsp, sound_words, model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    del config["max_position_embeddings"]
    (model_folder / "config.json").write_text(json.dumps(config))
    code, _, err = run_cfsp(*sound_words)
    assert code == 0, err


# Calibration


def _parquet(path: Path, **columns) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def _written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        pytest.param(lambda d: d / "none.txt", ["no such file", ".jsonl"], id="missing"),
        pytest.param(lambda d: d, ["this is a folder", "prose.txt"], id="folder"),
        pytest.param(lambda d: _written(d / "a.txt", ""), ["is empty"], id="empty"),
        pytest.param(lambda d: _written(d / "a.txt", " \n\t\n"), ["white space only"], id="white space"),
        pytest.param(lambda d: _written(d / "a.txt", b"\xff\xfe\x00\x80"), ["cannot be read"], id="not utf-8"),
        pytest.param(lambda d: _written(d / "a.jsonl", '{"text": "a"}\n{"te'), ["line 2", "JSON"], id="broken jsonl"),
        pytest.param(
            lambda d: _written(d / "a.jsonl", '{"body": "a"}\n'),
            ["text_field=text", "body"],
            id="jsonl field",
        ),
        pytest.param(
            lambda d: _written(d / "a.json", "[1, 2]"), ["row 1 is the number 1", "no such text"], id="json list"
        ),
        pytest.param(lambda d: _parquet(d / "a.parquet", body=["a"]), ["text_field=text", "body"], id="parquet field"),
        pytest.param(lambda d: _parquet(d / "a.parquet", text=[None]), ["row 1", "null"], id="parquet null"),
        pytest.param(lambda d: _written(d / "a.parquet", "PAR1"), ["cannot be read"], id="broken parquet"),
        pytest.param(lambda d: _written(d / "a.jsonl.gz", "text"), ["cannot be read"], id="not gzip"),
    ],
)
def test_calibration_text(refused, sound_words, tmp_path, make, parts):
    path = make(tmp_path)
    mentions(refused(*sound_words, f"calibration.path={path}"), "calibration.", str(path), *parts)


@pytest.mark.parametrize(("sampling", "repeats"), [("random", 1), ("sequential", 4)])
def test_calibration_text_that_is_too_short(refused, sound_words, prose_file, sampling, repeats):
    prose_file.write_text(SENTENCE * repeats)
    lines = refused(*sound_words, f"calibration.sampling={sampling}")
    mentions(lines, "calibration", "tokens, ", "n_samples=4", "seq_len=32", sampling, "longer text")


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        pytest.param(lambda p: None, ["no such file"], id="missing"),
        pytest.param(lambda p: np.save(p, np.zeros((0, 8), np.int64)), ["[n, T]", "(0, 8)"], id="empty"),
        pytest.param(lambda p: p.touch(), ["not a .npy file"], id="no bytes"),
        pytest.param(lambda p: np.save(p, np.ones((2, 8))), ["integers", "float64"], id="floats"),
        pytest.param(lambda p: np.save(p, np.ones((2, 8), bool)), ["integers", "bool"], id="booleans"),
        pytest.param(lambda p: np.save(p, np.arange(8)), ["[n, T]", "(8,)"], id="one dimension"),
        pytest.param(lambda p: np.save(p, np.full((2, 8), VOCABULARY)), ["vocabulary of 4096"], id="too large"),
        pytest.param(lambda p: np.save(p, np.full((2, 8), -1)), ["-1", "vocabulary"], id="negative"),
        pytest.param(lambda p: np.save(p, np.array([[{}]]), allow_pickle=True), ["not a .npy file"], id="pickled"),
        pytest.param(lambda p: p.write_text("1 2 3"), ["not a .npy file"], id="text"),
        pytest.param(lambda p: np.savez(p.open("wb"), a=np.ones(3)), ["[n, T]"], id="npz"),
        pytest.param(lambda p: np.save(p, np.ones((2, 80), np.int64)), ["80", "64 positions"], id="too long"),
    ],
)
def test_calibration_tokens(refused, sound_words, tmp_path, make, parts):
    path = tmp_path / "ids.npy"
    make(path)
    words = without(sound_words, "calibration")
    lines = refused(*words, "calibration=tokens", f"calibration.path={path}")
    mentions(lines, "calibration.", *parts)


def test_more_calibration_tokens_than_the_file_holds(refused, sound_words, tmp_path):
    np.save(tmp_path / "ids.npy", np.ones((2, 8), np.int64))
    words = without(sound_words, "calibration")
    lines = refused(*words, "calibration=tokens", f"calibration.path={tmp_path}/ids.npy", "calibration.n_samples=3")
    mentions(lines, "2 x 8", "calibration.n_samples=3")


# Windows and the model's positions


@pytest.mark.parametrize(
    ("replaced", "given", "key"),
    [
        ("calibration.seq_len", ["calibration.seq_len=65"], "calibration.seq_len=65"),
        ("calibration", ["calibration=self", "calibration.seq_len=65"], "calibration.seq_len=65"),
        (
            "evaluation",
            ["evaluation=perplexity", "evaluation.perplexity.seq_len=65"],
            "evaluation.perplexity.seq_len=65",
        ),
        (
            "evaluation",
            ["evaluation=quick", "evaluation.zero_shot=null", "evaluation.perplexity=null"],
            "evaluation.cost.prompt_tokens",
        ),
    ],
    ids=["calibration", "self", "perplexity", "cost"],
)
def test_a_window_longer_than_the_models_positions(refused, sound_words, replaced, given, key):
    lines = refused(*without(sound_words, replaced), *given)
    mentions(lines, key, f"{POSITIONS} positions", f"use {POSITIONS} or less")


# Evaluation


@pytest.fixture
def perplexity(sound_words, prose_file) -> list[str]:
    """``sound_words`` with a perplexity on the local text."""
    return [
        *without(sound_words, "evaluation"),
        "evaluation=perplexity",
        "evaluation.perplexity.datasets=[text]",
        f"evaluation.perplexity.texts.text.path={prose_file}",
        "evaluation.perplexity.seq_len=32",
    ]


def test_perplexity_of_a_text_that_is_not_given(refused, perplexity):
    lines = refused(*perplexity, "evaluation.perplexity.datasets=[ptb]")
    mentions(lines, "evaluation.perplexity.texts.ptb.path=null", "give a local")


def test_perplexity_of_a_text_that_is_too_short(refused, perplexity, tmp_path):
    (tmp_path / "short.txt").write_text(SENTENCE)
    lines = refused(*perplexity, f"evaluation.perplexity.texts.text.path={tmp_path}/short.txt")
    mentions(lines, "0 windows of 32 tokens", "longer text", "evaluation.perplexity.seq_len")


def test_perplexity_windows_beyond_the_end(refused, perplexity):
    lines = refused(*perplexity, "evaluation.perplexity.windows=[2,5000]")
    mentions(lines, "evaluation.perplexity.windows=[2,5000]", "5000 are needed", "longer text")


@pytest.fixture
def zero_shot(sound_words, tmp_path) -> list[str]:
    """``sound_words`` with a local task folder, which is empty as yet."""
    (tmp_path / "tasks").mkdir()
    return [
        *without(sound_words, "evaluation"),
        "evaluation=quick",
        "evaluation.perplexity=null",
        "evaluation.cost=null",
        f"evaluation.zero_shot.include_path={tmp_path}/tasks",
        "plugins.allow=[tasks]",
    ]


def _task(folder: Path, name: str, data: str) -> None:
    rows = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": data}}, "test_split": "test"}
    item = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "{{g}}",
    }
    (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **rows, **item}))


def test_unknown_task(refused, zero_shot):
    mentions(refused(*zero_shot, "evaluation.zero_shot.tasks=[arc_esay]"), "arc_esay", "did you mean arc_easy?")


def test_unknown_task_that_is_near_a_local_one(refused, zero_shot, tmp_path):
    _task(tmp_path / "tasks", "river_cloze", "river.jsonl")
    mentions(refused(*zero_shot, "evaluation.zero_shot.tasks=[river_clzoe]"), "did you mean river_cloze?")


def test_task_folder_that_is_missing(refused, zero_shot, tmp_path):
    lines = refused(*zero_shot, f"evaluation.zero_shot.include_path={tmp_path}/nowhere")
    mentions(lines, f"evaluation.zero_shot.include_path={tmp_path}/nowhere", "no such folder")


def test_task_that_is_no_yaml(refused, zero_shot, tmp_path):
    (tmp_path / "tasks" / "broken.yaml").write_text("task: [")
    lines = refused(*zero_shot, "evaluation.zero_shot.tasks=[broken]")
    mentions(lines, "broken.yaml", "not a task YAML")


def test_task_whose_data_file_is_missing(refused, zero_shot, tmp_path):
    _task(tmp_path / "tasks", "river_cloze", "river.jsonl")
    lines = refused(*zero_shot, "evaluation.zero_shot.tasks=[river_cloze]")
    mentions(lines, "river_cloze", "river.jsonl", "does not exist")


def test_all_inputs_are_checked_before_one_is_refused(refused, perplexity, tmp_path):
    lines = refused(
        *perplexity,
        "sparsity.ratio=0.99",
        f"calibration.path={tmp_path}/none.txt",
        f"evaluation.perplexity.texts.text.path={tmp_path}/nothing.txt",
    )
    assert [line.partition("=")[0] for line in lines] == [
        "sparsity.ratio",
        "calibration.path",
        "evaluation.perplexity.texts.text.path",
    ]


# The hub, out of reach


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No network, and nothing in the hub's cache (a second machine's view)."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


_PAPER = ["evaluation=paper", "evaluation.perplexity.seq_len=32", "evaluation.cost=null"]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("replaced", "given", "parts"),
    [
        ("model", ["model=llama3_8b"], ["meta-llama/Meta-Llama-3-8B", "model=local model.path=FOLDER"]),
        ("model.path", ["model.path=organisation/tiny"], ["model.path=organisation/tiny", "no local path"]),
        ("model.path", ["model.path=modle"], ["model.path=modle", "no local path"]),
        ("calibration", ["calibration=wikitext2", "calibration.seq_len=32"], ["calibration.path=FILE"]),
        ("calibration", ["calibration=c4", "calibration.seq_len=32"], ["allenai/c4", "calibration.path=FILE"]),
        ("evaluation", _PAPER, ["Salesforce/wikitext", "evaluation.perplexity.texts.wikitext2.path=FILE"]),
    ],
    ids=["named model", "hub id", "one word", "wikitext2", "c4", "paper"],
)
def test_no_network_says_how_to_give_a_local_path(refused, sound_words, replaced, given, parts):
    lines = refused(*without(sound_words, replaced), *given)
    mentions(lines, "the hub cannot be reached", *parts)


@pytest.mark.usefixtures("offline")
def test_cached_hub_files_are_used_without_a_network(run_cfsp, sound_words, model_folder, tmp_path):
    def cached(repository: str) -> Path:
        folder, commit = tmp_path / "hub" / repository, "0123456789" * 4
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        return folder / "snapshots" / commit

    shutil.copytree(model_folder, cached("models--organisation--tiny"))
    texts = cached("datasets--Salesforce--wikitext") / "wikitext-2-raw-v1"
    texts.mkdir(parents=True)
    _parquet(texts / "train-00000-of-00001.parquet", text=[SENTENCE] * 100)
    words = without(sound_words, "model.path", "calibration")
    code, _, err = run_cfsp(
        *words,
        "model.path=organisation/tiny",
        "calibration=wikitext2",
        "calibration.n_samples=4",
        "calibration.seq_len=32",
    )
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["model"]["fingerprint"] == f"hub:organisation/tiny@{'0123456789' * 4}"


@pytest.mark.parametrize(
    "fetch",
    [lambda: hub.fetch_file("a/b", "c.txt", None), lambda: _snapshot("a/b")],
    ids=["file", "snapshot"],
)
def test_a_hub_without_an_answer_gets_one_request(monkeypatch, fetch):
    """The downloads of huggingface_hub retry for half a minute; they are told to look into the cache only."""
    asked = []

    def no_answer(self, repo, **keys):
        asked.append(keys["timeout"])
        raise ConnectionError("no route to host")

    def download(*_, **keys):
        asked.append(keys["local_files_only"])
        return "somewhere"

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", no_answer)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert fetch() == Path("somewhere")
    assert asked == [hub.TIMEOUT, True]


def _snapshot(repo: str) -> Path:
    return hub.fetch_snapshot(repo, None, allow=["*"], ignore=[])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.GatedRepoError, "accept its licence"),
        (errors.RepositoryNotFoundError, "no such repository"),
        (errors.RevisionNotFoundError, "no such revision"),
        (errors.RemoteEntryNotFoundError, "no such file"),
        (errors.HFValidationError, "organisation/name"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached"),
        (TimeoutError, "TimeoutError"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_reasons_of_failed_hub_requests(error, reason):
    line = hub.hub_error("model.path=a/b", error.__new__(error), "a local folder")
    mentions([line], "model.path=a/b: ", reason, "give a local folder")


# What a config.json may leave out


@pytest.mark.parametrize(
    ("config", "positions", "dtype"),
    [
        ({}, None, "float32"),
        ({"max_position_embeddings": 64, "dtype": "bfloat16"}, 64, "bfloat16"),
        ({"torch_dtype": "torch.float16"}, None, "float16"),
        ({"max_position_embeddings": None, "dtype": "auto"}, None, "float32"),
        ({"max_position_embeddings": "many", "text_config": None}, None, "float32"),
        ({"text_config": {"max_position_embeddings": 32, "dtype": "float16"}}, 32, "float16"),
        ({"dtype": "bfloat16", "text_config": {"dtype": "float32"}}, None, "bfloat16"),
    ],
    ids=["nothing", "both", "old spelling", "null", "nonsense", "nested", "outer first"],
)
def test_positions_and_dtype_of_a_config(config, positions, dtype):
    source = ModelSource("name", "origin", Path("folder"), config, "fingerprint")
    assert (source.positions, source.stored_dtype) == (positions, dtype)
