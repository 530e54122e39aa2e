"""A saved model carries what it computes; a tool that makes something else of the folder is found out."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cfsp.architecture.weights import weights_of
from cfsp.checkpoint import reference as references
from cfsp.checkpoint import reference_pass
from cfsp.checkpoint.reference import LENGTH, Reference, copy_reference, ids_digest, place_of, read_reference
from cfsp.checkpoint.reference_pass import GREEDY, reference_of, token_windows
from cfsp.checkpoint.save import save_checkpoint
from cfsp.config.sections import ModelSection
from cfsp.errors import CheckpointError, RunError
from cfsp.model.load import load_model, load_streamed
from cfsp.verify.comparison import compare, select_tolerance
from cfsp.weights.source import locate
from tests.conftest import ROOT, mentions
from tests.helpers.structures import STRUCTURES, pruned
from tests.helpers.tiny import ARCHITECTURES, tiny_model
from tests.helpers.training import TRAINS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

ASSETS = ROOT / "cfsp" / "assets" / "books7m"


def asked_of(reference: Reference, folder: Path) -> dict:
    ids = reference.token_ids.tolist()
    return {
        "path": str(folder), "token_ids": ids, "greedy": reference.greedy.shape[1], "dtype": reference.computed,
        "trust_remote_code": True,
    }  # fmt: skip


@pytest.fixture
def saved(tmp_path) -> Path:
    return save_checkpoint(pruned("llama", "everything"), tmp_path / "saved", source=ASSETS).folder


# The reference


def test_the_tokens_are_the_same_each_time_and_none_is_special(tmp_path):
    model = tiny_model(pad_token_id=5)
    windows = token_windows(model)
    assert windows.shape == (2, LENGTH)
    assert np.array_equal(windows, token_windows(tiny_model("qwen3", seed=3, pad_token_id=5)))
    assert not {1, 2, 5} & set(windows.flatten())
    content = {"model": {"vocab": {str(at): at for at in range(20)}}, "added_tokens": [{"id": 7}, {"id": 8}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    known = set(token_windows(model, tmp_path).flatten())
    assert known <= set(range(20)) - {1, 2, 5, 7, 8}
    assert token_windows(tiny_model(max_position_embeddings=40)).shape == (2, 40 - GREEDY)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reference_is_what_the_model_computes(architecture):
    model = pruned(architecture, "everything").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = reference_of(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ids = torch.from_numpy(found.token_ids)
    with torch.no_grad():
        logits = model.eval()(ids).logits
        text = ids
        for _ in range(GREEDY):
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    wanted = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    assert torch.allclose(torch.from_numpy(found.logprobs), wanted, rtol=0, atol=1e-5)
    assert np.array_equal(found.top, logits.argmax(-1))
    assert np.array_equal(found.greedy, text[:, ids.shape[1] :])
    assert (found.margins > 0).all()
    assert (found.computed, found.stored) == ("float32", "float32")


def test_the_reference_is_of_the_weights_that_are_stored(tmp_path):
    """Cast on the way out, without having been rounded in memory before."""
    from transformers import AutoModelForCausalLM

    model = pruned("qwen2", "widths")
    exact = {name: value.clone() for name, value in model.state_dict().items()}
    save_checkpoint(model, tmp_path / "model", dtype=torch.bfloat16)
    assert all(torch.equal(value, exact[name]) for name, value in model.state_dict().items())
    found = read_reference(place_of(tmp_path / "model"))
    assert (found.computed, found.stored) == ("float32", "bfloat16")
    stored = reference_of(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32))
    assert np.array_equal(found.logprobs, stored.logprobs)
    assert np.array_equal(found.greedy, stored.greedy)
    assert np.abs(found.logprobs - reference_of(model).logprobs).max() > 1e-4


def test_a_streamed_model_has_the_reference_of_the_one_in_memory(model_folder):
    source = locate(ModelSection(name="m", path=str(model_folder)))
    model = load_streamed(source, dtype=torch.float32, device=torch.device("cpu"))
    memory = reference_of(load_model(source, dtype=torch.float32, device=torch.device("cpu")), dtype=torch.bfloat16)
    found = reference_of(model, dtype=torch.bfloat16)
    assert weights_of(model).reads == [1, 1]
    assert weights_of(model).rounded_to is None
    assert np.abs(found.logprobs - memory.logprobs).max() < 1e-5
    assert np.array_equal(found.greedy, memory.greedy[:, :1])


def test_a_model_without_finite_logits_is_not_saved(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("inf")
    with pytest.raises(RunError, match="not finite"):
        save_checkpoint(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_tools_that_read_every_file_at_the_top_find_weights_alone(saved):
    assert [file.name for file in saved.glob("*.safetensors")] == ["model.safetensors"]
    assert place_of(saved) == saved / "verify" / "reference.safetensors"
    assert place_of("x/model.Q8_0.gguf") == Path("x/model.Q8_0.reference.safetensors")


def test_an_export_is_given_the_reference(saved, tmp_path):
    assert copy_reference(saved, tmp_path / "model.gguf")
    assert copy_reference(saved, tmp_path / "padded")
    for export in ("model.gguf", "padded"):
        assert place_of(tmp_path / export).read_bytes() == place_of(saved).read_bytes()
    shutil.rmtree(saved / "verify")
    assert not copy_reference(saved, tmp_path / "again.gguf")


@pytest.mark.parametrize("damage", ["gone", "cut", "ids", "schema", "shape"])
def test_a_damaged_reference_is_refused(saved, damage, monkeypatch):
    file = place_of(saved)
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif damage == "schema":
        monkeypatch.setattr(references, "SCHEMA", "2")
    else:
        tensors = load_file(file)
        digest = ids_digest(tensors["token_ids"].numpy())
        if damage == "ids":
            tensors["token_ids"][0, 0] += 1
        else:
            tensors["logprobs"] = tensors["logprobs"][:, 1:].contiguous()
        save_file(tensors, file, metadata={"schema": "1", "token_ids": digest})
    with pytest.raises(CheckpointError) as found:
        read_reference(file)
    mentions([str(found.value)], str(file), "save")


# The comparison


@pytest.fixture
def reference() -> Reference:
    return reference_of(pruned("llama", "heads"))


def test_what_counts_as_the_same_model(reference):
    sound = {"version": "1", "logprobs": reference.logprobs.tolist(), "greedy": reference.greedy.tolist()}
    finding = compare("vllm", sound, reference, 1e-3)
    assert (finding.outcome, finding.difference, finding.tokens) == ("equal", 0.0, "16 of 16")
    assert compare("lm_eval", {**sound, "greedy": []}, reference, 1e-3).tokens == ""
    off = reference.logprobs.copy()
    off[1, 3] -= 0.01
    finding = compare("vllm", {**sound, "logprobs": off.tolist()}, reference, 1e-3)
    assert finding.outcome == "differs"
    assert finding.difference == pytest.approx(0.01, rel=1e-3)
    assert "token 4 of window 1" in finding.note
    assert compare("vllm", {**sound, "logprobs": off.tolist()}, reference, 0.05).outcome == "equal"
    finding = compare("vllm", {**sound, "logprobs": (reference.logprobs + 0.04).tolist()}, reference, 0.05, 0.01)
    assert finding.outcome == "differs", "all values are off a little"
    assert "mean difference is 0.04, 0.01 are allowed" in finding.note
    off[0, 0] = np.nan
    finding = compare("vllm", {**sound, "logprobs": off.tolist()}, reference, 1.0)
    assert (finding.outcome, finding.as_dict()["difference"]) == ("differs", None)
    assert "not finite" in finding.note
    for wrong in (None, [], reference.logprobs[:, 1:].tolist(), "text", [["a"]]):
        assert compare("vllm", {**sound, "logprobs": wrong}, reference, 1.0).outcome == "fails"
    finding = compare("peft", {**sound, "checks": {"merging": 0.1}}, reference, 1e-3)
    assert (finding.outcome, finding.note) == ("differs", "merging changes a log-probability by 0.1")


def test_greedy_tokens_may_part_where_two_are_as_likely(reference):
    other = reference.greedy.copy()
    other[1, 5:] = 0
    answer = {"logprobs": reference.logprobs.tolist(), "greedy": other.tolist()}
    reference.margins[:] = 1.0
    finding = compare("vllm", answer, reference, 1e-3)
    assert (finding.outcome, finding.tokens) == ("differs", "13 of 16")
    reference.margins[1, 5] = 1e-3
    finding = compare("vllm", answer, reference, 1e-3)
    assert (finding.outcome, finding.tokens) == ("equal", "13 of 16")
    assert "tie" in finding.note
    for short in (other[:, :3].tolist(), other[:1].tolist()):
        assert compare("vllm", {**answer, "greedy": short}, reference, 1e-3).outcome == "differs"


def test_the_coarsest_dtype_decides_what_is_allowed():
    assert select_tolerance(1e-4, "float32", "float32") == (1e-4, 1e-4)
    assert select_tolerance(1e-3, "float32", "float16") == (0.05, 0.01)
    assert select_tolerance(1e-3, "bfloat16", "float32") == select_tolerance(1e-3, "float32", "q4_k") == (0.5, 0.05)
    assert select_tolerance(1e-4, "float32", rounded="bfloat16") < select_tolerance(
        1e-4, "bfloat16", rounded="bfloat16"
    )


def test_many_small_differences_are_another_model(reference):
    off = reference.logprobs.copy()
    off[0, 0] += 0.4
    answer = {"logprobs": off.tolist(), "greedy": reference.greedy.tolist()}
    assert compare("vllm", answer, reference, 0.5, 0.05).outcome == "equal"
    off += 0.06
    finding = compare("vllm", {**answer, "logprobs": off.tolist()}, reference, 0.5, 0.05)
    assert finding.outcome == "differs"
    assert "mean difference is 0.06" in finding.note


# What is tampered with


def _config(folder: Path, **values) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = {**config["rope_parameters"], **values}
    path.write_text(json.dumps({**config, **values, "rope_parameters": rope}))


def _weights(folder: Path, name: str, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


TAMPERINGS = {
    "none": lambda folder: None,
    "rope_theta halved": lambda folder: _config(folder, rope_theta=5000.0),
    "rope_theta doubled": lambda folder: _config(folder, rope_theta=20000.0),
    "64 neurons": lambda folder: _weights(
        folder, "model.layers.3.mlp.down_proj.weight", lambda weight: weight[:, :64].zero_()
    ),
    "a norm": lambda folder: _weights(
        folder, "model.layers.3.post_attention_layernorm.weight", lambda weight: weight.mul_(1.05)
    ),
}


def _bundled(dtype: torch.dtype):
    source = locate(ModelSection(name="b", path=str(ASSETS)))
    return load_model(source, dtype=dtype, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def in_bfloat16(tmp_path_factory) -> Path:
    """The bundled model as a run that computes in bfloat16 saves it."""
    return save_checkpoint(_bundled(torch.bfloat16), tmp_path_factory.mktemp("b") / "m", source=ASSETS).folder


@pytest.fixture
def in_this_process(monkeypatch):
    """The tools' scripts are run here, which is what takes the time otherwise."""

    def ask(tool, asked, python):
        return importlib.import_module(f"cfsp.verify.tools.{tool.name}").main(asked)

    monkeypatch.setattr("cfsp.cli.verify.ask", ask)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_of_a_bfloat16_run_too_a_wrong_model_is_found(run_cfsp, tmp_path, in_bfloat16, tampering):
    folder = Path(shutil.copytree(in_bfloat16, tmp_path / "model"))
    reference = read_reference(place_of(folder))
    assert (reference.computed, reference.stored) == ("float32", "bfloat16")
    TAMPERINGS[tampering](folder)
    code, out, _ = run_cfsp("verify", f"path={folder}", "tools=transformers", defaults=False)
    assert code == (0 if tampering == "none" else 1), out
    assert "0.0001" in out  # what is allowed in float32


