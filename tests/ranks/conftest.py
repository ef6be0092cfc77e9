"""Pools of processes that all tests of this folder share."""

from collections.abc import Callable, Iterator

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """ranks(size) is a pool of that many processes; see `tests.ranks`."""
    pools: dict[int, Ranks] = {}

    def pool(size: int) -> Ranks:
        return pools.setdefault(size, Ranks(size))

    yield pool
    for each in pools.values():
        each.close()
