"""What a pruned model of every structure is: its class, its folder, and its key-value cache."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

import cfsp
from cfsp.checkpoint.save import save_checkpoint
from cfsp.errors import CheckpointError, UnsupportedModelError
from cfsp.plan.pruning_plan import BlockPlan, PruningPlan
from cfsp.pruned_model.adopt import adopt
from cfsp.pruned_model.family import pruned_family
from tests.helpers import architectures
from tests.helpers.matrix import in_turn
from tests.helpers.structures import GONE, SOME, STRUCTURES, logits, pruned
from tests.helpers.tiny import ARCHITECTURES, tiny_model, tokens

#: Architectures whose code is that of Llama but for biases and norms meet the structures in turn.
CASES = in_turn(
    (*ARCHITECTURES, "llama_bias", "gemma2"),
    list(STRUCTURES),
    always=lambda architecture, structure: architecture in ("llama", "gemma2") or structure in ("heads", "everything"),
)
CASES += [pytest.param("olmo2", s) for s in ("widths", "first_attention", "attention", "ffn", "blocks")]


@pytest.mark.parametrize(("architecture", "structure"), CASES)
def test_a_folder_loads_with_equal_logits_and_holds_nothing_removed(architecture, structure, tmp_path):
    from transformers import AutoModelForCausalLM

    model = pruned(architecture, structure)
    saved = save_checkpoint(model, tmp_path / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = tokens(2, seed=1)
    assert torch.equal(logits(reloaded, ids), logits(model, ids))
    count = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in reloaded.parameters()) == count
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as stream:
        names = list(stream.keys())
        tied = model.config.tie_word_embeddings
        assert sum(stream.get_tensor(name).numel() for name in names) == count
        assert not tied or "lm_head.weight" not in names
    blocks = [block for block in STRUCTURES[structure] if block.keeps_block]
    for index, block in enumerate(blocks):
        own = [name for name in names if f".layers.{index}." in name]
        norms = pruned_family(model.config.model_type.removeprefix("pruned_")).norms
        for kind, part, stays in (("attention", "self_attn", block.attention), ("mlp", "mlp", block.ffn)):
            assert any(f".{part}." in name for name in own) == stays
            assert all(any(norm in name for name in own) == stays for norm in norms[kind])
    plain = structure == "blocks" or structure == "equal_heads"
    assert (saved.form == "plain") == plain
    assert model.config.model_type.startswith("pruned_") != plain
    before = model.state_dict()
    adopt(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model, ids), logits(reloaded, ids)), "to adopt twice changes nothing"


def generated(model, ids, mask, steps, *, cached):
    """Greedy continuation; the position of a token is the number of real tokens before it."""
    for _ in range(steps):
        if not cached:
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            step = logits(model, ids, attention_mask=mask, position_ids=positions, use_cache=False)[:, -1]
            ids = torch.cat([ids, step.argmax(-1, keepdim=True)], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    if cached:
        settings = {"do_sample": False, "max_new_tokens": steps, "min_new_tokens": steps, "pad_token_id": 0}
        ids = model.generate(ids, attention_mask=mask, use_cache=True, eos_token_id=None, **settings)
    return ids


@pytest.mark.parametrize(("architecture", "structure"), CASES)
def test_generation_with_the_cache_is_a_full_forward_token_by_token(architecture, structure):
    """Greedy, two prompts of unequal length with left padding; and a prompt in two pieces."""
    # Gemma 2 alternates sliding and full attention: the text must outgrow the window.
    settings = {"sliding_window": 8} if architecture in ("gemma2", "mistral") else {}
    model = pruned(architecture, structure, **settings)
    ids, mask = tokens(2, 12, seed=2), torch.ones(2, 12, dtype=torch.int64)
    ids[1, :5], mask[1, :5] = 0, 0
    full = generated(model, ids, mask, 10, cached=False)
    assert torch.equal(generated(model, ids, mask, 10, cached=True), full)
    prompt = tokens(1, 20, seed=4)
    with torch.no_grad():
        first = model(prompt[:, :13], use_cache=True)
        second = model(prompt[:, 13:], past_key_values=first.past_key_values, use_cache=True)
    whole = logits(model, prompt)
    assert (second.logits - whole[:, 13:]).abs().max() <= 1e-5 * whole.abs().max()


def test_folders_load_where_cfsp_is_not(tmp_path):
    """In a process that never imports cfsp, with the folders' own code."""
    expected = {}
    for structure in STRUCTURES:
        for architecture in ("llama", "qwen3", "gemma2"):
            model = pruned(architecture, structure)
            save_checkpoint(model, tmp_path / f"{architecture}-{structure}")
            expected[f"{architecture}-{structure}"] = logits(model, tokens(2, seed=1))[:, -1, :8].tolist()
    for name in ("gpt2", "opt", "phi3", "bloom", "falcon_40b"):
        entry = architectures.ARCHITECTURES[name]
        model = entry.build()
        groups = (0, 2) if entry.no_heads is None else None
        blocks = (BlockPlan(tuple(range(5, 60)), groups), BlockPlan(attention=False), BlockPlan(ffn=False), BlockPlan())
        cfsp.apply(model, PruningPlan("m", "f", {"name": "hand"}, blocks, {}, {}))
        save_checkpoint(model, tmp_path / name)
        expected[name] = logits(model, tokens(2, seed=1, vocabulary=architectures.VOCABULARY))[:, -1, :8].tolist()
    (tmp_path / "ids.json").write_text(json.dumps(tokens(2, seed=1).tolist()))
    (tmp_path / "small.json").write_text(json.dumps(tokens(2, seed=1, vocabulary=architectures.VOCABULARY).tolist()))
    script = (
        "import json, pathlib, sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        "ids, small = (torch.tensor(json.load(open(f'{name}.json'))) for name in ('ids', 'small'))\nfound = {}\n"
        "for folder in sorted(p for p in pathlib.Path('.').iterdir() if p.is_dir()):\n"
        "    model = AutoModelForCausalLM.from_pretrained(f'./{folder.name}', trust_remote_code=True).eval()\n"
        "    given = ids if model.config.vocab_size == 128 else small\n"
        "    found[folder.name] = model(given).logits[:, -1, :8].tolist()\n"
        "assert 'cfsp' not in sys.modules\nprint(json.dumps(found))\n"
    )
    environment = {"HF_MODULES_CACHE": str(tmp_path.parent / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.allclose(torch.tensor(found[name]), torch.tensor(values), rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("order", ["import cfsp; import transformers", "import transformers; import cfsp"])
def test_importing_cfsp_is_enough_to_load_a_folder(order, tmp_path):
    save_checkpoint(pruned("qwen2", "everything"), tmp_path / "model")
    code = f"""
import sys
import cfsp
assert "torch" not in sys.modules and "transformers" not in sys.modules
del sys.modules["cfsp"]
{order}
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("model")
assert type(model).__module__ == "cfsp_pruned_families.modeling_pruned_qwen2", type(model)
assert type(AutoModel.from_pretrained("model")).__name__ == "PrunedQwen2Model"
try:
    AutoConfig.for_model("pruned_nothing")
except ValueError as error:
    assert "pruned_nothing" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning", "-c", code], check=True, cwd=tmp_path)


def test_unknown_entries_of_a_folder_are_refused(tmp_path):
    from transformers import AutoModelForCausalLM

    save_checkpoint(pruned("llama", "attention"), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    for entry, message in (({"skip": ["norm"]}, "attention and mlp can be missing"), ({"hidden_size": 16}, "only")):
        path.write_text(json.dumps({**config, "per_layer_config": {"1": entry}}))
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_norms_are_found_by_structure():
    norms = {name: pruned_family(name).norms for name in ("llama", "gemma2", "olmo2", "cohere")}
    assert norms["llama"] == {"attention": ("input_layernorm",), "mlp": ("post_attention_layernorm",)}
    assert norms["gemma2"]["attention"] == ("input_layernorm", "post_attention_layernorm")
    assert norms["olmo2"]["mlp"] == ("post_feedforward_layernorm",)
    assert norms["cohere"] == {"attention": (), "mlp": ()}, "one norm feeds both"


@pytest.mark.parametrize("structure", ["heads", "equal_heads"])
def test_the_head_dimension_is_written_down_where_heads_go(structure, tmp_path):
    """Qwen2's configuration has none: it is hidden_size / heads, which fewer heads would change."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = Qwen2Config(**sizes, num_hidden_layers=5, vocab_size=128)
    assert getattr(config, "head_dim", None) is None
    model = AutoModelForCausalLM.from_config(config).eval()
    plan = PruningPlan("m", "f", {}, tuple(STRUCTURES[structure]), {}, {})
    save_checkpoint(cfsp.apply(model, plan), tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["head_dim"] == 8
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(reloaded, tokens(2)), logits(model, tokens(2)))


def test_lists_of_the_configuration_follow_removed_blocks(tmp_path):
    """SmolLM3 says per layer whether positions are rotated; a shifted list would rotate the wrong ones."""
    from transformers import AutoModelForCausalLM

    model = tiny_model("smollm3", blocks=5, no_rope_layers=[1, 0, 1, 1, 0], pad_token_id=0)
    plan = PruningPlan("m", "f", {}, (BlockPlan(), GONE, *[BlockPlan()] * 3), {}, {})
    cfsp.apply(model, plan)
    assert model.config.no_rope_layers == [1, 1, 1, 0]
    save_checkpoint(model, tmp_path / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(reloaded, tokens(2)), logits(model, tokens(2)))


def test_a_model_without_any_attention_is_refused():
    plan = PruningPlan("m", "f", {}, (BlockPlan(attention=False),) * 4, {}, {})
    with pytest.raises(UnsupportedModelError, match="leaves no attention"):
        cfsp.apply(tiny_model(), plan)


def test_a_pruned_folder_is_pruned_again(tmp_path):
    """Loaded from disk, so that the classes come from the folder's configuration."""
    from transformers import AutoModelForCausalLM

    save_checkpoint(pruned("qwen3", "everything"), tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    for pruner, scope in (("cfsp", "ffn"), ("flap_al_am", "decoder"), ("block_pruner", "decoder")):
        plan = cfsp.prune(loaded, tokens(), pruner, 0.2, scope, 8)
        smaller = cfsp.apply(copy.deepcopy(loaded), plan)
        assert sum(p.numel() for p in smaller.parameters()) == plan.parameters["after"]
        save_checkpoint(smaller, tmp_path / pruner)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / pruner).eval()
        assert torch.equal(logits(again, tokens(2)), logits(smaller, tokens(2)))


def test_a_plan_for_more_heads_than_there_are_is_refused():
    with pytest.raises(CheckpointError, match="keeps KV group 5, the model has 2"):
        cfsp.apply(tiny_model(), PruningPlan("m", "f", {}, (BlockPlan(None, (5,)), *[BlockPlan()] * 3), {}, {}))


def test_rounding_the_model_leaves_the_plan_as_it_was(tmp_path):
    from cfsp.model.finite import round_to_stored

    blocks = (BlockPlan(SOME), *[BlockPlan()] * 4)
    plan = PruningPlan("m", "f", {"name": "hand"}, blocks, {}, {}, tensors={"blocks.0.ffn.bias": torch.randn(32)})
    before = plan.tensors["blocks.0.ffn.bias"].clone()
    model = cfsp.apply(tiny_model(blocks=5), plan)
    round_to_stored(model, torch.bfloat16)
    assert torch.equal(plan.tensors["blocks.0.ffn.bias"], before)
    assert not torch.equal(model.model.layers[0].mlp.down_proj.bias, before)
    assert PruningPlan.load(plan.save(tmp_path / "plan.json")).tensors
