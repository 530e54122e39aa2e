"""``cfsp inspect``: models by name and by folder, without weights; counts, pruners, JSON, refusals."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from cfsp.architecture.views import resolve
from cfsp.cli.inspect import Request, inspect_model, read_request
from cfsp.config.compose import compose
from cfsp.config.contracts import Pruner
from cfsp.config.parse import parse
from cfsp.errors import BudgetError, ConfigError, UnsupportedModelError
from cfsp.inspection import numbers as of_numbers
from cfsp.inspection.describe import FfnFacts, ranges
from cfsp.inspection.numbers import names
from cfsp.inspection.reach import largest_ratio, refusal
from cfsp.inspection.show import describe_ffn
from tests.conftest import ROOT, mentions
from tests.helpers.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

BOOKS = ROOT / "cfsp" / "assets" / "books7m"
#: As published by those who released the models, or counted in their safetensors.
KNOWN = {
    "llama1_7b": 6_738_415_616,
    "llama1_13b": 13_015_864_320,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "mistral_7b": 7_248_023_552,
    "qwen2.5_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
    "smollm2_135m": 134_515_008,
    "bundled": 7_344_384,
    "bundled_mha": 7_868_672,
}


@pytest.fixture
def weights():
    """The runs of this test load them."""


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch, request):
    if "weights" in request.fixturenames:
        return
    import transformers

    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)


def config_folder_of(folder: Path, **settings) -> Path:
    """A folder that holds config.json alone."""
    from transformers import AutoConfig

    AutoConfig.for_model(settings.pop("model_type"), **settings).save_pretrained(folder)
    return folder


def architecture(name: str) -> dict:
    return OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml")).get("architecture")


# By name


def test_every_name_but_local_is_known_here():
    assert set(KNOWN) == {*names()} - {"local"}


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_every_name_works_offline_and_counts_as_its_class_does(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    start = time.perf_counter()
    report = inspect_model(Request(model=name))
    assert time.perf_counter() - start < 30
    stated = architecture(name) or json.loads((BOOKS / "config.json").read_text())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**stated))
    assert report.model_class == type(model).__name__
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters()) == KNOWN[name]
    assert sum(report.parts.values()) == report.parameters
    assert report.parts["other"] == 0
    assert len(report.blocks) == stated["num_hidden_layers"]
    for block in report.blocks:
        assert block.ffn == FfnFacts("gated", stated["intermediate_size"], 3 * stated["hidden_size"])
        assert (block.attention.heads, block.attention.kv_groups) == (
            stated["num_attention_heads"],
            stated["num_key_value_heads"],
        )
    assert report.dtype == stated["dtype"]
    assert report.positions == stated["max_position_embeddings"]
    assert report.bytes == 2 * report.parameters
    assert not any(reach.reason for reach in report.reaches)
    assert report.numbers.kind == ("folder" if name == "bundled" else "yaml")


@pytest.mark.parametrize("name", sorted(set(KNOWN) - {"bundled"}))
def test_every_key_that_a_model_states_is_one_of_its_class(name):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    stated = architecture(name)
    assert set(stated) - {"dtype", "model_type"} <= set(vars(CONFIG_MAPPING[stated["model_type"]]()))


def test_parts_of_a_model_whose_sizes_are_known():
    parts = inspect_model(Request(model="llama2_7b")).parts
    assert parts == {
        "embeddings": 32_000 * 4096,
        "attention": 32 * 4 * 4096**2,
        "ffn": 32 * 3 * 4096 * 11_008,
        "norms": 65 * 4096,
        "head": 32_000 * 4096,
        "other": 0,
    }


def test_tied_embeddings_count_once():
    report = inspect_model(Request(model="bundled"))
    assert report.tied
    assert (report.parts["embeddings"], report.parts["head"]) == (4096 * 256, 0)


def test_biases_and_norms_of_queries_and_keys_have_their_place(tmp_path):
    model = tiny_model("qwen3", attention_bias=True)
    folder = tmp_path / "m"
    folder.mkdir()
    model.config.save_pretrained(folder)
    parts = inspect_model(Request(path=str(folder))).parts
    assert parts["norms"] == 32 + 4 * (2 * 32 + 2 * 8)
    assert parts["attention"] == 4 * (2 * 32 * 32 + 2 * 32 * 16 + 2 * 32 + 2 * 16)
    assert sum(parts.values()) == sum(parameter.numel() for parameter in model.parameters())


def test_without_the_hub_the_numbers_are_said_to_be_those_of_the_file(run_cfsp):
    code, out, err = run_cfsp("inspect", "model=llama3_8b", defaults=False)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "llama3_8b: conf/model/llama3_8b.yaml"
    assert lines[1].startswith("  the numbers are those of conf/model/llama3_8b.yaml, not compared with meta-llama/")
    assert lines[1].endswith("the hub cannot be reached (HF_HUB_OFFLINE is set)")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that answers: ``hub(name, key=value)`` puts a model's config.json there, with other values."""
    folder = tmp_path / "0123abc"

    def put(name: str, **other) -> None:
        folder.mkdir(exist_ok=True)
        stated = architecture(name) | other
        if "dtype" in stated:
            stated["torch_dtype"] = stated.pop("dtype")  # as configurations of before transformers 5 have it
        kept = {key: value for key, value in stated.items() if value != "left out"}
        (folder / "config.json").write_text(json.dumps(kept))

    def fetch(repo, revision, *, allow, ignore):
        assert allow == ["config.json"]
        return folder

    monkeypatch.setattr(of_numbers, "fetch_snapshot", fetch)
    return put


