"""Fixtures of the numerical tests."""

from collections.abc import Iterator

import pytest
import torch

from tests.shapes import checked


@pytest.fixture(scope="module", autouse=True)
def shapes_checked() -> Iterator[None]:
    """Check shape annotations at every call."""
    with checked():
        yield


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: with toy tensors on busy cores, a second one makes these tests up to 40 times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
