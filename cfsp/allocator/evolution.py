"""Allocation by evolution: units shift between blocks, and the fittest of many children goes on.

The search is that of EvoPress (arXiv 2410.14649), DarwinLM (2502.07780) and Tyr-the-Pruner (2503.09657), over levels
that need no library on disk: a level is a width, its kept units are the best by the scores, and their refit comes from
the Gram matrices of one calibration pass.
"""

from __future__ import annotations

import logging
import math
import random
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from cfsp.allocator.base import Allocation
from cfsp.allocator.search import Start, starting_allocators
from cfsp.config.components import component
from cfsp.config.contracts import Allocator, SearchingAllocator
from cfsp.errors import RunError
from cfsp.system.progress import progress

if TYPE_CHECKING:
    from cfsp.allocator.search_space import Counts, SearchSpace
    from cfsp.config.contracts import Fitness
    from cfsp.importance.base import Scores
    from cfsp.sparsity.budget import Sizes

log = logging.getLogger(__name__)

#: Draws of a child before a generation goes on with fewer children.
_DRAWS = 50


@component
class Evolution(SearchingAllocator):
    """Evolve the numbers of kept units from the fittest closed-form allocation, with one parent.

    In each generation the parent has ``children``. A child shifts units between slots of one kind (FFN to FFN,
    attention to attention), once or several times, so that the budget stays exact. All children are measured on few
    tokens, the survivors on more. A child replaces the parent only where it is fitter on all search tokens, so
    that the result is never less fit than the start.

    Attributes:
        starts: closed-form allocations to start from.
        measure: kl: divergence of the next-token distributions from the dense model's; nll: loss.
        kl_entries: most probable entries of the dense distribution that kl looks at; the others count as one.
        generations: generations for each step size.
        children: children of a generation.
        step_sizes: units of one shift, as a share of the units of the slot, in the order in which they are used.
        shifts: most shifts of a child; their number is the smaller of two uniform draws, as in EvoPress.
        tokens: search tokens of each stage of a generation, rounded up to whole calibration windows. The stages before
            the last one draw their windows anew in each generation.
        survivors: children that each stage but the last one leaves over.
        seed: seed of all draws.
    """

    searched_kinds = ("ffn", "attention")

    starts: Annotated[list[Start], Field(min_length=1)]
    measure: Literal["nll", "kl"] = "kl"
    kl_entries: Annotated[int, Field(ge=1)] = 1024
    generations: Annotated[int, Field(ge=1)] = 8
    children: Annotated[int, Field(ge=1)] = 16
    step_sizes: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] = Field(
        default_factory=lambda: [0.125, 0.0625, 0.03125]
    )
    shifts: Annotated[int, Field(ge=1)] = 3
    tokens: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = Field(
        default_factory=lambda: [2048, 16384]
    )
    survivors: list[Annotated[int, Field(ge=1)]] = Field(default_factory=lambda: [4])
    seed: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        if len(self.survivors) != len(self.tokens) - 1:
            raise ValueError(
                f"allocator.survivors={self.survivors}: one number for each stage of allocator.tokens={self.tokens} "
                "but the last is expected"
            )
        if any(after <= before for before, after in pairwise(self.tokens)):
            raise ValueError(f"allocator.tokens={self.tokens}: each stage needs more tokens than the one before")
        if any(after >= before for before, after in pairwise([self.children + 1, *self.survivors])):
            raise ValueError(
                f"allocator.survivors={self.survivors}: each stage must leave fewer children than the one before, and "
                f"the first no more than allocator.children={self.children}"
            )

    def allocate(self, scores: Scores, sizes: Sizes, keep: float) -> Allocation:
        """Return the first start, for callers that have no model to run."""
        return self.allocators()[0].allocate(scores, sizes, keep)

    def allocators(self) -> list[Allocator]:
        """See :class:`cfsp.config.contracts.SearchingAllocator`."""
        return starting_allocators(self.starts)

    def part_sizes(self, n_windows: int, window_tokens: int) -> list[int]:
        """See :class:`cfsp.config.contracts.SearchingAllocator`: a part has the windows of the first stage."""
        size, total = (
            min(n_windows, math.ceil(tokens / window_tokens)) for tokens in (self.tokens[0], self.tokens[-1])
        )
        return [size] * (total // size) + ([total % size] if total % size else [])

    def search(self, space: SearchSpace, fitness: Fitness) -> tuple[Counts, list[dict[str, Any]]]:
        """See :class:`cfsp.config.contracts.SearchingAllocator`.

        Raises:
            RunError: no start has a finite fitness.
        """
        parent, lowest = fittest_start(space, fitness, "evolution")
        history = [space.describe(parent, self.measure, lowest)]
        draws, target = random.Random(self.seed), space.parameters(parent)
        tried = {parent}
        for step_size in self.step_sizes:
            for _ in progress(range(self.generations), f"evolution, steps of {step_size:g}", unit="generation"):
                children = self._children(space, parent, step_size, target, draws, tried)
                finalists = self._finalists(children, fitness, draws)
                tried.update(finalists)
                for child in finalists:
                    value = fitness(child)
                    if value < lowest:
                        parent, lowest = child, value
                if parent in finalists:
                    history.append(space.describe(parent, self.measure, lowest))
        log.info(
            "evolution: %d generations, %s %.4f to %.4f",
            len(self.step_sizes) * self.generations, self.measure.upper(), history[0][self.measure], lowest,
        )  # fmt: skip
        return parent, history

    def _children(
        self,
        space: SearchSpace,
        parent: Counts,
        step_size: float,
        target: int,
        draws: random.Random,
        tried: set[Counts],
    ) -> list[Counts]:
        """Draw the children of one generation; none is the parent, or has been measured on all search tokens."""
        children: list[Counts] = []
        for _ in range(_DRAWS * self.children):
            if len(children) == self.children:
                break
            child = parent
            for _ in range(min(draws.randint(1, self.shifts), draws.randint(1, self.shifts))):
                child = _shifted(space, child, step_size, target, draws)
            if child not in tried and child not in children:
                children.append(child)
        return children

    def _finalists(self, children: list[Counts], fitness: Fitness, draws: random.Random) -> list[Counts]:
        """Return the children that survive the stages before the last one, the fittest first."""
        for tokens, survivors in zip(self.tokens, self.survivors, strict=False):
            n_parts = min(fitness.n_parts, max(1, round(tokens / self.tokens[0])))
            parts = sorted(draws.sample(range(fitness.n_parts), n_parts))
            # A stable sort: of equal children the earlier one survives, on every machine.
            children = sorted(children, key=lambda child: fitness(child, parts))[:survivors]
        return children


def fittest_start(space: SearchSpace, fitness: Fitness, name: str) -> tuple[Counts, float]:
    """Measure every start, and return the fittest with its fitness.

    Args:
        space: the space with the starts.
        fitness: measures a candidate.
        name: the allocator's name, for the message.

    Raises:
        RunError: no start has a finite fitness.
    """
    values = {counts: fitness(counts) for counts in space.starts}
    best = min(values, key=lambda counts: values[counts])
    if not math.isfinite(values[best]):
        raise RunError(f"allocator={name}: the fitness of every start is not finite; try model.dtype=float32")
    return best, values[best]


def _shifted(space: SearchSpace, counts: Counts, step_size: float, target: int, draws: random.Random) -> Counts:
    """Shift units between two random slots of one kind; return the counts unchanged where no shift was possible."""
    for _ in range(_DRAWS):
        giver = draws.randrange(len(counts))
        takers = [slot for slot, kind in enumerate(space.kinds) if kind == space.kinds[giver] and slot != giver]
        if not takers:
            continue
        steps = max(1, round(step_size * len(space.legal[giver])))
        shifted = space.with_transferred_steps(counts, giver, draws.choice(takers), steps, target)
        if shifted is not None:
            return shifted
    return counts
