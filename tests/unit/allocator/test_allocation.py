"""Allocators and the budget: keep ratios, rounding, exactness, refusals."""

from __future__ import annotations

import pytest
import torch

from cfsp.allocator.block_influence import BlockInfluence
from cfsp.allocator.chosen_blocks import ChosenBlocks
from cfsp.allocator.coarse import Coarse
from cfsp.allocator.global_rank import GlobalRank
from cfsp.allocator.uniform import Uniform
from cfsp.config.budget import Budget
from cfsp.errors import BudgetError, ConfigError
from cfsp.importance.base import Scores
from cfsp.sparsity.budget import Sizes, keep_fraction, to_widths

DISTANCES = torch.tensor([0.506, 0.074, 0.097, 0.079, 0.100, 0.092, 0.121, 0.112], dtype=torch.float64)


def sizes(*widths: int, cost: int = 768, groups: int = 0, group_cost: int = 5000) -> Sizes:
    total = sum(widths) * cost
    n = len(widths)
    return Sizes(widths, (cost,) * n, (groups,) * n, (group_cost,) * n, total, 2 * total, 3 * total)


def removed(found, size: Sizes) -> int:
    """Parameters that kept widths and KV groups take away."""
    rows = zip(size.widths, found.per_block, size.neuron_parameters, strict=True)
    groups = zip(size.kv_groups, found.kv_groups, size.group_parameters, strict=True)
    return sum((n - kept) * cost for n, kept, cost in [*rows, *groups])


def scores(widths, distances=None, groups: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(0)
    neurons = tuple(torch.rand(n, generator=generator, dtype=torch.float64) for n in widths)
    heads = tuple(torch.rand(groups, 16, generator=generator, dtype=torch.float64) for _ in widths)
    found = DISTANCES[: len(widths)] if distances is None else distances
    return Scores(neurons, heads, dict.fromkeys(("angular", "cosine", "mse", "mae"), found))


@pytest.mark.parametrize("metric", ["angular", "cosine", "mse", "euclidean", "mae", "none"])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8, 0.95])
def test_coarse_keeps_its_mean_and_never_more_than_everything(metric, keep):
    widths = (768,) * 8
    ratios = Coarse(metric).allocate(scores(widths), sizes(*widths), keep).keep
    assert float(ratios.mean()) == pytest.approx(keep)
    assert float(ratios.max()) <= 1
    if metric == "none":
        assert torch.allclose(ratios, torch.full_like(ratios, keep))
    else:
        assert ratios.argsort().tolist() == DISTANCES.argsort().tolist(), "more distance must keep more"


def test_coarse_does_not_depend_on_an_offset_and_flattens_with_the_temperature():
    widths = (768,) * 8
    flat, plain, sharp = (
        Coarse(temperature=t).allocate(scores(widths), sizes(*widths), 0.3).keep for t in (0.0, 1.0, 4.0)
    )
    assert torch.allclose(flat, torch.full_like(flat, 0.3))
    assert plain.std() < sharp.std()
    shifted = Coarse().allocate(scores(widths, DISTANCES + 0.2), sizes(*widths), 0.3).keep
    assert torch.allclose(plain, shifted)


def test_coarse_where_all_blocks_are_alike():
    ratios = Coarse().allocate(scores((96,) * 4, torch.full((4,), 0.1).double()), sizes(*(96,) * 4), 1.0).keep
    assert torch.allclose(ratios, torch.ones(4, dtype=torch.float64))


def test_coarse_weighs_blocks_of_unequal_width():
    widths = (736, 288, 320, 288, 352, 320, 384, 384)
    size = sizes(*widths)
    ratios = Coarse().allocate(scores(widths), size, 0.5).keep
    assert float((ratios * torch.tensor(widths)).sum()) == pytest.approx(0.5 * sum(widths))
    desired = [ratio * n for ratio, n in zip(ratios.tolist(), widths, strict=True)]
    nearest = to_widths(desired, Budget(0.5, round_to=1, rounding="nearest"), size)
    assert removed(nearest, size) / size.ffn_parameters == pytest.approx(0.5, abs=0.01)


def test_global_rank_is_one_threshold_over_standardised_scores():
    widths = (64, 96, 128)
    given = scores(widths)
    allocation = GlobalRank().allocate(given, sizes(*widths), 0.5)
    z = torch.cat([(s - s.mean()) / s.std() for s in given.neurons])
    threshold = z.sort(descending=True).values[143]
    expected = [int((((s - s.mean()) / s.std()) >= threshold).sum()) for s in given.neurons]
    assert (allocation.keep * torch.tensor(widths)).round().int().tolist() == expected
    assert allocation.counted