def test_with_the_hub_the_two_are_compared(hub, run_cfsp):
    hub("llama1_7b", num_key_value_heads="left out", attention_bias="left out")  # defaults say the same
    report = inspect_model(Request(model="llama1_7b"))
    assert (report.numbers.kind, report.numbers.differences) == ("hub", ())
    assert report.numbers.notes == (
        "conf/model/llama1_7b.yaml says the same as config.json of huggyllama/llama-7b@0123abc",
    )
    hub("llama1_7b", vocab_size=32_001, dtype="bfloat16")
    code, out, _ = run_cfsp("inspect", "model=llama1_7b", defaults=False)
    assert code == 0
    assert out.splitlines()[1:4] == [
        "  conf/model/llama1_7b.yaml differs from huggyllama/llama-7b@0123abc, whose numbers these are:",
        "    dtype: float16 in conf/model/llama1_7b.yaml, bfloat16 in huggyllama/llama-7b@0123abc",
        "    vocab_size: 32000 in conf/model/llama1_7b.yaml, 32001 in huggyllama/llama-7b@0123abc",
    ]
    assert inspect_model(Request(model="llama1_7b")).parameters == KNOWN["llama1_7b"] + 2 * 4096


def test_a_model_of_the_hub_by_its_id(hub):
    hub("qwen3_8b")
    report = inspect_model(Request(path="Qwen/Qwen3-8B-Base"))
    assert report.parameters == KNOWN["qwen3_8b"]
    assert report.as_dict()["origin"] == "Qwen/Qwen3-8B-Base@0123abc"


def test_a_hub_that_refuses_leaves_the_numbers_of_the_file(monkeypatch):
    def fetch(*_, **__):
        raise RuntimeError("503")

    monkeypatch.setattr(of_numbers, "fetch_snapshot", fetch)
    (note,) = inspect_model(Request(model="llama2_7b")).numbers.notes
    assert "the hub did not give it (RuntimeError: 503)" in note


def test_a_cache_that_lacks_config_json_leaves_the_numbers_of_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(of_numbers, "fetch_snapshot", lambda *_, **__: tmp_path)
    report = inspect_model(Request(model="llama2_7b"))
    assert report.parameters == KNOWN["llama2_7b"]
    assert report.numbers.notes[0].endswith("not compared with meta-llama/Llama-2-7b-hf: there is no config.json")


