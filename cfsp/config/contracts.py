"""Contracts of the seven kinds of components that a ``_target_`` may name.

Each contract is a protocol without state. A member without a value is required:
:func:`cfsp.config.components.build` refuses a class that lacks it, by its name. Every other member has a default
here. A class that inherits from its contract inherits these defaults; a class that does not (in a package that does not
import cfsp) gets them when it is built. So the rest of cfsp can use every member of the contract on
any component without looking at its class.

A method returns ``None`` for "not stated". The caller then reports that, and does not guess.

The module is longer than others because an author of a component should have all contracts on one page.

Example:
    A pruner in a package of your own, chosen with ``pruner._target_=mine.Mine plugins.allow=[mine]``::

        @component
        class Mine(Pruner):
            name: str = "mine"
            prunes: ClassVar[bool] = True

            def check(self, view, budget): ...

            def plan(self, context):
                return complete(context, [BlockPlan(...) for block in context.driver.view.blocks])
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from cfsp.allocator.base import Allocation
    from cfsp.allocator.search_space import Counts, SearchSpace
    from cfsp.architecture.views import Channels, DecoderView
    from cfsp.config.budget import Budget, Structure
    from cfsp.config.components import Component
    from cfsp.data.limits import Limits
    from cfsp.evaluation.base import Side
    from cfsp.evaluation.measurement import Measurement
    from cfsp.importance.base import Activation, Scores
    from cfsp.plan.pruning_plan import PruningPlan
    from cfsp.pruner.base import PlanContext
    from cfsp.record.run_record import RunRecord
    from cfsp.recovery.base import Recovered, RecoveryContext
    from cfsp.sparsity.budget import Sizes
    from cfsp.sweep.job import Job, Outcome

#: Kinds of units that a pruner may remove.
Unit = Literal["neurons", "kv_groups", "experts", "submodules", "blocks"]


class NeuronImportance(Protocol):
    """Metric that scores units; units with higher scores are kept. A metric is one class, one file and one YAML.

    Attributes:
        requires: calibration results beside the core statistics that it needs: "gradients", "gram".
        gradient_checkpointing: whether gradients are computed with less memory in more time.
        improves_kept: whether :meth:`improve_kept` is called for each block.
    """

    requires: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    improves_kept: bool = False

    @abstractmethod
    def score(self, channels: Channels, activation: Activation) -> Tensor:
        """Score the input channels of one output projection: FFN neurons, or channels of attention heads.

        Args:
            channels: the channels. ``channels.weights()`` gives their weights in fp32: the matrices that compute the
                channels, [N, d] each (FFN: gate, up; attention: q, k, v), and the output matrix [d, N] (down; o).
            activation: statistics of the channels over the calibration set.

        Returns:
            Scores [N].
        """
        ...

    def improve_kept(self, channels: Channels, activation: Activation, kept: Tensor) -> Tensor:
        """Improve the choice of the units that stay, once their number in a block is known.

        Args:
            channels: see :meth:`score`.
            activation: see :meth:`score`.
            kept: indices of the units with the highest scores: neurons, or KV groups of an attention; [n] int64.

        Returns:
            Indices of as many units, ascending.
        """
        return kept


class Allocator(Protocol):
    """Allocation of the budget to blocks: one class, one file and one YAML.

    Attributes:
        needs_model: whether the model runs for each candidate, so that all of it has to be in memory
            (:class:`SearchingAllocator`).
        keeps_shares_equal: whether every block gets the same share.
    """

    needs_model: bool = False
    keeps_shares_equal: bool = False

    @abstractmethod
    def allocate(self, scores: Scores, sizes: Sizes, keep: float) -> Allocation:
        """Split the kept fraction of all removable parameters over the blocks.

        Args:
            scores: scores of the units of each block that may be pruned, in order.
            sizes: sizes of the same blocks.
            keep: fraction of the removable parameters that stays, 0 < keep <= 1.

        Returns:
            The keep ratio of each block; their parameter-weighted mean must be ``keep``.
        """
        ...

    def block_distance(self) -> str | None:
        """Return the block distance that the allocation follows, for the figure of a run; None: it follows none."""
        return None

    def block_importance(self, scores: Scores) -> Tensor | None:
        """Return the coarse importance of each block [L], which IG-LoRA's ranks follow; None: not stated."""
        return None


class Fitness(Protocol):
    """Measurement of the candidates of a search; lower is better.

    Attributes:
        n_parts: number of parts of the calibration windows that can be measured apart.
    """

    n_parts: int

    @abstractmethod
    def __call__(self, counts: Counts, parts: Sequence[int] | None = None) -> float:
        """Measure the model that keeps these numbers of units.

        Args:
            counts: kept units of each slot of the search space.
            parts: indices of the parts to measure on; None: all.

        Returns:
            Mean per token, in nats; infinity where it is not finite.
        """
        ...


