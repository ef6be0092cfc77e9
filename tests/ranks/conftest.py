"""Pools of processes that the tests of this folder share, and that end with them."""

from collections.abc import Callable, Iterator

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="package")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """ranks(size) is a pool of that many processes; see `tests.ranks`."""
    pools: dict[int, Ranks] = {}

    def pool(size: int) -> Ranks:
        return pools.setdefault(size, Ranks(size))

    yield pool
    for each in pools.values():
        each.close()
