"""Architecture x pruner: whatever decoder transformers builds from a configuration is pruned, saved and reloaded."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch

import cfsp
from cfsp.errors import UnsupportedModelError
from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.views import resolve
from tests.architectures import ARCHITECTURES, VOCABULARY
from tests.masking import masked

DENSE = [name for name, entry in ARCHITECTURES.items() if entry.experts is None]
PRUNERS = ("cfsp", "flap", "llm_pruner", "two_ssp")
RATIO, STEP = 0.4, 4


@cache
def built(name: str):
    return ARCHITECTURES[name].build()


def ids(n: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (n, length), generator=torch.Generator().manual_seed(seed))


def words(name: str, pruner: str) -> list[str]:
    """What the method needs to reach the ratio on so small a model."""
    if pruner == "llm_pruner" and ARCHITECTURES[name].n_kv_heads == 1:
        return ["sparsity.protect=none"]  # one KV group stays in each block, so the FFN must give all
    if pruner == "two_ssp":
        return ["pruner.attention_submodules=1"]
    return []


def no_heads(name: str) -> bool:
    return ARCHITECTURES[name].no_heads is not None and ARCHITECTURES[name].n_kv_heads > 1


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("name", DENSE)
def test_every_pruner_on_every_decoder(name, pruner, tmp_path):
    """Budget met, masked == sliced, saved and reloaded with equal logits, cached generation == full forward."""
    from transformers import AutoModelForCausalLM

    model = built(name)
    calibration = ids(6, 16, seed=1)
    if pruner == "llm_pruner" and no_heads(name):
        with pytest.raises(UnsupportedModelError, match=r"pruner\.structure=ffn"):
            cfsp.prune(model, calibration, pruner, RATIO, round_to=STEP)
        return
    plan = cfsp.prune(model, calibration, pruner, RATIO, round_to=STEP, overrides=words(name, pruner))
    view = resolve(model)
    ffn = view.blocks[0].ffn
    unit = STEP * ffn.neuron_parameters
    if pruner == "llm_pruner":
        unit = max(unit, view.blocks[0].attention.group_parameters)
    if pruner == "two_ssp":  # the same width everywhere, by Eq. 5 and without norms and biases
        unit = len(view.blocks) * unit + sum(p.numel() for p in view.blocks[0].module.parameters() if p.dim() == 1)
    total = sum(b.ffn.width * b.ffn.neuron_parameters for b in view.blocks)
    scope = total if plan.requested["scope"] == "ffn" else view.decoder_parameters
    assert abs(plan.achieved["ratio"] - RATIO) <= unit / scope

    sliced = cfsp.apply(copy.deepcopy(model), plan)
    assert sum(p.numel() for p in sliced.parameters()) == plan.parameters["after"]
    prompt = ids(2, 12, seed=2)
    with torch.no_grad():
        found = sliced(prompt).logits
        with masked(model, plan):
            expected = model(prompt).logits
    # The same fp32 kernels on matrices of other shapes: the order of sums differs.
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()

    save_checkpoint(sliced, tmp_path / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(reloaded(prompt).logits, found)
        made = reloaded.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=6, min_new_tokens=6,
            pad_token_id=0, eos_token_id=None,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        whole = reloaded(made.sequences, use_cache=False).logits[:, -7:-1]
    cached = torch.stack(made.logits, dim=1)
    assert (cached - whole).abs().max() <= 1e-4 * whole.abs().max()
