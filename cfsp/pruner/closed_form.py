"""Compensation of single blocks in closed form: biases or least squares, and the ridges that were chosen for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cfsp.pruner.compensation import bias_compensation
from cfsp.pruner.expert_refit import expert_compensation
from cfsp.pruner.least_squares import Ridge, least_squares_compensation

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.views import BlockView
    from cfsp.calibration.gram_store import GramMatrices
    from cfsp.calibration.statistics import BlockStatistics
    from cfsp.plan.pruning_plan import BlockPlan


@dataclass
class ClosedForm:
    """Compensates the outputs of single blocks for the units that go; gauss_newton starts from there.

    Attributes:
        compensation: as in :class:`cfsp.pruner.one_shot.OneShotPruner`; gauss_newton counts as least_squares.
        ridge: strength of least squares, or auto.
        chosen_ridges: ridges that auto has chosen: kind -> block -> ridge, None for no change.
    """

    compensation: str
    ridge: Ridge
    chosen_ridges: dict[str, Any] = field(default_factory=dict)

    def compensate(
        self,
        block: BlockView,
        decision: BlockPlan,
        statistics: BlockStatistics,
        grams: GramMatrices | None,
        *,
        reuse: bool = False,
        fitted_alone: bool = False,
    ) -> dict[str, Tensor]:
        """Return the replaced tensors of one block by their names in the plan.

        Args:
            block: the block, dense.
            decision: units of it that stay.
            statistics: statistics of the block.
            grams: Gram matrices of the model, for least squares.
            reuse: see :func:`cfsp.pruner.least_squares.least_squares_compensation`.
            fitted_alone: see there.
        """
        if self.compensation == "bias":
            return bias_compensation(block, decision, statistics)
        if self.compensation in ("least_squares", "gauss_newton") and grams is not None:
            experts = expert_compensation(block, decision, grams, self.ridge, self.chosen_ridges, reuse=reuse)
            return experts | least_squares_compensation(
                block, decision, grams, self.ridge, self.chosen_ridges, reuse=reuse, fitted_alone=fitted_alone
            )
        return {}

    def compensate_candidate(
        self,
        block: BlockView,
        decision: BlockPlan,
        start: BlockPlan,
        statistics: BlockStatistics,
        grams: GramMatrices | None,
    ) -> dict[str, Tensor]:
        """Compensate a candidate of a search. Its ridge is chosen once for each projection, for the start.

        A search tries many widths of a block. To choose a ridge takes an eigendecomposition, to refit with a known one
        a Cholesky factorisation.

        Args:
            block: the block, dense.
            decision: units that the candidate keeps.
            start: units that the start of the search keeps.
            statistics: statistics of the block.
            grams: Gram matrices of the model, for least squares.
        """
        if self.ridge == "auto":
            self.compensate(block, start, statistics, grams, reuse=True)
        return self.compensate(block, decision, statistics, grams, reuse=True)