def test_global_rank_survives_a_block_of_equal_scores():
    given = Scores((torch.ones(32).double(), torch.rand(32).double()), (torch.zeros(0, 1).double(),) * 2, {})
    assert GlobalRank().allocate(given, sizes(32, 32), 0.5).keep.isfinite().all()


@pytest.mark.parametrize(("choose", "chosen"), [("most", [0, 6]), ("least", [1, 3])])
@pytest.mark.parametrize("round_to", [1, 32])
def test_chosen_blocks_lose_alike_and_the_others_nothing(choose, chosen, round_to):
    widths, budget = (768,) * 8, Budget(0.2, round_to=round_to)
    size = sizes(*widths)
    allocation = ChosenBlocks(choose).allocate(scores(widths), size, keep_fraction(budget, size))
    found = to_widths([k * 768 for k in allocation.keep.tolist()], budget, size)
    assert [at for at, width in enumerate(found.per_block) if width < 768] == chosen
    assert allocation.keep[chosen].tolist() == pytest.approx([0.2, 0.2])
    assert abs(removed(found, size) - 0.2 * size.ffn_parameters) <= round_to * 768


def test_chosen_blocks_refuse_more_than_they_hold():
    with pytest.raises(BudgetError, match=r"allocator\.share=0\.25: the 2 blocks hold 25\.0% .* asks for 30\.0%"):
        ChosenBlocks().allocate(scores((768,) * 8), sizes(*(768,) * 8), 0.7)


