"""Architecture x pruner: whatever decoder transformers builds from a configuration is pruned, saved and reloaded."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

import cfsp
from cfsp.architecture.views import resolve
from cfsp.checkpoint.save import save_checkpoint
from cfsp.errors import UnsupportedModelError
from tests.conftest import VOCABULARY as WORDS
from tests.conftest import save_with_tokenizer
from tests.helpers.architectures import ARCHITECTURES, VOCABULARY
from tests.helpers.masking import masked
from tests.helpers.matrix import in_turn

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


# Heads and neurons, which llm_pruner cuts together, lie differently in every architecture; the others take turns.
@pytest.mark.parametrize(
    ("name", "pruner"), in_turn(DENSE, PRUNERS, always=lambda name, pruner: pruner == "llm_pruner")
)
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


def test_an_architecture_that_appears_tomorrow_needs_no_change(tmp_path):
    """A class of its own with usual names: a parallel residual, one norm, w1/w3/w2, a fused qkv."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from tests.helpers import new_decoder as new

    AutoConfig.register("tomorrow", new.TomorrowConfig, exist_ok=True)
    AutoModel.register(new.TomorrowConfig, new.TomorrowModel, exist_ok=True)
    AutoModelForCausalLM.register(new.TomorrowConfig, new.TomorrowForCausalLM, exist_ok=True)
    torch.manual_seed(0)
    model = new.TomorrowForCausalLM(new.TomorrowConfig()).eval()
    prompt = ids(2, 12, seed=2)
    for pruner in PRUNERS:
        plan = cfsp.prune(model, ids(6, 16, seed=1), pruner, 0.3, round_to=STEP)
        sliced = cfsp.apply(copy.deepcopy(model), plan)
        with torch.no_grad():
            found = sliced(prompt).logits
            with masked(model, plan):
                expected = model(prompt).logits
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        save_checkpoint(sliced, tmp_path / pruner)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / pruner).eval()
        with torch.no_grad():
            assert torch.equal(reloaded(prompt).logits, found)
            made = reloaded.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
            again = reloaded.generate(
                prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False
            )
        assert torch.equal(made, again)


@pytest.mark.parametrize(
    ("model_type", "settings", "said"),
    [
        ("bert", {}, "an encoder (model_type=bert)"),
        ("bart", {}, "the decoder of an encoder-decoder model"),
        ("t5", {}, "an encoder-decoder model (model_type=t5)"),
        ("mamba", {}, "a state-space mixer (mixer.A_log) and no FFN"),
        ("llava", {}, "a vision-language model (model_type=llava"),
        ("gemma3", {}, "a vision-language model (model_type=gemma3"),
    ],
)
def test_what_is_no_decoder_is_refused_in_one_line(model_type, settings, said, tmp_path, run_cfsp):
    from transformers import AutoConfig

    AutoConfig.for_model(model_type, **settings).save_pretrained(tmp_path)
    code, _, err = run_cfsp("inspect", f"path={tmp_path}", defaults=False)
    assert code == 2
    (line,) = err.strip().splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("olmo2", "of several heads together"),
        ("cohere_norms", "of several heads together"),
        ("stablelm_norms", "holds a module for each head"),
        ("bloom", "ALiBi"),
        ("falcon_alibi", "ALiBi"),
        ("deepseek_v3", "multi-head latent attention"),
    ],
)
def test_why_heads_stay_is_said(name, said):
    from cfsp.pruner.units import why_heads_stay

    assert said in why_heads_stay(resolve(built(name)))


