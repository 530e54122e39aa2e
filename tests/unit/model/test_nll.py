"""Negative log-likelihood of sequences: in parts it is what it is as a whole."""

from __future__ import annotations

import pytest
import torch

from cfsp.architecture import weights
from cfsp.architecture.weights import weights_of
from cfsp.model import nll
from cfsp.model.nll import sequence_nll, total_nll
from tests.helpers.tiny import tiny_model


@pytest.mark.parametrize("tokens", [1, 3, 7, 100])
def test_parts_of_the_logits_add_up_to_the_whole(tokens, monkeypatch):
    """Only the order of fp32 sums of 15 terms differs: 1e-6 relative is some ten roundings."""
    generator = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(2, 16, 50, generator=generator), torch.randint(50, (2, 16), generator=generator)
    logp = logits.double().log_softmax(-1)
    expected = [-float(sum(logp[row, t, ids[row, t + 1]] for t in range(15))) for row in range(2)]
    monkeypatch.setattr(nll, "PART_BYTES", 4 * 50 * tokens)
    assert [float(value) for value in sequence_nll(logits, ids)] == pytest.approx(expected, rel=1e-6)
    assert total_nll(logits, ids) == pytest.approx(sum(expected), rel=1e-6)


@pytest.mark.parametrize(("windows_that_fit", "rows"), [(0.5, [1, 1, 1]), (1, [1, 1, 1]), (2.5, [2, 1]), (8, [3])])
def test_a_cpu_computes_fewer_windows_at_a_time_where_their_logits_are_large(windows_that_fit, rows, monkeypatch):
    model = tiny_model()
    ids = torch.arange(24).view(3, 8)
    entries = model.get_output_embeddings().weight.shape[0]
    monkeypatch.setattr(weights, "_LOGITS_BYTES", int(windows_that_fit * 8 * entries * 4))
    parts = list(weights_of(model).logits(ids, 4, "test"))
    assert [len(part) for part, _ in parts] == rows
    assert torch.equal(torch.cat([part for part, _ in parts]), ids)
    with torch.no_grad():
        expected = model(ids).logits
    assert torch.allclose(torch.cat([logits for _, logits in parts]), expected, atol=1e-5)