@runtime_checkable
class SearchingAllocator(Allocator, Protocol):
    """Allocator that searches for numbers of units by measuring candidates on the model.

    Attributes:
        searched_kinds: kinds of submodules whose units it moves. The others keep what the first start gives them.
        measure: nll: mean loss of the candidate; kl: mean divergence of its next-token distributions from those of the
            dense model.
        kl_entries: most probable entries of the dense distribution that kl looks at; the others count as one.
    """

    needs_model: bool = True
    searched_kinds: tuple[Literal["ffn", "attention"], ...] = ("ffn",)
    measure: Literal["nll", "kl"] = "nll"
    kl_entries: int = 1024

    @abstractmethod
    def allocators(self) -> list[Allocator]:
        """Return the closed-form allocations that the search starts from."""
        ...

    @abstractmethod
    def search(self, space: SearchSpace, fitness: Fitness) -> tuple[Counts, list[dict[str, Any]]]:
        """Search for the candidate with the lowest fitness.

        Args:
            space: the slots, their legal numbers of units, and the candidates to start from.
            fitness: measures a candidate. Measured values are kept on disk, so that a killed search resumes.

        Returns:
            The best candidate, and the steps that led to it (:meth:`SearchSpace.describe`).
        """
        ...

    def part_sizes(self, n_windows: int, window_tokens: int) -> list[int]:
        """Return the sizes of the parts, in windows, that the first calibration windows are divided into.

        Args:
            n_windows: number of calibration windows.
            window_tokens: tokens of each.
        """
        return [n_windows]


class Pruner(Protocol):
    """Pruning method, which turns a planning context into a plan. It never changes weights while it plans.

    Attributes:
        name: name of the method, for plans, records and tables.
        prunes: False for the dense run.
        plans_with: configuration groups that it uses, of importance and allocator; others cannot be chosen beside it.
        requires: calibration results that it needs beside the core statistics and those of the metric: "gram",
            and with it "held_out" (the moments of every fourth sequence apart).
        structure: units that the scoring stage ranks for it; None: it does not use the scoring stage, or not stated.
        needs_model_in_memory: whether planning needs all weights in memory at once, so that none can be streamed.
    """

    name: str
    prunes: ClassVar[bool]
    plans_with: tuple[str, ...] = ("importance", "allocator")
    requires: tuple[str, ...] = ()
    structure: Structure | None = None
    needs_model_in_memory: bool = False

    @abstractmethod
    def check(self, view: DecoderView, budget: Budget) -> None:
        """Refuse settings for which no plan is possible, cheaply and from shapes alone.

        Args:
            view: the decoder, possibly on the meta device.
            budget: the requested sparsity.

        Raises:
            CfspError: settings contradict each other, the model lacks a part, or the ratio cannot be met.
        """
        ...

    @abstractmethod
    def plan(self, context: PlanContext) -> PruningPlan:
        """Return the plan; the model is not changed."""
        ...

    def removed_units(self) -> tuple[Unit, ...] | None:
        """Return the kinds of units that it may remove, which a numeric probe removes first; None: not stated."""
        return None

    def units(self, view: DecoderView, budget: Budget) -> Mapping[str, int] | None:
        """Count the units in the blocks that may be pruned, e.g. "neurons" -> number; None: not stated.

        Raises:
            ConfigError: every block is protected.
        """
        return None

    def most_removable(self, view: DecoderView, budget: Budget) -> int | None:
        """Count the parameters that it could remove at most; None: not stated, or only the ratio limits them.

        Raises:
            CfspError: every block is protected, or the family cannot lose such units.
        """
        return None

    def biased_projections(self) -> tuple[str, ...] | None:
        """Return the projections that a plan may give a bias, e.g. "mlp.down_proj"; None: not stated."""
        return None

    def keeps_blocks_equal(self, view: DecoderView, budget: Budget, allocator: Allocator) -> bool | None:
        """Return whether all remaining blocks are sure to have the same sizes; None: not stated."""
        return None

    def objections(self, importance: Component[NeuronImportance], allocator: Component[Allocator]) -> Iterator[str]:
        """Yield a line for each chosen metric or allocator that cannot work with these settings on any model."""
        yield from ()

    def check_choices(
        self, view: DecoderView, importance: Component[NeuronImportance], allocator: Component[Allocator]
    ) -> None:
        """Refuse a metric or an allocator that cannot work with these settings on this model.

        Raises:
            CfspError: names the metric or the allocator.
        """
        return None

    def why_unused(self, group: str) -> str:
        """Say in a clause why ``group`` is not among :attr:`plans_with`, and what to use instead."""
        return (
            f"pruner={self.name} has its own way of choosing and does not use {group}; leave it out, or use "
            "pruner=one_shot"
        )

    @staticmethod
    def unused_settings(settings: Mapping[str, Any]) -> frozenset[str]:
        """Return the keys that have no effect beside the other settings; run identity leaves them out.

        Args:
            settings: settings from a configuration or an earlier record; keys may be missing.
        """
        return frozenset()


