"""Mixtures of experts whose weights stay on disk, in the form of published checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from cfsp.architecture.views import resolve
from cfsp.architecture.weights import weights_of
from cfsp.config.sections import ModelSection
from cfsp.errors import CheckpointError, UnsupportedModelError
from cfsp.model.load import load_model, load_streamed
from cfsp.weights.source import locate
from tests.conftest import VOCABULARY, save_with_tokenizer
from tests.helpers.experts import SPARSE, logits
from tests.helpers.tiny import tokens

pytestmark = pytest.mark.usefixtures("one_thread")

#: A tensor of each checkpoint: published ones have a matrix for each expert, that of GPT-OSS one for all.
STREAMED = {
    "mixtral": "block_sparse_moe.experts.5.w2.weight",
    "qwen2_moe": "mlp.experts.5.down_proj.weight",
    "qwen3_moe": "mlp.experts.5.down_proj.weight",
    "olmoe": "mlp.experts.5.down_proj.weight",
    "deepseek_v2": "mlp.experts.5.down_proj.weight",
    "gpt_oss": "mlp.experts.down_proj",
}
CPU = torch.device("cpu")


def folder_of(name: str, at: Path) -> Path:
    a = SPARSE[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(a.model_type, **{**a.settings, "vocab_size": VOCABULARY})
    folder = save_with_tokenizer(AutoModelForCausalLM.from_config(config).eval(), at)
    assert any(STREAMED[name] in key for key in load_file(folder / "model.safetensors"))
    return folder


@pytest.mark.parametrize("name", STREAMED)
def test_logits_of_a_streamed_mixture_are_those_in_memory(name, tmp_path):
    source = locate(ModelSection(name="m", path=str(folder_of(name, tmp_path / "model"))))
    memory = load_model(source, dtype=torch.float32, device=CPU)
    disk = load_streamed(source, dtype=torch.float32, device=CPU)
    assert weights_of(disk).is_streamed
    assert resolve(disk).mixtures
    assert all(parameter.is_meta for parameter in disk.parameters())
    ids = tokens(2, 12, vocabulary=VOCABULARY)
    assert torch.equal(logits(memory, ids), logits(disk, ids))
    assert all(parameter.is_meta for parameter in disk.parameters())


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("mixtral", ["pruner=cfsp"]),
        (
            "qwen3_moe",
            ["pruner=one_shot", "pruner.structure=experts", "pruner.expert_score=reap", "sparsity.ratio=0.3"],
        ),
        ("olmoe", ["pruner=one_shot", "importance=obs", "pruner.compensation=least_squares"]),
        (
            "gpt_oss",
            ["pruner=one_shot", "importance=obs", "pruner.compensation=least_squares", "pruner.sequential=true"],
        ),
        pytest.param(*("deepseek_v2", ["pruner=two_ssp"]), marks=pytest.mark.slow),
        pytest.param(*("mixtral", ["pruner=shortgpt", "sparsity.scope=decoder"]), marks=pytest.mark.slow),
    ],
)
def test_a_streamed_run_on_a_mixture_is_the_run_in_memory(name, more, run_cfsp, prose_file, tmp_path):
    folder = folder_of(name, tmp_path / "model")
    found = []
    for mode in ("off", "on"):
        place = tmp_path / mode
        code, _, err = run_cfsp(
            "model=local", f"model.path={folder}", "calibration=text", f"calibration.path={prose_file}",
            "calibration.n_samples=6", "calibration.seq_len=32", "calibration.batch_size=2", "sparsity.round_to=8",
            "evaluation=none", *more, f"model.streaming={mode}", f"paths.output_dir={place / 'out'}",
            f"paths.cache_dir={place / 'cache'}",
        )  # fmt: skip
        assert code == 0, err
        plan = json.loads((place / "out" / "plan.json").read_text())
        files = sorted((place / "out" / "model").glob("*.safetensors"))
        found.append((plan, {key: value for file in files for key, value in load_file(file).items()}))
    (plan, weights), (other_plan, other_weights) = found
    assert plan == other_plan
    assert weights.keys() == other_weights.keys()
    for key, value in weights.items():
        assert torch.equal(value, other_weights[key]), key


def test_a_missing_expert_is_named(tmp_path):
    folder = folder_of("mixtral", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if "layers.1.block_sparse_moe.experts" not in key}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts"):
        load_streamed(locate(ModelSection(name="m", path=str(folder))), dtype=torch.float32, device=CPU)


def test_a_router_with_a_buffer_in_the_checkpoint_is_refused(tmp_path):
    a = SPARSE["deepseek_v3"]
    config = AutoConfig.for_model(a.model_type, **{**a.settings, "vocab_size": VOCABULARY})
    folder = save_with_tokenizer(AutoModelForCausalLM.from_config(config), tmp_path / "model")
    source = locate(ModelSection(name="m", path=str(folder)))
    with pytest.raises(UnsupportedModelError, match=r"e_score_correction_bias.*use model\.streaming=off"):
        load_streamed(source, dtype=torch.float32, device=CPU)
