"""Exports as folders: the same function in a stock architecture, what is refused, what a run exports, model cards."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import cfsp
from cfsp.checkpoint.save import save_checkpoint
from cfsp.cli.export import main, read_request
from cfsp.errors import CheckpointError, ConfigError, UnsupportedModelError
from cfsp.export import decilm, hf, padded
from cfsp.export.card import CARD, FACTS, model_card, read_facts, read_licence, write_card
from cfsp.export.decilm import ffn_mult
from cfsp.export.folder import read_folder
from cfsp.export.write import FORMATS
from cfsp.plan.history import MARKER
from cfsp.plan.pruning_plan import COMPENSATION_IN_FOLDER, PruningPlan
from cfsp.weights import shard_writer
from tests.conftest import VOCABULARY, mentions, save_with_tokenizer
from tests.helpers.matrix import pairwise
from tests.helpers.structures import STRUCTURES, logits, pruned
from tests.helpers.tiny import ARCHITECTURES, tiny_model, tokens
from tests.helpers.training import TRAINS

#: Not the exact function, only another order of the sums where zeros were put in between.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def width_of(multiplier: float, hidden: int) -> int:
    """The width that vLLM and llama.cpp's converter make of a multiplier: ceil256(int(2 * multiplier * hidden / 3))."""
    return -(-int(2 * multiplier * hidden / 3) // 256) * 256


def folder_of(tmp_path: Path, architecture: str, structure: str, **settings):
    model = pruned(architecture, structure, **settings)
    save_checkpoint(model, tmp_path / "model")
    return model, read_folder(tmp_path / "model")


def biased(structure: str) -> bool:
    return structure in ("biases", "everything")


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "llama_bias"])
def test_padded_is_the_same_function_in_the_stock_class(architecture, structure, tmp_path) -> None:
    if biased(structure) and architecture in ("qwen2", "qwen3"):
        _, source = folder_of(tmp_path, architecture, structure)
        with pytest.raises(UnsupportedModelError, match=r"layer \d has a bias at .*use format=hf"):
            padded.export(source, tmp_path / "padded")
        assert not (tmp_path / "padded").exists()
        return
    settings = {"sliding_window": None} if architecture == "mistral" else {}
    model, source = folder_of(tmp_path, architecture, structure, **settings)
    result = padded.export(source, tmp_path / "padded")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "padded", output_loading_info=True)
    wrong = {kind: report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[kind]}
    assert not wrong
    assert type(loaded).__module__.startswith("transformers.")
    ids = tokens(2, seed=1)
    torch.testing.assert_close(logits(loaded.eval(), ids), logits(model, ids), **CLOSE)
    assert not list((tmp_path / "padded").glob("*.py"))
    assert not (tmp_path / "padded" / "plan.json").exists()  # its widths are not the plan's
    unequal = len({layer.width for layer in source.layers}) > 1
    assert bool(result.notes) == (unequal or len({layer.kv_heads for layer in source.layers}) > 1)


def test_padded_counts_its_zeros(tmp_path) -> None:
    _, source = folder_of(tmp_path, "llama", "ffn")
    note = padded.export(source, tmp_path / "padded", multiple=64).notes[0]
    # 5 layers of 128 where there are 96, 96, 96 and two that are gone
    assert note.startswith("352 of 640 FFN neurons are zeros that fill up 5 layers")
    config = json.loads((tmp_path / "padded" / "config.json").read_text())
    assert config["intermediate_size"] == 128
    assert "per_layer_config" not in config


def test_a_sliding_window_that_a_bias_needs_away_is_refused(tmp_path) -> None:
    _, source = folder_of(tmp_path, "mistral", "biases", sliding_window=16)
    with pytest.raises(UnsupportedModelError, match="mistral has no place"):
        padded.check(source)


