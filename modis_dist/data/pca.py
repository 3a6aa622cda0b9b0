"""Leading principal components of rows that are read a block at a time, by a randomised range finder.

Steps and random numbers are those of scikit-learn's ``PCA(svd_solver="randomized")``, so the answer is the same up to
rounding; but that holds all rows, twice. Here a block of rows is held, and a few arrays of (rows or features) x
(components + 10). It must not know where rows come from, nor what was done to them before.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Block = NDArray[np.float64]
Blocks = Callable[[], Iterator[tuple[slice, Block]]]  # all rows in order, and where each block of them stands

OVERSAMPLES = 10  # random directions beside those of the components
FEW = 0.1  # of all components: fewer than that need more turns


def randomized_pca(blocks: Blocks, shape: tuple[int, int], *, components: int, seed: int) -> tuple[Block, Block]:
    """Mean [features] and leading components [components, features] of ``shape`` = rows x features without NaN.

    Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1 (arXiv:0909.4061). The rows are gone through 11 times, or
    17 times where the components are few. The largest loading of every component is positive.
    """
    from scipy import linalg  # few runs need it

    held = _Centred(blocks, shape, _mean(blocks, shape))
    wide = shape[0] < shape[1]  # then the transposed rows are decomposed, whose random directions are shorter
    onto, back = (held.transposed_times, held.times) if wide else (held.times, held.transposed_times)
    q: Any = np.random.RandomState(seed).normal(size=(min(shape), components + OVERSAMPLES))
    for _ in range(7 if components < FEW * min(shape) else 4):
        q, _ = linalg.lu(onto(q), permute_l=True, check_finite=False, overwrite_a=True)
        q, _ = linalg.lu(back(q), permute_l=True, check_finite=False, overwrite_a=True)
    q, _ = linalg.qr(onto(q), mode="economic", check_finite=False, overwrite_a=True)
    u, _, vt = linalg.svd(back(q).T, full_matrices=False)
    return held.mean, _with_signs((q @ u[:, :components]).T if wide else vt[:components])


@dataclass(frozen=True)
class _Centred:
    """Rows less their mean, as a matrix that can be multiplied with."""

    blocks: Blocks
    shape: tuple[int, int]
    mean: Block

    def times(self, right: Block) -> Block:
        """This [rows, features] times ``right`` [features, k]."""
        product = np.empty((self.shape[0], right.shape[1]))
        for rows, block in self.blocks():
            np.matmul(block - self.mean, right, out=product[rows])
        return product

    def transposed_times(self, right: Block) -> Block:
        """The transposed of this times ``right`` [rows, k]."""
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
