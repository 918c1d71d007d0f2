"""The tests' own SLURM, started once."""

import pytest
from cluster import running_cluster


@pytest.fixture(scope="session")
def cluster():
    """Two nodes of 8 CPUs and 4 GPUs, both pretended; skips where Debian's SLURM cannot be had."""
    with running_cluster() as running:
        yield running
