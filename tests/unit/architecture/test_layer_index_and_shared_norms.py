"""What a layer made of its index, norms that serve more than a submodule, attentions of other names: saved rightly."""

from __future__ import annotations

import copy

import pytest
import torch

import cfsp
from cfsp.architecture.views import resolve
from cfsp.checkpoint.save import save_checkpoint
from cfsp.errors import UnsupportedModelError
from cfsp.plan.pruning_plan import BlockPlan, PruningPlan
from cfsp.pruner.units import why_heads_stay
from tests.helpers.architectures import ARCHITECTURES, VOCABULARY, randomise
from tests.helpers.masking import masked
from tests.helpers.tiny import tokens

IDS = tokens(2, 12, seed=3, vocabulary=VOCABULARY)
GONE, STAYS = BlockPlan(attention=False, ffn=False), BlockPlan()


def built(model_type: str, **settings):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings), dtype=torch.float32).eval()
    randomise(model, 0)
    return model


def hand_plan(*blocks: BlockPlan) -> PruningPlan:
    return PruningPlan("m", "f", {"name": "hand"}, blocks, {}, {})


@torch.no_grad()
def check(model, plan, folder):
    """Sliced gives what masked gives, and a folder what the sliced model gives."""
    from transformers import AutoModelForCausalLM

    sliced = cfsp.apply(copy.deepcopy(model), plan)
    found = sliced(IDS).logits
    with masked(model, plan):
        expected = model(IDS).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    save_checkpoint(sliced, folder)
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (again(IDS).logits - found).abs().max() <= 1e-5 * found.abs().max()


def test_a_scale_by_the_index_of_a_layer_outlives_the_layers_before_it(tmp_path):
    model = built("gpt2", **{**ARCHITECTURES["gpt2"].settings, "scale_attn_by_inverse_layer_idx": True})
    check(model, hand_plan(GONE, STAYS, STAYS, STAYS), tmp_path / "model")


def test_a_scale_by_the_index_that_no_folder_can_say_is_refused():
    settings = {**ARCHITECTURES["llama"].settings, "num_attention_heads": 4, "num_key_value_heads": 2}
    with pytest.raises(UnsupportedModelError, match=r"self_attn\.lambda_init"):
        cfsp.apply(built("diffllama", **settings), hand_plan(GONE, STAYS, STAYS, STAYS))


@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_a_norm_behind_which_the_residual_is_taken_stays(kind, tmp_path):
    model = built("bloom", **{**ARCHITECTURES["bloom"].settings, "apply_residual_connection_post_layernorm": True})
    gone = BlockPlan(attention=kind != "attention", ffn=kind != "ffn")
    check(model, hand_plan(STAYS, gone, STAYS, STAYS), tmp_path / "model")


def test_a_submodule_goes_from_a_parallel_residual_with_one_norm(tmp_path):
    gone = BlockPlan(ffn=False)
    model = ARCHITECTURES["stablelm_parallel"].build()
    check(model, hand_plan(STAYS, gone, STAYS, STAYS), tmp_path / "model")


def test_recurrent_blocks_without_a_self_attn_lose_neurons(tmp_path):
    types = ["linear_attention", "full_attention"] * 2
    model = built("olmo_hybrid", **{**ARCHITECTURES["llama"].settings, "layer_types": types})
    kept = BlockPlan(ffn_kept=tuple(range(40)))
    check(model, hand_plan(kept, kept, STAYS, STAYS), tmp_path / "model")


def test_square_gates_of_a_recurrent_mixer_are_no_experts(tmp_path):
    settings = {**ARCHITECTURES["llama"].settings, "lru_width": 48, "head_dim": 8, "attention_window_size": 8}
    model = built("recurrent_gemma", **settings)
    assert resolve(model).widths == [44] * 4  # it halves what is configured
    check(model, hand_plan(BlockPlan(ffn_kept=tuple(range(20))), STAYS, STAYS, STAYS), tmp_path / "model")


def test_as_many_sinks_as_a_head_has_channels_are_of_the_heads():
    settings = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    model = built("gpt_oss", **{**ARCHITECTURES["gpt_oss"].settings, **settings})
    assert "sinks" in why_heads_stay(resolve(model))
