"""Allocators that search: the allocator says so itself, and is refused by its name where it lacks a search."""

from __future__ import annotations

import pytest

from cfsp.allocator.coarse import Coarse
from cfsp.allocator.search import Search
from cfsp.errors import ConfigError
from cfsp.pruner.width_choice import _search_of


class Promises(Coarse):
    """Says that it needs the model, and has no search."""

    needs_model = True


def test_an_allocator_is_a_search_where_it_needs_the_model():
    search = Search(["coarse"])
    assert _search_of(search) is search
    assert _search_of(Coarse()) is None


def test_an_allocator_that_needs_the_model_without_a_search_is_refused():
    with pytest.raises(ConfigError, match="Promises: needs_model is true, and it is no SearchingAllocator"):
        _search_of(Promises())
