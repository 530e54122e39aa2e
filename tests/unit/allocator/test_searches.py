"""Allocators that search, on made-up losses: optimum, budget, determinism, and what they refuse."""

from __future__ import annotations

import itertools
import math

import pytest

from cfsp.allocator.evolution import Evolution
from cfsp.allocator.knapsack import Knapsack, QuadraticModel, optimum, quadratic
from cfsp.allocator.search import Search
from cfsp.allocator.search_space import Counts, SearchSpace
from cfsp.config.contracts import Fitness, SearchingAllocator
from cfsp.errors import RunError

LEGAL = tuple(range(8, 97, 8))
BEST = (24, 72, 40, 56)


class Distance(Fitness):
    """Weighted squared distance to the best counts; part p adds a disturbance of its own unless all are measured."""

    def __init__(self, best: Counts = BEST, n_parts: int = 1) -> None:
        self.best, self.n_parts = best, n_parts
        self.measured: list[Counts] = []

    def __call__(self, counts, parts=None) -> float:
        if parts is None:
            self.measured.append(counts)
        disturbance = 0.0 if parts is None else 0.01 * sum((p + 1) * counts[0] for p in parts)
        return (
            sum((at + 1) * (n - b) ** 2 for at, (n, b) in enumerate(zip(counts, self.best, strict=True))) + disturbance
        )


def space(starts, legal=(LEGAL,) * 4, costs=(3,) * 4, kinds=("ffn",) * 4) -> SearchSpace:
    return SearchSpace(tuple(kinds), tuple(range(len(kinds))), tuple(map(tuple, legal)), tuple(costs), tuple(starts))


SEARCHES = {
    "search": lambda: Search(["uniform"], evaluations=200),
    "evolution": lambda: Evolution(["uniform"], generations=30),
    "knapsack": lambda: Knapsack(["uniform"], rounds=12),
}


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("start", [(48, 48, 48, 48), (96, 8, 80, 8), (64, 24, 88, 16)])
def test_the_optimum_is_found_where_all_candidates_can_be_enumerated(name, start) -> None:
    fitness = Distance(n_parts=4)
    best, history = SEARCHES[name]().search(space([start]), fitness)
    candidates = [c for c in itertools.product(LEGAL, repeat=4) if sum(c) == sum(start)]
    assert fitness(best) == min(map(fitness, candidates))
    values = [row[SEARCHES[name]().measure] for row in history]
    assert values == sorted(values, reverse=True)
    assert history[-1]["widths"] == list(best)


@pytest.mark.parametrize("name", SEARCHES)
def test_every_measured_result_is_within_the_budget(name) -> None:
    fitness = Distance()
    best, _ = SEARCHES[name]().search(space([(48, 48, 48, 48)]), fitness)
    assert sum(best) == 4 * 48


@pytest.mark.parametrize("name", SEARCHES)
def test_the_fittest_start_is_taken_and_the_result_is_never_less_fit(name) -> None:
    starts = [(8, 88, 8, 88), (24, 80, 32, 56), (96, 8, 80, 8)]
    fitness = Distance()
    best, history = SEARCHES[name]().search(space(starts), fitness)
    assert history[0]["widths"] == list(starts[1])
    assert fitness(best) <= fitness(starts[1])


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_without_a_finite_start_says_so(name) -> None:
    class Infinite(Distance):
        def __call__(self, counts, parts=None) -> float:
            return math.inf

    with pytest.raises(RunError, match=f"allocator={name}: .* of every start is not finite"):
        SEARCHES[name]().search(space([(48, 48, 48, 48)]), Infinite())


@pytest.mark.parametrize("name", SEARCHES)
def test_blocks_of_unequal_cost_keep_the_budget_within_half_a_step(name) -> None:
    fitness = Distance()
    unequal = space([(48, 48, 48, 48)], costs=(3, 5, 3, 9))
    best, _ = SEARCHES[name]().search(unequal, fitness)
    assert abs(unequal.parameters(best) - unequal.parameters((48, 48, 48, 48))) <= unequal.slack == 8 * 9 / 2


def test_search_measures_each_candidate_once_and_within_its_limit() -> None:
    fitness = Distance()
    Search(["uniform"], evaluations=200).search(space([(48, 48, 48, 48)]), fitness)
    assert len(fitness.measured) == len(set(fitness.measured)) <= 200
    few, _ = Search(["uniform"], evaluations=3).search(space([(48, 48, 48, 48)]), Distance())
    assert sum(few) == 4 * 48


