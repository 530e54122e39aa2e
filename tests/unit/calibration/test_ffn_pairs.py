"""Pairs of what enters and leaves an FFN: which tokens are fitted, which are held out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cfsp.architecture.views import resolve
from cfsp.calibration.ffn_pairs import FFNPairs, capturing_ffn
from cfsp.model.hidden_states import HiddenStates
from tests.helpers.tensors import normal, rows
from tests.helpers.tiny import tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")


def collected(n: int, length: int, stride: float, missing: float | None = None, batch: int = 2, bias: bool = False):
    """Pairs of block 1, and [n, T, d] of what entered its FFN and left it, and what is missing."""
    model, ids = tiny_model("llama_bias" if bias else "llama"), tokens(n, length)
    block = resolve(model).blocks[1]
    pairs = FFNPairs(n, stride, lambda: HiddenStates(device=torch.device("cpu")))
    entered, left = [], []

    def see(_: nn.Module, args: tuple, output: Tensor) -> None:
        entered.append(args[0].detach())
        left.append(output.detach())

    handle = block.ffn.module.register_forward_hook(see)
    more = None if missing is None else normal(n, length, 32, seed=9, scale=missing)
    with torch.no_grad(), capturing_ffn(block, block.ffn) as seen:
        for at in range(0, n, batch):
            model(ids[at : at + batch])
            pairs.add(block.ffn, seen, None if more is None else more[at : at + batch])
    handle.remove()
    assert not any(module._forward_pre_hooks for module in block.module.modules())
    return pairs, torch.cat(entered), torch.cat(left), more


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("missing", [None, 2.0])
@pytest.mark.parametrize("stride", [1, 4, 1.5])
def test_every_fourth_sequence_is_held_out(stride, missing, bias) -> None:
    pairs, entered, left, more = collected(10, 12, stride, missing, batch=3, bias=bias)
    at = {1: range(12), 4: [0, 4, 8], 1.5: [0, 2, 3, 5, 6, 8, 9, 11]}[stride]
    out = torch.arange(10) % 4 == 3
    targets = left if more is None else left + more
    for found, which in ((pairs.fitted, ~out), (pairs.held_out, out)):
        assert torch.equal(rows(found, 0), entered[which][:, list(at)].flatten(0, 1))
        torch.testing.assert_close(rows(found, 1), targets[which][:, list(at)].flatten(0, 1), rtol=1e-5, atol=1e-5)
    assert len(rows(pairs.fitted, 0)) == 8 * len(at)
    assert len(rows(pairs.held_out, 0)) == 2 * len(at)


@pytest.mark.parametrize(("n", "length"), [(1, 30), (2, 7), (3, 9)])
@pytest.mark.parametrize("batch", [1, 2])
def test_of_few_sequences_every_fourth_token_is_held_out(n, length, batch) -> None:
    pairs, entered, left, _ = collected(n, length, 1, batch=batch)
    flat, targets = entered.flatten(0, 1), left.flatten(0, 1)
    out = torch.arange(n * length) % 4 == 3
    for found, which in ((pairs.fitted, ~out), (pairs.held_out, out)):
        assert torch.equal(rows(found, 0), flat[which])
        torch.testing.assert_close(rows(found, 1), targets[which], rtol=1e-5, atol=1e-5)


def test_pairs_hold_no_more_than_their_own_tokens() -> None:
    """A view of one token in eight would keep all of a batch in memory."""
    pairs, *_ = collected(8, 32, 8)
    for x, target in pairs.fitted:
        assert x.untyped_storage().nbytes() == 4 * x.numel()
        assert target.untyped_storage().nbytes() == 4 * target.numel()


def test_hooks_go_away_where_a_block_fails() -> None:
    block = resolve(tiny_model()).blocks[0]

    class FailureError(Exception):
        pass

    with pytest.raises(FailureError), capturing_ffn(block, block.ffn):
        raise FailureError
    assert not any(module._forward_pre_hooks for module in block.module.modules())