def test_a_model_that_is_made_here_is_read_once_it_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (note,) = inspect_model(Request(model="bundled_mha")).numbers.notes
    assert note.endswith("not compared with outputs/models/bundled_mha: there is no such folder")
    folder = config_folder_of(tmp_path / "outputs" / "models" / "bundled_mha", **architecture("bundled_mha"))
    report = inspect_model(Request(model="bundled_mha"))
    assert report.numbers.source.folder.resolve() == folder
    assert report.numbers.differences == ()
    assert report.parameters == KNOWN["bundled_mha"]


# Folders


def test_a_folder_with_config_json_alone_is_enough(tmp_path):
    settings = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    report = inspect_model(Request(path=str(config_folder_of(tmp_path / "m", model_type="llama", **settings))))
    assert report.numbers.notes == ("the folder holds no *.safetensors weights",)
    assert report.blocks[0].attention.kind == "multi-head"


def test_nothing_of_a_folder_is_hashed(model_folder, monkeypatch):
    from cfsp.weights import source

    monkeypatch.setattr(source, "folder_fingerprint", lambda *_: 1 / 0)
    assert inspect_model(Request(path=str(model_folder))).numbers.notes == ()


def test_sliding_windows_and_groups_are_told_apart(run_cfsp, tmp_path):
    folder = config_folder_of(
        tmp_path / "m",
        model_type="gemma2",
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=16,
        hidden_size=64,
        intermediate_size=128,
        vocab_size=256,
        sliding_window=32,
    )
    report = inspect_model(Request(path=str(folder)))
    assert [block.attention.window for block in report.blocks] == [32, None] * 3
    code, out, _ = run_cfsp("inspect", f"path={folder}", defaults=False)
    assert code == 0
    rows = [line for line in out.splitlines() if "multi-query" in line]
    assert [row.split("  ")[0] for row in rows] == ["0, 2, 4", "1, 3, 5"]
    assert "8 heads of 16 in 1 KV group (" in rows[0]
    assert "sliding window of 32" in rows[0]
    assert "sliding" not in rows[1]


def _prune(run_cfsp, sound_words, out: Path, *words: str) -> Path:
    kept = [word for word in sound_words if not word.startswith("save.model")]
    code, _, err = run_cfsp(*kept, *words, f"paths.output_dir={out}")
    assert code == 0, err
    return out


@pytest.mark.usefixtures("weights")
def test_what_was_removed_earlier(run_cfsp, sound_words, tmp_path):
    out = _prune(run_cfsp, sound_words, tmp_path / "one", "sparsity.ratio=0.5")
    plan = json.loads((out / "plan.json").read_text())
    report = inspect_model(Request(path=str(out)))
    widths = [block.ffn.width for block in report.blocks]
    assert widths == [row["width"] for row in plan["details"]]
    assert [block.ffn.width_before for block in report.blocks] == [64 if width != 64 else None for width in widths]
    assert report.parameters == plan["parameters"]["after"]
    assert sum(report.parts.values()) == report.parameters
    assert (report.history.state, report.history.methods) == ("pruned", ("cfsp",))
    code, shown, _ = run_cfsp("inspect", f"path={out}", defaults=False)
    assert code == 0
    before, after = (plan["parameters"][key] for key in ("before", "after"))
    assert f"pruned earlier by cfsp: {before:,} parameters before, {after:,} after" in shown
    assert f"gated, {widths[0]:,} of 64 neurons (48 parameters each)" in shown