@pytest.mark.parametrize("pruner", ["cfsp", "two_ssp"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "phi3", "bloom"])
def test_the_command_prunes_in_memory_and_from_shards_alike(name, pruner, run_cfsp, prose_file, tmp_path):
    entry = ARCHITECTURES[name]
    model = replace(entry, settings={**entry.settings, "vocab_size": WORDS}).build()
    folder = save_with_tokenizer(model, tmp_path / "base")
    found = []
    for streaming in ("off", "on"):
        out = tmp_path / streaming
        code, _, err = run_cfsp(
            "model=local", f"model.path={folder}", "calibration=text", f"calibration.path={prose_file}",
            "calibration.n_samples=4", "calibration.seq_len=24", f"pruner={pruner}", *words(name, pruner),
            f"sparsity.ratio={RATIO}", f"sparsity.round_to={STEP}", "evaluation=perplexity",
            "evaluation.perplexity.datasets=[text]", f"evaluation.perplexity.texts.text.path={prose_file}",
            "evaluation.perplexity.seq_len=24", f"model.streaming={streaming}",
            f"paths.output_dir={out}", f"paths.cache_dir={out / 'cache'}",
        )  # fmt: skip
        assert code == 0, err
        record = json.loads((out / "record.json").read_text())
        found.append((record["measurements"], json.loads((out / "plan.json").read_text())))
    (in_memory, plan), (streamed, other) = found
    assert plan == other
    assert in_memory["pruned"][0]["value"] == pytest.approx(streamed["pruned"][0]["value"], rel=1e-5)
    assert in_memory["dense"][0]["value"] == pytest.approx(streamed["dense"][0]["value"], rel=1e-5)
    tensors = [load_file(tmp_path / mode / "model" / "model.safetensors") for mode in ("off", "on")]
    assert all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items())


def test_finding_out_what_a_block_returns_is_seen_by_no_hook(monkeypatch):
    """The pass of one token that the driver makes once of each class of blocks."""
    import weakref

    from cfsp.model import block_calls
    from cfsp.model.driver import BlockDriver

    monkeypatch.setattr(block_calls, "_RETURNS_TUPLE", weakref.WeakKeyDictionary())
    model = copy.deepcopy(built("opt"))
    seen = []
    for module in model.model.decoder.layers.modules():
        module.register_forward_pre_hook(lambda module, args: seen.append(module))
    BlockDriver(resolve(model), 2).entry(ids(2, 8, seed=1))
    assert not seen
    assert [*block_calls._RETURNS_TUPLE.values()] == [False]


@pytest.fixture
def vision_language_folder(tmp_path):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=WORDS, hidden_size=48, intermediate_size=88, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, head_dim=8, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=5))
    return model.eval(), save_with_tokenizer(model, tmp_path / "base")


def test_the_language_model_inside_a_vision_language_model(vision_language_folder, run_cfsp, prose_file, tmp_path):
    whole, folder = vision_language_folder
    given = [
        "model=local", f"model.path={folder}", "calibration=text", f"calibration.path={prose_file}",
        "calibration.n_samples=4", "calibration.seq_len=24", f"sparsity.round_to={STEP}", "evaluation=none",
    ]  # fmt: skip
    code, _, err = run_cfsp(*given)
    assert code == 2
    assert "model.part=language_model prunes its language model alone" in err
    code, _, err = run_cfsp(*given, "model.part=language_model", "sparsity.ratio=0.3")
    assert code == 0, err
    model, _ = cfsp.load(tmp_path / "out" / "model")
    assert type(model).__name__ == "PrunedLlamaForCausalLM"
    plan = cfsp.PruningPlan.load(tmp_path / "out" / "plan.json")
    assert plan.base_fingerprint.endswith("#language_model")
    prompt = ids(2, 12, seed=2) + 6  # no image tokens
    from cfsp.config.sections import ModelSection
    from cfsp.model.load import load_model
    from cfsp.weights.source import locate

    source = locate(ModelSection(name="m", path=str(folder), part="language_model"))
    alone = load_model(source, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(alone(prompt).logits, whole(prompt).logits)
        found = model(prompt).logits
        with masked(alone, plan):
            expected = alone(prompt).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_part_that_is_not_there_is_refused(run_cfsp, tmp_path):
    folder = save_with_tokenizer(replace(ARCHITECTURES["llama"]).build(), tmp_path / "base")
    code, _, err = run_cfsp("model=local", f"model.path={folder}", "model.part=language_model")
    assert code == 2
    assert "model.part=language_model" in err
    assert "use model.part=whole" in err
