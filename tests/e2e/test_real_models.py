"""The main job on real pretrained models, against figures measured independently (../shared/data/README.md)."""

from __future__ import annotations

import json

import pytest

from tests.conftest import shared


def _words(model: str, text: str, **keys) -> list[str]:
    """No BOS, the text tokenised once, 256-token windows; calibration on windows 0-95, evaluation on 100-179."""
    words = {
        "model": "local",
        "model.path": shared("models", model),
        "model.dtype": "float32",
        "calibration": "text",
        "calibration.path": shared("data", "text", text),
        "calibration.bos": "none",  # as measured; the default follows the tokenizer, and LLaMA's adds one
        "calibration.sampling": "sequential",
        "calibration.n_samples": 96,
        "calibration.seq_len": 256,
        "sparsity.round_to": 1,
        "evaluation": "perplexity",
        "evaluation.perplexity.datasets": "[text]",
        "evaluation.perplexity.texts.text.path": shared("data", "text", text),
        "evaluation.perplexity.texts.text.bos": "none",
        "evaluation.perplexity.seq_len": 256,
        "evaluation.perplexity.windows": "[100,180]",
        "save.model": "false",
        **keys,
    }
    return [f"{key}={value}" for key, value in words.items()]


def _perplexity(record: dict, side: str) -> float:
    (row,) = [row for row in record["measurements"][side] if row["suite"] == "perplexity"]
    return row["value"]


def test_stories260k_on_tinystories(run_cfsp, tmp_path):
    words = _words("stories260K", "tinystories.txt", **{"sparsity.ratio": 0.2})
    code, _, err = run_cfsp(*words)
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert _perplexity(record, "dense") == pytest.approx(4.135, abs=0.01)
    assert _perplexity(record, "pruned") == pytest.approx(7.31, rel=0.02)


@pytest.mark.parametrize(
    ("pruner", "ratio", "expected"),
    [("uniform", 0.2, 42.62), ("cfsp", 0.2, 41.41), ("uniform", 0.5, 67.34), ("cfsp", 0.5, 48.90)],
)
def test_books7m_on_held_out_books(run_cfsp, tmp_path, tmp_path_factory, pruner, ratio, expected):
    # One cache for all four: they share the statistics and the dense perplexity.
    cache = tmp_path_factory.getbasetemp() / "books7m-cache"
    keys = {"pruner": pruner, "sparsity.ratio": ratio, "paths.cache_dir": cache}
    code, _, err = run_cfsp(*_words("books7m", "books_heldout.txt", **keys))
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert _perplexity(record, "dense") == pytest.approx(39.57, abs=0.1)
    assert _perplexity(record, "pruned") == pytest.approx(expected, rel=0.02)
