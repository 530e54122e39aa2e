"""A made checkpoint is one that transformers loads, in shards, written without ever holding the model."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cfsp.benchmark import make_checkpoint as made
from cfsp.evaluation.live_tensors import LiveTensors
from cfsp.weights.shards import check_safetensors

SMALL = made.Shape(hidden=32, ffn=96, blocks=3, heads=4, kv_heads=2, vocab=4096, positions=64)


def test_transformers_loads_every_tensor(tmp_path):
    assert made.make_checkpoint(tmp_path / "model", SMALL, shard_gb=2e-4)
    shards = sorted(file.name for file in (tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    check_safetensors(tmp_path / "model")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == made.tensor_shapes(SMALL)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert model.config.num_key_value_heads == 2
    weight = model.model.layers[1].mlp.up_proj.weight.float()
    assert 0.015 < float(weight.detach().std()) < 0.025
    assert torch.equal(model.model.norm.weight, torch.ones(32, dtype=torch.bfloat16))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        assert torch.isfinite(model(tokenizer("The sea", return_tensors="pt")["input_ids"]).logits).all()


def test_values_depend_on_the_seed_and_not_on_the_shards(tmp_path):
    one, other, third = (
        AutoModelForCausalLM.from_pretrained(_at(tmp_path / name, **settings)).state_dict()
        for name, settings in {"a": {}, "b": {"shard_gb": 1e-4}, "c": {"seed": 1}}.items()
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], third["lm_head.weight"])
    assert not torch.equal(one["model.layers.0.mlp.up_proj.weight"], one["model.layers.1.mlp.up_proj.weight"])
    assert (tmp_path / "a" / "model.safetensors").is_file()


def _at(folder, **settings):
    made.make_checkpoint(folder, SMALL, **settings)
    return folder


def test_many_blocks_stay_finite(tmp_path, one_thread):
    deep = made.Shape(hidden=32, ffn=96, blocks=64, heads=4, kv_heads=4, vocab=4096, dtype="float32")
    made.make_checkpoint(tmp_path / "model", deep)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        states = model(torch.arange(16)[None], output_hidden_states=True).hidden_states
    assert float(states[-2].abs().max()) < 100
    assert torch.isfinite(states[-1]).all()


def test_one_tensor_is_in_memory_at_a_time(tmp_path, monkeypatch):
    outline = made.tensor_shapes(SMALL)  # its tensors on the meta device would count
    monkeypatch.setattr(made, "tensor_shapes", lambda _: outline)
    with LiveTensors([]) as live:
        made.make_checkpoint(tmp_path / "model", SMALL)
    largest = 4096 * 32
    assert live.peak <= largest * (4 + 2) + 2**12, "as drawn in fp32, and as written"


def test_a_folder_is_made_once_replaced_where_it_is_ours_and_left_where_it_is_not(tmp_path):
    folder = tmp_path / "model"
    assert made.make_checkpoint(folder, SMALL)
    assert not made.make_checkpoint(folder, SMALL)
    assert made.make_checkpoint(folder, SMALL, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (folder / made.MARKER).unlink()
    with pytest.raises(made.CheckpointError, match="was not written by make_checkpoint"):
        made.make_checkpoint(folder, SMALL)


def test_what_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(
        made, "_initial_values", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(made.CheckpointError, match="No space left on device"):
        made.make_checkpoint(tmp_path / "model", SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["hidden=64"], "path is not set: give path=FOLDER, where the model is to be written"),
        (["path=x", "blocks=none"], "blocks=none: give a whole number from 1"),
        (["path=x", "width=3"], "width=3: there is no such key; there are path, hidden, ffn, "),
        (["path=x", "kv_heads=3"], "kv_heads=3: give a divisor of heads=16"),
        (["path=x", "heads=3"], "heads=3: hidden=2048 does not divide into so many heads of an even size"),
        (["path=x", "dtype=int8"], "dtype=int8: there are bfloat16, float16, float32"),
        (["path=x", "vocab=100"], "vocab=100: the bundled tokenizer has 4096 tokens; give 4096 or more"),
        (["path=x", "shard_gb=-1"], "shard_gb=-1.0: give a number above 0, in 10^9 bytes"),
    ],
)
def test_bad_input_is_one_line(capsys, words, line):
    assert made.main(words) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"make_checkpoint: {line}")