@pytest.mark.parametrize("most", [0.6, 0.8, 1.0])
@pytest.mark.parametrize("epsilon", [1e-4, 0.05, 0.15, 1e3])
@pytest.mark.parametrize("keep", [0.25, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("widths", [(768,) * 8, (736, 288, 320, 0, 352, 320, 384, 384)], ids=str)
def test_block_influence_spreads_what_goes_by_a_capped_softmax(widths, keep, epsilon, most):
    """Against a bisection for c in min(cap, c exp(-BI / epsilon)), whose weighted mean is what goes."""
    size = sizes(*widths)
    found = 1 - BlockInfluence(epsilon, most).allocate(scores(widths), size, keep).keep
    cap, weight = max(most, 1 - keep), torch.tensor(widths, dtype=torch.float64) / sum(widths)
    exponents = -(DISTANCES - DISTANCES[weight > 0].min()) / epsilon
    low, high = -100.0, 2e4  # logarithms of c
    for _ in range(200):
        middle = (low + high) / 2
        shares = (exponents + middle).exp().clamp(max=cap)
        low, high = (middle, high) if float((weight * shares).sum()) < 1 - keep else (low, middle)
    shares = (exponents + low).exp().clamp(max=cap)
    free = weight > 0
    torch.testing.assert_close(found[free], shares[free], rtol=1e-6, atol=1e-9)
    assert float((weight * found).sum()) == pytest.approx(1 - keep, abs=1e-12)
    assert float(found.max()) <= cap + 1e-12
    assert found.isfinite().all()


def test_block_influence_is_modegpts_formula_where_no_block_is_capped():
    """Eq. of the paper for blocks of one size: L phi softmax(-BI / epsilon)."""
    found = BlockInfluence(0.3).allocate(scores((768,) * 8), sizes(*(768,) * 8), 0.7).keep
    expected = 8 * 0.3 * (-DISTANCES / 0.3).softmax(0)
    assert float(expected.max()) < 0.95
    torch.testing.assert_close(1 - found, expected)
    assert BlockInfluence().block_distance() == "cosine"


def test_block_influence_takes_the_same_from_every_block_above_its_cap():
    found = BlockInfluence(max_sparsity=0.5).allocate(scores((768,) * 8), sizes(*(768,) * 8), 0.3).keep
    assert found.tolist() == pytest.approx([0.3] * 8)


@pytest.mark.parametrize(
    "allocator",
    [Uniform(), Coarse(), Coarse(temperature=8), GlobalRank(), ChosenBlocks(share=1), BlockInfluence()],
    ids=str,
)
@pytest.mark.parametrize("round_to", [1, 32, 128, 100])
@pytest.mark.parametrize("ratio", [0.1, 0.33, 0.5, 0.77])
@pytest.mark.parametrize("widths", [(768,) * 8, (172, 96, 300, 512), (11008, 5504, 8000, 1024)], ids=str)
def test_exact_meets_the_budget_within_one_step(allocator, round_to, ratio, widths):
    size = sizes(*widths)
    budget = Budget(ratio, round_to=round_to)
    try:
        keep = keep_fraction(budget, size)
    except BudgetError:
        smallest = sum(min(round_to, n) for n in widths)
        assert smallest > (1 - ratio) * sum(widths), "refused although it can be met"
        return
    allocation = allocator.allocate(scores(widths), size, keep)
    desired = [k * n for k, n in zip(allocation.keep.tolist(), widths, strict=True)]
    found = to_widths(desired, budget, size, counted=allocation.counted)
    assert all(w == n or (w % round_to == 0 and w >= round_to) for w, n in zip(found.per_block, widths, strict=True))
    assert all(0 < w <= n for w, n in zip(found.per_block, widths, strict=True))
    assert abs(removed(found, size) - ratio * size.ffn_parameters) <= round_to * 768


def test_exact_moves_the_block_that_is_furthest_from_its_wish():
    # 10.4 + 10.4 + 10.4 wants 31 of 31.2: nearest gives 30, and one more step goes to the largest remainder.
    found = to_widths([10.4, 10.45, 10.35], Budget(1 - 31.2 / 96, round_to=1), sizes(32, 32, 32))
    assert found.per_block == (10, 11, 10)


@pytest.mark.parametrize(
    ("round_to", "desired", "expected"),
    [
        (128, 63.9, 128),
        (128, 64.0, 128),
        (128, 191.9, 128),
        (128, 192.0, 256),
        (1, 170.36, 171),
        (1, 10.0, 11),
    ],
)
def test_nearest_is_the_released_rule_but_never_empty(round_to, desired, expected):
    """int((N keep + 64) / 128) 128 and int(N keep) + 1; where the released index would be -1, min_width is kept."""
    budget = Budget(0.5, round_to=round_to, rounding="nearest")
    assert to_widths([desired], budget, sizes(512)).per_block == (expected,)


def test_min_width_is_kept_and_a_budget_out_of_reach_is_refused():
    size = sizes(256, 256)
    found = to_widths([10.0, 246.0], Budget(0.5, round_to=32, min_width=96), size)
    assert min(found.per_block) >= 96
    assert sum(found.per_block) == 256
    with pytest.raises(BudgetError, match=r"removes 0\.6250 at most"):
        keep_fraction(Budget(0.9, round_to=32, min_width=96), size)
    with pytest.raises(BudgetError, match="scope=model"):
        keep_fraction(Budget(0.5, scope="model"), size)


@pytest.mark.parametrize(("scope", "share"), [("ffn", 1), ("decoder", 2), ("model", 3)])
def test_a_scope_asks_more_of_the_ffn_the_wider_it_is(scope, share):
    assert keep_fraction(Budget(0.25, scope=scope, round_to=1), sizes(1000, 1000)) == pytest.approx(1 - 0.25 * share)


@pytest.mark.parametrize("allocator", [Uniform(), Coarse(), GlobalRank()], ids=str)
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4])
def test_exact_meets_the_budget_with_heads_too(allocator, ratio):
    widths = (768, 512, 768, 640)
    size = sizes(*widths, groups=8, group_cost=40_000)
    budget = Budget(ratio, scope="decoder", round_to=1)
    allocation = allocator.allocate(scores(widths, groups=8), size, keep_fraction(budget, size))
    groups = allocation.keep if allocation.keep_groups is None else allocation.keep_groups
    desired = [k * n for k, n in zip(allocation.keep.tolist(), widths, strict=True)]
    found = to_widths(desired, budget, size, groups=[8 * k for k in groups.tolist()], counted=allocation.counted)
    assert all(1 <= kept <= 8 for kept in found.kv_groups)
    assert abs(removed(found, size) - ratio * size.decoder_parameters) <= 768
    assert any(kept < 8 for kept in found.kv_groups) or ratio < 0.2


@pytest.mark.parametrize(
    ("protect", "blocks", "free"),
    [
        ("none", 4, [0, 1, 2, 3]),
        ("auto", 4, [1, 2]),
        ("auto", 23, list(range(1, 22))),
        ("auto", 24, list(range(4, 22))),
        ("auto", 32, list(range(4, 30))),
        ((2, 0), 4, [2, 3]),
    ],
)
def test_protected_blocks(protect, blocks, free):
    assert Budget(0.5, protect=protect).free_blocks(blocks) == free


def test_protecting_everything_is_refused():
    with pytest.raises(ConfigError, match=r"sparsity.protect=\[2,2\]: leaves no block of 4"):
        Budget(0.5, protect=(2, 2)).free_blocks(4)


def test_a_ratio_that_protected_blocks_make_unreachable_says_so():
    budget = Budget(0.8, round_to=1, protect="auto")
    size = sizes(100, 100, 100, 100).only(budget.free_blocks(4))
    with pytest.raises(BudgetError, match=r"sparsity.protect=auto removes 0\.4950 at most.*or sparsity.protect=none"):
        keep_fraction(budget, size)
