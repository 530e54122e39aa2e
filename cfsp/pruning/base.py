"""What a pruner is: it turns a planning context into a plan. Weights are never touched while planning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.allocate.base import Allocator
    from cfsp.allocate.budget import Budget
    from cfsp.calibrate.cache import StatisticsCache
    from cfsp.calibrate.gradients import GradientTerms
    from cfsp.calibrate.gram import GramMatrices, GramWanted
    from cfsp.calibrate.statistics import Statistics
    from cfsp.data.calibration import CalibrationSet
    from cfsp.importance.base import NeuronImportance
    from cfsp.models.driver import BlockDriver
    from cfsp.models.views import DecoderView
    from cfsp.pruning.plan import PruningPlan


@dataclass(frozen=True)
class PlanContext:
    """Everything a pruner may use. ``driver`` is for methods that must run the model while planning.

    ``gradients``, ``grams``: where metric or compensation require them (``gram_wanted``: which). ``scored``: blocks of
    a streamed model that were scored while they were in memory for the calibration pass. ``cache``: where what is dear
    may be kept; None: nowhere.
    """

    driver: BlockDriver
    calibration: CalibrationSet
    statistics: Statistics
    budget: Budget
    importance: NeuronImportance
    allocator: Allocator
    method: dict[str, Any]
    base_model: str
    base_fingerprint: str
    cache: StatisticsCache | None = None
    gradients: GradientTerms | None = None
    grams: GramMatrices | None = None
    gram_wanted: GramWanted | None = None
    scored: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Pruner(Protocol):
    """``needs_model``: planning runs the model through ``context.driver`` beyond the one calibration pass.

    ``prunes``: False for the dense run. A class attribute ``plans_with`` names the groups it draws on (importance and
    allocator where it is not there).
    """

    name: str
    prunes: ClassVar[bool]

    @property
    def needs_model(self) -> bool: ...

    def check(self, view: DecoderView, budget: Budget) -> None:
        """Refuse cheaply, from shapes alone (``view`` may be on the meta device), what :meth:`plan` could not do.

        Raises:
            CfspError: settings that do not go together, a structure without that part, a ratio that cannot be met.
        """
        ...

    def plan(self, context: PlanContext) -> PruningPlan:
        """The plan; the model is left as it was."""
        ...


def removes_heads(pruner: Any) -> bool:
    """Whether KV groups may go, so that the numeric check must look at them."""
    return getattr(pruner, "structure", "ffn") in ("heads", "heads_ffn")


def removes_experts(pruner: Any) -> bool:
    """Whether whole experts may go."""
    return getattr(pruner, "structure", "ffn") == "experts"
