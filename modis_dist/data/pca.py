"""Randomised PCA of rows that are read block by block.

Follows scikit-learn's ``PCA(svd_solver="randomized")`` step by step, with the same random numbers, so results agree up
to rounding. scikit-learn holds two copies of all rows in memory; this module holds one block and a few arrays of
(rows or features) x (components + 10).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Block = NDArray[np.float64]
Blocks = Callable[[], Iterator[tuple[slice, Block]]]  # all rows in order, each block with its position

OVERSAMPLES = 10  # additional random directions
FEW = 0.1  # below this fraction of all components, more power iterations are made


def randomized_pca(blocks: Blocks, shape: tuple[int, int], *, components: int, seed: int) -> tuple[Block, Block]:
    """Return mean [features] and leading components [components, features]; ``shape`` is (rows, features), without NaN.

    Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1 (arXiv:0909.4061). Makes 11 passes over the rows, 17 for
    few components. The largest loading of every component is positive.
    """
    from scipy import linalg  # imported here because few runs need it

    centred = _Centred(blocks, shape, _mean(blocks, shape))
    wide = shape[0] < shape[1]  # decompose the transpose, which needs fewer random numbers
    project, lift = (centred.transposed_times, centred.times) if wide else (centred.times, centred.transposed_times)
    q: Any = np.random.RandomState(seed).normal(size=(min(shape), components + OVERSAMPLES))
    for _ in range(7 if components < FEW * min(shape) else 4):
        q, _ = linalg.lu(project(q), permute_l=True, check_finite=False, overwrite_a=True)
        q, _ = linalg.lu(lift(q), permute_l=True, check_finite=False, overwrite_a=True)
    q, _ = linalg.qr(project(q), mode="economic", check_finite=False, overwrite_a=True)
    u, _, vt = linalg.svd(lift(q).T, full_matrices=False)
    return centred.mean, _with_signs((q @ u[:, :components]).T if wide else vt[:components])


@dataclass(frozen=True)
class _Centred:
    """The rows minus their mean, as a linear operator."""

    blocks: Blocks
    shape: tuple[int, int]
    mean: Block

    def times(self, right: Block) -> Block:
        """Multiply with ``right`` [features, k]."""
        product = np.empty((self.shape[0], right.shape[1]))
        for rows, block in self.blocks():
            np.matmul(block - self.mean, right, out=product[rows])
        return product

    def transposed_times(self, right: Block) -> Block:
        """Multiply the transpose with ``right`` [rows, k]."""
        product = np.zeros((self.shape[1], right.shape[1]))
        for rows, block in self.blocks():
            product += (block - self.mean).T @ right[rows]
        return product


def _mean(blocks: Blocks, shape: tuple[int, int]) -> Block:
    total = np.zeros(shape[1])
    for _, block in blocks():
        total += block.sum(axis=0)
    return total / shape[0]


def _with_signs(components: Block) -> Block:
    largest = np.abs(components).argmax(axis=1, keepdims=True)
    signed: Block = components * np.sign(np.take_along_axis(components, largest, axis=1))
    return signed
