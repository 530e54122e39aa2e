"""The Gauss-Newton refit of a streamed model, and of a real one."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import cfsp
from cfsp.plan.pruning_plan import PruningPlan
from tests.conftest import VOCABULARY as WORDS
from tests.conftest import save_with_tokenizer, shared
from tests.helpers.architectures import ARCHITECTURES
from tests.helpers.tiny import tokens

pytestmark = pytest.mark.usefixtures("one_thread")

LEAST_SQUARES = ["pruner.compensation=least_squares"]


# Streaming


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        pytest.param("llama", "1", id="llama"),
        pytest.param("phi3", "0", id="phi3, matrices on disk"),
        pytest.param("gpt2", "1", id="gpt2", marks=pytest.mark.slow),
        pytest.param("gemma2", "0", id="gemma2, matrices on disk", marks=pytest.mark.slow),
    ],
)
def test_a_streamed_model_gets_the_same_plan_and_weights(name, memory, run_cfsp, tmp_path) -> None:
    from dataclasses import replace

    from safetensors.torch import load_file

    entry = ARCHITECTURES[name]
    model = replace(entry, settings={**entry.settings, "vocab_size": WORDS}).build()
    folder = save_with_tokenizer(model, tmp_path / "base")
    import numpy as np

    np.save(tmp_path / "ids.npy", tokens(64, 48, seed=1, vocabulary=WORDS).numpy())
    plans, weights = [], []
    for streaming in ("off", "on"):
        out = tmp_path / streaming
        code, _, err = run_cfsp(
            "model=local", f"model.path={folder}", "calibration=tokens", f"calibration.path={tmp_path / 'ids.npy'}",
            "calibration.batch_size=3", "sparsity.round_to=4", "evaluation=none", "pruner=cfsp_plus",
            "sparsity.ratio=0.5", f"calibration.memory_gb={memory}", f"model.streaming={streaming}",
            f"paths.output_dir={out}", f"paths.cache_dir={out / 'cache'}",
        )  # fmt: skip
        assert code == 0, err
        plans.append(PruningPlan.load(out / "plan.json"))
        weights.append(load_file(out / "model" / "model.safetensors"))
    assert plans[0] == plans[1]
    assert any(key.endswith("up_weight") for key in plans[0].tensors)
    assert all(torch.equal(value, plans[1].tensors[key]) for key, value in plans[0].tensors.items())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    saved, _ = cfsp.load(tmp_path / "on" / "model")
    replayed = cfsp.apply(copy.deepcopy(model), plans[0])
    with torch.no_grad():
        ids = tokens(2, 12, vocabulary=WORDS)
        assert torch.equal(saved(ids).logits, replayed(ids).logits)


# A real model


@pytest.fixture(scope="module")
def stories() -> Tensor:
    """Windows of 256 tokens of TinyStories."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared("models", "stories260K"))
    with shared("data", "text", "tinystories.txt").open(encoding="utf-8") as file:
        text = file.read(250_000)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return ids[: len(ids) // 256 * 256].view(-1, 256)


def perplexities(windows: Tensor, held: Tensor) -> list[float]:
    """Of stories260K with half of its neurons: cfsp_plus, and with least squares alone."""
    found = []
    for more in ([], LEAST_SQUARES):
        model, _ = cfsp.load(shared("models", "stories260K"))
        cfsp.apply(model, cfsp.prune(model, windows, "cfsp_plus", 0.5, round_to=1, overrides=more))
        with torch.no_grad():
            logits = model(held).logits[:, :-1]
        found.append(math.exp(functional.cross_entropy(logits.flatten(0, 1), held[:, 1:].flatten())))
    return found


def test_a_real_model_comes_closer(stories) -> None:
    """Measured 12.1 against 16.8, of a dense 4.0; half of the gain is asked for."""
    newton, least_squares = perplexities(stories[:32], stories[-32:])
    assert newton < 0.86 * least_squares


@pytest.mark.parametrize(("n", "length"), [(2, 32), (4, 64), (1, 16)])
def test_a_real_model_of_few_tokens_gets_no_worse(n, length, stories) -> None:
    newton, least_squares = perplexities(stories[:n, :length], stories[-16:])
    assert math.isfinite(newton)
    assert newton < 1.5 * least_squares
