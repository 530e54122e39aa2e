"""Shared fixtures: the real models and data beside the checkout, and the command line run in this process."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def shared(*parts: str) -> Path:
    """A path under ../shared; without it the test skips, or fails where CFSP_REQUIRE_SHARED=1."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        if os.environ.get("CFSP_REQUIRE_SHARED") == "1":
            pytest.fail(f"{'/'.join(('../shared', *parts))} is missing and CFSP_REQUIRE_SHARED=1")
        pytest.skip(f"needs {'/'.join(('../shared', *parts))}, which is not here")
    return path


@pytest.fixture(scope="session", autouse=True)
def _determinism() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run_cfsp(tmp_path, monkeypatch, capsys):
    """Run the command line in this process: ``code, out, err = run_cfsp("key=value", ...)``."""
    import sys

    from hydra.core.global_hydra import GlobalHydra

    from cfsp.cli import main as run

    def call(*words: str, defaults: bool = True):
        given = list(words)
        if defaults:
            base = {
                "paths.output_dir": tmp_path / "out",
                "paths.cache_dir": tmp_path / "cache",
                "paths.records_dir": tmp_path / "records",
            }
            named = {word.split("=", 1)[0] for word in given}
            given += [f"{key}={value}" for key, value in base.items() if key not in named]
            if not any(word.startswith("logger") for word in given):
                given.append("logger=none")
        monkeypatch.setattr(sys, "argv", ["cfsp", *given])
        GlobalHydra.instance().clear()
        capsys.readouterr()
        code = run._main(sys.argv)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def refused(run_cfsp, tmp_path, monkeypatch):
    """Run a command line that must end with exit code 2: ``lines = refused("key=value", ...)``.

    Each line on stderr is one finding, no weight is loaded, and nothing stays behind but an empty OUT.
    """
    import transformers

    from cfsp.pipeline import base_models

    def no_weights(*_, **__):
        raise AssertionError("weights were loaded")

    def files():
        return {path for path in tmp_path.rglob("*") if path != tmp_path / "out"}

    def call(*words: str, loads: bool = False, **keys) -> list[str]:
        before = files()
        with monkeypatch.context() as patch:
            if not loads:
                patch.setattr(base_models, "load_model", no_weights)
                patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", no_weights)
            code, _, err = run_cfsp(*words, **keys)
        lines = err.splitlines()
        assert code == 2, err
        assert lines
        assert all(line.startswith("cfsp: ") for line in lines), err
        if not loads:
            assert files() == before
        return [line.removeprefix("cfsp: ") for line in lines]

    return call


def mentions(lines: list[str], *parts: str) -> None:
    """There is one line, and every part is in it."""
    assert len(lines) == 1, lines
    for part in parts:
        assert part in lines[0]


# A sound run on a tiny model, for tests to damage

SENTENCE = "It was a quiet morning on the river, and the boats lay still in the mist. "
POSITIONS, VOCABULARY = 64, 4096


@pytest.fixture
def one_thread():
    """Tiny models are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_with_tokenizer(model, folder: Path) -> Path:
    """Save a model of ``VOCABULARY`` tokens with the bundled model's tokenizer."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "cfsp" / "assets" / "books7m" / name, folder)
    return folder


@pytest.fixture(scope="session")
def _tiny_folder(tmp_path_factory) -> Path:
    from tests.helpers.tiny import tiny_model

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "width": 64, "blocks": 2}
    model = tiny_model(vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, **sizes)
    return save_with_tokenizer(model, tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def model_folder(_tiny_folder, tmp_path) -> Path:
    """A sound model folder of this test's own."""
    return Path(shutil.copytree(_tiny_folder, tmp_path / "model"))


@pytest.fixture
def prose_file(tmp_path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(SENTENCE * 100)
    return path


@pytest.fixture
def sound_words(model_folder, prose_file) -> list[str]:
    """A command line that works; what a test adds comes later and wins."""
    return [
        "model=local",
        f"model.path={model_folder}",
        "calibration=text",
        f"calibration.path={prose_file}",
        "calibration.n_samples=4",
        "calibration.seq_len=32",
        "sparsity.round_to=8",
        "evaluation=none",
        "save.model=false",
    ]
