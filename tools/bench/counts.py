"""Operations that a step of one replicate cannot do without, counted from the sizes of its networks.

Matrix products only, a multiplication and an addition being two operations; what works on single elements is not
counted. The count is the method's: encoders stand still in phase D and are run once, the discriminator stands still in
phase G. A lower precision is for phase G, as the penalty through x keeps phase D in float32.

Legend: b rows of a modality, n rows of all, p features, l latent dimensions, k classes, w last hidden width.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from modis_dist.model.networks import Shape

Layers = list[tuple[int, int]]  # inputs and outputs of each
Layout = Literal["forward", "input", "weight"]


@dataclass(frozen=True)
class Product:
    """[rows, inner] by [inner, columns], ``stack`` times at once; laid out as one of the three of a linear layer."""

    layout: Layout
    rows: int
    inner: int
    columns: int
    lower: bool = False
    stack: int = 1

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.stack * self.rows * self.inner * self.columns


def encoder(shape: Shape, modality: str) -> Layers:
    """With both heads."""
    down = [shape.features[modality], *shape.hidden[modality]]
    return [*pairwise(down), *[(down[-1], shape.latent)] * 2]


def decoder(shape: Shape, modality: str) -> Layers:
    """To the features."""
    return list(pairwise([shape.latent, *reversed(shape.hidden[modality]), shape.features[modality]]))


def trunk(shape: Shape) -> Layers:
    """Of the discriminator."""
    return list(pairwise([shape.latent, *shape.discriminator]))


def heads(shape: Shape) -> Layers:
    """For the modality, then for the class."""
    return [(shape.discriminator[-1], len(shape.features)), (shape.discriminator[-1], shape.classes)]


def parameters(shape: Shape) -> int:
    """Trainable numbers."""
    of_discriminator = sum((i + 1) * o for i, o in [*trunk(shape), *heads(shape)])
    of_vaes = sum((i + 1) * o for m in shape.features for i, o in [*encoder(shape, m), *decoder(shape, m)])
    # Scale and shift of every normalised layer: all hidden ones but the encoder's last.
    normalised = sum(2 * sum(widths) - widths[-1] for widths in shape.hidden.values())
    return of_discriminator + of_vaes + 2 * normalised


def products(shape: Shape, *, rows: int) -> Counter[Product]:
    """Every product of a step and how often it is taken."""
    return Counter(
        [*_phase_d(shape, rows), *_phase_g(shape, rows), *_clustering(shape, rows), *_clustering(shape, rows)]
    )


def operations(shape: Shape, *, rows: int) -> int:
    """Of all products of a step."""
    return sum(product.operations * times for product, times in products(shape, rows=rows).items())


def _phase_d(shape: Shape, b: int) -> Iterator[Product]:
    n = b * len(shape.features)
    towards_modality = [*trunk(shape), heads(shape)[0]]
    for m in shape.features:
        yield from _taken("forward", encoder(shape, m), b)  # z
        yield from _taken("input", encoder(shape, m), b)  # the gradient of the logits, from z to x
        yield from _taken("forward", encoder(shape, m), b)  # and of its square, back from x to z
    yield from _taken("forward", [*trunk(shape), *heads(shape)], n)
    yield from _taken("input", towards_modality, n)  # the gradient of the logits, to z
    yield from _taken("forward", trunk(shape), n)  # of its square: what reaches every layer
    yield from _taken("weight", towards_modality, n)  # and what the weights make of it
    yield from _taken("weight", [*trunk(shape), *heads(shape)], n)  # of the losses
    yield from _taken("input", [*trunk(shape)[1:], *heads(shape)], n)


def _phase_g(shape: Shape, b: int) -> Iterator[Product]:
    whole, n = [*trunk(shape), *heads(shape)], b * len(shape.features)
    for m in shape.features:
        vae = [*encoder(shape, m), *decoder(shape, m)]
        yield from _taken("forward", vae, b, lower=True)
        yield from _taken("weight", vae, b, lower=True)
        yield from _taken("input", vae[1:], b, lower=True)
    yield from _taken("forward", whole, n, lower=True)
    yield from _taken("input", whole, n, lower=True)


def _taken(layout: Layout, layers: Sequence[tuple[int, int]], rows: int, *, lower: bool = False) -> Iterator[Product]:
    for i, o in layers:
        match layout:
            case "forward":  # x [rows, i] by the weight's transpose
                yield Product(layout, rows, i, o, lower)
            case "input":  # the gradient [rows, o] by the weight
                yield Product(layout, rows, o, i, lower)
            case "weight":  # the gradient's transpose [o, rows] by x
                yield Product(layout, o, rows, i, lower)


def _clustering(shape: Shape, b: int) -> Iterator[Product]:
    """The similarity of all rows of a modality and its two overlaps a' S a, with their gradients."""
    k, w, stack = shape.classes, shape.discriminator[-1], len(shape.features)
    yield Product("forward", b, w, b, stack=stack)  # h h'
    yield Product("input", b, b, w, stack=stack)  # its gradient times h, and transposed
    yield Product("weight", b, b, w, stack=stack)
    for _ in range(2):
        yield Product("weight", k, b, b, stack=stack)  # a' S
        yield Product("input", k, b, k, stack=stack)  # (a' S) a
        yield Product("forward", k, k, b, stack=stack)  # the gradient of a' S
        yield Product("weight", b, k, k, stack=stack)  # of the second a
        yield Product("forward", b, b, k, stack=stack)  # of the first a
        yield Product("input", b, k, b, stack=stack)  # of S