@pytest.mark.parametrize(
    ("structure", "architecture", "dtype"), pairwise(list(STRUCTURES), ARCHITECTURES, [None, torch.bfloat16])
)
def test_hf_writes_the_folder_again(architecture, structure, dtype, tmp_path) -> None:
    model, source = folder_of(tmp_path, architecture, structure)
    hf.export(source, tmp_path / "again", dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    ids = tokens(2, seed=1)
    if dtype is None:
        assert torch.equal(logits(loaded, ids), logits(model, ids))
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
        assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert json.loads((tmp_path / "again" / MARKER).read_text())["form"] in ("plain", "remote_code")


DECILM = [(a, s) for a in ("llama", "mistral", "qwen2") for s in STRUCTURES if not biased(s)]


@pytest.mark.parametrize(("architecture", "structure"), DECILM)
def test_decilm_holds_what_vllm_and_the_converter_read(architecture, structure, tmp_path) -> None:
    """The stock reader of the layout is not at hand here: the folder is read by the rules that are known of it."""
    settings = {"sliding_window": None} if architecture == "mistral" else {}
    model, source = folder_of(tmp_path, architecture, structure, **settings)
    result = decilm.export(source, tmp_path / "decilm")
    assert result.bytes > 0
    config = AutoConfig.from_pretrained(tmp_path / "decilm", trust_remote_code=True)
    assert config.model_type == "nemotron-nas"
    assert json.loads(json.dumps(config.to_dict()))["block_configs"][0]["ffn"]["ffn_mult"]
    heads = config.num_attention_heads
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    kinds = {"qwen2": (Qwen2Config, Qwen2ForCausalLM)}.get(architecture, (LlamaConfig, LlamaForCausalLM))
    raw = json.loads((tmp_path / "decilm" / "config.json").read_text())
    keys = ("hidden_size", "vocab_size", "rms_norm_eps", "head_dim", "rope_parameters", "max_position_embeddings",
            "tie_word_embeddings", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")  # fmt: skip
    widths = []
    for index, block in enumerate(config.block_configs):
        assert not block["ffn"].no_op
        assert not hasattr(block["ffn"], "intermediate_size")
        widths.append(width_of(block["ffn"].ffn_mult, config.hidden_size))
        if index == 0:
            assert not block["attention"].no_op  # vLLM cannot do without it there
        if not block["attention"].no_op:
            assert heads // block["attention"].n_heads_in_group == config.num_key_value_heads
    assert all(width % 256 == 0 for width in widths)
    dense = kinds[1](kinds[0](**{key: raw[key] for key in keys}, intermediate_size=max(widths))).eval()
    state = {}
    found = load_file(tmp_path / "decilm" / "model.safetensors")
    for name, value in dense.state_dict().items():
        if name in found:
            assert found[name].shape == value.shape, name
            state[name] = found[name]
        else:  # a no-op
            assert ".self_attn." in name or "input_layernorm" in name or name == "lm_head.weight"
            state[name] = torch.zeros_like(value)
    if "lm_head.weight" not in found:
        state["lm_head.weight"] = found["model.embed_tokens.weight"]
    assert found.keys() <= state.keys()
    dense.load_state_dict(state)
    ids = tokens(2, seed=1)
    torch.testing.assert_close(logits(dense, ids), logits(model, ids), **CLOSE)


@pytest.mark.parametrize("hidden", [1024, 2048, 4096, 5120, 8192])
def test_the_multiplier_gives_the_width_back(hidden) -> None:
    for width in range(256, 4 * hidden, 256):
        assert width_of(ffn_mult(width, hidden), hidden) == width


@pytest.mark.parametrize(
    ("architecture", "structure", "settings", "said"),
    [
        ("qwen3", "widths", {}, "qwen3 norms its queries and keys"),
        ("mistral", "widths", {"sliding_window": 16}, "no sliding window"),
        ("llama", "biases", {}, r"layer 0 has a bias at mlp\.down_proj"),
    ],
)
def test_what_decilm_cannot_hold_is_refused(architecture, structure, settings, said, tmp_path) -> None:
    _, source = folder_of(tmp_path, architecture, structure, **settings)
    with pytest.raises(UnsupportedModelError, match=said):
        decilm.export(source, tmp_path / "decilm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_full_disk_leaves_nothing_and_foreign_folders_stay(tmp_path, monkeypatch) -> None:
    _, source = folder_of(tmp_path, "llama", "widths")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="was not written by cfsp"):
        padded.export(source, mine)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_writer, "write_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        padded.export(source, tmp_path / "padded")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model"]


def test_values_that_do_not_fit_are_refused(tmp_path) -> None:
    model = pruned("llama", "widths")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = 1e30
    save_checkpoint(model, tmp_path / "model", reference=False)
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight does not fit into float16"):
        hf.export(read_folder(tmp_path / "model"), tmp_path / "again", dtype=torch.float16)
    assert not (tmp_path / "again").exists()


# What is not there


def without(folder: Path, *names: str) -> None:
    weights = load_file(folder / "model.safetensors")
    for name in names:
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.3.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_tensor_that_is_missing_is_named_and_never_zeros(form, name, tmp_path, run_cfsp) -> None:
    _, source = folder_of(tmp_path, "qwen2", "equal_heads")
    without(source.folder, name)
    words = [f"path={source.folder}", f"format={form}", f"to={tmp_path / 'to.gguf'}"]
    code, _, err = run_cfsp("export", *words, defaults=False)
    assert code == 2
    mentions(err.splitlines(), f"lacks {name}", "save the model again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_model_saved_without_its_head_is_refused(form, tmp_path) -> None:
    tiny_model().model.save_pretrained(tmp_path / "model")  # names without "model."
    source = read_folder(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"lacks model\.embed_tokens\.weight.*saved without its LM head"):
        importlib.import_module(FORMATS[form]).export(source, tmp_path / "to.gguf")
    assert not (tmp_path / "to.gguf").exists()


def test_a_tensor_of_another_shape_is_named(tmp_path) -> None:
    _, source = folder_of(tmp_path, "llama", "widths")
    weights = load_file(source.folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**weights, name: weights[name][:, 1:].contiguous()}, source.folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj.weight is \(32, 95\), its config.json says \(32, 96\)"):
        padded.export(read_folder(source.folder), tmp_path / "padded")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tied_head_need_not_be_stored(architecture, tmp_path) -> None:
    model, source = folder_of(tmp_path, architecture, "widths", tie_word_embeddings=True, sliding_window=None)
    assert source.tied
    padded.export(source, tmp_path / "padded")
    ids = tokens(2, seed=1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "padded").eval()
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), **CLOSE)


