"""The FFN part of MoDeGPT as a preset: plans of every family, applied, saved and generated from."""

from __future__ import annotations

import copy

import pytest
import torch

import cfsp
from cfsp.checkpoint.save import save_checkpoint
from tests.helpers.tiny import ARCHITECTURES, tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "llama_bias"])
def test_budget_masks_folder_and_cached_generation(architecture, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = tiny_model(architecture), tokens(16)
    plan = cfsp.prune(model, ids, "modegpt_ffn", 0.4, round_to=8)
    assert plan.method["importance"]["component"] == "leverage"
    assert plan.method["allocator"]["component"] == "block_influence"
    assert plan.tensors
    assert abs(plan.achieved["ratio"] - 0.4) <= 8 / (4 * 96)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for index, block in enumerate(plan.blocks):
            if block.ffn_kept is None:  # a block of large influence loses nothing
                continue
            down = masked.model.layers[index].mlp.down_proj
            down.weight.zero_()
            down.weight[:, list(block.ffn_kept)] = plan.tensors[f"blocks.{index}.ffn.weight"]
            if down.bias is not None:
                down.bias.copy_(plan.tensors[f"blocks.{index}.ffn.bias"])
        expected = masked(ids).logits
        sliced = cfsp.apply(model, plan)
        found = sliced(ids).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    save_checkpoint(sliced, tmp_path / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, found)
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        made, whole = (reloaded.generate(ids[:2], use_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(made, whole)


def test_the_blocks_that_turn_the_hidden_state_least_lose_most() -> None:
    plan = cfsp.prune(tiny_model(), tokens(16), "modegpt_ffn", 0.4, round_to=1, overrides=["allocator.epsilon=0.05"])
    influence = [row["distance"]["cosine"] for row in plan.details]
    ratios = [row["keep_ratio"] for row in plan.details]
    assert sorted(range(4), key=influence.__getitem__) == sorted(range(4), key=ratios.__getitem__)
    assert min(ratios) < max(ratios)
