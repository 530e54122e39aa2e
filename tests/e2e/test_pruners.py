"""Every kind of pruner from the command line on a real grouped-query model, and the folder it leaves."""

from __future__ import annotations

import json

import pytest
import torch

import cfsp
from tests.conftest import mentions, shared


@pytest.fixture
def words(tmp_path_factory):
    """stories260K (8 query heads on 4 KV heads), calibrated and evaluated on TinyStories; one cache for all."""
    text = shared("data", "text", "tinystories.txt")
    return [
        "model=local",
        f"model.path={shared('models', 'stories260K')}",
        "model.dtype=float32",
        "calibration=text",
        f"calibration.path={text}",
        "calibration.sampling=sequential",
        "calibration.n_samples=8",
        "calibration.seq_len=128",
        "sparsity.round_to=4",
        "evaluation=perplexity",
        "evaluation.perplexity.datasets=[text]",
        f"evaluation.perplexity.texts.text.path={text}",
        "evaluation.perplexity.seq_len=128",
        "evaluation.perplexity.windows=[100,108]",
        f"paths.cache_dir={tmp_path_factory.getbasetemp() / 'pruners-cache'}",
    ]


def perplexity(record: dict, side: str) -> float:
    (row,) = [row for row in record["measurements"][side] if row["suite"] == "perplexity"]
    return row["value"]


@pytest.mark.parametrize(
    "pruner",
    [
        "flap",
        "flap_al_am",
        "wanda_sp_sequential",
        "llm_pruner",
        "two_ssp",
        "block_pruner",
        "shortgpt",
        "sliding_window",
        "modegpt_ffn",
    ],
)
def test_the_folder_gives_the_runs_own_figures(run_cfsp, words, tmp_path, pruner):
    code, _, err = run_cfsp(*words, f"pruner={pruner}", "sparsity.ratio=0.3")
    assert code == 0, err
    folder = tmp_path / "out"
    record = json.loads((folder / "record.json").read_text())
    assert record["method"]["name"] == pruner
    assert "allocator" not in record["method"] or pruner not in ("two_ssp", "block_pruner", "shortgpt")
    compensated = pruner.startswith(("flap", "modegpt"))
    assert record["checkpoint"]["state"] == ("compensated" if compensated else "pruned")
    assert (folder / "compensation.safetensors").is_file() == compensated
    # Other tools take every safetensors file at the top of a model folder for weights.
    assert [path.name for path in (folder / "model").glob("*.safetensors")] == ["model.safetensors"]
    assert (folder / "blocks.png").stat().st_size > 10_000
    dense, _ = cfsp.load(shared("models", "stories260K"))
    saved, _ = cfsp.load(folder / "model")
    saved = saved.float()
    for plan in (folder / "plan.json", folder / "model" / "plan.json"):
        again, _ = cfsp.load(shared("models", "stories260K"))
        replayed = cfsp.apply(again, cfsp.PruningPlan.load(plan)).state_dict()
        assert all(torch.equal(value, replayed[name]) for name, value in saved.state_dict().items())
    counted = sum(parameter.numel() for parameter in saved.parameters())
    assert record["plan"]["parameters"]["after"] == counted
    groups = [row["kv_groups"] for row in record["blocks"]]
    assert all(0 <= kept <= 4 for kept in groups)
    if pruner in ("flap_al_am", "wanda_sp_sequential", "llm_pruner"):
        assert any(kept < 4 for kept in groups)
    code, _, err = run_cfsp(
        *[word for word in words if not word.startswith("model.path")],
        f"model.path={folder / 'model'}",
        "pruner=none",
        f"paths.output_dir={tmp_path / 'again'}",
    )
    assert code == 0, err
    evaluated = json.loads((tmp_path / "again" / "record.json").read_text())
    assert perplexity(evaluated, "dense") == pytest.approx(perplexity(record, "pruned"), rel=1e-6)
    assert perplexity(record, "dense") < perplexity(record, "pruned")
    assert dense.config.num_hidden_layers == 5