@pytest.mark.parametrize("key", ["per_layer_config", "added_bias"])
def test_a_stock_model_type_with_layers_of_its_own_is_refused(key, tmp_path) -> None:
    """Stock classes would not see that modules are missing, and fill them with random weights."""
    _, source = folder_of(tmp_path, "llama", "equal_heads")
    config = json.loads((source.folder / "config.json").read_text())
    entry = {"per_layer_config": {"1": {"skip": ["attention"]}}, "added_bias": {"1": ["mlp.down_proj"]}}[key]
    (source.folder / "config.json").write_text(json.dumps({**config, key: entry}))
    with pytest.raises(UnsupportedModelError, match=f"has {key} beside model_type=llama"):
        read_folder(source.folder)


def test_equal_layers_of_a_pruned_type_become_a_plain_folder(tmp_path) -> None:
    """By what the layers are, whatever the folder calls itself."""
    _, source = folder_of(tmp_path, "llama", "widths")
    config = json.loads((source.folder / "config.json").read_text())
    widths = {str(at): {"intermediate_size": 64} for at in range(5)}
    (source.folder / "config.json").write_text(json.dumps({**config, "per_layer_config": widths}))
    weights = load_file(source.folder / "model.safetensors")
    for name, value in weights.items():
        if ".mlp." in name:
            at = 1 if "down_proj" in name else 0
            wide = torch.cat([value, torch.zeros_like(value)], at).narrow(at, 0, 64)
            weights[name] = wide.contiguous()
    save_file(weights, source.folder / "model.safetensors", metadata={"format": "pt"})
    result = hf.export(read_folder(source.folder), tmp_path / "plain")
    assert "needs no remote code" in result.notes[0]
    written = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert written["intermediate_size"] == 64
    assert not {"per_layer_config", "auto_map"} & written.keys()
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not report["missing_keys"]
    again = AutoModelForCausalLM.from_pretrained(source.folder)
    ids = tokens(2, seed=1)
    assert torch.equal(logits(loaded.eval(), ids), logits(again.eval(), ids))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_hf_copies_the_plan_with_its_tensors_or_neither(dtype, tmp_path) -> None:
    plan = PruningPlan(
        "m", "f", {"name": "hand"}, tuple(STRUCTURES["widths"]), {}, {}, tensors={"blocks.1.ffn.bias": torch.ones(32)}
    )
    model = cfsp.apply(tiny_model(blocks=5), plan)
    save_checkpoint(model, tmp_path / "model", files=plan.files(tensors=COMPENSATION_IN_FOLDER))
    hf.export(read_folder(tmp_path / "model"), tmp_path / "again", dtype=dtype)
    if dtype == torch.bfloat16:  # replaying it would not give the rounded weights
        assert not (tmp_path / "again" / "plan.json").exists()
        assert not (tmp_path / "again" / "plan").exists()
    else:
        copied = PruningPlan.load(tmp_path / "again" / "plan.json")
        assert torch.equal(copied.tensors["blocks.1.ffn.bias"], torch.ones(32))


