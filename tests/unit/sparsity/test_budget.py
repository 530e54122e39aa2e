"""Widths that meet a budget: legal, as near to the request as steps allow, and the released code's rule where asked."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsp.config.budget import Budget
from cfsp.errors import BudgetError
from cfsp.sparsity.budget import Sizes, keep_fraction, legal_widths, to_widths


def sizes_of(widths: list[int], cost: int = 12) -> Sizes:
    total = sum(widths) * cost
    none = (0,) * len(widths)
    return Sizes(tuple(widths), (cost,) * len(widths), none, none, total, 2 * total, 3 * total)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(64, 400), min_size=1, max_size=6),
    st.floats(0.05, 0.6),
    st.sampled_from([1, 8, 32]),
    st.randoms(use_true_random=False),
)
def test_exact_widths_are_legal_and_within_half_a_step_of_the_request(widths, ratio, round_to, random):
    budget, sizes = Budget(ratio, round_to=round_to), sizes_of(widths)
    try:
        keep_fraction(budget, sizes)
    except BudgetError:  # the smallest legal widths keep more
        return
    desired = [random.uniform(0, 1.2) * n for n in widths]
    kept = to_widths(desired, budget, sizes).per_block
    legal = legal_widths(budget, sizes)
    assert all(width in options for width, options in zip(kept, legal, strict=True))
    missing = abs(sum(kept) - (1 - ratio) * sum(widths))
    # A block's own width may lie nearer to the multiple below it than a whole step.
    assert missing <= round_to / 2 + 1e-6 or all(width in (options[0], options[-1]) for width, options in zip(
        kept, legal, strict=True
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("desired", "round_to", "expected"),
    [
        (100.4, 32, 96),  # int((100.4 + 16) / 32) * 32
        (112.0, 32, 128),
        (100.4, 1, 101),  # int(100.4) + 1
        (3.0, 32, 32),  # the released code would keep everything
        (500.0, 32, 256),  # never more than there are
    ],
)
def test_nearest_is_the_rule_of_the_released_code(desired, round_to, expected):
    budget = Budget(0.5, round_to=round_to, rounding="nearest")
    assert to_widths([desired], budget, sizes_of([256])).per_block == (expected,)


def test_protected_blocks_by_depth():
    assert Budget(0.2, protect="auto").free_blocks(32) == list(range(4, 30))
    assert Budget(0.2, protect="auto").free_blocks(8) == list(range(1, 7))
    assert Budget(0.2, protect=(2, 0)).free_blocks(4) == [2, 3]
