"""Reach of each pruner of conf/pruner: the most that it could remove of a model, according to its own check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.config.budget import Budget
from cfsp.config.compose import compose
from cfsp.config.parse import parse
from cfsp.config.run_config import RunConfig
from cfsp.errors import BudgetError, CfspError
from cfsp.pruned_model.adopt import check_adoptable
from cfsp.sparsity.budget import Sizes
from cfsp.system.package import config_folder

if TYPE_CHECKING:
    from cfsp.architecture.views import DecoderView
    from cfsp.config.contracts import Pruner

#: Ratios have four digits and are tried in ten-thousandths, from the largest down. A pruner may also refuse small
#: ratios (less than half a block), so the first ratio that it takes is searched for before the limit above it.
_FINEST = 10_000
_STEPS = (*range(9_500, 0, -500), 200, 100, 50, 10)


@dataclass(frozen=True)
class Reach:
    """Reach of a pruner with its preset's other settings.

    Attributes:
        pruner: its name in conf/pruner.
        scope: part of the model that its ratio counts.
        units: kind of unit that it removes -> number of them; None: not stated by this pruner.
        largest_ratio: largest sparsity.ratio, to four digits; None where the pruner cannot be used.
        parameters: number of parameters that this ratio removes; None where the pruner cannot be used.
        reason: why it cannot be used; empty where it can.
    """

    pruner: str
    scope: str
    units: Mapping[str, int] | None = field(default_factory=dict)
    largest_ratio: float | None = None
    parameters: int | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the reach for JSON."""
        return {**asdict(self), "units": None if self.units is None else dict(self.units)}


@dataclass(frozen=True)
class Plugins:
    """Pruners of other packages.

    Attributes:
        folder: configuration folder with a ``pruner`` group, as ``--config-dir`` names it; None: cfsp's own alone.
        allow: packages whose classes may be built.
    """

    folder: Path | None = None
    allow: tuple[str, ...] = ()

    def overrides(self) -> list[str]:
        """Return the overrides with which a run would use them."""
        place = [] if self.folder is None else [f"hydra.searchpath=[file://{self.folder.resolve()}]"]
        return [*place, *([f"plugins.allow=[{','.join(self.allow)}]"] if self.allow else [])]

    def names(self) -> list[str]:
        """Return the names of all pruners, cfsp's own and others."""
        folders = [config_folder(), *([] if self.folder is None else [self.folder])]
        return sorted({path.stem for folder in folders for path in (folder / "pruner").glob("*.yaml")})


def reaches(view: DecoderView, plugins: Plugins | None = None) -> list[Reach]:
    """Return the reach of every pruner that prunes, by name."""
    plugins = plugins or Plugins()
    reason = ""
    try:
        check_adoptable(view.model)
    except CfspError as error:
        reason = _line(error)
    configs = {name: _preset(name, tuple(plugins.overrides())) for name in plugins.names()}
    return [
        _reach(name, config.pruner.instance, config.budget, view, reason)
        for name, config in configs.items()
        if config.pruner.instance.prunes
    ]


@cache
def _preset(pruner: str, overrides: tuple[str, ...]) -> RunConfig:
    return parse(compose([f"pruner={pruner}", *overrides]))


def _reach(name: str, pruner: Pruner, budget: Budget, view: DecoderView, reason: str) -> Reach:
    if reason:
        return Reach(name, budget.scope, reason=reason)
    scope_parameters = Sizes.of(view).scope_parameters(budget.scope)
    if not scope_parameters:
        return Reach(name, budget.scope, reason=f"sparsity.scope={budget.scope}: the model has no parameters in it")
    try:
        units, most = pruner.units(view, budget), pruner.most_removable(view, budget)
        ratio = min(int(_FINEST * (most or 0) / scope_parameters), _FINEST - 1) / _FINEST
        if most is None or not ratio or refusal(pruner, budget, view, ratio) is not None:
            ratio = largest_ratio(pruner, budget, view)
            most = round(ratio * scope_parameters)
    except CfspError as error:
        return Reach(name, budget.scope, reason=_line(error))
    return Reach(name, budget.scope, units, ratio, most)


def refusal(pruner: Pruner, budget: Budget, view: DecoderView, ratio: float) -> BudgetError | None:
    """Return the error with which the pruner's own check refuses the ratio; None where it takes it.

    Raises:
        CfspError: the check fails for another reason than the ratio.
    """
    try:
        pruner.check(view, replace(budget, ratio=ratio))
    except BudgetError as error:
        return error
    return None


def largest_ratio(pruner: Pruner, budget: Budget, view: DecoderView) -> float:
    """Return the largest ratio that the pruner's own check takes, to four digits.

    Raises:
        CfspError: the check takes no ratio, or fails for another reason than the ratio.
    """
    above = _FINEST
    for step in _STEPS:
        if refusal(pruner, budget, view, step / _FINEST) is None:
            break
        above = step
    else:
        pruner.check(view, budget)  # raises, and names the ratio that the preset would use
        return budget.ratio
    accepted = step
    while above - accepted > 1:
        middle = (above + accepted) // 2
        if refusal(pruner, budget, view, middle / _FINEST) is None:
            accepted = middle
        else:
            above = middle
    return accepted / _FINEST


def _line(error: CfspError) -> str:
    return "; ".join(" ".join(problem.split()) for problem in error.problems)
