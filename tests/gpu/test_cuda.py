"""On a CUDA device: the same plan as on CPU, and the main job as a whole."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import cfsp
from tests.helpers.tiny import tiny_model, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    "pruner",
    ["cfsp", "wanda_sp", "flap_al_am", "wanda_sp_sequential", "llm_pruner", "two_ssp", "block_pruner", "shortgpt",
     "sliding_window"],
)  # fmt: skip
def test_the_plan_does_not_depend_on_the_device(pruner):
    model, ids = tiny_model(blocks=6), tokens()
    on_cuda = copy.deepcopy(model).cuda()
    plans = [cfsp.prune(m, ids, pruner=pruner, ratio=0.4, round_to=8) for m in (model, on_cuda)]
    kept = [
        {(i, k) for i, block in enumerate(plan.blocks) if block.ffn for k in block.ffn_kept or range(96)}
        for plan in plans
    ]
    assert len(kept[0] ^ kept[1]) <= 0.01 * len(kept[0])
    others = [[(b.kv_groups_kept, b.attention, b.ffn) for b in plan.blocks] for plan in plans]
    assert others[0] == others[1]
    pruned = cfsp.apply(on_cuda, plans[1])
    assert pruned(ids[:2].cuda()).logits.isfinite().all()


def test_the_main_job_runs_in_the_checkpoints_dtype(run_cfsp, tmp_path):
    code, _, err = run_cfsp("model.device=cuda", "evaluation.zero_shot=null")
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["model"]["dtype"] == "bfloat16"
    assert all(stage["peak_gpu_bytes"] for stage in record["stages"])


@pytest.mark.parametrize("settings", [["recovery=ig_lora", "recovery.bf16=true"], ["recovery=full"]], ids=" ".join)
@pytest.mark.parametrize("objective", ["lm", "distill"])
def test_a_recovery_lowers_the_perplexity(run_cfsp, tmp_path, settings, objective):
    words = ["model.device=cuda", "model.dtype=float32", "evaluation=perplexity", "recovery.max_steps=20"]
    words += ["evaluation.perplexity.datasets=[bundled]", "evaluation.perplexity.seq_len=256"]
    words += [f"recovery.objective={objective}", "recovery.gradient_checkpointing=true"]
    words += ["recovery.learning_rate=0.0001"] if settings == ["recovery=full"] else []
    code, _, err = run_cfsp(*settings, *words)
    assert code == 0, err
    figures = json.loads((tmp_path / "out" / "record.json").read_text())["measurements"]
    assert figures["recovered"][0]["value"] < figures["pruned"][0]["value"]