def test_the_reference_of_a_bfloat16_model_is_that_of_its_weights(in_bfloat16):
    model = _bundled(torch.bfloat16)
    names = {name: parameter.dtype for name, parameter in model.named_parameters()}
    found = reference_of(model)
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == names
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_pass, "_PIECE", 1000)  # some rows of a matrix at a time
        assert np.abs(reference_of(model).logprobs - found.logprobs).max() < 1e-4
    exact = reference_of(_bundled(torch.float32))
    assert np.abs(found.logprobs - exact.logprobs).max() < 1e-5
    assert np.array_equal(found.greedy, exact.greedy)
    source = locate(ModelSection(name="b", path=str(ASSETS)))
    lazy = load_streamed(source, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert np.abs(reference_of(lazy).logprobs - exact.logprobs).max() < 1e-4
    assert all(parameter.is_meta for parameter in lazy.parameters())


def test_a_streamed_bfloat16_model_has_a_reference_in_float32(in_bfloat16, tmp_path):
    source = locate(ModelSection(name="b", path=str(ASSETS)))
    lazy = load_streamed(source, dtype=torch.bfloat16, device=torch.device("cpu"))
    folder = save_checkpoint(lazy, tmp_path / "m", source=ASSETS).folder
    found, wanted = (read_reference(place_of(place)) for place in (folder, in_bfloat16))
    assert np.abs(found.logprobs - wanted.logprobs).max() < 1e-4
    assert (found.computed, found.stored) == ("float32", "bfloat16")


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("tampering", ["none", "rope_theta halved", "rope_theta doubled", "64 neurons"])
def test_an_export_in_another_dtype_is_held_against_the_old_reference(run_cfsp, tmp_path, tampering):
    model = _bundled(torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # off the values that bfloat16 holds
            parameter.mul_(1 + 2**-8 * (torch.rand(parameter.shape, generator=generator) - 0.5))
    saved = save_checkpoint(model, tmp_path / "model", source=ASSETS).folder
    words = [f"path={saved}", "format=hf", "dtype=bf16", f"to={tmp_path / 'half'}"]
    assert run_cfsp("export", *words, defaults=False)[0] == 0
    TAMPERINGS[tampering](tmp_path / "half")
    record = tmp_path / "r.json"
    words = [f"path={tmp_path / 'half'}", "tools=transformers", f"record={record}"]
    code, out, _ = run_cfsp("verify", *words, defaults=False)
    assert code == (0 if tampering == "none" else 1), out
    (row,) = json.loads(record.read_text())["tools"]
    assert row["difference"] > 1e-3  # rounding, and it is allowed for
    assert row["tolerance"] == 0.25


@pytest.mark.parametrize("streams", [False, True])
def test_a_dense_folder_s_export_is_verified_too(run_cfsp, tmp_path, monkeypatch, streams):
    """No run has written a reference there, so the export comes with one of its own."""
    if streams:
        monkeypatch.setattr("cfsp.system.memory.available", lambda device: 1 << 20)
    words = [f"path={ASSETS}", "format=padded", f"to={tmp_path / 'padded'}"]
    code, _, err = run_cfsp("export", *words, defaults=False)
    assert (code, err) == (0, "")
    reference = read_reference(place_of(tmp_path / "padded"))
    assert reference.greedy.shape[1] == (1 if streams else GREEDY)
    monkeypatch.undo()
    ask = importlib.import_module("cfsp.verify.tools.transformers").main(asked_of(reference, tmp_path / "padded"))
    assert compare("transformers", ask, reference, 1e-4).outcome == "equal"


def test_tools_compute_in_what_fits_into_memory(run_cfsp, in_bfloat16, pretender, monkeypatch, tmp_path):
    reference = read_reference(place_of(in_bfloat16))
    answer = {"logprobs": (reference.logprobs + 0.04).tolist(), "greedy": reference.greedy.tolist()}
    words = ["verify", f"path={in_bfloat16}", "tools=vllm", f"python.vllm={pretender(answer)}"]
    for free, dtype, code in ((1 << 40, "float32", 1), (1 << 20, "bfloat16", 0)):
        monkeypatch.setattr("cfsp.system.memory.available", lambda device, free=free: free)
        assert run_cfsp(*words, defaults=False)[0] == code
        assert json.loads((tmp_path / "request").read_text())["dtype"] == dtype


# The tools


@pytest.mark.parametrize("structure", STRUCTURES)
def test_transformers_makes_the_saved_model_of_each_structure(structure, tmp_path):
    """The tool's script, in this process; the folder's own code all the same."""
    folder = save_checkpoint(pruned("qwen3", structure), tmp_path / "model").folder
    reference = read_reference(place_of(folder))
    script = importlib.import_module("cfsp.verify.tools.transformers")
    finding = compare("transformers", script.main(asked_of(reference, folder)), reference, 1e-5)
    assert finding.outcome == "equal", finding
    assert finding.tokens == "16 of 16"


def test_the_command_line_in_processes_of_their_own(run_cfsp, saved, tmp_path):
    code, out, err = run_cfsp(
        "verify", f"path={saved}", "tools=transformers,peft", f"record={tmp_path / 'a' / 'r.json'}", defaults=False
    )
    assert (code, err) == (0, "")
    rows = json.loads((tmp_path / "a" / "r.json").read_text())["tools"]
    assert [(row["tool"], row["outcome"]) for row in rows] == [("transformers", "equal"), ("peft", "equal")]
    assert all(row["difference"] <= 1e-5 for row in rows)
    assert rows[0]["tokens"] == "16 of 16"
    for part in ("transformers", "peft", "16 of 16", "the saved model in transformers, peft"):
        assert part in out


def test_a_weight_that_was_changed_after_the_save_is_found(run_cfsp, saved):
    weights = load_file(saved / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][3] += 0.05
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    code, out, _ = run_cfsp("verify", f"path={saved}", "tools=transformers", defaults=False)
    assert code == 1
    assert "differs" in out
    assert "is not the saved model in transformers" in out


def test_a_folder_that_does_not_load_is_found(run_cfsp, saved):
    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    code, out, _ = run_cfsp("verify", f"path={saved}", "tools=transformers", defaults=False)
    assert code == 1
    assert "fails" in out
    assert "model.layers.0.mlp.down_proj.weight" in out


def test_scripts_do_not_take_cfsp(tmp_path):
    """It is installed beside the tools here; a folder that needs it must fail."""
    script = ROOT / "cfsp" / "verify" / "tools" / "transformers.py"
    (tmp_path / "model.py").write_text("")
    program = script.read_text().replace("main(json.loads(sys.argv[1]))", "__import__('cfsp')")
    (tmp_path / "script.py").write_text(program)
    ended = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True)
    assert "import of cfsp halted" in ended.stderr


# Code in the folder


def _append(file: Path, line: str) -> None:
    with file.open("a") as stream:
        stream.write(line)


def _set(file: Path, **keys: object) -> None:
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**values, **keys}))


