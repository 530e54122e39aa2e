"""A pruned model keeps its function through memory, folder and the ordinary tools."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from cfsp.checkpoint import save as checkpoint
from cfsp.checkpoint.save import save_checkpoint
from cfsp.errors import CheckpointError, UnsupportedModelError
from cfsp.model.finite import first_non_finite
from cfsp.plan.history import MARKER
from cfsp.pruned_model.adopt import adopt
from cfsp.pruned_model.family import pruned_family
from cfsp.weights import shard_writer
from cfsp.weights.shards import Shards, check_safetensors, read_header

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
HIDDEN, WIDTH, UNEQUAL, EQUAL = 32, 48, [16, 48, 7], [24, 24, 24]
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TOKENS = torch.randint(0, 100, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(family: str = "llama", *, tied: bool = False) -> nn.Module:
    """A model whose norms and biases have moved away from the values that a lost tensor would be given."""
    torch.manual_seed(0)
    extra = {"mlp_bias": True, "attention_bias": True} if family == "llama" else {}
    config = AutoConfig.for_model(
        family,
        vocab_size=100,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        rope_parameters=dict(ROPE),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        **extra,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def narrow(model: nn.Module, widths: list[int]) -> nn.Module:
    """Slice the FFNs the way a careless pruner would: weights only, every stated size left stale."""
    for layer, width in zip(model.model.layers, widths, strict=True):
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight = nn.Parameter(linear.weight.detach()[:width].clone())
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias.detach()[:width].clone())
        layer.mlp.down_proj.weight = nn.Parameter(layer.mlp.down_proj.weight.detach()[:, :width].clone())
    return model


def pruned(family: str = "llama", widths: list[int] = UNEQUAL, *, tied: bool = False) -> nn.Module:
    model = narrow(build(family, tied=tied), widths)
    adopt(model)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_checkpoint(pruned(), tmp_path / "model").folder


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


LOAD_ELSEWHERE = """
import sys, warnings
import torch
warnings.simplefilter("error", DeprecationWarning)
warnings.simplefilter("error", FutureWarning)
from transformers import AutoModel, AutoModelForCausalLM
tokens = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype="auto", output_loading_info=True
    )
    decoder = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    with torch.no_grad():
        torch.save(
            {
                "logits": model.eval()(tokens).logits,
                "hidden": decoder.eval()(tokens).last_hidden_state,
                "class": type(model).__module__ + "." + type(model).__name__,
                "lost": [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]],
                "cfsp": any(name.split(".")[0].startswith("cfsp") for name in sys.modules),
            },
            folder + "/result.pt",
        )