def test_searches_and_gradients_are_read_back_from_the_cache(run_cfsp, words, tmp_path, monkeypatch):
    from cfsp.calibration import gradients
    from cfsp.pruner.search import SubmoduleSearch

    def never(*_, **__):
        raise AssertionError("measured again")

    given = [word for word in words if not word.startswith("paths.cache_dir")]
    for pruner in ("block_pruner", "llm_pruner"):
        assert run_cfsp(*given, f"pruner={pruner}", f"paths.output_dir={tmp_path / pruner}")[0] == 0
    monkeypatch.setattr(SubmoduleSearch, "_loss_from", never)
    monkeypatch.setattr(gradients, "_compute", never)
    for pruner in ("block_pruner", "llm_pruner"):
        code, _, err = run_cfsp(*given, f"pruner={pruner}", f"paths.output_dir={tmp_path / pruner}", "force=true")
        assert code == 0, err


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["pruner=flap", "pruner.structure=heads_ffn"], ["sparsity.scope=ffn", "use sparsity.scope=decoder or model"]),
        (["pruner=shortgpt", "pruner.compensation=bias"], ["pruner.compensation=bias", "no output projection", "flap"]),
        (["pruner=two_ssp", "importance=wanda"], ["importance._target_=", "pruner=two_ssp", "pruner=one_shot"]),
        (["pruner=llm_pruner", "sparsity.ratio=0.9"], ["sparsity.protect=auto", "use sparsity.ratio=", "protect=none"]),
        (["sparsity.protect=[3,3]"], ["sparsity.protect=[3,3]", "leaves no block of 5"]),
        (["pruner=two_ssp", "pruner.attention_submodules=5"], ["that is every one", "pruner.attention_submodules="]),
        (["pruner=shortgpt", "sparsity.ratio=0.02"], ["whole blocks are removed", "use sparsity.ratio=0.2"]),
        (["sparsity.protect=some"], ["sparsity.protect=some: ", "use none, auto or [first,last]"]),
        (["sparsity.protect=[1,-1]"], ["sparsity.protect=[1,-1]: ", "use none, auto or [first,last]"]),
        (["sparsity.protect=[1]"], ["sparsity.protect=[1]: "]),
        (["pruner.structure=head"], ["pruner.structure=head", "did you mean heads"]),
        (["pruner=flap", "pruner.compensation=bais"], ["pruner.compensation=bais", "did you mean bias"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in value[0] else "",
)
def test_wrong_combinations_are_refused_before_any_weight_is_read(refused, words, given, parts):
    given = [*[word for word in words if not word.startswith("paths.cache_dir")], *given]
    lines = refused(*given)
    mentions(lines, *parts)


def test_the_record_says_what_the_compensation_gained(run_cfsp, words, tmp_path):
    """selected: what stays, with the base's own weights; the same as the plan without its tensors."""
    code, out, err = run_cfsp(*words, "pruner=cfsp_plus", "sparsity.ratio=0.5", "evaluate_selection=true")
    assert code == 0, err
    folder = tmp_path / "out"
    record = json.loads((folder / "record.json").read_text())
    assert list(record["measurements"]) == ["dense", "selected", "pruned"]
    values = {
        side: {(row["suite"], row["task"], row["metric"]): row["value"] for row in rows}
        for side, rows in record["measurements"].items()
    }
    perplexity = next(key for key in values["selected"] if key[0] == "perplexity")
    assert values["dense"][perplexity] < values["pruned"][perplexity] < values["selected"][perplexity]
    assert "selected" in out
    code, _, err = run_cfsp(
        *words, "pruner=cfsp_plus", "sparsity.ratio=0.5", f"paths.output_dir={tmp_path / 'without'}", "force=true"
    )
    assert code == 0, err
    without = json.loads((tmp_path / "without" / "record.json").read_text())
    assert without["run_id"] != record["run_id"]
    assert list(without["measurements"]) == ["dense", "pruned"]
