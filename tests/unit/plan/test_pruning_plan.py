"""Plans as files and as history: what is saved comes back, and two plans compose to the one of both."""

from __future__ import annotations

import json

import pytest
import torch

from cfsp.errors import CheckpointError
from cfsp.plan.history import plan_digest
from cfsp.plan.pruning_plan import BlockPlan, PruningPlan, tensor_name


def plan(*blocks: BlockPlan, tensors: dict[str, torch.Tensor] | None = None) -> PruningPlan:
    return PruningPlan("model", "fingerprint", {"name": "hand"}, blocks, {}, {}, tensors=tensors or {})


def test_a_plan_comes_back_from_its_files(tmp_path):
    tensors = {tensor_name(0, "ffn"): torch.arange(4.0)}
    before = plan(BlockPlan((0, 2, 5)), BlockPlan(None, (1,), ffn=False), BlockPlan(attention=False), tensors=tensors)
    file = before.save(tmp_path / "plan.json")
    after = PruningPlan.load(file)
    assert after.blocks == before.blocks
    assert after.tensors.keys() == tensors.keys()
    assert torch.equal(after.tensors[tensor_name(0, "ffn")], torch.arange(4.0))
    assert after.to_json() == before.to_json()


def test_one_line_for_each_block(tmp_path):
    file = plan(BlockPlan((0, 1)), BlockPlan((2, 3))).save(tmp_path / "plan.json")
    lines = [line for line in file.read_text().splitlines() if "ffn_kept" in line]
    assert len(lines) == 2


def test_plans_compose_by_the_units_of_the_dense_model():
    first = plan(BlockPlan((1, 3, 5, 7)), BlockPlan(None, (0, 2)), BlockPlan(ffn=False))
    second = plan(BlockPlan((0, 3)), BlockPlan(attention=False), BlockPlan(None))
    composed = second.compose(first)
    assert composed.blocks[0].ffn_kept == (1, 7)
    assert not composed.blocks[1].attention
    assert not composed.blocks[2].ffn


@pytest.mark.parametrize(
    "change",
    [{"blocks": [{"ffn_kept": [3, 1]}]}, {"blocks": [{"ffn_kept": [1, 1]}]}, {"blocks": [{"attention": "gone"}]}],
)
def test_a_damaged_plan_is_refused_when_it_is_read(change, tmp_path):
    file = plan(BlockPlan((0, 2))).save(tmp_path / "plan.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError) as caught:
        PruningPlan.load(file)
    assert "\n" not in str(caught.value)


def test_the_digest_of_a_plan_is_that_of_its_bytes(tmp_path):
    file = plan(BlockPlan((0, 2))).save(tmp_path / "plan.json")
    assert plan_digest(file.read_bytes()) != plan_digest(file.read_bytes() + b" ")
