"""What every test shares: a random state of its own, and the rule for tests that need a GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator
from zlib import crc32

import numpy
import pytest
import torch


@pytest.fixture(autouse=True)
def _own_random_state(request: pytest.FixtureRequest) -> Iterator[None]:
    """Random numbers that depend on the test's name alone: neither on order nor on process."""
    seed = crc32(request.node.nodeid.encode())
    states = torch.get_rng_state(), numpy.random.get_state(), random.getstate()
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)
    yield
    torch.set_rng_state(states[0])
    numpy.random.set_state(states[1])
    random.setstate(states[2])


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