# The command line


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["format=padded"], ("path is not set",)),
        (["path=x"], ("format is not set",)),
        (["path=x", "format=ggml"], ("format=ggml", "gguf")),
        (["path=x", "format=hf", "dtype=q8_0"], ("dtype=q8_0", "format=gguf")),
        (["path=x", "format=hf", "dtype=int4"], ("dtype=int4", "float32")),
        (["path=x", "format=decilm", "multiple=100"], ("multiple=100", "256")),
        (["path=x", "format=padded", "multiple=none"], ("multiple=none", "whole number")),
        (["path=x", "format=padded", "multiple=²"], ("multiple=²", "whole number")),
        (["path=x", "format=gguf", "to=y/model"], ("to=y/model", "to=y/model.gguf")),
        (["path=x", "format=hf", "multiple=64"], ("multiple", "format=padded")),
        (["path=x", "format=hf", "out=y"], ("out: unknown key",)),
        (["path=x", "padded"], ("padded: is not key=value",)),
    ],
)
def test_wrong_words_are_one_line(words, parts) -> None:
    with pytest.raises(ConfigError) as caught:
        read_request(words)
    mentions(list(caught.value.problems), *parts)


def test_the_command(tmp_path, capsys, run_cfsp) -> None:
    _, source = folder_of(tmp_path, "llama", "widths")
    code, out, err = run_cfsp("export", f"path={source.folder}", "format=padded", defaults=False)
    assert code == 0, err
    assert "model-padded" in out
    assert "zeros" in out
    assert (tmp_path / "model-padded" / "config.json").is_file()
    code, _, err = run_cfsp("export", f"path={tmp_path / 'nowhere'}", "format=padded", defaults=False)
    assert code == 2
    mentions(err.strip().splitlines(), "nowhere", "no such folder")
    code, out, _ = run_cfsp("export", "--help", defaults=False)
    assert code == 0
    assert "format=gguf" in out
    same = f"to={source.folder}"
    assert run_cfsp("export", f"path={source.folder}", "format=hf", same, defaults=False)[0] == 2
    assert main([f"path={source.folder}", "format=hf", "dtype=bf16", f"to={tmp_path / 'half'}"]) == 0
    assert read_folder(tmp_path / "half").dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["padded", "gguf", "decilm"])
def test_a_run_exports_too(form, run_cfsp, tmp_path) -> None:
    code, _, err = run_cfsp(f"save.format={form}", "evaluation=none", "calibration.n_samples=4")
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    export = record["checkpoint"]["export"]
    assert export["form"] == form
    assert (tmp_path / "out" / export["place"]).exists()
    assert (tmp_path / "out" / "model" / "config.json").is_file()
    # the same command finds it done; without the export it is not
    assert run_cfsp(f"save.format={form}", "evaluation=none", "calibration.n_samples=4")[0] == 0
    place = tmp_path / "out" / export["place"]
    if form == "gguf":
        place.unlink()
        assert run_cfsp(f"save.format={form}", "evaluation=none", "calibration.n_samples=4")[0] == 0
        assert place.exists()