class Recovery(Protocol):
    """Recovery method, which trains the pruned model without changing its structure.

    Attributes:
        name: name of the recovery, for records and tables.
        trains: False if the weights are not changed.
    """

    name: str
    trains: ClassVar[bool]

    @abstractmethod
    def check(self, view: DecoderView, tokenizer: Any, limits: Limits, device: torch.device) -> dict[str, Any]:
        """Locate and check the data and the hardware.

        Returns:
            The facts that decide the result, by content; they become part of the run identity.

        Raises:
            CfspError: data is missing or does not fit, a module to adapt is missing, or the hardware lacks something.
        """
        ...

    @abstractmethod
    def recover(self, context: RecoveryContext) -> Recovered:
        """Train the model in place."""
        ...

    def memory_advice(self) -> str | None:
        """Name in a clause the keys to change if memory runs out in training; None: not stated."""
        return None


class Evaluator(Protocol):
    """Evaluator of a model: one class and one YAML entry under ``evaluation``.

    Attributes:
        side_by_side: whether the dense and the pruned model are measured in turn, by :meth:`measure_sides`.
        key: configuration key of the evaluator, for messages. Parsing sets it, since ``evaluation`` may hold two
            evaluators of one class.
    """

    side_by_side: ClassVar[bool]
    key: ClassVar[str] = "evaluation"

    @abstractmethod
    def check(self, tokenizer: Any, limits: Limits) -> dict[str, Any]:
        """Locate and check the inputs.

        Returns:
            The facts that decide the figures, by content; they become part of the run identity.

        Raises:
            DataError: an input is missing or does not fit the model.
        """
        ...

    @abstractmethod
    def measure(self, model: nn.Module, tokenizer: Any) -> list[Measurement]:
        """Measure one model."""
        ...

    def check_settings(self) -> dict[str, Any] | None:
        """Check the settings alone, instead of :meth:`check`, if other inputs of the run are wrong already.

        Returns:
            The facts of the settings that decide the figures; None: :meth:`check` takes no longer than this would.
        """
        return None

    def task_folder(self) -> str | None:
        """Return the folder whose files the evaluator would run as code; None: there is none."""
        return None

    def parts(self) -> Mapping[str, Evaluator]:
        """Return the evaluator in parts: name of a task or text -> an evaluator of it alone.

        The figures of each part are stored, so that a killed run does not measure them again when it resumes.
        """
        return {"all": self}

    def measure_sides(self, model: nn.Module, sides: list[Side]) -> dict[str, list[Measurement]]:
        """Measure several sides in alternation, so that a drifting machine favours none; ``side_by_side`` requires it.

        Returns:
            Name of each side -> its measurements.
        """
        raise NotImplementedError(f"{type(self).__name__}: side_by_side needs measure_sides")


class RunLogger(Protocol):
    """Logger that mirrors the record. It is started once for each run and always finished."""

    @abstractmethod
    def start(self, run_id: str, folder: Path, configuration: dict[str, Any]) -> None:
        """Begin a run; errors of the logger are raised here, before any work."""
        ...

    @abstractmethod
    def log(self, values: dict[str, Any]) -> None:
        """Log a step of the training."""
        ...

    @abstractmethod
    def finish(self, record: RunRecord, folder: Path) -> None:
        """End a run, successful or not, with its record in OUT; it may be called again for the same run."""
        ...

    @abstractmethod
    def files(self, name: str, folder: Path, files: Mapping[str, Path]) -> None:
        """Log files that summarise several runs, such as tables.

        Args:
            name: name of the experiment to which the files belong.
            folder: where the logger may write.
            files: name -> file.
        """
        ...


class Launcher(Protocol):
    """Launcher that executes the runs of a sweep. A launcher is one class and one YAML under ``conf/launcher``."""

    def check(self) -> None:
        """Check before any work that everything is available that the launcher needs.

        Raises:
            ConfigError: something is missing; the message says how to get it.
        """
        return None

    @abstractmethod
    def launch(self, jobs: Sequence[Job], report: Callable[[Job, Outcome], None]) -> None:
        """Run every job; wait for a job that another process is running instead of repeating it.

        Args:
            jobs: runs of the sweep.
            report: called with each finished job and its outcome.
        """
        ...


def required_members(contract: type[Any]) -> tuple[str, ...]:
    """Return the members of a contract that have no default."""
    stated = vars(contract)
    attributes = [name for name in contract.__annotations__ if name not in stated]
    return (*attributes, *(name for name, value in stated.items() if _is_abstract(value)))


def optional_members(contract: type[Any]) -> dict[str, Any]:
    """Return the members of a contract that have a default: name -> the default."""
    own = [name for name in vars(contract) if not name.startswith("_")]
    return {name: vars(contract)[name] for name in own if not _is_abstract(vars(contract)[name])}


def _is_abstract(value: Any) -> bool:
    return bool(getattr(value, "__isabstractmethod__", False))
