"""Blockwise principal components equal scikit-learn's up to rounding, for any shape and block size."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from modis_dist.data.pca import FEW, Block, Blocks, randomized_pca


def blocks_of(x: Block, size: int, passes: list[int] | None = None) -> Blocks:
    def blocks() -> Iterator[tuple[slice, Block]]:
        if passes is not None:
            passes.append(0)
        for start in range(0, len(x), size):
            rows = slice(start, min(start + size, len(x)))
            yield rows, x[rows].copy()

    return blocks


def numbers(rows: int, features: int, seed: int = 0) -> Block:
    """Features far from 0, of different size."""
    rng = np.random.default_rng(seed)
    x: NDArray[np.float64] = rng.normal(size=(rows, features)) * np.linspace(0.1, 9, features) + 50
    return x


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 60), st.integers(1, 60), st.data())
def test_blockwise_components_equal_those_of_scikit_learn(rows: int, features: int, data: st.DataObject) -> None:
    # One component less than the centred rows allow: the last direction is only rounding error.
    components = data.draw(st.integers(1, min(rows - 1, features)))
    seed, size = data.draw(st.integers(0, 99)), data.draw(st.integers(1, 70))
    x = numbers(rows, features, seed)
    model = PCA(components, svd_solver="randomized", random_state=seed).fit(x)
    mean, axes = randomized_pca(blocks_of(x, size), x.shape, components=components, seed=seed)
    assert np.allclose(mean, model.mean_) and np.allclose(axes, model.components_, atol=1e-6)


@pytest.mark.parametrize(("rows", "features"), [(300, 80), (80, 300)])
def test_components_with_clear_gaps_equal_those_of_a_full_decomposition(rows: int, features: int) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(rows, 4)) * [100, 30, 10, 3] @ rng.normal(size=(4, features)) + 7
    _, _, right = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    _, axes = randomized_pca(blocks_of(x, 11), x.shape, components=3, seed=0)
    assert np.allclose(np.abs(axes @ right[:3].T), np.eye(3), atol=1e-9)
    assert (np.take_along_axis(axes, np.abs(axes).argmax(axis=1, keepdims=True), axis=1) > 0).all()


@pytest.mark.parametrize(("components", "times"), [(3, 17), (8, 11)])
def test_the_number_of_passes_is_as_documented(components: int, times: int) -> None:
    assert (components < FEW * 40) is (times == 17)
    passes: list[int] = []
    randomized_pca(blocks_of(numbers(50, 40), 9, passes), (50, 40), components=components, seed=0)
    assert len(passes) == times