def test_a_run_that_cannot_be_exported_is_refused_at_once(refused) -> None:
    lines = refused("save.format=decilm", "pruner=flap")
    mentions(lines, "save.format=decilm", "pruner.compensation=bias")
    mentions(refused("save.format=onnx"), "save.format=onnx", "gguf")


# Model cards


def front_of(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_a_run_writes_a_card_with_what_it_measured(run_cfsp, tmp_path) -> None:
    tasks = ["evaluation.zero_shot=null", "evaluation.cost=null", "evaluation.perplexity.windows=[0,4]"]
    code, _, err = run_cfsp(*tasks, "calibration.n_samples=4", "save.format=padded")
    assert code == 0, err
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    front = front_of(card)
    assert front["library_name"] == "transformers"
    assert "cfsp" in front["tags"]
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    values = {side: rows[0]["value"] for side, rows in record["measurements"].items()}
    for side in ("dense", "pruned"):
        assert f"{values[side]:.2f}" in card
    widths = " ".join(str(row["width"]) for row in record["blocks"])
    for part in ("books7m", "`cfsp`", widths, "4 windows of 256 tokens", "trust_remote_code=True", "licence"):
        assert part in card, part
    assert front["license"] == "apache-2.0"  # the bundled model says so
    assert "base_model" not in front
    other = (tmp_path / "out" / "model-padded" / "README.md").read_text()
    assert "trust_remote_code" not in other
    assert "zeros" in other
    for side in ("dense", "pruned"):  # exported once all is measured
        assert f"{values[side]:.2f}" in other
    facts = read_facts(tmp_path / "out" / "model")
    assert (facts["base_model"], facts["hub_id"], facts["earlier"]) == ("books7m", None, [])


def test_a_card_says_no_place_on_this_machine(run_cfsp, sound_words, model_folder, tmp_path) -> None:
    """Nor takes one with an @ for a hub id."""
    place = tmp_path / "models@home" / "mine"
    shutil.copytree(model_folder, place)
    code, _, err = run_cfsp(*sound_words, f"model.path={place}", "save.model=true", "save.format=padded")
    assert code == 0, err
    for folder in ("model", "model-padded"):
        for name in (CARD, FACTS):
            text = (tmp_path / "out" / folder / name).read_text()
            assert str(tmp_path) not in text
            assert "models@home" not in text
        assert "# mine, " in (tmp_path / "out" / folder / CARD).read_text()
        assert "base_model" not in front_of((tmp_path / "out" / folder / CARD).read_text())


def test_a_hub_model_is_named_by_its_id() -> None:
    facts = {**FACTS_OF_A_RUN, "base_model": "Llama", "hub_id": "meta/Llama"}
    card = model_card(facts, "remote_code", "model")
    assert front_of(card)["base_model"] == "meta/Llama"
    assert "# Llama, " in card


FACTS_OF_A_RUN = {
    "base_model": "m", "hub_id": None, "licence": {}, "earlier": [], "method": "cfsp",
    "requested": {"ratio": 0.5, "scope": "ffn", "round_to": 32}, "achieved": {"ratio": 0.5},
    "parameters": {"before": 100, "after": 60}, "widths": [32, 64], "kv_groups": [2, 2], "calibration": {},
    "state": "pruned", "recovery": None, "measurements": {},
}  # fmt: skip


def test_a_card_says_of_vllm_what_is_so() -> None:
    assert "vllm serve model" in model_card(FACTS_OF_A_RUN, "remote_code", "model")
    card = model_card({**FACTS_OF_A_RUN, "kv_groups": [2, 0]}, "remote_code", "model")
    assert "vllm serve" not in card
    assert "some layers have no attention" in card
    gone = model_card({**FACTS_OF_A_RUN, "widths": [32, 0], "kv_groups": [2, 0]}, "remote_code", "model")
    assert "vllm serve model" in gone  # the whole block went
    assert "Llama 3" in model_card(FACTS_OF_A_RUN, "decilm", "model")


def test_pruning_what_is_pruned_keeps_what_was_known(run_cfsp, sound_words, tmp_path) -> None:
    words = [*sound_words, "save.model=true", f"paths.output_dir={tmp_path / 'one'}"]
    assert run_cfsp(*words)[0] == 0
    first = read_facts(tmp_path / "one" / "model")
    words = [f"model.path={tmp_path / 'one' / 'model'}", f"paths.output_dir={tmp_path / 'two'}", "pruner=wanda_sp"]
    code, _, err = run_cfsp(*sound_words, "save.model=true", *words, "sparsity.ratio=0.3")
    assert code == 0, err
    facts = read_facts(tmp_path / "two" / "model")
    assert facts["base_model"] == first["base_model"] == "model"
    assert facts["parameters"]["before"] == first["parameters"]["before"]
    assert facts["parameters"]["after"] < first["parameters"]["after"]
    assert [step["method"] for step in (*facts["earlier"], facts)] == ["cfsp", "wanda_sp"]
    card = (tmp_path / "two" / "model" / CARD).read_text()
    for part in ("pruned in 2 steps", "step 1: method `cfsp`", "step 2: method `wanda_sp`", "requested: 0.3"):
        assert part in card, part


def test_the_base_of_an_adapter_has_a_card(run_cfsp, sound_words, prose_file, tmp_path) -> None:
    words = [*sound_words, "recovery=lora", f"recovery.data.path={prose_file}", *TRAINS, "save.model=true"]
    code, _, err = run_cfsp(*words)
    assert code == 0, err
    assert read_facts(tmp_path / "out" / "pruned")["state"] == "pruned"
    assert "recovered by" not in (tmp_path / "out" / "pruned" / CARD).read_text()
    assert "recovered by lora" in (tmp_path / "out" / "model" / CARD).read_text()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\ntags: [x]\n---\n# Model\n", {"license": "mit"}),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n# Model\r\n", {"license": "mit"}),
        ('---\ntitle: "a --- b"\nlicense: "foo: bar"\n---\n', {"license": "foo: bar"}),
        ("---\nlicense: no\n---\n", {"license": "no"}),
        ('---\nlicense: "[mit"\n---\n', {"license": "[mit"}),
        (
            "---\nlicense: other\nlicense_name: tongyi\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "tongyi", "license_link": "LICENSE"},
        ),
        ("# no front matter\n", {}),
        ("---\n: [broken\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        ("--- license: mit --- text", {}),
    ],
)
def test_the_licence_of_the_base_model_is_inherited(text, found, tmp_path) -> None:
    assert read_licence(tmp_path) == {}
    (tmp_path / CARD).write_bytes(text.encode())
    assert read_licence(tmp_path) == found
    front = front_of(model_card({**FACTS_OF_A_RUN, "licence": found}, "plain", "model"))
    assert {key: value for key, value in front.items() if key.startswith("licen")} == found


