"""A written folder alone, in stock tools: transformers' last 4.x, the floor and the installed one; PEFT; lm-eval."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cfsp
from cfsp.checkpoint.reference import place_of, read_reference
from cfsp.checkpoint.save import save_checkpoint
from cfsp.plan.pruning_plan import BlockPlan, PruningPlan
from cfsp.verify.comparison import compare
from cfsp.verify.tool import TOOLS, ask
from tests.conftest import ROOT, VOCABULARY
from tests.helpers.environments import with_transformers
from tests.helpers.structures import SOME, STRUCTURES, pruned
from tests.helpers.tiny import ARCHITECTURES, tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

ASSETS = ROOT / "cfsp" / "assets" / "books7m"
ELSEWHERE = ROOT / "tests" / "helpers" / "elsewhere.py"
#: Of the second sequence so many tokens are padding in the tests of it.
PADDING = 7
TEXT = "The boats lay still in the mist."
IDS = tokens(2, 32, seed=1, vocabulary=VOCABULARY)
#: What cfsp supports from; see pyproject.toml.
FLOOR = re.search(r'"transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def uniform(architecture: str) -> torch.nn.Module:
    """Equal widths: a plain folder of the base architecture."""
    plan = PruningPlan("m", "f", {"name": "hand"}, (BlockPlan(SOME),) * 5, {}, {})
    return cfsp.apply(tiny_model(architecture, blocks=5, vocab_size=VOCABULARY), plan)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, dict[str, torch.nn.Module]]:
    """Folder name -> the model in memory that was saved there, for every family and structure."""
    base = tmp_path_factory.mktemp("versions")
    found = {}
    for architecture in ARCHITECTURES:
        for structure in (*STRUCTURES, "uniform"):
            plain = structure == "uniform"
            model = uniform(architecture) if plain else pruned(architecture, structure, vocab_size=VOCABULARY)
            with torch.no_grad():
                model.lm_head.weight.mul_(10)  # logits as large as a trained model's
            found[f"{architecture}-{structure}"] = model
            saved = save_checkpoint(model, base / f"{architecture}-{structure}", source=ASSETS)
            assert (saved.form == "plain") == (structure in ("uniform", "equal_heads", "blocks"))
    return base, found


@pytest.mark.parametrize(
    "version",
    ["installed", "4.57.6", pytest.param("floor", marks=pytest.mark.slow)],
)
def test_transformers_alone_makes_the_model_in_memory(models, version, tmp_path):
    base, in_memory = models
    floor = FLOOR[1] if FLOOR[1].count(".") > 1 else f"{FLOOR[1]}.*"
    python = sys.executable if version == "installed" else with_transformers(floor if version == "floor" else version)
    request = {"ids": IDS.tolist(), "padding": PADDING, "text": TEXT, "folders": sorted(in_memory)}
    (base / "request.json").write_text(json.dumps(request))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    ended = subprocess.run(
        [str(python), "-I", str(ELSEWHERE), "request.json"],
        cwd=base, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    answer = torch.load(base / "result.pt")
    assert answer["version"].startswith({"floor": FLOOR[1]}.get(version, version if version[0].isdigit() else ""))
    assert answer["torch"] == torch.__version__
    from transformers import AutoTokenizer

    wanted_tokens = AutoTokenizer.from_pretrained(ASSETS)(TEXT)["input_ids"]
    for name, model in in_memory.items():
        found = answer["folders"][name]
        plain = name.split("-")[1] in ("uniform", "equal_heads", "blocks")
        assert found["class"].startswith("transformers.models." if plain else "transformers_modules."), name
        assert found["lost"] == [], name
        with torch.no_grad():
            logits, hidden = model(IDS).logits, model.model(IDS).last_hidden_state
        assert (found["logits"] - logits).abs().max() <= 1e-5, name
        assert (found["hidden"] - hidden).abs().max() <= 1e-5, name
        assert found["padded"] <= 5e-5, name  # a mask takes another kernel: 6e-6 is measured, of logits up to 5
        texts = found["texts"]
        assert torch.equal(texts["cached"], texts["whole"]), name
        assert texts["cached"].shape == (2, IDS.shape[1] + 8)
        assert torch.equal(texts["padded"], texts["alone"]), name
        assert found["again"] == 0, name
        assert found["tokens"] == found["tokens without trust"] == wanted_tokens, name


@pytest.mark.parametrize("name", ["llama-everything", "qwen2-biases"])
def test_peft_trains_and_merges_on_a_folder_that_stock_code_loads(models, name):
    folder = models[0] / name
    reference = read_reference(place_of(folder))
    request = {
        "path": str(folder), "token_ids": reference.token_ids.tolist(), "greedy": 0, "dtype": "float32",
        "trust_remote_code": True,
    }  # fmt: skip
    answer = ask(TOOLS["peft"], request)
    assert answer["checks"]["merging the trained adapter"] <= 1e-5
    assert compare("peft", answer, reference, 1e-5).outcome == "equal"


def test_the_command_line_of_lm_eval_gives_the_figures_of_the_run(run_cfsp, tmp_path):
    """The bundled model pruned by the main job, a local task; the harness in a process that has no cfsp."""
    task = "books_grammar"
    words = [
        "evaluation.perplexity=null", "evaluation.cost=null", f"evaluation.zero_shot.tasks=[{task}]",
        "evaluation.zero_shot.limit=120", "calibration.n_samples=16", "save.dtype=float32",
    ]  # fmt: skip
    code, _, err = run_cfsp(*words)
    assert code == 0, err
    out = tmp_path / "out"
    measured = json.loads((out / "record.json").read_text())["measurements"]
    rows = {side: [row for row in measured[side] if row["task"] == task] for side in ("dense", "pruned")}
    assert json.loads((out / "model" / "config.json").read_text())["model_type"] == "pruned_llama"
    program = "import sys; sys.modules['cfsp'] = None; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    words = [
        "--model", "hf", "--model_args", f"pretrained={out / 'model'},trust_remote_code=True,dtype=float32",
        "--tasks", task, "--include_path", str(ROOT / "cfsp" / "assets" / "tasks"), "--device", "cpu",
        "--batch_size", "64", "--limit", "120", "--output_path", str(tmp_path / "harness.json"),
    ]  # fmt: skip
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    # The task names its data file beside its YAML.
    ended = subprocess.run(
        [sys.executable, "-I", "-c", program, *words],
        cwd=ROOT / "cfsp" / "assets" / "tasks", env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    (results,) = tmp_path.glob("harness*.json")
    found = json.loads(results.read_text())["results"][task]
    assert rows["pruned"]
    for row in rows["pruned"]:
        assert found[f"{row['metric']},none"] == row["value"]
    assert rows["pruned"][0]["value"] != rows["dense"][0]["value"]
