"""On a CUDA device: the same plan as on CPU, and the main job as a whole."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import cfsp
from tests.tiny import tiny_model, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("pruner", ["cfsp", "wanda_sp"])
def test_the_plan_does_not_depend_on_the_device(pruner):
    model, ids = tiny_model(), tokens()
    cpu = cfsp.prune(model, ids, pruner=pruner, ratio=0.5, round_to=8)
    cuda = cfsp.prune(copy.deepcopy(model).cuda(), ids, pruner=pruner, ratio=0.5, round_to=8)
    kept = [{(i, k) for i, block in enumerate(plan.blocks) for k in block.ffn_kept} for plan in (cpu, cuda)]
    assert len(kept[0] ^ kept[1]) <= 0.01 * len(kept[0])


def test_the_main_job_runs_in_the_checkpoints_dtype(run_cfsp, tmp_path):
    code, _, err = run_cfsp("model.device=cuda", "evaluation.zero_shot=null")
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["model"]["dtype"] == "bfloat16"
    assert all(stage["peak_gpu_bytes"] for stage in record["stages"])
