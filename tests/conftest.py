"""What every test shares: a random state of its own, and the rules for what may be missing."""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Iterator
from zlib import crc32

import numpy
import pytest
import torch

from tests.machine import HAS_GPU


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
    if item.get_closest_marker("gpu") and not HAS_GPU:
        pytest.skip("needs a CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Examples that draw are skipped where nothing is installed that lays graphs out."""
    if importlib.util.find_spec("fast_sugiyama") is not None:
        return
    for item in items:
        if isinstance(item, pytest.DoctestItem) and (
            item.name.startswith("torchbp.graph.layout")
            or re.search(r"\.to_(svg|html)\(", item.dtest.docstring or "")
        ):
            item.add_marker(pytest.mark.skip(reason="fast-sugiyama is not installed"))