@pytest.mark.usefixtures("weights")
def test_missing_submodules_and_blocks(run_cfsp, sound_words, tmp_path):
    words = ["pruner=block_pruner", "pruner.submodules=attention", "sparsity.ratio=0.1"]
    report = inspect_model(Request(path=str(_prune(run_cfsp, sound_words, tmp_path / "one", *words))))
    assert [block.attention is None for block in report.blocks].count(True) == 1
    assert all(block.attention_known for block in report.blocks)
    reasons = {reach.pruner: reach.reason for reach in report.reaches if reach.reason}
    assert {"two_ssp", "llm_pruner"} <= set(reasons)
    assert "lacks one" in reasons["two_ssp"]
    assert "leaves no block of 2 to prune" in reasons["llm_pruner"]
    words = ["pruner=shortgpt", "sparsity.ratio=0.5"]
    out = _prune(run_cfsp, sound_words, tmp_path / "two", *words)
    report = inspect_model(Request(path=str(out / "model")))
    assert (report.history.blocks_before, report.history.removed_blocks, len(report.blocks)) == (2, (1,), 1)
    code, shown, _ = run_cfsp("inspect", f"path={out}", defaults=False)
    assert code == 0
    assert "; blocks 1 of 2 went" in shown


@pytest.mark.usefixtures("weights")
def test_a_folder_that_was_pruned_twice(run_cfsp, sound_words, tmp_path):
    first = _prune(run_cfsp, sound_words, tmp_path / "one", "sparsity.ratio=0.25", "pruner=uniform")
    words = [word for word in sound_words if not word.startswith("model.path")]
    second = _prune(run_cfsp, [*words, f"model.path={first / 'model'}"], tmp_path / "two", "sparsity.ratio=0.5")
    report = inspect_model(Request(path=str(second)))
    assert report.history.methods == ("uniform", "cfsp")
    assert report.parameters == report.history.parameters["after"] < report.history.parameters["before"]
    assert {block.ffn.width_before for block in report.blocks} == {None}


def test_an_unconfirmed_plan_is_no_history(model_folder, run_cfsp, caplog):
    (model_folder / "plan.json").write_text('{"schema": 1}')
    code, out, err = run_cfsp("inspect", f"path={model_folder}", defaults=False)
    assert code == 0, err
    assert "pruned earlier" not in out
    assert "plan.json: ignored" in caplog.text


# What could go


def _config(pruner: str):
    return parse(compose([f"pruner={pruner}"]))


@pytest.fixture(scope="module")
def view():
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(BOOKS))
    return resolve(model)


def test_every_pruner_is_there():
    found = {reach.pruner for reach in inspect_model(Request(model="bundled")).reaches}
    assert found == {path.stem for path in (ROOT / "conf" / "pruner").glob("*.yaml")} - {"none"}


def test_the_most_is_what_the_pruners_own_checks_allow(view):
    """Their limit is within one unit, which may be a whole block; a ratio that is named must be taken."""
    units = {"shortgpt": 786_944, "sliding_window": 786_944, "block_pruner": 768 * 768 + 256}
    for reach in inspect_model(Request(model="bundled")).reaches:
        config = _config(reach.pruner)
        pruner, budget = config.pruner.instance, config.budget
        assert refusal(pruner, budget, view, reach.largest_ratio) is None, reach
        limit = largest_ratio(pruner, budget, view)
        whole = reach.parameters / reach.largest_ratio
        unit = units.get(reach.pruner, 49_152 if "KV groups" in reach.units else 32 * 768)
        assert reach.largest_ratio <= limit + 1e-4
        assert limit <= reach.largest_ratio + (unit / 2) / whole + 2e-4, reach


@pytest.mark.parametrize(
    ("pruner", "units", "most"),
    [
        ("cfsp", {"neurons": 8 * 768}, 8 * 736 * 768),
        ("flap_al_am", {"neurons": 8 * 768, "KV groups": 32}, 8 * (736 * 768 + 3 * 49_152)),
        ("llm_pruner", {"neurons": 6 * 768, "KV groups": 24}, 6 * (736 * 768 + 3 * 49_152)),
        ("shortgpt", {"blocks": 7}, 7 * 786_944),
        ("sliding_window", {"blocks": 8}, 7 * 786_944),
        ("block_pruner", {"attentions": 8, "FFNs": 8}, 8 * 786_944 - 4 * 49_152 - 256),
        ("two_ssp", {"neurons": 8 * 768, "attentions": 8}, None),
    ],
)
def test_units_and_the_most_of_them(view, pruner, units, most):
    config = _config(pruner)
    assert config.pruner.instance.most_removable(view, config.budget) == most
    (reach,) = [one for one in inspect_model(Request(model="bundled")).reaches if one.pruner == pruner]
    assert reach.units == units
    assert reach.parameters == most or most is None