def test_a_dense_folder_s_export_keeps_its_licence(tmp_path) -> None:
    from cfsp.system.package import ROOT

    padded.export(read_folder(ROOT / "assets" / "books7m"), tmp_path / "padded")
    assert read_licence(tmp_path / "padded") == {"license": "apache-2.0"}


def test_a_card_on_a_full_disk_is_one_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match=r"README.md: the model card cannot be written \(No space left"):
        write_card(tmp_path, FACTS_OF_A_RUN, "plain")
    assert not list(tmp_path.iterdir())


# What a run is refused for before it starts, and what is exported of one that is finished


def saved_with_tokenizer(tmp_path: Path, architecture: str, **settings) -> Path:
    return save_with_tokenizer(tiny_model(architecture, vocab_size=VOCABULARY, **settings), tmp_path / "base")


@pytest.mark.parametrize(
    ("architecture", "settings", "words", "parts"),
    [
        ("qwen3", {}, ["save.format=gguf"], ("save.format=gguf", "unequal blocks", "save.format=padded")),
        (
            "qwen3", {}, ["save.format=gguf", "pruner=uniform", "sparsity.protect=auto", "sparsity.ratio=0.2"],
            ("save.format=gguf", "unequal blocks"),
        ),
        (
            "qwen3", {"tie_word_embeddings": True}, ["save.format=gguf", "pruner=flap"],
            ("save.format=gguf", "pruner.compensation=bias", "mlp.down_proj"),
        ),
        ("qwen2", {}, ["save.format=padded", "pruner=flap"], ("save.format=padded", "mlp.down_proj", "qwen2")),
        ("qwen3", {}, ["save.format=padded", "pruner=flap"], ("save.format=padded", "mlp.down_proj", "qwen3")),
        (
            "mistral", {"sliding_window": 16}, ["save.format=padded", "pruner=flap"],
            ("save.format=padded", "mistral with a sliding window"),
        ),
    ],
)  # fmt: skip
def test_what_a_format_cannot_hold_is_refused_before_the_run(
    architecture, settings, words, parts, refused, sound_words, tmp_path
) -> None:
    base = saved_with_tokenizer(tmp_path, architecture, **settings)
    scope = ["pruner.structure=ffn", "sparsity.scope=ffn"] if "pruner=flap" in words else []
    lines = refused(*sound_words, f"model.path={base}", "save.model=true", *words, *scope)
    mentions(lines, *parts)