"""


def load_elsewhere(folders: list[Path], workspace: Path) -> list[dict]:
    """Load folders with plain transformers in a process that cannot import cfsp."""
    torch.save(TOKENS, workspace / "tokens.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # Another number of threads would sum in another order.
    environment |= {"HF_HOME": str(workspace / "hf"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    # -P keeps the working directory off sys.path; an installed cfsp may be importable, hence the check below.
    command = [sys.executable, "-P", "-c", LOAD_ELSEWHERE, str(workspace / "tokens.pt"), *map(str, folders)]
    subprocess.run(command, check=True, cwd=workspace, env=environment, capture_output=True, text=True)
    return [torch.load(folder / "result.pt") for folder in folders]


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to the order of sums, which two processes may choose differently."""
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_folders_load_without_cfsp(tmp_path: Path) -> None:
    cases = [(family, tied) for family in FAMILIES for tied in (False, True)]
    models = [pruned(family, tied=tied) for family, tied in cases]
    folders = [
        save_checkpoint(model, tmp_path / f"{family}-{tied}").folder
        for model, (family, tied) in zip(models, cases, strict=True)
    ]
    cases.append(("qwen3", True))
    models.append(pruned("qwen3", tied=True))
    folders.append(tmp_path / "by-the-user")
    models[-1].save_pretrained(folders[-1])
    assert set(read_config(folders[-1])["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}

    for (family, _), model, result in zip(cases, models, load_elsewhere(folders, tmp_path), strict=True):
        assert not result["cfsp"]
        assert result["class"].startswith("transformers_modules.")
        assert f"modeling_pruned_{family}.Pruned" in result["class"]
        assert result["lost"] == []
        assert_same(result["logits"], logits(model))
        with torch.no_grad():
            assert_same(result["hidden"], model.model(TOKENS).last_hidden_state)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_unequal_widths_reload_in_process(family: str, tied: bool, tmp_path: Path) -> None:
    dense = logits(narrow(build(family, tied=tied), UNEQUAL))
    model = pruned(family, tied=tied)
    assert torch.equal(logits(model), dense)
    result = save_checkpoint(model, tmp_path / "model")
    assert result.form == "remote_code"
    assert result.dtype == "float32"
    assert result.bytes == (tmp_path / "model/model.safetensors").stat().st_size

    again = AutoModelForCausalLM.from_pretrained(result.folder)
    assert type(again) is pruned_family(family).causal_lm_class
    assert type(again.model) is pruned_family(family).model_class
    assert torch.equal(logits(again), dense)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    assert [layer.mlp.down_proj.in_features for layer in again.model.layers] == UNEQUAL
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "olmo2"])
def test_generation_with_cache_equals_without(family: str, tmp_path: Path) -> None:
    folder = save_checkpoint(pruned(family), tmp_path / "model").folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(TOKENS, use_cache=True, **settings)
    assert cached.shape == (2, 17)
    assert torch.equal(cached, model.generate(TOKENS, use_cache=False, **settings))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_widths_give_a_plain_folder(family: str, tied: bool, tmp_path: Path) -> None:
    model = pruned(family, EQUAL, tied=tied)
    result = save_checkpoint(model, tmp_path / "model")
    assert result.form == "plain"
    config = read_config(result.folder)
    assert config["model_type"] == family
    assert config["architectures"] == [type(build(family)).__name__]
    assert config["intermediate_size"] == 24
    assert not {"auto_map", "per_layer_config", "allow_global_per_layer_attribute_access"} & config.keys()
    assert not list(result.folder.glob("*.py"))
    again = AutoModelForCausalLM.from_pretrained(result.folder)
    assert type(again) is type(build(family))
    assert torch.equal(logits(again), logits(model))


def test_config_of_a_pruned_folder(saved: Path) -> None:
    config = read_config(saved)
    assert config["model_type"] == "pruned_llama"
    assert config["architectures"] == ["PrunedLlamaForCausalLM"]
    assert list(config["auto_map"]) == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]
    assert config["intermediate_size"] == WIDTH
    assert config["per_layer_config"] == {"0": {"intermediate_size": 16}, "2": {"intermediate_size": 7}}
    assert config["allow_global_per_layer_attribute_access"] is True
    assert config["dtype"] == "float32"
    assert config["rope_parameters"] == ROPE
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {key: value for key, value in ROPE.items() if key != "rope_theta"}
    for reference in config["auto_map"].values():
        assert (saved / f"{reference.split('.')[0]}.py").is_file()


def test_adopt_leaves_nothing_stale_and_no_other_model_touched() -> None:
    config = build().config
    dense, model = LlamaForCausalLM(config), narrow(LlamaForCausalLM(config), UNEQUAL)
    model.generation_config = GenerationConfig(max_new_tokens=5)
    adopt(model)
    assert (config.model_type, config.intermediate_size) == ("llama", WIDTH)
    assert dense.config is config
    assert all(getattr(module, "config", model.config) is model.config for module in model.modules())
    assert model.generation_config.max_new_tokens == 5
    for layer, width in zip(model.model.layers, UNEQUAL, strict=True):
        mlp = layer.mlp
        assert mlp.intermediate_size == width
        assert (mlp.gate_proj.in_features, mlp.gate_proj.out_features) == (HIDDEN, width)
        assert (mlp.down_proj.in_features, mlp.down_proj.out_features) == (width, HIDDEN)