def _code_elsewhere(folder: Path) -> None:
    """A link that leads out of the folder to code which is not cfsp's."""
    modeling = folder / "modeling_pruned_llama.py"
    outside = folder.parent / "outside.py"
    outside.write_text(modeling.read_text() + "\nprint()\n")
    modeling.unlink()
    modeling.symlink_to(outside)


def _subfolder(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "generate.py").write_text("print()")
    (folder / "custom_generate").symlink_to(folder.parent / "elsewhere")


CODE = {
    "a line more": (lambda f: _append(f / "modeling_pruned_llama.py", "import os\n"), "modeling_pruned_llama.py"),
    "in the configuration": (lambda f: _append(f / "configuration_pruned_llama.py", "#"), "configuration_pruned"),
    "a file more": (lambda f: (f / "helper.py").write_text(""), "helper.py"),
    "a link to code": (_code_elsewhere, "modeling_pruned_llama.py"),
    "a linked folder": (_subfolder, "custom_generate/generate.py"),
    "an auto_map to a repository": (
        lambda f: _set(f / "config.json", auto_map={"AutoConfig": "x/y--configuration_pruned_llama.PrunedLlamaConfig"}),
        "config.json names x/y--configuration",
    ),
    "a tokenizer's code": (
        lambda f: _set(f / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tok.Mine"]}),
        "tokenizer_config.json names tok.Mine",
    ),
    "another configuration": (
        lambda f: _set(f / "config.json", configuration_files=["../c/config.4.0.0.json"]),
        "config.json names ../c/config.4.0.0.json",
    ),
    "an adapter": (lambda f: _set(f / "adapter_config.json", base_model_name_or_path="/x"), "adapter_config.json"),
    "a placeholder": (
        lambda f: (f / "modeling_pruned_llama.py").write_text(
            (f / "modeling_pruned_llama.py").read_text().replace("PrunedLlamaConfig", "${pruned_config}", 1)
        ),
        "modeling_pruned_llama.py",
    ),
}


@pytest.mark.parametrize("change", CODE)
def test_other_code_than_ours_is_not_run_unasked(run_cfsp, saved, monkeypatch, change):
    monkeypatch.setattr("cfsp.cli.verify.ask", lambda *_: pytest.fail("a tool was started"))
    tamper, said = CODE[change]
    tamper(saved)
    code, out, err = run_cfsp("verify", f"path={saved}", "tools=transformers", defaults=False)
    assert (code, out, err.count("\n")) == (2, "", 1)
    mentions([err], f"path={saved}", said, "trust_remote_code=true")


def test_other_code_runs_where_it_is_trusted_and_none_where_there_is_none(run_cfsp, saved, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("cfsp.cli.verify.ask", lambda tool, request, python: asked.append(request) or {})
    _append(saved / "modeling_pruned_llama.py", "#")
    run_cfsp("verify", f"path={saved}", "tools=transformers", "trust_remote_code=true", defaults=False)
    plain = save_checkpoint(tiny_model("llama"), tmp_path / "plain").folder
    run_cfsp("verify", f"path={plain}", "tools=transformers", defaults=False)
    assert [request["trust_remote_code"] for request in asked] == [True, False]


def test_every_text_that_ships_is_listed():
    """A template that was changed: add its line to SHIPPED, and leave the old ones."""
    from cfsp.export import decilm
    from cfsp.pruned_model import shapes_template
    from cfsp.pruned_model import sizes_template as pruned_template
    from cfsp.pruned_model.family import family_names
    from cfsp.pruned_model.shipped_code import SHIPPED, is_shipped

    for family in ("llama", "qwen3", "opt", "gpt_bigcode", "phi"):
        names = family_names(family)
        for norms in ('{"attention": [], "mlp": []}', '{"attention": ["input_layernorm"], "mlp": ["a", "b"]}'):
            for template in (pruned_template.CONFIGURATION, pruned_template.MODELING, shapes_template.MODELING):
                text = template.substitute(names, norms=norms)
                assert is_shipped(text, names), family
                assert not is_shipped(text.replace("import", "import  ", 1), names)
    assert hashlib.sha256(decilm._CONFIGURATION.encode()).hexdigest() in SHIPPED


def test_a_folder_of_an_earlier_version_is_known():
    from cfsp.pruned_model.family import family_names
    from cfsp.pruned_model.shipped_code import is_shipped

    text = (ROOT / "tests" / "golden" / "modeling_pruned_llama_625daab.txt").read_text()
    assert is_shipped(text, family_names("llama"))


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(("words", "allowed"), [(("format=padded",), 1e-4), (("format=hf", "dtype=bf16"), 0.25)])
def test_an_export_is_verified_with_the_reference_of_the_folder(run_cfsp, tmp_path, words, allowed):
    """Weights that the export rounded are allowed more than those that only moved."""
    saved = save_checkpoint(pruned("llama", "widths"), tmp_path / "saved", source=ASSETS).folder
    code, _, err = run_cfsp("export", f"path={saved}", f"to={tmp_path / 'export'}", *words, defaults=False)
    assert code == 0, err
    record = tmp_path / "record.json"
    words = [f"path={tmp_path / 'export'}", "tools=transformers", f"record={record}"]
    code, out, err = run_cfsp("verify", *words, defaults=False)
    assert code == 0, out + err
    (row,) = json.loads(record.read_text())["tools"]
    assert row["tolerance"] == allowed
    assert (row["difference"] <= 1e-5) == (allowed == 1e-4)


@pytest.mark.parametrize(
    ("recovery", "computes"), [("none", "float32"), ("none", "bfloat16"), ("lora", "float32"), ("lora", "bfloat16")]
)
def test_what_a_run_saves_is_verified(run_cfsp, sound_words, prose_file, tmp_path, recovery, computes):
    trains = [] if recovery == "none" else [f"recovery.data.path={prose_file}", *TRAINS]
    words = [*sound_words, f"recovery={recovery}", *trains, "save.model=true", "save.dtype=bfloat16"]
    words.append(f"model.dtype={computes}")
    code, _, err = run_cfsp(*words)
    assert code == 0, err
    reference = read_reference(place_of(tmp_path / "out" / "model"))
    assert (reference.computed, reference.stored) == ("float32", "bfloat16")
    # The weights were rounded before: nothing is lost in the folder.
    code, out, err = run_cfsp("verify", f"path={tmp_path / 'out'}", "tools=transformers", defaults=False)
    assert code == 0, out + err
    if recovery == "lora":  # the model that the adapter stands on is another one, with a reference of its own
        before = read_reference(place_of(tmp_path / "out" / "pruned"))
        assert np.abs(before.logprobs - reference.logprobs).max() > 1e-3


# The command, with tools that are none


@pytest.fixture
def pretender(tmp_path):
    """A Python that has every tool and answers with what it is given."""

    def make(answer: dict | str, code: int = 0) -> str:
        said = answer if isinstance(answer, str) else json.dumps(answer)
        (tmp_path / "answer").write_text(said)
        python = tmp_path / "python"
        python.write_text(
            f'#!/bin/sh\n[ "$2" = -c ] && exit 0\necho "$3" > {tmp_path}/request\necho "a banner"\n'
            f"cat {tmp_path}/answer\necho 'ValueError: the cat' >&2\nexit {code}\n"
        )
        python.chmod(0o755)
        return str(python)

    return make


def test_an_answer_is_found_between_a_tools_own_words(run_cfsp, saved, pretender, tmp_path):
    reference = read_reference(place_of(saved))
    answer = {"version": "9", "logprobs": reference.logprobs.tolist(), "greedy": reference.greedy.tolist()}
    python = pretender(json.dumps(answer) + "\ngoodbye\n")
    code, out, err = run_cfsp("verify", f"path={saved}", "tools=vllm", f"python.vllm={python}", defaults=False)
    assert code == 0, err
    assert "16 of 16" in out
    request = json.loads((tmp_path / "request").read_text())
    assert request["token_ids"] == reference.token_ids.tolist()
    assert (request["path"], request["greedy"], request["dtype"]) == (str(saved), GREEDY, "float32")


@pytest.mark.parametrize(
    ("answer", "code", "part"),
    [
        ("", 0, "without an answer"),
        ("", 3, "ValueError: the cat"),
        ('{"version": "9", "error": "blk.1 has wrong shape"}\n', 1, "blk.1 has wrong shape"),
        ('{"version": "9"}\n{broken\n', 1, "ValueError: the cat"),
    ],
)
def test_a_tool_that_fails(run_cfsp, saved, pretender, answer, code, part):
    python = pretender(answer, code)
    code, out, _ = run_cfsp("verify", f"path={saved}", "tools=vllm", f"python.vllm={python}", defaults=False)
    assert code == 1
    assert part in out


def test_a_gguf_file_is_for_llama_cpp(run_cfsp, saved, pretender, tmp_path):
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert copy_reference(saved, file)
    reference = read_reference(place_of(file))
    off = {"version": "9", "logprobs": (reference.logprobs + 0.04).tolist(), "greedy": reference.greedy.tolist()}
    words = ["verify", f"path={file}", "tools=transformers,llama_cpp", f"python.llama_cpp={pretender(off)}"]
    code, out, err = run_cfsp(*words, defaults=False)
    assert code == 0, out + err
    assert "reads model folders" in out
    assert "0.5" in out


def test_a_folder_for_vllm_is_not_held_against_the_others(run_cfsp, saved):
    path = saved / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "auto_map": {"AutoConfig": "configuration_pruned_llama.PrunedLlamaConfig"}}))
    code, _, err = run_cfsp("verify", f"path={saved}", "tools=transformers,llama_cpp", defaults=False)
    assert code == 2
    mentions(err.splitlines(), "none of them can be tried", "made for vLLM", "reads GGUF files")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["pth=x"], ["pth: unknown key", "did you mean path?", "tools"]),
        (["x"], ["x: is not key=value", "--help"]),
        (["path="], ["path=: has no value"]),
        (["tools=peft"], ["path is not set", "path=DIR"]),
        (["path={saved}", "tools=transformer"], ["tools=transformer", "did you mean transformers?"]),
        (["path={saved}", "python.vlm=x"], ["python.vlm: unknown key", "did you mean python.vllm?"]),
        (["path={saved}", "tools=vllm", "python.vllm=/nowhere/py"], ["python.vllm=/nowhere/py", "cannot be run"]),
        (["path={saved}", "tools=vllm", "python.vllm=/bin/false"], ["python.vllm=/bin/false", "is no Python"]),
        (["path={saved}/nowhere"], ["nowhere", "no such folder"]),
        (["path={saved}/config.json"], ["config.json", "neither a folder nor a GGUF file"]),
        (["path={saved}/verify"], ["holds no model", "config.json"]),
        (["path={model_folder}"], ["there is no reference", "save the model again"]),
    ],
    ids=lambda value: value[0],
)  # fmt: skip
def test_wrong_input_ends_with_2_and_one_line(run_cfsp, saved, model_folder, words, parts):
    words = [word.format(saved=saved, model_folder=model_folder) for word in words]
    code, out, err = run_cfsp("verify", *words, defaults=False)
    assert (code, out) == (2, "")
    mentions(err.splitlines(), *parts)
    assert err.startswith("cfsp: ")


