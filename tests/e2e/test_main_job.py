"""The main job on the bundled model, from the command line: what it writes, and what can be done with it."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch

import cfsp
from cfsp.cli import main as run
from tests.conftest import shared
from tests.helpers.offline_wandb import offline_run


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One run of everything, W&B offline included; the zero-shot tasks on a few items each."""
    from hydra.core.global_hydra import GlobalHydra

    base = tmp_path_factory.mktemp("demo")
    words = [
        "evaluation.zero_shot.limit=24",
        "evaluation.cost.repeats=2",
        f"paths.output_dir={base / 'out'}",
        f"paths.cache_dir={base / 'cache'}",
        f"paths.records_dir={base / 'records'}",
    ]
    GlobalHydra.instance().clear()
    before, sys.argv = sys.argv, ["cfsp", *words]
    try:
        assert run._main(sys.argv) == 0
    finally:
        sys.argv = before
    return base, words


def record_of(folder) -> dict:
    return json.loads((folder / "record.json").read_text())


def figures(record: dict, side: str, *suites: str) -> dict:
    return {
        (row["suite"], row["task"], row["metric"]): row["value"]
        for row in record["measurements"][side]
        if row["suite"] in suites
    }


def test_it_writes_everything_it_promises(demo):
    base, _ = demo
    out = base / "out"
    for name in ("record.json", "plan.json", "config.yaml", "run.log", "blocks.png", "model/config.json"):
        assert (out / name).stat().st_size > 0, name
    assert (out / "blocks.png").read_bytes()[:4] == b"\x89PNG"
    record = record_of(out)
    assert record["status"] == "success"
    assert (base / "records" / f"{record['run_id']}.json").read_text() == (out / "record.json").read_text()
    assert record["method"]["importance"] == {"component": "cfsp"}
    assert record["method"]["allocator"] == {
        "component": "coarse", "metric": "angular", "temperature": 1.0,
    }  # fmt: skip
    assert record["method"]["pruner"]["structure"] == "ffn"
    assert len(record["blocks"]) == 8
    for row in record["blocks"]:
        assert {"distance", "keep_ratio", "width", "base_width"} <= set(row)
    assert record["plan"]["achieved"]["ratio"] == pytest.approx(0.5, abs=32 / (8 * 768))
    stages = {stage["name"]: stage for stage in record["stages"]}
    assert {"load", "calibrate", "plan", "evaluate dense", "apply", "save", "evaluate pruned"} <= set(stages)
    assert all(stage["seconds"] >= 0 and stage["peak_bytes"] > 0 for stage in stages.values())
    assert record["environment"]["packages"]["torch"] == torch.__version__
    assert str(base) not in json.dumps(record["environment"])


def test_a_recovered_run_holds_three_sides_and_its_folder_gives_the_third(run_cfsp, tmp_path):
    """What `make demo` does, with fewer steps and without tasks; recovered weights are better than pruned ones."""
    words = ["recovery.max_steps=10", "recovery.micro_batch_size=8", "evaluation.zero_shot=null"]
    words += ["evaluation.cost.repeats=1", f"paths.cache_dir={tmp_path / 'cache'}", "model.dtype=float32"]
    code, out, err = run_cfsp(*words, "recovery=ig_lora", f"paths.output_dir={tmp_path / 'run'}")
    assert code == 0, err
    assert "recovered by ig_lora" in out
    record = record_of(tmp_path / "run")
    assert list(record["measurements"]) == ["dense", "pruned", "recovered"]
    dense, pruned, recovered = (figures(record, side, "perplexity") for side in record["measurements"])
    key = ("perplexity", "bundled", "perplexity")
    assert dense[key] < recovered[key] < 0.98 * pruned[key]
    costs = [figures(record, side, "cost") for side in record["measurements"]]
    assert costs[0]["cost", "parameters", "count"] > costs[1]["cost", "parameters", "count"]
    assert costs[1]["cost", "parameters", "count"] == costs[2]["cost", "parameters", "count"]
    assert sum(record["recovery"]["ranks"]) == 8 * 8
    stages = [stage["name"] for stage in record["stages"]]
    assert stages.index("evaluate pruned") < stages.index("recover") < stages.index("save")
    given = [word for word in words if not word.startswith("recovery")]
    code, _, err = run_cfsp("model=local", f"model.path={tmp_path / 'run' / 'model'}", "pruner=none", *given)
    assert code == 0, err
    assert figures(record_of(tmp_path / "out"), "dense", "perplexity") == recovered