def test_what_takes_no_ratio_says_why(view):
    config = _config("cfsp")
    budget = replace(config.budget, round_to=1024)
    with pytest.raises(BudgetError, match="use a smaller min_width or round_to"):
        largest_ratio(config.pruner.instance, budget, view)


def test_a_class_that_is_not_known_here_is_asked_by_its_check(view):
    class Odd(Pruner):
        name, prunes = "odd", True

        def plan(self, context):
            return None

        def check(self, view, budget):
            if not 0.03 <= budget.ratio <= 0.6123:
                raise BudgetError("too much, or too little")

    assert Odd().most_removable(view, _config("cfsp").budget) is None
    assert largest_ratio(Odd(), _config("cfsp").budget, view) == 0.6123


def test_a_family_that_cannot_be_saved_is_said_once(run_cfsp, tmp_path, monkeypatch):
    from cfsp.inspection import reach

    def refuse(model):
        raise UnsupportedModelError("nobody knows this family")

    monkeypatch.setattr(reach, "check_adoptable", refuse)
    code, out, _ = run_cfsp("inspect", "model=bundled", defaults=False)
    assert code == 0
    assert out.splitlines()[-1] == "no pruner can be used: nobody knows this family"


# Output


def test_json_is_the_whole_report(run_cfsp):
    code, out, err = run_cfsp("inspect", "model=mistral_7b", "json=true", defaults=False)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["schema"], found["model"], found["class"]) == (1, "mistral_7b", "MistralForCausalLM")
    assert found["parameters"] == KNOWN["mistral_7b"] == sum(found["parts"].values())
    assert [entry["blocks"] for entry in found["blocks"]] == [list(range(32))]
    assert found["blocks"][0]["attention"]["kind"] == "grouped-query"
    cfsp = next(entry for entry in found["pruners"] if entry["pruner"] == "cfsp")
    assert (cfsp["units"], cfsp["scope"]) == ({"neurons": 32 * 14_336}, "ffn")
    assert cfsp["parameters"] == 32 * (14_336 - 32) * 3 * 4096
    assert found["removed_before"] is None


def test_the_page_shows_what_is_printed(run_cfsp):
    _, out, _ = run_cfsp("inspect", "model=llama3_8b", defaults=False)
    shown = "\n".join(line.rstrip() for line in out.rstrip().splitlines())
    assert f"inspect model=llama3_8b\n{shown}\n```" in (ROOT / "docs" / "inspect.md").read_text(encoding="utf-8")


def test_the_table_names_kinds_that_a_view_may_have():
    assert describe_ffn(FfnFacts("plain", 4096, 2048)) == "plain, 4,096 neurons (2,048 parameters each)"
    assert describe_ffn(FfnFacts("experts", 64, 96, 128)).startswith("mixture of experts, 64 of 128 neurons")
    assert describe_ffn(None) == "removed"


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([0], "0"),
        ([0, 1, 2], "0-2"),
        ([0, 2, 3, 7], "0, 2-3, 7"),
        ([0, 2, 4], "0, 2, 4"),
        ([1, 3, 5, 7], "1, 3, ..., 7"),
    ],
)
def test_ranges_of_blocks(indices, text):
    assert ranges(indices) == text


