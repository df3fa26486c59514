"""Nodes for the tests that kill them."""

from collections.abc import Iterator

import pytest
from cluster import chaos


@pytest.fixture(scope="module")
def machines(no_shared_cluster: None) -> Iterator[chaos.Machines]:
    """Two of one core each."""
    with chaos.machines(nodes=2, cpus=1) as found:
        yield found