def test_every_measurement_says_what_it_is(demo):
    record = record_of(demo[0] / "out")
    for side in ("dense", "pruned"):
        rows = record["measurements"][side]
        suites = {row["suite"] for row in rows}
        assert suites == {"perplexity", "zero_shot", "cost"}
        for row in rows:
            assert None not in (row["suite"], row["task"], row["metric"], row["value"], row["unit"])
            assert {"n", "seq_len", "num_fewshot", "split", "version", "stderr", "limit"} <= set(row)
            if row["suite"] == "perplexity":
                assert row["n"] % 255 == 0
                assert (row["seq_len"], row["split"], row["num_fewshot"]) == (256, "evaluation", 0)
                assert row["version"].startswith("sha256:")
                assert row["detail"]["bos"] == "none"
            if row["suite"] == "zero_shot":
                assert row["n"] == row["limit"] == 24
                assert (row["seq_len"], row["num_fewshot"], row["split"]) == (512, 0, "test")
                assert row["version"] == "1.0"
                assert row["stderr"] > 0
                assert row["detail"]["task_hash"]
    dense, pruned = (figures(record, side, "cost") for side in ("dense", "pruned"))
    assert dense["cost", "parameters", "count"] == 7_344_384
    assert pruned["cost", "parameters", "count"] == record["plan"]["parameters"]["after"]
    assert dense["cost", "checkpoint", "bytes"] == 2 * 7_344_384
    for task in ("prefill", "decode"):
        assert pruned["cost", task, "tokens_per_second"] > 0


def test_exactly_one_wandb_run_mirrors_the_record(demo):
    runs = [path for path in (demo[0] / "out" / "wandb").glob("offline-run-*") if path.is_dir()]
    assert len(runs) == 1
    assert next(runs[0].glob("run-*.wandb")).stat().st_size > 1000
    assert list(runs[0].glob("files/media/images/blocks*.png"))
    record = record_of(demo[0] / "out")
    kept = offline_run(runs[0])
    assert kept["run"]["run_id"] == record["run_id"]
    assert kept["config"]["sparsity"] == record["configuration"]["sparsity"]
    own = figures(record, "pruned", "perplexity", "zero_shot", "cost")
    for (suite, task, metric), value in own.items():
        assert kept["summary"][f"pruned/{suite}/{task}/{metric}"] == pytest.approx(value)
    assert kept["summary"]["status"] == "success"
    names = {"record.json", "plan.json", "config.yaml", "blocks.png"}
    assert kept["artifact"] == {"name": record["run_id"], "type": "run", "files": names}


def test_evaluating_the_folder_gives_the_runs_own_figures(demo, run_cfsp, tmp_path):
    base, words = demo
    given = [word for word in words if word.startswith("evaluation")]
    code, out, err = run_cfsp("model=local", f"model.path={base / 'out' / 'model'}", "pruner=none", *given)
    assert code == 0, err
    assert "evaluated as it is" in out
    own = figures(record_of(base / "out"), "pruned", "perplexity", "zero_shot")
    again = figures(record_of(tmp_path / "out"), "dense", "perplexity", "zero_shot")
    assert again == own


def test_the_folder_loads_as_saved_and_the_plan_replays_to_it(demo):
    out = demo[0] / "out"
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["model_type"] == "pruned_llama"
    assert {"per_layer_config", "rope_theta", "rope_parameters", "auto_map"} <= set(config)
    saved, tokenizer = cfsp.load(out / "model")
    dense, _ = cfsp.load(cfsp.__path__[0] + "/assets/books7m")
    replayed = cfsp.apply(dense, cfsp.PruningPlan.load(out / "plan.json"))
    ids = torch.tensor([tokenizer("The sea was quiet, and the harbour lay in the fog.")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(saved(ids).logits, replayed(ids).logits)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), replayed.parameters(), strict=True))