# Refusals


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["modle=llama3_8b"], ["modle: unknown key", "did you mean model?", "trust_remote_code"]),
        (["llama3_8b"], ["llama3_8b: is not key=value"]),
        (["model="], ["model=: has no value"]),
        (["model=llama3_8b", "path=x"], ["model=llama3_8b path=x: two models", "give one of them"]),
        (["json=true"], ["neither model nor path is set", "model=NAME or path=DIR"]),
        (["model=bundled", "json=yes"], ["json=yes: use true or false"]),
        (["path=x", "trust_remote_code=1"], ["trust_remote_code=1: use true or false"]),
        (["model=llama3_8"], ["model=llama3_8: there is no such model", "did you mean llama3_8b?", "path="]),
        (["model=local"], ["model=local: names no model of its own", "path=DIR"]),
        (["path=/no/such/folder"], ["path=/no/such/folder: there is no such folder", "give the folder of a model"]),
        (["path=llama3_8b"], ["path=llama3_8b: ", "HF_HUB_OFFLINE is set", "did you mean model=llama3_8b?"]),
        ([f"path={ROOT / 'README.md'}"], ["README.md: this is a file", "give the folder"]),
        ([f"path={ROOT / 'tests'}"], ["there is no config.json", "give the folder"]),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] and "/" not in value[0] else "",
)
def test_words_that_cannot_be_used(refused, given, parts):
    mentions(refused("inspect", *given, defaults=False), *parts)


def test_all_wrong_words_come_together(refused):
    lines = refused("inspect", "modle=x", "json=yes", "model=a", "path=b", defaults=False)
    assert [line.partition(":")[0] for line in lines] == ["modle", "json=yes", "model=a path=b"]


def test_help_and_nothing_at_all(run_cfsp):
    for words, code in ((["inspect", "--help"], 0), (["inspect"], 2)):
        found, out, _ = run_cfsp(*words, defaults=False)
        assert found == code
        assert "cfsp inspect model=NAME" in out


@pytest.mark.parametrize(
    ("content", "part"),
    [("{", "config.json cannot be read"), ("[]", "config.json holds no object"), ("{}", "transformers does not know")],
)
def test_a_config_that_is_none(refused, tmp_path, content, part):
    (tmp_path / "config.json").write_text(content)
    mentions(refused("inspect", f"path={tmp_path}", defaults=False), f"path={tmp_path}: ", part)


def test_code_of_the_models_own_needs_permission(refused, model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (model_folder / "config.json").write_text(json.dumps(config))
    lines = refused("inspect", f"path={model_folder}", defaults=False)
    mentions(lines, "brings its own Python code", "set trust_remote_code=true")
    assert "model.trust_remote_code" not in lines[0]


def test_weights_of_another_shape_than_config_json_says(refused, model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    mentions(refused("inspect", f"path={model_folder}", defaults=False), "do not belong together")


def test_what_nobody_expects_ends_with_1(run_cfsp, monkeypatch):
    monkeypatch.setattr("cfsp.inspection.numbers.names", lambda: 1 / 0)
    code, _, err = run_cfsp("inspect", "model=bundled", defaults=False)
    assert code == 1
    mentions(err.splitlines(), "inspect failed", "ZeroDivisionError", "debug=true")


def test_a_request():
    assert read_request(["model=x", "json=TRUE"]) == Request(model="x", json=True)
    assert read_request(["path=x", "trust_remote_code=true"]) == Request(path="x", trust_remote_code=True)


# The configuration


@pytest.mark.parametrize(
    ("value", "part"),
    [({"hidden_size": 3}, "model_type"), ({"model_type": "llama", "x": [1]}, "x: a number, a word")],
)
def test_an_architecture_that_is_none(value, part):
    raw = OmegaConf.to_container(compose([]), resolve=True)
    raw["model"]["architecture"] = value
    with pytest.raises(ConfigError) as found:
        parse(raw)
    mentions(list(found.value.problems), "model.architecture=", part)


def test_it_decides_no_figure():
    from cfsp.tables.collection import configuration_key

    raw = parse(compose(["model=llama3_8b"])).raw
    before = {**raw, "model": {key: value for key, value in raw["model"].items() if key != "architecture"}}
    assert configuration_key(raw) == configuration_key(before)
    assert configuration_key(raw) != configuration_key({**raw, "model": raw["model"] | {"name": "other"}})