def test_adopt_again_and_back_to_equal(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_checkpoint(pruned(), tmp_path / "a").folder)
    narrower = [8, 24, 7]
    adopt(narrow(model, narrower))
    assert [c.intermediate_size for c in model.config.per_layer_config] == narrower
    again = AutoModelForCausalLM.from_pretrained(save_checkpoint(model, tmp_path / "b").folder)
    assert torch.equal(logits(again), logits(model))
    adopt(narrow(again, [7, 7, 7]))
    assert type(again) is LlamaForCausalLM
    assert type(again.config) is LlamaConfig
    assert save_checkpoint(again, tmp_path / "c").form == "plain"


def test_adopt_of_a_model_read_from_disk(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "dense")
    model = narrow(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), UNEQUAL)
    adopt(model)
    result = save_checkpoint(model, tmp_path / "model")
    assert result.form == "remote_code"
    assert read_config(result.folder)["model_type"] == "pruned_llama"
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(result.folder)), logits(pruned()))


def test_adopted_model_copies_and_pickles() -> None:
    model = pruned(tied=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert torch.equal(logits(twin), logits(model))


def test_a_pruned_model_trains_from_its_config() -> None:
    model = AutoModelForCausalLM.from_config(pruned().config)
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == UNEQUAL
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.3)
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert isinstance(AutoModel.from_config(model.config), pruned_family("llama").model_class)


def test_save_pretrained_by_the_user(tmp_path: Path) -> None:
    model = pruned()
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits(model))
    config = read_config(tmp_path / "model")
    assert "rope_theta" not in config
    # What transformers 4 would be handed, which knows only the older spelling.
    family = pruned_family("llama")
    handed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaConfig, "from_dict", classmethod(lambda cls, given, **_: handed.update(given)))
        family.config_class.from_dict(config)
    assert handed["rope_theta"] == ROPE["rope_theta"]
    assert handed["rope_scaling"] == {key: value for key, value in ROPE.items() if key != "rope_theta"}


def test_cast_on_the_way_out(tmp_path: Path) -> None:
    model = pruned(tied=True)
    result = save_checkpoint(model, tmp_path / "model", dtype=torch.bfloat16)
    assert model.dtype == torch.float32
    assert result.dtype == read_config(result.folder)["dtype"] == "bfloat16"
    again = AutoModelForCausalLM.from_pretrained(result.folder, dtype="auto")
    assert again.dtype == torch.bfloat16
    wanted = copy.deepcopy(model).to(torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())
    second = save_checkpoint(again, tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        assert (second.folder / name).read_bytes() == (result.folder / name).read_bytes()


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", 20_000)
    model = pruned(tied=True)
    result = save_checkpoint(model, tmp_path / "model")
    files = sorted(result.folder.glob("*.safetensors"))
    assert len(files) > 2
    assert result.bytes == sum(file.stat().st_size for file in files)
    check_safetensors(result.folder)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(result.folder)), logits(model))
    files[1].unlink()
    with pytest.raises(CheckpointError, match=files[1].name):
        check_safetensors(result.folder)


def test_tokenizer_files_come_along(tmp_path: Path) -> None:
    source = tmp_path / "base"
    source.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "pytorch_model.bin"):
        (source / name).write_text("{}")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    folder = save_checkpoint(pruned(), tmp_path / "model", source=source).folder
    assert {"tokenizer.json", "chat_template.jinja"} <= {file.name for file in folder.iterdir()}
    assert not (folder / "pytorch_model.bin").exists()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings == {"tokenizer_class": "PreTrainedTokenizerFast"}