def test_a_whole_runs_calibration_and_planning_see_each_token_once(run_cfsp, monkeypatch):
    """Counted at the linears of the loaded model, over everything that a run does before the plan is written."""
    from cfsp.pipeline import base_models

    seen: dict[str, int] = {}
    load = base_models.load_model

    def counting(*args, **kwargs):
        model = load(*args, **kwargs)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                seen[name] = 0
                module.register_forward_hook(
                    lambda _, inputs, __, name=name: seen.update({name: seen[name] + inputs[0].shape[:-1].numel()})
                )
        return model

    monkeypatch.setattr(base_models, "load_model", counting)
    code, _, err = run_cfsp("evaluation=none", "save.model=false", "calibration.n_samples=12", "calibration.seq_len=64")
    assert code == 0, err
    assert seen.pop("lm_head") == 0
    assert len(seen) == 8 * 7
    assert set(seen.values()) == {12 * 64}


SETTINGS = (
    ["sparsity.ratio=0.3", "allocator.metric=cosine"],
    ["pruner=wanda_sp"],
    ["pruner=magnitude_sp", "sparsity.scope=model", "sparsity.ratio=0.2"],
)


@pytest.mark.parametrize("calibration", ["bundled", "self"])
def test_another_setting_plans_from_the_cached_statistics(calibration, run_cfsp, monkeypatch, tmp_path):
    """Ratio, allocator, metric and preset change; the model never runs again, not even to sample text.

    But for the four tokens with which the structure is tried.
    """
    from transformers import LlamaModel

    given = [f"calibration={calibration}", "calibration.n_samples=4", "calibration.seq_len=32", "evaluation=none"]
    given += ["save.model=false", f"paths.cache_dir={tmp_path / 'shared-cache'}"]
    assert run_cfsp(*given, f"paths.output_dir={tmp_path / 'first'}")[0] == 0
    right = LlamaModel.forward

    def forward(self, input_ids, *args, **kwargs):
        if input_ids.numel() > 4:
            pytest.fail("the model was run again")
        return right(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    for index, words in enumerate(SETTINGS):
        code, _, err = run_cfsp(*given, *words, f"paths.output_dir={tmp_path / str(index)}")
        assert code == 0, err
        stages = {stage["name"]: stage["cached"] for stage in record_of(tmp_path / str(index))["stages"]}
        assert stages["calibrate"]


@pytest.mark.parametrize(
    ("words", "again"),
    [
        (["save.dtype=float16"], []),
        (["model.dtype=bfloat16"], ["model.dtype=bfloat16"]),
        (["model.dtype=float16"], ["model.dtype=float16"]),
    ],
    ids=["saved in float16", "computed in bfloat16", "computed in float16"],
)
def test_the_folders_figures_are_the_runs_in_every_dtype(words, again, run_cfsp, tmp_path):
    """The pruned weights are rounded to what is stored before they are evaluated."""
    given = ["evaluation=perplexity", "evaluation.perplexity.datasets=[bundled]"]
    given += ["evaluation.perplexity.seq_len=64", "evaluation.perplexity.windows=[0,4]"]
    code, _, err = run_cfsp(*words, *given, "calibration.n_samples=4", "calibration.seq_len=32")
    assert code == 0, err
    folder = tmp_path / "out" / "model"
    code, _, err = run_cfsp(
        "model=local", f"model.path={folder}", "pruner=none", *again, *given, f"paths.output_dir={tmp_path / 'again'}"
    )
    assert code == 0, err
    own = figures(record_of(tmp_path / "out"), "pruned", "perplexity")
    assert figures(record_of(tmp_path / "again"), "dense", "perplexity") == own


def test_a_foreign_model_folder_is_refused_before_any_work(run_cfsp, tmp_path, monkeypatch):
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "notes.txt").write_text("mine")
    monkeypatch.setattr("cfsp.pipeline.base_models.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    code, _, err = run_cfsp("evaluation=none")
    assert code == 2
    assert "was not written by cfsp" in err


def offline_runs(folder) -> list[str]:
    return [path.name for path in (folder / "wandb").glob("offline-run-*") if path.is_dir()]


def test_one_wandb_run_per_run_in_a_multirun_after_a_failure_and_when_forced(run_cfsp, tmp_path, monkeypatch):
    given = ["logger=wandb", "evaluation=none", "save.model=false", "calibration.n_samples=4"]
    code, _, err = run_cfsp("-m", "sparsity.ratio=0.3,0.4", *given)
    assert code == 0, err
    folders = [path.parent for path in (tmp_path / "out").glob("*/record.json")]
    assert len(folders) == 2
    assert all(len(offline_runs(folder)) == 1 for folder in folders)
    single = f"paths.output_dir={tmp_path / 'single'}"
    with monkeypatch.context() as patch:
        patch.setattr("cfsp.pipeline.base_models.probe", lambda *_, **__: 1 / 0)
        assert run_cfsp(*given, single)[0] == 1
    assert len(offline_runs(tmp_path / "single")) == 1
    (failed,) = (tmp_path / "single" / "wandb").glob("offline-run-*")
    summary = offline_run(failed)["summary"]
    assert (summary["status"], summary["error"]) == ("failed", "ZeroDivisionError: division by zero")
    for words in ([], ["force=true"]):
        code, _, err = run_cfsp(*given, *words, single)
        assert code == 0, err
        assert len(offline_runs(tmp_path / "single")) == 1


def test_a_killed_run_leaves_no_wandb_run_and_the_next_launch_writes_what_is_lacking(run_cfsp, tmp_path, monkeypatch):
    from cfsp.logger.wandb import WandbLogger

    given = ["logger=wandb", "evaluation=none", "save.model=false", "calibration.n_samples=4"]
    out = tmp_path / "out"
    seen = []

    def killed(self, record, folder):
        seen.append((record.status, offline_runs(folder)))
        raise KeyboardInterrupt  # stands for the kill: nothing after it is done

    with monkeypatch.context() as patch:
        patch.setattr(WandbLogger, "finish", killed)
        code, _, _ = run_cfsp(*given)
    assert code == 1
    assert seen[0] == ("success", [])
    assert record_of(out)["status"] == "success"
    code, _, err = run_cfsp(*given)
    assert code == 0, err
    assert len(offline_runs(out)) == 1
    code, _, err = run_cfsp(*given)
    assert len(offline_runs(out)) == 1


def test_wandb_goes_online_only_where_it_may(monkeypatch):
    from cfsp.logger.wandb import WandbLogger

    monkeypatch.setenv("NETRC", "none")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert WandbLogger()._mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert WandbLogger()._mode() == "online"
    assert WandbLogger(mode="offline")._mode() == "offline"
    for asked in ("disabled", "offline"):
        monkeypatch.setenv("WANDB_MODE", asked)
        assert WandbLogger()._mode() == asked


def test_the_same_command_gives_the_same_plan_and_another_seed_another_sample(run_cfsp, tmp_path):
    given = ["evaluation=none", "save.model=false", "calibration.n_samples=8"]
    for name, extra in (("a", []), ("b", []), ("c", ["seed=1"])):
        code, _, err = run_cfsp(
            *given, *extra, f"paths.output_dir={tmp_path / name}", f"paths.cache_dir={tmp_path / name}"
        )
        assert code == 0, err
    plans = {name: (tmp_path / name / "plan.json").read_bytes() for name in "abc"}
    assert plans["a"] == plans["b"] != plans["c"]
    records = {name: record_of(tmp_path / name) for name in "abc"}
    assert records["a"]["run_id"] == records["b"]["run_id"] != records["c"]["run_id"]
    assert records["a"]["calibration"]["fingerprint"] != records["c"]["calibration"]["fingerprint"]


def test_a_finished_run_is_not_repeated_unless_forced(run_cfsp, tmp_path, monkeypatch):
    given = ["evaluation=none", "calibration.n_samples=8"]
    assert run_cfsp(*given)[0] == 0
    started = record_of(tmp_path / "out")["started"]
    with monkeypatch.context() as patch:
        patch.setattr("cfsp.pipeline.base_models.load_model", lambda *_, **__: pytest.fail("the run was repeated"))
        assert run_cfsp(*given)[0] == 0
    assert record_of(tmp_path / "out")["started"] == started
    shutil.rmtree(tmp_path / "out" / "model")
    code, _, err = run_cfsp(*given)
    assert code == 0, err
    assert (tmp_path / "out" / "model" / "config.json").is_file(), "a missing model must be written again"
    assert run_cfsp(*given, "force=true")[0] == 0


def test_a_repeat_that_fails_does_not_cost_the_record_of_success(run_cfsp, tmp_path, monkeypatch):
    given = ["evaluation=none", "save.model=false", "calibration.n_samples=4"]
    assert run_cfsp(*given)[0] == 0
    success = (tmp_path / "out" / "record.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("cfsp.pipeline.base_models.probe", lambda *_, **__: 1 / 0)
        assert run_cfsp(*given, "force=true")[0] == 1
    assert (tmp_path / "out" / "record.json").read_bytes() == success
    failed = json.loads((tmp_path / "out" / "record.repeat.json").read_text())
    assert (failed["status"], failed["error"]["type"]) == ("failed", "ZeroDivisionError")
    assert run_cfsp(*given, "force=true")[0] == 0
    assert not (tmp_path / "out" / "record.repeat.json").exists()


def test_a_uniform_plan_is_a_plain_folder(run_cfsp, tmp_path):
    code, _, err = run_cfsp("pruner=uniform", "evaluation=none", "calibration.n_samples=8")
    assert code == 0, err
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["intermediate_size"] == 384
    assert record_of(tmp_path / "out")["checkpoint"]["form"] == "plain"
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.model.layers[0].mlp.down_proj.in_features == 384


def test_pruning_a_pruned_folder_composes_with_its_plan(demo, run_cfsp, tmp_path):
    base, _ = demo
    code, _, err = run_cfsp(
        "model=local", f"model.path={base / 'out' / 'model'}", "sparsity.ratio=0.25", "evaluation=none"
    )
    assert code == 0, err
    composed = cfsp.PruningPlan.load(tmp_path / "out" / "model" / "plan.json")
    first = cfsp.PruningPlan.load(base / "out" / "plan.json")
    assert composed.base_fingerprint == first.base_fingerprint
    dense, _ = cfsp.load(cfsp.__path__[0] + "/assets/books7m")
    twice, _ = cfsp.load(tmp_path / "out" / "model")
    at_once = cfsp.apply(dense, composed)
    assert all(torch.equal(a, b) for a, b in zip(twice.parameters(), at_once.parameters(), strict=True))


def test_self_generated_calibration_needs_no_data(run_cfsp, tmp_path):
    code, _, err = run_cfsp(
        "calibration=self",
        "calibration.n_samples=4",
        "calibration.seq_len=32",
        "evaluation=none",
        "save.model=false",
    )
    assert code == 0, err
    assert record_of(tmp_path / "out")["calibration"]["name"] == "self"


@pytest.mark.parametrize(
    "names", [["last_word"], pytest.param(["last_word", "arc_easy_local"], marks=pytest.mark.slow)], ids="-".join
)
def test_real_harness_tasks_from_local_files(run_cfsp, tmp_path, names):
    """TinyStories cloze, on which the tiny model is far from chance, and ARC-easy, on which it is at chance."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    sources = {
        "last_word": shared("data", "zero_shot", "tinystories_cloze", "last_word.jsonl"),
        "arc_easy_local": shared("data", "zero_shot", "arc_easy.jsonl"),
    }
    for name in names:
        path = sources[name]
        (tasks / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '{path}'}}}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{query}}'\n"
            "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{gold}}'\ntarget_delimiter: ' '\n"
            "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\nmetadata: {version: 1.0}\n"
        )
    code, _, err = run_cfsp(
        "model=local", f"model.path={shared('models', 'stories260K')}", "pruner=none",
        f"evaluation.zero_shot.tasks=[{','.join(names)}]", f"evaluation.zero_shot.include_path={tasks}",
        "plugins.allow=[tasks]",
        "evaluation.zero_shot.batch_size=256", "evaluation.perplexity=null", "evaluation.cost=null",
    )  # fmt: skip
    assert code == 0, err
    found = figures(record_of(tmp_path / "out"), "dense", "zero_shot")
    assert found["zero_shot", "last_word", "acc"] == pytest.approx(0.806, abs=0.02)
    if "arc_easy_local" in names:
        assert 0.2 < found["zero_shot", "arc_easy_local", "acc"] < 0.32
    rows = {row["task"]: row["n"] for row in record_of(tmp_path / "out")["measurements"]["dense"]}
    assert rows == {name: {"last_word": 500, "arc_easy_local": 2376}[name] for name in names}