@pytest.mark.parametrize(
    ("architecture", "settings", "words"),
    [
        ("qwen3", {}, ["save.format=gguf", "pruner=uniform"]),
        ("qwen3", {}, ["save.format=gguf", "pruner=shortgpt", "sparsity.scope=decoder"]),
        ("mistral", {"sliding_window": None}, ["save.format=padded", "pruner=flap", "pruner.structure=ffn"]),
        ("qwen2", {}, ["save.format=gguf", "pruner=flap", "pruner.structure=ffn"]),
    ],
)
def test_what_a_format_can_hold_is_run(architecture, settings, words, run_cfsp, sound_words, tmp_path) -> None:
    base = saved_with_tokenizer(tmp_path, architecture, **settings)
    code, _, err = run_cfsp(*sound_words, f"model.path={base}", "save.model=true", *words)
    assert code == 0, err


@pytest.mark.parametrize("form", ["gguf", "padded"])
def test_a_place_that_is_not_ours_is_refused_before_the_run(form, run_cfsp, sound_words, tmp_path) -> None:
    place = tmp_path / "out" / ("model.gguf" if form == "gguf" else "model-padded/thesis.tex")
    place.parent.mkdir(parents=True)
    place.write_text("somebody else's")
    code, _, err = run_cfsp(*sound_words, "save.model=true", f"save.format={form}")
    assert code == 2
    mentions(err.splitlines(), place.parent.name, "was not written by cfsp")
    assert not (tmp_path / "out" / "record.json").exists()
    assert place.read_text() == "somebody else's"


def test_a_finished_run_is_exported_without_being_repeated(run_cfsp, sound_words, tmp_path) -> None:
    words = [*sound_words, "save.model=true"]
    assert run_cfsp(*words)[0] == 0
    out = tmp_path / "out"
    weights = (out / "model" / "model.safetensors").stat().st_ino
    earlier = json.loads((out / "record.json").read_text())
    for form, place in (("padded", "model-padded"), ("gguf", "model.gguf")):
        code, _, err = run_cfsp(*words, f"save.format={form}")
        assert code == 0, err
        assert (out / place).exists()
        record = json.loads((out / "record.json").read_text())
        assert record["checkpoint"]["export"]["place"] == place
        assert record["started"] == earlier["started"]
        assert json.loads((tmp_path / "records" / f"{record['run_id']}.json").read_text()) == record
        (out / place).unlink() if form == "gguf" else shutil.rmtree(out / place)
        assert run_cfsp(*words, f"save.format={form}")[0] == 0
        assert (out / place).exists()
    assert run_cfsp(*words)[0] == 0
    assert (out / "model" / "model.safetensors").stat().st_ino == weights


