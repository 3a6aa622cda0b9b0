"""Shape annotations are checked at run time in these tests."""

import pytest
import torch
from jaxtyping import TypeCheckError

from modis_dist.losses.clustering import negative_entropy
from tests.numeric.toy_system import start


def test_arrays_with_inconsistent_shapes_are_refused() -> None:
    with pytest.raises(TypeCheckError, match="probability"):
        negative_entropy(torch.rand(4, 5, 3), torch.rand(4, 2))
    with pytest.raises(TypeCheckError, match="noise"):
        start().model.vae("a").sample_with_vjp(torch.rand(1, 6, 7), torch.rand(1, 5, 4))
