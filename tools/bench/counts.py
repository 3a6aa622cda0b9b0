"""Minimum number of operations in a step of one replicate, counted from the sizes of its networks.

Counts matrix products only, with multiplication and addition as two operations; element-wise operations are left out.
Encoders are frozen in phase D and run once; the discriminator is frozen in phase G. Lower precision applies to phase G
only, because the penalty through x keeps phase D in float32.

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
    """A product [rows, inner] x [inner, columns], batched ``stack`` times, in one of the layouts of a linear layer."""

    layout: Layout
    rows: int
    inner: int
    columns: int
    lower: bool = False
    stack: int = 1

    @property
    def operations(self) -> int:
        """Return the number of multiplications and additions."""
        return 2 * self.stack * self.rows * self.inner * self.columns


def encoder(shape: Shape, modality: str) -> Layers:
    """Return the layers of an encoder, with both heads."""
    down = [shape.features[modality], *shape.hidden[modality]]
    return [*pairwise(down), *[(down[-1], shape.latent)] * 2]


def decoder(shape: Shape, modality: str) -> Layers:
    """Return the layers of a decoder."""
    return list(pairwise([shape.latent, *reversed(shape.hidden[modality]), shape.features[modality]]))


def trunk(shape: Shape) -> Layers:
    """Return the layers of the discriminator's trunk."""
    return list(pairwise([shape.latent, *shape.discriminator]))


def heads(shape: Shape) -> Layers:
    """Return the heads of the discriminator: modality, then class."""
    return [(shape.discriminator[-1], len(shape.features)), (shape.discriminator[-1], shape.classes)]


def parameters(shape: Shape) -> int:
    """Return the number of trainable parameters."""
    of_discriminator = sum((i + 1) * o for i, o in [*trunk(shape), *heads(shape)])
    of_vaes = sum((i + 1) * o for m in shape.features for i, o in [*encoder(shape, m), *decoder(shape, m)])
    # Scale and shift of every normalised layer: all hidden ones but the encoder's last.
    normalised = sum(2 * sum(widths) - widths[-1] for widths in shape.hidden.values())
    return of_discriminator + of_vaes + 2 * normalised


def products(shape: Shape, *, rows: int) -> Counter[Product]:
    """Return the products of a step with their counts."""
    return Counter(
        [*_phase_d(shape, rows), *_phase_g(shape, rows), *_clustering(shape, rows), *_clustering(shape, rows)]
    )


def operations(shape: Shape, *, rows: int) -> int:
    """Return the number of operations in all products of a step."""
    return sum(product.operations * times for product, times in products(shape, rows=rows).items())


def _phase_d(shape: Shape, b: int) -> Iterator[Product]:
    n = b * len(shape.features)
    towards_modality = [*trunk(shape), heads(shape)[0]]
    for m in shape.features:
        yield from _taken("forward", encoder(shape, m), b)  # z
        yield from _taken("input", encoder(shape, m), b)  # the gradient of the logits, from z to x
        yield from _taken("forward", encoder(shape, m), b)  # the gradient of its square, back from x to z
    yield from _taken("forward", [*trunk(shape), *heads(shape)], n)
    yield from _taken("input", towards_modality, n)  # the gradient of the logits, to z
    yield from _taken("forward", trunk(shape), n)  # the gradient of its square, at every layer
    yield from _taken("weight", towards_modality, n)  # and of the weights
    yield from _taken("weight", [*trunk(shape), *heads(shape)], n)  # weight gradients of the losses
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
    """Yield the products of the row similarities of a modality and two overlaps a' S a, with their gradients."""
    k, w, stack = shape.classes, shape.discriminator[-1], len(shape.features)
    yield Product("forward", b, w, b, stack=stack)  # h h'
    yield Product("input", b, b, w, stack=stack)  # its gradient times h, and the transpose
    yield Product("weight", b, b, w, stack=stack)
    for _ in range(2):
        yield Product("weight", k, b, b, stack=stack)  # a' S
        yield Product("input", k, b, k, stack=stack)  # (a' S) a
        yield Product("forward", k, k, b, stack=stack)  # the gradient of a' S
        yield Product("weight", b, k, k, stack=stack)  # of the second a
        yield Product("forward", b, b, k, stack=stack)  # of the first a
        yield Product("input", b, k, b, stack=stack)  # of S