def test_an_export_that_fails_costs_no_figures(run_cfsp, sound_words, prose_file, tmp_path, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise CheckpointError("model.gguf: the file cannot be written there")

    monkeypatch.setattr("cfsp.export.gguf.export", full)
    words = ["evaluation=perplexity", "evaluation.perplexity.seq_len=32", "evaluation.perplexity.windows=[0,2]"]
    words += ["evaluation.perplexity.datasets=[text]", f"evaluation.perplexity.texts.text.path={prose_file}"]
    code, _, err = run_cfsp(*sound_words, *words, "save.model=true", "save.format=gguf")
    assert code != 0
    assert "cannot be written there" in err
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["status"] == "failed"
    assert record["measurements"]["pruned"]


def test_an_export_of_what_is_not_saved_is_refused(refused, sound_words) -> None:
    mentions(refused(*sound_words, "save.format=gguf"), "save.format=gguf", "save.model=false")


# What an export writes


@pytest.mark.parametrize("where", ["around", "within"])
def test_a_place_that_holds_the_source_is_refused(where, run_cfsp, tmp_path) -> None:
    _, source = folder_of(tmp_path / "ours", "llama", "widths")
    to = source.folder.parent if where == "around" else source.folder / "padded"
    (source.folder.parent / MARKER).write_text('{"schema": 1}')
    code, _, err = run_cfsp("export", f"path={source.folder}", "format=padded", f"to={to}", defaults=False)
    assert code == 2
    mentions(err.splitlines(), f"to={to}", where)
    assert (source.folder / "model.safetensors").is_file()


def test_a_folder_may_have_any_name(run_cfsp, tmp_path) -> None:
    """The name of a model in a record follows a rule; that of a folder does not."""
    _, source = folder_of(tmp_path / "My models (1)", "llama", "widths")
    place = source.folder.rename(source.folder.with_name("räume & " + "x" * 120))
    code, _, err = run_cfsp("export", f"path={place}", "format=padded", f"to={tmp_path / 'new'}", defaults=False)
    assert code == 0, err


def test_config_json_is_in_both_spellings(tmp_path) -> None:
    """Of a source that transformers 4 wrote, and with one dtype."""
    save_checkpoint(tiny_model(), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    scaling = {"type": "linear", "factor": 2.0}
    path.write_text(json.dumps({**old, "torch_dtype": "float32", "rope_theta": 5000.0, "rope_scaling": scaling}))
    for form in (hf, padded):
        form.export(read_folder(tmp_path / "model"), tmp_path / "new", dtype=torch.bfloat16)
        found = json.loads((tmp_path / "new" / "config.json").read_text())
        assert found["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
        assert (found["rope_theta"], found["rope_scaling"]) == (5000.0, {"rope_type": "linear", "factor": 2.0})
        assert found["dtype"] == "bfloat16"
        assert "torch_dtype" not in found


def test_damaged_values_are_called_so(tmp_path) -> None:
    _, source = folder_of(tmp_path, "llama", "widths")
    weights = load_file(source.folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, source.folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight holds NaN .* damaged"):
        hf.export(read_folder(source.folder), tmp_path / "again")


def test_stock_transformers_loads_padded_folders_where_cfsp_is_not(tmp_path) -> None:
    model, source = folder_of(tmp_path, "llama", "everything")
    padded.export(source, tmp_path / "padded")
    ids = tokens(1, 16, seed=1)
    torch.save(logits(model, ids), tmp_path / "logits.pt")
    torch.save(ids, tmp_path / "ids.pt")
    code = f"""
import sys, torch
sys.modules["cfsp"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "padded")!r})
ids = torch.load({str(tmp_path / "ids.pt")!r})
with torch.no_grad():
    found = model(ids).logits
torch.testing.assert_close(found, torch.load({str(tmp_path / "logits.pt")!r}), atol=1e-5, rtol=1e-5)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_tokenizers_travel(tmp_path) -> None:
    from cfsp.system.package import ROOT

    bundled = read_folder(ROOT / "assets" / "books7m")
    padded.export(bundled, tmp_path / "padded")
    text = "The sea was grey."
    assert AutoTokenizer.from_pretrained(tmp_path / "padded")(text) == AutoTokenizer.from_pretrained(bundled.folder)(
        text
    )