def test_a_transfer_gives_as_many_parameters_as_it_takes() -> None:
    """A neuron of the second block costs three of the first's; a move that leaves the budget is no candidate."""
    two = space([(40, 16)], legal=(range(8, 49, 8), (8, 16, 24)), costs=(3, 9), kinds=("ffn", "ffn"))
    target = two.parameters((40, 16))
    assert two.with_transferred_steps((40, 16), 0, 1, 3, target) == (16, 24)
    assert two.with_transferred_steps((24, 16), 1, 0, 1, two.parameters((24, 16))) == (48, 8)
    assert two.with_transferred_steps((40, 16), 0, 1, 1, target) is None  # a third of a step of the second block
    assert two.with_transferred_steps((40, 24), 0, 1, 3, target) is None  # the second block is whole
    assert two.with_moved_steps((48, 16), 0, 1) is None


def test_evolution_is_the_same_for_the_same_seed() -> None:
    def run(seed: int) -> list[Counts]:
        fitness = Distance(n_parts=4)
        Evolution(["uniform"], generations=4, seed=seed).search(space([(48, 48, 48, 48)]), fitness)
        return fitness.measured

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_evolution_shifts_within_one_kind() -> None:
    """FFNs give to FFNs and attentions to attentions, also where the other kind would lower the loss more."""
    kinds, legal = ("ffn", "ffn", "attention", "attention"), ((*range(8, 97, 8),),) * 2 + ((1, 2, 3, 4),) * 2
    fitness = Distance(best=(96, 8, 1, 4))
    mixed = space([(48, 48, 2, 2)], legal=legal, costs=(3, 3, 500, 500), kinds=kinds)
    best, history = Evolution(["uniform"], generations=20).search(mixed, fitness)
    assert best == (88, 8, 1, 3)
    assert {(sum(counts[:2]), sum(counts[2:])) for counts in fitness.measured} == {(96, 4)}
    assert history[-1]["kv_groups"] == list(best[2:])


def test_evolution_measures_few_children_on_all_tokens() -> None:
    """16 children, of which 4 survive the first stage, and the start."""
    fitness = Distance(n_parts=8)
    Evolution(["uniform"], generations=5, step_sizes=[0.125]).search(space([(48, 48, 48, 48)]), fitness)
    assert len(fitness.measured) == len(set(fitness.measured)) <= 1 + 5 * 4


@pytest.mark.parametrize(
    ("windows", "tokens", "expected"),
    [(64, 1024, [2] * 8), (8, 1024, [2] * 4), (3, 1024, [2, 1]), (64, 4096, [1] * 4), (64, 100, [21] * 3 + [1])],
)
def test_evolution_divides_its_tokens_into_parts_of_the_first_stage(windows, tokens, expected) -> None:
    assert Evolution(["uniform"]).part_sizes(windows, tokens) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": [2048]}, "allocator.survivors"),
        ({"tokens": [4096, 2048]}, "allocator.tokens"),
        ({"survivors": [17]}, "allocator.survivors"),
        ({"tokens": [1, 2, 3], "survivors": [2, 2]}, "allocator.survivors"),
    ],
)
def test_stages_that_do_not_fit_together_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        Evolution(["uniform"], **settings)


def test_every_search_is_a_searching_allocator() -> None:
    assert all(isinstance(search(), SearchingAllocator) for search in SEARCHES.values())


# The quadratic model


def test_a_quadratic_goes_through_the_measured_points() -> None:
    model = quadratic({-4: 3.0, 2: 1.0})
    assert [model.change(steps) for steps in (-4, 0, 2)] == pytest.approx([3.0, 0.0, 1.0])
    assert model.curvature > 0


def test_a_concave_loss_becomes_a_line() -> None:
    model = quadratic({-4: 1.0, 4: -5.0})
    assert (model.curvature, model.slope) == (0.0, -0.75)
    assert (quadratic({-4: 2.0}).slope, quadratic({4: -2.0}).slope) == (-0.5, -0.5)
    assert quadratic({}) == QuadraticModel(0.0, 0.0, 0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_the_optimum_of_the_models_is_that_of_all_candidates(seed) -> None:
    """Against all candidates within the ranges of the models."""
    import random

    draws = random.Random(seed)
    models = [
        QuadraticModel(draws.uniform(-2, 1), draws.choice([0.0, draws.uniform(0, 1)]), -draws.randint(0, 3), 3)
        for _ in range(4)
    ]
    start = (48, 48, 48, 48)
    chosen = optimum(space([start]), start, models, 3 * sum(start))

    def change(counts: Counts) -> float:
        return sum(model.change((n - 48) // 8) for model, n in zip(models, counts, strict=True))

    ranges = [range(48 + 8 * model.fewest, 48 + 8 * model.most + 1, 8) for model in models]
    candidates = [counts for counts in itertools.product(*ranges) if sum(counts) == sum(start)]
    assert sum(chosen) == sum(start)
    assert change(chosen) == pytest.approx(min(map(change, candidates)))