def test_everything_wrong_is_said_at_once(run_cfsp):
    code, _, err = run_cfsp("verify", "pth=x", "tools=vlm", defaults=False)
    assert (code, len(err.splitlines())) == (2, 2)


def test_a_record_that_cannot_be_written(run_cfsp, saved, pretender, tmp_path):
    (tmp_path / "file").touch()
    words = [f"path={saved}", "tools=vllm", f"python.vllm={pretender('')}", f"record={tmp_path / 'file' / 'r.json'}"]
    code, _, err = run_cfsp("verify", *words, defaults=False)
    assert code == 2
    mentions(err.splitlines(), "record=", "cannot be written")


# Commands that are no runs


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), ([], 2)])
def test_help(run_cfsp, words, code):
    found, out, err = run_cfsp("verify", *words, defaults=False)
    assert (found, err) == (code, "")
    for part in ("cfsp verify path=", "python.vllm", "Exit codes", "transformers"):
        assert part in out
    assert max(map(len, out.splitlines())) <= 120


def test_a_command_is_found_without_anything_heavy():
    program = (
        "import sys; from cfsp.cli import main as run; found = lambda: sorted({'torch', 'numpy'} & set(sys.modules)); "
        "print(found(), run._main(['cfsp', 'verify', 'pth=x']), found())"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ended.stdout.strip() == "[] 2 []", ended.stderr


def test_a_command_that_breaks_says_so_in_one_line(run_cfsp, monkeypatch):
    from cfsp.cli import verify as command

    monkeypatch.setattr(command, "main", lambda words: 1 / 0)
    code, _, err = run_cfsp("verify", "path=x", defaults=False)
    assert code == 1
    mentions(err.splitlines(), "verify failed", "ZeroDivisionError", "debug=true")
    code, _, err = run_cfsp("verify", "path=x", "debug=true", defaults=False)
    assert (code, "Traceback" in err) == (1, True)