def test_only_own_folders_are_replaced(saved: Path, tmp_path: Path) -> None:
    (saved / "stale.txt").write_text("")
    save_checkpoint(pruned(widths=EQUAL), saved)
    assert read_config(saved)["model_type"] == "llama"
    assert not (saved / "stale.txt").exists()

    (tmp_path / "empty").mkdir()
    save_checkpoint(pruned(), tmp_path / "empty")

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="foreign"):
        save_checkpoint(pruned(), foreign)
    assert [file.name for file in foreign.iterdir()] == ["thesis.tex"]
    with pytest.raises(CheckpointError, match="thesis"):
        save_checkpoint(pruned(), foreign / "thesis.tex")


def test_a_failed_save_leaves_the_old_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def content() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in saved.rglob("*") if file.is_file()}

    before = content()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_writer, "write_file", full_disk)
    with pytest.raises(CheckpointError, match=r"model.*No space left"):
        save_checkpoint(pruned(), saved)
    assert content() == before
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("widths", [UNEQUAL, EQUAL])
def test_a_folder_that_would_not_load_is_not_written(widths: list[int], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"down_proj.*would not load"):
        save_checkpoint(narrow(build(), widths), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("kept", [0.5, 0.01, 0.0])
def test_a_truncated_file_is_refused(saved: Path, kept: float) -> None:
    check_safetensors(saved)
    file = saved / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        check_safetensors(saved)


def _header_of(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


@pytest.mark.parametrize("change", ["another shape", "another dtype", "overlap", "gap", "backwards", "no numbers"])
def test_a_header_that_contradicts_itself_names_the_tensor(tmp_path: Path, change: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"one": torch.zeros(4, 2), "two": torch.zeros(8)}, file)
    header = _header_of(file)
    assert header["one"]["data_offsets"] == [0, 32]
    header["two"] |= {
        "another shape": {"shape": [9]},
        "another dtype": {"dtype": "BF16"},
        "overlap": {"data_offsets": [28, 64], "shape": [9]},
        "gap": {"data_offsets": [36, 64], "shape": [7]},
        "backwards": {"data_offsets": [64, 32]},
        "no numbers": {"shape": ["8"]},
    }[change]
    text = json.dumps(header).encode()
    size = 32 if change == "backwards" else 64
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: two .*contradicts"):
        read_header(file)
    with pytest.raises(CheckpointError):
        Shards(tmp_path)


def test_other_damage_is_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:8] + b"!" + content[9:])
    with pytest.raises(CheckpointError, match="header"):
        check_safetensors(saved)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        check_safetensors(saved)
    file.unlink()
    with pytest.raises(CheckpointError, match="no safetensors"):
        check_safetensors(saved)
    (saved / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="index"):
        check_safetensors(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_values_are_found(value: float, dtype: torch.dtype) -> None:
    model = build().to(dtype)
    assert first_non_finite(model) is None
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    assert first_non_finite(model) == "model.layers.1.mlp.up_proj.weight"


def test_unsupported_structures_are_named() -> None:
    with pytest.raises(UnsupportedModelError, match="llamma"):
        pruned_family("llamma")
    with pytest.raises(UnsupportedModelError, match="LlamaForSequenceClassification"):
        adopt(LlamaForSequenceClassification(build().config))
    uneven = build()
    uneven.model.layers[0].mlp.up_proj = nn.Linear(HIDDEN, 16, bias=False)
    with pytest.raises(UnsupportedModelError, match="layer 0.*gate, up and down"):
        adopt(uneven)


def test_an_unknown_entry_is_refused_not_ignored(saved: Path) -> None:
    config = read_config(saved)
    config["per_layer_config"]["1"] = {"hidden_size": 16}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="are known, not"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_loading_says_nothing_alarming(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    AutoModelForCausalLM.from_pretrained(saved)
    assert caplog.messages == []


def test_weights_are_as_readable_as_the_folder(saved: Path) -> None:
    assert (saved / "model.safetensors").stat().st_mode == (saved / "config.json").stat().st_mode


def test_folders_carry_a_marker(saved: Path) -> None:
    assert json.loads((saved / MARKER).read_text()) == {
        "schema": 1,
        "form": "remote_code",
        "dtype": "float32",
        "state": "pruned",
    }
